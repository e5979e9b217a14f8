"""Training (3.6): gradients in linear memory; half precision (3.7): errors in bfloat16 and float16."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from harness.testing import Close, Subject, Trace, halfway, requirement

from .reference import (
    ABOUT,
    BLOCK,
    CALL,
    DH,
    HALVES,
    NEAR,
    SLIM,
    WEIGHTS,
    WIDE,
    B,
    D,
    H,
    N,
    _Elements,
    attend,
    build,
    call,
    explained,
    inputs,
    known_gradient,
    pytorch,
    reference,
    some_mask,
    standard,
    unwritten,
    wide,
)

# 3.6 training


def gradients(
    close: Close,
    attention: Any,
    given: list[Tensor],
    mask: Tensor | None = None,
    causal: bool = False,
    hint: str = "",
    beside: Any = None,
    forward_too: bool = True,
) -> None:
    """The gradients of Q, K and V equal those of the formula, also after another call. Where the output is wrong they
    are judged only if `forward_too`.
    """
    leaves = [[x.detach().clone().requires_grad_() for x in given] for _ in range(2)]
    probe = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(3), dtype=given[0].dtype)
    expected, _ = reference(leaves[0], mask=mask, causal=causal)
    expected.backward(probe)

    with unwritten(leaves[1]):
        output, _ = attend(attention, leaves[1], mask, causal)

        if not forward_too and (output.shape != expected.shape or not torch.allclose(output.double(), expected)):
            return  # The output is wrong; 3.3 says so.
        if beside is not None:
            attend(beside, leaves[1], None if mask is not None else torch.ones(1, 1, 1, given[1].size(2)), not causal)
        assert output.requires_grad, f"{CALL}: Q, K and V require gradients, the output does not"
        assert output.shape == probe.shape, (
            f"{CALL}: output of shape {[*output.shape]} came, {[*probe.shape]} was wanted"
        )
        output.backward(probe)
        for name, formula in zip("VQK", (2, 0, 1), strict=True):
            wanted, came = leaves[0][formula].grad, leaves[1][formula].grad
            assert wanted is not None, "the check's own set-up holds"
            alone = partial(right_alone, attention, leaves, probe, mask, causal) if beside is not None else str
            slip = partial(known_gradient, name, came, wanted, given, probe, mask, causal)
            with explained(alone), explained(slip):
                close(
                    came, wanted, f"backward: gradient of {name}", hint=about(name, came, wanted, hint), tolerance=NEAR
                )


def right_alone(attention: Any, leaves: list[list[Tensor]], probe: Tensor, mask: Tensor | None, causal: bool) -> str:
    """Whether the gradients are right if no other call comes before backward."""
    given = [x.detach().clone().requires_grad_() for x in leaves[0]]
    came = torch.autograd.grad(attend(attention, given, mask, causal)[0], given, probe)
    right = all(
        torch.allclose(x, y.grad, NEAR, NEAR) for x, y in zip(came, leaves[0], strict=True) if y.grad is not None
    )
    return (
        "it is right without another call before backward: keep what backward needs with its own call" if right else ""
    )


def about(name: str, came: Tensor | None, wanted: Tensor, hint: str) -> str:
    """The formula of a gradient, and how it is off."""
    formulas = {"V": "dV = Pᵀ dO", "Q": "dQ = dS K / √Dh", "K": "dK = dSᵀ Q / √Dh"}
    return f"{formulas[name]}, {ratio(came, wanted)}\n{hint}".strip()


def ratio(came: Tensor | None, wanted: Tensor) -> str:
    """By which factor a gradient is off, if it is one factor."""
    if came is None or came.shape != wanted.shape or not wanted.any():
        return "P = exp(S - logsumexp), dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O))"
    factor = float((came.to(wanted) * wanted).sum() / wanted.square().sum())
    if torch.allclose(came.to(wanted), factor * wanted, atol=1e-6):
        return f"it is {factor:.4g} times what is wanted"
    return "P = exp(S - logsumexp), dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O))"


@requirement("3.6")
def test_gradients_by_hand(subject: Subject, close: Close) -> None:
    """Weights 3/4 and 1/4, values 4 and 8, dO = 1: dV = (3/4, 1/4), dS = (-3/4, 3/4), dQ = -3/4 log 3, dK = dS."""
    q, k, v = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 1.0]).log(), torch.tensor([4.0, 8.0])
    given = [x.view(1, 1, 2, 1).requires_grad_() for x in (q, k, v)]

    with unwritten(given):
        output, _ = attend(subject.FlashAttention(1, 1, 2), given)
        assert output.requires_grad, f"{CALL}: Q, K and V require gradients, the output does not"
        expected = {"V": (0.75, 0.25), "K": (-0.75, 0.75), "Q": (-0.75 * math.log(3), 0.0)}
        for time, dO in (("backward", 1.0), ("a second backward, with another dO", -2.0)):
            output.backward(torch.tensor([dO, 0.0]).view(1, 1, 2, 1), retain_graph=dO == 1)
            for name, numbers in expected.items():
                what = f"{time}, Q = (1, 0), K = (log 3, 0), V = (4, 8), dO = ({dO:g}, 0): gradient of {name}"
                leaf = given["QKV".index(name)]
                close(leaf.grad, dO * torch.tensor(numbers).view(1, 1, 2, 1), what, tolerance=1e-5,
                      hint="for dO = 1: P = (3/4, 1/4), dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O)) = (-3/4, 3/4)")  # fmt: skip
                leaf.grad = None


@requirement("3.6")
def test_gradients(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The gradients of Q, K and V equal the formula's, in one block and in several."""
    attention = build(subject)

    for blocks in (1, 3):
        given = inputs(rng, blocks * BLOCK, blocks * BLOCK)
        gradients(close, attention, given, hint=f"in {blocks}·{blocks} blocks")


