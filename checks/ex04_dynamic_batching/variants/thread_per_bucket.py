"""A thread per bucket; all share one condition, and the device goes to the bucket with the oldest request."""

import asyncio
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(eq=False)
class BatchRequest:
    """One caller's request."""

    request_id: str
    input_tokens: Tensor
    max_length: int
    timestamp: float = field(default_factory=time.monotonic)
    future: "Future[Tensor]" = field(default_factory=Future)


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
        self._queues: dict[int, list[BatchRequest]] = {}
        self._threads: list[threading.Thread] = []
        self._condition = threading.Condition()
        self._busy = False
        self._closed = False

    def get_length_bucket(self, seq_len: int) -> int:
        """The upper edge of the bucket."""
        return ((seq_len - 1) // self.length_tolerance + 1) * self.length_tolerance

    async def add_request(self, request_id: str, input_tokens: Tensor, max_length: int) -> Tensor:
        """Queues a request with its bucket and awaits its result."""
        if input_tokens.dtype != torch.int64:
            raise ValueError(f"int64 is wanted, not {input_tokens.dtype}")
        if input_tokens.ndim != 2 or input_tokens.shape[0] != 1 or input_tokens.shape[1] == 0:
            raise ValueError(f"[1, L] is wanted, not {list(input_tokens.shape)}")
        if max_length < 1:
            raise ValueError(f"max_length {max_length} is not positive")
        request = BatchRequest(request_id, input_tokens, max_length)
        with self._condition:
            if self._closed:
                raise RuntimeError("the batcher is shut down")
            self._prune()
            if sum(len(queue) for queue in self._queues.values()) >= self.max_queue_size:
                raise QueueFullError(f"{self.max_queue_size} requests wait")
            bucket = self.get_length_bucket(input_tokens.shape[1])
            if bucket not in self._queues:
                self._queues[bucket] = []
                self._threads.append(threading.Thread(target=self._serve, args=(bucket,)))
                self._threads[-1].start()
            self._queues[bucket].append(request)
            self._condition.notify_all()
        return await asyncio.wrap_future(request.future)

    def shutdown(self) -> None:
        """Serves the rest and ends the threads."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    def _prune(self) -> None:
        for queue in self._queues.values():
            queue[:] = [request for request in queue if not request.future.cancelled()]

    def _may_go(self, queue: list[BatchRequest]) -> bool:
        if not queue:
            return False
        overdue = time.monotonic() - queue[0].timestamp >= self.max_wait_time
        return self._closed or overdue or len(queue) >= self.max_batch_size

    def _serve(self, bucket: int) -> None:
        while batch := self._next(bucket):
            try:
                if started := [request for request in batch if request.future.set_running_or_notify_cancel()]:
                    self._run(started)
            finally:
                with self._condition:
                    self._busy = False
                    self._condition.notify_all()

    def _next(self, bucket: int) -> list[BatchRequest]:
        queue = self._queues[bucket]
        with self._condition:
            while True:
                self._prune()
                if self._closed and not queue:
                    return []
                ready = [other for other in list(self._queues.values()) if self._may_go(other)]
                if ready and not self._busy and min(ready, key=lambda other: other[0].timestamp) is queue:
                    self._busy = True
                    batch = queue[: self.max_batch_size]
                    del queue[: self.max_batch_size]
                    self._condition.notify_all()
                    return batch
                due = queue[0].timestamp + self.max_wait_time - time.monotonic() if queue else None
                self._condition.wait(due if due is not None and due > 0 else None)

    def _run(self, batch: list[BatchRequest]) -> None:
        width = max(request.input_tokens.shape[1] for request in batch)
        pads = [width - request.input_tokens.shape[1] for request in batch]
        ids = [functional.pad(request.input_tokens, (n, 0)) for request, n in zip(batch, pads, strict=True)]
        mask = torch.arange(width)[None] >= torch.tensor(pads)[:, None]
        try:
            output = self.model.generate(
                input_ids=torch.cat(ids),
                attention_mask=mask.long(),
                max_new_tokens=max(request.max_length for request in batch),
                do_sample=False,
                pad_token_id=0,
            )
            rows = [
                output[i : i + 1, n : width + r.max_length] for i, (r, n) in enumerate(zip(batch, pads, strict=True))
            ]
        except Exception as error:
            for request in batch:
                request.future.set_exception(error)
            return
        for request, row in zip(batch, rows, strict=True):
            request.future.set_result(row)
