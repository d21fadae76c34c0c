#!/usr/bin/env bash
# Software:  busybox tar reading what GNU tar wrote; Debian's busybox-static 1:1.35.0-4+deb12u1+b1,
#            tar 1.34+dfsg-1.2+deb12u1
# Behaviour: a pax archive (`tar --format=pax`, the default of Python's tarfile, too) tells the size of a
#            member of 8 GiB or more in a pax record.  busybox does not read that record: it makes the file
#            empty, takes its content for the members that follow, and if that content begins with zeros it
#            takes them for the end, drops all members behind it and ends with 0, without a word.
# Careful:   write --format=gnu for a receiver that may be busybox (a NAS, a router, Alpine), and believe
#            neither exit code nor names but a hash of each file.
# Seen:      GNU tar lists: a 4, large 8589934592, z 4
#            busybox, pax: exit 0, a 4, large 0
#            busybox lists the same in GNU format: a 4, large 8589934592, z 4
# The large file is a hole of 8 GiB, and so it is in the archives, to be quick: the members before and
# behind it come from GNU tar as they are, the zeros between them from truncate.  It all is on a tmpfs in a
# mount namespace of its own, where a hole is read quickest and takes no memory.
set -euo pipefail
[ -n "${OWN_MOUNTS:-}" ] || OWN_MOUNTS=1 exec unshare -m bash "$0"
place=$(mktemp -d)
mount -t tmpfs none "$place"
trap 'cd /; umount -l "$place"; rm -rf "$place"' EXIT
cd "$place"

apt-get download -qq busybox-static=1:1.35.0-4+deb12u1+b1 tar=1.34+dfsg-1.2+deb12u1 > apt.log 2>&1 \
    || { cat apt.log; exit 1; }
for package in *.deb; do dpkg -x "$package" root; done

mkdir in
echo one > in/a
truncate -s 8G in/large
echo two > in/z
touch -d @1600000000 in/a in/large in/z         # whole seconds need no pax record of their own

archive() {             # archive FORMAT HEADERS: HEADERS = bytes before the content of large
    local tar="root/bin/tar --format=$1 --owner=0 --group=0 -C in -cf -"
    [ "$1" != pax ] || tar="$tar --pax-option=delete=atime,delete=ctime"
    ($tar ./a ./large 2> /dev/null || true) | head -c "$2" > "$1.tar"
    truncate -s $(($2 + 8 * 1024 * 1024 * 1024)) "$1.tar"
    $tar ./z >> "$1.tar"
}

listing() {             # the names and sizes of a long list of tar's, in one line
    awk '{print substr($6, 3), $3}' | LC_ALL=C sort | paste -sd , | sed 's/,/, /g'
}

archive pax $((512 + 512 + 3 * 512))            # a, its content, pax header and record, header
archive gnu $((512 + 512 + 512))                # a, its content, header with the size in base 256
mkdir out
code=0
root/bin/busybox tar -xf pax.tar -C out 2> errors || code=$?
seen="GNU tar lists: $(root/bin/tar -tvf pax.tar | listing)
busybox, pax: exit $code, $(cat errors)$(root/bin/tar -C out -cf - . | root/bin/tar -tvf - | grep -v '/$' | listing)
busybox lists the same in GNU format: $(root/bin/busybox tar -tvf gnu.tar | listing)"
echo "$seen"
expected='GNU tar lists: a 4, large 8589934592, z 4
busybox, pax: exit 0, a 4, large 0
busybox lists the same in GNU format: a 4, large 8589934592, z 4'
if [ "$seen" != "$expected" ]; then
    echo 'differs from what was seen:'
    diff <(echo "$expected") <(echo "$seen") || exit 1
fi
echo 'same as seen'
