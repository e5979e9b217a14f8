"""An engine of the learner's, watched from step to step beside the plain rules."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from harness.testing import Subject

from .reference import SMALL, TINY, Model, Sizes, wrong_tokens
from .rules import Plan, Request, Rules

# What is looked at: the answers, how many calls there are, who is fed what, who holds which blocks, the metrics (all of
# them, or the named ones), and who shares blocks.
EVERYTHING = ("tokens", "calls", "schedule", "memory", "metrics", "sharing")


PREEMPTION = ("tokens", "schedule", "preemptions")
# Blocks, slots of a block and max_batch_size; then the length of each prompt, and for how many tokens it asks.
TIGHT = {
    "two outgrow the pool together": (5, 4, 8, ((6, 6), (7, 5))),
    "the youngest is preempted although another asks": (6, 2, 8, ((2, 7), (3, 4), (1, 6))),
    "more wait than may run": (5, 3, 2, ((4, 5), (5, 5), (3, 3))),
    "who runs takes the last block, not who waits": (3, 3, 2, ((3, 5), (6, 1), (6, 2))),
    "as large as the pool": (2, 4, 8, ((3, 6), (4, 3))),
    "two are preempted in one step": (4, 4, 8, ((4, 3), (4, 6), (4, 2), (4, 2))),
    "who comes back needs room for its tokens, not for the rest": (3, 2, 8, ((1, 2), (2, 3), (1, 3))),
}


class Fault(AssertionError):
    """What is not as it should be, and which of the things that are looked at."""

    def __init__(self, kind: str, fact: str, hint: str = "") -> None:
        super().__init__(f"{fact}\n{hint}" if hint else fact)
        self.kind = kind


class Stage:
    """An engine and its model. After every step all that is watched is judged.

    Once an engine does what the rules do not say, and nobody watches that, it is followed: its answers still count.
    """

    def __init__(
        self,
        subject: Subject,
        num_blocks: int = 40,
        block_size: int = 4,
        *,
        size: int = 8,
        eos: int | None = None,
        sizes: Sizes | None = None,
        watch: Sequence[str] = EVERYTHING,
    ) -> None:
        self.model, self.watch = Model(sizes or (Sizes() if "tokens" in watch else TINY)), watch
        self.rules = Rules(num_blocks, block_size, size, eos)
        self.what = f"Engine(num_blocks={num_blocks}, block_size={block_size}, max_batch_size={size}"
        self.what += f", eos_token_id={eos})" if eos is not None else ")"
        self.engine: Any = subject.Engine(
            self.model, num_blocks=num_blocks, block_size=block_size, max_batch_size=size, eos_token_id=eos
        )
        self.cache = self.engine.cache
        self.loose = False
        self.generated = 0
        self.history: list[str] = []
        self.tells = False
        self.answered = 0

    @property
    def live(self) -> list[Request]:
        return [one for one in self.rules.requests if one.live]

    def submit(self, prompt: Sequence[int], most: int) -> Request:
        """A request that fits."""
        tried = self.model.tried
        came = self.engine.submit(prompt, most)
        wanted = len(self.rules.requests)
        self.history.append(f"submit({list(prompt)}, {most})")
        self.demand("tokens", came == wanted, f"submit: id {came!r} came, {wanted} was wanted", "ids are 0, 1, 2, …")
        self.demand("schedule", self.model.tried == tried, "submit: the model was called")
        request = Request(wanted, list(prompt), most)
        self.rules.requests.append(request)
        return request

    def step(self) -> None:
        """One step, judged."""
        plan = None if self.loose else self.rules.plan()
        before = len(self.model.calls)
        self.history.append("step()")
        returned = self.engine.step()
        self.demand(
            "tokens", isinstance(returned, dict), f"step(): a {type(returned).__name__} came, a dict was wanted"
        )
        calls = self.model.calls[before:]
        if plan is not None:
            self.judge_schedule(plan, returned, calls)
        sources = {one.number: (one.tokens[: one.fed], one.table) for one in self.rules.requests if one.table}
        self.apply(None if self.loose else plan, returned)
        self.judge_memory()
        if plan is not None and not self.loose:
            self.judge_sharing(plan, sources)
        self.judge_metrics()

    def apply(self, plan: Plan | None, returned: dict[int, int]) -> None:
        """Follows what the engine did."""
        requests = self.rules.requests
        if plan is not None:
            self.rules.preemptions += len(plan.preempted)
            for number in plan.preempted:
                requests[number].state, requests[number].fed = "waiting", 0
        for number, token in returned.items():
            known = isinstance(number, int) and 0 <= number < len(requests)
            self.demand("tokens", known, f"step(): a token of the unknown request {number!r} came")
            one = requests[number]
            came = f"step(): the token {token!r} of request {number} came"
            self.demand("tokens", isinstance(token, int), f"{came}, a number was wanted")
            self.demand("tokens", one.live, f"{came}, which is {one.state}", "no token comes after the last one")
            one.fed, one.state = len(one.tokens), "running"
            one.came.append(token)
            if token == self.rules.eos or len(one.came) == one.most:
                one.state = "finished"
            self.generated += 1
        for one in requests:
            one.table = self.cache.block_table(one.number)

    def judge_schedule(self, plan: Plan, returned: dict[int, int], calls: list[list[tuple[int, int]]]) -> None:
        """One call, which feeds those that are to run what they are to feed."""
        wanted = [one.number for one in plan.running]
        if len(calls) != (1 if wanted else 0):
            what = "one was wanted" if wanted else "none was wanted: nothing is left"
            self.demand("calls", False, f"step(): {len(calls)} calls of the model came, {what}", self.about(plan))
        if sorted(returned) != wanted:
            fact = f"step(): tokens of requests {sorted(returned)} came, of {wanted} were wanted"
            return self.deviates(fact, self.about(plan))
        if not wanted:
            return None
        came = [pair for call in calls for pair in call]
        possible = list(plan.feeds(self.rules.block_size))
        if not any(Counter(fed) == Counter(came) for fed in possible):
            most = len(possible[-1])
            if len(came) != most and len(came) not in [len(fed) for fed in possible]:
                counts = " or ".join(str(n) for n in sorted({len(fed) for fed in possible}))
                fact = f"step(): {len(came)} tokens were fed, {counts} were wanted"
            else:
                fact = "step(): the tokens that were fed, or their positions, are not those of the requests"
            shown = f"fed as (position, token): {sorted(came)}; wanted: {sorted(possible[0])}"
            return self.deviates(fact, f"{shown}\n{self.about(plan)}")
        return None

    def about(self, plan: Plan) -> str:
        """What a step was to do, in words."""
        words = []
        if plan.preempted:
            words.append(f"preempts {plan.preempted}")
        for number, common in plan.admitted.items():
            one = self.rules.requests[number]
            shared = f", {common} of them in common with one that runs" if common else ""
            words.append(f"admits {number} with {len(one.tokens)} tokens{shared}")
        others = [one.number for one in plan.running if one.number not in plan.admitted]
        words += [f"{others} feed their last token"] if others else []
        return f"this step {'; '.join(words)}" if words else "nothing is left"

    def deviates(self, fact: str, hint: str) -> None:
        self.demand("schedule", False, fact, hint)
        self.loose = True

    def judge_memory(self) -> None:
        """Those that run hold blocks for what they have fed, all others none."""
        used: set[int] = set()
        for one in self.rules.requests:
            table, slots = one.table, self.cache.length(one.number)
            used.update(table)
            wanted = {one.fed} if one.state == "running" and not self.loose else {0, one.fed} if one.live else {0}
            if slots in wanted and len(table) in {self.rules.blocks(count) for count in wanted}:
                continue
            name = f"request {one.number}, {one.state}, which has fed {one.fed} tokens"
            self.demand(
                "memory",
                len(table) in {self.rules.blocks(count) for count in wanted},
                f"cache.block_table after step(): {len(table)} blocks of {name}; "
                f"{self.rules.blocks(max(wanted))} were wanted",
                "a token takes its slot in the step that feeds it; who is finished, or waits, holds nothing",
            )
            self.demand(
                "memory",
                slots in wanted,
                f"cache.length after step(): {slots} slots of {name}; {max(wanted)} were wanted",
                "a token takes its slot in the step that feeds it; who is finished, or waits, holds nothing",
            )
        self.judge_free(len(used), "step()")

    def judge_free(self, used: int, call: str) -> None:
        free = self.cache.allocator.num_free
        self.demand(
            "memory",
            free == self.rules.num_blocks - used,
            f"cache.allocator.num_free after {call}: {free} came, {self.rules.num_blocks - used} was wanted: the "
            f"running requests hold {used} of {self.rules.num_blocks} blocks",
            "each block goes back when the last one that holds it gives it up",
        )

    def judge_sharing(self, plan: Plan, sources: dict[int, tuple[list[int], list[int]]]) -> None:
        """A newcomer's first blocks are those of requests that ran before and begin alike; no others are shared."""
        size = self.rules.block_size
        for number, common in plan.admitted.items():
            one = self.rules.requests[number]
            for place, block in enumerate(one.table):
                begins = one.tokens[: (place + 1) * size]
                theirs = [
                    table[place] for fed, table in sources.values() if fed[: len(begins)] == begins and table[place:]
                ]
                what = f"cache.block_table after step(): block {place} of the newcomer {number}"
                if place < common // size:
                    fact = f"{what} is not one of those that run, which hold the same {(place + 1) * size} tokens"
                    self.demand("sharing", block in theirs, fact, self.about(plan))
                elif one.table:
                    others = [o.number for o in self.rules.requests if o is not one and block in o.table]
                    fact = f"{what} is {others}'s too, who hold other tokens there, or had not fed them before"
                    self.demand("sharing", not others, fact, self.about(plan))

    def judge_metrics(self) -> None:
        """The metrics are what was seen."""
        states, calls = self.rules.states(), self.model.calls
        wanted = {
            "finished": states["finished"],
            "cancelled": states["cancelled"],
            "model_calls": len(calls),
            "tokens_fed": sum(len(fed) for fed in calls),
            "tokens_generated": self.generated,
            "blocks_used": self.rules.num_blocks - self.cache.allocator.num_free,
        }
        if not self.loose:
            wanted |= {"running": states["running"], "waiting": states["waiting"]}
            wanted |= {"preemptions": self.rules.preemptions}
        named = self.watch if "metrics" not in self.watch else tuple(wanted)
        if any(name in named for name in wanted):
            came = self.engine.metrics()
            for name in [name for name in wanted if name in named]:
                if came.get(name) != wanted[name]:
                    fact = f"metrics()[{name!r}]: {came.get(name)!r} came, {wanted[name]} was wanted"
                    self.demand("metric", False, fact)

    def cancel(self, number: int) -> None:
        """Cancels a request, or what is none."""
        requests = self.rules.requests
        one = requests[number] if 0 <= number < len(requests) else None
        wanted = one is not None and one.live
        self.history.append(f"cancel({number})")
        counted = self.counted()
        came = self.engine.cancel(number)
        state = "unknown" if one is None else one.state
        self.demand("cancel", came is wanted, f"cancel({number}): {came!r} came, {wanted} was wanted: it is {state}")
        self.unchanged("cancel", counted, f"cancel({number})")
        if one is not None and wanted:
            one.state, one.table = "cancelled", []
            left = self.cache.block_table(number)
            self.demand("cancel", not left, f"cache.block_table after cancel({number}): {left} came, [] was wanted")
            used = {block for other in requests for block in self.cache.block_table(other.number)}
            free, all_blocks = self.cache.allocator.num_free, self.rules.num_blocks
            self.demand(
                "cancel",
                free == all_blocks - len(used),
                f"cache.allocator.num_free after cancel({number}): {free} came, {all_blocks - len(used)} was wanted",
                "blocks are free at once, unless others hold them too",
            )

    def fails(self, stage: str, error: Exception) -> None:
        """A step whose call of the model fails; the next one does what it should have done."""
        self.model.error = stage, error
        self.history.append(f"step(), in which the model raises {type(error).__name__} {stage}")
        counted = self.counted()
        try:
            came = self.engine.step()
        except Exception as raised:
            if raised is not error and isinstance(raised, NotImplementedError):
                raise
            self.demand(
                "fault", raised is error, f"step(): {raised!r} came, the model's own {error!r} was wanted, unchanged"
            )
            return self.unchanged("fault", counted, "a step in which the model raised")
        raise self.fault("fault", f"step(): {came!r} came, the model's {error!r} was wanted")

    def counted(self) -> dict[str, int]:
        """The metrics that only a step adds to."""
        now = self.engine.metrics()
        return {name: now.get(name) for name in ("model_calls", "tokens_fed", "tokens_generated")}

    def unchanged(self, kind: str, before: dict[str, int], call: str) -> None:
        """A call that feeds nothing has added to none of them."""
        for name, now in self.counted().items():
            fact = f"metrics()[{name!r}] was {before[name]} before {call}, and is {now}"
            self.demand(kind, now == before[name], fact)

    def drain(self) -> None:
        """Steps until nothing is left, and once more; then looks at all the answers."""
        budget = 3 * sum(one.most for one in self.rules.requests) + 10
        while self.live and budget:
            came = self.generated
            self.step()
            budget = budget - 1 if self.generated > came else 0
        for one in self.live:
            fact = f"step(): request {one.number} has {len(one.came)} of {one.most} tokens, and no more come"
            self.demand("tokens", False, fact)
        self.step()
        self.judge_answers()

    def judge_answers(self) -> None:
        """Every token is the most probable one after those before it; where answers are not watched, a quarter is."""
        asked = [(one.prompt, one.came) for one in self.rules.requests[self.answered :]]
        wrong = list(wrong_tokens(self.model, asked))
        if wrong and ("tokens" in self.watch or 4 * len(wrong) > 3 * sum(len(came) for _, came in asked)):
            number, place, wanted = wrong[0]
            prompt, came = asked[number]
            raise self.fault(
                "tokens",
                f"step(): token {place} of request {self.answered + number}: {came[place]} came, {wanted} was wanted",
                f"prompt {prompt}, answer {came}; {self.what}; {self.model.sizes}",
            )

    def run(self) -> None:
        """The rest by `run`, which returns all that is finished."""
        before = self.generated
        for one in self.live:
            one.state = "finished"
        self.history.append("run()")
        result = self.engine.run()
        finished = {one.number: one for one in self.rules.requests if one.state == "finished"}
        ok = isinstance(result, dict) and result.keys() == finished.keys()
        fact = f"run(): {sorted(result) if isinstance(result, dict) else result!r} came, answers of "
        self.demand("tokens", ok, f"{fact}{sorted(finished)} were wanted", "all that is finished so far, by any step")
        for number, one in finished.items():
            answer = list(result[number])
            begun = answer[: len(one.came)] == one.came
            self.demand(
                "tokens", begun, f"run(): {answer} of request {number} came; step() had returned {one.came} of it"
            )
            at_end = len(answer) == one.most or answer[-1:] == [self.rules.eos]
            early = self.rules.eos is not None and self.rules.eos in answer[:-1]
            fact = f"run(): {answer} of request {number} came, {one.most} tokens or up to {self.rules.eos} were wanted"
            self.demand("tokens", at_end and not early and len(answer) <= one.most, fact)
            self.generated += len(answer) - len(one.came)
            one.came, one.fed, one.table = answer, 0, []
        if not self.loose and "metrics" in self.watch:
            self.rules.preemptions = self.engine.metrics().get("preemptions", 0)  # Those of steps that nobody saw.
        self.judge_memory()
        self.judge_metrics()
        if self.generated > before:
            self.judge_answers()

    def new_weights(self, seed: int) -> None:
        """Other weights, where nothing is left; earlier answers are judged no more."""
        self.answered = len(self.rules.requests)
        self.model.fill(seed)

    def demand(self, kind: str, holds: bool, fact: str, hint: str = "") -> None:
        """Raises what is watched, and what is asked for by name."""
        if not holds and (kind in self.watch or kind not in EVERYTHING):
            raise self.fault(kind, fact, hint)

    def fault(self, kind: str, fact: str, hint: str = "") -> Fault:
        """What is not as it should be; in a walk with what was called before."""
        if self.tells:
            hint = f"{hint}\nafter {self.what}: {'; '.join(self.history)}".strip()
        return Fault(kind, fact, hint)


