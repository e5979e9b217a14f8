"""Merging (5.5): the merged weight and output, and the way back, bit for bit."""

import contextlib
import copy
import tracemalloc

import pytest
import torch
from torch import Tensor, nn

from harness.testing import Close, Subject, Trace, also, halfway, is_tensor, requirement

from .reference import (
    ALPHA,
    IN,
    MATMULS,
    OUT,
    RANK,
    Adapter,
    Tiny,
    adapter_at,
    apply,
    bare,
    build,
    called,
    descend,
    fresh,
    linear,
    linear_at,
    no_copy,
    randomize,
    tiny_adapters,
    trainable,
    tree,
    try_apply,
    value,
    with_merged_weight,
)

# That nothing is computed below float64 is 5.7's to say; of W and of the sum it is said here.
LOOSE = 1e-5


@requirement("5.5")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_the_merged_weight(subject: Subject, close: Close, rng: torch.Generator, bias: bool) -> None:
    """While merged, original_layer.weight is W + alpha/rank · B A, and the bias is what it was."""
    adapter = fresh(subject, linear(rng, bias=bias))
    randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)
    wanted = adapter.merged_weight()

    adapter.layer.merge_weights()

    hint = "W + alpha/rank · B A: scaled once, not transposed, computed in the layer's own dtype"
    close(adapter.now(), wanted, "original_layer.weight after merge_weights", hint=hint)
    if adapter.bias is not None:
        close(value(adapter.layer.original_layer.bias), adapter.bias, "original_layer.bias after merge_weights")


@requirement("5.5")
def test_the_merged_weight_of_a_square_layer(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Where in = out, a transposed product fits, and is wrong."""
    adapter = fresh(subject, linear(rng, IN, IN), rank=13, alpha=-2.0)
    randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)
    wanted = adapter.merged_weight()

    adapter.layer.merge_weights()

    hint = "W + alpha/rank · B A; (B A)ᵀ = Aᵀ Bᵀ fits where in = out, and is wrong"
    close(adapter.now(), wanted, "original_layer.weight after merge_weights", hint=hint)


@requirement("5.5")
@pytest.mark.parametrize(("training", "scale"), [(True, 1.0), (False, 30.0)])
def test_merging_changes_no_output(
    subject: Subject, close: Close, rng: torch.Generator, training: bool, scale: float
) -> None:
    """Merged and unmerged outputs agree within 1e-6 · max(1, largest output) in float32."""
    adapter = build(subject, rng, torch.float32)
    x = scale * torch.randn(5, IN, generator=rng)
    expected = adapter.expected(x)
    close(value(adapter.layer.train(training)(x)), expected.float(), "forward(x), unmerged", tolerance=1e-5)

    adapter.layer.merge_weights()

    with torch.no_grad():
        output = is_tensor(adapter.layer(x), "forward(x), merged")
    gap = float((output.double() - expected).abs().max())
    limit = 1e-6 * max(1.0, float(expected.abs().max()))
    assert gap <= limit, (
        f"forward(x), merged: off by {gap:.3g} from the unmerged output; at most {limit:.3g} is asked for\n"
        "W + alpha/rank · B A, added once, in the layer's own dtype; the adapter is not added again"
    )


@requirement("5.5")
@pytest.mark.parametrize(("training", "dropout"), [(False, 0.0), (True, 0.5)], ids=["eval", "train"])
def test_a_merged_layer_costs_one_matrix_product(
    subject: Subject, close: Close, rng: torch.Generator, training: bool, dropout: float
) -> None:
    """While merged, forward multiplies matrices once, drops nothing out in either mode, and x gets its gradient."""
    adapter = build(subject, rng, dropout=dropout)
    x = torch.randn(2, 3, IN, generator=rng, dtype=torch.float64, requires_grad=True)
    expected, merged = adapter.expected(x), adapter.merged_weight()
    adapter.layer.train(not training).merge_weights()
    adapter.layer.train(training)

    what = f"forward(x) after merge_weights() and {'train' if training else 'eval'}()"
    for grad in (False, True):
        with torch.set_grad_enabled(grad), Trace() as seen:
            output = adapter.layer(x)

        with also(unmerged_by_the_mode, adapter):
            close(output, expected, what, tolerance=LOOSE)
        products = sum(seen.operations[name] for name in MATMULS)
        assert products == 1, f"{what}: {products} matrix products are made, 1 is wanted; the adapter is in W already"
    output.sum().backward()
    close(x.grad, merged.sum(0).expand_as(x), "backward, merged: gradient of x", tolerance=LOOSE)
    close(adapter.now(), merged, "original_layer.weight, merged, after a change of mode and a call")


def unmerged_by_the_mode(adapter: Adapter) -> str:
    """Says so if the weight of a merged layer is W, and another merge would change that."""
    if not torch.equal(adapter.now(), adapter.weight):
        return ""
    adapter.layer.unmerge_weights()
    adapter.layer.merge_weights()
    again = torch.equal(adapter.now(), adapter.weight)
    return "" if again else "original_layer.weight is W again; train() and eval() do not unmerge"


@requirement("5.5")
def test_merging_twice_is_merging_once(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A second merge adds nothing, and one unmerge undoes both; a second one does nothing."""
    adapter = build(subject, rng)
    merged = adapter.merged_weight()

    adapter.layer.merge_weights()
    adapter.layer.merge_weights()
    close(adapter.now(), merged, "original_layer.weight after merging twice", hint="B A is added twice")
    for times in ("once", "twice"):
        adapter.layer.unmerge_weights()
        what = f"original_layer.weight after merging twice and unmerging {times}"
        close(adapter.now(), adapter.weight, what, tolerance=0)


@requirement("5.5")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unmerging_restores_every_bit(subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype) -> None:
    """The original weights come back exactly, after each of several merges."""
    adapter = build(subject, rng, dtype)
    kept = adapter.now()
    earlier: Tensor | None = None
    for acts in ("merge", "merge, unmerge, merge again"):
        wanted = adapter.merged_weight().to(dtype)
        adapter.layer.merge_weights()
        merged = adapter.now()
        what = f"original_layer.weight in {dtype} after {acts}"
        with also(not_the_new_sum, merged, kept, earlier):
            # bfloat16 rounds each of the product, its scaling and the sum to 8 bits.
            close(merged, wanted, what, tolerance=5e-2 if dtype == torch.bfloat16 else 5e-6)

        adapter.layer.unmerge_weights()

        hint = "subtracting what was added rounds: keep the weights and give them back"
        close(adapter.now(), kept, f"{what}, unmerge", tolerance=0, hint=hint)
        randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)
        earlier = merged


