"""Checks of ex42: doubling."""

import pytest
import torch

from harness.testing import Close, OwnTest, Subject, own_test_checks, requirement, style_checks

OWN_TEST = OwnTest(__file__, "test_double", swaps=("double",))


@requirement("42.1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_doubles(subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Every element is twice what it was."""
    x = torch.randn(3, 5, generator=rng, dtype=dtype)

    close(subject.double(x), 2 * x, "double(x)")


test_own_test_passes_on_right_code, test_own_test_catches = own_test_checks("42.2", OWN_TEST)
test_ruff_finds_nothing, test_mypy_finds_nothing = style_checks("42.3")
