"""The walk: calls in any order, in which everything is drawn together, against attention from the formula."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.testing import Aspect, Close, Step, Subject, Walk, refuses, seed, walk_check

from .reference import CALL, HALVES, attend, call, formula

STEPS = 170

SMALL, SIDE = (2, 3, 4), (3, 2, 2)  # heads, features of a head, block_size; of a plain call, and of the one beside
WIDE = (2, 3, 64)
LONG = 64  # From here on blocks are of 64.
HALF_TOLERANCE = 5e-2


class State:
    """The modules of a walk, and the masks that calls have used."""

    def __init__(self, subject: Subject) -> None:
        self._kind = subject.FlashAttention
        self._modules: dict[tuple[int, int, int], Any] = {}
        self.masks: dict[tuple[tuple[int, ...], torch.dtype], Tensor] = {}

    def module(self, sizes: tuple[int, int, int], dtype: torch.dtype = torch.float64) -> Any:
        """The one module of some sizes, in a dtype."""
        if sizes not in self._modules:
            heads, width, block = sizes
            seed(1)
            self._modules[sizes] = self._kind(heads * width, heads, block).double()
        attention = self._modules[sizes]
        if attention.o_proj.weight.dtype != dtype:
            attention.to(dtype)
        return attention


# What happens between calls


def new_weights(attention: Any, rng: torch.Generator) -> dict[str, Tensor]:
    """Other weights for a module."""
    return {
        name: (torch.randn(p.shape, generator=rng, dtype=torch.float64) / p.size(-1) ** 0.5).to(p.dtype)
        for name, p in attention.named_parameters()
    }


def step_weights(attention: Any, x: Tensor, rng: torch.Generator, state: State) -> None:
    """What an optimizer does: the weights change in place."""
    weights = new_weights(attention, rng)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            parameter.add_(weights[name] - parameter)


def load_weights(attention: Any, x: Tensor, rng: torch.Generator, state: State) -> None:
    """load_state_dict."""
    attention.load_state_dict(new_weights(attention, rng))


def assign_weights(attention: Any, x: Tensor, rng: torch.Generator, state: State) -> None:
    """Other tensors as the parameters' data."""
    weights = new_weights(attention, rng)
    for name, parameter in attention.named_parameters():
        parameter.data = weights[name]


def replace_layer(attention: Any, x: Tensor, rng: torch.Generator, state: State) -> None:
    """Another layer in place of v_proj."""
    weight = new_weights(attention, rng)["v_proj.weight"]
    attention.v_proj = nn.Linear(*weight.shape, bias=False, device="meta")
    attention.v_proj.weight = nn.Parameter(weight)


def cast(attention: Any, x: Tensor, rng: torch.Generator, state: State, to: torch.dtype) -> None:
    """A call in another dtype, and back."""
    dtype = attention.o_proj.weight.dtype
    attention.to(to)
    q, k, v = (torch.randn(x.size(0), attention.num_heads, x.size(1), 2, generator=rng).to(to) for _ in range(3))
    with torch.no_grad():
        attention(x.detach().to(to))
        attention.flash_attention_forward(q, k, v)
    attention.to(dtype)


def call_beside(attention: Any, x: Tensor, rng: torch.Generator, state: State) -> None:
    """A call of another module, of other sizes."""
    other = state.module(SIDE)
    x = torch.randn(*x.shape[:2], 6, generator=rng, dtype=torch.float64)
    with torch.no_grad():
        other(x, causal=True)
        other.flash_attention_forward(*(x.unflatten(-1, (3, 2)).transpose(1, 2) for _ in range(3)))


def bad_mask(attention: Any, x: Tensor, rng: torch.Generator, state: State) -> None:
    """A mask is refused that fits when x is shorter."""
    (batch, n, _), heads = x.shape, attention.num_heads
    mask = torch.ones(batch, 1, 1, n)
    longer = torch.cat([x, x[:, :1]], 1).detach()
    with torch.no_grad():
        attention(x, mask)
    shapes = [", ".join(map(str, shape)) for shape in (mask.shape, (batch, heads, n + 1, n + 1))]
    what = f"forward(x of shape {tuple(longer.shape)}) with a mask of shape {tuple(mask.shape)}"
    if n > 1:
        refuses(ValueError, partial(attention, longer, mask), what, *shapes)


