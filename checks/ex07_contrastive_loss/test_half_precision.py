"""Half precision (7.8): float32 or better comes out, whatever comes in and under autocast."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.testing import Subject, is_tensor, requirement

from .ranks import Rank, run_ranks
from .reference import CHUNKED, HALVES, HEAD, NAMES, PLAIN, SHARDED, Pairs, alike, near_pairs, pairs, slices, units
from .test_head import build, called, features, unit

SIZES = (5, 7)
HINT = "cast the rows to float32 at least, with autocast off, before you multiply them"


def whole(loss: Callable[..., Any], given: Pairs, autocast: torch.dtype | None) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and gradients of a call."""
    leaves = given.leaves()
    with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
        came = is_tensor(loss(*leaves.tensors), "the loss")
    assert came.requires_grad, "the loss carries no gradient"
    came.backward()
    return came.detach(), [leaf.grad for leaf in leaves.tensors]


def over_ranks(
    loss: Callable[..., Any], given: Pairs, autocast: torch.dtype | None
) -> tuple[Tensor, list[Tensor | None]]:
    """The mean loss of two ranks, their gradients as those of all rows, and the mean of scale's."""
    parts = [given.part(rows) for rows in slices(SIZES)]

    def step(comm: Rank) -> tuple[Tensor, list[Tensor | None]]:
        return whole(lambda *tensors: loss(*tensors, comm), parts[comm.rank], autocast)

    found = run_ranks(step, len(SIZES))
    gradients: list[Tensor | None] = []
    for place, name in enumerate(NAMES):
        each = [is_tensor(grads[place], f"{SHARDED}, backward: gradient of {name}") for _, grads in found]
        gradients.append(torch.cat(each) / 2 if name != "scale" else torch.stack(each).to(each[0].dtype).mean(0))
    assert found[0][0].shape == (), f"{SHARDED}: shape {tuple(found[0][0].shape)} came, () was wanted"
    return torch.stack([came for came, _ in found]).mean(0), gradients


Way = Callable[[Subject, Pairs, torch.dtype | None], tuple[Tensor, list[Tensor | None]]]
WAYS: dict[str, Way] = {
    PLAIN: lambda subject, given, autocast: whole(subject.contrastive_loss, given, autocast),
    CHUNKED: lambda subject, given, autocast: whole(
        lambda *tensors: subject.chunked_contrastive_loss(*tensors, chunk_size=5), given, autocast
    ),
    SHARDED: lambda subject, given, autocast: over_ranks(subject.sharded_contrastive_loss, given, autocast),
}
F32, F64, BF16, F16 = torch.float32, torch.float64, *HALVES
# dtypes of image, text and scale; autocast's.
COMES_IN: dict[str, tuple[tuple[torch.dtype, torch.dtype, torch.dtype], torch.dtype | None]] = {
    "bfloat16": ((BF16, BF16, BF16), None),
    "float16": ((F16, F16, F16), None),
    "bfloat16 rows, scale in float32": ((BF16, BF16, F32), None),
    "images in float16, texts in bfloat16": ((F16, BF16, F32), None),
    "images in bfloat16, texts in float64": ((BF16, F64, F16), None),
    "float32 under autocast to bfloat16": ((F32, F32, F32), BF16),
    "float32 under autocast to float16": ((F32, F32, F32), F16),
}

HARDER = ("bfloat16", "float32 under autocast to bfloat16")


@requirement("7.8")
@pytest.mark.parametrize("name", COMES_IN)
def test_losses_are_as_exact_as_float32(subject: Subject, rng: torch.Generator, name: str) -> None:
    """Loss and gradients are as near to float64 as float32 gets, and gradients have their tensor's dtype."""
    dtypes, autocast = COMES_IN[name]
    n, wrong = sum(SIZES), []
    for given in (near_pairs(rng, n, 16, 98.7), pairs(rng, n, 16, 19.3, unit=True))[: 1 + (name in HARDER)]:
        given = given.to(*dtypes)
        loss, gradients = given.exact()
        for way, call in WAYS.items():
            try:
                came, grads = call(subject, given, autocast)
                what = f"{way}, {name}"
                as_exact(came, loss, what)
                for part, tensor, grad in zip(NAMES, given.tensors, grads, strict=True):
                    exact_gradient(grad, gradients[part], tensor.dtype, f"{what}, backward: gradient of {part}")
            except AssertionError:
                if right_in_float64(call, subject, given):
                    raise
                wrong.append(way)
        assert len(wrong) < len(WAYS), f"{', '.join(wrong)}: none is right in float64, so none is in half precision"


@requirement("7.8")
def test_gradients_of_many_chunks(subject: Subject, rng: torch.Generator) -> None:
    """What many chunks add up to in a gradient is rounded once."""

    def call(subject: Subject, given: Pairs, autocast: torch.dtype | None) -> tuple[Tensor, list[Tensor | None]]:
        return whole(lambda *tensors: subject.chunked_contrastive_loss(*tensors, chunk_size=1), given, autocast)

    given = pairs(rng, 40, 3, 5.0)
    image, text = ((rows + 3) / (rows + 3).norm(dim=1, keepdim=True) for rows in (given.image, given.text))
    given = Pairs(image, text, given.scale).to(BF16)
    gradients = given.exact()[1]
    try:
        for part, grad in zip(NAMES, call(subject, given, None)[1], strict=True):
            what = f"{CHUNKED} of 40 pairs in bfloat16, chunk_size 1, backward: gradient of {part}"
            exact_gradient(grad, gradients[part], BF16, what)
    except AssertionError:
        if right_in_float64(call, subject, given):
            raise


