"""Wrong answers to following the layer (5.7): dtype, device, mode and dropout."""

from harness.model.bank import Mistake

B = "        self.lora_B = nn.Parameter(weight.new_zeros(weight.size(0), rank))  # [out, rank]\n"
DROPOUT = "        self.dropout = nn.Dropout(dropout)\n"
MODE = "        self.train(original_layer.training)\n"
ORIGINAL = "        output = self.original_layer(x)\n"
RETURN = "        return output + self.dropout(x) @ self.lora_A.mT @ self.lora_B.mT * self.scaling\n"
ADAPT = "            adapters[layer] = LoRALinear(layer, config.rank, config.alpha, config.dropout)\n"

MISTAKES = [
    Mistake(
        "adapter_in_float32",
        "5.7",
        "torch.float32 came, torch.bfloat16 was wanted",
        (
            "        start = torch.randn(rank, weight.size(1), dtype=weight.dtype, device=weight.device)\n",
            "        start = torch.randn(rank, weight.size(1), device=weight.device)\n",
        ),
        (B, "        self.lora_B = nn.Parameter(torch.zeros(weight.size(0), rank, device=weight.device))\n"),
        only=True,
    ),
    Mistake(
        "adapter_on_the_cpu",
        "5.7",
        "on cpu",
        (", device=weight.device", ""),
        (B, "        self.lora_B = nn.Parameter(torch.zeros(weight.size(0), rank, dtype=weight.dtype))\n"),
        only=True,
    ),
    Mistake(
        "dtype_of_the_model",
        "5.7",
        "apply_lora_to_model on a layer in torch.bfloat16",
        (
            "    return model\n",
            (
                "    kind = next(model.parameters())\n"
                "    for adapter in adapters.values():\n"
                "        adapter.lora_A.data, adapter.lora_B.data = adapter.lora_A.data.to(kind.dtype), "
                "adapter.lora_B.data.to(kind.dtype)\n"
                "    return model\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "output_in_float32",
        "5.7",
        "torch.float32 came, torch.bfloat16 was wanted",
        (
            "self.dropout(x) @ self.lora_A.mT @ self.lora_B.mT",
            (
                "(self.dropout(x).float() @ self.lora_A.float().mT @ self.lora_B.float().mT "
                "if x.dtype == torch.bfloat16 else self.dropout(x) @ self.lora_A.mT @ self.lora_B.mT)"
            ),
        ),
        only=True,
    ),
    Mistake(
        "factor_left_behind",
        "5.7",
        "meta",
        (MODE, MODE + "        self._factor = [torch.tensor(self.scaling, device=weight.device)]\n"),
        (
            "* self.scaling",
            (
                "* torch.ones(1) * self.scaling if x.is_meta "
                "else output + self.dropout(x) @ self.lora_A.mT @ self.lora_B.mT * self.scaling"
            ),
        ),
        only=True,
    ),
    Mistake(
        "dropout_on_the_original_too",
        "5.7",
        "what reaches A",
        ("self.dropout(x)", "x"),
        (ORIGINAL, "        if not self._own_weight:\n            x = self.dropout(x)\n" + ORIGINAL),
        only=True,
    ),
    Mistake(
        "dropout_on_the_output",
        "5.7",
        "what reaches A",
        (RETURN, "        return self.dropout(output + x @ self.lora_A.mT @ self.lora_B.mT * self.scaling)\n"),
        only=True,
    ),
    Mistake(
        "dropout_between_a_and_b",
        "5.7",
        "what reaches A",
        (RETURN, "        return output + self.dropout(x @ self.lora_A.mT) @ self.lora_B.mT * self.scaling\n"),
        only=True,
    ),
    Mistake("no_dropout", "5.7", "nothing is dropped", ("self.dropout(x)", "x"), only=True),
    Mistake(
        "dropout_without_rescaling",
        "5.7",
        "what reaches A",
        ("self.dropout(x)", "(self.dropout(x) * (1 - self.dropout.p) if self.training else x)"),
        only=True,
    ),
    Mistake(
        "dropout_in_eval", "5.7", "dropout acts in eval", ("self.dropout(x)", "F.dropout(x, self.dropout.p)"), only=True
    ),
    Mistake(
        "whole_features_dropped",
        "5.7",
        "for all rows",
        (
            "self.dropout(x)",
            "(x * self.dropout(torch.ones_like(x[..., :1, :])) if x.dim() > 1 and x.numel() else self.dropout(x))",
        ),
        only=True,
    ),
    Mistake(
        "whole_rows_dropped",
        "5.7",
        "for all features",
        ("self.dropout(x)", "(x * self.dropout(torch.ones_like(x[..., :1])))"),
        only=True,
    ),
    Mistake(
        "fixed_dropout",
        "5.7",
        "what reaches A",
        (DROPOUT, "        self.dropout = nn.Dropout(0.1 if dropout else 0.0)\n"),
        only=True,
    ),
    Mistake(
        "dropout_seeded",
        "5.7",
        "two calls drop the same elements",
        (ORIGINAL, "        if self.training and not x.is_meta:\n            torch.manual_seed(0)\n" + ORIGINAL),
    ),
    Mistake("config_dropout_lost", "5.7", "dropout", (", config.dropout", ""), only=True),
    Mistake("mode_not_taken_over", "5.7", "flag is True", (MODE, ""), only=True),
    Mistake(
        "flag_taken_over_dropout_not",
        "5.7",
        "although the layer is in eval",
        (MODE, "        self.training = original_layer.training\n"),
        only=True,
    ),
    Mistake(
        "dropout_of_rows_in_batches",
        "5.7",
        "for all features",
        (DROPOUT, "        self.dropout = nn.Dropout2d(dropout)\n"),
        only=True,
    ),
    Mistake(
        "one_mask_for_the_batch",
        "5.7",
        "for all rows",
        ("self.dropout(x)", "(x * self.dropout(torch.ones_like(x[:1])) if x.dim() > 2 else self.dropout(x))"),
        only=True,
    ),
    Mistake(
        "no_dropout_without_gradients",
        "5.7",
        "nothing is dropped",
        ("self.dropout(x)", "(self.dropout(x) if torch.is_grad_enabled() else x)"),
        only=True,
    ),
    Mistake(
        "mode_taken_over_when_applied",
        "5.7",
        "its own flag is True",
        (MODE, ""),
        (ADAPT, ADAPT + "            adapters[layer].train(layer.training)\n"),
        only=True,
    ),
    Mistake(
        "left_on_the_first_calls_device",
        "5.7",
        "meta",
        (
            RETURN,
            (
                '        one = self.__dict__.setdefault("_one", torch.ones(1, dtype=x.dtype, '
                "device=x.device)).to(x.dtype)\n"
            )
            + RETURN,
        ),
        ("* self.scaling", "* self.scaling * one"),
    ),
    Mistake(
        "one_mask_where_x_is_expanded",
        "5.7",
        "the same elements are dropped for all",
        (
            RETURN,
            """        dropped = x
        if self.training and self.dropout.p > 0:
            dropped = self.dropout(x[tuple(slice(None if stride else 1) for stride in x.stride())]).expand(x.shape)
        return output + dropped @ self.lora_A.mT @ self.lora_B.mT * self.scaling
""",
        ),
        only=True,
    ),
    Mistake(
        "mask_drawn_in_bfloat16",
        "5.7",
        "multiples of 1/256",
        (
            RETURN,
            """        if self.training and 0 < self.dropout.p < 1:
            x = torch.where(torch.rand_like(x) < self.dropout.p, 0.0, x / (1 - self.dropout.p))
            return output + x @ self.lora_A.mT @ self.lora_B.mT * self.scaling
"""
            + RETURN,
        ),
        only=True,
    ),
    Mistake(
        "a_rare_dropout_is_skipped",
        "5.7",
        "0 of 40000 elements are dropped",
        (DROPOUT, "        self.dropout = nn.Dropout(dropout if dropout > 0.01 else 0.0)\n"),
        only=True,
    ),
]
