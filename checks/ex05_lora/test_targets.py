"""Targets (5.2): any layer is adapted, exactly those that match, and bare weights work or are refused."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.testing import Close, Subject, also, refuses, requirement

from .reference import (
    ALPHA,
    IN,
    OUT,
    RANK,
    TOKENS,
    Tiny,
    adapter_at,
    alike,
    apply,
    applying,
    bare,
    build,
    called,
    descend,
    fresh,
    known,
    linear,
    linear_at,
    matrices,
    randomize,
    tiny_adapters,
    trainable,
    tree,
    try_apply,
    value,
    with_merged_weight,
)


class Named(nn.Linear):
    """A linear layer of a model's own class."""


PATHS = (
    "q_proj",
    "enc.q_proj",
    "enc.k_proj",
    "enc.my_q_proj",
    "enc.q_proj_2",
    "enc.layers.0.q_proj",
    "enc.layers.1.proj",
    "q_block.inner",
    "q_block.up.0",
    "q_block.out_proj",
    "q_block.linear1",
)


@pytest.fixture
def close() -> Close:
    """Loose: that nothing is computed below float64 is 5.7's to say."""
    return Close(1e-5)


@requirement("5.2")
@pytest.mark.parametrize(
    ("shape", "bias"),
    [((IN,), True), ((5, IN), True), ((2, 1, 3, IN), False)],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else ("bias" if value else "no_bias"),
)
def test_inputs_of_any_shape(
    subject: Subject, close: Close, rng: torch.Generator, shape: tuple[int, ...], bias: bool
) -> None:
    """As for nn.Linear, any number of dimensions may stand before the last, with and without bias."""
    adapter = fresh(subject, linear(rng, bias=bias))
    randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)
    x = torch.randn(shape, generator=rng, dtype=torch.float64)

    output = adapter.layer(x)

    what = f"forward of an input of shape {shape}, layer {'with' if bias else 'without'} bias"
    close(output, adapter.expected(x), what, hint="x [..., in] -> [..., out], as nn.Linear does it; its bias stays")


