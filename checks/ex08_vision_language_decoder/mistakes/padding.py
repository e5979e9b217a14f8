"""Wrong answers to padding (8.5): mask, positions, sides."""

from harness.model.bank import Mistake

VISIBLE = (
    "        visible = torch.ones_like(input_ids, dtype=torch.bool) if "
    "attention_mask is None else attention_mask != 0\n"
)
IS_IMAGE = "        is_image = visible & (input_ids == self.image_token_id)  # [B, L]\n"
EMBEDS = "        embeds = self.decoder.embed(input_ids.flatten()[source].masked_fill(from_image, 0))  # [N, D]\n"
LONGEST = "        longest = int(lengths.max())\n"
MASK = '        mask = columns < lengths if padding_side == "right" else columns >= longest - lengths  # [B, S]\n'
ZEROS = "embeds.new_zeros(*mask.shape, embeds.size(-1))"
RETURN = "        return Merged(inputs_embeds, mask, (mask.cumsum(dim=1) - 1).clamp(min=0), labels)\n"
MERGE = "        merged = self.merge(input_ids, images, attention_mask, labels)\n"
DECODE = (
    "        logits, _ = self.decoder(merged.inputs_embeds, merged.attention_mask, merged.position_ids)  # [B, S, V]\n"
)
STAYS = """        more = is_image * (tokens.size(1) - 1) if tokens is not None else torch.zeros_like(input_ids)
        repeats = 1 + more
"""
REPEATS = (
    "        repeats = visible.long() if tokens is None else visible + is_image * (tokens.size(1) - 1)  # [B, L]\n"
)

