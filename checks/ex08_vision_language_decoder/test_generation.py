"""Generation (8.7), and what calls cost (8.8)."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.testing import Close, Subject, Trace, Where, also, halfway, is_tensor, requirement

from .reference import (
    PADDING,
    PLACEHOLDER,
    Batch,
    Built,
    batch,
    build,
    calls_told,
    continued,
    ended,
    entries_of,
    expect,
    image_tokens,
    merged,
    pictures,
    ran,
    randomize,
    value,
)

P = PLACEHOLDER


def new_tokens(built: Built, given: Batch, what: str, **more: Any) -> Tensor:
    """The learner's generate."""
    return is_tensor(built.model.generate(given.ids, given.images, given.mask, **more), what)


def generates(built: Built, given: Batch, wanted: Tensor, what: str, **more: Any) -> None:
    """Generates, and compares with the tokens that are wanted."""
    built.decoder.seen = []
    built.tower.seen.clear()
    came = new_tokens(built, given, what, **more)
    lengths = [len(row) for row in entries_of(given, built.placeholder, built.per_image)]
    with also(generation_slip, built, given, lengths, came):
        assert came.shape == wanted.shape, (
            f"{what}: shape {tuple(came.shape)} came, {tuple(wanted.shape)} was wanted: the new tokens alone"
        )
        assert came.dtype == torch.int64, f"{what}: {came.dtype} came, torch.int64 was wanted"
        ordinary = torch.is_inference_mode_enabled() or not came.is_inference()
        assert ordinary, f"{what}: an inference tensor came, an ordinary one was wanted"
        for number, (row, right) in enumerate(zip(came.tolist(), wanted.tolist(), strict=True)):
            assert row == right, f"{what}: row {number}: {row} came, {right} was wanted"


def generation_slip(built: Built, given: Batch, lengths: list[int], came: Tensor) -> str:
    """What is wrong with what the decoder was called with, or read from it."""
    if len(given.images if given.images is not None else ()) and not built.tower.seen:
        return "the tower is not called: generate does not see the images"
    if told := calls_told(built.decoder, lengths):
        return told
    if not built.decoder.seen or built.decoder.seen[0].shape[:2] != (len(lengths), max(lengths)):
        return ""
    lasts = built.decoder.seen[0].mask[:, -1].tolist()
    if not all(lasts) and came.shape[:1] == (len(lengths),):
        return "mask and positions are right; is the first token read from the row's last token, not the last column?"
    return ""


@halfway
@requirement("8.7")
@pytest.mark.parametrize("absolute", [True, False], ids=["absolute", "rotary"])
def test_generation_equals_running_all_again(subject: Subject, rng: torch.Generator, absolute: bool) -> None:
    """Each new token is the best one after the whole row so far, for padding on any side."""
    built = build(subject, rng, absolute=absolute, scale=1.0)
    given, steps = batch(rng, *PADDING["mixed"]), 4 if absolute else 3
    wanted = continued(built, given, steps)
    assert len(wanted.unique()) > 1, "the check's own set-up is not one token again and again"

    generates(built, given, wanted, "generate, padding on either side", max_new_tokens=steps)


@requirement("8.7")
def test_generation_from_any_prompt(subject: Subject, rng: torch.Generator) -> None:
    """From text alone; from an image alone, one id, and an image at the end."""
    built = build(subject, rng, scale=1.0)
    for ids, mask in (([[9, 8, 5], [4, 6, 2]], None), ([[P, 0], [7, P], [3, 0]], [[1, 0], [1, 1], [1, 0]])):
        given = batch(rng, ids, mask)
        given.images = given.images if mask else None

        what = f"generate({ids}), {'an image for each placeholder' if mask else 'images None'}".replace(str(P), "P")
        generates(built, given, continued(built, given, 2), what, max_new_tokens=2)


@requirement("8.7")
def test_a_row_ends_at_its_end_token(subject: Subject, rng: torch.Generator) -> None:
    """The end token stays, pad_token_id follows it, and the other rows go on."""
    built = build(subject, rng, pad=11, scale=1.0)
    given = batch(rng, *PADDING["mixed"])
    first = continued(built, given, 3)
    for row, step in ((0, 0), (1, 1)):
        eos = int(first[row, step])
        wanted = ended(first, eos, built.pad)

        generates(built, given, wanted, f"generate, eos_token_id {eos}", max_new_tokens=3, eos_token_id=eos)


