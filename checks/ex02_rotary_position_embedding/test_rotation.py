"""The rotation (2.1): halves, angles, directions, strides; and the frequencies (2.2): every pair, base and dim."""

from collections.abc import Callable
from math import cos, sin
from typing import Any

import pytest
import torch

from harness.testing import Close, Subject, Where, also, is_tensor, requirement

from .reference import DH, NEAR, ROUGH, B, H, L, agree, alike, angles_of, rows, turned

# 2.1 the rotation


@requirement("2.1")
def test_rotate_half_by_hand(subject: Subject, close: Close) -> None:
    """The halves change places, and the one that comes first is negated."""
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0], [5.0, -6.0, 7.0, 0.5]]]])
    expected = torch.tensor([[[[-3.0, -4.0, 1.0, 2.0], [-7.0, -0.5, 5.0, -6.0]]]])

    half = subject.RotaryPositionEmbedding(4).rotate_half(x)

    close(
        half,
        expected,
        "rotate_half([1, 2, 3, 4])",
        hint="(x1, x2) -> (-x2, x1), with halves of the last dimension: [-3, -4, 1, 2]",
    )


@requirement("2.1")
def test_apply_by_hand(subject: Subject, close: Close) -> None:
    """A right angle (cosine 0, sine 1) takes [1, 2, 3, 4] to [-3, -4, 1, 2]; no angle leaves it."""
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    zeros, ones = torch.zeros(1, 4), torch.ones(1, 4)
    rope = subject.RotaryPositionEmbedding(4)

    still, quarter = (rope.apply_rotary_pos_emb(x.clone(), *turn) for turn in ((ones, zeros), (zeros, ones)))

    close(still, x, "apply_rotary_pos_emb([1, 2, 3, 4], cos=1, sin=0)", hint="no angle, no turn")
    expected = torch.tensor([[[[-3.0, -4.0, 1.0, 2.0]]]])
    close(
        quarter, expected, "apply_rotary_pos_emb([1, 2, 3, 4], cos=0, sin=1)", hint="a quarter turn, counter-clockwise"
    )


@requirement("2.1")
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [(torch.enable_grad, torch.float64), (torch.no_grad, torch.float32)],
    ids=["with gradients", "without, in float32"],
)
def test_inputs_are_never_written_to(
    subject: Subject, close: Close, rng: torch.Generator, mode: Callable[[], Any], dtype: torch.dtype
) -> None:
    """x, cos and sin are after a call what they were before."""
    angles = torch.rand(L, DH // 2, generator=rng).repeat(1, 2)
    given = {"x": rows(rng, L, dtype), "cos": angles.cos(), "sin": angles.sin()}
    before = {name: tensor.clone() for name, tensor in given.items()}
    rope = subject.RotaryPositionEmbedding(DH)

    with mode():
        rope.rotate_half(given["x"])
        rope.apply_rotary_pos_emb(**given)
        rope(given["x"])

    for name, tensor in given.items():
        close(tensor, before[name], f"{name} after the call", tolerance=0, hint=f"{name} is written to")


@requirement("2.1")
def test_apply_turns_by_the_given_angles(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Whatever angles cos and sin belong to, every pair turns by them."""
    x = rows(rng, L)
    angles = 6 * torch.rand(L, DH // 2, generator=rng, dtype=torch.float64)
    x1, x2 = x[..., : DH // 2], x[..., DH // 2 :]
    expected = torch.cat((x1 * angles.cos() - x2 * angles.sin(), x1 * angles.sin() + x2 * angles.cos()), dim=-1)
    table = torch.cat((angles, angles), dim=-1)

    actual = subject.RotaryPositionEmbedding(DH).apply_rotary_pos_emb(x, table.cos(), table.sin())

    what = "apply_rotary_pos_emb(x, cos, sin)"
    close(is_tensor(actual, what).double(), expected, what, tolerance=ROUGH, hint="x * cos + rotate_half(x) * sin")


@requirement("2.1")
def test_position_zero_by_hand(subject: Subject, close: Close) -> None:
    """The first row stands at position 0, where every angle is 0."""
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]], dtype=torch.float64)

    first = is_tensor(subject.RotaryPositionEmbedding(4)(x), "forward([1, 2, 3, 4])")

    hint = "positions count from 0, and there cos 0 = 1 and sin 0 = 0: nothing turns"
    close(first.double(), x, "forward([1, 2, 3, 4]) at position 0", tolerance=ROUGH, hint=hint)


@requirement("2.1")
def test_heads_and_batch_rows_turn_alike(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Where all heads and batch rows hold the same, they get the same."""
    x = rows(rng, L)[:1, :1].repeat(B, H, 1, 1)

    actual = is_tensor(subject.RotaryPositionEmbedding(DH)(x), "forward(x)")

    assert actual.shape == x.shape, f"forward(x): shape {tuple(actual.shape)} came, {tuple(x.shape)} was wanted"
    for b, h in ((0, 1), (1, 0), (1, H - 1)):
        hint = "positions run along dimension 2, the rows, not along the heads or the batch"
        close(actual[b, h], actual[0, 0], f"forward(x)[{b}, {h}] beside forward(x)[0, 0]", tolerance=0, hint=hint)


@requirement("2.1")
def test_position_one_by_hand(subject: Subject, close: Close) -> None:
    """With dim 2, [1, 0] at position 1 becomes [cos 1, sin 1]."""
    x = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]], dtype=torch.float64)
    expected = torch.tensor([cos(1), sin(1)], dtype=torch.float64)

    row = is_tensor(subject.RotaryPositionEmbedding(2)(x), "forward([1, 0])")[0, 0, 1]

    hint = (
        "[0.5403, 0.8415] is a turn by 1, counter-clockwise; [1, 0] is no turn, [0.5403, -0.8415] the other direction"
    )
    close(row.double(), expected, "forward([1, 0]) at position 1", tolerance=ROUGH, hint=hint)


