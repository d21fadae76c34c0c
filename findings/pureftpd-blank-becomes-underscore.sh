#!/usr/bin/env bash
# Software:  Pure-FTPd, Debian's pure-ftpd 1.0.50-2.1+b2
# Behaviour: a blank at the beginning or end of the argument of STOR and MKD becomes `_`, with 226 or 257
#            and no word of it: ` day` is stored as `_day`, over a `_day` that was there.  SIZE, MDTM, RETR,
#            RNFR do not do so and answer 550 for ` day`.  A blank at the beginning of the last part of a
#            path (`sub/ day`) is kept.
# Careful:   after an upload ask for the exact name before the source is removed, and send no name with
#            a blank at an edge to this server other than behind a directory's name.
# Seen:      STOR '_day': 226
#            STOR ' day': 226
#            SIZE ' day': 550
#            RETR ' day': 550
#            RNFR ' day': 550
#            MKD 'sub ': 257
#            STOR 'sub_/ day': 226
#            files: _day=content of ' day', sub_/ day=content of 'sub_/ day'
set -euo pipefail
place=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" || true; wait; rm -rf "$place"' EXIT
cd "$place"

apt-get download -qq pure-ftpd=1.0.50-2.1+b2 pure-ftpd-common=1.0.50-2.1 > apt.log 2>&1 || { cat apt.log; exit 1; }
for package in *.deb; do dpkg -x "$package" root; done

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
password=$(openssl rand -hex 8)
mkdir home
chmod 711 .
chown nobody home
echo "mover:$(openssl passwd -6 "$password"):$(id -u nobody):$(id -g nobody)::$place/home/./::::::::::::" > users
root/usr/bin/pure-pw mkdb users.pdb -f users
root/usr/sbin/pure-ftpd -S "127.0.0.1,$port" -l "puredb:$place/users.pdb" -E -H -u 1 -g "$place/pid" > log 2>&1 &
server=$!

cat > ask.py << 'END'
import ftplib, io, socket, sys, time
port, password = int(sys.argv[1]), sys.argv[2]
for _ in range(100):
    try:
        socket.create_connection(('127.0.0.1', port)).close()
        break
    except OSError:
        time.sleep(0.1)
ftp = ftplib.FTP()
ftp.connect('127.0.0.1', port, 20)
ftp.login('mover', password)


def reply(function, *arguments):
    try:
        return str(function(*arguments))[:3]
    except ftplib.error_perm as error:
        return str(error)[:3]


def store(name):
    return ftp.storbinary('STOR ' + name, io.BytesIO(("content of '%s'" % name).encode()))


ftp.voidcmd('TYPE I')
print("STOR '_day': " + reply(store, '_day'))
print("STOR ' day': " + reply(store, ' day'))
print("SIZE ' day': " + reply(ftp.sendcmd, 'SIZE  day'))
print("RETR ' day': " + reply(ftp.retrbinary, 'RETR  day', print))
print("RNFR ' day': " + reply(ftp.sendcmd, 'RNFR  day'))
print("MKD 'sub ': " + reply(ftp.sendcmd, 'MKD sub '))
print("STOR 'sub_/ day': " + reply(store, 'sub_/ day'))
ftp.close()
END
seen=$(python3 ask.py "$port" "$password" || cat log
       cd home
       echo "files: $(find . -type f -printf '%P\n' | LC_ALL=C sort | while IFS= read -r name; do
           echo "$name=$(cat "$name")"; done | paste -sd , | sed 's/,/, /g')")
echo "$seen"
expected="STOR '_day': 226
STOR ' day': 226
SIZE ' day': 550
RETR ' day': 550
RNFR ' day': 550
MKD 'sub ': 257
STOR 'sub_/ day': 226
files: _day=content of ' day', sub_/ day=content of 'sub_/ day'"
if [ "$seen" != "$expected" ]; then
    echo 'differs from what was seen:'
    diff <(echo "$expected") <(echo "$seen") || exit 1
fi
echo 'same as seen'
