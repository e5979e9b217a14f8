"""Probabilities (11.1): temperature, top_p, greedy rows, stability."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from harness.testing import Close, Subject, Where, also, is_tensor, requirement

from .reference import float64, probabilities, softmax

HALVES = (0.5, 0.25, 0.125, 0.125)


@requirement("11.1")
def test_probabilities_by_hand(subject: Subject, close: Close) -> None:
    """The text's case: log [1/2, 1/4, 1/8, 1/8]."""
    for temperature, top_p, wanted in (
        (1.0, 1.0, HALVES),
        (0.5, 1.0, (16 / 22, 4 / 22, 1 / 22, 1 / 22)),
        (1.0, 0.8, (4 / 7, 2 / 7, 1 / 7, 0.0)),
        (0.5, 0.8, (0.8, 0.2, 0.0, 0.0)),
    ):
        came = subject.token_probabilities(float64(HALVES).log(), temperature, top_p)

        what = f"token_probabilities(log [1/2, 1/4, 1/8, 1/8], {temperature}, {top_p})"
        with also(the_slip, came, [math.log(one) for one in HALVES], temperature, top_p):
            close(came, float64(wanted), what)


def the_slip(came: Tensor, row: Sequence[float], temperature: float, top_p: float) -> str:
    """Which known slip gives just this row, if one does."""
    plain, kept = softmax(row, temperature), probabilities(row, temperature, top_p)
    order = sorted(range(len(row)), key=lambda i: (-plain[i], i))
    crossing = [i for i in order if kept[i]][-1]
    less = [one * (i != crossing) for i, one in enumerate(kept)]
    behind = probabilities(row[::-1], temperature, top_p)[::-1]
    equals = [one * any(other <= one and kept[i] for i, other in enumerate(plain)) for one in plain]
    cold = [math.log(one) if one else -math.inf for one in probabilities(row, 1.0, top_p)]
    slips = {
        "top_p is left out": plain,
        "of equal tokens the smaller index is kept first": behind,
        "of equal tokens those are kept that are needed, not all": [one / math.fsum(equals) for one in equals],
        "the temperature is left out": probabilities(row, 1.0, top_p),
        "it is divided by the temperature, not multiplied": probabilities(row, 1 / temperature, top_p),
        "the kept ones are divided by their sum": [one * bool(kept[i]) for i, one in enumerate(plain)],
        "the temperature comes before top_p": probabilities(cold, temperature, 1.0),
        "the token that makes the sum reach top_p is kept": [one / (math.fsum(less) or 1) for one in less],
    }
    for words, given in slips.items():
        if math.dist(given, kept) > 1e-6 and math.dist(given, came.tolist()) < 1e-6:
            return words
    return ""


@requirement("11.1")
def test_probabilities_agree_with_pythons_numbers(
    subject: Subject, close: Close, rng: torch.Generator, on: Where
) -> None:
    """Rows of any leading shape and strides, each by itself."""
    options = (((6,), 1.0, 1.0), ((3, 6), 0.6, 0.73), ((2, 1, 3, 6), 2.5, 0.4), ((1,), 1.0, 0.5), ((3, 5), 0.0, 0.5))
    for shape, temperature, top_p in options:
        logits = (2 * torch.randn(shape, generator=rng, dtype=torch.float64)).to(on.device, on.dtype)
        if len(shape) == 2:
            logits = logits.T.contiguous().T
        before, version = logits.clone(), logits._version
        rows = [probabilities(row, temperature, top_p) for row in logits.double().reshape(-1, shape[-1]).tolist()]
        expected = float64(rows).reshape(shape).to(on.device)

        came = subject.token_probabilities(logits, temperature, top_p)

        what = f"token_probabilities(logits {list(shape)} of {on.dtype}, {temperature}, {top_p})"
        close(came, expected, what, tolerance=1e-9, hint="float64, for logits of any dtype; every row by itself")
        assert logits._version == version and torch.equal(logits, before), f"{what}: the logits are written to"


@requirement("11.1")
def test_of_equal_tokens_the_first_are_kept(subject: Subject, close: Close) -> None:
    """Of equally probable tokens top_p keeps those of smaller index."""
    for count, most, top_p in ((4, 2, 0.4), (300, 151, 0.503), (3, 1, 0.2)):
        for place in (0, 1):
            row = [-3.0] * place + [0.0] * count
            total = count + place * math.exp(-3.0)
            kept = [0.0] * place + [1 / most] * most + [0.0] * (count - most)

            came = subject.token_probabilities(float64(row), 1.0, top_p * count / total)

            what = f"token_probabilities of {count} equal logits{' behind a small one' * place}, top_p {top_p}"
            close(came, float64(kept), what, hint=f"the first {most} of equals are enough; those behind get 0")


