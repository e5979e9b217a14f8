"""Wrong answers to mixed dtypes (8.9)."""

from harness.model.bank import Mistake

FIRST = "        first = next(self.vision.parameters(), None)\n"
TOWER = "        tokens = self.vision(images if first is None else images.to(first.dtype))  # [M, T, vision_dim]\n"
CAST = "        return self.projector(tokens.to(self.projector.fc1.weight.dtype)).to(self.decoder.embed.weight.dtype)\n"
BEFORE = "        before = logits[:, :-1].flatten(0, 1).to(_at_least_float32(logits))  # [B·(S - 1), V]\n"
LOGITS = (
    "        logits, _ = self.decoder(merged.inputs_embeds, merged.attention_mask, merged.position_ids)  # [B, S, V]\n"
)
LOSS = "        return logits, total / (targets != IGNORED).sum().clamp(min=1)\n"
MERGE = '        embeds, mask, positions, _ = self.merge(input_ids, images, attention_mask, padding_side="left")\n'
INIT = "        self._staged = False\n"

MISTAKES = [
    Mistake("images_not_cast", "8.9", "images are cast", (TOWER, "        tokens = self.vision(images)\n"), only=True),
    Mistake(
        "images_in_float32",
        "8.9",
        "images are cast",
        (TOWER, TOWER.replace("images.to(first.dtype)", "images.float()")),
    ),
    Mistake(
        "images_in_the_decoders_dtype",
        "8.9",
        "images are cast",
        (TOWER, TOWER.replace("images.to(first.dtype)", "images.to(self.decoder.embed.weight.dtype)")),
        only=True,
    ),
    Mistake(
        "images_in_the_last_parameters_dtype",
        "8.9",
        "tower",
        (FIRST, "        first = next(reversed(list(self.vision.parameters())), None)\n"),
        only=True,
    ),
    Mistake(
        "tower_has_parameters",
        ("8.9", "8.3"),
        "StopIteration",
        (FIRST, "        first = next(self.vision.parameters())\n"),
    ),
    Mistake(
        "tokens_not_cast_for_the_projector",
        "8.9",
        "its tokens",
        (CAST, CAST.replace("tokens.to(self.projector.fc1.weight.dtype)", "tokens")),
        only=True,
    ),
    Mistake(
        "tokens_cast_for_the_decoder_alone",
        "8.9",
        "its tokens",
        (CAST, CAST.replace("self.projector.fc1.weight.dtype", "self.decoder.embed.weight.dtype")),
        only=True,
    ),
    Mistake(
        "tokens_not_cast_for_the_decoder",
        "8.9",
        "its tokens",
        (CAST, CAST.replace(".to(self.decoder.embed.weight.dtype)", "")),
        only=True,
    ),
    Mistake(
        "tokens_back_in_the_images_dtype",
        "8.9",
        "inputs_embeds",
        (CAST, CAST.replace("tokens.to(self", "tokens.to(images.dtype).to(self")),
        only=True,
    ),
    Mistake(
        "tokens_through_bfloat16",
        ("8.9", "8.3"),
        "was wanted",
        (CAST, CAST.replace("tokens.to(self", "tokens.bfloat16().to(self")),
    ),
    Mistake(
        "text_in_the_projectors_dtype",
        "8.9",
        "came",
        (CAST, CAST.replace(".to(self.decoder.embed.weight.dtype)", "")),
        (
            "embeds = embeds.masked_scatter(from_image[:, None], tokens)",
            "embeds = embeds.to(tokens.dtype).masked_scatter(from_image[:, None], tokens)",
        ),
        only=True,
    ),
    Mistake(
        "loss_in_bfloat16",
        "8.9",
        "no less than float32",
        (BEFORE, BEFORE.replace(".to(_at_least_float32(logits))", "")),
        only=True,
    ),
    Mistake(
        "loss_rounded_to_bfloat16",
        "8.9",
        "no less than float32",
        (
            LOSS,
            LOSS.replace("clamp(min=1)", "clamp(min=1).to(logits.dtype)").replace(
                "total /", "total.to(logits.dtype) /"
            ),
        ),
        only=True,
    ),
    Mistake(
        "loss_from_bfloat16",
        "8.9",
        "in bfloat16",
        (BEFORE, BEFORE.replace("logits[:, :-1].flatten(0, 1)", "logits[:, :-1].flatten(0, 1).log_softmax(-1)")),
        only=True,
    ),
    Mistake(
        "logits_of_float32",
        "8.9",
        "was wanted",
        (LOGITS, LOGITS + "        logits = logits.to(_at_least_float32(logits))\n"),
        only=True,
    ),
    Mistake(
        "logits_in_the_images_dtype",
        "8.9",
        "was wanted",
        (LOGITS, LOGITS + "        logits = logits if images is None else logits.to(images.dtype)\n"),
    ),
    Mistake(
        "dtype_when_built",
        "8.9",
        "came",
        (INIT, INIT + "        self._dtype = next((p.dtype for p in vision.parameters()), None)\n"),
        (TOWER, "        tokens = self.vision(images if self._dtype is None else images.to(self._dtype))\n"),
        only=True,
    ),
    Mistake(
        "dtype_of_the_first_call",
        "8.9",
        "images are cast to the dtype",
        (
            TOWER,
            (
                '        self._dtype = getattr(self, "_dtype", None if first is None else first.dtype)\n'
                "        tokens = self.vision(images if self._dtype is None else images.to(self._dtype))\n"
            ),
        ),
    ),
    Mistake("projector_cast_for_good", "8.9", "it was in", (CAST, "        self.projector.to(tokens.dtype)\n" + CAST)),
    Mistake(
        "generation_not_cast",
        "8.9",
        "generate",
        (
            MERGE,
            (MERGE + "        embeds = embeds if images is None else embeds.to(images.dtype)\n"),
        ),
        only=True,
    ),
]
