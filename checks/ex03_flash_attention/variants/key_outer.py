"""The outer loop runs over keys, as in the first paper; maxima, sums and outputs of all queries are kept."""

import math
import timeit
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def hidden(
    mask: Tensor | None, causal: bool, i: int, j: int, n: int, m: int, shape: tuple[int, int], device: torch.device
) -> Tensor | None:
    """What a block of scores [n, m] that starts at (i, j) may not see; `shape` is that of all scores."""
    result = None
    if causal:
        rows = torch.arange(i, i + n, device=device)[:, None] + shape[1] - shape[0]
        result = torch.arange(j, j + m, device=device) > rows
    if mask is not None:
        part = mask[:, :, i : i + n] if mask.size(2) > 1 else mask
        part = part[..., j : j + m] if mask.size(3) > 1 else part
        result = ~part.bool() if result is None else result | ~part.bool()
    return result


class KeyOuter(torch.autograd.Function):
    """Attention with the keys in the outer loop."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, size: int) -> Any:
        """Output and logsumexp."""
        b, h, n, d = q.shape
        m = k.size(2)
        high = torch.promote_types(q.dtype, torch.float32)
        lowest = torch.finfo(high).min / 2
        acc = torch.zeros(b, h, n, d, dtype=high, device=q.device)
        top = torch.full((b, h, n), lowest, dtype=high, device=q.device)
        total = torch.zeros_like(top)
        for j in range(0, m, size):
            kj, vj = k[:, :, j : j + size].to(high), v[:, :, j : j + size].to(high)
            for i in range(0, n, size):
                stop = min(i + size, n)
                if causal and stop - 1 + m - n < j:
                    continue
                rows = slice(i, stop)
                scores = torch.einsum("bhnd,bhmd->bhnm", q[:, :, rows].to(high), kj) / d**0.5
                hide = hidden(mask, causal, i, j, stop - i, kj.size(2), (n, m), q.device)
                if hide is not None:
                    scores.masked_fill_(hide, -torch.inf)
                new = torch.maximum(top[:, :, rows], scores.amax(-1))
                p = (scores - new[..., None]).exp()
                shrink = (top[:, :, rows] - new).exp()
                total[:, :, rows] = total[:, :, rows] * shrink + p.sum(-1)
                acc[:, :, rows] = acc[:, :, rows] * shrink[..., None] + p @ vj
                top[:, :, rows] = new
        out = (acc / total.clamp(min=torch.finfo(high).tiny)[..., None]).to(q.dtype)
        lse = torch.where(total > 0, top + total.log(), -torch.inf)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.causal, ctx.size = mask, causal, size
        return out, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> Any:
        """Gradients of q, k and v."""
        q, k, v, out, lse = ctx.saved_tensors
        (n, d), m, size, high = q.shape[-2:], k.size(2), ctx.size, lse.dtype
        delta = torch.zeros_like(lse)
        for i in range(0, n, size):
            delta[:, :, i : i + size] = (do[:, :, i : i + size].to(high) * out[:, :, i : i + size].to(high)).sum(-1)
        dq, dk, dv = torch.zeros_like(q, dtype=high), [], []
        finite = lse.masked_fill(lse == -torch.inf, 0)
        for j in range(0, m, size):
            kj, vj = k[:, :, j : j + size].to(high), v[:, :, j : j + size].to(high)
            dkj, dvj = torch.zeros_like(kj), torch.zeros_like(vj)
            for i in range(0, n, size):
                rows = slice(i, min(i + size, n))
                if ctx.causal and rows.stop - 1 + m - n < j:
                    continue
                qi, doi = q[:, :, rows].to(high), do[:, :, rows].to(high)
                scores = qi @ kj.mT / d**0.5
                hide = hidden(ctx.mask, ctx.causal, i, j, qi.size(2), kj.size(2), (n, m), q.device)
                if hide is not None:
                    scores = scores.masked_fill(hide, -torch.inf)
                p = (scores - finite[:, :, rows, None]).exp()
                dvj += p.mT @ doi
                ds = p * (doi @ vj.mT - delta[:, :, rows, None])
                dq[:, :, rows] += ds @ kj / d**0.5
                dkj += ds.mT @ qi / d**0.5
            dk.append(dkj)
            dv.append(dvj)
        return dq.to(q.dtype), torch.cat(dk, 2).to(k.dtype), torch.cat(dv, 2).to(v.dtype), None, None, None


class FlashAttention(nn.Module):
    """Attention by blocks."""

    def __init__(self, d_model: int, num_heads: int, block_size: int = 64) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.block_size = block_size
        self.scale = (d_model // num_heads) ** -0.5
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model)

    def flash_attention_forward(
        self, Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Attention of Q over K and V."""
        return KeyOuter.apply(Q, K, V, mask, causal, self.block_size)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Self-attention of x."""
        b, n, d = x.shape
        want = (b, self.num_heads, n, n)
        if mask is not None and (mask.ndim != 4 or any(s not in (1, w) for s, w in zip(mask.shape, want, strict=True))):
            raise ValueError(f"the mask is {mask.shape}; it does not broadcast to {want}")
        q, k, v = (p(x).view(b, n, self.num_heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out, _ = self.flash_attention_forward(q, k, v, mask=mask, causal=causal)
        return self.o_proj(out.transpose(1, 2).reshape(b, n, d))


def standard(module: FlashAttention, x: Tensor) -> Tensor:
    """The same attention with all scores at once."""
    b, n, d = x.shape
    heads = [
        p(x).view(b, n, module.num_heads, -1).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj)
    ]
    scores = heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(d // module.num_heads)
    return module.o_proj((torch.softmax(scores, dim=-1) @ heads[2]).transpose(1, 2).reshape(b, n, d))


@torch.inference_mode()
def benchmark_attention(seq_lengths: Sequence[int], d_model: int = 512, num_heads: int = 8) -> list[dict[str, float]]:
    """Compares both forms."""
    rows = []
    for n in seq_lengths:
        module, x = FlashAttention(d_model, num_heads), torch.rand(1, n, d_model)
        by_hand, by_blocks = partial(standard, module, x), partial(module.forward, x)
        difference = by_hand().double() - by_blocks().double()
        rows.append(
            {
                "seq_len": int(n),
                "standard_seconds": timeit.timeit(by_hand, number=5) / 5,
                "flash_seconds": timeit.timeit(by_blocks, number=5) / 5,
                "standard_peak_bytes": float(peak_bytes(by_hand)),
                "flash_peak_bytes": float(peak_bytes(by_blocks)),
                "max_abs_error": max(difference.max().item(), -difference.min().item()),
                "speedup": 1.0,
            }
        )
    return rows
