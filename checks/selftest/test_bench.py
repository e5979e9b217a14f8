"""What a bench shows: tables that fit, sentences, an end by Ctrl-C, a word on a busy machine."""

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from harness.commands import figures
from harness.report import charts
from harness.report.terminal import console
from harness.testing import bench as measuring
from harness.testing.bench import Case, Series, measure

BENCH: Any = SimpleNamespace(X="length", REFERENCE="torch", HIGHER_IS_BETTER=("tokens per second",))
SERIES = [
    Series("forward", "seconds", {"yours": {8: 0.003, 16: 0.01}, "answer": {8: 0.002, 16: 0.005}, "torch": {8: 0.001}}),
    Series("forward", "peak bytes", {"yours": {8: 4e6}, "torch": {8: 2e6}}),
    Series("writing", "tokens per second", {"yours": {1: 1234.5}, "torch": {1: 0.0123}}),
]


def told(*things: object) -> str:
    stream = io.StringIO()
    out = console(stream)
    for thing in things:
        out.print(thing)
    return stream.getvalue()


def test_the_tables_say_values_spread_and_ratio() -> None:
    SERIES[0].spreads = {"yours": {8: 0.034, 16: 0.001}}

    said = told(*figures.tables(SERIES, BENCH))

    assert re.search(r"^ *forward *\n *length +time, ms +peak memory, MB *\n", said, re.MULTILINE), said
    assert re.search(r"^8 +yours +3 ±3% \(3.00\) +4 \(2.00\) *\n +answer +2 \(2.00\) *\n +torch +1 +2 *\n", said, re.M)
    assert re.search(r"^16 +yours +10 *\n", said, re.MULTILINE), said
    assert re.search(r"^1 +yours +1234 \(100366\) *\n +torch +0.0123 *\n", said, re.MULTILINE), said
    assert max(map(len, said.splitlines())) <= 80


def test_a_sentence_says_how_your_code_compares() -> None:
    assert list(figures.yours(SERIES, BENCH)) == [
        "your code: time 1.50 to 2.00 times the answer's",
        "your code: time 3.00 times, peak memory 2.00 times, tokens per second 100366 times that of torch",
    ]
    assert not list(figures.yours(SERIES[:0], BENCH))
    assert figures.legend(BENCH).endswith("times torch; lower is better, but higher for tokens per second")


def test_ctrl_c_ends_it_with_what_is_there() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    stream = io.StringIO()
    cases = [Case("forward", 1, {"yours": lambda: None}), Case("forward", 2, {"yours": interrupted})]

    measured = measure(cases, console(stream))

    assert (measured.done, measured.asked) == (1, 2) and measured.series[0].values["yours"].keys() == {1}
    assert stream.getvalue().splitlines()[-1] == "stopped"


@pytest.mark.parametrize(("waits", "busy"), [(0.0, False), (1e6, True)])
def test_a_busy_machine_is_said(monkeypatch: pytest.MonkeyPatch, waits: float, busy: bool) -> None:
    seconds = iter((0.0, waits))
    monkeypatch.setattr(measuring, "waited", lambda _: next(seconds))
    numbers = iter(range(100, 200))

    measured = measure([Case("a", 1, {"yours": lambda: {"count": next(numbers)}}, timed=False)], console(io.StringIO()))

    assert measured.busy is busy


def test_figures_far_apart_are_those_of_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "waited", lambda _: 0.0)
    numbers = iter(float(2**n) for n in range(99))
    runs = {name: lambda: {"count": next(numbers)} for name in ("yours", "answer")}

    assert measure([Case("a", 1, runs, timed=False)], console(io.StringIO())).busy


def test_a_log_and_a_terminal_both_see_how_far_it_is() -> None:
    cases = [Case("forward", x, {"yours": lambda: None}) for x in range(8)]
    log, terminal = io.StringIO(), io.StringIO()

    measure(cases, console(log))
    measure(cases, Console(file=terminal, force_terminal=True, width=80))

    assert log.getvalue().splitlines() == ["2 of 8 measured", "4 of 8 measured", "6 of 8 measured"]
    assert "forward, 7" in terminal.getvalue()


def test_a_picture_has_the_units_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(charts, "_draw", lambda axis, panel, x, names: drawn.update({panel.label: panel.values}))

    charts.draw(tmp_path / "a.png", "A", "length", figures.panels(SERIES), "CPU, 2 cores")

    assert drawn["time, ms"]["yours"] == {8: 3.0, 16: 10.0} and drawn["peak memory, MB"]["torch"] == {8: 2.0}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert charts.wide([1, 5]) and not charts.wide([1, 4.9]) and not charts.wide([0, 9])
