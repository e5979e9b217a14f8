"""The verdict on one save as it comes: on the code first, then, under the same requirements, what takes longer."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from harness.model.cache import Entry
from harness.model.exercise import Exercise
from harness.model.results import ExerciseVerdict, Result, verdict_of
from harness.report import terminal


class Saved:
    """Shows the verdict on a save in two steps: on a terminal in place, in a log as lines.

    Args:
        last: the verdict on the save before; its marks stand until new ones are there.
    """

    def __init__(self, out: Console, exercise: Exercise, folder: Path, last: Entry | None) -> None:
        self._out, self._exercise, self._folder = out, exercise, folder
        self._known = {result.name: result for result in last.results} if last is not None else {}
        self.before = last.verdict(exercise) if last is not None else None
        self._late: frozenset[str] = frozenset()
        self._rows = 0

    def slow(self, name: str) -> None:
        """Says that a check takes long, so that nobody takes a loop for a standstill."""
        self._out.print(f"  {name} still runs; a save ends it", markup=False, soft_wrap=True)

    def first(self, entry: Entry, later: Sequence[Result]) -> None:
        """Shows the verdict on the code. `later` stands for the checks that still run."""
        rest = [self._known.get(result.name, result) for result in later]
        self._late = frozenset(result.requirement for result in rest)
        verdict = verdict_of(self._exercise, [*entry.results, *rest], untouched=entry.untouched)
        with self._out.capture() as shown:
            terminal.detail(self._out, verdict, self._folder, self.before, late=self._late)
            self._out.print(f"code judged in {entry.seconds:.2f} s")
        text = shown.get()
        self._out.file.write(text)
        self._out.file.flush()
        lines = (Text.from_ansi(line).cell_len for line in text.splitlines())
        self._rows = sum(-(-max(1, length) // self._out.width) for length in lines)

    def rest(self, verdict: ExerciseVerdict) -> None:
        """Shows what has come since."""
        if not self._late or verdict.state == "does not import":
            return
        if self._out.is_terminal and not self._out.is_dumb_terminal and self._rows < self._out.height:
            self._out.file.write(f"\x1b[{self._rows}A\x1b[J")
            terminal.detail(self._out, verdict, self._folder, self.before)
            return
        terminal.rows(self._out, [one for one in verdict.requirements if one.requirement.id in self._late])
        for one in verdict.requirements:
            failed = one.first_failure()
            if one.requirement.id in self._late and failed is not None and not one.unwritten:
                terminal.failure(self._out, self._folder / self._exercise.file_name, failed, full=False)
