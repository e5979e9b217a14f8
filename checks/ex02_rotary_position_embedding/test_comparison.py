"""The comparison (2.5): the sinusoidal embedding, and how far a shift changes the scores of both."""

from copy import deepcopy
from math import cos, sin

import pytest
import torch
from torch import Tensor

from harness.testing import Close, Subject, halfway, is_tensor, requirement, seed

from .reference import NEAR, ROUGH, angles_of


def sinusoidal(positions: Tensor, dim: int) -> Tensor:
    """The paper's embedding in float64: [L, dim]."""
    angles = angles_of(positions, dim)
    out = torch.empty(len(positions), dim, dtype=torch.float64)
    out[:, 0::2], out[:, 1::2] = angles.sin(), angles.cos()
    return out


@requirement("2.5")
def test_sinusoidal_by_hand(subject: Subject, close: Close) -> None:
    """Positions 0 and 1 with dim 4: the frequencies are 1 and 0.01."""
    expected = torch.tensor([[0, 1, 0, 1], [sin(1), cos(1), sin(0.01), cos(0.01)]], dtype=torch.float64)

    embed, what = subject.sinusoidal_position_embedding, "sinusoidal_position_embedding(2, 4)"
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)  # A table that is kept may be cast to it: then no cast copies it.
        with torch.no_grad():
            is_tensor(embed(2, 4), what).fill_(7)
    table = is_tensor(embed(2, 4), what)

    hint = "sin stands at the even features, cos at the odd ones: [sin 1, cos 1, sin 0.01, cos 0.01] at position 1"
    close(table.double(), expected, what, tolerance=NEAR, hint=hint)


@requirement("2.5")
def test_sinusoidal_equals_the_paper(subject: Subject, close: Close) -> None:
    """Feature 2i is sin(p / 10000**(2i/dim)), feature 2i + 1 its cosine, whatever sizes were asked for before."""
    sizes = [(1, 2), (7, 6), (21, 2), (7, 14), (61, 14), (61, 6), (300, 130), (7, 6)]
    for number, (seq_len, dim) in enumerate(sizes):
        what = f"sinusoidal_position_embedding({seq_len}, {dim})"

        table = is_tensor(subject.sinusoidal_position_embedding(seq_len, dim), what)

        hint = "features 2i and 2i + 1 share the frequency 10000**(-2i/dim)"
        if number:
            hint += f"\nsizes asked for before: {sizes[:number]}; is a table kept, and for what?"
        assert table.dtype in (torch.float32, torch.float64), (
            f"{what}: {table.dtype} came, float32 or float64 was wanted"
        )
        close(table.double(), sinusoidal(torch.arange(seq_len), dim), what, tolerance=NEAR, hint=hint)


@requirement("2.5")
def test_sinusoidal_has_no_end(subject: Subject, close: Close) -> None:
    """Positions beyond 5,000, the length of the paper's first code, are embedded too."""
    expected = sinusoidal(torch.arange(5003), 4)[4995:]

    table = is_tensor(subject.sinusoidal_position_embedding(5003, 4), "sinusoidal_position_embedding(5003, 4)")

    assert table.shape == (5003, 4), (
        f"sinusoidal_position_embedding(5003, 4): shape {tuple(table.shape)} came, (5003, 4) was wanted"
    )
    close(table[4995:].double(), expected, "sinusoidal_position_embedding(5003, 4)[4995:]", tolerance=ROUGH)


@halfway
@requirement("2.5")
@pytest.mark.parametrize("dim", [2, 32])
def test_comparison_depends_on_nothing_else(subject: Subject, dim: int) -> None:
    """The same arguments give the same numbers, wherever torch's and Python's own random streams stand."""
    seed(5)
    result = subject.compare_position_embeddings(7, dim, 3)
    before = deepcopy(result)
    if isinstance(result, dict):
        result.clear()  # What a caller does to a result is no matter of the next call.
    seed(7)

    after = subject.compare_position_embeddings(7, dim, 3)

    assert before == after, (
        f"compare_position_embeddings(7, {dim}, 3): {before} came, then {after} with the same arguments\n"
        "query and key come from a generator of their own, and nothing else is drawn"
    )


