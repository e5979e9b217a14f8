"""The specification of ex01, multi-head attention, as checks."""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.testing import (
    Close,
    OwnTest,
    Subject,
    Trace,
    Where,
    forbid,
    is_tensor,
    own_test_checks,
    prebuilt_attention,
    refuses,
    requirement,
    seed,
    style_checks,
)

B, H, LQ, LK, D = 2, 3, 5, 7, 12
OWN_TEST = OwnTest(
    __file__, "test_multihead_attention", swaps=("MultiHeadAttention",), right=("answer", "einsum", "softmax_by_hand")
)
MASK_DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64]
ROLES = ["all", "key-value", "query-key", "query-value"]
ENLARGED = ["batch", "queries", "keys", "heads"]
LARGE_MASKS = ["keys", "queries", "batch", "heads"]
BAD_MASK_SHAPES = [(LQ, LK), (B, LK), (LK,), (B, 1, LK), (1, B, 1, 1, LK)]
BAD_MASK_SHAPES += [(B, 1, 1, LK + 1), (B + 1, 1, 1, LK), (B, H - 1, 1, LK), (B, 1, LQ + 1, LK)]
MASK_SHAPES = [(B, 1, 1, LK), (1, 1, LQ, LK), (B, H, LQ, LK), (1, H, 1, LK), (B, 1, LQ, 1), (1, 1, 1, 1)]


def build(subject: Subject, on: Where | None = None, dropout: float = 0.0, d_model: int = D, heads: int = H) -> Any:
    """A seeded module of the learner's in float64, or in the dtype and on the device of `on`."""
    seed(1)
    attention = subject.MultiHeadAttention(d_model, heads, dropout=dropout)
    return attention.to(on.device, on.dtype) if on else attention.double()


def inputs(rng: torch.Generator, dtype: torch.dtype = torch.float64, lq: int = LQ, lk: int = LK) -> list[Tensor]:
    """Query, key and value, all different."""
    return [torch.randn(B, length, D, generator=rng, dtype=torch.float64).to(dtype) for length in (lq, lk, lk)]


def reference(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, heads: int = H
) -> tuple[Tensor, Tensor]:
    """Output and weights in float64, from the formula, with the weights of the given linear layers."""

    def project(x: Tensor, linear: nn.Linear) -> Tensor:
        projected = x.double() @ linear.weight.detach().double().T + linear.bias.detach().double()
        return projected.reshape(*x.shape[:2], heads, -1).permute(0, 2, 1, 3)

    q, k = project(query, attention.q_linear), project(key, attention.k_linear)
    v = project(value, attention.v_linear)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.size(-1) ** 0.5
    if mask is not None:
        scores = scores.masked_fill(mask == 0, float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)
    joined = torch.einsum("bhqk,bhkd->bqhd", weights, v).reshape(*query.shape[:2], -1)
    out = attention.output_linear
    return joined @ out.weight.detach().double().T + out.bias.detach().double(), weights


def agree(
    close: Close,
    attention: Any,
    given: list[Tensor],
    mask: Tensor | None = None,
    hint: str = "",
    heads: int = H,
    **options: Any,
) -> None:
    """The module's output and weights equal the formula's."""
    output, weights = reference(attention, *given, mask=mask, heads=heads)

    actual = unpack(attention(*given) if mask is None else attention(*given, mask))

    close(actual[1], weights.to(given[0].dtype), "forward: weights", hint=hint, **options)
    close(actual[0], output.to(given[0].dtype), "forward: output", hint=hint, **options)


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


# 1.1 variable lengths


@requirement("1.1")
@pytest.mark.parametrize(("lq", "lk"), [(1, 1), (1, 7), (5, 1), (9, 4), (4, 9), (67, 131)])
def test_any_lengths(subject: Subject, close: Close, rng: torch.Generator, lq: int, lk: int) -> None:
    """Any number of queries and keys gives the formula's output and weights."""
    agree(close, build(subject), inputs(rng, lq=lq, lk=lk), hint=f"with {lq} queries and {lk} keys")


