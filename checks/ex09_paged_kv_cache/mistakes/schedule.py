"""Engines that call the model more often, or feed it more, than they need; metrics "
"that tell something else (9.6)."""

from harness.model.bank import Mistake

ADMIT = """        while self._waiting and len(self._running) < self._max_batch_size and self._admit(self._waiting[0]):
            self._running.append(self._waiting.pop(0))
"""
NOTHING = "        if not self._running:\n            return {}\n"
NEWS = "        news = dict(zip([request.id for request in self._running], self._call(), strict=True))\n"
FED = "            request.fed = len(request.tokens)\n            request.tokens.append(news[request.id])\n"
COUNT_FED = '            self._counts["tokens_fed"] += len(request.tokens) - request.fed\n'
COUNT_CALLS = '        self._counts["model_calls"] += 1\n'
COUNT_NEW = '        self._counts["tokens_generated"] += len(news)\n'
NEEDED = "        needed = math.ceil(len(request.tokens) / self._block_size) - shared // self._block_size\n"
RUNNING = '            "running": len(self._running),\n'
WAITING = '            "waiting": len(self._waiting),\n'
FINISHED = '            "finished": len(self._finished),\n'
USED = '            "blocks_used": self._num_blocks - self.cache.allocator.num_free,\n'
COUNTS = "            **self._counts,\n"
CALL = "        running, device = self._running, self._device\n"
STATE = "        self._running: list[_Request] = []\n"
QUEUE = "        self._waiting.append(_Request(self._submitted, tokens, len(tokens), len(tokens) + max_new_tokens))\n"
LOGITS = "        logits = self._model(tokens, positions, attend)  # [T, V]\n"

