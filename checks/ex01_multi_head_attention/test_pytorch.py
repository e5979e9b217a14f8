"""PyTorch (1.6, 1.8): output, weights and gradients equal nn.MultiheadAttention's; no prebuilt attention is reached."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.testing import Close, Subject, Where, forbid, halfway, prebuilt_attention, requirement

from .reference import (
    LK,
    LQ,
    PRECISE,
    VALUES,
    B,
    D,
    H,
    agree,
    agrees_with_pytorch,
    build,
    carries,
    inputs,
    reference,
    some_mask,
    unpack,
)

Guard = Callable[[str], AbstractContextManager[Any]]
# What is looked through for prebuilt attention: training and graph; the lengths and modes of a precision.
# Kernels choose by precision at any size: what is short is crossed with modes in float64, what is long in float32.
MODES: list[tuple[bool, Callable[[], AbstractContextManager[Any]]]] = [
    (True, nullcontext),
    (False, torch.inference_mode),
    (False, torch.no_grad),
    (False, nullcontext),
]
PRECISIONS = [(torch.float64,), (torch.float32,), (torch.float16, torch.bfloat16)]
LENGTHS = {
    torch.float64: [(LQ, LK, MODES), (40, 40, MODES[:2]), (1, LK, MODES)],
    torch.float32: [(lq, lk, MODES[:2]) for lq, lk in ((40, 40), (2, 1100), (1100, 3), (260, 260))],
}

# 1.6 agreement with PyTorch


@halfway
@requirement("1.6")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("lq", "lk"), [(LQ, LK), (LK, LK)], ids=["cross", "square"])
def test_agrees_with_pytorch(
    subject: Subject, close: Close, rng: torch.Generator, on: Where, lq: int, lk: int, training: bool
) -> None:
    """Output, weights and gradients equal nn.MultiheadAttention's with the same weights, in eval too."""
    agrees_with_pytorch(subject, close, rng, on, lq, lk, None, training)


