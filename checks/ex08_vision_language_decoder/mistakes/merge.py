"""Wrong answers to putting image tokens into the text (8.3)."""

from harness.model.bank import Mistake

VISIBLE = (
    "        visible = torch.ones_like(input_ids, dtype=torch.bool) if "
    "attention_mask is None else attention_mask != 0\n"
)
IS_IMAGE = "        is_image = visible & (input_ids == self.image_token_id)  # [B, L]\n"
COUNT = "        wanted, count = int(is_image.sum()), 0 if images is None else len(images)\n"
REFUSE = """        if wanted != count:
            raise ValueError(f"{wanted} visible placeholders, but {count} images")
"""
TOKENS = "        tokens = self._image_tokens(images) if images is not None and count else None  # [M, T, D]\n"
EMBEDS = "        embeds = self.decoder.embed(input_ids.flatten()[source].masked_fill(from_image, 0))  # [N, D]\n"
SCATTER = "            embeds = embeds.masked_scatter(from_image[:, None], tokens)\n"
RETURN = "        return Merged(inputs_embeds, mask, (mask.cumsum(dim=1) - 1).clamp(min=0), labels)\n"
PROJECT = "        return self.fc2(F.gelu(self.fc1(tokens)))  # [..., d_model]\n"
GELU = "F.gelu(self.fc1(tokens))"
TOWER = "        tokens = self.vision(images if first is None else images.to(first.dtype))  # [M, T, vision_dim]\n"
LENGTHS = "        lengths = repeats.sum(dim=1, keepdim=True)  # [B, 1]\n"
LONGEST = "        longest = int(lengths.max())\n"

