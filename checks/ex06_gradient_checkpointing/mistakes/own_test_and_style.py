"""Wrong answers to ex06 whose own test proves nothing, and code that does not read well (6.8, 6.9)."""

from harness.model.bank import Mistake

OWN_TEST = "    torch.manual_seed(0)\n    input_ids = torch.randint(11, (2, 5))\n"
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
