"""pyftpdlib: ftp_pyftpdlib.py PORT TOP PASSWORD"""
import sys

from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import FTPServer

port, top, password = sys.argv[1:]
FTPHandler.authorizer = DummyAuthorizer()
FTPHandler.authorizer.add_user('mover', password, top, perm='elradfmwMT')
FTPServer(('127.0.0.1', int(port)), FTPHandler).serve_forever()
