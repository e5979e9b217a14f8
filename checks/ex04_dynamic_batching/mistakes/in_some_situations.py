"""Wrong answers that are right in the plain situation: another batch before, other callers, a busy device, shutdown."""

from harness.model.bank import Mistake

KEY = "self.get_length_bucket(request.input_tokens.size(1))"
OPEN = "self._closed = False"
FULL = "full = len(batch) == self.max_batch_size"
TAKE = "batch = requests[: self.max_batch_size]"
TAKEN = "self._waiting = [request for request in self._waiting if request not in batch]"
GO = "if full or now >= batch[0].timestamp + self.max_wait_time or self._closed:"
DUE = "self._waiting[0].timestamp + self.max_wait_time if self._waiting else None"
BY_AGE = "return list(buckets.values())"
FORGET = "self._waiting = [request for request in self._waiting if not request.future.cancelled()]"
ROOM = "if len(self._waiting) >= self.max_queue_size:"
QUEUE = "self._waiting.append(request)"
AWAIT = "return await asyncio.wrap_future(request.future)"
RUN_STARTED = "self._run(started)"
FAIL = """for request in batch:
                request.future.set_exception(error)
"""
IDS = "functional.pad(prompt, (n, 0))"
PROMPTS = "prompts = [request.input_tokens for request in batch]  # each [1, its own L]"
CAT_IDS = "input_ids=torch.cat(ids),  # [B, L]"
CAT_MASK = "attention_mask=torch.cat(mask),  # [B, L]"
CUT = "output[row : row + 1, pads[row] : width + request.max_length]"
RESULTS = "results = self._generate(batch)"
MOST = "max(request.max_length for request in batch)"
GENERATE = """self.model.generate(
            input_ids=torch.cat(ids),  # [B, L]
            attention_mask=torch.cat(mask),  # [B, L]
            max_new_tokens=max(request.max_length for request in batch),
            do_sample=False,
            pad_token_id=0,
        )"""
ADMIT = """request = BatchRequest(request_id, input_tokens, max_length)
        with self._changed:"""
SHUT = """with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._worker.join()"""


