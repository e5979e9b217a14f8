"""Precision (2.7): float32 or better after casts, x's dtype, inference before training, gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.testing import Close, Subject, is_tensor, requirement

from .reference import (
    DH,
    DTYPES,
    FAR,
    LOOSE,
    MASK_DTYPES,
    NEAR,
    ROUGH,
    ROUNDING,
    B,
    L,
    agree,
    build,
    formula,
    named,
    rows,
    some_mask,
    some_x,
    turned,
)


def legs(rng: torch.Generator, dtype: torch.dtype) -> Tensor:
    """4,001 rows of dim 8 whose pairs are at most 1 long, with one leg in heads 0 and 1, with two in head 2."""
    x = torch.zeros(1, 3, 4001, 8, dtype=torch.float64)
    sizes = 0.75 + 0.25 * torch.rand(2, 4001, 4, generator=rng, dtype=torch.float64)
    x[0, 0, :, :4], x[0, 1, :, 4:] = sizes[0], -sizes[1]
    x[0, 2, :, :4], x[0, 2, :, 4:] = 0.7 * sizes[1], -0.7 * sizes[0]
    return x.to(dtype)


def precise(rope: Any, x: Tensor, what: str) -> None:
    """forward is as near to float64 as the docstring asks for, in x's dtype."""
    actual = is_tensor(rope(x), what).detach()

    assert actual.dtype == x.dtype, f"{what}: {named(actual.dtype)} came, {named(x.dtype)}, x's dtype, was wanted"
    for positions, limit in ((torch.arange(64), NEAR), (torch.arange(3980, 4001), FAR)):
        expected = turned(x[:, :, positions], positions)
        gap = (actual[:, :, positions].double() - expected).abs()
        excess = (gap - 1.01 * ROUNDING.get(x.dtype, 0) * expected.abs() - limit).nan_to_num(torch.inf).amax((0, 1, 3))
        worst = int(excess.argmax())
        assert excess[worst] <= 0, (
            f"{what}: off by {gap[:, :, worst].max():.2g} at position {positions[worst]}; at most {limit:g} was wanted"
            f"{' beside the rounding of the result' if x.dtype in ROUNDING else ''}\n"
            f"{_reason(gap, worst, positions)}"
        )


def _reason(gap: Tensor, worst: int, positions: Tensor) -> str:
    """Where to look, by how far off the results are."""
    if gap[:, :, worst].max() < 0.1:
        return (
            "cosines and sines, and what they are made from, stay float32 or better whatever the module or x is cast to"
            "; the result alone is rounded, once"
        )
    if positions[0] > 0 or gap[:, :, :4].max() < 0.1:
        return "early positions are nearly right: is an angle, or what it is made from, ever below float32, or cut off?"
    return "that is more than rounding, at positions below 4 already: are angles and signs right (2.1, 2.2)?"


@requirement("2.7")
def test_the_result_has_xs_dtype(subject: Subject, rng: torch.Generator) -> None:
    """forward and apply_rotary_pos_emb give x's dtype, not that of the table."""
    rope = subject.RotaryPositionEmbedding(DH)
    for dtype in DTYPES:
        x = rows(rng, L, dtype)

        tables = (torch.float32, torch.float64) if dtype in (torch.float32, torch.float64) else (torch.float32,)
        results = {"forward(x)": rope(x)} | {
            f"apply_rotary_pos_emb(x, cos and sin in {named(table)})": rope.apply_rotary_pos_emb(
                x, torch.zeros(L, DH, dtype=table), torch.ones(L, DH, dtype=table)
            )
            for table in tables
        }

        for what, result in results.items():
            came, hint = is_tensor(result, what).dtype, "cast the result, not the table"
            assert came == dtype, f"{what} of {named(dtype)}: {named(came)} came, {named(dtype)} was wanted\n{hint}"


@requirement("2.7")
def test_a_float32_call_is_precise(subject: Subject, rng: torch.Generator) -> None:
    """A float32 call keeps its precision after every cast of the module, before and after its first call."""
    x = legs(rng, torch.float32)
    for casts, called in (
        ((), False),
        ((torch.bfloat16, torch.float32), False),
        ((torch.bfloat16,), True),
        ((torch.float16,), False),
        ((torch.float64,), True),
    ):
        rope = subject.RotaryPositionEmbedding(8, 4096)
        if called:
            rope(x[:, :, :5].bfloat16())

        for dtype in casts:
            rope = rope.to(dtype)

        precise(rope, x, f"forward in float32{''.join(f' after .to({named(dtype)})' for dtype in casts)}")


