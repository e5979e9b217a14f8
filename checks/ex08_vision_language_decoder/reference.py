"""What the checks of vision tokens build, and what they expect of it, row by row, apart from the learner's code."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.testing import Subject, fill, is_tensor, plain, untouched

P = PLACEHOLDER = -200
VOCABULARY, D, HEADS, LAYERS = 13, 8, 2, 2
T, WIDTH = 3, 6
IMAGE = (2, 2, 3)  # C, H, W
PLACES = 64
IGNORED = -100
# Three tokens an image: rows of 6, 2 and 5 tokens. What is hidden may be anything, a placeholder or no id at all.
PADDING: dict[str, tuple[list[list[int]], list[list[int]]]] = {
    "right": (
        [[9, P, 5, 6, P], [4, 7, P, P, -1], [P, 1, 2, 10**6, 0]],
        [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]],
    ),
    "left": (
        [[P, 9, P, 5, 6], [-1, P, P, 4, 7], [0, 10**6, P, 1, 2]],
        [[0, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]],
    ),
    "mixed": (
        [
            [P, 9, P, 5, 6],
            [4, 7, -1, P, P],
            [10**6, P, 1, 2, P],
        ],
        [[0, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0]],
    ),
}
LENGTHS = [6, 2, 5]


class Tower(nn.Module):
    """[M, 2, 2, 3] -> [M, T, WIDTH]; it notes what it is called with, and in training writes to its buffers."""

    calls: Tensor
    mean: Tensor

    def __init__(self, rng: torch.Generator, tokens: int = T) -> None:
        super().__init__()
        self.tokens = tokens
        self.weight = nn.Parameter(torch.empty(tokens * WIDTH, math.prod(IMAGE), dtype=torch.float64))
        self.shift = nn.Parameter(torch.empty(WIDTH, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(WIDTH, dtype=torch.float64))
        self.seen: list[tuple[tuple[int, ...], torch.dtype]] = []
        randomize(rng, self.weight, scale=0.4)
        randomize(rng, self.shift, scale=0.4)

    def forward(self, images: Tensor) -> Tensor:
        """One product, and a bias."""
        self.seen.append((tuple(images.shape), images.dtype))
        tokens = (images.flatten(1) @ self.weight.T).unflatten(1, (self.tokens, WIDTH)) + self.shift
        if self.training:
            with torch.no_grad():
                self.calls += 1
                self.mean.lerp_(tokens.detach().flatten(0, 1).mean(dim=0).to(self.mean.dtype), 0.1)
        return tokens


class Bare(nn.Module):
    """A tower without parameters: [M, C, H, W] -> [M, H·W, C], each pixel a token."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], torch.dtype]] = []

    def forward(self, images: Tensor) -> Tensor:
        """Rearranges."""
        self.seen.append((tuple(images.shape), images.dtype))
        return images.flatten(2).mT


@dataclass
class Batch:
    """What a call gets, and what its mask says."""

    ids: Tensor
    images: Tensor | None = None
    mask: Tensor | None = None
    labels: Tensor | None = None

    def visible(self) -> Tensor:
        """bool [B, L]."""
        return torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask != 0

    def copies(self) -> dict[str, tuple[Tensor, Tensor, int]]:
        """Each input with a copy and its version, by name."""
        given = {"input_ids": self.ids, "images": self.images, "attention_mask": self.mask, "labels": self.labels}
        return {name: (x, value(x), x._version) for name, x in given.items() if x is not None}


@dataclass
class Entry:
    """One token of a merged row: an id, or token `part` of image `number`; and its label."""

    id: int
    label: int
    number: int = -1
    part: int = 0


@dataclass
class Call:
    """What a decoder was called with."""

    shape: tuple[int, ...]
    mask: Tensor
    positions: Tensor
    grad: bool


