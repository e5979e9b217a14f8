"""Attention (2.4): the formula's output and gradients, every mask, padding, sizes and changed weights."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.testing import Close, Subject, also, is_tensor, requirement

from .reference import (
    MASK_DTYPES,
    NEAR,
    PARAMETERS,
    ROUGH,
    B,
    H,
    L,
    alike,
    attends,
    build,
    formula,
    named,
    some_mask,
    some_x,
    weights_of,
    wrong_attention,
)


@requirement("2.4")
def test_attention_leaves_its_inputs_alone(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """x and mask are after the call what they were before."""
    attention, x, pairs = build(subject), some_x(rng), some_mask((B, 1, L, L), rng)

    for mask_dtype in MASK_DTYPES:
        mask = pairs.to(mask_dtype)
        before = x.clone(), mask.clone()

        attention(x, mask)

        close(x, before[0], "x after attention(x, mask)", tolerance=0, hint="x is written to")
        close(
            mask,
            before[1],
            f"mask of {named(mask_dtype)} after attention(x, mask)",
            tolerance=0,
            hint="mask is written to",
        )


@requirement("2.4")
def test_values_are_not_turned(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Where all rows are the same, every weighted mean of the values is the value itself, at every position."""
    x, attention = some_x(rng, 1).repeat(1, L, 1), build(subject)
    weights = weights_of(attention)
    expected, of_keys = (
        x @ weights[f"{name}.weight"].T @ weights["o_proj.weight"].T + weights["o_proj.bias"]
        for name in ("v_proj", "k_proj")
    )

    output = attention(x)

    hint = (
        "all rows are the same, so scores do not matter: follow the values alone: v_proj, split, no turn, join, o_proj"
    )
    with also(lambda: "the output is the same as with value = key" if alike(output, of_keys) else ""):
        close(output, expected, "attention(x)", tolerance=ROUGH, hint=hint)


