"""The learner's own test (4.10), and reads well (4.11)."""

from harness.testing import OwnTest, own_test_checks, style_checks

OWN_TEST = OwnTest(
    __file__,
    "test_dynamic_batcher",
    swaps=("BatchRequest", "DynamicBatcher", "QueueFullError"),
    right=("answer", "asyncio_futures", "private_loop"),
)

test_own_test_passes_on_right_code, test_own_test_catches = own_test_checks("4.10", OWN_TEST)
test_ruff_finds_nothing, test_mypy_finds_nothing = style_checks("4.11")
