"""The sizes, modules and inputs of ex01's checks, the formula, nn.MultiheadAttention, and asserts that compare."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harness.testing import Close, Subject, Where, fill, is_tensor, plain, refuses, seed, untouched

B, H, LQ, LK, D = 2, 3, 5, 7, 12
FOLLOWS = "the weights agree: look at what follows them: the values, the joining of heads, output_linear"
# What float64 deserves, judged in 1.6 alone; and what all others compare at, so that a step in float32 costs one.
PRECISE, VALUES = 1e-9, 1e-5


def build(subject: Subject, on: Where | None = None, dropout: float = 0.0, d_model: int = D, heads: int = H) -> Any:
    """A seeded module of the learner's in float64, or in the dtype and on the device of `on`."""
    seed(1)
    attention = subject.MultiHeadAttention(d_model, heads, dropout=dropout)
    attention = attention.to(on.device, on.dtype) if on else attention.double()
    fill(attention.q_linear, attention.k_linear, attention.v_linear, attention.output_linear)
    return attention


def inputs(rng: torch.Generator, dtype: torch.dtype = torch.float64, lq: int = LQ, lk: int = LK) -> list[Tensor]:
    """Query, key and value, all different."""
    return [torch.randn(B, length, D, generator=rng, dtype=torch.float64).to(dtype) for length in (lq, lk, lk)]


def reference(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, heads: int = H
) -> tuple[Tensor, Tensor]:
    """Output and weights in float64, from the formula, with the weights of the given linear layers."""

    def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (x.double() @ weight.T + bias).reshape(*x.shape[:2], heads, -1).permute(0, 2, 1, 3)

    names = ("q_linear", "k_linear", "v_linear", "output_linear")
    *inner, (out_weight, out_bias) = (plain(getattr(attention, name)) for name in names)
    untouched()
    q, k, v = (project(x, *layer) for x, layer in zip((query, key, value), inner, strict=True))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.size(-1) ** 0.5
    if mask is not None:
        scores = scores.masked_fill(mask == 0, float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)
    joined = torch.einsum("bhqk,bhkd->bqhd", weights, v).reshape(*query.shape[:2], -1)
    return joined @ out_weight.T + out_bias, weights


def agree(
    close: Close,
    attention: Any,
    given: list[Tensor],
    mask: Tensor | None = None,
    hint: str = "",
    heads: int = H,
    tolerance: float = VALUES,
    rule: str = "",
) -> None:
    """The module's output and weights equal the formula's; `rule` is a hint where the weights do not."""
    output, weights = reference(attention, *given, mask=mask, heads=heads)

    actual = unpack(attention(*given) if mask is None else attention(*given, mask))

    expected = output.to(given[0].dtype), weights.to(given[0].dtype)
    same(close, actual, expected, Asked(attention, given, mask, heads), tolerance, hint=hint, rule=rule)


