"""The rules of a round: which batches are to run, what each caller is to get, and whom a fault costs."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

from torch import Tensor

from harness.testing import Close, Step

from .reference import Call, Gate, Model, Request
from .stage import NEVER, Caller, Job, Loop, Stage

CLOSE = Close(0.0)
STILL_RUNS = "their batch is done, the next one still runs"


@dataclass(frozen=True)
class Kind:
    """What a batcher is built with, and how many requests fill it."""

    size: int = 2
    seconds: float = NEVER
    width: int = 8
    room: int = 6
    bare: bool = False

    def bucket(self, request: Request) -> int:
        return (request.tokens.size(-1) - 1) // self.width

    def batches(self, requests: list[Request], all_go: bool) -> list[list[Request]]:
        """The batches that these waiting requests, the oldest first, are to run in: the one with the oldest first."""
        buckets: dict[int, list[Request]] = {}
        for request in requests:
            buckets.setdefault(self.bucket(request), []).append(request)
        cut = [group[i : i + self.size] for group in buckets.values() for i in range(0, len(group), self.size)]
        going = [batch for batch in cut if all_go or len(batch) == self.size]
        return sorted(going, key=lambda batch: requests.index(batch[0]))

    def __str__(self) -> str:
        return f"max_batch_size {self.size}, max_wait_time {self.seconds:g}, buckets of {self.width}"


class OddError(Exception):
    """An error that cannot be made from its text alone."""

    def __init__(self, layer: int, *, reason: str) -> None:
        super().__init__(f"{reason} in layer {layer}")


class Fault(AssertionError):
    """What is not as it should be, and the requirement that it breaks; `unless` another one, which would explain it,
    is lost too.
    """

    def __init__(self, requirement: str, fact: str, hint: str = "", *, unless: str = "") -> None:
        super().__init__(f"{fact}\n{hint}" if hint else fact)
        self.requirement = requirement
        self.unless = unless


class State:
    """A stage, the batchers that were built on it, and what has happened so far."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.batchers: dict[Kind, tuple[Any, Model]] = {}
        self.second: Loop | None = None
        self.used: dict[tuple[Kind, int], dict[str, tuple[Tensor, int]]] = {}
        self.past: set[str] = set()

    def batcher(self, kind: Kind) -> None:
        """Puts a batcher of this kind on the stage, the one that is there already if there is one."""
        stage = self.stage
        if kind not in self.batchers:
            threads = stage.model.loop_threads
            stage.model = Model()
            stage.model.loop_threads = threads
            names = ("max_batch_size", "max_wait_time", "length_tolerance", "max_queue_size")
            values: tuple[Any, ...] = (kind.size, kind.seconds, kind.width, kind.room)
            options: dict[str, Any] = dict(zip(names, values, strict=True))
            stage.start(bare=kind.bare, **options)
            self.batchers[kind] = stage.batcher, stage.model
        stage.batcher, stage.model = self.batchers[kind]
        stage.forget()

    def loops(self, two: bool) -> list[Loop]:
        if two and self.second is None:
            self.second = self.stage.loop(idle=True)
        return [self.stage.home, *([self.second] if two and self.second else [])]


