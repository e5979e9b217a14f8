"""Engines that hold more memory than they use (9.4)."""

from harness.model.bank import Mistake

SLOTS = "            self.cache.append(request.id, len(request.tokens) - self.cache.length(request.id))\n"
ADMITTED = "        self.cache.append(request.id, len(request.tokens) - shared)\n"
NEEDED = "        needed = math.ceil(len(request.tokens) / self._block_size) - shared // self._block_size\n"
DONE = """                self._running.remove(request)
                self.cache.free(request.id)
        self._counts["model_calls"] += 1
"""
ENDED = "            if request.tokens[-1] == self._eos_token_id or len(request.tokens) == request.most:\n"
ATTEND = "            keys, values = self.cache.keys[layer], self.cache.values[layer]\n"
LOGITS = "        logits = self._model(tokens, positions, attend)  # [T, V]\n"
STEP = "    @torch.no_grad()\n    def step("
GATHER = "        k, v = (pool[blocks].flatten(0, 1)[:length] for pool in (keys, values))  # [length, Hkv, Dh]\n"
START = "        self._submitted = 0\n"
CACHE = "        self.cache = PagedKVCache(*sizes, dtype=weight.dtype, device=weight.device)\n"
NEWS = "        news = dict(zip([request.id for request in self._running], self._call(), strict=True))\n"
PLAN = "        # After a call that failed all of this has been done already, and changes nothing.\n"
POOLS = "        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))\n"

MISTAKES = [
    Mistake(
        "slot_reserved_ahead",
        "9.4",
        "a token takes its slot in the step that feeds it",
        (SLOTS, SLOTS.replace("len(request.tokens) - self", "len(request.tokens) + 1 - self")),
        (ADMITTED, ADMITTED.replace(" - shared)", " + 1 - shared)")),
        (NEEDED, NEEDED.replace("len(request.tokens) /", "(len(request.tokens) + 1) /")),
    ),
    Mistake(
        "all_slots_reserved_at_once",
        "9.4",
        "blocks of request",
        (SLOTS, "            pass\n"),
        (ADMITTED, "        self.cache.append(request.id, request.most - 1 - shared)\n"),
        (NEEDED, NEEDED.replace("len(request.tokens)", "(request.most - 1)")),
    ),
    Mistake(
        "slots_reserved_when_submitted",
        "9.4",
        "waiting, which has fed 0 tokens",
        (ADMITTED, ("        self.cache.append(request.id, len(request.tokens) - self.cache.length(request.id))\n")),
        (
            "        self._submitted += 1\n        return self._submitted - 1\n",
            "        self._submitted += 1\n        if self.cache.allocator.num_free > 3 * needed:\n"
            "            self.cache.append(self._submitted - 1, len(tokens))\n        return self._submitted - 1\n",
        ),
    ),
    Mistake(
        "blocks_leak_at_eos",
        "9.4",
        "finished",
        (
            DONE,
            DONE.replace(
                "                self.cache.free(request.id)",
                (
                    "                if len(request.tokens) == request.most:\n"
                    "                    self.cache.free(request.id)"
                ),
            ),
        ),
    ),
    Mistake(
        "blocks_leak_at_the_end",
        "9.4",
        "finished",
        (DONE, DONE.replace("                self.cache.free(request.id)\n", "")),
    ),
    Mistake(
        "blocks_free_in_the_next_step",
        "9.4",
        "finished",
        (START, START + "        self._ended: list[int] = []\n"),
        (DONE, DONE.replace("self.cache.free(request.id)", "self._ended.append(request.id)")),
        (
            PLAN,
            ("        for number in self._ended:\n            self.cache.free(number)\n        self._ended.clear()\n")
            + PLAN,
        ),
    ),
    Mistake(
        "blocks_leak_at_a_first_token",
        "9.4",
        "finished",
        (
            DONE,
            DONE.replace(
                "                self.cache.free(request.id)",
                (
                    "                if len(request.tokens) > request.prompt + 1:\n"
                    "                    self.cache.free(request.id)"
                ),
            ),
        ),
    ),
    Mistake(
        "pool_made_anew",
        "9.4",
        "another tensor than before",
        (ATTEND, "            if not layer:\n                self.cache.keys = self.cache.keys.clone()\n" + ATTEND),
        wasteful=True,
    ),
    Mistake(
        "pool_copied_for_the_attention",
        "9.4",
        "read the blocks that the tables name",
        (GATHER, GATHER.replace("pool[blocks]", "pool.clone()[blocks]")),
    ),
    Mistake(
        "pool_flattened_by_a_copy",
        "9.4",
        "read the blocks that the tables name",
        (GATHER, GATHER.replace("pool[blocks]", "pool.nan_to_num()[blocks]")),
        wasteful=True,
    ),
    Mistake(
        "pool_copied_by_the_step",
        "9.4",
        "read the blocks that the tables name",
        (LOGITS, "        self.cache.keys.copy_(self.cache.keys.clone())\n" + LOGITS),
        wasteful=True,
    ),
    Mistake("logits_kept", "9.4", "are alive", (LOGITS, LOGITS + "        self._logits = logits\n"), only=True),
    Mistake(
        "last_keys_kept",
        "9.4",
        "are alive",
        (START, START + "        self._kept: dict[int, tuple[Tensor, Tensor]] = {}\n"),
        (ATTEND, ATTEND + "            self._kept[layer] = k, v\n"),
        only=True,
    ),
    Mistake("graph_kept", "9.4", "are alive", (STEP, "    def step("), only=True),
    Mistake(
        "a_copy_of_each_sequence",
        "9.4",
        "are alive",
        (START, START + "        self._beside: list[Tensor] = []\n"),
        (ATTEND, ATTEND + "            self._beside += [k.clone(), v.clone()]\n"),
        wasteful=True,
    ),
    Mistake(
        "two_pools",
        "9.4",
        "are alive",
        (CACHE, CACHE + "        self._spare = PagedKVCache(*sizes, dtype=weight.dtype, device=weight.device)\n"),
        wasteful=True,
    ),
    Mistake(
        "half_of_a_larger_pool",
        "9.4",
        "are alive",
        (
            POOLS,
            "        shape = (2 * num_layers, *shape[1:])\n"
            + POOLS.replace("device=device)", "device=device)[:num_layers]"),
        ),
        wasteful=True,
    ),
    Mistake(
        "keeps_the_error",
        "9.4",
        "keeps its traceback",
        (
            NEWS,
            "        try:\n    "
            + NEWS
            + "        except Exception as error:\n            self._error = error\n            raise\n",
        ),
        only=True,
    ),
]
