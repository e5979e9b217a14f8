"""A float64 table that grows by exactly the rows that it lacks, and rounds to float32 when it meets x."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RotaryPositionEmbedding(nn.Module):
    def __init__(self, dim: int, max_position_embeddings: int = 2048, base: float = 10000) -> None:
        super().__init__()
        if dim & 1:
            raise ValueError(f"dim={dim} cannot be split into pairs")
        self.dim = dim
        self.log_base = math.log(base)
        self.expected = max_position_embeddings
        self.tables: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def _rows(self, first: int, last: int, device: torch.device) -> tuple[Tensor, Tensor]:
        exponent = torch.arange(self.dim // 2, dtype=torch.float64, device=device) * (-2.0 / self.dim)
        angles = torch.arange(first, last, dtype=torch.float64, device=device).outer((exponent * self.log_base).exp())
        return angles.cos(), angles.sin()

    def forward(self, x: Tensor, seq_len: int | None = None) -> Tensor:
        length = x.size(2)
        last = length if seq_len is None else seq_len
        if last < length:
            raise ValueError(f"seq_len {last} for {length} rows")
        with torch.inference_mode(False):
            cos, sin = self.tables.get(str(x.device)) or self._rows(0, 1, x.device)
            if len(cos) < last:
                more_cos, more_sin = self._rows(len(cos), last, x.device)
                cos, sin = torch.cat((cos, more_cos)), torch.cat((sin, more_sin))
            self.tables[str(x.device)] = cos, sin
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = (table[last - length : last].to(dtype) for table in (cos, sin))
        return self.apply_rotary_pos_emb(x, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))

    def rotate_half(self, x: Tensor) -> Tensor:
        signs = torch.ones(self.dim, dtype=x.dtype, device=x.device)
        signs[: self.dim // 2] = -1
        return x.roll(self.dim // 2, dims=-1) * signs

    def apply_rotary_pos_emb(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.dim // 2
        out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype), device=x.device)
        out[..., :h] = x[..., :h] * cos[..., :h] - x[..., h:] * sin[..., :h]
        out[..., h:] = x[..., :h] * sin[..., h:] + x[..., h:] * cos[..., h:]
        return out.type_as(x)


class MultiHeadAttentionWithRoPE(nn.Module):
    def __init__(self, d_model: int, num_heads: int, max_position_embeddings: int = 2048) -> None:
        super().__init__()
        if d_model // num_heads * num_heads != d_model:
            raise ValueError(f"d_model {d_model} / num_heads {num_heads}")
        self.num_heads = num_heads
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model)
        self.rotary_emb = RotaryPositionEmbedding(d_model // num_heads, max_position_embeddings)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = (x.size(0), self.num_heads, x.size(1), x.size(1))
        if mask is not None:
            if mask.dim() != 4 or any(a != 1 and a != b for a, b in zip(mask.size(), scores, strict=True)):
                raise ValueError(f"{tuple(mask.size())} does not fit {scores}")
            # An additive mask; the rows without any key are set to zero afterwards.
            bias = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(mask == 0, -torch.inf)
            blind = (mask == 0).all(dim=-1, keepdim=True)
            bias = bias.masked_fill(blind, 0.0)
        q, k, v = (
            p(x).reshape(*x.shape[:2], self.num_heads, -1).permute(0, 2, 1, 3)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        both = self.rotary_emb(torch.cat((q, k), dim=1))  # queries and keys in one call
        q, k = both.split(self.num_heads, dim=1)
        if mask is None:
            context = F.scaled_dot_product_attention(q, k, v)
        else:
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(scores))
            context = context.masked_fill(blind, 0.0)
        return self.o_proj(context.permute(0, 2, 1, 3).reshape(x.shape))


def sinusoidal_position_embedding(seq_len: int, dim: int) -> Tensor:
    if dim & 1:
        raise ValueError(f"dim={dim} cannot be split into pairs")
    table = [
        [f(p / 10000 ** (2 * i / dim)) for i in range(dim // 2) for f in (math.sin, math.cos)] for p in range(seq_len)
    ]
    return torch.tensor(table, dtype=torch.float64)


def compare_position_embeddings(seq_len: int = 64, dim: int = 32, shift: int = 16) -> dict[str, float]:
    vectors = torch.randn(2, dim, generator=torch.Generator().manual_seed(0))
    rope = RotaryPositionEmbedding(dim)
    everywhere = vectors.unsqueeze(1).expand(2, seq_len, dim)
    table = sinusoidal_position_embedding(seq_len + shift, dim)
    rotated = [rope(everywhere.unsqueeze(0), n)[0] for n in (seq_len, seq_len + shift)]
    added = [everywhere + table[n : n + seq_len] for n in (0, shift)]
    result = {}
    for name, (before, after) in (("rope", rotated), ("sinusoidal", added)):
        result[name] = (after[0] @ after[1].T - before[0] @ before[1].T).norm(p=torch.inf).item()
    return result
