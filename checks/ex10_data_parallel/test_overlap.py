"""Overlap and missing gradients (10.4, 10.5)."""

import pytest
import torch

from harness.testing import Close, Subject, requirement

from .reference import (
    Back,
    Bag,
    Step,
    Trained,
    bags,
    bucket_calls,
    buckets,
    late,
    misfit,
    own_groups,
    roughly,
    train,
    waits,
    wanted,
)

RULE = "a bucket starts in backward once its gradients are ready and all before it have started"
HIDDEN = "start with async_op=True inside backward, and wait in finish: the others' gradients are computed meanwhile"


def overlapped(close: Close, models: list[Bag], cap: float, plan: list[Step], came: Trained, what: str) -> None:
    """Every bucket of every step starts as soon as it may, and is waited for in finish alone."""
    groups = buckets(models[0], cap)
    for number, (step, logs) in enumerate(zip(plan, came.logs, strict=True)):
        for rank, log in enumerate(logs):
            where = f"{what}, step {number + 1}, rank {rank}"
            calls = bucket_calls(log, models[0], groups)
            inside, running = waits(log)
            assert not inside, f"{where}: backward waits for {len(inside)} calls\n{HIDDEN}"
            assert not running, f"{where}: finish leaves {len(running)} calls running\nfinish waits for every bucket"
            fitting = not misfit(calls, models[0], groups)
            own = groups if fitting else own_groups(calls, models[0])
            if own is not None:
                about = late(log, calls, own)
                assert not about, f"{where}: {about}\n{RULE}"
            else:  # Which buckets they are is judged elsewhere.
                assert any(one.place == "backward" for one in calls), f"{where}: no bucket starts in backward\n{RULE}"
        roughly(close, came.gradients[number][0], wanted(models[0], step), len(models), f"{what}, step {number + 1}")


def orders(*each: tuple[int, ...]) -> list[Step]:
    """Steps in which parameters are used in these orders; gradients come the other way around."""
    return [[[Back(order, (1.0 + rank,))] for rank in range(2)] for order in each]