@requirement("8.7")
def test_every_row_ends_at_once(subject: Subject, rng: torch.Generator) -> None:
    """Where the first token of all rows is the end token, which may be 0, the rest is pad_token_id."""
    built = build(subject, rng, pad=3, scale=1.0)
    given = batch(rng, [[9, P, 5], [9, P, 5]])
    given.images = is_tensor(given.images, "")[:1].expand(2, -1, -1, -1)
    first, head = int(continued(built, given, 1)[0, 0]), built.decoder.head.weight.data
    head[[0, first]] = head[[first, 0]]
    wanted = torch.tensor([[0, 3, 3, 3]] * 2)

    generates(built, given, wanted, "generate, eos_token_id 0", max_new_tokens=4, eos_token_id=0)


@requirement("8.7")
def test_the_pad_token_may_be_generated(subject: Subject, rng: torch.Generator) -> None:
    """Where pad_token_id is the best token it is one like any other: the row goes on, and sees it."""
    built = build(subject, rng, pad=3, scale=1.0)
    given = batch(rng, [[9, P, 5], [4, 2, P]])
    first, head = int(continued(built, given, 1)[0, 0]), built.decoder.head.weight.data
    head[[3, first]] = head[[first, 3]]

    what = "generate, pad_token_id 3, which is the first token of row 0"
    generates(built, given, continued(built, given, 3), what, max_new_tokens=3)


@requirement("8.7")
def test_how_many_tokens(subject: Subject, rng: torch.Generator) -> None:
    """One token if one is asked for; 16 by default; an end token that never comes ends nothing."""
    built = build(subject, rng)
    given = batch(rng, [[9, P], [P, 2]])
    wanted = continued(built, given, 3)
    never = next(token for token in range(13) if token not in wanted)

    generates(built, given, wanted[:, :1], "generate(…, max_new_tokens=1)", max_new_tokens=1)
    what = f"generate(…, eos_token_id={never}), which never comes"
    generates(built, given, wanted, what, max_new_tokens=3, eos_token_id=never)
    ended = torch.full((1, 16), built.pad)
    ended[0, 0] = wanted[0, 0]
    alone = Batch(given.ids[:1], is_tensor(given.images, "")[:1])
    generates(built, alone, ended, "generate(…), 16 tokens by default", eos_token_id=int(ended[0, 0]))


@requirement("8.7")
def test_generation_tracks_no_gradients(subject: Subject, rng: torch.Generator) -> None:
    """In training and eval: no gradients are tracked, the result is an ordinary tensor, and all is left as it was."""
    built = build(subject, rng)
    given = batch(rng, [[9, P, 5], [4, 2, P]])
    wanted = continued(built, given, 2)
    for training in (True, False):
        built.model.train(training)
        built.decoder.layers[0].train(not training)
        modes, what = [module.training for module in built.model.modules()], f"generate in training {training}"
        built.decoder.seen = []

        tokens = new_tokens(built, given, what, max_new_tokens=2)

        assert tokens.tolist() == wanted.tolist(), f"{what}: {tokens.tolist()} came, {wanted.tolist()} was wanted"
        tracked = [number for number, call in enumerate(built.decoder.seen, start=1) if call.grad]
        assert not tracked, (
            f"{what}: gradients are on while the decoder runs, in calls {tracked}\n"
            "inference_mode(False) turns them on too"
        )
        assert torch.is_grad_enabled(), f"{what}: gradients are off afterwards"
        assert not tokens.is_inference(), f"{what}: an inference tensor came, an ordinary one was wanted"
        for name, parameter in built.parameters().items():
            assert parameter.grad is None and parameter.requires_grad, f"{what}: {name} is no longer as it was"
        after = [module.training for module in built.model.modules()]
        assert after == modes, f"{what}: the mode of a module has changed"


