"""Measures the loop: from the closing of a saved file to its verdict, warm against pytest-watch with cold pytest.

Usage: python -P -m devtools.bench_loop [SAVES]
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from devtools.workspace import READY, Terminal, Workspace, processes, quiet
from harness.model.exercise import Exercise, exercises
from harness.model.paths import TOP
from harness.report import terminal

SAVES = 20
COLD_SAVES = 5
GROWTH = (2, 8, 16, 24)
PICTURE = TOP / "build" / "bench" / "loop.png"
_COLD_END = " in "


def saves(terminal: Terminal, path: Path, text: str, count: int, end: str) -> list[float]:
    """Seconds from closing the file to `end` on the screen, for `count` saves that each differ in a comment."""
    taken = []
    for number in range(count):
        time.sleep(0.5)
        path.write_text(f"{text}# {number}\n", encoding="utf-8")
        begin = time.perf_counter()
        terminal.until(end)
        taken.append(time.perf_counter() - begin)
    return taken


def resident_megabytes(workspace: Workspace) -> float:
    """Memory of all Python processes of a watch, pages shared between forks counted in each."""
    sizes = (Path(f"/proc/{pid}/statm").read_text().split()[1] for pid in processes(workspace, "python"))
    return sum(map(int, sizes)) * os.sysconf("SC_PAGE_SIZE") / 1e6


def warm(workspace: Workspace, exercise: Exercise, count: int) -> tuple[list[float], float]:
    """Times `make watch` on an exercise's answer; also the memory of the idle watch."""
    path = workspace.top / "exercises" / exercise.file_name
    terminal = Terminal(workspace.make_command("watch"), workspace.top)
    terminal.until(READY, 300)
    time.sleep(5)  # mypy's daemon reads its cache once.
    saves(terminal, path, workspace.answer(exercise.file_name), 2, READY)
    taken = saves(terminal, path, workspace.answer(exercise.file_name), count, READY)
    time.sleep(1)  # What served the last save is still ending.
    memory = resident_megabytes(workspace)
    terminal.interrupt()
    terminal.ended()
    quiet(workspace)
    return taken, memory


def cold(workspace: Workspace, exercise: Exercise, count: int) -> list[float]:
    """Times pytest-watch as it comes, running pytest anew on the exercise's checks for each save."""
    path = workspace.top / "exercises" / exercise.file_name
    path.write_text(workspace.answer(exercise.file_name), encoding="utf-8")
    runner = f"{sys.executable} -m pytest checks/{exercise.folder.name} -q"
    command = [sys.executable, "-m", "pytest_watch", "--nobeep", "--runner", runner, "exercises"]
    terminal = Terminal(command, workspace.top)
    terminal.until(_COLD_END, 120)
    taken = saves(terminal, path, workspace.answer(exercise.file_name), count, _COLD_END)
    terminal.interrupt()
    terminal.ended()
    return taken


def resize(workspace: Workspace, total: int) -> None:
    """Removes the last exercises, or adds copies of the first under other numbers, by files alone, until there are
    `total`.
    """
    there = list(exercises().values())
    workspace.keep(*(exercise.id for exercise in there[:total]))
    first = there[0].id
    originals = [path for path in workspace.top.glob(f"*/{first}*")]
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


def in_a_copy(measure: Callable[[Workspace], tuple[list[float], float]]) -> tuple[list[float], float]:
    """Measures in a copy of the workspace of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(Workspace(Path(folder) / "workspace"))


def main(count: int = SAVES) -> int:
    """Prints the table and draws the picture."""
    out: Console = terminal.console()
    table = Table("exercise", "warm s", "cold s", "cold / warm", "idle MB")
    medians: dict[str, tuple[float, float]] = {}
    for exercise in track(list(exercises().values()), "each exercise", console=out):
        taken, memory = in_a_copy(lambda workspace, one=exercise: warm(workspace, one, count))  # type: ignore[misc]
        slow, _ = in_a_copy(lambda workspace, one=exercise: (cold(workspace, one, COLD_SAVES), 0.0))  # type: ignore[misc]
        one, other = statistics.median(taken), statistics.median(slow)
        medians[exercise.id] = (one, other)
        table.add_row(exercise.id, f"{one:.2f}", f"{other:.2f}", f"{other / one:.1f}", f"{memory:.0f}")
    growth: dict[int, float] = {}
    first = next(iter(exercises().values()))
    for total in track(GROWTH, "growing", console=out):

        def measure(workspace: Workspace, total: int = total) -> tuple[list[float], float]:
            resize(workspace, total)
            return warm(workspace, first, max(5, count // 2))

        taken, memory = in_a_copy(measure)
        growth[total] = statistics.median(taken)
        table.add_row(f"{first.id} of {total}", f"{growth[total]:.2f}", "", "", f"{memory:.0f}")
    out.print(table)
    draw(medians, growth)
    out.print(f"picture: {PICTURE.relative_to(TOP)}")
    return 0


def draw(medians: dict[str, tuple[float, float]], growth: dict[int, float]) -> None:
    """Two panels: seconds per exercise, warm and cold; seconds as the number of exercises grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), facecolor="white", layout="constrained")
    places = range(len(medians))
    left.bar(
        [p - 0.2 for p in places], [warm for warm, _ in medians.values()], 0.4, label="make watch", color="#2a7f62"
    )
    left.bar(
        [p + 0.2 for p in places], [cold for _, cold in medians.values()], 0.4, label="cold pytest", color="#c44e52"
    )
    left.axhline(0.5, color="#555555", linewidth=1, linestyle="--", label="0.5 s")
    left.set_xticks(list(places), list(medians))
    left.set_ylabel("seconds from save to verdict (median)")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    right.plot(list(growth), list(growth.values()), marker="o", color="#2a7f62")
    right.axhline(0.5, color="#555555", linewidth=1, linestyle="--")
    right.set_ylim(0, 1.1 * max(growth.values()))
    right.set_xlabel("exercises in the workspace")
    right.set_ylabel("seconds, saving the first (median)")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else SAVES))
