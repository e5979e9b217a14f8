"""Padding (8.5): mask and positions, in and out, and rows that get in a batch what they get alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.testing import Close, Subject, Where, also, is_tensor, requirement

from .reference import (
    IGNORED,
    LENGTHS,
    PADDING,
    PLACEHOLDER,
    VOCABULARY,
    Batch,
    Built,
    batch,
    build,
    calls_told,
    expect,
    merged,
    ran,
    shown,
    spelled,
    value,
)

P = PLACEHOLDER


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """They are not what is looked at here."""
    with torch.no_grad():
        yield


@requirement("8.5")
def test_mask_and_positions(subject: Subject, rng: torch.Generator) -> None:
    """Rows are as long as their tokens; what was padding is dropped, and stands on the side that is asked for."""
    built = build(subject, rng)
    for given_side in PADDING:
        given = batch(rng, *PADDING[given_side])
        for side in ("right", "left"):
            what = f"merge, padding {given_side}, padding_side={side!r}"

            found = looked_up(built, given, what, padding_side=side)

            mask, positions, wanted = found.attention_mask, found.position_ids, shown(LENGTHS, side)
            assert mask.shape == wanted.shape, (
                f"{what}: attention_mask: shape {tuple(mask.shape)} came, {tuple(wanted.shape)} was wanted: S is the "
                "longest row's length"
            )
            assert mask.dtype == torch.bool, f"{what}: attention_mask: {mask.dtype} came, torch.bool was wanted"
            for number, (came, right) in enumerate(zip(mask.tolist(), wanted.tolist(), strict=True)):
                assert came == right, (
                    f"{what}: attention_mask, row {number} of {LENGTHS[number]} tokens: {[*map(int, came)]} came, "
                    f"{[*map(int, right)]} was wanted"
                )
            assert positions.dtype == torch.int64, (
                f"{what}: position_ids: {positions.dtype} came, torch.int64 was wanted"
            )
            assert positions.shape == wanted.shape, f"{what}: position_ids: shape {tuple(positions.shape)} came"
            for number, length in enumerate(LENGTHS):
                places = positions[number][wanted[number]].tolist()
                assert places == list(range(length)), (
                    f"{what}: position_ids of row {number}: {places} came, 0 to {length - 1} were wanted"
                )


def looked_up(built: Built, given: Batch, what: str, **more: Any) -> Any:
    """merge, where ids under padding may be none."""
    try:
        return merged(built, given, what, **more)
    except (IndexError, ValueError) as error:
        raise AssertionError(
            f"{what}: {type(error).__name__} ({error}) came\nwhat the mask hides counts for nothing: no id, no "
            "placeholder"
        ) from error


@requirement("8.5")
def test_tokens_stand_where_the_mask_says(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """inputs_embeds holds each row's tokens where the mask is True, and finite numbers elsewhere."""
    built = build(subject, rng)
    given = batch(rng, *PADDING["mixed"])
    expected = torch.cat(expect(built, given, run=False).embeds)
    for side in ("right", "left"):
        keep = shown(LENGTHS, side)
        what = f"merge, padding mixed, padding_side={side!r}: inputs_embeds"

        embeds = looked_up(built, given, what, padding_side=side).inputs_embeds

        assert embeds.shape[:2] == keep.shape, f"{what}: shape {tuple(embeds.shape)} came, {tuple(keep.shape)} leads"
        with also(spelled, built, given, embeds):
            close(embeds[keep], expected, f"{what}, at the tokens")
        assert embeds.isfinite().all(), f"{what}: not finite under padding"


