"""The softmax written out, in float32 at least, on scores that are masked in place."""

import math

import torch
from torch import Tensor, nn


class MultiHeadAttention(nn.Module):
    """Multi-head attention with a softmax of its own."""

    def __init__(self, d_model: int, num_heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        if d_model % num_heads != 0:
            raise ValueError(f"d_model ({d_model}) must be divisible by num_heads ({num_heads})")
        self.num_heads, self.head_dim = num_heads, d_model // num_heads
        self.q_linear = nn.Linear(d_model, d_model)
        self.k_linear = nn.Linear(d_model, d_model)
        self.v_linear = nn.Linear(d_model, d_model)
        self.output_linear = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attends."""
        batch, queries, _ = query.shape
        wanted = [batch, self.num_heads, queries, key.size(1)]
        if mask is not None:
            ok = mask.dim() == 4
            for i in range(4 if ok else 0):
                ok = ok and mask.size(i) in {1, wanted[i]}
            if not ok:
                raise ValueError("mask " + str(list(mask.shape)) + " does not fit " + str(wanted))
        q, k, v = (
            linear(x).view(batch, -1, self.num_heads, self.head_dim).permute(0, 2, 1, 3)
            for linear, x in ((self.q_linear, query), (self.k_linear, key), (self.v_linear, value))
        )
        scores = self.compute_attention_scores(q, k)
        if mask is not None:
            scores = self.apply_mask(scores, mask)
        wide = torch.promote_types(scores.dtype, torch.float32)
        top = scores.detach().amax(dim=-1, keepdim=True).to(wide)
        top = torch.where(top == -math.inf, torch.zeros_like(top), top)
        powers = (scores.to(wide) - top).exp()
        total = powers.sum(-1, keepdim=True)
        weights = powers / total.masked_fill(total == 0, 1)
        weights = self.dropout(weights.to(q.dtype))
        output = torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous().view(batch, queries, -1)
        return self.output_linear(output), weights

    def compute_attention_scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled scores."""
        return torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))

    def apply_mask(self, scores: Tensor, mask: Tensor) -> Tensor:
        """In place: the scores are this module's own."""
        return scores.masked_fill_(mask == 0, -math.inf)
