"""The end of the output (11.7), and statistics (11.8)."""

import contextlib
import math
from collections.abc import Sequence

import pytest
import torch

from harness.testing import Subject, requirement

from .reference import LAST, Fault, Model, Numbers, Story, calling, chain, drafts, generate, greedy, told

# Every token is followed by the next one; this draft says so up to 3, and again from 5 on.
UPWARDS = {token: token + 1 for token in range(9)}
SKIPPING = {**UPWARDS, 3: 9, 9: 5}


def ends(
    subject: Subject,
    new: int,
    k: int,
    eos: int | None,
    temperature: float = 0.0,
    where: str = "",
    prompt: Sequence[int] = (0,),
) -> None:
    """A call ends where the text says; behind prompt 0 the target goes on 1, 2, 3, …, and behind 9 from 0 on."""
    target, draft = chain(UPWARDS), chain(SKIPPING)
    options = {"num_draft_tokens": k, "eos_token_id": eos, "temperature": temperature}
    expected = told(greedy(target), greedy(draft), prompt, new, k, eos)

    came = generate(subject, target, draft, prompt, new, uniform=Numbers(0.2, LAST, 0.6), **options)

    assert came.tokens == expected.tokens, (
        f"{calling(prompt, new, **options)}, a target that goes on 1, 2, 3, …, a draft that is wrong behind 3{where}: "
        f"{came.tokens} came, {expected.tokens} was wanted{wrong_end(came.tokens, expected.tokens, eos)}"
    )


def wrong_end(came: list[int], wanted: list[int], eos: int | None) -> str:
    """What is wrong with an end."""
    if came[: len(wanted)] == wanted:
        over = len(came) - len(wanted)
        behind = "behind EOS" if wanted[-1] == eos else "more than max_new_tokens"
        return f"\n{over} token{'s' * (over > 1)} {behind}"
    if came == wanted[: len(came)]:
        lost = came == wanted[:-1] and wanted[-1] == eos
        return "\nEOS stays in the output" if lost else "\nthe output ends too early"
    return ""


