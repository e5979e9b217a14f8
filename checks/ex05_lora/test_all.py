"""The specification of ex05, LoRA, as checks."""

import contextlib
import copy
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from harness.testing import (
    Close,
    OwnTest,
    Subject,
    Trace,
    Where,
    halfway,
    is_tensor,
    own_test_checks,
    refuses,
    requirement,
    seed,
    style_checks,
)

IN, OUT, RANK, ALPHA = 11, 7, 3, 5.0
OWN_TEST = OwnTest(
    __file__,
    "test_lora",
    swaps=(
        "LoRALinear",
        "LoRAConfig",
        "apply_lora_to_model",
        "lora_state_dict",
        "count_parameters",
        "compare_fine_tuning",
    ),
    right=("answer", "linear_subclass", "two_linears", "forward_hook"),
)
MATMULS = ("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "matmul", "linear", "_addmm_activation")
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


# What the checks build, and what they expect of it


@dataclass
class Adapter:
    """A LoRALinear of the learner's, and what the check knows of it apart from the learner's code."""

    layer: Any
    weight: Tensor
    bias: Tensor | None
    scaling: float

    def merged_weight(self) -> Tensor:
        """W + alpha/rank · B A, in float64, with A and B as they are now."""
        b, a = (tensor.detach().cpu().double() for tensor in (self.layer.lora_B, self.layer.lora_A))
        return self.weight + self.scaling * b @ a

    def now(self) -> Tensor:
        """original_layer.weight as it is now."""
        return value(self.layer.original_layer.weight)

    def expected(self, x: Tensor) -> Tensor:
        """The formula's output without dropout, in float64, with A and B as they are now."""
        return F.linear(x.detach().double(), self.merged_weight(), self.bias)


def linear(rng: torch.Generator, in_features: int = IN, out_features: int = OUT, bias: bool = True) -> nn.Linear:
    """A float32 linear layer with random weights."""
    made = nn.Linear(in_features, out_features, bias=bias)
    randomize(rng, *made.parameters())
    return made


def randomize(rng: torch.Generator, *tensors: Tensor, scale: float = 0.5) -> None:
    """Writes new random numbers into tensors, in place."""
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(scale * torch.randn(tensor.shape, generator=rng, dtype=torch.float64))


def known(layer: Any, original: nn.Linear, rank: int, alpha: float) -> Adapter:
    """What to expect of `layer`; `original`'s weights count as they are now."""
    bias = None if original.bias is None else original.bias.detach().double().clone()
    return Adapter(layer, original.weight.detach().double().clone(), bias, alpha / rank)


def fresh(
    subject: Subject, original: nn.Linear, rank: int = RANK, alpha: float = ALPHA, dropout: float = 0.0
) -> Adapter:
    """A LoRALinear in its first state, cast to float64."""
    adapter = known(None, original, rank, alpha)
    adapter.layer = subject.LoRALinear(original, rank=rank, alpha=alpha, dropout=dropout)
    matrices(adapter.layer, rank, original.in_features, original.out_features)
    adapter.layer.double()
    return adapter


def build(subject: Subject, rng: torch.Generator, dtype: torch.dtype = torch.float64, **options: Any) -> Adapter:
    """A LoRALinear of random weights whose A and B are random too."""
    adapter = fresh(subject, linear(rng), **options)
    adapter.layer.to(dtype)
    randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)
    return adapter


def matrices(layer: Any, rank: int, in_features: int, out_features: int) -> None:
    """Fails unless lora_A and lora_B have the contract's shapes."""
    for name, shape in (("lora_A", (rank, in_features)), ("lora_B", (out_features, rank))):
        tensor = getattr(layer, name, None)
        what = f"LoRALinear(nn.Linear({in_features}, {out_features}), rank={rank}).{name}"
        assert isinstance(tensor, Tensor), f"{what}: a {type(tensor).__name__} came, a tensor was wanted"
        assert tuple(tensor.shape) == shape, f"{what}: shape {tuple(tensor.shape)} came, {shape} was wanted"


def apply(subject: Subject, model: nn.Module, *targets: str, rank: int = RANK, dropout: float = 0.0) -> Any:
    """The model, adapted in place by the learner's code."""
    config = subject.LoRAConfig(rank=rank, alpha=ALPHA, target_modules=list(targets), dropout=dropout)
    subject.apply_lora_to_model(model, config)
    return model


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """The linear layer at a path of a model of the check's own."""
    layer = model.get_submodule(path)
    assert isinstance(layer, nn.Linear), "the check's own set-up holds"
    return layer


def adapter_at(model: nn.Module, path: str) -> Any:
    """The learner's layer at a path."""
    layer = model.get_submodule(path)
    assert hasattr(layer, "lora_A"), f"apply_lora_to_model: the layer at {path!r} matches a target and is not adapted"
    return layer


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that ask for gradients."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def descend(parameters: Sequence[Tensor], loss: Tensor) -> None:
    """One step of plain gradient descent with rate 1: what a parameter loses is its gradient."""
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad)


def value(tensor: Tensor) -> Tensor:
    """A copy of what a tensor holds now."""
    return tensor.detach().clone()


def tree(paths: dict[str, nn.Module]) -> nn.ModuleDict:
    """A model that holds each module at its path and has no forward."""
    root = nn.ModuleDict()
    for path, module in paths.items():
        *parents, name = path.split(".")
        node: Any = root
        for parent in parents:
            if parent not in node:
                node[parent] = nn.ModuleDict()
            node = node[parent]
        node[name] = module
    return root


class Tiny(nn.Module):
    """Tokens below 5 -> [..., 2], through two layers that are meant to be adapted and four things that are not."""

    def __init__(self, rng: torch.Generator) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.q_proj = nn.Linear(6, 4)
        self.norm = nn.LayerNorm(4)
        self.block = nn.ModuleDict({"v_proj": nn.Linear(4, 3, bias=False)})
        self.scale = nn.Parameter(torch.empty(3))
        self.head = nn.Linear(3, 2)
        randomize(rng, *self.parameters(), scale=0.7)

    def forward(self, tokens: Tensor) -> Tensor:
        """[...] -> [..., 2]."""
        return self.head(self.block["v_proj"](self.norm(self.q_proj(self.embedding(tokens))).tanh()) * self.scale)


TINY_ADAPTERS = RANK * (6 + 4) + RANK * (4 + 3)
TOKENS = ((0, 3, 1), (4, 2, 2))


def tiny_adapters(model: nn.Module) -> list[Any]:
    """The two adapted layers of a Tiny."""
    return [adapter_at(model, path) for path in ("q_proj", "block.v_proj")]


# 5.1 rank, scale, start, gradients


@requirement("5.1")
def test_a_case_by_hand(subject: Subject, close: Close) -> None:
    """Two features, rank 2, alpha 1: W x + 1/2 · B A x."""
    layer = fresh(subject, nn.Linear(2, 2, bias=False), rank=2, alpha=1.0).layer
    with torch.no_grad():
        layer.original_layer.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        layer.lora_A.copy_(torch.tensor([[1.0, -1.0], [0.0, 2.0]]))
        layer.lora_B.copy_(torch.tensor([[3.0, 1.0], [0.0, -1.0]]))

    output = layer(torch.tensor([[4.0, 1.0]], dtype=torch.float64))

    hint = "W x = [6, 1]; A x = [3, 2], B A x = [11, -2], times alpha/rank = 1/2: [5.5, -1]"
    close(output, torch.tensor([[11.5, 0.0]], dtype=torch.float64), "forward([[4, 1]])", hint=hint)


@requirement("5.1")
@pytest.mark.parametrize(("rank", "alpha"), [(1, 2.5), (4, 3), (4, 1.0)])
def test_attributes(subject: Subject, rank: int, alpha: float) -> None:
    """rank, alpha and the layer itself are kept, and scaling is alpha/rank."""
    original = nn.Linear(IN, OUT)
    layer = fresh(subject, original, rank=rank, alpha=alpha).layer

    what = f"LoRALinear(…, rank={rank}, alpha={alpha})"
    for name, wanted in (("rank", rank), ("alpha", alpha), ("scaling", alpha / rank)):
        came = getattr(layer, name, None)
        assert came == wanted, f"{what}.{name}: {came} came, {wanted} was wanted"
    assert layer.original_layer is original, f"{what}.original_layer: not the layer that was given, maybe a copy of it"


