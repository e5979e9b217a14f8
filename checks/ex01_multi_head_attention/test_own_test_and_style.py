"""The learner's own test (1.9), and ruff and mypy (1.10)."""

from harness.testing import OwnTest, own_test_checks, style_checks

OWN_TEST = OwnTest(
    __file__, "test_multihead_attention", swaps=("MultiHeadAttention",), right=("answer", "einsum", "softmax_by_hand")
)

test_own_test_passes_on_right_code, test_own_test_catches = own_test_checks("1.9", OWN_TEST)
test_ruff_finds_nothing, test_mypy_finds_nothing = style_checks("1.10")
