"""Variable lengths (2.3): any order of lengths and dtypes, no cosine twice, another device, the state_dict."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from harness.testing import Close, Subject, is_tensor, requirement

from .reference import (
    DH,
    DTYPES,
    LOOSE,
    ROUGH,
    D,
    H,
    L,
    MadeOf,
    Turns,
    agree,
    build,
    named,
    none_seen,
    rows,
    some_x,
)


def agree_without_turns(close: Close, rope: Any, x: Tensor, after: str, tolerance: float = ROUGH) -> None:
    """forward is right, and computes no cosine or sine."""
    turns = Turns()
    agree(close, rope, x, tolerance=tolerance, inside=turns)
    none_seen(turns, f"forward({x.size(-2)} rows of {named(x.dtype)}) {after}")


@requirement("2.3")
@pytest.mark.parametrize("expected_positions", [4, 64])
def test_lengths_in_any_order(subject: Subject, close: Close, rng: torch.Generator, expected_positions: int) -> None:
    """One module is right for longer and shorter inputs after each other, within max_position_embeddings and beyond."""
    rope = subject.RotaryPositionEmbedding(DH, expected_positions)
    lengths = (3, 9, 5, 23, 1, 40)

    for index, length in enumerate(lengths):
        before = f"the module has served {list(lengths[:index])} rows before" if index else "the module's first call"
        hint = f"{length} rows, max_position_embeddings={expected_positions}, which is no limit; {before}"
        agree(close, rope, rows(rng, length), hint=hint, expected_positions=expected_positions)


@requirement("2.3")
def test_modules_do_not_share_what_differs(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Modules of other dims and bases, called before, change nothing."""
    for dim, base in ((DH + 2, 10000), (DH, 50), (DH, 10000.0)):
        rope = subject.RotaryPositionEmbedding(dim, 16, base)
        x = rows(rng, L, dim=dim)
        if base == 10000:
            agree(close, rope, x, hint="modules of another dim or base were called before: is a cache shared by all?")
        else:
            rope(x)


@requirement("2.3")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("expected_positions", [4])
def test_a_second_call_computes_no_cosine_again(
    subject: Subject, close: Close, rng: torch.Generator, expected_positions: int, mode: Callable[[], Any]
) -> None:
    """The same length again costs no cosine or sine, also beyond max_position_embeddings and at inference."""
    rope = subject.RotaryPositionEmbedding(DH, expected_positions)

    with mode():
        rope(rows(rng, 23))
        after = f"with max_position_embeddings={expected_positions}, called twice in {mode.__name__}"
        agree_without_turns(close, rope, rows(rng, 23), after=after)


@requirement("2.3")
@pytest.mark.parametrize("expected_positions", [4])
def test_shorter_calls_compute_no_cosine_again(
    subject: Subject, close: Close, rng: torch.Generator, expected_positions: int
) -> None:
    """Once 23 positions are known, none of them costs a cosine or sine again, in whatever shapes they come."""
    rope = subject.RotaryPositionEmbedding(DH, expected_positions)
    rope(rows(rng, 3))
    rope(rows(rng, 23))

    for length in (9, 3, 23, 1, 22, 23):
        agree_without_turns(close, rope, rows(rng, length), after="after a call with 23 rows")
    agree_without_turns(close, rope, rows(rng, 9)[:1, :2], after="with another batch size and fewer heads")
    agree_without_turns(close, rope.eval(), rows(rng, 9, torch.float32), after="after eval()")
    agree_without_turns(close, rope.train(), rows(rng, 9), after="after train()")


@requirement("2.3")
def test_a_long_call_is_not_forgotten(subject: Subject, rng: torch.Generator) -> None:
    """Short calls after a long one drop nothing of what it needed."""
    rope, x = subject.RotaryPositionEmbedding(2, 4), rows(rng, 64, dim=2)
    rope(x, 9000)
    rope(x)
    rope(x[:, :, :1])

    for last in (9000, 3000):
        with Turns() as turns:
            rope(x[:, :, :1], last)
        none_seen(turns, f"forward(1 row, seq_len={last}) after a call of seq_len 9000 and shorter ones")


