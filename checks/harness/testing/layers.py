"""Layers that an exercise gives: of exactly that kind, with weights that the check chose, read before all else."""

import torch
from torch import Tensor, nn


def fill(*layers: nn.Linear) -> None:
    """Gives layers of a submission weights of the check's choosing, whatever they were initialised with."""
    rng = torch.Generator().manual_seed(1)
    for layer in layers:
        for parameter in _parameters(layer):
            bound = layer.in_features**-0.5
            values = (torch.rand(parameter.shape, generator=rng, dtype=torch.float64) * 2 - 1) * bound
            with torch.no_grad():
                parameter.copy_(values)


def plain(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of a given layer in float64, as its parameters hold them.

    Raises:
        AssertionError: it is another kind of layer, its parameters are not what is read, or weights have vanished.
    """
    weight, bias = (parameter.detach().double() for parameter in _parameters(layer))
    assert weight.norm(dim=1).min() > 1e-3, f"a given layer's weights came to nothing: {layer}"
    return weight, bias


def _parameters(layer: nn.Linear) -> list[nn.Parameter]:
    kind = type(layer)
    assert kind is nn.Linear, f"a {kind.__name__} came where a given nn.Linear was wanted"
    held = [vars(layer)["_parameters"].get(name) for name in ("weight", "bias")]
    for name, parameter in zip(("weight", "bias"), held, strict=True):
        assert type(parameter) is nn.Parameter and name not in vars(layer), (
            f"a given layer's {name} is no plain nn.Parameter of its own"
        )
    hooks = [name for name, value in vars(layer).items() if name.endswith("hooks") and value]
    assert not hooks, f"a given layer has hooks: {', '.join(hooks)}"
    return held
