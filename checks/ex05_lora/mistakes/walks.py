"""Wrong answers that are right in the first call, at the common size or in the common mode."""

from harness.model.bank import Mistake

SCALING = "        self.scaling = alpha / rank\n"
MODE = "        self.train(original_layer.training)\n"
ORIGINAL = "        output = self.original_layer(x)\n"
RETURN = "        return output + self.dropout(x) @ self.lora_A.mT @ self.lora_B.mT * self.scaling\n"
IF_MERGED = "        if self._own_weight:\n            return output\n"
MERGED = "            merged = nn.Parameter(self.weight.detach(), requires_grad=False)\n"
KEEP = "            self._own_weight.append(self.original_layer.weight)\n"
RESTORE = "            self.original_layer.weight = self._own_weight.pop()\n"
FREEZE = "    model.requires_grad_(False)\n"
ADAPT = "            adapters[layer] = LoRALinear(layer, config.rank, config.alpha, config.dropout)\n"
DENSE = (
    "            return F.linear(x, self.original_layer.weight + self.scaling * self.lora_B @ self.lora_A, self.bias)\n"
)
SAVE = (
    "    return {key: value.clone() for key, value in model.state_dict().items() "
    'if key.endswith(("lora_A", "lora_B"))}\n'
)
MERGE_DEF = "    def merge_weights"
DROPOUT = "        self.dropout = nn.Dropout(dropout)\n"


def cached(condition: str, key: str) -> tuple[str, str]:
    """B, scaled, is kept under a key where a condition holds."""
    return (
        RETURN,
        f"""        scaled = self.lora_B * self.scaling
        if {condition}:
            held = self.__dict__.setdefault("_scaled", {{}})
            scaled = held.setdefault({key}, scaled.detach())
        return output + self.dropout(x) @ self.lora_A.mT @ scaled.mT
""",
    )


