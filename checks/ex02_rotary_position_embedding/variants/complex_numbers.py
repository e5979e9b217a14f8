"""A pair is one complex number, a turn is one product; the table grows lazily; the softmax is written out."""

import torch
from torch import Tensor, nn


class RotaryPositionEmbedding(nn.Module):
    turns: Tensor | None

    def __init__(self, dim: int, max_position_embeddings: int = 2048, base: float = 10000) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim must be even, got {dim}")
        self.pairs, self.base = dim // 2, base
        self.turns = None  # complex64, [positions, pairs]; a buffer would be cast

    def forward(self, x: Tensor, seq_len: int | None = None) -> Tensor:
        end = x.shape[2] if seq_len is None else seq_len
        start = end - x.shape[2]
        if start < 0:
            raise ValueError(f"{x.shape[2]} rows do not fit into seq_len={end}")
        if self.turns is None or self.turns.device != x.device or len(self.turns) < end:
            with torch.inference_mode(False), torch.no_grad():
                pairs = torch.arange(self.pairs, device=x.device, dtype=torch.float32)
                frequencies = self.base ** (-pairs / self.pairs)
                angles = torch.arange(end, device=x.device, dtype=torch.float32)[:, None] * frequencies
                self.turns = torch.polar(torch.ones_like(angles), angles)
        return self._turn(x, self.turns[start:end])

    def rotate_half(self, x: Tensor) -> Tensor:
        real = x.double() if x.dtype == torch.float64 else x.float()
        z = 1j * torch.complex(real[..., : self.pairs], real[..., self.pairs :])
        return torch.cat([z.real, z.imag], dim=-1).to(x.dtype)

    def apply_rotary_pos_emb(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self._turn(x, torch.complex(cos[:, : self.pairs].contiguous(), sin[:, : self.pairs].contiguous()))

    def _turn(self, x: Tensor, turns: Tensor) -> Tensor:
        real = x.double() if x.dtype == torch.float64 else x.float()
        z = torch.view_as_complex(real.unflatten(-1, (2, self.pairs)).transpose(-1, -2).contiguous()) * turns
        return torch.view_as_real(z).transpose(-1, -2).flatten(-2).to(x.dtype)


class MultiHeadAttentionWithRoPE(nn.Module):
    def __init__(self, d_model: int, num_heads: int, max_position_embeddings: int = 2048) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"{num_heads} heads do not divide d_model={d_model}")
        self.heads = num_heads
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model)
        self.rotary_emb = RotaryPositionEmbedding(d_model // num_heads, max_position_embeddings)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, d_model = x.shape
        full = (batch, self.heads, length, length)
        if mask is not None and (mask.dim() != 4 or torch.Size(full) != _broadcast(tuple(mask.shape), full)):
            raise ValueError(f"mask {tuple(mask.shape)} is no mask for scores {full}")
        shape = (batch, length, self.heads, d_model // self.heads)
        q, k, v = (linear(x).view(shape).transpose(1, 2) for linear in (self.q_proj, self.k_proj, self.v_proj))
        scores = self.rotary_emb(q) @ self.rotary_emb(k).transpose(-1, -2) / shape[-1] ** 0.5
        if mask is None:
            mask = torch.ones(1, 1, 1, 1, device=x.device)
        allowed = mask != 0
        scores = torch.where(allowed, scores, torch.finfo(scores.dtype).min)
        powers = torch.exp(scores - scores.amax(-1, keepdim=True).detach()) * allowed
        weights = powers / powers.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        return self.o_proj((weights.to(v.dtype) @ v).transpose(1, 2).reshape(x.shape))


def _broadcast(mask: tuple[int, ...], full: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of both together, or nothing."""
    try:
        return torch.broadcast_shapes(mask, full)
    except RuntimeError:
        return ()


def sinusoidal_position_embedding(seq_len: int, dim: int) -> Tensor:
    if dim % 2:
        raise ValueError(f"dim must be even, got {dim}")
    powers = torch.arange(dim // 2, dtype=torch.float64) * (-2 / dim)
    turns = torch.exp(1j * torch.arange(seq_len)[:, None] * 10000.0**powers)
    return torch.view_as_real(turns).flip(-1).reshape(seq_len, dim)


def compare_position_embeddings(seq_len: int = 64, dim: int = 32, shift: int = 16) -> dict[str, float]:
    query, key = torch.randn(2, dim, generator=torch.Generator().manual_seed(0))
    rope = RotaryPositionEmbedding(dim)
    table = sinusoidal_position_embedding(seq_len + shift, dim)

    def scores(first: int) -> tuple[Tensor, Tensor]:
        last = first + seq_len
        q, k = (rope(v.expand(1, 1, seq_len, dim), seq_len=last)[0, 0] for v in (query, key))
        added = table[first:last]
        return q @ k.T, (query + added) @ (key + added).T

    (rope_before, sin_before), (rope_after, sin_after) = scores(0), scores(shift)
    return {
        "rope": float((rope_after - rope_before).abs().max()),
        "sinusoidal": float((sin_after - sin_before).abs().max()),
    }
