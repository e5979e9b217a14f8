"""A and B live in a ParameterDict, A Kaiming-initialised; F.linear twice; a flag and a kept tensor for merging."""

import math
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LoRALinear(nn.Module):
    """F.linear with W, and F.linear twice with A and B."""

    def __init__(self, original_layer: nn.Linear, rank: int = 4, alpha: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.original_layer = original_layer
        self.rank, self.alpha, self.scaling, self.dropout = rank, alpha, alpha / max(rank, 1), dropout
        out_features, in_features = original_layer.weight.shape
        new = original_layer.weight.data.new_empty
        self.matrices = nn.ParameterDict({"a": new(rank, in_features), "b": new(out_features, rank).zero_()})
        nn.init.kaiming_uniform_(self.matrices["a"], a=math.sqrt(5))
        self.merged = False
        self.kept: list[Tensor] = []
        self.training = original_layer.training

    @property
    def lora_A(self) -> nn.Parameter:
        """A."""
        return self.matrices["a"]

    @property
    def lora_B(self) -> nn.Parameter:
        """B."""
        return self.matrices["b"]

    def _delta(self) -> Tensor:
        return (self.lora_B @ self.lora_A) * self.scaling

    @property
    def weight(self) -> Tensor:
        """What nn.MultiheadAttention reads."""
        return self.original_layer.weight + (0 if self.merged else self._delta())

    @property
    def bias(self) -> Tensor | None:
        """The original's."""
        return self.original_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """W x + b + B A x · scaling."""
        out = F.linear(x, self.original_layer.weight, self.original_layer.bias)
        if self.merged:
            return out
        if self.training and self.dropout > 0:
            x = F.dropout(x, self.dropout)
        return out + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)

    def merge_weights(self) -> None:
        """Merges into a parameter of its own."""
        if not self.merged:
            self.kept = [self.original_layer.weight]
            with torch.no_grad():
                merged = (self.original_layer.weight.double() + self._delta().double()).to(self.lora_A.dtype)
            self.original_layer.weight = nn.Parameter(merged, requires_grad=False)
        self.merged = True

    def unmerge_weights(self) -> None:
        """Restores."""
        if self.merged:
            self.original_layer.weight = self.kept.pop()
        self.merged = False


def apply_lora_to_model(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Adapts, parent by parent."""
    if config.rank < 1:
        raise ValueError("rank < 1")
    seen: list[str] = []
    adapters: dict[int, LoRALinear] = {}

    def visit(module: nn.Module, prefix: tuple[str, ...]) -> None:
        for name, child in list(module._modules.items()):
            if isinstance(child, LoRALinear) or child is None:
                continue
            path = (*prefix, name)
            if isinstance(child, nn.Linear):
                seen.append(".".join(path))
                if name in config.target_modules or seen[-1] in config.target_modules:
                    if id(child) not in adapters:
                        adapters[id(child)] = LoRALinear(child, config.rank, config.alpha, config.dropout)
                    setattr(module, name, adapters[id(child)])
            else:
                visit(child, path)

    visit(model, ())
    if not adapters:
        raise ValueError(f"targets {config.target_modules!r} match nothing; linear layers: {seen!r}")
    asking = {id(p) for adapter in adapters.values() for p in adapter.matrices.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in asking)
    return model


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Saves."""
    saved: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            for key, parameter in module.matrices.items():
                saved[f"{name}.matrices.{key}".removeprefix(".")] = torch.empty_like(parameter.data).copy_(
                    parameter.data
                )
    return saved


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Counts."""
    return (
        sum(math.prod(p.shape) for p in model.parameters()),
        sum(math.prod(p.shape) for p in model.parameters() if p.requires_grad),
    )


def compare_fine_tuning(steps: int = 3) -> dict[str, dict[str, float]]:
    """Measures after the last step, with the gradients' bytes taken right after the last backward."""
    result: dict[str, dict[str, float]] = {"full": {}, "lora": {}}
    for kind, row in result.items():
        model = SimpleTransformer()
        if kind == "lora":
            apply_lora_to_model(model, LoRAConfig(rank=2))
        optimizer = torch.optim.AdamW(list(model.parameters()), weight_decay=0.0)
        x = torch.randint(29, (2, 5))
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            F.cross_entropy(model(x).reshape(-1, 29), x.reshape(-1)).backward()
            row["gradient_bytes"] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - start)
        row["trainable_parameters"] = count_parameters(model)[1]
        row["optimizer_bytes"] = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
        row["seconds_per_step"] = sorted(times)[len(times) // 2]
    return result
