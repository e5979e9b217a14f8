"""The loss over ranks: the same loss (7.6), without all logits on a rank (7.7)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from harness.testing import Close, Subject, Trace, also, halfway, is_tensor, requirement

from .ranks import Rank
from .reference import (
    ABOUT,
    ASKING,
    NAMES,
    NEAR,
    SHARDED,
    Pairs,
    alike,
    formula,
    known_gradient,
    pairs,
    sharded,
    slices,
)

SIZES = {"one rank": (4,), "two ranks": (3, 3), "unequal": (1, 4), "three ranks": (2, 1, 3)}


def a_step(asking: tuple[str, ...], times: float = 1.0) -> Callable[[Any, Pairs, Rank], list[Tensor | None]]:
    """What a rank does: its loss and backward; then the loss, and the gradients of image, text and scale."""

    def step(loss_of: Any, part: Pairs, comm: Rank) -> list[Tensor | None]:
        leaves = part.leaves(asking)
        loss = is_tensor(loss_of(*leaves.tensors, comm), SHARDED)
        if asking:
            assert loss.requires_grad, f"{SHARDED}: the loss carries no gradient; {', '.join(asking)} ask for one"
            loss.backward(torch.tensor(times, dtype=loss.dtype))
        return [loss.detach(), *(leaf.grad for leaf in leaves.tensors)]

    return step


def mean_is(close: Close, came: list[list[Tensor | None]], given: Pairs, sizes: tuple[int, ...], what: str,
            asking: tuple[str, ...] = NAMES, times: float = 1.0, tolerance: float = NEAR) -> None:  # fmt: skip
    """Fails unless the mean over the ranks of losses and gradients is the formula's."""
    world = len(sizes)
    wanted, gradients = given.exact()
    losses = [is_tensor(one[0], f"{what}: loss") for one in came]
    for rank, loss in enumerate(losses):
        assert loss.shape == (), f"{what}: shape {tuple(loss.shape)} came on rank {rank}, () was wanted"
    mean = torch.stack(losses).mean(0)
    with also(known_mean, mean, given, sizes):
        close(mean, wanted, f"{what}: mean loss", tolerance=tolerance)
    for place, name in enumerate(NAMES):
        if name not in asking:
            continue
        right = times * gradients[name]
        parts = [right] * world if name == "scale" else [right[rows] for rows in slices(sizes)]
        for rank, (one, part) in enumerate(zip(came, parts, strict=True)):
            assert one[1 + place] is not None, (
                f"{what}, backward: {name} gets no gradient on rank {rank}: is something detached, or a number?"
            )
            if name != "scale":
                where = f"{what}, backward: gradient of {name} on rank {rank} of {world}"
                hint = "DDP divides by the number of ranks: the mean over the ranks is right"
                with also(known_share, one[1 + place], part * world, given, sizes, rank, name, times):
                    close(one[1 + place], part * world, where, tolerance=tolerance, hint=hint)
        if name == "scale":
            mean = torch.stack([is_tensor(one[1 + place], "") for one in came]).mean(0)
            with also(known_gradient, mean, right):
                close(mean, right, f"{what}, backward: mean gradient of scale", tolerance=tolerance)


def known_mean(came: Tensor, given: Pairs, sizes: tuple[int, ...]) -> str:
    """Which slip gives just this mean loss, if a known one does."""
    image, text, scale = given.tensors
    logits, n, world = (scale * image @ text.mT).detach(), len(image), len(sizes)
    parts = list(slices(sizes))
    to_text, to_image = -logits.log_softmax(1), -logits.log_softmax(0).mT
    local = [formula(image[p], text[p], scale).detach() for p in parts]
    each = (to_text + to_image).diagonal() / 2
    moved = sum(float((to_text[p] + to_image[p])[:, : p.stop - p.start].diagonal().sum()) for p in parts) / 2 / n
    equal = sum(
        float((to_text[p] + to_image[p])[:, rank * (p.stop - p.start) :].diagonal().sum())
        for rank, p in enumerate(parts)
    )
    forms = {
        "each rank's own pairs alone: the other ranks' rows are negatives too": torch.stack(local).mean(),
        "the right loss divided by the number of ranks: their mean is taken, not their sum": each.mean() / world,
        "the right loss times the number of ranks": each.mean() * world,
        "the mean of the ranks' means; ranks hold different numbers of pairs": torch.stack(
            [each[p].mean() for p in parts]
        ).mean(),
        "what comes with labels from 0 on every rank; a rank's pairs come after those of the ranks before it": moved,
        "what comes with labels from rank · n; ranks hold different numbers of pairs": equal / 2 / n,
        "what images that look for texts give alone": to_text.diagonal().mean(),
        "what texts that look for images give alone": to_image.diagonal().mean(),
    }
    right = each.mean()
    for words, form in forms.items():
        form = torch.as_tensor(form, dtype=torch.float64)
        if alike(came, form) and not alike(form, right):
            return f"it is {words}"
    return ""


