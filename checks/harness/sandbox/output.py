"""Where a child's output goes: a file, never a pipe, so that nothing can block on it; of it the last lines are kept."""

import io
import os
import sys
import tempfile
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_KEPT_LINES, _KEPT_CHARACTERS = 20, 500
_KEPT_BYTES = 20_000
# Far below the largest file that a worker may write: a check that prints much is slow, and no error.
_MOST_BYTES = 2 << 20


class _Latest(io.FileIO):
    """A file that forgets what it holds when it gets long."""

    def write(self, data: "ReadableBuffer") -> int:
        """Writes all of it, or of what is long the end."""
        view = memoryview(data).cast("B")
        if self.tell() + len(view) > _MOST_BYTES:
            self.seek(0)
            self.truncate()
        super().write(view[-_MOST_BYTES:])
        return len(view)


class Output:
    """Takes over this process's standard output and error."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()

    def redirect(self) -> None:
        """Points both streams at the file, whatever became of them, and empties it."""
        print_to(self._file.fileno())
        os.ftruncate(self._file.fileno(), 0)
        os.lseek(self._file.fileno(), 0, os.SEEK_SET)

    def tail(self) -> str:
        """The last lines since then."""
        with suppress(Exception):
            sys.stdout.flush()
        return tail(self._file.fileno())


def print_to(descriptor: int) -> None:
    """Points both streams at a file, whatever became of them."""
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    latest = io.BufferedWriter(_Latest(1, "w", closefd=False))
    sys.stdout = sys.stderr = io.TextIOWrapper(latest, encoding="utf-8", errors="replace")


def tail(descriptor: int) -> str:
    """The last lines of a file, without what a terminal would not print."""
    size = os.fstat(descriptor).st_size
    start = max(0, size - _KEPT_BYTES)
    text = os.pread(descriptor, size - start, start).decode("utf-8", "replace")
    return "\n".join(line[:_KEPT_CHARACTERS] for line in printable(text).splitlines()[-_KEPT_LINES:])


def printable(text: str) -> str:
    """A text without what a terminal would obey rather than print."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
