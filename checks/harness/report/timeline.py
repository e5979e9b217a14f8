"""Pictures of what happened over time: points as steps, and bars beside them; in the colours of the benches."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.report.charts import COLOURS

# A name, and points at times.
Steps = tuple[str, Sequence[float], Sequence[float]]


def missing() -> str:
    """Says that there can be no picture, and what to do; nothing where there can."""
    there = importlib.util.find_spec("matplotlib") is not None
    return "" if there else "no picture: matplotlib is not there yet; make .venv/bench installs it"


def draw(path: Path, title: str, x: str, lines: Sequence[Steps], bars: tuple[str, Mapping[str, float]]) -> None:
    """Draws the lines over time in one panel and the bars, by name, in another, and saves the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.2, 3.4), facecolor="white", layout="constrained")
    for number, (name, times, points) in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        left.step(times, points, where="post", label=name, color=colour, marker="o", markersize=3)
    left.set(title="points", xlabel=x)
    left.set_ylim(bottom=0)
    left.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    right.barh(list(bars[1]), list(bars[1].values()), color=[COLOURS[i % len(COLOURS)] for i in range(len(bars[1]))])
    right.set(title=bars[0])
    right.invert_yaxis()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
