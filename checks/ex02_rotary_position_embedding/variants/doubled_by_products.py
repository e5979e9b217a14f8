"""The table doubles by complex products, not by cosines; attention goes over blocks of keys with a running maximum."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class RotaryPositionEmbedding(nn.Module):
    def __init__(self, dim: int, max_position_embeddings: int = 2048, base: float = 10000) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim {dim}: a pair needs two features")
        self.pairs = dim // 2
        self.frequencies = [float(base) ** (-pair / self.pairs) for pair in range(self.pairs)]
        self.turns: list[Tensor] = []  # One table, [positions, pairs], complex128; in a list no cast finds it.

    def _turns(self, end: int, device: torch.device) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            if not self.turns or self.turns[0].device != device:
                angles = torch.tensor([self.frequencies], dtype=torch.float64, device=device)
                self.turns[:] = [torch.cat((torch.polar(torch.ones_like(angles), 0 * angles),
                                            torch.polar(torch.ones_like(angles), angles)))]  # fmt: skip
            while len(self.turns[0]) < end:
                table = self.turns[0]
                self.turns[0] = torch.cat((table, table * (table[-1] * table[1])))
            return self.turns[0]

    def forward(self, x: Tensor, seq_len: int | None = None) -> Tensor:
        rows = x.size(2)
        end = rows if seq_len is None else seq_len
        if rows > end:
            raise ValueError(f"{rows} rows cannot end at position {end}")
        turns = self._turns(end, x.device)[end - rows : end]
        return self.apply_rotary_pos_emb(x, turns.real.repeat(1, 2), turns.imag.repeat(1, 2))

    def rotate_half(self, x: Tensor) -> Tensor:
        return torch.cat((x[..., self.pairs :].neg(), x[..., : self.pairs]), dim=-1)

    def apply_rotary_pos_emb(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        wide = x.double()
        return torch.lerp(wide, wide * cos.double() + self.rotate_half(wide) * sin.double(), 1.0).to(x.dtype)


class MultiHeadAttentionWithRoPE(nn.Module):
    def __init__(self, d_model: int, num_heads: int, max_position_embeddings: int = 2048) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"d_model {d_model} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model)
        self.rotary_emb = RotaryPositionEmbedding(d_model // num_heads, max_position_embeddings)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, features = x.shape
        scores = (batch, self.num_heads, length, length)
        if mask is not None:
            if mask.dim() != 4 or any(m not in (1, s) for m, s in zip(mask.shape, scores, strict=True)):
                raise ValueError(f"mask {tuple(mask.shape)}, scores {scores}")
            mask = (mask != 0).expand(scores)
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.rotary_emb(q), self.rotary_emb(k)
        top = torch.full(scores[:3], torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).unsqueeze(-1)
        total, context = torch.zeros_like(top), torch.zeros_like(v)
        for block in self._blocks(length, 128):
            part = q @ k[:, :, block].mT / q.size(-1) ** 0.5
            if mask is not None:
                part = part.masked_fill(~mask[..., block], -torch.inf)
            higher = torch.maximum(top, part.detach().amax(-1, keepdim=True))
            powers, fade = (part - higher).exp(), (top - higher).exp()
            total = total * fade + powers.sum(-1, keepdim=True)
            context = context * fade + powers @ v[:, :, block]
            top = higher
        context = context / total.where(total > 0, torch.ones_like(total))
        return self.o_proj(context.transpose(1, 2).reshape(batch, length, features))

    @staticmethod
    def _blocks(length: int, size: int) -> Iterator[slice]:
        return (slice(first, min(first + size, length)) for first in range(0, length, size))


def sinusoidal_position_embedding(seq_len: int, dim: int) -> Tensor:
    if dim % 2:
        raise ValueError(f"dim {dim}: sines and cosines come in pairs")
    angles = torch.arange(seq_len).unsqueeze(1) * 10000.0 ** (-torch.arange(0, dim, 2).repeat_interleave(2) / dim)
    quarter = torch.tensor([0.0, torch.pi / 2]).repeat(dim // 2)
    return (angles.double() + quarter.double()).sin().float()


def compare_position_embeddings(seq_len: int = 64, dim: int = 32, shift: int = 16) -> dict[str, float]:
    query, key = torch.randn(2, dim, generator=torch.Generator().manual_seed(0))
    rope = RotaryPositionEmbedding(dim)
    table = sinusoidal_position_embedding(seq_len + shift, dim)

    def scores(first: int) -> dict[str, Tensor]:
        rows = table[first : first + seq_len]
        q, k = (rope(one.repeat(1, 1, seq_len, 1), first + seq_len)[0, 0] for one in (query, key))
        return {"rope": q @ k.T, "sinusoidal": (query + rows) @ (key + rows).T}

    before, after = scores(0), scores(shift)
    return {name: float((after[name] - before[name]).abs().max()) for name in before}
