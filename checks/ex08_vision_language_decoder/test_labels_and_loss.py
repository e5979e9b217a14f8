"""Aligned labels, and the loss with its gradients (8.4)."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.testing import Close, Subject, also, is_tensor, requirement

from .reference import (
    IGNORED,
    PLACEHOLDER,
    VOCABULARY,
    WIDTH,
    Batch,
    Built,
    D,
    Expected,
    T,
    batch,
    build,
    expect,
    merged,
    pictures,
    ran,
    value,
)

P, X = PLACEHOLDER, IGNORED
# Rows of 1 + T + 2, T + 2 and 3 tokens; 11 stands where a label counts for nothing.
IDS = [[9, P, 5, 6], [0, P, 3, 4], [0, 0, 7, 8]]
MASK = [[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]
LABELS = [[9, 11, 5, X], [11, 11, 3, 4], [11, 0, 7, X]]
ALIGNED = [[9, X, X, X, 5, X], [X, X, X, 3, 4], [0, 7, X]]


@pytest.fixture
def close() -> Close:
    """The loss may be computed in float32."""
    return Close(1e-5)


@requirement("8.4")
def test_labels_stand_at_their_tokens(subject: Subject, rng: torch.Generator) -> None:
    """Each label goes with its token; image tokens and padding have -100, whatever the caller put there."""
    built = build(subject, rng)
    given = batch(rng, IDS, MASK, LABELS)
    assert T == 3, "the check's own set-up holds"
    for side in ("right", "left"):
        wanted = [row + [X] * (6 - len(row)) if side == "right" else [X] * (6 - len(row)) + row for row in ALIGNED]

        labels = is_tensor(merged(built, given, padding_side=side).labels, "merge: labels")

        what = f"merge(…, padding_side={side!r}): labels"
        assert labels.dtype == torch.int64, f"{what}: {labels.dtype} came, torch.int64 was wanted"
        for number, (row, right) in enumerate(zip(labels.tolist(), wanted, strict=True)):
            assert row == right, f"{what}: row {number}: {row} came, {right} was wanted\n{label_slip(row, number)}"
    built = build(subject, rng, placeholder=4)
    labels = is_tensor(merged(built, batch(rng, [[9, 4, 5, 6]], None, [[4, 4, 5, 4]], 4)).labels, "merge: labels")
    assert labels.tolist() == [[4, X, X, X, 5, 4]], (
        f"merge([[9, 4, 5, 6]]), image_token_id 4, labels 4 4 5 4: labels {labels.tolist()} came, "
        f"{[[4, X, X, X, 5, 4]]} was wanted\nthe id says what is an image, not the label"
    )


def label_slip(row: list[int], number: int) -> str:
    """What is wrong with a row of labels, in words."""
    counts = [label for label in row if label != X]
    if 11 in counts or P in counts:
        return "image tokens and padding have -100, not the caller's label there"
    if counts == [label for label in ALIGNED[number] if label != X]:
        return "the labels are right, but do not stand at their tokens"
    return "a label stands at its own token; nothing is shifted here"


@requirement("8.4")
def test_without_labels(subject: Subject, rng: torch.Generator) -> None:
    """Without labels merge has none, and forward no loss."""
    built = build(subject, rng)
    given = batch(rng, IDS, MASK)

    for what, none in (("merge: labels", merged(built, given).labels), ("forward: loss", ran(built, given)[1])):
        assert none is None, f"{what}: a {type(none).__name__} came without labels, None was wanted"


class Told(nn.Module):
    """A tower of T tokens whose numbers nobody reads."""

    def forward(self, images: Tensor) -> Tensor:
        """[M, …] -> [M, T, WIDTH]."""
        return images.new_zeros(len(images), T, WIDTH)


@requirement("8.4")
def test_the_loss_by_hand(subject: Subject, close: Close) -> None:
    """Probabilities 1/2 and 1/4 for the two labels that count: (ln 2 + ln 4) / 2."""

    class Fixed(subject.Decoder):  # type: ignore[name-defined, misc]
        """Its logits are known: at the last image token 5 has half of it all, at 5 the token 6 has a quarter."""

        def forward(
            self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any = None
        ) -> Any:
            """The same logits for each row."""
            logits = inputs_embeds.new_full((*inputs_embeds.shape[:2], VOCABULARY), 3.0)
            logits[:, T, 5] += math.log(VOCABULARY - 1)
            logits[:, T + 1, 6] += math.log((VOCABULARY - 1) / 3)
            return logits, []

    model = subject.VisionLanguageModel(Told(), Fixed(VOCABULARY, D), WIDTH, P)
    ids = torch.tensor([[9, P, 5, 6]])

    found = model(ids, torch.zeros(1, 2, 2, 3), None, ids)

    loss = is_tensor(found[1], "forward: loss")
    assert tuple(loss.shape) == (), f"forward: loss: shape {tuple(loss.shape)} came, () was wanted"
    came, wanted = float(loss), (math.log(2) + math.log(4)) / 2
    assert abs(came - wanted) < 1e-5, (
        f"forward([[9, P, 5, 6]]), p(5) = 1/2 at the last image token, p(6) = 1/4 at 5: loss {came:.4f} came, "
        f"(ln 2 + ln 4)/2 = {wanted:.4f} was wanted"
    )


def losses(given: Expected) -> dict[str, Tensor]:
    """What other rules for the loss give, by name."""
    terms: list[tuple[int, Tensor]] = []
    unshifted: list[Tensor] = []
    for number, (entries, logits) in enumerate(zip(given.entries, given.logits, strict=True)):
        for place, entry in enumerate(entries):
            if entry.label == IGNORED:
                continue
            unshifted.append(-logits[place].log_softmax(-1)[entry.label])
            if place:
                terms.append((number, -logits[place - 1].log_softmax(-1)[entry.label]))
    if not terms:
        return {}
    total = torch.stack([term for _, term in terms]).sum()
    means = [torch.stack([t for row, t in terms if row == one]).mean() for one in {row for row, _ in terms}]
    places = sum(len(row) for row in given.entries)
    most = max(map(len, given.entries))
    return {
        "each label is predicted from its own token, not from the one before": torch.stack(unshifted).mean(),
        "it is the sum, not the mean": total,
        "it is the mean of each row's mean, not of all labels": torch.stack(means).mean(),
        "it is divided by all tokens, not by the labels that count": total / places,
        "it is divided by all places, not by the labels that count": total / (len(given.entries) * (most - 1)),
        "a row's first token counts, although nothing predicts it": total / len(unshifted),
    }


def loss_slip(expected: Expected, came: Any) -> str:
    """Which other rule gives this loss."""
    for name, other in losses(expected).items():
        if abs(float(other) - float(came)) < 1e-4:
            return name
    return "a label is predicted from the token before it in its own row; the first of a row is not predicted"


def check_loss(close: Close, built: Built, given: Batch, what: str, backward: bool = False) -> Expected:
    """Runs forward, and compares the loss; then goes backward."""
    expected = expect(built, given, gradients=backward)
    loss = is_tensor(ran(built, given)[1], f"{what}: loss")
    assert loss.dtype in (torch.float32, torch.float64), f"{what}: a loss in {loss.dtype} came, no less than float32"
    with also(loss_slip, expected, loss.detach()):
        close(loss.double(), expected.loss, f"{what}: loss")
    if backward:
        assert loss.requires_grad, f"{what}: the loss carries no gradient"
        loss.backward()
    return expected


@requirement("8.4")
def test_loss_and_gradients(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The mean over all labels that count, and its gradients for tower, projector, decoder and images; the tower is in
    eval while the model trains, which turns no gradient off.
    """
    built = build(subject, rng)
    built.tower.eval()
    given = batch(rng, IDS, MASK, LABELS)
    given.images = is_tensor(given.images, "").requires_grad_()

    expected = check_loss(close, built, given, "forward", backward=True)

    expected.loss.backward()
    for name, parameter in built.parameters().items():
        if parameter.grad is None:
            raise AssertionError(f"forward, backward: {name} gets no gradient; is something detached, or in no_grad?")
        close(parameter.grad, is_tensor(expected.weights[name].grad, ""), f"forward, backward: gradient of {name}")
    wanted = is_tensor(is_tensor(expected.images, "").grad, "")
    close(is_tensor(given.images, "").grad, wanted, "forward, backward: gradient of images")


