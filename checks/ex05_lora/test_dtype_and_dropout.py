"""Following the layer (5.7): dtype, device, mode and dropout."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.testing import Close, Subject, also, is_tensor, requirement, seed

from .reference import (
    ALPHA,
    IN,
    OUT,
    RANK,
    Adapter,
    adapter_at,
    alike,
    apply,
    build,
    fresh,
    known,
    linear,
    linear_at,
    randomize,
    tree,
    value,
)


@requirement("5.7")
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Each of the two outputs is rounded to 8 bits in bfloat16.
    [(torch.bfloat16, 5e-2), (torch.float64, 1e-9)],
    ids=["bfloat16", "float64"],
)
def test_an_adapter_takes_over_its_layers_dtype(
    subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype, tolerance: float
) -> None:
    """A and B have the layer's dtype, and so has the output."""
    original = linear(rng).to(dtype)
    x = torch.randn(5, IN, generator=rng).to(dtype)

    adapter = known(subject.LoRALinear(original, rank=RANK, alpha=ALPHA), original, RANK, ALPHA)

    for name in ("lora_A", "lora_B"):
        came = getattr(adapter.layer, name).dtype
        assert came == dtype, f"LoRALinear(a layer in {dtype}).{name}: {came} came, {dtype} was wanted"
    randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)
    output, expected = adapter.layer(x), adapter.expected(x).to(dtype)
    with also(rounded, output, expected):
        close(output, expected, f"forward(x) in {dtype}", tolerance=tolerance)


def rounded(came: Tensor, wanted: Tensor) -> str:
    """Says so if float64 is off by no more than float32's rounding."""
    if wanted.dtype != torch.float64 or not alike(came, wanted):
        return ""
    return "all differences are tiny: is something rounded to float32, x, A x or the factor alpha/rank?"


@requirement("5.7")
def test_each_adapter_follows_its_own_layer(subject: Subject) -> None:
    """In a model of mixed dtypes and devices every adapter has those of its layer."""
    layers = [nn.Linear(5, 4).double(), nn.Linear(5, 4, dtype=torch.bfloat16), nn.Linear(5, 4, device="meta")]
    model = tree({f"{index}.q_proj": layer for index, layer in enumerate(layers)})
    wanted = [(layer.weight.dtype, layer.weight.device) for layer in layers]

    apply(subject, model, "q_proj")

    for index, (dtype, device) in enumerate(wanted):
        for name in ("lora_A", "lora_B"):
            tensor = getattr(adapter_at(model, f"{index}.q_proj"), name)
            what = f"apply_lora_to_model on a layer in {dtype} on {device}: {name}"
            assert (tensor.dtype, tensor.device) == (dtype, device), f"{what} is in {tensor.dtype} on {tensor.device}"


@requirement("5.7")
@pytest.mark.parametrize("moved", [False, True], ids=["built_there", "moved_there"])
def test_another_device(subject: Subject, rng: torch.Generator, moved: bool) -> None:
    """An adapter that is built on another device, or moved there, works there: the meta device stands in for one."""
    original = linear(rng) if moved else linear(rng).to("meta")
    layer = subject.LoRALinear(original, rank=RANK, dropout=0.5)
    if moved:
        for training in (True, False):
            layer.train(training)(torch.randn(5, IN, generator=rng))
        layer.to("meta")
    for training in (True, False):
        output = is_tensor(layer.train(training)(torch.empty(5, IN, device="meta")), "forward(x) on meta")

        assert layer.lora_A.device.type == layer.lora_B.device.type == "meta", "LoRALinear on meta: A or B is elsewhere"
        assert output.device.type == "meta", f"forward(x) on meta: the output is on {output.device}"
        assert tuple(output.shape) == (5, OUT), f"forward(x) on meta: shape {tuple(output.shape)} came"


