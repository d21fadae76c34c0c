#!/usr/bin/env python3
# Copyright (c) 2026, The MiStaMover contributors.  BSD 3-clause licence, see LICENSE.
"""MiStaMover mirrors, stages and moves data from the machine that produces it
to the machine that keeps it.  One file, standard library only, Python 3.6 and newer.

    python3 mistamover.py --once   -c mistamover.ini      one pass over every stream
    python3 mistamover.py --daemon -c mistamover.ini      the eternal loop around it

An item (a file, or a directory as a whole) lives one straight line:

    scan -> settle -> batch -> stop files? -> push -> verify -> publish -> record -> release

Sections, each using only what is above it:

     1  imports, version
     2  constants, exit codes
     3  errors
     4  small helpers
     5  stop requests and signals
     6  running programs
     7  configuration
     8  logging
     9  locks, ledger, status
    10  alerts
    11  scanning and settling
    12  zipping
    13  sums that travel with the data
    14  transports
    15  delivery
    16  disk space
    17  status for people and machines
    18  stream workers: once and daemon
    19  commands
    20  command line

Where it is decided, by what a reader asks first:

    what is left alone, by its name         Scanner.skip
    when an item has settled                Settler.settled; who holds it open: check_unused
    who takes the lock                      Worker.start, by StreamLock.acquire
    when a stop file is asked for           Delivery.ask_here, Delivery.ask_there
    when a zip is made, and not again       Delivery.parcel, by Worker.delivered_trees
    how a file gets its final name          Staging.finish; rsync and rclone: their finish
    what happens to a name that is taken    conflict_step, then Staging.settle_conflict,
                                            RsyncTransport.send_again, RcloneTransport.replace
    the name of a backup                    stamped
    whose fault a failure is                next_step, asked by Delivery.judge_suspects
    what goes into quarantine               Failures.hopeless, then Delivery.quarantine
    when a source is deleted, and how       Delivery.release, by Releaser.release
    what a crash left, on both sides        Releaser.recover, Transport.tidy
    when the next try is                    backoff, by Worker.pause_after, Failures.must_wait
    what --check tries                      check_source, target_steps; what --explain knows: explain
    the exit code                           Worker.once, Supervisor.run
"""
try:
    import signal

    # Ctrl-C and the like are held back from here on until somebody is there to take them
    HELD_BACK = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)]
    if __name__ == '__main__' and hasattr(signal, 'pthread_sigmask'):
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
except KeyboardInterrupt:
    raise SystemExit(130)
import collections
import contextlib
import errno
import functools
import os
import re
import stat
import sys
import threading
import time

__version__ = '1.0.0'


# ----------------------------------------------------------------------------------------
# 2  constants, exit codes
# ----------------------------------------------------------------------------------------

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_LOCKED = 0, 1, 2, 3

WINDOWS = os.name == 'nt'
OWN_PREFIX = b'.mistamover'             # our own entries in other people's directories
RELEASE_DIR = OWN_PREFIX + b'-release'  # in the incoming directory: what is being deleted
HELD_DIR = OWN_PREFIX + b'-held'        # in RELEASE_DIR: the file of a tree that is being deleted
CLOCK_NAME = OWN_PREFIX + b'-clock-'    # in the incoming directory: touched to read its clock
MONITOR_LINE = b'made by the disk space monitor of MiStaMover\n'     # marks its stop files
SYSTEM_NAMES = frozenset((              # at the top of a disk or of a share of a NAS; nobody's data
    b'lost+found', b'System Volume Information', b'$RECYCLE.BIN', b'RECYCLER', b'@eaDir', b'#recycle',
    b'#snapshot', b'@Recycle', b'@Recently-Snapshot', b'.Trashes', b'.Spotlight-V100', b'.fseventsd'))
KEPT_DIR = b'.delivered'                # in the incoming directory: copies for keep_delivered
HERE_NAME = OWN_PREFIX + b'-here-'      # in the incoming directory: must not show at the target
PARTIAL_DIR = '.mistamover-partial'     # at the target: rsync's unfinished files
CHECK_AREA = OWN_PREFIX + b'-check'     # at the target: the staging area of --check, always the same
PROBE_NAME = b'.mistamover-probe'       # at the target: written, renamed, removed by a probe
BLOCK = 1 << 20                         # bytes read at a time
CHECK_RATE = 20 << 20                   # bytes per second any disk re-reads; slower counts as hung
RESUME_FROM = 8 << 20                   # below this size a new start costs less than a resume
SMALL = 128 << 10                       # bytes that pass any line within stall_timeout
LOOK_ANYWAY = 600                       # seconds after which a directory is scanned whatever inotify says
STOP_FILE_AGE = 10                      # seconds for which an answer about a stop file holds
KILL_GRACE = 2                          # seconds between SIGTERM and SIGKILL for a child
GATHER = 0.01                           # seconds that lines gather in: to wake for each costs more
CONTROL_PATH_MAX = 80                   # sun_path holds 104 bytes, ssh(1) adds 17 while binding
NO_SPACE = errno.ENOSPC, errno.EDQUOT
LAST_SECOND = 253402300799              # of the year 9999: a time stamp has four digits for it
CLOCK_TOLERANCE = 2                     # seconds two clocks may drift apart between two scans


# ----------------------------------------------------------------------------------------
# 3  errors: one class for each thing the caller does next
# ----------------------------------------------------------------------------------------

# raised             | scope         | what happens next, and where
# ===================|===============|===========================================================
# ConfigError        | configuration | exit code 2, nothing was touched: main()
# LockedError        | -             | exit code 3; a daemon tries again: Worker.run()
# Interrupted        | -             | leave, children included: Worker.run()
# Suspended          | -             | wait, no failure: Worker.once(), Worker.daemon()
# Changed            | -             | the next pass sees to it: Delivery.judge()
# TargetError, path  | target        | others first, this file alone, judged at the end: Delivery.strike()
# TargetError        | target        | back off, try again, one alert: Worker.trouble()
# StateError         | machine       | the same; nothing is released
# ItemError          | item          | once more alone, then judged: Delivery.suspect(), next_step()
# IntegrityError     | item          | the same, and an alert
# NoRoom             | item          | waits; counts only if a larger one went after it: next_step()
# Unfit              | item          | counts: Delivery.fail(), in time quarantine

class MoverError(Exception):
    """What went wrong and where (message), how to fix it (hint), and at which file (path, bytes
    relative to the root of its batch; None: nobody knows)."""

    exit_code = EXIT_FAILED
    scope = 'program'           # whose trouble it looks like: see next_step()

    def __init__(self, message, hint='', path=None):
        Exception.__init__(self, message)
        self.message = message
        self.hint = hint
        self.path = path

    def __str__(self):
        return '%s (%s)' % (self.message, self.hint) if self.hint else self.message

    @property
    def lines(self):
        """What to print, a line each."""
        return [str(self)]


class ConfigError(MoverError):
    """Nothing was touched; a person must fix the configuration.  more: further ones in it."""

    exit_code = EXIT_USAGE
    scope = 'configuration'

    def __init__(self, message, hint='', more=()):
        MoverError.__init__(self, message, hint)
        self.more = tuple(more)

    @property
    def lines(self):
        return [str(error) for error in (self,) + self.more]


class TargetError(MoverError):
    """The target, or the way to it, is in trouble: keep everything, back off, try again.  With a
    path it may be that file's own trouble: the others are sent first."""

    scope = 'target'


class StateError(TargetError):
    """This machine cannot write its own files: the same back-off, nothing is released."""

    scope = 'machine'


class ItemError(MoverError):
    """The trouble of one item, it seems: the others go on, and the target is asked whether it
    works before it counts against the item."""

    scope = 'item'


class Unfit(ItemError):
    """Certainly the item's own: its name, its size, its content, what has its name there."""


class NoRoom(ItemError):
    """No room for this item, at the target or in the spool; smaller ones may fit."""


class IntegrityError(ItemError):
    """What arrived is not what was sent: never release, alert, send again."""


class Changed(MoverError):
    """The source changed while it was handled: no fault, the next pass sees to it."""


class Suspended(MoverError):
    """A stop file, a closed transfer window: wait, this is no failure."""


class LockedError(MoverError):
    """Another process works on this stream or on its directory."""

    exit_code = EXIT_LOCKED


class Interrupted(MoverError):
    """Somebody asked us to stop."""


# ----------------------------------------------------------------------------------------
# 4  small helpers
# ----------------------------------------------------------------------------------------

# Names are bytes everywhere, so that whatever the file system holds goes through
# unchanged whatever the locale says.  Text is made of them at the edges only.

def to_bytes(text):
    return text if isinstance(text, bytes) else text.encode('utf-8', 'surrogateescape')


def to_text(name):
    """The reversible text of a name, for JSON: bytes that are no UTF-8 become surrogates."""
    return name if isinstance(name, str) else name.decode('utf-8', 'surrogateescape')


def show(name):
    """A name for people: one line, printable, unambiguous."""
    text = to_bytes(name).decode('utf-8', 'backslashreplace')
    if text.isprintable():
        return text
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def to_json(value, **layout):
    """ASCII bytes."""
    import json
    return json.dumps(value, **layout).encode('ascii')


def from_json(text):
    """Raises ValueError."""
    import json
    return json.loads(text)


def random_hex(count):
    """2 * count hexadecimal digits, as bytes."""
    return os.urandom(count).hex().encode()


DURATION_UNITS = collections.OrderedDict([('d', 86400), ('h', 3600), ('m', 60), ('s', 1)])
SIZE_UNITS = {'': 1, 'K': 1 << 10, 'M': 1 << 20, 'G': 1 << 30, 'T': 1 << 40}


def parse_duration(text):
    """Seconds of '90', '1.5h', '2m', '1d12h'.  Raises ValueError, also for '1h30': of what?"""
    parts = re.findall(r'(\d+(?:\.\d+)?)\s*([smhd]?)', text.strip().lower())
    units = [unit for _, unit in parts]
    if len(parts) > 1 and units != [unit for unit in DURATION_UNITS if unit in units]:
        raise ValueError('%r: write each number with its unit, the largest first, as 1h30m' % text)
    if not parts or re.sub(r'[\d.smhd\s]', '', text.lower()) or \
            ''.join(n + u for n, u in parts) != re.sub(r'\s', '', text.lower()):
        raise ValueError('%r is not a duration like 30s, 5m, 1.5h or 2d' % text)
    return sum(float(number) * DURATION_UNITS[unit or 's'] for number, unit in parts)


def parse_size(text):
    """Bytes of '1000', '10K', '1.5G' (powers of 1024).  Raises ValueError."""
    match = re.match(r'(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?$', text.strip().upper())
    if not match:
        raise ValueError('%r is not a size like 500K, 10M, 2G or 1T' % text)
    size = float(match.group(1)) * SIZE_UNITS[match.group(2)]
    if size >= 1 << 63:
        raise ValueError('%r is more than any disk holds' % text)
    return int(size)


def format_size(count):
    power = 0
    while count >= 1024 and power < 4:
        count, power = count / 1024, power + 1
    return '%.1f %s' % (count, ('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]) if power else '%d B' % count


def format_duration(seconds):
    seconds = max(0, seconds)
    if seconds < 10:
        return '%.1f s' % seconds
    for unit, length in DURATION_UNITS.items():
        if seconds >= length:
            big, rest = divmod(int(seconds), length)
            smaller = {'d': 'h', 'h': 'm', 'm': 's'}.get(unit)
            tail = rest // DURATION_UNITS[smaller] if smaller else 0
            return '%d %s' % (big, unit) + (' %d %s' % (tail, smaller) if tail else '')


def count_of(number, noun):
    return '%d %s%s' % (number, noun, '' if number == 1 else 's')


def utc_stamp(now=None):
    """ISO 8601 in UTC, to the millisecond."""
    now = time.time() if now is None else now
    return time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now)) + '.%03dZ' % (now % 1 * 1000)


def epoch(stamp):
    """The seconds since 1970 of what utc_stamp() wrote.  Raises ValueError."""
    match = re.match(r'(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(\.\d+)Z$', stamp)
    if not match:
        raise ValueError('%r is no time' % stamp)
    year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
    if not (0 < month < 13 and 0 < day < 32 and hour < 24 and minute < 60 and second < 62):
        raise ValueError('%r is no time' % stamp)
    # not by the calendar module, whose import a short run would notice (datetime, locale)
    year, month = (year, month - 3) if month > 2 else (year - 1, month + 9)     # March is the first
    days = 365 * year + year // 4 - year // 100 + year // 400 + (153 * month + 2) // 5 + day - 719469
    return days * 86400 + hour * 3600 + minute * 60 + second + float(match.group(7))


NAME_MAX = 255          # bytes that a file system takes as one name


STAMPS = [0]                    # the last one that was given, in milliseconds
STAMPING = threading.Lock()     # guards it


def fresh_time():
    """The time for a stamp, never given before: a target may take a.~T~ and A.~T~ for one name."""
    with STAMPING:
        now = int(time.time() * 1000)
        STAMPS[0] = STAMPS[0] + 1 if STAMPS[0] - 1000 < now <= STAMPS[0] else now
        return (STAMPS[0] + 0.5) / 1000         # or rounding may show the one before


def stamped(name, now=None):
    """NAME.~20261124T031500.123Z~, with the stamp before the ending of a zip; what would get too
    long for a file system is cut, and a hash of it keeps two such names apart."""
    now = fresh_time() if now is None else now
    stamp = b'.~%s~' % utc_stamp(now).replace('-', '').replace(':', '').encode()
    ending = b'.zip' if name.endswith(b'.zip') else b''
    name = name[:len(name) - len(ending)]
    if len(name.rpartition(b'/')[2]) + len(stamp) + len(ending) > NAME_MAX:
        import hashlib
        head, slash, base = name.rpartition(b'/')
        tag = b'.' + hashlib.sha1(base).hexdigest()[:8].encode()
        base = base[:NAME_MAX - len(tag) - len(stamp) - len(ending)]
        base = re.sub(rb'[\xc0-\xff][\x80-\xbf]*\Z', b'', base)     # it may be half a character
        name = head + slash + base + tag
    return name + stamp + ending


def sync_directory(path):
    """fsync(2) of a directory, where the system has it: what was renamed in it survives."""
    if WINDOWS:
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(fd)


def close_all(fds):
    for fd in fds:
        with contextlib.suppress(OSError):      # what was read, or is gone: nothing is left to fail
            os.close(fd)


def atomic_write(path, data, durable=False, mode=0o600):
    """Write bytes to a file that nobody sees half written.  Raises OSError."""
    temp = '%s.%d.new' % (path, os.getpid())
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, 'O_NOFOLLOW', 0), mode)
    try:
        with os.fdopen(fd, 'wb') as handle:
            handle.write(data)
            if durable:
                handle.flush()
                os.fsync(handle.fileno())
        os.replace(temp, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temp)
        raise
    if durable:
        sync_directory(os.path.dirname(path) or '.')


@contextlib.contextmanager
def own_files(what, hint=''):
    """An OSError of our own files is this machine's trouble: a StateError that says what failed."""
    try:
        yield
    except OSError as error:
        raise StateError('%s: %s' % (what, error.strerror), hint)


@contextlib.contextmanager
def machine_trouble():
    """What is the target's is translated: any other OSError is this machine's trouble, a StateError."""
    try:
        yield
    except OSError as error:
        raise StateError('%s: %s' % (show(error.filename or 'this machine'), error.strerror))


def same_directory(one, two):
    """Whether two paths lead to one directory, as far as this machine can tell."""
    one, two = to_bytes(one), to_bytes(two)
    try:
        return os.path.samefile(one, two)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(two)


def lies_below(path, top):
    """Whether path is top or lies somewhere below it, symlinks resolved."""
    path, top = (os.path.join(os.path.realpath(to_bytes(p)), b'') for p in (path, top))
    return path.startswith(top)


def directory_trouble(what, path, create):
    """(errno, message, hint) if this is no directory that can be used, else None.  create: whether
    create_directories is set already."""
    try:
        number = 0 if stat.S_ISDIR(os.stat(path).st_mode) else errno.ENOTDIR
    except OSError as error:
        number = error.errno
    if not number:
        return None
    if number == errno.ENOENT:
        return number, '%s %s is missing' % (what, show(path)), \
            'create it or mount it' + ('' if create else ', or set create_directories = yes')
    return number, '%s %s cannot be used: %s' % (what, show(path), os.strerror(number)), {
        errno.EACCES: 'change the permissions above it', errno.ENOTDIR: 'something else has that name',
        errno.ELOOP: 'fix the symlink'}.get(number, 'unmount it and mount it again')


C_FUNCTIONS = {}        # name -> a function of the C library that Python has no door to, or None


def c_call(name, *args):
    """Call a function of the C library.  Raises OSError, with ENOSYS where it is missing."""
    if name not in C_FUNCTIONS:
        try:
            import ctypes
            C_FUNCTIONS[name] = getattr(ctypes.CDLL(None, use_errno=True), name)
        except (ImportError, OSError, AttributeError, TypeError, MemoryError):      # the last: SELinux
            C_FUNCTIONS[name] = None
    number = errno.ENOSYS
    if C_FUNCTIONS[name]:
        if C_FUNCTIONS[name](*args) >= 0:
            return
        import ctypes
        number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))


def rename_exclusively(old, new, old_in=-100, new_in=-100):
    """renameat2(2) with RENAME_NOREPLACE (Linux 3.15, glibc 2.28).  Raises OSError: EEXIST if the
    new name is taken, EINVAL or ENOSYS where a file system or a system has no such thing.  old_in,
    new_in: descriptors of the directories that the names are relative to; -100 is AT_FDCWD."""
    c_call('renameat2', old_in, old, new_in, new, 1)


def link_and_unlink(old, new):
    """link(2) never overwrites.  Raises OSError."""
    os.link(old, new, follow_symlinks=False)
    os.unlink(old)


def look_and_rename(old, new, old_in=None, new_in=None):
    """What is left where there are no hard links: what comes in between is overwritten.  old_in,
    new_in: descriptors of the directories that the names are relative to.  Raises OSError."""
    try:
        os.stat(new, dir_fd=new_in, follow_symlinks=False)
    except FileNotFoundError:
        os.rename(old, new, src_dir_fd=old_in, dst_dir_fd=new_in)
    else:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)


def rename_if_free(old, new, old_in=None, new_in=None):
    """Whether a file got a name that nothing had.  old_in, new_in: as above.  Raises OSError."""
    with contextlib.suppress(FileExistsError):
        try:
            rename_exclusively(old, new, *(-100 if fd is None else fd for fd in (old_in, new_in)))
        except FileExistsError:
            raise
        except OSError:
            look_and_rename(old, new, old_in, new_in)
        return True
    return False


def parent_of(path):
    """os.path.dirname() of a relative path without its checks, for every file asks."""
    return os.path.dirname(path) if WINDOWS else path.rpartition(b'/')[0]


def prefixes(path):
    """A path's directories from the top on, and itself: a/b/c gives a, a/b, a/b/c."""
    return [path[:match.end()] for match in re.finditer(rb'[^/]+', path)]


NO_NAMES = bytes.maketrans(b'<>:"|?*\\' + bytes(range(32)), b'_' * 40)


def folded(path):
    """The same for all paths that a target may take for one: whatever their case (casefold),
    the form of their accents (NFD), what Windows cannot hold, or an FTP server's IAC."""
    text = path.translate(NO_NAMES, b'\xff').decode('utf-8', 'surrogateescape').casefold()
    if len(text) != len(path):          # not all of it is ASCII
        import unicodedata
        text = unicodedata.normalize('NFD', unicodedata.normalize('NFD', text).casefold())
    if text.endswith(('.', ' ')) or './' in text or ' /' in text:
        text = re.sub(r'[. ]+(?=/|$)', '', text)
    return text


PLAIN = re.compile(rb'[^\x20-\x7e]|[":?*<>|\\]')
ODD_PATH = re.compile(PLAIN.pattern + rb'|(?:^|/)[ .]|[ .](?:/|$)')     # any part of it, or it is ours


def oddities(name):
    """What a target may not keep of a name: a sorted tuple, empty for an ordinary one.  Of a name
    beyond printable ASCII it is the name itself, for nobody knows what becomes of its bytes."""
    if name.startswith(OWN_PREFIX):
        return ()
    odd = set(PLAIN.findall(name))
    if any(byte > b'~' for byte in odd):
        return (name,)
    if name[:1] in (b' ', b'.'):
        odd.add(b'^' + name[:1])
    if name[-1:] in (b' ', b'.'):
        odd.add(name[-1:] + b'$')
    return tuple(sorted(odd))


def alive(pid):
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        pass
    except (OSError, TypeError, ValueError):
        return False
    try:        # Linux: a dead one that nobody has waited for, as in a container, is there still
        with open('/proc/%d/stat' % int(pid), 'rb') as handle:
            return handle.read().rpartition(b')')[2].split()[0] != b'Z'
    except (OSError, IndexError):
        return True


def say(text, stream=None):
    """Print a line whatever the terminal's encoding can or cannot show."""
    stream = stream or sys.stdout
    if stream is None:          # closed by whoever started us
        return
    encoding = stream.encoding or 'ascii'
    stream.write(text.encode(encoding, 'backslashreplace').decode(encoding) + '\n')
    stream.flush()


# ----------------------------------------------------------------------------------------
# 5  stop requests and signals
# ----------------------------------------------------------------------------------------

class StopRequest:
    """The one way to end everything: handlers record, the main thread requests, loops look.

    Whoever blocks in a call that cannot look registers what wakes it up with on_stop().
    Each stream has one of its own, which the one of the whole program requests in turn.
    """

    def __init__(self):
        self.signal = None              # what a signal handler recorded
        self.reload = False             # whether SIGHUP asked to read the configuration again
        self.pause = False              # whether SIGTSTP (Ctrl-Z) came
        self.event = threading.Event()
        self.leaving = threading.Event()    # end when this batch is done
        self.seen = time.monotonic()    # the last sign of life of whoever looks here
        self.lock = threading.Lock()    # guards wakers, which threads add and remove
        self.wakers = set()
        self.bell = None                # wakes who sleeps between two passes

    def record(self, number, _frame):
        self.signal = number

    def record_reload(self, _number, _frame):
        self.reload = True

    def record_pause(self, _number, _frame):
        self.pause = True

    def leave(self):
        """End when this batch is done."""
        self.leaving.set()
        if self.bell:
            self.bell.ring()

    def request(self):
        self.event.set()
        self.leave()
        with self.lock:
            wakers = list(self.wakers)
        for wake in wakers:
            with contextlib.suppress(Exception):    # every one of them must be woken
                wake()

    def check(self):
        self.seen = time.monotonic()
        if self.event.is_set():
            raise Interrupted('stopped on request')

    def wait(self, seconds):
        """Sleep, but not through a stop request.  Raises Interrupted."""
        self.seen = time.monotonic() + seconds
        self.event.wait(max(0, seconds))
        self.check()

    def rest(self, seconds=0, fd=None):
        """Sleep between two batches or passes, the place to leave at.  fd: something to be read
        there ends the sleep; who passes it has set a bell.  Raises Interrupted."""
        self.seen = time.monotonic() + seconds
        if fd is None:
            self.leaving.wait(max(0, seconds))
        elif not self.leaving.is_set():
            self.bell.wait(max(0, seconds), fd)
        self.check()
        if self.leaving.is_set():
            raise Interrupted('left after its batch')

    @contextlib.contextmanager
    def on_stop(self, wake):
        with self.lock:
            self.wakers.add(wake)
        try:
            self.check()
            yield
        finally:
            with self.lock:
                self.wakers.discard(wake)


class Bell:
    """Wakes a thread that waits, from another thread or from a signal handler."""

    def __init__(self):
        import socket
        self.reader, self.writer = socket.socketpair()
        self.reader.setblocking(False)
        self.writer.setblocking(False)

    def ring(self):
        with contextlib.suppress(OSError):      # it rings already
            self.writer.send(b'\0')

    def wait(self, seconds, *fds):
        """Sleep until it rings or one of these descriptors can be read."""
        import select
        fds = (self.reader.fileno(),) + fds
        if hasattr(select, 'poll'):             # unlike select() it knows descriptors above 1,023
            waiting = select.poll()
            for fd in fds:
                waiting.register(fd, select.POLLIN)
            waiting.poll(seconds * 1000)
        else:
            select.select(fds, [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            self.reader.recv(64)

    def close(self):
        self.reader.close()
        self.writer.close()


@contextlib.contextmanager
def signals_let_in():
    """What the first lines of this file held back may come; afterwards it is held back again,
    for at the end of the program nobody takes it any more."""
    if not hasattr(signal, 'pthread_sigmask'):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def handlers_of(stop, daemon):
    """{signal: its handler}: each is recorded; SIGHUP means reload to a daemon."""
    handlers = {getattr(signal, name): stop.record
                for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGBREAK') if hasattr(signal, name)}
    if hasattr(signal, 'SIGHUP'):
        if daemon:
            handlers[signal.SIGHUP] = stop.record_reload
        elif signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            del handlers[signal.SIGHUP]                     # nohup(1)
    if hasattr(signal, 'SIGTSTP') and signal.getsignal(signal.SIGTSTP) != signal.SIG_IGN:
        handlers[signal.SIGTSTP] = stop.record_pause
    if hasattr(signal, 'SIGIO'):
        # a writer that meets one of our leases makes the kernel send SIGIO, which would kill us
        handlers[signal.SIGIO] = signal.SIG_IGN
    return handlers


@contextlib.contextmanager
def signals_recorded(stop, daemon):
    """Let signals be recorded, see handlers_of(); yields wait(seconds), cut short by a signal
    and by ring(), which other threads may call."""
    bell = Bell()
    before = {number: signal.signal(number, handler)
              for number, handler in handlers_of(stop, daemon).items()}
    old_fd = signal.set_wakeup_fd(bell.writer.fileno())
    try:
        with signals_let_in():
            yield bell.wait, bell.ring
    finally:
        signal.set_wakeup_fd(old_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        bell.close()


# ----------------------------------------------------------------------------------------
# 6  running programs: the one door
# ----------------------------------------------------------------------------------------

# errors: for a message; lines: all that was written to standard error
Finished = collections.namedtuple('Finished', 'code output errors lines')


def clean_environment(secret=None):
    """What children see: no rsync, popt or rclone settings of somebody else (but the remotes that
    rclone finds in RCLONE_CONFIG_*), messages in English."""
    kept = {k: v for k, v in os.environ.items() if k.startswith('RCLONE_CONFIG') or
            not k.startswith(('RSYNC_', 'POPT', 'RCLONE_', 'LC_', 'LANGUAGE', 'MISTAMOVER'))}
    kept['LC_ALL'] = 'C'
    kept.update(secret or {})
    return kept


class Program:
    """A program run from an argument list, in a session of its own, under a watchdog.

    feed: bytes for its standard input, or None to write() to it while it runs.
    gather: seconds for which its output gathers before it is read again.
    keep_fds: descriptors it inherits (the locks: an orphan still counts as one of ours).
    secret: environment variables for this process alone.
    signals: what ends it, the next one if it does not within KILL_GRACE.
    merged: its errors are read with its output.
    """

    RUNNING = set()
    GUARD = threading.Lock()            # of RUNNING
    frozen, thawed = False, 0           # whether all of them are stopped; monotonic time of their going on

    POLITE, ABRUPT = ('SIGTERM', 'SIGKILL'), ('SIGKILL',)
    PIPE = 1 << 16                      # bytes that pipe(7) holds
    BACKLOG = 256                       # pieces of that size: what is read before somebody wants it

    def __init__(self, argv, stop, feed=b'', gather=0, keep_fds=(), secret=None, signals=POLITE,
                 merged=False):
        import queue
        import subprocess
        import tempfile
        stop.check()
        self.stop, self.gather, self.signals = stop, gather, signals
        self.hung = False               # whether it was ended for its silence
        self.name = os.path.basename(to_text(argv[0]))
        self.chunks = queue.Queue(self.BACKLOG)
        self.closing = threading.Event()
        self.errors_file = tempfile.TemporaryFile()
        convert = to_text if WINDOWS else to_bytes
        options = {} if WINDOWS else {'pass_fds': keep_fds, 'start_new_session': True}
        with contextlib.ExitStack() as stack:
            source = subprocess.PIPE
            if feed is not None:
                source = stack.enter_context(tempfile.TemporaryFile())
                source.write(feed)
                source.seek(0)
            try:
                self.process = subprocess.Popen(
                    [convert(a) for a in argv], stdin=source, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT if merged else self.errors_file,
                    env=clean_environment(secret), **options)
            except OSError as error:
                self.errors_file.close()
                raise TargetError('cannot start %s: %s' % (self.name, error.strerror),
                                  'install %s or set its path in the configuration' % self.name)
        if feed is None and not WINDOWS:
            os.set_blocking(self.process.stdin.fileno(), False)
        with self.GUARD:
            self.RUNNING.add(self)
        self.reader = threading.Thread(target=self._read, name=self.name, daemon=True)
        self.reader.start()

    def _read(self):
        import queue
        fd = self.process.stdout.fileno()
        while not self.closing.is_set():
            chunk = os.read(fd, self.PIPE)
            while not self.closing.is_set():
                with contextlib.suppress(queue.Full):
                    self.chunks.put(chunk, timeout=0.1)
                    break
            if not chunk:
                return
            if self.gather and len(chunk) < self.PIPE:      # else it has gathered
                self.closing.wait(self.gather)

    def read(self, limit, alive=None):
        """The output since the last call, b'' at its end.

        alive: asked after `limit` seconds of silence, whether the work goes on all the same.
        Raises TargetError if it does not and Interrupted on a stop request; in both cases
        the process group is gone when it does.
        """
        import queue
        since = time.monotonic()
        self.watch(since, limit)            # where there always is something, a stop is heard, too
        while True:
            try:
                pieces = [self.chunks.get(timeout=0.1)]
                while pieces[-1] and len(pieces) < self.BACKLOG and not self.chunks.empty():
                    pieces.append(self.chunks.get())
                if len(pieces) > 1 and not pieces[-1]:
                    self.chunks.put(pieces.pop())       # the end comes alone
                return b''.join(pieces)
            except queue.Empty:
                if self.process.poll() is not None and self.overdue(since, KILL_GRACE):
                    return b''          # it has ended; a child of its own keeps the pipe open
                if self.overdue(since, limit) and alive and alive():
                    since = time.monotonic()
                self.watch(since, limit)

    @staticmethod
    def overdue(since, limit):
        return not Program.frozen and time.monotonic() - max(since, Program.thawed) > limit

    @classmethod
    def send_all(cls, number):
        with cls.GUARD:
            programs = list(cls.RUNNING)
        for program in programs:
            with contextlib.suppress(OSError):
                os.killpg(program.process.pid, number)

    @classmethod
    def stop_with_us(cls):
        """Ctrl-Z: they are in sessions of their own, so the terminal does not stop them."""
        cls.frozen = True
        cls.send_all(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)        # until somebody says fg
        cls.send_all(signal.SIGCONT)
        cls.frozen, cls.thawed = False, time.monotonic()

    def watch(self, since, limit):
        """End the program on a stop request, or when it was silent for too long."""
        if self.stop.event.is_set():
            self.kill()
        self.stop.check()
        if self.overdue(since, limit):
            self.hung = True
            self.kill()
            raise TargetError('%s gave no sign of life for %s and was ended' % (
                self.name, format_duration(limit)), 'does the target or the network hang? see stall_timeout')

    def write(self, data, limit):
        """To its standard input, under the same watchdog: a hung program reads nothing."""
        since = time.monotonic()
        data = memoryview(data)
        try:
            while data:
                count = self._write_some(data[:self.PIPE])
                data = data[count:]
                if count:
                    since = time.monotonic()
                else:
                    self.watch(since, limit)
        except OSError:
            self.stop.check()               # then another thread has ended it
            raise TargetError('%s ended early: %s' % (self.name, self.errors()))

    def _write_some(self, data):
        """How much of it the pipe took; after a tenth of a second perhaps nothing."""
        import select
        fd = self.process.stdin.fileno()
        try:
            return os.write(fd, data)
        except BlockingIOError:
            ready = select.poll()           # unlike select() it knows descriptors above 1,023
            ready.register(fd, select.POLLOUT)
            ready.poll(100)
            return 0

    def end_input(self):
        """Close its standard input: that was all."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def lines(self):
        """What it wrote to standard error."""
        self.errors_file.seek(0)
        lines = [show(line.strip()) for line in self.errors_file.read().splitlines()]
        return [line for line in lines if line and 'known hosts' not in line]

    def errors(self):
        """The last of these lines, for a message about a program that goes on."""
        return '; '.join(self.lines()[-3:])[-500:]

    def wait(self, limit):
        """The exit code; a program that does not end within `limit` seconds is ended."""
        import subprocess
        try:
            self.process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            self.kill()
        return self.process.returncode

    def kill(self):
        """End the process and every child it started in its session."""
        import subprocess
        for name in self.signals:
            with contextlib.suppress(OSError):
                if WINDOWS:
                    self.process.terminate()
                else:
                    os.killpg(self.process.pid, getattr(signal, name))
            try:
                self.process.wait(timeout=KILL_GRACE)
                break
            except subprocess.TimeoutExpired:
                continue

    def see_off(self):
        """Let it end by itself, if that does not take too long."""
        self.wait(KILL_GRACE)
        self.close()

    def close(self):
        if self.process.poll() is None:
            self.kill()
        with self.GUARD:
            self.RUNNING.discard(self)
        if self.process.stdin:
            self.end_input()
        self.closing.set()
        self.reader.join(KILL_GRACE)
        if not self.reader.is_alive():      # else the pipe is its, until a grandchild lets go
            self.process.stdout.close()
        self.errors_file.close()


SILENT = 'nothing on standard error'         # of a program that failed


def brief(lines):
    """The cause comes first, what it led to last; rules of @, as ssh draws them, say nothing."""
    lines = [line for line in lines if line.strip('@')]
    return '; '.join(lines[:2] + lines[2:][-1:])[:500]


def run(argv, stop, limit, feed=b'', on_output=None, alive=None, ending=None, **more):
    """Run a program to its end and return Finished.

    limit: seconds of silence after which it is ended, unless alive() says that it works.
    on_output: called with each piece; when it answers True, that was all, and the end of the program
    is not waited for.
    ending: a deque for the threads that see such programs to their ends.
    more: as for Program.
    Raises TargetError (cannot start, hung), Interrupted.
    """
    program = Program(argv, stop, feed, GATHER, **more)
    pieces = []
    with contextlib.ExitStack() as stack:
        stack.callback(program.close)
        while True:
            piece = program.read(limit, alive)
            if not piece:
                break
            pieces.append(piece)
            if on_output and on_output(piece):
                end = threading.Thread(target=program.see_off, name='the end of ' + program.name)
                end.start()
                stack.pop_all()
                ending.append(end)
                return Finished(0, b''.join(pieces), '', [])
        code, lines = program.wait(limit), program.lines()
        return Finished(code, b''.join(pieces), brief(lines), lines)


# ----------------------------------------------------------------------------------------
# 7  configuration: every option is declared once, in OPTIONS
# ----------------------------------------------------------------------------------------

# A kind turns an option's text into its value, or raises ValueError with what would do.
# `base` is the directory of the file that holds the option.

def kind_text(text, _base):
    return text


COMMENT = 'holds a comment: give it a line of its own'


def kind_plain(text, _base):
    """Text that holds no comment."""
    return text


def kind_path(text, base):
    # by fsdecode, for a locale that knows less than the file (cron has none)
    return os.path.normpath(os.path.join(base, os.fsdecode(to_bytes(os.path.expanduser(text)))))


def kind_program(text, base):
    """A bare name is looked up on PATH when it is run; anything else is a path."""
    return kind_path(text, base) if os.path.basename(text) != text else text


def kind_duration(text, _base):
    seconds = parse_duration(text)
    if seconds > 36500 * 86400:
        raise ValueError('%r is more than a hundred years' % text)
    return seconds


def kind_limit(text, base):
    """A duration after which something has failed."""
    if kind_duration(text, base) < 1:
        raise ValueError('must be at least 1s')
    return kind_duration(text, base)


def kind_pause(text, base):
    """A duration between two tries: without one they would never stop."""
    pause = kind_duration(text, base)
    if not pause:
        raise ValueError('must be more than 0s')
    return pause


def kind_size(text, _base):
    return parse_size(text)


def kind_number(text, _base):
    if not re.match(r'\d{1,9}$', text):
        raise ValueError('%r is not a whole number of at most nine digits' % text)
    return int(text)


def kind_port(text, base):
    if not 0 < kind_number(text, base) < 65536:
        raise ValueError('%r is no port' % text)
    return int(text)


def kind_count(text, base):
    if not kind_number(text, base):
        raise ValueError('must be at least 1')
    return int(text)


def kind_flag(text, _base):
    if text.lower() not in ('yes', 'no', 'true', 'false', 'on', 'off', '1', '0'):
        raise ValueError('%r is neither yes nor no' % text)
    return text.lower() in ('yes', 'true', 'on', '1')


def kind_words(text, _base):
    import shlex
    if re.search(r'(^|\s)#', re.sub(r"'[^']*'|\"[^\"]*\"", 'x', text)):
        raise ValueError(COMMENT)
    return shlex.split(text)


def kind_command(text, base):
    """The words of a command that no shell sees."""
    words = kind_words(text, base)
    if words and not words[0]:
        raise ValueError('begins with an empty word')
    if any(re.match(r'\d?[<>|&;]', word) for word in words[1:]):
        raise ValueError("no shell reads this, so > | & ; mean nothing: use a script, or sh -c '...'")
    return [kind_program(words[0], base)] + words[1:] if words else []


def kind_parts(text, _base):
    """What commas separate."""
    parts = [part.strip() for part in text.split(',') if part.strip()]
    for part in parts:
        if re.search(r'\s[#;]|^[#;]\s', part):
            raise ValueError(COMMENT)
        words = part.replace('[ ]', '_').split()
        if len(words) > 1 and all(re.match(r'\.|.*[*?\[]', word) for word in words):
            raise ValueError('%r: commas separate patterns; for a blank in a name write [ ]' % part)
    return parts


def kind_globs(text, base):
    """Patterns of names, which hold no slash."""
    parts = kind_parts(text, base)
    for part in parts:
        if '/' in part:
            raise ValueError('%r matches nothing: a pattern is for a name, not for a path' % part)
    return parts


def kind_host(text, _base):
    if not re.match(r'[A-Za-z0-9][A-Za-z0-9._-]*$|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*$', text):
        raise ValueError('%r is no host name or address' % text)
    return text


def kind_user(text, _base):
    if not re.match(r'[A-Za-z0-9_][A-Za-z0-9_.@+-]*$', text):
        raise ValueError('%r is no user name' % text)
    return text


def kind_name(text, _base):
    if '/' in text or text in ('.', '..'):
        raise ValueError('%r must be a plain file name' % text)
    return text


def kind_ready(text, base):
    if '{name}' not in text or text == '{name}':
        raise ValueError('%r must hold {name}, like {name}.done' % text)
    return kind_name(text, base)


def kind_marker(text, base):
    """{name}.done, or a file inside of a directory like {name}/CopyComplete.txt."""
    if text.startswith('{name}/'):
        kind_name(text[7:], base)
        return text
    return kind_ready(text, base)


HASH_NAMES = ('sha256', 'sha512', 'sha1', 'md5')


def hash_named(text):
    """The hash that the name of a checksum file tells, or None."""
    return next((name for name in HASH_NAMES if name in text.lower()), None)


def kind_check_file(text, base):
    """{name}.sha256, a file inside of a directory like {name}/md5sum.txt, or SHA256SUMS for several."""
    kind_name(text[7:] if text.startswith('{name}/') else text, base)
    if not hash_named(text):
        raise ValueError('%r does not tell the hash: one of %s must be in it' % (
            text, ', '.join(HASH_NAMES)))
    return text


def kind_send_checksum(text, base):
    if not hash_named(text):
        raise ValueError('%r does not tell the hash: write e.g. {name}.sha256' % text)
    return kind_ready(text, base)


def kind_suffix(text, base):
    """What is put behind a name; it neither hides the file nor leads elsewhere."""
    if not re.match(r'[.~_-]?[\w.~-]*\w[\w.~-]*$', text):
        raise ValueError('%r is no suffix like .part' % text)
    return kind_name(text, base)


def kind_tls(text, base):
    """None, 'explicit' or 'implicit'."""
    if text.lower() in ('implicit', 'explicit'):
        return text.lower()
    return 'explicit' if kind_flag(text, base) else None


def kind_chmod(text, _base):
    """'640' or 'F640,D750' as (mode of files, mode of directories)."""
    found = re.findall(r'([FD]?)([0-7]{3,4})(?:,|$)', text)
    modes = dict(found)
    files = modes.get('F', modes.get(''))
    if not re.match(r'([FD]?[0-7]{3,4}(,|$))+$', text) or '' in modes and len(modes) > 1 or \
            not files or len(modes) < len(found):
        raise ValueError('%r is no mode like 640 or F640,D750' % text)
    plain = int(files, 8)
    directories = int(modes['D'], 8) if 'D' in modes else plain | (plain & 0o444) >> 2 | 0o300
    if directories & 0o300 != 0o300:
        raise ValueError('%r: nothing can be put into directories without wx for their owner' % text)
    return plain, directories


def kind_window(text, _base):
    """'20:00-06:00' as (minutes, minutes) of the local day."""
    match = re.match(r'(\d\d?):(\d\d)\s*-\s*(\d\d?):(\d\d)$', text)
    if not match:
        raise ValueError('%r is no time window like 20:00-06:00' % text)
    a, b, c, d = map(int, match.groups())
    if max(a, c) > 24 or max(b, d) > 59:
        raise ValueError('%r names no time of day' % text)
    if (a, b) == (c, d) or max(a * 60 + b, c * 60 + d) > 1440:
        raise ValueError('%r is an empty or impossible window' % text)
    return a * 60 + b, c * 60 + d


def kind_mail(text, _base):
    """An address, or NAME <address>."""
    if not re.match(r'(?:[^<>@"\n]*<)?[^\s<>@"\[\]]+@[A-Za-z0-9.-]+[A-Za-z0-9]>?$', text) or \
            ('<' in text) != text.endswith('>'):
        raise ValueError('%r is no mail address' % text)
    return text


def kind_mails(text, base):
    return [kind_mail(part, base) for part in kind_parts(text, base)]


LISTS = (kind_globs, kind_mails, kind_words, kind_command)      # may be empty, or go on in the next line


def kind_clock(text, _base):
    """'08:00' as minutes of the local day."""
    match = re.match(r'([01]?\d|2[0-3]):([0-5]\d)$', text)
    if not match:
        raise ValueError('%r is no time of day like 08:00' % text)
    return int(match.group(1)) * 60 + int(match.group(2))


def kind_level(text, _base):
    """'20%' or '50G' as a function of a disk's size that gives bytes."""
    match = re.match(r'(\d+(?:\.\d+)?)\s*%$', text)
    if match and float(match.group(1)) <= 100:
        share = float(match.group(1)) / 100
        return lambda total: total * share
    if match:
        raise ValueError('%r is more than the whole disk' % text)
    if re.match(r'[\d.]+$', text):
        raise ValueError('%r of what? write %s%% or %sG' % (text, text, text))
    size = parse_size(text)
    return lambda total: size


def one_of(*words):
    def kind_choice(text, _base):
        if text.lower() not in words:
            raise ValueError('%r is none of %s' % (text, ', '.join(words)))
        return text.lower()
    return kind_choice


# default: the text, '' for none, or a pair (in move mode, in mirror mode)
# need: what a stream must be for the option to mean anything: a transfer_mode, or words that its
# protocol has in `takes`; all of them, '' for any stream
Option = collections.namedtuple('Option', 'section name kind default need text')

OPTIONS = [Option(*row) for row in (
    ('mistamover', 'state_dir', kind_path, 'mistamover-state', '',
     'locks, ledger, status; on a local disk'),
    ('mistamover', 'log_file', kind_path, '', '', 'where to log; standard error if empty'),
    ('mistamover', 'log_level', one_of('debug', 'info', 'warning', 'error'), 'INFO', '',
     'DEBUG, INFO, WARNING or ERROR'),
    ('mistamover', 'log_format', one_of('text', 'json', 'journal'), 'text', '',
     'text; json: an object a line; journal: lines for journald or logger --prio-prefix'),
    ('mistamover', 'log_size', kind_size, '10M', '', 'log_file is rotated at this size; five are kept'),
    ('mistamover', 'pause_time', kind_pause, '10s', '',
     'pause between two scans when nothing was found'),
    ('mistamover', 'status_page', kind_path, '', '', 'an HTML page to look at, e.g. status.html'),
    ('mistamover', 'metrics_file', kind_path, '', '',
     "numbers for Prometheus's textfile collector, e.g. mistamover.prom"),
    ('mistamover', 'alert_command', kind_command, '', '',
     'a command (no shell) that gets alerts on its standard input'),
    ('mistamover', 'stream_files', kind_path, '', '', 'more files with streams, e.g. streams.d/*.ini'),

    ('stream', 'directory', kind_path, '', '', 'the incoming directory to watch (required)'),
    ('stream', 'status', one_of('running', 'stopped'), 'running', '', 'running or stopped'),
    ('stream', 'transfer_protocol', kind_plain, 'rsync_ssh', '',
     'local, rsync_ssh, rsync_native, scp, sftp, ftp or rclone'),
    ('stream', 'transfer_mode', one_of('move', 'mirror'), 'move', '',
     'move deletes the source after the verified delivery; mirror deletes nothing'),
    ('stream', 'target_host', kind_host, '', 'host', 'the host that keeps the data'),
    ('stream', 'target_port', kind_port, '', 'host', "the port, if not the protocol's own"),
    ('stream', 'target_dir', kind_plain, '', '',
     'where the data goes (required); rsync_native: MODULE/path, rclone: REMOTE:path; may end in '
     "dates of the item's mtime, like data/%Y/%m/%d; %% is a percent sign"),
    ('stream', 'target_marker', kind_name, '', '',
     'a file that must exist in target_dir, so that an unmounted disk is not taken for it'),
    ('stream', 'create_directories', kind_flag, 'no', '',
     'yes: make a missing directory or target_dir; else a missing one is an error'),
    ('stream', 'username', kind_user, '', 'host', 'login name at the target'),
    ('stream', 'password', kind_text, '', 'password', 'read raw; the file must be yours alone'),
    ('stream', 'password_file', kind_path, '', 'password_file', 'file whose first line is the password'),
    ('stream', 'ssh_key', kind_path, '', 'ssh', 'private key'),
    ('stream', 'ssh_options', kind_words, '', 'ssh',
     'more options for ssh, e.g. -o UserKnownHostsFile=/etc/m/known_hosts'),
    ('stream', 'rsync_options', kind_words, '', 'rsync', 'more options for rsync, e.g. -z'),
    ('stream', 'tls', kind_tls, 'no', 'tls',
     'yes: explicit TLS (AUTH TLS); implicit: TLS from the first byte, port 990; certificate checked'),
    ('stream', 'tls_ca_file', kind_path, '', 'tls',
     'certificates (PEM) to trust instead of those that the system trusts'),
    ('stream', 'rsync_command', kind_program, 'rsync', 'rsync', 'the rsync program'),
    ('stream', 'ssh_command', kind_program, 'ssh', 'ssh', 'the ssh program'),
    ('stream', 'scp_command', kind_program, 'scp', 'scp', 'the scp program'),
    ('stream', 'rclone_command', kind_program, 'rclone', 'rclone', 'the rclone program'),
    ('stream', 'rclone_config', kind_path, '', 'rclone',
     "rclone's configuration, which must be yours alone; its own default if empty"),
    ('stream', 'rclone_options', kind_words, '', 'rclone',
     'more options for rclone, each as --option=value'),
    ('stream', 'settle_time', kind_duration, '60s', '',
     'an item must have been unchanged for this long before it is sent'),
    ('stream', 'settle_max', kind_duration, '', '',
     'a file that never rests for settle_time is copied after this time (longer than settle_time), again '
     'each time it is over, and not released; each copy replaces the one before'),
    ('stream', 'stale_after', kind_duration, '1d', '',
     'an alert names what has waited for this long, whatever the reason; 0: none'),
    ('stream', 'ready_file', kind_marker, '', '',
     'e.g. {name}.done, or {name}/CopyComplete.txt inside of a directory: an item is complete only '
     'when this exists'),
    ('stream', 'ready_file_send', kind_flag, 'yes', '', 'send the ready file too, after its item'),
    ('stream', 'check_file', kind_check_file, '', '',
     'e.g. {name}.sha256: an item is complete when this exists, and sent only if it agrees with it'),
    ('stream', 'send_checksum', kind_send_checksum, '', '',
     'e.g. {name}.sha256: such a file is made and published beside each item'),
    ('stream', 'items', one_of('top', 'files'), 'top', '',
     'top: each entry of the directory is one item; files: each file below it is one'),
    ('stream', 'pause_time', kind_pause, '', '', 'as in [mistamover], for this stream'),
    ('stream', 'ignore', kind_globs,
     ('.*, *.tmp, *.part, *.filepart, *.partial, *.crdownload, ~$*', ''), '',
     'shell globs of names to leave alone, at any depth'),
    ('stream', 'only', kind_globs, '*', '', 'shell globs: only items with such names'),
    ('stream', 'symlinks', one_of('keep', 'leave'), ('leave', 'keep'), '',
     'keep: mirror links as links; leave: leave them alone; they are never followed'),
    ('stream', 'verify', one_of('checksum', 'size', 'accepted'), 'checksum', '',
     "checksum: bytes are read back or hashed at the target; size: only their number; accepted: the "
     "server's last answer alone (move: only with keep_delivered)"),
    ('stream', 'staging', one_of('area', 'beside', 'none'), 'area', 'staging',
     'where a file is while it is sent: in a hidden directory of ours, beside its final name with '
     'staging_suffix, or under its final name at once, for all to see'),
    ('stream', 'staging_suffix', kind_suffix, '.part', 'staging', 'for staging = beside'),
    ('stream', 'target_uploads_later', one_of('no', 'accepted'), 'no', 'here',
     'accepted: move to a mount that uploads later (davfs, rclone), where nothing is proven'),
    ('stream', 'on_conflict', one_of('backup', 'overwrite', 'refuse'), ('backup', 'overwrite'), '',
     'other content has that name at the target: backup renames it to NAME.~TIME~, overwrite replaces '
     'it, refuse leaves the item here and says so'),
    ('stream', 'directories', one_of('auto', 'keep', 'zip'), 'auto', '',
     'keep them, zip them, or what the protocol can (auto)'),
    ('stream', 'dir_size_limit', kind_size, '', 'move',
     'a directory above this size is not zipped but reported'),
    ('stream', 'remove_directories', kind_flag, 'yes', 'move', 'no keeps emptied directories'),
    ('stream', 'target_chmod', kind_chmod, '', 'chmod', 'modes of what arrives: 640, or F640,D750'),
    ('stream', 'order', one_of('oldest', 'newest', 'name', 'smallest', 'largest'), 'oldest', '',
     'what goes first: oldest, newest, name, smallest or largest (rsync: of batches, in one by name)'),
    ('stream', 'batch_files', kind_count, ('10000', '1000000'), '', 'most files in one push'),
    ('stream', 'batch_size', kind_size, ('2G', '1000T'), '', 'most bytes in one push (one item may be more)'),
    ('stream', 'parallel', kind_count, '4', 'parallel',
     'connections at a time; rclone: twice as many'),
    ('stream', 'retry_count', kind_count, '3', '', 'tries of --once; failures before quarantine'),
    ('stream', 'retry_pause', kind_pause, '5s', '', 'pause after a failure, doubled each time'),
    ('stream', 'retry_pause_max', kind_pause, '5m', '', 'longest pause after a failure'),
    ('stream', 'connect_timeout', kind_limit, '20s', 'network', 'to reach the target'),
    ('stream', 'stall_timeout', kind_limit, '2m', '', 'no progress for this long ends the attempt'),
    ('stream', 'bandwidth_limit', kind_size, '', '', 'bytes per second'),
    ('stream', 'transfer_window', kind_window, '', '', 'local hours to send in, e.g. 20:00-06:00'),
    ('stream', 'quarantine_dir', kind_path, '', 'move', 'default DIRECTORY/.quarantine'),
    ('stream', 'quarantine_after', kind_duration, '1d', 'move',
     'an item that failed by its own fault retry_count times over this long goes there'),
    ('stream', 'stop_file', kind_name, '.stop', '',
     'in directory or target_dir, it suspends the stream until it is gone'),
    ('stream', 'mirror_delete', kind_flag, 'no', 'mirror',
     'delete at the target what is gone here; an empty directory deletes nothing'),
    ('stream', 'after_delivery', kind_command, '', '',
     'a command (no shell) run after each batch, with the names on its standard input'),
    ('stream', 'after_delivery_format', one_of('nul', 'json'), 'nul', '',
     'nul: names, each ended by a NUL; json: the ledger line of each'),
    ('stream', 'priority', kind_number, '100', '',
     'at or below base_priority, senders into directory are stopped when its disk is low'),
    ('stream', 'deletion_enabled', kind_flag, 'no', 'move',
     'yes: at level_vlow the oldest copies of keep_delivered are deleted early'),
    ('stream', 'keep_delivered', kind_duration, '0', 'move',
     'keep what was released in DIRECTORY/.delivered for this long'),

    ('email', 'from', kind_mail, '', '', 'the sender of alerts'),
    ('email', 'recipient', kind_mails, '', '', 'who gets them: addresses separated by commas'),
    ('email', 'subject', kind_text, 'MiStaMover', '', 'how the subject begins'),
    ('email', 'smarthost', kind_host, '', '', 'the mail server; no mail is sent without one'),
    ('email', 'port', kind_port, '25', '', 'its port'),
    ('email', 'tls', one_of('no', 'starttls', 'tls'), 'no', '', 'no, starttls or tls; certificate checked'),
    ('email', 'username', kind_text, '', '', 'login name at the mail server (with tls only)'),
    ('email', 'password_file', kind_path, '', '', 'file whose first line is the password'),
    ('email', 'threshold', one_of('info', 'warning', 'error'), 'info', '',
     'least level of an alert: info (good news too), warning or error; also for alert_command'),
    ('email', 'digest_time', kind_duration, '15m', '',
     'the first alert goes at once; what follows within this time goes together'),
    ('email', 'heartbeat', kind_clock, '', '', 'time of a daily mail that all is well, e.g. 08:00'),

    ('disk_space_monitor', 'level_good', kind_level, '', '',
     'free space at the incoming directories, as 20% or 50G: above it, senders go on'),
    ('disk_space_monitor', 'level_low', kind_level, '', '', 'below it, senders are stopped'),
    ('disk_space_monitor', 'level_vlow', kind_level, '', '',
     'below it, kept copies are deleted where deletion_enabled says so'),
    ('disk_space_monitor', 'base_priority', kind_number, '100', '',
     'streams of at most this priority are concerned'),
    ('disk_space_monitor', 'poll_interval', kind_pause, '60s', '', 'how often free space is looked at'),
)]

# in a value of several lines: a line that is no part of it
SWALLOWED = re.compile(r'\n\s*(\[(?:stream:[^]\n]*|%s|defaults)\]|(?:%s)\s*=)' % tuple(
    '|'.join(sorted({option[at] for option in OPTIONS})) for at in (0, 1)), re.I)

REQUIRED = ('directory', 'target_dir')

# Options of the version before, which warn until the next major one: what to say of them
GONE = {'sftp_command': 'sftp needs no program but ssh any more'}
STREAM_NAME = r'(?!.*\.json$)\w[\w.-]*$'      # of files in state_dir

EXAMPLE_VALUES = {'directory': 'incoming', 'target_dir': 'archive', 'transfer_protocol': 'local',
                  'create_directories': 'yes', 'settle_time': '2s'}

# rsync options that delete, append, write in place, do nothing, or undo what ours must say
REFUSED_RSYNC = re.compile(
    r'--(del\b|delete|remove-|append|inplace|dry-run|list-only|existing|ignore-|update|'
    r'write-|read-batch|only-write|files-from|no-?from0|rsh|out-format|log-format|partial-dir|'
    r'no-partial|daemon|server|sender|password-file|recursive|archive-only|max-size|min-size|'
    r'exclude|include|filter|backup|suffix|temp-dir|delay-updates|fake-super|size-only|from0|'
    r'relative|no-relative|copy-links|copy-dirlinks|copy-unsafe|stop-|time-limit|batch|'
    r'compare-dest|copy-dest|link-dest|files|progress|info|debug|outbuf|human|no-times|'
    r'specials|devices|copy-devices|prune|one-file|max-delete|help|version|force|old-args|quiet|'
    r'stderr)')
REFUSED_RSYNC_LETTERS = 'nuqeFfTbRLkKVhPmxIDC'


def refused_rsync_option(words):
    """The first word of rsync_options that would break a promise, or None."""
    for word in words:
        if re.match(r'-M|--remote-option=', word):
            word = word[2:] if word.startswith('-M') else word[16:]
        if REFUSED_RSYNC.match(word) or not word.startswith('-') or word == '--':
            return word
        if not word.startswith('--'):
            letters = re.split('[B@]', word[1:])[0]
            if any(letter in REFUSED_RSYNC_LETTERS for letter in letters) or not letters:
                return word
    return None


# rclone options that delete, write in place, filter, do nothing, print secrets, or undo what ours say
REFUSED_RCLONE = re.compile(
    r'(?!--)|--?$|--(delete|rmdirs|inplace|dry-run|interactive|(include|exclude|filter|files-from|hash-filter)'
    r'|(min|max)-(age|size|depth|transfer|delete|duration)|one-file|links|copy-links|skip-links|metadata-(inc|exc|fil)'
    r'|update|ignore-|existing|size-only|checksum|immutable|no-check-dest|compare-dest|copy-dest|backup-dir'
    r'|suffix|partial|config|ask-password|use-json|log-|syslog|quiet|verbose|stats|progress|retries|rc\b|rc-'
    r'|dump|error-on|fast-list|no-traverse|no-unicode|order-by|cutoff|track|one-way|combined|differ|match'
    r'|missing|download|error\b|s3-no-|s3-(upload|copy)-cutoff|s3-directory-markers|multi-thread|header-upload'
    r'|streaming-upload|transfers|bwlimit|help|version|no-update|use-server|refresh|server-side|fix-case'
    r'|local-(encoding|links|unicode|nounc)|(s3-)?encoding|s3-encoding|s3-versions|s3-version-at)')


def refused_rclone_option(words):
    """The first word of rclone_options that would break a promise, or None."""
    return next((word for word in words if REFUSED_RCLONE.match(word)), None)


def default_of(option, mode):
    return option.default if isinstance(option.default, str) else \
        option.default[mode == 'mirror']


class Settings:
    """The values of one section, an attribute an option."""

    def __init__(self, name, values):
        self.name = name
        self.__dict__.update(values)


class Config:
    """A configuration as read: `settings` of [mistamover] and a list of `streams`."""

    def __init__(self, path):
        self.path = os.path.abspath(path)
        self.origins = {}           # (section, option) -> (file, line); option None: the header
        self.sections = {}          # section -> {option: raw text}
        self.settings = self.email = self.monitor = None
        self.stamps = []            # of the files, as they were when they were read
        self.streams, self.every = [], []
        self.mistakes = collections.OrderedDict()       # place -> ConfigError
        self.warnings = []

    def place(self, section, option):
        """(file, line) of what the configuration says there."""
        return self.origins.get((section, option)) or self.origins.get((section, None)) or (self.path, 0)

    def home(self, section, option):
        """The section that says it: the stream's own or [defaults]."""
        return section if option in self.sections.get(section, ()) else 'defaults'

    def where(self, section, option):
        path, line = self.place(section, option)
        return '%s%s: [%s]%s' % (show(path), ', line %d' % line if line else '', show(section),
                                 ' ' + show(option) if option else '')

    def fail(self, section, option, message, hint=''):
        raise ConfigError('%s: %s' % (self.where(section, option), message), hint)

    def mistake(self, section, option, message, hint=''):
        """Note it and go on, so that all are said at once.  Of one place only the first one is:
        another may be its consequence."""
        self.mistakes.setdefault((self.place(section, option), section, option), ConfigError(
            '%s: %s' % (self.where(section, option), message), hint))

    def is_wrong(self, section, option):
        return any(key[1] in (section, 'defaults') and key[2] == option for key in self.mistakes)

    def raise_mistakes(self):
        """Raises ConfigError with all of them, in the order of their lines."""
        if self.mistakes:
            errors = [self.mistakes[key] for key in sorted(self.mistakes, key=lambda key: key[0])]
            raise ConfigError(errors[0].message, errors[0].hint, errors[1:])


def stamp_of(path):
    """What differs after a file was changed, or None if it is gone."""
    try:
        info = os.stat(path)
        return path, info.st_mtime_ns, info.st_size, info.st_ino
    except OSError:
        return None


def parse_ini(path, text):
    """The sections of one file.  Raises ConfigError, which never shows a line: it may hold a password."""
    import configparser
    parser = configparser.RawConfigParser(default_section='\0', delimiters=('=',))
    try:
        parser.read_string(text)
    except (configparser.DuplicateOptionError, configparser.DuplicateSectionError) as error:
        raise ConfigError('%s, line %d: [%s] %s is written twice' % (
            show(path), error.lineno, show(error.section), show(getattr(error, 'option', ''))),
            'remove one of them')
    except configparser.MissingSectionHeaderError as error:
        raise ConfigError('%s, line %d: an option before the first [section]'
                          % (show(path), error.lineno), 'begin with [mistamover]')
    except configparser.ParsingError as error:
        first, *more = [ConfigError('%s, line %d: neither "option = value" nor [section]'
                                    % (show(path), number)) for number, _ in error.errors]
        raise ConfigError(first.message, '', more)
    return parser


def note_origins(config, path, text):
    """Remember in which line each option of a file is."""
    section = option = None
    depth = 0
    for number, line in enumerate(text.split('\n'), 1):
        words, indent = line.strip(), len(line) - len(line.lstrip())
        if not words or words[0] in '#;' or option and indent > depth:
            continue                    # empty, a comment, or it continues the line before
        depth, option = indent, re.match(r'([^=]+?)\s*=', words)
        header = re.match(r'\[(.+)\]\s*(.*)', words)
        if header:
            section, option = header.group(1), None
            config.origins[(section, None)] = path, number
            if header.group(2) and header.group(2)[0] not in '#;':
                config.mistake(section, None, 'what follows the ] is not read', 'give it a line of its own')
        elif option:
            config.origins[(section, option.group(1).lower())] = path, number


def read_ini(config, path):
    """Read one file into config.sections, remembering where each option is."""
    config.stamps.append(stamp_of(path))        # before it is read: a change meanwhile is seen
    try:
        with open(path, encoding='utf-8-sig') as handle:
            text = handle.read()
    except OSError as error:
        raise ConfigError('%s: cannot be read: %s' % (show(path), error.strerror),
                          'name another file, or write one with --init' if error.errno == errno.ENOENT
                          else 'name a readable file')
    except UnicodeDecodeError:
        raise ConfigError('%s: is not UTF-8 text' % show(path), 'save it as UTF-8')
    parser = parse_ini(path, text)
    for section in parser.sections():
        if section in config.sections:
            config.fail(section, None, 'is in %s too' % show(path), 'remove one of them')
        config.sections[section] = dict(parser.items(section))
    note_origins(config, path, text)


def nearest(word, words):
    import difflib
    close = difflib.get_close_matches(word, words, 1)
    return 'did you mean %s?' % close[0] if close else 'valid are: ' + ', '.join(sorted(words))


def check_names(config):
    """Unknown sections and options are errors: a misspelt safety option must not be silent."""
    names = {kind: {o.name for o in OPTIONS if o.section == kind}
             for kind in {o.section for o in OPTIONS}}
    names['defaults'] = names['stream']
    for section, options in config.sections.items():
        kind = 'stream' if re.match(r'stream:.', section) else section
        if kind not in names or section == 'stream':
            config.mistake(section, None, 'unknown section',
                           nearest(section, sorted(set(names) - {'stream'}) + ['stream:NAME']))
            continue
        if kind == 'stream' and not re.match(r'stream:' + STREAM_NAME, section):
            config.mistake(section, None, 'a stream name is made of letters, digits, _ . and -, the '
                           'first a letter or a digit; it does not end in .json')
        for option in sorted(set(options) - names[kind]):
            if option in GONE:
                config.warnings.append('%s: %s; remove this line' % (
                    config.where(section, option), GONE[option]))
                del options[option]
            else:
                config.mistake(section, option, 'unknown option', nearest(option, names[kind]))


def short_host_name():
    import socket
    return re.sub(r'[^\w-]', '_', socket.gethostname().partition('.')[0]) or 'localhost'


def make_interpolator(config):
    """text_of(section, option) -> text, None if it is not set; $ references followed."""
    import configparser

    class StreamReferences(configparser.ExtendedInterpolation):
        """${stream:NAME:option}, for the library allows one colon only; and ${host}."""

        def before_get(self, parser, section, option, value, defaults):
            value = re.sub(r'(?<!\$)\$\{host\}', host, value)
            value = re.sub(r'(?<!\$)\$\{stream:([^:}]+):', r'${stream/\1:', value)
            return super().before_get(parser, section, option, value, defaults)

        def before_set(self, _parser, _section, _option, value):
            return value        # syntax is judged when it is read, where it can be named

    host = short_host_name()
    parser = configparser.ConfigParser(default_section='defaults', interpolation=StreamReferences())
    for section, values in config.sections.items():
        parser.read_dict({section.replace('stream:', 'stream/', 1): values})

    def text_of(section, option):
        try:
            return parser.get(section.replace('stream:', 'stream/', 1), option,
                              raw=option == 'password').strip()
        except (configparser.NoOptionError, configparser.NoSectionError):
            return None
        except configparser.InterpolationError:
            config.mistake(section, option, 'a ${reference} in it cannot be resolved',
                           'write ${option}, ${section:option} or ${host}, and $$ for a dollar sign')

    return text_of


def value_of(option, text, base, mode):
    """(value, text) of an option from its text, or from its default.  Raises ValueError."""
    if text is None or not text and option.kind is not kind_globs:
        text = default_of(option, mode)
    if re.search(r'[\0-\037]', text) and option.kind not in LISTS:
        raise ValueError('goes on in the next line: an indented line continues the one before')
    swallowed = SWALLOWED.search(text)
    if swallowed:
        raise ValueError('goes on in the next lines with %s, for these are indented' % swallowed.group(1))
    if option.kind not in LISTS + (kind_text,) and re.search(r'\s[;#]', text):
        raise ValueError(COMMENT)
    return option.kind(text, base) if text or option.kind in LISTS else None, text


def read_section(config, section, kind, text_of, mode=None):
    """The values of a section: its own text, else [defaults], else the table."""
    values = {}
    for option in OPTIONS:
        if option.section != kind:
            continue
        # only streams have defaults: a stream's username is not the mail server's
        text = text_of(section, option.name) if kind == 'stream' or \
            option.name in config.sections.get(section, ()) else None
        home = config.home(section, option.name)
        base = os.path.dirname(config.place(home, option.name)[0])
        try:
            values[option.name], text = value_of(option, text, base, mode)
        except ValueError as error:
            config.mistake(home, option.name, str(error))
            values[option.name], _ = value_of(option, None, base, mode)
        if kind == 'stream' and option.name in REQUIRED and not text:
            config.mistake(section, None, '%s is missing' % option.name, 'add a line "%s = ..."'
                           % option.name)
    return values


def means_something(option, protocol, mode):
    return set(option.need.split()) <= set(protocol.takes.split()) | {mode}


def whom_for(option, protocols):
    """The protocols, or the mode, that an option is for, to be shown; '' for all."""
    if option.need in ('', 'move', 'mirror'):
        return option.need
    fit = [name for name, protocol in protocols.items() if means_something(option, protocol, '')]
    return ', '.join(fit)


def drop_meaningless(config, section, values, protocols, mode):
    """Options that mean nothing for this stream: an error where the stream says them itself,
    not applied where they come from [defaults] or where the command line chose another mode."""
    protocol, configured = protocols[values['transfer_protocol']], values['transfer_mode']
    for option in OPTIONS:
        if option.section != 'stream':
            continue
        default, _ = value_of(option, None, '', mode)
        if option.name in config.sections[section] and values[option.name] != default and \
                not means_something(option, protocol, configured):
            config.mistake(section, option.name, 'means nothing with %s' % (
                'transfer_mode = ' + configured if option.need in ('move', 'mirror')
                else 'transfer_protocol = ' + values['transfer_protocol']),
                'write it to a file of your own and set password_file'
                if option.need == 'password' and 'password_file' in protocol.takes else
                'use a key: ssh-keygen, ssh-copy-id, ssh_key' if option.need.startswith('password') else
                'remove it, it is for %s' % whom_for(option, protocols))
        if not means_something(option, protocol, mode):
            values[option.name] = default


def only_mine(path):
    """Whether nobody but its owner can read a file (POSIX)."""
    return WINDOWS or not os.stat(path).st_mode & 0o077


def read_secret(config, section, path):
    """The password in a file's first line, which nobody else may be able to read."""
    try:
        if not only_mine(path):
            config.mistake(section, 'password_file', '%s can be read by others' % show(path),
                           'chmod 600 %s' % show(path))
        with open(path, encoding='utf-8-sig') as handle:
            secret = handle.readline().rstrip('\r\n')
        if not secret:
            config.mistake(section, 'password_file', 'the first line of %s is empty' % show(path))
        return secret
    except OSError as error:
        config.mistake(section, 'password_file', '%s cannot be read: %s' % (show(path), error.strerror))
    except UnicodeDecodeError:
        config.mistake(section, 'password_file', 'is not UTF-8 text')


def check_email(config):
    email = config.email
    email.sender = getattr(email, 'from')
    email.password = read_secret(config, 'email', email.password_file) if email.password_file else None
    missing = [name for name, value in (('from', email.sender), ('recipient', email.recipient)) if not value]
    if email.smarthost and missing:
        config.mistake('email', None, ' and '.join(missing) + ' missing', 'no mail goes without')
    if email.recipient and not email.smarthost:
        config.mistake('email', 'recipient', 'no mail goes without a smarthost',
                       'add a line "smarthost = ..."')
    if bool(email.username) != bool(email.password_file):
        config.mistake('email', 'password_file' if email.password_file else 'username',
                       'username and password_file go together')
    if email.username and email.tls == 'no':
        config.mistake('email', 'username', 'a password would cross the network in clear',
                       'set tls = starttls or tls')


def check_monitor(config):
    """The three levels go together, in order; tried with a disk of 1 TB."""
    levels = [getattr(config.monitor, name) for name in ('level_vlow', 'level_low', 'level_good')]
    given = [level(1 << 40) for level in levels if level]
    if given and (len(given) < 3 or given != sorted(given)):
        config.mistake('disk_space_monitor', None, 'level_vlow, level_low and level_good go together, '
                       'in this order', 'e.g. 2%, 10% and 20%')


def cannot_read(path):
    """Why a file cannot be read, or None."""
    try:
        with open(path, 'rb') as handle:
            handle.read(1)
    except OSError as error:
        return '%s cannot be read: %s' % (show(path), error.strerror)


def check_files(config, stream):
    """Notes which files that options name cannot be read, or can be read by others."""
    if stream.password:
        home = config.home(stream.section, 'password')
        path, _ = config.place(home, 'password')
        if not only_mine(path):
            config.mistake(home, 'password', 'this file can be read by others', 'chmod 600 %s' % show(path))
    if stream.password_file:
        stream.password = read_secret(config, stream.section, stream.password_file)
    for option in ('ssh_key', 'tls_ca_file', 'rclone_config'):
        path = getattr(stream, option)
        why = cannot_read(path) if path else None
        if why and not (option == 'ssh_key' and not cannot_read(path + '.pub')):      # an agent may have it
            config.mistake(config.home(stream.section, option), option, why)
        elif path and option == 'rclone_config' and not only_mine(path):
            config.mistake(config.home(stream.section, option), option,
                           '%s can be read by others' % show(path), 'chmod 600 %s' % show(path))


# target_form of a protocol -> what its target_dir must look like, and how to say so
TARGET_FORMS = {
    'path': None,                       # a path on target_host
    'here': None,                       # a path on this machine
    'module': (r'[^/]', 'must begin with the name of a module, not with a slash', 'MODULE/path'),
    # neither :backend,option=value: nor REMOTE,option=value: for all can read a command line
    'remote': (r'[\w.+@][\w.+@ -]*:', 'must begin with a remote of rclone\'s configuration and a colon',
               'REMOTE:path; see rclone config'),
}


def place_own_files(stream, state_dir):
    stream.spool = os.path.join(state_dir, 'spool', stream.name)
    own = os.path.join(state_dir, stream.name)
    stream.control_dir, stream.unproven, stream.coarse = own + '.ssh', own + '.unproven', own + '.times'
    stream.unsummed, stream.taken = own + '.unsummed', own + '.taken'


def finish_stream(config, stream, protocols):
    """Derive what the rest of the program works with."""
    state_dir = config.settings.state_dir
    stream.protocol = protocols[stream.transfer_protocol]
    stream.root = to_bytes(stream.directory)
    stream.mirror = stream.transfer_mode == 'mirror'
    stream.move = not stream.mirror
    stream.quarantine_dir = stream.quarantine_dir or os.path.join(stream.directory, '.quarantine')
    place_own_files(stream, state_dir)
    if stream.protocol.target_form == 'here':
        home = config.home(stream.section, 'target_dir')
        base = os.path.dirname(config.place(home, 'target_dir')[0])
        stream.target_dir = kind_path(stream.target_dir, base.replace('%', '%%'))
    parts = stream.target_dir.split('/')
    first = next((i for i, part in enumerate(parts) if '%' in part.replace('%%', '')), len(parts))
    stream.target_base = '/'.join(parts[:first]).replace('%%', '%') or (
        '/' if first and not parts[0] else '.')
    stream.target_dates = '/'.join(parts[first:])


def check_settle_max(stream, fail):
    known = stream.protocol.knows_own_copies and stream.verify == 'checksum'
    if stream.on_conflict == 'refuse' or stream.on_conflict == 'backup' and not known:
        fail('settle_max', 'needs on_conflict = overwrite here: each copy replaces the one before, which '
             'is known by its hash (not with rsync, rclone, or without verify = checksum)',
             'set on_conflict = overwrite')
    if stream.settle_max <= stream.settle_time:
        fail('settle_max', 'must be longer than settle_time')
    if stream.ready_file or stream.check_file or stream.directories == 'zip':
        fail('settle_max', 'does not go with ready_file, check_file or directories = zip',
             'it sends files before they are complete')


def check_target_dir(stream, fail):
    if re.search(r'[\0-\037]', stream.target_dir) or stream.target_dir.startswith('-'):
        fail('target_dir', 'must not begin with a dash or hold control characters')
    if '..' in stream.target_dir.split('/'):
        fail('target_dir', 'must not hold ".."', 'write the path it means')
    form = TARGET_FORMS[stream.protocol.target_form]
    if form and not re.match(form[0], stream.target_dir):
        fail('target_dir', *form[1:])
    if stream.target_base == '.' != stream.target_dir:
        fail('target_dir', 'must begin with a fixed part', 'dates go below it')
    odd = re.search(r'%(?:[^%aAbBCdeFgGhHIjklmMpRsSTuUVwWyYzZ]|$)', stream.target_dates.replace('%%', ''))
    if odd:
        fail('target_dir', '%s in it is no date' % show(odd.group()),
             'e.g. %Y/%m/%d; write %% for a percent sign')
    if stream.mirror_delete and stream.mirror and stream.target_dates:
        fail('mirror_delete', 'does not go with dates in target_dir', 'mirror to a fixed directory')


def check_directories(stream, fail):
    """What a stream does with directories must go with its protocol, mode and items."""
    protocol = stream.protocol
    if stream.directories not in protocol.directories + ('auto',):
        fail('directories', '%s does not %s directories' % (stream.transfer_protocol, stream.directories),
             'use ' + protocol.directories[0])
    if stream.directories == 'zip' and (stream.mirror or stream.items == 'files'):
        fail('directories', 'zip goes with transfer_mode = move and items = top only')
    stream.zips = 'zip' == (protocol.directories[0] if stream.directories == 'auto' else stream.directories)
    for option in ('check_file', 'ready_file'):
        if (getattr(stream, option) or '').startswith('{name}/') and stream.items == 'files':
            fail(option, 'in a directory does not go with items = files', 'use a name like {name}.sha256')


def check_stream(config, stream, protocols):
    """Everything that can be known to be wrong without touching anything."""

    def fail(option, message, hint=''):
        config.mistake(stream.section, option, message, hint)

    protocol = stream.protocol
    if stream.mirror and not protocol.mirrors:
        fail('transfer_mode', 'mirror does not work with %s' % stream.transfer_protocol,
             'use %s, or transfer_mode = move%s' % (
                 ' or '.join(n for n, p in sorted(protocols.items()) if p.mirrors), protocol.mirror_hint))
    if 'host' in protocol.takes.split() and not stream.target_host:
        fail('target_host', 'is missing', '%s needs one' % stream.transfer_protocol)
    check_directories(stream, fail)
    if WINDOWS and stream.keep_delivered:
        fail('keep_delivered', 'does not work on Windows')
    if stream.verify == 'accepted' and stream.move and not stream.keep_delivered:
        fail('verify', 'accepted proves nothing, so transfer_mode = move needs a copy for a while',
             'set keep_delivered, e.g. to 30d')
    if stream.settle_max is not None:
        check_settle_max(stream, fail)
    if stream.send_checksum and stream.send_checksum in (stream.check_file, stream.ready_file):
        fail('send_checksum', 'is the name of a file that is sent anyway', 'remove it')
    if stream.move and stream.symlinks == 'keep':
        fail('symlinks', 'keep goes with transfer_mode = mirror only', 'use leave')
    bad = refused_rsync_option(stream.rsync_options)
    if bad is not None:
        fail('rsync_options', '%s is refused: it would break a promise' % show(bad), 'remove it')
    bad = refused_rclone_option(stream.rclone_options)
    if bad is not None:
        fail('rclone_options', '%s is refused: it would break a promise, or is no --option=value' % show(bad),
             'remove it')
    check_target_dir(stream, fail)


def overlap(one, two):
    """Whether the targets of two streams are one place or lie in each other, as far as the
    configuration tells."""
    if one.target_host != two.target_host or \
            one.protocol.target_form != two.protocol.target_form:
        return False
    if one.protocol.target_form == 'here':
        return lies_below(one.target_base, two.target_base) or lies_below(two.target_base, one.target_base)
    paths = [os.path.join(os.path.normpath(s.target_base), '') for s in (one, two)]
    return paths[0].startswith(paths[1]) or paths[1].startswith(paths[0])


def rivals(config):
    """Yield the pairs of streams of which one may replace what the other has just delivered: both
    deliver into one place, and a name cannot be asked for and taken in one step."""
    for number, one in enumerate(config.streams):
        for two in config.streams[number + 1:]:
            if overlap(one, two) and any(
                    s.protocol.replaces or s.on_conflict == 'overwrite' for s in (one, two)):
                yield one, two


def own_places(settings):
    """Yield (option, path, the directory that must be writable) for each place that is ours."""
    for option in ('state_dir', 'log_file', 'status_page', 'metrics_file'):
        path = getattr(settings, option)
        if path:
            yield option, path, path if option == 'state_dir' else os.path.dirname(path)


def check_mirror_delete(config, stream):
    """What a mirror deletes must be its own: not what was moved there, nor what others keep."""
    def fail(message, hint):
        config.mistake(stream.section, 'mirror_delete', message, hint)

    if stream.configured_mode == 'move':
        fail('does not go with --mirror where transfer_mode = move: what was moved there would be deleted',
             'set it to no for this')
    for other in config.streams:
        if other is not stream and overlap(stream, other):
            fail('would delete what stream %s brings to the same place' % other.name,
                 'give each its own target_dir')
    if stream.protocol.target_form == 'here':
        kept = [path for _, path, _ in own_places(config.settings)]
        kept += [path for other in config.streams if other is not stream
                 for path in (other.directory, other.quarantine_dir)]
        for path in kept:
            if path and lies_below(path, stream.target_base):
                fail('would delete %s in target_dir' % show(path), 'put it somewhere else')


def check_apart(config):
    """No stream may eat another's directory or its own target."""
    for stream in config.streams:
        for other in config.streams:
            if other is stream:
                break
            if same_directory(stream.directory, other.directory):
                config.mistake(stream.section, 'directory', 'is also the directory of stream %s' % other.name,
                               'give each stream its own')
            if lies_below(stream.directory, other.directory) or \
                    lies_below(other.directory, stream.directory):
                config.mistake(stream.section, 'directory', 'this and the directory of stream %s lie in '
                               'each other' % other.name, 'give each stream its own')
        if stream.protocol.target_form == 'here' and (
                lies_below(stream.directory, stream.target_base) or
                lies_below(stream.target_base, stream.directory)):
            config.mistake(stream.section, 'target_dir', '%s and directory %s lie in each other' % (
                   show(stream.target_base), show(stream.directory)), 'use two separate directories')


def check_own_files(config):
    """Our own files lie in no stream's directory, and are four different ones."""
    seen = {config.path: 'this file'}
    for option, path, _ in own_places(config.settings):
        if path in seen:
            config.mistake('mistamover', option, 'is %s too' % seen[path], 'give each its own name')
        seen[path] = option
    for stream in config.streams:
        for option, path, _ in own_places(config.settings):
            if lies_below(path, stream.directory):
                config.mistake('mistamover', option, 'lies in the directory of stream %s' % stream.name,
                               'put it somewhere else')


def check_quarantines(config):
    """What is put aside must not be sent by another stream, nor taken for delivered."""
    for stream in config.streams:
        if stream.move and stream.protocol.target_form == 'here' and \
                lies_below(stream.quarantine_dir, stream.target_base) and \
                not lies_below(stream.directory, stream.target_base):
            config.mistake(stream.section, 'quarantine_dir', 'lies in target_dir',
                           'put it somewhere else')
        for other in config.streams:
            # a direct child of its own directory is skipped by the scan; elsewhere it would be sent
            own = other is stream and stream.quarantine_dir != stream.directory and \
                same_directory(os.path.dirname(stream.quarantine_dir), stream.directory)
            if stream.move and not own and lies_below(stream.quarantine_dir, other.directory) and \
                    not any(config.is_wrong(s.section, 'directory') for s in config.streams):
                config.mistake(stream.section, 'quarantine_dir',
                               'lies in the directory of stream %s' % other.name,
                               'put it directly into this directory or outside of all')


def check_places(config):
    """No two places may lie in each other where one would eat what is in the other."""
    check_apart(config)
    check_own_files(config)
    for stream in config.streams:
        stream.companions = [other.name for other in config.streams
                             if other is not stream and overlap(stream, other)]
        if stream.mirror and stream.mirror_delete:
            check_mirror_delete(config, stream)
    check_quarantines(config)


def read_stream_files(config):
    """The files with more streams, and nothing but streams."""
    import glob
    pattern = config.settings.stream_files
    extras = sorted(glob.glob(pattern))
    if not extras and not glob.has_magic(pattern):
        config.mistake('mistamover', 'stream_files', '%s is not there' % show(pattern))
    for extra in extras:
        known = set(config.sections)
        read_ini(config, extra)
        for section in set(config.sections) - known:
            if not section.startswith('stream:'):
                config.mistake(section, None, 'a file of stream_files holds streams only',
                               'move it to %s' % show(config.path))


def read_stream(config, section, protocols, text_of, mode):
    """The Settings of a stream, or None if its mistakes leave nothing to check further."""
    chosen = mode or (text_of(section, 'transfer_mode') or 'move').lower()
    values = read_section(config, section, 'stream', text_of, chosen)
    if values['transfer_protocol'] not in protocols:
        config.mistake(section, 'transfer_protocol', 'unknown protocol %r' % values['transfer_protocol'],
                       nearest(values['transfer_protocol'], protocols))
        return None
    if not all(values[name] for name in REQUIRED) or config.is_wrong(section, 'transfer_protocol'):
        return None
    drop_meaningless(config, section, values, protocols, chosen)
    values['configured_mode'] = values['transfer_mode']
    values['transfer_mode'] = mode or values['transfer_mode']
    stream = Settings(section[len('stream:'):], values)
    stream.section = section
    if stream.pause_time is None:
        stream.pause_time = config.settings.pause_time
    check_files(config, stream)
    finish_stream(config, stream, protocols)
    return stream


def load_config(path, protocols, names=(), mode=None):
    """Read and check a configuration; `names` selects streams, `mode` overrides theirs.

    Raises ConfigError with all that is wrong; nothing is touched.
    """
    config = Config(path)
    read_ini(config, config.path)
    check_names(config)
    text_of = make_interpolator(config)
    config.settings, config.email, config.monitor = (
        Settings(name, read_section(config, name, name, text_of))
        for name in ('mistamover', 'email', 'disk_space_monitor'))
    if config.settings.stream_files:
        read_stream_files(config)
        check_names(config)
        text_of = make_interpolator(config)
    every = [section for section in config.sections if section.startswith('stream:')]
    for section in every:
        stream = read_stream(config, section, protocols, text_of, mode)
        config.streams += [stream] if stream else []
    if not every and not config.mistakes:
        config.mistake('stream:NAME', None, 'no stream is configured', 'add a [stream:NAME] section')
    known = [section[len('stream:'):] for section in every]
    unknown = set(names) - set(known)
    if unknown and known:
        raise ConfigError('no stream %s in %s' % (show(min(unknown)), show(config.path)),
                          nearest(min(unknown), known))
    check_places(config)
    check_email(config)
    check_monitor(config)
    config.every = config.streams       # the page shows them all, whatever this run works on
    config.streams = [s for s in config.streams if not names or s.name in names]
    for stream in config.streams:
        check_stream(config, stream, protocols)
    config.raise_mistakes()
    return config


def defaults_as_text(option):
    """(in move mode, in mirror mode), as one would write them in a configuration."""
    move, mirror = (option.default,) * 2 if isinstance(option.default, str) else option.default
    return move.replace('$', '$$'), mirror.replace('$', '$$')


def example_ini(protocols):
    """The text of mistamover.ini.example, made of the option table."""
    lines = ['# MiStaMover: an example that runs as it is.',
             '#',
             '#     mkdir incoming; echo hello > incoming/run001.dat',
             '#     python3 mistamover.py --once --config mistamover.ini.example',
             '#',
             '# Every option is here with its default.  Relative paths are relative to this file.',
             '# Durations take s m h d, sizes K M G T.  ${section:option} refers to another',
             '# option, ${host} to the name of this machine; write $$ for a dollar sign.', '']
    for section, kind in (('mistamover', 'mistamover'), ('email', 'email'),
                          ('disk_space_monitor', 'disk_space_monitor'), ('defaults', 'stream')):
        lines += ['', '[%s]' % section]
        if section == 'defaults':
            lines += ['# options for every stream; a stream may say otherwise']
        for option in OPTIONS:
            if option.section == kind:
                only, (move, mirror) = whom_for(option, protocols), defaults_as_text(option)
                lines += ['', '# ' + ('%s: ' % only if only else '') + option.text]
                lines += ['# (%s in move, %s in mirror mode)' % (move or 'none', mirror or 'none')] \
                    if move != mirror else []
                lines += ['#%s = %s' % (option.name, move)]
    lines += ['', '', '# The active stream: what lies in incoming/ is moved to archive/.',
              '[stream:example]']
    lines += ['%s = %s' % (option.name, EXAMPLE_VALUES[option.name])
              for option in OPTIONS if option.section == 'stream' and option.name in EXAMPLE_VALUES]
    return re.sub(r' +\n', '\n', '\n'.join(lines)) + '\n'


def reference_rows(protocols):
    """(option, default, for, meaning) of every option: README's table."""
    rows = []
    for option in OPTIONS:
        move, mirror = (text or 'none' for text in defaults_as_text(option))
        rows.append((option.name, move if move == mirror else '%s; mirror: %s' % (move, mirror),
                     whom_for(option, protocols), option.text))
    return rows


# ----------------------------------------------------------------------------------------
# 8  logging
# ----------------------------------------------------------------------------------------

def stderr_is_journal():
    """JOURNAL_STREAM is the device and inode of what a unit's output goes to (systemd.exec(5))."""
    try:
        info = os.fstat(sys.stderr.fileno())
        return os.environ.get('JOURNAL_STREAM') == '%d:%d' % (info.st_dev, info.st_ino)
    except (OSError, AttributeError, ValueError):       # closed, or no file at all
        return False


class Log:
    """The logging module, imported with the first line; one line a message, printable."""

    REMEMBERED = 10000          # messages of once()

    def __init__(self):
        self.logger = None
        self.said = set()
        self.clear_line = lambda: None      # a progress line steps aside for a log line

    def start(self, level='INFO', path=None, form='text', size=10 << 20, loudness=None):
        """Called again, it takes over new settings.  loudness: the terminal's own level.  Raises
        ConfigError when the file cannot be opened."""
        import logging
        owner = self
        journal = stderr_is_journal()

        class LineFormatter(logging.Formatter):
            def format(self, record):
                message = show(record.getMessage())
                if record.exc_info:
                    message += ' | ' + show(self.formatException(record.exc_info))
                if form == 'json':
                    return to_json({'time': utc_stamp(record.created), 'level': record.levelname,
                                    'message': message}).decode()
                if form == 'journal' or journal and not path:
                    priority = {'DEBUG': 7, 'INFO': 6, 'WARNING': 4}.get(record.levelname, 3)
                    return '<%d>%s' % (priority, message)       # sd-daemon(3), logger --prio-prefix
                clock = time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(record.created))
                return '%s %-7s %s' % (clock, record.levelname, message)

        class Terminal(logging.StreamHandler):
            def emit(self, record):
                owner.clear_line()
                super().emit(record)

        handlers = [Terminal(sys.stderr)] + ([self.open_file(path, size)] if path else [])
        for handler in handlers:
            handler.setLevel(level.upper())
            handler.setFormatter(LineFormatter())
        if loudness or path and level.upper() != 'DEBUG':
            handlers[0].setLevel(loudness or 'WARNING')     # the file has the rest
        logging.raiseExceptions = False     # a full disk under the log must not end a transfer
        self.logger = logging.getLogger('mistamover')
        self.logger.propagate = False
        for old in self.logger.handlers:
            old.close()
        self.logger.handlers = handlers
        self.logger.setLevel(min(handler.level for handler in handlers))

    @staticmethod
    def open_file(path, size):
        """A handler whose file is its owner's alone and rotated at a size.  Raises ConfigError."""
        import logging.handlers     # which imports much that nothing else needs

        class PrivateFile(logging.handlers.RotatingFileHandler):
            def _open(self):
                return open(self.baseFilename, 'a', encoding='utf-8',
                            opener=lambda p, flags: os.open(p, flags, 0o600))

            def shouldRollover(self, record):
                """Before each line: what was renamed, or removed with its directory, takes none any more."""
                try:
                    there = os.path.samestat(os.stat(self.baseFilename), os.fstat(self.stream.fileno()))
                except (OSError, AttributeError):
                    there = False
                if not there:
                    self.close()
                    os.makedirs(os.path.dirname(self.baseFilename), 0o700, exist_ok=True)
                    self.stream = self._open()
                return super().shouldRollover(record)
        try:
            return PrivateFile(path, maxBytes=size, backupCount=4, encoding='utf-8')
        except OSError as error:
            raise ConfigError('cannot write the log file %s: %s' % (show(path), error.strerror))

    @staticmethod
    def of(stream, message):
        return '%s: %s' % (stream.name, message) if stream else str(message)

    def write(self, level, message, stream=None, trace=None):
        """stream: the one that it is about, if it is about one; each line begins with its name."""
        if self.logger:
            getattr(self.logger, level)('%s', self.of(stream, message), exc_info=trace)

    @property
    def detailed(self):
        """Whether anybody sees what debug() says."""
        return self.logger is not None and self.logger.isEnabledFor(10)

    def debug(self, message, stream=None):
        self.write('debug', message, stream)

    def info(self, message, stream=None):
        self.write('info', message, stream)

    def warning(self, message, stream=None):
        self.write('warning', message, stream)

    def error(self, message, stream=None, trace=None):
        self.write('error', message, stream, trace)

    def once(self, message, stream=None, level='warning'):
        """About something that stays as it is: said once in a process's life."""
        message = self.of(stream, message)
        if message not in self.said:
            if len(self.said) >= self.REMEMBERED:
                self.said.clear()           # rather twice than never
            self.said.add(message)
            getattr(self, level)(message)


log = Log()


# ----------------------------------------------------------------------------------------
# 9  locks, ledger, status
# ----------------------------------------------------------------------------------------

def make_private_directory(path):
    """Raises StateError."""
    with own_files('cannot make the directory %s' % show(path),
                   'make it for this account, or change state_dir or log_file'):
        os.makedirs(path, 0o700, exist_ok=True)


def lock_descriptor(fd):
    """Take the exclusive lock of an open file without waiting.  Raises OSError."""
    if WINDOWS:
        import msvcrt
        os.lseek(fd, 1 << 20, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


class StreamLock:
    """The OS lock on a stream's lock file and on its incoming directory.

    Locks belong to the open file description: a program that inherits the descriptors
    (`fds`) goes on holding them after kill -9, until it ends.
    """

    def __init__(self, stream, state_dir):
        self.stream = stream
        self.path = os.path.join(state_dir, stream.name + '.lock')
        self.fds = []

    def acquire(self):
        """Raises LockedError, StateError."""
        try:
            self._take(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), self._holder)
            if not WINDOWS:
                self._take(os.open(self.stream.root, os.O_RDONLY), lambda: (
                    'the directory is held by another MiStaMover process, one with another '
                    'configuration'))
            os.ftruncate(self.fds[0], 0)
            os.pwrite(self.fds[0], b'%d %s\n' % (os.getpid(), utc_stamp().encode()), 0) \
                if not WINDOWS else None
        except OSError as error:
            self.release()
            raise StateError('cannot lock stream %s: %s: %s' % (
                self.stream.name, show(error.filename or self.path), error.strerror),
                'change its permissions' if error.errno == errno.EACCES else '')
        except LockedError:
            self.release()
            raise

    def misplaced(self):
        """Whether the directory that is locked was renamed and another one has its name."""
        try:
            return len(self.fds) > 1 and not os.path.samestat(
                os.fstat(self.fds[1]), os.stat(self.stream.root))
        except OSError:         # the scan says that it is missing
            return False

    def _take(self, fd, describe):
        self.fds.append(fd)
        try:
            lock_descriptor(fd)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                log.debug('no lock on %s: %s' % (show(self.stream.directory), error.strerror), self.stream)
                return      # a share without locks: the local lock file still guards
            raise LockedError('stream %s: %s' % (self.stream.name, describe()),
                              'wait until it ends, or stop it')

    def _holder(self):
        with contextlib.suppress(OSError, ValueError):
            with open(self.path, encoding='ascii') as handle:
                pid, since = handle.read().split()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(pid), 0)
                return 'process %s holds it since %s' % (pid, since)
            return ('a transfer that process %s (gone) started still runs; it holds the stream '
                    'until it ends' % pid)
        return 'another process holds it'

    def release(self):
        while self.fds:
            os.close(self.fds.pop())


class Ledger:
    """ledger-YYYY-MM.jsonl: one JSON object a line for every delivery, on disk before release."""

    def __init__(self, state_dir):
        self.state_dir = state_dir
        self.lock = threading.Lock()    # one stream's lines stay together

    def append(self, records):
        """Raises StateError if the lines are not safely on disk; then nothing may be released."""
        lines = b''.join(to_json(record) + b'\n' for record in records)
        if not lines:
            return
        path = os.path.join(self.state_dir, 'ledger-%s.jsonl' % time.strftime('%Y-%m', time.gmtime()))
        with self.lock, own_files('cannot write the ledger %s' % show(path),
                                  'nothing is released until it can be written'):
            new = not os.path.exists(path)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                end = os.lseek(fd, 0, os.SEEK_END)
                if end and os.lseek(fd, end - 1, os.SEEK_SET) and os.read(fd, 1) != b'\n':
                    lines = b'\n' + lines       # the torn line of a crash stays alone
                while lines:
                    lines = lines[os.write(fd, lines):]
                os.fsync(fd)
            finally:
                os.close(fd)
            if new:
                sync_directory(self.state_dir)

    def paths(self, months=0, since=None):
        """The last `months` files (0: all), or those that hold what was recorded since then (epoch
        seconds), oldest first.  Raises StateError."""
        names = []
        with own_files('cannot read %s' % show(self.state_dir), 'run it as the user that it belongs to'), \
                contextlib.suppress(FileNotFoundError):
            names = sorted(n for n in os.listdir(self.state_dir) if re.match(r'ledger-\d{4}-\d\d\.jsonl$', n))
        first = '' if since is None else 'ledger-%s.jsonl' % time.strftime('%Y-%m', time.gmtime(since))
        return [os.path.join(self.state_dir, name) for name in names[-months:] if name >= first]

    def read(self, months=0, stream=None, since=None):
        """Every record of the files that paths() names, or those of one stream, by its name; oldest
        first; a torn line is skipped.  Raises StateError."""
        for path in self.paths(months, since):
            yield from self.read_file(path, stream)

    def read_file(self, path, stream=None):
        with own_files('cannot read the ledger %s' % show(path)), \
                open(path, encoding='ascii', errors='replace') as handle:
            for line in handle:
                with contextlib.suppress(ValueError):
                    record = from_json(line)
                    if self.sound(record) and stream in (None, record.get('stream')):
                        yield record

    def never_went(self, names, stream):
        """Those of some items' or files' names of which no record tells: a sorted list.  The newest
        files are read first, and no more of them than it takes.  Raises StateError."""
        left = sorted(names)
        for path in reversed(self.paths()):
            if not left:
                break
            went = {record['item'] for record in self.read_file(path, stream)}
            left = [name for name in left if not went.intersection(map(to_text, prefixes(name)))]
        return left

    @staticmethod
    def sound(record):
        """Whether a line can be one of ours."""
        return isinstance(record, dict) and isinstance(record.get('size', 0), (int, float)) and \
            all(isinstance(record.get(key, ''), str) for key in ('item', 'time', 'stream', 'outcome')) and \
            'item' in record and isinstance(record.get('target') or '', str)


class Tally:
    """Items and bytes delivered in each hour, read from the ledger as it grows."""

    DAYS = 31

    def __init__(self, ledger):
        self.ledger = ledger
        self.offsets = {}
        self.hours = {}             # 'YYYY-MM-DDTHH' in UTC -> [items, bytes]

    def update(self):
        """Raises OSError."""
        first = utc_stamp(time.time() - self.DAYS * 86400)[:13]
        for path in self.ledger.paths(3):
            with open(path, 'rb') as handle:
                handle.seek(self.offsets.get(path, 0))
                for line in handle:
                    if line.endswith(b'\n'):
                        self.count(line, first)
                        self.offsets[path] = self.offsets.get(path, 0) + len(line)
        self.hours = {hour: sums for hour, sums in self.hours.items() if hour >= first}

    def count(self, line, first):
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            record = from_json(line.decode('ascii', 'replace'))
            if record['time'][:13] >= first and record['outcome'] == 'delivered':
                sums = self.hours.setdefault(record['time'][:13], [0, 0])
                sums[0] += 1
                sums[1] += record['size']

    def last(self, count, step=3600, now=None):
        """[(epoch seconds, items, bytes)] of the last `count` spans of `step` seconds (a
        multiple of an hour), oldest first."""
        now = time.time() if now is None else now
        end = int(now // step + 1) * step
        spans = []
        for start in range(end - count * step, end, step):
            sums = [self.hours.get(utc_stamp(hour)[:13], (0, 0))
                    for hour in range(start, start + step, 3600)]
            spans.append((start, sum(s[0] for s in sums), sum(s[1] for s in sums)))
        return spans


class SharedJson:
    """A JSON file in state_dir with one entry a stream, kept by several threads and processes."""

    def __init__(self, state_dir, name, kinds=dict):
        self.path = os.path.join(state_dir, name)
        self.kinds = kinds              # of its entries; others are not ours
        self.lock = threading.Lock()

    def read(self):
        content = None
        with own_files('cannot read %s' % show(self.path)), contextlib.suppress(
                FileNotFoundError, ValueError), open(self.path, encoding='ascii') as handle:
            content = from_json(handle.read())
        return {k: v for k, v in content.items() if isinstance(v, self.kinds)} \
            if isinstance(content, dict) else {}

    @contextlib.contextmanager
    def locked(self):
        """Other threads and, where there is flock(2), other processes wait."""
        with self.lock:
            fd = os.open(self.path + '.lock', os.O_RDWR | os.O_CREAT, 0o600)
            try:
                if not WINDOWS:
                    import fcntl
                    with contextlib.suppress(OSError):      # a share without locks
                        fcntl.flock(fd, fcntl.LOCK_EX)
                yield
            finally:
                os.close(fd)

    def update(self, key, value, durable=False):
        """Set one entry, or remove it (None).  Raises StateError."""
        with own_files('cannot write %s' % show(self.path)), self.locked():
            content = self.read()
            if content.get(key) == value:
                return
            content[key] = value
            if value is None:
                del content[key]
            atomic_write(self.path, to_json(content, indent=1, sort_keys=True), durable)


def true_age(age, jumps):
    """What is left of an age by the wall clock when its jumps forward are taken out.

    jumps: (seconds that passed since, seconds it jumped) of each, the last one first.
    """
    for since, forward in jumps:
        if age <= since:
            break                   # of a time after this jump, and so after all before it
        age = max(age - forward, since)
    return age


def since_boot():
    """(what tells one boot from another, seconds since then, those asleep included where the
    system counts them)."""
    boot = ''
    with contextlib.suppress(OSError), open('/proc/sys/kernel/random/boot_id', encoding='ascii') as handle:
        boot = handle.read().strip()
    with contextlib.suppress(OSError, AttributeError):
        if sys.platform.startswith('linux'):
            return boot, time.clock_gettime(7)      # CLOCK_BOOTTIME, which Python 3.6 has no name for
    return boot, time.monotonic()


class Ages:
    """How long ago something was, although the wall clock may be set: a machine that starts in
    the year 2000 and is set right must not purge or quarantine everything at once.

    Kept in clock.json, for cron starts us anew each time: what the wall clock and the clock
    since boot showed together, and by how much the one jumped ahead of the other.  Of the time
    that the machine was off, OFF seconds are believed.
    """

    OFF = 7 * 86400
    MOST = 50                           # jumps remembered; the oldest become one
    SAVE_EVERY = 600                    # seconds

    def __init__(self, state_dir, wall=None, steady=since_boot):
        self.shared = SharedJson(state_dir, 'clock.json')
        self.wall, self.steady = wall or time.time, steady
        self.lock = threading.Lock()    # guards what follows
        self.known = None               # the entry of clock.json as written last

    def look(self):
        """Compare the clocks, note a jump; the entry of clock.json, its values brought up to now."""
        boot, steady = self.steady()
        wall = self.wall()
        old = self.known or self.shared.read().get('clock')
        try:
            passed = steady - old['steady']
            if old['boot'] != boot or passed < 0:
                passed = min(max(0, wall - old['wall']), self.OFF)
            forward = wall - old['wall'] - passed
            jumps = [(since + passed, size) for since, size in old['jumps']]
        except (TypeError, KeyError, ValueError):
            passed, forward, jumps = self.SAVE_EVERY, 0, []
        if forward > CLOCK_TOLERANCE:
            log.warning('the clock was set forward by %s; ages are counted without it' %
                        format_duration(forward))
            jumps.insert(0, (0, forward))
        if len(jumps) > self.MOST:
            jumps[-2:] = [(jumps[-2][0], jumps[-2][1] + jumps[-1][1])]
        now = dict(boot=boot, steady=steady, wall=wall, jumps=jumps)
        if abs(forward) > CLOCK_TOLERANCE or passed >= self.SAVE_EVERY:
            self.known = now
            try:
                self.shared.update('clock', now)
            except StateError as error:
                log.once(str(error))
        return now

    def age(self, moment):
        """Seconds since a moment of the wall clock."""
        with self.lock:
            now = self.look()
        return true_age(now['wall'] - moment, now['jumps'])


def backoff(stream, tries):
    """Seconds to wait after so many tries in a row: doubled with each, up to a limit."""
    return min(stream.retry_pause * 2 ** min(tries - 1, 30), stream.retry_pause_max)


class Failures:
    """Which items of a stream failed by their own fault, how often, since when; kept across runs."""

    def __init__(self, shared, stream):
        self.shared = shared
        self.stream = stream
        self.items = {name: entry for name, entry in shared.read().get(stream.name, {}).items()
                      if isinstance(entry, dict) and all(
                          isinstance(entry.get(key), (int, float)) for key in ('count', 'first', 'last'))}
        self.held_back = {}         # name -> (tries, time of the last): not by its own fault, it seems
        self.unfit = {}             # name -> the last Unfit of it that this process has counted
        self.late = set(self.items)     # names that failed before: they go last

    def count(self, name, error, now):
        entry = self.items.setdefault(to_text(name), {'count': 0, 'first': now})
        self.late.add(to_text(name))
        entry.update(count=entry['count'] + 1, last=now, error=str(error))
        return entry

    def is_known(self, name, error):
        """Whether just that was counted before in this process."""
        known = str(error) == self.unfit.get(to_text(name))
        if isinstance(error, Unfit):
            self.unfit[to_text(name)] = str(error)
        return known

    def hold_back(self, name, now):
        """It waits like one that failed, but nothing is counted; how often in a row it did."""
        tries = self.held_back.get(to_text(name), (0, 0))[0] + 1
        self.held_back[to_text(name)] = tries, now
        self.late.add(to_text(name))
        return tries

    def forget(self, name):
        if self.late:
            for notes in (self.items, self.held_back, self.unfit):
                notes.pop(to_text(name), None)
            self.late.discard(to_text(name))

    def must_wait(self, name, now):
        """Whether the item's own back-off still runs (a poison file must not heat the loop)."""
        if not self.late:
            return False
        name = to_text(name)
        entry = self.items.get(name)
        tries, last = (entry['count'], entry['last']) if entry else self.held_back.get(name, (0, 0))
        return tries > 0 and 0 <= now - last < backoff(self.stream, tries)

    TOLD_AFTER = 3600           # seconds

    def to_tell(self, age):
        """[(name, entry)] of those that fail for long and that nobody has heard of; now somebody does."""
        new = [(name, entry) for name, entry in sorted(self.items.items())
               if not entry.get('told') and age(entry['first']) >= self.TOLD_AFTER]
        for _, entry in new:
            entry['told'] = True
        return new

    def hopeless(self, name, age):
        """Whether an item has failed so often, and for so long, that it goes into quarantine.
        age: tells how long ago a moment of the wall clock was, see Ages."""
        entry = self.items.get(to_text(name))
        return entry is not None and entry['count'] >= self.stream.retry_count and \
            age(entry['first']) >= self.stream.quarantine_after

    def save(self):
        self.shared.update(self.stream.name, self.items)


class Waits:
    """Names that could not be sent yet, why, and since when: nothing waits unseen for ever.

    Kept in waiting.json, for cron starts a new process each time.  Time under a stop file or
    outside of the transfer window is left out.
    """

    MOST = 1000                         # names; what is beyond is only counted
    SAVE_EVERY = 60                     # seconds, in a daemon
    TELL_EVERY = 86400                  # seconds between two alerts while something waits

    def __init__(self, shared, stream):
        self.shared, self.stream = shared, stream
        known = shared.read().get(stream.name, {})
        self.held, self.told = (value if isinstance(value, (int, float)) else None
                                for value in (known.get('held'), known.get('told')))
        names = known.get('names')
        self.names = {name: entry for name, entry in names.items() if isinstance(entry, dict) and
                      isinstance(entry.get('since'), (int, float))} if isinstance(names, dict) else {}
        self.saved_at, self.saved = 0, self.content()

    def content(self):
        return dict(names={name: dict(entry) for name, entry in self.names.items()},
                    held=self.held, told=self.told)

    def update(self, reasons, now, age):
        """reasons: {name: why it waits} of a whole pass at the wall clock's time `now`."""
        pause = 0 if self.held is None else max(0, age(self.held))
        self.held = None
        before, self.names = self.names, {}
        for name in [n for n in before if n in reasons] + [n for n in reasons if n not in before]:
            entry = before.get(name) or dict(since=now - pause)
            self.names[name] = dict(entry, why=reasons[name], since=entry['since'] + pause)
            if len(self.names) == self.MOST:
                break

    def hold(self, now):
        """The stream is suspended from now on."""
        if self.held is None:
            self.held = now

    def oldest(self):
        """The time since when something waits, or None."""
        return min((entry['since'] for entry in self.names.values()), default=None)

    def to_tell(self, now, age, limit):
        """Names that wait for longer than `limit` seconds and that somebody should hear of now."""
        old = [name for name, entry in self.names.items() if limit and age(entry['since']) >= limit]
        new = [name for name in old if not self.names[name].get('told')]
        if not new or len(new) < len(old) and self.told is not None and age(self.told) < self.TELL_EVERY:
            return []
        for name in new:
            self.names[name]['told'] = True
        self.told = now
        return sorted(new)

    def save(self, at_once):
        """Raises StateError."""
        content = self.content()
        if content != self.saved and (at_once or time.monotonic() - self.saved_at > self.SAVE_EVERY):
            self.saved_at, self.saved = time.monotonic(), content
            self.shared.update(self.stream.name, content)


class Spent:
    """Ready files whose item was delivered and that are still here: they say nothing of a later
    item of that name.  Kept in spent.json, on disk before the item is released.

    A ready file is known by device, inode, size, mtime and ctime; without the ctime from before a
    release of ours, which changes it and may be cut short, until the end of a pass.  While the item is
    the one that was delivered, its ready file counts.
    """

    STEADY = 4                          # of the marks, those that no release changes

    def __init__(self, shared, stream):
        self.shared, self.stream = shared, stream
        self.records = {path: record for path, record in shared.read().get(stream.name, {}).items()
                        if isinstance(record, dict) and {'item', 'mtime_ns'} <= set(record) and
                        isinstance(record.get('ready'), list) and len(record['ready']) >= self.STEADY}
        self.saved = True

    @staticmethod
    def marks(entry):
        return [entry.dev, entry.ino, entry.size, entry.mtime_ns, entry.ctime_ns]

    def add(self, item, ready):
        self.records[to_text(ready.path)] = dict(
            ready=self.marks(ready)[:self.STEADY], item=item.essence, mtime_ns=item.mtime_ns)
        self.saved = False

    def loosen(self, records):
        """Before the files of these are released.  Raises StateError."""
        for record in records:
            if len(record['ready']) > self.STEADY:
                del record['ready'][self.STEADY:]
                self.saved = False
        self.save(durable=True)

    def tighten(self, root):
        """At the end of a pass."""
        for path, record in self.records.items():
            if len(record['ready']) == self.STEADY:
                with contextlib.suppress(OSError):
                    info = os.lstat(os.path.join(root, to_bytes(path)))
                    if record['ready'] == [info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns]:
                        record['ready'].append(info.st_ctime_ns)
                        self.saved = False

    def record(self, ready):
        """What is known of a ready file (an Entry) that did its work, or None."""
        known = self.records and self.records.get(to_text(ready.path))
        return known if known and known['ready'] == self.marks(ready)[:len(known['ready'])] else None

    def covers(self, item, ready):
        """Whether the item's ready or check file belongs to another one, which went."""
        known = self.record(ready)
        return known is not None and known['item'] != item.essence

    def forget(self, path):
        if self.records and self.records.pop(to_text(path), None):
            self.saved = False

    def forget_gone(self, root):
        for path in list(self.records):
            if not os.path.lexists(os.path.join(root, to_bytes(path))):
                self.forget(path)

    def save(self, durable=False):
        """Raises StateError."""
        if not self.saved:
            self.shared.update(self.stream.name, self.records or None, durable)
            self.saved = True


def target_of(stream, dates=True):
    """user@host:dir for the ledger and for people; never a password."""
    directory = stream.target_base
    if dates and stream.target_dates:
        directory = directory.rstrip('/') + '/' + stream.target_dates
    if not stream.target_host:
        return directory
    return '%s%s:%s' % (stream.username + '@' if stream.username else '', stream.target_host, directory)


def own_content(path):
    """The bytes of a file of ours, none if it is missing.  Raises StateError."""
    with own_files('cannot read %s' % show(path)), \
            contextlib.suppress(FileNotFoundError), open(path, 'rb') as handle:
        return handle.read()
    return b''


def read_names(path, root):
    """The names in a file of ours that exist below root, as a set.  Raises StateError."""
    return {name for name in own_content(path).split(b'\0')
            if name and os.path.lexists(os.path.join(root, name))}


def write_names(path, names):
    """Keep names in such a file, on the disk; no file for none.  Raises StateError."""
    with own_files('cannot write %s' % show(path)):
        if names:
            atomic_write(path, b''.join(name + b'\0' for name in names), True)
        elif os.path.lexists(path):
            os.unlink(path)


class Unsummed:
    """Items of a mirror whose checksum files may be missing at the target, or old: a pass that was
    broken off had sent the item and not its sum, and the next one finds nothing to send.  On disk from
    before an item is sent until its sum is proven."""

    def __init__(self, stream):
        self.path = stream.unsummed
        self.names = read_names(self.path, stream.root)     # of what broke off
        self.begun = set()              # under way
        self.lock = threading.Lock()    # one batch is recorded while the next is sent

    def begin(self, names):
        with self.lock:
            self.begun |= names
            self.save()

    def end(self, done, failed):
        with self.lock:
            self.names = (self.names | failed) - done
            self.begun -= done | failed
            self.save()

    def break_off(self):
        """Nothing is under way any more."""
        self.names |= self.begun
        self.begun = set()

    def save(self):
        write_names(self.path, self.names | self.begun)


class Taken:
    """Files that a mirror sent and that a reader took from the target as soon as they were proven: they
    are not sent again while they are what they were.  A digest of each is on disk once the ledger tells
    of it; beyond MOST the oldest are forgotten, and sent once more."""

    MOST = 100000
    SIZE = 20                           # bytes of a digest

    def __init__(self, stream):
        self.path, self.target = stream.taken, target_of(stream)
        content = own_content(self.path)
        self.marks = collections.OrderedDict.fromkeys(
            content[at:at + self.SIZE] for at in range(0, len(content), self.SIZE))

    def mark(self, entry):
        import hashlib
        return hashlib.sha1(repr((self.target, entry.path, entry.size, entry.mtime_ns)).encode()).digest()

    def __contains__(self, entry):
        return bool(self.marks) and self.mark(entry) in self.marks

    def add(self, entries):
        """Raises StateError."""
        if not entries:
            return
        self.marks.update((self.mark(entry), None) for entry in entries)
        while len(self.marks) > self.MOST:
            self.marks.popitem(last=False)
        with own_files('cannot write %s' % show(self.path)):
            atomic_write(self.path, b''.join(self.marks), True)


# The states of a stream, as status.json, --status and the page show them.  mood: good, wait (a
# person may want to know) or bad (a person should look); ends_once, ends_daemon: whether a process
# that ends in it ended as it should, and did not die.
StreamState = collections.namedtuple('StreamState', 'mood ends_once ends_daemon')
STATES = {
    'starting': StreamState('good', False, False),
    'scanning': StreamState('good', False, False),
    'connecting': StreamState('good', False, False),
    'transferring': StreamState('good', False, False),
    'settling': StreamState('good', False, False),       # a pass is over, something is too fresh
    'idle': StreamState('good', False, False),           # a daemon has nothing to do
    'done': StreamState('good', True, False),            # --once has done what was due
    'stopped': StreamState('wait', True, False),         # a stop file, a closed window
    'down': StreamState('bad', True, False),             # the target or this machine is in trouble
    'ended': StreamState('wait', True, True),            # on request
    'never run': StreamState('wait', True, True),        # status.json knows nothing of it
    'died': StreamState('bad', True, True),              # found out by who looks: see died()
}


def mood(state):
    return STATES[state].mood


class Progress:
    """What one stream is doing: the numbers behind the progress line and --status."""

    def __init__(self, stream, shared):
        self.stream = stream
        self.shared = shared
        self.state = 'starting'
        self.note = ''
        self.total_items = self.total_bytes = 0     # of this pass
        self.done_items = self.done_bytes = 0
        self.sent_bytes = 0                         # pushed, perhaps not yet proven
        self.started = time.monotonic()
        self.looks = collections.deque(maxlen=100)  # (monotonic time, bytes sent) when line() was asked
        self.oldest_ns = None                       # mtime of the oldest item that waits
        self.next_try = None                        # epoch seconds
        self.daemon = False                         # whether it goes on until it is stopped
        self.last = shared.read().get(stream.name, {})
        self.saved = 0
        self.looked = False                         # whether these numbers are known

    def begin(self, items, size, oldest_ns):
        self.looked = True
        self.total_items, self.total_bytes, self.oldest_ns = items, size, oldest_ns
        self.done_items = self.done_bytes = self.sent_bytes = 0
        self.started = time.monotonic()
        self.looks.clear()

    def more(self, items):
        """These are due as well.  Not while a part of a batch is being released."""
        self.total_items += len(items)
        self.total_bytes += sum(item.size for item in items)

    def fewer(self, items):
        """These counted as due, and nothing is to be sent."""
        self.total_items -= len(items)
        self.total_bytes -= sum(item.size for item in items)

    def sent(self, count):
        self.sent_bytes += count

    def enter(self, state, note='', save=True, pause=None):
        """pause: seconds until the next try."""
        changed = (state, note) != (self.state, self.note)
        self.next_try = pause and time.time() + pause
        self.state, self.note = state, note
        if save and (changed or time.monotonic() - self.saved > 30):
            self.save()

    def delivered(self, items, size):
        self.done_items += items
        self.done_bytes += size
        self.last['last_delivery'] = utc_stamp()
        self.last['delivered_items'] = self.last.get('delivered_items', 0) + items
        self.last['delivered_bytes'] = self.last.get('delivered_bytes', 0) + size
        if time.monotonic() - self.saved > 1:
            self.save()

    def failed(self, message):
        self.last['last_error'] = message
        self.last['last_error_time'] = utc_stamp()

    def recovered(self):
        """A whole pass went well: what was wrong before is history, for the log to tell."""
        self.last.pop('last_error', None)
        self.last.pop('last_error_time', None)

    def save(self):
        self.saved = time.monotonic()
        self.last.update(
            state=self.state, note=self.note, updated=utc_stamp(), pid=os.getpid(), daemon=self.daemon,
            directory=to_text(self.stream.directory), mode=self.stream.transfer_mode,
            protocol=self.stream.transfer_protocol, target=target_of(self.stream),
            next_try=self.next_try and utc_stamp(self.next_try))
        if self.looked:
            self.last.update(
                waiting_items=max(0, self.total_items - self.done_items),
                waiting_bytes=max(0, self.total_bytes - self.done_bytes),
                oldest=utc_stamp(min(max(0, self.oldest_ns / 1e9), LAST_SECOND)) if self.oldest_ns and
                self.done_items < self.total_items else None)
        if self.done_bytes:
            self.last['rate'] = round(self.done_bytes / max(0.001, time.monotonic() - self.started))
        try:
            self.shared.update(self.stream.name, dict(self.last))
        except StateError as error:
            log.once(str(error))

    def line(self, now=None):
        """For a terminal: per cent, items, bytes, rate and time left by what went of late."""
        now = time.monotonic() if now is None else now
        size = min(max(self.sent_bytes, self.done_bytes), self.total_bytes)
        self.looks.append((now, size))
        since, before = self.looks[0]
        rate = (size - before) / (now - since) if now - since > 1 else 0
        return '%s: %d %%, %d/%d items, %s of %s%s' % (
            self.stream.name, 100 * size // max(1, self.total_bytes), self.done_items, self.total_items,
            format_size(size), format_size(self.total_bytes), ', %s/s, %s left' % (
                format_size(rate), format_duration((self.total_bytes - size) / rate)) if rate else '')


# ----------------------------------------------------------------------------------------
# 10  alerts
# ----------------------------------------------------------------------------------------

@contextlib.contextmanager
def mail_server(settings):
    """An smtplib.SMTP that is logged in (RFC 5321, with STARTTLS (RFC 3207) or TLS).  Raises
    OSError; settings: of [email]."""
    import smtplib
    import ssl
    options = {'context': ssl.create_default_context()} if settings.tls == 'tls' else {}
    with (smtplib.SMTP_SSL if options else smtplib.SMTP)(
            settings.smarthost, settings.port, timeout=20, **options) as server:
        if settings.tls == 'starttls':
            server.starttls(context=ssl.create_default_context())
        if settings.username:
            server.login(settings.username, settings.password or '')
        yield server


class Alerts:
    """What people should hear of, by mail and by alert_command; kept in alerts.json until sent.

    The first goes at once; what follows within digest_time goes together, so that a flood is
    one mail.  Nothing here raises: a mail server that is down disturbs no transfer.
    """

    LEVELS = ('info', 'warning', 'error')
    KEPT = 1000                         # alerts that wait at most; older ones give way
    RETRY = 60                          # seconds until a channel that failed is tried again
    PATIENCE = 90                       # seconds that the end of a single run waits for them

    def __init__(self, state_dir, config):
        self.shared = SharedJson(state_dir, 'alerts.json', (bool, str, list))
        self.lock = threading.Lock()    # guards what follows
        self.stop = StopRequest()       # ends an alert_command
        self.key = 'pending:%d' % os.getpid()
        known = self.shared.read()
        self.states = {key: value for key, value in known.items() if not key.startswith('pending:')}
        left = {key: value for key, value in known.items() if key.startswith('pending:') and
                isinstance(value, list) and (key == self.key or not alive(key[8:]))}
        self.pending = [alert for alerts in left.values() for alert in alerts if isinstance(alert, dict) and
                        {'time', 'level', 'text', 'left'} <= set(alert)]
        self.save(self.key, self.pending or None)       # ours, before they are taken from who is gone
        for key in set(left) - {self.key}:
            self.save(key, None)
        self.next_at = {}               # channel -> monotonic time before which nothing is sent
        self.failing = set()            # channels that failed when they were tried last
        self.configure(config)

    def configure(self, config):
        self.email, self.command = config.email, config.settings.alert_command

    def channels(self):
        return [(name, send) for name, wanted, send in (
            ('mail', self.email.smarthost, self.send_mail),
            ('command', self.command, self.run_command)) if wanted]

    def save(self, key, value):
        try:
            self.shared.update(key, value)
        except StateError as error:
            log.once(str(error))

    def tell(self, level, text, always=False):
        """Something happened; always: whatever the threshold.  Whether anybody will hear of it."""
        left = [name for name, _ in self.channels()]
        if left and (always or self.LEVELS.index(level) >= self.LEVELS.index(self.email.threshold)):
            with self.lock:
                self.pending = self.pending[1 - self.KEPT:] + [
                    dict(time=utc_stamp(), level=level, text=show(text), left=left)]
                self.save(self.key, self.pending or None)
            return True
        return False

    UNTOLD = 'bad, and nobody heard of it'

    def turn(self, key, bad, level, text):
        """Something is bad or good: an alert when it changes, across runs, not while it lasts.  Who did
        not hear that it was bad does not hear that it is good."""
        before = self.states.get(key)
        if bool(before) == bad:
            return
        state = bad
        if before != self.UNTOLD and not self.tell(level, text) and bad:
            state = self.UNTOLD
        with self.lock:
            self.states[key] = state
            self.save(key, state)

    def compose(self, alerts):
        """(subject, body) of one message about some alerts."""
        import socket
        worst = max(alerts, key=lambda alert: self.LEVELS.index(alert['level']))
        subject = worst['text'] if len(alerts) == 1 else '%d alerts, %d of them errors; one is: %s' % (
            len(alerts), sum(a['level'] == 'error' for a in alerts), worst['text'])
        lines = ['%(time)s  %(level)-7s  %(text)s' % alert for alert in alerts]
        host = socket.gethostname()
        return ' '.join(('%s on %s: %s' % (self.email.subject, host, subject[:150])).split()), \
            '\n'.join(lines + ['', 'What every stream is doing now: mistamover.py --status on %s.' % host,
                               'Why a file is still there: mistamover.py --explain PATH', ''])

    def send_due(self, force=False):
        """Send what waits, unless the last message is younger than digest_time; the names of
        the channels that failed."""
        with self.lock:
            waiting = list(self.pending)
        tried = False
        for name, send in self.channels():
            mine = [alert for alert in waiting if name in alert['left']]
            if not mine or not force and time.monotonic() < self.next_at.get(name, 0):
                continue
            tried, self.next_at[name] = True, time.monotonic() + self.email.digest_time
            try:
                send(*self.compose(mine))
                self.sent(name, mine)
            except Exception as error:      # what smtplib and email raise is a long list
                self.next_at[name] = time.monotonic() + max(1, min(self.RETRY, self.email.digest_time))
                if name not in self.failing:
                    log.error('alerts wait: %s: %s' % (
                        name, re.sub(r'\[Errno -?\d+\] ', '', str(error)) or repr(error)))
                self.failing.add(name)
        if not tried:
            return set()
        with self.lock:
            configured = {name for name, _ in self.channels()}
            self.pending = [a for a in self.pending if configured.intersection(a['left'])]
            self.save(self.key, self.pending or None)
        return self.failing & configured

    def sent(self, name, alerts):
        for alert in alerts:
            alert['left'].remove(name)
        self.failing.discard(name)

    def send_mail(self, subject, body):
        """Raises OSError, ValueError."""
        import email.message
        import email.utils
        settings = self.email
        message = email.message.EmailMessage()
        message['From'], message['To'] = settings.sender, ', '.join(settings.recipient)
        message['Subject'], message['Date'] = subject, email.utils.localtime()
        message['Message-ID'] = email.utils.make_msgid()
        message['Auto-Submitted'] = 'auto-generated'        # RFC 3834: no answering machine answers
        message.set_content(body)
        with mail_server(settings) as server:
            server.send_message(message)

    def run_command(self, subject, body):
        over = time.monotonic() + self.PATIENCE
        stop = StopRequest()

        def look(_piece):
            if time.monotonic() > over:
                stop.request()          # it talks, but does not end
        with self.stop.on_stop(stop.request):
            done = run(self.command, stop, 60, ('%s\n\n%s' % (subject, body)).encode(), look)
        if done.code:
            raise MoverError('%s ended with %d: %s' % (
                show(self.command[0]), done.code, done.errors or SILENT))


class State:
    """What the streams of one process share: the state directory and what is kept in it."""

    def __init__(self, directory, config):
        self.directory = directory
        self.ledger = Ledger(directory)
        self.status = SharedJson(directory, 'status.json')
        self.failures = SharedJson(directory, 'failures.json')
        self.spent = SharedJson(directory, 'spent.json')
        self.staying = SharedJson(directory, 'staying.json')
        self.waiting = SharedJson(directory, 'waiting.json')
        self.ages = Ages(directory)
        self.alerts = Alerts(directory, config)


# ----------------------------------------------------------------------------------------
# 11  scanning and settling
# ----------------------------------------------------------------------------------------

KINDS = {stat.S_IFREG: 'f', stat.S_IFDIR: 'd', stat.S_IFLNK: 'l'}


class Entry(collections.namedtuple('Entry', 'path kind size mtime_ns ctime_ns dev ino mode')):
    """What one file ('f'), directory ('d') or symlink ('l') looked like; path is relative, bytes."""

    __slots__ = ()

    @classmethod
    def of(cls, path, info):
        mode = info.st_mode
        kind = KINDS.get(stat.S_IFMT(mode), '?')
        return cls(path, kind, info.st_size if kind == 'f' else 0, info.st_mtime_ns,
                   info.st_ctime_ns, info.st_dev, info.st_ino, mode & 0o7777)

    @property
    def identity(self):
        return self.dev, self.ino, self.size, self.mtime_ns, self.ctime_ns

    def looks_like(self, info):
        return self.size == info.st_size and self.mtime_ns == info.st_mtime_ns

    def is_at(self, info):
        """Whether this is the same file, whatever its ctime: a link that we make changes that."""
        return self.ino == info.st_ino and self.dev == info.st_dev and self.looks_like(info)

    def same_as(self, info):
        return self.identity == (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns,
                                 info.st_ctime_ns)


def tree_of(entries):
    """What must be equal for a zip to be as good as a tree: every file, and which directories.
    Directories' own times are left out: they change when a release empties them."""
    return [(e.path, e.kind) + (e.identity if e.kind == 'f' else ()) for e in entries]


def essence(entries):
    """What tells the content of files: a link that we made and removed again changes a ctime."""
    return [e[:4] + (e.dev, e.ino) for e in entries if e.kind == 'f']


class Item:
    """A top-level entry (or, with items = files, any file): its name and its snapshot."""

    __slots__ = ('name', 'entries', 'left', 'fault', 'ready', 'check', 'last', 'is_directory', 'size')

    def __init__(self, name, entries, left=(), fault=None):
        self.name = name
        self.entries = entries          # of a directory: itself first, each before its content
        self.left = left                # names in it that are never sent, with the reason
        self.fault = fault              # why it could not be looked at
        self.ready = None               # the Entry of its ready file
        self.check = None               # the Entry of its check file
        self.last = None                # the Entry of the marker inside of it, which goes last
        self.is_directory = entries[0].kind == 'd'
        self.size = sum(e.size for e in entries) if self.is_directory else entries[0].size

    @property
    def label(self):
        """What the log and the ledger call it."""
        return self.name

    @property
    def files(self):
        return [e for e in self.entries if e.kind == 'f']

    @property
    def mtime_ns(self):
        """Of its newest file, or its own."""
        return max(e.mtime_ns for e in self.files or self.entries) if self.is_directory else \
            self.entries[0].mtime_ns

    @property
    def youngest_ns(self):
        return max(max(e.mtime_ns, e.ctime_ns) for e in self.entries) if self.is_directory else \
            max(self.entries[0].mtime_ns, self.entries[0].ctime_ns)

    @property
    def snapshot(self):
        """A digest of the files' identities that another process can compare."""
        import hashlib
        return hashlib.sha1(repr(tree_of(self.entries)).encode()).hexdigest()

    @property
    def essence(self):
        """Of its files, what another process can compare and no release of ours changes."""
        import hashlib
        return hashlib.sha1(repr(essence(self.entries)).encode()).hexdigest()

    @property
    def fingerprint(self):
        return hash((self.name, tuple((e.path, e.kind, e.identity) for e in self.entries)))


class Marker(Item):
    """What goes last of a directory, whose name it has."""

    __slots__ = ()

    @property
    def label(self):
        return self.entries[-1].path


def compile_globs(patterns):
    """A match function over bytes names for a list of shell globs; None for an empty list."""
    import fnmatch
    if not patterns:
        return None
    translated = (fnmatch.translate(to_bytes(p).decode('latin-1')).encode('latin-1')
                  for p in patterns)
    return re.compile(b'|'.join(b'(?:%s)' % t for t in translated)).match


def mounts():
    """What is mounted, as bytes for file_system_type(); b'' where nobody can tell."""
    with contextlib.suppress(OSError), open('/proc/self/mountinfo', 'rb') as table:
        return table.read()
    return b''


def file_system(device, table):
    """(type, source) of a mounted file system, by its st_dev, as mounts() has it (proc(5),
    mountinfo), or (None, b'')."""
    number = b'%d:%d' % (os.major(device), os.minor(device))
    for words in map(bytes.split, table.splitlines()):
        if words[2] == number:
            return tuple(words[words.index(b'-') + 1:][:2])
    return None, b''


def file_system_type(device, table):
    return file_system(device, table)[0]


class Watch:
    """Tells whether anything happened in some directories since they were added (inotify(7)), so
    that an idle daemon need not scan them, and scans at once when something did.

    Where nobody can tell, it says yes: outside Linux, on a file system that others change as
    well, when there are many directories or the kernel has no watch left, or when something
    was mounted there.  What makes no event (a mapping, another hard link) is seen by the scan that
    comes every LOOK_ANYWAY seconds.  For one thread.
    """

    # IN_MODIFY, ATTRIB, CLOSE_WRITE, MOVED_FROM, MOVED_TO, CREATE, DELETE, DELETE_SELF,
    # MOVE_SELF, ONLYDIR
    MODIFY = 0x2
    EVENTS = MODIFY | 0x4 | 0x8 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800 | 0x1000000
    LOCAL = (b'ext2', b'ext3', b'ext4', b'f2fs', b'jfs', b'tmpfs', b'xfs', b'zfs')
    MOST = 1000                 # directories: other programs need watches, too

    def __init__(self, root):
        self.root = root
        self.added = set()          # directories
        self.local = {}             # st_dev -> whether nobody else changes that file system
        self.fd = None
        self.place, self.mounts = self.look(), mounts()
        if sys.platform.startswith('linux'):
            with contextlib.suppress(ImportError, OSError, AttributeError):
                import ctypes
                self.libc = ctypes.CDLL(None)
                fd = self.libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
                self.fd = fd if fd >= 0 else None

    def look(self):
        """Which directory has the name now: it may have been replaced."""
        with contextlib.suppress(OSError):
            info = os.stat(self.root)
            return info.st_dev, info.st_ino
        return None

    def add(self, path):
        """To be called before the directory, or anything in it, is looked at."""
        if self.fd is None or path in self.added:
            return
        self.added.add(path)
        if len(self.added) > self.MOST or not self.is_local(path) or \
                self.libc.inotify_add_watch(self.fd, path, self.EVENTS) < 0:
            self.close()

    def is_local(self, path):
        try:
            device = os.stat(path).st_dev
        except OSError:
            return False
        if device not in self.local:
            self.local[device] = file_system_type(device, self.mounts) in self.LOCAL
        return self.local[device]

    def stirred(self):
        """Whether anything happened that was not our own doing, or nobody can tell: 'written' if
        files were only written to, else 'changed'; None if nothing did."""
        if self.fd is None or self.look() != self.place or self.remounted():
            return 'changed'
        happened = None
        while True:
            try:
                events = os.read(self.fd, 1 << 16)
            except BlockingIOError:
                return happened
            while events:       # int wd; uint32_t mask, cookie, len; char name[len]
                mask = int.from_bytes(events[4:8], sys.byteorder)
                end = 16 + int.from_bytes(events[12:16], sys.byteorder)
                if not events[16:end].startswith(OWN_PREFIX):   # nor is it if it has no name
                    if mask & ~self.MODIFY:
                        return 'changed'
                    happened = 'written'
                events = events[end:]

    def remounted(self):
        """Whether something was mounted or unmounted above, at or below one of the directories;
        what others mount elsewhere is their own business."""
        before, self.mounts = self.mounts, mounts()
        return before != self.mounts and self.near(before) != self.near(self.mounts)

    def near(self, table):
        """{(device, mount point)} of what concerns one of the directories."""
        places = [os.path.join(os.path.realpath(path), b'') for path in self.added | {self.root}]
        found = set()
        for words in map(bytes.split, table.splitlines()):
            point = re.sub(rb'\\([0-7]{3})', lambda m: bytes([int(m.group(1), 8)]), words[4])
            below = os.path.join(point, b'')
            if any(place.startswith(below) or below.startswith(place) for place in places):
                found.add((words[2], point))
        return found

    def close(self):
        if self.fd is not None:
            fd, self.fd = self.fd, None     # while it closes, the number is free for others
            os.close(fd)


class Scanner:
    """Looks at a stream's incoming directory; os.scandir, no symlink ever followed."""

    def __init__(self, stream, stop):
        self.stream = stream
        self.stop = stop
        self.watch = None           # the Watch to which a scan adds every directory it reads
        self.root = os.path.join(stream.root, b'')
        self.ignored = compile_globs(stream.ignore)
        self.wanted = compile_globs(stream.only) or (lambda name: True)
        self.follow_links = stream.symlinks == 'keep'
        self.own = {to_bytes(stream.stop_file), KEPT_DIR}
        quarantine = to_bytes(stream.quarantine_dir)
        if same_directory(os.path.dirname(quarantine), stream.root):
            self.own.add(os.path.basename(quarantine))
        self.orphans = []           # ready files without their item, or of one that went
        self.lonely, self.shared = [], []       # check files without their item; those for several
        self.spent = None           # the Spent of a Worker
        self.staying = {}           # emptied directories that something keeps -> what, in the last scan
        self.unready = 0            # items without their ready file, in the last scan
        self.lacking = []           # the names of some of them
        self.passed = 0             # see passes(), in the last scan
        self.checks = None          # the CheckFiles of the stream
        self.ready_pattern = self.marker = None
        if stream.ready_file and stream.ready_file.startswith('{name}/'):
            self.marker = to_bytes(stream.ready_file)[7:]
        elif stream.ready_file:
            before, after = to_bytes(stream.ready_file).split(b'{name}', 1)
            self.ready_pattern = before, after

    def skip(self, name, top):
        return bool(self.ignored and self.ignored(name)) or name.startswith(OWN_PREFIX) or \
            top and (name in self.own or name in SYSTEM_NAMES)

    def passes(self, name, top):
        """Whether a name counts as one that matches `ignore`: those of our own do not."""
        return bool(self.ignored and self.ignored(name)) and not (
            name.startswith(OWN_PREFIX) or top and name in self.own)

    def listing(self, relative):
        """Yield (name, stat_result) of what a directory holds, with an OSError instead where that
        cannot be had; raises OSError."""
        if self.watch:
            self.watch.add(self.root + relative)
        with os.scandir(self.root + relative) as entries:
            for entry in entries:
                try:
                    # on Windows what scandir caches is stale while a file is open
                    yield entry.name, os.lstat(entry.path) if WINDOWS else \
                        entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                except OSError as error:        # a damaged inode, a stale handle: its own trouble
                    yield entry.name, error

    def lacks(self, path):
        """An item has no ready file, or one of another that went."""
        self.unready += 1
        if len(self.lacking) < Waits.MOST:
            self.lacking.append(path)

    def walk(self, relative, entries, left):
        """Append the entries below a directory to `entries`; raises OSError."""
        self.stop.check()
        for name, info in sorted(self.listing(relative), key=lambda pair: pair[0]):
            if self.skip(name, False) and not self.is_inside(os.path.join(relative, name)):
                left.append((os.path.join(relative, name), 'ignored'))
                continue
            if isinstance(info, OSError):
                raise info
            entry = Entry.of(os.path.join(relative, name), info)
            if entry.kind == 'f' or entry.kind == 'l' and self.follow_links:
                entries.append(entry)
            elif entry.kind == 'd':
                entries.append(entry)
                self.walk(entry.path, entries, left)
            else:
                left.append((entry.path, 'a symlink' if entry.kind == 'l' else 'a special file'))

    def item(self, name, info):
        """The Item of one entry, or None if it is nothing that is ever sent."""
        entry = Entry.of(name, info)
        if entry.kind == '?' or entry.kind == 'l' and not self.follow_links:
            log.once('%s is a %s and is left alone' % (     # by design: no mail from cron
                show(name), 'symlink' if entry.kind == 'l' else 'special file'), self.stream, 'info')
            return None
        entries, left, fault = [entry], [], None
        if entry.kind == 'd':
            try:
                self.walk(name, entries, left)
            except OSError as error:
                fault = ItemError('%s cannot be read: %s' % (
                    show(error.filename or name), error.strerror), 'check its permissions')
            except RecursionError:
                fault = ItemError('%s is nested too deep' % show(name))
        item = Item(name, entries, left or (), fault)
        if self.marker and not fault:
            item.last = next((e for e in entries if e.path == os.path.join(name, self.marker)), None)
            if item.last and not self.stream.zips:
                item.entries.remove(item.last)
                item.size -= item.last.size
        return item

    def is_inside(self, path):
        """Whether a path below an item is its marker or its check file, whatever `ignore` says."""
        below = path.partition(b'/')[2]
        return below and below in (self.marker, self.checks and self.checks.inside)

    def follow_check(self, path, info, top):
        """A check file is never an item.  One whose item went follows it."""
        entry = Entry.of(path, info)
        if self.checks.shared:
            self.shared.append(entry)
        elif entry.kind == 'f' and not os.path.lexists(self.root + self.checks.item_of(path)):
            self.lonely.append(entry)

    def complete(self, item):
        """Whether the item's marker and its check file are here, and are its own."""
        if self.marker and not item.last and not item.fault:
            return False
        if self.checks:
            item.check = self.checks.of(item.name)
            if not item.check:
                return False
            if self.spent and not (item.is_directory or self.checks.shared) and \
                    self.spent.covers(item, item.check):
                return False
        return True

    def flat(self, relative=b''):
        """items = files: every file below the directory as (relative path, stat_result)."""
        below = []
        for name, info in self.listing(relative):
            path = os.path.join(relative, name)
            if self.skip(name, not relative) and not (self.ready_pattern and self.is_ready_name(name)) \
                    and not (self.checks and self.checks.is_one(name)):
                self.passed += self.passes(name, not relative)
                continue
            if not isinstance(info, OSError) and stat.S_ISDIR(info.st_mode):
                below.append((path, info))      # later: an open directory a level would be too many
            else:
                yield path, info
        for path, info in below:
            try:
                yield from self.flat(path)
            except (OSError, RecursionError):
                yield path, info        # found() makes of it an item that cannot be read

    def look(self, name):
        """The Item of one name as it is now, or None."""
        try:
            return self.item(name, os.lstat(self.root + name))
        except OSError:
            return None

    def scan(self, watch=None):
        """Yield an Item for everything that could be sent; one at a time, for there may be a
        million.  Raises TargetError if the directory itself cannot be read (so that an
        unmounted disk is noticed)."""
        self.watch = watch
        try:
            with own_files('cannot read the directory %s' % show(self.stream.directory),
                           'look at its permissions and its mount'):
                yield from self.found()
        finally:
            self.watch = None       # looks at single names, in other threads, add nothing

    def found(self):
        found = self.flat() if self.stream.items == 'files' else self.listing(b'')
        self.staying, self.lacking, self.passed = {}, [], 0
        self.orphans, self.lonely, self.shared, self.unready = [], [], [], 0
        if self.spent:
            self.spent.forget_gone(self.root)
        ready = {}
        if self.ready_pattern:
            found = list(found)
            ready = self.match_ready(dict(found))
        top = self.stream.items == 'top'
        for path, info in found:
            self.stop.check()
            name = path if top else os.path.basename(path)
            if isinstance(info, OSError):
                if not self.skip(name, top) and self.wanted(name):
                    yield self.unreadable(path, ': %s' % info.strerror, 'is the file system damaged?')
                continue
            if not top and stat.S_ISDIR(info.st_mode):
                yield self.unreadable(path, '', 'check its permissions and its depth')
                continue
            if self.checks and self.checks.is_one(name):
                self.follow_check(path, info, top)
                continue
            if self.skip(name, top) or not self.wanted(name):
                self.passed += self.passes(name, top)
                continue
            if self.ready_pattern and path not in ready:
                if not self.is_ready_name(name):
                    self.lacks(path)
                continue
            item = self.item(path, info)
            for _, why in item.left if item else ():
                self.passed += why == 'ignored'
            if item is None or item.is_directory and self.stays(item):
                continue
            item.ready = ready.get(path)
            if (self.marker or self.checks) and not self.complete(item):
                self.lacks(path)
                continue
            if item.ready and self.spent and self.spent.covers(item, item.ready):
                self.orphans.append(item.ready)
                self.lacks(path)
                continue
            yield item

    @staticmethod
    def unreadable(path, why, hint):
        entry = Entry(path, '?', 0, 0, 0, 0, 0, 0)
        return Item(path, [entry], (), ItemError('%s cannot be read%s' % (show(path), why), hint))

    def everything(self):
        """Every relative path below the directory, ignored or not.  Raises OSError."""
        def refuse(error):
            raise error
        return {os.path.relpath(os.path.join(top, name), self.stream.root)
                for top, directories, files in os.walk(self.stream.root, onerror=refuse)
                for name in directories + files if not name.startswith(OWN_PREFIX)}

    def is_ready_name(self, name):
        before, after = self.ready_pattern
        return name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after)

    def match_ready(self, found):
        """{path of an item: the Entry of its ready file}; lonely ready files go to self.orphans:
        a crash came between the release of the item and theirs, or they came too early."""
        before, after = self.ready_pattern
        complete = {}
        for path, info in found.items():
            head, name = os.path.split(path)
            if not self.is_ready_name(name) or isinstance(info, OSError) or not stat.S_ISREG(info.st_mode):
                continue
            item = os.path.join(head, name[len(before):len(name) - len(after)])
            if item in found:
                complete[item] = Entry.of(path, info)
            else:
                self.orphans.append(Entry.of(path, info))
        return complete

    def stays(self, item):
        """A directory without files that must stay: there is nothing to send, now or ever."""
        if item.fault or item.last or any(e.kind != 'd' for e in item.entries):
            return False
        if item.left and self.stream.move:
            self.staying[to_text(item.name)] = '%s in it is %s' % (show(item.left[0][0]), item.left[0][1])
            return True
        return self.stream.move and not self.stream.remove_directories


def is_monitors(path):
    """Whether a stop file is one that the disk space monitor made.  Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_NONBLOCK', 0))
    except PermissionError:
        return False
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            return False
        raise
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode) and MONITOR_LINE in os.read(fd, 4096)
    finally:
        os.close(fd)


def stop_file_here(stream):
    """Whether somebody's stop file suspends the stream.  The disk space monitor's is for those
    who deliver into the directory, not for us who empty it.  Raises OSError."""
    path = os.path.join(stream.root, to_bytes(stream.stop_file))
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode) or not is_monitors(path)
    except FileNotFoundError:
        return False


def directory_clock(stream):
    """The time in ns by the clock of the incoming directory's file system, or None.

    A share has its own clock, so a file is touched there and its mtime read.
    """
    path = os.path.join(stream.root, CLOCK_NAME + b'%d' % os.getpid())
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            return os.lstat(path).st_mtime_ns
        finally:
            os.unlink(path)
    except OSError:
        return None


class Settler:
    """Tells which items have been left in peace for settle_time seconds.

    By age, where the directory's clock can be read and has not jumped; else by two looks
    at the same snapshot, settle_time of monotonic time apart.
    """

    def __init__(self, settle_time):
        self.settle_time = settle_time
        self.seen = {}              # name -> (fingerprint, monotonic time of the first look)
        self.previous = {}
        self.clock_ns = None
        self.read_at = None
        self.distrust_until = 0

    def begin(self, clock_ns, monotonic):
        """A new scan begins; clock_ns as by directory_clock()."""
        if clock_ns is not None and self.clock_ns is not None:
            drift = (clock_ns - self.clock_ns) / 1e9 - (monotonic - self.read_at)
            if abs(drift) > CLOCK_TOLERANCE:
                log.warning('the clock jumped by %+.0f s; ages are not trusted for a while' % drift)
                self.distrust_until = monotonic + self.settle_time
        self.clock_ns, self.read_at = clock_ns, monotonic
        self.previous, self.seen = self.seen, {}

    def settled(self, item, monotonic):
        if self.clock_ns is not None and monotonic >= self.distrust_until:
            if self.clock_ns - item.youngest_ns >= self.settle_time * 1e9:
                return True
        fingerprint = item.fingerprint
        known = self.seen.get(item.name) or self.previous.get(item.name)
        if known is None or known[0] != fingerprint:
            known = fingerprint, monotonic
        self.seen[item.name] = known
        return monotonic - known[1] >= self.settle_time


CARE = getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_BINARY', 0) | getattr(os, 'O_CLOEXEC', 0)
OPEN_FLAGS = os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | CARE
CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | CARE


def open_entry(root, entry, any_ctime=False):
    """Open a file of a snapshot for reading, if it still is that file.

    Neither a symlink nor a FIFO put in its place is followed or waited for.  any_ctime: it may
    have another one, for a link that we made and removed again.  Returns a descriptor; raises
    Changed, ItemError.
    """
    try:
        fd = os.open(root + b'/' + entry.path, OPEN_FLAGS)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise Changed('%s is gone' % show(entry.path))
        if error.errno == errno.EAGAIN:
            raise Changed('%s is in use' % show(entry.path))
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise StateError('cannot open %s: %s' % (show(entry.path), error.strerror))
        raise ItemError('%s cannot be read: %s' % (show(entry.path), error.strerror),
                        'check its permissions')
    if not (entry.is_at if any_ctime else entry.same_as)(os.fstat(fd)):
        os.close(fd)
        raise Changed('%s has changed' % show(entry.path))
    return fd


@contextlib.contextmanager
def marked(directory):
    """The name of an empty file that is in a directory for a moment.  Raises OSError."""
    marker = HERE_NAME + b'%d-%s' % (os.getpid(), random_hex(4))
    path = os.path.join(directory, marker)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    try:
        yield marker
    finally:
        os.unlink(path)


def lease(fd):
    """Take a read lease, which ends when the descriptor is closed (fcntl(2), F_SETLEASE): None,
    or the errno of the refusal."""
    try:
        import fcntl
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        return None
    except OSError as error:
        return error.errno
    except (ImportError, AttributeError):
        return errno.ENOSYS


def lease_broken(fd):
    """Whether somebody wants to write what a lease was taken on, and waits until it ends."""
    import fcntl
    return fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK


class Leases:
    """Tells whether somebody has a file of the incoming directory open for writing, as far as
    read leases can.

    EAGAIN means that there is a writer, unless a file of our own that nobody writes gets it
    as well (NFSv4 without a delegation, cifs without an oplock).  EACCES: the file belongs to
    another account and we lack CAP_LEASE.  Anything else: there are no leases here.  Where
    they cannot tell, one warning says so.
    """

    HINTS = {errno.EACCES: 'run this program under the account that owns the files or give it '
                           'CAP_LEASE; else set ready_file or a longer settle_time'}
    HINT = 'set ready_file, or a settle_time longer than any pause of a writer'

    def __init__(self, stream):
        self.stream = stream
        self.own = self.tried = None        # the errno for a file of our own; when it was asked
        self.lock = threading.Lock()        # guards these two

    def take(self, fd):
        """True: the descriptor holds a lease until it is closed; False: somebody has the file
        open for writing; None: that cannot be asked here."""
        refused = lease(fd)
        if not refused:
            return True
        if refused == errno.EAGAIN and self.of_our_own() != errno.EAGAIN:
            return False
        log.once(self.sentence(refused), self.stream)
        return None

    def open_quiet(self, root, entry, briefly=False):
        """Open a file that nobody is writing now.  briefly: it is closed at once, and with it its
        lease ends.  Raises Changed, ItemError."""
        fd = open_entry(root, entry)
        taken = self.take(fd)
        if taken is False:
            os.close(fd)
            raise Changed('%s is open for writing' % show(entry.path))
        if taken and not briefly:
            import fcntl                # nobody shall wait while it is read
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return fd

    def of_our_own(self):
        """The errno that a file of ours in the incoming directory gets, which nobody writes; None:
        it gets its lease, or nothing can be made there to try."""
        with self.lock:
            if self.tried is None or time.monotonic() - self.tried > LOOK_ANYWAY:
                self.tried = time.monotonic()
                self.own = self.try_one()
            return self.own

    def try_one(self):
        try:
            with marked(self.stream.root) as marker:
                fd = os.open(os.path.join(self.stream.root, marker), OPEN_FLAGS)
                try:
                    return lease(fd)
                finally:
                    os.close(fd)
        except OSError:
            return None

    def sentence(self, refused):
        why = {errno.EACCES: 'files of another account do not say whether somebody is writing them',
               errno.EAGAIN: 'this file system says of every file that it is being written'}.get(
                   refused, 'this file system does not say whether somebody is writing a file')
        return '%s: %s; what is open and has been silent for settle_time goes (%s)' % (
            show(self.stream.directory), why, self.HINTS.get(refused, self.HINT))

    def report(self):
        """For --check: None if open writers are seen, else the sentence that says why not."""
        import itertools
        refused = self.of_our_own()
        with contextlib.suppress(OSError), os.scandir(self.stream.root) as entries:
            for entry in itertools.islice(entries, 100):
                if refused or not entry.is_file(follow_symlinks=False):
                    continue
                with contextlib.suppress(OSError):
                    fd = os.open(entry.path, OPEN_FLAGS)
                    try:
                        refused = lease(fd)
                    finally:
                        os.close(fd)
                    refused = refused if refused != errno.EAGAIN else None
        return self.sentence(refused) if refused else None


def check_unused(stream, item, leases):
    """Raises Changed if a file of the item is being written, ItemError if unreadable."""
    for entry in item.files:
        os.close(leases.open_quiet(stream.root, entry, briefly=True))


# ----------------------------------------------------------------------------------------
# 12  zipping
# ----------------------------------------------------------------------------------------

def zip_info(entry, name):
    """The ZipInfo of an entry: exact name bytes, mtime to the second, dates clamped.

    APPNOTE.TXT 4.4.6 (DOS times, 1980 to 2107) and 4.6.1 (extra field 0x5455: Unix mtime).
    """
    import struct
    import zipfile

    class ExactName(zipfile.ZipInfo):
        """The library writes cp437 or UTF-8; a name that is neither goes in as it is."""

        def _encodeFilenameFlags(self):
            try:
                name.decode('ascii')
                return name, self.flag_bits
            except UnicodeDecodeError:
                pass
            try:
                name.decode('utf-8')
                return name, self.flag_bits | 0x800
            except UnicodeDecodeError:
                return name, self.flag_bits

    seconds = entry.mtime_ns // 10 ** 9
    clamped = min(max(seconds, 315619200), 4354732800)      # a day inside of 1980 and 2107
    info = ExactName(name.decode('utf-8', 'replace'), time.localtime(clamped)[:6])
    info.create_system = 3
    info.external_attr = (entry.mode | (stat.S_IFDIR if entry.kind == 'd' else stat.S_IFREG)) << 16
    if entry.kind == 'd':
        info.external_attr |= 0x10
    else:
        info.compress_type = zipfile.ZIP_DEFLATED
        info.file_size = entry.size
    if -2 ** 31 <= seconds < 2 ** 31:
        info.extra = struct.pack('<HHBl', 0x5455, 5, 1, seconds)
    return info


def shutil_free(path):
    """Bytes free, or None: some FUSE file systems say 0 of everything."""
    import shutil
    usage = shutil.disk_usage(path)
    return usage.free if usage.total else None


def read_entry(root, entry, stop, start=0, fd=None):
    """Yield a file's bytes from `start` on, and look afterwards that it is still what the
    snapshot says.  fd: it is open already, and stays so.  Raises Changed, ItemError, Interrupted."""
    opened = open_entry(root, entry) if fd is None else None
    fd, left = opened if fd is None else fd, entry.size - start
    try:
        if start:
            os.lseek(fd, start, os.SEEK_SET)
        while left >= 0:                # what grows is not followed
            stop.check()
            size = min(BLOCK, left + 1)
            try:
                block = os.read(fd, size)
            except OSError as error:
                raise ItemError('%s cannot be read: %s' % (show(entry.path), error.strerror))
            left -= len(block)
            if block:
                yield block[:left] if left < 0 else block
            if not block or not left and len(block) < size:
                break
        if left or not entry.same_as(os.fstat(fd)):
            raise Changed('%s changed while it was read' % show(entry.path))
    finally:
        if opened is not None:
            os.close(opened)


def copy_entry(root, entry, write, stop, start=0, fd=None):
    """Hand a file's bytes from `start` on to write().  Raises as read_entry(), and what write()
    raises."""
    blocks = read_entry(root, entry, stop, start, fd)
    try:
        for block in blocks:
            write(block)
    finally:
        blocks.close()


def copy_prefix(root, entry, digest, length, stop):
    """Hash the first `length` bytes of a file: what a resumed transfer has sent before."""
    fd = open_entry(root, entry)
    try:
        while length:
            stop.check()
            try:
                block = os.read(fd, min(BLOCK, length))
            except OSError as error:
                raise ItemError('%s cannot be read: %s' % (show(entry.path), error.strerror))
            if not block:
                raise Changed('%s became shorter' % show(entry.path))
            digest.update(block)
            length -= len(block)
    finally:
        os.close(fd)


def zip_item(root, item, path, stop):
    """Write the item's snapshot to a new zip at path and prove that it can be read.

    The same snapshot gives the same bytes, so a zip sent twice is no conflict.
    Raises Changed, ItemError, StateError (no room), Interrupted.
    """
    import zipfile
    room = NoRoom('no room to zip %s (%s) in %s' % (
        show(item.name), format_size(item.size), show(os.path.dirname(path))),
        'make room there, or move state_dir to a larger disk')
    # of each entry the zip holds two headers and its name twice
    free = shutil_free(os.path.dirname(path))
    if free is not None and free < item.size + sum(200 + 2 * len(e.path) for e in item.entries):
        raise room
    try:
        with open(path, 'wb') as target, \
                zipfile.ZipFile(target, 'w', zipfile.ZIP_DEFLATED, allowZip64=True) as archive:
            for entry in item.entries:
                name = entry.path + (b'/' if entry.kind == 'd' else b'')
                with archive.open(zip_info(entry, name), 'w',
                                  force_zip64=entry.size > 1 << 30) as member:
                    if entry.kind == 'f':
                        copy_entry(root, entry, member.write, stop)
        with open(path, 'rb') as source, zipfile.ZipFile(source) as archive:
            for info in archive.infolist():
                stop.check()
                with archive.open(info) as member:
                    while member.read(BLOCK):
                        pass
    except OSError as error:
        if error.errno in NO_SPACE:
            raise room
        if error.errno in (errno.ENAMETOOLONG, errno.EFBIG):
            raise ItemError('%s cannot be zipped: %s' % (show(item.name), error.strerror), 'rename it')
        raise StateError('cannot write the zip of %s: %s' % (show(item.name), error.strerror),
                         'see state_dir')
    except (zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise IntegrityError('the zip of %s cannot be read back: %s' % (show(item.name), error))


def hash_entry(root, entry, stop, algorithm='sha256'):
    """The hash of a file of a snapshot, in hex."""
    import hashlib
    digest = hashlib.new(algorithm)
    copy_entry(root, entry, digest.update, stop)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------
# 13  sums that travel with the data
# ----------------------------------------------------------------------------------------

class Mismatch(Unfit):
    """The item is not what its check file says it is."""


HASH_LENGTHS = {'md5': 32, 'sha1': 40, 'sha256': 64, 'sha512': 128}
SUM_FILE_MOST = 64 << 20        # bytes; a larger one is none
MANIFEST = re.compile(rb'(tag)?manifest-\w+\.txt\Z|(md5|sha1|sha256|sha512)(sums?)?(\.txt)?\Z|'
                      rb'.*\.(md5|sha1|sha256|sha512)(sums?)?\Z', re.I)


def unescaped_name(name):
    """A name of a line that begins with a backslash (sha256sum(1))."""
    return re.sub(rb'\\(.)', lambda m: {b'n': b'\n', b'r': b'\r'}.get(m.group(1), m.group(1)), name)


def parse_sum_line(line, length, bagit):
    """(hex, name) of one line, name b'' where there is a hash alone.  Raises ValueError.

    HEX  NAME and HEX *NAME of sha256sum(1), with its escapes; ALG (NAME) = HEX of BSD and openssl;
    HEX NAME of BagIt (RFC 8493, 2.1.3), where LF, CR and % are written %0A, %0D, %25.
    """
    digits = rb'([0-9A-Fa-f]{%d})' % length
    forms = (rb'()%s[ \t]+\*?(.+)\Z',) if bagit else (rb'(\\?)%s [ *](.+)\Z', rb'()%s[ \t]+(.+)\Z')
    forms += rb'()%s()\s*\Z',
    match = next(filter(None, (re.match(form % digits, line, re.S) for form in forms)), None)
    if match:
        escaped, digest, name = match.groups()
    else:
        match = re.match(rb'(\\?)[\w-]+ ?\((.+)\) ?= ' + digits + rb'\s*\Z', line, re.S)
        if not match:
            raise ValueError('is no line of a checksum file with %d hexadecimal digits' % length)
        escaped, name, digest = match.groups()
    if escaped:
        name = unescaped_name(name)
    if bagit:
        name = re.sub(rb'%(0A|0D|25)', lambda m: bytes([int(m.group(1), 16)]), name, flags=re.I)
    return digest.decode().lower(), name


def parse_sums(content, algorithm, bagit=False):
    """{name: hex} of a checksum file, names as paths relative to it.  Raises ValueError."""
    sums = {}
    lines = content[3:].split(b'\n') if content.startswith(b'\xef\xbb\xbf') else content.split(b'\n')
    for number, line in enumerate(lines, 1):
        line = line.rstrip(b'\r')
        if not line.strip() or line.startswith((b'#', b';')):
            continue
        try:
            digest, name = parse_sum_line(line, HASH_LENGTHS[algorithm], bagit)
        except ValueError as error:
            raise ValueError('line %d %s' % (number, error))
        if name.startswith(b'/') or b'..' in name.split(b'/') or b'\0' in name:
            raise ValueError('line %d names a path outside: %s' % (number, show(name)))
        path = b'/'.join(part for part in name.split(b'/') if part not in (b'', b'.'))
        if sums.setdefault(path, digest) != digest:
            raise ValueError('line %d: a second, other hash of %s' % (number, show(name)))
    if not sums:
        raise ValueError('holds no checksum')
    return sums


class CheckFiles:
    """check_file: where the sums of an item are.  Of its three forms {name}.sha256 lies beside
    an item, {name}/md5sum.txt inside of a directory, SHA256SUMS beside several."""

    def __init__(self, stream):
        self.stream = stream
        pattern = to_bytes(stream.check_file)
        self.algorithm = hash_named(stream.check_file)
        self.inside = pattern[7:] if pattern.startswith(b'{name}/') else None
        self.shared = pattern if b'{name}' not in pattern else None
        self.before, _, self.after = pattern.partition(b'{name}')
        self.parsed = {}                # path -> (identity, sums or ValueError)

    def path_of(self, name):
        head, base = os.path.split(name)
        if self.inside:
            return os.path.join(name, self.inside)
        return os.path.join(head, self.shared or self.before + base + self.after)

    def item_of(self, path):
        """The item that a check file beside it belongs to."""
        head, base = os.path.split(path)
        return os.path.join(head, base[len(self.before):len(base) - len(self.after)])

    def is_one(self, name):
        """Whether a base name is that of a check file, which is never an item."""
        if self.inside:
            return False
        if self.shared:
            return name == self.shared
        return name.startswith(self.before) and name.endswith(self.after) and \
            len(name) > len(self.before) + len(self.after)

    def entry(self, path):
        """The Entry of a check file, or None."""
        try:
            entry = Entry.of(path, os.lstat(os.path.join(self.stream.root, path)))
        except OSError:
            return None
        return entry if entry.kind == 'f' else None

    def of(self, name):
        """The Entry of an item's check file, or None; a shared one counts if it names the item."""
        entry = self.entry(self.path_of(name))
        if entry and self.shared:
            try:
                if not self.about(name, entry):
                    return None
            except Mismatch:
                pass                    # then it may be about all of them
        return entry

    def sums(self, entry):
        """{path relative to the directory: hex} of a check file; {b'': hex} where it is a hash
        alone.  Raises Mismatch, Changed, ItemError."""
        known = self.parsed.get(entry.path)
        if not known or known[0] != entry.identity:
            content = []
            if entry.size <= SUM_FILE_MOST:
                copy_entry(self.stream.root, entry, content.append, StopRequest())
            bagit = os.path.basename(entry.path).startswith(b'manifest-')
            try:
                found = parse_sums(b''.join(content), self.algorithm, bagit)
                if b'' in found and (self.shared or self.inside):
                    raise ValueError('holds a hash without the name of its file')
                head = os.path.dirname(entry.path)
                found = {path and os.path.join(head, path): digest for path, digest in found.items()}
            except ValueError as error:
                found = error
            if len(self.parsed) > 1000:
                self.parsed.clear()
            known = self.parsed[entry.path] = entry.identity, found
        if isinstance(known[1], ValueError):
            raise Mismatch('%s: %s' % (show(entry.path), known[1]), 'write it as sha256sum does')
        return known[1]

    def about(self, name, entry):
        """{path: hex} of what a check file says of one item.  Raises as sums()."""
        sums = self.sums(entry)
        if self.inside:
            return sums
        own = {path: digest for path, digest in sums.items()
               if path == name or path.startswith(name + b'/')}
        if own or self.shared:
            return own
        if b'' in sums:
            return {name: sums[b'']}
        # beside a directory, written in it: sha256sum * > ../NAME.sha256
        head = os.path.dirname(entry.path)
        return {os.path.join(name, os.path.relpath(path, head) if head else path): digest
                for path, digest in sums.items()}

    def check(self, item, stop, partly):
        """Raises Mismatch if the item is not what its check file says; Changed, ItemError.
        partly(): whether it was delivered and in part released before, so that files may be missing."""
        told = self.about(item.name, item.check)
        files = {entry.path: entry for entry in item.files if entry.path != item.check.path}
        if not item.is_directory and item.name not in told:
            raise Mismatch('%s does not name %s' % (show(item.check.path), show(item.name)))
        missing = sorted(set(told) - set(files))
        if missing and not partly():
            raise Mismatch('%s names %s, which is not there' % (show(item.check.path), show(missing[0])))
        extra = sorted(path for path in set(files) - set(told) if self.counts(item, path))
        if extra:
            raise Mismatch('%s does not name %s' % (show(item.check.path), show(extra[0])))
        for path in sorted(set(told) & set(files)):
            found = hash_entry(self.stream.root, files[path], stop, self.algorithm)
            if found != told[path]:
                raise Mismatch('%s is not what %s says: its %s is %s, not %s' % (
                    show(path), show(item.check.path), self.algorithm, found, told[path]),
                    'is it damaged, or an older sum?')

    def counts(self, item, path):
        """Whether a file of the tree must be listed: not other manifests; and of a BagIt bag only
        what is in data/ (RFC 8493, 2.1.3)."""
        if self.inside and os.path.basename(item.check.path).startswith(b'manifest-'):
            return path.startswith(os.path.join(os.path.dirname(item.check.path), b'data', b''))
        return not MANIFEST.match(os.path.basename(path))

    def waiting(self, entry):
        """The first item that a shared check file names and that is here, or None.  Raises as sums()."""
        head = os.path.dirname(entry.path)
        for path in sorted(self.sums(entry)):
            below = os.path.relpath(path, head) if head else path
            name = path if self.stream.items == 'files' else os.path.join(head, below.split(b'/')[0])
            if os.path.lexists(os.path.join(self.stream.root, name)):
                return name
        return None


def make_scanner(stream, stop, spent=None):
    """The Scanner of a stream.  spent: what of its ready files did their work, a Spent."""
    scanner = Scanner(stream, stop)
    scanner.checks = CheckFiles(stream) if stream.check_file else None
    scanner.spent = spent
    return scanner


def sum_name(stream, name):
    """The name of the checksum file that send_checksum publishes beside a name at the target."""
    head, base = os.path.split(name)
    return os.path.join(head, to_bytes(stream.send_checksum).replace(b'{name}', base))


def sum_line(digest, name):
    """As sha256sum(1) writes it."""
    if re.search(rb'[\\\n\r]', name):
        escaped = name.replace(b'\\', b'\\\\').replace(b'\n', b'\\n').replace(b'\r', b'\\r')
        return b'\\%s  %s\n' % (digest.encode(), escaped)
    return b'%s  %s\n' % (digest.encode(), name)


def as_linked(root, entry):
    """The Entry of a file that got a second name by us, which gives it another ctime.  Raises Changed."""
    with contextlib.suppress(OSError):
        info = os.lstat(os.path.join(root, entry.path))
        if entry.is_at(info):
            return Entry.of(entry.path, info)
    raise Changed('%s has changed' % show(entry.path))


def sum_file(stream, batch, parcel, outcome, stop):
    """The content of the checksum file of a parcel that was published: a line for each of its files,
    of what was read here.  Raises Changed, ItemError."""
    algorithm = hash_named(stream.send_checksum)
    lines = []
    for entry in parcel.entries:
        if entry.kind != 'f':
            continue
        if entry.path in outcome.linked:
            entry = as_linked(batch.root, entry)
        known = (outcome.checksum or '').partition(':')
        digest = known[2] if known[0] == algorithm else hash_entry(batch.root, entry, stop, algorithm)
        name = os.path.relpath(entry.path, os.path.dirname(parcel.item.name) or b'.')
        if len(parcel.entries) == 1:
            name = os.path.basename(outcome.target if outcome.target is not None else entry.path)
        lines.append(sum_line(digest, name))
    return b''.join(lines)


# ----------------------------------------------------------------------------------------
# 14  transports
# ----------------------------------------------------------------------------------------

# What is handed to a transport: a Batch of Parcels.  The files of a parcel lie under
# batch.root by their entries' paths and go to target_dir/batch.subdir under the same paths.
# A parcel is a whole item, or the one zip file made of it.
Parcel = collections.namedtuple('Parcel', 'item entries')

# What a transport answers for each parcel: error (None: every file of it is proven at
# the target), checksum (of a single file), target (its name there, if it is another),
# linked ({path: Link} of what of its batch is one file at both ends), sent (False: all of it
# was there already), taken (the Entries of files that a reader took away after they had been proven
# and named), proof (how it was proven, for the ledger).
Outcome = collections.namedtuple('Outcome', 'error checksum target linked sent taken proof')
Outcome.__new__.__defaults__ = ((), None)


class Batch:
    """The parcels of one push, or a part of them; transports keep their notes in `jobs`.

    seen: whether this pass has sent what has this folded name in an earlier batch.
    about: the Batch whose checksum files these are, or None.
    """

    def __init__(self, root, subdir, parcels, jobs=None, seen=lambda name: False, about=None):
        self.root = root
        self.subdir = subdir
        self.parcels = parcels
        self.jobs = jobs
        self.seen = seen
        self.about = about
        self.cleared = False            # whether old checksum files were set aside
        self.began = None
        self.owners = {}

    def part(self, parcels):
        return Batch(self.root, self.subdir, parcels, self.jobs, self.seen, self.about)

    @property
    def moment(self):
        """The time in the names of the backups that it makes: an old item and its old checksum file
        get the same.  What came since the old ones were set aside must not take their names."""
        if self.about and not self.about.cleared:
            return self.about.moment
        self.began = self.began or fresh_time()
        return self.began

    def sums_of(self, stream, paths):
        """Where the checksum files of the items with these paths are, as such paths, sorted."""
        if self.about or not stream.send_checksum:
            return []
        if not self.owners:
            self.owners = {entry.path: parcel.item.name for parcel in self.parcels
                           for entry in parcel.entries}
        return sorted({sum_name(stream, self.owners[path]) for path in paths})

    def twins(self, paths):
        """Those of its paths that a target may take for one name with another of this pass: what
        has that name there is ours, and its source may be gone."""
        count = collections.Counter(folded(entry.path) for entry in self.entries)
        return {path for path in paths if count[folded(path)] > 1 or self.seen(folded(path))}

    def parts(self, most_files, most_bytes):
        """Yield it in parts, none of them larger, unless a single parcel is."""
        chosen, files, size = [], 0, 0
        for parcel in self.parcels:
            if chosen and (files + len(parcel.entries) > most_files or size + parcel.item.size > most_bytes):
                yield self.part(chosen)
                chosen, files, size = [], 0, 0
            chosen.append(parcel)
            files, size = files + len(parcel.entries), size + parcel.item.size
        yield self.part(chosen)

    def final(self, path):
        """Where a path of the batch goes, relative to target_dir."""
        return os.path.join(self.subdir, path) if self.subdir else path

    @property
    def entries(self):
        return [entry for parcel in self.parcels for entry in parcel.entries]

    @property
    def size(self):
        return sum(entry.size for entry in self.entries)

    @property
    def biggest(self):
        return max([entry.size for entry in self.entries] or [0])


def in_rounds(values, path_of=lambda path: path):
    """Lists of them: what a target may take for one name is in different ones, for of two that go in
    one breath the second replaces the first, or its backup."""
    rounds, counts = [], collections.Counter()
    for value in values:
        name = folded(path_of(value))
        if counts[name] == len(rounds):
            rounds.append([])
        rounds[counts[name]].append(value)
        counts[name] += 1
    return rounds


class Transport:
    """The contract.  A protocol is a class with these verbs and a row in TRANSPORTS.

    Each verb raises TargetError when the target or the way to it is in trouble (with the path of
    the file under way, if one was), Interrupted on a stop request, and StateError when this
    machine is; trouble with single files is in the answers of finish().  Any of them may be called again
    after an error, once open() was.

    verb            | thread                    | again with the same arguments
    ----------------|---------------------------|----------------------------------------------
    open            | connecting, or the pass   | checks that the connection still is there
    close           | the pass                  | does nothing
    present, learned, free_space, arrived | the pass, between two batches | asks again
    up_to_date      | the pass, while it scans  | looks again
    send            | the pass                  | sends again; what arrived whole may be kept
    finish          | proving, beside send()    | not: each part is finished once
    delete, delete_missing, tidy | the pass     | finds nothing to do
    """

    mirrors = False             # mirror mode works
    mirror_hint = ''            # what else would do
    stages = False              # a crash may leave temporary files for tidy()
    directories = 'zip',        # what it can do with them; the first is what `auto` means
    target_form = 'path'        # what target_dir is: one of TARGET_FORMS
    littered = False            # an earlier run ended in the middle: more for tidy() to look for
    takes = 'network'           # words of the option table's column `need` that it fulfils
    modules = ()                # what it imports where it needs it
    replaces = False            # its last step may replace what another sender has put there meanwhile
    tells_apart = False         # sees of each identical file there whether it is the source itself
    knows_own_copies = False    # replaces what settle_max sent before without a backup, by its hash
    overlaps = True             # sending takes so long that the part before is finished meanwhile
    asks_at_once = False        # present() costs nothing
    sees_writers = False        # send() finds out by itself whether somebody writes a file
    forbidden = b''             # bytes the protocol cannot carry in a name

    def __init__(self, stream, stop, progress, lock_fds=()):
        self.stream = stream
        self.stop = stop
        self.progress = progress
        self.lock_fds = tuple(lock_fds)
        self.own_copies = {}        # settle_max: path -> (SHA-256, wall time) of what was sent last
        self.taken = ()             # a mirror's Taken

    def open(self):
        """Make the connection ready; called again, it checks that it still is."""

    def close(self):
        """Give everything up; never raises."""

    def present(self, names):
        """Which of these names exist in target_dir.  Raises TargetError if it is missing."""
        raise NotImplementedError

    def up_to_date(self, _item, _subdir, watch):
        """Mirrors: whether all of an item is at the target already, where a look can tell.
        watch: the directories looked at are added to it, None if nobody wants to know; where
        it cannot tell what happens at the target, it is closed."""
        if watch:
            watch.close()
        return False

    def send(self, batch, hand_on):
        """Bring the bytes to the target under names nobody reads; hand_on(part, more, wait=True)
        is called with each part of the batch that can be finished, and whether another will
        come.  It answers False if it should not wait, and the part before is not finished yet."""
        raise NotImplementedError

    def finish(self, batch):
        """Verify what was sent, publish it; an Outcome for each parcel, in order.  Called for
        one part after the other, in another thread than send()."""
        raise NotImplementedError

    def delete(self, names):
        """Delete files of ours in target_dir, those that are there."""
        raise NotImplementedError

    def missing(self, what='is missing', more=''):
        """more: to be added to the hint."""
        return TargetError('the target directory %s %s' % (target_of(self.stream, False), what),
                           'may this account make it there?' if self.stream.create_directories else
                           'create it or mount it, or set create_directories = yes' + more)

    def unmarked(self):
        return TargetError('%s is missing in %s' % (self.stream.target_marker, target_of(self.stream, False)),
                           'is the disk mounted there?')

    def free_space(self):
        """Bytes free at the target, or None where nobody can tell."""
        return None

    def learned(self):
        """Yield (what, answer) of what experiments show of the target, for --check."""
        return ()

    def arrived(self, _entries):
        """Bytes of one file that stay at the target for a resume, or None where nobody can tell."""
        return None

    def tidy(self):
        """Remove our temporary files at the target; whether nothing is left."""
        return True

    def check_listing(self):
        """Mirrors: raises TargetError if mirror_delete cannot list the target."""

    def delete_missing(self, wanted):
        """Mirrors: delete what is at the target and not in `wanted`; returns the names."""
        raise NotImplementedError

    def refusal(self, entries):
        """An ItemError if the protocol cannot carry one of these names."""
        for entry in entries if self.forbidden else ():
            bad = [c for c in self.forbidden if c in entry.path]
            if bad:
                return Unfit('%s cannot be sent by %s: its name holds %s' % (
                    show(entry.path), self.stream.transfer_protocol, show(bytes(bad[:1]))),
                    'rename it')
        return None


def conflict_step(stream, name, twin=False):
    """What to do where other content has the name (bytes) of a file of ours at the target.

    on_conflict | a zip, moved | a twin, moved | anything else
    ------------|--------------|---------------|--------------
    refuse      | refuse       | refuse        | refuse
    backup      | stamp        | backup        | backup
    overwrite   | stamp        | backup        | overwrite

    refuse: ours stays here; stamp: ours gets a stamped name; backup: theirs gets one; overwrite:
    ours takes its place.  What was moved there before may be the only copy: the zip of a tree that
    was released long ago, or a twin: another file of this pass that the target takes for this one.
    """
    if stream.on_conflict == 'refuse':
        return 'refuse'
    if stream.zips and stream.move and name.endswith(b'.zip'):
        return 'stamp'
    return 'backup' if stream.on_conflict == 'backup' or twin and stream.move else 'overwrite'


def one_name_there(path, other):
    """The error for the second of two names of the source that the target takes for one."""
    return Unfit('%s and %s have one name at the target' % (show(path), show(other)), 'rename one of them')


def refused_conflict(name):
    return Unfit('%s exists at the target with other content' % show(name),
                 'on_conflict = refuse: rename or remove one of them')


@contextlib.contextmanager
def scratch_directory(stream):
    """A directory for a moment, in the spool, which every pass finds or makes empty."""
    import tempfile
    make_private_directory(stream.spool)
    with tempfile.TemporaryDirectory(dir=stream.spool) as path:
        yield to_bytes(path)


def machine_marks():
    """What differs between this machine and a clone of it, as bytes: its name, the id that the
    system was given when it was installed, the addresses of its network cards."""
    import glob
    import socket
    marks = [to_bytes(socket.gethostname())]
    cards = sorted(glob.glob('/sys/class/net/*/device'))        # those that are hardware
    for path in ['/etc/machine-id'] + [os.path.join(os.path.dirname(card), 'address') for card in cards]:
        with contextlib.suppress(OSError), open(path, 'rb') as handle:
            marks.append(handle.read(100))
    return marks


def staging_id(stream):
    """A name for the staging area that nobody else has: random, kept, and tied to this machine
    and to these directories, for a state_dir may be cloned as well.  Raises StateError, OSError."""
    import hashlib
    path = stream.spool + '.id'
    name = b''
    with contextlib.suppress(FileNotFoundError), open(path, 'rb') as handle:
        name = handle.read()
    if not re.match(rb'[0-9a-f]{16}$', name):
        name = random_hex(8)
        make_private_directory(os.path.dirname(path))
        atomic_write(path, name, True)
    marks = [name, os.path.realpath(to_bytes(path)), os.path.realpath(stream.root)] + machine_marks()
    return hashlib.sha256(repr(marks).encode()).hexdigest()[:16].encode()


class Throttle:
    """Shares a limit in bytes per second among threads."""

    def __init__(self, limit, stop):
        self.limit = limit
        self.stop = stop
        self.free_at = 0                # monotonic time up to which the line is taken
        self.lock = threading.Lock()    # guards free_at

    def spend(self, count):
        """Sleep until `count` bytes more keep the limit.  Raises Interrupted."""
        if self.limit:
            with self.lock:
                self.free_at = max(self.free_at, time.monotonic()) + count / self.limit
                pause = self.free_at - time.monotonic()
            self.stop.wait(pause)


class Staging(Transport):
    """Transports that stage each file under a temporary name, verify it and rename it.

    A protocol says how to stage, measure, place, rename and remove; the order of these
    and the treatment of conflicts is the same for all.  Paths are bytes relative to
    target_dir.
    """

    stages = True
    tells_apart = True
    knows_own_copies = True
    PART_FILES = 1000           # one part is verified, published and released while the next is staged
    PART_SIZE = 1 << 30         # or as many bytes
    REMEMBERED = 20000          # of what is learned of single names and files
    REFUSED_AGE = 600           # seconds after which a name that did not come back is tried again

    class Job:
        """One file on its way: where it is staged, what it should be, how it fares."""

        __slots__ = ('entry', 'staged', 'final', 'digest', 'error', 'equal', 'linked', 'hashed', 'taken')

        def __init__(self, entry, final, hashed):
            self.entry, self.final, self.hashed = entry, final, hashed
            self.staged = self.digest = self.error = None
            self.equal = self.linked = self.taken = False

        def own_faults(self):
            """What is this file's own trouble is noted here, and goes no further."""
            return self         # a generator for each file would cost more than its system calls

        def __enter__(self):
            return None

        def __exit__(self, kind, error, trace):
            if isinstance(error, (Changed, ItemError)):
                self.error = error
                return True
            return False

    def __init__(self, *args, **kwargs):
        Transport.__init__(self, *args, **kwargs)
        self.traits = {}            # (name, ...) -> what an experiment showed; of one connection
        self.not_kept = {}          # odd name that does not come back -> when that was tried
        self.trying = threading.RLock()     # one experiment at a time
        self.shown = set()          # directories in which a new name of ours was found
        self.area = OWN_PREFIX + b'-' + staging_id(self.stream)
        self.throttle = Throttle(self.stream.bandwidth_limit, self.stop)
        self.made = set()           # directories known to exist at the target
        self.apart = set()          # (directory here, there) known to be two; until the next open()
        self.sending = None         # names outside of the area that a run began to write

    # -- what a protocol provides

    def stage(self, batch, jobs):
        """Write each job's bytes to job.staged; on an ItemError or Changed set job.error."""
        raise NotImplementedError

    def digest(self, batch, job):
        """SHA-256 of what was read at the source."""
        return job.digest or hash_entry(batch.root, job.entry, self.stop)

    def measure(self, paths, hashed):
        """{path: (size or None, SHA-256 or None), or an ItemError} of those paths that are files."""
        raise NotImplementedError

    def place(self, jobs):
        """Give staged files their final names without ever overwriting; a set of those done."""
        raise NotImplementedError

    def exists(self, path):
        """Whether anything has this name; None if the target does not say so clearly."""
        raise NotImplementedError

    def exist_all(self, paths):
        """exists() of each, in order."""
        return [self.exists(path) for path in paths]

    lists = False               # whether listing() and write_small() are there
    deletes = True              # whether files of ours were seen to go; else what is tried stays

    def listing(self, directory):
        """The exact names in a directory, as a set; None if it cannot be listed."""
        raise NotImplementedError

    def write_small(self, path, content):
        """Write a tiny file of ours.  Raises ItemError."""
        raise NotImplementedError

    def sync(self):
        """Have on disk what was named last, where one can ask for that, before sources go."""

    def rename(self, old, new):
        """Rename, overwriting.  Raises ItemError when the target refuses."""
        raise NotImplementedError

    def refuses_renames(self):
        """What the target says where it renames nothing, as far as that shows without a file of ours: None
        where it may.  Asked of who may do without a staging area."""
        raise NotImplementedError

    def make_directories(self, paths):
        """Make directories and their parents where they are missing.  Raises ItemError."""
        raise NotImplementedError

    def can_link(self, _batch, _entry):
        """Whether the source itself can be given its final name: nothing is staged then."""
        return False

    def staged_name(self, entry):
        """The same snapshot has the same temporary name, so that a later run can resume it."""
        import hashlib
        key = entry.path + repr(entry.identity).encode()
        return self.area + b'/' + hashlib.sha1(key).hexdigest()[:20].encode()

    # -- the one way to do it

    def send(self, batch, hand_on):
        try:
            if self.stream.staging == 'area':
                self.make_area()
        except ItemError as error:
            raise TargetError(error.message, error.hint)
        parts = list(batch.parts(self.PART_FILES, self.PART_SIZE))
        for part in parts:
            part.jobs = self.make_jobs(part)
            if self.stream.staging != 'area':
                self.clear_places(part)
            self.stage(part, [job for job in part.jobs if not job.error and not job.equal])
            hand_on(part, part is not parts[-1])

    def make_area(self):
        """The staging area, ready for files.  Raises ItemError."""
        self.ensure([self.area])

    def make_jobs(self, batch):
        jobs = []
        for parcel in batch.parcels:
            refusal = self.refusal(parcel.entries)
            for entry in parcel.entries:
                if entry.kind == 'f':
                    job = self.Job(entry, batch.final(entry.path), self.stream.verify == 'checksum')
                    job.error = refusal
                    job.linked = not refusal and self.can_link(batch, entry)
                    if not job.linked:
                        job.staged = self.staged_at(job)
                    jobs.append(job)
        return jobs

    def staged_at(self, job):
        """Where a file is while it is sent."""
        if self.stream.staging == 'none':
            return job.final
        if self.stream.staging == 'beside':
            return job.final + to_bytes(self.stream.staging_suffix)
        return self.staged_name(job.entry)

    # -- without a staging area (section 20, 4)

    def clear_places(self, batch):
        """What is to be written outside of the area is noted first, on the disk: what a killed run
        leaves there is ours."""
        jobs = [job for job in batch.jobs if not job.error]
        if self.stream.staging == 'none' and self.stream.on_conflict == 'backup':
            self.refuse_backups()
        self.ensure_parents(jobs)
        if self.sending is None:
            with contextlib.suppress(OSError, ValueError), open(self.sending_path(), 'rb') as handle:
                self.sending = {to_bytes(name) for name in from_json(handle.read().decode())}
            self.sending = self.sending or set()
        for job in jobs if self.stream.staging == 'none' else ():
            with job.own_faults():
                if not job.error:
                    self.clear_way(batch, job)
        self.note_sending({job.staged for job in jobs if not job.error and not job.equal}, ())

    def refuse_backups(self):
        """Raises TargetError where a backup is known to be impossible; once a connection."""
        refusal = None if self.trait('renames') else self.refuses_renames()
        if refusal:
            raise TargetError('nothing can be renamed at %s, so nothing there can be backed up: %s' % (
                target_of(self.stream), refusal), 'with staging = none, set on_conflict = refuse')
        self.traits['renames',] = True

    def sending_path(self):
        return self.stream.spool + '.sending'

    def note_sending(self, begun, ended):
        with self.trying:
            self.sending = (self.sending | begun).difference(ended)
            make_private_directory(os.path.dirname(self.sending_path()))
            with own_files('cannot write %s' % show(self.sending_path())):
                atomic_write(self.sending_path(), to_json(sorted(map(to_text, self.sending))), bool(begun))

    def clear_way(self, batch, job):
        """Its final name must be free before the first byte: what has it now is ours and half, the
        same, or somebody else's; where nobody can tell, it gets a name of its own."""
        if any(oddities(part) for part in job.final.split(b'/')):
            raise Unfit('%s cannot be sent: nobody can try whether the target keeps such a name'
                        % show(job.final), 'rename it, or use staging = area')
        there = self.look([job.final])[job.final]
        if there is False:
            return
        same = self.same_or_unknown(batch, job) if there else False
        if same:
            job.equal = True
        elif there is None or job.final in self.sending and not self.is_prefix(batch, job):
            job.final = job.staged = stamped(job.final)
        elif same is None:
            raise Unfit('%s: something that is no file has its name at the target' % show(job.final),
                        'rename or remove it at the target')
        elif job.final not in self.sending:
            step = conflict_step(self.stream, job.final, bool(batch.twins([job.entry.path])))
            if step == 'refuse':
                raise refused_conflict(job.final)
            if step == 'stamp':
                job.final = job.staged = stamped(job.final)
            elif step == 'backup':
                self.make_backup(batch, job)

    def same_or_unknown(self, batch, job):
        try:
            return self.same_content(batch, job)
        except ItemError:               # it cannot be read there
            return False

    def is_prefix(self, batch, job):
        """Whether what has its name is the beginning of it."""
        return self.begins_with(batch, job, self.measure([job.final], True).get(job.final))

    def begins_with(self, batch, job, there):
        """Whether a file begins with what measure() found."""
        import hashlib
        digest = hashlib.sha256()
        if not isinstance(there, tuple) or there[0] is None or there[0] > job.entry.size:
            return False
        copy_prefix(batch.root, job.entry, digest, there[0], self.stop)
        return digest.hexdigest() == there[1]

    def finish_in_place(self, batch):
        jobs = [job for job in batch.jobs if not job.error and not job.equal]
        self.verify(batch, jobs)
        if jobs:
            self.sync()
        return self.outcomes(batch)

    def kept_beside(self, job):
        """Whether an odd name is there as it was sent, as far as the suffix shows it."""
        head, name = os.path.split(job.final)
        if not any(oddities(part) for part in job.final.split(b'/')):
            return True
        if any(oddities(part) for part in head.split(b'/')) or name[-1:] in (b' ', b'.'):
            return False
        return os.path.basename(job.staged) in (self.listing(head) or ())

    # --

    def ensure(self, paths):
        """Directories, made once."""
        missing = sorted({p for p in paths if p} - self.made)
        if missing:
            self.make_directories(missing)
            self.made.update(missing)

    def finish(self, batch):
        answers = self.finish_in_place(batch) if self.stream.staging == 'none' else self.publish_all(batch)
        if self.sending:
            self.note_sending(set(), [job.staged for job in batch.jobs if not job.error])
        return answers

    def publish_all(self, batch):
        jobs = [job for job in batch.jobs if not job.error and not job.equal]
        self.ensure_parents(jobs)
        self.verify(batch, [job for job in jobs if not job.error and not job.linked])
        self.check_names(jobs)
        self.forget_names()
        jobs = [job for job in jobs if not job.error]
        taken = self.names_taken(jobs)
        free = [job for job in jobs if not job.error and job not in taken]
        placed = self.place(free) if free else ()
        refused = [job for job in jobs if not job.error and job not in placed]
        twins = batch.twins([job.entry.path for job in refused]) if refused else ()
        for job in refused:
            if not job.error:
                with job.own_faults():
                    self.settle_conflict(batch, job, job.entry.path in twins)
        self.confirm([job for job in jobs if not job.error and not job.linked])
        self.delete([job.staged for job in jobs if job.error and job.staged])
        if jobs:
            self.sync()
        return self.outcomes(batch)

    # -- experiments (section 13 of the design): nothing that a target says of itself is believed

    def trait(self, name, *about):
        """What an experiment in the staging area showed of the target; tried when the next step
        relies on it, once a connection.  Raises TargetError."""
        with self.trying:
            key = (name,) + about
            if self.stream.staging != 'area':
                return self.traits.get(key, False)      # nothing is tried: it counts as "not so"
            if key not in self.traits:
                self.traits[key] = getattr(self, 'try_' + name)(*about)
                log.debug('%s: %s%s' % (
                    target_of(self.stream), name,
                    ''.join(' %r' % (a,) for a in about) + ' ' + str(self.traits[key])), self.stream)
            return self.traits[key]

    ODD_NAMES = collections.OrderedDict((       # tried by --check
        ('a blank at an edge', b' x '), ('a dot at the end', b'x.'), ('a colon', b'a:b'),
        ('? * < > |', b'a?*<>|'), ('a double quote', b'a"b'), ('a backslash', b'a\\b'),
        ('a line feed', b'a\nb'), ('accents', b'caf\xc3\xa9'), ('bytes that are no UTF-8', b'a\xff\xfeb')))

    def learned(self):
        if not self.lists:
            return
        yield 'what is missing', 'asked for by its name' if self.trait('absence') else \
            'the target does not say so clearly: directories are listed'
        yield 'upper and lower case', 'Scan and scan may be one name there' if self.trait('folds') else \
            'two names'
        lost = [what for what, name in self.ODD_NAMES.items()
                if any(byte in name for byte in self.forbidden) or not self.survives(name)]
        yield 'odd names', 'kept' if not lost else 'refused are those with ' + ', '.join(lost)

    def survives(self, name):
        """As keeps_name(), for --check, where nobody else needs the connection."""
        try:
            return self.keeps_name(name)
        except TargetError:             # some hang up when they get a name that is no UTF-8
            self.open()                 # unless the target is in trouble
            return False

    @contextlib.contextmanager
    def tiny(self, content=b'tried by MiStaMover\n'):
        """The path of a tiny file in the staging area, for a moment.  Raises ItemError."""
        path = self.trial(b'%d' % len(content))
        self.write_once(path, content)
        try:
            yield path
        finally:
            self.delete([path])

    def trial(self, name):
        """The path of a file to try something with: always the same one where it may have to stay."""
        return os.path.join(self.area, b'try-' + name + (b'-' + random_hex(4) if self.deletes else b''))

    def write_once(self, path, content):
        """As write_small(); one from before will do, where it is neither removed nor replaced."""
        self.ensure([self.area])
        try:
            self.write_small(path, content)
        except ItemError:
            there = self.measure([path], False).get(path)
            if not isinstance(there, tuple) or there[0] != len(content):
                self.delete([path])     # half of one
                self.write_small(path, content)

    def take_back(self, path, first):
        """A file of ours has its first name again, where nothing is removed: there it is found by what is
        tried next."""
        if not self.deletes:
            with contextlib.suppress(ItemError):
                self.rename(path, first)

    def try_absence(self):
        """Whether exists() says no of a name that cannot be there, and yes of one that is."""
        if self.exists(os.path.join(self.area, b'try-' + random_hex(8))) is not False:
            return False
        try:
            with self.tiny() as path:
                return self.exists(path) is True
        except ItemError:
            return False

    def try_folds(self):
        """Whether names that differ in case or in the form of their accents are one name there."""
        try:
            for mine, other in ((b'a', b'TRY-A'), (b'\xc3\xa9', b'try-e\xcc\x81')):
                path = self.trial(mine)
                self.write_once(path, b'')
                tail = path.rpartition(b'try-' + mine)[2]
                found = self.exists(os.path.join(self.area, other + tail))
                self.delete([path])
                if found is not False:
                    return True
        except ItemError:               # it takes no accents at all
            pass
        return False

    def try_names(self, name):
        try:
            return self.comes_back(name)
        except TargetError:             # some hang up, or say EIO, at a name that is no UTF-8
            self.exist_all([self.area])     # unless the target is in trouble
            self.present(())
            return False

    def comes_back(self, name):
        """Whether a file of ours has an odd name byte for byte after a rename.  The staging area is
        listed, for the same question asked in the same words gets the same answer; what another
        name was made of goes with the area."""
        path = os.path.join(self.area, name)
        try:
            with self.tiny() as tiny:
                with contextlib.suppress(ItemError):    # where nothing is replaced, one may be there that
                    self.rename(tiny, path)             # could not be removed
                kept = name in (self.listing(self.area) or ())
                self.take_back(path, tiny)
                return kept
        except ItemError:
            return False
        finally:
            self.delete([path])

    def keeps_name(self, path):
        """Whether every part of a path comes back as it was sent."""
        if not ODD_PATH.search(path):
            return True
        for part in path.split(b'/'):
            odd = oddities(part)
            if odd and not (self.traits.get(('names', odd)) or self.trait_of_name(odd, part)):
                return False
        return True

    def trait_of_name(self, odd, name):
        """smbnetfs says EIO to everything for a second after a name that its server refuses: what is
        refused stays so for a while, or every pass would end at the same name."""
        if name in self.not_kept and time.monotonic() - self.not_kept[name] < self.REFUSED_AGE:
            return False
        kept = self.trait('names', name)
        if kept:
            self.traits[('names', odd)] = True      # other names that are odd in this way, too
        else:
            self.not_kept[name] = time.monotonic()
        return kept

    def check_names(self, jobs):
        """A name that the target would change is never published: it may be another's."""
        for job in jobs if self.lists else ():
            if not job.error and not (self.kept_beside(job) if self.stream.staging == 'beside' else
                                      self.keeps_name(job.final)):
                job.error = Unfit('%s cannot be sent: the target would change its name' % show(job.final),
                                  'rename it')

    def forget_names(self):
        """A connection may last for years, and every name beyond ASCII is odd in its own way."""
        with self.trying:
            if len(self.traits) > self.REMEMBERED:
                for key in [key for key in self.traits if key[0] == 'names']:
                    del self.traits[key]
            if len(self.not_kept) > self.REMEMBERED:
                self.not_kept.clear()

    def names_taken(self, jobs):
        """Those whose final names are taken; asked for once before the publication.  A job has an
        error if nobody can tell."""
        there = self.look([job.final for job in jobs])
        for job in jobs:
            if there[job.final] is None:
                job.error = ItemError('the target does not say whether %s is there' % show(job.final))
        return {job for job in jobs if there[job.final]}

    def look(self, paths):
        """{path: whether anything has this name, None if nobody can tell}: by asking, where the
        target answers truthfully, else by a listing."""
        if not paths:
            return {}
        if not self.lists or self.trait('absence'):
            return dict(zip(paths, self.exist_all(paths)))
        found = {}
        for directory in {parent_of(path) for path in paths}:
            names = self.listing(directory)
            same = None if names is None else set(map(folded, names))
            for path in paths:
                if parent_of(path) == directory:
                    found[path] = None if names is None else folded(os.path.basename(path)) in same
        return found

    def confirm(self, jobs):
        """Every file is there under its name, its size is right: else it was not published.  An odd
        name is looked for in a listing."""
        if self.stream.verify == 'accepted':
            return
        sizes = self.measure([job.final for job in jobs], False)
        listed = {}
        for job in jobs:
            directory, name = parent_of(job.final), os.path.basename(job.final)
            there = job.final in sizes
            if there and isinstance(sizes[job.final], ItemError):       # nobody can tell
                job.error = sizes[job.final]
                continue
            if there and self.lists and oddities(name):
                if directory not in listed:
                    listed[directory] = self.listing(directory)
                there = listed[directory] is None or name in listed[directory]
            if there and sizes[job.final][0] in (None, job.entry.size):
                self.shown.add(directory)
            elif not there and self.was_taken(job):
                job.taken = True
                log.once('a reader takes files from %s as soon as they have their names' % (
                    target_of(self.stream)), self.stream)
            else:
                job.error = ItemError('%s is not at the target under its name' % show(job.final),
                                      'can the target hold such a name?')

    def was_taken(self, job):
        """Whether a reader took a file away: it was proven, its rename was acknowledged, nothing
        has its name; and the target shows the new name of another file of ours there."""
        if oddities(os.path.basename(job.final)) or \
                self.exist_all([job.final, job.staged]) != [False, False]:
            return False
        marker = {to_bytes(self.stream.target_marker)} if self.stream.target_marker else set()
        return marker <= self.present(marker) and \
            (parent_of(job.final) in self.shown or self.shows(parent_of(job.final)))

    def shows(self, directory):
        """A control question: whether a file of ours is found after a rename into a directory."""
        name = os.path.join(directory, OWN_PREFIX + b'-try-' + random_hex(4))
        try:
            with self.tiny() as path:
                self.rename(path, name)
                shown = self.exists(name) is True
                self.take_back(name, path)
                return shown
        except ItemError:
            return False
        finally:
            self.delete([name])

    def ensure_parents(self, jobs):
        """A directory that cannot be made is the trouble of what goes into it, of nothing else."""
        for directory in sorted({parent_of(job.final) for job in jobs}):
            try:
                self.ensure([directory])
            except ItemError as error:
                for job in jobs:
                    if parent_of(job.final) == directory:
                        job.error = error

    def verify(self, batch, jobs):
        """Compare what is staged with what was read; what differs is removed, never placed."""
        if self.stream.verify == 'accepted':
            return
        wrong = []
        for hashed in (False, True):
            chosen = [job for job in jobs if job.hashed == hashed]
            found = self.measure([job.staged for job in chosen], hashed) if chosen else {}
            for job in chosen:
                with job.own_faults():
                    self.compare(batch, job, found.get(job.staged), hashed)
                if job.error:
                    wrong.append(job.staged)
        self.delete(wrong)

    def compare(self, batch, job, there, hashed):
        """there: what measure() found under its staged name.  Raises ItemError, Changed."""
        if isinstance(there, ItemError):
            raise there
        size, digest = there or (None, None)
        if not there or size not in (None, job.entry.size):
            raise ItemError('%s did not arrive whole (%s of %d bytes)' % (
                show(job.final), 'nothing' if size is None else size, job.entry.size))
        if hashed and digest != self.digest(batch, job):
            raise IntegrityError('%s arrived damaged' % show(job.final))
        if hashed:
            job.digest = digest

    def settle_conflict(self, batch, job, twin):
        """Something has the final name; twin: perhaps another file of this batch, at a target that
        takes the two for one."""
        there = self.same_content(batch, job)
        if there is True:
            if self.stream.move:
                self.check_apart(job)
            self.keep_identical(job)
            return
        self.check_twins(batch, job.entry)
        step = conflict_step(self.stream, job.final, twin)
        if step == 'refuse':
            raise refused_conflict(job.final)
        if step == 'stamp':
            job.final = stamped(job.final)
            self.place_alone(job)
        elif there is None:
            raise self.no_file(job)
        elif step == 'backup':
            backups = self.make_backup(batch, job, twin)
            self.place_or_restore(batch, job, backups)
            for path, backup in backups.items():
                if not self.drop_own_copy(path, backup):
                    log.info('other content had the name %s at the target and is %s now' % (
                        show(batch.final(path)), show(backup)), self.stream)
        else:
            self.overwrite(job)
            log.info('other content had the name %s at the target and was overwritten' % show(job.final),
                     self.stream)

    def check_twins(self, batch, entry):
        """Mirrors: raises Unfit if what has its name there is another file of the source."""

    def place_alone(self, job):
        if job not in self.place([job]):
            raise ItemError('%s cannot be placed' % show(job.final))

    def place_or_restore(self, batch, job, backups):
        """What was there gets its name back if ours cannot have it.  Raises ItemError, Changed."""
        with job.own_faults():
            self.place_alone(job)
        for path, backup in backups.items() if job.error else ():
            with contextlib.suppress(ItemError):
                if self.exists(batch.final(path)) is False:
                    self.rename(backup, batch.final(path))
        if job.error:
            raise job.error

    BORDER = 'is another file system mounted below target_dir? then set staging = beside'

    def no_file(self, job):
        """Why a file could not be placed although no other one has its name."""
        if self.exists(job.final):
            return Unfit('%s: something that is no file has its name at the target' % show(job.final),
                         'rename or remove it at the target')
        return ItemError('%s cannot be placed' % show(job.final),
                         'may this account write there? is another file system mounted below target_dir?')

    def drop_own_copy(self, path, backup):
        """settle_max: the copy that we sent before, known by its hash, needs no backup."""
        own = self.own_copies.get(path)
        there = self.measure([backup], True).get(backup) if own else None
        if not isinstance(there, tuple) or there[1] != own[0]:
            return False
        self.delete([backup])
        return True

    def same_content(self, batch, job):
        """Whether the file under the final name is what we send; None if no file is there."""
        for hashed in (False, True):        # a file of another size need not be read
            there = self.measure([job.final], hashed).get(job.final)
            if isinstance(there, ItemError):
                raise there
            if not there:
                return None
            if there[0] not in (None, job.entry.size):
                return False
        return there[1] == self.digest(batch, job)

    def make_backup(self, batch, job, twin=False):
        """Rename what has the final name, and before it the checksum file of that, which says nothing
        of what comes: {path: new name}.  Raises ItemError unless each is found there."""
        # of twins both may be renamed to one name, so each gets a stamp of its own
        moment, backups = fresh_time() if twin else batch.moment, collections.OrderedDict()
        sums = [path for path in batch.sums_of(self.stream, [job.entry.path])
                if isinstance(self.measure([batch.final(path)], False).get(batch.final(path)), tuple)]
        for path in sums + [job.entry.path]:
            final, backup = batch.final(path), stamped(batch.final(path), moment)
            self.rename(final, backup)
            if self.exist_all([final, backup]) != [False, True]:
                raise ItemError('%s: nobody can tell whether the file that was there is %s now' % (
                    show(final), show(backup)), 'look at the target, or set on_conflict = refuse')
            backups[path] = backup
            batch.cleared = batch.cleared or path in sums
        return backups

    def check_apart(self, job):
        """Raises ItemError if a symlink or a mount at the target leads back to the source."""
        here, there = os.path.dirname(job.entry.path), os.path.dirname(job.final)
        if (here, there) in self.apart:
            return
        try:
            with marked(os.path.join(self.stream.root, here)) as marker:
                found = self.measure([os.path.join(there, marker)], False)
        except OSError as error:
            raise ItemError('cannot write beside %s: %s' % (show(job.entry.path), error.strerror))
        if found:
            raise ItemError('%s at the target is the source itself' % show(job.final),
                            'fix the link or mount that leads back')
        self.apart.add((here, there))

    def keep_identical(self, job):
        """Ours takes the place of what has the same content: that may be a link to the source."""
        try:
            if self.deletes:
                self.overwrite(job)
            else:                       # of two steps something would stay
                self.rename(job.staged, job.final)
        except ItemError:               # a server that never replaces a file
            self.delete([job.staged])

    def overwrite(self, job):
        self.rename(job.staged, job.final)

    def overwrite_in_steps(self, job):
        """Where no rename replaces a file, what is there has another name meanwhile: one that is found if
        the line breaks, for what is in the staging area goes."""
        try:
            self.rename(job.staged, job.final)
            return
        except ItemError:
            aside = stamped(job.final)
        try:
            self.rename(job.final, aside)
            try:
                self.rename(job.staged, job.final)
            except ItemError:
                self.rename(aside, job.final)
                raise
            self.delete([aside])
        except TargetError:
            log.info('%s at the target may be %s now: the line broke when it was to be replaced' % (
                show(job.final), show(aside)), self.stream)
            raise

    @staticmethod
    def jobs_by_parcel(batch):
        """Yield (parcel, its Jobs): there is one for each file, in the same order."""
        jobs = iter(batch.jobs)
        for parcel in batch.parcels:
            yield parcel, [next(jobs) for entry in parcel.entries if entry.kind == 'f']

    def outcomes(self, batch):
        linked = {job.entry.path: job.linked for job in batch.jobs if job.linked}
        return [self.outcome_of_one(mine[0], linked) if len(mine) == len(parcel.entries) == 1 else
                self.outcome_of_many(mine, linked) for parcel, mine in self.jobs_by_parcel(batch)]

    def outcome_of_one(self, job, linked):
        return Outcome(job.error, 'sha256:' + job.digest if job.digest else None, job.final, linked,
                       self.stream.move or not job.equal, [job.entry] if job.taken else (),
                       self.proof_of([job]))

    def outcome_of_many(self, jobs, linked):
        return Outcome(next((job.error for job in jobs if job.error), None), None, None, linked,
                       self.stream.move or any(not job.equal for job in jobs),
                       [job.entry for job in jobs if job.taken], self.proof_of(jobs))

    hashing = 'read back'       # how a hash of what is at the target is had, for the ledger

    def proof_of(self, jobs):
        if jobs and all(job.linked for job in jobs):
            return 'one inode'
        if self.stream.verify == 'accepted':
            return 'accepted'
        return self.hashing if all(job.hashed for job in jobs) else 'size'

    def arrived(self, entries):
        if self.stream.staging != 'area':
            return None
        staged = self.staged_name(entries[0])
        there = self.measure([staged], False).get(staged, (0,))
        return there[0] if isinstance(there, tuple) else None

    def tidy(self):
        if self.stream.staging != 'area':
            if self.sending and self.stream.staging == 'beside':
                self.delete(sorted(self.sending))
                self.note_sending(set(), self.sending)
            return True
        self.made.discard(self.area)
        return self.delete_area()

    def delete_area(self):
        """Remove the staging area; whether it is gone."""
        raise NotImplementedError


def protected(relative, stream):
    """Whether mirror_delete leaves this name at the target alone, in any case of its letters: it
    is ours, a person's, or the system's."""
    parts = relative.split(b'/')
    return any(part.lower().startswith(OWN_PREFIX) or re.search(rb'\.~\d{8}[Tt][\d.]+[Zz]~', part)
               for part in parts) or parts[0] in SYSTEM_NAMES or folded(parts[0]) in {
        folded(to_bytes(name)) for name in (stream.stop_file, stream.target_marker) if name}


def sync_file(path):
    fd = os.open(path, OPEN_FLAGS)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def ask_disk(fd):
    """Where that can be asked, the cache forgets a file, and the disk begins to read it.  Raises OSError."""
    if hasattr(os, 'posix_fadvise'):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, BLOCK, os.POSIX_FADV_WILLNEED)


SPARSE_FROM = 64 << 10      # below that size nobody misses a hole
HOLE = 4096                 # bytes, and where one begins and ends


def has_holes(fd):
    """Whether a file takes less room than its size: stat(2) counts blocks of 512 bytes."""
    info = os.fstat(fd)
    return getattr(info, 'st_blocks', info.st_size) * 512 < info.st_size


def split_holes(block):
    """Yield (whether it is a hole, bytes) for a block of a sparse file."""
    view, start, hole, nothing = memoryview(block), 0, None, bytes(HOLE)
    for at in range(0, len(block), HOLE):
        empty = block[at:at + HOLE] == nothing[:len(block) - at]
        if empty != hole and at:
            yield hole, view[start:at]
            start = at
        hole = empty
    yield hole, view[start:]


class Link:
    """A source file with a second name at the target, held by a read lease until the first is
    gone: meanwhile a writer waits who would show half of it there."""

    MOST = 400                      # of the 1,024 descriptors a process usually has
    FREE = [None] * MOST            # one is taken out for each that is kept

    def __init__(self, path, entry):
        self.path = path            # the second name
        self.inode = entry.dev, entry.ino
        self.fd = None              # if there is a lease, and a descriptor to spare for it
        self.taken_back = False

    def keep(self, fd):
        """Keep this descriptor, which has the lease, if there are not too many of them already."""
        try:
            self.FREE.pop()
            self.fd = fd
        except IndexError:
            os.close(fd)

    def held(self):
        """Hand the descriptor over, for the release: (descriptor or None, whether it has a lease)."""
        fd, self.fd = self.fd, None
        if fd is not None:
            self.FREE.append(None)
        return fd, fd is not None

    def broken(self):
        """Whether a writer waits."""
        return self.fd is not None and lease_broken(self.fd)

    def take_back(self):
        """Remove the second name, if it still is one of this file."""
        with contextlib.suppress(OSError):
            info = os.lstat(self.path)
            if (info.st_dev, info.st_ino) == self.inode:
                os.unlink(self.path)
                self.taken_back = True

    def close(self):
        fd, _ = self.held()
        if fd is not None:
            os.close(fd)

    def give_up(self):
        """Its release never came, and perhaps a writer waits."""
        if self.fd is not None:
            if self.broken():
                self.take_back()
            self.close()


class LocalTransport(Staging):
    """Another directory, disk or mounted share.  On one file system a move is a hard link
    and an unlink: no byte is copied, nothing can be overwritten, nothing can be lost."""

    mirrors = True
    directories = 'keep', 'zip'
    takes = 'here chmod'
    target_form = 'here'
    asks_at_once = True
    sees_writers = True
    # mounts that say of a file that it is written before the server has it: davfs2 is plain
    # "fuse" with a URL for a source
    UPLOADS_LATER = (b'davfs', b'fuse.davfs', b'fuse.rclone', b'fuse.geesefs', b'fuse.onedriver')
    SYNCED_AT_ONCE = (b'btrfs', b'ext4', b'tmpfs', b'xfs')      # where syncfs(2) keeps its promise
    SYNC_FROM, SYNC_PATIENCE = 8, 5     # files that it is called for; seconds it may take
    # what rclone's mount lists as another name, or stores under another
    QUOTED = re.compile(rb'[\0-\x1f\x7f]|\xe2\x80\x9b|\xe2\x90[\x80-\xa1]')
    CANNOT = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
    AWAY = (errno.EROFS, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.EMFILE,
            errno.ENFILE, errno.ENOMEM)     # the target's trouble, whatever the name

    def __init__(self, *args, **kwargs):
        Staging.__init__(self, *args, **kwargs)
        self.base = os.path.join(to_bytes(self.stream.target_base), b'')
        self.root = os.path.join(self.stream.root, b'')
        self.renamed = set()        # directories there whose new names are not on the disk yet
        self.held = {}              # final name -> (identity here, mtime_ns there) of one content
        self.leases = Leases(self.stream)
        self.links = []             # every Link since the connection was made
        self.cleared = []           # what mirror_delete removed to make way
        self.mounted = False        # whether target_dir was a mount point when it was opened last
        self.listed = {}            # directory here -> (mtime_ns, {folded name: names in it})
        self.begin()

    def begin(self):
        """What is learned of the target is forgotten with the connection."""
        self.made.clear()
        self.apart.clear()
        self.traits.clear()
        self.shown.clear()
        # to publish: {b'': on the file system of target_dir, directory: in one that lies beyond}
        self.ways = collections.defaultdict(lambda: [rename_exclusively, link_and_unlink, look_and_rename])
        self.deletes = False        # until one went
        self.together = None        # whether syncfs may be used
        self.beyond = set()         # directories that lie on another file system than target_dir
        self.notes = os.path.join(self.area, b'beyond')
        self.identity = self.device = self.kind = None

    def path(self, relative):
        return self.base + relative

    def directory_trouble(self):
        return directory_trouble('the target directory', self.path(b''), self.stream.create_directories)

    def open(self):
        self.begin()
        trouble = self.directory_trouble()
        if trouble and trouble[0] == errno.ENOENT and self.stream.create_directories:
            try:
                os.makedirs(self.path(b''), exist_ok=True)
            except OSError as error:
                raise self.trouble('cannot make', error)
        elif trouble:
            raise TargetError(*trouble[1:])
        self.identity = self.whereabouts()
        mounted = os.stat(self.path(b'..')).st_dev != self.identity[0]
        if self.mounted and not mounted:
            raise TargetError('the target directory %s is no mount point any more' % show(
                self.stream.target_base), 'mount the disk; if this is meant, start this program again')
        self.mounted = mounted
        self.device = self.identity[0]
        with contextlib.suppress(OSError):
            if self.stream.move and os.stat(self.stream.root).st_dev == self.device:
                self.PART_FILES = min(type(self).PART_FILES, Link.MOST)     # all of a part is held
        self.refuse_late_uploads()

    def whereabouts(self):
        """Which directory target_dir is.  Raises TargetError if it is none, or lacks its marker."""
        marker = self.stream.target_marker
        try:
            if marker:
                os.lstat(self.path(to_bytes(marker)))
            info = os.stat(self.path(b''))
            return info.st_dev, info.st_ino
        except OSError as error:
            trouble = self.directory_trouble()
            if not trouble and error.errno == errno.ENOENT:
                trouble = 0, '%s is missing in %s' % (marker, show(self.stream.target_base)), \
                    'is the disk mounted there?'
            raise TargetError(*trouble[1:]) if trouble else self.trouble('cannot look at', error)

    def stay(self):
        """Raises TargetError if target_dir is not what it was: a disk that is unmounted uncovers
        a directory that takes files as well."""
        if self.whereabouts() != self.identity:
            raise TargetError('the target directory %s is another one than a moment ago' % show(
                self.stream.target_base), 'was a disk mounted or unmounted there?')

    def refuse_late_uploads(self):
        """What is read back from a mount that uploads later comes from its cache and proves nothing."""
        kind, source = file_system(self.device, mounts())
        if kind == b'fuse' and source.startswith((b'http://', b'https://')):
            kind = b'davfs'
        self.kind = kind
        if kind not in self.UPLOADS_LATER or self.stream.target_uploads_later == 'accepted':
            return
        message = '%s is a mount that may upload later (%s): what is read back there proves nothing' % (
            show(self.stream.target_base), to_text(kind))
        if self.stream.move:
            raise TargetError(message, "use the server's own protocol, or set target_uploads_later = "
                              'accepted and keep_delivered')
        log.once(message, self.stream)

    def refusal(self, entries):
        """WebDAV carries names in XML (RFC 4918): of any other name, what a mount shows is its cache,
        and the server has another one.  rclone takes some characters for others, in either direction."""
        webdav = self.kind and self.kind.endswith(b'davfs')
        for entry in entries if webdav or self.kind == b'fuse.rclone' else ():
            path = entry.path
            if re.search(rb'[\0-\x1f]' if webdav else self.QUOTED, path) or \
                    path.decode('utf-8', 'ignore').encode() != path:
                return Unfit('%s cannot be sent: %s carries no such name' % (
                    show(path), 'WebDAV' if webdav else 'a mount by rclone'), 'rename it')
        return None

    def close(self):
        links, self.links = self.links, []
        for link in links:
            link.give_up()

    def trouble(self, what, error):
        hint = 'unmount it and mount it again' if error.errno in (
            errno.ENOTCONN, errno.ESTALE, errno.ENODEV) else ''
        return TargetError('%s %s: %s' % (what, show(error.filename or self.stream.target_base),
                                          error.strerror), hint)

    def present(self, names):
        found = set()
        for name in names:
            try:
                os.lstat(self.path(name))
                found.add(name)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise self.trouble('cannot look at', error)
        trouble = self.directory_trouble()
        if trouble:
            raise TargetError(*trouble[1:])
        return found

    def make_directories(self, paths):
        for path in paths:
            try:
                mode = self.stream.target_chmod and self.stream.target_chmod[1]
                for step in prefixes(path):
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(self.path(step), 0o700 if path == self.area else 0o777)
                        if mode and path != self.area:
                            os.chmod(self.path(step), mode)
            except OSError as error:
                raise ItemError('cannot make %s: %s' % (show(self.path(path)), error.strerror))

    def stage(self, batch, jobs):
        self.stay()
        self.links = [link for link in self.links if link.fd is not None]
        self.overlaps = False           # unless there is something to copy
        with self.synced_together(jobs) as together:
            for job in jobs:
                self.stop.check()
                self.stage_one(batch, job, together)
        self.hold_back(batch)

    def hold_back(self, batch):
        """An item of which a file is being written, or has changed, waits as a whole."""
        if not any(isinstance(job.error, Changed) for job in batch.jobs):
            return
        for _, mine in self.jobs_by_parcel(batch):
            why = next((job.error for job in mine if isinstance(job.error, Changed)), None)
            for job in mine if why else ():
                job.error = job.error or why
                self.delete([job.staged] if job.staged else ())

    def stage_one(self, batch, job, together):
        # two sums have one size, and may be of one second
        job.equal = self.stream.mirror and not batch.about and self.looks_like(job.entry, job.final, True)
        with job.own_faults():
            if job.equal:
                self.progress.sent(job.entry.size)
            elif job.linked:
                job.linked = None
                job.linked = self.hold(job)
                self.progress.sent(job.entry.size)
            else:
                self.overlaps = True
                if parent_of(job.final) in self.beyond:
                    job.staged = self.beside(job)
                self.copy(batch, job, not together or parent_of(job.final) in self.beyond)

    @contextlib.contextmanager
    def synced_together(self, jobs):
        """Whether one syncfs(2) follows for all files, which must not be synced one by one.  It
        waits for the data of strangers, too, so never while a lease makes somebody wait."""
        fd = self.begin_together() if len(jobs) >= self.SYNC_FROM and not any(
            job.linked for job in jobs) else None
        try:
            yield fd is not None
            if fd is not None:
                self.sync_together(fd, [job for job in jobs if not (job.error or job.equal)])
        finally:
            if fd is not None:
                os.close(fd)

    def begin_together(self):
        """A descriptor for syncfs, opened before the first write: it tells of errors since then.
        None where it would not (Linux before 5.8) or does nothing (FUSE)."""
        if self.together is None:
            numbers = re.match(r'(\d+)\.(\d+)', os.uname().release) if hasattr(os, 'uname') else None
            self.together = bool(numbers) and sys.platform.startswith('linux') and \
                tuple(map(int, numbers.groups())) >= (5, 8) and \
                file_system_type(self.device, mounts()) in self.SYNCED_AT_ONCE
        return os.open(self.path(self.area), os.O_RDONLY | os.O_DIRECTORY) if self.together else None

    def sync_together(self, fd, jobs):
        started = time.monotonic()
        try:
            c_call('syncfs', fd)
        except OSError as error:
            log.debug('syncfs: %s' % error.strerror, self.stream)
            self.together = False
            for job in jobs:
                self.sync_one(job)
        if time.monotonic() - started > self.SYNC_PATIENCE:
            self.together = False       # somebody else writes much there

    def sync_one(self, job):
        try:
            sync_file(self.path(job.staged))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(self.path(job.staged))
            job.error = self.cannot_write(job, error)

    def hold(self, job):
        """A Link for what is about to get its second name.  Raises Changed, ItemError."""
        fd = open_entry(self.root, job.entry, True)
        leased = self.leases.take(fd)
        link = Link(self.path(job.final), job.entry)
        if leased:
            link.keep(fd)
            self.links.append(link)
        else:
            os.close(fd)
        if leased is False:
            raise Changed('%s is open for writing' % show(job.entry.path))
        return link

    def up_to_date(self, item, subdir, watch):
        for entry in item.entries if watch else ():
            watch.add(self.base + os.path.dirname(os.path.join(subdir, entry.path)))
        for entry in item.entries:
            if not self.looks_like(entry, os.path.join(subdir, entry.path) if subdir else entry.path):
                return False
        return True

    def looks_like(self, entry, final, connected=False):
        """Mirror: equal by kind, size and mtime, like rsync's quick check; a link by its aim.  What a reader
        took is not missing."""
        try:
            info = os.lstat(self.base + final)
            if KINDS.get(stat.S_IFMT(info.st_mode)) != entry.kind:
                return False
            if entry.kind == 'l':
                return os.readlink(self.base + final) == os.readlink(self.root + entry.path)
            return (info.st_size == entry.size or entry.kind == 'd') and (
                info.st_mtime_ns == entry.mtime_ns or self.same_time(entry, info, connected) or
                self.held.get(final) == (entry.identity, info.st_mtime_ns))
        except FileNotFoundError:
            return entry.kind == 'f' and entry in self.taken
        except OSError:
            return False

    def same_time(self, entry, info, connected):
        """Whether the time there is the one here, as far as the target keeps times: within the
        seconds that it is off, or not older where it does not take them at all."""
        off = abs(info.st_mtime_ns // 10 ** 9 - entry.mtime_ns // 10 ** 9)
        if not off:
            return True
        known = self.trait('times') if connected else self.traits.get(('times',), 0)
        return info.st_mtime_ns >= entry.mtime_ns if known is None else off <= known

    def try_times(self):
        """Set a time and read it back: how many seconds it is off, or None if it is not kept."""
        odd = 1234567891
        try:
            with self.tiny() as tiny:
                os.utime(self.path(tiny), (odd, odd))
                off = abs(os.stat(self.path(tiny)).st_mtime - odd)
                return int(off + 0.999) if off < 3 else None
        except (OSError, ItemError):
            return None

    def can_link(self, batch, entry):
        if not self.stream.move or batch.root != self.stream.root or entry.dev != self.device or \
                self.stream.target_chmod or self.beyond and parent_of(batch.final(entry.path)) in self.beyond:
            return False
        known = self.traits.get(('source_links',))
        return self.trait('source_links') if known is None else known

    def try_source_links(self):
        """Whether a link from the source to the staging area is one file with two names: not so
        between two mounts, without hard links, or where each name has an inode of its own."""
        there = self.path(os.path.join(self.area, b'link'))
        try:
            with marked(self.stream.root) as marker:
                here = self.root + marker
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(there)
                os.link(here, there)
                try:
                    info = os.lstat(here)
                    return os.path.samestat(info, os.lstat(there)) and info.st_nlink == 2
                finally:
                    os.unlink(there)
        except OSError:
            return False

    def copy(self, batch, job, durable=True):
        """Copy to the staged name, fsync, set time and mode; job.digest is what was read.
        Raises ItemError, Changed; what was begun is removed then."""
        import hashlib
        digest = hashlib.sha256() if job.hashed else None
        fd = open_entry(batch.root, job.entry) if batch.root != self.stream.root else \
            self.leases.open_quiet(batch.root, job.entry)
        try:
            out = self.create(job)
            try:
                self.copy_into(job, fd, out, digest)
                if durable:
                    os.fsync(out)
                dated = self.kind == b'fuse.rclone' and self.date(out, job.entry)
            finally:
                os.close(out)
            self.dress(job, dated)
        except (MoverError, OSError) as error:
            with contextlib.suppress(OSError):
                os.unlink(self.path(job.staged))
            raise self.cannot_write(job, error) if isinstance(error, OSError) else error
        finally:
            os.close(fd)
        job.digest = digest and digest.hexdigest()

    def create(self, job):
        """A descriptor of the staged file, new and empty.  Raises OSError."""
        path, mode = self.path(job.staged), job.entry.mode & 0o777 | 0o600
        try:
            return os.open(path, CREATE_FLAGS, mode)
        except FileExistsError:         # a crash left it
            os.unlink(path)
            return os.open(path, CREATE_FLAGS, mode)

    def copy_into(self, job, fd, out, digest):
        size = job.entry.size
        holes = size >= SPARSE_FROM and has_holes(fd)

        def write(block):
            if digest:
                digest.update(block)
            for is_hole, piece in split_holes(block) if holes else ((False, memoryview(block)),):
                if is_hole:
                    os.lseek(out, len(piece), os.SEEK_CUR)
                while piece and not is_hole:
                    piece = piece[os.write(out, piece):]
            self.progress.sent(len(block))
            self.throttle.spend(len(block))

        if digest or holes or self.throttle.limit or not self.copy_inside(job, fd, out):
            copy_entry(b'', job.entry, write, self.stop, 0, fd)
            if holes:
                os.ftruncate(out, size)

    def cannot_write(self, job, error):
        """What it means that a file could not be written to the staging area."""
        if error.errno in NO_SPACE:
            return NoRoom('no room for %s (%s) in %s' % (show(job.final), format_size(
                job.entry.size), show(self.stream.target_base)), 'make room there')
        if error.errno == errno.EFBIG:
            return ItemError('%s: %s' % (show(job.final), error.strerror))
        return self.trouble('cannot write', error)

    def copy_inside(self, job, fd, out):
        """Let the kernel copy (copy_file_range(2)), which may only have to share the blocks.
        False if it would not; then the plain way finds out whose fault that is."""
        if not hasattr(os, 'copy_file_range'):
            return False
        try:
            left, count = job.entry.size, True
            while left and count:
                self.stop.check()
                count = os.copy_file_range(fd, out, min(left, 16 * BLOCK))
                left -= count
                self.progress.sent(count)
            if not job.entry.same_as(os.fstat(fd)):
                raise Changed('%s changed while it was read' % show(job.entry.path))
            if os.fstat(out).st_size == job.entry.size:
                return True
        except OSError as error:
            log.debug('copy_file_range: %s' % error.strerror, self.stream)
        os.lseek(fd, 0, os.SEEK_SET)
        os.ftruncate(out, 0)
        os.lseek(out, 0, os.SEEK_SET)
        return False

    @staticmethod
    def date(fd, entry):
        """Before a close that uploads (rclone, --vfs-write-back 0s): a time that is set afterwards breaks
        the upload, and what is then renamed while it is tried again keeps its staged name there.
        Whether it could be done."""
        try:
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
            return True
        except (OSError, TypeError):
            return False

    def dress(self, job, dated=False):
        path, ns = self.path(job.staged), job.entry.mtime_ns
        try:
            if not dated:
                os.utime(path, ns=(ns, ns))
        except OSError as error:
            if error.errno not in self.CANNOT:
                raise
            log.once('%s does not take times' % target_of(self.stream), self.stream)
        if self.stream.target_chmod:
            self.set_mode(path, self.stream.target_chmod[0])
        elif job.entry.mode & 0o600 != 0o600:       # what it was made with to be written
            self.set_mode(path, stat.S_IMODE(os.lstat(path).st_mode) & job.entry.mode)

    def set_mode(self, path, mode):
        """A mode that target_chmod asks for and that cannot be had is an error."""
        try:
            os.chmod(path, mode)
        except OSError as error:
            if self.stream.target_chmod or error.errno not in self.CANNOT:
                raise
            log.once('%s does not take modes' % target_of(self.stream), self.stream)

    def measure(self, paths, hashed):
        if hashed:
            return self.read_back(paths)
        found = {}
        for path in paths:
            self.stop.check()
            try:
                info = os.lstat(self.path(path))
            except OSError:
                continue
            if stat.S_ISREG(info.st_mode):
                found[path] = info.st_size, None
        return found

    def read_back(self, paths):
        """{path: (size, SHA-256)} of those that are files, as the disk holds them."""
        found = {}
        with contextlib.closing(self.opened_ahead(paths)) as files:
            for path, fd in files:
                try:
                    info = os.fstat(fd)
                    if stat.S_ISREG(info.st_mode):
                        found[path] = info.st_size, self.hash_of(fd, info.st_size)
                except OSError as error:
                    raise self.trouble('cannot read back', error)
                finally:
                    os.close(fd)
        return found

    AHEAD = 16                      # files that the disk is asked for while another is read

    def opened_ahead(self, paths):
        """Yield (path, descriptor) of those that are there, each to be closed by who gets it.  No link
        is followed, no FIFO waited for."""
        opened = collections.deque()
        try:
            for path in paths:
                try:
                    opened.append((path, os.open(self.path(path), OPEN_FLAGS)))
                    ask_disk(opened[-1][1])
                except OSError:
                    pass                # it is missing, or its fault is seen when it is read
                if len(opened) > self.AHEAD:
                    yield opened.popleft()
            while opened:
                yield opened.popleft()
        finally:
            close_all(fd for _, fd in opened)

    def hash_of(self, fd, size):
        import hashlib
        digest, left = hashlib.sha256(), size
        while left >= 0:                # what is longer has another hash by its next byte
            self.stop.check()
            asked = min(BLOCK, left + 1)
            block = os.read(fd, asked)
            digest.update(block)
            left -= len(block)
            if not block or not left and len(block) < asked:
                break
        return digest.hexdigest()

    def place(self, jobs):
        done = {job for job in jobs if self.place_one(job)}
        self.renamed.update(parent_of(job.final) for job in done if not job.error)
        return done

    def place_one(self, job):
        """False if the name was taken; True if the job has it, or an error that says why not."""
        try:
            if job.linked:
                try:
                    return self.place_link(job)
                except OSError as error:
                    log.debug('link %s: %s' % (show(job.final), error.strerror), self.stream)
                    self.copy_instead(job)
            try:
                return self.publish(job.staged, job.final)
            except OSError as error:
                if error.errno != errno.EXDEV or not job.staged.startswith(self.area + b'/'):
                    raise
            self.move_beside(job)
            return self.publish(job.staged, job.final)
        except OSError as error:
            job.error = self.cannot_name(job.final, error)
        except (Changed, ItemError) as error:
            job.error = error
        return True

    def place_link(self, job):
        """Raises OSError where there can be no link; Changed."""
        source, final = self.root + job.entry.path, self.path(job.final)
        try:
            os.link(source, final, follow_symlinks=False)
        except FileExistsError:
            return False
        try:
            found = os.lstat(final)
            if job.entry.is_at(found):
                return True
        except FileNotFoundError:       # a reader was quicker
            found = None
        here = os.lstat(source)
        if found and os.path.samestat(found, here):
            os.unlink(final)            # what was put into the source's place, or is written to
        elif job.entry.is_at(here):     # what has the name now is somebody else's
            job.taken = True
            return True
        raise Changed('%s was replaced' % show(job.entry.path))

    def copy_instead(self, job):
        """No link to this file, or from there: another disk after all, a file of somebody else."""
        job.linked.close()
        job.linked = None
        job.staged = self.beside(job) if parent_of(job.final) in self.beyond else self.staged_name(job.entry)
        batch = Batch(self.stream.root, b'', ())
        self.copy(batch, job)
        self.verify(batch, [job])
        if job.error:
            raise job.error

    def publish(self, old, new):
        """Whether a file of ours was given that name, without overwriting; False: it was taken.
        Raises OSError."""
        ways = self.ways[parent_of(new) if parent_of(new) in self.beyond else b'']
        old, new = self.path(old), self.path(new)
        for way in list(ways):
            try:
                way(old, new)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno in self.AWAY or way is look_and_rename:
                    raise
                continue
            # what did not do where another did is not tried again
            del ways[:ways.index(way)]
            return True

    def beside(self, job):
        name = os.path.basename(self.staged_name(job.entry))
        return os.path.join(parent_of(job.final), self.area + b'-' + name)

    def move_beside(self, job):
        """Another file system or a subvolume begins below target_dir: what is staged goes on to
        there, under a name of ours beside the final one.  Raises OSError, ItemError."""
        import shutil
        directory, old = parent_of(job.final), self.path(job.staged)
        if directory not in self.beyond:
            with open(self.path(self.notes), 'ab') as notes:        # for delete_area()
                notes.write(directory + b'\0')
                os.fsync(notes.fileno())
            self.beyond.add(directory)
        job.staged = self.beside(job)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(job.staged))
        fd = os.open(self.path(job.staged), os.O_WRONLY | os.O_CREAT | os.O_EXCL,
                     job.entry.mode & 0o777 | 0o600)
        with os.fdopen(fd, 'wb') as target, open(old, 'rb') as source:
            shutil.copyfileobj(source, target, BLOCK)
            target.flush()
            os.fsync(fd)
        self.dress(job)
        os.unlink(old)
        self.verify(None, [job])
        if job.error:
            raise job.error

    def cannot_name(self, name, error):
        """What it means that a name could not be given: mostly that the target has no such names.
        Raises TargetError."""
        if error.errno in self.AWAY:
            raise self.trouble('cannot rename', error)
        if error.errno in NO_SPACE:
            return NoRoom('no room for the name %s in %s' % (show(name), show(self.stream.target_base)))
        return ItemError('%s cannot be placed: %s' % (show(self.path(name)), error.strerror),
                         'can that file system hold such a name? may this account write there?')

    def exists(self, path):
        try:
            os.lstat(self.path(path))
            return True
        except OSError as error:
            return False if error.errno in (errno.ENOENT, errno.ENOTDIR) else None

    def names_taken(self, _jobs):
        return ()           # place() never overwrites

    lists = True

    def listing(self, directory):
        try:
            return set(os.listdir(self.path(directory)))
        except OSError:
            return None

    def write_small(self, path, content):
        try:
            with open(self.path(path), 'xb') as handle:
                handle.write(content)
        except OSError as error:
            raise ItemError('cannot write %s: %s' % (show(path), error.strerror))

    def rename(self, old, new):
        try:
            os.rename(self.path(old), self.path(new))
        except OSError as error:
            raise ItemError('cannot rename %s to %s: %s' % (show(old), show(new), error.strerror))

    def settle_conflict(self, batch, job, twin):
        final = self.path(job.final)
        if self.exists(job.final) is False and self.place_one(job):
            if job.error:
                raise job.error
            return                      # a reader has taken away what was there
        if self.stream.mirror and (os.path.islink(final) or os.path.isdir(final)):
            self.make_way(batch, job.entry)
            self.overwrite(job)
            return
        if job.linked and self.is_linked(job):
            self.check_apart(job)
            return                      # a crash came between the link and the release
        Staging.settle_conflict(self, batch, job, twin)

    def is_linked(self, job):
        """Whether the file itself has its final name; a reader may take that away at any time."""
        with contextlib.suppress(OSError):
            return job.entry.is_at(os.lstat(self.path(job.final)))
        return False

    def keep_identical(self, job):
        """Ours, which is on the disk, takes the place of what may not be yet.  A mirror takes over
        the time, and remembers what became of it, so as not to ask again."""
        if self.stream.move:
            self.overwrite(job)
            return
        job.equal = True
        self.delete([job.staged])
        final = self.path(job.final)
        with contextlib.suppress(OSError):
            with contextlib.suppress(PermissionError):
                os.utime(final, ns=(job.entry.mtime_ns, job.entry.mtime_ns))
            info = os.lstat(final)
            if info.st_mtime_ns // 10 ** 9 != job.entry.mtime_ns // 10 ** 9:    # not ours, or it takes none
                self.held[job.final] = job.entry.identity, info.st_mtime_ns

    def check_twins(self, batch, entry):
        """Mirror: where the target takes two names of the source for one, the first to come has it;
        else each pass would replace, or back up, the one by the other.  Raises Unfit."""
        for other in self.twins_here(entry.path) if self.stream.mirror and self.trait('folds') else ():
            final = batch.final(other)
            with contextlib.suppress(OSError):
                twin, there = Entry.of(other, os.lstat(self.root + other)), os.lstat(self.path(final))
                alike = twin.kind == 'd' and stat.S_ISDIR(there.st_mode) or self.looks_like(twin, final, True)
                if alike and not (self.is_listed(final) and self.is_listed(batch.final(entry.path))):
                    raise one_name_there(entry.path, other)

    def is_listed(self, path):
        """Whether a path at the target is spelled so in the listings there."""
        return all(os.path.basename(step) in (self.listing(parent_of(step)) or ()) for step in prefixes(path))

    def twins_here(self, path):
        """The other paths at the source that folded() makes the same."""
        found = [b'']
        for part in path.split(b'/'):
            found = [os.path.join(top, name) for top in found
                     for name in self.names_here(top).get(folded(part), ())]
        return sorted(set(found) - {path})

    def names_here(self, top):
        """{folded name: names} of a directory at the source; a few are remembered."""
        try:
            changed = os.stat(self.root + top).st_mtime_ns
            if self.listed.get(top, (None,))[0] != changed:
                names = {}
                for name in os.listdir(self.root + top):
                    names.setdefault(folded(name), []).append(name)
                if len(self.listed) > 20:
                    self.listed.clear()
                self.listed[top] = changed, names
            return self.listed[top][1]
        except OSError:                 # a file, or gone
            return {}

    def make_way(self, batch, entry):
        """Mirror: what is there is of another kind now.  Raises ItemError; a directory with
        content stays, whatever on_conflict says."""
        self.check_twins(batch, entry)
        name = batch.final(entry.path)
        path, step = self.path(name), conflict_step(self.stream, name)
        if step == 'refuse':
            raise refused_conflict(name)
        try:
            if step == 'backup':
                os.rename(path, stamped(path))
            elif os.path.isdir(path) and not os.path.islink(path):
                if self.stream.mirror_delete:       # what was in it is gone here
                    self.cleared += self.remove_below(name, lambda path: protected(path, self.stream))
                os.rmdir(path)
            else:
                os.unlink(path)
        except OSError as error:
            raise ItemError('%s is in the way: %s' % (show(path), error.strerror), 'rename or remove it')
        log.info('%s was of another kind at the target and was replaced' % show(name), self.stream)

    def sync(self):
        directories, self.renamed = self.renamed, set()
        for directory in directories:
            try:
                sync_directory(self.path(directory))
            except OSError as error:
                raise self.trouble('cannot sync', error)

    def overwrite(self, job):
        try:
            beyond = self.lies_beyond(parent_of(job.final))
            if job.linked and beyond:
                self.copy_instead(job)
            elif job.linked:
                self.link_staged(job)
            if beyond and job.staged.startswith(self.area + b'/'):
                self.move_beside(job)
        except OSError as error:
            raise self.cannot_name(job.final, error)
        self.rename(job.staged, job.final)
        self.renamed.add(parent_of(job.final))

    def lies_beyond(self, directory):
        return os.stat(self.path(directory)).st_dev != self.device

    def link_staged(self, job):
        """Raises Changed, ItemError."""
        job.staged = self.staged_name(job.entry)
        staged = self.path(job.staged)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staged)           # a crash left it
            os.link(self.root + job.entry.path, staged)
        except OSError:
            self.copy_instead(job)
            return
        if not job.entry.is_at(os.lstat(staged)):
            os.unlink(staged)
            raise Changed('%s was replaced' % show(job.entry.path))

    def delete(self, paths):
        for path in paths:
            try:
                os.unlink(self.path(path))
                self.deletes = True
            except FileNotFoundError:
                pass
            except OSError as error:    # what cannot be deleted stays: tidy() says so
                if error.errno in self.AWAY:
                    raise self.trouble('cannot delete', error)
                self.deletes = False

    def outcomes(self, batch):
        for job in batch.jobs:
            if job.linked and not job.error and job.linked.broken():
                job.linked.take_back()
                job.error = Changed('%s is being written again' % show(job.entry.path))
            if job.linked and job.error:
                job.linked.close()
        return Staging.outcomes(self, batch)

    def finish(self, batch):
        """Directories first, with their times last; then files as everywhere, and symlinks."""
        self.stay()
        blocked = {}                    # directories that cannot be had, and all below them
        inner = [e for e in batch.entries if e.kind == 'd']
        for entry in inner:
            error = blocked.get(parent_of(entry.path)) or self.make_inner(batch, entry)
            if error:
                blocked[entry.path] = error
        for job in batch.jobs if blocked else ():
            job.error = job.error or blocked.get(parent_of(job.entry.path))
        answers = Staging.finish(self, batch)
        self.stay()
        links = {e.path: blocked.get(parent_of(e.path)) or self.copy_link(batch, e)
                 for e in batch.entries if e.kind == 'l'}
        for entry in reversed(inner):
            if entry.path not in blocked:
                with contextlib.suppress(OSError):
                    os.utime(self.path(batch.final(entry.path)), ns=(entry.mtime_ns, entry.mtime_ns))
        return [self.with_links(parcel, answer, links, blocked)
                for parcel, answer in zip(batch.parcels, answers)] if inner or links else answers

    def make_inner(self, batch, entry):
        """Make a directory of an item: an ItemError if it cannot be had."""
        final = batch.final(entry.path)
        path = self.path(final)
        try:
            if os.path.lexists(path) and (os.path.islink(path) or not os.path.isdir(path)):
                # a link may lead anywhere, on purpose: only a person can tell
                if self.stream.move or os.path.isdir(path):
                    raise ItemError('%s: something else has that name at the target' % show(path),
                                    'rename or remove it')
                self.make_way(batch, entry)
            self.ensure([parent_of(final)])
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, entry.mode | 0o700)
                if self.stream.target_chmod:
                    os.chmod(path, self.stream.target_chmod[1])
            return None
        except OSError as error:
            return ItemError('cannot make %s: %s' % (show(path), error.strerror))
        except ItemError as error:
            return error

    @staticmethod
    def with_links(parcel, answer, links, blocked):
        found = [links.get(e.path) or blocked.get(e.path) for e in parcel.entries]
        error = answer.error or next((f for f in found if isinstance(f, MoverError)), None)
        return answer._replace(error=error, sent=answer.sent or any(found))

    def copy_link(self, batch, entry):
        """Mirror a symlink as a link: True if it was made, None if it was there already, an error."""
        final = self.path(batch.final(entry.path))
        staged = self.path(self.staged_name(entry))
        try:
            self.ensure([parent_of(batch.final(entry.path))])
            aim = os.readlink(os.path.join(batch.root, entry.path))
            if os.path.islink(final) and os.readlink(final) == aim:
                return None
            if os.path.lexists(final):
                self.make_way(batch, entry)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staged)
            os.symlink(aim, staged)
            os.replace(staged, final)
            return True
        except OSError as error:
            return ItemError('symlink %s: %s' % (show(entry.path), error.strerror))
        except ItemError as error:
            return error

    def free_space(self):
        try:
            return shutil_free(self.path(b''))
        except OSError as error:
            raise self.trouble('cannot look at', error)

    def delete_area(self):
        import shutil
        with contextlib.suppress(OSError), open(self.path(self.notes), 'rb') as notes:
            for directory in set(notes.read().split(b'\0')[:-1]):
                names = [n for n in os.listdir(self.path(directory)) if n.startswith(self.area + b'-')]
                self.delete(os.path.join(directory, name) for name in names)
        shutil.rmtree(self.path(self.area), ignore_errors=True)
        return not os.path.lexists(self.path(self.area))

    def delete_missing(self, wanted):
        self.stay()
        gone, self.cleared = self.cleared, []
        same = {}                       # folded names of what is kept, if that ever matters

        def stays(relative):
            if relative in wanted or protected(relative, self.stream):
                return True
            if not same:
                same.update((folded(path), path) for path in wanted)
            return folded(relative) in same and self.trait('folds')
        gone += self.remove_below(b'', stays)
        if ('folds',) in self.traits:
            self.tidy()                 # the experiment's: nothing need have been sent in this pass
        return gone

    def remove_below(self, directory, stays):
        """Delete what is below a directory at the target, but what stays(path); the paths."""
        gone, base = [], len(self.path(b''))
        for top, directories, files in os.walk(self.path(directory), topdown=False):
            for name in files + directories:
                path = os.path.join(top, name)
                if stays(path[base:]):
                    continue
                with contextlib.suppress(OSError):
                    if os.path.isdir(path) and not os.path.islink(path):
                        os.rmdir(path)
                    else:
                        os.unlink(path)
                    gone.append(path[base:])
        return gone


def shell_quote(name):
    """shlex.quote for bytes."""
    return b"'" + name.replace(b"'", b"'\"'\"'") + b"'"


KEY_CHANGED = 'the key of that machine has CHANGED: was it set up anew, or does another one answer in its ' \
    'place? ask whoever looks after it before you remove the old key with ssh-keygen -R'
SSH_TROUBLE = (     # what ssh(1) says, in English as programs are run here, and what to do about it
    ('IDENTIFICATION HAS CHANGED', KEY_CHANGED), ('has changed and you have requested', KEY_CHANGED),
    ('Host key verification failed',
     'its host key is not known here: log in once by hand and compare the fingerprint: %(login)s'),
    ('not accessible: No such file', 'there is no such file here%(key)s'),
    ('subsystem request failed', 'its sshd offers no sftp: the sshd_config there lacks the line '
     '"Subsystem sftp internal-sftp"'),
    ('Permission denied', 'it accepts no key or password of ours%(key)s: try by hand: %(login)s'),
    ('Connection refused', 'nothing listens on port %(port)s there: is it up? see target_port'),
    ('Could not resolve', 'is target_host right?'),
    ('banner exchange', 'what answers on port %(port)s speaks no ssh, or not in time: see target_port; '
     'FTP needs transfer_protocol = ftp'),
    ('timed out', 'is that machine up, and port %(port)s open for this one?'),
    ('kex_exchange_identification', 'what answers on port %(port)s is no ssh server, or sends us away: see '
     'target_port'))


def in_brackets(host):
    """A host before a colon, as bytes: an IPv6 address has colons of its own."""
    return to_bytes('[%s]' % host if ':' in host else host)


def ssh_hint(stream, errors):
    """What to do about what ssh said; the command that tries it by hand."""
    import shlex
    words = ['ssh'] + stream.ssh_options
    words += ['-p', str(stream.target_port)] if stream.target_port else []
    words += ['-i', stream.ssh_key] if stream.ssh_key else []
    words += [(stream.username + '@' if stream.username else '') + stream.target_host]
    known = dict(login=' '.join(map(shlex.quote, words)), port=stream.target_port or 22,
                 key=' (ssh_key = %s)' % stream.ssh_key if stream.ssh_key else '')
    return next((hint % known for text, hint in SSH_TROUBLE if text in errors),
                'does it work by hand? ' + known['login'])


class SshConnection:
    """One ssh connection that ssh, scp and rsync share (ssh_config(5), ControlMaster); sftp has its own.

    The master goes to the background by itself and ends a minute after its last client,
    so a kill -9 leaves nothing behind; it inherits none of our descriptors.
    """

    def __init__(self, stream, stop):
        self.stream = stream
        self.stop = stop
        self.directory = None
        self.socket = None
        self.pid = None
        self.prepared = False           # whether the next ssh is to log in and become the master

    BY_PASSWORD = ['-oBatchMode=no', '-oNumberOfPasswordPrompts=1', '-oStrictHostKeyChecking=yes',
                   '-oPreferredAuthentications=password,keyboard-interactive', '-oPubkeyAuthentication=no']
    ASKPASS = r'''#!/bin/sh
# Made by MiStaMover.  Answers a question of ssh for the password, and no other.
question=${1#"("*") "}      # keyboard-interactive: (user@host) and what the server asks
case $question in
    *"'s password: ") ;;
    *[Nn]ew*|*[Oo]ld*|*[Cc]urrent*|*[Rr]etype*|*[Aa]gain*) exit 1 ;;
    [Pp]asswor[dt]*:*) ;;
    *) exit 1 ;;
esac
IFS= read -r line < %s || [ -n "$line" ] || exit 1
line=${line#"$(printf '\357\273\277')"}
printf '%%s\n' "${line%%"$(printf '\r')"}"
'''

    def askpass(self):
        """The environment in which ssh asks a program of ours for the password (ssh(1), SSH_ASKPASS),
        {} for a login by key.  Before OpenSSH 8.4 it is DISPLAY and the new session that make it."""
        if not self.stream.password:
            return {}
        path = os.path.join(self.stream.control_dir, 'askpass')
        make_private_directory(self.stream.control_dir)
        atomic_write(path, to_bytes(self.ASKPASS % to_text(shell_quote(to_bytes(
            self.stream.password_file)))), mode=0o700)
        return {'SSH_ASKPASS': path, 'SSH_ASKPASS_REQUIRE': 'force', 'DISPLAY': ':0'}

    def options(self):
        """Options that ssh and scp understand."""
        stream = self.stream
        interval = max(1, min(15, int(stream.stall_timeout / 4)))
        words = list(stream.ssh_options) + (self.BY_PASSWORD if stream.password else ['-oBatchMode=yes']) + [
            '-oConnectTimeout=%d' % max(1, stream.connect_timeout),
            '-oServerAliveInterval=%d' % interval, '-oServerAliveCountMax=3',
            '-oForwardAgent=no', '-oForwardX11=no', '-oPermitLocalCommand=no',
            '-oClearAllForwardings=yes']
        if stream.target_port:
            words += ['-oPort=%d' % stream.target_port]
        if stream.username:
            words += ['-oUser=' + stream.username]
        if stream.ssh_key:
            words += ['-i', stream.ssh_key.replace('%', '%%')]
        if self.directory:
            words += ['-oControlPath=' + self.control_path().replace('%', '%%')]
        return words

    def control_path(self):
        return os.path.join(self.directory, self.socket)

    def command(self):
        """ssh itself; it becomes a master only when asked to, whatever ssh_config says."""
        return [self.stream.ssh_command, '-T'] + self.options() + (self.MASTER if self.prepared else [])

    MASTER = ['-oControlMaster=auto', '-oControlPersist=60']

    # OpenSSH's PROTOCOL.mux: packets of a length and numbers of 32 bits.  To start an ssh for
    # such a question takes longer than to deliver a file.
    HELLO, ALIVE, TERMINATE = (0x00000001, 4), (0x10000004, 0), (0x10000005, 0)
    IS_ALIVE = 0x80000005

    def control(self, request, path=None):
        """Ask the master for something: its answer as numbers, () if there is none."""
        import socket
        import struct
        try:
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as line:
                line.settimeout(5)
                line.connect(path or self.control_path())
                for numbers in (self.HELLO, request):
                    line.sendall(struct.pack('>%dI' % (1 + len(numbers)), 4 * len(numbers), *numbers))
                with line.makefile('rb') as answers:
                    for _ in range(2):      # its hello, then what was asked
                        size, = struct.unpack('>I', answers.read(4))
                        answer = answers.read(size)
                return struct.unpack('>%dI' % (size // 4), answer)
        except (OSError, struct.error):
            return ()

    def listens(self):
        """Whether somebody has the master's socket open.  What a killed one leaves refuses all, and
        its process number may be another's by now."""
        import socket
        try:
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as line:
                line.settimeout(5)
                line.connect(self.control_path())
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            pass                        # too many wait for it
        return True

    def open(self):
        """Log in, or see that we still are.  Raises TargetError with what ssh said."""
        self.prepare()
        if self.prepared:
            done = run(self.command() + ['-f', '-N', '--', self.stream.target_host], self.stop,
                       self.stream.connect_timeout + 10)
            self.logged_in(done, done.code != 0)

    def prepare(self):
        """Unless we still are logged in, the next ssh is to do so.  For who has a use for it: the first
        words of a second ssh would be held up for 40 ms (RFC 896 there, RFC 1122 4.2.3.2 here)."""
        if WINDOWS:
            return                  # no shared connections there: each program logs in itself
        if self.directory:
            if self.control(self.ALIVE)[:1] == (self.IS_ALIVE,):
                return
            self.close()
        self.directory = self.stream.control_dir
        # a name of its own: an ssh that a kill -9 orphaned while it logged in would otherwise
        # find the name taken, be no master, and never end
        self.socket = to_text(random_hex(3))
        if len(self.control_path()) > CONTROL_PATH_MAX:
            import tempfile
            self.directory = tempfile.mkdtemp(prefix='mistamover-')
        make_private_directory(self.directory)
        for name in os.listdir(self.directory):     # left by a killed run, perhaps for another host
            path = os.path.join(self.directory, name)
            self.control(self.TERMINATE, path)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self.prepared = True

    def logged_in(self, done, failed):
        """done: how that ssh ended, or the rsync that had started it.  Raises TargetError."""
        answer = self.control(self.ALIVE)
        if answer[:1] == (self.IS_ALIVE,):
            self.pid = answer[2]
        elif failed:
            said = brief([line for line in done.lines if not line.startswith('rsync')])
            raise TargetError('cannot log in to %s: %s' % (
                self.stream.target_host, said or 'ssh ended with %d' % done.code),
                ssh_hint(self.stream, said))
        self.prepared = False

    def close(self):
        if not self.directory:
            return
        import shutil
        if not self.control(self.TERMINATE) and self.pid and self.listens():
            with contextlib.suppress(OSError):
                os.kill(self.pid, 15)       # it hangs: no ssh client would ever reach it again
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory = self.pid = None
        self.prepared = False


def unescaped(name):
    """A name as rsync prints it in the C locale, with its bytes again (rsync(1), -8)."""
    return re.sub(rb'\\#([0-7]{3})', lambda m: bytes([int(m.group(1), 8)]), name) \
        if b'\\' in name else name


class Rows(dict):
    """{path: (row, checksum)} of what an rsync with --out-format=%i|%C|%n says, as it says it."""

    ROW = re.compile(rb'^([<>ch.*][fdLDS].{9}|\*\w+ *)\|([0-9a-f ]*)\|(.*)$', re.M)
    PROGRESS = re.compile(rb'^ *(\d[\d,.]*) +\d+%', re.M)       # of --info=progress2: bytes so far

    def __init__(self, progress=None):
        dict.__init__(self)
        self.progress = progress
        self.before = progress and progress.sent_bytes
        self.rest = b''

    def hear(self, piece):
        lines, _, self.rest = (self.rest + piece).replace(b'\r', b'\n').rpartition(b'\n')
        for row, checksum, name in self.ROW.findall(lines):
            self.note(unescaped(name).rstrip(b'/') or b'.', row, checksum)
        for count in self.PROGRESS.findall(lines)[-1:] if self.progress else ():
            self.progress.sent_bytes = self.before + int(re.sub(rb'\D', b'', count))

    def note(self, name, row, checksum):
        self[name] = row, checksum.strip()


class Answers(Rows):
    """The rows of a dry run that asks about some paths: with a good one for each, nothing is left to
    be said."""

    def __init__(self, paths, good):
        Rows.__init__(self)
        self.open = set(paths)
        self.good = good                # of a row, whether it is the one that is hoped for

    def note(self, name, row, checksum):
        Rows.note(self, name, row, checksum)
        if self.good(row):
            self.open.discard(name)

    def hear(self, piece):
        Rows.hear(self, piece)
        return not self.open


def is_equal(row):
    """Whether a row says that a path is the same at both ends, in all that was compared but times."""
    return row[:2] in (b'.f', b'.d', b'.L') and row[2:4] in (b'  ', b'..')


class Push(Rows):
    """The rows of an rsync, or what an rclone reports, that sends a batch.  It says a name when
    its bytes have gone, so that what has gone is proven and released while the rest is under
    way: in parts, of which each is whatever went while the one before was proven.  Of a row only
    its first letter is kept: < or c for sent, . for left alone."""

    SENT = (b'<', b'c')
    PART_AFTER = 1              # second, or half of it while most is to come: what is sent sooner is proven
                                # in one go, by one login of rsync
    PART_FILES = 1000           # at least, for each part costs such a login
    MOST_PARTS = 5              # by number of files
    PART_SIZE = 1 << 30         # or as many bytes

    def __init__(self, batch, hand_on, progress):
        Rows.__init__(self, progress)
        self.batch, self.hand_on = batch, hand_on
        self.awaited = {e.path: parcel for parcel in batch.parcels for e in parcel.entries}
        self.left = {id(parcel): len(parcel.entries) for parcel in batch.parcels
                     if len(parcel.entries) > 1}
        self.part_files = max(self.PART_FILES, len(self.awaited) // self.MOST_PARTS)
        self.gone = []              # parcels whose last name has gone, for the next part
        self.files = self.size = 0  # of these
        self.since = time.monotonic()
        self.late = []              # parcels that were not there yet when their part was proven
        self.twins = {}             # name -> Unfit: the target takes it for another that has gone
        self.last = None            # the part that holds all that was left at the end
        self.done = None            # how rsync ended
        self.said = []              # what it, and those that proved it, wrote to standard error
        batch.jobs = self

    def note(self, name, row, _checksum):
        self[name] = row[:1]
        parcel = self.awaited.pop(name, None)
        if parcel is None:
            return
        left = self.left.pop(id(parcel), 1) - 1
        if left:
            self.left[id(parcel)] = left
        else:
            self.gone.append(parcel)
            self.files += len(parcel.entries)
            self.size += parcel.item.size

    def hear(self, piece):
        Rows.hear(self, piece)
        self.offer()

    def offer(self):
        """Hand on what has gone, if it is a part and the part before is finished."""
        if self.hand_on and (self.files >= self.part_files or self.size >= self.PART_SIZE):
            after = self.PART_AFTER / 2 if len(self.awaited) > len(self) else self.PART_AFTER
            if time.monotonic() - self.since >= after and \
                    self.hand_on(self.batch.part(self.gone), True, wait=False):
                self.gone, self.files, self.size = [], 0, 0

    def end(self, done):
        self.done = done
        self.said += done.lines
        return self.remainder()

    def remainder(self):
        """The last part: all that was not handed on."""
        missing = {id(parcel): parcel for parcel in self.awaited.values()}
        self.last = self.batch.part(self.gone + list(missing.values()))
        return self.last


def untouched(root, entry):
    """Whether a file still has the time that the scan saw."""
    try:
        return os.lstat(os.path.join(root, entry.path)).st_mtime_ns == entry.mtime_ns
    except OSError:
        return False


def changed_here(batch, paths):
    """{path: whether it was written in place} of those files that are not what the scan saw any more."""
    changed = {}
    for entry in batch.entries:
        if entry.kind == 'f' and entry.path in paths:
            try:
                info = os.lstat(os.path.join(batch.root, entry.path))
                if not entry.looks_like(info):      # inode numbers may change by themselves (FUSE)
                    changed[entry.path] = (entry.dev, entry.ino) == (info.st_dev, info.st_ino)
            except OSError:
                changed[entry.path] = False
    return changed


class Doubts:
    """Names under which a push that was broken off may have left the bytes of other files, of the
    right size and time (seen from rsync 3.1.3 to 3.5.0): a mirror does not believe these, and they
    are no reason to refuse what belongs there.  On disk from before a push until what it sent is
    proven, for it may outlive this process."""

    def __init__(self, path):
        self.path = path                # a file of names, each ended by a NUL
        self.names = set()              # of earlier pushes
        self.pushes = {}                # id of a Push -> all paths of one that is not proven yet
        self.lock = threading.Lock()    # one batch is proven while the next is sent

    def read(self, root):
        """Raises StateError."""
        self.names = read_names(self.path, root)

    def begin(self, push, paths):
        with self.lock:
            self.pushes[id(push)] = paths
            self.save()

    def dispel(self, proven):
        """Some of what is under way is proven; on disk that shows when its push has ended."""
        with self.lock:
            self.names.difference_update(proven)

    def end(self, push, doubted, proven=()):
        """doubted: what this push may have left wrong, and nobody has proven."""
        with self.lock:
            self.pushes.pop(id(push), None)
            self.names.difference_update(proven)
            self.names.update(doubted)
            self.save()

    def save(self):
        write_names(self.path, [n for group in [self.names] + list(self.pushes.values()) for n in group])


class RsyncTransport(Transport):
    """What rsync over ssh and an rsync daemon have in common (rsync(1)).

    An exit code or the output of a push proves nothing.  What counts is a second run over
    the same names, -n --checksum: a name is delivered if that run names it as equal.
    """

    mirrors = True
    directories = 'keep', 'zip'
    takes = 'network host rsync chmod'

    ENDED = (0, 23, 24)             # all sent, but for single files; after any other end nothing is known
    NO_ROOM = 11                    # errors in file I/O: a full disk, mostly
    REFUSED = 5                     # a daemon would not begin
    UNKNOWN = 1, 4, 12              # an option that it does not know, here or there, mostly
    CUT = 12                        # the other side ended early: rrsync's lock, for one
    OLDEST = 3, 1, 0                # knows what is asked of it here; the target's may be older
    BUSY = 'Another instance of rrsync', 'max connections'      # one at a time is let in, or a few
    BUSY_FOR = 20                   # seconds to wait for the last one to end there: where its client was
                                    # killed, the rsync of a server may stay for 10 (3.5.0)
    lingers = False                 # after its last word it takes long to end
    HINTS = {
        1: 'is rsync too old there, or does it refuse an option?',
        2: 'does the login print something, or is rsync too old there?',
        3: 'is target_dir there?', 4: 'see "refuse options" in the rsyncd.conf there',
        5: 'is the module name right, and the password? does it allow one connection only?',
        10: 'does an rsync daemon listen there? see target_host and target_port',
        11: 'is the disk full, or the quota?', 12: 'is rsync 3.0.9 or newer installed there?',
        14: 'can ssh be started? see ssh_command', 30: 'the network or the target hangs'}
    # the checksums of an empty file
    OF_NOTHING = {b'd41d8cd98f00b204e9800998ecf8427e': 'md5:', b'99aa06d3014798d86001c324468d497f': 'xxh128:'}

    def __init__(self, *args, **kwargs):
        Transport.__init__(self, *args, **kwargs)
        self.version = None
        self.made = {b''}
        self.active = []                # the thread of each rsync under way
        self.pressed = None             # the thread that proves a part of a push, which waits for that
        self.ending = collections.deque(maxlen=8)       # threads with one that has said all
        self.one_at_a_time = False      # whether one was turned away while another of ours was under way
        self.hash = None                # what the checksums in its rows are
        self.times = []                 # options for a target that keeps no exact times
        self.cleared = []               # what mirror_delete took away before a push
        self.doubts = Doubts(self.stream.unproven)

    def remote_shell(self):
        """The -e option, or nothing for a daemon."""
        return []

    def url(self, path):
        """What rsync calls a path at the target."""
        raise NotImplementedError

    @property
    def base(self):
        return to_bytes(self.stream.target_base)

    def secret(self):
        return {}

    def open(self):
        self.made = {b''}
        self.overlaps = not self.one_at_a_time
        if self.version is None:
            self.doubts.read(self.stream.root)
            self.times = self.noted_times()
            with contextlib.closing(Program([self.stream.rsync_command, '--version'], self.stop)) as asked:
                self.log_in()           # meanwhile
                self.version = self.version_of(b''.join(iter(lambda: asked.read(30), b'')))
        else:
            self.log_in()
        if self.version < (3, 2, 4) and re.search(r'[^\w/.,@%+=:-]', self.stream.target_base):
            raise TargetError('rsync %d.%d.%d would let a shell see target_dir' % self.version,
                              'install rsync 3.2.4 or newer, or use plain characters')

    def log_in(self):
        """What comes before the first rsync."""

    def version_of(self, output):
        """The version of our rsync.  Raises StateError if it will not do."""
        match = re.match(rb'rsync +version v?(\d+)\.(\d+)\.(\d+)', output)
        version = tuple(int(n) for n in match.groups()) if match else (0,)
        if version < self.OLDEST:
            name = 'openrsync' if output.startswith(b'openrsync') else \
                'rsync %d.%d.%d' % version if match else 'no rsync that this program knows'
            raise StateError('%s is %s' % (show(self.stream.rsync_command), name),
                             'install rsync %d.%d.%d or newer, and name it in rsync_command' % self.OLDEST)
        return version

    def noted_times(self):
        """What learn_times() found at this target in an earlier run."""
        try:
            with open(self.stream.coarse) as handle:
                target, *options = handle.read().splitlines()
        except (OSError, ValueError):
            return []
        return options if target == target_of(self.stream) else []

    def note_times(self, options):
        self.times = options
        log.info('the target keeps %s: the mirror compares %s there' % (
            ('times to two seconds only', 'within that') if options == ['--modify-window=1'] else
            ('no times', 'checksums')) if options else 'the target keeps times', self.stream)
        with own_files('cannot write %s' % show(self.stream.coarse)):
            atomic_write(self.stream.coarse, to_bytes('\n'.join([target_of(self.stream)] + options)))

    def words(self, root, options, top, quiet_limit):
        """The argument list of an rsync."""
        stream = self.stream
        argv = [stream.rsync_command] + stream.rsync_options + [
            '--times', '--no-recursive', '--dirs', '--no-implied-dirs', '--from0',
            '--files-from=-', '--out-format=' + ('%i|%C|%n' if '--checksum' in options else '%i||%n'),
            '--timeout=%d' % max(2 * stream.stall_timeout, 2 * (quiet_limit or 0), 1)]
        if stream.symlinks == 'keep':
            argv += ['--links']
        if stream.target_chmod:
            argv += ['--perms', '--chmod=F%o,D%o' % stream.target_chmod]
        else:
            argv += ['--chmod=Du+rwx']      # else one 0544 directory refuses its own content
        # with a slash at its end, a directory that is missing would be made: perhaps on a disk
        # that something else was mounted on
        top = os.path.join(self.base if top is None else top, b'.')
        return argv + options + self.remote_shell() + ['--', os.path.join(root, b''), self.url(top)]

    def rsync(self, root, paths, options, top=None, quiet_limit=None, rows=None):
        """One rsync over a list of relative names, below `top` at the target: (Finished, its Rows)."""
        argv = self.words(root, options, top, quiet_limit)
        feed = b''.join(b'./' + path + b'\0' for path in paths)
        rows = Rows() if rows is None else rows
        return self.ask_while_busy(
            lambda: self.run_rsync(argv, feed, quiet_limit, rows, '--checksum' in options)), rows

    def ask_while_busy(self, ask):
        """How an rsync ended.  Where one at a time is let in, by rrsync's lock or `max connections`, the
        one before it may count for a while after its end."""
        since, me = time.monotonic(), threading.get_ident()
        while True:
            done = ask()
            cut = done.code in (self.REFUSED, self.CUT)
            busy = cut and any(words in line for line in done.lines for words in self.BUSY)
            if cut and self.active:
                self.overlaps = False
                self.one_at_a_time = self.one_at_a_time or busy
                if not busy or me == self.pressed or me in self.active:     # in the midst of a push
                    return done
                since = time.monotonic()        # the other one is ours, and has a limit of its own
            elif not busy or time.monotonic() - since > self.BUSY_FOR:
                return done
            self.lingers = False
            if not self.see_off():
                self.stop.wait(1)

    def see_off(self):
        """Wait for the ends of those that have said all.  True if there were any."""
        ending = [thread for thread in list(self.ending) if thread.is_alive()]
        for thread in ending:
            thread.join()
        return bool(ending)

    def close(self):
        self.see_off()                  # or they would lose their line: see BUSY_FOR

    def run_rsync(self, argv, feed, quiet_limit, rows, hashed):
        # a proof by MD5 (--checksum-choice would be sent to the target, which may not know it): it
        # has a name that the ledger can hold, and people can check it; while they send, the two
        # agree on what is quickest
        secret = dict(self.secret(), **{'RSYNC_CHECKSUM_LIST': 'md5 md4'} if hashed else {})
        # a SIGTERM makes rsync flush what it has just sent once more, if --bwlimit let it sleep
        # there: then files take the content of others (seen with 3.5.0 and a daemon)
        me = threading.get_ident()
        self.active.append(me)
        try:
            return run(argv, self.stop, quiet_limit or self.stream.stall_timeout, feed, rows.hear,
                       ending=self.ending, keep_fds=self.lock_fds if '-n' not in argv else (),
                       secret=secret, signals=Program.ABRUPT)
        finally:
            self.active.remove(me)

    def answers(self, paths, good):
        """Rows for a dry run, which changes nothing: where its end takes long, it is not waited for."""
        return Answers(paths, good) if self.lingers else Rows()

    def fail(self, done, what, hint=''):
        raise TargetError('%s: %s' % (what, self.reason(done)), hint or self.HINTS.get(done.code, ''))

    @staticmethod
    def reason(done):
        """What rsync or the target said."""
        causes = [line for line in done.lines if not line.startswith('rsync error:')]
        return brief(causes) or done.errors or (
            'rsync ended with %d' % done.code if done.code else 'no reason given')

    def reason_for(self, path, push):
        """What was said of a file, or else of any."""
        name = show(os.path.basename(path))
        marks = '"%s"' % name, '/%s"' % name, '.%s.' % name, ': %s' % show(path)
        said = [line for line in push.said if any(mark in line for mark in marks)]
        return brief(said) or self.reason(push.done)

    def look(self, names, top=None):
        """Whether each of the names is in a directory of the target, and b'.' that itself.

        A listing would do, but not for write-only modules; a dry run does everywhere.
        """
        checksum = ['--checksum'] if self.stream.verify == 'checksum' else []     # or is that refused?
        with scratch_directory(self.stream) as empty:
            for name in names:
                open(os.path.join(empty, name), 'wb').close()
            done, rows = self.rsync(
                empty, [b''] + sorted(names), ['-n', '-i', '-i', '--ignore-existing'] + checksum, top,
                rows=self.answers([b'.'] + sorted(names), bool))
        existing = set(names) - set(rows)       # what exists there, whatever it is, has no row
        if b'.' not in rows or existing and done.code:
            self.fail(done, 'cannot look at %s' % target_of(self.stream))
        self.hash = self.hash or next((self.OF_NOTHING[checksum] for _, checksum in rows.values()
                                       if checksum in self.OF_NOTHING), None)
        found = {name: name in existing for name in names}
        found[b'.'] = not rows[b'.'][0].endswith(b'+' * 9)
        return found

    def present(self, names):
        found = self.look(names)
        if not found.pop(b'.'):
            if not self.stream.create_directories:
                raise self.missing(more='; behind rrsync, target_dir is relative to the directory that '
                                        'it allows' if self.base.startswith(b'/') else '')
            self.make_base()
        return {name for name, there in found.items() if there}

    def make_base(self):
        """Make target_dir, level by level below what exists: any rsync can do that."""
        top, steps = self.base.rstrip(b'/'), []
        while True:
            top, name = os.path.split(top)
            steps = [os.path.join(name, step) for step in [b''] + steps]
            if self.look({to_bytes(self.stream.stop_file)}, top)[b'.']:
                return self.make(top, [step.rstrip(b'/') for step in steps])

    def ensure(self, subdir):
        """Make a dated directory."""
        if subdir not in self.made:
            self.make(self.base, prefixes(subdir))
            self.made.add(subdir)

    def make(self, top, steps):
        """Make directories, each below the one before, by sending empty ones."""
        with scratch_directory(self.stream) as empty:
            for step in steps:
                os.mkdir(os.path.join(empty, step))
                os.chmod(os.path.join(empty, step), 0o777)      # the umask there decides, not ours
            self.rsync(empty, steps, ['--omit-dir-times', '--ignore-existing'], top)
            done, rows = self.rsync(empty, steps, ['--omit-dir-times', '-n', '-i', '-i'], top)
        if any(rows.get(step, (b'',))[0][:2] != b'.d' for step in steps):
            self.fail(done, 'cannot make %s in %s at %s, or something else is there' % (
                show(steps[-1]), show(top), target_of(self.stream)))

    def top(self, batch):
        return os.path.join(self.base, batch.subdir)

    def patience(self, batch):
        """Seconds of silence to allow while both sides read the biggest file."""
        return self.stream.stall_timeout + batch.biggest / CHECK_RATE + (
            batch.biggest / self.stream.bandwidth_limit if self.stream.bandwidth_limit else 0)

    @staticmethod
    def resuming(batch):
        """A large file that breaks off is resumed; for small ones to ask costs more than it saves."""
        return ['--partial-dir=' + PARTIAL_DIR] if batch.biggest >= RESUME_FROM else []

    @staticmethod
    def reporting(batch):
        """Large files report while they are under way."""
        return ['--outbuf=L', '--info=progress2', '--no-human-readable'] if batch.biggest >= SMALL else []

    def push(self, batch, paths, options, rows=None):
        if self.stream.bandwidth_limit:
            options = options + ['--bwlimit=%d' % max(1, self.stream.bandwidth_limit // 1024)]
        done, rows = self.rsync(
            batch.root, paths, self.resuming(batch) + self.reporting(batch) + options,
            self.top(batch), self.patience(batch), Rows(self.progress) if rows is None else rows)
        if done.code not in self.ENDED + (self.NO_ROOM,):
            self.fail(done, 'the transfer to %s broke off' % target_of(self.stream))
        return done, rows

    @property
    def quick(self):
        """Only a mirror may believe rsync's own look at size and time."""
        return self.stream.mirror and self.stream.on_conflict == 'overwrite'

    def send(self, batch, hand_on):
        self.ensure(batch.subdir)
        paths = [entry.path for entry in batch.entries]
        push = Push(batch, hand_on if self.stream.move and self.overlaps else None, self.progress)
        options = ['-i', '-i'] + self.fresh_only()
        if self.doubting:
            self.doubts.begin(push, paths)
        try:
            later = self.later_twins(batch) if self.stream.mirror else {}
            done = self.send_all(batch, [path for path in paths if path not in later], options, push)
            push.twins = self.twins_there(batch, later) if later else {}
            later = [path for path in later if path not in push.twins]
            if later:
                rest = self.send_all(batch, later, options, push)
                push.said += rest.lines if done.code else done.lines
                done = done if done.code else rest
            hand_on(push.end(done), False)
        except BaseException:           # or the last part is never proven
            self.settle_doubts(push, paths)
            raise

    def send_all(self, batch, paths, options, push):
        try:
            return self.push(batch, paths, options, push)[0]
        except TargetError as error:
            if push:
                error.path = self.under_way(batch, paths, options)
            raise

    @staticmethod
    def later_twins(batch):
        """{path: the path before it} of the files of a batch that a target may take for what goes before;
        directories come before all."""
        first, later = {}, {}
        for top in sorted({e.path if e.kind == 'd' else parent_of(e.path) for e in batch.entries}):
            first.update((hash(folded(step)), step) for step in prefixes(top))
        for entry in batch.entries:
            before = first.setdefault(hash(folded(entry.path)), entry.path)
            if entry.kind != 'd' and before != entry.path:
                later[entry.path] = before
        return later

    def twins_there(self, batch, later):
        """{path: Unfit} of those that the target takes for the path before them: one of the two is there
        and is not listed.  Each pass would replace, or back up, the one by the other."""
        both = set(later).union(later.values())
        asked, rows = self.rsync(batch.root, sorted(both), ['-n', '-i', '-i', '--ignore-existing'],
                                 self.top(batch))
        places = sorted({parent_of(batch.final(path)) for path in both})
        where = os.path.commonpath(places)
        listed, listing = self.listing(where, '--dirs' if len(places) == 1 else '--recursive')
        if asked.code or listing.code:          # nobody can tell
            return {}
        names = {os.path.join(where, name) for name, _ in listed}
        there = {path for path in both if rows.get(path, (b'.d',))[0].startswith(b'.d')}
        hidden = {path for path in there if batch.final(path) not in names}
        return {path: one_name_there(path, before) for path, before in later.items()
                if path in there and hidden & {path, before}}

    def under_way(self, batch, paths, options):
        """The file at which a push broke off, or None.  What rsync told had gone may still have
        been on its way; the receiver takes files in the order in which they are told."""
        with contextlib.suppress(TargetError):
            _, rows = self.rsync(batch.root, paths, ['-n'] + options, self.top(batch))
            return next((path for path, (row, _) in rows.items() if row.startswith(b'<f')), None)
        return None

    def prove(self, batch, paths, options):
        """{path: checksum} of those that are at the target as they are here, and all rows."""
        done, rows = self.rsync(batch.root, sorted(paths), ['-n', '-i', '-i'] + options,
                                self.top(batch), self.patience(batch) + batch.size / CHECK_RATE,
                                self.answers(paths, is_equal))
        if done.code not in self.ENDED:
            self.fail(done, 'nothing can be proven at %s' % target_of(self.stream))
        batch.jobs.said += done.lines
        equal = {}
        for path, (row, checksum) in rows.items():
            if is_equal(row):
                equal[path] = self.hash + checksum.decode() if len(checksum) == 32 and self.hash else None
        return equal, rows

    def finish(self, batch):
        push = batch.jobs
        batch.parcels[:0], push.late = push.late, []
        equal = {}
        try:
            if batch is not push.last:
                self.pressed = threading.get_ident()
            return self.finish_part(batch, push, equal)
        except TargetError:
            if batch is push.last or self.overlaps:
                raise
            push.late, batch.parcels = push.late + batch.parcels, []    # proven when the push has ended
            return []
        finally:
            self.pressed = None
            if batch is push.last:
                self.settle_doubts(push, [e.path for e in batch.entries], equal)
            else:
                self.doubts.dispel(equal)

    def fresh_only(self):
        """Options of a first push.  What is there is left alone; what another sender brings while
        ours is under way, which --ignore-existing no longer asks for, becomes a backup."""
        if self.stream.on_conflict != 'overwrite' or self.stream.zips:
            return ['--ignore-existing', '--backup', '--suffix=' + stamped(b'').decode()]
        return self.times if self.stream.mirror else ['--ignore-existing']

    @property
    def doubting(self):
        """Elsewhere all is proven by checksum, and what differs is replaced."""
        return self.stream.mirror or self.stream.on_conflict == 'refuse'

    def settle_doubts(self, push, paths, equal=()):
        """What a push may have left wrong: all that it sent, and if it was broken off, all but
        what it left alone."""
        if self.doubting:
            ended = push.done and push.done.code in self.ENDED
            self.doubts.end(push, [path for path in paths if path not in equal and (
                push.get(path) in push.SENT if ended else push.get(path) != b'.')], equal)

    def sizes_tell(self, push):
        """One that is broken off while bandwidth_limit lets it sleep leaves right sizes, wrong bytes."""
        return push.done.code in self.ENDED if push.done else not self.stream.bandwidth_limit

    def finish_part(self, batch, push, equal):
        """equal: a dictionary that gets what is proven, {path: checksum or None}."""
        everything = {e.path for e in batch.entries}.difference(push.twins)
        sent = {path for path in everything if push.get(path) in push.SENT}
        # two sums have one size, and may be of one second
        quick = {path for path in everything if push.get(path) == b'.' and self.quick and not batch.about}
        quick -= self.doubts.names
        by_size = sent if self.stream.verify == 'size' and self.sizes_tell(push) else set()
        equal.update(dict.fromkeys(quick))
        known = {}
        # what was not sent was there before: only its content can tell whether it is ours
        for paths, option in ((by_size, '--size-only'), (everything - by_size - quick, '--checksum')):
            believed = paths - sent - self.doubts.names
            if self.stream.mirror and not batch.about and option == '--checksum' and believed:
                before, rows = self.prove(batch, believed, self.times)
                equal.update(before)
                known.update(rows)
                paths = paths - set(before)
            if paths:
                proven, rows = self.prove(batch, paths, [option])
                equal.update(proven)
                known.update(rows)
        problems = {}
        missing = everything - set(equal)
        if batch is push.last and missing and push.done.code == self.NO_ROOM:
            problems = self.make_room(batch, missing)
        elif batch is push.last:
            problems = self.send_again(batch, push, missing, sent, known, equal)
        else:
            push.late = [p for p in batch.parcels if any(e.path not in equal for e in p.entries)]
            late = set(map(id, push.late))
            batch.parcels = [p for p in batch.parcels if id(p) not in late]
        problems.update(push.twins)
        self.time_directories(batch, equal, known)
        changed = changed_here(batch, everything)   # after the proof, which looks at what is here now
        for path in changed:
            equal.pop(path, None)
            problems[path] = Changed('%s changed while it was sent' % show(path))
        half = {path for path, written in changed.items()
                if written and (path in sent or push.get(path) in push.SENT)}
        if half and self.stream.move and self.stream.on_conflict != 'overwrite':
            self.withdraw(batch, half)
        if self.stream.mirror:
            self.learn_times(batch, sent & set(equal), known)
        sent |= {path for path in everything if push.get(path) in push.SENT}    # in place of other content
        if batch is not push.last:
            for path in equal:
                push.pop(path, None)
        return [self.outcome(batch, parcel, equal, problems, sent) for parcel in batch.parcels]

    def withdraw(self, batch, paths):
        """What was written here while it was sent may be half a file there: it gets the name of a backup.
        Nothing is deleted, for another sender may have replaced it."""
        suffix = stamped(b'')
        paths = sorted(path for path in paths if len(os.path.basename(path)) + len(suffix) <= NAME_MAX)
        if not paths:
            return
        done = self.set_aside(batch, paths, ['--backup', '--suffix=' + suffix.decode()])
        for path in paths:
            log.info('%s changed while it was sent: what arrived %s there' % (
                show(path), 'is renamed to %s' % show(path + suffix) if done.code in (0, 24) else
                'cannot be renamed'), self.stream)
        batch.jobs.said += done.lines

    def make_room(self, batch, missing):
        """The disk was full at one file, the first in the order of rsync(1) that is missing: its
        part goes, and the others are sent again."""
        path = min(missing)
        head, name = os.path.split(batch.final(path))
        parts = os.path.join(head, to_bytes(PARTIAL_DIR))
        self.delete([os.path.join(parts, name)])
        self.delete([parts])            # a directory that is not empty stays
        return {path: NoRoom('%s was not taken: %s' % (show(path), self.reason(batch.jobs.done)),
                             'is the disk full, or the quota?')}

    def time_directories(self, batch, equal, rows):
        """rsync --backup gives none to directories."""
        late = [e.path for e in batch.entries if e.kind == 'd' and e.path in equal
                and rows.get(e.path, (b'',))[0][4:5] == b't']
        if late:
            self.push(batch, sorted(late), [])

    def learn_times(self, batch, sent, rows):
        """A target may keep times to two seconds only, or none: its mirror would be sent whole in
        each pass.  What is learned holds until the target is another, or does keep one."""
        files = {e.path: e for e in batch.entries if e.path in sent and e.kind == 'f'}

        def late(rows):
            return {path for path in files if rows.get(path, (b'',))[0][4:5] == b't'}

        wrong = {path for path in late(rows) if untouched(batch.root, files[path])}
        if wrong and not self.times:
            _, rows = self.prove(batch, sent, ['--modify-window=1'])
            if not late(rows):
                self.note_times(['--modify-window=1'])
            elif wrong == late(rows) == set(files):
                self.note_times(['--checksum'])
        elif self.times == ['--checksum'] and files and not late(rows):
            self.note_times([])

    def send_again(self, batch, push, missing, sent, rows, equal):
        """What differs at the target is ours and damaged, or somebody else's: on_conflict."""
        missing = missing - set(changed_here(batch, missing))
        differing = {p for p in missing if rows.get(p, (b'',))[0][:2] in (b'<f', b'cL')
                     and not rows[p][0].endswith(b'+' * 9)}
        damaged = {p for p in differing & self.doubts.names if rows[p][0][2:5] == b'c..'}    # only there
        steps = self.conflict_steps(batch, differing - sent - damaged)
        problems = self.refused(steps)
        renamed = {path for path, step in steps.items() if step == 'stamp'}
        self.send_renamed(batch, renamed, equal)
        foreign = set(steps) - set(problems) - renamed
        problems.update(self.in_the_way(batch, missing - set(rows)))
        again = foreign | damaged | self.make_way(problems)
        if self.stream.on_conflict != 'refuse':
            again |= differing & sent       # damaged, or taken by another sender: backed up as well
        backed_up = damaged or 'backup' in [steps[path] for path in foreign] or \
            self.stream.on_conflict == 'backup' or self.stream.move and again and batch.twins(again)
        kept = set()
        for number, paths in enumerate(in_rounds(sorted(again))):
            push.update(dict.fromkeys(paths, b'<'))
            backup = self.backup_options(batch, foreign.intersection(paths), backed_up, number > 0)
            if backup:
                self.set_sums_aside(batch, paths, backup)
                kept |= self.not_set_aside(batch, paths, backup) if self.stream.move else set()
                paths = [path for path in paths if path not in kept]
            push.said += self.push(batch, paths, ['--ignore-times', '-i'] + backup)[0].lines
            equal.update(self.prove(batch, paths, ['--checksum'])[0])
        for path in (again | differing & sent) - set(equal):
            ours = path in sent | damaged and path not in kept
            problems[path] = IntegrityError('%s arrived damaged' % show(path)) if ours else \
                ItemError('%s exists at the target and cannot be replaced: %s' % (
                    show(path), self.reason_for(path, push)))
        return {path: problem for path, problem in problems.items() if path not in equal}

    def conflict_steps(self, batch, foreign):
        """{path: conflict_step()}; a file of the incoming directory is never renamed, so there it is
        theirs that gets another name."""
        twins = batch.twins(foreign) if foreign else ()
        steps = {path: conflict_step(self.stream, path, path in twins) for path in foreign}
        return {path: 'backup' if step == 'stamp' and batch.root == self.stream.root else step
                for path, step in steps.items()}

    @staticmethod
    def refused(steps):
        """{path: error} of those that may not be replaced."""
        problems = {}
        for path, step in steps.items():
            if step == 'refuse':
                problems[path] = refused_conflict(path)
            elif step == 'backup' and len(os.path.basename(path)) + len(stamped(b'')) > NAME_MAX:
                # rsync would give up all
                problems[path] = Unfit('%s exists at the target with other content, and its name is too '
                                       'long for a backup' % show(path), 'rename one of them')
        return problems

    def set_sums_aside(self, batch, paths, backup):
        """What replaces files of an item says nothing of its old checksum file, which goes first: what
        is deleted is kept as well.  Where a target forbids that, it goes when the new one comes."""
        room = NAME_MAX - len(stamped(b'', batch.moment))
        sums = [path for path in batch.sums_of(self.stream, paths) if len(os.path.basename(path)) <= room]
        if sums:
            done = self.set_aside(batch, sums, backup)
            batch.cleared = batch.cleared or done.code == 0

    def not_set_aside(self, batch, paths, backup):
        """Set aside what has these names; the twins of them if that is refused: the backups that a push
        makes are good enough for the others only."""
        done = self.set_aside(batch, paths, backup)
        if done.code in (0, 24):        # 24: in directories, for those are missing in the empty one
            return set()
        batch.jobs.said += done.lines
        return batch.twins(paths)

    def set_aside(self, batch, paths, backup):
        """Rename what has these names to its backups.  A push makes them by link(2); where case is folded,
        the kernel may remember under a name what another spelling of it has replaced since."""
        with scratch_directory(self.stream) as empty:
            return self.rsync(empty, paths, ['--delete-missing-args', '-i', '--existing'] + backup,
                              self.top(batch))[0]

    def backup_options(self, batch, foreign, backed_up, twins):
        """How what is replaced is kept, if it is.  twins: of others that have names by now."""
        suffix = stamped(b'', None if twins else batch.moment).decode()
        for path in sorted(foreign):
            log.info('other content had the name %s at the target and %s' % (
                show(path),
                'is %s%s now' % (show(path), suffix) if backed_up else 'is overwritten'), self.stream)
        return ['--backup', '--suffix=' + suffix] if backed_up else []

    def in_the_way(self, batch, paths):
        """{path: Unfit} of those of which neither a push nor a proof tells, for something else has
        their name at the target."""
        done, rows = self.rsync(batch.root, sorted(paths), ['-n', '-i', '-i', '--ignore-existing'],
                                self.top(batch)) if paths else (None, {})
        return {path: Unfit('%s: something that is no such file has its name at the target' % show(path),
                            'rename or remove it there')
                for path in paths if path not in rows and done.code == 0}

    def send_renamed(self, batch, paths, equal):
        """A zip never takes the name of one that is there: it gets a time stamp."""
        for index, parcel in enumerate(batch.parcels):
            entry = parcel.entries[0]
            if entry.path in paths:
                new = stamped(entry.path)
                os.rename(os.path.join(batch.root, entry.path), os.path.join(batch.root, new))
                fresh = Entry.of(new, os.lstat(os.path.join(batch.root, new)))
                batch.parcels[index] = Parcel(parcel.item, [fresh])
                self.push(batch, [new], ['-i'] + self.fresh_only())
                equal.update(self.prove(batch, [new], ['--checksum'])[0])

    def outcome(self, batch, parcel, equal, problems, sent):
        missing = next((e.path for e in parcel.entries if e.path not in equal), None)
        error = None if missing is None else problems.get(missing) or self.problem(
            missing, batch.jobs, missing in sent)
        single = parcel.entries[0] if len(parcel.entries) == 1 else None
        target = batch.final(single.path) if single else None
        return Outcome(error, equal.get(single.path) if single else None, target, {},
                       not self.stream.mirror or any(e.path in sent for e in parcel.entries),
                       proof='size' if self.stream.verify == 'size' else 'rsync --checksum')

    def problem(self, path, push, sent):
        """Why a file is not there after its push ended."""
        if push.done.code == self.NO_ROOM:
            return TargetError('%s was not taken: %s' % (show(path), self.reason(push.done)), self.HINTS[11])
        if sent and push.done.code == 0:
            return ItemError('%s was sent and is not at the target any more' % show(path),
                             'did somebody take it before it was proven there? it is sent again')
        return ItemError('%s was not taken by the target: %s' % (show(path), self.reason_for(path, push)))

    def delete(self, names):
        """Names that do not exist here are deleted there: what exists here cannot be hit."""
        with scratch_directory(self.stream) as empty:
            done, _ = self.rsync(empty, names, ['--delete-missing-args', '-i'])
            if done.code in self.UNKNOWN:
                for name in names:
                    self.delete_one(empty, name)

    def delete_one(self, empty, path):
        """As rsyncs older than 3.1.0 can, too: what an `exclude` names is kept there, and no more than
        one name goes (rsync(1), --delete, --max-delete)."""
        directory, name = os.path.split(path)
        pattern = re.sub(rb'[*?\[\\]', lambda sign: b'[%s]' % sign.group().replace(b'\\', b'\\\\'), name)
        self.rsync(empty, [b''], ['--delete', '--max-delete=1', b'--include=/' + pattern, '--exclude=*'],
                   os.path.join(self.base, directory))

    def listing(self, path, depth='--recursive'):
        """[(name below path, whether it is a directory)] at the target, and how rsync ended."""
        argv = [self.stream.rsync_command] + self.stream.rsync_options + [depth, '--list-only'] + \
            self.remote_shell() + ['--', self.url(os.path.join(self.base, path, b''))]
        done = self.ask_while_busy(
            lambda: run(argv, self.stop, self.stream.stall_timeout, secret=self.secret()))
        found = []
        for line in done.output.split(b'\n'):
            match = re.match(rb'(.)\S{9} +[\d,.]+ \d{4}/\d\d/\d\d \d\d:\d\d:\d\d (.*)$', line)
            if match and match.group(2) != b'.':
                found.append((unescaped(match.group(2)), match.group(1) == b'd'))
        return found, done

    def check_listing(self):
        """[(name, whether it is a directory)] of all that is there.  Raises TargetError."""
        listed, done = self.listing(b'')
        if done.code:
            self.fail(done, 'mirror_delete cannot list %s' % target_of(self.stream),
                      'it must: give the key rrsync without -wo, the module no "write only"'
                      if re.search('write.only', self.reason(done)) else '')    # rrsync's, or a module's
        return listed

    def delete_missing(self, wanted):
        """List the target, then name what must go; a name that exists here by then is safe."""
        listed = self.check_listing()
        names = {name for name, _ in listed}
        marker = to_bytes(self.stream.target_marker or '')
        if marker and marker not in names and folded(marker) not in map(folded, names):
            raise self.unmarked()
        # a target that folds case or accents may show what is here under another name; else none
        # of these is left, and nothing needs to be folded
        shown = {folded(path) for path in wanted - names}
        cleared, self.cleared = self.cleared, []
        return cleared + self.delete_all(self.stream.root, [
            (name, is_directory) for name, is_directory in listed
            if name not in wanted and not protected(name, self.stream) and
            not (shown and folded(name) in shown)])

    def make_way(self, paths):
        """mirror_delete: where a directory has the name of one of these files, what is in it is
        gone here, and goes first.  Returns those of the paths that are free then."""
        free = set()
        for path in sorted(paths) if self.stream.mirror and self.stream.mirror_delete else ():
            inside, _ = self.listing(path)
            inside = [(os.path.join(path, name), is_directory) for name, is_directory in inside]
            if inside and not any(protected(name, self.stream) for name, _ in inside):
                with scratch_directory(self.stream) as empty:
                    gone = self.delete_all(empty, inside)
                self.cleared += gone
                free |= {path} if len(gone) == len(inside) else set()
        return free

    def delete_all(self, root, found):
        """Delete what is found at the target and not in root, directories when they are empty;
        the names that went."""
        gone = self.run_deletion(root, [name for name, is_directory in found if not is_directory])
        for depth in sorted({name.count(b'/') for name, d in found if d}, reverse=True):
            gone += self.run_deletion(root, [n for n, d in found if d and n.count(b'/') == depth])
        return gone

    def run_deletion(self, root, names):
        """Those of the names that rsync says it deleted."""
        if not names:
            return []
        done, rows = self.rsync(root, names, ['--delete-missing-args', '-i', '--existing'])
        if done.code not in self.ENDED:
            self.fail(done, 'mirror_delete failed at %s' % target_of(self.stream))
        if done.code == 23:
            log.once('mirror_delete: %s' % self.reason(done), self.stream)
        return [name for name in names if rows.get(name, (b'',))[0].startswith(b'*deleting')]


class RsyncSsh(RsyncTransport):
    """rsync over one shared ssh connection; nothing but rsync is needed at the target, so a
    key restricted by rrsync works."""

    takes = RsyncTransport.takes + ' ssh'
    lingers = True                  # both ends ask for their children in steps of 20 ms (3.5.0)

    def __init__(self, *args, **kwargs):
        RsyncTransport.__init__(self, *args, **kwargs)
        self.ssh = SshConnection(self.stream, self.stop)

    def log_in(self):
        self.ssh.prepare()

    def close(self):
        RsyncTransport.close(self)
        self.ssh.close()

    def rsync(self, root, paths, options, top=None, quiet_limit=None, rows=None):
        if self.ssh.prepared:
            quiet_limit = max(quiet_limit or self.stream.stall_timeout, self.stream.connect_timeout + 10)
        return RsyncTransport.rsync(self, root, paths, options, top, quiet_limit, rows)

    def run_rsync(self, *args):
        done = RsyncTransport.run_rsync(self, *args)
        if self.ssh.prepared:
            # 255 is what ssh ended with; 12 if rsync did not wait for that
            self.ssh.logged_in(done, done.code in (255, self.CUT))
        return done

    def remote_shell(self):
        # rsync splits this itself: words in quotes, a quote doubled inside them (rsync(1), -e)
        return ['-e', ' '.join("'%s'" % to_text(w).replace("'", "''") for w in self.ssh.command())]

    def url(self, path):
        return b'%s:%s' % (in_brackets(self.stream.target_host), path)


class RsyncNative(RsyncTransport):
    """An rsync daemon (rsyncd.conf(5)); target_dir = MODULE/path."""

    takes = RsyncTransport.takes + ' password password_file'
    target_form = 'module'

    def secret(self):
        return {'RSYNC_PASSWORD': self.stream.password} if self.stream.password else {}

    def rsync(self, root, paths, options, *more, **named):
        options = options + ['--contimeout=%d' % max(1, self.stream.connect_timeout)]
        return RsyncTransport.rsync(self, root, paths, options, *more, **named)

    def url(self, path):
        stream = self.stream
        return b'rsync://%s%s%s/%s' % (
            to_bytes(stream.username + '@' if stream.username else ''), in_brackets(stream.target_host),
            b':%d' % stream.target_port if stream.target_port else b'', path)


def plain_reason(text):
    """rclone's words without date and level."""
    return re.sub(r'\d{4}/\d\d/\d\d \d\d:\d\d:\d\d (?:[A-Z]+ *: )?', '', text)


# error codes of S3 stores for a quota: Ceph and versitygw (403), Huawei's OBS (403), MinIO (400)
QUOTA = re.compile(r'(?:\bapi error|:) (?:QuotaExceeded|InsufficientStorageSpace|'
                   r'XMinioAdminBucketQuotaExceeded): ')


def is_own_trouble(reason):
    """Whether a store answered with a status that says that the trouble is its own (RFC 9110, 15.6): it
    may be full; or with a code that says so.  rclone shows both as its libraries do, whatever the words
    around them."""
    status = re.search(r'\bstatus ?code: (\d{3})\b', reason, re.I)
    return status is not None and (status.group(1) >= '500' or QUOTA.search(reason) is not None)


class Refusing(Exception):
    """A store answers several files in a row with an error of its own."""


class Report:
    """What one rclone says with --use-json-log: a JSON object a line (rclone.org/docs, Logging).

    limit: seconds without progress after which it counts as hung; its statistics come all the time.
    copied(name): called for each file that it has sent.
    most: errors of the store itself, with no file between them that goes, after which it is ended.
    """

    HASHED = re.compile(r'(\w+) = ([0-9a-f]{8,128}) OK$')       # with -vv: both hashes were there, and equal
    COPIED = re.compile(r'(Multi-thread )?Copied \(')

    def __init__(self, limit, progress=None, copied=None, most=None):
        self.limit, self.progress, self.copied, self.most = limit, progress, copied, most
        self.errors = {}            # name -> what went wrong with it
        self.trouble = ''           # the last error of all
        self.hashes = {}            # name -> 'md5:...', compared and found equal
        self.sent = set()           # names
        self.refused = set()        # names that it answered by its own trouble, not the file's
        self.untried = set()        # names
        self.begin()

    def begin(self):
        """Another rclone, about other names."""
        self.before = self.progress and self.progress.sent_bytes
        self.seen, self.since = None, time.monotonic()
        self.rest = b''
        self.in_a_row = 0

    def hear(self, piece):
        """Raises TargetError, Refusing."""
        *lines, self.rest = (self.rest + piece).split(b'\n')
        for line in lines:
            try:
                record = from_json(line.decode('utf-8', 'replace'))
                level, text = record.get('level'), str(record.get('msg'))
            except (ValueError, AttributeError):
                if line.strip():        # 1.60 prints what is fatal as it is
                    self.trouble = plain_reason(show(line.strip()))
                continue
            if isinstance(record.get('stats'), dict):
                self.watch(record['stats'])
            else:
                self.note(level, text, record.get('object'))

    def note(self, level, text, name):
        if level in ('error', 'critical', 'fatal', 'emergency', 'alert'):
            self.trouble = ' '.join(text.split())
            if name:
                self.errors[to_bytes(name)] = self.trouble
                self.note_status(to_bytes(name))
        elif name and self.COPIED.match(text):
            self.sent.add(to_bytes(name))
            self.in_a_row = 0
            if self.copied:
                self.copied(to_bytes(name))
        elif name and self.HASHED.match(text):
            self.hashes[to_bytes(name)] = '%s:%s' % self.HASHED.match(text).groups()

    def note_status(self, name):
        if is_own_trouble(self.trouble):
            self.refused.add(name)
            self.in_a_row += 1
            if self.in_a_row == self.most:
                raise Refusing

    def why(self, name):
        return self.errors.get(name) or self.trouble

    def problem(self, name, later):
        """Why a file is not there, as an error.  later: the Report of what looked for it."""
        if name in self.untried:
            return Changed('%s is left for the next pass: the store takes nothing now' % show(name))
        kind, hint = (NoRoom, 'is the store full?') if name in self.refused else (ItemError, '')
        return kind('%s was not taken by the target: %s' % (
            show(name), self.why(name) or later.why(name) or 'no reason given'), hint)

    def watch(self, stats):
        """Raises TargetError."""
        if self.progress:
            self.progress.sent_bytes = self.before + int(stats.get('bytes', 0))
        seen = [stats.get(key) for key in ('bytes', 'checks', 'transfers', 'listed')]
        now = time.monotonic()
        if seen != self.seen:
            self.seen, self.since = seen, now
        elif now - self.since > self.limit:
            raise TargetError('rclone made no progress for %s and was ended' % format_duration(self.limit),
                              'does the target or the network hang? see stall_timeout')


class RcloneTransport(Transport):
    """What rclone reaches: object stores and more (rclone.org/overview); target_dir = REMOTE:path.

    One copy for a batch, then a check over the same list.  A file is delivered if the check compared
    it by a hash that the store made of the bytes it holds.  Of whatever else is there, the
    bytes are read back: where the store has no hash or only what the uploader says it is, as for
    an object in parts, and where another has put the object there.
    """

    mirror_hint = '; for a mirror in a bucket there is rclone sync'
    directories = 'keep',
    target_form = 'remote'
    takes = 'network rclone parallel'
    stages = True
    CONNECTIONS = 2             # for each of `parallel`: most of the time one waits for an answer
    forbidden = b'\n'

    OLDEST = 1, 60              # older ones were not tried
    PARTIAL = 1, 63             # from here on a file that is under way has another name
    CONDITION = 1, 64           # from here on `If-None-Match` reaches the store
    MANY = 100                  # files
    REFUSALS = 6                # of a store in a row, until an rclone is ended
    ONE_PIECE = 5 << 30         # the largest object that S3 takes in one request
    USAGE, NOTHING_THERE = 2, (3, 4)        # exit codes: rclone.org/docs, List of exit codes
    # what rclone writes for characters that a store cannot hold, and what its lists lose
    QUOTING = re.compile(rb'\xe2\x80\x9b|\xe2\x90[\x80-\xa1]|\r\Z')
    ODD = re.compile(rb'[\\\x01-\x1f\x7f]')

    def __init__(self, *args, **kwargs):
        Transport.__init__(self, *args, **kwargs)
        self.version = None
        self.features = {}
        self.s3 = self.bucket = self.hashes_itself = False
        self.area = OWN_PREFIX + b'-' + staging_id(self.stream)
        self.carried = {}               # odd characters in a name -> whether the store keeps them

    def remote(self, *below):
        """REMOTE:path/ with its slash, without which rclone asks whether it is a file."""
        base = to_bytes(self.stream.target_base)
        below = os.path.join(b'', *below)
        return base + below if base.endswith(b':') else os.path.join(base, below)

    def words(self, verb, options, places):
        """The argument list of one rclone."""
        stream = self.stream
        words = [stream.rclone_command, verb, '--ask-password=false', '--retries=1', '--low-level-retries=3',
                 '--contimeout=%ds' % max(1, stream.connect_timeout),
                 '--timeout=%ds' % max(1, stream.stall_timeout),
                 '--no-unicode-normalization', '--s3-no-check-bucket']
        if stream.rclone_config:
            words += ['--config', stream.rclone_config]
        if stream.bandwidth_limit:
            words += ['--bwlimit=%dB' % stream.bandwidth_limit]
        return words + stream.rclone_options + options + ['--'] + list(places)

    def answer(self, verb, options, *places, names=()):
        """Run an rclone that answers; (exit code, output, why it failed).  names: for its list."""
        done = run(self.words(verb, options, places), self.stop, self.stream.stall_timeout,
                   b''.join(name + b'\n' for name in names), keep_fds=self.lock_fds)
        reason = plain_reason(done.errors) or 'rclone gives no reason'
        self.check_usage(done.code, reason)
        return done.code, done.output, reason

    def answer_json(self, pick, verb, options, *places, names=()):
        """As answer(), but for what rclone prints: pick() of that as JSON, None where it failed.
        Raises TargetError also where it is no JSON, or not what pick() takes."""
        code, output, reason = self.answer(verb, options, *places, names=names)
        try:
            return code, None if code else pick(from_json(output.decode('utf-8', 'replace'))), reason
        except (ValueError, LookupError, TypeError, AttributeError):
            raise TargetError('%s: %s %s does not answer as rclone does' % (
                target_of(self.stream), show(self.stream.rclone_command), verb), 'see rclone_command')

    def check_usage(self, code, reason):
        if code == self.USAGE:
            raise TargetError('rclone does not know one of its options: %s' % reason, 'see rclone_options')

    def work(self, verb, options, places, paths, report):
        """Run an rclone that reports while it works on a list of paths; the exit code."""
        options = options + ['--use-json-log', '--stats=1s', '--stats-log-level=NOTICE', '--files-from-raw=-']
        done = run(self.words(verb, options, places), self.stop, report.limit + KILL_GRACE,
                   b''.join(path + b'\n' for path in paths), report.hear, keep_fds=self.lock_fds, merged=True)
        self.check_usage(done.code, report.trouble)
        return done.code

    # -- what the remote is

    def open(self):
        if not self.features:
            self.learn_version()
            features = self.learn_remote()
            self.refuse_remote(features)
            self.features = features

    def learn_version(self):
        _, output, _ = self.answer('version', [])
        match = re.search(rb'rclone v(\d+)\.(\d+)', output)
        if not match:
            raise TargetError('%s is no rclone that this program knows' % show(self.stream.rclone_command),
                              'install rclone %d.%d or newer' % self.PARTIAL)
        self.version = tuple(int(number) for number in match.groups())
        if self.version < self.OLDEST:
            raise TargetError('rclone %d.%d is too old' % self.version,
                              'install rclone %d.%d or newer' % self.PARTIAL)

    def learn_remote(self):
        """What rclone says of the remote's features."""
        code, known, reason = self.answer_json(
            lambda known: (dict(known['Features']), known['Name'].split('{')[0], to_bytes(known['Root'])),
            'backend', [], 'features', self.remote())
        if code:
            raise TargetError('cannot use %s: %s' % (target_of(self.stream), reason), 'see rclone config')
        features, name, root = known
        _, output, _ = self.answer('listremotes', ['--long'])
        kinds = dict(re.findall(r'^(.*?): +(\w+)', output.decode('utf-8', 'replace'), re.M))
        self.s3 = kinds.get(name) == 's3'
        self.bucket = bool(features.get('BucketBased'))
        self.hashes_itself = self.s3 or not (self.bucket or features.get('Overlay') or features.get('UnWrap'))
        if features.get('IsLocal') and os.path.isabs(root) and (
                lies_below(root, self.stream.root) or lies_below(self.stream.root, root)):
            raise TargetError('target_dir and the incoming directory lie in each other',
                              'use two directories')
        return features

    def refuse_remote(self, features):
        """Raises TargetError where rclone would show half a file, or lose one."""
        stream, where = self.stream, target_of(self.stream)
        if not self.bucket and not features.get('PartialUploads'):
            raise TargetError(
                'rclone %d.%d shows files at %s under their names before they are whole' % (
                    self.version + (where,)),
                'from %d.%d on it does not for most backends; for webdav and some others it always does'
                % self.PARTIAL)
        if self.bucket and stream.target_base.endswith(':') and not features.get('Overlay'):
            raise TargetError('target_dir names no bucket', 'REMOTE:BUCKET/path')
        for other in stream.companions:
            if self.s3 and self.version < self.CONDITION:
                raise TargetError('rclone %d.%d would overwrite what stream %s sends to the same place' % (
                    self.version + (other,)), 'install a newer one, or use two directories')
            if not self.s3 and stream.on_conflict != 'overwrite':
                log.once('%s sends to the same place: of two that send one name at the same time, '
                         'the second may overwrite the first' % other, stream)

    # -- looking

    def look(self):
        """Raises TargetError if the store does not answer, or if target_dir is missing.  A bucket
        has no directories: what is asked for is one of ours, which takes no time to list."""
        code, _, reason = self.answer('lsjson', ['--stat', '--no-modtime'],
                                      self.remote(self.area + b'/' if self.bucket else b''))
        if code in self.NOTHING_THERE:
            if not self.stream.create_directories:
                raise self.missing()
            code, _, reason = self.answer('mkdir', ['--s3-no-check-bucket=false'], self.remote())
        if code:
            raise TargetError('cannot look at %s: %s' % (target_of(self.stream), reason))

    def present(self, names):
        self.look()
        code, found, reason = self.answer_json(
            lambda rows: {to_bytes(row['Path']) for row in rows},
            'lsjson', ['--recursive', '--no-modtime', '--no-mimetype', '--no-traverse', '--files-from-raw=-'],
            self.remote(), names=names)
        if code and not self.bucket:        # a directory of such a name is an error to that question
            return {name for name in names if self.is_there(name)}
        if code:
            raise TargetError('cannot look at %s: %s' % (target_of(self.stream), reason))
        return found & set(names)

    def is_there(self, name):
        code, _, reason = self.answer('lsjson', ['--stat', '--no-modtime'], self.remote(name))
        if code not in (0,) + self.NOTHING_THERE:
            raise TargetError('cannot look at %s: %s' % (target_of(self.stream), reason))
        return code == 0

    # -- sending

    def refusal(self, entries):
        error = Transport.refusal(self, entries)
        for entry in entries if not error else ():
            if self.QUOTING.search(entry.path):
                return Unfit('%s cannot be sent by rclone, which takes a character of its name for '
                             'something else' % show(entry.path), 'rename it')
        return error

    def odd(self, path):
        return bytes(sorted(set(b''.join(self.ODD.findall(path)))))

    def try_characters(self, entries):
        """Whether names with such characters arrive as they are: a store may make a slash of a
        backslash, and so put the object elsewhere."""
        names = {}
        for entry in entries:
            odd = self.odd(entry.path)
            if odd and odd not in self.carried:
                names[odd] = next(part for part in entry.path.split(b'/') if self.odd(part))
        if not names:
            return
        area = self.remote(self.area, b'')
        with scratch_directory(self.stream) as scratch:
            for name in names.values():
                open(os.path.join(scratch, name), 'wb').close()
            self.answer('copy', ['--no-traverse', '--files-from-raw=-'], scratch, area, names=names.values())
        _, output, _ = self.answer('lsf', ['--recursive', '--files-only'], area)
        found = set(re.sub(rb'\xe2\x90([\x80-\x9f\xa1])', self.unquoted, output).split(b'\n'))
        self.carried.update((odd, name in found) for odd, name in names.items())
        # by their names first: a store may list one that it does not know when asked for it
        self.answer('delete', ['--no-traverse', '--files-from-raw=-'], area, names=names.values())
        self.answer('purge', [], area)

    @staticmethod
    def unquoted(match):
        """rclone lists control characters as their pictures, U+2400 and following."""
        code = match.group(1)[0] - 0x80
        return bytes([0x7f if code == 0x21 else code])

    def send(self, batch, hand_on):
        self.try_characters(batch.entries)
        push = Push(batch, hand_on if self.overlaps else None, self.progress)
        push.refused = {}
        for parcel in batch.parcels:
            odd = [e.path for e in parcel.entries if not self.carried.get(self.odd(e.path), True)]
            error = self.refusal(parcel.entries) or odd and Unfit(
                '%s: the target does not keep such a name' % show(odd[0]), 'rename it')
            if error:
                push.refused.update((entry.path, error) for entry in parcel.entries)
        for entry in batch.entries:
            if entry.kind == 'd':
                push.note(entry.path, b'.', None)
        push.report = Report(self.patience(batch.entries), self.progress, lambda name: (
            push.note(name, b'<', None), push.offer()), self.REFUSALS)
        files = [e for e in batch.entries if e.kind == 'f' and e.path not in push.refused]
        whole = [e.path for e in files if not self.in_parts(e)]
        parts = [e.path for e in files if self.in_parts(e)]
        for paths, condition in ((whole, 'If-None-Match: *'), (parts, None)):
            self.copy_new(batch, paths, condition, push.report)
        hand_on(push.remainder(), False)

    def copy_new(self, batch, paths, condition, report):
        """Each file that a full store refuses takes many seconds.  After several in a row the others
        are tried once more, the small ones first; what is left then waits for the next pass."""
        for order in [], ['--order-by=size,ascending']:
            try:
                self.copy(batch, paths, ['--immutable', '--checksum'] + order, condition, report)
                return
            except Refusing:
                paths = [path for path in paths if path not in report.sent and path not in report.errors]
        report.untried.update(paths)

    def in_parts(self, entry):
        """Whether S3 makes an object of several: then it has no hash of the whole, and no condition."""
        return self.s3 and entry.size >= self.ONE_PIECE

    def patience(self, entries):
        """Seconds without progress to allow while the biggest file is read here and there."""
        return self.stream.stall_timeout + max([entry.size for entry in entries] or [0]) / CHECK_RATE

    def copy(self, batch, paths, options, condition=None, report=None):
        """One rclone that sends these; its Report.  condition: a header for S3, which says what must
        be there, or nothing (RFC 9110, 13.1)."""
        report = report or Report(self.patience(batch.entries))
        if not paths:
            return report
        report.begin()
        # few are asked for by name; of many, one list tells what is there already
        listed = self.s3 and len(paths) >= self.MANY and not any(self.odd(path) for path in paths)
        options = options + [
            '-v', '--transfers=%d' % self.connections(), '--multi-thread-streams=0', '--s3-no-head',
            '--s3-upload-cutoff=%dB' % self.ONE_PIECE] + ([] if listed else ['--no-traverse'])
        if self.version >= self.PARTIAL:
            options += ['--partial-suffix', self.partial_suffix()]
        if self.s3 and self.version >= self.CONDITION and condition:
            options += ['--header-upload', condition]
        littered, self.littered = self.littered, True
        code = self.work('copy', options, [os.path.join(batch.root, b''), self.remote(batch.subdir, b'')],
                         paths, report)
        self.littered = littered or code < 0
        return report

    def connections(self):
        return self.CONNECTIONS * self.stream.parallel

    def partial_suffix(self):
        """Of files under way, where rclone gives them another name: at most 16 letters, ours alone."""
        return '.mm' + to_text(self.area[-12:])

    # -- proving

    def check(self, batch, paths, options):
        """{path: b'=' equal, b'*' different, b'+' missing there, b'!' trouble} and the Report."""
        entries = [entry for entry in batch.entries if entry.path in paths]
        report = Report(self.patience(entries))
        with scratch_directory(self.stream) as scratch:
            answers = os.path.join(scratch, b'answers')
            self.work('check', options + ['--one-way', '--combined', answers, '-vv',
                                          '--checkers=%d' % self.connections()],
                      [os.path.join(batch.root, b''), self.remote(batch.subdir, b'')], sorted(paths), report)
            try:
                with open(answers, 'rb') as handle:
                    return {line[2:]: line[:1] for line in handle.read().split(b'\n')}, report
            except FileNotFoundError:
                return {}, report

    def prove(self, batch, paths, copied):
        """({path: (checksum or None, proof)} of what is there as it is here, {path: what the check says}
        of the rest, its Report).  copied: those that this run has sent."""
        equal = dict.fromkeys(paths & copied, (None, 'accepted')) if self.stream.verify == 'accepted' else {}
        by_size = self.stream.verify == 'size'
        vague = {entry.path for entry in batch.entries if self.in_parts(entry)}
        # with a listing, never without: then the uploader's word would count as the store's
        if paths & copied - set(equal) and (by_size or self.hashes_itself):
            marks, report = self.check(batch, paths, ['--size-only'] if by_size else [])
            proof = 'size' if by_size else 'hashed there'
            equal = {path: (report.hashes.get(path), proof) for path in paths & copied
                     if marks.get(path) == b'=' and (by_size or path in report.hashes and path not in vague)}
        rest = paths - set(equal)
        if not rest:
            return equal, {}, None
        self.look()
        marks, report = self.check(batch, rest, ['--download', '--no-traverse'])
        if any(marks.get(path) in (b'+', None) for path in rest):
            self.look()         # else the store was not there to be asked
        equal.update((path, (None, 'read back')) for path in rest if marks.get(path) == b'=')
        return equal, {path: marks.get(path) for path in rest - set(equal)}, report

    def finish(self, batch):
        push = batch.jobs
        problems = dict(push.refused)
        paths = {e.path for e in batch.entries if e.kind == 'f'} - set(problems)
        equal, rest, report = self.prove(batch, paths, {p for p in paths if push.get(p) == b'<'}) \
            if paths else ({}, {}, None)
        differing = {path for path, mark in rest.items() if mark == b'*'}
        if differing:
            problems.update(self.replace(batch, differing, equal, push))
        for path in rest:
            if path not in equal and path not in problems:
                problems[path] = push.report.problem(path, report)
        self.make_empty(batch, problems)
        return [self.outcome(batch, parcel, equal, problems) for parcel in batch.parcels]

    # -- what is there already

    def replace(self, batch, paths, equal, push):
        """Other content has these names: on_conflict.  {path: ItemError}; what then is there goes
        into `equal`."""
        twins = batch.twins(paths)
        steps = {path: conflict_step(self.stream, path, path in twins) for path in paths}
        problems = {path: refused_conflict(batch.final(path)) for path in paths if steps[path] == 'refuse'}
        before = self.keep_old(batch, {path for path in paths if steps[path] == 'backup'}, problems)
        left = paths - set(problems)
        for path in sorted(left - set(before)):
            log.info('%s had other content at the target and is overwritten' % (
                show(batch.final(path))), self.stream)
        sent = self.overwrite(batch, left - set(before), {}) | self.overwrite(batch, set(before), before)
        if left:
            proven, rest, report = self.prove(batch, left, sent)
            changed = {path for path in rest if path in before}
            if changed and self.sums(batch, changed) == {path: before[path] for path in changed}:
                # nobody else's: the store's ETag is not the MD5, as of an object in parts
                sent |= self.overwrite(batch, changed, {})
                again, rest, report = self.prove(batch, set(rest), sent)
                proven.update(again)
            equal.update(proven)
            for path in rest:
                problems[path] = IntegrityError('%s arrived damaged' % show(path)) \
                    if path in sent or push.get(path) == b'<' else ItemError(
                        '%s is at the target with other content and cannot be replaced: %s' % (
                            show(path), report.why(path) or 'no reason given'))
        return problems

    def overwrite(self, batch, paths, before):
        """Send these over what is there; those that went.  before: {path: MD5 of what must still be
        there}."""
        if not (self.s3 and before):
            return self.copy(batch, sorted(paths), ['--ignore-times']).sent
        reports = [self.copy(batch, [path], ['--ignore-times'], 'If-Match: "%s"' % before[path])
                   for path in sorted(paths)]
        return set().union(*(report.sent for report in reports))

    def keep_old(self, batch, paths, problems):
        """Copy what has these names to stamped ones, within the store: {path: its MD5}."""
        before = self.sums(batch, paths)
        stamps = {path: stamped(path, batch.moment) for path in before}
        kept = self.sums(batch, stamps.values()) if batch.about else {}
        for path, stamp in stamps.items():      # an old sum was copied before its item; if this is another:
            stamps[path] = stamp if kept.get(stamp) in (None, before[path]) else stamped(path)
        sums = {path: stamped(path, batch.moment) for path in batch.sums_of(self.stream, before)}
        reasons = {}
        for path, stamp in sorted(sums.items()) + sorted(stamps.items()):
            _, _, reasons[path] = self.answer('copyto', [], self.remote(batch.subdir, path),
                                              self.remote(batch.subdir, stamp))
        after = self.sums(batch, stamps.values())
        for path in sorted(paths):
            if path not in before or after.get(stamps[path]) != before[path]:
                before.pop(path, None)
                kind = NoRoom if is_own_trouble(reasons.get(path, '')) else ItemError
                problems[path] = kind('%s is at the target with other content, of which no backup '
                                      'could be made' % show(path), 'rename one of them')
            else:
                log.info('%s had other content at the target, which is %s now' % (
                    show(batch.final(path)), show(batch.final(stamps[path]))), self.stream)
        return before

    def sums(self, batch, paths):
        """{path: MD5} of what is there, read back."""
        if not paths:
            return {}
        _, output, _ = self.answer('hashsum', ['MD5', '--download', '--no-traverse', '--files-from-raw=-'],
                                   self.remote(batch.subdir, b''), names=paths)
        found = {line[34:]: line[:32].decode() for line in output.split(b'\n')
                 if re.match(rb'[0-9a-f]{32}  ', line)}
        return {path: found[path] for path in paths if path in found}

    def make_empty(self, batch, problems):
        """Directories without files: a bucket has none."""
        parents = {parent_of(entry.path) for entry in batch.entries}
        for entry in batch.entries:
            if entry.kind != 'd' or entry.path in parents or entry.path in problems:
                continue
            if not self.features.get('CanHaveEmptyDirectories'):
                log.once('%s is empty, and %s holds no empty directories' % (
                    show(entry.path), target_of(self.stream)), self.stream)
                continue
            code, _, reason = self.answer('mkdir', [], self.remote(batch.subdir, entry.path))
            if code:
                problems[entry.path] = ItemError('%s cannot be made: %s' % (show(entry.path), reason))

    def outcome(self, batch, parcel, equal, problems):
        errors = [problems[entry.path] for entry in parcel.entries if entry.path in problems]
        error = min(errors, key=lambda error: isinstance(error, Changed), default=None)
        single = parcel.entries[0] if len(parcel.entries) == 1 else None
        checksum, _ = equal.get(single.path, (None, None)) if single else (None, None)
        proofs = sorted({equal[entry.path][1] for entry in parcel.entries if entry.path in equal})
        return Outcome(error, checksum, batch.final(single.path) if single else None, {}, True,
                       proof=', '.join(proofs))

    # -- the rest

    def delete(self, names):
        for name in names:
            self.answer('deletefile', [], self.remote(name))

    def learned(self):
        yield 'hashes', 'made by the target of what it holds%s' % (
            '; objects in parts are read back' if self.s3 else '') if self.hashes_itself else \
            'none that prove anything: all is read back'

    def free_space(self):
        if not self.features.get('About'):
            return None
        code, output, _ = self.answer('about', ['--json'], self.remote())
        try:
            return None if code else from_json(output.decode('utf-8', 'replace')).get('free')
        except (ValueError, AttributeError):
            return None

    def tidy(self):
        """After a kill: partial files, and parts of objects, which cost money where nobody sees them."""
        if self.littered and self.s3:
            self.answer('backend', ['-o', 'max-age=7d'], 'cleanup', self.remote())
            self.littered = False
        elif self.littered and not self.bucket:
            code, _, _ = self.answer('delete', ['--include', '*' + self.partial_suffix()], self.remote())
            self.littered = bool(code)
        return not self.littered or self.bucket


class Dialogue:
    """A program that is kept running and answers: one process for many questions.

    marker(token): the command whose trace in the output tells that all before it is done.
    """

    def __init__(self, argv, stop, limit, marker, keep_fds=()):
        self.marker = marker
        self.limit = limit
        self.stop = stop
        self.program = Program(argv, stop, None, keep_fds=keep_fds)
        self.rest = b''
        self.asked = 0
        self.lock = threading.Lock()    # one batch is sent while the one before is finished

    def ask(self, script, limit=None, alive=None):
        """Run commands, return the lines they printed.  Raises TargetError, Interrupted.
        limit, alive: as for Program.read()."""
        limit = limit or self.limit
        with self.lock:
            self.stop.check()           # at a stop whoever asked before has ended the program
            self.asked += 1
            command, trace = self.marker(b'%d-%s' % (self.asked, random_hex(12)))
            self.program.write(script + command, limit)
            while trace not in self.rest:
                piece = self.program.read(limit, alive)
                if not piece:
                    self.stop.check()
                    self.program.wait(KILL_GRACE)
                    raise TargetError('%s ended: %s' % (
                        self.program.name, self.program.errors() or 'no reason given'))
                self.rest += piece
            answer, self.rest = self.rest.split(trace, 1)
        return answer.split(b'\n')[:-1]

    def close(self):
        self.program.close()


def in_chunks(values, size):
    values = list(values)
    return [values[i:i + size] for i in range(0, len(values), size)]


def tar_head(name, size, mode, mtime_ns=0, kind=b'0'):
    """What comes before a member's bytes in a tar stream, in GNU format: the one that every
    receiver reads with names of any bytes and length (tar(5)).  Times are whole seconds."""
    import tarfile
    info = tarfile.TarInfo(to_text(b'./' + name))
    info.type, info.size, info.mode = kind, size, mode
    info.mtime = min(max(0, mtime_ns // 10 ** 9), 0o77777777777)
    return info.tobuf(tarfile.GNU_FORMAT, 'utf-8', 'surrogateescape')


class Feed:
    """A command at the other end that reads what we write, in an ssh session of its own.

    The login shell sees constant words, which csh and fish read as sh does; sh takes the script
    from the first line and leaves what follows to its commands (sh(1p), read: not a byte more).
    """

    SHELL = """exec sh -c 'IFS= read -r line; eval "$line"'"""

    def __init__(self, ssh, stop, limit, throttle, keep_fds=()):
        self.limit, self.throttle = limit, throttle
        self.trace = random_hex(12)     # a login script may print, too
        self.gathered = bytearray()     # a write for each small file would cost more than its bytes
        self.broken = None              # why it takes no more
        self.program = Program(ssh.command() + ['--', ssh.stream.target_host, self.SHELL], stop, None,
                               keep_fds=keep_fds)

    def begin(self, script):
        """What sh shall do there; returns itself."""
        script = script.replace(b'\n', b"'\"$n\"'")       # in a quoted name, for the script is one line
        self.write(b'LC_ALL=C; export LC_ALL; n=$(echo; echo x); n=${n%%x}; echo %s; (%s); echo "%s $?"\n' % (
            self.trace, script, self.trace))
        return self

    def write(self, data):
        """Send bytes, sooner or later.  Raises TargetError (it hangs), Interrupted."""
        self.gathered += data
        if len(self.gathered) >= Program.PIPE:
            self.flush()

    def flush(self):
        data, self.gathered = self.gathered, bytearray()
        self.throttle.spend(len(data))
        try:
            if not self.broken:
                self.program.write(data, self.limit)
        except TargetError as error:
            if self.program.hung:
                raise
            self.broken = error         # end() tells whether the command or the line has ended

    def end(self, alive=None):
        """That was all: Finished.  alive: as for Program.read().
        Raises TargetError if the line broke, Interrupted."""
        self.flush()
        self.program.end_input()
        output = b''.join(iter(lambda: self.program.read(self.limit, alive), b''))
        told = re.search(rb'%s\n(.*)%s (\d+)\n' % (self.trace, self.trace), output, re.S)
        self.program.wait(self.limit)
        if not told:
            raise TargetError('%s ended: %s' % (
                self.program.name, self.program.errors() or 'no reason given'))
        return Finished(int(told.group(2)), told.group(1), self.program.errors(), [])

    def digest(self, size):
        """The SHA-256 of the first `size` bytes of its output.  Raises TargetError, Interrupted."""
        import hashlib
        digest, head, left = hashlib.sha256(), b'', size
        self.flush()
        self.program.end_input()
        for piece in iter(lambda: self.program.read(self.limit), b''):
            if head is not None:
                head += piece
                if self.trace not in head:
                    continue
                piece, head = head.partition(self.trace + b'\n')[2], None
            digest.update(piece[:left])
            left -= len(piece[:left])
        if left:
            raise TargetError('%s ended after %d of %d bytes: %s' % (
                self.program.name, size - left, size, self.program.errors()))
        return digest.hexdigest()

    def close(self):
        self.program.close()


class ScpTransport(Staging):
    """A tar stream for the bytes of many files, a plain one for a large file, which can be
    resumed, and one remote POSIX shell for hashing, renaming and the rest.

    Where the target has no tar, the scp program carries the bytes.  The names reach it as a
    tree of symlinks in the spool, so no name is ever in an argument list.
    """

    takes = 'network host ssh scp chmod parallel'
    lists = True
    modules = ('tarfile',) if WINDOWS else ('grp', 'pwd', 'tarfile')

    # what prints a SHA-256 first, then the name
    OPENSSL = b'openssl dgst -sha256 -r'
    HASHES = (b'sha256sum', b'shasum -a 256', b'sha256 -r', b'digest -a sha256',
              OPENSSL, b'cksum -a sha256 --untagged', b'busybox sha256sum')
    KNOWN = b'edeaaff3f1774ad2888673770c6d64097e391bc362d7d6fb34982ddf0efd18cb'     # of abc and LF

    # place FROM TO: by a link, which never overwrites, or where there are none by a rename; not
    # where links work but not here: mv would copy to another file system
    PLACE = b'''links() { ln -- "$1" "$1.ln" 2>/dev/null && rm -f -- "$1.ln"; }
place() {
    if [ -e "$2" ] || [ -L "$2" ]; then [ "$1" -ef "$2" ]
    elif ln -- "$1" "$2" 2>/dev/null; then :
    elif links "$1"; then false
    else mv -n -- "$1" "$2" && [ ! -e "$1" ] && [ ! -L "$1" ]
    fi
}
put() { place "$1" "$2" && rm -f -- "$1" && echo 1 || echo 0; }
'''

    MUCH = 64 << 20             # bytes from which the longer start of openssl pays: up to five times as fast
    FRUITLESS = 2               # streams that brought nothing, after which one more tells

    def __init__(self, *args, **kwargs):
        Staging.__init__(self, *args, **kwargs)
        self.ssh = SshConnection(self.stream, self.stop)
        self.talk = None                # the Dialogue for everything but the bytes
        self.prepared = []              # the Feed that is ready for the first bytes

    def open(self):
        self.made.clear()
        self.apart.clear()
        self.ssh.open()
        if self.talk and self.talk.program.process.poll() is not None:
            self.end_dialogue()
        if not self.talk:
            self.talk = self.start_dialogue()
            self.check_base()

    def end_dialogue(self):
        while self.prepared:
            self.prepared.pop().close()
        if self.talk:
            self.talk.close()
            self.talk = None

    def close(self):
        self.end_dialogue()
        self.ssh.close()

    def present(self, names):
        names = list(names)
        return {name for name, there in zip(names, self.exist_all(names)) if there}

    def start_dialogue(self):
        self.traits.clear()
        self.shown.clear()
        self.prepared = [self.new_feed()]       # its session begins while the first questions are asked
        self.batches, self.batch_patience = 0, 0
        self.run_id = random_hex(4)     # what an older run staged is never taken for ours
        return Dialogue(self.ssh.command() + ['--', self.stream.target_host, 'exec sh -s'], self.stop,
                        self.stream.stall_timeout, lambda t: (b'echo %s\n' % t, t + b'\n'),
                        self.lock_fds)

    def words(self, names):
        return b' '.join(shell_quote(b'./' + name) for name in names)

    @property
    def base(self):
        path = to_bytes(self.stream.target_base)
        return shell_quote(path if path.startswith(b'/') else b'./' + path)     # or CDPATH leads elsewhere

    def check_base(self):
        """Go to target_dir, and learn what this machine has."""
        make = b'mkdir -p -- %s 2>/dev/null\n' % self.base if self.stream.create_directories else b''
        mark = random_hex(12)           # a login script may print, too
        script = b'echo; echo %s; LC_ALL=C; export LC_ALL\n%s%s' % (mark, self.PLACE, make)
        script += b'for h in %s; do case $(echo abc | $h 2>/dev/null) in %s*)\n' \
            b'echo "hash $h"; break;; esac; done\n' % (b' '.join(map(shell_quote, self.HASHES)), self.KNOWN)
        script += b'cd -- %s && B=$PWD && echo base\n' \
            b'command -v tar >/dev/null && echo tar\necho umask $(umask)\n' % self.base
        try:
            lines = self.talk.ask(script)
        except TargetError as error:
            raise self.no_shell(error)
        lines = lines[lines.index(mark) + 1:]
        told = dict(line.split(b' ', 1) for line in lines if b' ' in line)
        self.hash, self.tar = told.get(b'hash'), b'tar' in lines
        self.umask = int(told.get(b'umask', b'022'), 8)
        self.hashing = 'hashed there' if self.hash else 'read back'
        if b'base' not in lines:
            self.end_dialogue()
            raise self.missing('is missing or no directory')
        if not self.hash:
            log.once('%s has no program for SHA-256: what has to be compared is read back' % (
                self.stream.target_host), self.stream)

    def no_shell(self, error):
        """What to say when the first question had no answer."""
        code = self.talk.program.process.poll()
        self.end_dialogue()
        if code in (None, 255):
            return error
        return TargetError('%s gives this account no shell that runs sh: %s' % (
            self.stream.target_host, error.message),
            'use transfer_protocol = sftp, or give it another login shell (chsh)')

    def exist_all(self, paths):
        answer = self.talk.ask(
            b'cd -- "$B" && for f in %s; do if [ -e "$f" ] || [ -L "$f" ]; then echo 1\n'
            b'elif [ -d "${f%%/*}" ] && [ ! -x "${f%%/*}" ]; then echo 2; else echo 0; fi; done\n'
            b'[ -x . ] && echo yes\n' % self.words(paths))
        if answer[-1:] != [b'yes'] or len(answer) != len(paths) + 1:
            raise self.missing('is missing or no directory')
        return [{b'1': True, b'0': False}.get(line) for line in answer[:-1]]

    def try_absence(self):
        return self.exist_all([self.area, os.path.join(self.area, random_hex(8))]) == [True, False]

    PATTERNS = b'*', b'.[!.]*', b'..?*'         # all names; one that fits nothing is printed as it is

    def listing(self, directory):
        answer = b'\n'.join(self.talk.ask(
            b'( cd %s && [ -r . ] && printf "%%s\\0" %s && for f in %s\n'
            b'do if [ -e "$f" ] || [ -L "$f" ]; then echo 1; else echo 0; fi; done )\n' % (
                self.words([directory or b'.']), b' '.join(self.PATTERNS),
                b' '.join(map(shell_quote, self.PATTERNS)))))
        names = answer.split(b'\0')
        flags = names.pop().split(b'\n')
        if len(flags) != len(self.PATTERNS):
            return None
        return set(names) - {name for name, flag in zip(self.PATTERNS, flags) if flag == b'0'}

    def write_small(self, path, content):
        if self.talk.ask(b'printf %%s %s > %s && echo yes\n' % (
                shell_quote(content), self.words([path]))) != [b'yes']:
            raise ItemError('cannot write %s at %s: %s' % (
                show(path), target_of(self.stream), self.talk.program.errors()))

    def make_directories(self, paths):
        for path in paths:
            mode = b'700' if path == self.area else \
                b'%o' % self.stream.target_chmod[1] if self.stream.target_chmod else b''
            change = b' && chmod %s %s' % (mode, self.words([path])) if mode else b''
            if self.talk.ask(b'mkdir -p %s%s && echo yes\n' % (self.words([path]), change)) != [b'yes']:
                raise ItemError('cannot make %s at %s: %s' % (
                    show(path), target_of(self.stream), self.talk.program.errors()),
                    'may this account write there?')

    def staged_name(self, entry):
        """Under its own name in a directory of this batch, so that many can be placed at once; a
        large file under the one name that a later run finds again."""
        if self.resumes(entry):
            return Staging.staged_name(self, entry)
        return os.path.join(self.area, self.batch_name(), entry.path)

    @staticmethod
    def resumes(entry):
        return entry.size >= RESUME_FROM

    def batch_name(self):
        return b'%s-%d' % (self.run_id, self.batches)

    def make_jobs(self, batch):
        self.batches += 1
        return Staging.make_jobs(self, batch)

    def mode_of(self, entry):
        """As a program at the target would make it: its umask counts; what we cannot read there
        could not be proven."""
        if self.stream.target_chmod:
            return self.stream.target_chmod[0]
        return entry.mode & 0o777 & ~self.umask | 0o400

    def stage(self, batch, jobs):
        large = [job for job in jobs if self.resumes(job.entry)]
        rest, fruitless = [job for job in jobs if not self.resumes(job.entry)], 0
        while rest:
            many = self.pour if self.tar else self.copy
            before, rest = len(rest), many(batch, rest, fruitless == self.FRUITLESS)
            fruitless = fruitless + 1 if len(rest) == before - 1 else 0
        there = self.measure([job.staged for job in large], False)
        for job in large:
            self.append(batch, job, there.get(job.staged, (0,))[0])
        self.delete([job.staged for job in jobs if job.error])

    # -- the bytes, as a tar stream

    def new_feed(self):
        return Feed(self.ssh, self.stop, self.stream.stall_timeout, self.throttle, self.lock_fds)

    def feed(self, script):
        try:
            feed = self.prepared.pop()          # one step: another thread may need one, too
        except IndexError:
            feed = self.new_feed()
        if feed.program.process.poll() is not None:         # its session ended while it waited
            feed.close()
            feed = self.new_feed()
        return feed.begin(b'umask 077; cd -- %s && cd %s && %s' % (
            self.base, self.words([self.area]), script))

    def one_tar(self, batch, jobs):
        """One tar stream; what tar said of it, `output` is empty if it did not come to its end."""
        mark = os.path.join(self.batch_name(), random_hex(12))      # a stream that is cut ends with 0
        word = self.words([mark])
        feed = self.feed(b'tar -x -o -p -f -; c=$?; rm %s 2>/dev/null && echo whole; exit $c' % word)
        with contextlib.closing(feed):
            made = set()
            for job in jobs:
                self.write_parents(feed, job, made)
                self.write_member(feed, batch, job)
                if feed.broken:
                    break
            feed.write(tar_head(mark, 0, 0o600) + bytes(2 * 512))
            return feed.end(self.growth())

    def pour(self, batch, jobs, last):
        """Send files in one tar stream; returns those that are left for another one.  Some tars end
        at the first file that they cannot write."""
        done = self.one_tar(batch, jobs)
        if done.output and done.code == 0:
            return []
        missing = self.damaged(batch, jobs)
        if len(missing) == len(jobs) and not self.one_tar(batch, []).output:
            self.tar = False            # not such a tar
            return jobs
        return self.blame(missing, done.errors, last)

    def blame(self, missing, reason, last):
        """The first of some files that did not arrive has an error; returns those to be sent once
        more: what was there of it may have taken their room.  last: all have an error."""
        if not missing:
            return []
        self.refuse(missing if last else missing[:1], reason)
        free = self.free_space()
        self.refuse([job for job in missing[1:] if free is not None and job.entry.size > free], 'no room')
        return [job for job in missing if not job.error]

    def damaged(self, batch, jobs):
        """Those of some files that are not there as they were sent, after something went wrong: by
        their hashes, for a full disk leaves holes of the right size."""
        there = self.measure([job.staged for job in jobs], True)
        found = []
        for job in jobs:
            job.hashed = True
            with job.own_faults():
                if not job.error and (job.staged not in there or
                                      there[job.staged][1] != self.digest(batch, job)):
                    found.append(job)
        return found

    def refuse(self, jobs, reason):
        """The target could not write these: say so, and give it the room again."""
        for job in jobs:
            job.error = ItemError('%s cannot be written at %s: %s' % (
                show(job.final), target_of(self.stream), reason or 'no reason given'))
        self.delete([job.staged for job in jobs])

    def write_parents(self, feed, job, made):
        """The directories above it, those that are no members yet."""
        for step in prefixes(os.path.dirname(job.staged[len(self.area) + 1:])):
            if step not in made:
                made.add(step)
                feed.write(tar_head(step, 0, 0o700, time.time() * 1e9, b'5'))

    def write_member(self, feed, batch, job):
        """Its bytes; where the source has less of them than it had, zeros, or what follows would
        be taken for it.  Sets job.error."""
        import hashlib
        entry, digest, sent = job.entry, hashlib.sha256(), 0

        def write(block):
            nonlocal sent
            sent += len(block)
            feed.write(block)
            if job.hashed:
                digest.update(block)
        feed.write(tar_head(job.staged[len(self.area) + 1:], entry.size, self.mode_of(entry), entry.mtime_ns))
        with job.own_faults():
            copy_entry(batch.root, entry, write, self.stop)
            job.digest = digest.hexdigest() if job.hashed else None
        feed.write(bytes(entry.size - sent + -entry.size % 512))
        self.progress.sent(sent)

    # -- the bytes of a large file

    def append(self, batch, job, part):
        """Send what is missing of a file of which `part` bytes are there, perhaps from an earlier run."""
        entry = job.entry
        start = part if part <= entry.size else 0
        job.hashed = job.hashed or start > 0        # only the whole proves what was continued
        seconds = min(max(0, entry.mtime_ns // 10 ** 9), LAST_SECOND)
        stamp = time.strftime('%Y%m%d%H%M.%S', time.gmtime(seconds)).encode()
        word = self.words([job.staged[len(self.area) + 1:]])
        feed = self.feed(b'%s cat >> %s; c=$?; chmod %o %s; TZ=UTC0 touch -t %s %s; exit $c' % (
            b'' if start else b'rm -f %s;' % word, word, self.mode_of(entry), word, stamp, word))
        try:
            with contextlib.closing(feed):
                self.write_rest(feed, batch, job, start)
                done = feed.end(self.growth())
        except TargetError as error:
            error.path = entry.path
            raise
        if done.code:
            self.refuse([job], done.errors)

    def write_rest(self, feed, batch, job, start):
        """The bytes of a file from `start` on.  Sets job.error."""
        import hashlib
        digest = hashlib.sha256()

        def write(block):
            if feed.broken:
                raise ItemError('%s was refused' % show(job.entry.path))
            feed.write(block)
            digest.update(block)
            self.progress.sent(len(block))
        with job.own_faults():
            copy_prefix(batch.root, job.entry, digest, start, self.stop)
            copy_entry(batch.root, job.entry, write, self.stop, start)
            job.digest = digest.hexdigest() if job.hashed else None

    # -- the bytes, by the scp program

    def copy(self, batch, jobs, last):
        """Send files by the scp program; returns those that are left for another try."""
        trouble = self.run_scp(batch, jobs)
        if self.stream.target_chmod:
            for chunk in in_chunks([job.staged for job in jobs], 500):
                self.talk.ask(b'chmod %o %s\n' % (self.stream.target_chmod[0], self.words(chunk)))
        self.progress.sent(sum(job.entry.size for job in jobs))
        missing = self.damaged(batch, jobs) if trouble else []
        return self.blame(sorted(missing, key=lambda job: -job.entry.size), trouble, last)

    def run_scp(self, batch, jobs):
        """What it complained of, '' if nothing."""
        import shutil
        spool = os.path.join(to_bytes(self.stream.spool), b'scp')
        shutil.rmtree(spool, ignore_errors=True)
        trees = collections.Counter()       # bytes on the line for each
        for number, job in enumerate(jobs):
            tree = os.path.join(spool, b'%d' % (number % self.stream.parallel), self.batch_name())
            link = os.path.join(tree, job.entry.path)
            with own_files('cannot write to the spool %s' % show(spool)):
                os.makedirs(os.path.dirname(link), 0o700, exist_ok=True)
                os.symlink(os.path.join(batch.root, job.entry.path), link)
            trees[tree] += job.entry.size + (4 << 10)       # and what scp says about it
        try:
            return self.copy_trees(trees)
        finally:
            shutil.rmtree(spool, ignore_errors=True)

    def copy_trees(self, trees):
        """One scp for each tree, side by side; what they complained of, '' if nothing, which
        proves nothing yet."""
        base = to_bytes(self.stream.target_base)
        if not base.startswith(b'/'):
            base = b'./' + base
        target = b'%s:%s/' % (in_brackets(self.stream.target_host), os.path.join(base, self.area))
        failures, complaints = [], []

        def copy(tree):
            limit = []
            if self.stream.bandwidth_limit:     # shared so that all end together
                share = trees[tree] / sum(trees.values())
                limit = ['-l', '%d' % max(1, self.stream.bandwidth_limit * 8 / 1024 * share)]
            try:
                done = run([self.stream.scp_command, '-q', '-p', '-r'] + limit + self.ssh.options() +
                           ['--', tree, target], self.stop, self.stream.stall_timeout,
                           keep_fds=self.lock_fds, alive=self.growth())
                if done.code:
                    complaints.append(done.errors or 'scp ended with %d' % done.code)
                if done.code == 255:
                    raise TargetError('scp to %s broke off: %s' % (target_of(self.stream), done.errors))
            except MoverError as error:
                failures.append(error)

        threads = [threading.Thread(target=copy, args=(tree,)) for tree in trees]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return '; '.join(complaints)[-500:]

    def growth(self):
        """scp is silent while it works; this makes a function for one of them that tells
        whether more has arrived since it was asked last."""
        arrived = None

        def growing():
            nonlocal arrived
            before = arrived
            try:
                lines = self.talk.ask(b'du -sk %s\n' % self.words([self.area]))
            except TargetError:
                return False
            arrived = lines and lines[0].split()[0]
            return arrived != before
        return growing

    def measure(self, paths, hashed):
        """Sizes by wc or hashes by what the target has, which prove the size as well."""
        if hashed and not self.hash:
            return {p: (size, self.read_back(p, size)) for p, (size, _) in self.measure(paths, False).items()}
        found = {}
        command = self.hash if hashed else b'wc -c'
        for chunk in in_chunks([p for p in paths if not re.search(rb'[\n\r\\]', p)], 500):
            lines = self.talk.ask(
                b'set -- %s\nfor f do if [ -L "$f" ] || { [ -e "$f" ] && [ ! -f "$f" ]; }\n'
                b'then set --; break; fi; done\n[ $# -gt 0 ] && %s "$@" 2>/dev/null\n' % (
                    self.words(chunk), command), self.hash_limit())
            for line in lines:
                match = re.match(rb'\s*(\w+) [ *]?(\./.*)$', line)
                if match:
                    found[match.group(2)[2:]] = match.group(1)
        for chunk in in_chunks([p for p in paths if p not in found], 500):
            # what is no file or not there, names that are printed in another way, a program that
            # prints none
            lines = self.talk.ask(
                b'for f in %s; do set --; [ -f "$f" ] && [ ! -L "$f" ] && set -- $(%s < "$f")\n'
                b'echo "$1"; done\n' % (self.words(chunk), command), self.hash_limit())
            found.update((path, line) for path, line in zip(chunk, lines) if line)
        return {p: (None, v.decode()) if hashed else (int(v), None) for p, v in found.items()}

    def try_openssl(self):
        return self.talk.ask(b'echo abc | %s 2>/dev/null\n' % self.OPENSSL)[:1] == [
            self.KNOWN + b' *stdin']

    def hash_limit(self):
        return max(self.stream.stall_timeout, self.batch_patience)

    def read_back(self, path, size):
        with contextlib.closing(self.feed(b'cd .. && cat %s' % self.words([path]))) as feed:
            return feed.digest(size)

    def verify(self, batch, jobs):
        self.batch_patience = self.stream.stall_timeout + batch.size / CHECK_RATE
        if batch.size >= self.MUCH and self.hash and self.trait('openssl'):
            self.hash = self.OPENSSL
        Staging.verify(self, batch, jobs)
        self.sync()             # before they have names: what is proven must survive a power cut there

    def exists(self, path):
        return self.exist_all([path])[0]

    def sync(self):
        self.talk.ask(b'sync -f . 2>/dev/null || sync\n', self.hash_limit())

    def place(self, jobs):
        done = set()
        groups = collections.defaultdict(list)
        for job in jobs:
            # ln into the directory keeps the base name; a large file, or one after a rename, has another
            many = os.path.basename(job.staged) == os.path.basename(job.final)
            groups[os.path.dirname(job.final) if many else None].append(job)
        for directory, members in groups.items():
            place = self.words([directory or b'.'])
            for chunk in in_chunks(members, 500):
                if directory is None:
                    script = b''.join(b'put %s\n' % self.words([job.staged, job.final]) for job in chunk)
                else:               # all in one command, if nothing is in the way
                    script = b'set -- %s\nif ln -- "$@" %s/ 2>/dev/null; then rm -f -- "$@"; echo all\n' \
                        b'elif links "$1"; then for f do put "$f" %s/"${f##*/}"; done\n' \
                        b'else mv -n -- "$@" %s/ 2>/dev/null\nfor f do ' \
                        b'if [ -e "$f" ] || [ -L "$f" ]; then echo 0; else echo 1; fi; done; fi\n' % (
                            self.words(job.staged for job in chunk), place, place, place)
                lines = self.talk.ask(script)
                done.update(chunk if lines == [b'all'] else
                            (job for job, line in zip(chunk, lines) if line == b'1'))
        return done

    def rename(self, old, new):
        answer = self.talk.ask(b'[ ! -d %s ] && mv -f -- %s %s && echo yes\n' % (
            self.words([new]), self.words([old]), self.words([new])))
        if answer != [b'yes']:
            raise ItemError('cannot rename %s to %s: %s' % (show(old), show(new),
                                                            self.talk.program.errors()))

    def delete(self, paths):
        for chunk in in_chunks(paths, 500):
            self.talk.ask(b'rm -f -- %s\n' % self.words(chunk))

    def delete_area(self):
        return self.talk.ask(b'rm -rf -- %s && echo yes\n' % self.words([self.area])) == [b'yes']

    def free_space(self):
        lines = self.talk.ask(b'df -Pk .\n')
        match = re.search(rb' (\d+) +\d+ +(\d+) +\d+% ', lines[-1]) if lines else None
        return int(match.group(2)) * 1024 if match and int(match.group(1)) else None


class Fxp:
    """The numbers of SFTP version 3 (draft-ietf-secsh-filexfer-02, sections 3, 5, 6.3 and 7)."""

    INIT, VERSION, OPEN, CLOSE, READ, WRITE, LSTAT, FSTAT, SETSTAT, FSETSTAT, OPENDIR, READDIR, REMOVE, \
        MKDIR, RMDIR, REALPATH, STAT, RENAME = range(1, 19)
    STATUS, HANDLE, DATA, NAME, ATTRS, EXTENDED, EXTENDED_REPLY = 101, 102, 103, 104, 105, 200, 201
    TO_READ, TO_WRITE, CREATE, EXCLUSIVE = 1, 2, 8, 32
    HAS_SIZE, HAS_OWNER, HAS_MODE, HAS_TIMES, HAS_MORE = 1, 2, 4, 8, 1 << 31
    OK, END, MISSING, DENIED, FAILED, BAD, UNSUPPORTED = 0, 1, 2, 3, 4, 5, 8
    FULL = 14, 15                       # of later drafts: no space, quota exceeded

    # of a file: size, mode and mtime in seconds, None where the server does not say
    Attributes = collections.namedtuple('Attributes', 'size mode mtime')

    @staticmethod
    def string(value):
        return len(value).to_bytes(4, 'big') + value

    @staticmethod
    def number(body, at, width=4):
        return int.from_bytes(body[at:at + width], 'big')

    @classmethod
    def cut(cls, body, at):
        """A string in a body, and where it ends."""
        end = at + 4 + cls.number(body, at)
        return body[at + 4:end], end

    @classmethod
    def attributes(cls, body, at):
        """Attributes in a body, and where they end (section 5)."""
        flags, at = cls.number(body, at), at + 4
        size = mode = mtime = None
        if flags & cls.HAS_SIZE:
            size, at = cls.number(body, at, 8), at + 8
        if flags & cls.HAS_OWNER:
            at += 8
        if flags & cls.HAS_MODE:
            mode, at = cls.number(body, at), at + 4
        if flags & cls.HAS_TIMES:
            mtime, at = cls.number(body, at + 4), at + 8
        if flags & cls.HAS_MORE:
            count, at = min(cls.number(body, at), len(body)), at + 4
            for _ in range(2 * count):
                at = cls.cut(body, at)[1]
        return cls.Attributes(size, mode, mtime), at

    @classmethod
    def packed(cls, mode=None, mtime=None):
        """The attributes to set: a mode, a time in seconds."""
        flags = (cls.HAS_MODE if mode is not None else 0) | (cls.HAS_TIMES if mtime is not None else 0)
        parts = [flags] + ([mode] if mode is not None else []) + ([mtime, mtime] if mtime is not None else [])
        return b''.join(part.to_bytes(4, 'big') for part in parts)

    @classmethod
    def status(cls, answer):
        """The code of an answer that is a status, else None."""
        kind, body = answer
        return cls.number(body, 0) if kind == cls.STATUS else None

    @classmethod
    def good(cls, answer):
        return answer[0] == cls.STATUS and answer[1][:4] == b'\0\0\0\0'

    @classmethod
    def words(cls, answer):
        """What the server says of a status, for a message."""
        code = cls.status(answer)
        names = {1: 'end of file', 2: 'no such file', 3: 'permission denied', 4: 'failure', 5: 'bad message',
                 8: 'operation unsupported', 14: 'no space left', 15: 'quota exceeded'}
        if code is None:
            return 'an answer of type %d' % answer[0]
        said = show(cls.cut(answer[1], 4)[0].strip()) if len(answer[1]) >= 8 else ''
        return said or names.get(code, 'status %d' % code)


class Patient(list):
    """Requests whose answers may take `seconds` longer than others'."""

    seconds = 0


class SftpTask:
    """One generator of SftpSession.run() on its way."""

    __slots__ = ('steps', 'path', 'work', 'index', 'asked', 'count', 'drawn', 'answers', 'under_way',
                 'fault')

    def __init__(self, steps, path, work, index):
        self.steps, self.path, self.work, self.index = steps, path, work, index
        self.asked = self.fault = self.answers = None
        self.count = None               # of a list of requests
        self.drawn = self.under_way = 0


class SftpWork:
    """The tasks of one caller of SftpSession.run()."""

    def __init__(self, tasks):
        self.fresh = enumerate(tasks)
        self.to_send = collections.deque()      # tasks with requests to send
        self.active = 0
        self.exhausted = False
        self.results = {}
        self.error = None

    def done(self):
        return self.exhausted and not self.active


class SftpSession:
    """SFTP version 3 (draft-ietf-secsh-filexfer-02) over the pipes of a running program.

    It numbers requests, keeps up to AHEAD of them under way, always reads, and hands each
    answer back to who asked, in whatever order they come.  Who asks is a generator: it yields
    requests (kind, body), gets their answers (kind, body), and goes on; many run side by side.
    What is yielded is a list, answered in its order, or any other iterator, which is drawn
    from as there is room and of which only the answers come back that are no plain OK.
    """

    AHEAD = 64                          # met no trouble anywhere, with requests as with handles
    ROOM = 8                            # answers that are waited for while more requests are under way
    LONGEST = (256 << 10) + 1024        # bytes of a packet: what OpenSSH sends at most
    GULP = 1 << 16                      # bytes that are written at a time

    def __init__(self, argv, stop, limit, login_limit, at_once, **more):
        """limit: seconds of silence while answers are due; login_limit: of the login; at_once: tasks
        that may be under way.  more: as for Program.  Raises TargetError, Interrupted."""
        self.limit, self.at_once = limit, at_once
        self.program = Program(argv, stop, None, **more)
        self.lock = threading.Lock()    # whoever waits for answers drives, one thread at a time
        self.works = collections.deque()
        self.sent = {}                  # number -> (task, index of its request), oldest first
        import struct
        self.head = struct.Struct('>IBI')       # length, type, number
        self.last = self.active = 0
        self.rest = b''
        self.more_time = {}             # task -> seconds more that its answers may take
        self.handles = {}               # handle -> number of the request to close it, None before that
        self.shares_handles = False     # see note_handle()
        self.ended = None               # the error that ended it
        self.extensions = {}
        try:
            self.greet(login_limit)
        except BaseException:
            self.program.close()
            raise

    def greet(self, limit):
        with contextlib.suppress(TargetError):      # it ended already: below it is said why
            self.program.write(b'\0\0\0\5\1\0\0\0\3', limit)
        while True:
            if len(self.rest) >= 5 and (self.rest[4] != Fxp.VERSION or self.length(0) > self.LONGEST):
                raise TargetError('the sftp server does not begin with the protocol but with: %s' % show(
                    self.rest.split(b'\n')[0][:80]), 'does a login script there print something? '
                    'it must be silent where no terminal is')
            if len(self.rest) >= 5 and len(self.rest) >= 4 + self.length(0):
                break
            piece = self.program.read(limit)
            if not piece:
                raise self.gone('cannot log in, or no sftp there')
            self.rest += piece
        at, end = 9, 4 + self.length(0)
        while at < end:
            name, at = Fxp.cut(self.rest, at)
            self.extensions[name], at = Fxp.cut(self.rest, at)
        self.rest = self.rest[end:]

    def length(self, at):
        return Fxp.number(self.rest, at)

    def gone(self, what):
        code = self.program.wait(KILL_GRACE)
        return TargetError('%s: %s' % (what, self.program.errors() or 'ssh ended with %s' % code))

    def alive(self):
        return self.ended is None and self.program.process.poll() is None

    def close(self):
        self.program.close()

    def run(self, tasks):
        """Drive generators, given as (path for messages, generator), to their ends; what they
        return, in order.  Raises the first MoverError that one of them does not catch, after
        all have ended; at once TargetError (with the path of what was under way) and
        Interrupted, after which the session is over for every thread."""
        work = SftpWork(tasks)
        with self.lock:
            self.works.append(work)
        while not work.done():
            with self.lock:
                if not work.done():
                    self.drive()
        with self.lock:
            self.works.remove(work)
        if work.error:
            raise work.error
        return [work.results[index] for index in range(len(work.results))]

    def drive(self):
        if self.ended:      # a new one each time: one that threads share makes a ring of contexts
            raise type(self.ended)(self.ended.message, self.ended.hint, self.ended.path)
        try:
            self.fill()
            if self.sent:
                piece = self.program.read(self.limit + max(self.more_time.values(), default=0))
                if not piece:
                    raise self.gone('the sftp server ended')
                self.hear(piece)
        except MoverError as error:
            if self.sent and isinstance(error, TargetError) and error.path is None:
                error.path = next(iter(self.sent.values()))[0].path
            self.ended = error
            raise

    def fill(self):
        """Send requests, of each thread's work in turn, where there is room for some: each write wakes
        three programs up."""
        if len(self.sent) > self.AHEAD - self.ROOM:
            return
        packets, size = [], 0
        while len(self.sent) < self.AHEAD:
            packet = self.next_packet()
            if packet is None:
                break
            packets.append(packet)
            size += len(packet)
            if size >= self.GULP:
                self.program.write(b''.join(packets), self.limit)
                packets, size = [], 0
        if packets:
            self.program.write(b''.join(packets), self.limit)

    def next_packet(self):
        for _ in range(len(self.works)):
            work = self.works[0]
            self.works.rotate(-1)
            packet = self.packet_of(work)
            if packet is not None:
                return packet
        return None

    def packet_of(self, work):
        """The next packet of a work; one task after the other, so that few are half done."""
        while True:
            if work.to_send:
                task = work.to_send[0]
                packet = self.draw(task)
                if packet is None or task.drawn == task.count:
                    work.to_send.popleft()
                    task.asked = None
                if packet is not None:
                    return packet
                if not task.under_way:
                    self.advance(task)
            elif work.exhausted or self.active >= self.at_once:
                return None
            else:
                self.begin(work)

    def begin(self, work):
        try:
            index, (path, steps) = next(work.fresh)
        except StopIteration:
            work.exhausted = True
            return
        work.active += 1
        self.active += 1
        self.advance(SftpTask(steps, path, work, index))

    def draw(self, task):
        try:
            kind, body = next(task.asked)
        except StopIteration:
            return None
        except (ItemError, Changed) as error:       # what the iterator reads
            task.fault = error
            return None
        self.last = number = (self.last + 1) & 0xffffffff
        self.sent[number] = task, task.drawn
        task.drawn += 1
        task.under_way += 1
        if kind == Fxp.CLOSE:
            self.handles[body] = number
        return self.head.pack(5 + len(body), kind, number) + body

    def advance(self, task):
        """Its answers are there: let it go on to its next requests or to its end."""
        try:
            if task.fault:
                fault, task.fault = task.fault, None
                asked = task.steps.throw(fault)
            else:
                asked = task.steps.send(task.answers)
        except StopIteration as end:
            self.end_task(task, end.value)
        except (ItemError, Changed) as error:
            task.work.error = task.work.error or error
            self.end_task(task, None)
        else:
            if type(asked) is Patient:
                self.more_time[task] = asked.seconds
            task.count = len(asked) if isinstance(asked, list) else None
            task.answers = [None] * (task.count or 0)
            task.drawn = 0
            task.asked = iter(asked)
            task.work.to_send.append(task)

    def end_task(self, task, result):
        task.work.results[task.index] = result
        task.work.active -= 1
        self.active -= 1

    def hear(self, piece):
        data = self.rest + piece
        at, size = 0, len(data)
        while size - at >= 9:
            length, kind, number = self.head.unpack_from(data, at)
            if not 5 <= length <= self.LONGEST:
                raise TargetError('the sftp server sent what is no answer')
            end = at + 4 + length
            if size < end:
                break
            self.answer(number, kind, data[at + 9:end])
            at = end
        self.rest = data[at:]

    def answer(self, number, kind, body):
        if number not in self.sent:
            raise TargetError('the sftp server answered what nobody asked')
        task, index = self.sent.pop(number)
        task.under_way -= 1
        if kind == Fxp.HANDLE:
            self.note_handle(number, body)
        if task.count is not None:
            task.answers[index] = kind, body
        elif not Fxp.good((kind, body)):
            task.answers.append((kind, body))
            if task.asked is not None:
                task.asked = iter(())   # the rest is in vain
        if not task.under_way and task.asked is None:
            if self.more_time:
                self.more_time.pop(task, None)
            self.advance(task)


    def note_handle(self, number, handle):
        """Erlang's server calls the third open file by the handle of the second: what is written to
        either goes to one of them.  Raises TargetError, for what that is nobody can tell any more."""
        closed = self.handles.get(handle, 0)
        if closed is None or closed > number:       # when this file was asked for
            self.shares_handles = True
            raise TargetError('the sftp server gave one handle to two open files')
        self.handles[handle] = None
        if len(self.handles) > 4 * self.AHEAD:
            self.handles = {handle: closed for handle, closed in self.handles.items()
                            if closed is None or closed in self.sent}


class SftpTransport(Staging):
    """SFTP by ourselves: login, keys and ciphers are ssh's, which runs the subsystem; the requests
    of many files are under way together.  One channel of one connection does: some servers have
    no more."""

    directories = 'zip', 'keep'
    lists = True
    takes = 'network host ssh password_file chmod staging'
    PIECE = 32 << 10                    # bytes a request carries: every server takes as many
    ROUND = 32                          # requests of one file that are read back together
    WINDOW = SftpSession.AHEAD * PIECE  # bytes that may be missing behind what arrived

    def __init__(self, *args, **kwargs):
        Staging.__init__(self, *args, **kwargs)
        self.ssh = SshConnection(self.stream, self.stop)
        self.base = to_bytes(self.stream.target_base).rstrip(b'/') + b'/'
        self.session = None
        self.can_hash = None            # check-file: not yet tried
        self.one_by_one = False         # whether a file may be open there only while no other is
        self.sources = {}               # path at the target -> of the file here, for messages
        self.resumed = set()            # jobs that went on where an earlier run had ended
        self.begin()

    def begin(self):
        """Nothing is known of a new connection."""
        for notes in (self.made, self.shown, self.traits):
            notes.clear()
        self.deletes = False            # until one went
        self.dressing = 0               # which of DRESSES the server takes
        self.publish_by = None          # 'rename' or 'link' where that never replaces, else 'look'
        self.mark = None                # the handle of sync()
        self.can_hash = self.can_hash and None      # once it ended the connection, never again
        self.sized = {}                 # path -> size, as an answer told that nobody has used yet

    # -- the connection

    def open(self):
        self.made.clear()               # who empties a directory there may remove it between two passes
        self.apart.clear()
        if self.session and self.session.alive():
            return
        self.close()
        self.begin()
        stream = self.stream
        argv = self.ssh.command() + ['-oControlMaster=no', '-oControlPath=none', '-s', '--',
                                     stream.target_host, 'sftp']
        try:
            self.session = SftpSession(argv, self.stop, stream.stall_timeout, stream.connect_timeout + 10,
                                       1 if self.one_by_one else SftpSession.AHEAD,
                                       keep_fds=self.lock_fds, secret=self.ssh.askpass())
        except TargetError as error:
            error.hint = error.hint or ssh_hint(stream, error.message)
            raise
        self.can_sync = b'fsync@openssh.com' in self.session.extensions and not self.one_by_one
        self.can_replace = b'posix-rename@openssh.com' in self.session.extensions
        if stream.create_directories:       # else present() tells whether it is there
            self.make_base()

    def close(self):
        if self.session:
            self.one_by_one = self.one_by_one or self.session.shares_handles
            self.session.close()
            self.session = None

    def run(self, steps, path=None):
        """The value of one generator; path: the one at the target that it is about."""
        return self.session.run([(self.sources.get(path), steps)])[0]

    def path(self, relative):
        """A path as the server gets it; what begins with no slash begins at the login's home."""
        path = self.base + relative if relative else self.base[:-1] or b'/'
        return len(path).to_bytes(4, 'big') + path

    def trouble(self, what, answer, step, *paths):
        """An ItemError that says what the server said; NoRoom by its code where it has one.  step: what
        was asked for, with a %s for each of the paths."""
        cls = NoRoom if Fxp.status(answer) in Fxp.FULL else ItemError
        hint = 'may this account %s there?' % (step % tuple(show(self.base + path) for path in paths)) \
            if Fxp.status(answer) == Fxp.DENIED else ''
        return cls('%s: %s' % (what, Fxp.words(answer)), hint)

    def make_base(self):
        base = to_bytes(self.stream.target_base)
        if not self.run(self.is_directory(b'')):
            self.run(self.make_steps(prefixes(base)))

    @staticmethod
    def make_steps(paths):
        for path in paths:
            yield [(Fxp.MKDIR, Fxp.string(path) + Fxp.packed())]

    # -- looking: generators for SftpSession.run()

    def stat(self, path, kind=Fxp.LSTAT):
        """Its Attributes, None if the server says that there is none.  Raises ItemError."""
        answer, = yield [(kind, self.path(path))]
        if answer[0] == Fxp.ATTRS:
            return Fxp.attributes(answer[1], 0)[0]
        if Fxp.status(answer) == Fxp.MISSING:
            return None
        raise self.trouble('cannot look at %s' % show(path), answer, 'look at %s', path)

    def is_directory(self, path):
        """Following links, which may lead anywhere on purpose."""
        answer, = yield [(Fxp.STAT, self.path(path))]
        return self.tells_directory(answer)

    @staticmethod
    def has_mode(answer, mode):
        there = Fxp.attributes(answer[1], 0)[0].mode if answer[0] == Fxp.ATTRS else None
        return there is not None and there & 0o7777 == mode

    @staticmethod
    def tells_directory(answer):
        mode = Fxp.attributes(answer[1], 0)[0].mode if answer[0] == Fxp.ATTRS else 0
        return mode is None or stat.S_ISDIR(mode)

    def is_there(self, path):
        """True, False, or None where the answer says neither."""
        answer, = yield [(Fxp.LSTAT, self.path(path))]
        return True if answer[0] == Fxp.ATTRS else False if Fxp.status(answer) == Fxp.MISSING else None

    def names_in(self, directory):
        """The exact names in a directory, None if it cannot be listed."""
        answer, = yield [(Fxp.OPENDIR, self.path(directory))]
        if answer[0] != Fxp.HANDLE:
            return None
        names, handle, count = set(), answer[1], -1
        while len(names) > count:           # one that says nothing new might do so for ever
            answer, = yield [(Fxp.READDIR, handle)]
            if answer[0] != Fxp.NAME:
                break
            at, count = 4, len(names)
            for _ in range(min(Fxp.number(answer[1], 0), len(answer[1]))):
                name, at = Fxp.cut(answer[1], at)
                at = Fxp.attributes(answer[1], Fxp.cut(answer[1], at)[1])[1]
                names.add(name)
        yield [(Fxp.CLOSE, handle)]
        return names - {b'.', b'..'} if Fxp.status(answer) == Fxp.END else None

    def exists(self, path):
        return self.run(self.is_there(path))

    def exist_all(self, paths):
        return self.session.run((self.sources.get(path), self.is_there(path)) for path in paths)

    def listing(self, directory):
        return self.run(self.names_in(directory))

    def present(self, names):
        """A name that cannot be there is asked for with the others: the experiment try_absence()
        without a file."""
        names, unknown = list(names), OWN_PREFIX + b'-try-' + random_hex(8)
        base, *found = self.session.run([(None, self.is_directory(b''))] + [
            (None, self.is_there(name)) for name in names + [unknown]])
        if not base:
            raise self.missing('is missing or no directory')
        self.traits['absence',] = found.pop() is False
        if self.traits['absence',] and None not in found:
            return {name for name, there in zip(names, found) if there}
        listed = self.listing(b'')
        if listed is None:
            raise TargetError('%s does not say whether %s is there' % (
                target_of(self.stream), show(names[0])), 'may this account look there?')
        return listed & set(names)

    def names_taken(self, jobs):
        """The sizes of what has those names are asked for together: each conflict begins with its."""
        taken = Staging.names_taken(self, jobs)
        self.session.run((job.entry.path, self.look_ahead(job.final)) for job in taken)
        return taken

    def look_ahead(self, path):
        answer, = yield [(Fxp.LSTAT, self.path(path))]
        info = Fxp.attributes(answer[1], 0)[0] if answer[0] == Fxp.ATTRS else None
        if info and info.size is not None and info.mode is not None and stat.S_ISREG(info.mode):
            self.sized[path] = info.size

    def measure(self, paths, hashed):
        found = self.session.run((self.sources.get(path), self.measured(path, hashed)) for path in paths)
        return {path: value for path, value in zip(paths, found) if value is not None}

    def measured(self, path, hashed):
        try:
            size = self.sized.pop(path, None)
            if size is None:
                info = yield from self.stat(path)
                if info is None or info.mode is not None and not stat.S_ISREG(info.mode):
                    return None
                size = info.size
            return size, (yield from self.hash_of(path, size)) if hashed else None
        except ItemError as error:
            return error

    # -- hashing

    def hash_of(self, path, size):
        """SHA-256 of what the server reads there; size None: to its end.  Raises ItemError."""
        import hashlib
        if self.can_hash is None and size and self.session.extensions:
            yield from self.learn_to_hash(path, min(size, self.PIECE))
        if self.can_hash:
            answer = yield from self.ask_hash(path, 0, size)
            if answer:
                return answer.hex()
        answer, = yield [self.to_read(path)]
        if answer[0] != Fxp.HANDLE:
            raise self.trouble('cannot read %s back' % show(path), answer, 'read %s', path)
        handle, digest, at = answer[1], hashlib.sha256(), 0
        while size is None or at < size:
            left = self.ROUND * self.PIECE if size is None else min(self.ROUND * self.PIECE, size - at)
            data = yield from self.read(handle, at, left)
            digest.update(data)
            at += len(data)
            if len(data) < left:
                break
        yield [(Fxp.CLOSE, handle)]
        return digest.hexdigest()

    def to_read(self, path):
        return Fxp.OPEN, self.path(path) + Fxp.TO_READ.to_bytes(4, 'big') + Fxp.packed()

    @property
    def hashing(self):
        """How a hash of what is there is had, for the ledger."""
        return 'check-file' if self.can_hash else 'read back'

    def ask_hash(self, path, length, size):
        """The SHA-256 of a file's first `length` bytes (0: of all) as the server computes it, or None
        (draft-ietf-secsh-filexfer-extensions-00, section 3)."""
        wanted = Patient([(Fxp.EXTENDED, Fxp.string(b'check-file-name') + self.path(path) +
                           Fxp.string(b'sha256') + bytes(8) + length.to_bytes(8, 'big') + bytes(4))])
        wanted.seconds = size / CHECK_RATE
        answer, = yield wanted
        right = answer[0] == Fxp.EXTENDED_REPLY and answer[1][:-32].endswith(Fxp.string(b'sha256'))
        return answer[1][-32:] if right else None

    def learn_to_hash(self, path, length):
        """Whether the server's word about the first bytes of a file of ours is what they are."""
        import hashlib
        self.can_hash = False           # until this is over
        said = yield from self.ask_hash(path, length, 0)
        if not said:
            return
        opened, = yield [self.to_read(path)]
        if opened[0] == Fxp.HANDLE:
            data = yield from self.read(opened[1], 0, length)
            yield [(Fxp.CLOSE, opened[1])]
            self.can_hash = hashlib.sha256(data).digest() == said

    def read(self, handle, start, length):
        """Bytes of an open file, less only at its end: a short answer is none."""
        wanted = [(at, min(self.PIECE, start + length - at))
                  for at in range(start, start + length, self.PIECE)]
        pieces = {}
        while wanted:
            answers = yield [(Fxp.READ, handle + at.to_bytes(8, 'big') + count.to_bytes(4, 'big'))
                             for at, count in wanted]
            short = []
            for (at, count), answer in zip(wanted, answers):
                data = Fxp.cut(answer[1], 0)[0] if answer[0] == Fxp.DATA else b''
                pieces[at] = data
                if data and len(data) < count:
                    short.append((at + len(data), count - len(data)))
            wanted = short
        return b''.join(pieces[at] for at in sorted(pieces))

    # -- sending

    def stage(self, batch, jobs):
        big = [job for job in jobs if job.entry.size >= RESUME_FROM]
        there = self.measure([job.staged for job in big], False) if big else {}
        starts = {}
        for job in big:
            part = there.get(job.staged)
            if isinstance(part, tuple) and part[0] and part[0] <= job.entry.size:
                starts[job] = max(0, part[0] - self.WINDOW)
        self.resumed.update(starts)
        self.sources.update((path, job.entry.path) for job in jobs for path in (job.staged, job.final))
        tasks = [(job.entry.path, self.put(batch, job, starts.get(job, 0))) for job in jobs]
        if self.stream.staging != 'area':
            self.publish_by = 'look'
        elif self.publish_by is None and jobs:      # while the first bytes go
            tasks[:0] = [(None, self.learn_to_publish())] + [(None, self.open_mark())] * self.can_sync
        self.session.run(tasks)

    def put(self, batch, job, start):
        """One file under its staged name: the answers to its bytes come before its time is set
        (some servers work out of order), and any that is no OK condemns it."""
        names = [job.staged]
        if job.entry.size < RESUME_FROM and self.stream.staging == 'area':
            names.append(job.staged + b'-' + random_hex(4))     # a dead connection may hold the first
        for job.staged in names:
            job.error = None
            try:
                yield from self.put_once(batch, job, start)
                return
            except ItemError as error:
                job.error = error
            except Changed as error:
                job.error = error
                return

    def put_once(self, batch, job, start):
        handle, start = yield from self.open_staged(batch, job, start)
        try:
            yield from self.fill(batch, job, handle, start)
        except (ItemError, Changed):
            yield [(Fxp.REMOVE, self.path(job.staged))]
            raise

    def fill(self, batch, job, handle, start):
        try:
            bad = yield self.writes(batch, job, handle, start)
            if bad:
                raise self.trouble('cannot write %s' % show(job.final), bad[0], 'write to %s', job.staged)
            yield from self.dress(job, handle)
        except (ItemError, Changed):
            yield [(Fxp.CLOSE, handle)]
            raise
        answer, seen = yield [(Fxp.CLOSE, handle), (Fxp.LSTAT, self.path(job.staged))]
        if not Fxp.good(answer):
            raise self.trouble('cannot write %s' % show(job.final), answer, 'write to %s', job.staged)
        self.note_size(job.staged, job.entry.size, seen)

    def note_size(self, path, size, answer):
        """If an answer to LSTAT tells of a file of the right size, measure() need not ask: one that
        came too early, out of order, never does."""
        info = Fxp.attributes(answer[1], 0)[0] if answer[0] == Fxp.ATTRS else None
        if info and info.size == size and info.mode is not None and stat.S_ISREG(info.mode):
            self.sized[path] = size

    def verify(self, batch, jobs):
        """What a resume made wrong is sent anew, once: that is no trouble yet."""
        Staging.verify(self, batch, jobs)
        again = [job for job in jobs if job.error and job in self.resumed]
        self.resumed.difference_update(jobs)
        if again:
            for job in again:
                job.error = None
            self.session.run((job.entry.path, self.put(batch, job, 0)) for job in again)
            Staging.verify(self, batch, [job for job in again if not job.error])

    def open_staged(self, batch, job, start):
        """A handle to write with, and where to go on: a part that cannot be continued is begun
        anew."""
        path = self.path(job.staged)
        if start:
            answer, = yield [(Fxp.OPEN, path + Fxp.TO_WRITE.to_bytes(4, 'big') + Fxp.packed())]
            if answer[0] == Fxp.HANDLE:
                return answer[1], start
        answer, = yield [self.to_create(job.staged)]
        if answer[0] != Fxp.HANDLE and (yield from self.is_ours(batch, job)):
            yield [(Fxp.REMOVE, path)]
            answer, = yield [self.to_create(job.staged)]
        if answer[0] != Fxp.HANDLE and self.stream.staging == 'area':   # a dead connection may hold it
            job.staged += b'-' + random_hex(4)
            answer, = yield [self.to_create(job.staged)]
        if answer[0] != Fxp.HANDLE:
            raise self.trouble('cannot write %s' % show(job.final), answer, 'create %s', job.staged)
        return answer[1], 0

    def is_ours(self, batch, job):
        """Whether what has the staged name is from an earlier run; under a final name only the
        beginning of our file is."""
        return self.stream.staging != 'none' or self.begins_with(
            batch, job, (yield from self.measured(job.staged, True)))

    def writes(self, batch, job, handle, start):
        """The requests that carry a file's bytes, as they are read; job.digest is theirs."""
        import hashlib
        digest = hashlib.sha256()
        if start:
            job.hashed = True                   # only the whole proves what a resume made
            copy_prefix(batch.root, job.entry, digest, start, self.stop)
            self.progress.sent(start)
        piece = min(self.PIECE, max(1024, self.stream.bandwidth_limit // 8)) \
            if self.stream.bandwidth_limit else self.PIECE
        at = start
        for block in read_entry(batch.root, job.entry, self.stop, start):
            if job.hashed:
                digest.update(block)
            for offset in range(0, len(block), piece):
                part = block[offset:offset + piece]
                self.throttle.spend(len(part))
                self.progress.sent(len(part))
                yield Fxp.WRITE, handle + at.to_bytes(8, 'big') + Fxp.string(part)
                at += len(part)
        if job.hashed:
            job.digest = digest.hexdigest()

    def dress(self, job, handle):
        """Mode and time by the open file, then all of it on the disk, where the server can."""
        mode = self.stream.target_chmod[0] if self.stream.target_chmod else job.entry.mode & 0o777
        mtime = min(max(0, job.entry.mtime_ns // 10 ** 9), 0xffffffff)
        sync = [self.to_sync(handle)] if self.can_sync else []
        while True:
            choice = self.dressing
            change = [(Fxp.FSETSTAT, handle + Fxp.packed(*values)) for values in (
                [(mode, mtime)], [(None, mtime)], [])[choice]]
            wanted = change + sync
            if job.entry.size > CHECK_RATE:
                wanted = Patient(wanted)
                wanted.seconds = job.entry.size / CHECK_RATE
            answers = yield wanted
            self.hear_sync(job, answers[len(change):])
            if not change or Fxp.status(answers[0]) == Fxp.OK:
                return
            if self.stream.target_chmod:
                raise self.trouble('cannot set mode and time of %s' % show(job.final), answers[0],
                                   'set those of %s', job.staged)
            self.dressing, sync = max(self.dressing, choice + 1), []

    @staticmethod
    def to_sync(handle):
        return Fxp.EXTENDED, Fxp.string(b'fsync@openssh.com') + handle

    def hear_sync(self, job, answers):
        for answer in answers:
            if Fxp.status(answer) in (Fxp.UNSUPPORTED, Fxp.BAD):
                self.can_sync = False
            elif not Fxp.good(answer):
                raise self.trouble('%s cannot be had on the disk' % show(job.final), answer,
                                   'sync %s', job.staged)

    def sync(self):
        """The fsync of one more file commits the journal that the new names are in."""
        if self.can_sync and self.stream.staging == 'area':
            try:
                self.run(self.sync_names())
            except ItemError as error:          # of all names since the last one
                raise TargetError(error.message, error.hint)

    def open_mark(self):
        path = self.path(os.path.join(self.area, b'sync'))
        answer, = yield [(Fxp.OPEN, path + (Fxp.TO_WRITE | Fxp.CREATE).to_bytes(4, 'big') + Fxp.packed())]
        self.mark = answer[1] if answer[0] == Fxp.HANDLE else None

    def sync_names(self):
        if self.mark is None:
            yield from self.open_mark()
        if self.mark is None:
            return
        yield [(Fxp.WRITE, self.mark + bytes(8) + Fxp.string(random_hex(4)))]
        answer, = yield [self.to_sync(self.mark)]
        if Fxp.status(answer) in (Fxp.UNSUPPORTED, Fxp.BAD):
            self.can_sync = False
        elif not Fxp.good(answer):
            raise self.trouble('new names cannot be had on the disk', answer,
                               'sync %s', os.path.join(self.area, b'sync'))

    # -- publishing

    def check_names(self, jobs):
        """What is odd is tried together first; what then is not found is tried by itself."""
        odd = {}
        for part in {part for job in jobs if not job.error for part in job.final.split(b'/')}:
            kind = oddities(part)
            if kind and ('names', kind) not in self.traits:
                odd[kind] = part
        if len(odd) > 1 and self.deletes and self.stream.staging == 'area':
            with self.trying:
                self.ensure([self.area])
                found = self.run(self.try_together(sorted(odd.values())))
            self.traits.update((('names', kind), True) for kind, part in odd.items() if part in found)
        Staging.check_names(self, jobs)

    def try_together(self, names):
        """Steps that rename files of ours to these names in a directory of ours, and list it."""
        directory = os.path.join(self.area, b'try-names')       # the same one, for it may have to stay
        yield [(Fxp.MKDIR, self.path(directory) + Fxp.packed(0o700))]
        found = set()
        for chunk in in_chunks(names, SftpSession.AHEAD // 2):
            files = [os.path.join(directory, b'%d-%s' % (n, random_hex(4))) for n in range(len(chunk))]
            yield from self.make_files([(path, b'') for path in files])
            yield [self.to_rename(path, os.path.join(directory, name)) for path, name in zip(files, chunk)]
            there = yield from self.names_in(directory)
            found.update(there or ())
            yield [(Fxp.REMOVE, self.path(os.path.join(directory, name))) for name in there or ()]
        yield [(Fxp.RMDIR, self.path(directory))]
        return found

    def write_small(self, path, content):
        if not self.run(self.make_files([(path, content)])):
            raise ItemError('cannot write %s at %s' % (show(path), target_of(self.stream)))

    def make_files(self, files):
        """Steps that make new files of (path, content); whether that went well."""
        if self.one_by_one and len(files) > 1:
            good = True
            for file in files:
                good = (yield from self.make_files([file])) and good
            return good
        opened = yield [self.to_create(path) for path, _ in files]
        good = [(answer[1], content) for answer, (_, content) in zip(opened, files)
                if answer[0] == Fxp.HANDLE]
        answers = yield [(Fxp.WRITE, handle + bytes(8) + Fxp.string(content)) for handle, content in good]
        answers += yield [(Fxp.CLOSE, handle) for handle, _ in good]
        return len(good) == len(files) and all(Fxp.good(answer) for answer in answers)

    def to_create(self, path):
        return Fxp.OPEN, self.path(path) + (
            Fxp.TO_WRITE | Fxp.CREATE | Fxp.EXCLUSIVE).to_bytes(4, 'big') + Fxp.packed()

    def to_rename(self, old, new):
        return Fxp.RENAME, self.path(old) + self.path(new)

    def to_link(self, old, new):
        return Fxp.EXTENDED, Fxp.string(b'hardlink@openssh.com') + self.path(old) + self.path(new)

    def learn_to_publish(self):
        """Steps that find what never replaces: tried on files of ours that their sizes tell apart.  Not
        in each directory: after a kill they would stay there, and all names are looked for anyway."""
        names = one, two, three = [self.trial(name) for name in (b'one', b'two', b'three')]
        publish_by, files = 'look', [(one, b''), (two, b'22')]
        good = yield from self.make_files(files)
        if not good:                    # a run that was killed left them
            yield from self.removing(*names)
            good = yield from self.make_files(files)
        if good and (yield from self.behaves(self.to_rename(one, two), [(one, 0), (two, 2)], False)):
            publish_by = 'rename'
        elif good and b'hardlink@openssh.com' in self.session.extensions:
            good = yield from self.make_files([(one, b'1')])    # the first has the name of the second now
            if good and (yield from self.behaves(self.to_link(one, two), [(one, 1)], False)) and \
                    (yield from self.behaves(self.to_link(one, three), [(one, 1), (three, 1)], True)) and \
                    (yield from self.behaves((Fxp.REMOVE, self.path(one)), [(three, 1)], True)):
                publish_by = 'link'
        yield from self.removing(*names)
        self.publish_by = publish_by

    def behaves(self, request, sizes, good):
        """Make a request that should go well or not; whether it says so and these have their sizes."""
        answer, = yield [request]
        if (Fxp.good(answer)) != good:
            return False
        answers = yield [(Fxp.LSTAT, self.path(path)) for path, _ in sizes]
        return [Fxp.attributes(a[1], 0)[0].size if a[0] == Fxp.ATTRS else None for a in answers] == \
            [size for _, size in sizes]

    def place(self, jobs):
        """What might be taken for one name never goes in one breath where a rename replaces."""
        if jobs and self.publish_by is None:
            self.run(self.learn_to_publish())
        done = set()
        for members in in_rounds(jobs, lambda job: job.final):
            answers = self.session.run((job.entry.path, self.publish_job(job)) for job in members)
            done.update(job for job, placed in zip(members, answers) if placed)
        return done

    def publish_job(self, job):
        """Whether it was placed, or has an error now."""
        try:
            if self.publish_by == 'look' and (yield from self.is_there(job.final)) is not False:
                return False
            return (yield from self.publishing(job.staged, job.final, job.entry.size))
        except ItemError as error:
            job.error = error
            return True

    def publishing(self, old, new, size=None):
        """Steps that give a file a name which nothing has: False if something has it after all.
        Raises ItemError."""
        request = self.to_link(old, new) if self.publish_by == 'link' else self.to_rename(old, new)
        answer, seen = yield [request, (Fxp.LSTAT, self.path(new))]
        if Fxp.good(answer):
            if self.publish_by == 'link':
                yield [(Fxp.REMOVE, self.path(old))]
            self.note_size(new, size, seen)
            return True
        if (yield from self.is_there(new)):
            return False
        error = self.trouble('%s cannot be placed' % show(new), answer, 'rename %s to %s', old, new)
        if Fxp.status(answer) == Fxp.FAILED and self.stream.staging == 'area':
            error.hint = self.BORDER
        raise error

    def rename(self, old, new):
        self.run(self.renaming(old, new), new)

    def refuses_renames(self):
        """Of a name that nothing has, all servers that were tried say that it is missing."""
        nothing = OWN_PREFIX + b'-' + random_hex(8)
        answer = self.run(self.replacing(nothing, nothing + b'-to'))
        return Fxp.words(answer) if Fxp.status(answer) in (Fxp.DENIED, Fxp.UNSUPPORTED) else None

    def replacing(self, old, new):
        """The answer to the rename that replaces, where the server has it."""
        if self.can_replace:
            answer, = yield [(Fxp.EXTENDED, Fxp.string(b'posix-rename@openssh.com') +
                              self.path(old) + self.path(new))]
            self.can_replace = Fxp.status(answer) != Fxp.UNSUPPORTED
        if not self.can_replace:
            answer, = yield [self.to_rename(old, new)]
        return answer

    def renaming(self, old, new):
        """Rename, replacing if the server can."""
        answer = yield from self.replacing(old, new)
        if not Fxp.good(answer):
            raise self.trouble('cannot rename %s to %s' % (show(old), show(new)), answer,
                               'rename %s to %s', old, new)

    overwrite = Staging.overwrite_in_steps

    def delete(self, paths):
        self.session.run((self.sources.get(path), self.removing(path)) for path in paths)

    def removing(self, *paths):
        answers = yield [(Fxp.REMOVE, self.path(path)) for path in paths]
        seen = {Fxp.status(answer) for answer in answers} - {Fxp.MISSING}
        if seen:
            self.deletes = seen == {Fxp.OK}

    # -- directories

    def make_directories(self, paths):
        """Level by level, so that a round trip serves many.  Raises ItemError."""
        steps = {step for path in paths for step in prefixes(path)}
        levels = collections.defaultdict(list)
        for step in steps:
            levels[step.count(b'/')].append(step)
        for _, members in sorted(levels.items()):
            for error in self.session.run((None, self.make_directory(path)) for path in sorted(members)):
                if error:
                    raise error

    def make_directory(self, path):
        """An ItemError if it cannot be had."""
        mode = 0o700 if path == self.area else self.stream.target_chmod and self.stream.target_chmod[1]
        answer, seen = yield [(Fxp.MKDIR, self.path(path) + Fxp.packed(mode)), (Fxp.STAT, self.path(path))]
        if Fxp.good(answer) and mode and not self.has_mode(seen, mode):
            yield [(Fxp.SETSTAT, self.path(path) + Fxp.packed(mode))]
        if not self.tells_directory(seen) and not (yield from self.is_directory(path)):
            error = self.trouble('cannot make the directory %s at %s' % (
                show(path), target_of(self.stream)), answer, 'make %s', path)
            if path == self.area:
                error.hint = 'may this account make directories there? if not, set staging = beside'
            return error
        return None

    def finish(self, batch):
        """Directories that are kept first, with their times last."""
        blocked = {}
        inner = [entry for entry in batch.entries if entry.kind == 'd']
        with contextlib.suppress(ItemError):
            self.ensure([batch.final(entry.path) for entry in inner])
        for entry in inner:             # if one of them could not be had
            try:
                self.ensure([batch.final(entry.path)])
            except ItemError as error:
                blocked[entry.path] = error
        answers = Staging.finish(self, batch)
        self.session.run((entry.path, self.date(batch, entry)) for entry in inner)
        for notes in (self.sized, self.sources):
            for job in batch.jobs:
                notes.pop(job.staged, None)
                notes.pop(job.final, None)
        return [answer._replace(error=answer.error or next(
            (blocked[e.path] for e in parcel.entries if e.path in blocked), None))
            for parcel, answer in zip(batch.parcels, answers)] if blocked else answers

    def date(self, batch, entry):
        mtime = min(max(0, entry.mtime_ns // 10 ** 9), 0xffffffff)
        yield [(Fxp.SETSTAT, self.path(batch.final(entry.path)) + Fxp.packed(None, mtime))]

    def delete_area(self):
        return self.run(self.remove_area())

    def remove_area(self):
        mark, self.mark = self.mark, None
        if mark is not None:
            answers = yield [(Fxp.CLOSE, mark), (Fxp.REMOVE, self.path(os.path.join(self.area, b'sync'))),
                             (Fxp.RMDIR, self.path(self.area))]
            if Fxp.good(answers[-1]):
                return True
        return (yield from self.remove_tree(self.area))

    def remove_tree(self, directory):
        """Whether a directory of ours is gone, with all that is in it."""
        answer, = yield [(Fxp.RMDIR, self.path(directory))]
        if Fxp.status(answer) not in (Fxp.OK, Fxp.MISSING):
            names = yield from self.names_in(directory)
            paths = [os.path.join(directory, name) for name in sorted(names or ())]
            for chunk in in_chunks(paths, SftpSession.AHEAD):
                answers = yield [(Fxp.REMOVE, self.path(path)) for path in chunk]
                for path, answer in zip(chunk, answers):
                    if not Fxp.good(answer) and (yield from self.is_directory(path)):
                        yield from self.remove_tree(path)
            answer, = yield [(Fxp.RMDIR, self.path(directory))]
        return Fxp.status(answer) in (Fxp.OK, Fxp.MISSING)

    def free_space(self):
        return self.run(self.ask_space()) if b'statvfs@openssh.com' in self.session.extensions else None

    def ask_space(self):
        """OpenSSH's PROTOCOL, 3.4; a total of 0 means that nobody knows."""
        answer, = yield [(Fxp.EXTENDED, Fxp.string(b'statvfs@openssh.com') + self.path(b''))]
        if answer[0] != Fxp.EXTENDED_REPLY or not Fxp.number(answer[1], 16, 8):
            return None
        return Fxp.number(answer[1], 8, 8) * Fxp.number(answer[1], 32, 8)


class FtpReply(collections.namedtuple('FtpReply', 'code lines')):
    """A server's answer (RFC 959, 4.2): its three digits, and its lines as bytes."""

    __slots__ = ()

    @property
    def done(self):
        return self.code // 100 == 2

    def __str__(self):
        return show(b' '.join(self.lines[:5]).strip())


class NotFtp(OSError):
    """What answers speaks another protocol."""

    GREETINGS = (b'SSH-', 'sftp or scp'), (b'@RSYNCD', 'rsync_native')

    def __init__(self, line):
        OSError.__init__(self, 'no FTP reply: %s' % show(line[:80]))
        self.hint = next(('is target_port right? that is how transfer_protocol = %s begins' % protocol
                          for begin, protocol in self.GREETINGS if line.startswith(begin)), '')


class Crowded(TargetError):
    """421 to a login: the server counts too many connections already."""


OTHER_NAME = 62, 64         # X509_V_ERR_HOSTNAME_MISMATCH and _IP_ADDRESS_MISMATCH, in x509_vfy.h


class FtpLine:
    """A control connection of FTP (RFC 959, 2228, 2428, 4217).

    Commands, names and replies are bytes.  A reply is read for each command that was sent, and
    judged by the caller: 4xx and 5xx are values here.  OSError and EOFError mean the line itself.
    """

    LONGEST = 1 << 20                   # bytes of one reply
    TELNET = re.compile(rb'(\xff[\xfb-\xfe].|\xff[\xf0-\xfa])+', re.S)      # RFC 854, before a reply
    FIRST = re.compile(rb'[1-6]\d\d([ -]|$)')                                 # a reply's first line
    PASSIVE = ((b'PASV', re.compile(rb'\d+,\d+,\d+,\d+,(\d+),(\d+)')),
               (b'EPSV', re.compile(rb'\((.)\1\1(\d+)\1\)')))

    def __init__(self, host, context):
        self.host, self.context = host, context
        self.sock = self.family = self.peer = None
        self.data = None                # the data connection made last
        self.lines = collections.deque()    # that were received and not read yet
        self.waiting = b''              # the beginning of one
        self.option = b''               # of HASH, set last
        self.passive = self.PASSIVE

    def dial(self, port, timeout, at_once):
        """Connect; with TLS from the first byte if `at_once`."""
        import socket
        self.sock = socket.create_connection((self.host, port), timeout)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.family, self.peer = self.sock.family, self.sock.getpeername()
        if ':' in self.peer[0]:
            self.passive = self.PASSIVE[::-1]       # PASV knows no IPv6
        if at_once:
            self.secure()

    def secure(self):
        """RFC 4217."""
        import ssl
        try:
            self.sock = self.context.wrap_socket(self.sock, server_hostname=self.host)
        except ssl.CertificateError as error:       # before Python 3.7 a ValueError, of names alone
            translated = error if isinstance(error, OSError) else OSError(str(error))
            translated.verify_code = getattr(error, 'verify_code', OTHER_NAME[0])
            raise translated

    def secured(self, conn):
        """Servers want the session of the control connection again."""
        return self.context.wrap_socket(conn, server_hostname=self.host, session=self.sock.session) \
            if self.context else conn

    def close(self):
        if self.sock:
            self.sock.close()
        self.sock = None

    def tell(self, commands):
        """Some commands by one write: small ones would wait for each other's ACK (RFC 896)."""
        self.sock.sendall(b'\r\n'.join(commands) + b'\r\n')

    def line(self):
        while not self.lines:
            data = self.sock.recv(1 << 16)
            if not data:
                raise EOFError('the server hung up')
            self.lines.extend((self.waiting + data).split(b'\n'))
            self.waiting = self.lines.pop()
            if len(self.waiting) > self.LONGEST:
                raise OSError('an endless reply')
        line = self.lines.popleft().rstrip(b'\r')
        return self.TELNET.sub(b'', line, 1) if line[:1] == b'\xff' else line

    def reply(self):
        first = last = self.line()
        if not self.FIRST.match(first):
            raise NotFtp(first)
        lines = [first]
        while first[3:4] == b'-' and (last[:3] != first[:3] or last[3:4] == b'-'):
            last = self.line()
            lines.append(last)
            if len(lines) > self.LONGEST >> 6:
                raise OSError('an endless reply')
        return FtpReply(int(first[:3]), lines)

    def command(self, command):
        self.tell([command])
        return self.reply()

    def hear(self):
        """Steps to the next reply."""
        if not self.lines:
            yield self.sock, False
        return self.reply()

    def open_data(self):
        """Steps to a new data connection (RFC 959, RFC 2428) to the host of this line, wherever the
        answer points (CVE-2021-4189)."""
        for index, (verb, pattern) in enumerate(self.passive):
            self.tell([verb])
            reply = yield from self.hear()
            found = pattern.search(reply.lines[-1]) if reply.done else None
            if found:
                self.passive = self.passive[index:]
                high, low = found.groups()
                port = int(high) * 256 + int(low) if verb == b'PASV' else int(low)
                return (yield from self.connect_data(port))
            if reply.code == 421:
                break
        raise OSError('no data connection: %s' % (reply,))

    def connect_data(self, port):
        import socket
        conn = self.data = socket.socket(self.family)
        try:
            conn.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                conn.connect((self.peer[0], port) + self.peer[2:])
            conn.settimeout(self.sock.gettimeout())
            try:
                conn.getpeername()
            except OSError:                         # it is not connected yet
                yield conn, True
                conn.send(b'')                      # waits until it is
        except BaseException:
            conn.close()
            raise
        return conn


def finished(steps):
    """What a generator returns; nobody else goes on where it yields."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class Turns:
    """Generators of which one goes on while the others wait for the network, in one thread: each
    yields (socket, whether it wants to write) where it would wait."""

    def __init__(self, limit):
        """limit: seconds after which silence is an error."""
        import select
        self.select, self.poll, self.limit = select, select.poll(), limit
        self.waiting = {}               # descriptor -> who waits for it, the longest first

    def go_on(self, turn, step=next):
        """Until it waits, or ends.  Raises what it raises."""
        try:
            sock, writes = step(turn)
        except StopIteration:
            return
        fd = sock.fileno()
        self.waiting[fd] = turn
        self.poll.register(fd, self.select.POLLOUT if writes else self.select.POLLIN)

    def wait(self):
        """Until one of them can go on; they do."""
        import socket
        ready = [fd for fd, _ in self.poll.poll(self.limit * 1000)]
        step = next if ready else lambda turn: turn.throw(socket.timeout('timed out'))
        for fd in ready or list(self.waiting):
            self.poll.unregister(fd)
            self.go_on(self.waiting.pop(fd), step)

    def close(self):
        for turn in self.waiting.values():
            turn.close()


class Digests:
    """The SHA-256 of what goes by, and the hash that a server tells, if that is another."""

    def __init__(self, name):
        import hashlib
        self.sha256 = hashlib.sha256()
        self.other = hashlib.new(name) if name != 'sha256' else None

    def update(self, block):
        self.sha256.update(block)
        if self.other:
            self.other.update(block)


class FtpTransport(Staging):
    """FTP and FTPS (RFC 959, 3659, 4217): passive, binary, several connections.

    A 226 proves nothing, nor does FEAT: what is relied on is tried first on a small file of
    ours.  Absence is what the server says of a name that cannot exist, once it has shown that
    it says something else of what is there; any other answer is doubt.
    """

    replaces = True             # RNTO on most servers
    takes = 'network host password password_file tls chmod parallel staging'
    forbidden = b'\r\n\0'
    lists = True
    AHEAD = 32                          # questions under way; their answers fit any buffer
    LOCKED_FOR = 900                    # seconds that a server may keep the file of a broken session locked
    ASK_AGAIN = 3                       # times, a second apart, where too many connections are counted
    PRELIMINARY = 20                    # replies before the one that counts (120, and 1xx after STOR)
    EAGER = 1 << 14                     # bytes that fit a socket's buffer whether read or not
    TROUBLE = (530, 532, 534, 535, 521, 522)        # not of one file, as is every 4xx but these:
    ROOM = (451, 452, 552)              # to STOR: the disk, a quota, a limit
    ITEMS = (450, 451)                  # of one file although 4xx
    UNKNOWN = (500, 501, 502, 504)      # such a command there is not
    ROW = re.compile(rb'(?:[-dlbcps]\S{9,} +\d+ +\S+ +\S+ +\d+ +\S+ +\S+ +\S+|'
                     rb'\d\d-\d\d-\d+ +\S+ +(?:<DIR>|\d+)) (.+)')
    # (verb, its arguments before the name, hashlib's name); draft-bryan-ftpext-hash for HASH
    HASHES = ((b'XSHA256', b'', 'sha256'), (b'HASH', b'SHA-256', 'sha256'), (b'XSHA512', b'', 'sha512'),
              (b'HASH', b'SHA-512', 'sha512'), (b'XSHA1', b'', 'sha1'), (b'XMD5', b'', 'md5'))

    def __init__(self, *args, **kwargs):
        Staging.__init__(self, *args, **kwargs)
        self.idle = []                  # logged-in connections nobody uses just now
        self.used = 0                   # connections in all
        self.allowed = self.most()
        self.closing = False
        self.lock = threading.Lock()    # guards these four
        self.given = threading.Condition(self.lock)     # told when one is given back
        self.helpers = []               # threads that may still be logging in
        self.login_time = 0             # seconds that the last login took
        self.context = None             # of TLS
        self.ended = set()              # staged names whose last byte was sent
        self.broken = {}                # staged name at which a line broke -> when
        self.home = b''                 # the absolute name of target_dir
        self.forget()

    def forget(self):
        """What was learned of a server is good for its connections only."""
        self.traits.clear()
        self.shown.clear()
        self.ahead = None               # questions that it takes at once
        self.features = None            # its answer to FEAT
        self.looker = None              # the verb that says what is there; b'': there is none
        self.absent = None              # the code by which that verb says that nothing is
        self.rehearsed = False
        self.deletes = self.times = True
        self.resumes = None
        self.hasher = None              # a row of HASHES; without one bytes are read back
        self.listers = [b'MLSD', b'NLST -a', b'NLST *', b'NLST .', b'LIST']     # RFC 3659, 959, ls(1)
        self.same = collections.OrderedDict()       # its hash -> SHA-256, of what was sent lately

    # -- connections

    def secured_by(self):
        """The TLS context that is configured, or None.  Raises TargetError."""
        if self.stream.tls and not self.context:
            import ssl
            try:
                self.context = ssl.create_default_context(cafile=self.stream.tls_ca_file or None)
            except OSError as error:
                raise TargetError('cannot use tls_ca_file %s: %s' % (
                    show(self.stream.tls_ca_file), error.strerror or error))
        return self.context

    def connect(self):
        """A logged-in connection in target_dir.  Raises TargetError."""
        stream = self.stream
        port = stream.target_port or (990 if stream.tls == 'implicit' else 21)
        line = FtpLine(stream.target_host, self.secured_by())
        what = 'cannot log in to %s, port %d' % (stream.target_host, port)
        silent = '' if stream.tls else 'is this a port for TLS from the first byte? then set tls = implicit'
        try:
            with self.translated(what, silent), self.stop.on_stop(lambda: self.hang_up(line.sock)):
                line.dial(port, stream.connect_timeout, stream.tls == 'implicit')
                self.greet(line, what)
            with self.translated(what), self.stop.on_stop(lambda: self.hang_up(line.sock)):
                self.log_in(line, what)
                line.sock.settimeout(stream.stall_timeout)
                self.enter_base(line)
        except BaseException:
            line.close()
            raise
        return line

    def greet(self, line, what):
        """220, and AUTH TLS where that is asked for (RFC 4217)."""
        reply = line.reply()
        for _ in range(self.PRELIMINARY):
            if reply.code != 120:
                break
            reply = line.reply()
        if not reply.done:
            raise (Crowded if reply.code == 421 else TargetError)('%s: %s' % (what, reply))
        if self.stream.tls == 'explicit':
            reply = line.command(b'AUTH TLS')
            if not reply.done:
                raise TargetError('%s: it refuses TLS: %s' % (what, reply),
                                  'with tls = no all can be read on the way; is there sftp?')
            line.secure()

    def log_in(self, line, what):
        stream = self.stream
        reply = line.command(b'USER ' + to_bytes(stream.username or 'anonymous'))
        if reply.code == 331:
            reply = line.command(b'PASS ' + to_bytes(stream.password or ''))
        if reply.code == 421:
            raise Crowded('%s: %s' % (what, reply))
        if not reply.done:
            raise TargetError('%s: %s' % (what, reply), 'are username and password right?%s' % (
                '' if stream.tls else ' does the server ask for TLS (tls = yes)?'))
        line.command(b'OPTS UTF8 ON')           # or ProFTPD may take names for Latin-1 and change them
        for command in ([b'PBSZ 0', b'PROT P'] if stream.tls else []) + [b'TYPE I']:
            reply = line.command(command)
            if not reply.done:
                raise TargetError('%s: %s: %s' % (what, show(command), reply))

    @staticmethod
    def hang_up(*socks):
        """Wake a thread that connects, reads or writes; close() would wait for it."""
        import socket
        for sock in filter(None, socks):
            with contextlib.suppress(OSError):                  # it is closed already
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # below any TLS

    @contextlib.contextmanager
    def translated(self, what, hint=''):
        """Trouble with a line is the target's."""
        try:
            yield
        except (OSError, EOFError) as error:
            raise self.line_trouble(error, what, hint)

    def line_trouble(self, error, what, hint=''):
        """The TargetError for an OSError or EOFError of a line.  Raises Interrupted."""
        import socket
        self.stop.check()
        reason = getattr(error, 'reason', None)             # OpenSSL's, of an ssl.SSLError
        if getattr(error, 'verify_code', 0) in OTHER_NAME:
            hint = 'give target_host the name that its certificate holds'
        elif reason == 'CERTIFICATE_VERIFY_FAILED':
            hint = 'if nobody vouches for its certificate, tls_ca_file may name a file that holds it'
        elif isinstance(error, NotFtp):
            hint = error.hint
        elif isinstance(error, socket.gaierror):
            hint = 'is target_host right?'
        elif isinstance(error, ConnectionRefusedError):
            hint = 'nothing listens there: is the server up, is target_port right, is a firewall between?'
        elif reason:
            hint = 'does this port begin with TLS (tls = implicit), or change to it (tls = yes)?'
        said = str(error) if reason else getattr(error, 'strerror', None) or str(error)
        return TargetError('%s: %s' % (what, show(said.strip()) or type(error).__name__), hint)

    def fault(self, what, reply, storing=False):
        """The error for a refusal, by what to do next (RFC 959, 4.2)."""
        text = '%s: %s' % (what, reply)
        if storing and reply.code in self.ROOM:
            return NoRoom(text, 'is its disk or a quota full, or the file above a limit?')
        return TargetError(text) if self.is_trouble(reply) else ItemError(text)

    def is_trouble(self, reply):
        """Whether it refuses more than one file."""
        return reply.code in self.TROUBLE or reply.code // 100 == 4 and reply.code not in self.ITEMS

    def enter_base(self, line):
        base = to_bytes(self.stream.target_base)
        if not line.command(b'CWD ' + base).done:
            if not self.stream.create_directories:
                raise self.missing()
            for step in prefixes(base):
                line.command(b'MKD ' + step)        # whatever it says: CWD tells
            reply = line.command(b'CWD ' + base)
            if not reply.done:
                raise TargetError('cannot make %s: %s' % (target_of(self.stream), reply))
        if base.startswith(b'/'):
            self.home = base
        elif not self.home:
            reply = line.command(b'PWD')
            quoted = re.search(rb'"((?:[^"]|"")*)"', reply.lines[0])    # RFC 959, appendix II
            if not reply.done or not quoted:
                raise TargetError('PWD: %s' % (reply,))
            self.home = quoted.group(1).replace(b'""', b'"')

    def open_line(self, room):
        """A new connection, if fewer than `room` are in use; None else.  A server that allows
        fewer teaches us how many.  Raises TargetError for the first."""
        with self.lock:
            if self.used >= min(room, self.allowed) or self.closing:
                return None
            self.used += 1
        try:
            started = time.monotonic()
            line = self.connect_in_time()
            self.login_time = time.monotonic() - started
            return line
        except BaseException as error:
            with self.lock:
                self.used -= 1
                if self.used and isinstance(error, TargetError):
                    self.allowed = self.used
                    return None
            raise

    def connect_in_time(self):
        """A server that let us in before may count, for a moment, a connection that has just gone."""
        for _ in range(self.ASK_AGAIN):
            try:
                return self.connect()
            except Crowded:
                if not self.login_time or self.used > 1:
                    raise
                self.stop.wait(1)
        return self.connect()

    def take(self):
        """A connection from the pool, or a new one, or the next that is free."""
        while True:
            with self.lock:
                if self.idle:
                    return self.idle.pop()
            line = self.open_line(self.allowed)
            if line:
                return line
            with self.lock:
                if not self.idle:
                    self.given.wait(0.5)
            self.stop.check()

    def give(self, line):
        """Back into the pool; one that is closed is gone."""
        with self.lock:
            if self.closing:
                line.close()
            if line.sock:
                self.idle.append(line)
            else:
                self.used -= 1
            self.given.notify()

    @contextlib.contextmanager
    def connection(self, line=None):
        """A connection for one thread; after an error that leaves it unclear it is thrown away."""
        line = line or self.take()
        try:
            with self.stop.on_stop(lambda: self.hang_up(line.sock, line.data)):
                yield line
        except (ItemError, Changed):
            raise
        except BaseException:
            line.close()
            raise
        finally:
            self.give(line)

    def most(self):
        """Connections: `parallel` for the bytes, and one that asks about the part before."""
        return self.stream.parallel + 1

    def open(self):
        self.made.clear()
        self.apart.clear()
        self.closing = False
        with self.lock:
            stale, self.idle = self.idle, []
        lost = False                    # one that hangs tells of the others, too
        for line in stale:
            try:
                line.sock.settimeout(0.1 if lost else self.stream.connect_timeout)
                with self.translated('NOOP'):
                    lost = line.command(b'NOOP').code == 421 or lost
                line.sock.settimeout(self.stream.stall_timeout)
            except TargetError:
                lost = True
            if lost:
                line.close()
            self.give(line)
        if not self.idle:
            self.allowed = self.most()
            self.forget()
            with self.connection():
                pass

    def close(self):
        with self.lock:
            self.closing = True
            idle, self.idle = self.idle, []
        for line in idle:
            with contextlib.suppress(MoverError), self.translated('QUIT'):
                line.sock.settimeout(KILL_GRACE)
                line.command(b'QUIT')
            line.close()
            self.give(line)
        for thread in self.helpers:
            thread.join()
        self.helpers = []

    def learn_ahead(self):
        """Whether the server reads on while it answers, and answers in order: one that drops
        what came too early, calls it out of sequence, or does it all side by side (then what
        needs no disk is answered first), gets one question at a time."""
        self.ahead = 1
        with contextlib.suppress(TargetError), self.connection() as line:
            if self.looker is None:
                self.choose_looker(line)
            nowhere = self.name(OWN_PREFIX + b'-' + random_hex(8))
            commands = [(self.looker or b'MDTM') + b' ' + nowhere, b'NOOP']
            with self.translated('NOOP'):
                codes = [line.command(command).code for command in commands]
                line.sock.settimeout(min(self.stream.connect_timeout, 1 + 10 * self.login_time))
                line.tell(commands * (self.AHEAD // 2))
                if [line.reply().code for _ in range(self.AHEAD)] == codes * (self.AHEAD // 2) and \
                        codes[1] == 200 != codes[0]:
                    self.ahead = self.AHEAD
            line.sock.settimeout(self.stream.stall_timeout)

    # -- many of them

    def name(self, path):
        """A path as an argument: never empty, never beginning with a dash, or with a blank even
        for those who take "./" away: what they do to it there they do not do in a directory."""
        return (self.home if path[:1] == b' ' else b'.') + b'/' + path

    def answers(self, line, commands):
        """The replies to some commands, of which `ahead` at a time are on their way: a round
        trip serves many.  A 5xx is for the caller to judge, as is a 4xx that is of one file;
        raises TargetError for the rest."""
        found = []
        for chunk in in_chunks(commands, self.ahead or 1):
            with self.translated(show(chunk[0])):
                line.tell(chunk)
                replies = [line.reply() for _ in chunk]
            for command, reply in zip(chunk, replies):
                exists = reply.code == 521 and command.startswith(b'MKD ')      # RFC 959, appendix II
                if self.is_trouble(reply) and not exists:
                    raise self.fault(show(command), reply)
            found += replies
        return found

    def ask(self, values, action):
        """action(connection, chunk) for all values, of which `ahead` go in one round trip."""
        values = list(values)
        if len(values) > 1 and not self.ahead:
            self.learn_ahead()
        for chunk in in_chunks(values, self.ahead or 1):
            self.stop.check()
            with self.connection() as line:
                action(line, chunk)

    def share(self, values, action):
        """As ask(), where each of the values takes a round trip: action() is a generator for Turns, and
        every connection that nobody uses has a share."""
        if self.stream.tls:
            self.ask(values, lambda line, chunk: finished(action(line, chunk)))
            return
        if len(values) > 1 and not self.ahead:
            self.learn_ahead()
        size = min(self.ahead or 1, -(-len(values) // self.stream.parallel))
        self.in_turn(in_chunks(values, max(1, size)), action)

    def each(self, values, action):
        """action(connection, value) for every value, on up to `parallel` connections."""
        work = collections.deque(values)
        failures = []

        def labour(line):
            while work and not failures:
                try:
                    with self.connection(line) as line:
                        while line.sock and self.work_on(line, work, action) and not failures:
                            pass
                except BaseException as error:
                    failures.append(error)
                line = None

        if work:
            line = self.take()
            with self.assisted(len(work), labour):
                labour(line)
        if failures:
            raise failures[0]

    def in_turn(self, values, action):
        """The same by this thread alone, where action() is a generator for Turns: threads that send
        small files wait for each other more than for a server."""
        work, joined = collections.deque(values), collections.deque()
        turns = Turns(self.stream.stall_timeout)

        def labour(line):
            with self.connection(line):
                while work and line.sock:
                    self.stop.check()
                    yield from action(line, work.popleft())

        try:
            with self.assisted(len(work), joined.append):
                while work or turns.waiting:
                    if not turns.waiting:
                        turns.go_on(labour(self.take()))
                    while joined:
                        turns.go_on(labour(joined.popleft()))
                    if turns.waiting:           # not if a line broke before there was a need to wait
                        turns.wait()
        finally:
            turns.close()
            for line in joined:
                self.give(line)

    @contextlib.contextmanager
    def assisted(self, pieces, use):
        """While this is entered, use(connection) may be called by threads of their own, for up to
        `parallel` connections with the caller's.  None is waited for: a further one is opened when the work
        has taken as long as a login does."""
        hands, ended = [], threading.Event()
        busy = threading.Lock()         # guards hands: nobody joins in when it has ended

        def help_out():
            line = self.another(ended)
            if line:
                with busy:
                    late = ended.is_set()
                    if not late:
                        hands.append(threading.current_thread())
                self.give(line) if late else use(line)

        self.helpers = [thread for thread in self.helpers if thread.is_alive()]
        for _ in range(min(self.stream.parallel, pieces) - 1):
            thread = threading.Thread(target=help_out, name='ftp', daemon=True)
            self.helpers.append(thread)
            thread.start()
        try:
            yield
        finally:
            with busy:
                ended.set()
            for thread in hands:
                thread.join()

    def work_on(self, line, work, action):
        """One piece of the work; False if there is none left."""
        self.stop.check()
        try:
            value = work.popleft()
        except IndexError:
            return False
        action(line, value)
        return True

    def another(self, ended):
        """A connection for one more thread, or None: one that nobody uses, but the last, which the
        part before is proven by; or a new one, if the work takes longer than a login."""
        with self.lock:
            if len(self.idle) > 1:
                return self.idle.pop()
        if ended.wait(self.login_time):
            return None
        try:
            return self.open_line(self.allowed)
        except MoverError:              # then the others do it
            return None

    # -- what is there

    def features_of(self, line):
        """The lines of FEAT (RFC 2389) in capitals, asked once."""
        if self.features is None:
            with self.translated('FEAT'):
                self.features = b'\n'.join(line.command(b'FEAT').lines).upper()
        return self.features

    def sizes(self, line, paths):
        """For each path (whether something has this name: True, False, None for doubt; its size
        if it is a file, None if that is not said)."""
        if self.looker is None:
            self.choose_looker(line)
        verb = self.looker
        if not verb:
            return [(None, None)] * len(paths)
        found = [self.seen(verb, reply) for reply in self.answers(
            line, [verb + b' ' + self.name(path) for path in paths])]
        if any(size is not None for _, size in found):
            self.traits['absence',] = True      # it says something else of what is there
        return found

    def seen(self, verb, reply):
        """One answer to SIZE or MLST (RFC 3659)."""
        if reply.code == self.absent:
            return False, None
        if verb == b'SIZE' and reply.code == 213:
            size = re.match(rb'213\D+(\d+)\s*$', reply.lines[0])
        elif verb == b'MLST' and reply.code == 250 and len(reply.lines) > 2:
            facts = reply.lines[1].lower().partition(b'; ')[0]
            size = re.search(rb'size=(\d+)', facts) if b'type=file' in facts else None
        else:
            return None, None
        return True, int(size.group(1)) if size else None

    def choose_looker(self, line, blind=b''):
        """The verb to ask with: one that says of a name that cannot exist that it does not."""
        for verb in (b'SIZE', b'MLST'):
            if verb != blind and self.denies(line, verb, OWN_PREFIX + b'-' + random_hex(8)):
                return
        self.looker = b''

    def denies(self, line, verb, name):
        """Whether a verb says that a name is not there; then it is asked with from now on."""
        reply = self.answers(line, [verb + b' ' + self.name(name)])[0]
        if reply.done or reply.code in self.UNKNOWN:
            return False
        self.looker, self.absent = verb, reply.code
        return True

    def check_looker(self, line, path, size):
        """A verb that does not tell the size of a file of ours gives way to the other, or to none."""
        if self.sizes(line, [path]) != [(True, size)]:
            self.choose_looker(line, self.looker)
            if self.sizes(line, [path]) != [(True, size)]:
                self.looker = b''

    def is_there(self, line, path):
        """Whether something has this name: True, False, None for doubt.  Without a staging area
        a no is believed once the verb has shown that it can say yes."""
        there = self.sizes(line, [path])[0][0]
        blind = self.stream.staging != 'area' and not self.traits.get(('absence',))
        if there is None or there is False and blind:
            names = self.names_in(line, parent_of(path))
            there = None if names is None else os.path.basename(path) in names
        if there is False and self.looker == b'SIZE' and not path.startswith(OWN_PREFIX):
            return self.is_directory(line, path)        # which has no size
        return there

    def exists(self, path):
        with self.connection() as line:
            return self.is_there(line, path)

    def exist_all(self, paths):
        """Of files; a directory that is in the way refuses the RNTO."""
        found = []

        def look(line, chunk):
            found.extend(self.is_there(line, path) if there is None else there
                         for path, (there, _) in zip(chunk, self.sizes(line, chunk)))
        self.ask(paths, look)
        return found

    def present(self, names):
        names = list(names)
        with self.connection() as line:
            if not self.answers(line, [b'CWD .'])[0].done:
                raise TargetError('the target directory %s is gone' % target_of(self.stream),
                                  'create it or mount it')
            found = {}
            for name in sorted(names, key=lambda name: not name.startswith(HERE_NAME)):
                new = self.looker is None and self.stream.staging == 'area' and name.startswith(HERE_NAME)
                # who learns how it says no of a name that can hardly be there has asked for it
                found[name] = False if new and self.denies(line, b'SIZE', name) else self.is_there(line, name)
        for name, there in found.items():
            if there is None and self.stream.verify == 'accepted':
                log.once('this account may not ask whether %s is in %s' % (
                    show(name), target_of(self.stream)), self.stream)
            elif there is None:
                raise TargetError('%s does not say whether %s is there' % (
                    target_of(self.stream), show(name)),
                    'an account that may use neither SIZE, MLST nor NLST needs verify = accepted')
        return {name for name in names if found[name]}

    def listing(self, directory):
        line = self.take()              # without one, nobody has been asked
        try:
            with self.connection(line):
                return self.names_in(line, directory)
        except TargetError:             # some hang up when they come to a name that is no UTF-8
            self.exist_all([self.area])     # unless the target is in trouble
            return None

    def names_in(self, line, directory):
        """The exact names in a directory as a set, None if it cannot be listed.  CWD comes first,
        for some servers take an argument of NLST for a pattern."""
        if directory and not self.answers(line, [b'CWD ' + self.name(directory)])[0].done:
            return None
        found = command = None
        try:
            for command in list(self.listers):
                if command == b'LIST':          # whoever knows nothing else may insist
                    self.answers(line, [b'TYPE A'])
                reply, data = self.download(line, command)
                if reply.code in self.UNKNOWN and command in self.listers:
                    self.listers.remove(command)
                if reply.done:
                    rows = [row[:-1] if row.endswith(b'\r') else row for row in data.split(b'\n')]
                    found = {self.listed(command, row) for row in rows if row}
                if found:               # what it takes for a name that is not there is empty
                    break
        finally:
            if line.sock and command == b'LIST':
                self.answers(line, [b'TYPE I'])
            self.go_home(line, directory)
        return None if found is None else found - {b'.', b'..', b''}

    @staticmethod
    def listed(command, row):
        """The name in a row of MLSD (RFC 3659), NLST, or LIST as ls(1) and Windows write it."""
        if command == b'LIST':
            found = FtpTransport.ROW.match(row)
            name = found.group(1) if found else b''
            return name.partition(b' -> ')[0] if row[:1] == b'l' else name
        return row.partition(b' ')[2] if command == b'MLSD' else row.rpartition(b'/')[2]

    def go_home(self, line, directory):
        """A connection in the wrong place is thrown away."""
        if directory and line.sock and not self.answers(line, [b'CWD ' + self.home])[0].done:
            raise TargetError('cannot go back to %s' % target_of(self.stream))

    def is_directory(self, line, path):
        if not self.answers(line, [b'CWD ' + self.name(path)])[0].done:
            return False
        self.go_home(line, path)
        return True

    def download(self, line, command, use=None):
        """The last reply to a command that sends data, and the data, if it is not used up by
        use(block).  A refusal is for the caller to judge."""
        blocks = []
        with self.translated(show(command)):
            conn = finished(line.open_data())
            try:
                reply = line.command(command)
                if reply.code // 100 != 1:
                    return reply, b''
                conn = line.secured(conn)
                with self.stop.on_stop(lambda: self.hang_up(conn)):
                    for block in iter(lambda: conn.recv(1 << 16), b''):
                        self.stop.check()
                        (use or blocks.append)(block)
            finally:
                conn.close()
            return line.reply(), b''.join(blocks)

    def make_directories(self, paths):
        with self.connection() as line:
            for path in paths:
                for step in prefixes(path):
                    made = self.answers(line, [b'MKD ' + self.name(step)])[0].done
                    if made and self.stream.target_chmod and step != self.area:
                        self.answers(line, [b'SITE CHMOD %o %s' % (self.stream.target_chmod[1],
                                                                   self.name(step))])
                if not made and not self.is_directory(line, path):
                    raise ItemError('cannot make %s at %s' % (show(path), target_of(self.stream)),
                                    'may this account write there? one that may not make directories '
                                    'needs staging = beside')

    # -- learning, on a small file of ours

    def make_area(self):
        Staging.make_area(self)
        if not self.rehearsed:
            self.rehearse()
            self.rehearsed = True

    def rehearse(self):
        """Do with a small file what will be done with each: STOR, the proof, RNFR, RNTO, DELE.
        Raises TargetError with what the target would need, before anything is sent."""
        content = b'rehearse'           # the same each time, for it may have to stay
        probe = os.path.join(self.area, b'.probe')
        try:
            self.write_once(probe, content)
            with self.connection() as line:
                self.choose_proof(line, probe, content)
                self.traits['absence',] = bool(self.looker)
                moved = self.try_rename(line, probe, content)
                if not self.looker and os.path.basename(moved) not in (self.names_in(line, self.area) or ()):
                    raise TargetError('%s does not say what is there' % target_of(self.stream),
                                      'this account needs SIZE, MLST or NLST')
                self.deletes = self.answers(line, [b'DELE ' + self.name(moved)])[0].done
                if not self.deletes:
                    finished(self.rename_all(line, [(moved, probe)]))
        except TargetError:
            with contextlib.suppress(MoverError):
                self.delete_area()
            raise
        if not self.deletes:
            log.once('this account may not delete at %s: %s stays there' % (
                target_of(self.stream), show(self.area)), self.stream)

    def try_rename(self, line, probe, content):
        """The name that a file of ours has now; the second one where the first had to stay and nothing is
        ever replaced."""
        for tail in (b'-moved', b'-' + content):
            reply, = finished(self.rename_all(line, [(probe, probe + tail)]))
            if reply.done:
                return probe + tail
        raise TargetError('cannot rename at %s: %s' % (target_of(self.stream), reply),
                          'an account that may not rename needs staging = none')

    def write_small(self, path, content):
        """A file of a few bytes, by STOR as all the others.  Raises ItemError, TargetError."""
        with self.connection() as line:
            reply = finished(self.upload(line, path, content))
        if not reply.done:
            raise self.fault('cannot write %s' % show(path), reply)

    def choose_proof(self, line, probe, content):
        """How sizes and hashes are learned here, on a file of ours."""
        import hashlib
        self.check_looker(line, probe, len(content))
        if self.stream.verify == 'accepted' or self.looker and self.stream.verify == 'size':
            return
        if self.choose_hasher(line, probe, lambda name: hashlib.new(name, content).hexdigest()):
            return
        reply, data = self.download(line, b'RETR ' + self.name(probe))
        if not reply.done or data != content:
            raise self.unproven(reply)

    def unproven(self, reply):
        return TargetError('nothing can be proven at %s: RETR: %s' % (target_of(self.stream), reply),
                           self.blind_hint())

    def blind_hint(self):
        return 'an account that may not read needs verify = %s' % ('size' if self.looker else 'accepted')

    def choose_hasher(self, line, path, expected):
        """Whether a hash is told there as it should be; expected(hashlib's name): as hex, or None."""
        offered = re.split(rb'[\s;]+', self.features_of(line))
        for row in self.HASHES:
            right = row[0] in offered and expected(row[2])
            if right and self.asked_hash(line, path, row) == right:
                self.hasher = row
                return True
        return False

    def learn_from(self, line, job):
        """Without a staging area the first file shows how things are proven."""
        self.check_looker(line, job.staged, job.entry.size)
        if job.hashed:
            self.choose_hasher(line, job.staged, lambda name: job.digest if name == 'sha256' else None)
        if not self.looker and not self.hasher and self.stream.verify != 'accepted':
            reply, _ = self.download(line, b'RETR ' + self.name(job.staged), len)
            if not reply.done:
                raise self.unproven(reply)
        self.rehearsed = True

    def asked_hash(self, line, path, row):
        """The answer to XSHA256 and the like, or to HASH (draft-bryan-ftp-hash), as hex or None."""
        import hashlib
        verb, option, name = row
        try:
            digits = hashlib.new(name).digest_size * 2
        except ValueError:              # not on this machine
            return None
        if option and line.option != option:
            self.answers(line, [b'OPTS HASH ' + option])
            line.option = option
        reply = self.answers(line, [verb + b' ' + self.name(path)])[0]
        found = re.search(rb'(?<![0-9A-Fa-f])[0-9A-Fa-f]{%d}(?![0-9A-Fa-f])' % digits, b' '.join(reply.lines))
        return found.group().decode().lower() if reply.done and found else None

    def resumes_here(self, line):
        """Whether REST and STOR go on with a part: tried on a small file, once."""
        if self.resumes is None:
            path, content = os.path.join(self.area, b'.probe-rest'), b'abcDEFG'
            replies = [finished(self.upload(line, path, content[start:start + 4], start)) for start in (0, 3)]
            reply, data = self.download(line, b'RETR ' + self.name(path))
            self.resumes = all(r.done for r in replies + [reply]) and data == content
            self.answers(line, [b'DELE ' + self.name(path)])
        return self.resumes

    # -- the bytes

    def stage(self, batch, jobs):
        cut = []                        # jobs at which a line broke
        self.broken = {name: since for name, since in self.broken.items()
                       if time.monotonic() - since < self.LOCKED_FOR}

        def store(line, job):
            try:
                yield from self.store(line, batch, job)
            except (Changed, ItemError) as error:
                job.error = error
            except TargetError as error:
                line.close()
                job.error = TargetError(error.message, error.hint, job.entry.path)
                cut.append(job)
                self.broken[job.staged] = time.monotonic()
                if len(cut) > self.stream.parallel:     # it is not this file
                    raise job.error
        if all(self.is_eager(job.entry.size) for job in jobs):
            self.in_turn(jobs, store)
        else:
            self.each(jobs, lambda line, job: finished(store(line, job)))
        self.keep_whole(cut)
        self.ended.clear()
        sent = [job for job in jobs if not job.error]
        if sent and not self.rehearsed:
            with self.connection() as line:
                self.learn_from(line, sent[0])
        if self.times or self.stream.target_chmod:
            self.ask(sent, self.dress)

    def keep_whole(self, jobs):
        """All of a file may have arrived although the line went before the server said so: some
        do that after a long transfer.  The proof will tell."""
        for job in jobs:
            if job.staged in self.ended:
                with self.connection() as line:
                    if self.sizes(line, [job.staged])[0] == (True, job.entry.size):
                        job.error, job.hashed = None, self.stream.verify != 'accepted'

    def store(self, line, batch, job):
        """Steps: STOR to the temporary name, or REST and STOR for the rest of a big file.  Raise
        Changed, ItemError, TargetError."""
        start = self.part_there(line, job)
        if job.staged in self.broken and not start and self.stream.staging == 'area':
            # the server may not know yet, and hold it locked for a minute (vsftpd, lock_upload_files)
            self.answers(line, [b'DELE ' + self.name(job.staged)])
        self.broken.pop(job.staged, None)
        reply, digest = yield from self.transfer(line, batch, job, start)
        if not reply.done and reply.code not in (421, 425, 426, 452, 552) and \
                self.answers(line, [b'DELE ' + self.name(job.staged)])[0].done:
            # what was there could not be gone on with, nor replaced: anew, once
            self.resumes = self.resumes and not start
            reply, digest = yield from self.transfer(line, batch, job, 0)
        if not reply.done:
            error = self.fault('STOR %s' % show(job.entry.path), reply, True)
            if isinstance(error, ItemError):
                self.answers(line, [b'DELE ' + self.name(job.staged)])
            raise error
        job.digest = digest.sha256.hexdigest()
        if digest.other:
            self.same[digest.other.hexdigest()] = job.digest
            if len(self.same) > self.REMEMBERED:
                self.same.popitem(last=False)

    def part_there(self, line, job):
        """How much of a big file came in a run before and can be gone on with."""
        if job.entry.size < RESUME_FROM:
            return 0
        there = self.sizes(line, [job.staged])[0][1] or 0
        if not 0 < there <= job.entry.size or not self.resumes_here(line):
            return 0
        job.hashed = self.stream.verify != 'accepted'       # only the whole proves what a resume made
        return there

    def transfer(self, line, batch, job, start):
        """Steps that send the bytes from `start` on; (the last reply, the digests of all of them)."""
        digest = Digests(self.hasher[2] if self.hasher else 'sha256')
        if start:
            copy_prefix(batch.root, job.entry, digest, start, self.stop)
            if start == job.entry.size:
                return FtpReply(226, [b'all of it is there']), digest

        def content(send):
            def write(block):
                digest.update(block)
                view = memoryview(block)
                for at in range(0, len(view), 1 << 16):     # one sendall() has one timeout
                    send(view[at:at + (1 << 16)])
                    count = min(1 << 16, len(view) - at)
                    self.progress.sent(count)
                    self.throttle.spend(count)
            copy_entry(batch.root, job.entry, write, self.stop, start)
            self.ended.add(job.staged)
        self.ended.discard(job.staged)
        few = self.read_few(batch, job, digest) if self.is_eager(job.entry.size) else content
        return (yield from self.upload(line, job.staged, few, start)), digest

    def read_few(self, batch, job, digest):
        """The bytes of a file that go by one write."""
        content = b''.join(read_entry(batch.root, job.entry, self.stop))
        digest.update(content)
        self.progress.sent(len(content))
        self.throttle.spend(len(content))
        self.ended.add(job.staged)
        return content

    def upload(self, line, path, content, start=0):
        """Steps that STOR content, or what content(send) sends, over a data connection of its own; the last
        reply.  A few bytes follow STOR at once, a round trip earlier; for many, and for a handshake, a
        refusal must be heard first."""
        try:
            return (yield from self.upload_now(line, path, content, start))
        except (OSError, EOFError) as error:
            raise self.line_trouble(error, 'STOR %s' % show(path))

    def is_eager(self, size):
        return not self.stream.tls and size <= self.EAGER

    def upload_now(self, line, path, content, start):
        eager = not callable(content) and not line.context
        trouble = None
        conn = yield from line.open_data()
        try:
            if start:
                reply = line.command(b'REST %d' % start)
                if reply.code != 350:
                    return reply
            line.tell([b'STOR ' + self.name(path)])
            if not eager:
                reply = yield from line.hear()
                if reply.code // 100 != 1:
                    return reply
            try:
                if eager:
                    conn.sendall(content)
                else:
                    conn = line.secured(conn)
                    with self.stop.on_stop(lambda: self.hang_up(conn)):
                        content(conn.sendall) if callable(content) else conn.sendall(content)
                        if line.context:
                            conn.unwrap()
            except (Changed, ItemError, OSError) as error:
                trouble = error
        finally:
            conn.close()
        return (yield from self.hear_out(line, trouble))

    @staticmethod
    def hear_out(line, trouble):
        """Steps to what the server says of a transfer that has ended; trouble: what we know already."""
        reply = yield from line.hear()
        for _ in range(FtpTransport.PRELIMINARY):
            if reply.code // 100 != 1:
                break
            reply = yield from line.hear()
        if isinstance(trouble, MoverError) or trouble and reply.done:
            raise trouble                           # whatever it says of the half it got
        return reply                                # if it hung up, this says why

    def dress(self, line, jobs):
        """Time by MFMT (draft-somers-ftp-mfxx) or MDTM; mode by SITE CHMOD, where offered."""
        if self.times:
            verb = b'MFMT' if b'MFMT' in self.features_of(line) else b'MDTM'
            replies = self.answers(line, [b'%s %s %s' % (verb, time.strftime(
                '%Y%m%d%H%M%S', time.gmtime(min(max(0, job.entry.mtime_ns // 10 ** 9), LAST_SECOND))
            ).encode(), self.name(job.staged)) for job in jobs])
            self.times = any(reply.done for reply in replies)
        if self.stream.target_chmod:
            replies = self.answers(line, [b'SITE CHMOD %o %s' % (
                self.stream.target_chmod[0], self.name(job.staged)) for job in jobs])
            for job, reply in zip(jobs, replies):
                if not reply.done:
                    job.error = ItemError('SITE CHMOD %s: %s' % (show(job.final), reply))

    # -- the proof

    def measure(self, paths, hashed):
        found = {}

        def look(line, chunk):
            for path, (there, size) in zip(chunk, self.sizes(line, chunk)):
                if there or not self.looker:
                    found[path] = size, None
                elif there is None:
                    found[path] = ItemError('the server does not say whether %s is there' % show(path))

        def read(line, path):
            try:
                found[path] = self.read_back(line, path, found[path][0])
            except ItemError as error:
                found[path] = error
        self.ask(paths, look)
        self.each([path for path, answer in found.items() if not isinstance(answer, ItemError) and
                   (hashed or answer[0] is None)], read)
        return {path: answer for path, answer in found.items() if answer}

    def read_back(self, line, path, size):
        """(size, SHA-256) of a file there, by its hash or by its bytes; None if it is not there.
        Raises ItemError."""
        import hashlib
        if size == 0:
            return 0, hashlib.sha256().hexdigest()
        if self.hasher and size is not None:
            line.sock.settimeout(self.stream.stall_timeout + size / CHECK_RATE)     # it is silent meanwhile
            answer = self.asked_hash(line, path, self.hasher)
            line.sock.settimeout(self.stream.stall_timeout)
            if answer:
                return size, answer if self.hasher[2] == 'sha256' else self.same.get(answer, answer)
        digest, count = hashlib.sha256(), [0]

        def use(block):
            digest.update(block)
            count[0] += len(block)
        reply, _ = self.download(line, b'RETR ' + self.name(path), use)
        if reply.done:
            return count[0], digest.hexdigest()
        if size is None and not self.looker:
            return None
        error = self.fault('RETR %s' % show(path), reply)
        error.hint = self.blind_hint()
        raise error

    @property
    def hashing(self):
        """How a hash of what is there is had, for the ledger."""
        return self.hasher[0].decode() if self.hasher else 'read back'

    def same_content(self, batch, job):
        with self.connection() as line:
            if self.is_directory(line, job.final):      # some tell the size of one
                return None
        try:
            same = Staging.same_content(self, batch, job)
        except ItemError:
            if self.stream.verify == 'checksum':
                raise
            return False                # what may not be read may be anything
        blind = not self.traits.get(('absence',))
        return False if same is None and blind and self.exists(job.final) else same

    # -- names

    def rename_all(self, line, pairs):
        """Steps to the reply to each RNTO, or to a RNFR that was refused.  RNTO goes only after its own
        350 was read: a server that still held another RNFR would rename that one."""
        replies = []
        commands = [(b'RNFR ' + self.name(old), b'RNTO ' + self.name(new)) for old, new in pairs]
        ahead = self.ahead == self.AHEAD
        with self.translated('RNFR'):
            for index, (source, target) in enumerate(commands):
                following = [commands[index + 1][0]] if ahead and index + 1 < len(commands) else []
                if not ahead or not index:
                    line.tell([source])
                reply = yield from line.hear()
                if reply.code == 350:
                    line.tell([target] + following)
                    reply = yield from line.hear()
                else:
                    line.tell(following) if following else None
                replies.append(reply)
        for reply in replies:
            if reply.code in (421, 501, 503):       # not in step: this line is not to be used again
                raise TargetError('RNFR, RNTO: %s' % (reply,))
        return replies

    def place(self, jobs):
        done = set()

        def publish(line, chunk):
            replies = yield from self.rename_all(line, [(job.staged, job.final) for job in chunk])
            for job, reply in zip(chunk, replies):
                if not reply.done and not self.is_there(line, job.final):
                    job.error = self.refused(job.final, reply)
                if reply.done or job.error:
                    done.add(job)
        self.share(jobs, publish)
        return done

    def refused(self, path, reply):
        may = 'may this account write there? one that may not rename needs staging = none'
        hints = {'area': '%s; %s' % (may, self.BORDER), 'beside': may,
                 'none': 'an account that may not rename can keep no backup: set on_conflict = refuse'}
        return ItemError('RNTO %s: %s' % (show(path), reply), hints[self.stream.staging])

    def refuses_renames(self):
        """All servers that were tried take RNFR of a directory."""
        with self.connection() as line:
            reply = self.begin_rename(line, b'.')
            if reply.code == 350 or reply.code in self.UNKNOWN:
                return None if reply.code == 350 else reply
            names = sorted(self.names_in(line, b'') or ())
            reply = self.begin_rename(line, names[0]) if names else None
            return reply if reply and reply.code != 350 else None

    def begin_rename(self, line, path):
        """The reply to RNFR alone.  After 350 the connection is not used again: servers differ in when they
        forget a rename that was begun, and this one is of a directory.  Its end is waited for, where one
        connection is all that a server allows."""
        reply, = self.answers(line, [b'RNFR ' + self.name(path)])
        if reply.code == 350:
            with contextlib.suppress(MoverError), self.translated('QUIT'):
                line.sock.settimeout(KILL_GRACE)
                line.command(b'QUIT')
                line.sock.recv(1)
            line.close()
        return reply

    def rename(self, old, new):
        with self.connection() as line:
            reply, = finished(self.rename_all(line, [(old, new)]))
            if not reply.done:
                raise self.refused(new, reply)

    overwrite = Staging.overwrite_in_steps

    def delete(self, paths):
        self.ask(paths, lambda line, chunk: self.answers(
            line, [b'DELE ' + self.name(path) for path in chunk]))

    def delete_area(self):
        with self.connection() as line:
            return self.delete_tree(line, self.area) or not self.deletes

    def delete_tree(self, line, path):
        """Remove a directory of ours and what is in it; whether it is gone."""
        if self.answers(line, [b'RMD ' + self.name(path)])[0].done:
            return True
        for name in self.names_in(line, path) or ():
            inner = os.path.join(path, name)
            if not self.answers(line, [b'DELE ' + self.name(inner)])[0].done:
                self.delete_tree(line, inner)
        return self.answers(line, [b'RMD ' + self.name(path)])[0].done or not self.is_directory(line, path)

    def learned(self):
        yield from Staging.learned(self)
        yield 'proof', self.hashing if self.stream.verify == 'checksum' else self.stream.verify
        yield 'two senders of one name', 'the second is refused' if self.trait('keeps') else \
            'not guarded: RNTO replaces what comes between our look and it'

    def try_keeps(self):
        """Whether RNTO refuses a name that is taken."""
        with self.tiny(b'first') as first, self.tiny(b'the second') as second:
            try:
                self.rename(first, second)
            except ItemError:
                return self.measure([second], False).get(second) == (10, None)
        return False


TRANSPORTS = {
    'local': LocalTransport,
    'rsync_ssh': RsyncSsh,
    'rsync_native': RsyncNative,
    'scp': ScpTransport,
    'sftp': SftpTransport,
    'ftp': FtpTransport,
    'rclone': RcloneTransport,
}


# ----------------------------------------------------------------------------------------
# 15  delivery: the straight line
# ----------------------------------------------------------------------------------------

def make_incoming(stream):
    """The incoming directory, made if it is missing and may be made.  Raises StateError if it cannot
    be used."""
    trouble = directory_trouble('the directory', stream.root, stream.create_directories)
    if trouble and not (trouble[0] == errno.ENOENT and stream.create_directories):
        raise StateError(*trouble[1:])
    if trouble:
        with own_files('cannot make %s' % show(stream.directory)):
            os.makedirs(stream.root, exist_ok=True)


def in_window(window, now):
    """Whether a local time lies in a transfer window, which may go past midnight."""
    if window is None:
        return True
    start, end = window
    minute = now.tm_hour * 60 + now.tm_min
    return start <= minute < end if start <= end else minute >= start or minute < end


def open_below(directory, part, make):
    """The descriptor of a directory in that of another, no symlink followed; make: if it is missing.
    Raises OSError."""
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(part, 0o700, dir_fd=directory)
    return os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)


class Kept:
    """keep_delivered: released copies, in DIRECTORY/.delivered/HOUR/ under their own paths."""

    HOUR = re.compile(rb'\d{4}-\d\d-\d\dT\d\dZ\Z')

    def __init__(self, stream):
        self.stream = stream
        self.top = os.path.join(stream.root, KEPT_DIR)

    def folder(self, relative):
        """A descriptor of a folder of this hour, made if need be; no symlink is followed.
        Raises OSError."""
        fd = os.open(self.stream.root, os.O_RDONLY | os.O_DIRECTORY)
        hour = to_bytes(time.strftime('%Y-%m-%dT%HZ', time.gmtime()))
        for depth, part in enumerate([KEPT_DIR, hour] + (relative.split(b'/') if relative else [])):
            try:
                below = open_below(fd, part, True)
            except OSError as error:
                if depth < 2 or error.errno not in (errno.ENOTDIR, errno.ELOOP):
                    os.close(fd)
                    raise
                below = open_below(fd, stamped(part), True)     # a file kept before has that name
            os.close(fd)
            fd = below
        return fd

    def check(self, path):
        """Raises OSError if a copy of this path could not be kept now."""
        os.close(self.folder(os.path.dirname(path)))

    def take(self, name, path, directory=None):
        """Move what is released to its place among the copies.  Raises OSError."""
        fd = self.folder(os.path.dirname(path))
        base = os.path.basename(path)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.stat(base, dir_fd=fd, follow_symlinks=False)
                base = stamped(base)
            os.rename(name, base, src_dir_fd=directory, dst_dir_fd=fd)
        except FileNotFoundError:
            raise OSError(errno.EBUSY, 'the folder of copies is being purged', path)
        finally:
            os.close(fd)

    def hours(self):
        """[(the time it ends, path)] of the hours kept, oldest first."""
        found = []
        if os.path.islink(self.top):
            return found
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(self.top)):
                path = os.path.join(self.top, name)
                with contextlib.suppress(ValueError):
                    if self.HOUR.match(name) and not os.path.islink(path):
                        found.append((epoch(to_text(name[:-1]) + ':00:00.000Z') + 3600, path))
        return found

    def purge(self, age, keep):
        """Delete the hours that ended at least `keep` seconds ago, as age() counts them; never
        the one being filled."""
        for end, path in self.hours():
            if age(end) >= keep:
                self.remove(path)

    def remove(self, path):
        """Delete one hour of copies, every one of which is proven at the target."""
        import shutil
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(self.top)
        log.info('purged %s' % show(path), self.stream)


@contextlib.contextmanager
def made_writable(directory):
    """A directory of ours in which we may not write lets us for a moment, as rsync does it.
    Raises OSError."""
    is_path = isinstance(directory, bytes)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY) if is_path else os.dup(directory)
    try:
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        if mode & 0o300 == 0o300:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), directory)
        os.chmod(fd, mode | 0o700)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.chmod(fd, mode)
    finally:
        os.close(fd)


class Releaser:
    """Deletes delivered sources, and nothing else.

    A file is held by a read lease and looked at; then it is renamed into a private directory
    and looked at once more, so that neither a writer nor a file put in its place can lose
    anything: whatever turns out not to be the delivered snapshot is put back.  A zipped
    directory is renamed aside as a whole, after a journal that lets a crash be finished; then
    its files go in the same way one after the other, for who works in it still reaches them.
    """

    CLOSERS, CLOSED_TOGETHER = 4, 32    # threads; descriptors for each at a time
    SLOW = 5e-5                     # seconds that a close takes: below, a thread costs more

    def __init__(self, stream, state_dir):
        self.stream = stream
        self.root = stream.root
        self.journal = os.path.join(state_dir, stream.name + '.releasing')
        self.kept = Kept(stream)
        self.leases = Leases(stream)
        self.cached = None              # (directory, its descriptor, the private one)
        self.changed = {}               # (dev, ino) -> ctime after we unlinked another name of it
        self.steady = None              # whether inode numbers stay, once it was tried
        self.gone = []                  # descriptors of what is gone, to be closed
        self.closers = []               # threads that do so
        self.slow = False               # whether it took long of late
        self.ours = {}                  # directory -> its mtime as we left it, and as we found it
        self.most = 1000                # of these, before one looks for those that are gone
        self.fresh = set()              # empty directories in which something changed a moment ago
        self.clock = None               # (directory_clock(), monotonic time) of this pass

    # -- single files

    def release(self, item, linked):
        """Delete what of the item still is as its snapshot says; return why the rest stays.
        Raises ItemError if something is there but may not be deleted.  linked: {path: Link}."""
        below = parent_of(item.name)
        if not below and not item.is_directory:
            return self.release_files(item, linked)
        with self.touching(below) if below else contextlib.ExitStack():
            reasons = self.release_files(item, linked)
        self.forget_directory()
        self.remove_directories(item)
        return reasons

    def release_files(self, item, linked):
        reasons = []
        for entry in item.files:
            reason = self.release_file(entry, linked.get(entry.path))
            if reason:
                reasons.append('%s %s' % (show(entry.path), reason))
        return reasons

    def release_file(self, entry, link):
        """None when it is gone, else the reason why it stays."""
        try:
            if WINDOWS:
                return self.release_plainly(entry)
            if self.stream.keep_delivered:
                self.kept.check(entry.path)     # before anything is moved
            return self.release_held(entry, link)
        except OSError as error:
            if error.errno == errno.ENOENT and not os.path.lexists(os.path.join(self.root, entry.path)):
                return None
            raise self.undeletable(entry.path, error)

    @staticmethod
    def undeletable(path, error):
        message = '%s was delivered, but cannot be deleted: %s' % (show(path), error.strerror)
        if error.errno in NO_SPACE:
            return NoRoom(message, 'the disk of the directory is full, and we need a directory of our own '
                          'there: make a little room by hand')
        return ItemError(message, 'change the permissions of the directory')

    def release_plainly(self, entry):
        path = os.path.join(self.root, entry.path)
        if not entry.same_as(os.lstat(path)):
            return 'changed after it was sent'
        os.unlink(path)     # Windows refuses while somebody has it open
        return None

    def discard(self, name, path, directory=None):
        """The moment a source goes, or goes to where copies are kept for a while."""
        if self.stream.keep_delivered:
            self.kept.take(name, path, directory)
        else:
            os.unlink(name, dir_fd=directory)

    def release_held(self, entry, link, in_tree=False, any_ctime=False):
        """link: the Link of a file that has its second name at the target, which is taken back
        before a writer who waits goes on.  in_tree: it lies in a tree that was set aside."""
        head, _, name = entry.path.rpartition(b'/')
        reason, any_ctime = 'could not be looked at', any_ctime or link is not None
        fd, leased = link.held() if link else (None, None)
        try:
            place = self.directory(head, in_tree) + (name,)
            held = fd is not None       # since it was looked at before it got its second name
            if not held:
                fd, leased = self.hold(place)
            if leased is False:
                reason = 'is open for writing'
            elif not held and not self.as_expected(entry, os.fstat(fd), any_ctime):
                reason = 'changed after it was sent'
            else:
                reason = self.release_open(fd, leased, entry, place, any_ctime)
            if reason and link:
                link.take_back()
            return reason
        except OSError as error:
            # a file system that renames nothing that is open
            if error.errno != errno.EBUSY or fd is None or in_tree or self.stream.keep_delivered:
                raise
            os.close(fd)
            fd = None
            return self.release_plainly(entry)
        finally:
            if fd is not None:
                # of a link nothing is freed: the inode is at the target too
                os.close(fd) if reason or link else self.close_later(fd)

    def hold(self, place):
        """(descriptor, whether a lease holds it) of a file: (directory, private one, name)."""
        parent, _, name = place
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent)
        return fd, self.leases.take(fd)

    def release_open(self, fd, leased, entry, place, any_ctime):
        """None when it is gone, else the reason why it stays.  any_ctime: it has another one
        since, by our doing."""
        parent, aside, name = place
        if aside is None:
            return self.unlink_held(fd, leased, parent, name)
        try:
            self.move_aside(place)
        except OSError as error:
            if error.errno != errno.EXDEV or self.stream.keep_delivered:
                raise
            return self.unlink_held(fd, leased, parent, name)
        there = os.stat(name, dir_fd=aside, follow_symlinks=False)
        if not (entry.is_at(there) or self.is_elsewhere(fd, entry, there, aside)) or \
                leased and lease_broken(fd):
            self.put_back(name, name, aside, parent)
            return 'changed while it was released'
        try:
            self.discard(name, entry.path, aside)
        except OSError:
            self.put_back(name, name, aside, parent)
            raise
        if there.st_nlink > 1 and not any_ctime:
            self.changed[(there.st_dev, there.st_ino)] = os.fstat(fd).st_ctime_ns
        return None

    @staticmethod
    def unlink_held(fd, leased, parent, name):
        """Where nothing can be moved aside, a mount point or a full disk: the last look is right
        before the unlink.  None when it is gone, else the reason why it stays."""
        there = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if not os.path.samestat(there, os.fstat(fd)) or leased and lease_broken(fd):
            return 'changed while it was released'
        os.unlink(name, dir_fd=parent)
        return None

    @staticmethod
    def move_aside(place):
        parent, aside, name = place
        try:
            os.rename(name, name, src_dir_fd=parent, dst_dir_fd=aside)
        except PermissionError:
            with made_writable(parent):
                os.rename(name, name, src_dir_fd=parent, dst_dir_fd=aside)

    def is_elsewhere(self, fd, entry, there, aside):
        """Whether it is the file that is held, with the inode number of its new path."""
        return entry.looks_like(there) and entry.looks_like(os.fstat(fd)) and not self.inodes_stay(aside)

    def inodes_stay(self, aside):
        """Whether a file of ours keeps its inode number when it is renamed; the kernel may have
        kept the old one for a second (fuse(4), entry_timeout)."""
        if self.steady is None:
            names = [OWN_PREFIX + b'-try-' + random_hex(4) for _ in range(2)]
            os.close(os.open(names[0], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=aside))
            before = os.stat(names[0], dir_fd=aside)
            os.rename(names[0], names[1], src_dir_fd=aside, dst_dir_fd=aside)
            until = time.monotonic() + 1.5
            self.steady = True
            while self.steady and time.monotonic() < until:
                self.steady = os.path.samestat(before, os.stat(names[1], dir_fd=aside))
                time.sleep(0.1)
            os.unlink(names[1], dir_fd=aside)
        return self.steady

    def close_later(self, fd):
        """Only then the space is freed, for which a disk may be waited for (ext4 with discard:
        150 us each): a few threads wait together."""
        self.gone.append(fd)
        if len(self.gone) >= self.CLOSED_TOGETHER:
            self.close_gone()

    def close_gone(self):
        gone, self.gone = self.gone, []
        self.closers = [thread for thread in self.closers if thread.is_alive()]
        if self.slow and len(self.closers) < self.CLOSERS:
            thread = threading.Thread(target=close_all, args=(gone,), name='closer', daemon=True)
            with contextlib.suppress(RuntimeError):     # no thread to be had
                thread.start()
                self.closers.append(thread)
                return
        started = time.monotonic()
        close_all(gone)
        self.slow = time.monotonic() - started > self.SLOW * len(gone)

    def as_expected(self, entry, info, any_ctime):
        """Whether this is what the snapshot says, but for the ctime that we gave it."""
        return entry.same_as(info) or entry.is_at(info) and (
            any_ctime or self.changed.get((entry.dev, entry.ino)) == info.st_ctime_ns)

    @staticmethod
    def put_back(old, new, aside=None, parent=None):
        """Under its own name, or beside what took it meanwhile; nothing is overwritten.  aside, parent:
        descriptors of the directories that the names are relative to."""
        for name in (new, stamped(new)):
            try:
                os.link(old, name, src_dir_fd=aside, dst_dir_fd=parent, follow_symlinks=False)
                os.unlink(old, dir_fd=aside)
                return
            except FileExistsError:
                with contextlib.suppress(FileNotFoundError):    # a crash may have come between these two
                    if os.path.samestat(os.stat(old, dir_fd=aside, follow_symlinks=False),
                                        os.stat(name, dir_fd=parent, follow_symlinks=False)):
                        os.unlink(old, dir_fd=aside)
                        return
            except OSError:             # no hard links here
                if rename_if_free(old, name, aside, parent):
                    return

    def directory(self, relative, in_tree=False):
        """Descriptors of a directory of the source, or of a tree that was set aside, and of its
        private counterpart, None where the disk has no room for that; every component is opened
        without following symlinks."""
        if self.cached and self.cached[0] == (relative, in_tree) and self.cached[2] is not None:
            return self.cached[1:]
        self.forget_directory()
        top = os.path.join(self.root, RELEASE_DIR) if in_tree else self.root
        parts = relative.split(b'/') if relative else []
        parent, aside = self.step_down(top, parts, False), None
        try:
            aside = self.step_down(top, [HELD_DIR if in_tree else RELEASE_DIR] + parts, True)
        except OSError as error:
            if in_tree or self.stream.keep_delivered or error.errno not in NO_SPACE:
                os.close(parent)
                raise
        self.cached = (relative, in_tree), parent, aside
        return parent, aside

    @staticmethod
    def step_down(top, parts, make):
        """The descriptor of a directory below another one.  Raises OSError."""
        fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
        for part in parts:
            try:
                below = open_below(fd, part, make)
            finally:
                os.close(fd)
            fd = below
        return fd

    def forget_directory(self):
        if self.gone:
            self.close_gone()
        if self.cached:
            close_all(fd for fd in self.cached[1:] if fd is not None)
            self.cached = None

    def remove_directories(self, item):
        """What is empty goes; what holds something stays, whatever it is."""
        if self.stream.remove_directories:
            for entry in reversed(item.entries):
                if entry.kind == 'd':
                    with contextlib.suppress(OSError):
                        self.remove_directory(os.path.join(self.root, entry.path))
            self.remove_quiet(os.path.dirname(item.name))

    @staticmethod
    def remove_directory(path):
        """If it is empty.  Raises OSError."""
        try:
            os.rmdir(path)
        except PermissionError:
            with made_writable(os.path.dirname(path)):
                os.rmdir(path)

    def remove_quiet(self, path):
        """items = files: a directory, and those above it, if they are empty and nobody changed
        anything in them for settle_time: whoever made a day folder is going to use it."""
        while path:
            try:
                if not self.is_quiet(path):
                    self.fresh.add(path)
                    return
                above = os.path.dirname(path)
                with self.touching(above):
                    self.remove_directory(os.path.join(self.root, path))
            except OSError:
                return
            self.ours.pop(path, None)
            path = above

    def remove_fresh(self):
        """Those that were left a moment ago, if they are quiet by now."""
        fresh, self.fresh = self.fresh, set()
        for path in sorted(fresh, reverse=True):
            self.remove_quiet(path)

    def changed_ns(self, path):
        """When somebody else changed something in a directory.  Raises OSError."""
        now = os.lstat(os.path.join(self.root, path)).st_mtime_ns
        left, found = self.ours.get(path, (None, None))
        return found if left == now else now

    @contextlib.contextmanager
    def touching(self, path):
        """What we change in a directory meanwhile is nobody else's doing."""
        found = None
        with contextlib.suppress(OSError):
            found = self.changed_ns(path)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                self.ours[path] = os.lstat(os.path.join(self.root, path)).st_mtime_ns, found

    def is_quiet(self, path):
        """Raises OSError."""
        if not self.stream.settle_time:
            return True
        if self.clock is None:
            self.clock = directory_clock(self.stream) or int(time.time() * 1e9), time.monotonic()
        now = self.clock[0] / 1e9 + time.monotonic() - self.clock[1]
        return now - (self.changed_ns(path) or 0) / 1e9 >= self.stream.settle_time

    def clean(self):
        """Remove the private directory, which is empty unless a crash left something in it; on
        NFS what is open keeps a name in it."""
        self.forget_directory()
        self.changed.clear()            # the next scan sees what is true by then
        self.clock = None
        if len(self.ours) > self.most:
            self.ours = {path: times for path, times in self.ours.items()
                         if os.path.lexists(os.path.join(self.root, path))}
            self.most = 2 * len(self.ours) + 1000
        for thread in self.closers:
            thread.join(KILL_GRACE)
        top = os.path.join(self.root, RELEASE_DIR)
        for path, directories, _ in os.walk(top, topdown=False):
            for name in directories:
                with contextlib.suppress(OSError):
                    os.rmdir(os.path.join(path, name))
        with contextlib.suppress(OSError):
            os.rmdir(top)

    # -- zipped directories

    def release_tree(self, item, scanner):
        """Rename the tree aside in one step, look at it, delete it; return why it stays."""
        content = [[to_text(e.path), e.kind] + list(e.identity) for e in item.entries]
        atomic_write(self.journal, to_json([to_text(item.name), content]), True)
        top = os.path.join(self.root, RELEASE_DIR)
        try:
            os.makedirs(top, 0o700, exist_ok=True)
            # directories' own times change when their content is renamed; files' do not
            now = scanner.look(item.name)
            if now is None or tree_of(now.entries) != tree_of(item.entries):
                os.unlink(self.journal)
                return ['%s changed after it was zipped' % show(item.name)]
            self.set_aside(os.path.join(self.root, item.name), os.path.join(top, item.name))
        except OSError as error:
            os.unlink(self.journal)
            raise self.undeletable(item.name, error)
        return self.finish_tree(item.name, item.entries)

    @staticmethod
    def set_aside(old, new):
        """A directory that goes to another one is written in itself: its `..` changes."""
        try:
            os.rename(old, new)
        except PermissionError:
            with made_writable(old):
                os.rename(old, new)

    def finish_tree(self, name, entries, returned=()):
        """Delete of a tree that was renamed aside what the snapshot holds, if all of it is
        as it was; put back everything else.  returned: paths that a crash held up on their way
        out, which have another ctime since."""
        top = os.path.join(self.root, RELEASE_DIR)
        files = [e for e in entries if e.kind == 'f']
        if not any(self.is_busy(os.path.join(top, e.path), e, e.path in returned) for e in files):
            for entry in reversed(entries):
                with contextlib.suppress(OSError):
                    if entry.kind == 'f':
                        self.release_held(entry, None, True, entry.path in returned)
                    elif self.stream.remove_directories:
                        self.remove_directory(os.path.join(top, entry.path))
        self.forget_directory()
        reasons = []
        if any(os.path.lexists(os.path.join(top, e.path)) for e in files):
            reasons.append('%s: something in it changed or is in use; it stays' % show(name))
        if os.path.lexists(os.path.join(top, name)):
            self.put_tree_back(name)        # what was never sent, or came meanwhile
        os.unlink(self.journal)
        return reasons

    def is_busy(self, path, entry, any_ctime):
        """Whether a file that is still there is not what the snapshot says, or is written."""
        try:
            fd = os.open(path, OPEN_FLAGS)
        except OSError:
            return os.path.lexists(path)
        try:
            info = os.fstat(fd)
            return not self.as_expected(entry, info, any_ctime) or self.leases.take(fd) is False
        finally:
            os.close(fd)

    def put_tree_back(self, name):
        source = os.path.join(self.root, RELEASE_DIR, name)
        for new in (name, stamped(name)):
            target = os.path.join(self.root, new)
            if not os.path.lexists(target):
                self.set_aside(source, target)
                return

    # -- after a crash

    def recover(self):
        """Finish or undo what a crash interrupted.  Raises StateError."""
        top = os.path.join(self.root, RELEASE_DIR)
        try:
            if os.path.isdir(top) and not os.path.islink(top):
                self.finish_journal(top, self.restore_all(os.path.join(top, HELD_DIR), top))
                self.restore_all(top, self.root)
                for name in os.listdir(top):
                    if any(files for _, _, files in os.walk(os.path.join(top, name))):
                        self.put_tree_back(name)
                self.clean()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.journal)     # of a tree that never went aside, or is gone
        except OSError as error:
            raise StateError('cannot put back %s: %s' % (show(error.filename or top), error.strerror))

    def finish_journal(self, top, returned):
        try:
            with open(self.journal, encoding='ascii') as handle:
                name, content = from_json(handle.read())
        except (OSError, ValueError):
            return
        entries = [Entry(to_bytes(path), kind, size, mtime, ctime, dev, ino, 0)
                   for path, kind, dev, ino, size, mtime, ctime in content]
        if os.path.lexists(os.path.join(top, to_bytes(name))):
            log.info('finishing the release of %s' % show(name), self.stream)
            self.finish_tree(to_bytes(name), entries, returned)

    def restore_all(self, top, home):
        """Put every file below one directory back where it was below another; their paths."""
        found = {os.path.relpath(os.path.join(path, name), top)
                 for path, _, files in os.walk(top) for name in files}
        for relative in found:          # they are sent again, found identical, and released
            os.makedirs(os.path.dirname(os.path.join(home, relative)), exist_ok=True)
            self.put_back(os.path.join(top, relative), os.path.join(home, relative))
        return found


class Pipeline:
    """Runs `work` for one value in the background while the next one is prepared; what it
    hands on to `after`, another Pipeline, belongs to it."""

    def __init__(self, work, after=None):
        self.work = work
        self.after = after
        self.thread = None
        self.error = None

    def _run(self, value):
        try:
            self.work(value)
        except BaseException as error:
            self.error = error

    def put(self, value):
        """Wait for the value before, then start with this one.  Raises what that one raised."""
        self.join()
        self.thread = threading.Thread(target=self._run, args=(value,), name='pipeline')
        self.thread.start()

    def busy(self):
        return self.thread is not None and self.thread.is_alive()

    def join(self):
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.error:
            error, self.error = self.error, None
            raise error

    def drain(self):
        """Wait until nothing is under way here or after it.  Raises what went wrong."""
        try:
            self.join()
        finally:
            if self.after:
                self.after.drain()


# What is known about one failure when a pass has ended.  strikes: how often the line broke at
# this item; advanced: whether more of it had arrived at the second; larger: whether an item at
# least as large went after it had failed, and the target has room; half: whether one at least half
# as large went in this pass; any: whether anything went; alike: how many failed in the same way.
Evidence = collections.namedtuple('Evidence', 'strikes advanced larger half any alike')

MOST_ALIKE = 3              # items that fail alike while nothing goes: beyond, it is the target


def next_step(error, works, evidence):
    """Whose fault a failure is, as what to do next: 'count' it against the item, let the item
    'wait' without counting, or treat the target as 'down'.

    Two facts decide: whose trouble it looks like (error.scope and class), and whether a probe of
    the target by the usual verbs works now.
    """
    if error.scope == 'machine' or not works and not isinstance(error, Unfit):
        return 'down'
    if isinstance(error, Unfit):
        return 'count'
    if evidence.alike > MOST_ALIKE and not evidence.any:
        return 'down'
    if error.scope == 'target':             # the line broke at this file
        if evidence.strikes > 1 and not evidence.advanced and evidence.half:
            return 'count'
        return 'wait' if evidence.any else 'down'
    if isinstance(error, NoRoom) and not evidence.larger:
        return 'wait'
    return 'count'


class Case:
    """A parcel that failed in this pass, and what is known of it."""

    def __init__(self, place, parcel, error):
        self.place = place          # (root, subdir) of its batch
        self.parcel = parcel
        self.error = error
        self.strikes = 0            # of the line, at this item
        self.arrived = None         # bytes of it at the target after the first one, if known
        self.advanced = False       # whether there were more after the second
        self.room = True            # False: the target says that it has too little for it
        self.larger = False         # whether one at least as large went after it had failed


class Result:
    """What one pass did."""

    def __init__(self):
        self.items = self.bytes = 0         # delivered
        self.copied = 0                     # of those that never rest
        self.withheld = 0                   # delivered, but changed and so not released
        self.failed = 0
        self.settling = []                  # names that are still changing, or too fresh
        self.busy = []                      # names that somebody has open, or that changed
        self.waiting = 0                    # in their own back-off
        self.unready = 0                    # without their ready file
        self.quarantined = 0
        self.seconds = 0.0

    @property
    def disturbed(self):
        """Whether the pass itself may have changed something in the directory."""
        return bool(self.items or self.withheld or self.failed or self.quarantined)

    @property
    def idle(self):
        """Whether nothing was done, and nothing is there that time alone makes due."""
        return not (self.items or self.withheld or self.failed or self.settling or self.busy or
                    self.waiting or self.quarantined)

    def line(self):
        parts = ['delivered %s (%s) in %s' % (count_of(self.items, 'item'), format_size(self.bytes),
                                              format_duration(self.seconds))]
        for number, text in ((self.failed, 'failed'), (self.withheld, 'changed meanwhile and kept'),
                             (len(self.settling) + len(self.busy), 'still settling'),
                             (self.waiting, 'waiting to be tried again'),
                             (self.unready, 'waiting for a ready or check file'),
                             (self.quarantined, 'quarantined'), (self.copied, 'copied')):
            if number:
                parts.append('%d %s' % (number, text))
        return ', '.join(parts)


ORDER_KEYS = {'oldest': lambda item: item.mtime_ns, 'newest': lambda item: -item.mtime_ns,
              'smallest': lambda item: item.size, 'largest': lambda item: -item.size,
              'name': lambda item: 0}


# What is due, as a scan found it: key (by `order`), name, ready (the Entry of its ready file),
# is_directory, item (None: it is looked at again before it goes)
Due = collections.namedtuple('Due', 'key name ready is_directory item')


class Delivery:
    """One pass over one stream."""

    HELD = 10000                # Items kept from the scan
    MANY = 1000                 # files: to look at so many takes as long as a login
    MOST_STRIKES = 12           # times the line may break in a pass before the target counts as down

    def __init__(self, worker):
        self.worker = worker
        self.stream = worker.stream
        self.stop = worker.stop
        self.transport = worker.transport
        self.scanner = worker.scanner
        self.progress = worker.progress
        self.failures = worker.failures
        self.releaser = worker.releaser
        self.result = Result()
        self.backing_off = False
        self.followers = []             # ready and check files whose item has been delivered
        self.lasts = []                 # Items of the markers inside of those
        self.answered = []              # (batch, outcomes) that wait for their sums
        self.dates = {}                 # name of such a file -> mtime_ns of its item
        self.connected = False
        self.connecting = Pipeline(self.connect)
        self.releasing = Pipeline(self.record_and_release)  # while one part is recorded and released,
        self.proving = Pipeline(self.prove, self.releasing)     # the next is proven, the third sent
        self.seen = {}                  # hash of a folded name that a batch has sent -> how many before it
        self.open = collections.OrderedDict()   # name -> (place, Parcel): sent, not answered yet
        self.again = collections.deque()        # batches to be sent again after the line broke
        self.aside = collections.OrderedDict()  # name -> Case: sent again, alone, when all else has gone
        self.alone = None               # the Case that is sent alone now
        self.suspects = []              # Cases: their own fault or the target's?
        self.strikes = 0                # how often the line broke
        self.delivered = 0
        self.largest = 0                # bytes of the largest item that went
        self.hopeless = {}              # name -> (its entry of failures.json, whether it counts as due)
        self.restless = []              # names that never settle and are due to be copied
        self.copying = set()            # those under way
        self.any_there = False          # mirror: whether anything was at the target already
        self.counted = False            # whether the scan is over and what is due is known

    def run(self, backing_off):
        """The straight line.  backing_off: items that failed before wait for their own back-off.

        Raises TargetError, Suspended, Interrupted; returns a Result.
        """
        started = time.monotonic()
        self.backing_off = backing_off
        self.prepare()
        if self.worker.unsummed:
            self.worker.unsummed.break_off()        # by what ended the pass before
        with contextlib.ExitStack() as stack:       # whatever happens, nothing goes on behind us
            for duty in (self.leave, self.proving.drain, self.connecting.drain):
                stack.callback(duty)
            self.ask_here()                     # a share need not be scanned for nothing
            due = self.scan_and_settle(backing_off)
            if self.any_there:
                self.ask_stop_files()           # nothing is due, but all the same
            for source in (lambda: self.look_again(due), lambda: self.take_ready()):
                for batch in self.batches(source()):
                    self.send(batch)
                self.drain()
                self.send_again()
            self.send_copies()
            self.judge_suspects()
            if self.open:
                raise TargetError('nobody knows what became of %s' % count_of(len(self.open), 'item'))
            self.tell_of_failing()
            self.quarantine_hopeless()
            self.delete_missing()
            self.tidy()
        self.result.seconds = time.monotonic() - started
        return self.result

    def prepare(self):
        """Make directories that may be made, finish what a crash left."""
        stream = self.stream
        make_incoming(stream)
        if stream.move:
            self.releaser.recover()
            self.releaser.remove_fresh()
            self.releaser.kept.purge(self.worker.age, stream.keep_delivered)
        if os.path.exists(stream.spool):
            import shutil
            shutil.rmtree(stream.spool, ignore_errors=True)

    def leave(self):
        if self.stream.move:
            self.releaser.clean()
        self.failures.save()
        self.worker.spent.tighten(self.stream.root)
        self.worker.spent.save()

    def delete_missing(self):
        """mirror_delete: delete at the target what is gone here, after a whole and healthy look."""
        stream = self.stream
        done = self.result
        if not (stream.mirror and stream.mirror_delete) or \
                done.failed or done.busy or done.waiting or done.settling:
            return                  # what is new may be what is gone, under another name
        here = self.scanner.everything()
        if not here:
            log.once('%s is empty: mirror_delete deletes nothing (is a disk not mounted?)' % (
                show(stream.directory)), stream)
            return
        self.ask_stop_files()
        if stream.send_checksum:
            items = here if stream.items == 'files' else {name for name in here if b'/' not in name}
            here |= {sum_name(stream, name) for name in items}
        gone = self.transport.delete_missing(here)
        if gone:
            self.worker.ledger.append(dict(
                time=utc_stamp(), stream=stream.name, item=to_text(name),
                target=target_of(stream).rstrip('/') + '/' + to_text(name),
                mode='mirror', outcome='deleted') for name in gone)
            log.info('mirror_delete deleted %s at the target: %s%s' % (
                count_of(len(gone), 'name'), ', '.join(show(g) for g in gone[:3]),
                ' and more, see --history' if len(gone) > 3 else ''), stream)

    def tidy(self):
        """After a whole pass nothing that is staged is worth resuming."""
        if self.worker.dirty():
            if not self.connected:
                self.transport.open()
            if self.transport.tidy():
                self.worker.set_dirty(False)

    # -- scan, settle

    def scan_and_settle(self, backing_off):
        """What is due, a list of Due, the first to go last."""
        self.progress.enter('scanning', save=False)
        due, names, size, oldest = self.find_due(backing_off)
        self.worker.tell_of_staying(self.scanner.staying)
        self.follow_orphans()
        self.put_in_order(due)
        if names:
            due = [row for row in due if not self.clash(row, names)]
        self.progress.begin(len(due), size, oldest)
        self.counted = True
        return due

    def find_due(self, backing_off):
        """(Due of each item that has settled and is not at the target, names for clash(), their bytes,
        the oldest mtime_ns).  A file that is opened before it goes needs no second look and is held,
        while they are few: there may be a million."""
        now, wall = time.monotonic(), self.worker.wall()
        settler = self.worker.settler
        settler.begin(directory_clock(self.stream), now)
        due, names, gone = [], set(), set(self.failures.late)
        size, files, key, oldest = 0, 0, ORDER_KEYS[self.stream.order], None
        here = 0
        for item in self.scanner.scan(self.worker.watch):
            here += 1
            if gone:
                gone.difference_update(to_text(name) for name in (
                    item.name, item.ready.path if item.ready else item.name))
            if backing_off and self.failures.must_wait(item.name, wall):
                self.result.waiting += 1
            elif item.fault:
                self.fail(item.name, item.fault)
            elif not settler.settled(item, now) or item.check and \
                    not settler.settled(Item(item.check.path, [item.check]), now):
                self.result.settling.append(item.name)
                if self.copy_is_due(item):
                    self.restless.append(item.name)
                if self.stream.zips:
                    names.add(item.name)
            elif self.up_to_date(item):
                self.any_there = True
                self.failures.forget(item.name)
                self.follow_with_ready(item)
            else:
                size += item.size
                oldest = item.mtime_ns if oldest is None else min(oldest, item.mtime_ns)
                if self.stream.zips:
                    names.add(item.name)
                hold = self.stream.move and not item.is_directory and len(due) < self.HELD
                due.append(Due(key(item), item.name, item.ready, item.is_directory, item if hold else None))
                files += len(item.entries)
                if files >= self.MANY and self.stream.move and not self.stream.zips:
                    self.approach()     # while the rest is looked at; they will not all be in use
        for name in gone:
            self.failures.forget(name)
        self.worker.forget_mirrored(here)
        return due, names, size, oldest

    def put_in_order(self, due):
        """By `order`, then by name; what failed before goes last; the first to go is the last row."""
        due.sort(key=lambda row: row.name, reverse=True)
        due.sort(key=lambda row: row.key, reverse=True)
        if self.failures.late:
            due.sort(key=lambda row: to_text(row.name) not in self.failures.late)

    # -- settle_max

    def copy_is_due(self, item):
        """A file that did not rest for settle_max is copied, and again when that time is over."""
        limit, entry = self.stream.settle_max, self.worker.waits.names.get(to_text(item.name))
        if limit is None or item.is_directory or not entry:
            return False
        since = max(entry['since'], self.transport.own_copies.get(item.name, ('', 0))[1])
        return self.worker.age(since) >= limit

    def send_copies(self):
        """Send what was read of such files under one descriptor while it did not change."""
        busy = filter(None, map(self.scanner.look, self.result.busy))
        for name in self.restless + [item.name for item in busy if self.copy_is_due(item)]:
            parcel = self.take_copy(name)
            if parcel:
                self.copying.add(name)
                self.send(Batch(to_bytes(self.stream.spool), self.dated(parcel.item), [parcel]))
        if self.copying:
            self.drain()
            self.send_again()

    TRIES = 5                   # to read a file while nobody changes it

    def take_copy(self, name):
        """A Parcel with a consistent copy in the spool, or None."""
        path = os.path.join(to_bytes(self.stream.spool), name)
        make_private_directory(os.path.dirname(path))
        for _ in range(self.TRIES):
            item = self.scanner.look(name)
            if item is None or item.is_directory or item.fault:
                return None
            entry = item.entries[0]
            refusal = self.transport.refusal([entry])
            if refusal:
                self.fail(name, refusal)
                return None
            try:
                with open(path, 'wb') as copy:
                    copy_entry(self.stream.root, entry, copy.write, self.stop)
                os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns))
                return Parcel(item, [Entry.of(name, os.lstat(path))._replace(mode=entry.mode)])
            except Changed as error:
                log.debug(error, self.stream)
            except ItemError as error:
                self.fail(name, error)
                return None
        return None

    def note_copy(self, parcel, outcome):
        """It is never released; what is known of the copy lets a later one replace it."""
        name, digest = parcel.item.name, (outcome.checksum or '').partition(':')[2]
        self.transport.own_copies[name] = digest, self.worker.wall()
        self.failures.forget(name)
        self.result.copied += 1
        log.info('copied %s, which never rests; it stays' % show(name), self.stream)
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(to_bytes(self.stream.spool), name))

    def up_to_date(self, item):
        """Mirror: nothing is to be done for it, as a look at the target tells."""
        return self.stream.mirror and not self.lacks_sum(item) and \
            self.transport.up_to_date(item, self.dated(item), self.worker.watch)

    def lacks_sum(self, item):
        """Mirror: whether its checksum file may be missing although the item itself is there."""
        return self.worker.unsummed is not None and item.name in self.worker.unsummed.names

    def clash(self, row, names):
        """A directory `a` beside a file `a.zip`: both would be a.zip at the target."""
        name = row.name
        other = name + b'.zip' if row.is_directory else name[:-4] if name.endswith(b'.zip') else None
        if other not in names:
            return False
        self.fail(name, ItemError('%s and %s would have one name at the target' % (
            show(name), show(other)), 'rename one of them'))
        return True

    def follow_orphans(self):
        """Ready files follow their item: of one that did its work and is still here, a crash came
        between the two.  Any other waits for its item to come."""
        self.result.unready = self.scanner.unready
        dropped = set() if self.stream.ready_file_send else set(self.scanner.orphans)
        spent = self.worker.spent
        waiting = [(entry, spent.record(entry)) for entry in
                   (self.scanner.lonely + self.scanner.orphans if self.stream.move else ())]
        spent.loosen(known for _, known in waiting if known)
        for entry, known in waiting:
            if known is None:
                continue
            self.ask_stop_files()
            if entry in dropped:
                self.drop_ready(entry)
            else:
                self.follow(entry, known['mtime_ns'])

    def follow(self, entry, mtime_ns):
        """A ready or check file goes after its item, to the same place by date."""
        self.followers.append(entry)
        self.dates[entry.path] = mtime_ns

    def look_again(self, due):
        """Yield the items of such rows, if they still are what they were."""
        now = time.monotonic()
        while due:
            row = due.pop()
            name, item = row.name, row.item
            if item is None:
                item = self.scanner.look(name)
                if item is None:
                    continue
                item.ready = row.ready
                item.check = self.scanner.checks and self.scanner.checks.of(name)
                if item.fault:
                    self.fail(name, item.fault)
                    continue
                if not self.worker.settler.settled(item, now):
                    self.result.busy.append(name)
                    continue
            if self.usable(item):
                yield item

    def usable(self, item):
        """Readable, nobody writes, the protocol can carry it."""
        if self.stream.mirror and self.worker.mirrored.get(item.name) == item.fingerprint:
            return True
        try:
            refusal = self.transport.refusal(item.entries[:1] if self.stream.zips else item.entries)
            if refusal:
                raise refusal
            if not self.transport.sees_writers or self.stream.zips and item.is_directory:
                check_unused(self.stream, item, self.releaser.leases)
            self.check_sums(item)
            return True
        except Changed as error:
            log.debug(error, self.stream)
            self.result.busy.append(item.name)
        except ItemError as error:
            self.fail(item.name, error)
        return False

    def check_sums(self, item):
        """Raises Mismatch, ItemError, Changed."""
        if self.scanner.checks:
            if item.check is None:
                raise Changed('the check file of %s is gone' % show(item.name))
            self.scanner.checks.check(item, self.stop, lambda: self.went_before(item))
        if self.stream.send_checksum:
            name = sum_name(self.stream, item.name + b'.zip' if self.stream.zips and item.is_directory
                            else item.name)
            if os.path.lexists(os.path.join(self.stream.root, name)):
                raise Unfit('%s and the checksum file that send_checksum makes of %s have one name' % (
                    show(name), show(item.name)), 'rename one of them, or choose another name')

    def went_before(self, item):
        """Whether the item was delivered after its check file was made: then a part of it may have been
        released before a crash."""
        made = item.check.ctime_ns / 1e9
        return any(r['item'] == to_text(item.name) and epoch(r['time']) >= made
                   for r in self.worker.ledger.read(stream=self.stream.name, since=made) if r.get('time'))

    def take_ready(self):
        """What follows its item: check files, ready files, markers; the last ones last."""
        items = [Item(entry.path, [entry]) for entry in self.followers] + self.shared_checks() + self.lasts
        items = [item for item in items if not self.up_to_date(item)]
        self.progress.more(items)
        yield from items

    def shared_checks(self):
        """Check files that name several items go when none of these is here any more."""
        done = []
        for entry in self.scanner.shared:
            try:
                if self.stream.mirror or self.scanner.checks.waiting(entry) is None:
                    self.report_absent(entry)
                    done.append(Item(entry.path, [entry]))
            except (ItemError, Changed) as error:
                log.once(error, self.stream)
        return done

    def report_absent(self, entry):
        """A shared check file goes, and names what never came.  Raises as CheckFiles.sums()."""
        never = self.worker.ledger.never_went(
            self.scanner.checks.sums(entry), self.stream.name) if self.stream.move else ()
        if never:
            log.warning('%s names %s%s, which never came' % (
                show(entry.path), show(never[0]),
                ' and %d more' % (len(never) - 1) if len(never) > 1 else ''), self.stream)

    # -- batch

    def batches(self, items):
        """Group items that go from one place to one place; names that a target might take
        for one name never travel together in a move."""
        pending = collections.OrderedDict()     # (root, subdir) -> Batch
        names, before = set(), set()
        files = size = 0
        for item in items:
            parcel = self.parcel(item)
            if parcel is None:
                continue
            name = folded(parcel.entries[0].path)
            count = max(1, sum(e.kind == 'f' for e in parcel.entries)) if len(parcel.entries) > 1 else 1
            full = files and (files + count > self.stream.batch_files or
                              size + item.size > self.stream.batch_size)
            if full or name in names and self.stream.move:
                yield from pending.values()
                self.remember(names)
                before, names = names, set()
                pending.clear()
                files = size = 0
            if name in before:
                self.drain()            # the other one is there when this one comes
            names.add(name)
            files, size = files + count, size + item.size
            if not (self.connected or self.stream.zips):    # a zip may take longer than an idle line is kept
                self.approach()
            root = self.stream.root if parcel.entries is item.entries else to_bytes(self.stream.spool)
            key = root, self.dated(item)
            if key not in pending:
                pending[key] = Batch(root, key[1], [], seen=self.seen_before())
            pending[key].parcels.append(parcel)
        yield from pending.values()

    def remember(self, names):
        """Only an overwriting move asks: its sources are gone when a twin comes."""
        if self.stream.move and self.stream.on_conflict == 'overwrite':
            for name in names:
                self.seen.setdefault(hash(name), len(self.seen))

    def seen_before(self):
        """For a batch that begins now: it may be published when its own names are remembered, too."""
        count = len(self.seen)
        return lambda name: self.seen.get(hash(name), count) < count

    def dated(self, item):
        if not self.stream.target_dates:
            return b''
        ns = self.dates.get(item.name, item.mtime_ns)
        return to_bytes(time.strftime(self.stream.target_dates,
                                      time.localtime(min(max(0, ns // 10 ** 9), LAST_SECOND))))

    def parcel(self, item):
        """The item itself, or the zip of a directory where the protocol wants one; None if there is
        nothing to send."""
        if not (self.stream.zips and item.is_directory):
            return Parcel(item, item.entries)
        if self.worker.delivered_trees().get(to_text(item.name)) == item.snapshot:
            self.finish_release(item)
            return None
        limit = self.stream.dir_size_limit
        if limit is not None and item.size > limit:
            self.fail(item.name, Unfit('%s holds %s, more than dir_size_limit' % (
                show(item.name), format_size(item.size)), 'raise the limit or move it by hand'))
            return None
        return self.zipped(item)

    def finish_release(self, item):
        """The ledger says that this very tree was delivered before a crash."""
        log.info('%s was delivered before; its release is finished' % show(item.name), self.stream)
        self.drain()                # one release at a time
        self.ask_stop_files()
        try:
            reasons = self.releaser.release_tree(item, self.scanner)
        except ItemError as error:
            self.fail(item.name, error)
            return
        self.progress.fewer([item])
        for reason in reasons:
            log.info(reason, self.stream)
        if not reasons:
            self.follow_with_ready(item)

    def zipped(self, item):
        """The zip of a directory as a Parcel, or None if none could be made.  It is made anew at each
        try, for the tree may have changed."""
        name = item.name + b'.zip'
        path = os.path.join(to_bytes(self.stream.spool), name)
        make_private_directory(self.stream.spool)
        try:
            zip_item(self.stream.root, item, path, self.stop)
            return Parcel(item, [Entry.of(name, os.lstat(path))])
        except NoRoom as error:
            self.hold_back(item.name, error)    # the others can still go
        except Changed as error:
            log.info('%s while it was zipped' % error, self.stream)
            self.result.busy.append(item.name)
        except OSError as error:
            self.fail(item.name, ItemError('%s cannot be zipped: %s' % (show(item.name), error.strerror)))
        except ItemError as error:
            self.fail(item.name, error)
        with contextlib.suppress(OSError):
            os.unlink(path)         # half a zip takes the room of a whole one
        return None

    # -- stop files

    def ask_here(self):
        """Raises Suspended, or StateError if it cannot be known."""
        stream = self.stream
        if self.worker.lock.misplaced():
            raise Suspended('%s was replaced; the new one is locked first' % show(stream.directory))
        if not in_window(stream.transfer_window, time.localtime(self.worker.wall())):
            raise Suspended('outside of transfer_window')
        with own_files('cannot ask for %s' % stream.stop_file):
            if stop_file_here(stream):
                raise Suspended('%s in %s' % (stream.stop_file, show(stream.directory)))

    def approach(self):
        """There is something to send: connect and ask while more of it is looked at."""
        if not self.connected:
            self.connected = True
            self.ask_here()
            self.connecting.put(None)

    def connect(self, _):
        self.progress.enter('connecting')
        self.transport.open()
        self.ask_there()

    def ask_there(self):
        """Raises Suspended, or TargetError if it cannot be known."""
        stream = self.stream
        if time.monotonic() - self.worker.asked < STOP_FILE_AGE and not self.transport.asks_at_once:
            return
        names = {to_bytes(stream.stop_file), to_bytes(stream.target_marker or stream.stop_file)}
        found = self.worker.ask_for_marker(names)
        if to_bytes(stream.stop_file) in found:
            raise Suspended('%s in %s' % (stream.stop_file, target_of(stream, False)))
        if stream.target_marker and to_bytes(stream.target_marker) not in found:
            raise self.transport.unmarked()
        self.worker.asked = time.monotonic()

    def ask_stop_files(self):
        """Raises Suspended, or TargetError if it cannot be known."""
        self.stop.rest()
        self.approach()
        self.ask_here()
        self.connecting.drain()
        self.ask_there()

    def begin_transfer(self):
        """From here on a crash may leave temporary files at the target."""
        if self.transport.stages and not self.worker.dirty():
            self.worker.set_dirty(True)
        self.progress.enter('transferring')

    def send(self, batch):
        """Send a batch.  Where the line breaks, what is left of it goes to self.again.  Raises
        Suspended, Interrupted, TargetError when the target does not work any more."""
        self.ask_stop_files()
        self.begin_transfer()
        self.open.update((parcel.item.name, ((batch.root, batch.subdir), parcel))
                         for parcel in batch.parcels)
        if self.worker.unsummed:
            self.worker.unsummed.begin({parcel.item.name for parcel in batch.parcels})
        try:
            self.transport.send(batch, self.hand_on)
            if self.stream.send_checksum:
                self.proving.drain()
                self.send_sums()
        except TargetError as error:
            self.strike(error)

    def send_sums(self):
        """Publish and prove the checksum files of what was published, then record and release that."""
        answered, self.answered = self.answered, []
        for batch, pairs in answered:
            sums, faults = self.make_sums(batch, pairs)
            faults.update(self.publish_sums(batch, sums))
            self.releasing.put((batch, [
                (parcel, outcome._replace(error=outcome.error or faults.get(number)))
                for number, (parcel, outcome) in enumerate(pairs)]))

    def publish_sums(self, about, sums):
        """{number: error or None} for checksum files {number: Parcel} of a Batch."""
        parts, errors = [], {}
        if sums:
            place = to_bytes(self.stream.spool), about.subdir
            self.transport.send(self.batch_of(place, list(sums.values()), about),
                                lambda part, more, wait=True: parts.append(part) or True)
        for part in parts:
            answers = self.transport.finish(part)
            errors.update((parcel.item.name, outcome.error)
                          for parcel, outcome in zip(part.parcels, answers))
        return {number: errors[parcel.item.name] for number, parcel in sums.items()}

    def make_sums(self, batch, pairs):
        """({number of a pair: the Parcel of its checksum file, in the spool}, {number: its fault})."""
        sums, faults = {}, {}
        own = {entry.path for entry in self.followers + self.scanner.shared}
        for number, (parcel, outcome) in enumerate(pairs):
            sent = outcome.sent or self.lacks_sum(parcel.item)
            if outcome.error or not sent or parcel.item.name in own or \
                    any(parcel.item is item for item in self.lasts):
                continue
            try:
                sums[number] = self.make_sum(batch, parcel, outcome)
            except (Changed, ItemError) as error:
                faults[number] = error
        return sums, faults

    def make_sum(self, batch, parcel, outcome):
        content = sum_file(self.stream, batch, parcel, outcome, self.stop)
        target = outcome.target if outcome.target is not None else parcel.item.name
        name = sum_name(self.stream, os.path.join(
            os.path.dirname(parcel.item.name), os.path.basename(target)))
        path = os.path.join(to_bytes(self.stream.spool), name)
        if parcel.item.name in self.copying:        # the next one replaces it with its file
            import hashlib
            self.transport.own_copies[name] = hashlib.sha256(content).hexdigest(), self.worker.wall()
        with own_files('cannot write %s' % show(path), 'see state_dir'):
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            with open(path, 'wb') as handle:
                handle.write(content)
            entry = Entry.of(name, os.lstat(path))
        return Parcel(Item(name, [entry]), [entry])

    def drain(self):
        """Wait until nothing is under way.  Raises as send()."""
        try:
            self.proving.drain()
        except TargetError as error:
            self.strike(error)

    def send_again(self):
        """What was left when the line broke; then, each alone, what it broke at."""
        while self.again or self.aside:
            if self.again:
                self.send(self.again.popleft())
            else:
                _, self.alone = self.aside.popitem(last=False)
                self.send(self.batch_of(self.alone.place, [self.alone.parcel]))
            self.drain()
            self.alone = None

    def strike(self, error):
        """The line broke in the middle of a batch.  If the target works again at once, the item
        under way is set aside and all else is sent again; else raises the error."""
        self.settle_what_went()
        if self.worker.unsummed:
            self.worker.unsummed.break_off()
        self.strikes += 1
        left, self.open = self.open, collections.OrderedDict()
        if error.scope == 'machine' or not left or self.strikes > self.MOST_STRIKES:
            raise error
        log.debug(error, self.stream)
        self.transport.close()
        self.worker.asked = -STOP_FILE_AGE
        self.transport.open()
        self.ask_there()
        if self.probed():
            raise error
        name = self.under_way(left, error)
        if name is not None:
            place, parcel = left.pop(name)
            self.set_aside(place, parcel, error)
        self.again.extend(self.halves(left, 1 if name is not None else 2))

    def settle_what_went(self):
        """Wait for what is under way, whatever becomes of it: it is sent again."""
        for _ in range(3):              # each of the two pipelines, and what one gave the other
            try:
                self.proving.drain()
                return
            except StateError:
                raise
            except TargetError as error:
                log.debug(error, self.stream)

    @staticmethod
    def under_way(left, error):
        """The name of the item at which the line broke, or None if nobody knows."""
        if len(left) == 1:
            return next(iter(left))
        return next((name for name, (_, parcel) in left.items() if error.path is not None and
                     any(entry.path == error.path for entry in parcel.entries)), None)

    def batch_of(self, place, parcels, about=None):
        return Batch(place[0], place[1], parcels, seen=self.seen_before(), about=about)

    def halves(self, left, count):
        """Batches of what is left, in at least `count` pieces: the culprit is in one of them."""
        places = collections.OrderedDict()
        for place, parcel in left.values():
            places.setdefault(place, []).append(parcel)
        for place, parcels in places.items():
            size = -(-len(parcels) // count)
            for chunk in in_chunks(parcels, size):
                yield self.batch_of(place, chunk)

    def set_aside(self, place, parcel, error):
        """The item at which the line broke is sent once more, alone; then it is judged."""
        case = self.alone or Case(place, parcel, error)
        case.error, case.strikes = error, case.strikes + 1
        arrived = self.transport.arrived(parcel.entries) if len(parcel.entries) == 1 else None
        case.advanced = None not in (case.arrived, arrived) and arrived > case.arrived
        case.arrived = arrived
        self.failures.late.add(to_text(parcel.item.name))
        if case.strikes == 1:
            self.aside[parcel.item.name] = case
        else:
            self.suspects.append(case)

    def hand_on(self, part, more, wait=True):
        """A part has gone; a stop file that came meanwhile holds back the rest of its batch."""
        if not wait and self.proving.busy():
            return False
        self.proving.put(part)
        if not self.transport.overlaps:
            self.proving.drain()
        if more:
            self.ask_meanwhile()
        return True

    def ask_meanwhile(self):
        """Ask for stop files while a push is under way; a target that takes one of ours at a time
        answers when that has ended."""
        try:
            self.ask_stop_files()
        except TargetError as error:
            if self.transport.overlaps or error.scope == 'machine':
                raise

    # -- verify, publish, record, release

    def prove(self, batch):
        answers = self.transport.finish(batch)
        pairs = list(zip(batch.parcels, answers))
        if self.stream.send_checksum:
            self.answered.append((batch, pairs))
        else:
            self.releasing.put((batch, pairs))

    def record_and_release(self, proven):
        batch, outcomes = proven
        try:
            self.settle_outcomes(batch, outcomes)
        finally:                        # of what stays nobody is kept from writing it
            for links in {id(outcome.linked): outcome.linked for _, outcome in outcomes}.values():
                for link in links.values():
                    link.give_up()

    def settle_outcomes(self, batch, outcomes):
        good = [pair for pair in outcomes if pair[1].error is None]
        if self.worker.unsummed:
            done = {parcel.item.name for parcel, _ in good}
            self.worker.unsummed.end(done, {parcel.item.name for parcel, _ in outcomes} - done)
        self.record(good)
        for parcel, outcome in good:
            if parcel.item.name in self.copying:
                self.note_copy(parcel, outcome)
        good = [pair for pair in good if pair[0].item.name not in self.copying]
        self.spend_ready(good)
        released = sum(self.release(batch, parcel, outcome) for parcel, outcome in good)
        self.releaser.forget_directory()
        sent = [pair for pair in good if pair[1].sent]
        size = sum(parcel.item.size for parcel, _ in sent)
        self.progress.fewer([parcel.item for parcel, outcome in good if not outcome.sent])
        self.progress.delivered(len(sent), size)
        if sent:
            word = 'mirrored' if self.stream.mirror else 'moved' if released else 'delivered'
            log.info('%s %s, %s' % (word, self.names_of(sent), format_size(size)), self.stream)
        self.delivered += len(good)
        self.note_largest(max([parcel.item.size for parcel, _ in good] or [0]))
        self.after_delivery(sent)
        for parcel, _ in outcomes:
            self.open.pop(parcel.item.name, None)
        self.judge(batch, [pair for pair in outcomes if pair[1].error is not None])

    def note_largest(self, size):
        self.largest = max(self.largest, size)
        for case in self.suspects:
            case.larger = case.larger or size >= case.parcel.item.size > 0

    def after_delivery(self, sent):
        """Tell the hook; whatever it does, the items are delivered."""
        stream = self.stream
        if not sent or not stream.after_delivery:
            return
        feed = b''.join(parcel.item.label + b'\0' for parcel, _ in sent) \
            if stream.after_delivery_format == 'nul' else \
            b''.join(to_json(line) + b'\n' for line in self.lines(sent, 'delivered'))
        try:
            done = run(stream.after_delivery, self.stop, stream.stall_timeout, feed)
            trouble = 'ended with %d: %s' % (done.code, done.errors or SILENT) if done.code else None
        except TargetError as error:
            trouble = str(error)
        if trouble:
            log.error('after_delivery: %s' % trouble, stream)
            self.worker.state.alerts.tell('warning', '%s: after_delivery: %s' % (stream.name, trouble))

    def names_of(self, pairs):
        names = [show(parcel.item.label) for parcel, _ in pairs[:3]]
        return ', '.join(names) + (' and %d more' % (len(pairs) - 3) if len(pairs) > 3 else '')

    def record(self, good):
        """One ledger line an item, on disk before anything is released."""
        sent = [pair for pair in good if pair[1].sent]
        copies = [pair for pair in sent if pair[0].item.name in self.copying]
        self.worker.ledger.append(self.lines([pair for pair in sent if pair not in copies], 'delivered'))
        self.worker.ledger.append(self.lines(copies, 'copied'))
        if self.stream.mirror:
            self.worker.taken.add([entry for _, outcome in sent for entry in outcome.taken])
        for parcel, _ in good if log.detailed else ():
            log.debug('delivered %s' % show(parcel.item.label), self.stream)

    def lines(self, pairs, word):
        stream, now = self.stream, utc_stamp()
        seconds = round(time.monotonic() - self.progress.started, 3)
        top = target_of(stream, False).rstrip('/') + '/'
        for (item, entries), outcome in pairs:
            there = outcome.target if outcome.target is not None else \
                os.path.join(self.dated(item), item.label)
            yield dict(
                time=now, stream=stream.name, item=to_text(item.label), size=item.size, files=len(item.files),
                protocol=stream.transfer_protocol, target=top + to_text(there),
                mode=stream.transfer_mode, verify=stream.verify, proof=outcome.proof,
                checksum=outcome.checksum,
                snapshot=None if entries is item.entries else item.snapshot, seconds=seconds,
                attempt=self.failures.items.get(to_text(item.name), {}).get('count', 0) + 1,
                outcome='taken' if outcome.taken and word == 'delivered' else word)

    def spend_ready(self, good):
        """From here on their ready files say nothing of what may come under these names."""
        for parcel, _ in good if self.stream.move else ():
            shared = self.scanner.checks and self.scanner.checks.shared
            for ready in (parcel.item.ready, None if shared else parcel.item.check):
                if ready:
                    self.worker.spent.add(parcel.item, ready)
        self.worker.spent.save(durable=True)

    def release(self, batch, parcel, outcome):
        """Delete the source; 1 if all of it went (or, mirroring, was sent)."""
        item = parcel.item
        reasons = []
        try:
            if self.stream.mirror:
                self.worker.mirrored[item.name] = item.fingerprint
            elif parcel.entries is item.entries:
                reasons = self.releaser.release(item, outcome.linked)
            else:
                reasons = self.release_zipped(batch, parcel)
        except NoRoom as error:             # the next ones that go make room
            self.hold_back(item.name, error)
            return 0
        except ItemError as error:
            self.fail(item.name, error)
            return 0
        self.failures.forget(item.name)
        if reasons:
            links = [outcome.linked[e.path] for e in item.files if e.path in outcome.linked]
            word = 'withdrawn' if any(link.taken_back for link in links) else 'kept'
            self.result.withheld += 1
            log.info('; '.join(reasons[:3]), self.stream)
            self.worker.ledger.append(self.lines([(parcel, outcome)], word))
            return 0
        self.worker.spent.forget(item.name)
        if self.stream.move or outcome.sent:
            self.result.items += 1
            self.result.bytes += item.size
        self.follow_with_ready(item)
        return int(self.stream.move or outcome.sent)

    def release_zipped(self, batch, parcel):
        try:
            with own_files('cannot write the release journal'):
                return self.releaser.release_tree(parcel.item, self.scanner)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(batch.root, parcel.entries[0].path))

    def follow_with_ready(self, item):
        """Also where the item was there already: a crash may have come between the two."""
        if item.check and not (self.scanner.checks.inside or self.scanner.checks.shared):
            self.follow(item.check, item.mtime_ns)
        if item.last and not self.stream.zips:
            there = [e for e in item.entries if e.kind == 'd' and     # what the release has left
                     os.path.lexists(os.path.join(self.stream.root, e.path))]
            self.lasts.append(Marker(item.name, there + [item.last]))
            self.dates[item.name] = item.mtime_ns
        if item.ready and self.stream.ready_file_send:
            self.follow(item.ready, item.mtime_ns)
        elif item.ready and self.stream.move:
            self.drop_ready(item.ready)

    def drop_ready(self, entry):
        try:
            if self.releaser.release(Item(entry.path, [entry]), {}):
                self.result.busy.append(entry.path)
            else:
                self.worker.spent.forget(entry.path)
        except ItemError as error:
            self.fail(entry.path, error)

    # -- when something failed

    def judge(self, batch, bad):
        """Sort failures by what happens next; raises the target's.  Whether it was the items'
        own fault is asked when the connection is free."""
        trouble = None
        for parcel, outcome in bad:
            error, name = outcome.error, parcel.item.name
            if isinstance(error, Changed) or self.has_changed(parcel.item):
                log.debug(error, self.stream)
                self.result.busy.append(name)
            elif not isinstance(error, ItemError):
                trouble = trouble or error
                self.open[name] = (batch.root, batch.subdir), parcel
            else:
                self.suspect((batch.root, batch.subdir), parcel, error)
        if trouble:
            raise trouble

    def suspect(self, place, parcel, error):
        """An item seems to be at fault: the first ones are sent once more, alone."""
        if isinstance(error, IntegrityError):
            self.worker.state.alerts.tell('error', '%s: %s' % (self.stream.name, error))
        case = Case(place, parcel, error)
        known = isinstance(error, (Unfit, NoRoom)) or self.alone or len(self.aside) > MOST_ALIKE
        if known:
            self.suspects.append(case)
        else:
            self.aside[parcel.item.name] = case

    def judge_suspects(self):
        """Only a fault of the item itself counts against the item.  Raises TargetError."""
        if not self.suspects:
            return
        trouble = None if self.delivered else self.probed()
        for case in self.suspects:
            self.ask_for_room(case)
        alike = collections.Counter(type(case.error) for case in self.suspects)
        down = None
        for case in self.suspects:
            name, error = case.parcel.item.name, case.error
            # what was counted before was compared with others then: they may all have gone
            known = to_text(name) in self.failures.items
            step = next_step(error, trouble is None, Evidence(
                case.strikes, case.advanced, case.room and case.larger,
                known or 2 * self.largest >= case.parcel.item.size, known or self.delivered > 0,
                alike[type(error)]))
            if step == 'count':
                self.fail(name, error)
            elif step == 'wait':
                self.hold_back(name, error)
            else:
                down = down or error
        if isinstance(down, ItemError):
            down = TargetError(down.message, str(trouble or down.hint))
        if down:
            raise trouble if isinstance(trouble, TargetError) else down

    def ask_for_room(self, case):
        """Where the target says that it has less free space than the item needs, that is why."""
        error, size = case.error, case.parcel.item.size
        if error.scope != 'item' or isinstance(error, Unfit):
            return
        free = self.transport.free_space()
        case.room = free is None or free >= size
        if not isinstance(error, NoRoom) and not case.room:
            case.error = NoRoom('%s: %s has %s left, too little' % (
                show(case.parcel.item.name), target_of(self.stream), format_size(free)), 'make room there')

    def probed(self):
        """What keeps a tiny file of ours from being delivered by the usual verbs, or None."""
        try:
            self.worker.probe()
        except (ItemError, TargetError) as error:
            return error
        return None

    def hold_back(self, name, error):
        """It failed, but nobody knows by whose fault: it is tried again later, and not counted."""
        self.result.failed += 1
        self.progress.failed(str(error))
        tries = self.failures.hold_back(name, self.worker.wall())
        if tries == 1:
            log.error(self.about(name, error), self.stream)

    @staticmethod
    def about(name, error):
        """The error with the item's name, which nobody knew yet where the line broke."""
        return '%s: %s' % (show(to_bytes(name)), error) if isinstance(error, TargetError) else error

    def has_changed(self, item):
        now = self.scanner.look(item.name)
        if now and any(item is last for last in self.lasts):
            return now.last is None or essence([now.last]) != essence(item.entries)
        return now is None or essence(now.entries) != essence(item.entries)

    def fail(self, name, error):
        """Count a fault of the item itself; quarantine it when it is hopeless."""
        self.result.failed += 1
        self.progress.failed(str(error))
        if not self.failures.is_known(name, error) or self.backing_off:     # --once tries the target again
            self.count(name, error)
        if self.stream.move and self.failures.hopeless(name, self.worker.age):
            self.hopeless[name] = self.failures.items[to_text(name)], self.counted

    def count(self, name, error):
        entry = self.failures.count(name, error, self.worker.wall())
        message = '%s: %s' % (self.stream.name, self.about(name, error))
        log.error(message if entry['count'] == 1 else '%s; failed %d times' % (message, entry['count']))
        if entry['count'] == 1 and isinstance(error, Mismatch):
            self.worker.state.alerts.tell('error', 'Stream %s does not send %s: %s.' % (
                self.stream.name, show(to_bytes(name)), error))

    def tell_of_failing(self):
        """An item that fails for an hour makes one alert, long before it is quarantined."""
        new = self.failures.to_tell(self.worker.age)
        if new:
            name, entry = new[0]
            self.worker.state.alerts.tell('warning', (
                'Stream %s cannot deliver %s, for more than an hour now: %s%s.  The others go on.' % (
                    self.stream.name, show(to_bytes(name)), entry['error'],
                    '; and %s like it' % count_of(len(new) - 1, 'more item') if len(new) > 1 else '')))

    def quarantine_hopeless(self):
        """At the end of a pass that nobody suspended."""
        if self.hopeless:
            self.ask_stop_files()
        for name, (entry, due) in self.hopeless.items():
            self.quarantine(name, entry, self.scanner.look(name) if due else None)

    def quarantine(self, name, entry, due):
        """Move an item that can never be sent out of the way, with the reason beside it.  due: the Item,
        if it counts as due."""
        target = os.path.join(to_bytes(self.stream.quarantine_dir), name)
        head, base = os.path.split(target)
        reason = os.path.join(head, base[:200] + b'.reason')        # no name may be too long
        if os.path.lexists(target) or os.path.lexists(reason):
            target = os.path.join(head, stamped(base[:200]))
            reason = target + b'.reason'
        text = '%s\nfailed %s since %s\nlast: %s\n' % (
            show(name), count_of(entry['count'], 'time'), utc_stamp(entry['first']), entry['error'])
        try:
            os.makedirs(head, 0o700, exist_ok=True)
            atomic_write(os.fsdecode(reason), text.encode('utf-8', 'backslashreplace'))
            try:
                os.rename(os.path.join(self.stream.root, name), target)
            except OSError:
                os.unlink(reason)
                raise
        except OSError as error:
            log.error('cannot quarantine %s: %s' % (show(name), error.strerror), self.stream)
            return
        self.quarantine_check(name, head)
        self.failures.forget(name)
        self.result.quarantined += 1
        if due:
            self.progress.fewer([due])
        log.error('quarantined %s in %s' % (show(name), show(self.stream.quarantine_dir)), self.stream)
        self.worker.state.alerts.tell('warning', (
            'Stream %s gave up and quarantined %s in %s: %s.  To have it tried again, fix that and move it '
            'back.' % (self.stream.name, show(name), show(self.stream.quarantine_dir), entry['error'])))


    def quarantine_check(self, name, directory):
        """The check file beside an item goes where the item went."""
        checks = self.scanner.checks
        if not checks or checks.inside or checks.shared or not checks.of(name):
            return
        path = checks.path_of(name)
        target = os.path.join(directory, os.path.basename(path))
        try:
            os.rename(os.path.join(self.stream.root, path),
                      stamped(target) if os.path.lexists(target) else target)
        except OSError as error:
            log.error('cannot quarantine %s: %s' % (show(path), error.strerror), self.stream)


# ----------------------------------------------------------------------------------------
# 16  disk space
# ----------------------------------------------------------------------------------------

class DiskMonitor:
    """Watches the free space at the incoming directories (local file systems).

    Below level_low a stop file tells those who deliver into a directory to wait; above
    level_good the monitor's own stop files go.  Below level_vlow copies of what was delivered
    are deleted, oldest first, where the stream allows it; nothing undelivered ever is.
    """

    def __init__(self, alerts):
        self.alerts = alerts

    def poll(self, config):
        levels = config.monitor
        for stream in config.streams:
            if not os.path.isdir(stream.root):
                continue            # its worker says so
            try:
                if levels.level_low:
                    self.look(stream, levels)
                else:
                    self.let_go(stream)     # the monitor may have been switched off meanwhile
            except OSError as error:
                message = '%s: disk space: %s' % (stream.name, error.strerror)
                log.once(message)
                self.alerts.turn('monitor:' + stream.name, True, 'error', message)
            else:
                self.alerts.turn('monitor:' + stream.name, False, 'info',
                                 '%s: disk space: looked at again' % stream.name)

    @staticmethod
    def let_go(stream):
        path = os.path.join(stream.root, to_bytes(stream.stop_file))
        if os.path.lexists(path) and is_monitors(path):
            os.unlink(path)
            log.info('%s of the disk space monitor removed' % show(path), stream)

    def look(self, stream, levels):
        import shutil

        def below(level):
            usage = shutil.disk_usage(stream.directory)
            return usage.free < level(usage.total)
        if shutil_free(stream.directory) is None:
            return                      # no conclusion from it
        path = os.path.join(stream.root, to_bytes(stream.stop_file))
        key = 'disk:' + stream.name
        if below(levels.level_low):
            self.alerts.turn(key, True, 'warning', '%s: the disk of %s is low: %s free' % (
                stream.name, show(stream.directory), format_size(shutil_free(stream.directory))))
        elif not below(levels.level_good):
            self.let_go(stream)
            self.alerts.turn(key, False, 'info', '%s: the disk of %s has room again' % (
                stream.name, show(stream.directory)))
        very_low = below(levels.level_vlow)
        self.alerts.turn(key + ':very', very_low, 'error' if very_low else 'info',
                         '%s: the disk of %s is %s' % (stream.name, show(stream.directory),
                                                       'nearly full' if very_low else 'low no more'))
        kept = Kept(stream)
        for end, hour in kept.hours() if very_low and stream.deletion_enabled else ():
            if below(levels.level_low) and end <= time.time():
                kept.remove(hour)
        if below(levels.level_low) and stream.priority <= levels.base_priority:
            self.hold(stream, path)         # last: a full disk may have no room for it

    @staticmethod
    def hold(stream, path):
        """A stop file for senders, never half written; one that is there stays whose it is."""
        if os.path.lexists(path):
            return
        temp = os.path.join(stream.root, OWN_PREFIX + b'-monitor')
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temp)         # a crash left it
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.write(fd, MONITOR_LINE)
            os.fsync(fd)
            try:
                os.link(temp, path)
            except FileExistsError:
                return
            except OSError:                 # no hard links here
                if not os.path.lexists(path):
                    os.rename(temp, path)
        finally:
            os.close(fd)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temp)
        log.warning('the disk is low; %s stops those who deliver into it' % show(path), stream)


# ----------------------------------------------------------------------------------------
# 17  status for people and machines
# ----------------------------------------------------------------------------------------

def started_at():
    """The epoch seconds at which this machine started, 0 where nobody can tell (proc(5), uptime)."""
    with contextlib.suppress(OSError, ValueError), open('/proc/uptime') as handle:
        return time.time() - float(handle.read().split()[0])
    return 0


def died(entry):
    """Whether status.json says that a process works on a stream which is gone.  A number that
    another process has since the machine was started again says nothing."""
    state = STATES.get(entry.get('state'))
    if state is None or (state.ends_daemon if entry.get('daemon') else state.ends_once):
        return False
    return not alive(entry.get('pid')) or epoch(entry['updated']) < started_at()


def in_trouble(row):
    """Whether somebody should look after a stream: its target, its process, or items that fail."""
    return mood(row['state']) == 'bad' or bool(row.get('last_error'))


def known_failures(config):
    """failures.json: {stream: {item: its failures}}."""
    return SharedJson(config.settings.state_dir, 'failures.json').read()


def stream_rows(config, streams, failures=None):
    """What is known of each stream, as dicts: status.json, made ready to be shown."""
    content = SharedJson(config.settings.state_dir, 'status.json').read()
    failures = known_failures(config) if failures is None else failures
    rows = []
    for stream in streams:
        row = dict(content.get(stream.name, {}), name=stream.name)
        row['state'] = 'died' if died(row) else row.get('state', 'never run')
        row['failing'] = len(failures.get(stream.name, {}))
        if stream.status == 'stopped':
            row.update(state='stopped', note='status = stopped')
        with contextlib.suppress(OSError):
            row['quarantine'] = sorted(n for n in os.listdir(stream.quarantine_dir)
                                       if not n.endswith('.reason')) if stream.move else []
        rows.append(row)
    return rows


def age_of(stamp, now):
    """'3 h 5 m' since a time as utc_stamp() writes it, '-' for none."""
    return format_duration(now - epoch(stamp)) if stamp else '-'


def row_cells(row, now):
    """The cells of a stream's line, as text: the same at the terminal and on the page."""
    waiting = row.get('waiting_items', 0)
    next_try = row.get('next_try') if row['state'] != 'died' else None
    return [row['name'], row['state'], '%d (%s)' % (waiting, format_size(row.get('waiting_bytes', 0))),
            age_of(row.get('oldest'), now) if waiting else '-',
            age_of(row.get('last_delivery'), now) + ' ago' if row.get('last_delivery') else '-',
            'in ' + format_duration(epoch(next_try) - now) if next_try else '-']


STATUS_TITLES = ['stream', 'state', 'waiting', 'oldest', 'last delivery', 'next try']


def row_notes(row, now):
    """What else there is to say of a stream: whole phrases, the last error last."""
    notes = []
    if row['state'] == 'died':
        notes.append('process %s is gone; it was last seen %s ago' % (
            row.get('pid'), age_of(row.get('updated'), now)))
    elif row.get('note') and row['state'] != 'down':
        notes.append(row['note'])
    if row.get('rate') and row['state'] == 'transferring':
        notes.append(format_size(row['rate']) + '/s')
    waits = ['%d %s' % (row[key], text) for key, text in (
        ('settling', 'settling or in use'), ('unready', 'without a ready or check file')) if row.get(key)]
    if waits and row.get('unsettled_since'):
        waits[-1] += ', the first for %s' % age_of(row['unsettled_since'], now)
    notes += waits
    if row.get('failing'):
        notes.append('%s failing' % count_of(row['failing'], 'item'))
    if row.get('quarantine'):
        notes.append('%d in quarantine' % len(row['quarantine']))
    if row.get('last_error'):
        notes.append('%s ago: %s' % (age_of(row.get('last_error_time'), now), row['last_error']))
    return [show(note) for note in notes]


def bars(spans, index, label, what):
    """Inline SVG: a bar for each span of time, with the number in its tooltip."""
    most = max([span[index] for span in spans] + [1])
    form = format_size if index == 2 else str
    total = form(sum(span[index] for span in spans))
    shapes = []
    for number, span in enumerate(spans):
        height = 100 * span[index] / most
        when = time.strftime('%Y-%m-%d %H:%M', time.localtime(span[0]))
        shapes.append('<rect x="%d" y="%.1f" width="8" height="%.1f"><title>%s: %s</title></rect>' % (
            number * 10, 100 - height, height, when, form(span[index])))
    return ('<figure><figcaption>%s: %s in all, at most %s</figcaption>'
            '<svg role="img" aria-label="%s: %s in all" viewBox="0 0 %d 101" preserveAspectRatio="none">'
            '<line x1="0" y1="100.5" x2="%d" y2="100.5"/>%s</svg><p class="axis"><span>%s</span>'
            '<span>now</span></p></figure>' % (
                label, total, form(most) if total != form(0) else form(0), label, total,
                len(spans) * 10, len(spans) * 10, ''.join(shapes), what))


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>%(title)s</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="30">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #bbb; --bar: #2a6f97;
  --good: #17692e; --bad: #b00020; --wait: #7a5200; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #16181b; --line: #555;
  --bar: #7cc0e8; --good: #7ddc97; --bad: #ff9a9a; --wait: #f0c36d; } }
body { font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 75rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%%; }
caption { text-align: left; padding-bottom: .5rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem .35rem 0;
  border-top: 1px solid var(--line); }
.note td { border: 0; padding: 0 0 .5rem 1.5rem; } .note td, li { overflow-wrap: anywhere; }
.good { color: var(--good); } .bad { color: var(--bad); } .wait { color: var(--wait); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem; }
figure { margin: 0; } svg { width: 100%%; height: 7rem; fill: var(--bar); stroke: none; }
svg line { stroke: var(--line); } .axis { display: flex; justify-content: space-between; margin: 0; }
@media (max-width: 44rem) { thead { position: absolute; left: -99rem; }
  tr { display: block; padding: .6rem 0; border-top: 1px solid var(--line); }
  tr.note { border: 0; padding: 0; }
  th, td { display: block; border: 0; padding: .1rem 0; }
  td[data-title]::before { content: attr(data-title) ": "; opacity: .75; } }
</style></head><body>
<h1>%(title)s</h1>
<p>As of <time datetime="%(stamp)s">%(local)s</time>. %(summary)s</p>
<table><caption>Streams</caption><thead><tr>%(head)s</tr></thead><tbody>
%(rows)s
</tbody></table>
<h2>Delivered</h2><div class="plots">%(plots)s</div>
<h2>Items that failed</h2>%(failures)s
<h2>Quarantine</h2>%(quarantine)s
</body></html>
"""


def html_list(lines):
    import html
    return '<ul>%s</ul>' % ''.join('<li>%s</li>' % html.escape(show(line)) for line in lines) \
        if lines else '<p>None.</p>'


def status_page(config, tally, now):
    """The whole page, self-contained; every name in it is escaped."""
    import html
    import socket
    failures = known_failures(config)
    rows = stream_rows(config, config.every, failures)
    lines = []
    for row in rows:
        cells = [html.escape(cell) for cell in row_cells(row, now)]
        notes = '; '.join(row_notes(row, now))
        lines.append('<tr><th scope="row">%s</th><td data-title="state" class="%s">%s</td>%s</tr>%s' % (
            cells[0], mood(row['state']), cells[1],
            ''.join('<td data-title="%s">%s</td>' % pair for pair in zip(STATUS_TITLES[2:], cells[2:])),
            '<tr class="note"><td colspan="%d">%s</td></tr>' % (len(cells), html.escape(notes))
            if notes else ''))
    day, month = tally.last(24, now=now), tally.last(Tally.DAYS, 86400, now)
    failed = ['%s: %s: failed %s, last: %s' % (stream.name, name, count_of(f['count'], 'time'), f['error'])
              for stream in config.every
              for name, f in sorted(failures.get(stream.name, {}).items())]
    aside = ['%s: %s' % (row['name'], name) for row in rows for name in row.get('quarantine') or ()]
    bad = sum(mood(row['state']) == 'bad' for row in rows)
    return PAGE % dict(
        title=html.escape('MiStaMover on ' + socket.gethostname()), stamp=utc_stamp(now),
        local=time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now)),
        summary='%s in trouble, %s failed, %s in quarantine.' % (
            '%d of %s' % (bad, count_of(len(rows), 'stream')) if bad else 'No stream is',
            count_of(len(failed), 'item'), count_of(len(aside), 'item')),
        head=''.join('<th scope="col">%s</th>' % title for title in STATUS_TITLES),
        rows='\n'.join(lines),
        plots=bars(day, 1, 'Items an hour, last day', '24 h ago') +
        bars(day, 2, 'Bytes an hour, last day', '24 h ago') +
        bars(month, 1, 'Items a day, last month', '31 d ago') +
        bars(month, 2, 'Bytes a day, last month', '31 d ago'),
        failures=html_list(failed[:100]), quarantine=html_list(aside[:100]))


def free_bytes(row):
    """Free bytes at the incoming directory; None where nobody can tell."""
    try:
        return shutil_free(row['directory'])
    except (KeyError, OSError):
        return None


def count_in(key):
    """A function of a row for METRICS."""
    return lambda row: row.get(key, 0)


def time_in(key):
    return lambda row: epoch(row[key]) if row.get(key) else None


METRICS = (     # name, type, help, how to read it from a row: None where it is not known
    ('up', 'gauge', '1 if the last pass of the stream reached its target',
     lambda row: int(mood(row['state']) != 'bad')),
    ('waiting_items', 'gauge', 'Items that are due', count_in('waiting_items')),
    ('waiting_bytes', 'gauge', 'Bytes that are due', count_in('waiting_bytes')),
    ('oldest_waiting_timestamp_seconds', 'gauge', 'Time of the oldest item that is due', time_in('oldest')),
    ('settling_items', 'gauge', 'Items that are still changing or too fresh', count_in('settling')),
    ('unready_items', 'gauge', 'Items without their ready or check file', count_in('unready')),
    ('ignored_names', 'gauge', 'Names that match ignore', count_in('ignored')),
    ('unsettled_timestamp_seconds', 'gauge', 'Time since which an item settles, is in use or unready',
     time_in('unsettled_since')),
    ('failing_items', 'gauge', 'Items that failed by their own fault and are tried again',
     lambda row: row['failing']),
    ('retries_total', 'counter', 'Passes that ended because the target was in trouble', count_in('retries')),
    ('last_pass_timestamp_seconds', 'gauge', 'Time at which the last whole pass ended', time_in('last_pass')),
    ('delivered_items_total', 'counter', 'Items delivered', count_in('delivered_items')),
    ('delivered_bytes_total', 'counter', 'Bytes delivered', count_in('delivered_bytes')),
    ('last_delivery_timestamp_seconds', 'gauge', 'Time of the last delivery', time_in('last_delivery')),
    ('quarantined_items', 'gauge', 'Items in quarantine', lambda row: len(row.get('quarantine') or ())),
    ('free_bytes', 'gauge', 'Free space at the incoming directory', free_bytes),
)


def metrics_text(config, now, config_ok=True):
    """Prometheus text exposition format 0.0.4, for node_exporter's textfile collector."""
    rows = stream_rows(config, config.every)
    lines = []

    def metric(name, kind, text, samples):
        lines.extend(['# HELP mistamover_%s %s' % (name, text), '# TYPE mistamover_%s %s' % (name, kind)])
        lines.extend('mistamover_%s%s %s' % ((name,) + sample) for sample in samples)

    metric('build_info', 'gauge', 'The version that runs', [('{version="%s"}' % __version__, 1)])
    metric('written_timestamp_seconds', 'gauge', 'Time at which this was written', [('', '%.3f' % now)])
    metric('config_last_reload_successful', 'gauge', '1 if the configuration as it is now is in force',
           [('', int(config_ok))])
    for name, kind, text, read in METRICS:
        metric('stream_' + name, kind, text, [
            ('{stream="%s"}' % row['name'], read(row)) for row in rows if read(row) is not None])
    return '\n'.join(lines) + '\n'


RULES = """# Alert rules for Prometheus, printed by mistamover.py --print-rules.
groups:
- name: mistamover
  rules:
%s"""

ALERT_RULES = (     # name, expression, for, severity, what it means
    ('MistamoverGone', 'time() - mistamover_written_timestamp_seconds > 300', '0m', 'critical',
     'MiStaMover on {{ $labels.instance }} has written no metrics for five minutes: it does not run'),
    ('MistamoverStreamDown', 'mistamover_stream_up == 0', '15m', 'critical',
     'stream {{ $labels.stream }} on {{ $labels.instance }} does not reach its target'),
    ('MistamoverStreamStuck',
     'mistamover_stream_waiting_items > 0 and time() - mistamover_stream_oldest_waiting_timestamp_seconds '
     '> 86400 and time() - mistamover_stream_last_delivery_timestamp_seconds > 3600', '15m', 'warning',
     'stream {{ $labels.stream }} on {{ $labels.instance }}: items older than a day wait, and nothing '
     'was delivered for an hour'),
    ('MistamoverItemsFail', 'mistamover_stream_failing_items > 0', '1h', 'warning',
     '{{ $value }} items of stream {{ $labels.stream }} on {{ $labels.instance }} fail: see --status'),
    ('MistamoverQuarantine', 'mistamover_stream_quarantined_items > 0', '0m', 'warning',
     '{{ $value }} items of stream {{ $labels.stream }} on {{ $labels.instance }} are in quarantine'),
    ('MistamoverDiskFills', 'predict_linear(mistamover_stream_free_bytes[6h], 86400) < 0', '1h', 'warning',
     'the disk of stream {{ $labels.stream }} on {{ $labels.instance }} is full within a day'),
    ('MistamoverConfigRefused', 'mistamover_config_last_reload_successful == 0', '10m', 'warning',
     'MiStaMover on {{ $labels.instance }} goes on with its old configuration: the new one has a mistake'),
)


def rules_text():
    """A rule file for Prometheus (its documentation, "Defining alerting rules"), as YAML."""
    return RULES % ''.join(
        '  - alert: %s\n    expr: %s\n    for: %s\n    labels:\n      severity: %s\n'
        '    annotations:\n      summary: "%s"\n' % rule for rule in ALERT_RULES)


class Caretaker:
    """What is looked after beside the transfers; nothing here disturbs them, nothing raises."""

    PAGE_EVERY = 5                      # seconds, at most, between two pages

    def __init__(self, config, state):
        self.config, self.state = config, state
        self.monitor = DiskMonitor(state.alerts)
        self.tally = Tally(state.ledger)
        self.due = {}                   # duty -> monotonic time
        self.sender = None              # the thread that sends alerts

    def tick(self, everything=False):
        """Do what is due.  everything: at the end of a run, whatever the time."""
        for duty, pause in ((self.watch_disk, self.config.monitor.poll_interval),
                            (self.write_page, self.PAGE_EVERY), (self.write_metrics, self.PAGE_EVERY),
                            (self.heartbeat, 30)):
            if everything or time.monotonic() >= self.due.get(duty, 0):
                self.due[duty] = time.monotonic() + pause
                try:
                    duty()
                except Exception as error:      # one duty never keeps another from being done
                    log.once('%s: %r' % (duty.__name__.replace('_', ' '), error))
        if everything:
            self.state.alerts.send_due(True)
        elif self.state.alerts.pending and not (self.sender and self.sender.is_alive()):
            # in a thread of its own, for a mail server may hang for long
            self.sender = threading.Thread(target=self.state.alerts.send_due, name='alerts', daemon=True)
            self.sender.start()

    def run(self, stop):
        """The thread's life."""
        while not stop.event.wait(1):
            try:
                self.tick()
            except Exception as error:
                log.once('a bug in this program: %r' % error)
                log.error('care', trace=True) if log.logger else None
                stop.event.wait(60)

    def watch_disk(self):
        self.monitor.poll(self.config)

    def write_page(self):
        path, now = self.config.settings.status_page, time.time()
        if path:
            self.tally.update()
            page = status_page(self.config, self.tally, now)
            atomic_write(path, page.encode('utf-8', 'backslashreplace'), mode=0o644)

    def write_metrics(self):
        path = self.config.settings.metrics_file
        if path:
            ok = not self.state.alerts.states.get('config')
            atomic_write(path, metrics_text(self.config, time.time(), ok).encode(), mode=0o644)

    def heartbeat(self):
        """Once a day at the time wanted: all is well, or what is not."""
        email, alerts = self.config.email, self.state.alerts
        now = time.localtime()
        if email.heartbeat is None or now.tm_hour * 60 + now.tm_min < email.heartbeat:
            return
        today = time.strftime('%Y-%m-%d', now)
        if alerts.states.get('heartbeat') == today:
            return
        self.tally.update()
        alerts.states['heartbeat'] = today
        alerts.save('heartbeat', today)
        day = self.tally.last(24)
        bad = [row for row in stream_rows(self.config, self.config.every) if mood(row['state']) == 'bad']
        alerts.tell('error' if bad else 'info', '%s; %s delivered in the last day, %s' % (
            'in trouble: ' + ', '.join(row['name'] for row in bad) if bad else 'all is well',
            count_of(sum(span[1] for span in day), 'item'),
            format_size(sum(span[2] for span in day))), always=True)


# ----------------------------------------------------------------------------------------
# 18  stream workers: once and daemon
# ----------------------------------------------------------------------------------------

# Who runs in which thread, and what they share:
#
# thread      | runs                                   | shares, under which lock
# ============|========================================|==========================================
# main        | Supervisor.run(): signals, reload      | StopRequest, which locks itself
# NAME        | Worker.run(): the passes of one stream | state_dir by Ledger, SharedJson, Alerts
# pipeline    | Delivery.connect, .prove, .record_...  | the Delivery: one value at a time each, and
#             |                                        | who drains it waits; Transport: see there
# ssh, rsync, | Program._read: what a child prints     | Program.chunks, a queue
#   ...       |                                        |
# ftp         | more connections of one transport      | the pool, FtpTransport.lock
# closer      | close_all: descriptors of what is gone | nothing
# care        | Caretaker: page, metrics, disk space   | reads state_dir; Alerts.lock
# alerts      | Alerts.send_due: a slow mail server    | Alerts.lock

class Worker:
    """One stream: its lock, its transport, its passes.  Runs in a thread of its own."""

    EASE = 10                   # times a pass takes are at least between it and the next

    def __init__(self, stream, state):
        self.stream = stream
        self.stop = StopRequest()
        self.state = state
        self.ledger = state.ledger
        self.state_dir = state.directory
        self.lock = StreamLock(stream, self.state_dir)
        self.progress = Progress(stream, state.status)
        self.failures = Failures(state.failures, stream)
        self.spent = Spent(state.spent, stream)
        self.waits = Waits(state.waiting, stream)
        self.scanner = make_scanner(stream, self.stop, self.spent)
        self.watch = None               # a daemon's, from the start of a pass to the next
        self.settler = Settler(stream.settle_time)
        self.releaser = Releaser(stream, self.state_dir)
        self.transport = None
        self.wall, self.age = time.time, state.ages.age
        self.asked = -STOP_FILE_AGE     # monotonic time of the last answer about stop files
        self.told_apart = False         # whether source and target are known to differ
        self.mirrored = {}              # name -> fingerprint of what the target has
        self.unsummed = None            # an Unsummed, of a mirror with send_checksum
        self.taken = None               # a Taken, of a mirror
        self.stays = None               # see tell_of_staying()
        self.zipped = None              # see delivered_trees()
        self.exit_code = EXIT_OK
        self.trouble_now = ''           # why it does not run, for whoever started us
        self.daemonic = False
        self.ended = False

    # -- what a Delivery asks of it

    def dirty_path(self):
        return os.path.join(self.state_dir, self.stream.name + '.dirty')

    def dirty(self):
        """Whether something of ours may lie in the target's staging area."""
        return os.path.exists(self.dirty_path())

    def set_dirty(self, value):
        with own_files('cannot write %s' % show(self.dirty_path())):
            if value:
                atomic_write(self.dirty_path(), b'the target may hold temporary files\n', True)
            else:
                os.unlink(self.dirty_path())

    def forget_mirrored(self, here):
        """here: how many items there are.  What a daemon of years has mirrored may be gone since."""
        if len(self.mirrored) > 2 * here + 1000:
            self.mirrored = {name: mark for name, mark in self.mirrored.items()
                             if os.path.lexists(os.path.join(self.stream.root, name))}

    def tell_of_staying(self, staying):
        """Directories that are kept by what is never sent (.DS_Store): one warning, not at each run
        of cron."""
        if self.stays is None:
            self.stays = self.state.staying.read().get(self.stream.name, {})
        for name in sorted(set(staying) - set(self.stays)):
            log.warning('%s stays: %s' % (show(name), staying[name]), self.stream)
        if set(staying) != set(self.stays):
            self.state.staying.update(self.stream.name, staying or None)
        self.stays = staying

    @contextlib.contextmanager
    def marker(self):
        """A name in the incoming directory that is nowhere else, for a moment: a file of ours or, on a
        disk that has no room for it, a name that is there.  Raises OSError."""
        with contextlib.ExitStack() as stack:
            try:
                name = stack.enter_context(marked(self.stream.root))
            except OSError as error:
                names = sorted(os.listdir(self.stream.root)) if error.errno in NO_SPACE else []
                if not names or self.told_apart:
                    raise
                name = names[-1]
            yield name

    def ask_for_marker(self, names):
        """transport.present(names), and whether target and source are one.  That is asked each time,
        for a mount or a link may come, but where it is seen of each file."""
        if self.told_apart and self.transport.tells_apart:
            return self.transport.present(names)
        try:
            with self.marker() as marker:
                found = self.transport.present(names | {marker})
        except OSError as error:
            if self.stream.move and not self.told_apart:
                hints = {errno.EACCES: 'what was delivered is deleted there: change its permissions',
                         errno.EROFS: 'mount it for writing, or set transfer_mode = mirror'}
                raise StateError('cannot write in the directory %s: %s' % (
                    show(self.stream.directory), error.strerror), hints.get(error.errno, ''))
            return self.transport.present(names)    # a source that is read-only now is not eaten
        if marker in found and not marker.startswith(HERE_NAME):
            raise StateError('the disk of %s is full, so nobody can tell it from target_dir'
                             % show(self.stream.directory), 'make a little room there by hand')
        if marker in found:
            raise TargetError('target_dir is the incoming directory itself', 'fix target_dir')
        self.told_apart = True
        return found

    def probe(self):
        """Write, verify, publish and remove a tiny file at the target, by the usual verbs."""
        spool = to_bytes(self.stream.spool)
        make_private_directory(self.stream.spool)
        name = PROBE_NAME       # always the same, so that a killed probe leaves nothing for long
        with open(os.path.join(spool, name), 'wb') as handle:
            handle.write(b'MiStaMover tries whether it can write here.\n')
        entry = Entry.of(name, os.lstat(os.path.join(spool, name)))
        batch = Batch(spool, b'', [Parcel(Item(name, [entry]), [entry])])
        try:
            parts = []
            self.transport.send(batch, lambda part, more: parts.append(part))
            try:
                for outcome in self.transport.finish(parts[-1]):
                    if outcome.error:
                        raise outcome.error
            except (ItemError, TargetError):
                with contextlib.suppress(TargetError):
                    self.transport.delete([name])       # what cannot be proven is there all the same
                raise
            self.transport.delete([name])
        finally:
            os.unlink(os.path.join(spool, name))

    # -- passes

    def start(self):
        """Take the lock and read what earlier runs left.  Raises LockedError, StateError."""
        make_incoming(self.stream)
        make_private_directory(self.state_dir)
        self.lock.acquire()
        if self.stream.mirror and self.stream.send_checksum:
            self.unsummed = Unsummed(self.stream)
        self.sweep()
        self.transport = self.stream.protocol(self.stream, self.stop, self.progress, self.lock.fds)
        self.transport.littered = self.dirty()
        if self.stream.mirror:
            self.taken = self.transport.taken = Taken(self.stream)
        if self.stream.settle_max is not None:
            self.transport.own_copies.update(self.copies())

    def copies(self):
        """{path: (SHA-256, wall time)} of what settle_max sent last.  Raises StateError."""
        return {to_bytes(record['item']): (record['checksum'][7:], epoch(record['time']))
                for record in self.ledger.read(2, self.stream.name)
                if record['outcome'] == 'copied' and (record.get('checksum') or '').startswith('sha256:')}

    def delivered_trees(self):
        """{name: snapshot} of what was delivered as a zip and perhaps not released, by the ledger;
        read when the first directory is met.  Raises StateError."""
        if self.zipped is None:
            self.zipped = {
                record['item']: record['snapshot'] if record.get('outcome') == 'delivered' else None
                for record in self.ledger.read(2, self.stream.name) if record.get('snapshot')}
        return self.zipped

    def sweep(self):
        """Remove the empty files that a killed run left in the incoming directory."""
        with os.scandir(self.stream.root) as entries:
            stale = [e.path for e in entries if e.name.startswith((CLOCK_NAME, HERE_NAME))]
        for path in stale:
            with contextlib.suppress(OSError):
                if not os.lstat(path).st_size:
                    os.unlink(path)

    def end(self):
        try:
            if self.transport:
                self.transport.close()
        except OSError as error:        # EMFILE: nothing may keep the lock from going
            log.error(error, self.stream)
        finally:
            if self.lock.fds:
                self.progress.save()    # while the status is still ours to write
            self.lock.release()

    def one_pass(self, backing_off):
        """Raises TargetError (with the connection given up), Suspended, Interrupted."""
        delivery = Delivery(self)
        try:
            with machine_trouble():
                result = delivery.run(backing_off)
        except Suspended:
            self.waits.hold(self.wall())
            self.waits.save(True)
            for case in delivery.suspects:
                log.error(case.error, self.stream)
            if delivery.suspects or delivery.result.failed:
                self.exit_code = EXIT_FAILED
            raise
        except TargetError:
            self.transport.close()
            self.asked = -STOP_FILE_AGE
            raise
        self.progress.last['last_pass'] = utc_stamp()
        self.note_waiting(result)
        if not (result.failed or result.waiting):
            self.progress.recovered()
        if delivery.connected:
            self.state.alerts.turn('target:' + self.stream.name, False, 'info',
                                   'Stream %s delivers to %s again.' % (
                                       self.stream.name, target_of(self.stream)))
        if result.items or result.failed or result.withheld or not backing_off:
            log.info(result.line(), self.stream)
        return result

    def note_waiting(self, result):
        """What waits is counted; what waits for long makes an alert.  What fails has one of its own."""
        reasons = {}
        for why, names in (('has no ready or check file', self.scanner.lacking), ('is in use', result.busy),
                           ('keeps changing', result.settling)):
            for name in map(to_text, names):            # of a million, those that are remembered
                if len(reasons) < Waits.MOST or name in self.waits.names:
                    reasons[name] = why
        now = self.wall()
        self.waits.update(reasons, now, self.age)
        oldest, limit = self.waits.oldest(), self.stream.stale_after
        self.progress.last.update(
            settling=len(result.settling) + len(result.busy), unready=result.unready,
            ignored=self.scanner.passed, unsettled_since=utc_stamp(max(0, oldest)) if oldest else None)
        names = self.waits.to_tell(now, self.age, limit)
        if names:
            said = ', '.join('%s (%s)' % (show(to_bytes(name)), reasons[name]) for name in names[:3])
            message = '%s not sent for more than %s: %s%s' % (
                'one item was' if len(names) == 1 else '%d items were' % len(names),
                format_duration(limit), said, ' and more' if len(names) > 3 else '')
            log.warning(message, self.stream)
            self.state.alerts.tell('warning', 'Stream %s: %s.  To see why, type: %s --explain PATH' % (
                self.stream.name, message, os.path.basename(__file__)))
        self.waits.save(not self.daemonic)

    def pause_after(self, failures):
        """Seconds, with jitter, so that streams do not march in step."""
        import random
        return backoff(self.stream, failures) * random.uniform(0.75, 1.0)

    def trouble(self, error, failures, pause):
        """One line when it goes wrong, not one at every try.  pause: seconds until the next
        try, None if there is none."""
        again = pause is not None
        message = '%s: %s' % (self.stream.name, error)
        self.progress.failed(str(error))
        self.progress.last['retries'] = self.progress.last.get('retries', 0) + 1
        self.progress.enter('down', str(error), pause=pause)
        if self.daemonic or not again:
            self.state.alerts.turn('target:' + self.stream.name, True, 'error', (
                'Stream %s does not deliver: %s.  Nothing is lost; it goes on by itself when this is fixed.'
                % (self.stream.name, error)))
        if failures == 1:
            log.error(message)
        elif not again:
            log.error('given up after %d tries' % failures, self.stream)
        else:
            log.debug('%s (try %d)' % (message, failures))

    def once(self):
        """Deliver what is there; waits one settle_time for what is too fresh.  Sets exit_code."""
        failures, looked_again = 0, False
        while True:
            try:
                result = self.one_pass(False)
            except Suspended as why:
                log.info('suspended: %s' % why, self.stream)
                self.progress.enter('stopped', str(why))
                return
            except TargetError as error:
                failures += 1
                pause = self.pause_after(failures) if failures < self.stream.retry_count else None
                self.trouble(error, failures, pause)
                if pause is None:
                    self.exit_code = EXIT_FAILED
                    return
                self.stop.rest(pause)
                continue
            if result.failed:
                self.exit_code = EXIT_FAILED
            fresh = result.settling + result.busy
            if not fresh or looked_again:
                break
            looked_again = True
            self.progress.enter('settling', count_of(len(fresh), 'item'))
            self.stop.rest(self.stream.settle_time + 0.05)
        if fresh:
            log.info('%s still changing or in use, left for the next run: %s' % (
                count_of(len(fresh), 'item'), ', '.join(show(name) for name in fresh[:3])), self.stream)
        self.progress.enter('done')

    def daemon(self):
        """The eternal loop around one_pass().  The first pause is a part of one, by chance, so
        that streams do not look in step and hinder each other."""
        import random
        failures, suspended, share = 0, None, random.random()
        self.stop.bell = self.stop.bell or Bell()
        while True:
            self.follow_replaced()
            self.watch = Watch(self.stream.root)
            try:
                result = self.one_pass(True)
                if suspended:
                    log.info('goes on', self.stream)
                suspended = None
                if failures:
                    log.info('works again, after %s' % count_of(failures, 'failure'), self.stream)
                failures = 0
                worked = result.items or result.quarantined
                self.progress.enter('settling' if result.settling else 'idle')
                pause = 0 if worked else min(self.stream.pause_time, self.next_look(result))
                if result.disturbed:        # by our own doing, that is no news
                    self.watch.close()
                self.rest_between(result, pause * share)
                share = 1 if pause else share
            except Suspended as why:
                if suspended != str(why):
                    log.info('suspended: %s' % why, self.stream)
                suspended = str(why)
                self.progress.enter('stopped', suspended)
                self.stop.rest(self.stream.pause_time)
            except TargetError as error:
                failures += 1
                pause = self.pause_after(failures)
                self.trouble(error, failures, pause)
                self.stop.rest(pause)
            finally:
                self.watch.close()

    def follow_replaced(self):
        """Where another directory has the name of the one that is locked, that one is locked now."""
        if self.lock.misplaced():
            log.info('%s was replaced' % show(self.stream.directory), self.stream)
            self.end()
            self.told_apart = False
            self.start()

    def rest_between(self, result, pause):
        """Sleep until the next pass: until something that happened in a watched directory has
        settled, else `pause` seconds.  Files that are only written to wake nobody earlier."""
        now = started = time.monotonic()
        watch = self.watch.fd
        until = started + (LOOK_ANYWAY if result.idle and watch is not None else pause)
        ease = self.EASE * result.seconds
        while now < until:
            happened = watch is not None and self.watch.stirred()
            if happened:
                settled = min(self.stream.settle_time + 0.02, pause)
                soon = settled if happened == 'changed' else pause
                self.stop.rest(max(soon, min(pause, started + ease - now)))
                return
            if result.idle:
                self.progress.enter('idle')
            self.stop.rest(min(until - now, max(self.stream.pause_time, ease)), watch)
            now = time.monotonic()

    def next_look(self, result):
        """Do not sleep far past the moment at which something settles."""
        return max(0.2, self.stream.settle_time) if result.settling else self.stream.pause_time

    def lively(self):
        """Whether the thread shows signs of life: nothing it does is silent for longer."""
        silent = time.monotonic() - self.stop.seen
        return silent < self.stream.stall_timeout + self.stream.connect_timeout + 60

    def run(self, daemon):
        """The thread's life: nothing escapes but into the log, alerts and exit_code."""
        self.daemonic = self.progress.daemon = daemon
        failures, again, locked = 0, True, None
        while again:
            pause = self.pause_after(failures + 1) if daemon else None
            again = daemon
            try:
                self.start()
                self.exit_code, self.trouble_now = EXIT_OK, ''
                self.daemon() if daemon else self.once()
                return
            except Interrupted:
                self.progress.enter('ended', save=False)
                return
            except LockedError as error:
                self.trouble_now, self.exit_code = str(error), EXIT_LOCKED
                if str(error) != locked:
                    log.info(str(error))
                locked = str(error)
            except MoverError as error:
                self.trouble_now, self.exit_code = str(error), EXIT_FAILED
                self.trouble(str(error), failures + 1, pause)
            except Exception as error:
                self.exit_code = EXIT_FAILED
                message = '%s: a bug in this program: %r' % (self.stream.name, error)
                log.error(message, trace=True)
                self.progress.failed(message)
                self.progress.enter('down', message, pause=pause)
                self.state.alerts.tell('error', message)
            finally:
                self.end()
            failures += 1
            try:
                self.stop.rest(pause or 0)
            except Interrupted:
                return


def draw_progress(workers):
    """A line a stream at the bottom of a terminal, overwritten in place."""
    import shutil
    width = shutil.get_terminal_size().columns - 1
    lines = [w.progress.line()[:width] for w in workers if w.progress.state == 'transferring']

    def clear():
        sys.stderr.write('\r\033[K' + '\033[A\033[K' * (len(lines) - 1))    # ECMA-48: EL, CUU
        sys.stderr.flush()
        log.clear_line = lambda: None

    log.clear_line()
    if lines:
        sys.stderr.write('\n'.join(lines))
        sys.stderr.flush()
        log.clear_line = clear


def sweep_state(state_dir):
    """Remove half-written state files of processes that are gone.  Raises StateError."""
    with own_files('cannot read %s' % show(state_dir), 'run it as the user that it belongs to'):
        names = os.listdir(state_dir)
    with contextlib.suppress(OSError):
        names += [os.path.join('spool', name) for name in os.listdir(os.path.join(state_dir, 'spool'))]
    for name in names:
        match = re.search(r'\.(\d+)\.new$', name)
        if match and not alive(match.group(1)):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(state_dir, name))


class Notifier:
    """Tells systemd how we are (sd_notify(3)): datagrams to the socket in NOTIFY_SOCKET."""

    def __init__(self):
        self.path = os.environ.get('NOTIFY_SOCKET')
        microseconds = os.environ.get('WATCHDOG_USEC', '')
        ours = os.environ.get('WATCHDOG_PID', str(os.getpid())) == str(os.getpid())
        self.interval = int(microseconds) / 2e6 if microseconds.isdigit() and ours else None
        self.next_at = 0
        self.status = None

    def send(self, text):
        if not self.path:
            return
        import socket
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto(text.encode(), '\0' + self.path[1:] if self.path[0] == '@' else self.path)

    def reloading(self):
        self.send('RELOADING=1\nMONOTONIC_USEC=%d' % (time.monotonic() * 1e6))

    def tick(self, workers):
        """STATUS when it changes; WATCHDOG only while every stream's thread shows life."""
        states = collections.Counter(worker.progress.state for worker in workers)
        status = ', '.join('%d %s' % (n, state) for state, n in sorted(states.items())) or 'no streams'
        if status != self.status:
            self.status = status
            self.send('STATUS=' + status)
        if self.interval and time.monotonic() >= self.next_at and all(w.lively() for w in workers):
            self.next_at = time.monotonic() + self.interval / 2
            self.send('WATCHDOG=1')


def signature(config):
    """What changes when one of the configuration files does: compare with config.stamps."""
    import glob
    paths = [config.path] + sorted(glob.glob(config.settings.stream_files or ''))
    return [stamp for stamp in map(stamp_of, paths) if stamp]


def start_log(config):
    """By the configuration; -v and -q have the last word at the terminal.  Raises ConfigError,
    StateError."""
    settings = config.settings
    if settings.log_file:
        make_private_directory(os.path.dirname(settings.log_file))
    log.start(settings.log_level, settings.log_file, settings.log_format, settings.log_size,
              settings.loudness)
    for warning in config.warnings:
        log.once(warning)


class Supervisor:
    """Runs every stream in a thread of its own, and follows the configuration as a daemon.

    load: reads the configuration again; wait, wake: see signals_recorded(); report(None) is
    called once a stream has its lock.
    """

    def __init__(self, config, load, daemon, stop, waiting, report):
        self.config, self.load, self.daemon = config, load, daemon
        self.stop, self.report = stop, report
        self.wait, self.wake = waiting
        directory = config.settings.state_dir
        make_private_directory(directory)
        sweep_state(directory)
        self.state = State(directory, config)
        self.caretaker = Caretaker(config, self.state)
        self.notifier = Notifier()
        self.running = {}               # name -> Worker
        self.held = False               # whether any stream ever had its lock
        self.known = self.looked = config.stamps
        self.state.alerts.turn('config', False, 'info', 'the configuration is in order again')

    @property
    def workers(self):
        return list(self.running.values())

    def why(self):
        """What keeps streams from running, for whoever started a daemon."""
        said = [worker.trouble_now for worker in self.workers if worker.trouble_now]
        more = ['and %d more, see --status' % len(said[2:])] if said[2:] else []
        return '; '.join(said[:2] + more)

    def wanted(self):
        return {stream.name: stream for stream in self.config.streams if stream.status == 'running'}

    def start_missing(self):
        """Start what is wanted and does not run; one that was retired must have ended."""
        wanted = self.wanted()
        self.running = {name: worker for name, worker in self.running.items()
                        if name in wanted or not worker.ended}
        for name, stream in wanted.items():
            if name not in self.running or self.running[name].ended:
                worker = self.running[name] = Worker(stream, self.state)
                try:
                    threading.Thread(target=self.live, args=(worker,), name=name).start()
                except RuntimeError as error:   # no thread to be had; a daemon tries again
                    worker.ended, worker.exit_code = True, EXIT_FAILED
                    log.once('%s: %s' % (name, error))

    def live(self, worker):
        try:
            with contextlib.suppress(Interrupted), self.stop.on_stop(worker.stop.request):
                worker.run(self.daemon)
        finally:
            worker.ended = True
            if worker.stop.bell:
                worker.stop.bell.close()
            self.wake()

    def run(self):
        """The exit code."""
        for stream in self.config.streams:
            if stream.status == 'stopped':
                log.info('status = stopped', stream)
        for one, two in rivals(self.config):
            log.warning('stream %s delivers into the same place: of two files of one name that come at the '
                        'same moment one may replace the other (give each its own target_dir%s)' % (
                            two.name, '' if one.protocol.replaces or two.protocol.replaces else
                            ', or set on_conflict = backup'), one)
        if self.daemon:
            threading.Thread(target=self.caretaker.run, args=(self.stop,), name='care',
                             daemon=True).start()
        self.start_missing()
        self.notifier.send('READY=1')
        settings = self.config.settings
        terminal = sys.stderr.isatty() and not settings.log_file and settings.loudness != 'WARNING'
        while self.goes_on():
            self.wait(0.2 if terminal or not self.daemon else 1)
            try:
                self.tick()
            except Exception as error:      # whatever it is, somebody must go on watching
                log.once('a bug in this program, or no room for it: %r' % error)
            if terminal:
                draw_progress(self.workers)
        log.clear_line()
        if not self.daemon and not self.stop.signal:
            self.last_care()
        self.state.alerts.stop.request()
        if self.stop.signal:
            return 128 + self.stop.signal
        codes = {worker.exit_code for worker in self.workers}
        return next((code for code in (EXIT_FAILED, EXIT_LOCKED) if code in codes), EXIT_OK)

    def last_care(self):
        """Alerts, page and metrics of a single run, for which a signal does not wait."""
        thread = threading.Thread(target=self.caretaker.tick, args=(True,), name='care', daemon=True)
        thread.start()
        end = time.monotonic() + Alerts.PATIENCE
        while thread.is_alive() and not self.stop.signal and time.monotonic() < end:
            thread.join(0.1)
        self.state.alerts.stop.request()
        thread.join(2 * KILL_GRACE)

    def goes_on(self):
        return not all(worker.ended for worker in self.workers) or \
            self.daemon and not self.stop.event.is_set()

    def tick(self):
        if self.stop.pause:
            log.clear_line()
            Program.stop_with_us()
            self.stop.pause = False
        if self.stop.signal and not self.stop.event.is_set():
            log.info('stopping: signal %d' % self.stop.signal)
            self.notifier.send('STOPPING=1')
            self.stop.request()
        self.held = self.held or any(worker.lock.fds for worker in self.workers)
        if self.held or all(worker.exit_code == EXIT_FAILED for worker in self.workers):
            self.report(None, self.why())
        if not self.daemon or self.stop.event.is_set():
            return
        if self.running and not self.held and all(w.exit_code == EXIT_LOCKED for w in self.workers):
            log.warning('another process has every stream: ' + self.why())
            self.stop.request()
            return
        self.follow_config()
        self.start_missing()
        self.notifier.tick(self.workers)

    # -- the configuration as it changes

    def follow_config(self):
        """Read it again when it has changed and lies still, or on SIGHUP."""
        now = signature(self.config)
        due = self.stop.reload or now == self.looked and now != self.known
        self.looked = now
        if not due:
            return
        if self.stop.reload:
            with contextlib.suppress(MoverError):
                start_log(self.config)                  # logrotate may have renamed the file
        self.stop.reload, self.known = False, now       # if it is refused, only once
        self.notifier.reloading()
        try:
            self.adopt(self.load())
            self.state.alerts.turn('config', False, 'info', 'the configuration is in order again')
        except MoverError as error:
            message = 'the new configuration is refused, the old one stays in force: %s' % (
                '; '.join(error.lines))
            log.error(message)
            self.state.alerts.turn('config', True, 'error', message)
        finally:
            self.notifier.send('READY=1')

    def adopt(self, config):
        """Put a new configuration in force.  Raises ConfigError."""
        if config.settings.state_dir != self.config.settings.state_dir:
            raise ConfigError('state_dir has changed', 'end the daemon and start it again')
        if vars(self.config.settings) != vars(config.settings):
            start_log(config)           # may refuse; until here nothing has changed
        before, self.config, self.known = self.config, config, config.stamps
        self.state.alerts.configure(config)
        self.caretaker.config = config
        now = {(stream.root, stream.stop_file) for stream in config.streams}
        for stream in before.streams:
            if (stream.root, stream.stop_file) not in now:
                with contextlib.suppress(OSError):
                    DiskMonitor.let_go(stream)      # nobody else would
        wanted = self.wanted()
        for name, worker in self.running.items():
            if name not in wanted or vars(wanted[name]) != vars(worker.stream):
                log.info('%s: %s' % (name, 'changed' if name in wanted else 'taken out'))
                worker.stop.leave()
        for name in set(wanted) - set(self.running):
            log.info('%s: new' % name)
        log.info('the configuration was read again')


# ----------------------------------------------------------------------------------------
# 19  commands
# ----------------------------------------------------------------------------------------

def config_beside():
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), 'mistamover.ini')


def default_config():
    """Never in the working directory: a planted file could name its own commands.  Raises ConfigError
    if there is none."""
    beside = config_beside()
    for path in (beside, '/etc/mistamover.ini'):
        if os.path.lexists(path):
            return path
    raise ConfigError('there is no configuration: neither %s nor %s exists' % (show(beside), path),
                      'to write one, type: python3 %s --init; to use another, name it with --config'
                      % show(sys.argv[0]))


def read_config(args):
    config = load_config(args.config or default_config(), TRANSPORTS, args.stream, args.mode)
    config.settings.loudness = 'DEBUG' if args.verbose else 'WARNING' if args.quiet else None
    return config


def suspensions(stream):
    """What can be seen from here to hold a stream up."""
    if stream.status == 'stopped':
        yield 'status = stopped'
    try:
        if stop_file_here(stream):
            yield '%s in %s' % (stream.stop_file, show(stream.directory))
    except OSError as error:
        yield 'cannot ask for %s: %s' % (stream.stop_file, error.strerror)
    if not in_window(stream.transfer_window, time.localtime()):
        yield 'outside of transfer_window'


def command_dry_run(config, _args, stop):
    """Say what would be done; nothing is written (but what Leases try), locked, or connected to."""
    code = EXIT_OK
    for stream in config.streams:
        scanner, settler, leases = make_scanner(stream, stop), Settler(stream.settle_time), Leases(stream)
        settler.begin(time.time_ns() if hasattr(time, 'time_ns') else int(time.time() * 1e9), 0)
        count = size = 0
        for why in suspensions(stream):
            say('%s: nothing would be done now: %s' % (stream.name, why))
        try:
            for item in sorted(scanner.scan(), key=lambda item: item.name):
                zipped = item.is_directory and (stream.directories == 'zip' or stream.zips)
                name = show(item.name) + ('.zip' if zipped else '/' if item.is_directory else '')
                word = 'still settling:' if not settler.settled(item, 0) else \
                    'would compare' if stream.mirror else 'would move'
                try:
                    if item.fault:
                        raise item.fault
                    check_unused(stream, item, leases)
                except ItemError as error:
                    say('%s: cannot send %s: %s' % (stream.name, show(item.name), error))
                    continue
                except Changed as why:
                    word = 'in use (%s):' % why
                say('%s: %s %s (%s, %s) to %s' % (
                    stream.name, word, name, count_of(len(item.files), 'file'),
                    format_size(item.size), target_of(stream)))
                count, size = count + 1, size + item.size
        except TargetError as error:
            say('%s: %s' % (stream.name, error))
            code = EXIT_FAILED
            continue
        say('%s: %s, %s%s%s' % (
            stream.name, count_of(count, 'item'), format_size(size),
            '; %d waiting for a ready or check file' % scanner.unready if scanner.unready else '',
            '; mirror_delete would delete at the target what is not here'
            if stream.mirror and stream.mirror_delete else ''))
    return code


def may_release(stream):
    """Whether what is delivered can be deleted; a mirror deletes nothing."""
    return stream.mirror or os.access(stream.root, os.W_OK | os.X_OK)


def target_steps(worker, transport):
    stream = worker.stream
    names = {to_bytes(stream.stop_file), to_bytes(stream.target_marker or stream.stop_file)}
    found = worker.ask_for_marker(names) if os.path.isdir(stream.root) and may_release(stream) else \
        transport.present(names)
    if stream.target_marker and to_bytes(stream.target_marker) not in found:
        raise TargetError('target_marker: %s is missing' % stream.target_marker, 'is the disk mounted?')
    yield 'target_dir', '%s is there%s' % (target_of(stream, False), ', and a stop file suspends the stream'
                                          if to_bytes(stream.stop_file) in found else '')
    try:
        worker.probe()
    except TargetError:             # the line may end by what it teaches: see SftpSession.note_handle()
        transport.close()
        transport.open()
        worker.probe()
    stays = transport.present({PROBE_NAME})
    yield 'write, %s, rename%s' % ('hash' if stream.verify == 'checksum' else 'size',
                                   '' if stays else ', remove'), 'done'
    yield from transport.learned()
    if stream.mirror and stream.mirror_delete:
        transport.check_listing()
        yield 'mirror_delete', 'the target can be listed'
    free = transport.free_space()
    yield 'free space', 'unknown (this protocol cannot tell)' if free is None else format_size(free)
    yield 'our own files at the target', 'removed' if transport.tidy() and not stays else \
        'what was tried stays, for nothing may be removed there'


def check_source(worker):
    """Yield (what, answer) for a stream's incoming directory.  Raises StateError."""
    stream = worker.stream
    trouble = directory_trouble('directory:', stream.root, stream.create_directories)
    if trouble and not (trouble[0] == errno.ENOENT and stream.create_directories):
        raise StateError(*trouble[1:])
    if os.path.isdir(stream.root) and not may_release(stream):
        raise StateError('directory: %s is not writable, so nothing could be deleted after its '
                         'delivery' % show(stream.directory), 'change its permissions')
    yield 'directory', show(stream.directory)
    yield 'open writers', worker.releaser.leases.report() or 'seen, and waited for'


def check_target(worker):
    """Yield (what, answer) for a stream's target.  Raises MoverError."""
    transport = worker.transport
    transport.open()
    try:
        yield from target_steps(worker, transport)
    except (MoverError, OSError):
        with contextlib.suppress(MoverError, OSError):
            transport.tidy()
        raise


def try_to_write(path):
    """Raises OSError unless a file can be made in this directory or, while that is missing, in what
    it will be made in."""
    import tempfile
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    tempfile.TemporaryFile(dir=path).close()


def try_command(words):
    """Raises OSError unless this command can be started."""
    import shutil
    if not shutil.which(words[0]):
        raise OSError(errno.ENOENT, 'no such program', words[0])


def try_mail(email):
    """Log in and send nothing.  Raises OSError."""
    with mail_server(email):
        pass


def check_program(config):
    """Yield (what, a function that raises OSError if it does not work) for what is no stream's."""
    settings, email = config.settings, config.email
    for option, path, directory in own_places(settings):
        yield '%s: %s' % (option, show(path)), functools.partial(try_to_write, directory)
    if settings.alert_command:
        yield 'alert_command: ' + show(settings.alert_command[0]), functools.partial(
            try_command, settings.alert_command)
    for stream in config.streams:
        if stream.after_delivery:
            yield 'after_delivery of %s: %s' % (stream.name, show(stream.after_delivery[0])), \
                functools.partial(try_command, stream.after_delivery)
    if email.smarthost:
        yield 'mail by %s, port %d' % (email.smarthost, email.port), functools.partial(try_mail, email)


def check_one(stream, config, stop, shown):
    """Try both ends of one stream, with a state directory of its own.  shown(name): a context that
    shows a MoverError, so that what is wrong at one end does not hide the other."""
    import tempfile
    with machine_trouble(), tempfile.TemporaryDirectory(prefix='mistamover-') as scratch:
        config.settings.state_dir = scratch
        place_own_files(stream, scratch)        # a running daemon keeps its own
        worker = Worker(stream, State(scratch, config))
        worker.transport = stream.protocol(stream, stop, worker.progress)
        worker.transport.area = CHECK_AREA
        try:
            for check in (check_source, check_target):
                with shown(stream.name), machine_trouble():
                    for what, answer in check(worker):
                        say('%-12s OK      %s: %s' % (stream.name, what, answer))
        finally:
            worker.transport.close()


def command_check(config, _args, stop):
    """Try what the program needs and every target; a table of OK and FAILED with what fixes it."""
    failed = False

    def bad(name, error, hint=''):
        nonlocal failed
        failed = True
        say('%-12s FAILED  %s' % (name, error))
        if hint:
            say('%-12s         -> %s' % ('', hint))

    @contextlib.contextmanager
    def shown(name):
        try:
            yield
        except Interrupted:
            raise
        except MoverError as error:
            bad(name, error.message, error.hint)

    for what, attempt in check_program(config):
        try:
            attempt()
            say('%-12s OK      %s' % ('program', what))
        except OSError as error:
            bad('program', '%s: %s' % (what, error.strerror or error))
    for stream in config.streams:
        with shown(stream.name):
            check_one(stream, config, stop, shown)
    return EXIT_FAILED if failed else EXIT_OK


COLOURS = {'good': '32', 'bad': '31', 'wait': '33'}


def status_lines(rows, now, width, coloured):
    """The table, its notes on lines of their own under each stream."""
    import textwrap
    table = [[title.upper() for title in STATUS_TITLES]] + [row_cells(row, now) for row in rows]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(STATUS_TITLES))]
    for number, cells in enumerate(table):
        padded = [cell.ljust(width) for cell, width in zip(cells, widths)]
        if coloured and number:
            padded[1] = '\033[%sm%s\033[0m' % (COLOURS[mood(rows[number - 1]['state'])], padded[1])
        yield '  '.join(padded).rstrip()
        for note in row_notes(rows[number - 1], now) if number else ():
            yield from textwrap.wrap(note, width, initial_indent='    ', subsequent_indent='    ',
                                     break_on_hyphens=False)


def command_status(config, args, _stop):
    """What each stream is doing, from the state directory; exit code 1 if one is in trouble."""
    import shutil
    import socket
    rows = stream_rows(config, config.streams)
    if args.json:
        say(to_json(dict(host=socket.gethostname(), version=__version__, time=utc_stamp(),
                         streams={row['name']: row for row in rows}), indent=1, sort_keys=True).decode())
    else:
        width = shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() else 80
        for line in status_lines(rows, time.time(), max(40, width),
                                 sys.stdout.isatty() and not os.environ.get('NO_COLOR')):
            say(line)
    return EXIT_FAILED if any(map(in_trouble, rows)) else EXIT_OK


def say_error(error):
    for line in error.lines:
        say('mistamover: %s' % show(line), sys.stderr)


def status_of_broken(args, error, stop):
    """--status while the configuration holds a mistake: what state_dir tells of the streams that
    ran last.  Raises the error if there is none."""
    import configparser
    import types
    path = os.path.abspath(args.config or default_config())
    parser = configparser.RawConfigParser(default_section='\0', delimiters=('=',), strict=False)
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
        parser.read(path, encoding='utf-8-sig')
    text = parser.get('mistamover', 'state_dir', fallback='mistamover-state')
    directory = kind_path(text, os.path.dirname(path))
    names = sorted(SharedJson(directory, 'status.json').read())
    if not names:
        raise error
    say_error(error)
    streams = [types.SimpleNamespace(name=name, status='running', move=False) for name in names
               if not args.stream or name in args.stream]
    settings = types.SimpleNamespace(state_dir=directory)
    command_status(types.SimpleNamespace(settings=settings, streams=streams), args, stop)
    return EXIT_USAGE


def parse_moment(text):
    """The epoch seconds of '2026-11-24', '2026-11-24T18:30' (local), '2d' (ago), or of a time in
    UTC as --history prints it.  Raises ConfigError."""
    if re.match(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$', text):
        with contextlib.suppress(ValueError):
            return epoch(text[:19] + (text[19:-1] or '.0') + 'Z')
    for form in ('%Y-%m-%d', '%Y-%m-%dT%H:%M', '%Y-%m-%d %H:%M', '%Y-%m-%dT%H:%M:%S'):
        with contextlib.suppress(ValueError):
            return time.mktime(time.strptime(text, form))
    try:
        return time.time() - parse_duration(text)
    except ValueError:
        raise ConfigError('%r is no moment' % text, 'write 2026-11-24, 2026-11-24T18:30, or 2d for '
                          'two days ago')


def command_history(config, args, _stop):
    """Search the ledger for items by a shell glob: what went where, when, and how much in all."""
    import fnmatch
    names = {stream.name for stream in config.streams}
    match = re.compile(fnmatch.translate(args.history)).match
    since, until = (utc_stamp(parse_moment(moment)) if moment else None
                    for moment in (args.since, args.until))
    items = size = 0
    for record in Ledger(config.settings.state_dir).read():
        when = record.get('time', '')
        if record.get('stream') not in names or since and when < since or until and when >= until or \
                not (match(record['item']) or match(os.path.basename(record['item']))):
            continue
        if record.get('outcome') == 'delivered':
            items, size = items + 1, size + record.get('size', 0)
        if args.json:
            say(to_json(record).decode())
        else:
            say('%s  %s  %s  %s -> %s  %s' % (
                when, record.get('stream'), record.get('outcome'), show(record['item']),
                show(record.get('target') or ''), format_size(record.get('size', 0))))
    if not args.json:
        say('%s delivered, %s' % (count_of(items, 'item'), format_size(size)))
    return EXIT_OK


def item_of(stream, path):
    """(name of the item that a path belongs to, relative path), or None if it lies elsewhere."""
    relative = os.path.relpath(os.path.join(os.path.realpath(os.path.dirname(path)),
                                            os.path.basename(path)), os.path.realpath(stream.root))
    if relative == b'.' or relative.split(b'/')[0] == b'..':
        return None
    return (relative if stream.items == 'files' else relative.split(b'/')[0]), relative


def reasons_by_name(scanner, name, relative):
    """Why something of this name would never be looked at."""
    stream = scanner.stream
    parts = relative.split(b'/')
    item = stream.items == 'files' and scanner.look(name)
    if parts[0] == KEPT_DIR:
        yield 'it is a copy of what was delivered, kept for keep_delivered'
    elif parts[0] == os.path.basename(to_bytes(stream.quarantine_dir)) and \
            os.path.dirname(to_bytes(stream.quarantine_dir)) == stream.root:
        yield 'it is in quarantine; the .reason file beside it says why'
    elif scanner.checks and scanner.checks.is_one(os.path.basename(name)):
        yield 'it is a check file: it follows what it is about'
    elif any(scanner.skip(part, not i) for i, part in enumerate(parts)):
        yield 'it is ignored: its name matches ignore (%s), or is one of our own or of the system' % (
            ', '.join(stream.ignore))
    elif item and item.is_directory:
        if not item.fault:
            yield 'each file in it is an item of its own (items = files): ask for one'
    elif not scanner.wanted(os.path.basename(name)):
        yield 'it is left alone: its name does not match only (%s)' % ', '.join(stream.only)


def reasons_by_state(stream, scanner, item, now):
    """Why an item that could be sent waits."""
    if item is None:
        yield 'it is left alone: symlinks and special files are not sent'
        return
    if item.fault:
        yield 'it cannot be read: %s' % item.fault
    if scanner.ready_pattern:
        before, after = scanner.ready_pattern
        head, base = os.path.split(item.name)
        ready = os.path.join(head, before + base + after)
        try:
            item.ready = Entry.of(ready, os.lstat(os.path.join(stream.root, ready)))
            if scanner.spent and scanner.spent.covers(item, item.ready):
                yield ('it waits for a new ready file: the %s that is here belongs to what was '
                       'delivered before' % show(ready))
        except OSError:
            if not scanner.is_ready_name(base):
                yield 'it waits for its ready file %s' % show(ready)
    if scanner.marker and not item.last:
        yield 'it waits for %s inside of it' % show(scanner.marker)
    if scanner.checks and not scanner.complete(item):
        yield 'it waits for its check file %s%s' % (
            show(scanner.checks.path_of(item.name)),
            ': the one that is here belongs to what was delivered before' if item.check else '')
    age = now - item.youngest_ns / 1e9
    if age < stream.settle_time:
        yield 'it is settling: it changed %s ago, settle_time is %s' % (
            format_duration(age), format_duration(stream.settle_time))
    try:
        check_unused(stream, item, Leases(stream))
    except MoverError as error:
        yield str(error)


def outlook(stream, item):
    """What the next pass does with an item that nothing holds back."""
    if stream.move:
        return 'it is due: the next pass sends it'
    taken = Taken(stream)
    if item.files and all(entry in taken for entry in item.files):
        return 'a reader took it from the target as soon as it was proven: it is sent again when it changes'
    return 'the next pass compares it with the target, and sends what differs'


def explain(config, stream, path, now):
    """Yield what is known of a path in a stream's incoming directory."""
    name, relative = item_of(stream, path)
    state_dir = config.settings.state_dir
    scanner = make_scanner(stream, StopRequest(), Spent(SharedJson(state_dir, 'spent.json'), stream))
    found = os.path.lexists(os.path.join(stream.root, relative))
    own = inside = None                 # the last record of it, and of a file in it (items = files)
    for record in Ledger(state_dir).read():
        if record.get('stream') == stream.name:
            if record['item'] == to_text(name):
                own = record
            elif record['item'].startswith(to_text(name) + '/'):
                inside = record
    last = own or inside
    if last:
        yield '%s%s at %s: %s' % ('' if own else 'of the files in it, the last one: ',
                                  last.get('outcome'), last.get('time'), show(last.get('target') or ''))
    if not found:
        quarantined = os.path.lexists(os.path.join(to_bytes(stream.quarantine_dir), name))
        yield 'it is in quarantine: %s' % show(stream.quarantine_dir) if quarantined else \
            'it is not here%s' % (' any more' if last else '; nothing of this name was ever delivered')
        return
    why = list(reasons_by_name(scanner, name, relative))
    yield from why
    if why:
        return
    waits = list(suspensions(stream)) + list(reasons_by_state(stream, scanner, scanner.look(name), now))
    failure = SharedJson(state_dir, 'failures.json').read().get(stream.name, {}).get(to_text(name))
    if failure:
        waits.append('it failed %s since %s: %s' % (
            count_of(failure['count'], 'time'), utc_stamp(failure['first']), failure['error']))
    status = SharedJson(state_dir, 'status.json').read().get(stream.name, {})
    if status.get('state') in ('down', 'stopped'):
        if status.get('note') not in waits:
            waits.append('the stream is %s: %s' % (status['state'], status.get('note')))
    elif status.get('last_error') and not failure:      # what does not count against an item: no room
        waits.append('the last trouble of this stream, at %s: %s' % (
            status.get('last_error_time'), status['last_error']))
    if not waits:
        waits.append(outlook(stream, scanner.look(name)))
    if not alive(status.get('pid')):
        waits.append('no MiStaMover works on this stream now%s' % (
            '; the last one was seen at %s' % status['updated'] if status.get('updated') else ''))
    yield from waits


def command_explain(config, args, _stop):
    """Why a file has not moved, or where it went."""
    path = to_bytes(os.path.abspath(args.explain))
    streams = [stream for stream in config.streams if item_of(stream, path)]
    for stream in streams:
        for line in explain(config, stream, path, time.time()):
            say('%s: %s' % (stream.name, show(line)))
    if not streams:
        whose = [stream.name for stream in config.streams if os.path.normpath(stream.root) == path]
        say('%s %s' % (show(path), 'is the directory of %s: name something in it, or see --status' %
                       ' and '.join(whose) if whose else 'lies in no stream\'s directory'))
    return EXIT_OK if streams else EXIT_FAILED


def command_test_alert(config, _args, _stop):
    """Send one alert by every way that is configured, at once."""
    import tempfile
    with tempfile.TemporaryDirectory(prefix='mistamover-') as scratch:
        alerts = Alerts(scratch, config)
        if not alerts.channels():
            raise ConfigError('neither [email] smarthost nor alert_command is set', 'set one of them')
        log.start('info')
        alerts.tell('info', 'this is a test, sent by --test-alert', always=True)
        failed = alerts.send_due(force=True)
        for name, _ in alerts.channels():
            say('%s: %s' % (name, 'FAILED' if name in failed else 'sent'))
    return EXIT_FAILED if failed else EXIT_OK


UNIT = """[Unit]
Description=MiStaMover: delivers what the instruments write
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
User=%(user)s
WorkingDirectory=%(place)s
ExecStart=%(command)s
ExecReload=/bin/kill -HUP $MAINPID
KillMode=mixed
Restart=always
RestartSec=30
WatchdogSec=10min
TimeoutStopSec=30
# To see who writes files that belong to other accounts, and nothing else, of root's rights
CapabilityBoundingSet=CAP_LEASE
AmbientCapabilities=CAP_LEASE
NoNewPrivileges=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectSystem=strict
ProtectHome=read-only
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
ProtectProc=invisible
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RemoveIPC=yes
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
# A leading "-": a directory that is missing, as of a disk that is not mounted, is no reason not to start
%(paths)s

[Install]
WantedBy=multi-user.target
"""


def command_print_rules(_config, _args, _stop):
    """Alert rules for Prometheus, made for the metrics of metrics_file."""
    say(rules_text().rstrip())
    return EXIT_OK


def unit_word(text):
    """A word of a unit file: quoted, % and $ kept from meaning anything (systemd.service(5))."""
    return '"%s"' % text.replace('\\', '\\\\').replace('"', '\\"').replace('%', '%%').replace('$', '$$')


def unit_user(config):
    """Who is to run it: whoever prints the unit or, if that is root, who owns the configuration."""
    import pwd
    owner = os.getuid() or os.stat(config.path).st_uid
    try:
        return pwd.getpwuid(owner).pw_name
    except KeyError:
        return str(owner)


def this_module():
    """(the program's directory, its file there, the name by which that can be imported or None)."""
    place, program = os.path.split(os.path.abspath(__file__))
    return place, program, program[:-3] if re.match(r'[A-Za-z_][A-Za-z0-9_]*\.py$', program) else None


def command_print_unit(config, args, _stop):
    """A hardened unit file for systemd, with write access to what the streams need."""
    place, program, module = this_module()
    # as a module where its name allows: Python loads the compiled form, and keeps no syntax tree, 30 MB
    start = ['-m', module] if module else [os.path.join(place, program)]
    words = [sys.executable] + start + ['--daemon', '--config', config.path]
    for name in args.stream:
        words += ['--stream', name]
    words += ['--' + args.mode] if args.mode else []
    paths = [directory for _, _, directory in own_places(config.settings)]
    for stream in config.streams:
        paths.append(stream.directory)
        if stream.move:
            paths.append(os.path.dirname(stream.quarantine_dir))
        if stream.protocol.target_form == 'here':
            paths.append(stream.target_base)
    unique = list(collections.OrderedDict.fromkeys(paths))
    say(UNIT % dict(
        user=unit_user(config), place=place.replace('%', '%%'), command=' '.join(map(unit_word, words)),
        paths='\n'.join('ReadWritePaths=%s' % unit_word('-' + path).replace('$$', '$') for path in unique)))
    return EXIT_OK


def ask(question, default=''):
    """A line from the terminal.  Raises ConfigError at its end."""
    try:
        return input('%s%s: ' % (question, ' [%s]' % default if default else '')).strip() or default
    except EOFError:
        raise ConfigError('no more answers', 'nothing was written')


INIT_QUESTIONS = collections.OrderedDict((      # option -> default; asked where it means anything
    ('directory', 'incoming'), ('transfer_protocol', 'rsync_ssh'), ('target_host', ''), ('target_port', ''),
    ('username', ''), ('password_file', ''), ('ssh_key', ''), ('tls', 'no'), ('target_dir', 'archive'),
    ('target_marker', ''), ('transfer_mode', 'move'), ('create_directories', 'no'), ('settle_time', '60s')))


def stream_option(name):
    return next(option for option in OPTIONS if option.section == 'stream' and option.name == name)


def init_asks(name, answers):
    """Whether a question makes sense after the answers so far."""
    protocol = TRANSPORTS[answers.get('transfer_protocol', 'rsync_ssh')]
    return (name != 'transfer_mode' or protocol.mirrors) and \
        means_something(stream_option(name), protocol, answers.get('transfer_mode', 'move'))


def ask_option(name, default, base):
    """The text of one option; what is no answer is asked for again.  base: the directory of the
    configuration."""
    option = stream_option(name)
    while True:
        text = ask('%s (%s)' % (name, option.text), default)
        try:
            to_text(text).encode('utf-8')
            if name == 'transfer_protocol':
                return one_of(*sorted(TRANSPORTS))(text, '')
            if text:
                value = option.kind(text, base)
                why = cannot_read(value) if name in ('password_file', 'ssh_key') else None
                if why:
                    raise ValueError(why)
            elif name in REQUIRED or name == 'target_host':
                raise ValueError('an answer is needed')
            return text
        except ValueError as error:
            say(str(error))


def stream_section(name, answers):
    """The lines of a stream's section; what another answer made pointless is left out."""
    return ['[stream:%s]' % name] + ['%s = %s' % (option, text.replace('$', '$$'))
                                     for option, text in answers.items()
                                     if text and init_asks(option, answers)]


def ask_stream(others, base):
    """(name, {option: text}) of a stream that is configured in a dialogue, seen and confirmed."""
    name = ask('a name for the stream', 'data' if not others else '')
    while not re.match(STREAM_NAME, name) or name in others:
        say('it is made of letters, digits, _ . and -, begins with a letter or a digit, and is no '
            'other stream\'s')
        name = ask('a name for the stream')
    answers = collections.OrderedDict()
    for option, default in INIT_QUESTIONS.items():
        if init_asks(option, answers):
            answers[option] = ask_option(option, default, base)
    while True:
        say('')
        for line in stream_section(name, answers):
            say(line)
        word = ask('\nIs this right?  yes, or the name of an option to correct', 'yes')
        if word == 'yes':
            return name, answers
        if word in INIT_QUESTIONS:
            answers[word] = ask_option(word, answers.get(word, INIT_QUESTIONS[word]), base)
        else:
            say('%s is none of %s' % (word, ', '.join(INIT_QUESTIONS)))


def command_init(args, stop):
    """Ask a few questions, write a configuration, try the targets, say what to type next."""
    path = os.path.abspath(args.config or config_beside())
    if os.path.lexists(path):
        raise ConfigError('%s exists already' % show(path), 'name another one with --config')
    import tempfile
    try:                    # before somebody has answered everything
        tempfile.TemporaryFile(dir=os.path.dirname(path)).close()
    except OSError as error:
        raise ConfigError('cannot write %s: %s' % (show(path), error.strerror),
                          'name another place with --config')
    say('This writes %s.  An empty answer takes what is in [brackets].' % show(path))
    streams = collections.OrderedDict()
    while not streams or ask('Another stream?  yes or no', 'no') == 'yes':
        name, answers = ask_stream(streams, os.path.dirname(path))
        streams[name] = answers
    lines = ['# Written by mistamover.py --init.  README.md has every other option.', '',
             '[mistamover]', 'state_dir = mistamover-state']
    for name, answers in streams.items():
        lines += [''] + stream_section(name, answers)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, 'w', encoding='utf-8') as handle:
            handle.write('\n'.join(lines) + '\n')
    except OSError as error:
        raise ConfigError('cannot write %s: %s' % (show(path), error.strerror))
    say('%s is written.  Trying every target:' % show(path))
    program = 'python3 %s' % show(sys.argv[0]) + (' --config %s' % show(args.config) if args.config else '')
    args.config = path
    code = command_check(read_config(args), args, stop)
    say('It works.  Type next:  %s --dry-run  and then  %s --once' % (program, program) if code == EXIT_OK
        else 'Fix what failed, in that file or at the target, and type:  %s --check' % program)
    return code


def wait_for_report(reader):
    """The parent of --background: say what the child says, and end with its exit code."""
    for number in HELD_BACK:
        signal.signal(number, signal.SIG_DFL)
    report = b''
    while True:
        piece = os.read(reader, 4096)
        if not piece:
            break
        report += piece
    code, text = (report[0], report[1:]) if report else (EXIT_FAILED, b'it ended at once, see the log')
    if text:
        say('mistamover: %s' % show(text), sys.stderr)
    os._exit(code)


def fork_twice():
    """Go to the background; in the child only: a descriptor for the report that the parent waits for."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        wait_for_report(reader)
    os.close(reader)
    os.setsid()
    if os.fork():
        os._exit(EXIT_OK)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    return writer


def detach(config):
    """Go to the background; returns report(exit code or None, text) in the child only.

    The parent waits for the report: None once a stream runs, else why none does.
    """
    if WINDOWS:
        raise ConfigError('--background does not work on Windows', 'use the task scheduler')
    if not config.settings.log_file:
        raise ConfigError('--background needs a log_file in [mistamover]', 'else nobody hears of it')
    make_private_directory(config.settings.state_dir)
    path = os.path.join(config.settings.state_dir, 'mistamover.pid')
    writer, reported = fork_twice(), []

    def report(code, text=''):
        if not reported:
            if code is None:
                try:
                    atomic_write(path, b'%d\n' % os.getpid())
                except OSError as error:
                    log.error('cannot write the pid file %s: %s' % (show(path), error.strerror))
            reported.append(code)
            with contextlib.suppress(OSError):      # who waited may be gone
                os.write(writer, bytes([code or EXIT_OK]) + to_bytes(text)[:3000])
            os.close(writer)
        elif code is not None and reported == [None]:
            with contextlib.suppress(OSError):
                with open(path, 'rb') as handle:
                    if handle.read() == b'%d\n' % os.getpid():     # not another daemon's
                        os.unlink(path)

    return report


def load_modules(config):
    """Import here what the threads will need: an import that a thread begins may meet another."""
    names = {'fnmatch', 'glob', 'hashlib', 'json', 'random', 'select', 'shutil', 'socket',
             'encodings.ascii', 'encodings.cp437', 'encodings.latin_1', 'encodings.unicode_escape',
             'unicodedata', 'msvcrt' if WINDOWS else 'fcntl'}
    protocols = [stream.protocol for stream in config.streams]
    far = config.email.smarthost or any('network' in protocol.takes.split() for protocol in protocols)
    if far or config.settings.alert_command or any(stream.after_delivery for stream in config.streams):
        names.update(('encodings.idna', 'queue', 'subprocess', 'tempfile'))
    for stream in config.streams:
        names.update(stream.protocol.modules, ('zipfile', 'struct') if stream.zips else (),
                     ('ssl',) if stream.tls else ())
    if config.settings.status_page:
        names.add('html')
    if config.email.smarthost:
        names.update(('email.message', 'email.utils', 'smtplib', 'ssl'))
    for name in sorted(names):
        __import__(name)


def collect_seldom():
    """Items come by the ten thousand and are no garbage: to look among them for cycles after each 700
    new ones, and among all that was compiled, takes a twentieth of a pass."""
    import gc
    gc.set_threshold(10000, 3, 3)       # all of it after about as many new ones as by default


def start_as_module():
    """Begin again, in this process, as a module: Python (3.9 and newer) keeps the syntax tree of a script
    for as long as it runs, 30 MB.  Signals are held back meanwhile, and stay so.  What cannot be is left."""
    place, program, module = this_module()
    plain = getattr(sys, 'orig_argv', [])[1:] == sys.argv       # no options for Python itself
    if __name__ == '__main__' and plain and module and not WINDOWS:
        code = 'import sys; sys.path[0], sys.argv[0] = %a, %a; import %s as m; m.leave(m.main())  # %s' % (
            place, sys.argv[0], module, program)
        with contextlib.suppress(OSError):
            os.execv(sys.executable, [sys.executable, '-c', code] + sys.argv[1:])


def give_back_memory():
    """To the system, what compiling this file took where Python found no compiled form (malloc_trim(3))."""
    with contextlib.suppress(OSError):
        c_call('malloc_trim', 0)


def command_run(args, stop):
    """One pass, or the eternal loop."""
    if args.daemon:
        start_as_module()
    with signals_recorded(stop, args.daemon) as waiting:
        config = read_config(args)
        start_log(config)       # while there is still a terminal to complain to
        report = detach(config) if args.background else lambda code, text='': None
        try:
            load_modules(config)
            collect_seldom()
            if args.daemon:
                give_back_memory()
            supervisor = Supervisor(config, lambda: read_config(args), args.daemon, stop, waiting, report)
            code = supervisor.run()
        except MoverError as error:
            report(error.exit_code, str(error))
            raise
        report(code, supervisor.why())
    return code


# ----------------------------------------------------------------------------------------
# 20  command line
# ----------------------------------------------------------------------------------------

DESCRIPTION = """\
Mirror, stage or move data from the machine that produces it to the machine
that keeps it.  The default transfer mode is move: a source is deleted after
its verified delivery."""

EPILOG = """\
exit codes:
  0         everything due was delivered, or nothing was due
  1         something could not be delivered
  2         usage or configuration error, nothing was touched
  3         nothing failed, but another instance holds a stream that was due
  129, 130, 143  interrupted

signals:
  TERM, INT end it within seconds, children included
  HUP       to a daemon: read the configuration again, open log_file again
  TSTP      (Ctrl-Z) stops it and the programs it started, CONT (fg) goes on

examples:
  mistamover.py --init                      write a configuration
  mistamover.py --check                     is every target ready?
  mistamover.py --dry-run                   what would go where?
  mistamover.py --daemon --stream detector  one stream, for ever
  mistamover.py --explain incoming/run7.dat why is it still here?
  mistamover.py --history 'run7*' --since 2d"""


def make_parser():
    import argparse
    parser = argparse.ArgumentParser(
        prog='mistamover.py', add_help=False, description=DESCRIPTION, epilog=EPILOG,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 24, 79),
        usage='mistamover.py [--once | --daemon | COMMAND] [-c FILE] [-s NAME] [more]')
    group = parser.add_argument_group('how often (one of)')
    how = group.add_mutually_exclusive_group()
    how.add_argument('--once', '--one-off', action='store_true', help='one pass over every stream (default)')
    how.add_argument('--daemon', action='store_true', help='the eternal loop, in the foreground')
    group.add_argument('--background', action='store_true', help='with --daemon: detach, write a pid file')
    mode = parser.add_argument_group('what happens to the source (one of)').add_mutually_exclusive_group()
    mode.add_argument('--move', dest='mode', action='store_const', const='move',
                      help='override transfer_mode: delete sources after delivery')
    mode.add_argument('--mirror', dest='mode', action='store_const', const='mirror',
                      help='override transfer_mode: delete nothing')
    group = parser.add_argument_group('which configuration')
    group.add_argument('-c', '--config', metavar='FILE', help='default: mistamover.ini beside this '
                       'program, else /etc/mistamover.ini')
    group.add_argument('-s', '--stream', metavar='NAME', action='append', default=[],
                       help='only this stream (repeatable)')
    group = parser.add_argument_group('commands that transfer nothing (one of)')
    what = group.add_mutually_exclusive_group()
    what.add_argument('--dry-run', action='store_true', help='say what would be done, change nothing')
    what.add_argument('--check', action='store_true', help='check the configuration, then every target')
    what.add_argument('--status', action='store_true', help='what each stream is doing')
    what.add_argument('--history', metavar='GLOB', nargs='?', const='*',
                      help='search the ledger: what went where, when')
    what.add_argument('--explain', metavar='PATH', help='why has this file not moved, or where is it?')
    what.add_argument('--init', action='store_true', help='ask a few questions, write a configuration')
    what.add_argument('--test-alert', action='store_true', help='send one alert, by mail and command')
    what.add_argument('--print-unit', action='store_true', help='print a unit file for systemd')
    what.add_argument('--print-rules', action='store_true', help='print alert rules for Prometheus')
    group.add_argument('--since', metavar='TIME', help='with --history: from 2026-11-24, '
                       '2026-11-24T18:30, or 2d (ago) on')
    group.add_argument('--until', metavar='TIME', help='with --history: before that time')
    group.add_argument('--json', action='store_true', help='with --status, --history: for machines')
    group = parser.add_argument_group('other')
    loud = group.add_mutually_exclusive_group()
    loud.add_argument('-v', '--verbose', action='store_true', help='more on the terminal')
    loud.add_argument('-q', '--quiet', action='store_true', help='only warnings and errors')
    group.add_argument('-h', '--help', action='help', help='show this and exit')
    group.add_argument('--version', action='version', version='MiStaMover ' + __version__,
                       help='show the version and exit')
    return parser


def open_standard_streams():
    """Whoever started us may have closed some (2>&-); what is opened next must not become one."""
    for fd, name in ((0, 'stdin'), (1, 'stdout'), (2, 'stderr')):
        try:
            os.fstat(fd)
        except OSError:
            while os.open(os.devnull, os.O_RDWR) < fd:
                pass
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, 'w' if fd else 'r', closefd=False))


def chosen_command(parser, args):
    """The function of a command line, None for a run.  Exits with 2 if it makes no sense."""
    if args.background and not args.daemon:
        parser.error('--background goes with --daemon')
    if args.json and not (args.status or args.history is not None):
        parser.error('--json goes with --status or --history')
    if (args.since or args.until) and args.history is None:
        parser.error('--since and --until go with --history')
    if args.explain == '':
        parser.error('--explain needs a path')
    return next((command for chosen, command in (
        (args.dry_run, command_dry_run), (args.check, command_check), (args.status, command_status),
        (args.history is not None, command_history), (args.explain, command_explain),
        (args.test_alert, command_test_alert), (args.print_unit, command_print_unit),
        (args.print_rules, command_print_rules))
        if chosen), None)


def run_command(command, args, stop):
    """Everything but a run: nothing has to be ended in order, so Ctrl-C ends it at once."""
    if args.init:
        return command_init(args, stop)
    try:
        config = read_config(args)
    except ConfigError as error:
        if args.status:
            return status_of_broken(args, error, stop)
        raise
    return command(config, args, stop)


def main(argv=None):
    """The exit code of a command line."""
    open_standard_streams()
    parser = make_parser()
    args = parser.parse_args(argv)
    command, stop = chosen_command(parser, args), StopRequest()
    try:
        if not (command or args.init):
            return command_run(args, stop)
        with signals_let_in():
            return run_command(command, args, stop)
    except MoverError as error:
        log.clear_line()
        say_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:         # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


def leave(code):
    """End at once: in the interpreter's own shutdown a thread that still writes to standard error
    would abort the process (a daemon thread and a locked stream)."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):      # closed, or nobody reads
            stream.flush()
    os._exit(code)


if __name__ == '__main__':
    leave(main())
