"""The specification of ex06, gradient checkpointing, as checks."""

import gc
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import pytest
import torch
import torch.utils.checkpoint as prebuilt
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import _pop_mode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from harness.testing import (
    Close,
    OwnTest,
    Prebuilt,
    Subject,
    Trace,
    calls,
    forbid,
    halfway,
    is_tensor,
    own_test_checks,
    refuses,
    requirement,
    seed,
    style_checks,
)

B, L, D, V = 3, 5, 6, 11
OWN_TEST = OwnTest(
    __file__,
    "test_gradient_checkpointing",
    swaps=("checkpoint", "CheckpointWrapper", "SelectiveCheckpointing", "measure_memory_usage", "train_step"),
    right=("answer", "autograd_function", "functional_call", "shared_dictionaries"),
)
CHECKPOINT = Prebuilt(
    operators=(),
    functions=(
        inspect.unwrap(prebuilt.checkpoint),
        prebuilt.checkpoint_sequential,
        prebuilt.CheckpointFunction.forward,
        prebuilt.CheckpointFunction.backward,
        prebuilt._checkpoint_without_reentrant_generator,
        prebuilt._CheckpointFrame.__init__,
        prebuilt.detach_variable,
        prebuilt.get_device_states,
        prebuilt.set_device_states,
    ),
    means="an autograd.Function or saved-tensor hooks",
)
NOTHING_TWICE = "a wrapped module is entered once in a training step: nothing is computed a second time"


class Map(nn.Linear):
    """A linear map, initialised fast."""

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.normal_(0, 0.4)
            self.bias.normal_(0, 0.4)


class Block(nn.Module):
    """x + a small network with dropout. Entries are counted at `up`, which every way of calling a block reaches."""

    def __init__(self, p: float = 0.0, hidden: int = 7) -> None:
        super().__init__()
        self.up = Map(D, hidden)
        self.down = Map(hidden, D)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(x))
        return x + self.down(functional.dropout(hidden, self.p, self.training) if self.p else hidden)


class Scale(nn.Module):
    """A number to multiply by."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Unit(nn.Module):
    """A layer that costs next to nothing to build."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Scale()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.up(x))


class Stack(nn.Module):
    """A model over blocks, in a ModuleList `layers`."""

    def __init__(self, number: int, p: float = 0.0, hidden: int = 7) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.layers = nn.ModuleList(Block(p, hidden) for _ in range(number))
        self.dropout = nn.Dropout(p)
        self.head = Map(D, V)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.dropout(x))


class Row(nn.Module):
    """Layers one after the other."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def seeded(build: Callable[[], Any], dtype: torch.dtype = torch.float64) -> Any:
    """A module in `dtype` with weights from a fixed seed."""
    seed(1)
    torch.set_default_dtype(dtype)
    try:
        return build()
    finally:
        torch.set_default_dtype(torch.float32)


def ups(module: nn.Module) -> list[nn.Module]:
    """Where the entries of the blocks inside `module` are counted."""
    return [part.up for part in module.modules() if isinstance(part, Block | Unit)]


def tokens(rng: torch.Generator) -> Tensor:
    """Input ids."""
    return torch.randint(V, (B, L), generator=rng)


def wrap_layers(subject: Subject, model: nn.Module, n: int = 1, **options: str) -> Any:
    """Wraps every n-th layer of `model`; returns what did it."""
    selective = subject.SelectiveCheckpointing(n)
    selective.apply_checkpointing(model, **options)
    return selective


def gradients(model: nn.Module, plain: nn.Module, before: dict[str, nn.Parameter]) -> dict[str, Tensor | None]:
    """A wrapped model's gradients by the plain model's names: by its state_dict, or `before` if its keys differ."""
    state = model.state_dict()
    if set(state) != set(plain.state_dict()):
        return {name: parameter.grad for name, parameter in before.items()}
    grads = {parameter.data_ptr(): parameter.grad for parameter in model.parameters()}
    return {name: grads.get(value.data_ptr()) for name, value in state.items()}


class Pair:
    """A plain model, and its twin whose every n-th layer is wrapped: the same steps for both, and the comparison."""

    def __init__(
        self, subject: Subject, build: Callable[[], Any], n: int = 1, dtype: torch.dtype = torch.float64
    ) -> None:
        self.plain, self.wrapped = seeded(build, dtype), seeded(build, dtype)
        self.ups = ups(self.wrapped)
        self.before = dict(self.wrapped.named_parameters())
        wrap_layers(subject, self.wrapped, n)
        self.streams: list[Tensor] = []

    def step(self, run: Callable[[Any], None]) -> None:
        """Runs a step on both, from the same seed, and notes where the random stream is then."""
        self.streams.clear()
        for model in (self.plain, self.wrapped):
            seed(5)
            with calls(*self.ups) as entered:
                run(model)
            self.streams.append(torch.get_rng_state())
        assert max(entered.values()) > 1, f"training step: {NOTHING_TWICE}"

    def agree(self, close: Close, what: str, hint: str = "") -> None:
        """Every parameter of the wrapped model has the plain model's gradient."""
        came = gradients(self.wrapped, self.plain, self.before)
        for name, parameter in self.plain.named_parameters():
            same_gradient(close, came[name], parameter.grad, f"{what}: gradient of {name}", hint)


def same_gradient(
    close: Close, came: Any, wanted: Tensor | None, what: str, hint: str = "", tolerance: float | None = None
) -> None:
    """The gradient is the wanted one; where none is wanted, zeros are as good."""
    if wanted is None:
        assert came is None or not came.any(), f"{what}: one came, none was wanted\n{hint}"
        return
    assert came is not None, (
        f"{what}: none came\n{hint or 'autograd.grad on the inputs alone leaves the parameters without'}"
    )
    close(came, wanted, what, tolerance=tolerance, hint=hint)


# 6.1 selection


CHOSEN = {1: [0, 1, 2, 3, 4], 2: [0, 2, 4], 3: [0, 3], 4: [0, 4], 9: [0], 0: []}


@requirement("6.1")
def test_every_nth_layer_is_wrapped(subject: Subject, rng: torch.Generator) -> None:
    """The layers number 0, n, 2n … are named, and they alone are computed twice."""
    for n, numbers in CHOSEN.items():
        model = seeded(lambda: Row(*units(5)))
        layers = ups(model)

        selective = wrap_layers(subject, model, n)

        what = f"SelectiveCheckpointing({n}) on 5 layers"
        names = [f"layers.{number}" for number in numbers]
        assert list(selective.checkpointed_modules) == names, (
            f"{what}: checkpointed_modules is {selective.checkpointed_modules}, not {names}"
        )
        with calls(*layers) as entered:
            model(torch.randn(2, D, generator=rng, dtype=torch.float64).requires_grad_()).sum().backward()
        twice = [number for number, up in enumerate(layers) if entered[up] > 1]
        assert twice == numbers, f"{what}: layers {twice} are computed twice in a step; {numbers} were wanted"
        assert all(entered[up] for up in layers), f"{what}: a layer is not entered at all"


@requirement("6.1")
def test_selections_are_independent(subject: Subject) -> None:
    """Each object keeps its own n, 2 if none is given, and its own names, none at first."""
    models = [seeded(lambda: tree(layers=units(11))) for _ in range(2)]
    selections = [subject.SelectiveCheckpointing(), subject.SelectiveCheckpointing(checkpoint_every_n_layers=1)]
    wanted = [[f"layers.{number}" for number in range(0, 11, n)] for n in (2, 1)]

    before = [list(selective.checkpointed_modules) for selective in selections]
    for selective, model in zip(selections, models, strict=True):
        selective.apply_checkpointing(model, layer_pattern="layer")

    what = "SelectiveCheckpointing() and SelectiveCheckpointing(checkpoint_every_n_layers=1)"
    assert before == [[], []], f"{what}: checkpointed_modules is {before} at first"
    names = [list(selective.checkpointed_modules) for selective in selections]
    assert names == wanted, f"{what}, 11 layers each: checkpointed_modules is {names}, not {wanted}"


class Blocks(nn.ModuleList):
    """A ModuleList under a name of its own."""


def units(number: int) -> nn.ModuleList:
    """A list of layers."""
    return nn.ModuleList(Unit() for _ in range(number))


def tree(**children: nn.Module) -> Any:
    """A module with these children."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


class Outer(nn.Module):
    """A layer that holds what would be layers elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.sublayer, self.layers = Unit(), units(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](self.sublayer(x)))