def call_in(attention: Any, x: Tensor, rng: torch.Generator, state: State, mode: Callable[[], Any]) -> None:
    """A call of the same shape under no_grad or inference_mode."""
    q, k, v = (torch.randn(x.size(0), attention.num_heads, x.size(1), 3, generator=rng, dtype=x.dtype) for _ in "qkv")
    with mode():
        attention(x.detach() * 2, causal=True)
        attention.flash_attention_forward(q, k, v, causal=True)


def set_training(attention: Any, x: Tensor, rng: torch.Generator, state: State, to: bool) -> None:
    """train or eval."""
    attention.train(to)


# What is drawn. A mask's shape is that of [B, H, N, M] with 1 where these words have a 1.

OFFSETS: dict[str, Callable[[int, int], Tensor] | None] = {
    "": None,
    "scores far below 0": lambda b, m: torch.full((b, m), -1.0),
    "scores far above 0": lambda b, m: torch.full((b, m), 1.0),
    "scores that rise from key to key": lambda b, m: torch.linspace(-1, 1, m).expand(b, m),
    "scores that fall from key to key": lambda b, m: torch.linspace(1, -1, m).expand(b, m),
    "a low first block of scores": lambda b, m: torch.where(torch.arange(m) < 4, -1.1, 0.0).expand(b, m),
    "batch rows of very different scores": lambda b, m: torch.linspace(-1, 1, b)[:, None].expand(b, m),
}
HIDDEN = (
    "",
    "rows that may attend to nothing",
    "a hidden first block in some rows",
    "a hidden middle block in some rows",
    "a hidden last block in some rows",
    "a hidden first block",
    "a hidden last block",
    "a mask that allows nothing",
    "the first causal queries before the first key",
)
LENGTHS = ((8, 8), (1, 1), (1, 8), (8, 1), (1, 9), (9, 4), (2, 3), (3, 2), (4, 8), (8, 9), (9, 8), (6, 11), (11, 6))
LENGTHS_LONG = {"N = 2, M = 258, block_size = 64": (2, 258), "N = 258, M = 3, block_size = 64": (258, 3)}
MASKS = ("BHNM", "111M", "B11M", "1H1M", "11NM", "B1NM", "B1N1", "BH11", "1111")
DTYPES = [torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64]


class Calls(Walk):
    """Calls of flash_attention_forward and forward."""

    aspects = (
        Aspect("exact", "3.7", {"": False, "to nine digits": True}),
        Aspect("numbers", "3.2", OFFSETS, rate=0.2),
        Aspect("hidden", "3.2", {words: words for words in HIDDEN}, rate=0.3),
        Aspect("half", "3.7", {"": None, "bfloat16": HALVES[0], "float16": HALVES[1]}, rate=0.15),
        Aspect(
            "backward",
            "3.6",
            {"": (1, ""), "backward twice": (2, ""), "a transposed dO": (1, "NHD"), "an expanded dO": (1, "1")},
            rate=0.3,
        ),
        Aspect(
            "gradients",
            "3.6",
            {
                "": "",
                "gradients": "QKV",
                "a gradient of Q alone": "Q",
                "gradients of K alone": "K",
                "gradients of V alone": "V",
            },
            rate=0.6,
        ),
        Aspect(
            "lengths",
            "3.3",
            {"" if (n, m) == (8, 8) else f"N = {n}, M = {m}": (n, m) for n, m in LENGTHS} | LENGTHS_LONG,
            rate=0.6,
        ),
        Aspect(
            "sizes",
            "3.3",
            {
                "": SMALL,
                "block_size = 1, N and M at most 3": (2, 3, 1),
                "block_size = 3": (2, 3, 3),
                "block_size = 64": WIDE,
                "one head": (1, 4, 4),
                "heads of one feature": (2, 1, 4),
            },
            rate=0.3,
        ),
        Aspect(
            "between",
            "3.4",
            {
                "": None,
                "after an optimizer's step": step_weights,
                "after load_state_dict": load_weights,
                "after new .data": assign_weights,
                "after a new v_proj": replace_layer,
                "after a call in float32": partial(cast, to=torch.float32),
                "after a call in bfloat16": partial(cast, to=torch.bfloat16),
                "after a call of another module": call_beside,
                "after a mask that does not fit": bad_mask,
                "after a call under no_grad": partial(call_in, mode=torch.no_grad),
                "after a call under inference_mode": partial(call_in, mode=torch.inference_mode),
                "after eval()": partial(set_training, to=False),
                "after train()": partial(set_training, to=True),
            },
            rate=0.35,
        ),
        Aspect("way", "3.4", {"": CALL, "through forward": "forward"}, rate=0.35),
        Aspect(
            "again",
            "3.4",
            {"": "", "the mask of an earlier call, edited in place": "edited", "the mask of an earlier call": "same"},
        ),
        Aspect("mask dtype", "3.4", {"": torch.bool, **{f"a mask of {dtype}": dtype for dtype in DTYPES}}, rate=0.6),
        Aspect(
            "layout of the mask", "3.4", {"": "", "a transposed mask": "mT", "an expanded mask": "expand"}, rate=0.4
        ),
        Aspect(
            "mask", "3.4", {"": "", **{f"a mask [{', '.join(shape)}]": shape for shape in MASKS}}, rate=0.6
        ),
        Aspect("causal", "3.4", {"": False, "causal": True}),
        Aspect("dtype", "3.4", {"": torch.float64, "float32": torch.float32}, rate=0.3),
        Aspect(
            "roles", "3.4", {"": "", "K and V one tensor": "kv", "Q, K and V one tensor": "qkv"}, rate=0.2
        ),
        Aspect(
            "layout",
            "3.4",
            {
                "": "",
                "inputs that are transposed views": "transposed",
                "inputs that are expanded views": "expanded",
                "inputs that overlap in memory": "overlapping",
                "inputs whose features are not contiguous": "features",
            },
        ),
        Aspect("batch", "3.4", {"": 2, "one batch row": 1, "three batch rows": 3}, rate=0.3),
        Aspect(
            "mode",
            "3.4",
            {"": nullcontext, "under no_grad": torch.no_grad, "under inference_mode": torch.inference_mode},
            rate=0.6,
        ),
    )
    otherwise = "3.4"

    def begin(self, subject: Subject) -> State:
        """The modules are made when they are first called."""
        return State(subject)

    def step(self, state: State, step: Step) -> None:
        """One call, and its gradients."""
        drawn = Drawn(state, step)
        if step["between"] is not None:
            step["between"](drawn.attention, drawn.x(), drawn.rng, state)
        drawn.judge()


