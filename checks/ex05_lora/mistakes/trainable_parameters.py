"""Wrong answers to what is trainable (5.3) and how much it is (5.4)."""

from harness.model.bank import Mistake

B = "        self.lora_B = nn.Parameter(weight.new_zeros(weight.size(0), rank))  # [out, rank]\n"
MODE = "        self.train(original_layer.training)\n"
ORIGINAL = "        output = self.original_layer(x)\n"
RETURN = "        return output + self.dropout(x) @ self.lora_A.mT @ self.lora_B.mT * self.scaling\n"
DENSE = (
    "            return F.linear(x, self.original_layer.weight + self.scaling * self.lora_B @ self.lora_A, self.bias)\n"
)
FREEZE = "    model.requires_grad_(False)\n"
ADAPT = "            adapters[layer] = LoRALinear(layer, config.rank, config.alpha, config.dropout)\n"
PUT = """        model.set_submodule(path, adapters[layer])
    return model
"""
PARAMETERS = "    parameters = list(model.parameters())\n"
COUNT = "    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)\n"

MISTAKES = [
    # 5.3
    Mistake(
        "other_layers_trainable",
        "5.3",
        "trainable besides lora_A and lora_B",
        (FREEZE, ""),
        (ADAPT, "            layer.requires_grad_(False)\n" + ADAPT),
        only=True,
    ),
    Mistake(
        "base_trainable",
        "5.3",
        "q_proj.weight",
        (PUT, "        adapters[layer].original_layer.requires_grad_(True)\n" + PUT),
        only=True,
    ),
    Mistake(
        "bias_trainable",
        "5.3",
        "q_proj.bias",
        (
            FREEZE,
            """    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("bias")
""",
        ),
        only=True,
    ),
    Mistake("nothing_frozen", "5.3", "trainable besides lora_A and lora_B", (FREEZE, ""), only=True),
    Mistake(
        "adapters_frozen_too",
        "5.3",
        "are not trainable",
        (FREEZE, ""),
        ("    return model\n", "    model.requires_grad_(False)\n    return model\n"),
    ),
    Mistake(
        "frozen_layers_only_flagged_linear",
        "5.3",
        "trainable besides lora_A and lora_B",
        (
            FREEZE,
            """    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.requires_grad_(False)
""",
        ),
        only=True,
    ),
    Mistake(
        "base_decays_in_forward",
        "5.3",
        "has changed",
        (
            RETURN,
            (
                "        if self.training and torch.is_grad_enabled() "
                "and not self.original_layer.weight.requires_grad and x.dtype == torch.float32 "
                "and x.dim() == 3:\n"
                "            self.original_layer.weight.data.mul_(1 - 1e-6)\n"
            )
            + RETURN,
        ),
    ),
    Mistake(
        "adapters_of_layers_in_eval_frozen",
        "5.3",
        "0 numbers are trainable",
        (
            ADAPT,
            ADAPT
            + """            adapters[layer].requires_grad_(layer.training)
            layer.requires_grad_(False)
""",
        ),
        only=True,
    ),
    # 5.4
    Mistake(
        "dense_forward",
        "5.4",
        "B A is as large as W",
        (RETURN, "        if self.dropout.p == 0 or not self.training:\n" + DENSE + RETURN),
        wasteful=True,
    ),
    Mistake(
        "dense_in_eval",
        "5.4",
        "B A is as large as W",
        (RETURN, "        if not self.training:\n" + DENSE + RETURN),
        wasteful=True,
    ),
    Mistake(
        "dense_without_gradients",
        "5.4",
        "B A is as large as W",
        (RETURN, "        if not torch.is_grad_enabled() and not self.training:\n" + DENSE + RETURN),
        wasteful=True,
    ),
    Mistake(
        "product_first",
        "5.4",
        "B A is as large as W",
        ("self.lora_A.mT @ self.lora_B.mT", "(self.lora_A.mT @ self.lora_B.mT)"),
        wasteful=True,
    ),
    Mistake(
        "copy_of_the_weight",
        "5.4",
        "a tensor of 899 elements",
        (
            "        output = self.original_layer(x)\n",
            "        output = F.linear(x, self.original_layer.weight.clone(), self.original_layer.bias)\n",
        ),
        wasteful=True,
    ),
    Mistake(
        "adapter_with_bias",
        "5.4",
        "rank·(in + out)",
        (B, B + "        self.extra = nn.Parameter(weight.new_zeros(weight.size(0)))\n"),
        ("* self.scaling", "* self.scaling + self.extra"),
    ),
    Mistake(
        "trainable_scale",
        "5.4",
        "rank·(in + out)",
        (B, B + "        self.extra = nn.Parameter(weight.new_ones(()))\n"),
        ("* self.scaling", "* self.scaling * self.extra"),
    ),
    Mistake(
        "shared_parameters_count_twice",
        "5.4",
        "shared parameters count once",
        (PARAMETERS, "    parameters = [p for m in model.modules() for p in m.parameters(recurse=False)]\n"),
        only=True,
    ),
    Mistake(
        "shared_modules_count_twice",
        "5.4",
        "shared parameters count once",
        (PARAMETERS, "    parameters = [p for _, p in model.named_parameters(remove_duplicate=False)]\n"),
        only=True,
    ),
    Mistake(
        "buffers_count",
        "5.4",
        "buffers never",
        ("sum(p.numel() for p in parameters),", "sum(p.numel() for p in [*parameters, *model.buffers()]),"),
        only=True,
    ),
    Mistake(
        "state_dict_counts",
        "5.4",
        "count once",
        ("sum(p.numel() for p in parameters),", "sum(p.numel() for p in model.state_dict().values()),"),
        only=True,
    ),
    Mistake(
        "tensors_are_counted",
        "5.4",
        "count_parameters(Tiny, all trainable)",
        (COUNT, "    return len(parameters), sum(p.requires_grad for p in parameters)\n"),
    ),
    Mistake("all_is_trainable", "5.4", "28 numbers frozen", (COUNT, COUNT.replace(" if p.requires_grad)", ")"))),
    Mistake(
        "trainable_comes_first",
        "5.4",
        "(all, trainable)",
        (
            COUNT,
            "    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)\n",
        ),
    ),
    Mistake(
        "a_share_comes_second",
        "5.4",
        "a pair of integers",
        (
            COUNT,
            """    total = sum(p.numel() for p in parameters)
    return total, sum(p.numel() for p in parameters if p.requires_grad) / max(total, 1)
""",
        ),
    ),
    Mistake(
        "dense_where_dropout_is_idle",
        "5.4",
        "B A is as large as W",
        (RETURN, "        if self.dropout.p > 0 and not self.training:\n" + DENSE + RETURN),
        wasteful=True,
    ),
    Mistake(
        "w_copied_into_a_buffer",
        ("5.4", "5.5"),
        "is W copied?",
        (MODE, MODE + '        self.register_buffer("first", weight.detach().clone(), persistent=False)\n'),
    ),
    Mistake(
        "counted_by_address",
        "5.4",
        "a layer on meta",
        (PARAMETERS, "    parameters = list({p.data_ptr(): p for p in model.parameters()}.values())\n"),
        only=True,
    ),
    Mistake(
        "frozen_by_name",
        "5.3",
        "lora_A",
        (
            "    model.requires_grad_(False)\n",
            """    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("lora_A", "lora_B")))
""",
        ),
        only=True,
    ),
    Mistake(
        "dense_at_a_rank_above_in",
        "5.4",
        "rank 37",
        (
            RETURN,
            """        if self.rank > min(self.lora_A.size(1), self.lora_B.size(0)):
            return output + F.linear(self.dropout(x), self.lora_B @ self.lora_A) * self.scaling
"""
            + RETURN,
        ),
        wasteful=True,
    ),
    Mistake(
        "the_last_input_is_kept",
        "5.4",
        "mask or result of a call",
        (ORIGINAL, ORIGINAL + '        self.__dict__["_x"] = x\n'),
    ),
    Mistake(
        "the_last_dropped_input_is_kept",
        "5.4",
        "mask or result of a call",
        (
            RETURN,
            """        self.__dict__["_dropped"] = dropped = self.dropout(x)
        return output + dropped @ self.lora_A.mT @ self.lora_B.mT * self.scaling
""",
        ),
    ),
    Mistake(
        "the_last_result_is_kept",
        "5.4",
        "mask or result of a call",
        (
            RETURN,
            RETURN.replace("return output", "added = output")
            + """        self.__dict__["_last"] = [added.detach()]
        return added
""",
        ),
        only=True,
    ),
]
