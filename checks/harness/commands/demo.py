"""Lets a learner's code write text with a language model, beside a slower way, and shows it while it writes.

`demo.py` in the exercise's folder says who writes, and what is shown of it.
"""

import ast
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from harness.commands.request import Request, one_exercise, submission_folder
from harness.language import Demo, Language, Run
from harness.language.characters import characters, untrained
from harness.language.checkpoint import checkpoint
from harness.language.model import parameters
from harness.model.exercise import Exercise, UsageError, exercises
from harness.model.paths import TOP, module_from, shown
from harness.model.submission import LoadError, describe, line_in
from harness.report import terminal
from harness.testing.subject import execute, load, neutral_state

_THREADS = torch.get_num_threads()
_REFRESH_SECONDS = 0.1
# Numbers in a model up to which one thread is as fast as several.
_SMALL = 10_000_000


def run(request: Request) -> int:
    """Runs the contestants in turns, each for as long as the others, and says how they compare."""
    out = terminal.console()
    exercise = one_exercise("demo", request.ex)
    demo = demo_of(exercise)
    path = submission_folder(request.submission) / exercise.file_name
    try:
        module = load(path)
    except LoadError as error:
        raise UsageError(f"{shown(path)}:{error.line or 1}: {error.fact}") from None
    given = execute(exercise.starter, exercise.starter_file, f"given_{exercise.id}")
    neutral_state()
    if not request.model:
        with _told(exercise, path), torch.no_grad():  # What is not written yet is no reason to train a toy.
            blank = untrained(given.Decoder)
            for one in demo.contestants(module, blank, blank.prompts[:1]).values():
                one.step()
    language = language_of(given.Decoder, exercise, request, out)
    out.print(language.name, soft_wrap=True)
    # As many in any case: more would not fit on a screen.
    prompts = [*([request.prompt] if request.prompt else []), *language.prompts][: len(language.prompts)]
    called = "yours" if request.submission == Request.submission else request.submission
    with _told(exercise, path):
        runs = demo.contestants(module, language, prompts)
        writers = [Writer(called if name == "yours" else name, one) for name, one in runs.items()]
        _race(writers, out)
    for sentence in compared(writers):
        out.print(sentence, soft_wrap=True)
    return 0


def demo_of(exercise: Exercise) -> Demo:
    """The module that says who writes.

    Raises:
        UsageError: the exercise has no demo; the message names those that have.
    """
    if not exercise.demo_file.exists():
        having = ", ".join(f"EX={one.number}" for one in exercises().values() if one.demo_file.exists())
        raise UsageError(f"{exercise.id} has no demo; these have: {having or 'none'}")
    return cast(Demo, module_from(exercise.demo_file, f"demo_{exercise.id}"))


@contextmanager
def _told(exercise: Exercise, path: Path) -> Iterator[None]:
    """Says what the learner's code raises, and what to do then."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        fact = f"{shown(path)}:{line_in(error, path) or 1}: {describe(error)}"
        way = f"the demo runs your code: make watch EX={exercise.number} says what is open"
        raise UsageError(f"{fact}\n{way}") from None


def language_of(decoder: Any, exercise: Exercise, request: Request, out: Console) -> Language:
    """The model that MODEL names, or the toy, in the Decoder that the exercise gives.

    Raises:
        UsageError: there is no such folder, or the Decoder cannot hold what is in it.
    """
    if not request.model:
        body = ast.parse(exercise.starter).body
        source = "".join(ast.unparse(node) for node in body if getattr(node, "name", "").startswith("Decoder"))
        return characters(decoder, source, out)
    draft = _folder("DRAFT", request.draft) if request.draft else None
    language = checkpoint(_folder("MODEL", request.model), decoder, draft)
    if parameters(language.model) > _SMALL:
        torch.set_num_threads(_THREADS)
    return language


def _folder(option: str, name: str) -> Path:
    folder = (TOP / Path(name).expanduser()).resolve()
    if not folder.is_dir():
        raise UsageError(f"{option}={name}: no such folder; one with a Llama-format checkpoint is wanted")
    return folder


class Writer:
    """A contestant, and how long it has worked."""

    def __init__(self, name: str, run: Run) -> None:
        self.name, self.run, self.seconds, self.done = name, run, 0.0, False

    def write(self) -> None:
        """Goes on for a step."""
        begin = time.perf_counter()
        self.done = not self.run.step()
        self.seconds += time.perf_counter() - begin

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.run.tokens / self.seconds if self.seconds else 0.0

    def shown(self, width: int) -> RenderableType:
        """A line for each text, with as much of its end as there is room for."""
        table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
        table.add_column(no_wrap=True, style="dim")
        table.add_column(no_wrap=True)
        rows = self.run.rows()
        words = max((len(about) for about, _ in rows), default=0)
        room = max(8, width - words - 6)
        for about, text in rows:
            flat = text.replace("\n", "⏎")
            table.add_row(about, Text(flat if len(flat) <= room else f"…{flat[1 - room :]}"))
        figures = {**self.run.figures(), "tokens/s": f"{self.rate:.0f}"}
        state = "done" if self.done else "writes"
        # A name and its value stay on one line.
        facts = "  ".join(f"{name} {value}".replace(" ", "\xa0") for name, value in figures.items())
        below = Text(textwrap.fill(facts, width - len("│  │")).replace("\xa0", " "), style="bold")
        return Panel(Group(table, below), title=f"{self.name}: {state}", title_align="left")


def _race(writers: list[Writer], out: Console) -> None:
    """Gives the turn to the one who has worked least, until all have written all."""

    def screen() -> RenderableType:
        return Group(*(writer.shown(out.width) for writer in writers))

    painted = 0.0
    with Live(screen(), console=out, auto_refresh=False) as live, torch.no_grad():
        while waiting := [writer for writer in writers if not writer.done]:
            min(waiting, key=lambda writer: writer.seconds).write()
            if time.monotonic() - painted > _REFRESH_SECONDS:
                live.update(screen(), refresh=True)
                painted = time.monotonic()
        live.update(screen(), refresh=True)
    if not out.is_terminal:
        out.print()


def compared(writers: list[Writer]) -> Iterator[str]:
    """How fast the first one was beside the others, and whether they wrote the same."""
    first, *others = writers
    for other in others:
        times = f"{first.rate / other.rate:.1f} times {other.name}'s {other.rate:.0f}" if other.rate else "alone"
        same = [text for _, text in first.run.rows()] == [text for _, text in other.run.rows()]
        texts = "the same text" if same else "another text, which greedy decoding must not do"
        yield f"{first.name}: {first.rate:.0f} tokens/s, {times}; {texts}"
