"""Wrong answers to the head (7.1) and its bound (7.2), and what does nothing at all."""

from harness.model.bank import Mistake

SCALE_AT_START = "        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))\n"
BOUND = """        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(self.max_scale))
"""
PROJECT = "        image, text = self.image_proj(image_features), self.text_proj(text_features)  # [N, E]\n"
RETURN = "        return _unit(image), _unit(text), scale.exp()\n"
NORMALIZE = "    return F.normalize(rows, dim=-1)\n"
WIDE = "        (scale,) = _wide(self.logit_scale)\n"


def returns(scale: str) -> tuple[str, str]:
    """Another scale."""
    return RETURN, f"        return _unit(image), _unit(text), {scale}\n"


def unit(rows: str) -> tuple[str, str]:
    """Other rows."""
    return NORMALIZE, f"    return {rows}\n"


MISTAKES = [
    # Nothing at all.
    Mistake(
        "head_of_zeros",
        ("7.1", "7.2", "7.8"),
        "differ",
        (RETURN, "        return 0 * _unit(image), 0 * _unit(text), 0 * scale\n"),
    ),
    Mistake("head_gives_none", ("7.1", "7.2", "7.8"), "NoneType", (RETURN, "        return None\n")),
    Mistake(
        "head_is_the_identity",
        ("7.1", "7.2"),
        "came",
        (RETURN, "        return image_features, text_features, self.logit_scale\n"),
    ),
    # The rows.
    Mistake("rows_not_normalised", ("7.1", "7.8"), "as they are", unit("rows")),
    Mistake("columns_normalised", ("7.1", "7.8"), "columns of length 1", unit("F.normalize(rows, dim=0)")),
    Mistake("normalised_by_the_sum", ("7.1", "7.8"), "sum of absolute", unit("F.normalize(rows, p=1.0, dim=-1)")),
    Mistake(
        "zero_row_nan",
        "7.1",
        "0 / 0 is NaN",
        unit("rows / rows.norm(dim=-1, keepdim=True)"),
    ),
    Mistake(
        "zero_row_with_nan_gradient",
        "7.1",
        "is not finite",
        unit("torch.where(rows.any(-1, keepdim=True), rows / (rows * rows).sum(-1, keepdim=True).sqrt(), rows)"),
    ),
    Mistake(
        "a_large_epsilon",
        "7.1",
        "differ",
        unit("rows / (rows.norm(dim=-1, keepdim=True) + 1e-6)"),
    ),
    Mistake(
        "texts_normalised_only",
        ("7.1", "7.8"),
        "image rows",
        (RETURN, "        return image, _unit(text), scale.exp()\n"),
    ),
    Mistake(
        "features_normalised_before_the_projection",
        ("7.1", "7.8"),
        "came",
        (
            PROJECT,
            "        image, text = self.image_proj(_unit(image_features)), self.text_proj(_unit(text_features))\n",
        ),
        (RETURN, "        return image, text, scale.exp()\n"),
    ),
    Mistake(
        "rows_swapped",
        ("7.1", "7.8"),
        "image rows",
        (RETURN, "        return _unit(text), _unit(image), scale.exp()\n"),
    ),
    Mistake(
        "one_projection_for_both",
        "7.1",
        "text_proj.weight get no gradient",
        (
            PROJECT,
            PROJECT
            + (
                "        if text_features.size(1) == image_features.size(1):\n"
                "            text = self.image_proj(text_features)\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "rows_detached_in_eval",
        "7.1",
        "no gradient",
        (PROJECT, PROJECT + "        if not self.training:\n            image, text = image.detach(), text.detach()\n"),
        only=True,
    ),
    Mistake(
        "rows_detached_beside_frozen_projections",
        "7.1",
        "projections frozen",
        (
            PROJECT,
            PROJECT
            + """        if not self.training and not self.image_proj.weight.requires_grad:
            image, text = image.detach(), text.detach()
""",
        ),
        only=True,
    ),
    Mistake(
        "an_epsilon_beside_the_length",
        "7.1",
        "differ",
        unit("rows / (rows.norm(dim=-1, keepdim=True) + 1e-12)"),
        only=True,
    ),
    Mistake(
        "length_detached",
        "7.1",
        "gradient of image features",
        unit("rows / rows.detach().norm(dim=-1, keepdim=True).clamp(min=1e-12)"),
        only=True,
    ),
    # The scale and the state.
    Mistake("scale_is_the_temperature", ("7.1", "7.2"), "scale", returns("1 / scale.exp()")),
    Mistake("scale_without_exp", ("7.1", "7.2"), "exp(logit_scale)", returns("scale * 1")),
    Mistake(
        "logit_scale_is_1_over_temperature",
        "7.1",
        "log(1 / temperature)",
        (SCALE_AT_START, "        self.logit_scale = nn.Parameter(torch.tensor(1 / temperature))\n"),
        only=True,
    ),
    Mistake(
        "temperature_fixed",
        "7.1",
        "temperature=0.5",
        (SCALE_AT_START, "        self.logit_scale = nn.Parameter(torch.tensor(-math.log(0.07)))\n"),
        only=True,
    ),
    Mistake(
        "logit_scale_of_one_element",
        "7.1",
        "shape (1,)",
        (SCALE_AT_START, "        self.logit_scale = nn.Parameter(torch.tensor([-math.log(temperature)]))\n"),
        (WIDE, "        (scale,) = _wide(self.logit_scale[0])\n"),
        only=True,
    ),
    Mistake(
        "scale_is_a_number",
        ("7.1", "7.2"),
        "no gradient",
        returns("scale.detach().exp()"),
    ),
    Mistake(
        "the_bound_in_the_state",
        "7.1",
        "state_dict",
        (
            "        self.max_scale = max_scale\n",
            '        self.register_buffer("max_scale", torch.tensor(max_scale))\n',
        ),
    ),
    Mistake(
        "projections_with_bias",
        "7.1",
        "bias",
        (
            "        self.image_proj = nn.Linear(image_dim, embed_dim, bias=False)\n",
            "        self.image_proj = nn.Linear(image_dim, embed_dim)\n",
        ),
    ),
    Mistake(
        "scale_halved_in_eval",
        ("7.1", "7.2"),
        "eval",
        returns("scale.exp() if self.training else scale.exp() / 2"),
    ),
    Mistake(
        "weight_kept_from_the_first_call",
        "7.1",
        "after",
        (
            PROJECT,
            PROJECT.replace(
                "self.image_proj(image_features)", "F.linear(image_features, self.kept.to(image_features.dtype))"
            ),
        ),
        (
            BOUND,
            '        if not hasattr(self, "kept"):\n            self.kept = self.image_proj.weight.detach().clone()\n'
            + BOUND,
        ),
    ),
    Mistake(
        "eval_weight_kept",
        "7.1",
        "call",
        (
            PROJECT,
            PROJECT
            + """        if not self.training and not torch.is_grad_enabled():
            kept = self.__dict__.setdefault("_kept", [])
            if not kept or kept[0].dtype != image_features.dtype:
                kept[:] = [self.image_proj.weight.detach().clone()]
            image = F.linear(image_features, kept[0])
""",
        ),
    ),
    Mistake(
        "features_kept",
        "7.1",
        "stay alive",
        (PROJECT, PROJECT + "        self.last = (image.detach(), text.detach())\n"),
        only=True,
    ),
    # The bound.
    Mistake("no_bound", "7.2", "100 was wanted", (BOUND, ""), only=True),
    Mistake(
        "bound_that_sticks",
        "7.2",
        "clamp has the gradient 0",
        (BOUND, ""),
        returns("scale.clamp(max=math.log(self.max_scale)).exp()"),
        only=True,
    ),
    Mistake(
        "exp_before_the_clamp",
        "7.2",
        "clamp has the gradient 0",
        (BOUND, ""),
        returns("scale.exp().clamp(max=self.max_scale)"),
        only=True,
    ),
    Mistake(
        "straight_through_after_exp",
        "7.2",
        "exp overflows",
        (BOUND, ""),
        returns("scale.exp() - (scale.exp() - scale.exp().clamp(max=self.max_scale)).detach()"),
        only=True,
    ),
    Mistake(
        "bound_of_100_always",
        "7.2",
        "max_scale 7",
        (BOUND, BOUND.replace("self.max_scale", "100.0")),
        only=True,
    ),
    Mistake(
        "bound_on_the_logarithm_is_max_scale",
        "7.2",
        "was wanted",
        (BOUND, BOUND.replace("math.log(self.max_scale)", "self.max_scale")),
        only=True,
    ),
    Mistake(
        "bound_below_1_is_1",
        "7.2",
        "max_scale 0.5",
        (BOUND, BOUND.replace("math.log(self.max_scale)", "max(math.log(self.max_scale), 0.0)")),
        only=True,
    ),
    Mistake(
        "bound_written_from_just_below_it",
        "7.2",
        "is within the bound and became",
        (
            BOUND,
            BOUND
            + """            if self.training and self.logit_scale > math.log(self.max_scale) - 1e-3:
                self.logit_scale.fill_(math.log(self.max_scale))
""",
        ),
        only=True,
    ),
    Mistake(
        "bound_in_training_alone",
        "7.2",
        "eval",
        (
            BOUND,
            BOUND.replace("        with torch", "        with torch", 1).replace(
                "self.logit_scale.clamp_(max=math.log(self.max_scale))",
                "self.logit_scale.clamp_(max=math.log(self.max_scale) if self.training else None, min=-1e4)",
            ),
        ),
        only=True,
    ),
    Mistake(
        "bound_only_with_gradients",
        "7.2",
        "was wanted",
        (
            BOUND,
            (
                "        if self.logit_scale.requires_grad and torch.is_grad_enabled():\n"
                "            self.logit_scale.data.clamp_(max=math.log(self.max_scale))\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "scale_kept_above_1_too",
        ("7.2", "7.1"),
        "logit_scale -3",
        (BOUND, BOUND.replace("clamp_(max", "clamp_(min=0.0, max")),
    ),
    Mistake(
        "held_at_half_the_bound",
        "7.2",
        "100 was wanted",
        (
            BOUND,
            BOUND.replace(
                "clamp_(max=math.log(self.max_scale))",
                "masked_fill_(self.logit_scale > math.log(self.max_scale), math.log(self.max_scale / 2))",
            ),
        ),
        only=True,
    ),
    Mistake(
        "bound_a_little_too_low",
        "7.2",
        "100 was wanted",
        (BOUND, BOUND.replace("math.log(self.max_scale)", "math.log(self.max_scale) - 0.2")),
        only=True,
    ),
    Mistake(
        "gradient_turned_round_beyond_the_bound",
        "7.2",
        "was wanted",
        (BOUND, ""),
        returns(
            "(2 * scale.clamp(max=math.log(self.max_scale)) - scale).exp() + "
            "(scale.clamp(max=math.log(self.max_scale)).exp() - (2 * "
            "scale.clamp(max=math.log(self.max_scale)) - scale).exp()).detach()"
        ),
        only=True,
    ),
    Mistake(
        "only_lowering_gradients_pass",
        "7.2",
        "backward(-1)",
        (
            BOUND,
            BOUND
            + """        if self.logit_scale.requires_grad and torch.is_grad_enabled():
            at_bound = float(self.logit_scale) >= math.log(self.max_scale) - 1e-2
            bounded = self.logit_scale * 1.0
            bounded.register_hook(lambda grad: grad.clamp(min=0.0) if at_bound else grad)
        else:
            bounded = self.logit_scale
""",
        ),
        (WIDE, "        (scale,) = _wide(bounded)\n"),
        only=True,
    ),
]
