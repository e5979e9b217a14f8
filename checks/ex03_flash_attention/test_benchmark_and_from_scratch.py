"""The benchmark (3.8): its numbers are measured; from scratch (3.9): no prebuilt attention is reached."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter, process_time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from harness.testing import Close, Hang, Subject, Trace, forbid, prebuilt_attention, requirement

from .reference import (
    ABOUT,
    BLOCK,
    CALL,
    HALVES,
    B,
    D,
    N,
    agree,
    attend,
    build,
    call,
    inputs,
    quietly,
    reference,
    some_mask,
    standard,
    unwritten,
)

# 3.8 the benchmark

SIZES = (15, 3)  # d_model and num_heads; scores are the largest tensors from N = 64 on
KEYS = ("seq_len", "standard_seconds", "flash_seconds", "standard_peak_bytes", "flash_peak_bytes", "max_abs_error")


def benchmark(subject: Subject, *arguments: Any) -> list[dict[str, Any]]:
    """The rows of benchmark_attention, if they are such."""
    rows = subject.benchmark_attention(*arguments)
    what = f"benchmark_attention{arguments if len(arguments) > 1 else f'({arguments[0]})'}"
    assert isinstance(rows, list), f"{what}: a {type(rows).__name__} came, a list of rows was wanted"
    assert len(rows) == len(arguments[0]), f"{what}: {len(rows)} rows came, {len(arguments[0])} were wanted"
    for row in rows:
        assert isinstance(row, dict), f"{what}: a row is a {type(row).__name__}, a dict was wanted"
        for key in KEYS:
            assert key in row, f"{what}: a row lacks {key}; it has {list(row)}"
            assert type(row[key]) in (int, float), f"{what}: {key} is a {type(row[key]).__name__}, not a Python number"
    return rows


def module_peak(subject: Subject, n: int, d_model: int, heads: int, mode: Any = torch.no_grad) -> int:
    """Peak bytes of a call of FlashAttention on an x of length n."""
    attention, x = subject.FlashAttention(d_model, heads), torch.ones(1, int(n), d_model)
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
            f"block size takes {seen}, to 20 % that was wanted\nmeasure one call, its x made before, without gradients"
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
    assert came == lengths, f"benchmark_attention({lengths}): rows for {came} came, in the given order was wanted"
    times = [row[key] for row in rows for key in ("standard_seconds", "flash_seconds")]
    assert all(0 < time < 60 for time in times), f"benchmark_attention: times of {times} s came, 0 to 60 was wanted"
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
    """With one value of the flash output off, and another one by half of it, max_abs_error says so, of each call."""
    off = {SIZES: 1, (SIZES[0], 5): -2}  # by d_model and num_heads

    def spoil(call: Flash) -> None:
        size = off[call.shape[2], call.module.num_heads]
        call.output = call.output.clone()
        call.output[0, -1, 0] += size
        call.output[0, 0, 2] -= 0.5 * size

    called = watch(subject, monkeypatch, spoil)
    for sizes, size in off.items():
        try:
            row = benchmark(subject, [64], *sizes)[0]
        except AssertionError as error:
            if str(error).startswith("benchmark_attention"):
                raise
            return  # A benchmark may itself insist that the outputs agree.

        assert called, "benchmark_attention: no FlashAttention is called"
        assert abs(row["max_abs_error"] - abs(size)) < 1e-3, (
            f"benchmark_attention: with one flash output off by {size} and another one by {-0.5 * size}, "
            f"max_abs_error is {row['max_abs_error']:.3g}, not {abs(size)}\n"
            "it is the largest absolute difference between the two outputs, measured in this call"
        )


@requirement("3.8")
def test_seconds_are_those_of_the_call(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """If flash calls take 1 ms more, flash_seconds says so, standard_seconds does not, and they are of one call."""

    delays = [1e-3]

    def delay(call: Flash) -> None:
        start = process_time()
        while process_time() < start + delays[0]:  # CPU time: less than what any clock says.
            pass

    def without_delay() -> str:
        delays[0] = 0
        if benchmark(subject, [32], *SIZES)[0]["standard_seconds"] < 1e-3:
            return "FlashAttention was slowed down by 1 ms, and standard_seconds rose with it"
        return "it is the time of one call of the standard form, in seconds; FlashAttention's has no part in it"

    called = watch(subject, monkeypatch, delay)
    for _ in range(12):  # A busy machine may interrupt what takes 0.1 ms, too: not twelve times.
        called.clear()
        row = benchmark(subject, [32], *SIZES)[0]
        flash, plain = row["flash_seconds"], row["standard_seconds"]
        longest = max((call.seconds for call in called if not call.traced), default=0.0)
        if plain < 1e-3 <= flash < 1.5 * longest or flash < 1e-3:
            break

    came = {call.shape for call in called}
    assert (1, 32, SIZES[0]) in came, (
        f"benchmark_attention([32], {SIZES[0]}, {SIZES[1]}): x of shapes {came} came, (1, 32, 15) was wanted"
    )
    assert flash >= 1e-3, (
        f"benchmark_attention: a call of FlashAttention takes over 0.001 s, flash_seconds is {flash:.3g}\n"
        "it is the time of one call of the flash module, in seconds"
    )
    assert flash < 1.5 * longest, (
        f"benchmark_attention: calls of FlashAttention take at most {longest:.3g} s, flash_seconds is {flash:.3g}\n"
        "times are those of one call, in seconds"
    )
    assert plain < 1e-3, (
        f"benchmark_attention([32], {SIZES[0]}, {SIZES[1]}): standard_seconds of {plain:.3g} came, less than 0.001 was "
        f"wanted\n{quietly(without_delay)}"
    )
    assert not any(call.output.requires_grad for call in called), (
        "benchmark_attention: gradients are recorded; it measures inference"
    )
    assert called[-1].spread > 1e-3, (
        f"benchmark_attention: x has a standard deviation of {called[-1].spread:.3g}; a random x was wanted"
    )


# 3.9 from scratch


def reaches_none(stages: dict[str, Callable[[], Any]]) -> None:
    """Runs these while every prebuilt attention raises. After a failure each alone, to say which one it was."""
    try:
        with forbid(prebuilt_attention(), f"{CALL}, forward or backward"):
            for stage in stages.values():
                stage()
    except Hang:
        raise
    except AssertionError:
        for words, stage in stages.items():
            with forbid(prebuilt_attention(), words):
                stage()
        raise


@requirement("3.9")
def test_forward_reaches_no_prebuilt_attention(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """flash_attention_forward, forward and training give the right values while every prebuilt attention raises."""
    x = torch.randn(B, N, D, generator=rng, dtype=torch.float64)
    mask = some_mask((B, 1, 1, N), rng)
    attention = build(subject)
    expected = standard(attention, x, mask, causal=True).detach()

    def attends(hidden: Tensor | None = None, causal: bool = False, n: int = N, m: int = N) -> None:
        sized = build(subject, 1) if 1 in (n, m) else attention.train()
        given = inputs(rng, n, m)
        with torch.no_grad() if (n, m) == (N, N) else torch.inference_mode():
            agree(close, sized, given, hidden, causal, tolerance=ABOUT)

    def whole(training: bool, mode: Callable[[], Any] = torch.no_grad) -> None:
        attention.train(training)
        with mode():
            close(call(attention, x, mask, causal=True), expected, "forward", tolerance=ABOUT)

    how = "float64, under no_grad, in training"
    stages: dict[str, Callable[[], Any]] = {
        f"{CALL} ({how}, no mask, causal = False)": attends,
        f"{CALL} ({how}, no mask, causal = True)": partial(attends, causal=True),
        f"{CALL} ({how}, with a mask, causal = False)": partial(attends, mask),
    }
    for n, m in ((1, 1), (1, N), (N, 1), (4, 20), (20, 4)):  # As in decoding, which asks for no gradients.
        words = f"float64, under inference_mode, in training, N = {n}, M = {m}"
        stages[f"{CALL} ({words})"] = partial(attends, n=n, m=m)
    stages[f"forward ({how})"] = partial(whole, True)
    stages["forward (float64, under no_grad, in eval)"] = partial(whole, False)
    stages["forward (float64, under inference_mode, in eval)"] = partial(whole, False, torch.inference_mode)
    reaches_none(stages)


@requirement("3.9")
def test_training_reaches_no_prebuilt_attention(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """So they do in every dtype, at inference and in training."""
    dtypes = (torch.float64, torch.float32, *HALVES)
    given = {dtype: inputs(rng, BLOCK, N, dtype) for dtype in dtypes}
    attentions: dict[torch.dtype, Any] = {}
    came: dict[tuple[torch.dtype, str], Tensor] = {}

    def infer(dtype: torch.dtype) -> None:
        attentions[dtype] = build(subject, dtype=dtype)
        for x in given[dtype]:
            x.requires_grad_(False)
        with torch.inference_mode():
            came[dtype, ""], _ = attend(attentions[dtype], given[dtype])

    def train(dtype: torch.dtype) -> None:
        came[dtype, ", in training"], _ = attend(attentions[dtype], [x.requires_grad_() for x in given[dtype]])

    def backward(dtype: torch.dtype) -> None:
        output = came[dtype, ", in training"]
        if output.requires_grad:
            torch.autograd.grad(output.sum(), given[dtype], allow_unused=True)

    stages: dict[str, Callable[[], Any]] = {}
    for dtype in dtypes:
        stages[f"{CALL} ({dtype}, under inference_mode)"] = partial(infer, dtype)
        stages[f"{CALL} ({dtype}, with gradients, in training)"] = partial(train, dtype)
        stages[f"backward ({dtype})"] = partial(backward, dtype)
    with unwritten(given[torch.float64]), unwritten(given[torch.float32]):
        reaches_none(stages)
        for (dtype, how), output in came.items():
            expected, tolerance = reference(given[dtype])[0], 5e-2 if dtype in HALVES else ABOUT
            close(output.double(), expected, f"{CALL} in {dtype}{how}: output", tolerance=tolerance)


@requirement("3.9")
def test_the_benchmark_reaches_no_prebuilt_attention(subject: Subject) -> None:
    """The benchmark's standard form is written by hand too."""
    with forbid(prebuilt_attention(), "benchmark_attention"):
        rows = subject.benchmark_attention([16], *SIZES)

    assert rows, "benchmark_attention([16]): no row came, one was wanted"