@requirement("2.7")
def test_a_first_call_under_autocast_keeps_precision(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """What the first call keeps, made under autocast, serves float32 calls later."""
    rope, x = subject.RotaryPositionEmbedding(DH, 4), rows(rng, 64, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rope(x)

    hint = "the first call was under autocast to bfloat16, where products of float32 matrices are bfloat16"
    agree(close, rope, x, hint=hint, tolerance=5 * NEAR, expected_positions=4)


@requirement("2.7")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=named)
def test_a_half_precision_call_is_precise(subject: Subject, rng: torch.Generator, dtype: torch.dtype) -> None:
    """In half precision only the rounding of the result is lost, whether the module is cast or not."""
    x = legs(rng, dtype)

    precise(subject.RotaryPositionEmbedding(8, 4096), x, f"forward in {named(dtype)}")
    precise(
        subject.RotaryPositionEmbedding(8, 4096).to(dtype), x, f"forward in {named(dtype)} after .to({named(dtype)})"
    )


@requirement("2.7")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=named)
def test_attention_is_precise(subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype) -> None:
    """The attention layer computes in x's dtype or better."""
    attention, x = build(subject).to(dtype), some_x(rng).to(dtype)
    for mask in (None, torch.ones(1, 1, L, L).tril()):
        expected = formula(attention, x, mask).to(dtype)

        output = is_tensor(attention(x, mask), "attention(x, mask)")

        hint = "nothing is computed below x's dtype, nor cosines and sines below float32"
        # What is wrong is not imprecise.
        if output.shape == expected.shape and (output - expected).abs().max() <= ROUGH:
            close(output, expected, "attention(x, mask)", tolerance=NEAR, hint=hint)


@contextmanager
def made_outside_inference_mode() -> Iterator[None]:
    """Puts what torch says of a table that was made in inference_mode into the words of this exercise."""
    try:
        yield
    except RuntimeError as error:
        if "nference tensor" not in str(error):
            raise
        raise AssertionError(
            "training after a call in inference_mode: a tensor made in inference_mode came, a plain one was wanted\n"
            "what a module keeps is made outside inference_mode"
        ) from error


@contextmanager
def with_a_graph_of_its_own() -> Iterator[None]:
    """Puts what torch says of a graph that is kept between steps into the words of this exercise."""
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise AssertionError(
            "backward in the second training step: the graph of the first call came, one of its own was wanted\n"
            "in the second training step: is anything kept from the first call that carries a gradient?"
        ) from error


@requirement("2.7")
def test_inference_first_training_later(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """What calls in inference_mode keep, the first and one that needs more, serves training."""
    for seq_len in (9, 300):
        rope = subject.RotaryPositionEmbedding(DH, 4)
        with torch.inference_mode():
            rope(rows(rng, 9))
            rope(rows(rng, 1), seq_len)

        with made_outside_inference_mode():
            differentiates(close, rope, rng, 9, hint="calls in inference_mode came before")


@requirement("2.7")
def test_attention_infers_first_and_trains_later(subject: Subject, rng: torch.Generator) -> None:
    """So does the attention layer."""
    attention, x, causal = build(subject, 4), some_x(rng, 9), torch.ones(1, 1, 9, 9).tril()
    with torch.inference_mode():
        attention.eval()(x, causal)

    with made_outside_inference_mode():
        is_tensor(attention.train()(x, causal), "attention(x, mask)").sum().backward()

    some = any(parameter.grad is not None for parameter in attention.parameters())
    assert some, "attention(x, mask), first in inference_mode, then in training: no weight gets a gradient"


@requirement("2.7")
def test_gradients_flow_step_after_step(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The gradient is the probe turned back; a second step works like the first."""
    rope = subject.RotaryPositionEmbedding(DH)

    with with_a_graph_of_its_own():
        for hint in ("in the first training step", "in the second training step"):
            differentiates(close, rope, rng, L, hint=hint)
    for dtype in DTYPES:
        differentiates(close, rope, rng, L, hint=f"x is {named(dtype)}", dtype=dtype)
    rope.eval()
    differentiates(close, rope, rng, L, hint="in eval mode; only no_grad switches gradients off")


def differentiates(
    close: Close, rope: Any, rng: torch.Generator, length: int, hint: str, dtype: torch.dtype = torch.float64
) -> None:
    """The gradient that reaches x is the one that was sent, turned back."""
    x, probe = rows(rng, length, dtype).requires_grad_(), rows(rng, length, dtype)
    expected = turned(probe, -torch.arange(length))

    output = is_tensor(rope(x), "forward(x)")
    assert output.requires_grad, f"forward(x): the result carries no gradient; is x detached?\n{hint}"
    (output * probe).sum().backward()

    gradient = is_tensor(x.grad, "x.grad", hint).double()
    close(gradient, expected, "backward: gradient of x", tolerance=LOOSE.get(dtype, NEAR), hint=hint)


@requirement("2.7")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=named)
def test_attention_keeps_xs_dtype(subject: Subject, rng: torch.Generator, dtype: torch.dtype) -> None:
    """A layer cast to a dtype takes it and gives it, with every mask: the mask's dtype is no matter."""
    attention, x, pairs = build(subject).to(dtype), some_x(rng).to(dtype), some_mask((B, 1, L, L), rng)

    for masked in (None, *MASK_DTYPES) if dtype == torch.float16 else (None, torch.int64, torch.float32, torch.float64):
        output = is_tensor(attention(x, *([pairs.to(masked)] if masked else [])), "attention(x)")

        what = f"attention(x{f', mask of {named(masked)}' if masked else ''}) in {named(dtype)}"
        assert output.dtype == dtype, f"{what}: {named(output.dtype)} came, {named(dtype)} was wanted"
        assert output.isfinite().all(), f"{what}: NaN or infinity came, finite values were wanted"
