"""ex02: Rotary position embedding

Attention by itself does not know where a token stands. A rotary embedding tells it by turning queries and keys: each
pair of features turns by an angle that grows with the position, so that the dot product of a query and a key depends
on how far apart they are. You write the rotation, an attention layer that uses it, and a comparison with the older
sinusoidal embedding, which is added.

Steps
1. The rotation (30 min): 2.1, 2.2
2. Decoding (15 min): 2.6
3. Attention (30 min): 2.4
4. Lengths and precision (40 min): 2.3, 2.7, 2.8
5. The comparison (20 min): 2.5
6. Your own test, and style (30 min): 2.9, 2.10

Requirements
2.1 (correctness) Apply rotation matrices to query and key vectors: `forward` equals an explicit 2×2 rotation of every
    pair, to 2e-5 at positions below 64, for inputs with any strides. Scores of turned queries and keys depend on the
    distance between their positions alone, and do change with it. Inputs are never written to, not even to be
    restored.
2.2 (correctness) Turn different dimensions at different frequencies: pair i turns by `base**(-2i/dim)` per position,
    for every base and every even dim.
2.3 (efficiency) Handle variable lengths efficiently: lengths and dtypes come in any order and give what a fresh
    module gives, also after a move to another device. Positions below the largest seq_len so far cost no cosine,
    sine, `polar` or complex exponential again while the device stays the same, whatever lengths and dtypes came
    between; a call that needs more may make the table anew and compute ahead, and so may the first call after a cast
    of the module. Nothing that depends on positions is in the state_dict: it loads into a module with another
    max_position_embeddings, or one that has seen other lengths. Between calls a module keeps its tables alone: no
    input, no mask, no result.
2.4 (correctness) Be compatible with multi-head attention: queries and keys are turned, values are not. Output (to 2e-5)
    and gradients (to 1e-4) equal the formula's with the same weights, with causal, padding and per-head masks of every
    0/1 dtype, and with scores around -1000 or 1000. A fully masked row (of one head, too) has zero weights; if it is
    masked in all heads, its output is o_proj's bias, never NaN. Padding of 1e6 changes nothing, and a masked key has
    no weight however low the other scores are (-1e6 in float32 and float64). Weights and mask may change between
    calls, in place too; x and mask are never written to.
2.5 (correctness) Compare RoPE with sinusoidal embeddings: `sinusoidal_position_embedding` equals the paper's formula.
    `compare_position_embeddings` measures "sinusoidal" to 1e-3, and "rope" below 1e-3, the same in every call. What a
    caller does to the results of either changes no later call.
2.6 (correctness) Decode step by step with `RotaryPositionEmbedding` and seq_len (the attention layer has no cache): a
    prefill, then one token or several at a time, gives what the full pass gives, also beyond max_position_embeddings.
2.7 (robustness) Keep precision: per unit length of the pair, the result is within 2e-5 of float64 at positions below
    64 and within 5e-4 up to 4000, also in a float32 call after `.to(bfloat16)` and back or after a first call under
    autocast, and in half precision but for the rounding of the result (2**-11 of it in float16, 2**-8 in bfloat16).
    The result has x's dtype, the attention layer's too, with a mask of any dtype; its output is within 2e-5 in float32
    and float64: nothing is computed below x's dtype. Where no number is given, 1e-2 is near enough; 2.4 takes the
    turns as your rotary_emb gives them. A first call in inference_mode does no harm to training later. Gradients flow
    through the rotation, step after step, also in eval and in half precision.
2.8 (robustness) Refuse bad input: an odd dim (of a head, too: name its dim or d_model), a seq_len below the number of
    rows, a d_model that num_heads does not divide, and a mask of a bad shape, each by a ValueError that names the
    numbers.
2.9 (correctness) Write your own test: `test_rope` passes on right code, whoever wrote it, and fails on each of the
    slips listed below.
2.10 (readability) Reads well: ruff (E, F, W, B, lines up to 120; a docstring for each public class and function that
    you add) and mypy (typed definitions, not --strict) find nothing. Counts once half of the other requirements are
    earned.

In plain text
    angle(p, i) = p · base^(-2i/Dh)                            position p, pair i = 0 … Dh/2 - 1
    out[i]        = x[i] · cos angle - x[i + Dh/2] · sin angle
    out[i + Dh/2] = x[i] · sin angle + x[i + Dh/2] · cos angle
    head_h  = softmax(rope(q_h) rope(k_h)ᵀ / √Dh) v_h          output = concat(head_0 … head_{H-1}) Wᵀ + b
    sinusoidal[p, 2i] = sin(p / 10000^(2i/dim))                sinusoidal[p, 2i + 1] = cos(p / 10000^(2i/dim))

Shapes
    B batch, L positions, D = d_model features, H = num_heads heads, Dh = D / H = dim features of a head

Conventions
- Component i is paired with i + dim/2, as in LLaMA and GPT-NeoX. The paper pairs neighbours (2i and 2i + 1), but
  whole halves need no reordering. Turns are counter-clockwise: with dim 2, [1, 0] at position 1 becomes
  [0.5403, 0.8415]. Positions count from 0.
- seq_len is the number of positions up to and including the last row of x, as with a key-value cache: the rows of x
  stand at positions seq_len - L … seq_len - 1. None means L. A seq_len below L is a ValueError with both numbers, 0
  and negative ones too: 0 is a number, not None.
- max_position_embeddings is no limit; lengths beyond it work.
- Cosines and sines are float32 or better when they meet x, whatever the module or x is cast to: bfloat16 has 8 bits
  and cannot tell position 4000 from 4001. The result is rounded to x's dtype, once; the table and the two products
  are not.
- In `apply_rotary_pos_emb` both halves of cos are equal, and both halves of sin.
- A mask is boolean or 0/1 in any of uint8, int32, int64, float32, float64. True or 1 means "may attend", as in
  `F.scaled_dot_product_attention`, which you may use here.
- A mask has 4 dimensions and broadcasts to [B, H, L, L] without enlarging it: a padding mask comes as [B, 1, 1, L].
  Any other shape is a ValueError that names both shapes, the mask's and the scores', as Python prints them:
  `2, 1, 1, 5`; a [B, L] mask would silently be read as [L, L] whenever B = L.
- `compare_position_embeddings` draws `query, key = torch.randn(2, dim, generator=torch.Generator().manual_seed(0))`,
  puts them at every pair of positions (i, j) below seq_len, and at (i + shift, j + shift), and takes the dot product:
  turned ("rope"), and with the sinusoidal embedding added ("sinusoidal"). It returns the largest absolute change over
  all pairs for each, not rounded: float arithmetic itself keeps "rope" a little above 0, and an exact 0 means that
  nothing was turned. It may compute in float64.

Your own test (2.9) is run with other implementations put in place of the classes and functions, by their names: it
uses contract names only, sets its own seed, takes at most 1 s, and has to fail on each of these slips:
- identity: forward returns x as it came
- sin_and_cos_swapped: the sine is used for the cosine and the cosine for the sine
- other_direction: pairs turn clockwise
- interleaved_pairs: component 2i is paired with 2i + 1, not i with i + dim/2
- one_frequency: every pair turns by 1 per position
- positions_from_one: the first row turns as if at position 1
- seq_len_ignored: the rows always stand at positions 0 … L - 1
- positions_over_heads: rows are numbered along the heads, not along the sequence
- key_not_rotated: attention turns the queries only
- value_rotated: attention turns the values too

Discuss
1. Scale to production: what changes when thousands of requests, each with a key-value cache of its own length, are
   decoded in one batch on several GPUs?
2. Limits: a model trained with 2,048 positions gets 8,192. Your code runs; what fails, which pairs fail first, and
   why?
3. Monitoring: which numbers would tell you in production that positions, precision or the cache offset went wrong?
4. Next: what would you optimise next, and how would you prove that it helped?

Sources
- Su et al. 2021, "RoFormer", sections 3.2 and 3.4: https://arxiv.org/abs/2104.09864
- Vaswani et al. 2017, "Attention is all you need", section 3.5: https://arxiv.org/abs/1706.03762
"""

