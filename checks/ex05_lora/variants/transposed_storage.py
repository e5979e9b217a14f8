"""A and B are kept transposed, and shown as views; the input is flattened for addmm; a copy is merged."""

import copy
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LoRALinear(nn.Module):
    """addmm with the original's output as the summand."""

    def __init__(self, original_layer: nn.Linear, rank: int = 4, alpha: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.original_layer = original_layer
        self.rank = rank
        self.alpha = alpha
        self.scaling = alpha / rank
        w = original_layer.weight
        self.down = nn.Parameter(torch.randn(w.shape[1], rank, dtype=w.dtype, device=w.device) / rank)
        self.up = nn.Parameter(torch.zeros(rank, w.shape[0], dtype=w.dtype, device=w.device))
        self.p = dropout
        self.unmerged: list[nn.Linear] = []
        self.train(original_layer.training)

    @property
    def lora_A(self) -> Tensor:
        """A, a view."""
        return self.down.T

    @property
    def lora_B(self) -> Tensor:
        """B, a view."""
        return self.up.T

    @property
    def weight(self) -> Tensor:
        """Not for parents."""
        raise TypeError("a LoRALinear has no weight to read; call it")

    def forward(self, x: Tensor) -> Tensor:
        """Flattens, adds, and shapes back."""
        y = self.original_layer(x)
        if self.unmerged:
            return y
        h = F.dropout(x, self.p, training=self.training).reshape(-1, x.shape[-1]) @ self.down
        return torch.addmm(y.reshape(-1, y.shape[-1]), h, self.up, alpha=self.scaling).reshape(y.shape)

    def merge_weights(self) -> None:
        """Swaps the layer for a merged copy of it."""
        if not self.unmerged:
            self.unmerged.append(self.original_layer)
            self.original_layer = copy.deepcopy(self.original_layer).requires_grad_(False)
            self.original_layer.weight.data += self.scaling * (self.down @ self.up).T.data

    def unmerge_weights(self) -> None:
        """Throws the copy away."""
        if self.unmerged:
            self.original_layer = self.unmerged.pop()


class LoRAConfig:
    """What to adapt."""

    def __init__(
        self, rank: int = 4, alpha: float = 8.0, target_modules: list[str] | None = None, dropout: float = 0.1
    ) -> None:
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.target_modules = ["q_proj", "v_proj"] if target_modules is None else target_modules


def apply_lora_to_model(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Adapts all but what is read as a bare weight."""
    assert isinstance(config.rank, int)
    if config.rank < 1:
        raise ValueError(config.rank)
    linear_names = []
    adapters: dict[nn.Module, nn.Module] = {}
    for path, module in [*model.named_modules(remove_duplicate=False)]:
        if isinstance(module, nn.Linear):
            linear_names.append(path)
            parent = model.get_submodule(".".join(path.split(".")[:-1]))
            if path in config.target_modules or path.split(".")[-1] in config.target_modules:
                if isinstance(parent, nn.MultiheadAttention):
                    raise TypeError(f"{path} is read as a bare weight")
                if isinstance(parent, nn.TransformerEncoderLayer):
                    parent.register_forward_pre_hook(_refuse_eval)
                if module not in adapters:
                    adapters[module] = LoRALinear(module, config.rank, config.alpha, config.dropout)
                setattr(parent, path.split(".")[-1], adapters[module])
    if not adapters:
        raise ValueError("nothing", config.target_modules, linear_names)
    for p in model.parameters():
        p.requires_grad_(False)
    for m in adapters.values():
        for name in ("down", "up"):
            getattr(m, name).requires_grad_(True)
    return model


def _refuse_eval(module: nn.Module, args: object) -> None:
    if not module.training:
        raise TypeError("nn.TransformerEncoderLayer reads linear1.weight and linear2.weight in eval")


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Deep copies of the parameters themselves."""
    parts = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, LoRALinear)]
    return {f"{n}.{key}".removeprefix("."): copy.deepcopy(getattr(m, key)) for n, m in parts for key in ("down", "up")}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Counts."""
    total = sum(p.numel() for p in model.parameters())
    return total, total - sum(p.numel() for p in model.parameters() if not p.requires_grad)


def compare_fine_tuning(steps: int = 3) -> dict[str, dict[str, float]]:
    """Both runs side by side, step by step."""
    models = {"full": SimpleTransformer(), "lora": apply_lora_to_model(SimpleTransformer(), LoRAConfig(alpha=1.0))}
    optimizers = {
        name: torch.optim.AdamW([{"params": [p]} for p in model.parameters() if p.requires_grad])
        for name, model in models.items()
    }
    seconds = dict.fromkeys(models, 0.0)
    for _ in range(steps):
        for name, model in models.items():
            start = time.perf_counter()
            model.zero_grad()
            model(torch.tensor([[1, 2, 3]])).pow(2).sum().backward()
            optimizers[name].step()
            seconds[name] += time.perf_counter() - start
    return {
        name: {
            "trainable_parameters": count_parameters(model)[1],
            "optimizer_bytes": sum(v.nbytes for s in optimizers[name].state.values() for v in s.values()),
            "gradient_bytes": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
            "seconds_per_step": seconds[name] / steps,
        }
        for name, model in models.items()
    }
