"""Engines whose answers are not what each request gets alone (9.5)."""

from harness.model.bank import Mistake

SIZES = "        sizes = model.num_layers, num_blocks, block_size, model.num_kv_heads, model.head_dim\n"
CACHE = "        self.cache = PagedKVCache(*sizes, dtype=weight.dtype, device=weight.device)\n"
TOKENS = "        tokens = list(prompt)\n"
QUEUED = "_Request(self._submitted, tokens, len(tokens), len(tokens) + max_new_tokens)"
NEW_ID = "        self._submitted += 1\n        return self._submitted - 1\n"
NEWS = "        news = dict(zip([request.id for request in self._running], self._call(), strict=True))\n"
ENDED = "            if request.tokens[-1] == self._eos_token_id or len(request.tokens) == request.most:\n"
FINISHED = "                self._finished[request.id] = request.tokens[request.prompt :]\n"
LOOP = "        while self._waiting or self._running:\n            self.step()\n"
ALL = "        return {number: list(tokens) for number, tokens in self._finished.items()}\n"
POSITIONS = (
    "        positions = torch.tensor([p for r in running for p in range(r.fed, len(r.tokens))], device=device)\n"
)
CHOSEN = "        return logits[query_lens.cumsum(0) - 1].argmax(dim=-1).tolist()\n"
WRITE = "            keys.flatten(0, 1)[where], values.flatten(0, 1)[where] = k, v\n"
ATTENDED = "            return paged_attention(q, keys, values, block_tables, context_lens, query_lens)\n"
RETURN = '        self._counts["tokens_generated"] += len(news)\n        return news\n'
STATE = "        self._finished: dict[int, list[int]] = {}\n"
STEP = "    @torch.no_grad()\n    def step("
LOGITS = "        logits = self._model(tokens, positions, attend)  # [T, V]\n"

