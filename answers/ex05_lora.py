"""The answer to ex05, LoRA."""

import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LoRALinear(nn.Module):
    """A linear layer with a low-rank adapter beside it.

    Args:
        original_layer: the layer to adapt; it stays reachable under this name.
        rank: number of rows of A, at least 1.
        alpha: the adapter's output is scaled by alpha/rank.
        dropout: probability that an element of the adapter's input is dropped in training.

    Attributes:
        original_layer, rank, alpha: as given.
        scaling: alpha/rank.
        lora_A: [rank, in], random at the start; lora_B: [out, rank], zero at the start. Parameters, or properties that
            give parameters.
    """

    def __init__(self, original_layer: nn.Linear, rank: int = 4, alpha: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.original_layer = original_layer
        self.rank = rank
        self.alpha = alpha
        self.scaling = alpha / rank
        weight = original_layer.weight  # [out, in]
        # By 1/√in, A x has the scale of x, whatever the layer's width.
        start = torch.randn(rank, weight.size(1), dtype=weight.dtype, device=weight.device)
        self.lora_A = nn.Parameter(start * weight.size(1) ** -0.5)  # [rank, in]
        self.lora_B = nn.Parameter(weight.new_zeros(weight.size(0), rank))  # [out, rank]
        self.dropout = nn.Dropout(dropout)
        # In a list, because as an attribute of its own it would be one more parameter of this module.
        self._own_weight: list[Tensor] = []
        self.train(original_layer.training)

    @property
    def weight(self) -> Tensor:
        """The whole adapted weight [out, in], for a parent that reads it in place of calling this module."""
        original = self.original_layer.weight
        return original if self._own_weight else original + self.scaling * self.lora_B @ self.lora_A

    @property
    def bias(self) -> Tensor | None:
        """The original's bias, for the same parents."""
        return self.original_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """The adapted layer's output.

        Args:
            x: [..., in].

        Returns:
            [..., out].
        """
        output = self.original_layer(x)
        if self._own_weight:
            return output
        return output + self.dropout(x) @ self.lora_A.mT @ self.lora_B.mT * self.scaling

    def merge_weights(self) -> None:
        """Makes original_layer.weight W + alpha/rank · B A; does nothing where that is done already."""
        if not self._own_weight:
            merged = nn.Parameter(self.weight.detach(), requires_grad=False)
            self._own_weight.append(self.original_layer.weight)
            self.original_layer.weight = merged

    def unmerge_weights(self) -> None:
        """Gives original_layer its own weight W back, bit for bit; does nothing where nothing is merged."""
        if self._own_weight:
            self.original_layer.weight = self._own_weight.pop()


class LoRAConfig:
    """What to adapt, and how. Each argument is an attribute of the same name.

    Args:
        rank: rank of every adapter.
        alpha: alpha of every adapter.
        target_modules: names of the layers to adapt; None means ["q_proj", "v_proj"], a new list each time.
        dropout: dropout of every adapter.
    """

    def __init__(
        self, rank: int = 4, alpha: float = 8.0, target_modules: list[str] | None = None, dropout: float = 0.1
    ) -> None:
        self.rank = rank
        self.alpha = alpha
        self.target_modules = ["q_proj", "v_proj"] if target_modules is None else target_modules
        self.dropout = dropout


def apply_lora_to_model(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Freezes a model and puts a LoRALinear in the place of each matched layer, in place.

    Args:
        model: any module; it is changed.
        config: which layers to adapt, and how.

    Returns:
        The same model.

    Raises:
        ValueError: the rank is below 1, or no target matches a linear layer; then the message names the targets and
            some of the model's linear layers.
    """
    if config.rank < 1:
        raise ValueError(f"rank {config.rank} is below 1")
    targets = config.target_modules
    modules = model.named_modules(remove_duplicate=False)
    linears = {path: module for path, module in modules if isinstance(module, nn.Linear)}
    matched = {path: layer for path, layer in linears.items() if path in targets or path.split(".")[-1] in targets}
    if not matched:
        raise ValueError(f"targets {targets} match none of the model's linear layers, such as {list(linears)[:8]}")

    model.requires_grad_(False)
    adapters: dict[nn.Linear, LoRALinear] = {}
    for path, layer in matched.items():
        if layer not in adapters:
            adapters[layer] = LoRALinear(layer, config.rank, config.alpha, config.dropout)
        model.set_submodule(path, adapters[layer])
    return model


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters of a model and nothing else, as copies, under keys that the model's load_state_dict knows.

    An adapter in several places comes once or in each. The model may be a LoRALinear itself.
    """
    return {key: value.clone() for key, value in model.state_dict().items() if key.endswith(("lora_A", "lora_B"))}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many numbers the model's parameters hold: (all, trainable). Shared parameters count once, buffers never."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def compare_fine_tuning(steps: int = 3) -> dict[str, dict[str, float]]:
    """Trains a SimpleTransformer fully and another one with adapters, each by AdamW for `steps` steps, and measures.

    Args:
        steps: optimizer steps of each run, at least 1.

    Returns:
        {"full": …, "lora": …}, each with the measured numbers trainable_parameters, optimizer_bytes, gradient_bytes
        and seconds_per_step (mean or median).
    """
    lora = apply_lora_to_model(SimpleTransformer(), LoRAConfig())
    return {"full": _train(SimpleTransformer(), steps), "lora": _train(lora, steps)}


def _train(model: nn.Module, steps: int) -> dict[str, float]:
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    tokens = torch.randint(29, (4, 9))  # [B, L + 1]
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])  # [B, L, vocabulary]
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    seconds = time.perf_counter() - start

    state = [value for values in optimizer.state.values() for value in values.values()]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {
        "trainable_parameters": count_parameters(model)[1],
        "optimizer_bytes": sum(value.nbytes for value in state),
        "gradient_bytes": sum(gradient.nbytes for gradient in gradients),
        "seconds_per_step": seconds / steps,
    }


