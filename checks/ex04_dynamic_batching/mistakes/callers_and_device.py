"""Wrong answers about the callers (4.3) and the use of the device (4.4)."""

from harness.model.bank import Mistake

KEY = "self.get_length_bucket(request.input_tokens.size(1))"
ROOM = "len(self._waiting) >= self.max_queue_size"
LIMIT = "self.max_batch_size = max_batch_size"
FULL = "full = len(batch) == self.max_batch_size"
BY_AGE = "return list(buckets.values())"
MOST = "max(request.max_length for request in batch)"
FORGET = "self._waiting = [request for request in self._waiting if not request.future.cancelled()]"
RUN_STARTED = "self._run(started)"
RUN = """try:
            results = self._generate(batch)
        except Exception as error:
            for request in batch:
                request.future.set_exception(error)
        else:
            for request, result in zip(batch, results, strict=True):
                request.future.set_result(result)"""
SET_ERROR = "request.future.set_exception(error)"
SET_RESULT = "request.future.set_result(result)"
AWAIT = "await asyncio.wrap_future(request.future)"

# A future of the caller's event loop in place of a thread-safe one takes three edits, with SET_ERROR and SET_RESULT.
FUTURE = "future: Future[Tensor] = field(default_factory=Future)"
LOOPS_FUTURE = "future: Any = field(default_factory=lambda: asyncio.get_running_loop().create_future())"
AWAIT_LOOPS = "await request.future"
STARTS = "request.future.set_running_or_notify_cancel()"
LOOPS_STARTS = "not request.future.cancelled()"


