"""Wrong answers to ex04 that its checks must catch."""

from harness.model.bank import Mistake as _New


def Mistake(name, caught_by, edits, says, only=False):  # type: ignore
    return _New(name, caught_by, says, *edits, only=only)


AWAIT = "        return await asyncio.wrap_future(request.future)\n"
BUCKET = "        return math.ceil(seq_len / self.length_tolerance) * self.length_tolerance\n"
CHECKS = "        if input_tokens.dim() != 2 or input_tokens.size(0) != 1 or input_tokens.size(1) == 0:\n"
DTYPE = "        if input_tokens.dtype != torch.int64:\n"
MAX_LENGTH = "        if max_length < 1:\n"
REQUEST = "        request = BatchRequest(request_id, input_tokens, max_length)\n"
CLOSED = '            if self._closed:\n                raise RuntimeError("the batcher is shut down")\n'
FORGET = "            self._forget_cancelled()\n            if len(self._waiting) >= self.max_queue_size:\n"
ROOM = "            if len(self._waiting) >= self.max_queue_size:\n"
APPEND = "            self._waiting.append(request)\n"
SHUT = """        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._worker.join()
"""
STARTED = "            started = [request for request in batch if request.future.set_running_or_notify_cancel()]\n            if started:\n                self._run(started)\n"
KEY = "buckets.setdefault(self.get_length_bucket(request.input_tokens.size(1)), [])"
BY_AGE = "        return list(buckets.values())\n"
FULL = "                    full = len(batch) == self.max_batch_size\n"
TAKE = "                    batch = requests[: self.max_batch_size]\n"
GO = "                    if full or now >= batch[0].timestamp + self.max_wait_time or self._closed:\n"
PRUNE = "                self._forget_cancelled()\n                now = time.monotonic()\n"
END = "                if self._closed:\n                    return []\n"
WAIT = "                self._changed.wait(None if due is None else due - now)\n"
TAKEN = "                        self._waiting = [request for request in self._waiting if request not in batch]\n"
FILTER = "        self._waiting = [request for request in self._waiting if not request.future.cancelled()]\n"
RUN = """        try:
            results = self._generate(batch)
        except Exception as error:
            for request in batch:
                request.future.set_exception(error)
        else:
            for request, result in zip(batch, results, strict=True):
                request.future.set_result(result)
"""
FAIL = "            for request in batch:\n                request.future.set_exception(error)\n"
HAND_OUT = """            for request, result in zip(batch, results, strict=True):
                request.future.set_result(result)
"""
PROMPTS = "        prompts = [request.input_tokens for request in batch]  # each [1, its own L]\n"
PADS = "        pads = [width - prompt.size(1) for prompt in prompts]\n"
IDS = "        ids = [functional.pad(prompt, (n, 0)) for prompt, n in zip(prompts, pads, strict=True)]\n"
MASK = "        mask = [functional.pad(torch.ones_like(prompt), (n, 0)) for prompt, n in zip(prompts, pads, strict=True)]\n"
CAT_MASK = "            attention_mask=torch.cat(mask),  # [B, L]\n"
MOST = "            max_new_tokens=max(request.max_length for request in batch),\n"
GENERATE = "        output = self.model.generate(\n"
CUT = "            output[row : row + 1, pads[row] : width + request.max_length]  # [1, its own L + max_length]\n"
LIMIT = "        self.max_batch_size = max_batch_size\n"
WORKER = """        self._worker = threading.Thread(target=self._serve, daemon=True)
        self._worker.start()
"""
SERVE = "        for batch in iter(self._next_batch, []):\n"
FUTURE = "    future: Future[Tensor] = field(default_factory=Future)\n"
# Futures of the caller's event loop in place of thread-safe ones: filled by the line that follows.
OF_THE_LOOP = [
    (FUTURE, "    future: Any = field(default_factory=lambda: asyncio.get_running_loop().create_future())\n"),
    (AWAIT, "        return await request.future\n"),
    (STARTED, STARTED.replace("request.future.set_running_or_notify_cancel()", "not request.future.cancelled()")),
]


def woken(call: str, error: str = "") -> tuple[str, str]:
    """Hands results and errors out by `call`, a text with the names future, method and value."""
    text = RUN
    for method, value in (("set_exception", "error"), ("set_result", "result")):
        now = call.replace("future", "request.future").replace("method", method).replace("value", value)
        text = text.replace(f"request.future.{method}({value})", now)
    return RUN, text