@requirement("5.1")
def test_defaults(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Without arguments the rank is 4, alpha 1 and dropout 0."""
    original = linear(rng)
    x = torch.randn(5, IN, generator=rng)
    adapter = known(subject.LoRALinear(original), original, 4, 1.0)
    matrices(adapter.layer, 4, IN, OUT)
    randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)

    output = adapter.layer(x)

    close(
        output, adapter.expected(x).float(), "LoRALinear(layer)(x)", tolerance=1e-5, hint="rank 4, alpha 1, no dropout"
    )


@requirement("5.1")
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_start_is_the_original(subject: Subject, close: Close, rng: torch.Generator, rank: int) -> None:
    """A new adapter changes nothing, because B is zero; A is not."""
    adapter = fresh(subject, linear(rng, 23, 19), rank=rank)
    x = torch.randn(5, 23, generator=rng, dtype=torch.float64)
    expected = F.linear(x, adapter.weight, adapter.bias)

    output = adapter.layer(x)

    close(output, expected, "forward of a new adapter", hint="B starts at zero, so that nothing changes")
    assert not adapter.layer.lora_B.any(), "lora_B of a new adapter: not all zeros"
    a = value(adapter.layer.lora_A)
    assert a.isfinite().all() and a.any(), "lora_A of a new adapter: all zeros; with B zero too, neither ever moves"
    full = int(torch.linalg.matrix_rank(a))
    assert full == rank, (
        f"lora_A of a new adapter: its {rank} rows span {full} dimension(s); rows that are alike stay alike"
    )
    other = value(fresh(subject, linear(rng, 23, 19), rank=rank).layer.lora_A)
    assert not torch.equal(a, other), "lora_A of two new adapters: the same numbers; they are random at the start"


@requirement("5.1")
@pytest.mark.parametrize(("rank", "alpha"), [(1, 2.5), (4, 32.0), (16, 6), (29, -2.5), (2, 0)])
def test_the_formula(subject: Subject, close: Close, rng: torch.Generator, rank: int, alpha: float) -> None:
    """Any rank and alpha give x Wᵀ + b + x Aᵀ Bᵀ · alpha/rank."""
    adapter = fresh(subject, linear(rng, 23, 19), rank=rank, alpha=alpha)
    randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)
    x = torch.randn(5, 23, generator=rng, dtype=torch.float64)
    added = adapter.expected(x) - F.linear(x, adapter.weight, adapter.bias)

    output = is_tensor(adapter.layer(x), "forward(x)")

    what = f"forward(x), rank {rank}, alpha {alpha}"
    hint = ""
    if output.shape == added.shape:
        extra = value(output) - F.linear(x, adapter.weight, adapter.bias)
        factor = float((extra * added).sum() / added.square().sum().clamp(min=1e-12)) * alpha / rank
        hint = f"the adapter adds about {factor:.4g} × x Aᵀ Bᵀ; alpha/rank = {alpha / rank:.4g}"
    close(output, adapter.expected(x), what, hint=hint)


@requirement("5.1")
def test_agrees_with_a_merged_linear_layer(subject: Subject, close: Close, rng: torch.Generator, on: Where) -> None:
    """Output and gradient of x equal those of a plain layer with the weight W + alpha/rank · B A."""
    adapter = build(subject, rng, on.dtype)
    adapter.layer.to(on.device)
    plain = nn.Linear(IN, OUT, device=on.device, dtype=on.dtype)
    with torch.no_grad():
        plain.weight.copy_(adapter.merged_weight())
        plain.bias.copy_(adapter.layer.original_layer.bias)
    x = torch.randn(5, IN, generator=rng).to(on.device, on.dtype)
    ours, theirs = value(x).requires_grad_(), value(x).requires_grad_()
    expected = plain(theirs)
    expected.sum().backward()

    output = is_tensor(adapter.layer(ours), "forward(x)")
    output.sum().backward()

    close(output, expected, "forward(x)")
    close(ours.grad, is_tensor(theirs.grad, ""), "backward: gradient of x", hint="x reaches the output by W and by A")


@requirement("5.1")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_new_weights_count_at_once(subject: Subject, close: Close, rng: torch.Generator, training: bool) -> None:
    """A call after W, A or B have changed uses the new ones."""
    adapter = build(subject, rng)
    x = torch.randn(5, IN, generator=rng, dtype=torch.float64)
    with torch.set_grad_enabled(training):
        adapter.layer.train(training)(x)
        for name in ("lora_A", "lora_B"):
            randomize(rng, getattr(adapter.layer, name))

            output = adapter.layer(x)

            close(
                output,
                adapter.expected(x),
                f"forward(x) after {name} has changed",
                hint="something is kept from before",
            )
        for name, known_one in (("weight", adapter.weight), ("bias", adapter.bias)):
            with torch.no_grad():
                for tensor in (is_tensor(known_one, ""), getattr(adapter.layer.original_layer, name)):
                    tensor.mul_(-0.7)
            close(adapter.layer(x), adapter.expected(x), f"forward(x) after original_layer.{name} has changed")


@requirement("5.1")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_reach_x_and_both_matrices(
    subject: Subject, close: Close, rng: torch.Generator, training: bool
) -> None:
    """One step of gradient descent moves A and B by the formula's gradients, and x gets its own."""
    adapter = build(subject, rng)
    x = torch.randn(2, 3, IN, generator=rng, dtype=torch.float64, requires_grad=True)
    a, b = (value(tensor).requires_grad_() for tensor in (adapter.layer.lora_A, adapter.layer.lora_B))
    probe = torch.randn(2, 3, OUT, generator=rng, dtype=torch.float64)
    (F.linear(x, adapter.weight + adapter.scaling * b @ a) * probe).sum().backward()
    given = value(x).requires_grad_()

    output = is_tensor(adapter.layer.train(training)(given), "forward(x)")
    assert output.requires_grad, "forward(x): the output carries no gradient"
    descend(trainable(adapter.layer), (output * probe).sum())

    hint = "is something detached, or wrapped in no_grad?"
    for name, leaf in (("lora_B", b), ("lora_A", a)):
        moved = leaf.detach() - value(getattr(adapter.layer, name))
        close(moved, is_tensor(leaf.grad, ""), f"backward: gradient of {name}", hint=hint)
    close(
        given.grad, is_tensor(x.grad, ""), "backward: gradient of x", hint=f"x reaches the output by W and by A; {hint}"
    )


@requirement("5.1")
def test_gradients_with_dropout(subject: Subject, rng: torch.Generator) -> None:
    """With the same elements dropped, the output moves as its gradients say; it is linear in each of x, A and B."""
    layer = build(subject, rng, dropout=0.4).layer.train()
    layer.original_layer.requires_grad_(False)
    x = torch.randn(2, 3, IN, generator=rng, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(2, 3, OUT, generator=rng, dtype=torch.float64)

    def probed() -> Tensor:
        seed(7)
        return (is_tensor(layer(x), "forward(x) in training") * probe).sum()

    tensors = {"x": x, "lora_A": layer.lora_A, "lora_B": layer.lora_B}
    before = {name: value(tensor) for name, tensor in tensors.items()}
    start = probed()
    descend([x, *trainable(layer)], start)
    steps = {name: before[name] - value(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        along = torch.randn(tensor.shape, generator=rng, dtype=torch.float64)
        with torch.no_grad():
            for other, kept in before.items():
                tensors[other].copy_(kept)
            tensor.add_(along)
        moved = float((probed() - start).detach())

        wanted = float((steps[name] * along).sum())
        assert abs(moved - wanted) < 1e-6 * (1 + abs(moved)), (
            f"backward in training, dropout 0.4: gradient of {name}: the output moves by {moved:.6g}, "
            f"the gradient says {wanted:.6g}\nis something detached, or wrapped in no_grad?"
        )


@requirement("5.1")
def test_a_freshly_adapted_model_is_the_original(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """What apply_lora_to_model gives computes what the model did before."""
    model, tokens = Tiny(rng), torch.tensor(TOKENS)
    expected = value(model(tokens))

    apply(subject, model, "q_proj", "v_proj")

    adapter_at(model, "q_proj")
    close(model(tokens), expected, "output of a freshly adapted model", tolerance=1e-5, hint="B starts at zero")


@requirement("5.1")
def test_the_first_two_steps(subject: Subject, rng: torch.Generator) -> None:
    """From the start the first step moves B, whose zeros hold A's gradient back, and the second moves A."""
    layer = fresh(subject, linear(rng)).layer
    x = torch.randn(5, IN, generator=rng, dtype=torch.float64)
    start = value(layer.lora_A)

    descend(trainable(layer), layer(x).square().mean())
    first = value(layer.lora_B)
    descend(trainable(layer), layer(x).square().mean())

    assert first.any(), "training: lora_B is still zero after the first step; is A zero too, or B no parameter?"
    moved = (value(layer.lora_A) - start).abs().amax(dim=1)
    assert moved.gt(0).all(), "training: lora_A, or a row of it, has not moved after the second step"


@requirement("5.1")
@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_below_1_is_refused(subject: Subject, rng: torch.Generator, rank: int) -> None:
    """A rank below 1 is a ValueError, at the latest from apply_lora_to_model."""
    model = Tiny(rng)

    refuses(ValueError, lambda: apply(subject, model, "q_proj", rank=rank), f"apply_lora_to_model with rank {rank}")


# 5.2 any layer, exactly those that match


@requirement("5.2")
@pytest.mark.parametrize(
    ("shape", "bias"),
    [((IN,), True), ((5, IN), True), ((5, IN), False), ((2, 3, IN), True), ((2, 1, 3, IN), False), ((0, IN), True)],
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
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_strided_inputs_are_read_and_not_written(
    subject: Subject, close: Close, rng: torch.Generator, training: bool
) -> None:
    """Transposed, sliced and expanded views are as good as copies, and stay as they are."""
    adapter, dropping = build(subject, rng), build(subject, rng, dropout=0.4)
    base = torch.randn(IN, 6, 2, generator=rng, dtype=torch.float64)
    row = torch.randn(1, IN, generator=rng, dtype=torch.float64)
    views = {"transposed": base.permute(2, 1, 0), "sliced": base[:, ::2, 1].T, "expanded": row.expand(4, IN)}
    for name, x in views.items():
        before = x.clone()

        output = adapter.layer.train(training)(x)
        dropping.layer.train(training)(x)

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
    what = f"apply_lora_to_model with targets {targets}"
    extra, missing = sorted(adapted - set(matched)), sorted(set(matched) - adapted)
    assert not extra, f"{what}: {extra} are adapted too; a target equals the last part of a path, or the whole path"
    assert not missing, f"{what}: {missing} are not adapted; a target equals the last part of a path, or the whole path"


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
    """rank and alpha of the config reach every adapted layer."""
    model = tree({"a.q_proj": linear(rng), "b.c.q_proj": linear(rng, bias=False)})
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
    assert config.target_modules == targets, f"apply_lora_to_model changes config.target_modules {targets}"
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
    refuses(ValueError, lambda: apply(subject, model, *targets), what, *targets)
    with pytest.raises(ValueError) as raised:
        apply(subject, model, *targets)
    text = str(raised.value)
    assert "widen" in text or "narrow" in text.replace("narrow_up", ""), (
        f"{what}: the ValueError says {text!r}; it names none of the model's linear layers, trunk.widen and narrow"
    )


@requirement("5.2")
def test_no_targets_are_no_default(subject: Subject) -> None:
    """An empty target list matches nothing; the default stands in for None alone."""
    model = tree({"q_proj": nn.Linear(5, 4)})

    refuses(ValueError, lambda: apply(subject, model), "apply_lora_to_model with targets []", "q_proj")


@requirement("5.2")
def test_a_model_without_linear_layers_is_refused(subject: Subject) -> None:
    """Where there is no linear layer at all, nothing matches."""
    model = tree({"q_proj": nn.Embedding(5, 4), "b.v_proj": nn.Conv1d(5, 4, 1)})

    what = "apply_lora_to_model on a model without linear layers"
    refuses(ValueError, lambda: apply(subject, model, "q_proj", "v_proj"), what, "q_proj", "v_proj")


@requirement("5.2")
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("q_proj", "v_proj"),
        ("a.q_proj", "b.q_proj"),
        ("a.q_proj", "a.b.v_proj"),
        ("blocks.0.q_proj", "blocks.1.q_proj"),
    ],
    ids=["one_parent", "two_parents", "two_depths", "shared_block"],
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
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("path", ["out_proj", "linear1", "linear2"])
def test_a_bare_weight_works_or_is_refused(
    subject: Subject, close: Close, rng: torch.Generator, path: str, mode: str
) -> None:
    """A layer whose weight its parent reads is adapted in every mode, with gradients, or refused by a TypeError."""
    model, x = bare(path, bias=mode != "eval"), torch.randn(3, 5, 8, generator=rng, dtype=torch.float64)
    plain = copy.deepcopy(model).double().train(mode == "train")
    layer = adapted_or_refused(lambda: adapter_at(apply(subject, model, path), path), path)
    if layer is None:
        return
    randomize(rng, layer.lora_A, layer.lora_B)
    model.double().train(mode == "train")

    with torch.set_grad_enabled(mode != "no_grad"):
        output = adapted_or_refused(lambda: called(model, x), path)

    if output is not None:
        what = f"{type(model).__name__} with an adapted {path}, {mode}"
        hint = f"{type(model).__name__} reads {path}.weight in place of calling the layer, so the adapter is ignored"
        close(output, with_merged_weight(plain, path, layer, x), f"{what}: output", hint=hint)
        if mode != "no_grad":
            moves_both(model, layer, output, what, hint)


@requirement("5.2")
def test_bare_weights_elsewhere_do_not_matter(subject: Subject) -> None:
    """A model may hold layers that are read as bare weights, as long as no target matches them."""
    model = tree({"a": bare("out_proj"), "b": bare("linear1"), "c.q_proj": nn.Linear(5, 4)})

    apply(subject, model, "q_proj")

    adapter_at(model, "c.q_proj")


def with_merged_weight(plain: nn.Module, path: str, layer: Any, x: Tensor) -> Tensor:
    """What a module without adapters gives once the adapter's product is in its weight."""
    original = linear_at(plain, path)
    with torch.no_grad():
        original.weight.copy_(known(layer, original, RANK, ALPHA).merged_weight())
        return called(plain, x)


def moves_both(model: nn.Module, layer: Any, output: Tensor, what: str, hint: str) -> None:
    """A step of training moves A and B."""
    before = value(layer.lora_A), value(layer.lora_B)
    assert output.requires_grad, f"{what}: the output carries no gradient\n{hint}"
    descend(trainable(model), output.square().mean())
    for name, kept in zip(("lora_A", "lora_B"), before, strict=True):
        assert not torch.equal(kept, getattr(layer, name)), f"{what}: a step of training does not move {name}\n{hint}"


def bare(path: str, bias: bool = True) -> nn.Module:
    """A module that reads the weight of the layer at `path`; one without biases reads out_proj's alone."""
    seed(3)
    if path == "out_proj":
        return nn.MultiheadAttention(8, 2, bias=bias, batch_first=True)
    return nn.TransformerEncoderLayer(8, 2, dim_feedforward=13, dropout=0.0, batch_first=True)


def called(model: nn.Module, x: Tensor) -> Tensor:
    """Self-attention or an encoder layer, called."""
    output: Tensor = model(x, x, x, need_weights=False)[0] if isinstance(model, nn.MultiheadAttention) else model(x)
    return output


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


# 5.3 what stays


@requirement("5.3")
def test_the_adapters_alone_are_trainable(subject: Subject, rng: torch.Generator) -> None:
    """Nothing else in the model asks for gradients: no adapted weight, no bias, no other layer."""
    model = Tiny(rng)
    names = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}

    apply(subject, model, "q_proj", "v_proj")

    asking = {parameter.data_ptr() for parameter in trainable(model)}
    wanted = {tensor.data_ptr() for layer in tiny_adapters(model) for tensor in (layer.lora_A, layer.lora_B)}
    more = sorted(names.get(pointer, "a parameter that was not there before") for pointer in asking - wanted)
    assert not more, f"apply_lora_to_model: trainable besides lora_A and lora_B: {more}"
    assert asking == wanted, (
        f"apply_lora_to_model: {len(wanted - asking)} of {len(wanted)} matrices A and B are not trainable"
    )


@requirement("5.3")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_training_leaves_every_other_byte(subject: Subject, rng: torch.Generator, training: bool) -> None:
    """Steps with momentum and weight decay over all parameters move A and B and nothing else."""
    model = Tiny(rng)
    before = {name: (parameter, value(parameter)) for name, parameter in model.named_parameters()}
    apply(subject, model, "q_proj", "v_proj")
    layers = tiny_adapters(model)
    starts = [value(tensor) for layer in layers for tensor in (layer.lora_A, layer.lora_B)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)

    for _ in range(3):
        optimizer.zero_grad()
        model.train(training)(torch.tensor(TOKENS)).square().mean().backward()
        optimizer.step()

    for name, (parameter, kept) in before.items():
        assert torch.equal(parameter, kept), f"after 3 steps of AdamW: {name} has changed"
    for path, layer in zip(("q_proj", "block.v_proj"), layers, strict=True):
        kept = before[f"{path}.weight"][1]
        assert torch.equal(layer.original_layer.weight, kept), (
            f"after 3 steps of AdamW: {path}.original_layer.weight has changed"
        )
    ends = [tensor for layer in layers for tensor in (layer.lora_A, layer.lora_B)]
    stuck = sum(torch.equal(start, end) for start, end in zip(starts, ends, strict=True))
    assert not stuck, f"after 3 steps of AdamW: {stuck} of {len(ends)} matrices A and B have not moved"


@requirement("5.3")
def test_what_was_frozen_before_stays_frozen(subject: Subject, rng: torch.Generator) -> None:
    """A model that came frozen, in part or as a whole, trains its adapters and nothing else."""
    model = Tiny(rng).requires_grad_(False).eval()
    model.head.requires_grad_(True)

    apply(subject, model, "q_proj", "v_proj")

    asking = sum(parameter.numel() for parameter in trainable(model))
    what = "apply_lora_to_model on a model that is frozen but for its head"
    assert asking == TINY_ADAPTERS, f"{what}: {asking} numbers are trainable, {TINY_ADAPTERS} are the adapters'"


# 5.4 size and cost


@requirement("5.4")
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_what_adapters_add(subject: Subject, rng: torch.Generator, rank: int) -> None:
    """Each adapter adds rank·(in + out) trainable numbers, no more, and no copy of W."""
    model = Tiny(rng)
    old = {parameter.data_ptr() for parameter in model.parameters()}

    apply(subject, model, "q_proj", "v_proj", rank=rank)

    tiny_adapters(model)
    added = sum(parameter.numel() for parameter in trainable(model) if parameter.data_ptr() not in old)
    wanted = rank * (6 + 4) + rank * (4 + 3)
    assert added == wanted, (
        f"apply_lora_to_model, rank {rank}, layers 6 -> 4 and 4 -> 3: {added} new trainable numbers came, "
        f"{wanted} = Σ rank·(in + out) were wanted"
    )
    new = {held.data_ptr(): held for held in (*model.parameters(), *model.buffers()) if held.data_ptr() not in old}
    frozen = sum(held.numel() for held in new.values()) - added
    assert frozen < 4 * 3, (
        f"apply_lora_to_model, layers 6 -> 4 and 4 -> 3: {frozen} new numbers came that are not trained; is W copied?"
    )


@requirement("5.4")
def test_count_parameters(subject: Subject, rng: torch.Generator) -> None:
    """All parameters, and those that ask for gradients."""
    model = Tiny(rng)
    wanted = 5 * 6 + (6 * 4 + 4) + 2 * 4 + 4 * 3 + 3 + (3 * 2 + 2)

    counted(subject, model, wanted, wanted, "Tiny, all trainable")
    model.q_proj.requires_grad_(False)
    counted(subject, model, wanted, wanted - 28, "Tiny, 28 numbers frozen")
    model.requires_grad_(False)
    counted(subject, model, wanted, 0, "Tiny, all frozen")


@requirement("5.4")
def test_count_parameters_counts_shared_ones_once(subject: Subject) -> None:
    """A tied weight, and a layer registered twice, are there once; a frozen one, too."""
    tied = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    tied["head"].weight = tied["embedding"].weight
    layer = nn.Linear(4, 2)
    twice = nn.ModuleList([layer, nn.ModuleList([layer]), nn.Linear(2, 3).requires_grad_(False)])

    counted(subject, tied, 15 + 5, 15 + 5, "an embedding and a head with one weight")
    counted(subject, twice, 10 + 9, 10, "a layer that is registered twice")


@requirement("5.4")
def test_count_parameters_leaves_buffers_out(subject: Subject) -> None:
    """Running statistics are no parameters; a module without parameters has none."""
    counted(subject, nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 2)), 10 + 12, 10 + 12, "a batch norm and a layer")
    counted(subject, nn.ReLU(), 0, 0, "a module without parameters")
    counted(subject, nn.Linear(4, 2, device="meta"), 10, 10, "a layer on meta, where all addresses are 0")


@requirement("5.4")
def test_count_parameters_of_an_adapted_model(subject: Subject, rng: torch.Generator) -> None:
    """The numbers equal a count of the model's own parameters."""
    model = apply(subject, Tiny(rng), "q_proj", "v_proj")
    tiny_adapters(model)
    total = sum(parameter.numel() for parameter in model.parameters())

    counted(subject, model, total, sum(parameter.numel() for parameter in trainable(model)), "an adapted model")


def counted(subject: Subject, model: nn.Module, total: int, asking: int, what: str) -> None:
    """count_parameters gives the pair that is wanted."""
    came = subject.count_parameters(model)

    assert isinstance(came, tuple) and len(came) == 2 and all(type(number) is int for number in came), (
        f"count_parameters: {came!r} came, a pair of integers (all, trainable) was wanted"
    )
    assert came == (total, asking), (
        f"count_parameters({what}): {tuple(came)} came, {(total, asking)} was wanted\n"
        "(all, trainable); shared parameters count once, buffers never"
    )


@requirement("5.4")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_forward_makes_nothing_as_large_as_the_weight(
    subject: Subject, close: Close, rng: torch.Generator, grad: bool, training: bool
) -> None:
    """x goes through the thin matrices one after the other: neither B A nor a copy of W is made."""
    x = torch.randn(2, 3, 31, generator=rng, dtype=torch.float64)
    for dropout in (0.0, 0.3):
        adapter = fresh(subject, linear(rng, 31, 29), dropout=dropout)
        randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)
        adapter.layer.train(training)

        with torch.set_grad_enabled(grad), Trace() as seen:
            output = adapter.layer(x)

        if not dropout:
            close(output, adapter.expected(x), "forward(x)")
        assert seen.largest < 31 * 29, (
            f"forward: a tensor of {seen.largest} elements is made; W has out·in = {31 * 29}\n"
            "multiply x by Aᵀ, and the result by Bᵀ: B A is as large as W"
        )


# 5.5 merging


@halfway
@requirement("5.5")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_the_merged_weight(subject: Subject, close: Close, rng: torch.Generator, bias: bool) -> None:
    """While merged, original_layer.weight is W + alpha/rank · B A, and the bias is what it was."""
    adapter = fresh(subject, linear(rng, bias=bias))
    randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)
    wanted = adapter.merged_weight()

    adapter.layer.merge_weights()

    hint = "W + alpha/rank · B A: scaled once, not transposed"
    close(adapter.now(), wanted, "original_layer.weight after merge_weights", hint=hint)
    if adapter.bias is not None:
        close(value(adapter.layer.original_layer.bias), adapter.bias, "original_layer.bias after merge_weights")


