"""Fine-tuning a language model with adapters, beside training all of it and beside the peft package, by width."""

import importlib
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.testing import Case, Series, describe

X = "d_model"
REFERENCE = "full"
CAPTION = "4 rows of 64 tokens, 4 layers, AdamW; rank 8 on q_proj and v_proj"
SECONDS = 10
HIGHER_IS_BETTER = ()
WIDTHS = (128, 256, 512)
PANEL = "a training step"
TARGETS = ["q_proj", "v_proj"]
RANK, ALPHA = 8, 20.0
SIZES = {"vocabulary": 512, "num_heads": 4, "num_layers": 4}
_contestants: dict[str, ModuleType] = {}


def cases(modules: Mapping[str, ModuleType]) -> Iterator[Case]:
    """A step of AdamW on 4 rows of 64 tokens at each width, with what it trains, holds, and keeps for backward."""
    _contestants.clear()
    _contestants.update(modules)
    given = modules.get("answer") or modules["yours"]
    for width in WIDTHS:
        runs = {REFERENCE: Step(given, width, lambda model: model)}
        runs |= {
            name: Step(module, width, lambda model, m=module: adapted(m, model)) for name, module in modules.items()
        }
        if peft_version():
            runs["peft"] = Step(given, width, by_peft)
        yield Case(PANEL, width, runs)


def conclude(measured: Sequence[Series]) -> Iterator[str]:
    """What adapters save at the largest width, and whether they agree with peft."""
    found = {one.metric: one.values for one in measured if one.panel == PANEL}
    width = max(WIDTHS)
    for name in _contestants:
        if width not in found["seconds"].get(name, {}):
            continue
        share = {metric: values[name][width] / values[REFERENCE][width] for metric, values in found.items()}
        yield (
            f"{name} at d_model {width}: trains {share['trainable parameters']:.1%} of the parameters, holds "
            f"{share['optimizer bytes']:.1%} of the optimizer's bytes, keeps {share['activation bytes']:.0%} of the "
            f"activations' bytes for backward, takes {share['seconds']:.0%} of the time"
        )
    if not peft_version():
        yield "peft is not installed, so nothing is compared with it; to have it: .venv/bin/pip install peft"
        return
    for name, module in _contestants.items():
        try:
            differences = ", ".join(f"{what} {size:.1e}" for what, size in agreement(module).items())
            yield f"{name} beside peft {peft_version()} with the same weights, largest differences: {differences}"
        except Exception as error:
            yield f"{name} is not compared with peft: {describe(error)}"


class Step:
    """One step of training; the model is made at the first."""

    def __init__(self, module: ModuleType, width: int, adapt: Any) -> None:
        self.module, self.width, self.adapt = module, width, adapt
        self.numbers: dict[str, float] = {}

    def __call__(self) -> Mapping[str, float]:
        """Trains once, and tells what does not change from step to step."""
        if not self.numbers:
            torch.manual_seed(0)
            self.model = self.adapt(self.module.SimpleTransformer(d_model=self.width, **SIZES))
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.AdamW(trained)
            self.tokens = torch.randint(SIZES["vocabulary"], (4, 65))
            kept = Kept(self.model)
            with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
                self._step()
            state = [held for values in self.optimizer.state.values() for held in values.values()]
            self.numbers = {
                "trainable parameters": sum(parameter.numel() for parameter in trained),
                "optimizer bytes": sum(held.nbytes for held in state),
                "activation bytes": sum(kept.storages.values()),
            }
        self._step()
        return self.numbers

    def _step(self) -> None:
        self.optimizer.zero_grad()
        logits = self.model(self.tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten()).backward()
        self.optimizer.step()


class Kept:
    """The storages that autograd keeps for backward, the model's own aside."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.storages: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        """Notes a tensor that is kept."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def adapted(module: ModuleType, model: nn.Module) -> nn.Module:
    """A model with a contestant's adapters."""
    result: nn.Module = module.apply_lora_to_model(model, module.LoRAConfig(RANK, ALPHA, TARGETS, 0.0))
    return result


def by_peft(model: nn.Module) -> nn.Module:
    """A model with peft's adapters."""
    peft: Any = importlib.import_module("peft")  # it brings transformers, and takes seconds
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.0)
    result: nn.Module = peft.inject_adapter_in_model(config, model)
    return result


def peft_version() -> str:
    """The installed peft's version, or nothing."""
    try:
        return importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        return ""


def agreement(module: ModuleType) -> dict[str, float]:
    """How far outputs, gradients and merged weights are from peft's, with W, A and B the same, in float64."""
    torch.manual_seed(1)
    ours = module.SimpleTransformer(d_model=32, **SIZES)
    theirs = module.SimpleTransformer(d_model=32, **SIZES)
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = adapted(module, ours).double(), by_peft(theirs).double()
    pairs: list[tuple[Any, Any]] = []
    for path, layer in ours.named_modules():
        if isinstance(layer, module.LoRALinear):
            other: Any = theirs.get_submodule(path)
            pairs.append((layer, other))
            with torch.no_grad():
                for one, two in ((layer.lora_A, other.lora_A), (layer.lora_B, other.lora_B)):
                    two["default"].weight.copy_(one.normal_(std=0.2))
    tokens = torch.randint(SIZES["vocabulary"], (4, 65))

    outputs = []
    for model in (ours, theirs):
        outputs.append(model(tokens[:, :-1]))
        F.cross_entropy(outputs[-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = [
        (one.grad, two["default"].weight.grad)
        for layer, other in pairs
        for one, two in ((layer.lora_A, other.lora_A), (layer.lora_B, other.lora_B))
    ]
    for layer, other in pairs:
        layer.merge_weights()
        other.merge()
    weights = [(layer.original_layer.weight, other.base_layer.weight) for layer, other in pairs]
    numbers = {"outputs": [tuple(outputs)], "gradients": gradients, "merged weights": weights}
    return {what: largest(tensors) for what, tensors in numbers.items()}


def largest(pairs: Iterable[tuple[Any, Any]]) -> float:
    """The largest difference, relative to the largest number of the two tensors."""
    return max(float((one - two).abs().max() / two.abs().max()) for one, two in pairs)
