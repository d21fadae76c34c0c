"""Paramiko with the stub of sftpserver: sftp_paramiko.py PORT HOST_KEY AUTHORIZED_KEYS"""
import socket
import sys
import threading

import paramiko
from sftpserver.stub_sftp import StubServer, StubSFTPServer

port, host_key, authorized = sys.argv[1:]
known = open(authorized).read().split()[1]
StubSFTPServer.ROOT = ''
StubServer.check_auth_password = lambda self, name, word: paramiko.AUTH_FAILED
StubServer.check_auth_publickey = lambda self, name, key: \
    paramiko.AUTH_SUCCESSFUL if key.get_base64() == known else paramiko.AUTH_FAILED


def serve(line):
    transport = paramiko.Transport(line)
    transport.add_server_key(paramiko.Ed25519Key.from_private_key_file(host_key))
    transport.set_subsystem_handler('sftp', paramiko.SFTPServer, StubSFTPServer)
    try:
        transport.start_server(server=StubServer())
        transport.join()
    except (paramiko.SSHException, EOFError):
        pass                    # somebody who only asked whether anybody listens


listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(('127.0.0.1', int(port)))
listener.listen(64)
while True:
    threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()
