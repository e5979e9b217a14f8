"""Engines that run out of blocks in the wrong way (9.7)."""

from harness.model.bank import Mistake

MAKE_ROOM = """        for request in list(self._running):
            while request in self._running and not self._has_slots(request):
                self._preempt(self._running[-1])
"""
ADMIT = """        while self._waiting and len(self._running) < self._max_batch_size and self._admit(self._waiting[0]):
            self._running.append(self._waiting.pop(0))
"""
QUEUED = "        self._waiting.insert(0, request)  # It is older than all that wait.\n"
FREED = "        self.cache.free(request.id)\n        request.fed = 0\n"
COUNTED = '        self._counts["preemptions"] += 1\n'
TRY = "        try:\n            self.cache.append(request.id, len(request.tokens) - self.cache.length(request.id))\n"
ENOUGH = "        if needed > self.cache.allocator.num_free:\n"
NOTHING = "        if not self._running:\n            return {}\n"

MISTAKES = [
    Mistake(
        "no_preemption",
        "9.7",
        "your code raises OutOfBlocksError",
        (
            "        except OutOfBlocksError:\n            return False\n",
            "        except OutOfBlocksError:\n            raise\n",
        ),
        only=True,
    ),
    Mistake(
        "oldest_preempted",
        "9.7",
        "were wanted",
        (MAKE_ROOM, MAKE_ROOM.replace("self._running[-1]", "self._running[0]")),
        (QUEUED, QUEUED + "        self._waiting.sort(key=lambda request: request.id)\n"),
        only=True,
    ),
    Mistake(
        "who_asks_is_preempted",
        "9.7",
        "were wanted",
        (MAKE_ROOM, MAKE_ROOM.replace("self._running[-1]", "request")),
        (QUEUED, QUEUED + "        self._waiting.sort(key=lambda request: request.id)\n"),
        only=True,
    ),
    Mistake(
        "never_the_one_who_asks",
        "9.7",
        "",
        (
            MAKE_ROOM,
            MAKE_ROOM.replace(
                "self._preempt(self._running[-1])",
                (
                    "self._preempt(self._running[-1] if self._running[-1] is not request or "
                    "len(self._running) == 1 else self._running[-2])"
                ),
            ),
        ),
        (QUEUED, QUEUED + "        self._waiting.sort(key=lambda request: request.id)\n"),
    ),
    Mistake(
        "largest_preempted",
        "9.7",
        "were wanted",
        (MAKE_ROOM, MAKE_ROOM.replace("self._running[-1]", "max(self._running, key=lambda one: len(one.tokens))")),
        (QUEUED, QUEUED + "        self._waiting.sort(key=lambda request: request.id)\n"),
        only=True,
    ),
    Mistake(
        "all_younger_preempted",
        "9.7",
        "were wanted",
        (
            MAKE_ROOM,
            MAKE_ROOM
            + (
                "                while self._running[-1:] not in ([], [request]) and request in "
                "self._running:\n"
                "                    self._preempt(self._running[-1])\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "preempts_while_there_is_room",
        "9.7",
        "were wanted",
        (
            MAKE_ROOM,
            MAKE_ROOM.replace(
                "        for request",
                (
                    "        if len(self._running) > 1 and not self.cache.allocator.num_free:\n"
                    "            self._preempt(self._running[-1])\n"
                    "        for request"
                ),
            ),
        ),
    ),
    Mistake(
        "preempts_before_the_last_block",
        "9.7",
        "were wanted",
        (
            TRY,
            TRY.replace(
                "        try:\n",
                (
                    "        try:\n"
                    "            if self.cache.allocator.num_free == 1 and len(self._running) > 1 and "
                    "request.fed % self._block_size == 0:\n"
                    "                raise OutOfBlocksError\n"
                ),
            ),
        ),
    ),
    Mistake(
        "generated_tokens_lost", "9.7", "", (FREED, FREED + "        del request.tokens[request.prompt :]\n"), only=True
    ),
    Mistake("last_token_lost", "9.7", "", (FREED, FREED + "        request.tokens.pop()\n"), only=True),
    Mistake(
        "begins_anew_in_silence",
        "9.7",
        "",
        (
            FREED,
            FREED
            + (
                "        request.prompt, request.most = len(request.tokens), request.most + "
                "len(request.tokens) - request.prompt\n"
            ),
        ),
    ),
    Mistake(
        "prompt_is_what_came_back",
        "9.7",
        "run()",
        (FREED, FREED + "        request.prompt = len(request.tokens)\n"),
        only=True,
    ),
    Mistake("the_preempted_wait_last", "9.7", "were wanted", (QUEUED, "        self._waiting.append(request)\n")),
    Mistake(
        "preempted_in_the_wrong_order",
        "9.7",
        "",
        (QUEUED, "        self._waiting.insert(min(1, len(self._waiting)), request)\n"),
    ),
    Mistake(
        "blocks_leak_at_preemption",
        "9.7",
        "",
        (
            FREED,
            (
                "        self.cache.free(request.id)\n"
                "        if self.cache.allocator.num_free > 2:\n"
                "            self.cache.allocator.allocate()\n"
                "        request.fed = 0\n"
            ),
        ),
    ),
    Mistake(
        "blocks_stay_with_the_preempted",
        "9.7",
        "",
        (
            FREED,
            (
                "        if request.fed % self._block_size or len(self._running) > 1:\n"
                "            self.cache.free(request.id)\n"
                "        else:\n"
                "            self.cache.free(request.id)\n"
                "            self.cache.append(request.id, 1)\n"
                "        request.fed = 0\n"
            ),
        ),
    ),
    Mistake("preemptions_are_not_counted", "9.7", "preemptions", (COUNTED, ""), only=True),
    Mistake(
        "preempted_tokens_counted",
        "9.7",
        "preemptions",
        (COUNTED, '        self._counts["preemptions"] += len(request.tokens)\n'),
        only=True,
    ),
    Mistake("newcomers_before_those_that_run", "9.7", "was wanted", (MAKE_ROOM + ADMIT, ADMIT + MAKE_ROOM)),
    Mistake(
        "newcomers_preempt",
        "9.7",
        "were wanted",
        (
            ENOUGH,
            (
                "        while needed > self.cache.allocator.num_free and len(self._running) > 1 and "
                "self._running[-1].fed:\n"
                "            last = self._running.pop()\n"
                "            self.cache.free(last.id)\n"
                "            last.fed = 0\n"
                "            self._waiting.insert(1, last)\n"
            )
            + ENOUGH,
        ),
        only=True,
    ),
    Mistake(
        "a_step_of_preemption_runs_nothing",
        "9.7",
        "",
        (
            MAKE_ROOM,
            '        before = self._counts["preemptions"]\n'
            + MAKE_ROOM
            + '        if self._counts["preemptions"] > before:\n            return {}\n',
        ),
    ),
    Mistake(
        "the_oldest_waits_too",
        "9.7",
        "",
        (
            MAKE_ROOM,
            '        before = self._counts["preemptions"]\n'
            + MAKE_ROOM
            + (
                '        while self._counts["preemptions"] > before and self._running:\n'
                "            self._preempt(self._running[-1])\n"
            ),
        ),
    ),
    Mistake(
        "fed_is_not_forgotten",
        "9.7",
        "",
        (FREED, "        self.cache.free(request.id)\n"),
    ),
    Mistake(
        "comes_back_when_nobody_runs",
        "9.7",
        "were wanted",
        (
            ADMIT,
            ADMIT.replace(
                "while self._waiting and",
                (
                    "while self._waiting and not (self._running and len(self._waiting[0].tokens) > "
                    "self._waiting[0].prompt) and"
                ),
            ),
        ),
        only=True,
    ),
    Mistake(
        "comes_back_with_room_for_the_rest",
        "9.7",
        "were wanted",
        (
            ENOUGH,
            (
                "        if len(request.tokens) > request.prompt:\n"
                "            needed += math.ceil((request.most - 1) / self._block_size) - "
                "math.ceil(len(request.tokens) / self._block_size)\n"
            )
            + ENOUGH,
        ),
    ),
    Mistake(
        "the_younger_of_two_comes_back_first",
        "9.7",
        "were wanted",
        (MAKE_ROOM, "        self._gone = 0\n" + MAKE_ROOM),
        (QUEUED, "        self._waiting.insert(self._gone, request)\n        self._gone += 1\n"),
        only=True,
    ),
    Mistake(
        "answers_begin_at_the_last_preemption_but_one",
        "9.7",
        "run(): ",
        ("    fed: int = 0\n", "    fed: int = 0\n    before: list[int] = field(default_factory=list)\n"),
        ("from dataclasses import dataclass\n", "from dataclasses import dataclass, field\n"),
        (
            FREED,
            FREED + "        request.before, request.prompt = request.tokens[request.prompt :], len(request.tokens)\n",
        ),
        (
            "self._finished[request.id] = request.tokens[request.prompt :]",
            "self._finished[request.id] = request.before + request.tokens[request.prompt :]",
        ),
        only=True,
    ),
    Mistake(
        "no_end_token_in_the_step_that_comes_back",
        "9.7",
        "of [] were wanted",
        (
            "            if request.tokens[-1] == self._eos_token_id or len",
            "            if (request.tokens[-1] == self._eos_token_id and not back) or len",
        ),
        (
            "            request.fed = len(request.tokens)\n",
            "            back = len(request.tokens) > max(request.fed + 1, request.prompt)\n"
            "            request.fed = len(request.tokens)\n",
        ),
        only=True,
    ),
]