MISTAKES = [
    Mistake("token_0_always", "9.5", "0 came", (CHOSEN, "        return [0] * len(running)\n")),
    Mistake(
        "last_prompt_token_again",
        "9.5",
        "was wanted",
        (CHOSEN, "        return [request.tokens[-1] for request in running]\n"),
    ),
    Mistake(
        "token_after_the_first",
        "9.5",
        "was wanted",
        (CHOSEN, CHOSEN.replace("query_lens.cumsum(0) - 1", "query_lens.cumsum(0) - query_lens")),
    ),
    Mistake("least_probable_token", "9.5", "was wanted", (CHOSEN, CHOSEN.replace("argmax", "argmin"))),
    Mistake(
        "a_batch_shares_its_tokens",
        "9.5",
        "was wanted",
        (CHOSEN, CHOSEN.replace("query_lens.cumsum(0) - 1", "query_lens.cumsum(0) * 0 - 1")),
    ),
    Mistake(
        "drawn_by_chance",
        "9.5",
        "was wanted",
        (
            CHOSEN,
            (
                "        return torch.multinomial(logits[query_lens.cumsum(0) - "
                "1].float().softmax(-1), 1)[:, 0].tolist()\n"
            ),
        ),
    ),
    Mistake(
        "positions_begin_anew",
        "9.5",
        "was wanted",
        (POSITIONS, POSITIONS.replace("range(r.fed, len(r.tokens))", "range(len(r.tokens) - r.fed)")),
    ),
    Mistake("positions_begin_at_1", "9.5", "was wanted", (POSITIONS, POSITIONS.replace("[p for", "[p + 1 for"))),
    Mistake(
        "keys_of_the_first_layer_only",
        "9.5",
        "was wanted",
        (WRITE, "            if not layer:\n    " + WRITE),
    ),
    Mistake(
        "values_of_the_layer_before",
        "9.5",
        "was wanted",
        (ATTENDED, ATTENDED.replace("keys, values,", "keys, self.cache.values[max(layer - 1, 0)],")),
    ),
    Mistake(
        "attends_to_the_prompt_alone",
        "9.5",
        "was wanted",
        (
            ATTENDED,
            ATTENDED.replace("context_lens,", "torch.tensor([max(r.prompt, len(r.tokens) - r.fed) for r in running]),"),
        ),
    ),
    Mistake(
        "one_token_more",
        "9.5",
        "no token comes after the last one",
        (ENDED, ENDED.replace("== request.most", "> request.most")),
    ),
    Mistake(
        "one_token_less",
        "9.5",
        "no more come",
        (
            ENDED,
            ENDED.replace(
                "len(request.tokens) == request.most",
                "len(request.tokens) >= max(request.most - 1, request.prompt + 1)",
            ),
        ),
    ),
    Mistake(
        "goes_on_after_eos",
        "9.5",
        "no token comes after the last one",
        (ENDED, "            if len(request.tokens) == request.most:\n"),
    ),
    Mistake(
        "first_token_never_ends",
        "9.5",
        "no token comes after the last one",
        (
            ENDED,
            "            later = len(request.tokens) > request.prompt + 1\n"
            + ENDED.replace(
                "request.tokens[-1] == self._eos_token_id", "(later and request.tokens[-1] == self._eos_token_id)"
            ),
        ),
    ),
    Mistake(
        "end_token_0_is_none",
        "9.5",
        "which is finished",
        (
            ENDED,
            ENDED.replace(
                "if request.tokens[-1] == self._eos_token_id",
                "if (self._eos_token_id and request.tokens[-1] == self._eos_token_id)",
            ),
        ),
    ),
    Mistake(
        "end_token_in_the_prompt",
        "9.5",
        "no more come",
        (ENDED, ENDED.replace("request.tokens[-1] == self._eos_token_id", "self._eos_token_id in request.tokens")),
    ),
    Mistake(
        "end_token_is_dropped",
        "9.5",
        "run()",
        (
            FINISHED,
            FINISHED
            + (
                "                if request.tokens[-1] == self._eos_token_id:\n"
                "                    self._finished[request.id].pop()\n"
            ),
        ),
        only=True,
    ),
    Mistake("run_returns_prompts_too", "9.5", "run()", (FINISHED, FINISHED.replace("[request.prompt :]", "[:]"))),
    Mistake(
        "run_returns_its_own_alone",
        "9.5",
        "all that is finished so far",
        (LOOP, "        before = set(self._finished)\n" + LOOP),
        (
            ALL,
            (
                "        return {number: list(tokens) for number, tokens in self._finished.items() "
                "if number not in before}\n"
            ),
        ),
    ),
    Mistake(
        "run_forgets_what_it_returned",
        "9.5",
        "all that is finished so far",
        (ALL, "        finished, self._finished = self._finished, {}\n        return finished\n"),
    ),
    Mistake(
        "run_returns_its_own_tokens_alone",
        "9.5",
        "step() had returned",
        (LOOP, "        before = {r.id: len(r.tokens) - r.prompt for r in self._running}\n" + LOOP),
        (
            ALL,
            ("        return {number: tokens[before.get(number, 0) :] for number, tokens in self._finished.items()}\n"),
        ),
        only=True,
    ),
    Mistake("answers_are_handed_out", "9.5", "run()", (ALL, "        return dict(self._finished)\n"), only=True),
    Mistake("finished_are_handed_out", "9.5", "run()", (ALL, "        return self._finished\n"), only=True),
    Mistake(
        "run_makes_one_step",
        "9.5",
        "run()",
        (LOOP, "        if self._waiting or self._running:\n            self.step()\n"),
    ),
    Mistake(
        "run_ends_with_the_waiting",
        "9.5",
        "run()",
        (LOOP, LOOP.replace("self._waiting or self._running", "self._waiting")),
    ),
    Mistake(
        "prompt_is_the_callers",
        "9.5",
        "request 0",
        (TOKENS, "        tokens = prompt if isinstance(prompt, list) else list(prompt)\n"),
    ),
    Mistake(
        "ids_from_1",
        "9.5",
        "0 was wanted",
        (NEW_ID, "        self._submitted += 1\n        return self._submitted\n"),
        ("_Request(self._submitted, ", "_Request(self._submitted + 1, "),
    ),
    Mistake(
        "answers_kept_by_prompt",
        "9.5",
        "was wanted",
        (STATE, STATE + "        self._known: dict[tuple[int, ...], int] = {}\n"),
        (
            CHOSEN,
            (
                "        chosen = logits[query_lens.cumsum(0) - 1].argmax(dim=-1).tolist()\n"
                "        return [self._known.setdefault(tuple(r.tokens), token) for r, token in "
                "zip(running, chosen, strict=True)]\n"
            ),
        ),
        only=True,
    ),
    Mistake("two_layers", "9.5", "came", (SIZES, SIZES.replace("model.num_layers", "2"))),
    Mistake("as_many_key_value_heads", "9.5", "", (SIZES, SIZES.replace("model.num_kv_heads", "model.num_heads"))),
    Mistake(
        "always_float64",
        "9.5",
        "float32",
        (CACHE, CACHE.replace("dtype=weight.dtype", "dtype=torch.float64")),
        (WRITE, WRITE.replace("k, v", "k.double(), v.double()")),
        (ATTENDED, ATTENDED.replace("(q, keys", "(q.double(), keys").replace("query_lens)", "query_lens).to(q.dtype)")),
    ),
    Mistake(
        "always_float32",
        "9.5",
        "torch.float64",
        (CACHE, CACHE.replace("dtype=weight.dtype", "dtype=torch.float32")),
        (WRITE, WRITE.replace("k, v", "k.float(), v.float()")),
        (ATTENDED, ATTENDED.replace("(q, keys", "(q.float(), keys").replace("query_lens)", "query_lens).to(q.dtype)")),
    ),
    Mistake("tokens_are_tensors", "9.5", "a number was wanted", (CHOSEN, CHOSEN.replace(".tolist()", ".unbind()"))),
    Mistake(
        "engines_share_their_finished",
        "9.5",
        "run()",
        (STATE, "        self._finished = _FINISHED\n"),
        ("class Engine:\n", "_FINISHED: dict[int, list[int]] = {}\n\n\nclass Engine:\n"),
    ),
    Mistake("model_left_in_eval", "9.5", "eval mode", (CACHE, CACHE + "        model.eval()\n"), only=True),
    Mistake(
        "gradients_off_for_good",
        "9.5",
        "gradients are off",
        (STEP, "    def step("),
        (NEWS, "        torch.set_grad_enabled(False)\n" + NEWS),
    ),
    Mistake(
        "model_frozen", "9.5", "requires_grad", (CACHE, CACHE + "        model.requires_grad_(False)\n"), only=True
    ),
    Mistake(
        "parameters_of_the_beginning",
        "9.5",
        "was wanted",
        (CACHE, CACHE + "        self._weights = dict(model.named_parameters())\n"),
        (
            LOGITS,
            "        logits = torch.func.functional_call(self._model, self._weights, (tokens, positions, attend))\n",
        ),
        only=True,
    ),
    Mistake(
        "chosen_in_float32",
        "9.5",
        "was wanted",
        (CHOSEN, CHOSEN.replace(".argmax", ".float().argmax")),
        only=True,
    ),
]
