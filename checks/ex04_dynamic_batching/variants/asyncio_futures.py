"""Futures of the callers' own event loops; batches as wide as the bucket's upper edge; a thread that starts late."""

import asyncio
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class BatchRequest:
    """One caller's request."""

    request_id: str
    input_tokens: Tensor
    max_length: int
    timestamp: float
    future: "asyncio.Future[Tensor]"


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
        self.model, self.size, self.patience = model, max_batch_size, max_wait_time
        self.tolerance, self.capacity = length_tolerance, max_queue_size
        self.queues: dict[int, deque[BatchRequest]] = {}
        self.wake = threading.Condition(threading.RLock())
        self.thread: threading.Thread | None = None
        self.closing = False

    def get_length_bucket(self, seq_len: int) -> int:
        """The upper edge of the bucket."""
        return (seq_len + self.tolerance - 1) // self.tolerance * self.tolerance

    async def add_request(self, request_id: str, input_tokens: Tensor, max_length: int) -> Tensor:
        """Queues a request and awaits its result."""
        shape = tuple(input_tokens.shape)
        if len(shape) != 2 or shape[0] != 1 or shape[1] < 1 or input_tokens.dtype is not torch.long or max_length <= 0:
            raise ValueError(f"no valid request: {shape}, {input_tokens.dtype}, {max_length}")
        future: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        request = BatchRequest(request_id, input_tokens, max_length, time.perf_counter(), future)
        with self.wake:
            if self.closing:
                raise RuntimeError("closed")
            if sum(map(len, self.queues.values())) >= self.capacity:
                raise QueueFullError(f"{self.capacity} requests wait")
            self.queues.setdefault(self.get_length_bucket(shape[1]), deque()).append(request)
            if self.thread is None:
                self.thread = threading.Thread(target=self.work, daemon=False)
                self.thread.start()
            self.wake.notify()
        try:
            return await future
        except asyncio.CancelledError:
            with self.wake:
                for queue in self.queues.values():
                    if request in queue:
                        queue.remove(request)
            raise

    def shutdown(self) -> None:
        """Serves the rest and ends the thread."""
        with self.wake:
            self.closing = True
            self.wake.notify()
            thread = self.thread
        if thread is not None:
            thread.join()

    def work(self) -> None:
        """Runs batches until closed and empty."""
        while batch := self.take():
            try:
                rows = self.run(batch)
            except BaseException as error:
                for request in batch:
                    self.tell(request.future, lambda future, error=error: future.set_exception(error))
            else:
                for request, row in zip(batch, rows, strict=True):
                    self.tell(request.future, lambda future, row=row: future.set_result(row))

    @staticmethod
    def tell(future: "asyncio.Future[Tensor]", action: Any) -> None:
        """Acts on a future in its own loop, unless the loop or the caller has gone."""

        def act() -> None:
            if not future.done():
                action(future)

        try:
            future.get_loop().call_soon_threadsafe(act)
        except RuntimeError:
            return

    def take(self) -> list[BatchRequest]:
        """The next batch; nothing at the end."""
        with self.wake:
            while True:
                waiting = sorted((q for q in self.queues.values() if q), key=lambda q: q[0].timestamp)
                now = time.perf_counter()
                for queue in waiting:
                    if self.closing or len(queue) >= self.size or now - queue[0].timestamp >= self.patience:
                        return [queue.popleft() for _ in range(min(self.size, len(queue)))]
                if self.closing:
                    return []
                self.wake.wait(waiting[0][0].timestamp + self.patience - now if waiting else None)

    def run(self, batch: list[BatchRequest]) -> list[Tensor]:
        """One call of the model, by position, with a boolean mask."""
        lengths = [request.input_tokens.shape[1] for request in batch]
        longest, most = self.get_length_bucket(max(lengths)), max(request.max_length for request in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros(len(batch), longest, dtype=torch.bool)
        for i, (request, length) in enumerate(zip(batch, lengths, strict=True)):
            ids[i, longest - length :] = request.input_tokens[0]
            mask[i, longest - length :] = True
        output = self.model.generate(ids, mask, most, False, 0)
        rows = zip(output.unbind(), batch, lengths, strict=True)
        return [row[longest - n :][: n + request.max_length][None].clone() for row, request, n in rows]
