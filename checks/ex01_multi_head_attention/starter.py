"""ex01: Multi-head attention

Attention lets each position of a sequence read from all others. Several heads do so side by side,
each in its own slice of the features, so that one layer follows several relations at once.
You write this layer, the core of every transformer, from matrix products and a softmax.

Steps
1. Attention without masks (40 min): 1.1, 1.6
2. Masks, roles and dropout (45 min): 1.2, 1.4, 1.5, 1.8
3. Memory and half precision (50 min): 1.3, 1.7
4. Your own test, and style (40 min): 1.9, 1.10

Requirements
1.1 (correctness) Support variable sequence lengths: each call may have another B, Lq and Lk,
    all 1 or more. A batch row gives what it gives alone.
1.2 (robustness) Handle padding masks: a masked key has a weight of exactly 0.
    - Masks may differ per batch row, head, query and key, and change in place between calls.
    - A key that is masked for all queries changes nothing, even where key and value hold ±1e6
      (in float32 and float64). It and its value get a gradient of exactly 0.
    - A fully masked row, also of one head alone, has zero weights. No gradient is NaN.
    - `forward` refuses a mask of a bad shape: a ValueError names the mask's shape and the scores'.
      The next call works as usual.
    - A d_model that num_heads does not divide is a ValueError that names both numbers.
1.3 (efficiency) Be memory efficient: you make no tensor with more elements than the scores,
    in forward or in backward: no [B, H, Lq, Lk, Dh].
    - Nothing of the scores' size is made of a smaller mask, alone or with constants: broadcast it.
    - In float32, at most 5 tensors of the scores' size are alive at once in eval without gradients.
    - In float32 with dropout 0, at most 4 are alive after forward while only the output is held.
    - Between calls a module keeps nothing but its parameters and what this text names; no input, no
      mask, no result.
1.4 (correctness) Support self- and cross-attention: query, key and value are three tensors, or one
    tensor in several roles. They may overlap in memory and have any strides.
    - Inputs are never written to, not even to be restored. Neither are masks and parameters.
    - Inputs that were edited in place count as they are now.
1.5 (correctness) Scale and drop out properly: `compute_attention_scores` returns q kᵀ / √Dh.
    - Dropout drops single attention weights, and nothing else. A kept one is w / (1 - p), so that
      the mean stays, in half precision too: p = 0.998 keeps 2 of 1000.
    - It goes by the mode alone: on in training, also without gradients, and off in eval.
    - p is `dropout.p` at the time of the call. 0 drops nothing, 1 everything.
    - The same torch.manual_seed drops the same weights; the next call drops others.
1.6 (correctness) Agree with PyTorch: output, attention weights and every gradient equal those of
    `nn.MultiheadAttention` with the same parameters, in float64 to 1e-9, in training and in eval.
    - Nothing is computed below the input's dtype.
    - Weights may change between calls, in place, by loading or by a cast; the next call uses the
      new ones. So it does after an edit of `.data`, or with a layer replaced by another nn.Linear.
    - Earlier calls change nothing, in any mode, with gradients or without; nor do other modules.
1.7 (robustness) Work in float16, bfloat16 and autocast: with and without a mask.
    - Inputs of unit scale, layers as nn.Linear initialises them: output and weights are within
      5e-3 (float16) or 5e-2 (bfloat16) of the formula in float64, over 4096 keys too.
    - Inputs 6 times as large, or all near 9 or -9: output, weights and gradients are finite, and
      the weights of a row sum to 1 within 2e-2.
    - Scores around ±100 in float32 and ±1000 in float64 still give the formula's result.
    - The module may be cast between calls, or moved to another device, meta too.
1.8 (correctness) Write it from scratch: no prebuilt attention is reached, in any mode or dtype
    (F.scaled_dot_product_attention, nn.MultiheadAttention, flex_attention, and their kernels).
1.9 (correctness) Write your own test: `test_multihead_attention` passes on right code, whoever
    wrote it, and fails on each of the slips listed below.
1.10 (readability) Reads well: ruff (E, F, W, B; lines up to 120; a docstring, not an empty one, for
    each public class and function) and mypy (typed definitions, not --strict) find nothing.
    It counts once at least half of the other requirements are earned.

In plain text
    q, k, v    = q_linear(query), k_linear(key), v_linear(value)
    q_h        = columns h·Dh … (h+1)·Dh - 1 of q; k_h and v_h likewise
    scores_h   = q_h k_hᵀ / √Dh
    weights_h  = dropout(softmax(scores_h))      over the keys; masked keys take no part
    output     = output_linear(concat(weights_0 v_0 … weights_{H-1} v_{H-1}))

Shapes
    B batch rows, Lq queries, Lk keys, D = d_model features, H = num_heads heads, Dh = D / H
    query [B, Lq, D]    key, value [B, Lk, D]    mask: broadcasts to [B, H, Lq, Lk]
    q_h [Lq, Dh] and k_h, v_h [Lk, Dh] per batch row    scores, weights [B, H, Lq, Lk]
    output [B, Lq, D]

    Two positions of D = 6 features become H = 2 heads of Dh = 3: [L, D] -> [H, L, Dh]
      a b c d e f          head 0   a b c     head 1   d e f
      g h i j k l                   g h i              j k l
    A bare view as [H, L, Dh] gives head 0 a b c and d e f: two parts of one position.

By hand
    One query of one head, Dh = 4; keys 0, 1 and 2, of which key 2 is masked; values of one number
      q kᵀ             4        2        6
      / √4             2        1        3
      mask             1        1        0
      weights     0.7311   0.2689        0     e²/(e² + e¹), e¹/(e² + e¹), exactly 0
      value           10       20      1e6
      context     0.7311·10 + 0.2689·20 = 12.689

    The same row               weights                    context
      no mask                  0.2447  0.0900  0.6652     665245: the padding leaks
      mask 0 0 0               0       0       0          0; left is output_linear's bias
      p = 0.5 drops key 1      1.4621  0       0          14.621

Conventions
- A mask is boolean or 0/1 in uint8, int32, int64, float32 or float64; true or 1 means "may attend".
  `nn.MultiheadAttention`'s masks mean the opposite.
- A mask has 4 dimensions, each 1 or the scores' size, and any strides: [B, 1, 1, Lk] for padding,
  [1, 1, Lq, Lk] for causal. [B, Lk] is refused: with B = Lq it would be read as [Lq, Lk].
- An error gives shapes as Python prints them, in any brackets: `2, 1, 1, 5`.
- The weights returned are those that were multiplied with the values, after dropout. They carry
  gradient.
- Output and weights have the query's dtype; under autocast they may have autocast's.
- `compute_attention_scores` may give float32 for q and k in half precision.
- `apply_mask` gets valid masks only. It may fill with -inf or with the dtype's lowest number.
- "Within t" means |came - wanted| ≤ t · (1 + |wanted|). Where no number stands, t is 1e-5 in
  float64 and 2e-5 in float32; in float32 it is 2e-3 for gradients and for scores around ±100.
- Inputs that share memory are inputs of their own: x and x.detach() get a gradient each.
- The 5 and the 4 of 1.3 count bytes that a call makes: the returned weights too (autograd holds
  them), and a boolean tensor as a quarter of a float32 one. Inputs, the caller's mask, parameters,
  views and tensors smaller than the scores are free.
- 1.3's sizes apply where H·Lq > 3·D, H·Lk > 3·D and B·H·Lq·Lk > 3·D²: scores are largest there.
- A module may keep numbers, flags and, in all, less than 4·D bytes of constant tensors.
- Nothing else is kept anywhere (1.3): no attribute, closure or cache of the file, no exception
  of a refused call, since its frames hold the inputs. Reference cycles may wait for the
  garbage collector.
- The given layers stay plain nn.Linear under their names, without hooks.
- A submission is one file on torch and the standard library.

Not defined
- B, Lq, Lk, d_model or num_heads of 0; inputs that do not fit each other or the layer
- masks with other values or dtypes; masked keys of ±1e6 in half precision, of inf or NaN
- `layer.training` and `layer.dropout.training` that differ; which weights a seed drops
- what `apply_mask` makes of a fully masked row; whether `compute_attention_scores` writes to q or k
- weights that change inside one autocast region, where torch caches its casts of them
- whether `forward` calls these two; how exact gradients are in half precision
- double backward, torch.compile, copies of a module; speed

Your own test (1.9) runs on other implementations, right and wrong, in place of your class.
It may use MultiHeadAttention with its methods, the four given layers and `dropout`; torch, also
nn.MultiheadAttention; and helpers of yours in this file. It may not rely on other attributes, on
which weights a seed drops, or on the last digits. `apply_mask` may write to its scores.
It sets its own seed and takes at most 1 s. How to see
- heads and projections: sizes that all differ, another tensor for value than for key, and
  nn.MultiheadAttention with the same weights beside it
- dropout in eval: a module with dropout 0.5
It has to fail on each of these slips:
- no_scale: the scores are not divided by √head_dim
- scale_by_d_model: the scores are divided by √d_model
- no_transpose: the projections are viewed as [B, H, L, Dh] without a transpose
- softmax_over_queries: the softmax runs over the queries
- inverted_mask: true in the mask forbids instead of allows
- mask_ignored: the mask does nothing
- nan_for_masked_rows: a fully masked row gives NaN
- values_from_key: the values are projected from key
- dropout_in_eval: dropout acts in eval mode too
- no_output_projection: output_linear is left out

Discuss
1. Scale to production: how do you serve this layer at 128k tokens of context on several GPUs?
2. Limits: where does it fail first as Lq and Lk grow, and how would you know beforehand?
3. Monitoring: which numbers show trouble early in training (collapsed heads, overflow)?
4. Next: what would you optimise next, and how would you prove that it helped?

Sources
- Vaswani et al. 2017, "Attention is all you need", section 3.2: https://arxiv.org/abs/1706.03762
"""