from torch import Tensor, nn


class RotaryPositionEmbedding(nn.Module):
    """Turns pairs of features by angles that grow with the position.

    Args:
        dim: number of features Dh; even.
        max_position_embeddings: how many positions to expect; no limit.
        base: the slowest pair turns by about 1 / base per position.

    Raises:
        ValueError: `dim` is odd; the message names it.
    """

    def __init__(self, dim: int, max_position_embeddings: int = 2048, base: float = 10000) -> None:
        super().__init__()
        # TODO(2.2, 2.8): refuse an odd dim, and keep what the frequencies need.
        # TODO(2.3, 2.7): decide where cosines and sines live: .to(dtype) casts parameters and buffers.

    def forward(self, x: Tensor, seq_len: int | None = None) -> Tensor:
        """Turns every row of x according to its position.

        Args:
            x: [B, H, L, Dh].
            seq_len: number of positions up to and including the last row of x; None means L.

        Returns:
            [B, H, L, Dh], of x's dtype.

        Raises:
            ValueError: `seq_len` is less than L; the message names both.
        """
        # TODO(2.6, 2.8): find the positions of the rows; refuse a seq_len that is too small.
        # TODO(2.3): compute cosines and sines only for positions that never came before.
        raise NotImplementedError("TODO 2.1: forward")

    def rotate_half(self, x: Tensor) -> Tensor:
        """A quarter turn of every pair: (x1, x2) -> (-x2, x1), where x1 and x2 are the halves of the last dimension.

        Args:
            x: [B, H, L, Dh].

        Returns:
            [B, H, L, Dh].
        """
        # TODO(2.1): swap the halves, and negate the one that comes first.
        raise NotImplementedError("TODO 2.1: rotate_half")

    def apply_rotary_pos_emb(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turns every pair of x by the angles whose cosines and sines are given.

        Args:
            x: [B, H, L, Dh].
            cos: [L, Dh]; both halves are equal.
            sin: [L, Dh]; both halves are equal.

        Returns:
            [B, H, L, Dh], of x's dtype.
        """
        # TODO(2.1): a turn by an angle is cos times the vector plus sin times its quarter turn.
        # TODO(2.7): keep the precision of cos and sin; the result has x's dtype.
        raise NotImplementedError("TODO 2.1: apply_rotary_pos_emb")


class MultiHeadAttentionWithRoPE(nn.Module):
    """Multi-head self-attention whose queries and keys carry their position as a rotation.

    Args:
        d_model: number of features D; a multiple of `num_heads`, with an even quotient.
        num_heads: number of heads H.
        max_position_embeddings: as in RotaryPositionEmbedding.

    Raises:
        ValueError: `d_model` is no multiple of `num_heads`; the message names both numbers. Or their quotient is odd;
            the message names it or `d_model`.
    """

    def __init__(self, d_model: int, num_heads: int, max_position_embeddings: int = 2048) -> None:
        super().__init__()
        # TODO(2.8): refuse a d_model that num_heads does not divide, and keep what forward needs.

        # Given; no need to change.
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model)
        self.rotary_emb = RotaryPositionEmbedding(d_model // num_heads, max_position_embeddings)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends from every position to every position that the mask allows.

        Args:
            x: [B, L, D].
            mask: bool or 0/1, broadcasts to [B, H, L, L]; true or 1 = may attend.

        Returns:
            [B, L, D].

        Raises:
            ValueError: the mask has not 4 dimensions or does not broadcast to [B, H, L, L]; the message names the
                mask's shape and the scores'.
        """
        # TODO(2.4): project, split into heads, turn queries and keys, attend, join the heads, project.
        # TODO(2.8): refuse a mask of a bad shape.
        raise NotImplementedError("TODO 2.4: forward")


def sinusoidal_position_embedding(seq_len: int, dim: int) -> Tensor:
    """The embedding of "Attention is all you need", which is added to the features.

    Args:
        seq_len: number of positions.
        dim: number of features; even.

    Returns:
        [seq_len, dim], float32 or float64: sines at the even features, cosines at the odd ones.

    Raises:
        ValueError: `dim` is odd; the message names it.
    """
    # TODO(2.5): one frequency per pair of neighbours.
    # TODO(2.8): refuse an odd dim.
    raise NotImplementedError("TODO 2.5: sinusoidal_position_embedding")


def compare_position_embeddings(seq_len: int = 64, dim: int = 32, shift: int = 16) -> dict[str, float]:
    """Measures how much a shift of both positions changes the score of a query and a key.

    Args:
        seq_len: number of positions that are compared.
        dim: number of features; even.
        shift: by how much both positions move.

    Returns:
        {"rope": ..., "sinusoidal": ...}: the largest absolute change of the dot product over all pairs of positions.
    """
    # TODO(2.5): draw query and key as above, and compare the scores before and after the shift.
    raise NotImplementedError("TODO 2.5: compare_position_embeddings")


def test_rope() -> None:
    """Your own test of this file: passes on right code, fails on each slip listed above."""
    # TODO(2.9): choose small, unequal sizes, and assert what right code does.
    # TODO(2.10): make lint-clean, typed code of it all.
    raise NotImplementedError("TODO 2.9: test_rope")
