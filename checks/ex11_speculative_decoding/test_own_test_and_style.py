"""The learner's own test (11.10), and what ruff and mypy find (11.11)."""

from harness.testing import OwnTest, own_test_checks, style_checks

OWN_TEST = OwnTest(
    __file__,
    "test_speculative_decoding",
    swaps=(
        "Generation",
        "CachedModel",
        "token_probabilities",
        "draw",
        "verify",
        "speculative_generate",
        "expected_speedup",
    ),
    right=("answer", "lists_and_slices", "vectors_of_tests", "reversed_draws"),
)


test_own_test_passes_on_right_code, test_own_test_catches = own_test_checks("11.10", OWN_TEST)
test_ruff_finds_nothing, test_mypy_finds_nothing = style_checks("11.11")
