"""The answer to ex07, Contrastive loss (CLIP)."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ContrastiveHead(nn.Module):
    """Projects image and text features into one space, and learns how sharply to compare there.

    Args:
        image_dim: number of image features.
        text_dim: number of text features.
        embed_dim: number of features E of both in the common space.
        temperature: 1 / the scale at the start.
        max_scale: the largest scale.

    Attributes:
        image_proj, text_proj: nn.Linear without bias.
        logit_scale: nn.Parameter of shape [], the logarithm of the scale before it is bounded.
    """

    def __init__(
        self, image_dim: int, text_dim: int, embed_dim: int, *, temperature: float = 0.07, max_scale: float = 100.0
    ) -> None:
        super().__init__()
        self.image_proj = nn.Linear(image_dim, embed_dim, bias=False)
        self.text_proj = nn.Linear(text_dim, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.max_scale = max_scale

    def forward(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeds the features of N pairs.

        Args:
            image_features: [N, image_dim].
            text_features: [N, text_dim].

        Returns:
            The unit rows of the images [N, E] and of the texts [N, E], and the scale [].
        """
        # Written back, lest a clamped parameter get no gradient.
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(self.max_scale))
        image, text = self.image_proj(image_features), self.text_proj(text_features)  # [N, E]
        (scale,) = _wide(self.logit_scale)
        return _unit(image), _unit(text), scale.exp()


def _wide(*tensors: Tensor) -> list[Tensor]:
    """Tensors in their common dtype, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def _unit(rows: Tensor) -> Tensor:
    (rows,) = _wide(rows)
    return F.normalize(rows, dim=-1)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None = None) -> Tensor:
    """The mean loss of finding each image's texts and each text's images among N.

    Args:
        image: [N, E].
        text: [N, E].
        scale: [], what the products of rows are multiplied with.
        groups: int64 [N], an id for each pair; pairs with the same id match each other. None: each matches itself.

    Returns:
        [].

    Raises:
        ValueError: image and text have different shapes; the message names both.
    """
    _check_shapes(image, text)
    with torch.autocast(image.device.type, enabled=False):
        image, text, scale = _wide(image, text, scale)
        logits = scale * image @ text.mT  # [N, N]
        normalizers = logits.logsumexp(0) + logits.logsumexp(1)  # [N]
        return normalizers.mean() / 2 - _matches(image, text, scale, groups)


def _check_shapes(image: Tensor, text: Tensor) -> None:
    if image.shape != text.shape:
        raise ValueError(f"image is {tuple(image.shape)}, text is {tuple(text.shape)}; they must be alike")


def _matches(image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None) -> Tensor:
    """The mean logit of an image and its matching texts: that of the image and their mean, so that no pairs are made.

    From image to text and from text to image it is the same, because all of a group have equally many matches.
    """
    if groups is not None:
        _, places, counts = groups.unique(return_inverse=True, return_counts=True)
        sums = text.new_zeros(len(counts), text.size(1)).index_add(0, places, text)
        text = (sums / counts[:, None])[places]  # [N, E]
    return scale * (image * text).sum() / len(image)


def chunked_contrastive_loss(
    image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None = None, chunk_size: int = 256
) -> Tensor:
    """contrastive_loss in O(N) memory, in forward and in backward.

    Args:
        image: [N, E].
        text: [N, E].
        scale: [].
        groups: int64 [N], as in contrastive_loss.
        chunk_size: how many rows of logits may be held at once; it may exceed N.

    Returns:
        [].

    Raises:
        ValueError: image and text have different shapes; the message names both.
    """
    _check_shapes(image, text)
    with torch.autocast(image.device.type, enabled=False):
        image, text, scale = _wide(image, text, scale)
        normalizers = _Normalizers.apply(image, text, scale, chunk_size)
        return normalizers / (2 * len(image)) - _matches(image, text, scale, groups)


class _Normalizers(torch.autograd.Function):
    """The sum of the logsumexps of all rows and all columns of the logits."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, chunk_size: int) -> Tensor:
        rows = image.new_empty(len(image))  # [N]
        columns = image.new_full((len(image),), -math.inf)  # [N]
        for chunk in _chunks(len(image), chunk_size):
            logits = scale * image[chunk] @ text.mT  # [chunk, N]
            rows[chunk] = logits.logsumexp(1)
            columns = torch.logaddexp(columns, logits.logsumexp(0))
        ctx.save_for_backward(image, text, scale, rows, columns)
        ctx.chunk_size = chunk_size
        return rows.sum() + columns.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        image, text, scale, rows, columns = ctx.saved_tensors
        to_image, to_text = torch.empty_like(image), torch.zeros_like(text)  # [N, E]
        for chunk in _chunks(len(image), ctx.chunk_size):
            logits = scale * image[chunk] @ text.mT  # [chunk, N]
            weights = (logits - rows[chunk, None]).exp_() + logits.sub_(columns).exp_()  # [chunk, N]
            to_image[chunk] = weights @ text
            to_text += weights.mT @ image[chunk]
        return grad * scale * to_image, grad * scale * to_text, grad * (image * to_image).sum(), None


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def sharded_contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, comm: "Communicator") -> Tensor:
    """contrastive_loss of the pairs of all ranks, of which this rank holds n.

    Args:
        image: [n, E], this rank's.
        text: [n, E], this rank's.
        scale: [], the same on all ranks.
        comm: what this rank reaches the others by.

    Returns:
        [], whose mean over the ranks is the loss, and the mean of whose gradients is the loss's.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text, scale = _wide(image, text, scale)
        counts = [int(count) for count in comm.all_gather(torch.tensor(len(image)))]
        first = sum(counts[: comm.rank])
        images, texts = (_Gather.apply(rows, comm, first) for rows in (image, text))  # [N, E]
        own = torch.arange(first, first + len(image), device=image.device)  # [n]
        loss = F.cross_entropy(scale * image @ texts.mT, own, reduction="sum")
        loss = loss + F.cross_entropy(scale * text @ images.mT, own, reduction="sum")
        return loss / (2 * sum(counts)) * comm.world_size


class _Gather(torch.autograd.Function):
    """The rows of all ranks. Each rank's loss depends on them, so that backward adds up what all ranks give back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, comm: "Communicator", first: int) -> Tensor:
        ctx.comm, ctx.own = comm, slice(first, first + len(rows))
        return torch.cat(comm.all_gather(rows))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.comm.all_reduce(grad)[ctx.own], None, None


