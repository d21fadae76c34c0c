#!/usr/bin/env bash
# Software:  scp and sftp-server of OpenSSH; Debian's openssh-client, openssh-sftp-server 1:9.2p1-2+deb12u10
# Behaviour: `scp -r` of a tree to a disk that becomes full says so and ends with 1, but goes on with the
#            other files: these are there in their full size, too, and hold zeros alone.
# Careful:   after an scp that failed, compare a hash of every file of the tree that is there; a look at
#            names and sizes calls all of them delivered.
# Seen:      exit 1
#            large: mixed
#            20 small ones: 0 right, 20 of full size with zeros alone, 0 others
#            (mixed: full size, its end zeros; how many of the small ones are right depends on the room that
#            the large one leaves)
# No sshd is needed: scp's -S names a script that runs the SFTP server.  The disk is a tmpfs of 2 MB in a
# mount namespace of its own.
set -euo pipefail
[ -n "${OWN_MOUNTS:-}" ] || OWN_MOUNTS=1 exec unshare -m bash "$0"
place=$(mktemp -d)
trap 'cd /; umount "$place/full" "$place/tree" 2> /dev/null || true; rm -rf "$place"' EXIT
cd "$place"

apt-get download -qq openssh-client=1:9.2p1-2+deb12u10 openssh-sftp-server=1:9.2p1-2+deb12u10 \
    > apt.log 2>&1 || { cat apt.log; exit 1; }
for package in *.deb; do dpkg -x "$package" root; done
printf '#!/bin/sh\nexec "%s"\n' "$place/root/usr/lib/openssh/sftp-server" > server
chmod 755 server

mkdir full tree
mount -t tmpfs -o size=2m none full
mount -t tmpfs none tree        # lists the newest name first: the large file is sent before the others
for i in $(seq 20); do head -c 50000 /dev/urandom > "tree/small$i"; done
head -c 3000000 /dev/urandom > tree/large

code=0
root/usr/bin/scp -q -r -S "$place/server" tree anyhost:"$place/full/" 2> errors || code=$?
cat errors >&2

there() {               # there NAME: right, zeros (full size and nothing but zeros), mixed (full size), other
    [ "$(stat -c %s "full/tree/$1" 2> /dev/null)" = "$(stat -c %s "tree/$1")" ] || { echo other; return; }
    cmp -s "tree/$1" "full/tree/$1" && { echo right; return; }
    if [ "$(tr -d '\0' < "full/tree/$1" | head -c 1 | wc -c)" = 0 ]; then echo zeros; else echo mixed; fi
}

right=0 zeros=0 others=0
for i in $(seq 20); do
    case $(there "small$i") in
        right) right=$((right + 1)) ;;
        zeros) zeros=$((zeros + 1)) ;;
        *) others=$((others + 1)) ;;
    esac
done
echo "exit $code"
echo "large: $(there large)"
echo "20 small ones: $right right, $zeros of full size with zeros alone, $others others"
if [ "$code" != 1 ] || [ "$(there large)" != mixed ] || [ "$zeros" = 0 ] || [ "$others" != 0 ]; then
    echo 'differs from what was seen: exit 1, large mixed, several small ones of zeros alone, no others'
    exit 1
fi
echo 'same as seen'
