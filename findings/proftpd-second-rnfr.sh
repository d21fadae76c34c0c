#!/usr/bin/env bash
# Software:  ProFTPD, Debian's proftpd-core 1.3.8+dfsg-4+deb12u5
# Behaviour: after RNFR (350) a second RNFR is refused with 501, and so is SIZE, but the first RNFR stays
#            pending: an RNTO after the refused RNFR is accepted and renames the first file.
# Careful:   never ask with RNFR whether a name exists, and when RNFR was refused never send RNTO on that
#            connection: end it and connect anew.
# Seen:      RNFR first: 350
#            RNFR second: 501
#            SIZE second: 501
#            RNTO third: 250
#            files: second=content of second third=content of first
set -euo pipefail
place=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" || true; wait; rm -rf "$place"' EXIT
cd "$place"

apt-get download -qq proftpd-core=1.3.8+dfsg-4+deb12u5 libhiredis0.14=0.14.1-3 libmemcached11=1.1.4-1 \
    libmemcachedutil2=1.1.4-1 libhashkit2=1.1.4-1 libpcre2-posix3=10.42-1+deb12u2 > apt.log 2>&1 \
    || { cat apt.log; exit 1; }
for package in *.deb; do dpkg -x "$package" root; done

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
password=$(openssl rand -hex 8)
mkdir home
echo content of first > home/first
echo content of second > home/second
chmod 711 .
chown -R nobody home
group=$(id -gn nobody)
echo "mover:$(openssl passwd -6 "$password"):$(id -u nobody):$(id -g nobody)::$place/home:/bin/false" > users
echo "mover:x:$(id -g nobody):" > groups
chmod 600 users groups
cat > conf << END
ModulePath $place/root/usr/lib/proftpd
ServerName finding
DefaultAddress 127.0.0.1
Port $port
SocketBindTight on
UseIPv6 off
User nobody
Group $group
AuthOrder mod_auth_file.c
AuthUserFile $place/users
AuthGroupFile $place/groups
RequireValidShell off
UseReverseDNS off
WtmpLog off
PidFile $place/pid
ScoreboardFile $place/scoreboard
DelayTable $place/delay
TransferLog none
<IfModule mod_delay.c>
DelayEngine off
</IfModule>
<IfModule mod_ctrls.c>
ControlsEngine off
</IfModule>
END
LD_LIBRARY_PATH="$place/root/usr/lib/x86_64-linux-gnu" root/usr/sbin/proftpd -n -q -c "$place/conf" > log 2>&1 &
server=$!

cat > ask.py << 'END'
import ftplib, socket, sys, time
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
for command in 'RNFR first', 'RNFR second', 'SIZE second', 'RNTO third':
    ftp.putcmd(command)
    try:
        reply = ftp.getresp()
    except ftplib.error_perm as error:
        reply = str(error)
    print('%s: %s' % (command, reply[:3]))
ftp.close()
END
seen=$(python3 ask.py "$port" "$password" || cat log
       cd home; echo "files: $(for name in *; do echo "$name=$(cat "$name")"; done | paste -sd ' ')")
echo "$seen"
expected='RNFR first: 350
RNFR second: 501
SIZE second: 501
RNTO third: 250
files: second=content of second third=content of first'
if [ "$seen" != "$expected" ]; then
    echo 'differs from what was seen:'
    diff <(echo "$expected") <(echo "$seen") || exit 1
fi
echo 'same as seen'
