"""Wrong answers to ex06 that wrap other layers than the chosen ones, or change the state_dict (6.1)."""

from harness.model.bank import Mistake

FLAG = "        self.training = module.training\n"
SAVE_HOOK = "        self.register_state_dict_post_hook(_remove_own_name)\n"
LOAD_HOOK = "        self.register_load_state_dict_pre_hook(_insert_own_name)\n"
RENAME = """    taken = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(old)}
    state_dict.update({new + key.removeprefix(old): value for key, value in taken.items()})
"""
ZERO = """        if self.checkpoint_every_n_layers == 0:
            return
"""
CHOSEN = "        for name in list(_layer_names(model, layer_pattern))[:: self.checkpoint_every_n_layers]:\n"
WRAP = "            setattr(model.get_submodule(owner), attribute, CheckpointWrapper(model.get_submodule(name)))\n"
RECORD = "            self.checkpointed_modules.append(name)\n"
IS_LIST = "        is_list = isinstance(child, nn.ModuleList) or (isinstance(child, nn.Sequential) and not in_list)\n"
FOUND = """        if matches and not is_list:
            yield name
        else:
            yield from _layer_names(child, pattern, f"{name}.", in_list=matches)
"""
EVERY_NTH = ":: self.checkpoint_every_n_layers"
IN_ATTRIBUTE = "pattern in attribute"
OTHERWISE = "        else:\n"

