"""What the checks of ex10 share: modules with gradients in closed form, the bucket rule, logs in words, optimizers."""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.optim  # What a submission might reach; loaded before forks rather than in each.
import torch.utils.serialization  # What tensors that are pickled load at their first use.
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.fsdp import _init_utils
from torch.distributed.fsdp._fully_shard import _fsdp_init
from torch.nn.parallel import DistributedDataParallel

from harness.testing import Close, Prebuilt, Subject

from .meeting import Call, Entry, Wait
from .ranks import note, pause, run

APART = "every rank makes the same calls in the same order"


class Bag(nn.Module):
    """Parameters p0, p1, … of any kind. A row's loss is its x times the sum of sin(p) over the parameters in use, so
    that a parameter's gradient is cos(p) times the sum of the rows.
    """

    def __init__(self, *tensors: Tensor, frozen: Sequence[int] = (), tied: Sequence[int] = ()) -> None:
        super().__init__()
        self.all = [nn.Parameter(tensor, requires_grad=i not in frozen) for i, tensor in enumerate(tensors)]
        for i, parameter in enumerate(self.all):
            self.register_parameter(f"p{i}", parameter)
            if i not in frozen:
                parameter.register_hook(lambda _, i=i: note(f"ready {i}"))
        for i in tied:
            self.register_parameter(f"p{i}_again", self.all[i])

    def forward(self, x: Tensor, *, order: Sequence[int]) -> Tensor:
        """x [n] -> losses [n]."""
        losses = x * 0
        for i in order:
            losses = losses + x * self.all[i].sin().sum().to(x.dtype)
        return losses

    @property
    def trainable(self) -> list[int]:
        """The parameters that take part in training."""
        return [i for i, parameter in enumerate(self.all) if parameter.requires_grad]


def bags(size: int, rng: torch.Generator, *shapes: Any, **options: Any) -> list[Bag]:
    """A replica for each rank, all with the same random numbers. A shape is a number, a tuple, or (shape, dtype)."""
    values = []
    for shape in shapes:
        typed = isinstance(shape, tuple) and len(shape) == 2 and isinstance(shape[1], torch.dtype)
        shape, dtype = shape if typed else (shape, torch.float64)
        shape = (shape,) if isinstance(shape, int) else shape
        values.append(torch.rand(shape, generator=rng, dtype=torch.float64).to(dtype))
    return [Bag(*(value.clone() for value in values), **options) for _ in range(size)]


@dataclass(frozen=True)
class Back:
    """One backward of a rank: the parameters that it uses, in this order, and its rows; `quiet` under no_sync."""

    order: tuple[int, ...]
    rows: tuple[float, ...] = (1.0,)
    quiet: bool = False


# What each rank does in a step.
Step = Sequence[Sequence[Back]]
Gradients = list[Tensor | None]


@dataclass
class Trained:
    """What came of a plan: gradients by step and rank, and each step's log by rank."""

    gradients: list[list[Gradients]]
    logs: list[list[list[Entry]]]


def backward(parallel: Any, back: Back) -> None:
    """One backward of a rank, noted."""
    with parallel.no_sync() if back.quiet else nullcontext():
        losses = parallel(torch.tensor(back.rows, dtype=torch.float64), order=back.order)
        if back.quiet:
            pause()
        note("quiet backward" if back.quiet else "backward")
        losses.sum().backward()
        note("end")


def finish(parallel: Any) -> None:
    """A step's end, noted."""
    note("finish")
    parallel.finish()
    note("finished")


def gradients(bag: Bag) -> Gradients:
    """What every parameter's .grad holds now."""
    return [None if p.grad is None else p.grad.detach().clone() for p in bag.all]


def train(subject: Subject, models: list[Bag], cap: float, plan: Sequence[Step], what: str = "") -> Trained:
    """Trains by a plan, gradients set to None before each step; `what` is the plan in words."""
    kind = subject.DataParallel

    def job(rank: int) -> list[Gradients]:
        parallel = kind(models[rank], bucket_cap_mb=cap / 2**20)
        found = []
        for step in plan:
            note("step")
            models[rank].zero_grad()
            for back in step[rank]:
                backward(parallel, back)
            finish(parallel)
            found.append(gradients(models[rank]))
        return found

    try:
        results, logs = run(len(models), job)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}" if what else str(error)) from error
    steps = [by_step(log) for log in logs]
    return Trained([list(one) for one in zip(*results, strict=True)], [list(one) for one in zip(*steps, strict=True)])


