"""Trainable parameters: nothing but the adapters (5.3), and how few they are (5.4)."""

import contextlib
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harness.testing import Close, Subject, Trace, requirement

from .reference import (
    ALPHA,
    MATMULS,
    RANK,
    TINY_ADAPTERS,
    TOKENS,
    Tiny,
    adapter_at,
    apply,
    fresh,
    linear,
    no_copy,
    randomize,
    tiny_adapters,
    trainable,
    tree,
    value,
)

# 5.3 what stays


@requirement("5.3")
def test_the_adapters_alone_are_trainable(subject: Subject, rng: torch.Generator) -> None:
    """Nothing else in the model asks for gradients: no adapted weight, no bias, no other layer, whatever its name."""
    model = Tiny(rng)
    for name in ("lora_A", "lora_B"):
        model.register_parameter(name, nn.Parameter(torch.zeros(2)))
        model.norm.register_parameter(name, nn.Parameter(torch.zeros(3)))
    names = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}

    apply(subject, model, "q_proj", "v_proj")

    asking = {parameter.data_ptr() for parameter in trainable(model)}
    wanted = {tensor.data_ptr() for layer in tiny_adapters(model) for tensor in (layer.lora_A, layer.lora_B)}
    more = sorted(names.get(pointer, "a parameter that was not there before") for pointer in asking - wanted)
    assert not more, f"apply_lora_to_model: trainable besides lora_A and lora_B: {more}"
    assert asking == wanted, (
        f"apply_lora_to_model: {len(wanted - asking)} of {len(wanted)} matrices A and B are not trainable"
    )


@requirement("5.3")
def test_training_leaves_every_other_byte(subject: Subject, rng: torch.Generator) -> None:
    """Steps with momentum and weight decay over all parameters, in eval and in training, move A and B alone."""
    model = Tiny(rng)
    before = {name: (parameter, value(parameter)) for name, parameter in model.named_parameters()}
    apply(subject, model, "q_proj", "v_proj")
    layers = tiny_adapters(model)
    starts = [value(tensor) for layer in layers for tensor in (layer.lora_A, layer.lora_B)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)

    for training in (False, True):
        optimizer.zero_grad()
        model.train(training)(torch.tensor(TOKENS)).square().mean().backward()
        optimizer.step()

    for name, (parameter, kept) in before.items():
        assert torch.equal(parameter, kept), f"after 2 steps of AdamW: {name} has changed"
    for path, layer in zip(("q_proj", "block.v_proj"), layers, strict=True):
        kept = before[f"{path}.weight"][1]
        assert torch.equal(layer.original_layer.weight, kept), (
            f"after 2 steps of AdamW: {path}.original_layer.weight has changed"
        )
    ends = [tensor for layer in layers for tensor in (layer.lora_A, layer.lora_B)]
    stuck = sum(torch.equal(start, end) for start, end in zip(starts, ends, strict=True))
    assert not stuck, f"after 2 steps of AdamW: {stuck} of {len(ends)} matrices A and B have not moved"


@requirement("5.3")
def test_what_was_frozen_before_stays_frozen(subject: Subject, rng: torch.Generator) -> None:
    """A model that came frozen, in part or as a whole, trains its adapters and nothing else."""
    model = Tiny(rng).requires_grad_(False).eval()
    model.head.requires_grad_(True)

    apply(subject, model, "q_proj", "v_proj")

    asking = sum(parameter.numel() for parameter in trainable(model))
    what = "apply_lora_to_model on a model that is frozen but for its head"
    assert asking == TINY_ADAPTERS, f"{what}: {asking} numbers are trainable, {TINY_ADAPTERS} are the adapters'"


# 5.4 size and cost


@requirement("5.4")
@pytest.mark.parametrize("rank", [1, 3])
def test_what_adapters_add(subject: Subject, rng: torch.Generator, rank: int) -> None:
    """Each adapter adds rank·(in + out) trainable numbers, no more, and no copy of W."""
    model = Tiny(rng)
    old = {parameter.data_ptr() for parameter in model.parameters()}

    apply(subject, model, "q_proj", "v_proj", rank=rank)

    tiny_adapters(model)
    added = sum(parameter.numel() for parameter in trainable(model) if parameter.data_ptr() not in old)
    wanted = rank * (6 + 4) + rank * (4 + 3)
    assert added == wanted, (
        f"apply_lora_to_model, rank {rank}, layers 6 -> 4 and 4 -> 3: {added} new trainable numbers came, "
        f"{wanted} = Σ rank·(in + out) were wanted"
    )
    new = {held.data_ptr(): held for held in (*model.parameters(), *model.buffers()) if held.data_ptr() not in old}
    frozen = sum(held.numel() for held in new.values()) - added
    assert frozen < 4 * 3, (
        f"apply_lora_to_model, layers 6 -> 4 and 4 -> 3: {frozen} new numbers came that are not trained; is W copied?"
    )


