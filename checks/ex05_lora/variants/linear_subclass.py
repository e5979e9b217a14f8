"""A subclass of nn.Linear whose weight is computed when it is read; torch's own parents that read it are refused."""

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LoRALinear(nn.Linear):
    """A linear layer that has two parameters of its own and shows the original's."""

    def __init__(self, original_layer: nn.Linear, rank: int = 4, alpha: float = 1.0, dropout: float = 0.0) -> None:
        if rank < 1:
            raise ValueError(f"{rank=}")
        features = original_layer.in_features, original_layer.out_features
        nn.Module.__init__(self)
        self.in_features, self.out_features = features
        self.original_layer = original_layer
        self.rank, self.alpha, self.scaling, self.p = rank, alpha, alpha / rank, dropout
        kind: dict[str, Any] = {"dtype": original_layer.weight.dtype, "device": original_layer.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, features[0], **kind))
        self.lora_B = nn.Parameter(torch.zeros(features[1], rank, **kind))
        nn.init.xavier_normal_(self.lora_A)
        self.kept: tuple[Tensor, ...] = ()
        self.training = original_layer.training

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W + alpha/rank · B A."""
        plain = self.original_layer.weight
        return plain if self.kept else torch.addmm(plain, self.lora_B, self.lora_A, alpha=self.scaling)

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        """The original's."""
        return self.original_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + b + x Aᵀ Bᵀ · alpha/rank."""
        y = F.linear(x, self.original_layer.weight, self.original_layer.bias)
        if not self.kept:
            hidden = F.linear(F.dropout(x, self.p, self.training), self.lora_A)
            y = y + F.linear(hidden, self.lora_B * self.scaling)
        return y

    @torch.no_grad()
    def merge_weights(self) -> None:
        """Merges."""
        if not self.kept:
            merged = nn.Parameter(self.weight, requires_grad=False)
            self.kept = (self.original_layer.weight,)
            self.original_layer.weight = merged

    def unmerge_weights(self) -> None:
        """Restores."""
        if self.kept:
            (self.original_layer.weight,) = self.kept
            self.kept = ()


class LoRAConfig:
    """What to adapt."""

    def __init__(
        self, rank: int = 4, alpha: float = 8.0, target_modules: list[str] | None = None, dropout: float = 0.1
    ) -> None:
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.target_modules = list(target_modules) if target_modules is not None else ["q_proj", "v_proj"]


def places(model: nn.Module, prefix: str = "") -> Iterable[tuple[nn.Module, str, str, nn.Linear]]:
    """Parent, name, path and layer of every linear layer, under all names."""
    for name, child in list(model._modules.items()):
        path = f"{prefix}{name}"
        if isinstance(child, nn.Linear):
            yield model, name, path, child
        elif child is not None:
            yield from places(child, f"{path}.")


def apply_lora_to_model(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Adapts."""
    found = list(places(model))
    hits = [place for place in found if {place[1], place[2]} & set(config.target_modules)]
    if len(hits) == 0:
        raise ValueError(f"no linear layer is named {config.target_modules}; there are {[place[2] for place in found]}")
    for parent, _, path, _ in hits:
        if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            raise TypeError(f"{type(parent).__name__} may read the weight of {path} past its adapter")
    for parameter in model.parameters():
        parameter.requires_grad = False
    new: dict[int, LoRALinear] = {}
    for parent, name, _, layer in hits:
        if id(layer) not in new:
            new[id(layer)] = LoRALinear(layer, config.rank, config.alpha, config.dropout)
        setattr(parent, name, new[id(layer)])
    return model


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Saves."""
    return {
        f"{name}.{part}" if name else part: getattr(module, part).detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
        for part in ("lora_A", "lora_B")
    }


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Counts."""
    total = asking = 0
    for parameter in model.parameters():
        total += parameter.numel()
        asking += parameter.numel() if parameter.requires_grad else 0
    return total, asking


def compare_fine_tuning(steps: int = 3) -> dict[str, dict[str, float]]:
    """Measures, after a step to warm up."""
    rows: dict[str, dict[str, float]] = {}
    for name in ("lora", "full"):
        model: nn.Module = SimpleTransformer()
        if name == "lora":
            model = apply_lora_to_model(model, LoRAConfig(dropout=0.0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        tokens = torch.randint(0, 29, (3, 7))
        start = 0.0
        for step in range(steps + 1):
            if step == 1:
                start = time.monotonic()
            optimizer.zero_grad(set_to_none=True)
            model(tokens).square().mean().backward()
            optimizer.step()
        seconds = (time.monotonic() - start) / steps
        held = [t for entry in optimizer.state_dict()["state"].values() for t in entry.values() if torch.is_tensor(t)]
        rows[name] = {
            "trainable_parameters": float(count_parameters(model)[1]),
            "optimizer_bytes": float(sum(t.numel() * t.element_size() for t in held)),
            "gradient_bytes": float(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)),
            "seconds_per_step": max(seconds, 1e-9),
        }
    return rows
