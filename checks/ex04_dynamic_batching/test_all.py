"""The specification of ex04, dynamic batching, as checks.

Each check has a stage: callers on event loops in threads of their own, and a model that holds calls back until a gate
opens. The check itself runs in the main thread and never blocks for long.

No verdict depends on how fast the machine is. What has to come is waited for, and the time in which threads only wait
for a processor does not count. What must not come is looked for once no thread has anything left to do. Where a time
limit itself is judged, the measure is repeated with longer ones until it says something.
"""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.testing import Close, Hang, OwnTest, Subject, own_test_checks, requirement, style_checks

OWN_TEST = OwnTest(
    __file__,
    "test_dynamic_batcher",
    swaps=("BatchRequest", "DynamicBatcher", "QueueFullError"),
    right=("answer", "asyncio_futures", "private_loop"),
)
VOCABULARY, FIRST_NAME = 499, 500
NEVER, SOON = 60.0, 0.03
THREADS = Path("/proc/self/task")
TELLS = THREADS.exists()


def others_run() -> bool:
    """Whether a thread besides this one runs or wants to, where the system tells."""
    own = str(threading.get_native_id())
    for number in os.listdir(THREADS) if TELLS else ():
        with suppress(OSError), open(f"{THREADS}/{number}/stat", "rb") as file:
            if number != own and file.read().rpartition(b") ")[2][:1] in b"RD":
                return True
    return False


def spent_until(event: threading.Event, limit: float) -> float:
    """Waits for an event; the seconds spent, at least `limit` if it did not come. While threads want a processor and
    get none, no time is spent.
    """
    spent, latest = 0.0, time.monotonic() + 3 * limit
    while spent < limit and not event.is_set():
        start, used = time.monotonic(), time.process_time()
        if event.wait(min(0.04, limit / 2)):
            break
        passed = time.monotonic() - start
        spent += min(passed, time.process_time() - used) if others_run() else passed
        if time.monotonic() > latest:
            return limit
    return spent


class Patience:
    """How long the checks wait in vain: all together for less than 3 s, whatever a batcher does.

    A first wait in vain costs its requirement, so that further ones of the same requirement may be short.
    """

    def __init__(self) -> None:
        self.left = 2.3
        self.lost: set[str] = set()
        self.stuck = False

    @property
    def is_over(self) -> bool:
        return self.left < 0.05

    def wait(self, event: threading.Event, number: str) -> bool:
        """Whether the event comes."""
        spent = spent_until(event, min(self.left, 0.08 if number in self.lost else 0.8))
        if event.is_set():
            return True
        self.left -= spent
        self.lost.add(number)
        return False

    def join(self, loop: "Loop") -> None:
        """Waits for the end of an event loop's thread, for long only if that never was in vain."""
        spent = spent_until(loop.ended, min(self.left, 0.02 if self.stuck else 0.3))
        if not loop.ended.is_set():
            self.left -= spent
            self.stuck = True


@dataclass(eq=False)
class Request:
    """What a caller asks for. The last token of its prompt is its own, and names it wherever it turns up."""

    name: str
    tokens: Tensor  # int64 [1, L]
    new: int
    id: str
    asked: Tensor = field(default_factory=lambda: torch.zeros(1, 0))

    @property
    def mark(self) -> int:
        return FIRST_NAME + int(self.name[1:])

    @property
    def expected(self) -> Tensor:
        """What it gets alone, from Python's integers and from the prompt as it was when it was asked for."""
        row = self.asked[0].tolist()
        for _ in range(self.new):
            total = sum((token * token + 3) * place for place, token in enumerate(row, start=1))
            row.append((total + 31 * row[-1]) % VOCABULARY)
        return torch.tensor([row])

    def __str__(self) -> str:
        return f"add_request({self.id!r}, a prompt of shape {tuple(self.tokens.shape)}, {self.new})"


@dataclass(eq=False)
class Gate:
    """Holds each call of generate that serves one of its requests, until it opens.

    There is news when such a call has come, or when one of the callers has ended without it.
    """

    requests: tuple[Request, ...]
    entered: bool = False
    news: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def open(self) -> None:
        self.opened.set()


@dataclass(eq=False)
class Call:
    """One call of generate."""

    ids: Tensor
    mask: Tensor | None
    new: int
    sampled: bool
    came: float = field(default_factory=time.monotonic)
    returned: bool = False

    @cached_property
    def marks(self) -> list[int]:
        """Which requests it serves, row by row; 0 for a row that serves none."""
        return [max((token for token in row if token >= FIRST_NAME), default=0) for row in self.ids.tolist()]

    def serves(self, request: Request) -> bool:
        return request.mark in self.marks


