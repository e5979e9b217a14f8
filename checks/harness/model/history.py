"""What happened, kept in one small file for the learner alone: it is never graded and never sent.

`practice/progress.json` holds for each exercise how often it was judged after a save, the time at work, when each
requirement was earned and lost, and the hints that were shown.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.model.cache import MISSING, Stamp
from harness.model.exercise import UsageError
from harness.model.paths import PRACTICE, shown, write_whole
from harness.model.results import ExerciseVerdict

FILE = PRACTICE / "progress.json"
# A longer time between two saves is no time at work.
PAUSE_SECONDS = 600.0


@dataclass(frozen=True)
class Change:
    """A requirement that was earned, or lost, at a time in seconds since 1970."""

    at: float
    requirement: str
    earned: bool


@dataclass
class Hint:
    """How many hints on a requirement were shown, and the digest of the file as it was at the last one."""

    shown: int
    digest: str


@dataclass
class Track:
    """What happened with one exercise.

    Args:
        saves: how often a saved file was judged.
        seconds: at work.
        last: when the last save was judged, and the file's `stamp` then.
        earned: the requirements that are earned now.
        changes: in order of time.
        hints: by requirement.
    """

    saves: int = 0
    seconds: float = 0.0
    last: float = 0.0
    stamp: Stamp = MISSING
    earned: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    hints: dict[str, Hint] = field(default_factory=dict)


def load(file: Path = FILE) -> dict[str, Track]:
    """What is known of each exercise by id.

    Raises:
        UsageError: the file is there and cannot be read, or is not one of ours.
    """
    try:
        stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return {name: _track(fields) for name, fields in stored["exercises"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{shown(file)}: cannot be read; move it away, and what happens is noted anew") from None


def store(tracks: dict[str, Track], file: Path = FILE) -> None:
    """Keeps what is known.

    Raises:
        UsageError: the file cannot be written.
    """
    kept = {"schema": 1, "exercises": {name: asdict(track) for name, track in tracks.items()}}
    write(file, json.dumps(kept, indent=1) + "\n")


def write(path: Path, text: str) -> None:
    """Writes a file below practice/.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        raise UsageError(f"{shown(path)}: cannot be written: {error.strerror}; make doctor says more") from None


def note(verdict: ExerciseVerdict, stamp: Stamp, file: Path = FILE) -> str:
    """Notes the verdict on an exercise; returns why it could not, in a sentence. An untouched file is no event."""
    try:
        tracks = load(file)
        track = tracks.setdefault(verdict.exercise.id, Track())
        if (verdict.state == "not started" and not track.saves) or track.stamp == stamp:
            return ""
        judged(track, verdict, stamp, time.time())
        store(tracks, file)
    except UsageError as error:
        return str(error)
    return ""


def judged(track: Track, verdict: ExerciseVerdict, stamp: Stamp, now: float) -> None:
    """Adds one judged save to a track."""
    track.saves += 1
    if 0 < now - track.last <= PAUSE_SECONDS:
        track.seconds += now - track.last
    track.last, track.stamp = now, stamp
    earned = [one.requirement.id for one in verdict.requirements if one.score]
    order = [requirement.id for requirement in verdict.exercise.requirements]
    changed = sorted(set(earned) ^ set(track.earned), key=lambda number: order.index(number) if number in order else -1)
    track.changes += [Change(now, number, number in earned) for number in changed]
    track.earned = earned


def _track(fields: dict[str, Any]) -> Track:
    changes = [Change(**one) for one in fields["changes"]]
    hints = {number: Hint(**one) for number, one in fields["hints"].items()}
    return Track(**{**fields, "stamp": tuple(fields["stamp"]), "changes": changes, "hints": hints})
