"""Each block gives a softmax, its values and torch.logsumexp; partial results are merged by logaddexp."""

import math
import time
from collections.abc import Iterator, Sequence
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


def blocks(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each block."""
    for start in range(0, length, size):
        yield start, min(start + size, length)


class Merged(torch.autograd.Function):
    """Attention from partial results."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, size: int) -> Any:
        """Output and logsumexp."""
        n, m = q.size(-2), k.size(-2)
        kind = torch.promote_types(torch.float32, q.dtype)
        ctx.kind, ctx.args = kind, (causal, size)
        out = q.new_zeros(q.shape, dtype=kind)
        lse = q.new_full(q.shape[:-1], -math.inf, dtype=kind)
        for i, i2 in blocks(n, size):
            for j, j2 in blocks(m, size):
                if causal and j > i2 - 1 + m - n:
                    continue
                scores = q[:, :, i:i2].to(kind) @ k[:, :, j:j2].to(kind).mT * q.size(-1) ** -0.5
                hide = hidden(mask, causal, i, j, i2 - i, j2 - j, (n, m), q.device)
                if hide is not None:
                    scores = scores.masked_fill(hide, -math.inf)
                part_lse = torch.logsumexp(scores, -1)
                part = torch.softmax(scores, -1).nan_to_num(0.0) @ v[:, :, j:j2].to(kind)
                both = torch.logaddexp(lse[:, :, i:i2], part_lse)
                safe = both.clamp(min=torch.finfo(kind).min)
                old_share, new_share = ((x - safe).exp()[..., None] for x in (lse[:, :, i:i2], part_lse))
                out[:, :, i:i2] = out[:, :, i:i2] * old_share + part * new_share
                lse[:, :, i:i2] = both
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, mask, result, lse)
        return result, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor, _: Tensor) -> Any:
        """Gradients of q, k and v, each query block after the other."""
        q, k, v, mask, out, lse = ctx.saved_tensors
        causal, size = ctx.args
        kind, scale, n, m = ctx.kind, q.size(-1) ** -0.5, q.size(-2), k.size(-2)
        dq = []
        dk, dv = (torch.zeros(k.shape, dtype=kind, device=k.device) for _ in range(2))
        for i, i2 in blocks(n, size):
            part = torch.zeros_like(q[:, :, i:i2], dtype=kind)
            g = do[:, :, i:i2].to(kind)
            for j, j2 in blocks(m, size):
                scores = q[:, :, i:i2].to(kind) @ k[:, :, j:j2].to(kind).mT * scale
                weights = (scores - lse[:, :, i:i2].unsqueeze(-1)).exp()
                hide = hidden(mask, causal, i, j, i2 - i, j2 - j, (n, m), q.device)
                if hide is not None:
                    weights = torch.where(hide, torch.zeros((), dtype=kind, device=q.device), weights)
                dv[:, :, j:j2] += torch.einsum("bhnm,bhnd->bhmd", weights, g)
                inner = g @ v[:, :, j:j2].to(kind).mT
                inner = weights * (inner - (g * out[:, :, i:i2].to(kind)).sum(-1, keepdim=True))
                part += inner @ k[:, :, j:j2].to(kind)
                dk[:, :, j:j2] += torch.einsum("bhnm,bhnd->bhmd", inner, q[:, :, i:i2].to(kind))
            dq.append(part * scale)
        return torch.cat(dq, -2).to(q.dtype), (dk * scale).to(k.dtype), dv.to(v.dtype), None, None, None


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
        output, lse = Merged.apply(Q, K, V, mask, causal, self.block_size)
        return output, lse.detach()

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
