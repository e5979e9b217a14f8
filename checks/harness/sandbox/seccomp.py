"""Takes from a process, by Linux's seccomp, the means to fork, to run programs and to reach others over a socket; its
threads stay. However it asks: through Python, C, or a library. Where the system has none, nothing happens.
"""

import ctypes
import platform
import struct
import sys

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2
_CLONE_THREAD, _AF_UNIX = 0x10000, 1
_EPERM, _ENOSYS = 1, 38
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
# The architecture's name in seccomp; the numbers of clone, clone3 and socket; those that are refused whatever they ask.
_CALLS = {
    "x86_64": (0xC000003E, 56, 435, 41, (57, 58, 59, 322, 42)),  # fork, vfork, execve, execveat, connect
    "aarch64": (0xC00000B7, 220, 435, 198, (221, 281, 203)),  # execve, execveat, connect
}


def alone() -> None:
    """From now on this process starts no other and talks to none, for good."""
    if sys.platform != "linux" or platform.machine() not in _CALLS:
        return
    architecture, clone, clone3, socket, refused = _CALLS[platform.machine()]
    # Each line: code, how many lines to skip if it holds, if it does not, and the number that it looks for.
    lines = [(_LOAD, 0, 0, _ARCHITECTURE), (_JUMP_IF_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    lines += [(_LOAD, 0, 0, _NUMBER)]
    for call in refused:
        lines += [(_JUMP_IF_EQUAL, 0, 1, call), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    # Its flags lie where no filter can look; whoever is told that it is not there takes clone.
    lines += [(_JUMP_IF_EQUAL, 0, 1, clone3), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    lines += [(_JUMP_IF_EQUAL, 0, 4, clone), (_LOAD, 0, 0, _FIRST_ARGUMENT), (_JUMP_IF_SET, 1, 0, _CLONE_THREAD)]
    lines += [(_RETURN, 0, 0, _ERRNO | _EPERM), (_RETURN, 0, 0, _ALLOW)]
    lines += [(_JUMP_IF_EQUAL, 0, 3, socket), (_LOAD, 0, 0, _FIRST_ARGUMENT), (_JUMP_IF_EQUAL, 1, 0, _AF_UNIX)]
    lines += [(_RETURN, 0, 0, _ERRNO | _EPERM), (_RETURN, 0, 0, _ALLOW)]
    program = b"".join(struct.pack("HBBI", *line) for line in lines)
    room = ctypes.create_string_buffer(program)
    pointer = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(room))
    libc = ctypes.CDLL(None)
    if not libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        libc.prctl(_PR_SET_SECCOMP, _FILTER, pointer, 0, 0)
