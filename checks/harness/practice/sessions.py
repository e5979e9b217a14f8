"""Practice sessions: where they lie, how one begins and goes on, what is kept of it. Without torch.

A session is a submission folder, `practice/<mode>-exNN-<seed>/`, which holds the exercise's file under its usual name
and `session.json`: what is needed to go on and to make it again, and nothing that gives away what is to be found.
"""

import hashlib
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from harness.commands.request import whole_number
from harness.model.cache import VerdictCache, checks_version
from harness.model.exercise import POINTS, Exercise, UsageError, exercises, within
from harness.model.history import write
from harness.model.paths import BUILD, PRACTICE, shown
from harness.model.submission import LoadError, read
from harness.report import terminal

_NAME = re.compile(r"([a-z]+)-(ex\d\d)-(\d{1,6})")
# A longer wait between two saves is a pause, of which this much counts as work.
PAUSE_SECONDS = 600.0


@dataclass(frozen=True)
class Save:
    """A judged save: when, and the requirements that were earned then."""

    at: float
    earned: tuple[str, ...]


@dataclass
class Session:
    """One practice session.

    Args:
        options: what its mode needs to make it again: "bugs", say.
        saves: every judged save, the first first.
        ended: when it ended, 0 while it is under way; `how` says in a word or two how.
    """

    mode: str
    exercise: Exercise
    seed: int
    created: float
    options: dict[str, Any] = field(default_factory=dict)
    saves: list[Save] = field(default_factory=list)
    ended: float = 0.0
    how: str = ""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.mode}-{self.exercise.id}-{self.seed}"

    @property
    def scope(self) -> Exercise:
        """What of the exercise counts: in an interview as many steps as there is time for."""
        return within(self.exercise, self.options["minutes"]) if self.mode == "interview" else self.exercise

    @property
    def folder(self) -> Path:
        return PRACTICE / self.name

    @property
    def file(self) -> Path:
        """What the learner edits."""
        return self.folder / self.exercise.file_name

    @property
    def command(self) -> str:
        """The command that goes on with it."""
        return f"make {self.mode} EX={self.exercise.number} SEED={self.seed}"

    @property
    def minutes(self) -> float:
        """Minutes at work: from the beginning over the saves to the end, pauses counted in part."""
        times = [self.created, *(save.at for save in self.saves), *([self.ended] if self.ended else [])]
        gaps = (later - earlier for earlier, later in pairwise(times))
        return sum(min(max(gap, 0.0), PAUSE_SECONDS) for gap in gaps) / 60

    @property
    def took(self) -> str:
        """Minutes at work, in words."""
        minutes = round(self.minutes)
        return terminal.counted(minutes, "minute") if minutes else "under a minute"

    @property
    def touched(self) -> float:
        """When it was last worked on."""
        return self.saves[-1].at if self.saves else self.created

    @property
    def so_far(self) -> str:
        """How it stands, in a line."""
        earned = self.saves[-1].earned if self.saves else ()
        missing = [one.id for one in self.scope.requirements if one.id not in earned]
        left = f"open {' '.join(missing)}" if missing else "nothing open"
        judged = f"{self.points} points, {left}" if self.saves else "not judged yet"
        return f"{self.name}: {judged}, {self.took}"

    @property
    def points(self) -> str:
        """Points at the last save out of how many; empty before the first."""
        total = POINTS * len(self.scope.requirements)
        return f"{POINTS * len(self.saves[-1].earned)}/{total}" if self.saves else ""

    @property
    def state(self) -> str:
        """How it stands, in words."""
        if self.ended:
            return self.how
        return "not begun" if digest(notes(self, self.file.name)) == self.options.get("text") else "under way"

    def verdicts(self) -> VerdictCache:
        """The last verdict on its file."""
        return VerdictCache(checks_version(), BUILD / PRACTICE.name / f"{self.name}.json")

    def store(self) -> None:
        """Keeps what is known of it.

        Raises:
            UsageError: its folder cannot be written to.
        """
        kept = {name: value for name, value in vars(self).items() if name not in ("mode", "exercise", "seed")}
        write(self.folder / "session.json", json.dumps({**kept, "saves": [asdict(save) for save in self.saves]}) + "\n")

    def end(self, how: str, report: Callable[[], list[str]]) -> list[str]:
        """Notes that it has ended; returns the report, which stays beside the file."""
        self.ended, self.how = time.time(), how
        lines = report()
        write(self.folder / "report.md", "\n".join([*lines, ""]))
        self.store()
        return lines


