"""A thread that looks every few milliseconds, pads to the bucket's upper edge, and gives float masks."""

import asyncio
import threading
import time
from concurrent.futures import Future
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
    timestamp: float = field(default_factory=time.time)
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
        self.model, self.max_batch_size, self.max_wait_time = model, max_batch_size, max_wait_time
        self.length_tolerance, self.max_queue_size = length_tolerance, max_queue_size
        self.pending: list[BatchRequest] = []
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.worker = threading.Thread(target=self.poll, daemon=True)
        self.worker.start()

    def get_length_bucket(self, seq_len: int) -> int:
        """The upper edge of the bucket."""
        edge = self.length_tolerance
        while edge < seq_len:
            edge += self.length_tolerance
        return edge

    async def add_request(self, request_id: str, input_tokens: Tensor, max_length: int) -> Tensor:
        """Queues a request and awaits its result."""
        if input_tokens.dtype != torch.int64 or input_tokens.shape[:-1] != (1,) or input_tokens.shape[-1] == 0:
            raise ValueError(f"bad input_tokens: {input_tokens.dtype} {tuple(input_tokens.shape)}")
        if max_length < 1:
            raise ValueError(f"bad max_length: {max_length}")
        request = BatchRequest(request_id, input_tokens, max_length)
        with self.lock:
            if self.stopping.is_set():
                raise RuntimeError("the batcher is shut down")
            if sum(not other.future.cancelled() for other in self.pending) >= self.max_queue_size:
                raise QueueFullError("the queue is full")
            self.pending.append(request)
        return await asyncio.wrap_future(request.future)

    def shutdown(self) -> None:
        """Serves the rest and ends the thread."""
        with self.lock:
            self.stopping.set()
        if threading.current_thread() is not self.worker:
            self.worker.join()

    def poll(self) -> None:
        """Takes batches as they come, until told to stop and empty."""
        while True:
            stopping = self.stopping.is_set()
            with self.lock:
                batch = self.pick()
            if batch:
                self.run(batch)
            elif stopping and not self.pending:
                return
            else:
                time.sleep(0.002)

    def pick(self) -> list[BatchRequest]:
        """The batch that goes next, taken out of the queue."""
        self.pending = [request for request in self.pending if not request.future.cancelled()]
        for oldest in self.pending:
            edge = self.get_length_bucket(oldest.input_tokens.shape[-1])
            mates = [r for r in self.pending if self.get_length_bucket(r.input_tokens.shape[-1]) == edge]
            late = time.time() - oldest.timestamp >= self.max_wait_time
            if late or self.stopping.is_set() or len(mates) >= self.max_batch_size:
                batch = mates[: self.max_batch_size]
                self.pending = [request for request in self.pending if request not in batch]
                return [request for request in batch if request.future.set_running_or_notify_cancel()]
        return []

    def run(self, batch: list[BatchRequest]) -> None:
        """One call of the model."""
        edge = max(self.get_length_bucket(request.input_tokens.shape[-1]) for request in batch)
        rows, masks = [], []
        for request in batch:
            pads = edge - request.input_tokens.shape[-1]
            rows.append([0] * pads + request.input_tokens[0].tolist())
            masks.append([0.0] * pads + [1.0] * (edge - pads))
        new = max(request.max_length for request in batch)
        try:
            output = self.model.generate(torch.tensor(rows), torch.tensor(masks), new, False, 0)
            parts = [output[i, edge - r.input_tokens.shape[-1] :][None] for i, r in enumerate(batch)]
            results = [p[:, : p.shape[1] - new + r.max_length] for p, r in zip(parts, batch, strict=True)]
        except Exception as error:
            for request in batch:
                request.future.set_exception(error)
            return
        for request, result in zip(batch, results, strict=True):
            request.future.set_result(result)
