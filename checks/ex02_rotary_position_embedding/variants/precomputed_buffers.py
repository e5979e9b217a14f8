"""Tables for max_position_embeddings in non-persistent buffers, which a cast moves but does not round."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class RotaryPositionEmbedding(nn.Module):
    inv_freq: Tensor
    cos_cached: Tensor
    sin_cached: Tensor

    def __init__(self, dim: int, max_position_embeddings: int = 2048, base: float = 10000) -> None:
        super().__init__()
        if dim % 2 != 0:
            raise ValueError(f"RoPE needs an even dim, not {dim}")
        self.register_buffer("inv_freq", 1.0 / (base ** (torch.arange(0, dim, 2).float() / dim)))
        self._fill(max_position_embeddings)

    def _fill(self, rows: int) -> None:
        with torch.inference_mode(False):
            t = torch.arange(rows, device=self.inv_freq.device, dtype=torch.float32)
            freqs = torch.einsum("i,j->ij", t, self.inv_freq)
            emb = torch.cat((freqs, freqs), dim=-1)
            self.register_buffer("cos_cached", emb.cos(), persistent=False)
            self.register_buffer("sin_cached", emb.sin(), persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "RotaryPositionEmbedding":
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            cast = getattr(self, name)
            if buffer is not None and cast.dtype != torch.float32:
                setattr(self, name, buffer.to(cast.device))
        return self

    def forward(self, x: Tensor, seq_len: int | None = None) -> Tensor:
        if seq_len is None:
            seq_len = x.shape[-2]
        elif seq_len < x.shape[-2]:
            raise ValueError(f"seq_len={seq_len} < {x.shape[-2]}")
        if seq_len > self.cos_cached.shape[0]:
            self._fill(seq_len)
        cos = self.cos_cached[:seq_len][seq_len - x.shape[-2] :]
        sin = self.sin_cached[:seq_len][seq_len - x.shape[-2] :]
        return self.apply_rotary_pos_emb(x, cos, sin)

    def rotate_half(self, x: Tensor) -> Tensor:
        x1 = x[..., : x.shape[-1] // 2]
        x2 = x[..., x.shape[-1] // 2 :]
        return torch.cat((-x2, x1), dim=-1)

    def apply_rotary_pos_emb(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos[None, None], sin[None, None]
        with torch.autocast(x.device.type, enabled=False):
            return (x.to(cos.dtype) * cos).add(self.rotate_half(x) * sin).to(x.dtype)


class MultiHeadAttentionWithRoPE(nn.Module):
    def __init__(self, d_model: int, num_heads: int, max_position_embeddings: int = 2048) -> None:
        super().__init__()
        if d_model % (2 * num_heads) != 0:
            raise ValueError(f"d_model {d_model} is no even multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model)
        self.rotary_emb = RotaryPositionEmbedding(self.head_dim, max_position_embeddings)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, _ = x.shape
        q = self.rotary_emb(self.q_proj(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2))
        k = self.rotary_emb(self.k_proj(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2))
        v = self.v_proj(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        heads = []
        if mask is not None:
            wanted = (b, self.num_heads, n, n)
            if mask.dim() != 4 or any(m not in (1, w) for m, w in zip(mask.shape, wanted, strict=True)):
                raise ValueError(f"mask {mask.shape} against {wanted}")
            mask = mask.expand(wanted)
        for head in range(self.num_heads):  # one head at a time
            scores = q[:, head] @ k[:, head].transpose(1, 2) / self.head_dim**0.5
            if mask is None:
                weights = scores.softmax(-1)
            else:
                allowed = mask[:, head] > 0
                weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
                weights = weights.masked_fill(~allowed, 0)
            heads.append(weights @ v[:, head])
        return self.o_proj(torch.cat(heads, dim=-1))


def sinusoidal_position_embedding(seq_len: int, dim: int) -> Tensor:
    if dim % 2 != 0:
        raise ValueError(f"the embedding needs an even dim, not {dim}")
    feature = torch.arange(dim)
    angles = torch.arange(seq_len)[:, None] / 10000 ** ((feature - feature % 2) / dim)
    return torch.where(feature % 2 == 0, angles.sin(), angles.cos())


def compare_position_embeddings(seq_len: int = 64, dim: int = 32, shift: int = 16) -> dict[str, float]:
    query, key = torch.randn(2, dim, generator=torch.Generator().manual_seed(0)).double()
    rope = RotaryPositionEmbedding(dim, seq_len + shift).double()
    length = seq_len + shift
    q = rope(query.view(1, 1, 1, dim).expand(1, 1, length, dim))[0, 0]
    k = rope(key.view(1, 1, 1, dim).expand(1, 1, length, dim))[0, 0]
    table = sinusoidal_position_embedding(length, dim).double()
    worst = {"rope": 0.0, "sinusoidal": 0.0}
    for i in range(seq_len):
        for name, a, b in (("rope", q, k), ("sinusoidal", query + table, key + table)):
            change = b[shift : shift + seq_len] @ a[i + shift] - b[:seq_len] @ a[i]
            worst[name] = max(worst[name], change.abs().max().item())
    return worst
