"""Each block of queries is checkpointed; there is no torch.autograd.Function."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which blocks are computed: float32 for half precision, else the input's own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _ranges(length: int, block_size: int) -> Iterator[slice]:
    """Cuts 0 … length into blocks; the last may be smaller."""
    for start in range(0, length, block_size):
        yield slice(start, min(start + block_size, length))


def _visible_keys(rows: slice, n: int, m: int, block_size: int, causal: bool) -> Iterator[slice]:
    """The key blocks that hold a key that some query of `rows` may see."""
    visible = min(m, max(0, rows.stop + m - n)) if causal else m  # The last query of the block sees keys below this.
    for cols in _ranges(m, block_size):
        if cols.start >= visible:
            return
        yield cols


def _masked_scores(q: Tensor, k: Tensor, mask: Tensor | None, rows: slice, cols: slice, shift: int | None) -> Tensor:
    """One block of scores, -inf where a query may not attend.

    Args:
        q: the scaled queries of the block.
        k: the keys of the block.
        mask: the whole mask; only its part for this block is read.
        rows: which queries these are.
        cols: which keys these are.
        shift: M - N if causal, else None.
    """
    scores = q @ k.transpose(-2, -1)
    if mask is not None:
        part = mask if mask.shape[2] == 1 else mask[:, :, rows]
        part = part if mask.shape[3] == 1 else part[:, :, :, cols]
        scores.masked_fill_(part == 0, float("-inf"))
    if shift is not None and cols.stop - 1 > rows.start + shift:  # The block crosses the diagonal.
        i = torch.arange(rows.start, rows.stop, device=q.device).unsqueeze(-1)
        j = torch.arange(cols.start, cols.stop, device=q.device)
        scores.masked_fill_(j > i + shift, float("-inf"))
    return scores


def _check_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> None:
    """Raises a ValueError unless the mask has 4 dimensions and broadcasts to `shape` without enlarging it."""
    if mask.dim() != 4 or any(size not in (1, full) for size, full in zip(mask.shape, shape, strict=True)):
        raise ValueError(f"mask of shape {tuple(mask.shape)} does not broadcast to [B, H, N, M] = {shape}")


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
        if mask is not None:
            _check_mask(mask, (*Q.shape[:3], K.shape[2]))
        n, m, dtype = Q.shape[2], K.shape[2], _work_dtype(Q.dtype)
        if Q.dtype != dtype:  # Around the casts, a checkpoint too: gradients of K and V then add up in float32.

            def whole(*given: Tensor) -> tuple[Tensor, Tensor]:
                Q, K, V = (x.to(dtype) for x in given)
                return self.flash_attention_forward(Q, K, V, mask, causal)

            output, logsumexp = checkpoint(whole, Q, K, V, use_reentrant=False)
            return output.to(Q.dtype), logsumexp
        shift = m - n if causal else None

        def block(q0: Tensor, K: Tensor, V: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            q = q0.to(dtype) * self.scale
            top = q.new_full((*q.shape[:3], 1), float("-inf"))
            total, acc = torch.zeros_like(top), torch.zeros_like(q)
            for cols in _visible_keys(rows, n, m, self.block_size, causal):
                scores = _masked_scores(q, K[:, :, cols].to(dtype), mask, rows, cols, shift)
                new = torch.maximum(top, scores.amax(-1, keepdim=True)).detach()
                safe = new.masked_fill(new == float("-inf"), 0.0)
                weights, decay = (scores - safe).exp(), (top - safe).exp()
                total = total * decay + weights.sum(-1, keepdim=True)
                acc = acc * decay + weights @ V[:, :, cols].to(dtype)
                top = new
            out = acc / total.masked_fill(total == 0, 1.0)
            return out.to(Q.dtype), (top + total.log()).squeeze(-1).detach()

        parts = [checkpoint(block, Q[:, :, r], K, V, r, use_reentrant=False) for r in _ranges(n, self.block_size)]
        return torch.cat([p[0] for p in parts], 2), torch.cat([p[1] for p in parts], 2)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Self-attention of x.

        Args:
            x: [B, N, D].
            mask: bool or 0/1, broadcasts to [B, H, N, N]; true or 1 = may attend.
            causal: position i attends to the positions up to i only.

        Returns:
            [B, N, D].

        Raises:
            ValueError: the mask has not 4 dimensions or does not broadcast to [B, H, N, N]; the message names the
                mask's shape and [B, H, N, N].
        """
        if mask is not None:
            _check_mask(mask, (x.shape[0], self.num_heads, x.shape[1], x.shape[1]))
        Q, K, V = self._heads(self.q_proj(x)), self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        output, _ = self.flash_attention_forward(Q, K, V, mask, causal)
        return self.o_proj(output.transpose(1, 2).reshape(x.shape))

    def _heads(self, features: Tensor) -> Tensor:
        """Splits [B, N, D] into heads [B, H, N, Dh]."""
        batch, length, width = features.shape
        return features.reshape(batch, length, self.num_heads, width // self.num_heads).transpose(1, 2)


def _standard_attention(module: FlashAttention, x: Tensor) -> Tensor:
    """Self-attention of x with the module's weights and all scores written down at once."""
    Q, K, V = (module._heads(proj(x)) for proj in (module.q_proj, module.k_proj, module.v_proj))
    weights = (Q @ K.transpose(-2, -1)).mul_(module.scale).softmax(-1)
    return module.o_proj((weights @ V).transpose(1, 2).reshape(x.shape))


def _seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """The median time of one call of `function`."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def benchmark_attention(seq_lengths: Sequence[int], d_model: int = 512, num_heads: int = 8) -> list[dict[str, float]]:
    """Compares FlashAttention with standard attention at inference: the whole module, without mask or gradients.

    For each length, one FlashAttention of the default block size is called on one random x [1, N, d_model]. "Standard"
    is attention with all scores written down at once, by your own code, from the same x and the same projections.

    Args:
        seq_lengths: the lengths N.
        d_model: number of features D.
        num_heads: number of heads H.

    Returns:
        A row per length, in order, with Python numbers:
        seq_len: N.
        standard_seconds, flash_seconds: time of one call, more than 0.
        standard_peak_bytes, flash_peak_bytes: what `peak_bytes` says of one call; x and the weights are not part of
            it. Standard takes at least one tensor of H·N² floats, and at most five; flash is held to within 20 %.
        max_abs_error: the largest absolute difference between the two outputs; with the same weights below 1e-4.
    """
    module = FlashAttention(d_model, num_heads).eval()
    rows: list[dict[str, float]] = []
    with torch.no_grad():
        for length in seq_lengths:
            x = torch.randn(1, length, d_model)

            def standard(x: Tensor = x) -> Tensor:
                """One call of the standard form."""
                return _standard_attention(module, x)

            def flash(x: Tensor = x) -> Tensor:
                """One call of the flash form."""
                return module(x)

            error = (standard() - flash()).abs().max().item()  # Warms both up, too.
            rows.append(
                {
                    "seq_len": length,
                    "standard_seconds": _seconds(standard),
                    "flash_seconds": _seconds(flash),
                    "standard_peak_bytes": peak_bytes(standard),
                    "flash_peak_bytes": peak_bytes(flash),
                    "max_abs_error": error,
                }
            )
    return rows
