#!/usr/bin/env bash
# Software:  aioftp 0.28.3 (pip), its FTP server
# Behaviour: commands that arrive together are worked on side by side, and each answer goes out when it is
#            ready, not in the order of the commands (RFC 959, section 5.4, wants a reply to each in
#            turn).  A command that is quickly refused is answered before the question that was sent first.
# Careful:   with a server that one does not know, send the next command when the last one was answered, or
#            tell the answers apart by what they say (MLST names its path), never by counting them.
# Seen:      each after the answer: MLST=250 NOOP=502
#            sent together, counted: MLST=502 NOOP=250
set -euo pipefail
place=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" || true; wait; rm -rf "$place"' EXIT
cd "$place"

python3 -m venv venv
venv/bin/pip install -q --no-compile --disable-pip-version-check aioftp==0.28.3 > pip.log 2>&1 \
    || { cat pip.log; exit 1; }
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
mkdir home
echo content > home/file
cat > serve.py << 'END'
import asyncio, sys
import aioftp


async def main():
    server = aioftp.Server([aioftp.User(base_path='home')])
    await server.run('127.0.0.1', int(sys.argv[1]))

asyncio.run(main())
END
venv/bin/python serve.py "$port" > log 2>&1 &
server=$!

cat > ask.py << 'END'
import ftplib, socket, sys, time
port = int(sys.argv[1])
for _ in range(100):
    try:
        socket.create_connection(('127.0.0.1', port)).close()
        break
    except OSError:
        time.sleep(0.1)


def reply(ftp):
    try:
        return ftp.getresp()[:3]
    except ftplib.Error as error:
        return str(error)[:3]


ftp = ftplib.FTP()
ftp.connect('127.0.0.1', port, 20)
ftp.login()
answers = []
for command in 'MLST file', 'NOOP':
    ftp.putcmd(command)
    answers.append(reply(ftp))
print('each after the answer: MLST=%s NOOP=%s' % tuple(answers))
ftp.sock.sendall(b'MLST file\r\nNOOP\r\n')
print('sent together, counted: MLST=%s NOOP=%s' % (reply(ftp), reply(ftp)))
ftp.close()
END
seen=$(python3 ask.py "$port" || cat log)
echo "$seen"
expected='each after the answer: MLST=250 NOOP=502
sent together, counted: MLST=502 NOOP=250'
if [ "$seen" != "$expected" ]; then
    echo 'differs from what was seen:'
    diff <(echo "$expected") <(echo "$seen") || exit 1
fi
echo 'same as seen'