MISTAKES = [
    # Nothing at all.
    Mistake("zeros", ("8.3", "8.4", "8.5", "8.7"), "came", (RETURN, RETURN.replace("(inputs", "(0 * inputs"))),
    Mistake(
        "none", ("8.3", "8.4", "8.5"), "None came", (RETURN, "        return None  # type: ignore[return-value]\n")
    ),
    Mistake(
        "text_given_back",
        "8.3",
        "came",
        (
            RETURN,
            "        return Merged(input_ids[..., None].to(embeds.dtype), mask, mask.cumsum(dim=1) - 1, labels)\n",
        ),
    ),
    Mistake(
        "image_tokens_of_zeros",
        "8.3",
        "[9.0, 20, 30, 5, 40, 50] was wanted",
        (SCATTER, SCATTER.replace(", tokens", ", 0 * tokens")),
    ),
    # Placeholders.
    Mistake(
        "placeholder_kept",
        "8.3",
        "was wanted",
        (IS_IMAGE, IS_IMAGE + "        keep = is_image\n"),
        (EMBEDS, EMBEDS.replace("masked_fill(from_image, 0)", "clamp(0, 12)")),
        (SCATTER, "            embeds = embeds + 0 * tokens.sum()\n"),
    ),
    Mistake("placeholder_looked_up", "8.3", "IndexError", (".masked_fill(from_image, 0)", "")),
    Mistake(
        "placeholder_clamped",
        "8.3",
        "is the placeholder's id looked up",
        (".masked_fill(from_image, 0)", ".clamp(min=0)"),
    ),
    Mistake(
        "placeholder_modulo",
        "8.3",
        "0 visible placeholders",
        (IS_IMAGE, "        is_image = visible & (input_ids < 0)\n"),
    ),
    Mistake(
        "every_foreign_id_is_a_placeholder",
        "8.3",
        "0 visible placeholders",
        (
            IS_IMAGE,
            "        is_image = visible & ((input_ids < 0) | (input_ids >= self.decoder.embed.num_embeddings))\n",
        ),
    ),
    Mistake(
        "pad_ids_are_text_of_the_image",
        "8.3",
        "0 visible placeholders",
        (IS_IMAGE, "        is_image = visible & ((input_ids == self.image_token_id) & (input_ids != 4))\n"),
    ),
    # Order.
    Mistake(
        "images_counted_per_row",
        "8.3",
        "row 1",
        (
            TOKENS,
            TOKENS
            + """        if tokens is not None:
            tokens = tokens[(is_image.cumsum(dim=1) - 1)[is_image]]
""",
        ),
    ),
    Mistake(
        "images_in_another_order",
        "8.3",
        "[9.0, 20, 30, 5, 40, 50] was wanted",
        (SCATTER, SCATTER.replace(", tokens", ", tokens.flip(0)")),
    ),
    Mistake(
        "images_column_by_column",
        "8.3",
        "row",
        (
            TOKENS,
            TOKENS
            + """        if tokens is not None:
            order = is_image.mT.flatten().cumsum(dim=0).unflatten(0, is_image.mT.shape).mT - 1
            tokens = tokens[order[is_image]]
""",
        ),
    ),
    Mistake(
        "an_image_per_row",
        "8.3",
        "row",
        (
            TOKENS,
            TOKENS
            + """        if tokens is not None:
            firsts = is_image.sum(dim=1).cumsum(dim=0) - is_image.sum(dim=1)
            tokens = tokens[firsts[:, None].expand_as(is_image)[is_image]]
""",
        ),
    ),
    Mistake("image_tokens_reversed", "8.3", "was wanted", (SCATTER, SCATTER.replace(", tokens", ", tokens.flip(1)"))),
    Mistake(
        "first_token_dropped",
        "8.3",
        "was wanted",
        (
            TOWER,
            TOWER.replace("[M, T, vision_dim]", "class token?")
            + "        tokens = tokens[:, 1:] if tokens.size(1) > 1 else tokens\n",
        ),
    ),
    Mistake(
        "an_image_at_the_end_is_lost",
        "8.3",
        "was wanted",
        (
            IS_IMAGE,
            IS_IMAGE
            + (
                "        is_image[:, -1] = False\n"
                "        visible = visible & ((input_ids != self.image_token_id) | is_image)\n"
            ),
        ),
        (
            COUNT,
            COUNT.replace(
                "int(is_image.sum())",
                "int((input_ids[visible | (input_ids == self.image_token_id)] == self.image_token_id).sum())",
            ),
        ),
        (SCATTER, SCATTER.replace(", tokens", ", tokens[: int(is_image.sum())]")),
    ),
    # The projector.
    Mistake(
        "tanh_gelu", "8.3", "tanh approximation", (GELU, 'F.gelu(self.fc1(tokens), approximate="tanh")'), only=False
    ),
    Mistake("relu", "8.3", "it is what relu gives", (GELU, "F.relu(self.fc1(tokens))")),
    Mistake("silu", "8.3", "silu", (GELU, "F.silu(self.fc1(tokens))")),
    Mistake("no_activation", "8.3", "no activation", (GELU, "self.fc1(tokens)")),
    Mistake(
        "gelu_at_the_end",
        "8.3",
        "Projector.forward",
        (PROJECT, "        return F.gelu(self.fc2(F.gelu(self.fc1(tokens))))\n"),
    ),
    Mistake(
        "projector_of_matrices_only",
        "8.3",
        "Projector.forward",
        (PROJECT, "        if tokens.dim() == 1:\n            return self.fc2(self.fc1(tokens))\n" + PROJECT),
        only=True,
    ),
    Mistake(
        "projector_skips",
        "8.3",
        "[9.0, 20, 30, 5, 40, 50] was wanted",
        (PROJECT, PROJECT.replace("self.fc2(F", "self.fc2.bias + 0 * self.fc2(F")),
    ),
    # Counts.
    Mistake(
        "surplus_images_accepted",
        "8.3",
        "was accepted",
        ("        if wanted != count:\n", "        if wanted > count:\n"),
        only=True,
    ),
    Mistake(
        "missing_images_accepted",
        "8.3",
        "was accepted, ValueError was wanted",
        ("        if wanted != count:\n", "        if wanted < count:\n"),
        only=True,
    ),
    Mistake(
        "counted_with_images_alone",
        "8.3",
        "no images",
        ("        if wanted != count:\n", "        if wanted != count and images is not None:\n"),
        only=True,
    ),
    Mistake(
        "counted_with_placeholders_alone",
        "8.3",
        "0 visible placeholders",
        ("        if wanted != count:\n", "        if wanted != count and wanted:\n"),
        only=True,
    ),
    Mistake("no_placeholders_in_the_error", "8.3", "lacks 3", ("{wanted} visible", "visible"), only=True),
    Mistake("no_images_in_the_error", "8.3", "lacks 0", ("but {count} images", "but other images"), only=True),
    Mistake(
        "runtime_error_for_counts",
        "8.3",
        "RuntimeError",
        ('raise ValueError(f"{wanted}', 'raise RuntimeError(f"{wanted}'),
        only=True,
    ),
    Mistake("counted_after_the_tower", "8.3", "runs before", (COUNT + REFUSE + TOKENS, COUNT + TOKENS + REFUSE)),
    # Masks.
    Mistake(
        "mask_inverted_bitwise",
        "8.3",
        "a mask in torch.uint8",
        (
            VISIBLE,
            VISIBLE.replace(
                "attention_mask != 0",
                "(~attention_mask == 0 if not attention_mask.is_floating_point() else attention_mask != 0)",
            ),
        ),
    ),
    Mistake(
        "mask_as_an_integer",
        "8.3",
        "bitwise_and",
        (VISIBLE, VISIBLE.replace("attention_mask != 0", "(attention_mask & 1) == 1")),
        only=True,
    ),
    Mistake(
        "mask_of_int64_alone",
        "8.3",
        "a mask in torch.bool",
        (
            VISIBLE,
            VISIBLE.replace("attention_mask != 0", "(attention_mask != 0) | (attention_mask.dtype != torch.int64)"),
        ),
    ),
    Mistake(
        "mask_of_bytes_ignored",
        "8.3",
        "torch.uint8",
        (
            VISIBLE,
            VISIBLE.replace("attention_mask != 0", "(attention_mask != 0) | (attention_mask.dtype == torch.uint8)"),
        ),
        only=True,
    ),
    # Inputs, gradients, and what is kept.
    Mistake(
        "ids_written_to",
        "8.3",
        "was wanted",
        (
            EMBEDS,
            (
                "        if input_ids.is_contiguous():\n"
                "            input_ids[is_image] = 0\n"
                "        else:\n"
                "            torch.as_strided(input_ids, (int(input_ids.size(1)),), (1,))[:1] = 0\n"
            )
            + EMBEDS,
        ),
    ),
    Mistake(
        "ids_written_to_and_back",
        "8.3",
        "input_ids is written to",
        (EMBEDS, "        input_ids[:1].add_(1).sub_(1)\n" + EMBEDS),
    ),
    Mistake(
        "images_centred_in_place", "8.3", "written-to tensor", (TOWER, "        images.sub_(images.mean())\n" + TOWER)
    ),
    Mistake(
        "mask_written_to_and_back",
        "8.3",
        "attention_mask is written to",
        (
            IS_IMAGE,
            IS_IMAGE
            + (
                "        if attention_mask is not None and attention_mask.dtype == torch.int64:\n"
                "            attention_mask[:1].add_(1).sub_(1)\n"
            ),
        ),
    ),
    Mistake("ids_viewed", "8.3", "view size", ("input_ids.flatten()[source]", "input_ids.view(-1)[source]")),
    Mistake(
        "image_tokens_detached",
        ("8.3", "8.4"),
        "gradient of",
        (SCATTER, SCATTER.replace(", tokens", ", tokens.detach()")),
    ),
    Mistake(
        "text_detached",
        ("8.3", "8.4"),
        "gradient of",
        (EMBEDS, EMBEDS.replace("  # [N, D]", ".detach()")),
    ),
    Mistake("tower_in_no_grad", ("8.3", "8.4"), "gradient of", (TOWER, "        with torch.no_grad():\n    " + TOWER)),
    Mistake(
        "placeholders_move_an_embedding",
        "8.3",
        "gradient of decoder.embed.weight",
        (
            SCATTER,
            (
                "            row = self.decoder.embed.weight[0]\n"
                "            embeds = embeds.masked_scatter(from_image[:, None], tokens + row - row.detach())\n"
            ),
        ),
    ),
    Mistake(
        "image_tokens_kept_by_shape",
        "8.3",
        "inputs_embeds",
        (
            TOKENS,
            """        if images is not None and count and not torch.is_grad_enabled():
            kept = self.__dict__.setdefault("_kept", {})
            if images.shape not in kept:
                kept[images.shape] = self._image_tokens(images)
            tokens: Tensor | None = kept[images.shape]
        else:
            tokens = self._image_tokens(images) if images is not None and count else None
""",
        ),
    ),
    Mistake(
        "image_tokens_kept_by_object",
        "8.3",
        "after an edit",
        (
            TOKENS,
            """        kept = self.__dict__.setdefault("_kept", [None, None])
        if images is not None and count and not torch.is_grad_enabled():
            if kept[0] is not images:
                kept[:] = [images, self._image_tokens(images)]
            tokens: Tensor | None = kept[1]
        else:
            tokens = self._image_tokens(images) if images is not None and count else None
""",
        ),
    ),
    Mistake(
        "embedding_copied",
        "8.3",
        "came",
        (
            "        self._staged = False\n",
            "        self._staged = False\n        self._table = [decoder.embed.weight.detach().clone()]\n",
        ),
        (
            EMBEDS,
            EMBEDS
            + (
                "        if not torch.is_grad_enabled():\n"
                "            embeds = "
                "self._table[0].to(embeds)[input_ids.flatten()[source].masked_fill(from_image, 0)]\n"
            ),
        ),
    ),
    Mistake(
        "tower_deep_copied",
        "8.3",
        "VisionLanguageModel.vision",
        ("        self.vision = vision\n", "        import copy\n\n        self.vision = copy.deepcopy(vision)\n"),
    ),
    Mistake(
        "squeezed",
        "8.3",
        "RuntimeError",
        (TOWER, TOWER + "        tokens = tokens.squeeze(1)\n"),
    ),
    Mistake("T_of_the_class", "8.3", "Number of elements", ("tokens.size(1) - 1)", "2)"), only=False),
    Mistake(
        "one_image_is_enough", "8.3", "came", (SCATTER, SCATTER.replace(", tokens", ", tokens[:1].expand_as(tokens)"))
    ),
    Mistake(
        "scaled_embeddings", "8.3", "was wanted", (EMBEDS, EMBEDS.replace("  # [N, D]", " * self.decoder.d_model**0.5"))
    ),
    Mistake(
        "no_images_no_placeholders",
        "8.3",
        "2 visible placeholders",
        (
            IS_IMAGE,
            IS_IMAGE
            + """        if images is not None and not len(images) and self.image_token_id >= 0:
            is_image = torch.zeros_like(visible)
""",
        ),
    ),
    Mistake(
        "counted_in_the_masks_dtype",
        "8.3",
        "count in int64",
        (
            LENGTHS,
            """        bits = attention_mask is None or attention_mask.dtype == torch.bool
        kind = torch.int64 if attention_mask is None or bits else attention_mask.dtype
        lengths = repeats.sum(dim=1, keepdim=True, dtype=kind)
""",
        ),
    ),
    Mistake(
        "frozen_towers_in_no_grad",
        "8.3",
        "gradient of images",
        (
            TOWER,
            """        trains = any(parameter.requires_grad for parameter in self.vision.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
    """
            + TOWER,
        ),
    ),
]
