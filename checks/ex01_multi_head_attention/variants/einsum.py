"""einsum all the way; forbidden scores are -inf, and NaN rows become zeros."""

import torch
from torch import Tensor, nn


class MultiHeadAttention(nn.Module):
    """Multi-head attention by einsum."""

    def __init__(self, d_model: int, num_heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"{d_model=} is not divisible by {num_heads=}")
        self.h = num_heads
        self.q_linear = nn.Linear(d_model, d_model)
        self.k_linear = nn.Linear(d_model, d_model)
        self.v_linear = nn.Linear(d_model, d_model)
        self.output_linear = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attends."""
        b, lq, d = query.shape
        lk, h = key.shape[1], self.h
        if mask is not None and (mask.ndim != 4 or any(m not in (1, s) for m, s in zip(mask.shape, (b, h, lq, lk)))):  # noqa: B905
            raise ValueError(f"mask has shape {mask.shape}, wanted one that broadcasts to {torch.Size((b, h, lq, lk))}")
        q = torch.einsum("bld,hed->bhle", query, self.q_linear.weight.view(h, -1, d)) + self.q_linear.bias.view(
            h, 1, -1
        )
        k = torch.einsum("bld,hed->bhle", key, self.k_linear.weight.view(h, -1, d)) + self.k_linear.bias.view(h, 1, -1)
        v = torch.einsum("bld,hed->bhle", value, self.v_linear.weight.view(h, -1, d)) + self.v_linear.bias.view(
            h, 1, -1
        )
        scores = self.compute_attention_scores(q, k)
        if mask is not None:
            scores = self.apply_mask(scores, mask)
            nothing = ~mask.bool().any(-1, keepdim=True)
            scores = scores.masked_fill(nothing, 0.0)
            weights = torch.softmax(scores, -1).masked_fill(nothing, 0.0)
        else:
            weights = torch.softmax(scores, -1)
        weights = self.dropout(weights)
        context = torch.einsum("bhqk,bhke->bhqe", weights, v)
        output = torch.einsum("bhqe,dhe->bqd", context, self.output_linear.weight.view(d, h, -1))
        return output + self.output_linear.bias, weights

    def compute_attention_scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled scores."""
        return torch.einsum("bhqe,bhke->bhqk", q / q.shape[-1] ** 0.5, k)

    def apply_mask(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Forbidden scores are -inf."""
        return scores.masked_fill(mask.bool().logical_not(), -torch.inf)
