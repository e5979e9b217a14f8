"""Tables that modules share: functools.cache by the largest power of two that a module has needed so far."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


@cache
def table(rows: int, dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines in float64, [rows, dim]."""
    with torch.inference_mode(False):
        positions = torch.arange(rows, device=device, dtype=torch.float64).view(-1, 1)
        pair = torch.arange(dim, device=device, dtype=torch.float64) % (dim // 2)
        angles = positions * torch.pow(base, -2 * pair / dim)
        return torch.cos(angles), torch.sin(angles)


class RotaryPositionEmbedding(nn.Module):
    def __init__(self, dim: int, max_position_embeddings: int = 2048, base: float = 10000) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"{dim=} is odd")
        self.dim, self.base, self.rows = dim, float(base), 1

    def forward(self, x: Tensor, seq_len: int | None = None) -> Tensor:
        end = x.size(-2) if seq_len is None else seq_len
        if end < x.size(-2):
            raise ValueError(f"{end} positions cannot hold {x.size(-2)} rows")
        while self.rows < end:
            self.rows *= 2
        cos, sin = table(self.rows, self.dim, self.base, x.device)
        where = slice(end - x.size(-2), end)
        return self.apply_rotary_pos_emb(x, cos[where], sin[where])

    def rotate_half(self, x: Tensor) -> Tensor:
        first, second = x.tensor_split(2, dim=-1)
        return torch.cat([-second, first], dim=-1)

    def apply_rotary_pos_emb(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.addcmul(x * cos, self.rotate_half(x).to(cos.dtype), sin).to(x.dtype)


class MultiHeadAttentionWithRoPE(nn.Module):
    def __init__(self, d_model: int, num_heads: int, max_position_embeddings: int = 2048) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"{d_model=} {num_heads=}")
        self.num_heads = num_heads
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model)
        self.rotary_emb = RotaryPositionEmbedding(d_model // num_heads, max_position_embeddings)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            p(x).unflatten(2, (self.num_heads, -1)).movedim(2, 1) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if mask is not None:
            scores = (*q.shape[:3], k.size(2))
            if mask.dim() != 4 or any(m not in {1, s} for m, s in zip(mask.shape, scores, strict=True)):
                raise ValueError(f"mask {tuple(mask.shape)}, scores {scores}")
            mask = mask.ne(0)
        out = scaled_dot_product_attention(self.rotary_emb(q), self.rotary_emb(k), v, mask)
        return self.o_proj(out.movedim(1, 2).flatten(2))


def sinusoidal_position_embedding(seq_len: int, dim: int) -> Tensor:
    if dim % 2:
        raise ValueError(f"{dim=} is odd")
    cos, sin = table(seq_len, dim, 10000.0, torch.device("cpu"))
    half = dim // 2
    return torch.stack([sin[:, :half], cos[:, :half]], dim=2).reshape(seq_len, dim).float()


def compare_position_embeddings(seq_len: int = 64, dim: int = 32, shift: int = 16) -> dict[str, float]:
    query, key = torch.randn(2, dim, generator=torch.Generator().manual_seed(0))
    n = seq_len + shift
    rope, table = RotaryPositionEmbedding(dim), sinusoidal_position_embedding(n, dim)
    turned = {
        "rope": [rope(v.expand(1, 1, n, dim))[0, 0] for v in (query, key)],
        "sinusoidal": [v + table for v in (query, key)],
    }
    scores = {name: torch.einsum("id,jd->ij", q, k) for name, (q, k) in turned.items()}
    return {name: float((s[shift:, shift:] - s[:-shift, :-shift]).abs().amax()) for name, s in scores.items()}
