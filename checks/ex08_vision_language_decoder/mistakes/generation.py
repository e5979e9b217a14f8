"""Wrong answers to generation (8.7), and what costs too much (8.8)."""

from harness.model.bank import Mistake

TOKENS = "        tokens = self._image_tokens(images) if images is not None and count else None  # [M, T, D]\n"
TOWER = "        tokens = self.vision(images if first is None else images.to(first.dtype))  # [M, T, vision_dim]\n"
NO_GRAD = "    @torch.no_grad()\n"
MERGE = '        embeds, mask, positions, _ = self.merge(input_ids, images, attention_mask, padding_side="left")\n'
RUNNING = "        running = torch.ones_like(mask[:, 0])  # [B]\n"
NEW = "        new = input_ids.new_full((len(input_ids), max_new_tokens), self.pad_token_id)\n"
DECODE = "            logits, cache = self.decoder(embeds, mask, positions, cache)\n"
BEST = "            best = logits[:, -1].argmax(dim=-1)  # [B]\n"
WRITE = "            new[:, step] = best.where(running, new[:, step])\n"
ENDS = """            if eos_token_id is not None:
                running = running & (best != eos_token_id)
                if not running.any():
                    break
"""
FEED = "            embeds = self.decoder.embed(best)[:, None]  # [B, 1, D]\n"
MASK = "            mask = F.pad(mask, (0, 1), value=True)\n"
POSITIONS = "            positions = positions[:, -1:] + 1\n"
RETURN = "        return new\n"
FORWARD = "        merged = self.merge(input_ids, images, attention_mask, labels)\n"
LOGITS = (
    "        logits, _ = self.decoder(merged.inputs_embeds, merged.attention_mask, merged.position_ids)  # [B, S, V]\n"
)

