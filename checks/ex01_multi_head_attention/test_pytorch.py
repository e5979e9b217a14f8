"""PyTorch (1.6, 1.8): output, weights and gradients equal nn.MultiheadAttention's; no prebuilt attention is reached."""

from contextlib import nullcontext, suppress

import pytest
import torch
from torch import nn

from harness.testing import Close, Subject, Where, forbid, prebuilt_attention, requirement

from .reference import LK, LQ, PRECISE, B, D, H, agree, agrees_with_pytorch, build, inputs, some_mask, unpack

# 1.6 agreement with PyTorch


@requirement("1.6")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("lq", "lk"), [(LQ, LK), (LK, LK)], ids=["cross", "square"])
def test_agrees_with_pytorch(
    subject: Subject, close: Close, rng: torch.Generator, on: Where, lq: int, lk: int, training: bool
) -> None:
    """Output, weights and gradients equal nn.MultiheadAttention's with the same weights, in eval too."""
    agrees_with_pytorch(subject, close, rng, on, lq, lk, None, training)


@requirement("1.6")
@pytest.mark.parametrize(("d_model", "heads"), [(20, 5), (15, 3), (7, 1), (6, 6)])
def test_any_number_of_heads(subject: Subject, close: Close, rng: torch.Generator, d_model: int, heads: int) -> None:
    """Any d_model and any number of heads that divides it, one and d_model too, give the formula."""
    given = [torch.randn(B, n, d_model, generator=rng, dtype=torch.float64) for n in (LQ, LK, LK)]

    agree(
        close,
        build(subject, d_model=d_model, heads=heads),
        given,
        hint=f"{d_model=}, {heads=}",
        heads=heads,
        tolerance=PRECISE,
    )


@requirement("1.6")
def test_gradients_flow_in_eval_too(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Eval switches dropout off, not gradients."""
    given = [x.requires_grad_() for x in inputs(rng)]
    attention = build(subject).eval()

    output, _ = unpack(attention(*given))
    output.sum().backward()

    for name, x in zip(("query", "key", "value"), given, strict=True):
        assert x.grad is not None, f"backward in eval: {name} gets no gradient"
    agree(close, attention, [x.detach() for x in given])


@requirement("1.6")
def test_new_weights_count_at_once(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A call after the weights have changed, in place or by loading, uses the new ones, at inference too."""
    given = inputs(rng)
    attention = build(subject)
    agree(close, attention, given)

    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.mul_(-0.7)
    agree(close, attention, given, hint="the weights were changed in place before this call")
    attention.load_state_dict({name: value * 1.3 for name, value in attention.state_dict().items()})
    agree(close, attention, given, hint="the weights were loaded anew before this call")
    for name in ("q_linear", "k_linear", "v_linear", "output_linear"):
        setattr(attention, name, nn.Linear(D, D, dtype=torch.float64))
        agree(close, attention, given, hint=f"{name} was replaced before this call")
    attention.eval()
    for factor in (1, -0.7):
        for parameter in attention.parameters():
            parameter.data.mul_(factor)
        with torch.no_grad():
            agree(close, attention, given, hint="weight.data was edited before this call, in eval")


@requirement("1.6")
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_a_first_call_without_gradients_leaves_nothing(
    subject: Subject, close: Close, rng: torch.Generator, mode: str
) -> None:
    """A module whose first call makes no graph trains as any other."""
    given = [x.requires_grad_() for x in inputs(rng)]
    attention, fresh = build(subject), build(subject)
    fresh.load_state_dict(attention.state_dict())
    with getattr(torch, mode)():
        attention(*given)

    grads = [
        torch.autograd.grad(unpack(module(*given))[0].sum(), [*given, module.v_linear.weight])
        for module in (attention, fresh)
    ]

    for name, came, wanted in zip(("query", "key", "value", "v_linear.weight"), *grads, strict=True):
        close(came, wanted, f"backward after a first call under {mode}: gradient of {name}")
    agree(close, attention, [x.detach() for x in given])


# 1.8 from scratch


@requirement("1.8")
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
def test_no_prebuilt_attention_is_reached(subject: Subject, close: Close, rng: torch.Generator, mode: str) -> None:
    """forward, in every precision, short and long, with and without a mask, reaches no prebuilt attention."""
    build(subject)  # The file is loaded here, with torch's state as it is by default.
    modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    halves = (torch.float16, torch.bfloat16) if mode in ("train", "inference") else ()
    with modes.get(mode, nullcontext)(), forbid(prebuilt_attention(), "forward"):
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            attention = build(subject).to(dtype).train(mode == "train")
            # Sizes are crossed with modes in float64; kernels choose by precision at any size.
            for lq, lk in ((LQ, LK), (40, 40), (1, LK)) if dtype == torch.float64 else ((40, 40),):
                given, mask = inputs(rng, dtype, lq, lk), some_mask((B, 1, 1, lk), rng)
                if (lq, dtype) == (LQ, torch.float64) or (dtype, mode) == (torch.float32, "train"):
                    agree(close, attention, given, tolerance=1e-2)
                with suppress(Exception):  # Whether these are right is for others to say; what was reached counts.
                    attention(*given)
                with suppress(Exception):
                    attention(*given, mask)
                for half in halves if dtype == torch.float32 else ():
                    with suppress(Exception), torch.autocast("cpu", dtype=half):
                        attention(*given)
                        attention(*given, mask)


@requirement("1.8")
def test_the_parts_are_from_scratch_too(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """compute_attention_scores, apply_mask and backward reach no prebuilt attention either."""
    q, k = (torch.randn(B, H, n, D // H, generator=rng, dtype=torch.float64) for n in (LQ, LK))
    given = [x.requires_grad_() for x in inputs(rng)]

    with forbid(prebuilt_attention(), "compute_attention_scores, apply_mask or backward"):
        attention = build(subject)
        attention.apply_mask(attention.compute_attention_scores(q, k), some_mask((B, 1, 1, LK), rng))
        unpack(attention(*given))[0].sum().backward()

    assert given[0].grad is not None, "backward: query gets no gradient"
    agree(close, attention, [x.detach() for x in given], tolerance=1e-2)
