"""Where a child's output goes: a file, never a pipe, so that nothing can block on it; of it the last lines are kept."""

import os
import sys
import tempfile
from contextlib import suppress

_KEPT_LINES, _KEPT_CHARACTERS = 20, 500
_KEPT_BYTES = 20_000


class Output:
    """Takes over this process's standard output and error."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()

    def redirect(self) -> None:
        """Points both streams at the file, whatever became of them, and empties it."""
        for descriptor in (1, 2):
            os.dup2(self._file.fileno(), descriptor)
        sys.stdout = sys.stderr = open(1, "w", closefd=False, errors="replace")
        os.ftruncate(self._file.fileno(), 0)
        os.lseek(self._file.fileno(), 0, os.SEEK_SET)

    def tail(self) -> str:
        """The last lines since then."""
        with suppress(Exception):
            sys.stdout.flush()
        return tail(self._file.fileno())


def tail(descriptor: int) -> str:
    """The last lines of a file, without what a terminal would not print."""
    size = os.fstat(descriptor).st_size
    start = max(0, size - _KEPT_BYTES)
    text = os.pread(descriptor, size - start, start).decode("utf-8", "replace")
    return "\n".join(line[:_KEPT_CHARACTERS] for line in printable(text).splitlines()[-_KEPT_LINES:])


def printable(text: str) -> str:
    """A text without what a terminal would obey rather than print."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
