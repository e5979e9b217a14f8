"""A walk over calls of speculative_generate (11.3 to 11.9), in which everything is drawn together.

Every token is certain, by temperature 0, by a small top_p or by logits of -inf, so that what comes, what is fed and
what is counted is known beforehand, whatever uniform gives and in whatever order its numbers are taken.
"""

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from harness.testing import Aspect, Step, Subject, Walk, walk_check

from .reference import LAST, Fault, Numbers, Story, calling, drafts, forget, generate, greedy, told

MODES: dict[str, Callable[[], Any]] = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
Models = dict[tuple[bool, int], dict[str, Story]]


class Generations(Walk):
    """Calls with a few models."""

    aspects: ClassVar[tuple[Aspect, ...]] = (
        Aspect("counts", "11.8", {"": False, "with a look at the counts": True}),
        Aspect("fed", "11.5", {"": False, "with a look at what is fed": True}),
        Aspect("given", "11.9", {"": False, "with a look at the prompt and the weights": True}, rate=0.3),
        Aspect(
            "before",
            "11.9",
            {
                "": "",
                "after new weights by .data": "data",
                "after load_state_dict": "load",
                "after a call that failed": "target",
                "after a call whose draft failed": "draft",
                "after a cast there and back": "cast",
                "after the same call": "same",
            },
            rate=0.4,
        ),
        Aspect("mode", "11.9", {"": "", **{f"under {name}": name for name in MODES if name}}, rate=0.3),
        Aspect(
            "dtype",
            "11.9",
            {"": (), "a float32 draft": ("draft",), "a float32 target": ("target",)},
            rate=0.3,
        ),
        Aspect(
            "eos",
            "11.7",
            {
                "": None,
                "EOS as the first token": 0,
                "EOS as the second token": 1,
                "EOS as the third token": 2,
                "EOS in the prompt": "prompt",
                "an EOS that never comes": 99,
            },
        ),
        Aspect("new", "11.7", {"": 5, "one new token": 1, "two new tokens": 2, "eight new tokens": 8}),
        Aspect(
            "certain",
            "11.4",
            {
                "": (0.0, 1.0),
                "top_p 0.01 at temperature 0.7": (0.7, 0.01),
                "logits of -inf at temperature 2": (2.0, 1.0),
            },
        ),
        Aspect("k", "11.5", {"": 2, "num_draft_tokens 1": 1, "num_draft_tokens 3": 3, "num_draft_tokens 9": 9}),
        Aspect("agrees", "11.3", {"": "sometimes", "a draft that never agrees": "never", "draft = target": "always"}),
        Aspect("layers", "11.3", {"": 1, "two layers": 2}, rate=0.3),
        Aspect("uniform", "11.3", {"": (0.5,), "uniform at 0.0": (0.0,), "near 1": (LAST,), "both": (0.0, 0.6, LAST)}),
        Aspect(
            "prompt", "11.3", {"": [2, 5, 1], "one token": [3], "a tuple": (6, 6), "a long prompt": [*range(7)] * 2}
        ),
    )
    otherwise = ""

    def begin(self, subject: Subject) -> tuple[Subject, Models]:
        """No model yet."""
        return subject, {}

    def step(self, state: tuple[Subject, Models], step: Step) -> None:
        """One call, of which the tokens, the calls and the counts are looked at."""
        subject, models = state
        temperature, top_p = step["certain"]
        hard, layers = temperature == 2.0, step["layers"]
        if (hard, layers) not in models:
            models[hard, layers] = made(step.rng(), hard, layers)
        of = models[hard, layers]
        target, draft = of["target"], of[step["agrees"]]
        prompt, new, k = step["prompt"], step["new"], step["k"]
        options: dict[str, Any] = {"num_draft_tokens": k, "temperature": temperature, "top_p": top_p}

        with MODES[step["mode"]]():
            change(subject, of, target, draft, step, options)
            for name, model in (("target", target), ("draft", draft)):
                model.to(torch.float32 if name in step["dtype"] else torch.float64)
            eos = step["eos"]
            if isinstance(eos, int) and eos < 9:
                alone = told(greedy(target), greedy(draft), prompt, new, k).tokens
                eos = alone[min(eos, len(alone) - 1)]
            eos = prompt[0] if eos == "prompt" else eos
            expected = told(greedy(target), greedy(draft), prompt, new, k, eos)
            forget(target, draft)
            given, versions = list(prompt), (target.table._version, draft.table._version)
            numbers = Numbers(*step["uniform"])
            came = generate(subject, target, draft, prompt, new, eos_token_id=eos, uniform=numbers, **options)

        what = calling(given, new, eos_token_id=eos, **options)
        assert came.tokens == expected.tokens, f"{what}: {came.tokens} came, {expected.tokens} was wanted"
        fed = ("target", target.calls, expected.target_calls), ("draft", draft.calls, expected.draft_calls)
        for whose, calls, wanted in fed if step["fed"] else ():
            assert calls == wanted, f"{what}: {whose} calls (tokens, positions) {calls} came, {wanted} was wanted"
        if step["counts"]:
            counts, right = ([one.rounds, one.proposed, one.accepted] for one in (came, expected))
            assert counts == right, f"{what}: rounds, proposed, accepted: {counts} came, {right} was wanted"
        if step["given"]:
            most = (2 * k + 1) * expected.rounds
            assert numbers.taken <= most, (
                f"{what}: {numbers.taken} numbers of uniform() were taken; at most {most} may be"
            )
            assert list(prompt) == given, f"{what}: the prompt is {prompt} afterwards"
            now = target.table._version, draft.table._version
            assert now == versions, f"{what}: weights are written to"


def made(rng: torch.Generator, hard: bool, layers: int) -> dict[str, Story]:
    """A target, and drafts that agree with it sometimes, never and always; with hard rows of zeros and ones."""
    target = Story(rng, layers=layers)
    models = {"target": target, **drafts(rng, target)}
    for model in models.values() if hard else ():
        with torch.no_grad():
            best = model.table.argmax(-1, keepdim=True)
            model.table.fill_(-torch.inf).scatter_(1, best, 1.0)
    return models


def change(
    subject: Subject, of: dict[str, Story], target: Story, draft: Story, step: Step, options: dict[str, Any]
) -> None:
    """What happens before a call."""
    act = step["before"]
    failing = {"target": target, "draft": draft}.get(act)
    if act == "same" or failing is not None:
        if failing is not None:
            failing.fails_behind = 0
        with contextlib.suppress(Fault):
            subject.speculative_generate(target, draft, step["prompt"], 3, uniform=Numbers(0.4), **options)
        if failing is not None:
            failing.fails_behind = -1
    elif act == "cast":
        target.float().double()
    elif act:
        for model in of.values():
            rolled = model.table.detach().roll(1, 0)
            if act == "data":
                model.table.data.copy_(rolled)
            else:
                model.load_state_dict({"table": rolled})


test_calls_in_any_order = walk_check(Generations(), 10)