def right_in_float64(call: Way, subject: Subject, given: Pairs) -> bool:
    """Whether a loss is right where no precision is lost. Where it is not, another requirement says so."""
    given = given.to(F64)
    loss, gradients = given.exact()
    try:
        came, grads = call(subject, given, None)
    except AssertionError:
        return False
    found = [(came, loss), *((grad, gradients[part]) for part, grad in zip(NAMES, grads, strict=True))]
    return all(alike(one, other) for one, other in found)


def as_exact(came: Tensor, wanted: Tensor, what: str) -> None:
    """Fails unless a loss is float32 or better, and exact."""
    assert came.shape == (), f"{what}: shape {tuple(came.shape)} came, () was wanted"
    assert came.dtype in (F32, F64), f"{what}: the loss has {came.dtype}, float32 or better was wanted\n{HINT}"
    off = abs(float(came) - float(wanted))
    assert off <= 1e-4 * max(1.0, float(wanted)), (
        f"{what}: the loss is {float(came):.7g}, {float(wanted):.7g} was wanted; it is off by {off:.2g}, "
        f"at most 1e-4 · max(1, loss) is asked for\n{HINT}"
    )


def exact_gradient(came: Tensor | None, wanted: Tensor, dtype: torch.dtype, what: str) -> None:
    """Fails unless a gradient has its tensor's dtype, and is off by two units in the last place at most."""
    came = is_tensor(came, what)
    assert came.dtype == dtype, f"{what} has {came.dtype}, not {dtype}"
    gap, largest = float((came.double() - wanted).abs().max()), float(wanted.abs().max())
    assert gap <= units(largest, dtype), (
        f"{what} is off by {gap:.3g}; its largest entry is {largest:.4g}, at most {units(largest, dtype):.2g} is asked "
        f"for\n{HINT}; round each gradient once"
    )


@requirement("7.8")
@pytest.mark.parametrize("name", ["bfloat16", "float16", "autocast to bfloat16", "autocast to float16"])
def test_the_head_in_half_precision(subject: Subject, rng: torch.Generator, name: str) -> None:
    """Rows and scale are float32 or better, rows have length 1 within 1e-5, and gradients reach all weights."""
    kind = HALVES["float16" in name]
    cast = "autocast" not in name
    head = build(subject, rng, kind if cast else F32)
    image, text = features(rng, kind if cast else F32)
    wanted = [
        unit(x.double(), layer.weight.detach().double())
        for x, layer in ((image, head.image_proj), (text, head.text_proj))
    ]

    with nullcontext() if cast else torch.autocast("cpu", dtype=kind):
        *rows, scale = called(head, image, text)

    what = f"{HEAD} in {name}" if cast else f"{HEAD} under {name}"
    assert scale.dtype in (F32, F64), f"{what}: scale has {scale.dtype}, float32 or better was wanted"
    for part, came, right in zip(("image rows", "text rows"), rows, wanted, strict=True):
        of_unit_length(came, right, f"{what}: {part}")
    sum((came * right.flip(0)).sum() for came, right in zip(rows, wanted, strict=True)).backward()  # type: ignore[union-attr]
    for part, layer in (("image_proj", head.image_proj), ("text_proj", head.text_proj)):
        grad = is_tensor(layer.weight.grad, f"{what}, backward: gradient of {part}.weight")
        assert grad.dtype == layer.weight.dtype and grad.isfinite().all(), (
            f"{what}, backward: the gradient of {part}.weight is not finite, or has {grad.dtype}"
        )


def of_unit_length(came: Tensor, right: Tensor, what: str) -> None:
    """Fails unless rows are float32 or better, of length 1, and about what is right."""
    assert came.dtype in (F32, F64), f"{what}: {came.dtype} came, float32 or better was wanted\nnormalise in float32"
    assert came.shape == right.shape, f"{what}: shape {tuple(came.shape)} came, {tuple(right.shape)} was wanted"
    off = float((came.detach().double().norm(dim=1) - 1).abs().nan_to_num(torch.inf).max())
    assert off <= 1e-5, (
        f"{what}: a row's length is off from 1 by {off:.2g}, at most 1e-5 is asked for\nnormalise in float32: cast the "
        "projected rows before you square them"
    )
    gap = float((came.detach().double() - right).abs().max())
    assert gap <= 5e-2, f"{what}: an entry is off by {gap:.2g}, at most 5e-2 is asked for"


@requirement("7.8")
@pytest.mark.parametrize("size", [5e4, 300.0, 1e-4, 1e-5], ids=str)
def test_lengths_that_float16_cannot_hold(subject: Subject, size: float) -> None:
    """Rows whose length overflows float16, or whose squares vanish in it, have length 1 too."""
    head = subject.ContrastiveHead(4, 4, 4).to(F16)
    with torch.no_grad():
        for layer in (head.image_proj, head.text_proj):
            layer.weight.copy_(torch.eye(4))
    rows = size * torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, 1.0, 0.0, -0.5]])
    image, text = rows.to(F16), rows.flip(0).to(F16)

    *came, _ = called(head, image, text)

    for part, one, given in zip(("image rows", "text rows"), came, (image, text), strict=True):
        right = given.double() / given.double().norm(dim=1, keepdim=True)
        of_unit_length(one, right, f"{HEAD} in float16, features around {size:g}: {part}")
