"""What a request gets alone, and a model that records its calls and holds them back."""

import threading
import time
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

VOCABULARY, FIRST_NAME = 499, 500
# A call chooses no more tokens than these; zeros follow.
MOST_CHOSEN = 64
# Tokens from here on name no request. Squares are of what is left of a token here, lest int64 overflow.
LARGE, MODULUS = 1 << 22, 9973
MASKS = torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64


@dataclass(eq=False)
class Request:
    """What a caller asks for. The last token of its prompt is its own, and names it wherever it turns up."""

    name: str
    tokens: Tensor  # int64 [1, L]
    new: int
    id: str
    asked: Tensor = field(default_factory=lambda: torch.zeros(1, 0))
    state: int = 0  # of the model when it was asked for

    @property
    def mark(self) -> int:
        return FIRST_NAME + int(self.name[1:])

    @property
    def expected(self) -> Tensor:
        """What it gets alone, from Python's integers and from the prompt as it was when it was asked for."""
        row = self.asked[0].tolist()
        for _ in range(self.new):
            total = sum(((token % MODULUS) ** 2 + 3) * place for place, token in enumerate(row, start=1))
            row.append((total + 31 * row[-1] + self.state) % VOCABULARY)
        return torch.tensor([row])

    def __str__(self) -> str:
        return f"add_request({self.id!r}, a prompt of shape {tuple(self.tokens.shape)}, {self.new})"


class CodedError(Exception):
    """An error that makes its text itself: whoever makes it again, from its arguments or its text, gets another one."""

    def __init__(self, code: object) -> None:
        super().__init__(f"code {code}")


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
    sampled: bool | None
    pad: object
    came: float = field(default_factory=time.monotonic)
    returned: bool = False

    @cached_property
    def marks(self) -> list[int]:
        """Which requests it serves, row by row; 0 for a row that serves none."""
        if self.ids.size(1) == 0:
            return [0] * len(self.ids)
        found: list[int] = (self.ids * ((self.ids >= FIRST_NAME) & (self.ids < LARGE))).amax(1).tolist()
        return found

    @property
    def flaw(self) -> str:
        """What generate got that no model need take, though this one does; nothing where that is judged elsewhere."""
        if self.pad is None or self.pad != 0:
            return f"generate got pad_token_id {self.pad}, 0 was wanted\npass it: not every model has a default"
        if self.sampled is None or self.sampled:
            return f"generate got do_sample {self.sampled}, False was wanted\npass it: results differ from call to call"
        if self.mask is None or self.mask.shape != self.ids.shape:
            return ""
        if self.mask.dtype not in MASKS or not self.mask.equal(self.mask.bool().to(self.mask.dtype)):
            values = sorted(set(self.mask.flatten().tolist()))
            return (
                f"attention_mask holds {values} in {self.mask.dtype}, boolean or 0/1 as the Conventions say was wanted"
            )
        pads = self.ids.masked_fill(self.mask.bool(), 0)
        if pads.any():
            held = pads[pads != 0].tolist()
            return f"pads hold {held[:5]}, token 0 was wanted\nthey may be left over from an earlier batch"
        return ""

    def serves(self, request: Request) -> bool:
        return request.mark in self.marks


class Model(nn.Module):
    """Chooses each token by all the tokens that are read, by their positions, and by the last column."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.state = 0
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
        do_sample: bool | None = None,
        pad_token_id: int | None = None,
    ) -> Tensor:
        mask = None if attention_mask is None else attention_mask.clone()
        call = Call(input_ids.clone(), mask, int(max_new_tokens), do_sample, pad_token_id)
        with self._lock:
            self.calls.append(call)
            self.active += 1
            self.most_active = max(self.most_active, self.active)
        try:
            self._pass_gates(call)
            for request, error in self.errors:
                if call.serves(request):
                    raise error
            return self._continued(input_ids, mask, call.new, bool(call.sampled))
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
        total = (((ids % MODULUS) ** 2 + 3) * position).sum(1)
        last = torch.where(visible[:, -1] == 1, ids[:, -1], ids[:, -1] + 5)
        place, columns = visible.sum(1), [ids]
        for _ in range(min(new, MOST_CHOSEN)):
            last = (total + 31 * last + self.state + 7 * sampled) % VOCABULARY
            place = place + 1
            total = total + (last * last + 3) * place
            columns.append(last[:, None])
        columns.append(ids.new_zeros(len(ids), max(new - MOST_CHOSEN, 0)))
        return torch.cat(columns, dim=1)


class Bare:
    """A model that has nothing but `generate`."""

    __slots__ = ("generate",)

    def __init__(self, model: Model) -> None:
        self.generate = model.generate


def names(requests: tuple[Request, ...] | list[Request]) -> str:
    return " and ".join(request.name for request in requests)
