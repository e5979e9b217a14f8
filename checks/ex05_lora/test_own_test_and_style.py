"""The learner's own test (5.9), and what ruff and mypy find (5.10)."""

from harness.testing import OwnTest, own_test_checks, style_checks

OWN_TEST = OwnTest(
    __file__,
    "test_lora",
    swaps=(
        "LoRALinear",
        "LoRAConfig",
        "apply_lora_to_model",
        "lora_state_dict",
        "count_parameters",
        "compare_fine_tuning",
    ),
    right=("answer", "linear_subclass", "two_linears", "forward_hook"),
)


test_own_test_passes_on_right_code, test_own_test_catches = own_test_checks("5.9", OWN_TEST)
test_ruff_finds_nothing, test_mypy_finds_nothing = style_checks("5.10")
