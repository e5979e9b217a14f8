"""What the checks of LoRA build, and what they expect of it, apart from the learner's code."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.testing import Subject, Trace, seed

IN, OUT, RANK, ALPHA = 11, 7, 3, 5.0
MATMULS = ("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "matmul", "linear", "_addmm_activation")


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


def alike(came: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    """One result is as near to another as a right one has to be."""
    if came.shape != other.shape:
        return False
    return bool(torch.isclose(came.detach().double(), other.detach().double(), tolerance, tolerance).all())


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
    """The model, adapted in place by the learner's code; a ValueError is a failure that names the targets."""
    try:
        return try_apply(subject, model, *targets, rank=rank, dropout=dropout)
    except ValueError as error:
        raise AssertionError(
            f"{applying(subject, targets)}, rank {rank}: ValueError ({error}) came, the adapted model was wanted"
        ) from error


def applying(subject: Subject, targets: Sequence[str]) -> str:
    """The call in words; before it what LoRAConfig makes of the targets, if that is something else."""
    held = subject.LoRAConfig(target_modules=list(targets)).target_modules
    call = f"apply_lora_to_model with targets {list(targets)}"
    if held == list(targets):
        return call
    return f"LoRAConfig(target_modules={list(targets)}).target_modules is {held}\n{call}"


def try_apply(subject: Subject, model: nn.Module, *targets: str, rank: int = RANK, dropout: float = 0.0) -> Any:
    """The model, adapted in place by the learner's code, which may refuse."""
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


def no_copy(seen: Trace, model: nn.Module, what: str, copies: int = 0) -> None:
    """Fails if more is alive, of what was made under `seen`, than the model's parameters and some copies of W: in an
    attribute, a list, a closure or anywhere else.
    """
    sizes = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    weight = max(sizes.values())
    adapters: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    sizes = {m.data_ptr(): m.nbytes for layer in adapters for m in (layer.lora_A, layer.lora_B)}
    allowed = sum(sizes.values()) + (copies + 1) * weight
    alive = seen.alive_bytes if seen.alive_bytes < allowed + weight // 2 else seen.alive_after_collection()
    counted = f" ({copies} more of W's size counted)" if copies else ""
    assert alive < allowed + weight // 2, (
        f"{what}: {alive} bytes are alive; W, A and B have {allowed}{counted}\n"
        "is a copy of W, or B A, kept somewhere, or the input, mask or result of a call?"
    )


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


def with_merged_weight(plain: nn.Module, path: str, layer: Any, x: Tensor) -> Tensor:
    """What a module without adapters gives once the adapter's product is in its weight."""
    original = linear_at(plain, path)
    with torch.no_grad():
        original.weight.copy_(known(layer, original, RANK, ALPHA).merged_weight())
        return called(plain, x)


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
