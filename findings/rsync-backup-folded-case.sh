#!/usr/bin/env bash
# Software:  rsync, Debian's 3.5.0+ds1-0+deb12u1, to a mount of lowntfs-3g (ntfs-3g 1:2022.10.3-1+deb12u4) with
#            the options ignore_case, which makes run and RUN one name, and umask
# Behaviour: after a rename onto RUN the name run, which was looked up before, still leads to the old file
#            (three seconds later, too). rsync makes its backup by link(2), so that of the second push is a
#            link to the old file once more: the content of the first push is gone, and both pushes end with 0.
#            Without umask it is kept.
# Careful:   where the target folds case, send one of two names that differ in case only, or read each backup and
#            compare it with what was to be kept before a source is removed. Needs root and /dev/fuse.
# Seen:      ignore_case,umask=022: exit 0 0; mounted anew: run=second run.1=before run.2=before
#            ignore_case: exit 0 0; mounted anew: run=second run.1=before run.2=first
set -euo pipefail
[ -n "${OWN_MOUNTS:-}" ] || OWN_MOUNTS=1 exec unshare -m bash "$0"
place=$(mktemp -d)
driver=
off() {
    [ -n "$driver" ] || return 0
    umount "$place/mount" || umount -l "$place/mount" || true
    wait "$driver" || true
    driver=
}
trap 'cd /; off; rm -rf "$place"' EXIT
cd "$place"

ntfs=1:2022.10.3-1+deb12u4
apt-get download -qq rsync=3.5.0+ds1-0+deb12u1 libpopt0=1.19+dfsg-1 libxxhash0=0.8.1-1 \
    ntfs-3g=$ntfs libntfs-3g89=$ntfs > apt.log 2>&1 || { cat apt.log; exit 1; }
for package in *.deb; do dpkg -x "$package" root; done
export LD_LIBRARY_PATH="$place/root/usr/lib/x86_64-linux-gnu:$place/root/lib/x86_64-linux-gnu"

mkdir mount one two
echo first > one/RUN
echo second > two/run
on() {                  # on OPTIONS
    root/bin/lowntfs-3g -o "no_detach,$1" image mount > driver.log 2>&1 &
    driver=$!
    for _ in $(seq 100); do ! mountpoint -q mount || return 0; sleep 0.1; done
    cat driver.log
    exit 1
}

push() {                # push SUFFIX FILE: its exit code
    local code=0
    root/usr/bin/rsync -t --ignore-times --backup --suffix="$1" "$2" mount/ >&2 || code=$?
    echo "$code"
}

pushed() {              # pushed OPTIONS: on a new file system
    local codes there
    truncate -s 32M image
    root/sbin/mkntfs -q -F -Q image > mkntfs.log 2>&1
    on "$1"
    echo before > mount/run
    codes="$(push .1 one/RUN) $(push .2 two/run)"
    off
    on "$1"
    there=$(cd mount; for name in *; do echo "$name=$(cat "$name")"; done | paste -sd ' ')
    echo "$1: exit $codes; mounted anew: $there" >> seen
    off
}

pushed ignore_case,umask=022
pushed ignore_case
seen=$(cat seen)
echo "$seen"
expected='ignore_case,umask=022: exit 0 0; mounted anew: run=second run.1=before run.2=before
ignore_case: exit 0 0; mounted anew: run=second run.1=before run.2=first'
if [ "$seen" != "$expected" ]; then
    echo 'differs from what was seen:'
    diff <(echo "$expected") <(echo "$seen") || exit 1
fi
echo 'same as seen'
