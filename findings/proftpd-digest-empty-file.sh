#!/usr/bin/env bash
# Software:  ProFTPD, Debian's proftpd-core 1.3.8+dfsg-4+deb12u5, with its mod_digest
# Behaviour: the sum of an empty file is refused by XCRC, XMD5, XSHA1, XSHA256 and XSHA512 with 501, "end (0)
#            greater than start (0)", which for other files are right. HASH and MD5 give it.
# Careful:   a 501 to XMD5 of one file does not mean that the server knows no XMD5, nor that the file is
#            damaged. Marker files are empty: prove them by HASH, by MD5 or by their size.
# Seen:      XCRC full: 250 352441C2
#            XCRC empty: 501
#            XMD5 full: 250 900150983CD24FB0D6963F7D28E17F72
#            XMD5 empty: 501
#            XSHA1 full: 250 A9993E364706816ABA3E25717850C26C9CD0D89D
#            XSHA1 empty: 501
#            MD5 empty: 251 D41D8CD98F00B204E9800998ECF8427E
#            HASH empty: 213 DA39A3EE5E6B4B0D3255BFEF95601890AFD80709
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
printf abc > home/full
touch home/empty
chmod 711 .
chown -R nobody home
group=$(id -gn nobody)
echo "mover:$(openssl passwd -6 "$password"):$(id -u nobody):$(id -g nobody)::$place/home:/bin/false" > users
echo "mover:x:$(id -g nobody):" > groups
chmod 600 users groups
cat > conf << END
ModulePath $place/root/usr/lib/proftpd
ServerName finding
LoadModule mod_digest.c
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
for command in ('XCRC full', 'XCRC empty', 'XMD5 full', 'XMD5 empty', 'XSHA1 full', 'XSHA1 empty',
                'MD5 empty', 'HASH empty'):
    ftp.putcmd(command)
    try:
        words = ftp.getresp().upper().split()
        sums = [word for word in words if len(word) in (8, 32, 40) and not set(word) - set('0123456789ABCDEF')]
        print('%s: %s' % (command, ' '.join([words[0][:3]] + sums)))
    except ftplib.error_perm as error:
        print('%s: %s' % (command, str(error)[:3]))
ftp.close()
END
seen=$(python3 ask.py "$port" "$password" || cat log)
echo "$seen"
expected='XCRC full: 250 352441C2
XCRC empty: 501
XMD5 full: 250 900150983CD24FB0D6963F7D28E17F72
XMD5 empty: 501
XSHA1 full: 250 A9993E364706816ABA3E25717850C26C9CD0D89D
XSHA1 empty: 501
MD5 empty: 251 D41D8CD98F00B204E9800998ECF8427E
HASH empty: 213 DA39A3EE5E6B4B0D3255BFEF95601890AFD80709'
if [ "$seen" != "$expected" ]; then
    echo 'differs from what was seen:'
    diff <(echo "$expected") <(echo "$seen") || exit 1
fi
echo 'same as seen'
