"""Wrong answers to the overlap (10.4) and to missing gradients (10.5)."""

from harness.model.bank import Mistake

HOOK = """        self._missing[number].discard(parameter)
        while len(self._running) < len(self._buckets) and not self._missing[len(self._running)]:
            self._start_next()
"""
START = "        self._running.append((flat, dist.all_reduce(flat, async_op=True)))\n"
REST = """        while len(self._running) < len(self._buckets):
            self._start_next()
"""
COUNTED = "                if count:\n"
PRESENT = (
    "        present = torch.tensor([p.grad is not None for p in bucket], "
    "dtype=bucket[0].dtype, device=bucket[0].device)\n"
)
WAIT = "            work.wait()\n"
RESET = "        self._reset()\n\n    def _reset"

MISTAKES = [
    Mistake(
        "everything_in_finish",
        "10.4",
        "in finish",
        (HOOK, "        self._missing[number].discard(parameter)\n"),
        wasteful=True,
    ),
    Mistake(
        "started_by_the_last_gradient",
        "10.4",
        "was wanted; gradients come in the order",
        (
            HOOK,
            """        self._missing[number].discard(parameter)
        if not any(self._missing):
            while len(self._running) < len(self._buckets):
                self._start_next()
""",
        ),
        only=True,
    ),
    Mistake(
        "a_waiting_hook",
        "10.4",
        "backward waits for",
        (START, START + "        if any(self._missing):\n            self._running[-1][1].wait()\n"),
        only=True,
    ),
    Mistake(
        "calls_that_wait",
        "10.4",
        "backward waits for",
        (
            START,
            """        dist.all_reduce(flat)
        self._running.append((flat, None))  # type: ignore[arg-type]
""",
        ),
        (WAIT, ""),
        wasteful=True,
    ),
    Mistake(
        "waits_for_the_one_before",
        "10.4",
        "backward waits for",
        (
            HOOK,
            HOOK.replace(
                "            self._start_next()\n",
                (
                    "            if self._running:\n"
                    "                self._running[-1][1].wait()\n"
                    "            self._start_next()\n"
                ),
            ),
        ),
        wasteful=True,
    ),
    Mistake(
        "four_at_once",
        "10.4",
        "backward waits for",
        (
            START,
            "        if len(self._running) > 3:\n            self._running[-4][1].wait()\n" + START,
        ),
        only=True,
    ),
    Mistake(
        "one_bucket_at_a_time",
        "10.4",
        "was wanted; gradients come in the order",
        (HOOK, HOOK.replace("while len", "if len")),
        only=True,
    ),
    Mistake(
        "one_bucket_late",
        "10.4",
        "was wanted; gradients come in the order",
        (
            HOOK,
            """        while len(self._running) < len(self._buckets) and not self._missing[len(self._running)]:
            self._start_next()
        self._missing[number].discard(parameter)
""",
        ),
        only=True,
    ),
    Mistake(
        "the_last_stays_for_finish",
        "10.4",
        "in finish",
        (HOOK, HOOK.replace("len(self._running) < len(self._buckets)", "len(self._running) < len(self._buckets) - 1")),
        only=True,
    ),
    Mistake(
        "counters_not_reset",
        "10.4",
        "step 2",
        (
            "        self._missing = [set(bucket) for bucket in self._buckets]\n        self._running",
            (
                "        if not hasattr(self, '_missing'):\n"
                "            self._missing = [set(bucket) for bucket in self._buckets]\n"
                "        self._running"
            ),
        ),
    ),
    Mistake(
        "overlaps_in_the_first_step_only",
        "10.4",
        "step 2",
        (
            "        self._missing = [set(bucket) for bucket in self._buckets]\n",
            (
                "        self._missing = [set(bucket) for bucket in self._buckets]\n"
                "        self._syncs = not hasattr(self, '_running')\n"
            ),
        ),
    ),
    Mistake(
        "buckets_in_order_of_completion",
        ("10.3", "10.4"),
        "numbers came",
        (
            "        self._running.append((flat, dist.all_reduce(flat, async_op=True)))\n",
            (
                "        self._running.append((flat, dist.all_reduce(flat, async_op=True)))\n"
                "        self._order.append(bucket)\n"
            ),
        ),
        (
            "        bucket = self._buckets[len(self._running)]\n",
            (
                "        bucket = next(b for b, m in zip(self._buckets, self._missing, strict=True) if "
                "not m and all(b is not one for one in self._order))\n"
            ),
        ),
        (
            HOOK,
            HOOK.replace(
                "while len(self._running) < len(self._buckets) and not self._missing[len(self._running)]",
                "if not self._missing[number]",
            ),
        ),
        (
            (
                "        while len(self._running) < len(self._buckets):\n"
                "            self._start_next()\n"
                "        for bucket, (flat, work) in zip(self._buckets, self._running, strict=True):\n"
            ),
            """        for missing in self._missing:
            if missing:
                missing.clear()
                self._start_next()
        for bucket, (flat, work) in zip(self._order, self._running, strict=True):
""",
        ),
        (
            "        self._running: list[tuple[Tensor, Work]] = []\n",
            (
                "        self._running: list[tuple[Tensor, Work]] = []\n"
                "        self._order: list[list[nn.Parameter]] = []\n"
            ),
        ),
    ),
    Mistake(
        "one_call_is_not_waited_for",
        "10.4",
        "finish leaves 1 calls running",
        (
            WAIT,
            "            if flat is not self._running[-1][0] or len(self._running) < 3:\n                work.wait()\n",
        ),
    ),
    Mistake(
        "frozen_ones_waited_for",
        "10.4",
        "in finish",
        (
            "        self._missing = [set(bucket) for bucket in self._buckets]\n",
            (
                "        self._missing = [set(bucket) for bucket in self._buckets]\n"
                "        if self._missing:\n"
                "            self._missing[0] |= {p for p in self.module.parameters() if not "
                "p.requires_grad}\n"
            ),
        ),
    ),
    Mistake(
        "ready_at_the_first_gradient",
        "10.4",
        "was wanted",
        (HOOK, HOOK.replace("self._missing[number].discard(parameter)", "self._missing[number].clear()")),
    ),
    # 10.5
    Mistake(
        "missing_kept_apart",
        "10.5",
        "None came",
        (COUNTED, "                if count and parameter.grad is not None:\n"),
        only=True,
    ),
    Mistake("zeros_for_unused", "10.5", "None was wanted", (COUNTED, ""), only=True),
    Mistake("missing_means_zero", "10.5", "None was wanted", (PRESENT, PRESENT.replace("p.grad is not None", "True"))),
    Mistake(
        "zero_means_missing",
        "10.5",
        "a gradient of zeros is a gradient",
        (COUNTED, "                if average.any():\n"),
        only=True,
    ),
    Mistake(
        "unused_ones_not_sent",
        "10.5",
        "differs between the ranks",
        (
            "        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]\n",
            (
                "        bucket = [p for p in bucket if p.grad is not None]\n"
                "        gradients = [p.grad for p in bucket if p.grad is not None]\n"
            ),
        ),
        (
            PRESENT,
            "        present = torch.ones(len(bucket), dtype=flat_dtype)\n".replace(
                "flat_dtype", "self._buckets[len(self._running)][0].dtype"
            ),
        ),
    ),
    Mistake(
        "finish_starts_only_what_is_ready",
        "10.5",
        "rank",
        (
            REST,
            """        for bucket in self._buckets[len(self._running) :]:
            if all(p.grad is None for p in bucket):
                break
            self._start_next()
""",
        ),
        ("zip(self._buckets, self._running, strict=True)", "zip(self._buckets, self._running, strict=False)"),
        only=True,
    ),
    Mistake(
        "finish_does_nothing_without_a_backward",
        "10.5",
        "rank",
        (
            REST,
            "        if all(p.grad is None for bucket in self._buckets for p in bucket):\n            return\n" + REST,
        ),
        only=True,
    ),
    Mistake(
        "averaged_over_those_who_have_it",
        "10.5",
        "gradients missing",
        ("parameter.grad = average.view(parameter.shape)", "parameter.grad = average.view(parameter.shape) / count"),
        only=True,
    ),
    Mistake(
        "kept_from_the_step_before",
        "10.5",
        "in some steps",
        (
            "gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]",
            "gradients = [self._last.get(p, torch.zeros_like(p)) if p.grad is None else p.grad for p in bucket]",
        ),
        (
            "                    parameter.grad = average.view(parameter.shape)\n",
            (
                "                    parameter.grad = average.view(parameter.shape)\n"
                "                    self._last[parameter] = parameter.grad\n"
            ),
        ),
        ("        self._syncs = True\n", "        self._syncs = True\n        self._last: dict[Tensor, Tensor] = {}\n"),
    ),
    Mistake(
        "presence_of_the_first_step",
        "10.5",
        "in some steps",
        (PRESENT, PRESENT + "        present = self._present.setdefault(len(self._running), present)\n"),
        ("        self._syncs = True\n", "        self._syncs = True\n        self._present: dict[int, Tensor] = {}\n"),
    ),
    Mistake(
        "presence_of_the_step_before",
        "10.5",
        "rank 0 without backward",
        (
            PRESENT,
            PRESENT
            + """        if any(p.grad is not None for one in self._buckets for p in one):
            self._present[len(self._running)] = present
        present = self._present.get(len(self._running), present)
""",
        ),
        ("        self._syncs = True\n", "        self._syncs = True\n        self._present: dict[int, Tensor] = {}\n"),
        only=True,
    ),
    Mistake(
        "strided_in_memory_order",
        "10.5",
        "p1.grad",
        (
            "        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]\n",
            (
                "        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]\n"
                "        gradients = [g.mT if g.dim() == 2 and g.mT.is_contiguous() else g for g in gradients]\n"
            ),
        ),
        (
            "                    parameter.grad = average.view(parameter.shape)\n",
            """                    grad = parameter.grad
                    if grad is not None and grad.dim() == 2 and grad.mT.is_contiguous():
                        parameter.grad = average.view(parameter.shape[::-1]).mT
                    else:
                        parameter.grad = average.view(parameter.shape)
""",
        ),
        only=True,
    ),
    Mistake(
        "one_flag_for_a_bucket",
        "10.5",
        "was wanted",
        (
            PRESENT,
            PRESENT.replace(
                "[p.grad is not None for p in bucket]", "[any(p.grad is not None for p in bucket)] * len(bucket)"
            ),
        ),
    ),
    Mistake(
        "presence_of_this_rank_alone",
        "10.5",
        "gradients missing",
        (COUNTED, "                if parameter.grad is not None or count == 1:\n"),
        only=True,
    ),
    Mistake(
        "waits_for_all_gradients",
        "10.5",
        "gradients missing",
        (
            REST,
            """        if any(self._missing) and self._syncs:
            raise RuntimeError("gradients missing: a parameter took no part in backward")
"""
            + REST,
        ),
    ),
]
