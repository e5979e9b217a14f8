"""Remembers the last verdicts on `exercises/`, so that a save re-judges the saved exercise only."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from harness.model.exercise import Exercise, exercises
from harness.model.paths import BUILD, CHECKS, TOP, shown, write_whole
from harness.model.results import ExerciseVerdict, Result, verdict_of

FILE = BUILD / "verdicts.json"
# What a save is judged by. Commands and reports only show it; a bench measures.
_JUDGING_ROOMS = ("model", "sandbox", "testing", "runner")
_NOT_JUDGING = ("bench.py", "demo.py")
_OWN_TESTS = 5
Stamp = tuple[int, int]
MISSING: Stamp = (0, 0)


def stamp(path: Path) -> Stamp:
    """What changes with every save of a file: modification time in nanoseconds and inode; MISSING where there is no
    file.
    """
    try:
        status = path.lstat()
    except OSError:
        return MISSING
    return status.st_mtime_ns, status.st_ino


@cache
def checks_version() -> str:
    """A short digest of everything that judges: the checks, the rooms that run them, the banks, the answers."""
    digest = hashlib.sha256()
    for path in judging_files():
        digest.update(path.relative_to(TOP).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def judging_files() -> list[Path]:
    """The files that a verdict depends on, besides the learner's own, in order."""
    found = [CHECKS / "pytest.ini", CHECKS / "conftest.py", TOP / "pyproject.toml", TOP / "requirements.txt"]
    found += [path for room in _JUDGING_ROOMS for path in (CHECKS / "harness" / room).glob("*.py")]
    for exercise in exercises().values():
        of_it = [exercise.answer_file, *exercise.folder.rglob("*.py")]
        found += [path for path in of_it if path.name not in _NOT_JUDGING and path.exists()]
    return sorted(found)


def fingerprint() -> tuple[tuple[str, Stamp], ...]:
    """Changes whenever a file is saved that the fork server has loaded, or that judges: as cheap to compare as
    `checks_version` is sure.
    """
    harness = (CHECKS / "harness").rglob("*.py")
    return tuple((str(path), stamp(path)) for path in sorted({*judging_files(), *harness}))


@dataclass(frozen=True)
class Entry:
    """One judging of one exercise, as it is kept.

    Args:
        stamp: the file's stamp when judging began.
        untouched: the file was the starter.
        seconds: how long judging took.
        results: one per check.
    """

    stamp: Stamp
    untouched: bool
    seconds: float
    results: tuple[Result, ...]

    def verdict(self, exercise: Exercise) -> ExerciseVerdict:
        """The verdict that follows from it."""
        return verdict_of(exercise, self.results, untouched=self.untouched, seconds=self.seconds)


class OwnTests:
    """Results on the last own tests of an exercise by the digest of what they depend on, with the test's line then."""

    def __init__(self, kept: dict[str, tuple[int, list[Result]]] | None = None) -> None:
        self.kept = kept or {}

    def find(self, digest: str, line: int) -> list[Result]:
        """What is known of the own test, which begins at `line` now; nothing if it is another one."""
        then, results = self.kept.get(digest, (line, []))
        return [replace(one, line=one.line and one.line + line - then) for one in results]

    def keep(self, digest: str, line: int, results: Iterable[Result]) -> None:
        """Keeps what follows from the test alone: not that the file does not load, nor a process that died."""
        found = list(results)
        if digest and not any(one.kind in ("load", "no file") or one.outcome == "error" for one in found):
            self.kept = dict([*self.kept.items(), (digest, (line, found))][-_OWN_TESTS:])


class VerdictCache:
    """The last entry of each exercise, and its last own tests. Another version of the checks empties it."""

    def __init__(self, version: str, file: Path = FILE) -> None:
        self._file = file
        self._version = version
        self.entries: dict[str, Entry] = {}
        self.own_tests: dict[str, OwnTests] = {exercise: OwnTests() for exercise in exercises()}
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            if stored["version"] == version:
                self.entries = {name: _entry(fields) for name, fields in stored["exercises"].items()}
                self.own_tests |= {name: OwnTests(_of_digests(kept)) for name, kept in stored["own tests"].items()}
        except (OSError, ValueError, KeyError, TypeError):
            self.entries = {}  # No cache, or not one of ours: everything is judged anew.

    def verdict(self, exercise: Exercise, path: Path) -> ExerciseVerdict | None:
        """The verdict on the file as it is now, if there is one."""
        return None if self.stale(exercise, path) else self.entries[exercise.id].verdict(exercise)

    def stale(self, exercise: Exercise, path: Path) -> bool:
        """Whether the file has no verdict of its present state."""
        entry = self.entries.get(exercise.id)
        return entry is None or entry.stamp != stamp(path)

    def store(self, exercise: Exercise, entry: Entry) -> str:
        """Keeps an entry, on disk at once and as a whole; returns why it could not be kept there, in a sentence."""
        self.entries[exercise.id] = entry
        stored = {
            "version": self._version,
            "exercises": self.entries,
            "own tests": {name: tests.kept for name, tests in self.own_tests.items()},
        }
        try:
            write_whole(self._file, json.dumps(stored, default=vars))
        except OSError as error:
            return f"{shown(self._file)} cannot be written ({error.strerror}): the verdict is not kept"
        return ""


def _of_digests(stored: dict[str, Any]) -> dict[str, tuple[int, list[Result]]]:
    return {digest: (int(line), [Result(**one) for one in found]) for digest, (line, found) in stored.items()}


def _entry(fields: dict[str, Any]) -> Entry:
    results = tuple(Result(**result) for result in fields["results"])
    return Entry(**{**fields, "stamp": tuple(fields["stamp"]), "results": results})