@requirement("1.1")
def test_a_batch_row_gives_what_it_gives_alone(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The rows of a batch do not see each other."""
    given = inputs(rng)
    attention = build(subject)

    together = unpack(attention(*given))

    for row in range(B):
        alone = unpack(attention(*(x[row : row + 1] for x in given)))
        hint = f"batch row {row} alone gives something else: rows must not see each other"
        close(together[0][row : row + 1], alone[0].detach(), "forward: output", hint=hint)
    agree(close, attention, given)


@requirement("1.1")
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_any_batch(subject: Subject, close: Close, rng: torch.Generator, batch: int) -> None:
    """Any number of batch rows gives the formula's output and weights."""
    given = [torch.randn(batch, n, D, generator=rng, dtype=torch.float64) for n in (LQ, LK, LK)]

    agree(close, build(subject), given, hint=f"with {batch} batch rows")


@requirement("1.1")
def test_one_module_serves_lengths_in_any_order(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A call leaves nothing behind that changes the next one of another length."""
    attention = build(subject)

    for lq, lk in ((9, 4), (2, 3), (9, 4)):
        agree(close, attention, inputs(rng, lq=lq, lk=lk), hint=f"in a later call, with {lq} queries and {lk} keys")


# 1.2 masks


@requirement("1.2")
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64], ids=str)
def test_apply_mask_forbids_exactly_what_is_false(subject: Subject, close: Close, dtype: torch.dtype) -> None:
    """True may attend: allowed scores stay as they are, forbidden ones get weight 0."""
    scores = torch.tensor([[[[1.0, 3.0, 2.0, -1.0]]]], dtype=torch.float64)
    mask = torch.tensor([[[[True, False, True, False]]]])

    masked = is_tensor(build(subject).apply_mask(scores.clone(), mask.to(dtype)), "apply_mask(scores, mask)")

    close(
        masked[mask], scores[mask], "apply_mask: allowed scores", hint="true in the mask means: may attend, unchanged"
    )
    close(masked.softmax(-1)[~mask], torch.zeros(2, dtype=torch.float64), "softmax of apply_mask: forbidden weights",
          tolerance=0, hint="false in the mask means: weight exactly 0")  # fmt: skip


@requirement("1.2")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_forbidden_weights_are_exactly_zero(
    subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype
) -> None:
    """Forbidden scores lie so far below any others, large ones too, that their weight is 0 in the scores' own dtype."""
    scale = 3e4 if dtype == torch.float16 else 1e6
    scores = ((torch.rand(B, H, LQ, LK, generator=rng) * 2 - 1) * scale).to(dtype)
    mask = some_mask((B, 1, 1, LK), rng)
    forbidden = ~mask.expand(B, H, LQ, LK)
    attention = build(subject).to(dtype)

    masked = is_tensor(attention.apply_mask(scores.clone(), mask), "apply_mask(scores, mask)")

    what = f"apply_mask in {dtype}, scores between {-scale:g} and {scale:g}"
    assert masked.dtype == dtype, f"{what}: {masked.dtype} came, {dtype} was wanted"
    close(masked[~forbidden], scores[~forbidden], f"{what}: allowed scores", tolerance=0)
    weights = masked.softmax(-1)[forbidden]
    close(weights, torch.zeros_like(weights), f"{what}: forbidden weights", tolerance=0,
          hint="fill with -inf or with the dtype's lowest number, not with a fixed one")  # fmt: skip


@requirement("1.2")
@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_every_mask_dtype(subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Boolean and 0/1 masks of every dtype mean the same."""
    mask = some_mask((B, 1, LQ, LK), rng)

    for module, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        attention, hint = build(subject).to(module), f"with a mask of {dtype} on {module}; 1 means: may attend"
        agree(close, attention, inputs(rng, module), mask.to(dtype), hint=hint, tolerance=tolerance)


@requirement("1.2")
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_every_mask_shape(subject: Subject, close: Close, rng: torch.Generator, shape: tuple[int, ...]) -> None:
    """Masks per batch row, per head, per query and per key all work."""
    mask = some_mask(shape, rng)

    agree(close, build(subject), inputs(rng), mask, hint=f"with a mask of shape {shape}; true means: may attend")


@requirement("1.2")
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64], ids=str)
def test_masks_are_never_written_to(subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype) -> None:
    """A 0/1 mask of another dtype is read, not turned into a bias in place."""
    mask = some_mask((B, H, LQ, LK), rng).to(dtype)
    before = mask.clone()

    agree(close, build(subject), inputs(rng), mask)

    close(mask, before, "mask after forward", tolerance=0, hint="the mask is written to")


@requirement("1.2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_padded_keys_change_nothing(subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Keys that are masked out give what their absence gives, even with values of 1e6."""
    query, key, value = inputs(rng, dtype)
    mask = torch.ones(B, 1, 1, LK, dtype=torch.bool)
    mask[..., 4:] = False
    attention = build(subject).to(dtype)
    expected, _ = reference(attention, query, key[:, :4], value[:, :4])
    key[:, 4:] = value[:, 4:] = 1e6

    output, weights = unpack(attention(query, key, value, mask))

    hint = "the padded positions hold 1e6 and reach the output: mask before the softmax, with weights of exactly 0"
    close(
        weights[..., 4:],
        torch.zeros(B, H, LQ, LK - 4, dtype=dtype),
        "forward: weights of padded keys",
        tolerance=0,
        hint=hint,
    )
    close(output, expected.to(dtype), "forward: output", tolerance=2e-5 if dtype == torch.float32 else 1e-9, hint=hint)


@requirement("1.2")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_fully_masked_row_gives_zeros(subject: Subject, close: Close, rng: torch.Generator, training: bool) -> None:
    """A query that may attend to nothing has zero weights; its output is output_linear's bias."""
    given = inputs(rng)
    mask = some_mask((B, 1, LQ, LK), rng)
    mask[0, 0, 2] = mask[1, 0, 4] = False
    attention = build(subject).train(training)

    _, weights = unpack(attention(*given, mask))

    hint = "a query that may attend to nothing has zero weights, not NaN and not a uniform row"
    close(
        weights[0, :, 2],
        torch.zeros(H, LK, dtype=torch.float64),
        "forward: weights of a fully masked row",
        tolerance=0,
        hint=hint,
    )
    agree(close, attention, given, mask, hint=hint)


@requirement("1.2")
def test_a_row_masked_in_one_head_gives_zeros_there(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A query that may attend to nothing in one head has zero weights in that head alone."""
    mask = some_mask((B, H, LQ, LK), rng)
    mask[0, 1, 2] = False

    agree(close, build(subject), inputs(rng), mask, hint="row 2 of head 1 may attend to nothing, in other heads it may")


@requirement("1.2")
def test_everything_masked(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """With nothing to attend to anywhere, weights are zeros and every output row is output_linear's bias."""
    agree(close, build(subject), inputs(rng), torch.zeros(B, 1, 1, LK), hint="the mask allows nothing at all")


@requirement("1.2")
def test_gradients_of_fully_masked_rows_are_finite(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A fully masked row sends no NaN back, and masked keys get a gradient of exactly 0."""
    query, key, value = (x.requires_grad_() for x in inputs(rng))
    mask = torch.ones(B, 1, LQ, LK, dtype=torch.bool)
    mask[..., 5:] = mask[0, 0, 2] = False
    probe = torch.randn(B, LQ, D, generator=rng, dtype=torch.float64)
    attention = build(subject)

    output, weights = unpack(attention(query, key, value, mask))
    ((output * probe).sum() + weights.square().sum()).backward()

    grads = {"query": query.grad, "key": key.grad, "value": value.grad}
    grads |= {name: parameter.grad for name, parameter in attention.named_parameters()}
    for name, grad in grads.items():
        assert grad is not None, f"backward: {name} gets no gradient"
        assert grad.isfinite().all(), f"backward: {name}'s gradient is not finite although only one row is fully masked"
    for name in ("key", "value"):
        padded = is_tensor(grads[name], f"{name}.grad")[:, 5:]
        close(padded, torch.zeros_like(padded), f"backward: gradient of masked {name}s", tolerance=0)
    agree(close, attention, [query.detach(), key.detach(), value.detach()], mask)


@requirement("1.2")
@pytest.mark.parametrize("kind", ["padding", "causal"])
def test_masks_agree_with_pytorch(subject: Subject, close: Close, rng: torch.Generator, on: Where, kind: str) -> None:
    """Under a padding or a causal mask output, weights and gradients equal nn.MultiheadAttention's."""
    mask = some_mask((B, 1, 1, LK), rng) if kind == "padding" else torch.ones(1, 1, LK, LK).tril() == 1
    agrees_with_pytorch(subject, close, rng, on, LK, LK, mask)


@requirement("1.2")
@pytest.mark.parametrize(
    "shape",
    BAD_MASK_SHAPES,
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_a_mask_of_a_bad_shape_is_refused(subject: Subject, rng: torch.Generator, shape: tuple[int, ...]) -> None:
    """forward refuses a mask without 4 dimensions, or whose sizes do not fit, with both shapes."""
    given = inputs(rng)
    attention = build(subject)

    what = f"forward with a mask of shape {shape} for scores of shape {(B, H, LQ, LK)}"
    refuses(ValueError, lambda: attention(*given, torch.ones(shape)), what, printed(shape), printed((B, H, LQ, LK)))


@requirement("1.2")
@pytest.mark.parametrize("shape", [(B, 1, 1, 1), (1, 1, LQ, 1), (1, 1, 1, LK), (1, H, 1, 1)], ids=ENLARGED)
def test_a_mask_that_would_enlarge_the_scores_is_refused(
    subject: Subject, rng: torch.Generator, shape: tuple[int, ...]
) -> None:
    """A size of 1 in the scores is not stretched by the mask."""
    query, key, value = (x[:1, :1] for x in inputs(rng))
    attention = build(subject, heads=1)

    what = f"forward with a mask of shape {shape} for scores of shape (1, 1, 1, 1)"
    refuses(ValueError, lambda: attention(query, key, value, torch.ones(shape)), what, printed(shape), "1, 1, 1, 1")


@requirement("1.2")
def test_a_bad_mask_is_refused_where_lengths_coincide(subject: Subject, rng: torch.Generator) -> None:
    """A [B, Lk] mask is refused also where B = Lq, so that it would broadcast."""
    query, key, value = inputs(rng, lq=B)
    attention = build(subject)

    what = f"forward with a mask of shape {(B, LK)} for scores of shape {(B, H, B, LK)}"
    refuses(
        ValueError,
        lambda: attention(query, key, value, torch.ones(B, LK)),
        what,
        printed((B, LK)),
        printed((B, H, B, LK)),
    )


@requirement("1.2")
@pytest.mark.parametrize(("d_model", "heads"), [(10, 4), (3, 6)])
def test_a_bad_d_model_is_refused(subject: Subject, d_model: int, heads: int) -> None:
    """A d_model that num_heads does not divide is refused with both numbers."""
    what = f"MultiHeadAttention({d_model}, {heads})"
    refuses(ValueError, lambda: subject.MultiHeadAttention(d_model, heads), what, d_model, heads)


def printed(shape: tuple[int, ...]) -> str:
    """A shape's numbers as Python prints them, without brackets."""
    return ", ".join(map(str, shape))


# 1.3 memory. H·Lk > 3·D and B·H·Lq·Lk > 3·D² make the scores larger than any projection or fused weight.


def large(subject: Subject, rng: torch.Generator) -> tuple[Any, list[Tensor], int]:
    """A float32 module with H = 3 heads, inputs, and the number of scores."""
    lq, lk = 22, 25
    return build(subject).float(), inputs(rng, torch.float32, lq, lk), B * H * lq * lk


def large_agree(close: Close, attention: Any, given: list[Tensor], result: Any, masked: bool) -> None:
    """The result is right; with a mask, whose values are 1.2's business, rows of weights at least sum to 1 or 0."""
    output, weights = unpack(result)
    expected_output, expected_weights = reference(attention, *given)
    if masked:
        assert weights.shape == expected_weights.shape, f"forward: weights of shape {tuple(weights.shape)} came"
        sums = weights.detach().sum(-1)
        close(sums, sums.round().clamp(0, 1), "forward with a mask: sums of the weights", tolerance=1e-5)
    else:
        close(weights, expected_weights.float(), "forward: weights", tolerance=2e-5)
        close(output, expected_output.float(), "forward: output", tolerance=2e-5)


@requirement("1.3")
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_nothing_is_larger_than_the_scores(subject: Subject, close: Close, rng: torch.Generator, masked: bool) -> None:
    """No tensor made in forward, in training or in eval, or in backward has more elements than the scores."""
    attention, given, scores = large(subject, rng)
    more = [some_mask((B, 1, 1, 25), rng)] if masked else []

    with Trace() as seen:
        result = attention(*given, *more)
        unpack(result)[0].sum().backward()
        attention.eval()(*given, *more)

    large_agree(close, attention, given, result, masked)
    assert seen.largest <= scores, (
        f"forward: a tensor of {seen.largest} elements is made; the scores have {scores}\n"
        "multiply matrices (q @ k.mT) in place of a broadcast product that is summed afterwards"
    )


@requirement("1.3")
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(B, 1, 1, 25), (1, 1, 22, 25), (B, 1, 22, 25), (1, H, 1, 25)], ids=LARGE_MASKS)
def test_the_mask_is_not_expanded(
    subject: Subject, close: Close, rng: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Nothing of the scores' size is made from a smaller mask alone: broadcasting needs no copy."""
    attention, given, scores = large(subject, rng)
    mask = some_mask(shape, rng).to(dtype)

    with Trace(sources=[mask]) as seen:
        result = attention(*given, mask)
        attention.eval()(*given, mask)

    assert seen.largest_from_sources < scores, (
        f"forward: a mask of shape {shape} is copied to {seen.largest_from_sources} elements, the size of the scores\n"
        "let the operation broadcast it: an expanded view costs nothing, repeat() and contiguous() do"
    )
    large_agree(close, attention, given, result, masked=True)


@requirement("1.3")
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_at_most_five_scores_are_alive_at_inference(
    subject: Subject, close: Close, rng: torch.Generator, masked: bool
) -> None:
    """Under no_grad at most 5 float32 tensors of the scores' size are alive at once."""
    attention, given, scores = large(subject, rng)
    more = [some_mask((B, 1, 1, 25), rng)] if masked else []
    attention.eval()

    with torch.no_grad(), Trace(at_least=scores) as seen:
        result = attention(*given, *more)

    large_agree(close, attention, given, result, masked)
    alive = seen.peak_bytes / (4 * scores)
    assert alive <= 5, (
        f"forward under no_grad: {alive:.2f} tensors of the scores' size are alive at once; at most 5 are asked for"
    )


@requirement("1.3")
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_at_most_four_scores_are_kept_for_backward(
    subject: Subject, close: Close, rng: torch.Generator, masked: bool
) -> None:
    """With dropout 0, what forward leaves for backward is at most 4 float32 tensors of the scores' size."""
    attention, given, scores = large(subject, rng)
    more = [some_mask((B, 1, 1, 25), rng)] if masked else []
    large_agree(close, attention, given, attention(*given, *more), masked)

    with Trace(at_least=scores) as seen:
        output = unpack(attention(*given, *more))[0]
        kept = seen.alive_after_collection() / (4 * scores)

    assert output.requires_grad, "forward in training: the output carries no gradient"
    assert kept <= 4, (
        f"forward in training: {kept:.2f} tensors of the scores' size are kept for backward; at most 4 are asked for"
    )


@requirement("1.3")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_nothing_of_the_last_call_stays_alive(
    subject: Subject, close: Close, rng: torch.Generator, training: bool
) -> None:
    """Once output and weights are gone, so is everything that forward made, and the module holds no input."""
    attention, given, _ = large(subject, rng)
    large_agree(close, attention, given, attention(*given), masked=False)
    mask = some_mask((B, 1, 22, 25), rng)
    attention = build(subject, dropout=0.5).float().train(training)

    with torch.set_grad_enabled(training), Trace() as seen:
        attention(*given, mask)
        left = seen.alive_after_collection()

    assert left < 4 * D, f"forward: {left} bytes stay alive after its results are gone; the module keeps them"
    held = [weakref.ref(x.untyped_storage()) for x in (*given, mask)]
    del given, mask
    for name, storage in zip(("query", "key", "value", "mask"), held, strict=True):
        assert storage() is None, f"forward: {name} stays alive after the call; the module keeps it"


# 1.4 self- and cross-attention


@requirement("1.4")
def test_cross_attention(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Query, key and value are three different things."""
    hint = "query, key and value are all different here: each has its own projection"
    agree(close, build(subject), inputs(rng), hint=hint)


@requirement("1.4")
@pytest.mark.parametrize("same", [(0, 0, 0), (0, 1, 1), (0, 0, 1), (0, 1, 0)], ids=ROLES)
def test_one_tensor_in_several_roles(
    subject: Subject, close: Close, rng: torch.Generator, same: tuple[int, ...]
) -> None:
    """One tensor may serve in two roles or in all three; the others are their own."""
    x = [torch.randn(B, LQ, D, generator=rng, dtype=torch.float64) for _ in range(2)]

    agree(close, build(subject), [x[index] for index in same], hint="one tensor serves in several roles here")


@requirement("1.4")
def test_equal_key_and_value_lengths_of_the_query(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Nothing is mixed up where all lengths are equal but the tensors are not."""
    agree(close, build(subject), inputs(rng, lk=LQ), hint="all lengths are equal here, the tensors are not")


@requirement("1.4")
def test_overlapping_and_strided_inputs(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Views of one storage, transposed and expanded ones too, are as good as copies."""
    base = torch.randn(9, D, B, generator=rng, dtype=torch.float64).permute(2, 0, 1)
    row = torch.randn(1, LK, D, generator=rng, dtype=torch.float64).expand(B, LK, D)
    attention = build(subject)

    agree(
        close,
        attention,
        [base[:, :5], base[:, 2:9], base[:, 1:8]],
        hint="the inputs are overlapping, transposed views here",
    )
    agree(close, attention, [base[:, ::2], row, base[:, 2:9]], hint="the key is an expanded view here")
    square = torch.randn(B, D, D, generator=rng, dtype=torch.float64)
    agree(close, attention, [square, square.mT, square], hint="the key is the query's transposed view here")


@requirement("1.4")
@pytest.mark.parametrize("shape", [(B, 1, 1, LK), (B, H, LQ, LK)], ids=["keys", "full"])
def test_inputs_are_never_written_to(
    subject: Subject, close: Close, rng: torch.Generator, shape: tuple[int, ...]
) -> None:
    """forward leaves query, key, value and mask as they were."""
    given = [*inputs(rng), some_mask(shape, rng)]
    before = [x.clone() for x in given]
    attention = build(subject)
    agree(close, attention, given[:3])

    attention(*given)
    with torch.no_grad():
        attention(*given)

    for name, x, kept in zip(("query", "key", "value", "mask"), given, before, strict=True):
        close(x, kept, f"{name} after forward", tolerance=0, hint="an input is written to")


# 1.5 scale and dropout


@requirement("1.5")
def test_scores_by_hand(subject: Subject, close: Close) -> None:
    """Two features and one head: q·k / √2."""
    attention = build(subject, d_model=2, heads=1)
    q = torch.tensor([[[[1.0, 2.0]]]], dtype=torch.float64)
    k = torch.tensor([[[[3.0, 5.0], [0.0, -1.0]]]], dtype=torch.float64)
    expected = torch.tensor([[[[13 / 2**0.5, -2 / 2**0.5]]]], dtype=torch.float64)

    scores = attention.compute_attention_scores(q, k)

    close(
        scores,
        expected,
        "compute_attention_scores([1, 2], [[3, 5], [0, -1]])",
        hint="13 and -2, divided by √head_dim = √2",
    )


@requirement("1.5")
def test_scores_are_scaled_by_head_dim(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The factor is 1/√head_dim: neither missing, nor 1/√d_model, nor 1/head_dim."""
    q, k = (torch.randn(B, H, n, D // H, generator=rng, dtype=torch.float64) for n in (LQ, LK))
    product = torch.einsum("bhqd,bhkd->bhqk", q, k)

    scores = is_tensor(build(subject).compute_attention_scores(q, k), "compute_attention_scores(q, k)")

    wanted = (D // H) ** -0.5
    came = float((scores.detach() * product).sum() / product.square().sum()) if scores.shape == product.shape else 0.0
    hint = f"the scores are {came:.4g} × q kᵀ; 1/√head_dim = {wanted:.4g}" if scores.shape == product.shape else ""
    close(scores, product * wanted, "compute_attention_scores(q, k)", hint=hint)


@requirement("1.5")
def test_forward_scales_once(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """forward's weights are the softmax of the scaled scores, not of scores scaled twice or not at all."""
    given = inputs(rng)
    agree(
        close,
        build(subject),
        [3 * x for x in given],
        hint="weights: softmax over the keys of q kᵀ / √head_dim, scaled once",
    )


@requirement("1.5")
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("p", [0.5, 0.2])
def test_dropout_acts_on_the_weights_alone(
    subject: Subject, close: Close, rng: torch.Generator, p: float, masked: bool
) -> None:
    """In training, with a mask (of ones) too, a weight is 0 or w / (1 - p), and the output is made from these."""
    more = [torch.ones(B, 1, 1, 50, dtype=torch.bool)] if masked else []
    query, key, value = inputs(rng, lq=40, lk=50)
    attention = build(subject, dropout=p)
    _, expected = reference(attention, query, key, value)
    v = attention.v_linear(value).detach().unflatten(-1, (H, -1)).transpose(1, 2)

    output, weights = unpack(attention.train()(query, key, value, *more))

    assert weights.shape == expected.shape, f"forward: weights of shape {tuple(weights.shape)} came"
    dropped = weights == 0
    close(weights[~dropped], expected[~dropped] / (1 - p), "forward in training: weights kept by dropout",
          hint=f"a kept weight is w / (1 - {p}): the mean is preserved; those after dropout are returned")  # fmt: skip
    share = dropped.double().mean().item()
    assert abs(share - p) < 0.05, f"forward in training: {share:.2f} of the weights are dropped, {p} was wanted"
    joined = (weights.detach() @ v).transpose(1, 2).flatten(2)
    close(output, attention.output_linear(joined).detach(), "forward in training: output",
          hint="the output is made from the weights that are returned, and nothing else is dropped")  # fmt: skip


@requirement("1.5")
def test_dropout_differs_per_head_query_and_key(subject: Subject, rng: torch.Generator) -> None:
    """Weights are dropped one by one, not whole heads, rows or columns."""
    given = inputs(rng, lq=40, lk=50)
    attention = build(subject, dropout=0.5).train()

    with torch.no_grad():  # Dropout goes by the module's mode alone.
        dropped = unpack(attention(*given))[1] == 0

    share = dropped.double().mean().item()
    assert 0.4 < share < 0.6, f"forward in training under no_grad: {share:.2f} of the weights are dropped, not 0.5"
    for dim, name in enumerate(("batch rows", "heads", "queries", "keys")):
        alike = (dropped == dropped.narrow(dim, 0, 1)).double().mean().item()
        assert alike < 0.9, f"forward in training: the same weights are dropped for all {name}"


@requirement("1.5")
def test_dropout_follows_torchs_seed(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The same seed drops the same weights; another call drops others."""
    given = inputs(rng)
    attention = build(subject, dropout=0.5).train()

    seed(7)
    first, second = unpack(attention(*given))[1], unpack(attention(*given))[1]
    seed(7)
    again = unpack(attention(*given))[1]

    close(
        again,
        first.detach(),
        "forward in training: weights",
        tolerance=0,
        hint="the same torch.manual_seed gives others",
    )
    assert (first != second).any(), (
        "forward in training: two calls drop the same weights; dropout 0.5 does nothing or never changes"
    )


@requirement("1.5")
def test_no_dropout_in_eval(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """In eval nothing is dropped, also after training and with train() again off."""
    given = inputs(rng)
    attention = build(subject, dropout=0.5).train()
    attention(*given)

    agree(close, attention.eval(), given, hint="in eval dropout does nothing")


@requirement("1.5")
def test_dropout_zero_in_training(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """With dropout 0 training gives what eval gives."""
    agree(close, build(subject, dropout=0.0).train(), inputs(rng), hint="dropout is 0 here")


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

    agree(close, build(subject, d_model=d_model, heads=heads), given, hint=f"{d_model=}, {heads=}", heads=heads)


def agrees_with_pytorch(
    subject: Subject,
    close: Close,
    rng: torch.Generator,
    on: Where,
    lq: int,
    lk: int,
    mask: Tensor | None,
    training: bool = True,
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

    close(actual[1], expected[1], "forward: weights")
    close(actual[0], expected[0], "forward: output")
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
    assert output.requires_grad and weights.requires_grad, "forward: output and weights must carry gradient"
    assert output.shape == probes[0].shape and weights.shape == probes[1].shape, (
        f"forward: shapes {tuple(output.shape)} and {tuple(weights.shape)} came, "
        f"{tuple(probes[0].shape)} and {tuple(probes[1].shape)} were wanted"
    )
    ((output * probes[0]).sum() + (weights * probes[1]).sum()).backward()
    return (output.detach(), weights.detach()), [leaf.grad for leaf in leaves]


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
    """A call after the weights have changed, in place or by loading, uses the new ones."""
    given = inputs(rng)
    attention = build(subject)
    agree(close, attention, given)

    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.mul_(-0.7)
    agree(close, attention, given, hint="the weights were changed in place before this call")
    attention.load_state_dict({name: value * 1.3 for name, value in attention.state_dict().items()})
    agree(close, attention, given, hint="the weights were loaded anew before this call")
    attention.q_linear = nn.Linear(D, D, dtype=torch.float64)
    agree(close, attention, given, hint="q_linear was replaced before this call")


# 1.7 low precision


@requirement("1.7")
@pytest.mark.parametrize("kind", ["plain", "masked"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)], ids=["float16", "bfloat16"]
)
def test_half_precision(
    subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype, tolerance: float, kind: str
) -> None:
    """At unit scale the error in half precision stays within the dtype's tolerance, and the dtype stays."""
    given = inputs(rng, dtype)
    mask = half_mask(rng) if kind == "masked" else None
    attention = build(subject).to(dtype)

    agree(close, attention, given, mask, hint=f"in {dtype}", tolerance=tolerance)


@requirement("1.7")
@pytest.mark.parametrize("kind", ["plain", "masked"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_finite(subject: Subject, rng: torch.Generator, dtype: torch.dtype, kind: str) -> None:
    """Inputs 6 times as large overflow nothing, forward and backward."""
    given = [(6 * x).to(dtype).requires_grad_() for x in inputs(rng)]
    mask = half_mask(rng) if kind == "masked" else None
    attention = build(subject).to(dtype)

    output, weights = unpack(attention(*given) if mask is None else attention(*given, mask))
    output.sum().backward()

    for name, x in {
        "output": output,
        "weights": weights,
        "query.grad": given[0].grad,
        "value.grad": given[2].grad,
    }.items():
        assert x is not None and x.isfinite().all(), f"forward in {dtype}, inputs of scale 6: {name} is not finite"
        assert x.dtype == dtype, f"forward in {dtype}: {name} has {x.dtype}"
    total = weights.detach().float().sum(-1)
    live = total if mask is None else total[mask.expand(B, H, LQ, LK).any(-1)]
    assert (live - 1).abs().max() < 2e-2, (
        f"forward in {dtype}, inputs of scale 6: weights sum to {live.min():.3f}, not to 1"
    )


@requirement("1.7")
@pytest.mark.parametrize("kind", ["plain", "masked"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)], ids=["float16", "bfloat16"]
)
def test_autocast(
    subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype, tolerance: float, kind: str
) -> None:
    """Under autocast, at unit scale, output and weights are right within the dtype's tolerance."""
    given = inputs(rng, torch.float32)
    mask = half_mask(rng) if kind == "masked" else None
    attention = build(subject).float()
    expected = reference(attention, *given, mask=mask)

    with torch.autocast("cpu", dtype=dtype):
        actual = unpack(attention(*given) if mask is None else attention(*given, mask))
        large_ones = unpack(attention(*(6 * x for x in given)))

    for name, came, wanted in zip(("output", "weights"), actual, expected, strict=True):
        assert came.dtype in (dtype, torch.float32), f"forward under autocast to {dtype}: {name} has {came.dtype}"
        close(came.double(), wanted, f"forward under autocast to {dtype}: {name}", tolerance=tolerance)
    assert all(x.isfinite().all() for x in large_ones), (
        f"forward under autocast to {dtype}, inputs of scale 6: not finite"
    )


@requirement("1.7")
def test_a_module_may_be_cast_between_calls(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """After .float() and .double() each call works in the new dtype, with its precision."""
    attention = build(subject)
    agree(close, attention.float(), inputs(rng, torch.float32), tolerance=2e-5)

    agree(close, attention.double(), inputs(rng), hint="the module was cast to float64 after a call in float32")


@requirement("1.7")
def test_a_module_may_be_moved(
    subject: Subject, close: Close, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another device nothing is left behind: the meta device stands in for one, in training, with dropout."""
    # autocast knows every real device, but not this one: code that switches it off by x.device.type is right.
    known = torch.autocast
    lenient = lambda *a, **k: nullcontext() if "meta" in (*a, *k.values()) else known(*a, **k)  # noqa: E731
    monkeypatch.setattr(torch, "autocast", lenient)
    agree(close, build(subject), inputs(rng))
    moved = build(subject, dropout=0.5).to("meta").train()

    output, weights = unpack(moved(*(x.to("meta") for x in inputs(rng))))

    places = f"output on {output.device}, weights on {weights.device}"
    assert output.device.type == weights.device.type == "meta", f"forward on meta: {places}"


def half_mask(rng: torch.Generator) -> Tensor:
    """A mask with one fully masked row."""
    mask = some_mask((B, 1, LQ, LK), rng)
    mask[1, 0, 3] = False
    return mask


# 1.8 from scratch


@requirement("1.8")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_no_prebuilt_attention_is_reached(
    subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype, training: bool
) -> None:
    """forward, short and long, with and without a mask, is right while every prebuilt attention raises."""
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    short, longer = inputs(rng, dtype), inputs(rng, dtype, 40, 40)

    with torch.set_grad_enabled(training), forbid(prebuilt_attention(), "forward"):
        attention = build(subject).to(dtype).train(training)
        attention(*short, some_mask((B, 1, 1, LK), rng))
        agree(close, attention, short, tolerance=tolerance)
        agree(close, attention, longer, tolerance=tolerance)


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
    agree(close, attention, [x.detach() for x in given])


# 1.9 and 1.10


test_own_test_passes_on_right_code, test_own_test_catches = own_test_checks("1.9", OWN_TEST)
test_ruff_finds_nothing, test_mypy_finds_nothing = style_checks("1.10")
