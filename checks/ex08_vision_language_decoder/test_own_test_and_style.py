"""The learner's own test (8.10), and what ruff and mypy find (8.11)."""

from harness.testing import OwnTest, own_test_checks, style_checks

OWN_TEST = OwnTest(
    __file__,
    "test_vision_language",
    swaps=("PatchEmbedding", "Projector", "VisionLanguageModel"),
    right=("answer", "cut_and_concatenate", "scatter_by_index"),
)


test_own_test_passes_on_right_code, test_own_test_catches = own_test_checks("8.10", OWN_TEST)
test_ruff_finds_nothing, test_mypy_finds_nothing = style_checks("8.11")
