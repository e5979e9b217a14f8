"""What the checks of ex02 share: sizes, inputs, references in float64, and a count of cosines and sines."""

import sys
from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from harness.testing import Close, DispatchMode, Subject, is_tensor, seed

B, H, L, DH = 2, 3, 5, 10
D = 12  # of the attention layer: 3 heads with 4 features
# Cosines and sines in float32 err by 6e-8 plus what the angle errs: below position 64 a few 1e-6, at 4000 a few 1e-4.
NEAR, FAR = 2e-5, 5e-4
# Bounds that only tell a stale table from a right one, where precision is not the question.
LOOSE = {torch.float16: 5e-2, torch.bfloat16: 5e-2}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MASK_DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64]


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
