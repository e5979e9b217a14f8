"""The formula (5.1): rank and scale, the start, gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.testing import Close, Subject, Where, also, is_tensor, refuses, requirement, seed

from .reference import (
    IN,
    OUT,
    TOKENS,
    Adapter,
    Tiny,
    adapter_at,
    alike,
    apply,
    build,
    descend,
    fresh,
    known,
    linear,
    matrices,
    randomize,
    trainable,
    try_apply,
    value,
)


@pytest.fixture
def close() -> Close:
    """Loose: that nothing is computed below float64 is 5.7's to say."""
    return Close(1e-5)


@requirement("5.1")
def test_a_case_by_hand(subject: Subject, close: Close) -> None:
    """Two features, rank 2, alpha 1: W x + 1/2 · B A x."""
    original = nn.Linear(2, 2, bias=False)
    first = value(original.weight)
    layer = fresh(subject, original, rank=2, alpha=1.0).layer
    with torch.no_grad():
        layer.original_layer.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        layer.lora_A.copy_(torch.tensor([[1.0, -1.0], [0.0, 2.0]]))
        layer.lora_B.copy_(torch.tensor([[3.0, 1.0], [0.0, -1.0]]))

    output = layer(torch.tensor([[4.0, 1.0], [0.0, 0.0]], dtype=torch.float64))

    hint = "W x = [6, 1]; A x = [3, 2], B A x = [11, -2], times alpha/rank = 1/2: [5.5, -1]"
    with also(by_the_first_weight, output, first):
        close(
            output, torch.tensor([[11.5, 0.0], [0.0, 0.0]], dtype=torch.float64), "forward([[4, 1], [0, 0]])", hint=hint
        )


def by_the_first_weight(output: Tensor, first: Tensor) -> str:
    """Says so if the case by hand is computed with the W that the layer was made with."""
    adapter, x = torch.tensor([[5.5, -1.0], [0.0, 0.0]]), torch.tensor([[4.0, 1.0], [0.0, 0.0]])
    if not alike(output, F.linear(x, first) + adapter):
        return ""
    return "the adapter's part is right, the original's is not: W was set after the layer was made"


@requirement("5.1")
@pytest.mark.parametrize(("rank", "alpha"), [(1, 2.5), (4, 3), (4, 1.0)])
def test_attributes(subject: Subject, rank: int, alpha: float) -> None:
    """rank, alpha and the layer itself are kept, and scaling is alpha/rank."""
    original = nn.Linear(IN, OUT)
    layer = fresh(subject, original, rank=rank, alpha=alpha).layer

    what = f"LoRALinear(…, rank={rank}, alpha={alpha})"
    for name, wanted in (("rank", rank), ("alpha", alpha), ("scaling", alpha / rank)):
        came = getattr(layer, name, None)
        assert came == wanted, f"{what}.{name}: {came} came, {wanted} was wanted"
    assert layer.original_layer is original, f"{what}.original_layer: not the layer that was given, maybe a copy of it"


