"""Tiles of 2·block_size queries and 4·block_size keys, in float32; what is hidden comes in as a bias of the block."""

import math
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def bias_of(mask: Tensor | None, causal: bool, i: slice, j: slice, n: int, m: int, like: Tensor) -> Tensor:
    """0 where a block may see, -inf where not."""
    bias = like.new_zeros(i.stop - i.start, j.stop - j.start)
    if causal and j.stop - 1 > i.start + m - n:
        bias = torch.full_like(bias, -math.inf).triu(i.start + m - n - j.start + 1)
    if mask is None:
        return bias
    b, h = (mask.size(0), mask.size(1))
    part = mask.expand(b, h, n, m)[:, :, i, j]
    return bias + torch.zeros_like(part, dtype=like.dtype).masked_fill(part.logical_not(), -math.inf)


def tiles(length: int, size: int) -> list[slice]:
    """The slices of a length."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


class Tiled(torch.autograd.Function):
    """Attention by tiles."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool, scale: float, size: int) -> Any:
        """Output and logsumexp."""
        n, m = q.shape[2], k.shape[2]
        output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dtype = q.dtype if q.dtype == torch.float64 else torch.float32
        logs = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
        for i in tiles(n, 2 * size):
            rows = q[:, :, i].to(dtype).mul(scale)
            peak = torch.full_like(rows[..., :1], torch.finfo(dtype).min)
            state = torch.zeros(*rows.shape[:3], rows.size(3) + 1, dtype=dtype, device=q.device)
            for j in tiles(min(m, i.stop + m - n) if causal else m, 4 * size):
                scores = rows.matmul(k[:, :, j].to(dtype).mT) + bias_of(mask, causal, i, j, n, m, rows)
                higher = torch.maximum(peak, scores.amax(-1, True))
                # A column of ones sums the weights along with the values.
                ones = torch.ones_like(v[:, :, j, :1], dtype=dtype)
                values = torch.cat([v[:, :, j].to(dtype), ones], -1)
                state = state * torch.exp(peak - higher) + torch.exp(scores - higher).matmul(values)
                peak = higher
            total = state[..., -1:]
            output[:, :, i] = state[..., :-1] / (total + (total == 0))
            logs[:, :, i] = (peak + total.log()).squeeze(-1)
        ctx.save_for_backward(q, k, v, mask, output, logs)
        ctx.rest = causal, scale, size
        return output, logs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        """Gradients of q, k and v."""
        q, k, v, mask, output, logs = ctx.saved_tensors
        causal, scale, size = ctx.rest
        n, m, dtype = q.shape[2], k.shape[2], logs.dtype
        sums = [torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (q, k, v)]
        for i in tiles(n, 2 * size):
            log = logs[:, :, i, None].clamp(min=-1e30)
            g, rows = grad[:, :, i].to(dtype), q[:, :, i].to(dtype)
            delta = torch.einsum("bhnd,bhnd->bhn", g, output[:, :, i].to(dtype))[..., None]
            for j in tiles(min(m, i.stop + m - n) if causal else m, 4 * size):
                keys = k[:, :, j].to(dtype)
                scores = scale * rows.matmul(keys.mT) + bias_of(mask, causal, i, j, n, m, rows)
                p = torch.exp(scores - log)
                ds = (g.matmul(v[:, :, j].to(dtype).mT) - delta).mul_(p).mul_(scale)
                sums[0][:, :, i] += ds.matmul(keys)
                sums[1][:, :, j] += ds.mT.matmul(rows)
                sums[2][:, :, j] += p.mT.matmul(g)
        return *(s.to(q.dtype) for s in sums), None, None, None, None


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
        return Tiled.apply(Q, K, V, mask, causal, self.scale, self.block_size)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Self-attention of x."""
        b, n, d = x.shape
        want = (b, self.num_heads, n, n)
        if mask is not None and (mask.ndim != 4 or any(s not in (1, w) for s, w in zip(mask.shape, want, strict=True))):
            raise ValueError(f"the mask is {mask.shape}; it does not broadcast to {want}")
        q, k, v = (p(x).view(b, n, self.num_heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out, _ = self.flash_attention_forward(q, k, v, mask=mask, causal=causal)
        return self.o_proj(out.transpose(1, 2).reshape(b, n, d))


class StandardAttention(FlashAttention):
    """The same layer with all scores at once."""

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Self-attention of x."""
        q, k, v = (
            p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = torch.einsum("bhnd,bhmd->bhnm", q * self.scale, k)
        return self.o_proj(torch.einsum("bhnm,bhmd->bnhd", scores.softmax(-1), v).flatten(2))


def benchmark_attention(seq_lengths: Sequence[int], d_model: int = 512, num_heads: int = 8) -> list[dict[str, float]]:
    """Compares both forms, each a module of its own with the same weights."""
    rows = []
    for n in seq_lengths:
        x = torch.randn(1, n, d_model)
        flash, plain = FlashAttention(d_model, num_heads), StandardAttention(d_model, num_heads)
        plain.load_state_dict(flash.state_dict())
        measured = {}
        outputs = {}
        for name, module in {"standard": plain, "flash": flash}.items():
            module.requires_grad_(False)
            times = []
            for _ in range(3):
                start = time.perf_counter()
                outputs[name] = module(x)
                times.append(time.perf_counter() - start)
            measured[f"{name}_seconds"] = statistics.median(times)
            measured[f"{name}_peak_bytes"] = peak_bytes(partial(module, x))
        torch.testing.assert_close(outputs["standard"], outputs["flash"], atol=1e-4, rtol=0)
        error = torch.linalg.vector_norm(outputs["standard"] - outputs["flash"], ord=math.inf)
        rows.append({"seq_len": float(n), **measured, "max_abs_error": error.item()})
    return rows