@requirement("11.1")
def test_top_p_1_keeps_all(subject: Subject) -> None:
    """With top_p = 1 even a token of probability 1e-26 stays possible; a smaller top_p keeps it out."""
    logits = float64([[0.0, -60.0, 1.0], [-40.0, 3.0, 3.0]])

    came = is_tensor(subject.token_probabilities(logits, 1.0, 1.0), "token_probabilities(logits, 1.0, 1.0)")
    less = is_tensor(subject.token_probabilities(logits, 1.0, 0.999999), "token_probabilities(logits, 1.0, 0.999999)")

    assert came.shape == logits.shape and bool((came > 0).all()), (
        f"token_probabilities({logits.tolist()}, 1.0, 1.0): {came.tolist()} came; top_p = 1 keeps all, those too that "
        "are too small to change the sum"
    )
    wanted = [[True, False, True], [False, True, True]]
    assert (less > 0).tolist() == wanted, (
        f"token_probabilities({logits.tolist()}, 1.0, 0.999999): {less.tolist()} came; what is not needed gets 0"
    )


@requirement("11.1")
def test_temperature_0_is_one_1(subject: Subject, close: Close) -> None:
    """The most probable token gets exactly 1, the first of equals, whatever top_p."""
    rows = [[0.0, 2.0, 2.0], [3.0, -math.inf, 3.0], [-5.0, -math.inf, -4.0], [1e4, -1e4, 0.0]]
    wanted = [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    for dtype, top_p in ((torch.float64, 1.0), (torch.float32, 0.3), (torch.float16, 0.3)):
        came = subject.token_probabilities(float64(rows).to(dtype).view(2, 2, 3), 0.0, top_p)

        what = f"token_probabilities({rows} in {dtype}, 0.0, {top_p})"
        close(came, float64(wanted).view(2, 2, 3), what, tolerance=0, hint="one 1 in each row, for the first of equals")

    came = subject.token_probabilities(float64([1.0, 1.0 + 1e-12, 0.5]), 0.0)

    what = "token_probabilities([1, 1 + 1e-12, 0.5], 0.0)"
    close(came, float64([0.0, 1.0, 0.0]), what, tolerance=0, hint="in float64 the second one is the largest")


@requirement("11.1")
def test_probabilities_with_infinite_logits(subject: Subject, close: Close) -> None:
    """A logit of -inf gets exactly 0, at any temperature."""
    rows = [[-math.inf, 0.5, -math.inf, 1.0], [2.0, -math.inf, -math.inf, -math.inf]]
    for temperature, top_p in ((0.5, 1.0), (1.0, 0.9), (3.0, 0.9)):
        came = subject.token_probabilities(float64(rows), temperature, top_p)

        what = f"token_probabilities({rows}, {temperature}, {top_p})"
        close(came, float64([probabilities(row, temperature, top_p) for row in rows]), what)
        assert not came[float64(rows).isinf()].any(), f"{what}: a token whose logit is -inf has a probability"


@requirement("11.1")
def test_probabilities_are_stable(subject: Subject, close: Close) -> None:
    """Large logits and small temperatures, of low precision too, lose nothing: float64 from the start."""
    cases: list[tuple[Sequence[float], torch.dtype, float]] = [
        ((1e4, 9999.0, -1e4), torch.float32, 1.0),
        ((-1e4, -9999.5, -9998.0), torch.float64, 0.05),
        ((1.5, 1.501, 1.25, -700.0), torch.float16, 1e-3),
        ((300.0, 298.0, 100.0), torch.bfloat16, 1e-3),
        ((0.25, 0.2501, 0.2502), torch.float32, 1e-3),
    ]
    for row, dtype, temperature in cases:
        logits = torch.tensor(row, dtype=dtype)
        for top_p in (1.0, 0.6):
            expected = float64(probabilities(logits.tolist(), temperature, top_p))

            came = subject.token_probabilities(logits, temperature, top_p)

            what = f"token_probabilities({list(row)} in {dtype}, {temperature}, {top_p})"
            close(came, expected, what, hint="the logits go to float64 before anything is computed")
            assert logits._version == 0, f"{what}: the logits are written to"