@requirement("1.6")
def test_any_number_of_heads(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Any d_model and any number of heads that divides it, one and d_model too, give the formula; modules that share
    one of them do not mix.
    """
    sizes = [(20, 5), (20, 2), (15, 5), (7, 1), (6, 6)]
    modules = [build(subject, d_model=d_model, heads=heads) for d_model, heads in sizes]

    for (d_model, heads), attention in zip(sizes, modules, strict=True):
        given = [torch.randn(B, n, d_model, generator=rng, dtype=torch.float64) for n in (LQ, LK, LK)]
        agree(close, attention, given, hint=f"{d_model=}, {heads=}", heads=heads, tolerance=PRECISE)


@requirement("1.6")
def test_dropout_loses_no_precision(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """In float64 a weight that dropout keeps is w / (1 - p) to 1e-9, and so is its gradient; 1.5 judges the rest."""
    given, attention = [x.requires_grad_() for x in inputs(rng)], build(subject, dropout=0.3).train()

    weights = carries(unpack(attention(*given))[1], "forward: weights")

    wanted = reference(attention, *given)[1]
    shapes = f"weights of shape {tuple(weights.shape)} came, {tuple(wanted.shape)} was wanted"
    assert weights.shape == wanted.shape, f"forward in training: {shapes}"
    wanted = wanted * (weights.detach() != 0) / 0.7
    near = torch.isclose(weights.double(), wanted, rtol=VALUES, atol=VALUES)
    hint = "in float64, in training with dropout 0.3: is the factor 1 / 0.7 rounded to float32?"
    close(weights[near], wanted[near].detach(), "forward: weights", hint=hint)
    if near.all():
        came, want = (torch.autograd.grad(x.square().sum(), given[0])[0] for x in (weights, wanted))
        close(came, want, "backward: gradient of query", hint=hint)


@requirement("1.6")
def test_new_weights_count_at_once(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A call after the weights have changed, in place or by loading, uses the new ones, at inference too."""
    given = inputs(rng)
    attention = build(subject)
    agree(close, attention, given)

    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.mul_(-0.7)
    agree(close, attention, given, hint="the weights were changed in place before this call")
    larger = {name: value.detach() * 1.3 for name, value in attention.named_parameters()}
    attention.load_state_dict(attention.state_dict() | larger)
    agree(close, attention, given, hint="the weights were loaded anew before this call")
    for name in ("q_linear", "k_linear", "v_linear", "output_linear"):
        setattr(attention, name, nn.Linear(D, D, dtype=torch.float64))
        agree(close, attention, given, hint=f"{name} was replaced before this call")
    attention.eval()
    for factor in (1, -0.7):
        for parameter in attention.parameters():
            parameter.data.mul_(factor)
        with torch.no_grad():
            agree(close, attention, given, hint="weight.data was edited before this call, in eval, without gradients")


@requirement("1.6")
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_a_first_call_without_gradients_leaves_nothing(
    subject: Subject, close: Close, rng: torch.Generator, mode: str
) -> None:
    """A module whose first call makes no graph trains as any other."""
    given = [x.requires_grad_() for x in inputs(rng)]
    attention, fresh = build(subject), build(subject)
    fresh.load_state_dict(attention.state_dict())
    with getattr(torch, mode)():
        attention(*given)

    grads = [
        torch.autograd.grad(
            carries(unpack(module(*given))[0], "forward: output").sum(), [*given, module.v_linear.weight]
        )
        for module in (attention, fresh)
    ]

    for name, came, wanted in zip(("query", "key", "value", "v_linear.weight"), *grads, strict=True):
        close(came, wanted, f"backward after a first call under {mode}: gradient of {name}")
    agree(close, attention, [x.detach() for x in given])


@requirement("1.6")
def test_each_of_the_inputs_gets_its_own_gradient(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Query, key and value on the same memory are three inputs still, as in layer(x, x, x.detach())."""
    x = torch.randn(B, LQ, D, generator=rng, dtype=torch.float64)
    probe = torch.randn(B, LQ, D, generator=rng, dtype=torch.float64)
    given = [x.detach().requires_grad_() for _ in range(3)]
    attention = build(subject)

    wanted = torch.autograd.grad(reference(attention, *given)[0], given, probe)
    output = carries(unpack(attention(*given))[0], "forward: output")
    grads = torch.autograd.grad(output, given, probe, allow_unused=True)

    for name, came, part in zip(("query", "key", "value"), grads, wanted, strict=True):
        assert came is not None, f"backward with inputs on the same memory: {name} gets no gradient"
        close(came, part, f"backward with inputs on the same memory: gradient of {name}")


# 1.8 from scratch


@requirement("1.8")
@pytest.mark.parametrize("dtypes", PRECISIONS, ids=["float64", "float32", "half"])
def test_no_prebuilt_attention_is_reached(
    subject: Subject, close: Close, rng: torch.Generator, dtypes: tuple[torch.dtype, ...]
) -> None:
    """forward, in every mode and precision, short and long, with and without a mask, reaches no prebuilt attention."""
    build(subject)  # The file is loaded here, with torch's state as it is by default.
    try:
        with forbid(prebuilt_attention(), "forward"):
            for attention, given in calls(subject, rng, dtypes):
                agree(close, attention, given, tolerance=1e-2)
    except AssertionError as error:
        if "forward reached" in str(error):
            with forbid(prebuilt_attention(), "forward"):
                pass  # What was noted on the way here belongs to no single call.
            for _ in calls(subject, rng, dtypes, lambda what: forbid(prebuilt_attention(), what)):
                pass
        raise


@requirement("1.8")
def test_the_parts_are_from_scratch_too(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """compute_attention_scores, apply_mask and backward reach no prebuilt attention either."""
    q, k = (torch.randn(B, H, n, D // H, generator=rng, dtype=torch.float64) for n in (LQ, LK))
    given = [x.requires_grad_() for x in inputs(rng)]

    with forbid(prebuilt_attention(), "compute_attention_scores, apply_mask or backward"):
        attention = build(subject)
        attention.apply_mask(attention.compute_attention_scores(q, k), some_mask((B, 1, 1, LK), rng))
        carries(unpack(attention(*given))[0], "forward: output").sum().backward()

    assert given[0].grad is not None, "backward: query gets no gradient"
    agree(close, attention, [x.detach() for x in given], tolerance=1e-2)


def calls(
    subject: Subject, rng: torch.Generator, dtypes: tuple[torch.dtype, ...], guard: Guard | None = None
) -> Iterator[tuple[Any, list[Tensor]]]:
    """Calls forward in every way, each call under a guard that is told what it is, if there is one; gives modules and
    inputs to compare.
    """
    for dtype in dtypes:
        attention = build(subject).to(dtype)
        for lq, lk, modes in LENGTHS.get(dtype, [(40, 40, MODES[:2])]):
            given, mask = inputs(rng, dtype, lq, lk), some_mask((B, 1, 1, lk), rng)
            if max(lq, lk) > 256:
                given, mask = [x[:1] for x in given], mask[:1]
            for training, graph in modes:
                attention.train(training)
                with graph():
                    reaches(attention, given, mask, dtype == torch.float32 and lq == lk == 40, guard)
            if lq == LQ:
                yield attention, given


def reaches(attention: Any, given: list[Tensor], mask: Tensor, autocast: bool, guard: Guard | None) -> None:
    """Calls forward with and without a mask. Whether these are right is for others to say; what was reached counts."""

    def guarded(masks: str, half: torch.dtype | None = None) -> AbstractContextManager[Any]:
        return nullcontext() if guard is None else guard(in_words(attention, given, masks, half))

    with guarded("no mask"), suppress(Exception):
        attention(*given)
    with guarded(f"mask {list(mask.shape)}"), suppress(Exception):
        attention(*given, mask)
    for half in (torch.float16, torch.bfloat16) if autocast else ():
        with guarded("without and with a mask", half), suppress(Exception), torch.autocast("cpu", dtype=half):
            attention(*given)
            attention(*given, mask)


def in_words(attention: Any, given: list[Tensor], masks: str, half: torch.dtype | None) -> str:
    """A call, as it would be made now: "forward(query [1, 300, 12], key [1, 300, 12], no mask; float32, eval)"."""
    how = [str(given[0].dtype).removeprefix("torch."), "training" if attention.training else "eval"]
    if not torch.is_grad_enabled():
        how.append("inference_mode" if torch.is_inference_mode_enabled() else "no_grad")
    if half is not None:
        how.append(f"autocast to {half}")
    sizes = ", ".join(f"{name} {list(x.shape)}" for name, x in zip(("query", "key"), given, strict=False))
    return f"forward({sizes}, {masks}; {', '.join(how)})"
