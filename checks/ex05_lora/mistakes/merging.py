"""Wrong answers to merging and unmerging (5.5)."""

from harness.model.bank import Mistake

MODE = "        self.train(original_layer.training)\n"
WEIGHT = "        return original if self._own_weight else original + self.scaling * self.lora_B @ self.lora_A\n"
# What merging computes; by itself where a mistake changes what a parent reads.
SUM = "(self.original_layer.weight + self.scaling * self.lora_B @ self.lora_A).detach()"
IF_MERGED = "        if self._own_weight:\n            return output\n"
MERGE = """        if not self._own_weight:
            merged = nn.Parameter(self.weight.detach(), requires_grad=False)
            self._own_weight.append(self.original_layer.weight)
            self.original_layer.weight = merged
"""
MERGED = "            merged = nn.Parameter(self.weight.detach(), requires_grad=False)\n"
KEEP = "            self._own_weight.append(self.original_layer.weight)\n"
RESTORE = "            self.original_layer.weight = self._own_weight.pop()\n"
UNMERGE = """        if self._own_weight:
            self.original_layer.weight = self._own_weight.pop()
"""

MISTAKES = [
    # The merged weight.
    Mistake(
        "merge_does_nothing", "5.5", "original_layer.weight after merge_weights", (MERGE, "        return\n"), only=True
    ),
    Mistake(
        "merge_is_a_flag",
        "5.5",
        "original_layer.weight after merge_weights",
        (MERGE, "        self._own_weight.append(self.original_layer.weight)\n"),
        (IF_MERGED, ""),
    ),
    Mistake(
        "merge_is_kept_apart",
        "5.5",
        "original_layer.weight after merge_weights",
        (MERGE, f"        self._own_weight = [self.original_layer.weight, {SUM}]\n"),
        (
            IF_MERGED,
            """        if self._own_weight:
            return F.linear(x, self._own_weight[1], self.original_layer.bias)
""",
        ),
        (UNMERGE, "        self._own_weight = []\n"),
    ),
    Mistake(
        "merge_transposed",
        "5.5",
        "not transposed",
        (
            "self.weight.detach()",
            (
                "(self.original_layer.weight + self.scaling "
                "* (self.lora_B @ self.lora_A).T.reshape(self.original_layer.weight.shape)).detach()"
            ),
        ),
    ),
    Mistake(
        "merge_transposed_where_square",
        "5.5",
        "fits where in = out",
        (
            "self.weight.detach()",
            (
                "(self.original_layer.weight + self.scaling * ((self.lora_A.T @ self.lora_B.T) "
                "if self.lora_A.size(1) == self.lora_B.size(0) else self.lora_B @ self.lora_A)).detach()"
            ),
        ),
        only=True,
    ),
    Mistake(
        "merge_scales_twice",
        "5.5",
        "scaled once",
        ("self.weight.detach()", "(self.original_layer.weight + self.scaling**2 * self.lora_B @ self.lora_A).detach()"),
        only=True,
    ),
    Mistake(
        "merge_does_not_scale",
        "5.5",
        "scaled once",
        ("self.weight.detach()", "(self.original_layer.weight + self.lora_B @ self.lora_A).detach()"),
        only=True,
    ),
    Mistake(
        "merge_forgets_w",
        "5.5",
        "original_layer.weight after merge_weights",
        ("self.weight.detach()", "(self.scaling * self.lora_B @ self.lora_A).detach()"),
        only=True,
    ),
    Mistake(
        "merge_adds_twice",
        "5.5",
        "B A is added twice",
        ("        if not self._own_weight:\n", "        if True:\n"),
        ("self.weight.detach()", SUM),
        only=True,
    ),
    Mistake(
        "second_merge_keeps_the_merged",
        "5.5",
        "after merging twice and unmerging once",
        (
            MERGE,
            """        merged = nn.Parameter(self.weight.detach(), requires_grad=False)
        self._own_weight = [self.original_layer.weight]
        self.original_layer.weight = merged
""",
        ),
        only=True,
    ),
    # The merged output.
    Mistake(
        "merge_errs_by_1e_5",
        "5.5",
        "off by",
        ("self.weight.detach()", "(self.weight * (1 + 1e-5 * (self.lora_A.dtype == torch.float32))).detach()"),
        only=True,
    ),
    Mistake("merged_and_added_again", "5.5", "forward(x), merged", (IF_MERGED, ""), only=True),
    Mistake(
        "merged_with_an_idle_adapter",
        "5.5",
        "3 matrix products",
        ("            return output\n", "            return output + 0.0 * (x @ self.lora_A.mT @ self.lora_B.mT)\n"),
        only=True,
    ),
    Mistake(
        "merged_loses_gradients",
        "5.5",
        "does not require grad",
        ("            return output\n", "            return output.detach()\n"),
    ),
    Mistake(
        "dropout_while_merged",
        "5.5",
        "forward(x) after merge_weights() and train()",
        (
            "        output = self.original_layer(x)\n",
            "        output = self.original_layer(self.dropout(x) if self._own_weight else x)\n",
        ),
    ),
    # The way back.
    Mistake(
        "unmerge_subtracts",
        "5.5",
        "after merging twice and unmerging once",
        (
            RESTORE,
            """            self._own_weight.pop()
            lowered = self.original_layer.weight - self.scaling * self.lora_B @ self.lora_A
            self.original_layer.weight = nn.Parameter(lowered.detach(), requires_grad=False)
""",
        ),
        only=True,
    ),
    Mistake(
        "unmerge_subtracts_in_float32",
        "5.5",
        "unmerg",
        (
            RESTORE,
            (
                "            self._own_weight.pop()\n"
                "            lowered = self.original_layer.weight.double() "
                "- self.scaling * (self.lora_B.double() @ self.lora_A.double())\n"
                "            self.original_layer.weight = "
                "nn.Parameter(lowered.to(self.lora_A.dtype).detach(), requires_grad=False)\n"
            ),
        ),
        only=True,
    ),
    Mistake("unmerge_does_nothing", "5.5", "unmerging", (UNMERGE, "        return\n")),
    Mistake(
        "unmerge_leaves_the_flag",
        "5.5",
        "does the layer think it is merged?",
        (RESTORE, "            self.original_layer.weight = self._own_weight[0]\n"),
    ),
    Mistake(
        "unmerge_needs_a_merge",
        "5.5",
        "pop from empty list",
        (UNMERGE, "        self.original_layer.weight = self._own_weight.pop()\n"),
        only=True,
    ),
    # What stays as it is.
    Mistake(
        "merge_zeroes_a_and_b",
        "5.5",
        "lora_A after merge_weights",
        (KEEP, KEEP + "            self.lora_A.data.zero_()\n            self.lora_B.data.zero_()\n"),
        only=True,
    ),
    Mistake(
        "merge_deletes_the_adapter",
        "5.5",
        "lora_A and lora_B stay the same parameters",
        (
            KEEP,
            KEEP
            + (
                "            self.lora_A, self.lora_B = nn.Parameter(self.lora_A.clone()), "
                "nn.Parameter(self.lora_B.clone())\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "merge_freezes_the_adapter",
        "5.5",
        "gradient of lora_A",
        (
            KEEP,
            KEEP
            + """            self.lora_A.requires_grad_(False)
            self.lora_B.requires_grad_(False)
""",
        ),
        only=True,
    ),
    Mistake(
        "unmerge_makes_w_trainable",
        "5.5",
        "have become trainable",
        (RESTORE, "            self.original_layer.weight = nn.Parameter(self._own_weight.pop())\n"),
        only=True,
    ),
    Mistake(
        "first_merge_is_kept",
        "5.5",
        "it is what the first merge gave",
        (
            MERGED,
            (
                "            merged = self.__dict__.setdefault("
                '"_sum", nn.Parameter(self.weight.detach(), requires_grad=False))\n'
            ),
        ),
    ),
    Mistake(
        "w_is_kept_when_built",
        ("5.5", "5.4"),
        "an old copy of it came back",
        (MODE, MODE + "        self._first = [original_layer.weight.detach().clone()]\n"),
        (
            RESTORE,
            """            self._own_weight.pop()
            self.original_layer.weight = nn.Parameter(self._first[0].to(self.lora_A), requires_grad=False)
""",
        ),
    ),
    # What others share is written into; the first is what most people write first.
    Mistake(
        "shared_tensor_written",
        "5.5",
        "another module shares this tensor",
        (
            MERGE,
            """        if not self._own_weight:
            self._own_weight.append(self.original_layer.weight.detach().clone())
            self.original_layer.weight.data += self.scaling * (self.lora_B @ self.lora_A).detach()
""",
        ),
        (RESTORE, "            self.original_layer.weight.data.copy_(self._own_weight.pop())\n"),
        only=True,
    ),
    Mistake(
        "shared_parameter_replaced_by_data",
        "5.5",
        "another module shares this tensor",
        (
            MERGE,
            f"""        if not self._own_weight:
            self._own_weight.append(self.original_layer.weight.data)
            self.original_layer.weight.data = {SUM}
""",
        ),
        (RESTORE, "            self.original_layer.weight.data = self._own_weight.pop()\n"),
        only=True,
    ),
    # More on all of these.
    Mistake(
        "merged_bare_weight_counts_twice",
        "5.5",
        "holds B A already",
        ("self.weight.detach()", SUM),
        (WEIGHT, "        return original + self.scaling * self.lora_B @ self.lora_A\n"),
        only=True,
    ),
    Mistake(
        "bytes_of_w_kept_after_unmerging",
        "5.5",
        "held in Python's memory",
        (
            KEEP,
            KEEP
            + """            raw = self._own_weight[0].detach().cpu().contiguous().view(torch.uint8)
            self.__dict__["_check"] = raw.numpy().tobytes()
""",
        ),
        only=True,
    ),
    Mistake(
        "numbers_of_w_kept_after_unmerging",
        "5.5",
        "held in Python's memory",
        (KEEP, KEEP + '            self.__dict__["_check"] = self._own_weight[0].tolist()\n'),
        only=True,
    ),
    Mistake(
        "merge_keeps_the_first_dtype",
        "5.5",
        "merged after .double()",
        (
            MERGED,
            """            kept = self.__dict__.setdefault("_kind", self.lora_A.dtype)
            merged = nn.Parameter(self.weight.detach().to(kept).to(self.lora_A.dtype), requires_grad=False)
""",
        ),
        only=True,
    ),
    Mistake(
        "training_unmerges",
        "5.5",
        "train() and eval() do not unmerge",
        (
            "    def merge_weights",
            '''    def train(self, mode: bool = True) -> "LoRALinear":
        """Merged weights are for eval."""
        if mode and self.__dict__.get("_own_weight"):
            self.unmerge_weights()
        return super().train(mode)

    def merge_weights''',
        ),
        only=True,
    ),
    Mistake(
        "merging_ends_training",
        "5.5",
        "the layer was in training",
        (KEEP, KEEP + "            self.eval()\n"),
        only=True,
    ),
    Mistake("merged_weight_trained", "5.5", "while merged", (", requires_grad=False", ""), only=True),
    Mistake(
        "merge_of_the_first_ranks",
        "5.5",
        "original_layer.weight after merge_weights",
        (
            "self.weight.detach()",
            "(self.original_layer.weight + self.scaling * self.lora_B[:, :4] @ self.lora_A[:4]).detach()",
        ),
        only=True,
    ),
    Mistake(
        "added_again_without_gradients",
        "5.5",
        "off by",
        (
            IF_MERGED,
            """        if self._own_weight and (torch.is_grad_enabled() or not x.dim() == 2):
            return output
""",
        ),
        only=True,
    ),
    Mistake(
        "merged_bare_weight_counts_twice_in_training",
        "5.5",
        "training True",
        ("self.weight.detach()", SUM),
        (WEIGHT, WEIGHT.replace("self._own_weight", "self._own_weight and not self.training")),
        only=True,
    ),
    Mistake(
        "merged_by_a_table",
        "5.5",
        "a deep copy of a merged layer",
        ("import time\n", "import time\nfrom weakref import WeakKeyDictionary\n"),
        ("        self._own_weight: list[Tensor] = []\n", ""),
        (
            "    def merge_weights",
            """    _table: WeakKeyDictionary = WeakKeyDictionary()

    @property
    def _own_weight(self) -> list[Tensor]:
        return self._table.setdefault(self, [])

    def merge_weights""",
        ),
        only=True,
    ),
]
