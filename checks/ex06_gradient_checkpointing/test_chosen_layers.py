"""Chosen layers (6.1): which layers are wrapped, and the keys, values and loading of a wrapped model's state_dict."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from textwrap import shorten
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.testing import Close, Subject, calls, refuses, requirement

from .reference import Block, D, Row, Stack, Unit, nested_wrapper, run_backward, seeded, tree, units, ups, wrap_layers

CHOSEN = {1: [0, 1, 2, 3, 4], 2: [0, 2, 4], 3: [0, 3], 0: []}


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
            x = torch.randn(2, D, generator=rng, dtype=torch.float64).requires_grad_()
            run_backward(model(x).sum(), f"step of a model, {what}")
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
    assert before == [[], []], f"{what}: checkpointed_modules is {before} at first, not [[], []]"
    names = [list(selective.checkpointed_modules) for selective in selections]
    assert names == wanted, f"{what}, 11 layers each: checkpointed_modules is {names}, not {wanted}"


class Blocks(nn.ModuleList):
    """A ModuleList under a name of its own."""


class Chain(nn.Sequential):
    """A Sequential under a name of its own."""


class Outer(nn.Module):
    """A layer that holds what would be layers elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.sublayer, self.layers = Unit(), units(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](self.sublayer(x)))


# The model, the pattern, the layers in order, and what is no layer.
Zoo = tuple[Callable[[], nn.Module], str, list[str], list[str]]
ZOO: dict[str, list[Zoo]] = {
    "names": [
        (lambda: tree(head=Unit(), layers=units(2)), "layer", ["layers.0", "layers.1"], ["head"]),
        (
            lambda: tree(layer1=Unit(), tail=Unit(), my_layer2=Unit(), Layers=units(1)),
            "layer", ["layer1", "my_layer2"], ["tail", "Layers.0"],
        ),
        # In another module.
        (
            lambda: tree(
                encoder=tree(layers=Blocks(units(3))), decoder=tree(last=Unit(), a=tree(b=tree(layers_=units(2))))
            ),
            "layer",
            ["encoder.layers.0", "encoder.layers.1", "encoder.layers.2", "decoder.a.b.layers_.0",
             "decoder.a.b.layers_.1"],
            ["decoder.last"],
        ),
        # Another pattern.
        (
            lambda: tree(layers=units(2), blocks=units(2), last_block=Unit()),
            "block", ["blocks.0", "blocks.1", "last_block"], ["layers.0", "layers.1"],
        ),
    ],
    "norms": [
        (
            lambda: tree(layer_norm=Unit(), layers=units(2), norm_layers=units(2), layernorm=Unit()),
            "layer", ["layers.0", "layers.1"], ["layer_norm", "norm_layers.0", "norm_layers.1", "layernorm"],
        ),
        # Inside a norm.
        (
            lambda: tree(layer_norm=tree(layers=units(1), scale=Unit()), layer=Unit()),
            "layer", ["layer_norm.layers.0", "layer"], ["layer_norm.scale"],
        ),
        # Named elements.
        (
            lambda: tree(layers=nn.Sequential(OrderedDict(up=Unit(), norm=Unit(), down=Unit()))),
            "layer", ["layers.up", "layers.norm", "layers.down"], [],
        ),
    ],
    "lists": [
        (
            lambda: tree(layers=nn.Sequential(Unit(), Unit()), body=nn.Sequential(Unit())),
            "layer", ["layers.0", "layers.1"], ["body"],
        ),
        # List of lists.
        (
            lambda: tree(layers=nn.ModuleList([units(2), Unit(), nn.ModuleList([units(1)])])),
            "layer", ["layers.0.0", "layers.0.1", "layers.1", "layers.2.0.0"], [],
        ),
        # List of sequentials.
        (
            lambda: tree(layers=nn.ModuleList([nn.Sequential(Unit(), Unit()), nn.Sequential(Unit())])),
            "layer", ["layers.0", "layers.1"], [],
        ),
        # Sequential of sequentials.
        (
            lambda: tree(layers=nn.Sequential(nn.Sequential(Unit(), Unit()), Unit())),
            "layer", ["layers.0", "layers.1"], [],
        ),
        # Layers inside a layer.
        (
            lambda: tree(layers=nn.ModuleList([Outer(), Outer()]), top_layer=Outer()),
            "layer", ["layers.0", "layers.1", "top_layer"], [],
        ),
        # Sequentials in a list of lists, and nothing.
        (
            lambda: tree(layers=nn.ModuleList([nn.ModuleList([nn.Sequential(Unit(), Unit())])]), layer_x=None),
            "layer", ["layers.0.0"], [],
        ),
        # A Sequential of its own name.
        (
            lambda: tree(layer1=Chain(Unit(), Unit()), body=Chain(OrderedDict(up=Unit(), last_layer=Unit()))),
            "layer", ["layer1.0", "layer1.1", "body.last_layer"], ["body.up"],
        ),
        # The model is a list.
        (
            lambda: nn.Sequential(tree(layers=units(1), out=Unit()), tree(layer=Unit())),
            "layer", ["0.layers.0", "1.layer"], ["0.out"],
        ),
        # Lists inside a list that does not match.
        (
            lambda: tree(stages=nn.ModuleList([tree(layers=units(2), out=Unit()), tree(layer=Unit())])),
            "layer", ["stages.0.layers.0", "stages.0.layers.1", "stages.1.layer"], ["stages.0.out"],
        ),
    ],
}  # fmt: skip


