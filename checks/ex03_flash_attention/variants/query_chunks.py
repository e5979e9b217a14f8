"""Chunks of queries, an online softmax in natural exponentials, -inf maxima guarded by torch.where, setup_context."""

import math
import time
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


class Flash(torch.autograd.Function):
    """Flash attention on [B, H, N, Dh]."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, size: int
    ) -> tuple[Tensor, Tensor]:
        """Output and logsumexp."""
        n, m = q.size(2), k.size(2)
        full = torch.float64 if q.dtype == torch.float64 else torch.float32
        outputs, logs = [], []
        for i in range(0, n, size):
            qi = q[:, :, i : i + size].to(full)
            top = qi.new_full((*qi.shape[:3], 1), float("-inf"))
            total = torch.zeros_like(top)
            sums = torch.zeros_like(qi)
            for j in range(0, m, size):
                if causal and j > i + qi.size(2) - 1 + m - n:
                    break
                kj, vj = k[:, :, j : j + size].to(full), v[:, :, j : j + size].to(full)
                scores = qi @ kj.transpose(-1, -2) * scale
                hide = hidden(mask, causal, i, j, qi.size(2), kj.size(2), (n, m), q.device)
                if hide is not None:
                    scores = scores.masked_fill(hide, float("-inf"))
                new = torch.maximum(top, scores.max(-1, keepdim=True).values)
                safe = torch.where(new == float("-inf"), 0.0, new)
                p = torch.exp(scores - safe)
                factor = torch.exp(top - safe)
                total = factor * total + p.sum(-1, keepdim=True)
                sums = factor * sums + p @ vj
                top = new
            outputs.append((sums / torch.where(total == 0, 1.0, total)).to(q.dtype))
            logs.append((top + total.log()).squeeze(-1))
        return torch.cat(outputs, 2), torch.cat(logs, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps what backward needs."""
        q, k, v, mask, ctx.causal, ctx.scale, ctx.size = inputs
        ctx.save_for_backward(q, k, v, mask, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, do: Tensor, _: Any) -> Any:
        """Gradients of q, k and v."""
        q, k, v, mask, out, logs = ctx.saved_tensors
        n, m, size = q.size(2), k.size(2), ctx.size
        dq, dk, dv = (torch.zeros_like(x, dtype=logs.dtype) for x in (q, k, v))
        for j in range(0, m, size):
            kj, vj = k[:, :, j : j + size].to(logs), v[:, :, j : j + size].to(logs)
            for i in range(0, n, size):
                qi, doi, oi = (x[:, :, i : i + size].to(logs) for x in (q, do, out))
                scores = qi @ kj.transpose(-1, -2) * ctx.scale
                hide = hidden(mask, ctx.causal, i, j, qi.size(2), kj.size(2), (n, m), q.device)
                p = torch.exp(scores - logs[:, :, i : i + size, None])
                if hide is not None:
                    p = p.masked_fill(hide, 0.0)
                dv[:, :, j : j + size] += p.transpose(-1, -2) @ doi
                ds = p * (doi @ vj.transpose(-1, -2) - (doi * oi).sum(-1, keepdim=True)) * ctx.scale
                dq[:, :, i : i + size] += ds @ kj
                dk[:, :, j : j + size] += ds.transpose(-1, -2) @ qi
        return dq.to(q), dk.to(k), dv.to(v), None, None, None, None


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
        return Flash.apply(Q, K, V, mask, causal, self.scale, self.block_size)

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


def benchmark_attention(seq_lengths: Sequence[int], d_model: int = 512, num_heads: int = 8) -> list[dict[str, float]]:
    """Compares both forms."""
    rows = []
    module = FlashAttention(d_model, num_heads).eval()
    for n in seq_lengths:
        x = torch.randn(1, n, d_model)
        row: dict[str, float] = {"seq_len": n}
        outputs = []
        with torch.no_grad():
            for name, function in (("standard", partial(standard, module, x)), ("flash", partial(module, x))):
                start = time.perf_counter()
                outputs.append(function())
                row[f"{name}_seconds"] = time.perf_counter() - start
                row[f"{name}_peak_bytes"] = peak_bytes(function)
        row["max_abs_error"] = float((outputs[0] - outputs[1]).abs().max())
        rows.append(row)
    return rows
