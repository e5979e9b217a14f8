"""The one comparison: what it lets through, and what it says."""

from typing import Any

import pytest
import torch

from harness.testing.compare import Close, refuses

ONES = torch.ones(2, 3)


class Liar(torch.Tensor):
    """A tensor that equals everything."""

    def __eq__(self, other: object) -> bool:  # type: ignore[override]
        return True


@pytest.mark.parametrize(
    ("actual", "says"),
    [
        (None, "out: None came, a torch.Tensor was wanted"),
        ([1.0], "out: a list came, a torch.Tensor was wanted"),
        (torch.nn.Parameter(ONES), "out: a Parameter came"),
        (ONES.as_subclass(Liar), "out: a Liar came"),
        (torch.ones(3), "out: shape (3,) came, (2, 3) was wanted"),
        (ONES.double(), "out: dtype torch.float64 came, torch.float32 was wanted"),
        (ONES.to("meta"), "out: device meta came, cpu was wanted"),
        (ONES.to_sparse(), "out: layout"),
        (ONES * float("nan"), "out: 6 of 6 values are NaN, the first at [0, 0]"),
        (ONES + torch.tensor([0, 0.5, 0]), "out: 2 of 6 values differ, most at [0, 1]: 1.5 came, 1 was wanted"),
        (ONES * float("inf"), "inf came, 1 was wanted"),
        (ONES + 4e-6, "out: 6 of 6 values differ"),
    ],
)
def test_what_differs_is_named(actual: Any, says: str) -> None:
    with pytest.raises(AssertionError) as raised:
        Close(1e-6)(actual, ONES, "out", hint="look there")

    assert says in str(raised.value), str(raised.value)
    assert str(raised.value).endswith("\nlook there")


def test_what_is_close_enough_passes() -> None:
    strided = torch.ones(3, 2).T.requires_grad_()

    Close(1e-6)(strided + 1e-6, ONES, "out")
    Close(0.0)(strided * 1, ONES, "out")
    Close(1e-6)(ONES * float("inf"), ONES * float("inf"), "out")


def raising(error: BaseException) -> Any:
    def call() -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: None, "f(3): was accepted, ValueError was wanted"),
        (raising(KeyError("k")), "f(3): KeyError ('k') came, ValueError was wanted"),
        (raising(ValueError("no 3")), "f(3): the ValueError says 'no 3'; it lacks 4"),
    ],
)
def test_refusals(call: Any, says: str) -> None:
    with pytest.raises(AssertionError) as raised:
        refuses(ValueError, call, "f(3)", 3, 4)

    assert says in str(raised.value)


def test_a_right_refusal_passes_and_an_unwritten_one_passes_through() -> None:
    refuses(ValueError, raising(ValueError("3 and 4")), "f(3)", 3, 4)
    with pytest.raises(NotImplementedError):
        refuses(ValueError, raising(NotImplementedError("TODO")), "f(3)")
