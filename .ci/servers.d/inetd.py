"""A process for each connection, which is its input and output: inetd.py PORT PROGRAM ..."""
import socket
import subprocess
import sys
import threading

listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(('127.0.0.1', int(sys.argv[1])))
listener.listen(64)
while True:
    line, _ = listener.accept()
    child = subprocess.Popen(sys.argv[2:], stdin=line, stdout=line)
    threading.Thread(target=child.wait, daemon=True).start()
    line.close()
