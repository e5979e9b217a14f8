"""The loss in chunks: what it costs (7.4), and that it is the same loss (7.5)."""

import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from harness.testing import Close, Subject, Trace, Where, is_tensor, refuses, requirement

from .reference import ABOUT, ASKING, CHUNKED, NAMES, Pairs, chunked, judged, known_loss, nothing_left, pairs

# 7.4 memory and work

E, CHUNK, NARROW = 3, 24, 8


def wide(rng: torch.Generator, n: int, grouped: bool, e: int = E, asking: tuple[str, ...] = NAMES) -> Pairs:
    """Pairs in float32 whose logits are their largest tensor."""
    groups = [(i * 7) % (n // 2) * 3 for i in range(n)] if grouped else None
    return pairs(rng, n, e, 2.0, groups).to(torch.float32).leaves(asking)


def about(close: Close, loss: Any, given: Pairs, what: str) -> None:
    """The loss and its gradients are not far from the formula's."""
    wanted, gradients = given.exact()
    close(loss, wanted.float(), what, tolerance=ABOUT)
    for name, leaf in zip(NAMES, given.tensors, strict=True):
        close(leaf.grad, gradients[name].float(), f"{what}, backward: gradient of {name}", tolerance=ABOUT)


@requirement("7.4")
@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "groups"])
def test_no_tensor_of_all_pairs(subject: Subject, close: Close, rng: torch.Generator, grouped: bool) -> None:
    """No tensor has more than 2·chunk_size·N elements, in forward and in backward, and the peak grows like N."""
    peaks = []
    for n, asking in ((64, NAMES), (128, NAMES), (64, NAMES[1:2] if grouped else NAMES[2:])):
        given = wide(rng, n, grouped, asking=asking)
        told = f", gradients asked for by {asking[0]} alone" if len(asking) == 1 else ""
        with Trace() as seen:
            loss = is_tensor(chunked(subject, given, CHUNK), CHUNKED)
            forward = seen.largest
            assert loss.requires_grad, f"{CHUNKED}: the loss carries no gradient"
            loss.backward()
        if asking is NAMES:
            about(close, loss, given, f"{CHUNKED}, N = {n}, chunk_size = {CHUNK}")
        where = "forward" if forward > 2 * CHUNK * n else "backward"
        assert seen.largest <= 2 * CHUNK * n, (
            f"{CHUNKED}{' with groups' if grouped else ''}, N = {n}, chunk_size = {CHUNK}{told}: {where} makes a "
            f"tensor of {seen.largest} elements; at most 2·chunk_size·N = {2 * CHUNK * n} are asked for\n"
            "logits, masks of groups and their gradients are made for one chunk of rows at a time"
        )
        peaks.append(seen.peak_bytes)
    assert peaks[1] < 2.2 * peaks[0], (
        f"{CHUNKED}{' with groups' if grouped else ''}, forward and backward: at most {peaks[0]} bytes are alive for "
        f"N = 64, {peaks[1]} for N = 128, {peaks[1] / peaks[0]:.2f} times as many; less than 2.2 times are asked for\n"
        "let each chunk go before the next, in backward too"
    )


@requirement("7.4")
@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "groups"])
def test_little_stays_alive_after_forward(subject: Subject, close: Close, rng: torch.Generator, grouped: bool) -> None:
    """While the loss is held, at most 3 times the bytes of image and text are alive; afterwards nothing is."""
    given = wide(rng, 96, grouped, 7)
    if grouped:  # Transposed rows, too.
        image, text = (rows.detach().mT.contiguous().mT for rows in (given.image, given.text))
        given = Pairs(image, text, given.scale, given.groups).leaves()
    with Trace() as seen:
        loss = is_tensor(chunked(subject, given, NARROW), CHUNKED)
        kept = seen.alive_bytes
        assert loss.requires_grad, f"{CHUNKED}: the loss carries no gradient"
        loss.backward(retain_graph=True)
    about(close, loss, given, f"{CHUNKED}, N = 96, chunk_size = {NARROW}")
    unit = given.image.nbytes + given.text.nbytes
    assert kept <= 3 * unit, (
        f"{CHUNKED}{' with groups' if grouped else ''}: {kept} bytes stay alive for backward, {kept / unit:.1f} times "
        "image and text; at most 3 times is asked for\nkeep no chunk of logits: backward computes them anew"
    )
    for leaf in given.tensors:
        leaf.grad = None
    del loss, leaf
    left = seen.alive_after_collection()
    assert left == 0, f"{CHUNKED}: {left} bytes are alive once the loss is let go; nothing was wanted"