# Given; no need to change.
class SimpleAttention(nn.Module):
    """Causal self-attention whose four projections are plain linear layers, which are called."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in projected)  # [B, H, L, Dh]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(attended.transpose(1, 2).flatten(start_dim=2))  # [B, L, D]


# Given; no need to change.
class PrebuiltAttention(nn.Module):
    """Self-attention by nn.MultiheadAttention, which reads the weight of its out_proj in place of calling it."""

    def __init__(self, d_model: int = 16, num_heads: int = 2) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(d_model, num_heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        attended, _ = self.attention(x, x, x, need_weights=False)
        return attended


# Given; no need to change.
class SimpleTransformer(nn.Module):
    """A small language model: tokens below `vocabulary`, [B, L] -> logits [B, L, vocabulary]."""

    def __init__(self, vocabulary: int = 29, d_model: int = 16, num_heads: int = 2, num_layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d_model)
        self.attentions = nn.ModuleList(SimpleAttention(d_model, num_heads) for _ in range(num_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(num_layers))
        self.head = nn.Linear(d_model, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L] -> [B, L, vocabulary]."""
        x = self.embedding(tokens)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x))
        return self.head(x)


def test_lora() -> None:
    """Your own test of LoRA: passes on right code, fails on each slip listed above."""
    torch.manual_seed(0)
    x = torch.randn(5, 7)
    linear = nn.Linear(7, 3)
    weight = linear.weight.detach().clone()
    original = linear(x).detach()
    layer = LoRALinear(linear, rank=2, alpha=6.0)
    torch.testing.assert_close(layer(x).detach(), original)
    assert layer.lora_A.any(), "A starts at zero"

    with torch.no_grad():
        layer.lora_B.normal_()
    expected = (original + x @ layer.lora_A.mT @ layer.lora_B.mT * 6.0 / 2).detach()
    torch.testing.assert_close(layer(x).detach(), expected, atol=1e-5, rtol=1e-5)
    layer.merge_weights()
    layer.merge_weights()
    torch.testing.assert_close(layer(x).detach(), expected, atol=1e-5, rtol=1e-5)
    layer.unmerge_weights()
    assert torch.equal(layer.original_layer.weight, weight), "unmerging does not restore every bit"

    model = apply_lora_to_model(SimpleTransformer(), LoRAConfig(rank=2, target_modules=["q_proj"]))
    adapters = 2 * 2 * (16 + 16)  # layers · rank · (in + out)
    assert count_parameters(model)[1] == adapters, "not the adapters alone are trainable"
    saved = lora_state_dict(model)
    assert sum(value.numel() for value in saved.values()) == adapters, "not the adapters alone are saved"
    try:
        apply_lora_to_model(SimpleTransformer(), LoRAConfig(target_modules=["proj"]))
    except ValueError:
        return
    raise AssertionError("a target that matches no layer's name is accepted")