@requirement("5.2")
def test_strided_inputs_are_read_and_not_written(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Transposed, sliced and expanded views are as good as copies, and stay as they are."""
    adapter, dropping = build(subject, rng), build(subject, rng, dropout=0.4)
    base = torch.randn(IN, 6, 2, generator=rng, dtype=torch.float64)
    row = torch.randn(1, IN, generator=rng, dtype=torch.float64)
    views = {"transposed": base.permute(2, 1, 0), "sliced": base[:, ::2, 1].T, "expanded": row.expand(4, IN)}
    for name, x in views.items():
        before = x.clone()

        output = adapter.layer.train()(x)
        dropping.layer.train()(x)

        close(x, before, f"x, {name}, after forward", tolerance=0, hint="an input is written to")
        close(output, adapter.expected(x), f"forward(x), x {name}", hint="the input is a strided view here")


@requirement("5.2")
@pytest.mark.parametrize(
    ("targets", "matched"),
    [
        (["q_proj"], ["q_proj", "enc.q_proj", "enc.layers.0.q_proj"]),
        (["enc.q_proj"], ["enc.q_proj"]),
        (["enc.layers.0.q_proj", "proj"], ["enc.layers.0.q_proj", "enc.layers.1.proj"]),
        (["0"], ["q_block.up.0"]),
        (["out_proj", "linear1"], ["q_block.out_proj", "q_block.linear1"]),
        (["layers.0.q_proj", "k_proj"], ["enc.k_proj"]),
        (["enc", "q_block", "up", "k_proj"], ["enc.k_proj"]),
        (["q.proj", "*proj", ".*", "Q_PROJ", "", "k_proj"], ["enc.k_proj"]),
        (["k_proj", "idle"], ["enc.k_proj"]),
        (["inner", "enc.k_proj", "k_proj"], ["enc.k_proj", "q_block.inner"]),
    ],
    ids=[
        "last_part",
        "whole_path",
        "both",
        "number",
        "called",
        "part_of_path",
        "containers",
        "patterns",
        "idle",
        "twice",
    ],
)
def test_exactly_what_matches_is_adapted(
    subject: Subject, rng: torch.Generator, targets: list[str], matched: list[str]
) -> None:
    """A target matches the last part of a linear layer's path, or the whole path, exactly."""
    model = tree({path: nn.Linear(5, 4) for path in PATHS})

    apply(subject, model, *targets)

    adapted = {path for path in PATHS if hasattr(model.get_submodule(path), "lora_A")}
    rule = "a target equals the last part of a path, or the whole path"
    extra, missing = sorted(adapted - set(matched)), sorted(set(matched) - adapted)
    assert not extra, f"{applying(subject, targets)}: {extra} are adapted too; {rule}"
    assert not missing, f"{applying(subject, targets)}: {missing} are not adapted; {rule}"


@requirement("5.2")
def test_other_modules_never_match(subject: Subject, rng: torch.Generator) -> None:
    """Embeddings, convolutions, bilinear layers, norms and containers stay what they are, whatever their names."""
    others = {
        "a.q_proj": nn.Embedding(5, 4),
        "b.q_proj": nn.Conv1d(5, 4, 1),
        "c.q_proj": nn.Bilinear(3, 5, 4),
        "d.q_proj": nn.LayerNorm(5),
        "e.q_proj": nn.Sequential(nn.Linear(5, 4)),
    }
    model = tree({**others, "f.q_proj": nn.Linear(5, 4)})
    model.register_module("absent", None)

    apply(subject, model, "q_proj")

    adapter_at(model, "f.q_proj")
    for path, other in others.items():
        what = f"apply_lora_to_model: the {type(other).__name__} at {path!r}"
        assert model.get_submodule(path) is other, f"{what} is replaced; linear layers alone match"
    assert isinstance(model.get_submodule("e.q_proj.0"), nn.Linear), (
        "apply_lora_to_model: a container's name matches its parts"
    )


@requirement("5.2")
@pytest.mark.parametrize(("rank", "alpha"), [(2, 3.5), (3, 7)])
def test_adapters_are_as_the_config_says(
    subject: Subject, close: Close, rng: torch.Generator, rank: int, alpha: float
) -> None:
    """rank and alpha of the config reach every adapted layer, one of a subclass of nn.Linear too."""
    model = tree({"a.q_proj": Named(IN, OUT), "b.c.q_proj": linear(rng, bias=False)})
    paths = ("a.q_proj", "b.c.q_proj")
    adapters = [known(None, linear_at(model, path), rank, alpha) for path in paths]
    x = torch.randn(5, IN, generator=rng)
    subject.apply_lora_to_model(model, subject.LoRAConfig(rank, alpha, ["q_proj"], 0.0))

    for path, adapter in zip(paths, adapters, strict=True):
        adapter.layer = adapter_at(model, path)
        matrices(adapter.layer, rank, IN, OUT)
        randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)
        what = f"the layer at {path!r}, LoRAConfig(rank={rank}, alpha={alpha})"
        close(
            adapter.layer(x),
            adapter.expected(x).float(),
            what,
            tolerance=1e-5,
            hint="rank or alpha of the config is lost",
        )
    own = {tensor.data_ptr() for adapter in adapters for tensor in (adapter.layer.lora_A, adapter.layer.lora_B)}
    assert len(own) == 4, "apply_lora_to_model on two layers of one shape: their adapters share A or B"


