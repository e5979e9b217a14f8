"""Bad input (2.8): odd dims, small seq_lens, bad d_models and masks are refused with the numbers."""

from functools import partial

import pytest
import torch

from harness.testing import Subject, refuses, requirement

from .reference import DH, B, H, L, build, refuses_mask, rows, some_x


@requirement("2.8")
@pytest.mark.parametrize("dim", [7, 1])
def test_an_odd_dim_is_refused(subject: Subject, dim: int) -> None:
    """An odd dim has no pairs."""
    refuses(ValueError, lambda: subject.RotaryPositionEmbedding(dim), f"RotaryPositionEmbedding({dim})", dim)
    refuses(
        ValueError,
        lambda: subject.sinusoidal_position_embedding(23, dim),
        f"sinusoidal_position_embedding(23, {dim})",
        dim,
    )


@requirement("2.8")
def test_a_small_seq_len_is_refused(subject: Subject, rng: torch.Generator) -> None:
    """A seq_len below the number of rows is refused with both numbers; 0 and -3 are numbers like any other."""
    rope, x = subject.RotaryPositionEmbedding(DH), rows(rng, 17)

    for seq_len in (13, 16, 0, -3, 13, 16, 0, -3):  # What was refused once is refused again.
        what = f"RotaryPositionEmbedding.forward(17 rows, seq_len={seq_len})"
        refuses(ValueError, partial(rope, x, seq_len=seq_len), what, seq_len, 17)


@requirement("2.8")
def test_a_small_seq_len_is_refused_later_too(subject: Subject, rng: torch.Generator) -> None:
    """After a long call a small seq_len is refused as before."""
    rope = subject.RotaryPositionEmbedding(DH)
    rope(rows(rng, 23))

    what = "RotaryPositionEmbedding.forward(17 rows, seq_len=13) after a call with 23 rows"
    refuses(ValueError, lambda: rope(rows(rng, 17), 13), what, 13, 17)


@requirement("2.8")
@pytest.mark.parametrize(("d_model", "heads"), [(10, 4), (3, 6)])
def test_a_bad_d_model_is_refused(subject: Subject, d_model: int, heads: int) -> None:
    """A d_model that num_heads does not divide is refused with both numbers."""
    what = f"MultiHeadAttentionWithRoPE({d_model}, {heads})"
    for _ in range(2):
        refuses(ValueError, lambda: subject.MultiHeadAttentionWithRoPE(d_model, heads), what, d_model, heads)


@requirement("2.8")
def test_an_odd_head_is_refused(subject: Subject) -> None:
    """A head with an odd number of features has no pairs either."""
    what = "MultiHeadAttentionWithRoPE(15, 3)"
    refuses(ValueError, lambda: subject.MultiHeadAttentionWithRoPE(15, 3), what, 5)  # 15 has a 5 too: either will do


BAD_MASKS = [
    (L, L),
    (B, L),
    (L,),
    (B, 1, L),
    (1, B, 1, 1, L),
    (B, 1, 1, L + 1),
    (B + 1, 1, 1, L),
    (B, H - 1, 1, L),
    (B, 1, L + 1, L),
]


@requirement("2.8")
def test_a_mask_of_a_bad_shape_is_refused(subject: Subject, rng: torch.Generator) -> None:
    """A mask without 4 dimensions, or whose sizes do not fit, is refused with both shapes, every time."""
    attention, x = build(subject), some_x(rng)

    for shape in (*BAD_MASKS, *BAD_MASKS):
        refuses_mask(attention, x, shape)


@requirement("2.8")
def test_a_mask_that_would_enlarge_the_scores_is_refused(subject: Subject, rng: torch.Generator) -> None:
    """A size of 1 in the scores is not stretched by the mask."""
    attention = build(subject, heads=1)

    for shape in ((B, 1, 1, L), (1, 3, 1, L), (1, 1, 3, 1), (1, 1, 1, 3)):
        refuses_mask(attention, some_x(rng, L if L in shape else 1, batch=1), shape, heads=1)


@requirement("2.8")
def test_a_mask_that_was_good_is_refused_where_it_does_not_fit(subject: Subject, rng: torch.Generator) -> None:
    """A mask that fitted one input is looked at again with the next."""
    attention, x = build(subject), some_x(rng)
    attention(x, torch.ones(B, 1, 1, L))

    hint = "this shape fitted an earlier call, not this one"
    refuses_mask(attention, x[:1], (B, 1, 1, L), hint=hint)
    refuses_mask(attention, x[:, :-1], (B, 1, 1, L), hint=hint)


@requirement("2.8")
def test_a_bad_mask_is_refused_where_lengths_coincide(subject: Subject, rng: torch.Generator) -> None:
    """A [B, L] mask is refused also where B = L, so that it would broadcast."""
    attention, x = build(subject), some_x(rng, B)

    for _ in range(2):
        refuses_mask(attention, x, (B, B))
