"""Keeps each exercise's patterns.json, and proves that it names mistakes: mistakes re-made in variants are named, by
their own name, and right code is not.
"""

import random
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.model import bank, patterns
from harness.model.bank import Mistake
from harness.model.exercise import Exercise
from harness.model.paths import shown, write_whole
from harness.model.patterns import Pattern
from harness.model.results import Result
from harness.runner.judge import Judge

# How many mistakes of an exercise `make test` judges again, and how many re-made ones `make bank` does at most.
SAMPLE, REMADE = 3, 60
_AT_LEAST_NAMED, _AT_MOST_WRONG, _ENOUGH = 0.5, 0.05, 100


@dataclass
class Shares:
    """Of the mistakes that were re-made in variants and fail: how many are named, and how many by another's name."""

    failing: int = 0
    named: int = 0
    wrong: int = 0
    right_code_named: int = 0

    def __str__(self) -> str:
        return (
            f"of {self.failing} mistakes re-made in variants {self.named} are named, {self.wrong} wrongly; "
            f"of right texts {self.right_code_named}"
        )

    def problems(self) -> Iterator[str]:
        """What does not hold."""
        if self.right_code_named:
            yield "right code is named as a mistake"
        if self.failing >= _ENOUGH and self.named < _AT_LEAST_NAMED * self.failing:
            yield f"fewer than {_AT_LEAST_NAMED:.0%} of the re-made mistakes are named"
        if self.failing >= _ENOUGH and self.wrong > _AT_MOST_WRONG * self.failing:
            yield f"more than {_AT_MOST_WRONG:.0%} of the re-made mistakes are named wrongly"


def run(judge: Judge, chosen: list[Exercise], only: str) -> int:
    """Writes the patterns of each exercise (or those of mistakes whose name contains `only`), then proves them."""
    shares = Shares()
    for exercise in chosen:
        checks, known = patterns.load(exercise)
        known = known if only and checks == set(judge.names(exercise, "code")) else {}
        for mistake in bank.mistakes(exercise).values():
            if only in mistake.name:
                known[mistake.name] = _judged(judge, exercise, mistake.applied_to(bank.answer(exercise)))
        print(write(judge, exercise, known), flush=True)
        prove(judge, exercise, shares)
    print(shares)
    for problem in (problems := list(shares.problems())):
        print(f"problem: {problem}")
    return 1 if problems else 0


def write(judge: Judge, exercise: Exercise, known: dict[str, Pattern]) -> str:
    """Writes an exercise's file, and says so."""
    write_whole(exercise.patterns_file, patterns.text(judge.names(exercise, "code"), known))
    return f"{shown(exercise.patterns_file)}: {sum(map(bool, known.values()))} mistakes"


def stale(judge: Judge, exercise: Exercise) -> Iterator[str]:
    """What shows that an exercise's file is not as its bank and its checks are now; judges a few mistakes for it."""
    if not exercise.patterns_file.exists():
        return
    writes = f"make bank EX={exercise.number} writes it"
    checks, known = patterns.load(exercise)
    mistakes = bank.mistakes(exercise)
    if checks != set(judge.names(exercise, "code")):
        yield f"{shown(exercise.patterns_file)} is stale: its checks are others; {writes}"
        return
    if gone := sorted(known.keys() - mistakes.keys()):
        yield f"{shown(exercise.patterns_file)} is stale: {', '.join(gone)} is no mistake; {writes}"
    for name in random.Random(exercise.number).sample(sorted(mistakes), min(SAMPLE, len(mistakes))):
        now = _judged(judge, exercise, mistakes[name].applied_to(bank.answer(exercise)))
        if _kinds(now) != _kinds(known.get(name, {})):
            yield f"{shown(exercise.patterns_file)} is stale: {name} fails otherwise; {writes}"


def prove(judge: Judge, exercise: Exercise, shares: Shares) -> None:
    """Adds an exercise's shares: on right texts, and on mistakes re-made in variants."""
    names = ["answer", *exercise.variant_files]
    for name in names:
        shares.right_code_named += bool(_named(judge, exercise, bank.right_code(exercise, name)))
    remade = [one for name in names[1:] for one in remade_in(bank.right_code(exercise, name), _all(exercise))]
    random.Random(0).shuffle(remade)
    for mistake, text in remade[:REMADE]:
        results = _results(judge, exercise, text)
        if patterns.pattern(results):
            named = patterns.diagnosis(exercise, results)
            shares.failing += 1
            shares.named += named == patterns.words(exercise, mistake.name)
            shares.wrong += named not in ("", patterns.words(exercise, mistake.name))


def remade_in(variant: str, mistakes: Iterable[Mistake]) -> Iterator[tuple[Mistake, str]]:
    """The mistakes whose edits fit a variant's text, with the text that they make of it."""
    for mistake in mistakes:
        try:
            yield mistake, mistake.applied_to(variant)
        except bank.BankError:
            continue


def _all(exercise: Exercise) -> Iterable[Mistake]:
    return bank.mistakes(exercise).values()


def _kinds(one: Pattern) -> dict[str, str]:
    return {check: how[0] for check, how in one.items()}


def _judged(judge: Judge, exercise: Exercise, text: str) -> Pattern:
    return patterns.pattern(_results(judge, exercise, text))


def _named(judge: Judge, exercise: Exercise, text: str) -> str:
    return patterns.diagnosis(exercise, _results(judge, exercise, text))


def _results(judge: Judge, exercise: Exercise, text: str) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / exercise.file_name).write_text(text, encoding="utf-8")
        return judge.results(exercise, Path(folder), ("code",))
