"""A walk of the rotation (2.1 to 2.3, 2.6 to 2.8): lengths, positions, layouts, dtypes, modes, what happens between."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.testing import Aspect, Close, Step, Subject, Walk, is_tensor, refuses, walk_check

from .reference import (
    FAR,
    HALF,
    NEAR,
    ROUGH,
    ROUNDING,
    MadeOf,
    Turns,
    angles_of,
    named,
    none_seen,
    shapes,
    tensors,
    turned_pairs,
    untouched,
)

close = Close(ROUGH)
_all = torch.Tensor.all  # Bound before any submission is loaded.
GRADIENT = 5e-2  # of half precision: its products are rounded to it

MODES = {
    "": torch.enable_grad,
    "under no_grad": torch.no_grad,
    "in inference_mode, after a call for two more positions": torch.inference_mode,
}
LAYOUTS = {
    "": "",
    "x is [B, L, H, Dh].transpose(1, 2)": "transposed",
    "x is expanded over the heads": "heads",
    "x is expanded over the rows": "rows",
    "the rows of x overlap": "overlapping",
    "x is every other feature of a larger tensor": "sliced",
    "x has its features first in memory": "features first",
}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x, or parts of it again and again, in another layout."""
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "heads":
        return x[:, :1].expand(x.shape)
    if layout == "rows":
        return x[:, :, :1].expand(x.shape)
    if layout == "overlapping":
        _, heads, _, dim = x.shape
        return x.flatten().repeat(3).as_strided(x.shape, (heads * dim, dim, 2, 1))
    if layout == "sliced":
        return torch.stack((x, -x), dim=-1).flatten(-2)[..., ::2]
    if layout == "features first":
        return x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    return x


@dataclass
class Rotation:
    """A module of the learner's, and how many positions it has turned."""

    subject: Subject
    rope: Any
    shapes: dict[str, Any]
    seen: int = 0


