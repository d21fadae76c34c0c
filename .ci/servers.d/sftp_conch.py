"""Twisted Conch's SFTP server: sftp_conch.py PORT HOST_KEY AUTHORIZED_KEYS"""
import sys

from twisted.conch.avatar import ConchUser
from twisted.conch.checkers import InMemorySSHKeyDB, SSHPublicKeyChecker
from twisted.conch.interfaces import ISFTPServer
from twisted.conch.ssh.factory import SSHFactory
from twisted.conch.ssh.filetransfer import FileTransferServer
from twisted.conch.ssh.keys import Key
from twisted.conch.ssh.session import SSHSession
from twisted.conch.unix import SFTPServerForUnixConchUser
from twisted.cred.portal import Portal
from twisted.internet import reactor
from twisted.python.filepath import FilePath
from twisted.python.components import registerAdapter

port, host_key, authorized = sys.argv[1:]


class Account(ConchUser):
    """Whoever started this program."""

    def __init__(self):
        ConchUser.__init__(self)
        self.channelLookup[b'session'] = SSHSession
        self.subsystemLookup[b'sftp'] = FileTransferServer

    def getHomeDir(self):
        return FilePath('/')

    def _runAsUser(self, steps, *args, **kwargs):
        """As nobody else.  steps: one function, or (function, arguments) pairs."""
        for function, arguments in [(steps, args)] if callable(steps) else steps:
            answer = function(*arguments, **kwargs)
        return answer


class Accounts:
    def requestAvatar(self, name, mind, *interfaces):
        return interfaces[0], Account(), lambda: None


class AnyName(InMemorySSHKeyDB):
    def __init__(self, keys):
        self.keys = keys

    def getAuthorizedKeys(self, name):
        return self.keys


registerAdapter(SFTPServerForUnixConchUser, Account, ISFTPServer)
factory = SSHFactory()
factory.privateKeys = {b'ssh-ed25519': Key.fromFile(host_key)}
factory.publicKeys = {b'ssh-ed25519': Key.fromFile(host_key).public()}
with open(authorized, 'rb') as keys:
    factory.portal = Portal(Accounts(), [SSHPublicKeyChecker(AnyName([Key.fromString(keys.read())]))])
reactor.listenTCP(int(port), factory, interface='127.0.0.1')
reactor.run()
