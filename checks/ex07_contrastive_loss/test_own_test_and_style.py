"""The learner's own test (7.10), and what ruff and mypy find (7.11)."""

from harness.testing import OwnTest, own_test_checks, style_checks

OWN_TEST = OwnTest(
    __file__,
    "test_contrastive",
    swaps=(
        "ContrastiveHead",
        "contrastive_loss",
        "chunked_contrastive_loss",
        "sharded_contrastive_loss",
        "zero_shot_weights",
        "recall_at_k",
    ),
    right=("answer", "gathered_logsumexps", "straight_through"),
)


test_own_test_passes_on_right_code, test_own_test_catches = own_test_checks("7.10", OWN_TEST)
test_ruff_finds_nothing, test_mypy_finds_nothing = style_checks("7.11")