@requirement("6.1")
@pytest.mark.parametrize("kind", ZOO)
def test_layers_are_found_by_name(subject: Subject, rng: torch.Generator, kind: str) -> None:
    """Wrapped is what the conventions call a layer, counted over the whole model, and nothing else."""
    for build, pattern, layers, others in ZOO[kind]:
        for n in (1, 2) if len(layers) > 4 else (1,):
            model = seeded(build)
            inside = {name: ups(model.get_submodule(name)) for name in (*layers, *others)}

            selective = wrap_layers(subject, model, n, **({} if pattern == "layer" else {"layer_pattern": pattern}))

            wanted = layers[::n]
            what = f"SelectiveCheckpointing({n}), pattern {pattern!r}" + (f", layers {layers}" if n > 1 else "")
            names = list(selective.checkpointed_modules)
            assert names == wanted, (
                f"{what}: checkpointed_modules: {names} came, {wanted} was wanted\n"
                f"{difference(names, wanted, pattern) if n == 1 else 'count over the whole model, not list by list'}"
            )
            if n == 1:
                twice = computed_twice(model, inside, rng)
                assert twice == wanted, f"{what}: {twice} are computed twice in a step; {wanted} were wanted"


def difference(names: list[str], wanted: list[str], pattern: str) -> str:
    """What is missing and what is too much among the names of all layers, and the rule for it."""
    missing, extra = ([name for name in one if name not in other] for one, other in ((wanted, names), (names, wanted)))
    if not missing and not extra:
        return "the same in another order: depth first, in the order of named_children()"
    found = [f"{word}: {', '.join(some)}" for word, some in (("missing", missing), ("too many", extra)) if some]
    if missing and missing[0].rpartition(".")[0] in extra:
        rule = "the elements of a ModuleList or Sequential that matches are layers, not the list, of a subclass too"
    elif not missing:
        rule = f'a name matches if it contains {pattern!r} and not "norm"; no layer holds layers'
    elif pattern not in (top := missing[0].split(".")[0]) or "norm" in top:
        rule = "look inside every module that does not match, however deep"
    elif "." in missing[0]:
        rule = "the elements of a list that matches are layers, whatever their names; only a ModuleList is opened again"
    else:
        rule = f'a module is a layer if its name contains {pattern!r} and not "norm", and it is no such list'
    return "; ".join(found) + f"\n{rule}"


