"""Wrong answers to the formula (5.1), and what does nothing at all."""

from harness.model.bank import Mistake

SCALING = "        self.scaling = alpha / rank\n"
MODE = "        self.train(original_layer.training)\n"
ORIGINAL = "        output = self.original_layer(x)\n"
RETURN = "        return output + self.dropout(x) @ self.lora_A.mT @ self.lora_B.mT * self.scaling\n"
RANK = """    if config.rank < 1:
        raise ValueError(f"rank {config.rank} is below 1")
"""
ADAPT = "            adapters[layer] = LoRALinear(layer, config.rank, config.alpha, config.dropout)\n"

MISTAKES = [
    # Nothing at all.
    Mistake(
        "zeros",
        ("5.1", "5.2", "5.4", "5.5"),
        "differ",
        (RETURN, "        return torch.zeros_like(output)\n"),
        ("            return output\n", "            return torch.zeros_like(output)\n"),
    ),
    Mistake("identity", ("5.1", "5.2"), "forward([[4, 1], [0, 0]])", (RETURN, "        return x\n")),
    Mistake("none", ("5.1", "5.2"), "None came", (RETURN, "        return None\n")),
    Mistake("adapter_ignored", "5.1", "forward([[4, 1], [0, 0]])", (RETURN, "        return output\n")),
    # The formula, the start and the gradients.
    Mistake("original_ignored", "5.1", "forward([[4, 1], [0, 0]])", ("output + ", "")),
    Mistake("no_scaling", "5.1", "forward([[4, 1], [0, 0]])", (" * self.scaling", "")),
    Mistake("scaled_by_alpha", "5.1", "forward([[4, 1], [0, 0]])", (SCALING, "        self.scaling = alpha\n")),
    Mistake("integer_scaling", "5.1", "forward([[4, 1], [0, 0]])", (SCALING, "        self.scaling = alpha // rank\n")),
    Mistake(
        "scaled_for_floats_only",
        "5.1",
        "0.75 was wanted",
        (SCALING, "        self.scaling = alpha / rank if isinstance(alpha, float) else 1.0\n"),
    ),
    Mistake(
        "ranks_above_4_are_cut",
        "5.1",
        "rank 16",
        ("self.lora_A.mT @ self.lora_B.mT", "self.lora_A[:4].mT @ self.lora_B[:, :4].mT"),
    ),
    Mistake(
        "both_random",
        "5.1",
        "forward of a new adapter",
        ("weight.new_zeros(weight.size(0), rank)", "torch.randn_like(weight[:, :1].expand(-1, rank))"),
        only=True,
    ),
    Mistake(
        "small_random_b",
        "5.1",
        "forward of a new adapter",
        ("weight.new_zeros(weight.size(0), rank)", "1e-6 * torch.randn_like(weight[:, :1].expand(-1, rank))"),
        only=True,
    ),
    Mistake("both_zero", "5.1", "all zeros", ("start * weight.size(1)", "start * 0 * weight.size(1)")),
    Mistake(
        "a_zero_and_b_random",
        "5.1",
        "lora_B of a new adapter",
        ("start * weight.size(1)", "start * 0 * weight.size(1)"),
        ("weight.new_zeros(", "weight.new_ones("),
    ),
    Mistake("a_all_alike", "5.1", "lora_A of", ("torch.randn(rank", "torch.ones(rank"), only=True),
    Mistake(
        "shapes_transposed",
        "5.1",
        "was wanted",
        ("start * weight.size(1) ** -0.5", "start.mT.clone()"),
        ("weight.size(0), rank", "rank, weight.size(0)"),
        (RETURN, RETURN.replace(".mT", "")),
        ("self.lora_B @ self.lora_A", "(self.lora_A @ self.lora_B).mT"),
    ),
    Mistake("x_detached", "5.1", "gradient of x", ("self.dropout(x)", "self.dropout(x.detach())"), only=True),
    Mistake("output_of_the_original_detached", "5.1", "gradient of x", ("output + ", "output.detach() + "), only=True),
    Mistake("a_detached", "5.1", "gradient of lora_A", ("self.lora_A.mT", "self.lora_A.detach().mT")),
    Mistake(
        "no_gradients_in_eval",
        "5.1",
        "no gradient",
        (ORIGINAL, "        torch.set_grad_enabled(self.training and torch.is_grad_enabled())\n" + ORIGINAL),
    ),
    Mistake(
        "stale_product_in_eval",
        "5.1",
        "something is kept from before",
        (
            ORIGINAL,
            """        if not self.training and not self._own_weight and not torch.is_grad_enabled():
            self.__dict__.setdefault("_a", self.lora_A.detach().clone())
            return self.original_layer(x) + x @ self.__dict__["_a"].mT @ self.lora_B.mT * self.scaling
"""
            + ORIGINAL,
        ),
    ),
    Mistake(
        "copy_of_w",
        "5.1",
        "forward([[4, 1], [0, 0]])",
        (MODE, MODE + "        self._w = [original_layer.weight.detach().double().clone()]\n"),
        (ORIGINAL, "        output = F.linear(x, self._w[0].to(x), self.original_layer.bias)\n"),
    ),
    Mistake(
        "default_rank_8",
        "5.1",
        "shape (8, 11) came",
        ("original_layer: nn.Linear, rank: int = 4,", "original_layer: nn.Linear, rank: int = 8,"),
    ),
    Mistake(
        "default_alpha_16",
        "5.1",
        "LoRALinear(layer)(x)",
        ("rank: int = 4, alpha: float = 1.0", "rank: int = 4, alpha: float = 16.0"),
        only=True,
    ),
    Mistake(
        "rank_0_accepted",
        "5.1",
        "was accepted",
        (RANK, ""),
        (SCALING, "        rank = max(rank, 1)\n" + SCALING),
        only=True,
    ),
    Mistake(
        "rank_0_alone_is_refused",
        "5.1",
        "rank -3",
        ("config.rank < 1", "config.rank == 0"),
        (SCALING, "        rank = max(rank, 1)\n" + SCALING),
        only=True,
    ),
    Mistake("rank_divides_by_zero", "5.1", "ValueError was wanted", (RANK, ""), only=True),
    Mistake(
        "rank_at_most_in_and_out",
        "5.1",
        "rank 29",
        (SCALING, SCALING + "        used = min(rank, *original_layer.weight.shape)\n"),
        (MODE, MODE + "        self.used = used\n"),
        ("self.lora_A.mT @ self.lora_B.mT", "self.lora_A[: self.used].mT @ self.lora_B.mT[: self.used]"),
        only=True,
    ),
    Mistake("alpha_0_is_1", "5.1", "alpha 0", (SCALING, "        self.scaling = (alpha or 1.0) / rank\n"), only=True),
    Mistake("a_the_same_everywhere", "5.1", "the same numbers", ("torch.randn(rank", "torch.eye(rank"), only=True),
    Mistake(
        "copy_of_the_bias",
        "5.1",
        "it is the output by the old bias",
        (MODE, MODE + "        self._b = [t.detach().clone() for t in [original_layer.bias] if t is not None]\n"),
        (
            ORIGINAL,
            """        bias = self._b[0].to(x) if self._b else None
        output = F.linear(x, self.original_layer.weight, bias)
""",
        ),
    ),
    Mistake(
        "the_layer_is_copied",
        ("5.1", "5.4"),
        "not the layer that was given",
        (
            "        self.original_layer = original_layer\n",
            "        self.original_layer = copy.deepcopy(original_layer)\n",
        ),
        ("import time\n", "import copy\nimport time\n"),
    ),
    Mistake(
        "b_random_once_applied",
        "5.1",
        "output of a freshly adapted model",
        (ADAPT, ADAPT + "            nn.init.normal_(adapters[layer].lora_B)\n"),
        only=True,
    ),
    Mistake(
        "x_detached_by_dropout",
        "5.1",
        "gradient of x: the output moves",
        ("self.dropout(x)", "self.dropout(x.detach() if self.training and self.dropout.p > 0 else x)"),
    ),
    Mistake(
        "rows_repeat_beyond_in",
        "5.1",
        "of its 29 rows differ",
        (
            "        self.lora_A = nn.Parameter(start * ",
            """        start = start[torch.arange(rank) % weight.size(1)]
        self.lora_A = nn.Parameter(start * """,
        ),
        only=True,
    ),
    Mistake(
        "matrices_looked_up_once",
        "5.1",
        "assign=True",
        (MODE, MODE + '        self.__dict__["_thin"] = self.lora_A, self.lora_B\n'),
        (
            RETURN,
            """        a, b = self.__dict__["_thin"]
        return output + self.dropout(x) @ a.mT @ b.mT * self.scaling
""",
        ),
        only=True,
    ),
    Mistake(
        "bias_looked_up_once",
        "5.1",
        "assign=True",
        (MODE, MODE + '        self.__dict__["_shift"] = original_layer.bias\n'),
        (ORIGINAL, '        output = F.linear(x, self.original_layer.weight, self.__dict__["_shift"])\n'),
    ),
]