MISTAKES = [
    Mistake(
        "all_tokens_fed_again",
        "9.6",
        "tokens were fed",
        (FED, FED.replace("request.fed = len(request.tokens)", "request.fed = 0")),
    ),
    Mistake(
        "last_two_fed",
        "9.6",
        "tokens were fed",
        (FED, FED.replace("request.fed = len(request.tokens)", "request.fed = len(request.tokens) - 1")),
    ),
    Mistake(
        "a_call_for_each",
        "9.6",
        "calls of the model came",
        (
            CALL,
            (
                "        if len(self._running) > 1:\n"
                "            everyone, chosen = self._running, []\n"
                "            for request in everyone:\n"
                "                self._running = [request]\n"
                "                chosen += self._call()\n"
                "            self._running = everyone\n"
                "            return chosen\n"
            )
            + CALL,
        ),
    ),
    Mistake(
        "newcomers_in_a_call_of_their_own",
        "9.6",
        "calls of the model came",
        (
            CALL,
            (
                "        everyone = self._running\n"
                "        groups = [[r for r in everyone if bool(r.fed) is old] for old in (True, "
                "False)]\n"
                "        if all(groups):\n"
                "            chosen = {}\n"
                "            for group in groups:\n"
                "                self._running = group\n"
                "                chosen |= dict(zip([r.id for r in group], self._call(), strict=True))\n"
                "            self._running = everyone\n"
                "            return [chosen[r.id] for r in everyone]\n"
            )
            + CALL,
        ),
    ),
    Mistake(
        "a_call_to_warm_up",
        "9.6",
        "calls of the model came",
        (LOGITS, "        self._model(tokens, positions, attend)\n" + LOGITS),
    ),
    Mistake(
        "waits_until_all_are_done",
        "9.6",
        "were wanted",
        (
            ADMIT,
            (
                "        if not self._running:\n"
                "            while self._waiting and len(self._running) < self._max_batch_size and "
                "self._admit(self._waiting[0]):\n"
                "                self._running.append(self._waiting.pop(0))\n"
            ),
        ),
    ),
    Mistake(
        "one_newcomer_a_step", "9.6", "were wanted", (ADMIT, ADMIT.replace("while self._waiting", "if self._waiting"))
    ),
    Mistake(
        "newest_first",
        "9.6",
        "were wanted",
        (ADMIT, ADMIT.replace("self._waiting[0]", "self._waiting[-1]").replace("pop(0)", "pop()")),
    ),
    Mistake("newcomers_first", "9.6", "were wanted", (QUEUE, QUEUE.replace("append(", "insert(0, "))),
    Mistake(
        "shortest_first",
        "9.6",
        "were wanted",
        (ADMIT, "        self._waiting.sort(key=lambda request: len(request.tokens))\n" + ADMIT),
    ),
    Mistake(
        "later_requests_overtake",
        "9.6",
        "were wanted",
        (
            ADMIT,
            (
                "        for request in list(self._waiting):\n"
                "            if len(self._running) < self._max_batch_size and self._admit(request):\n"
                "                self._running.append(request)\n"
                "                self._waiting.remove(request)\n"
            ),
        ),
    ),
    Mistake("one_more_than_may_run", "9.6", "were wanted", (ADMIT, ADMIT.replace("< self._max", "<= self._max"))),
    Mistake(
        "any_number_may_run",
        "9.6",
        "were wanted",
        (ADMIT, ADMIT.replace("len(self._running) < self._max_batch_size and ", "")),
    ),
    Mistake(
        "at_most_eight_run",
        "9.6",
        "were wanted",
        (ADMIT, ADMIT.replace("self._max_batch_size", "8")),
    ),
    Mistake(
        "room_for_the_whole_answer",
        "9.6",
        "were wanted",
        (NEEDED, NEEDED.replace("len(request.tokens)", "(request.most - 1)")),
    ),
    Mistake(
        "one_block_is_kept_back",
        "9.6",
        "were wanted",
        (NEEDED, NEEDED + "        needed += bool(self._running)\n"),
    ),
    Mistake(
        "newcomers_wait_a_step",
        "9.6",
        "were wanted",
        (
            ADMIT,
            (
                "        if any(not request.fed for request in self._running) or not self._running "
                "or self._late:\n"
                "            self._late = False\n"
            )
            + ADMIT.replace("        while", "            while").replace(
                "            self._running.append", "                self._running.append"
            )
            + "        else:\n            self._late = True\n",
        ),
        (STATE, STATE + "        self._late = False\n"),
    ),
    Mistake(
        "called_with_nothing",
        "9.6",
        "nothing is left",
        (
            NOTHING,
            (
                "        if not self._running:\n"
                "            empty = torch.tensor([], dtype=torch.int64)\n"
                "            self._model(empty, empty, lambda layer, q, k, v: q)\n"
                "            return {}\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "prompts_alone_are_counted",
        "9.6",
        "tokens_fed",
        (COUNT_FED, ('            self._counts["tokens_fed"] += len(request.tokens) if not request.fed else 0\n')),
    ),
    Mistake("all_tokens_are_counted", "9.6", "tokens_fed", (COUNT_FED, COUNT_FED.replace(" - request.fed", ""))),
    Mistake(
        "fed_is_what_was_generated", "9.6", "tokens_fed", (COUNT_FED, '            self._counts["tokens_fed"] += 1\n')
    ),
    Mistake(
        "calls_of_requests", "9.6", "model_calls", (COUNT_CALLS, '        self._counts["model_calls"] += len(news)\n')
    ),
    Mistake(
        "calls_are_steps",
        "9.6",
        "model_calls",
        (NOTHING, '        self._counts["model_calls"] += not self._running\n' + NOTHING),
        only=True,
    ),
    Mistake(
        "steps_are_generated", "9.6", "tokens_generated", (COUNT_NEW, '        self._counts["tokens_generated"] += 1\n')
    ),
    Mistake(
        "first_tokens_are_not_counted",
        "9.6",
        "tokens_generated",
        (
            COUNT_NEW,
            ('        self._counts["tokens_generated"] += sum(len(r.tokens) - r.prompt > 1 for r in self._running)\n'),
        ),
    ),
    Mistake(
        "all_ever_submitted_wait",
        "9.6",
        "waiting",
        (WAITING, '            "waiting": self._submitted - len(self._running),\n'),
    ),
    Mistake(
        "running_counts_the_waiting",
        "9.6",
        "running",
        (RUNNING, '            "running": len(self._running) + len(self._waiting),\n'),
    ),
    Mistake(
        "finished_in_the_last_run",
        "9.6",
        "finished",
        (FINISHED, '            "finished": len(self._finished) - self._before,\n'),
        (
            "        while self._waiting or self._running:\n",
            ("        self._before = len(self._finished)\n        while self._waiting or self._running:\n"),
        ),
        (STATE, STATE + "        self._before = 0\n"),
        only=True,
    ),
    Mistake(
        "free_for_used", "9.6", "blocks_used", (USED, '            "blocks_used": self.cache.allocator.num_free,\n')
    ),
    Mistake(
        "slots_for_blocks",
        "9.6",
        "blocks_used",
        (USED, '            "blocks_used": sum(request.fed for request in self._running),\n'),
    ),
    Mistake(
        "most_blocks_so_far",
        "9.6",
        "blocks_used",
        (USED, '            "blocks_used": self._most(),\n'),
        (
            "    def _preempt(",
            (
                "    def _most(self) -> int:\n"
                '        self._peak = max(getattr(self, "_peak", 0), self._num_blocks - '
                "self.cache.allocator.num_free)\n"
                "        return self._peak\n"
                "\n"
                "    def _preempt("
            ),
        ),
    ),
    Mistake(
        "metrics_are_handed_out",
        "9.6",
        "metrics()",
        ('        return {\n            "running"', '        self._counts |= {\n            "running"'),
        (COUNTS + "        }\n", "        }\n        return self._counts\n"),
        only=True,
    ),
    Mistake(
        "metrics_begin_anew",
        "9.6",
        "metrics()",
        (COUNTS + "        }\n", COUNTS + "        }\n        # and from here on\n"),
        (
            '        return {\n            "running"',
            (
                "        before, self._counts = self._counts, dict.fromkeys(self._counts, 0)\n"
                "        return {\n"
                '            "running"'
            ),
        ),
        ("            **self._counts,\n        }\n        # and", "            **before,\n        }\n        # and"),
    ),
    Mistake(
        "two_calls_for_many_tokens",
        "9.6",
        "calls of the model came",
        (
            CALL,
            (
                "        if len(self._running) > 1 and sum(len(r.tokens) - r.fed for r in self._running) > 256:\n"
                "            everyone, chosen = self._running, []\n"
                "            for self._running in (everyone[:1], everyone[1:]):\n"
                "                chosen += self._call()\n"
                "            self._running = everyone\n"
                "            return chosen\n"
            )
            + CALL,
        ),
        only=True,
    ),
]
