"""Stands between sshd and its SFTP server, and does to the packets what BETWEEN says: MODE[:ARGUMENT].

Packets are those of draft-ietf-secsh-filexfer-02: length, type, number of the request, the rest.
"""
import os
import queue
import select
import subprocess
import sys
import threading
import time

VERSION, READ, WRITE, RENAME, STATUS, EXTENDED = 2, 5, 6, 18, 101, 200
# OPEN, LSTAT, SETSTAT, OPENDIR, REMOVE, MKDIR, RMDIR, STAT, RENAME
WITH_PATH = 3, 7, 9, 11, 13, 14, 15, 17, 18
PAUSE = 0.03            # seconds in which what belongs together arrives

mode, _, argument = os.environ.get('BETWEEN', 'pass').partition(':')
server = subprocess.Popen(['/usr/lib/sftp-server'], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
out = threading.Lock()
seen = 0                # bytes of requests


def packets(stream):
    while True:
        head = stream.read(4)
        if len(head) < 4:
            return
        yield head + stream.read(int.from_bytes(head, 'big'))


def send(data):
    with out:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def end(*_):
    server.kill()
    os._exit(1)


def status(packet, code):
    body = bytes([STATUS]) + packet[5:9] + code.to_bytes(4, 'big') + bytes(8)
    send(len(body).to_bytes(4, 'big') + body)


def lower(packet):
    """The same request with its paths in lower case."""
    at, done = 9, packet[:9]
    for _ in range(2 if packet[4] == RENAME else 1):
        end = at + 4 + int.from_bytes(packet[at:at + 4], 'big')
        done, at = done + packet[at:at + 4] + packet[at + 4:end].lower(), end
    return done + packet[at:]


def posix_rename(packet):
    name = b'posix-rename@openssh.com'
    body = bytes([EXTENDED]) + packet[5:9] + len(name).to_bytes(4, 'big') + name + packet[9:]
    return len(body).to_bytes(4, 'big') + body


def change(packet):
    """The request as it goes on, or None."""
    global seen
    kind, seen = packet[4], seen + len(packet)
    if mode == 'small' and len(packet) > 34000 or mode == 'closes' and kind == EXTENDED or \
            mode == 'closes_at' and kind != WRITE and argument.encode() in packet:
        end()
    if mode == 'refuses' and kind in [int(number) for number in argument.split(',')]:
        return status(packet, 3)
    if mode == 'folds' and kind in WITH_PATH:
        packet = lower(packet)
    if argument == 'replaces' and kind == RENAME:
        packet = posix_rename(packet)
    if mode == 'short' and kind == READ:
        return packet[:-4] + min(1000, int.from_bytes(packet[-4:], 'big')).to_bytes(4, 'big')
    if mode == 'deaf' and seen > int(argument):
        line = select.poll()
        line.register(sys.stdout, 0)    # till the other end has gone
        line.poll()
        end()
    if mode == 'hole' and seen > int(argument) and kind == WRITE:
        if seen > int(argument) + 600000:       # this one is lost, some behind it are not
            time.sleep(0.3)
            end()
        if not hasattr(change, 'lost'):
            change.lost = True
            return None
    return packet


def answers():
    """Hand the answers on; where they are gathered, one line of the file ARGUMENT a round trip."""
    line = queue.Queue()

    def gather():
        for packet in packets(server.stdout):
            line.put(packet)
        end()
    threading.Thread(target=gather, daemon=True).start()
    while True:
        chunk = [line.get()]
        if chunk[0][4] == VERSION and mode in ('closes', 'folds'):
            chunk = [(5).to_bytes(4, 'big') + chunk[0][4:9]]    # it has no extensions
        while mode in ('shuffle', 'count'):
            try:
                chunk.append(line.get(timeout=PAUSE))
            except queue.Empty:
                break
        if mode == 'count':
            with open(argument, 'a') as handle:
                handle.write('%d\n' % len(chunk))
        send(b''.join(reversed(chunk)))


if mode == 'talks':
    send(b'Welcome to the archive!\nYour quota is fine.\n')
threading.Thread(target=answers, daemon=True).start()
for packet in packets(sys.stdin.buffer):
    packet = change(packet)
    if packet is not None:
        server.stdin.write(packet)
        server.stdin.flush()
end()