def known_share(
    came: Tensor, wanted: Tensor, given: Pairs, sizes: tuple[int, ...], rank: int, name: str, times: float
) -> str:
    """Which slip gives just this gradient of a rank's rows, if a known one does."""
    image, text, scale = (tensor.detach().clone() for tensor in given.tensors)
    rows, n = list(slices(sizes))[rank], len(image)
    leaf = (image if name == "image" else text)[rows].clone().requires_grad_()
    own = {"image": image[rows], "text": text[rows], name: leaf}
    whole = {"image": image, "text": text}
    beside = {side: torch.cat([whole[side][: rows.start], own[side], whole[side][rows.stop :]]) for side in whole}
    labels = torch.arange(n)[rows]

    def loss(images: Tensor, texts: Tensor) -> Tensor:
        found = F.cross_entropy(scale * own["image"] @ texts.mT, labels, reduction="sum")
        found = found + F.cross_entropy(scale * own["text"] @ images.mT, labels, reduction="sum")
        return times * found / (2 * n) * len(sizes)

    forms = {
        "rows that others gathered get no gradient: what this rank's rows do to the losses is missing": loss(
            **whole_of(whole)
        ),
        "the own part of the gathered rows alone gets a gradient: what other ranks' losses give is missing": loss(
            **whole_of(beside)
        ),
    }
    for words, value in forms.items():
        if alike(came, torch.autograd.grad(value, leaf)[0]):
            return words
    return known_gradient(came, wanted)


