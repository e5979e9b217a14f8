"""Wrong answers to ex06 whose own test proves nothing, and code that does not read well (6.8, 6.9)."""

from harness.model.bank import Mistake

OWN_TEST = "    torch.manual_seed(0)\n    input_ids = torch.randint(11, (2, 5))\n"
OWN_TEST_LAYER = "    encoder_layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)\n"
LAST_ASSERT = '    assert 1.9 < peak < 2.1, f"x + 1 - 2 for 1 MiB has a peak of 2 MiB; {peak} was measured"\n'

MISTAKES = [
    Mistake(
        "own_test_that_checks_nothing",
        "6.8",
        "passes although",
        (OWN_TEST, OWN_TEST + "    assert len(input_ids) == 2\n    return\n"),
        only=True,
    ),
    Mistake("own_test_that_fails", "6.8", "fails on right code", ("1.9 < peak < 2.1", "peak > 3"), only=True),
    Mistake(
        "own_test_with_a_mask_of_zeros",
        "6.8",
        "kwargs_dropped",
        ('torch.full((5, 5), float("-inf")).triu(1)', "torch.zeros(5, 5)"),
        only=True,
    ),
    Mistake(
        "own_test_that_wants_no_zeros",
        "6.8",
        "fails on right code",
        (
            OWN_TEST_LAYER,
            OWN_TEST_LAYER + "    encoder_layer.register_parameter('unused', nn.Parameter(torch.ones(2)))\n",
        ),
        (LAST_ASSERT, "    assert encoder_layer.get_parameter('unused').grad is None\n" + LAST_ASSERT),
        only=True,
    ),
    Mistake(
        "own_test_that_counts_a_second_backward",
        "6.8",
        "fails on right code",
        (
            LAST_ASSERT,
            """    entered.clear()
    loss = wrapped.train()(input_ids).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert list(entered.values()) == [3, 3, 3]
"""
            + LAST_ASSERT,
        ),
        only=True,
    ),
    Mistake("own_test_without_memory", "6.8", "peak_is_a_sum", (LAST_ASSERT, "    assert peak > 0\n"), only=True),
    Mistake(
        "untyped",
        "6.9",
        "annotation",
        ("def _detached(tensor: Tensor) -> Tensor:\n", "def _detached(tensor):\n"),
        only=True,
    ),
    Mistake("unused_import", "6.9", "math", ("import itertools\n", "import itertools\nimport math\n"), only=True),
    Mistake(
        "no_docstring",
        "6.9",
        "docstring",
        (
            "def _storages(",
            "def storages(values: Any) -> Any:\n    return values\n\n\ndef _storages(",
        ),
        only=True,
    ),
]
