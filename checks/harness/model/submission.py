"""Reads one file of a submission: any folder with files named like the exercises."""

import traceback
from pathlib import Path

from harness.model.limits import FILE_BYTES, LINE_CHARACTERS, MESSAGE_LINES

# What stands beside a text that was cut: that it was, and where it comes from.
_BESIDE = 4


class LoadError(Exception):
    """A submission's file cannot be used. `line` is where, 0 if nowhere in particular; `missing` says that there is
    no file at all.
    """

    def __init__(self, fact: str, line: int = 0, *, missing: bool = False) -> None:
        super().__init__(fact)
        self.fact = fact
        self.line = line
        self.missing = missing


def read(path: Path) -> str:
    """The text of a submission's file.

    Raises:
        LoadError: the file is missing, a link, no regular file, unreadable, too large or not UTF-8 text.
    """
    if path.is_symlink():
        raise LoadError("is a link; a regular file is wanted")
    if not path.exists():
        raise LoadError(f"no file{_near(path)}", missing=True)
    if not path.is_file():
        raise LoadError("is not a regular file")
    try:
        if path.stat().st_size > FILE_BYTES:
            raise LoadError(f"is {path.stat().st_size:,} bytes long; at most {FILE_BYTES:,} are read")
        data = path.read_bytes()
    except OSError as error:
        raise LoadError(f"cannot be read: {error.strerror}") from None
    if b"\0" in data:
        raise LoadError("holds null bytes", data[: data.index(b"\0")].count(b"\n") + 1)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise LoadError(f"is not UTF-8 text (byte {error.start})", data[: error.start].count(b"\n") + 1) from None


def near(name: str, wanted: str) -> bool:
    """Whether a file's name may mean another one: "Ex01_….py" or "ex01_… (1).py" that of exercise 1."""
    return name.lower().startswith(wanted[: len("exNN")])


def _near(path: Path) -> str:
    """Names a file that was meant, perhaps: "Ex01_….py", "ex01_… (1).py"."""
    found = sorted(one.name for one in path.parent.glob("*.py") if near(one.name, path.name))
    return f" of this name; {found[0]} is there, rename it" if found else ""


def isolated(path: Path, folder: Path) -> Path:
    """Copies a submission's file, alone, into `folder` and returns that; the file's own folder if it cannot be read,
    so that its checks say why.
    """
    try:
        text = read(path)
    except LoadError:
        return path.parent
    (folder / path.name).write_text(text, encoding="utf-8")
    return folder


def bounded(text: str) -> str:
    """A text of the learner's making, cut to what people read."""
    lines = text[: 2 * MESSAGE_LINES * LINE_CHARACTERS].splitlines()
    if len(lines) <= MESSAGE_LINES + _BESIDE and all(len(line) <= LINE_CHARACTERS for line in lines):
        return text
    kept = "\n".join(line[:LINE_CHARACTERS] for line in lines[:MESSAGE_LINES])
    return f"{kept}\n… cut: {len(text):,} characters in all"


def describe(error: BaseException) -> str:
    """An exception as `Type: text`, whatever its `__str__` does."""
    name = type(error).__name__
    try:
        text = str(error).strip()
    except BaseException:
        return f"{name} (whose text cannot be had)"
    return f"{name}: {bounded(text)}" if text else name


def line_in(error: BaseException | None, path: Path) -> int:
    """The deepest line of the file `path` that an exception passed through, or 0."""
    steps = traceback.walk_tb(error.__traceback__) if error is not None else ()
    lines = [line for frame, line in steps if frame.f_code.co_filename == str(path)]
    return lines[-1] or 0 if lines else 0
