"""Own tests that say too little or too much (11.10), and what ruff and mypy find (11.11)."""

from harness.model.bank import Mistake

FIRST = "    # The law of verify: a rejection in the first row, or in the second one, or a bonus.\n"
EXPECTED = '    assert came == {(2,): 0.5, (1, 1): 0.125, (1, 2): 0.125, (1, 0, 2): 0.25}, f"verify: {came}"\n'

MISTAKES = [
    Mistake(
        "own_test_asserts_nothing",
        "11.10",
        "passes although the code under it is wrong",
        (FIRST, "    return\n" + FIRST),
        only=True,
    ),
    Mistake(
        "own_test_only_runs",
        "11.10",
        "passes although",
        (FIRST, "    speculative_generate(Decoder(11), Decoder(11), [1], 4)\n    return\n" + FIRST),
        only=True,
    ),
    Mistake("own_test_is_greedy_alone", "11.10", "passes although", (EXPECTED, "    del came\n"), only=True),
    Mistake(
        "own_test_is_wrong",
        "11.10",
        "fails on right code",
        (EXPECTED, EXPECTED.replace("(2,): 0.5", "(2,): 0.25")),
        only=True,
    ),
    Mistake(
        "own_test_leans_on_the_order_of_numbers",
        "11.10",
        "fails on right code",
        (
            FIRST,
            """    numbers = iter([0.9, 0.1, 0.1])
    row = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64)
    assert verify([0], torch.tensor([[1.0, 0.0]], dtype=torch.float64), row, lambda: next(numbers)) == [1]
    assert next(numbers) == 0.1 and next(numbers, None) is None, "the numbers are taken otherwise"
"""
            + FIRST,
        ),
        only=True,
    ),
    Mistake("unused_name", "11.11", "F841", (FIRST, "    unused = 1\n" + FIRST), only=True),
    Mistake(
        "untyped_helper",
        "11.11",
        "",
        ("def _refuse(\n", "def _unused(x):\n    return x\n\n\ndef _refuse(\n"),
        only=True,
    ),
]
