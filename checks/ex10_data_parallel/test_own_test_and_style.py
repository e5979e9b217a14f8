"""The own test and style (10.10, 10.11): it passes on right code and catches each slip; ruff and mypy find nothing."""

from harness.testing import OwnTest, own_test_checks, style_checks

OWN_TEST = OwnTest(
    __file__,
    "test_data_parallel",
    swaps=("DataParallel", "global_mean", "ShardedOptimizer", "run_ranks"),
    right=("answer", "bucket_views", "aliases"),
)

test_own_test_passes_on_right_code, test_own_test_catches = own_test_checks("10.10", OWN_TEST)
test_ruff_finds_nothing, test_mypy_finds_nothing = style_checks("10.11")