@requirement("8.7")
def test_generation_inside_other_modes(subject: Subject, rng: torch.Generator) -> None:
    """Inside no_grad and inference_mode the tokens are the same, and training goes on afterwards."""
    built = build(subject, rng)
    given = batch(rng, [[9, P, 5], [4, 2, P]])
    wanted = continued(built, given, 2)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            generates(built, given, wanted, f"generate in {mode.__name__}", max_new_tokens=2)

    given.labels = given.ids.clamp(min=0)
    loss = is_tensor(ran(built, given)[1], "forward: loss")
    assert loss.requires_grad, "forward after generate in inference_mode: the loss carries no gradient"
    loss.backward()


@requirement("8.7")
def test_generation_by_new_weights(subject: Subject, rng: torch.Generator) -> None:
    """A second call after the weights have changed, with another prompt, keeps nothing of the first."""
    built = build(subject, rng, scale=1.0)
    for number, side in enumerate(("right", "mixed")):
        given = batch(rng, *PADDING[side])
        randomize(rng, *(p.data for name, p in built.parameters().items() if not name.startswith("projector.")))

        wanted = continued(built, given, 2)
        generates(built, given, wanted, f"generate, call {number + 1}, after new weights", max_new_tokens=2)


@requirement("8.7")
def test_generation_agrees_elsewhere(subject: Subject, rng: torch.Generator, on: Where) -> None:
    """The tokens are those of forward run again, on any device; where two are nearly as good, either is right."""
    built = build(subject, rng)
    given = batch(rng, [[9, P, 5, 0], [4, 2, P, 6]], [[1, 1, 1, 0], [1, 1, 1, 1]])
    built.model.to(on.device, on.dtype)
    images = is_tensor(given.images, "").to(on.device, on.dtype)

    tokens = built.model.generate(given.ids.to(on.device), images, is_tensor(given.mask, "").to(on.device), 4)

    came = is_tensor(tokens, "generate")
    assert came.device.type == on.device.type, f"generate: the tokens are on {came.device}"
    for number, row in enumerate(([9, P, 5], [4, 2, P, 6])):
        ids = torch.tensor([row + came[number].tolist()])
        whole = Batch(ids, is_tensor(given.images, "")[number : number + 1])
        logits = expect(built, whole).logits[0][-5:-1].detach()
        chosen = logits.gather(1, came[number].cpu()[:, None])[:, 0]
        behind = float((logits.amax(dim=1) - chosen).max())
        assert behind <= 20 * on.tolerance, f"generate: row {number}: a token is {behind:.3g} below the best"


# 8.8 costs


@requirement("8.8")
def test_the_tower_is_called_once(subject: Subject, rng: torch.Generator) -> None:
    """merge, forward and generate call the tower once, with all images; without any image not at all."""
    close, built = Close(1e-2), build(subject, rng)
    for ids in ([[9, P, 5, P], [1, 2, P, 3]], [[9, 8, 5, 4], [1, 2, 6, 3]]):
        given = batch(rng, ids)
        expected, count = expect(built, given), len(is_tensor(given.images, ""))
        for call in ("merge", "forward", "generate"):
            what = f"{call} with {count} images in 2 rows"
            built.tower.seen.clear()

            if call == "generate":
                came = new_tokens(built, given, what, max_new_tokens=1).tolist()
                wanted = [[int(row[-1].argmax())] for row in expected.logits]
                assert came == wanted, f"{what}: {came} came, {wanted} was wanted"
            else:
                found = merged(built, given).inputs_embeds if call == "merge" else ran(built, given)[0]
                right = (expected.embeds if call == "merge" else expected.logits)[0]
                close(found[0, : len(right)], right, f"{what}: row 0")

            seen = [shape[0] for shape, _ in built.tower.seen]
            assert seen == ([count] if count else []), (
                f"{what}: the tower is called with {seen} images, {[count] if count else 'not at all'} was wanted"
            )
    many = Batch(torch.full((1, 520), P), pictures(rng, 520))
    tokens = image_tokens(built, built.weights(), is_tensor(many.images, "")).flatten(0, 1)
    built.tower.seen.clear()
    close(merged(built, many).inputs_embeds[0], tokens, "merge with 520 images in a row: inputs_embeds")
    calls = [shape[0] for shape, _ in built.tower.seen]
    assert calls == [520], f"merge with 520 images in a row: the tower is called with {calls} images, [520] was wanted"