def by_step(log: list[Entry]) -> list[list[Entry]]:
    """A rank's log, cut where a step begins; what was before is left out."""
    steps: list[list[Entry]] = []
    for entry in log:
        if entry == "step":
            steps.append([])
        elif steps:
            steps[-1].append(entry)
    return steps


def wanted(bag: Bag, step: Step) -> Gradients:
    """What one process has in .grad after the backwards of all ranks, divided by their number."""
    found: Gradients = []
    for i, parameter in enumerate(bag.all):
        uses = [(back.order.count(i), sum(back.rows)) for backs in step for back in backs if i in back.order]
        if not uses or not parameter.requires_grad:
            found.append(None)
            continue
        total = sum(count * rows for count, rows in uses) / len(step)
        found.append((parameter.detach().double().cos() * total).to(parameter.dtype))
    return found


def same_gradients(close: Close, came: Gradients, expected: Gradients, what: str, hint: str = "") -> None:
    """Each gradient is the wanted one, None where none is wanted."""
    for i, (one, other) in enumerate(zip(came, expected, strict=True)):
        if other is None:
            assert one is None, f"{what}: p{i}.grad is a tensor, None was wanted, as in one process\n{hint}".rstrip()
            continue
        close(one, other, f"{what}: p{i}.grad", tolerance=near(other.dtype), hint=hint)


def roughly(close: Close, came: Gradients, expected: Gradients, size: int, what: str, hint: str = "") -> None:
    """The same, loosely, and up to a factor that is judged elsewhere: sums in place of averages."""
    for factor in (size, 1 / size, size / 2):
        scaled = [None if one is None else one * factor for one in expected]
        if all(
            (one is None) == (two is None)
            and (one is None or two is None or (one.shape == two.shape and torch.allclose(one, two, 1e-2, 1e-2)))
            for one, two in zip(came, scaled, strict=True)
        ):
            return
    for i, (one, other) in enumerate(zip(came, expected, strict=True)):
        if other is None:
            assert one is None, f"{what}: p{i}.grad is a tensor, None was wanted, as in one process\n{hint}".rstrip()
            continue
        close(one, other, f"{what}: p{i}.grad", tolerance=1e-2, hint=hint)


def near(dtype: torch.dtype) -> float:
    """How near a value has to be."""
    return {torch.float64: 1e-9, torch.float32: 5e-6}.get(dtype, 2e-2)


# Buckets


def buckets(bag: Bag, cap: float) -> list[list[int]]:
    """The rule: the trainable parameters from the last to the first, cut by cap (in bytes) and dtype."""
    found: list[list[int]] = []
    size = 0
    for i in reversed(bag.trainable):
        parameter = bag.all[i]
        if not found or size + parameter.nbytes > cap or parameter.dtype != bag.all[found[-1][0]].dtype:
            found.append([])
            size = 0
        found[-1].append(i)
        size += parameter.nbytes
    return found


@dataclass(frozen=True)
class Sent:
    """A call of a step, and where it starts: after how many gradients of the backward outside no_sync, or elsewhere."""

    call: Call
    place: str
    after: int


def sent(log: list[Entry]) -> list[Sent]:
    """The calls of a step."""
    found: list[Sent] = []
    place, ready = "before backward", 0
    for entry in log:
        if isinstance(entry, Call):
            found.append(Sent(entry, place, ready))
        elif isinstance(entry, Wait):
            continue
        elif entry.startswith("ready"):
            ready += place == "backward"
        else:
            place = {"end": "after backward", "finished": "after finish"}.get(entry, entry)
    return found


def bucket_calls(log: list[Entry], bag: Bag, groups: list[list[int]]) -> list[Sent]:
    """The calls of a step without the one more that a finish may make."""
    calls = sent(log)
    if len(calls) != len(groups) + 1:
        return calls
    spare = [
        n
        for n, one in enumerate(calls)
        if one.place == "finish" and one.call.kind == "all_reduce" and one.call.nbytes <= 8 * len(bag.trainable)
    ]
    without = [[*calls[:n], *calls[n + 1 :]] for n in reversed(spare)]
    fitting = [some for some in without if not misfit(some, bag, groups)]
    return (fitting or without or [calls])[0]


