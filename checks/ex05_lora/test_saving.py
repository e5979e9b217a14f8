"""Saving and loading (5.8): the adapters alone, and their outputs again."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.testing import Close, Subject, also, requirement

from .reference import (
    IN,
    OUT,
    RANK,
    TINY_ADAPTERS,
    TOKENS,
    Tiny,
    adapter_at,
    apply,
    linear,
    randomize,
    tiny_adapters,
    tree,
    value,
)


def adapted_pair(subject: Subject, rng: torch.Generator, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Two models with the same base, freshly adapted; the first one's adapters are then changed."""
    base = Tiny(rng)
    trained, other = (apply(subject, copy.deepcopy(base), "q_proj", "v_proj").to(dtype) for _ in range(2))
    for layer in tiny_adapters(trained):
        randomize(rng, layer.lora_A, layer.lora_B)
    return trained, other


def saved_by(subject: Subject, model: nn.Module) -> dict[str, Tensor]:
    """What lora_state_dict gives, if that is a dict of named tensors."""
    saved = subject.lora_state_dict(model)
    assert isinstance(saved, dict) and all(isinstance(key, str) for key in saved), (
        f"lora_state_dict(model): a {type(saved).__name__} came, a dict of tensors by name was wanted"
    )
    others = {key: type(held).__name__ for key, held in saved.items() if not isinstance(held, Tensor)}
    assert not others, f"lora_state_dict(model): {others} came where tensors were wanted"
    return saved


@requirement("5.8")
def test_the_adapters_alone_are_saved(subject: Subject, rng: torch.Generator) -> None:
    """What is saved holds as many numbers as the adapters do: nothing of the base, nothing missing."""
    model, _ = adapted_pair(subject, rng)

    saved = saved_by(subject, model)

    numbers = sum(held.numel() for held in saved.values())
    fact = f"lora_state_dict(model): {numbers} numbers in {len(saved)} tensors came; the adapters hold {TINY_ADAPTERS}"
    with also(saved_too, model, saved, "q_proj", "block.v_proj"):
        assert numbers == TINY_ADAPTERS, f"{fact}\nsave A and B of every adapter, and nothing of the base"


def saved_too(model: nn.Module, saved: dict[str, Tensor], *paths: str) -> str:
    """Names what was saved and holds the numbers of a parameter of the base."""
    adapters = [adapter_at(model, path) for path in paths]
    own = {tensor.data_ptr() for layer in adapters for tensor in (layer.lora_A, layer.lora_B)}
    base = [held for held in model.state_dict().values() if held.data_ptr() not in own]
    more = [key for key, held in saved.items() if any(held.shape == b.shape and held.to(b).equal(b) for b in base)]
    return f"saved too: [{', '.join(map(repr, more[:4]))}{', …' if len(more) > 4 else ''}]" if more else ""


@requirement("5.8")
def test_neither_names_nor_flags_make_an_adapter(subject: Subject, rng: torch.Generator) -> None:
    """A frozen adapter is saved; a trained head is not, nor a layer of the base that is named like a part of one."""
    names = ("flora", "lora_head", "a.down", "a.up", "adapter", "a.lora")
    model = apply(subject, tree({"a.q_proj": linear(rng), **{name: linear(rng, 3, 5) for name in names}}), "q_proj")
    wanted = RANK * (IN + OUT)
    for flag in (True, False):
        saved = saved_by(subject, model.requires_grad_(flag))

        numbers = sum(held.numel() for held in saved.values())
        with also(saved_too, model, saved, "a.q_proj"):
            assert numbers == wanted, (
                f"lora_state_dict(model), every requires_grad {flag}, base layers {names}: {numbers} numbers came; "
                f"the adapter holds {wanted}\nsave A and B of every adapter, and nothing of the base"
            )