class Model(nn.Module):
    """Chooses each token by all the tokens that are read, by their positions, and by the last column."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls: list[Call] = []
        self.gates: list[Gate] = []
        self.errors: list[tuple[Request, Exception]] = []
        self.loop_threads: set[int] = set()
        self.active = self.most_active = 0
        self.on_a_loop = False
        self._lock = threading.Lock()

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        pad_token_id: int = 0,
    ) -> Tensor:
        mask = None if attention_mask is None else attention_mask.clone()
        call = Call(input_ids.clone(), mask, int(max_new_tokens), bool(do_sample))
        with self._lock:
            self.calls.append(call)
            self.active += 1
            self.most_active = max(self.most_active, self.active)
        try:
            self._pass_gates(call)
            for request, error in self.errors:
                if call.serves(request):
                    raise error
            return self._continued(input_ids, mask, call.new, call.sampled)
        finally:
            call.returned = True
            with self._lock:
                self.active -= 1

    def _pass_gates(self, call: Call) -> None:
        on_a_loop = threading.get_ident() in self.loop_threads
        self.on_a_loop |= on_a_loop
        for gate in list(self.gates):
            if any(call.serves(request) for request in gate.requests):
                gate.entered = True
                gate.news.set()
                if not on_a_loop:  # To wait there would stop the callers.
                    gate.opened.wait(5)

    def _continued(self, ids: Tensor, mask: Tensor | None, new: int, sampled: bool) -> Tensor:
        visible = torch.ones_like(ids) if mask is None else (mask != 0).long()
        if visible.shape != ids.shape:
            raise ValueError(f"attention_mask has shape {tuple(visible.shape)}, input_ids {tuple(ids.shape)}")
        position = visible.cumsum(1) * visible
        total = ((ids * ids + 3) * position).sum(1)
        last = torch.where(visible[:, -1] == 1, ids[:, -1], ids[:, -1] + 5)
        place, columns = visible.sum(1), [ids]
        for _ in range(new):
            last = (total + 31 * last + 7 * sampled) % VOCABULARY
            place = place + 1
            total = total + (last * last + 3) * place
            columns.append(last[:, None])
        return torch.cat(columns, dim=1)


class Loop:
    """An event loop in a thread of its own. Unless it is idle, something always happens on it."""

    def __init__(self, idle: bool = False) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda loop, context: None)
        self._beats = not idle
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def turn(self, event: threading.Event) -> None:
        """Sets the event from the loop, in its next turn but one."""
        self.loop.call_soon_threadsafe(self.loop.call_soon, event.set)

    def stop(self) -> None:
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.loop.stop)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        if self._beats:
            self.loop.create_task(beat())
        self.loop.run_forever()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        self.ended.set()


async def beat() -> None:
    """Wakes its loop again and again."""
    while True:
        await asyncio.sleep(0.002)


class Job:
    """Something that is done in another thread: a function called, or a request awaited on an event loop."""

    def __init__(self) -> None:
        self.finished = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None

    def call(self, function: Callable[[], Any]) -> None:
        try:
            self.value = function()
        except BaseException as error:
            self.error = error
        self.finished.set()


class Caller(Job):
    """Awaits one request on an event loop."""

    def __init__(self, request: Request, batcher: Any, loop: Loop, gates: list[Gate]) -> None:
        super().__init__()
        self.request = request
        self.loop = loop
        self._gates = gates
        self._batcher = batcher
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.loop.loop.call_soon_threadsafe(self._start)

    def cancel(self) -> None:
        self.loop.loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())

    def _start(self) -> None:
        self._task = self.loop.loop.create_task(self._ask())

    async def _ask(self) -> None:
        try:
            self.value = await self._batcher.add_request(self.request.id, self.request.tokens, self.request.new)
        except BaseException as error:
            self.error = error
        self.finished.set()
        for gate in self._gates:
            if self.request in gate.requests:
                gate.news.set()


class Stage:
    """A batcher, its model and its callers, for one check; tidied up afterwards, whatever became of them."""

    def __init__(self, subject: Subject, close: Close, rng: torch.Generator, patience: Patience, number: str) -> None:
        self.model = Model()
        self.batcher: Any = None
        self.others = set(threading.enumerate())
        self._subject, self._close, self._rng, self._patience, self._number = subject, close, rng, patience, number
        self._loops: list[Loop] = []
        self._batchers: list[Any] = []
        self._callers: list[Caller] = []
        self._names = 0
        self._size = 0
        self._deaths: list[str] = []
        self._hook = threading.excepthook
        threading.excepthook = lambda args: self._deaths.append(f"{args.exc_type.__name__}: {args.exc_value}")
        self.home = self.loop()

    # Setting up

    def loop(self, idle: bool = False) -> Loop:
        loop = Loop(idle)
        self._loops.append(loop)
        self.model.loop_threads.add(loop.thread.ident or 0)
        return loop

    def start(self, on: Loop | None = None, *, outside: bool = False, **options: Any) -> Any:
        """A batcher with buckets of 8, built on an event loop or outside any."""
        options = {"max_batch_size": 2, "max_wait_time": SOON, "length_tolerance": 8} | options
        kind = self._subject.DynamicBatcher
        job = self.do(lambda: kind(self.model, **options), None if outside else on or self.home)
        self.batcher = self.returned(job, "DynamicBatcher(…)")
        self._batchers.append(self.batcher)
        self._size = options["max_batch_size"]
        return self.batcher

    def requests(self, *lengths: int, new: tuple[int, ...] = (2, 3, 1, 4)) -> list[Request]:
        """Requests r0, r1, … for random prompts of these lengths."""
        made = []
        for index, length in enumerate(lengths):
            tokens = torch.randint(VOCABULARY, (1, length), generator=self._rng)
            tokens[0, -1] = FIRST_NAME + self._names
            made.append(Request(f"r{self._names}", tokens, new[index % len(new)], f"r{self._names}"))
            self._names += 1
        return made

    # Acting

    def do(self, function: Callable[[], Any], on: Loop | None = None) -> Job:
        """Calls a function on an event loop's thread, or in a thread of its own."""
        job = Job()
        if on is not None:
            on.loop.call_soon_threadsafe(job.call, function)
        else:
            threading.Thread(target=job.call, args=(function,), daemon=True).start()
        return job

    def ask(self, *requests: Request, on: Loop | None = None, batcher: Any = None) -> list[Caller]:
        """Callers of these requests, in this order."""
        batcher, loop = batcher or self.batcher, on or self.home
        callers = [Caller(request, batcher, loop, self.model.gates) for request in requests]
        self._callers += callers
        for caller in callers:
            caller.request.asked = caller.request.tokens.clone()
            caller.start()
        return callers

    def ask_at_once(self, *requests: Request, seconds: float = 0) -> list[Caller]:
        """Callers of these requests, all of whom wait, for `seconds` at least, before the first can be served."""
        gate = self.occupy()
        callers = self.ask(*requests)
        self.settle(seconds)
        gate.open()
        return callers

    def cancel(self, *callers: Caller) -> None:
        """Cancels callers, and waits until each has ended."""
        for caller in callers:
            caller.cancel()
        for caller in callers:
            if not self._patience.wait(caller.finished, self._number):
                self._fail(f"the caller of request {caller.request.name} was cancelled and did not end")

    def shut_down(self, on: Loop | None = None) -> None:
        self.returned(self.do(self.batcher.shutdown, on), "shutdown()", "it waits for something that never comes")

    def hold(self, *requests: Request) -> Gate:
        gate = Gate(requests)
        self.model.gates.append(gate)
        return gate

    def occupy(self) -> Gate:
        """Lets a full batch of one-token prompts run until its gate opens: what is asked for meanwhile waits."""
        plugs = self.requests(*[1] * self._size)
        gate = self.hold(*plugs)
        self.ask(*plugs)
        self.reached(gate)
        return gate

    def settle(self, seconds: float = 0) -> None:
        """Lets all be done that can be done now: what was asked for is queued, and wrong code does what it should not.

        After further `seconds` the same once more.
        """
        turns = [threading.Event() for _ in self._loops]
        for loop, turned in zip(self._loops, turns, strict=True):
            with suppress(RuntimeError):
                loop.turn(turned)
        for turned in turns:
            spent_until(turned, 0.05)
        quiet, latest, used = 0, time.monotonic() + 2, time.process_time()
        # Twice in a row, since a thread that waits for Python's lock seems to sleep.
        while quiet < 2 and time.monotonic() < latest and time.process_time() - used < 0.1:
            time.sleep(0.00005 if TELLS else 0.002)
            quiet = 0 if others_run() else quiet + 1
        if seconds:
            time.sleep(seconds)
            self.settle()

    def exercise(self, batcher: Any = None) -> None:
        """Has a full batch of one-token prompts run: whoever chooses batches has looked at all that wait."""
        callers = self.ask(*self.requests(*[1] * self._size), batcher=batcher)
        spent = spent_until(callers[-1].finished, 0.1)
        self._patience.left -= 0 if callers[-1].finished.is_set() else spent
        self.settle()

    def end(self, loop: Loop) -> None:
        """Ends an event loop as asyncio.run does, its callers cancelled."""
        loop.stop()
        self._patience.join(loop)
        self._loops.remove(loop)

    # Judging

    def returned(self, job: Job, what: str, hint: str = "") -> Any:
        """A job's value, once it is there."""
        if not self._patience.wait(job.finished, self._number):
            self._fail(f"{what} did not return", hint)
        if job.error is not None:
            raise job.error
        return job.value

    def reached(self, gate: Gate) -> None:
        """Waits until generate is called for a gate's requests."""
        callers = [caller for caller in self._callers if caller.request in gate.requests]
        if not self._patience.wait(gate.news, self._number):
            self._never_woken(callers[0])
        if not gate.entered:
            ended = next(caller for caller in callers if caller.finished.is_set())
            self.served(ended)
            raise AssertionError(f"{ended.request}: {ended.value!r} came before generate was called for it")

    def turns(self, loop: Loop) -> bool:
        """Whether an event loop still turns."""
        turned = threading.Event()
        loop.turn(turned)
        return self._patience.wait(turned, self._number)

    def waits(self, event: threading.Event) -> bool:
        return self._patience.wait(event, self._number)

    def outcome(self, caller: Caller, hint: str = "") -> BaseException | None:
        """The error that a caller got, or None; a request that nobody has written yet is neither."""
        if not self._patience.wait(caller.finished, self._number):
            self._never_woken(caller, hint)
        if isinstance(caller.error, NotImplementedError):
            raise caller.error
        return caller.error

    def served(self, *callers: Caller, hint: str = "") -> None:
        """Each caller got a result, right or not."""
        for caller in callers:
            error = self.outcome(caller, hint)
            if isinstance(error, asyncio.CancelledError):
                self._fail(f"{caller.request}: was cancelled, though its caller was not", hint)
            if error is not None:
                try:
                    raise error
                except BaseException:
                    fact = f"{caller.request}: {type(error).__name__} ({error}) came, a result was wanted"
                    raise AssertionError(f"{fact}\n{hint}" if hint else fact) from error

    def right(self, *callers: Caller, hint: str = "") -> None:
        """Each caller got what its request gets alone."""
        self.served(*callers, hint=hint)
        for caller in callers:
            self._close(caller.value, caller.request.expected, str(caller.request), tolerance=0, hint=hint)

    @property
    def full_queue(self) -> type[Exception]:
        """The learner's QueueFullError."""
        kind: type[Exception] = self._subject.QueueFullError
        return kind

    def refused(self, caller: Caller, kind: type[Exception], why: str) -> None:
        """A caller got this error, and its request was not run."""
        error = self.outcome(caller, f"{why}: {kind.__name__} was wanted at once")
        came = "a result" if error is None else f"{type(error).__name__} ({error})"
        assert isinstance(error, kind), f"{caller.request}: {came} came, {kind.__name__} was wanted\n{why}"

    def calls(self, requests: list[Request]) -> list[Call]:
        """The calls of generate that served these requests."""
        return [call for call in self.model.calls if any(call.serves(request) for request in requests)]

    def batches(self, requests: list[Request]) -> list[list[str]]:
        """The names of these requests, call by call."""
        calls = self.calls(requests)
        return [[request.name for request in requests if call.serves(request)] for call in calls]

    def _never_woken(self, caller: Caller, hint: str = "") -> None:
        self._fail(f"the caller of request {caller.request.name} was never woken: {self._where(caller)}", hint)

    def _where(self, caller: Caller) -> str:
        turned = threading.Event()
        caller.loop.turn(turned)
        if not turned.wait(0.05):
            self._patience.left -= 0.5  # It may never end, and keep a processor busy.
            return "its event loop is blocked"
        calls = self.calls([caller.request])
        death = f"; a thread ended with {self._deaths[0]}" if self._deaths else ""
        if not calls:
            return f"generate was not called for it{death}"
        return f"generate has returned its batch{death}" if calls[0].returned else f"its batch still runs{death}"

    def _fail(self, fact: str, hint: str = "") -> None:
        kind = Hang if self._patience.is_over else AssertionError
        raise kind(f"{fact}\n{hint}" if hint else fact)

    # Tidying up

    def tidy(self) -> None:
        for gate in self.model.gates:
            gate.open()
        for batcher in self._batchers:
            self.do(batcher.shutdown, self.home if self.home in self._loops else None)
        self.end_loops()
        threading.excepthook = self._hook

    def left_threads(self) -> list[str]:
        """The names of threads that are still there when they have had the time to end."""
        for _ in range(40):
            left = [thread.name for thread in threading.enumerate() if thread not in self.others]
            if not left:
                break
            spent_until(threading.Event(), 0.001 if others_run() else 0.008)
        return left

    def end_loops(self) -> None:
        for loop in list(self._loops):
            self.end(loop)


