"""Wrong answers to ex05 that its checks must catch."""

from harness.model.bank import Mistake as _New


def Mistake(name, caught_by, edits, says, only=False):  # type: ignore
    return _New(name, caught_by, says, *edits, only=only)


SCALING = "        self.scaling = alpha / rank\n"
A = "        self.lora_A = nn.Parameter(start * weight.size(1) ** -0.5)  # [rank, in]\n"
B = "        self.lora_B = nn.Parameter(weight.new_zeros(weight.size(0), rank))  # [out, rank]\n"
START = "        start = torch.randn(rank, weight.size(1), dtype=weight.dtype, device=weight.device)\n"
DROPOUT = "        self.dropout = nn.Dropout(dropout)\n"
KEPT = "        self._own_weight: list[Tensor] = []\n"
MODE = "        self.train(original_layer.training)\n"
WEIGHT = "        return original if self._own_weight else original + self.scaling * self.lora_B @ self.lora_A\n"
BIAS = '''
    @property
    def bias(self) -> Tensor | None:
        """The original's bias, for the same parents."""
        return self.original_layer.bias
'''
ORIGINAL = "        output = self.original_layer(x)\n"
IF_MERGED = "        if self._own_weight:\n            return output\n"
RETURN = "        return output + self.dropout(x) @ self.lora_A.mT @ self.lora_B.mT * self.scaling\n"
MERGE = """        if not self._own_weight:
            merged = nn.Parameter(self.weight.detach(), requires_grad=False)
            self._own_weight.append(self.original_layer.weight)
            self.original_layer.weight = merged
"""
MERGED = "            merged = nn.Parameter(self.weight.detach(), requires_grad=False)\n"
KEEP = "            self._own_weight.append(self.original_layer.weight)\n"
RESTORE = "            self.original_layer.weight = self._own_weight.pop()\n"
UNMERGE = "        if self._own_weight:\n" + RESTORE
TARGETS = '        self.target_modules = ["q_proj", "v_proj"] if target_modules is None else target_modules\n'
RANK = '    if config.rank < 1:\n        raise ValueError(f"rank {config.rank} is below 1")\n'
WALK = "    modules = model.named_modules(remove_duplicate=False)\n"
LINEARS = "    linears = {path: module for path, module in modules if isinstance(module, nn.Linear)}\n"
MATCHED = '    matched = {path: layer for path, layer in linears.items() if path in targets or path.split(".")[-1] in targets}\n'
CONDITION = 'if path in targets or path.split(".")[-1] in targets}'
REFUSAL = """    if not matched:
        raise ValueError(f"targets {targets} match none of the model's linear layers, such as {list(linears)[:8]}")
"""
FREEZE = "    model.requires_grad_(False)\n"
ONCE = "        if layer not in adapters:\n"
ADAPT = "            adapters[layer] = LoRALinear(layer, config.rank, config.alpha, config.dropout)\n"
PUT = "        model.set_submodule(path, adapters[layer])\n    return model\n"
SAVE = (
    "    return {key: value.clone() for key, value in model.state_dict().items() "
    'if key.endswith(("lora_A", "lora_B"))}\n'
)
PARAMETERS = "    parameters = list(model.parameters())\n"
COUNT = "    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)\n"
RUNS = '    return {"full": _train(SimpleTransformer(), steps), "lora": _train(lora, steps)}\n'
ADAMW = "    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)\n"
LOOP = "    for _ in range(steps):\n        optimizer.zero_grad()\n"
STEP = "        optimizer.step()\n"
STATE = "    state = [value for values in optimizer.state.values() for value in values.values()]\n"
GRADIENTS = "    gradients = [p.grad for p in model.parameters() if p.grad is not None]\n"
TRAINED = '        "trainable_parameters": count_parameters(model)[1],\n'
OPTIMIZER_BYTES = '        "optimizer_bytes": sum(value.nbytes for value in state),\n'
GRADIENT_BYTES = '        "gradient_bytes": sum(gradient.nbytes for gradient in gradients),\n'
SECONDS = '        "seconds_per_step": seconds / steps,\n'
OWN_TEST = "    torch.manual_seed(0)\n    x = torch.randn(5, 7)\n"
DENSE = "        return F.linear(x, self.original_layer.weight + self.scaling * self.lora_B @ self.lora_A, self.bias)\n"
# Unmerged, with the weight written into: what most people write first.
IN_PLACE = """        if not self._own_weight:
            self._own_weight.append(self.original_layer.weight.detach().clone())
            self.original_layer.weight.data += self.scaling * (self.lora_B @ self.lora_A).detach()
"""
RESTORE_IN_PLACE = "            self.original_layer.weight.data.copy_(self._own_weight.pop())\n"


def weight(text: str) -> list[tuple[str, str]]:
    """The edit that makes `text` what a parent reads, without touching what merging computes."""
    merged = MERGED.replace(
        "self.weight.detach()", "(self.original_layer.weight + self.scaling * self.lora_B @ self.lora_A).detach()"
    )
    return [(MERGED, merged), (WEIGHT, text)]


