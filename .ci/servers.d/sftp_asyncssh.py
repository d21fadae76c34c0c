"""AsyncSSH's SFTP server: sftp_asyncssh.py PORT HOST_KEY AUTHORIZED_KEYS [PASSWORD_FILE [QUESTION]]

With a password it takes that alone; with a question it asks for it in its own words
(keyboard-interactive, RFC 4256).
"""
import asyncio
import sys

import asyncssh

port, host_key, authorized, *more = sys.argv[1:]
password, question = (more + [None, None])[:2]
if password:
    with open(password) as handle:
        password = handle.readline().rstrip('\n')


class Gate(asyncssh.SSHServer):
    def password_auth_supported(self):
        return bool(password) and not question

    def validate_password(self, _user, given):
        return given == password

    def kbdint_auth_supported(self):
        return bool(question)

    def get_kbdint_challenge(self, _user, _lang, _submethods):
        return '', '', '', [(question, False)]

    def validate_kbdint_response(self, _user, answers):
        return answers == [password]


async def serve():
    await asyncssh.listen('127.0.0.1', int(port), server_factory=Gate, server_host_keys=[host_key],
                          sftp_factory=True, authorized_client_keys=() if password else authorized)
    await asyncio.Event().wait()

asyncio.run(serve())
