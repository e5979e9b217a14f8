"""Wrong answers to ex06 that lose arguments, outputs, gradients or the random stream (6.4, 6.7)."""

from harness.model.bank import Mistake

CHECKPOINT = """    replay = _Replay(function, args, kwargs)
    with saved_tensors_hooks(replay.pack, replay.unpack):
        return function(*args, **kwargs)
"""
CLASS = "class _Replay:\n"
AGAIN = "            self.function(*self.args, **self.kwargs)\n"
DETACHED = "    return tensor.detach().requires_grad_(tensor.requires_grad)\n"
FORK = "            stack.enter_context(torch.random.fork_rng(devices=range(len(self.cuda_random_states))))\n"
SET_STATE = "            torch.set_rng_state(self.random_state)\n"
GET_STATE = "        self.random_state = torch.get_rng_state()\n"
RECOMPUTED = "            return checkpoint(self.module, *args, **kwargs)\n"
FLAG = "        self.training = module.training\n"
# The other way to write `checkpoint`, right as it stands: an autograd.Function whose backward runs a backward of its
# own. The lines below it are lines of it.
REENTRANT = (
    CHECKPOINT,
    """    from torch.utils._pytree import tree_flatten, tree_unflatten

    replay = _Replay(function, args, kwargs)
    leaves, spec = tree_flatten((args, kwargs))
    tensors = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())
    trains = not isinstance(function, nn.Module) or any(p.requires_grad for p in function.parameters())
    forms: list[Any] = []

    def run(given: Any) -> tuple[Any, ...]:
        twins = dict(zip(map(id, tensors), given))
        again = [twins.get(id(leaf), leaf) for leaf in leaves]
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

    flat = Rerun.apply(torch.empty(0, requires_grad=trains), *tensors)
    return tree_unflatten(flat, forms[0])
""",
)
GIVEN = "            given = [_detached(tensor) for tensor in ctx.saved_tensors]\n"
INNER = "            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])\n"
GRADS = "            return None, *(tensor.grad for tensor in given)\n"
TRAINS = "    trains = not isinstance(function, nn.Module) or any(p.requires_grad for p in function.parameters())\n"
LEAVES = "    leaves, spec = tree_flatten((args, kwargs))\n"