def names(requests: tuple[Request, ...] | list[Request]) -> str:
    return " and ".join(request.name for request in requests)


@pytest.fixture(scope="module")
def patience(request: pytest.FixtureRequest) -> Iterator[Patience]:
    """One for all checks of a run."""
    before = set(threading.enumerate())
    yield Patience()
    if set(threading.enumerate()) - before:
        threading.Thread(target=end_anyway, args=(request.session,), daemon=True).start()


def end_anyway(session: pytest.Session) -> None:
    """Ends the process once only threads that a batcher left behind keep it: Python would wait for them for ever."""
    main = threading.main_thread().ident or 0
    frame = None
    while frame is None or frame.f_code.co_name != "_shutdown":
        time.sleep(0.3)
        frame = sys._current_frames().get(main)
        while frame is not None and frame.f_back is not None:
            frame = frame.f_back
    time.sleep(0.3)
    os._exit(int(session.exitstatus))


@pytest.fixture
def stage(
    request: pytest.FixtureRequest, subject: Subject, close: Close, rng: torch.Generator, patience: Patience
) -> Iterator[Stage]:
    """Where a check plays."""
    if patience.is_over:
        raise Hang("not run after the hang")
    stage = Stage(subject, close, rng, patience, request.node.get_closest_marker("requirement").args[0])
    try:
        yield stage
    finally:
        stage.tidy()


# 4.3 comes first: with a blocked loop nothing else could be judged. All checks but the second one let the callers' loop
# beat, so that a caller who is handed a result but not woken fails there alone.


@requirement("4.3")
def test_the_event_loop_is_not_blocked(stage: Stage) -> None:
    """While generate runs, the event loop of its caller turns and takes new requests."""
    first, second = stage.requests(9, 10)
    stage.start(max_batch_size=1)
    gate = stage.hold(first)

    callers = stage.ask(first)
    stage.reached(gate)
    callers += stage.ask(second)
    turns = stage.turns(stage.home)
    gate.open()

    assert not stage.model.on_a_loop, (
        "generate is called in the thread of the callers' event loop\n"
        "nothing else happens there until it returns: call it in another thread"
    )
    assert turns, (
        "the event loop of the callers is blocked while generate runs\n"
        "add_request awaits its result; it neither waits in the loop's thread nor needs a lock that generate holds up"
    )
    stage.served(*callers)


@requirement("4.3")
def test_an_idle_event_loop_is_woken(stage: Stage) -> None:
    """A caller wakes also if nothing else happens on its event loop."""
    idle = stage.loop(idle=True)
    (request,) = stage.requests(9)
    stage.start(idle, max_batch_size=1)
    gate = stage.hold(request)

    (caller,) = stage.ask(request, on=idle)
    stage.reached(gate)
    stage.settle()  # Now its event loop sleeps.
    gate.open()

    if not stage.waits(caller.finished) and stage.turns(idle) and stage.waits(caller.finished):
        raise AssertionError(
            "the caller of request r0 was woken only when something else happened on its event loop\n"
            "set_result from another thread does not wake a loop: use loop.call_soon_threadsafe, or asyncio.wrap_future"
        )
    stage.served(caller)


# 4.1 buckets


