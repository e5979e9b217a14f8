"""One head after another; forbidden scores are -inf by masked_fill, and what is NaN then becomes zero."""

import math

import torch
from torch import Tensor, nn


class MultiHeadAttention(nn.Module):
    """Multi-head attention as a loop over heads."""

    def __init__(self, d_model: int, num_heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        if d_model % num_heads != 0:
            raise ValueError(f"d_model {d_model} must be a multiple of num_heads {num_heads}")
        self.d_model, self.num_heads, self.width = d_model, num_heads, d_model // num_heads
        self.q_linear = nn.Linear(d_model, d_model)
        self.k_linear = nn.Linear(d_model, d_model)
        self.v_linear = nn.Linear(d_model, d_model)
        self.output_linear = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Splits along the features, attends per head, concatenates."""
        batch, n, m = query.shape[0], query.shape[1], key.shape[1]
        if mask is not None:
            wanted = (batch, self.num_heads, n, m)
            if mask.dim() != 4 or any(a not in (1, b) for a, b in zip(mask.shape, wanted, strict=True)):
                raise ValueError(f"mask {tuple(mask.shape)} does not fit scores {wanted}")
        outputs, weights = [], []
        heads = zip(
            self.q_linear(query).split(self.width, dim=-1),
            self.k_linear(key).split(self.width, dim=-1),
            self.v_linear(value).split(self.width, dim=-1),
            strict=True,
        )
        for number, (q, k, v) in enumerate(heads):
            scores = self.compute_attention_scores(q.unsqueeze(1), k.unsqueeze(1))  # [B, 1, Lq, Lk]
            if mask is not None:
                own = mask if mask.size(1) == 1 else mask[:, number : number + 1]
                scores = self.apply_mask(scores, own)
            probability = torch.nan_to_num(torch.softmax(scores, dim=-1))
            probability = self.dropout(probability)
            weights.append(probability)
            outputs.append(probability.squeeze(1).bmm(v))
        return self.output_linear(torch.cat(outputs, dim=-1)), torch.cat(weights, dim=1)

    def compute_attention_scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Divides before the product, which keeps half precision finite."""
        return torch.matmul(q / math.sqrt(q.size(-1)), k.transpose(-2, -1))

    def apply_mask(self, scores: Tensor, mask: Tensor) -> Tensor:
        """-inf where the mask is 0."""
        return scores.masked_fill(mask == 0, float("-inf"))
