"""Wrong answers about faults (4.7) and a full queue (4.8)."""

from harness.model.bank import Mistake

SHAPE = "if input_tokens.dim() != 2 or input_tokens.size(0) != 1 or input_tokens.size(1) == 0:"
DTYPE = "if input_tokens.dtype != torch.int64:"
MAX_LENGTH = "if max_length < 1:"
ROOM = "if len(self._waiting) >= self.max_queue_size:"
RUN_STARTED = "self._run(started)"
SET_ERROR = "request.future.set_exception(error)"
SET_RESULT = "request.future.set_result(result)"
FAIL = """for request in batch:
                request.future.set_exception(error)
"""
HAND_OUT = """for request, result in zip(batch, results, strict=True):
                request.future.set_result(result)
"""
AWAIT = "await asyncio.wrap_future(request.future)"

# A future of the caller's event loop in place of a thread-safe one takes three edits, with SET_ERROR and SET_RESULT.
FUTURE = "future: Future[Tensor] = field(default_factory=Future)"
LOOPS_FUTURE = "future: Any = field(default_factory=lambda: asyncio.get_running_loop().create_future())"
AWAIT_LOOPS = "await request.future"
STARTS = "request.future.set_running_or_notify_cancel()"
LOOPS_STARTS = "not request.future.cancelled()"


