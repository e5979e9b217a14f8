"""Wrong answers to ex06 that its checks must catch."""

from harness.model.bank import Mistake as _New


def Mistake(name, caught_by, edits, says, only=False):  # type: ignore
    return _New(name, caught_by, says, *edits, only=only)


IMPORTS = "import torch\nfrom torch import Tensor, nn\n"
CHECKPOINT = """    replay = _Replay(function, args, kwargs)
    with saved_tensors_hooks(replay.pack, replay.unpack):
        return function(*args, **kwargs)
"""
UNPACK = """        if number not in self.recomputed:
            self.recomputed = dict(enumerate(self.saved_tensors()))
        return self.recomputed.pop(number)
"""
PACK = "        return next(self.numbers)\n"
SAVED = "            stack.enter_context(saved_tensors_hooks(lambda tensor: saved.append(tensor.detach()), _never_unpacked))\n"
AGAIN = "            self.function(*self.args, **self.kwargs)\n"
DETACHED = "    return tensor.detach().requires_grad_(tensor.requires_grad)\n"
FORK = "            stack.enter_context(torch.random.fork_rng(devices=range(len(self.cuda_random_states))))\n"
SET_STATE = "            torch.set_rng_state(self.random_state)\n"
GET_STATE = "        self.random_state = torch.get_rng_state()\n"
AUTOCASTS = "            torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))\n"
AUTOCAST = """            for autocast in self.autocasts:
                stack.enter_context(autocast)
"""
WRAPPED = "        if self.use_checkpoint and self.training and torch.is_grad_enabled():\n"
RECOMPUTED = "            return checkpoint(self.module, *args, **kwargs)\n"
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
CHILDREN = "    for attribute, child in module.named_children():\n"
MATCHES = '        matches = in_list or (pattern in attribute and "norm" not in attribute)\n'
IS_LIST = "        is_list = isinstance(child, nn.ModuleList) or (isinstance(child, nn.Sequential) and not in_list)\n"
FOUND = """        if matches and not is_list:
            yield name
        else:
            yield from _layer_names(child, pattern, f"{name}.", in_list=matches)
"""
METER = """    with _StorageMeter() as meter:
        result = func(*args, **kwargs)
    return result, meter.peak / 2**20
"""
KNOWN = "        self.known.update(_storages((args, kwargs)))  # these existed before\n"
FREED = "        self.alive -= size\n"
NEW = """            if storage not in self.known:
                self.known.add(storage)
                self.alive += storage.nbytes()
"""
STEP = """    optimizer.zero_grad()
    logits = model(batch["input_ids"])  # [B, L, V]
    loss = criterion(logits.flatten(0, 1), batch["targets"].flatten())
    loss.backward()
    optimizer.step()
    return loss.item()
"""
OWN_TEST = "    torch.manual_seed(0)\n    input_ids = torch.randint(11, (2, 5))\n"
LAST_ASSERT = '    assert 1.9 < peak < 2.1, f"x + 1 - 2 for 1 MiB has a peak of 2 MiB; {peak} was measured"\n'

# The other way to write `checkpoint`, right as it stands: an autograd.Function whose backward runs a backward of its own.
REENTRANT = """    from torch.utils._pytree import tree_flatten, tree_unflatten

    replay = _Replay(function, args, kwargs)
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    forms: list[Any] = []

    def run(given: Any) -> tuple[Any, ...]:
        tensors_left = iter(given)
        again = [next(tensors_left) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        new_args, new_kwargs = tree_unflatten(again, spec)
        outputs, form = tree_flatten(function(*new_args, **new_kwargs))
        forms.append(form)
        return tuple(outputs)

    class Rerun(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, anchor: Any, *given: Tensor) -> Any:
            ctx.save_for_backward(*given)
            return run(given)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            given = [_detached(tensor) for tensor in ctx.saved_tensors]
            with ExitStack() as stack:
                stack.enter_context(torch.random.fork_rng(devices=[]))
                torch.set_rng_state(replay.random_state)
                for autocast in replay.autocasts:
                    stack.enter_context(autocast)
                stack.enter_context(torch.enable_grad())
                outputs = run(given)
            pairs = [(o, g) for o, g in zip(outputs, gradients) if isinstance(o, Tensor) and o.requires_grad]
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
            return None, *(tensor.grad for tensor in given)

    flat = Rerun.apply(torch.empty(0, requires_grad=True), *tensors)
    return tree_unflatten(flat, forms[0])
"""
GIVEN = "            given = [_detached(tensor) for tensor in ctx.saved_tensors]\n"
INNER = "            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])\n"
PAIRS = (
    "            pairs = [(o, g) for o, g in zip(outputs, gradients) if isinstance(o, Tensor) and o.requires_grad]\n"
)
GRADS = "            return None, *(tensor.grad for tensor in given)\n"
APPLY = (
    "    flat = Rerun.apply(torch.empty(0, requires_grad=True), *tensors)\n    return tree_unflatten(flat, forms[0])\n"
)
TWINS = "        self.args, self.kwargs = tree_map_only(Tensor, lambda x: twins.setdefault(id(x), _detached(x)), (args, kwargs))\n"
LEAVES = "    leaves, spec = tree_flatten((args, kwargs))\n"


def reentrant(*changes: tuple[str, str]) -> list[tuple[str, str]]:
    """The edit that puts REENTRANT, with changes, in place of the hooks."""
    text = REENTRANT
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return [(CHECKPOINT, text)]


def swapped(text: str, old: str, new: str) -> list[tuple[str, str]]:
    """The edit that changes a part of a text of the answer."""
    assert old in text, old
    return [(text, text.replace(old, new))]


