"""One round of a walk: a batch runs behind a gate while others wait, and what must become of them all."""

import threading
import time
from collections.abc import Mapping
from typing import Any

import torch

from .reference import Request
from .rules import STILL_RUNS, Fault, OddError, Rules
from .stage import NEVER, Job, Loop


class Round(Rules):
    """One round: `running` runs, `waiting` waits."""

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
                fact = f"the caller of request {request.name} was cancelled and did not end"
                raise Fault(self.silence(), fact, self.stage.blocks(self.callers[request]))
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
        missing = sum(self.kind.size - len(batch) for batch in self.kind.batches(rest, True))
        if not self.drawn["rest"] or len(rest) + missing > self.kind.room:
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
        if self.drawn["roles"] == "one" and not self.running:
            for request in made:
                request.name, request.tokens = made[0].name, made[0].tokens
        self.repeat(made, self.drawn["roles"] == "again")
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
            elif drawn == "id":
                request.id = "same"

    def repeat(self, requests: list[Request], again: bool) -> None:
        """Puts what was asked for in earlier rounds in the place of new requests, where there is some of a bucket."""
        for request in requests:
            used = self.state.used.setdefault((self.kind, self.kind.bucket(request)), {})
            old = next((name for name in reversed(used) if name not in self.repeated), None) if again else None
            if old is not None:
                request.name, (request.tokens, request.new) = old, used[old]
            self.repeated.add(request.name)
            used[request.name] = request.tokens, request.new