@requirement("11.7")
def test_exactly_max_new_tokens(subject: Subject) -> None:
    """Neither more nor fewer, whatever is accepted in the last round."""
    for new, k in ((1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (5, 1), (7, 3), (4, 9)):
        ends(subject, new, k, None)


@requirement("11.7")
def test_up_to_eos(subject: Subject) -> None:
    """EOS ends the output, wherever it comes from, and stays in it."""
    roles = {
        (1, 3): "proposed first",
        (2, 3): "proposed between others",
        (3, 3): "proposed last in the first round",
        (3, 2): "the bonus of the first round",
        (4, 4): "a correction in the first round",
        (4, 2): "a correction in the second round",
        (6, 2): "proposed in a later round",
        (0, 3): "in the prompt, and nowhere else",
        (9, 4): "proposed, and rejected",
    }
    for number, ((eos, k), role) in enumerate(roles.items()):
        ends(subject, 7, k, eos, temperature=float(number % 2), where=f", EOS is {role}")


@requirement("11.7")
def test_eos_as_the_last_token(subject: Subject) -> None:
    """Where EOS and max_new_tokens meet, and where the only token is EOS."""
    for new, eos in ((1, 1), (3, 3), (4, 4), (4, 5)):
        ends(subject, new, 2, eos)


@requirement("11.7")
def test_eos_is_token_0(subject: Subject) -> None:
    """Token 0 is a token like others, and ends the output if it is EOS."""
    for temperature in (0.0, 1.0):
        ends(subject, 5, 2, 0, temperature, ", EOS is 0", prompt=[8])


def counted(
    subject: Subject, target: Model, draft: Model, new: int, k: int, eos: int | None = None, where: str = ""
) -> None:
    """The statistics of a call are what the text says."""
    expected = told(greedy(target), greedy(draft), [1, 5], new, k, eos)
    options = {"num_draft_tokens": k, "eos_token_id": eos}

    came = generate(subject, target, draft, [1, 5], new, uniform=Numbers(0.5), **options)

    what = f"{calling([1, 5], new, **options)}{where}"
    right = "rounds = target calls, proposed = draft calls, accepted = proposed tokens that are in the output"
    for name in ("rounds", "proposed", "accepted"):
        number, wanted = getattr(came, name), getattr(expected, name)
        assert isinstance(number, int), f"{what}.{name}: a {type(number).__name__} came, an integer was wanted"
        assert number == wanted, f"{what}.{name}: {number} came, {wanted} was wanted\n{right}"
    rate = expected.accepted / expected.proposed if expected.proposed else 0.0
    number = came.acceptance_rate
    assert isinstance(number, int | float) and math.isclose(number, rate), (
        f"{what}.acceptance_rate: {number} came, {rate:.6g} was wanted; accepted / proposed, 0 if nothing was proposed"
    )


@requirement("11.8")
@pytest.mark.parametrize("agrees", ["sometimes", "never"])
def test_statistics(subject: Subject, rng: torch.Generator, agrees: str) -> None:
    """Rounds, proposed and accepted tokens are those of this call."""
    target = Story(rng)
    draft = drafts(rng, target)[agrees]

    for new, k in ((6, 2), (3, 1), (3, 6), (1, 2)):
        counted(subject, target, draft, new, k)


@requirement("11.8")
def test_statistics_of_parts_of_rounds(subject: Subject) -> None:
    """Some of the proposed tokens are accepted; a correction that is proposed too, in another place, does not count."""
    counted(subject, chain(UPWARDS), chain({**UPWARDS, 7: 0}), 4, 3)
    counted(subject, chain({5: 2, 2: 7, 7: 3}), chain({5: 1, 1: 2, 2: 3, 7: 0}), 5, 2)


@requirement("11.8")
def test_statistics_with_eos(subject: Subject, rng: torch.Generator) -> None:
    """What was proposed up to EOS counts, and an accepted EOS is an accepted token."""
    target = Story(rng)
    kinds = drafts(rng, target)
    tokens = told(greedy(target), greedy(target), [1, 5], 6, 3).tokens
    for place, agrees in ((0, "always"), (1, "sometimes"), (2, "always"), (3, "always")):
        counted(subject, target, kinds[agrees], 6, 3, tokens[place])


@requirement("11.8")
def test_statistics_after_a_call_that_failed(subject: Subject) -> None:
    """What was counted before the target raised in its second round is not counted again."""
    target, draft = chain(UPWARDS), chain(SKIPPING)
    target.fails_behind, target.calls_before = 0, 1
    with contextlib.suppress(Fault):
        subject.speculative_generate(target, draft, [1, 5], 6, num_draft_tokens=2, uniform=Numbers(0.5))
    target.fails_behind = -1

    counted(subject, target, draft, 6, 2, where=", after a call that failed in its second round")


@requirement("11.8")
def test_expected_speedup(subject: Subject) -> None:
    """Tokens per round by the cost of a round, for a rate of 0 and of 1 too."""
    for rate, k, cost, wanted in (
        (0.5, 2, 0.25, 1.75 / 1.5),
        (0.8, 4, 0.1, (1 + 0.8 + 0.64 + 0.512 + 0.4096) / 1.4),
        (0.0, 3, 0.2, 1 / 1.6),
        (1.0, 3, 0.2, 4 / 1.6),
        (1, 1, 1, 1.0),
        (0, 5, 0, 1.0),
        (0.3, 1, 0.5, 1.3 / 1.5),
    ):
        came = subject.expected_speedup(rate, k, cost)

        what = f"expected_speedup({rate}, {k}, {cost})"
        assert isinstance(came, int | float), f"{what}: a {type(came).__name__} came, a number was wanted"
        assert math.isclose(came, wanted, rel_tol=1e-9), (
            f"{what}: {came:.6g} came, {wanted:.6g} was wanted\n(1 + a + … + aᵏ) / (k · draft_cost + 1)"
        )
