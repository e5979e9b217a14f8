"""Bench of ex04: throughput and latency of a batcher over the load, beside a queue that serves one by one."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from harness.testing import Case, Run, Series

X = "load"
REFERENCE = "one by one"
CAPTION = "48 requests, a batch of at most 8, the given Decoder on one thread"
SECONDS = 30
HIGHER_IS_BETTER = ("requests per second", "tokens per second")
REQUESTS, RATES = 48, (0.5, 2.0, 8.0)
WAITING = (3, 12, 48)
ARRIVING, AT_ONCE = "arriving", "waiting at once"
BATCH, PATIENCE = 8, 60.0

_Asked = list[tuple[Tensor, int]]
_differ: dict[str, int] = {}


class OneByOne:
    """Serves requests in the order in which they come, each alone."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._queue: queue.SimpleQueue[tuple[Tensor, int, Future[Tensor]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    async def add_request(self, request_id: str, input_tokens: Tensor, max_length: int) -> Tensor:
        """Queues a request, and returns its result."""
        future: Future[Tensor] = Future()
        self._queue.put((input_tokens, max_length, future))
        return await asyncio.wrap_future(future)

    def shutdown(self) -> None:
        """Ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (request := self._queue.get()) is not None:
            tokens, new, future = request
            future.set_result(self._model.generate(tokens, torch.ones_like(tokens), new, False, 0))


def cases(modules: Mapping[str, ModuleType]) -> Iterable[Case]:
    """A mix of short and long prompts that come at three rates, and some that all wait."""
    if not modules:
        return
    torch.manual_seed(0)
    torch.set_num_threads(1)  # The model is too small for several.
    decoder = list(modules.values())[-1].Decoder()
    short, long = torch.randint(25, 33, (REQUESTS,)), torch.randint(90, 97, (REQUESTS,))
    lengths = torch.where(torch.arange(REQUESTS) % 3 == 2, long, short).tolist()
    asked = [(torch.randint(97, (1, length)), 6 + i % 5) for i, length in enumerate(lengths)]
    alone = [decoder.generate(prompt, max_new_tokens=new) for prompt, new in asked]
    alone_run = _serving(REFERENCE, lambda: OneByOne(decoder), asked, alone, [0.0] * REQUESTS)
    second = 1 / max((alone_run() or {})["requests per second"] for _ in range(8))  # what one request takes alone
    builds: dict[str, Callable[[], Any]] = {REFERENCE: lambda: OneByOne(decoder)}
    for name, module in modules.items():
        builds[name] = _building(module, decoder, second)
    pauses = torch.empty(REQUESTS).exponential_()
    for rate in RATES:
        times = ((pauses.cumsum(0) - pauses[0]) * second / rate).tolist()
        runs = {name: _serving(name, build, asked, alone, times) for name, build in builds.items()}
        yield Case(ARRIVING, rate, runs, timed=False)
    for count in WAITING:
        runs = {name: _serving(name, build, asked[:count], alone, [0.0] * count) for name, build in builds.items()}
        yield Case(AT_ONCE, count, {name: _in_short(run) for name, run in runs.items()}, timed=False)


def conclude(measured: Sequence[Series]) -> Iterable[str]:
    """What a load is, whether the outputs are those of one by one, and what batching gains."""
    yield f"load: {ARRIVING}, arrivals over what one by one can serve; {AT_ONCE}, the number of requests"
    for name, count in _differ.items():
        if name != REFERENCE:
            yield f"{name}: {f'{count} outputs differ from' if count else 'all outputs equal'} those of one by one"
    for series in measured:
        answer, alone = (series.values.get(name, {}).get(WAITING[-1]) for name in ("answer", REFERENCE))
        if series.panel == AT_ONCE and series.metric == "tokens per second" and answer and alone:
            yield (
                f"with {WAITING[-1]} requests waiting at once the answer makes {answer / alone:.1f} times the tokens "
                "per second of one by one; at least 2.5 times is claimed"
            )


def _building(module: ModuleType, decoder: Any, second: float) -> Callable[[], Any]:
    return lambda: module.DynamicBatcher(decoder, max_batch_size=BATCH, max_wait_time=2 * second)


def _serving(name: str, build: Callable[[], Any], asked: _Asked, alone: list[Tensor], times: list[float]) -> Run:
    """One run: the requests come at these times, in seconds; numbers by name."""

    async def serve(batcher: Any, begin: float) -> list[tuple[float, Tensor]]:
        async def one(index: int) -> tuple[float, Tensor]:
            await asyncio.sleep(begin + times[index] - time.perf_counter())
            came = time.perf_counter()
            result = await batcher.add_request(str(index), *asked[index])
            return time.perf_counter() - came, result

        return await asyncio.gather(*(one(index) for index in range(len(asked))))

    def run() -> Mapping[str, float]:
        batcher = build()
        begin = time.perf_counter()
        served = _within(PATIENCE, lambda: asyncio.run(serve(batcher, begin)))
        seconds = time.perf_counter() - begin
        _within(PATIENCE, batcher.shutdown)
        latencies = 1e3 * torch.tensor([latency for latency, _ in served])
        wrong = sum(not torch.equal(result, right) for (_, result), right in zip(served, alone, strict=False))
        _differ[name] = _differ.get(name, 0) + wrong
        return {
            "requests per second": len(asked) / seconds,
            "tokens per second": sum(new for _, new in asked) / seconds,
            "p50, ms": latencies.quantile(0.5).item(),
            "p99, ms": latencies.quantile(0.99).item(),
        }

    return run


def _in_short(run: Run) -> Run:
    return lambda: {name: value for name, value in (run() or {}).items() if name in ("tokens per second", "p99, ms")}


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """What a function returns or raises, in a thread of its own, so that one that hangs is left behind."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future.result(seconds)