MISTAKES = [
    # Nothing at all.
    Mistake(
        "no_checkpointing",
        ("6.2", "6.1", "6.3", "6.4", "6.6", "6.7", "6.10"),
        [
            (RECOMPUTED, "            return self.module(*args, **kwargs)\n"),
            (CHECKPOINT, "    return function(*args, **kwargs)\n"),
        ],
        says="are entered [1, 1, 1, 1] times",
    ),
    Mistake(
        "zeros",
        ("6.2", "6.7", "6.10"),
        [(RECOMPUTED, "            return torch.zeros_like(args[0]) * args[0]\n")],
        says="values differ",
    ),
    Mistake("identity", ("6.2", "6.7", "6.10"), [(RECOMPUTED, "            return args[0]\n")], says="values differ"),
    Mistake(
        "wrapper_returns_none",
        "6.2",
        [
            (RECOMPUTED, "            checkpoint(self.module, *args, **kwargs)\n"),
            ("        return self.module(*args, **kwargs)\n", "        return None\n"),
        ],
        says="None",
    ),
    # 6.1
    Mistake(
        "every_second_layer",
        "6.1",
        swapped(CHOSEN, ":: self.checkpoint_every_n_layers", "::2"),
        says="SelectiveCheckpointing(1) on 5 layers",
    ),
    Mistake(
        "starts_with_the_last_of_n",
        "6.1",
        swapped(CHOSEN, "[:: self", "[self.checkpoint_every_n_layers - 1 :: self"),
        says="SelectiveCheckpointing(2) on 5 layers",
    ),
    Mistake(
        "first_n_layers",
        "6.1",
        swapped(CHOSEN, ":: self.checkpoint_every_n_layers", ": self.checkpoint_every_n_layers"),
        says="SelectiveCheckpointing(1) on 5 layers",
    ),
    Mistake(
        "zero_means_every",
        "6.1",
        [(ZERO, ""), *swapped(CHOSEN, ":: self.checkpoint_every_n_layers", ":: self.checkpoint_every_n_layers or 1")],
        says="SelectiveCheckpointing(0)",
    ),
    Mistake("zero_divides", "6.1", [(ZERO, "")], says="zero"),
    Mistake(
        "counts_list_by_list",
        "6.1",
        [
            (
                CHOSEN,
                """        by_list: dict[str, list[str]] = {}
        for name in _layer_names(model, layer_pattern):
            by_list.setdefault(name.rpartition(".")[0], []).append(name)
        for name in (n for names in by_list.values() for n in names[:: self.checkpoint_every_n_layers]):
""",
            )
        ],
        says="decoder.a.b.layers_.0",
        only=True,
    ),
    Mistake(
        "list_wrapped",
        "6.1",
        [
            (
                FOUND,
                """        if matches:
            yield name
        else:
            yield from _layer_names(child, pattern, f"{name}.")
""",
            )
        ],
        says="checkpointed_modules",
    ),
    Mistake(
        "sequential_wrapped",
        "6.1",
        [(IS_LIST, "        is_list = isinstance(child, nn.ModuleList)\n")],
        says="layers.0",
        only=True,
    ),
    Mistake(
        "sequential_elements_split",
        "6.1",
        [(IS_LIST, "        is_list = isinstance(child, (nn.ModuleList, nn.Sequential))\n")],
        says="layers.0",
        only=True,
    ),
    Mistake(
        "lists_in_lists_wrapped",
        "6.1",
        [(IS_LIST, "        is_list = isinstance(child, (nn.ModuleList, nn.Sequential)) and not in_list\n")],
        says="layers.0.0",
        only=True,
    ),
    Mistake("norms_wrapped", "6.1", swapped(MATCHES, ' and "norm" not in attribute', ""), says="layer_norm", only=True),
    Mistake(
        "norms_by_suffix",
        "6.1",
        swapped(MATCHES, '"norm" not in attribute', 'not attribute.endswith("norm")'),
        says="norm_layers",
        only=True,
    ),
    Mistake(
        "norms_not_searched",
        "6.1",
        [(FOUND, FOUND.replace("        else:\n", '        elif "norm" not in attribute:\n'))],
        says="layer_norm.layers.0",
        only=True,
    ),
    Mistake(
        "norms_in_a_list_left_out",
        "6.1",
        swapped(MATCHES, "in_list or (pattern in attribute and", "(in_list or pattern in attribute) and ("),
        says="layers.norm",
        only=True,
    ),
    Mistake(
        "matched_by_path",
        "6.1",
        swapped(
            MATCHES,
            '(pattern in attribute and "norm" not in attribute)',
            '(pattern in prefix + attribute and "norm" not in attribute)',
        ),
        says="norm_layers.0",
        only=True,
    ),
    Mistake(
        "matched_by_whole_name",
        "6.1",
        swapped(MATCHES, "pattern in attribute", 'attribute in (pattern, pattern + "s")'),
        says="layer1",
        only=True,
    ),
    Mistake(
        "matched_at_the_start",
        "6.1",
        swapped(MATCHES, "pattern in attribute", "attribute.startswith(pattern)"),
        says="my_layer2",
        only=True,
    ),
    Mistake(
        "pattern_ignored",
        "6.1",
        swapped(MATCHES, "pattern in attribute", '"layer" in attribute'),
        says="pattern 'block'",
        only=True,
    ),
    Mistake(
        "layers_in_layers",
        "6.1",
        [
            (
                FOUND,
                FOUND.replace(
                    "        else:\n            yield from _layer_names", "        yield from _layer_names"
                ).replace("in_list=matches", "in_list=matches and is_list"),
            )
        ],
        says="sublayer",
        only=True,
    ),
    Mistake(
        "top_level_only",
        "6.1",
        [(FOUND, FOUND.replace("        else:\n", "        elif matches:\n"))],
        says="encoder.layers.0",
        only=True,
    ),
    Mistake(
        "two_levels_only",
        "6.1",
        swapped(FOUND, "        else:\n", '        elif prefix.count(".") < 2:\n'),
        says="decoder.a.b.layers_",
        only=True,
    ),
    Mistake(
        "lists_only",
        "6.1",
        swapped(FOUND, "        if matches and not is_list:\n", "        if in_list and not is_list:\n"),
        says="layer1",
        only=True,
    ),
    Mistake(
        "names_sorted",
        "6.1",
        swapped(CHOSEN, "list(_layer_names(model, layer_pattern))", "sorted(_layer_names(model, layer_pattern))"),
        says="layers.10",
        only=True,
    ),
    Mistake(
        "one_list_of_names_for_all",
        "6.1",
        [
            ("        self.checkpointed_modules: list[str] = []\n", "        self.checkpointed_modules = _NAMES\n"),
            ("class SelectiveCheckpointing:\n", "_NAMES: list[str] = []\n\n\nclass SelectiveCheckpointing:\n"),
        ],
        says="checkpointed_modules is",
        only=True,
    ),
    Mistake(
        "every_layer_by_default",
        "6.1",
        [("checkpoint_every_n_layers: int = 2", "checkpoint_every_n_layers: int = 1")],
        says="SelectiveCheckpointing()",
        only=True,
    ),
    Mistake("names_not_kept", "6.1", [(RECORD, "")], says="checkpointed_modules is []", only=True),
    Mistake(
        "names_of_what_is_inside",
        "6.1",
        swapped(RECORD, "(name)", '(name + ".module")'),
        says="layers.0.module",
        only=True,
    ),
    Mistake(
        "names_of_all_layers",
        "6.1",
        [(RECORD, ""), (CHOSEN, "        self.checkpointed_modules += _layer_names(model, layer_pattern)\n" + CHOSEN)],
        says="checkpointed_modules",
        only=True,
    ),
    Mistake("named_but_not_wrapped", "6.1", [(WRAP, "")], says="are computed twice"),
    Mistake(
        "copies_wrapped",
        "6.1",
        swapped(WRAP, "model.get_submodule(name)", "copy.deepcopy(model.get_submodule(name))"),
        says="layers",
    ),
    Mistake(
        "parameters_copied",
        "6.1",
        [
            (
                FLAG,
                FLAG
                + "        for part in module.modules():\n            for name, value in list(part.named_parameters(recurse=False)):\n                setattr(part, name, nn.Parameter(value.detach().clone(), value.requires_grad))\n",
            )
        ],
        says="new objects",
    ),
    Mistake(
        "lists_become_sequentials",
        "6.1",
        [
            (
                RECORD,
                RECORD
                + """            owned = model.get_submodule(owner)
            if isinstance(owned, nn.ModuleList) and owned:
                above, _, key = owner.rpartition(".")
                setattr(model.get_submodule(above), key, nn.Sequential(*owned))
""",
            )
        ],
        says="is a Sequential afterwards",
        only=True,
    ),
    Mistake("keys_changed", "6.1", [(SAVE_HOOK, ""), (LOAD_HOOK, "")], says="module", only=True),
    Mistake("keys_changed_in_loading", "6.1", [(LOAD_HOOK, "")], says="load_state_dict", only=True),
    Mistake("keys_changed_in_saving", "6.1", [(SAVE_HOOK, "")], says="state_dict of a wrapped model", only=True),
    Mistake(
        "keys_replaced_everywhere",
        "6.1",
        [
            (
                '    _rename(state_dict, f"{prefix}module.", prefix)\n',
                '    for key in [key for key in state_dict if key.startswith(prefix)]:\n        state_dict[key.replace("module.", "")] = state_dict.pop(key)\n',
            )
        ],
        says="_weight",
        only=True,
    ),
    Mistake(
        "keys_renamed_one_by_one",
        "6.1",
        [
            (
                RENAME,
                "    for key in [key for key in state_dict if key.startswith(old)]:\n        state_dict[new + key.removeprefix(old)] = state_dict.pop(key)\n",
            )
        ],
        says="module",
        only=True,
    ),
    Mistake(
        "buffers_forgotten",
        "6.1",
        [
            (
                RENAME,
                RENAME
                + '    if not new.endswith("module."):\n        for key in [key for key in state_dict if key.endswith("offset")]:\n            del state_dict[key]\n',
            )
        ],
        says="offset",
        only=True,
    ),
    Mistake(
        "loading_is_lax",
        "6.1",
        [
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
        ],
        says="was accepted",
        only=True,
    ),
    # 6.2
    Mistake(
        "active_in_eval", "6.2", swapped(WRAPPED, " and self.training", ""), says="entered 2 times, not once", only=True
    ),
    Mistake(
        "use_checkpoint_ignored",
        "6.2",
        swapped(WRAPPED, "self.use_checkpoint and ", ""),
        says="use_checkpoint=False",
        only=True,
    ),
    Mistake(
        "use_checkpoint_inverted",
        "6.2",
        swapped(WRAPPED, "self.use_checkpoint", "not self.use_checkpoint"),
        says="entered",
    ),
    Mistake("training_flag_not_taken_over", "6.2", [(FLAG, "")], says="module in eval", only=True),
    Mistake("module_set_to_training", "6.2", [(FLAG, "        module.train()\n")], says="module in eval", only=True),
    Mistake(
        "activations_kept_by_a_closure",
        "6.2",
        [
            (
                "        self.recomputed: dict[int, Tensor] = {}\n",
                "        self.recomputed: dict[int, Tensor] = {}\n        self.kept: list[Tensor] = []\n",
            ),
            (
                "    def pack(self, _: Tensor) -> int:\n",
                "    def pack(self, _: Tensor) -> int:\n        self.kept.append(_.detach())\n",
            ),
        ],
        says="alive",
    ),
    Mistake(
        "recomputed_for_every_tensor",
        "6.2",
        [(UNPACK, "        return self.saved_tensors()[number]\n")],
        says="are entered",
        only=True,
    ),
    Mistake(
        "recomputed_twice",
        "6.2",
        [
            (
                AGAIN,
                "            if torch.is_grad_enabled():\n                with torch.no_grad():\n                    self.function(*self.args, **self.kwargs)\n                torch.set_rng_state(self.random_state)\n"
                + AGAIN,
            )
        ],
        says="are entered [3, 3, 3, 3] times",
        only=True,
    ),
    Mistake(
        "one_segment_over_all",
        ("6.2", "6.1", "6.6"),
        [
            (WRAP, ""),
            (RECORD, RECORD + '        vars(model)["forward"] = functools.partial(checkpoint, model.forward)\n'),
            ("import itertools\n", "import functools\nimport itertools\n"),
        ],
        says="embedding and head are entered [2, 2] times",
    ),
    Mistake(
        "checkpoint_is_a_plain_call",
        "6.2",
        [
            (CHECKPOINT, "    return function(*args, **kwargs)\n"),
            (
                RECOMPUTED,
                "            replay = _Replay(self.module, args, kwargs)\n            with saved_tensors_hooks(replay.pack, replay.unpack):\n                return self.module(*args, **kwargs)\n",
            ),
        ],
        says="checkpoint(module, x)",
    ),
    Mistake(
        "output_detached",
        "6.2",
        [(RECOMPUTED, "            with torch.no_grad():\n                return self.module(*args, **kwargs)\n")],
        says="are entered [1, 1, 1, 1] times",
    ),
    # 6.3
    Mistake("autocast_not_restored", "6.3", [(AUTOCAST, "")], says="multiplies in", only=True),
    Mistake(
        "autocast_always_on",
        "6.3",
        swapped(AUTOCASTS, "torch.is_autocast_enabled(device)", 'device == "cpu"'),
        says="under autocast off",
    ),
    Mistake(
        "autocast_off",
        "6.3",
        swapped(AUTOCASTS, "torch.is_autocast_enabled(device)", "False"),
        says="multiplies in",
        only=True,
    ),
    Mistake(
        "autocast_dtype_forgotten",
        "6.3",
        swapped(AUTOCASTS, "torch.get_autocast_dtype(device)", "torch.bfloat16"),
        says="under autocast float16",
        only=True,
    ),
    Mistake(
        "autocast_kept_in_the_module",
        "6.3",
        [
            (AUTOCAST, AUTOCAST.replace("self.autocasts", "vars(self.function)['autocasts']")),
            (
                GET_STATE,
                GET_STATE
                + "        vars(function).update(autocasts=[torch.autocast('cpu', torch.get_autocast_dtype('cpu'), torch.is_autocast_enabled('cpu'))])\n",
            ),
        ],
        says="multiplies in",
        only=True,
    ),
    Mistake(
        "autocast_only_ever_switched_on",
        "6.3",
        [
            (
                AUTOCAST,
                "            for autocast in self.autocasts:\n                if autocast._enabled:\n                    stack.enter_context(autocast)\n",
            )
        ],
        says="forward under autocast off",
        only=True,
    ),
    # 6.4
    Mistake(
        "kwargs_dropped",
        "6.4",
        [(AGAIN, "            self.function(*self.args)\n")],
        says="keyword arguments",
        only=True,
    ),
    Mistake("kwargs_dropped_in_both", "6.4", swapped(RECOMPUTED, ", **kwargs", ""), says="output", only=True),
    Mistake(
        "kwargs_without_gradient",
        "6.4",
        reentrant(
            (LEAVES, "    leaves, spec = tree_flatten((args, {}))\n"),
            (
                "        new_args, new_kwargs = tree_unflatten(again, spec)\n",
                "        new_args, new_kwargs = *tree_unflatten(again, spec)[:1], tree_map_only(Tensor, lambda t: t.detach(), kwargs)\n",
            ),
        ),
        says="gradient",
        only=True,
    ),
    Mistake(
        "nested_kwargs_without_gradient",
        "6.4",
        reentrant(
            (
                LEAVES,
                "    kwargs = {\n        key: value if isinstance(value, Tensor) else tree_map_only(Tensor, Tensor.detach, value)\n        for key, value in kwargs.items()\n    }\n"
                + LEAVES,
            )
        ),
        says="keyword arguments",
        only=True,
    ),
    Mistake(
        "calls_without_tensors_refused",
        "6.4",
        [
            (
                CHECKPOINT,
                '    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):\n        raise ValueError("no tensor among the arguments")\n'
                + CHECKPOINT,
            )
        ],
        says="no tensor among",
        only=True,
    ),
    Mistake(
        "unused_inputs_refused",
        "6.4",
        reentrant(
            (
                GRADS,
                '            if any(t.requires_grad and t.grad is None for t in given):\n                raise RuntimeError("unused input")\n'
                + GRADS,
            )
        ),
        says="unused input",
        only=True,
    ),
    Mistake(
        "requires_grad_lost",
        ("6.4", "6.7"),
        [*reentrant(), (DETACHED, "    return tensor.detach()\n")],
        says="none came",
    ),
    Mistake(
        "everything_requires_grad",
        "6.4",
        [(DETACHED, "    return tensor.detach().requires_grad_(tensor.is_floating_point())\n")],
        says="raises",
    ),
    Mistake(
        "inputs_without_gradient_train_nothing",
        "6.4",
        reentrant((APPLY, APPLY.replace(", requires_grad=True", ""))),
        says="grad",
        only=True,
    ),
    Mistake(
        "inputs_get_no_gradient",
        ("6.4", "6.7"),
        reentrant((GRADS, "            return (None,) * (len(given) + 1)\n")),
        says="none came",
    ),
    Mistake(
        "first_input_only",
        "6.4",
        reentrant((GRADS, "            return None, given[0].grad, *([None] * (len(given) - 1))\n")),
        says="tensor input 1",
        only=True,
    ),
    Mistake(
        "inputs_made_to_need_gradients",
        "6.4",
        [
            (
                CHECKPOINT,
                "    for leaf in tree_leaves((args, kwargs)):\n        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.is_leaf:\n            leaf.requires_grad_()\n"
                + CHECKPOINT,
            )
        ],
        says="none was wanted",
        only=True,
    ),
    Mistake(
        "one_tensor_becomes_several",
        "6.4",
        swapped(TWINS, "lambda x: twins.setdefault(id(x), _detached(x))", "_detached"),
        says="key is query",
        only=True,
    ),
    Mistake(
        "one_leaf_for_one_tensor",
        "6.4",
        reentrant(
            (
                GIVEN,
                "            distinct = {id(tensor): _detached(tensor) for tensor in tensors}\n            given = [distinct[id(tensor)] for tensor in tensors]\n",
            )
        ),
        says="one tensor is both",
        only=True,
    ),
    Mistake(
        "nested_inputs_without_gradient",
        "6.4",
        reentrant(
            (
                GIVEN,
                GIVEN
                + "            given = [t if any(t is u or u is v for v in args) else t.detach() for t, u in zip(given, tensors)]\n",
            )
        ),
        says="gradient",
        only=True,
    ),
    Mistake(
        "nested_outputs_without_gradient",
        "6.4",
        reentrant(
            (
                "        outputs, form = tree_flatten(function(*new_args, **new_kwargs))\n",
                "        outputs, form = tree_flatten(function(*new_args, **new_kwargs), is_leaf=lambda x: isinstance(x, dict))\n",
            )
        ),
        says="gradient",
        only=True,
    ),
    Mistake(
        "first_output_only",
        "6.4",
        reentrant((PAIRS, PAIRS + "            pairs = pairs[:1]\n")),
        says="gradient",
        only=True,
    ),
    Mistake(
        "all_outputs_need_gradients",
        "6.4",
        reentrant((PAIRS, PAIRS.replace(" and o.requires_grad]", "]"))),
        says="grad",
        only=True,
    ),
    Mistake(
        "unused_outputs_not_expected",
        "6.4",
        reentrant(
            (
                "            ctx.save_for_backward(*given)\n",
                "            ctx.save_for_backward(*given)\n            ctx.set_materialize_grads(False)\n",
            )
        ),
        says="grad",
        only=True,
    ),
    Mistake(
        "outputs_come_as_a_tuple",
        "6.4",
        reentrant(
            (APPLY, APPLY.replace("tree_unflatten(flat, forms[0])", "flat[0] if len(flat) == 1 else tuple(flat)"))
        ),
        says="structure",
        only=True,
    ),
    Mistake(
        "tensor_outputs_only",
        "6.4",
        reentrant(
            (
                APPLY,
                APPLY.replace(
                    "tree_unflatten(flat, forms[0])",
                    "flat[0] if len(flat) == 1 else tuple(x for x in flat if isinstance(x, Tensor))",
                ),
            )
        ),
        says="structure",
        only=True,
    ),
    Mistake(
        "tensor_arguments_only",
        "6.4",
        swapped(RECOMPUTED, "*args", "*(x for x in args if isinstance(x, Tensor))"),
        says="structure",
        only=True,
    ),
    Mistake(
        "nested_arguments_kept_from_tensors",
        "6.4",
        [
            (
                RECOMPUTED,
                "            if not all(isinstance(x, Tensor) for x in (*args, *kwargs.values())):\n                return self.module(*args, **kwargs)\n"
                + RECOMPUTED,
            )
        ],
        says="a second time",
        only=True,
    ),
    # 6.5
    Mistake("peak_is_a_sum", "6.5", [(FREED, "        pass\n")], says="a peak of", only=True),
    Mistake(
        "everything_held_while_measuring",
        "6.5",
        [(NEW, NEW + '                self.held = [*getattr(self, "held", []), result]\n')],
        says="a peak of",
        only=True,
    ),
    Mistake(
        "what_is_left_not_the_peak", "6.5", swapped(METER, "meter.peak", "meter.alive"), says="a peak of", only=True
    ),
    Mistake(
        "largest_tensor",
        "6.5",
        [
            (
                "                self.peak = max(self.peak, self.alive)\n",
                "                self.peak = max(self.peak, storage.nbytes())\n",
            )
        ],
        says="a peak of",
        only=True,
    ),
    Mistake(
        "first_output_counted",
        "6.5",
        [
            (
                "        for storage in _storages(result):\n",
                "        for storage in itertools.islice(_storages(result), 1):\n",
            )
        ],
        says="a peak of",
        only=True,
    ),
    Mistake(
        "addresses_never_forgotten",
        "6.5",
        [
            (
                "        self.known: WeakSet[torch.UntypedStorage] = WeakSet()\n",
                "        self.known: set[int] = set()\n",
            ),
            (KNOWN, "        self.known.update(storage.data_ptr() for storage in _storages((args, kwargs)))\n"),
            (
                NEW,
                NEW.replace("if storage not in", "if storage.data_ptr() not in").replace(
                    "known.add(storage)", "known.add(storage.data_ptr())"
                ),
            ),
        ],
        says="takes the place",
        only=True,
    ),
    Mistake(
        "views_counted",
        "6.5",
        swapped(NEW, "            if storage not in self.known:\n", "            if True:\n"),
        says="a peak of",
        only=True,
    ),
    Mistake("existing_tensors_counted", "6.5", [(KNOWN, "")], says="a peak of", only=True),
    Mistake(
        "elements_of_four_bytes",
        "6.5",
        [
            (
                "        for storage in _storages(result):\n",
                "        sizes = [t.numel() * 4 for t in tree_leaves(result) if isinstance(t, Tensor)]\n        for storage, size in zip(_storages(result), sizes, strict=True):\n",
            ),
            ("                self.alive += storage.nbytes()\n", "                self.alive += size\n"),
            (
                "                finalize(storage, self.freed, storage.nbytes())\n",
                "                finalize(storage, self.freed, size)\n",
            ),
        ],
        says="a peak of",
        only=True,
    ),
    Mistake(
        "freed_with_the_tensor",
        "6.5",
        [
            (
                "        for storage in _storages(result):\n",
                "        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]\n        for storage, tensor in zip(_storages(result), tensors, strict=True):\n",
            ),
            (
                "                finalize(storage, self.freed, storage.nbytes())\n",
                "                finalize(tensor, self.freed, storage.nbytes())\n",
            ),
        ],
        says="a peak of",
        only=True,
    ),
    Mistake("bytes", "6.5", swapped(METER, " / 2**20", ""), says="a peak of", only=True),
    Mistake("a_fifth_too_much", "6.5", swapped(METER, "meter.peak", "1.12 * meter.peak"), says="a peak of", only=True),
    Mistake(
        "tracemalloc",
        "6.5",
        [
            (
                METER,
                """    import tracemalloc

    tracemalloc.start()
    result = func(*args, **kwargs)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return result, peak / 2**20
""",
            )
        ],
        says="a peak of",
        only=True,
    ),
    Mistake(
        "process_memory",
        "6.5",
        [
            (
                METER,
                """    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = func(*args, **kwargs)
    return result, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
""",
            )
        ],
        says="a peak of",
        only=True,
    ),
    Mistake(
        "peak_alone",
        "6.5",
        swapped(METER, "return result, meter.peak", "return meter.peak"),
        says="float came",
        only=True,
    ),
    Mistake(
        "peak_first",
        "6.5",
        swapped(METER, "return result, meter.peak / 2**20", "return meter.peak / 2**20, result"),
        says="not a Python number",
        only=True,
    ),
    Mistake(
        "peak_is_a_tensor",
        "6.5",
        swapped(METER, "meter.peak / 2**20", "torch.tensor(meter.peak / 2**20)"),
        says="is a Tensor",
        only=True,
    ),
    Mistake(
        "result_lost", "6.5", swapped(METER, "return result", "return None"), says="not what func returned", only=True
    ),
    Mistake(
        "func_called_twice",
        "6.5",
        swapped(METER, "    return result", "        func(*args, **kwargs)\n    return result"),
        says="a peak of",
        only=True,
    ),
    Mistake(
        "arguments_not_passed",
        "6.5",
        swapped(METER, "func(*args, **kwargs)", "func(*args)"),
        says="arguments",
        only=True,
    ),
    Mistake(
        "error_swallowed",
        "6.5",
        [
            (
                METER,
                METER.replace(
                    "        result = func(*args, **kwargs)\n",
                    "        try:\n            result = func(*args, **kwargs)\n        except Exception:\n            result = None\n",
                ),
            )
        ],
        says="error of func",
        only=True,
    ),
    Mistake(
        "error_wrapped",
        "6.5",
        [
            (
                METER,
                METER.replace(
                    "        result = func(*args, **kwargs)\n",
                    "        try:\n            result = func(*args, **kwargs)\n        except Exception as error:\n            raise RuntimeError(str(error)) from error\n",
                ),
            )
        ],
        says="RuntimeError",
        only=True,
    ),
    Mistake(
        "stays_on_after_an_error",
        "6.5",
        [
            (
                METER,
                "    meter = _StorageMeter()\n    meter.__enter__()\n    result = func(*args, **kwargs)\n    meter.__exit__(None, None, None)\n    return result, meter.peak / 2**20\n",
            )
        ],
        says="still on after func raises",
        only=True,
    ),
    Mistake(
        "one_meter_for_all_calls",
        "6.5",
        [
            (METER, METER.replace("with _StorageMeter() as meter", "with _METER as meter")),
            ("def _storages(", "_METER = _StorageMeter()\n\n\ndef _storages("),
        ],
        says="a peak of",
        only=True,
    ),
    Mistake(
        "measured_without_gradients",
        "6.5",
        swapped(METER, "    with _StorageMeter() as meter:\n", "    with torch.no_grad(), _StorageMeter() as meter:\n"),
        says="grad",
        only=True,
    ),
    # 6.6
    Mistake(
        "gradients_not_zeroed", "6.6", swapped(STEP, "    optimizer.zero_grad()\n", ""), says="zero_grad", only=True
    ),
    Mistake(
        "gradients_zeroed_after_backward",
        "6.6",
        [
            (
                STEP,
                STEP.replace("    optimizer.zero_grad()\n", "").replace(
                    "    loss.backward()\n", "    loss.backward()\n    optimizer.zero_grad()\n"
                ),
            )
        ],
        says="afterwards",
        only=True,
    ),
    Mistake(
        "gradients_zeroed_after_the_step",
        "6.6",
        [
            (
                STEP,
                STEP.replace("    optimizer.zero_grad()\n", "").replace(
                    "    optimizer.step()\n", "    optimizer.step()\n    optimizer.zero_grad()\n"
                ),
            )
        ],
        says="zero_grad",
        only=True,
    ),
    Mistake("no_step", "6.6", swapped(STEP, "    optimizer.step()\n", ""), says="afterwards", only=True),
    Mistake(
        "step_by_hand",
        "6.6",
        swapped(
            STEP,
            "    optimizer.step()\n",
            "    with torch.no_grad():\n        for parameter in model.parameters():\n            parameter -= optimizer.param_groups[0]['lr'] * parameter.grad\n",
        ),
        says="weight decay",
        only=True,
    ),
    Mistake(
        "model_called_twice",
        "6.6",
        swapped(STEP, "    logits = ", '    model(batch["input_ids"])\n    logits = '),
        says="the model is called 2 times",
        only=True,
    ),
    Mistake(
        "step_before_backward",
        "6.6",
        swapped(STEP, "    loss.backward()\n    optimizer.step()\n", "    optimizer.step()\n    loss.backward()\n"),
        says="afterwards",
        only=True,
    ),
    Mistake(
        "two_steps",
        "6.6",
        swapped(STEP, "    optimizer.step()\n", "    optimizer.step()\n    optimizer.step()\n"),
        says="once each",
        only=True,
    ),
    Mistake(
        "loss_after_the_step",
        "6.6",
        swapped(
            STEP,
            "    return loss.item()\n",
            '    logits = model(batch["input_ids"])\n    return criterion(logits.flatten(0, 1), batch["targets"].flatten()).item()\n',
        ),
        says="before the step",
        only=True,
    ),
    Mistake("loss_is_a_tensor", "6.6", swapped(STEP, "loss.item()", "loss.detach()"), says="Tensor came", only=True),
    Mistake(
        "loss_summed",
        "6.6",
        swapped(STEP, "loss.item()", 'loss.item() * batch["targets"].numel()'),
        says="the loss",
        only=True,
    ),
    Mistake(
        "positions_in_another_order",
        "6.6",
        swapped(
            STEP,
            'logits.flatten(0, 1), batch["targets"].flatten()',
            'logits.transpose(0, 1).flatten(0, 1), batch["targets"].T.flatten()',
        ),
        says="another order",
        only=True,
    ),
    Mistake(
        "classes_second",
        "6.6",
        swapped(STEP, 'logits.flatten(0, 1), batch["targets"].flatten()', 'logits.transpose(1, 2), batch["targets"]'),
        says="shapes",
        only=True,
    ),
    Mistake(
        "next_token_targets",
        "6.6",
        swapped(
            STEP,
            'logits.flatten(0, 1), batch["targets"].flatten()',
            'logits[:, :-1].flatten(0, 1), batch["targets"][:, 1:].flatten()',
        ),
        says="the loss",
        only=True,
    ),
    Mistake(
        "targets_from_the_inputs",
        "6.6",
        swapped(STEP, 'batch["targets"].flatten()', 'batch["input_ids"].flatten()'),
        says="the loss",
        only=True,
    ),
    Mistake(
        "gradients_clipped",
        "6.6",
        swapped(
            STEP,
            "    optimizer.step()\n",
            "    nn.utils.clip_grad_norm_(model.parameters(), 0.1)\n    optimizer.step()\n",
        ),
        says="afterwards",
        only=True,
    ),
    Mistake(
        "train_step_in_eval",
        "6.6",
        swapped(STEP, "    optimizer.zero_grad()\n", "    model.eval()\n    optimizer.zero_grad()\n"),
        says="alive at once",
        only=True,
    ),
    Mistake(
        "recomputed_activations_pile_up",
        "6.6",
        [
            (
                SAVED,
                SAVED.replace(
                    "saved.append(tensor.detach())", "(saved.append(tensor.detach()), _PILE.append(tensor.detach()))"
                ),
            ),
            ("def _detached(", "_PILE: list[Tensor] = []\n\n\ndef _detached("),
        ],
        says="pile up",
        only=True,
    ),
    Mistake(
        "inputs_pile_up_over_the_steps",
        "6.6",
        [
            ("        self.function = function\n", "        self.function = function\n        _PILE.append(self)\n"),
            ("def _detached(", "_PILE: list[Any] = []\n\n\ndef _detached("),
        ],
        says="pile up",
        only=True,
    ),
    # 6.7
    Mistake(
        "parameters_without_gradient",
        ("6.7", "6.4", "6.6"),
        reentrant(
            (
                INNER,
                """            needing = [tensor for tensor in given if tensor.requires_grad]
            found = torch.autograd.grad([o for o, _ in pairs], needing, [g for _, g in pairs], allow_unused=True) if needing else ()
            for tensor, gradient in zip(needing, found):
                tensor.grad = gradient
""",
            )
        ),
        says="none came",
    ),
    Mistake("random_state_not_restored", "6.7", [(SET_STATE, "")], says="dropout", only=True),
    Mistake("random_stream_moved", "6.7", [(FORK, "")], says="random stream", only=True),
    Mistake(
        "random_state_taken_afterwards",
        "6.7",
        [
            (
                CHECKPOINT,
                "    replay = _Replay(function, args, kwargs)\n    with saved_tensors_hooks(replay.pack, replay.unpack):\n        result = function(*args, **kwargs)\n    replay.random_state = torch.get_rng_state()\n    return result\n",
            )
        ],
        says="dropout",
        only=True,
    ),
    Mistake(
        "seed_set_both_times",
        "6.7",
        [(GET_STATE, "        torch.manual_seed(0)\n" + GET_STATE)],
        says="dropout",
        only=True,
    ),
    Mistake(
        "stream_put_back_to_after_forward",
        "6.7",
        [
            (
                CHECKPOINT,
                "    replay = _Replay(function, args, kwargs)\n    with saved_tensors_hooks(replay.pack, replay.unpack):\n        result = function(*args, **kwargs)\n    replay.after = torch.get_rng_state()\n    return result\n",
            ),
            (FORK, "            stack.callback(lambda: torch.set_rng_state(self.after))\n"),
            (GET_STATE, GET_STATE + "        self.after = self.random_state\n"),
        ],
        says="random stream",
        only=True,
    ),
    Mistake(
        "one_backward_only",
        "6.7",
        [(AGAIN, AGAIN + "            self.args, self.kwargs = (), {}\n")],
        says="missing 1 required positional argument",
    ),
    Mistake(
        "leftovers_of_a_backward_trusted",
        "6.4",
        [(UNPACK, UNPACK.replace("if number not in self.recomputed", "if not self.recomputed"))],
        says="KeyError",
        only=True,
    ),
    Mistake(
        "second_backward_without_random_state",
        "6.7",
        [
            (
                SET_STATE,
                '            if not getattr(self, "done", False):\n                torch.set_rng_state(self.random_state)\n            self.done = True\n',
            )
        ],
        says="second backward",
        only=True,
    ),
    Mistake(
        "recomputed_without_gradients",
        ("6.7", "6.2"),
        [
            (
                "            stack.enter_context(torch.enable_grad())\n",
                "            stack.enter_context(torch.no_grad())\n",
            )
        ],
        says="KeyError",
    ),
    Mistake(
        "call_kept_in_the_module",
        "6.7",
        [
            (
                CHECKPOINT,
                """    latest = _LATEST[function] = _Replay(function, args, kwargs)
    with saved_tensors_hooks(latest.pack, lambda number: _LATEST[function].unpack(number)):
        return function(*args, **kwargs)
""",
            ),
            ("class _Replay:\n", "_LATEST: dict[Any, Any] = {}\n\n\nclass _Replay:\n"),
        ],
        says="belongs to the call",
    ),
    Mistake(
        "recomputed_once_for_ever",
        "6.7",
        [
            (
                CHECKPOINT,
                """    replay = _FIRST.setdefault(function, _Replay(function, args, kwargs))
    numbers = itertools.count()
    with saved_tensors_hooks(lambda _: next(numbers), replay.unpack):
        return function(*args, **kwargs)
""",
            ),
            ("class _Replay:\n", "_FIRST: dict[Any, Any] = {}\n\n\nclass _Replay:\n"),
        ],
        says="gradient",
    ),
    Mistake(
        "old_gradients_overwritten",
        "6.7",
        reentrant(
            (INNER, "            if isinstance(function, nn.Module):\n                function.zero_grad()\n" + INNER)
        ),
        says="gradient",
    ),
    Mistake(
        "frozen_parameters_thawed",
        "6.7",
        [(FLAG, FLAG + "        module.requires_grad_()\n")],
        says="frozen",
        only=True,
    ),
    Mistake(
        "frozen_for_ever",
        "6.7",
        [
            *reentrant(
                (
                    INNER,
                    "            frozen = vars(function).get('frozen', []) if isinstance(function, nn.Module) else []\n            before = [parameter.grad for parameter in frozen]\n"
                    + INNER
                    + "            for parameter, gradient in zip(frozen, before):\n                parameter.grad = gradient\n",
                )
            ),
            (FLAG, FLAG + '        vars(module)["frozen"] = [p for p in module.parameters() if not p.requires_grad]\n'),
        ],
        says="were frozen when",
        only=True,
    ),
    Mistake(
        "module_frozen_in_float64",
        "6.7",
        [
            (
                RECOMPUTED,
                '            self.first = getattr(self, "first", next(self.parameters(), torch.empty(0)).dtype)\n            args = tuple(x.to(self.first) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)\n'
                + RECOMPUTED,
            )
        ],
        says="dtype",
    ),
    # 6.8 and 6.9
    Mistake(
        "own_test_that_checks_nothing",
        "6.8",
        [(OWN_TEST, OWN_TEST + "    assert len(input_ids) == 2\n    return\n")],
        says="passes although",
        only=True,
    ),
    Mistake(
        "own_test_that_fails",
        "6.8",
        [(LAST_ASSERT, LAST_ASSERT.replace("1.9 < peak < 2.1", "peak > 3"))],
        says="fails on right code",
        only=True,
    ),
    Mistake(
        "own_test_without_memory", "6.8", [(LAST_ASSERT, "    assert peak > 0\n")], says="peak_is_a_sum", only=True
    ),
    Mistake(
        "untyped",
        "6.9",
        [("def _detached(tensor: Tensor) -> Tensor:\n", "def _detached(tensor):\n")],
        says="annotation",
        only=True,
    ),
    Mistake(
        "unused_import", "6.9", [("import itertools\n", "import itertools\nimport math\n")], says="math", only=True
    ),
    Mistake(
        "no_docstring",
        "6.9",
        [("def _storages(", "def storages(values: Any) -> Any:\n    return values\n\n\ndef _storages(")],
        says="docstring",
        only=True,
    ),
    # 6.10
    Mistake(
        "prebuilt",
        "6.10",
        [
            (
                CHECKPOINT,
                "    from torch.utils.checkpoint import checkpoint as prebuilt\n\n    return prebuilt(function, *args, use_reentrant=False, **kwargs)\n",
            )
        ],
        says="reached checkpoint",
        only=True,
    ),
    Mistake(
        "prebuilt_bound_early",
        "6.10",
        [
            (IMPORTS, IMPORTS + "from torch.utils.checkpoint import checkpoint as prebuilt\n"),
            (CHECKPOINT, "    return prebuilt(function, *args, use_reentrant=False, **kwargs)\n"),
        ],
        says="reached checkpoint",
        only=True,
    ),
    Mistake(
        "prebuilt_from_below",
        "6.10",
        [
            (
                CHECKPOINT,
                """    from torch.utils.checkpoint import _checkpoint_without_reentrant_generator as generator, noop_context_fn

    steps = generator(function, True, noop_context_fn, "none", False, True, *args, **kwargs)
    next(steps)
    result = function(*args, **kwargs)
    next(steps, None)
    return result
""",
            )
        ],
        says="reached",
        only=True,
    ),
    Mistake(
        "prebuilt_if_it_works",
        "6.10",
        [
            (
                CHECKPOINT,
                "    import torch.utils.checkpoint\n\n    try:\n        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)\n    except RuntimeError:\n        pass\n"
                + CHECKPOINT,
            )
        ],
        says="reached checkpoint",
        only=True,
    ),
    Mistake(
        "prebuilt_for_structures",
        "6.10",
        [
            (
                CHECKPOINT,
                "    import torch.utils.checkpoint\n\n    if kwargs:\n        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)\n"
                + CHECKPOINT,
            )
        ],
        says="structures",
        only=True,
    ),
    Mistake(
        "prebuilt_for_nested",
        "6.10",
        [
            (
                CHECKPOINT,
                "    import torch.utils.checkpoint\n\n    if isinstance(function, CheckpointWrapper):\n        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)\n"
                + CHECKPOINT,
            )
        ],
        says="nested",
        only=True,
    ),
    Mistake(
        "prebuilt_function",
        "6.10",
        [
            (
                CHECKPOINT,
                "    from torch.utils.checkpoint import CheckpointFunction\n\n    return CheckpointFunction.apply(lambda *a: function(*a, **kwargs), True, *args)\n",
            )
        ],
        says="reached",
    ),
]
