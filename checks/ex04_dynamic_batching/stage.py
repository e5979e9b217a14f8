"""Where a check plays: callers on event loops in threads of their own, and a model that holds calls back until a gate
opens. The check itself runs in the main thread and never blocks for long.

No verdict depends on how fast the machine is. What has to come is waited for, and the time in which threads only wait
for a processor does not count. What must not come is looked for once no thread has anything left to do. Where a time
limit itself is judged, the measure is repeated with longer ones until it says something.
"""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from harness.testing import Close, Hang, Subject

from .reference import FIRST_NAME, VOCABULARY, Bare, Call, Gate, Model, Request

Why = str | Callable[[], str]  # A hint, or what finds it after a failure.
NEVER, SOON = 60.0, 0.03
THREADS = Path("/proc/self/task")
TELLS = THREADS.exists()
NOT_CALLED = "generate was not called for it"


def others_run() -> bool:
    """Whether a thread besides this one runs or wants to, where the system tells."""
    own = str(threading.get_native_id())
    return any(number != own and state(number) in b"RD" for number in (os.listdir(THREADS) if TELLS else ()))


def state(number: str) -> bytes:
    """A thread's state in one letter, S where it has ended. No file object is made: this is called a lot."""
    try:
        file = os.open(f"/proc/self/task/{number}/stat", os.O_RDONLY)
    except OSError:
        return b"S"
    try:
        return os.read(file, 200).rpartition(b") ")[2][:1] or b"S"
    except OSError:
        return b"S"
    finally:
        os.close(file)


