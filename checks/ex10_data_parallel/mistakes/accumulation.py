"""Wrong answers to accumulation under no_sync (10.6)."""

from harness.model.bank import Mistake

BODY = """        before, self._syncs = self._syncs, False
        try:
            yield
        finally:
            self._syncs = before
"""
QUIET = """        if not self._syncs:
            return
"""
PRESENT = (
    "        present = torch.tensor([p.grad is not None for p in bucket], "
    "dtype=bucket[0].dtype, device=bucket[0].device)\n"
)
GRADIENTS = "        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]\n"
FORWARD = "        return self.module(*args, **kwargs)\n"

MISTAKES = [
    Mistake(
        "no_sync_lost",
        "10.6",
        "what backward added under no_sync",
        (
            BODY,
            """        before, self._syncs = self._syncs, False
        grads = [(p, None if p.grad is None else p.grad.clone()) for p in self.module.parameters()]
        try:
            yield
        finally:
            self._syncs = before
            for parameter, grad in grads:
                parameter.grad = grad
""",
        ),
        only=True,
    ),
    Mistake("no_sync_does_nothing", "10.6", "no_sync sends nothing", (BODY, "        yield\n"), only=True),
    Mistake(
        "no_sync_not_restored",
        "10.6",
        "the buckets start",
        (BODY, "        self._syncs = False\n        yield\n"),
        only=True,
    ),
    Mistake(
        "no_sync_ends_the_outer_one",
        "10.6",
        "nested",
        (
            BODY,
            BODY.replace("= before", "= True").replace(
                "before, self._syncs = self._syncs, False", "self._syncs = False"
            ),
        ),
        only=True,
    ),
    Mistake(
        "no_sync_of_all_ranks",
        "10.6",
        "no_sync sends nothing, on a rank",
        ("        self._syncs = True\n", "        type(self)._syncs = True\n"),
        (
            BODY,
            BODY.replace("self._syncs = before", "type(self)._syncs = before").replace(
                ", self._syncs =", ", type(self)._syncs ="
            ),
        ),
        only=True,
    ),
    Mistake(
        "an_exception_keeps_it",
        "10.6",
        "it goes on after its end",
        (
            BODY,
            """        before, self._syncs = self._syncs, False
        yield
        self._syncs = before
""",
        ),
        only=True,
    ),
    Mistake(
        "acts_when_it_is_made",
        "10.6",
        "no_sync",
        (
            "        return self._without_sync()\n",
            "        context, self._syncs = self._without_sync(), False\n        return context\n",
        ),
        only=True,
    ),
    Mistake(
        "acts_where_forward_runs",
        "10.6",
        "a backward",
        (FORWARD, "        self._loud = self._syncs\n" + FORWARD),
        ("        if not self._syncs:\n", "        if not self._loud:\n"),
        ("        self._syncs = True\n", "        self._syncs = self._loud = True\n"),
        only=True,
    ),
    Mistake(
        "swallows_exceptions",
        "10.6",
        "no_sync",
        (
            BODY,
            """        before, self._syncs = self._syncs, False
        try:
            yield
        except ArithmeticError:
            self._syncs = True
        else:
            self._syncs = before
""",
        ),
    ),
    Mistake(
        "finish_after_no_sync_sends_nothing",
        "10.6",
        "backwards under no_sync alone",
        (
            "        while len(self._running) < len(self._buckets):\n            self._start_next()\n        for",
            (
                "        if not self._heard:\n"
                "            return\n"
                "        while len(self._running) < len(self._buckets):\n"
                "            self._start_next()\n"
                "        for"
            ),
        ),
        (
            "        self._missing[number].discard(parameter)\n",
            "        self._heard = True\n        self._missing[number].discard(parameter)\n",
        ),
        ("        self._syncs = True\n", "        self._syncs = self._heard = True\n"),
        (QUIET, "        if not self._syncs:\n            self._heard = False\n            return\n"),
        only=True,
    ),
    Mistake(
        "only_the_last_backward_is_sent",
        "10.6",
        "what backward added under no_sync",
        (
            QUIET,
            """        if not self._syncs:
            self._old[parameter] = parameter.grad.clone()  # type: ignore[union-attr]
            return
        if parameter in self._old and parameter.grad is not None:
            parameter.grad = parameter.grad - self._old.pop(parameter)
""",
        ),
        ("        self._syncs = True\n", "        self._syncs = True\n        self._old: dict[Tensor, Tensor] = {}\n"),
        ("        self._running: list", "        self._old.clear()\n        self._running: list"),
        only=True,
    ),
    Mistake(
        "early_ones_count_as_missing",
        "10.6",
        "p",
        (QUIET, QUIET + "        self._seen.add(parameter)\n"),
        ("        self._syncs = True\n", "        self._syncs = True\n        self._seen: set[Tensor] = set()\n"),
        (PRESENT, PRESENT.replace("p.grad is not None", "p in self._seen")),
        (GRADIENTS, GRADIENTS.replace("p.grad is None", "p not in self._seen")),
        ("        self._running: list", "        self._seen.clear()\n        self._running: list"),
    ),
    Mistake(
        "ready_under_no_sync",
        "10.6",
        "the buckets start",
        (
            QUIET + "        self._missing[number].discard(parameter)\n",
            "        self._missing[number].discard(parameter)\n        if not self._syncs:\n            return\n",
        ),
    ),
    Mistake(
        "after_no_sync_all_in_finish",
        "10.6",
        "the buckets start",
        (
            QUIET,
            (
                "        if not self._syncs:\n"
                "            self._accumulated = True\n"
                "            return\n"
                "        if self._accumulated:\n"
                "            return\n"
            ),
        ),
        ("        self._syncs = True\n", "        self._syncs, self._accumulated = True, False\n"),
        ("        self._running: list", "        self._accumulated = False\n        self._running: list"),
        only=True,
    ),
    Mistake(
        "the_counter_of_backwards",
        "10.6",
        "step 2",
        (
            QUIET,
            (
                "        if not self._syncs:\n"
                "            self._quiet += 1\n"
                "            return\n"
                "        if self._quiet > 12:\n"
                "            return\n"
            ),
        ),
        ("        self._syncs = True\n", "        self._syncs, self._quiet = True, 0\n"),
    ),
]
