"""Pictures of measurements: lines over an axis, a panel each; readable on light and on dark pages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which people with any colour vision tell apart, on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = "osD^vPX"


def draw(path: Path, title: str, x: str, panels: Sequence[tuple[str, Mapping[str, Mapping[float, float]]]]) -> None:
    """Draws a panel per (title, values by contestant and place), with both axes logarithmic, and saves it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.6 * columns, 3.4 * rows), facecolor="white", layout="constrained", squeeze=False
    )
    names = list(dict.fromkeys(name for _, values in panels for name in values))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (panel, values) in zip(axes.flat, panels, strict=False):
        _panel(axis, panel, x, values, names)
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _panel(axis: Any, title: str, x: str, values: Mapping[str, Mapping[float, float]], names: Sequence[str]) -> None:
    from matplotlib import ticker

    _, _, metric = title.rpartition(": ")
    scale = {"seconds": 1e3}.get(metric, 1e-6 if metric.endswith("bytes") else 1.0)
    unit = {"seconds": "ms"}.get(metric, "MB" if metric.endswith("bytes") else metric)
    for name, line in values.items():
        number = names.index(name)
        places = sorted(line)
        axis.plot(
            places,
            [line[place] * scale for place in places],
            marker=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            # What is drawn first is wider: lines that coincide are seen all the same.
            linewidth=1.4 + 0.7 * (len(names) - 1 - number),
            markersize=5.0 + 2.0 * (len(names) - 1 - number),
            label=name,
        )
    places = sorted({place for line in values.values() for place in line})
    if len(places) > 1 and places[0] > 0:
        axis.set_xscale("log", base=2)
    axis.set_xticks(places, [f"{place:g}" for place in places])
    axis.minorticks_off()
    if all(value > 0 for line in values.values() for value in line.values()):
        axis.set_yscale("log")
        # 200 rather than 2 × 10²; of the small ticks, as many as there is room for.
        axis.yaxis.set_major_formatter(ticker.LogFormatter())
        axis.yaxis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(2, 0.4)))
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(unit)
    axis.grid(alpha=0.3)
