"""The specification of ex02, rotary position embedding, as checks."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from math import cos, sin
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from harness.testing import (
    Close,
    DispatchMode,
    OwnTest,
    Subject,
    Where,
    halfway,
    is_tensor,
    own_test_checks,
    refuses,
    requirement,
    seed,
    style_checks,
)

B, H, L, DH = 2, 3, 5, 10
D = 12  # of the attention layer: 3 heads with 4 features
OWN_TEST = OwnTest(
    __file__,
    "test_rope",
    swaps=(
        "RotaryPositionEmbedding",
        "MultiHeadAttentionWithRoPE",
        "sinusoidal_position_embedding",
        "compare_position_embeddings",
    ),
    right=("answer", "complex_numbers", "rotation_matrices"),
)
# Cosines and sines in float32 err by 6e-8 plus what the angle errs: below position 64 a few 1e-6, at 4000 a few 1e-4.
NEAR, FAR = 2e-5, 5e-4
# What rounding to a dtype may change, relative to the value.
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
# Bounds that only tell a stale table from a right one, where precision is not the question.
LOOSE = {torch.float16: 5e-2, torch.bfloat16: 5e-2}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MASK_DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64]
PARAMETERS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "o_proj.bias")


def angles_of(positions: Tensor, dim: int, base: float = 10000.0) -> Tensor:
    """The angle of every pair at every position, in float64: [L, Dh / 2]."""
    pairs = torch.arange(dim // 2, dtype=torch.float64)
    return positions.double()[:, None] * base ** (-2 * pairs / dim)


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Every pair of x, turned by an explicit 2×2 matrix, in float64."""
    dim = x.size(-1)
    angles = angles_of(positions, dim)
    matrices = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), dim=-1).unflatten(-1, (2, 2))
    pairs = torch.stack((x[..., : dim // 2], x[..., dim // 2 :]), dim=-1).double()
    out = (matrices @ pairs.unsqueeze(-1)).squeeze(-1)
    return torch.cat((out[..., 0], out[..., 1]), dim=-1)


def rows(rng: torch.Generator, length: int, dtype: torch.dtype = torch.float64, dim: int = DH) -> Tensor:
    """Random queries or keys: [B, H, length, dim]."""
    return torch.randn(B, H, length, dim, generator=rng, dtype=torch.float64).to(dtype)


def named(dtype: torch.dtype) -> str:
    """A dtype without its module: float32."""
    return str(dtype).removeprefix("torch.")


def agree(
    close: Close,
    rope: Any,
    x: Tensor,
    seq_len: int | None = None,
    *,
    hint: str = "",
    tolerance: float = NEAR,
    inside: "Turns | None" = None,
) -> None:
    """forward, called `inside` a probe, turns every pair of x by its angle, in whatever dtype the result comes."""
    last = x.size(-2) if seq_len is None else seq_len
    expected = turned(x.detach(), torch.arange(last - x.size(-2), last))

    with inside or nullcontext():
        actual = rope(x) if seq_len is None else rope(x, seq_len)

    what = f"forward({x.size(-2)} rows of {named(x.dtype)}{'' if seq_len is None else f', seq_len={seq_len}'})"
    close(is_tensor(actual, what, hint).detach().double(), expected, what, tolerance=tolerance, hint=hint)


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
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad], ids=lambda mode: mode.__name__)
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
    close(is_tensor(actual, what).double(), expected, what, tolerance=NEAR, hint="x * cos + rotate_half(x) * sin")


@requirement("2.1")
def test_position_zero_by_hand(subject: Subject, close: Close) -> None:
    """The first row stands at position 0, where every angle is 0."""
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]], dtype=torch.float64)

    first = is_tensor(subject.RotaryPositionEmbedding(4)(x), "forward([1, 2, 3, 4])")

    hint = "positions count from 0, and there cos 0 = 1 and sin 0 = 0: nothing turns"
    close(first.double(), x, "forward([1, 2, 3, 4]) at position 0", tolerance=NEAR, hint=hint)


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
    close(row.double(), expected, "forward([1, 0]) at position 1", tolerance=NEAR, hint=hint)


@requirement("2.1")
def test_pairs_are_half_a_vector_apart(subject: Subject, close: Close) -> None:
    """With dim 6, [1, 0, 0, 0, 0, 0] at position 1 moves to components 0 and 3, and no other."""
    x = torch.zeros(1, 1, 2, 6, dtype=torch.float64)
    x[..., 0] = 1
    expected = torch.tensor([cos(1), 0, 0, sin(1), 0, 0], dtype=torch.float64)

    row = is_tensor(subject.RotaryPositionEmbedding(6)(x), "forward")[0, 0, 1]

    hint = "component i is paired with i + dim/2; pairs of neighbours are another layout"
    close(row.double(), expected, "forward([1, 0, 0, 0, 0, 0]) at position 1", tolerance=NEAR, hint=hint)


@requirement("2.1")
@pytest.mark.parametrize(("length", "dim"), [(1, 6), (7, 2), (64, 14)])
def test_equals_explicit_rotations(
    subject: Subject, close: Close, rng: torch.Generator, on: Where, length: int, dim: int
) -> None:
    """forward equals a 2×2 rotation of every pair by position · 10000**(-2i/dim)."""
    x = rows(rng, length, dim=dim)
    tolerance = NEAR if on.tolerance < NEAR else on.tolerance
    expected = turned(x.to(on.dtype), torch.arange(length))

    actual = is_tensor(subject.RotaryPositionEmbedding(dim).to(on.device)(x.to(on.device, on.dtype)), "forward(x)")

    hint = f"{length} rows, dim {dim}: pair i at position p turns by p · 10000**(-2i/dim)"
    close(actual.detach().cpu().double(), expected, "forward(x)", tolerance=tolerance, hint=hint)