def misfit(calls: list[Sent], bag: Bag, groups: list[list[int]]) -> str:
    """What the calls are that buckets are not, in words."""
    if (strange := next((one for one in calls if one.call.kind != "all_reduce"), None)) is not None:
        return f"a {strange.call} came in {strange.place}; buckets travel by all_reduce, and nothing else is sent"
    for n, (group, one) in enumerate(zip(groups, calls, strict=False)):
        numbers, call = sum(bag.all[i].numel() for i in group), one.call
        names = " and ".join(f"p{i}" for i in group)
        if call.dtype != bag.all[group[0]].dtype:
            return f"bucket {n} is {names}: an all_reduce of {call.dtype} came, {bag.all[group[0]].dtype} was wanted"
        if not numbers <= call.numel <= numbers + len(group):
            return (
                f"bucket {n} is {names}: an all_reduce of {call.numel} numbers came, "
                f"{numbers} to {numbers + len(group)} were wanted"
            )
    if len(calls) != len(groups):
        return f"{len(calls)} all_reduce calls came, {len(groups)} buckets were wanted"
    return ""


def own_groups(calls: list[Sent], bag: Bag) -> list[list[int]] | None:
    """Which parameter each call carries, where each carries one and all differ in size; else None."""
    sizes = {i: bag.all[i].numel() for i in bag.trainable}
    fits = [[i for i, size in sizes.items() if size <= one.call.numel <= size + 1] for one in calls]
    return fits if sorted(fits) == [[i] for i in sizes] else None


def late(log: list[Entry], calls: list[Sent], groups: list[list[int]]) -> str:
    """Which bucket starts elsewhere than as soon as its gradients are ready and all before it have started."""
    order, place = [], ""
    for entry in log:
        if isinstance(entry, str):
            if entry.startswith("ready"):
                order += [int(entry.split()[1])] * (place == "backward")
            else:
                place = entry
    begun = -1
    for n, (group, one) in enumerate(zip(groups, calls, strict=True)):
        ready = max(order.index(i) + 1 if i in order else len(order) + 1 for i in group)
        begun = max(begun, ready)
        inside = begun <= len(order)
        names = " and ".join(f"p{i}" for i in group)
        came = f"after {one.after} of {len(order)} gradients" if one.place == "backward" else f"in {one.place}"
        due = f"after {begun} of {len(order)}" if inside else "in finish"
        if inside != (one.place == "backward") or (inside and one.after != begun):
            return f"bucket {n} ({names}) starts {came}, {due} was wanted; gradients come in the order {order}"
    return ""


def waits(log: list[Entry]) -> tuple[list[int], list[int]]:
    """The calls of a step that are waited for inside a backward, and those that finish leaves running."""
    inside, started, done, place = [], [], set(), ""
    for entry in log:
        if isinstance(entry, Call):
            started.append(entry.number)
        elif isinstance(entry, Wait):
            done.add(entry.number)
            inside += [entry.number] * place.endswith("backward")
        elif not entry.startswith("ready"):
            place = entry
    return inside, [number for number in started if number not in done]


# Optimizers

Make = Callable[[Any], Any]


def copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    """What parameters hold now."""
    return [parameter.detach().clone() for parameter in parameters]


def state_bytes(state: dict[Any, dict[str, Any]]) -> int:
    """Bytes of an optimizer's state."""
    return sum(value.nbytes for one in state.values() for value in one.values() if isinstance(value, Tensor))


def wrappers() -> Prebuilt:
    """What "from scratch" forbids here: what the wrappers run when they are made, and when they are called."""
    ddp, sharded = DistributedDataParallel, fsdp.FullyShardedDataParallel
    functions: list[Callable[..., Any]] = [ddp._assign_modules_buffers, ddp._build_params_for_reducer, ddp.forward]
    functions += [ddp._ddp_init_helper, ddp._pre_forward, sharded.forward, _init_utils._init_process_group_state]
    functions += [_fsdp_init._validate_module, torch.distributed.optim.ZeroRedundancyOptimizer.__init__]
    return Prebuilt((), tuple(functions), "torch.distributed's calls, hooks on parameters, and optimizer_class itself")


Script = Callable[..., list[list[Tensor]]]


def parameters(
    rng: torch.Generator, *shapes: Any, frozen: Sequence[int] = (), strided: Sequence[int] = ()
) -> list[nn.Parameter]:
    """Parameters of random numbers; a shape as in `bags`."""
    found = list(bags(1, rng, *shapes, frozen=frozen)[0].all)
    for i in strided:
        found[i] = nn.Parameter(found[i].detach().mT.contiguous().mT, requires_grad=found[i].requires_grad)
    return [nn.Parameter(one.detach(), requires_grad=one.requires_grad) for one in found]


