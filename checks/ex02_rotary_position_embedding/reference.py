"""What the checks of ex02 share: sizes, inputs, references in float64, and a count of cosines and sines."""

import gc
import sys
from collections import Counter
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, UntypedStorage

from harness.testing import Close, DispatchMode, Subject, also, every_tensor, is_tensor, refuses, seed

B, H, L, DH = 2, 3, 5, 10
D = 12  # of the attention layer: 3 heads with 4 features
# Cosines and sines in float32 err by 6e-8 plus what the angle errs: below position 64 a few 1e-6, at 4000 a few 1e-4.
NEAR, FAR = 2e-5, 5e-4
# Where precision is not the question: bfloat16's own rounding passes, a wrong angle does not.
ROUGH = 1e-2
# What rounding to a dtype may change, relative to the value.
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
HALF = (torch.float16, torch.bfloat16)
# Bounds that only tell a stale table from a right one, where precision is not the question.
LOOSE = {torch.float16: 5e-2, torch.bfloat16: 5e-2}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MASK_DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64]

PARAMETERS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "o_proj.bias")


def angles_of(positions: Tensor, dim: int, base: float = 10000.0) -> Tensor:
    """The angle of every pair at every position, in float64: [L, Dh / 2]."""
    pairs = torch.arange(dim // 2, dtype=torch.float64)
    return positions.double()[:, None] * base ** (-2 * pairs / dim)


def turned_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Every pair of x, turned by its angle: complex numbers in float64, [B, H, L, Dh / 2]."""
    turn = torch.polar(torch.ones((), dtype=torch.float64).expand(angles.shape), angles.double())
    return torch.complex(*x.double().chunk(2, dim=-1)).mul_(turn)


def turned(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Every pair of x, turned by an explicit 2×2 matrix, in float64."""
    dim = x.size(-1)
    angles = angles_of(positions, dim, base)
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


def alike(came: Tensor, other: Tensor, tolerance: float = ROUGH) -> bool:
    """One result is as near to another as a right one has to be."""
    if came.shape != other.shape:
        return False
    return bool(torch.isclose(came.double(), other.double(), tolerance, tolerance).all())


def agree(
    close: Close,
    rope: Any,
    x: Tensor,
    seq_len: int | None = None,
    *,
    hint: str = "",
    tolerance: float = ROUGH,
    base: float = 10000.0,
    inside: "Turns | None" = None,
    expected_positions: int | None = None,
) -> None:
    """forward, called `inside` a probe, turns every pair of x by its angle, in whatever dtype the result comes.

    With `expected_positions`, the module's max_position_embeddings, a failure says whether that is what matters.
    """
    last = x.size(-2) if seq_len is None else seq_len
    expected = turned(x.detach(), torch.arange(last - x.size(-2), last), base)

    with inside or nullcontext():
        actual = rope(x) if seq_len is None else rope(x, seq_len)

    count = "1 row" if x.size(-2) == 1 else f"{x.size(-2)} rows"
    what = f"forward({count} of {named(x.dtype)}{'' if seq_len is None else f', seq_len={seq_len}'})"
    came = is_tensor(actual, what, hint).detach().double()
    with also(lambda: _wrong_turn(rope, x.detach(), came, expected, tolerance, base, last, expected_positions)):
        close(came, expected, what, tolerance=tolerance, hint=hint)


def _wrong_turn(
    rope: Any, x: Tensor, came: Tensor, expected: Tensor,
    tolerance: float, base: float, last: int, expected_positions: int | None,
) -> str:  # fmt: skip
    """What a wrong result of forward is like: other positions, a fresh module, one that expects more; or nothing."""
    length, dim = x.shape[-2:]
    found = []
    known = torch.arange(min(last + 65, 8192))
    gap = (turned(x[:, :, :1].expand(-1, -1, len(known), -1), known, base) - came[:, :, :1]).abs().amax((0, 1, 3))
    start = int(gap.argmin())
    if start != last - length and alike(came, turned(x, torch.arange(start, start + length), base), tolerance):
        rows = "the row" if length == 1 else "the rows"
        found.append(f"{rows} came as at position{f' {start}' if length == 1 else f's {start} … {start + length - 1}'}")
    if expected_positions is not None:
        more = max(4096, 2 * last)
        if alike(type(rope)(dim, expected_positions, base)(x, last), expected, tolerance):
            found.append("a fresh module gives the right rows here: what is left of the calls before?")
        elif alike(type(rope)(dim, more, base)(x, last), expected, tolerance):
            found.append(
                f"with max_position_embeddings={more} the same call is right: an angle depends on its position alone, "
                "not on max_position_embeddings or the table's length"
            )
    return "\n".join(found)


def shapes(module: Any) -> dict[str, Any]:
    """What a state_dict holds, by name, and how large it is."""
    return {name: getattr(value, "shape", None) for name, value in module.state_dict().items()}


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


def none_seen(turns: Turns, what: str) -> None:
    """Fails if any cosine or sine was computed."""
    seen = [
        f"{name} ({count} {'calls' if '.' in name else 'elements'})"
        for name, count in sorted(turns.seen.items())
        if count
    ]
    hint = "keep cosines and sines for all positions so far: a shorter call takes a slice, another dtype the same table"
    assert not seen, f"{what}: computes {' and '.join(seen)} again, none was wanted\n{hint}"


def build(subject: Subject, max_position_embeddings: int = 64, d_model: int = D, heads: int = H) -> Any:
    """A seeded attention layer of the learner's in float64, with D = 12 and 3 heads unless told."""
    layer = subject.MultiHeadAttentionWithRoPE
    seed(1)
    return layer(d_model, heads, max_position_embeddings).double()


def some_x(rng: torch.Generator, length: int = L, batch: int = B, d_model: int = D) -> Tensor:
    """An input large enough to make the attention weights differ."""
    return 2 * torch.randn(batch, length, d_model, generator=rng, dtype=torch.float64)


def some_mask(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """A boolean mask in which every row allows something."""
    mask = torch.rand(shape, generator=rng) > 0.4
    mask[..., 0] = True
    return mask


def tensors(values: Any) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def untouched(tensor: Tensor, version: int, copy: Tensor, what: str) -> None:
    """Nothing has written to a tensor, not even the same values."""
    assert tensor._version == version and torch.equal(tensor, copy), f"{what}: it was written to"


class MadeOf(DispatchMode):
    """Follows given tensors, by name, and all that is made of them while it is on, for as long as it lives."""

    def __init__(self, **given: Tensor) -> None:
        super().__init__()
        # A storage's Python object lives as long as the storage itself.
        self._alive: WeakKeyDictionary[UntypedStorage, str] = WeakKeyDictionary()
        for name, tensor in given.items():
            self._alive[tensor.untyped_storage()] = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        alive = self._alive
        given = every_tensor([*args, *kwargs.values()] if kwargs else args)
        if any(tensor.untyped_storage() in alive for tensor in given):
            name = func.overloadpacket.__name__
            # A table may take its dtype and device from x.
            if not (name.startswith("new_") or name.endswith("_like")):
                for tensor in every_tensor((result,)):
                    if (storage := tensor.untyped_storage()) not in alive:
                        alive[storage] = f"what {name.strip('_')} made, of shape {tuple(tensor.shape)},"
        return result

    def let_go(self, what: str) -> None:
        """Nothing of a call is alive any more, once the caller has let go of it."""
        if self._alive:
            gc.collect()
        assert not self._alive, (
            f"{what}: {' and '.join(sorted(set(self._alive.values())))} stays alive after the call\n"
            "a module keeps no input, no mask, no result and nothing that is made of them"
        )


def refuses_mask(attention: Any, x: Tensor, shape: tuple[int, ...], heads: int = H, hint: str = "") -> None:
    """The layer refuses a mask of this shape, with the mask's shape and that of the scores."""
    scores = (x.size(0), heads, x.size(1), x.size(1))
    what = f"forward(x, a mask of shape {shape}), with scores of shape {scores}"
    printed = (", ".join(map(str, sizes)) for sizes in (shape, scores))
    with also(lambda: hint):
        refuses(ValueError, lambda: attention(x, torch.ones(shape)), what, *printed)


def weights_of(attention: Any) -> dict[str, Tensor]:
    """Copies of the layer's weights in float64, by their given names."""
    return {name: attention.get_parameter(name).detach().double().clone() for name in PARAMETERS}


def formula(
    attention: Any,
    x: Tensor,
    mask: Tensor | None = None,
    weights: dict[str, Tensor] | None = None,
    heads: int = H,
    own_turns: bool = False,
) -> Tensor:
    """The formula in float64, with the layer's weights or those given; it may turn as the layer's rotary_emb does."""
    weights = weights or weights_of(attention)
    positions = torch.arange(x.size(1))
    q, k, v = (
        (x.double() @ weights[f"{name}.weight"].T).unflatten(-1, (heads, -1)).transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    if own_turns:
        q, k = (is_tensor(attention.rotary_emb(rows.to(x.dtype)), "rotary_emb(q)").double() for rows in (q, k))
    else:
        q, k = turned(q, positions), turned(k, positions)
    scores = q @ k.mT / q.size(-1) ** 0.5
    if mask is not None:
        scores = scores.masked_fill(mask == 0, float("-inf"))
    context = scores.softmax(-1).nan_to_num(0.0) @ v
    result: Tensor = context.transpose(1, 2).flatten(2) @ weights["o_proj.weight"].T + weights["o_proj.bias"]
    return result


def attends(
    close: Close,
    attention: Any,
    x: Tensor,
    mask: Tensor | None = None,
    hint: str = "",
    heads: int = H,
    tolerance: float = ROUGH,
) -> None:
    """The layer's output equals the formula's, in x's dtype."""
    expected = formula(attention, x, mask, heads=heads).to(x.dtype)

    output = attention(x) if mask is None else attention(x, mask)

    what = "attention(x)" if mask is None else "attention(x, mask)"
    with also(lambda: wrong_attention(attention, x, mask, output, heads)):
        close(output, expected, what, tolerance=tolerance, hint=hint)


def wrong_attention(attention: Any, x: Tensor, mask: Tensor | None, output: Tensor, heads: int = H) -> str:
    """What a wrong output is like: wrong turns, a mask that is not applied or the other way round; or nothing."""
    x, output = x.detach(), output.detach()
    q = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    if not alike(attention.rotary_emb(q), turned(q, torch.arange(x.size(1)))):
        return f"its rotary_emb does not turn {x.size(1)} rows right: look there first"
    if mask is None:
        return ""
    plain = attention(x)
    if not alike(plain, formula(attention, x, heads=heads)):
        return "attention(x) is wrong without a mask too"
    if alike(output, plain):
        return "the output is the same without the mask: is it applied?"
    inverted = alike(output, formula(attention, x, mask == 0, heads=heads))
    return "the output is the same as with the mask inverted: true means may attend" if inverted else ""
