"""aioftp: ftp_aioftp.py PORT TOP PASSWORD"""
import asyncio
import sys

import aioftp

port, top, password = sys.argv[1:]
user = aioftp.User('mover', password, base_path=top)
asyncio.run(aioftp.Server([user]).run('127.0.0.1', int(port)))