# By name: the model, the pattern, the layers in order, and what is no layer.
Zoo = tuple[Callable[[], nn.Module], str, list[str], list[str]]
ZOO: dict[str, Zoo] = {
    "list": (lambda: tree(head=Unit(), layers=units(2)), "layer", ["layers.0", "layers.1"], ["head"]),
    "single modules": (
        lambda: tree(layer1=Unit(), tail=Unit(), my_layer2=Unit(), Layers=units(1)),
        "layer", ["layer1", "my_layer2"], ["tail", "Layers.0"],
    ),
    "in another module": (
        lambda: tree(
            encoder=tree(layers=Blocks(units(3))), decoder=tree(last=Unit(), a=tree(b=tree(layers_=units(2))))
        ),
        "layer",
        ["encoder.layers.0", "encoder.layers.1", "encoder.layers.2", "decoder.a.b.layers_.0", "decoder.a.b.layers_.1"],
        ["decoder.last"],
    ),
    "another pattern": (
        lambda: tree(layers=units(2), blocks=units(2), last_block=Unit()),
        "block", ["blocks.0", "blocks.1", "last_block"], ["layers.0", "layers.1"],
    ),
    "norms": (
        lambda: tree(layer_norm=Unit(), layers=units(2), norm_layers=units(2), layernorm=Unit()),
        "layer", ["layers.0", "layers.1"], ["layer_norm", "norm_layers.0", "norm_layers.1", "layernorm"],
    ),
    "inside a norm": (
        lambda: tree(layer_norm=tree(layers=units(1), scale=Unit()), layer=Unit()),
        "layer", ["layer_norm.layers.0", "layer"], ["layer_norm.scale"],
    ),
    "sequential": (
        lambda: tree(layers=nn.Sequential(Unit(), Unit()), body=nn.Sequential(Unit())),
        "layer", ["layers.0", "layers.1"], ["body"],
    ),
    "named elements": (
        lambda: tree(layers=nn.Sequential(OrderedDict(up=Unit(), norm=Unit(), down=Unit()))),
        "layer", ["layers.up", "layers.norm", "layers.down"], [],
    ),
    "list of lists": (
        lambda: tree(layers=nn.ModuleList([units(2), Unit(), nn.ModuleList([units(1)])])),
        "layer", ["layers.0.0", "layers.0.1", "layers.1", "layers.2.0.0"], [],
    ),
    "list of sequentials": (
        lambda: tree(layers=nn.ModuleList([nn.Sequential(Unit(), Unit()), nn.Sequential(Unit())])),
        "layer", ["layers.0", "layers.1"], [],
    ),
    "sequential of sequentials": (
        lambda: tree(layers=nn.Sequential(nn.Sequential(Unit(), Unit()), Unit())),
        "layer", ["layers.0", "layers.1"], [],
    ),
    "layers inside a layer": (
        lambda: tree(layers=nn.ModuleList([Outer(), Outer()]), top_layer=Outer()),
        "layer", ["layers.0", "layers.1", "top_layer"], [],
    ),
    "lists inside a list that does not match": (
        lambda: tree(stages=nn.ModuleList([tree(layers=units(2), out=Unit()), tree(layer=Unit())])),
        "layer", ["stages.0.layers.0", "stages.0.layers.1", "stages.1.layer"], ["stages.0.out"],
    ),
}  # fmt: skip


@requirement("6.1")
@pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.replace(" ", "-"))
def test_layers_are_found_by_name(subject: Subject, rng: torch.Generator, kind: str) -> None:
    """Wrapped is what the conventions call a layer, counted over the whole model, and nothing else."""
    build, pattern, layers, others = ZOO[kind]
    for n in (1, 2):
        model = seeded(build)
        inside = {name: ups(model.get_submodule(name)) for name in (*layers, *others)}

        selective = wrap_layers(subject, model, n, **({} if pattern == "layer" else {"layer_pattern": pattern}))

        wanted = layers[::n]
        what = f"SelectiveCheckpointing({n}), pattern {pattern!r}, layers {layers}"
        names = list(selective.checkpointed_modules)
        assert names == wanted, f"{what}: checkpointed_modules is {names}, not {wanted}"
        if n == 1:
            twice = computed_twice(model, inside, rng)
            assert twice == wanted, f"{what}: {twice} are computed twice in a step; {wanted} were wanted"


def computed_twice(model: nn.Module, inside: dict[str, list[nn.Module]], rng: torch.Generator) -> list[str]:
    """The names of those modules that a training step over all of them enters more than once, as a whole."""
    x = torch.randn(1, D, generator=rng, dtype=torch.float64).requires_grad_()
    with calls(*(up for entries in inside.values() for up in entries)) as entered:
        torch.stack([model.get_submodule(name)(x).sum() for name in inside]).sum().backward()
    return [name for name, entries in inside.items() if min(entered[up] for up in entries) > 1]


