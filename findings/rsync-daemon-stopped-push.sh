#!/usr/bin/env bash
# Software:  rsync, Debian's 3.5.0+ds1-0+deb12u1, on both sides
# Behaviour: a push to a daemon under --bwlimit that is ended by SIGTERM leaves files that hold
#            the bytes of other files of the same push, under their final names, with their own size and
#            time.  The client ends with 20, as it should; the same push again ends with 0 and
#            leaves them wrong, because size and time agree.
# Careful:   end an rsync that pushes by SIGKILL (0 wrong files then), or let the next push compare
#            with --checksum; never take size and time as proof after a push that was stopped.
# Seen:      stopped push: exit 20, wrong files with the size and time of the right ones: 16
#            pushed again: exit 0, wrong files: 16
#            pushed with --checksum: exit 0, wrong files: 0
#            (how many depends on the moment; that there are some, and as many after the second, does not)
set -euo pipefail
place=$(mktemp -d)
daemon=
trap '[ -z "$daemon" ] || kill "$daemon" || true; wait; rm -rf "$place"' EXIT
cd "$place"

apt-get download -qq rsync=3.5.0+ds1-0+deb12u1 libpopt0=1.19+dfsg-1 libxxhash0=0.8.1-1 > apt.log 2>&1 \
    || { cat apt.log; exit 1; }
for package in *.deb; do dpkg -x "$package" root; done
export LD_LIBRARY_PATH="$place/root/usr/lib/x86_64-linux-gnu"
rsync=root/usr/bin/rsync

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
mkdir source target
for i in $(seq 2000); do
    { yes "file $i" || true; } | head -c 4000 > "source/$i"
    echo "$((1600000000 + i)) source/$i"
done | python3 -c 'import os, sys
for line in sys.stdin:
    time, path = line.split()
    os.utime(path, (int(time), int(time)))'
cat > conf << END
address = 127.0.0.1
port = $port
use chroot = no
[target]
path = $place/target
read only = no
uid = $(id -u)
gid = $(id -g)
END
"$rsync" --daemon --no-detach --config=conf > log 2>&1 &
daemon=$!
url=rsync://127.0.0.1:$port/target/
for _ in $(seq 100); do ! "$rsync" "$url" > /dev/null 2>&1 || break; sleep 0.1; done

wrong() {               # how many files are there with the right size and time and the wrong content
    python3 -c 'import os
print(sum((a.st_size, int(a.st_mtime)) == (b.st_size, int(b.st_mtime))
          and open("target/" + n).read() != open("source/" + n).read()
          for n in os.listdir("target") if n.isdigit()
          for a, b in [(os.stat("source/" + n), os.stat("target/" + n))]))'
}

"$rsync" -rt --bwlimit=1024 source/ "$url" 2> errors &
push=$!
while [ "$(find target -type f -not -name '.*' | wc -l)" -lt 300 ]; do sleep 0.1; done
kill "$push"
code=0
wait "$push" || code=$?
sleep 2                 # the daemon's own process works off what it has received
first=$(wrong)
echo "stopped push: exit $code, wrong files with the size and time of the right ones: $first"
again=0
"$rsync" -rt source/ "$url" || again=$?
second=$(wrong)
echo "pushed again: exit $again, wrong files: $second"
compared=0
"$rsync" -rt --checksum source/ "$url" || compared=$?
third=$(wrong)
echo "pushed with --checksum: exit $compared, wrong files: $third"

if [ "$code $again $compared $third" != '20 0 0 0' ] || [ "$first" = 0 ] || [ "$second" != "$first" ]; then
    echo 'differs from what was seen: exits 20, 0, 0; some wrong files, as many after the second push, then none'
    exit 1
fi
echo 'same as seen'
