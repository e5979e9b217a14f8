"""What the checks of ex07 share: pairs, the loss from the formula, and the names of known slips."""

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness.testing import Close, Subject, also, is_tensor

from .ranks import Rank, run_ranks

PLAIN, CHUNKED, SHARDED, HEAD = (
    *("contrastive_loss", "chunked_contrastive_loss", "sharded_contrastive_loss"),
    "ContrastiveHead.forward",
)
NEAR = 1e-9  # in float64
SHARES = 1e-6  # with groups: 1/|P_i| may have been computed in float32
ABOUT = 1e-2  # where costs are counted
HALVES = [torch.bfloat16, torch.float16]
NAMES = ("image", "text", "scale")
# Which of them ask for gradients.
ASKING: dict[str, tuple[str, ...]] = {
    "image": ("image",),
    "text": ("text",),
    "scale": ("scale",),
    "rows": ("image", "text"),
    "nothing": (),
}


@dataclass(frozen=True)
class Pairs:
    """What a loss takes."""

    image: Tensor
    text: Tensor
    scale: Tensor
    groups: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and scale."""
        return self.image, self.text, self.scale

    def to(self, image: torch.dtype, text: torch.dtype | None = None, scale: torch.dtype | None = None) -> "Pairs":
        """The same numbers, rounded to other dtypes."""
        kinds = (image, text or image, scale or image)
        made = [tensor.to(kind) for tensor, kind in zip(self.tensors, kinds, strict=True)]
        return Pairs(made[0], made[1], made[2], self.groups)

    def leaves(self, asking: tuple[str, ...] = NAMES) -> "Pairs":
        """Copies of the same strides, of which some ask for gradients; one tensor in two roles stays one."""
        copies: dict[int, Tensor] = {}
        for name, tensor in zip(NAMES, self.tensors, strict=True):
            leaf = copies.setdefault(id(tensor), tensor.detach())
            leaf.requires_grad_(leaf.requires_grad or name in asking)
            leaf.grad = None
        return Pairs(copies[id(self.image)], copies[id(self.text)], copies[id(self.scale)], self.groups)

    def part(self, rows: slice) -> "Pairs":
        """Some of the pairs, as tensors of their own."""
        return Pairs(self.image[rows].clone(), self.text[rows].clone(), self.scale.clone())

    def exact(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradients in float64, from the formula: of s_ij, (p_ij + q_ji) / 2N less what the matches weigh."""
        image, text, scale = (tensor.detach().double() for tensor in self.tensors)
        n, products = len(image), image @ text.mT
        to_text, to_image = (scale * products).log_softmax(1), (scale * products).log_softmax(0)
        weights = shares(n, self.groups)
        loss = -(weights * to_text + weights.mT * to_image).sum() / (2 * n)
        of_logits = (to_text.exp() + to_image.exp() - weights - weights.mT) / (2 * n)
        wanted = {"image": scale * of_logits @ text, "text": scale * of_logits.mT @ image}
        if self.text is self.image:
            wanted = dict.fromkeys(wanted, wanted["image"] + wanted["text"])
        return loss, {**wanted, "scale": (of_logits * products).sum()}


def pairs(
    rng: torch.Generator, n: int, e: int, scale: float = 3.0, groups: list[int] | None = None, unit: bool = False
) -> Pairs:
    """Random rows of different lengths, in float64."""
    image, text = (torch.randn(n, e, generator=rng, dtype=torch.float64) for _ in range(2))
    if unit:
        image, text = (rows / rows.norm(dim=1, keepdim=True) for rows in (image, text))
    ids = None if groups is None else torch.tensor(groups)
    return Pairs(image, text, torch.tensor(scale, dtype=torch.float64), ids)


def near_pairs(rng: torch.Generator, n: int, e: int, scale: float) -> Pairs:
    """Unit rows, each text near its image, so that the loss is small at a large scale."""
    given = pairs(rng, n, e, scale, unit=True)
    text = given.image + 1.2 * given.text
    return replace(given, text=text / text.norm(dim=1, keepdim=True))


