"""Many requests: tokens per second, calls and slots held, one by one, in static batches, and in an engine."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from harness.testing import Case, Run, Series

X = "requests that wait"
REFERENCE = "one by one"
CAPTION = "d_model 512, 2 layers, blocks of 16, at most 8 at once"
SECONDS = 40
HIGHER_IS_BETTER = ("tokens per second",)
STATIC = "static batches"
PANELS = {"a mix of lengths": 0, "a common prefix of 256 tokens": 256}
COUNTS = (4, 12, 32)
SHORT_UP_TO = 12
BATCH, BLOCK_SIZE, NUM_BLOCKS, VOCABULARY = 8, 16, 192, 128
SIZES = {"d_model": 512, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32, "d_ff": 1024}
TOKENS, CALLS, SLOTS = "tokens per second", "calls of the model", "slots held per token"

Asked = list[tuple[list[int], int]]
Serve = Callable[[nn.Module, Asked, Callable[[int], None]], list[list[int]]]


def cases(modules: Mapping[str, ModuleType]) -> Iterable[Case]:
    """Requests of 8 to 24 tokens for 8 to 24 more, all of them waiting, with and without a common beginning."""
    given = modules.get("answer") or modules["yours"]
    for panel, prefix in PANELS.items():
        for count in COUNTS:
            asked = requests(count, prefix)
            ways: dict[str, Serve] = {name: by_engine(module, BATCH) for name, module in modules.items()}
            ways |= {REFERENCE: by_engine(given, 1), STATIC: static(given)}
            right: list[list[list[int]]] = []
            runs: dict[str, Run] = {name: measured(given, way, asked, right) for name, way in ways.items()}
            yield Case(panel, count, runs, timed=False, long=count > SHORT_UP_TO)


def conclude(measured: Sequence[Series]) -> Iterator[str]:
    """What the engine gains over one by one, and holds beside static batches."""
    for panel in PANELS:
        found = {one.metric: one.values for one in measured if one.panel == panel}
        for name in ("yours", "answer"):
            counts = found.get(TOKENS, {}).get(name, {})
            if not counts:
                continue
            most = max(counts)
            speed = counts[most] / found[TOKENS][REFERENCE][most]
            calls = found[CALLS][name][most] / found[CALLS][REFERENCE][most]
            held = found[SLOTS][name][most] / found[SLOTS][STATIC][most]
            # Those that come together share nothing: only with more of them does a common prefix count.
            claimed = "2.5 is claimed for 32" if PANELS[panel] and most < max(COUNTS) else "2.5 is claimed"
            yield (
                f"{panel}, {most:g} requests: {name} makes {speed:.1f} times the tokens per second of one by one "
                f"({claimed}) with {calls:.0%} of its calls, and holds {held:.0%} of the slots of static batches "
                "(less than 60 % is claimed); all answers are equal"
            )


def requests(count: int, prefix: int) -> Asked:
    """Prompts, and for how many tokens each asks."""
    rng = torch.Generator().manual_seed(count)

    def numbers(n: int) -> list[int]:
        drawn: list[int] = torch.randint(VOCABULARY, (n,), generator=rng).tolist()
        return drawn

    shared = numbers(prefix)
    lengths = torch.randint(8, 25, (count, 2), generator=rng).tolist()
    return [([*shared, *numbers(length)], most) for length, most in lengths]


def measured(given: ModuleType, serve: Serve, asked: Asked, right: list[list[list[int]]]) -> Run:
    """Serves them, and fails where answers are not those that came first."""

    def run() -> Mapping[str, float]:
        torch.manual_seed(0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = given.Decoder(VOCABULARY, **SIZES).double().to(device)  # In float64 rounding decides no token.
        held: list[int] = []
        begin = Clock()
        answers = serve(model, asked, held.append)
        seconds = begin.seconds()
        right.append(answers)
        if answers != right[0]:
            raise AssertionError("the answers are not those of the others")
        tokens = sum(map(len, answers))
        return {TOKENS: tokens / seconds, CALLS: len(held), SLOTS: sum(held) / tokens}

    return run


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.begin = self._now()

    def seconds(self) -> float:
        return self._now() - self.begin

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def by_engine(module: Any, size: int) -> Serve:
    """An engine of a contestant's, with as many blocks as its requests need."""

    def serve(model: nn.Module, asked: Asked, note: Callable[[int], None]) -> list[list[int]]:
        engine = module.Engine(model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_batch_size=size)
        allocator = engine.cache.allocator
        model.register_forward_pre_hook(lambda *_: note((NUM_BLOCKS - allocator.num_free) * BLOCK_SIZE))
        ids = [engine.submit(prompt, most) for prompt, most in asked]
        answers = engine.run()
        return [answers[number] for number in ids]

    return serve


def static(given: ModuleType) -> Serve:
    """Batches that end when their longest answer does, each with slots for its longest prompt and answer in every row.
    Rows that are done are fed no more.
    """

    @torch.no_grad()
    def serve(model: Any, asked: Asked, note: Callable[[int], None]) -> list[list[int]]:
        weight = next(model.parameters())
        answers: list[list[int]] = []
        for first in range(0, len(asked), BATCH):
            batch = asked[first : first + BATCH]
            width = max(len(prompt) for prompt, _ in batch) + max(most for _, most in batch)
            shape = (2, model.num_layers, len(batch), width, model.num_kv_heads, model.head_dim)
            answers += one_batch(given, model, batch, weight.new_zeros(shape), note)
        return answers

    return serve


def one_batch(given: Any, model: Any, batch: Asked, cache: Tensor, note: Callable[[int], None]) -> list[list[int]]:
    """A static batch, whose keys and values are in `cache` [2, layers, rows, width, Hkv, Dh]."""
    tokens = [list(prompt) for prompt, _ in batch]
    fed, live = [0] * len(batch), list(range(len(batch)))
    while live:
        new = [tokens[row][fed[row] :] for row in live]
        counts = [len(one) for one in new]

        def attend(
            layer: int, q: Tensor, k: Tensor, v: Tensor, rows: list[int] = live, lens: list[int] = counts
        ) -> Tensor:
            parts = []
            for row, q_own, k_own, v_own in zip(rows, q.split(lens), k.split(lens), v.split(lens), strict=True):
                end = fed[row] + len(q_own)
                cache[0, layer, row, fed[row] : end], cache[1, layer, row, fed[row] : end] = k_own, v_own
                parts.append(given.causal_attention(q_own, cache[0, layer, row, :end], cache[1, layer, row, :end]))
            return torch.cat(parts)

        ids = torch.tensor([token for one in new for token in one], device=cache.device)
        places = torch.tensor(
            [place for row in live for place in range(fed[row], len(tokens[row]))], device=cache.device
        )
        note(cache.shape[2] * cache.shape[3])
        logits = model(ids, places, attend)
        ends = torch.tensor(counts, device=cache.device).cumsum(0) - 1
        for row, token in zip(live, logits[ends].argmax(-1).tolist(), strict=True):
            fed[row] = len(tokens[row])
            tokens[row].append(token)
        live = [row for row in live if len(tokens[row]) < len(batch[row][0]) + batch[row][1]]
    return [row[len(prompt) :] for row, (prompt, _) in zip(tokens, batch, strict=True)]