@requirement("2.1")
@pytest.mark.parametrize("shift", [1, 6, 17])
def test_scores_depend_on_the_distance_alone(subject: Subject, close: Close, rng: torch.Generator, shift: int) -> None:
    """One query and one key, put at all positions: a shift of both changes no score, a shift of one does."""
    query, key = (rows(rng, 1)[:1, :1].expand(1, 1, 40, DH) for _ in range(2))
    rope = subject.RotaryPositionEmbedding(DH)

    scores = (
        is_tensor(rope(query), "forward(query)")[0, 0].double() @ is_tensor(rope(key), "forward(key)")[0, 0].double().mT
    )

    moved, still = scores[shift:, shift:], scores[:-shift, :-shift]
    hint = "query and key turn by their own positions, so that only the difference is left"
    close(moved, still, f"scores at (i + {shift}, j + {shift}) beside those at (i, j)", tolerance=1e-4, hint=hint)
    change = (scores[:, shift] - scores[:, 0]).abs().max()
    assert change > 0.1, (
        f"scores: they change by at most {change:.3g} when the key alone moves by {shift}; is it turned?"
    )


@requirement("2.1")
def test_strided_inputs(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Transposed, expanded, sliced and every-other-feature views are as good as copies."""
    rope = subject.RotaryPositionEmbedding(DH)
    base = torch.randn(B, 9, H, 2 * DH, generator=rng, dtype=torch.float64)
    views = {
        "transposed": base[..., :DH].transpose(1, 2),
        "of every other row and feature": base.transpose(1, 2)[:, :, ::2, ::2],
        "expanded": base[:1, :1, :1, :DH].expand(B, H, L, DH),
        "with features first": base.permute(3, 0, 2, 1)[:DH].permute(1, 2, 3, 0),
    }
    for name, view in views.items():
        agree(close, rope, view, hint=f"x is a view here, {name}")


# 2.2 the frequencies


@requirement("2.2")
@pytest.mark.parametrize("base", [10000, 100, 500_000.0], ids=["10000", "100", "500000"])
def test_every_pair_has_its_frequency(subject: Subject, close: Close, base: float) -> None:
    """From one row to the next, pair i turns by base**(-2i/dim)."""
    for dim in (2, 6, 16, 34):
        pairs = dim // 2
        x = torch.eye(dim, dtype=torch.float64)[:pairs, None].expand(1, pairs, 3, dim)  # head i: a 1 at component i
        expected = angles_of(torch.tensor([1, 1]), dim, base).T

        out = is_tensor(subject.RotaryPositionEmbedding(dim, base=base)(x), f"forward with base {base}").double()[0]

        own = (out * x[0]).sum(-1)
        steps = torch.atan2((out - own.unsqueeze(-1) * x[0]).norm(dim=-1), own).diff(dim=-1).abs()
        hint = f"base**(-2i/dim) for i = 0 … {pairs - 1} are {[float(f'{angle:.4g}') for angle in expected[:, 0]]}"
        what = f"forward with dim {dim}, base {base}: angle per position ÷ base**(-2i/dim)"
        close(steps / expected, torch.ones_like(expected), what, tolerance=1e-4, hint=hint)


@requirement("2.2")
def test_base_is_the_third_argument(subject: Subject, close: Close) -> None:
    """With dim 4 and base 100 the second pair turns by 0.1 per position."""
    x = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    x[..., 1] = 1

    out = is_tensor(subject.RotaryPositionEmbedding(4, 32, 100)(x), "forward").double()[0, 0]

    what = "RotaryPositionEmbedding(4, 32, 100): cosine of the angle of pair 1 per position"
    close(out[1] @ out[0], torch.tensor(cos(0.1)).double(), what, tolerance=1e-4, hint="100**(-2/4) is 0.1")


# 2.3 variable lengths


class Turns(DispatchMode):
    """Counts what makes cosines and sines while it is on: torch's operations by elements, Python's by calls.

    Unlike Trace it tells a complex exponential from a real one, which a softmax or the frequencies may need.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self._counts_python = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.removeprefix("_foreach").strip("_")
        elements = result.numel() if isinstance(result, Tensor) else 1
        complex_one = isinstance(result, Tensor) and result.is_complex()
        if elements and (name in REAL_TURNS or (name in COMPLEX_TURNS and complex_one)):
            self.seen[name] += elements
        return result

    def __enter__(self) -> "Turns":
        super().__enter__()
        self._counts_python = sys.getprofile() is None
        if self._counts_python:
            sys.setprofile(self._python)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._counts_python:
            sys.setprofile(None)
        super().__exit__(*error)

    def _python(self, frame: Any, event: str, function: Any) -> None:
        if event == "c_call":
            called = f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', '')}"
            self.seen[called] += called in PYTHON_TURNS


REAL_TURNS = {"cos", "sin", "tan", "sinc", "polar", "linalg_matrix_exp"}
COMPLEX_TURNS = {"exp", "exp2", "expm1", "pow", "cosh", "sinh"}
PYTHON_TURNS = {"math.cos", "math.sin", "math.tan", "cmath.exp", "cmath.rect", "cmath.cos", "cmath.sin"}


def agree_without_turns(close: Close, rope: Any, x: Tensor, after: str, tolerance: float = NEAR) -> None:
    """forward is right, and computes no cosine or sine."""
    turns = Turns()
    agree(close, rope, x, tolerance=tolerance, inside=turns)
    none_seen(turns, f"forward({x.size(-2)} rows of {named(x.dtype)}) {after}")


def none_seen(turns: Turns, what: str) -> None:
    """Fails if any cosine or sine was computed."""
    seen = [
        f"{name} ({count} {'calls' if '.' in name else 'elements'})"
        for name, count in sorted(turns.seen.items())
        if count
    ]
    hint = "keep cosines and sines for all positions so far: a shorter call takes a slice, another dtype the same table"
    assert not seen, f"{what}: computes {' and '.join(seen)} again\n{hint}"


@requirement("2.3")
@pytest.mark.parametrize("expected_positions", [4, 64])
def test_lengths_in_any_order(subject: Subject, close: Close, rng: torch.Generator, expected_positions: int) -> None:
    """One module is right for longer and shorter inputs after each other, within max_position_embeddings and beyond."""
    rope = subject.RotaryPositionEmbedding(DH, expected_positions)
    lengths = (3, 9, 5, 23, 1, 9, 40)

    for index, length in enumerate(lengths):
        agree(close, rope, rows(rng, length), hint=f"the same module has served {list(lengths[:index])} rows before")


@requirement("2.3")
@pytest.mark.parametrize("first", DTYPES, ids=named)
def test_dtypes_in_any_order(subject: Subject, close: Close, rng: torch.Generator, first: torch.dtype) -> None:
    """A call in one dtype leaves nothing behind that changes the next one in another."""
    rope = subject.RotaryPositionEmbedding(DH, 4)

    for dtype in (first, torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32):
        hint = f"the same module was called in {named(first)} first: a table in x's dtype must not serve other dtypes"
        agree(close, rope, rows(rng, L, dtype), hint=hint, tolerance=LOOSE.get(dtype, NEAR))


@requirement("2.3")
def test_modules_do_not_share_what_differs(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Modules of other dims and bases, called before, change nothing."""
    for dim, base in ((DH + 2, 10000), (DH, 50), (DH, 10000.0)):
        rope = subject.RotaryPositionEmbedding(dim, 16, base)
        x = rows(rng, L, dim=dim)
        if base == 10000:
            agree(close, rope, x, hint="modules of another dim or base were called before: is a cache shared by all?")
        else:
            rope(x)


@requirement("2.3")
@pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__
)
@pytest.mark.parametrize("expected_positions", [4, 64])
def test_a_second_call_computes_no_cosine_again(
    subject: Subject, close: Close, rng: torch.Generator, expected_positions: int, mode: Callable[[], Any]
) -> None:
    """The same length again costs no cosine or sine, also beyond max_position_embeddings and at inference."""
    rope = subject.RotaryPositionEmbedding(DH, expected_positions)

    with mode():
        rope(rows(rng, 23))
        agree_without_turns(close, rope, rows(rng, 23), after=f"after the same call, in {mode.__name__}")


@requirement("2.3")
@pytest.mark.parametrize("expected_positions", [4, 64])
def test_shorter_calls_compute_no_cosine_again(
    subject: Subject, close: Close, rng: torch.Generator, expected_positions: int
) -> None:
    """Once 23 positions are known, none of them costs a cosine or sine again, in whatever shapes they come."""
    rope = subject.RotaryPositionEmbedding(DH, expected_positions)
    rope(rows(rng, 3))
    rope(rows(rng, 23))

    for length in (9, 3, 23, 1, 22, 23):
        agree_without_turns(close, rope, rows(rng, length), after="after a call with 23 rows")
    agree_without_turns(close, rope, rows(rng, 9)[:1, :2], after="with another batch size and fewer heads")
    agree_without_turns(close, rope.eval(), rows(rng, 9), after="after eval()")
    agree_without_turns(close, rope.train(), rows(rng, 9), after="after train()")


@requirement("2.3")
@pytest.mark.parametrize("first", DTYPES, ids=named)
def test_other_dtypes_compute_no_cosine_again(
    subject: Subject, close: Close, rng: torch.Generator, first: torch.dtype
) -> None:
    """A table made in a call of one dtype serves every other dtype."""
    rope = subject.RotaryPositionEmbedding(DH, 4)
    rope(rows(rng, 23, first))

    for dtype in (*DTYPES, first):
        x, tolerance = rows(rng, 9, dtype), LOOSE.get(dtype, NEAR)
        agree_without_turns(close, rope, x, after=f"after a call with 23 rows of {named(first)}", tolerance=tolerance)


@requirement("2.3")
def test_decoding_computes_no_cosine_again(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """After decoding one token at a time, the next sequence of that length costs no cosine or sine."""
    rope = subject.RotaryPositionEmbedding(DH, 4)
    x = rows(rng, 13)
    for position in range(13):
        rope(x[:, :, position : position + 1], seq_len=position + 1)

    agree_without_turns(close, rope, x, after="after 13 steps of decoding")
    for last in (1, 13, 7):
        with Turns() as turns:
            rope(x[:, :, last - 1 : last], seq_len=last)
        none_seen(turns, f"forward(1 row, seq_len={last}) after 13 steps of decoding")


@requirement("2.3")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=named)
def test_a_cast_module_computes_no_cosine_twice(
    subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype
) -> None:
    """A cast may cost a new table once, not in every later call."""
    rope = subject.RotaryPositionEmbedding(DH, 64).to(dtype)
    rope(rows(rng, 23, dtype))

    after = f"after a call with 23 rows in a module cast to {named(dtype)}"
    agree_without_turns(close, rope, rows(rng, 9), after, tolerance=LOOSE[torch.bfloat16])


@requirement("2.3")
def test_attention_computes_no_cosine_again(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A second call of the attention layer costs no cosine or sine, whatever the length below."""
    attention = build(subject)
    attention(some_x(rng, 9))
    x = some_x(rng, 7)

    with Turns() as turns:
        attention(x)

    none_seen(turns, "attention(7 rows) after a call with 9 rows")
    agree(close, attention.rotary_emb, rows(rng, 7, dim=D // H), hint="this is the attention layer's rotary_emb")


@contextmanager
def autocast_on_meta() -> Iterator[None]:
    """Lets autocast take the meta device, which it does not know, so that it may be named by a tensor's device type."""
    init = torch.autocast.__init__

    def lenient(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        init(self, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    with mock.patch.object(torch.autocast, "__init__", lenient):
        yield


@requirement("2.3")
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called before"])
def test_a_module_may_be_moved(subject: Subject, close: Close, rng: torch.Generator, called: bool) -> None:
    """On another device nothing of the first one is left; the meta device stands in for one."""
    x = rows(rng, 9)
    agree(close, subject.RotaryPositionEmbedding(DH, 4), x)
    rope = subject.RotaryPositionEmbedding(DH, 4)
    if called:
        rope(x)

    with autocast_on_meta():
        moved = is_tensor(rope.to("meta")(x.to("meta")), "forward(x) on meta")

    assert moved.device.type == "meta", (
        f"forward(x) on meta: the result is on {moved.device}; a table of the first device is left"
    )
    assert moved.shape == x.shape, f"forward(x) on meta: shape {tuple(moved.shape)} came, {tuple(x.shape)} was wanted"
    hint = "a module on the meta device was called before: is a cache shared between devices?"
    agree(close, subject.RotaryPositionEmbedding(DH, 4), x, hint=hint)


@requirement("2.3")
def test_attention_may_be_moved(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """So may the attention layer, with a mask."""
    x, causal = some_x(rng, 7), torch.ones(1, 1, 7, 7).tril()
    agree(close, build(subject).rotary_emb, rows(rng, 7, dim=D // H), hint="this is the attention layer's rotary_emb")
    attention = build(subject).to("meta")

    with autocast_on_meta():
        output = is_tensor(attention(x.to("meta"), causal.to("meta")), "attention(x, mask) on meta")

    assert output.device.type == "meta", f"attention(x, mask) on meta: the result is on {output.device}"
    came, wanted = tuple(output.shape), tuple(x.shape)
    assert came == wanted, f"attention(x, mask) on meta: shape {came} came, {wanted} was wanted"


@requirement("2.3")
@pytest.mark.parametrize("layer", ["rotation", "attention"])
def test_state_dict_holds_no_positions(subject: Subject, close: Close, rng: torch.Generator, layer: str) -> None:
    """The state_dict is the same whatever max_position_embeddings is and whatever lengths were seen, and loads."""
    agree(close, subject.RotaryPositionEmbedding(DH, 4), rows(rng, 9))
    few, many = (
        subject.RotaryPositionEmbedding(DH, size) if layer == "rotation" else build(subject, size) for size in (4, 16)
    )
    before = {name: value.clone() for name, value in few.state_dict().items()}
    few(rows(rng, 40) if layer == "rotation" else some_x(rng, 40))

    hint = "tables of positions are plain attributes or buffers with persistent=False"
    for state, what in (
        (few.state_dict(), "after a call with 40 rows"),
        (many.state_dict(), "with another max_position_embeddings"),
    ):
        assert state.keys() == before.keys(), (
            f"state_dict {what}: keys {sorted(state)} came, {sorted(before)} were wanted\n{hint}"
        )
        for name, value in state.items():
            close(value, before[name], f"state_dict {what}: {name}", tolerance=0, hint=hint)


# 2.4 attention


def build(subject: Subject, max_position_embeddings: int = 64, d_model: int = D, heads: int = H) -> Any:
    """A seeded attention layer of the learner's in float64, with D = 12 and 3 heads unless told."""
    layer = subject.MultiHeadAttentionWithRoPE
    seed(1)
    return layer(d_model, heads, max_position_embeddings).double()


def some_x(rng: torch.Generator, length: int = L, batch: int = B, d_model: int = D) -> Tensor:
    """An input large enough to make the attention weights differ."""
    return 2 * torch.randn(batch, length, d_model, generator=rng, dtype=torch.float64)


def weights_of(attention: Any) -> dict[str, Tensor]:
    """Copies of the layer's weights in float64, by their given names."""
    return {name: attention.get_parameter(name).detach().double().clone() for name in PARAMETERS}


def reference(
    attention: Any,
    x: Tensor,
    mask: Tensor | None = None,
    weights: dict[str, Tensor] | None = None,
    heads: int = H,
) -> Tensor:
    """The formula in float64, with the layer's weights or those given."""
    weights = weights or weights_of(attention)
    positions = torch.arange(x.size(1))
    q, k, v = (
        (x.double() @ weights[f"{name}.weight"].T).unflatten(-1, (heads, -1)).transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    scores = turned(q, positions) @ turned(k, positions).mT / q.size(-1) ** 0.5
    if mask is not None:
        scores = scores.masked_fill(mask == 0, float("-inf"))
    context = scores.softmax(-1).nan_to_num(0.0) @ v
    result: Tensor = context.transpose(1, 2).flatten(2) @ weights["o_proj.weight"].T + weights["o_proj.bias"]
    return result


def some_mask(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """A boolean mask in which every row allows something."""
    mask = torch.rand(shape, generator=rng) > 0.4
    mask[..., 0] = True
    return mask


def attends(
    close: Close, attention: Any, x: Tensor, mask: Tensor | None = None, hint: str = "", heads: int = H
) -> None:
    """The layer's output equals the formula's, in x's dtype."""
    expected = reference(attention, x, mask, heads=heads).to(x.dtype)

    output = attention(x) if mask is None else attention(x, mask)

    close(output, expected, "attention(x)" if mask is None else "attention(x, mask)", tolerance=NEAR, hint=hint)


@requirement("2.4")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=named)
def test_attention_leaves_its_inputs_alone(
    subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype
) -> None:
    """x and mask are after the call what they were before."""
    attention, x, pairs = build(subject).to(dtype), some_x(rng).to(dtype), some_mask((B, 1, L, L), rng)

    for mask_dtype in MASK_DTYPES:
        mask = pairs.to(mask_dtype)
        before = x.clone(), mask.clone()

        with torch.set_grad_enabled(dtype == torch.float64):
            attention(x, mask)

        close(x, before[0], "x after attention(x, mask)", tolerance=0, hint="x is written to")
        close(
            mask,
            before[1],
            f"mask of {named(mask_dtype)} after attention(x, mask)",
            tolerance=0,
            hint="mask is written to",
        )


@requirement("2.4")
def test_values_are_not_turned(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Where all rows are the same, every weighted mean of the values is the value itself, at every position."""
    x, attention = some_x(rng, 1).repeat(1, L, 1), build(subject)
    weights = weights_of(attention)
    expected = x @ weights["v_proj.weight"].T @ weights["o_proj.weight"].T + weights["o_proj.bias"]

    output = attention(x)

    hint = "all rows are the same: o_proj(v_proj(x)), values not turned, heads split and joined as [B, H, L, Dh]"
    close(output, expected, "attention(x)", tolerance=1e-6, hint=hint)


@requirement("2.4")
def test_queries_and_keys_both_turn(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Four rows give the same alone as after three rows that nobody may attend to: only distances count."""
    x, attention = some_x(rng, 7), build(subject)
    mask = torch.arange(7).view(1, 1, 1, 7) >= 3

    alone, later = attention(x[:, 3:], mask[..., 3:]), is_tensor(attention(x, mask), "attention(x, mask)")

    hint = "the rows only stand three positions later than they do alone: do queries and keys both turn?"
    close(
        later[:, 3:], is_tensor(alone, "attention(x)").detach(), "attention(x, mask)[:, 3:]", tolerance=1e-4, hint=hint
    )


@requirement("2.4")
def test_attention_equals_the_formula(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Without a mask, every position attends to every position."""
    hint = "softmax(rope(q) rope(k)ᵀ / √Dh) v with heads split off as [B, H, L, Dh], joined again, then o_proj"
    attends(close, build(subject), some_x(rng), hint=hint)


@requirement("2.4")
@pytest.mark.parametrize("kind", ["plain", "causal", "padding", "in eval"])
def test_gradients_equal_the_formulas(subject: Subject, close: Close, rng: torch.Generator, kind: str) -> None:
    """Output, and the gradients of x and of every weight, equal the formula's."""
    masks = {"causal": torch.ones(1, 1, 7, 7).tril() == 1, "padding": some_mask((B, 1, 1, 7), rng)}
    mask, probe = masks.get(kind), some_x(rng, 7)
    x = some_x(rng, 7).requires_grad_()
    theirs = x.detach().clone().requires_grad_()
    attention = build(subject).train(kind != "in eval")
    weights = {name: weight.requires_grad_() for name, weight in weights_of(attention).items()}
    expected = reference(attention, x, mask, weights)
    (expected * probe).sum().backward()

    output = is_tensor(attention(theirs) if mask is None else attention(theirs, mask), "attention(x)")

    close(
        output, expected, f"attention(x), {kind}", tolerance=NEAR, hint="a mask says 1 or true where a query may attend"
    )
    assert output.requires_grad, f"attention(x), {kind}: the output carries no gradient"
    (output * probe).sum().backward()
    hint = f"{kind}: the output agrees, its gradient does not: is something detached?"
    close(theirs.grad, is_tensor(x.grad, "x.grad"), "backward: gradient of x", tolerance=1e-4, hint=hint)
    for name, weight in weights.items():
        wanted = is_tensor(weight.grad, name)
        close(attention.get_parameter(name).grad, wanted, f"backward: gradient of {name}", tolerance=1e-4, hint=hint)


@requirement("2.4")
@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=named)
def test_every_mask_dtype(subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Boolean and 0/1 masks of every dtype mean the same, whatever x's dtype is."""
    mask = some_mask((B, 1, L, L), rng).to(dtype)

    for of_x in (torch.float64, torch.float32):
        hint = f"with a mask of {named(dtype)} for x in {named(of_x)}; 1 means: may attend"
        attends(close, build(subject).to(of_x), some_x(rng).to(of_x), mask, hint=hint)


@halfway
@requirement("2.4")
@pytest.mark.parametrize(
    "shape",
    [(B, 1, 1, L), (1, 1, L, L), (1, H, 1, L), (B, H, L, L), (B, 1, L, 1), (1, 1, 1, 1)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_every_mask_shape(subject: Subject, close: Close, rng: torch.Generator, shape: tuple[int, ...]) -> None:
    """Masks per batch row, head, query and key all work."""
    attends(close, build(subject), some_x(rng), some_mask(shape, rng), hint=f"with a mask of shape {shape}")


@requirement("2.4")
@pytest.mark.parametrize("heads", [1, H], ids=["one mask for all heads", "one per head"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64], ids=named)
def test_a_fully_masked_row_gives_the_bias(
    subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype, heads: int
) -> None:
    """A query that may attend to nothing has zero weights; its output is o_proj's bias, its gradient finite."""
    mask = some_mask((B, heads, L, L), rng)
    mask[0, :, 2] = mask[0, -1, 3] = mask[1] = False
    x = some_x(rng).requires_grad_()
    attention = build(subject)

    output = is_tensor(attention(x, mask.to(dtype)), "attention(x, mask)")

    hint = "a query that may attend to nothing (in one head, or in all) has zero weights, not NaN or a uniform row"
    bias = attention.o_proj.bias.detach()
    close(output[0, 2], bias, "attention(x, mask): a fully masked row", tolerance=1e-9, hint=hint)
    close(output, reference(attention, x.detach(), mask), "attention(x, mask)", tolerance=NEAR, hint=hint)
    output.sum().backward()
    assert is_tensor(x.grad, "x.grad").isfinite().all(), f"backward: x's gradient is not finite\n{hint}"


@requirement("2.4")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=named)
def test_padding_changes_nothing(subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Masked rows give what their absence gives to the others, even if they hold 1e6."""
    x = some_x(rng, 7).to(dtype)
    mask = torch.arange(7).view(1, 1, 1, 7) < 4
    attention = build(subject).to(dtype)
    expected = reference(attention, x[:, :4])
    x[:, 4:] = 1e6

    output = is_tensor(attention(x, mask), "attention(x, mask)")

    hint = "rows 4 and later hold 1e6 and are masked out; they reach the output"
    close(output[:, :4].double(), expected, "attention(x, mask)[:, :4]", tolerance=NEAR, hint=hint)


@requirement("2.4")
def test_low_scores_are_not_masked_ones(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Where a query may attend to one key alone, that key has the whole weight, however low its score is."""
    mask = torch.eye(L).view(1, 1, L, L)

    hint = "x is 1000 times as large, and every query may attend to itself alone: a mask is no finite, small penalty"
    attends(close, build(subject), 1000 * some_x(rng), mask, hint=hint)


@requirement("2.4")
def test_attention_of_strided_inputs(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A transposed x and an expanded mask are as good as copies."""
    x, mask = some_x(rng).mT.contiguous().mT, some_mask((1, 1, L, 1), rng).expand(B, 1, L, L).mT

    attends(close, build(subject), x, mask, hint="x is a transposed view here, mask an expanded one")


@requirement("2.4")
@pytest.mark.parametrize("length", [1, 4, 9])
def test_attention_of_any_length(subject: Subject, close: Close, rng: torch.Generator, length: int) -> None:
    """One row, as many as max_position_embeddings, and more than it."""
    attends(close, build(subject, 4), some_x(rng, length), hint=f"{length} rows, max_position_embeddings=4")


@requirement("2.4")
@pytest.mark.parametrize(
    ("batch", "length", "d_model", "heads"), [(3, 7, 20, 2), (5, 3, 24, 4), (1, 6, 14, 1), (3, 41, 10, 5)]
)
def test_attention_of_any_size(
    subject: Subject, close: Close, rng: torch.Generator, batch: int, length: int, d_model: int, heads: int
) -> None:
    """Any batch, length, number of heads and size of a head, without a mask and with one per batch row and head."""
    attention, x = build(subject, 64, d_model, heads), some_x(rng, length, batch, d_model)
    hint = f"B={batch}, L={length}, D={d_model}, H={heads}, so Dh={d_model // heads}: is a size fixed in the code?"

    attends(close, attention, x, hint=hint, heads=heads)
    attends(close, attention, x, some_mask((batch, heads, length, length), rng), hint=hint, heads=heads)


@requirement("2.4")
def test_new_weights_count_at_once(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A call after the weights have changed, in place or by loading, uses the new ones."""
    x, attention = some_x(rng), build(subject)
    attention(x)

    with torch.no_grad():
        for name in PARAMETERS:
            attention.get_parameter(name).mul_(-0.7)
    attends(close, attention, x, hint="the weights were changed in place before this call")
    state = attention.state_dict()
    attention.load_state_dict(state | {name: 1.3 * state[name] for name in PARAMETERS})
    attends(close, attention, x, hint="the weights were loaded anew before this call")


# 2.5 the comparison


def sinusoidal(positions: Tensor, dim: int) -> Tensor:
    """The paper's embedding in float64: [L, dim]."""
    angles = angles_of(positions, dim)
    out = torch.empty(len(positions), dim, dtype=torch.float64)
    out[:, 0::2], out[:, 1::2] = angles.sin(), angles.cos()
    return out


@requirement("2.5")
def test_sinusoidal_by_hand(subject: Subject, close: Close) -> None:
    """Positions 0 and 1 with dim 4: the frequencies are 1 and 0.01."""
    expected = torch.tensor([[0, 1, 0, 1], [sin(1), cos(1), sin(0.01), cos(0.01)]], dtype=torch.float64)

    table = is_tensor(subject.sinusoidal_position_embedding(2, 4), "sinusoidal_position_embedding(2, 4)")

    hint = "sin stands at the even features, cos at the odd ones: [sin 1, cos 1, sin 0.01, cos 0.01] at position 1"
    close(table.double(), expected, "sinusoidal_position_embedding(2, 4)", tolerance=NEAR, hint=hint)


@requirement("2.5")
@pytest.mark.parametrize(("seq_len", "dim"), [(1, 2), (7, 6), (61, 14)])
def test_sinusoidal_equals_the_paper(subject: Subject, close: Close, seq_len: int, dim: int) -> None:
    """Feature 2i is sin(p / 10000**(2i/dim)), feature 2i + 1 its cosine."""
    expected = sinusoidal(torch.arange(seq_len), dim)

    table = is_tensor(subject.sinusoidal_position_embedding(seq_len, dim), "sinusoidal_position_embedding")

    close(table.double(), expected, f"sinusoidal_position_embedding({seq_len}, {dim})", tolerance=NEAR,
          hint="features 2i and 2i + 1 share the frequency 10000**(-2i/dim)")  # fmt: skip


@requirement("2.5")
@pytest.mark.parametrize(
    "arguments", [{}, {"seq_len": 11, "dim": 6, "shift": 5}, {"seq_len": 9, "dim": 14, "shift": 31}], ids=len
)
def test_comparison_is_measured(subject: Subject, arguments: dict[str, int]) -> None:
    """The sinusoidal change is what this check measures; the rotary change is near 0, but not 0."""
    seq_len, dim, shift = ({"seq_len": 64, "dim": 32, "shift": 16} | arguments).values()
    query, key = torch.randn(2, dim, generator=torch.Generator().manual_seed(0)).double()
    table = sinusoidal(torch.arange(seq_len + shift), dim)
    scores = (query + table) @ (key + table).T
    expected = float((scores[shift:, shift:] - scores[:seq_len, :seq_len]).abs().max())

    result = subject.compare_position_embeddings(**arguments)

    what = f"compare_position_embeddings({', '.join(f'{name}={value}' for name, value in arguments.items())})"
    assert isinstance(result, dict) and set(result) == {"rope", "sinusoidal"}, (
        f"{what}: {result!r} came, a dict with the keys 'rope' and 'sinusoidal' was wanted"
    )
    for name, value in result.items():
        assert type(value) in (int, float), f"{what}: {name} is a {type(value).__name__}, a Python float was wanted"
    assert abs(result["sinusoidal"] - expected) <= 1e-3, (
        f"{what}: sinusoidal {result['sinusoidal']:.4f} came, {expected:.4f} was wanted\n"
        "the largest absolute change of (query + table[i]) · (key + table[j]) over all pairs, if i and j move by shift"
    )
    assert result["rope"] <= 1e-3, (
        f"{what}: rope {result['rope']:.4g} came; turned scores depend on the distance alone, so at most 1e-3"
    )
    assert result["rope"] > 0, (
        f"{what}: rope is {result['rope']}; float arithmetic alone makes it differ from 0: was anything turned?"
    )
    assert result["rope"] != round(result["rope"], 12), (
        f"{what}: rope is {result['rope']!r}, a round number; what is measured is not rounded"
    )


@requirement("2.5")
def test_comparison_depends_on_its_arguments(subject: Subject) -> None:
    """The rotary change is a rounding error, and so not the same for every length, dim and shift."""
    compare = subject.compare_position_embeddings

    ropes = {compare(*sizes)["rope"] for sizes in ((7, 4, 3), (23, 32, 40), (11, 130, 200))}

    assert len(ropes) > 1, (
        f"compare_position_embeddings: rope is {ropes} for every seq_len, dim and shift\nmeasure it, as for sinusoidal"
    )


# 2.6 decoding


@requirement("2.6")
def test_seq_len_by_hand(subject: Subject, close: Close) -> None:
    """With seq_len 7 two rows stand at positions 5 and 6."""
    x = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]], dtype=torch.float64)
    expected = torch.tensor([[[[cos(5), sin(5)], [cos(6), sin(6)]]]], dtype=torch.float64)

    turned_rows = is_tensor(subject.RotaryPositionEmbedding(2)(x, seq_len=7), "forward(2 rows, seq_len=7)")

    hint = "seq_len counts the positions up to and including the last row: these rows stand at 5 and 6"
    close(turned_rows.double(), expected, "forward([1, 0] twice, seq_len=7)", tolerance=NEAR, hint=hint)


@requirement("2.6")
@pytest.mark.parametrize(
    "sizes",
    [(5, 1, 1, 1), (1, 1, 1, 1), (4, 3, 2, 5), (11,)],
    ids=["one token at a time", "no prefill", "several", "prefill only"],
)
@pytest.mark.parametrize("expected_positions", [6, 64])
def test_decoding_gives_the_full_pass(
    subject: Subject, close: Close, rng: torch.Generator, expected_positions: int, sizes: tuple[int, ...]
) -> None:
    """A prefill, then some tokens at a time, gives the rows of the full pass, beyond max_position_embeddings too."""
    x, end = rows(rng, sum(sizes)), 0
    rope = subject.RotaryPositionEmbedding(DH, expected_positions)

    for size in sizes:
        start, end = end, end + size
        hint = f"positions {start} … {end - 1}, max_position_embeddings={expected_positions}"
        agree(close, rope, x[:, :, start:end], end, hint=hint)


@requirement("2.6")
@pytest.mark.parametrize("seq_len", [8, 9, 16, 17, 63, 5001])
def test_the_first_call_may_be_late(subject: Subject, close: Close, rng: torch.Generator, seq_len: int) -> None:
    """A module that has seen nothing turns a row of a late position, also beyond max_position_embeddings."""
    rope = subject.RotaryPositionEmbedding(DH, 8)

    agree(
        close,
        rope,
        rows(rng, 1),
        seq_len,
        hint=f"the first call of a module with max_position_embeddings=8 is for position {seq_len - 1}",
        tolerance=NEAR if seq_len <= 64 else 2e-2,  # float32 angles may be off by 5e-3 here
    )


@requirement("2.6")
def test_two_sequences_take_turns(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The position comes from seq_len alone, not from what was called before."""
    rope = subject.RotaryPositionEmbedding(DH, 8)

    for seq_len in (12, 3, 13, 4, 4, 14):
        agree(
            close,
            rope,
            rows(rng, 1),
            seq_len,
            hint="two sequences are decoded in turn: seq_len alone says where a row stands",
        )


# 2.7 precision


def legs(rng: torch.Generator, dtype: torch.dtype) -> Tensor:
    """4,001 rows of dim 8 whose pairs are at most 1 long, with one leg in heads 0 and 1, with two in head 2."""
    x = torch.zeros(1, 3, 4001, 8, dtype=torch.float64)
    sizes = 0.75 + 0.25 * torch.rand(2, 4001, 4, generator=rng, dtype=torch.float64)
    x[0, 0, :, :4], x[0, 1, :, 4:] = sizes[0], -sizes[1]
    x[0, 2, :, :4], x[0, 2, :, 4:] = 0.7 * sizes[1], -0.7 * sizes[0]
    return x.to(dtype)


def precise(rope: Any, x: Tensor, what: str) -> None:
    """forward is as near to float64 as the docstring asks for, in x's dtype."""
    actual = is_tensor(rope(x), what).detach()

    assert actual.dtype == x.dtype, f"{what}: the result is {named(actual.dtype)}; it has x's dtype, {named(x.dtype)}"
    for positions, limit in ((torch.arange(64), NEAR), (torch.arange(3980, 4001), FAR)):
        expected = turned(x[:, :, positions], positions)
        gap = (actual[:, :, positions].double() - expected).abs()
        excess = (gap - 1.01 * ROUNDING.get(x.dtype, 0) * expected.abs() - limit).nan_to_num(torch.inf).amax((0, 1, 3))
        worst = int(excess.argmax())
        assert excess[worst] <= 0, (
            f"{what}: off by {gap[:, :, worst].max():.2g} at position {positions[worst]}; {limit:g} is asked for"
            f"{' beside the rounding of the result' if x.dtype in ROUNDING else ''}\n"
            "cosines and sines, and what they are made from, stay float32 or better whatever the module or x is cast to"
            "; the result alone is rounded, once"
        )


@requirement("2.7")
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_the_result_has_xs_dtype(subject: Subject, rng: torch.Generator, dtype: torch.dtype) -> None:
    """forward and apply_rotary_pos_emb give x's dtype, not that of the table."""
    rope = subject.RotaryPositionEmbedding(DH)
    x = rows(rng, L, dtype)

    tables = (torch.float32, torch.float64) if dtype in (torch.float32, torch.float64) else (torch.float32,)
    results = {"forward(x)": rope(x)} | {
        f"apply_rotary_pos_emb(x, cos and sin in {named(table)})": rope.apply_rotary_pos_emb(
            x, torch.zeros(L, DH, dtype=table), torch.ones(L, DH, dtype=table)
        )
        for table in tables
    }

    for what, result in results.items():
        came = is_tensor(result, what).dtype
        assert came == dtype, (
            f"{what} of {named(dtype)}: {named(came)} came, {named(dtype)} was wanted\ncast the result, not the table"
        )


@requirement("2.7")
@pytest.mark.parametrize(
    "casts",
    [(), (torch.bfloat16, torch.float32), (torch.bfloat16,), (torch.float16,), (torch.float64,)],
    ids=lambda casts: " then ".join(map(named, casts)) or "no cast",
)
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called before"])
def test_a_float32_call_is_precise(
    subject: Subject, rng: torch.Generator, casts: tuple[torch.dtype, ...], called: bool
) -> None:
    """A float32 call keeps its precision after every cast of the module, before and after its first call."""
    rope, x = subject.RotaryPositionEmbedding(8, 4096), legs(rng, torch.float32)
    if called:
        rope(x[:, :, :5])

    for dtype in casts:
        rope = rope.to(dtype)

    precise(rope, x, f"forward in float32{''.join(f' after .to({named(dtype)})' for dtype in casts)}")


@requirement("2.7")
@pytest.mark.parametrize("cast", [False, True], ids=["module not cast", "module cast"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=named)
def test_a_half_precision_call_is_precise(
    subject: Subject, rng: torch.Generator, dtype: torch.dtype, cast: bool
) -> None:
    """In half precision only the rounding of the result is lost."""
    rope = subject.RotaryPositionEmbedding(8, 4096)

    precise(rope.to(dtype) if cast else rope, legs(rng, dtype), f"forward in {named(dtype)}")


@requirement("2.7")
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=["inference_mode", "no_grad"])
@pytest.mark.parametrize("expected_positions", [4, 64])
def test_inference_first_training_later(
    subject: Subject, close: Close, rng: torch.Generator, mode: Callable[[], Any], expected_positions: int
) -> None:
    """What the first call keeps, made in inference_mode, serves training."""
    rope = subject.RotaryPositionEmbedding(DH, expected_positions)
    with mode():
        rope(rows(rng, 9))

    differentiates(
        close,
        rope,
        rng,
        9,
        hint=f"the first call was in {mode.__name__}: a tensor made there must not be kept for training",
    )


@requirement("2.7")
def test_attention_infers_first_and_trains_later(subject: Subject, rng: torch.Generator) -> None:
    """So does the attention layer."""
    attention, x, causal = build(subject, 4), some_x(rng, 9), torch.ones(1, 1, 9, 9).tril()
    with torch.inference_mode():
        attention.eval()(x, causal)

    is_tensor(attention.train()(x, causal), "attention(x, mask)").sum().backward()

    some = any(parameter.grad is not None for parameter in attention.parameters())
    assert some, "attention(x, mask), first in inference_mode, then in training: no weight gets a gradient"


@requirement("2.7")
def test_gradients_flow_step_after_step(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The gradient is the probe turned back; a second step works like the first."""
    rope = subject.RotaryPositionEmbedding(DH)

    for hint in ("in the first step: is x detached?", "in the second step: is a graph kept between calls?"):
        differentiates(close, rope, rng, L, hint=hint)
    for dtype in DTYPES:
        differentiates(close, rope, rng, L, hint=f"x is {named(dtype)}: is it detached?", dtype=dtype)
    rope.eval()
    differentiates(close, rope, rng, L, hint="in eval mode; only no_grad switches gradients off")


def differentiates(
    close: Close, rope: Any, rng: torch.Generator, length: int, hint: str, dtype: torch.dtype = torch.float64
) -> None:
    """The gradient that reaches x is the one that was sent, turned back."""
    x, probe = rows(rng, length, dtype).requires_grad_(), rows(rng, length, dtype)
    expected = turned(probe, -torch.arange(length))

    output = is_tensor(rope(x), "forward(x)")
    assert output.requires_grad, f"forward(x): the result carries no gradient\n{hint}"
    (output * probe).sum().backward()

    gradient = is_tensor(x.grad, "x.grad", hint).double()
    close(gradient, expected, "backward: gradient of x", tolerance=LOOSE.get(dtype, NEAR), hint=hint)


@requirement("2.7")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=named)
def test_attention_keeps_xs_dtype(subject: Subject, rng: torch.Generator, dtype: torch.dtype) -> None:
    """A layer cast to a dtype takes it and gives it, with every mask: the mask's dtype is no matter."""
    attention, x, pairs = build(subject).to(dtype), some_x(rng).to(dtype), some_mask((B, 1, L, L), rng)

    for masked in (None, *MASK_DTYPES):
        output = is_tensor(attention(x, *([pairs.to(masked)] if masked else [])), "attention(x)")

        what = f"attention(x{f', mask of {named(masked)}' if masked else ''}) in {named(dtype)}"
        assert output.dtype == dtype, f"{what}: {named(output.dtype)} came, {named(dtype)} was wanted"
        assert output.isfinite().all(), f"{what}: not finite"


# 2.8 bad input


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
@pytest.mark.parametrize("seq_len", [13, 16, 0, -3])
def test_a_small_seq_len_is_refused(subject: Subject, rng: torch.Generator, seq_len: int) -> None:
    """A seq_len below the number of rows is refused with both numbers; 0 and -3 are numbers like any other."""
    rope, x = subject.RotaryPositionEmbedding(DH), rows(rng, 17)

    refuses(ValueError, lambda: rope(x, seq_len=seq_len), f"forward(17 rows, seq_len={seq_len})", seq_len, 17)


@requirement("2.8")
def test_a_small_seq_len_is_refused_later_too(subject: Subject, rng: torch.Generator) -> None:
    """After a long call a small seq_len is refused as before."""
    rope = subject.RotaryPositionEmbedding(DH)
    rope(rows(rng, 23))

    refuses(ValueError, lambda: rope(rows(rng, 17), 13), "forward(17 rows, seq_len=13)", 13, 17)


@requirement("2.8")
@pytest.mark.parametrize(("d_model", "heads"), [(10, 4), (3, 6)])
def test_a_bad_d_model_is_refused(subject: Subject, d_model: int, heads: int) -> None:
    """A d_model that num_heads does not divide is refused with both numbers."""
    what = f"MultiHeadAttentionWithRoPE({d_model}, {heads})"
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
@pytest.mark.parametrize("shape", BAD_MASKS, ids=lambda shape: "x".join(map(str, shape)))
def test_a_mask_of_a_bad_shape_is_refused(subject: Subject, rng: torch.Generator, shape: tuple[int, ...]) -> None:
    """A mask without 4 dimensions, or whose sizes do not fit, is refused with both shapes."""
    refuses_mask(build(subject), some_x(rng), shape)


@requirement("2.8")
@pytest.mark.parametrize(
    "shape", [(B, 1, 1, L), (1, 3, 1, L), (1, 1, 3, 1), (1, 1, 1, 3)], ids=["batch", "heads", "queries", "keys"]
)
def test_a_mask_that_would_enlarge_the_scores_is_refused(
    subject: Subject, rng: torch.Generator, shape: tuple[int, ...]
) -> None:
    """A size of 1 in the scores is not stretched by the mask."""
    x = some_x(rng, L if L in shape else 1, batch=1)

    refuses_mask(build(subject, heads=1), x, shape, heads=1)


@requirement("2.8")
def test_a_bad_mask_is_refused_where_lengths_coincide(subject: Subject, rng: torch.Generator) -> None:
    """A [B, L] mask is refused also where B = L, so that it would broadcast."""
    refuses_mask(build(subject), some_x(rng, B), (B, B))


def refuses_mask(attention: Any, x: Tensor, shape: tuple[int, ...], heads: int = H) -> None:
    """The layer refuses a mask of this shape, with the mask's shape and that of the scores."""
    scores = (x.size(0), heads, x.size(1), x.size(1))
    what = f"attention with a mask of shape {shape} for scores of shape {scores}"
    printed = (", ".join(map(str, sizes)) for sizes in (shape, scores))
    refuses(ValueError, lambda: attention(x, torch.ones(shape)), what, *printed)


# 2.9 and 2.10


test_own_test_passes_on_right_code, test_own_test_catches = own_test_checks("2.9", OWN_TEST)
test_ruff_finds_nothing, test_mypy_finds_nothing = style_checks("2.10")
