"""Bench of ex06: memory and time of a training step over the layers that are checkpointed, and a real memory limit.

On one thread, so that other work on the machine disturbs the times less.
"""

import importlib.util
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from harness.testing import Case, Run, Series, Trace

X = "layers that are checkpointed"
REFERENCE = "none"
CAPTION = "4 rows of 128 tokens, d_model 64, on one thread"
SECONDS = 55
HIGHER_IS_BETTER = ()
DEPTH = 16
DEPTHS = (4, 8, 16, 32)
CHOSEN = "16 layers, every 4th, 2nd, every one"
DEEPER = "deeper models, every layer"
VOCABULARY, WIDTH, HEADS = 64, 64, 4
BATCH, LENGTH = 4, 128
STEPS = 3
TIMEOUT = 60.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Wrap = Callable[[nn.Module, int], None]
_FILES: dict[str, str] = {}


class Model(nn.Module):
    """A small language model over encoder layers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.1, batch_first=True) for _ in range(depth)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Recomputed(nn.Module):
    """A layer under torch.utils.checkpoint."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.layer, x, use_reentrant=False)


def cases(modules: Mapping[str, ModuleType]) -> Iterable[Case]:
    """A training step of a model of 16 layers, by how many are checkpointed; and of models of several depths."""
    torch.set_num_threads(1)
    _FILES.update({name: str(module.__file__) for name, module in modules.items()})
    wraps: dict[str, Wrap] = {"none": lambda model, n: None}
    wraps |= {name: _selective(module) for name, module in modules.items()}
    wraps["torch"] = _torch
    for n in (4, 2, 1):
        runs = {name: _step(DEPTH, n, wrap) for name, wrap in wraps.items()}
        yield Case(CHOSEN, DEPTH // n, runs, memory=True)
    for depth in DEPTHS:
        runs = {name: _step(depth, 1, wrap) for name, wrap in wraps.items()}
        yield Case(DEEPER, depth, runs, memory=True)


def conclude(measured: Sequence[Series]) -> Iterable[str]:
    """What every layer costs and saves; then whether training fits under a real limit."""
    found = {(series.panel, series.metric): series.values for series in measured}
    for name in ("yours", "answer", "torch"):
        try:
            memory, time = (
                found[CHOSEN, metric][name][DEPTH] / found[CHOSEN, metric]["none"][DEPTH]
                for metric in ("peak bytes", "seconds")
            )
        except KeyError:
            continue
        yield f"every one of {DEPTH} layers, {name}: {memory:.2f} of plain training's memory, {time:.2f} of its time"
    yield from _under_a_limit()


def _selective(module: ModuleType) -> Wrap:
    return lambda model, n: module.SelectiveCheckpointing(n).apply_checkpointing(model)


def _torch(model: Any, n: int) -> None:
    for number in range(0, len(model.layers), n):
        model.layers[number] = Recomputed(model.layers[number])


def _step(depth: int, n: int, wrap: Wrap) -> Run:
    """A run that makes its model when it is called first: what cannot wrap is left out of its case only."""
    made: list[nn.Module] = []
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), device=DEVICE)

    def run() -> None:
        if not made:
            torch.manual_seed(0)
            model = Model(depth).to(DEVICE)
            wrap(model, n)
            made.append(model)
        made[0].zero_grad()
        functional.cross_entropy(made[0](tokens).flatten(0, 1), tokens.roll(1).flatten()).backward()

    return run


def _under_a_limit() -> Iterable[str]:
    """Trains in processes of their own that may allocate more than checkpointed, and less than plain training needs."""
    if sys.platform != "linux":
        yield "a real limit on memory is set on Linux only"
        return
    peaks = [_peak_on_the_cpu(wrap) for wrap in (lambda model, n: None, _torch)]
    # In between on a scale of ratios, so that either side is the same factor away.
    limit = math.sqrt(math.prod(peaks))
    plain = _trained("none", limit)
    yield (
        f"a real limit: the process may take {limit / 1e6:.0f} MB beyond what torch and the model hold "
        f"(tensors at once: {peaks[0] / 1e6:.0f} MB in plain training, {peaks[1] / 1e6:.0f} MB with every layer "
        f"checkpointed by torch)\n  plain training {plain}"
    )
    for name, file in _FILES.items():
        yield f"  training checkpointed by {name} {_trained(file, limit)}"


def _peak_on_the_cpu(wrap: Wrap) -> int:
    model = Model(DEPTH)
    wrap(model, 1)
    with Trace() as seen:
        _train(model, 1, LENGTH)
    return seen.peak_bytes


def _trained(code: str, limit: float) -> str:
    """What becomes of a training under the limit."""
    command = [sys.executable, "-P", "-W", "ignore", __file__, code, str(int(limit))]
    # One thread, and large blocks that go back when they are freed: what is counted is what is used.
    surroundings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    surroundings |= {"PYTHONPATH": str(Path(__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, env={**os.environ, **surroundings}
        )
    except subprocess.TimeoutExpired:
        return f"does not end within {TIMEOUT:g} s"
    if ended.returncode == 0:
        return ended.stdout.strip()
    lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
    return f"ends in {next((line for line in reversed(lines) if 'Error' in line), lines[-1])[:200]}"


def _train(model: nn.Module, steps: int, length: int) -> list[float]:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.randint(VOCABULARY, (BATCH, length))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1).flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _main(code: str, limit: int) -> None:
    """In a process of its own: a model, a small step, which makes all that is made once, the limit, training."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Model(DEPTH)
    if code != "none":
        spec = importlib.util.spec_from_file_location("code", code)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _selective(module)(model, 1)
    _train(model, 1, 8)
    held = 1024 * int(Path("/proc/self/status").read_text().partition("VmData:")[2].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (held + limit, held + limit))
    losses = _train(model, STEPS, LENGTH)
    print(f"does {STEPS} steps, with losses {', '.join(f'{loss:.3f}' for loss in losses)}")


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
