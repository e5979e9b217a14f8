"""One matrix product for query, key and value where all three are one tensor, from the three layers' weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MultiHeadAttention(nn.Module):
    """Multi-head attention with a joint projection in self-attention."""

    def __init__(self, d_model: int, num_heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        quotient, remainder = divmod(d_model, num_heads)
        if remainder:
            raise ValueError(f"cannot split d_model={d_model} into num_heads={num_heads}")
        self.num_heads, self.d_k = num_heads, quotient
        self.q_linear = nn.Linear(d_model, d_model)
        self.k_linear = nn.Linear(d_model, d_model)
        self.v_linear = nn.Linear(d_model, d_model)
        self.output_linear = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Three tensors [B, H, L, Dh]."""
        layers = (self.q_linear, self.k_linear, self.v_linear)
        if query is key and key is value:
            weight = torch.cat([layer.weight for layer in layers])
            bias = torch.cat([layer.bias for layer in layers])
            projected = F.linear(query, weight, bias).chunk(3, dim=-1)
        else:
            projected = tuple(layer(x) for layer, x in zip(layers, (query, key, value), strict=True))
        return [x.view(x.size(0), x.size(1), self.num_heads, self.d_k).permute(0, 2, 1, 3) for x in projected]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Softmax in float32 at least; forbidden weights are zeroed and rows normalised by what is allowed."""
        q, k, v = self._project(query, key, value)
        scores = self.compute_attention_scores(q, k)
        if mask is not None:
            try:
                fits = mask.dim() == 4 and torch.broadcast_shapes(mask.shape, scores.shape) == scores.shape
            except RuntimeError:
                fits = False
            if not fits:
                raise ValueError(f"mask of shape {tuple(mask.shape)}, scores of shape {tuple(scores.shape)}")
            scores = self.apply_mask(scores, mask)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = torch.softmax(scores, dim=-1, dtype=wide).to(scores.dtype)
        if mask is not None:
            weights = torch.where(mask.bool(), weights, torch.zeros_like(weights))
        weights = self.dropout(weights)
        context = torch.matmul(weights, v).permute(0, 2, 1, 3)
        return self.output_linear(context.reshape(context.size(0), context.size(1), -1)), weights

    def compute_attention_scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Scales the queries first."""
        return q.mul(self.d_k**-0.5) @ k.mT

    def apply_mask(self, scores: Tensor, mask: Tensor) -> Tensor:
        """The least number of the dtype where forbidden."""
        return torch.where(mask.bool(), scores, torch.finfo(scores.dtype).min)