def shares(n: int, groups: Tensor | None) -> Tensor:
    """1/|P_i| for each match j of pair i, 0 elsewhere, [N, N]."""
    match = torch.eye(n, dtype=torch.float64) if groups is None else (groups[:, None] == groups).double()
    return match / match.sum(1, keepdim=True)


def formula(image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None = None) -> Tensor:
    """The loss as it stands in the text."""
    logits = scale * (image @ text.mT)
    return -(shares(len(image), groups) * (logits.log_softmax(1) + logits.log_softmax(0).mT)).sum() / (2 * len(image))


# What is called


def chunked(subject: Subject, given: Pairs, chunk_size: int | None = None) -> Any:
    """chunked_contrastive_loss of pairs."""
    options: dict[str, Any] = {} if chunk_size is None else {"chunk_size": chunk_size}
    return _called(subject.chunked_contrastive_loss, given, options)


def plain(subject: Subject, given: Pairs) -> Any:
    """contrastive_loss of pairs."""
    return _called(subject.contrastive_loss, given, {})


def _called(loss: Callable[..., Any], given: Pairs, options: dict[str, Any]) -> Any:
    if given.groups is None:
        return loss(*given.tensors, **options)
    return loss(*given.tensors, given.groups, **options)


def slices(sizes: tuple[int, ...]) -> Iterator[slice]:
    """The rows of each rank."""
    first = 0
    for size in sizes:
        yield slice(first, first + size)
        first += size


def sharded(
    subject: Subject, given: Pairs, sizes: tuple[int, ...], each: Callable[[Any, Pairs, Rank], Any]
) -> list[Any]:
    """What `each` makes of the learner's function, a rank's own pairs and its communicator, by rank."""
    loss, parts = subject.sharded_contrastive_loss, [given.part(rows) for rows in slices(sizes)]
    return run_ranks(lambda comm: each(loss, parts[comm.rank], comm), len(sizes))


def nothing_left(inputs: list[weakref.ref[Tensor]], what: str) -> None:
    """Fails if a call that was refused has left one of its inputs alive."""
    if any(one() is not None for one in inputs):
        gc.collect()
    assert all(one() is None for one in inputs), (
        f"{what}: keeps an input of a call that failed; a call that failed leaves nothing behind"
    )


# What came, in words


def judged(
    close: Close,
    what: str,
    loss: Any,
    given: Pairs,
    explain: Callable[[Tensor], str] | None = None,
    tolerance: float | None = None,
    times: float = 1.0,
    again: bool = False,
) -> None:
    """Fails unless a loss of float64 leaves, and its gradients times the incoming one, are the formula's."""
    wanted, gradients = given.exact()
    tolerance = tolerance or (NEAR if given.groups is None else SHARES)
    with also(explain or known_loss, loss, *(() if explain else (given,))):
        close(loss, wanted, what, tolerance=tolerance)
    assert given.groups is None or given.groups._version == 0, f"{what}: writes to groups"
    leaves = {name: leaf for name, leaf in zip(NAMES, given.tensors, strict=True) if leaf.requires_grad}
    if not leaves:
        assert not loss.requires_grad, f"{what}: the loss carries a gradient, although no input asks for one"
        return
    assert loss.requires_grad, f"{what}: the loss carries no gradient; {', '.join(leaves)} ask for one"
    for factor in (times, -2 * times) if again else (times,):
        for leaf in leaves.values():
            leaf.grad = None
        loss.backward(torch.tensor(factor, dtype=loss.dtype), retain_graph=again)
        order = f"backward({factor:g})" if factor != 1 else "backward"
        for name, leaf in leaves.items():
            right = gradients[name] * factor
            with also(known_gradient, leaf.grad, right):
                close(leaf.grad, right, f"{what}, {order}: gradient of {name}", tolerance=tolerance)


def units(largest: float, dtype: torch.dtype) -> float:
    """Two units in the last place of a gradient's largest entry; of float32 and better, 1e-4 of 1 + that."""
    if dtype in (torch.float32, torch.float64):
        return 1e-4 * (1 + largest)
    last = 2.0 ** math.floor(math.log2(max(largest, 1e-6))) * torch.finfo(dtype).eps
    return max(2 * last, 1e-4)


