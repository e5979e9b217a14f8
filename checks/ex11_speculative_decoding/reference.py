"""Models whose probabilities are known, what decoding with a draft gives by the text, and laws without sampling."""

import contextlib
import math
import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Call = tuple[list[int], list[int]]  # tokens and positions
Law = dict[tuple[int, ...], float]
Rows = Sequence[Sequence[float]]
Outcome = TypeVar("Outcome")

LAST = 1 - 2.0**-53  # the largest number that uniform gives


class Fault(Exception):
    """What a model raises in a check."""


class Stop(BaseException):
    """What it raises as KeyboardInterrupt does: no Exception."""


class Model(nn.Module):
    """What a decoder has; it notes its calls, and raises `error` behind layer `fails_behind`, if that is set, but not
    in its first `calls_before` calls.
    """

    def __init__(self, vocab_size: int, num_layers: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.vocab_size, self.num_layers = vocab_size, num_layers
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.calls: list[Call] = []
        self.fails_behind, self.calls_before = -1, 0
        self.error: type[BaseException] = Fault

    def note(self, tokens: Tensor, positions: Tensor) -> None:
        """Notes a call, and fails if its tensors are not the contract's."""
        for name, tensor in (("tokens", tokens), ("positions", positions)):
            if tensor.dtype != torch.int64 or tensor.dim() != 1 or tensor.shape != tokens.shape:
                came = f"{tensor.dtype} {list(tensor.shape)}"
                raise AssertionError(f"the model is called with {name} {came}; int64 [T] was wanted")
        if tokens.device.type != "meta":
            self.calls.append((tokens.tolist(), positions.tolist()))

    def passed(self, layer: int) -> None:
        """Raises if this is where the model is to fail."""
        if layer == self.fails_behind and len(self.calls) > self.calls_before:
            raise self.error(f"layer {layer} fails")


class Table(Model):
    """Chooses by the last token and its position: the probabilities rows[position % len(rows)][token]."""

    def __init__(self, *tables: Rows, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(len(tables[0]), 1, 2, 1, 2)
        self.table = nn.Parameter(torch.tensor(tables, dtype=torch.float64).log().to(dtype))  # [P, V, V]

    def forward(self, tokens: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """Logits [T, V]."""
        self.note(tokens, positions)
        table = self.table
        q = table.new_zeros(len(tokens), 2, 2)
        attend(0, q, q[:, :1], q[:, :1])
        self.passed(0)
        return table[0].index_select(0, tokens) if len(table) == 1 else table[positions % len(table), tokens]


class Story(Model):
    """Chooses by all tokens and their places: what they add up to names a row of a table.

    Every key is zero, so that attention gives means, which times their count are sums of whole numbers.
    """

    def __init__(
        self,
        rng: torch.Generator,
        vocab_size: int = 7,
        rows: int = 23,
        layers: int = 1,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(vocab_size, layers, 2, 1, 2)
        self.table = nn.Parameter(3 * torch.randn(rows, vocab_size, generator=rng, dtype=torch.float64).to(dtype))

    def forward(self, tokens: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """Logits [T, V]."""
        self.note(tokens, positions)
        states, places = self.calls[-1]
        zeros = self.table.new_zeros(len(tokens), 2, 2)
        for layer in range(self.num_layers):
            marks = [[[mark, mark * weight]] for mark, weight in map(mark_of, states, places)]
            v = torch.tensor(marks, dtype=zeros.dtype)  # [T, 1, 2]
            means = attend(layer, zeros, zeros[:, :1], v)[:, 1].tolist()
            sums = [
                (round(a * (place + 1)), round(b * (place + 1))) for (a, b), place in zip(means, places, strict=True)
            ]
            states = [
                step_of(*pair, token, len(self.table)) for pair, token in zip(sums, self.calls[-1][0], strict=True)
            ]
            self.passed(layer)
        return self.table[states]


def mark_of(state: int, place: int) -> tuple[int, int]:
    """What a token adds to the two sums of a Story: the mark, and the mark times the weight."""
    return state % 11 + 1, place % 5 + 1


def step_of(total: int, placed: int, token: int, rows: int) -> int:
    """The row of a Story behind the two sums."""
    return (total + 3 * placed + 5 * token) % rows


class Small(Model):
    """A decoder whose keys matter: four heads that share two."""

    def __init__(self, rng: torch.Generator, dtype: torch.dtype = torch.float64, layers: int = 2) -> None:
        super().__init__(5, layers, 4, 2, 3)
        width, wide = 6, 12
        shapes = {"embed": (5, width), "place": (16, width), "gain": (width,), "head": (width, 5)}
        for layer in range(layers):
            shapes |= {f"{name}{layer}": (width, wide if name == "q" else wide // 2) for name in "qkv"}
            shapes[f"o{layer}"] = (wide, width)
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
            self.register_parameter(name, nn.Parameter(values))
        self.inside: list[weakref.ref[Any]] = []

    def forward(self, tokens: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """Logits [T, V]."""
        self.note(tokens, positions)
        w = dict(self.named_parameters(recurse=False))
        for tensor in (tokens, positions):
            assert tensor.device == w["embed"].device, f"the model is on {w['embed'].device}, it is fed {tensor.device}"
        x = w["embed"][tokens] + w["place"][positions]  # [T, D]
        for layer in range(self.num_layers):
            # A graph of this call keeps the factor; nothing else does.
            self.inside.append(weakref.ref(x.untyped_storage()))
            x = x * w["gain"]
            q, k, v = (x @ w[f"{name}{layer}"] for name in "qkv")
            attended = attend(layer, q.view(-1, 4, 3), k.view(-1, 2, 3), v.view(-1, 2, 3))
            self.passed(layer)
            x = x + (attended.flatten(1) @ w[f"o{layer}"]).tanh()
        return x @ w["head"]


def chain(follows: dict[int, int], dtype: torch.dtype = torch.float64) -> Table:
    """A model of ten tokens in which one alone follows each; 0 follows those that are not named."""
    return Table([[float(i == follows.get(token, 0)) for i in range(10)] for token in range(10)], dtype=dtype)


def plain_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of all tokens of a sequence, head by head."""
    share = q.shape[1] // k.shape[1]
    hidden = torch.full((len(q), len(q)), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // share].T * q.shape[-1] ** -0.5 + hidden
        heads.append(scores.softmax(-1) @ v[:, head // share])
    return torch.stack(heads, 1)


@torch.no_grad()
def whole(model: Model, tokens: Sequence[int]) -> Tensor:
    """The logits [T, V] of one call with all tokens, which is not noted."""
    device = next(model.parameters()).device
    noted = len(model.calls)
    positions = torch.arange(len(tokens), device=device)
    logits: Tensor = model(torch.tensor(tokens, device=device), positions, plain_attention)
    del model.calls[noted:]
    return logits


Next = Callable[[list[int]], int]


def greedy(model: Model) -> Next:
    """The most probable token behind any tokens, the first of equals."""
    if isinstance(model, Story):
        best = [row.index(max(row)) for row in model.table.tolist()]
        return lambda tokens: best[state_of(tokens, len(best), model.num_layers)]

    if isinstance(model, Table):
        tables = model.table.tolist()
        return lambda tokens: (row := tables[(len(tokens) - 1) % len(tables)][tokens[-1]]).index(max(row))

    def next_token(tokens: list[int]) -> int:
        row = whole(model, tokens)[-1].tolist()
        return row.index(max(row))

    return next_token


def state_of(tokens: Sequence[int], rows: int, layers: int = 1) -> int:
    """The row of a Story's table behind some tokens, by sums."""
    states = list(tokens)
    for _ in range(layers):
        total, placed, following = 0, 0, []
        for place, (state, token) in enumerate(zip(states, tokens, strict=True)):
            mark, weight = mark_of(state, place)
            total, placed = total + mark, placed + mark * weight
            following.append(step_of(total, placed, token, rows))
        states = following
    return states[-1]


@dataclass
class Told:
    """What the text says of a call whose every token is certain."""

    tokens: list[int] = field(default_factory=list)
    rounds: int = 0
    proposed: int = 0
    accepted: int = 0
    target_calls: list[Call] = field(default_factory=list)
    draft_calls: list[Call] = field(default_factory=list)


def forget(*models: Model) -> None:
    """What models have noted so far no longer counts."""
    for model in models:
        model.calls.clear()


def told(target: Next, draft: Next, prompt: Sequence[int], new: int, k: int, eos: int | None = None) -> Told:
    """Goes through the rounds, token by token."""
    found, held, fed, draft_fed = Told(), list(prompt), 0, 0
    end = len(prompt) + new
    while len(held) < end and not (eos is not None and eos in found.tokens):
        proposals: list[int] = []
        for _ in range(min(k, end - len(held) - 1)):
            sequence = held + proposals
            found.draft_calls.append((sequence[draft_fed:], list(range(draft_fed, len(sequence)))))
            draft_fed = len(sequence)
            proposals.append(draft(sequence))
            if proposals[-1] == eos:
                break
        sequence = held + proposals
        found.target_calls.append((sequence[fed:], list(range(fed, len(sequence)))))
        found.rounds, found.proposed = found.rounds + 1, found.proposed + len(proposals)
        for place in range(len(proposals) + 1):
            held.append(target(held))
            right = place < len(proposals) and held[-1] == proposals[place]
            found.accepted += right
            if not right or held[-1] == eos:
                break
        found.tokens = held[len(prompt) :]
        fed, draft_fed = len(held) - 1, min(draft_fed, len(held) - 1)
    return found


class Numbers:
    """A uniform that goes through given numbers again and again."""

    def __init__(self, *numbers: float) -> None:
        self.numbers, self.taken = numbers, 0

    def __call__(self) -> float:
        self.taken += 1
        return self.numbers[self.taken % len(self.numbers)]


class Counted:
    """A uniform that counts what is taken of another one."""

    def __init__(self, uniform: Callable[[], float]) -> None:
        self.uniform, self.taken = uniform, 0

    def __call__(self) -> float:
        self.taken += 1
        return self.uniform()


@contextlib.contextmanager
def no_other_randomness(what: str) -> Iterator[None]:
    """Fails if Python's or torch's stream of random numbers has moved."""
    before, stream = random.getstate(), torch.default_generator.get_state()
    yield
    moved = "Python's random" if random.getstate() != before else "torch's stream"
    same = random.getstate() == before and torch.equal(torch.default_generator.get_state(), stream)
    random.setstate(before)
    assert same, f"{what}: {moved} was drawn from; all randomness comes from uniform()"


def law(run: Callable[[Callable[[], float]], Outcome], grid: int, most: int, what: str) -> dict[Outcome, float]:
    """How probable each outcome of `run(uniform)` is, for probabilities that are multiples of 1/grid.

    Goes through the midpoints of a grid for every number that is taken, as a tree over what is really taken.

    Args:
        most: so many numbers may be taken in one run.
    """
    found: dict[Outcome, float] = {}
    path: list[int] = []
    taken = 0

    def uniform() -> float:
        nonlocal taken
        assert taken < most, f"{what}: took more than {most} numbers of uniform(); at most 2·k + 1 are for a round"
        if taken == len(path):
            path.append(0)
        taken += 1
        return (path[taken - 1] + 0.5) / grid

    with no_other_randomness(what):
        while True:
            taken = 0
            outcome = run(uniform)
            del path[taken:]
            found[outcome] = found.get(outcome, 0.0) + float(grid) ** -taken
            while path and path[-1] == grid - 1:
                path.pop()
            if not path:
                return found
            path[-1] += 1


def apart(came: Mapping[Any, float], wanted: Mapping[Any, float]) -> Any:
    """An outcome whose probabilities differ, that where they differ most; None if there is none."""
    gaps = {one: abs(came.get(one, 0.0) - wanted.get(one, 0.0)) for one in (*came, *wanted)}
    worst = max(gaps, key=lambda one: gaps[one])
    return worst if gaps[worst] > 1e-9 else None


def same_law(came: Mapping[Any, float], wanted: Mapping[Any, float], what: str) -> None:
    """Fails with the outcome whose probability is furthest off."""
    if (worst := apart(came, wanted)) is not None:
        raise AssertionError(
            f"{what}: {list(worst)} comes with probability {came.get(worst, 0.0):.4g}, "
            f"{wanted.get(worst, 0.0):.4g} was wanted"
        )


def beginnings(found: Law, length: int) -> Law:
    """The law of the first tokens."""
    short: Law = {}
    for tokens, probability in found.items():
        short[tokens[:length]] = short.get(tokens[:length], 0.0) + probability
    return short


def ints(tokens: Any, what: str) -> tuple[int, ...]:
    """Tokens that a learner's code gave, if they are a list of Python integers."""
    assert isinstance(tokens, list), f"{what}: a {type(tokens).__name__} came, a list of integers was wanted"
    for token in tokens:
        assert type(token) is int, f"{what}: holds a {type(token).__name__}; Python integers are wanted"
    return tuple(tokens)


def float64(rows: Any) -> Tensor:
    """Rows as a float64 tensor."""
    return torch.tensor(rows, dtype=torch.float64)


def softmax(row: Sequence[float], temperature: float) -> list[float]:
    """By Python's numbers."""
    most = max(row)
    powers = [math.exp((one - most) / temperature) for one in row]
    return [one / math.fsum(powers) for one in powers]


def probabilities(row: Sequence[float], temperature: float, top_p: float) -> list[float]:
    """What token_probabilities gives for one row, by Python's numbers."""
    if temperature == 0:
        first = list(row).index(max(row))
        return [float(i == first) for i in range(len(row))]
    found = softmax(row, temperature)
    if top_p == 1:
        return found
    kept: list[int] = []
    for token in sorted(range(len(row)), key=lambda i: (-found[i], i)):
        if math.fsum(found[i] for i in kept) >= top_p:
            break
        kept.append(token)
    total = math.fsum(found[i] for i in kept)
    return [found[i] / total if i in kept else 0.0 for i in range(len(row))]


def generate(subject: Any, target: Model, draft: Model, prompt: Sequence[int], new: int, **options: Any) -> Any:
    """What the learner's speculative_generate returns, if its tokens are a list of integers and its counts numbers."""
    came = subject.speculative_generate(target, draft, prompt, new, **options)
    what = calling(prompt, new, **options)
    for name in ("tokens", "rounds", "proposed", "accepted", "acceptance_rate"):
        assert hasattr(came, name), f"{what}: a {type(came).__name__} came, a Generation was wanted"
    ints(came.tokens, f"{what}.tokens")
    return came


def calling(prompt: Sequence[int], new: int, **options: Any) -> str:
    """A call of speculative_generate in words."""
    told = "".join(f", {name}={value}" for name, value in options.items() if name != "uniform")
    return f"speculative_generate(target, draft, {list(prompt)}, {new}{told})"


def drafts(rng: torch.Generator, target: Story) -> dict[str, Story]:
    """Drafts of a target that agree with it always, sometimes and never."""
    found = {kind: Story(rng) for kind in ("always", "sometimes", "never")}
    with torch.no_grad():
        for draft in found.values():
            draft.table.copy_(target.table)
        found["sometimes"].table[::2] = target.table[::2].roll(1, -1)
        found["never"].table.copy_(target.table.roll(1, -1))
    return found
