"""Image tokens in the text (8.3): the projector, placeholders, order, counts."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.testing import Close, Subject, Where, also, fill, is_tensor, plain, refuses, requirement

from .reference import (
    PLACEHOLDER,
    VOCABULARY,
    WIDTH,
    Bare,
    Batch,
    Built,
    Tower,
    batch,
    build,
    expect,
    merged,
    padded,
    pictures,
    randomize,
    spelled,
)

P = PLACEHOLDER


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """Gradients have a check of their own."""
    with torch.no_grad():
        yield


@requirement("8.3")
def test_merge_by_hand(subject: Subject) -> None:
    """Ids that embed as themselves, and image tokens of 20 to 90, which the projector leaves as they are."""
    decoder = subject.Decoder(VOCABULARY, 2, 1, 1)
    model = subject.VisionLanguageModel(nn.Flatten(2), decoder, 2, P)
    with torch.no_grad():
        decoder.embed.weight.copy_(torch.arange(VOCABULARY)[:, None].expand(-1, 2))
        for layer in (model.projector.fc1, model.projector.fc2):
            layer.weight.copy_(torch.eye(2))
            layer.bias.zero_()
    # Two tokens an image: channels; each is as wide as an image has pixels.
    images = torch.tensor([[20.0, 30.0], [40.0, 50.0], [80.0, 90.0]]).view(3, 2, 1, 1).expand(-1, -1, 1, 2)
    ids = torch.tensor([[9, P, 5, P], [P, 7, 6, 3]])

    found = model.merge(ids, images)

    came = is_tensor(getattr(found, "inputs_embeds", None), "merge: inputs_embeds").detach()[..., 0].tolist()
    wanted = [[9.0, 20, 30, 5, 40, 50], [80.0, 90, 7, 6, 3]]
    for number, (row, right) in enumerate(zip(came, wanted, strict=True)):
        ours = [round(one, 3) for one in row[: len(right)]]
        assert ours == right, (
            f"merge([[9, P, 5, P], [P, 7, 6, 3]]), images of tokens 20 30, 40 50, 80 90: row {number}: {ours} came, "
            f"{right} was wanted\nP is the placeholder; an id embeds as its own number"
        )


@requirement("8.3")
def test_the_projector(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """fc2(gelu(fc1(x))) with the exact GELU, for any leading sizes."""
    projector = subject.Projector(WIDTH, 4).double()
    fill(projector.fc1, projector.fc2)
    (w1, b1), (w2, b2) = plain(projector.fc1), plain(projector.fc2)
    for shape in ((), (5,), (2, 0, 3)):
        x = 3 * torch.randn(*shape, WIDTH, generator=rng, dtype=torch.float64)
        inner = x @ w1.T + b1
        expected = (inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))) @ w2.T + b2

        output = is_tensor(projector(x), "Projector.forward(x)")

        with also(other_activation, output, inner, w2, b2):
            close(output, expected, f"Projector.forward(x [{', '.join(map(str, (*shape, WIDTH)))}])")


def other_activation(output: Tensor, inner: Tensor, weight: Tensor, bias: Tensor) -> str:
    """Which other activation gives the output."""
    found = {
        "the tanh approximation of GELU": nn.functional.gelu(inner, approximate="tanh"),
        "ReLU": inner.relu(),
        "SiLU": inner * inner.sigmoid(),
        "no activation": inner,
    }
    for name, active in found.items():
        if output.shape == inner.shape[:-1] + bias.shape and torch.allclose(output, active @ weight.T + bias):
            return f"it is what {name} gives; the exact GELU is wanted"
    return "fc2(gelu(fc1(x)))"


@requirement("8.3")
def test_every_placeholder_becomes_its_image(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """First, last, side by side or alone: each becomes the tokens of its own image, in order over the rows."""
    built = build(subject, rng)
    for ids in (
        [[P, 8, 2], [8, P, 2], [2, 8, P]],
        [[9, P, 5, P], [P, P, 3, 4], [1, 2, P, P]],
        [[P, P], [P, P]],
        [[P], [P], [P]],
        [[4, P, P, P, 2]],
        [[9, 8, 5, 1], [P, 6, 2, 3], [P, 7, P, P], [0, 0, 0, 0]],
    ):
        given = batch(rng, ids)

        found = merged(built, given)

        compare(close, built, given, found, f"merge({ids})".replace(str(P), "P"))


def compare(close: Close, built: Built, given: Batch, found: Any, what: str, tolerance: float | None = None) -> None:
    """The rows of inputs_embeds, padded on the right, but for what stands under padding."""
    expected = expect(built, given, run=False)
    came, wanted = found.inputs_embeds, padded(expected.embeds, max(expected.lengths))
    if came.shape == wanted.shape:
        keep = padded([torch.ones(n, 1, dtype=torch.bool) for n in expected.lengths], came.size(1))
        came = came.masked_fill(~keep, 0)
    with also(spelled, built, given, found.inputs_embeds):
        close(came, wanted, f"{what}: inputs_embeds", tolerance=tolerance)


@requirement("8.3")
def test_text_alone(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Without images, given as None or as [0, C, H, W], rows are their ids' embeddings."""
    built = build(subject, rng)
    given = batch(rng, [[9, 8, 5], [0, 6, 2]])
    expected = torch.stack(expect(built, given, run=False).embeds)
    for images, told in ((None, "None"), (given.images, "of shape [0, C, H, W]")):
        given.images = images

        found = merged(built, given)

        close(found.inputs_embeds, expected, f"merge, text alone, images {told}: inputs_embeds")


