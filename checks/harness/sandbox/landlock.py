"""Takes from a process and all that it starts the right to write to files, by Linux's Landlock; elsewhere nothing
happens.

What a submission cannot write to, it cannot leave for later: the checks, the tools, the gradesheet, a hosting service's
files, the descriptors of its parents under /proc.
"""

import ctypes
import os
import sys
from pathlib import Path

_PR_SET_NO_NEW_PRIVS = 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1
_WRITE_FILE = 1 << 1
# Removing and making of each kind of file (bits 4 to 12); truncating came with the interface's third version.
_CHANGES = _WRITE_FILE | sum(1 << bit for bit in range(4, 13))
_TRUNCATE, _TRUNCATE_SINCE = 1 << 14, 3
_DEVICES = ("/dev/null", "/dev/zero", "/dev/tty", "/dev/shm")


class _Rule(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def write_only_below(folder: Path) -> bool:
    """From now on this process writes to files below `folder` only, and gains no rights by running programs.

    Returns:
        Whether the system does that.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE_RULESET, None, 0, _VERSION)
    if version < 1 or libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    handled = _CHANGES | (_TRUNCATE if version >= _TRUNCATE_SINCE else 0)
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(ctypes.c_uint64(handled)), 8, 0)
    if ruleset < 0:
        return False
    for path in (folder, *map(Path, _DEVICES)):
        if path.exists():
            parent = os.open(path, os.O_PATH)
            allowed = handled if path.is_dir() else handled & (_WRITE_FILE | _TRUNCATE)
            libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(_Rule(allowed, parent)), 0)
            os.close(parent)
    restricted = libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return restricted
