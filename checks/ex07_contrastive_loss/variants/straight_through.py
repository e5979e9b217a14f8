"""A straight-through bound; the chunks' two directions are one function, called twice."""

import math
from typing import Any

import torch
from torch import Tensor, nn


class ContrastiveHead(nn.Module):
    """The bounded logarithm has the value of the clamp and the gradient of the parameter."""

    def __init__(
        self, image_dim: int, text_dim: int, embed_dim: int, *, temperature: float = 0.07, max_scale: float = 100.0
    ) -> None:
        super().__init__()
        self.image_proj = nn.Linear(image_dim, embed_dim, bias=False)
        self.text_proj = nn.Linear(text_dim, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / temperature).log())
        self.largest = math.log(max_scale)

    def forward(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and scale."""
        with torch.autocast(image_features.device.type, enabled=False):
            image, to_image, text, to_text, raw = _wide(
                image_features, self.image_proj.weight, text_features, self.text_proj.weight, self.logit_scale
            )
            over = (raw.detach() - self.largest).clamp(min=0)
            return _unit(image @ to_image.T), _unit(text @ to_text.T), (raw - over).exp()


class _OneWay(torch.autograd.Function):
    """The mean of the cross entropies of rows over columns; the targets are shares, made chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, ids: Tensor, size: int) -> Tensor:
        total, sums = rows.new_zeros(()), []
        for some, own in zip(rows.split(size), ids.split(size), strict=True):
            logits = scale * some @ columns.T
            match = own[:, None] == ids
            sums.append(logits.logsumexp(1))
            total += (sums[-1] - (logits * match).sum(1) / match.sum(1)).sum()
        ctx.save_for_backward(rows, columns, scale, ids, torch.cat(sums))
        ctx.size = size
        return total / len(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        rows, columns, scale, ids, sums = ctx.saved_tensors
        of_rows, of_columns, of_scale = [], torch.zeros_like(columns), torch.zeros_like(scale)
        for some, own, known in zip(rows.split(ctx.size), ids.split(ctx.size), sums.split(ctx.size), strict=True):
            products = some @ columns.T
            match = own[:, None] == ids
            errors = (scale * products - known[:, None]).exp() - match / match.sum(1, keepdim=True)
            of_rows.append(errors @ columns)
            of_columns += errors.T @ some
            of_scale += (errors * products).sum()
        factor = grad / len(rows)
        return factor * scale * torch.cat(of_rows), factor * scale * of_columns, factor * of_scale, None, None


def chunked_contrastive_loss(
    image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None = None, chunk_size: int = 256
) -> Tensor:
    """In chunks of rows, then in chunks of columns."""
    if image.shape != text.shape:
        raise ValueError(f"{tuple(image.shape)} is not {tuple(text.shape)}")
    with torch.autocast(image.device.type, enabled=False):
        image, text, scale = _wide(image, text, scale)
        ids = torch.arange(len(image), device=image.device) if groups is None else groups
        there = _OneWay.apply(image, text, scale, ids, chunk_size)
        return (there + _OneWay.apply(text, image, scale, ids, chunk_size)) / 2