@dataclass
class Built:
    """A model of the learner's, and its parts."""

    model: Any
    tower: Any
    decoder: Any
    placeholder: int = PLACEHOLDER
    pad: int = 0

    @property
    def per_image(self) -> int:
        """T."""
        return self.tower.tokens if isinstance(self.tower, Tower) else IMAGE[1] * IMAGE[2]

    def parameters(self) -> dict[str, Tensor]:
        """The parameters of all three parts by name, as they are."""
        parts = {"vision": self.tower, "projector": self.model.projector, "decoder": self.decoder}
        return {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}

    def weights(self, gradients: bool = False) -> dict[str, Tensor]:
        """Leaves in float64 that hold what the parameters hold now; `gradients`: and that ask for theirs."""
        found = {f"vision.{name}": exact(p) for name, p in self.tower.named_parameters()}
        for layer in ("fc1", "fc2"):
            weight, bias = plain(getattr(self.model.projector, layer))
            found |= {f"projector.{layer}.weight": weight.clone(), f"projector.{layer}.bias": bias.clone()}
        found |= {f"decoder.{name}": exact(p) for name, p in self.decoder.named_parameters()}
        untouched()
        return {name: held.requires_grad_() for name, held in found.items()} if gradients else found


@dataclass
class Expected:
    """What a batch gives, row by row: its entries, inputs, logits and loss, with the leaves that they depend on."""

    entries: list[list[Entry]]
    embeds: list[Tensor]
    weights: dict[str, Tensor]
    images: Tensor | None
    logits: list[Tensor] = field(default_factory=list)

    @property
    def loss(self) -> Tensor:
        """The mean over all labels that count, each predicted from the token before it."""
        terms = [
            -logits[place].log_softmax(-1)[entry.label]
            for entries, logits in zip(self.entries, self.logits, strict=True)
            for place, entry in enumerate(entries[1:])
            if entry.label != IGNORED
        ]
        return torch.stack(terms).mean() if terms else torch.zeros((), dtype=torch.float64)

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row."""
        return [len(entries) for entries in self.entries]


def randomize(rng: torch.Generator, *tensors: Tensor, scale: float = 0.5) -> None:
    """Writes new random numbers into tensors, in place."""
    with torch.no_grad():
        numbers = scale * torch.randn(sum(tensor.numel() for tensor in tensors), generator=rng, dtype=torch.float64)
        for tensor, part in zip(tensors, numbers.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def value(tensor: Tensor) -> Tensor:
    """A copy of what a tensor holds now."""
    return tensor.detach().clone()


def exact(tensor: Tensor) -> Tensor:
    """The same in float64."""
    return tensor.detach().to(torch.float64, copy=True)


def decoder_of(subject: Subject, rng: torch.Generator, absolute: bool = True, scale: float = 0.6) -> Any:
    """A given decoder that notes what it is called with; in float64. Absolute: each position adds a vector too."""

    class Noted(subject.Decoder):  # type: ignore[name-defined, misc]
        """The given one, and a vector for each position."""

        def __init__(self) -> None:
            super().__init__(VOCABULARY, D, LAYERS, HEADS)
            self.seen: list[Call] | None = []
            if absolute:
                self.places = nn.Parameter(torch.zeros(PLACES, D))

        def forward(
            self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any = None
        ) -> Any:
            """Notes, adds, and goes on."""
            if self.seen is not None:
                shape = tuple(inputs_embeds.shape)
                grad = torch.is_grad_enabled()
                self.seen.append(Call(shape, value(attention_mask), value(position_ids), grad))
            if absolute:
                inputs_embeds = inputs_embeds + self.places[position_ids.clamp(0, PLACES - 1)]
            return super().forward(inputs_embeds, attention_mask, position_ids, cache)

    torch.set_default_dtype(torch.float64)
    decoder = Noted()
    torch.set_default_dtype(torch.float32)
    parameters = dict(decoder.named_parameters())
    factors, offsets = sizes_of_numbers(tuple((name, p.numel()) for name, p in parameters.items()))
    numbers = scale * factors * torch.randn(len(factors), generator=rng, dtype=torch.float64) + offsets
    parts = numbers.split([p.numel() for p in parameters.values()])
    with torch.no_grad():
        for parameter, part in zip(parameters.values(), parts, strict=True):
            parameter.copy_(part.view(parameter.shape))
    return decoder


@cache
def sizes_of_numbers(parameters: tuple[tuple[str, int], ...]) -> tuple[Tensor, Tensor]:
    """By what random numbers of a decoder are multiplied, and what is added. Biases are small: large ones would decide
    each next token alone.
    """
    factors, offsets = [], []
    for name, count in parameters:
        small = name.endswith("bias") or "norm" in name
        factors += [0.15 if small else 2.0 if name == "places" else 1.0] * count
        offsets += [float("norm" in name and name.endswith("weight"))] * count
    return torch.tensor(factors, dtype=torch.float64), torch.tensor(offsets, dtype=torch.float64)


def build(
    subject: Subject,
    rng: torch.Generator,
    tower: nn.Module | None = None,
    absolute: bool = True,
    placeholder: int = PLACEHOLDER,
    pad: int = 0,
    scale: float = 0.6,
) -> Built:
    """A VisionLanguageModel in float64 with weights of the check's choosing."""
    tower = Tower(rng) if tower is None else tower
    decoder = decoder_of(subject, rng, absolute, scale)
    width = WIDTH if isinstance(tower, Tower) else IMAGE[0]
    made: Any = subject.VisionLanguageModel(tower, decoder, width, placeholder, pad)
    for name, part in (("vision", tower), ("decoder", decoder)):
        held = getattr(made, name, None)
        assert held is part, f"VisionLanguageModel.{name}: a {type(held).__name__} came, the given module was wanted"
    is_module = isinstance(made, nn.Module)
    assert is_module, f"VisionLanguageModel: a {type(made).__name__} came, an nn.Module was wanted"
    made.double()
    fill(made.projector.fc1, made.projector.fc2)
    return Built(made, tower, decoder, placeholder, pad)


