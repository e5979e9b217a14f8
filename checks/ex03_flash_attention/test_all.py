"""The specification of ex03, memory-efficient (flash) attention, as checks."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from time import perf_counter, process_time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import _get_current_dispatch_mode

from harness.testing import (
    Close,
    DispatchMode,
    Subject,
    Trace,
    Where,
    forbid,
    halfway,
    is_tensor,
    prebuilt_attention,
    refuses,
    requirement,
    seed,
    style_checks,
)

B, H, DH, BLOCK = 2, 3, 5, 4
D = H * DH
N = 2 * BLOCK  # Where lengths are not the point, they are equal and multiples of the block.
INF = float("inf")
CALL = "flash_attention_forward"
WEIGHTS = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "o_proj.bias"]
MASK_DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64]
FACTORIES = _device_constructors()
HALVES = [torch.bfloat16, torch.float16]
HALF = pytest.mark.parametrize("dtype", HALVES, ids=str)


def build(subject: Subject, block_size: int = BLOCK, dtype: torch.dtype = torch.float64) -> Any:
    """A seeded module of the learner's."""
    seed(1)
    return subject.FlashAttention(D, H, block_size).to(dtype)


def inputs(rng: torch.Generator, n: int = N, m: int = N, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Q, K and V, all different."""
    return [torch.randn(B, H, length, DH, generator=rng, dtype=torch.float64).to(dtype) for length in (n, m, m)]


def reference(given: Iterable[Tensor], mask: Tensor | None = None, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of Q, K and V in float64, from the formula."""
    q, k, v = (x.double() for x in given)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.size(-1) ** 0.5
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if causal:
        allowed = allowed.tril(k.size(2) - q.size(2))
    if mask is not None:
        allowed = allowed & (mask != 0)
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1) * allowed
    return torch.einsum("bhqk,bhkd->bhqd", weights, v), scores.masked_fill(~allowed, -INF).logsumexp(-1)


