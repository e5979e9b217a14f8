"""The head (7.1) and its bounded temperature (7.2)."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.testing import Close, Subject, Where, also, is_tensor, requirement

from .reference import HALVES, HEAD, alike, known_gradient

IMAGE, TEXT, E, N = 5, 4, 3, 6
KEYS = ["image_proj.weight", "logit_scale", "text_proj.weight"]


def build(subject: Subject, rng: torch.Generator, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A head of the learner's, of random weights that the check chose."""
    head = subject.ContrastiveHead(IMAGE, TEXT, E, **options)
    for name, width in (("image_proj", IMAGE), ("text_proj", TEXT)):
        layer = getattr(head, name, None)
        assert isinstance(layer, nn.Linear), (
            f"ContrastiveHead.{name}: {type(layer).__name__} came, nn.Linear was wanted"
        )
        shape = tuple(layer.weight.shape)
        assert shape == (E, width), (
            f"ContrastiveHead({IMAGE}, {TEXT}, {E}).{name}.weight: {shape} came, {(E, width)} was wanted"
        )
    head.to(dtype)
    with torch.no_grad():
        for layer in (head.image_proj, head.text_proj):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=rng, dtype=torch.float64))
    return head


def features(rng: torch.Generator, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Of N images and texts."""
    image, text = (torch.randn(N, width, generator=rng, dtype=torch.float64).to(dtype) for width in (IMAGE, TEXT))
    return image, text


def called(head: Any, image: Tensor, text: Tensor, what: str = HEAD) -> tuple[Tensor, Tensor, Tensor]:
    """What forward gives, if it is three tensors."""
    result = head(image, text)
    assert isinstance(result, tuple) and len(result) == 3, (
        f"{what}: a {type(result).__name__} came, the tuple (image rows, text rows, scale) was wanted"
    )
    names = ("image rows", "text rows", "scale")
    image, text, scale = (is_tensor(one, f"{what}: {name}") for one, name in zip(result, names, strict=True))
    return image, text, scale


def unit(features: Tensor, weight: Tensor) -> Tensor:
    """The projected rows, of length 1; a row of zeros stays."""
    rows = features @ weight.mT
    length = (rows * rows).sum(1, keepdim=True)
    return rows / torch.where(length == 0, 1.0, length).sqrt()


def known_rows(came: Tensor, features: Tensor, weight: Tensor) -> str:
    """Which slip gives just these rows, if a known one does."""
    rows = (features @ weight.mT).detach()
    safe = rows.where(rows != 0, 1e-30)
    if rows.isfinite().all() and came.isnan().any():
        return "a row of zeros stays zeros: 0 / 0 is NaN"
    forms = {
        "the projected rows as they are; divide each by its length": rows,
        "columns of length 1; each row, a pair's, has length 1": rows / safe.norm(dim=0),
        "rows by their sum of absolute values; the length is the root of the sum of squares": rows
        / safe.abs().sum(1, keepdim=True),
        "rows by the length of all of them together; each has a length of its own": rows / rows.norm(),
    }
    return next((f"it is {words}" for words, form in forms.items() if alike(came, form)), "")


@requirement("7.1")
def test_the_head_by_hand(subject: Subject, close: Close) -> None:
    """(3, 4) becomes (0.6, 0.8), zeros stay zeros, and the scale is e."""
    head = subject.ContrastiveHead(2, 2, 2).double()
    for name in ("image_proj", "text_proj"):
        assert getattr(head, name).bias is None, f"ContrastiveHead.{name}: has a bias, none was wanted"
    with torch.no_grad():
        for layer in (head.image_proj, head.text_proj):
            layer.weight.copy_(torch.eye(2))
        head.logit_scale.fill_(1.0)
    image = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-2e-5, 0.0]], dtype=torch.float64)
    text = torch.tensor([[0.0, 0.5], [8.0, -6.0], [0.0, 0.0]], dtype=torch.float64)

    rows, others, scale = called(head, image, text)

    for name, came, given in (("image rows", rows, image), ("text rows", others, text)):
        wanted = unit(given, torch.eye(2, dtype=torch.float64))
        with also(known_rows, came, given, torch.eye(2, dtype=torch.float64)):
            close(came, wanted, f"{HEAD} of {given.tolist()}: {name}")
    close(scale, torch.tensor(math.e, dtype=torch.float64), f"{HEAD}, logit_scale = 1: scale", tolerance=1e-6,
          hint="scale = exp(logit_scale)")  # fmt: skip


@requirement("7.1")
@pytest.mark.parametrize("temperature", [None, 0.07, 0.5, 2.0])
def test_the_scale_begins_at_1_over_temperature(subject: Subject, temperature: float | None) -> None:
    """logit_scale is a parameter [] that starts at log(1 / temperature), by default 0.07; eval changes nothing."""
    options = {} if temperature is None else {"temperature": temperature}
    head = subject.ContrastiveHead(IMAGE, TEXT, E, **options)
    wanted = 1 / (temperature or 0.07)

    what = f"ContrastiveHead(…{'' if temperature is None else f', temperature={temperature}'})"
    raw = head.logit_scale
    assert isinstance(raw, nn.Parameter), f"{what}.logit_scale: a {type(raw).__name__} came, nn.Parameter was wanted"
    assert raw.shape == (), f"{what}.logit_scale: shape {tuple(raw.shape)} came, () was wanted"
    assert abs(float(raw) - math.log(wanted)) < 1e-5, (
        f"{what}.logit_scale: {float(raw):.6g} came, log(1 / temperature) = {math.log(wanted):.6g} was wanted"
    )
    for training in (True, False):
        scale = called(head.train(training), torch.ones(2, IMAGE), torch.ones(2, TEXT))[2]
        assert scale.shape == () and abs(float(scale) - wanted) < 1e-4 * wanted, (
            f"{what}.forward in {'training' if training else 'eval'}: scale {scale.tolist()} came, "
            f"1 / temperature = {wanted:.6g} was wanted"
        )


@requirement("7.1")
def test_the_whole_state(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Both weights and logit_scale are the state_dict, and loading them elsewhere restores all that forward gives."""
    head, other = (build(subject, rng, temperature=temperature) for temperature in (0.07, 0.3))
    image, text = features(rng)
    came = sorted(head.state_dict())
    assert came == KEYS, f"ContrastiveHead.state_dict(): {came} came, {KEYS} was wanted"
    called(other, image, text)
    expected = called(head, image, text)

    other.load_state_dict(head.state_dict())

    for name, one, wanted in zip(
        ("image rows", "text rows", "scale"), called(other, image, text), expected, strict=True
    ):
        close(one, wanted.detach(), f"{HEAD} after load_state_dict: {name}", tolerance=1e-6)


@requirement("7.1")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_reach_the_head(
    subject: Subject, close: Close, rng: torch.Generator, training: bool, on: Where
) -> None:
    """Rows, and the gradients of features, both projections and logit_scale, are the formula's."""
    head = build(subject, rng).to(on.device, on.dtype).train(training)
    image, text = (x.to(on.device, on.dtype).requires_grad_() for x in features(rng))
    probes = [torch.randn(N, E, generator=rng).to(on.device, on.dtype) for _ in range(2)]
    leaves = {"image features": image, "text features": text, "image_proj.weight": head.image_proj.weight,
              "text_proj.weight": head.text_proj.weight, "logit_scale": head.logit_scale}  # fmt: skip
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves.values()]
    wanted = (unit(copies[0], copies[2]), unit(copies[1], copies[3]), copies[4].exp())
    sum([(one * probe).sum() for one, probe in zip(wanted, probes, strict=False)], -3 * wanted[2]).backward()

    rows = called(head, image, text)

    for name, came, right, given, weight in zip(
        ("image rows", "text rows"), rows, wanted, copies, copies[2:], strict=False
    ):
        with also(known_rows, came, given, weight):
            close(came, right.detach(), f"{HEAD}: {name}")
    assert all(one.requires_grad for one in rows), f"{HEAD}: rows or scale carry no gradient"
    sum([(one * probe).sum() for one, probe in zip(rows, probes, strict=False)], -3 * rows[2]).backward()
    for (name, leaf), copy in zip(leaves.items(), copies, strict=True):
        with also(known_gradient, leaf.grad, is_tensor(copy.grad, "")):
            close(
                leaf.grad,
                is_tensor(copy.grad, ""),
                f"{HEAD}, backward: gradient of {name}",
                tolerance=max(close.tolerance, 1e-6),
            )