@requirement("6.1")
def test_lists_stay_lists(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Length, index, slice, iteration and a call work on the lists as before."""
    x = torch.randn(2, D, generator=rng, dtype=torch.float64)
    model = seeded(
        lambda: tree(layers=units(3), more_layers=nn.Sequential(Unit(), Unit()), deep_layers=nn.ModuleList([units(2)]))
    )
    expected = model.more_layers(model.layers[2](x)).detach()

    names = list(wrap_layers(subject, model).checkpointed_modules)

    assert len(names) == 7, f"apply_checkpointing: checkpointed_modules is {names}; the model has 7 layers"
    for name, kind in {"layers": nn.ModuleList, "more_layers": nn.Sequential, "deep_layers.0": nn.ModuleList}.items():
        came = type(model.get_submodule(name))
        assert came is kind, (
            f"apply_checkpointing: {name} is a {came.__name__} afterwards; wrap its elements, not the list"
        )
    lengths = [len(model.layers), len(model.layers[1:]), len(list(model.more_layers)), len(model.deep_layers[0])]
    wanted = [3, 2, 2, 2]
    assert lengths == wanted, f"apply_checkpointing: the lists have lengths {lengths}, {wanted} were wanted"
    close(model.more_layers(model.layers[-1](x)), expected, "more_layers(layers[-1](x)) after apply_checkpointing")


class Awkward(nn.Module):
    """A layer with a buffer, and with children whose names a wrapper may use for itself."""

    module: nn.Module
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.register_buffer("offset", torch.arange(float(D)))
        for name in ("module", "_module", "wrapped", "layer", "inner", "block"):
            self.add_module(name, nn.PReLU())
        self.module.add_module("module", nn.PReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x * self.weight + self.offset)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "list": lambda: Stack(3),
    "nested": lambda: tree(encoder=tree(layers=nn.ModuleList([units(2), Unit()])), layer=nn.Sequential(Unit())),
    "awkward": lambda: tree(layers=nn.ModuleList([Awkward(), Awkward()]), layer_x=Awkward()),
}


@requirement("6.1")
@pytest.mark.parametrize("kind", MODELS)
def test_keys_and_values_are_unchanged(subject: Subject, close: Close, kind: str) -> None:
    """The state_dict of a wrapped model has the plain model's keys and values, and its parameters are the same."""
    for n in (1, 2):
        model = seeded(MODELS[kind])
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        parameters = {id(parameter) for parameter in model.parameters()}

        names = list(wrap_layers(subject, model, n).checkpointed_modules)
        state = model.state_dict()

        assert names, "apply_checkpointing: no layer is wrapped, so that this proves nothing"
        same_keys(state, expected, "state_dict of a wrapped model")
        for name, value in expected.items():
            close(state[name], value, f"state_dict of a wrapped model: {name}", tolerance=0)
        assert {id(parameter) for parameter in model.parameters()} == parameters, (
            "apply_checkpointing: the parameters are new objects; an optimizer made before would train the old ones"
        )


def same_keys(came: Any, wanted: Any, what: str) -> None:
    """Two state_dicts have the same keys."""
    extra, missing = sorted(set(came) - set(wanted))[:3], sorted(set(wanted) - set(came))[:3]
    hint = "rename in a state_dict post hook and a load_state_dict pre hook, by prefix, all keys at once"
    assert not extra, f"{what}: keys {extra} came, which the plain model lacks\n{hint}"
    assert not missing, f"{what}: the plain model's keys {missing} are missing\n{hint}"


@requirement("6.1")
@pytest.mark.parametrize("kind", MODELS)
def test_checkpoints_load_strictly_both_ways(subject: Subject, close: Close, kind: str) -> None:
    """A plain checkpoint loads into a wrapped model, and back, strictly, and its values arrive."""
    plain, wrapped = seeded(MODELS[kind]), seeded(MODELS[kind])
    names = list(wrap_layers(subject, wrapped).checkpointed_modules)
    assert names, "apply_checkpointing: no layer is wrapped, so that this proves nothing"
    for into, source, target in (("wrapped", plain, wrapped), ("plain", wrapped, plain)):
        with torch.no_grad():
            for number, value in enumerate(source.state_dict().values()):
                value.add_(number + 1)
        expected = {name: value.clone() for name, value in source.state_dict().items()}

        loads(target, source.state_dict(), f"load_state_dict into the {into} model")

        same_keys(target.state_dict(), expected, f"state_dict of the {into} model")
        for name, value in target.state_dict().items():
            close(value, expected[name], f"load_state_dict into the {into} model: {name} afterwards", tolerance=0)


def loads(target: nn.Module, state: dict[str, Any], what: str) -> None:
    """A state_dict loads strictly."""
    try:
        target.load_state_dict(state)
    except RuntimeError as error:
        raise AssertionError(
            f"{what} fails: {' '.join(str(error).split())[:200]}\nthe keys do not change by wrapping"
        ) from error


@requirement("6.1")
def test_strict_loading_stays_strict(subject: Subject) -> None:
    """A checkpoint that lacks a wrapped layer's key, or has one more, is refused as ever."""
    model = seeded(lambda: Stack(2))
    state = dict(model.state_dict())
    wrap_layers(subject, model)
    loads(model, state, "load_state_dict into a wrapped model")
    lacking = {key: value for key, value in state.items() if key != "layers.1.up.weight"}
    for change, other in (("missing", lacking), ("unexpected", {**state, "layers.1.up.extra": torch.zeros(1)})):
        what = f"load_state_dict into a wrapped model, with a key {change}"
        refuses(RuntimeError, partial(model.load_state_dict, other), what, "up.")


@requirement("6.1")
def test_a_wrapper_alone_keeps_keys(subject: Subject, close: Close) -> None:
    """A wrapper outside any model, and a wrapper of a wrapper, have their module's keys, and load them."""
    layers = seeded(lambda: nn.Sequential(Block(), Block()))
    cases = {
        "CheckpointWrapper(module)": (seeded(Awkward).state_dict(), subject.CheckpointWrapper(seeded(Awkward))),
        "a wrapper of wrappers": (layers.state_dict(), nested_wrapper(subject, *layers)),
    }
    for what, (expected, wrapper) in cases.items():
        state = {name: value.clone() for name, value in wrapper.state_dict().items()}
        same_keys(state, expected, f"{what}: state_dict")

        loads(wrapper, {name: value + 1 for name, value in state.items()}, f"{what}: load_state_dict")

        for name, value in wrapper.state_dict().items():
            close(value, state[name] + 1, f"{what}: {name} after loading", tolerance=0)


def nested_wrapper(subject: Subject, *layers: nn.Module) -> Any:
    """A wrapper of a wrapper around wrapped layers in a row."""
    inner = nn.Sequential(*(subject.CheckpointWrapper(layer) for layer in layers))
    return subject.CheckpointWrapper(subject.CheckpointWrapper(inner))


# 6.2 memory against computation


@requirement("6.2")
def test_chosen_layers_are_entered_exactly_twice(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A training step enters each chosen layer twice, every other module once."""
    for n, wanted in ((1, [2, 2, 2, 2]), (3, [2, 1, 1, 2])):
        model, plain = seeded(lambda: Stack(4)), seeded(lambda: Stack(4))
        layers, input_ids = ups(model), tokens(rng)
        wrap_layers(subject, model, n)

        with calls(*layers, model.embedding, model.head) as entered:
            output = model(input_ids)
            output.square().sum().backward()

        close(output, plain(input_ids), "forward of a wrapped model")
        counts = [entered[up] for up in layers]
        assert counts == wanted, f"training step, n = {n}: the layers are entered {counts} times; {wanted} were wanted"
        around = [entered[model.embedding], entered[model.head]]
        assert around == [1, 1], (
            f"training step, n = {n}: embedding and head are entered {around} times; recompute chosen layers only"
        )


def alive_after_forward(model: nn.Module, x: Tensor) -> tuple[int, Tensor]:
    """Bytes that only the output keeps alive after forward, without what is smaller than the input: random states."""
    with Trace(at_least=x.numel()) as seen:
        output = model(x)
    return seen.alive_bytes, output


@requirement("6.2")
def test_less_is_alive_the_more_layers_are_chosen(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """From none over every 4th and every 2nd to every layer, what is alive after forward falls."""
    x = torch.randn(200, D, generator=rng, dtype=torch.float64).requires_grad_()
    alive: dict[int, int] = {}
    expected: Tensor | None = None
    for n in (0, 4, 2, 1):
        model = seeded(lambda: Row(*units(8)))
        expected = model(x) if expected is None else expected
        wrap_layers(subject, model, n)
        alive[n], output = alive_after_forward(model, x)
        close(output, expected, f"forward of 8 layers, n = {n}")

    assert alive[0] > alive[4] > alive[2] > alive[1], (
        f"forward of 8 layers, bytes alive afterwards by n (0: none): {alive}\n"
        "the more layers are chosen, the less is alive"
    )


@requirement("6.2")
def test_every_encoder_layer_leaves_less_than_a_quarter(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """With every one of 8 encoder layers chosen, less than 0.25 of what none leaves is alive after forward."""

    def build() -> Any:
        return Row(*(nn.TransformerEncoderLayer(20, 2, 50, dropout=0.0, batch_first=True) for _ in range(8)))

    x = torch.randn(3, 23, 20, generator=rng, dtype=torch.float64).requires_grad_()
    model = seeded(build)
    none, expected = alive_after_forward(model, x)
    wrap_layers(subject, model)

    every, output = alive_after_forward(model, x)

    close(output, expected, "forward of 8 encoder layers")
    assert output.requires_grad, "forward of 8 encoder layers: the output carries no gradient"
    assert every < 0.25 * none, (
        f"forward of 8 encoder layers: {every} bytes stay alive, {every / none:.2f} of what plain layers leave; "
        "less than 0.25 is asked for\nsomething holds the activations: a closure, a context, a list"
    )


@requirement("6.2")
def test_nothing_is_computed_twice_without_need(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Where nothing is to be recomputed, a wrapped block gives the plain output and is entered once."""
    x = torch.randn(2, D, generator=rng, dtype=torch.float64).requires_grad_()
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    for case in ("eval", "no_grad", "inference_mode", "use_checkpoint=False", "module in eval"):
        plain, block = (seeded(lambda: Block(p=0.5)) for _ in range(2))
        plain.train(case not in ("eval", "module in eval"))
        block.train(case != "module in eval")
        wrapper = subject.CheckpointWrapper(block, use_checkpoint=case != "use_checkpoint=False")
        if case == "eval":
            wrapper.train().eval()

        with modes.get(case, nullcontext)(), calls(block.up) as entered:
            seed(3)
            output = is_tensor(wrapper(x), f"forward of a wrapper, {case}")
            if output.requires_grad:
                output.sum().backward()

        seed(3)
        with modes.get(case, nullcontext)():
            close(output, plain(x), f"forward of a wrapper, {case}")
        assert output.requires_grad == (case not in modes), (
            f"forward of a wrapper, {case}: requires_grad is {output.requires_grad}"
        )
        assert entered[block.up] == 1, (
            f"forward and backward of a wrapper, {case}: its module is entered {entered[block.up]} times, not once"
        )
    recomputes(subject, x)


def recomputes(subject: Subject, x: Tensor) -> None:
    """In training, with gradients, the same wrapper does compute twice."""
    block = seeded(Block)
    with calls(block.up) as entered:
        subject.CheckpointWrapper(block)(x).sum().backward()
    assert entered[block.up] > 1, f"training step of a wrapper: {NOTHING_TWICE}"


@requirement("6.2")
def test_the_mode_may_change_after_wrapping(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """train() and eval() on a wrapped model reach the wrapped layers, also their dropout."""
    input_ids = tokens(rng)
    model, plain = seeded(lambda: Stack(2, p=0.5)), seeded(lambda: Stack(2, p=0.5)).eval()
    layers = ups(model)
    wrap_layers(subject, model.eval())

    for training, times in ((False, 1), (True, 2), (False, 1)):
        with calls(*layers) as entered:
            output = model.train(training)(input_ids)
            output.sum().backward()

        mode = "train" if training else "eval"
        counts = [entered[up] for up in layers]
        assert counts == [times] * 2, (
            f"step of a model wrapped in eval, now in {mode}: layers are entered {counts} times, not {times}"
        )
        if not training:
            close(
                output,
                plain(input_ids),
                "forward of a wrapped model in eval",
                hint="eval() must reach the wrapped layer's dropout",
            )


@requirement("6.2")
def test_a_layer_in_eval_stays_in_eval(subject: Subject, rng: torch.Generator) -> None:
    """A wrapper takes over its module's training flag, one by one."""
    model = seeded(lambda: Stack(3))
    layers = ups(model)
    model.layers[1].eval()

    wrap_layers(subject, model)
    with calls(*layers) as entered:
        model(tokens(rng)).sum().backward()

    flags = [layer.training for layer in model.layers]
    assert flags == [True, False, True], (
        f"layer 1 was in eval when it was wrapped; training flags are {flags} afterwards"
    )
    counts = [entered[up] for up in layers]
    assert counts == [2, 1, 2], (
        f"layer 1 was in eval when it was wrapped: layers are entered {counts} times, not [2, 1, 2]"
    )


@requirement("6.2")
def test_checkpoint_itself_recomputes(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """checkpoint(module, x) gives the output and x's gradient, keeps next to nothing, and enters the module twice."""
    x, leaf = (torch.randn(1000, D, generator=rng, dtype=torch.float64).requires_grad_() for _ in range(2))
    leaf.data.copy_(x.data)
    block, plain = seeded(lambda: Block(hidden=40)), seeded(lambda: Block(hidden=40))
    plain(leaf).square().sum().backward()

    with calls(block.up) as entered, Trace(at_least=x.numel()) as seen:
        output = is_tensor(subject.checkpoint(block, x), "checkpoint(module, x)")
        kept = seen.alive_bytes
        output.square().sum().backward()

    same_gradient(close, x.grad, leaf.grad, "checkpoint(module, x): gradient of x")
    assert kept < 8 * 1000 * 40, (
        f"checkpoint(module, x): {kept} bytes stay alive after forward; the output has {8 * 1000 * D}"
    )
    assert entered[block.up] == 2, (
        f"checkpoint(module, x): the module is entered {entered[block.up]} times in a step, not twice"
    )


# 6.3 mixed precision


class Precision(nn.Module):
    """A linear map that notes in which dtype each of its entries multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = Map(D, D)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((x @ x.mT).dtype)
        return torch.tanh(self.linear(x))


STATES = {"off": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


def autocast(state: str) -> Any:
    """Autocast in a state, off too."""
    return torch.autocast("cpu", STATES[state] or torch.bfloat16, enabled=STATES[state] is not None)


def precision_step(module: Any, leaf: Tensor, forward: str, backward: str) -> None:
    """A step with forward and backward under their states."""
    with autocast(forward):
        output = module(leaf)
    with autocast(backward):
        output.float().square().sum().backward()


@requirement("6.3")
@pytest.mark.parametrize("backward", STATES)
def test_the_second_computation_has_the_autocast_state_of_the_first(
    subject: Subject, close: Close, rng: torch.Generator, backward: str
) -> None:
    """Whatever the state of backward, the module multiplies in the same dtype both times, each call in its own."""
    module, plain = seeded(Precision, torch.float32), seeded(Precision, torch.float32)
    wrapper = subject.CheckpointWrapper(module)
    leaves = {state: torch.randn(B, D, generator=rng).requires_grad_() for state in STATES}
    outputs = {}
    for state, x in leaves.items():
        with autocast(state):
            outputs[state] = is_tensor(wrapper(x), f"forward of a wrapper under autocast {state}")

    for forward, x in leaves.items():
        what = f"forward under autocast {forward}, backward under {backward}"
        wanted = STATES[forward] or torch.float32
        module.seen.clear()
        error = backward_under(backward, outputs.pop(forward), what)
        assert module.seen or error, f"{what}: {NOTHING_TWICE}"
        hint = "remember torch.is_autocast_enabled and get_autocast_dtype, and recompute under torch.autocast"
        assert set(module.seen) == {wanted}, (
            f"{what}: the module multiplies in {module.seen} the second time; {wanted} was wanted\n{hint}"
        )
        if error is not None:
            raise error
        leaf = x.detach().requires_grad_()
        precision_step(plain, leaf, forward, backward)
        # Eight bits of bfloat16: the order of a backward product's roundings is free.
        same_gradient(close, x.grad, leaf.grad, f"{what}: gradient of the input", tolerance=3e-2)


def backward_under(state: str, output: Tensor, what: str) -> RuntimeError | None:
    """Runs backward in an autocast state, which has to be the same afterwards; the error with which it ends, if any."""
    error: RuntimeError | None = None
    with autocast(state):
        try:
            output.float().square().sum().backward()
        except RuntimeError as raised:  # a wrong dtype often ends so
            error = raised
        left = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    wanted = STATES[state] is not None, STATES[state] or torch.bfloat16
    assert left == wanted, f"{what}: autocast (on, dtype) is {left} after backward, {wanted} before"
    return error


@requirement("6.3")
def test_a_whole_step_under_autocast(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A step whose backward is inside the same autocast region gives what comes before the layers its gradient."""
    input_ids = tokens(rng)
    for dtype in ("float16", "bfloat16"):
        pair = Pair(subject, lambda: Stack(2), dtype=torch.float32)

        def step(model: Any, state: str = dtype) -> None:
            with autocast(state):
                model(input_ids).float().square().mean().backward()

        pair.step(step)

        came, wanted = pair.wrapped.embedding.weight.grad, pair.plain.embedding.weight.grad
        close(came, wanted, f"step under autocast {dtype}: gradient of the embedding", tolerance=3e-2)


# 6.4 nested modules and structures


class Rich(nn.Module):
    """Takes and gives whatever there is; what it does with it is said by `mode`."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.memory = Map(D, D)

    def forward(self, x: Any, other: Any = None, mode: str = "plain", *, scale: float = 1.0, mask: Any = None) -> Any:
        if mode == "structures":
            first, rest = x
            a, (b, number) = rest["a"], rest["b"]
            mixed = self.block(first * a) + number * self.memory(b[0])
            return {"out": [mixed, (torch.tanh(mixed), None)], "size": 7, "ok": True}
        hidden = self.block(x) * scale
        if other is not None:
            hidden = hidden + torch.sigmoid(self.memory(other))
        if mask is not None:
            hidden = hidden.masked_fill(mask == 0, 0.5) if mask.dtype == torch.bool else hidden + mask.tanh()
        if mode == "outputs":
            return hidden, torch.sin(hidden), hidden.argmax(-1), mask, "text", 3, None
        return [hidden.sum(), {"h": hidden, "x": x}] if mode == "list" else hidden


def agrees_with_plain(
    subject: Subject,
    close: Close,
    args: tuple[Any, ...],
    used: tuple[int, ...] | None = None,
    hint: str = "",
    **kwargs: Any,
) -> None:
    """Outputs and the gradients of inputs and parameters are the plain module's, and something is computed twice."""
    plain, module = seeded(Rich), seeded(Rich)
    expected, leaves = on_leaves(plain, args, kwargs)
    differentiate(expected, used)

    with calls(module.block.up) as entered:
        try:
            outputs, came = on_leaves(subject.CheckpointWrapper(module), args, kwargs)
            same_structure(close, outputs, expected, "forward of a wrapped module")
            differentiate(outputs, used)
        except (AssertionError, NotImplementedError):
            raise
        except Exception as error:
            what = "forward or backward of a wrapped module raises"
            raise AssertionError(f"{what} {type(error).__name__}: {error}\n{hint}") from error

    for number, (leaf, wanted) in enumerate(zip(came, leaves, strict=True)):
        what = f"backward of a wrapped module: gradient of tensor input {number}"
        same_gradient(close, leaf.grad, wanted.grad, what, hint or DEEP)
    for (name, parameter), wanted in zip(module.named_parameters(), plain.parameters(), strict=True):
        same_gradient(close, parameter.grad, wanted.grad, f"backward of a wrapped module: gradient of {name}", hint)
    assert entered[module.block.up] > 1, f"training step: {NOTHING_TWICE}"


DEEP = "every tensor that needs a gradient gets its own, in args and kwargs, however deep"


def on_leaves(module: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor]]:
    """Calls the module on leaves of its own; gives its outputs, and the leaves."""
    leaves: dict[int, Tensor] = {}
    args, kwargs = tree_map_only(Tensor, lambda t: leaves.setdefault(id(t), twin(t)), (args, kwargs))
    return module(*args, **kwargs), list(leaves.values())


def differentiate(outputs: Any, used: tuple[int, ...] | None) -> None:
    """Runs backward from the outputs that carry gradient, or from those of them that are `used`."""
    floats = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    chosen = floats if used is None else [floats[number] for number in used]
    torch.stack([(leaf * (number + 2)).sin().sum() for number, leaf in enumerate(chosen)]).sum().backward()


def twin(tensor: Tensor) -> Tensor:
    """A leaf of its own over the same values, with the same need of a gradient."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def same_structure(close: Close, came: Any, wanted: Any, what: str) -> None:
    """Two nested structures have the same containers, tensors and other values."""
    came_leaves, came_tree = tree_flatten(came)
    leaves, structure = tree_flatten(wanted)
    assert came_tree == structure, f"{what}: the structure {came_tree} came, {structure} was wanted"
    for number, (one, other) in enumerate(zip(came_leaves, leaves, strict=True)):
        if not isinstance(other, Tensor):
            assert type(one) is type(other) and one == other, f"{what}: output {number} is {one!r}, not {other!r}"
            continue
        close(one, other, f"{what}: output {number}")
        assert one.requires_grad or not other.requires_grad, f"{what}: output {number} carries no gradient"


def randoms(rng: torch.Generator, number: int, grad: bool = True) -> list[Tensor]:
    """Inputs that all differ."""
    return [torch.randn(B, D, generator=rng, dtype=torch.float64).requires_grad_(grad) for _ in range(number)]


@requirement("6.4")
def test_inputs_without_gradient_still_train_the_parameters(
    subject: Subject, close: Close, rng: torch.Generator
) -> None:
    """Data needs no gradient; the parameters behind it do."""
    hint = "no input needs a gradient here, as with data or token ids; the parameters do"
    agrees_with_plain(subject, close, tuple(randoms(rng, 1, grad=False)), hint=hint)


@requirement("6.4")
def test_token_ids_train_an_embedding(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A wrapped module may begin with integers."""
    input_ids = tokens(rng)
    plain, module = (seeded(lambda: nn.Sequential(nn.Embedding(V, D), Block())) for _ in range(2))
    plain(input_ids).square().sum().backward()

    subject.CheckpointWrapper(module)(input_ids).square().sum().backward()

    for (name, parameter), wanted in zip(module.named_parameters(), plain.parameters(), strict=True):
        same_gradient(close, parameter.grad, wanted.grad, f"backward of a wrapper on token ids: gradient of {name}")
    recomputes(subject, torch.randn(2, D, generator=rng, dtype=torch.float64))


@requirement("6.4")
def test_each_input_that_needs_a_gradient_gets_it(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Inputs with and without gradient may be mixed."""
    for needs in ((True, True), (True, False), (False, True)):
        x, other = (tensor.detach().requires_grad_(need) for tensor, need in zip(randoms(rng, 2), needs, strict=True))

        agrees_with_plain(subject, close, (x, other))


@requirement("6.4")
def test_keyword_arguments(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Keyword arguments reach both computations: numbers, and tensors with their gradients, however deep."""
    x, other, a = randoms(rng, 3)
    hint = "scale=3.0 and other=… are keyword arguments here"

    agrees_with_plain(subject, close, (x,), hint=hint, scale=3.0)
    agrees_with_plain(subject, close, (x,), hint=hint, other=other, scale=-2.0)
    hint = "all arguments are keyword arguments here"
    agrees_with_plain(subject, close, (), hint=hint, mode="structures", x=(x, {"a": a, "b": ([other], 3)}))


@requirement("6.4")
def test_masks(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Boolean and float masks work as keyword arguments, also one that needs a gradient."""
    x, values = randoms(rng, 2)

    for kind, mask in {"bool": values > 0, "float": values.detach(), "needs a gradient": values}.items():
        agrees_with_plain(subject, close, (x,), hint=f"mask=… is a keyword argument here ({kind})", mask=mask)


@requirement("6.4")
def test_several_outputs_of_any_kind(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Tensors, integers, a mask, text, numbers and None come out as they are, with the gradients of what is used."""
    x, other = randoms(rng, 2)

    for used in ((0, 1), (0,), (1,)):
        agrees_with_plain(subject, close, (x, other, "outputs"), used=used, mask=x.detach() > 0)


@requirement("6.4")
def test_arguments_that_are_no_tensors(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """None and text may stand among the positional arguments; a list, and an input itself, may be among the outputs."""
    agrees_with_plain(subject, close, (randoms(rng, 1)[0], None, "list"))


@requirement("6.4")
def test_nested_structures(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Tensors deep in tuples, lists and dicts get their gradients; outputs deep in them carry gradient."""
    for grad in (True, False):
        x, a, b, unused = randoms(rng, 4, grad)

        agrees_with_plain(subject, close, ((x, {"a": a, "b": ([b], 3)}), unused, "structures"))


@requirement("6.4")
def test_one_tensor_several_times(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A tensor that comes twice gets the sum of both gradients."""
    x, a = randoms(rng, 2)

    agrees_with_plain(subject, close, (x, x), hint="one tensor is both arguments here")
    agrees_with_plain(
        subject, close, ((x, {"a": a, "b": ([x], 3)}),), mode="structures", hint="one tensor comes twice here"
    )


@halfway
@requirement("6.4")
def test_one_tensor_is_one_tensor_the_second_time_too(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Self-attention, attention(x, x, x), takes a shorter way if its key is its query: both times, or not at all."""
    x = torch.randn(L, 2, D, generator=rng, dtype=torch.float64).requires_grad_()
    leaf = twin(x)
    plain, attention = (seeded(lambda: nn.MultiheadAttention(D, 2)) for _ in range(2))
    expected = plain(x, x, x)[0]
    expected.square().sum().backward()
    what = "backward of a wrapped attention(x, x, x)"
    hint = "one tensor given three times has to be one tensor in the second computation: key is query"

    output = subject.CheckpointWrapper(attention)(leaf, leaf, leaf)[0]
    try:
        output.square().sum().backward()
    except RuntimeError as error:
        raise AssertionError(f"{what} raises {error}\n{hint}") from error

    close(output, expected, "forward of a wrapped attention(x, x, x)")
    for name, came, wanted in zip(
        ("x", *dict(plain.named_parameters())),
        (leaf, *attention.parameters()),
        (x, *plain.parameters()),
        strict=True,
    ):
        same_gradient(close, came.grad, wanted.grad, f"{what}: gradient of {name}", hint)
    recomputes(subject, torch.randn(2, D, generator=rng, dtype=torch.float64))


@requirement("6.4")
def test_strided_inputs(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Transposed and expanded inputs are as good as others."""
    x = torch.randn(D, B, generator=rng, dtype=torch.float64).T.requires_grad_()
    other = torch.randn(1, D, generator=rng, dtype=torch.float64).expand(B, D)

    agrees_with_plain(subject, close, (x, other))


@requirement("6.4")
def test_inputs_are_not_written_to(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Inputs keep their values and their need of a gradient."""
    x, other = randoms(rng, 2)
    other = other.detach()
    kept = [x.detach().clone(), other.clone()]
    module = seeded(Rich)

    with calls(module.block.up) as entered:
        subject.CheckpointWrapper(module)(x, other=other).sum().backward()

    close(x.detach(), kept[0], "x after a step", tolerance=0)
    close(other, kept[1], "other after a step", tolerance=0)
    assert not other.requires_grad and other.grad is None, "an input that needed no gradient requires one after a step"
    assert x.is_leaf and x.grad is not None, "backward of a wrapped module: x gets no gradient"
    assert entered[module.block.up] > 1, f"training step: {NOTHING_TWICE}"


@requirement("6.4")
def test_an_encoder_layer_with_a_mask(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """PyTorch's own encoder layer keeps its masks in the second computation."""

    def build() -> Any:
        return nn.TransformerEncoderLayer(D, 2, 7, dropout=0.0, batch_first=True)

    plain, module = seeded(build), seeded(build)
    wrapper = subject.CheckpointWrapper(module)
    x = torch.randn(B, L, D, generator=rng, dtype=torch.float64)
    masks = {
        "src_mask": torch.ones(L, L).triu(1).bool(),
        "src_key_padding_mask": torch.arange(L).expand(B, L) >= 3,
    }
    for name, mask in masks.items():
        plain.zero_grad()
        module.zero_grad()
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        expected = plain(leaves[0], **{name: mask})
        expected.square().sum().backward()

        with calls(module.linear1) as entered:
            output = wrapper(leaves[1], **{name: mask})
            output.square().sum().backward()

        hint = f"{name} must reach the second computation too"
        close(output, expected, f"forward of a wrapped encoder layer with {name}", hint=hint)
        what = f"backward of a wrapped encoder layer with {name}"
        same_gradient(close, leaves[1].grad, leaves[0].grad, f"{what}: gradient of x", hint)
        for (part, parameter), wanted in zip(module.named_parameters(), plain.parameters(), strict=True):
            same_gradient(close, parameter.grad, wanted.grad, f"{what}: gradient of {part}", hint)
        assert entered[module.linear1] > 1, f"training step: {NOTHING_TWICE}"


@requirement("6.4")
def test_wrapped_inside_wrapped(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A wrapper around wrapped blocks trains as the plain blocks do."""
    for grad in (True, False):
        x = randoms(rng, 1)[0].detach()
        plain, layers = (seeded(lambda: nn.Sequential(Block(), Block())) for _ in range(2))
        leaves = [x.clone().requires_grad_(grad) for _ in range(2)]
        expected = plain(leaves[0])
        expected.square().sum().backward()

        with calls(*ups(layers)) as entered:
            output = nested_wrapper(subject, *layers)(leaves[1])
            output.square().sum().backward()

        what = "backward of wrapped blocks inside a wrapper"
        close(output, expected, "forward of wrapped blocks inside a wrapper")
        same_gradient(close, leaves[1].grad, leaves[0].grad, f"{what}: gradient of x")
        for (name, parameter), wanted in zip(layers.named_parameters(), plain.parameters(), strict=True):
            same_gradient(close, parameter.grad, wanted.grad, f"{what}: gradient of {name}")
        assert len(entered) == 2 and min(entered.values()) > 1, f"training step: {NOTHING_TWICE}"


class Halves(nn.Module):
    """Two outputs, the second computed from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.first(x))
        return hidden.sin(), torch.tanh(self.second(hidden)).cos()


@requirement("6.4")
def test_a_backward_from_each_output(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """backward twice from one output with retain_graph, then from the other, adds up to the plain gradients."""
    x = randoms(rng, 1)[0]

    for order in ((1, 1, 0), (0, 0, 1)):
        pair = Pair(subject, lambda: tree(layers=nn.ModuleList([Halves()])))

        def step(model: Any, chosen: tuple[int, ...] = order) -> None:
            outputs = model.layers[0](x)
            for number in chosen:
                outputs[number].square().sum().backward(retain_graph=True)

        pair.step(step)

        pair.agree(close, f"backward from outputs {order}, one after the other", "each backward needs a part only")


class Constant(nn.Module):
    """A parameter alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.up = Scale()

    def forward(self, power: int) -> Tensor:
        return self.up(self.weight).sin() ** power


@requirement("6.4")
def test_no_tensor_among_the_arguments(subject: Subject, close: Close) -> None:
    """A module that is called without any tensor trains its parameters too."""
    plain, module = seeded(Constant), seeded(Constant)
    expected = plain(3)
    expected.sum().backward()

    with calls(module.up) as entered:
        output = subject.CheckpointWrapper(module)(3)
        output.sum().backward()

    close(output, expected, "forward of a wrapped module that takes no tensor")
    what = "backward of a wrapped module that takes no tensor: gradient of its parameter"
    same_gradient(close, module.weight.grad, plain.weight.grad, what)
    assert entered[module.up] > 1, f"training step: {NOTHING_TWICE}"


# 6.5 memory measurement

MIB = 2**18  # elements of a float32 tensor of one MiB
QUARTER = 2**16


def chain(x: Tensor) -> Tensor:
    """x + 1 is gone when the last result is made."""
    y = x + 1
    y = y * 2
    return y - 1


def temporaries(x: Tensor) -> Tensor:
    """One result after the other is dropped."""
    for number in range(6):
        y = x * number
    return y


def held(x: Tensor) -> list[Tensor]:
    """All results are held."""
    return [x * number for number in range(5)]


def forgotten(x: Tensor) -> None:
    """Nothing comes back of what was made."""
    a = x * 1
    b = a * 2
    _ = b * a


def views(x: Tensor) -> Any:
    """One tensor, and views of it."""
    y = (x * 2).view(256, 256)
    return y.t(), y[3:], y.expand(4, 256, 256), y.unbind(), y.detach()


def view_outlives(x: Tensor) -> list[Tensor]:
    """A view of one row keeps all of its storage."""
    return [(x * number).view(256, 256)[0] for number in range(3)]


def in_place(x: Tensor) -> Tensor:
    """One copy, written to again and again."""
    return x.clone().add_(1).mul_(2).relu_()


def dtypes(x: Tensor) -> Any:
    """Two bytes and one byte per element."""
    return x.half(), x.bool()


def products(x: Tensor) -> Tensor:
    """Two products of a square matrix."""
    a = x.view(256, 256)
    return a @ a @ a


def pairs(x: Tensor) -> Any:
    """The larger values of two rows, and which they are, in eight bytes each."""
    return x.view(2, -1).max(0)


def reused(x: Tensor) -> list[Tensor]:
    """What is held takes the place of what was freed."""
    addresses: set[int] = set()
    kept: list[Tensor] = []
    # Which address comes next is the allocator's choice: what did not come to one that was used before is dropped.
    for _ in range(1000):
        y = x * 2
        if y.data_ptr() in addresses:
            kept.append(y)
        addresses.add(y.data_ptr())
        del y
        if len(kept) == 5:
            break
    return kept


def existing(x: Tensor) -> Tensor:
    """What came in is given back."""
    return x.view(256, 256).t()[1:]


# In quarters of a MiB, as a dispatch mode and torch.profiler both see it.
PEAKS: dict[str, tuple[Callable[[Tensor], Any], float]] = {
    "chain": (chain, 2), "temporaries": (temporaries, 2), "held": (held, 5), "forgotten": (forgotten, 3),
    "views": (views, 1), "view_outlives": (view_outlives, 3), "in_place": (in_place, 1), "dtypes": (dtypes, 0.75),
    "products": (products, 2), "pairs": (pairs, 1.5), "reused": (reused, 5), "existing": (existing, 0),
}  # fmt: skip


@requirement("6.5")
def test_the_peak_is_that_of_the_storages_made_inside(subject: Subject, rng: torch.Generator) -> None:
    """Each storage counts once, and while it lives; views and what was there before cost nothing."""
    x = torch.randn(QUARTER, generator=rng)

    for func, quarters in PEAKS.values():
        result = measured(subject, func, x)

        same_peak(result[1], quarters / 4, f"measure_memory_usage: {str(func.__doc__).rstrip('.')}")


def measured(subject: Subject, func: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """The pair that measure_memory_usage gives, if it is one."""
    result = subject.measure_memory_usage(func, *args, **kwargs)
    what = "measure_memory_usage"
    assert isinstance(result, tuple) and len(result) == 2, (
        f"{what}: a {type(result).__name__} came, (result, peak MiB) was wanted"
    )
    kind = type(result[1]).__name__
    assert kind in ("float", "int"), f"{what}: the peak is a {kind}, not a Python number"
    return result


def same_peak(came: float, wanted: float, what: str) -> None:
    """Within 10 %, and within a hundredth of a MiB of nothing."""
    assert abs(came - wanted) <= max(0.1 * wanted, 0.01), (
        f"{what}: a peak of {came:.4g} MiB came, {wanted:.4g} MiB were wanted, to 10 %\n"
        "storages made inside count, once each and while they live; 1 MiB is 2^20 bytes"
    )


@requirement("6.5")
def test_result_and_arguments_go_through(subject: Subject, rng: torch.Generator) -> None:
    """func gets its arguments, and its own result comes back beside the peak."""
    x = torch.randn(QUARTER, generator=rng)
    got: list[Any] = []

    def func(*args: Any, **kwargs: Any) -> Any:
        got.append((args, kwargs))
        got.append({"result": [x * 2, "text"]})
        return got[-1]

    result, peak = measured(subject, func, x, 3, flag="yes")

    assert got[0][0][0] is x and got[0][0][1:] == (3,) and got[0][1] == {"flag": "yes"}, (
        "measure_memory_usage: func does not get its arguments"
    )
    assert result is got[1], "measure_memory_usage: not what func returned comes back"
    assert len(got) == 2, "measure_memory_usage: func is called more than once"
    same_peak(peak, 0.25, "measure_memory_usage: func makes one tensor of 0.25 MiB")


@requirement("6.5")
def test_the_peak_of_a_training_step(subject: Subject, rng: torch.Generator) -> None:
    """Forward and backward of a small network: what a dispatch mode sees, with gradients, without the parameters."""
    x = torch.randn(200, 32, generator=rng)
    for width in (64, 256):
        model = nn.Sequential(nn.Linear(32, width), nn.Tanh(), nn.Linear(width, 32))

        def step(network: nn.Module = model) -> None:
            network(x).square().mean().backward()

        with Trace() as seen:
            step()
        model.zero_grad()

        _, peak = measured(subject, step)

        same_peak(peak, seen.peak_bytes / 2**20, f"measure_memory_usage(training step of a network of width {width})")
        assert model[0].weight.grad is not None, "measure_memory_usage: backward inside func leaves no gradient"


@requirement("6.5")
def test_measuring_starts_anew(subject: Subject, rng: torch.Generator) -> None:
    """Neither an earlier measurement nor what it left alive counts in the next one, without gradients either."""
    x = torch.randn(QUARTER, generator=rng)
    first = measured(subject, held, x)

    with torch.no_grad():
        second = measured(subject, chain, first[0][1])

    same_peak(first[1], 1.25, "measure_memory_usage(held), first call")
    same_peak(second[1], 0.5, "measure_memory_usage(chain), after a call whose result is still alive")


@requirement("6.5")
def test_nothing_stays_switched_on(subject: Subject, rng: torch.Generator) -> None:
    """After func has returned or raised, no mode and no profiler is left, and an error is func's own."""
    x = torch.randn(QUARTER, generator=rng)
    error = LookupError("of func itself")

    def func(ends: str) -> Tensor:
        y = x * 2
        if ends == "raises":
            raise error
        return y

    for ends in ("returns", "raises"):
        came: BaseException | None = None
        try:
            _, peak = measured(subject, func, ends)
            same_peak(peak, 0.25, "measure_memory_usage: func makes one tensor of 0.25 MiB")
        except LookupError as raised:
            came = raised

        assert came is (error if ends == "raises" else None), (
            "measure_memory_usage: an error of func does not come through unchanged"
        )
        assert not left_on(), (
            f"measure_memory_usage: {left_on()} is still on after func {ends}; use `with`, or try and finally"
        )
        same_peak(measured(subject, chain, x)[1], 0.5, f"measure_memory_usage(chain), after a func that {ends}")


def left_on() -> str:
    """What is switched on that observes tensors."""
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode"
    if torch._C._len_torch_function_stack():
        return "a function mode"
    return "the profiler" if torch.autograd._profiler_enabled() else ""


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    """What a check's code leaves switched on goes off after it, so that the next check starts clean."""
    yield
    while torch._C._len_torch_dispatch_stack():
        _pop_mode()
    if torch.autograd._profiler_enabled():
        torch.autograd._disable_profiler()
    torch.set_autocast_enabled("cpu", False)
    torch.set_autocast_dtype("cpu", torch.bfloat16)


# 6.6 a model that does not fit


@requirement("6.6")
def test_train_step_by_hand(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """One step of SGD with weight decay: the loss before it, old gradients ignored, w - lr·(g + d·w) afterwards."""
    for shape in ((B, L), (1, 2)):
        batch = {name: torch.randint(V, shape, generator=rng) for name in ("input_ids", "targets")}
        model, plain = seeded(lambda: Stack(2)), seeded(lambda: Stack(2))
        loss = functional.cross_entropy(plain(batch["input_ids"]).transpose(1, 2), batch["targets"])
        loss.backward()
        wanted = [(p - 0.5 * (p.grad + 0.25 * p)).detach() for p in plain.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 7.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.25)

        came = subject.train_step(model, batch, optimizer, nn.CrossEntropyLoss())

        assert type(came) in (float, int), f"train_step: a {type(came).__name__} came, a Python float was wanted"
        assert abs(came - loss.item()) < 1e-6, (
            f"train_step: the loss {came} came, {loss.item()} was wanted: the one before the step"
        )
        hint = "zero_grad before backward, then step, once each"
        for (name, parameter), value in zip(model.named_parameters(), wanted, strict=True):
            what = f"train_step with SGD and weight decay: {name} afterwards"
            close(parameter.detach(), value, what, hint=hint)


@requirement("6.6")
def test_the_criterion_gets_its_positions_in_one_row(subject: Subject, rng: torch.Generator) -> None:
    """The criterion is called once, with logits [B·L, V] and targets [B·L] in the same order."""
    batch = {name: tokens(rng) for name in ("input_ids", "targets")}
    model = seeded(lambda: Stack(1))
    expected = model(batch["input_ids"]).detach()
    got: list[tuple[Tensor, Tensor]] = []

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        got.append((logits.detach().clone(), targets))
        return functional.cross_entropy(logits, targets)

    with calls(model) as entered:
        subject.train_step(model, batch, torch.optim.SGD(model.parameters(), lr=0.1), criterion)

    assert entered[model] == 1, f"train_step: the model is called {entered[model]} times"
    assert len(got) == 1, f"train_step: the criterion is called {len(got)} times"
    shapes = [tuple(tensor.shape) for tensor in got[0]]
    assert shapes == [(B * L, V), (B * L,)], (
        f"train_step: the criterion gets shapes {shapes}, not {[(B * L, V), (B * L,)]}"
    )
    assert torch.equal(got[0][1], batch["targets"].reshape(-1)), (
        "train_step: the criterion's targets are in another order"
    )
    assert (got[0][0] - expected.reshape(-1, V)).abs().max() < 1e-9, (
        "train_step: the criterion's logits are in another order"
    )


@requirement("6.6")
def test_a_model_that_does_not_fit_trains(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Three steps under a budget of two thirds of what plain training needs, with the plain losses."""
    batch = {name: torch.randint(V, (4, 100), generator=rng) for name in ("input_ids", "targets")}
    plain, model = (seeded(lambda: Stack(5, hidden=80)) for _ in range(2))
    needed, wanted = plain_training(plain, batch)
    wrap_layers(subject, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    came, left = [], []
    gc.freeze()  # so that collecting what this check leaves in cycles takes no time
    try:
        with Trace() as seen:
            for _ in wanted:
                came.append(float(subject.train_step(model, batch, optimizer, nn.CrossEntropyLoss())))
                seen.alive_after_collection()  # a class made for a call takes a second collection to go
                left.append(seen.alive_after_collection())
    finally:
        gc.unfreeze()

    what = "three calls of train_step on a checkpointed model"
    close(
        torch.tensor(came), torch.tensor(wanted), f"{what}: losses", tolerance=1e-6, hint="plain training gives others"
    )
    assert left[2] < left[0] + 8 * 400 * D, (
        f"{what}: bytes alive after each step: {left}; what a step leaves must not pile up"
    )
    budget = needed * 2 // 3
    assert seen.peak_bytes <= budget, (
        f"{what}: {seen.peak_bytes} bytes are alive at once; there are {budget}, and plain training needs {needed}\n"
        "recompute one layer at a time, and let go of it before the next"
    )


def plain_training(model: nn.Module, batch: dict[str, Tensor]) -> tuple[int, list[float]]:
    """The most bytes alive at once in a step of plain training, and the losses of three steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses: list[float] = []
    peak = 0
    for step in range(3):
        with Trace() if step == 0 else nullcontext() as seen:
            loss = functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["targets"].flatten())
            loss.backward()
        peak = peak if seen is None else seen.peak_bytes
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return peak, losses


# 6.7 gradients


@requirement("6.7")
@pytest.mark.parametrize(("p", "n"), [(0.0, 1), (0.5, 2)])
def test_parameters_get_the_plain_gradients(
    subject: Subject, close: Close, rng: torch.Generator, p: float, n: int
) -> None:
    """After backward every parameter has the plain model's gradient, with dropout under a seed too."""
    input_ids = tokens(rng)
    pair = Pair(subject, lambda: Stack(3, p), n)

    pair.step(lambda model: model(input_ids).square().sum().backward())

    hint = (
        "the second computation must drop what the first dropped: restore the random state of the forward" if p else ""
    )
    pair.agree(close, f"backward of a model with wrapped layers, dropout {p}", hint)


@requirement("6.7")
def test_the_random_stream_goes_on_as_after_a_plain_step(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Recomputing moves the random stream neither on nor back, also with draws between forward and backward."""
    input_ids = tokens(rng)
    pair = Pair(subject, lambda: Stack(2, 0.5))

    for between in (0, 3):

        def step(model: Any, draws: int = between) -> None:
            model.zero_grad()
            loss = model(input_ids).square().sum()
            torch.rand(draws)
            loss.backward()

        pair.step(step)

        assert torch.equal(pair.streams[1], pair.streams[0]), (
            f"training step, {between} draws before backward: the random stream is not where a plain step ends\n"
            "put back after the second computation what the random state was before it"
        )
        pair.agree(close, "backward of a model with dropout", "drawing between forward and backward changes nothing")


@requirement("6.7")
def test_later_steps_are_as_good_as_the_first(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Later steps, with other weights and other data, have the plain gradients; without zero_grad they add up."""
    batches = [tokens(rng) for _ in range(3)]
    pair = Pair(subject, lambda: Stack(2, 0.5))

    def steps(model: Any) -> None:
        for number, input_ids in enumerate(batches):
            if number == 1:
                model.zero_grad()
            model(input_ids).square().sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.01 * parameter.grad if parameter.grad is not None else 0.0)

    pair.step(steps)

    pair.agree(close, "backward of later steps", "the weights changed after the first step, and so did the input")


@requirement("6.7")
def test_a_second_backward_with_retain_graph(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """backward(retain_graph=True) and a second backward give twice the gradient, and leave the random stream alone."""
    input_ids = tokens(rng)
    pair = Pair(subject, lambda: Stack(2, 0.5))

    def step(model: Any) -> None:
        loss = model(input_ids).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()

    pair.step(step)

    pair.agree(close, "second backward with retain_graph", "what forward kept must serve a second backward")
    assert torch.equal(pair.streams[1], pair.streams[0]), "second backward with retain_graph: the random stream moved"


@requirement("6.7")
def test_several_calls_before_backward(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Each backward belongs to its own call, with its own inputs and its own dropout."""
    both = tokens(rng), tokens(rng)
    pair = Pair(subject, lambda: Stack(2, 0.5))

    for order in (1, -1):

        def step(model: Any, direction: int = order) -> None:
            model.zero_grad()
            losses = [model(input_ids).square().sum() * scale for input_ids, scale in zip(both, (1, 3), strict=True)]
            for loss in losses[::direction]:
                loss.backward()

        pair.step(step)

        pair.agree(close, "two calls, then two backwards", "what a call keeps belongs to the call, not to the module")


@requirement("6.7")
def test_a_layer_that_is_called_several_times(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """One wrapped layer may be used again and again in one forward."""
    x = torch.randn(B, D, generator=rng, dtype=torch.float64).requires_grad_()
    pair = Pair(subject, lambda: tree(layers=nn.ModuleList([Block()])))

    def step(model: Any) -> None:
        layer = model.layers[0]
        layer(torch.sin(layer(layer(x)))).square().sum().backward()

    pair.step(step)

    pair.agree(close, "a wrapped layer called three times in a row")


@requirement("6.7")
def test_shared_parameters(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A weight that belongs to several modules gets the sum of its gradients."""
    input_ids = tokens(rng)

    def build() -> Any:
        model: Any = Stack(3)
        model.layers[2].up.weight = model.layers[0].up.weight
        model.head.weight = model.embedding.weight
        return model

    pair = Pair(subject, build)

    pair.step(lambda model: model(input_ids).square().sum().backward())

    pair.agree(close, "backward with a weight shared between layers, and one between the embedding and the head")


@requirement("6.7")
def test_frozen_parameters_stay_without_gradient(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Frozen parameters get no gradient, the others theirs, also behind a layer that is frozen as a whole; those that
    are thawed later get theirs too.
    """
    input_ids = tokens(rng)

    def build() -> Any:
        model: Any = Stack(3)
        model.layers[0].up.weight.requires_grad_(False)
        model.layers[1].requires_grad_(False)
        return model

    pair = Pair(subject, build)

    pair.step(lambda model: model(input_ids).square().sum().backward())

    pair.agree(close, "backward of a model with frozen parameters")
    for model in (pair.plain, pair.wrapped):
        model.requires_grad_().zero_grad()
    pair.step(lambda model: model(input_ids).square().sum().backward())
    pair.agree(close, "backward of a model whose parameters were frozen when it was wrapped")


@requirement("6.7")
def test_a_wrapped_model_may_be_cast(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """After .float() a wrapped model trains in float32, and after .double() again in float64."""
    input_ids = tokens(rng)
    pair = Pair(subject, lambda: Stack(2, 0.5))

    for dtype in (torch.float32, torch.float64):
        for model in (pair.plain, pair.wrapped):
            model.to(dtype).zero_grad()
        pair.step(lambda model: model(input_ids).square().sum().backward())

    pair.agree(close, "backward after .float() and .double()", "the model was cast between the steps")


@requirement("6.7")
def test_gradients_reach_what_comes_before(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The input of a wrapped layer passes its gradient on, and autograd goes on to the input's own history."""
    x, leaf = (torch.randn(B, D, generator=rng, dtype=torch.float64) for _ in range(2))
    leaf.copy_(x)
    plain, block = seeded(Block), seeded(Block)
    wrapper = subject.CheckpointWrapper(block)

    with calls(block.up) as entered:
        for module, start in ((plain, x.requires_grad_()), (wrapper, leaf.requires_grad_())):
            module(torch.sin(start) * 2).square().sum().backward()

    same_gradient(close, leaf.grad, x.grad, "backward through a wrapper: gradient of x, of which its input was made")
    assert entered[block.up] > 1, f"training step: {NOTHING_TWICE}"


# 6.10 from scratch


@requirement("6.10")
def test_the_prebuilt_checkpoint_is_not_reached(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A training step of a wrapped model gives the plain output and gradient while torch.utils.checkpoint raises."""
    input_ids = tokens(rng)
    outputs: list[Tensor] = []

    def step(model: Any) -> None:
        outputs.append(model(input_ids))
        outputs[-1].square().sum().backward()

    with forbid(CHECKPOINT, "a training step"):
        pair = Pair(subject, lambda: Stack(2))
        pair.step(step)

    close(outputs[1], outputs[0], "forward with torch.utils.checkpoint out of reach")
    came, wanted = pair.wrapped.embedding.weight.grad, pair.plain.embedding.weight.grad
    close(came, wanted, "backward with torch.utils.checkpoint out of reach: gradient of the embedding")


@requirement("6.10")
def test_neither_is_it_with_harder_calls(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """So do `checkpoint` itself and calls that are harder."""
    for case in ("checkpoint", "structures", "autocast", "dropout", "nested", "no input gradient"):
        x, y = randoms(rng, 2, case != "no input gradient")
        block, plain = seeded(Block), seeded(Block)

        with forbid(CHECKPOINT, f"a training step ({case})"):
            with suppress(Exception):  # whether such calls give the right thing is the others' question
                harder_call(subject, case, x, y)
            x.grad = None
            with calls(block.up) as entered:
                subject.CheckpointWrapper(block)(x.requires_grad_()).square().sum().backward()

        plain(z := x.detach().requires_grad_()).square().sum().backward()
        same_gradient(close, x.grad, z.grad, "backward through a wrapper: gradient of x")
        assert entered[block.up] > 1, f"training step: {NOTHING_TWICE}"


def harder_call(subject: Subject, case: str, x: Tensor, y: Tensor) -> None:
    """A step that code may treat in a way of its own."""
    if case == "checkpoint":
        subject.checkpoint(seeded(Block), x.detach().repeat(99, 1).requires_grad_()).sum().backward()
    elif case == "nested":
        nested_wrapper(subject, seeded(Block))(x).sum().backward()
    elif case == "structures":
        nested = (x, {"a": y, "b": ([y], 3)})
        subject.CheckpointWrapper(seeded(Rich))(nested, mode="structures")["out"][0].sum().backward()
    elif case == "autocast":
        leaf = x.detach().float().requires_grad_()
        precision_step(subject.CheckpointWrapper(seeded(Precision, torch.float32)), leaf, "bfloat16", "off")
    else:
        subject.CheckpointWrapper(seeded(lambda: Block(p=0.5)))(x).sum().backward()


# 6.8 and 6.9


test_own_test_passes_on_right_code, test_own_test_catches = own_test_checks("6.8", OWN_TEST)
test_ruff_finds_nothing, test_mypy_finds_nothing = style_checks("6.9")
