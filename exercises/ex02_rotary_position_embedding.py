"""ex02: Rotary position embedding

Attention by itself does not know where a token stands.
You write RoPE, the rotary embedding of LLaMA and of most models since: it turns queries and keys
by angles that grow with the position, so that a score depends on how far apart two tokens are.
You put it into an attention layer, and compare it with the older sinusoidal embedding.

Steps
1. The rotation (40 min): 2.1, 2.2, 2.6
2. Attention (35 min): 2.4
3. The comparison (20 min): 2.5
4. Lengths, precision, bad input (55 min): 2.3, 2.7, 2.8
5. Your own test, and style (40 min): 2.9, 2.10

Requirements
2.1 (correctness) Rotate queries and keys: `forward` turns every pair by its angle, to 2e-5 at
    positions below 64, whatever x's strides. The score of a turned query and key depends on
    the distance between their positions alone, and changes with it.
    Inputs are never written to, not even to be restored.
2.2 (correctness) Give each pair its own frequency: pair i turns by base**(-2i/dim) per position,
    for every base from 0.5 on and every even dim.
2.3 (efficiency) Handle variable lengths efficiently: you keep tables of cosines and sines.
    - Lengths and dtypes come in any order, also after a move to another device (meta, too).
      Each call gives what a fresh module gives, as "How near" asks.
    - Positions below the largest seq_len since the last move cost no cosine, sine, tangent,
      `polar`, complex exponential or complex power again, in torch or in Python.
    - A call for more positions may make the whole table anew, and ahead. So may the first call
      after any `.to(dtype)`, even one that changes nothing; no later call, even if it is longer.
    - Nothing in the state_dict depends on positions: it loads into a module with another
      max_position_embeddings, or one that has seen other lengths.
    - Between calls a module keeps no input, mask or result, and no tensor made of one. Tables
      may be kept, also of frequencies, of other devices or for all modules, numbers and flags.
2.4 (correctness) Be compatible with multi-head attention: the layer equals the formula below.
    Queries and keys turn, values do not.
    - Masks are causal, padding or any other, one per head too. Padded rows may hold 1e6.
    - A masked key has no weight, even where the allowed scores are near -1e6.
    - A fully masked row of a head has zero weights, and gradients stay finite.
      Where a row is masked in all heads, its output is o_proj's bias.
    - Weights may change between calls, in place, by loading or by a cast;
      the next call uses the new ones, edits of `.data` too, and a mask as it is then.
    - Inputs are never written to, not even to be restored.
2.5 (correctness) Compare RoPE with sinusoidal embeddings: you measure how a shift changes scores.
    Equal arguments of either function give equal results, whatever calls or callers did before.
2.6 (correctness) Decode step by step: with seq_len, a prefill, then one token or several at a time
    give the rows of the full pass, also beyond max_position_embeddings.
    This is about `RotaryPositionEmbedding`; the attention layer has no cache.
2.7 (robustness) Keep precision: results have x's dtype and are as near as "How near" asks.
    - A cast of the module, or a first call under autocast, makes no later call less precise.
    - A first call in inference_mode does no harm to training later.
    - Gradients flow through the rotation, step after step, also in eval and in half precision.
2.8 (robustness) Refuse bad input: you raise a ValueError with the numbers, in every such call.
    - an odd dim, of `sinusoidal_position_embedding` too, or of a head (its dim or d_model)
    - a seq_len below the number of rows, also 0 or a negative one: both numbers
    - a d_model that num_heads does not divide: both numbers
    - a mask of a bad shape: its shape and the scores', as Python prints them (`2, 1, 1, 5`)
2.9 (correctness) Write your own test: `test_rope` passes on right code, whoever wrote it,
    and fails on each slip below.
2.10 (readability) Reads well: ruff (E, F, W, B; lines up to 120; a docstring, not an empty one, for
    each public class and function) and mypy (typed definitions, not --strict) find nothing.
    It counts once at least half of the other requirements are earned.

In plain text
    angle(p, i)   = p · base^(-2i/Dh)      position p, pair i = 0 … Dh/2 - 1
    out[i]        = x[i] · cos angle - x[i + Dh/2] · sin angle
    out[i + Dh/2] = x[i] · sin angle + x[i + Dh/2] · cos angle
    head_h = softmax(rope(q_h) rope(k_h)ᵀ / √Dh) v_h
    output = concat(head_0 … head_{H-1}) Wᵀ + b
    sinusoidal[p, 2i], sinusoidal[p, 2i + 1] = sin a, cos a
                                               with a = p / 10000^(2i/dim)

Shapes
    B batch, L positions, D = d_model features, H = num_heads heads,
    Dh = D / H = dim features of a head

By hand
    With dim 2, [1, 0] goes around the circle, 1 radian a position:

          2 *   |                     position 0: [ 1.0000, 0.0000]
                |    * 1              position 1: [ 0.5403, 0.8415]
    3 *         |                     position 2: [-0.4161, 0.9093]
      ----------+---------* 0         position 3: [-0.9900, 0.1411]

    A query and a key of [1, 0] score cos(2 - 1) = 0.5403 at positions 2 and 1, and at 3 and 2.
    With dim 4, [1, 2, 3, 4] at position 1 becomes [-1.9841, 1.9599, 2.4624, 4.0198]:
    1 and 3 turn by 1, 2 and 4 by 0.01.

                   rows of x   seq_len   positions
    prefill                5   None      0 1 2 3 4
    one token              1   6         5
    three tokens           3   9         6 7 8
    ValueError             3   2         3 rows do not fit below 2

Conventions
- Component i is paired with i + dim/2, as in LLaMA and GPT-NeoX; the paper pairs neighbours. So
  both halves of `apply_rotary_pos_emb`'s cos are equal, and both halves of its sin.
- Turns are counter-clockwise. Positions count from 0; seq_len counts them up to and including x's
  last row, as with a key-value cache; None is L.
- max_position_embeddings says what to expect; it is no limit.
- A mask is boolean or 0/1 in uint8, int32, int64, float32 or float64; true or 1 means "may attend".
- A mask has 4 dimensions and broadcasts to [B, H, L, L] without enlarging it: padding is
  [B, 1, 1, L], and [B, L] is refused even where B = L would let it pass for [L, L].
  You may use `F.scaled_dot_product_attention`, and call the projections or read their weights.
- Nothing is computed below the input's dtype. Results have x's dtype, whatever the mask's is.
- Tables and their angles alone may be float32 for a float64 x; they are never below float32,
  whatever x or the module is cast to: bfloat16 cannot tell position 4000 from 4001. The
  rotation is rounded to half precision once, at the end.
- `compare_position_embeddings` draws
  `query, key = torch.randn(2, dim, generator=torch.Generator().manual_seed(0))`, puts them at
  every (i, j) below seq_len and at (i + shift, j + shift), and returns the largest absolute change
  of the dot product over all pairs, in unrounded Python floats: turned ("rope": rounding alone,
  at most 1e-3, yet above 0 from seq_len 9 on) and with the sinusoidal embedding added
  ("sinusoidal", to 1e-3).
- A submission is one file on torch and the standard library.
- How near: a rotation may be off by this times the length of the pair, all else by this times
  (1 + |right value|); in 2.4 the right value takes the turns from your rotary_emb.
                             float32, float64   float16        bfloat16
    rotation below 64        2e-5               2e-5 + 2**-11  2e-5 + 2**-8
    rotation up to 4000      5e-4               5e-4 + 2**-11  5e-4 + 2**-8
      its gradient           the same           5e-2           5e-2
    attention                2e-5               0.1            0.1
      its gradients          1e-4               -              -
      scores up to ±1000     1e-2               finite         finite
      1e6 or -1e6 (see 2.4)  1e-2               -              -
    sinusoidal below 300     2e-5               -              -
    anything else            1e-2               5e-2           5e-2

Not defined
- What has a `-` in the table, and what a call under autocast itself returns.
- Sizes of 0, NaN, infinity or integers in x; a dim or num_heads of 0 or less, a base below 0.5;
  gradients of gradients; attention whose weights differ from x in dtype or device.
- A comparison with an odd dim, seq_len or shift below 1, or another default dtype; copying,
  pickling or compiling a module, or moving it back from meta.

Your own test (2.9) runs with other code, right and wrong, for both classes and both functions. It
sets its own seed and takes at most 1 s. It may call, read and fill q_proj, k_proj, v_proj, o_proj
(nn.Linear), call rotary_emb and use helpers in this file; not methods or attributes that you add
to a class, a hook, a buffer, a table's dtype, nor how often rotary_emb is called. Do not replace
it. Allow 1e-4 for a rotation and 1e-3 for attention. The sinusoidal embedding may be float64.
Attention hides q and k: compute the formula from its projections.
It has to fail on each of these slips:
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
1. Scale to production: what changes when a batch has caches of many lengths, on several GPUs?
2. Limits: a model trained with 2,048 positions gets 8,192. What fails, which pairs first, and why?
3. Monitoring: which numbers show that positions, precision or the cache offset went wrong?
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
        # TODO(2.2): keep what the frequencies need.
        # TODO(2.3, 2.7): choose where cosines and sines live: .to(dtype) casts parameters and buffers.
        # TODO(2.8): refuse an odd dim.

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
        # TODO(2.1, 2.6): find the positions of the rows, and turn each row by the angles of its position.
        # TODO(2.3): compute cosines and sines only for positions that never came before.
        # TODO(2.8): refuse a seq_len below the number of rows.
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
            cos: [L, Dh], float32 or float64; both halves are equal.
            sin: [L, Dh], float32 or float64; both halves are equal.

        Returns:
            [B, H, L, Dh], of x's dtype.
        """
        # TODO(2.1): add cos times x and sin times its quarter turn.
        # TODO(2.7): compute as precisely as cos and sin are, and round the result alone to x's dtype.
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
        # TODO(2.4): keep what forward needs.
        # TODO(2.8): refuse a d_model that num_heads does not divide.

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
            [B, L, D], of x's dtype.

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
    # TODO(2.5): give each pair of neighbours its frequency, sines first.
    # TODO(2.8): refuse an odd dim.
    raise NotImplementedError("TODO 2.5: sinusoidal_position_embedding")


def compare_position_embeddings(seq_len: int = 64, dim: int = 32, shift: int = 16) -> dict[str, float]:
    """Measures how much a shift of both positions changes the score of a query and a key.

    Args:
        seq_len: number of positions that are compared; at least 1.
        dim: number of features; even.
        shift: by how many positions both move; at least 1.

    Returns:
        {"rope": ..., "sinusoidal": ...}: the largest absolute change of the dot product over all pairs of positions.
    """
    # TODO(2.5): draw query and key as Conventions say, and compare the scores before and after the shift.
    raise NotImplementedError("TODO 2.5: compare_position_embeddings")


def test_rope() -> None:
    """Your own test of this file: passes on right code, fails on each slip listed above."""
    # TODO(2.9): choose small, unequal sizes, and assert what right code does.
    # TODO(2.10): leave nothing in this file for ruff and mypy to find.
    raise NotImplementedError("TODO 2.9: test_rope")