@torch.no_grad()
def zero_shot_weights(
    encode_text: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """A unit row for each class, from several prompts: a classifier without training.

    Args:
        encode_text: gives each of n texts a row of any length, [n, E].
        class_names: the C names.
        templates: prompts with a place for a name, such as "a photo of a {}."; each is filled by template.format(name).

    Returns:
        [C, E], without gradient: the mean of a class's unit rows, of length 1 again.
    """
    prompts = [[template.format(name) for template in templates] for name in class_names]
    return torch.stack([_unit(_unit(encode_text(texts)).mean(0)) for texts in prompts])


def recall_at_k(
    similarity: Tensor, positives: Tensor | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """The share of the queries that have a positive among their k best candidates.

    Args:
        similarity: [N queries, M candidates].
        positives: bool or 0/1 [N, M]; None: the diagonal.
        ks: the numbers k, at least 1.

    Returns:
        The share for each k.
    """
    hit = torch.eye(*similarity.shape, device=similarity.device) != 0 if positives is None else positives != 0
    best = similarity.masked_fill(~hit, -math.inf).amax(1, keepdim=True)  # [N, 1]
    ranks = 1 + ((similarity >= best) & ~hit).sum(1)  # [N]
    found = hit.any(1) & ~similarity.isnan().any(1)  # [N]
    return {k: int((found & (ranks <= k)).sum()) / len(similarity) for k in ks}


def test_contrastive() -> None:
    """Your own test of this file: passes on right code, fails on each slip listed above."""
    torch.manual_seed(0)
    head = ContrastiveHead(4, 3, 2, temperature=0.5, max_scale=100.0)
    with torch.no_grad():
        head.logit_scale.fill_(6.0)
    rows, _, scale = head(torch.randn(5, 4), torch.randn(5, 3))
    scale.backward()
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
    assert scale < 100.1, f"the scale is {scale}, beyond its bound"
    assert head.logit_scale.grad is not None and head.logit_scale.grad > 0, "the bound sticks"

    image, text = torch.randn(2, 5, 3, dtype=torch.float64)
    scale = torch.tensor(2.0, dtype=torch.float64)
    groups = torch.tensor([7, 1, 7, 0, 1])
    for ids in (None, groups):
        expected = _step(_formula, image, text, scale, ids)
        torch.testing.assert_close(_step(contrastive_loss, image, text, scale, ids), expected)
        torch.testing.assert_close(_step(chunked_contrastive_loss, image, text, scale, ids, 2), expected)

    parts = [slice(0, 2), slice(2, 5)]  # of two ranks

    def rank(comm: Communicator) -> list[Tensor]:
        own = parts[comm.rank]
        return _step(sharded_contrastive_loss, image[own], text[own], scale, comm)

    losses, images, texts, scales = zip(*run_ranks(rank, 2), strict=True)
    means = [torch.stack(losses).mean(), torch.cat(images) / 2, torch.cat(texts) / 2, torch.stack(scales).mean()]
    torch.testing.assert_close(means, _step(_formula, image, text, scale))

    prompts = {"a": [3.0, 0.0], "a.": [0.0, 4.0]}
    weights = zero_shot_weights(lambda texts: torch.tensor([prompts[text] for text in texts]), ["a"], ["{}", "{}."])
    torch.testing.assert_close(weights, torch.full((1, 2), 0.5**0.5))
    assert recall_at_k(torch.tensor([[0.9, 0.9, 0.1], [0.2, 0.5, 0.1]]), ks=(1, 2)) == {1: 0.5, 2: 1.0}


def _formula(image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None = None) -> Tensor:
    logits = scale * image @ text.mT  # [N, N]
    match = torch.eye(len(image)) if groups is None else (groups[:, None] == groups).float()
    weights = match / match.sum(1)  # [N, N]
    return -(weights * (logits.log_softmax(0) + logits.log_softmax(1))).sum() / (2 * len(image))


def _step(loss: Callable[..., Tensor], image: Tensor, text: Tensor, scale: Tensor, *more: Any) -> list[Tensor]:
    """A loss and the gradients of its three tensors."""
    leaves = [tensor.clone().requires_grad_() for tensor in (image, text, scale)]
    value = loss(*leaves, *more)
    value.backward()
    return [value.detach(), *(torch.zeros(()) if leaf.grad is None else leaf.grad for leaf in leaves)]


# Given; no need to change.
class Communicator:
    """One rank of a process group whose ranks are threads. As in torch.distributed, all ranks make the same calls in
    the same order; what comes back is new and carries no gradient, this rank's own part included.

    Attributes:
        rank: 0 … world_size - 1.
        world_size: how many ranks there are.
    """

    def __init__(self, rank: int, world_size: int, meeting: "_Meeting") -> None:
        self.rank = rank
        self.world_size = world_size
        self._meeting = meeting

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, in the order of the ranks; their first sizes may differ."""
        call = f"all_gather of {tensor.dtype} [n, {', '.join(map(str, tensor.shape[1:]))}]"
        return [part.clone() for part in self._meeting.exchange(self.rank, call, tensor)]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all ranks."""
        first, *others = self._meeting.exchange(self.rank, f"all_reduce of {tensor.dtype} {[*tensor.shape]}", tensor)
        return sum(others, first.clone())


class _Meeting:
    """Where the ranks meet: a call is done once all ranks have made it, and fails once one of them cannot."""

    def __init__(self, world_size: int) -> None:
        self.calls: dict[int, dict[int, tuple[str, Tensor]]] = {}  # number of a call -> rank -> what it brings
        self.made = [0] * world_size
        self.gone: set[int] = set()
        self.changed = threading.Condition()

    def exchange(self, rank: int, call: str, tensor: Tensor) -> list[Tensor]:
        """What all ranks bring to this rank's next call."""
        with self.changed:
            number = self.made[rank]
            brought = self.calls.setdefault(number, {})
            self.made[rank] += 1
            brought[rank] = call, tensor.detach().clone()
            self.changed.notify_all()
            self.changed.wait_for(lambda: len(brought) == len(self.made) or self.gone - brought.keys())
            self.calls.pop(number, None)
            if missing := self.gone - brought.keys():
                raise RuntimeError(f"rank {rank} waits in {call}; rank {min(missing)} has ended without that call")
            calls = [brought[other][0] for other in sorted(brought)]
            if len(set(calls)) > 1:
                raise RuntimeError(f"the calls of ranks 0, 1, … differ: {calls}")
            return [brought[other][1] for other in sorted(brought)]

    def leave(self, rank: int) -> None:
        """No call of this rank comes any more."""
        with self.changed:
            self.gone.add(rank)
            self.changed.notify_all()


# Given; no need to change.
def run_ranks(function: Callable[[Communicator], Any], world_size: int) -> list[Any]:
    """Calls function(comm) once per rank, each in a thread of its own; what the calls returned, by rank.

    The first error of a rank is raised here, once all have ended.
    """
    meeting, results, errors = _Meeting(world_size), [None] * world_size, []

    def run(rank: int) -> None:
        try:
            results[rank] = function(Communicator(rank, world_size, meeting))
        except BaseException as error:
            errors.append(error)
        finally:
            meeting.leave(rank)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
