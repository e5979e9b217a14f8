"""Accept and correct (11.2): draw, and the law of verify, found by going through the numbers of uniform."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.testing import Subject, also, requirement

from .reference import LAST, Counted, Law, Numbers, Rows, apart, float64, ints, law, same_law

Of = Callable[[float, float], float]


@requirement("11.2")
def test_draw(subject: Subject) -> None:
    """The first token whose cumulative probability exceeds u, also where u meets a sum."""
    rows = (0.25, 0.5, 0.25), (0.0, 0.25, 0.0, 0.75, 0.0), (1.0,)
    near = (0.1 + 5e-10, 0.9 - 5e-10)  # As a float32, 0.1 is above the first.
    for row, u in (*itertools.product(rows, (0.0, 0.125, 0.25, 0.5, 0.75, 0.875)), (near, 0.1)):
        wanted = next(i for i in range(len(row)) if sum(row[: i + 1]) > u)

        came = subject.draw(float64(row), u)

        what = f"draw({list(row)}, {u})"
        assert type(came) is int, f"{what}: a {type(came).__name__} came, a Python integer was wanted"
        assert came == wanted, f"{what}: {came} came, {wanted} was wanted\nthe first whose cumulative one exceeds u"


def exact(
    draft: Sequence[int],
    q: Rows,
    p: Rows,
    accept: Of = lambda p, q: min(1.0, p / q),
    rest: Of = lambda p, q: max(0.0, p - q),
    normal: bool = True,
    bonus: int = -1,
) -> Law:
    """The law of verify's output for these draft tokens, by the text; or by slips in what is accepted and drawn."""
    found: Law = {}
    alive = 1.0
    for i, token in enumerate(draft):
        accepted = accept(p[i][token], q[i][token])
        row = [rest(*pair) for pair in zip(p[i], q[i], strict=True)]
        row = row if any(row) else list(p[i])
        if not normal:  # What is missing goes to the last one that is possible.
            last = max(j for j, one in enumerate(row) if one)
            row[last] += 1 - sum(row)
        for other, one in enumerate(row):
            key = (*draft[:i], other)
            found[key] = found.get(key, 0.0) + alive * (1 - accepted) * one / sum(row)
        alive *= accepted
    for other, one in enumerate(p[max(bonus, -len(p))]):
        key = (*draft, other)
        found[key] = found.get(key, 0.0) + alive * one
    return {key: one for key, one in found.items() if one}


@dataclass
class Case:
    """Draft tokens with their rows; how verify came out on them, how many numbers it lacked, and took."""

    draft: Sequence[int]
    q: Rows
    p: Rows
    grid: int
    came: Law = field(default_factory=dict)
    lacks: int = 0
    taken: int = 0

    def __str__(self) -> str:
        q, p = ([list(row) for row in rows] for rows in (self.q, self.p))
        return f"verify({list(self.draft)}, q = {q}, p = {p})"

    def exact(self, **slip: Any) -> Law:
        """The right law, or that of a slip."""
        return exact(self.draft, self.q, self.p, **slip)

    def go(self, subject: Subject) -> None:
        """Goes through the numbers of uniform."""
        q, p, k = float64(self.q).reshape(len(self.q), len(self.p[0])), float64(self.p), len(self.draft)
        given = list(self.draft)

        def run(uniform: Callable[[], float]) -> tuple[int, ...]:
            numbers = Counted(uniform)
            output = ints(subject.verify(given, q, p, numbers), str(self))
            assert q._version == p._version == 0, f"{self}: the probabilities are written to"
            assert given == list(self.draft), f"{self}: the draft tokens are written to"
            self.taken = max(self.taken, numbers.taken)
            self.lacks = max(self.lacks, len(output) + (output[:k] != (*given,)) - numbers.taken)
            return output

        self.came = law(run, self.grid, 2 * k + 1, str(self))


SLIPS: dict[str, dict[str, Any]] = {
    "every draft token is accepted": {"accept": lambda p, q: 1.0},
    "a token is accepted with probability p/q, not just where p ≥ q": {"accept": lambda p, q: float(p >= q)},
    "a token is accepted with probability p/q, not q/p": {"accept": lambda p, q: min(1.0, q / p) if p else 1.0},
    "a token is accepted with probability p/q, not p": {"accept": lambda p, q: p},
    "after a rejection the token comes from (p - q)+, not from p": {"rest": lambda p, q: p},
    "after a rejection the token comes from (p - q)+, not from q": {"rest": lambda p, q: q},
    "after a rejection the token comes from (p - q)+, not from (q - p)+": {"rest": lambda p, q: max(0.0, q - p)},
    "after a rejection the token comes from (p - q)+, not from |p - q|": {"rest": lambda p, q: abs(p - q)},
    "(p - q)+ is divided by its sum": {"normal": False},
    "the bonus comes from the last row of target_probs": {"bonus": -2},
}


