"""Measures the loop by saves that people make: from the closing of a saved file to the verdict on its code, and to all
of it.

Usage: python -P -m devtools.bench_loop [EX …]

For each exercise a seeded walk: the starter, mistakes of the bank, the answer's bodies one after the other, the own
test written last and changed twice, the answer; then pytest-watch with cold pytest on a few of the same saves, and the
first exercise among more and more.
"""

import ast
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil
from rich.progress import track
from rich.table import Table

from devtools.terminal import Terminal
from devtools.workspace import READY, Workspace, processes, quiet
from harness.model import bank
from harness.model.exercise import Exercise, exercises, selected
from harness.model.paths import BUILD, shown
from harness.model.source import functions
from harness.report import terminal as shown_by
from harness.sandbox.processes import waited

MISTAKES, COLD_SAVES, MEMORY_SAVES = 20, 5, 100
GROWTH = (2, 8, 16, 24)
PICTURE = BUILD / "bench" / "loop.png"
CODE = "code judged in"
BUSY = 0.1
_COLD_END = "cold pytest has ended"
_T = TypeVar("_T")


@dataclass
class Taken:
    """Seconds of the saves of one exercise; `own` of those that change the own test."""

    code: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    idle_mb: float = 0.0
    later_mb: float = 0.0
    waiting: float = 0.0
    unit: float = 0.0


def walk(exercise: Exercise) -> list[tuple[str, bool]]:
    """The texts that are saved, and whether each changes the own test."""
    answer, rng = bank.answer(exercise), random.Random(exercise.id)
    mistakes = list(bank.mistakes(exercise).values())
    texts = [mistake.applied_to(answer) for mistake in rng.sample(mistakes, min(MISTAKES, len(mistakes)))]
    bodies = _bodies(exercise.starter, answer)
    test = bodies[-1]
    edited = [f"{test}\n\n# Once more.\n_ONCE_MORE = {number}\n" for number in (1, 2)]
    saved = [exercise.starter, *texts, *bodies, *edited, answer]
    own, before = [], ""
    for text in saved:
        now = _own_test(text)
        own.append(now != before and bool(before))
        before = now
    return list(zip(saved, own, strict=True))


def _bodies(starter: str, answer: str) -> list[str]:
    """The starter with the answer's functions, one after the other; the own test comes last."""
    texts, written = [], starter
    for path, node in sorted(functions(answer).items(), key=lambda pair: pair[0].startswith("test_")):
        ours = functions(written).get(path)
        if ours is None or ast.dump(ours) == ast.dump(node):
            continue
        lines, theirs = written.splitlines(), answer.splitlines()
        lines[ours.lineno - 1 : ours.end_lineno] = theirs[node.lineno - 1 : node.end_lineno]
        written = "\n".join(lines) + "\n"
        texts.append(written)
    return [*texts, answer]


def _own_test(text: str) -> str:
    """Everything but classes and public functions: what an own test's verdict may depend on."""
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return ""
    kept = [node for node in body if not isinstance(node, ast.ClassDef) and _is_own(node)]
    return ast.dump(ast.Module(kept, []))


def _is_own(node: ast.stmt) -> bool:
    return not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith(("test_", "_"))


def warm(workspace: Workspace, exercise: Exercise, texts: Sequence[tuple[str, bool]], more: int = 0) -> Taken:
    """Times `make watch` on saves; also its memory when idle, and after `more` saves."""
    taken, path = Taken(), workspace.top / "exercises" / exercise.file_name
    watch = Terminal(workspace.make_command("watch", f"EX={exercise.number}"), workspace.top)
    watch.until(READY, 300)
    time.sleep(5)  # mypy's daemon reads its cache once.
    path.write_text(bank.answer(exercise) + "# A first save.\n", encoding="utf-8")
    watch.until(READY, 120)
    time.sleep(1)
    taken.idle_mb = resident_megabytes(workspace)
    units: list[float] = []
    waiting, begun = _waited(workspace), time.perf_counter()
    for number, (text, own) in enumerate(texts):
        time.sleep(0.5)
        path.write_text(text, encoding="utf-8")
        begin = time.perf_counter()
        watch.until(CODE, 120)
        taken.code.append(time.perf_counter() - begin)
        watch.until(READY, 120)
        (taken.own if own else taken.whole).append(time.perf_counter() - begin)
        if number % 10 == 0:
            units.append(import_torch())
    taken.waiting = max(0.0, _waited(workspace) - waiting) / (time.perf_counter() - begun)
    taken.unit = statistics.median(units)
    for number in range(more):
        path.write_text(f"{bank.answer(exercise)}# {number}\n", encoding="utf-8")
        watch.until(READY, 120)
    time.sleep(1)
    taken.later_mb = resident_megabytes(workspace)
    watch.interrupt()
    watch.ended()
    quiet(workspace)
    return taken


def cold(workspace: Workspace, exercise: Exercise, texts: Sequence[str]) -> list[float]:
    """Times pytest-watch as it comes, running pytest anew on the exercise's checks for each save."""
    path = workspace.top / "exercises" / exercise.file_name
    runner = f"{sys.executable} -m pytest checks/{exercise.folder.name} -q"
    command = [sys.executable, "-m", "pytest_watch", "--nobeep", "--afterrun", f"echo {_COLD_END}"]
    command += ["--runner", runner, "exercises"]
    watch = Terminal(command, workspace.top)
    watch.until(_COLD_END, 120)
    taken = []
    for text in texts:
        time.sleep(0.5)
        path.write_text(text, encoding="utf-8")
        begin = time.perf_counter()
        watch.until(_COLD_END, 300)
        taken.append(time.perf_counter() - begin)
    watch.interrupt()
    watch.ended()
    return taken


