"""The walk: calls in any order, in which everything is drawn together, against attention from the formula."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.testing import Aspect, Close, Step, Subject, Walk, refuses, seed, walk_check

from .reference import CALL, HALVES, WEIGHTS, attend, call, reference

STEPS = 40

SIDE = (3, 2, 4)  # heads, features of a head and block_size of a module beside
LONG = 64  # From here on blocks are of 64.
HALF_TOLERANCE = 5e-2


class State:
    """The modules of a walk, each made when it is first called."""

    def __init__(self, subject: Subject) -> None:
        self._kind = subject.FlashAttention
        self._modules: dict[tuple[int, int, int], Any] = {}

    def module(self, sizes: tuple[int, int, int], new: bool = False) -> Any:
        """The module of some heads, features of a head and block_size that all calls share, or a new one."""
        if not new and sizes in self._modules:
            return self._modules[sizes]
        heads, width, block = sizes
        seed(1)
        attention = self._kind(heads * width, heads, block).double()
        with torch.no_grad():
            for parameter in attention.parameters():
                parameter.copy_(plain(parameter))
        return attention if new else self._modules.setdefault(sizes, attention)


def plain(numbers: Tensor) -> Tensor:
    """Numbers that no cast to another dtype changes."""
    return (numbers.detach() * 32).round().clamp(-127, 127) / 32


def cast(attention: Any, dtype: torch.dtype) -> None:
    """Casts a module, if it is of another dtype."""
    if attention.o_proj.weight.dtype != dtype:
        attention.to(dtype)


# What happens between calls


def new_weights(drawn: "Drawn", how: str) -> None:
    """A call of a module of its own, then other weights."""
    drawn.renew()
    with drawn.step["mode"]():
        drawn.call(drawn.given())
    attention = drawn.attention
    weights = {
        name: plain(drawn.randn(*parameter.shape) / parameter.size(-1) ** 0.5).to(parameter.dtype)
        for name, parameter in attention.named_parameters()
    }
    if how == "step":
        with torch.no_grad():
            for name, parameter in attention.named_parameters():
                parameter.add_(weights[name] - parameter)
    elif how == "load":
        attention.load_state_dict(weights)
    elif how == "data":
        for name, parameter in attention.named_parameters():
            parameter.data = weights[name]
    elif how == "edit":
        for name, parameter in attention.named_parameters():
            parameter.data.copy_(weights[name])
    else:
        name = "o_proj" if drawn.step.seed % 2 else "v_proj"
        width = weights[f"{name}.weight"].size(0)
        layer = nn.Linear(width, width, bias=name == "o_proj", device="meta")
        for kind, _ in list(layer.named_parameters()):
            setattr(layer, kind, nn.Parameter(weights[f"{name}.{kind}"]))
        setattr(attention, name, layer)


def first_call(drawn: "Drawn", mode: Callable[[], Any] = torch.no_grad, dtype: torch.dtype | None = None) -> None:
    """The first call of a new module is under no_grad or inference_mode, or in another dtype."""
    drawn.renew()
    if dtype is not None and drawn.whole:
        cast(drawn.attention, dtype)
    with mode():
        drawn.call([x if dtype is None else x.to(dtype) for x in drawn.given()])
    if drawn.whole:
        cast(drawn.attention, drawn.dtype)


def call_beside(drawn: "Drawn") -> None:
    """A call of another module, of other sizes."""
    other, n = drawn.state.module((3, 2, 4)), min(drawn.n, 9)
    with torch.no_grad():
        if drawn.whole:
            other(drawn.randn(drawn.batch, n, 6), causal=True)
        else:
            other.flash_attention_forward(*(drawn.randn(drawn.batch, 3, n, 2) for _ in range(3)), causal=True)


def bad_mask(drawn: "Drawn") -> None:
    """A mask is refused that fits when x is shorter."""
    batch, n, attention = drawn.batch, drawn.n, drawn.attention
    mask = torch.ones(batch, 1, 1, n)
    x = drawn.randn(batch, n + 1, drawn.heads * drawn.width).to(attention.o_proj.weight.dtype)
    with torch.no_grad():
        attention(x[:, :n], mask)
    shapes = [", ".join(map(str, shape)) for shape in (mask.shape, (batch, drawn.heads, n + 1, n + 1))]
    what = f"forward(x of shape {tuple(x.shape)}) with a mask of shape {tuple(mask.shape)}"
    if n > 1:
        refuses(ValueError, partial(attention, x, mask), what, *shapes)


def edit_mask(drawn: "Drawn") -> None:
    """A call with the same mask, which then changes in place, and no version tells of it."""
    if drawn.mask is not None and 0 not in drawn.mask.stride():
        kept = drawn.mask.clone()
        drawn.mask.fill_(1)
        with torch.no_grad():
            drawn.call(drawn.given())
        drawn.mask.data.copy_(kept)


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
QUERIES = (8, 1, 1, 8, 1, 9, 2, 3, 6, 4, 3, 9, 3, 7)
KEYS = (8, 1, 8, 1, 9, 4, 3, 2, 7, 8, 9, 3, 11, 5)
LENGTHS_LONG = {"N = 2, M = 256, block_size = 64": (2, 256), "N = 258, M = 3, block_size = 64": (258, 3)}
MASKS = ("BHNM", "111M", "B11M", "1H1M", "11NM", "B1NM", "B1N1", "BH11", "1111")
DTYPES = [torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64]


class Calls(Walk):
    """Calls of flash_attention_forward and forward."""

    aspects = (
        Aspect("exact", "3.7", {"": False, "to nine digits": True}),
        Aspect(
            "between",
            "3.4",
            {
                "": None,
                "after a call and an optimizer's step": partial(new_weights, how="step"),
                "after a call and load_state_dict": partial(new_weights, how="load"),
                "after a call and new .data": partial(new_weights, how="data"),
                "after a call and edited .data": partial(new_weights, how="edit"),
                "after a call and a new v_proj or o_proj": partial(new_weights, how="layer"),
                "after a first call in float32": partial(first_call, dtype=torch.float32),
                "after a first call in bfloat16": partial(first_call, dtype=torch.bfloat16),
                "after a first call under no_grad": partial(first_call, mode=torch.no_grad),
                "after a first call under inference_mode": partial(first_call, mode=torch.inference_mode),
                "after a call of another module": call_beside,
                "after a mask that does not fit": bad_mask,
                "after a call with the same mask, edited since": edit_mask,
            },
            rate=0.4,
        ),
        Aspect("numbers", "3.2", OFFSETS, rate=0.3),
        Aspect("hidden", "3.2", {words: words for words in HIDDEN}, rate=0.3),
        Aspect("half", "3.7", {"": None, "bfloat16": HALVES[0], "float16": HALVES[1]}, rate=0.15),
        Aspect(
            "backward",
            "3.6",
            {
                "": (1, ""),
                "backward twice": (2, ""),
                "a transposed dO": (1, "NHD"),
                "an expanded dO": (1, "1"),
                "another call before backward": (1, "call"),
            },
            rate=0.3,
        ),
        Aspect(
            "gradients",
            "3.6",
            {"": "", "gradients": "QKV", **{f"a gradient of {name} alone": name for name in "QKV"}},
            rate=0.42,
        ),
        Aspect(
            "lengths",
            "3.3",
            {"" if (n, m) == (8, 8) else f"N = {n}, M = {m}": (n, m) for n, m in zip(QUERIES, KEYS, strict=True)}
            | LENGTHS_LONG,
            rate=0.75,
        ),
        Aspect(
            "block",
            "3.3",
            {"": 4, "block_size = 1, N and M at most 3": 1, "block_size = 3": 3, "block_size = 64": LONG},
            rate=0.25,
        ),
        Aspect("training", "3.4", {"": True, "in eval": False}, rate=0.3),
        Aspect("way", "3.4", {"": CALL, "through forward": "forward"}, rate=0.4),
        Aspect("heads", "3.4", {"": (2, 3), "one head": (1, 4), "heads of one feature": (2, 1)}, rate=0.25),
        Aspect("mask dtype", "3.4", {"": torch.bool, **{f"a mask of {dtype}": dtype for dtype in DTYPES}}, rate=0.6),
        Aspect(
            "layout of the mask", "3.4", {"": "", "a transposed mask": "mT", "an expanded mask": "expand"}, rate=0.4
        ),
        Aspect("mask", "3.4", {"": "", **{f"a mask [{', '.join(shape)}]": shape for shape in MASKS}}, rate=0.6),
        Aspect("causal", "3.4", {"": False, "causal": True}),
        Aspect("dtype", "3.4", {"": torch.float64, "float32": torch.float32}, rate=0.3),
        Aspect("roles", "3.4", {"": "", "K and V one tensor": "kv", "Q, K and V one tensor": "qkv"}, rate=0.2),
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
        """No call yet."""
        return State(subject)

    def step(self, state: State, step: Step) -> None:
        """One call, and its gradients."""
        drawn = Drawn(state, step)
        if step["between"] is not None:
            step["between"](drawn)
        drawn.judge()


class Drawn:
    """One call as it was drawn."""

    def __init__(self, state: State, step: Step) -> None:
        self.state, self.step, self.rng = state, step, step.rng()
        self.dtype = step["half"] or step["dtype"]
        self.whole = step["way"] == "forward"  # through the whole module
        (self.heads, self.width), self.block, (n, m) = step["heads"], step["block"], step["lengths"]
        if max(n, m) > LONG:
            self.block = LONG
            n = min(n, m) if self.whole else n
        if self.block == 1:
            n, m = min(n, 3), min(m, 3)
        self.batch = step["batch"]
        self.early = step["hidden"] == HIDDEN[-1]  # causal queries before the first key
        self.causal = step["causal"] or self.early
        self.n, self.m = (n, n) if self.whole else (max(n, m), min(n, m)) if self.early else (n, m)
        self.renew(new=False)
        self.mask = self._mask()

    def renew(self, new: bool = True) -> None:
        """The module to call, or a new one for this step alone."""
        self.attention = self.state.module((self.heads, self.width, self.block), new)
        if self.attention.training != self.step["training"]:
            self.attention.train(self.step["training"])
        if self.whole:
            cast(self.attention, self.dtype)

    def judge(self) -> None:
        """Calls and compares."""
        given = self.given()
        kinds = self.step["gradients"] if self.dtype not in HALVES or not (self.whole or self.offset) else ""
        if self.whole:
            kinds = "Q" if kinds else ""
        leaves = {}
        for name, tensor in zip("QKV", given, strict=False):
            if name in kinds:
                leaves["x" if self.whole else name] = tensor.requires_grad_()
        if self.whole and kinds:
            parameters = dict(self.attention.named_parameters())
            leaves |= {name: parameters[name] for name in WEIGHTS}
        watched = [*given] if self.mask is None else [*given, self.mask]
        before = [(tensor._version, tensor.detach().clone() if self.step.seed % 2 else tensor) for tensor in watched]

        with torch.set_grad_enabled(bool(leaves)):
            expected, logsumexp = self._expected(given)
        if leaves:
            output, logs = self.call(given)
        else:
            with self.step["mode"]():
                output, logs = self.call(given)

        if not self._compared(output, logs, expected, logsumexp):
            return
        if leaves:
            assert output.requires_grad, f"{self.name}: {', '.join(leaves)} require gradients, the output does not"
            self._gradients(output, expected, leaves)
        names = [*(["x"] if self.whole else "QKV"), "mask"]
        for name, tensor, (version, values) in zip(names, watched, before, strict=False):
            assert tensor._version == version and torch.equal(tensor, values), f"{self.name}: writes to {name}"

    @property
    def name(self) -> str:
        """What is called."""
        return "forward" if self.whole else CALL

    # What comes in

    @property
    def offset(self) -> bool:
        """Whether the scores are far from 0."""
        return self.step["numbers"] is not None

    def given(self) -> list[Tensor]:
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
                return self.randn(length, b, d).transpose(0, 1)
            if layout == "expanded":
                return self.randn(1, length, d).expand(b, length, d)
            if layout == "overlapping":
                return self.randn(b, length + d - 1).unfold(1, d, 1)
            return self.randn(b, d, length).mT if layout == "features" else self.randn(b, length, d)
        b, h, d = self.batch, self.heads, self.width
        if layout == "transposed":
            return self.randn(b, length, h, d).transpose(1, 2)
        if layout == "expanded":
            one = [(1, 1), (1, h), (b, 1)][place]
            return self.randn(*one, length, d).expand(b, h, length, d)
        if layout == "overlapping":
            return self.randn(b, h, length + d - 1).unfold(2, d, 1)
        return self.randn(b, h, d, length).mT if layout == "features" else self.randn(b, h, length, d)

    def randn(self, *shape: int) -> Tensor:
        """Random float64 numbers."""
        return torch.randn(shape, generator=self.rng, dtype=torch.float64)

    def _mask(self) -> Tensor | None:
        """A mask that leaves each row something to see in each block, but for what is hidden on purpose."""
        if not self.step["mask"]:
            return None
        full = dict(B=self.batch, H=self.heads, N=self.n, M=self.m)
        shape = tuple(full.get(letter, 1) for letter in self.step["mask"])
        allowed = torch.rand(shape, generator=self.rng) > (0.4 if self.step.seed % 4 else -1)
        allowed[..., :: min(self.block, 4)] = True
        self._hide_(allowed)
        allowed = allowed.to(self.step["mask dtype"])
        if self.step["layout of the mask"] == "mT":
            return allowed.mT.contiguous().mT
        if self.step["layout of the mask"] == "expand":
            return allowed[:, :1].expand(self.batch, self.heads, -1, -1)
        return allowed

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

    def call(self, given: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The call: output and, but for forward, logsumexp."""
        if self.whole:
            return call(self.attention, given[0], self.mask, self.causal), None
        return attend(self.attention, given, self.mask, self.causal)

    def _expected(self, given: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Output and logsumexp, in float64, from the formula and the module's weights of now."""
        if not self.whole:
            return reference(given, self.mask, self.causal)
        attention, x = self.attention, given[0].double()
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        heads = [(x @ one.weight.double().T).unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in layers]
        output, logsumexp = reference(heads, self.mask, self.causal)
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
        near(output, wanted, f"{self.name}: output", self._tolerance())
        if logs is not None:
            assert logs.dtype in (torch.float32, torch.float64), (
                f"{self.name}: logsumexp has {logs.dtype}, float32 or better was wanted"
            )
            near(logs.double(), logsumexp.detach(), f"{self.name}: logsumexp", self._tolerance(True))
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
        probe = self.randn(*output.shape).to(self.dtype)
        if layout == "call":  # with other options
            self.causal, self.mask = not self.causal, None
            self.call(self.given())
        elif layout == "NHD":
            probe = probe.transpose(-2, 1).contiguous().transpose(-2, 1)
        elif layout:
            probe = probe[(slice(1),) * probe.dim()].expand_as(probe)
        version = probe._version
        tolerance = max(self._tolerance(), 1e-3 if self.dtype == torch.float32 else 0.0)
        if self.offset:  # dS is multiplied by keys of 1000.
            tolerance = 1e-6 if self._exact else 0.5
        for time in range(times):
            dO, inputs = probe if not time else -2 * probe, list(leaves.values())
            wanted = torch.autograd.grad(expected, inputs, dO.double(), retain_graph=True)
            came = torch.autograd.grad(output, inputs, dO, retain_graph=time + 1 < times, allow_unused=True)
            for name, x, y in zip(leaves, came, wanted, strict=True):
                if self.early:  # NaN is the point here.
                    assert x is None or x.isfinite().all(), f"backward: the gradient of {name} is not finite"
                else:
                    near(x, y, f"{'second backward' if time else 'backward'}: gradient of {name}", tolerance)
        assert probe._version == version, "backward: writes to the gradient of the output"


def near(came: Tensor | None, wanted: Tensor, what: str, tolerance: float) -> None:
    """Close, after a look that is faster."""
    alike = type(came) is Tensor and came.shape == wanted.shape and came.dtype == wanted.dtype
    if not alike or came is None or float((came.detach() - wanted).abs_().max()) > tolerance:
        Close(tolerance)(came, wanted, what)


test_calls_in_any_order = walk_check(Calls(), STEPS)
