"""Without the prebuilt (6.10): torch.utils.checkpoint is reached neither in forward nor in backward."""

import inspect
from contextlib import suppress
from typing import Any

import torch
import torch.utils.checkpoint as prebuilt
from torch import Tensor

from harness.testing import Close, Prebuilt, Subject, calls, forbid, requirement

from .reference import (
    NOTHING_TWICE,
    Block,
    Pair,
    Precision,
    Rich,
    Stack,
    nested_wrapper,
    precision_step,
    randoms,
    run_backward,
    same_gradient,
    seeded,
    tokens,
)

CHECKPOINT = Prebuilt(
    operators=(),
    functions=(
        inspect.unwrap(prebuilt.checkpoint),
        prebuilt.checkpoint_sequential,
        prebuilt.CheckpointFunction.forward,
        prebuilt.CheckpointFunction.backward,
        prebuilt._checkpoint_without_reentrant_generator,
        prebuilt._CheckpointFrame.__init__,
        prebuilt.detach_variable,
        prebuilt.get_device_states,
        prebuilt.set_device_states,
    ),
    means="an autograd.Function or saved-tensor hooks",
)


@requirement("6.10")
def test_the_prebuilt_checkpoint_is_not_reached(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A training step of a wrapped model gives the plain output and gradient while torch.utils.checkpoint raises."""
    input_ids = tokens(rng)
    outputs: list[Tensor] = []

    def step(model: Any) -> None:
        outputs.append(model(input_ids))
        outputs[-1].square().sum().backward()

    with forbid(CHECKPOINT, "a training step"):
        pair = Pair(subject, lambda: Stack(2))
        pair.step(step)

    close(outputs[1], outputs[0], "forward with torch.utils.checkpoint out of reach", tolerance=1e-2)
    came, wanted = pair.wrapped.embedding.weight.grad, pair.plain.embedding.weight.grad
    what = "backward with torch.utils.checkpoint out of reach: gradient of the embedding"
    same_gradient(close, came, wanted, what, tolerance=1e-2)


@requirement("6.10")
def test_neither_is_it_in_later_steps(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """So do later steps of one model, in float32, the last with frozen layers."""
    input_ids = tokens(rng)
    pair = Pair(subject, lambda: Stack(1), dtype=torch.float32)
    for number in (1, 2):
        for model in (pair.plain, pair.wrapped):
            model.layers.requires_grad_(number == 1)
            model.zero_grad()
        with forbid(CHECKPOINT, f"step {number} of a wrapped model in float32"):
            pair.step(lambda model: model(input_ids).square().sum().backward())
        came, wanted = pair.wrapped.embedding.weight.grad, pair.plain.embedding.weight.grad
        same_gradient(close, came, wanted, f"step {number}: gradient of the embedding", tolerance=1e-2)


@requirement("6.10")
def test_neither_is_it_with_harder_calls(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """So do `checkpoint` itself and calls that are harder."""
    x, y = randoms(rng, 2)
    block, plain = seeded(Block), seeded(Block)
    for case in ("checkpoint", "structures", "autocast", "dropout", "nested", "no input gradient"):
        # Whether such calls give the right thing is the others' question.
        with forbid(CHECKPOINT, f"a training step ({case})"), suppress(Exception):
            harder_call(subject, case, x.detach().requires_grad_(case != "no input gradient"), y)

    with forbid(CHECKPOINT, "a training step"), calls(block.up) as entered:
        run_backward(subject.CheckpointWrapper(block)(x).square().sum())
    plain(z := x.detach().requires_grad_()).square().sum().backward()
    same_gradient(close, x.grad, z.grad, "backward through a wrapper: gradient of x", tolerance=1e-2)
    assert entered[block.up] > 1, f"training step: {NOTHING_TWICE}"


def harder_call(subject: Subject, case: str, x: Tensor, y: Tensor) -> None:
    """A step that code may treat in a way of its own."""
    if case == "checkpoint":
        subject.checkpoint(seeded(Block), x.detach().repeat(99, 1).requires_grad_()).sum().backward()
    elif case == "nested":
        nested_wrapper(subject, seeded(Block))(x).sum().backward()
    elif case == "structures":
        nested = (x, {"a": y, "b": ([y], 3)})
        subject.CheckpointWrapper(seeded(Rich))(nested, mode="structures")["out"][0].sum().backward()
    elif case == "autocast":
        leaf = x.detach().float().requires_grad_()
        precision_step(subject.CheckpointWrapper(seeded(Precision, torch.float32)), leaf, "bfloat16", "off")
    else:
        subject.CheckpointWrapper(seeded(lambda: Block(p=0.5)))(x).sum().backward()
