"""Evaluation (7.9): zero-shot weights and recall."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from harness.testing import Close, Subject, also, requirement

from .reference import alike

ZERO_SHOT, RECALL = "zero_shot_weights", "recall_at_k"
NAMES = ("cat", "hot dog", "{x}", "cat")
TEMPLATES = ("a photo of a {}.", "{}", "a {0}, a small {0}", "art: {{{}}}", "{}")  # Twice counts twice.


class Encoder:
    """A text encoder of the check's own: a row for each text, by its letters. Notes how it was called."""

    def __init__(self, rng: torch.Generator, dtype: torch.dtype = torch.float64, spread: float = 3.0) -> None:
        self.table = torch.randn(128, 5, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
        self.spread = spread
        self.tracked = False
        self.texts: list[str] = []

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[n, 5]."""
        assert isinstance(texts, list) and all(isinstance(text, str) for text in texts), (
            f"{ZERO_SHOT}: encode_text is called with {texts!r}; a list of texts was wanted"
        )
        self.texts += texts
        rows = torch.stack([self.row(text) for text in texts])
        self.tracked |= rows.requires_grad
        return rows

    def row(self, text: str) -> Tensor:
        """A row whose length differs a lot from text to text."""
        letters = torch.tensor([ord(letter) % 128 for letter in text])
        weights = torch.arange(1, len(text) + 1, dtype=self.table.dtype).sin()
        return (self.table[letters] * weights[:, None]).sum(0) * self.spread ** (len(text) % 5 - 2)


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1."""
    return rows / rows.norm(dim=-1, keepdim=True)


def expected(encode: Encoder, names: Sequence[str], templates: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """The weights, and those that slips give, by the slips' words."""
    with torch.no_grad():
        rows = torch.stack([torch.stack([encode.row(t.format(name)) for t in templates]) for name in names]).double()
        plain = torch.stack(
            [torch.stack([encode.row(t.replace("{}", name)) for t in templates]) for name in names]
        ).double()
        first, raw = unit(rows[:, 0]), unit(rows.mean(1))
        slips = {
            "the first template's alone": first,
            "the mean of rows that keep their lengths; normalise each before": raw,
            "not normalised after the average": unit(rows).mean(1),
            "of prompts that are not template.format(name)": unit(unit(plain).mean(1)),
        }
        return unit(unit(rows).mean(1)), slips


def known_weights(came: Tensor, slips: dict[str, Tensor]) -> str:
    """Which slip gives just these weights."""
    return next((f"it is {words}" for words, form in slips.items() if alike(came, form)), "")


@requirement("7.9")
def test_zero_shot_by_hand(subject: Subject, close: Close) -> None:
    """Rows (3, 0) and (0, 4) of two templates make (0.7071, 0.7071)."""
    rows = {"cat.": [3.0, 0.0], "a cat": [0.0, 4.0], "dog.": [0.0, -2.0], "a dog": [0.0, -9.0]}

    def encode(texts: list[str]) -> Tensor:
        return torch.tensor([rows[text] for text in texts], dtype=torch.float64)

    weights = subject.zero_shot_weights(encode, ["cat", "dog"], ["{}.", "a {}"])

    half = 0.5**0.5
    slips = {"the mean of rows that keep their lengths": torch.tensor([[0.6, 0.8], [0.0, -1.0]]),
             "the first template's alone": torch.tensor([[1.0, 0.0], [0.0, -1.0]]),
             "not normalised after the average": torch.tensor([[0.5, 0.5], [0.0, -1.0]])}  # fmt: skip
    with also(known_weights, weights, slips):
        close(weights, torch.tensor([[half, half], [0.0, -1.0]], dtype=torch.float64), ZERO_SHOT)


@requirement("7.9")
@pytest.mark.parametrize("count", [1, 2, 5])
def test_zero_shot_weights(subject: Subject, close: Close, rng: torch.Generator, count: int) -> None:
    """Each class gets the unit mean of its unit rows, in order, from prompts as format makes them."""
    encode = Encoder(rng)
    wanted, slips = expected(encode, NAMES, TEMPLATES[:count])

    weights = subject.zero_shot_weights(encode, NAMES, TEMPLATES[:count])

    what = f"{ZERO_SHOT}(…, {list(NAMES)}, {list(TEMPLATES[:count])})"
    prompts = {template.format(name) for template in TEMPLATES[:count] for name in NAMES}
    missing = sorted(prompts - set(encode.texts))
    assert not missing or not set(encode.texts) - prompts, (
        f"{what}: encode_text gets {sorted(set(encode.texts) - prompts)[0]!r}; "
        f"{missing[0]!r} was wanted, as template.format(name)"
    )
    with also(known_weights, weights, slips):
        close(weights, wanted, what)
    assert not encode.tracked, f"{ZERO_SHOT}: encode_text runs with gradient tracking; none was wanted"
    assert not weights.requires_grad, f"{ZERO_SHOT}: the weights carry a gradient"
    assert torch.is_grad_enabled(), f"{ZERO_SHOT}: gradients are off after the call"


@requirement("7.9")
def test_zero_shot_with_a_table(subject: Subject, close: Close) -> None:
    """An encoder may return a parameter of its own, which is not written to; a row of zeros stays zeros."""
    table = nn.Parameter(torch.tensor([[0.0, 0.0], [3.0, -4.0]]))

    def encode(texts: list[str]) -> Tensor:
        return table if len(texts) == 2 else table[["a", "b"].index(texts[0])][None]

    weights = subject.zero_shot_weights(encode, ["a", "b"], ["{}"])

    close(
        weights,
        torch.tensor([[0.0, 0.0], [0.6, -0.8]]),
        f"{ZERO_SHOT}, an encoder that returns a parameter",
        tolerance=1e-5,
    )
    assert table._version == 0, f"{ZERO_SHOT}: writes to what encode_text returns"
    assert not weights.requires_grad, f"{ZERO_SHOT}: the weights carry a gradient"


# Recall


def recalls(similarity: Tensor, positives: Tensor | None, ks: Sequence[int]) -> dict[int, float]:
    """The share for each k, query by query."""
    n, m = similarity.shape
    scores, mask = similarity.tolist(), None if positives is None else positives.tolist()
    ranks: list[float] = []
    for i in range(n):
        right = [bool(mask[i][j]) if mask else i == j for j in range(m)]
        known = [score for score, yes in zip(scores[i], right, strict=True) if yes]
        if not known or any(score != score for score in scores[i]):
            ranks.append(float("inf"))
        else:
            ranks.append(1 + sum(score >= max(known) for score, yes in zip(scores[i], right, strict=True) if not yes))
    return {k: sum(rank <= k for rank in ranks) / n for k in ks}


def recalled(
    subject: Subject,
    similarity: Tensor,
    positives: Tensor | None = None,
    ks: Sequence[int] | None = None,
    hint: str = "",
) -> None:
    """Fails unless recall_at_k gives what counting query by query gives."""
    wanted = recalls(similarity, positives, ks or (1, 5, 10))
    given: list[object] = [similarity] if positives is None else [similarity, positives]
    options = {} if ks is None else {"ks": ks}

    came = subject.recall_at_k(*given, **options)

    told = [[round(score, 2) for score in row] for row in similarity.tolist()[:4]]
    what = f"{RECALL}({told}{', …' if len(similarity) > 4 else ''}{', positives' if positives is not None else ''})"
    assert isinstance(came, dict), f"{what}: a {type(came).__name__} came, a dict was wanted"
    assert came.keys() == wanted.keys(), f"{what}: the keys {list(came)} came, {list(wanted)} was wanted"
    for k, share in came.items():
        assert isinstance(share, (int, float)), (
            f"{what}[{k}]: a {type(share).__name__} came, a Python number was wanted"
        )
        assert abs(share - wanted[k]) < 1e-6, (
            f"{what}[{k}]: {share:.6g} came, {wanted[k]:.6g} was wanted\n{hint}".rstrip()
        )


SCORES: dict[str, tuple[list[list[float]], str]] = {
    "ranks 1, 2 and 3": ([[0.9, 0.1, 0.3], [0.7, 0.5, 0.2], [0.4, 0.6, 0.1]], "the diagonal is positive"),
    "ties": ([[0.9, 0.9, 0.1], [0.2, 0.2, 0.2], [0.0, 0.1, 0.3]], "ties count against the query"),
    "NaN": (
        [[float("nan"), 0.1, 0.2], [0.3, 0.9, float("nan")], [0.0, 0.1, 0.3]],
        "a query with a NaN score is missed",
    ),
    "infinity": (
        [[float("-inf"), 0.1, 0.2], [0.3, float("inf"), 0.1], [float("inf"), 0.1, 0.3]],
        "infinity is a score",
    ),
    "lowest scores": (
        [[float("-inf")] * 3, [-3e38, -3e38, -1.0], [-2.0, -1.0, -0.5]],
        "scores may be as low as they like",
    ),
    "more candidates": ([[0.1, 0.2, 0.3, 0.9], [0.5, 0.4, 0.6, 0.1]], "the diagonal of [N, M] is positive"),
    "more queries": (
        [[0.1, 0.2], [0.5, 0.6], [0.9, 0.1]],
        "a query without a positive is missed, also where k exceeds M",
    ),
    "one": ([[0.0]], "one query and one candidate"),
}


@requirement("7.9")
@pytest.mark.parametrize("name", SCORES)
def test_recall_by_hand(subject: Subject, name: str) -> None:
    """Recall at 1, 2, 3 and beyond M."""
    scores, hint = SCORES[name]

    recalled(subject, torch.tensor(scores), ks=(1, 2, 3, 9), hint=hint)
    recalled(subject, torch.tensor(scores, dtype=torch.float64), hint=hint)


@requirement("7.9")
def test_recall_with_positives(subject: Subject, rng: torch.Generator) -> None:
    """The best positive counts; others are no negatives, and a query without one is missed."""
    similarity = torch.randint(0, 6, (9, 7), generator=rng) / 5 - 0.5
    positives = torch.rand(9, 7, generator=rng) < 0.35
    positives[4] = False
    positives[5] = True

    two = torch.tensor([[0.9, 0.9, 0.5], [0.3, 0.8, 0.8]]), torch.tensor([[1, 1, 0], [0, 1, 1]])
    recalled(subject, *two, (1, 2, 3), "a positive that scores as high as the best positive is no negative")
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64):
        hint = f"positives in {dtype}; rank = 1 + the negatives that score at least as high as the best positive"
        recalled(subject, similarity, positives.to(dtype), (2, 1, 4, 30), hint)
    recalled(subject, similarity, positives.mT.contiguous().mT, (3,), "positives of other strides")
    before = similarity.clone()
    recalled(subject, similarity.requires_grad_(), positives, (3,), "scores that ask for gradients")
    assert torch.equal(similarity, before), f"{RECALL}: writes to its input"
