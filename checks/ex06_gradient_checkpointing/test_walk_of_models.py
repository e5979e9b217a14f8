"""Walks over models and programs of any shape: which layers are chosen, what is saved and loaded, what is measured."""

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from harness.testing import Aspect, Step, Subject, Walk, walk_check

from .reference import Scale, left_on, measured, same_peak, wrap_layers

NAMES = (
    "layers",
    "layer1",
    "my_layer",
    "norm_layers",
    "layernorm",
    "Layers",
    "encoder",
    "norm",
    "blocks",
    "block_layer",
)


class Blocks(nn.ModuleList):
    """A ModuleList under a name of its own."""


class Chain(nn.Sequential):
    """A Sequential under a name of its own."""


class Leaf(Scale):
    """A parameter, a buffer, and one that is not saved."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.weight.data.fill_(number)
        self.register_buffer("count", torch.tensor(number))
        self.register_buffer("offset", torch.tensor(1.0), persistent=False)


def grown(rng: random.Random, depth: int) -> nn.Module:
    """A module with up to three children, drawn with their names."""
    module = nn.Module() if rng.random() < 0.8 else Leaf(rng.randrange(9))
    for name in rng.sample(NAMES, rng.randint(1, 3)):
        module.register_module(name, child(rng, depth - 1))
    return module


def child(rng: random.Random, depth: int) -> nn.Module | None:
    """A leaf, a list, a module, or nothing."""
    kind = rng.random()
    if kind < 0.05:
        return None
    if depth <= 0 or kind < 0.3:
        return Leaf(rng.randrange(9))
    if kind < 0.6:
        return rng.choice((nn.ModuleList, Blocks))(elements(rng, depth))
    if kind < 0.8:
        parts = elements(rng, depth, lists=False)
        if rng.random() < 0.5:
            return nn.Sequential(OrderedDict(zip(rng.sample(NAMES, len(parts)), parts, strict=True)))
        return rng.choice((nn.Sequential, Chain))(*parts)
    return grown(rng, depth)


def elements(rng: random.Random, depth: int, lists: bool = True) -> list[nn.Module]:
    """What stands in a list; a Sequential holds no ModuleList, which cannot be called."""
    drawn = [child(rng, depth - 1) or Leaf(0) for _ in range(rng.randint(1, 3))]
    return [part if lists or not isinstance(part, nn.ModuleList) else Leaf(1) for part in drawn]


def layer_names(module: nn.Module, pattern: str, prefix: str = "") -> Iterator[str]:
    """The layers of a model in order, as the conventions say."""
    for name, part in module.named_children():
        if pattern not in name or "norm" in name:
            yield from layer_names(part, pattern, f"{prefix}{name}.")
        elif isinstance(part, nn.ModuleList | nn.Sequential):
            yield from element_names(part, f"{prefix}{name}.")
        else:
            yield prefix + name


def element_names(layers: nn.Module, prefix: str) -> Iterator[str]:
    """The elements of a matching list; a ModuleList is looked through."""
    for name, part in layers.named_children():
        if isinstance(part, nn.ModuleList):
            yield from element_names(part, f"{prefix}{name}.")
        else:
            yield prefix + name


def words(*choices: str) -> dict[str, Any]:
    """Choices that are their own words, after the plain one."""
    return {choice: choice for choice in ("", *choices)}


class Selections(Walk):
    """Models of any shape: what is wrapped, and the state_dict afterwards."""

    aspects = (
        Aspect("flags", "6.2", words("some modules in eval")),
        Aspect("n", "6.1", {"": 1, "n = 2": 2, "n = 3": 3, "n = 0": 0, "n = 9": 9}),
        Aspect("pattern", "6.1", {"": "layer", "pattern 'block'": "block", "pattern 'layers'": "layers"}, 0.3),
        Aspect("state", "6.1", words(
            "a state_dict with a prefix",
            "a state_dict with keep_vars",
            "a plain state_dict loaded",
            "a plain state_dict loaded with assign=True",
            "its state_dict loaded into the plain model",
            "a state_dict loaded that lacks a key",
            "a state_dict loaded that has one more",
        ), 0.7),
    )  # fmt: skip
    otherwise = "6.1"

    def begin(self, subject: Subject) -> Subject:
        return subject.again()

    def step(self, state: Subject, step: Step) -> None:
        model, plain = (grown(random.Random(step.seed), 4) for _ in range(2))
        layers = list(layer_names(plain, step["pattern"]))
        if not layers:
            return
        rng = random.Random(step.seed)
        for part in model.modules():
            part.training = not (step["flags"] and rng.random() < 0.4)
        before = dict(model.named_modules())
        flags = {part: part.training for part in before.values()}
        parameters = set(model.parameters())

        selective = wrap_layers(state, model, step["n"], layer_pattern=step["pattern"])

        wanted = layers[:: step["n"]] if step["n"] else []
        what = f"SelectiveCheckpointing({step['n']}), pattern {step['pattern']!r}"
        names = list(selective.checkpointed_modules)
        assert names == wanted, f"{what}, layers {layers}: checkpointed_modules is {names}, not {wanted}"
        for name, part in before.items():
            if not any(f"{name}.".startswith(f"{chosen}.") for chosen in wanted):
                assert model.get_submodule(name) is part, (
                    f"{what}: {name}, no chosen layer, is another module afterwards"
                )
        assert set(model.parameters()) == parameters, f"{what}: the parameters are others afterwards"
        changed = [name for name, part in before.items() if part.training != flags[part]]
        assert not changed, f"{what}: the training flags of {changed} are others afterwards"
        for name in wanted:
            came = model.get_submodule(name).training
            assert came == flags[before[name]], f"{what}: {name}.training is {came}, {flags[before[name]]} was wanted"
        saved_and_loaded(model, plain, step["state"], what)


def saved_and_loaded(model: nn.Module, plain: nn.Module, how: str, what: str) -> None:
    """A wrapped model's state_dict is its plain twin's, saved and loaded."""
    options: dict[str, Any] = {"prefix": "a."} if "prefix" in how else {"keep_vars": True} if "keep" in how else {}
    came, wanted = model.state_dict(**options), plain.state_dict(**options)
    assert list(came) == list(wanted), f"{what}: state_dict({options}) has the keys {list(came)}, not {list(wanted)}"
    for name, value in wanted.items():
        assert type(came[name]) is type(value) and torch.equal(came[name], value), (
            f"{what}: state_dict({options}) has {came[name]!r} as {name}, not {value!r}"
        )
    if "loaded" not in how:
        return
    target, source = (plain, model) if "into the plain" in how else (model, plain)
    state = {name: value + 1 for name, value in source.state_dict().items()}
    if not state:
        return
    last = list(state)[-1]
    if "lacks" in how or "more" in how:
        changed = {name: value for name, value in state.items() if name != last}
        changed |= {f"{last}_": state[last]} | ({last: state[last]} if "more" in how else {})
        with suppress(RuntimeError):
            target.load_state_dict(changed)
            raise AssertionError(f"{what}: load_state_dict accepts {how.removeprefix('a state_dict loaded that ')}")
        return
    given = list(state)
    target.load_state_dict(state, assign="assign" in how)
    assert list(state) == given, f"{what}: load_state_dict changes the keys of the dict that it is given"
    for name, value in target.state_dict().items():
        assert torch.equal(value, state[name]), f"{what}: {name} is {value!r} after loading {state[name]!r}"


SIZE = 2**14  # elements of float32: a sixteenth of a MiB
# In place of `a` or besides it; the sizes of what is new, in sixteenths of a MiB.
OPERATIONS: dict[str, tuple[Callable[[Tensor, Tensor], Any], tuple[float, ...]]] = {
    "new": (lambda a, b: a * 2, (1,)),
    "joined": (lambda a, b: torch.cat([a, b]), (2,)),
    "half": (lambda a, b: a.half().float(), (1,)),
    "strided": (lambda a, b: torch.empty_strided((3, SIZE), (0, 1)), (1,)),
    "made": (lambda a, b: torch.ones(SIZE), (1,)),
    "pair": (lambda a, b: a.view(2, -1).max(0), (0.5, 1)),
    "list": (lambda a, b: torch.unbind_copy(a.view(2, -1)), (0.5, 0.5)),
    "view": (lambda a, b: a.view(-1, 2)[1:].T, ()),
    "in place": (lambda a, b: a.add_(1), ()),
    "out": (lambda a, b: torch.add(a, 1, out=b), ()),
}


class Program:
    """Operations on what came in, on what was there, and on what the program holds; and what it needs at most."""

    def __init__(self, step: Step, there: Tensor) -> None:
        self.rng, self.there = random.Random(step.seed), there
        self.error = step["ends"]("of func itself") if step["ends"] else None
        self.most = self.alive = 0.0

    def __call__(self, given: Tensor, *, more: Tensor) -> list[Tensor]:
        held: list[tuple[float, Any]] = []
        for _ in range(6):
            kind = self.rng.choice(list(OPERATIONS))
            tensors = [given, self.there, more, *(x for _, x in held if isinstance(x, Tensor) and x.numel() == SIZE)]
            run, sizes = OPERATIONS[kind]
            result = run(self.rng.choice(tensors), self.rng.choice(tensors))
            self.alive += sum(sizes)
            # a.half() lives beside its float32 copy, for as long as that is made.
            self.most = max(self.most, self.alive + (0.5 if kind == "half" else 0))
            if sizes:
                held.append((sum(sizes), result))
            del result, tensors
            if held and self.rng.random() < 0.4:
                self.alive -= held.pop(self.rng.randrange(len(held)))[0]
        if self.error is not None:
            raise self.error
        return [result for _, result in held]


class Measurements(Walk):
    """Programs of any operations: the peak of each is its own."""

    aspects = (
        Aspect("ends", "6.5", {"": None, **{
            f"a func that raises {kind.__name__}": kind
            for kind in (LookupError, RuntimeError, torch.OutOfMemoryError, ValueError)
        }}, 0.3),
        Aspect("mode", "6.5", {
            "": nullcontext, "under no_grad": torch.no_grad, "under inference_mode": torch.inference_mode,
        }),
        Aspect("earlier", "6.5", words("after a measurement whose result lives", "after one of a func that raised")),
    )  # fmt: skip
    otherwise = "6.5"

    def begin(self, subject: Subject) -> Subject:
        return subject.again()

    def step(self, state: Subject, step: Step) -> None:
        given, there, more = (torch.ones(SIZE) for _ in range(3))
        if "raised" in step["earlier"]:
            with suppress(ZeroDivisionError):
                state.measure_memory_usage(lambda: torch.ones(SIZE) * (1 / 0))
        elif step["earlier"]:
            given, _ = measured(state, torch.mul, given, 2)
        program = Program(step, there)
        error: Exception | None = None
        peak = 0.0
        with step["mode"]():
            try:
                _, peak = measured(state, program, given, more=more)
            except Exception as raised:
                if program.error is None:
                    raise
                error = raised
        what = "measure_memory_usage(a program of six operations)"
        assert error is program.error, f"{what}: an error of func does not come through unchanged: {error!r} came"
        assert not (left := left_on()), f"{what}: {left} is still on afterwards"
        if error is None:
            same_peak(peak, program.most / 16, what)


test_selections_on_models_of_any_shape = walk_check(Selections(), 10)
test_measurements_of_any_program = walk_check(Measurements(), 10)
