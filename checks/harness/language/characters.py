"""A toy: a small model of characters, trained at the first demo on Python's own help texts, and kept."""

import hashlib
import pydoc_data.topics
import string
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from harness.language.model import Language, size
from harness.model.exercise import UsageError
from harness.model.paths import BUILD, shown

_ALPHABET = "\n" + string.printable[:95]
_SIZES = {
    "model": {"d_model": 96, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 24, "d_ff": 256},
    "draft": {"d_model": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "d_ff": 64},
}
_SECONDS = {"model": 45.0, "draft": 8.0}
# What is written is no longer than what was read in training: beyond it the toy loses its way.
_STEPS, _ROWS, _LENGTH, _RATE, _NEW = 1500, 6, 128, 4e-3, 80
_PROMPTS = ("The for statement ", "A class definition ", "An exception is ", "Objects are ", "If the import ", "Both ")


def characters(decoder: Any, text: str, out: Console) -> Language:
    """The toy and its draft, trained where they are not yet kept: that takes most of a minute, once.

    Args:
        decoder: the class Decoder.
        text: its source; where it changes, a new toy is trained.
    """
    digest = hashlib.sha256(f"{text}{_SIZES}{_STEPS}{_LENGTH}".encode()).hexdigest()[:12]
    path = BUILD / "demo" / f"characters-{digest}.pt"
    models = _models(decoder)
    if path.exists():
        kept = torch.load(path, weights_only=True)
        for name, model in models.items():
            model.load_state_dict(kept[name])
    else:
        out.print("training a toy for the demos, once: characters of Python's help texts", soft_wrap=True)
        data = torch.tensor(encode("\n".join(pydoc_data.topics.topics.values())))
        for name, model in models.items():
            _train(name, model, data, out)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: model.state_dict() for name, model in models.items()}, path)
    costs = "its calls cost next to nothing, so that their number says more than the time"
    name = f"a toy of characters, {size(models['model'])}, kept in {shown(path.parent)}/; {costs}"
    return _language(models, name)


def untrained(decoder: Any) -> Language:
    """The toy as it is before its training: code can be tried on it at once."""
    return _language(_models(decoder), "untrained")


def _models(decoder: Any) -> dict[str, Any]:
    return {name: decoder(len(_ALPHABET), tied=True, **sizes) for name, sizes in _SIZES.items()}


def _language(models: dict[str, Any], name: str) -> Language:
    for model in models.values():
        model.eval().requires_grad_(False)
    return Language(models["model"], models["draft"], encode, decode, None, _NEW, name, _PROMPTS)


def encode(text: str) -> list[int]:
    """The characters' numbers; what is no ASCII is passed over.

    Raises:
        UsageError: nothing is left.
    """
    tokens = [number for number in map(_ALPHABET.find, text) if number >= 0]
    if not tokens:
        raise UsageError(f"PROMPT={text}: the toy knows ASCII characters alone")
    return tokens


def decode(tokens: Any) -> str:
    """The characters with these numbers."""
    return "".join(_ALPHABET[token] for token in tokens)


def _train(name: str, model: Any, data: Tensor, out: Console) -> None:
    """Trains for some steps, or until its time is up."""
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
    positions = torch.arange(_LENGTH).repeat(_ROWS)
    begin = time.monotonic()
    with Progress(console=out, transient=True) as progress:
        bar = progress.add_task(f"the {name}", total=_SECONDS[name])
        for step in range(_STEPS):
            passed = time.monotonic() - begin
            if passed > _SECONDS[name]:
                break
            progress.update(bar, completed=max(passed, step / _STEPS * _SECONDS[name]))
            for group in optimizer.param_groups:
                group["lr"] = _RATE * min(1.0, (step + 1) / 50) * max(0.05, 1 - passed / _SECONDS[name])
            starts = torch.randint(len(data) - _LENGTH - 1, (_ROWS, 1), generator=rng)
            rows = data[starts + torch.arange(_LENGTH + 1)]  # [rows, length + 1]
            logits = model(rows[:, :-1].flatten(), positions, _attend)
            loss = F.cross_entropy(logits, rows[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    out.print(f"the {name}: {size(model)}, {step} steps, {loss.item():.2f} nats per character", soft_wrap=True)


def _attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within each of the rows that lie one after the other."""
    q, k, v = (one.unflatten(0, (_ROWS, _LENGTH)).transpose(1, 2) for one in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return attended.transpose(1, 2).flatten(0, 1)