MISTAKES = [
    Mistake(
        "padding_visible",
        "8.5",
        "attention_mask, row",
        (RETURN, RETURN.replace("embeds, mask,", "embeds, torch.ones_like(mask),")),
    ),
    Mistake(
        "image_token_hidden",
        "8.5",
        "attention_mask, row",
        (
            RETURN,
            "        first = from_image & ~from_image.roll(1)\n        seen = mask.masked_scatter(mask, ~first)\n"
            + RETURN.replace("embeds, mask,", "embeds, seen,"),
        ),
    ),
    Mistake(
        "image_tokens_hidden",
        "8.5",
        "attention_mask, row",
        (
            RETURN,
            "        seen = mask.masked_scatter(mask, ~from_image)\n"
            + RETURN.replace("embeds, mask,", "embeds, seen,"),
        ),
    ),
    Mistake(
        "positions_count_padding",
        "8.5",
        "position_ids of row",
        (RETURN, RETURN.replace("(mask.cumsum(dim=1) - 1).clamp(min=0)", "columns.expand(mask.shape)")),
    ),
    Mistake("positions_from_1", "8.5", "position_ids of row", (RETURN, RETURN.replace(" - 1", ""))),
    Mistake(
        "one_position_per_image",
        "8.5",
        "position_ids of row",
        (
            RETURN,
            (
                "        steps = torch.zeros_like(mask, dtype=torch.long).masked_scatter(mask, "
                "(~(from_image & from_image.roll(1))).long())\n"
            )
            + RETURN.replace("mask.cumsum", "steps.cumsum"),
        ),
    ),
    Mistake(
        "positions_of_int32",
        "8.5",
        "torch.int32 came",
        (RETURN, RETURN.replace(".clamp(min=0)", ".clamp(min=0).int()")),
        only=True,
    ),
    Mistake(
        "mask_of_int64", "8.5", "torch.int64 came", (RETURN, RETURN.replace("embeds, mask,", "embeds, mask.long(),"))
    ),
    Mistake("padding_always_right", "8.5", "padding_side='left'", (MASK, "        mask = columns < lengths\n")),
    Mistake("sides_exchanged", "8.5", "padding_side='right'", (MASK, MASK.replace('"right"', '"left"'))),
    Mistake(
        "left_embeds_on_the_right",
        "8.5",
        "at the tokens",
        ("masked_scatter(mask[..., None], embeds)", "masked_scatter((columns < lengths)[..., None], embeds)"),
    ),
    Mistake(
        "padding_stays_where_it_was",
        "8.5",
        "attention_mask",
        (REPEATS, STAYS),
        (
            EMBEDS,
            EMBEDS.replace("masked_fill(from_image, 0)", "masked_fill(from_image | ~visible.flatten()[source], 0)"),
        ),
        (RETURN, "        mask = mask.masked_scatter(mask, visible.flatten()[source])\n" + RETURN),
    ),
    Mistake(
        "as_wide_as_the_ids",
        "8.5",
        "(3, 1, 13) was wanted",
        (LONGEST, "        longest = max(int(lengths.max()), input_ids.size(1))\n"),
    ),
    Mistake(
        "nan_under_padding",
        "8.5",
        "not finite",
        (ZEROS, 'embeds.new_full((*mask.shape, embeds.size(-1)), float("nan"))'),
    ),
    Mistake(
        "padding_by_id",
        "8.5",
        "only the mask says what is padding",
        (
            IS_IMAGE,
            (
                "        if attention_mask is None:\n"
                "            visible = input_ids != self.pad_token_id\n"
                "            visible |= ~visible.any(dim=1, keepdim=True)\n"
            )
            + IS_IMAGE,
        ),
    ),
    Mistake(
        "padding_by_id_too",
        "8.5",
        "only the mask says",
        (
            IS_IMAGE,
            (
                "        trail = (input_ids == self.pad_token_id).flip(1).cumprod(dim=1).flip(1).bool()\n"
                "        visible = visible & ~(trail & ~trail.all(dim=1, keepdim=True))\n"
            )
            + IS_IMAGE,
        ),
    ),
    Mistake(
        "mask_ignored",
        ("8.3", "8.5"),
        "came",
        (VISIBLE, "        visible = torch.ones_like(input_ids, dtype=torch.bool)\n"),
    ),
    Mistake(
        "hidden_placeholders_counted",
        ("8.3", "8.5"),
        "came",
        (IS_IMAGE, "        is_image = input_ids == self.image_token_id  # [B, L]\n"),
    ),
    Mistake(
        "hidden_ids_looked_up",
        "8.5",
        "IndexError",
        (EMBEDS, "        self.decoder.embed(input_ids.masked_fill(is_image, 0))\n" + EMBEDS),
    ),
    Mistake("forward_pads_on_the_left", "8.5", "logits", (MERGE, MERGE.replace("labels)", 'labels, "left")'))),
    Mistake(
        "forward_without_positions",
        "8.5",
        "position_ids",
        (DECODE, DECODE.replace("merged.position_ids", "merged.position_ids + 1")),
    ),
    Mistake(
        "forward_reads_all_alike",
        "8.5",
        "position_ids",
        (DECODE, DECODE.replace("merged.position_ids", "0 * merged.position_ids")),
    ),
    Mistake(
        "forward_hides_images",
        "8.5",
        "visible",
        (
            DECODE,
            (
                "        seen = merged.attention_mask.clone()\n"
                "        seen[:, 1:2] &= ~merged.attention_mask[:, 1:2] | (input_ids[:, :1] == 9)\n"
            )
            + DECODE.replace("merged.attention_mask", "seen"),
        ),
    ),
    Mistake(
        "rows_of_one_token_fail",
        "8.5",
        "rows of one token",
        (
            DECODE,
            (
                "        if merged.inputs_embeds.size(1) == 1:\n"
                "            merged = merged._replace(position_ids=merged.position_ids + 1)\n"
            )
            + DECODE,
        ),
        only=False,
    ),
    Mistake(
        "logits_in_float32",
        "8.5",
        "apart",
        (DECODE, DECODE + "        logits = logits.float().to(logits.dtype)\n"),
        only=False,
    ),
    Mistake(
        "left_padding_of_the_first_row",
        "8.5",
        "came",
        (
            VISIBLE,
            VISIBLE
            + (
                "        visible = visible | (visible[:1] & (visible.sum(dim=1, keepdim=True) == visible.size(1)))\n"
                "        visible = visible if len(visible) < 3 or visible[0, 0] else visible[:1].expand_as(visible)\n"
            ),
        ),
    ),
    Mistake(
        "masks_of_ones_remembered",
        "8.5",
        "kept from the call before",
        (
            VISIBLE,
            """        if attention_mask is None:
            visible = torch.ones_like(input_ids, dtype=torch.bool)
        else:
            version = 0 if attention_mask.is_inference() else attention_mask._version
            key = (attention_mask.data_ptr(), attention_mask.shape, attention_mask.stride(), version)
            full = getattr(self, "_full", None) == key
            visible = torch.ones_like(input_ids, dtype=torch.bool) if full else attention_mask != 0
            self._full = key if bool(visible.all()) else None
""",
        ),
    ),
]