MISTAKES = [
    # 4.3
    Mistake(
        "set_result_from_the_thread",
        "4.3",
        "woken only when",
        (FUTURE, LOOPS_FUTURE),
        (AWAIT, AWAIT_LOOPS),
        (STARTS, LOOPS_STARTS),
        (SET_ERROR, "request.future.get_loop().is_closed() or request.future.cancelled() or " + SET_ERROR),
        (SET_RESULT, "request.future.get_loop().is_closed() or request.future.cancelled() or " + SET_RESULT),
        only=True,
    ),
    Mistake(
        "call_soon_from_the_thread",
        "4.3",
        "woken only when",
        (FUTURE, LOOPS_FUTURE),
        (AWAIT, AWAIT_LOOPS),
        (STARTS, LOOPS_STARTS),
        (
            SET_ERROR,
            "request.future.get_loop().is_closed() or request.future.get_loop().call_soon("
            "lambda f=request.future, v=error: f.done() or f.set_exception(v))",
        ),
        (
            SET_RESULT,
            "request.future.get_loop().is_closed() or request.future.get_loop().call_soon("
            "lambda f=request.future, v=result: f.done() or f.set_result(v))",
        ),
        only=True,
    ),
    Mistake(
        "one_loop_for_all",
        "4.3",
        "loop",
        (
            "return " + AWAIT,
            """self._loop = getattr(self, '_loop', None) or asyncio.get_running_loop()
        return await asyncio.wrap_future(request.future, loop=self._loop)""",
        ),
    ),
    Mistake(
        "loop_of_the_constructor",
        "4.3",
        "no running event loop",
        (
            "self._worker = threading",
            """self._loop = asyncio.get_running_loop()
        self._worker = threading""",
        ),
        only=True,
    ),
    Mistake("blocks_on_the_result", "4.3", "event loop of the callers is blocked", (AWAIT, "request.future.result()")),
    Mistake(
        "generate_under_the_lock",
        "4.3",
        "event loop of the callers is blocked",
        (RUN, "with self._changed:\n            " + RUN.replace("\n", "\n    ")),
    ),
    Mistake(
        "generate_on_the_callers_loop",
        "4.3",
        "thread of the callers' event loop",
        (RUN_STARTED, "self._loop.call_soon_threadsafe(self._run, started)"),
        (
            "return " + AWAIT,
            """self._loop = asyncio.get_running_loop()
        return await asyncio.wrap_future(request.future)""",
        ),
    ),
    Mistake(
        "results_at_the_end_of_the_queue",
        "4.3",
        "hand results out after each batch",
        (
            """for request, result in zip(batch, results, strict=True):
                request.future.set_result(result)
""",
            """self._done = [*getattr(self, '_done', []), *zip(batch, results, strict=True)]
            if not self._waiting:
                for request, result in self._done:
                    request.future.set_result(result)
                self._done = []
""",
        ),
    ),
    Mistake(
        "one_loop_wakes_all",
        "4.3",
        "each caller's future belongs to its own event loop",
        (FUTURE, LOOPS_FUTURE),
        (AWAIT, AWAIT_LOOPS),
        (STARTS, LOOPS_STARTS),
        (
            """try:
            results""",
            """self._loop = batch[0].future.get_loop()
        try:
            results""",
        ),
        (
            SET_ERROR,
            "self._loop.call_soon_threadsafe(lambda f=request.future, e=error: f.done() or f.set_exception(e))",
        ),
        (
            SET_RESULT,
            "self._loop.call_soon_threadsafe(lambda f=request.future, r=result: f.done() or f.set_result(r))",
        ),
    ),
    Mistake(
        "a_queue_for_each_loop",
        "4.3",
        "from 3 event loops",
        (
            "request = BatchRequest(request_id, input_tokens, max_length)",
            """request = BatchRequest(request_id, input_tokens, max_length)
        request.request_id = str(id(asyncio.get_running_loop()))""",
        ),
        (KEY, "(self.get_length_bucket(request.input_tokens.size(1)), request.request_id)"),
        ("buckets: dict[int, list[BatchRequest]]", "buckets: dict[Any, list[BatchRequest]]"),
        only=True,
    ),
    # 4.4
    Mistake("full_batch_waits", "4.4", "a full batch goes at once", (FULL, "full = False"), wasteful=True),
    Mistake(
        "full_batch_waits_behind_an_older_one",
        "4.4",
        "look at all buckets",
        (BY_AGE, "return list(buckets.values())[:1]"),
    ),
    Mistake(
        "one_by_one",
        "4.4",
        "calls of generate",
        (
            RUN,
            """for request in batch:
            try:
                request.future.set_result(self._generate([request])[0])
            except Exception as error:
                request.future.set_exception(error)""",
        ),
    ),
    Mistake(
        "two_calls_at_a_time",
        "4.4",
        "at a time",
        (
            RUN_STARTED,
            """self._runs = [*getattr(self, '_runs', []), threading.Thread(target=self._run, args=(started,))]
                self._runs[-1].start()""",
        ),
        (
            "self._worker.join()",
            """self._worker.join()
        for thread in getattr(self, '_runs', []):
            thread.join()""",
        ),
    ),
    Mistake(
        "half_batches",
        "4.4",
        "calls of generate",
        (LIMIT, "self.max_batch_size = max(max_batch_size // 2, 1)"),
    ),
    Mistake(
        "one_less_than_the_limit",
        "4.4",
        "a full batch goes at once",
        (LIMIT, "self.max_batch_size = max(max_batch_size - 1, 1)"),
    ),
    Mistake("always_a_thousand_tokens", "4.4", "64", (MOST, "64"), only=True),
    Mistake(
        "sum_of_all_tokens",
        "4.4",
        "was asked for 6",
        (MOST, "sum(request.max_length for request in batch)"),
        only=True,
    ),
    Mistake(
        "cancelled_is_run",
        "4.4",
        "generate was called for it all the same",
        (FORGET, "pass"),
        (
            """started = [request for request in batch if request.future.set_running_or_notify_cancel()]
            if started:
                self._run(started)""",
            """[request.future.set_running_or_notify_cancel() for request in batch]
            self._run(batch)""",
        ),
        (SET_RESULT, "request.future.cancelled() or request.future.set_result(result)"),
        (ROOM, "sum(not request.future.cancelled() for request in self._waiting) >= self.max_queue_size"),
    ),
    Mistake(
        "sleeps_after_a_batch",
        "4.4",
        "before the device was free",
        (
            RUN_STARTED,
            """self._run(started)
                with self._changed:
                    self._closed or self._changed.wait(self.max_wait_time)""",
        ),
    ),
    Mistake(
        "full_if_just_as_many_wait",
        "4.4",
        "before the device was free",
        (FULL, "full = len(requests) == self.max_batch_size"),
    ),
    Mistake(
        "cancelled_fill_a_batch",
        "4.4",
        "a cancelled request waits no more",
        (FORGET, "pass"),
        (ROOM, "sum(not request.future.cancelled() for request in self._waiting) >= self.max_queue_size"),
    ),
]
