"""Wrong answers to ex06 that compute too often, too rarely or in another autocast state (6.2, 6.3)."""

from harness.model.bank import Mistake

CHECKPOINT = """    replay = _Replay(function, args, kwargs)
    with saved_tensors_hooks(replay.pack, replay.unpack):
        return function(*args, **kwargs)
"""
UNPACK = """        if number not in self.recomputed:
            self.recomputed = dict(enumerate(self.saved_tensors()))
        return self.recomputed.pop(number)
"""
AGAIN = "            self.function(*self.args, **self.kwargs)\n"
GET_STATE = "        self.random_state = torch.get_rng_state()\n"
AUTOCAST = """            for autocast in self.autocasts:
                stack.enter_context(autocast)
"""
RECOMPUTED = "            return checkpoint(self.module, *args, **kwargs)\n"
FLAG = "        self.training = module.training\n"
WRAP = "            setattr(model.get_submodule(owner), attribute, CheckpointWrapper(model.get_submodule(name)))\n"
RECORD = "            self.checkpointed_modules.append(name)\n"
DETACHED = "    return tensor.detach().requires_grad_(tensor.requires_grad)\n"
ENABLED = "torch.is_autocast_enabled(device)"

MISTAKES = [
    # Nothing at all.
    Mistake(
        "no_checkpointing",
        ("6.2", "6.1", "6.3", "6.4", "6.6", "6.7", "6.10"),
        "are entered [1, 1, 1, 1] times",
        (RECOMPUTED, "            return self.module(*args, **kwargs)\n"),
        (CHECKPOINT, "    return function(*args, **kwargs)\n"),
    ),
    Mistake(
        "zeros",
        ("6.2", "6.7", "6.10"),
        "values differ",
        (RECOMPUTED, "            return torch.zeros_like(args[0]) * args[0]\n"),
    ),
    Mistake("identity", ("6.2", "6.7", "6.10"), "values differ", (RECOMPUTED, "            return args[0]\n")),
    Mistake(
        "wrapper_returns_none",
        "6.2",
        "None",
        (RECOMPUTED, "            checkpoint(self.module, *args, **kwargs)\n"),
        ("        return self.module(*args, **kwargs)\n", "        return None\n"),
    ),
    # 6.2
    Mistake("active_in_eval", "6.2", "entered 2 times; once was wanted", (" and self.training", ""), wasteful=True),
    Mistake(
        "active_in_eval_if_a_part_trains",
        "6.2",
        "eval but for a part",
        ("self.training and", "any(part.training for part in self.module.modules()) and"),
        wasteful=True,
    ),
    Mistake("use_checkpoint_ignored", "6.2", "use_checkpoint=False", ("self.use_checkpoint and ", ""), only=True),
    Mistake(
        "use_checkpoint_inverted",
        "6.2",
        "entered",
        ("if self.use_checkpoint", "if not self.use_checkpoint"),
    ),
    Mistake("training_flag_not_taken_over", "6.2", "module in eval", (FLAG, ""), only=True),
    Mistake("module_set_to_training", "6.2", "module in eval", (FLAG, "        module.train()\n"), only=True),
    Mistake(
        "activations_kept_by_a_closure",
        "6.2",
        "alive",
        (
            "        self.recomputed: dict[int, Tensor] = {}\n",
            """        self.recomputed: dict[int, Tensor] = {}
        self.kept: list[Tensor] = []
""",
        ),
        (
            "    def pack(self, _: Tensor) -> int:\n",
            """    def pack(self, _: Tensor) -> int:
        self.kept.append(_.detach())
""",
        ),
    ),
    Mistake(
        "inputs_without_gradient_copied",
        "6.2",
        "kept once",
        (DETACHED, "    return tensor.detach().requires_grad_() if tensor.requires_grad else tensor.clone()\n"),
        wasteful=True,
    ),
    Mistake(
        "inputs_with_gradient_copied",
        "6.2",
        "kept once",
        (DETACHED, "    return tensor.detach().clone().requires_grad_() if tensor.requires_grad else tensor\n"),
        wasteful=True,
    ),
    Mistake(
        "recomputed_for_every_tensor",
        "6.2",
        "are entered",
        (UNPACK, "        return self.saved_tensors()[number]\n"),
    ),
    Mistake(
        "recomputed_twice",
        "6.2",
        "are entered [3, 3, 3, 3] times",
        (
            AGAIN,
            """            if torch.is_grad_enabled():
                with torch.no_grad():
                    self.function(*self.args, **self.kwargs)
                torch.set_rng_state(self.random_state)
"""
            + AGAIN,
        ),
    ),
    Mistake(
        "one_segment_over_all",
        ("6.2", "6.1", "6.6"),
        "embedding and head are entered [2, 2] times",
        (WRAP, ""),
        (RECORD, RECORD + '        vars(model)["forward"] = functools.partial(checkpoint, model.forward)\n'),
        ("import itertools\n", "import functools\nimport itertools\n"),
    ),
    Mistake(
        "checkpoint_is_a_plain_call",
        "6.2",
        "checkpoint(module, x)",
        (CHECKPOINT, "    return function(*args, **kwargs)\n"),
        (
            RECOMPUTED,
            """            replay = _Replay(self.module, args, kwargs)
            with saved_tensors_hooks(replay.pack, replay.unpack):
                return self.module(*args, **kwargs)
""",
        ),
    ),
    Mistake(
        "output_detached",
        "6.2",
        "are entered [1, 1, 1, 1] times",
        (
            RECOMPUTED,
            """            with torch.no_grad():
                return self.module(*args, **kwargs)
""",
        ),
    ),
    # 6.3
    Mistake("autocast_not_restored", "6.3", "multiplies in", (AUTOCAST, ""), only=True),
    Mistake("autocast_always_on", "6.3", "under autocast off", (ENABLED, 'device == "cpu"')),
    Mistake("autocast_off", "6.3", "multiplies in", (ENABLED, "False"), only=True),
    Mistake(
        "autocast_dtype_forgotten",
        "6.3",
        "under autocast float16",
        ("torch.get_autocast_dtype(device)", "torch.bfloat16"),
        only=True,
    ),
    Mistake(
        "autocast_kept_in_the_module",
        "6.3",
        "multiplies in",
        ("in self.autocasts", "in vars(self.function)['autocasts']"),
        (
            GET_STATE,
            GET_STATE
            + "        vars(function).update(autocasts=[torch.autocast('cpu', torch.get_autocast_dtype('cpu'), "
            "torch.is_autocast_enabled('cpu'))])\n",
        ),
        only=True,
    ),
    Mistake(
        "autocast_only_ever_switched_on",
        "6.3",
        "forward under autocast off",
        (
            AUTOCAST,
            """            for autocast in self.autocasts:
                if autocast._enabled:
                    stack.enter_context(autocast)
""",
        ),
        only=True,
    ),
]