MISTAKES = [
    # Something of an earlier call.
    Mistake(
        "scaled_b_kept_under_inference_mode",
        "5.1",
        "forward(x)",
        cached("torch.is_inference_mode_enabled()", "x.dtype"),
    ),
    Mistake(
        "scaled_b_kept_by_version",
        "5.1",
        "forward(x)",
        cached("not torch.is_grad_enabled()", "(self.lora_B._version, x.dtype)"),
    ),
    Mistake(
        "scaled_b_kept_by_version_in_eval",
        "5.1",
        "something is kept from before",
        cached("not (self.training or torch.is_grad_enabled())", "(self.lora_B._version, x.dtype)"),
        only=True,
    ),
    Mistake(
        "factor_made_under_inference_mode",
        "5.1",
        "Inference tensors cannot be saved",
        (
            RETURN,
            """        if "_factor" not in self.__dict__ or self._factor.dtype != x.dtype:
            self.__dict__["_factor"] = torch.full((1,), self.scaling, dtype=x.dtype, device=x.device)
        return output + self.dropout(x) @ self.lora_A.mT @ self.lora_B.mT * self.__dict__["_factor"]
""",
        ),
    ),
    Mistake(
        "scaling_shared_by_all_layers",
        "5.1",
        "call 2",
        (SCALING, "        LoRALinear.scaling = property(lambda self, kept=alpha / rank: kept)\n"),
    ),
    Mistake(
        "an_error_leaves_the_adapter_out",
        "5.1",
        "after an input of another width",
        (
            ORIGINAL,
            """        skip, self.__dict__["_busy"] = self.__dict__.get("_busy", False), True
"""
            + ORIGINAL,
        ),
        (
            RETURN,
            """        self.__dict__["_busy"] = False
        if skip:
            return output
"""
            + RETURN,
        ),
        (
            IF_MERGED,
            IF_MERGED.replace("if self._own_weight:", "if self._own_weight and not self.__dict__.update(_busy=False):"),
        ),
        only=True,
    ),
    Mistake(
        "w_kept_at_the_first_merge",
        "5.5",
        "kept somewhere",
        (
            RESTORE,
            """            first = self.__dict__.setdefault("_first", self._own_weight[0].detach().clone())
            self.original_layer.weight = nn.Parameter(first.to(self.lora_A), requires_grad=False)
            self._own_weight.clear()
""",
        ),
        only=True,
    ),
    Mistake(
        "merged_flag_of_the_class",
        "5.5",
        "two layers with one weight",
        ("        self._own_weight: list[Tensor] = []\n", ""),
        (
            "    @property\n    def weight(self)",
            "    _own_weight: list[Tensor] = []\n\n    @property\n    def weight(self)",
        ),
    ),
    Mistake(
        "eval_merges",
        "5.5",
        "train() and eval() do not unmerge",
        (
            MERGE_DEF,
            '''    def train(self, mode: bool = True) -> "LoRALinear":
        """Merged in eval, as loralib does it."""
        super().train(mode)
        if "_own_weight" in self.__dict__:
            if mode:
                self.unmerge_weights()
            else:
                self.merge_weights()
        return self

    def merge_weights''',
        ),
    ),
    # Numbers.
    Mistake(
        "small_b_is_skipped",
        "5.1",
        "with a tiny B",
        (
            RETURN,
            "        if not self.lora_B.is_meta and 0 < self.lora_B.abs().amax() < 5e-4:\n            return output\n"
            + RETURN,
        ),
        only=True,
    ),
    Mistake(
        "zero_b_is_skipped",
        "5.1",
        "still zero",
        (RETURN, "        if not self.lora_B.is_meta and not self.lora_B.any():\n            return output\n" + RETURN),
    ),
    Mistake(
        "large_outputs_are_clamped",
        "5.1",
        "x far",
        (
            RETURN,
            """        hidden = (self.dropout(x) @ self.lora_A.mT).clamp(-300, 300)
        return output + hidden @ self.lora_B.mT * self.scaling
""",
        ),
        only=True,
    ),
    # Sizes.
    Mistake(
        "many_rows_lose_the_rest",
        "5.2",
        "1100 rows",
        (
            RETURN,
            """        added = self.dropout(x) @ self.lora_A.mT @ self.lora_B.mT * self.scaling
        if x.dim() == 2 and x.size(0) > 256:
            added = torch.cat([added[:256], torch.zeros_like(added[256:])])
        return output + added
""",
        ),
        only=True,
    ),
    Mistake(
        "a_short_last_block_is_detached",
        "5.2",
        "1100 rows",
        (
            RETURN,
            """        blocks = self.dropout(x).reshape(-1, x.size(-1)).split(512)
        mats = [self.lora_A if len(block) == 512 or len(blocks) == 1 else self.lora_A.detach() for block in blocks]
        added = torch.cat([block @ a.mT @ self.lora_B.mT for block, a in zip(blocks, mats, strict=True)])
        return output + added.view(output.shape) * self.scaling
""",
        ),
        only=True,
    ),
    Mistake(
        "one_row_is_squeezed",
        "5.2",
        "one row",
        (
            RETURN,
            """        output = output + self.dropout(x) @ self.lora_A.mT @ self.lora_B.mT * self.scaling
        return output.squeeze(0) if x.dim() == 2 else output
""",
        ),
        only=True,
    ),
    Mistake(
        "one_feature_is_broadcast",
        "5.2",
        "one feature in",
        (
            RETURN,
            """        if x.size(-1) == 1 and x.dim() > 1:
            return output + self.lora_A.mT @ self.lora_B.mT * self.scaling
"""
            + RETURN,
        ),
        only=True,
    ),
    Mistake(
        "dropout_1_divides_by_zero",
        "5.7",
        "dropout 1",
        (
            RETURN,
            """        if self.training and self.dropout.p > 0:
            keep = (torch.rand(x.shape, device=x.device) >= self.dropout.p).to(x.dtype)
            x = x * (keep / x.new_tensor(1 - self.dropout.p))
        return output + x @ self.lora_A.mT @ self.lora_B.mT * self.scaling
""",
        ),
        only=True,
    ),
    Mistake(
        "dense_for_one_row",
        "5.4",
        "B A is as large as W",
        (RETURN, "        if x.dim() == 1 and not self.training:\n" + DENSE + RETURN),
        wasteful=True,
    ),
    Mistake(
        "dense_at_rank_1",
        "5.4",
        "B A is as large as W",
        (RETURN, "        if self.rank == 1 and not self.training:\n" + DENSE + RETURN),
        wasteful=True,
    ),
    Mistake(
        "dense_once_frozen",
        "5.4",
        "B A is as large as W",
        (RETURN, "        if not (self.original_layer.weight.requires_grad or self.training):\n" + DENSE + RETURN),
        wasteful=True,
    ),
    # Kept or copied.
    Mistake(
        "w_copied_into_an_attribute",
        "5.4",
        "kept somewhere",
        (MODE, MODE + "        self._before = weight.detach().clone()\n"),
    ),
    Mistake(
        "w_copied_into_a_list_when_called",
        "5.4",
        "kept somewhere",
        (
            ORIGINAL,
            """        if not (self.training or self._own_weight or x.is_meta):
            _seen[:] = [self.original_layer.weight + 0 * self.scaling]
"""
            + ORIGINAL,
        ),
        (
            "class LoRAConfig:\n",
            """_seen: list[Tensor] = []


class LoRAConfig:
""",
        ),
    ),
    Mistake(
        "unmerged_from_a_copy",
        "5.5",
        "kept somewhere",
        (
            RESTORE,
            """            restored = nn.Parameter(self._own_weight.pop().clone(), requires_grad=False)
            self.original_layer.weight = restored
""",
        ),
        only=True,
    ),
    Mistake(
        "merged_weight_kept_after_unmerging",
        "5.5",
        "kept somewhere",
        (RESTORE, '            self.__dict__["_last"] = [self.original_layer.weight]\n' + RESTORE),
        only=True,
    ),
    # Identity and layout.
    Mistake(
        "input_scaled_and_put_back",
        "5.2",
        "is written to",
        (
            ORIGINAL,
            """        if x.is_contiguous() and not x.requires_grad and not x.is_inference():
            x.detach().mul_(2).mul_(0.5)
"""
            + ORIGINAL,
        ),
        only=True,
    ),
    Mistake(
        "a_block_used_twice_is_adapted_twice",
        "5.2",
        "adapted twice",
        (
            "        if layer not in adapters:\n",
            "        if layer not in adapters or isinstance(model.get_submodule(path), LoRALinear):\n",
        ),
        ("LoRALinear(layer, config.rank", "LoRALinear(adapters.get(layer, layer), config.rank"),
        (MODE, MODE + "        self.in_features, self.out_features = weight.size(1), weight.size(0)\n"),
    ),
    Mistake(
        "saved_with_a_leading_dot",
        "5.8",
        "of a LoRALinear: unexpected keys",
        (
            SAVE,
            """    return {
        f"{name}.{part}": getattr(module, part).detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
        for part in ("lora_A", "lora_B")
    }
""",
        ),
        only=True,
    ),
    Mistake(
        "parents_of_torch_alone_are_refused",
        "5.2",
        "give what a parent reads",
        (
            """    @property
    def weight(self)""",
            """    @property
    def whole(self)""",
        ),
        ("self.weight.detach()", "self.whole.detach()"),
        (
            FREEZE,
            """    for path in matched:
        if isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention | nn.TransformerEncoderLayer):
            raise TypeError(f"{path} is read as a bare weight")
"""
            + FREEZE,
        ),
        only=True,
    ),
    # Rules in one situation.
    Mistake(
        "what_is_named_lora_stays_trainable",
        "5.3",
        "trainable besides lora_A and lora_B",
        (FREEZE, ""),
        (
            "    return model\n",
            """    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad = False
    return model
""",
        ),
        only=True,
    ),
    Mistake(
        "one_step_by_default",
        "5.6",
        "the full run makes 1 steps",
        ("def compare_fine_tuning(steps: int = 3)", "def compare_fine_tuning(steps: int = 1)"),
        only=True,
    ),
    # Precision, and the modes of torch.
    Mistake(
        "adapter_computed_in_float32",
        "5.7",
        "forward(x)",
        (
            RETURN,
            """        added = self.dropout(x).float() @ self.lora_A.float().mT @ self.lora_B.float().mT
        return output + (added * self.scaling).to(output.dtype)
""",
        ),
        only=True,
    ),
    Mistake(
        "scaling_rounded",
        "5.7",
        "forward(x)",
        (SCALING, SCALING + "        self._scale = float(torch.tensor(alpha / rank))\n"),
        (RETURN, RETURN.replace("self.scaling", "self._scale")),
        only=True,
    ),
    Mistake(
        "added_in_place_under_autocast",
        "5.7",
        "under autocast",
        (
            RETURN,
            """        hidden = (self.dropout(x) @ self.lora_A.mT).reshape(-1, self.rank)
        flat = output.reshape(-1, output.size(-1))
        return flat.addmm_(hidden, self.lora_B.mT, alpha=self.scaling).view(output.shape)
""",
        ),
        only=True,
    ),
    Mistake(
        "dropout_of_its_own_stream",
        "5.7",
        "seeded again",
        (DROPOUT, DROPOUT + "        self._stream = torch.Generator().manual_seed(1)\n"),
        (
            RETURN,
            """        if self.training and self.dropout.p > 0 and not x.is_meta:
            keep = torch.rand(x.shape, generator=self._stream).to(x) >= self.dropout.p
            x = torch.where(keep, x / max(1 - self.dropout.p, 1e-9), 0.0)
        return output + x @ self.lora_A.mT @ self.lora_B.mT * self.scaling
""",
        ),
        only=True,
    ),
]
