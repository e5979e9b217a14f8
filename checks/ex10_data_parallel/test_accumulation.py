"""Accumulation under no_sync (10.6)."""

from contextlib import suppress
from typing import Any

import pytest
import torch

from harness.testing import Close, Subject, requirement

from .meeting import Call
from .ranks import done, run
from .reference import (
    Back,
    Bag,
    Gradients,
    Step,
    backward,
    bags,
    finish,
    gradients,
    roughly,
    sent,
    train,
    wanted,
)

# Buckets are [p3], [p2 p1] and [p0]; gradients come from the last used to the first.
LAST = (0, 3, 1, 2)
LOST = "what backward added under no_sync is part of .grad, and of the average"


def judged(subject: Subject, close: Close, models: list[Bag], plan: list[Step], what: str) -> None:
    """Nothing is sent under no_sync, then each bucket as in a step without it; the values are those of one process."""
    size = len(models)
    plain: Step = [[Back(LAST)] for _ in range(size)]

    came = train(subject, models, 56, [plain, *plan], what)

    for number, (step, logs) in enumerate(zip([plain, *plan], came.logs, strict=True)):
        where = f"{what}, step {number}" if number else "a step without no_sync"
        for rank, log in enumerate(logs):
            early = [one for one in sent(log) if one.place not in ("backward", "finish")]
            assert not early, (
                f"{where}, rank {rank}: {early[0].call} in {early[0].place}; no_sync sends nothing, on a "
                "rank that is in it"
            )
            usual, calls = sent(came.logs[0][rank]), sent(log)
            kinds = [[str(one.call) for one in some] for some in (calls, usual)]
            assert kinds[0] == kinds[1], (
                f"{where}, rank {rank}: {len(calls)} calls came, {len(usual)} were wanted: each bucket once, as in a "
                "step without no_sync"
            )
            if [back.order for back in step[rank] if not back.quiet] == [LAST]:
                starts = [[(one.place, one.after) for one in some] for some in (calls, usual)]
                assert starts[0] == starts[1], (
                    f"{where}, rank {rank}: the buckets start {_places(starts[0])}; in a step without no_sync they "
                    f"start {_places(starts[1])}\nno_sync acts on its own rank, to its end; the next backward overlaps "
                    "as ever"
                )
        for rank in range(size):
            about = f"{where}, rank {rank}"
            roughly(close, came.gradients[number][rank], wanted(models[0], step), size, about, LOST)


def _places(starts: list[tuple[str, int]]) -> str:
    return ", ".join(f"after gradient {after}" if place == "backward" else f"in {place}" for place, after in starts)


@requirement("10.6")
@pytest.mark.parametrize("backwards", [2, 4])
def test_the_last_backward_sends(subject: Subject, close: Close, rng: torch.Generator, backwards: int) -> None:
    """All but the last backward send nothing; the last sends each bucket as ever; .grad is the average of all."""
    models = bags(2, rng, 3, 2, 4, 5)
    step: Step = [
        [Back(LAST, (1.0 + k, float(rank)), quiet=k < backwards - 1) for k in range(backwards)] for rank in range(2)
    ]

    judged(subject, close, models, [step, step], f"{backwards} backwards, all but the last under no_sync")


