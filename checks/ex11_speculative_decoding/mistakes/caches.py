"""Caches gone wrong (11.6)."""

from harness.model.bank import Mistake

KEEP = "        self._held: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values [length, Hkv, Dh] of each layer\n"
NO_GRAD = "    @torch.no_grad()\n    def feed"
DEVICE = "        device = next(self.model.parameters()).device\n        grown:"
GROWN = "        grown: dict[int, tuple[Tensor, Tensor]] = {}\n"
BEFORE = "            if layer in self._held:\n                keys, values = self._held[layer]\n"
CAT = "                k, v = torch.cat([keys, k]), torch.cat([values, v])\n"
STORE = "            grown[layer] = k, v\n"
POSITIONS = "        positions = torch.arange(self.length, self.length + len(tokens), device=device)\n"
CALL = "        logits: Tensor = self.model(torch.tensor(tokens, device=device), positions, attend)  # [T, V]\n"
SETTLE = "        self._held, self.length = grown, self.length + len(tokens)\n"
RETURN = "        return logits\n"
REFUSE = "        if not 0 <= length <= self.length:\n"
RAISE = '            raise ValueError(f"cannot rewind to {length}: {self.length} tokens are held")\n'
CUT = "        self._held = {layer: (keys[:length], values[:length]) for layer, (keys, values) in self._held.items()}\n"
LENGTH = "        self.length = length\n"

