"""Standard attention (3.4): its results, masks, state_dict and weights, for any strides and on any device."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from harness.testing import Close, Subject, Where, refuses, requirement

from .reference import (
    BLOCK,
    CALL,
    NEAR,
    WEIGHTS,
    B,
    D,
    H,
    N,
    agree,
    attend,
    build,
    call,
    explained,
    inputs,
    known_forward,
    pytorch,
    reference,
    some_mask,
    standard,
    unwritten,
)

MASK_DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64]
FACTORIES = _device_constructors()


@requirement("3.4")
def test_two_keys_by_hand(subject: Subject, close: Close) -> None:
    """One feature, keys log 3 and 0, values 4 and 8: query 1 has weights 3/4 and 1/4, query 0 has 1/2 and 1/2."""
    attention = subject.FlashAttention(1, 1, 2)
    q, k, v = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 1.0]).log(), torch.tensor([4.0, 8.0])

    output, logsumexp = attend(attention, [x.view(1, 1, 2, 1) for x in (q, k, v)])

    what = f"{CALL}(Q = (1, 0), K = (log 3, 0), V = (4, 8))"
    close(output, torch.tensor([5.0, 6.0]).view(1, 1, 2, 1), f"{what}: output", tolerance=1e-5,
          hint="3/4 of 4 and 1/4 of 8, then half of each")  # fmt: skip
    close(logsumexp.float(), torch.tensor([4.0, 2.0]).log().view(1, 1, 2), f"{what}: logsumexp", tolerance=1e-5,
          hint="log(exp(log 3) + exp(0)) and log(exp(0) + exp(0)), with the natural logarithm")  # fmt: skip


@requirement("3.4")
def test_agrees_with_the_formula(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Output and logsumexp are the formula's, in one block and in several."""
    attention = build(subject)
    hints = {(1, 1): "softmax(Q Kᵀ / √Dh) V", (1, 3): "bring each block to the running maximum before you add it"}

    for rows, columns in ((1, 1), (1, 3), (3, 1), (3, 3)):
        n, m = rows * BLOCK, columns * BLOCK
        hint = f"N = {n}, M = {m}, block_size = {BLOCK}: {hints.get((rows, columns), '')}"
        agree(close, attention, inputs(rng, n, m), hint=hint)