MISTAKES = [
    # 4.1
    Mistake("mixes_buckets", "4.1", [(KEY, "buckets.setdefault(0, [])")], says="in one batch"),
    Mistake(
        "lower_edge",
        "4.1",
        [(BUCKET, "        return seq_len // self.length_tolerance * self.length_tolerance\n")],
        says="get_length_bucket(1)",
        only=True,
    ),
    Mistake(
        "edge_belongs_to_the_next",
        "4.1",
        [(BUCKET, "        return (seq_len // self.length_tolerance + 1) * self.length_tolerance\n")],
        says="get_length_bucket(32)",
        only=True,
    ),
    Mistake(
        "bucket_index",
        "4.1",
        [(BUCKET, "        return math.ceil(seq_len / self.length_tolerance)\n")],
        says="32 was wanted",
        only=True,
    ),
    Mistake(
        "buckets_of_32_always",
        "4.1",
        [(BUCKET, "        return math.ceil(seq_len / 32) * 32\n")],
        says="length_tolerance 10",
    ),
    Mistake(
        "bucket_of_the_total_length",
        "4.1",
        [(KEY, "buckets.setdefault(self.get_length_bucket(request.input_tokens.size(1) + request.max_length), [])")],
        says="not in one batch",
        only=True,
    ),
    Mistake(
        "equal_lengths_only",
        "4.1",
        [(KEY, "buckets.setdefault(request.input_tokens.size(1), [])")],
        says="not in one batch",
    ),
    # 4.2
    Mistake(
        "right_padding",
        "4.2",
        [
            (IDS, IDS.replace("(n, 0)", "(0, n)")),
            (MASK, MASK.replace("(n, 0)", "(0, n)")),
            (
                CUT,
                CUT.replace(
                    "output[row : row + 1, pads[row] : width + request.max_length]",
                    "torch.cat([prompts[row], output[row : row + 1, width : width + request.max_length]], dim=1)",
                ),
            ),
        ],
        says="pad on the left",
        only=True,
    ),
    Mistake("no_attention_mask", "4.2", [(CAT_MASK, "")], says="no attention_mask", only=True),
    Mistake(
        "mask_of_ones",
        "4.2",
        [(MASK, MASK.replace("torch.ones_like(prompt), (n, 0)", "torch.ones_like(prompt), (n, 0), value=1"))],
        says="attention_mask is",
        only=True,
    ),
    Mistake(
        "mask_inverted",
        "4.2",
        [(CAT_MASK, "            attention_mask=1 - torch.cat(mask),\n")],
        says="attention_mask is",
        only=True,
    ),
    Mistake(
        "mask_reads_one_pad",
        "4.2",
        [
            (
                MASK,
                MASK.replace(
                    "torch.ones_like(prompt), (n, 0)",
                    "functional.pad(torch.ones_like(prompt), (min(n, 1), 0), value=1), (max(n - 1, 0), 0)",
                ),
            )
        ],
        says="attention_mask is",
        only=True,
    ),
    Mistake(
        "mask_from_the_tokens",
        "4.2",
        [(CAT_MASK, "            attention_mask=(torch.cat(ids) != 0).long(),\n")],
        says="token 0",
        only=True,
    ),
    Mistake(
        "pads_stripped_by_value",
        "4.2",
        [
            (
                CUT,
                "            output[row, : width + request.max_length][output[row, : width + request.max_length] != 0][None]\n",
            )
        ],
        says="token 0",
        only=True,
    ),
    Mistake(
        "pads_kept",
        "4.2",
        [(CUT, CUT.replace("pads[row] : width + request.max_length", ": prompts[row].size(1) + request.max_length"))],
        says="without its padding",
        only=True,
    ),
    Mistake(
        "not_cut", "4.2", [(CUT, CUT.replace(": width + request.max_length", ":"))], says="cut each row", only=True
    ),
    Mistake(
        "max_length_of_the_first",
        "4.2",
        [(MOST, "            max_new_tokens=batch[0].max_length,\n")],
        says="shape",
        only=True,
    ),
    Mistake(
        "max_length_as_total",
        "4.2",
        [(CUT, CUT.replace("width + request.max_length", "max(width, pads[row] + request.max_length)"))],
        says="shape",
        only=True,
    ),
    Mistake("new_tokens_only", "4.2", [(CUT, CUT.replace("pads[row] :", "width :"))], says="shape", only=True),
    Mistake("one_dimension_returned", "4.2", [(CUT, CUT.replace("row : row + 1", "row"))], says="shape", only=True),
    Mistake(
        "list_returned",
        "4.2",
        [(HAND_OUT, HAND_OUT.replace("set_result(result)", "set_result(result.tolist())"))],
        says="list came",
        only=True,
    ),
    Mistake(
        "wrong_caller",
        "4.2",
        [
            (
                HAND_OUT,
                HAND_OUT.replace("zip(batch, results, strict=True)", "zip(reversed(batch), results, strict=True)"),
            )
        ],
        says="row i belongs to request i",
        only=True,
    ),
    Mistake(
        "sorted_and_not_put_back",
        "4.2",
        [
            (
                PROMPTS,
                "        prompts = sorted((request.input_tokens for request in batch), key=lambda prompt: prompt.size(1))\n",
            )
        ],
        says="each caller gets its own row",
        only=True,
    ),
    Mistake(
        "results_by_request_id",
        "4.2",
        [
            (
                "        return [\n" + CUT + "            for row, request in enumerate(batch)\n        ]\n",
                "        by_id = {request.request_id: row for row, request in enumerate(batch)}\n        return [\n"
                + CUT.replace(
                    "row : row + 1, pads[row]", "by_id[request.request_id] : by_id[request.request_id] + 1, pads[row]"
                )
                + "            for row, request in enumerate(batch)\n        ]\n",
            )
        ],
        says="request_ids repeat",
        only=True,
    ),
    Mistake(
        "samples",
        "4.2",
        [("            do_sample=False,\n", "            do_sample=True,\n")],
        says="do_sample",
        only=True,
    ),
    Mistake(
        "writes_to_the_prompt",
        "4.2",
        [(GENERATE, "        [prompt[:, :-1].zero_() for prompt in prompts]\n" + GENERATE)],
        says="was written to",
        only=True,
    ),
    Mistake(
        "pads_with_minus_one", "4.2", [(IDS, IDS.replace("(n, 0)", "(n, 0), value=-1"))], says="no token id", only=True
    ),
    Mistake(
        "width_of_the_last_batch",
        "4.2",
        [
            (
                "        width = max(prompt.size(1) for prompt in prompts)\n",
                "        width = self._width = max(getattr(self, '_width', 0), *(prompt.size(1) for prompt in prompts))\n",
            ),
            (
                MASK,
                MASK.replace(
                    "torch.ones_like(prompt), (n, 0)",
                    "torch.ones_like(prompt), (n, 0), value=int(max(p.size(1) for p in prompts) < width)",
                ),
            ),
        ],
        says="differ",
    ),
    Mistake(
        "results_kept_by_request_id",
        "4.2",
        [
            (
                APPEND,
                "            if request_id in self._done:\n                return self._done[request_id]\n" + APPEND,
            ),
            (HAND_OUT, HAND_OUT + "                self._done[request.request_id] = result\n"),
            (
                "        self._closed = False\n",
                "        self._closed = False\n        self._done: dict[str, Tensor] = {}\n",
            ),
        ],
        says="request_ids repeat",
        only=True,
    ),
    # 4.3
    Mistake(
        "set_result_from_the_thread",
        "4.3",
        [*OF_THE_LOOP, woken("future.get_loop().is_closed() or future.cancelled() or future.method(value)")],
        says="woken only when",
        only=True,
    ),
    Mistake(
        "call_soon_from_the_thread",
        "4.3",
        [
            *OF_THE_LOOP,
            woken(
                "future.get_loop().is_closed() or future.get_loop().call_soon(lambda f=future, v=value: f.done() or f.method(v))"
            ),
        ],
        says="woken only when",
        only=True,
    ),
    Mistake(
        "one_loop_for_all",
        "4.3",
        [
            (
                AWAIT,
                "        self._loop = getattr(self, '_loop', None) or asyncio.get_running_loop()\n        return await asyncio.wrap_future(request.future, loop=self._loop)\n",
            )
        ],
        says="loop",
    ),
    Mistake(
        "loop_of_the_constructor",
        "4.3",
        [(WORKER, "        self._loop = asyncio.get_running_loop()\n" + WORKER)],
        says="no running event loop",
        only=True,
    ),
    Mistake(
        "blocks_on_the_result",
        "4.3",
        [(AWAIT, "        return request.future.result()\n")],
        says="event loop of the callers is blocked",
    ),
    Mistake(
        "generate_under_the_lock",
        "4.3",
        [(RUN, "        with self._changed:\n" + "".join(f"    {line}\n" for line in RUN.splitlines()))],
        says="event loop of the callers is blocked",
    ),
    Mistake(
        "generate_on_the_callers_loop",
        "4.3",
        [
            (
                STARTED,
                STARTED.replace(
                    "                self._run(started)\n",
                    "                self._loop.call_soon_threadsafe(self._run, started)\n",
                ),
            ),
            (AWAIT, "        self._loop = asyncio.get_running_loop()\n" + AWAIT),
        ],
        says="thread of the callers' event loop",
    ),
    Mistake(
        "results_at_the_end_of_the_queue",
        "4.3",
        [
            (
                HAND_OUT,
                "            self._done = [*getattr(self, '_done', []), *zip(batch, results, strict=True)]\n            if not self._waiting:\n                for request, result in self._done:\n                    request.future.set_result(result)\n                self._done = []\n",
            )
        ],
        says="hand results out after each batch",
    ),
    Mistake(
        "one_loop_wakes_all",
        "4.3",
        [
            *OF_THE_LOOP,
            (RUN, "        self._loop = batch[0].future.get_loop()\n" + RUN),
            (
                FAIL,
                FAIL.replace(
                    "request.future.set_exception(error)",
                    "self._loop.call_soon_threadsafe(lambda f=request.future, e=error: f.done() or f.set_exception(e))",
                ),
            ),
            (
                HAND_OUT,
                HAND_OUT.replace(
                    "request.future.set_result(result)",
                    "self._loop.call_soon_threadsafe(lambda f=request.future, r=result: f.done() or f.set_result(r))",
                ),
            ),
        ],
        says="each caller's future belongs to its own event loop",
    ),
    Mistake(
        "a_queue_for_each_loop",
        "4.3",
        [
            (REQUEST, REQUEST + "        request.request_id = str(id(asyncio.get_running_loop()))\n"),
            (
                KEY,
                "buckets.setdefault((self.get_length_bucket(request.input_tokens.size(1)), request.request_id), [])",
            ),
            (
                "        buckets: dict[int, list[BatchRequest]] = {}\n",
                "        buckets: dict[Any, list[BatchRequest]] = {}\n",
            ),
        ],
        says="from 3 event loops",
        only=True,
    ),
    # 4.4
    Mistake(
        "full_batch_waits",
        "4.4",
        [(FULL, "                    full = False\n")],
        says="a full batch goes at once",
        only=True,
    ),
    Mistake(
        "full_batch_waits_behind_an_older_one",
        "4.4",
        [(BY_AGE, "        return list(buckets.values())[:1]\n")],
        says="look at all buckets",
    ),
    Mistake(
        "one_by_one",
        "4.4",
        [
            (
                RUN,
                "        for request in batch:\n            try:\n                request.future.set_result(self._generate([request])[0])\n            except Exception as error:\n                request.future.set_exception(error)\n",
            )
        ],
        says="calls of generate",
    ),
    Mistake(
        "two_calls_at_a_time",
        "4.4",
        [
            (
                "                self._run(started)\n",
                "                self._runs = [*getattr(self, '_runs', []), threading.Thread(target=self._run, args=(started,))]\n                self._runs[-1].start()\n",
            ),
            (SERVE, "        for batch in iter(self._next_batch, []):\n"),
            (
                "        self._worker.join()\n",
                "        self._worker.join()\n        for thread in getattr(self, '_runs', []):\n            thread.join()\n",
            ),
        ],
        says="at a time",
    ),
    Mistake(
        "half_batches",
        "4.4",
        [(LIMIT, "        self.max_batch_size = max(max_batch_size // 2, 1)\n")],
        says="calls of generate",
    ),
    Mistake(
        "one_less_than_the_limit",
        "4.4",
        [(LIMIT, "        self.max_batch_size = max(max_batch_size - 1, 1)\n")],
        says="a full batch goes at once",
    ),
    Mistake("always_a_thousand_tokens", "4.4", [(MOST, "            max_new_tokens=64,\n")], says="64", only=True),
    Mistake(
        "sum_of_all_tokens",
        "4.4",
        [(MOST, "            max_new_tokens=sum(request.max_length for request in batch),\n")],
        says="was asked for 8",
        only=True,
    ),
    Mistake(
        "cancelled_is_run",
        "4.4",
        [
            (FILTER, "        pass\n"),
            (
                STARTED,
                "            [request.future.set_running_or_notify_cancel() for request in batch]\n            self._run(batch)\n",
            ),
            (HAND_OUT, HAND_OUT.replace("request.future.set", "request.future.cancelled() or request.future.set")),
            (
                ROOM,
                "            if sum(not request.future.cancelled() for request in self._waiting) >= self.max_queue_size:\n",
            ),
        ],
        says="generate was called for it all the same",
        only=True,
    ),
    Mistake(
        "sleeps_after_a_batch",
        "4.4",
        [
            (
                "                self._run(started)\n",
                "                self._run(started)\n                with self._changed:\n                    self._closed or self._changed.wait(self.max_wait_time)\n",
            )
        ],
        says="before the device was free",
    ),
    Mistake(
        "full_if_just_as_many_wait",
        "4.4",
        [(FULL, "                    full = len(requests) == self.max_batch_size\n")],
        says="before the device was free",
        only=True,
    ),
    Mistake(
        "cancelled_fill_a_batch",
        "4.4",
        [
            (FILTER, "        pass\n"),
            (
                ROOM,
                "            if sum(not request.future.cancelled() for request in self._waiting) >= self.max_queue_size:\n",
            ),
        ],
        says="a cancelled request waits no more",
        only=True,
    ),
    # 4.5
    Mistake(
        "limit_exceeded_by_one",
        "4.5",
        [(LIMIT, "        self.max_batch_size = max_batch_size + 1\n")],
        says="batches of",
    ),
    Mistake(
        "takes_one_more",
        "4.5",
        [
            (TAKE, "                    batch = requests[: self.max_batch_size + 1]\n"),
            (FULL, "                    full = len(batch) >= self.max_batch_size\n"),
        ],
        says="batches of",
    ),
    Mistake(
        "takes_all_that_wait",
        "4.5",
        [
            (TAKE, "                    batch = requests\n"),
            (FULL, "                    full = len(batch) >= self.max_batch_size\n"),
        ],
        says="batches of",
    ),
    Mistake(
        "partial_batch_never_goes",
        "4.5",
        [(GO, "                    if full or self._closed:\n")],
        says="something has to wake by itself",
    ),
    Mistake(
        "time_is_looked_at_on_arrival",
        "4.5",
        [(WAIT, "                self._changed.wait()\n")],
        says="something has to wake by itself",
    ),
    Mistake("goes_at_once", "4.5", [(GO, "                    if batch:\n")], says="went at once"),
    Mistake(
        "time_counts_from_the_newest",
        "4.5",
        [
            (GO, GO.replace("batch[0]", "batch[-1]")),
            (
                "self._waiting[0].timestamp + self.max_wait_time",
                "min(r.timestamp for r in self._waiting) + self.max_wait_time",
            ),
            (WAIT, "                self._changed.wait(None if due is None else max(due - now, 0.001))\n"),
        ],
        says="not from the newest",
        only=True,
    ),
    Mistake(
        "fixed_time",
        "4.5",
        [
            (
                "        self.max_wait_time = max_wait_time\n",
                "        self.max_wait_time = 0.1 if max_wait_time > 0 else 0\n",
            )
        ],
        says="of another batcher",
    ),
    Mistake(
        "zero_means_for_ever",
        "4.5",
        [("        self.max_wait_time = max_wait_time\n", "        self.max_wait_time = max_wait_time or 3600\n")],
        says="max_wait_time is 0",
        only=True,
    ),
    Mistake(
        "wakes_for_the_first_bucket_only",
        "4.5",
        [
            (
                "self._waiting[0].timestamp + self.max_wait_time if self._waiting else None",
                "self._waiting[0].timestamp + self.max_wait_time if len(self._by_bucket()) == 1 else None",
            )
        ],
        says="are the rest in their buckets",
    ),
    Mistake(
        "queue_shared_by_all_batchers",
        "4.5",
        [
            ("class DynamicBatcher:\n", "WAITING: list[BatchRequest] = []\n\n\nclass DynamicBatcher:\n"),
            (
                "        self._waiting: list[BatchRequest] = []  # the oldest first\n",
                "        self._waiting = WAITING\n",
            ),
            (FILTER, FILTER.replace("self._waiting =", "self._waiting[:] =")),
            (TAKEN, TAKEN.replace("self._waiting =", "self._waiting[:] =")),
        ],
        says="of another batcher",
    ),
    Mistake(
        "rest_goes_with_a_full_batch",
        "4.5",
        [
            (
                GO,
                "                    if full or self._fresh or now >= batch[0].timestamp + self.max_wait_time or self._closed:\n                        self._fresh = full\n",
            ),
            ("        self._closed = False\n", "        self._closed = self._fresh = False\n"),
        ],
        says="no full batch",
    ),
    Mistake(
        "half_the_time",
        "4.5",
        [("        self.max_wait_time = max_wait_time\n", "        self.max_wait_time = max_wait_time / 2\n")],
        says="after it came, with no full batch",
        only=True,
    ),
    Mistake(
        "time_counts_from_the_last_batch",
        "4.5",
        [
            (
                TAKEN,
                TAKEN
                + "                        for request in self._waiting:\n                            request.timestamp = now\n",
            ),
        ],
        says="went 0.",
    ),
    # 4.6
    Mistake(
        "shortest_first",
        "4.6",
        [(BY_AGE, "        return [buckets[edge] for edge in sorted(buckets)]\n")],
        says="waited longest",
        only=True,
    ),
    Mistake(
        "longest_first",
        "4.6",
        [(BY_AGE, "        return [buckets[edge] for edge in sorted(buckets, reverse=True)]\n")],
        says="waited longest",
        only=True,
    ),
    Mistake(
        "full_ones_first",
        "4.6",
        [
            (
                BY_AGE,
                "        return sorted(buckets.values(), key=lambda requests: len(requests) < self.max_batch_size)\n",
            )
        ],
        says="waited longest",
        only=True,
    ),
    Mistake(
        "by_the_youngest",
        "4.6",
        [
            (
                BY_AGE,
                "        return sorted(buckets.values(), key=lambda requests: requests[: self.max_batch_size][-1].timestamp)\n",
            )
        ],
        says="waited longest",
        only=True,
    ),
    Mistake(
        "first_used_bucket_first",
        "4.6",
        [
            (
                BY_AGE,
                "        self._order = [*(order := getattr(self, '_order', [])), *(edge for edge in buckets if edge not in order)]\n        return [buckets[edge] for edge in self._order if edge in buckets]\n",
            )
        ],
        says="waited longest",
        only=True,
    ),
    Mistake(
        "newest_of_a_bucket_first",
        "4.6",
        [(TAKE, "                    batch = requests[-self.max_batch_size :]\n")],
        says="waited longest",
        only=True,
    ),
    Mistake(
        "overdue_ones_first",
        "4.6",
        [
            (
                BY_AGE,
                "        return sorted(buckets.values(), key=lambda requests: len(requests) >= self.max_batch_size)\n",
            )
        ],
        says="waited longest",
        only=True,
    ),
    Mistake(
        "shortest_of_a_bucket_first",
        "4.6",
        [
            (
                TAKE,
                "                    batch = requests[:1] + sorted(requests[1:], key=lambda r: r.input_tokens.size(1))\n"
                "                    batch = batch[: self.max_batch_size]\n",
            )
        ],
        says="waited longest",
        only=True,
    ),
    # 4.7
    Mistake("worker_dies_on_an_error", "4.7", [(FAIL, FAIL + "            raise\n")], says="worker has to live on"),
    Mistake(
        "errors_are_lost",
        "4.7",
        [
            (
                RUN,
                "        for request, result in zip(batch, self._generate(batch), strict=True):\n            request.future.set_result(result)\n",
            )
        ],
        says="every caller of the batch gets the error",
    ),
    Mistake(
        "error_to_the_first_only",
        "4.7",
        [(FAIL, "            batch[0].future.set_exception(error)\n")],
        says="every caller of the batch gets the error",
        only=True,
    ),
    Mistake(
        "error_wrapped",
        "4.7",
        [(FAIL, FAIL.replace("set_exception(error)", "set_exception(RuntimeError(f'generate failed: {error}'))"))],
        says="same type and text",
        only=True,
    ),
    Mistake(
        "tries_each_alone",
        "4.7",
        [
            (
                FAIL,
                "            for request in batch if len(batch) > 1 else []:\n                self._run([request])\n"
                + FAIL.replace("in batch:", "in batch if len(batch) == 1 else []:"),
            )
        ],
        says="same type and text",
        only=True,
    ),
    Mistake(
        "error_as_text",
        "4.7",
        [(FAIL, FAIL.replace("set_exception(error)", "set_exception(type(error)(str(error)))"))],
        says="KeyError",
        only=True,
    ),
    Mistake(
        "error_as_result",
        "4.7",
        [(FAIL, FAIL.replace("set_exception(error)", "set_result(error)"))],
        says="None",
        only=True,
    ),
    Mistake(
        "cancels_on_an_error",
        "4.7",
        [
            (
                FAIL,
                "            for request in batch:\n                request.future._state = 'PENDING'\n                request.future.cancel()\n",
            )
        ],
        says="Cancelled",
        only=True,
    ),
    Mistake(
        "error_reaches_all_who_wait",
        "4.7",
        [
            (
                "            for request in batch:\n                request.future.set_exception(error)\n",
                "            with self._changed:\n                waiting, self._waiting = self._waiting, []\n            for request in [*batch, *waiting]:\n                request.future.set_exception(error)\n",
            )
        ],
        says="OSError",
    ),
    Mistake(
        "empty_prompt_accepted",
        "4.7",
        [(CHECKS, CHECKS.replace(" or input_tokens.size(1) == 0", ""))],
        says="ValueError was wanted",
        only=True,
    ),
    Mistake(
        "two_rows_accepted",
        "4.7",
        [(CHECKS, CHECKS.replace(" or input_tokens.size(0) != 1", ""))],
        says="ValueError",
        only=True,
    ),
    Mistake(
        "any_dimensions_accepted",
        "4.7",
        [(CHECKS, "        if input_tokens.numel() == 0 or input_tokens.dim() > 1 and input_tokens.size(0) != 1:\n")],
        says="ValueError",
        only=True,
    ),
    Mistake("any_dtype_accepted", "4.7", [(DTYPE, "        if False:\n")], says="ValueError", only=True),
    Mistake(
        "any_integer_accepted",
        "4.7",
        [(DTYPE, "        if input_tokens.is_floating_point() or input_tokens.dtype == torch.bool:\n")],
        says="int32",
        only=True,
    ),
    Mistake(
        "max_length_0_accepted",
        "4.7",
        [(MAX_LENGTH, "        if max_length < 0:\n")],
        says="ValueError was wanted",
        only=True,
    ),
    Mistake(
        "wrong_kind_of_refusal",
        "4.7",
        [('raise ValueError(f"max_length is', 'raise TypeError(f"max_length is')],
        says="TypeError",
        only=True,
    ),
    Mistake(
        "refused_in_the_worker",
        "4.7",
        [
            (MAX_LENGTH, "        if False:\n"),
            (
                PROMPTS,
                "        if any(request.max_length < 1 for request in batch):\n            raise ValueError('max_length')\n"
                + PROMPTS,
            ),
        ],
        says="ValueError",
        only=True,
    ),
    Mistake(
        "cancelled_future_kills_the_worker",
        "4.7",
        [
            *OF_THE_LOOP,
            woken("future.get_loop().call_soon_threadsafe(future.method, value)"),
            (
                "                self._run(started)\n",
                "                self._run(started)\n                if any(request.future.cancelled() for request in started):\n                    raise asyncio.InvalidStateError\n",
            ),
        ],
        says="a cancelled future takes no result",
    ),
    Mistake(
        "closed_loop_kills_the_worker",
        "4.7",
        [
            *OF_THE_LOOP,
            woken("future.get_loop().call_soon_threadsafe(lambda f=future, v=value: f.done() or f.method(v))"),
        ],
        says="event loop of r0 was closed",
        only=True,
    ),
    Mistake(
        "cancelled_caller_fails_its_batch",
        "4.7",
        [
            (
                AWAIT,
                "        try:\n            return await asyncio.wrap_future(request.future)\n        except asyncio.CancelledError:\n            self._given_up = True\n            raise\n",
            ),
            (
                HAND_OUT,
                "            if getattr(self, '_given_up', False):\n                self._given_up = False\n                for request in batch:\n                    request.future.cancel() or request.future.set_exception(RuntimeError('cancelled'))\n                return\n"
                + HAND_OUT,
            ),
        ],
        says="cancelled",
    ),
    # 4.8
    Mistake(
        "queue_never_full", "4.8", [(ROOM, "            if False:\n")], says="QueueFullError was wanted", only=True
    ),
    Mistake(
        "one_too_many_waits", "4.8", [(ROOM, ROOM.replace(">=", ">"))], says="QueueFullError was wanted", only=True
    ),
    Mistake(
        "one_too_few_waits",
        "4.8",
        [(ROOM, ROOM.replace("len(self._waiting)", "len(self._waiting) + 1"))],
        says="may wait beside the one that runs",
    ),
    Mistake(
        "queue_per_bucket",
        "4.8",
        [
            (
                ROOM,
                "            if sum(r.input_tokens.size(1) // 8 == input_tokens.size(1) // 8 for r in self._waiting) >= self.max_queue_size:\n",
            )
        ],
        says="QueueFullError was wanted",
        only=True,
    ),
    Mistake(
        "running_ones_count",
        "4.8",
        [
            (ROOM, "            if len(self._waiting) + getattr(self, '_running', 0) >= self.max_queue_size:\n"),
            (
                "                self._run(started)\n",
                "                self._running = len(started)\n                self._run(started)\n                self._running = 0\n",
            ),
        ],
        says="may wait beside the one that runs",
    ),
    Mistake(
        "counts_all_ever",
        "4.8",
        [
            (
                ROOM,
                "            self._ever = getattr(self, '_ever', 0) + 1\n            if self._ever > self.max_queue_size:\n",
            )
        ],
        says="may wait beside the one that runs",
    ),
    Mistake("cancelled_keep_their_place", "4.8", [(FORGET, ROOM)], says="there is room for one more", only=True),
    Mistake(
        "waits_for_room",
        "4.8",
        [
            (
                ROOM,
                "            while len(self._waiting) >= self.max_queue_size:\n                self._changed.release()\n                await asyncio.sleep(0.001)\n                self._changed.acquire()\n            if False:\n",
            )
        ],
        says="QueueFullError was wanted",
        only=True,
    ),
    Mistake(
        "refused_and_run",
        "4.8",
        [
            (
                ROOM,
                "            if len(self._waiting) >= self.max_queue_size:\n                self._waiting.append(request)\n",
            )
        ],
        says="was run",
        only=True,
    ),
    Mistake(
        "queue_no_smaller_than_a_batch",
        "4.8",
        [(ROOM, ROOM.replace("self.max_queue_size", "max(self.max_queue_size, self.max_batch_size)"))],
        says="max_queue_size is 2",
        only=True,
    ),
    Mistake(
        "failed_keep_their_place",
        "4.8",
        [
            (ROOM, ROOM.replace("len(self._waiting)", "len(self._waiting) + self._lost")),
            (FAIL, "            self._lost += len(batch)\n" + FAIL),
            ("        self._closed = False\n", "        self._closed = False\n        self._lost = 0\n"),
        ],
        says="none waits",
        only=True,
    ),
    # 4.9
    Mistake(
        "leaves_callers_hanging",
        "4.9",
        [(END, ""), (PRUNE, "                if self._closed:\n                    return []\n" + PRUNE)],
        says="they waited when shutdown() was called",
        only=True,
    ),
    Mistake(
        "cancels_what_waits",
        "4.9",
        [
            (
                SHUT,
                SHUT.replace(
                    "            self._changed.notify_all()\n",
                    "            for request in self._waiting:\n                request.future.cancel()\n            self._changed.notify_all()\n",
                ),
            )
        ],
        says="was cancelled, though its caller was not",
        only=True,
    ),
    Mistake(
        "fails_what_waits",
        "4.9",
        [
            (
                SHUT,
                SHUT.replace(
                    "            self._changed.notify_all()\n",
                    "            for request in self._waiting:\n                request.future.set_exception(RuntimeError('shut down'))\n            self._waiting = []\n            self._changed.notify_all()\n",
                ),
            )
        ],
        says="shut down",
        only=True,
    ),
    Mistake(
        "rest_waits_for_its_time",
        "4.9",
        [
            (GO, GO.replace(" or self._closed", "")),
            (END, "                if self._closed and not self._waiting:\n                    return []\n"),
        ],
        says="shutdown() did not return",
        only=True,
    ),
    Mistake("returns_early", "4.9", [("        self._worker.join()\n", "")], says="shutdown() returned", only=True),
    Mistake(
        "waits_a_moment_only",
        "4.9",
        [("        self._worker.join()\n", "        self._worker.join(0.001)\n")],
        says="shutdown() returned",
        only=True,
    ),
    Mistake("late_request_hangs", "4.9", [(CLOSED, "")], says="the batcher is shut down", only=True),
    Mistake(
        "late_request_is_refused_wrongly",
        "4.9",
        [(CLOSED, CLOSED.replace("RuntimeError", "ValueError"))],
        says="RuntimeError was wanted",
        only=True,
    ),
    Mistake(
        "second_shutdown_raises",
        "4.9",
        [(SHUT, "        if self._closed:\n            raise RuntimeError('shut down twice')\n" + SHUT)],
        says="shut down twice",
        only=True,
    ),
    Mistake(
        "second_shutdown_hangs",
        "4.9",
        [(SHUT, "        while self._closed:\n            time.sleep(0.01)\n" + SHUT)],
        says="did not return",
        only=True,
    ),
    Mistake(
        "thread_stays",
        "4.9",
        [
            (END, "                if self._closed:\n                    self._served.set()\n"),
            (
                "        self._closed = False\n",
                "        self._closed = False\n        self._served = threading.Event()\n",
            ),
            ("        self._worker.join()\n", "        self._served.wait()\n"),
        ],
        says="is alive",
        only=True,
    ),
    Mistake(
        "shutdown_needs_the_callers_loop",
        "4.9",
        [
            (
                "        self._worker.join()\n",
                "        self._worker.join()\n        while any(not request.future.done() for request in self._all):\n            time.sleep(0.001)\n",
            ),
            (
                "        self._closed = False\n",
                "        self._closed = False\n        self._all: list[BatchRequest] = []\n",
            ),
            (
                AWAIT,
                "        self._all = [other for other in self._all if not other.future.done()] + [request]\n        return await request.future\n",
            ),
            OF_THE_LOOP[0],
            OF_THE_LOOP[2],
            woken(
                "future.get_loop().is_closed() or future.get_loop().call_soon_threadsafe(lambda f=future, v=value: f.done() or f.method(v))"
            ),
        ],
        says="shutdown() did not return",
        only=True,
    ),
    Mistake(
        "an_error_ends_the_rest",
        "4.9",
        [(FAIL, FAIL + "            if self._closed:\n                raise\n")],
        says="device lost",
        only=True,
    ),
    Mistake(
        "buckets_mix_at_the_end",
        "4.9",
        [(KEY, KEY.replace("self.get_length_bucket(", "self._closed or self.get_length_bucket("))],
        says="to its bucket, too",
        only=True,
    ),
    Mistake(
        "returns_while_the_last_batch_runs",
        "4.9",
        [("        self._worker.join()\n", "        while self._waiting:\n            time.sleep(0.001)\n")],
        says="while the last batch still ran",
        only=True,
    ),
    # 4.10
    Mistake(
        "own_test_asserts_nothing",
        "4.10",
        [
            (
                "    torch.manual_seed(0)\n    decoder = Decoder()\n",
                "    return\n    torch.manual_seed(0)\n    decoder = Decoder()\n",
            )
        ],
        says="passes although",
        only=True,
    ),
    Mistake(
        "own_test_fails_on_right_code",
        "4.10",
        [("    assert max(rows for rows, _ in calls) <= 3", "    assert max(rows for rows, _ in calls) <= 2")],
        says="fails on right code",
        only=True,
    ),
    Mistake(
        "own_test_hangs",
        "4.10",
        [
            (
                "    torch.manual_seed(0)\n    decoder = Decoder()\n",
                "    await asyncio.sleep(100)\n    torch.manual_seed(0)\n    decoder = Decoder()\n",
            )
        ],
        says="did not end",
        only=True,
    ),
]
