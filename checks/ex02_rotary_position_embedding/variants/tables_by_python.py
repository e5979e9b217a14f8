"""Cosines and sines from Python's math, kept as numbers; inv_freq is in the state_dict though unused."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RotaryPositionEmbedding(nn.Module):
    def __init__(self, dim: int, max_position_embeddings: int = 2048, base: float = 10000) -> None:
        super().__init__()
        if dim % 2 != 0:
            raise ValueError(f"dim must be even: {dim}")
        self.dim = dim
        self.frequency = [base ** (-2 * i / dim) for i in range(dim // 2)]
        self.register_buffer("inv_freq", torch.tensor(self.frequency))
        self.numbers: list[list[float]] = []
        self.made: dict[tuple[int, torch.device], Tensor] = {}

    def forward(self, x: Tensor, seq_len: int | None = None) -> Tensor:
        length = x.shape[-2]
        seq_len = seq_len if seq_len is not None else length
        if seq_len < length:
            raise ValueError(f"seq_len ({seq_len}) must be at least the number of rows ({length})")
        for position in range(len(self.numbers), seq_len):
            angles = [position * f for f in self.frequency]
            self.numbers.append([*map(math.cos, angles), *map(math.sin, angles)])
        rows = len(self.numbers)
        if (rows, x.device) not in self.made:
            with torch.inference_mode(False):
                self.made = {(rows, x.device): torch.tensor(self.numbers, device=x.device)}
        cos, sin = self.made[rows, x.device][seq_len - length : seq_len].repeat_interleave(2, dim=0).chunk(2, dim=-1)
        return self.apply_rotary_pos_emb(x, cos[::2].repeat(1, 2), sin[::2].repeat(1, 2))

    def rotate_half(self, x: Tensor) -> Tensor:
        return torch.stack((-x[..., self.dim // 2 :], x[..., : self.dim // 2]), dim=-2).flatten(-2)

    def apply_rotary_pos_emb(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.addcmul(x * cos, self.rotate_half(x).to(sin), sin).type_as(x)


class MultiHeadAttentionWithRoPE(nn.Module):
    def __init__(self, d_model: int, num_heads: int, max_position_embeddings: int = 2048) -> None:
        if d_model % num_heads != 0:
            raise ValueError(f"d_model ({d_model}) must be divisible by num_heads ({num_heads})")
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model)
        self.rotary_emb = RotaryPositionEmbedding(d_model // num_heads, max_position_embeddings)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            full = torch.Size([len(x), self.num_heads, x.shape[1], x.shape[1]])
            if mask.dim() != 4 or any(m != 1 and m != f for m, f in zip(mask.shape, full, strict=True)):
                raise ValueError(f"mask: {mask.shape}; scores: {full}")
            mask = mask.to(torch.bool).expand(full)
        split = [t.chunk(self.num_heads, dim=-1) for t in (self.q_proj(x), self.k_proj(x), self.v_proj(x))]
        q, k, v = (torch.stack(heads, dim=1) for heads in split)
        return self.o_proj(
            torch.cat(
                F.scaled_dot_product_attention(self.rotary_emb(q), self.rotary_emb(k), v, attn_mask=mask).unbind(1), -1
            )
        )


def sinusoidal_position_embedding(seq_len: int, dim: int) -> Tensor:
    if dim % 2 != 0:
        raise ValueError(f"dim must be even: {dim}")
    i = torch.arange(dim, dtype=torch.float64)
    phase = (i % 2) * math.pi / 2  # cos a = sin(a + π/2)
    position = torch.arange(seq_len, dtype=torch.float64).unsqueeze(-1)
    return torch.sin(position * torch.exp(-(i // 2) * 2 / dim * math.log(10000)) + phase).to(torch.get_default_dtype())


def compare_position_embeddings(seq_len: int = 64, dim: int = 32, shift: int = 16) -> dict[str, float]:
    query, key = torch.randn(2, dim, generator=torch.Generator().manual_seed(0))
    rope = RotaryPositionEmbedding(dim)
    sinus = sinusoidal_position_embedding(seq_len + shift, dim)
    largest = {"rope": 0.0, "sinusoidal": 0.0}
    turned = [rope(v.expand(1, 1, seq_len + shift, dim)).squeeze(0).squeeze(0) for v in (query, key)]
    pairs = {"rope": turned, "sinusoidal": [query + sinus, key + sinus]}
    for name, (q, k) in pairs.items():
        scores = torch.stack([torch.stack([*(k @ row)]) for row in q])
        for i in range(seq_len):
            change = scores[i + shift, shift : shift + seq_len] - scores[i, :seq_len]
            largest[name] = max(largest[name], float(change.abs().max()))
    return largest
