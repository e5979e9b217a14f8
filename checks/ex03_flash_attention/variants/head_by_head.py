"""One head after the other, in float64 whatever comes in; blocks that a mask hides altogether are skipped."""

import math
import timeit
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class OneHead(torch.autograd.Function):
    """Attention of one head: [N, Dh] over [M, Dh]; mask is None or broadcasts to [N, M]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, size: int) -> Any:
        """Output and logsumexp."""
        ctx.walk = Walk(q, k, mask, causal, size)
        out, logs = torch.zeros_like(q), torch.full((len(q),), -math.inf, dtype=torch.float64, device=q.device)
        for rows in ctx.walk.rows():
            top = torch.full((rows.stop - rows.start, 1), -math.inf, dtype=torch.float64, device=q.device)
            acc, total = torch.zeros(len(top), q.size(1), dtype=torch.float64, device=q.device), torch.zeros_like(top)
            for columns, scores in ctx.walk.columns(rows):
                new = torch.maximum(top, scores.amax(1, keepdim=True))
                reference = new.nan_to_num(neginf=0.0)
                p, shrink = (scores - reference).exp(), (top - reference).exp()
                total, top = total * shrink + p.sum(1, keepdim=True), new
                acc = acc * shrink + p @ v[columns].double()
            out[rows] = (acc / total.where(total > 0, 1.0)).to(q.dtype)
            logs[rows] = (top + total.log())[:, 0]
        ctx.save_for_backward(q, k, v, out, logs)
        ctx.walk.forget()
        return out, logs

    @staticmethod
    def backward(ctx: Any, do: Tensor, _: Tensor) -> Any:
        """Gradients of q, k and v."""
        q, k, v, out, logs = ctx.saved_tensors
        dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float64, device=q.device) for x in (q, k, v))
        ctx.walk.remember(q, k)
        for rows in ctx.walk.rows():
            g = do[rows].double()
            for columns, scores in ctx.walk.columns(rows):
                p = (scores - logs[rows, None].nan_to_num(neginf=0.0)).exp()
                dv[columns] += p.T @ g
                ds = p * (g @ v[columns].double().T - (g * out[rows].double()).sum(1, keepdim=True)) * q.size(1) ** -0.5
                dq[rows] += ds @ k[columns].double()
                dk[columns] += ds.T @ q[rows].double()
        ctx.walk.forget()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


class Walk:
    """Walks over the blocks of one head."""

    def __init__(self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, size: int) -> None:
        self.remember(q, k)
        self.mask, self.causal, self.size = mask, causal, size

    def remember(self, q: Tensor, k: Tensor) -> None:
        """Takes the tensors to walk over."""
        self.q, self.k = q, k

    def forget(self) -> None:
        """Lets them go."""
        del self.q, self.k

    def rows(self) -> Iterator[slice]:
        """Blocks of queries."""
        for start in range(0, len(self.q), self.size):
            yield slice(start, min(start + self.size, len(self.q)))

    def columns(self, rows: slice) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of keys with something to see, and their scores."""
        n, m = len(self.q), len(self.k)
        for start in range(0, m, self.size):
            columns = slice(start, min(start + self.size, m))
            if self.causal and rows.stop - 1 + m - n < start:
                return
            scores = self.q[rows].double() @ self.k[columns].double().T * self.q.size(1) ** -0.5
            if self.causal:
                i = torch.arange(rows.start, rows.stop, device=scores.device) + m - n
                j = torch.arange(columns.start, columns.stop, device=scores.device)
                scores[j[None] > i[:, None]] = -math.inf
            if self.mask is not None:
                allowed = self.mask.expand(n, m)[rows, columns] != 0
                if not allowed.any():
                    continue
                scores = scores.where(allowed, -math.inf)
            yield columns, scores


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
        pairs = [
            [
                OneHead.apply(Q[b, h], K[b, h], V[b, h], self._part(mask, b, h), causal, self.block_size)
                for h in range(Q.size(1))
            ]
            for b in range(Q.size(0))
        ]
        outputs, logs = ([torch.stack([pair[which] for pair in row]) for row in pairs] for which in (0, 1))
        return torch.stack(outputs), torch.stack(logs).detach()

    @staticmethod
    def _part(mask: Tensor | None, b: int, h: int) -> Tensor | None:
        return None if mask is None else mask[min(b, mask.size(0) - 1), min(h, mask.size(1) - 1)]

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
