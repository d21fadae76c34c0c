#!/usr/bin/env bash
# Software:  rrsync of rsync, Debian's rsync 3.5.0+ds1-0+deb12u1
# Behaviour: a push with --partial-dir=NAME whose file needs no partial copy leaves an empty directory
#            NAME (mode 0700) at the target when the key is restricted by rrsync (with -wo or without):
#            rrsync makes that directory before rsync runs, and nobody removes it.  The same push to the
#            same rsync without rrsync leaves nothing.  The transfer itself is right, exit 0.
# Careful:   after a push remove the partial directory oneself where it is empty, or do not count it as
#            something that arrived; where the account may only write, expect it there.
# Seen:      plain: exit 0, f
#            rrsync: exit 0, .parts(700) f
#            rrsync -wo: exit 0, .parts(700) f
# No sshd is needed: rsync's -e names a script that does what sshd does with a forced command.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"

apt-get download -qq rsync=3.5.0+ds1-0+deb12u1 libpopt0=1.19+dfsg-1 libxxhash0=0.8.1-1 > apt.log 2>&1 \
    || { cat apt.log; exit 1; }
for package in *.deb; do dpkg -x "$package" root; done
export PATH="$place/root/usr/bin:$PATH" LD_LIBRARY_PATH="$place/root/usr/lib/x86_64-linux-gnu"

cat > shell << 'END'
#!/bin/sh
# what sshd does: the account's forced command runs, the client's words are in SSH_ORIGINAL_COMMAND
shift                   # the host's name
[ -n "$FORCED" ] || exec sh -c "$*"
SSH_ORIGINAL_COMMAND=$* SSH_CONNECTION='127.0.0.1 1 127.0.0.1 22' exec sh -c "$FORCED"
END
chmod 755 shell
echo content > f

push() {                # push NAME FORCED-COMMAND WHERE
    mkdir "$place/$1"
    code=0
    FORCED=$2 rsync -t --partial-dir=.parts -e "$place/shell" f "anyhost:$3" || code=$?
    echo "$1: exit $code, $(find "$1" -mindepth 1 \( -type d -printf '%f(%m)\n' \) -o -type f -printf '%f\n' \
        | LC_ALL=C sort | paste -sd ' ')"
}

seen=$(
    push plain '' "$place/plain/"
    push rrsync "rrsync '$place/rrsync'" ./
    push 'rrsync -wo' "rrsync -wo '$place/rrsync -wo'" ./
)
expected='plain: exit 0, f
rrsync: exit 0, .parts(700) f
rrsync -wo: exit 0, .parts(700) f'

echo "$seen"
if [ "$seen" != "$expected" ]; then
    echo 'differs from what was seen:'
    diff <(echo "$expected") <(echo "$seen") || exit 1
fi
echo 'same as seen'
