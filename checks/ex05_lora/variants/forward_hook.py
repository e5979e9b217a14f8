"""The adapter hangs on the original layer as a forward hook, for as long as it is called through the adapter."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """Calls the original, whose hook adds what the adapter gives."""

    def __init__(self, original_layer: nn.Linear, rank: int = 4, alpha: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.original_layer = original_layer
        self.rank, self.alpha = rank, alpha
        self.drop = nn.Dropout(dropout)
        weight = original_layer.weight
        self.register_parameter("lora_A", nn.Parameter(torch.empty_like(weight[0]).repeat(rank, 1).uniform_(-0.3, 0.3)))
        self.register_parameter("lora_B", nn.Parameter(torch.zeros_like(weight[:, :1]).repeat(1, rank)))
        self.backup: dict[str, Tensor] = {}
        self.train(original_layer.training)

    @property
    def scaling(self) -> float:
        """alpha/rank."""
        return self.alpha / self.rank

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.backup:
            return output
        return output + torch.einsum("...i,ri,or->...o", self.drop(args[0]), self.lora_A, self.lora_B) * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        """The original with its hook; called by itself it is the original alone."""
        with self.original_layer.register_forward_hook(self._add):
            return self.original_layer(x)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and not self.backup:
            return torch.addmm(self.original_layer.weight, self.lora_B, self.lora_A, alpha=self.scaling)
        if name in ("weight", "bias"):
            return getattr(self.original_layer, name)
        return super().__getattr__(name)

    @torch.no_grad()
    def merge_weights(self) -> None:
        """Merges."""
        if not self.backup:
            merged = self.weight
            self.backup["weight"] = self.original_layer.weight
            del self.original_layer.weight
            self.original_layer.weight = nn.Parameter(merged, requires_grad=False)

    def unmerge_weights(self) -> None:
        """Restores."""
        if self.backup:
            self.original_layer.weight = self.backup.pop("weight")


@dataclass
class LoRAConfig:
    """What to adapt."""

    rank: int = 4
    alpha: float = 8.0
    target_modules: list[str] | None = None
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.target_modules is None:
            self.target_modules = ["q_proj", "v_proj"]
        if self.rank <= 0:
            raise ValueError(f"rank is {self.rank}")


def apply_lora_to_model(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Adapts."""
    names = [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)]
    targets = config.target_modules or []
    hits = [n for n in names if any(n == t or (n.endswith("." + t) and "." not in t) for t in targets)]
    if not hits:
        raise ValueError(f"{targets} not in {names}")
    model.requires_grad_(False)
    made: dict[nn.Module, LoRALinear] = {}
    for name in hits:
        old = model.get_submodule(name)
        if isinstance(old, nn.Linear) and old not in made:
            made[old] = LoRALinear(old, config.rank, config.alpha, config.dropout)
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], made.get(old, old))
    return model


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Saves what is registered under an adapter's own names."""
    paths = {n for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    return {n: p.data.clone() for n, p in model.named_parameters() if n.rpartition(".")[0] in paths}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Counts."""
    sizes = [(p.numel(), p.requires_grad) for p in set(model.parameters())]
    return sum(n for n, _ in sizes), sum(n for n, asks in sizes if asks)


def compare_fine_tuning(steps: int = 3) -> dict[str, dict[str, float]]:
    """Full first, then the same model with adapters."""
    model: nn.Module = SimpleTransformer()
    full = _run(model, steps)
    model.zero_grad()
    return {"full": full, "lora": _run(apply_lora_to_model(model, LoRAConfig()), steps)}


def _run(model: nn.Module, steps: int) -> dict[str, float]:
    optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()))
    start = time.perf_counter()
    for _ in range(steps):
        model.zero_grad()
        model(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
        optimizer.step()
    seconds = (time.perf_counter() - start) / steps
    numbers = [v for s in optimizer.state.values() for v in s.values()]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return {
        "trainable_parameters": count_parameters(model)[1],
        "optimizer_bytes": sum(v.untyped_storage().nbytes() for v in numbers),
        "gradient_bytes": sum(g.numel() * g.element_size() for g in grads),
        "seconds_per_step": seconds,
    }
