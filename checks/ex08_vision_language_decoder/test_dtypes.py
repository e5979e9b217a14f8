"""Towers, projectors, decoders and images of different dtypes (8.9)."""

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from harness.testing import Close, Subject, is_tensor, requirement

from .reference import IMAGE, PLACEHOLDER, Bare, Batch, Built, batch, build, expect, merged, padded, ran

P = PLACEHOLDER
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


class Mix(NamedTuple):
    """A dtype for each part; without one for the tower, a tower without parameters."""

    tower: torch.dtype | None
    projector: torch.dtype
    decoder: torch.dtype
    images: torch.dtype

    def __str__(self) -> str:
        names = ["none" if one is None else str(one).removeprefix("torch.") for one in self]
        return "-".join(names)

    @property
    def told(self) -> str:
        """In words."""
        tower, projector, decoder, images = str(self).split("-")
        return f"tower {tower}, projector {projector}, decoder {decoder}, images {images}"

    @property
    def tolerance(self) -> float:
        """As near as the text asks."""
        return 5e-2 if HALF in self else 1e-4


MIXES = [
    Mix(HALF, SINGLE, DOUBLE, SINGLE),
    Mix(SINGLE, DOUBLE, HALF, DOUBLE),
    Mix(None, HALF, SINGLE, DOUBLE),
]


def mixed(subject: Subject, rng: torch.Generator, mix: Mix) -> tuple[Built, Batch]:
    """A model of mixed dtypes, and a batch for it."""
    built = build(subject, rng, tower=Bare() if mix.tower is None else None, scale=0.3)
    parts: tuple[tuple[nn.Module, torch.dtype | None], ...] = (
        (built.tower, mix.tower),
        (built.model.projector, mix.projector),
        (built.decoder, mix.decoder),
    )
    for part, dtype in parts:
        part.to(dtype)
    ids, mask = [[9, P, 5, 6], [0, P, 3, 4], [1, 2, 0, 0]], [[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]]
    given = batch(rng, ids, mask, [[9, -100, 5, 6], [0, -100, -100, 4], [1, 2, 0, 0]])
    given.images = is_tensor(given.images, "").to(mix.images)
    return built, given


def runs(call: Any, what: str) -> Any:
    """Calls; an error about dtypes is told as one."""
    try:
        return call()
    except RuntimeError as error:
        raise AssertionError(
            f"{what}: RuntimeError ({error}) came\nimages are cast to the dtype of the tower's first parameter, its "
            "tokens to the projector's, then to the embedding's"
        ) from error


def right_in_float64(subject: Subject, given: Batch) -> bool:
    """Without any other dtype the loss is right; if it is not, that is 8.4's to say."""
    built = build(subject, torch.Generator().manual_seed(1), scale=0.3)
    plain = Batch(given.ids, None, given.mask, given.labels)
    plain.images = torch.ones(int(((given.ids == P) & given.visible()).sum()), *IMAGE, dtype=DOUBLE)
    return abs(float(ran(built, plain)[1]) - float(expect(built, plain).loss)) < 1e-4


