"""A walk over calls of patch embeddings (8.1, 8.2)."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from harness.testing import Aspect, Close, Step, Subject, Walk, is_tensor, walk_check

from .reference import randomize, value
from .test_patches import cut, table_on

E = 3
TOLERANCES = {torch.float64: 1e-5, torch.float32: 2e-5, torch.bfloat16: 5e-2}
MODES: dict[str, Callable[[], Any]] = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@dataclass
class Layers:
    """The layers of a walk, made when they are first called."""

    subject: Subject
    held: dict[tuple[int, int, int], Any] = field(default_factory=dict)

    def at(self, grid: int, patch: int, channels: int) -> Any:
        """The layer of some sizes."""
        key = grid, patch, channels
        if key not in self.held:
            layer = self.subject.PatchEmbedding(grid * patch, patch, E, channels).double()
            randomize(torch.Generator().manual_seed(len(self.held)), *layer.parameters())
            self.held[key] = layer
        return self.held[key]


class Patches(Walk):
    """Calls of a few layers."""

    # fmt: off
    aspects = (
        Aspect("grid", "8.2", {
            "": (2, 2), "1 × 4 patches": (1, 4), "4 × 1 patches": (4, 1), "3 × 2 patches": (3, 2),
            "1 × 1 patches": (1, 1), "5 × 5 patches": (5, 5),
        }, 0.6),
        Aspect("own", "8.2", {"": 2, "G = 1": 1, "G = 3": 3}, 0.3),
        Aspect("before", "8.2", {
            "": "", "after new weights by .data": "data", "after a step": "step", "after a bad side": "error",
            "after a cast there and back": "cast", "after the same images on another layer": "other",
        }),
        Aspect("writes", "8.1", {"": False, "looking at what is written to": True}),
        Aspect("patch", "8.1", {"": 2, "P = 1": 1, "P = 3": 3}, 0.4),
        Aspect("channels", "8.1", {"": 3, "1 channel": 1, "4 channels": 4}, 0.4),
        Aspect("count", "8.1", {"": 2, "one image": 1, "5 images": 5}, 0.4),
        Aspect("layout", "8.1", {"": "", "transposed images": "transposed", "sliced images": "sliced",
                                 "expanded images": "expanded"}),
        Aspect("scale", "8.1", {"": 0.0, "images near 100": 100.0}, 0.2),
        Aspect("dtype", "8.1", {"": torch.float64, "in float32": torch.float32, "in bfloat16": torch.bfloat16}, 0.25),
        Aspect("flag", "8.1", {"": True, "in eval": False}, 0.3),
        Aspect("mode", "8.1", {"": "", "under no_grad": "no_grad", "under inference_mode": "inference"}, 0.3),
    )
    # fmt: on
    otherwise = ""

    def begin(self, subject: Subject) -> Layers:
        """No layer yet."""
        return Layers(subject)

    def step(self, state: Layers, step: Step) -> None:
        """One call, with gradients where they are on."""
        rng, (rows, columns), dtype = step.rng(), step["grid"], step["dtype"]
        layer = state.at(step["own"], step["patch"], step["channels"])
        images, other = drawn(step, rng), state.at(5, step["patch"], step["channels"]).to(dtype)
        layer.train(step["flag"]).to(dtype)
        with MODES[step["mode"]]():
            before(layer, other, images, step)
        changed(layer, step, rng)
        layer.zero_grad()
        proj, table = (value(x) for x in (layer.proj.weight, layer.position_embedding))
        kept, version, given = value(images), images._version, images.detach().requires_grad_(not step["mode"])

        with MODES[step["mode"]]():
            output = is_tensor(layer(given), "PatchEmbedding.forward(images)")

        wanted = cut(layer, kept) + table_on(table, rows, columns)
        close = Close(TOLERANCES[dtype] * max(1.0, step["scale"] / 10))
        close(output.detach(), wanted.to(dtype), "PatchEmbedding.forward(images)")
        if step["writes"]:
            assert torch.equal(images, kept), "PatchEmbedding.forward: the images have changed"
            assert images._version == version, "PatchEmbedding.forward: the images are written to"
        if not step["mode"] and dtype == torch.float64:
            moves(close, layer, given, output, proj, (rows, columns), rng)


def moves(
    close: Close, layer: Any, given: Tensor, output: Tensor, proj: Tensor, grid: tuple[int, int], rng: torch.Generator
) -> None:
    """The gradients of proj, the table and the images."""
    probe = torch.randn(output.shape, generator=rng, dtype=torch.float64)
    output.backward(probe)
    table = value(layer.position_embedding).requires_grad_()
    (table_on(table, *grid) * probe).sum().backward()
    what = "PatchEmbedding.forward, backward: gradient of"
    close(layer.position_embedding.grad, is_tensor(table.grad, ""), f"{what} position_embedding")
    close(layer.proj.bias.grad, probe.sum((0, 1)), f"{what} proj.bias")
    spread = torch.einsum("mno,ocij->mncij", probe, proj).unflatten(1, grid)  # [M, rows, columns, C, P, P]
    close(given.grad, spread.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3), f"{what} images")


def drawn(step: Step, rng: torch.Generator) -> Tensor:
    """The step's images, by the strides that are drawn."""
    (rows, columns), p = step["grid"], step["patch"]
    shape = step["count"], step["channels"], rows * p, columns * p
    images = torch.randn(shape, generator=rng, dtype=torch.float64).to(step["dtype"]) + step["scale"]
    if step["layout"] == "transposed":
        return images.mT.contiguous().mT
    if step["layout"] == "sliced":
        return torch.stack([images, images], -1)[..., 1]
    return images[:1].expand(shape) if step["layout"] == "expanded" else images


def before(layer: nn.Module, other: nn.Module, images: Tensor, step: Step) -> None:
    """A call before the call."""
    if step["before"] == "error":
        with contextlib.suppress(Exception):
            layer(images.new_zeros(1, step["channels"], 7, 2 * step["patch"] + 1))
    elif step["before"]:
        (other if step["before"] == "other" else layer)(images)


def changed(layer: nn.Module, step: Step, rng: torch.Generator) -> None:
    """Other weights after it."""
    if step["before"] == "data":
        randomize(rng, *(parameter.data for parameter in layer.parameters()))
    elif step["before"] == "step":
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(-0.9)
    elif step["before"] == "cast":
        layer.float().double().to(step["dtype"])


test_patches_in_any_order = walk_check(Patches(), 13)
