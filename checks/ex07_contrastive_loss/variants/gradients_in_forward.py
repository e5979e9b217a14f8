"""Gradients of the chunks are worked out in the forward pass already, and a Function bounds the scale."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Bounded(torch.autograd.Function):
    """exp of a logarithm, at most a bound; the gradient is that of the exp of the bound beyond it."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, bound: float) -> Tensor:
        scale = raw.clamp(max=math.log(bound)).exp()
        ctx.save_for_backward(scale)
        return scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


class ContrastiveHead(nn.Module):
    """Leaves logit_scale as it is, whatever it is."""

    def __init__(
        self, image_dim: int, text_dim: int, embed_dim: int, *, temperature: float = 0.07, max_scale: float = 100.0
    ) -> None:
        super().__init__()
        self.max_scale = max_scale
        self.logit_scale = nn.Parameter(torch.ones([]) * math.log(1 / temperature))
        self.text_proj = nn.Linear(text_dim, embed_dim, False)
        self.image_proj = nn.Linear(image_dim, embed_dim, False)

    def forward(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and scale."""
        rows = []
        for layer, x in ((self.image_proj, image_features), (self.text_proj, text_features)):
            y = layer(x)
            y = y if y.dtype == torch.float64 else y.float()
            rows.append(y / torch.linalg.vector_norm(y, dim=1, keepdim=True).clamp(min=1e-30))
        raw = self.logit_scale if self.logit_scale.dtype == torch.float64 else self.logit_scale.float()
        return rows[0], rows[1], _Bounded.apply(raw, self.max_scale)


class _InForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, chunk_size: int) -> Tensor:
        n = image.size(0)
        rows, columns = [], image.new_full([n], -torch.inf)
        for some in image.split(chunk_size):
            logits = some @ text.T * scale
            rows.append(logits.logsumexp(1))
            columns = torch.stack([columns, logits.logsumexp(0)]).logsumexp(0)
        value = torch.cat(rows).sum() + columns.sum()
        if any(ctx.needs_input_grad):
            grad_image, grad_text = [], torch.zeros_like(text)
            for some, row in zip(image.split(chunk_size), rows, strict=True):
                logits = some @ text.T * scale
                chances = (logits - row[:, None]).exp() + (logits - columns).exp()
                grad_image.append(chances @ text)
                grad_text.addmm_(chances.T, some)
            whole = torch.cat(grad_image)
            ctx.save_for_backward(whole * scale, grad_text * scale, (whole * image).sum())
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        of_image, of_text, of_scale = ctx.saved_tensors
        return grad * of_image, grad * of_text, grad * of_scale, None


def chunked_contrastive_loss(
    image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None = None, chunk_size: int = 256
) -> Tensor:
    """In chunks."""
    if image.shape != text.shape:
        raise ValueError(f"{list(image.shape)} and {list(text.shape)} differ")
    with torch.autocast(image.device.type, enabled=False):
        image, text, scale = _wide(image, text, scale)
        normalizers = _InForward.apply(image, text, scale, chunk_size)
        return normalizers / image.size(0) / 2 - _matches(image, text, scale, groups)


def recall_at_k(
    similarity: Tensor, positives: Tensor | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """Query by query."""
    ranks = []
    for i, scores in enumerate(similarity.detach()):
        right = torch.arange(len(scores)) == i if positives is None else positives[i].bool()
        lost = scores.isnan().any() or not right.any()
        ranks.append(math.inf if lost else 1 + int((scores[~right] >= scores[right].max()).sum()))
    return {k: sum(rank <= k for rank in ranks) / len(ranks) for k in ks}
