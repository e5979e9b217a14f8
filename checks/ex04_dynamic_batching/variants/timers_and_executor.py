"""No thread of its own: timers run on the callers' event loops, batches in an executor of one thread."""

import asyncio
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class BatchRequest:
    """One caller's request."""

    request_id: str
    input_tokens: Tensor
    max_length: int
    timestamp: float = field(default_factory=time.monotonic)
    future: "Future[Tensor]" = field(default_factory=Future)
    overdue: bool = False


class DynamicBatcher:
    """Collects requests and runs them in batches."""

    def __init__(
        self,
        model: Any,
        max_batch_size: int = 32,
        max_wait_time: float = 0.1,
        length_tolerance: int = 32,
        *,
        max_queue_size: int = 1024,
    ) -> None:
        self.model = model
        self.max_batch_size = max_batch_size
        self.max_wait_time = max_wait_time
        self.length_tolerance = length_tolerance
        self.max_queue_size = max_queue_size
        self._executor = ThreadPoolExecutor(1)
        self._waiting: list[BatchRequest] = []
        self._lock = threading.Lock()
        self._running = self._closed = False

    def get_length_bucket(self, seq_len: int) -> int:
        """The upper edge of the bucket."""
        return -(-seq_len // self.length_tolerance) * self.length_tolerance

    async def add_request(self, request_id: str, input_tokens: Tensor, max_length: int) -> Tensor:
        """Queues a request, sets its timer, and awaits its result."""
        valid = input_tokens.dim() == 2 and input_tokens.shape[0] == 1 and input_tokens.shape[1] > 0
        if not valid or input_tokens.dtype != torch.int64 or max_length < 1:
            raise ValueError("int64 [1, L] and max_length >= 1 are wanted")
        request = BatchRequest(request_id, input_tokens, max_length)
        with self._lock:
            if self._closed:
                raise RuntimeError("the batcher is shut down")
            self._waiting = [other for other in self._waiting if not other.future.cancelled()]
            if len(self._waiting) >= self.max_queue_size:
                raise QueueFullError(f"{self.max_queue_size} requests wait")
            self._waiting.append(request)
            self._start()
        timer = asyncio.get_running_loop().call_later(self.max_wait_time, self._time_is_up, request)
        try:
            return await asyncio.wrap_future(request.future)
        finally:
            timer.cancel()

    def shutdown(self) -> None:
        """Serves the rest and ends the executor."""
        with self._lock:
            self._closed = True
            self._start()
        self._executor.shutdown(wait=True)

    def _time_is_up(self, request: BatchRequest) -> None:
        with self._lock:
            request.overdue = True
            self._start()

    def _start(self) -> None:
        """With the lock held: sets the executor to work, if there is work and it rests."""
        if not self._running and (batch := self._take()):
            self._running = True
            self._executor.submit(self._work, batch)

    def _work(self, batch: list[BatchRequest]) -> None:
        while batch:
            self._run(batch)
            with self._lock:
                batch = self._take()
                self._running = bool(batch)

    def _take(self) -> list[BatchRequest]:
        """With the lock held: takes the next batch that may go, if there is one."""
        while True:
            groups: dict[int, list[BatchRequest]] = {}
            for request in self._waiting:
                if not request.future.cancelled():
                    groups.setdefault(self.get_length_bucket(request.input_tokens.shape[1]), []).append(request)
            ready = (g for g in groups.values() if self._closed or g[0].overdue or len(g) >= self.max_batch_size)
            batch = next(ready, [])[: self.max_batch_size]
            self._waiting = [request for request in self._waiting if request not in batch]
            started = [request for request in batch if request.future.set_running_or_notify_cancel()]
            if started or not batch:
                return started

    def _run(self, batch: list[BatchRequest]) -> None:
        order = sorted(batch, key=lambda request: request.input_tokens.shape[1])
        width = order[-1].input_tokens.shape[1]
        ids, mask = torch.zeros(2, len(order), width, dtype=torch.int64)
        for i, request in enumerate(order):
            ids[i, -request.input_tokens.shape[1] :] = request.input_tokens
            mask[i, -request.input_tokens.shape[1] :] = 1
        try:
            output = self.model.generate(ids, mask, max(r.max_length for r in order), do_sample=False, pad_token_id=0)
        except Exception as error:
            for request in order:
                request.future.set_exception(error)
            return
        for row, request in zip(output, order, strict=True):
            start = width - request.input_tokens.shape[1]
            request.future.set_result(row[None, start : width + request.max_length])