MISTAKES = [
    # Nothing at all.
    Mistake(
        "zeros",
        ("5.1", "5.2", "5.4", "5.5"),
        [
            (RETURN, "        return torch.zeros_like(output)\n"),
            (IF_MERGED, "        if self._own_weight:\n            return torch.zeros_like(output)\n"),
        ],
        says="differ",
    ),
    Mistake("identity", ("5.1", "5.2"), [(RETURN, "        return x\n")], says="forward([[4, 1]])"),
    Mistake("none", ("5.1", "5.2"), [(RETURN, "        return None\n")], says="None came"),
    Mistake("adapter_ignored", "5.1", [(RETURN, "        return output\n")], says="forward([[4, 1]])"),
    # 5.1
    Mistake("original_ignored", "5.1", [(RETURN, RETURN.replace("output + ", ""))], says="forward([[4, 1]])"),
    Mistake("no_scaling", "5.1", [(RETURN, RETURN.replace(" * self.scaling", ""))], says="forward([[4, 1]])"),
    Mistake("scaled_by_alpha", "5.1", [(SCALING, "        self.scaling = alpha\n")], says="forward([[4, 1]])"),
    Mistake("integer_scaling", "5.1", [(SCALING, "        self.scaling = alpha // rank\n")], says="forward([[4, 1]])"),
    Mistake(
        "scaled_for_floats_only",
        "5.1",
        [(SCALING, "        self.scaling = alpha / rank if isinstance(alpha, float) else 1.0\n")],
        says="0.75 was wanted",
    ),
    Mistake(
        "ranks_above_4_are_cut",
        "5.1",
        [(RETURN, RETURN.replace("self.lora_A.mT @ self.lora_B.mT", "self.lora_A[:4].mT @ self.lora_B[:, :4].mT"))],
        says="rank 16",
    ),
    Mistake(
        "both_random",
        "5.1",
        [(B, B.replace("weight.new_zeros(weight.size(0), rank)", "torch.randn_like(weight[:, :1].expand(-1, rank))"))],
        says="forward of a new adapter",
        only=True,
    ),
    Mistake(
        "small_random_b",
        "5.1",
        [
            (
                B,
                B.replace(
                    "weight.new_zeros(weight.size(0), rank)", "1e-6 * torch.randn_like(weight[:, :1].expand(-1, rank))"
                ),
            )
        ],
        says="forward of a new adapter",
        only=True,
    ),
    Mistake("both_zero", "5.1", [(A, A.replace("start * ", "start * 0 * "))], says="all zeros"),
    Mistake(
        "a_zero_and_b_random",
        "5.1",
        [(A, A.replace("start * ", "start * 0 * ")), (B, B.replace("new_zeros", "new_ones"))],
        says="lora_B of a new adapter",
    ),
    Mistake("a_all_alike", "5.1", [(START, START.replace("randn", "ones"))], says="lora_A of", only=True),
    Mistake(
        "shapes_transposed",
        "5.1",
        [
            (A, A.replace("start * weight.size(1) ** -0.5", "start.mT.clone()")),
            (B, B.replace("weight.size(0), rank", "rank, weight.size(0)")),
            (RETURN, RETURN.replace(".mT", "")),
            (WEIGHT, WEIGHT.replace("self.lora_B @ self.lora_A", "(self.lora_A @ self.lora_B).mT")),
        ],
        says="was wanted",
    ),
    Mistake(
        "x_detached",
        "5.1",
        [(RETURN, RETURN.replace("self.dropout(x)", "self.dropout(x.detach())"))],
        says="gradient of x",
        only=True,
    ),
    Mistake(
        "output_of_the_original_detached",
        "5.1",
        [(RETURN, RETURN.replace("output + ", "output.detach() + "))],
        says="gradient of x",
        only=True,
    ),
    Mistake(
        "a_detached",
        "5.1",
        [(RETURN, RETURN.replace("self.lora_A.mT", "self.lora_A.detach().mT"))],
        says="gradient of lora_A",
    ),
    Mistake(
        "no_gradients_in_eval",
        "5.1",
        [(ORIGINAL, "        torch.set_grad_enabled(self.training and torch.is_grad_enabled())\n" + ORIGINAL)],
        says="no gradient",
    ),
    Mistake(
        "stale_product_in_eval",
        "5.1",
        [
            (
                ORIGINAL,
                '        if not self.training and not self._own_weight and not torch.is_grad_enabled():\n            self.__dict__.setdefault("_a", self.lora_A.detach().clone())\n            return self.original_layer(x) + x @ self.__dict__["_a"].mT @ self.lora_B.mT * self.scaling\n'
                + ORIGINAL,
            )
        ],
        says="something is kept from before",
    ),
    Mistake(
        "copy_of_w",
        "5.1",
        [
            (MODE, MODE + "        self._w = [original_layer.weight.detach().double().clone()]\n"),
            (ORIGINAL, "        output = F.linear(x, self._w[0].to(x), self.original_layer.bias)\n"),
        ],
        says="forward([[4, 1]])",
    ),
    Mistake(
        "default_rank_8",
        "5.1",
        [("original_layer: nn.Linear, rank: int = 4,", "original_layer: nn.Linear, rank: int = 8,")],
        says="shape (8, 11) came",
    ),
    Mistake(
        "default_alpha_16",
        "5.1",
        [("rank: int = 4, alpha: float = 1.0", "rank: int = 4, alpha: float = 16.0")],
        says="LoRALinear(layer)(x)",
        only=True,
    ),
    Mistake(
        "rank_0_accepted",
        "5.1",
        [(RANK, ""), (SCALING, "        rank = max(rank, 1)\n" + SCALING)],
        says="was accepted",
        only=True,
    ),
    Mistake(
        "rank_0_alone_is_refused",
        "5.1",
        [(RANK, RANK.replace("< 1", "== 0")), (SCALING, "        rank = max(rank, 1)\n" + SCALING)],
        says="rank -3",
        only=True,
    ),
    Mistake("rank_divides_by_zero", "5.1", [(RANK, "")], says="ValueError was wanted", only=True),
    Mistake(
        "rank_at_most_in_and_out",
        "5.1",
        [
            (SCALING, SCALING + "        used = min(rank, *original_layer.weight.shape)\n"),
            (MODE, MODE + "        self.used = used\n"),
            (
                RETURN,
                RETURN.replace(
                    "self.lora_A.mT @ self.lora_B.mT", "self.lora_A[: self.used].mT @ self.lora_B.mT[: self.used]"
                ),
            ),
        ],
        says="rank 29",
        only=True,
    ),
    Mistake(
        "alpha_0_is_1", "5.1", [(SCALING, "        self.scaling = (alpha or 1.0) / rank\n")], says="alpha 0", only=True
    ),
    Mistake(
        "a_the_same_everywhere",
        "5.1",
        [(START, START.replace("torch.randn(", "torch.eye("))],
        says="the same numbers",
        only=True,
    ),
    Mistake(
        "copy_of_the_bias",
        "5.1",
        [
            (MODE, MODE + "        self._b = [t.detach().clone() for t in [original_layer.bias] if t is not None]\n"),
            (
                ORIGINAL,
                "        bias = self._b[0].to(x) if self._b else None\n        output = F.linear(x, self.original_layer.weight, bias)\n",
            ),
        ],
        says="original_layer.bias has changed",
    ),
    Mistake(
        "the_layer_is_copied",
        ("5.1", "5.4"),
        [
            (
                "        self.original_layer = original_layer\n",
                "        self.original_layer = copy.deepcopy(original_layer)\n",
            ),
            ("import time\n", "import copy\nimport time\n"),
        ],
        says="not the layer that was given",
    ),
    # 5.2
    Mistake(
        "bias_lost", "5.2", [(ORIGINAL, "        output = F.linear(x, self.original_layer.weight)\n")], says="bias"
    ),
    Mistake(
        "bias_added_twice",
        "5.2",
        [(RETURN, "        if self.bias is not None:\n            output = output + self.bias\n" + RETURN)],
        says="bias",
    ),
    Mistake(
        "bias_needed",
        "5.2",
        [(ORIGINAL, "        output = x @ self.original_layer.weight.mT + self.original_layer.bias\n")],
        says="unsupported operand",
    ),
    Mistake(
        "batches_of_vectors_only",
        "5.2",
        [
            (
                RETURN,
                RETURN.replace("self.lora_A.mT @ self.lora_B.mT", "self.lora_A.t() @ self.lora_B.t()").replace(
                    "self.dropout(x) @", "self.dropout(x).flatten(0, -2) @"
                ),
            )
        ],
        says="Dimension out of range",
    ),
    Mistake(
        "two_dimensions_only",
        "5.2",
        [
            (
                RETURN,
                "        return output + torch.mm(torch.mm(self.dropout(x), self.lora_A.mT), self.lora_B.mT) * self.scaling\n",
            )
        ],
        says="must be a matrix",
    ),
    Mistake(
        "view_of_the_input",
        "5.2",
        [
            (
                RETURN,
                RETURN.replace("self.dropout(x) @", "self.dropout(x).view(-1, x.size(-1)) @")
                .replace("* self.scaling", "* self.scaling")
                .replace("output + self.dropout", "output + (self.dropout")
                .replace("* self.scaling", "* self.scaling).view(output.shape)"),
            )
        ],
        says="view",
    ),
    Mistake(
        "dropout_in_place",
        "5.2",
        [(DROPOUT, DROPOUT.replace("(dropout)", "(dropout, inplace=True)"))],
        says="written to",
    ),
    Mistake(
        "substring_match",
        "5.2",
        [(MATCHED, MATCHED.replace(CONDITION, "if any(target in path for target in targets)}"))],
        says="adapted too",
    ),
    Mistake(
        "suffix_match",
        "5.2",
        [(MATCHED, MATCHED.replace(CONDITION, "if path.endswith(tuple(targets))}"))],
        says="adapted too",
        only=True,
    ),
    Mistake(
        "dotted_suffix_match",
        "5.2",
        [(MATCHED, MATCHED.replace(CONDITION, 'if any(f".{path}".endswith(f".{target}") for target in targets)}'))],
        says="adapted too",
        only=True,
    ),
    Mistake(
        "any_part_matches",
        "5.2",
        [(MATCHED, MATCHED.replace(CONDITION, 'if path in targets or set(path.split(".")) & set(targets)}'))],
        says="adapted too",
        only=True,
    ),
    Mistake(
        "prefix_match",
        "5.2",
        [
            (
                MATCHED,
                MATCHED.replace(CONDITION, 'if path in targets or path.split(".")[-1].startswith(tuple(targets))}'),
            )
        ],
        says="adapted too",
        only=True,
    ),
    Mistake(
        "patterns_match",
        "5.2",
        [
            (
                MATCHED,
                MATCHED.replace(
                    CONDITION,
                    'if any(re.fullmatch(target.replace("*", ".*"), name) for target in targets for name in (path, path.split(".")[-1]))}',
                ),
            ),
            ("import time\n", "import re\nimport time\n"),
        ],
        says="adapted too",
        only=True,
    ),
    Mistake(
        "case_ignored",
        "5.2",
        [
            (
                MATCHED,
                MATCHED.replace(
                    CONDITION,
                    'if path in targets or path.split(".")[-1].lower() in [target.lower() for target in targets]}',
                ),
            )
        ],
        says="adapted too",
        only=True,
    ),
    Mistake("last_part_only", "5.2", [(MATCHED, MATCHED.replace("path in targets or ", ""))], says="match none"),
    Mistake(
        "whole_path_only", "5.2", [(MATCHED, MATCHED.replace(CONDITION, "if path in targets}"))], says="not adapted"
    ),
    Mistake("direct_children_only", "5.2", [(WALK, "    modules = model.named_children()\n")], says="not adapted"),
    Mistake(
        "every_target_must_match",
        "5.2",
        [
            (
                REFUSAL,
                REFUSAL
                + '    if any(target not in (path, path.split(".")[-1]) for target in targets for path in list(matched)[:1]) and len(matched) < len(targets):\n        raise ValueError(f"idle target in {targets}, layers {list(linears)}")\n',
            )
        ],
        says="idle",
    ),
    Mistake(
        "every_layer_with_a_weight",
        "5.2",
        [
            (
                LINEARS,
                '    linears = {path: module for path, module in modules if getattr(module, "weight", None) is not None and module.weight.dim() == 2}\n',
            )
        ],
        says="linear layers alone match",
    ),
    Mistake("no_match_accepted", "5.2", [(REFUSAL, "")], says="was accepted"),
    Mistake(
        "error_without_layers",
        "5.2",
        [(REFUSAL, '    if not matched:\n        raise ValueError(f"targets {targets} match nothing")\n')],
        says="none of the model's linear layers",
        only=True,
    ),
    Mistake(
        "error_without_targets",
        "5.2",
        [
            (
                REFUSAL,
                '    if not matched:\n        raise ValueError(f"nothing matches; there are {list(linears)[:8]}")\n',
            )
        ],
        says="lacks",
        only=True,
    ),
    Mistake(
        "no_match_is_a_key_error",
        "5.2",
        [(REFUSAL, REFUSAL.replace("ValueError", "KeyError"))],
        says="ValueError was wanted",
    ),
    Mistake(
        "no_match_is_a_warning",
        "5.2",
        [(REFUSAL, '    if not matched:\n        print(f"no match for {targets}")\n        return model\n')],
        says="was accepted",
    ),
    Mistake(
        "first_layer_named_without_any",
        "5.2",
        [(REFUSAL, REFUSAL.replace("list(linears)[:8]", "next(iter(linears))"))],
        says="ValueError was wanted",
        only=True,
    ),
    Mistake(
        "a_copy_is_adapted",
        "5.2",
        [
            (
                FREEZE,
                "    model = copy.deepcopy(model)\n    matched = {path: model.get_submodule(path) for path in matched}\n"
                + FREEZE,
            ),
            ("import time\n", "import copy\nimport time\n"),
        ],
        says="not adapted",
    ),
    Mistake(
        "model_not_returned", "5.2", [(PUT, PUT.replace("    return model\n", "    return None\n"))], says="NoneType"
    ),
    Mistake(
        "tied_layer_missed",
        "5.2",
        [(WALK, WALK.replace("remove_duplicate=False", ""))],
        says="matches a target and is not adapted",
        only=True,
    ),
    Mistake("tied_layer_gets_two_adapters", "5.2", [(ONCE, "        if True:\n")], says="registered"),
    Mistake(
        "config_alpha_lost",
        "5.2",
        [(ADAPT, ADAPT.replace("config.rank, config.alpha, config.dropout", "config.rank, dropout=config.dropout"))],
        says="LoRAConfig(rank=2, alpha=3.5)",
    ),
    Mistake(
        "config_rank_lost",
        "5.2",
        [
            (
                ADAPT,
                ADAPT.replace(
                    "config.rank, config.alpha, config.dropout", "alpha=config.alpha, dropout=config.dropout"
                ),
            )
        ],
        says="shape (4, 11) came",
    ),
    Mistake(
        "shared_default_list",
        "5.2",
        [
            (TARGETS, "        self.target_modules = DEFAULTS if target_modules is None else target_modules\n"),
            ("class LoRAConfig:\n", 'DEFAULTS = ["q_proj", "v_proj"]\n\n\nclass LoRAConfig:\n'),
        ],
        says="after another config's list had grown",
        only=True,
    ),
    Mistake(
        "all_projections_by_default",
        "5.2",
        [(TARGETS, TARGETS.replace('["q_proj", "v_proj"]', '["q_proj", "k_proj", "v_proj"]'))],
        says="target_modules",
        only=True,
    ),
    Mistake(
        "config_alpha_1_by_default",
        "5.2",
        [("alpha: float = 8.0", "alpha: float = 1.0")],
        says="LoRAConfig().alpha",
        only=True,
    ),
    Mistake(
        "config_dropout_0_by_default",
        "5.2",
        [("dropout: float = 0.1\n", "dropout: float = 0.0\n")],
        says="LoRAConfig().dropout",
        only=True,
    ),
    Mistake(
        "config_keeps_the_default_targets",
        "5.2",
        [(TARGETS, '        self.target_modules = ["q_proj", "v_proj"]\n')],
        says="adapted",
    ),
    Mistake(
        "bare_weight_is_the_originals",
        "5.2",
        weight("        return original\n"),
        says="so the adapter is ignored",
        only=True,
    ),
    Mistake(
        "bare_weight_without_gradient",
        "5.2",
        weight(WEIGHT.replace("self.lora_B @ self.lora_A", "(self.lora_B @ self.lora_A).detach()")),
        says="no gradient",
        only=True,
    ),
    Mistake(
        "bare_weight_without_scaling",
        "5.2",
        weight(WEIGHT.replace("self.scaling * ", "")),
        says="with an adapted out_proj",
        only=True,
    ),
    Mistake(
        "bare_weight_works_in_eval_only",
        "5.2",
        weight(
            "        return original if self._own_weight or self.training else original + self.scaling * self.lora_B @ self.lora_A\n"
        ),
        says="so the adapter is ignored",
        only=True,
    ),
    Mistake(
        "bare_bias_missing",
        "5.2",
        [
            (BIAS, ""),
        ],
        says="give what a parent reads",
    ),
    Mistake(
        "bare_weight_missing",
        "5.2",
        [
            (
                MERGED,
                MERGED.replace(
                    "self.weight.detach()",
                    "(self.original_layer.weight + self.scaling * self.lora_B @ self.lora_A).detach()",
                ),
            ),
            ("    @property\n    def weight(self)", "    @property\n    def effective_weight(self)"),
        ],
        says="give what a parent reads",
        only=True,
    ),
    Mistake(
        "prebuilt_attention_is_skipped",
        "5.2",
        [
            (
                MATCHED,
                MATCHED
                + "    matched = {path: layer for path, layer in matched.items() if type(layer) is nn.Linear}\n",
            )
        ],
        says="out_proj",
        only=True,
    ),
    Mistake(
        "out_proj_refused_by_name",
        "5.2",
        [
            (
                FREEZE,
                '    if any(path.endswith("out_proj") for path in matched):\n        raise TypeError("out_proj is read as a bare weight")\n'
                + FREEZE,
            )
        ],
        says="out_proj is read",
        only=True,
    ),
    Mistake(
        "refused_beside_prebuilt_attention",
        "5.2",
        [
            (
                FREEZE,
                "    if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):\n        raise TypeError('nn.MultiheadAttention reads bare weights')\n"
                + FREEZE,
            )
        ],
        says="reads bare weights",
        only=True,
    ),
    Mistake(
        "an_empty_list_is_the_default",
        "5.2",
        [(TARGETS, TARGETS.replace("target_modules is None else", "not target_modules else"))],
        says="targets []: was accepted",
        only=True,
    ),
    Mistake(
        "one_config_for_all",
        "5.2",
        [(TARGETS, TARGETS.replace("self.", "LoRAConfig."))],
        says="once another config was made",
        only=True,
    ),
    Mistake(
        "config_alpha_cut_to_an_integer",
        "5.2",
        [(ADAPT, ADAPT.replace("config.alpha", "int(config.alpha)"))],
        says="LoRAConfig(rank=2, alpha=3.5)",
        only=True,
    ),
    Mistake(
        "absent_children_are_walked",
        "5.2",
        [
            (WALK, '    modules = _walk(model, "")\n'),
            (
                "def lora_state_dict",
                'def _walk(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:\n    found = []\n    for name, child in module._modules.items():\n        found += [(prefix + name, child), *_walk(child, f"{prefix}{name}.")]\n    return found\n\n\ndef lora_state_dict',
            ),
        ],
        says="NoneType",
        only=True,
    ),
    Mistake(
        "layers_of_one_shape_share_a",
        "5.2",
        [
            (
                PUT,
                "    first: dict[tuple[int, ...], nn.Parameter] = {}\n    for adapter in adapters.values():\n        adapter.lora_A = first.setdefault(tuple(adapter.lora_A.shape), adapter.lora_A)\n    return model\n",
            ),
            (ADAPT, ADAPT + "        model.set_submodule(path, adapters[layer])\n"),
        ],
        says="share A or B",
    ),
    Mistake(
        "b_random_once_applied",
        "5.1",
        [(ADAPT, ADAPT + "            nn.init.normal_(adapters[layer].lora_B)\n")],
        says="output of a freshly adapted model",
        only=True,
    ),
    Mistake(
        "targets_used_up",
        "5.2",
        [(REFUSAL, REFUSAL + "    targets.clear()\n")],
        says="changes config.target_modules",
        only=True,
    ),
    # 5.3
    Mistake(
        "other_layers_trainable",
        "5.3",
        [(FREEZE, ""), (ADAPT, "            layer.requires_grad_(False)\n" + ADAPT)],
        says="trainable besides lora_A and lora_B",
        only=True,
    ),
    Mistake(
        "base_trainable",
        "5.3",
        [(PUT, "        adapters[layer].original_layer.requires_grad_(True)\n" + PUT)],
        says="q_proj.weight",
        only=True,
    ),
    Mistake(
        "bias_trainable",
        "5.3",
        [
            (
                FREEZE,
                '    for name, parameter in model.named_parameters():\n        parameter.requires_grad = name.endswith("bias")\n',
            )
        ],
        says="q_proj.bias",
        only=True,
    ),
    Mistake("nothing_frozen", "5.3", [(FREEZE, "")], says="trainable besides lora_A and lora_B", only=True),
    Mistake(
        "adapters_frozen_too",
        "5.3",
        [(FREEZE, ""), (PUT, PUT.replace("    return model\n", "    model.requires_grad_(False)\n    return model\n"))],
        says="are not trainable",
    ),
    Mistake(
        "frozen_layers_only_flagged_linear",
        "5.3",
        [
            (
                FREEZE,
                "    for module in model.modules():\n        if isinstance(module, nn.Linear):\n            module.requires_grad_(False)\n",
            )
        ],
        says="trainable besides lora_A and lora_B",
        only=True,
    ),
    Mistake(
        "base_decays_in_forward",
        "5.3",
        [
            (
                RETURN,
                "        if self.training and torch.is_grad_enabled() and not self.original_layer.weight.requires_grad and x.dtype == torch.float32 and x.dim() == 3:\n            self.original_layer.weight.data.mul_(1 - 1e-6)\n"
                + RETURN,
            )
        ],
        says="has changed",
    ),
    Mistake(
        "adapters_of_layers_in_eval_frozen",
        "5.3",
        [
            (
                ADAPT,
                ADAPT
                + "            adapters[layer].requires_grad_(layer.training)\n            layer.requires_grad_(False)\n",
            )
        ],
        says="0 numbers are trainable",
        only=True,
    ),
    # 5.4
    Mistake(
        "dense_forward",
        "5.4",
        [(RETURN, "        if self.dropout.p == 0 or not self.training:\n    " + DENSE + RETURN)],
        says="B A is as large as W",
        only=True,
    ),
    Mistake(
        "dense_in_eval",
        "5.4",
        [(RETURN, "        if not self.training:\n    " + DENSE + RETURN)],
        says="B A is as large as W",
        only=True,
    ),
    Mistake(
        "dense_without_gradients",
        "5.4",
        [(RETURN, "        if not torch.is_grad_enabled() and not self.training:\n    " + DENSE + RETURN)],
        says="B A is as large as W",
        only=True,
    ),
    Mistake(
        "product_first",
        "5.4",
        [(RETURN, RETURN.replace("self.lora_A.mT @ self.lora_B.mT", "(self.lora_A.mT @ self.lora_B.mT)"))],
        says="B A is as large as W",
        only=True,
    ),
    Mistake(
        "copy_of_the_weight",
        "5.4",
        [(ORIGINAL, "        output = F.linear(x, self.original_layer.weight.clone(), self.original_layer.bias)\n")],
        says="a tensor of 899 elements",
        only=True,
    ),
    Mistake(
        "adapter_with_bias",
        "5.4",
        [
            (B, B + "        self.extra = nn.Parameter(weight.new_zeros(weight.size(0)))\n"),
            (RETURN, RETURN.replace("* self.scaling", "* self.scaling + self.extra")),
        ],
        says="rank·(in + out)",
    ),
    Mistake(
        "trainable_scale",
        "5.4",
        [
            (B, B + "        self.extra = nn.Parameter(weight.new_ones(()))\n"),
            (RETURN, RETURN.replace("* self.scaling", "* self.scaling * self.extra")),
        ],
        says="rank·(in + out)",
    ),
    Mistake(
        "shared_parameters_count_twice",
        "5.4",
        [(PARAMETERS, "    parameters = [p for m in model.modules() for p in m.parameters(recurse=False)]\n")],
        says="shared parameters count once",
        only=True,
    ),
    Mistake(
        "shared_modules_count_twice",
        "5.4",
        [(PARAMETERS, "    parameters = [p for _, p in model.named_parameters(remove_duplicate=False)]\n")],
        says="shared parameters count once",
        only=True,
    ),
    Mistake(
        "buffers_count",
        "5.4",
        [
            (
                COUNT,
                COUNT.replace(
                    "sum(p.numel() for p in parameters),", "sum(p.numel() for p in [*parameters, *model.buffers()]),"
                ),
            )
        ],
        says="buffers never",
        only=True,
    ),
    Mistake(
        "state_dict_counts",
        "5.4",
        [
            (
                COUNT,
                COUNT.replace(
                    "sum(p.numel() for p in parameters),", "sum(p.numel() for p in model.state_dict().values()),"
                ),
            )
        ],
        says="count once",
        only=True,
    ),
    Mistake(
        "tensors_are_counted",
        "5.4",
        [(COUNT, "    return len(parameters), sum(p.requires_grad for p in parameters)\n")],
        says="count_parameters(Tiny, all trainable)",
    ),
    Mistake("all_is_trainable", "5.4", [(COUNT, COUNT.replace(" if p.requires_grad)", ")"))], says="28 numbers frozen"),
    Mistake(
        "trainable_comes_first",
        "5.4",
        [
            (
                COUNT,
                "    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)\n",
            )
        ],
        says="(all, trainable)",
    ),
    Mistake(
        "a_share_comes_second",
        "5.4",
        [
            (
                COUNT,
                "    total = sum(p.numel() for p in parameters)\n    return total, sum(p.numel() for p in parameters if p.requires_grad) / max(total, 1)\n",
            )
        ],
        says="a pair of integers",
    ),
    Mistake(
        "dense_where_dropout_is_idle",
        "5.4",
        [(RETURN, "        if self.dropout.p > 0 and not self.training:\n    " + DENSE + RETURN)],
        says="B A is as large as W",
        only=True,
    ),
    Mistake(
        "w_copied_into_a_buffer",
        "5.4",
        [(MODE, MODE + '        self.register_buffer("first", weight.detach().clone(), persistent=False)\n')],
        says="is W copied?",
        only=True,
    ),
    Mistake(
        "counted_by_address",
        "5.4",
        [(PARAMETERS, "    parameters = list({p.data_ptr(): p for p in model.parameters()}.values())\n")],
        says="a layer on meta",
        only=True,
    ),
    # 5.5
    Mistake(
        "merge_does_nothing",
        "5.5",
        [(MERGE, "        return\n")],
        says="original_layer.weight after merge_weights",
        only=True,
    ),
    Mistake(
        "merge_is_a_flag",
        "5.5",
        [(MERGE, "        self._own_weight.append(self.original_layer.weight)\n"), (IF_MERGED, "")],
        says="original_layer.weight after merge_weights",
    ),
    Mistake(
        "merge_is_kept_apart",
        "5.5",
        [
            (
                MERGE,
                "        self._own_weight = [self.original_layer.weight, (self.original_layer.weight + self.scaling * self.lora_B @ self.lora_A).detach()]\n",
            ),
            (
                IF_MERGED,
                "        if self._own_weight:\n            return F.linear(x, self._own_weight[1], self.original_layer.bias)\n",
            ),
            (UNMERGE, "        self._own_weight = []\n"),
        ],
        says="original_layer.weight after merge_weights",
    ),
    Mistake(
        "merge_transposed",
        "5.5",
        [
            (
                MERGED,
                MERGED.replace(
                    "self.weight.detach()",
                    "(self.original_layer.weight + self.scaling * (self.lora_B @ self.lora_A).T.reshape(self.original_layer.weight.shape)).detach()",
                ),
            )
        ],
        says="not transposed",
    ),
    Mistake(
        "merge_transposed_where_square",
        "5.5",
        [
            (
                MERGED,
                MERGED.replace(
                    "self.weight.detach()",
                    "(self.original_layer.weight + self.scaling * ((self.lora_A.T @ self.lora_B.T) if self.lora_A.size(1) == self.lora_B.size(0) else self.lora_B @ self.lora_A)).detach()",
                ),
            )
        ],
        says="fits where in = out",
        only=True,
    ),
    Mistake(
        "merge_scales_twice",
        "5.5",
        [
            (
                MERGED,
                MERGED.replace(
                    "self.weight.detach()",
                    "(self.original_layer.weight + self.scaling**2 * self.lora_B @ self.lora_A).detach()",
                ),
            )
        ],
        says="scaled once",
        only=True,
    ),
    Mistake(
        "merge_does_not_scale",
        "5.5",
        [
            (
                MERGED,
                MERGED.replace(
                    "self.weight.detach()", "(self.original_layer.weight + self.lora_B @ self.lora_A).detach()"
                ),
            )
        ],
        says="scaled once",
        only=True,
    ),
    Mistake(
        "merge_forgets_w",
        "5.5",
        [(MERGED, MERGED.replace("self.weight.detach()", "(self.scaling * self.lora_B @ self.lora_A).detach()"))],
        says="original_layer.weight after merge_weights",
        only=True,
    ),
    Mistake(
        "merge_adds_twice",
        "5.5",
        [
            (
                MERGE,
                MERGE.replace("        if not self._own_weight:\n", "        if True:\n").replace(
                    "self.weight.detach()",
                    "(self.original_layer.weight + self.scaling * self.lora_B @ self.lora_A).detach()",
                ),
            )
        ],
        says="B A is added twice",
        only=True,
    ),
    Mistake(
        "second_merge_keeps_the_merged",
        "5.5",
        [
            (
                MERGE,
                "        merged = nn.Parameter(self.weight.detach(), requires_grad=False)\n        self._own_weight = [self.original_layer.weight]\n        self.original_layer.weight = merged\n",
            )
        ],
        says="after merging twice and unmerging once",
        only=True,
    ),
    Mistake(
        "merge_errs_by_1e_5",
        "5.5",
        [
            (
                MERGED,
                MERGED.replace(
                    "self.weight.detach()", "(self.weight * (1 + 1e-5 * (self.lora_A.dtype == torch.float32))).detach()"
                ),
            )
        ],
        says="off by",
        only=True,
    ),
    Mistake("merged_and_added_again", "5.5", [(IF_MERGED, "")], says="forward(x), merged", only=True),
    Mistake(
        "merged_with_an_idle_adapter",
        "5.5",
        [
            (
                IF_MERGED,
                "        if self._own_weight:\n            return output + 0.0 * (x @ self.lora_A.mT @ self.lora_B.mT)\n",
            )
        ],
        says="3 matrix products",
        only=True,
    ),
    Mistake(
        "merged_loses_gradients",
        "5.5",
        [(IF_MERGED, "        if self._own_weight:\n            return output.detach()\n")],
        says="does not require grad",
    ),
    Mistake(
        "dropout_while_merged",
        "5.5",
        [(ORIGINAL, "        output = self.original_layer(self.dropout(x) if self._own_weight else x)\n")],
        says="forward(x), merged",
    ),
    Mistake(
        "unmerge_subtracts",
        "5.5",
        [
            (
                MERGE,
                MERGE.replace(
                    "            self.original_layer.weight = merged\n",
                    "            self.original_layer.weight = merged\n",
                ),
            ),
            (
                RESTORE,
                "            self._own_weight.pop()\n            lowered = self.original_layer.weight - self.scaling * self.lora_B @ self.lora_A\n            self.original_layer.weight = nn.Parameter(lowered.detach(), requires_grad=False)\n",
            ),
        ],
        says="after merging twice and unmerging once",
        only=True,
    ),
    Mistake(
        "unmerge_subtracts_in_float32",
        "5.5",
        [
            (
                RESTORE,
                "            self._own_weight.pop()\n            lowered = self.original_layer.weight.double() - self.scaling * (self.lora_B.double() @ self.lora_A.double())\n            self.original_layer.weight = nn.Parameter(lowered.to(self.lora_A.dtype).detach(), requires_grad=False)\n",
            )
        ],
        says="unmerg",
        only=True,
    ),
    Mistake("unmerge_does_nothing", "5.5", [(UNMERGE, "        return\n")], says="unmerging"),
    Mistake(
        "unmerge_leaves_the_flag",
        "5.5",
        [(RESTORE, "            self.original_layer.weight = self._own_weight[0]\n")],
        says="original_layer.weight in torch.float32, merged",
    ),
    Mistake(
        "unmerge_needs_a_merge",
        "5.5",
        [(UNMERGE, "        self.original_layer.weight = self._own_weight.pop()\n")],
        says="pop from empty list",
        only=True,
    ),
    Mistake(
        "merge_zeroes_a_and_b",
        "5.5",
        [(KEEP, KEEP + "            self.lora_A.data.zero_()\n            self.lora_B.data.zero_()\n")],
        says="lora_A after merge_weights",
        only=True,
    ),
    Mistake(
        "merge_deletes_the_adapter",
        "5.5",
        [
            (
                KEEP,
                KEEP
                + "            self.lora_A, self.lora_B = nn.Parameter(self.lora_A.clone()), nn.Parameter(self.lora_B.clone())\n",
            )
        ],
        says="lora_A and lora_B stay the same parameters",
        only=True,
    ),
    Mistake(
        "merge_freezes_the_adapter",
        "5.5",
        [
            (
                KEEP,
                KEEP + "            self.lora_A.requires_grad_(False)\n            self.lora_B.requires_grad_(False)\n",
            )
        ],
        says="gradient of lora_A",
        only=True,
    ),
    Mistake(
        "unmerge_makes_w_trainable",
        "5.5",
        [(RESTORE, "            self.original_layer.weight = nn.Parameter(self._own_weight.pop())\n")],
        says="have become trainable",
        only=True,
    ),
    Mistake(
        "first_merge_is_kept",
        "5.5",
        [
            (
                MERGED,
                '            merged = self.__dict__.setdefault("_sum", nn.Parameter(self.weight.detach(), requires_grad=False))\n',
            )
        ],
        says="original_layer.weight in torch.float32, merged",
        only=False,
    ),
    Mistake(
        "w_is_kept_when_built",
        "5.5",
        [
            (MODE, MODE + "        self._first = [original_layer.weight.detach().clone()]\n"),
            (
                RESTORE,
                "            self._own_weight.pop()\n            self.original_layer.weight = nn.Parameter(self._first[0].to(self.lora_A), requires_grad=False)\n",
            ),
        ],
        says="an old copy of it came back",
        only=True,
    ),
    Mistake(
        "shared_tensor_written",
        "5.5",
        [(MERGE, IN_PLACE), (RESTORE, RESTORE_IN_PLACE)],
        says="another module shares this tensor",
        only=True,
    ),
    Mistake(
        "shared_parameter_replaced_by_data",
        "5.5",
        [
            (
                MERGE,
                "        if not self._own_weight:\n            self._own_weight.append(self.original_layer.weight.data)\n            self.original_layer.weight.data = (self.original_layer.weight + self.scaling * self.lora_B @ self.lora_A).detach()\n",
            ),
            (RESTORE, "            self.original_layer.weight.data = self._own_weight.pop()\n"),
        ],
        says="another module shares this tensor",
        only=True,
    ),
    Mistake(
        "merged_bare_weight_counts_twice",
        "5.5",
        weight("        return original + self.scaling * self.lora_B @ self.lora_A\n"),
        says="holds B A already",
        only=True,
    ),
    Mistake(
        "merge_keeps_the_first_dtype",
        "5.5",
        [
            (
                MERGED,
                '            kept = self.__dict__.setdefault("_kind", self.lora_A.dtype)\n            merged = nn.Parameter(self.weight.detach().to(kept).to(self.lora_A.dtype), requires_grad=False)\n',
            )
        ],
        says="merged after .double()",
        only=True,
    ),
    Mistake(
        "training_unmerges",
        "5.5",
        [
            (
                "    def merge_weights",
                '    def train(self, mode: bool = True) -> "LoRALinear":\n        """Merged weights are for eval."""\n        if mode and self.__dict__.get("_own_weight"):\n            self.unmerge_weights()\n        return super().train(mode)\n\n    def merge_weights',
            )
        ],
        says="forward(x), merged",
        only=True,
    ),
    Mistake(
        "merging_ends_training",
        "5.5",
        [(KEEP, KEEP + "            self.eval()\n")],
        says="the layer was in training",
        only=True,
    ),
    Mistake(
        "merged_weight_trained",
        "5.5",
        [(MERGED, MERGED.replace(", requires_grad=False", ""))],
        says="while merged",
        only=True,
    ),
    Mistake(
        "merge_of_the_first_ranks",
        "5.5",
        [
            (
                MERGED,
                MERGED.replace(
                    "self.weight.detach()",
                    "(self.original_layer.weight + self.scaling * self.lora_B[:, :4] @ self.lora_A[:4]).detach()",
                ),
            )
        ],
        says="original_layer.weight after merge_weights",
        only=True,
    ),
    Mistake(
        "added_again_without_gradients",
        "5.5",
        [
            (
                IF_MERGED,
                IF_MERGED.replace(
                    "self._own_weight:", "self._own_weight and (torch.is_grad_enabled() or not x.dim() == 2):"
                ),
            )
        ],
        says="off by",
        only=True,
    ),
    Mistake(
        "merged_bare_weight_counts_twice_in_training",
        "5.5",
        weight(WEIGHT.replace("self._own_weight", "self._own_weight and not self.training")),
        says="training True",
        only=True,
    ),
    # 5.6
    Mistake(
        "step_counters_left_out",
        "5.6",
        [(STATE, STATE.replace("for value in values.values()]", 'for key, value in values.items() if key != "step"]'))],
        says="the step counters too",
        only=True,
    ),
    Mistake(
        "state_read_before_the_first_step",
        "5.6",
        [("\n" + STATE, "\n"), ("    start = time.perf_counter()\n", "    start = time.perf_counter()\n" + STATE)],
        says="optimizer_bytes",
        only=True,
    ),
    Mistake(
        "elements_for_bytes",
        "5.6",
        [(OPTIMIZER_BYTES, OPTIMIZER_BYTES.replace("value.nbytes", "value.numel()"))],
        says="optimizer_bytes",
        only=True,
    ),
    Mistake(
        "state_by_formula",
        "5.6",
        [(OPTIMIZER_BYTES, '        "optimizer_bytes": 8 * count_parameters(model)[1],\n')],
        says="was seen",
        only=True,
    ),
    Mistake(
        "gradients_read_after_zero_grad",
        "5.6",
        [(STEP, STEP + "        optimizer.zero_grad()\n")],
        says="before any zero_grad",
        only=True,
    ),
    Mistake(
        "gradients_of_all_parameters",
        "5.6",
        [
            (
                GRADIENT_BYTES,
                '        "gradient_bytes": sum(p.nbytes for p in model.parameters()) + 0 * len(gradients),\n',
            )
        ],
        says="['lora']['gradient_bytes']",
        only=True,
    ),
    Mistake(
        "gradient_elements",
        "5.6",
        [(GRADIENT_BYTES, GRADIENT_BYTES.replace("gradient.nbytes", "gradient.numel()"))],
        says="gradient_bytes",
        only=True,
    ),
    Mistake(
        "all_parameters_reported",
        "5.6",
        [(TRAINED, TRAINED.replace("[1]", "[0]"))],
        says="['lora']['trainable_parameters']",
        only=True,
    ),
    Mistake(
        "sgd",
        "5.6",
        [
            (
                ADAMW,
                ADAMW.replace(
                    "AdamW(p for p in model.parameters() if p.requires_grad)",
                    "SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)",
                ),
            )
        ],
        says="no torch.optim.AdamW",
        only=True,
    ),
    Mistake("plain_adam", "5.6", [(ADAMW, ADAMW.replace("AdamW", "Adam"))], says="no torch.optim.AdamW", only=True),
    Mistake(
        "both_runs_full",
        "5.6",
        [(RUNS, RUNS.replace("_train(lora, steps)", "_train(SimpleTransformer(), steps)"))],
        says="no run trains an adapted",
        only=True,
    ),
    Mistake(
        "both_runs_adapted",
        "5.6",
        [
            (
                RUNS,
                RUNS.replace(
                    '"full": _train(SimpleTransformer(), steps)',
                    '"full": _train(apply_lora_to_model(SimpleTransformer(), LoRAConfig()), steps)',
                ),
            )
        ],
        says="every run trains an adapted model",
        only=True,
    ),
    Mistake(
        "norms_frozen_in_full",
        "5.6",
        [
            (
                RUNS,
                RUNS.replace(
                    '"full": _train(SimpleTransformer(), steps)',
                    '"full": _train(SimpleTransformer().without_norms(), steps)',
                ),
            ),
            (
                "    def forward(self, tokens: Tensor) -> Tensor:\n",
                '    def without_norms(self) -> "SimpleTransformer":\n        """Trains all but the norms."""\n        self.norms.requires_grad_(False)\n        return self\n\n    def forward(self, tokens: Tensor) -> Tensor:\n',
            ),
        ],
        says="full fine-tuning trains them all",
        only=True,
    ),
    Mistake(
        "lora_run_trains_the_head",
        "5.6",
        [
            (RUNS, RUNS.replace("_train(lora, steps)", "_train(SimpleTransformer().head_only(), steps)")),
            (
                "    def forward(self, tokens: Tensor) -> Tensor:\n",
                '    def head_only(self) -> "SimpleTransformer":\n        """Freezes all but the head."""\n        self.requires_grad_(False)\n        self.head.requires_grad_(True)\n        return self\n\n    def forward(self, tokens: Tensor) -> Tensor:\n',
            ),
        ],
        says="no run trains an adapted",
        only=True,
    ),
    Mistake(
        "runs_swapped",
        "5.6",
        [(RUNS, '    return {"lora": _train(SimpleTransformer(), steps), "full": _train(lora, steps)}\n')],
        says="['full']",
        only=True,
    ),
    Mistake(
        "always_three_steps",
        "5.6",
        [(LOOP, LOOP.replace("range(steps)", "range(3)"))],
        says="the full run makes 3 steps",
        only=True,
    ),
    Mistake(
        "one_step_too_few",
        "5.6",
        [(LOOP, LOOP.replace("range(steps)", "range(max(1, steps - 1))"))],
        says="run makes 1 steps",
        only=True,
    ),
    Mistake("no_step_at_all", "5.6", [(STEP, "")], says="no optimizer of torch.optim made a step", only=True),
    Mistake(
        "invented_numbers",
        "5.6",
        [
            (
                RUNS,
                '    rows = [dict(trainable_parameters=n, optimizer_bytes=8 * n, gradient_bytes=4 * n, seconds_per_step=0.001) for n in (3197, 512)]\n    return dict(zip(("full", "lora"), rows, strict=True))\n',
            )
        ],
        says="no optimizer of torch.optim made a step",
        only=True,
    ),
    Mistake(
        "old_gradients_stay",
        "5.6",
        [
            (
                RUNS,
                '    model = SimpleTransformer()\n    full = _train(model, steps)\n    return {"full": full, "lora": _train(apply_lora_to_model(model, LoRAConfig()), steps)}\n',
            )
        ],
        says="['lora']['gradient_bytes']",
        only=True,
    ),
    Mistake(
        "seconds_left_at_zero",
        "5.6",
        [(SECONDS, '        "seconds_per_step": 0.0 * seconds,\n')],
        says="a positive number was wanted",
        only=True,
    ),
    Mistake(
        "rows_in_a_list",
        "5.6",
        [(RUNS, "    return [_train(SimpleTransformer(), steps), _train(lora, steps)]\n")],
        says="a dict with the dicts 'full' and 'lora'",
        only=True,
    ),
    Mistake(
        "a_smaller_model_for_lora",
        "5.6",
        [
            (
                "    lora = apply_lora_to_model(SimpleTransformer(),",
                "    lora = apply_lora_to_model(SimpleTransformer(d_model=8),",
            )
        ],
        says="the same sizes are wanted",
        only=True,
    ),
    Mistake(
        "lora_run_trains_a_alone",
        "5.6",
        [
            (
                ADAMW,
                "    trained = [p for p in model.parameters() if p.requires_grad and p.shape != (16, 4)]\n    optimizer = torch.optim.AdamW(trained)\n",
            ),
            (TRAINED, '        "trainable_parameters": sum(p.numel() for p in trained),\n'),
            (GRADIENTS, "    gradients = [p.grad for p in trained if p.grad is not None]\n"),
        ],
        says="its adapters hold 512",
        only=True,
    ),
    Mistake(
        "milliseconds",
        "5.6",
        [(SECONDS, SECONDS.replace("seconds / steps", "1e3 * seconds / steps"))],
        says="seconds, for one step",
        only=True,
    ),
    Mistake(
        "seconds_of_all_steps",
        "5.6",
        [(SECONDS, SECONDS.replace("seconds / steps", "seconds"))],
        says="seconds, for one step",
        only=True,
    ),
    Mistake(
        "measured_once",
        "5.6",
        [
            (RUNS, RUNS.replace("    return ", "    _rows.update(_rows or ").replace("}\n", "})\n    return _rows\n")),
            ("def _train", "_rows: dict[str, dict[str, float]] = {}\n\n\ndef _train"),
        ],
        says="no optimizer of torch.optim made a step",
        only=True,
    ),
    # 5.7
    Mistake(
        "adapter_in_float32",
        "5.7",
        [
            (START, "        start = torch.randn(rank, weight.size(1), device=weight.device)\n"),
            (B, "        self.lora_B = nn.Parameter(torch.zeros(weight.size(0), rank, device=weight.device))\n"),
        ],
        says="torch.float32 came, torch.bfloat16 was wanted",
        only=True,
    ),
    Mistake(
        "adapter_on_the_cpu",
        "5.7",
        [
            (START, START.replace(", device=weight.device", "")),
            (B, "        self.lora_B = nn.Parameter(torch.zeros(weight.size(0), rank, dtype=weight.dtype))\n"),
        ],
        says="on cpu",
        only=True,
    ),
    Mistake(
        "dtype_of_the_model",
        "5.7",
        [
            (
                PUT,
                PUT.replace(
                    "    return model\n",
                    "    kind = next(model.parameters())\n    for adapter in adapters.values():\n        adapter.lora_A.data, adapter.lora_B.data = adapter.lora_A.data.to(kind.dtype), adapter.lora_B.data.to(kind.dtype)\n    return model\n",
                ),
            )
        ],
        says="apply_lora_to_model on a layer in torch.bfloat16",
        only=True,
    ),
    Mistake(
        "output_in_float32",
        "5.7",
        [
            (
                RETURN,
                RETURN.replace(
                    "self.dropout(x) @ self.lora_A.mT @ self.lora_B.mT",
                    "(self.dropout(x).float() @ self.lora_A.float().mT @ self.lora_B.float().mT if x.dtype == torch.bfloat16 else self.dropout(x) @ self.lora_A.mT @ self.lora_B.mT)",
                ),
            )
        ],
        says="torch.float32 came, torch.bfloat16 was wanted",
        only=True,
    ),
    Mistake(
        "factor_left_behind",
        "5.7",
        [
            (MODE, MODE + "        self._factor = [torch.tensor(self.scaling, device=weight.device)]\n"),
            (
                RETURN,
                RETURN.replace(
                    "* self.scaling",
                    "* torch.ones(1) * self.scaling if x.is_meta else output + self.dropout(x) @ self.lora_A.mT @ self.lora_B.mT * self.scaling",
                ),
            ),
        ],
        says="meta",
        only=True,
    ),
    Mistake(
        "dropout_on_the_original_too",
        "5.7",
        [
            (ORIGINAL, "        if not self._own_weight:\n            x = self.dropout(x)\n" + ORIGINAL),
            (RETURN, RETURN.replace("self.dropout(x)", "x")),
        ],
        says="what reaches A",
        only=True,
    ),
    Mistake(
        "dropout_on_the_output",
        "5.7",
        [(RETURN, "        return self.dropout(output + x @ self.lora_A.mT @ self.lora_B.mT * self.scaling)\n")],
        says="what reaches A",
        only=True,
    ),
    Mistake(
        "dropout_between_a_and_b",
        "5.7",
        [(RETURN, "        return output + self.dropout(x @ self.lora_A.mT) @ self.lora_B.mT * self.scaling\n")],
        says="what reaches A",
        only=True,
    ),
    Mistake(
        "no_dropout", "5.7", [(RETURN, RETURN.replace("self.dropout(x)", "x"))], says="nothing is dropped", only=True
    ),
    Mistake(
        "dropout_without_rescaling",
        "5.7",
        [
            (
                RETURN,
                RETURN.replace("self.dropout(x)", "(self.dropout(x) * (1 - self.dropout.p) if self.training else x)"),
            )
        ],
        says="what reaches A",
        only=True,
    ),
    Mistake(
        "dropout_in_eval",
        "5.7",
        [(RETURN, RETURN.replace("self.dropout(x)", "F.dropout(x, self.dropout.p)"))],
        says="dropout acts in eval",
        only=True,
    ),
    Mistake(
        "whole_features_dropped",
        "5.7",
        [
            (
                RETURN,
                RETURN.replace(
                    "self.dropout(x)",
                    "(x * self.dropout(torch.ones_like(x[..., :1, :])) if x.dim() > 1 and x.numel() else self.dropout(x))",
                ),
            )
        ],
        says="for all rows",
        only=True,
    ),
    Mistake(
        "whole_rows_dropped",
        "5.7",
        [(RETURN, RETURN.replace("self.dropout(x)", "(x * self.dropout(torch.ones_like(x[..., :1])))"))],
        says="for all features",
        only=True,
    ),
    Mistake(
        "fixed_dropout",
        "5.7",
        [(DROPOUT, "        self.dropout = nn.Dropout(0.1 if dropout else 0.0)\n")],
        says="what reaches A",
        only=True,
    ),
    Mistake(
        "dropout_seeded",
        "5.7",
        [(ORIGINAL, "        if self.training and not x.is_meta:\n            torch.manual_seed(0)\n" + ORIGINAL)],
        says="two calls drop the same elements",
        only=True,
    ),
    Mistake("config_dropout_lost", "5.7", [(ADAPT, ADAPT.replace(", config.dropout", ""))], says="dropout", only=True),
    Mistake("mode_not_taken_over", "5.7", [(MODE, "")], says="flag is True", only=True),
    Mistake(
        "flag_taken_over_dropout_not",
        "5.7",
        [(MODE, "        self.training = original_layer.training\n")],
        says="although the layer is in eval",
        only=True,
    ),
    Mistake(
        "x_detached_by_dropout",
        "5.1",
        [(RETURN, RETURN.replace("dropout(x)", "dropout(x.detach() if self.training and self.dropout.p > 0 else x)"))],
        says="gradient of x: the output moves",
        only=True,
    ),
    Mistake(
        "dropout_of_rows_in_batches",
        "5.7",
        [(DROPOUT, "        self.dropout = nn.Dropout2d(dropout)\n")],
        says="for all features",
        only=True,
    ),
    Mistake(
        "one_mask_for_the_batch",
        "5.7",
        [
            (
                RETURN,
                RETURN.replace(
                    "self.dropout(x)", "(x * self.dropout(torch.ones_like(x[:1])) if x.dim() > 2 else self.dropout(x))"
                ),
            )
        ],
        says="for all rows",
        only=True,
    ),
    Mistake(
        "no_dropout_without_gradients",
        "5.7",
        [(RETURN, RETURN.replace("self.dropout(x)", "(self.dropout(x) if torch.is_grad_enabled() else x)"))],
        says="nothing is dropped",
        only=True,
    ),
    Mistake(
        "mode_taken_over_when_applied",
        "5.7",
        [(MODE, ""), (ADAPT, ADAPT + "            adapters[layer].train(layer.training)\n")],
        says="its own flag is True",
        only=True,
    ),
    Mistake(
        "left_on_the_first_calls_device",
        "5.7",
        [
            (
                RETURN,
                '        one = self.__dict__.setdefault("_one", torch.ones(1, dtype=x.dtype, device=x.device)).to(x.dtype)\n'
                + RETURN.replace("* self.scaling", "* self.scaling * one"),
            )
        ],
        says="meta",
        only=True,
    ),
    # 5.8
    Mistake(
        "everything_saved",
        "5.8",
        [(SAVE, "    return {key: value.clone() for key, value in model.state_dict().items()}\n")],
        says="and nothing of the base",
        only=True,
    ),
    Mistake(
        "whole_adapted_layers_saved",
        "5.8",
        [
            (
                SAVE,
                "    paths = tuple(n for n, m in model.named_modules() if isinstance(m, LoRALinear))\n    return {k: v.clone() for k, v in model.state_dict().items() if k.startswith(paths)}\n",
            )
        ],
        says="and nothing of the base",
        only=True,
    ),
    Mistake("nothing_saved", "5.8", [(SAVE, "    return {}\n")], says="0 numbers in 0 tensors", only=True),
    Mistake(
        "b_alone_saved",
        "5.8",
        [(SAVE, SAVE.replace('("lora_A", "lora_B")', '"lora_B"'))],
        says="save A and B",
        only=True,
    ),
    Mistake(
        "references_saved",
        "5.8",
        [(SAVE, SAVE.replace("value.clone()", "value"))],
        says="a reference was saved",
        only=True,
    ),
    Mistake(
        "keys_renamed",
        "5.8",
        [(SAVE, SAVE.replace("{key: value", '{f"adapter.{key}": value'))],
        says="unexpected keys",
        only=True,
    ),
    Mistake(
        "keys_without_paths",
        "5.8",
        [
            (
                SAVE,
                '    return {key.split(".")[-1]: value.clone() for key, value in model.state_dict().items() if "lora_" in key}\n',
            )
        ],
        says="numbers in 2 tensors",
        only=True,
    ),
    Mistake(
        "products_saved",
        "5.8",
        [
            (
                SAVE,
                '    return {f"{n}.weight": (m.lora_B @ m.lora_A).detach() for n, m in model.named_modules() if isinstance(m, LoRALinear)}\n',
            )
        ],
        says="the adapters hold",
        only=True,
    ),
    Mistake(
        "a_and_b_swapped",
        "5.8",
        [
            (
                SAVE,
                '    parts = {"lora_A": "lora_B", "lora_B": "lora_A"}\n    return {f"{n}.{k}": getattr(m, p).detach().clone() for n, m in model.named_modules() if isinstance(m, LoRALinear) for k, p in parts.items()}\n',
            )
        ],
        says="size mismatch",
        only=True,
    ),
    Mistake(
        "saved_in_float16",
        "5.8",
        [(SAVE, SAVE.replace("value.clone()", "value.half()"))],
        says="after loading",
        only=True,
    ),
    Mistake(
        "lists_saved",
        "5.8",
        [(SAVE, SAVE.replace("value.clone()", "value.tolist()"))],
        says="where tensors were wanted",
        only=True,
    ),
    Mistake(
        "parameters_in_a_list",
        "5.8",
        [(SAVE, "    return [p.detach().clone() for p in model.parameters() if p.requires_grad]\n")],
        says="a list came",
        only=True,
    ),
    Mistake(
        "what_is_trainable_is_saved",
        "5.8",
        [(SAVE, "    return {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}\n")],
        says="and nothing of the base",
        only=True,
    ),
    Mistake(
        "lora_anywhere_in_the_key",
        "5.8",
        [(SAVE, SAVE.replace('key.endswith(("lora_A", "lora_B"))', '"lora" in key'))],
        says="base layers",
        only=True,
    ),
    Mistake(
        "nothing_saved_while_merged",
        "5.8",
        [
            (
                SAVE,
                '    adapters = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear) and not m._own_weight}\n    return {f"{n}.{part}": getattr(m, part).detach().clone() for n, m in adapters.items() for part in ("lora_A", "lora_B")}\n',
            )
        ],
        says="after loading",
        only=True,
    ),
    Mistake(
        "saved_in_float32",
        "5.8",
        [(SAVE, SAVE.replace("value.clone()", "value.float()"))],
        says="after loading",
    ),
    # 5.9
    Mistake(
        "own_test_asserts_nothing",
        "5.9",
        [(OWN_TEST, "    return\n" + OWN_TEST)],
        says="passes although the code under it is wrong",
        only=True,
    ),
    Mistake(
        "own_test_only_runs",
        "5.9",
        [
            (
                OWN_TEST,
                "    LoRALinear(nn.Linear(7, 3), rank=2)(torch.randn(5, 7)).sum().backward()\n    return\n" + OWN_TEST,
            )
        ],
        says="passes although",
        only=True,
    ),
    Mistake(
        "own_test_is_wrong",
        "5.9",
        [
            (
                "    expected = (original + x @ layer.lora_A.mT @ layer.lora_B.mT * 6.0 / 2).detach()\n",
                "    expected = (original + x @ layer.lora_A.mT @ layer.lora_B.mT * 6.0).detach()\n",
            )
        ],
        says="fails on right code",
        only=True,
    ),
    Mistake(
        "own_test_leans_on_names",
        "5.9",
        [
            (
                '    assert layer.lora_A.any(), "A starts at zero"\n',
                '    assert "lora_A" in dict(layer.named_parameters()), "no lora_A"\n',
            )
        ],
        says="fails on right code",
        only=True,
    ),
]