@requirement("7.4")
def test_operations_follow_the_chunks(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Twice as many pairs in chunks twice as large take at most 1.2 times the operations."""
    counts = []
    for n in (40, 80):
        given = wide(rng, n, True)
        with Trace() as seen:
            loss = is_tensor(chunked(subject, given, n // 4), CHUNKED)
            assert loss.requires_grad, f"{CHUNKED}: the loss carries no gradient"
            loss.backward()
        about(close, loss, given, f"{CHUNKED}, N = {n}, chunk_size = {n // 4}")
        counts.append(seen.operations.total())
    assert counts[1] <= 1.2 * counts[0], (
        f"{CHUNKED} with groups: forward and backward make {counts[0]} operations for N = 40, "
        f"chunk_size = 10, and {counts[1]} for N = 80, chunk_size = 20; at most 1.2 times as many are asked for\n"
        "loop over the chunks, not over rows, pairs or groups"
    )


# 7.5 the same loss


GROUPS = [4, -1, 4, 0, -1, 4, 9]


@requirement("7.5")
@pytest.mark.parametrize(
    ("chunk_size", "groups"),
    [(1, None), (2, GROUPS), (3, None), (3, GROUPS), (7, GROUPS), (12, None)],
    ids=["1", "2-groups", "3", "3-groups", "7-groups", "12"],
)
def test_chunks_of_any_size(
    subject: Subject, close: Close, rng: torch.Generator, chunk_size: int, groups: list[int] | None
) -> None:
    """Value and gradients are the formula's, whatever the chunk size, in a second backward too."""
    given = pairs(rng, 7, 3, groups=groups).leaves()

    loss = chunked(subject, given, chunk_size)

    words = partial(known_loss, given=given, chunk=chunk_size)
    what = f"{CHUNKED} of 7 pairs, groups {groups}, chunk_size {chunk_size}"
    judged(close, what, loss, given, words, times=-1.5, again=True)


@requirement("7.5")
def test_the_default_chunk(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Without a chunk_size more than 256 pairs are right too."""
    given = pairs(rng, 259, 2, groups=[i % 11 for i in range(259)]).leaves()

    judged(close, f"{CHUNKED} of 259 pairs", chunked(subject, given), given)


@requirement("7.5")
def test_chunks_without_some_gradients(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Any of image, text and scale may need no gradient."""
    for name, asking in ASKING.items():
        given = pairs(rng, 5, 3, groups=[1, 2, 1, 3, 2]).leaves(asking)
        words = partial(known_loss, given=given, chunk=2)
        judged(close, f"{CHUNKED}, gradients asked for by {name}", chunked(subject, given, 2), given, words)


@requirement("7.5")
def test_chunks_of_one_pair_and_of_huge_ids(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """One pair has the loss 0; ids that only all 64 bits tell apart are told apart."""
    for ids in ([7], [2**62 + 1, 2**62, -(2**63), 2**63 - 1, 2**62 + 1, -(2**63) + 1]):
        given = pairs(rng, len(ids), 4, 5.0, ids).leaves()

        judged(close, f"{CHUNKED}, groups {ids}", chunked(subject, given, 4), given)
    given = replace(pairs(rng, 4, 3), groups=torch.tensor(-4).expand(4)).leaves()
    judged(close, f"{CHUNKED}, groups torch.tensor(-4).expand(4)", chunked(subject, given, 2), given)


@requirement("7.5")
def test_chunks_of_one_tensor_in_both_roles(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Image and text may be one tensor: it gets both gradients, and is not written to."""
    one = pairs(rng, 5, 3)
    given = Pairs(one.image, one.image, one.scale).leaves()
    version = given.image._version

    judged(close, f"{CHUNKED}, image and text are one tensor", chunked(subject, given, 2), given)
    assert given.image._version == version, f"{CHUNKED}: writes to its rows"


@requirement("7.5")
def test_two_losses_before_backward(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A loss keeps what it needs for its own backward, whatever is called before that, and in whatever mode."""
    given, other = pairs(rng, 5, 3, groups=GROUPS[:5]).leaves(), pairs(rng, 5, 3).leaves()
    loss = chunked(subject, given, 2)
    with torch.no_grad():
        chunked(subject, other, 3)

    chunked(subject, other, 3).backward()

    judged(close, f"{CHUNKED}, another call before backward", loss, given)


@requirement("7.5")
def test_large_logits_in_chunks(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Logits of ±1000, and of one sign, that rise or fall from chunk to chunk; and all of them around -30000."""
    given, steps = pairs(rng, 6, 3), torch.arange(6, dtype=torch.float64)[:, None]
    rows = (20 * given.image, 20 * given.text), (given.image + 4 * steps, given.text - 3 * steps)
    for image, text in (*rows, (given.image + 60, given.text - 60)):
        one = Pairs(image, text, given.scale, given.groups).leaves()
        judged(close, f"{CHUNKED}, logits up to thousands", chunked(subject, one, 2), one, tolerance=1e-7)


@requirement("7.5")
def test_chunks_of_other_shapes_are_refused(subject: Subject) -> None:
    """image and text of different shapes raise ValueError with both."""
    scale = torch.tensor(1.0)
    for first, second in (((3, 2), (4, 2)), ((3, 2), (3, 5)), ((4, 2), (1, 2))):
        image, text = torch.ones(first), torch.ones(second)
        shapes = [", ".join(map(str, shape)) for shape in (first, second)]
        call = partial(subject.chunked_contrastive_loss, image, text, scale, chunk_size=2)
        refuses(ValueError, call, f"{CHUNKED} of image {first} and text {second}", *shapes)
        left = [weakref.ref(image), weakref.ref(text)]
        del image, text, call
        nothing_left(left, CHUNKED)


@requirement("7.5")
def test_chunks_agree_elsewhere(subject: Subject, close: Close, rng: torch.Generator, on: Where) -> None:
    """Loss and gradients agree with the formula on every device."""
    given = pairs(rng, 6, 4, 2.0, [0, 1, 0, 2, 1, 3])
    wanted, gradients = given.exact()
    assert given.groups is not None, "the check's own set-up holds"
    tensors = [tensor.to(on.device, on.dtype).requires_grad_() for tensor in given.tensors]

    loss = subject.chunked_contrastive_loss(*tensors, given.groups.to(on.device), chunk_size=4)

    kind = on.dtype if on.dtype in (torch.float32, torch.float64) else torch.float32
    close(loss, wanted.to(on.device, kind), f"{CHUNKED} in {on.dtype}")
    loss.backward()
    for name, tensor in zip(NAMES, tensors, strict=True):
        right = gradients[name].to(on.device, on.dtype)
        close(tensor.grad, right, f"{CHUNKED} in {on.dtype}, backward: gradient of {name}")
