"""torch's parametrizations make what a parent reads; forward goes past them, through the thin matrices."""

import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """W -> W + scaling · B A."""

    def __init__(self, weight: Tensor, rank: int, scaling: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty_like(weight[:1]).expand(rank, -1).clone().normal_(std=0.2))
        self.lora_B = nn.Parameter(weight.new_zeros(weight.size(0), rank))
        self.scaling = scaling
        self.on = True

    def forward(self, weight: Tensor) -> Tensor:
        """The sum, unless it is in the weight already."""
        return weight + self.scaling * (self.lora_B @ self.lora_A) if self.on else weight


class LoRALinear(nn.Module):
    """Holds the weight twice: as the original's, and as the source of its own parametrized one."""

    def __init__(self, original_layer: nn.Linear, rank: int = 4, alpha: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.original_layer = original_layer
        self.rank, self.alpha, self.scaling = rank, alpha, alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.low_rank = LowRank(original_layer.weight.detach(), rank, self.scaling)
        self._kept: list[Tensor] = []
        self.train(original_layer.training)
        self.weight = original_layer.weight
        self.bias = original_layer.bias
        parametrize.register_parametrization(self, "weight", self.low_rank, unsafe=True)

    @property
    def lora_A(self) -> nn.Parameter:
        """A."""
        return self.low_rank.lora_A

    @property
    def lora_B(self) -> nn.Parameter:
        """B."""
        return self.low_rank.lora_B

    def forward(self, x: Tensor) -> Tensor:
        """Both."""
        y = F.linear(x, self.original_layer.weight, self.bias)
        if self._kept:
            return y
        return y + self.scaling * F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B)

    def _set(self, weight: Tensor, on: bool) -> None:
        self.original_layer.weight = weight
        getattr(self, "parametrizations").weight.original = weight  # noqa: B009
        self.low_rank.on = on

    def merge_weights(self) -> None:
        """Merges."""
        if not self._kept:
            self._kept = [self.original_layer.weight]
            merged = self.original_layer.weight + self.scaling * (self.lora_B @ self.lora_A)
            self._set(nn.Parameter(merged.detach(), requires_grad=False), on=False)

    def unmerge_weights(self) -> None:
        """Restores."""
        if self._kept:
            self._set(self._kept.pop(), on=True)


class LoRAConfig:
    """What to adapt."""

    def __init__(
        self, rank: int = 4, alpha: float = 8.0, target_modules: list[str] | None = None, dropout: float = 0.1
    ) -> None:
        self.__dict__.update(rank=rank, alpha=alpha, dropout=dropout)
        self.target_modules = target_modules if target_modules is not None else ["q_proj", "v_proj"]


def apply_lora_to_model(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Adapts."""
    if config.rank < 1:  # type: ignore[attr-defined]
        raise ValueError("rank below 1")
    linears = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)]
    hits = [(n, m) for n, m in linears if {n, n.split(".")[-1]} & {*config.target_modules}]
    if not hits:
        raise ValueError(f"{config.target_modules} vs. {dict(linears)}")
    model.requires_grad_(False)
    new = {m: LoRALinear(m, config.rank, config.alpha, config.dropout) for _, m in hits}  # type: ignore[attr-defined]
    for n, m in hits:
        model.set_submodule(n, new[m])
    return model


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Saves, each shared matrix under one name."""
    mine = {id(p) for m in model.modules() if isinstance(m, LowRank) for p in m.parameters()}
    return {n: p.detach().clone() for n, p in model.named_parameters() if id(p) in mine}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Counts."""
    return sum(p.numel() for p in model.parameters()), sum(p.numel() * p.requires_grad for p in model.parameters())


def compare_fine_tuning(steps: int = 3) -> dict[str, dict[str, float]]:
    """Both runs twice, the first time to warm up."""
    for _ in range(2):
        result = {
            "lora": _run(apply_lora_to_model(SimpleTransformer(), LoRAConfig()), steps),
            "full": _run(SimpleTransformer(), steps),
        }
    return result


def _run(model: nn.Module, steps: int) -> dict[str, float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=False)
        model(torch.arange(29)[None]).logsumexp(-1).sum().backward()
        optimizer.step()
    seconds = (time.perf_counter() - start) / steps
    return {
        "trainable_parameters": count_parameters(model)[1],
        "optimizer_bytes": sum(t.nbytes for s in optimizer.state.values() for t in s.values()),
        "gradient_bytes": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "seconds_per_step": seconds,
    }