def pictures(rng: torch.Generator, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random images [count, 2, 2, 3]."""
    return torch.randn(count, *IMAGE, generator=rng, dtype=torch.float64).to(dtype)


def batch(
    rng: torch.Generator,
    ids: Sequence[Sequence[int]],
    mask: Sequence[Sequence[int]] | None = None,
    labels: Sequence[Sequence[int]] | None = None,
    placeholder: int = PLACEHOLDER,
) -> Batch:
    """Rows of ids, with an image for each visible placeholder."""
    made = Batch(torch.tensor(ids))
    made.mask = None if mask is None else torch.tensor(mask)
    made.labels = None if labels is None else torch.tensor(labels)
    made.images = pictures(rng, int(((made.ids == placeholder) & made.visible()).sum()))
    return made


def entries_of(given: Batch, placeholder: int, per_image: int) -> list[list[Entry]]:
    """The tokens of each row, in order."""
    rows, count = [], 0
    labels = given.labels if given.labels is not None else torch.full_like(given.ids, IGNORED)
    for ids, visible, learnt in zip(given.ids.tolist(), given.visible().tolist(), labels.tolist(), strict=True):
        row: list[Entry] = []
        for one, shown, label in zip(ids, visible, learnt, strict=True):
            if shown and one == placeholder:
                row += [Entry(one, IGNORED, count, part) for part in range(per_image)]
                count += 1
            elif shown:
                row.append(Entry(one, label))
        rows.append(row)
    return rows


def image_tokens(built: Built, w: dict[str, Tensor], images: Tensor) -> Tensor:
    """[M, C, H, W] -> [M, T, D]."""
    if isinstance(built.tower, Tower):
        flat = torch.einsum("mi,oi->mo", images.reshape(len(images), -1), w["vision.weight"])
        tokens = flat.reshape(len(images), -1, WIDTH) + w["vision.shift"]
    else:
        tokens = images.reshape(*images.shape[:2], -1).transpose(1, 2)
    inner = F.gelu(F.linear(tokens, w["projector.fc1.weight"], w["projector.fc1.bias"]))
    return F.linear(inner, w["projector.fc2.weight"], w["projector.fc2.bias"])


def expect(built: Built, given: Batch, run: bool = True, gradients: bool = False) -> Expected:
    """What a batch gives with the weights as they are now; `run`: with logits; `gradients`: to go backward from."""
    w = built.weights(gradients)
    images = None if given.images is None else exact(given.images).requires_grad_(gradients)
    tokens = None if images is None or not len(images) else image_tokens(built, w, images)
    entries = entries_of(given, built.placeholder, built.per_image)
    embeds = [torch.stack([vector(w, tokens, entry) for entry in row]) for row in entries]
    expected = Expected(entries, embeds, w, images)
    if run:
        expected.logits = decode(w, embeds)
    return expected


def vector(w: dict[str, Tensor], tokens: Tensor | None, entry: Entry) -> Tensor:
    """What stands for one token."""
    if entry.number < 0:
        return w["decoder.embed.weight"][entry.id]
    assert tokens is not None, "the check's own set-up holds"
    return tokens[entry.number, entry.part]


def decode(w: dict[str, Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
    """Rows [n, D] through the decoder: [n, V] of each. Padded on the right, which no token before it can see."""
    x = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)  # [B, n, D]
    n, half = x.size(1), D // HEADS // 2
    if "decoder.places" in w:
        x = x + w["decoder.places"][:n]
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(n, dtype=torch.float64)[:, None, None, None] * frequencies  # [n, 1, 1, Dh/2]
    turns = torch.polar(torch.ones_like(angles), angles)
    for layer in range(LAYERS):
        p = {name: w[f"decoder.layers.{layer}.{name}"] for name in _NAMES}
        normed = F.layer_norm(x, (D,), p["norm1.weight"], p["norm1.bias"])
        qkv = F.linear(normed, p["qkv.weight"], p["qkv.bias"]).unflatten(-1, (3, HEADS, -1))  # [B, n, 3, H, Dh]
        pairs = torch.complex(*qkv[:, :, :2].chunk(2, dim=-1)) * turns
        q, k = torch.cat([pairs.real, pairs.imag], dim=-1).transpose(1, 3).unbind(2)  # [B, H, n, Dh]
        attended = F.scaled_dot_product_attention(q, k, qkv[:, :, 2].transpose(1, 2), is_causal=True)
        x = x + F.linear(attended.transpose(1, 2).flatten(2), p["out.weight"], p["out.bias"])
        normed = F.layer_norm(x, (D,), p["norm2.weight"], p["norm2.bias"])
        x = x + F.linear(F.gelu(F.linear(normed, p["up.weight"], p["up.bias"])), p["down.weight"], p["down.bias"])
    x = F.layer_norm(x, (D,), w["decoder.norm.weight"], w["decoder.norm.bias"])
    return [one[: len(row)] for one, row in zip(F.linear(x, w["decoder.head.weight"]), rows, strict=True)]


_NAMES = [f"{layer}.{kind}" for layer in ("norm1", "norm2", "qkv", "out", "up", "down") for kind in ("weight", "bias")]


@torch.no_grad()
def continued(built: Built, given: Batch, steps: int) -> Tensor:
    """The greedy tokens of each row, all of which are run as a whole for each of them: [B, steps]."""
    expected = expect(built, given, run=False)
    table, rows, new = expected.weights["decoder.embed.weight"], list(expected.embeds), []
    for _ in range(steps):
        best = torch.stack([logits[-1] for logits in decode(expected.weights, rows)]).topk(2)
        margins = best.values @ torch.tensor([1.0, -1.0], dtype=torch.float64)
        assert margins.min() > 1e-6, "the check's own set-up has no ties"
        new.append(best.indices[:, 0])
        rows = [torch.cat([row, table[one][None]]) for row, one in zip(rows, best.indices[:, 0], strict=True)]
    return torch.stack(new, dim=1)


def ended(tokens: Tensor, eos: int, pad: int) -> Tensor:
    """The same, with `pad` after the first `eos` of each row."""
    found = (tokens == eos).cumsum(dim=1)
    return tokens.masked_fill(found - (tokens == eos).long() > 0, pad)


def merged(built: Built, given: Batch, what: str = "merge", **more: Any) -> Any:
    """The learner's merge, whose result has the four parts."""
    found = built.model.merge(given.ids, given.images, given.mask, given.labels, **more)
    for name in ("inputs_embeds", "attention_mask", "position_ids"):
        is_tensor(getattr(found, name, None), f"{what}: {name}")
    assert hasattr(found, "labels"), f"{what}: a {type(found).__name__} without labels came, a Merged was wanted"
    return found


def ran(built: Built, given: Batch, what: str = "forward") -> tuple[Tensor, Any]:
    """The learner's forward: logits, and the loss or what else came."""
    found = built.model(given.ids, given.images, given.mask, given.labels)
    pair = isinstance(found, (tuple, list)) and len(found) == 2
    assert pair, f"{what}: a {type(found).__name__} came, the pair of logits and loss was wanted"
    return is_tensor(found[0], f"{what}: logits"), found[1]


def spelled(built: Built, given: Batch, came: Tensor) -> str:
    """What stands at each place of merged rows, by the nearest vector that there is: "row 0: 9 a1 a2 5 6"."""
    expected = expect(built, given, run=False)
    names = [str(number) for number in range(VOCABULARY)]
    vectors = [*expected.weights["decoder.embed.weight"].detach()]
    if expected.images is not None and len(expected.images):
        tokens = image_tokens(built, expected.weights, expected.images).detach()
        for number, image in enumerate(tokens):
            names += [f"{chr(97 + number)}{part + 1}" for part in range(len(image))]
            vectors += [*image]
    lines = []
    for number, (row, entries) in enumerate(zip(came.detach().double(), expected.entries, strict=True)):
        gaps = torch.cdist(row, torch.stack(vectors))
        found = [names[int(gap.argmin())] if gap.min() < 1e-3 else "?" for gap in gaps]
        wanted = [str(e.id) if e.number < 0 else f"{chr(97 + e.number)}{e.part + 1}" for e in entries]
        if found[: len(wanted)] != wanted:
            lines.append(f"row {number}: {' '.join(found)} came, {' '.join(wanted)} was wanted")
    if not lines:
        return ""
    return "\n".join([*lines, "a number is an id's token, a1 the first token of the first image, ? neither of them"])


def padded(rows: Sequence[Tensor], length: int, side: str = "right") -> Tensor:
    """Rows [n, …] of several lengths as [B, length, …], with zeros on one side."""
    made = rows[0].new_zeros(len(rows), length, *rows[0].shape[1:])
    for place, row in enumerate(rows):
        if side == "right":
            made[place, : len(row)] = row
        else:
            made[place, length - len(row) :] = row
    return made


def shown(lengths: Sequence[int], side: str = "right") -> Tensor:
    """The mask of padded rows, bool [B, S]."""
    return padded([torch.ones(length, dtype=torch.bool) for length in lengths], max(lengths), side)


def calls_told(decoder: Any, lengths: Sequence[int]) -> str:
    """What is wrong with masks or positions in the calls of a decoder, by rows of these lengths; the first fault."""
    for number, call in enumerate(decoder.seen or []):
        if len(call.mask) != len(lengths) or call.positions.shape != call.shape[:2]:
            return f"call {number + 1} of the decoder: inputs_embeds {call.shape}, position_ids {list(call.positions)}"
        after = [length + number for length in lengths]
        if (found := call.mask.long().sum(dim=1).tolist()) != after:
            return f"call {number + 1} of the decoder: {found} tokens of the rows are visible, {after} were wanted"
        for row, last in enumerate(after):
            places = call.positions[row][call.mask[row, -call.shape[1] :].bool()].tolist()
            wanted = list(range(last)) if number == 0 else [last - 1]
            if places != wanted:
                return f"call {number + 1} of the decoder, row {row}: position_ids {places} came, {wanted} were wanted"
    return ""
