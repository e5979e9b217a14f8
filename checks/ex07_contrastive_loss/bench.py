"""Bench of ex07: forward and backward of the loss in chunks over the number of pairs, beside the plain loss."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.testing import Case, Run, Series

X = "pairs N"
REFERENCE = "plain"
CAPTION = "256 features, chunks of 512"
SECONDS = 28
HIGHER_IS_BETTER = ()
PANEL = "forward and backward"
E, CHUNK = 256, 512
COUNTS = (512, 1024, 2048, 4096, 8192)
LARGEST = COUNTS[-1]
_contestants: list[str] = []


def cases(modules: Mapping[str, ModuleType]) -> Iterator[Case]:
    """One step on unit rows of 256 features, in chunks of 512."""
    _contestants[:] = modules
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for n in COUNTS:
        rng = torch.Generator().manual_seed(n)
        given = [F.normalize(torch.randn(n, E, generator=rng), dim=1).to(device) for _ in range(2)]
        given.append(torch.tensor(1 / 0.07, device=device))
        runs = {name: _run(_in_chunks(module), given) for name, module in modules.items()}
        runs[REFERENCE] = _run(_plain, given)
        yield Case(PANEL, n, runs, memory=True)


def conclude(measured: Sequence[Series]) -> Iterable[str]:
    """Peak and time at the largest N, as a ratio of the plain loss's."""
    found = {one.metric: one.values for one in measured if one.panel == PANEL}
    for name in _contestants:
        share = {
            metric: values[name][LARGEST] / values[REFERENCE][LARGEST]
            for metric, values in found.items()
            if LARGEST in values.get(name, {}) and LARGEST in values.get(REFERENCE, {})
        }
        if share.keys() >= {"seconds", "peak bytes"}:
            claims = ("; at most 1/8 is claimed", "; at most 1.5 times is claimed") if name == "answer" else ("", "")
            yield (
                f"{name}: at N = {LARGEST}, E = {E}, chunks of {CHUNK}, 1/{1 / share['peak bytes']:.1f} of the plain "
                f"loss's peak{claims[0]}, and {share['seconds']:.2f} times its time{claims[1]}"
            )


def _run(loss: Callable[[Tensor, Tensor, Tensor], Tensor], given: Sequence[Tensor]) -> Run:
    leaves = [tensor.detach().requires_grad_() for tensor in given]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(*leaves).backward()

    return run


def _in_chunks(module: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda image, text, scale: module.chunked_contrastive_loss(image, text, scale, chunk_size=CHUNK)


def _plain(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits, labels = scale * image @ text.mT, torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.mT, labels)) / 2
