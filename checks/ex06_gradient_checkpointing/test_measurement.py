"""Measurement (6.5): the peak that measure_memory_usage gives, and that nothing stays switched on."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.testing import Subject, Trace, halfway, requirement

from .reference import first_peak, left_on, measured, same_peak

PART = 2**14  # elements of float32: a sixteenth of a MiB


def chain(x: Tensor) -> Tensor:
    """x + 1 is gone when the last result is made."""
    y = x + 1
    y = y * 2
    return y - 1


def temporaries(x: Tensor) -> Tensor:
    """One result after the other is dropped."""
    for number in range(6):
        y = x * number
    return y


def held(x: Tensor) -> list[Tensor]:
    """All results are held."""
    return [x * number for number in range(5)]


def forgotten(x: Tensor) -> None:
    """Nothing comes back of what was made."""
    a = x * 1
    b = a * 2
    _ = b * a


def views(x: Tensor) -> Any:
    """One tensor, and views of it."""
    y = (x * 2).view(128, 128)
    return y.t(), y[3:], y.expand(4, 128, 128), y.unbind(), y.detach()


def view_outlives(x: Tensor) -> list[Tensor]:
    """A view of one row keeps all of its storage."""
    return [(x * number).view(128, 128)[0] for number in range(3)]


def in_place(x: Tensor) -> Tensor:
    """One copy, written to again and again."""
    return x.clone().add_(1).mul_(2).relu_()


def dtypes(x: Tensor) -> Any:
    """Two bytes and one byte per element."""
    return x.half(), x.bool()


def products(x: Tensor) -> Tensor:
    """Two products of a square matrix."""
    a = x.view(128, 128)
    return a @ a @ a


def pairs(x: Tensor) -> Any:
    """The larger values of two rows, and which they are, in eight bytes each."""
    return x.view(2, -1).max(0)


def lists(x: Tensor) -> Any:
    """Two results that come as a list."""
    return torch._foreach_add([x, x], 1)


def strided(x: Tensor) -> Any:
    """A row that stands for 128 rows, and two numbers a sixteenth of a MiB apart: storage, not elements."""
    return x.new_empty_strided((128, PART), (0, 1)), x.new_empty_strided((2,), (PART - 1,))


def reused(x: Tensor) -> list[Tensor]:
    """What is held takes the place of what was freed."""
    addresses: set[int] = set()
    kept: list[Tensor] = []
    # Which address comes next is the allocator's choice: what did not come to one that was used before is dropped.
    for _ in range(1000):
        y = x * 2
        if y.data_ptr() in addresses:
            kept.append(y)
        addresses.add(y.data_ptr())
        del y
        if len(kept) == 5:
            break
    return kept


def existing(x: Tensor) -> Tensor:
    """What came in is given back."""
    return x.view(128, 128).t()[1:]


BEFORE = torch.zeros(PART)


def written(x: Tensor) -> Tensor:
    """The result goes where a tensor was before."""
    return torch.add(x, 1, out=BEFORE)


# In sixteenths of a MiB, as a dispatch mode and torch.profiler both see it.
PEAKS: dict[str, tuple[Callable[[Tensor], Any], float]] = {
    "chain": (chain, 2), "temporaries": (temporaries, 2), "held": (held, 5), "forgotten": (forgotten, 3),
    "views": (views, 1), "view_outlives": (view_outlives, 3), "in_place": (in_place, 1), "dtypes": (dtypes, 0.75),
    "products": (products, 2), "pairs": (pairs, 1.5), "reused": (reused, 5), "existing": (existing, 0),
    "lists": (lists, 2), "strided": (strided, 2), "written": (written, 0),
}  # fmt: skip


@requirement("6.5")
def test_the_peak_is_that_of_the_storages_made_inside(subject: Subject, rng: torch.Generator) -> None:
    """Each storage counts once, and while it lives; views and what was there before cost nothing."""
    x = torch.randn(PART, generator=rng)

    for func, parts in PEAKS.values():
        result = measured(subject, func, x)

        what = f"measure_memory_usage: {str(func.__doc__).rstrip('.')}"
        same_peak(result[1], parts / 16, what, partial(first_peak, subject, func, x))


@requirement("6.5")
def test_result_and_arguments_go_through(subject: Subject, rng: torch.Generator) -> None:
    """func gets its arguments, and its own result comes back beside the peak."""
    x = torch.randn(PART, generator=rng)
    got: list[Any] = []

    def func(*args: Any, **kwargs: Any) -> Any:
        got.append((args, kwargs))
        got.append({"result": [x * 2, "text"]})
        return got[-1]

    result, peak = measured(subject, func, x, 3, flag="yes")

    assert got[0][0][0] is x and got[0][0][1:] == (3,) and got[0][1] == {"flag": "yes"}, (
        "measure_memory_usage: func does not get its arguments"
    )
    assert result is got[1], "measure_memory_usage: not what func returned comes back"
    assert len(got) == 2, f"measure_memory_usage: func is called {len(got) // 2} times, not once"
    same_peak(peak, 1 / 16, "measure_memory_usage: func makes one tensor of a sixteenth of a MiB")


@requirement("6.5")
def test_the_peak_of_a_training_step(subject: Subject, rng: torch.Generator) -> None:
    """Forward and backward of a small network: what a dispatch mode sees, with gradients, without the parameters."""
    x = torch.randn(200, 32, generator=rng)
    for width in (64, 256):
        model = nn.Sequential(nn.Linear(32, width), nn.Tanh(), nn.Linear(width, 32))

        def step(network: nn.Module = model) -> None:
            network(x).square().mean().backward()

        with Trace() as seen:
            step()
        model.zero_grad()

        _, peak = measured(subject, step)

        same_peak(peak, seen.peak_bytes / 2**20, f"measure_memory_usage(training step of a network of width {width})")
        assert model[0].weight.grad is not None, "measure_memory_usage: backward inside func leaves no gradient"


@halfway
@requirement("6.5")
def test_measuring_starts_anew(subject: Subject, rng: torch.Generator) -> None:
    """Neither an earlier measurement nor what it left alive counts in the next one, without gradients either."""
    x = torch.randn(PART, generator=rng)
    first = measured(subject, held, x)

    with torch.no_grad():
        second = measured(subject, chain, first[0][1])

    same_peak(first[1], 5 / 16, "measure_memory_usage(held), first call")
    what = "measure_memory_usage(chain), after a call whose result is still alive"
    same_peak(second[1], 2 / 16, what, partial(first_peak, subject, chain, x))


class Failure(RuntimeError):
    """An error of a kind of its own."""


@requirement("6.5")
def test_nothing_stays_switched_on(subject: Subject, rng: torch.Generator) -> None:
    """After func has returned or raised, no mode and no profiler is left, and an error is func's own."""
    x = torch.randn(PART, generator=rng)
    errors = {"raises": Failure("of func itself"), "is interrupted": KeyboardInterrupt("of func itself")}

    def func(ends: str) -> Tensor:
        y = x * 2
        if ends in errors:
            raise errors[ends]
        return y

    for ends in ("returns", *errors):
        came: BaseException | None = None
        try:
            _, peak = measured(subject, func, ends)
            same_peak(peak, 1 / 16, "measure_memory_usage: func makes one tensor of a sixteenth of a MiB")
        except (RuntimeError, KeyboardInterrupt) as raised:
            if ends == "returns" or (isinstance(raised, KeyboardInterrupt) and raised is not errors[ends]):
                raise
            came = raised

        assert came is errors.get(ends), (
            f"measure_memory_usage: as error of func {came!r} came, {errors.get(ends)!r} itself was wanted"
        )
        assert not (left := left_on()), (
            f"measure_memory_usage: {left} is still on after func {ends}; use `with`, or try and finally"
        )
        what = f"measure_memory_usage(chain), after a func that {ends}"
        same_peak(measured(subject, chain, x)[1], 2 / 16, what, partial(first_peak, subject, chain, x))
