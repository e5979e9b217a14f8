"""The one comparison between what a learner's code gave and what a check expects."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness.model.results import Hang
from harness.model.submission import LoadError

# Bound before any submission is loaded: what it does to these names later changes no verdict.
_isclose, _all, _item, _detach = torch.isclose, torch.all, Tensor.item, Tensor.detach
# In grading: names what is replaced at this moment.
looks: list[Callable[[], str]] = []


@dataclass(frozen=True)
class Where:
    """Where a check runs: a device, the dtype of its data, and the tolerance that this dtype deserves against an
    exact reference.
    """

    device: torch.device
    dtype: torch.dtype
    tolerance: float

    def __str__(self) -> str:
        return f"{self.device.type}-{str(self.dtype).removeprefix('torch.')}"


CPU = Where(torch.device("cpu"), torch.float64, 1e-9)
# A float32 sum of a few dozen unit-scale terms errs by about 1e-6; bfloat16 holds 8 bits, 4e-3 per rounding.
CUDA = (Where(torch.device("cuda"), torch.float32, 2e-5), Where(torch.device("cuda"), torch.bfloat16, 5e-2))
# Where DEVICE sends the agreement checks besides. The stand-in, a GPU's dtypes on the CPU, is for where no GPU is.
ELSEWHERE = {"cuda": CUDA, "stand-in": tuple(replace(place, device=CPU.device) for place in CUDA)}


class Close:
    """Compares tensors: exact type first, then shape, dtype, device, then values; the message names the first that
    differs.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance

    def __call__(
        self, actual: Any, expected: Tensor, what: str, *, tolerance: float | None = None, hint: str = ""
    ) -> None:
        """Passes if |actual - expected| <= tolerance * (1 + |expected|) everywhere.

        Args:
            actual: what the learner's code gave.
            expected: a plain tensor of the same shape, dtype and device.
            what: the call or value, in the learner's words: "forward(query, key, value): output".
            tolerance: in place of the fixture's own; 0 asks for equality.
            hint: a sentence that names the slip to look for, on a line of its own.
        """
        limit = self.tolerance if tolerance is None else tolerance
        _same_kind(actual, expected, what, hint)

        came, wanted = _detach(actual), _detach(expected)
        if not _item(_all(_isclose(came, wanted, rtol=limit, atol=limit))):
            raise AssertionError(_joined(f"{what}: {_first_difference(came, wanted, limit)}", hint))


def untouched() -> None:
    """Fails if something that judges, or that references compute with, is replaced at this moment. References call it
    once they hold the values that they need of the learner's: after it nothing of the learner's runs.
    """
    for look in looks:
        if found := look():
            raise AssertionError(f"{found} is replaced; what is computed with it proves nothing")


def is_tensor(value: Any, what: str, hint: str = "") -> Tensor:
    """Returns `value` if it is exactly a torch.Tensor, else fails with what came."""
    untouched()
    if type(value) is not Tensor:
        came = "None" if value is None else f"a {type(value).__name__}"
        raise AssertionError(_joined(f"{what}: {came} came, a torch.Tensor was wanted", hint))
    return value


def _same_kind(actual: Any, expected: Tensor, what: str, hint: str) -> None:
    tensor = is_tensor(actual, what, hint)
    for name in ("shape", "dtype", "device", "layout"):
        came, wanted = getattr(tensor, name), getattr(expected, name)
        if came != wanted:
            if name == "shape":
                came, wanted = tuple(came), tuple(wanted)
            raise AssertionError(_joined(f"{what}: {name} {came} came, {wanted} was wanted", hint))


def _first_difference(actual: Tensor, expected: Tensor, limit: float) -> str:
    kind = torch.complex128 if expected.is_complex() else torch.float64
    actual, expected = actual.to("cpu", kind), expected.to("cpu", kind)
    if (bad := actual.isnan() & ~expected.isnan()).any():
        return f"{int(bad.sum())} of {bad.numel()} values are NaN, the first at {_first(bad)}"
    gap = (actual - expected).abs()
    gap = torch.where(actual == expected, torch.zeros_like(gap), gap.nan_to_num(nan=torch.inf))
    bad = gap > limit * (1 + expected.abs().nan_to_num(posinf=0.0, neginf=0.0))
    worst = torch.where(bad, gap, torch.full_like(gap, -1.0)).flatten().argmax()
    came, wanted = actual.flatten()[worst].item(), expected.flatten()[worst].item()
    at = [int(i) for i in torch.unravel_index(worst, gap.shape)]
    place = f" at {at}" if at else ""
    fact = f"{int(bad.sum())} of {bad.numel()} values differ, most{place}: {came:.6g} came, {wanted:.6g} was wanted"
    if f"{came:.6g}" == f"{wanted:.6g}":
        fact += f", {abs(came - wanted):.3g} apart"
    return f"{fact} (tolerance {limit:g})"


def _first(where: Tensor) -> list[int]:
    return [int(i) for i in where.nonzero()[0]]


def _joined(fact: str, hint: str) -> str:
    return f"{fact}\n{hint}" if hint else fact


def refuses(error: type[Exception], call: Callable[[], Any], what: str, *contents: object) -> None:
    """Fails unless `call()` raises `error` with a message that contains each of `contents` as Python prints it.

    NotImplementedError and LoadError pass through: code that is not written yet, or not there, refuses nothing.
    """
    try:
        call()
    except (NotImplementedError, LoadError):
        raise
    except error as raised:
        text = str(raised)
        missing = [str(content) for content in contents if str(content) not in text]
        if missing:
            raise AssertionError(
                f"{what}: the {error.__name__} says {text!r}; it lacks {' and '.join(missing)}"
            ) from raised
    except Exception as raised:
        raise AssertionError(
            f"{what}: {type(raised).__name__} ({raised}) came, {error.__name__} was wanted"
        ) from raised
    else:
        raise AssertionError(f"{what}: was accepted, {error.__name__} was wanted")


@contextmanager
def also(hint: Callable[..., str], *given: Any) -> Iterator[None]:
    """Adds to what fails inside what `hint(*given)` finds out then, if anything."""
    try:
        yield
    except Hang:
        raise
    except AssertionError as error:
        try:
            more = hint(*given)
        except Hang:
            raise
        except Exception:  # What failed may fail again in another way: then there is no more to say.
            more = ""
        if not more:
            raise
        raise AssertionError(f"{error}\n{more}") from error
