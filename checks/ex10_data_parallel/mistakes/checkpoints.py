"""Wrong answers to the checkpoints (10.9)."""

from harness.model.bank import Mistake

COPY = "        saved = copy.deepcopy(self._optimizer.state_dict())\n"
GATHER = """        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, saved["state"])
        saved["state"] = {number: state for share in shares for number, state in share.items()}
"""
OWN = "        own = {n for n, p in enumerate(parameters) if self._owners.get(p) == dist.get_rank()}\n"
LOAD = """        self._optimizer.load_state_dict(copy.deepcopy({**state_dict, "state": share}))
        self._show(self._optimizer)
"""

MISTAKES = [
    Mistake("one_shard_saved", "10.9", "gather the shares", (GATHER, ""), only=True),
    Mistake(
        "saved_on_rank_0_alone",
        "10.9",
        "rank 1",
        (GATHER, GATHER + '        if dist.get_rank():\n            saved["state"] = {}\n'),
        only=True,
    ),
    Mistake(
        "state_shared_with_the_dict",
        "10.9",
        "after a later step",
        (COPY, "        saved = self._optimizer.state_dict()\n"),
        (
            '        dist.all_gather_object(shares, saved["state"])\n',
            (
                '        dist.all_gather_object(shares, saved["state"])\n'
                '        shares[dist.get_rank()] = saved["state"]\n'
            ),
        ),
        only=True,
    ),
    Mistake(
        "groups_shared_with_the_dict",
        "10.9",
        "after a later step",
        (
            GATHER,
            GATHER
            + (
                '        saved["param_groups"] = [{**g, "params": s["params"]} for g, s in '
                'zip(self.param_groups, saved["param_groups"], strict=True)]\n'
                '        self._saved = saved["param_groups"]\n'
            ),
        ),
        (
            "        self._show(self._optimizer)\n\n    def state_dict",
            "        self._show(self._optimizer)\n\n    def state_dict",
        ),
        (
            "        assert self._optimizer is not None\n        loss = None\n",
            (
                "        assert self._optimizer is not None\n"
                "        for group in getattr(self, '_saved', []):\n"
                "            group['lr'] = self.param_groups[0]['lr']\n"
                "        loss = None\n"
            ),
        ),
    ),
    Mistake(
        "a_tensor_of_a_rate_shared",
        "10.9",
        "after a later step",
        (
            GATHER,
            GATHER
            + """        for group, ours in zip(saved["param_groups"], self.param_groups, strict=True):
            group["lr"] = ours["lr"]
""",
        ),
        only=True,
    ),
    Mistake(
        "loaded_dict_shared",
        "10.9",
        "what load_state_dict was given",
        (LOAD, LOAD.replace('copy.deepcopy({**state_dict, "state": share})', '{**state_dict, "state": share}')),
        only=True,
    ),
    Mistake(
        "numbered_by_the_share",
        "10.9",
        "the states of parameters",
        (GATHER, GATHER + '        saved["state"] = dict(enumerate(saved["state"].values()))\n'),
    ),
    Mistake(
        "groups_not_loaded",
        "10.9",
        "groups too",
        (
            LOAD,
            '        kept = [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups]\n'
            + LOAD
            + "        for group, old in zip(self.param_groups, kept, strict=True):\n            group.update(old)\n",
        ),
        only=True,
    ),
    Mistake(
        "state_that_was_there_stays",
        "10.9",
        "the state that was there is replaced",
        (
            LOAD,
            "        old = dict(self.state)\n"
            + LOAD
            + "        for parameter, state in old.items():\n            self.state.setdefault(parameter, state)\n",
        ),
        only=True,
    ),
    Mistake(
        "state_not_loaded",
        "10.9",
        "the state that was there is replaced",
        (OWN, "        own: set[int] = set()\n        assert parameters\n"),
        only=True,
    ),
    Mistake(
        "steps_counted_in_bfloat16",
        "10.9",
        "after loading its own",
        (
            LOAD,
            LOAD
            + """        for parameter, state in self.state.items():
            if "step" in state and parameter.dtype == torch.bfloat16:
                state["step"] = state["step"].to(parameter.dtype)
""",
        ),
        only=True,
    ),
    Mistake(
        "steps_not_saved",
        "10.9",
        "of parameter",
        (
            GATHER,
            GATHER
            + (
                '        for state in saved["state"].values():\n'
                '            if "step" in state:\n'
                '                state["step"] = torch.zeros(())\n'
            ),
        ),
        only=True,
    ),
    Mistake(
        "saved_in_float32",
        "10.9",
        "of parameter",
        (
            GATHER,
            GATHER
            + (
                '        for state in saved["state"].values():\n'
                "            for key in state:\n"
                "                state[key] = state[key].float()\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "groups_not_saved",
        "10.9",
        "param_groups",
        (
            GATHER,
            GATHER
            + (
                '        saved["param_groups"] = [{"params": group["params"], "lr": group["lr"]} for '
                'group in saved["param_groups"]]\n'
            ),
        ),
        only=True,
    ),
    Mistake(
        "a_key_of_its_own",
        "10.9",
        "keys",
        (GATHER, GATHER + '        saved["world_size"] = dist.get_world_size()\n'),
        only=True,
    ),
    Mistake(
        "ranks_of_the_one_who_saved",
        "10.9",
        "keys",
        (
            GATHER,
            GATHER
            + '        saved["owners"] = [self._owners.get(p) for g in self.param_groups for p in g["params"]]\n',
        ),
        (
            OWN,
            (
                '        owners = state_dict.get("owners", [0] * len(parameters))\n'
                "        own = {n for n, owner in enumerate(owners) if owner == dist.get_rank()}\n"
            ),
        ),
    ),
    Mistake(
        "states_by_tensor",
        "10.9",
        "numbers were wanted",
        (
            GATHER,
            GATHER
            + (
                '        saved["state"] = {p: saved["state"][n] for n, p in enumerate(p for g in '
                'self.param_groups for p in g["params"]) if n in saved["state"]}\n'
            ),
        ),
    ),
    Mistake(
        "empty_states_for_all",
        "10.9",
        "the states of parameters",
        (
            GATHER,
            GATHER
            + (
                '        count = sum(len(group["params"]) for group in saved["param_groups"])\n'
                '        saved["state"] = {n: saved["state"].get(n, {}) for n in range(count)}\n'
            ),
        ),
        only=True,
    ),
    Mistake(
        "unseen_after_loading",
        "10.9",
        "saved and loaded between steps",
        (LOAD, LOAD.replace("        self._show(self._optimizer)\n", "")),
    ),
    Mistake(
        "saving_empties_the_share",
        "10.9",
        "between steps",
        (
            GATHER,
            GATHER
            + (
                "        for state in self.state.values():\n"
                "            for value in state.values():\n"
                "                value.zero_()\n"
            ),
        ),
    ),
    Mistake(
        "nothing_before_the_first_step",
        "10.9",
        "param_groups [] came",
        (GATHER, GATHER + '        if not saved["state"]:\n            return {"state": {}, "param_groups": []}\n'),
        only=True,
    ),
    Mistake(
        "the_empty_dict_is_not_loaded",
        "10.9",
        "saved after 0 steps",
        ("        share = {number", '        if not state_dict["state"]:\n            return\n        share = {number'),
        only=True,
    ),
    Mistake(
        "loads_its_own_world_only",
        "10.9",
        "loaded on 3 ranks",
        (OWN, OWN + "        if len(self._loads) == 3:\n            own = {number + 1 for number in own}\n"),
    ),
]
