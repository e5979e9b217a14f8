"""Wrong answers to which layers are adapted (5.2): any of them, and exactly those that match."""

from harness.model.bank import Mistake

WEIGHT = "        return original if self._own_weight else original + self.scaling * self.lora_B @ self.lora_A\n"
# What merging computes; by itself where a mistake changes what a parent reads.
SUM = "(self.original_layer.weight + self.scaling * self.lora_B @ self.lora_A).detach()"
ORIGINAL = "        output = self.original_layer(x)\n"
RETURN = "        return output + self.dropout(x) @ self.lora_A.mT @ self.lora_B.mT * self.scaling\n"
TARGETS = '        self.target_modules = ["q_proj", "v_proj"] if target_modules is None else target_modules\n'
WALK = "    modules = model.named_modules(remove_duplicate=False)\n"
MATCHED = (
    "    matched = {path: layer for path, layer in linears.items() if path in targets "
    'or path.split(".")[-1] in targets}\n'
)
CONDITION = 'if path in targets or path.split(".")[-1] in targets}'
REFUSAL = """    if not matched:
        raise ValueError(f"targets {targets} match none of the model's linear layers, such as {list(linears)[:8]}")
"""
FREEZE = "    model.requires_grad_(False)\n"
ADAPT = "            adapters[layer] = LoRALinear(layer, config.rank, config.alpha, config.dropout)\n"

