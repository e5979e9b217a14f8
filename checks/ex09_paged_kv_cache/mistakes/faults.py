"""Engines that cancel, refuse and fail in the wrong way (9.9)."""

from harness.model.bank import Mistake

FIND = """        for requests in (self._waiting, self._running):
            for request in requests:
                if request.id == request_id:
"""
FREED = "                    if requests is self._running:\n                        self.cache.free(request_id)\n"
COUNTED = '                    self._counts["cancelled"] += 1\n'
NOT_FOUND = COUNTED + "                    return True\n        return False\n"
TOKENS = "        tokens = list(prompt)\n"
FITS = "        needed = math.ceil((len(tokens) + max_new_tokens - 1) / self._block_size)\n"
EMPTY = '        if not tokens:\n            raise ValueError("the prompt is empty")\n'
BAD = "        if bad := [token for token in tokens if not 0 <= token < self._model.vocab_size]:\n"
FEW = "        if max_new_tokens < 1:\n"
TOO_LARGE = (
    "        if needed > self._num_blocks:\n"
    '            raise ValueError(f"{needed} blocks are needed, there are '
    '{self._num_blocks}")\n'
)
QUEUE = "        self._waiting.append(_Request(self._submitted, tokens, len(tokens), len(tokens) + max_new_tokens))\n"
NEWS = "        news = dict(zip([request.id for request in self._running], self._call(), strict=True))\n"
SLOTS = "            self.cache.append(request.id, len(request.tokens) - self.cache.length(request.id))\n"
COUNT_CALLS = '        self._counts["model_calls"] += 1\n'
FED = "            request.fed = len(request.tokens)\n"
STEP = "    @torch.no_grad()\n    def step("
LOGITS = "        logits = self._model(tokens, positions, attend)  # [T, V]\n"
STATE = "        self._submitted = 0\n"
PLAN = "        # After a call that failed all of this has been done already, and changes nothing.\n"
FINISHED = '            "finished": len(self._finished),\n'
COMMON = "    limit = min(len(request.tokens) - 1, other.fed)\n"


def around(handler: str) -> tuple[str, str]:
    """What happens when the call of the model raises."""
    return NEWS, "        try:\n    " + NEWS + "        except Exception as error:\n" + handler


