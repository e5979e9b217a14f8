"""Judges the judge: runs an exercise's whole bank through its checks and names what does not hold."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from devtools import patterns, practised
from harness.model import bank
from harness.model.bank import Mistake
from harness.model.exercise import Exercise
from harness.model.patterns import Pattern, pattern
from harness.model.results import READABILITY, ExerciseVerdict, Result, verdict_of
from harness.report import terminal
from harness.runner.judge import Judge
from harness.sandbox.hugepages import use_huge_pages
from harness.testing.check import KINDS, Check, Kind

# About so many mistakes of an exercise `make test` tries; `make bank` tries all.
QUICK = 40
_LATER = "the rest of the bank is judged once this is done"


@dataclass
class Matrix:
    """What each mistake failed, by requirement, and what is wrong with the bank or the checks, one sentence each; where
    all checks ran on a mistake, also how it fails.
    """

    exercise: Exercise
    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    patterns: dict[str, Pattern] = field(default_factory=dict)


def run(checks: list[Check], chosen: list[Exercise], only: str, full: bool) -> int:
    """Prints the kill matrix of each exercise; 1 if anything does not hold."""
    judge, problems, shares = Judge(checks, halves=False), 0, patterns.Shares()
    use_huge_pages()
    for exercise in chosen:
        matrix = build(judge, exercise, only, full)
        if not only and not matrix.problems:
            matrix.problems += list(practised.renew(judge, exercise)) if full else []
            matrix.problems += practised.problems(judge, exercise, full)
        show(matrix, terminal.console())
        problems += len(matrix.problems)
        if full and not only and not matrix.problems:
            print(patterns.write(judge, exercise, matrix.patterns), flush=True)
            patterns.prove(judge, exercise, shares)
    if shares.failing:
        print(shares)
    for problem in shares.problems():
        print(f"problem: {problem}")
        problems += 1
    return 1 if problems else 0


def build(judge: Judge, exercise: Exercise, only: str = "", full: bool = True) -> Matrix:
    """Runs the starter, the answer, every variant and every mistake (or those whose name contains `only`).

    Args:
        full: run all checks on everything; else on some of the mistakes, on each the checks of the requirements that it
            names, until one fails, and all others only on the first mistake of each requirement that it alone catches;
            and variants without the linters, which `make lint` runs on all of them at once.
    """
    matrix = Matrix(exercise)
    mistakes = bank.mistakes(exercise)
    if problems := list(_slips(exercise, mistakes)):
        return Matrix(exercise, problems=[*problems, _LATER])
    matrix.problems += _form(exercise, mistakes)
    if not only:
        _starter(judge, matrix)
    if only in "answer" and not _right(judge, matrix, "answer", full):
        matrix.problems.append(_LATER)
        return matrix
    for name in exercise.variant_files:
        if only in name:
            _right(judge, matrix, name, full)
    proofs = {mistake.requirements[0]: mistake for mistake in reversed(mistakes.values()) if mistake.only}
    tried = mistakes if full or only else _some(mistakes, {one.name for one in proofs.values()} | set(exercise.slips))
    for mistake in tried.values():
        if only in mistake.name:
            _wrong(judge, matrix, mistake, full, proofs.get(mistake.requirements[0]) == mistake)
    if not full and not only:
        matrix.problems += patterns.stale(judge, exercise)
    return matrix


def _some(mistakes: dict[str, Mistake], wanted: set[str]) -> dict[str, Mistake]:
    """So many of a bank's mistakes, evenly spread, and all that are wanted."""
    every = max(1, -(-len(mistakes) // QUICK))
    return {name: one for place, (name, one) in enumerate(mistakes.items()) if name in wanted or place % every == 0}


def show(matrix: Matrix, out: Console) -> None:
    """Prints the matrix: a row per mistake, a column per requirement, the count of failed checks in the cells."""
    columns = [requirement.id for requirement in matrix.exercise.requirements]
    width = max(map(len, matrix.rows), default=0)
    out.print(f"{matrix.exercise.id}: checks failed by each mistake", soft_wrap=True)
    out.print(f"{'':<{width}} " + " ".join(f"{column:>5}" for column in columns), soft_wrap=True)
    for name, row in matrix.rows.items():
        cells = " ".join(f"{row.get(column, '.'):>5}" for column in columns)
        out.print(f"{name:<{width}} {cells}", soft_wrap=True, markup=False)
    for problem in matrix.problems:
        out.print(f"problem: {problem}", style="red", soft_wrap=True, markup=False)


def _slips(exercise: Exercise, mistakes: dict[str, Mistake]) -> Iterator[str]:
    for slip in exercise.slips:
        if slip not in mistakes:
            yield f"slip {slip} is no mistake of the bank"


def _form(exercise: Exercise, mistakes: dict[str, Mistake]) -> Iterator[str]:
    ids = {requirement.id for requirement in exercise.requirements}
    efficiency = {requirement.id for requirement in exercise.requirements if requirement.criterion == "efficiency"}
    for mistake in mistakes.values():
        if mistake.wasteful and not efficiency.issuperset(mistake.requirements):
            yield f"mistake {mistake.name} is wasteful, but {', '.join(mistake.requirements)} is not about efficiency"
        for number in set(mistake.requirements) - ids:
            yield f"mistake {mistake.name} is caught by {number}, which is no requirement"
    alone = {mistake.requirements[0] for mistake in mistakes.values() if mistake.only}
    for requirement in exercise.requirements:
        if requirement.id not in alone and requirement.criterion != READABILITY:
            yield f"requirement {requirement.id} has no mistake with only=True, which it alone catches"


def _starter(judge: Judge, matrix: Matrix) -> None:
    verdict, results = _judged(judge, matrix.exercise, matrix.exercise.starter, ("code", "own test"))
    if verdict.state != "not started" or verdict.score:
        matrix.problems.append(f"the starter is {verdict.state!r} with {verdict.score} points")
    for result in results:
        if result.outcome == "error":
            matrix.problems.append(f"on the starter, {result.name} ends in an error: {result.message}")


def _right(judge: Judge, matrix: Matrix, name: str, full: bool) -> bool:
    """Whether right code passes. A variant's own test is the answer's."""
    left_out = () if name == "answer" else ("own test",) if full else ("own test", "ruff", "mypy")
    text = bank.right_code(matrix.exercise, name)
    verdict, results = _judged(judge, matrix.exercise, text, tuple(kind for kind in KINDS if kind not in left_out))
    for result in results:
        if result.outcome != "passed":
            matrix.problems.append(f"{name} fails {result.requirement} {result.name}: {result.message}")
    if name == "answer" and verdict.score != verdict.max_score:
        matrix.problems.append(f"{name} earns {verdict.score} of {verdict.max_score} points")
    return all(result.outcome == "passed" for result in results)


def _wrong(judge: Judge, matrix: Matrix, mistake: Mistake, full: bool, proof: bool) -> None:
    exercise = matrix.exercise
    try:
        text = mistake.applied_to(bank.answer(exercise))
    except bank.BankError as error:
        matrix.problems.append(str(error))
        return
    checks = judge.checks(exercise)

    def kinds(*requirements: str) -> set[Kind]:
        return {check.kind for check in checks if check.requirement in requirements}

    results: list[Result] = []
    if full:
        _, results = _judged(judge, exercise, text, ("code", *kinds(*mistake.requirements)))
        of_the_code = judge.names(exercise, "code")
        matrix.patterns[mistake.name] = pattern(one for one in results if one.name in of_the_code)
    else:
        for number in mistake.requirements:
            results += _judged(judge, exercise, text, tuple(kinds(number)), number, at_first=True)[1]
        if proof:
            ids = [requirement.id for requirement in exercise.requirements]
            rest = [number for number in ids if number not in mistake.requirements]
            results += _judged(judge, exercise, text, ("code",), *rest, at_first=True)[1]
    failed = [result for result in results if result.outcome != "passed"]
    row: dict[str, str] = {}
    for result in failed:
        row[result.requirement] = str(int(row.get(result.requirement, "0")) + 1)
    matrix.rows[mistake.name] = row
    for number in mistake.requirements:
        if number not in row:
            matrix.problems.append(f"mistake {mistake.name} passes {number}")
    if mistake.only and (others := set(row) - set(mistake.requirements)):
        matrix.problems.append(
            f"mistake {mistake.name} also fails {', '.join(sorted(others))}, "
            f"not {' and '.join(mistake.requirements)} only"
        )
    first = next((result for result in failed if result.requirement == mistake.requirements[0]), None)
    if first is not None:
        matrix.messages[mistake.name] = first.message
        if mistake.says.lower() not in first.message.lower():
            matrix.problems.append(
                f"mistake {mistake.name}: {first.name} says {first.message!r}, which lacks its `says`, {mistake.says!r}"
            )


def _judged(
    judge: Judge, exercise: Exercise, text: str, kinds: Sequence[Kind], *requirements: str, at_first: bool = False
) -> tuple[ExerciseVerdict, list[Result]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / exercise.file_name
        path.write_text(text, encoding="utf-8")
        results = judge.results(exercise, Path(folder), kinds, requirements, at_first_failure=at_first)
    return verdict_of(exercise, results, untouched=text == exercise.starter), results