def sinusoidal_change(seq_len: int, dim: int, shift: int) -> float:
    """The largest change of a score with the sinusoidal embedding added, in float64."""
    query, key = torch.randn(2, dim, generator=torch.Generator().manual_seed(0)).double()
    table = sinusoidal(torch.arange(seq_len + shift), dim)
    scores = (query + table) @ (key + table).T
    return float((scores[shift:, shift:] - scores[:seq_len, :seq_len]).abs().max())


SIZES = [
    {},
    {"seq_len": 11, "dim": 6, "shift": 5},
    {"seq_len": 320, "dim": 14, "shift": 100},  # The largest change is that of positions 313 and 75.
    {"seq_len": 1, "dim": 2, "shift": 1},
    {"seq_len": 2, "dim": 34, "shift": 300},
]


@requirement("2.5")
@pytest.mark.parametrize("arguments", SIZES, ids=lambda sizes: "-".join(map(str, sizes.values())) or "defaults")
def test_comparison_is_measured(subject: Subject, arguments: dict[str, int]) -> None:
    """The sinusoidal change is what this check measures; the rotary change is near 0, but not 0."""
    seq_len, dim, shift = ({"seq_len": 64, "dim": 32, "shift": 16} | arguments).values()
    expected = sinusoidal_change(seq_len, dim, shift)
    compare = subject.compare_position_embeddings
    seed(11)  # Not the seed that the text asks for: what is drawn from the global stream is something else.

    result = compare(**arguments)

    what = f"compare_position_embeddings({', '.join(f'{name}={value}' for name, value in arguments.items())})"
    assert isinstance(result, dict) and set(result) == {"rope", "sinusoidal"}, (
        f"{what}: {result!r} came, a dict with the keys 'rope' and 'sinusoidal' was wanted"
    )
    for name, value in result.items():
        assert type(value) in (int, float), f"{what}: {name}: a {type(value).__name__} came, a Python float was wanted"
    assert abs(result["sinusoidal"] - expected) <= 1e-3, (
        f"{what}: sinusoidal {result['sinusoidal']:.4f} came, {expected:.4f} was wanted\n"
        "the largest absolute change of (query + table[i]) · (key + table[j]) over all pairs, if i and j move by shift"
        + (f"\nseq_len=1: only the pair (0, 0) counts, against ({shift}, {shift})" if seq_len == 1 else "")
    )
    assert result["rope"] <= 1e-3, (
        f"{what}: rope {result['rope']:.4g} came, at most 1e-3 was wanted\n"
        "turned scores depend on the distance alone, up to the rounding of float32 tables"
    )
    if seq_len < 9:  # Of few numbers all may be exact.
        return
    assert result["rope"] > 0, (
        f"{what}: rope {result['rope']} came, more than 0 was wanted: float arithmetic rounds; was anything turned?"
    )
    assert result["rope"] != round(result["rope"], 12), (
        f"{what}: rope {result['rope']!r} came, an unrounded number was wanted\n"
        f"rope is exactly {result['rope']!r}: is it measured, and returned unrounded?"
    )


@requirement("2.5")
def test_comparison_depends_on_its_arguments(subject: Subject) -> None:
    """Each of several comparisons in a row is measured for its own length, dim and shift, not for one before."""
    compare, ropes = subject.compare_position_embeddings, set()
    # Neighbours share length and dim, dim and the sum of the others, dim and shift, length and shift, or all numbers.
    for sizes in ((23, 32, 40), (23, 32, 16), (7, 32, 32), (5, 32, 32), (5, 130, 32), (32, 130, 5)):
        came, wanted = compare(*sizes), sinusoidal_change(*sizes)

        assert abs(came["sinusoidal"] - wanted) <= 1e-3, (
            f"compare_position_embeddings{sizes}: sinusoidal {came['sinusoidal']:.4f} came, {wanted:.4f} was wanted\n"
            "other sizes were compared before: is a result kept for less than all of seq_len, dim and shift?"
        )
        if sizes[1] == 32:
            ropes.add(came["rope"])

    assert len(ropes) > 1, (
        f"compare_position_embeddings: rope is {ropes} for every seq_len and shift of dim 32\n"
        "measure it each time, as for sinusoidal"
    )
