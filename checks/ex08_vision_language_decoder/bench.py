"""Generation with an image in each prompt, by rows: yours, the answer's, and the whole sequence run again per token."""

import time
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from harness.testing import Case, Series

X = "rows"
REFERENCE = "all again"
CAPTION = "64 new tokens after an image of 64 tokens and 8 ids, width 256, 4 layers"
SECONDS = 20
HIGHER_IS_BETTER = ("tokens per second",)
PANEL = "generation"
ROWS = (1, 4, 16)
NEW, TEXT, VOCABULARY, WIDTH = 64, 8, 512, 256
IMAGE, PATCH, CHANNELS = 64, 8, 3  # 8 × 8 patches: 64 tokens an image
PLACEHOLDER = -200
CLAIMED = {1: 3.0, 16: 8.0}
# Running all again is timed on its first tokens, which are its fastest: all 64 of 16 rows take a minute.
FIRST = {1: 64, 4: 32, 16: 8}
_found: dict[tuple[str, int], Tensor] = {}


def cases(modules: Mapping[str, ModuleType]) -> Iterator[Case]:
    """64 new tokens for 1, 4 and 16 rows of an image and 8 ids, by a decoder of width 256 with 4 layers."""
    _found.clear()
    contestants = {REFERENCE: modules.get("answer") or modules["yours"], **modules}
    for rows in ROWS:
        rng = torch.Generator().manual_seed(rows)
        ids = torch.randint(VOCABULARY, (rows, TEXT + 1), generator=rng)
        ids[:, 1] = PLACEHOLDER
        images = torch.randn(rows, CHANNELS, IMAGE, IMAGE, generator=rng)
        runs = {name: Generation(name, module, ids, images) for name, module in contestants.items()}
        yield Case(PANEL, rows, runs, timed=False)


def conclude(measured: Sequence[Series]) -> Iterator[str]:
    """How many times faster than running all again, and whether the tokens are equal."""
    for one in measured:
        for name, line in one.values.items():
            beside = one.values.get(REFERENCE, {})
            if one.metric != "tokens per second" or name == REFERENCE:
                continue
            ratios = [
                f"{line[rows] / beside[rows]:.1f} times for {rows} row{'s' if rows > 1 else ''}"
                + (f" ({CLAIMED[rows]:g} is claimed)" if rows in CLAIMED else "")
                for rows in ROWS
                if rows in line and rows in beside
            ]
            pairs = [(_found[name, rows], _found[REFERENCE, rows]) for rows in ROWS if rows in line and rows in beside]
            same = all(torch.equal(came[:, : right.size(1)], right) for came, right in pairs)
            yield (
                f"{name}: as fast as running all again, {', '.join(ratios)}; the tokens are "
                f"{'equal' if same else 'not equal'}"
            )


class Generation:
    """One way to the new tokens of a batch; the model is made at the first."""

    def __init__(self, name: str, module: ModuleType, ids: Tensor, images: Tensor) -> None:
        self.name, self.module, self.ids, self.images = name, module, ids, images
        self.model: Any = None

    def __call__(self) -> Mapping[str, float]:
        """Generates once; its tokens per second."""
        self.model = self.model or model_of(self.module)
        begin = time.perf_counter()
        tokens = self.again() if self.name == REFERENCE else self.model.generate(self.ids, self.images, None, NEW)
        seconds = time.perf_counter() - begin
        _found[self.name, len(self.ids)] = tokens.cpu()
        return {"tokens per second": tokens.numel() / seconds}

    @torch.no_grad()
    def again(self) -> Tensor:
        """The whole sequence through forward, for each new token."""
        ids = self.ids
        for _ in range(FIRST[len(ids)]):
            logits, _ = self.model(ids, self.images)
            ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
        return ids[:, TEXT + 1 :]


def model_of(module: Any) -> Any:
    """A contestant's model in eval, with the same numbers in its weights as every other's."""
    tower = module.PatchEmbedding(IMAGE, PATCH, WIDTH, CHANNELS)
    model = module.VisionLanguageModel(tower, module.Decoder(VOCABULARY, WIDTH, 4, 4), WIDTH, PLACEHOLDER)
    rng = torch.Generator().manual_seed(0)
    weights: list[nn.Parameter] = [tower.proj.weight, tower.proj.bias, tower.position_embedding]
    for layer in (model.projector.fc1, model.projector.fc2):
        weights += [layer.weight, layer.bias]
    for parameter in (*weights, *model.decoder.parameters()):
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * parameter.size(-1) ** -0.5)
    return model.eval()