def pytorch(given: list[Tensor], causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """The output of torch's own attention."""
    q, k, v = given
    output: Tensor = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return output


def attend(
    attention: Any, given: list[Tensor], mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp, if that is what flash_attention_forward gives."""
    options: dict[str, Any] = {} if mask is None else {"mask": mask}
    if causal:
        options["causal"] = True
    result = attention.flash_attention_forward(*given, **options)
    assert isinstance(result, tuple) and len(result) == 2, (
        f"{CALL}: a {type(result).__name__} came, the pair (output, logsumexp) was wanted"
    )
    return is_tensor(result[0], f"{CALL}: output"), is_tensor(result[1], f"{CALL}: logsumexp")


def agree(
    close: Close,
    attention: Any,
    given: list[Tensor],
    mask: Tensor | None = None,
    causal: bool = False,
    hint: str = "",
    tolerance: float | None = None,
) -> None:
    """The output and logsumexp of flash_attention_forward equal the formula's."""
    output, logsumexp = reference(given, mask=mask, causal=causal)

    actual = attend(attention, given, mask, causal)

    close(actual[0], output.to(given[0].dtype), f"{CALL}: output", hint=hint, tolerance=tolerance)
    assert actual[1].dtype in (torch.float32, torch.float64), (
        f"{CALL}: logsumexp has {actual[1].dtype}, float32 or better was wanted"
    )
    close(actual[1].double(), logsumexp, f"{CALL}: logsumexp", hint=hint, tolerance=tolerance)


def some_mask(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """A boolean mask in which every row allows and forbids something in each block of keys."""
    mask = torch.rand(shape, generator=rng) > 0.4
    mask[..., 1::BLOCK] = False
    mask[..., ::BLOCK] = True
    return mask


def standard(attention: Any, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """What forward gives, in float64, from the formula and the weights of the given linear layers."""
    heads = H if x.size(-1) == D else 1

    def project(linear: nn.Linear) -> Tensor:
        return (x.double() @ linear.weight.double().T).reshape(*x.shape[:2], heads, -1).permute(0, 2, 1, 3)

    q, k, v = project(attention.q_proj), project(attention.k_proj), project(attention.v_proj)
    joined = reference([q, k, v], mask, causal)[0].permute(0, 2, 1, 3).reshape(x.shape)
    output: Tensor = joined @ attention.o_proj.weight.double().T + attention.o_proj.bias.double()
    return output


def call(attention: Any, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """What the module gives for x, if it is a tensor."""
    options: dict[str, Any] = {} if mask is None else {"mask": mask}
    return is_tensor(attention(x, **options, causal=True) if causal else attention(x, **options), "forward")


# 3.1 memory. Sizes are such that blocks, not Q, K and V, are the largest tensors.

SLIM, WIDE = 3, 16  # features and block size of checks of cost, in one head
EXACT = 2e-5  # float32 against float64


def wide(subject: Subject, rng: torch.Generator, n: int, m: int, block: int = WIDE) -> tuple[Any, list[Tensor]]:
    """A float32 module of one head, and Q, K, V of batch 1."""
    seed(1)
    given = [torch.randn(1, 1, length, SLIM, generator=rng) for length in (n, m, m)]
    return subject.FlashAttention(SLIM, 1, block), given


@requirement("3.1")
@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "key_mask", "query_mask"])
def test_no_block_is_larger_than_asked_for(subject: Subject, close: Close, rng: torch.Generator, kind: str) -> None:
    """At inference nothing larger than a block of scores is made, from masks neither."""
    block, blocks = (2, (3, 3)) if kind == "plain" else (WIDE, {"key_mask": (1, 9), "query_mask": (9, 1)}.get(kind))
    n, m = (block * number for number in blocks or (3, 3))
    attention, given = wide(subject, rng, n, m, block)
    pairs = (torch.arange(n).view(1, 1, n, 1) + torch.arange(m)) % 3 != 1
    masks = {"mask": pairs.float(), "key_mask": pairs[:, :, :1], "query_mask": torch.ones(1, 1, n, 1)}
    expected = reference(given, mask=masks.get(kind), causal=kind == "causal")[0].float()

    with torch.no_grad(), Trace() as seen:
        output, _ = attend(attention, given, masks.get(kind), kind == "causal")

    close(output, expected, f"{CALL}: output", tolerance=EXACT)
    most = 8 * block**2
    assert seen.largest <= most, (
        f"{CALL}, {kind}: a tensor of {seen.largest} elements is made for N = {n}, M = {m}, block_size = {block}, "
        f"at most {most} are asked for; N·M is {n * m}, block_size·M is {block * m}\n"
        "cut queries, keys and mask into blocks of about block_size; an expanded view costs nothing, its copy does"
    )


@requirement("3.1")
def test_forward_makes_no_tensor_of_all_pairs(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """At inference the module makes no tensor of N·N elements, from its mask neither."""
    n = 3 * WIDE
    attention = wide(subject, rng, 1, 1)[0]
    x = torch.randn(1, n, SLIM, generator=rng)
    mask = torch.arange(n).view(1, 1, 1, n) % 3 != 1
    expected = standard(attention, x, mask, causal=True).detach().float()

    with torch.no_grad(), Trace() as seen:
        output = call(attention, x, mask, causal=True)

    close(output, expected, "forward", tolerance=EXACT)
    assert seen.largest < n * n, (
        f"forward, N = {n}, causal and masked: a tensor of {seen.largest} elements is made; N·N is {n * n}"
    )


@requirement("3.1")
def test_the_peak_grows_linearly(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """At inference twice the length takes about twice the memory."""
    attention = wide(subject, rng, 1, 1)[0]
    peaks = []
    for n in (2 * WIDE, 4 * WIDE):
        x = torch.randn(1, n, SLIM, generator=rng)
        expected = standard(attention, x).detach().float()
        with torch.no_grad(), Trace() as seen:
            output = call(attention, x)
        close(output, expected, "forward", tolerance=EXACT)
        peaks.append(seen.peak_bytes)

    assert peaks[1] < 2.2 * peaks[0], (
        f"forward: at most {peaks[0]} bytes are alive for N = {n // 2} and {peaks[1]} for N = {n}, "
        f"{peaks[1] / peaks[0]:.2f} times as many; less than 2.2 times are asked for\n"
        "hold one block of scores at a time, and let it go"
    )


# 3.2 numerical stability


def towards(rng: torch.Generator, offsets: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Q, K and V in which the scores with key j are offsets[j] and some noise."""
    q, k, v = inputs(rng, m=len(offsets))
    q[..., 0] = DH**0.5
    k[..., 0] = offsets
    return [q.to(dtype), k.to(dtype), v.to(dtype)]


@requirement("3.2")
def test_a_maximum_that_changes_from_block_to_block(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Scores that rise or fall from key to key give the formula's results."""
    attention = build(subject)

    for step in (2, -2, 300, -300):
        hint = f"scores change by {step} from key to key: when the maximum rises, sum and accumulator are multiplied by"
        given = towards(rng, step * torch.arange(3.0 * BLOCK))
        agree(close, attention, given, hint=f"{hint} exp(old - new)")


@requirement("3.2")
@pytest.mark.parametrize(
    ("dtype", "factor", "tolerance"),
    [(torch.float64, 400, 1e-9), (torch.float32, 40, 1e-3)],
    ids=["float64", "float32"],
)
def test_large_logits(
    subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype, factor: int, tolerance: float
) -> None:
    """Logits of hundreds in float32 and thousands in float64, of both signs, give the formula's results."""
    q, k, v = inputs(rng, dtype=dtype)

    hint = f"logits times {factor}: subtract the running maximum before the exponential"
    agree(close, build(subject, dtype=dtype), [factor * q, k, v], hint=hint, tolerance=tolerance)


@requirement("3.2")
def test_scores_that_are_all_far_from_zero(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Scores that all lie around -100000, or 100000, give the formula's results."""
    attention = build(subject)

    for offset in (-1e5, 1e5):
        hint = f"all scores are about {offset:g}: the maximum starts below any score"
        agree(close, attention, towards(rng, torch.full((N,), offset)), hint=hint)


@requirement("3.2")
def test_a_masked_block(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A block in which a row may attend to nothing, before, between or after others, leaves the row right."""
    given, attention = inputs(rng, m=3 * BLOCK), build(subject)

    for number, where in enumerate(("first", "middle", "last")):
        mask = some_mask((B, 1, N, 3 * BLOCK), rng)
        mask[0, 0, 2:, number * BLOCK : (number + 1) * BLOCK] = False
        hint = (
            f"for some rows the {where} block is masked: there -inf - -inf must not become NaN, nor a masked key have"
        )
        agree(close, attention, given, mask, hint=f"{hint} weight")


@requirement("3.2")
def test_a_row_that_may_attend_to_nothing(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """It has output 0 and logsumexp -inf; the others are right."""
    given, attention = inputs(rng), build(subject)

    for shape in ((B, 1, N, N), (B, 1, N, 1), (B, H, 1, 1)):
        mask = some_mask(shape, rng)
        mask[0, 0, -1] = False
        mask[1, 0, 0] = False
        hint = "a row that may attend to nothing has output 0 and logsumexp -inf: its sum is 0"
        agree(close, attention, given, mask, hint=f"a mask of shape {shape}: {hint}")


@requirement("3.2")
def test_nothing_may_be_attended_to(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """With a mask that allows nothing at all every output is 0 and every logsumexp -inf."""
    given, attention = inputs(rng), build(subject)

    for causal in (False, True):
        hint = f"the mask allows nothing at all, causal = {causal}: output 0, logsumexp -inf"
        agree(close, attention, given, torch.zeros(1, 1, 1, N, dtype=torch.bool), causal, hint=hint)


@requirement("3.2")
def test_causal_queries_before_the_first_key(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """With more queries than keys, the first causal ones may attend to nothing."""
    n = 3 * BLOCK
    given = inputs(rng, n, BLOCK)
    expected, _ = reference(given, causal=True)

    output, logsumexp = attend(build(subject), given, causal=True)

    assert output.shape == expected.shape, f"{CALL}: output of shape {tuple(output.shape)} came"
    if not torch.allclose(output[:, :, -BLOCK:].double(), expected[:, :, -BLOCK:]):
        return  # The queries and keys are not aligned; 3.3 says so.
    hint = f"query i sees the keys j <= i + M - N: with N = {n} and M = {BLOCK} the first {n - BLOCK} see none"
    close(output, expected, f"{CALL}, causal: output", hint=hint)
    close(logsumexp[:, :, :-BLOCK].double(), torch.full((B, H, n - BLOCK), -INF, dtype=torch.float64),
          f"{CALL}, causal: logsumexp of the first {n - BLOCK} queries", hint=hint)  # fmt: skip


@requirement("3.2")
@pytest.mark.parametrize("kind", ["some_rows", "all_rows", "causal"])
def test_gradients_of_rows_that_may_attend_to_nothing(subject: Subject, rng: torch.Generator, kind: str) -> None:
    """A row that may attend to nothing sends no NaN back; neither it nor a key that nobody sees gets a gradient."""
    n, m = (9, 6) if kind == "causal" else (N, N)
    given = [x.requires_grad_() for x in inputs(rng, n, m)]
    mask = None if kind == "causal" else some_mask((B, 1, N, N), rng) & (kind == "some_rows")
    if mask is not None:
        mask[0, 0, 3] = mask[1, 0, :BLOCK] = mask[..., 5:] = False

    output, _ = attend(build(subject), given, mask, kind == "causal")
    if not output.requires_grad:
        return  # 3.6 says so.
    grads = torch.autograd.grad(output.square().sum() + output.sum(), given)

    for name, grad in zip("QKV", grads, strict=True):
        assert grad.isfinite().all(), (
            f"backward, {kind} may attend to nothing: the gradient of {name} is not finite\n"
            "the logsumexp of such a row is -inf: -inf - -inf must not become NaN"
        )
    if mask is not None:
        hidden = ~mask.any(-1).expand(B, H, N)
        assert not grads[0][hidden].any(), "backward: rows of Q that may attend to nothing get a gradient"
        assert not grads[1][:, :, 5:].any(), "backward: rows of K that no query sees get a gradient"
        assert not grads[2][:, :, 5:].any(), "backward: rows of V that no query sees get a gradient"


@requirement("3.2")
def test_gradients_of_large_scores_are_finite(subject: Subject, rng: torch.Generator) -> None:
    """Scores around 2000 overflow nothing in backward."""
    attention = build(subject)

    for offset in (-2000.0, 2000.0):
        given = [x.requires_grad_() for x in towards(rng, torch.full((N,), offset))]
        output, _ = attend(attention, given)
        if not output.requires_grad:
            return  # 3.6 says so.
        grads = torch.autograd.grad(output.square().sum(), given)
        for name, grad in zip("QKV", grads, strict=True):
            assert grad.isfinite().all(), (
                f"backward, scores about {offset:g}: the gradient of {name} is not finite\n"
                "P = exp(S - logsumexp), in one step"
            )


@requirement("3.2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_padded_keys_change_nothing(subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Masked keys give what their absence gives, even with values of 1e6."""
    q, k, v = inputs(rng, m=3 * BLOCK, dtype=dtype)
    kept = BLOCK + 1
    mask = (torch.arange(3 * BLOCK) < kept).view(1, 1, 1, -1)
    expected = reference([q, k[:, :, :kept], v[:, :, :kept]])[0].to(dtype)
    k[:, :, kept:] = v[:, :, kept:] = 1e6

    output, _ = attend(build(subject, dtype=dtype), [q, k, v], mask)

    close(output, expected, f"{CALL}: output", tolerance=EXACT if dtype == torch.float32 else None,
          hint="masked keys hold 1e6 and reach the output: make their scores -inf before the maximum")  # fmt: skip


# 3.3 lengths


@requirement("3.3")
def test_any_lengths(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Any numbers of queries and keys give the formula's results."""
    attention = build(subject)

    for n, m in ((1, 1), (1, 3), (3, 1), (2, 3), (4, 5), (5, 4), (9, 14), (14, 9), (1, 11), (11, 1)):
        hint = f"N = {n}, M = {m}, block_size = {BLOCK}: the last block may be smaller, and N and M are unrelated"
        agree(close, attention, inputs(rng, n, m), hint=hint)


@requirement("3.3")
def test_any_block_size(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Blocks of any size give the formula's results, causal or not."""
    given = inputs(rng, 4, 6)

    for block_size in (1, 2, 3, 7, 64):
        attention = build(subject, block_size)
        for causal in (False, True):
            hint = f"N = 4, M = 6, block_size = {block_size}, causal = {causal}: j <= i + M - N"
            agree(close, attention, given, causal=causal, hint=hint)


@requirement("3.3")
def test_causal_aligns_the_last_query_with_the_last_key(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """With more keys than queries, query i sees the keys up to i + M - N."""
    attention = build(subject)

    for n, m in ((3, 7), (8, 12), (1, 6), (5, 18)):
        hint = f"N = {n}, M = {m}: query i sees the keys j <= i + M - N, so the last query sees all"
        agree(close, attention, inputs(rng, n, m), causal=True, hint=hint)


@requirement("3.3")
def test_causal_with_more_queries_than_keys(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The last M queries see 1, 2, … M keys."""
    attention = build(subject)

    for n, m in ((8, 5), (9, 4)):
        given = inputs(rng, n, m)
        actual, expected = attend(attention, given, causal=True), reference(given, causal=True)
        hint = f"N = {n}, M = {m}: query i sees the keys j <= i + M - N, so the last query sees all"
        for came, wanted, name in zip(actual, expected, ("output", "logsumexp"), strict=True):
            assert came.shape == wanted.shape, f"{CALL}: {name} of shape {tuple(came.shape)} came"
            last = slice(n - m, n)
            close(came[:, :, last].double(), wanted[:, :, last], f"{CALL}: {name} of the last {m} queries", hint=hint)


@requirement("3.3")
def test_masks_at_any_lengths(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A mask is cut where the blocks are, and may be combined with causal."""
    attention = build(subject)

    for n, m in ((7, 10), (6, 3), (1, 3)):
        given = inputs(rng, n, m)
        for shape in ((B, H, n, m), (B, 1, 1, m), (1, 1, n, m)):
            causal = shape[1] == 1 and m > n
            hint = f"N = {n}, M = {m}, a mask of shape {shape}, block_size = {BLOCK}, causal = {causal}"
            agree(close, attention, given, some_mask(shape, rng), causal, hint=hint)


@requirement("3.3")
def test_one_module_serves_lengths_in_any_order(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A call leaves nothing behind that changes the next one, nor do later calls change what earlier ones gave."""
    attention = build(subject)

    for n in (9, 1, 9):
        x, given = torch.randn(B, n, D, generator=rng, dtype=torch.float64), inputs(rng, n, n)
        kinds: list[tuple[Tensor | None, bool]] = [(None, False), (None, True)]
        kinds += [(some_mask((B, 1, 1, n), rng), False) for _ in range(2)]
        hint = f"with N = {n}, plain, causal and with two masks in turn, after other lengths"
        with torch.no_grad():
            outputs = [attend(attention, given, *kind) for kind in kinds]
            agree(close, attention, given, hint=hint)
        for output, kind in zip(outputs, kinds, strict=True):
            for came, wanted in zip(output, reference(given, *kind), strict=True):
                close(came.double(), wanted, f"{CALL}, when later calls have been made", hint=hint)
        for causal in (False, True):
            close(
                call(attention, x, causal=causal), standard(attention, x, causal=causal).detach(), "forward", hint=hint
            )


# 3.4 standard attention's results and weights


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
    hints = {(1, 1): "softmax(Q Kᵀ / √Dh) V", (1, 3): "a block's sum and accumulator refer to its own maximum"}

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

    close(output, expected, f"{CALL}, causal = {causal}: output")


@requirement("3.4")
def test_every_mask_dtype(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Boolean and 0/1 masks of every dtype mean the same."""
    given, attention = inputs(rng), build(subject)

    for dtype in MASK_DTYPES:
        mask = some_mask((B, 1, N, N), rng).to(dtype)
        agree(close, attention, given, mask, hint=f"a mask of {dtype}: true or 1 means may attend")


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

    for causal, dtype in ((False, torch.float64), (True, torch.bool)):
        given = [*inputs(rng), some_mask((B, H, N, N), rng).to(dtype)]
        before = [x.clone() for x in given]
        attend(attention, given[:3], given[3], causal)
        for name, x, kept in zip(("Q", "K", "V", "mask"), given, before, strict=True):
            close(x, kept, f"{name} after {CALL}", tolerance=0, hint="an input is written to")
        agree(close, attention, given[:3], given[3], causal)


@requirement("3.4")
def test_strided_inputs(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Views of one storage, transposed and expanded ones too, are as good as copies."""
    base = torch.randn(3, N, B, H, DH, generator=rng, dtype=torch.float64).permute(0, 2, 3, 1, 4)
    row = torch.randn(1, 1, N, DH, generator=rng, dtype=torch.float64).expand(B, H, N, DH)
    mask = some_mask((B, H, N, N), rng).mT.contiguous().mT
    attention = build(subject)

    agree(close, attention, list(base), mask, hint="Q, K and V are transposed views here")
    agree(close, attention, [base[0], row, base[1].flip(-1)], hint="K is an expanded view here")
    agree(close, attention, [row, row, row], hint="Q, K and V are one tensor here")


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
            close(call(attention, x, mask, causal), expected, what, hint=hint)


@requirement("3.4")
def test_arguments_may_be_given_by_position(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """mask and causal are the arguments after Q, K, V and after x."""
    given, x = inputs(rng), torch.randn(B, N, D, generator=rng, dtype=torch.float64)
    mask = some_mask((B, 1, 1, N), rng)
    attention = build(subject)

    close(attention.flash_attention_forward(*given, mask, True)[0], reference(given, mask=mask, causal=True)[0],
          f"{CALL}(Q, K, V, mask, True): output")  # fmt: skip
    close(attention(x, mask, True), standard(attention, x, mask, True).detach(), "forward(x, mask, True)")
    close(attention(x, None), standard(attention, x).detach(), "forward(x, None)")


@requirement("3.4")
def test_forward_takes_every_mask(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """forward takes a mask with any of its sizes 1."""
    x = torch.randn(B, N, D, generator=rng, dtype=torch.float64)
    attention = build(subject)

    for shape in ((1, H, 1, N), (B, 1, N, 1), (1, 1, 1, 1), (B, H, N, N)):
        mask = some_mask(shape, rng).int()
        expected = standard(attention, x, mask).detach()
        close(call(attention, x, mask), expected, "forward", hint=f"a mask of shape {shape}, int32")


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
        close(
            output[row : row + 1], expected[row], f"{CALL}: output", hint=f"batch row {row} alone gives something else"
        )


@requirement("3.4")
def test_new_weights_count_at_once(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A call after the weights have changed, in place, by loading or by replacing a layer, uses the new ones."""
    x = torch.randn(B, N, D, generator=rng, dtype=torch.float64)
    attention = build(subject)
    call(attention, x)

    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.mul_(-0.7)
    close(call(attention, x), standard(attention, x).detach(), "forward", hint="the weights were changed in place")
    attention.load_state_dict({name: value * 1.3 for name, value in attention.state_dict().items()})
    close(call(attention, x), standard(attention, x).detach(), "forward", hint="the weights were loaded anew")
    attention.k_proj = nn.Linear(D, D, bias=False, dtype=torch.float64)
    close(call(attention, x), standard(attention, x).detach(), "forward", hint="k_proj was replaced")


@requirement("3.4")
def test_a_module_may_be_cast_between_calls(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """After .float() and .double() each call works in the new dtype, with its precision."""
    x = torch.randn(B, N, D, generator=rng, dtype=torch.float64)
    attention = build(subject)
    call(attention, x)

    attention.float()
    close(call(attention, x.float()), standard(attention, x).detach().float(), "forward in float32", tolerance=EXACT)
    attention.double()
    close(call(attention, x), standard(attention, x).detach(), "forward in float64 after a call in float32")


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
    close(call(attention, x, causal=True), expected, "forward")
    try:
        with torch.no_grad(), _Elsewhere():
            agree(close, attention, given, mask, causal=True, hint=hint)
            output = call(attention, x, causal=True)
        close(output, expected, "forward", hint=hint)
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
    assert output.device.type == "meta", f"forward on another device: the output is on {output.device}"


# 3.5 work

# Whatever computes an exponential per element. An implementation that uses none of them is judged by all its elements.
EXPONENTIALS = ("exp", "exp_", "exp2", "exp2_", "expm1", "expm1_", "_softmax", "_safe_softmax", "_log_softmax")
PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "addbmm", "addbmm_", "mv", "addmv", "dot")


class _Elements(DispatchMode):
    """How many elements each operation gave, and which products were of half precision: a Trace that is lighter."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()
        self.half_products: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if isinstance(result, Tensor):
            self.of[name] += result.numel()
            if name in PRODUCTS and any(isinstance(x, Tensor) and x.dtype in HALVES for x in args):
                self.half_products.add(name)
        return result


def exponentials(close: Close, attention: Any, given: list[Tensor], causal: bool) -> tuple[int, int]:
    """How many exponentials, and how many elements at all, flash_attention_forward computes at inference."""
    expected = reference(given, causal=causal)[0].float()
    with torch.no_grad(), _Elements() as seen:
        output, _ = attend(attention, given, causal=causal)
    close(output, expected, f"{CALL}, causal = {causal}: output", tolerance=EXACT)
    return sum(seen.of[name] for name in EXPONENTIALS), seen.of.total()


@requirement("3.5")
def test_causal_computes_fewer_exponentials(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Over 16 by 16 blocks, causal attention computes at most 0.65 of the exponentials of full attention."""
    n = 16
    attention, (q, k, v) = wide(subject, rng, n, n, block=1)
    one_query = exponentials(close, attention, [q[:, :, :1], k, v], causal=False)

    causal = exponentials(close, attention, [q, k, v], causal=True)

    index = 0 if one_query[0] >= n else 1
    share = causal[index] / (n * one_query[index])
    assert share <= 0.65, (
        f"{CALL} over {n}·{n} blocks: causal computes {share:.2f} of the exponentials of full attention, at most 0.65 "
        "are asked for\nleave out the blocks in which no query may see a key"
    )


@requirement("3.5")
def test_operations_grow_with_block_pairs(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A larger block takes no more operations; twice the blocks on both sides take at most four times as many."""

    def operations(n: int, block: int) -> int:
        attention, given = wide(subject, rng, n, n, block)
        expected = reference(given)[0].float()
        with torch.no_grad(), Trace() as seen:
            output, _ = attend(attention, given)
        close(output, expected, f"{CALL}: output", tolerance=EXACT)
        return int(seen.operations.total())

    small, large = operations(4, 4), operations(16, 16)
    assert large <= 1.5 * small, (
        f"{CALL}: {small} operations for N = M = block_size = 4, {large} for N = M = block_size = 16, one block each\n"
        "compute a block by operations on the whole block, not by a loop over its rows"
    )
    few, many = operations(2 * BLOCK, BLOCK), operations(4 * BLOCK, BLOCK)
    assert many <= 4.4 * few, (
        f"{CALL}: {few} operations for 2·2 blocks, {many} for 4·4 blocks, {many / few:.1f} times as many; at most 4.4 "
        "times are asked for\nvisit each pair of blocks once"
    )


# 3.6 training


def gradients(
    close: Close,
    attention: Any,
    given: list[Tensor],
    mask: Tensor | None = None,
    causal: bool = False,
    hint: str = "",
) -> None:
    """The gradients of Q, K and V equal those of the formula."""
    leaves = [[x.detach().clone().requires_grad_() for x in given] for _ in range(2)]
    probe = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(3), dtype=given[0].dtype)
    expected, _ = reference(leaves[0], mask=mask, causal=causal)
    expected.backward(probe)

    output, _ = attend(attention, leaves[1], mask, causal)

    assert output.requires_grad, f"{CALL}: Q, K and V require gradients, the output does not"
    assert output.shape == probe.shape, f"{CALL}: output of shape {tuple(output.shape)} came"
    output.backward(probe)
    for name, formula in zip("VQK", (2, 0, 1), strict=True):
        wanted, came = leaves[0][formula].grad, leaves[1][formula].grad
        assert wanted is not None, "the check's own set-up holds"
        formulas = {"V": "dV = Pᵀ dO", "Q": "dQ = dS K / √Dh", "K": "dK = dSᵀ Q / √Dh"}
        close(
            came,
            wanted,
            f"backward: gradient of {name}",
            hint=f"{formulas[name]}, {ratio(came, wanted)}\n{hint}".strip(),
        )


def ratio(came: Tensor | None, wanted: Tensor) -> str:
    """By which factor a gradient is off, if it is one factor."""
    if came is None or came.shape != wanted.shape or not wanted.any():
        return "P = exp(S - logsumexp), dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O))"
    factor = float((came.to(wanted) * wanted).sum() / wanted.square().sum())
    if torch.allclose(came.to(wanted), factor * wanted, atol=1e-6):
        return f"it is {factor:.4g} times what is wanted"
    return "P = exp(S - logsumexp), dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O))"


@halfway
@requirement("3.6")
def test_gradients_by_hand(subject: Subject, close: Close) -> None:
    """Weights 3/4 and 1/4, values 4 and 8, dO = 1: dV = (3/4, 1/4), dS = (-3/4, 3/4), dQ = -3/4 log 3, dK = dS."""
    q, k, v = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 1.0]).log(), torch.tensor([4.0, 8.0])
    given = [x.view(1, 1, 2, 1).requires_grad_() for x in (q, k, v)]

    output, _ = attend(subject.FlashAttention(1, 1, 2), given)
    assert output.requires_grad, f"{CALL}: Q, K and V require gradients, the output does not"
    output.backward(torch.tensor([1.0, 0.0]).view(1, 1, 2, 1))

    expected = {"V": (0.75, 0.25), "K": (-0.75, 0.75), "Q": (-0.75 * math.log(3), 0.0)}
    for name, numbers in expected.items():
        what = f"backward, Q = (1, 0), K = (log 3, 0), V = (4, 8), dO = (1, 0): gradient of {name}"
        close(given["QKV".index(name)].grad, torch.tensor(numbers).view(1, 1, 2, 1), what, tolerance=1e-5,
              hint="first row: P = (3/4, 1/4), dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O)) = (-3/4, 3/4)")  # fmt: skip


@requirement("3.6")
def test_gradients(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The gradients of Q, K and V equal the formula's, in one block and in several."""
    attention = build(subject)

    for blocks in (1, 3):
        given = inputs(rng, blocks * BLOCK, blocks * BLOCK)
        gradients(close, attention, given, hint=f"in {blocks}·{blocks} blocks")


@requirement("3.6")
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_gradients_with_masks_and_causal(subject: Subject, close: Close, rng: torch.Generator, masked: bool) -> None:
    """So they do with causal, with a mask, and with both, whatever the mask's dtype."""
    given = inputs(rng)

    for causal, dtype in (
        ((False, torch.int32), (True, torch.bool), (True, torch.float32)) if masked else ((True, None),)
    ):
        mask = some_mask((B, H, N, N), rng).to(dtype) if masked else None
        hint = f"causal = {causal}, {f'a mask of {dtype}' if masked else 'no mask'}"
        gradients(close, build(subject), given, mask, causal, hint=hint)


@requirement("3.6")
def test_gradients_at_any_lengths(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """So they do at lengths that fill no whole blocks, wherever the output is right."""
    attention = build(subject)

    for n, m, causal in ((6, 11, False), (6, 11, True), (9, 5, False), (9, 5, True), (1, 3, False)):
        given = inputs(rng, n, m)
        output, expected = attend(attention, given, causal=causal)[0], reference(given, causal=causal)[0]
        if output.shape != expected.shape or not torch.allclose(output.double(), expected):
            continue  # The output is wrong; 3.3 says so.
        hint = f"N = {n}, M = {m}, block_size = {BLOCK}, causal = {causal}"
        gradients(close, attention, given, causal=causal, hint=hint)


@requirement("3.6")
def test_gradients_of_a_strided_output(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """An expanded or transposed gradient of the output is as good as a copy, and is not written to."""
    given, attention = [x.requires_grad_() for x in inputs(rng)], build(subject)
    transposed = torch.randn(B, N, H, DH, generator=rng, dtype=torch.float64).transpose(1, 2)
    expanded = torch.randn(1, 1, 1, 1, generator=rng, dtype=torch.float64).expand(B, H, N, DH)

    for kind, probe in (("transposed", transposed), ("expanded", expanded)):
        kept, expected = probe.clone(), torch.autograd.grad(reference(given)[0], given, probe)
        came = torch.autograd.grad(attend(attention, given)[0], given, probe)
        close(probe, kept, "the gradient of the output after backward", tolerance=0, hint="backward writes to it")
        for index, name in enumerate("QKV"):
            close(came[index], expected[index], f"backward: gradient of {name}", hint=f"dO is an {kind} view")


@requirement("3.6")
def test_one_input_may_be_trained_alone(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """If one of Q, K and V alone requires a gradient, it gets it."""
    given = inputs(rng)
    probe = torch.randn(B, H, N, DH, generator=rng, dtype=torch.float64)

    for index, name in enumerate("QKV"):
        alone = [x.clone().requires_grad_(which == index) for which, x in enumerate(given)]
        expected = torch.autograd.grad(reference(alone)[0], alone[index], probe)[0]
        output, _ = attend(build(subject), alone)
        assert output.requires_grad, f"{CALL}: {name} requires a gradient, the output does not"
        close(torch.autograd.grad(output, alone[index], probe)[0], expected, f"backward: gradient of {name} alone")


@requirement("3.6")
def test_backward_may_run_twice(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A second backward through the same output, and one after another call, give the right gradients again."""
    given = [x.requires_grad_() for x in inputs(rng)]
    probe = torch.randn(B, H, N, DH, generator=rng, dtype=torch.float64)
    expected = torch.autograd.grad(reference(given)[0], given, probe)
    attention = build(subject)

    output, _ = attend(attention, given)
    attend(attention, [2 * x for x in given])
    first = torch.autograd.grad(output, given, probe, retain_graph=True)
    second = torch.autograd.grad(output, given, probe)

    for index, name in enumerate("QKV"):
        close(first[index], expected[index], f"backward after another call: gradient of {name}",
              hint="what backward needs belongs to the call, not to the module")  # fmt: skip
        close(second[index], expected[index], f"second backward: gradient of {name}",
              hint="backward changes what forward saved for it")  # fmt: skip


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
        close(tensor.grad, wanted, f"backward: gradient of {name}")


@requirement("3.6")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_little_stays_alive_after_forward(
    subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype
) -> None:
    """What forward leaves for backward is at most 1.5 times (Q, K, V, output, logsumexp)."""
    n = 3 * WIDE
    attention, given = wide(subject, rng, n, n)
    given = [x.to(dtype).requires_grad_() for x in given]
    expected = reference(given)[0].detach().float()

    with Trace() as seen:
        output, logsumexp = attend(attention.to(dtype), given)
        kept = seen.alive_bytes

    close(output.float(), expected, f"{CALL}: output", tolerance=EXACT if dtype == torch.float32 else 5e-2)
    assert output.requires_grad, f"{CALL}: the output carries no gradient"
    unit = sum(x.numel() * x.element_size() for x in (*given, output, logsumexp))
    assert kept <= 1.5 * unit, (
        f"{CALL} in {dtype}: {kept} bytes stay alive for backward, {kept / unit:.1f} times (Q, K, V, output, "
        "logsumexp); at most 1.5 times is asked for\n"
        "keep no block of weights, not on ctx either: backward computes them anew"
    )


@requirement("3.6")
@pytest.mark.parametrize(("causal", "lengths"), [(False, (2, 4)), (True, (3,))], ids=["plain", "causal_mask"])
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
            close(x.grad, wanted, f"backward: gradient of {name}", tolerance=EXACT)
        peaks.append(seen.peak_bytes)

    assert seen.largest < n * n, f"backward, N = M = {n}: a tensor of {seen.largest} elements is made; N·M is {n * n}"
    assert peaks[-1] < 2.2 * peaks[0], (
        f"forward and backward: at most {peaks[0]} bytes are alive for N = {n // 2} and {peaks[-1]} for N = {n}, "
        f"{peaks[-1] / peaks[0]:.2f} times as many; less than 2.2 times are asked for\n"
        "compute each block of weights anew in backward, use it, and let it go"
    )


# 3.7 half precision


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

    assert output.dtype == dtype, f"{CALL} in {dtype}: the output has {output.dtype}"
    assert output.shape == exact.shape, f"{CALL}: output of shape {tuple(output.shape)} came"
    ours = worst(output, exact)
    assert ours <= 2 * theirs, (
        f"{CALL} in {dtype}: the output's largest error is {ours:.2g}, {ours / theirs:.1f} times that of "
        f"F.scaled_dot_product_attention, {theirs:.2g}; at most 2 times is asked for\n"
        "convert each block to float32 before scaling and multiplying it; keep scores, sum and accumulator in float32"
    )
    assert logsumexp.dtype in (torch.float32, torch.float64), (
        f"{CALL} in {dtype}: logsumexp has {logsumexp.dtype}, float32 or better was wanted"
    )
    assert logsumexp.shape == exact_logsumexp.shape, f"{CALL}: logsumexp of shape {tuple(logsumexp.shape)} came"
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

    with _Elements() as seen:
        came = torch.autograd.grad(attend(build(subject, dtype=dtype), given, causal=causal)[0], given, probe)

    assert not seen.half_products, (
        f"{CALL} and backward in {dtype}: {', '.join(sorted(seen.half_products))} multiplies in half precision\n"
        "convert each block to float32 before its product"
    )
    for index, name in enumerate("QKV"):
        close(came[index], expected[index], f"backward in {dtype}: gradient of {name}", tolerance=5e-2)


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


# 3.8 the benchmark

SIZES = (15, 3)  # d_model and num_heads; scores are the largest tensors from N = 64 on
KEYS = ("seq_len", "standard_seconds", "flash_seconds", "standard_peak_bytes", "flash_peak_bytes", "max_abs_error")


def benchmark(subject: Subject, *arguments: Any) -> list[dict[str, Any]]:
    """The rows of benchmark_attention, if they are such."""
    rows = subject.benchmark_attention(*arguments)
    what = f"benchmark_attention{arguments if len(arguments) > 1 else f'({arguments[0]})'}"
    assert isinstance(rows, list), f"{what}: a {type(rows).__name__} came, a list of rows was wanted"
    assert len(rows) == len(arguments[0]), f"{what}: {len(rows)} rows came for {len(arguments[0])} lengths"
    for row in rows:
        assert isinstance(row, dict), f"{what}: a row is a {type(row).__name__}, a dict was wanted"
        for key in KEYS:
            assert key in row, f"{what}: a row lacks {key}; it has {list(row)}"
            assert type(row[key]) in (int, float), f"{what}: {key} is a {type(row[key]).__name__}, not a Python number"
    return rows


def module_peak(subject: Subject, n: int, d_model: int, heads: int, mode: Any = torch.no_grad) -> int:
    """Peak bytes of a call of FlashAttention on an x of length n."""
    attention, x = subject.FlashAttention(d_model, heads), torch.ones(1, n, d_model)
    with mode(), Trace() as seen:
        attention(x)
    return int(seen.peak_bytes)


def peak_is_right(subject: Subject, row: dict[str, Any], d_model: int, heads: int) -> None:
    """A row's flash_peak_bytes is within 20 % of what the probe sees, without gradients or in inference mode."""
    n, came = row["seq_len"], row["flash_peak_bytes"]
    seen = module_peak(subject, n, d_model, heads)
    if abs(came - seen) > 0.2 * seen:
        in_inference_mode = module_peak(subject, n, d_model, heads, torch.inference_mode)
        assert abs(came - in_inference_mode) <= 0.2 * in_inference_mode, (
            f"benchmark_attention, N = {n}: flash_peak_bytes is {came}, a call of FlashAttention with the default "
            f"block size takes {seen}\nmeasure one call, on an x that is there before, without gradients"
        )


@dataclass
class Flash:
    """One call of FlashAttention: its module, x's shape and standard deviation, output, how long it took, if traced."""

    module: Any
    shape: tuple[int, ...]
    spread: float
    output: Tensor
    traced: bool
    seconds: float = 0.0


def watch(subject: Subject, monkeypatch: pytest.MonkeyPatch, each: Callable[[Flash], Any]) -> list[Flash]:
    """From now on `each` is called on each call of FlashAttention, whose output it may set; returns the calls."""
    kind, called = subject.FlashAttention, list[Flash]()
    forward = kind.forward

    def watched(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        start = perf_counter()
        output = forward(self, x, *args, **kwargs)
        if type(self) is not kind:
            return output
        traced = _get_current_dispatch_mode() is not None
        call = Flash(self, tuple(x.shape), float(x.detach().std()), output, traced)
        each(call)
        call.seconds = perf_counter() - start
        called.append(call)
        return call.output

    monkeypatch.setattr(kind, "forward", watched)
    return called


@requirement("3.8")
def test_benchmark_rows(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a row per length, in order, of Python numbers: positive times, errors of rounding, measured peaks."""
    lengths = [64, 128, 64]
    said = spied(subject, monkeypatch)

    rows = benchmark(subject, lengths, *SIZES)

    came = [row["seq_len"] for row in rows]
    assert came == lengths, f"benchmark_attention({lengths}): rows for {came} came"
    times = [row[key] for row in rows for key in ("standard_seconds", "flash_seconds")]
    assert all(0 < time < 60 for time in times), f"benchmark_attention: times of {times} seconds came"
    assert len(set(times)) > 1, f"benchmark_attention: all times are {times[0]}; they are not measured"
    for row in rows:
        error_is_right(row)
        peaks_are_right(subject, row, said)


def spied(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """From now on, what the file's peak_bytes says is noted here."""
    peak_bytes, said = subject.peak_bytes, list[float]()

    def noting(function: Callable[[], Any]) -> int:
        said.append(peak_bytes(function))
        return int(said[-1])

    monkeypatch.setitem(peak_bytes.__globals__, "peak_bytes", noting)
    return said


def error_is_right(row: dict[str, Any]) -> None:
    """The two outputs differ by rounding: by something, and by less than 1e-4."""
    error, n = row["max_abs_error"], row["seq_len"]
    assert error < 1e-4, (
        f"benchmark_attention, N = {n}: max_abs_error is {error:.3g}, less than 1e-4 was wanted\n"
        "both forms take the same x and the same weights, the output projection's too"
    )
    assert error > 0 or (error == 0 and n <= 64), (
        f"benchmark_attention, N = {n}: max_abs_error is {error}; two ways of computing it differ by rounding\n"
        "compare what the two forms give"
    )


def peaks_are_right(subject: Subject, row: dict[str, Any], said: list[float]) -> None:
    """flash_peak_bytes is what the module takes; standard_peak_bytes is one to five tensors of the scores' size."""
    peak_is_right(subject, row, *SIZES)
    n, came = row["seq_len"], row["standard_peak_bytes"]
    scores = 4 * SIZES[1] * n**2
    assert scores <= came <= 5 * scores, (
        f"benchmark_attention, N = {n}: standard_peak_bytes is {came}, {came / scores:.2f} times the {scores} bytes of "
        "H·N² floats; 1 to 5 times was wanted\nstandard attention makes all scores at once"
    )
    assert not said or came in said, (
        f"benchmark_attention, N = {n}: standard_peak_bytes is {came}, which `peak_bytes` never said; it said {said}\n"
        "measure a call of the standard form"
    )


@requirement("3.8")
def test_benchmark_defaults(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sizes, d_model is 512 and num_heads is 8."""
    heads = []
    called = watch(subject, monkeypatch, lambda call: heads.append(call.module.num_heads))
    # Random weights for 512 features take longer than all the rest.
    monkeypatch.setattr(
        nn.Linear, "reset_parameters", lambda self: [nn.init.constant_(p, 0.01) for p in self.parameters()]
    )

    benchmark(subject, (4,))

    came = {call.shape for call in called}
    assert (1, 4, 512) in came, (
        f"benchmark_attention((4,)): FlashAttention gets x of shapes {came}, [1, N, 512] was wanted"
    )
    assert set(heads) == {8}, f"benchmark_attention((4,)): FlashAttention has {set(heads)} heads, 8 was wanted"


@requirement("3.8")
def test_max_abs_error_is_the_largest_difference(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one value of the flash output off by 1 or -1, and another one by half of it, max_abs_error is 1."""
    signs = {64: 1, 128: -1}

    def spoil(call: Flash) -> None:
        sign = signs[call.shape[1]]
        call.output = call.output.clone()
        call.output[0, -1, 0] += sign
        call.output[0, 0, 2] -= 0.5 * sign

    called = watch(subject, monkeypatch, spoil)
    try:
        rows = benchmark(subject, list(signs), *SIZES)
    except AssertionError as error:
        if str(error).startswith("benchmark_attention"):
            raise
        return  # A benchmark may itself insist that the outputs agree.

    assert called, "benchmark_attention: no FlashAttention is called"
    for row, sign in zip(rows, signs.values(), strict=True):
        assert abs(row["max_abs_error"] - 1) < 1e-3, (
            f"benchmark_attention: with one flash output off by {sign} and another one by {-0.5 * sign}, "
            f"max_abs_error is {row['max_abs_error']:.3g}, not 1\n"
            "it is the largest absolute difference between the two outputs"
        )


@requirement("3.8")
def test_seconds_are_those_of_the_call(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """If flash calls take 1 ms more, flash_seconds says so, standard_seconds does not, and they are of one call."""

    def delay(call: Flash) -> None:
        start = process_time()
        while process_time() < start + 1e-3:  # CPU time: less than what any clock says.
            pass

    called = watch(subject, monkeypatch, delay)
    for _ in range(12):  # A busy machine may interrupt what takes 0.1 ms, too: not twelve times.
        called.clear()
        row = benchmark(subject, [32], *SIZES)[0]
        flash, plain = row["flash_seconds"], row["standard_seconds"]
        longest = max((call.seconds for call in called if not call.traced), default=0.0)
        if plain < 1e-3 <= flash < 1.5 * longest or flash < 1e-3:
            break

    came = {call.shape for call in called}
    assert (1, 32, SIZES[0]) in came, f"benchmark_attention([32], {SIZES[0]}, {SIZES[1]}): x of shapes {came} came"
    assert flash >= 1e-3, (
        f"benchmark_attention: a call of FlashAttention takes over 0.001 s, flash_seconds is {flash:.3g}\n"
        "it is the time of one call of the flash module, in seconds"
    )
    assert flash < 1.5 * longest, (
        f"benchmark_attention: calls of FlashAttention take at most {longest:.3g} s, flash_seconds is {flash:.3g}\n"
        "times are those of one call, in seconds"
    )
    assert plain < 1e-3, (
        f"benchmark_attention: calls of FlashAttention take over 0.001 s, standard_seconds is {plain:.3g}\n"
        "it is the time of one call of the standard form, in seconds"
    )
    assert not any(call.output.requires_grad for call in called), (
        "benchmark_attention: gradients are recorded; it measures inference"
    )
    assert called[-1].spread > 1e-3, (
        f"benchmark_attention: x has a standard deviation of {called[-1].spread:.3g}; a random x was wanted"
    )


# 3.9 from scratch


@requirement("3.9")
def test_forward_reaches_no_prebuilt_attention(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """flash_attention_forward, forward and training give the right values while every prebuilt attention raises."""
    given = inputs(rng)
    x = torch.randn(B, N, D, generator=rng, dtype=torch.float64)
    mask = some_mask((B, 1, 1, N), rng)
    attention = build(subject)
    expected = standard(attention, x, mask, causal=True).detach()
    trained = [x.clone().requires_grad_() for x in given]

    with forbid(prebuilt_attention(), f"{CALL}, forward or backward"):
        with torch.no_grad():
            for kinds in ((None, False), (None, True), (mask, False)):
                agree(close, attention, given, *kinds)
            close(call(attention, x, mask, causal=True), expected, "forward")
            half = [x.bfloat16() for x in given]
            output, _ = attend(build(subject, dtype=torch.bfloat16), half)
            close(output.double(), reference(half)[0], f"{CALL}: output", tolerance=5e-2)
        output, _ = attend(attention, trained)
        if output.requires_grad:
            torch.autograd.grad(output.sum(), trained, allow_unused=True)

    close(output, reference(given)[0], f"{CALL} in training: output")


@requirement("3.9")
def test_the_benchmark_reaches_no_prebuilt_attention(subject: Subject) -> None:
    """The benchmark's standard form is written by hand too."""
    with forbid(prebuilt_attention(), "benchmark_attention"):
        rows = subject.benchmark_attention([16], *SIZES)

    assert rows, "benchmark_attention([16]): no row came"


# 3.10

test_ruff_finds_nothing, test_mypy_finds_nothing = style_checks("3.10")
