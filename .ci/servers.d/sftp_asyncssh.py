"""AsyncSSH's SFTP server: sftp_asyncssh.py PORT HOST_KEY AUTHORIZED_KEYS"""
import asyncio
import sys

import asyncssh

port, host_key, authorized = sys.argv[1:]


async def serve():
    await asyncssh.listen('127.0.0.1', int(port), server_host_keys=[host_key], sftp_factory=True,
                          authorized_client_keys=authorized)
    await asyncio.Event().wait()

asyncio.run(serve())