MISTAKES = [
    Mistake("cancel_keeps_blocks", "9.9", "after cancel", (FREED, ""), only=True),
    Mistake(
        "cancel_frees_in_the_next_step",
        "9.9",
        "after cancel",
        (
            FREED,
            (
                "                    if requests is self._running:\n"
                "                        self._late.append(request_id)\n"
            ),
        ),
        (STATE, STATE + "        self._late: list[int] = []\n"),
        (PLAN, "        while self._late:\n            self.cache.free(self._late.pop())\n" + PLAN),
        only=True,
    ),
    Mistake(
        "cancel_frees_for_all",
        "9.9",
        "after cancel",
        (
            FREED,
            (
                "                    if requests is self._running:\n"
                "                        for block in self.cache.block_table(request_id):\n"
                "                            while self.cache.allocator.ref_count(block) > 1:\n"
                "                                self.cache.allocator.free(block)\n"
                "                        self.cache.free(request_id)\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "cancel_frees_what_is_its_own",
        "9.9",
        "",
        (
            FREED,
            (
                "                    if requests is self._running:\n"
                "                        shared = [b for b in self.cache.block_table(request_id) if "
                "self.cache.allocator.ref_count(b) > 1]\n"
                "                        for block in shared:\n"
                "                            self.cache.allocator.share(block)\n"
                "                        self.cache.free(request_id)\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "only_the_waiting_are_cancelled",
        "9.9",
        "True was wanted",
        (FIND, FIND.replace("(self._waiting, self._running)", "(self._waiting,)")),
        only=True,
    ),
    Mistake(
        "only_the_running_are_cancelled",
        "9.9",
        "True was wanted",
        (FIND, FIND.replace("(self._waiting, self._running)", "(self._running,)")),
        only=True,
    ),
    Mistake(
        "the_cancelled_come_back",
        "9.9",
        "",
        (FREED, FREED + "                        self._waiting.append(request)\n"),
        only=True,
    ),
    Mistake(
        "cancel_returns_nothing",
        "9.9",
        "None came",
        (
            "                    return True\n        return False\n",
            "                    return None  # type: ignore[return-value]\n        return False\n",
        ),
        only=True,
    ),
    Mistake(
        "cancel_is_always_true",
        "9.9",
        "False was wanted",
        (
            "                    return True\n        return False\n",
            "                    return True\n        return True\n",
        ),
        only=True,
    ),
    Mistake(
        "unknown_ids_raise",
        "9.9",
        "your code raises KeyError",
        (
            "                    return True\n        return False\n",
            (
                "                    return True\n"
                "        if not 0 <= request_id < self._submitted:\n"
                "            raise KeyError(request_id)\n"
                "        return False\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "finished_can_be_cancelled",
        "9.9",
        "False was wanted",
        (
            "                    return True\n        return False\n",
            ("                    return True\n        return self._finished.pop(request_id, None) is not None\n"),
        ),
        only=True,
    ),
    Mistake(
        "cancelled_twice",
        "9.9",
        "False was wanted",
        (
            "                    return True\n        return False\n",
            (
                "                    self._gone.add(request_id)\n"
                "                    return True\n"
                "        return request_id in self._gone\n"
            ),
        ),
        (STATE, STATE + "        self._gone: set[int] = set()\n"),
        only=True,
    ),
    Mistake(
        "minus_1_is_the_last",
        "9.9",
        "cancel(-1)",
        (
            FIND,
            (
                "        request_id = request_id % self._submitted if -self._submitted <= request_id "
                "< 0 else request_id\n"
            )
            + FIND,
        ),
        only=True,
    ),
    Mistake(
        "cancelled_count_as_finished",
        "9.9",
        "finished",
        (FINISHED, '            "finished": len(self._finished) + self._counts["cancelled"],\n'),
        only=True,
    ),
    Mistake(
        "cancelled_are_returned",
        "9.9",
        "",
        (COUNTED, COUNTED + "                    self._finished[request_id] = request.tokens[request.prompt :]\n"),
        only=True,
    ),
    Mistake(
        "the_preempted_cannot_be_cancelled",
        "9.9",
        "",
        (
            FIND,
            FIND.replace(
                "request.id == request_id",
                (
                    "request.id == request_id and not (requests is self._waiting and len(request.tokens) "
                    "> request.prompt)"
                ),
            ),
        ),
        only=True,
    ),
    Mistake("empty_prompts", "9.9", "an empty prompt", (EMPTY, ""), only=True),
    Mistake("negative_tokens", "9.9", "token -1", (BAD, BAD.replace("0 <= token < ", "token < ")), only=True),
    Mistake(
        "vocab_size_is_a_token",
        "9.9",
        "a token of vocab_size",
        (BAD, BAD.replace("< self._model.vocab_size", "<= self._model.vocab_size")),
        only=True,
    ),
    Mistake(
        "token_0_is_none",
        "9.9",
        "",
        (BAD, BAD.replace("0 <= token", "0 < token")),
    ),
    Mistake(
        "first_token_is_looked_at",
        "9.9",
        "a token of vocab_size",
        (BAD, BAD.replace("in tokens if", "in tokens[:1] if")),
        only=True,
    ),
    Mistake(
        "last_token_is_not_looked_at",
        "9.9",
        "a last token beyond",
        (BAD, BAD.replace("in tokens if", "in tokens[:-1] if")),
        only=True,
    ),
    Mistake("no_new_tokens", "9.9", "max_new_tokens 0", (FEW, "        if max_new_tokens < 0:\n"), only=True),
    Mistake("negative_new_tokens", "9.9", "max_new_tokens -2", (FEW, "        if max_new_tokens == 0:\n"), only=True),
    Mistake("what_never_fits", "9.9", "one block too many", (TOO_LARGE, ""), only=True),
    Mistake(
        "prompts_that_fit", "9.9", "", (FITS, "        needed = math.ceil(len(tokens) / self._block_size)\n"), only=True
    ),
    Mistake(
        "the_last_token_needs_a_slot",
        "9.9",
        "ValueError",
        (FITS, FITS.replace(" - 1)", ")")),
    ),
    Mistake(
        "one_block_must_stay_free",
        "9.9",
        "ValueError",
        (TOO_LARGE, TOO_LARGE.replace("needed > self", "needed >= self")),
    ),
    Mistake(
        "what_is_free_now",
        "9.9",
        "",
        (TOO_LARGE, TOO_LARGE.replace("if needed > self._num_blocks", "if needed > self.cache.allocator.num_free")),
    ),
    Mistake(
        "one_number_of_blocks",
        "9.9",
        "it lacks",
        (TOO_LARGE, TOO_LARGE.replace(", there are {self._num_blocks}", "")),
        only=True,
    ),
    Mistake(
        "refused_take_an_id",
        "9.9",
        "",
        (TOKENS, TOKENS + "        self._submitted += 1\n"),
        (QUEUE, QUEUE.replace("(self._submitted, ", "(self._submitted - 1, ")),
        ("        self._submitted += 1\n        return", "        return"),
        only=True,
    ),
    Mistake("refused_are_queued", "9.9", "", (QUEUE, ""), (BAD, QUEUE + BAD)),
    Mistake(
        "assert_for_errors",
        "9.9",
        "AssertionError",
        (FEW, '        assert max_new_tokens > 0, "max_new_tokens"\n' + FEW),
        only=True,
    ),
    Mistake(
        "error_is_wrapped",
        "9.9",
        "unchanged",
        around('            raise RuntimeError("the model failed") from error\n'),
        only=True,
    ),
    Mistake("error_is_swallowed", "9.9", "was wanted", around("            return {}\n"), only=True),
    Mistake(
        "error_is_made_anew",
        "9.9",
        "unchanged",
        around("            raise type(error)(*error.args) from None\n"),
        only=True,
    ),
    Mistake("tried_again", "9.9", "was wanted", around("    " + NEWS), only=True),
    Mistake(
        "running_are_dropped",
        "9.9",
        "",
        around(
            "            for request in self._running:\n"
            "                self.cache.free(request.id)\n"
            "            self._running.clear()\n"
            "            raise\n"
        ),
        only=True,
    ),
    Mistake(
        "running_wait_again",
        "9.9",
        "",
        around(
            "            while self._running:\n                self._preempt(self._running[-1])\n            raise\n"
        ),
        only=True,
    ),
    Mistake(
        "newcomers_are_dropped",
        "9.9",
        "",
        around(
            "            for request in [one for one in self._running if not one.fed]:\n"
            "                self._running.remove(request)\n"
            "                self.cache.free(request.id)\n"
            "            raise\n"
        ),
        only=True,
    ),
    Mistake(
        "all_counts_as_fed",
        "9.9",
        "",
        around(
            "            for request in self._running:\n"
            "                request.fed = max(request.fed, len(request.tokens) - 1)\n"
            "            raise\n"
        ),
        only=True,
    ),
    Mistake(
        "slots_are_handed_out_again", "9.9", "", (SLOTS, "            self.cache.append(request.id, 1)\n"), only=True
    ),
    Mistake(
        "blocks_go_back_after_an_error",
        "9.9",
        "",
        around(
            "            for request in self._running:\n"
            "                self.cache.free(request.id)\n"
            "                self.cache.append(request.id, request.fed)\n"
            "            raise\n"
        ),
    ),
    Mistake("failed_calls_are_counted", "9.9", "model_calls", (COUNT_CALLS, ""), (NEWS, COUNT_CALLS + NEWS), only=True),
    Mistake(
        "failed_tokens_are_counted",
        "9.9",
        "tokens_fed",
        around('            self._counts["tokens_fed"] += len(self._running)\n            raise\n'),
        only=True,
    ),
    Mistake(
        "the_models_own_blocks_error",
        "9.9",
        "",
        (
            NEWS,
            "        try:\n    "
            + NEWS
            + (
                "        except OutOfBlocksError:\n"
                "            self._preempt(self._running[-1])\n"
                "            return self.step()\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "value_errors_cost_a_request",
        "9.9",
        "",
        (
            NEWS,
            "        try:\n    "
            + NEWS
            + (
                "        except ValueError:\n"
                "            gone = self._running.pop()\n"
                "            self.cache.free(gone.id)\n"
                "            raise\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "preempted_twice_for_one_failure",
        "9.9",
        "",
        around('            self._counts["preemptions"] += bool(self._waiting)\n            raise\n'),
        only=True,
    ),
    Mistake(
        "gradients_off_after_an_error",
        "9.9",
        "gradients are off",
        (STEP, "    def step("),
        (
            NEWS,
            "        before = torch.is_grad_enabled()\n        torch.set_grad_enabled(False)\n"
            + NEWS
            + "        torch.set_grad_enabled(before)\n",
        ),
        only=True,
    ),
    Mistake(
        "half_written_is_fed",
        "9.9",
        "",
        (
            LOGITS,
            (
                "        for request in running:\n"
                "            request.half = request.fed\n"
                "            request.fed = len(request.tokens) - 1\n"
            )
            + LOGITS,
        ),
        ("    fed: int = 0\n", "    fed: int = 0\n    half: int = 0\n"),
        (
            '            self._counts["tokens_fed"] += len(request.tokens) - request.fed\n',
            '            self._counts["tokens_fed"] += len(request.tokens) - request.half\n',
        ),
        only=True,
    ),
    Mistake(
        "tokens_of_the_cancelled_are_not_counted",
        "9.9",
        "metrics()['tokens_generated'] was",
        (
            COUNTED,
            COUNTED + '                    self._counts["tokens_generated"] -= len(request.tokens) - request.prompt\n',
        ),
        only=True,
    ),
    Mistake(
        "an_error_goes_through_a_generator",
        "9.9",
        "unchanged",
        ("        return logits[query_lens.cumsum(0)", "        yield from logits[query_lens.cumsum(0)"),
        only=True,
    ),
]
