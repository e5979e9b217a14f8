"""Rounds: greedy outputs (11.3), the law of whole outputs (11.4), and what is fed (11.5)."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from harness.testing import Subject, also, requirement

from .reference import (
    LAST,
    Call,
    Counted,
    Law,
    Numbers,
    Rows,
    Small,
    Story,
    Table,
    Told,
    beginnings,
    calling,
    chain,
    drafts,
    forget,
    generate,
    greedy,
    law,
    probabilities,
    same_law,
    state_of,
    told,
)

# 11.3 greedy


def is_greedy(came: Any, expected: Told, what: str) -> None:
    """The tokens are those of the target alone; that none come behind them is 11.7's to say."""
    tokens = came.tokens[: len(expected.tokens)]
    if tokens != expected.tokens:
        place = next((i for i, pair in enumerate(zip(tokens, expected.tokens, strict=False)) if pair[0] != pair[1]), -1)
        where = f"they differ from the token {place} on" if place >= 0 else "some are missing"
        raise AssertionError(
            f"{what}: {came.tokens} came, the target alone gives {expected.tokens}; {where}\n"
            "is a token accepted that the target does not want, a row taken for another, or a rejected one still fed?"
        )


@requirement("11.3")
@pytest.mark.parametrize("agrees", ["sometimes", "never"])
def test_greedy_is_the_targets(subject: Subject, rng: torch.Generator, agrees: str) -> None:
    """Whether the draft agrees sometimes or never, and however much it proposes."""
    target = Story(rng)
    draft, next_token = drafts(rng, target)[agrees], greedy(target)
    for prompt, new, k in (([3, 1, 4], 6, 2), ((0, 6), 3, 9)):
        expected = told(next_token, greedy(draft), prompt, new, k)

        came = generate(subject, target, draft, prompt, new, num_draft_tokens=k, uniform=Numbers(0.3, 0.9))

        is_greedy(came, expected, f"{calling(prompt, new, num_draft_tokens=k)}, the draft agrees {agrees}")


@requirement("11.3")
def test_greedy_whatever_uniform_gives(subject: Subject, rng: torch.Generator) -> None:
    """With temperature 0 no number changes the output, and top_p does not either."""
    target = Story(rng)
    draft, prompt = drafts(rng, target)["sometimes"], [2, 2]
    expected = told(greedy(target), greedy(draft), prompt, 6, 3)
    for number, top_p in ((0.0, 1.0), (LAST, 0.4)):
        options = {"num_draft_tokens": 3, "temperature": 0.0, "top_p": top_p}

        came = generate(subject, target, draft, prompt, 6, uniform=Numbers(number), **options)

        is_greedy(came, expected, f"{calling(prompt, 6, **options)}, uniform always gives {number}")


@requirement("11.3")
def test_greedy_with_keys_that_matter(subject: Subject, rng: torch.Generator) -> None:
    """Two decoders with attention of their own, by default four proposed tokens and temperature 0."""
    target, draft = Small(rng, layers=1), Small(rng, layers=1)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            parameter.copy_(target.get_parameter(name) + (0.3 if name.startswith("o") else 0.0))
    prompt = [1, 3]
    expected = told(greedy(target), greedy(draft), prompt, 6, 4)

    came = subject.speculative_generate(target, draft, prompt, 6)

    is_greedy(came, expected, calling(prompt, 6))


@requirement("11.3")
def test_greedy_of_equals(subject: Subject) -> None:
    """Of equally probable tokens the target takes the first; a draft that proposes another one is wrong."""
    target, draft = Table([[0.0, 0.5, 0.5]] * 3), Table([[0.0, 0.25, 0.75], [0.0, 0.5, 0.5], [0.0, 0.25, 0.75]])
    expected = told(greedy(target), greedy(draft), [0], 4, 2)

    came = generate(subject, target, draft, [0], 4, num_draft_tokens=2, uniform=Numbers(0.7, 0.2))

    is_greedy(came, expected, f"{calling([0], 4, num_draft_tokens=2)}, tokens 1 and 2 are equally probable")