class Asked(NamedTuple):
    """What forward was given, for what a message says beside the values."""

    attention: Any
    given: Sequence[Tensor]
    mask: Tensor | None = None
    heads: int = H

    def clues_of_weights(self, came: Tensor, wanted: Tensor, limit: float) -> Iterator[str]:
        """What the weights that came are as, where they are as under a known slip."""
        (query, key, value), mask = self.given, self.mask
        if not _alike(came, wanted):
            return
        if mask is not None:
            plain = self._formula(query, key, value, None)[1]
            allowed = (mask != 0).expand(came.shape)
            if _near(came, plain, limit):
                yield "the weights are as without a mask"
            elif _near(came, plain * allowed, limit):
                sums = came.double().sum(-1)[allowed.any(-1)]
                farthest = sums[(sums - 1).abs().argmax()].item()
                yield f"allowed weights are as without a mask: a row sums to {farthest:.2f}, 1 was wanted"
            elif _near(came, self._formula(query, key, value, mask == 0)[1], limit):
                yield "the weights are as with the inverted mask: true or 1 means may attend"
        for slip, q, k in (("key = query", query, query), ("query = key", key, key), ("key = value", query, value)):
            fits = q.shape == query.shape and k.shape == key.shape
            if fits and _near(came, self._formula(q, k, value, mask)[1], limit):
                yield f"the weights are as with {slip}"
                return

    def clues_of_output(self, came: Tensor, wanted: Tensor, limit: float) -> Iterator[str]:
        """That the weights agree, and what the output that came is as, where it is as under a known slip."""
        yield FOLLOWS
        query, key, value = self.given
        if not _alike(came, wanted):
            return
        if not came.any():
            yield "every output value is 0"
        for name, other in (("key", key), ("query", query)):
            if other.shape == value.shape and _near(came, self._formula(query, key, other, self.mask)[0], limit):
                yield f"the output is the same as with value = {name}"
                return

    def _formula(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return reference(self.attention, query, key, value, mask=mask, heads=self.heads)


def same(
    close: Close,
    came: tuple[Tensor, Tensor],
    wanted: tuple[Tensor, Tensor],
    asked: Asked,
    tolerance: float | None = None,
    what: str = "forward",
    hint: str = "",
    rule: str = "",
) -> None:
    """Weights and output equal those wanted. Only where they do not, it is computed what else they are."""
    limit = close.tolerance if tolerance is None else tolerance
    for place, name, found, first in (
        (1, "weights", asked.clues_of_weights, (hint, rule)),
        (0, "output", asked.clues_of_output, (hint,)),
    ):
        try:
            close(came[place], wanted[place], f"{what}: {name}", tolerance=limit)
        except AssertionError as error:
            with torch.no_grad():
                actual, expected = came[place].detach(), wanted[place].detach()
                clues = [*first, *found(actual, expected, limit), *_small(actual, expected, limit)]
            raise AssertionError("\n".join(line for line in (str(error), *clues) if line)) from None


def _alike(came: Tensor, wanted: Tensor) -> bool:
    """Whether values are all that may differ."""
    return all(getattr(came, name) == getattr(wanted, name) for name in ("shape", "dtype", "device", "layout"))


def _near(came: Tensor, other: Tensor, limit: float) -> bool:
    return bool(torch.isclose(came.double(), other.detach().double(), rtol=limit, atol=limit).all())


def _small(came: Tensor, wanted: Tensor, limit: float) -> Iterator[str]:
    precise = wanted.dtype == torch.float64 and limit <= VALUES
    if precise and _alike(came, wanted) and (came - wanted).abs().max() < 1e-2:
        yield "no difference reaches 1e-2: is a step computed in a lower precision?"


def refuses_mask(call: Callable[[], Any], what: str, *contents: str) -> None:
    """The call raises a ValueError whose message holds `contents`."""
    try:
        refuses(ValueError, call, what, *contents)
    except AssertionError as error:
        frames = traceback.extract_tb(error.__cause__.__traceback__) if error.__cause__ is not None else []
        if not frames or (frames[-1].line or "").startswith(("raise", "assert")):
            raise
        # Without the line that failed: what is missing is missing before it.
        raise AssertionError(f"{error}\nthe mask was not refused; the call went on and failed later") from None


def carries(x: Tensor, what: str) -> Tensor:
    """A tensor, if it carries gradient."""
    assert x.requires_grad, f"{what} came without gradient; output and weights must carry gradient"
    return x


def unpack(result: Any) -> tuple[Tensor, Tensor]:
    """Output and weights, if that is what came."""
    assert isinstance(result, tuple) and len(result) == 2, (
        f"forward: a {type(result).__name__} came, the pair (output, weights) was wanted"
    )
    return is_tensor(result[0], "forward: output"), is_tensor(result[1], "forward: weights")


def some_mask(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """A boolean mask in which every row allows something and, if there are several keys, forbids something."""
    mask = torch.rand(shape, generator=rng) > 0.4
    if shape[-1] > 1:
        mask[..., 1], mask[..., 2] = True, False
    return mask


def agrees_with_pytorch(
    subject: Subject,
    close: Close,
    rng: torch.Generator,
    on: Where,
    lq: int,
    lk: int,
    mask: Tensor | None,
    training: bool = True,
    tolerance: float = PRECISE,
) -> None:
    """Output, weights and all gradients equal nn.MultiheadAttention's, under a mask that leaves every row something."""
    given = [x.to(on.device, on.dtype) for x in inputs(rng, lq=lq, lk=lk)]
    probes = [torch.randn(shape, generator=rng).to(on.device, on.dtype) for shape in ((B, lq, D), (B, H, lq, lk))]
    attention = build(subject, on).train(training)
    theirs = pytorchs(attention).to(on.device, on.dtype)
    forbidden = None if mask is None else ~mask.expand(B, H, lq, lk).flatten(0, 1).to(on.device)
    more = [] if mask is None else [mask.to(on.device)]
    expected, expected_grads = run(
        lambda *x: theirs(*x, attn_mask=forbidden, average_attn_weights=False), given, probes
    )

    actual, grads = run(lambda *x: attention(*x, *more), given, probes)

    close = Close(max(close.tolerance, tolerance))
    hint = "query and key are different tensors of one length here" if lq == lk else ""
    same(close, actual, expected, Asked(attention, given, more[0] if more else None), hint=hint)
    hint = "forward agrees, its gradient does not: is something detached?"
    for name, came, wanted in zip(("query", "key", "value"), grads, expected_grads, strict=True):
        close(came, wanted, f"backward: gradient of {name}", hint=hint)
    for kind in ("weight", "bias"):
        wanted = getattr(theirs, f"in_proj_{kind}").grad.chunk(3)
        for name, part in zip(("q_linear", "k_linear", "v_linear"), wanted, strict=True):
            close(getattr(getattr(attention, name), kind).grad, part, f"backward: gradient of {name}.{kind}", hint=hint)
        part = getattr(theirs.out_proj, kind).grad
        close(
            getattr(attention.output_linear, kind).grad, part, f"backward: gradient of output_linear.{kind}", hint=hint
        )


def pytorchs(attention: Any) -> nn.MultiheadAttention:
    """nn.MultiheadAttention with the weights of the learner's layers."""
    theirs = nn.MultiheadAttention(D, H, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        layers = (attention.q_linear, attention.k_linear, attention.v_linear)
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
        theirs.out_proj.load_state_dict(attention.output_linear.state_dict())
    return theirs


def run(
    module: Callable[..., Any], given: list[Tensor], probes: list[Tensor]
) -> tuple[tuple[Tensor, Tensor], list[Any]]:
    """Calls a module, differentiates a sum over output and weights; returns both and the inputs' gradients."""
    leaves = [x.clone().requires_grad_() for x in given]
    output, weights = unpack(module(*leaves))
    carries(output, "forward: output")
    carries(weights, "forward: weights")
    assert output.shape == probes[0].shape and weights.shape == probes[1].shape, (
        f"forward: shapes {tuple(output.shape)} and {tuple(weights.shape)} came, "
        f"{tuple(probes[0].shape)} and {tuple(probes[1].shape)} were wanted"
    )
    ((output * probes[0]).sum() + (weights * probes[1]).sum()).backward()
    return (output.detach(), weights.detach()), [leaf.grad for leaf in leaves]


def formula(values: Tensor, heads: int, given: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weights, before dropout, and the projected values."""
    batch, _, width = given[0].shape
    layers = values.split([width] * 4 + [1] * 4)
    q, k, v = (
        nn.functional.linear(x.double(), layers[i], layers[4 + i][0])
        .view(batch, -1, heads, width // heads)
        .transpose(1, 2)
        for i, x in enumerate(given)
    )
    scores = (q * (width // heads) ** -0.5) @ k.mT
    if mask is None:
        return scores.softmax(-1), v
    forbidden = mask == 0
    return scores.masked_fill(forbidden, -1e300).softmax(-1).masked_fill(forbidden, 0), v


def joined(values: Tensor, weights: Tensor, v: Tensor) -> Tensor:
    """The output."""
    batch, heads, _, size = v.shape
    width = heads * size
    context = (weights @ v).transpose(1, 2).reshape(batch, -1, width)
    return nn.functional.linear(context, values[3 * width : 4 * width], values[-1])


def dropped(want: Tensor, came: Tensor, rate: float) -> Tensor:
    """The weights that are wanted where those came that did."""
    assert came.shape == want.shape, (
        f"forward: weights of shape {tuple(came.shape)} came, {tuple(want.shape)} was wanted"
    )
    kept = came.detach() != 0
    if rate == 1:
        return want * 0
    sure = want.detach() > 1e-3
    if (count := int(sure.sum())) >= 64:
        share = 1 - int((sure & kept).sum()) / count
        assert abs(share - rate) < 6 * (rate * (1 - rate) / count) ** 0.5 + 0.02, (
            f"forward in training: {share:.2g} of the weights returned are dropped, {rate} was wanted{as_a_whole(kept)}"
        )
    return want * kept / (1 - rate)


def as_a_whole(kept: Tensor) -> str:
    """A line that names what of the weights [B, H, Lq, Lk] is dropped or kept as a whole, if something is."""
    if bool((kept == kept[:1, :1, :1, :1]).all()):
        return ""
    for name, first in (
        ("head", kept[..., :1, :1]),
        ("query's row", kept[..., :1]),
        ("key's column", kept[..., :1, :]),
    ):
        if first.shape != kept.shape and bool((kept == first).all()):
            return f"\neach {name} is dropped or kept as a whole"
    return ""
