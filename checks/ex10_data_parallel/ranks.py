"""Ranks as threads that form one strict process group below the real torch.distributed.

One rank runs at a time: a rank gives the turn away only where it waits for a call of the others, or at its end. So a
run is the same every time. A result appears in wait(), never before; ranks whose calls differ get an error at once.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import finalize

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _set_thread_isolation_mode  # type: ignore[attr-defined]
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.multi_threaded_pg import _install_threaded_pg, _uninstall_threaded_pg

from harness.testing import Hang

from .meeting import REDUCES, Call, Entry, Meeting, Unwound, nth, quiet

OFFERED = "all_reduce, broadcast, all_gather, all_gather_single, all_gather_object, broadcast_object_list, barrier"
_REFUSED = (
    *("reduce", "scatter", "gather", "reduce_scatter", "reduce_scatter_single", "alltoall", "all_to_all_single"),
    *(
        "alltoall_base",
        "send",
        "recv",
        "recv_anysource",
        "allreduce_coalesced",
        "allgather_coalesced",
        "_start_coalescing",
    ),
    *("_allgather_base", "_reduce_scatter_base", "all_gather_single_coalesced", "reduce_scatter_single_coalesced"),
)
# How long a rank may compute, or sleep, without a call: the first time, and after that; and all of them together.
_FIRST, _LATER, _ALL = 2.0, 0.4, 5.0
_here = threading.local()
_spent: list[float] = []
# Ranks whose objects are gone. They end between two runs: garbage may be collected in the middle of one.
_left: list[Meeting] = []


class Work:
    """A call that runs: its result appears in wait()."""

    def __init__(self, meeting: Meeting, rank: int, call: Call, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self._meeting, self._rank, self._call, self._inputs, self._outputs = meeting, rank, call, inputs, outputs
        self._number = meeting.start(rank, call, inputs)
        self._waited = False

    def wait(self, timeout: Any = None) -> bool:
        """Waits for the other ranks and writes the result."""
        if self._waited:
            return True
        results = self._meeting.result(self._rank, self._number)
        self._waited = True
        if self._call.kind in ("all_reduce", "broadcast"):
            self._untouched()
        with torch.no_grad(), quiet():
            for output, result in zip(self._outputs, results, strict=True):
                output.detach().copy_(result.view(output.shape))
        return True

    def _untouched(self) -> None:
        (given,) = self._meeting.slots[self._number].inputs[self._rank]
        with quiet():
            now = self._inputs[0].detach()
            same = torch.equal(given, now) or torch.equal(given.nan_to_num(7.0), now.nan_to_num(7.0))
        if not same:
            error = AssertionError(
                f"rank {self._rank}: the tensor of {nth(self._number)}, {self._call}, is written to between its start "
                "and its wait()\nit belongs to the call until wait() returns; divide before the start or after wait()"
            )
            self._meeting.fail(error)
            raise error

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(f"Work.{name}: of an asynchronous call use wait(), in which its result appears")


class Group(dist.ProcessGroup):
    """A process group in which ranks are threads."""

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._place, self._count, self._meeting = rank, size, meeting

    def _work(self, kind: str, inputs: list[Tensor], outputs: list[Tensor], how: str = "", asked: bool = False) -> Work:
        first = inputs[0] if inputs else None
        call = Call(
            self._meeting.counts[self._place],
            kind,
            0 if first is None else first.numel(),
            None if first is None else first.dtype,
            0 if first is None else first.nbytes,
            how,
            asked,
        )
        return Work(self._meeting, self._place, call, inputs, outputs)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:  # type: ignore[override]
        """Sums, averages and their like."""
        operation = opts.reduceOp if opts is not None else dist.ReduceOp.SUM
        for known, (words, _) in REDUCES.items():
            if operation == known:
                return self._work("all_reduce", tensors, tensors, words, getattr(opts, "asyncOp", False))
        raise RuntimeError(f"all_reduce by {operation} is not offered here")

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Work:  # type: ignore[override]
        """What the root has goes to all."""
        return self._work("broadcast", tensors, tensors, f"from rank {opts.rootRank}", getattr(opts, "asyncOp", False))

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:  # type: ignore[override]
        """What each has goes to all."""
        shapes = {(tensor.numel(), tensor.dtype) for tensor in (*outputs[0], *inputs)}
        if len(outputs[0]) != self._count or len(shapes) > 1:
            raise ValueError(f"all_gather: {self._count} outputs of the input's size and dtype are wanted")
        return self._work("all_gather", inputs, outputs[0], asked=getattr(opts, "asyncOp", False))

    def all_gather_single(self, output: Tensor, given: Tensor, opts: Any = None) -> Work:  # type: ignore[override]
        """The same into one tensor."""
        if output.numel() != self._count * given.numel() or output.dtype != given.dtype:
            raise ValueError(
                f"all_gather_single: an output of {self._count} · {given.numel()} {given.dtype} is wanted, "
                f"{output.numel()} {output.dtype} came"
            )
        outputs = list(output.view(-1).chunk(self._count)) if given.numel() else [given.new_empty(0)] * self._count
        return self._work("all_gather", [given], outputs, asked=getattr(opts, "asyncOp", False))

    def barrier(self, opts: Any = None) -> Work:  # type: ignore[override]
        """All come to here."""
        return self._work("barrier", [], [])

    def size(self) -> int:
        """How many ranks there are."""
        return self._count

    def getBackendName(self) -> str:
        """Its name."""
        return "strict"

    @property
    def pg_name(self) -> str:
        """torch's name of the group."""
        return str(distributed_c10d._world.pg_names[self])

    @property
    def group_name(self) -> str:  # type: ignore[override]
        """The same."""
        return self.pg_name


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(self: Group, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{name.strip('_')} is not offered here; these are: {OFFERED}")

    return refuse


for _name in _REFUSED:
    setattr(Group, _name, _refusal(_name))


def _made(store: Any, rank: int, size: int, timeout: Any) -> Group:
    meeting: Meeting = _here.meeting
    if size != meeting.size or getattr(_here, "group", None) is not None:
        raise RuntimeError("another process group is asked for; the default group is there already")
    _here.group = Group(rank, size, meeting)
    return _here.group


dist.Backend.register_backend("strict", _made, devices=["cpu"])


def note(text: str) -> None:
    """Writes into the log of the rank that runs; outside of ranks nothing happens."""
    meeting = getattr(_here, "meeting", None)
    if meeting is not None:
        meeting.logs[_here.rank].append(text)


def done() -> list[Entry]:
    """What the rank that runs has done so far."""
    return list(_here.meeting.logs[_here.rank])


def pause() -> None:
    """Lets the other ranks go on, as far as they can without this one."""
    meeting = getattr(_here, "meeting", None)
    if meeting is not None:
        meeting.pause(_here.rank)


class Ranks:
    """Threads that form one process group for as long as this object lives, and do what they are given."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._meeting = meeting = Meeting(size)
        store = dist.HashStore()
        for rank in range(size):
            thread = threading.Thread(target=_live, args=(meeting, rank, store), daemon=True)
            meeting.threads.append(thread)
            thread.start()
        self._finalize = finalize(self, _left.append, meeting)
        self._finalize.atexit = False

    @property
    def logs(self) -> list[list[Entry]]:
        """What each rank did, in its order."""
        return self._meeting.logs

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """Calls function(rank) on every rank; results in rank order; the first error of a rank is raised."""
        meeting = self._meeting
        _close_left()
        with thread_local_groups():
            meeting.begin(function)
            _watch(meeting)
        if meeting.error is not None:
            raise meeting.error
        return list(meeting.results)

    def close(self) -> None:
        """Ends the threads."""
        self._finalize()
        _close_left()


def run(size: int, function: Callable[[int], Any]) -> tuple[list[Any], list[list[Entry]]]:
    """Calls function(rank) in ranks of their own; what they return, and what they did."""
    ranks = Ranks(size)
    try:
        return ranks.run(function), ranks.logs
    finally:
        ranks.close()


@contextmanager
def thread_local_groups() -> Iterator[None]:
    """Meanwhile each thread has a default process group of its own."""
    hook = sys.excepthook
    _set_thread_isolation_mode(True)
    _install_threaded_pg()
    try:
        yield
    finally:
        _uninstall_threaded_pg()
        _set_thread_isolation_mode(False)
        sys.excepthook = hook  # init_process_group puts one of its own in front, each time.


def _live(meeting: Meeting, rank: int, store: Any) -> None:
    """A rank's thread."""
    _here.meeting, _here.rank = meeting, rank
    while True:
        meeting.take_turn(rank)
        if meeting.job is None:
            with suppress(Exception):
                dist.destroy_process_group()
            _here.__dict__.clear()
            meeting.end(rank)
            return
        try:
            if getattr(_here, "group", None) is None:
                dist.init_process_group("strict", store=store, rank=rank, world_size=meeting.size)
            meeting.results[rank] = meeting.job(rank)
        except Unwound:
            pass
        except BaseException as error:
            meeting.fail(error)
        meeting.end(rank)


def _close_left() -> None:
    while _left:
        meeting = _left.pop()
        if not meeting.idle:
            continue  # A rank may be anywhere.
        with thread_local_groups():
            meeting.begin(None)
            meeting.done.acquire(timeout=5)


def _watch(meeting: Meeting) -> None:
    """Waits for the end of a run. A rank that neither ends nor makes a call fails it; a busy machine is no fault."""
    limit = _LATER if _spent else _FIRST
    spent, seen, tick = 0.0, -1, min(0.1, limit / 4)
    while spent < limit:
        start, used = time.monotonic(), time.process_time()
        if meeting.done.acquire(timeout=tick):
            return
        # Where the whole process got no time, more than a tick has passed: for a rank that has been kept waiting, too.
        passed, progress = min(time.monotonic() - start, tick), sum(map(len, meeting.logs))
        wants = _state(meeting.threads[meeting.running]) in b"RD"
        spent = spent + (min(passed, time.process_time() - used) if wants else passed) if progress == seen else 0.0
        seen = progress
    _spent.append(limit)
    rank = meeting.running
    at = _line(meeting.threads[rank])
    last = f"after {nth(meeting.counts[rank] - 1)}" if meeting.counts[rank] else "before its first call"
    fact = f"rank {rank} neither ends nor makes a call, {last}: an endless loop, or a wait that nothing ends{at}"
    meeting.fail(AssertionError(fact))
    if sum(_spent) > _ALL or _state(meeting.threads[rank]) == b"R":
        raise Hang(fact)


def _state(thread: threading.Thread) -> bytes:
    """A thread's state in one letter, where the system tells."""
    try:
        file = os.open(f"/proc/self/task/{thread.native_id}/stat", os.O_RDONLY)
    except OSError:
        return b"S"
    try:
        return os.read(file, 200).rpartition(b") ")[2][:1] or b"S"
    except OSError:
        return b"S"
    finally:
        os.close(file)


def _line(thread: threading.Thread) -> str:
    """Where in an exercise's file a thread is."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and "ex10_" not in os.path.basename(frame.f_code.co_filename):
        frame = frame.f_back
    return f"\nit was in line {frame.f_lineno}" if frame is not None else ""
