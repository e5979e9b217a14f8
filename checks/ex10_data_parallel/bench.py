"""Steps of real processes that meet by gloo: one call per gradient, one for all, buckets with and without overlap."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from harness.testing import Case, Series, Trace

X = "ranks"
REFERENCE = "torch"
CAPTION = "10 million parameters in 52 tensors, processes that meet by gloo"
SECONDS = 25
HIGHER_IS_BETTER = ()
STEP, OPTIMIZER, HELD = "forward, backward and averages", "a step of AdamW", "AdamW's state on a rank"
WIDTH, LAYERS, ROWS = 620, 26, 32
STEPS = 3  # For each turn of a contestant.
# Caps in MiB: the default, one bucket for each parameter, one for all.
MODES = {"": 25.0, "one call each": 1e-6, "one call for all": 1e6, "no overlap": 25.0}
_names: list[str] = []
_fleets: dict[int, "Fleet"] = {}


class Fleet:
    """Processes that form one group, and do what they are told."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        command = [sys.executable, "-P", "-W", "ignore", __file__, str(size), str(Path(self._folder.name) / "store")]
        surroundings = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        self._processes = [
            subprocess.Popen(
                [*command, str(rank)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=surroundings,
            )
            for rank in range(size)
        ]

    def tell(self, **words: Any) -> dict[str, float]:
        """Has all processes do one thing; what rank 0 says of it."""
        for process in self._processes:
            assert process.stdin is not None
            print(json.dumps(words), file=process.stdin, flush=True)
        said = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            said.append(json.loads(line) if line else {"error": "a process has ended"})
        if error := next((str(one["error"]) for one in said if "error" in one), ""):
            raise RuntimeError(error)
        return dict(said[0])

    def end(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._folder.cleanup()


class Told:
    """One contestant at one place: made in its processes at the first run."""

    def __init__(self, size: int, what: str, path: str, mode: str = "") -> None:
        self.size, self.words = size, {"what": what, "path": path, "mode": mode}

    def __call__(self) -> Mapping[str, float]:
        """Runs once."""
        if self.size not in _fleets:
            _fleets[self.size] = Fleet(self.size)
        return _fleets[self.size].tell(**self.words)


class Held:
    """What an optimizer leaves alive on a rank, at most; ranks are threads here, which hold the same."""

    def __init__(self, module: ModuleType | None, size: int) -> None:
        self.module, self.size, self.most = module, size, 0

    def __call__(self) -> Mapping[str, float]:
        """Measures once."""
        if not self.most:
            self.most = max(self.module.run_ranks(self.size, self.on_rank)) if self.module else self.on_rank(0)
        return {"state bytes": self.most}

    def on_rank(self, rank: int) -> int:
        """Bytes after a step."""
        model = network()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
        with Trace() as seen:
            kind: Any = self.module.ShardedOptimizer if self.module else torch.optim.AdamW
            optimizer = kind(model.parameters())
            optimizer.step()
        return seen.alive_bytes


def cases(modules: Mapping[str, ModuleType]) -> Iterator[Case]:
    """Steps on 2 ranks, and what the optimizer holds on 1, 2 and 4; with FULL=1 steps on 4 ranks, too."""
    _names[:] = list(modules)
    paths = {name: str(module.__file__) for name, module in modules.items()}
    given = paths.get("answer") or paths["yours"]
    for size in (2, 4):
        runs = {REFERENCE: Told(size, STEP, "")}
        runs |= {name: Told(size, STEP, path) for name, path in paths.items()}
        runs |= {mode: Told(size, STEP, given, mode) for mode in MODES if mode}
        yield Case(STEP, size, runs, long=size != 2)
        steps = {REFERENCE: Told(size, OPTIMIZER, ""), "unsharded": Told(size, OPTIMIZER, "", "unsharded")}
        steps |= {name: Told(size, OPTIMIZER, path) for name, path in paths.items()}
        yield Case(OPTIMIZER, size, steps, long=size != 2)
    for size in (1, 2, 4):
        alone = {"unsharded": Held(None, size)}
        yield Case(HELD, size, alone | {name: Held(module, size) for name, module in modules.items()}, timed=False)


def conclude(measured: Sequence[Series]) -> Iterator[str]:
    """What overlap and buckets bring, and what is held."""
    for fleet in _fleets.values():
        fleet.end()
    _fleets.clear()
    found = {(one.panel, one.metric): one.values for one in measured}
    seconds, held = found.get((STEP, "seconds"), {}), found.get((HELD, "state bytes"), {})
    for name in _names:
        if 2 not in seconds.get(name, {}) or 2 not in seconds.get(REFERENCE, {}):
            continue
        own = seconds[name][2]
        others = {mode: seconds[mode][2] / own for mode in MODES if 2 in seconds.get(mode, {})}
        shares = ", ".join(f"{mode} {ratio:.2f} times its time" for mode, ratio in others.items())
        yield f"{name} on 2 ranks: a step takes {own / seconds[REFERENCE][2]:.2f} of DDP's; {shares}"
        if 4 in held.get(name, {}):
            bytes_ = ", ".join(f"{held[name][n] / held['unsharded'][n]:.0%} on {n:g}" for n in sorted(held[name]))
            yield f"{name}: of the optimizer's bytes each rank holds at most {bytes_}"


# In the processes of a fleet


class Worker:
    """A rank: it makes contestants and runs them."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}
        self.calls = 0
        all_reduce = dist.all_reduce

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return all_reduce(*args, **kwargs)

        dist.all_reduce = counted

    def run(self, what: str, path: str, mode: str) -> dict[str, float]:
        """A run of a contestant: a step's seconds, the median of some, and what it says of the last."""
        key = json.dumps([what, path, mode])
        if key not in self.made:
            self.made = {one: made for one, made in self.made.items() if one.startswith(f'["{what}"')}
            self.made[key] = (Training if what == STEP else Stepping)(path, mode, self)
            self.made[key].run()  # Some make buckets anew after their first step.
        one, seconds, numbers = self.made[key], [], {}
        for _ in range(STEPS):
            dist.barrier()
            begin = time.perf_counter()
            numbers = one.run()
            seconds.append(time.perf_counter() - begin)
        return {**numbers, "seconds": statistics.median(seconds)}


def network() -> nn.Sequential:
    """About 10 million parameters in 52 tensors."""
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*layers)


def loaded(path: str) -> ModuleType:
    """A contestant's file."""
    spec = importlib.util.spec_from_file_location("contestant", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Training:
    """Forward, backward and the averages."""

    def __init__(self, path: str, mode: str, worker: Worker) -> None:
        model = network()
        self.worker, self.quiet = worker, mode == "no overlap"
        self.x: Tensor = torch.randn(ROWS, WIDTH)
        self.by_torch = not path
        self.parallel: Any = (
            loaded(path).DataParallel(model, bucket_cap_mb=MODES[mode])
            if path
            else nn.parallel.DistributedDataParallel(model)
        )

    def run(self) -> dict[str, float]:
        """One step."""
        self.worker.calls = 0
        self.parallel.zero_grad()
        if self.quiet:
            with self.parallel.no_sync():
                self.parallel(self.x).square().mean().backward()
        else:
            self.parallel(self.x).square().mean().backward()
        if not self.by_torch:
            self.parallel.finish()
            return {"calls": self.worker.calls}
        sizes = self.parallel._get_ddp_logging_data().get("rebuilt_bucket_sizes", "")
        return {"calls": len(sizes.split(","))} if sizes else {}  # It makes them anew after the first step.


class Stepping:
    """A step of the optimizer."""

    def __init__(self, path: str, mode: str, worker: Worker) -> None:
        del worker
        self.model = network()
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
        if mode:
            self.optimizer: Any = torch.optim.AdamW(self.model.parameters())
        elif path:
            self.optimizer = loaded(path).ShardedOptimizer(self.model.parameters(), torch.optim.AdamW)
        else:
            self.optimizer = ZeroRedundancyOptimizer(self.model.parameters(), torch.optim.AdamW)

    def run(self) -> dict[str, float]:
        """One step."""
        self.optimizer.step()
        return {}


def serve(size: int, store: str, rank: int) -> None:
    """A process of a fleet: reads what to do, says what came of it."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    worker = Worker()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What a contestant prints is no answer.
    for line in sys.stdin:
        try:
            said: dict[str, Any] = worker.run(**json.loads(line))
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), file=out, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
