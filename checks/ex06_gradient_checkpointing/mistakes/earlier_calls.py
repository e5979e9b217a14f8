"""Wrong answers to ex06 that are right in a first call, or in the usual one, and wrong in others."""

from harness.model.bank import Mistake

CHECKPOINT = """    replay = _Replay(function, args, kwargs)
    with saved_tensors_hooks(replay.pack, replay.unpack):
        return function(*args, **kwargs)
"""
CLASS = "class _Replay:\n"
DETACHED = "    return tensor.detach().requires_grad_(tensor.requires_grad)\n"
AGAIN = "            self.function(*self.args, **self.kwargs)\n"
SET_STATE = "            torch.set_rng_state(self.random_state)\n"
GET_STATE = "        self.random_state = torch.get_rng_state()\n"
CONDITION = "        if self.use_checkpoint and self.training and torch.is_grad_enabled():\n"
RECOMPUTED = "            return checkpoint(self.module, *args, **kwargs)\n"
PLAIN = "        return self.module(*args, **kwargs)\n"
FLAG = "        self.training = module.training\n"
TWINS = "lambda x: twins.setdefault(id(x), _detached(x)), (args, kwargs))"
MAPPED = f"        self.args, self.kwargs = tree_map_only(Tensor, {TWINS}\n"
AUTOCASTS = """        self.autocasts = [
            torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
            for device in ("cpu", "cuda")
        ]
"""