def not_the_new_sum(merged: Tensor, w: Tensor, earlier: Tensor | None) -> str:
    """Says so if a merged weight is W, or what an earlier merge gave."""
    if torch.equal(merged, w):
        return "it is still W" + ("" if earlier is None else "; does the layer think it is merged?")
    if earlier is not None and torch.equal(merged, earlier):
        return "it is what the first merge gave; A and B have changed since"
    return ""


@requirement("5.5")
def test_the_adapter_survives_a_merge(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """After merging, and after unmerging, A and B hold what they held, and the output is the same."""
    adapter = build(subject, rng)
    x = torch.randn(5, IN, generator=rng, dtype=torch.float64)
    expected, a, b = adapter.expected(x), value(adapter.layer.lora_A), value(adapter.layer.lora_B)

    for act in ("merge_weights", "unmerge_weights"):
        getattr(adapter.layer, act)()

        hint = "A and B stay as they are: the next unmerge or merge needs them"
        close(value(adapter.layer.lora_A), a, f"lora_A after {act}", tolerance=0, hint=hint)
        close(value(adapter.layer.lora_B), b, f"lora_B after {act}", tolerance=0, hint=hint)
        close(adapter.layer(x), expected, f"forward(x) after {act}", tolerance=LOOSE)
        assert adapter.layer.training, f"{act}: the layer was in training, and is in eval"


@requirement("5.5")
def test_a_copy_of_a_merged_layer_is_merged(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """copy.deepcopy makes a layer of its own in the same state: merging it does nothing, and it unmerges by itself."""
    adapter = build(subject, rng)
    x = torch.randn(5, IN, generator=rng, dtype=torch.float64)
    adapter.layer.merge_weights()

    twin = copy.deepcopy(adapter.layer)

    for act in ("merge_weights", "unmerge_weights"):
        getattr(twin, act)()
        what = f"a deep copy of a merged layer, after {act}: "
        close(twin(x), adapter.expected(x), f"{what}forward(x)", tolerance=LOOSE)
    close(value(twin.original_layer.weight), adapter.weight, f"{what}original_layer.weight", tolerance=0)
    close(adapter.now(), adapter.merged_weight(), f"{what}the merged layer's original_layer.weight")


@requirement("5.5")
def test_training_goes_on_after_unmerging(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """An optimizer that was built before a merge still moves A and B after it, by the formula's gradients."""
    adapter = build(subject, rng)
    x = torch.randn(5, IN, generator=rng, dtype=torch.float64)
    probe = torch.randn(5, OUT, generator=rng, dtype=torch.float64)
    parameters = trainable(adapter.layer)
    a, b = (value(tensor).requires_grad_() for tensor in (adapter.layer.lora_A, adapter.layer.lora_B))
    (adapter.scaling * (x @ a.T @ b.T) * probe).sum().backward()

    adapter.layer.merge_weights()
    adapter.layer.unmerge_weights()
    descend(parameters, (is_tensor(adapter.layer(x), "forward(x)") * probe).sum())

    hint = "lora_A and lora_B stay the same parameters: an optimizer holds them"
    for name, leaf in (("lora_A", a), ("lora_B", b)):
        moved = leaf.detach() - value(getattr(adapter.layer, name))
        what = f"a step after merging and unmerging: gradient of {name}"
        close(moved, is_tensor(leaf.grad, ""), what, tolerance=LOOSE, hint=hint)


@requirement("5.5")
def test_merging_again_uses_what_is_new(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A second merge takes A, B and W as they are by then, and unmerging gives the W of then."""
    adapter = build(subject, rng)
    x = torch.randn(5, IN, generator=rng, dtype=torch.float64)
    adapter.layer.merge_weights()
    adapter.layer.unmerge_weights()
    randomize(rng, adapter.layer.lora_A, adapter.layer.lora_B)

    adapter.layer.merge_weights()
    close(
        adapter.layer(x),
        adapter.expected(x),
        "forward(x), merged again with new A and B",
        tolerance=LOOSE,
        hint="the first merge's sum is kept",
    )
    adapter.layer.unmerge_weights()
    adapter.weight.mul_(-0.7)
    with torch.no_grad():
        adapter.layer.original_layer.weight.mul_(-0.7)
    adapter.layer.merge_weights()
    close(
        adapter.layer(x),
        adapter.expected(x),
        "forward(x), merged again with a new W",
        tolerance=LOOSE,
        hint="an old copy of W is kept",
    )
    adapter.layer.unmerge_weights()
    hint = "W has changed since the layer was built; an old copy of it came back"
    close(adapter.now(), adapter.weight, "original_layer.weight, unmerged again", tolerance=0, hint=hint)


@requirement("5.5")
def test_a_shared_embedding_stays_unchanged(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Merging a head leaves the embedding alone whose weight it shares."""
    model = tree({"embedding": nn.Embedding(OUT, IN), "head": linear(rng)})
    model["embedding"].weight = model["head"].weight
    kept = value(linear_at(model, "head").weight)
    layer = adapter_at(apply(subject, model, "head"), "head")
    randomize(rng, layer.lora_A, layer.lora_B)
    wanted = kept + ALPHA / RANK * value(layer.lora_B) @ value(layer.lora_A)

    layer.merge_weights()

    hint = "another module shares this tensor: give the merged layer one of its own, do not write into the shared one"
    close(value(layer.original_layer.weight), wanted, "head.original_layer.weight, merged", tolerance=5e-6)
    every = torch.arange(OUT)
    close(value(model["embedding"](every)), kept, "embedding, while the head is merged", tolerance=0, hint=hint)
    layer.unmerge_weights()
    close(value(model["embedding"](every)), kept, "embedding, after the head is unmerged", tolerance=0, hint=hint)


@requirement("5.5")
def test_unmerging_keeps_no_copy(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """While merged there are W and the sum; unmerged there is W alone, which a tied embedding shares as before."""
    with Trace() as seen:
        model = tree({"embedding": nn.Embedding(29, 31), "head": linear(rng, 31, 29, bias=False)})
        model["embedding"].weight = model["head"].weight
        layer = adapter_at(apply(subject, model, "head"), "head")
    kept = value(linear_at(layer, "original_layer").weight)
    randomize(rng, layer.lora_A, layer.lora_B)
    wanted = kept + ALPHA / RANK * value(layer.lora_B) @ value(layer.lora_A)
    for _ in range(2):
        with seen:
            layer.merge_weights()
        close(value(layer.original_layer.weight), wanted, "original_layer.weight, merged", tolerance=1e-2)
        no_copy(seen, model, "while merged", copies=2)
        with seen:
            layer.unmerge_weights()

    no_copy(seen, model, "after merge_weights and unmerge_weights, W shared with an embedding")


@requirement("5.5")
def test_unmerging_keeps_nothing_that_is_no_tensor(subject: Subject, rng: torch.Generator) -> None:
    """A copy of W as bytes, as numbers in a list or as a numpy array is one too."""
    held = 0
    # The first round is for what Python and torch load once, in their first calls.
    for size in (2, 192):
        original = linear(rng, size, size)
        tracemalloc.start()
        try:
            layer = subject.LoRALinear(original, rank=RANK)
            layer.merge_weights()
            layer.unmerge_weights()
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    whole = original.weight.nbytes
    assert held < whole // 2, (
        f"after merge_weights and unmerge_weights: {held} bytes are held in Python's memory; W has {whole}\n"
        "is a copy of W kept somewhere, as bytes, a list or an array?"
    )


@requirement("5.5")
def test_two_layers_that_share_a_weight_merge_apart(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Each has its own adapter; merged and unmerged in any order, neither touches the other."""
    model = tree({"a.head": linear(rng), "b.head": linear(rng)})
    linear_at(model, "b.head").weight = linear_at(model, "a.head").weight
    kept = value(linear_at(model, "a.head").weight)
    apply(subject, model, "head")
    first, second = (adapter_at(model, path) for path in ("a.head", "b.head"))
    randomize(rng, first.lora_A, first.lora_B, second.lora_A, second.lora_B)
    sums = [kept + ALPHA / RANK * value(layer.lora_B) @ value(layer.lora_A) for layer in (first, second)]

    for layer, act, wanted in (
        (first, "merge_weights", (sums[0], kept)),
        (second, "merge_weights", tuple(sums)),
        (first, "unmerge_weights", (kept, sums[1])),
        (second, "unmerge_weights", (kept, kept)),
    ):
        getattr(layer, act)()
        for name, head, weight in zip(("first", "second"), (first, second), wanted, strict=True):
            which = "first" if layer is first else "second"
            what = f"two layers with one weight, {act} of the {which}: the {name}'s weight"
            close(value(head.original_layer.weight), weight, what, tolerance=5e-6)


@requirement("5.5")
def test_merging_leaves_trainable_what_is_trainable(subject: Subject, rng: torch.Generator) -> None:
    """While merged nothing else asks for gradients, and after unmerging the same parameters do as before."""
    model = apply(subject, Tiny(rng), "q_proj", "v_proj")
    before = {parameter.data_ptr() for parameter in trainable(model)}

    for layer in tiny_adapters(model):
        layer.merge_weights()
    more = sorted(
        name for name, held in model.named_parameters() if held.requires_grad and held.data_ptr() not in before
    )
    assert not more, f"while merged: {more} are trainable; a new nn.Parameter asks for gradients"
    for layer in tiny_adapters(model):
        layer.unmerge_weights()

    after = {parameter.data_ptr() for parameter in trainable(model)}
    more = sorted(name for name, parameter in model.named_parameters() if parameter.data_ptr() in after - before)
    assert not more, (
        f"after merging and unmerging: {more} have become trainable\n"
        "a new nn.Parameter asks for gradients; a flag kept from before W was frozen does so too"
    )
    assert after == before, f"after merging and unmerging: {len(before - after)} matrices are no longer trainable"


@halfway
@requirement("5.5")
def test_merging_after_a_cast(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A layer that was merged in float32 merges in float64 with float64's precision."""
    adapter = build(subject, rng, torch.float32)
    adapter.layer.merge_weights()
    adapter.layer.unmerge_weights()

    adapter.layer.double().merge_weights()

    what = "original_layer.weight, merged after .double()"
    hint = "something of the first merge, in float32, is kept"
    close(adapter.now(), adapter.merged_weight(), what, hint=hint)


@requirement("5.5")
@pytest.mark.parametrize("path", ["out_proj", "linear1"])
def test_a_merged_bare_weight(subject: Subject, close: Close, rng: torch.Generator, path: str) -> None:
    """Where a parent may read the weight, a merged one holds B A once. Whether it can be adapted at all is 5.2's."""
    model, x = bare(path).eval(), torch.randn(3, 5, 8, generator=rng)
    plain = copy.deepcopy(model)
    with contextlib.suppress(TypeError, AttributeError, ValueError), torch.no_grad():
        layer = try_apply(subject, model, path).get_submodule(path)
        randomize(rng, layer.lora_A, layer.lora_B)
        expected = with_merged_weight(plain, path, layer, x)
        layer.merge_weights()
        for training in (True, False):
            output = called(model.train(training), x)

            what = f"{type(model).__name__} with a merged {path}, training {training}"
            close(output, expected, what, tolerance=1e-5, hint="while merged the weight holds B A already")
