"""Lists what `make reset` kept of an exercise, and brings one of these files back."""

import shutil
import time
from pathlib import Path

from rich.table import Table

from harness.commands.request import one_exercise
from harness.commands.reset import is_starter, keep
from harness.model.exercise import Exercise, UsageError
from harness.model.paths import ATTEMPTS, shown
from harness.report import terminal


def run(ex: str, restore: str) -> int:
    """Lists the attempts at the one exercise that EX names, or restores the one that RESTORE names."""
    exercise = one_exercise("attempts", ex)
    if restore.strip():
        print(restored(exercise, restore.strip()))
    else:
        show(exercise)
    return 0


def kept(exercise: Exercise) -> list[Path]:
    """The files that were kept of an exercise, the oldest first."""
    stem = exercise.file_name.removesuffix(".py")
    found = [path for path in ATTEMPTS.glob(f"{stem}_*.py") if path.is_file() and not path.is_symlink()]
    return sorted(found, key=lambda path: (path.stat().st_mtime, path.name))


def show(exercise: Exercise) -> None:
    """A line per attempt: its name, when it was last changed, its length."""
    out, there = terminal.console(), kept(exercise)
    if not there:
        number = exercise.number
        terminal.line(
            out, f"{exercise.id}: no attempts yet; make reset EX={number} keeps your file when it starts over"
        )
        return
    table = Table("", "attempt", "last changed", "lines", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, path in enumerate(there, start=1):
        lines = path.read_bytes().count(b"\n")
        table.add_row(
            str(number), path.stem, time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime)), str(lines)
        )
    out.print(table)
    terminal.line(out, f"one back: make attempts EX={exercise.number} RESTORE={len(there)}; yours is kept first")


def restored(exercise: Exercise, name: str) -> str:
    """Copies an attempt to the exercise's place, whose file is kept as an attempt first; what was done, in words.

    Raises:
        UsageError: there is no such attempt, or it cannot be copied.
    """
    names = {name: path for number, path in enumerate(kept(exercise), start=1) for name in (str(number), path.stem)}
    found = names.get(Path(name).name.removesuffix(".py"))
    if found is None:
        raise UsageError(f"RESTORE={name}: no such attempt; make attempts EX={exercise.number} lists them")
    if exercise.file.is_file() and exercise.file.read_bytes() == found.read_bytes():
        return f"{shown(exercise.file)} equals {shown(found)} already"
    try:
        exercise.file.parent.mkdir(exist_ok=True)
        old = None if is_starter(exercise, exercise.file) else keep(exercise.file)
        shutil.copyfile(found, exercise.file)
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}; nothing was lost, make doctor says more") from None
    where = f"; the file before is {shown(old)}" if old is not None else ""
    return f"{shown(exercise.file)} is {shown(found)} again{where}"
