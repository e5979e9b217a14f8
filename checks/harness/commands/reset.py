"""Brings an exercise's starter back and keeps the old work."""

import time
from pathlib import Path

from harness.commands.request import one_exercise
from harness.model.exercise import Exercise, UsageError
from harness.model.paths import ATTEMPTS, shown
from harness.model.submission import LoadError, read


def keep(path: Path) -> Path | None:
    """Moves a file into `attempts/` under a name that carries the time and overwrites nothing; None if there is no
    file.
    """
    if not path.is_symlink() and not path.exists():
        return None
    ATTEMPTS.mkdir(exist_ok=True)
    base = f"{path.stem}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    for number in range(1, 1000):
        kept = ATTEMPTS / f"{base}{'' if number == 1 else f'_{number}'}.py"
        if not kept.exists() and not kept.is_symlink():
            path.rename(kept)
            return kept
    raise UsageError(f"{ATTEMPTS.name}/ holds 999 files of this second; nothing was moved")


def is_starter(exercise: Exercise, path: Path) -> bool:
    """Whether there is nothing of the learner's in a file, however its lines end."""
    try:
        return read(path) == exercise.starter
    except LoadError:
        return False


def reset(exercise: Exercise) -> str:
    """Puts the starter in place of the learner's file; returns what was done, in words."""
    path = exercise.file
    if is_starter(exercise, path):
        return f"{shown(path)} is the starter already"
    path.parent.mkdir(exist_ok=True)
    kept = keep(path)
    path.write_text(exercise.starter, encoding="utf-8")
    where = f"; the old file is {shown(kept)}" if kept else ""
    return f"{shown(path)} is the starter again{where}"


def run(ex: str) -> int:
    """Resets the one exercise that EX names."""
    exercise = one_exercise("reset", ex)
    try:
        print(reset(exercise))
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}; nothing was lost, make doctor says more") from None
    return 0