MISTAKES = [
    # 6.4
    Mistake(
        "kwargs_dropped",
        "6.4",
        "keyword arguments",
        REENTRANT,
        ("(*new_args, **new_kwargs)", "(*new_args, **({} if torch.is_grad_enabled() else new_kwargs))"),
        only=True,
    ),
    Mistake("kwargs_dropped_in_both", "6.4", "output", (RECOMPUTED, RECOMPUTED.replace(", **kwargs", ""))),
    Mistake(
        "kwargs_without_gradient",
        "6.4",
        "gradient",
        REENTRANT,
        (LEAVES, "    leaves, spec = tree_flatten((args, {}))\n"),
        (
            "= tree_unflatten(again, spec)",
            "= *tree_unflatten(again, spec)[:1], tree_map_only(Tensor, lambda t: t.detach(), kwargs)",
        ),
        only=True,
    ),
    Mistake(
        "nested_kwargs_without_gradient",
        "6.4",
        "keyword arguments",
        REENTRANT,
        (
            LEAVES,
            """    kwargs = {
        key: value if isinstance(value, Tensor) else tree_map_only(Tensor, Tensor.detach, value)
        for key, value in kwargs.items()
    }
"""
            + LEAVES,
        ),
        only=True,
    ),
    Mistake(
        "calls_without_tensors_refused",
        "6.4",
        "no tensor among",
        (
            CHECKPOINT,
            """    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
        raise ValueError("no tensor among the arguments")
"""
            + CHECKPOINT,
        ),
        only=True,
    ),
    Mistake(
        "unused_inputs_refused",
        "6.4",
        "unused input",
        REENTRANT,
        (
            GRADS,
            """            if any(t.requires_grad and t.grad is None for t in given):
                raise RuntimeError("unused input")
"""
            + GRADS,
        ),
        only=True,
    ),
    Mistake("requires_grad_lost", ("6.4", "6.7"), "none came", REENTRANT, (DETACHED, "    return tensor.detach()\n")),
    Mistake(
        "everything_requires_grad",
        "6.4",
        "raises",
        (DETACHED, "    return tensor.detach().requires_grad_(tensor.is_floating_point())\n"),
    ),
    Mistake("inputs_without_gradient_train_nothing", "6.4", "grad", REENTRANT, (", requires_grad=trains", "")),
    Mistake(
        "inputs_get_no_gradient",
        ("6.4", "6.7"),
        "none came",
        REENTRANT,
        (GRADS, "            return (None,) * (len(given) + 1)\n"),
    ),
    Mistake(
        "first_input_only",
        "6.4",
        "tensor input 1",
        REENTRANT,
        (GRADS, "            return None, given[0].grad, *([None] * (len(given) - 1))\n"),
        only=True,
    ),
    Mistake(
        "inputs_made_to_need_gradients",
        "6.4",
        "none was wanted",
        (
            CHECKPOINT,
            """    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.is_leaf:
            leaf.requires_grad_()
"""
            + CHECKPOINT,
        ),
    ),
    Mistake(
        "one_tensor_becomes_several",
        "6.4",
        "one tensor given twice",
        ("lambda x: twins.setdefault(id(x), _detached(x))", "_detached"),
        only=True,
    ),
    Mistake(
        "one_leaf_for_one_tensor",
        "6.4",
        "one tensor given twice",
        REENTRANT,
        (
            "    tensors = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())\n",
            "    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]\n",
        ),
        (
            GIVEN,
            """            distinct = {id(tensor): _detached(tensor) for tensor in tensors}
            given = [distinct[id(tensor)] for tensor in tensors]
""",
        ),
        only=True,
    ),
    Mistake(
        "nested_inputs_without_gradient",
        "6.4",
        "gradient",
        REENTRANT,
        (
            GIVEN,
            GIVEN
            + "            given = [t if any(u is v for v in args) else t.detach() for t, u in zip(given, tensors)]\n",
        ),
        only=True,
    ),
    Mistake(
        "dicts_passed_on_as_they_are",
        "6.4",
        "made from others",
        REENTRANT,
        (LEAVES, LEAVES.replace("))\n", "), is_leaf=lambda x: isinstance(x, dict) and x is not kwargs)\n")),
        only=True,
    ),
    Mistake(
        "lists_passed_on_as_they_are",
        "6.4",
        "made from others",
        REENTRANT,
        (LEAVES, LEAVES.replace("))\n", "), is_leaf=lambda x: isinstance(x, list))\n")),
        only=True,
    ),
    Mistake(
        "nested_outputs_without_gradient",
        "6.4",
        "gradient",
        REENTRANT,
        (
            "tree_flatten(function(*new_args, **new_kwargs))",
            "tree_flatten(function(*new_args, **new_kwargs), is_leaf=lambda x: isinstance(x, dict))",
        ),
        only=True,
    ),
    Mistake(
        "first_output_only", "6.4", "gradient", REENTRANT, (INNER, "            pairs = pairs[:1]\n" + INNER), only=True
    ),
    Mistake("all_outputs_need_gradients", "6.4", "grad", REENTRANT, (" and o.requires_grad]", "]"), only=True),
    Mistake(
        "unused_outputs_not_expected",
        "6.4",
        "grad",
        REENTRANT,
        (
            "            ctx.save_for_backward(*given)\n",
            """            ctx.save_for_backward(*given)
            ctx.set_materialize_grads(False)
""",
        ),
        only=True,
    ),
    Mistake(
        "outputs_come_as_a_tuple",
        "6.4",
        "structure",
        REENTRANT,
        ("tree_unflatten(flat, forms[0])", "flat[0] if len(flat) == 1 else tuple(flat)"),
        only=True,
    ),
    Mistake(
        "tensor_outputs_only",
        "6.4",
        "structure",
        REENTRANT,
        (
            "tree_unflatten(flat, forms[0])",
            "flat[0] if len(flat) == 1 else tuple(x for x in flat if isinstance(x, Tensor))",
        ),
        only=True,
    ),
    Mistake(
        "tensor_arguments_only",
        "6.4",
        "structure",
        (RECOMPUTED, RECOMPUTED.replace("*args", "*(x for x in args if isinstance(x, Tensor))")),
        only=True,
    ),
    Mistake(
        "nested_arguments_kept_from_tensors",
        "6.4",
        "a second time",
        (
            RECOMPUTED,
            """            if not all(isinstance(x, Tensor) for x in (*args, *kwargs.values())):
                return self.module(*args, **kwargs)
"""
            + RECOMPUTED,
        ),
        only=True,
    ),
    # 6.7
    Mistake(
        "parameters_without_gradient",
        ("6.7", "6.4", "6.6"),
        "none came",
        REENTRANT,
        (
            INNER,
            """            needing = [tensor for tensor in given if tensor.requires_grad]
"""
            "            found = torch.autograd.grad([o for o, _ in pairs], needing, [g for _, g in pairs], "
            "allow_unused=True) if needing else ()\n"
            """            for tensor, gradient in zip(needing, found):
                tensor.grad = gradient
""",
        ),
    ),
    Mistake("random_state_not_restored", "6.7", "dropout", (SET_STATE, ""), only=True),
    Mistake("random_stream_moved", "6.7", "random stream", (FORK, ""), only=True),
    Mistake(
        "random_state_taken_afterwards",
        "6.7",
        "dropout",
        (
            CHECKPOINT,
            """    replay = _Replay(function, args, kwargs)
    with saved_tensors_hooks(replay.pack, replay.unpack):
        result = function(*args, **kwargs)
    replay.random_state = torch.get_rng_state()
    return result
""",
        ),
        only=True,
    ),
    Mistake(
        "seed_set_both_times", "6.7", "dropout", (GET_STATE, "        torch.manual_seed(0)\n" + GET_STATE), only=True
    ),
    Mistake(
        "stream_put_back_to_after_forward",
        "6.7",
        "random stream",
        (
            CHECKPOINT,
            """    replay = _Replay(function, args, kwargs)
    with saved_tensors_hooks(replay.pack, replay.unpack):
        result = function(*args, **kwargs)
    replay.after = torch.get_rng_state()
    return result
""",
        ),
        (FORK, "            stack.callback(lambda: torch.set_rng_state(self.after))\n"),
        (GET_STATE, GET_STATE + "        self.after = self.random_state\n"),
        only=True,
    ),
    Mistake(
        "one_backward_only",
        "6.7",
        "missing 1 required positional argument",
        (AGAIN, AGAIN + "            self.args, self.kwargs = (), {}\n"),
    ),
    Mistake(
        "leftovers_of_a_backward_trusted",
        "6.4",
        "KeyError",
        ("if number not in self.recomputed", "if not self.recomputed"),
        only=True,
    ),
    Mistake(
        "recomputed_without_gradients",
        ("6.7", "6.2"),
        "KeyError",
        ("torch.enable_grad()", "torch.no_grad()"),
    ),
    Mistake(
        "call_kept_in_the_module",
        "6.7",
        "belongs to the call",
        (
            CHECKPOINT,
            """    latest = _LATEST[function] = _Replay(function, args, kwargs)
    with saved_tensors_hooks(latest.pack, lambda number: _LATEST[function].unpack(number)):
        return function(*args, **kwargs)
""",
        ),
        (CLASS, "_LATEST: dict[Any, Any] = {}\n\n\n" + CLASS),
    ),
    Mistake(
        "recomputed_once_for_ever",
        "6.7",
        "gradient",
        (
            CHECKPOINT,
            """    replay = _FIRST.setdefault(function, _Replay(function, args, kwargs))
    numbers = itertools.count()
    with saved_tensors_hooks(lambda _: next(numbers), replay.unpack):
        return function(*args, **kwargs)
""",
        ),
        (CLASS, "_FIRST: dict[Any, Any] = {}\n\n\n" + CLASS),
    ),
    Mistake(
        "old_gradients_overwritten",
        "6.7",
        "gradient",
        REENTRANT,
        (
            INNER,
            """            if isinstance(function, nn.Module):
                function.zero_grad()
"""
            + INNER,
        ),
    ),
    Mistake("frozen_parameters_thawed", "6.7", "frozen", (FLAG, FLAG + "        module.requires_grad_()\n"), only=True),
    Mistake(
        "frozen_for_ever",
        "6.7",
        "were frozen when",
        REENTRANT,
        (
            INNER,
            """            frozen = vars(function).get('frozen', []) if isinstance(function, nn.Module) else []
            before = [parameter.grad for parameter in frozen]
"""
            + INNER
            + """            for parameter, gradient in zip(frozen, before):
                parameter.grad = gradient
""",
        ),
        (FLAG, FLAG + '        vars(module)["frozen"] = [p for p in module.parameters() if not p.requires_grad]\n'),
        only=True,
    ),
    Mistake(
        "module_frozen_in_float64",
        "6.7",
        "dtype",
        (
            RECOMPUTED,
            """            self.first = getattr(self, "first", next(self.parameters(), torch.empty(0)).dtype)
            args = tuple(x.to(self.first) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
"""
            + RECOMPUTED,
        ),
    ),
    Mistake(
        "backward_under_the_autocast_of_forward",
        "6.7",
        "switches it off",
        REENTRANT,
        (
            INNER,
            """            with ExitStack() as stack:
                for autocast in replay.autocasts:
                    stack.enter_context(autocast)
    """
            + INNER,
        ),
        only=True,
    ),
    Mistake(
        "tensors_told_apart_by_their_memory",
        "6.4",
        "two leaves over one memory",
        REENTRANT,
        ("{id(leaf): leaf for leaf", "{key(leaf): leaf for leaf"),
        (
            LEAVES,
            "    key = lambda t: (t.data_ptr(), t.shape, t.stride(), t.requires_grad) if isinstance(t, Tensor) else 0\n"
            + LEAVES,
        ),
        ("dict(zip(map(id, tensors), given))", "dict(zip(map(key, tensors), given))"),
        ("twins.get(id(leaf), leaf)", "twins.get(key(leaf), leaf)"),
        only=True,
    ),
    Mistake(
        "thawed_in_vain",
        "6.7",
        "thawed after a first call",
        REENTRANT,
        (TRAINS, TRAINS + '    trains = vars(function).setdefault("trains", trains)\n'),
    ),
    Mistake(
        "parameters_of_the_first_call",
        "6.7",
        "backward of later steps",
        REENTRANT,
        (
            TRAINS,
            TRAINS
            + """    known = []
    if isinstance(function, nn.Module):
        known = vars(function).setdefault("known", list(function.parameters()))
""",
        ),
        (
            INNER,
            """            new = []
            if isinstance(function, nn.Module):
                new = [p for p in function.parameters() if not any(p is q for q in known)]
            before = [parameter.grad for parameter in new]
"""
            + INNER
            + """            for parameter, gradient in zip(new, before):
                parameter.grad = gradient
""",
        ),
        only=True,
    ),
]