@requirement("5.7")
def test_dropout_acts_on_the_adapters_input_alone(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """In training every element of x reaches A as 0 or as x / (1 - p), by itself, also where x repeats one in memory;
    the original sees all of x.
    """
    adapter = see_through(fresh(subject, linear(rng, 12, 12), rank=12, dropout=0.4), rng)
    whole = torch.rand(5, 12, 12, generator=rng, dtype=torch.float64) + 1
    for name, part in (
        ("", whole),
        (", expanded", whole[:1]),
        (", expanded", whole[:, :1]),
        (", expanded", whole[..., :1]),
    ):
        x = part.expand(whole.shape)

        output = adapter.layer.train()(x)
        reached = what_reached_a(adapter, x, output)

        what = f"forward(x [5, 12, 12]{name}) in training, dropout 0.4"
        with also(where_it_acts, adapter, x, output, reached, 0.4):
            dropped_alone(close, x.flatten(0, 1), reached.flatten(0, 1), 0.4, what)
        for first in (0, 1):
            flat, flat_reached = (tensor.transpose(0, first).flatten(1) for tensor in (x, reached))
            dropped_alone(close, flat, flat_reached, 0.4, what)


@requirement("5.7")
@pytest.mark.parametrize("p", [0.25, 0.7])
def test_dropout_comes_from_the_config(subject: Subject, close: Close, rng: torch.Generator, p: float) -> None:
    """The config's probability is that of every adapter."""
    model = tree({"q_proj": linear(rng, 12, 12)})
    adapter = known(None, linear_at(model, "q_proj"), 12, ALPHA)
    apply(subject, model, "q_proj", rank=12, dropout=p)
    adapter.layer = adapter_at(model.double(), "q_proj")
    see_through(adapter, rng)
    x = torch.rand(60, 12, generator=rng, dtype=torch.float64) + 1

    with torch.no_grad():
        output = adapter.layer.train()(x)
        reached = what_reached_a(adapter, x, output)

    with also(where_it_acts, adapter, x, output, reached, p):
        dropped_alone(close, x, reached, p, f"LoRAConfig(dropout={p}), in training")


@requirement("5.7")
def test_a_rare_dropout_in_bfloat16(subject: Subject) -> None:
    """A probability below the steps of bfloat16, 1/256, is kept to."""
    original = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    layer = subject.LoRALinear(original, rank=2, alpha=2.0, dropout=0.001).train()
    with torch.no_grad():
        original.weight.zero_()
        layer.lora_A.copy_(torch.eye(2))
        layer.lora_B.copy_(torch.eye(2))
        seed(7)
        output = is_tensor(layer(torch.ones(100, 200, 2, dtype=torch.bfloat16)), "forward(x) in bfloat16")

    dropped = int((output == 0).sum())
    # 40, give or take 6.
    assert 8 <= dropped <= 80, (
        f"forward(x) in training in bfloat16, dropout 0.001: {dropped} of 40000 elements are dropped, "
        "about 40 were wanted\n"
        "torch.rand in bfloat16 gives multiples of 1/256: draw in float32, or use F.dropout"
    )


@requirement("5.7")
def test_dropout_follows_torchs_seed(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The same seed drops the same elements; another call drops others."""
    adapter = build(subject, rng, dropout=0.4)
    x = torch.randn(9, IN, generator=rng, dtype=torch.float64)
    adapter.layer.train()

    seed(7)
    first, second = value(adapter.layer(x)), value(adapter.layer(x))
    seed(7)

    close(value(adapter.layer(x)), first, "forward(x) in training, seeded again", tolerance=0)
    assert not torch.equal(first, second), "forward(x) in training: two calls drop the same elements, or none"


@requirement("5.7")
def test_no_dropout_in_eval(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """In eval nothing is dropped, also after training; in training with dropout 0 neither, with dropout 1 all of x."""
    adapter = build(subject, rng, dropout=0.6)
    x = torch.randn(5, IN, generator=rng, dtype=torch.float64)
    adapter.layer.train()(x)

    close(adapter.layer.eval()(x), adapter.expected(x), "forward(x) in eval, dropout 0.6", hint="dropout acts in eval")
    adapter = build(subject, rng, dropout=0.0)
    close(adapter.layer.train()(x), adapter.expected(x), "forward(x) in training, dropout 0")
    adapter = build(subject, rng, dropout=1.0)
    original = F.linear(x, adapter.weight, adapter.bias)
    close(adapter.layer.train()(x), original, "forward(x) in training, dropout 1", hint="all of A's input is dropped")


@requirement("5.7")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_an_adapter_takes_over_its_layers_mode(
    subject: Subject, close: Close, rng: torch.Generator, training: bool
) -> None:
    """A layer in eval gets an adapter in eval, without dropout, whatever the rest of the model is in."""
    model = tree({"q_proj": linear(rng), "k_proj": linear(rng)}).train(not training)
    adapter = known(None, linear_at(model, "q_proj").train(training), RANK, ALPHA)
    x = torch.randn(9, IN, generator=rng)
    apply(subject, model, "q_proj", dropout=0.5)
    adapter.layer = adapter_at(model, "q_proj")
    randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)

    output, expected = is_tensor(adapter.layer(x), "forward(x)"), adapter.expected(x).float()

    what = f"apply_lora_to_model on a layer in {'training' if training else 'eval'}"
    alone = subject.LoRALinear(linear(rng).train(training), dropout=0.5).training
    assert alone is training, f"LoRALinear(a layer whose training flag is {training}): its own flag is {alone}"
    assert adapter.layer.training is training, f"{what}: the adapter's training flag is {adapter.layer.training}"
    if training:
        assert (output - expected).abs().max() > 1e-3, f"{what}: dropout 0.5 changes nothing"
    else:
        close(
            output, expected, f"{what}: output", tolerance=1e-5, hint="its dropout acts although the layer is in eval"
        )


def see_through(adapter: Adapter, rng: torch.Generator) -> Adapter:
    """Gives a square adapter of rank 12 orthogonal A and B, so that A x and B A x can be undone."""
    with torch.no_grad():
        for tensor in (adapter.layer.lora_A, adapter.layer.lora_B):
            tensor.copy_(torch.linalg.qr(torch.randn(12, 12, generator=rng, dtype=torch.float64))[0])
    return adapter


def what_reached_a(adapter: Adapter, x: Tensor, output: Any) -> Tensor:
    """What a see-through adapter must have got as its input: the output beyond the original's, undone."""
    original = F.linear(x, adapter.weight, adapter.bias)
    came = is_tensor(output, "forward(x) in training")
    assert came.shape == original.shape, f"forward(x) in training: shape {tuple(came.shape)} came"
    return (value(came) - original) / adapter.scaling @ value(adapter.layer.lora_B) @ value(adapter.layer.lora_A)


def where_it_acts(adapter: Adapter, x: Tensor, output: Tensor, reached: Tensor, p: float) -> str:
    """Where a see-through adapter drops elements, or by what it multiplies those that it keeps, if either is wrong."""
    layer, original = adapter.layer, F.linear(x, adapter.weight, adapter.bias)
    a, b = value(layer.lora_A), value(layer.lora_B)
    added = (value(output) - original) / adapter.scaling
    with torch.no_grad():
        layer.lora_B.zero_()
        whole = alike(layer.train()(x), original) or not alike(layer.eval()(x), original)
        layer.lora_B.copy_(b)
    if not whole:
        return "with B = 0 the output is not the original's: dropout acts on the original's input or on the output"
    for name, came, undropped in (("A x", added @ b, x @ a.T), ("B A x", added, x @ a.T @ b.T)):
        if alike(came, torch.where(came.abs() > 1e-6, undropped / (1 - p), 0.0)):
            return f"{name} is dropped, in place of x"
    kept = reached.abs() > 1e-6
    factors, wanted = (reached / x)[kept], x.new_tensor(1 / (1 - p))
    if factors.numel() and alike(factors, factors[:1].expand_as(factors)) and not alike(factors[0], wanted):
        return f"what is kept reaches A as x · {float(factors[0]):.4g}; 1 / (1 - {p}) = {float(wanted):.4g}"
    return ""


def dropped_alone(close: Close, x: Tensor, reached: Tensor, p: float, what: str) -> None:
    """Each element of x has reached A as 0 or as x / (1 - p), with probability p and independently."""
    assert (reached - x).abs().max() > 1e-6, f"{what}: nothing is dropped; all of x reaches A"
    kept = reached.abs() > 1e-6
    hint = (
        f"dropout acts on x on its way into A: 0 or x / (1 - {p}); the original's input, A x and the output are whole"
    )
    close(reached, torch.where(kept, x / (1 - p), 0.0), f"{what}: what reaches A", hint=hint)
    for dim, name in ((0, "rows"), (1, "features")):
        alike = (kept == kept.narrow(dim, 0, 1)).double().mean().item()
        assert alike < 0.95, f"{what}: the same elements are dropped for all {name}"
    share = 1 - kept.double().mean().item()
    assert abs(share - p) < 0.1, f"{what}: {share:.2f} of the adapter's input is dropped, {p} was wanted"
