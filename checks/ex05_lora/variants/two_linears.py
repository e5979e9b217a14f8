"""Two bias-free linear layers whose weights are lora_A and lora_B; the merged layer is another one."""

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PARTS = ("down", "up")


class LoRALinear(nn.Module):
    """The original, and beside it down and up."""

    def __init__(self, original_layer: nn.Linear, rank: int = 4, alpha: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.original_layer = original_layer
        self.rank, self.alpha, self.scaling = rank, alpha, alpha / rank
        kind: dict[str, Any] = {"dtype": original_layer.weight.dtype, "device": original_layer.weight.device}
        self.down = nn.Linear(original_layer.in_features, rank, bias=False, **kind)
        self.up = nn.Linear(rank, original_layer.out_features, bias=False, **kind)
        nn.init.zeros_(self.up.weight)
        self.adapter = nn.Sequential(nn.Dropout(dropout), self.down, self.up)
        self.merged = False
        self._plain: nn.Linear | None = None
        self.train(original_layer.training)

    @property
    def lora_A(self) -> Tensor:
        """A."""
        return self.down.weight

    @property
    def lora_B(self) -> Tensor:
        """B."""
        return self.up.weight

    @property
    def weight(self) -> Tensor:
        """Nothing that a parent may read."""
        raise TypeError("LoRALinear is to be called; its parent reads its weight, which would leave the adapter out")

    def forward(self, x: Tensor) -> Tensor:
        """Both, added."""
        y = self.original_layer(x)
        return y if self.merged else y.add(self.adapter(x), alpha=self.scaling)

    def merge_weights(self) -> None:
        """Puts another linear layer in the original's place."""
        if self.merged:
            return
        plain = self.original_layer
        weight = plain.weight.detach() + self.scaling * (self.lora_B @ self.lora_A).detach()
        merged = nn.Linear(plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta")
        merged.weight, merged.bias = nn.Parameter(weight, requires_grad=False), plain.bias
        object.__setattr__(self, "_plain", plain)
        self.original_layer, self.merged = merged.train(plain.training), True

    def unmerge_weights(self) -> None:
        """Puts the original back."""
        if self.merged and self._plain is not None:
            self.original_layer, self.merged = self._plain, False
            object.__setattr__(self, "_plain", None)


class LoRAConfig:
    """What to adapt."""

    def __init__(
        self, rank: int = 4, alpha: float = 8.0, target_modules: list[str] | None = None, dropout: float = 0.1
    ) -> None:
        if rank < 1:
            raise ValueError("rank must be positive")
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.target_modules = ["q_proj", "v_proj"] if target_modules is None else target_modules


def apply_lora_to_model(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Replaces first, and freezes then."""
    matched: dict[nn.Linear, list[tuple[nn.Module, str]]] = {}
    seen = []
    for path, parent in list(model.named_modules(remove_duplicate=False)):
        for name, child in parent._modules.items():
            if not isinstance(child, nn.Linear):
                continue
            whole = f"{path}.{name}" if path else name
            seen.append(whole)
            if any(target in (name, whole) for target in config.target_modules):
                matched.setdefault(child, []).append((parent, name))
    if not matched:
        raise ValueError("no match for " + ", ".join(config.target_modules) + " among " + ", ".join(seen[:10]))
    model.requires_grad_(False)
    for layer, spots in matched.items():
        adapter = LoRALinear(layer, config.rank, config.alpha, config.dropout)
        for parent, name in spots:
            parent._modules[name] = adapter
    return model


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Everything of the parts named down and up."""
    adapters = tuple(
        f"{path}.{part}.".removeprefix(".")
        for path, m in model.named_modules()
        if isinstance(m, LoRALinear)
        for part in PARTS
    )
    return {key: held.clone() for key, held in model.state_dict().items() if key.startswith(adapters)}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Counts by identity."""
    unique = {id(p): p for p in model.parameters()}.values()
    return sum(map(Tensor.numel, unique)), sum(p.numel() for p in unique if p.requires_grad)


def compare_fine_tuning(steps: int = 3) -> dict[str, dict[str, float]]:
    """One base for both, trained with adapters first."""
    torch.manual_seed(0)
    base = SimpleTransformer().state_dict()
    out: dict[str, dict[str, float]] = {}
    for name in ("full", "lora"):
        model = SimpleTransformer()
        model.load_state_dict(base)
        if name == "lora":
            apply_lora_to_model(model, LoRAConfig(rank=1, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"]))
        asking = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(asking, amsgrad=True, foreach=False)
        ids = torch.arange(20).view(2, 10)
        begun = time.perf_counter_ns()
        for _ in range(steps):
            loss = F.cross_entropy(model(ids).transpose(1, 2), ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        spent = (time.perf_counter_ns() - begun) / 1e9
        bytes_held = sum(t.nbytes for held in optimizer.state.values() for t in held.values())
        out[name] = {
            "trainable_parameters": sum(p.numel() for p in asking),
            "optimizer_bytes": bytes_held,
            "gradient_bytes": sum(p.grad.nbytes for p in asking if p.grad is not None),
            "seconds_per_step": spent / steps,
            "loss": loss.item(),
        }
    return out