@requirement("8.4")
def test_the_mean_is_over_all_labels(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Rows with many labels weigh more than rows with few; text after an image is predicted from its last token."""
    built = build(subject, rng)
    for ids, labels in (
        ([[9, P, 5, 6], [1, 2, 3, 4]], [[X, X, 5, X], [X, 2, 3, 4]]),
        ([[P, P], [5, P], [P, 6]], [[X, X], [5, X], [X, 6]]),
        ([[7, 3, 1, 1, 2]], [[7, 3, X, 1, 2]]),
    ):
        what = f"forward({ids}), labels {labels}".replace(str(P), "P")
        check_loss(close, built, batch(rng, ids, None, labels), what)


@requirement("8.4")
def test_no_label_at_all(subject: Subject, rng: torch.Generator) -> None:
    """Where no label counts the loss is 0, not NaN, and backward leaves no gradient, or zeros."""
    built = build(subject, rng)
    for ids, mask, labels in (
        ([[9, P, 5, 6], [1, 2, 3, 4]], None, [[X] * 4, [X] * 4]),
        ([[9, P, 5], [3, 1, 2]], [[1, 1, 1], [0, 1, 1]], [[9, 5, X], [3, 1, X]]),
        ([[9], [3]], None, [[9], [3]]),
    ):
        what = f"forward({ids}), labels {labels}: loss, where no label counts".replace(str(P), "P")

        loss = is_tensor(ran(built, batch(rng, ids, mask, labels))[1], what)

        assert tuple(loss.shape) == (), f"{what}: shape {tuple(loss.shape)} came, () was wanted"
        assert float(loss.detach()) == 0, f"{what}: {float(loss.detach())} came, 0 was wanted"
        assert loss.requires_grad, f"{what}: it cannot be back-propagated"
        loss.backward()
        for name, parameter in built.parameters().items():
            zero = parameter.grad is None or not parameter.grad.any()
            assert zero, f"{what}, backward: the gradient of {name} is not zero"


@requirement("8.4")
def test_labels_may_be_the_ids(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """In eval labels may be input_ids itself, transposed; it is not written to, and a second backward adds the same."""
    built = build(subject, rng)
    built.model.eval()
    given = Batch(torch.tensor([[9, P], [P, 3], [5, 6]]).T, pictures(rng, 2))
    given.labels, before, version = given.ids, value(given.ids), given.ids._version
    expected = expect(built, given, gradients=True)
    what = "forward(ids, images, labels=ids) in eval"

    loss = is_tensor(ran(built, given)[1], f"{what}: loss")

    with also(loss_slip, expected, loss.detach()):
        close(loss.double(), expected.loss, f"{what}: loss")
    assert torch.equal(given.ids, before), f"{what}: the ids have changed"
    assert given.ids._version == version, f"{what}: the ids are written to, if only to be put back"
    (2 * expected.loss).backward()
    assert loss.requires_grad, f"{what}: the loss carries no gradient"
    loss.backward(retain_graph=True)
    loss.backward()
    wanted = is_tensor(expected.weights["vision.weight"].grad, "")
    close(built.parameters()["vision.weight"].grad, wanted, f"{what}, backward twice: gradient of the tower's weight")