def import_torch() -> float:
    """Seconds that a fresh import of torch takes: what this machine is worth now."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - begin


def resident_megabytes(workspace: Workspace) -> float:
    """Memory of all Python processes of a watch, pages shared between forks counted in each."""
    return sum(psutil.Process(pid).memory_info().rss for pid in processes(workspace, "python")) / 1e6


def _waited(workspace: Workspace) -> float:
    return sum(waited(pid) for pid in processes(workspace, "python"))


def resize(workspace: Workspace, total: int) -> None:
    """Removes the last exercises, or adds copies of the first under other numbers, by files alone, until there are
    `total`.
    """
    there = list(exercises().values())
    workspace.keep(*(exercise.id for exercise in there[:total]))
    first = there[0].id
    originals = list(workspace.top.glob(f"*/{first}*"))
    for number in range(50, 50 + total - len(there)):
        for original in originals:
            copied = original.with_name(original.name.replace(first, f"ex{number}"))
            if original.is_dir():
                shutil.copytree(original, copied, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(original, copied)
            for path in copied.rglob("*.py") if copied.is_dir() else [copied]:
                text = path.read_text(encoding="utf-8")
                path.write_text(text.replace(first, f"ex{number}"), encoding="utf-8")


def in_a_copy(measure: Callable[[Workspace], _T]) -> _T:
    """Measures in a copy of the workspace of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(Workspace(Path(folder) / "workspace"))


def main(arguments: list[str]) -> int:
    """Prints the table and draws the picture."""
    out = shown_by.console()
    chosen = [one for ex in arguments or [""] for one in selected(ex)]
    table = Table("", "code", "95 %", "whole", "95 %", "own test", "cold", "cold / whole", "idle MB", "later MB")
    all_taken: dict[str, Taken] = {}
    for number, exercise in enumerate(track(chosen, "each exercise", console=out)):
        texts, more = walk(exercise), MEMORY_SAVES if number == 0 else 0
        taken = in_a_copy(lambda workspace, one=exercise, saved=texts, n=more: warm(workspace, one, saved, n))  # type: ignore[misc]
        few = [text for text, _ in texts[1 : 1 + COLD_SAVES]]
        taken.cold = in_a_copy(lambda workspace, one=exercise, saved=few: cold(workspace, one, saved))  # type: ignore[misc]
        all_taken[exercise.id] = taken
        table.add_row(exercise.id, *_cells(taken))
    growth: dict[int, float] = {}
    first = next(iter(exercises().values()))
    for total in track(() if arguments else GROWTH, "growing", console=out):

        def measure(workspace: Workspace, total: int = total) -> Taken:
            resize(workspace, total)
            return warm(workspace, first, walk(first)[1:11])

        growth[total] = statistics.median(in_a_copy(measure).code)
        table.add_row(f"{first.id} of {total}", f"{growth[total]:.2f}")
    out.print(table)
    for name, taken in all_taken.items():
        in_units = f"code {_median(taken.code) / taken.unit:.2f}, 95 % {_tail(taken.code) / taken.unit:.2f}"
        in_units += f", whole {_median(taken.whole) / taken.unit:.2f} of a fresh import of torch ({taken.unit:.2f} s)"
        busy = f"; its processes waited {taken.waiting:.0%} of the time for a processor" if taken.waiting > BUSY else ""
        out.print(f"{name}: {in_units}{busy}", soft_wrap=True)
    draw(all_taken, growth)
    out.print(f"picture: {shown(PICTURE)}")
    return 0


def _cells(taken: Taken) -> list[str]:
    whole = _median(taken.whole)
    figures = [
        _median(taken.code),
        _tail(taken.code),
        whole,
        _tail(taken.whole),
        _median(taken.own),
        _median(taken.cold),
    ]
    ratio = f"{_median(taken.cold) / whole:.1f}" if whole else ""
    return [*(f"{figure:.2f}" for figure in figures), ratio, f"{taken.idle_mb:.0f}", f"{taken.later_mb:.0f}"]


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def _tail(values: Sequence[float]) -> float:
    """The 95th percentile: so many saves are faster."""
    return sorted(values)[min(len(values) - 1, round(0.95 * (len(values) - 1)))] if values else 0.0


def draw(all_taken: dict[str, Taken], growth: dict[int, float]) -> None:
    """Two panels: seconds per exercise, of code and whole, to the 95th percentile; growth with the exercises."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), facecolor="white", layout="constrained")
    places = range(len(all_taken))
    for shift, label, colour, of in (
        (-0.27, "code judged", "#2a7f62", lambda taken: taken.code),
        (0.0, "all judged", "#0072b2", lambda taken: taken.whole),
        (0.27, "pytest-watch, cold pytest", "#c44e52", lambda taken: taken.cold),
    ):
        medians = [_median(of(taken)) for taken in all_taken.values()]
        tails = [max(0.0, _tail(of(taken)) - _median(of(taken))) for taken in all_taken.values()]
        bars = [place + shift for place in places]
        left.bar(bars, medians, 0.27, label=label, color=colour, yerr=[[0.0] * len(tails), tails], capsize=2)
    left.axhline(0.5, color="#555555", linewidth=1, linestyle="--", label="0.5 s")
    left.set_xticks(list(places), list(all_taken))
    left.set_ylabel("seconds from save to verdict")
    left.set_title("median; whisker: 95 % of the saves", fontsize="medium")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    right.plot(list(growth), list(growth.values()), marker="o", color="#2a7f62")
    right.axhline(0.5, color="#555555", linewidth=1, linestyle="--")
    right.set_ylim(0, 1.1 * max([0.5, *growth.values()]))
    right.set_xlabel("exercises in the workspace")
    right.set_ylabel("seconds from save to verdict")
    right.set_title("code judged, saving the first exercise; median", fontsize="medium")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
