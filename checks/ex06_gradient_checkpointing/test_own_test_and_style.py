"""The own test and style (6.8, 6.9): it passes on right code and catches each slip; ruff and mypy find nothing."""

from harness.testing import OwnTest, own_test_checks, style_checks

OWN_TEST = OwnTest(
    __file__,
    "test_gradient_checkpointing",
    swaps=("checkpoint", "CheckpointWrapper", "SelectiveCheckpointing", "measure_memory_usage", "train_step"),
    right=("answer", "autograd_function", "functional_call", "shared_dictionaries"),
)

test_own_test_passes_on_right_code, test_own_test_catches = own_test_checks("6.8", OWN_TEST)
test_ruff_finds_nothing, test_mypy_finds_nothing = style_checks("6.9")