@requirement("5.1")
def test_defaults(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Without arguments the rank is 4, alpha 1 and dropout 0."""
    original = linear(rng)
    x = torch.randn(5, IN, generator=rng)
    adapter = known(subject.LoRALinear(original), original, 4, 1.0)
    matrices(adapter.layer, 4, IN, OUT)
    randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)

    output = adapter.layer(x)

    close(
        output,
        adapter.expected(x).float(),
        "LoRALinear(layer)(x)",
        tolerance=1e-5,
        hint="x was written to" if x._version else "rank 4, alpha 1, no dropout",
    )


@requirement("5.1")
@pytest.mark.parametrize("rank", [1, 16, 29])
def test_the_start_is_the_original(subject: Subject, close: Close, rng: torch.Generator, rank: int) -> None:
    """A new adapter changes nothing, because B is zero; A is not."""
    adapter = fresh(subject, linear(rng, 23, 19), rank=rank)
    x = torch.randn(5, 23, generator=rng, dtype=torch.float64)
    expected = F.linear(x, adapter.weight, adapter.bias)

    output = adapter.layer(x)

    what, hint = "forward of a new adapter", "B starts at zero, so that nothing changes"
    close(output, expected, what, tolerance=1e-9, hint=hint)
    assert not adapter.layer.lora_B.any(), "lora_B of a new adapter: not all zeros"
    a = value(adapter.layer.lora_A)
    assert a.isfinite().all() and a.any(), "lora_A of a new adapter: all zeros; with B zero too, neither ever moves"
    full, wanted = int(torch.linalg.matrix_rank(a)), min(rank, 23)
    assert full == wanted, (
        f"lora_A of a new adapter: its {rank} rows span {full} dimension(s), {wanted} are wanted; "
        "rows that are alike stay alike"
    )
    different = len(a.unique(dim=0))
    assert different == rank, (
        f"lora_A of a new adapter: {different} of its {rank} rows differ; rows that are alike stay alike"
    )
    other = value(fresh(subject, linear(rng, 23, 19), rank=rank).layer.lora_A)
    assert not torch.equal(a, other), "lora_A of two new adapters: the same numbers; they are random at the start"


@requirement("5.1")
@pytest.mark.parametrize(("rank", "alpha"), [(1, 2.5), (16, 6), (29, -2.5)])
def test_the_formula(subject: Subject, close: Close, rng: torch.Generator, rank: int, alpha: float) -> None:
    """Any rank and alpha give x Wᵀ + b + x Aᵀ Bᵀ · alpha/rank."""
    adapter = fresh(subject, linear(rng, 23, 19), rank=rank, alpha=alpha)
    randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)
    x = torch.randn(5, 23, generator=rng, dtype=torch.float64)

    output = is_tensor(adapter.layer(x), "forward(x)")

    what = f"forward(x), rank {rank}, alpha {alpha}"
    with also(what_is_added, adapter, x, output):
        close(output, adapter.expected(x), what)
    with torch.no_grad():
        adapter.layer.lora_B.mul_(1e-4)
    output = adapter.layer(x)
    with also(what_is_added, adapter, x, output):
        close(output, adapter.expected(x), f"{what}, with a tiny B")


def what_is_added(adapter: Adapter, x: Tensor, output: Tensor) -> str:
    """By which factor the output beyond the original's is x Aᵀ Bᵀ, if it is a multiple of that."""
    if x._version:
        return "x was written to"
    original = F.linear(x, adapter.weight, adapter.bias)
    extra, wanted = value(output) - original, adapter.expected(x) - original
    share = float((extra * wanted).sum() / wanted.square().sum())
    if not (extra - share * wanted).abs().max() <= 1e-3 * wanted.abs().max():
        return "what is added to x Wᵀ + b is no multiple of x Aᵀ Bᵀ: does every row of A count?"
    factor = round(share, 6) * adapter.scaling + 0.0
    return f"the adapter adds about {factor:.4g} × x Aᵀ Bᵀ; alpha/rank = {adapter.scaling:.4g}"


@requirement("5.1")
def test_agrees_with_a_merged_linear_layer(subject: Subject, close: Close, rng: torch.Generator, on: Where) -> None:
    """Output and gradient of x equal those of a plain layer with the weight W + alpha/rank · B A."""
    adapter = build(subject, rng, on.dtype)
    adapter.layer.to(on.device)
    plain = nn.Linear(IN, OUT, device=on.device, dtype=on.dtype)
    with torch.no_grad():
        plain.weight.copy_(adapter.merged_weight())
        plain.bias.copy_(adapter.layer.original_layer.bias)
    x = torch.randn(5, IN, generator=rng).to(on.device, on.dtype)
    ours, theirs = value(x).requires_grad_(), value(x).requires_grad_()
    expected = plain(theirs)
    expected.sum().backward()

    output = is_tensor(adapter.layer(ours), "forward(x)")
    output.sum().backward()

    exact = Close(on.tolerance) if on.device.type != "cpu" or on.dtype != torch.float64 else close
    exact(output, expected, "forward(x)")
    exact(ours.grad, is_tensor(theirs.grad, ""), "backward: gradient of x", hint="x reaches the output by W and by A")


@requirement("5.1")
def test_new_weights_count_at_once(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A call after W, A or B have changed uses the new ones. By .data, no version counter tells of the change."""
    adapter = build(subject, rng)
    x = torch.randn(5, IN, generator=rng, dtype=torch.float64)
    with torch.no_grad():
        adapter.layer.eval()(x)
        for name in ("lora_A", "lora_B"):
            tensor = getattr(adapter.layer, name)
            old = value(tensor)
            randomize(rng, tensor.data)

            output = adapter.layer(x)

            with also(by_the_old, adapter, x, output, name, old):
                close(output, adapter.expected(x), f"forward(x) after an edit of {name}.data, in eval under no_grad")
        for name, known_one in (("weight", adapter.weight), ("bias", adapter.bias)):
            old = value(is_tensor(known_one, ""))
            for tensor in (is_tensor(known_one, ""), getattr(adapter.layer.original_layer, name).data):
                tensor.mul_(-0.7)
            output = adapter.layer(x)
            what = f"forward(x) after an edit of original_layer.{name}.data, in eval under no_grad"
            with also(by_the_old, adapter, x, output, name, old):
                close(output, adapter.expected(x), what)
        other = build(subject, rng)
        adapter.layer.load_state_dict(other.layer.state_dict(), assign=True)
        output, what = adapter.layer(x), "forward(x) after load_state_dict(…, assign=True)"
        hint = "assign puts new parameters in the old ones' places: look them up in each call"
        close(output, other.expected(x), what, hint=hint)


def by_the_old(adapter: Adapter, x: Tensor, output: Tensor, name: str, old: Tensor) -> str:
    """Says so if a call gives what it gave before one of the tensors was written to."""
    now: dict[str, Any] = {part: value(getattr(adapter.layer, part)) for part in ("lora_A", "lora_B")}
    now |= {"weight": adapter.weight, "bias": adapter.bias, name: old}
    before = F.linear(x, now["weight"] + adapter.scaling * now["lora_B"] @ now["lora_A"], now["bias"])
    if alike(output, before):
        return f"it is the output by the old {name}: something is kept from before"
    return "each call computes with the numbers that W, A, B and the bias hold then"


@requirement("5.1")
def test_gradients_reach_x_and_both_matrices(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """One step of gradient descent moves A and B by the formula's gradients, and x gets its own."""
    adapter = build(subject, rng)
    x = torch.randn(2, 3, IN, generator=rng, dtype=torch.float64, requires_grad=True)
    a, b = (value(tensor).requires_grad_() for tensor in (adapter.layer.lora_A, adapter.layer.lora_B))
    probe = torch.randn(2, 3, OUT, generator=rng, dtype=torch.float64)
    (F.linear(x, adapter.weight + adapter.scaling * b @ a) * probe).sum().backward()
    given = value(x).requires_grad_()

    output = is_tensor(adapter.layer.eval()(given), "forward(x)")
    assert output.requires_grad, "forward(x): the output carries no gradient"
    descend(trainable(adapter.layer), (output * probe).sum())

    hint = "is something detached, or wrapped in no_grad?"
    for name, leaf in (("lora_B", b), ("lora_A", a)):
        moved = leaf.detach() - value(getattr(adapter.layer, name))
        close(moved, is_tensor(leaf.grad, ""), f"backward: gradient of {name}", hint=hint)
    close(
        given.grad, is_tensor(x.grad, ""), "backward: gradient of x", hint=f"x reaches the output by W and by A; {hint}"
    )


@requirement("5.1")
def test_gradients_with_dropout(subject: Subject, rng: torch.Generator) -> None:
    """With the same elements dropped, the output moves as its gradients say; it is linear in each of x, A and B."""
    layer = build(subject, rng, dropout=0.4).layer.train()
    layer.original_layer.requires_grad_(False)
    x = torch.randn(2, 3, IN, generator=rng, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(2, 3, OUT, generator=rng, dtype=torch.float64)

    def probed() -> Tensor:
        seed(7)
        return (is_tensor(layer(x), "forward(x) in training") * probe).sum()

    tensors = {"x": x, "lora_A": layer.lora_A, "lora_B": layer.lora_B}
    before = {name: value(tensor) for name, tensor in tensors.items()}
    start = probed()
    if float(probed().detach()) != float(start.detach()):
        return  # That the same seed drops the same elements is 5.7's to say.
    descend([x, *trainable(layer)], start)
    steps = {name: before[name] - value(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        along = torch.randn(tensor.shape, generator=rng, dtype=torch.float64)
        with torch.no_grad():
            for other, kept in before.items():
                tensors[other].copy_(kept)
            tensor.add_(along)
        moved = float((probed() - start).detach())

        wanted = float((steps[name] * along).sum())
        assert abs(moved - wanted) < 1e-5 * (1 + abs(moved)), (
            f"backward in training, dropout 0.4: gradient of {name}: the output moves by {moved:.6g}, "
            f"the gradient says {wanted:.6g}\nis something detached, or wrapped in no_grad?"
        )


@requirement("5.1")
def test_a_freshly_adapted_model_is_the_original(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """What apply_lora_to_model gives computes what the model did before."""
    model, tokens = Tiny(rng), torch.tensor(TOKENS)
    expected = value(model(tokens))

    apply(subject, model, "q_proj", "v_proj")

    adapter_at(model, "q_proj")
    close(model(tokens), expected, "output of a freshly adapted model", tolerance=1e-5, hint="B starts at zero")


@requirement("5.1")
def test_the_first_two_steps(subject: Subject, rng: torch.Generator) -> None:
    """From the start the first step moves B, whose zeros hold A's gradient back, and the second moves A."""
    layer = fresh(subject, linear(rng)).layer
    x = torch.randn(5, IN, generator=rng, dtype=torch.float64)
    start = value(layer.lora_A)

    descend(trainable(layer), layer(x).square().mean())
    first = value(layer.lora_B)
    descend(trainable(layer), layer(x).square().mean())

    assert first.any(), "training: lora_B is still zero after the first step; is A zero too, or B no parameter?"
    moved = (value(layer.lora_A) - start).abs().amax(dim=1)
    assert moved.gt(0).all(), "training: lora_A, or a row of it, has not moved after the second step"


@requirement("5.1")
@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_below_1_is_refused(subject: Subject, rng: torch.Generator, rank: int) -> None:
    """A rank below 1 is a ValueError, at the latest from apply_lora_to_model."""
    model = Tiny(rng)

    refuses(ValueError, lambda: try_apply(subject, model, "q_proj", rank=rank), f"apply_lora_to_model with rank {rank}")
