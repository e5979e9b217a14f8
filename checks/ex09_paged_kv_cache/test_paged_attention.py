"""Attention over keys and values that lie in blocks (9.2)."""

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor

from harness.testing import Close, Subject, Where, also, forbid, prebuilt_attention, requirement

from .paged import Case, Writes, attended, strided
from .reference import causal, contiguous

FLOAT32 = 5e-6


def slip(case: Case, came: Tensor) -> str:
    """Which slip the output shows, if it is one of the well-known ones."""
    if came.shape != case.given["q"].shape:
        return ""
    came = came.detach().cpu().double()
    bad = [
        row for row, (mine, right) in enumerate(zip(split(case, came), split(case, case.expected()), strict=True))
        if not torch.isclose(mine, right, 1e-4, 1e-4).all()
    ]  # fmt: skip
    words = [f"sequences {bad} of {len(case.parts)} are wrong"]
    parts = [[tensor.to(case.dtype).double() for tensor in part] for part in case.parts]
    h, kv, _ = case.heads
    slips = {
        "it is what query head h gets from key-value head h % Hkv": lambda q, k, v: contiguous(
            q, k.repeat(1, h // kv, 1), v.repeat(1, h // kv, 1), causal([len(k)], [len(q)])
        ),
        "it is what queries get that see all of their sequence, later tokens too": lambda q, k, v: contiguous(
            q, k, v, torch.zeros(len(q), len(k), dtype=torch.bool)
        ),
        "it is what queries get that stand at the beginning of their sequence": lambda q, k, v: contiguous(
            q, k, v, torch.ones(len(q), len(k)).triu(1).bool()
        ),
        "it is what queries get that also see the token after them": lambda q, k, v: contiguous(
            q, k, v, torch.ones(len(q), len(k)).triu(len(k) - len(q) + 2).bool()
        ),
    }
    for meaning, wrong in slips.items():
        if torch.isclose(came, torch.cat([wrong(*part) for part in parts]), 1e-4, 1e-4).all():
            words.append(meaning)
            break
    return "; ".join(words)


def split(case: Case, rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(list(case.queries))


@requirement("9.2")
def test_attention_by_hand(subject: Subject, close: Close) -> None:
    """Queries of zeros give the mean of the values that they may see; the table says where these lie."""
    values = torch.tensor([[70.0, 80.0], [5.0, 99.0], [3.0, 4.0]], dtype=torch.float64)[..., None, None]
    q = torch.zeros(3, 1, 1, dtype=torch.float64)
    one = torch.tensor([3]), torch.tensor([3])

    came = subject.paged_attention(q, torch.zeros_like(values), values, torch.tensor([[2, 1]]), *one)

    hint = "positions 0, 1, 2 lie in block 2 slot 0, block 2 slot 1, block 1 slot 0: values 3, 4, 5; means 3, 3.5, 4"
    close(came, torch.tensor([3.0, 3.5, 4.0], dtype=torch.float64)[:, None, None], "paged_attention", hint=hint)


MIXED = {
    "prompts": ((5, 3, 8), (5, 3, 8)),
    "pieces of prompts": ((7, 9, 4), (3, 5, 2)),
    "single tokens": ((1, 6, 4, 9), (1, 1, 1, 1)),
    "a prompt, a piece and single tokens": ((6, 9, 7, 4, 9), (6, 1, 3, 1, 2)),
    "one sequence": ((7,), (2,)),
    "one token": ((1,), (1,)),
}


@requirement("9.2")
def test_equals_contiguous_attention(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Sequences of any lengths, of which all or some last tokens ask, in one call."""
    for kind, lengths in MIXED.items():
        case = Case(rng, *lengths)

        came = attended(subject, case)

        with also(slip, case, came):
            close(came, case.expected(), f"{case} ({kind})")


@requirement("9.2")
def test_agrees_on_every_device(subject: Subject, close: Close, rng: torch.Generator, on: Where) -> None:
    """A prompt, a piece and single tokens, in each dtype."""
    case = Case(rng, (6, 9, 7, 4), (6, 1, 3, 1), dtype=on.dtype).to(on.device)

    came = attended(subject, case)

    with also(slip, case, came):
        close(came, case.expected().to(on.device, on.dtype), str(case), tolerance=on.tolerance)


@requirement("9.2")
def test_heads_read_their_groups(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Query head h reads key-value head h // (H // Hkv)."""
    for heads in ((6, 2, 3), (3, 3, 2), (3, 1, 5), (1, 1, 1)):
        case = Case(rng, (5, 3), (2, 3), heads=heads)

        came = attended(subject, case)

        with also(slip, case, came):
            close(came, case.expected(), f"{case}, H {heads[0]}, Hkv {heads[1]}, Dh {heads[2]}")


@requirement("9.2")
def test_blocks_of_any_size(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """One slot in a block, or all tokens in one; a last block that is full, or holds one token."""
    for block_size in (1, 2, 16):
        case = Case(rng, (4, 5, 6), (1, 3, 6), block_size=block_size)

        close(attended(subject, case), case.expected(), f"{case}, block_size {block_size}")


@requirement("9.2")
def test_long_contexts(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Some hundred tokens count like a few, wherever the largest scores lie."""
    case = Case(rng, (600, 530, 7), (2, 1, 2), (2, 1, 3), block_size=16, scale=2.0)

    close(attended(subject, case), case.expected(), str(case))


@requirement("9.2")
def test_what_no_context_names_is_not_read(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Slots behind the last token and other blocks hold anything, further entries of the table too."""
    for fill, further in ((math.nan, 0), (0.0, -1), (0.0, 2**62), (0.0, 11), (math.inf, 0), (math.nan, -(2**63))):
        case = Case(rng, (8, 9, 7), (6, 1, 3), fill=fill, further=further)

        came = attended(subject, case)

        hint = "a weight of 0 times NaN is NaN: slots that nobody wrote must not take part"
        what = f"{case}, {fill} in other slots, {further} in other entries of the table"
        close(came, case.expected(), what, hint=hint)


@requirement("9.2")
def test_a_table_without_further_entries(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The table is as wide as the longest sequence needs, no wider, and blocks stand in several of its rows."""
    case = Case(rng, (8, 8), (1, 5), spare=0, more_blocks=0)
    case.given["block_tables"] = case.given["block_tables"][[0, 0]]
    case.parts[1] = (case.parts[1][0], *case.parts[0][1:])

    close(attended(subject, case), case.expected(), f"{case}, which lie in the same blocks")


@requirement("9.2")
def test_large_scores(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Scores of 1e4, of any sign and all of one, neither overflow nor lose what is near the largest."""
    # A score of 1e4 has an error of 1e-3 in float32, and so has its weight.
    tolerances = {torch.float32: 5e-3, torch.float64: 1e-8}
    # In the last one all scores are -1e4 but the last token's, which is 1e4: who may not see it must not.
    offsets = (70.0, (0.0, 0.0), False), (0.3, (80.0, 72.0), False), (0.3, (80.0, -75.0), True)
    for (dtype, tolerance), (scale, offset, turned) in product(tolerances.items(), offsets):
        case = Case(rng, (6, 9, 5), (6, 1, 2), dtype=dtype, scale=scale, offset=offset, turned=turned)

        came = attended(subject, case)

        with also(slip, case, came):
            close(came, case.expected().to(dtype), f"{case}, scores of 1e4, {dtype}", tolerance=tolerance)


@requirement("9.2")
def test_float32(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """float32 stays float32, as near as it may be."""
    case = Case(rng, (6, 9, 7, 4), (6, 1, 3, 1), dtype=torch.float32)

    came = attended(subject, case)

    with also(slip, case, came):
        close(came, case.expected().float(), f"{case}, float32", tolerance=FLOAT32)


@requirement("9.2")
def test_inputs_are_never_written_to(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Neither in place nor by `.data`, not even to be put back."""
    case = Case(rng, (6, 9), (6, 1))

    with Writes(case.given) as seen:
        came = attended(subject, case)

    close(came, case.expected(), str(case), tolerance=1e-2)
    written = ", ".join(sorted(seen.names))
    assert not written, f"paged_attention: {written} written to, if only to be put back"


@requirement("9.2")
def test_inputs_of_any_strides(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Transposed and sliced inputs count like others."""
    case = Case(rng, (6, 9, 7, 4), (6, 1, 3, 1))
    ways = {"sliced": strided, "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)}
    first, expected = dict(case.given), case.expected()
    for words, name in ((way, name) for way in ways for name in first if way == "sliced" or first[name].dim() > 1):
        case.given = first | {name: ways[words](first[name])}

        close(attended(subject, case), expected, f"{case}, {name} {words}")


@requirement("9.2")
def test_every_call_reads_anew(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The same tensors with other numbers in them, also under no_grad and inference_mode, and with gradients asked."""
    case = Case(rng, (6, 9, 7), (6, 1, 3))
    modes: dict[str, Any] = {"": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    for mode, enter in modes.items():
        with enter():
            close(attended(subject, case).detach().clone(), case.expected(), f"{case} {mode}".strip())
    given = case.given
    given["q"].requires_grad_()
    with torch.no_grad():
        given["q"].mul_(-1.3)
        given["values"].mul_(-0.7)
    case.parts = [(q * -1.3, k, v * -0.7) for q, k, v in case.parts]

    what = f"{case}, after other numbers were written to the same tensors"
    for enter in reversed(modes.values()):
        with enter():
            close(attended(subject, case), case.expected(), what, hint="is something kept from call to call?")

    blocks = torch.randperm(len(given["keys"]), generator=rng)
    given["block_tables"].copy_(blocks.argsort()[given["block_tables"]])
    for pool in (given["keys"], given["values"]):
        pool.copy_(pool[blocks])
    what = f"{case}, after other blocks were written to the same tables"
    close(attended(subject, case), case.expected(), what, hint="is something kept from call to call?")


@requirement("9.2")
def test_attention_is_written_from_scratch(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """No prebuilt attention is reached, and the result is right meanwhile."""
    case = Case(rng, (6, 9, 7, 4), (6, 1, 3, 1))
    with forbid(prebuilt_attention(), "paged_attention"):
        came = attended(subject, case)
    close(came, case.expected(), str(case), tolerance=1e-2)
