"""Numerical stability (3.2): extreme scores, masked blocks and rows; lengths (3.3): any N, M and block_size."""

import pytest
import torch
from torch import Tensor

from harness.testing import Close, Subject, requirement

from .reference import (
    ABOUT,
    BLOCK,
    CALL,
    DH,
    EXACT,
    INF,
    NEAR,
    B,
    H,
    N,
    agree,
    attend,
    build,
    inputs,
    reference,
    some_mask,
    unwritten,
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
        agree(close, attention, given, hint=f"{hint} exp(old - new)", tolerance=ABOUT)


@requirement("3.2")
@pytest.mark.parametrize(
    ("dtype", "factor", "tolerance"),
    [(torch.float64, 400, ABOUT), (torch.float32, 40, 1e-3)],
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
    """Scores that all lie around -100000, or 100000, give the formula's results, with a mask too."""
    attention = build(subject)

    for offset, mask in ((-1e5, None), (1e5, None), (-1e5, some_mask((B, 1, N, N), rng))):
        hint = (
            f"N = M = {N}, block_size = {BLOCK}, all scores are about {offset:g}: the maximum starts below any score, "
        )
        hint += "exp(s - m) alone is in range, not exp(s) or exp(-m), and padding has no weight"
        if mask is not None:
            hint += ", and what a mask hides is -inf"
        agree(close, attention, towards(rng, torch.full((N,), offset)), mask, hint=hint, tolerance=ABOUT)


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
@pytest.mark.parametrize("scores", ["rise", "fall", "float32"])
def test_a_masked_block_far_from_zero(subject: Subject, close: Close, rng: torch.Generator, scores: str) -> None:
    """So it does when the scores there or elsewhere are far from 0, and backward too."""
    m, dtype = 3 * BLOCK, torch.float32 if scores == "float32" else torch.float64
    to = torch.linspace(-1000, 1000, m)
    attention = build(subject, dtype=dtype)

    for number in {"rise": (1, 2), "fall": (0, 1), "float32": (0, 2)}[scores]:
        offsets = {"rise": to, "fall": -to, "float32": torch.full((m,), -100.0)}[scores]
        given = [x.requires_grad_() for x in towards(rng, offsets, dtype)]
        mask = some_mask((B, 1, N, m), rng)
        mask[0, 0, 2:, number * BLOCK : (number + 1) * BLOCK] = False
        mask[1, :, :, number * BLOCK : (number + 1) * BLOCK] = False
        hint = f"scores from {float(offsets[0]):g} to {float(offsets[-1]):g}, block {number} of the keys is masked"
        hidden = f"{hint}: what is hidden has no part in the maximum"
        with unwritten(given):
            output, _ = agree(close, attention, given, mask, hint=hidden, tolerance=ABOUT)
            if not output.requires_grad:
                return  # 3.6 says so.
            for name, grad in zip("QKV", torch.autograd.grad(output.sum(), given, allow_unused=True), strict=True):
                assert grad is None or grad.isfinite().all(), (
                    f"backward: the gradient of {name} is not finite\n{hint}: hide the scores before the exponential"
                )


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
    attention = build(subject)

    for causal in (False, True):
        hint = f"the mask allows nothing at all, causal = {causal}: output 0, logsumexp -inf"
        agree(close, attention, inputs(rng), torch.zeros(1, 1, 1, N, dtype=torch.bool), causal, hint=hint)
    given, mask = inputs(rng, 1, 3), some_mask((B, 1, 1, 3), rng)
    output, expected = attend(attention, given, mask)[0], reference(given, mask)[0]
    if output.shape == expected.shape and torch.allclose(output.double(), expected):  # Else 3.3 says so.
        agree(close, attention, inputs(rng, 1, 1), torch.zeros(B, 1, 1, 1), hint="one query, one key, and it is hidden")


@requirement("3.2")
def test_causal_queries_before_the_first_key(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """With more queries than keys, the first causal ones may attend to nothing."""
    attention = build(subject)

    for n, m in ((3 * BLOCK, BLOCK), (3, 1), (2 * BLOCK + 1, 1)):
        given = inputs(rng, n, m)
        expected, _ = reference(given, causal=True)

        output, logsumexp = attend(attention, given, causal=True)

        assert output.shape == expected.shape, f"{CALL}: shape {[*output.shape]} came, {[*expected.shape]} was wanted"
        if not torch.allclose(output[:, :, -m:].double(), expected[:, :, -m:]):
            return  # The queries and keys are not aligned; 3.3 says so.
        hint = f"query i sees the keys j <= i + M - N: with N = {n} and M = {m} the first {n - m} see none"
        close(output, expected, f"{CALL}, causal: output", hint=hint, tolerance=NEAR)
        close(logsumexp[:, :, :-m].double(), torch.full((B, H, n - m), -INF, dtype=torch.float64),
              f"{CALL}, causal: logsumexp of the first {n - m} queries", hint=hint)  # fmt: skip


@requirement("3.2")
@pytest.mark.parametrize("kind", ["some_rows", "all_rows", "causal"])
def test_gradients_of_rows_that_may_attend_to_nothing(subject: Subject, rng: torch.Generator, kind: str) -> None:
    """A row that may attend to nothing sends no NaN back; neither it nor a key that nobody sees gets a gradient."""
    n, m = (9, 6) if kind == "causal" else (N, N)
    given = [x.requires_grad_() for x in inputs(rng, n, m)]
    mask = None if kind == "causal" else some_mask((B, 1, N, N), rng) & (kind == "some_rows")
    if mask is not None:
        mask[0, 0, 3] = mask[1, 0, :BLOCK] = mask[..., 5:] = False

    results = attend(build(subject), given, mask, kind == "causal")
    if not results[0].requires_grad:
        return  # 3.6 says so.
    kept = [x.detach().clone() for x in results]
    grads = torch.autograd.grad(results[0].square().sum() + results[0].sum(), given, allow_unused=True)

    rows = {"some_rows": "some rows that the mask leaves", "all_rows": "all rows, which the mask leaves"}
    what = f"backward, {rows.get(kind, f'N = {n}, M = {m}, rows that causal leaves')} no key"
    for name, grad in zip("QKV", grads, strict=True):
        assert grad is not None, f"{what}: {name} gets no gradient (None came, a tensor was wanted)"
        assert grad.isfinite().all(), (
            f"{what}: the gradient of {name} is not finite\n"
            "such a row has logsumexp = -inf: exp(S - logsumexp) is NaN there; count it 0"
        )
    for name, x, before in zip(("output", "logsumexp"), results, kept, strict=True):
        assert torch.equal(x.detach(), before), (
            f"{what}: backward changes the {name} that the call gave\n"
            "what is saved for backward is what the caller holds: change a copy of it"
        )
    if mask is not None:
        hidden = ~mask.any(-1).expand(B, H, N)
        assert not grads[0][hidden].any(), "backward: rows of Q that may attend to nothing get a gradient, 0 was wanted"
        assert not grads[1][:, :, 5:].any(), "backward: rows of K that no query sees get a gradient, 0 was wanted"
        assert not grads[2][:, :, 5:].any(), "backward: rows of V that no query sees get a gradient, 0 was wanted"


@requirement("3.2")
def test_gradients_of_large_scores_are_finite(subject: Subject, rng: torch.Generator) -> None:
    """Scores around 900000 overflow nothing in backward, and the gradient of V is as right as their size allows."""
    attention = build(subject)

    for offset in (0.0, -9e5, 9e5):
        given = [x.requires_grad_() for x in towards(rng, torch.full((N,), offset))]
        wanted = torch.autograd.grad(20 * reference(given)[0].sum(), given)
        with unwritten(given):
            output, _ = attend(attention, given)
            if not output.requires_grad:
                return  # 3.6 says so.
            grads = torch.autograd.grad(20 * output.sum(), given, allow_unused=True)
            off = [name for name, x, y in zip("QKV", grads, wanted, strict=True) if x is None or not near(x, y)]
            if off and not offset:
                return  # They are wrong near 0 too; 3.6 says so.
            for name, grad in zip("QKV", grads, strict=True):
                what = f"backward, scores about {offset:g}"
                assert grad is not None, f"{what}: {name} gets no gradient (None came, a tensor was wanted)"
                assert grad.isfinite().all(), (
                    f"{what}: the gradient of {name} is not finite\nP = exp(S - logsumexp), in one step"
                )
            assert "V" not in off, (  # What rounding leaves is much more in dQ and dK; how much, 3.7 judges.
                f"{what}: the gradient of V is wrong, which is right for scores about 0\n"
                "P = exp(S - logsumexp) sums to 1 in each row wherever the scores lie: bound the logsumexp nowhere"
            )


def near(came: Tensor, wanted: Tensor) -> bool:
    """Whether a gradient is what large scores leave of it."""
    return came.shape == wanted.shape and torch.allclose(came.double(), wanted, 0.5, 0.5)


@requirement("3.2")
@pytest.mark.parametrize(
    ("dtype", "kinds"),
    [
        (torch.float32, (torch.bool, torch.float32, torch.int32)),
        (torch.float64, (torch.float64, torch.int64)),
    ],
    ids=["float32", "float64"],
)
def test_padded_keys_change_nothing(
    subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype, kinds: tuple[torch.dtype, ...]
) -> None:
    """Masked keys give what their absence gives, even with values of 1e6, and no NaN in backward."""
    q, k, v = inputs(rng, BLOCK, 3 * BLOCK, dtype=dtype)
    kept = BLOCK + 1
    mask = (torch.arange(3 * BLOCK) < kept).view(1, 1, 1, -1)
    expected = reference([q, k[:, :, :kept], v[:, :, :kept]])[0].to(dtype)
    k[:, :, kept:] = v[:, :, kept:] = 1e6

    given, attention = [x.requires_grad_() for x in (q, k, v)], build(subject, dtype=dtype)
    for number, kind in enumerate(kinds):
        hides = (mask.expand(1, 1, BLOCK, -1) if number else mask).to(kind)  # then a row for each query
        output, _ = attend(attention, given, hides)

        what = f"{CALL}, a mask {tuple(hides.shape)} of {kind}: output"
        close(output, expected, what, tolerance=EXACT,
              hint="masked keys hold 1e6 and reach the output: make their scores -inf before the maximum")  # fmt: skip
        if not output.requires_grad:
            continue  # 3.6 says so.
        grads = torch.autograd.grad(output, given, torch.ones_like(output), allow_unused=True)
        for name, grad in zip("QKV", grads, strict=True):
            assert grad is None or grad.isfinite().all(), (
                f"backward, masked keys hold 1e6, a mask of {kind}: the gradient of {name} is not finite\n"
                "hide the scores before the exponential in backward too"
            )


# 3.3 lengths


def cut(length: int) -> str:
    """The blocks of a length: "4 + 4 + 1"."""
    return " + ".join(str(min(BLOCK, length - start)) for start in range(0, length, BLOCK))


@requirement("3.3")
def test_any_lengths(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Any numbers of queries and keys give the formula's results."""
    attention = build(subject)

    for n, m in ((1, 1), (1, 3), (3, 1), (2, 3), (4, 5), (5, 4), (9, 14), (14, 9), (1, 11), (11, 1)):
        hint = f"block_size = {BLOCK}, N = {n} in blocks of {cut(n)}, M = {m} in blocks of {cut(m)}"
        agree(close, attention, inputs(rng, n, m), hint=hint)


@requirement("3.3")
def test_any_block_size(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Blocks of any size give the formula's results, causal or not."""
    given = inputs(rng, 4, 6)

    for block_size in (1, 2, 3, 64):
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
def test_causal_with_many_keys(subject: Subject, close: Close) -> None:
    """Beyond 32768 keys too, the first of two queries does not see the last key."""
    m = 33000
    q, k, v = torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, m, 1), torch.zeros(1, 1, m, 1)
    v[:, :, -1] = m  # All weights are equal.

    output, _ = attend(subject.FlashAttention(1, 1, m), [q, k, v], causal=True)

    close(output, torch.tensor([0.0, 1.0]).view(1, 1, 2, 1), f"{CALL}, causal, N = 2, M = {m}: output",
          hint="positions are whole numbers, and int16 counts to 32767 only", tolerance=NEAR)  # fmt: skip


@requirement("3.3")
def test_causal_with_more_queries_than_keys(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The last M queries see 1, 2, … M keys."""
    attention = build(subject)

    for n, m in ((8, 5), (9, 4)):
        given = inputs(rng, n, m)
        with unwritten(given):
            actual, expected = attend(attention, given, causal=True), reference(given, causal=True)
            hint = f"N = {n}, M = {m}: query i sees the keys j <= i + M - N, so the last query sees all"
            for came, wanted, name in zip(actual, expected, ("output", "logsumexp"), strict=True):
                assert came.shape == wanted.shape, (
                    f"{CALL}: {name} shape {[*came.shape]} came, {[*wanted.shape]} was wanted"
                )
                last = slice(n - m, n)
                what = f"{CALL}: {name} of the last {m} queries"
                close(came[:, :, last].double(), wanted[:, :, last], what, hint=hint, tolerance=NEAR)


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

    for n in (6, 1, 6):
        given = inputs(rng, n, n)
        kinds: list[tuple[Tensor | None, bool]] = [(None, False), (None, True)]
        kinds += [(some_mask((B, 1, 1, n), rng), False) for _ in range(2)]
        hint = f"with N = {n}, plain, causal and with two masks in turn, after other lengths"
        with unwritten(given):
            with torch.no_grad():
                outputs = [attend(attention, given, *kind) for kind in kinds]
                agree(close, attention, given, hint=hint)
            for output, kind in zip(outputs, kinds, strict=True):
                for came, wanted in zip(output, reference(given, *kind), strict=True):
                    close(came.double(), wanted, f"{CALL}, when later calls have been made", hint=hint, tolerance=NEAR)
