"""Buckets (10.3): number, order, dtype and size of the all_reduce calls."""

from inspect import signature
from typing import Any

import pytest
import torch

from harness.testing import Close, Subject, requirement

from .ranks import note, run
from .reference import (
    Back,
    Bag,
    Step,
    Trained,
    backward,
    bags,
    bucket_calls,
    buckets,
    by_step,
    finish,
    gradients,
    misfit,
    roughly,
    train,
    wanted,
)

F4, F2 = torch.float32, torch.bfloat16
# Shapes, a cap in bytes, and which are frozen or tied; each with what it shows.
CASES: dict[str, tuple[tuple[Any, ...], float, dict[str, Any]]] = {
    "by hand": ((3, 2, 4, 5), 56, {}),
    "all in one": ((3, 2, 4), 10_000, {}),
    "the cap exactly": ((3, 2, 4, 2), 48, {}),
    "a bit less": ((3, 2, 4, 2), 47.6, {}),
    "larger than the cap": ((9, 1, 7, 2, 1, 8), 24, {}),
    "one each": ((3, 2, 4), 1, {}),
    "two dtypes": (((3, F4), 2, (4, F4), (1, F4), 5), 10_000, {}),
    "bytes, not numbers": (((8, F4), (7, F2), (9, F2), (4, F4), 3), 32, {}),
    "frozen": ((3, 5, 2, 4, 6), 48, {"frozen": [1, 4]}),
    "tied": ((3, (2, 2), 2, 4), 48, {"tied": [1, 3]}),
    "nothing to train": ((3,), 48, {"frozen": [0]}),
}


def steps_of(bag: Bag, size: int) -> list[Step]:
    """Three steps in which every parameter gets a gradient, in another order each time."""
    order = tuple(bag.trainable)
    orders = (order, order[::-1], order[1:] + order[:1])
    return [[[Back(one, (1.0, 2.0 + rank))] for rank in range(size)] if order else [[]] * size for one in orders]


def fit(close: Close, models: list[Bag], cap: float, plan: list[Step], came: Trained, what: str) -> None:
    """The calls of every step are those of the rule, and the values are right."""
    groups = buckets(models[0], cap)
    for number, (step, logs) in enumerate(zip(plan, came.logs, strict=True)):
        where = f"{what}, step {number + 1}"
        for rank, log in enumerate(logs):
            about = misfit(bucket_calls(log, models[0], groups), models[0], groups)
            assert not about, f"{where}, rank {rank}: {about}\n{said(models[0], cap, groups)}"
        expected = wanted(models[0], step)
        roughly(close, came.gradients[number][0], expected, len(models), where)


def said(bag: Bag, cap: float, groups: list[list[int]]) -> str:
    """The rule's outcome in words."""
    sizes = ", ".join(f"p{i} {bag.all[i].nbytes}" for i in bag.trainable)
    listed = ", ".join("[" + " ".join(f"p{i}" for i in group) + "]" for group in groups)
    return f"trainable parameters, in bytes: {sizes}; the cap is {cap:g} bytes; the rule gives {listed}"


@requirement("10.3")
@pytest.mark.parametrize("case", CASES, ids=[name.replace(" ", "-") for name in CASES])
def test_buckets_are_those_of_the_rule(subject: Subject, close: Close, rng: torch.Generator, case: str) -> None:
    """Each step makes one all_reduce per bucket, of its numbers and dtype, in the rule's order."""
    shapes, cap, options = CASES[case]
    models = bags(2, rng, *shapes, **options)
    plan = steps_of(models[0], 2)

    came = train(subject, models, cap, plan)

    fit(close, models, cap, plan, came, f"DataParallel, {case}")


@requirement("10.3")
def test_the_default_cap_is_25_mib(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Without a cap a bucket takes 25 · 2**20 bytes: small parameters are in one."""
    kind = subject.DataParallel
    default = signature(kind).parameters["bucket_cap_mb"].default
    number = isinstance(default, int | float)
    assert not number or default == 25, f"DataParallel(module, bucket_cap_mb={default}): 25.0 was wanted, in MiB"
    # Where the default is no number, what it stands for is seen with large parameters alone: 12 MiB each.
    models = bags(2, rng, *((3, 2, 4) if number else (3 * 2**19,) * 3))

    def job(rank: int) -> None:
        parallel = kind(models[rank])
        note("step")
        backward(parallel, Back((0, 1, 2)))
        finish(parallel)

    _, logs = run(2, job)
    groups = buckets(models[0], 25 * 2**20)
    about = misfit(bucket_calls(by_step(logs[0])[0], models[0], groups), models[0], groups)
    assert not about, f"DataParallel(module) without a cap: {about}"
    roughly(close, gradients(models[1]), wanted(models[1], [[Back((0, 1, 2))]]), 2, "DataParallel(module), rank 1")


@requirement("10.3")
def test_every_rank_count_has_the_same_buckets(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """One rank and three send the same buckets as two."""
    for size in (1, 3):
        models = bags(size, rng, 3, 2, 4, 5)
        plan = steps_of(models[0], size)

        came = train(subject, models, 56, plan)

        fit(close, models, 56, plan, came, f"DataParallel on {size} ranks")
