"""A private event loop in a thread of its own; the model runs in that loop's default executor."""

import asyncio
import concurrent.futures
import threading
import time
from contextlib import suppress
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
    future: "concurrent.futures.Future[Tensor]"


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
        self._model = model
        self._size, self._wait, self._tolerance, self._room = (
            max_batch_size,
            max_wait_time,
            length_tolerance,
            max_queue_size,
        )
        self._waiting: list[BatchRequest] = []
        self._changed = asyncio.Event()
        self._lock = threading.Lock()
        self._closed = self._closing = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name="batcher")
        self._thread.start()

    def get_length_bucket(self, seq_len: int) -> int:
        """The upper edge of the bucket."""
        return seq_len + -seq_len % self._tolerance

    async def add_request(self, request_id: str, input_tokens: Tensor, max_length: int) -> Tensor:
        """Hands a request to the private loop and awaits its result."""
        if input_tokens.dtype != torch.int64 or input_tokens.ndim != 2 or len(input_tokens) != 1:
            raise ValueError("input_tokens: int64 [1, L] is wanted")
        if not input_tokens.numel() or max_length < 1:
            raise ValueError("at least one token is wanted, before and after")
        request = BatchRequest(request_id, input_tokens, max_length, time.monotonic(), concurrent.futures.Future())
        with self._lock:
            if self._closed:
                raise RuntimeError("the batcher is shut down")
            self._loop.call_soon_threadsafe(self._enqueue, request)
        return await asyncio.wrap_future(request.future)

    def shutdown(self) -> None:
        """Serves the rest and ends the private loop."""
        with self._lock:
            if not self._closed:
                self._loop.call_soon_threadsafe(self._close)
            self._closed = True
        self._thread.join()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()

    def _enqueue(self, request: BatchRequest) -> None:
        self._prune()
        if len(self._waiting) >= self._room:
            request.future.set_exception(QueueFullError(f"{len(self._waiting)} requests wait"))
            return
        self._waiting.append(request)
        self._changed.set()

    def _close(self) -> None:
        self._closing = True
        self._changed.set()

    def _prune(self) -> None:
        self._waiting = [request for request in self._waiting if not request.future.cancelled()]

    async def _serve(self) -> None:
        while True:
            self._changed.clear()
            self._prune()
            if batch := self._ready():
                self._waiting = [request for request in self._waiting if request not in batch]
                if batch := [request for request in batch if request.future.set_running_or_notify_cancel()]:
                    await self._run(batch)
                continue
            if self._closing:
                return
            timeout = self._waiting[0].timestamp + self._wait - time.monotonic() if self._waiting else None
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout)

    def _ready(self) -> list[BatchRequest]:
        seen: set[int] = set()
        for oldest in self._waiting:
            bucket = self._bucket_of(oldest)
            if bucket in seen:
                continue
            seen.add(bucket)
            batch = [request for request in self._waiting if self._bucket_of(request) == bucket][: self._size]
            overdue = time.monotonic() - oldest.timestamp >= self._wait
            if len(batch) == self._size or overdue or self._closing:
                return batch
        return []

    def _bucket_of(self, request: BatchRequest) -> int:
        return self.get_length_bucket(request.input_tokens.shape[-1])

    async def _run(self, batch: list[BatchRequest]) -> None:
        prompts = [request.input_tokens.squeeze(0).flip(0) for request in batch]
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).flip(1)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = ids.shape[1]
        mask = (torch.arange(width) >= width - lengths[:, None]).to(torch.int32)
        new = max(request.max_length for request in batch)
        try:
            output = await self._loop.run_in_executor(None, lambda: self._model.generate(ids, mask, new, False, 0))
        except Exception as error:
            for request in batch:
                request.future.set_exception(error)
            return
        for row, request, length in zip(output, batch, lengths.tolist(), strict=True):
            request.future.set_result(row[width - length : width + request.max_length].unsqueeze(0))
