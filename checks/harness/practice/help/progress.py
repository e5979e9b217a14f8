"""What happened so far, for the learner alone: a table, and a picture where matplotlib is there."""

import time
from collections.abc import Mapping

from rich.table import Table

from harness.model import history
from harness.model.exercise import CRITERIA, POINTS, Exercise, exercises
from harness.model.history import Track
from harness.model.paths import PRACTICE, shown
from harness.practice.help import attempts
from harness.practice.sessions import sessions
from harness.report import terminal, timeline

PICTURE = PRACTICE / "progress.png"
# Until then the picture counts hours.
_HOURS_UP_TO = 2 * 86400.0


def run() -> int:
    """Prints the table, and draws the picture."""
    out, tracks = terminal.console(), history.load()
    practised_on = {session.exercise for session in sessions()}
    there = [one for one in exercises().values() if one.id in tracks or one in practised_on]
    tracks = {one.id: tracks.get(one.id, Track()) for one in there}
    if not there:
        terminal.line(out, "nothing noted yet: make watch EX=1 judges each save, and notes what it earns")
        return 0
    out.print(table(there, tracks))
    terminal.line(out, criteria(there, tracks))
    terminal.line(out, f"kept in {shown(history.FILE)}, on this machine alone")
    if sentence := timeline.missing():
        terminal.line(out, sentence)
        return 0
    draw(there, tracks)
    terminal.line(out, f"picture: {shown(PICTURE)}")
    return 0


def table(there: list[Exercise], tracks: Mapping[str, Track]) -> Table:
    """A row per exercise that has been begun."""
    names = ("exercise", "points", "steps", "saves", "minutes", "hints", "lost", "kept", "sessions", "last")
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
            practised(exercise),
            time.strftime("%m-%d", time.localtime(track.last)) if track.last else "",
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


def practised(exercise: Exercise) -> str:
    """How many practice sessions on an exercise have ended, of how many."""
    of_it = [session for session in sessions() if session.exercise == exercise]
    return f"{sum(session.ended > 0 for session in of_it)} of {len(of_it)}" if of_it else "0"


def draw(there: list[Exercise], tracks: Mapping[str, Track]) -> None:
    """The points of each exercise over time, and the minutes at work, those of its practice sessions beside it."""
    begin = min((change.at for exercise in there for change in tracks[exercise.id].changes), default=0.0)
    lasted = max((tracks[exercise.id].last for exercise in there), default=begin) - begin
    unit, seconds = ("days", 86400.0) if lasted > _HOURS_UP_TO else ("hours", 3600.0)
    begun = [exercise for exercise in there if tracks[exercise.id].saves]
    lines = [(exercise.id, *points(tracks[exercise.id], begin, seconds)) for exercise in begun]
    minutes: dict[str, float] = {}
    for exercise in there:
        minutes[exercise.id] = tracks[exercise.id].seconds / 60
        if practice := sum(session.minutes for session in sessions() if session.exercise == exercise):
            minutes[f"{exercise.id} practice"] = practice
    timeline.draw(PICTURE, "progress", f"{unit} since the first point", lines, ("minutes at work", minutes))


def points(track: Track, begin: float, unit: float) -> tuple[list[float], list[int]]:
    """Times since `begin` in units, and the points from then on: none at first, up to the last save."""
    times, sums = [0.0], [0]
    for change in track.changes:
        times.append(max(0.0, (change.at - begin) / unit))
        sums.append(sums[-1] + (POINTS if change.earned else -POINTS))
    return [*times, max(times[-1], (track.last - begin) / unit)], [*sums, sums[-1]]