@requirement("2.1")
def test_pairs_are_half_a_vector_apart(subject: Subject, close: Close) -> None:
    """With dim 6, [1, 0, 0, 0, 0, 0] at position 1 moves to components 0 and 3, and no other."""
    x = torch.zeros(1, 1, 2, 6, dtype=torch.float64)
    x[..., 0] = 1
    expected = torch.tensor([cos(1), 0, 0, sin(1), 0, 0], dtype=torch.float64)

    row = is_tensor(subject.RotaryPositionEmbedding(6)(x), "forward")[0, 0, 1]

    hint = "component i is paired with i + dim/2; pairs of neighbours are another layout"
    close(row.double(), expected, "forward([1, 0, 0, 0, 0, 0]) at position 1", tolerance=ROUGH, hint=hint)


@requirement("2.1")
@pytest.mark.parametrize(("length", "dim"), [(1, 6), (7, 2), (64, 14)])
def test_equals_explicit_rotations(
    subject: Subject, close: Close, rng: torch.Generator, on: Where, length: int, dim: int
) -> None:
    """forward equals a 2×2 rotation of every pair by position · 10000**(-2i/dim)."""
    x = rows(rng, length, dim=dim)
    x /= 2**0.5 * x.abs().max()  # No pair is longer than 1.
    rope = subject.RotaryPositionEmbedding(dim).to(on.device)
    hint = f"{length} rows, dim {dim}: pair i at position p turns by p · 10000**(-2i/dim); no table is below float32"
    for dtype in (on.dtype, torch.float32):
        expected = turned(x.to(dtype), torch.arange(length))

        actual = is_tensor(rope(x.to(on.device, dtype)), "forward(x)")

        tolerance = max(NEAR, on.tolerance)
        close(actual.detach().cpu().double(), expected, "forward(x)", tolerance=tolerance, hint=hint)