@requirement("5.4")
def test_no_copy_of_the_weight_is_kept(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """After calls in every mode, what is alive is W, A and B, wherever else something may hang: x, a mask, A x."""
    with Trace() as seen:
        model = apply(subject, tree({"q_proj": linear(rng, 31, 29, bias=False)}), "q_proj", dropout=0.3)
        layer = adapter_at(model, "q_proj")
    no_copy(seen, model, "apply_lora_to_model")
    with seen:
        x = torch.randn(160, 31, generator=rng)
        for training in (True, False):
            layer.train(training)(x).sum().backward()
            layer.zero_grad()
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    output = layer(x)
    merged = layer.original_layer.weight + ALPHA / RANK * layer.lora_B @ layer.lora_A

    close(output, F.linear(x, merged).detach(), "forward(x)", tolerance=1e-2)
    del x, output, merged
    no_copy(seen, model, "after calls in training and eval, with gradients, under no_grad and under inference_mode")


@requirement("5.4")
def test_count_parameters(subject: Subject, rng: torch.Generator) -> None:
    """All parameters, and those that ask for gradients."""
    model = Tiny(rng)
    wanted = 5 * 6 + (6 * 4 + 4) + 2 * 4 + 4 * 3 + 3 + (3 * 2 + 2)

    counted(subject, model, wanted, wanted, "Tiny, all trainable")
    model.q_proj.requires_grad_(False)
    counted(subject, model, wanted, wanted - 28, "Tiny, 28 numbers frozen")
    model.requires_grad_(False)
    counted(subject, model, wanted, 0, "Tiny, all frozen")


@requirement("5.4")
def test_count_parameters_counts_shared_ones_once(subject: Subject) -> None:
    """A tied weight, and a layer registered twice, are there once; a frozen one, too."""
    tied = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    tied["head"].weight = tied["embedding"].weight
    layer = nn.Linear(4, 2)
    twice = nn.ModuleList([layer, nn.ModuleList([layer]), nn.Linear(2, 3).requires_grad_(False)])

    counted(subject, tied, 15 + 5, 15 + 5, "an embedding and a head with one weight")
    counted(subject, twice, 10 + 9, 10, "a layer that is registered twice")


@requirement("5.4")
def test_count_parameters_leaves_buffers_out(subject: Subject) -> None:
    """Running statistics are no parameters; a module without parameters has none."""
    counted(subject, nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 2)), 10 + 12, 10 + 12, "a batch norm and a layer")
    counted(subject, nn.ReLU(), 0, 0, "a module without parameters")
    counted(subject, nn.Linear(4, 2, device="meta"), 10, 10, "a layer on meta, where all addresses are 0")


@requirement("5.4")
def test_count_parameters_of_an_adapted_model(subject: Subject, rng: torch.Generator) -> None:
    """The numbers equal a count of the model's own parameters."""
    model = apply(subject, Tiny(rng), "q_proj", "v_proj")
    tiny_adapters(model)
    total = sum(parameter.numel() for parameter in model.parameters())

    counted(subject, model, total, sum(parameter.numel() for parameter in trainable(model)), "an adapted model")


def counted(subject: Subject, model: nn.Module, total: int, asking: int, what: str) -> None:
    """count_parameters gives the pair that is wanted."""
    came = subject.count_parameters(model)

    assert isinstance(came, tuple) and len(came) == 2 and all(type(number) is int for number in came), (
        f"count_parameters: {came!r} came, a pair of integers (all, trainable) was wanted"
    )
    assert came == (total, asking), (
        f"count_parameters({what}): {tuple(came)} came, {(total, asking)} was wanted\n"
        "(all, trainable); shared parameters count once, buffers never"
    )


@requirement("5.4")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_forward_makes_nothing_as_large_as_the_weight(
    subject: Subject, close: Close, rng: torch.Generator, training: bool
) -> None:
    """x goes through A and B one after the other, at any rank: neither B A nor a copy of W is made."""
    plain, dropping = (fresh(subject, linear(rng, 31, 29), dropout=dropout) for dropout in (0.0, 0.3))
    calls = [(plain, (2, 3, 31)), (dropping, (2, 3, 31)), (plain, (31,))]
    thick = None
    # That any rank works is 5.1's to say.
    with contextlib.suppress(AssertionError):
        thick = fresh(subject, linear(rng, 31, 29), rank=37)
        calls.append((thick, (2, 3, 31)))
    for (adapter, shape), grad in itertools.product(calls, (False, True)):
        x = torch.randn(shape, generator=rng, dtype=torch.float64)
        randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)
        adapter.layer.train(training)

        with torch.set_grad_enabled(grad), Trace() as seen:
            output = adapter.layer(x)

        if adapter is plain:
            close(output, adapter.expected(x), "forward(x)", tolerance=1e-2)
        # Where A and B are larger than W, they may be scaled: the products tell.
        largest = sum(seen.elements[name] for name in MATMULS) if adapter is thick else seen.largest
        made = "matrix products of in all" if adapter is thick else "a tensor of"
        mode = ("training" if training else "eval") + ("" if grad else " under no_grad")
        assert largest < 31 * 29, (
            f"forward in {mode}, rank {adapter.layer.rank}: {made} {largest} elements are made; "
            f"W has out·in = {31 * 29}\n"
            "multiply x by Aᵀ, and the result by Bᵀ: B A is as large as W"
        )