@requirement("5.2")
def test_the_model_itself_comes_back(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """apply_lora_to_model works in place and returns the model, which then computes with the adapted weights."""
    model = Tiny(rng)
    plain = copy.deepcopy(model)

    tokens, targets = torch.tensor(TOKENS), ["q_proj", "v_proj"]
    config = subject.LoRAConfig(RANK, ALPHA, list(targets), 0.0)
    result = subject.apply_lora_to_model(model, config)

    assert result is model, f"apply_lora_to_model: a {type(result).__name__} came, the model itself was wanted"
    assert config.target_modules == targets, (
        f"apply_lora_to_model changes config.target_modules: it was {targets}, it is {config.target_modules}"
    )
    for path, layer in zip(("q_proj", "block.v_proj"), tiny_adapters(model), strict=True):
        randomize(rng, layer.lora_A, layer.lora_B)
        original = linear_at(plain, path)
        original.weight.data.copy_(known(layer, original, RANK, ALPHA).merged_weight())
    close(model(tokens), plain(tokens).detach(), "output of an adapted model", tolerance=1e-5)


@requirement("5.2")
@pytest.mark.parametrize(
    "targets", [["missing"], ["wide", "narrow_up", "trunk"], []], ids=["unknown", "nearly", "none"]
)
def test_targets_that_match_nothing_are_refused(subject: Subject, targets: list[str]) -> None:
    """ValueError names the targets and some of the linear layers that there are."""
    model = tree({"trunk.widen": nn.Linear(5, 4), "narrow": nn.Linear(4, 5), "wide": nn.Embedding(3, 5)})

    what = f"apply_lora_to_model with targets {targets}"
    refuses(ValueError, lambda: try_apply(subject, model, *targets), what, *targets)
    with pytest.raises(ValueError) as raised:
        try_apply(subject, model, *targets)
    text = str(raised.value)
    assert "widen" in text or "narrow" in text.replace("narrow_up", ""), (
        f"{what}: the ValueError says {text!r}; it names none of the model's linear layers, trunk.widen and narrow"
    )


@requirement("5.2")
def test_no_targets_are_no_default(subject: Subject) -> None:
    """An empty target list matches nothing; the default stands in for None alone."""
    model = tree({"q_proj": nn.Linear(5, 4)})

    refuses(ValueError, lambda: try_apply(subject, model), "apply_lora_to_model with targets []", "q_proj")


@requirement("5.2")
def test_a_model_without_linear_layers_is_refused(subject: Subject) -> None:
    """Where there is no linear layer at all, nothing matches."""
    model = tree({"q_proj": nn.Embedding(5, 4), "b.v_proj": nn.Conv1d(5, 4, 1)})

    what = "apply_lora_to_model on a model without linear layers"
    refuses(ValueError, lambda: try_apply(subject, model, "q_proj", "v_proj"), what, "q_proj", "v_proj")


@requirement("5.2")
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("q_proj", "v_proj"),
        ("a.q_proj", "a.b.v_proj"),
        ("blocks.0.q_proj", "blocks.1.q_proj"),
    ],
    ids=["one_parent", "two_depths", "shared_block"],
)
def test_a_layer_under_several_names_gets_one_adapter(
    subject: Subject, close: Close, rng: torch.Generator, first: str, second: str
) -> None:
    """The one adapter stands in every place: what is learned in one shows in the other."""
    original = linear(rng)
    model = tree({first: original, second: original})
    if first.startswith("blocks"):
        block = nn.ModuleDict({"q_proj": original})
        model = nn.ModuleDict({"blocks": nn.ModuleList([block, block])})
    adapter = known(None, original, RANK, ALPHA)
    x = torch.randn(5, IN, generator=rng)

    apply(subject, model, "q_proj", "v_proj")

    adapter.layer = adapter_at(model, first)
    randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)
    for path in (first, second):
        what = f"the layer at {path!r}, which is registered as {first!r} and {second!r}"
        hint = "a layer registered under several names gets one adapter, in every place"
        close(adapter_at(model, path)(x), adapter.expected(x).float(), what, tolerance=1e-5, hint=hint)


@requirement("5.2")
def test_defaults_of_the_config(subject: Subject) -> None:
    """rank 4, alpha 8, q_proj and v_proj, dropout 0.1; the list is a new one each time."""
    names, given = ("rank", "alpha", "target_modules", "dropout"), (2, 1.5, ["head"], 0.7)
    other, config = subject.LoRAConfig(*given), subject.LoRAConfig()

    for name, wanted, earlier in zip(names, (4, 8.0, ["q_proj", "v_proj"], 0.1), given, strict=True):
        came, kept = getattr(config, name, None), getattr(other, name, None)
        assert came == wanted, f"LoRAConfig().{name}: {came} came, {wanted} was wanted"
        assert kept == earlier, f"LoRAConfig(*{given}).{name}: {kept} came once another config was made"
    config.target_modules.append("k_proj")
    came = subject.LoRAConfig(target_modules=None).target_modules
    assert came == ["q_proj", "v_proj"], (
        f"LoRAConfig().target_modules: {came} came after another config's list had grown"
    )