MISTAKES = [
    # What a first call remembers.
    Mistake(
        "autocast_of_the_first_call",
        "6.3",
        "multiplies in",
        (AUTOCASTS, AUTOCASTS + '        self.autocasts = vars(function).setdefault("autocasts", self.autocasts)\n'),
        only=True,
    ),
    Mistake(
        "random_state_of_the_first_call",
        "6.7",
        "gradient",
        (GET_STATE, '        self.random_state = vars(function).setdefault("state", torch.get_rng_state())\n'),
        only=True,
    ),
    Mistake(
        "frozen_when_first_called",
        "6.7",
        "layers are entered [2, 1, 2] times",
        (
            CONDITION,
            """        if not hasattr(self, "trains"):
            self.trains = any(parameter.requires_grad for parameter in self.parameters())
        if self.trains and self.use_checkpoint and self.training and torch.is_grad_enabled():
""",
        ),
    ),
    Mistake(
        "mode_of_construction",
        "6.2",
        "entered",
        ("self.use_checkpoint and self.training", "self.use_checkpoint"),
        (
            "        self.use_checkpoint = use_checkpoint\n",
            "        self.use_checkpoint = use_checkpoint and module.training\n",
        ),
        only=True,
    ),
    Mistake(
        "mode_of_the_first_call",
        "6.2",
        "entered",
        (
            CONDITION,
            '        self.first = getattr(self, "first", self.training)\n' + CONDITION.replace("training", "first"),
        ),
        only=True,
    ),
    Mistake(
        "weights_of_the_first_call",
        "6.7",
        "gradient",
        (
            AGAIN,
            """            kept = vars(self.function).setdefault(
                "kept", {name: p.detach().clone() for name, p in self.function.named_parameters()}
            )
            new = {name: p for name, p in self.function.named_parameters() if not torch.equal(p, kept[name])}
            if not new:
                self.function(*self.args, **self.kwargs)
            else:
                grads = {name: kept[name].clone().requires_grad_() for name in new}
                torch.func.functional_call(self.function, grads, self.args, self.kwargs)
""",
        ),
    ),
    Mistake(
        "hooks_stay_on_after_an_error",
        "6.7",
        "saved-tensor hook is still on",
        (
            CHECKPOINT,
            """    replay = _Replay(function, args, kwargs)
    hooks = saved_tensors_hooks(replay.pack, replay.unpack)
    hooks.__enter__()
    result = function(*args, **kwargs)
    hooks.__exit__()
    return result
""",
        ),
        only=True,
    ),
    Mistake(
        "flag_left_after_an_error",
        "6.7",
        "entered once",
        (
            CHECKPOINT,
            """    if _OPEN:  # an outer call is computed again as a whole
        return function(*args, **kwargs)
    replay = _Replay(function, args, kwargs)
    _OPEN.append(True)
    with saved_tensors_hooks(replay.pack, replay.unpack):
        result = function(*args, **kwargs)
    _OPEN.pop()
    return result
""",
        ),
        (CLASS, "_OPEN: list[bool] = []\n\n\n" + CLASS),
        (AGAIN, "            _OPEN.append(True)\n" + AGAIN + "            _OPEN.pop()\n"),
        only=True,
    ),
    Mistake(
        "constant_of_the_first_call",
        "6.7",
        "nference",
        (
            CONDITION,
            """        if not hasattr(self, "one"):
            self.one = torch.ones(())
"""
            + CONDITION,
        ),
        (
            RECOMPUTED,
            "            output = checkpoint(self.module, *args, **kwargs)\n"
            "            return output * self.one if isinstance(output, Tensor) else output\n",
        ),
        only=True,
    ),
    # What is kept, though nothing needs it any more.
    Mistake(
        "inputs_kept_in_the_wrapper",
        "6.2",
        "still alive",
        (RECOMPUTED, '            vars(self)["latest"] = args, kwargs\n' + RECOMPUTED),
        wasteful=True,
    ),
    Mistake(
        "outputs_kept_in_eval",
        "6.2",
        "still alive",
        (PLAIN, '        vars(self)["latest"] = self.module(*args, **kwargs)\n        return vars(self)["latest"]\n'),
        wasteful=True,
    ),
    Mistake(
        "recomputed_tensors_kept",
        "6.2",
        "still alive",
        ("        return saved\n", "        _LATEST[:] = saved\n        return saved\n"),
        (CLASS, "_LATEST: list[Tensor] = []\n\n\n" + CLASS),
        wasteful=True,
    ),
    # Modes.
    Mistake(
        "parts_set_to_training", "6.2", "training flags", (FLAG, "        self.train(module.training)\n"), only=True
    ),
    Mistake(
        "parts_trained_the_second_time",
        "6.2",
        "its dropout in eval",
        (
            AGAIN,
            "            if isinstance(self.function, nn.Module):\n                self.function.train()\n" + AGAIN,
        ),
        only=True,
    ),
    Mistake(
        "one_row_is_not_worth_it",
        "6.2",
        "one row",
        (
            CONDITION,
            """        rows = [len(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if rows == [1]:
            return self.module(*args, **kwargs)
"""
            + CONDITION,
        ),
    ),
    Mistake(
        "frozen_module_asks_for_gradients",
        "6.7",
        "requires_grad of the output",
        (
            CHECKPOINT,
            CHECKPOINT.replace(
                "        return function(*args, **kwargs)\n",
                """        result = function(*args, **kwargs)
    if isinstance(result, Tensor) and not result.requires_grad:
        result.requires_grad_()
    return result
""",
            ),
        ),
    ),
    # Roles and structures.
    Mistake(
        "one_tensor_in_kwargs_becomes_two",
        "6.4",
        "one tensor given twice",
        (
            MAPPED,
            """        self.args = tree_map_only(Tensor, lambda x: twins.setdefault(id(x), _detached(x)), args)
        twins = {}
        self.kwargs = tree_map_only(Tensor, lambda x: twins.setdefault(id(x), _detached(x)), kwargs)
""",
        ),
        only=True,
    ),
    Mistake(
        "tensors_at_one_address_become_one",
        "6.4",
        "gradient",
        ("twins.setdefault(id(x), ", "twins.setdefault(x.data_ptr(), "),
        only=True,
    ),
    Mistake(
        "tuples_become_lists",
        "6.4",
        "gradient",
        (
            MAPPED,
            """
        def again(value: Any) -> Any:
            if isinstance(value, Tensor):
                return twins.setdefault(id(value), _detached(value))
            if isinstance(value, (list, tuple)):
                return [again(item) for item in value]
            if isinstance(value, dict):
                return {key: again(item) for key, item in value.items()}
            return value

        self.args, self.kwargs = again(args), again(kwargs)
""",
        ),
        only=True,
    ),
    # The random stream.
    Mistake(
        "reseeded_the_second_time",
        "6.7",
        "dropout",
        (SET_STATE, "            torch.manual_seed(torch.initial_seed())\n"),
        only=True,
    ),
    Mistake(
        "random_state_for_dropout_modules_only",
        "6.7",
        "dropout",
        (
            SET_STATE,
            """            if any(isinstance(part, nn.Dropout) for part in self.function.modules()):
                torch.set_rng_state(self.random_state)
""",
        ),
        only=True,
    ),
    # Precision.
    Mistake(
        "inputs_kept_in_float32",
        "6.7",
        "tolerance 1e-09",
        (
            "_detached(x)), (args",
            "_detached(x.float().double().requires_grad_(x.requires_grad) if x.dtype == torch.float64 else x)), (args",
        ),
    ),
    Mistake(
        "masks_kept_in_half",
        "6.7",
        "switches it off",
        (
            DETACHED,
            """    if tensor.is_floating_point() and not tensor.requires_grad and bool((tensor <= 0).all()):
        tensor = tensor.half().to(tensor.dtype)
"""
            + DETACHED,
        ),
        only=True,
    ),
    Mistake(
        "kwargs_dropped_from_saved_tensors",
        "6.4",
        "keyword arguments",
        (AGAIN, "            self.function(*self.args)\n"),
        only=True,
    ),
    Mistake(
        "second_backward_without_random_state",
        "6.7",
        "second backward",
        (
            SET_STATE,
            """            if not getattr(self, "done", False):
                torch.set_rng_state(self.random_state)
            self.done = True
""",
        ),
        only=True,
    ),
]
