"""Pictures of measurements: lines over an axis, a panel each; readable on light and on dark pages."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which people with any colour vision tell apart, on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = "osD^vPX"
# From this ratio of the largest to the least on, an axis is logarithmic.
_WIDE = 5.0


@dataclass(frozen=True)
class Panel:
    """Lines over one axis: by contestant and place, in the unit that `label` names."""

    title: str
    label: str
    values: Mapping[str, Mapping[float, float]]


def draw(path: Path, title: str, x: str, panels: Sequence[Panel], caption: str = "") -> None:
    """Draws the panels in two columns, under them the caption, and saves the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(9.2, 3.1 * rows + 0.8), facecolor="white", layout="constrained", squeeze=False
    )
    # The learner's code and the answer look the same in every picture.
    names = list(dict.fromkeys(("yours", "answer", *(name for panel in panels for name in panel.values))))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw(axis, panel, x, names)
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
        title=caption,
        title_fontsize=8,
    )
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw(axis: Any, panel: Panel, x: str, names: Sequence[str]) -> None:
    for name, line in panel.values.items():
        number = names.index(name)
        places = sorted(line)
        axis.plot(
            places,
            [line[place] for place in places],
            marker=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            # What is drawn first is wider: lines that coincide are seen all the same.
            linewidth=1.4 + 0.7 * (len(names) - 1 - number),
            markersize=5.0 + 2.0 * (len(names) - 1 - number),
            label=name,
        )
    places = sorted({place for line in panel.values.values() for place in line})
    if wide(places):
        axis.set_xscale("log", base=2)
    axis.set_xticks(places, [f"{place:g}" for place in places])
    axis.minorticks_off()
    if wide(value for line in panel.values.values() for value in line.values()):
        _logarithmic(axis)
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(panel.label)
    axis.grid(alpha=0.3)


def wide(values: Iterable[float]) -> bool:
    """Whether values are so far apart that their logarithms say more."""
    found = list(values)
    return bool(found) and min(found) > 0 and max(found) >= _WIDE * min(found)


def _logarithmic(axis: Any) -> None:
    """An axis of logarithms with ticks that read 200 rather than 2 × 10²."""
    from matplotlib import ticker

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(ticker.NullLocator())
