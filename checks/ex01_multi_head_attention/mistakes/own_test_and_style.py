"""Wrong answers to ex01: own tests (1.9), and what ruff and mypy find (1.10)."""

from harness.model.bank import Mistake

IMPORTS = "from torch import Tensor, nn\n"
SPLITS = "    def _split_heads(self, x: Tensor) -> Tensor:\n"
OWN_TEST = """\
    torch.manual_seed(0)
    attention = MultiHeadAttention(12, 3, dropout=0.5).eval()
"""
NOTHING_ALLOWED = "    nothing_allowed = torch.zeros(2, 1, 5, 7)\n"

MISTAKES = [
    # 1.9 own test
    Mistake(
        "own_test_that_always_fails",
        "1.9",
        "not yet",
        (OWN_TEST, OWN_TEST + "    assert False, 'not yet'\n"),
        only=True,
    ),
    Mistake(
        "own_test_of_nothing",
        "1.9",
        "passes although",
        (OWN_TEST, OWN_TEST + "    if attention is not None:\n        return\n"),
        only=True,
    ),
    Mistake(
        "own_test_without_masks",
        "1.9",
        "nan_for_masked_rows",
        (NOTHING_ALLOWED, "    if query is not None:\n        return\n" + NOTHING_ALLOWED),
        only=True,
    ),
    Mistake(
        "own_test_that_hangs",
        "1.9",
        "did not end within",
        (OWN_TEST, OWN_TEST + "    while attention is not None:\n        pass\n"),
        only=True,
    ),
    Mistake(
        "own_test_that_exits",
        "1.9",
        "ended its process",
        (
            OWN_TEST,
            OWN_TEST
            + """\
    import os

    os._exit(0)
""",
        ),
        only=True,
    ),
    # 1.10 reads well
    Mistake("unused_import", "1.10", "F401", ("import torch\n", "import math\nimport torch\n"), only=True),
    Mistake("untyped_helper", "1.10", "annotation", (SPLITS, "    def _split_heads(self, x):\n"), only=True),
    Mistake("silenced", "1.10", "F401", (IMPORTS, "import math  # noqa: F401\n" + IMPORTS), only=True),
    Mistake("all_silenced", "1.10", "silences more than it names", (IMPORTS, IMPORTS + "\n# ruff: noqa\n"), only=True),
    Mistake(
        "silenced_for_mypy",
        "1.10",
        "silences",
        (SPLITS, "    def _split_heads(self, x):  # mypy: allow-untyped-defs\n"),
        only=True,
    ),
]
