"""Engines that share too little, too much, or the wrong blocks (9.8)."""

from harness.model.bank import Mistake

SOURCE = "        source = max(self._running, key=lambda other: _common(request, other), default=request)\n"
SHARED = "        shared = _common(request, source)\n"
NEEDED = "        needed = math.ceil(len(request.tokens) / self._block_size) - shared // self._block_size\n"
FORK = "        if shared:\n            self.cache.fork(source.id, request.id, shared)\n"
FED = "        request.fed = shared\n"
LIMIT = "    limit = min(len(request.tokens) - 1, other.fed)\n"
COMMON = "    return next((i for i in range(limit) if request.tokens[i] != other.tokens[i]), limit)\n"
DONE = "                self._running.remove(request)\n                self.cache.free(request.id)\n"
STATE = "        self._running: list[_Request] = []\n"
USED = '            "blocks_used": self._num_blocks - self.cache.allocator.num_free,\n'
COUNT_FED = '            self._counts["tokens_fed"] += len(request.tokens) - request.fed\n'
ENOUGH = "        if needed > self.cache.allocator.num_free:\n"

MISTAKES = [
    Mistake("no_sharing", "9.8", "the same were wanted", (SHARED, "        shared = 0\n"), wasteful=True),
    Mistake(
        "only_equal_prompts_share",
        "9.8",
        "",
        (
            SHARED,
            SHARED
            + (
                "        if request.tokens[: request.prompt] != source.tokens[: source.prompt]:\n"
                "            shared = 0\n"
            ),
        ),
        wasteful=True,
    ),
    Mistake(
        "only_the_whole_prompt_is_shared",
        "9.8",
        "",
        (
            SHARED,
            SHARED + ("        if shared < min(source.prompt, len(request.tokens) - 1):\n            shared = 0\n"),
        ),
        wasteful=True,
    ),
    Mistake(
        "blocks_known_by_themselves",
        "9.8",
        "",
        (
            COMMON,
            (
                "    return max((n for n in range(limit + 1) if request.tokens[max(n - 2, 0) : n] == "
                "other.tokens[max(n - 2, 0) : n]), default=0)\n"
            ),
        ),
    ),
    Mistake("nothing_left_to_feed", "9.8", "", (LIMIT, "    limit = min(len(request.tokens), other.fed)\n")),
    Mistake("what_is_not_fed_yet", "9.8", "", (LIMIT, "    limit = min(len(request.tokens) - 1, len(other.tokens))\n")),
    Mistake(
        "generated_tokens_are_not_shared",
        "9.8",
        "",
        (LIMIT, "    limit = min(len(request.tokens) - 1, other.fed, other.prompt)\n"),
        wasteful=True,
    ),
    Mistake(
        "the_own_answer_is_not_shared",
        "9.8",
        "",
        (LIMIT, "    limit = min(len(request.tokens) - 1, other.fed, request.prompt)\n"),
        only=True,
    ),
    Mistake(
        "the_first_that_runs",
        "9.8",
        "",
        (SOURCE, ("        source = next((other for other in self._running if _common(request, other)), request)\n")),
        only=True,
    ),
    Mistake(
        "the_youngest_that_runs",
        "9.8",
        "",
        (SOURCE, "        source = self._running[-1] if self._running else request\n"),
        only=True,
    ),
    Mistake(
        "the_longest_that_runs", "9.8", "", (SOURCE, SOURCE.replace("_common(request, other)", "other.fed")), only=True
    ),
    Mistake(
        "those_that_come_together",
        "9.8",
        "",
        (FED, "        request.fed, request.now = shared, len(request.tokens)\n"),
        (LIMIT, "    limit = min(len(request.tokens) - 1, other.now or other.fed)\n"),
        ("    fed: int = 0\n", "    fed: int = 0\n    now: int = 0\n"),
        (
            "            request.fed = len(request.tokens)\n",
            "            request.fed, request.now = len(request.tokens), 0\n",
        ),
        only=True,
    ),
    Mistake(
        "copies_what_it_shares",
        "9.8",
        "",
        (FORK, ""),
        (NEEDED, "        needed = math.ceil(len(request.tokens) / self._block_size)\n"),
        (
            "        self.cache.append(request.id, len(request.tokens) - shared)\n",
            (
                "        self.cache.append(request.id, len(request.tokens))\n"
                "        for place in range(shared):\n"
                "            (old,), (new,) = (self.cache._slots(one.id, place, place + 1) for one "
                "in (source, request))\n"
                "            for pool in (self.cache.keys, self.cache.values):\n"
                "                pool.flatten(1, 2)[:, new] = pool.flatten(1, 2)[:, old]\n"
            ),
        ),
        wasteful=True,
    ),
    Mistake("shared_tokens_are_fed_again", "9.8", "", (FED, "        request.fed = 0\n"), wasteful=True),
    Mistake(
        "shared_tokens_count_as_fed",
        "9.8",
        "tokens_fed",
        (
            COUNT_FED,
            (
                '            self._counts["tokens_fed"] += len(request.tokens) - (0 if '
                "len(request.tokens) == request.prompt else request.fed)\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "shared_blocks_count_as_needed",
        "9.8",
        "",
        (NEEDED, "        needed = math.ceil(len(request.tokens) / self._block_size)\n"),
        only=True,
    ),
    Mistake(
        "half_a_block_is_no_need",
        "9.8",
        "",
        (
            NEEDED,
            (
                "        needed = math.ceil(len(request.tokens) / self._block_size) - "
                "math.ceil(shared / self._block_size)\n"
            ),
        ),
    ),
    Mistake(
        "shared_blocks_count_twice",
        "9.8",
        "blocks_used",
        (
            USED,
            ('            "blocks_used": sum(len(self.cache.block_table(request.id)) for request in self._running),\n'),
        ),
        only=True,
    ),
    Mistake(
        "only_full_prompts_of_blocks",
        "9.8",
        "",
        (SHARED, SHARED + "        shared = shared if shared % self._block_size == 0 else 0\n"),
        wasteful=True,
    ),
    Mistake(
        "one_block_at_most",
        "9.8",
        "",
        (SHARED, "        shared = min(_common(request, source), self._block_size)\n"),
        only=True,
    ),
    Mistake(
        "one_sharer_at_most",
        "9.8",
        "",
        (
            SHARED,
            SHARED
            + (
                "        if shared and self.cache.allocator.ref_count(self.cache.block_table(source.id)[0]) > 1:\n"
                "            shared = 0\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "who_comes_back_shares_nothing",
        "9.8",
        "",
        (SHARED, SHARED + "        if len(request.tokens) > request.prompt:\n            shared = 0\n"),
        only=True,
    ),
    Mistake(
        "kept_for_later",
        "9.8",
        "",
        (STATE, STATE + "        self._old: _Request | None = None\n"),
        (
            DONE,
            (
                "                self._running.remove(request)\n"
                "                if self._old is not None:\n"
                "                    self.cache.free(self._old.id)\n"
                "                self._old = request\n"
            ),
        ),
        (
            SOURCE,
            "        everyone = [*self._running, *([self._old] if self._old else [])]\n"
            + SOURCE.replace("max(self._running", "max(everyone"),
        ),
    ),
    Mistake(
        "kept_until_someone_comes",
        "9.8",
        "",
        (
            DONE,
            (
                "                self._running.remove(request)\n"
                "                if self._old:\n"
                "                    self.cache.free(self._old)\n"
                "                self._old = -1 - request.id\n"
                "                self.cache.fork(request.id, self._old, request.fed)\n"
                "                self.cache.free(request.id)\n"
            ),
        ),
        (STATE, STATE + "        self._old = 0\n"),
    ),
    Mistake(
        "sharers_of_the_finished_lose_blocks",
        "9.8",
        "",
        (
            DONE,
            DONE.replace(
                "self.cache.free(request.id)",
                (
                    "for block in self.cache.block_table(request.id):\n"
                    "                    if self.cache.allocator.ref_count(block) > 1 and "
                    "len(self._running) > 1:\n"
                    "                        self.cache.allocator.free(block)\n"
                    "                self.cache.free(request.id)"
                ),
            ),
        ),
    ),
    Mistake(
        "shares_what_is_fed_in_this_step",
        "9.8",
        "tokens were fed",
        (LIMIT, LIMIT.replace("other.fed)", "other.fed + bool(other.fed))")),
        only=True,
    ),
]
