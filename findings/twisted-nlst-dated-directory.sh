#!/usr/bin/env bash
# Software:  Twisted 26.10.0, its FTP server (twisted.protocols.ftp)
# Behaviour: a directory whose name has a dash or a dot, such as 2026-11-28, is taken for a pattern by NLST, which
#            answers with the directory's own name and 226 instead of what is in it; LIST lists it rightly. NLST
#            without a name is 500, and NLST of one file in the current directory gives DIRECTORY/FILE. SIZE of
#            a directory answers 213 as if it were a file.
# Careful:   an NLST of . that answers with one name may hold none of the directory's files: never take it for
#            "nothing of ours is there". Ask for the exact name (SIZE, MDTM), or use LIST; a 213 to SIZE does not
#            say that a name is a file.
# Seen:      in 2026-11-28: NLST: 500
#            in 2026-11-28: NLST .: 226 2026-11-28
#            in 2026-11-28: NLST run1: 226 2026-11-28/run1
#            in 2026-11-28: LIST .: 226 run1 run2
#            in 2026_11_28: NLST .: 226 run1 run2
#            SIZE 2026-11-28: 213
set -euo pipefail
place=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" || true; wait; rm -rf "$place"' EXIT
cd "$place"

python3 -m venv venv
venv/bin/pip install -q --no-compile --disable-pip-version-check twisted==26.10.0 > pip.log 2>&1 \
    || { cat pip.log; exit 1; }

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
for directory in 2026-11-28 2026_11_28; do
    mkdir -p "served/$directory"
    touch "served/$directory/run1" "served/$directory/run2"
done
cat > serve.py << 'END'
import sys
from twisted.cred.checkers import AllowAnonymousAccess
from twisted.cred.portal import Portal
from twisted.internet import reactor
from twisted.protocols.ftp import FTPFactory, FTPRealm
portal = Portal(FTPRealm('served'), [AllowAnonymousAccess()])
reactor.listenTCP(int(sys.argv[1]), FTPFactory(portal), interface='127.0.0.1')
reactor.run()
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
ftp = ftplib.FTP()
ftp.connect('127.0.0.1', port, 20)
ftp.login('anonymous', 'guest')


def names(command):
    lines = []
    try:
        reply = ftp.retrlines(command, lines.append)
    except ftplib.Error as error:
        reply = str(error)
    return ' '.join([reply[:3]] + sorted(line.split()[-1] for line in lines))


for directory, commands in (('2026-11-28', ('NLST', 'NLST .', 'NLST run1', 'LIST .')), ('2026_11_28', ('NLST .',))):
    ftp.cwd('/' + directory)
    for command in commands:
        print('in %s: %s: %s' % (directory, command, names(command)))
print('SIZE 2026-11-28:', ftp.sendcmd('SIZE /2026-11-28')[:3])
ftp.quit()
END
seen=$(python3 ask.py "$port" || cat log)
echo "$seen"
expected='in 2026-11-28: NLST: 500
in 2026-11-28: NLST .: 226 2026-11-28
in 2026-11-28: NLST run1: 226 2026-11-28/run1
in 2026-11-28: LIST .: 226 run1 run2
in 2026_11_28: NLST .: 226 run1 run2
SIZE 2026-11-28: 213'
if [ "$seen" != "$expected" ]; then
    echo 'differs from what was seen:'
    diff <(echo "$expected") <(echo "$seen") || exit 1
fi
echo 'same as seen'
