"""The answer to ex03, Memory-efficient (flash) attention."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import perf_counter
from typing import Any
from weakref import WeakSet, finalize

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_LOG2_E = math.log2(math.e)


class _BlockwiseAttention(torch.autograd.Function):
    """Attention block by block, forward and backward.

    Scores are kept in units of log 2: on a CPU exp2 is several times faster than exp, and the factor is free.
    """

    @staticmethod
    def forward(
        ctx: Any, Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None, causal: bool, scale: float, block_size: int
    ) -> tuple[Tensor, Tensor]:
        """Returns the output [B, H, N, Dh] and the logsumexp [B, H, N]."""
        q, k, v = (x.flatten(0, 1) for x in (Q, K, V))  # [BH, N, Dh], [BH, M, Dh]
        work = torch.promote_types(Q.dtype, torch.float32)
        blocks = _Blocks(Q, K, mask, causal, block_size)
        buffer = blocks.new_buffer(work)
        output = torch.zeros_like(q, dtype=work)  # [BH, N, Dh]
        logsumexp = q.new_empty(*q.shape[:2], 1, dtype=work)  # [BH, N, 1]

        for rows in blocks.rows():
            q_rows = q[:, rows].to(work) * (scale * _LOG2_E)  # [BH, n, Dh]
            accumulator = output[:, rows]
            total = torch.zeros_like(logsumexp[:, rows])  # [BH, n, 1]
            # The lowest number, not -inf: in a row that is masked so far, the difference of two maxima must be 0.
            maximum = torch.full_like(total, torch.finfo(work).min)
            for columns in blocks.columns(rows):
                scores = blocks.view(buffer, rows, columns)  # [BH, n, m]
                torch.bmm(q_rows, k[:, columns].to(work).mT, out=scores)
                blocks.hide_(scores, rows, columns)
                new_maximum = torch.maximum(maximum, scores.amax(-1, keepdim=True))
                weights = scores.sub_(new_maximum).exp2_()
                rescale = maximum.sub_(new_maximum).exp2_()
                total.mul_(rescale).add_(weights.sum(-1, keepdim=True))
                accumulator.mul_(rescale).baddbmm_(weights, v[:, columns].to(work))
                maximum = new_maximum
            accumulator.div_(total.masked_fill(total == 0, 1))
            logsumexp[:, rows] = maximum + total.log2()

        result = output.to(Q.dtype).view(Q.shape)
        ctx.save_for_backward(Q, K, V, mask, result, logsumexp)
        ctx.options = causal, scale, block_size
        natural = (logsumexp / _LOG2_E).view(Q.shape[:3])
        ctx.mark_non_differentiable(natural)
        return result, natural

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of Q, K and V."""
        Q, K, V, mask, result, logsumexp = ctx.saved_tensors
        causal, scale, block_size = ctx.options
        q, k, v, output, grad = (x.flatten(0, 1) for x in (Q, K, V, result, grads[0]))
        work = logsumexp.dtype
        blocks = _Blocks(Q, K, mask, causal, block_size)
        buffer, grad_buffer = blocks.new_buffer(work), blocks.new_buffer(work)
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=work) for x in (q, k, v))

        for rows in blocks.rows():
            q_rows = q[:, rows].to(work) * (scale * _LOG2_E)  # [BH, n, Dh]
            grad_rows = grad[:, rows].to(work)  # [BH, n, Dh]
            row_sum = (grad_rows * output[:, rows]).sum(-1, keepdim=True)  # [BH, n, 1]
            shift = logsumexp[:, rows].nan_to_num(neginf=0.0)  # all scores of such a row are -inf
            for columns in blocks.columns(rows):
                k_columns, v_columns = k[:, columns].to(work), v[:, columns].to(work)  # [BH, m, Dh]
                scores = blocks.view(buffer, rows, columns)  # [BH, n, m]
                torch.baddbmm(shift, q_rows, k_columns.mT, beta=-1, out=scores)
                blocks.hide_(scores, rows, columns)
                weights = scores.exp2_()
                grad_v[:, columns].baddbmm_(weights.mT, grad_rows)
                grad_scores = blocks.view(grad_buffer, rows, columns)  # [BH, n, m]
                torch.baddbmm(row_sum, grad_rows, v_columns.mT, beta=-1, out=grad_scores)
                grad_scores.mul_(weights)
                grad_q[:, rows].baddbmm_(grad_scores, k_columns, alpha=scale)
                grad_k[:, columns].baddbmm_(grad_scores.mT, q_rows, alpha=1 / _LOG2_E)

        given = zip((grad_q, grad_k, grad_v), (Q, K, V), strict=True)
        return *(gradient.to(x.dtype).view(x.shape) for gradient, x in given), None, None, None, None