def alike(came: Any, other: Tensor, tolerance: float = 1e-6) -> bool:
    """One result is as near to another as a right one has to be."""
    if not isinstance(came, Tensor) or came.shape != other.shape:
        return False
    return bool(torch.isclose(came.detach().double(), other.detach().double(), tolerance, tolerance).all())


def known_loss(came: Any, given: Pairs, chunk: int = 0) -> str:
    """Which slip gives just this loss, if a known one does."""
    image, text, scale = (tensor.detach().double() for tensor in given.tensors)
    n, groups = len(image), given.groups
    logits, weights = scale * image @ text.mT, shares(n, groups)
    match = (weights > 0).double()
    to_text, to_image = logits.log_softmax(1), logits.log_softmax(0).mT
    unit = [rows / rows.norm(dim=1, keepdim=True) for rows in (image, text)]
    right = formula(image, text, scale, groups)
    forms = {
        "0": right * 0,
        "what images that look for texts give alone; texts look for images too": -(weights * to_text).sum() / n,
        "what texts that look for images give alone; images look for texts too": -(weights * to_image).sum() / n,
        "half of one direction": -(weights * to_text).sum() / (2 * n),
        "the sum of both directions; half of it was wanted": 2 * right,
        "the sum over the pairs; their mean was wanted": n * right,
        "what comes for rows of length 1; the losses take rows as they come": formula(unit[0], unit[1], scale, groups),
        "what comes without the scale": formula(image, text, torch.ones_like(scale), groups),
        "what comes with logits divided by the scale": formula(image, text, 1 / scale, groups),
    }
    if groups is not None:
        chances = (logits.softmax(1) * match).sum(1).log() + (logits.softmax(0).mT * match).sum(1).log()
        forms |= {
            "what comes without groups": formula(image, text, scale),
            "the sum over the matches of a pair; their mean was wanted": -(match * (to_text + to_image)).sum() / 2 / n,
            "minus the log of the matches' summed probability; the mean of their logs was wanted": -chances.mean() / 2,
        }
    if chunk:
        forms |= _forms_of_chunks(logits, weights, chunk)
    found = [words for words, form in forms.items() if alike(came, form) and not alike(form, right)]
    return f"it is {chr(10).join(found[:3]).replace(chr(10), chr(10) + 'or ')}" if found else ""


def _forms_of_chunks(logits: Tensor, weights: Tensor, chunk: int) -> dict[str, Tensor]:
    n = len(logits)
    rows, columns, short, own, moved = torch.zeros(5, dtype=torch.float64)
    parts = range(0, n, chunk)
    for start in parts:
        part = slice(start, min(start + chunk, n))
        size = part.stop - start
        to_text, to_image = logits[part].log_softmax(1), logits[part].log_softmax(0)
        rows = rows - (weights[part] * to_text).sum() / n
        columns = columns - (weights[part] * to_image).sum() / n
        short = short - (weights[part] * to_text).sum() / size / len(parts)
        small = logits[part, part]
        own = own - (small.log_softmax(1).diagonal().sum() + small.log_softmax(0).diagonal().sum()) / (2 * n)
        moved = moved - to_text.diagonal().sum() / n
    to_image = -(weights * logits.log_softmax(0)).sum() / n
    return {
        "what comes where each column is normalised within its chunk; it has entries in all chunks": (rows + columns)
        / 2,
        "the mean of the chunks' means; the last chunk is shorter": (short + to_image) / 2,
        "what comes where a chunk sees its own pairs alone": own,
        "what comes with targets from 0 in every chunk": (moved + to_image) / 2,
    }


def known_gradient(came: Any, wanted: Tensor) -> str:
    """Which slip gives just this gradient, if a known one does."""
    if came is None:
        return "it gets no gradient: is something detached, or saved as a number?"
    came = is_tensor(came, "").detach().double()
    if came.shape != wanted.shape:
        return ""
    if not came.any():
        return "all of it is 0: is something detached?"
    share = float((came * wanted).sum() / wanted.square().sum())
    if alike(came, share * wanted):
        return f"it is {share:.4g} times the formula's"
    return ""
