"""ex01: Multi-head attention

Attention lets every position of a sequence read from every other one. Several heads do so side by side, each in its
own slice of the features, so that one layer can follow several relations at once. You write it from matrix products
and a softmax.

Steps
1. Attention by the formula (40 min): 1.1, 1.4, 1.5, 1.6, 1.8
2. Masks (25 min): 1.2
3. Memory and half precision (40 min): 1.3, 1.7
4. Your own test, and style (30 min): 1.9, 1.10

Requirements
1.1 (correctness) Support variable sequence lengths: any number of queries and of keys, also 1. A batch row gives what
    it gives alone.
1.2 (robustness) Handle padding masks: a key that is masked out changes nothing, even if its values are 1e6 (in
    float32 and float64). Masks may differ per head and per batch row. A fully masked row gives zeros, never NaN, in
    the gradient neither. Every 0/1 dtype works. A mask of a bad shape and a bad d_model are refused.
1.3 (efficiency) Be memory efficient: where the scores are larger than the inputs, nothing with more elements than the
    scores is made (no [B, H, Lq, Lk, Dh]), and no smaller mask is expanded to their size in memory. In float32, at
    most 5 tensors of the scores' size are alive at once at inference, and at most 4 are kept for backward with
    dropout 0. Nothing of the last call stays alive in the module.
1.4 (correctness) Support self-attention and cross-attention: query, key and value may all differ, also in length (key
    and value share theirs), and may be equal or overlapping tensors, with any strides. Inputs and masks are never
    written to.
1.5 (correctness) Scale and drop out properly: the factor 1/√head_dim is inside `compute_attention_scores`. Dropout
    acts on the weights and on nothing else, in training only, keeps their mean, and follows torch's seed; a dropout
    of 0 drops nothing, one of 1 everything.
1.6 (correctness) Agree with PyTorch: output, weights and every gradient equal those of `nn.MultiheadAttention` with
    the same weights, in float64 to 1e-9: nothing computes below the inputs' dtype, which is judged here alone.
1.7 (robustness) Work in float16, bfloat16 and autocast: finite, and within 5e-3 (float16) or 5e-2 (bfloat16) of
    float64 for inputs of unit scale; finite for inputs 6 times as large; with and without a mask. Scores of ±100 in
    float32 and of ±1000 in float64 do no harm either, all of one sign or mixed.
1.8 (correctness) Write it from scratch: no prebuilt attention (`F.scaled_dot_product_attention`,
    `nn.MultiheadAttention`, flex_attention …) is reached, however it is called.
1.9 (correctness) Write your own test: `test_multihead_attention` passes on right code, whoever wrote it, and fails on
    each of the slips listed below.
1.10 (readability) Reads well: ruff (E, F, W, B, lines up to 120; a docstring for each public class and function
    that you add) and mypy (typed definitions, not --strict) find nothing. Counts once half of the other requirements
    are earned.

In plain text
    head_h  = softmax(q_h k_hᵀ / √Dh) v_h        q_h, k_h, v_h: columns h·Dh … (h+1)·Dh - 1 of the projections
    output  = concat(head_0 … head_{H-1}) Wᵀ + b

Shapes
    B batch, Lq queries, Lk keys, D = d_model features, H = num_heads heads, Dh = D / H features of a head

Conventions
- A mask is boolean or 0/1 in any of uint8, int32, int64, float32, float64. True or 1 means "may attend", as in
  `F.scaled_dot_product_attention`; `nn.MultiheadAttention`'s masks mean the opposite.
- A mask has 4 dimensions and broadcasts to [B, H, Lq, Lk] without enlarging it: a key padding mask comes as [B, 1, 1,
  Lk]. Any other shape is a ValueError from `forward` that names both shapes, the mask's and the scores', as Python
  prints them, in any brackets: `2, 1, 1, 5`; a [B, Lk] mask would silently be read as [Lq, Lk] whenever B = Lq.
  `apply_mask` gets valid masks only.
- A query that may attend to nothing gets zero weights, so a zero context vector: what
  `F.scaled_dot_product_attention` gives.
- The weights returned are those that were multiplied with the values, after dropout; they carry gradient.
- Output and weights have the query's dtype; under autocast they may have autocast's.
- Between calls the module may be cast or moved, its weights, its mode and `dropout.p` changed, and inputs and masks
  edited in place, through `.data` too; calls may be made in training or in eval, with gradients, under no_grad or
  under inference_mode. Each gives what a new module with the same weights gives: keep nothing that was computed from
  any of them.

Your own test (1.9) is run with other implementations put in place of the class, by its name: it uses contract names
only, sets its own seed, takes at most 1 s, and has to fail on each of these slips:
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
1. Scale to production: what do you change to serve this layer at a context of 128k tokens on several GPUs?
2. Limits: where does this implementation fail first as Lq and Lk grow, and how would you know beforehand?
3. Monitoring: which numbers of this layer would you log during training to see trouble (collapsed heads, overflow)
   early?
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
        # TODO(1.2): refuse a d_model that num_heads does not divide, and keep what forward needs.

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
            mask: bool or 0/1, broadcasts to [B, H, Lq, Lk]; true or 1 = may attend.

        Returns:
            The output [B, Lq, D] and the attention weights [B, H, Lq, Lk].

        Raises:
            ValueError: the mask has not 4 dimensions or does not broadcast to [B, H, Lq, Lk]; the message names the
                mask's shape and the scores'.
        """
        # TODO(1.1, 1.4): project, and split the features into heads: [B, L, D] -> [B, H, L, Dh].
        # TODO(1.2): refuse a mask of a bad shape.
        # TODO(1.3, 1.8): scores, mask, softmax, weighted sum, by matrix products; nothing larger than the scores.
        # TODO(1.5): drop weights in training.
        # TODO(1.6): join the heads, and project the output.
        raise NotImplementedError("TODO 1.1: forward")

    def compute_attention_scores(self, q: Tensor, k: Tensor) -> Tensor:
        """The scaled scores of every query with every key.

        Args:
            q: [B, H, Lq, Dh].
            k: [B, H, Lk, Dh].

        Returns:
            [B, H, Lq, Lk].
        """
        # TODO(1.5): scale by 1/√Dh.
        # TODO(1.7): keep half precision finite.
        raise NotImplementedError("TODO 1.5: compute_attention_scores")

    def apply_mask(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Makes forbidden scores so low that their weight is exactly 0 in the scores' dtype; leaves the others.

        Args:
            scores: [B, H, Lq, Lk]; may be written to.
            mask: a valid mask, as in forward.

        Returns:
            [B, H, Lq, Lk], of the scores' dtype.
        """
        # TODO(1.2): true or 1 means "may attend", whatever the mask's dtype.
        raise NotImplementedError("TODO 1.2: apply_mask")


def test_multihead_attention() -> None:
    """Your own test of MultiHeadAttention: passes on right code, fails on each slip listed above."""
    # TODO(1.9): build small modules with unequal sizes, and assert what right code does.
    # TODO(1.10): make lint-clean, typed code of it all.
    raise NotImplementedError("TODO 1.9: test_multihead_attention")
