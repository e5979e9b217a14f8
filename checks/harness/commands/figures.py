"""Figures of a bench as people read them: tables, sentences, panels of a picture, all in the same units."""

from collections.abc import Iterator, Sequence

from rich.table import Table

from harness.report.charts import Panel
from harness.testing.bench import Bench, Series

# By metric: what it is called, and how many of its units one of ours is.
_UNITS = {"seconds": ("time, ms", 1e3), "peak bytes": ("peak memory, MB", 1e-6)}
# A spread below this is not worth a word.
_NOTABLE = 0.01


def unit(metric: str) -> tuple[str, float]:
    """What a metric is called, with its unit, and what its values are multiplied by."""
    if metric.endswith(" bytes") and metric not in _UNITS:
        return f"{metric.removesuffix(' bytes')}, MB", 1e-6
    return _UNITS.get(metric, (metric, 1.0))


def said(metric: str, value: float) -> str:
    """A value in words: "12.3 ms"."""
    name, scale = unit(metric)
    return f"{number(value * scale)} {name.rpartition(', ')[2] if scale != 1 else ''}".rstrip()


def number(value: float) -> str:
    """Three digits that count: 1234, 123, 12.3, 0.00123."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def ratio(value: float) -> str:
    """A ratio with two decimals, as far as they count."""
    return f"{value:.2f}" if 0.1 <= value < 100 else number(value)


def tables(series: Sequence[Series], bench: Bench) -> Iterator[Table]:
    """A table per panel: a row per place and contestant, a column per metric."""
    for panel in dict.fromkeys(one.panel for one in series):
        found = {one.metric: one for one in series if one.panel == panel}
        shown = Table(title=f"\n{panel}", title_style="bold", title_justify="left", box=None, padding=(0, 2, 0, 0))
        for header in (bench.X, "", *(unit(metric)[0] for metric in found)):
            shown.add_column(header, header_style="")
        for place in sorted({place for one in found.values() for line in one.values.values() for place in line}):
            names = dict.fromkeys(name for one in found.values() for name, line in one.values.items() if place in line)
            for count, name in enumerate(names):
                cells = (_cell(one, name, place, bench) for one in found.values())
                shown.add_row("" if count else f"{place:g}", name, *cells)
        yield shown


def _cell(one: Series, name: str, place: float, bench: Bench) -> str:
    """A value; by how much half its figures differ; its ratio to the reference."""
    value = one.values.get(name, {}).get(place)
    if value is None:
        return ""
    words = [number(value * unit(one.metric)[1])]
    spread, base = one.spreads.get(name, {}).get(place, 0.0), one.values.get(bench.REFERENCE, {}).get(place)
    words += [f"±{spread:.0%}"] if spread >= _NOTABLE else []
    words += [f"({ratio(value / base)})"] if base and name != bench.REFERENCE else []
    return " ".join(words)


def legend(bench: Bench) -> str:
    """How the table is read."""
    higher = ", ".join(bench.HIGHER_IS_BETTER)
    better = f"lower is better, but higher for {higher}" if higher else "lower is better"
    return f"±: half of the figures lie that near the median; in brackets: times {bench.REFERENCE}; {better}"


def yours(series: Sequence[Series], bench: Bench) -> Iterator[str]:
    """A sentence on the learner's code beside the answer and the reference."""
    for other, name in (("answer", "the answer's"), (bench.REFERENCE, f"that of {bench.REFERENCE}")):
        words = []
        for metric in dict.fromkeys(one.metric for one in series):
            called = unit(metric)[0].partition(",")[0]
            ratios = [
                value / beside
                for one in series
                if one.metric == metric
                for place, value in one.values.get("yours", {}).items()
                if (beside := one.values.get(other, {}).get(place))
            ]
            if ratios:
                least, most = ratio(min(ratios)), ratio(max(ratios))
                words.append(f"{called} {least if least == most else f'{least} to {most}'} times")
        if words:
            yield f"your code: {', '.join(words)} {name}"


def panels(series: Sequence[Series]) -> list[Panel]:
    """The panels of the picture."""
    drawn = []
    for one in series:
        label, scale = unit(one.metric)
        lines = {name: {place: value * scale for place, value in line.items()} for name, line in one.values.items()}
        drawn.append(Panel(one.panel, label, lines))
    return drawn
