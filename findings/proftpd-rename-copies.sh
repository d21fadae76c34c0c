#!/usr/bin/env bash
# Software:  ProFTPD, Debian's proftpd-core 1.3.8+dfsg-4+deb12u5
# Behaviour: RNFR and RNTO from one file system to another are answered with 250: the server copies the file under
#            its final name and then deletes the first one. Whoever looks there meanwhile sees it grow, and a
#            server that is stopped in between leaves half of it.
# Careful:   a rename is a sign that a file is whole only within one file system, and FTP does not show where one
#            ends. Stage files beside their final names where directories may be mounts of their own.
# Seen:      RNTO within the file system: 250, sizes seen of 268435456 bytes: none but the last
#            RNTO to another file system: 250, sizes seen of 268435456 bytes: smaller ones, too
set -euo pipefail
place=$(mktemp -d)
far=$(mktemp -d -p /dev/shm)
server=
trap '[ -z "$server" ] || kill "$server" || true; wait; rm -rf "$place" "$far"' EXIT
[ "$(stat -c %d "$place")" != "$(stat -c %d "$far")" ] || { echo 'needs TMPDIR and /dev/shm to differ'; exit 1; }
cd "$place"

apt-get download -qq proftpd-core=1.3.8+dfsg-4+deb12u5 libhiredis0.14=0.14.1-3 libmemcached11=1.1.4-1 \
    libmemcachedutil2=1.1.4-1 libhashkit2=1.1.4-1 libpcre2-posix3=10.42-1+deb12u2 > apt.log 2>&1 \
    || { cat apt.log; exit 1; }
for package in *.deb; do dpkg -x "$package" root; done

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
password=$(openssl rand -hex 8)
mkdir home
mkdir home/near
ln -s "$far" home/far
truncate -s 256M home/run
chmod 711 .
chown -R nobody home "$far"
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
import contextlib, ftplib, os, socket, sys, time
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
ftp.voidcmd('TYPE I')
size = os.path.getsize('home/run')
for what, new in ('within the file system', 'near/run'), ('to another file system', 'far/run'):
    ftp.sendcmd('RNFR run')
    ftp.putcmd('RNTO ' + new)
    seen = set()
    while os.path.exists('home/run'):
        with contextlib.suppress(FileNotFoundError):
            seen.add(os.path.getsize('home/' + new))
    print('RNTO %s: %s, sizes seen of %d bytes: %s' % (
        what, ftp.getresp()[:3], size, 'smaller ones, too' if seen - {size} else 'none but the last'))
    if new == 'near/run':
        os.rename('home/near/run', 'home/run')
ftp.close()
END
seen=$(python3 ask.py "$port" "$password" || cat log)
echo "$seen"
expected='RNTO within the file system: 250, sizes seen of 268435456 bytes: none but the last
RNTO to another file system: 250, sizes seen of 268435456 bytes: smaller ones, too'
if [ "$seen" != "$expected" ]; then
    echo 'differs from what was seen:'
    diff <(echo "$expected") <(echo "$seen") || exit 1
fi
echo 'same as seen'
