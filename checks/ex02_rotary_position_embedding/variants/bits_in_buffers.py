"""Tables as integers in buffers, whose bits no cast touches; the rotation is a Function with a backward of its own."""

from typing import Any

import torch
from torch import Tensor, nn


class Turn(torch.autograd.Function):
    """x turned by angles; the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return Turn.turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return Turn.turn(gradients[0], cos, -sin), None, None

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, -1)
        return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), -1).to(x.dtype)


class RotaryPositionEmbedding(nn.Module):
    bits: Tensor

    def __init__(self, dim: int, max_position_embeddings: int = 2048, base: float = 10000) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim = {dim} is not even")
        self.pairs, self.base = dim // 2, base
        self.register_buffer("bits", torch.empty(0, 2, self.pairs, dtype=torch.int64), persistent=False)
        self._extend(max_position_embeddings)

    @torch.inference_mode(False)
    def _extend(self, rows: int) -> None:
        device = self.bits.device
        frequencies = self.base ** (-torch.arange(self.pairs, dtype=torch.float64, device=device) / self.pairs)
        angles = torch.arange(len(self.bits), rows, device=device)[:, None] * frequencies
        self.bits = torch.cat((self.bits, torch.stack((angles.cos(), angles.sin()), 1).view(torch.int64)))

    def forward(self, x: Tensor, seq_len: int | None = None) -> Tensor:
        length = x.size(-2)
        last = length if seq_len is None else seq_len
        if length > last:
            raise ValueError(f"seq_len = {last} has no room for {length} rows")
        if len(self.bits) < last:
            self._extend(last)
        cos, sin = self.bits[last - length : last].view(torch.float64).unbind(1)
        return Turn.apply(x, cos, sin)

    def rotate_half(self, x: Tensor) -> Tensor:
        quarter = torch.zeros(self.pairs, device=x.device), torch.ones(self.pairs, device=x.device)
        return Turn.apply(x, *quarter)

    def apply_rotary_pos_emb(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return Turn.apply(x, cos[:, : self.pairs], sin[:, : self.pairs])


class MultiHeadAttentionWithRoPE(nn.Module):
    def __init__(self, d_model: int, num_heads: int, max_position_embeddings: int = 2048) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"d_model = {d_model}, num_heads = {num_heads}")
        self.num_heads = num_heads
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model)
        self.rotary_emb = RotaryPositionEmbedding(d_model // num_heads, max_position_embeddings)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, d_model = x.shape
        if mask is not None:
            scores = (batch, self.num_heads, length, length)
            if mask.dim() != 4 or any(a not in (1, b) for a, b in zip(mask.shape, scores, strict=True)):
                raise ValueError(f"mask {tuple(mask.shape)} does not fit scores {scores}")
        heads = (batch, length, self.num_heads, d_model // self.num_heads)
        q = self.rotary_emb(self.q_proj(x).reshape(heads).swapaxes(1, 2))
        k = self.rotary_emb(self.k_proj(x).reshape(heads).swapaxes(1, 2))
        v = self.v_proj(x).reshape(heads).swapaxes(1, 2)
        if mask is None:
            context = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            # Padding gets a key of its own with a zero value, so that no row is ever empty.
            allowed = mask.bool().expand(scores)
            nowhere = ~allowed.any(-1, keepdim=True)
            zero = torch.zeros_like(k[:, :, :1])
            context = nn.functional.scaled_dot_product_attention(
                q, torch.cat((k, zero), 2), torch.cat((v, zero), 2), torch.cat((allowed, nowhere), -1)
            )
        return self.o_proj(context.swapaxes(1, 2).reshape(x.shape))


def sinusoidal_position_embedding(seq_len: int, dim: int) -> Tensor:
    if dim % 2:
        raise ValueError(f"dim = {dim} is not even")
    angles = torch.arange(seq_len)[:, None] / torch.pow(
        10000, torch.arange(dim).div(2, rounding_mode="floor") * 2 / dim
    )
    table = angles.cos()
    table[:, ::2] = angles[:, ::2].sin()
    return table


def compare_position_embeddings(seq_len: int = 64, dim: int = 32, shift: int = 16) -> dict[str, float]:
    both = torch.randn(2, dim, generator=torch.Generator().manual_seed(0)).unsqueeze(1)
    rows = seq_len + shift
    turned = RotaryPositionEmbedding(dim, rows)(both.expand(1, 2, rows, dim)).squeeze(0)
    added = both + sinusoidal_position_embedding(rows, dim)
    result = {}
    for name, (q, k) in {"rope": turned, "sinusoidal": added}.items():
        difference = q[shift:] @ k[shift:].T - q[:seq_len] @ k[:seq_len].T
        result[name] = torch.linalg.vector_norm(difference, torch.inf).item()
    return result