MISTAKES = [
    Mistake("nothing_is_kept", "11.6", "these tokens alone", (STORE, ""), (POSITIONS, POSITIONS)),
    Mistake(
        "positions_from_0",
        "11.6",
        "model calls (tokens, positions)",
        (POSITIONS, "        positions = torch.arange(len(tokens), device=device)\n"),
    ),
    Mistake(
        "all_tokens_fed_again",
        "11.6",
        "model calls (tokens, positions)",
        (KEEP, KEEP + "        self._tokens: list[int] = []\n"),
        (BEFORE, "            if layer in self._held and False:\n                keys, values = self._held[layer]\n"),
        (
            CALL,
            """        self._tokens = self._tokens[: self.length] + list(tokens)
        positions = torch.arange(len(self._tokens), device=device)
        logits: Tensor = self.model(torch.tensor(self._tokens, device=device), positions, attend)[-len(tokens) :]
""",
        ),
    ),
    Mistake(
        "one_call_per_token",
        "11.6",
        "model calls (tokens, positions)",
        (
            NO_GRAD,
            """    def feed(self, tokens: Sequence[int]) -> Tensor:
        return torch.cat([self._feed([token]) for token in tokens])

    @torch.no_grad()
    def _feed""",
        ),
    ),
    Mistake(
        "a_long_piece_in_two_calls",
        "11.6",
        "2 model calls came",
        (
            NO_GRAD,
            """    def feed(self, tokens: Sequence[int]) -> Tensor:
        return torch.cat([self._feed(tokens[at : at + 256]) for at in range(0, len(tokens), 256)])

    @torch.no_grad()
    def _feed""",
        ),
        only=True,
    ),
    Mistake(
        "only_the_last_logits",
        "11.6",
        "shape",
        (SETTLE + RETURN, SETTLE + "        return logits[-1:]\n"),
    ),
    Mistake(
        "one_cache_for_all_layers",
        "11.6",
        "each layer's own",
        (BEFORE, "            if 0 in self._held:\n                keys, values = self._held[0]\n"),
    ),
    Mistake(
        "keys_kept_of_the_last_call_alone",
        "11.6",
        "they are not those of one call",
        (STORE, "            grown[layer] = k[-q.shape[0] :], v[-q.shape[0] :]\n"),
    ),
    Mistake(
        "values_in_another_order",
        "11.6",
        "no others?",
        (CAT, "                k, v = torch.cat([keys, k]), torch.cat([values[:0], v, values])\n"),
    ),
    Mistake(
        "no_causal_mask",
        "11.6",
        "they are not those of one call",
        (
            "            return causal_attention(q, k, v)\n",
            "            return torch.cat([causal_attention(row[None], k, v) for row in q])\n",
        ),
    ),
    Mistake(
        "graph_kept",
        "11.6",
        "ask for gradients",
        (NO_GRAD, "    def feed"),
    ),
    Mistake(
        "graph_kept_behind_detached_logits",
        "11.6",
        "is a graph kept",
        (NO_GRAD, "    def feed"),
        (SETTLE + RETURN, SETTLE + "        return logits.detach()\n"),
        only=True,
    ),
    Mistake(
        "gradients_switched_off_for_good",
        "11.6",
        "gradients are off afterwards",
        (NO_GRAD, "    def feed"),
        (DEVICE, "        torch.set_grad_enabled(False)\n" + DEVICE),
        only=True,
    ),
    Mistake(
        "cache_of_the_class",
        "11.6",
        "no others?",
        (KEEP, ""),
        ("    length: int\n", "    length: int\n    _held: dict[int, tuple[Tensor, Tensor]] = {}\n"),
        (SETTLE, "        self._held.update(grown)\n        self.length += len(tokens)\n"),
        (CUT, "        self._held.update({layer: (k[:length], v[:length]) for layer, (k, v) in self._held.items()})\n"),
    ),
    Mistake(
        "cache_of_the_model",
        "11.6",
        "no others?",
        (KEEP, '        self._held: dict[int, tuple[Tensor, Tensor]] = vars(model).setdefault("_cache", {})\n'),
        (SETTLE, "        self._held.update(grown)\n        self.length += len(tokens)\n"),
        (CUT, "        self._held.update({layer: (k[:length], v[:length]) for layer, (k, v) in self._held.items()})\n"),
    ),
    Mistake(
        "an_error_leaves_a_half_grown_cache",
        "11.6",
        "after a failed call",
        (GROWN, "        grown = self._held\n"),
        only=True,
    ),
    Mistake(
        "an_error_leaves_a_longer_cache",
        "11.6",
        "length is",
        (POSITIONS, POSITIONS + "        self.length += len(tokens)\n"),
        (SETTLE, "        self._held = grown\n"),
        only=True,
    ),
    Mistake(
        "an_error_empties_the_cache",
        "11.6",
        "length is",
        (
            CALL,
            """        held, length, self._held, self.length = self._held, self.length, {}, 0
        before, self._held = self._held, held
        logits: Tensor = self.model(torch.tensor(tokens, device=device), positions, attend)  # [T, V]
        self.length = length
""",
        ),
        only=True,
    ),
    Mistake(
        "an_interrupt_leaves_a_half_grown_cache",
        "11.6",
        "after a failed call",
        (GROWN, "        before, grown = dict(self._held), self._held\n"),
        (
            CALL,
            """        try:
            logits: Tensor = self.model(torch.tensor(tokens, device=device), positions, attend)  # [T, V]
        except Exception:
            self._held = before
            raise
""",
        ),
        only=True,
    ),
    Mistake(
        "an_error_leaves_gradients_off",
        "11.6",
        "raises behind layer 0 as KeyboardInterrupt does: gradients are off afterwards",
        (NO_GRAD, "    def feed"),
        (DEVICE, "        wanted = torch.is_grad_enabled()\n        torch.set_grad_enabled(False)\n" + DEVICE),
        (SETTLE, SETTLE + "        torch.set_grad_enabled(wanted)\n"),
        only=True,
    ),
    Mistake(
        "errors_swallowed",
        "11.6",
        "Fault was wanted",
        (
            CALL,
            """        try:
            logits: Tensor = self.model(torch.tensor(tokens, device=device), positions, attend)
        except Exception as error:
            raise RuntimeError("the model has failed") from error
""",
        ),
    ),
    Mistake("rewind_moves_the_length_alone", "11.6", "", (CUT, "")),
    Mistake("rewind_cuts_the_keys_alone", "11.6", "", (CUT, CUT.replace("values[:length]", "values[-length:]"))),
    Mistake(
        "rewind_forgets_the_first_tokens",
        "11.6",
        "after rewind",
        (
            CUT,
            """        at = self.length - length
        self._held = {i: (k[at:], v[at:]) for i, (k, v) in self._held.items()}
""",
        ),
    ),
    Mistake(
        "rewind_cuts_the_first_layer_alone",
        "11.6",
        "after rewind",
        (CUT, "        self._held[0] = self._held[0][0][:length], self._held[0][1][:length]\n"),
    ),
    Mistake("rewind_leaves_the_length", "11.6", "length is", (LENGTH, "")),
    Mistake("rewind_by_a_number", "11.6", "length is", (REFUSE, "        length = self.length - length\n" + REFUSE)),
    Mistake("rewind_to_0_keeps_all", "11.6", "rewind(0)", (CUT, "        if length:\n    " + CUT), only=True),
    Mistake(
        "rewind_below_0_accepted", "11.6", "rewind(-1)", (REFUSE, "        if not length <= self.length:\n"), only=True
    ),
    Mistake("rewind_beyond_accepted", "11.6", "rewind(4)", (REFUSE, "        if length < 0:\n"), only=True),
    Mistake(
        "rewind_of_a_new_cache_never_refused",
        "11.6",
        "new cache: was accepted",
        (REFUSE, "        if not self.length:\n            return\n" + REFUSE),
        only=True,
    ),
    Mistake(
        "rewind_beyond_names_one_number",
        "11.6",
        "it lacks 3",
        (RAISE, '            raise ValueError(f"cannot rewind to {length}")\n'),
        only=True,
    ),
    Mistake(
        "refused_rewind_cuts_first",
        "11.6",
        "after a refused rewind",
        (REFUSE, CUT.replace("[:length]", "[: max(length, 0)]") + REFUSE),
        only=True,
    ),
    Mistake(
        "rewind_refuses_what_is_there",
        "11.6",
        "cannot rewind to",
        (REFUSE, "        if not 0 <= length < self.length:\n"),
    ),
    Mistake(
        "rewind_feeds_again",
        "11.6",
        "made a model call",
        (KEEP, KEEP + "        self._tokens: list[int] = []\n"),
        (SETTLE, "        self._tokens = [*self._tokens[: self.length], *tokens]\n" + SETTLE),
        (
            LENGTH,
            """        self._held, self.length = {}, 0
        if length:
            self.feed(self._tokens[:length])
""",
        ),
    ),
    Mistake(
        "made_on_the_cpu",
        "11.6",
        "device",
        (DEVICE, '        device = torch.device("cpu")\n        grown:'),
        only=True,
    ),
    Mistake(
        "kept_in_float32",
        "11.6",
        "",
        (STORE, "            grown[layer] = k.float().to(k.dtype), v.float().to(v.dtype)\n"),
    ),
]