def whole_of(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """The arguments of a rank's loss."""
    return {"images": rows["image"], "texts": rows["text"]}


@requirement("7.6")
def test_ranks_by_hand(subject: Subject, close: Close) -> None:
    """Two pairs on two ranks, scale log 2: the mean over the ranks is 0.7226."""
    text = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    given = Pairs(torch.eye(2, dtype=torch.float64), text, torch.tensor(2.0, dtype=torch.float64).log())

    came = sharded(subject, given, (1, 1), a_step(NAMES))

    mean_is(close, came, given, (1, 1), f"{SHARDED} of (1, 0), (0, 1) and twice (1, 0), one pair a rank")


@halfway
@requirement("7.6")
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_shards_of_any_size(subject: Subject, close: Close, rng: torch.Generator, sizes: tuple[int, ...]) -> None:
    """The mean over the ranks is the loss of all rows, and so are the gradients, times what comes in."""
    given = pairs(rng, sum(sizes), 3)

    for times in (1.0, -3.0)[: 1 + (len(sizes) == 2)]:
        came = sharded(subject, given, sizes, a_step(NAMES, times))

        what = f"{SHARDED}, {' + '.join(map(str, sizes))} pairs"
        mean_is(close, came, given, sizes, what if times == 1 else f"{what}, backward({times:g})", times=times)


@requirement("7.6")
def test_shards_with_frozen_inputs(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Any of image, text and scale may need no gradient, on all ranks alike."""
    sizes = (2, 3)
    for name, asking in ASKING.items():
        given = pairs(rng, 5, 3)

        came = sharded(subject, given, sizes, a_step(asking))

        mean_is(close, came, given, sizes, f"{SHARDED}, gradients asked for by {name}", asking)


@requirement("7.6")
def test_an_encoder_that_ranks_share(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The mean over the ranks of an encoder's gradients is that of the loss on all rows."""
    sizes = (2, 1, 3)
    given = pairs(rng, 6, 3)
    weight = torch.randn(3, 3, generator=rng, dtype=torch.float64)
    leaf = weight.clone().requires_grad_()
    formula(given.image @ leaf, (given.text @ leaf).tanh(), given.scale).backward()

    def step(loss_of: Any, part: Pairs, comm: Rank) -> Tensor | None:
        own = weight.clone().requires_grad_()
        loss = is_tensor(loss_of(part.image @ own, (part.text @ own).tanh(), part.scale, comm), SHARDED)
        assert loss.requires_grad, f"{SHARDED}: the loss carries no gradient; the rows ask for one"
        loss.backward()
        return own.grad

    came = [is_tensor(one, "gradient of a shared encoder") for one in sharded(subject, given, sizes, step)]

    mean, wanted = torch.stack(came).mean(0), is_tensor(leaf.grad, "")
    with also(known_gradient, mean, wanted):
        close(mean, wanted, f"{SHARDED}, backward: mean gradient of an encoder that 3 ranks share", tolerance=NEAR)


@requirement("7.6")
def test_shards_leave_their_inputs(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Rows are not written to, image and text may be one tensor, and a second backward is right too."""
    sizes = (3, 2)
    given = pairs(rng, 5, 3)
    given = Pairs(given.image, given.image, given.scale)

    def step(loss_of: Any, part: Pairs, comm: Rank) -> list[Tensor | None]:
        leaf, scale = part.image.requires_grad_(), part.scale.requires_grad_()
        loss = is_tensor(loss_of(leaf, leaf, scale, comm), SHARDED)
        assert leaf._version == 0, f"{SHARDED}: writes to its rows"
        assert loss.requires_grad, f"{SHARDED}: the loss carries no gradient"
        loss.backward(retain_graph=True)
        leaf.grad = scale.grad = None
        loss.backward()
        return [loss.detach(), leaf.grad, leaf.grad, scale.grad]

    came = sharded(subject, given, sizes, step)

    mean_is(close, came, given, sizes, f"{SHARDED}, image and text are one tensor, second backward")

    def on_one_rank(loss_of: Any, part: Pairs, comm: Rank) -> Any:
        return is_tensor(loss_of(part.image, part.text if comm.rank else part.image, part.scale, comm), SHARDED)

    mean = torch.stack(sharded(subject, given, sizes, on_one_rank)).mean(0)
    close(mean, given.exact()[0], f"{SHARDED}, image and text are one tensor on rank 0 alone: mean loss")


@requirement("7.6")
def test_large_logits_over_ranks(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Logits of ±1000 that rise from rank to rank."""
    sizes, steps = (2, 1, 2), torch.arange(5, dtype=torch.float64)[:, None]
    given = pairs(rng, 5, 3)
    given = Pairs(given.image + 6 * steps, given.text + 5 * steps - 8, given.scale)

    came = sharded(subject, given, sizes, a_step(NAMES))

    mean_is(close, came, given, sizes, f"{SHARDED}, logits up to thousands", tolerance=1e-7)


# 7.7 memory of a rank


@requirement("7.7")
@pytest.mark.parametrize("asking", [NAMES, ("image",)], ids=["all", "images alone"])
def test_no_rank_holds_all_logits(
    subject: Subject, close: Close, rng: torch.Generator, asking: tuple[str, ...]
) -> None:
    """On 4 ranks no tensor has more than 2·n·N elements, in forward and in backward."""
    sizes, e = (9, 4, 5, 4), 3
    given = pairs(rng, 22, e).to(torch.float32)
    step = a_step(asking)

    def watched(loss_of: Any, part: Pairs, comm: Rank) -> tuple[list[Tensor | None], int, Trace]:
        with Trace() as seen:
            came = step(loss_of, part, comm)
        return came, seen.largest, seen

    found = sharded(subject, given, sizes, watched)

    wanted, gradients = given.exact()
    mean = torch.stack([is_tensor(came[0], SHARDED) for came, *_ in found]).mean(0)
    close(mean, wanted.float(), f"{SHARDED} on 4 ranks: mean loss", tolerance=ABOUT)
    images = torch.cat([is_tensor(came[1], f"{SHARDED}, backward: gradient of image") for came, *_ in found]) / 4
    close(
        images, gradients["image"].float(), f"{SHARDED} on 4 ranks, backward: gradient of image over 4", tolerance=ABOUT
    )
    for rank, (_, largest, _) in enumerate(found):
        assert largest <= 2 * sizes[rank] * 22, (
            f"{SHARDED}: rank {rank} of 4 holds n = {sizes[rank]} of N = 22 pairs and makes a tensor of {largest} "
            f"elements; at most 2·n·N = {2 * sizes[rank] * 22} are asked for\n"
            "a rank compares its own rows with all others, not all with all"
        )
    traces = [seen for _, _, seen in found]
    del found
    left = sum(seen.alive_after_collection() for seen in traces)
    assert left == 0, f"{SHARDED}: {left} bytes are alive once loss and gradients are let go; nothing was wanted"
