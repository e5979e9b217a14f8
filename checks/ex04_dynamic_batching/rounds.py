"""One round of a walk: a batch runs behind a gate while others wait, and what must become of them all."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import torch
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
    """What is not as it should be, and the requirement that it breaks."""

    def __init__(self, requirement: str, fact: str, hint: str = "") -> None:
        super().__init__(f"{fact}\n{hint}" if hint else fact)
        self.requirement = requirement


class State:
    """A stage, the batchers that were built on it, and what has happened so far."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.batchers: dict[Kind, tuple[Any, Model]] = {}
        self.second: Loop | None = None
        self.used: dict[tuple[Kind, int], dict[str, Tensor]] = {}
        self.past: set[str] = set()

    def batcher(self, kind: Kind) -> None:
        """Puts a batcher of this kind on the stage, the one that is there already if there is one."""
        stage = self.stage
        if kind not in self.batchers:
            threads = stage.model.loop_threads
            stage.model = Model()
            stage.model.loop_threads = threads
            names = ("max_batch_size", "max_wait_time", "length_tolerance", "max_queue_size")
            values = (kind.size, kind.seconds, kind.width, kind.room)
            stage.start(bare=kind.bare, **dict(zip(names, values, strict=True)))
            self.batchers[kind] = stage.batcher, stage.model
        stage.batcher, stage.model = self.batchers[kind]
        stage.forget()

    def loops(self, two: bool) -> list[Loop]:
        if two and self.second is None:
            self.second = self.stage.loop(idle=True)
        return [self.stage.home, *([self.second] if two and self.second else [])]


