"""The learner's own test (9.10), and what ruff and mypy find (9.11)."""

from harness.testing import OwnTest, own_test_checks, style_checks

OWN_TEST = OwnTest(
    __file__,
    "test_engine",
    swaps=("OutOfBlocksError", "BlockAllocator", "PagedKVCache", "paged_attention", "Engine"),
    right=("answer", "full_blocks_by_prefix", "one_tensor"),
)


test_own_test_passes_on_right_code, test_own_test_catches = own_test_checks("9.10", OWN_TEST)
test_ruff_finds_nothing, test_mypy_finds_nothing = style_checks("9.11")
