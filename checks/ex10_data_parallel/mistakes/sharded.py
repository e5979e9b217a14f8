"""Wrong answers to the sharded optimizer: its share and what it sends (10.7)."""

from harness.model.bank import Mistake

OWNER = "                owner = self._loads.index(min(self._loads))\n"
LOAD = "                self._loads[owner] += parameter.nbytes\n"
DEAL = "            if parameter.requires_grad and parameter not in self._owners:\n"
HIDE = """        hidden = {p: p.grad for p, owner in self._owners.items() if owner != dist.get_rank()}
        for parameter in hidden:
            parameter.grad = None
"""
STEP = "        self._optimizer.step()\n"
SEND = """        for parameter, owner in self._owners.items():
            _broadcast(parameter.detach(), source=owner)
"""
ADD = """        self._optimizer.add_param_group(param_group)
        self._show(self._optimizer)
"""
GATHER = '        dist.all_gather_object(shares, saved["state"])\n'

MISTAKES = [
    Mistake(
        "shards_in_turn",
        "10.7",
        "to the rank that has least so far",
        (OWNER, "                owner = len(self._owners) % len(self._loads)\n"),
        only=True,
    ),
    Mistake(
        "shards_by_count",
        "10.7",
        "to the rank that has least so far",
        (LOAD, "                self._loads[owner] += 1\n"),
        only=True,
    ),
    Mistake(
        "everything_everywhere",
        "10.7",
        "bytes are alive after a step",
        (HIDE, "        hidden: dict[Tensor, Tensor | None] = {}\n"),
        wasteful=True,
    ),
    Mistake(
        "frozen_ones_counted",
        "10.7",
        "large frozen ones",
        (DEAL + OWNER, "            if parameter not in self._owners:\n" + OWNER),
        only=True,
    ),
    Mistake(
        "each_group_anew",
        "10.7",
        "one per group",
        (
            '        for parameter in (p for group in self.param_groups for p in group["params"]):\n',
            (
                "        ordered = [(i, p) for i, group in enumerate(self.param_groups) for p in "
                'group["params"]]\n'
                "        for number, parameter in ordered:\n"
                '            if parameter is self.param_groups[number]["params"][0] and parameter not in '
                "self._owners:\n"
                "                self._loads = [0] * dist.get_world_size()\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "later_groups_on_rank_0",
        "10.7",
        "groups added later",
        (
            ADD,
            ADD.replace(
                "        self._show",
                (
                    '        self._owners |= dict.fromkeys(self._optimizer.param_groups[-1]["params"], 0)\n'
                    "        self._show"
                ),
            ),
        ),
    ),
    Mistake(
        "loads_forgotten_in_a_step",
        "10.7",
        "groups added later",
        (STEP, STEP + "        self._loads = [0] * len(self._loads)\n"),
        only=True,
    ),
    Mistake(
        "copies_of_strided_ones_kept",
        "10.7",
        "no copy of a parameter stays",
        (
            SEND,
            """        for parameter, owner in self._owners.items():
            data = parameter.detach().contiguous()
            dist.broadcast(data, owner)
            parameter.copy_(data)
            if data.stride() != parameter.stride():
                self._copies[parameter] = data
""",
        ),
        (
            "        self._loads = [0] * dist.get_world_size()\n",
            "        self._loads = [0] * dist.get_world_size()\n        self._copies: dict[Tensor, Tensor] = {}\n",
        ),
        only=True,
    ),
    Mistake(
        "gradients_kept",
        "10.7",
        "bytes are alive",
        (
            STEP,
            STEP
            + (
                "        self._last = [p.grad.clone() for p in self._owners if p.grad is not None]\n"
                "        self._all = [p.detach().clone() for p in self._owners] + self._last\n"
            ),
        ),
        wasteful=True,
    ),
    Mistake(
        "a_flat_copy_of_all",
        "10.7",
        "bytes are alive",
        (STEP, STEP + "        self._flat = torch.cat([p.detach().double().flatten() for p in self._owners] * 2)\n"),
        wasteful=True,
    ),
    Mistake(
        "copies_in_a_closure",
        "10.7",
        "bytes are alive",
        (
            STEP,
            STEP
            + (
                "        copies = [p.detach().double().flatten().repeat(2) for p in self._owners]\n"
                "        self._undo = lambda: copies\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "gathered_state_kept",
        "10.7",
        "what was gathered for the dict is not kept",
        (GATHER, GATHER + "        self._gathered = shares\n"),
        only=True,
    ),
    Mistake(
        "loaded_state_kept_whole",
        "10.7",
        "of a dict that is loaded only the share",
        ("if number in own}", "if number in own or own is not None}"),
    ),
    Mistake(
        "maxima_kept_whole",
        "10.7",
        "of a dict that is loaded only the share",
        (
            "        share = {number",
            (
                '        key, states = "max_exp_avg_sq", state_dict["state"].items()\n'
                "        self._others = [copy.deepcopy(s[key]) for n, s in states if n not in own and key in s]\n"
                "        share = {number"
            ),
        ),
        only=True,
    ),
    Mistake(
        "bfloat16_travels_as_float32",
        "10.7",
        "in their own dtype",
        (
            SEND,
            """        for parameter, owner in self._owners.items():
            data = parameter.detach().contiguous()
            data = data.float() if data.dtype == torch.bfloat16 else data
            dist.broadcast(data, owner)
            parameter.copy_(data)
""",
        ),
        wasteful=True,
    ),
    Mistake(
        "gradients_summed_in_step",
        "10.7",
        "it takes no reductions",
        (
            HIDE,
            (
                "        for parameter in self._owners:\n"
                "            if parameter.grad is not None:\n"
                "                gradient = parameter.grad.clone()\n"
                "                dist.all_reduce(gradient)\n"
            )
            + HIDE,
        ),
        only=True,
    ),
    Mistake("sent_twice", "10.7", "bytes are sent", (SEND, SEND + SEND), wasteful=True),
    Mistake(
        "everything_gathered_from_all",
        "10.7",
        "bytes are sent",
        (
            SEND,
            """        for parameter, owner in self._owners.items():
            data = parameter.detach().contiguous()
            others = [torch.empty_like(data) for _ in self._loads]
            dist.all_gather(others, data)
            parameter.copy_(others[owner])
""",
        ),
        wasteful=True,
    ),
    Mistake(
        "state_sent_too",
        "10.7",
        "bytes are sent",
        (
            SEND,
            SEND
            + "        dist.all_gather_object([None] * len(self._loads), [self.state.get(p) for p in self._owners])\n",
        ),
        wasteful=True,
    ),
    Mistake(
        "frozen_ones_sent",
        "10.7",
        "bytes are sent",
        (
            SEND,
            SEND
            + """        every = [p for group in self.param_groups for p in group["params"]]
        for parameter in (p for p in every if not p.requires_grad):
            _broadcast(parameter.detach(), source=0)
""",
        ),
        wasteful=True,
    ),
    Mistake(
        "sent_by_sums",
        "10.7",
        "it takes no reductions",
        (
            SEND,
            """        for parameter, owner in self._owners.items():
            data = parameter.detach() * (owner == dist.get_rank())
            dist.all_reduce(data)
            parameter.copy_(data)
""",
        ),
        only=True,
    ),
]
