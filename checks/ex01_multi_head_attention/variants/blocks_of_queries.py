"""512 queries after the other, each block with its rows of the mask; head_dim is a buffer that the state_dict holds."""

import torch
from torch import Tensor, nn


class MultiHeadAttention(nn.Module):
    """Multi-head attention by blocks of queries."""

    head_dim: Tensor

    def __init__(self, d_model: int, num_heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        if d_model // num_heads * num_heads != d_model:
            raise ValueError(f"{num_heads} heads do not divide {d_model} features")
        self.num_heads = num_heads
        self.register_buffer("head_dim", torch.tensor(d_model // num_heads))
        self.q_linear = nn.Linear(d_model, d_model)
        self.k_linear = nn.Linear(d_model, d_model)
        self.v_linear = nn.Linear(d_model, d_model)
        self.output_linear = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attends block by block."""
        shape = (len(query), self.num_heads, query.size(1), key.size(1))
        if mask is not None and not (mask.dim() == 4 and all(a in (1, b) for a, b in zip(mask.shape, shape))):  # noqa: B905
            raise ValueError(f"a mask of shape {list(mask.shape)} for scores of shape {list(shape)}")
        k, v = self._heads(self.k_linear(key)), self._heads(self.v_linear(value))
        blocks = []
        for start in range(0, query.size(1), 512):
            some = slice(start, start + 512)
            rows = mask if mask is None or mask.size(2) == 1 else mask[:, :, some]
            blocks.append(self._block(query[:, some], k, v, rows))
        if len(blocks) == 1:
            return blocks[0]
        outputs, weights = zip(*blocks, strict=True)
        return torch.cat(outputs, dim=1), torch.cat(weights, dim=2)

    def _block(self, query: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output and weights of some queries."""
        scores = self.compute_attention_scores(self._heads(self.q_linear(query)), k)
        if mask is None:
            weights = self.dropout(scores.softmax(-1))
        else:
            weights = self.dropout(self.apply_mask(scores, mask).softmax(-1).masked_fill(mask == 0, 0.0))
        return self.output_linear((weights @ v).transpose(1, 2).reshape(query.shape)), weights

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def compute_attention_scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Half of the factor on either side."""
        factor = self.head_dim.double() ** -0.25
        return q * factor @ (k * factor).mT

    def apply_mask(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Writes to the scores."""
        return scores.masked_fill_(mask == 0, torch.finfo(scores.dtype).min)