@requirement("2.1")
def test_scores_depend_on_the_distance_alone(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """One query and one key, put at all positions: a shift of both changes no score, a shift of one does."""
    query, key = (rows(rng, 1)[:1, :1].expand(1, 1, 40, DH) for _ in range(2))
    rope = subject.RotaryPositionEmbedding(DH)

    scores = (
        is_tensor(rope(query), "forward(query)")[0, 0].double() @ is_tensor(rope(key), "forward(key)")[0, 0].double().mT
    )

    hint = "query and key turn by their own positions, so that only the difference is left"
    for shift in (1, 6, 17):
        moved, still = scores[shift:, shift:], scores[:-shift, :-shift]
        what = f"scores at (i + {shift}, j + {shift}) beside those at (i, j)"
        close(moved, still, what, tolerance=5 * ROUGH, hint=hint)
        change = (scores[:, shift] - scores[:, 0]).abs().max()
        assert change > 0.1, (
            f"scores: {change:.3g} came as the change if the key alone moves by {shift}, over 0.1 was wanted; is it "
            "turned?"
        )


@requirement("2.1")
def test_strided_inputs(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Transposed, expanded, overlapping, sliced and every-other-feature views are as good as copies."""
    rope = subject.RotaryPositionEmbedding(DH)
    base = torch.randn(B, 9, H, 2 * DH, generator=rng)
    views = {
        "transposed": base[..., :DH].transpose(1, 2),
        "of every other row and feature": base.transpose(1, 2)[:, :, ::2, ::2],
        "expanded": base[:1, :1, :1, :DH].expand(B, H, L, DH),
        "with features first": base.permute(3, 0, 2, 1)[:DH].permute(1, 2, 3, 0),
        "of overlapping rows": base[:, :H, 0].unfold(2, DH, 2),
        "of overlapping rows of float64": base[:, :H, 0].double().unfold(2, DH, 2),
    }
    for name, view in views.items():
        agree(close, rope, view, hint=f"x is a view here, {name}")


# 2.2 the frequencies


@requirement("2.2")
@pytest.mark.parametrize("base", [10000, 100, 500_000.0], ids=["10000", "100", "500000"])
def test_every_pair_has_its_frequency(subject: Subject, close: Close, base: float) -> None:
    """At position p, pair i has turned by p · base**(-2i/dim)."""
    for dim, length in ((2, 4), (6, 4), (16, 4), (34, 128)) if base == 10000 else ((6, 4), (16, 4)):
        pairs = dim // 2
        x = torch.eye(dim, dtype=torch.float64)[:pairs, None].expand(1, pairs, length, dim)  # head i: 1 at component i
        positions = torch.tensor([1, 3, length - 1])
        expected = angles_of(positions, dim, base).T.cos().acos()  # from 0 to π

        out = is_tensor(subject.RotaryPositionEmbedding(dim, base=base)(x), f"forward with base {base}")

        turned_to, start = out.double()[0, :, positions], x[0, :, positions]
        own = (turned_to * start).sum(-1)
        angles = torch.atan2((turned_to - own.unsqueeze(-1) * start).norm(dim=-1), own)
        frequencies = [float(f"{angle:.4g}") for angle in angles_of(positions[:1], dim, base)[0]]
        hint = f"base**(-2i/dim) for i = 0 … {pairs - 1} are {frequencies}"
        what = f"forward with dim {dim}, base {base}: angle of each pair at positions {positions.tolist()}"
        close(angles, expected, what, tolerance=ROUGH, hint=hint)


@requirement("2.2")
def test_base_is_the_third_argument(subject: Subject, close: Close) -> None:
    """With dim 4 and base 100 the second pair turns by 0.1 per position."""
    x = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    x[..., 1] = 1

    out = is_tensor(subject.RotaryPositionEmbedding(4, 32, 100)(x), "forward").double()[0, 0]

    sine = (out[1] - (out[1] @ out[0]) * out[0]).norm()
    what = "RotaryPositionEmbedding(4, 32, 100): sine of the angle of pair 1 per position"
    close(sine, torch.tensor(sin(0.1)).double(), what, tolerance=ROUGH, hint="100**(-2/4) is 0.1")


@requirement("2.2")
def test_near_bases_are_told_apart(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A module turns by its own base, after one of nearly the same base was called."""
    agree(close, subject.RotaryPositionEmbedding(DH, 16, 2.4), rows(rng, L), hint="its base is 2.4", base=2.4)
    rope, x = subject.RotaryPositionEmbedding(DH, 16, 2.2), rows(rng, L)

    shared = "it turns by base 2.4, that of the module called before: what do they share?"
    with also(lambda: shared if alike(rope(x), turned(x, torch.arange(L), 2.4)) else ""):
        agree(close, rope, x, hint="its base is 2.2", base=2.2)
