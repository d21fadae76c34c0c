"""Twisted's FTP server: ftp_twisted.py PORT TOP PASSWORD"""
import sys

from twisted.cred.checkers import InMemoryUsernamePasswordDatabaseDontUse
from twisted.cred.portal import Portal
from twisted.internet import reactor
from twisted.protocols.ftp import FTPFactory, FTPRealm
from twisted.python.filepath import FilePath

port, top, password = sys.argv[1:]
realm = FTPRealm(top)
realm.getHomeDirectory = lambda avatar: FilePath(top)
checker = InMemoryUsernamePasswordDatabaseDontUse()
checker.addUser('mover', password)
reactor.listenTCP(int(port), FTPFactory(Portal(realm, [checker])), interface='127.0.0.1')
reactor.run()