def apart_from_preemption(subject: Subject, serve: Callable[[], None]) -> None:
    """What is about preemption and something else counts only where preemption alone is right: that is 9.7's to say.
    A short case comes first: where that is wrong, there may be no end of what is more.
    """
    if not preempts(subject, "who comes back needs room for its tokens, not for the rest"):
        return
    try:
        serve()
    except NotImplementedError:
        raise
    except Exception:
        if preempts(subject, *TIGHT):
            raise


def preempts(subject: Subject, *cases: str) -> bool:
    """Whether preemption alone is right."""
    try:
        tight(subject, torch.Generator().manual_seed(0), *cases)
    except NotImplementedError:
        raise
    except Exception:
        return False
    return True


def tight(subject: Subject, rng: torch.Generator, *cases: str) -> int:
    """Serves requests that outgrow their pools together; how many preemptions there were."""
    preemptions = 0
    for num_blocks, block_size, size, asked in map(TIGHT.__getitem__, cases or TIGHT):
        stage = Stage(subject, num_blocks, block_size, size=size, sizes=SMALL, watch=PREEMPTION)
        prompts = distinct(rng, *(length for length, _ in asked))
        play(stage, zip(prompts, (most for _, most in asked), strict=True))
        stage.run()
        preemptions += stage.rules.preemptions
    return preemptions


def play(stage: Stage, requests: Iterable[tuple[Sequence[int], int]]) -> None:
    """All requests at once, to their end."""
    for prompt, most in requests:
        stage.submit(prompt, most)
    stage.drain()


def distinct(rng: torch.Generator, *lengths: int, vocabulary: int = 13) -> list[list[int]]:
    """Prompts of which no two begin alike."""
    firsts = torch.randperm(vocabulary, generator=rng)[: len(lengths)].tolist()
    return [
        [first, *torch.randint(vocabulary, (length - 1,), generator=rng).tolist()]
        for first, length in zip(firsts, lengths, strict=True)
    ]