@requirement("2.4")
def test_queries_and_keys_both_turn(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Four rows give the same alone as after three rows that nobody may attend to: only distances count."""
    x, attention = some_x(rng, 7), build(subject)
    mask = torch.arange(7).view(1, 1, 1, 7) >= 3

    alone, later = attention(x[:, 3:], mask[..., 3:]), is_tensor(attention(x, mask), "attention(x, mask)")

    hint = (
        "the rows only stand three positions later than they do alone: do queries and keys turn once each, by the same "
        "positions? is the mask applied, true = may attend?"
    )
    alone = is_tensor(alone, "attention(x[:, 3:], mask)").detach()
    with also(lambda: wrong_attention(attention, x, mask, later)):
        close(later[:, 3:], alone, "attention(x, mask)[:, 3:]", tolerance=ROUGH, hint=hint)


@requirement("2.4")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=named)
def test_attention_equals_the_formula(subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Without a mask, every position attends to every position."""
    hint = "softmax(rope(q) rope(k)ᵀ / √Dh) v with heads split off as [B, H, L, Dh], joined again, then o_proj"
    attention, x = build(subject).to(dtype), some_x(rng).to(dtype)
    with also(lambda: unplaced(attention, x)):
        attends(close, attention, x, hint=hint)

    expected, output = formula(attention, x, own_turns=True).to(dtype), attention(x)
    with also(lambda: "nearly right: is anything computed below x's dtype?" if alike(output, expected) else hint):
        close(output, expected, "attention(x), turned by its rotary_emb", tolerance=NEAR)


def unplaced(attention: Any, x: Tensor) -> str:
    """What to say if the output does not depend on positions."""
    output = attention(x)
    if alike(output, x) or not alike(attention(x.flip(1)).flip(1), output):
        return ""
    return (
        "the rows in reverse order give the same results reversed, so positions do not count: "
        "do q and k turn, along L of [B, H, L, Dh]?"
    )


@requirement("2.4")
@pytest.mark.parametrize("kind", ["plain", "causal", "padding", "in eval"])
def test_gradients_equal_the_formulas(subject: Subject, close: Close, rng: torch.Generator, kind: str) -> None:
    """Output, and the gradients of x and of every weight, equal the formula's."""
    dtype = torch.float32 if kind in ("causal", "in eval") else torch.float64
    masks = {"causal": torch.ones(1, 1, 7, 7).tril() == 1, "padding": some_mask((B, 1, 1, 7), rng)}
    mask, probe = masks.get(kind), some_x(rng, 7)
    x = some_x(rng, 7).to(dtype)
    theirs = x.clone().requires_grad_()
    attention = build(subject).to(dtype).train(kind != "in eval")
    wanted, bounds = [], ((False, ROUGH, ROUGH), (True, NEAR, 1e-4)) if kind == "plain" else ((True, NEAR, 1e-4),)
    for own_turns, *_ in bounds:
        given = {"x": x.clone(), **weights_of(attention)}
        leaves = [tensor.requires_grad_() for tensor in given.values()]
        expected = formula(attention, leaves[0], mask, given, own_turns=own_turns)
        gradients = torch.autograd.grad(expected, leaves, probe, allow_unused=True)  # Own turns may be detached.
        wanted.append((expected.to(dtype), dict(zip(given, gradients, strict=True))))

    output = is_tensor(attention(theirs) if mask is None else attention(theirs, mask), "attention(x)")

    hint = "" if mask is None else "a mask says 1 or true where a query may attend"
    for (expected, _), (_, tolerance, _) in zip(wanted, bounds, strict=True):
        close(output, expected, f"attention(x), {kind}", tolerance=tolerance, hint=hint)
    assert output.requires_grad, f"attention(x), {kind}: the output carries no gradient"
    (output * probe.to(dtype)).sum().backward()
    hint = f"{kind}: the output agrees, its gradient does not: is something detached, or a table below float32?"
    for (_, right), (_, _, tolerance) in zip(wanted, bounds, strict=True):
        for name, gradient in right.items():
            if gradient is not None:
                came = theirs.grad if name == "x" else attention.get_parameter(name).grad
                close(came, gradient.to(dtype), f"backward: gradient of {name}", tolerance=tolerance, hint=hint)


@requirement("2.4")
def test_every_mask_dtype(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Boolean and 0/1 masks of every dtype mean the same, whatever x's dtype is."""
    mask, x, attention = some_mask((B, 1, L, L), rng), some_x(rng), build(subject)

    for dtype in MASK_DTYPES:
        of_x = torch.float32 if dtype == torch.float64 else torch.float64
        hint = f"with a mask of {named(dtype)} for x in {named(of_x)}; 1 means: may attend"
        attends(close, attention.to(of_x), x.to(of_x), mask.to(dtype), hint=hint)


@requirement("2.4")
def test_every_mask_shape(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Masks per batch row, head, query and key all work."""
    x, attention = some_x(rng), build(subject)

    for shape in ((B, 1, 1, L), (1, H, 1, L), (B, H, L, L), (1, 1, 1, 1)):
        attends(close, attention, x, some_mask(shape, rng), hint=f"with a mask of shape {shape}")


@requirement("2.4")
@pytest.mark.parametrize(
    ("heads", "dtype"), [(1, torch.float64), (H, torch.bool)], ids=["one mask for all heads", "one per head"]
)
def test_a_fully_masked_row_gives_the_bias(
    subject: Subject, close: Close, rng: torch.Generator, heads: int, dtype: torch.dtype
) -> None:
    """A query that may attend to nothing has zero weights; its output is o_proj's bias, its gradient finite."""
    mask = some_mask((B, heads, L, L), rng)
    mask[0, :, 2] = mask[0, -1, 3] = mask[1] = False
    x = some_x(rng).requires_grad_()
    attention = build(subject)

    output = is_tensor(attention(x, mask.to(dtype)), "attention(x, mask)")

    hint = "a query that may attend to nothing (in one head, or in all) has zero weights, not NaN or a uniform row"
    bias = attention.o_proj.bias.detach()
    close(output[0, 2], bias, "attention(x, mask): a fully masked row", tolerance=ROUGH, hint=hint)
    close(output, formula(attention, x.detach(), mask), "attention(x, mask)", tolerance=ROUGH, hint=hint)
    output.sum().backward()
    assert is_tensor(x.grad, "x.grad").isfinite().all(), f"backward: x's gradient is not finite\n{hint}"


@requirement("2.4")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=named)
def test_padding_changes_nothing(subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Masked rows give what their absence gives to the others, even if they hold 1e6."""
    x = some_x(rng, 7).to(dtype)
    mask = torch.arange(7).view(1, 1, 1, 7) < 4
    attention = build(subject).to(dtype)
    expected = formula(attention, x[:, :4])
    x[:, 4:] = 1e6

    output = is_tensor(attention(x, mask), "attention(x, mask)")

    hint = "rows 4 and later hold 1e6 and are masked out; they reach the output"
    close(output[:, :4].double(), expected, "attention(x, mask)[:, :4]", tolerance=ROUGH, hint=hint)


@requirement("2.4")
def test_low_scores_are_not_masked_ones(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Where a query may attend to one key alone, that key has the whole weight, however low its score is."""
    mask = torch.eye(L).view(1, 1, L, L)

    hint = "x is 1000 times as large, and every query may attend to itself alone: a mask is no finite, small penalty"
    attends(close, build(subject), 1000 * some_x(rng), mask, hint=hint)


@requirement("2.4")
def test_attention_of_strided_inputs(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A transposed x and an expanded mask are as good as copies."""
    x, mask = some_x(rng).mT.contiguous().mT, some_mask((1, 1, L, 1), rng).expand(B, 1, L, L).mT

    attends(close, build(subject), x, mask, hint="x is a transposed view here, mask an expanded one")


@requirement("2.4")
def test_attention_of_any_size(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Any batch, length, number of heads and size of a head, without a mask and with one per batch row and head."""
    for batch, length, d_model, heads in ((3, 7, 20, 2), (1, 6, 14, 1), (3, 41, 10, 5)):
        attention, x = build(subject, 64, d_model, heads), some_x(rng, length, batch, d_model)
        hint = f"B={batch}, L={length}, D={d_model}, H={heads}, so Dh={d_model // heads}: is a size fixed in the code?"

        attends(close, attention, x, hint=hint, heads=heads)
        attends(close, attention, x, some_mask((batch, heads, length, length), rng), hint=hint, heads=heads)


@requirement("2.4")
def test_256_keys_allowed(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """As many keys as an 8-bit sum counts as none."""
    x, mask = some_x(rng, 256, 1, 2), torch.ones(1, 1, 1, 256, dtype=torch.uint8)

    hint = "256 keys, all allowed by a mask of uint8; max_position_embeddings=8"
    attends(close, build(subject, 8, 2, 1), x, mask, hint=hint, heads=1)


@requirement("2.4")
@pytest.mark.parametrize("length", [9, 260])
def test_almost_causal(subject: Subject, close: Close, rng: torch.Generator, length: int) -> None:
    """A mask that is causal but for one row is no causal mask."""
    x, mask = some_x(rng, length, 1, 2), torch.ones(1, 1, length, length).tril()
    mask[..., 2, -4:] = 1
    x[:, -4:] += 5

    hint = f"L={length}; the mask is causal, but row 2 may attend to the last four keys too; max_position_embeddings=8"
    attends(close, build(subject, 8, 2, 1), x, mask, hint=hint, heads=1)


@requirement("2.4")
def test_new_weights_count_at_once(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A call after the weights have changed, in place or by loading, uses the new ones, also if they were 0."""
    x, attention, modes = some_x(rng), build(subject), (torch.enable_grad, torch.no_grad)
    state = deepcopy(attention.state_dict())
    times(attention, 0.0)
    for mode in modes:
        with mode():
            attention(x)

    attention.load_state_dict(state)
    for mode in modes:
        with mode():
            attends(close, attention, x, hint=f"the weights were 0, and loaded before this call, {mode.__name__}")
    times(attention, -0.7)
    for mode in modes:
        with mode():
            attends(close, attention, x, hint=f"the weights were changed in place before this call, {mode.__name__}")


def times(attention: Any, factor: float) -> None:
    """Multiplies all weights in place."""
    with torch.no_grad():
        for name in PARAMETERS:
            attention.get_parameter(name).mul_(factor)
