"""Tables in ordinary non-persistent buffers: after a cast the next call makes new ones."""

import torch
from torch import Tensor, nn


class RotaryPositionEmbedding(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, dim: int, max_position_embeddings: int = 2048, base: float = 10000) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim must be even, is {dim}")
        self.dim = dim
        self.base = base
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self.whole = False

    def _apply(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.whole = False
        return super()._apply(*args, **kwargs)

    def forward(self, x: Tensor, seq_len: int | None = None) -> Tensor:
        n = x.shape[-2]
        if seq_len is None:
            seq_len = n
        if seq_len - n < 0:
            raise ValueError(f"seq_len {seq_len}, rows {n}")
        if not self.whole or seq_len > len(self.cos) or self.cos.device != x.device:
            self._build(max(seq_len, len(self.cos)), x.device)
        return self.apply_rotary_pos_emb(x, self.cos[seq_len - n : seq_len], self.sin[seq_len - n : seq_len])

    @torch.no_grad()
    def _build(self, rows: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            inv = 1.0 / self.base ** (torch.arange(0, self.dim, 2, dtype=torch.float32, device=device) / self.dim)
            spin = torch.exp(1j * torch.outer(torch.arange(rows, dtype=torch.float32, device=device), inv))
            self.cos, self.sin = spin.real.repeat(1, 2), spin.imag.repeat(1, 2)
        self.whole = True

    def rotate_half(self, x: Tensor) -> Tensor:
        a, b = x[..., : self.dim // 2], x[..., self.dim // 2 :]
        return torch.hstack((-b.movedim(-1, 1), a.movedim(-1, 1))).movedim(1, -1)

    def apply_rotary_pos_emb(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.add(torch.mul(x, cos), torch.mul(self.rotate_half(x), sin)).type(x.dtype)


class MultiHeadAttentionWithRoPE(nn.Module):
    def __init__(self, d_model: int, num_heads: int, max_position_embeddings: int = 2048) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"d_model {d_model}, num_heads {num_heads}")
        self.n = num_heads
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model)
        self.rotary_emb = RotaryPositionEmbedding(d_model // num_heads, max_position_embeddings)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, d = x.shape
        if mask is not None:
            self._check(mask.shape, (b, self.n, n, n))
        # Heads go into the batch, as in older code: [B * H, L, Dh].
        q, k, v = (f(x).reshape(b, n, self.n, -1).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rotary_emb(q).flatten(0, 1), self.rotary_emb(k).flatten(0, 1)
        scores = torch.bmm(q, k.transpose(1, 2)).div(q.shape[-1] ** 0.5).view(b, self.n, n, n)
        if mask is not None:
            keep = mask.double().gt(0.5)
            scores = scores.where(keep, torch.tensor(-torch.inf, dtype=scores.dtype, device=scores.device))
            top = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
            weights = (scores - top).exp()
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        else:
            weights = scores.softmax(-1)
        context = torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).view(b, self.n, n, -1)
        return self.o_proj(context.permute(0, 2, 1, 3).contiguous().view(b, n, d))

    @staticmethod
    def _check(mask: torch.Size, scores: tuple[int, ...]) -> None:
        if len(mask) != 4 or not all(m in (1, s) for m, s in zip(mask, scores, strict=True)):
            raise ValueError(f"cannot use a mask of shape {tuple(mask)} for scores of shape {scores}")


def sinusoidal_position_embedding(seq_len: int, dim: int) -> Tensor:
    if dim % 2:
        raise ValueError(f"dim must be even, is {dim}")
    out = torch.empty(seq_len, dim)
    for p in range(seq_len):
        for i in range(0, dim, 2):
            angle = torch.tensor(p / 10000 ** (i / dim))
            out[p, i], out[p, i + 1] = angle.sin(), angle.cos()
    return out


def compare_position_embeddings(seq_len: int = 64, dim: int = 32, shift: int = 16) -> dict[str, float]:
    query, key = torch.randn(2, dim, generator=torch.Generator().manual_seed(0))
    rope = RotaryPositionEmbedding(dim)
    frequencies = 10000 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.arange(seq_len + shift).unsqueeze(1) * frequencies
    added = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)

    def largest_change(q: Tensor, k: Tensor) -> float:
        s = q @ k.mT
        change = s[shift : shift + seq_len, shift : shift + seq_len] - s[0:seq_len, 0:seq_len]
        return max(change.max().item(), -change.min().item())

    rows = seq_len + shift
    return {
        "rope": largest_change(*(rope(v.repeat(1, 1, rows, 1))[0, 0] for v in (query, key))),
        "sinusoidal": largest_change(query + added, key + added),
    }