@requirement("5.2")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("path", ["out_proj", "linear1", "linear2"])
def test_a_bare_weight_works_or_is_refused(
    subject: Subject, close: Close, rng: torch.Generator, path: str, training: bool
) -> None:
    """A layer whose weight its parent reads is adapted in every mode, with gradients, or refused by a TypeError."""
    model, x = bare(path, bias=not training), torch.randn(3, 5, 8, generator=rng, dtype=torch.float64)
    plain = copy.deepcopy(model).double().train(training)
    layer = adapted_or_refused(lambda: adapter_at(apply(subject, model, path), path), path)
    if layer is None:
        return
    randomize(rng, layer.lora_A, layer.lora_B)
    model.double().train(training)
    expected = with_merged_weight(plain, path, layer, x)
    for mode in ("train",) if training else ("no_grad", "eval"):
        what = f"{type(model).__name__} with an adapted {path}, {mode}"
        with torch.set_grad_enabled(mode != "no_grad"):
            # What is refused once is refused again: a later call would leave the adapter out as much.
            calls = (adapted_or_refused(lambda: called(model, x), path) for _ in range(3))
            output = next((output for output in calls if output is not None), None)

        if output is not None:
            with also(as_it_is_read, model, plain, path, layer, x, output):
                close(output, expected, f"{what}: output")
            if mode != "no_grad":
                moves_both(model, layer, output, what, "give what a parent reads with its gradients, not detached")


def as_it_is_read(model: nn.Module, plain: nn.Module, path: str, layer: Any, x: Tensor, output: Tensor) -> str:
    """Whether the output is that without the adapter, and whether that is so in this mode alone."""
    training, kind = model.training, type(model).__name__
    with torch.no_grad():
        linear_at(plain, path).weight.copy_(layer.original_layer.weight)
        if not alike(output, called(plain, x)):
            return f"where {kind} reads {path}.weight in place of calling the layer, W + alpha/rank · B A is wanted"
    elsewhere = ""
    with contextlib.suppress(Exception):
        expected = with_merged_weight(plain.train(not training), path, layer, x)
        if alike(called(model.train(not training), x), expected):
            here, there = ("training", "eval") if training else ("eval", "training")
            elsewhere = f" in {here}; in {there} it counts"
    model.train(training)
    return f"the adapter is ignored{elsewhere}; is {path}.weight read by {kind}, in place of calling the layer?"


@requirement("5.2")
def test_bare_weights_elsewhere_do_not_matter(subject: Subject) -> None:
    """A model may hold layers that are read as bare weights, as long as no target matches them."""
    model = tree({"a": bare("out_proj"), "b": bare("linear1"), "c.q_proj": nn.Linear(5, 4)})

    apply(subject, model, "q_proj")

    adapter_at(model, "c.q_proj")


def moves_both(model: nn.Module, layer: Any, output: Tensor, what: str, hint: str) -> None:
    """A step of training moves A and B."""
    before = value(layer.lora_A), value(layer.lora_B)
    assert output.requires_grad, f"{what}: the output carries no gradient\n{hint}"
    descend(trainable(model), output.square().mean())
    for name, kept in zip(("lora_A", "lora_B"), before, strict=True):
        assert not torch.equal(kept, getattr(layer, name)), f"{what}: a step of training does not move {name}\n{hint}"


def adapted_or_refused(call: Callable[[], Any], path: str) -> Any:
    """What `call` gives; None if it raises TypeError."""
    try:
        return call()
    except TypeError:
        return None
    except AttributeError as error:
        raise AssertionError(
            f"a model whose parent reads {path}.weight: AttributeError ({error}) came\n"
            "give what a parent reads, with gradients, or raise TypeError that says that this layer cannot be adapted"
        ) from error