@requirement("5.8")
@pytest.mark.parametrize(
    ("dtype", "merged"), [(torch.float64, False), (torch.bfloat16, False), (torch.float32, True)], ids=str
)
def test_saved_adapters_load_into_a_fresh_model(
    subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype, merged: bool
) -> None:
    """Without an unexpected key, A and B come back bit for bit, saved while merged, and by way of a file, or not."""
    trained, other = adapted_pair(subject, rng, dtype)
    for layer in tiny_adapters(trained) if merged else ():
        layer.merge_weights()
    saved = saved_by(subject, trained)
    if merged:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file)

    missing, unexpected = other.load_state_dict(saved, strict=False)

    assert not unexpected, f"load_state_dict(lora_state_dict(model), strict=False): unexpected keys {unexpected}"
    hint = "A and B come back bit for bit, each under its own key"
    while_merged = ", saved while merged" if merged else ""
    for path in ("q_proj", "block.v_proj"):
        for name in ("lora_A", "lora_B"):
            came, wanted = (value(getattr(adapter_at(model, path), name)) for model in (other, trained))
            try:
                close(came, wanted, f"{path}.{name} after loading{while_merged}", tolerance=0, hint=hint)
            except AssertionError as error:
                keys = keys_of(other, getattr(adapter_at(other, path), name))
                if not keys or not keys <= set(missing):
                    raise
                raise AssertionError(
                    f"lora_state_dict(model){while_merged}: {path}.{name} is not in what was saved; "
                    f"the keys {list(saved)} came, A and B of every adapter were wanted"
                ) from error


def keys_of(model: nn.Module, tensor: Tensor) -> set[str]:
    """The keys of a model's state_dict under which a tensor lies."""
    return {key for key, held in model.state_dict().items() if held.data_ptr() == tensor.data_ptr()}


@requirement("5.8")
def test_a_loaded_adapter_gives_the_same_output(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The fresh model, which has been called before, computes as the trained one does."""
    trained, other = adapted_pair(subject, rng)
    expected = value(trained(torch.tensor(TOKENS)))
    other.eval()(torch.tensor(TOKENS))

    other.load_state_dict(saved_by(subject, trained), strict=False)

    close(other(torch.tensor(TOKENS)), expected, "output after loading the adapter into a fresh model", tolerance=1e-6)


@requirement("5.8")
def test_what_is_saved_is_a_copy(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Training goes on without changing what was saved, and loading it brings the saved state back."""
    model, _ = adapted_pair(subject, rng)
    saved = saved_by(subject, model)
    before = {key: value(held) for key, held in saved.items()}
    expected = value(model(torch.tensor(TOKENS)))

    for layer in tiny_adapters(model):
        randomize(rng, layer.lora_A, layer.lora_B)

    for key, held in saved.items():
        close(
            value(held),
            before[key],
            f"saved {key!r} after more training",
            tolerance=0,
            hint="a reference was saved, no copy",
        )
    model.load_state_dict(saved, strict=False)
    close(model(torch.tensor(TOKENS)), expected, "output after loading the earlier adapter again", tolerance=1e-6)


@requirement("5.8")
def test_a_single_layer_is_saved_and_loaded(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A LoRALinear that is no part of a model is saved under keys that it knows itself."""
    trained, other = (subject.LoRALinear(linear(rng), rank=RANK) for _ in range(2))
    randomize(rng, trained.lora_A, trained.lora_B)

    unexpected = other.load_state_dict(saved_by(subject, trained), strict=False).unexpected_keys

    what = "load_state_dict(lora_state_dict(layer), strict=False) of a LoRALinear"
    assert not unexpected, f"{what}: unexpected keys {unexpected}"
    for name in ("lora_A", "lora_B"):
        close(value(getattr(other, name)), value(getattr(trained, name)), f"{what}: {name}", tolerance=0)


@requirement("5.8")
def test_a_shared_adapter_is_saved_and_loaded(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A layer under two names comes back in both places."""
    original = linear(rng)
    models = [apply(subject, tree({"a.q_proj": layer, "b.q_proj": layer}), "q_proj")
              for layer in (original, copy.deepcopy(original))]  # fmt: skip
    randomize(rng, adapter_at(models[0], "a.q_proj").lora_A, adapter_at(models[0], "a.q_proj").lora_B)
    x = torch.randn(5, IN, generator=rng)

    unexpected = models[1].load_state_dict(saved_by(subject, models[0]), strict=False).unexpected_keys

    assert not unexpected, f"load_state_dict(lora_state_dict(model), strict=False): unexpected keys {unexpected}"
    for path in ("a.q_proj", "b.q_proj"):
        came, wanted = (model.get_submodule(path)(x) for model in models[::-1])
        close(came, value(wanted), f"the layer at {path!r} after loading", tolerance=1e-6)
