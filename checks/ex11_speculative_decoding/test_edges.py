"""Edges (11.9): ends of uniform, sums that miss 1, zero residuals, mixed dtypes, calls afresh, refusals."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from harness.testing import Subject, refuses, requirement

from .reference import (
    LAST,
    Fault,
    Numbers,
    Small,
    Story,
    Table,
    calling,
    chain,
    drafts,
    float64,
    forget,
    generate,
    greedy,
    ints,
    told,
)

TENTHS = [0.1] * 10  # They add up to 1 - 2^-53.


@requirement("11.9")
def test_draw_at_the_ends(subject: Subject) -> None:
    """A token of probability 0 never comes out, be it the first ones at 0.0 or the last ones behind a short sum."""
    cases: list[tuple[Sequence[float], float, Sequence[int]]] = [
        ((0.0, 0.0, 1.0), 0.0, (2,)),
        ((0.0, 0.5, 0.5, 0.0), LAST, (2,)),
        (TENTHS, LAST, (9,)),
        ((*TENTHS, 0.0, 0.0), LAST, (9,)),
        ((0.5, 0.5 - 2.0**-40, 0.0), LAST, (0, 1)),
        ((0.25, 0.75 + 2.0**-40, 0.0), LAST, (1,)),
    ]
    for row, u, wanted in cases:
        came = subject.draw(float64(row), u)

        told = "1 - 2^-53" if u else "0.0"
        assert came in wanted, (
            f"draw({list(row)}, {told}): {came} came, {' or '.join(map(str, wanted))} was wanted\n"
            "the last token that is possible, where no cumulative probability exceeds u"
        )


@requirement("11.9")
def test_verify_at_the_ends(subject: Subject) -> None:
    """A proposed token with p = 0 is rejected, and one with p = q accepted, whatever uniform gives."""
    q, p = float64([[0.5, 0.0, 0.5, 0.0]]), float64([[0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]])
    for number, (token, wanted) in itertools.product((0.0, LAST), ((0, [1]), (2, [2, 3]))):
        came = subject.verify([token], q, p, Numbers(number))

        assert came == wanted, (
            f"verify([{token}], q = {q.tolist()}, p = {p.tolist()}) with uniform always {number}: {came} came, "
            f"{wanted} was wanted\na token with p = 0 never comes out; one with p = q is always accepted"
        )


@requirement("11.9")
def test_a_residual_of_zero(subject: Subject) -> None:
    """Where (p - q)+ is zero everywhere, as rounding can make it, a rejected token is replaced by one from p."""
    for size, numbers in itertools.product((2.0**-40, 2.0**-52), ((LAST,), (LAST, 0.0), (0.0, LAST))):
        q, p = float64([[0.0, 0.5, 0.5, 0.0]]), float64([[0.0, 0.5, 0.5 - size, 0.0], [0.0, 1.0, 0.0, 0.0]])
        came = ints(subject.verify([2], q, p, Numbers(*numbers)), "verify with p = q but for rounding")

        assert came in ((1,), (2,), (2, 1)), (
            f"verify([2], q, p) with p = q but for {size:.3g}, and uniform near 1: {list(came)} came\n"
            "(p - q)+ is zero everywhere: a rejected token is replaced by one from p"
        )


@requirement("11.9")
def test_whole_outputs_at_the_ends(subject: Subject) -> None:
    """No token comes that the target gives no probability."""
    target = Table([[0, 0.3, 0.7, 0], [0, 0, 0.6, 0.4], [0.2, 0, 0, 0.8], [0.1, 0.9, 0, 0]])
    draft = Table([[0.3, 0.3, 0.4, 0], [0.5, 0, 0.5, 0], [0.1, 0.1, 0.1, 0.7], [0.2, 0.2, 0.2, 0.4]])
    for number, top_p in ((0.0, 1.0), (LAST, 0.8), (LAST, 1.0)):
        options = {"num_draft_tokens": 2, "temperature": 1.0, "top_p": top_p}

        came = generate(subject, target, draft, [0], 5, uniform=Numbers(number), **options)

        pairs = zip([0, *came.tokens], came.tokens, strict=False)
        wrong = [pair for pair in pairs if not target.table[0, pair[0], pair[1]].isfinite()]
        what = f"{calling([0], 5, **options)} with uniform always {number}"
        assert len(came.tokens) >= 5 and not wrong, (
            f"{what}: {came.tokens} came; the target gives probability 0 to (token, next): {wrong}"
        )


@requirement("11.9")
def test_models_of_two_dtypes(subject: Subject, rng: torch.Generator) -> None:
    """A draft of lower precision, of other layers and heads, beside a float64 target, and the other way round."""
    upwards = {token: token + 1 for token in range(9)}
    exact, *lower = chain(upwards), *(chain({**upwards, 2: 7}, dtype) for dtype in (torch.float32, torch.bfloat16))
    deep = Story(rng, vocab_size=10, layers=3)
    for target, draft, temperature in (
        *((exact, low, 1.0) for low in lower),
        (lower[1], exact, 0.0),
        (exact, deep, 1.0),
    ):
        expected = told(greedy(target), greedy(draft), [0], 4, 3)
        options = {"num_draft_tokens": 3, "temperature": temperature}

        came = generate(subject, target, draft, [0], 4, uniform=Numbers(0.3, 0.8), **options)

        what = f"{calling([0], 4, **options)}, target of {target.table.dtype}, draft of {draft.table.dtype}"
        assert came.tokens[:4] == expected.tokens, f"{what}: {came.tokens} came, {expected.tokens} was wanted"


def is_afresh(subject: Subject, target: Story, draft: Story, prompt: Sequence[int], what: str) -> None:
    """A call gives and feeds what it would if it were the first."""
    expected = told(greedy(target), greedy(draft), prompt, 3, 1)
    forget(target, draft)

    came = generate(subject, target, draft, prompt, 3, num_draft_tokens=1, uniform=Numbers(0.5))

    call = f"{calling(prompt, 3, num_draft_tokens=1)}, {what}"
    assert came.tokens[:3] == expected.tokens, (
        f"{call}: {came.tokens} came, {expected.tokens} was wanted\neach call starts afresh"
    )
    for whose, calls, wanted in (
        ("target", target.calls, expected.target_calls),
        ("draft", draft.calls, expected.draft_calls),
    ):
        assert calls[:1] == wanted[:1], f"{call}: first {whose} call {calls[:1]} came, {wanted[:1]} was wanted"


@requirement("11.9")
def test_each_call_starts_afresh(subject: Subject, rng: torch.Generator) -> None:
    """After a call with the same models, after new weights, after a call that failed."""
    target = Story(rng)
    draft, other = drafts(rng, target)["sometimes"], Story(rng)
    changes: dict[str, Callable[[], Any]] = {
        "the first call": lambda: None,
        "the same again": lambda: None,
        "after the weights were written to": lambda: target.table.data.copy_(target.table.roll(3, 1)),
        "after load_state_dict": lambda: target.load_state_dict(other.state_dict()),
        "after a cast of the draft": lambda: draft.float(),
    }
    for what, change in changes.items():
        change()
        is_afresh(subject, target, draft, [4, 1], what)
    for model in (target, draft):
        model.fails_behind = 0
        refuses(
            Fault,
            lambda: subject.speculative_generate(target, draft, [4, 1], 3),
            "speculative_generate with a model that raises",
            "layer 0 fails",
        )
        model.fails_behind = -1
        is_afresh(subject, target, draft, [4, 1], "after one that failed")
    is_afresh(subject, target, draft, [4], "with a beginning of the prompt before")


@requirement("11.9")
def test_nothing_given_is_changed(subject: Subject, rng: torch.Generator) -> None:
    """Prompt, weights, gradients and training flags, also where a part of a model is in eval."""
    models = [Small(rng, layers=1), Small(rng, layers=1)]
    for model in models:
        model.part = torch.nn.Linear(2, 2)
        model.part.eval()
    models[1].eval()
    flags = [[part.training for part in model.modules()] for model in models]
    states = [{name: (p, p._version, p.detach().clone()) for name, p in model.named_parameters()} for model in models]
    prompt = [1, 0, 2]
    expected = told(greedy(models[0]), greedy(models[1]), prompt, 5, 2)
    seen: list[list[int]] = []
    for model in models:
        model.register_forward_pre_hook(lambda *_: seen.append(list(prompt)))

    came = generate(subject, models[0], models[1], prompt, 5, num_draft_tokens=2)

    what = calling([1, 0, 2], 5, num_draft_tokens=2)
    assert prompt == [1, 0, 2], f"{what}: the prompt is {prompt} afterwards"
    for during in seen:
        assert during == prompt, f"{what}: the prompt is {during} while a model runs, and {prompt} again afterwards"
    assert came.tokens[:5] == expected.tokens, f"{what}: {came.tokens} came, {expected.tokens} was wanted"
    for model, flag, state in zip(models, flags, states, strict=True):
        now = [part.training for part in model.modules()]
        assert now == flag, f"{what}: training flags {flag} were given, {now} were left"
        same = all(
            p is model.get_parameter(name) and p._version == version and p.equal(values) and p.requires_grad
            for name, (p, version, values) in state.items()
        )
        assert same, f"{what}: a weight was written to, replaced, or no longer asks for gradients"


REFUSED: dict[str, tuple[dict[str, Any], tuple[object, ...]]] = {
    "an empty prompt": ({"prompt": []}, ()),
    "token 7 of 7": ({"prompt": [1, 7]}, ()),
    "token -1": ({"prompt": [-1, 2]}, ()),
    "no new tokens": ({"max_new_tokens": 0}, ()),
    "-2 new tokens": ({"max_new_tokens": -2}, ()),
    "num_draft_tokens 0": ({"num_draft_tokens": 0}, ()),
    "num_draft_tokens -1": ({"num_draft_tokens": -1}, ()),
    "a negative temperature": ({"temperature": -0.5}, ()),
    "top_p 0": ({"top_p": 0.0, "temperature": 1.0}, ()),
    "top_p -0.1, greedy": ({"top_p": -0.1}, ()),
    "top_p 1.01": ({"top_p": 1.01, "temperature": 1.0}, ()),
    "a draft of 13 tokens": ({"draft": 13}, (7, 13)),
}


@requirement("11.9")
@pytest.mark.parametrize("which", ["prompt", "numbers"])
def test_refused_before_any_model_call(subject: Subject, rng: torch.Generator, which: str) -> None:
    """ValueError, and neither model has been called."""
    for what, (changed, contents) in REFUSED.items():
        if (which == "prompt") != ("prompt" in changed or "draft" in changed):
            continue
        given = {"draft": 7, "prompt": [1, 2], "max_new_tokens": 3, "uniform": Numbers(0.5), **changed}
        models = target, draft = Story(rng), Story(rng, vocab_size=given.pop("draft"))

        refuses(
            ValueError,
            partial(subject.speculative_generate, *models, **given),
            f"speculative_generate with {what}",
            *contents,
        )

        calls = len(target.calls) + len(draft.calls)
        assert not calls, f"speculative_generate with {what}: {calls} model calls came before ValueError"