@requirement("10.6")
def test_a_parameter_of_an_early_backward_only(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """What took part under no_sync alone, on one rank or on both, is averaged too."""
    models = bags(2, rng, 3, 2, 4, 5)
    plan: list[Step] = [
        [[Back((0, 3), (2.0,), quiet=True), Back((1, 2))], [Back((0,), quiet=True), Back((1, 2, 3))]],
        [[Back((1,), (3.0,), quiet=True), Back((0, 2, 3))], [Back((0, 1, 2, 3))]],
        [[Back(LAST)], [Back(LAST)]],
    ]

    judged(subject, close, models, plan, "a parameter in an early backward only")


@requirement("10.6")
def test_only_backwards_under_no_sync(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Where no backward runs outside no_sync, on one rank or on all, finish sends every bucket."""
    models = bags(2, rng, 3, 2, 4, 5)
    plan: list[Step] = [
        [[Back(LAST, (2.0,), quiet=True), Back(LAST, quiet=True)], [Back(LAST, quiet=True)]],
        [[Back(LAST, (2.0,), quiet=True)], [Back(LAST)]],
        [[Back(LAST)], [Back(LAST)]],
    ]

    judged(subject, close, models, plan, "backwards under no_sync alone")


@requirement("10.6")
def test_gradients_add_up_over_steps(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Where .grad is not set to None between steps, the next average adds to the one that is there."""
    models = bags(2, rng, 3, 2)
    kind = subject.DataParallel

    def job(rank: int) -> list[Gradients]:
        parallel, found = kind(models[rank], bucket_cap_mb=1.0), []
        for rows in ((1.0 + rank,), (4.0 * rank,)):
            backward(parallel, Back((0, 1), rows))
            finish(parallel)
            found.append(gradients(models[rank]))
        return found

    results, _ = run(2, job)

    # What is judged elsewhere is the factor of the first step: sums in place of averages.
    factor = float(results[0][0][0][0] / models[0].all[0].detach()[0].cos()) / 1.5
    factor = factor if 0.4 < factor < 2.1 else 1.0
    for rank in range(2):
        for came, total in zip(results[rank], (1.5 * factor, (1.5 * factor + 2.0) * factor), strict=True):
            expected: Gradients = [parameter.detach().cos() * total for parameter in models[0].all]
            roughly(close, came, expected, 1, f"two steps without zero_grad between, rank {rank}", LOST)


def once(parallel: Any) -> None:
    """One forward and backward, in whatever context."""
    parallel(torch.ones(1, dtype=torch.float64), order=(0, 1)).sum().backward()


def calls(since: int) -> int:
    """How many calls the rank that runs has made, beyond those."""
    return sum(isinstance(entry, Call) for entry in done()) - since


def plain(kind: Any, model: Bag) -> tuple[Any, int]:
    """A new wrapper after a step without no_sync, and how many calls its backward made."""
    parallel = kind(model, bucket_cap_mb=1.0)
    before = calls(0)
    once(parallel)
    usual = calls(before)
    parallel.finish()
    model.zero_grad()
    return parallel, usual


@requirement("10.6")
def test_no_sync_acts_where_backward_runs(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A forward inside whose backward runs outside is sent; one outside whose backward runs inside is not."""
    models = bags(2, rng, 3, 2)
    kind = subject.DataParallel

    def job(rank: int) -> tuple[int, int, Gradients]:
        parallel, usual = plain(kind, models[rank])
        x = torch.ones(1, dtype=torch.float64)
        before = calls(0)
        context = parallel.no_sync()
        outside = parallel(x, order=(0, 1)).sum()
        with context:
            inside = parallel(x, order=(0, 1)).sum()
            outside.backward()
        quiet = calls(before)
        inside.backward()
        loud = calls(before) - quiet - usual
        parallel.finish()
        return quiet, loud, gradients(models[rank])

    results, _ = run(2, job)

    for rank, (quiet, loud, came) in enumerate(results):
        assert not quiet, f"rank {rank}: a backward under no_sync of a forward before it makes {quiet} calls"
        assert not loud, f"rank {rank}: a backward after no_sync of a forward inside makes {loud:+} calls before finish"
        expected: Gradients = [parameter.detach().cos() * 2 for parameter in models[0].all]
        roughly(close, came, expected, 2, f"forward and backward on two sides of no_sync, rank {rank}", LOST)


def nested(parallel: Any) -> None:
    """Two backwards under no_sync, the first of them under another."""
    with parallel.no_sync():
        with parallel.no_sync():
            once(parallel)
        once(parallel)


def failing(parallel: Any) -> None:
    """A backward under a no_sync that an exception ends."""
    with suppress(ArithmeticError), parallel.no_sync():
        once(parallel)
        raise ArithmeticError("a bad batch")


def failing_inside(parallel: Any) -> None:
    """An exception ends the inner of two."""
    with parallel.no_sync():
        failing(parallel)
        once(parallel)


def again(parallel: Any) -> None:
    """One after the other."""
    for _ in range(2):
        with parallel.no_sync():
            once(parallel)


# What is done under no_sync, and how many backwards that is.
ENDS = {"nested": (nested, 2), "exception": (failing, 1), "exception-inside": (failing_inside, 2), "again": (again, 2)}


@requirement("10.6")
@pytest.mark.parametrize("how", ENDS)
def test_no_sync_ends_where_it_ends(subject: Subject, close: Close, rng: torch.Generator, how: str) -> None:
    """After an inner no_sync the outer one still acts; after the outer one, or an exception, none does."""
    models = bags(2, rng, 3, 2)
    kind, (act, times) = subject.DataParallel, ENDS[how]

    def job(rank: int) -> tuple[int, int, Gradients]:
        parallel, usual = plain(kind, models[rank])
        before = calls(0)
        act(parallel)
        quiet = calls(before)
        once(parallel)
        loud = calls(before) - quiet - usual
        parallel.finish()
        return quiet, loud, gradients(models[rank])

    results, _ = run(2, job)

    for rank, (quiet, loud, came) in enumerate(results):
        assert not quiet, f"no_sync, {how}, rank {rank}: {quiet} calls before its end; it acts until there"
        assert not loud, (
            f"no_sync, {how}, rank {rank}: {loud:+} calls in the backward after it; it goes on after its end"
        )
        expected: Gradients = [parameter.detach().cos() * (times + 1) for parameter in models[0].all]
        roughly(close, came, expected, 2, f"no_sync, {how}, rank {rank}", LOST)
