"""Wrong answers to the two stages (8.6)."""

from harness.model.bank import Mistake

REFUSE = """        if stage not in (1, 2):
            raise ValueError(f"stage {stage} is neither 1 nor 2")
"""
PARTS = "        for part, trains in ((self.vision, False), (self.projector, True), (self.decoder, stage == 2)):\n"
FREEZE = "            part.requires_grad_(trains)\n"
LET_GO = """            if not trains:
                part.zero_grad()
"""
STAGED = """        self._staged = True
        self.vision.eval()
"""
TRAIN = """        super().train(mode)
        if self._staged:
            self.vision.eval()
        return self
"""
DECODE = (
    "        logits, _ = self.decoder(merged.inputs_embeds, merged.attention_mask, merged.position_ids)  # [B, S, V]\n"
)
INIT = "        self._staged = False\n"
TOWER = "        tokens = self.vision(images if first is None else images.to(first.dtype))  # [M, T, vision_dim]\n"

MISTAKES = [
    Mistake("stages_do_nothing", "8.6", "set_stage", (PARTS + FREEZE + LET_GO + STAGED, ""), only=True),
    Mistake("decoder_trains_in_stage_1", "8.6", "decoder.", (PARTS, PARTS.replace("stage == 2", "True")), only=True),
    Mistake(
        "tower_trains", "8.6", "vision.", (PARTS, PARTS.replace("self.vision, False", "self.vision, True")), only=True
    ),
    Mistake(
        "tower_trains_in_stage_2",
        "8.6",
        "vision.",
        (PARTS, PARTS.replace("self.vision, False", "self.vision, stage == 2")),
        only=True,
    ),
    Mistake(
        "projector_without_gradient",
        "8.6",
        "projector.",
        (PARTS, PARTS.replace("self.projector, True", "self.projector, stage == 2")),
        only=True,
    ),
    Mistake(
        "projector_frozen_in_stage_2",
        "8.6",
        "projector.",
        (PARTS, PARTS.replace("self.projector, True", "self.projector, stage == 1")),
        only=True,
    ),
    Mistake(
        "decoder_never_thawed",
        "8.6",
        "decoder.",
        (FREEZE, "            if not trains:\n                part.requires_grad_(False)\n"),
        only=True,
    ),
    Mistake("old_gradients_stay", "8.6", "old gradient", (LET_GO, ""), only=True),
    Mistake(
        "old_gradients_of_zero",
        "8.6",
        "old gradient",
        (LET_GO, LET_GO.replace("zero_grad()", "zero_grad(set_to_none=False)")),
        only=True,
    ),
    Mistake(
        "old_gradients_of_the_tower_alone",
        "8.6",
        "old gradient",
        (LET_GO, "            if not trains and part is self.vision:\n                part.zero_grad()\n"),
        only=True,
    ),
    Mistake(
        "decoder_in_no_grad",
        "8.6",
        "the loss carries no gradient",
        (
            DECODE,
            (
                "        with torch.set_grad_enabled(torch.is_grad_enabled() and "
                "next(self.decoder.parameters()).requires_grad):\n"
                "    "
            )
            + DECODE,
        ),
        only=True,
    ),
    Mistake(
        "decoder_sees_detached_tokens",
        "8.6",
        "no gradient",
        (
            DECODE,
            DECODE.replace(
                "merged.inputs_embeds,",
                (
                    "merged.inputs_embeds.detach() if self._staged and not "
                    "self.decoder.embed.weight.requires_grad else merged.inputs_embeds,"
                ),
            ),
        ),
        only=True,
    ),
    Mistake(
        "train_wakes_the_tower", "8.6", "stays in eval", (TRAIN, "        return super().train(mode)\n"), only=True
    ),
    Mistake("tower_awake_until_train", "8.6", "in training", (STAGED, "        self._staged = True\n"), only=True),
    Mistake(
        "tower_asleep_from_the_start", "8.6", "before any stage", (INIT, "        self._staged = True\n"), only=True
    ),
    Mistake(
        "tower_frozen_from_the_start",
        ("8.6", "8.3", "8.4"),
        "before any stage",
        (INIT, INIT + "        vision.requires_grad_(False)\n"),
    ),
    Mistake(
        "only_the_flag_of_the_tower",
        "8.6",
        "or a part of it",
        (TRAIN, TRAIN.replace("self.vision.eval()", "self.vision.training = False")),
        only=True,
    ),
    Mistake(
        "train_returns_nothing",
        "8.6",
        "returns the module",
        (TRAIN, TRAIN.replace("        return self\n", "        return None  # type: ignore[return-value]\n")),
    ),
    Mistake("all_in_eval", "8.6", "mode", (STAGED, STAGED.replace("self.vision.eval()", "self.eval()")), only=True),
    Mistake("all_in_train", "8.6", "mode", (STAGED, STAGED.replace("self.vision.eval()", "self.train()")), only=True),
    Mistake(
        "train_always_trains",
        "8.6",
        "does not follow",
        (TRAIN, TRAIN.replace("train(mode)", "train(mode or self._staged)")),
        only=True,
    ),
    Mistake(
        "decoder_asleep_in_stage_2",
        "8.6",
        "the decoder",
        (
            TRAIN,
            TRAIN.replace(
                "            self.vision.eval()\n", "            self.vision.eval()\n            self.decoder.eval()\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "projector_asleep",
        "8.6",
        "the projector",
        (
            TRAIN,
            TRAIN.replace(
                "            self.vision.eval()\n",
                "            self.vision.eval()\n            self.projector.eval()\n",
            ),
        ),
        only=True,
    ),
    Mistake("other_stages_are_2", "8.6", "was accepted", (REFUSE, ""), only=True),
    Mistake("stage_0_accepted", "8.6", "set_stage(0)", ("stage not in (1, 2)", "stage not in (0, 1, 2)"), only=True),
    Mistake("stage_3_accepted", "8.6", "set_stage(3)", ("stage not in (1, 2)", "stage < 1"), only=True),
    Mistake(
        "negative_stages_accepted",
        "8.6",
        "set_stage(-1)",
        ("stage not in (1, 2)", "stage not in (-1, 1, 2)"),
        only=True,
    ),
    Mistake(
        "stage_refused_too_late", "8.6", "refused, but", (REFUSE + PARTS, PARTS), (STAGED, STAGED + REFUSE), only=True
    ),
    Mistake(
        "stage_of_the_class",
        "8.6",
        "stage",
        ("        self._staged = True\n", "        type(self)._staged = True\n"),
        (INIT, ""),
        ("    def _image_tokens(", "    _staged = False\n\n    def _image_tokens("),
        only=True,
    ),
    Mistake(
        "direct_parameters_alone",
        "8.6",
        "requires_grad True came",
        (
            FREEZE,
            (
                "            for parameter in part.parameters(recurse=part is not self.decoder):\n"
                "                parameter.requires_grad_(trains)\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "embedding_trains_in_stage_1",
        "8.6",
        "decoder.embed",
        (STAGED, "        self.decoder.embed.requires_grad_(True)\n" + STAGED),
        only=True,
    ),
    Mistake(
        "head_frozen_in_stage_2",
        "8.6",
        "decoder.head",
        (STAGED, "        self.decoder.head.requires_grad_(False)\n" + STAGED),
        only=True,
    ),
    Mistake(
        "stage_2_once_only",
        "8.6",
        "decoder.",
        (
            PARTS,
            '        self._last = max(stage, getattr(self, "_last", 0))\n'
            + PARTS.replace("stage == 2", "self._last == 2"),
        ),
        only=True,
    ),
    Mistake(
        "generate_wakes_the_tower",
        "8.7",
        "mode of a module",
        (
            "        running = torch.ones_like(mask[:, 0])  # [B]\n",
            "        running = torch.ones_like(mask[:, 0])  # [B]\n        nn.Module.train(self, self.training)\n",
        ),
    ),
    Mistake(
        "biases_frozen",
        "8.6",
        "bias",
        (
            STAGED,
            (
                "        for name, parameter in self.named_parameters():\n"
                '            if name.startswith("decoder") and name.endswith("bias"):\n'
                "                parameter.requires_grad = False\n"
            )
            + STAGED,
        ),
        only=True,
    ),
    Mistake(
        "mixed_modes_undone",
        "8.6",
        "the projector's mode has changed",
        (STAGED, STAGED.replace("self.vision.eval()", "self.train(self.training)")),
    ),
    Mistake(
        "old_gradients_of_what_was_frozen_by_hand",
        "8.6",
        "old gradient",
        (
            PARTS + FREEZE + LET_GO,
            PARTS
            + """            for parameter in part.parameters():
                if parameter.requires_grad != trains:
                    parameter.requires_grad_(trains)
                    parameter.grad = None
""",
        ),
    ),
]