@requirement("4.1")
def test_bucket_edges(stage: Stage) -> None:
    """A bucket is named by its upper edge, which belongs to it."""
    edges = {
        32: {1: 32, 32: 32, 33: 64, 64: 64, 65: 96},
        10: {1: 10, 10: 10, 11: 20, 95: 100},
        7: {6: 7, 7: 7, 8: 14},
        1: {1: 1, 2: 2, 13: 13},
    }
    for tolerance, wanted in edges.items():
        batcher = stage.start(length_tolerance=tolerance)

        for length, edge in wanted.items():
            came = batcher.get_length_bucket(length)
            what = f"get_length_bucket({length}) with length_tolerance {tolerance}"
            assert isinstance(came, int) and came == edge, f"{what}: {came!r} came, {edge} was wanted"


@requirement("4.1")
def test_one_bucket_shares_a_call(stage: Stage) -> None:
    """Prompts of 9 and 16 tokens share a call where buckets are 8 wide, however many new tokens each wants."""
    requests = stage.requests(9, 16, 12, 10, new=(1, 3, 2, 9))
    stage.start(max_batch_size=4)

    callers = stage.ask_at_once(*requests)

    stage.served(*callers)
    came = stage.batches(requests)
    assert any({"r0", "r1"} <= set(batch) for batch in came), (
        f"prompts of 9, 16, 12 and 10 tokens, length_tolerance 8, max_batch_size 4: ran as {came}, not in one batch\n"
        "the prompt's length alone chooses the bucket; 9 … 16 share one"
    )


