"""Bench of ex11: tokens per second, target calls per token and acceptance over num_draft_tokens, beside plain decoding.

The target has eight layers, of which the first says most. Each draft is that layer with noise on its weights: little,
so that it agrees often; more; or so much that it never agrees.
"""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from harness.testing import Case, Run, Series

X = "num_draft_tokens"
REFERENCE = "plain"
CAPTION = "48 new tokens, d_model 256, 8 layers; the draft has one; one thread"
SECONDS = 50
HIGHER_IS_BETTER = ("tokens per second", "acceptance rate", "expected speedup")
NOISES = {"often": 0.01, "sometimes": 0.12, "never": 2.0}
COUNTS, SHORT = (1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 4, 8)
LAYERS, VOCABULARY, NEW = 8, 256, 48
SIZES = {"d_model": 256, "num_heads": 8, "num_kv_heads": 2, "head_dim": 32, "d_ff": 768}
RATE, SPEEDUP = "acceptance rate", "expected speedup"
_outputs: dict[str, set[tuple[int, ...]]] = {}
_names: list[str] = []


def cases(modules: Mapping[str, ModuleType]) -> Iterator[Case]:
    """Greedy decoding of one prompt, for drafts that agree often, sometimes and never."""
    _outputs.clear()
    _names[:] = list(modules)
    if not modules:
        return
    given = list(modules.values())[-1]
    torch.manual_seed(0)
    torch.set_num_threads(1)  # One token at a time is too little for several.
    target = made(given, LAYERS)
    with torch.no_grad():
        for layer in list(target.layers)[1:]:
            layer.o_proj.weight.mul_(0.04)
            layer.down_proj.weight.mul_(0.04)
    prompt = torch.randint(VOCABULARY, (16,)).tolist()
    for agrees, noise in NOISES.items():
        draft = first_layer(given, target, noise)
        cost = seconds_of_a_call(given, draft) / seconds_of_a_call(given, target)
        for count in COUNTS:
            runs: dict[str, Run] = {REFERENCE: plain(given, target, prompt)}
            runs |= {name: with_draft(name, one, target, draft, prompt, count, cost) for name, one in modules.items()}
            yield Case(
                f"a draft that agrees {agrees}", count, runs, timed=False, long=count not in SHORT or agrees == "never"
            )


def conclude(measured: Sequence[Series]) -> Iterator[str]:
    """Whether all outputs are equal, and what your code gains beside what was to be expected."""
    for name in (name for name in _names if name in _outputs):
        same = len(_outputs[name] | _outputs.get(REFERENCE, set())) == 1
        yield f"{name}: the greedy outputs {'all equal' if same else 'DIFFER from'} those of plain cached decoding"
    found = {(one.panel, one.metric): one.values for one in measured}
    for name in _names:
        best: list[tuple[float, str]] = []
        for (panel, metric), values in found.items():
            for count, speed in values.get(name, {}).items() if metric == "tokens per second" else ():
                gain = speed / values[REFERENCE][count]
                rate, expected = (found[panel, other][name][count] for other in (RATE, SPEEDUP))
                best.append((gain, f"with {count:g} of {panel} (rate {rate:.2f}), where {expected:.2f} is expected"))
        if best:
            gain, where = max(best)
            whose = "your code makes" if name == "yours" else f"the {name} makes"
            yield f"{whose} at best {gain:.2f} times the tokens per second of plain cached decoding, {where}"


def made(module: Any, layers: int) -> Any:
    """A decoder of the bench's sizes whose greedy output does not repeat itself."""
    model = module.Decoder(VOCABULARY, num_layers=layers, **SIZES)
    with torch.no_grad():
        for parameter in model.layers.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.5)
    return model.eval()


def first_layer(module: Any, target: Any, noise: float) -> Any:
    """The target without its other layers, with noise on the weights."""
    draft = made(module, 1)
    draft.embed, draft.norm, draft.head = (copy.deepcopy(part) for part in (target.embed, target.norm, target.head))
    draft.layers = nn.ModuleList([copy.deepcopy(target.layers[0])])
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(noise * parameter.std() * torch.randn_like(parameter))
    return draft


def seconds_of_a_call(module: Any, model: Any) -> float:
    """The least of some calls with one token."""
    cache, least = module.CachedModel(model), float("inf")
    cache.feed([0] * 16)
    for _ in range(12):
        begin = time.perf_counter()
        cache.feed([1])
        least = min(least, time.perf_counter() - begin)
        cache.rewind(16)
    return least


def plain(module: Any, target: Any, prompt: list[int]) -> Run:
    """One token per call, with a cache."""

    def run() -> Mapping[str, float]:
        begin = time.perf_counter()
        cache, output, fed = module.CachedModel(target), list[int](), prompt
        while len(output) < NEW:
            output.append(int(cache.feed(fed)[-1].argmax()))
            fed = output[-1:]
        seconds = time.perf_counter() - begin
        _outputs.setdefault(REFERENCE, set()).add(tuple(output))
        return {"tokens per second": NEW / seconds, "target calls per token": 1.0}

    return run


def with_draft(name: str, module: Any, target: Any, draft: Any, prompt: list[int], count: int, cost: float) -> Run:
    """A contestant's speculative_generate."""

    def run() -> Mapping[str, float]:
        begin = time.perf_counter()
        came = module.speculative_generate(target, draft, prompt, NEW, num_draft_tokens=count)
        seconds = time.perf_counter() - begin
        _outputs.setdefault(name, set()).add(tuple(came.tokens))
        return {
            "tokens per second": NEW / seconds,
            "target calls per token": came.rounds / NEW,
            RATE: came.acceptance_rate,
            SPEEDUP: module.expected_speedup(came.acceptance_rate, count, cost),
        }

    return run
