"""Wrong answers to the sharded optimizer: its values (10.8)."""

from harness.model.bank import Mistake

HIDE = """        hidden = {p: p.grad for p, owner in self._owners.items() if owner != dist.get_rank()}
        for parameter in hidden:
            parameter.grad = None
"""
STEP = "        self._optimizer.step()\n"
SEND = """        for parameter, owner in self._owners.items():
            _broadcast(parameter.detach(), source=owner)
"""
LOSS = """            with torch.enable_grad():
                loss = closure()
"""
ADD = """        self._optimizer.add_param_group(param_group)
        self._show(self._optimizer)
"""
GROUPS = "        self.param_groups, self.state = optimizer.param_groups, optimizer.state\n"

MISTAKES = [
    Mistake(
        "shards_stale",
        "10.8",
        "every parameter comes to all ranks",
        (SEND, ""),
    ),
    Mistake(
        "last_shard_stale",
        "10.8",
        "rank",
        (
            SEND,
            (
                "        for parameter, owner in self._owners.items():\n"
                "            if owner < 1:\n"
                "                _broadcast(parameter.detach(), source=owner)\n"
            ),
        ),
    ),
    Mistake(
        "scheduler_unseen",
        "10.8",
        "under StepLR",
        (
            GROUPS,
            (
                "        self.param_groups = [{**group} for group in optimizer.param_groups]\n"
                "        self.state = optimizer.state\n"
            ),
        ),
    ),
    Mistake(
        "only_rates_are_taken_over",
        "10.8",
        "under whatever key",
        (
            GROUPS,
            (
                "        self.param_groups = [{**group} for group in optimizer.param_groups]\n"
                "        self.state = optimizer.state\n"
            ),
        ),
        (
            STEP,
            (
                "        for theirs, ours in zip(self._optimizer.param_groups, self.param_groups, "
                "strict=True):\n"
                '            theirs["lr"] = ours["lr"]\n'
            )
            + STEP,
        ),
    ),
    Mistake(
        "a_tensor_of_a_rate_read_once",
        "10.8",
        "under LambdaLR",
        (
            STEP,
            """        rates = [group["lr"] for group in self.param_groups]
        for number, group in enumerate(self.param_groups):
            if number not in self._rates or self._rates[number][0] is not group["lr"]:
                self._rates[number] = group["lr"], copy.deepcopy(group["lr"])
            group["lr"] = self._rates[number][1]
"""
            + STEP
            + """        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
""",
        ),
        (
            "        self._loads = [0] * dist.get_world_size()\n",
            "        self._loads = [0] * dist.get_world_size()\n        self._rates: dict[int, Any] = {}\n",
        ),
        only=True,
    ),
    Mistake(
        "step_without_groups_rates",
        "10.8",
        "groups",
        (
            STEP,
            (
                "        for group in self._optimizer.param_groups:\n"
                '            group["lr"] = self._optimizer.param_groups[0]["lr"]\n'
            )
            + STEP,
        ),
    ),
    Mistake("nothing_steps", "10.8", "SGD at 0.5", (STEP, "")),
    Mistake(
        "decay_without_a_gradient",
        "10.8",
        "None gradients",
        (
            HIDE,
            """        for parameter in self._owners:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
"""
            + HIDE,
        ),
    ),
    Mistake(
        "none_gradients_left_out",
        "10.8",
        "differs between the ranks",
        (
            SEND,
            SEND.replace(
                "            _broad",
                (
                    "            if parameter.grad is None and owner == dist.get_rank():\n"
                    "                continue\n"
                    "            _broad"
                ),
            ),
        ),
    ),
    Mistake(
        "strided_not_written",
        "10.8",
        "tensor 4",
        (
            SEND,
            """        for parameter, owner in self._owners.items():
            dist.broadcast(parameter.detach().contiguous(), owner)
""",
        ),
    ),
    Mistake(
        "closure_called_twice", "10.8", "times in two steps", (LOSS, LOSS + "                closure()\n"), only=True
    ),
    Mistake(
        "closure_only_on_rank_0",
        "10.8",
        "step(closure)",
        (
            LOSS,
            (
                "            if dist.get_rank() == 0:\n"
                "                with torch.enable_grad():\n"
                "                    loss = closure()\n"
            ),
        ),
    ),
    Mistake("closure_without_gradients", "10.8", "does not require grad", (LOSS, "            loss = closure()\n")),
    Mistake(
        "closure_value_dropped",
        "10.8",
        "its value was wanted",
        ("        return loss\n", "        return None\n"),
        only=True,
    ),
    Mistake(
        "added_groups_stepped_by_all",
        "10.7",
        "groups added later",
        (ADD, "        self._optimizer.add_param_group(param_group)\n"),
        only=True,
    ),
    Mistake(
        "added_groups_ignored",
        "10.8",
        "groups added",
        (ADD, "        self._show(self._optimizer)\n"),
    ),
    Mistake(
        "added_groups_start_over",
        "10.8",
        "groups added",
        (ADD, ADD + "        self.state.clear()\n"),
    ),
    Mistake(
        "sgd_whatever_is_asked",
        "10.8",
        "AdamW",
        (
            "        optimizer = optimizer_class(params, **defaults)\n",
            (
                '        optimizer = torch.optim.SGD(params, lr=defaults.get("lr", 1e-3), '
                'momentum=defaults.get("momentum", 0))\n'
            ),
        ),
    ),
    Mistake(
        "defaults_dropped",
        "10.8",
        "besides optimizer_class is passed on",
        ("optimizer_class(params, **defaults)", 'optimizer_class(params, lr=defaults.get("lr", 1e-3))'),
    ),
    Mistake(
        "adam_by_default",
        "10.8",
        "ShardedOptimizer(generator)",
        ("= torch.optim.AdamW, **defaults", "= torch.optim.Adam, **defaults"),
        only=True,
    ),
    Mistake(
        "a_generator_read_twice",
        "10.8",
        "an empty parameter list",
        (
            "        optimizer = optimizer_class(params, **defaults)\n",
            (
                "        count = len([*params])\n"
                "        optimizer = optimizer_class(params, **defaults)\n"
                "        assert count\n"
            ),
        ),
    ),
    Mistake(
        "groups_of_the_share_alone",
        "10.8",
        "differs between the ranks",
        (
            GROUPS,
            """        self.state = optimizer.state
        self.param_groups = optimizer.param_groups
        if len(self.param_groups) > 1 and dist.get_rank():
            self.param_groups = self.param_groups[1:]
""",
        ),
    ),
    Mistake(
        "not_an_optimizer",
        "10.8",
        "is no torch.optim.Optimizer",
        ("class ShardedOptimizer(torch.optim.Optimizer):", "class ShardedOptimizer:"),
        (
            "        super().__init__(optimizer.param_groups, optimizer.defaults)\n",
            "        self.zero_grad = optimizer.zero_grad\n",
        ),
        ("            return super().add_param_group(param_group)\n", "            return\n"),
    ),
    Mistake(
        "by_the_zero_optimizer",
        "10.8",
        "reached",
        (
            "        self._optimizer = optimizer\n",
            (
                "        self._optimizer = optimizer\n"
                "        with contextlib.suppress(Exception):\n"
                "            ZeroRedundancyOptimizer(params, optimizer_class)\n"
            ),
        ),
        ("import copy\n", "import contextlib\nimport copy\n"),
        (
            "from torch.distributed import Work\n",
            "from torch.distributed import Work\nfrom torch.distributed.optim import ZeroRedundancyOptimizer\n",
        ),
        only=True,
    ),
    Mistake(
        "sent_in_half_precision",
        "10.8",
        "in their own dtype",
        (
            SEND,
            """        for parameter, owner in self._owners.items():
            data = parameter.detach().contiguous()
            data = data.float() if data.dtype == torch.float64 else data
            dist.broadcast(data, owner)
            parameter.copy_(data)
""",
        ),
        only=True,
    ),
    Mistake(
        "the_owner_keeps_more_digits",
        "10.8",
        "not the bits of rank 0",
        (
            SEND,
            """        for parameter, owner in self._owners.items():
            data = parameter.detach().contiguous() * (1 + 1e-15)
            dist.broadcast(data, owner)
            if owner != dist.get_rank():
                parameter.copy_(data)
""",
        ),
        only=True,
    ),
    Mistake(
        "ranks_in_the_class",
        "10.8",
        "on 2 ranks: tensor 0 after step 2",
        (
            "        self._loads = [0] * dist.get_world_size()\n",
            "        self._loads = [0] * dist.get_world_size()\n        type(self)._place = dist.get_rank()\n",
        ),
        ("if owner != dist.get_rank()}", "if owner != self._place}"),
    ),
]