class Round:
    """One round: `running` runs, `waiting` waits."""

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

    # What happens

    def play(self) -> None:
        kind, stage = self.kind, self.stage
        self.state.batcher(kind)
        self.loops = self.state.loops(self.drawn["loops"])
        stage.model.state = int(torch.randint(9, (), generator=self.rng))
        # Of a batcher whose time limit is short a lone one goes: others might not come before it is overdue.
        self.running = self.requests([0] * (kind.size if kind.seconds == NEVER else 1))
        self.wanted = [self.running]
        gate, asked = stage.hold(*self.running), time.monotonic()
        self.ask(self.running, gone=self.drawn["fault"] == "closed")
        self.reached(gate, self.running[0], "none waits")
        if self.drawn["fault"] in ("raises", "cancelled raises"):
            self.fail(self.running[0])
        self.queue_up()
        self.not_early(asked)
        batches = kind.batches(self.waiting, kind.seconds != NEVER or self.drawn["end"] != "")
        self.wanted = [self.running, *batches]
        if batches and self.drawn["fault"] == "raises next":
            self.fail(batches[0][-1])
        following = stage.hold(batches[0][0]) if batches and self.drawn["end"] != "loop" else None
        jobs = self.shut_down()
        gate.open()
        if following is not None:
            self.reached(following, batches[0][0], "it may go")
            self.judge(self.running, STILL_RUNS)
            if not all(self.stage.turns(loop) for loop in self.loops):
                self.blocked("the next batch runs")
            following.open()
        self.judge([*self.running, *(request for batch in batches for request in batch)], "")
        for job in jobs:
            self.returned(job)
        rest = [request for request in self.waiting if not any(request in batch for batch in batches)]
        if rest or len(batches) == 0:
            stage.settle()
        self.judge_calls(so_far=False)
        self.leave(rest)
        self.unchanged()
        self.state.past |= self.happened()

    def queue_up(self) -> None:
        """Others wait while the first batch runs; some are refused, or cancelled."""
        fault = self.drawn["fault"]
        self.waiting = self.requests(self.pattern())
        half = (len(self.waiting) + 1) // 2 if len(self.loops) > 1 else len(self.waiting)
        self.ask(self.waiting[:half], gone=fault == "closed waiting")
        if half < len(self.waiting):
            self.stage.settle()  # Now it is known who came first.
            self.ask(self.waiting[half:], on=self.loops[-1])
        if fault in ("empty", "rows", "int32", "nothing"):
            self.refuse_bad(fault)
        self.turns("a batch runs")
        settled = self.kind.seconds == NEVER
        if self.drawn["queue"]:
            self.overfill()
        taken = self.waiting[self.drawn["cancelled"]]
        closed = fault == "closed waiting" and half > 0
        if closed:
            self.stage.end(self.callers[self.waiting[0]].loop)
            self.cancelled.append(self.waiting.pop(0))
            taken = [request for request in taken if request in self.waiting]
        self.cancel(taken)
        self.waiting = [request for request in self.waiting if request not in taken]
        if self.drawn["queue"] and (taken or closed):
            self.overfill()
        if fault in ("cancelled", "cancelled raises"):
            self.cancel(self.running[:1])
        if fault == "all cancelled":
            self.cancel(self.running)
        if fault == "closed":
            self.stage.end(self.callers[self.running[0]].loop)
            self.cancelled.append(self.running[0])
            settled = False
        if not settled:
            self.stage.settle(self.kind.seconds if self.kind.seconds != NEVER else 0)

    def pattern(self) -> list[int]:
        """The buckets of those that wait, the oldest first."""
        size, drawn = self.kind.size, self.drawn["waiting"]
        if drawn == "?":
            found = torch.randint(3, (2 * size + 1,), generator=self.rng).tolist()
        elif "~" in drawn:
            found = [0, 1] * size
        else:
            found = [int(bucket) for bucket in drawn.replace("+", "") for _ in range(size)] + [0] * ("+" in drawn)
        return found[: self.kind.room]

    def ask(self, requests: list[Request], *, on: Loop | None = None, gone: bool = False) -> None:
        """Callers of these; the first one on a loop of its own if that is to be closed."""
        self.versions += [(r.tokens, r.tokens._version) for r in requests if not r.tokens.is_inference()]
        if gone and requests:
            (self.callers[requests[0]],) = self.stage.ask(requests[0], on=self.stage.loop())
            self.stage.settle()
            requests = requests[1:]
        self.callers |= zip(requests, self.stage.ask(*requests, on=on), strict=True)

    def refuse_bad(self, fault: str) -> None:
        (request,) = self.requests([0])
        changes: Mapping[str, tuple[Any, int]] = {
            "empty": (request.tokens[:, :0], 2),
            "rows": (torch.cat([request.tokens, request.tokens]), 2),
            "int32": (request.tokens.int(), 2),
            "nothing": (request.tokens, 0),
        }
        request.tokens, request.new = changes[fault]
        (caller,) = self.stage.ask(request)
        self.refused.append(caller)
        self.is_refused(caller, ValueError, "4.7", "while a batch runs: a request that cannot be valid")

    def overfill(self) -> None:
        """Fills the queue; one more is refused."""
        more = self.requests([0] * (self.kind.room - len(self.waiting)))
        self.ask(more)
        self.waiting += more
        self.stage.settle()
        self.nobody_ended()
        (request,) = self.requests([1])
        (caller,) = self.stage.ask(request)
        self.refused.append(caller)
        why = f"max_queue_size is {self.kind.room}, and as many requests wait"
        self.is_refused(caller, self.stage.full_queue, "4.8", why)

    def cancel(self, requests: list[Request]) -> None:
        for request in requests:
            self.callers[request].cancel()
        for request in requests:
            if not self.stage.waits(self.callers[request].finished):
                raise Fault(self.silence(), f"the caller of request {request.name} was cancelled and did not end")
        self.cancelled += requests

    def fail(self, request: Request) -> None:
        """generate raises in the batch of this request."""
        kinds = OSError("device lost"), TimeoutError("too slow"), OddError(3, reason="no memory"), KeyError("weight")
        error: Exception = kinds[request.mark % len(kinds)]
        self.fails[request] = error
        self.stage.model.errors.append((request, error))

    def shut_down(self) -> list[Job]:
        """Calls shutdown, and waits until it waits."""
        if not self.drawn["end"]:
            return []
        del self.state.batchers[self.kind]
        batcher, begun = self.stage.batcher, threading.Event()

        def close() -> None:
            begun.set()
            batcher.shutdown()

        on = self.stage.home if self.drawn["end"] == "loop" else None
        jobs = [self.stage.do(close, on)]
        self.stage.waits(begun)
        self.stage.be_quiet()
        if jobs[0].finished.is_set() and jobs[0].error is None:
            raise Fault("4.9", "shutdown() returned while a batch still ran")
        return jobs

    def leave(self, rest: list[Request]) -> None:
        """Ends the round for those who still wait: they are cancelled, or others make full batches of them."""
        if self.drawn["end"]:
            (request,) = self.requests([0])
            (late,) = self.stage.ask(request)
            self.is_refused(late, RuntimeError, "4.9", "the batcher is shut down")
            return
        if not self.drawn["rest"]:
            self.cancel(rest)
            self.state.past |= {"cancelled"} if rest else set()
            return
        for batch in self.kind.batches(rest, True):
            more = self.requests([self.kind.bucket(batch[0])] * (self.kind.size - len(batch)), exact=True)
            self.ask(more)
            self.judge([*batch, *more], "now it is a full batch, which goes at once")

    # What is asked for

    def requests(self, buckets: list[int], exact: bool = False) -> list[Request]:
        """Requests for prompts that fall into these buckets, as drawn; `exact`: the very ones, not longer ones."""
        drawn, kind = self.drawn["lengths"], self.kind
        shift = 256 // kind.width + 1 if drawn == "long" and not exact else 0
        picks = torch.randint(kind.width, (len(buckets),), generator=self.rng).tolist()
        if drawn == "ends":
            picks = [(pick % 2) * (kind.width - 1) for pick in picks]
        elif not drawn:
            picks = [kind.width // 2] * len(buckets)
        low, high = self.drawn["new"]
        new = torch.randint(low, high + 1, (max(len(buckets), 1),), generator=self.rng).tolist()
        lengths = [(bucket + shift) * kind.width + 1 + pick for bucket, pick in zip(buckets, picks, strict=True)]
        made = self.stage.requests(*lengths, new=tuple(new))
        if self.drawn["prompts"] and made:
            self.change(made, self.drawn["prompts"])
        return made

    def change(self, requests: list[Request], drawn: str) -> None:
        """Gives the prompts the drawn contents and layout."""
        if drawn == "slices":
            joined = torch.cat([request.tokens for request in requests], dim=1)
            parts = joined.split([request.tokens.size(1) for request in requests], dim=1)
            for request, part in zip(requests, parts, strict=True):
                request.tokens = part
        for request in requests:
            tokens = request.tokens
            if drawn == "zeros":
                tokens[0, : -1 - request.mark % 2] = 0
            elif drawn == "large":
                tokens[0, :-1] += 2**53 * (1 + request.mark % 3) + 1
            elif drawn == "strided":
                request.tokens = torch.stack([tokens, tokens + 1], dim=-1)[..., 0]
            elif drawn == "columns":
                request.tokens = tokens.t().contiguous().t()
            elif drawn == "expanded":
                request.tokens = tokens[:, -1:].expand(1, tokens.size(1))
            elif drawn == "inference":
                with torch.inference_mode():
                    request.tokens = tokens.clone()
            elif drawn == "one" and not self.running:
                request.name, request.tokens = requests[0].name, requests[0].tokens
            elif drawn == "id":
                request.id = "same"
        if drawn == "again":
            self.repeat(requests)

    def repeat(self, requests: list[Request]) -> None:
        """Puts prompts of earlier rounds in the place of new ones, where there are some of the same bucket."""
        for request in requests:
            used = self.state.used.setdefault((self.kind, self.kind.bucket(request)), {})
            old = next((name for name in used if name not in self.repeated), None)
            if old is not None:
                request.name, request.tokens = old, used[old]
            self.repeated.add(request.name)
            used[request.name] = request.tokens

    # What is judged

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
                raise Fault("4.2", f"{request}: a result came before generate was called for it")

    def no_error(self, caller: Caller, why: str) -> None:
        came = caller.error
        if isinstance(came, NotImplementedError):
            raise came
        if came is not None:
            number = "4.8" if isinstance(came, self.stage.full_queue) else self.silence()
            raise Fault(number, f"{caller.request}: {type(came).__name__} ({came}) came, a result was wanted", why)

    def not_early(self, asked: float) -> None:
        """A batch that is not full has waited for max_wait_time."""
        waited = self.stage.model.calls[0].came - asked
        if len(self.running) < self.kind.size and waited < self.kind.seconds - 0.0005:
            raise Fault("4.5", f"{self.kind}: a lone request went {waited:.4f} s after it came")

    def is_refused(self, caller: Caller, error: type[Exception], requirement: str, why: str) -> None:
        what = f"{caller.request}: {error.__name__} was wanted at once"
        if not self.stage.waits(caller.finished):
            raise Fault(requirement, f"{what}, nothing came", why)
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
            raise Fault("4.7", f"generate raised {wanted!r}: {request} got {came!r}, the same type and text was wanted")

    def together(self, one: Request, other: Request) -> bool:
        """Whether two requests ran in one call."""
        return any(call.serves(one) and call.serves(other) for call in self.stage.model.calls)

    def silent(self, caller: Caller, why: str) -> NoReturn:
        """Blames that a caller has never heard of its request: what has run so far may explain it."""
        where = self.stage.where(caller)
        if "blocked" in where:
            raise Fault("4.9" if self.drawn["end"] == "loop" else "4.3", "the event loop of a caller is blocked", why)
        self.judge_calls(so_far=True)
        heard = self.silence()
        failing = any(self.together(one, caller.request) for one in self.fails)
        if "returned" in where and (heard in ("4.1", "4.4", "4.5") or (why == STILL_RUNS and not failing)):
            heard = "4.3"
        raise Fault(heard, f"the caller of request {caller.request.name} was never woken: {where}", self.about(why))

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
        return "4.1" if self.drawn["lengths"] or self.drawn["new"] != (2, 2) else "4.4"

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
        self.judge_batches(came, wanted, fact)
        plain = not self.drawn["lengths"] and self.drawn["new"] == (2, 2)
        number = "4.3" if len(self.loops) > 1 else "4.4" if plain or self.cancelled else "4.1"
        raise Fault(
            "4.9" if self.drawn["end"] else number,
            "requests of one bucket wait, and do not share a call of generate",
            fact,
        )

    def judge_batches(self, came: list[list[Request]], wanted: list[list[Request]], fact: str) -> None:
        """Blames what is wrong with the batches that came, besides that they are no full ones."""
        due = [request for batch in wanted for request in batch]
        served = [request for batch in came for request in batch]
        if early := [request for request in served if request not in due]:
            number = "4.4" if self.cancelled else "4.5"
            raise Fault(number, f"{names(early)} went, in a batch neither full nor overdue", fact)
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
            raise Fault(end or "4.1", f"{self.shown(requests)} shared a call", self.about("two buckets never do"))
        if len(call.ids) > self.kind.size:
            raise Fault(end or "4.5", f"{len(call.ids)} requests ran in one batch", self.about(""))
        if not requests or len(call.ids) > len(requests):
            raise Fault("4.4", f"generate got {len(call.ids)} rows for {len(requests)} requests", self.about(""))
        if (most := max(request.new for request in requests)) < call.new:
            raise Fault("4.4", f"a batch's longest request asks for {most} tokens, generate for {call.new}")
        if call.sampled:
            raise Fault("4.2", "generate got do_sample=True")

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
