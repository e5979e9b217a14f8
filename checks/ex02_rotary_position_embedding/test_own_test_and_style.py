"""The learner's own test (2.9), and ruff and mypy (2.10)."""

from harness.testing import OwnTest, own_test_checks, style_checks

OWN_TEST = OwnTest(
    __file__,
    "test_rope",
    swaps=(
        "RotaryPositionEmbedding",
        "MultiHeadAttentionWithRoPE",
        "sinusoidal_position_embedding",
        "compare_position_embeddings",
    ),
    right=("answer", "complex_numbers", "rotation_matrices"),
)
test_own_test_passes_on_right_code, test_own_test_catches = own_test_checks("2.9", OWN_TEST)
test_ruff_finds_nothing, test_mypy_finds_nothing = style_checks("2.10")