MISTAKES = [
    # 4.7
    Mistake("worker_dies_on_an_error", "4.7", "worker has to live on", (FAIL, FAIL + "            raise\n")),
    Mistake(
        "errors_are_lost",
        "4.7",
        "every caller of the batch gets the error",
        (
            """        try:
            results = self._generate(batch)
        except Exception as error:
            for request in batch:
                request.future.set_exception(error)
        else:
            for request, result in zip(batch, results, strict=True):
                request.future.set_result(result)
""",
            """        for request, result in zip(batch, self._generate(batch), strict=True):
            request.future.set_result(result)
""",
        ),
    ),
    Mistake(
        "error_to_the_first_only",
        "4.7",
        "every caller of the batch gets the error",
        (FAIL, "batch[0].future.set_exception(error)\n"),
        only=True,
    ),
    Mistake(
        "error_wrapped",
        "4.7",
        "same type and text",
        (SET_ERROR, "request.future.set_exception(RuntimeError(f'generate failed: {error}'))"),
        only=True,
    ),
    Mistake(
        "tries_each_alone",
        "4.7",
        "the batch was tried again",
        (
            FAIL,
            """for request in batch if len(batch) > 1 else []:
                self._run([request])
            for request in batch if len(batch) == 1 else []:
                request.future.set_exception(error)
""",
        ),
        only=True,
    ),
    Mistake(
        "error_as_text",
        "4.7",
        "same type and text",
        (SET_ERROR, "request.future.set_exception(type(error)(str(error)))"),
        only=True,
    ),
    Mistake("error_as_result", "4.7", "no error came", (SET_ERROR, "request.future.set_result(error)"), only=True),
    Mistake(
        "cancels_on_an_error",
        "4.7",
        "Cancelled",
        (
            SET_ERROR,
            """request.future._state = 'PENDING'
                request.future.cancel()""",
        ),
        only=True,
    ),
    Mistake(
        "error_reaches_all_who_wait",
        "4.7",
        "same type and text",
        (
            FAIL,
            """with self._changed:
                waiting, self._waiting = self._waiting, []
            for request in [*batch, *waiting]:
                request.future.set_exception(error)
""",
        ),
    ),
    Mistake(
        "empty_prompt_accepted",
        "4.7",
        "ValueError was wanted",
        (SHAPE, "if input_tokens.dim() != 2 or input_tokens.size(0) != 1:"),
        only=True,
    ),
    Mistake(
        "two_rows_accepted",
        "4.7",
        "one row was wanted",
        (SHAPE, "if input_tokens.dim() != 2 or input_tokens.size(1) == 0:"),
        only=True,
    ),
    Mistake(
        "any_dimensions_accepted",
        "4.7",
        "ValueError",
        (SHAPE, "if input_tokens.numel() == 0 or input_tokens.dim() > 1 and input_tokens.size(0) != 1:"),
        only=True,
    ),
    Mistake("any_dtype_accepted", "4.7", "ValueError", (DTYPE, "if False:"), only=True),
    Mistake(
        "any_integer_accepted",
        "4.7",
        "int32",
        (DTYPE, "if input_tokens.is_floating_point() or input_tokens.dtype == torch.bool:"),
        only=True,
    ),
    Mistake("max_length_0_accepted", "4.7", "ValueError was wanted", (MAX_LENGTH, "if max_length < 0:"), only=True),
    Mistake(
        "wrong_kind_of_refusal",
        "4.7",
        "TypeError",
        ('raise ValueError(f"max_length is', 'raise TypeError(f"max_length is'),
        only=True,
    ),
    Mistake(
        "refused_in_the_worker",
        "4.7",
        "before it is queued",
        (MAX_LENGTH, "if False:"),
        (
            "prompts = [request.input_tokens",
            """if any(request.max_length < 1 for request in batch):
            raise ValueError('max_length')
        prompts = [request.input_tokens""",
        ),
        only=True,
    ),
    Mistake(
        "cancelled_future_kills_the_worker",
        "4.7",
        "a cancelled future takes no result",
        (FUTURE, LOOPS_FUTURE),
        (AWAIT, AWAIT_LOOPS),
        (STARTS, LOOPS_STARTS),
        (SET_ERROR, "request.future.get_loop().call_soon_threadsafe(request.future.set_exception, error)"),
        (SET_RESULT, "request.future.get_loop().call_soon_threadsafe(request.future.set_result, result)"),
        (
            RUN_STARTED,
            """self._run(started)
                if any(request.future.cancelled() for request in started):
                    raise asyncio.InvalidStateError""",
        ),
    ),
    Mistake(
        "closed_loop_kills_the_worker",
        "4.7",
        "event loop of r0 was closed",
        (FUTURE, LOOPS_FUTURE),
        (AWAIT, AWAIT_LOOPS),
        (STARTS, LOOPS_STARTS),
        (
            SET_ERROR,
            "request.future.get_loop().call_soon_threadsafe("
            "lambda f=request.future, v=error: f.done() or f.set_exception(v))",
        ),
        (
            SET_RESULT,
            "request.future.get_loop().call_soon_threadsafe("
            "lambda f=request.future, v=result: f.done() or f.set_result(v))",
        ),
        only=True,
    ),
    Mistake(
        "cancelled_caller_fails_its_batch",
        "4.7",
        "cancelled",
        (
            "return " + AWAIT,
            """try:
            return await asyncio.wrap_future(request.future)
        except asyncio.CancelledError:
            self._given_up = True
            raise""",
        ),
        (
            HAND_OUT,
            """if getattr(self, '_given_up', False):
                self._given_up = False
                for request in batch:
                    request.future.cancel() or request.future.set_exception(RuntimeError('cancelled'))
                return
            for request, result in zip(batch, results, strict=True):
                request.future.set_result(result)
""",
        ),
    ),
    # 4.8
    Mistake("queue_never_full", "4.8", "QueueFullError was wanted", (ROOM, "if False:"), only=True),
    Mistake("one_too_many_waits", "4.8", "QueueFullError was wanted", (ROOM, ROOM.replace(">=", ">")), only=True),
    Mistake(
        "one_too_few_waits",
        "4.8",
        "may wait beside the one that runs",
        (ROOM, "if len(self._waiting) + 1 >= self.max_queue_size:"),
    ),
    Mistake(
        "queue_per_bucket",
        "4.8",
        "QueueFullError was wanted",
        (
            "len(self._waiting) >= self.max_queue_size",
            "sum(r.input_tokens.size(1) // 8 == input_tokens.size(1) // 8 for r in self._waiting)"
            " >= self.max_queue_size",
        ),
        only=True,
    ),
    Mistake(
        "running_ones_count",
        "4.8",
        "may wait beside the one that runs",
        (ROOM, "if len(self._waiting) + getattr(self, '_running', 0) >= self.max_queue_size:"),
        (
            RUN_STARTED,
            """self._running = len(started)
                self._run(started)
                self._running = 0""",
        ),
    ),
    Mistake(
        "counts_all_ever",
        "4.8",
        "may wait beside the one that runs",
        (
            ROOM,
            """self._ever = getattr(self, '_ever', 0) + 1
            if self._ever > self.max_queue_size:""",
        ),
    ),
    Mistake(
        "cancelled_keep_their_place",
        "4.8",
        "there is room for one more",
        (f"            self._forget_cancelled()\n            {ROOM}", f"            {ROOM}"),
        only=True,
    ),
    Mistake(
        "waits_for_room",
        "4.8",
        "still waits: neither QueueFullError nor a result",
        (
            ROOM,
            """while len(self._waiting) >= self.max_queue_size:
                self._changed.release()
                await asyncio.sleep(0.001)
                self._changed.acquire()
            if False:""",
        ),
        only=True,
    ),
    Mistake(
        "refused_and_run",
        "4.8",
        "was run",
        (
            ROOM,
            """if len(self._waiting) >= self.max_queue_size:
                self._waiting.append(request)""",
        ),
        only=True,
    ),
    Mistake(
        "queue_no_smaller_than_a_batch",
        "4.8",
        "max_queue_size is 2",
        (ROOM, "if len(self._waiting) >= max(self.max_queue_size, self.max_batch_size):"),
        only=True,
    ),
    Mistake(
        "failed_keep_their_place",
        "4.8",
        "none waits",
        (ROOM, "if len(self._waiting) + self._lost >= self.max_queue_size:"),
        (FAIL, "self._lost += len(batch)\n            " + FAIL),
        (
            "self._closed = False",
            """self._closed = False
        self._lost = 0""",
        ),
        only=True,
    ),
]