class _Blocks:
    """The blocks that an attention visits, and what each of them may see."""

    def __init__(self, Q: Tensor, K: Tensor, mask: Tensor | None, causal: bool, size: int) -> None:
        self.leading, self.device = Q.shape[:2], Q.device
        self.n, self.m, self.size = Q.size(2), K.size(2), size
        self.diagonal = self.m - self.n if causal else None
        # A view: it takes no memory.
        self.mask = None if mask is None else mask.expand(*self.leading, self.n, self.m)

    def rows(self) -> Iterator[slice]:
        """The blocks of queries."""
        return self._slices(self.n)

    def columns(self, rows: slice) -> Iterator[slice]:
        """The blocks of keys that some of these queries may see."""
        return self._slices(self.m if self.diagonal is None else min(self.m, rows.stop + self.diagonal))

    def hide_(self, scores: Tensor, rows: slice, columns: slice) -> None:
        """Sets scores [BH, n, m] that may not be seen to -inf."""
        if self.diagonal is not None and columns.stop > rows.start + self.diagonal + 1:
            above = rows.start + self.diagonal + 1 - columns.start
            scores.add_(scores.new_full(scores.shape[1:], -math.inf).triu_(above))
        if self.mask is not None:
            scores.unflatten(0, self.leading).masked_fill_(self.mask[:, :, rows, columns] == 0, -math.inf)

    def new_buffer(self, dtype: torch.dtype) -> Tensor:
        """Room for the largest block: memory that is used again is still in the cache."""
        n, m = min(self.n, self.size), min(self.m, self.size)
        return torch.empty(self.leading.numel() * n * m, dtype=dtype, device=self.device)

    def view(self, buffer: Tensor, rows: slice, columns: slice) -> Tensor:
        """The part of a buffer that a block needs, as [BH, n, m]."""
        shape = (self.leading.numel(), rows.stop - rows.start, columns.stop - columns.start)
        return buffer[: math.prod(shape)].view(shape)

    def _slices(self, length: int) -> Iterator[slice]:
        return (slice(start, min(start + self.size, length)) for start in range(0, length, self.size))


