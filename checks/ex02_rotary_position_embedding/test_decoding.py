"""Decoding (2.6): seq_len says where the rows stand, also beyond max_position_embeddings."""

from math import cos, sin

import pytest
import torch

from harness.testing import Close, Subject, is_tensor, requirement

from .reference import DH, ROUGH, agree, rows


@requirement("2.6")
def test_seq_len_by_hand(subject: Subject, close: Close) -> None:
    """With seq_len 7 two rows stand at positions 5 and 6."""
    x = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]], dtype=torch.float64)
    expected = torch.tensor([[[[cos(5), sin(5)], [cos(6), sin(6)]]]], dtype=torch.float64)

    turned_rows = is_tensor(subject.RotaryPositionEmbedding(2)(x, seq_len=7), "forward(2 rows, seq_len=7)")

    hint = "seq_len counts the positions up to and including the last row: these rows stand at 5 and 6"
    close(turned_rows.double(), expected, "forward([1, 0] twice, seq_len=7)", tolerance=ROUGH, hint=hint)


@requirement("2.6")
@pytest.mark.parametrize(
    "sizes",
    [(5, 1, 1, 1), (1, 1, 1, 1), (4, 3, 2, 5), (11,)],
    ids=["one token at a time", "no prefill", "several", "prefill only"],
)
@pytest.mark.parametrize("expected_positions", [6])
def test_decoding_gives_the_full_pass(
    subject: Subject, close: Close, rng: torch.Generator, expected_positions: int, sizes: tuple[int, ...]
) -> None:
    """A prefill, then some tokens at a time, gives the rows of the full pass, beyond max_position_embeddings too."""
    x, end = rows(rng, sum(sizes)), 0
    rope = subject.RotaryPositionEmbedding(DH, expected_positions)

    for size in sizes:
        start, end = end, end + size
        wanted = f"position {start} was" if size == 1 else f"positions {start} … {end - 1} were"
        hint = f"{size} of {end} rows so far, max_position_embeddings={expected_positions}: {wanted} wanted"
        agree(close, rope, x[:, :, start:end], end, hint=hint, expected_positions=expected_positions)


@requirement("2.6")
def test_the_first_call_may_be_late(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A module that has seen nothing turns a row of a late position, also beyond max_position_embeddings."""
    for seq_len in (8, 9, 16, 17, 63, 5001):
        rope = subject.RotaryPositionEmbedding(DH, 8)

        hint = f"one float32 row, first call, max_position_embeddings=8: position {seq_len - 1} was wanted"
        agree(close, rope, rows(rng, 1, torch.float32), seq_len, hint=hint, expected_positions=8)


@requirement("2.6")
def test_positions_have_no_end(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A position beyond what 16 bits can count."""
    rope = subject.RotaryPositionEmbedding(2, 8)

    hint = "max_position_embeddings=8; there is no last position: 70000 was wanted"
    agree(close, rope, rows(rng, 1, dim=2), 70_001, hint=hint, expected_positions=8)


@requirement("2.6")
def test_two_sequences_take_turns(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The position comes from seq_len alone, not from what was called before."""
    rope = subject.RotaryPositionEmbedding(DH, 8)

    for seq_len in (12, 3, 13, 4, 4, 14):
        agree(
            close,
            rope,
            rows(rng, 1),
            seq_len,
            hint="two sequences are decoded in turn: seq_len alone says where a row stands",
        )