@requirement("8.5")
def test_the_mask_alone_says_what_is_padding(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """pad_token_id where the mask shows it is a token like any other, at the ends of a row too."""
    built = build(subject, rng, pad=4)
    given = batch(rng, [[4, 4, 9, P, P, P], [P, 4, P, 4, 4, 4], [4, 4, 4, 4, 4, 4]])
    expected = expect(built, given)

    found = merged(built, given)

    lengths = [12, 10, 6]
    came = is_tensor(found.attention_mask, "merge: attention_mask").sum(dim=1).tolist()
    assert came == lengths, (
        f"merge, pad_token_id 4 in rows without a mask: {came} tokens are visible, {lengths} were wanted\n"
        "only the mask says what is padding"
    )
    logits, _ = ran(built, given)
    with also(calls_told, built.decoder, lengths):
        for number, row in enumerate(expected.logits):
            close(logits[number, : len(row)], row, f"forward, pad_token_id 4 in row {number}: logits")


@requirement("8.5")
@pytest.mark.parametrize("absolute", [True, False], ids=["absolute", "rotary"])
def test_a_row_gets_what_it_gets_alone(subject: Subject, close: Close, rng: torch.Generator, absolute: bool) -> None:
    """The logits of each row are those of the row run by itself, to 1e-9."""
    built = build(subject, rng, absolute=absolute)
    for given_side in ("right", "mixed") if absolute else ("mixed",):
        given = batch(rng, *PADDING[given_side])
        expected, built.decoder.seen = expect(built, given), []
        what = f"forward, padding {given_side}"

        with also(calls_told, built.decoder, LENGTHS):
            try:
                logits, _ = ran(built, given)
            except (IndexError, ValueError) as error:
                raise AssertionError(f"{what}: {type(error).__name__} ({error}) came") from error

            came = tuple(logits.shape)
            assert came == (3, 6, VOCABULARY), f"{what}: logits: shape {came} came, (3, 6, {VOCABULARY}) was wanted"
            for number, row in enumerate(expected.logits):
                close(logits[number, : len(row)], row, f"{what}: logits of row {number}, padded on the right")


@requirement("8.5")
def test_what_is_hidden_changes_nothing(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Other ids, placeholders and labels under padding give the same logits and the same loss, bit for bit."""
    built = build(subject, rng)
    ids, mask = PADDING["mixed"]
    given = batch(rng, ids, mask, [[9, 9, 9, 5, 6], [4, 7, 9, 9, 9], [9, 9, 1, 2, 9]])
    visible = given.visible()
    hidden = Batch(given.ids.where(visible, 3), given.images, given.mask)
    hidden.labels = is_tensor(given.labels, "").where(visible, IGNORED)

    (logits, loss), (others, other_loss) = ran(built, given), ran(built, hidden)

    keep = shown(LENGTHS)
    hint = "what the mask hides counts for nothing"
    close(value(logits)[keep], value(others)[keep], "forward with other ids under padding: logits", hint=hint)
    total, other = (is_tensor(one, "forward: loss").detach() for one in (loss, other_loss))
    close(total, other, "forward with other labels under padding: loss", tolerance=1e-6, hint=hint)


@requirement("8.5")
def test_an_edited_mask_counts_at_once(subject: Subject, rng: torch.Generator) -> None:
    """A mask of ones that is edited between two calls, by .data too, hides what it hides then."""
    built = build(subject, rng)
    given = batch(rng, [[9, P, 5], [4, 6, 2]], [[1, 1, 1], [1, 1, 1]])
    merged(built, given)
    is_tensor(given.mask, "").data[1, 0] = 0

    came = is_tensor(merged(built, given).attention_mask, "merge: attention_mask").sum(dim=1).tolist()

    assert came == [5, 2], (
        f"merge after an edit of attention_mask.data: {came} tokens are visible, [5, 2] were wanted\nis something "
        "kept from the call before?"
    )


@requirement("8.5")
def test_rows_of_one_token(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A batch of rows with one token each, wherever it stands, gives logits [B, 1, V]."""
    built = build(subject, rng)
    given = batch(rng, [[9, P, P], [P, 5, P], [P, P, 6]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    expected = torch.stack(expect(built, given).logits)

    logits, _ = ran(built, given)

    with also(calls_told, built.decoder, [1, 1, 1]):
        close(logits, expected, "forward, rows of one token: logits")


@requirement("8.5")
def test_forward_agrees_with_the_rows(subject: Subject, close: Close, rng: torch.Generator, on: Where) -> None:
    """Logits are those of the rows alone on any device and in any dtype."""
    built = build(subject, rng, scale=0.3)
    given = batch(rng, *PADDING["mixed"])
    expected = [value(row).to(on.device, on.dtype) for row in expect(built, given).logits]
    built.model.to(on.device, on.dtype)
    images = is_tensor(given.images, "").to(on.device, on.dtype)

    logits, _ = built.model(given.ids.to(on.device), images, is_tensor(given.mask, "").to(on.device))

    came: Tensor = is_tensor(logits, "forward: logits")
    for number, row in enumerate(expected):
        close(came[number, : len(row)], row, f"forward: logits of row {number}")