@requirement("2.3")
@pytest.mark.parametrize("first", [torch.float16, torch.float64], ids=named)
def test_other_dtypes_compute_no_cosine_again(
    subject: Subject, close: Close, rng: torch.Generator, first: torch.dtype
) -> None:
    """A table made in a call of one dtype serves every other dtype, and is not in that dtype."""
    rope = subject.RotaryPositionEmbedding(DH, 4)
    rope(rows(rng, 23, first))

    for dtype in (*DTYPES, first):
        x, tolerance = rows(rng, 9, dtype), LOOSE.get(dtype, ROUGH)
        agree_without_turns(close, rope, x, after=f"after a call with 23 rows of {named(first)}", tolerance=tolerance)


@requirement("2.3")
def test_decoding_computes_no_cosine_again(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """After decoding one token at a time, the next sequence of that length costs no cosine or sine."""
    rope = subject.RotaryPositionEmbedding(DH, 4)
    x = rows(rng, 13)
    for position in range(13):
        rope(x[:, :, position : position + 1], seq_len=position + 1)

    agree_without_turns(close, rope, x, after="after 13 steps of decoding")
    for last in (1, 13, 7):
        with Turns() as turns:
            rope(x[:, :, last - 1 : last], seq_len=last)
        none_seen(turns, f"forward(1 row, seq_len={last}) after 13 steps of decoding")


@requirement("2.3")
def test_a_cast_module_computes_no_cosine_twice(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A cast may cost a new table once, in the next call, however short that is."""
    for dtype in (torch.bfloat16, torch.float64):
        rope = subject.RotaryPositionEmbedding(DH, 4)
        rope(rows(rng, 23))
        rope.to(dtype)
        rope(rows(rng, 9, dtype))

        after = (
            f"after 23 rows, .to({named(dtype)}) and 9 rows, for which any new table has to be as long as the old one"
        )
        for length in (9, 23):
            agree_without_turns(close, rope, rows(rng, length), after, tolerance=LOOSE[torch.bfloat16])


@requirement("2.3")
def test_attention_computes_no_cosine_again(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A second call of the attention layer costs no cosine or sine, whatever the length below."""
    attention = build(subject)
    attention(some_x(rng, 9))
    x = some_x(rng, 7)

    with Turns() as turns:
        attention(x)

    none_seen(turns, "attention(7 rows) after a call with 9 rows")
    agree(close, attention.rotary_emb, rows(rng, 7, dim=D // H), hint="this is the attention layer's rotary_emb")


@requirement("2.3")
def test_attention_keeps_nothing_of_a_call(subject: Subject, rng: torch.Generator) -> None:
    """Without gradients, and in eval() with them too: what is made of x and mask goes with the output."""
    attention = build(subject)
    inputs = {"x": some_x(rng, 7), "mask": torch.ones(1, 1, 7, 7).tril()}
    for training, mode, names in (
        (True, torch.no_grad, ("x", "mask")),
        (False, torch.enable_grad, ("x",)),
        (False, torch.no_grad, ("x",)),
    ):
        given = {name: inputs[name].clone() for name in names}
        what = f"attention({', '.join(names)}) in {'train' if training else 'eval'}(), {mode.__name__}"
        attention.train(training)

        with mode(), MadeOf(**given) as made:
            output = attention(*given.values())

        is_tensor(output, what)  # Its values are judged elsewhere.
        del given, output
        made.let_go(what)


@contextmanager
def autocast_on_meta() -> Iterator[None]:
    """Lets autocast take the meta device, which it does not know, so that it may be named by a tensor's device type."""
    init = torch.autocast.__init__

    def lenient(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        init(self, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    with mock.patch.object(torch.autocast, "__init__", lenient):
        yield


@requirement("2.3")
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called before"])
def test_a_module_may_be_moved(subject: Subject, close: Close, rng: torch.Generator, called: bool) -> None:
    """On another device nothing of the first one is left, nor afterwards of the other; meta stands in for one."""
    x = rows(rng, 9)
    agree(close, subject.RotaryPositionEmbedding(DH, 4), x)
    rope = subject.RotaryPositionEmbedding(DH, 4)
    if called:
        rope(x)

    with autocast_on_meta():
        moved = is_tensor(rope.to("meta")(x.to("meta")), "forward(x) on meta")

    assert moved.device.type == "meta", (
        f"forward(x) on meta: a result on {moved.device} came, on meta was wanted; is a table of the first device left?"
    )
    assert moved.shape == x.shape, f"forward(x) on meta: shape {tuple(moved.shape)} came, {tuple(x.shape)} was wanted"
    if called:
        with autocast_on_meta(), Turns() as turns:
            rope(x[:, :, :4].to("meta"))
        none_seen(turns, "forward(4 rows) on meta, after 9 there")
    hint = "a module on the meta device was called before: is a cache shared between devices?"
    agree(close, subject.RotaryPositionEmbedding(DH, 4), x, hint=hint)
    if any(True for _ in (*rope.buffers(), *rope.parameters())):  # What is in them does not come back from meta.
        return
    longer = rows(rng, 300)[:1, :1]
    with autocast_on_meta():
        rope(longer.to("meta"))
    agree(close, rope.to("cpu"), longer, hint="as many rows were turned on another device, and fewer on this one")


@requirement("2.3")
def test_attention_may_be_moved(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """So may the attention layer, with a mask."""
    x, causal = some_x(rng, 7), torch.ones(1, 1, 7, 7).tril()
    agree(close, build(subject).rotary_emb, rows(rng, 7, dim=D // H), hint="this is the attention layer's rotary_emb")
    attention = build(subject).to("meta")

    with autocast_on_meta():
        output = is_tensor(attention(x.to("meta"), causal.to("meta")), "attention(x, mask) on meta")

    assert output.device.type == "meta", (
        f"attention(x, mask) on meta: a result on {output.device} came, on meta was wanted"
    )
    came, wanted = tuple(output.shape), tuple(x.shape)
    assert came == wanted, f"attention(x, mask) on meta: shape {came} came, {wanted} was wanted"


@requirement("2.3")
@pytest.mark.parametrize("layer", ["rotation", "attention"])
def test_state_dict_holds_no_positions(subject: Subject, close: Close, rng: torch.Generator, layer: str) -> None:
    """The state_dict is the same whatever max_position_embeddings is and whatever lengths were seen, and loads."""
    agree(close, subject.RotaryPositionEmbedding(DH, 4), rows(rng, 9))
    few, many = (
        subject.RotaryPositionEmbedding(DH, size) if layer == "rotation" else build(subject, size) for size in (4, 16)
    )
    before = deepcopy(few.state_dict())
    for length in (3, 40, 90):
        few(rows(rng, length) if layer == "rotation" else some_x(rng, length))

    hint = "tables of positions are plain attributes or buffers with persistent=False"
    for state, what in (
        (few.state_dict(), "after calls with 3, 40 and 90 rows"),
        (many.state_dict(), "with another max_position_embeddings"),
    ):
        assert state.keys() == before.keys(), (
            f"state_dict {what}: keys {sorted(state)} came, {sorted(before)} were wanted\n{hint}"
        )
        for name, value in state.items():
            if isinstance(value, Tensor):
                close(value, before[name], f"state_dict {what}: {name}", tolerance=0, hint=hint)
    few.load_state_dict(many.state_dict())
    agree(
        close, few if layer == "rotation" else few.rotary_emb, rows(rng, 5, dim=DH if layer == "rotation" else D // H)
    )
