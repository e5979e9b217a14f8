"""Wrong answers to saving and loading the adapter alone (5.8)."""

from harness.model.bank import Mistake

SAVE = (
    "    return {key: value.clone() for key, value in model.state_dict().items() "
    'if key.endswith(("lora_A", "lora_B"))}\n'
)

MISTAKES = [
    Mistake(
        "everything_saved",
        "5.8",
        "and nothing of the base",
        (SAVE, "    return {key: value.clone() for key, value in model.state_dict().items()}\n"),
        only=True,
    ),
    Mistake(
        "whole_adapted_layers_saved",
        "5.8",
        "and nothing of the base",
        (
            SAVE,
            """    paths = tuple(n for n, m in model.named_modules() if isinstance(m, LoRALinear))
    return {k: v.clone() for k, v in model.state_dict().items() if k.startswith(paths)}
""",
        ),
        only=True,
    ),
    Mistake("nothing_saved", "5.8", "0 numbers in 0 tensors", (SAVE, "    return {}\n"), only=True),
    Mistake("b_alone_saved", "5.8", "save A and B", ('("lora_A", "lora_B")', '"lora_B"'), only=True),
    Mistake("references_saved", "5.8", "a reference was saved", ("value.clone()", "value"), only=True),
    Mistake("keys_renamed", "5.8", "unexpected keys", ("{key: value", '{f"adapter.{key}": value'), only=True),
    Mistake(
        "keys_without_paths",
        "5.8",
        "numbers in 2 tensors",
        (
            SAVE,
            (
                '    return {key.split(".")[-1]: value.clone() '
                'for key, value in model.state_dict().items() if "lora_" in key}\n'
            ),
        ),
        only=True,
    ),
    Mistake(
        "products_saved",
        "5.8",
        "the adapters hold",
        (
            SAVE,
            (
                '    return {f"{n}.weight": (m.lora_B @ m.lora_A).detach() '
                "for n, m in model.named_modules() if isinstance(m, LoRALinear)}\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "a_and_b_swapped",
        "5.8",
        "size mismatch",
        (
            SAVE,
            (
                '    parts = {"lora_A": "lora_B", "lora_B": "lora_A"}\n'
                '    return {f"{n}.{k}": getattr(m, p).detach().clone() for n, m in model.named_modules() '
                "if isinstance(m, LoRALinear) for k, p in parts.items()}\n"
            ),
        ),
        only=True,
    ),
    Mistake("saved_in_float16", "5.8", "after loading", ("value.clone()", "value.half()"), only=True),
    Mistake("lists_saved", "5.8", "where tensors were wanted", ("value.clone()", "value.tolist()"), only=True),
    Mistake(
        "parameters_in_a_list",
        "5.8",
        "a list came",
        (SAVE, "    return [p.detach().clone() for p in model.parameters() if p.requires_grad]\n"),
        only=True,
    ),
    Mistake(
        "what_is_trainable_is_saved",
        "5.8",
        "and nothing of the base",
        (SAVE, "    return {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}\n"),
        only=True,
    ),
    Mistake(
        "lora_anywhere_in_the_key",
        "5.8",
        "base layers",
        ('key.endswith(("lora_A", "lora_B"))', '"lora" in key'),
        only=True,
    ),
    Mistake(
        "nothing_saved_while_merged",
        "5.8",
        "saved while merged: q_proj.lora_A is not in what was saved",
        (
            SAVE,
            (
                "    adapters = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear) "
                "and not m._own_weight}\n"
                '    return {f"{n}.{part}": getattr(m, part).detach().clone() '
                'for n, m in adapters.items() for part in ("lora_A", "lora_B")}\n'
            ),
        ),
        only=True,
    ),
    Mistake("saved_in_float32", "5.8", "after loading", ("value.clone()", "value.float()")),
]
