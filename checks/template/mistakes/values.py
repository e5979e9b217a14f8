"""Wrong answers to ex99. Identity and zeros are always among them."""

from harness.model.bank import Mistake

MISTAKES = [
    Mistake(
        "zeros",
        "99.1",
        "FILL: what the first message names",
        ("FILL: a text that the answer holds once", "FILL: the wrong text in its place"),
        only=True,
    ),
    Mistake(
        "tests_nothing",
        "99.2",
        "passes although the code under it is wrong",
        ("FILL: the assert of the own test", "FILL: a call without it"),
        only=True,
    ),
]