# 11.4 the law of whole outputs


def whole_law(target: Table, prompt: Sequence[int], new: int, eos: int | None, *options: float) -> Law:
    """That of sampling from the target one token at a time."""
    tables = target.table.detach().tolist()
    alive: Law = {tuple(prompt): 1.0}
    for _ in range(new):
        longer: Law = {}
        for tokens, probability in alive.items():
            if eos is not None and eos in tokens[len(prompt) :]:
                longer[tokens] = probability
                continue
            row = probabilities(tables[(len(tokens) - 1) % len(tables)][tokens[-1]], *options)
            longer |= {(*tokens, i): probability * one for i, one in enumerate(row) if one}
        alive = longer
    return {tokens[len(prompt) :]: probability for tokens, probability in alive.items()}


def has_the_targets_law(
    subject: Subject, target: Table, draft: Table, new: int, k: int, eos: int | None = None, **options: float
) -> None:
    """The output has the law of the target alone; the message names the first token that has not."""
    prompt, options = [0], {"temperature": 1.0, "top_p": 1.0, **options}
    expected = whole_law(target, prompt, new, eos, options["temperature"], options["top_p"])
    what = calling(prompt, new, num_draft_tokens=k, eos_token_id=eos, **options)

    def run(uniform: Callable[[], float]) -> tuple[int, ...]:
        numbers = Counted(uniform)
        forget(target, draft)
        came = generate(
            subject, target, draft, prompt, new, num_draft_tokens=k, eos_token_id=eos, uniform=numbers, **options
        )
        most = (2 * k + 1) * len(target.calls)
        assert numbers.taken <= most, (
            f"{what}: took {numbers.taken} numbers of uniform() in {len(target.calls)} rounds; "
            f"at most 2·k + 1 are for a round of k tokens"
        )
        return tuple(came.tokens)

    came = law(run, 2, (2 * k + 1) * new, what)

    for length in range(1, new + 1):
        with also(lambda length=length: "" if length < 2 else f"the first {length - 1} tokens have the target's law"):
            same_law(beginnings(came, length), beginnings(expected, length), f"{what}: what the output begins with")


@requirement("11.4")
def test_law_over_several_rounds(subject: Subject) -> None:
    """One proposed token per round: accepted ones, corrections, bonuses, what follows each, and EOS (3)."""
    first: Rows = [[0, 0.25, 0.75, 0]] * 4  # 1 is proposed with 1/2 and accepted with 1/2.
    target: Rows = [[0, 0.5, 0.5, 0], [0.5, 0, 0, 0.5], [0.5, 0, 0, 0.5], [1, 0, 0, 0]]
    draft: Rows = [[0, 0.5, 0.5, 0], [0, 0, 1, 0], [0.5, 0.5, 0, 0], [1, 0, 0, 0]]

    has_the_targets_law(subject, Table(first, target, target), Table(draft), 3, 1, eos=3)


@requirement("11.4")
def test_law_with_two_proposed_tokens(subject: Subject) -> None:
    """The first of two proposed tokens is accepted, the second with 1/2; EOS (3) or a bonus follows."""
    first: Rows = [[0.5, 0.5, 0, 0]] * 4
    half: Rows = [[0, 0, 0.5, 0.5], [0.5, 0, 0, 0.5]] * 2
    sure: Rows = [[0, 0, 1, 0], [1, 0, 0, 0]] * 2
    last: Rows = [[0, 0.5, 0.5, 0], [1, 0, 0, 0], [0, 0.5, 0, 0.5], [0, 0, 0, 1]]

    has_the_targets_law(subject, Table(first, half, last), Table(first, sure), 3, 2, eos=3)