MISTAKES = [
    Mistake("every_second_layer", "6.1", "SelectiveCheckpointing(1) on 5 layers", (EVERY_NTH, "::2")),
    Mistake(
        "starts_with_the_last_of_n",
        "6.1",
        "SelectiveCheckpointing(2) on 5 layers",
        ("[:: self", "[self.checkpoint_every_n_layers - 1 :: self"),
    ),
    Mistake(
        "first_n_layers",
        "6.1",
        "SelectiveCheckpointing(1) on 5 layers",
        (EVERY_NTH, ": self.checkpoint_every_n_layers"),
    ),
    Mistake(
        "zero_means_every",
        "6.1",
        "SelectiveCheckpointing(0)",
        (ZERO, ""),
        (EVERY_NTH, EVERY_NTH + " or 1"),
    ),
    Mistake("zero_divides", "6.1", "zero", (ZERO, "")),
    Mistake(
        "counts_list_by_list",
        "6.1",
        "decoder.a.b.layers_.0",
        (
            CHOSEN,
            """        by_list: dict[str, list[str]] = {}
        for name in _layer_names(model, layer_pattern):
            by_list.setdefault(name.rpartition(".")[0], []).append(name)
        for name in (n for names in by_list.values() for n in names[:: self.checkpoint_every_n_layers]):
""",
        ),
        only=True,
    ),
    Mistake(
        "list_wrapped",
        "6.1",
        "checkpointed_modules",
        (
            FOUND,
            """        if matches:
            yield name
        else:
            yield from _layer_names(child, pattern, f"{name}.")
""",
        ),
    ),
    Mistake(
        "sequential_wrapped",
        "6.1",
        "layers.up",
        (IS_LIST, "        is_list = isinstance(child, nn.ModuleList)\n"),
        only=True,
    ),
    Mistake(
        "sequential_elements_split",
        "6.1",
        "layers.0",
        (IS_LIST, "        is_list = isinstance(child, (nn.ModuleList, nn.Sequential))\n"),
        only=True,
    ),
    Mistake(
        "lists_in_lists_wrapped",
        "6.1",
        "layers.0.0",
        (IS_LIST, "        is_list = isinstance(child, (nn.ModuleList, nn.Sequential)) and not in_list\n"),
        only=True,
    ),
    Mistake(
        "sequentials_by_exact_type",
        "6.1",
        "layer1.0",
        ("isinstance(child, nn.Sequential) and not in_list", "type(child) is nn.Sequential and not in_list"),
        only=True,
    ),
    Mistake(
        "children_that_are_none",
        "6.1",
        "layer_x",
        ("in module.named_children():\n        name =", "in module._modules.items():\n        name ="),
        only=True,
    ),
    Mistake(
        "elements_of_other_lists_never_match",
        "6.1",
        "body.last_layer",
        (
            "        matches = in_list or (pattern",
            "        matches = in_list or (not isinstance(module, nn.Sequential) and pattern",
        ),
        only=True,
    ),
    Mistake(
        "breadth_first",
        "6.1",
        "another order",
        (
            FOUND,
            """        if matches and not is_list:
            yield name
    for attribute, child in module.named_children():
        name = prefix + attribute
        matches = in_list or (pattern in attribute and "norm" not in attribute)
"""
            + IS_LIST
            + """        if not matches or is_list:
            yield from _layer_names(child, pattern, f"{name}.", in_list=matches)
""",
        ),
        only=True,
    ),
    Mistake(
        "keep_vars_dropped",
        "6.1",
        "keep_vars",
        (SAVE_HOOK, ""),
        (
            "    def forward(self, *args: Any",
            """\
    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        return self.module.state_dict(*args, destination=destination, prefix=prefix)

    def forward(self, *args: Any""",
        ),
        only=True,
    ),
    Mistake(
        "dict_that_is_loaded_renamed",
        "6.1",
        "the dict that it is given",
        (
            LOAD_HOOK,
            """
    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        _insert_own_name(self, state_dict, "")
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if prefix:
            _insert_own_name(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
""",
        ),
        only=True,
    ),
    Mistake("norms_wrapped", "6.1", "layer_norm", (' and "norm" not in attribute', ""), only=True),
    Mistake(
        "norms_by_suffix",
        "6.1",
        "norm_layers",
        ('"norm" not in attribute', 'not attribute.endswith("norm")'),
        only=True,
    ),
    Mistake(
        "norms_not_searched",
        "6.1",
        "layer_norm.layers.0",
        (OTHERWISE, '        elif "norm" not in attribute:\n'),
        only=True,
    ),
    Mistake(
        "norms_in_a_list_left_out",
        "6.1",
        "layers.norm",
        ("in_list or (pattern in attribute and", "(in_list or pattern in attribute) and ("),
        only=True,
    ),
    Mistake(
        "matched_by_path",
        "6.1",
        "norm_layers.0",
        ("(pattern in attribute", "(pattern in prefix + attribute"),
        only=True,
    ),
    Mistake(
        "matched_by_whole_name", "6.1", "layer1", (IN_ATTRIBUTE, 'attribute in (pattern, pattern + "s")'), only=True
    ),
    Mistake("matched_at_the_start", "6.1", "my_layer2", (IN_ATTRIBUTE, "attribute.startswith(pattern)"), only=True),
    Mistake("pattern_ignored", "6.1", "pattern 'block'", (IN_ATTRIBUTE, '"layer" in attribute'), only=True),
    Mistake(
        "layers_in_layers",
        "6.1",
        "sublayer",
        ("        else:\n            yield from _layer_names", "        yield from _layer_names"),
        ("in_list=matches", "in_list=matches and is_list"),
        only=True,
    ),
    Mistake("top_level_only", "6.1", "encoder.layers.0", (OTHERWISE, "        elif matches:\n"), only=True),
    Mistake(
        "two_levels_only", "6.1", "decoder.a.b.layers_", (OTHERWISE, '        elif prefix.count(".") < 2:\n'), only=True
    ),
    Mistake(
        "lists_only",
        "6.1",
        "layer1",
        ("        if matches and not is_list:\n", "        if in_list and not is_list:\n"),
        only=True,
    ),
    Mistake(
        "names_sorted",
        "6.1",
        "layers.10",
        ("list(_layer_names(model, layer_pattern))", "sorted(_layer_names(model, layer_pattern))"),
        only=True,
    ),
    Mistake(
        "one_list_of_names_for_all",
        "6.1",
        "checkpointed_modules is",
        ("        self.checkpointed_modules: list[str] = []\n", "        self.checkpointed_modules = _NAMES\n"),
        (
            "class SelectiveCheckpointing:\n",
            "_NAMES: list[str] = []\n\n\nclass SelectiveCheckpointing:\n",
        ),
        only=True,
    ),
    Mistake(
        "every_layer_by_default",
        "6.1",
        "SelectiveCheckpointing()",
        ("checkpoint_every_n_layers: int = 2", "checkpoint_every_n_layers: int = 1"),
        only=True,
    ),
    Mistake("names_not_kept", "6.1", "checkpointed_modules is []", (RECORD, ""), only=True),
    Mistake(
        "names_of_what_is_inside",
        "6.1",
        "layers.0.module",
        ("modules.append(name)", 'modules.append(name + ".module")'),
        only=True,
    ),
    Mistake(
        "names_of_all_layers",
        "6.1",
        "checkpointed_modules",
        (RECORD, ""),
        (CHOSEN, "        self.checkpointed_modules += _layer_names(model, layer_pattern)\n" + CHOSEN),
        only=True,
    ),
    Mistake("named_but_not_wrapped", "6.1", "are computed twice", (WRAP, "")),
    Mistake(
        "copies_wrapped", "6.1", "layers", ("model.get_submodule(name)", "copy.deepcopy(model.get_submodule(name))")
    ),
    Mistake(
        "parameters_copied",
        "6.1",
        "new objects",
        (
            FLAG,
            FLAG
            + """        for part in module.modules():
            for name, value in list(part.named_parameters(recurse=False)):
                setattr(part, name, nn.Parameter(value.detach().clone(), value.requires_grad))
""",
        ),
    ),
    Mistake(
        "lists_become_sequentials",
        "6.1",
        "a Sequential came",
        (
            RECORD,
            RECORD
            + """            owned = model.get_submodule(owner)
            if isinstance(owned, nn.ModuleList) and owned:
                above, _, key = owner.rpartition(".")
                setattr(model.get_submodule(above), key, nn.Sequential(*owned))
""",
        ),
        only=True,
    ),
    Mistake("keys_changed", "6.1", "module", (SAVE_HOOK, ""), (LOAD_HOOK, "")),
    Mistake("keys_changed_in_loading", "6.1", "load_state_dict", (LOAD_HOOK, ""), only=True),
    Mistake("keys_changed_in_saving", "6.1", "state_dict of a wrapped model", (SAVE_HOOK, "")),
    Mistake(
        "keys_replaced_everywhere",
        "6.1",
        "_weight",
        (
            '    _rename(state_dict, f"{prefix}module.", prefix)\n',
            """    for key in [key for key in state_dict if key.startswith(prefix)]:
        state_dict[key.replace("module.", "")] = state_dict.pop(key)
""",
        ),
        only=True,
    ),
    Mistake(
        "keys_renamed_one_by_one",
        "6.1",
        "module",
        (
            RENAME,
            """    for key in [key for key in state_dict if key.startswith(old)]:
        state_dict[new + key.removeprefix(old)] = state_dict.pop(key)
""",
        ),
        only=True,
    ),
    Mistake(
        "buffers_forgotten",
        "6.1",
        "offset",
        (
            RENAME,
            RENAME
            + """    if not new.endswith("module."):
        for key in [key for key in state_dict if key.endswith("offset")]:
            del state_dict[key]
""",
        ),
        only=True,
    ),
    Mistake(
        "loading_is_lax",
        "6.1",
        "was accepted",
        (LOAD_HOOK, LOAD_HOOK + "        self.register_load_state_dict_pre_hook(_fill_in)\n"),
        (
            "def _rename(",
            """def _fill_in(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    own = {f"{prefix}module.{key}": value for key, value in module.get_submodule("module").state_dict().items()}
    kept = {key: state_dict.get(key, value) for key, value in own.items()}
    state_dict.clear()
    state_dict.update(kept)


def _rename(""",
        ),
        only=True,
    ),
]