def spent_until(event: threading.Event, limit: float) -> float:
    """Waits for an event; the seconds spent, at least `limit` if it did not come. While threads want a processor and
    get none, no time is spent.
    """
    spent, latest = 0.0, time.monotonic() + 8 * limit
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
    """How long the checks wait in vain: for each requirement about half a second, all together 2 s, whatever a batcher
    does. A right one answers within milliseconds.

    A first wait in vain costs its requirement, so that further ones of the same requirement may be short. What one
    requirement has used up is missing to no other one. `due` is what a batch may wait for by itself, and comes on top.
    """

    def __init__(self, left: float = 2.0, share: float = 0.55, first: float = 0.25, later: float = 0.04) -> None:
        self.left, self.share, self.first, self.later = left, share, first, later
        self.spent: dict[str, float] = {}
        self.stuck, self.due = False, 0.0

    @property
    def is_over(self) -> bool:
        return self.left < 0.05

    def is_over_for(self, number: str) -> bool:
        return self.spent.get(number, 0) > self.share - 0.05

    def wait(self, event: threading.Event, number: str) -> bool:
        """Whether the event comes."""
        first = self.first / 2 if self.spent else self.first
        most = min(self.left, self.share - self.spent.get(number, 0), self.later if number in self.spent else first)
        spent = spent_until(event, max(most, 0.02) + self.due)
        if not event.is_set():
            self.spend(spent - self.due, number)
        return event.is_set()

    def spend(self, seconds: float, number: str) -> None:
        """Counts a wait in vain."""
        self.left -= seconds
        self.spent[number] = self.spent.get(number, 0) + seconds

    def join(self, loop: "Loop") -> None:
        """Waits for the end of an event loop's thread, for long only if that never was in vain."""
        spent = spent_until(loop.ended, min(self.left, 0.02 if self.stuck else 0.3))
        if not loop.ended.is_set():
            self.left -= spent
            self.stuck = True


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
        await asyncio.sleep(0.01)


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
        """Begins, on the event loop's thread."""
        self._task = self.loop.loop.create_task(self._ask())

    def cancel(self) -> None:
        self.loop.loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())

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
        self.options: dict[str, Any] = {}
        self.others = set(threading.enumerate())
        self._subject, self._close, self.rng, self._patience, self._number = subject, close, rng, patience, number
        self._loops: list[Loop] = []
        self._stuck: set[Loop] = set()
        self._batchers: list[Any] = []
        self._callers: list[Caller] = []
        self._names = 0
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

    def start(self, on: Loop | None = None, *, outside: bool = False, bare: bool = False, **options: Any) -> Any:
        """A batcher with buckets of 8, built on an event loop or outside any, of a bare model if need be."""
        options = {"max_batch_size": 2, "max_wait_time": SOON, "length_tolerance": 8} | options
        kind = self._subject.DynamicBatcher
        model = Bare(self.model) if bare else self.model
        job = self.do(lambda: kind(model, **options), None if outside else on or self.home)
        self.batcher = self.returned(job, "DynamicBatcher(…)")
        self._batchers.append(self.batcher)
        self.options = options
        self._patience.due = options["max_wait_time"] if options["max_wait_time"] < NEVER else 0.0
        return self.batcher

    def forget(self) -> None:
        """What was asked for before is no longer looked at."""
        self._callers.clear()
        self._stuck.clear()
        for seen in (self.model.calls, self.model.gates, self.model.errors):
            seen.clear()

    def requests(self, *lengths: int, new: tuple[int, ...] = (2, 3, 1, 4)) -> list[Request]:
        """Requests r0, r1, … for random prompts of these lengths."""
        made = []
        for index, length in enumerate(lengths):
            tokens = torch.randint(VOCABULARY, (1, length), generator=self.rng)
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
            caller.request.asked, caller.request.state = caller.request.tokens.clone(), self.model.state

        def start() -> None:
            for caller in callers:
                caller.start()

        loop.loop.call_soon_threadsafe(start)
        return callers

    def ask_at_once(self, *requests: Request, seconds: float = 0, gone: tuple[int, ...] = ()) -> list[Caller]:
        """Callers of these, who wait for `seconds` at least before one can be served; those `gone` are cancelled."""
        gate = self.occupy()
        callers = self.ask(*requests)
        self.settle(seconds)
        for place in gone:
            callers[place].cancel()
            self.settle()
        gate.open()
        return callers

    def cancel(self, *callers: Caller) -> None:
        """Cancels callers, and waits until each has ended."""
        for caller in callers:
            caller.cancel()
        for caller in callers:
            if not self.waits(caller.finished):
                fact = f"the caller of request {caller.request.name} was cancelled and did not end"
                self._fail(fact, self.blocks(caller))

    def shut_down(self, on: Loop | None = None) -> None:
        why = f"it waits for what never comes, or for max_wait_time, {self.options['max_wait_time']} s"
        self.returned(self.do(self.batcher.shutdown, on), "shutdown()", why)

    def hold(self, *requests: Request) -> Gate:
        gate = Gate(requests)
        self.model.gates.append(gate)
        return gate

    def occupy(self) -> Gate:
        """Lets a full batch of one-token prompts run until its gate opens: what is asked for meanwhile waits."""
        plugs = self.requests(*[1] * self.options["max_batch_size"])
        gate = self.hold(*plugs)
        self.ask(*plugs)
        self.reached(gate)
        return gate

    def settle(self, seconds: float = 0) -> bool:
        """Lets all be done that can be done now: what was asked for is queued, and wrong code does what it should not.

        After further `seconds` the same once more.

        Returns:
            Whether every event loop turned.
        """
        turns = {loop: threading.Event() for loop in self._loops}
        for loop, turned in turns.items():
            with suppress(RuntimeError):
                loop.turn(turned)
        for turned in turns.values():
            spent_until(turned, 0.05)
        self.be_quiet()
        if seconds:
            time.sleep(seconds)
            self.settle()
        self._stuck |= (stuck := {loop for loop, turned in turns.items() if not turned.is_set()})
        return not stuck

    @staticmethod
    def be_quiet() -> None:
        """Waits until no thread has anything left to do."""
        quiet, latest, used = 0, time.monotonic() + 2, time.process_time()
        # Twice in a row, since a thread that waits for Python's lock seems to sleep.
        while quiet < 2 and time.monotonic() < latest and time.process_time() - used < 0.1:
            time.sleep(0.0001 if TELLS else 0.002)
            quiet = 0 if others_run() else quiet + 1

    def exercise(self, batcher: Any = None) -> None:
        """Has a full batch of one-token prompts run: whoever chooses batches has looked at all that wait."""
        callers = self.ask(*self.requests(*[1] * self.options["max_batch_size"]), batcher=batcher)
        spent = spent_until(callers[-1].finished, 0.1)
        if not callers[-1].finished.is_set():
            self._patience.spend(spent, self._number)
        self.settle()

    def end(self, loop: Loop) -> None:
        """Ends an event loop as asyncio.run does, its callers cancelled."""
        loop.stop()
        self._patience.join(loop)
        self._loops.remove(loop)
        self.model.loop_threads.discard(loop.thread.ident or 0)  # Another thread may get its number.

    # Judging

    def returned(self, job: Job, what: str, hint: Why = "") -> Any:
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

    def overslept(self, caller: Caller) -> bool:
        """Whether a caller ends only once something else happens on its event loop."""
        return not self.waits(caller.finished) and self.turns(caller.loop) and self.waits(caller.finished)

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
                    raise AssertionError(told(fact, hint)) from error

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

    def refused(self, caller: Caller, kind: type[Exception], why: Why) -> None:
        """A caller got this error, and its request was not run."""
        if not self._patience.wait(caller.finished, self._number):
            came, where = f"still waits: neither {kind.__name__} nor a result came", self.where(caller)
            more = "" if where == NOT_CALLED else f": {where}"
            self._fail(f"{caller.request} {came}, {kind.__name__} was wanted at once{more}", why)
        error = self.outcome(caller)
        if not isinstance(error, kind):
            came = "a result" if error is None else f"{type(error).__name__} ({error})"
            raise AssertionError(told(f"{caller.request}: {came} came, {kind.__name__} was wanted", why))

    def calls(self, requests: list[Request]) -> list[Call]:
        """The calls of generate that served these requests."""
        return [call for call in self.model.calls if any(call.serves(request) for request in requests)]

    def batches(self, requests: list[Request]) -> list[list[str]]:
        """The names of these requests, call by call."""
        calls = self.calls(requests)
        return [[request.name for request in requests if call.serves(request)] for call in calls]

    def _never_woken(self, caller: Caller, hint: str = "") -> None:
        self._fail(f"the caller of request {caller.request.name} was never woken: {self.where(caller)}", hint)

    def where(self, caller: Caller) -> str:
        """How far a request has come whose caller was never woken."""
        turned = threading.Event()
        caller.loop.turn(turned)
        if not turned.wait(0.05):
            self._patience.spend(0.3, self._number)  # It may never end, and keep a processor busy.
            return "its event loop is blocked"
        calls = self.calls([caller.request])
        death = f"; a thread ended with {self._deaths[0]}" if self._deaths else ""
        if not calls:
            return f"{NOT_CALLED}{death}"
        return f"its generate has returned or raised{death}" if calls[0].returned else f"its batch still runs{death}"

    def blocks(self, *callers: Caller) -> str:
        """Says so if the event loop of one of these callers did not turn when all had to settle."""
        stuck = [caller.request.name for caller in callers if caller.loop in self._stuck]
        return f"the event loop of {stuck[0]}'s caller is blocked" if stuck else ""

    def _fail(self, fact: str, hint: Why = "") -> None:
        raise (Hang if self._patience.is_over else AssertionError)(told(fact, hint))

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


def told(fact: str, why: Why) -> str:
    hint = why if isinstance(why, str) else why()
    return f"{fact}\n{hint}" if hint else fact


def mix(stage: Stage) -> list[Request]:
    """8 short and 4 long prompts, in mixed order."""
    lengths = torch.cat([25 + torch.arange(8), 90 + 2 * torch.arange(4)])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    return stage.requests(*lengths[order].tolist())
