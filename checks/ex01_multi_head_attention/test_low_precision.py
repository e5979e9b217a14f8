"""Low precision (1.7): float16, bfloat16 and autocast, modules that are cast or moved between calls."""

from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.testing import Close, Subject, requirement

from .reference import LK, LQ, Asked, B, H, agree, build, carries, inputs, reference, same, some_mask, unpack


@requirement("1.7")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)], ids=["float16", "bfloat16"]
)
def test_half_precision(
    subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype, tolerance: float
) -> None:
    """At unit scale the error in half precision stays within the dtype's tolerance, and the dtype stays."""
    given, attention = inputs(rng, dtype), build(subject).to(dtype)

    agree(close, attention, given, hint=f"in {dtype}", tolerance=tolerance)
    agree(close, attention, given, half_mask(rng), hint=f"in {dtype}, with a mask", tolerance=tolerance)


@requirement("1.7")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)], ids=["float16", "bfloat16"]
)
def test_many_keys_in_half_precision(
    subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype, tolerance: float
) -> None:
    """4096 equal keys and values give what one gives: a sum of so many weights is too fine for half precision."""
    query, key, value = inputs(rng, dtype)
    given = [query[:1, :1], *(x[:1, :1].repeat(1, 4096, 1) for x in (key, value))]
    mask = torch.ones(1, 1, 1, 4096) if dtype == torch.float16 else None

    agree(close, build(subject).to(dtype), given, mask, hint=f"4096 keys in {dtype}", tolerance=tolerance)


@requirement("1.7")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_finite(subject: Subject, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Inputs 6 times as large overflow nothing, forward and backward; scores of one sign neither."""
    attention, hidden = build(subject).to(dtype), half_mask(rng)
    signed = hidden.clone()

    for kind, mask in (
        ("of scale 6, no mask", None),
        ("of scale 6, with a mask that hides a whole row", hidden),
        ("of scale 6, query and key all 9 or -9, with a mask that hides whole rows", signed),
    ):
        query, key, value = (6 * x for x in inputs(rng))
        if mask is signed:
            query[:], key[:], signed[:, 0, 3] = 9, 9, False
            key[1] = -9
        given = [x.to(dtype).requires_grad_() for x in (query, key, value)]

        output, weights = unpack(attention(*given) if mask is None else attention(*given, mask))
        what = f"forward in {dtype}, inputs {kind}"
        carries(output, f"{what}: output").sum().backward()

        grads = {"query.grad": given[0].grad, "value.grad": given[2].grad}
        for name, x in {"output": output, "weights": weights, **grads}.items():
            assert x is not None, f"{what}: {name} is None, a tensor was wanted"
            assert x.isfinite().all(), f"{what}: {name} is not finite" + (
                "" if mask is None else finite_without(attention, given, name)
            )
            assert x.dtype == dtype, f"{what}: {name} of {x.dtype} came, {dtype} was wanted"
        total = weights.detach().float().sum(-1)
        live = total if mask is None else total[mask.expand(B, H, LQ, LK).any(-1)]
        farthest = live.flatten()[(live - 1).abs().argmax()]
        assert (farthest - 1).abs() < 2e-2, f"{what}: weights that sum to {farthest:.3f} came, a sum of 1 was wanted"


@requirement("1.7")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)], ids=["float16", "bfloat16"]
)
def test_autocast(subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype, tolerance: float) -> None:
    """Under autocast, at unit scale, output and weights are right within the dtype's tolerance."""
    given = inputs(rng, torch.float32)
    attention = build(subject).float()

    for mask in (None, half_mask(rng)):
        more, what = ([], "") if mask is None else ([mask], " with a mask")
        expected = reference(attention, *given, mask=mask)
        with torch.autocast("cpu", dtype=dtype):
            actual = unpack(attention(*given, *more))
            large_ones = unpack(attention(*(6 * x for x in given), *more))

        what = f"forward{what} under autocast to {dtype}"
        for name, came in zip(("output", "weights"), actual, strict=True):
            assert came.dtype in (dtype, torch.float32), (
                f"{what}: {name} of {came.dtype} came, {dtype} or torch.float32 was wanted"
            )
        doubled = actual[0].double(), actual[1].double()
        same(close, doubled, expected, Asked(attention, given, mask), tolerance, what)
        assert all(x.isfinite().all() for x in large_ones), f"{what}, inputs of scale 6: values are not finite"


@requirement("1.7")
def test_a_module_may_be_cast_between_calls(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """After .float() or .half() and .double() each call works in the new dtype, with its precision."""
    given, attention, fresh = inputs(rng), build(subject, heads=2), build(subject, heads=2)
    for dtype, tolerance in ((torch.float16, 5e-3), (torch.float32, 2e-5)):  # Dh = 6: 1/√Dh is no number of float16.
        agree(close, attention.to(dtype), inputs(rng, dtype), heads=2, tolerance=tolerance)
        hint = f"the module was cast to float64 after a call in {dtype}"
        agree(close, attention.double(), [3 * x for x in given], heads=2, hint=hint)

    fresh.load_state_dict(attention.state_dict())
    for name, came, wanted in zip(("output", "weights"), attention(*given), fresh(*given), strict=True):
        close(came, wanted.detach(), f"forward: {name}", hint=hint)


@requirement("1.7")
def test_a_module_may_be_moved(
    subject: Subject, close: Close, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another device nothing is left behind: the meta device stands in for one, in training, with dropout."""
    # autocast knows every real device, but not this one: code that switches it off by x.device.type is right.
    known = torch.autocast
    lenient = lambda *a, **k: nullcontext() if "meta" in (*a, *k.values()) else known(*a, **k)  # noqa: E731
    monkeypatch.setattr(torch, "autocast", lenient)
    agree(close, build(subject), inputs(rng))
    moved = build(subject, dropout=0.5).to("meta").train()

    output, weights = unpack(moved(*(x.to("meta") for x in inputs(rng))))

    places = f"output on {output.device}, weights on {weights.device}"
    assert output.device.type == weights.device.type == "meta", f"forward on meta: {places}"


def finite_without(attention: Any, given: list[Tensor], name: str) -> str:
    """A line that says so, if the same without a mask is finite."""
    given = [x.detach().requires_grad_() for x in given]
    with suppress(Exception):
        output, weights = unpack(attention(*given))
        output.sum().backward()
        found = {"output": output, "weights": weights, "query.grad": given[0].grad, "value.grad": given[2].grad}[name]
        if found is not None and found.isfinite().all():
            return "\nwithout a mask it is finite"
    return ""


def half_mask(rng: torch.Generator) -> Tensor:
    """A mask with one fully masked row."""
    mask = some_mask((B, 1, LQ, LK), rng)
    mask[1, 0, 3] = False
    return mask