@requirement("8.9")
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_mixed_dtypes(subject: Subject, rng: torch.Generator, mix: Mix) -> None:
    """Logits have the decoder's dtype, the loss float32 or float64, gradients their parameters'."""
    built, given = mixed(subject, rng, mix)
    close, expected = Close(mix.tolerance), expect(built, given)
    kinds = {name: parameter.dtype for name, parameter in built.parameters().items()}

    logits, loss = runs(lambda: ran(built, given), f"forward, {mix.told}")

    for number, row in enumerate(expected.logits):
        came = logits[number, : len(row)]
        close(came, row.to(mix.decoder), f"forward, {mix.told}: logits of row {number}")
    loss = is_tensor(loss, "forward: loss")
    assert loss.dtype in (SINGLE, DOUBLE), f"forward, {mix.told}: a loss in {loss.dtype} came, no less than float32"
    expected.logits = [logits[number, : len(row)].detach().double() for number, row in enumerate(expected.logits)]
    what = f"forward, {mix.told}: loss, by the logits that came"
    off = abs(float(loss.detach()) - float(expected.loss)) > 1e-5 * (1 + float(expected.loss))
    if not off or right_in_float64(subject, given):
        hint = "it is what these logits give in bfloat16; compute it in float32 or better"
        close(loss.detach().double(), expected.loss, what, tolerance=1e-5, hint=hint)
    if not loss.requires_grad:
        return  # That it does is 8.4's to say.
    runs(loss.backward, f"forward, {mix.told}, backward")
    for name, parameter in built.parameters().items():
        gradient, kind = parameter.grad, kinds[name]
        assert parameter.dtype == kind, f"forward, {mix.told}: {name} is in {parameter.dtype} now; it was in {kind}"
        assert gradient is not None, f"forward, {mix.told}, backward: {name} gets no gradient"
        assert gradient.dtype == parameter.dtype, f"forward, {mix.told}, backward: {name}'s gradient: {gradient.dtype}"
    if built.tower.seen and mix.tower is not None:
        got = {dtype for _, dtype in built.tower.seen}
        assert got == {mix.tower}, f"forward, {mix.told}: the tower is called with images in {got}"


@requirement("8.9")
def test_generation_of_mixed_dtypes(subject: Subject, rng: torch.Generator) -> None:
    """generate works with every mixture; each token is, to the dtypes' precision, the best after its row so far."""
    for mix in MIXES[1:2]:
        built, given = mixed(subject, rng, mix)
        given.labels = None

        call = partial(built.model.generate, given.ids, given.images, given.mask, 3)
        tokens = is_tensor(runs(call, f"generate, {mix.told}"), f"generate, {mix.told}")

        for number, (ids, shown) in enumerate(zip(given.ids, given.visible(), strict=True)):
            images = None if P not in ids else is_tensor(given.images, "")[number : number + 1]
            whole = Batch(torch.cat([ids[shown], tokens[number]])[None], images)
            logits = expect(built, whole).logits[0][-4:-1].detach()
            behind = float((logits.amax(dim=1) - logits.gather(1, tokens[number][:, None])[:, 0]).max())
            assert behind <= 4 * mix.tolerance, (
                f"generate, {mix.told}: row {number}: a token is {behind:.3g} below the best"
            )


@requirement("8.9")
def test_the_first_parameter_decides(subject: Subject, rng: torch.Generator) -> None:
    """A tower whose later parameters are of another dtype gets images in the dtype of its first."""
    built, given = mixed(subject, rng, Mix(DOUBLE, SINGLE, SINGLE, HALF))
    built.tower.shift.data = built.tower.shift.data.bfloat16()
    expected = expect(built, given, run=False)

    found = runs(lambda: merged(built, given), "merge, a tower of float64 whose last parameter is bfloat16")

    got = {dtype for _, dtype in built.tower.seen}
    assert got == {DOUBLE}, f"merge: the tower's first parameter is in float64; it is called with images in {got}"
    wanted = padded(expected.embeds, max(expected.lengths)).float()
    came = found.inputs_embeds.where(found.attention_mask[..., None], 0)
    Close(1e-4)(came, wanted, "merge, a tower of float64 whose last parameter is bfloat16: inputs_embeds")


@requirement("8.9")
def test_a_cast_model_goes_on(subject: Subject, rng: torch.Generator) -> None:
    """Parts that are cast between calls, there and back, are asked for their dtypes in each call."""
    built, given = mixed(subject, rng, Mix(SINGLE, SINGLE, SINGLE, SINGLE))
    for part, dtype in ((built.tower, SINGLE), (built.tower, DOUBLE), (built.decoder, DOUBLE)):
        part.to(dtype)
        logits, _ = runs(lambda: ran(built, given), "forward after a part was cast")

        wanted = next(built.decoder.parameters()).dtype
        assert logits.dtype == wanted, f"forward after a part was cast: logits in {logits.dtype}, {wanted} was wanted"
        expected = expect(built, given)
        Close(5e-2)(logits[0].double(), expected.logits[0], "forward after a part was cast: logits of row 0")