class Drawn:
    """One call as it was drawn."""

    def __init__(self, state: State, step: Step) -> None:
        self.step, self.rng = step, step.rng()
        self.dtype = step["half"] or step["dtype"]
        self.whole = step["way"] == "forward"  # through the whole module
        sizes, (n, m) = step["sizes"], step["lengths"]
        if max(n, m) > LONG:
            sizes = WIDE
        if sizes[2] == 1:
            n, m = min(n, 3), min(m, 3)
        self.batch, (self.heads, self.width, self.block) = step["batch"], sizes
        if self.whole and max(n, m) > LONG:
            n = min(n, m)
        self.early = step["hidden"] == HIDDEN[-1]  # causal queries before the first key
        self.causal = step["causal"] or self.early
        self.n, self.m = (n, n) if self.whole else (max(n, m), min(n, m)) if self.early else (n, m)
        self.attention = state.module(sizes, self.dtype)
        self.mask = self._mask(state)

    def x(self) -> Tensor:
        """An x of this call's shape."""
        shape = self.batch, self.n, self.heads * self.width
        return torch.randn(shape, generator=self.rng, dtype=torch.float64).to(self.dtype)

    def judge(self) -> None:
        """Calls and compares."""
        given = self._given()
        kinds = self.step["gradients"] if self.dtype not in HALVES or not (self.whole or self.offset) else ""
        if self.whole:
            kinds = "Q" if kinds else ""
        leaves = {}
        for name, tensor in zip("QKV", given, strict=False):
            if name in kinds:
                leaves["x" if self.whole else name] = tensor.requires_grad_()
        if self.whole and kinds:
            leaves |= dict(self.attention.named_parameters())
        watched = [*given] if self.mask is None else [*given, self.mask]
        before = [(tensor._version, tensor.detach().clone()) for tensor in watched]

        with torch.set_grad_enabled(bool(leaves)):
            expected, logsumexp = self._expected(given)
        if leaves:
            output, logs = self._call(given)
        else:
            with self.step["mode"]():
                output, logs = self._call(given)

        if not self._compared(output, logs, expected, logsumexp):
            return
        if leaves:
            assert output.requires_grad, f"{self.name}: {', '.join(leaves)} require gradients, the output does not"
            self._gradients(output, expected, leaves)
        for name, tensor, (version, values) in zip(self._names(), watched, before, strict=True):
            assert tensor._version == version and torch.equal(tensor, values), f"{self.name}: writes to {name}"

    @property
    def name(self) -> str:
        """What is called."""
        return "forward" if self.whole else CALL

    def _names(self) -> list[str]:
        return ["x", "mask"][: 1 + (self.mask is not None)] if self.whole else ["Q", "K", "V", "mask"][
            : 3 + (self.mask is not None)
        ]

    # What comes in

    @property
    def offset(self) -> bool:
        """Whether the scores are far from 0."""
        return self.step["numbers"] is not None

    def _given(self) -> list[Tensor]:
        """x, or Q, K and V."""
        if self.whole:
            x = self._laid(self.n, 0) * (20 if self.offset and self.dtype == torch.float64 else 1)
            return [x.to(self.dtype)]
        q, k, v = (self._laid(length, place) for place, length in enumerate((self.n, self.m, self.m)))
        roles = self.step["roles"]
        if self.offset:
            far = 1000.0 if self.dtype == torch.float64 else 100.0
            q, k = q.clone(), k.clone()
            q[..., 0] = self.width**0.5
            k[..., 0] += far * self.step["numbers"](self.batch, self.m)[:, None].double()
        elif roles == "kv" or (roles and self.n != self.m):
            v = k
        elif roles:
            k = v = q
        converted = {id(tensor): tensor.to(self.dtype) for tensor in (q, k, v)}
        return [converted[id(tensor)] for tensor in (q, k, v)]

    def _laid(self, length: int, place: int) -> Tensor:
        """Random numbers as [B, H, length, Dh], or [B, length, D], in the layout that was drawn."""
        layout = self.step["layout"]
        if self.whole:
            b, d = self.batch, self.heads * self.width
            if layout == "transposed":
                return self._randn(length, b, d).transpose(0, 1)
            if layout == "expanded":
                return self._randn(1, length, d).expand(b, length, d)
            if layout == "overlapping":
                return self._randn(b, length + d - 1).unfold(1, d, 1)
            return self._randn(b, d, length).mT if layout == "features" else self._randn(b, length, d)
        b, h, d = self.batch, self.heads, self.width
        if layout == "transposed":
            return self._randn(b, length, h, d).transpose(1, 2)
        if layout == "expanded":
            one = [(1, 1), (1, h), (b, 1)][place]
            return self._randn(*one, length, d).expand(b, h, length, d)
        if layout == "overlapping":
            return self._randn(b, h, length + d - 1).unfold(2, d, 1)
        return self._randn(b, h, d, length).mT if layout == "features" else self._randn(b, h, length, d)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.rng, dtype=torch.float64)

    def _mask(self, state: State) -> Tensor | None:
        """A mask that leaves each row something to see in each block, but for what is hidden on purpose."""
        if not self.step["mask"]:
            return None
        full = dict(B=self.batch, H=self.heads, N=self.n, M=self.m)
        shape = tuple(full.get(letter, 1) for letter in self.step["mask"])
        allowed = torch.rand(shape, generator=self.rng) > (0.4 if self.step.seed % 4 else -1)
        allowed[..., :: min(self.block, 4)] = True
        self._hide_(allowed)
        allowed = allowed.to(self.step["mask dtype"])
        layout, again = self.step["layout of the mask"], self.step["again"]
        if layout == "mT":
            allowed = allowed.mT.contiguous().mT
        elif layout == "expand":
            allowed = allowed[:, :1].expand(self.batch, self.heads, -1, -1)
        key = tuple(allowed.shape), allowed.dtype
        kept = state.masks.get(key)
        if again and kept is not None and 0 not in kept.stride():
            return kept.copy_(allowed) if again == "edited" else self._safe(kept)
        state.masks[key] = allowed
        return allowed

    def _safe(self, kept: Tensor) -> Tensor:
        """The mask of an earlier call, unless it hides what this one was not to hide."""
        if self.step["hidden"] or self.causal:
            return kept
        seen = kept != 0
        return kept if bool(seen[..., :: min(self.block, 4)].all()) else kept.fill_(1)

    def _hide_(self, allowed: Tensor) -> None:
        words, block = self.step["hidden"], min(self.block, 4)
        if words == HIDDEN[1]:
            allowed[0, 0, -1] = False
            allowed[-1, -1, 0] = False
        elif words == HIDDEN[7]:
            allowed.fill_(False)
        elif words and not self.early and allowed.size(3) > 1:
            last = (self.m - 1) // block * block
            start = 0 if "first" in words else last if "last" in words else min(block, last)
            some = allowed[..., ::2, :] if "some" in words else allowed
            some[..., start : start + block] = False

    # What comes out

    def _call(self, given: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        if self.whole:
            return call(self.attention, given[0], self.mask, self.causal), None
        return attend(self.attention, given, self.mask, self.causal)

    def _expected(self, given: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Output and logsumexp, in float64, from the formula and the module's weights of now."""
        if not self.whole:
            return formula(given, self.mask, self.causal)
        attention, x = self.attention, given[0].double()
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        heads = [(x @ one.weight.double().T).unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in layers]
        output, logsumexp = formula(heads, self.mask, self.causal)
        joined = output.transpose(1, 2).flatten(2)
        return torch.addmm(
            attention.o_proj.bias.double(), joined.flatten(0, 1), attention.o_proj.weight.double().T
        ).view_as(joined), logsumexp

    def _compared(self, output: Tensor, logs: Tensor | None, expected: Tensor, logsumexp: Tensor) -> bool:
        """Compares what was computed forward; whether to go on with the gradients."""
        wanted = expected.detach().to(self.dtype)
        if self.causal and self.n > self.m:
            # Queries before the first key are looked at where they are the point, and others are right.
            shapes = [(self.name + ": output", output, wanted.shape)]
            shapes += [(self.name + ": logsumexp", logs, logsumexp.shape)] if logs is not None else []
            for what, came, shape in shapes:
                assert came.shape == shape, f"{what}: shape {tuple(came.shape)} came, {tuple(shape)} was wanted"
            right = torch.isclose(output[:, :, -self.m :].detach(), wanted[:, :, -self.m :], 0.1, 0.1).all()
            if self.early and not right:
                return False
            if not self.early:
                output, wanted = output[:, :, -self.m :], wanted[:, :, -self.m :]
                assert logs is not None, "only flash_attention_forward has more queries than keys"
                logs, logsumexp = logs[:, :, -self.m :], logsumexp[:, :, -self.m :]
        close = Close(self._tolerance())
        close(output, wanted, f"{self.name}: output")
        if logs is not None:
            assert logs.dtype in (torch.float32, torch.float64), (
                f"{self.name}: logsumexp has {logs.dtype}, float32 or better was wanted"
            )
            close(logs.double(), logsumexp.detach(), f"{self.name}: logsumexp", tolerance=self._tolerance(True))
        return self.early or not (self.causal and self.n > self.m)

    def _tolerance(self, logsumexp: bool = False) -> float:
        if self.dtype in HALVES:
            return 1e-4 if logsumexp else HALF_TOLERANCE
        if self.offset:
            return 1e-7 if self._exact else 1e-2
        return 1e-9 if self._exact else 1e-4 if self.dtype == torch.float32 else 1e-5

    @property
    def _exact(self) -> bool:
        return bool(self.step["exact"]) and self.dtype == torch.float64

    def _gradients(self, output: Tensor, expected: Tensor, leaves: dict[str, Tensor]) -> None:
        times, layout = self.step["backward"]
        probe = self._randn(*output.shape).to(self.dtype)
        if layout == "NHD":
            probe = probe.transpose(-2, 1).contiguous().transpose(-2, 1)
        elif layout:
            probe = probe[(slice(1),) * probe.dim()].expand_as(probe)
        version = probe._version
        wanted = torch.autograd.grad(expected, list(leaves.values()), probe.double())
        tolerance = max(self._tolerance(), 1e-3 if self.dtype == torch.float32 else 0.0)
        if self.offset:  # dS is multiplied by keys of 1000.
            tolerance = 1e-6 if self._exact else 0.5
        close = Close(tolerance)
        for time in range(times):
            came = torch.autograd.grad(
                output, list(leaves.values()), probe, retain_graph=time + 1 < times, allow_unused=True
            )
            self._same(close, came, wanted, list(leaves), "second backward" if time else "backward")
        assert probe._version == version, "backward: writes to the gradient of the output"

    @staticmethod
    def _same(
        close: Close, came: tuple[Tensor | None, ...], wanted: tuple[Tensor, ...], names: list[str], when: str
    ) -> None:
        """All gradients at once; one by one to say which is wrong."""
        if all(type(x) is Tensor and x.shape == y.shape and x.dtype == y.dtype for x, y in zip(came, wanted, strict=True)):
            both = [torch.cat([x.flatten() for x in some if x is not None]) for some in (came, wanted)]
            if torch.isclose(*both, rtol=close.tolerance, atol=close.tolerance).all():
                return
        for name, x, y in zip(names, came, wanted, strict=True):
            close(x, y, f"{when}: gradient of {name}")


test_calls_in_any_order = walk_check(Calls(), STEPS)
