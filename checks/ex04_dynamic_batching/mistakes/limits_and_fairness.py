"""Wrong answers about limits (4.5) and fairness (4.6)."""

from harness.model.bank import Mistake

LIMIT = "self.max_batch_size = max_batch_size"
TIME = "self.max_wait_time = max_wait_time"
TAKE = "batch = requests[: self.max_batch_size]"
FULL = "full = len(batch) == self.max_batch_size"
FULL_OR_MORE = "full = len(batch) >= self.max_batch_size"
GO = "if full or now >= batch[0].timestamp + self.max_wait_time or self._closed:"
DUE = "self._waiting[0].timestamp + self.max_wait_time if self._waiting else None"
WAIT = "self._changed.wait(None if due is None else due - now)"
TAKEN = "self._waiting = [request for request in self._waiting if request not in batch]"
FORGET = "self._waiting = [request for request in self._waiting if not request.future.cancelled()]"
BY_AGE = "return list(buckets.values())"


MISTAKES = [
    # 4.5
    Mistake("limit_exceeded_by_one", "4.5", "batches of", (LIMIT, "self.max_batch_size = max_batch_size + 1")),
    Mistake(
        "takes_one_more",
        "4.5",
        "batches of",
        (TAKE, "batch = requests[: self.max_batch_size + 1]"),
        (FULL, FULL_OR_MORE),
    ),
    Mistake("takes_all_that_wait", "4.5", "batches of", (TAKE, "batch = requests"), (FULL, FULL_OR_MORE)),
    Mistake(
        "partial_batch_never_goes",
        "4.5",
        "something has to wake by itself",
        (GO, "if full or self._closed:"),
    ),
    Mistake(
        "time_is_looked_at_on_arrival",
        "4.5",
        "something has to wake by itself",
        (WAIT, "self._changed.wait()"),
    ),
    Mistake("goes_at_once", "4.5", "waits for its own max_wait_time", (GO, "if batch:")),
    Mistake(
        "time_counts_from_the_newest",
        "4.5",
        "not from the newest",
        (GO, GO.replace("batch[0]", "batch[-1]")),
        (DUE, "min(r.timestamp for r in self._waiting) + self.max_wait_time if self._waiting else None"),
        (WAIT, "self._changed.wait(None if due is None else max(due - now, 0.001))"),
        only=True,
    ),
    Mistake(
        "fixed_time",
        "4.5",
        "of another batcher",
        (TIME, "self.max_wait_time = 0.1 if max_wait_time > 0 else 0"),
    ),
    Mistake(
        "zero_means_for_ever",
        "4.5",
        "max_wait_time is 0",
        (TIME, "self.max_wait_time = max_wait_time or 3600"),
        only=True,
    ),
    Mistake(
        "wakes_for_the_first_bucket_only",
        "4.5",
        "are the rest in their buckets",
        (DUE, DUE.replace("if self._waiting", "if len(self._by_bucket()) == 1")),
    ),
    Mistake(
        "queue_shared_by_all_batchers",
        "4.5",
        "of another batcher",
        ("class DynamicBatcher:\n", "WAITING: list[BatchRequest] = []\n\n\nclass DynamicBatcher:\n"),
        ("self._waiting: list[BatchRequest] = []  # the oldest first", "self._waiting = WAITING"),
        (FORGET, FORGET.replace("self._waiting =", "self._waiting[:] =")),
        (TAKEN, TAKEN.replace("self._waiting =", "self._waiting[:] =")),
    ),
    Mistake(
        "rest_goes_with_a_full_batch",
        "4.5",
        "waits for its own max_wait_time",
        (
            GO,
            """if full or self._fresh or now >= batch[0].timestamp + self.max_wait_time or self._closed:
                        self._fresh = full""",
        ),
        ("self._closed = False", "self._closed = self._fresh = False"),
    ),
    Mistake(
        "half_the_time",
        "4.5",
        "after it came, with no full batch",
        (TIME, "self.max_wait_time = max_wait_time / 2"),
        only=True,
    ),
    Mistake(
        "time_counts_from_the_last_batch",
        "4.5",
        "went 0.",
        (
            TAKEN,
            """self._waiting = [request for request in self._waiting if request not in batch]
                        for request in self._waiting:
                            request.timestamp = now""",
        ),
    ),
    # 4.6
    Mistake(
        "shortest_first",
        "4.6",
        "waited longest",
        (BY_AGE, "return [buckets[edge] for edge in sorted(buckets)]"),
        only=True,
    ),
    Mistake(
        "longest_first",
        "4.6",
        "waited longest",
        (BY_AGE, "return [buckets[edge] for edge in sorted(buckets, reverse=True)]"),
        only=True,
    ),
    Mistake(
        "full_ones_first",
        "4.6",
        "waited longest",
        (BY_AGE, "return sorted(buckets.values(), key=lambda requests: len(requests) < self.max_batch_size)"),
        only=True,
    ),
    Mistake(
        "by_the_youngest",
        "4.6",
        "waited longest",
        (
            BY_AGE,
            "return sorted(buckets.values(), key=lambda requests: requests[: self.max_batch_size][-1].timestamp)",
        ),
        only=True,
    ),
    Mistake(
        "first_used_bucket_first",
        "4.6",
        "waited longest",
        (
            BY_AGE,
            "self._order = [*(order := getattr(self, '_order', [])), "
            "*(edge for edge in buckets if edge not in order)]\n"
            "        return [buckets[edge] for edge in self._order if edge in buckets]",
        ),
        only=True,
    ),
    Mistake(
        "newest_of_a_bucket_first",
        "4.6",
        "waited longest",
        (TAKE, "batch = requests[-self.max_batch_size :]"),
        only=True,
    ),
    Mistake(
        "overdue_ones_first",
        "4.6",
        "waited longest",
        (BY_AGE, "return sorted(buckets.values(), key=lambda requests: len(requests) >= self.max_batch_size)"),
        only=True,
    ),
    Mistake(
        "shortest_of_a_bucket_first",
        "4.6",
        "waited longest",
        (
            TAKE,
            """batch = requests[:1] + sorted(requests[1:], key=lambda r: r.input_tokens.size(1))
                    batch = batch[: self.max_batch_size]""",
        ),
        only=True,
    ),
    Mistake(
        "newest_takes_the_place_of_a_cancelled",
        "4.6",
        "was cancelled while it waited",
        (
            FORGET,
            """for place in reversed(range(len(self._waiting))):
            if self._waiting[place].future.cancelled():
                last = self._waiting.pop()
                if place < len(self._waiting):
                    self._waiting[place] = last""",
        ),
        only=True,
    ),
    Mistake(
        "a_bucket_keeps_the_age_of_a_cancelled",
        "4.6",
        "was cancelled while it waited",
        ("self._closed = False", "self._closed = False\n        self._since: dict[int, float] = {}"),
        (
            "self._waiting.append(request)",
            """self._waiting.append(request)
            self._since.setdefault(self.get_length_bucket(input_tokens.size(1)), request.timestamp)""",
        ),
        (
            TAKEN,
            TAKEN
            + """
                        edge = self.get_length_bucket(batch[0].input_tokens.size(1))
                        self._since.pop(edge)
                        if len(requests) > len(batch):
                            self._since[edge] = requests[len(batch)].timestamp""",
        ),
        (BY_AGE, "return [buckets[edge] for edge in sorted(buckets, key=self._since.__getitem__)]"),
        only=True,
    ),
]