from torch import Tensor, nn


class MultiHeadAttention(nn.Module):
    """Multi-head attention with separate projections for query, key, value and output.

    Args:
        d_model: number of features D; a multiple of `num_heads`.
        num_heads: number of heads H.
        dropout: probability that an attention weight is dropped in training.

    Raises:
        ValueError: `d_model` is no multiple of `num_heads`; the message names both numbers.
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        # TODO(1.1): keep the numbers that forward needs.
        # TODO(1.2): refuse a d_model that num_heads does not divide.

        # Given; no need to change.
        self.q_linear = nn.Linear(d_model, d_model)
        self.k_linear = nn.Linear(d_model, d_model)
        self.v_linear = nn.Linear(d_model, d_model)
        self.output_linear = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attends from every query to every key that the mask allows.

        Args:
            query: [B, Lq, D].
            key: [B, Lk, D].
            value: [B, Lk, D].
            mask: boolean or 0/1, 4 dimensions, broadcasts to [B, H, Lq, Lk]; true or 1 means "may attend".

        Returns:
            The output [B, Lq, D] and the weights after dropout [B, H, Lq, Lk].

        Raises:
            ValueError: the mask has not 4 dimensions or does not broadcast to [B, H, Lq, Lk]; the message names the
                mask's shape and the scores'.
        """
        # TODO(1.1, 1.4): project, and split the features into heads: [B, L, D] -> [B, H, L, Dh].
        # TODO(1.6, 1.8): take the softmax of the scores over the keys, multiply with the values, join heads, project.
        # TODO(1.2): refuse a mask of a bad shape; apply it before the softmax; give fully masked rows weights of 0.
        # TODO(1.5): drop weights, by the module's mode and dropout.p.
        # TODO(1.3): make nothing larger than the scores, and keep nothing.
        raise NotImplementedError("TODO 1.1: forward")

    def compute_attention_scores(self, q: Tensor, k: Tensor) -> Tensor:
        """The scores q kᵀ / √Dh of every query with every key.

        Args:
            q: [B, H, Lq, Dh].
            k: [B, H, Lk, Dh].

        Returns:
            [B, H, Lq, Lk].
        """
        # TODO(1.5, 1.6): multiply q and kᵀ, and scale by 1/√Dh.
        # TODO(1.7): scale where half precision does not overflow.
        raise NotImplementedError("TODO 1.5: compute_attention_scores")

    def apply_mask(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Makes masked scores so low that a softmax in their dtype gives exactly 0; leaves the others.

        Args:
            scores: [B, H, Lq, Lk]; may be written to.
            mask: a valid mask, as in forward.

        Returns:
            [B, H, Lq, Lk], in the scores' dtype.
        """
        # TODO(1.2): fill where the mask is 0, whatever its dtype, with a number that suits the scores' dtype.
        raise NotImplementedError("TODO 1.2: apply_mask")


def test_multihead_attention() -> None:
    """Your own test of MultiHeadAttention: passes on right code, fails on each slip listed above."""
    # TODO(1.9): build small modules with sizes that differ, and assert what right code does.
    # TODO(1.10): type and document what you add; remove what ruff and mypy find.
    raise NotImplementedError("TODO 1.9: test_multihead_attention")
