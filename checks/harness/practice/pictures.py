"""Pictures of what happened over time: points as steps, in the colours of the benches."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.commands.history import Change, Track
from harness.model.exercise import POINTS, Exercise
from harness.report.charts import COLOURS


def progress(path: Path, tracks: Sequence[tuple[Exercise, Track]]) -> None:
    """Draws the points of each exercise over days, and beside them its minutes at work."""
    figure, (points, minutes) = _figure(2)
    begin = min((change.at for _, track in tracks for change in track.changes), default=time.time())
    for number, (exercise, track) in enumerate(tracks):
        days, sums = line(track.changes, begin, 86400.0)
        colour = COLOURS[number % len(COLOURS)]
        points.step(days, sums, where="post", label=exercise.id, color=colour, marker="o", markersize=3)
        minutes.barh(exercise.id, track.seconds / 60, color=colour)
    points.set(title="points", xlabel="days since the first point")
    points.legend(frameon=False, fontsize=8)
    minutes.set(title="at work", xlabel="minutes")
    minutes.invert_yaxis()
    _save(figure, path)


def line(changes: Sequence[Change], begin: float, unit: float) -> tuple[list[float], list[int]]:
    """Times since `begin` in units, and the points after each change, from 0 points on."""
    times, sums = [0.0], [0]
    for change in changes:
        times.append(max(0.0, (change.at - begin) / unit))
        sums.append(sums[-1] + (POINTS if change.earned else -POINTS))
    return times, sums


def _figure(panels: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, panels, figsize=(4.6 * panels, 3.4), facecolor="white", layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
