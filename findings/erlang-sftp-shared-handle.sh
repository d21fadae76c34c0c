#!/usr/bin/env bash
# Software:  Erlang/OTP's SFTP server (ssh_sftpd), Debian's erlang-ssh 1:25.2.3+dfsg-1+deb12u4 (ssh 4.15.2)
# Behaviour: while two files are open, the third one gets the handle of the second. A WRITE by that handle goes
#            to the third file, whichever was meant, and answers OK.
# Careful:   a client with several files open at once must compare each new handle with those that are open,
#            and open one file after the other where a handle comes twice.
# Seen:      OPEN one: handle 0
#            OPEN two: handle 1
#            OPEN three: handle 1
#            WRITE "for two" by the handle of two: status 0
#            one:
#            two:
#            three: for two
set -euo pipefail
place=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" || true; wait; rm -rf "$place"' EXIT
cd "$place"

version=1:25.2.3+dfsg-1+deb12u4
apt-get download -qq erlang-base=$version erlang-ssh=$version erlang-crypto=$version \
    erlang-public-key=$version erlang-asn1=$version > apt.log 2>&1 || { cat apt.log; exit 1; }
for package in *.deb; do dpkg -x "$package" root; done

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
ssh-keygen -q -t ed25519 -N '' -f ssh_host_ed25519_key
ssh-keygen -q -t ed25519 -N '' -f key
cp key.pub authorized_keys
mkdir files
otp=$place/root/usr/lib/erlang
HOME=$place ROOTDIR=$otp BINDIR=$(echo "$otp"/erts-*/bin) EMU=beam PROGNAME=erl "$otp"/erts-*/bin/erlexec \
    -noinput -eval "ssh:start(), {ok, _} = ssh:daemon({127,0,0,1}, $port, [{system_dir, \"$place\"},
    {user_dir, \"$place\"}, {auth_methods, \"publickey\"},
    {subsystems, [ssh_sftpd:subsystem_spec([{cwd, \"$place/files\"}])]}])." > log 2>&1 &
server=$!

cat > ask.py << 'END'
import socket, struct, subprocess, sys, time
port = sys.argv[1]
for _ in range(200):
    try:
        socket.create_connection(('127.0.0.1', int(port))).close()
        break
    except OSError:
        time.sleep(0.1)
ssh = subprocess.Popen(['ssh', '-F', 'none', '-q', '-i', 'key', '-o', 'UserKnownHostsFile=/dev/null', '-o',
                        'StrictHostKeyChecking=no', '-p', port, '-s', '127.0.0.1', 'sftp'],
                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

def string(value):
    return struct.pack('>I', len(value)) + value

def ask(kind, number, body):
    packet = struct.pack('>BI', kind, number) + body
    ssh.stdin.write(string(packet))
    ssh.stdin.flush()
    return ssh.stdout.read(struct.unpack('>I', ssh.stdout.read(4))[0])

ask(1, 3, b'')                                          # INIT, version 3
handles = []
for number, name in enumerate((b'one', b'two', b'three')):
    answer = ask(3, number, string(name) + struct.pack('>II', 2 | 8, 0))    # OPEN to write, create
    handles.append(answer[9:])
    print('OPEN %s: handle %s' % (name.decode(), answer[9:].decode()))
answer = ask(6, 9, string(handles[1]) + struct.pack('>Q', 0) + string(b'for two'))      # WRITE
print('WRITE "for two" by the handle of two: status %d' % struct.unpack('>I', answer[5:9]))
ssh.stdin.close()
ssh.wait()
END
seen=$(python3 ask.py "$port" || cat log
       cd files; for name in one two three; do echo "$name: $(cat $name)" | sed 's/ $//'; done)
echo "$seen"
expected='OPEN one: handle 0
OPEN two: handle 1
OPEN three: handle 1
WRITE "for two" by the handle of two: status 0
one:
two:
three: for two'
if [ "$seen" != "$expected" ]; then
    echo 'differs from what was seen:'
    diff <(echo "$expected") <(echo "$seen") || exit 1
fi
echo 'same as seen'
