"""Square tiles in place of rows, the logarithms kept as a maximum and a sum; the ranks send rows round one by one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, ids: Tensor, size: int) -> Tensor:
        n = len(image)
        lowest = torch.finfo(image.dtype).min
        tops = [image.new_full((n,), lowest) for _ in range(2)]
        sums = [image.new_zeros(n) for _ in range(2)]
        matched = image.new_zeros(())
        counts = torch.zeros(n, dtype=image.dtype, device=image.device)
        starts = range(0, n, size)
        for a in starts:
            for b in starts:
                counts[a : a + size] += (ids[a : a + size, None] == ids[b : b + size]).sum(1)
        for a in starts:
            for b in starts:
                i, j = slice(a, a + size), slice(b, b + size)
                logits = scale * image[i] @ text[j].mT
                matched += ((ids[i, None] == ids[j]) * logits / counts[i, None]).sum()
                for which, (part, dim) in enumerate(((i, 1), (j, 0))):
                    top = torch.maximum(tops[which][part], logits.amax(dim))
                    sums[which][part] *= (tops[which][part] - top).exp()
                    sums[which][part] += (logits - top.unsqueeze(dim)).exp().sum(dim)
                    tops[which][part] = top
        ends = [top + total.log() for top, total in zip(tops, sums, strict=True)]
        ctx.save_for_backward(image, text, scale, ids, counts, *ends)
        ctx.size = size
        return (ends[0].sum() + ends[1].sum() - 2 * matched) / (2 * n)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, ids, counts, rows, columns = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grads = [torch.zeros_like(tensor) for tensor in (image, text, scale)]
        n, size = len(image), ctx.size
        for a in range(0, n, size):
            for b in range(0, n, size):
                i, j = slice(a, a + size), slice(b, b + size)
                products = image[i] @ text[j].mT
                logits = products * scale
                shares = (ids[i, None] == ids[j]) / counts[i, None]
                errors = (logits - rows[i, None]).exp() + (logits - columns[j]).exp() - 2 * shares
                errors = errors * (grad / (2 * n))
                if needed[0]:
                    grads[0][i] += scale * errors @ text[j]
                if needed[1]:
                    grads[1][j] += scale * errors.mT @ image[i]
                if needed[2]:
                    grads[2] += (errors * products).sum()
        return (*(one if need else None for one, need in zip(grads, needed, strict=False)), None, None)


def chunked_contrastive_loss(
    image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None = None, chunk_size: int = 256
) -> Tensor:
    """In tiles."""
    if image.shape != text.shape:
        raise ValueError(f"image {tuple(image.shape)} and text {tuple(text.shape)}")
    with torch.autocast(image.device.type, enabled=False):
        ids = torch.arange(len(image), device=image.device) if groups is None else groups
        return _Tiles.apply(*_wide(image, text, scale), ids, chunk_size)


class _FromRank(torch.autograd.Function):
    """The rows of one rank, which get there what all ranks give back."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, theirs: Tensor, rank: int, comm: "Communicator") -> Tensor:
        ctx.rank, ctx.comm, ctx.shape = rank, comm, own.shape
        return theirs.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        total = ctx.comm.all_reduce(grad)
        return total if ctx.rank == ctx.comm.rank else total.new_zeros(ctx.shape), None, None, None


def sharded_contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, comm: "Communicator") -> Tensor:
    """Over ranks."""
    with torch.autocast(image.device.type, enabled=False):
        image, text, scale = _wide(image, text, scale)
        both = []
        for rows in (image, text):
            parts = comm.all_gather(rows.detach())
            both.append([_FromRank.apply(rows, part, rank, comm) for rank, part in enumerate(parts)])
        n = sum(len(part) for part in both[0])
        before = sum(len(part) for part in both[0][: comm.rank])
        labels = before + torch.arange(len(image), device=image.device)
        there = torch.cat([scale * image @ part.T for part in both[1]], 1)
        back = torch.cat([scale * text @ part.T for part in both[0]], 1)
        loss = F.cross_entropy(there, labels) + F.cross_entropy(back, labels)
        return loss * len(image) * comm.world_size / n / 2


def recall_at_k(
    similarity: Tensor, positives: Tensor | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """By sorting, with the negatives first among equals."""
    n, m = similarity.shape
    right = torch.eye(n, m).bool() if positives is None else positives.bool()
    order = torch.argsort(right.int(), dim=1, stable=True)
    sorted_right, scores = right.gather(1, order), similarity.gather(1, order)
    places = torch.argsort(scores, dim=1, descending=True, stable=True)
    hits = sorted_right.gather(1, places)
    first = torch.where(hits.any(1), hits.int().argmax(1) + 1, m + max(ks) + 1)
    first = torch.where(similarity.isnan().any(1), m + max(ks) + 1, first)
    return {int(k): (first <= k).double().mean().item() for k in ks}
