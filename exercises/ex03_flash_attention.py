"""ex03: Memory-efficient (flash) attention

Standard attention writes down a score for every query and every key: N·M numbers, which at long
sequences take more memory than all the rest, and more time to move.
Flash attention visits the scores block by block. It keeps a running maximum and a running sum for
each query and holds one block at a time; its backward computes the blocks anew.
You write both in plain PyTorch, and measure what they save.

Steps
1. Attention block by block (40 min): 3.3, 3.2
2. The module (20 min): 3.4
3. Memory, work and precision (40 min): 3.1, 3.5, 3.7
4. Training (60 min): 3.6
5. The benchmark, and style (30 min): 3.8, 3.9, 3.10
Until step 4, work under `torch.no_grad()`: steps 1 to 3 then ask for no gradients, step 4 for all.

Requirements
3.1 (efficiency) Keep memory O(n), not O(n²): at inference you hold one block of scores at a time.
    - No tensor has more than 8·block_size² elements per batch row and head, or (Dh + 2)·N if that
      is more. This goes for scores, masks, positions and changed copies of K and V, for N = 1 too.
      Views are free, and so are float32 casts of Q, K and V, whole or in blocks.
    - At twice N and M the peak is less than 2.2 times as high. It is all that a call has alive at
      once, so many small tensors count together.
3.2 (robustness) Maintain numerical stability: results are right and gradients finite with
    - scores of a few hundred in float32, of up to a million in float64: of one sign or of both,
      rising or falling from key to key
    - rows that may attend to nothing, in some blocks or in all
    - keys that the mask hides and that hold 1e6, in K and V, in float32 and float64
3.3 (correctness) Support variable lengths: N and M may differ, and may be 1, smaller than a block,
    or no multiple of it, whatever the block_size and in any order of calls.
3.4 (correctness) Stay compatible with standard attention: you give its output and logsumexp,
    with masks of every form, causal or not. `forward` is the whole layer around it.
    The state_dict has the weights of the given layers, and nothing else.
3.5 (efficiency) Be faster on long sequences: you leave out what causal hides, and loop over blocks
    alone. What counts is forward without gradients; for seconds there is `make bench EX=3`.
    - At N = M = 16 blocks causal computes at most 0.65 of the exponentials of full attention, with
      any mask or none. Counted are the elements that exp, exp2, expm1, softmax and log_softmax
      return, for rescaling too; logsumexp is free. Without any of these, all results count.
    - Operations are calls of torch, each one whatever its size; views count. They grow no faster
      than the pairs of blocks, ⌈N/block_size⌉·⌈M/block_size⌉, and not with block_size.
3.6 (efficiency) Train in O(n) memory too: Q, K and V, and so x and the weights, get the gradients
    of standard attention.
    - Gradients are right also if only some of them need one, after other calls, in eval, and in a
      second backward (retain_graph=True). dO, the output's gradient, is an input with any strides.
    - New tensors that stay alive for backward, output and logsumexp included, have at most 1.5
      times the bytes of (Q, K, V, output, logsumexp): no float32 copies.
    - For N and M above Dh and block_size no tensor has N·M elements; the peak grows as in 3.1.
3.7 (robustness) Work in bfloat16 and float16: you cast Q, K and V, in blocks or whole, to float32,
    then scale and multiply. Scores, maximum, sum and accumulator are float32, backward's sums too.
    - On random Q, K and V (scores up to about 10, 20 blocks of keys, with a mask or without) the
      output's largest error against float64 is at most twice F.scaled_dot_product_attention's, and
      the logsumexp's at most 1e-4.
    - Nothing is computed below the input's dtype.
3.8 (correctness) Benchmark it: `benchmark_attention` measures both forms as its docstring says.
3.9 (correctness) From scratch: no prebuilt attention is reached, in any mode or dtype
    (F.scaled_dot_product_attention, nn.MultiheadAttention, flex_attention, and their kernels), nor
    in the benchmark. softmax is free.
3.10 (readability) Reads well: ruff (E, F, W, B; lines up to 120; a docstring, not an empty one, for
    each public class and function) and mypy (typed definitions, not --strict) find nothing.
    It counts once at least half of the other requirements are earned.

In plain text
    For one query q and its blocks of keys j = 1, 2, …: scores s_j = q K_jᵀ / √Dh, hidden ones -inf
      m_j = max(m_{j-1}, max s_j)                               m_0 = -inf   running maximum
      l_j = exp(m_{j-1} - m_j) · l_{j-1} + Σ exp(s_j - m_j)     l_0 = 0      running sum
      a_j = exp(m_{j-1} - m_j) · a_{j-1} + exp(s_j - m_j) V_j   a_0 = 0      accumulator
    At the end: output O = a / l, logsumexp L = m + log l

    Backward, from the output's gradient dO: P = exp(S - L), dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O)),
      dV = Pᵀ dO, dQ = dS K / √Dh, dK = dSᵀ Q / √Dh

Shapes
    B batch, N queries, M keys, D = d_model features, H = num_heads heads, Dh = D / H features of a
    head; Q and O [B, H, N, Dh], K and V [B, H, M, Dh], L [B, H, N], x [B, N, D]

By hand
    q = 1, K = (0, log 3, 5), V = (8, 4, 1e6), Dh = 1, block_size = 1; the mask hides the last key
      block   s        m        exp(m_old - m)   exp(s - m)   l        a
      start            -inf                                   0        0
      1       0        0        0                1            1        8
      2       1.0986   1.0986   0.3333           1            1.3333   6.6667
      3       -inf     1.0986   1                0            1.3333   6.6667
    O = 6.6667 / 1.3333 = 5 and L = 1.0986 + log 1.3333 = 1.3863, which is log 4
    If block 1 were hidden, m would still be -inf after it, and exp(-inf - -inf) is NaN: count it 0.

    Backward with dO = 1: P = (0.25, 0.75, 0) = dV, dO Vᵀ = (8, 4, 1e6), rowsum(dO ∘ O) = 5,
    dS = (0.75, -0.75, 0), dQ = -0.75 · 1.0986 = -0.8240, dK = (0.75, -0.75, 0)

    Causal, x where query i (down) may attend to key j, # where a block is computed
      N = 3, M = 5     N = 3, M = 2              4·4 blocks
      x x x . .        . .   O = 0, L = -inf     # . . .
      x x x x .        x .                       # # . .
      x x x x x        x x                       # # # .
                                                 # # # #
    That is 10 of 16 pairs of blocks; with 16·16 blocks it is 136 of 256, which is 0.53.

Conventions
- A mask is boolean or 0/1 in uint8, int32, int64, float32 or float64; true or 1 means "may attend".
- A mask has 4 dimensions, each of size 1 or that of [B, H, N, M]. `forward` refuses any other by a
  ValueError with the mask's shape and [B, H, N, N], as Python prints them: `2, 1, 1, 5`.
- `causal` aligns the last query with the last key, as decoding with a cache needs it: query i sees
  the keys j <= i + M - N. With a mask too, it sees what both allow.
- A row that may attend to nothing has output 0, logsumexp -inf and gradient 0, never NaN. A key
  that no query sees gets gradient 0 in K and V.
- The output has Q's dtype, whatever the module's is. logsumexp is in natural logarithms, and
  float32 or better: float64 for a float64 Q.
- block_size is any number >= 1, also larger than N and M. The 8·block_size² of 3.1 have room for
  2·block_size queries by 4·block_size keys.
- Inputs are never written to, not even to be restored; nor are results, by backward.
- Inputs and masks have any strides: transposed, expanded, overlapping. K and V may be one tensor,
  or all three.
- Between calls a module keeps nothing but its parameters and what this text names; no input, no
  mask, no result. Beside the module nothing that grows with N or M stays alive either (3.1).
- Weights may change between calls, in place, by loading or by a cast; the next call uses the new
  ones, edits of `.data`, a new nn.Linear as k_proj, and a mask changed in place or by `.data`.
- A first call in another dtype, under no_grad or in inference_mode does no harm to later ones.
- Tensors that you make are on the inputs' device. Positions are whole numbers: bfloat16 counts to
  256 only, float16 to 2048, int16 to 32767.
- A submission is one file on torch and the standard library.
- How near: a result may be off by this times (1 + |right value|). In
  brackets: what 3.7 asks for. Large scores are those of 3.2.
                                     float32   float64           half precision
    output, logsumexp                1e-5      1e-5 (3.7: 1e-9)  5e-2, logsumexp 1e-4
    gradients                        1e-5      1e-5 (3.7: 1e-9)  5e-2
    large scores: output, logsumexp  1e-3      1e-3 (3.7: 1e-7)  5e-2, logsumexp 1e-4
    large scores: gradients          0.5       0.5 (3.7: 1e-6)   -

Not defined
- What has a `-` in the table; gradients through `forward` in half precision.
- K and V of 1e6 in half precision, or in keys that causal alone hides.
- A mask, input or weight that changes between forward and backward.
- A gradient for logsumexp or a mask; gradients of gradients.
- Sizes of 0; NaN or infinity in inputs; masks with other values than 0 and 1.
- Shapes that do not fit in `flash_attention_forward`; Q, K and V of several dtypes or devices.
- Exponentials and operations of backward; blocks that only a mask hides: computed or left out.
- Autocast, compiling, copying or pickling a module.

Your own test
    None: the benchmark is where your code compares itself with the standard form.

Discuss
1. Scale to production: which of your blocks and loops map to what on a GPU (shared memory, thread
   blocks, several GPUs)? What changes for one token at a time against a cache of 128k keys?
2. Limits: at which lengths is flash attention no faster, or slower, than the standard form? Which
   features (dropout, returned weights, an additive bias) does it make hard?
3. Monitoring: which numbers tell you that a training run silently left the memory-efficient path,
   or that its softmax saturates?
4. Next: what would you optimise next (block sizes, skipped blocks, precision), and how would you
   prove that it helped?

Sources
- Dao et al. 2022, "FlashAttention", algorithms 1 and 4: https://arxiv.org/abs/2205.14135
- Dao 2023, "FlashAttention-2", section 3.1: https://arxiv.org/abs/2307.08691
- Milakov and Gimelshein 2018, "Online normalizer calculation for softmax":
  https://arxiv.org/abs/1805.02867
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet, finalize

from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# TODO(3.6): write a torch.autograd.Function here, under any name. Move the walk over the blocks to its forward, and
# save Q, K, V, the mask, the output and the logsumexp. In its backward compute each block of weights anew from the
# logsumexp.


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
        # TODO(3.3): walk over blocks of queries and of keys, the last ones smaller; until step 4 under torch.no_grad().
        # TODO(3.2): keep a running maximum and a running sum for each query; rescale sum and accumulator when it rises.
        # TODO(3.1): cut masks and positions into the same blocks; an expanded view costs nothing, its copy does.
        # TODO(3.5): leave out the blocks that lie wholly above the causal diagonal.
        # TODO(3.7): cast half precision to float32 before you scale and multiply.
        # TODO(3.6): return what your torch.autograd.Function's `apply` gives.
        # TODO(3.9): call no prebuilt attention.
        raise NotImplementedError("TODO 3.3: flash_attention_forward")

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
        # TODO(3.4): refuse a mask of a bad shape; then project x, split it into heads, attend, join the heads, project.
        raise NotImplementedError("TODO 3.4: forward")


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
    # TODO(3.8): for each length, time both forms, take the peak of each, and compare what they give.
    # TODO(3.9): write the standard form by matrix products and a softmax.
    # TODO(3.10): give what you have added types, and what is public a docstring.
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
