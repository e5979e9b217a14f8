"""Wrong answers about shutdown (4.9), and own tests that prove nothing (4.10)."""

from harness.model.bank import Mistake

REFUSE = """            if self._closed:
                raise RuntimeError("the batcher is shut down")
"""
REQUEST = "        request = BatchRequest(request_id, input_tokens, max_length)\n"
APPEND = "self._waiting.append(request)"
CLOSE = """self._closed = True
            self._changed.notify_all()"""
SHUT = """with self._changed:
            self._closed = True"""
JOIN = "self._worker.join()"
LOOK = """                self._forget_cancelled()
                now = time.monotonic()
"""
GO = "if full or now >= batch[0].timestamp + self.max_wait_time or self._closed:"
END = """                if self._closed:
                    return []
"""
FAIL = """for request in batch:
                request.future.set_exception(error)
"""
OPEN = "self._closed = False"
OWN_TEST_BEGINS = "torch.manual_seed(0)\n    decoder = Decoder()\n"


MISTAKES = [
    # 4.9
    Mistake(
        "leaves_callers_hanging",
        "4.9",
        "shutdown() has returned, and r0 was not served",
        (END, ""),
        (LOOK, END + LOOK),
        only=True,
    ),
    Mistake(
        "cancels_what_waits",
        "4.9",
        "was cancelled, though its caller was not",
        (
            CLOSE,
            """self._closed = True
            for request in self._waiting:
                request.future.cancel()
            self._changed.notify_all()""",
        ),
        only=True,
    ),
    Mistake(
        "fails_what_waits",
        "4.9",
        "shut down",
        (
            CLOSE,
            """self._closed = True
            for request in self._waiting:
                request.future.set_exception(RuntimeError('shut down'))
            self._waiting = []
            self._changed.notify_all()""",
        ),
        only=True,
    ),
    Mistake(
        "rest_waits_for_its_time",
        "4.9",
        "shutdown() did not return",
        (GO, GO.replace(" or self._closed", "")),
        (END, END.replace("self._closed", "self._closed and not self._waiting")),
        only=True,
    ),
    Mistake("returns_early", "4.9", "shutdown() returned", (f"        {JOIN}\n", ""), only=True),
    Mistake(
        "second_shutdown_returns_early",
        "4.9",
        "returned to one",
        (SHUT, "if self._closed:\n            return\n        " + SHUT),
        only=True,
    ),
    Mistake(
        "forgets_who_has_just_begun",
        "4.9",
        "right after add_request had begun",
        (REFUSE, ""),
        (REQUEST, REFUSE.replace("            ", "        ", 1) + "        await asyncio.sleep(0)\n" + REQUEST),
        only=True,
    ),
    Mistake("waits_a_moment_only", "4.9", "shutdown() returned", (JOIN, "self._worker.join(0.001)"), only=True),
    Mistake("late_request_hangs", "4.9", "the batcher is shut down", (REFUSE, ""), only=True),
    Mistake(
        "late_request_is_refused_wrongly",
        "4.9",
        "RuntimeError was wanted",
        (REFUSE, REFUSE.replace("RuntimeError", "ValueError")),
        only=True,
    ),
    Mistake(
        "second_shutdown_raises",
        "4.9",
        "shut down twice",
        (
            SHUT,
            """if self._closed:
            raise RuntimeError('shut down twice')
        with self._changed:
            self._closed = True""",
        ),
        only=True,
    ),
    Mistake(
        "second_shutdown_hangs",
        "4.9",
        "a second shutdown() did not return",
        (
            SHUT,
            """while self._closed:
            time.sleep(0.01)
        with self._changed:
            self._closed = True""",
        ),
        only=True,
    ),
    Mistake(
        "thread_stays",
        "4.9",
        "is alive",
        (END, END.replace("return []", "self._served.set()")),
        (
            OPEN,
            """self._closed = False
        self._served = threading.Event()""",
        ),
        (JOIN, "self._served.wait()"),
        only=True,
    ),
    Mistake(
        "timer_outlives_its_batch",
        "4.9",
        "a timer too",
        (
            APPEND,
            APPEND
            + """
            if len(self._waiting) == 1:
                timer = threading.Timer(self.max_wait_time, lambda: None)
                timer.daemon = True
                timer.start()""",
        ),
        only=True,
    ),
    Mistake(
        "timer_of_a_refused_request",
        "4.9",
        "a timer too",
        (
            REQUEST,
            REQUEST
            + """        timer = threading.Timer(self.max_wait_time, lambda: None)
        timer.daemon = True
        timer.start()
        request.future.add_done_callback(lambda _: timer.cancel())
""",
        ),
        only=True,
    ),
    # Futures of the callers' event loops in place of thread-safe ones.
    Mistake(
        "shutdown_needs_the_callers_loop",
        "4.9",
        "shutdown() did not return",
        (
            JOIN,
            """self._worker.join()
        while any(not request.future.done() for request in self._all):
            time.sleep(0.001)""",
        ),
        (
            OPEN,
            """self._closed = False
        self._all: list[BatchRequest] = []""",
        ),
        (
            "return await asyncio.wrap_future(request.future)",
            """self._all = [other for other in self._all if not other.future.done()] + [request]
        return await request.future""",
        ),
        (
            "future: Future[Tensor] = field(default_factory=Future)",
            "future: Any = field(default_factory=lambda: asyncio.get_running_loop().create_future())",
        ),
        ("request.future.set_running_or_notify_cancel()", "not request.future.cancelled()"),
        (
            "request.future.set_exception(error)",
            "request.future.get_loop().is_closed() or request.future.get_loop().call_soon_threadsafe("
            "lambda f=request.future, v=error: f.done() or f.set_exception(v))",
        ),
        (
            "request.future.set_result(result)",
            "request.future.get_loop().is_closed() or request.future.get_loop().call_soon_threadsafe("
            "lambda f=request.future, v=result: f.done() or f.set_result(v))",
        ),
        only=True,
    ),
    Mistake(
        "an_error_ends_the_rest",
        "4.9",
        "device lost",
        (
            FAIL,
            """for request in batch:
                request.future.set_exception(error)
            if self._closed:
                raise
""",
        ),
        only=True,
    ),
    Mistake(
        "returns_while_the_last_batch_runs",
        "4.9",
        "while the last batch still ran",
        (
            JOIN,
            """while self._waiting:
            time.sleep(0.001)""",
        ),
        only=True,
    ),
    # 4.10
    Mistake(
        "own_test_asserts_nothing",
        "4.10",
        "passes although",
        (OWN_TEST_BEGINS, "return\n    " + OWN_TEST_BEGINS),
        only=True,
    ),
    Mistake(
        "own_test_fails_on_right_code",
        "4.10",
        "fails on right code",
        ("assert max(rows for rows, _ in calls) <= 3", "assert max(rows for rows, _ in calls) <= 2"),
        only=True,
    ),
    Mistake(
        "own_test_wants_the_longest_as_width",
        "4.10",
        "as wide as the bucket's upper edge",
        ("for rows, width in calls if width > 8) == 2", "for rows, width in calls if width == 14) == 2"),
        only=True,
    ),
    Mistake(
        "own_test_hangs",
        "4.10",
        "did not end",
        (OWN_TEST_BEGINS, "await asyncio.sleep(100)\n    " + OWN_TEST_BEGINS),
        only=True,
    ),
]
