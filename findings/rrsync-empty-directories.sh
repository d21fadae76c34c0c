#!/usr/bin/env bash
# Software:  rsync and its rrsync, Debian's 3.5.0+ds1-0+deb12u1
# Behaviour: behind rrsync a push with --partial-dir or --backup-dir makes those directories at the target before
#            anything needs them and leaves them there, empty. Without rrsync rsync makes them when a file is cut
#            or replaced, and removes an empty --partial-dir again.
# Careful:   with keys restricted to rrsync an empty .partial is no sign that a transfer broke, and it is in each
#            listing of the target: do not count it, and clean up what you named yourself.
# Seen:      rsync alone, --partial-dir: run1
#            rsync alone, --backup-dir: run1
#            behind rrsync, --partial-dir: .partial run1
#            behind rrsync, --backup-dir: .replaced run1
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"

apt-get download -qq rsync=3.5.0+ds1-0+deb12u1 > apt.log 2>&1 || { cat apt.log; exit 1; }
dpkg -x rsync_*.deb root
export PATH="$place/root/usr/bin:$PATH"
printf '%s\n' '#!/bin/sh' 'shift; exec "$@"' > alone
printf '%s\n' '#!/bin/sh' 'shift; SSH_ORIGINAL_COMMAND="$*" exec rrsync target' > restricted
chmod +x alone restricted
echo content > run1

push() {                # push THROUGH OPTION TARGET: one file into an empty directory, and what is there then
    rm -rf target
    mkdir target
    rsync -t --backup "$2" -e "./$1" run1 "host:$3"
    ls -A target | paste -sd ' '
}
seen=$(
    echo "rsync alone, --partial-dir: $(push alone --partial-dir=.partial target/)"
    echo "rsync alone, --backup-dir: $(push alone --backup-dir=.replaced target/)"
    echo "behind rrsync, --partial-dir: $(push restricted --partial-dir=.partial ./)"
    echo "behind rrsync, --backup-dir: $(push restricted --backup-dir=.replaced ./)"
)
echo "$seen"
expected='rsync alone, --partial-dir: run1
rsync alone, --backup-dir: run1
behind rrsync, --partial-dir: .partial run1
behind rrsync, --backup-dir: .replaced run1'
if [ "$seen" != "$expected" ]; then
    echo 'differs from what was seen:'
    diff <(echo "$expected") <(echo "$seen") || exit 1
fi
echo 'same as seen'
