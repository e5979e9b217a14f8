"""What happened so far, for the learner alone: a table, and a picture where matplotlib is there."""

import importlib.util
import time
from collections.abc import Mapping

from rich.table import Table

from harness.commands import history
from harness.commands.history import Track
from harness.model.exercise import CRITERIA, POINTS, Exercise, exercises
from harness.model.paths import PRACTICE, shown
from harness.practice import attempts, pictures
from harness.report import terminal

PICTURE = PRACTICE / "progress.png"


def run() -> int:
    """Prints the table, and draws the picture."""
    out, tracks = terminal.console(), history.load()
    there = [exercise for exercise in exercises().values() if exercise.id in tracks]
    if not there:
        terminal.line(out, "nothing noted yet: make watch EX=1 judges each save, and notes what it earns")
        return 0
    out.print(table(there, tracks))
    terminal.line(out, criteria(there, tracks))
    terminal.line(out, f"kept in {shown(history.FILE)}, on this machine alone")
    if importlib.util.find_spec("matplotlib") is None:
        terminal.line(out, "no picture: matplotlib is not there yet; make .venv/bench installs it")
        return 0
    pictures.progress(PICTURE, [(exercise, tracks[exercise.id]) for exercise in there])
    terminal.line(out, f"picture: {shown(PICTURE)}")
    return 0


def table(there: list[Exercise], tracks: Mapping[str, Track]) -> Table:
    """A row per exercise that has been begun."""
    names = ("exercise", "points", "steps", "saves", "minutes", "hints", "lost", "attempts", "last")
    grid = Table(*names, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for exercise in there:
        track = tracks[exercise.id]
        earned = set(track.earned)
        grid.add_row(
            exercise.id,
            f"{POINTS * len(earned)}/{POINTS * len(exercise.requirements)}",
            f"{sum(earned.issuperset(step.requirements) for step in exercise.steps)} of {len(exercise.steps)}",
            str(track.saves),
            f"{track.seconds / 60:.0f}",
            str(sum(hint.shown for hint in track.hints.values())),
            str(sum(not change.earned for change in track.changes)),
            str(len(attempts.kept(exercise))),
            time.strftime("%Y-%m-%d", time.localtime(track.last)) if track.last else "",
        )
    return grid


def criteria(there: list[Exercise], tracks: Mapping[str, Track]) -> str:
    """How many requirements of each criterion are earned, of those of the exercises that have been begun."""
    parts = []
    for criterion in CRITERIA:
        of_it = [(e.id, one.id) for e in there for one in e.requirements if one.criterion == criterion]
        earned = sum(number in tracks[name].earned for name, number in of_it)
        parts.append(f"{criterion} {earned} of {len(of_it)}")
    return ", ".join(parts)
