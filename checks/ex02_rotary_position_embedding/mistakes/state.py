"""Wrong answers that remember what they should not, and so are right in a first call (2.3, 2.4, 2.6 to 2.8)."""

from harness.model.bank import Mistake

INIT = "        self._cos, self._sin = self._table(max_position_embeddings, torch.get_default_device())\n"
HEADS = "        self.num_heads = num_heads\n"
NONE = "        if seq_len is None:\n"
SMALL = """\
        if seq_len < length:
            raise ValueError(f"seq_len {seq_len} is less than the {length} rows of x")
"""
TURN = "        return self.apply_rotary_pos_emb(x, self._cos[positions], self._sin[positions])\n"
NO_INFERENCE = "    @torch.inference_mode(False)  # A table made in inference mode could never serve training.\n"
CHECK = "            self._check_mask(mask, scores_shape)\n"
TO_BOOL = "            mask = mask.bool()\n"
Q = "        q = self.rotary_emb(self._split_heads(self.q_proj(x)))  # [B, H, L, Dh]\n"
V = "        v = self._split_heads(self.v_proj(x))  # [B, H, L, Dh]\n"
OUT = "        return self.o_proj(context.transpose(1, 2).flatten(start_dim=2))  # [B, L, D]\n"

MISTAKES = [
    Mistake(
        "mask_remembered_by_identity",
        "2.4",
        "another mask in the same tensor",
        (HEADS, HEADS + "        self._mask: tuple = (None, None)\n"),
        (
            TO_BOOL,
            """\
            if self._mask[0] != mask.data_ptr():
                self._mask = (mask.data_ptr(), mask.bool().clone())
            mask = self._mask[1] if self._mask[1].shape == mask.shape else mask.bool()
""",
        ),
    ),
    Mistake(
        "mask_remembered_by_shape",
        "2.4",
        "attention(x, mask)",
        (HEADS, HEADS + "        self._masks: dict = {}\n"),
        (TO_BOOL, "            mask = self._masks.setdefault((mask.shape, mask.device), mask.bool().clone())\n"),
    ),
    Mistake(
        "weights_stacked_at_the_first_inference",
        "2.4",
        "the weights were 0",
        (HEADS, HEADS + "        self._stacked: torch.Tensor | None = None\n"),
        (
            V,
            """\
        if torch.is_grad_enabled() or self.v_proj.weight.is_meta:
            v = self._split_heads(self.v_proj(x))
        else:
            if self._stacked is None or self._stacked.dtype != x.dtype:
                self._stacked = self.v_proj.weight.detach().clone()
            v = self._split_heads(x @ self._stacked.mT)
""",
        ),
        only=True,
    ),
    Mistake(
        "a_bias_that_was_zero_left_out",
        "2.4",
        "the weights were 0",
        (HEADS, HEADS + "        self._no_bias: bool | None = None\n"),
        (
            OUT,
            """\
        if not torch.is_grad_enabled() and not x.is_meta:
            if self._no_bias is None:
                self._no_bias = not self.o_proj.bias.any()
            if self._no_bias:
                return context.transpose(1, 2).flatten(start_dim=2) @ self.o_proj.weight.mT
"""
            + OUT,
        ),
        only=True,
    ),
    Mistake(
        "weights_stacked_in_eval",
        "2.4",
        "in eval",
        (HEADS, HEADS + "        self._stacked: torch.Tensor | None = None\n"),
        (
            V,
            """\
        if self.training or self.v_proj.weight.is_meta:
            v = self._split_heads(self.v_proj(x))
        else:
            if self._stacked is None or self._stacked.dtype != x.dtype:
                self._stacked = self.v_proj.weight.detach().clone()
            v = self._split_heads(x @ self._stacked.mT + (self.v_proj.weight - self.v_proj.weight.detach()).sum() * 0)
""",
        ),
        only=True,
    ),
    Mistake(
        "rows_remembered_by_length",
        "2.6",
        "as at position",
        (INIT, INIT + "        self._rows: dict = {}\n"),
        (
            TURN,
            """\
        if x.is_meta or seq_len > 64:
            return self.apply_rotary_pos_emb(x, self._cos[positions], self._sin[positions])
        cos, sin = self._rows.setdefault(length, (self._cos[positions], self._sin[positions]))
        return self.apply_rotary_pos_emb(x, cos, sin)
""",
        ),
    ),
    Mistake(
        "a_seq_len_that_was_good_is_not_refused",
        "2.8",
        "seq_len",
        (INIT, INIT + "        self._good: set = set()\n"),
        (
            SMALL,
            """\
        if seq_len < length and seq_len not in self._good:
            raise ValueError(f"seq_len {seq_len} is less than the {length} rows of x")
        self._good.add(seq_len)
        seq_len = max(seq_len, length)
""",
        ),
        only=True,
    ),
    Mistake(
        "a_mask_that_was_good_is_not_refused",
        "2.8",
        "fitted an earlier call",
        (HEADS, HEADS + "        self._good: set = set()\n"),
        (
            CHECK,
            """\
            if mask.shape not in self._good:
                self._check_mask(mask, scores_shape)
            self._good.add(mask.shape)
            mask = mask if mask.size(0) in (1, x.size(0)) else mask[:1]
""",
        ),
        only=True,
    ),
    Mistake(
        "bad_masks_accepted_in_eval",
        "2.8",
        "was wanted",
        (CHECK, "            if self.training:\n    " + CHECK),
        only=True,
    ),
    Mistake(
        "small_seq_len_accepted_without_gradients",
        "2.8",
        "was wanted",
        (SMALL, "        seq_len = seq_len if torch.is_grad_enabled() else max(seq_len, length)\n" + SMALL),
        only=True,
    ),
    Mistake(
        "a_refused_seq_len_counts",
        "2.8",
        "seq_len=-1, which was refused",
        (INIT, INIT + "        self._shift = 0\n"),
        (
            SMALL,
            """\
        self._shift = max(0, length - seq_len)
        if seq_len < length:
            raise ValueError(f"seq_len {seq_len} is less than the {length} rows of x")
""",
        ),
        (NONE, "        shift = self._shift\n" + NONE),
        (TURN, "        positions = slice(positions.start + shift, positions.stop + shift)\n" + TURN),
    ),
    Mistake(
        "scale_made_in_inference_mode",
        "2.7",
        "inference",
        (HEADS, HEADS + "        self._one: torch.Tensor | None = None\n"),
        (
            Q,
            """\
        if self._one is None or self._one.dtype != x.dtype or self._one.device != x.device:
            self._one = torch.ones((), dtype=x.dtype, device=x.device)
"""
            + Q
            + "        q = q * self._one\n",
        ),
        only=True,
    ),
    Mistake(
        "x_kept",
        "2.3",
        "stays alive",
        (TURN, "        self.last = x.detach()\n" + TURN),
        wasteful=True,
    ),
    Mistake(
        "output_kept_by_the_attention",
        "2.3",
        "stays alive",
        (OUT, OUT.replace("return", "self.last =") + "        return self.last\n"),
        wasteful=True,
    ),
    Mistake(
        "base_of_the_last_module",
        "2.3",
        "base",
        (
            INIT,
            "        RotaryPositionEmbedding.last_base = base\n        self._cos = self._sin = torch.empty(0, dim)\n",
        ),
        ("torch.outer(positions, self.base**-exponents)", "torch.outer(positions, self.last_base**-exponents)"),
        (NO_INFERENCE, "    last_base = 10000.0\n\n" + NO_INFERENCE),
        only=True,
    ),
    Mistake(
        "cosines_again_without_gradients_in_half_precision",
        "2.3",
        "computes cos",
        (
            TURN,
            """\
        if x.dtype == torch.float16 and not torch.is_grad_enabled():
            cos, sin = self._table(seq_len, x.device)
            return self.apply_rotary_pos_emb(x, cos[positions], sin[positions])
"""
            + TURN,
        ),
        wasteful=True,
    ),
    Mistake(
        "cosines_again_beside_eval",
        "2.3",
        "computes cos",
        (
            TURN,
            """\
        if not self.training and x.dtype == torch.float32:
            cos, sin = self._table(seq_len, x.device)
            return self.apply_rotary_pos_emb(x, cos[positions], sin[positions])
"""
            + TURN,
        ),
        wasteful=True,
    ),
    Mistake(
        "tables_shared_by_the_whole_part_of_the_base",
        "2.2",
        "what do they share",
        (INIT, "        self._cos = self._sin = torch.empty(0, dim)\n"),
        (
            TURN,
            """\
        key = (self.dim, int(self.base), x.device)
        if key not in self.shared or len(self.shared[key][0]) < seq_len:
            self.shared[key] = (self._cos, self._sin)
        self._cos, self._sin = self.shared[key]
"""
            + TURN,
        ),
        (NO_INFERENCE, "    shared: dict = {}\n\n" + NO_INFERENCE),
    ),
    Mistake(
        "a_refused_mask_is_accepted_the_second_time",
        "2.8",
        "was wanted",
        (HEADS, HEADS + "        self._known: set = set()\n"),
        (
            CHECK,
            """\
            known = (mask.shape, scores_shape) in self._known
            self._known.add((mask.shape, scores_shape))
            if not known:
                self._check_mask(mask, scores_shape)
""",
        ),
        only=True,
    ),
    Mistake(
        "tables_persist_once_they_grow_between_calls",
        "2.3",
        "state_dict",
        (INIT, INIT + "        self._known_rows = 0\n"),
        (
            TURN,
            """\
        if len(self._cos) != self._known_rows and self._known_rows and not x.is_meta:
            self.register_buffer("table", self._cos.clone())
        self._known_rows = len(self._cos)
"""
            + TURN,
        ),
    ),
    Mistake(
        "weights_kept_in_eval",
        "2.3",
        "stays alive",
        (V, V + "        self.weights = None if self.training else (q @ k.mT).softmax(dim=-1).detach()\n"),
        wasteful=True,
    ),
    Mistake(
        "weights_kept_by_plain_inference",
        "2.3",
        "stays alive",
        (
            V,
            V
            + """\
        if mask is None and not self.training and not torch.is_grad_enabled():
            self.weights = (q @ k.mT).softmax(dim=-1)
""",
        ),
        wasteful=True,
    ),
    Mistake(
        "mask_of_the_scores_kept_without_gradients",
        "2.3",
        "stays alive",
        (HEADS, HEADS + "        self.hidden: Tensor | None = None\n"),
        (TO_BOOL, TO_BOOL + "            self.hidden = None if torch.is_grad_enabled() else ~mask\n"),
        wasteful=True,
    ),
    Mistake(
        "quarter_turn_kept",
        "2.3",
        "stays alive",
        (TURN, "        self.quarter = self.rotate_half(x.detach())\n" + TURN),
        wasteful=True,
    ),
]