def clones(own: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Other parameters with the same numbers and strides."""
    return [nn.Parameter(one.detach().clone(), requires_grad=one.requires_grad) for one in own]


def give(own: Sequence[nn.Parameter], number: int, missing: Sequence[int] = ()) -> None:
    """Gives parameters the gradients of step `number`, the same wherever it is called."""
    for i, parameter in enumerate(own):
        if not parameter.requires_grad or i in missing:
            parameter.grad = None
            continue
        angles = torch.arange(parameter.numel(), dtype=torch.float64) * (i + 1.3) + 2.1 * number + i
        parameter.grad = (angles.sin() + 0.3).to(parameter.dtype).view(parameter.shape)


def alone(own: list[nn.Parameter], cls: Any, defaults: dict[str, Any], script: Script, **options: Any) -> Any:
    """What a script gives with optimizer_class alone."""
    return script(lambda groups: cls(groups, **copy.deepcopy(defaults)), clones(own), **options)


def on_ranks(size: int, own: list[nn.Parameter], make: Make, script: Script, by_rank: bool = False) -> list[Any]:
    """What a script gives on each rank."""
    mine = [clones(own) for _ in range(size)]
    return run(size, lambda rank: script(make, mine[rank], **({"rank": rank} if by_rank else {})))[0]


def agree(
    subject: Subject,
    close: Close,
    size: int,
    own: list[nn.Parameter],
    cls: Any,
    defaults: dict[str, Any],
    script: Script,
    what: str,
    hint: str = "",
    by_rank: bool = False,
) -> None:
    """A script gives the same with a sharded optimizer on some ranks as with optimizer_class alone."""
    kind = subject.ShardedOptimizer
    expected = alone(own, cls, defaults, script)

    came = on_ranks(size, own, lambda groups: kind(groups, cls, **copy.deepcopy(defaults)), script, by_rank)

    same_everywhere(close, came, expected, what, hint)


def same_everywhere(
    close: Close,
    came: list[list[list[Tensor]]],
    expected: list[list[Tensor]],
    what: str,
    hint: str = "",
    exact: bool = True,
) -> None:
    """After each step every rank has the right values and rank 0's bits; about, where steps are judged elsewhere."""
    for rank, seen in enumerate(came):
        for step, (ones, others) in enumerate(zip(seen, expected, strict=True)):
            for number, (one, other) in enumerate(zip(ones, others, strict=True)):
                where = f"{what}: tensor {number} after step {step + 1} on rank {rank}"
                limit = 1e-12 if exact and other.dtype == torch.float64 else 5e-6
                close(one, other, where, tolerance=limit, hint=hint)
                same = not exact or torch.equal(one, came[0][step][number])
                assert same, f"{where}: not the bits of rank 0\nevery rank takes a parameter from where it was stepped"


def same_state(close: Close, came: Any, expected: Any, what: str) -> None:
    """A state_dict is the wanted one: keys, then values."""
    assert isinstance(came, dict), f"{what}: a {type(came).__name__} came, a dict was wanted"
    assert set(came) == set(expected), f"{what}: keys {sorted(came)} came, {sorted(expected)} were wanted"
    strange = sorted({type(key).__name__ for key in came["state"]} - {"int"})
    assert not strange, f"{what}: the states' keys are of type {strange[0]}; the parameters' numbers were wanted"
    keys = [sorted(one["state"]) for one in (came, expected)]
    assert keys[0] == keys[1], (
        f"{what}: the states of parameters {keys[0]} came, of {keys[1]} were wanted\n"
        "every rank gives the whole: gather the shares; what has no state in one process has none here"
    )
    for number, state in expected["state"].items():
        here = came["state"][number]
        assert set(here) == set(state), f"{what}: parameter {number} has {sorted(here)}, not {sorted(state)}"
        for key, value in state.items():
            if isinstance(value, Tensor):
                limit = 1e-12 if value.dtype == torch.float64 else near(value.dtype)
                close(here[key], value, f"{what}: {key} of parameter {number}", tolerance=limit)
            else:
                assert here[key] == value, f"{what}: {key} of parameter {number} is {here[key]}, not {value}"
    assert came["param_groups"] == expected["param_groups"], (
        f"{what}: param_groups {came['param_groups']} came, {expected['param_groups']} was wanted"
    )