def computed_twice(model: nn.Module, inside: dict[str, list[nn.Module]], rng: torch.Generator) -> list[str]:
    """The names of those modules that a training step over all of them enters more than once, as a whole."""
    x = torch.randn(1, D, generator=rng, dtype=torch.float64).requires_grad_()
    with calls(*(up for entries in inside.values() for up in entries)) as entered:
        run_backward(torch.stack([model.get_submodule(name)(x).sum() for name in inside]).sum())
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
            f"apply_checkpointing: as {name} a {came.__name__} came, the {kind.__name__} of before was wanted\n"
            "put the wrappers into that same object, in place of its elements"
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
def test_keys_and_values_are_unchanged(subject: Subject, close: Close) -> None:
    """The state_dict of a wrapped model has the plain model's keys and values, and its parameters are the same."""
    for kind, n in (("list", 1), ("list", 2), ("nested", 1), ("awkward", 1)):
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
        kept = {id(value) for value in model.state_dict(keep_vars=True).values()}
        assert parameters <= kept, "state_dict(keep_vars=True) of a wrapped model: its values are not the parameters"


def same_keys(came: Any, wanted: Any, what: str) -> None:
    """Two state_dicts have the same keys."""
    extra, missing = sorted(set(came) - set(wanted))[:3], sorted(set(wanted) - set(came))[:3]
    hint = "rename in a state_dict post hook and a load_state_dict pre hook, by prefix, all keys at once"
    assert not extra, f"{what}: keys {extra} came, which the plain model lacks\n{hint}"
    assert not missing, f"{what}: the plain model's keys {missing} are missing\n{hint}"


@requirement("6.1")
def test_checkpoints_load_strictly_both_ways(subject: Subject, close: Close) -> None:
    """A plain checkpoint loads into a wrapped model, and back, strictly, and its values arrive."""
    for build in MODELS.values():
        load_both_ways(subject, close, build)


def load_both_ways(subject: Subject, close: Close, build: Callable[[], nn.Module]) -> None:
    """Other values go from a plain model into a wrapped one, and back."""
    plain, wrapped = seeded(build), seeded(build)
    names = list(wrap_layers(subject, wrapped).checkpointed_modules)
    assert names, "apply_checkpointing: no layer is wrapped, so that this proves nothing"
    for into, source, target in (("wrapped", plain, wrapped), ("plain", wrapped, plain)):
        with torch.no_grad():
            for number, value in enumerate(source.state_dict().values()):
                value.add_(number + 1)
        expected = {name: value.clone() for name, value in source.state_dict().items()}

        rule = "loading takes the plain keys too" if into == "wrapped" else "saving gives the plain keys"
        loads(target, source.state_dict(), f"load_state_dict into the {into} model", rule)

        same_keys(target.state_dict(), expected, f"state_dict of the {into} model")
        for name, value in target.state_dict().items():
            close(value, expected[name], f"load_state_dict into the {into} model: {name} afterwards", tolerance=0)


def loads(target: nn.Module, state: dict[str, Any], what: str, rule: str = "loading takes the plain keys too") -> None:
    """A state_dict loads strictly."""
    try:
        target.load_state_dict(state)
    except RuntimeError as error:
        said = shorten(str(error), 300, placeholder=" …")
        # Only where such keys are.
        if any("module.module." in key for key in state):
            rule += "; here a layer holds `module` and `module.module`: rename all keys at once"
        raise AssertionError(f"{what} fails: {said}\nwrapping changes no key: {rule}") from error


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

        given = {name: value + 1 for name, value in state.items()}
        loads(wrapper, given, f"{what}: load_state_dict")

        assert list(given) == list(state), f"{what}: load_state_dict changes the keys of the dict that it is given"
        for name, value in wrapper.state_dict().items():
            close(value, state[name] + 1, f"{what}: {name} after loading", tolerance=0)