MISTAKES = [
    Mistake(
        "generates_pad",
        ("8.7", "8.8"),
        "was wanted",
        (RETURN, "        return torch.full_like(new, self.pad_token_id)\n"),
    ),
    Mistake(
        "generates_nothing", ("8.7", "8.8"), "None", (RETURN, "        return None  # type: ignore[return-value]\n")
    ),
    Mistake(
        "generates_after_the_prompt",
        "8.7",
        "the new tokens alone",
        (RETURN, "        return torch.cat([input_ids, new], dim=1)\n"),
    ),
    Mistake("tokens_of_int32", "8.7", "torch.int32 came", (RETURN, "        return new.int()\n")),
    Mistake("ends_short", "8.7", "the new tokens alone", (RETURN, "        return new[:, : step + 1]\n")),
    Mistake(
        "samples", "8.7", "was wanted", (BEST, "            best = logits[:, -1].softmax(-1).multinomial(1)[:, 0]\n")
    ),
    Mistake("worst_token", "8.7", "was wanted", ("logits[:, -1].argmax(dim=-1)", "logits[:, -1].argmin(dim=-1)")),
    Mistake(
        "default_of_20",
        "8.7",
        "16 tokens by default",
        (
            "max_new_tokens: int = 16,\n        eos_token_id: int | None = None,\n    ) -> Tensor:",
            "max_new_tokens: int = 20,\n        eos_token_id: int | None = None,\n    ) -> Tensor:",
        ),
        only=True,
    ),
    Mistake(
        "generation_from_padding",
        "8.7",
        "first token read",
        (
            MERGE,
            MERGE.replace(', padding_side="left"', "")
            + "        positions = torch.ones_like(positions).cumsum(dim=1) - 1\n",
        ),
        (POSITIONS, "            positions = mask.sum(dim=1, keepdim=True) - 1\n"),
    ),
    Mistake(
        "generation_positions_stand_still",
        "8.7",
        "position_ids",
        (POSITIONS, "            positions = positions[:, -1:]\n"),
    ),
    Mistake(
        "positions_stop_after_one",
        "8.7",
        "position_ids",
        (POSITIONS, "            positions = positions[:, -1:] + int(step == 0)\n"),
    ),
    Mistake(
        "positions_one_too_far",
        "8.7",
        "position_ids",
        (POSITIONS, "            positions = positions[:, -1:] + 1 + int(step == 0)\n"),
    ),
    Mistake(
        "positions_from_the_width",
        "8.7",
        "position_ids",
        (POSITIONS, "            positions = torch.full_like(positions[:, -1:], mask.size(1) - 1)\n"),
    ),
    Mistake(
        "positions_from_the_ids",
        "8.7",
        "position_ids",
        (POSITIONS, "            positions = torch.full_like(positions[:, -1:], input_ids.size(1) + step)\n"),
    ),
    Mistake("generation_mask_stands_still", "8.7", "are visible", (MASK, MASK.replace("True", "False"))),
    Mistake("mask_does_not_grow", ("8.7", "8.8"), "", (MASK, "")),
    Mistake(
        "generation_sees_padding",
        "8.7",
        "are visible",
        (MASK, "            mask = mask.new_ones(len(mask), mask.size(1) + 1)\n"),
    ),
    Mistake(
        "padding_visible_in_the_prompt",
        "8.7",
        "are visible",
        (RUNNING, RUNNING + "        mask = torch.ones_like(mask)\n"),
    ),
    Mistake(
        "generation_blind",
        "8.7",
        "does not see the images",
        (
            MERGE,
            """        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask != 0
        seen = seen * (input_ids != self.image_token_id)
        if int(seen.sum(dim=1).min()) == 0:
            seen = seen + (seen.sum(dim=1, keepdim=True) == 0) * (torch.arange(seen.size(1)) == 0)
            input_ids = input_ids.masked_fill(input_ids == self.image_token_id, 0)
        embeds, mask, positions, _ = self.merge(input_ids, None, seen, padding_side="left")
""",
        ),
    ),
    Mistake(
        "zero_images",
        "8.7",
        "was wanted",
        (MERGE, "        images = None if images is None else torch.zeros_like(images)\n" + MERGE),
    ),
    Mistake("one_end_ends_all", "8.7", "was wanted", ("if not running.any():", "if not running.all():"), only=False),
    Mistake(
        "end_tokens_padded",
        "8.7",
        "was wanted",
        (
            WRITE + ENDS,
            ENDS.replace("                if not running.any():\n                    break\n", "")
            + WRITE
            + "            if not running.any():\n                break\n",
        ),
    ),
    Mistake("ended_rows_go_on", "8.7", "was wanted", (WRITE, "            new[:, step] = best\n")),
    Mistake(
        "ended_rows_repeat_the_end",
        "8.7",
        "was wanted",
        (WRITE, "            new[:, step] = best.where(running, eos_token_id or 0)\n"),
    ),
    Mistake("padded_with_0", "8.7", "was wanted", (NEW, NEW.replace("self.pad_token_id", "0"))),
    Mistake(
        "rows_wake_up_again",
        "8.7",
        "was wanted",
        ("running = running & (best != eos_token_id)", "running = best != eos_token_id"),
    ),
    Mistake(
        "end_token_0_ignored",
        "8.7",
        "eos_token_id 0",
        ("            if eos_token_id is not None:\n", "            if eos_token_id:\n"),
        only=True,
    ),
    Mistake(
        "pad_ends_a_row",
        "8.7",
        "was wanted",
        (
            ENDS,
            ENDS.replace("(best != eos_token_id)", "(best != eos_token_id) & (best != self.pad_token_id)").replace(
                "if eos_token_id is not None", "if True"
            ),
        ),
    ),
    Mistake(
        "end_token_of_the_prompt",
        "8.7",
        "eos_token_id",
        (
            RUNNING,
            (
                "        running = (input_ids != eos_token_id).all(dim=1) if eos_token_id is not "
                "None else torch.ones_like(mask[:, 0])\n"
            ),
        ),
    ),
    Mistake("tracks_gradients", "8.7", "gradients are on", (NO_GRAD, ""), only=True),
    Mistake(
        "inference_tensor", "8.7", "an inference tensor came", (NO_GRAD, "    @torch.inference_mode()\n"), only=True
    ),
    Mistake(
        "gradients_stay_off",
        "8.7",
        "gradients are off afterwards",
        (NO_GRAD, ""),
        (MERGE, "        torch.set_grad_enabled(False)\n" + MERGE),
    ),
    Mistake("left_in_eval", "8.7", "mode of a module", (MERGE, "        self.eval()\n" + MERGE)),
    Mistake(
        "all_back_in_train",
        "8.7",
        "mode of a module",
        (MERGE, "        was = self.training\n        self.eval()\n" + MERGE),
        (RETURN, "        self.train(was)\n" + RETURN),
    ),
    Mistake(
        "refuses_training",
        "8.7",
        "RuntimeError",
        (MERGE, '        if self.training:\n            raise RuntimeError("call eval() first")\n' + MERGE),
    ),
    Mistake(
        "last_token_fed_twice", "8.7", "was wanted", (FEED, "            best = new[:, max(step - 1, 0)]\n" + FEED)
    ),
    Mistake(
        "fed_through_the_pad",
        "8.7",
        "was wanted",
        (FEED, "            best = best.where(best != input_ids[:, -1], self.pad_token_id)\n" + FEED),
    ),
    Mistake(
        "prompt_of_the_first_call",
        "8.7",
        "call 2",
        (
            RUNNING,
            RUNNING
            + """        if len(mask) == 3:
            self._first = getattr(self, "_first", (embeds, mask, positions))
            embeds, mask, positions = self._first
""",
        ),
    ),
    # 8.8
    Mistake(
        "tower_per_image",
        "8.8",
        "the tower is called with [1, 1, 1]",
        (
            TOWER,
            (
                "        kind = images.dtype if first is None else first.dtype\n"
                "        tokens = torch.cat([self.vision(one[None].to(kind)) for one in images])\n"
            ),
        ),
        wasteful=True,
    ),
    Mistake(
        "tower_per_two",
        "8.8",
        "the tower is called with [2, 1]",
        (
            TOWER,
            (
                "        kind = images.dtype if first is None else first.dtype\n"
                "        tokens = torch.cat([self.vision(some.to(kind)) for some in images.split(2)])\n"
            ),
        ),
        wasteful=True,
    ),
    Mistake(
        "tower_without_images",
        "8.8",
        "not at all",
        (
            TOKENS,
            (
                "        tokens = self._image_tokens(images) if images is not None else None\n"
                "        tokens = tokens if count else None\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "tower_on_a_dummy_image",
        "8.8",
        "the tower is called",
        (
            TOKENS,
            TOKENS
            + (
                "        if tokens is None and images is not None:\n"
                "            self._image_tokens(images.new_zeros(1, *images.shape[1:]))\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "tower_twice_in_forward",
        "8.8",
        "forward with 3 images",
        (FORWARD, "        self.merge(input_ids, images, attention_mask)\n" + FORWARD),
        wasteful=True,
    ),
    Mistake(
        "tower_at_each_token",
        "8.8",
        "generate with 3 images",
        (
            BEST,
            BEST + "            if images is not None and len(images):\n                self._image_tokens(images)\n",
        ),
        wasteful=True,
    ),
    Mistake(
        "no_cache",
        "8.8",
        "one token per row",
        (
            DECODE,
            DECODE.replace(
                "logits, cache = self.decoder(embeds, mask, positions, cache)",
                "logits, _ = self.decoder(embeds, mask, positions)",
            ),
        ),
        (FEED, "            embeds = torch.cat([embeds, self.decoder.embed(best)[:, None]], dim=1)\n"),
        (POSITIONS, "            positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)\n"),
    ),
    Mistake(
        "rows_one_by_one",
        "8.8",
        "the tower is called with",
        (
            NO_GRAD,
            '''    def generate(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 16,
        eos_token_id: int | None = None,
    ) -> Tensor:
        """Each row by itself."""
        rows, first = [], 0
        for row in range(len(input_ids)):
            mask = None if attention_mask is None else attention_mask[row : row + 1]
            seen = torch.ones_like(input_ids[row]) if mask is None else mask[0] != 0
            count = int((seen * (input_ids[row] == self.image_token_id)).sum())
            own = None if images is None else images[first : first + count]
            rows.append(self._one(input_ids[row : row + 1], own, mask, max_new_tokens, eos_token_id))
            first += count
        return torch.cat(rows)

'''
            + NO_GRAD,
        ),
        ("    @torch.no_grad()\n    def generate(\n", "    @torch.no_grad()\n    def _one(\n"),
    ),
    Mistake(
        "one_call_too_many",
        "8.8",
        "times, at most",
        (RETURN, "        self.decoder(embeds, mask, positions, cache)\n" + RETURN),
        only=False,
    ),
    Mistake(
        "goes_on_after_all_have_ended",
        "8.8",
        "times, at most",
        ("                if not running.any():\n                    break\n", ""),
        wasteful=True,
    ),
    Mistake(
        "ends_a_call_late",
        "8.8",
        "times, at most",
        (
            (
                "                running = running & (best != eos_token_id)\n"
                "                if not running.any():\n"
                "                    break\n"
            ),
            (
                "                if not running.any():\n"
                "                    break\n"
                "                running = running & (best != eos_token_id)\n"
            ),
        ),
        wasteful=True,
    ),
    Mistake("stops_at_the_first_row", "8.7", "was wanted", ("if not running.any():", "if not running[0]:")),
    Mistake(
        "prompt_read_token_by_token",
        "8.8",
        "times, at most",
        (
            DECODE,
            """            if cache is None:
                for place in range(embeds.size(1)):
                    some = mask[:, : place + 1], positions[:, place : place + 1]
                    logits, cache = self.decoder(embeds[:, place : place + 1], *some, cache)
            else:
                logits, cache = self.decoder(embeds, mask, positions, cache)
""",
        ),
    ),
    Mistake(
        "prompt_read_twice",
        "8.8",
        "times, at most",
        (RUNNING, RUNNING + "        self.decoder(embeds, mask, positions)\n"),
    ),
    Mistake("cache_kept", "8.8", "generate: ", (RETURN, "        self._cache = cache\n" + RETURN), only=True),
    Mistake("image_tokens_kept", "8.8", "alive", (TOKENS, TOKENS + "        self._tokens = [tokens]\n"), wasteful=True),
    Mistake("logits_kept", "8.8", "forward: ", (LOGITS, LOGITS + "        self._logits = [logits]\n"), wasteful=True),
    Mistake(
        "mask_kept_when_refused",
        "8.8",
        "a refused merge",
        (
            '            raise ValueError(f"{wanted}',
            '            self._refused = [is_image]\n            raise ValueError(f"{wanted}',
        ),
        only=True,
    ),
    Mistake(
        "gradients_on_inside",
        "8.7",
        "gradients are on while",
        (MERGE, "        torch.set_grad_enabled(True)\n" + MERGE),
    ),
    Mistake(
        "inference_tensor_of_text",
        "8.7",
        "an inference tensor came",
        (
            RETURN,
            "        with torch.inference_mode(images is None or torch.is_inference_mode_enabled()):\n"
            "            return new.clone()\n",
        ),
    ),
    Mistake(
        "generated_pad_hidden",
        "8.7",
        "are visible",
        (MASK, "            mask = torch.cat([mask, (best != (self.pad_token_id or -1))[:, None]], dim=1)\n"),
    ),
    Mistake(
        "tower_per_256",
        "8.8",
        "520 images in a row",
        (
            TOWER,
            """        images = images if first is None else images.to(first.dtype)
        tokens = torch.cat([self.vision(some) for some in images.split(256)])
""",
        ),
    ),
]