@requirement("3.4")
def test_causal(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A causal query sees itself and what came before it, also across blocks."""
    attention = build(subject)

    for blocks in (1, 3):
        given = inputs(rng, blocks * BLOCK, blocks * BLOCK)
        hint = f"causal in {blocks}·{blocks} blocks: query i sees key j <= i, where i and j count from the first block"
        agree(close, attention, given, causal=True, hint=hint)


@requirement("3.4")
@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
def test_agrees_with_pytorch(subject: Subject, close: Close, rng: torch.Generator, on: Where, causal: bool) -> None:
    """The output is that of torch's own attention, on every device and in every dtype that is judged."""
    given = [x.to(on.device, on.dtype) for x in inputs(rng)]
    expected = pytorch(given, causal)

    output, _ = attend(build(subject).to(on.device, on.dtype), given, causal=causal)

    close(output, expected, f"{CALL}, causal = {causal}: output", tolerance=max(NEAR, on.tolerance))


@requirement("3.4")
def test_every_mask_dtype(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Boolean and 0/1 masks of every dtype mean the same."""
    given, attention = inputs(rng), build(subject)

    for dtype in MASK_DTYPES:
        mask = some_mask((B, 1, N, N), rng).to(dtype)
        agree(close, attention, given, mask, hint=f"a mask of {dtype}: true or 1 means may attend")
    given, attention = inputs(rng, 64, 256), build(subject, 64)
    hint = "a uint8 mask that allows 256 keys: a sum of it in its own dtype is 0"
    agree(close, attention, given, torch.ones(1, 1, 1, 256, dtype=torch.uint8), hint=hint)


@requirement("3.4")
def test_every_mask_shape(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Masks per batch row, per head, per query and per key all work."""
    given, attention = inputs(rng), build(subject)

    for shape in ((1, 1, 1, N), (B, 1, 1, N), (1, H, 1, N), (1, 1, N, N), (B, 1, N, N), (B, H, N, N)):
        agree(close, attention, given, some_mask(shape, rng), hint=f"a mask of shape {shape}")
    for shape in ((B, 1, N, 1), (B, H, 1, 1), (1, 1, 1, 1)):
        hint = f"a mask of shape {shape}, all true: its one column serves every block of keys"
        agree(close, attention, given, torch.ones(shape, dtype=torch.bool), hint=hint)


@requirement("3.4")
def test_a_mask_that_changes_counts_at_once(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A call after a mask has changed in place, or through .data, uses what it holds then."""
    given, attention = inputs(rng, BLOCK), build(subject)
    mask = torch.ones(B, 1, BLOCK, N, dtype=torch.bool)

    agree(close, attention, given, mask, hint="a mask that allows all")
    mask.data.copy_(some_mask((B, 1, BLOCK, N), rng))
    hint = "the same mask has allowed all in the call before, and was changed through .data: keep nothing of a mask"
    agree(close, attention, given, mask, hint=hint)
    mask.logical_not_()
    agree(close, attention, given, mask, hint="the same mask was changed in place since the call before")


@requirement("3.4")
def test_a_mask_with_causal(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """With both, a query sees what both allow."""
    given, attention = inputs(rng), build(subject)

    for shape in ((B, 1, 1, N), (1, H, N, N)):
        hint = f"a mask of shape {shape} and causal = True: what both allow may be seen"
        agree(close, attention, given, some_mask(shape, rng), causal=True, hint=hint)


@requirement("3.4")
def test_inputs_are_never_written_to(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Q, K, V and mask are afterwards what they were."""
    attention = build(subject)

    for causal, dtype, n in ((False, torch.float64, N), (True, torch.bool, N), (True, torch.bool, BLOCK)):
        given = [*inputs(rng, n, n), some_mask((B, H, n, n), rng).to(dtype)]
        before = [(x.clone(), x._version) for x in given]
        with unwritten(given[:3]):
            with torch.set_grad_enabled(n == N):  # One block, at inference: nothing is needed again.
                attend(attention, given[:3], given[3], causal)
            for name, x, (kept, _) in zip(("Q", "K", "V", "mask"), given, before, strict=True):
                close(x, kept, f"{name} after {CALL}", tolerance=0, hint=f"{name} is written to")
        for name, x, (_, version) in zip(("Q", "K", "V", "mask"), given, before, strict=True):
            assert x._version == version, f"{CALL}: writes to {name}, and restores it; an input is never written to"
        if n == N:
            agree(close, attention, given[:3], given[3], causal)


@requirement("3.4")
def test_state_dict(subject: Subject) -> None:
    """The state_dict holds the weights of the four projections and the last one's bias, and nothing else."""
    expected = {name: (D, D) if name.endswith("weight") else (D,) for name in WEIGHTS}

    attention = build(subject)
    attention(torch.ones(1, N, D, dtype=torch.float64), causal=True)

    came = {name: tuple(value.shape) for name, value in attention.state_dict().items()}
    assert came == expected, f"state_dict: {came} came, {expected} was wanted"


@requirement("3.4")
def test_forward_is_standard_attention(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """With weights loaded from a standard layer, forward gives that layer's results."""
    weights = {f"{name}_proj.weight": torch.randn(D, D, generator=rng, dtype=torch.float64) / 3 for name in "qkvo"}
    weights["o_proj.bias"] = torch.randn(D, generator=rng, dtype=torch.float64)
    x = torch.randn(B, N, D, generator=rng, dtype=torch.float64)
    attention = build(subject)
    attention.load_state_dict(weights)
    hint = "project, view as [B, N, H, Dh] and transpose, attend, transpose back and join, o_proj"

    for mask in (None, some_mask((B, 1, 1, N), rng)):
        for causal in (False, True):
            what = f"forward, {'with a mask' if mask is not None else 'no mask'}, causal = {causal}"
            expected = standard(attention, x, mask, causal).detach()
            came = call(attention, x, mask, causal)
            with explained(partial(known_forward, attention, x, mask, causal, came, expected), hint):
                close(came, expected, what, tolerance=NEAR)


@requirement("3.4")
def test_arguments_may_be_given_by_position(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """mask and causal are the arguments after Q, K, V and after x."""
    given, x = inputs(rng), torch.randn(B, N, D, generator=rng, dtype=torch.float64)
    mask = some_mask((B, 1, 1, N), rng)
    attention = build(subject)

    close(attention.flash_attention_forward(*given, mask, True)[0], reference(given, mask=mask, causal=True)[0],
          f"{CALL}(Q, K, V, mask, True): output", tolerance=NEAR)  # fmt: skip
    expected = standard(attention, x, mask, True).detach()
    close(attention(x, mask, True), expected, "forward(x, mask, True)", tolerance=NEAR)
    close(attention(x, None), standard(attention, x).detach(), "forward(x, None)", tolerance=NEAR)


@requirement("3.4")
def test_a_mask_of_a_bad_shape_is_refused(subject: Subject, rng: torch.Generator) -> None:
    """forward refuses a mask without 4 dimensions, or whose sizes do not fit, with both shapes."""
    x = torch.randn(B, N, D, generator=rng, dtype=torch.float64)
    attention = build(subject)
    shapes = [(N, N), (B, N), (B, N, N), (1, B, 1, 1, N)]
    shapes += [(B, 1, 1, N + 1), (B + 1, 1, 1, N), (B, H - 1, 1, N), (B, 1, 5, N)]

    for shape in shapes:
        named = [", ".join(map(str, sizes)) for sizes in (shape, (B, H, N, N))]
        mask = torch.ones(shape)
        refuses(ValueError, partial(attention, x, mask), f"forward with a mask of shape {shape}", *named)


@requirement("3.4")
def test_a_mask_that_would_enlarge_the_scores_is_refused(subject: Subject, rng: torch.Generator) -> None:
    """forward refuses a mask that is larger than 1 where the scores are 1."""
    attention = build(subject)

    for shape, n in (((B, 1, 1, N), N), ((1, 1, N, 1), 1)):
        x = torch.randn(1, n, D, generator=rng, dtype=torch.float64)
        what = f"forward(x of shape {tuple(x.shape)}) with a mask of shape {shape}"
        refuses(ValueError, partial(attention, x, torch.ones(shape)), what, f"1, {H}, {n}, {n}")


@requirement("3.4")
def test_a_batch_row_gives_what_it_gives_alone(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The rows of a batch, and the heads, do not see each other."""
    given = inputs(rng)
    expected = [reference(x[row : row + 1] for x in given)[0] for row in range(B)]

    output, _ = attend(build(subject), given)

    for row in range(B):
        hint = f"batch row {row} alone gives something else"
        close(output[row : row + 1], expected[row], f"{CALL}: output", hint=hint, tolerance=NEAR)


@requirement("3.4")
def test_new_weights_count_at_once(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A call after the weights have changed, in place, by loading or by replacing a layer, uses the new ones."""
    x = torch.randn(B, N, D, generator=rng, dtype=torch.float64)
    attention = build(subject)

    def used(what: str) -> None:
        expected = standard(attention, x).detach()
        for mode, training in ((nullcontext, True), (torch.no_grad, False), (torch.inference_mode, False)):
            attention.train(training)
            with mode():
                output = call(attention, x)
            how = f"{what} ({mode.__name__}, in {'training' if training else 'eval'})"
            close(output, expected, "forward", hint=how, tolerance=NEAR)

    used("in the first call")
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.mul_(-0.7)
    used("the weights were changed in place")
    attention.load_state_dict({name: value * 1.3 for name, value in attention.state_dict().items()})
    used("the weights were loaded anew")
    for parameter in attention.parameters():
        parameter.data = 2 * parameter.data
    used("the weights were assigned as .data")
    for parameter in attention.parameters():
        parameter.data.mul_(0.6)
    used("the weights were changed through .data")
    attention.k_proj = nn.Linear(D, D, bias=False, dtype=torch.float64)
    used("k_proj was replaced")


class _Elsewhere(TorchFunctionMode):
    """While on, a tensor for which no device is named is made on another one than the inputs' (numbers may mix)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in FACTORIES and (kwargs or {}).get("device") is None and made.dim() > 0:
            return made.to("meta")
        return made


@requirement("3.4")
def test_a_module_may_be_moved(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """What a call makes is made where the inputs are, or moved there."""
    given, mask = inputs(rng), some_mask((B, 1, 1, N), rng)
    x = torch.randn(B, N, D, generator=rng, dtype=torch.float64)
    attention = build(subject)
    expected = standard(attention, x, causal=True).detach()
    hint = "on another device, what is made without device=… is left behind on the CPU: make it where Q is"

    agree(close, attention, given, mask, causal=True)
    close(call(attention, x, causal=True), expected, "forward", tolerance=NEAR)
    try:
        with torch.no_grad(), _Elsewhere():
            agree(close, attention, given, mask, causal=True, hint=hint)
            output = call(attention, x, causal=True)
        close(output, expected, "forward", hint=hint, tolerance=NEAR)
    except NotImplementedError:  # It is moved explicitly: to where the inputs are?
        _moved(build(subject).to("meta"), hint)
    except RuntimeError as error:
        raise AssertionError(f"forward, {error}\n{hint}") from error


def _moved(attention: Any, hint: str) -> None:
    try:
        output = call(attention, torch.ones(B, N, D, dtype=torch.float64, device="meta"), causal=True)
    except RuntimeError as error:
        assert "device" not in str(error), f"forward on another device: {error}\n{hint}"
        return  # Values cannot be asked for there; not everything that is right works without.
    assert output.device.type == "meta", f"forward on another device: the output is on {output.device}, meta was wanted"