MISTAKES = [
    # Inputs and biases.
    Mistake("bias_lost", "5.2", "bias", (ORIGINAL, "        output = F.linear(x, self.original_layer.weight)\n")),
    Mistake(
        "bias_added_twice",
        "5.2",
        "bias",
        (RETURN, "        if self.bias is not None:\n            output = output + self.bias\n" + RETURN),
    ),
    Mistake(
        "bias_needed",
        "5.2",
        "unsupported operand",
        (ORIGINAL, "        output = x @ self.original_layer.weight.mT + self.original_layer.bias\n"),
    ),
    Mistake(
        "batches_of_vectors_only",
        "5.2",
        "Dimension out of range",
        ("self.lora_A.mT @ self.lora_B.mT", "self.lora_A.t() @ self.lora_B.t()"),
        ("self.dropout(x) @", "self.dropout(x).flatten(0, -2) @"),
    ),
    Mistake(
        "two_dimensions_only",
        "5.2",
        "must be a matrix",
        (
            RETURN,
            (
                "        return output + torch.mm(torch.mm(self.dropout(x), self.lora_A.mT), "
                "self.lora_B.mT) * self.scaling\n"
            ),
        ),
    ),
    Mistake(
        "view_of_the_input",
        "5.2",
        "view",
        ("self.dropout(x) @", "(self.dropout(x).view(-1, x.size(-1)) @"),
        ("* self.scaling", "* self.scaling).view(output.shape)"),
    ),
    Mistake("dropout_in_place", "5.2", "written to", ("nn.Dropout(dropout)", "nn.Dropout(dropout, inplace=True)")),
    # What matches.
    Mistake("substring_match", "5.2", "adapted too", (CONDITION, "if any(target in path for target in targets)}")),
    Mistake("suffix_match", "5.2", "adapted too", (CONDITION, "if path.endswith(tuple(targets))}"), only=True),
    Mistake(
        "dotted_suffix_match",
        "5.2",
        "adapted too",
        (CONDITION, 'if any(f".{path}".endswith(f".{target}") for target in targets)}'),
        only=True,
    ),
    Mistake(
        "any_part_matches",
        "5.2",
        "adapted too",
        (CONDITION, 'if path in targets or set(path.split(".")) & set(targets)}'),
        only=True,
    ),
    Mistake(
        "prefix_match",
        "5.2",
        "adapted too",
        (CONDITION, 'if path in targets or path.split(".")[-1].startswith(tuple(targets))}'),
        only=True,
    ),
    Mistake(
        "patterns_match",
        "5.2",
        "adapted too",
        (
            CONDITION,
            (
                'if any(re.fullmatch(target.replace("*", ".*"), name) for target in targets '
                'for name in (path, path.split(".")[-1]))}'
            ),
        ),
        ("import time\n", "import re\nimport time\n"),
        only=True,
    ),
    Mistake(
        "case_ignored",
        "5.2",
        "adapted too",
        (CONDITION, 'if path in targets or path.split(".")[-1].lower() in [target.lower() for target in targets]}'),
        only=True,
    ),
    Mistake("last_part_only", "5.2", "match none", ("path in targets or ", "")),
    Mistake("whole_path_only", "5.2", "not adapted", (CONDITION, "if path in targets}")),
    Mistake("direct_children_only", "5.2", "not adapted", (WALK, "    modules = model.named_children()\n")),
    Mistake(
        "every_target_must_match",
        "5.2",
        "idle",
        (
            REFUSAL,
            REFUSAL
            + (
                '    if any(target not in (path, path.split(".")[-1]) for target in targets '
                "for path in list(matched)[:1]) and len(matched) < len(targets):\n"
                '        raise ValueError(f"idle target in {targets}, layers {list(linears)}")\n'
            ),
        ),
    ),
    Mistake(
        "every_layer_with_a_weight",
        "5.2",
        "linear layers alone match",
        (
            "    linears = {path: module for path, module in modules if isinstance(module, nn.Linear)}\n",
            (
                "    linears = {path: module for path, module in modules "
                'if getattr(module, "weight", None) is not None and module.weight.dim() == 2}\n'
            ),
        ),
    ),
    # What is refused.
    Mistake("no_match_accepted", "5.2", "was accepted", (REFUSAL, "")),
    Mistake(
        "error_without_layers",
        "5.2",
        "none of the model's linear layers",
        (
            REFUSAL,
            """    if not matched:
        raise ValueError(f"targets {targets} match nothing")
""",
        ),
        only=True,
    ),
    Mistake(
        "error_without_targets",
        "5.2",
        "lacks",
        (
            REFUSAL,
            """    if not matched:
        raise ValueError(f"nothing matches; there are {list(linears)[:8]}")
""",
        ),
        only=True,
    ),
    Mistake(
        "no_match_is_a_key_error",
        "5.2",
        "ValueError was wanted",
        ('raise ValueError(f"targets', 'raise KeyError(f"targets'),
    ),
    Mistake(
        "no_match_is_a_warning",
        "5.2",
        "was accepted",
        (
            REFUSAL,
            """    if not matched:
        print(f"no match for {targets}")
        return model
""",
        ),
    ),
    Mistake(
        "first_layer_named_without_any",
        "5.2",
        "ValueError was wanted",
        ("list(linears)[:8]", "next(iter(linears))"),
        only=True,
    ),
    # What comes back, and layers under several names.
    Mistake(
        "a_copy_is_adapted",
        "5.2",
        "not adapted",
        (
            FREEZE,
            """    model = copy.deepcopy(model)
    matched = {path: model.get_submodule(path) for path in matched}
"""
            + FREEZE,
        ),
        ("import time\n", "import copy\nimport time\n"),
    ),
    Mistake("model_not_returned", "5.2", "NoneType", ("    return model\n", "    return None\n")),
    Mistake(
        "tied_layer_missed", "5.2", "matches a target and is not adapted", ("remove_duplicate=False", ""), only=True
    ),
    Mistake(
        "tied_layer_gets_two_adapters",
        "5.2",
        "registered",
        ("        if layer not in adapters:\n", "        if True:\n"),
    ),
    # The config.
    Mistake(
        "config_alpha_lost",
        "5.2",
        "LoRAConfig(rank=2, alpha=3.5)",
        ("config.rank, config.alpha, config.dropout", "config.rank, dropout=config.dropout"),
    ),
    Mistake(
        "config_rank_lost",
        "5.2",
        "shape (4, 11) came",
        ("config.rank, config.alpha, config.dropout", "alpha=config.alpha, dropout=config.dropout"),
    ),
    Mistake(
        "shared_default_list",
        "5.2",
        "after another config's list had grown",
        (TARGETS, "        self.target_modules = DEFAULTS if target_modules is None else target_modules\n"),
        (
            "class LoRAConfig:\n",
            """DEFAULTS = ["q_proj", "v_proj"]


class LoRAConfig:
""",
        ),
        only=True,
    ),
    Mistake(
        "all_projections_by_default",
        "5.2",
        "target_modules",
        (TARGETS, TARGETS.replace('["q_proj", "v_proj"]', '["q_proj", "k_proj", "v_proj"]')),
        only=True,
    ),
    Mistake(
        "config_alpha_1_by_default",
        "5.2",
        "LoRAConfig().alpha",
        ("alpha: float = 8.0", "alpha: float = 1.0"),
        only=True,
    ),
    Mistake(
        "config_dropout_0_by_default",
        "5.2",
        "LoRAConfig().dropout",
        ("dropout: float = 0.1\n", "dropout: float = 0.0\n"),
        only=True,
    ),
    Mistake(
        "config_keeps_the_default_targets",
        "5.2",
        "adapted",
        (TARGETS, '        self.target_modules = ["q_proj", "v_proj"]\n'),
    ),
    # Layers that are read as bare weights.
    Mistake(
        "bare_weight_is_the_originals",
        "5.2",
        "the adapter is ignored",
        ("self.weight.detach()", SUM),
        (WEIGHT, "        return original\n"),
        only=True,
    ),
    Mistake(
        "bare_weight_without_gradient",
        "5.2",
        "no gradient",
        ("self.weight.detach()", SUM),
        (WEIGHT, WEIGHT.replace("self.lora_B @ self.lora_A", "(self.lora_B @ self.lora_A).detach()")),
        only=True,
    ),
    Mistake(
        "bare_weight_without_scaling",
        "5.2",
        "with an adapted out_proj",
        ("self.weight.detach()", SUM),
        (WEIGHT, WEIGHT.replace("self.scaling * ", "")),
        only=True,
    ),
    Mistake(
        "bare_weight_works_in_eval_only",
        "5.2",
        "in training; in eval it counts",
        ("self.weight.detach()", SUM),
        (
            WEIGHT,
            (
                "        return original if self._own_weight or self.training "
                "else original + self.scaling * self.lora_B @ self.lora_A\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "bare_bias_missing",
        "5.2",
        "give what a parent reads",
        (
            '''
    @property
    def bias(self) -> Tensor | None:
        """The original's bias, for the same parents."""
        return self.original_layer.bias
''',
            "",
        ),
    ),
    Mistake(
        "bare_weight_missing",
        "5.2",
        "give what a parent reads",
        ("self.weight.detach()", SUM),
        (
            """    @property
    def weight(self)""",
            """    @property
    def effective_weight(self)""",
        ),
        only=True,
    ),
    Mistake(
        "prebuilt_attention_is_skipped",
        "5.2",
        "is not adapted",
        (
            MATCHED,
            MATCHED + "    matched = {path: layer for path, layer in matched.items() if type(layer) is nn.Linear}\n",
        ),
        only=True,
    ),
    Mistake(
        "out_proj_refused_by_name",
        "5.2",
        "out_proj is read",
        (
            FREEZE,
            """    if any(path.endswith("out_proj") for path in matched):
        raise TypeError("out_proj is read as a bare weight")
"""
            + FREEZE,
        ),
        only=True,
    ),
    Mistake(
        "refused_beside_prebuilt_attention",
        "5.2",
        "reads bare weights",
        (
            FREEZE,
            """    if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        raise TypeError('nn.MultiheadAttention reads bare weights')
"""
            + FREEZE,
        ),
        only=True,
    ),
    # More on all of these.
    Mistake(
        "an_empty_list_is_the_default",
        "5.2",
        "targets []: was accepted",
        ("target_modules is None else", "not target_modules else"),
        only=True,
    ),
    Mistake(
        "one_config_for_all",
        "5.2",
        "once another config was made",
        (TARGETS, TARGETS.replace("self.", "LoRAConfig.")),
        only=True,
    ),
    Mistake(
        "config_alpha_cut_to_an_integer",
        "5.2",
        "LoRAConfig(rank=2, alpha=3.5)",
        ("config.alpha", "int(config.alpha)"),
        only=True,
    ),
    Mistake(
        "absent_children_are_walked",
        "5.2",
        "NoneType",
        (WALK, '    modules = _walk(model, "")\n'),
        (
            "def lora_state_dict",
            """def _walk(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    found = []
    for name, child in module._modules.items():
        found += [(prefix + name, child), *_walk(child, f"{prefix}{name}.")]
    return found


def lora_state_dict""",
        ),
        only=True,
    ),
    Mistake(
        "layers_of_one_shape_share_a",
        "5.2",
        "share A or B",
        (
            """        model.set_submodule(path, adapters[layer])
    return model
""",
            """    first: dict[tuple[int, ...], nn.Parameter] = {}
    for adapter in adapters.values():
        adapter.lora_A = first.setdefault(tuple(adapter.lora_A.shape), adapter.lora_A)
    return model
""",
        ),
        (ADAPT, ADAPT + "        model.set_submodule(path, adapters[layer])\n"),
    ),
    Mistake(
        "targets_used_up",
        "5.2",
        "changes config.target_modules",
        (REFUSAL, REFUSAL + "    targets.clear()\n"),
        only=True,
    ),
    Mistake(
        "torchs_own_linear_layers_alone",
        "5.2",
        "is not adapted",
        (
            "isinstance(module, nn.Linear)",
            'isinstance(module, nn.Linear) and type(module).__module__.startswith("torch")',
        ),
        only=True,
    ),
    Mistake(
        "bare_weight_refused_once",
        "5.2",
        "in place of calling the layer",
        ("self.weight.detach()", SUM),
        (
            WEIGHT,
            """        if not self._own_weight and not self.__dict__.get("_refused"):
            self.__dict__["_refused"] = True
            raise TypeError("call this layer, do not read its weight")
        return original
""",
        ),
        only=True,
    ),
]