@requirement("10.4")
def test_each_bucket_starts_when_it_is_ready(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Parameters in buckets of their own: in the rule's order each starts at its gradient."""
    models = bags(2, rng, 1, 4, 9, 16, 25, 36)
    plan = orders((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5))

    came = train(subject, models, 1, plan)

    overlapped(close, models, 1, plan, came, "one parameter in each bucket")


@requirement("10.4")
@pytest.mark.parametrize("order", [(3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 1, 3)], ids=["first-last", "mixed", "early"])
def test_buckets_start_in_order(subject: Subject, close: Close, rng: torch.Generator, order: tuple[int, ...]) -> None:
    """A bucket that is ready early waits for those before it, then starts at once; in every step."""
    models = bags(2, rng, 1, 4, 9, 16)
    plan = orders(order, (0, 1, 2, 3), order)

    came = train(subject, models, 1, plan)

    overlapped(close, models, 1, plan, came, f"parameters used in the order {list(order)}")


@requirement("10.4")
def test_a_bucket_waits_for_its_last_gradient(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """By hand: c, b, d and a come in this order; bucket 0 and 1 start at d, bucket 2 at a."""
    models = bags(2, rng, 3, 2, 4, 5)
    plan = orders((0, 3, 1, 2), (0, 1, 2, 3), (3, 1, 0, 2), (0, 3, 1, 2))

    came = train(subject, models, 56, plan)

    overlapped(close, models, 56, plan, came, "buckets [p3], [p2 p1], [p0]")


@requirement("10.4")
def test_a_parameter_used_twice_is_ready_once(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A tied parameter's bucket starts once its whole gradient is there; frozen ones are waited for by nobody."""
    models = bags(2, rng, 2, 3, 4, 2, frozen=[2], tied=[1])
    plan = orders((1, 0, 2, 3, 1), (0, 3, 1, 1, 2))

    came = train(subject, models, 44, plan)

    overlapped(close, models, 44, plan, came, "a parameter used twice")


# 10.5 missing gradients

ALL = (0, 1, 2, 3)
# What each of two ranks uses, step by step; None: it runs no backward.
MISSING: dict[str, list[tuple[tuple[int, ...] | None, tuple[int, ...] | None]]] = {
    "on rank 1": [(ALL, (0, 1, 3))],
    "on rank 0": [((0, 1, 3), ALL)],
    "on all": [((0, 1, 3), (1, 0, 3))],
    "in the first bucket": [((0, 1, 2), ALL)],
    "in the last bucket": [((3, 1, 2), ALL)],
    "in some steps": [(ALL, ALL), ((0, 2), (2, 0)), (ALL, (3,)), (ALL, ALL)],
    "different ones on each rank": [((0, 2), (1, 3)), ((1, 3), (0, 2))],
    "rank 1 without backward": [(ALL, None), (ALL, ALL)],
    "rank 0 without backward": [(ALL, ALL), (None, (1, 2))],
    "no backward at all": [(None, None), (ALL, ALL)],
}


# With one bucket, and with one for each parameter.
OTHERWISE = {case: MISSING[case] for case in ("in some steps", "different ones on each rank", "no backward at all")}


@requirement("10.5")
@pytest.mark.parametrize("cap", [56, 1, 1000])
def test_missing_gradients(subject: Subject, close: Close, rng: torch.Generator, cap: int) -> None:
    """Whatever is missing where: all ranks go on, and end with the values and the Nones of one process."""
    for case, steps in MISSING.items() if cap == 56 else OTHERWISE.items():
        models = bags(2, rng, 3, 2, 4, 5)
        rows = ((2.0, 1.0), (4.0,))
        plan = [[[] if used is None else [Back(used, rows[rank])] for rank, used in enumerate(both)] for both in steps]

        what = f"gradients missing {case}"
        came = train(subject, models, cap, plan, what)

        for number, step in enumerate(plan):
            for rank in range(2):
                where = f"{what}, step {number + 1}, rank {rank}"
                hint = "a missing gradient counts as zero; where no rank has one, .grad stays None"
                roughly(close, came.gradients[number][rank], wanted(models[0], step), 2, where, hint)


@requirement("10.5")
def test_a_zero_gradient_is_not_a_missing_one(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Gradients that are zero, or cancel over the ranks, are there: .grad is zeros, on every rank."""
    for rows in (((0.0,), (0.0,)), ((2.0,), (-2.0,)), ((), ())):
        models = bags(2, rng, 3, 2)
        step = [[Back((0,), rows[0])], [Back((1, 0), rows[1])]]
        expected = wanted(models[0], step)

        came = train(subject, models, 100, [step]).gradients[0]

        for rank in range(2):
            what = f"gradients of rows {rows[rank]} on rank {rank}, {rows} on the ranks"
            roughly(close, came[rank], expected, 2, what, "a gradient of zeros is a gradient, not a missing one")


@requirement("10.5")
def test_missing_in_two_dtypes_on_three_ranks(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """In bfloat16 and float64, and where it is not contiguous, what a single rank of three has reaches all."""
    models = bags(3, rng, (3, torch.bfloat16), (2, 3), (4, torch.bfloat16), 1)
    for model in models:
        model.all[1].data = model.all[1].data.mT.contiguous().mT
    plan = [
        [[Back((0, 1))], [Back((2,), (6.0,))], []],
        [[], [], [Back((0, 1, 2, 3), (3.0,))]],
        [[Back((1,))], [Back((1,))], [Back((1,))]],
    ]

    came = train(subject, models, 100, plan, "gradients missing in two dtypes on three ranks")

    for number, step in enumerate(plan):
        for rank in range(3):
            what = f"two dtypes on three ranks, step {number + 1}, rank {rank}"
            roughly(close, came.gradients[number][rank], wanted(models[0], step), 3, what)