@requirement("5.5")
def test_the_merged_weight_of_a_square_layer(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Where in = out, a transposed product fits, and is wrong."""
    adapter = fresh(subject, linear(rng, IN, IN), rank=13, alpha=-2.0)
    randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)
    wanted = adapter.merged_weight()

    adapter.layer.merge_weights()

    hint = "W + alpha/rank · B A; (B A)ᵀ = Aᵀ Bᵀ fits where in = out, and is wrong"
    close(adapter.now(), wanted, "original_layer.weight after merge_weights", hint=hint)


@requirement("5.5")
@pytest.mark.parametrize(("training", "scale"), [(False, 0.1), (True, 1.0), (False, 30.0)])
def test_merging_changes_no_output(
    subject: Subject, close: Close, rng: torch.Generator, training: bool, scale: float
) -> None:
    """Merged and unmerged outputs agree within 1e-6 · max(1, largest output) in float32."""
    adapter = build(subject, rng, torch.float32)
    x = scale * torch.randn(5, IN, generator=rng)
    expected = adapter.expected(x)
    close(value(adapter.layer.train(training)(x)), expected.float(), "forward(x), unmerged", tolerance=1e-5)

    adapter.layer.merge_weights()

    with torch.no_grad():
        output = is_tensor(adapter.layer(x), "forward(x), merged")
    gap = float((output.double() - expected).abs().max())
    limit = 1e-6 * max(1.0, float(expected.abs().max()))
    assert gap <= limit, (
        f"forward(x), merged: off by {gap:.3g} from the unmerged output; at most {limit:.3g} is asked for\n"
        "W + alpha/rank · B A, added once, in the layer's own dtype; the adapter is not added again"
    )


@requirement("5.5")
@pytest.mark.parametrize(("training", "dropout"), [(False, 0.0), (True, 0.5)], ids=["eval", "train"])
def test_a_merged_layer_costs_one_matrix_product(
    subject: Subject, close: Close, rng: torch.Generator, training: bool, dropout: float
) -> None:
    """While merged, forward multiplies matrices once, drops nothing out in either mode, and x gets its gradient."""
    adapter = build(subject, rng, dropout=dropout)
    x = torch.randn(2, 3, IN, generator=rng, dtype=torch.float64, requires_grad=True)
    expected, merged = adapter.expected(x), adapter.merged_weight()
    adapter.layer.train(not training).merge_weights()
    adapter.layer.train(training)

    with Trace() as seen:
        output = adapter.layer(x)

    close(output, expected, "forward(x), merged")
    products = sum(seen.operations[name] for name in MATMULS)
    assert products == 1, (
        f"forward(x), merged: {products} matrix products are made, 1 is wanted; the adapter is in W already"
    )
    output.sum().backward()
    close(x.grad, merged.sum(0).expand_as(x), "backward, merged: gradient of x")
    close(adapter.now(), merged, "original_layer.weight, merged, after a change of mode and a call")


@requirement("5.5")
def test_merging_twice_is_merging_once(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A second merge adds nothing, and one unmerge undoes both; a second one does nothing."""
    adapter = build(subject, rng)
    merged = adapter.merged_weight()

    adapter.layer.merge_weights()
    adapter.layer.merge_weights()
    close(adapter.now(), merged, "original_layer.weight after merging twice", hint="B A is added twice")
    for times in ("once", "twice"):
        adapter.layer.unmerge_weights()
        what = f"original_layer.weight after merging twice and unmerging {times}"
        close(adapter.now(), adapter.weight, what, tolerance=0)


@requirement("5.5")
def test_unmerging_what_is_not_merged_does_nothing(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A new layer may be unmerged; it goes on working."""
    adapter = build(subject, rng)
    x = torch.randn(5, IN, generator=rng, dtype=torch.float64)

    adapter.layer.unmerge_weights()

    close(adapter.now(), adapter.weight, "original_layer.weight after unmerging alone", tolerance=0)
    close(adapter.layer(x), adapter.expected(x), "forward(x) after unmerging what was not merged")


@requirement("5.5")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_unmerging_restores_every_bit(subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype) -> None:
    """The original weights come back exactly, after each of several merges."""
    adapter = build(subject, rng, dtype)
    kept = adapter.now()
    for _ in range(2):
        wanted = adapter.merged_weight().to(dtype)
        adapter.layer.merge_weights()
        merged = adapter.now()
        # bfloat16 rounds each of the product, its scaling and the sum to 8 bits.
        close(
            merged,
            wanted,
            f"original_layer.weight in {dtype}, merged",
            tolerance=5e-2 if dtype == torch.bfloat16 else 5e-6,
        )

        adapter.layer.unmerge_weights()

        hint = "subtracting what was added rounds: keep the weights and give them back"
        close(adapter.now(), kept, f"original_layer.weight in {dtype}, unmerged", tolerance=0, hint=hint)
        randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)


@requirement("5.5")
def test_the_adapter_survives_a_merge(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """After merging, and after unmerging, A and B hold what they held, and the output is the same."""
    adapter = build(subject, rng)
    x = torch.randn(5, IN, generator=rng, dtype=torch.float64)
    expected, a, b = adapter.expected(x), value(adapter.layer.lora_A), value(adapter.layer.lora_B)

    for act in ("merge_weights", "unmerge_weights"):
        getattr(adapter.layer, act)()

        hint = "A and B stay as they are: the next unmerge or merge needs them"
        close(value(adapter.layer.lora_A), a, f"lora_A after {act}", tolerance=0, hint=hint)
        close(value(adapter.layer.lora_B), b, f"lora_B after {act}", tolerance=0, hint=hint)
        close(adapter.layer(x), expected, f"forward(x) after {act}")
        assert adapter.layer.training, f"{act}: the layer was in training, and is in eval"


@requirement("5.5")
def test_training_goes_on_after_unmerging(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """An optimizer that was built before a merge still moves A and B after it, by the formula's gradients."""
    adapter = build(subject, rng)
    x = torch.randn(5, IN, generator=rng, dtype=torch.float64)
    probe = torch.randn(5, OUT, generator=rng, dtype=torch.float64)
    parameters = trainable(adapter.layer)
    a, b = (value(tensor).requires_grad_() for tensor in (adapter.layer.lora_A, adapter.layer.lora_B))
    (adapter.scaling * (x @ a.T @ b.T) * probe).sum().backward()

    adapter.layer.merge_weights()
    adapter.layer.unmerge_weights()
    descend(parameters, (is_tensor(adapter.layer(x), "forward(x)") * probe).sum())

    hint = "lora_A and lora_B stay the same parameters: an optimizer holds them"
    for name, leaf in (("lora_A", a), ("lora_B", b)):
        moved = leaf.detach() - value(getattr(adapter.layer, name))
        close(moved, is_tensor(leaf.grad, ""), f"a step after merging and unmerging: gradient of {name}", hint=hint)


@requirement("5.5")
def test_merging_again_uses_what_is_new(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A second merge takes A, B and W as they are by then, and unmerging gives the W of then."""
    adapter = build(subject, rng)
    x = torch.randn(5, IN, generator=rng, dtype=torch.float64)
    adapter.layer.merge_weights()
    adapter.layer.unmerge_weights()
    randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)

    adapter.layer.merge_weights()
    close(
        adapter.layer(x),
        adapter.expected(x),
        "forward(x), merged again with new A and B",
        hint="the first merge's sum is kept",
    )
    adapter.layer.unmerge_weights()
    adapter.weight.mul_(-0.7)
    with torch.no_grad():
        adapter.layer.original_layer.weight.mul_(-0.7)
    adapter.layer.merge_weights()
    close(
        adapter.layer(x), adapter.expected(x), "forward(x), merged again with a new W", hint="an old copy of W is kept"
    )
    adapter.layer.unmerge_weights()
    hint = "W has changed since the layer was built; an old copy of it came back"
    close(adapter.now(), adapter.weight, "original_layer.weight, unmerged again", tolerance=0, hint=hint)


@requirement("5.5")
def test_a_shared_embedding_stays_unchanged(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Merging a head leaves the embedding alone whose weight it shares."""
    model = tree({"embedding": nn.Embedding(OUT, IN), "head": linear(rng)})
    model["embedding"].weight = model["head"].weight
    kept = value(linear_at(model, "head").weight)
    layer = adapter_at(apply(subject, model, "head"), "head")
    randomize(rng, layer.lora_A, layer.lora_B)
    wanted = kept + ALPHA / RANK * value(layer.lora_B) @ value(layer.lora_A)

    layer.merge_weights()

    hint = "another module shares this tensor: give the merged layer one of its own, do not write into the shared one"
    close(value(layer.original_layer.weight), wanted, "head.original_layer.weight, merged", tolerance=5e-6)
    every = torch.arange(OUT)
    close(value(model["embedding"](every)), kept, "embedding, while the head is merged", tolerance=0, hint=hint)
    layer.unmerge_weights()
    close(value(model["embedding"](every)), kept, "embedding, after the head is unmerged", tolerance=0, hint=hint)


@requirement("5.5")
def test_two_layers_that_share_a_weight_merge_apart(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Each has its own adapter; merged and unmerged in any order, neither touches the other."""
    model = tree({"a.head": linear(rng), "b.head": linear(rng)})
    linear_at(model, "b.head").weight = linear_at(model, "a.head").weight
    kept = value(linear_at(model, "a.head").weight)
    apply(subject, model, "head")
    first, second = (adapter_at(model, path) for path in ("a.head", "b.head"))
    randomize(rng, first.lora_A, first.lora_B, second.lora_A, second.lora_B)
    sums = [kept + ALPHA / RANK * value(layer.lora_B) @ value(layer.lora_A) for layer in (first, second)]

    for layer, act, wanted in (
        (first, "merge_weights", (sums[0], kept)),
        (second, "merge_weights", tuple(sums)),
        (first, "unmerge_weights", (kept, sums[1])),
        (second, "unmerge_weights", (kept, kept)),
    ):
        getattr(layer, act)()
        for name, head, weight in zip(("first", "second"), (first, second), wanted, strict=True):
            which = "first" if layer is first else "second"
            what = f"two layers with one weight, {act} of the {which}: the {name}'s weight"
            close(value(head.original_layer.weight), weight, what, tolerance=5e-6)


@requirement("5.5")
def test_merging_leaves_trainable_what_is_trainable(subject: Subject, rng: torch.Generator) -> None:
    """While merged nothing else asks for gradients, and after unmerging the same parameters do as before."""
    model = apply(subject, Tiny(rng), "q_proj", "v_proj")
    before = {parameter.data_ptr() for parameter in trainable(model)}

    for layer in tiny_adapters(model):
        layer.merge_weights()
    more = sorted(
        name for name, held in model.named_parameters() if held.requires_grad and held.data_ptr() not in before
    )
    assert not more, f"while merged: {more} are trainable; a new nn.Parameter asks for gradients"
    for layer in tiny_adapters(model):
        layer.unmerge_weights()

    after = {parameter.data_ptr() for parameter in trainable(model)}
    more = sorted(name for name, parameter in model.named_parameters() if parameter.data_ptr() in after - before)
    assert not more, f"after merging and unmerging: {more} have become trainable; a new nn.Parameter asks for gradients"
    assert after == before, f"after merging and unmerging: {len(before - after)} matrices are no longer trainable"


@requirement("5.5")
def test_merging_after_a_cast(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A layer that was merged in float32 merges in float64 with float64's precision."""
    adapter = build(subject, rng, torch.float32)
    adapter.layer.merge_weights()
    adapter.layer.unmerge_weights()

    adapter.layer.double().merge_weights()

    what = "original_layer.weight, merged after .double()"
    hint = "something of the first merge, in float32, is kept"
    close(adapter.now(), adapter.merged_weight(), what, hint=hint)


@requirement("5.5")
@pytest.mark.parametrize("path", ["out_proj", "linear1"])
def test_a_merged_bare_weight(subject: Subject, close: Close, rng: torch.Generator, path: str) -> None:
    """Where a parent may read the weight, a merged one holds B A once. Whether it can be adapted at all is 5.2's."""
    model, x = bare(path).eval(), torch.randn(3, 5, 8, generator=rng)
    plain = copy.deepcopy(model)
    with contextlib.suppress(TypeError, AttributeError, ValueError), torch.no_grad():
        layer = apply(subject, model, path).get_submodule(path)
        randomize(rng, layer.lora_A, layer.lora_B)
        expected = with_merged_weight(plain, path, layer, x)
        layer.merge_weights()
        for training in (True, False):
            output = called(model.train(training), x)

            what = f"{type(model).__name__} with a merged {path}, training {training}"
            close(output, expected, what, tolerance=1e-5, hint="while merged the weight holds B A already")


# 5.6 the comparison


@dataclass
class Seen:
    """What an optimizer was seen to hold after its last step, and the model that it trains."""

    adamw: bool
    steps: int = 0
    trainable_parameters: int = 0
    optimizer_bytes: int = 0
    gradient_bytes: int = 0
    all_parameters: int = 0
    adapter_parameters: int = 0
    adapted: bool = False


@contextlib.contextmanager
def optimizers(kind: type[nn.Module]) -> Iterator[dict[Optimizer, Seen]]:
    """Notes what each optimizer holds, after each of its steps, and on which model of `kind`, whoever made them."""
    seen: dict[Optimizer, Seen] = {}
    models: list[nn.Module] = []

    def before_forward(module: nn.Module, _: Any) -> None:
        if isinstance(module, kind) and module not in models:
            models.append(module)

    def after_step(optimizer: Optimizer, *_: Any) -> None:
        note = seen.setdefault(optimizer, Seen(isinstance(optimizer, torch.optim.AdamW)))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = [held for values in optimizer.state.values() for held in values.values() if isinstance(held, Tensor)]
        note.steps += 1
        note.trainable_parameters = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        note.optimizer_bytes = sum(held.numel() * held.element_size() for held in state)
        note.gradient_bytes = sum(p.grad.numel() * p.grad.element_size() for p in parameters if p.grad is not None)
        trained = {id(parameter) for parameter in parameters if parameter.requires_grad}
        for model in [m for m in models if trained & {id(parameter) for parameter in m.parameters()}][-1:]:
            note.all_parameters = sum(parameter.numel() for parameter in model.parameters())
            adapters: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
            sizes = {m.data_ptr(): m.numel() for module in adapters for m in (module.lora_A, module.lora_B)}
            note.adapted, note.adapter_parameters = bool(adapters), sum(sizes.values())

    handles = [register_module_forward_pre_hook(before_forward), register_optimizer_step_post_hook(after_step)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def compared(subject: Subject, steps: int) -> dict[str, tuple[dict[str, Any], Seen]]:
    """What compare_fine_tuning says of each run, beside what was seen of it."""
    what = f"compare_fine_tuning({steps})"
    with optimizers(subject.SimpleTransformer) as seen:
        result = subject.compare_fine_tuning(steps)

    assert isinstance(result, dict) and all(isinstance(result.get(name), dict) for name in ("full", "lora")), (
        f"{what}: {result!r:.80} came, a dict with the dicts 'full' and 'lora' was wanted"
    )
    assert seen, f"{what}: no optimizer of torch.optim made a step"
    assert all(note.adamw for note in seen.values()), f"{what}: an optimizer that is no torch.optim.AdamW made a step"
    notes = sorted(seen.values(), key=lambda note: note.steps)
    runs = {"full": [n for n in notes if not n.adapted], "lora": [n for n in notes if n.adapted]}
    assert runs["full"], f"{what}: every run trains an adapted model; one without adapters was wanted"
    assert runs["lora"], f"{what}: no run trains an adapted SimpleTransformer; one with adapters was wanted"
    return {name: (result[name], runs[name][-1]) for name in ("full", "lora")}


@requirement("5.6")
def test_one_run_trains_everything_and_one_the_adapters(subject: Subject) -> None:
    """One run trains every parameter of a SimpleTransformer, the other adapters on one of the same sizes."""
    runs = compared(subject, 1)
    full, lora = (runs[name][1] for name in ("full", "lora"))

    assert full.trainable_parameters == full.all_parameters, (
        f"compare_fine_tuning(1): the full run trains {full.trainable_parameters} numbers; "
        f"its SimpleTransformer has {full.all_parameters}, and full fine-tuning trains them all"
    )
    base, adapters = lora.all_parameters - lora.adapter_parameters, lora.adapter_parameters
    assert base == full.all_parameters, (
        f"compare_fine_tuning(1): the lora run's model has {base} numbers besides its adapters, "
        f"the full run's has {full.all_parameters}; the same sizes are wanted"
    )
    # That nothing else is trained is 5.3's.
    assert lora.trainable_parameters >= adapters, (
        f"compare_fine_tuning(1): the lora run trains {lora.trainable_parameters} numbers; its adapters hold {adapters}"
    )


@requirement("5.6")
def test_the_numbers_are_those_of_the_run(subject: Subject) -> None:
    """What is reported equals what the optimizer held after its last step."""
    hints = {
        "trainable_parameters": "the numbers that the run's optimizer trains",
        "optimizer_bytes": "every tensor in optimizer.state after the last step, the step counters too, in bytes",
        "gradient_bytes": "the .grad of what the run trains, after the last backward, before any zero_grad, in bytes",
    }
    for name, (reported, seen) in compared(subject, 1).items():
        for number, hint in hints.items():
            what = f"compare_fine_tuning(1)[{name!r}][{number!r}]"
            came, wanted = reported.get(number), getattr(seen, number)
            assert isinstance(came, int | float), f"{what}: {came!r} came, a number was wanted"
            assert came == wanted, f"{what}: {came} came, {wanted} was seen\n{hint}"


@requirement("5.6")
def test_every_run_makes_and_times_its_steps(subject: Subject) -> None:
    """Each run makes at least the steps that are asked for, each time, and tells the seconds for one of them."""
    for steps in (2, 7):
        begin = time.perf_counter()
        runs = compared(subject, steps)
        elapsed = time.perf_counter() - begin

        per_step: dict[str, Any] = {}
        for name, (reported, seen) in runs.items():
            assert seen.steps >= steps, f"compare_fine_tuning({steps}): the {name} run makes {seen.steps} steps"
            came = reported.get("seconds_per_step")
            what = f"compare_fine_tuning({steps})[{name!r}]['seconds_per_step']"
            right = isinstance(came, int | float) and math.isfinite(came) and came > 0
            assert right, f"{what}: {came!r} came, a positive number was wanted"
            per_step[name] = came
        # No clock decides here: a median of 7 times may be 7/4 of their mean, and no sum can pass the whole.
        assert steps * sum(per_step.values()) <= 2 * elapsed, (
            f"compare_fine_tuning({steps}): seconds_per_step {per_step} came; the whole call took {elapsed:.3g} s\n"
            "seconds, for one step"
        )


# 5.7 dtype, device, mode, dropout


@requirement("5.7")
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Each of the two outputs is rounded to 8 bits in bfloat16, to 11 in float16.
    [(torch.bfloat16, 5e-2), (torch.float16, 5e-3), (torch.float32, 1e-5), (torch.float64, 1e-9)],
    ids=["bfloat16", "float16", "float32", "float64"],
)
def test_an_adapter_takes_over_its_layers_dtype(
    subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype, tolerance: float
) -> None:
    """A and B have the layer's dtype, and so has the output."""
    original = linear(rng).to(dtype)
    x = torch.randn(5, IN, generator=rng).to(dtype)

    adapter = known(subject.LoRALinear(original, rank=RANK, alpha=ALPHA), original, RANK, ALPHA)

    for name in ("lora_A", "lora_B"):
        came = getattr(adapter.layer, name).dtype
        assert came == dtype, f"LoRALinear(a layer in {dtype}).{name}: {came} came, {dtype} was wanted"
    randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)
    close(adapter.layer(x), adapter.expected(x).to(dtype), f"forward(x) in {dtype}", tolerance=tolerance)


@requirement("5.7")
def test_each_adapter_follows_its_own_layer(subject: Subject) -> None:
    """In a model of mixed dtypes and devices every adapter has those of its layer."""
    layers = [nn.Linear(5, 4).double(), nn.Linear(5, 4, dtype=torch.bfloat16), nn.Linear(5, 4, device="meta")]
    model = tree({f"{index}.q_proj": layer for index, layer in enumerate(layers)})
    wanted = [(layer.weight.dtype, layer.weight.device) for layer in layers]

    apply(subject, model, "q_proj")

    for index, (dtype, device) in enumerate(wanted):
        for name in ("lora_A", "lora_B"):
            tensor = getattr(adapter_at(model, f"{index}.q_proj"), name)
            what = f"apply_lora_to_model on a layer in {dtype} on {device}: {name}"
            assert (tensor.dtype, tensor.device) == (dtype, device), f"{what} is in {tensor.dtype} on {tensor.device}"


@requirement("5.7")
@pytest.mark.parametrize("moved", [False, True], ids=["built_there", "moved_there"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_another_device(subject: Subject, rng: torch.Generator, training: bool, moved: bool) -> None:
    """An adapter that is built on another device, or moved there, works there: the meta device stands in for one."""
    original = linear(rng) if moved else linear(rng).to("meta")
    layer = subject.LoRALinear(original, rank=RANK, dropout=0.5).train(training)
    if moved:
        layer(torch.randn(5, IN, generator=rng))
        layer.to("meta")

    output = is_tensor(layer(torch.randn(5, IN, device="meta")), "forward(x) on meta")

    assert layer.lora_A.device.type == layer.lora_B.device.type == "meta", "LoRALinear on meta: A or B is elsewhere"
    assert output.device.type == "meta", f"forward(x) on meta: the output is on {output.device}"
    assert tuple(output.shape) == (5, OUT), f"forward(x) on meta: shape {tuple(output.shape)} came"


@requirement("5.7")
def test_an_adapter_may_be_cast_later(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """After calls in float32 it works in float64, with float64's precision."""
    adapter = build(subject, rng, torch.float32)
    x = torch.randn(5, IN, generator=rng, dtype=torch.float64)
    adapter.layer(x.float())

    adapter.layer.double()

    close(adapter.layer(x), adapter.expected(x), "forward(x) after .double()", hint="something of float32 is kept")


@requirement("5.7")
def test_dropout_acts_on_the_adapters_input_alone(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """In training every element of x reaches A as 0 or as x / (1 - p); the original sees all of x."""
    adapter = see_through(fresh(subject, linear(rng, 12, 12), rank=12, dropout=0.4), rng)
    x = torch.rand(5, 12, 12, generator=rng, dtype=torch.float64) + 1

    reached = what_reached_a(adapter, x, adapter.layer.train()(x))

    for start in (0, 1):
        flat, flat_reached = (tensor.flatten(start, start + 1) for tensor in (x, reached))
        dropped_alone(close, flat, flat_reached, 0.4, "forward(x [5, 12, 12]) in training, dropout 0.4")


@requirement("5.7")
@pytest.mark.parametrize("p", [0.25, 0.7])
def test_dropout_comes_from_the_config(subject: Subject, close: Close, rng: torch.Generator, p: float) -> None:
    """The config's probability is that of every adapter."""
    model = tree({"q_proj": linear(rng, 12, 12)})
    adapter = known(None, linear_at(model, "q_proj"), 12, ALPHA)
    apply(subject, model, "q_proj", rank=12, dropout=p)
    adapter.layer = adapter_at(model.double(), "q_proj")
    see_through(adapter, rng)
    x = torch.rand(60, 12, generator=rng, dtype=torch.float64) + 1

    with torch.no_grad():
        reached = what_reached_a(adapter, x, adapter.layer.train()(x))

    dropped_alone(close, x, reached, p, f"LoRAConfig(dropout={p}), in training")


@requirement("5.7")
def test_dropout_follows_torchs_seed(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The same seed drops the same elements; another call drops others."""
    adapter = build(subject, rng, dropout=0.4)
    x = torch.randn(9, IN, generator=rng, dtype=torch.float64)
    adapter.layer.train()

    seed(7)
    first, second = value(adapter.layer(x)), value(adapter.layer(x))
    seed(7)

    close(value(adapter.layer(x)), first, "forward(x) in training, seeded again", tolerance=0)
    assert not torch.equal(first, second), "forward(x) in training: two calls drop the same elements, or none"


@requirement("5.7")
def test_no_dropout_in_eval(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """In eval nothing is dropped, also after training; in training with dropout 0 neither."""
    adapter = build(subject, rng, dropout=0.6)
    x = torch.randn(5, IN, generator=rng, dtype=torch.float64)
    adapter.layer.train()(x)

    close(adapter.layer.eval()(x), adapter.expected(x), "forward(x) in eval, dropout 0.6", hint="dropout acts in eval")
    adapter = build(subject, rng, dropout=0.0)
    close(adapter.layer.train()(x), adapter.expected(x), "forward(x) in training, dropout 0")


@requirement("5.7")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_an_adapter_takes_over_its_layers_mode(
    subject: Subject, close: Close, rng: torch.Generator, training: bool
) -> None:
    """A layer in eval gets an adapter in eval, without dropout, whatever the rest of the model is in."""
    model = tree({"q_proj": linear(rng), "k_proj": linear(rng)}).train(not training)
    adapter = known(None, linear_at(model, "q_proj").train(training), RANK, ALPHA)
    x = torch.randn(9, IN, generator=rng)
    apply(subject, model, "q_proj", dropout=0.5)
    adapter.layer = adapter_at(model, "q_proj")
    randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)

    output, expected = is_tensor(adapter.layer(x), "forward(x)"), adapter.expected(x).float()

    what = f"apply_lora_to_model on a layer in {'training' if training else 'eval'}"
    alone = subject.LoRALinear(linear(rng).train(training), dropout=0.5).training
    assert alone is training, f"LoRALinear(a layer whose training flag is {training}): its own flag is {alone}"
    assert adapter.layer.training is training, f"{what}: the adapter's training flag is {adapter.layer.training}"
    if training:
        assert (output - expected).abs().max() > 1e-3, f"{what}: dropout 0.5 changes nothing"
    else:
        close(
            output, expected, f"{what}: output", tolerance=1e-5, hint="its dropout acts although the layer is in eval"
        )


def see_through(adapter: Adapter, rng: torch.Generator) -> Adapter:
    """Gives a square adapter of rank 12 orthogonal A and B, so that A x and B A x can be undone."""
    with torch.no_grad():
        for tensor in (adapter.layer.lora_A, adapter.layer.lora_B):
            tensor.copy_(torch.linalg.qr(torch.randn(12, 12, generator=rng, dtype=torch.float64))[0])
    return adapter


def what_reached_a(adapter: Adapter, x: Tensor, output: Any) -> Tensor:
    """What a see-through adapter must have got as its input: the output beyond the original's, undone."""
    original = F.linear(x, adapter.weight, adapter.bias)
    came = is_tensor(output, "forward(x) in training")
    assert came.shape == original.shape, f"forward(x) in training: shape {tuple(came.shape)} came"
    return (value(came) - original) / adapter.scaling @ value(adapter.layer.lora_B) @ value(adapter.layer.lora_A)


def dropped_alone(close: Close, x: Tensor, reached: Tensor, p: float, what: str) -> None:
    """Each element of x has reached A as 0 or as x / (1 - p), with probability p and independently."""
    assert (reached - x).abs().max() > 1e-6, f"{what}: nothing is dropped; all of x reaches A"
    kept = reached.abs() > 1e-6
    hint = (
        f"dropout acts on x on its way into A: 0 or x / (1 - {p}); the original's input, A x and the output are whole"
    )
    close(reached, torch.where(kept, x / (1 - p), 0.0), f"{what}: what reaches A", hint=hint)
    for dim, name in ((0, "rows"), (1, "features")):
        alike = (kept == kept.narrow(dim, 0, 1)).double().mean().item()
        assert alike < 0.95, f"{what}: the same elements are dropped for all {name}"
    share = 1 - kept.double().mean().item()
    assert abs(share - p) < 0.1, f"{what}: {share:.2f} of the adapter's input is dropped, {p} was wanted"


# 5.8 saving and loading


def adapted_pair(subject: Subject, rng: torch.Generator, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Two models with the same base, freshly adapted; the first one's adapters are then changed."""
    base = Tiny(rng)
    trained, other = (apply(subject, copy.deepcopy(base), "q_proj", "v_proj").to(dtype) for _ in range(2))
    for layer in tiny_adapters(trained):
        randomize(rng, layer.lora_A, layer.lora_B)
    return trained, other


def saved_by(subject: Subject, model: nn.Module) -> dict[str, Tensor]:
    """What lora_state_dict gives, if that is a dict of named tensors."""
    saved = subject.lora_state_dict(model)
    assert isinstance(saved, dict) and all(isinstance(key, str) for key in saved), (
        f"lora_state_dict(model): a {type(saved).__name__} came, a dict of tensors by name was wanted"
    )
    others = {key: type(held).__name__ for key, held in saved.items() if not isinstance(held, Tensor)}
    assert not others, f"lora_state_dict(model): {others} came where tensors were wanted"
    return saved


@requirement("5.8")
def test_the_adapters_alone_are_saved(subject: Subject, rng: torch.Generator) -> None:
    """What is saved holds as many numbers as the adapters do: nothing of the base, nothing missing."""
    model, _ = adapted_pair(subject, rng)

    saved = saved_by(subject, model)

    numbers = sum(held.numel() for held in saved.values())
    fact = f"lora_state_dict(model): {numbers} numbers in {len(saved)} tensors came; the adapters hold {TINY_ADAPTERS}"
    assert numbers == TINY_ADAPTERS, f"{fact}\nsave A and B of every adapter, and nothing of the base"


@requirement("5.8")
def test_neither_names_nor_flags_make_an_adapter(subject: Subject, rng: torch.Generator) -> None:
    """A frozen adapter is saved; a trained head is not, nor a layer of the base that is named like a part of one."""
    names = ("flora", "lora_head", "a.down", "a.up", "adapter", "a.lora")
    model = apply(subject, tree({"a.q_proj": linear(rng), **{name: linear(rng, 3, 5) for name in names}}), "q_proj")
    wanted = RANK * (IN + OUT)
    for flag in (True, False):
        numbers = sum(held.numel() for held in saved_by(subject, model.requires_grad_(flag)).values())

        assert numbers == wanted, (
            f"lora_state_dict(model), every requires_grad {flag}, base layers {names}: {numbers} numbers came; "
            f"the adapter holds {wanted}\nsave A and B of every adapter, and nothing of the base"
        )


@requirement("5.8")
@pytest.mark.parametrize(
    ("dtype", "merged"), [(torch.float64, False), (torch.bfloat16, False), (torch.float32, True)], ids=str
)
def test_saved_adapters_load_into_a_fresh_model(
    subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype, merged: bool
) -> None:
    """By way of a file, without an unexpected key, A and B come back bit for bit, saved while merged or not."""
    trained, other = adapted_pair(subject, rng, dtype)
    for layer in tiny_adapters(trained) if merged else ():
        layer.merge_weights()
    file = io.BytesIO()
    torch.save(saved_by(subject, trained), file)
    file.seek(0)

    unexpected = other.load_state_dict(torch.load(file), strict=False).unexpected_keys

    assert not unexpected, f"load_state_dict(lora_state_dict(model), strict=False): unexpected keys {unexpected}"
    hint = "is it in what was saved, under its own key?"
    for path in ("q_proj", "block.v_proj"):
        for name in ("lora_A", "lora_B"):
            came, wanted = (value(getattr(adapter_at(model, path), name)) for model in (other, trained))
            close(came, wanted, f"{path}.{name} after loading", tolerance=0, hint=hint)


@requirement("5.8")
def test_a_loaded_adapter_gives_the_same_output(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The fresh model, which has been called before, computes as the trained one does."""
    trained, other = adapted_pair(subject, rng)
    expected = value(trained(torch.tensor(TOKENS)))
    other.eval()(torch.tensor(TOKENS))

    other.load_state_dict(saved_by(subject, trained), strict=False)

    close(other(torch.tensor(TOKENS)), expected, "output after loading the adapter into a fresh model", tolerance=1e-6)


@requirement("5.8")
def test_what_is_saved_is_a_copy(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Training goes on without changing what was saved, and loading it brings the saved state back."""
    model, _ = adapted_pair(subject, rng)
    saved = saved_by(subject, model)
    before = {key: value(held) for key, held in saved.items()}
    expected = value(model(torch.tensor(TOKENS)))

    for layer in tiny_adapters(model):
        randomize(rng, layer.lora_A, layer.lora_B)

    for key, held in saved.items():
        close(
            value(held),
            before[key],
            f"saved {key!r} after more training",
            tolerance=0,
            hint="a reference was saved, no copy",
        )
    model.load_state_dict(saved, strict=False)
    close(model(torch.tensor(TOKENS)), expected, "output after loading the earlier adapter again", tolerance=1e-6)


@requirement("5.8")
def test_a_shared_adapter_is_saved_and_loaded(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A layer under two names comes back in both places."""
    original = linear(rng)
    models = [apply(subject, tree({"a.q_proj": layer, "b.q_proj": layer}), "q_proj")
              for layer in (original, copy.deepcopy(original))]  # fmt: skip
    randomize(rng, adapter_at(models[0], "a.q_proj").lora_A, adapter_at(models[0], "a.q_proj").lora_B)
    x = torch.randn(5, IN, generator=rng)

    unexpected = models[1].load_state_dict(saved_by(subject, models[0]), strict=False).unexpected_keys

    assert not unexpected, f"load_state_dict(lora_state_dict(model), strict=False): unexpected keys {unexpected}"
    for path in ("a.q_proj", "b.q_proj"):
        came, wanted = (model.get_submodule(path)(x) for model in models[::-1])
        close(came, value(wanted), f"the layer at {path!r} after loading", tolerance=1e-6)


# 5.9 and 5.10


test_own_test_passes_on_right_code, test_own_test_catches = own_test_checks("5.9", OWN_TEST)
test_ruff_finds_nothing, test_mypy_finds_nothing = style_checks("5.10")