@requirement("8.3")
def test_any_placeholder_id(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The placeholder's id may lie in the vocabulary, or above it."""
    for placeholder in (4, 10**9):
        built = build(subject, rng, placeholder=placeholder, pad=3)
        given = batch(rng, [[9, placeholder, 5], [3, 3, placeholder]], placeholder=placeholder)
        expected = torch.stack(expect(built, given, run=False).embeds)
        what = f"merge, image_token_id {placeholder}"

        try:
            found = merged(built, given, what)
        except IndexError as error:
            raise AssertionError(f"{what}: IndexError ({error}) came\nis the placeholder's id looked up?") from error

        with also(spelled, built, given, found.inputs_embeds):
            close(found.inputs_embeds, expected, f"{what}: inputs_embeds")


@requirement("8.3")
def test_masks_of_any_dtype(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A mask of zeros and ones hides the same in every dtype; a hidden placeholder has no image."""
    built = build(subject, rng)
    given = batch(rng, [[9, P, 5, P], [P, 1, P, 3]], [[1, 1, 1, 0], [0, 1, 1, 1]])
    expected = torch.stack(expect(built, given, run=False).embeds)
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64):
        given.mask = is_tensor(given.mask, "").to(dtype)
        what = f"merge, a mask in {dtype} that hides one placeholder in each row"

        try:
            found = merged(built, given, what)
        except ValueError as error:
            raise AssertionError(f"{what}, 2 images: ValueError ({error}) came") from error

        with also(spelled, built, given, found.inputs_embeds):
            close(found.inputs_embeds, expected, f"{what}: inputs_embeds")
    ids = torch.randint(VOCABULARY, (1, 300), generator=rng)
    found = merged(built, Batch(ids, mask=torch.ones_like(ids, dtype=torch.uint8)))
    what = "merge, a row of 300 ids and a mask in torch.uint8: inputs_embeds"
    close(found.inputs_embeds, built.decoder.embed.weight[ids], what, hint="uint8 counts to 255; count in int64")


@requirement("8.3")
def test_inputs_stay_as_they_are(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Strided inputs give the same, and no input is written to."""
    built = build(subject, rng)
    row = torch.tensor([9, P, 5, P, 1])
    images = pictures(rng, 4).transpose(2, 3).contiguous().transpose(2, 3)
    mask = torch.tensor([[1, 0], [1, 0], [1, 0], [1, 0], [0, 0]]).T[:1].expand(2, 5)
    given = Batch(row.expand(2, 5), images, mask, row.expand(2, 5))
    before = given.copies()
    expected = torch.stack(expect(built, given, run=False).embeds)

    found = merged(built, given)

    close(found.inputs_embeds, expected, "merge, ids and mask expanded, images strided: inputs_embeds")
    for name, (now, copy, version) in before.items():
        given_x = {"input_ids": given.ids, "images": images, "attention_mask": mask, "labels": given.labels}[name]
        assert torch.equal(now, copy), f"merge: {name} has changed"
        assert is_tensor(given_x, "")._version == version, f"merge: {name} is written to, if only to be put back"


@requirement("8.3")
def test_counts_that_differ_are_refused(subject: Subject, rng: torch.Generator) -> None:
    """Placeholders and images that differ in number are a ValueError with both, before anything runs."""
    built = build(subject, rng)
    ids = torch.tensor([[P, 5, P, P, P], [5, 6, 7, 8, P]])
    merged(built, batch(rng, [[P, P, P]]))
    built.tower.seen.clear()
    for visible, count in ((3, None), (2, 1), (2, 3), (0, 1), (2, 0)):
        mask = torch.tensor([[place < visible for place in (0, -1, 1, 2, 9)], [False, True, True, True, False]])
        images = None if count is None else pictures(rng, count)
        what = f"merge with {visible} visible placeholders and {'no' if count is None else count} images"

        refuses(ValueError, partial(built.model.merge, ids, images, mask), what, visible, count or 0)

        assert not built.tower.seen and not built.decoder.seen, f"{what}: the tower runs before the ValueError"
    call = partial(build(subject, rng, placeholder=4).model.merge, torch.tensor([[9, 4, 4]]), pictures(rng, 0))
    refuses(ValueError, call, "merge with 2 visible placeholders, image_token_id 4, and images [0, C, H, W]", 2, 0)


@requirement("8.3")
def test_gradients_through_merge(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Tower, projector, embedding and images get the gradients of what merge gives; images by a frozen tower too."""
    for kind in ("", ", a tower frozen by hand"):
        built = build(subject, rng)
        built.tower.requires_grad_(not kind)
        given = batch(rng, [[9, P, 9, P], [P, 1, 2, P]])
        given.images = is_tensor(given.images, "").requires_grad_()
        with torch.enable_grad():
            expected = expect(built, given, run=False, gradients=True)
            torch.stack(expected.embeds).square().sum().backward()

            found = merged(built, given)
            assert found.inputs_embeds.requires_grad, f"merge{kind}: inputs_embeds carries no gradient"
            found.inputs_embeds.square().sum().backward()

        for name, parameter in built.parameters().items():
            wanted = expected.weights[name].grad
            if wanted is not None and parameter.requires_grad:
                hint = "is something detached, or in no_grad?"
                close(parameter.grad, wanted, f"merge, backward{kind}: gradient of {name}", hint=hint)
        wanted = is_tensor(is_tensor(expected.images, "").grad, "")
        close(given.images.grad, wanted, f"merge, backward{kind}: gradient of images")


@requirement("8.3")
def test_new_weights_and_images_count_at_once(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A call after weights have changed, by .data too, or with other images of the same shape, uses the new ones."""
    built = build(subject, rng)
    given = batch(rng, [[9, P, 5, P]])
    with torch.no_grad():
        merged(built, given)
        for part in ("vision", "projector", "decoder.embed"):
            randomize(rng, *(p.data for name, p in built.parameters().items() if name.startswith(part)))

            found = merged(built, given)

            compare(close, built, given, found, f"merge after an edit of {part} by .data")
        is_tensor(given.images, "").mul_(-0.5)
        compare(close, built, given, merged(built, given), "merge after an edit of the images")


@requirement("8.3")
def test_other_towers(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A tower may have no parameters, or give one token an image."""
    for kind in ("no_weights", "one_token"):
        built = build(subject, rng, tower=Bare() if kind == "no_weights" else Tower(rng, tokens=1))
        given = batch(rng, [[9, P, 5, P], [P, 1, 0, 3], [4, 4, 4, 4]])

        found = merged(built, given)

        what = "a tower without parameters" if kind == "no_weights" else "a tower of one token an image"
        compare(close, built, given, found, f"merge, {what}")


@requirement("8.3")
def test_merge_agrees_with_the_rows(subject: Subject, close: Close, rng: torch.Generator, on: Where) -> None:
    """Rows of one batch are the rows that a plain loop makes, on any device and in any dtype."""
    built = build(subject, rng, scale=0.3)
    given = batch(rng, [[9, P, 5, P], [P, 2, 2, P], [4, P, P, 4]])
    expected = torch.stack(expect(built, given, run=False).embeds).detach()
    built.model.to(on.device, on.dtype)
    moved = [x.to(on.device) for x in (given.ids, is_tensor(given.images, "").to(on.dtype))]

    found = built.model.merge(*moved)

    embeds = is_tensor(found.inputs_embeds, "merge: inputs_embeds")
    close(embeds, expected.to(on.device, on.dtype), "merge: inputs_embeds")