def the_slip(cases: Sequence[Case]) -> str:
    """Which known slip gives just these laws, if one does."""
    for words, slip in SLIPS.items():
        if all(apart(case.came, case.exact(**slip)) is None for case in cases):
            return words
    k = max(len(case.draft) for case in cases)
    lengths = {len(output) - len(case.draft) for case in cases for output in case.came}
    if k and max(lengths) < 1:
        return "when all are accepted, a bonus from the last row of target_probs follows"
    if max(lengths) > 1:
        return "at most k + 1 tokens come"
    if any(case.lacks > 0 for case in cases):
        return "every test and every draw takes a number of its own"
    return ""


def have_the_laws(subject: Subject, *cases: Case) -> None:
    """The laws of verify's outputs are those of the text."""
    for case in cases:
        case.go(subject)
    with also(the_slip, cases):
        for case in cases:
            same_law(case.came, case.exact(), str(case))
    for case in cases:
        most = len(case.draft) + 1
        assert case.taken <= most, (
            f"{case}: took {case.taken} numbers of uniform(); at most k + 1 = {most} are for the tests and a draw"
        )


@requirement("11.2")
def test_verify_by_hand(subject: Subject) -> None:
    """The text's case, for each draft token; the first token has the target's law."""
    q, p = (0.75, 0.25, 0.0), (0.25, 0.5, 0.25)
    cases = [Case([token], [q], [p, (0.5, 0.0, 0.5)], 12) for token in (0, 1)]

    have_the_laws(subject, *cases, Case([0], [(1.0, 0.0, 0.0)], [(0.5, 0.25, 0.25), (0.0, 0.0, 1.0)], 4))

    first: Law = {}
    for case, weight in zip(cases, q, strict=False):
        for tokens, probability in case.came.items():
            first[tokens[:1]] = first.get(tokens[:1], 0.0) + probability * weight
    same_law(first, {(i,): one for i, one in enumerate(p)}, "verify: the first token")


@requirement("11.2")
def test_verify_of_one_token(subject: Subject) -> None:
    """Accepted with min(1, p/q), else one from (p - q)+; the bonus comes from the second row."""
    rows: list[tuple[Sequence[float], Sequence[float], int]] = [
        ((0.5, 0.25, 0.25, 0.0), (0.0, 0.5, 0.25, 0.25), 4),
        ((0.25, 0.25, 0.25, 0.25), (0.0, 0.0, 0.0, 1.0), 4),
        ((0.75, 0.0, 0.25, 0.0), (0.25, 0.5, 0.0, 0.25), 6),
    ]
    for q, p, grid in rows:
        tokens = [i for i, one in enumerate(q) if one]
        have_the_laws(subject, *(Case([token], [q], [p, (0.5, 0.0, 0.5, 0.0)], grid) for token in tokens))


@requirement("11.2")
def test_verify_of_two_tokens(subject: Subject) -> None:
    """Each token is judged by its own row, and what stands behind a rejection is dropped."""
    q = [(0.5, 0.5, 0.0), (0.25, 0.5, 0.25)]
    p = [(0.5, 0.25, 0.25), (0.25, 0.25, 0.5), (0.0, 0.25, 0.75)]

    have_the_laws(subject, *(Case(draft, q, p, 4) for draft in ((0, 1), (1, 1), (1, 0))))
    sure, even = (0.0, 1.0, 0.0, 0.0), (0.25, 0.5, 0.125, 0.125)
    have_the_laws(subject, Case((1, 1), [sure, sure], [sure, even, sure], 4))


@requirement("11.2")
def test_verify_of_rows_nearly_alike(subject: Subject) -> None:
    """(p - q)+ is small, but not zero: what a rejection gives still comes from it."""
    size = 2.0**-27
    q, p = float64([[0.0, 0.5, 0.5, 0.0]]), float64([[size, 0.5 - size, 0.5, 0.0], [0.0, 0.0, 1.0, 0.0]])
    for number in (0.0, LAST):
        came = ints(subject.verify([1], q, p, Numbers(number)), "verify with p near q")

        assert came in ((0,), (1, 2)), (
            f"verify([1], q = {q.tolist()}, p = {p.tolist()}) with uniform always {number}: {list(came)} came, "
            "[0] or [1, 2] was wanted\na rejected token is replaced by one from (p - q)+, however small its sum"
        )


@requirement("11.2")
def test_verify_of_four_tokens(subject: Subject) -> None:
    """A draft that is sure, each of whose tokens is accepted with 1/2; rows that are the same in both accept all."""
    sure, half = (0.0, 1.0, 0.0), (0.5, 0.5, 0.0)

    have_the_laws(
        subject,
        Case((1, 1, 1, 1), [sure] * 4, [half, (0.0, 0.5, 0.5), half, half, (0.0, 0.5, 0.5)], 2),
        Case((1, 1, 0, 1), [half, sure, half, sure], [half, sure, half, sure, half], 2),
    )


@requirement("11.2")
def test_verify_of_nothing(subject: Subject) -> None:
    """Without a draft token one comes from the only row."""
    have_the_laws(subject, Case((), [], [(0.25, 0.0, 0.5, 0.25)], 4))