def sessions() -> list[Session]:
    """All sessions of exercises that are there, the oldest first."""
    folders = sorted(PRACTICE.iterdir()) if PRACTICE.is_dir() else []
    found = (session for folder in folders if (session := _read(folder)) is not None)
    return sorted(found, key=lambda session: session.created)


def interviews() -> list[Session]:
    """Those that have not ended."""
    return [one for one in sessions() if one.mode == "interview" and not one.ended]


def unreadable() -> Iterator[Path]:
    """Folders that are named like a session of an exercise that is there, but tell nothing of one."""
    for folder in sorted(PRACTICE.iterdir()) if PRACTICE.is_dir() else []:
        named = _NAME.fullmatch(folder.name)
        if named is not None and named[2] in exercises() and _read(folder) is None:
            yield folder


def chosen(mode: str, exercise: Exercise, seed: str, *, end: bool = False) -> Session | None:
    """The session to go on with: the one that SEED names or, without SEED, the one under way that was touched last.

    Args:
        end: it is to end: of several SEED has to name one.

    Raises:
        UsageError: SEED is no number, or names a folder that is no session; or it is missing.
    """
    mine = [one for one in sessions() if (one.mode, one.exercise) == (mode, exercise)]
    under_way = [str(one.seed) for one in mine if not one.ended]
    if end and not seed and len(under_way) > 1:
        raise UsageError(f"{len(under_way)} are under way; END=1 wants SEED, one of {', '.join(under_way)}")
    if not seed:
        return max((one for one in mine if not one.ended), key=lambda one: one.touched, default=None)
    number = whole_number("SEED", seed, 0, 999_999)
    if (found := next((one for one in mine if one.seed == number), None)) is not None:
        return found
    folder = PRACTICE / f"{mode}-{exercise.id}-{number}"
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{shown(folder)}: holds no session.json that can be read; move it away, or take another SEED")
    return None


def new(mode: str, exercise: Exercise, seed: str, **options: Any) -> Session:
    """A session that is on no disk yet; without SEED, with a seed that no session has."""
    return Session(
        mode, exercise, whole_number("SEED", seed, 0, 999_999) if seed else free_seed(), time.time(), options
    )


def free_seed() -> int:
    """A seed that no session has."""
    taken = {one.seed for one in sessions()}
    return random.SystemRandom().choice([number for number in range(1000, 10_000) if number not in taken])


def begin(session: Session, text: str) -> None:
    """Puts a session's file where there is none, and what is known of it first: a watch sees the file at once."""
    session.store()
    put(session.file, text)


def put(path: Path, text: str) -> None:
    """Writes a file of a session where there is none: nothing of the learner's is overwritten."""
    if not path.exists() and not path.is_symlink():
        write(path, text)


def notes(session: Session, name: str = "notes.md") -> str:
    """What the learner wrote beside the file; empty where there is nothing to read."""
    try:
        return read(session.folder / name)
    except LoadError:
        return ""


def digest(text: str) -> str:
    """Tells one text from another: what a session's file began as is kept as this in its option "text"."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _read(folder: Path) -> Session | None:
    named = _NAME.fullmatch(folder.name)
    if named is None or named[2] not in exercises() or folder.is_symlink():
        return None
    try:
        kept = json.loads((folder / "session.json").read_text(encoding="utf-8"))
        saves = [Save(float(one["at"]), tuple(one["earned"])) for one in kept["saves"]]
        options, ended = dict(kept["options"]), float(kept["ended"])
        created, how = float(kept["created"]), str(kept["how"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Session(named[1], exercises()[named[2]], int(named[3]), created, options, saves, ended, how)
