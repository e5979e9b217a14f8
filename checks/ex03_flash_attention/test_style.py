"""Reads well (3.10): ruff and mypy find nothing."""

from harness.testing import style_checks

test_ruff_finds_nothing, test_mypy_finds_nothing = style_checks("3.10")