class FlashAttention(nn.Module):
    """Self-attention that never holds more than a block of its scores.

    Args:
        d_model: number of features D; a multiple of `num_heads`.
        num_heads: number of heads H.
        block_size: number of queries and of keys in a block of scores, up to a small factor; at least 1.
    """

    def __init__(self, d_model: int, num_heads: int, block_size: int = 64) -> None:
        super().__init__()
        # Given; no need to change.
        if d_model % num_heads != 0:
            raise ValueError(f"d_model {d_model} is not a multiple of num_heads {num_heads}")
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
        """Attention of Q over K and V, block by block.

        Args:
            Q: [B, H, N, Dh].
            K: [B, H, M, Dh].
            V: [B, H, M, Dh].
            mask: bool or 0/1, broadcasts to [B, H, N, M]; true or 1 = may attend.
            causal: query i attends to the keys j <= i + M - N only.

        Returns:
            The output [B, H, N, Dh], and the logsumexp of the scaled, masked scores [B, H, N].
        """
        return _BlockwiseAttention.apply(Q, K, V, mask, causal, self.scale, self.block_size)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Self-attention of x.

        Args:
            x: [B, N, D].
            mask: bool or 0/1, broadcasts to [B, H, N, N]; true or 1 = may attend.
            causal: position i attends to the positions up to i only.

        Returns:
            [B, N, D].

        Raises:
            ValueError: the mask does not have 4 dimensions, each of size 1 or that of [B, H, N, N]; the message names
                both shapes.
        """
        if mask is not None:
            self._check_mask(mask, (x.size(0), self.num_heads, x.size(1), x.size(1)))
        projections = (self.q_proj, self.k_proj, self.v_proj)
        Q, K, V = (linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for linear in projections)
        output, _ = self.flash_attention_forward(Q, K, V, mask, causal)  # [B, H, N, Dh]
        return self.o_proj(output.transpose(1, 2).flatten(start_dim=2))  # [B, N, D]

    @staticmethod
    def _check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
        fits = mask.dim() == 4 and all(size in (1, full) for size, full in zip(mask.shape, shape, strict=True))
        if not fits:
            raise ValueError(f"mask of shape {tuple(mask.shape)} does not broadcast to {shape}")


def benchmark_attention(seq_lengths: Sequence[int], d_model: int = 512, num_heads: int = 8) -> list[dict[str, float]]:
    """Compares FlashAttention with standard attention at inference: the whole module, without mask or gradients.

    For each length both forms take the same random float32 x [1, N, d_model] and the same weights. "flash" calls a
    FlashAttention of the default block size, one for all lengths or a new one for each. "standard" is your own code: it
    projects with the same layers, but makes all scores at once. All numbers are measured, in this very call.

    Args:
        seq_lengths: the lengths N.
        d_model: number of features D.
        num_heads: number of heads H.

    Returns:
        A list with a row per length, in order, of Python numbers (int or float):
        seq_len: N.
        standard_seconds, flash_seconds: time of one call in seconds, more than 0; of several calls, the mean or the
            shortest. `peak_bytes` slows a call down: measure time without it.
        standard_peak_bytes, flash_peak_bytes: what `peak_bytes` says of one call, first or later; x and the weights
            were there before and do not count. flash is right to 20 %. standard is one to five tensors of H·N² floats
            of 4 bytes, at lengths where these are the largest.
        max_abs_error: the largest absolute difference between the two outputs, below 1e-4; 0 only for N <= 64.
    """
    return [_compare(length, d_model, num_heads) for length in seq_lengths]


@torch.no_grad()
def _compare(length: int, d_model: int, num_heads: int) -> dict[str, float]:
    """A row of the benchmark."""
    attention = FlashAttention(d_model, num_heads)
    x = torch.randn(1, length, d_model)
    standard, flash = partial(_standard_attention, attention, x), partial(attention, x)
    return {
        "seq_len": length,
        "standard_seconds": _seconds(standard),
        "flash_seconds": _seconds(flash),
        "standard_peak_bytes": peak_bytes(standard),
        "flash_peak_bytes": peak_bytes(flash),
        "max_abs_error": (standard() - flash()).abs().max().item(),
    }


def _standard_attention(attention: FlashAttention, x: Tensor) -> Tensor:
    """What `attention(x)` gives, with all scores written down at once."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (linear(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for linear in projections)
    weights = (q @ k.mT * attention.scale).softmax(-1)  # [B, H, N, N]
    return attention.o_proj((weights @ v).transpose(1, 2).flatten(start_dim=2))  # [B, N, D]


def _seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """The shortest time of one call, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = perf_counter()
        function()
        times.append(perf_counter() - start)
    return min(times)


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes of tensor storage that `function()` holds at once, of those that it makes itself.

    Given; no need to change.
    """
    with _Allocations() as seen:
        function()
    return seen.peak


class _Allocations(TorchDispatchMode):
    """Follows every storage that is made while it is on, for as long as the storage lives."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: WeakSet[UntypedStorage] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._known.update(_storages((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._known:
                self._known.add(storage)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                finalize(storage, self._forget, storage.nbytes()).atexit = False
        return result

    def _forget(self, size: int) -> None:
        self.alive -= size


def _storages(values: Any) -> list[UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
