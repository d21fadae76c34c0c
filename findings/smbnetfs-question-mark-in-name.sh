#!/usr/bin/env bash
# Software:  smbnetfs, Debian's 0.6.3-1 with libsmbclient 4.17.12+dfsg-0+deb12u4, before Samba's smbd of that version
# Behaviour: a name is cut at a question mark, with success: writing "run?1" replaces the content of "run", a
#            rename to "run?2" replaces "run", and removing "run?3", which never was, deletes "run".
# Careful:   never write, rename to or remove an odd name on such a mount before a file of one's own, in a directory
#            of one's own, has been seen in a listing under that very name. Needs root and /dev/fuse.
# Seen:      after echo old > run: run=old
#            after echo new > run?1: run=new
#            after mv other run?2: run=other
#            after rm run?3:
set -euo pipefail
place=$(mktemp -d)
server= mounted=
ended() {
    [ -z "$mounted" ] || umount -l "$place/mount" || true
    [ -z "$mounted" ] || kill "$mounted" 2> /dev/null || true
    [ -z "$server" ] || kill "$server" || true
    wait || true
    rm -rf "$place"
}
trap ended EXIT
cd "$place"

samba=2:4.17.12+dfsg-0+deb12u4
apt-get download -qq smbnetfs=0.6.3-1 libsmbclient=$samba samba=$samba samba-libs=$samba libwbclient0=$samba \
    libldb2=2:2.6.2+samba4.17.12+dfsg-0+deb12u4 libtalloc2=2.4.0-f2 libtdb1=1.4.8-2 \
    libtevent0=0.14.1-1 liblmdb0=0.9.24-1 libsecret-1-0=0.20.5-3 libfuse2=2.9.9-6+b1 \
    libavahi-client3=0.8-10+deb12u1 libavahi-common3=0.8-10+deb12u1 libpopt0=1.19+dfsg-1 \
    libjansson4=2.14-2 libtirpc3=1.3.3+ds-1 libldap-2.5-0=2.5.13+dfsg-5 \
    libsasl2-2=2.1.28+dfsg-10+deb12u1 libicu72=72.1-3+deb12u1 > apt.log 2>&1 \
    || { cat apt.log; exit 1; }
for package in *.deb; do dpkg -x "$package" root; done
library=$place/root/usr/lib/x86_64-linux-gnu
export LD_LIBRARY_PATH=$library:$library/samba:$place/root/lib/x86_64-linux-gnu

mkdir -p share var home/.smb mount
cat > smb.conf << END
[global]
server role = standalone server
map to guest = Bad User
guest account = root
smb ports = 445
interfaces = 127.0.0.77/8
bind interfaces only = yes
disable netbios = yes
disable spoolss = yes
load printers = no
private dir = $place/var
lock directory = $place/var
state directory = $place/var
cache directory = $place/var
pid directory = $place/var
ncalrpc dir = $place/var
log file = $place/smbd.log
[share]
path = $place/share
read only = no
guest ok = yes
force user = root
END
setsid root/usr/sbin/smbd -F --no-process-group -s "$place/smb.conf" < /dev/null > smbd.out 2>&1 &
server=$!
for _ in $(seq 100); do
    ! (exec 3<> /dev/tcp/127.0.0.77/445) 2> /dev/null || break
    sleep 0.1
done
printf '[global]\nclient min protocol = SMB2\nname resolve order = host\n' > home/.smb/smb.conf
printf 'auth "guest" ""\nsmb_query_browsers "false"\n' > home/.smb/smbnetfs.conf
chmod 600 home/.smb/smbnetfs.conf
HOME=$place/home root/usr/bin/smbnetfs mount -f < /dev/null > smbnetfs.out 2>&1 &
mounted=$!
there=mount/127.0.0.77/share
for _ in $(seq 100); do
    ! stat "$there" > /dev/null 2>&1 || break
    sleep 0.1
done

look() { echo "after $1: $(cd share; for name in *; do [ ! -e "$name" ] || echo "$name=$(cat "$name")"; done)" | sed 's/ $//'; }
seen=$(echo old > "$there/run"; look 'echo old > run'
       echo new > "$there/run?1"; look 'echo new > run?1'
       echo other > "$there/other"; mv "$there/other" "$there/run?2"; look 'mv other run?2'
       rm "$there/run?3"; look 'rm run?3') || cat smbd.out smbnetfs.out
echo "$seen"
expected='after echo old > run: run=old
after echo new > run?1: run=new
after mv other run?2: run=other
after rm run?3:'
if [ "$seen" != "$expected" ]; then
    echo 'differs from what was seen:'
    diff <(echo "$expected") <(echo "$seen") || exit 1
fi
echo 'same as seen'
