"""Explicit 2×2 matrices, made at construction and kept where casts do not reach; attention by einsum."""

import torch
from torch import Tensor, einsum, nn


class RotaryPositionEmbedding(nn.Module):
    def __init__(self, dim: int, max_position_embeddings: int = 2048, base: float = 10000) -> None:
        super().__init__()
        if dim % 2 == 1:
            raise ValueError(f"odd dim: {dim}")
        self.dim = dim
        self.frequencies = [base ** (-i / dim) for i in range(0, dim, 2)]
        self.matrices = self._matrices(max_position_embeddings, "cpu")

    def _matrices(self, rows: int, device: torch.device | str) -> Tensor:
        with torch.inference_mode(mode=False):
            positions = torch.arange(rows, device=device).float()
            angles = positions.unsqueeze(1) * torch.tensor(self.frequencies, device=device)
            c, s = torch.cos(angles), torch.sin(angles)
            return torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)  # [rows, Dh / 2, 2, 2]

    def forward(self, x: Tensor, seq_len: int | None = None) -> Tensor:
        _, _, length, _ = x.size()
        seq_len = length if seq_len is None else seq_len
        if length > seq_len:
            raise ValueError(f"x has {length} rows, more than seq_len={seq_len}")
        if self.matrices.device != x.device or self.matrices.size(0) < seq_len:
            self.matrices = self._matrices(max(seq_len, self.matrices.size(0)), x.device)
        return self._multiply(x, self.matrices[seq_len - length : seq_len])

    @staticmethod
    def _multiply(x: Tensor, matrices: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, matrices.dtype)
        pairs = x.unflatten(-1, (2, -1)).to(dtype)
        return einsum("lprc,bhlcp->bhlrp", matrices.to(dtype), pairs).flatten(-2).to(x.dtype)

    def rotate_half(self, x: Tensor) -> Tensor:
        left, right = x.split(self.dim // 2, dim=-1)
        return torch.concat((right.neg(), left), -1)

    def apply_rotary_pos_emb(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c, s = cos.chunk(2, -1)[0], sin.chunk(2, -1)[0]
        return self._multiply(x, torch.stack([c, -s, s, c], -1).unflatten(-1, (2, 2)))


class MultiHeadAttentionWithRoPE(nn.Module):
    def __init__(self, d_model: int, num_heads: int, max_position_embeddings: int = 2048) -> None:
        super().__init__()
        head_dim, rest = divmod(d_model, num_heads)
        if rest:
            raise ValueError(f"num_heads ({num_heads}) must divide d_model ({d_model})")
        self.num_heads, self.head_dim = num_heads, head_dim
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model)
        self.rotary_emb = RotaryPositionEmbedding(head_dim, max_position_embeddings)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, d = x.shape
        h, e = self.num_heads, self.head_dim
        if mask is not None and not (
            mask.ndim == 4 and all(m == 1 or m == s for m, s in zip(mask.shape, (b, h, n, n), strict=True))
        ):
            raise ValueError(f"mask: {list(mask.shape)}, scores: {[b, h, n, n]}")
        fused = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        q, k, v = nn.functional.linear(x, fused).reshape(b, n, 3, h, e).permute(2, 0, 3, 1, 4)
        q, k = self.rotary_emb(q), self.rotary_emb(k)
        scores = einsum("bhqe,bhke->bhqk", q, k).mul(e**-0.5)
        if mask is not None:
            scores = scores.masked_fill(mask.eq(0), -torch.inf)
        weights = torch.nan_to_num(scores.softmax(-1)) if mask is None else self._softmax(scores, mask)
        return self.o_proj(einsum("bhqk,bhke->bqhe", weights, v).reshape(b, n, d))

    @staticmethod
    def _softmax(scores: Tensor, mask: Tensor) -> Tensor:
        some = mask.ne(0).any(-1, keepdim=True)
        return scores.masked_fill(~some, 0.0).softmax(-1) * some


def sinusoidal_position_embedding(seq_len: int, dim: int) -> Tensor:
    if dim % 2 == 1:
        raise ValueError(f"odd dim: {dim}")
    table = torch.zeros(seq_len, dim)
    position = torch.arange(seq_len).unsqueeze(1)
    div = torch.exp(torch.arange(0, dim, 2) * (-torch.log(torch.tensor(10000.0)) / dim))
    table[:, 0::2] = torch.sin(position * div)
    table[:, 1::2] = torch.cos(position * div)
    return table


def compare_position_embeddings(seq_len: int = 64, dim: int = 32, shift: int = 16) -> dict[str, float]:
    query, key = torch.randn(2, dim, generator=torch.Generator().manual_seed(0))
    rope = RotaryPositionEmbedding(dim, seq_len + shift)
    turned_q, turned_k = (rope(v.repeat(1, 1, seq_len + shift, 1)).squeeze() for v in (query, key))
    table = sinusoidal_position_embedding(seq_len + shift, dim)
    added_q, added_k = query + table, key + table
    i, j = torch.cartesian_prod(torch.arange(seq_len), torch.arange(seq_len)).T

    def change(q: Tensor, k: Tensor) -> float:
        before, after = (q[i] * k[j]).sum(-1), (q[i + shift] * k[j + shift]).sum(-1)
        return torch.max(torch.abs(after - before)).item()

    return {"sinusoidal": change(added_q, added_k), "rope": change(turned_q, turned_k)}