class Turning(Walk):
    """Calls of one rotation, and of others beside it."""

    aspects = (
        # What is looked at comes first: a failure that nothing else shows is blamed on it.
        Aspect("watched", "2.1", {"": False, "inputs watched for writes": True}),
        Aspect("counted", "2.3", {"": False, "cosines and sines counted, state_dict looked at": True}, rate=0.3),
        Aspect("let go", "2.3", {"": False, "x and result let go afterwards": True}, rate=0.2),
        Aspect("gradient", "2.7", {"": False, "x asks for a gradient": True}),
        Aspect("beside", "2.3", {"": 0, "beside a module of base 50": 50, "beside one of base 3e6": 3e6}, rate=0.15),
        Aspect(
            "module",
            "2.2",
            {
                "": (10, 1e4),
                "dim 2": (2, 1e4),
                "dim 34, base 500000.0": (34, 500000.0),
                "dim 14, base 0.9": (14, 0.9),
                "dim 6, base 2": (6, 2),
                "dim 256, base 1e6": (256, 1e6),
            },
            rate=0.25,
        ),
        Aspect("exact", "2.7", {"": False, "compared as 2.7 asks": True}),
        Aspect(
            "cast",
            "2.7",
            {
                "": (),
                "after .to(bfloat16)": (torch.bfloat16,),
                "after .to(float16).to(float64)": (torch.float16, torch.float64),
            },
            rate=0.15,
        ),
        Aspect(
            "inference",
            "2.7",
            {
                "": None,
                "after a call in inference_mode": torch.inference_mode,
                "after one under no_grad": torch.no_grad,
            },
            rate=0.2,
        ),
        Aspect("eval", "2.7", {"": False, "in eval()": True}, rate=0.3),
        Aspect(
            "dtype",
            "2.7",
            {"": torch.float64, "x is float32": torch.float32, "x is bfloat16": HALF[1], "x is float16": HALF[0]},
            rate=0.6,
        ),
        Aspect(
            "refused",
            "2.8",
            {
                "": None,
                "after a call with seq_len=L - 1, which was refused": 1,
                "after a call with seq_len=-1, which was refused": 0,
            },
            rate=0.2,
        ),
        Aspect(
            "first",
            "2.6",
            {f"rows begin at position {first}" if first else "": first for first in (0, 1, 3, 8, 40, 63, 300)},
        ),
        Aspect(
            "method",
            "2.1",
            {"": "forward", "rotate_half alone": "rotate_half", "apply_rotary_pos_emb alone": "apply_rotary_pos_emb"},
            rate=0.2,
        ),
        Aspect("rows", "2.3", {f"{rows} rows" if rows != 5 else "": rows for rows in (5, 1, 2, 8, 9, 23)}),
        Aspect("long", "2.3", {"": 0, "260 rows": 260}, rate=0.02),
        Aspect("sizes", "2.1", {"": (2, 3), "B=1, H=1": (1, 1), "B=1, H=8": (1, 8), "B=9, H=2": (9, 2)}),
        Aspect("layout", "2.1", LAYOUTS),
        Aspect(
            "numbers",
            "2.1",
            {"": (1.0, 0.0), "x near 100": (1.0, 100.0), "x near -1000": (1.0, -1000.0), "x near 0.01": (1e-3, 1e-2)},
            rate=0.3,
        ),
        Aspect("mode", "2.1", MODES, rate=0.3),
    )
    otherwise = "2.1"

    def begin(self, subject: Subject) -> Rotation:
        rope = subject.RotaryPositionEmbedding(10, 6)
        return Rotation(subject, rope, shapes(rope))

    def step(self, state: Rotation, step: Step) -> None:
        rng, dtype, (dim, base) = step.rng(), step["dtype"], step["module"]
        rope = state.rope
        if step["beside"] or (dim, base) != (10, 1e4):
            rope = state.subject.RotaryPositionEmbedding(dim, 6, base)
        seen = self._before(state, rope, step, rng)
        state.seen = seen if rope is state.rope else state.seen
        scale, near = step["numbers"]
        x = torch.randn(*step["sizes"], rows_of(step), dim, generator=rng, dtype=torch.float64)
        x = laid_out((scale * x + near).to(dtype), step["layout"])
        length, first = rows_of(step), step["first"]
        last = first + length
        if step["method"] == "forward":
            angles = angles_of(torch.arange(first, last), dim, base)
            what = f"forward({length} rows of {named(dtype)}{f', seq_len={last}' if first else ''})"
            given: tuple[Any, ...] = (x, last) if first else (x,)
            state.seen = max(seen, last) if rope is state.rope else state.seen
        elif step["method"] == "rotate_half":
            angles, what, given = torch.full((length, dim // 2), torch.pi / 2), f"rotate_half({named(dtype)})", (x,)
        else:
            angles = 6 * torch.rand(length, dim // 2, generator=rng, dtype=torch.float64)
            angles = angles[:1].expand(angles.shape) if first % 2 else angles
            table = torch.float64 if dtype == torch.float64 and rows_of(step) > 4 else torch.float32
            cos, sin = (function(angles).to(table).repeat(1, 2) for function in (torch.cos, torch.sin))
            what, given = f"apply_rotary_pos_emb({named(dtype)}, cos and sin in {named(table)})", (x, cos, sin)
        x.requires_grad_(step["gradient"])
        before = [(tensor._version, tensor.detach().clone()) for tensor in tensors(given)] if step["watched"] else []
        counted = Turns() if step["counted"] and step["method"] == "forward" and last <= seen else None
        made = MadeOf(x=x) if step["let go"] and step["method"] == "forward" else None

        with step["mode"](), counted or nullcontext(), made or nullcontext():
            result = getattr(rope, step["method"])(*given)

        is_tensor(result, what)
        assert result.dtype == dtype or step["method"] == "rotate_half", (
            f"{what}: {named(result.dtype)} came, {named(dtype)} was wanted\ncast the result, not the table"
        )
        known = ", max_position_embeddings=6" if step["method"] == "forward" else ""
        same(result, x, angles, what + known, exactness(step, 1.01 * ROUNDING.get(dtype, 0.0)))
        if counted:
            none_seen(counted, f"{what} after a call up to position {seen - 1}")
        if step["counted"] and rope is state.rope:
            assert shapes(rope) == state.shapes, f"{what}: the state_dict is another after it; it holds no positions"
        if step["watched"]:
            for name, tensor, (version, copy) in zip(("x", "cos", "sin"), tensors(given), before, strict=False):
                untouched(tensor, version, copy, f"{name} of {what}")
            del tensor
        if step["gradient"] and step["mode"] is torch.enable_grad:
            self._backward(result, x, angles, what, step, rng)
        if made:
            given = before = x = result = None  # type: ignore[assignment]
            made.let_go(what)
        if rope is not state.rope:
            state.subject.RotaryPositionEmbedding(10, 6)  # Of what modules share, the last one's is as before.

    def _before(self, state: Rotation, rope: Any, step: Step, rng: torch.Generator) -> int:
        """What happens before the call; below which position cosines and sines are known."""
        own, length = rope is state.rope, rows_of(step)
        if rope.training is step["eval"]:
            rope.train(not step["eval"])
        for dtype in step["cast"]:
            rope.to(dtype)
        if own and step["cast"]:
            state.seen = 0  # A cast may cost a new table.
        seen = state.seen if own else 0
        inferred = step["mode"] is torch.inference_mode
        if not (step["inference"] or step["beside"] or step["refused"] is not None or inferred):
            return seen
        x = torch.randn(2, 1, length + 2, step["module"][0], generator=rng)
        if step["inference"]:
            with step["inference"]():
                rope(x)
            seen = max(seen, length + 2)
        if inferred:
            rope(x, step["first"] + length + 2)  # What is made for good is made here: that is another aspect's.
        if step["beside"]:
            state.subject.RotaryPositionEmbedding(12, 6, step["beside"])(x[..., :1].expand(*x.shape[:3], 12))
        if (rows := step["refused"]) is not None:
            seq_len = rows * length - 1
            what = f"RotaryPositionEmbedding.forward({length} rows, seq_len={seq_len})"
            with step["mode"]():
                refuses(ValueError, lambda: rope(x[:, :, 2:], seq_len), what, seq_len, length)
        return seen

    def _backward(self, result: Tensor, x: Tensor, angles: Tensor, what: str, step: Step, rng: torch.Generator) -> None:
        assert result.requires_grad, f"{what}: the result carries no gradient"
        probe = torch.randn(x.shape, generator=rng, dtype=torch.float64).to(result.dtype)
        (gradient,) = torch.autograd.grad(result, x, probe)
        bound = GRADIENT if step["dtype"] in HALF else exactness(step)
        same(gradient, probe, -angles, f"{what}, backward: gradient of x", bound)


def same(actual: Any, x: Tensor, angles: Tensor, what: str, bound: float = ROUGH) -> None:
    """`actual` is x turned by the angles, as near as `bound` times the length of each pair."""
    tensor, wanted = is_tensor(actual, what).detach(), turned_pairs(x.detach(), angles)
    if tensor.shape == x.shape:
        gap = torch.complex(*tensor.double().chunk(2, dim=-1)).sub_(wanted).abs()
        if _all(gap <= bound * wanted.abs()):
            return
    expected = torch.cat((wanted.real, wanted.imag), dim=-1)
    length = wanted.abs().repeat(1, 1, 1, 2)
    close(tensor.double() / length, expected / length, f"{what}, per unit length of the pair", tolerance=bound)
    raise AssertionError(f"{what}: a pair is off by {float(gap.max()):.3g}")


def exactness(step: Step, rounding: float = 0.0) -> float:
    """How near the call of a step has to come, per unit length of the pair."""
    if not step["exact"]:
        return ROUGH
    return rounding + (NEAR if step["first"] + rows_of(step) <= 64 else FAR)


def rows_of(step: Step) -> int:
    """How many rows a step turns."""
    rows: int = step["long"] or step["rows"]
    return rows


test_turns_in_any_order = walk_check(Turning(), 75)
