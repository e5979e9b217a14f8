"""ex03: Memory-efficient (flash) attention

Standard attention writes down the score of every query with every key: N·M numbers, which at long sequences cost more
memory, and more time for moving it, than all the rest. Flash attention visits the scores block by block, keeps a
running maximum and a running sum for each query, and never holds more than one block of them. Its backward computes
the blocks anew. You write both in plain PyTorch, and measure what they save.

Steps
1. Attention block by block (40 min): 3.2, 3.3, 3.9
2. The module (20 min): 3.4
3. Memory, work and precision (40 min): 3.1, 3.5, 3.7
4. Training (60 min): 3.6
5. The benchmark, and style (30 min): 3.8, 3.10

Requirements
3.1 (efficiency) Keep memory O(n), not O(n²): at inference no block of scores has more than 8·block_size² elements per
    batch row and head, no other tensor grows with N·M (not from a mask of any shape or dtype, and not for `causal`
    either; views are free), and the peak at twice the length (N and M) is less than 2.2 times the peak. Nothing that
    grows with N or M outlives a call but what it returns.
3.2 (robustness) Maintain numerical stability: logits 40 times as large give finite and right results, and so do a row
    maximum that rises from block to block, scores that are all very low, blocks in which a row may attend to nothing,
    rows that may attend to nothing at all, and masked keys whose K and V are 1e6.
3.3 (correctness) Support variable lengths: N and M may differ, and may be no multiples of the block, smaller than a
    block, or 1.
3.4 (correctness) Stay compatible with standard attention: exactly its state_dict, and in float64 to 1e-5 (absolute
    plus relative) its outputs and logsumexp, with masks of every form, causal or not, whatever was called before.
    Inputs may have any strides and are never written to, not even to be restored.
3.5 (efficiency) Be faster on long sequences (counted here, timed by `make bench EX=3`): causal attention at N = M = 16
    blocks, with a mask or without, computes at most 0.65 of the exponentials of full attention (both forward), and the
    number of operations grows no faster than the number of block pairs, ⌈N/block_size⌉·⌈M/block_size⌉.
3.6 (efficiency) Train in O(n) memory too: the gradients of Q, K and V equal those of standard attention, to 1e-5 again.
    Of what `flash_attention_forward` makes, at most 1.5 times the bytes of (Q, K, V, output, logsumexp) stay alive
    afterwards. Over forward and backward no tensor grows with N·M, and the peak at twice the length is less than 2.2
    times the peak.
3.7 (robustness) Work in bfloat16 and float16: against float64, the output's largest error is at most twice that of
    `F.scaled_dot_product_attention`, the logsumexp's at most 1e-4, the gradients' 5e-2. Half-precision blocks of Q, K
    and V become float32 before their product; scores, maximum, sum and accumulator are float32. Nothing is computed
    below the inputs' dtype: in float64 output, logsumexp and gradients are right to 1e-9.
3.8 (correctness) Benchmark it: `benchmark_attention` compares both forms on the same input with the same weights, and
    its numbers are measured: see its docstring.
3.9 (correctness) Write it from scratch: no prebuilt attention (`F.scaled_dot_product_attention`,
    `nn.MultiheadAttention`, flex_attention …) is reached, however it is called, in the benchmark neither. softmax is
    free.
3.10 (readability) Reads well: ruff (E, F, W, B, lines up to 120; a docstring for each class and function that you
    add) and mypy (typed definitions) find nothing. It earns once half of the other requirements do.

In plain text, for one query q and key blocks j = 1, 2, … with scores s_j = q K_jᵀ / √Dh
    m_j = max(m_{j-1}, max s_j)                      m_0 = -inf      running maximum
    l_j = exp(m_{j-1} - m_j) l_{j-1} + Σ exp(s_j - m_j)   l_0 = 0    running sum
    a_j = exp(m_{j-1} - m_j) a_{j-1} + exp(s_j - m_j) V_j a_0 = 0    accumulator
    output = a / l at the end, logsumexp L = m + log l

    backward, from dO: P = exp(S - L), dV = Pᵀ dO, dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O)), dQ = dS K / √Dh, dK = dSᵀ Q / √Dh

Shapes
    B batch, N queries, M keys, D = d_model features, H = num_heads heads, Dh = D / H features of a head

Conventions
- A mask is boolean or 0/1 in any of uint8, int32, int64, float32, float64. True or 1 means "may attend". It has 4
  dimensions, each of size 1 or that of [B, H, N, M]. Any other shape is a ValueError from `forward` that names both
  shapes, the mask's and [B, H, N, M], in figures, as in `(2, 1, 1, 5)`.
- `causal` aligns the last query with the last key, as decoding with a cache needs it: query i sees the keys
  j <= i + M - N. It may be combined with a mask.
- A row that may attend to nothing has output 0, logsumexp -inf and gradient 0, never NaN.
- block_size is any number >= 1, also larger than N and M. It bounds both sides of a block up to a small factor: 8 in
  all allows 2·block_size queries by 4·block_size keys. N and M are at least 1.
- logsumexp is that of the scaled, masked scores, in natural logarithms. It is float32 or better; the output has Q's
  dtype. No gradient through logsumexp is asked for.
- The module may be cast or moved and its weights changed between calls: keep nothing that was computed from them, and
  make tensors on the inputs' device. Autocast is not asked for.

Discuss
1. Scale to production: which of your blocks and loops map to what on a GPU (shared memory, thread blocks, several
   GPUs), and what changes for decoding one token at a time against a cache of 128k keys?
2. Limits: at which lengths is flash attention no faster, or even slower, than the standard form, and which masks or
   features (dropout, returned weights, an additive bias) does it make hard?
3. Monitoring: which numbers would you log to notice that a training run silently left the memory-efficient path, or
   that its softmax saturates?
4. Next: what would you optimise next (block sizes, skipped blocks, precision), and how would you prove that it
   helped?

Sources
- Dao et al. 2022, "FlashAttention", algorithms 1 and 4: https://arxiv.org/abs/2205.14135
- Dao 2023, "FlashAttention-2", section 3.1: https://arxiv.org/abs/2307.08691
- Milakov and Gimelshein 2018, "Online normalizer calculation for softmax": https://arxiv.org/abs/1805.02867
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet, finalize

from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# TODO(3.6): write a torch.autograd.Function here, under any name: its forward walks over the blocks and saves Q, K, V,
# the output and the logsumexp; its backward computes each block of weights anew from the logsumexp.


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
        # TODO(3.1, 3.3): walk over blocks of queries and of keys; the last ones may be smaller.
        # TODO(3.2): keep a running maximum and sum for each query, and rescale what is accumulated when it rises.
        # TODO(3.5): leave out the blocks that lie wholly above the causal diagonal.
        # TODO(3.6): return what your torch.autograd.Function's `apply` returns.
        # TODO(3.7): compute half precision in float32, block by block.
        # TODO(3.9): by matrix products and exponentials.
        raise NotImplementedError("TODO 3.1: flash_attention_forward")

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
        # TODO(3.4): refuse a mask of a bad shape; project, split into heads, attend, join the heads, project.
        raise NotImplementedError("TODO 3.4: forward")


def benchmark_attention(seq_lengths: Sequence[int], d_model: int = 512, num_heads: int = 8) -> list[dict[str, float]]:
    """Compares FlashAttention with standard attention at inference: the whole module, without mask or gradients.

    For each length, a FlashAttention of the default block size (the same or a new one) is called on one random float32
    x [1, N, d_model]. "Standard" is attention with all scores written down at once, by your own code, from the same x
    and the same projections.

    Args:
        seq_lengths: the lengths N.
        d_model: number of features D.
        num_heads: number of heads H.

    Returns:
        A row per length, in order, with Python numbers:
        seq_len: N.
        standard_seconds, flash_seconds: time of one call, more than 0.
        standard_peak_bytes, flash_peak_bytes: what `peak_bytes` says of one call; x and the weights are not part of
            it. Standard takes at least one tensor of H·N² floats, and at most five; flash is held to within 20 % of
            what a call takes.
        max_abs_error: the largest absolute difference between the two outputs; with the same weights below 1e-4.
    """
    # TODO(3.8): measure both forms for each length.
    # TODO(3.10): make lint-clean, typed code of it all.
    raise NotImplementedError("TODO 3.8: benchmark_attention")


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
