"""Takes from a process and all that it starts most rights to files, by Linux's Landlock; elsewhere nothing happens.

What a submission cannot write to, it cannot leave for later: the checks, the tools, the gradesheet, a hosting service's
files, the descriptors of its parents under /proc. What it cannot read, it cannot copy: answers, banks, git's history.
And it starts no programs.
"""

import ctypes
import os
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_PR_SET_NO_NEW_PRIVS = 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_FOLDER = (1 << bit for bit in range(4))
_READ = _READ_FILE | _READ_FOLDER
# Removing and making of each kind of file (bits 4 to 12); truncating came with the interface's third version.
_CHANGES = _WRITE_FILE | sum(1 << bit for bit in range(4, 13))
_TRUNCATE, _TRUNCATE_SINCE = 1 << 14, 3
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
_WRITABLE = ("/dev/null", "/dev/zero", "/dev/tty", "/dev/shm")
_SYSTEM = ("/bin", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/proc/self", "/proc/cpuinfo", "/sys/devices", "/usr")


class _Rule(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


@cache
def version() -> int:
    """The version of Landlock's interface; 0 where the system has none."""
    if sys.platform != "linux":
        return 0
    return max(0, ctypes.CDLL(None).syscall(_CREATE_RULESET, None, 0, _VERSION))


def confine(room: Path, *readable: Path) -> None:
    """From now on this process writes below `room` only, reads that, what is `readable`, Python, its packages and the
    system, and starts no programs. Where the system has no Landlock nothing happens.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not version() or libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return
    changes = _CHANGES | (_TRUNCATE if version() >= _TRUNCATE_SINCE else 0)
    handled = _EXECUTE | _READ | changes
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(ctypes.c_uint64(handled)), 8, 0)
    rights = {path: _READ for path in (*readable, *_readable())}
    rights |= {path: _READ | changes for path in (room, *map(Path, _WRITABLE))}
    for path, allowed in rights.items():
        if path.exists():
            parent = os.open(path, os.O_PATH)
            rule = _Rule(allowed if path.is_dir() else allowed & _OF_FILES, parent)
            libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0)
            os.close(parent)
    libc.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _readable() -> Iterator[Path]:
    """Python and its packages, and what any program needs of the system."""
    yield from map(Path, _SYSTEM)
    yield Path(sys.base_prefix, "lib")
    yield from (Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
