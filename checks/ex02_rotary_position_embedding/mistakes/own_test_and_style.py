"""Answers with a weak own test (2.9), or that ruff or mypy find something in (2.10)."""

from harness.model.bank import Mistake

OWN = """\
    torch.manual_seed(0)
    rope = RotaryPositionEmbedding(6, base=100)
"""
OWN_SEQ_LEN = "    torch.testing.assert_close(rope(x[:, :, 3:], seq_len=5), expected[:, :, 3:], atol=1e-5, rtol=1e-5)\n"
OWN_SPLIT = "        project(x).unflatten(-1, (3, 4)).transpose(1, 2)\n"

MISTAKES = [
    # 2.9
    Mistake(
        "own_test_that_always_fails", "2.9", "not yet", (OWN, OWN + '    raise AssertionError("not yet")\n'), only=True
    ),
    Mistake(
        "own_test_of_nothing",
        "2.9",
        "passes although",
        (
            OWN,
            OWN
            + """\
    if rope is not None:
        return
""",
        ),
        only=True,
    ),
    Mistake("own_test_without_seq_len", "2.9", "seq_len_ignored", (OWN_SEQ_LEN, ""), only=True),
    Mistake(
        "own_test_of_private_names",
        "2.9",
        "fails on right code",
        (OWN_SPLIT, "        attention._split_heads(project(x))\n"),
        only=True,
    ),
    Mistake(
        "own_test_of_a_float32_embedding",
        "2.9",
        "fails on right code",
        (OWN, OWN + "    assert sinusoidal_position_embedding(2, 4).dtype == torch.float32\n"),
        only=True,
    ),
    # 2.10
    Mistake("unused_import", "2.10", "F401", ("import torch\n", "import math\n\nimport torch\n"), only=True),
    Mistake(
        "untyped_helper",
        "2.10",
        "annotation",
        ("    def _split_heads(self, x: Tensor) -> Tensor:\n", "    def _split_heads(self, x):\n"),
        only=True,
    ),
    Mistake(
        "silenced",
        "2.10",
        "F401",
        ("from torch.nn import functional\n", "from torch.nn import functional, init  # noqa: F401\n"),
        only=True,
    ),
]