@requirement("4.1")
def test_two_buckets_never_share_a_call(stage: Stage) -> None:
    """Prompts of 16 and 17 tokens never share a call where buckets are 8 wide."""
    requests = stage.requests(16, 17, 25, 9, 24, 32)
    stage.start()

    callers = stage.ask_at_once(*requests)

    stage.served(*callers)
    for call in stage.calls(requests):
        lengths = [request.tokens.size(1) for request in requests if call.serves(request)]
        buckets = {(length + 7) // 8 * 8 for length in lengths}
        assert len(buckets) == 1, (
            f"generate got prompts of {lengths} tokens in one batch\n"
            f"with length_tolerance 8 these are {len(buckets)} buckets"
        )


@requirement("4.1")
def test_little_of_a_mix_is_padding(stage: Stage) -> None:
    """On a mix of short and long prompts, fewer than 1.3 positions are sent per real token."""
    requests = mix(stage)
    stage.start(max_batch_size=4)

    callers = stage.ask_at_once(*requests)

    stage.served(*callers)
    sent = sum(call.ids.numel() for call in stage.calls(requests))
    real = sum(request.tokens.size(1) for request in requests)
    assert sent < 1.3 * real, (
        f"16 prompts of 25 to 32 tokens and 8 of 90 to 96: {sent} positions were sent for {real} tokens, "
        f"{sent / real:.2f} for each\nbatch prompts of one bucket only, and pad to the longest of a batch"
    )


def mix(stage: Stage) -> list[Request]:
    """16 short and 8 long prompts, in mixed order."""
    lengths = torch.cat([25 + torch.arange(16) % 8, 90 + torch.arange(8) % 7])
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    return stage.requests(*lengths[order].tolist())


# 4.2 padding


@requirement("4.2")
def test_padding_goes_on_the_left(stage: Stage) -> None:
    """In what generate gets, each row ends with its prompt, and exactly the prompt is unmasked."""
    requests = stage.requests(9, 12)
    stage.start()

    callers = stage.ask_at_once(*requests)

    stage.served(*callers)
    prompts = {request.mark: request.asked[0] for request in requests}
    rows = [
        (call, row, prompts[mark])
        for call in stage.calls(requests)
        for row, mark in enumerate(call.marks)
        if mark in prompts
    ]
    for call, row, prompt in rows:
        width, length = call.ids.size(1), len(prompt)
        what = f"a prompt of {length} tokens in input_ids of width {width}"
        assert call.ids[row, width - length :].equal(prompt), (
            f"{what}: its row does not end with it\npad on the left: a decoder continues from the last position"
        )
        if width > length:
            assert call.mask is not None, f"{what}: generate got no attention_mask, so that pads are attended to"
            came, wanted = call.mask[row].long().tolist(), [0] * (width - length) + [1] * length
            assert came == wanted, f"{what}: its attention_mask is {came}, {wanted} was wanted"
            pad = int(call.ids[row].min())
            assert pad >= 0, f"{what}: pads with {pad}, which is no token id; 0 is one"
    assert any(len(call.ids) > 1 for call, _, _ in rows), "prompts of 9 and 12 tokens ran alone: nothing was padded"


@requirement("4.2")
def test_tokens_are_chosen_greedily(stage: Stage) -> None:
    """generate is called with do_sample False."""
    requests = stage.requests(9, 9)
    stage.start()

    stage.served(*stage.ask(*requests))

    assert not any(call.sampled for call in stage.calls(requests)), (
        "generate got do_sample=True: results then differ from call to call"
    )


@requirement("4.2")
def test_each_caller_gets_its_own_row(stage: Stage) -> None:
    """Prompts of one length, for as many new tokens each: nothing to pad, nothing to cut."""
    stage.start(max_batch_size=3)

    callers = stage.ask_at_once(*stage.requests(10, 10, 10, new=(2,)))

    stage.right(*callers, hint="row i belongs to request i, as [1, L + max_length]: the prompt and the new tokens")


@requirement("4.2")
def test_rows_are_cut_to_what_was_asked_for(stage: Stage) -> None:
    """Prompts of one length need no padding; each gets as many new tokens as it asked for."""
    stage.start(max_batch_size=3)

    callers = stage.ask_at_once(*stage.requests(10, 10, 10, new=(1, 4, 2)))

    stage.right(
        *callers,
        hint="a batch generates what its longest request asks for; cut each row to [1, L + its own max_length]",
    )


@requirement("4.2")
def test_padded_prompts_get_what_they_get_alone(stage: Stage) -> None:
    """Prompts of different lengths in one batch are all continued as if they were alone."""
    stage.start(max_batch_size=4)

    callers = stage.ask_at_once(*stage.requests(9, 16, 13, 11, new=(3,)))

    stage.right(
        *callers, hint="the result is the prompt without its padding, and what follows it; each caller gets its own row"
    )


@requirement("4.2")
def test_padding_and_cutting_together(stage: Stage) -> None:
    """Different lengths and different numbers of new tokens in one batch."""
    stage.start(max_batch_size=5)

    callers = stage.ask_at_once(*stage.requests(15, 9, 12, 16, 10, new=(2, 6, 1, 3, 4)))

    stage.right(*callers, hint="row i is output[i, pads_i : width + max_length_i]")


@requirement("4.2")
def test_a_prompt_may_hold_the_padding_token(stage: Stage) -> None:
    """A token 0 of a prompt is no pad: it is attended to, and it is returned."""
    requests = stage.requests(10, 13, 11)
    requests[0].tokens[0, :4] = 0
    requests[1].tokens[0, 5:9] = 0
    requests[2].tokens[0, :-1] = 0
    stage.start(max_batch_size=3)

    callers = stage.ask_at_once(*requests)

    stage.right(
        *callers, hint="the prompt holds token 0: neither the mask nor the cut may come from the tokens' values"
    )


@requirement("4.2")
def test_request_ids_may_repeat(stage: Stage) -> None:
    """Requests with one and the same id get their own results."""
    stage.start(max_batch_size=3)

    for _ in range(2):
        requests = stage.requests(10, 12, 11)
        for request in requests:
            request.id = "same"
        callers = stage.ask_at_once(*requests)
        stage.right(*callers, hint="request_ids repeat here: nothing may be kept by them")


@requirement("4.2")
def test_strided_prompts_are_left_alone(stage: Stage) -> None:
    """Prompts may be views with any strides, and are not written to."""
    requests = stage.requests(9, 12)
    for request in requests:
        base = torch.stack([request.tokens, request.tokens + 1], dim=-1)
        request.tokens = base[..., 0]
    stage.start()

    callers = stage.ask_at_once(*requests)

    stage.right(*callers, hint="the prompts are strided views here")
    for request in requests:
        assert request.tokens.equal(request.asked), f"{request}: the prompt was written to"


@requirement("4.2")
def test_one_batch_leaves_nothing_to_the_next(stage: Stage) -> None:
    """Later batches, of other sizes and widths, are right too."""
    stage.start(max_batch_size=3)

    for lengths in ((15, 16, 9), (10, 9, 10), (21, 17, 24), (1, 3, 2)):
        callers = stage.ask_at_once(*stage.requests(*lengths))
        stage.right(*callers, hint="in a later batch of the same batcher")


@requirement("4.2")
def test_a_single_request(stage: Stage) -> None:
    """A batch of one is right too, also for a prompt of one token."""
    stage.start(max_batch_size=1)

    for length in (1, 8, 13):
        stage.right(*stage.ask(*stage.requests(length)))


# 4.3 callers


@requirement("4.3")
def test_callers_wake_when_their_own_batch_is_done(stage: Stage) -> None:
    """A caller gets its result while the next batch still runs."""
    requests = stage.requests(9, 10, 17, 18)
    stage.start()
    gates = stage.hold(*requests[:2]), stage.hold(*requests[2:])

    first = stage.ask(*requests[:2])
    stage.reached(gates[0])
    second = stage.ask(*requests[2:])
    stage.settle()
    gates[0].open()
    stage.served(*first, hint="their batch is done, the next one still runs: hand results out after each batch")
    gates[1].open()

    stage.served(*second)


@requirement("4.3")
def test_callers_on_several_event_loops(stage: Stage) -> None:
    """Callers whose event loops run in three threads share a batch, and each wakes, also where nothing else happens."""
    requests = stage.requests(10, 10, 10, new=(2,))
    loops = [stage.loop(idle=True), stage.home, stage.loop(idle=True)]
    stage.start(max_batch_size=3)
    gate = stage.occupy()

    callers = [stage.ask(request, on=loop)[0] for request, loop in zip(requests, loops, strict=True)]

    stage.settle()
    gate.open()

    stage.served(*callers, hint="each caller's future belongs to its own event loop; no loop is the batcher's only one")
    came = stage.batches(requests)
    assert len(came) == 1, (
        f"3 requests of one bucket waited, from 3 event loops, max_batch_size 3: ran as {came}, not in one batch"
    )


@requirement("4.3")
def test_a_batcher_may_be_built_outside_any_event_loop(stage: Stage) -> None:
    """The constructor needs no running event loop."""
    stage.start(outside=True)

    callers = stage.ask(*stage.requests(9, 10))

    stage.served(*callers, hint="the batcher was built in a thread without an event loop")


@requirement("4.3")
def test_event_loops_come_and_go(stage: Stage) -> None:
    """A batcher serves one event loop after the other, each closed after use, as asyncio.run does it."""
    stage.start(outside=True)

    for _ in range(3):
        loop = stage.loop()
        callers = stage.ask(*stage.requests(9, 10), on=loop)
        stage.served(*callers, hint="earlier callers' event loops are closed: nothing of the batcher may live on them")
        stage.end(loop)


# 4.4 use of the device


@requirement("4.4")
def test_a_full_batch_goes_at_once(stage: Stage) -> None:
    """max_batch_size requests of one bucket do not wait for max_wait_time."""
    stage.start(max_batch_size=3, max_wait_time=NEVER)

    callers = stage.ask(*stage.requests(9, 12, 10))

    stage.served(*callers, hint="3 requests wait, max_batch_size is 3, max_wait_time 60: a full batch goes at once")


@requirement("4.4")
def test_a_full_batch_passes_an_older_one_that_may_not_go(stage: Stage) -> None:
    """A full batch does not wait behind a bucket that is older but neither full nor overdue."""
    older, *full = stage.requests(20, 9, 12)
    stage.start(max_wait_time=NEVER)

    stage.ask(older)
    stage.settle()
    callers = stage.ask(*full)

    stage.served(*callers, hint="another bucket's request is older, but may not go yet: look at all buckets")


@requirement("4.4")
def test_a_full_batch_goes_once_the_device_is_free(stage: Stage) -> None:
    """A batch that fills while another runs goes right after it."""
    requests = stage.requests(9, 10, 17, 18, 19)
    stage.start(max_wait_time=NEVER)
    gate = stage.hold(*requests[:2])

    first = stage.ask(*requests[:2])
    stage.reached(gate)
    second = stage.ask(*requests[2:])[1]  # In the batch, whether the oldest or the newest are taken.
    stage.settle()
    gate.open()

    stage.served(
        *first, second, hint="the batch was full before the device was free: it goes at once, max_wait_time is 60"
    )


@requirement("4.4")
def test_one_call_per_batch(stage: Stage) -> None:
    """A batch is one call of generate, for no more tokens than its longest request asks for."""
    requests = stage.requests(9, 11, 10, new=(2, 5, 1))
    stage.start(max_batch_size=3)

    callers = stage.ask_at_once(*requests)

    stage.served(*callers)
    calls = stage.calls(requests)
    assert len(calls) == 1, (
        f"3 requests of one bucket, max_batch_size 3: {len(calls)} calls of generate, one was wanted"
    )
    assert calls[0].new <= 5, f"requests for 2, 5 and 1 tokens: generate was asked for {calls[0].new}"
    assert len(calls[0].ids) == 3, f"3 requests: generate got {len(calls[0].ids)} rows"


@requirement("4.4")
def test_batches_are_filled(stage: Stage) -> None:
    """Six requests that wait run as two batches of three."""
    requests = stage.requests(9, 12, 10, 11, 9, 10)
    stage.start(max_batch_size=3)

    callers = stage.ask_at_once(*requests)

    stage.served(*callers)
    came = stage.batches(requests)
    assert len(came) == 2, (
        f"6 requests of one bucket wait, max_batch_size 3: they ran as {came}, in {len(came)} batches; 2 were wanted"
    )


@requirement("4.4")
def test_never_two_calls_at_a_time(stage: Stage) -> None:
    """While generate runs, no other call starts, not even for another bucket."""
    requests = stage.requests(9, 10, 17, 18, 11, 12)
    stage.start()
    gate = stage.hold(*requests[:2])

    callers = stage.ask(*requests[:2])
    stage.reached(gate)
    callers += stage.ask(*requests[2:])
    stage.settle(0.002)
    gate.open()

    stage.served(*callers)
    most = stage.model.most_active
    assert most == 1, f"{most} calls of generate ran at a time; a model serves one batch after the other"


@requirement("4.4")
def test_cancelled_requests_are_not_run(stage: Stage) -> None:
    """What was cancelled while it waited is in no call, and makes no call of its own."""
    requests = stage.requests(17, 18, 9, 10, 11)
    stage.start()
    gate = stage.occupy()

    callers = stage.ask(*requests)
    stage.settle()
    stage.cancel(*callers[:3])
    gate.open()

    stage.served(*callers[3:], hint="r0, r1 and r2 were cancelled while they waited")
    for request in requests[:3]:
        assert not stage.calls([request]), (
            f"request {request.name} was cancelled while it waited, and generate was called for it all the same"
        )
    assert all(len(call.ids) for call in stage.model.calls), "generate was called for a batch without rows"


@requirement("4.4")
def test_a_cancelled_request_fills_no_batch(stage: Stage) -> None:
    """A request that was cancelled while it waited does not count towards a full batch."""
    requests = stage.requests(9, 10, 11)
    stage.start(max_batch_size=3, max_wait_time=NEVER)

    callers = stage.ask(*requests[:2])
    stage.settle()
    stage.cancel(callers[0])
    stage.ask(requests[2])
    stage.settle()
    stage.exercise()

    assert not stage.calls(requests), (
        "max_batch_size 3, max_wait_time 60: r0 and r1 waited, r0 was cancelled, r2 came: a batch went\n"
        "it was not full: a cancelled request waits no more"
    )


# 4.5 limits


@requirement("4.5")
@pytest.mark.parametrize("size", [1, 3])
def test_batches_keep_to_max_batch_size(stage: Stage, size: int) -> None:
    """However many requests wait, no batch is larger than max_batch_size."""
    requests = stage.requests(*[9, 12, 10, 11, 12][: size + 2] * size)
    stage.start(max_batch_size=size, max_wait_time=0.002)

    callers = stage.ask_at_once(*requests)

    stage.served(*callers)
    sizes = [len(call.ids) for call in stage.model.calls]
    assert max(sizes) <= size, f"max_batch_size {size}: batches of {sizes} requests ran"


# Ever longer time limits: one that is over before the batcher has looked at its queue says nothing.
GROWING = 0.004, 0.016, 0.064, 0.25, 0.5


@requirement("4.5")
def test_a_partial_batch_goes_by_itself(stage: Stage) -> None:
    """A lone request is served after max_wait_time although nothing else happens, and so is the next one."""
    for seconds in (0, *GROWING):
        stage.start(max_batch_size=4, max_wait_time=seconds)
        for length in (9, 11):
            start = time.monotonic()
            callers = stage.ask(*stage.requests(length))
            stage.settle()
            in_time = time.monotonic() < start + seconds
            stage.served(
                *callers, hint=f"max_wait_time is {seconds}, no other request comes: something has to wake by itself"
            )
        if in_time:
            break


@requirement("4.5")
def test_every_bucket_has_its_time(stage: Stage) -> None:
    """Batches that are not full go after max_wait_time in every bucket, beside full ones and after them."""
    for seconds in GROWING:
        stage.start(max_wait_time=seconds)
        start = time.monotonic()

        callers = stage.ask(*stage.requests(9, 20, 10, 11, 30))
        stage.settle()
        in_time = time.monotonic() < start + seconds

        rest = names([callers[i].request for i in (1, 3, 4)])
        stage.served(*callers, hint=f"max_wait_time is {seconds}; {rest} are the rest in their buckets")
        if in_time:
            break


@requirement("4.5")
def test_the_rest_of_a_full_batch_waits(stage: Stage) -> None:
    """What is left beside full batches, in their bucket and in others, does not go with them."""
    requests = stage.requests(20, 9, 12, 10)
    stage.start(max_wait_time=NEVER)

    stage.ask(*requests)
    stage.settle()
    stage.exercise()

    ran = [request.name for request in requests if stage.calls([request])]
    assert len(ran) <= 2 and "r0" not in ran, (
        f"max_batch_size 2, max_wait_time 60, prompts of 20, 9, 12 and 10 tokens: {ran} went at once\n"
        "r0 waits alone in its bucket, and one of the other three is no full batch either"
    )


@requirement("4.5")
def test_a_partial_batch_waits(stage: Stage) -> None:
    """A batch that is not full does not go before max_wait_time."""
    requests = stage.requests(9, 10)
    stage.start(max_batch_size=3, max_wait_time=NEVER)

    for request in requests:
        stage.ask(request)
        stage.settle()
    stage.exercise()

    came = stage.batches(requests)
    assert not came, f"max_batch_size 3, max_wait_time 60: a batch of {len(came[0])} went at once"


@requirement("4.5")
def test_each_batcher_has_its_own_limits(stage: Stage) -> None:
    """Of two batchers at a time, the one with the short max_wait_time serves its request, the other one waits."""
    patient, hasty = stage.requests(9, 10)
    batchers = [stage.start(max_batch_size=4, max_wait_time=seconds) for seconds in (NEVER, 0.002)]

    stage.ask(patient, batcher=batchers[0])
    callers = stage.ask(hasty, batcher=batchers[1])
    stage.served(*callers, hint="max_wait_time is 0.002")
    stage.exercise(batchers[0])

    assert not stage.calls([patient]), (
        "max_wait_time 60: a lone request went as soon as that of another batcher, with max_wait_time 0.002"
    )


@requirement("4.5")
def test_the_time_counts_from_the_oldest(stage: Stage) -> None:
    """A batch goes max_wait_time after its oldest request came, not before, and not after its newest one."""
    for seconds in GROWING:
        stage.start(max_batch_size=3, max_wait_time=seconds)
        first, second = stage.requests(9, 10)
        start = time.monotonic()

        callers = stage.ask(first)
        stage.settle(0.5 * seconds)
        newest = time.monotonic()
        callers += stage.ask(second)
        stage.served(*callers, hint=f"max_wait_time is {seconds}")

        came = stage.calls([first])[0].came
        assert came > start + seconds - 0.0005, (
            f"max_wait_time {seconds}: a request went {came - start:.4f} s after it came, with no full batch"
        )
        if came < newest + seconds and newest < start + seconds:
            return
    raise AssertionError(
        f"max_wait_time {seconds}, of two requests the second came {seconds / 2} s after the first: "
        f"the batch went {came - newest:.2f} s after the second\n"
        "the time counts from the oldest request of a batch, not from the newest"
    )


@requirement("4.5")
def test_the_time_counts_while_the_device_is_busy(stage: Stage) -> None:
    """What is overdue when the device is free goes at once, and so does the rest of its bucket."""
    for seconds in GROWING:
        stage.start(max_wait_time=seconds)
        requests = stage.requests(9, 10, 11)

        callers = stage.ask_at_once(*requests, seconds=seconds)
        opened = time.monotonic()
        stage.served(*callers, hint=f"max_wait_time is {seconds}")

        came = stage.calls([requests[-1]])[0].came
        if came < opened + 0.9 * seconds:
            return
    raise AssertionError(
        f"max_wait_time {seconds}, max_batch_size 2: the last of three requests, which had waited longer than "
        f"max_wait_time behind a batch, went {came - opened:.2f} s after the device was free"
    )


# 4.6 fairness


@requirement("4.6")
def test_of_overdue_and_full_ones_the_oldest_goes_first(stage: Stage) -> None:
    """Of batches that are full or overdue, the one goes first whose oldest request has waited longest."""
    stage.start(max_wait_time=0.0005)

    for lengths, order in {
        (40, 9, 10, 11, 12): [[0], [1, 2], [3, 4]],
        (10, 11, 40, 9, 12): [[0, 1], [2], [3, 4]],
        (26, 42, 9, 10, 27): [[0, 4], [1], [2, 3]],
        (9, 26, 42, 43, 27, 10): [[0, 5], [1, 4], [2, 3]],
    }.items():
        requests = stage.requests(*lengths)
        in_order(stage, requests, stage.ask_at_once(*requests, seconds=0.001), order)  # All are overdue.


@requirement("4.6")
def test_of_full_ones_the_oldest_goes_first(stage: Stage) -> None:
    """The order follows the ages of requests, not the order in which buckets were first used, nor their lengths."""
    stage.start()

    for lengths, order in {
        (12, 11, 10, 9): [[0, 1], [2, 3]],
        (26, 27, 9, 10): [[0, 1], [2, 3]],
        (42, 43, 26, 27, 9, 10): [[0, 1], [2, 3], [4, 5]],
        (9, 26, 27, 10): [[0, 3], [1, 2]],
    }.items():
        requests = stage.requests(*lengths)
        in_order(stage, requests, stage.ask_at_once(*requests), order)


def in_order(stage: Stage, requests: list[Request], callers: list[Caller], order: list[list[int]]) -> None:
    """The groups of `order` ran one after the other."""
    stage.served(*callers)
    lengths = [request.tokens.size(1) for request in requests]
    calls = stage.calls(requests)
    ran = [next(i for i, call in enumerate(calls) if call.serves(request)) for request in requests]
    wanted = [[requests[i].name for i in group] for group in order]
    for earlier, later in pairwise(order):
        assert max(ran[i] for i in earlier) <= min(ran[i] for i in later), (
            f"prompts of {lengths} tokens came in this order and waited, in buckets of 8: "
            f"ran as {stage.batches(requests)}, {wanted} was wanted\n"
            "of the batches that may go, the one whose oldest request has waited longest goes first"
        )


@requirement("4.6")
def test_all_of_a_mix_are_served(stage: Stage) -> None:
    """Short and long prompts that come at once are all served."""
    stage.start(max_batch_size=5, max_wait_time=0.001)

    callers = stage.ask(*mix(stage))

    stage.served(
        *callers, hint="16 prompts of 25 to 32 tokens and 8 of 90 to 96, max_batch_size 5, max_wait_time 0.001"
    )


# 4.7 faults

BAD: list[tuple[Callable[[Tensor], Tensor], int]] = [
    (lambda x: x[:, :0], 2),
    (lambda x: x[0], 2),
    (lambda x: x.expand(2, -1), 2),
    (lambda x: x[None], 2),
    (lambda x: x[0, -1], 2),
    (lambda x: x.float(), 2),
    (lambda x: x.int(), 2),
    (lambda x: x.bool(), 2),
    (lambda x: x, 0),
    (lambda x: x, -3),
]


@requirement("4.7")
def test_an_impossible_request_is_refused(stage: Stage) -> None:
    """A request that cannot be valid gets ValueError, and the requests around it are served."""
    good, bad = stage.requests(9, 10), stage.requests(*[11] * len(BAD))
    for request, (change, new) in zip(bad, BAD, strict=True):
        request.tokens, request.new = change(request.tokens), new
    stage.start()

    first, *refused, last = stage.ask(good[0], *bad, good[1])

    for caller in refused:
        came = f"input_tokens are {caller.request.tokens.dtype}"
        stage.refused(caller, ValueError, f"{came}; int64 [1, L] with L >= 1 is wanted, and max_length >= 1")
    stage.served(first, last, hint="requests that were refused came between these two")


@requirement("4.7")
def test_an_error_of_the_model_reaches_every_caller(stage: Stage) -> None:
    """When generate raises, each caller of the batch gets an error of this type and text."""
    for error in (RuntimeError("out of memory in layer 3"), KeyError("layer 3"), ArithmeticError()):
        stage.start(max_batch_size=3)
        requests = stage.requests(9, 10, 11)
        stage.model.errors.append((requests[1], error))
        for caller in stage.ask_at_once(*requests):
            came = stage.outcome(caller, "generate raised in its batch: every caller of the batch gets the error")
            assert type(came) is type(error) and str(came) == str(error), (
                f"generate raised {error!r}: {caller.request} got {came!r}, the same type and text were wanted"
            )
        assert len(stage.calls(requests)) == 1, f"generate raised {error!r}, and was called again for the same requests"


@requirement("4.7")
def test_the_next_batch_works_after_an_error(stage: Stage) -> None:
    """An error of the model ends its batch only: what waits is served, and so is what comes later."""
    requests = stage.requests(9, 10, 17, 18)
    stage.start()
    stage.model.errors += [(request, OSError("device lost")) for request in requests[:2]]
    gate = stage.hold(*requests[:2])

    failing = stage.ask(*requests[:2])
    stage.reached(gate)
    waiting = stage.ask(*requests[2:])
    stage.settle()
    gate.open()

    for caller in failing:
        stage.outcome(caller, "generate raised in its batch: every caller of the batch gets the error")
    stage.served(*waiting, hint="generate raised in the batch before; the worker has to live on")
    stage.served(
        *stage.ask(*stage.requests(9, 10)), hint="generate raised in an earlier batch; the worker has to live on"
    )


@requirement("4.7")
@pytest.mark.parametrize("cancelled", [1, 2], ids=["one", "all"])
def test_a_caller_may_be_cancelled_while_its_batch_runs(stage: Stage, cancelled: int) -> None:
    """The others of the batch get their results, and the next batch works."""
    requests = stage.requests(9, 10)
    stage.start()
    gate = stage.hold(*requests)

    callers = stage.ask_at_once(*requests)
    stage.reached(gate)
    stage.cancel(*callers[:cancelled])
    gate.open()

    hint = f"{names(requests[:cancelled])} was cancelled while its batch ran: a cancelled future takes no result"
    stage.served(*callers[cancelled:], hint=hint)
    stage.served(*stage.ask(*stage.requests(9, 10)), hint=hint)


@requirement("4.7")
def test_a_callers_event_loop_may_be_gone(stage: Stage) -> None:
    """A caller whose event loop was closed while its batch ran harms no other caller."""
    requests = stage.requests(9, 10)
    stage.start()
    gate = stage.hold(*requests)
    other = stage.loop()

    stage.ask(requests[0], on=other)
    stage.settle()
    callers = stage.ask(requests[1])
    stage.reached(gate)
    stage.end(other)
    gate.open()

    hint = "the event loop of r0 was closed while its batch ran: call_soon_threadsafe then raises RuntimeError"
    stage.served(*callers, hint=hint)
    stage.served(*stage.ask(*stage.requests(9, 10)), hint=hint)


# 4.8 back-pressure


@requirement("4.8")
def test_a_full_queue_refuses(stage: Stage) -> None:
    """max_queue_size requests may wait, in all buckets together and beside those that run; one more is refused."""
    most = 3
    requests = stage.requests(9, 10, 17)
    extra, last = stage.requests(25, 26)
    stage.start(max_batch_size=1, max_queue_size=most)
    gate = stage.occupy()

    callers = stage.ask(*requests)
    stage.settle()
    late = stage.ask(extra)[0]
    stage.refused(late, stage.full_queue, f"{most} requests wait, max_queue_size is {most}")
    gate.open()

    stage.served(*callers, hint=f"max_queue_size is {most}: {most} may wait beside the one that runs")
    stage.served(*stage.ask(last))
    assert not stage.calls([extra]), "a request that was refused with QueueFullError was run"


@requirement("4.8")
def test_places_are_free_again(stage: Stage) -> None:
    """What has left the queue makes room for others, again and again."""
    stage.start(max_batch_size=1, max_queue_size=1)
    (failing,) = stage.requests(9)
    stage.model.errors.append((failing, OSError("device lost")))

    for caller in stage.ask(failing):
        stage.outcome(caller)

    for length in (9, 10, 11):
        callers = stage.ask(*stage.requests(length))
        stage.served(*callers, hint="max_queue_size is 1; earlier requests were served or have failed, none waits")


@requirement("4.8")
def test_a_queue_may_be_smaller_than_a_batch(stage: Stage) -> None:
    """max_queue_size counts callers of all event loops, and also holds where it is less than max_batch_size."""
    requests, (extra,) = stage.requests(9, 10), stage.requests(11)
    stage.start(max_batch_size=5, max_wait_time=NEVER, max_queue_size=2)

    stage.ask(requests[0], on=stage.loop())
    stage.ask(requests[1])
    stage.settle()
    (late,) = stage.ask(extra)

    stage.refused(late, stage.full_queue, "2 requests wait, from two event loops, max_queue_size is 2")


@requirement("4.8")
def test_a_cancelled_request_frees_its_place(stage: Stage) -> None:
    """A request that was cancelled while it waited counts no more, though the device is still busy."""
    requests = stage.requests(9, 10, 17)
    after, extra = stage.requests(11, 12)
    stage.start(max_batch_size=1, max_queue_size=3)
    gate = stage.occupy()

    callers = stage.ask(*requests)
    stage.settle()
    stage.cancel(callers[0])
    late, later = stage.ask(after, extra)
    why = "3 waited, max_queue_size is 3, one was cancelled"
    stage.refused(later, stage.full_queue, f"{why}, another one came")
    gate.open()

    stage.served(late, hint=f"{why}: there is room for one more at once")
    stage.served(*callers[1:])


# 4.9 shutdown


@requirement("4.9")
@pytest.mark.parametrize("place", ["other_thread", "loops_own_thread"])
def test_shutdown_serves_what_waits(stage: Stage, place: str) -> None:
    """Shutdown runs what waits, full or not, without waiting for max_wait_time."""
    requests = stage.requests(9, 20, 10)
    stage.start(max_batch_size=4, max_wait_time=NEVER)

    callers = stage.ask(*requests)
    stage.settle()
    stage.shut_down(stage.home if place == "loops_own_thread" else None)

    stage.served(*callers, hint="they waited when shutdown() was called: they are served at once, max_wait_time is 60")


@requirement("4.9")
def test_shutdown_returns_when_all_is_served(stage: Stage) -> None:
    """While a batch runs shutdown waits; when it returns all is served, within the limits, and nothing runs."""
    requests = stage.requests(9, 10, 17, 25, 18, 19)
    stage.start()
    gate, last = stage.hold(*requests[:2]), stage.hold(requests[5])
    stage.model.errors.append((requests[3], OSError("device lost")))

    callers = stage.ask(*requests[:2])
    stage.reached(gate)
    callers += stage.ask(*requests[2:])
    stage.settle()
    job = stage.do(stage.batcher.shutdown)
    stage.settle(0.002)
    early = job.finished.is_set()
    gate.open()
    stage.reached(last)
    stage.settle(0.002)
    late = job.finished.is_set()
    last.open()
    stage.returned(job, "shutdown()")

    if job.error is None:
        assert not early, "shutdown() returned while a batch still ran and other requests still waited"
        assert not late, "shutdown() returned while the last batch still ran"
    returned = [call for call in stage.model.calls if call.returned]
    assert len(returned) == len(stage.model.calls) and all(stage.calls([request]) for request in requests), (
        f"shutdown() returned before {names(requests[2:])}, which waited, were served"
    )
    for call in stage.calls(requests):
        lengths = [request.tokens.size(1) for request in requests if call.serves(request)]
        assert len(lengths) <= 2 and len({(length + 7) // 8 for length in lengths}) == 1, (
            f"max_batch_size 2, buckets of 8: shutdown() ran prompts of {lengths} tokens in one batch\n"
            "what it serves keeps to max_batch_size and to its bucket, too"
        )
    stage.served(*callers[:3], *callers[4:], hint="generate raised for r3 only, while shutdown() waited")


@requirement("4.9")
def test_shutdown_may_be_called_again(stage: Stage) -> None:
    """Two threads may shut down at a time, and a third call changes nothing."""
    requests = stage.requests(9, 10)
    stage.start()
    gate = stage.hold(*requests)

    callers = stage.ask(*requests)
    stage.reached(gate)
    jobs = [stage.do(stage.batcher.shutdown) for _ in range(2)]
    stage.settle()
    gate.open()

    for job in jobs:
        stage.returned(job, "shutdown(), called by two threads at a time,")
    stage.served(*callers)
    stage.shut_down()


@requirement("4.9")
def test_no_request_is_taken_afterwards(stage: Stage) -> None:
    """add_request raises RuntimeError after shutdown."""
    stage.start(max_batch_size=1)
    stage.served(*stage.ask(*stage.requests(9)))
    stage.shut_down()

    (late,) = stage.ask(*stage.requests(10))

    stage.refused(late, RuntimeError, "the batcher is shut down")


@requirement("4.9")
def test_nobody_hangs_who_comes_during_shutdown(stage: Stage) -> None:
    """A request that comes while shutdown waits is refused with RuntimeError or served, never forgotten."""
    requests = stage.requests(9, 10)
    stage.start()
    gate = stage.hold(*requests)

    stage.ask(*requests)
    stage.reached(gate)
    job = stage.do(stage.batcher.shutdown)
    stage.settle()
    (late,) = stage.ask(*stage.requests(11))
    stage.settle()
    gate.open()
    stage.returned(job, "shutdown()")

    error = stage.outcome(late, "it came while shutdown() waited for a batch: refuse it with RuntimeError")
    assert error is None or isinstance(error, RuntimeError), (
        f"{late.request} during shutdown(): {error!r} came, RuntimeError was wanted"
    )


@requirement("4.9")
@pytest.mark.parametrize("kind", ["unused", "used"])
def test_the_threads_end(stage: Stage, kind: str) -> None:
    """After shutdown no thread of the batcher is alive, whatever happened before."""
    requests = stage.requests(9, 10, 20)
    stage.start()
    if kind == "used":
        stage.model.errors.append((requests[0], OSError("device lost")))
        callers = stage.ask(*requests)
        stage.settle()
        stage.cancel(callers[2])
    stage.shut_down()
    stage.end_loops()

    left = stage.left_threads()
    assert not left, f"shutdown() has returned, and {len(left)} thread of the batcher is alive: {left[0]}"


# 4.10 and 4.11


test_own_test_passes_on_right_code, test_own_test_catches = own_test_checks("4.10", OWN_TEST)
test_ruff_finds_nothing, test_mypy_finds_nothing = style_checks("4.11")
