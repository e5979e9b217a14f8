"""Accept and correct (11.2): draw, and the law of verify, found by going through the numbers of uniform."""

import itertools
from collections.abc import Callable, Sequence

from harness.testing import Subject, also, requirement

from .reference import Law, Rows, apart, float64, ints, law, same_law

Of = Callable[[float, float], float]


@requirement("11.2")
def test_draw(subject: Subject) -> None:
    """The first token whose cumulative probability exceeds u, also where u meets a sum."""
    rows = (0.25, 0.5, 0.25), (0.0, 0.25, 0.0, 0.75, 0.0), (1.0,)
    for row, u in itertools.product(rows, (0.0, 0.125, 0.25, 0.5, 0.75, 0.875)):
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
    bonus: int | None = None,
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
    for other, one in enumerate(p[len(draft) if bonus is None else bonus]):
        key = (*draft, other)
        found[key] = found.get(key, 0.0) + alive * one
    return {key: one for key, one in found.items() if one}


def the_slip(came: Law, draft: Sequence[int], q: Rows, p: Rows) -> str:
    """Which known slip gives just this law, if one does."""
    k = len(draft)
    slips: dict[str, Law] = {
        "every draft token is accepted": exact(draft, q, p, accept=lambda p, q: 1.0),
        "a token is accepted with probability p/q, not just where p ≥ q": exact(
            draft, q, p, accept=lambda p, q: float(p >= q)
        ),
        "a token is accepted with probability p/q, not q/p": exact(
            draft, q, p, accept=lambda p, q: min(1.0, q / p) if p else 1.0
        ),
        "a token is accepted with probability p/q, not p": exact(draft, q, p, accept=lambda p, q: p),
        "after a rejection the token comes from (p - q)+, not from p": exact(draft, q, p, rest=lambda p, q: p),
        "after a rejection the token comes from (p - q)+, not from q": exact(draft, q, p, rest=lambda p, q: q),
        "after a rejection the token comes from (p - q)+, not from (q - p)+": exact(
            draft, q, p, rest=lambda p, q: max(0.0, q - p)
        ),
        "after a rejection the token comes from (p - q)+, not from |p - q|": exact(
            draft, q, p, rest=lambda p, q: abs(p - q)
        ),
        "(p - q)+ is divided by its sum": exact(draft, q, p, normal=False),
    }
    if k:
        slips["the bonus comes from the last row of target_probs"] = exact(draft, q, p, bonus=k - 1)
    for words, given in slips.items():
        if apart(given, exact(draft, q, p)) is not None and apart(came, given) is None:
            return words
    if k and all(len(one) <= k for one in came):
        return "when all are accepted, a bonus from the last row of target_probs follows"
    if any(len(one) > k + 1 for one in came):
        return "at most k + 1 tokens come"
    if k and len({len(one) for one in came}) == 1:
        return "what stands behind a rejected token is dropped"
    return "every test and every draw takes a number of its own" if k else ""


def has_the_law(subject: Subject, draft: Sequence[int], q: Rows, p: Rows, grid: int) -> Law:
    """The law of verify's output, which is that of the text."""
    draft_probs = float64(q).reshape(len(q), len(p[0]))
    target_probs = float64(p)
    before = draft_probs.clone(), target_probs.clone()
    what = f"verify({list(draft)}, q = {[list(row) for row in q]}, p = {[list(row) for row in p]})"

    given = list(draft)
    came = law(
        lambda uniform: ints(subject.verify(given, draft_probs, target_probs, uniform), what),
        grid,
        2 * len(draft) + 1,
        what,
    )

    with also(the_slip, came, draft, q, p):
        same_law(came, exact(draft, q, p), what)
    assert draft_probs.equal(before[0]) and target_probs.equal(before[1]), f"{what}: the probabilities are written to"
    assert given == list(draft), f"{what}: the draft tokens are written to"
    return came


@requirement("11.2")
def test_verify_by_hand(subject: Subject) -> None:
    """The text's case, for each draft token; the first token has the target's law."""
    q, p = (0.75, 0.25, 0.0), (0.25, 0.5, 0.25)
    first = dict.fromkeys(range(3), 0.0)
    for token in (0, 1):
        for tokens, probability in has_the_law(subject, [token], [q], [p, (0.0, 0.0, 1.0)], 12).items():
            first[tokens[0]] += probability * q[token]

    same_law({(i,): one for i, one in first.items()}, {(i,): one for i, one in enumerate(p)}, "verify: the first token")


@requirement("11.2")
def test_verify_of_one_token(subject: Subject) -> None:
    """Accepted with min(1, p/q), else one from (p - q)+; the bonus comes from the second row."""
    cases: list[tuple[Sequence[float], Sequence[float], int]] = [
        ((0.5, 0.25, 0.25, 0.0), (0.0, 0.5, 0.25, 0.25), 4),
        ((1.0, 0.0, 0.0, 0.0), (0.5, 0.25, 0.0, 0.25), 4),
        ((0.25, 0.25, 0.25, 0.25), (0.0, 0.0, 0.0, 1.0), 4),
        ((0.75, 0.0, 0.25, 0.0), (0.25, 0.5, 0.0, 0.25), 6),
    ]
    for q, p, grid in cases:
        for token in (i for i, one in enumerate(q) if one):
            has_the_law(subject, [token], [q], [p, (0.5, 0.0, 0.5, 0.0)], grid)


@requirement("11.2")
def test_verify_of_two_tokens(subject: Subject) -> None:
    """Each token is judged by its own row, and what stands behind a rejection is dropped."""
    q = [(0.5, 0.5, 0.0), (0.5, 0.5, 0.0)]
    p = [(0.5, 0.25, 0.25), (0.25, 0.25, 0.5), (0.0, 0.25, 0.75)]

    for draft in ((0, 1), (1, 1), (1, 0)):
        has_the_law(subject, draft, q, p, 4)


@requirement("11.2")
def test_verify_of_four_tokens(subject: Subject) -> None:
    """A draft that is sure, each of whose tokens is accepted with 1/2; rows that are the same in both accept all."""
    sure, half = (0.0, 1.0, 0.0), (0.5, 0.5, 0.0)

    has_the_law(subject, (1, 1, 1, 1), [sure] * 4, [half, (0.0, 0.5, 0.5), half, half, (0.0, 0.5, 0.5)], 2)
    has_the_law(subject, (1, 1, 0, 1), [half, sure, half, sure], [half, sure, half, sure, half], 2)


@requirement("11.2")
def test_verify_of_nothing(subject: Subject) -> None:
    """Without a draft token one comes from the only row."""
    has_the_law(subject, (), [], [(0.25, 0.0, 0.5, 0.25)], 4)