@requirement("7.1")
def test_features_beside_frozen_projections(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Features that ask for gradients get them, also where the projections are frozen."""
    head = build(subject, rng)
    for layer in (head.image_proj, head.text_proj):
        layer.weight.requires_grad_(False)
    for training in (True, False):
        given = [x.requires_grad_() for x in features(rng)]
        copies = [x.detach().clone().requires_grad_() for x in given]
        for x, layer in zip(copies, (head.image_proj, head.text_proj), strict=True):
            unit(x, layer.weight)[:, 0].sum().backward()

        *rows, _ = called(head.train(training), given[0], given[1])

        what = f"{HEAD} in {'training' if training else 'eval'}, projections frozen"
        assert all(one.requires_grad for one in rows), f"{what}: the rows carry no gradient; the features ask for one"
        (rows[0][:, 0].sum() + rows[1][:, 0].sum()).backward()
        for name, x, copy in zip(("image features", "text features"), given, copies, strict=True):
            close(x.grad, is_tensor(copy.grad, ""), f"{what}, backward: gradient of {name}", tolerance=1e-6)


@requirement("7.1")
def test_new_weights_count_at_once(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A call after weights have changed uses the new ones, in eval too. By .data, no version counter tells of it."""
    head = build(subject, rng).eval()
    image, text = features(rng)
    for by_data in (False, True):
        for name, layer, given in (("image", head.image_proj, image), ("text", head.text_proj, text)):
            with torch.no_grad():
                called(head, image, text)
                (layer.weight.data if by_data else layer.weight).add_(1.0)

                rows = called(head, image, text)[name == "text"]

                what = f"{HEAD} in eval under no_grad, after an edit of {name}_proj.weight{'.data' if by_data else ''}"
                hint = "something is kept from the call before"
                close(rows, unit(given, layer.weight.detach()), f"{what}: {name} rows", hint=hint)


@requirement("7.1")
def test_rows_beside_a_row_of_zeros(subject: Subject, rng: torch.Generator) -> None:
    """A row of zeros makes no gradient NaN."""
    head = build(subject, rng)
    image, text = features(rng)
    image[2] = 0

    rows = called(head, image, text)
    (rows[0].sum() + rows[1].sum() + rows[2]).backward()

    for name, weight in (("image_proj", head.image_proj.weight), ("text_proj", head.text_proj.weight)):
        assert weight.grad is not None, f"{HEAD}, backward: {name}.weight gets no gradient"
        assert weight.grad.isfinite().all(), (
            f"{HEAD}, backward: the gradient of {name}.weight is not finite where one row is zeros\n"
            "the length of a row of zeros is not what it is divided by"
        )


# 7.2 the bound


def at(head: Any, raw: float) -> float:
    """Sets logit_scale, and returns what it then is, which half precision rounds."""
    with torch.no_grad():
        head.logit_scale.fill_(raw)
    return float(head.logit_scale)


def scale_of(head: Any, rng: torch.Generator) -> Tensor:
    """forward's scale."""
    dtype = head.logit_scale.dtype
    return called(head, *features(rng, dtype))[2]


@requirement("7.2")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_the_bound(subject: Subject, rng: torch.Generator, dtype: torch.dtype) -> None:
    """scale is min(exp(logit_scale), max_scale), far and little beyond the bound, in training and in eval."""
    near = 4e-2 if dtype in HALVES else 1e-3
    cases = [(100.0, raw) for raw in (1000.0, math.log(100) + 0.125, 20.0, math.log(100) - 0.5, -3.0)]
    heads = {max_scale: build(subject, rng, dtype, max_scale=max_scale) for max_scale in (100.0, 7.0, 0.5)}
    for place, (max_scale, raw) in enumerate(
        [*cases, (7.0, 3.0), (100.0, 1000.0), (100.0, 5.0), (7.0, 1.25), (0.5, 2.0)]
    ):
        training = place < len(cases)
        head = heads[max_scale].train(training)
        held = at(head, raw)
        wanted = min(math.exp(min(held, 100.0)), max_scale)

        with torch.set_grad_enabled(training):
            came = float(scale_of(head, rng))

        hint = "scale = min(exp(logit_scale), max_scale)" if math.isfinite(came) else "exp overflows: bound before it"
        assert abs(came - wanted) <= near * wanted, (
            f"{HEAD} in {dtype} in {'training' if training else 'eval'}, max_scale {max_scale:g}, "
            f"logit_scale {held:g}: scale {came:.6g} came, {wanted:.6g} was wanted\n{hint}"
        )


@requirement("7.2")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_the_bound_is_not_sticky(subject: Subject, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Beyond the bound the gradient of logit_scale is finite and has the sign of the scale's."""
    head = build(subject, rng, dtype)
    for raw, training in ((1000.0, True), (4.75, True), (20.0, False), (88.5, True)):
        for incoming in (1.0, -1.0):
            head.train(training)
            held = at(head, raw)
            head.logit_scale.grad = None

            scale = scale_of(head, rng)
            what = f"{HEAD} in {dtype}, logit_scale {held:g}"
            assert scale.requires_grad, f"{what}: the scale carries no gradient"
            scale.backward(torch.tensor(incoming, dtype=scale.dtype))

            came = head.logit_scale.grad
            told = "none" if came is None else f"{float(came):.6g}"
            assert came is not None and math.isfinite(float(came)) and float(came) * incoming > 0, (
                f"{what}, backward({incoming:g}) of scale: the gradient of logit_scale is {told}; "
                f"a finite one {'above' if incoming > 0 else 'below'} 0 was wanted\n"
                "clamp has the gradient 0 beyond its bound, and exp of a large number overflows: bound what the "
                "parameter holds, or give the gradient a way round the clamp"
            )


@requirement("7.2")
def test_descent_leads_back(subject: Subject, rng: torch.Generator) -> None:
    """From beyond the bound, steps against the gradient lower the scale again."""
    head = build(subject, rng, max_scale=20.0)
    at(head, math.log(20.0) + 0.25)
    scales = []
    for _ in range(4):
        head.logit_scale.grad = None
        scale = scale_of(head, rng)
        assert scale.requires_grad, f"{HEAD}: the scale carries no gradient"
        scales.append(float(scale))
        scale.backward()
        with torch.no_grad():
            head.logit_scale.sub_(0.3 * is_tensor(head.logit_scale.grad, "gradient of logit_scale").sign())

    assert abs(scales[0] - 20) < 0.02, (
        f"{HEAD}, logit_scale a quarter beyond the bound: scale {scales[0]:.6g} came, 20 was wanted"
    )
    assert scales[-1] < 17 and scales[-1] < scales[0], (
        f"{HEAD}: three steps against the gradient of logit_scale, of 0.3 each, lead to the scales "
        f"{[round(scale, 3) for scale in scales]}; below 17 was wanted\n"
        "the bound sticks"
    )


@requirement("7.2")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_within_the_bound_nothing_is_written(subject: Subject, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Within the bound logit_scale stays as it is, and gets the gradient exp(logit_scale)."""
    head = build(subject, rng, dtype)
    for raw in (4.5 if dtype in HALVES else math.log(100) - 5e-4, 0.0, -7.0):
        held = at(head, raw)
        head.logit_scale.grad = None
        for training in (False, True):
            scale = scale_of(head.train(training), rng)

        assert float(head.logit_scale) == held, (
            f"{HEAD} in {dtype}: logit_scale {held:g} is within the bound and became {float(head.logit_scale):g}"
        )
        assert scale.requires_grad, f"{HEAD}: the scale carries no gradient"
        scale.backward()
        came, wanted = head.logit_scale.grad, math.exp(held)
        told = "none" if came is None else f"{float(came):.6g}"
        assert came is not None and abs(float(came) - wanted) <= 4e-2 * wanted, (
            f"{HEAD} in {dtype}, logit_scale {held:g}, backward of scale: the gradient of logit_scale is {told}, "
            f"exp(logit_scale) = {wanted:.6g} was wanted"
        )


@requirement("7.2")
def test_a_loaded_or_frozen_scale_is_bounded(subject: Subject, rng: torch.Generator) -> None:
    """A logit_scale that was loaded, or that is frozen, is bounded like any other; the dict that was loaded stays."""
    head, other = build(subject, rng, max_scale=50.0), build(subject, rng)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    state["logit_scale"].fill_(9.0)
    head.load_state_dict(state)
    for frozen in (False, True):
        head.logit_scale.requires_grad_(not frozen)
        came = float(scale_of(head, rng))

        assert abs(came - 50) < 0.05, (
            f"{HEAD}, max_scale 50, logit_scale 9 {'and frozen' if frozen else 'by load_state_dict'}: "
            f"scale {came:.6g} came, 50 was wanted"
        )
    assert float(state["logit_scale"]) == 9, f"{HEAD}: writes to the dict that was loaded"


__all__ = ["build", "called", "features", "unit"]