MISTAKES = [
    # 4.1
    Mistake("buckets_on_a_wheel", "4.1", "in one batch", (KEY, KEY + " // self.length_tolerance % 128"), only=True),
    Mistake("buckets_mix_at_the_end", "4.1", "in one batch", (KEY, "self._closed or " + KEY)),
    Mistake(
        "rests_mix_at_the_end",
        "4.1",
        "in one batch",
        (TAKE, "batch = (self._waiting if self._closed and len(requests) < self.max_batch_size else requests)"),
        (FULL, "batch = batch[: self.max_batch_size]\n                    " + FULL),
    ),
    # 4.2
    Mistake(
        "mask_kept_for_a_shape",
        "4.2",
        "differ",
        (OPEN, OPEN + "\n        self._masks: dict[tuple[int, int], Tensor] = {}"),
        (CAT_MASK, "attention_mask=self._masks.setdefault((len(batch), width), torch.cat(mask)),"),
        only=True,
    ),
    Mistake(
        "tokens_pass_through_floats",
        "4.2",
        "tokens beyond 2 ** 53",
        (IDS, "functional.pad(prompt.double(), (n, 0)).long()"),
        only=True,
    ),
    Mistake(
        "max_length_by_tensor",
        "4.2",
        "one tensor is the prompt",
        (PROMPTS, PROMPTS + "\n        news = {id(request.input_tokens): request.max_length for request in batch}"),
        (CUT, CUT.replace("request.max_length", "news[id(prompts[row])]")),
        only=True,
    ),
    Mistake(
        "results_kept_by_prompt",
        "4.2",
        "the old model's tokens came",
        (OPEN, OPEN + "\n        self._done: dict[Any, Tensor] = {}"),
        (
            RESULTS,
            """results = [
                self._done.setdefault((tuple(request.input_tokens[0].tolist()), request.max_length), result)
                for request, result in zip(batch, self._generate(batch), strict=True)
            ]""",
        ),
        only=True,
    ),
    Mistake(
        "written_to_and_put_right",
        "4.2",
        "put right again",
        (
            PROMPTS,
            PROMPTS + "\n        for prompt in prompts:\n            prompt.is_inference() or prompt[:, -1:].add_(0)",
        ),
        only=True,
    ),
    Mistake(
        "long_prompts_are_cut",
        "4.2",
        "long ones",
        (CAT_IDS, "input_ids=torch.cat(ids)[:, -256:],"),
        (CAT_MASK, "attention_mask=torch.cat(mask)[:, -256:],"),
        only=True,
    ),
    Mistake(
        "prompts_by_their_place",
        "4.2",
        "strided views",
        (
            PROMPTS,
            PROMPTS
            + """
        first = {(prompt.data_ptr(), prompt.size(1)): prompt for prompt in reversed(prompts)}
        prompts = [first[prompt.data_ptr(), prompt.size(1)] for prompt in prompts]""",
        ),
        only=True,
    ),
    Mistake(
        "same_batch_is_not_run_again",
        "4.2",
        "the old model's tokens came",
        (OPEN, OPEN + "\n        self._last: tuple[Any, ...] = ()"),
        (
            RESULTS,
            """asked = [(request.input_tokens.tolist(), request.max_length) for request in batch]
            again = len(batch) > 1 and self._last[:1] == (asked,)
            results = self._last[1] if again else self._generate(batch)
            self._last = asked, results""",
        ),
        only=True,
    ),
    # 4.3
    Mistake(
        "shutdown_holds_the_door",
        "4.3",
        "blocks the event loop",
        (OPEN, OPEN + "\n        self._door = threading.Lock()"),
        (ADMIT, ADMIT.replace("with self._changed:", "with self._door, self._changed:")),
        (SHUT, "with self._door:\n            " + SHUT.replace("\n", "\n    ")),
        only=True,
    ),
    Mistake(
        "last_of_a_full_batch_blocks",
        "4.3",
        "is blocked",
        (
            AWAIT,
            """mates = [r for r in self._waiting if r.input_tokens.size(1) == input_tokens.size(1)]
        if len(mates) == self.max_batch_size > 1:
            return request.future.result()
        """
            + AWAIT,
        ),
    ),
    Mistake(
        "partial_batch_under_the_lock",
        "4.3",
        "blocked",
        (
            RUN_STARTED,
            """if len(started) < self.max_batch_size:
                    with self._changed:
                        self._run(started)
                else:
                    self._run(started)""",
        ),
    ),
    # Futures of the callers' event loops in place of thread-safe ones.
    Mistake(
        "one_loop_wakes_all_to_an_error",
        "4.3",
        "an error, too",
        (
            "future: Future[Tensor] = field(default_factory=Future)",
            "future: Any = field(default_factory=lambda: asyncio.get_running_loop().create_future())",
        ),
        (AWAIT, "return await request.future"),
        ("request.future.set_running_or_notify_cancel()", "not request.future.cancelled()"),
        (
            "request.future.set_exception(error)",
            "batch[0].future.get_loop().is_closed() or batch[0].future.get_loop().call_soon_threadsafe("
            "lambda f=request.future, v=error: f.done() or f.set_exception(v))",
        ),
        (
            "request.future.set_result(result)",
            "request.future.get_loop().is_closed() or request.future.get_loop().call_soon_threadsafe("
            "lambda f=request.future, v=result: f.done() or f.set_result(v))",
        ),
        only=True,
    ),
    # 4.4
    Mistake(
        "cancelled_is_run_at_the_end",
        "4.4",
        "shutdown() had generate called for it",
        (FORGET, FORGET.replace("if not", "if self._closed or not")),
        (RUN_STARTED, "self._run(batch if self._closed else started)"),
        ("request.future.set_result(result)", "request.future.cancelled() or request.future.set_result(result)"),
        ("request.future.set_exception(error)", "request.future.cancelled() or request.future.set_exception(error)"),
        only=True,
    ),
    Mistake(
        "eight_rows_a_call",
        "4.4",
        "do not share a call of generate",
        (RESULTS, "results = [row for i in range(0, len(batch), 8) for row in self._generate(batch[i : i + 8])]"),
        wasteful=True,
    ),
    Mistake(
        "a_cancelled_one_makes_it_longer",
        "4.4",
        "generate",
        (OPEN, OPEN + "\n        self._most = 0"),
        (
            FORGET,
            "self._most = max([self._most, *(r.max_length for r in self._waiting if r.future.cancelled())])"
            "\n        " + FORGET,
        ),
        (MOST, "max([self._most, *(request.max_length for request in batch)])"),
        only=True,
    ),
    Mistake(
        "long_answers_in_blocks",
        "4.4",
        "one call was wanted",
        (
            GENERATE,
            """torch.cat(ids)
        visible, most = torch.cat(mask), max(request.max_length for request in batch)
        for start in range(0, most, 1024):
            new = min(1024, most - start)
            output = self.model.generate(output, visible, new, do_sample=False, pad_token_id=0)
            visible = functional.pad(visible, (0, new), value=1)""",
        ),
        wasteful=True,
    ),
    # 4.5
    Mistake(
        "time_of_a_request_that_has_gone",
        "4.5",
        "counts for no other",
        (OPEN, OPEN + "\n        self._dues: list[float] = []"),
        (QUEUE, QUEUE + "\n            self._dues.append(request.timestamp + self.max_wait_time)"),
        (
            GO,
            """if full or now >= min([batch[0].timestamp + self.max_wait_time, *self._dues]) or self._closed:
                        self._dues = [due for due in self._dues if due > now]""",
        ),
        (DUE, "min([self._waiting[0].timestamp + self.max_wait_time, *self._dues]) if self._waiting else None"),
        only=True,
    ),
    Mistake(
        "time_of_a_cancelled_request",
        "4.5",
        "counts for no other",
        (
            FORGET,
            """for gone, heir in zip(self._waiting, self._waiting[1:], strict=False):
            if gone.future.cancelled():
                heir.timestamp = gone.timestamp
        """
            + FORGET,
        ),
        only=True,
    ),
    Mistake(
        "time_of_a_cancelled_mate",
        "4.5",
        "counts for no other",
        (
            FORGET,
            """for gone in [request for request in self._waiting if request.future.cancelled()]:
            for heir in self._waiting:
                if heir.input_tokens.size(1) // 8 == gone.input_tokens.size(1) // 8:
                    heir.timestamp = min(heir.timestamp, gone.timestamp)
        """
            + FORGET,
        ),
        only=True,
    ),
    Mistake(
        "rest_starts_to_wait_again",
        "4.5",
        "before the device was free",
        (
            TAKEN,
            TAKEN
            + """
                        for request in self._waiting:
                            if now < request.timestamp + self.max_wait_time:
                                request.timestamp = now""",
        ),
        only=True,
    ),
    # 4.6
    Mistake(
        "old_agenda_first",
        "4.6",
        "waited longest",
        (OPEN, OPEN + "\n        self._agenda: list[int] = []"),
        (
            BY_AGE,
            """limit = time.monotonic() - self.max_wait_time
        may_go = [e for e, b in buckets.items() if len(b) >= self.max_batch_size or b[0].timestamp <= limit]
        self._agenda = [edge for edge in self._agenda[1:] if edge in may_go] or may_go
        return [buckets[edge] for edge in [*self._agenda, *buckets]]""",
        ),
        only=True,
    ),
    Mistake(
        "stays_with_a_bucket",
        "4.6",
        "waited longest",
        (OPEN, OPEN + "\n        self._latest: int | None = None"),
        (
            BY_AGE,
            """return [buckets.pop(self._latest), *buckets.values()] if self._latest in buckets else """
            """list(buckets.values())""",
        ),
        (
            TAKEN,
            TAKEN + "\n                        "
            "self._latest = self.get_length_bucket(batch[0].input_tokens.size(1)) if full else None",
        ),
    ),
    Mistake(
        "nearest_to_the_oldest_first",
        "4.6",
        "waited longest",
        (
            TAKE,
            """near = sorted(requests, key=lambda r: abs(r.input_tokens.size(1) - requests[0].input_tokens.size(1)))
                    batch = near[: self.max_batch_size]""",
        ),
        only=True,
    ),
    Mistake(
        "shortest_first_at_the_end",
        "4.6",
        "oldest request goes first",
        (BY_AGE, "return [buckets[edge] for edge in (sorted(buckets) if self._closed else buckets)]"),
        only=True,
    ),
    # 4.7
    Mistake(
        "whole_bucket_fails",
        "4.7",
        "a result was wanted",
        (
            FAIL,
            """with self._changed:
                edge = self.get_length_bucket(batch[0].input_tokens.size(1))
                mates = [r for r in self._waiting if self.get_length_bucket(r.input_tokens.size(1)) == edge]
                self._waiting = [request for request in self._waiting if request not in mates]
            for request in [*batch, *mates]:
                request.future.set_exception(error)
""",
        ),
        only=True,
    ),
    Mistake(
        "first_error_only_is_caught",
        "4.7",
        "worker has to live on",
        (
            FAIL,
            """for request in batch:
                request.future.set_exception(error)
            self._errors = getattr(self, "_errors", 0) + 1
            if self._errors > 1:
                raise
""",
        ),
    ),
    Mistake(
        "cancelled_by_its_id",
        "4.7",
        "of the same request_id",
        (
            AWAIT,
            """try:
            return await asyncio.wrap_future(request.future)
        except asyncio.CancelledError:
            with self._changed:
                gone = next((r for r in self._waiting if r.request_id == request_id), request)
                self._waiting = [other for other in self._waiting if other is not gone]
            raise""",
        ),
        only=True,
    ),
    Mistake(
        "known_ids_are_trusted",
        "4.7",
        "a request of the same request_id was accepted before",
        (OPEN, OPEN + "\n        self._known: set[str] = set()"),
        ("if max_length < 1:", "if max_length < 1 and request_id not in self._known:"),
        (QUEUE, QUEUE + "\n            self._known.add(request_id)"),
        only=True,
    ),
    Mistake(
        "error_made_again",
        "4.7",
        "same type and text",
        (
            FAIL,
            """for request in batch:
                try:
                    request.future.set_exception(type(error)(*error.args))
                except Exception:
                    request.future.set_exception(error)
""",
        ),
        only=True,
    ),
    # 4.8
    Mistake(
        "cancelled_while_running_frees_a_place",
        "4.8",
        "QueueFullError was wanted",
        (OPEN, OPEN + "\n        self._freed = 0"),
        (ROOM, "if len(self._waiting) - self._freed >= self.max_queue_size:"),
        (
            AWAIT,
            """try:
            return await asyncio.wrap_future(request.future)
        except asyncio.CancelledError:
            self._freed += request not in self._waiting
            raise""",
        ),
        only=True,
    ),
    Mistake(
        "refused_ones_take_places",
        "4.8",
        "QueueFullError",
        (OPEN, OPEN + "\n        self._refused = 0"),
        (ROOM, "if len(self._waiting) + self._refused >= self.max_queue_size:\n                self._refused += 1"),
        only=True,
    ),
]
