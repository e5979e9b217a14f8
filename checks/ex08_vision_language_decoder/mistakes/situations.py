"""Wrong answers that are right in a first call, or in the usual one, and wrong in others."""

from harness.model.bank import Mistake

IS_IMAGE = "        is_image = visible & (input_ids == self.image_token_id)  # [B, L]\n"
COUNT = "        wanted, count = int(is_image.sum()), 0 if images is None else len(images)\n"
TOKENS = "        tokens = self._image_tokens(images) if images is not None and count else None  # [M, T, D]\n"
TOWER = "        tokens = self.vision(images if first is None else images.to(first.dtype))  # [M, T, vision_dim]\n"
LENGTHS = "        lengths = repeats.sum(dim=1, keepdim=True)  # [B, 1]\n"
RETURN = "        return Merged(inputs_embeds, mask, (mask.cumsum(dim=1) - 1).clamp(min=0), labels)\n"
RUNNING = "        running = torch.ones_like(mask[:, 0])  # [B]\n"
LOSS = "        return logits, total / (targets != IGNORED).sum().clamp(min=1)\n"

MISTAKES = [
    Mistake(
        "images_remembered",
        "8.3",
        "was wanted",
        (
            COUNT,
            """        if images is not None:
            self._last = [images]
        elif is_image.any():
            images = getattr(self, "_last", [None])[0]
"""
            + COUNT,
        ),
    ),
    Mistake("images_are_small", "8.3", "was wanted", (TOWER, "        images = images.clamp(-10, 10)\n" + TOWER)),
    Mistake(
        "images_centred", ("8.3", "8.4"), "was wanted", (TOWER, "        images = images - images.mean()\n" + TOWER)
    ),
    Mistake(
        "rows_that_repeat_share_images",
        "8.3",
        "inputs_embeds",
        (
            TOKENS,
            TOKENS
            + """        alike = input_ids.stride(0) == 0 and not is_image.sum(dim=1).diff().any()
        if tokens is not None and len(input_ids) > 1 and alike:
            tokens = tokens[: count // len(input_ids)].repeat(len(input_ids), 1, 1)
""",
        ),
    ),
    Mistake(
        "short_rows_only",
        "8.5",
        "position_ids",
        (RETURN, RETURN.replace("clamp(min=0)", "clamp(0, 5)")),
    ),
    Mistake("loss_of_few_labels", "8.4", "loss", (LOSS, LOSS.replace("clamp(min=1)", "clamp(min=1, max=4)"))),
    Mistake(
        "text_in_no_grad",
        "8.4",
        "gradient",
        (LENGTHS, "        embeds = embeds if tokens is not None else embeds.detach()\n" + LENGTHS),
    ),
    Mistake(
        "three_rows_at_most",
        "8.7",
        "was wanted",
        (RUNNING, RUNNING + "        if len(mask) == 1:\n            positions = positions + 1\n"),
    ),
    Mistake(
        "tower_eval_by_hand",
        "8.6",
        "the tower",
        (
            "        self._staged = True\n        self.vision.eval()\n",
            "        self._staged = self.training\n        self.vision.eval()\n",
        ),
    ),
]