@requirement("8.8")
def test_generation_reads_each_token_once(subject: Subject, rng: torch.Generator) -> None:
    """All prompts in the decoder's first call, then one token per row and call, no call more than new tokens."""
    built = build(subject, rng)
    given = batch(rng, *PADDING["right"])

    frugal(built, given, continued(built, given, 3), 3, None, 3)


def frugal(built: Built, given: Batch, wanted: Tensor, steps: int, eos: int | None, most: int) -> None:
    """Generates, compares, and looks at the decoder's calls: at most `most`."""
    built.decoder.seen = []
    what = f"generate, max_new_tokens {steps}" + ("" if eos is None else f", eos_token_id {eos}")
    came = new_tokens(built, given, what, max_new_tokens=steps, eos_token_id=eos).tolist()
    assert came == wanted.tolist(), f"{what}: {came} came, {wanted.tolist()} was wanted"
    shapes = [call.shape[:2] for call in built.decoder.seen]
    lengths = [len(row) for row in entries_of(given, built.placeholder, built.per_image)]
    assert len(shapes) <= most, (
        f"{what}: the decoder is called {len(shapes)} times, at most {most} are needed: {shapes} rows and tokens"
    )
    rows, columns = len(lengths), max(lengths)
    fed = sum(one * length for one, length in shapes)
    limit = rows * columns + rows * (most - 1)
    assert fed <= limit and shapes[0] == (rows, columns), (
        f"{what}: the decoder's calls read {shapes} rows and tokens; ({rows}, {columns}) first, then one token per "
        "row were wanted"
    )


@requirement("8.8")
def test_no_call_once_all_rows_have_ended(subject: Subject, rng: torch.Generator) -> None:
    """Where the last row ends after n tokens, the decoder is called n times."""
    built = build(subject, rng, scale=1.0)
    given = Batch(torch.tensor([[9, P, 5]]), pictures(rng, 1))
    alone = continued(built, given, 7)[0].tolist()
    last = max(place for place in range(4) if alone[place] not in alone[:place])
    assert last > 1, "the check's own set-up ends late"
    # The second row is a token ahead of the first.
    given = Batch(torch.tensor([[9, P, 5, 0], [9, P, 5, alone[0]]]), is_tensor(given.images, "").expand(2, -1, -1, -1))
    given.mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    tokens = torch.tensor([alone[:6], alone[1:]])

    for eos, calls in ((alone[last], last + 1), (alone[1], 2)):
        frugal(built, given, ended(tokens, eos, built.pad), 6, eos, calls)


@requirement("8.8")
def test_nothing_is_kept(subject: Subject, rng: torch.Generator) -> None:
    """Once what a call returned is let go, nothing that it made is alive; nor after one that failed."""
    built = build(subject, rng)
    built.decoder.seen = None
    given = batch(rng, [[9, P, 5, 6], [1, P, 2, 3]], [[1, 1, 1, 1], [0, 1, 1, 1]])
    wanted, logits = continued(built, given, 2).tolist(), expect(built, given).logits[0]
    given.labels = given.ids.clamp(min=0)

    def left(*calls: str) -> int:
        """How many bytes of what the calls made are alive once their results are gone."""
        found: dict[str, Any] = {}
        with Trace() as seen:
            for call in calls:
                if call == "a refused merge":
                    with contextlib.suppress(Exception):
                        built.model.merge(given.ids)
                else:
                    found[call] = (
                        new_tokens(built, given, call, max_new_tokens=2) if call == "generate" else ran(built, given)
                    )
        if "forward" in found:
            Close(1e-2)(value(found["forward"][0])[0], logits, "forward: logits of row 0")
        if "generate" in found:
            came = found["generate"].tolist()
            assert came == wanted, f"generate: {came} came, {wanted} was wanted"
        found.clear()
        return seen.alive_after_collection()

    calls = ("generate", "a refused merge", "forward")
    if left(*calls):
        for call in calls:
            alive = left(call)
            assert not alive, f"{call}: {alive} bytes of what it made are alive after its result is gone"
        raise AssertionError(f"{', '.join(calls)}: bytes of what they made are alive after their results are gone")
