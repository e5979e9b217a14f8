"""Wrong answers to ex42."""

from harness.model.bank import Mistake

MISTAKES = [
    Mistake("adds_two", "42.1", "double(x)", ("return 2 * x", "return 2 + x"), only=True),
    Mistake("squares", "42.1", "double(x)", ("return 2 * x", "return x * x")),
    Mistake(
        "tests_nothing",
        "42.2",
        "passes although the code under it is wrong",
        ("    assert double(torch.tensor(3.0)) == 6.0", "    double(torch.tensor(3.0))"),
        only=True,
    ),
]
