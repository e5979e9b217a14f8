"""The symmetric loss (7.3)."""

import math
import weakref

import pytest
import torch

from harness.testing import Close, Subject, Trace, Where, also, refuses, requirement

from .reference import ASKING, NAMES, PLAIN, SHARES, Pairs, judged, known_loss, near_pairs, nothing_left, pairs, plain


@requirement("7.3")
def test_a_loss_by_hand(subject: Subject, close: Close) -> None:
    """Scale log 2, two alike texts: the logarithms of 1/2, 2/3, 1/2 and 1/3 make 0.7226."""
    text = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    given = Pairs(torch.eye(2, dtype=torch.float64), text, torch.tensor(math.log(2), dtype=torch.float64))

    loss = plain(subject, given)

    with also(known_loss, loss, given):
        close(loss, torch.tensor(math.log(18) / 4, dtype=torch.float64), f"{PLAIN} of (1, 0), (0, 1) and twice (1, 0)")


@requirement("7.3")
def test_groups_by_hand(subject: Subject, close: Close) -> None:
    """Two orthonormal pairs have the loss log(1 + e) - 1; as one group, log(1 + e) - 1/2."""
    eye, one = torch.eye(2, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    for groups, wanted in ((None, 1.0), ([3, 5], 1.0), ([3, 3], 0.5), (torch.tensor(3).expand(2), 0.5)):
        given = Pairs(eye, eye, one, None if groups is None else torch.as_tensor(groups))

        loss = plain(subject, given)

        with also(known_loss, loss, given):
            close(
                loss,
                torch.tensor(math.log(1 + math.e) - wanted, dtype=torch.float64),
                f"{PLAIN} of two orthonormal pairs, groups {groups}",
            )


GROUPS = {
    "none": None,
    "some alike": [4, -1, 4, 0, -1, 4, 9],
    "all alike": [-1] * 7,
    "all different": [5, 1, 0, -3, 8, 2, -6],
    "huge": [2**62 + 1, 2**62, -(2**63), 2**63 - 1, 2**62 + 1, 2**62, -(2**63) + 1],
}


@requirement("7.3")
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_the_formula(subject: Subject, close: Close, rng: torch.Generator, groups: list[int] | None) -> None:
    """Value and gradients are the formula's, for rows of any length, with one match and several."""
    given = pairs(rng, 7, 3, groups=groups).leaves()

    loss = plain(subject, given)

    judged(close, f"{PLAIN}, groups {groups}", loss, given, times=-1.5, again=True)


@requirement("7.3")
def test_one_pair(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """One pair has the loss 0, whatever its rows and its group."""
    for groups in (None, [-3]):
        given = pairs(rng, 1, 4, 50.0, groups).leaves()

        judged(close, f"{PLAIN} of one pair, groups {groups}", plain(subject, given), given)


@requirement("7.3")
def test_inputs_without_gradient(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Any of image, text and scale may need no gradient."""
    for name, asking in ASKING.items():
        given = pairs(rng, 5, 3, groups=[1, 2, 1, 3, 2]).leaves(asking)
        judged(close, f"{PLAIN}, gradients asked for by {name}", plain(subject, given), given)


@requirement("7.3")
def test_one_tensor_in_both_roles(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Image and text may be one tensor: it gets both gradients, and is not written to."""
    one = pairs(rng, 5, 3)
    given = Pairs(one.image, one.image, one.scale).leaves()
    version = given.image._version

    judged(close, f"{PLAIN}, image and text are one tensor", plain(subject, given), given)
    assert given.image._version == version, f"{PLAIN}: writes to its rows"


@requirement("7.3")
def test_large_scales_in_float32(subject: Subject, rng: torch.Generator) -> None:
    """At scale 100 unit rows in float32 give the loss within 1e-4 · max(1, loss), near 0 too."""
    for given in (
        near_pairs(rng, 16, 24, 100.0),
        pairs(rng, 16, 24, 100.0, unit=True),
        pairs(rng, 9, 5, 100.0, [1, 2, 1] * 3, unit=True),
    ):
        given = given.to(torch.float32)
        wanted = float(given.exact()[0])

        loss = plain(subject, given)

        assert tuple(loss.shape) == (), f"{PLAIN} in float32: shape {tuple(loss.shape)} came, () was wanted"
        assert abs(float(loss) - wanted) <= 1e-4 * max(1.0, wanted), (
            f"{PLAIN} in float32, unit rows, scale 100: {float(loss):.6g} came, {wanted:.6g} was wanted\n"
            "exp(100) overflows, and the log of a rounded p is not exact: use logsumexp or log_softmax"
        )


@requirement("7.3")
def test_large_rows_in_float64(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Logits of ±1000 and of one sign only give the formula's value and gradients."""
    given = pairs(rng, 5, 3, 1000.0)
    shifted = Pairs(given.image + 3, given.text - 3, given.scale / 10)
    for one in (given, shifted):
        one = one.leaves()
        judged(close, f"{PLAIN}, logits up to thousands", plain(subject, one), one, tolerance=1e-7)


@requirement("7.3")
def test_nothing_stays_of_a_loss(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Once the loss is let go, nothing of the call is alive."""
    given = pairs(rng, 6, 3, groups=[2, 1, 2, 0, 1, 2])
    with Trace() as seen:
        loss = plain(subject, given)

    close(loss, given.exact()[0], PLAIN, tolerance=SHARES)
    del loss
    left = seen.alive_after_collection()
    assert left == 0, f"{PLAIN}: {left} bytes are alive once the loss is let go; nothing was wanted"


@requirement("7.3")
def test_other_shapes_are_refused(subject: Subject) -> None:
    """image and text of different shapes raise ValueError with both."""
    scale = torch.tensor(1.0)
    for first, second in (((3, 2), (4, 2)), ((3, 2), (3, 5)), ((4, 2), (1, 2))):
        image, text = torch.ones(first), torch.ones(second)
        shapes = [", ".join(map(str, shape)) for shape in (first, second)]
        refuses(ValueError, lambda image=image, text=text: subject.contrastive_loss(image, text, scale),  # type: ignore[misc]
                f"{PLAIN} of image {first} and text {second}", *shapes)  # fmt: skip
        left = [weakref.ref(image), weakref.ref(text)]
        del image, text
        nothing_left(left, PLAIN)


@requirement("7.3")
def test_agrees_elsewhere(subject: Subject, close: Close, rng: torch.Generator, on: Where) -> None:
    """Loss and gradients agree with the formula on every device."""
    given = pairs(rng, 6, 4, 2.0, [0, 1, 0, 2, 1, 3])
    wanted, gradients = given.exact()
    assert given.groups is not None, "the check's own set-up holds"
    tensors = [tensor.to(on.device, on.dtype).requires_grad_() for tensor in given.tensors]

    loss = subject.contrastive_loss(*tensors, given.groups.to(on.device))

    kind = on.dtype if on.dtype in (torch.float32, torch.float64) else torch.float32
    close(loss, wanted.to(on.device, kind), f"{PLAIN} in {on.dtype}")
    loss.backward()
    for name, tensor in zip(NAMES, tensors, strict=True):
        close(
            tensor.grad, gradients[name].to(on.device, on.dtype), f"{PLAIN} in {on.dtype}, backward: gradient of {name}"
        )
