"""The specification of ex99, A title, as checks."""

import torch

from harness.testing import Close, OwnTest, Subject, Where, own_test_checks, requirement, style_checks

OWN_TEST = OwnTest(__file__, "test_solve", swaps=("solve",))


@requirement("99.1")
def test_solve_by_hand(subject: Subject, close: Close) -> None:
    """FILL: the claim, in one sentence."""
    expected = torch.tensor([3.0, -2.0])  # FILL: computed by hand

    close(subject.solve(torch.tensor([3.0, -2.0])), expected, "solve([3, -2])", hint="FILL: the slip to look for")


@requirement("99.1")
def test_agrees_with_a_reference(subject: Subject, close: Close, rng: torch.Generator, on: Where) -> None:
    """FILL: what it agrees with, on every device."""
    x = torch.randn(3, 5, generator=rng).to(on.device, on.dtype)
    expected = x  # FILL: an independent reference

    close(subject.solve(x), expected, "solve(x)")


test_own_test_passes_on_right_code, test_own_test_catches = own_test_checks("99.2", OWN_TEST)
test_ruff_finds_nothing, test_mypy_finds_nothing = style_checks("99.3")