@requirement("11.4")
def test_law_with_temperature_and_top_p(subject: Subject) -> None:
    """Both hold for the draft and for the target."""
    # Squared, the two most probable ones reach 0.71, and are all that is left; as they are here, they do not.
    target: Rows = [
        [0.03, 0.34, 0.29, 0.34],
        [0.29, 0.34, 0.03, 0.34],
        [0.34, 0.34, 0.29, 0.03],
        [0.29, 0.34, 0.34, 0.03],
    ]
    draft: Rows = [[0.29, 0.34, 0.34, 0.03]] * 4

    has_the_targets_law(subject, Table(target), Table(draft), 2, 1, temperature=0.5, top_p=0.71)


@requirement("11.4")
def test_law_with_a_draft_that_is_always_wrong(subject: Subject) -> None:
    """Each proposed token is one that the target never wants: all come from corrections."""
    ends: Rows = [[0.5, 0, 0, 0.5]] * 4
    goes_on: Rows = [[0, 0.5, 0.5, 0]] * 4

    has_the_targets_law(subject, Table(ends, goes_on), Table(goes_on, ends), 2, 1, eos=3)


@requirement("11.4")
def test_a_draft_of_low_precision_is_judged_by_what_it_was_drawn_from(subject: Subject) -> None:
    """Draft = target, so what is proposed is accepted; thirds rounded to bfloat16, or to float32, are another law."""
    for dtype, number in itertools.product((torch.bfloat16, torch.float32), (1e-10, 1 - 1e-10)):
        target, draft = (Table([[0.0, 1.0, 1.0, 1.0]] * 4, dtype=dtype) for _ in range(2))

        came = generate(subject, target, draft, [0], 2, num_draft_tokens=1, temperature=1.0, uniform=Numbers(number))

        what = f"draft = target, of {dtype}, uniform always {number}"
        assert len(target.calls) == 1 and len(came.tokens) == 2, (
            f"{what}: {len(target.calls)} rounds came, 1 was wanted for {len(came.tokens)} tokens\n"
            "the draft's tokens are judged by the float64 rows that they were drawn from"
        )


@requirement("11.4")
def test_the_default_uniform_is_pythons(subject: Subject) -> None:
    """Without a uniform random.random gives the numbers: random.seed decides the output, and torch draws nothing."""
    table, outputs = Table([[0.25] * 4] * 4), []
    before, stream = random.getstate(), torch.default_generator.get_state()
    for _ in range(2):
        random.seed(11)
        outputs.append(generate(subject, table, table, [0], 6, num_draft_tokens=2, temperature=1.0).tokens)
    random.setstate(before)

    what = f"{calling([0], 6, num_draft_tokens=2, temperature=1.0)}, by default uniform = random.random"
    assert torch.equal(torch.default_generator.get_state(), stream), f"{what}: torch's stream was drawn from"
    assert outputs[0] == outputs[1], f"{what}: after the same random.seed {outputs[0]} came, then {outputs[1]}"


# 11.5 calls


def same_calls(came: Sequence[Call], wanted: Sequence[Call], whose: str, what: str) -> None:
    """Fails with the first call that was not to be, or was missing."""
    for number, (one, other) in enumerate(itertools.zip_longest(came, wanted), start=1):
        if one == other:
            continue
        asked = f"{len(wanted)} calls were wanted" if other is None else f"{told_call(other)} was wanted"
        fact = f"{len(came)} calls came" if one is None else f"{told_call(one)} came"
        raise AssertionError(f"{what}: {whose} call {number}: {fact}, {asked}{why(one, other)}")


def told_call(call: Call) -> str:
    """A call in words."""
    tokens, positions = call
    return f"{tokens} at {positions}"


def why(came: Call | None, wanted: Call | None) -> str:
    """What a wrong call looks like."""
    if came is None or wanted is None:
        return ""
    if came[0] == wanted[0]:
        return "\nthe tokens are right, their positions are not: they count from the start of the sequence"
    if wanted[0] == came[0][-len(wanted[0]) :]:
        return "\nit is fed again what it has been fed before"
    if came[0] == wanted[0][-len(came[0]) :]:
        return "\na token in between is never fed"
    if came[0] == wanted[0][: len(came[0])]:
        return "\nthe target gets all proposed tokens in one call; the draft catches up in one call"
    return ""