class Rules:
    """What is known of a round in which `running` runs and `waiting` waits, and what is judged by it."""

    def __init__(self, state: State, step: Step) -> None:
        self.state, self.drawn, self.stage = state, step, state.stage
        self.kind: Kind = step["kind"]
        self.rng = state.stage.rng = step.rng()
        self.loops: list[Loop] = []
        self.callers: dict[Request, Caller] = {}
        self.refused: list[Caller] = []
        self.repeated: set[str] = set()
        self.cancelled: list[Request] = []
        self.fails: dict[Request, Exception] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.wanted: list[list[Request]] = []
        self.versions: list[tuple[Tensor, int]] = []

    def reached(self, gate: Gate, request: Request, why: str) -> None:
        """generate is called for a batch."""
        if not self.stage.waits(gate.news) and not gate.entered:
            self.silent(self.callers[request], why)
        if not gate.entered:
            self.judge([request], why)
            raise Fault("4.2", f"{request}: a result came before generate was called for it")

    def turns(self, when: str) -> None:
        """The callers' event loops turn."""
        if not self.stage.settle() and not all(self.stage.turns(loop) for loop in self.loops):
            self.blocked(when)
        self.nobody_ended()

    def blocked(self, when: str) -> NoReturn:
        raise Fault(
            "4.3",
            f"the event loop of the callers is blocked while {when}",
            "add_request awaits its result; it neither waits in the loop's thread nor needs a lock for long",
        )

    def nobody_ended(self) -> None:
        """While the first batch runs nobody has a result, nor an error."""
        for request, caller in self.callers.items():
            if caller.finished.is_set() and request not in self.cancelled:
                self.no_error(caller, "while a batch runs")
                self.judge_calls(so_far=True)
                raise Fault("4.2", f"{request}: a result came before generate was called for it")

    def no_error(self, caller: Caller, why: str) -> None:
        came = caller.error
        if isinstance(came, NotImplementedError):
            raise came
        if came is not None:
            number = "4.8" if isinstance(came, self.stage.full_queue) else self.silence()
            fact = f"{caller.request}: {type(came).__name__} ({came}) came, a result was wanted"
            raise Fault(number, fact, why, unless=self.unless)

    def not_early(self, asked: float) -> None:
        """A batch that is not full has waited for max_wait_time."""
        waited = self.stage.model.calls[0].came - asked
        if len(self.running) < self.kind.size and waited < self.kind.seconds - 0.0005:
            raise Fault("4.5", f"{self.kind}: a lone request went {waited:.4f} s after it came")

    def is_refused(self, caller: Caller, error: type[Exception], requirement: str, why: str) -> None:
        what = f"{caller.request}: {error.__name__} was wanted at once"
        if not self.stage.waits(caller.finished):
            blocked = "blocked" in self.stage.where(caller)
            where = "the event loop is blocked" if blocked else "it still waits"
            raise Fault("4.3" if blocked else requirement, f"{what}, neither that nor a result came: {where}", why)
        if isinstance(caller.error, NotImplementedError):
            raise caller.error
        if not isinstance(caller.error, error):
            came = "a result" if caller.error is None else repr(caller.error)
            raise Fault(requirement, f"{what}, {came} came", why)

    def returned(self, job: Job) -> None:
        if not self.stage.waits(job.finished):
            raise Fault("4.9", "shutdown() did not return")
        if job.error is not None:
            raise job.error

    def judge(self, requests: list[Request], why: str) -> None:
        """Each caller gets what its request gets alone, or the error of its batch."""
        for request in requests:
            if request not in self.cancelled:
                self.judge_one(self.callers[request], why)

    def judge_one(self, caller: Caller, why: str) -> None:
        if not self.stage.waits(caller.finished):
            self.silent(caller, why)
        request, came = caller.request, caller.error
        wanted = next((self.fails[failing] for failing in self.fails if self.together(failing, request)), None)
        if wanted is None:
            self.no_error(caller, why)
            try:
                CLOSE(caller.value, request.expected, str(request))
            except AssertionError as error:
                raise Fault("4.2", str(error), "row i of a batch is output[i, pads_i : width + max_length_i]") from None
        elif type(came) is not type(wanted) or str(came) != str(wanted):
            fact = "no error came, a result did" if came is None else f"{came!r} came as error"
            raise Fault("4.7", f"{request}: {fact}, the same type and text as {wanted!r} were wanted")

    def together(self, one: Request, other: Request) -> bool:
        """Whether two requests ran in one call."""
        return any(call.serves(one) and call.serves(other) for call in self.stage.model.calls)

    def silent(self, caller: Caller, why: str) -> NoReturn:
        """Blames that a caller has never heard of its request: what has run so far may explain it."""
        where = self.stage.where(caller)
        if caller.finished.is_set():
            raise Fault("4.3", f"{caller.request}: its caller woke only when something else happened on its loop", why)
        if "blocked" in where:
            raise Fault("4.9" if self.drawn["end"] == "loop" else "4.3", "the event loop of a caller is blocked", why)
        self.judge_calls(so_far=True)
        for other in self.callers.values():
            if isinstance(other.error, self.stage.full_queue):
                self.no_error(other, why)
            if other.value is not None and not self.together(other.request, other.request):
                raise Fault("4.2", f"{other.request}: a result came, and generate was not called for it")
        heard = self.silence()
        failing = any(self.together(one, caller.request) for one in self.fails)
        if "returned" in where and (heard in ("4.1", "4.4", "4.5") or (why == STILL_RUNS and not failing)):
            heard = "4.3"
        fact = f"the caller of request {caller.request.name} was never woken: {where}"
        raise Fault(heard, fact, self.about(why), unless=self.unless)

    def silence(self) -> str:
        """The requirement that is lost where nothing or an error comes: by what has happened before."""
        for happened in (self.happened(), self.state.past):
            if "end" in happened:
                return "4.9"
            if happened:
                return "4.7"
        if len(self.loops) > 1:
            return "4.3"
        if self.kind.seconds != NEVER:
            return "4.5"
        return "4.4" if self.alike else "4.1"

    @property
    def alike(self) -> bool:
        """All requests of a bucket are alike."""
        return not self.drawn["lengths"] and self.drawn["new"] == (2, 2)

    @property
    def unless(self) -> str:
        """What would explain silence, or an error, here as well as in other rounds."""
        if "closed" in self.drawn["fault"]:
            return "4.3"
        return "" if self.drawn["fault"] or "fault" in self.state.past else "4.4"

    def happened(self) -> set[str]:
        return {aspect for aspect in ("end", "fault", "cancelled") if self.drawn.words[aspect]}

    def judge_calls(self, so_far: bool) -> None:
        """Which calls of generate there were: the wanted ones, or `so_far` the first of them."""
        calls, everyone, wanted = self.stage.model.calls, list(self.callers), self.wanted
        if self.stage.model.on_a_loop:
            raise Fault("4.3", "generate is called in the thread of the callers' event loop")
        for call in calls:
            self.judge_call(call, [request for request in everyone if call.serves(request)])
        if self.stage.model.most_active > 1:
            raise Fault("4.4", f"{self.stage.model.most_active} calls of generate ran at a time")
        came = [[request for request in everyone if call.serves(request)] for call in calls]
        due = [[request for request in everyone if request in batch] for batch in wanted]
        if came == due or (so_far and came == due[: len(came)]):
            return
        fact = self.about(f"{self.shown([*self.running, *self.waiting])}: ran as {lines(came)}, not as {lines(due)}")
        if so_far and all(batch in due for batch in came):
            return
        self.judge_batches(came, wanted, fact)
        plain = self.alike
        number = "4.3" if len(self.loops) > 1 else "4.4" if plain or self.cancelled else "4.1"
        raise Fault(
            "4.9" if self.drawn["end"] else number,
            "requests of one bucket wait, and do not share a call of generate",
            fact,
            unless="4.5",
        )

    def judge_batches(self, came: list[list[Request]], wanted: list[list[Request]], fact: str) -> None:
        """Blames what is wrong with the batches that came, besides that they are no full ones."""
        due = [request for batch in wanted for request in batch]
        served = [request for batch in came for request in batch]
        if early := [request for request in served if request not in due]:
            what = f"{names(early)} went, in a batch neither full nor overdue"
            if any(self.older(request, served) for request in early):
                number = "4.6" if self.alike else "4.1"
                raise Fault(number, f"{names(early)} went, and older ones of the bucket wait", fact, unless="4.6")
            gone = [self.kind.bucket(request) for request in self.cancelled]
            if any(self.kind.bucket(request) in gone for request in early):
                raise Fault("4.4", f"{what}, unless cancelled ones count", fact, unless="4.5")
            raise Fault("4.5", what, fact)
        if len(served) != len(set(served)):
            raise Fault("4.4", "a request was in two calls of generate", fact)
        if all(any(set(batch) == set(one) for one in wanted) for batch in came):
            raise Fault("4.6", "of the batches that may go, the one with the oldest request goes first", fact)
        for bucket in {self.kind.bucket(request) for request in served}:
            places = [[due.index(r) for r in batch if self.kind.bucket(r) == bucket] for batch in came]
            places = [one for one in places if one]
            left = [i for i, r in enumerate(due) if self.kind.bucket(r) == bucket and r not in served]
            if any(max(a) > min(b) for a, b in pairwise([*places, *([left] if left else [])])):
                raise Fault("4.6", "a batch takes the oldest requests of its bucket", fact)

    def older(self, request: Request, served: list[Request]) -> bool:
        """Whether an older request of the same bucket still waits."""
        before = self.waiting[: self.waiting.index(request)] if request in self.waiting else []
        return any(self.kind.bucket(one) == self.kind.bucket(request) and one not in served for one in before)

    def judge_call(self, call: Call, requests: list[Request]) -> None:
        """One call keeps to the limits, and serves nobody in vain."""
        for caller in self.refused:
            if call.serves(caller.request):
                number = "4.7" if caller.request.new < 1 or isinstance(caller.error, ValueError) else "4.8"
                raise Fault(number, f"{caller.request} was refused, and generate was called for it")
        ended = [request for request in requests if request in self.cancelled and request not in self.running]
        if ended:
            raise Fault("4.4", f"{names(ended)} was cancelled while it waited, and generate was called for it")
        buckets = {self.kind.bucket(request) for request in requests}
        end = self.drawn["end"] and "4.9"
        if len(buckets) > 1:
            raise Fault("4.1", f"{self.shown(requests)} shared a call", self.about("two buckets never do"))
        if len(call.ids) > self.kind.size:
            raise Fault(end or "4.5", f"{len(call.ids)} requests ran in one batch", self.about(""))
        if not requests or len(call.ids) > len(requests):
            raise Fault("4.4", f"generate got {len(call.ids)} rows for {len(requests)} requests", self.about(""))
        if (most := max(request.new for request in requests)) < call.new:
            raise Fault("4.4", f"a batch's longest request asks for {most} tokens, generate for {call.new}")
        if call.flaw:
            raise Fault("4.2", call.flaw)

    def unchanged(self) -> None:
        """No prompt was written to."""
        for request in self.callers:
            if not request.tokens.equal(request.asked):
                raise Fault("4.2", f"{request}: the prompt was written to")
        if any(tokens._version != version for tokens, version in self.versions):
            raise Fault("4.2", "a prompt was written to, and put right again")

    def about(self, what: str) -> str:
        return f"{self.kind}: {what}" if what else str(self.kind)

    @staticmethod
    def shown(requests: list[Request]) -> str:
        return "prompts of " + ", ".join(str(request.tokens.size(1)) for request in requests) + " tokens"


def names(requests: list[Request]) -> str:
    return " and ".join(request.name for request in requests)


def lines(batches: list[list[Request]]) -> str:
    return str([[request.tokens.size(1) for request in batch] for batch in batches])