@requirement("3.6")
def test_gradients_of_one_tensor(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """K and V may be one tensor: it gets the gradients of both."""
    q, k, _ = inputs(rng)
    expected = torch.autograd.grad(reference([q, k.requires_grad_(), k])[0].square().sum(), k)[0]

    with unwritten([q, k]):
        output, _ = attend(build(subject), [q, k, k])

        assert output.requires_grad, f"{CALL}: K and V require gradients, the output does not"
        came = torch.autograd.grad(output.square().sum(), k, allow_unused=True)[0]
        close(came, expected, "backward, K and V are one tensor: its gradient", tolerance=NEAR,
              hint="dK + dV, once, was wanted: each input gets its own")  # fmt: skip


@halfway
@requirement("3.6")
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_gradients_with_masks_and_causal(subject: Subject, close: Close, rng: torch.Generator, masked: bool) -> None:
    """So they do with causal, with a mask, and with both, whatever the mask's dtype, and after other calls."""
    given, attention = inputs(rng), build(subject)
    beside = attention if masked else build(subject, BLOCK - 1)

    for causal, dtype in (
        ((False, torch.int32), (True, torch.bool), (True, torch.float32)) if masked else ((True, None),)
    ):
        mask = some_mask((B, H, N, N), rng).to(dtype) if masked else None
        hint = f"causal = {causal}, {f'a mask of {dtype}' if masked else 'no mask'}"
        gradients(close, attention, given, mask, causal, hint, beside)


@requirement("3.6")
def test_gradients_at_any_lengths(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """So they do at lengths that fill no whole blocks, wherever the output is right."""
    attention = build(subject)

    for n, m, causal in (
        (6, 11, False),
        (6, 11, True),
        (9, 5, True),
        (1, 3, False),
        (3, 1, False),
        (1, 1, True),
    ):
        hint = f"N = {n}, M = {m}, block_size = {BLOCK}, causal = {causal}"
        gradients(close, attention, inputs(rng, n, m), causal=causal, hint=hint, forward_too=False)


@requirement("3.6")
@pytest.mark.parametrize(("causal", "training"), [(False, True), (True, False)], ids=["plain-train", "causal-eval"])
def test_the_module_trains(subject: Subject, close: Close, rng: torch.Generator, causal: bool, training: bool) -> None:
    """x and every parameter get the gradients of standard attention, in training and in eval."""
    x = torch.randn(B, N, D, generator=rng, dtype=torch.float64).requires_grad_()
    probe = torch.randn(B, N, D, generator=rng, dtype=torch.float64)
    attention = build(subject).train(training)
    parameters = dict(attention.named_parameters())
    trained = {"x": x, **{name: parameters[name] for name in WEIGHTS}}
    loss = (standard(attention, x, causal=causal) * probe).sum()
    expected = torch.autograd.grad(loss, list(trained.values()))

    output = call(attention, x, causal=causal)
    assert output.requires_grad, "forward: the output carries no gradient"
    (output * probe).sum().backward()

    for (name, tensor), wanted in zip(trained.items(), expected, strict=True):
        assert tensor.grad is not None, f"backward: {name} gets no gradient"
        close(tensor.grad, wanted, f"backward: gradient of {name}", tolerance=NEAR)


@requirement("3.6")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_little_stays_alive_after_forward(
    subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype
) -> None:
    """What forward leaves for backward is at most 1.5 times (Q, K, V, output, logsumexp), with masks and causal too."""
    causal = dtype == torch.bfloat16
    n, width = 4 * WIDE, 1 if causal else SLIM
    attention, given = wide(subject, rng, n, n, n // 2, width)
    # In half precision with strides, which no conversion keeps.
    given = [(x.to(dtype).repeat_interleave(2, -1)[..., ::2] if causal else x).requires_grad_() for x in given]
    mask = (torch.arange(n * n) % 3 != 1).view(1, 1, n, n).float() if causal else None
    expected = reference(given, mask, causal)[0].detach().float()

    with Trace() as seen:
        output, logsumexp = attend(attention.to(dtype), given, mask, causal)
        kept = seen.alive_bytes

    close(output.float(), expected, f"{CALL}: output", tolerance=ABOUT if dtype == torch.float32 else 5e-2)
    assert output.requires_grad, f"{CALL}: the output carries no gradient"
    unit = sum(x.numel() * x.element_size() for x in (*given, output, logsumexp))
    assert kept <= 1.5 * unit, (
        f"{CALL} in {dtype}: {kept} bytes stay alive for backward, {kept / unit:.1f} times (Q, K, V, output, "
        "logsumexp); at most 1.5 times is asked for\n"
        "keep no float32 copies, no block of weights, nothing of what is hidden: backward computes them anew"
    )


@requirement("3.6")
@pytest.mark.parametrize(("causal", "lengths"), [(False, (3, 6)), (True, (3,))], ids=["plain", "causal_mask"])
def test_the_peak_of_training_grows_linearly(
    subject: Subject, close: Close, rng: torch.Generator, causal: bool, lengths: tuple[int, ...]
) -> None:
    """Over forward and backward no tensor of N·M elements is made, and twice the length takes twice the memory."""
    peaks = []
    for n in (blocks * WIDE for blocks in lengths):
        attention, given = wide(subject, rng, n, n)
        given = [x.requires_grad_() for x in given]
        mask = (torch.arange(n) % 3 != 1).view(1, 1, 1, n) if causal else None
        expected = torch.autograd.grad(reference(given, mask=mask, causal=causal)[0].sum(), given)
        with Trace() as seen:
            attend(attention, given, mask, causal)[0].sum().backward()
        for name, x, wanted in zip("QKV", given, expected, strict=True):
            close(x.grad, wanted, f"backward: gradient of {name}", tolerance=ABOUT)
        peaks.append(seen.peak_bytes)

    assert seen.largest < n * n, (
        f"backward, N = M = {n}: a tensor of {seen.largest} elements is made; N·M is {n * n}, less was wanted"
    )
    assert peaks[-1] < 2.2 * peaks[0], (
        f"forward and backward: at most {peaks[0]} bytes are alive for N = {n // 2} and {peaks[-1]} for N = {n}, "
        f"{peaks[-1] / peaks[0]:.2f} times as many; less than 2.2 times are asked for\n"
        "compute each block of weights anew in backward, use it, and let it go"
    )


# 3.7 precision

HALF = pytest.mark.parametrize("dtype", HALVES, ids=str)


def sharp(rng: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    """Q, K and V of many blocks of keys whose softmax is sharp, so that rounded scores and sums show."""
    q, k, v = inputs(rng, N, 20 * BLOCK)
    return [(2 * q).to(dtype), k.to(dtype), v.to(dtype)]


def worst(came: Tensor, exact: Tensor) -> float:
    """The largest error."""
    return float((came.detach().double() - exact).abs().max())


@requirement("3.7")
@pytest.mark.parametrize(("dtype", "masked"), [(HALVES[0], False), (HALVES[1], False), (HALVES[0], True)], ids=str)
def test_errors_in_half_precision(subject: Subject, rng: torch.Generator, dtype: torch.dtype, masked: bool) -> None:
    """The output's error is at most twice that of torch's own attention, the logsumexp is as exact as float32."""
    given = sharp(rng, dtype)
    n, m = given[0].size(2), given[1].size(2)
    mask = some_mask((B, 1, n, m), rng) if masked else None
    exact, exact_logsumexp = reference(given, mask=mask)
    theirs = worst(pytorch(given, mask=mask), exact)

    output, logsumexp = attend(build(subject, dtype=dtype), given, mask)

    assert output.dtype == dtype, f"{CALL} in {dtype}: the output has {output.dtype}, {dtype} was wanted"
    assert output.shape == exact.shape, f"{CALL}: output of shape {[*output.shape]} came, {[*exact.shape]} was wanted"
    ours = worst(output, exact)
    assert ours <= 2 * theirs, (
        f"{CALL} in {dtype}: the output's largest error is {ours:.2g}, {ours / theirs:.1f} times that of "
        f"F.scaled_dot_product_attention, {theirs:.2g}; at most 2 times is asked for\n"
        "convert each block to float32 before scaling and multiplying it; keep scores, sum and accumulator in float32"
    )
    assert logsumexp.dtype in (torch.float32, torch.float64), (
        f"{CALL} in {dtype}: logsumexp has {logsumexp.dtype}, float32 or better was wanted"
    )
    assert logsumexp.shape == exact_logsumexp.shape, (
        f"{CALL}: logsumexp of shape {[*logsumexp.shape]} came, {[*exact_logsumexp.shape]} was wanted"
    )
    assert worst(logsumexp, exact_logsumexp) < 1e-4, (
        f"{CALL} in {dtype}: logsumexp is off by {worst(logsumexp, exact_logsumexp):.2g}, at most 1e-4 is asked for\n"
        "convert the blocks to float32 before scaling and multiplying them, not the scores afterwards"
    )


@requirement("3.7")
@HALF
def test_gradients_in_half_precision(subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Where they are right in float64, gradients in half precision have its dtype and are right within 5e-2."""
    causal = dtype == torch.float16
    given = [x.to(dtype).requires_grad_() for x in inputs(rng)]
    probe = torch.randn(B, H, N, DH, generator=rng).to(dtype)
    expected = torch.autograd.grad(reference(given, causal=causal)[0], given, probe.double())
    exact = [x.detach().double().requires_grad_() for x in given]
    output, _ = attend(build(subject), exact, causal=causal)
    if not output.requires_grad:
        return  # 3.6 says so.
    grads = torch.autograd.grad(output, exact, probe.double(), allow_unused=True)
    if any(grad is None or worst(grad, wanted.double()) > 0.1 for grad, wanted in zip(grads, expected, strict=True)):
        return  # The gradients are wrong in float64 too; 3.6 says so.

    attention, mask = build(subject, dtype=dtype), some_mask((B, 1, 1, N), rng)
    with _Elements() as seen:
        came = torch.autograd.grad(attend(attention, given, causal=causal)[0], given, probe, allow_unused=True)
        with torch.no_grad():  # The last digits are not needed again, and yet.
            attend(attention, [x.detach() for x in given], mask, causal)

    assert not seen.half_products, (
        f"{CALL} and backward in {dtype}: {', '.join(sorted(seen.half_products))} multiplies in half precision\n"
        "convert each block to float32 before its product"
    )
    for index, name in enumerate("QKV"):
        close(came[index], expected[index], f"backward in {dtype}: gradient of {name}", tolerance=5e-2)


@requirement("3.7")
@pytest.mark.parametrize("over", ["queries", "keys"])
def test_gradients_add_up_in_float32(subject: Subject, close: Close, over: str) -> None:
    """What 20 blocks add to dQ, dK and dV in bfloat16 is not lost, though one adds far more than the others."""
    parts = torch.full((40,), 0.115)
    parts[:2] = torch.tensor([64.0, 0.0]) if over == "queries" else 32.5
    sign = torch.tensor([1.0, -1.0])
    if over == "queries":  # All scores are 0. dK and dV are sums of dO.
        q, k, v, probe = torch.ones(40, 1), torch.zeros(2, 1), 2 * sign[:, None], parts[:, None]
    else:  # All scores are 0. dQ is the sum of the second features of K.
        rest = torch.zeros(40)
        q, v = torch.tensor([[1.0, 0.0]] * 2), torch.stack([sign.repeat(20), rest], -1)
        k, probe = torch.stack([rest, 1.4 * parts * sign.repeat(20)], -1), 40 * q
    given = [x[None, None].bfloat16() for x in (q, k, v, probe)]

    def backward(dtype: torch.dtype) -> list[Tensor | None]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in given[:3]]
        output, _ = attend(subject.FlashAttention(q.size(-1), 1, 2).to(dtype), leaves)
        ours = output.requires_grad
        return [*torch.autograd.grad(output, leaves, given[3].to(dtype), allow_unused=True)] if ours else [None] * 3

    exact = [x.double().requires_grad_() for x in given[:3]]
    wanted = torch.autograd.grad(reference(exact)[0], exact, given[3].double())
    came = backward(torch.bfloat16)
    if all(x is not None and worst(x, y) < 0.5 for x, y in zip(came, wanted, strict=True)):
        return
    in_float32 = backward(torch.float32)
    if not all(x is not None and worst(x, y) < 0.5 for x, y in zip(in_float32, wanted, strict=True)):
        return  # They are wrong in float32 too; 3.6 says so.
    for name, x, y in zip("QKV", came, wanted, strict=True):
        close(x, y.bfloat16(), f"backward in torch.bfloat16, 20 blocks of {over}: gradient of {name}", tolerance=5e-2,
              hint="what blocks add to dQ, dK and dV is summed in float32, and converted at the end")  # fmt: skip


@requirement("3.7")
@HALF
def test_a_module_in_half_precision(subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype) -> None:
    """forward keeps the dtype and is right within 5e-2; a mask overflows nothing."""
    x = torch.randn(B, N, D, generator=rng).to(dtype)
    attention = build(subject, dtype=dtype)
    expected = standard(attention, x).detach().to(dtype)

    close(call(attention, x), expected, f"forward in {dtype}", tolerance=5e-2)
    masked = call(attention, x, some_mask((B, 1, 1, N), rng))
    assert masked.isfinite().all(), f"forward in {dtype} with a mask: the output is not finite"


@requirement("3.7")
@pytest.mark.parametrize(
    ("dtype", "n", "m", "block"), [(HALVES[0], 8, 272, 136), (HALVES[1], 8, 2100, 2100)], ids=["bfloat16", "float16"]
)
def test_positions_that_half_precision_cannot_count(
    subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype, n: int, m: int, block: int
) -> None:
    """Beyond 256 (bfloat16) or 2048 (float16) positions causal sees what it sees in float32, backward too."""
    attention, (_, k, v) = wide(subject, rng, n, m, block)
    k = functional.normalize(k, dim=-1)
    q = 8 * k.roll(-1, 2)[:, :, -n:]  # Each query likes the first key that it may not see.
    probe = torch.randn(q.shape, generator=rng)
    given = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    expected, logsumexp = reference(given, causal=True)
    wanted = [expected.detach(), logsumexp.detach(), *torch.autograd.grad(expected, given, probe.double())]
    names = ["output", "logsumexp", *(f"gradient of {name}" for name in "QKV")]

    for kind in (torch.float32, dtype):
        came = list(attend(attention.to(kind), [x.to(kind) for x in given], causal=True))
        if came[0].requires_grad:
            came += torch.autograd.grad(came[0], given, probe.to(kind), allow_unused=True)
        for name, x, y in zip(names, came, wanted, strict=False):
            if kind == torch.float32:
                if x is None or x.shape != y.shape or not worst(x, y.double()) <= 1e-3:
                    return  # It is wrong in float32 too; 3.3 or 3.6 says so.
                continue
            tolerance = 1e-4 if name == "logsumexp" else 5e-2
            close(x.double(), y.double(), f"{CALL} in {dtype}, causal, N = {n}, M = {m}: {name}", tolerance=tolerance,
                  hint="positions are whole numbers: in half precision large ones are rounded")  # fmt: skip


@requirement("3.7")
def test_float64_stays_float64(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """What is right to five digits is right to nine: nothing is computed in a lower precision."""
    given = [x.requires_grad_() for x in inputs(rng, N, N + 1)]
    mask, probe = some_mask((B, 1, 1, N + 1), rng).float(), torch.randn(B, H, N, DH, generator=rng, dtype=torch.float64)
    expected, logsumexp = reference(given, mask=mask, causal=True)
    wanted = [expected, logsumexp, *torch.autograd.grad(expected, given, probe)]
    names = ["output", "logsumexp", *(f"gradient of {name}" for name in "QKV")]

    def results(mask: Tensor) -> list[Tensor]:
        came = list(attend(build(subject), given, mask, True))
        if came[0].requires_grad:
            came += torch.autograd.grad(came[0], given, probe, allow_unused=True)
        return came

    def with_a_mask_of_float64(index: int) -> str:
        close(results(mask.double())[index], wanted[index].detach(), names[index], tolerance=1e-9)
        return "Q, K, V in float64, the mask in float32: the mask's dtype decides nothing; compute in Q's"

    otherwise = "nine digits were wanted: nothing is computed below the inputs' dtype, and no epsilon is added"
    for index, (x, y) in enumerate(zip(results(mask), wanted, strict=False)):
        if isinstance(x, Tensor) and x.shape == y.shape and torch.allclose(x.double(), y, 1e-4, 1e-4):
            with explained(partial(with_a_mask_of_float64, index), otherwise):
                close(x, y.detach(), f"{CALL} in float64: {names[index]}", tolerance=1e-9)