@requirement("11.5")
@pytest.mark.parametrize("agrees", ["always", "sometimes", "never"])
def test_calls(subject: Subject, rng: torch.Generator, agrees: str) -> None:
    """Each round feeds what the text says, in one target call and one draft call per proposed token."""
    target = Story(rng)
    draft, next_token = drafts(rng, target)[agrees], greedy(target)
    for prompt, new, k in (([4, 0, 6, 1], 6, 2), ([2], 3, 1), ((1, 5), 3, 8)):
        expected = told(next_token, greedy(draft), prompt, new, k)
        forget(target, draft)

        came = generate(subject, target, draft, prompt, new, num_draft_tokens=k, uniform=Numbers(0.7, 0.2))

        what = f"{calling(prompt, new, num_draft_tokens=k)}, the draft agrees {agrees}"
        same_calls(draft.calls, expected.draft_calls, "draft", what)
        same_calls(target.calls, expected.target_calls, "target", what)
        is_greedy(came, expected, what)


@requirement("11.5")
def test_calls_by_hand(subject: Subject) -> None:
    """The text's case, of tables that hold zeros and ones, sampled."""
    follows = {7: 8, 8: 1, **{i: i + 1 for i in range(1, 7)}}
    target = chain(follows)
    draft = chain({**follows, 3: 9, 9: 0})

    came = generate(
        subject, target, draft, [7, 8], 6, num_draft_tokens=2, temperature=1.0, uniform=Numbers(0.4, 0.0, LAST)
    )

    what = "the text's case, 7 8"
    fed = [[7, 8], [1], [2, 3], [9], [4]]
    same_calls([(call[0], []) for call in draft.calls], [(tokens, []) for tokens in fed], "draft", what)
    fed = [[7, 8, 1, 2], [3, 9, 0], [4, 5]]
    same_calls([(call[0], []) for call in target.calls], [(tokens, []) for tokens in fed], "target", what)
    assert came.tokens == [1, 2, 3, 4, 5, 6], f"{what}: {came.tokens} came, 1 2 3 4 5 6 was wanted"


@requirement("11.5")
def test_rounds_with_the_target_as_draft(subject: Subject, rng: torch.Generator) -> None:
    """Every proposed token is accepted: n tokens take ⌈n / (k + 1)⌉ rounds."""
    target = Story(rng)
    twin = drafts(rng, target)["always"]
    cases = ((7, 2, twin, 0.0, 1.0), (6, 2, target, 1.3, 1.0), (7, 3, twin, 0.7, 0.8), (3, 5, twin, 1.0, 1.0))
    for new, k, draft, temperature, top_p in cases:
        options = {"num_draft_tokens": k, "temperature": temperature, "top_p": top_p}
        forget(target, twin)

        came = generate(subject, target, draft, [1, 2, 3], new, uniform=Numbers(0.1, 0.97, 0.55, 0.3), **options)

        what = f"{calling([1, 2, 3], new, **options)}, draft = target"
        rounds = math.ceil(new / (k + 1))
        made = len(target.calls) - (draft is target) * (new - rounds)
        assert made == rounds, (
            f"{what}: {made} target calls came, {rounds} rounds were wanted\n"
            "with p = q every proposed token is accepted, if it was drawn from what it is judged by"
        )
        assert len(came.tokens) >= new, f"{what}: {len(came.tokens)} tokens came, {new} were wanted"
        possible(target, came.tokens[:new], temperature, top_p, what)


def possible(target: Story, tokens: Sequence[int], temperature: float, top_p: float, what: str) -> None:
    """Each token is one that the target gives a probability."""
    tables = target.table.tolist()
    for place, token in enumerate(tokens):
        row = probabilities(tables[state_of([1, 2, 3, *tokens[:place]], len(tables))], temperature, top_p)
        assert row[token], f"{what}: token {place}, {token}, came; its probability is 0"
