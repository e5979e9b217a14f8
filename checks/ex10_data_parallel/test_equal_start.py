"""Equal start, and the same as one process (10.1, 10.2)."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.testing import Close, Subject, forbid, requirement

from .ranks import run
from .reference import Back, Bag, bags, same_gradients, train, wanted, wrappers

# Each with the words that name it; every rank has numbers of its own.
KINDS = {
    "weight": "a plain parameter",
    "frozen": "frozen parameters go too",
    "strided": "a parameter that is not contiguous: what arrives has to be copied into it",
    "every_second": "a parameter that is not contiguous: what arrives has to be copied into it",
    "scalar": "a 0-dimensional parameter",
    "empty": "a parameter without elements",
    "brief": "a bfloat16 parameter",
    "nans": "NaN, infinity and -0.0 go as they are: rank 0's bits, no sums",
    "counts": "an integer buffer",
    "mask": "a bool buffer",
    "means": "buffers go too, of a part in eval and without parameters as well",
    "unsaved": "buffers that are not saved go too",
}


def everything(rank: int) -> nn.Module:
    """A module of each kind of tensor, with numbers of the rank's own."""
    rng = torch.Generator().manual_seed(rank)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    module, inner, again = nn.Module(), nn.Module(), nn.Module()
    module.weight = nn.Parameter(numbers(2, 3))
    module.frozen = nn.Parameter(numbers(3).float(), requires_grad=False)
    module.strided = nn.Parameter(numbers(3, 2).mT)
    module.every_second = nn.Parameter(numbers(7)[::2])
    module.scalar = nn.Parameter(numbers())
    module.empty = nn.Parameter(numbers(0, 3))
    module.brief = nn.Parameter(numbers(2).bfloat16())
    odd = [float("nan"), float("inf"), -0.0, 1.0] if rank == 0 else [1.0, 2.0, 3.0, float("nan")]
    module.nans = nn.Parameter(torch.tensor(odd))
    inner.register_buffer("counts", torch.tensor([5, 6]) + 2**60 + rank)
    inner.register_buffer("mask", torch.tensor([True, False, True]) ^ (rank % 2 == 1))
    inner.register_buffer("means", numbers(2))
    inner.register_buffer("unsaved", numbers(2).half(), persistent=False)
    module.inner, module.again = inner.eval(), again
    again.tied = module.weight
    return module


def found(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of `everything` by the last part of their names."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name.rpartition(".")[2]: tensor for name, tensor in named}


def bits(tensor: Tensor) -> Tensor:
    """What a tensor holds, byte by byte."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).clone()


@requirement("10.1")
@pytest.mark.parametrize("size", [2, 3])
def test_all_start_as_rank_0(subject: Subject, close: Close, size: int) -> None:
    """After construction every parameter and buffer holds rank 0's bits."""
    modules = [everything(rank) for rank in range(size)]
    expected = {name: bits(tensor) for name, tensor in found(modules[0]).items()}
    kind = subject.DataParallel

    run(size, lambda rank: kind(modules[rank]) and None)

    for name, about in KINDS.items():
        for rank in range(size):
            what = f"DataParallel(module) on {size} ranks: the bytes of {name} on rank {rank}"
            hint = f"{about}\n" + ("rank 0's own stay as they were" if rank == 0 else "every rank has what rank 0 has")
            close(bits(found(modules[rank])[name]), expected[name], what, tolerance=0, hint=hint)


@requirement("10.1")
def test_tensors_stay_the_same_objects(subject: Subject, close: Close) -> None:
    """Parameters and buffers are the same objects as before, tied ones tied, and ask for gradients as before."""
    modules = [everything(rank) for rank in range(2)]
    before = [dict(found(module)) for module in modules]
    asked = {name: tensor.requires_grad for name, tensor in before[0].items()}
    expected = bits(before[0]["weight"])
    kind = subject.DataParallel

    run(2, lambda rank: kind(modules[rank]) and None)

    for rank, module in enumerate(modules):
        close(bits(before[rank]["weight"]), expected, f"DataParallel(module): weight on rank {rank}", tolerance=0)
        tied = module.get_submodule("again").tied
        assert tied is module.weight, f"DataParallel(module): on rank {rank} a tied parameter is no longer tied"
        for name, tensor in found(module).items():
            what = f"DataParallel(module): {name} on rank {rank}"
            assert tensor is before[rank][name], (
                f"{what} is another object than before\nwrite into it: an optimizer made before holds the old one"
            )
            assert tensor.requires_grad == asked[name], f"{what}: requires_grad is {tensor.requires_grad}"


@requirement("10.1")
def test_one_rank_starts_as_it_is(subject: Subject, close: Close) -> None:
    """One rank, and a module without parameters, work too."""
    module = everything(0)
    expected = {name: bits(tensor) for name, tensor in found(module).items()}
    kind = subject.DataParallel

    run(1, lambda rank: [kind(one) for one in (module, nn.Tanh())])

    for name in KINDS:
        close(bits(found(module)[name]), expected[name], f"DataParallel(module) on one rank: {name}", tolerance=0)


@requirement("10.2")
def test_gradients_by_hand(subject: Subject, close: Close) -> None:
    """Of gradients [2, 4] and [4, -2] the average is [3, 1], on both ranks."""
    linears = [nn.Linear(2, 1, bias=False).double() for _ in range(2)]
    rows = (torch.tensor([[2.0, 4.0]], dtype=torch.float64), torch.tensor([[4.0, -2.0]], dtype=torch.float64))
    for linear in linears:
        nn.init.ones_(linear.weight)
    kind = subject.DataParallel

    def job(rank: int) -> Any:
        parallel = kind(linears[rank])
        output = parallel(rows[rank])
        output.sum().backward()
        parallel.finish()
        return output.detach()

    outputs, _ = run(2, job)

    expected = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    for rank, linear in enumerate(linears):
        close(outputs[rank], rows[rank].sum(1, keepdim=True), f"forward on rank {rank}")
        close(
            linear.weight.grad,
            expected,
            f"gradients [2, 4] on rank 0, [4, -2] on rank 1; after finish on rank {rank}",
            hint="finish makes each .grad the average over the ranks: not a sum, and divided once",
        )


def means(subject: Subject, leaves: list[Tensor]) -> list[Any]:
    """What global_mean gives on each rank, after a backward of it."""
    mean = subject.global_mean

    def job(rank: int) -> Any:
        value = mean(leaves[rank] * 1)
        if not isinstance(value, Tensor):
            return value
        if value.requires_grad:
            value.backward()
        return value.detach()

    return run(len(leaves), job)[0]


@requirement("10.2")
def test_global_mean_by_hand(subject: Subject, close: Close) -> None:
    """Losses [1, 2, 3] and [10]: 3 on rank 0, 5 on rank 1, a gradient of 1/2 each; with an empty rank likewise."""
    cases: tuple[tuple[list[float], ...], ...] = (([1.0, 2.0, 3.0], [10.0]), ([], [1.0, 3.0], [8.0]), ([4.0, -6.0],))
    wanted_values = ([3.0, 5.0], [0.0, 4.0, 8.0], [-1.0])
    wanted_slopes = (0.5, 1.0, 0.5)
    for losses, values, slope in zip(cases, wanted_values, wanted_slopes, strict=True):
        leaves = [torch.tensor(one, dtype=torch.float64, requires_grad=True) for one in losses]

        results = means(subject, leaves)

        for rank, value in enumerate(values):
            what = f"global_mean of losses {losses[rank]} on rank {rank}, all ranks' losses {list(losses)}"
            hint = "this rank's sum · ranks / losses on all ranks: the average over the ranks is the mean of all losses"
            close(results[rank], torch.tensor(value, dtype=torch.float64), what, hint=hint)
            slopes = torch.full((len(losses[rank]),), slope, dtype=torch.float64)
            close(leaves[rank].grad, slopes, f"{what}: gradient of the losses", hint=hint)


# Counts that the dtype cannot add up, losses, and what is wrong with a sum of counts in that dtype.
COUNTS = {
    "float16": (torch.float16, (40000, 40000), 0.5, "80000 is infinite in float16"),
    "bfloat16": (torch.bfloat16, (256, 1, 1, 1, 1), 1.0, "256 + 1 is 256 in bfloat16"),
}


@requirement("10.2")
@pytest.mark.parametrize("case", COUNTS)
def test_global_mean_counts_exactly(subject: Subject, close: Close, case: str) -> None:
    """Numbers of losses that their dtype cannot hold are counted exactly."""
    dtype, counts, loss, about = COUNTS[case]
    leaves = [torch.full((n,), loss, dtype=dtype).requires_grad_() for n in counts]

    results = means(subject, leaves)

    slope = len(counts) / sum(counts)
    for rank, (value, count) in enumerate(zip(results, counts, strict=True)):
        what = f"global_mean of {count} {dtype} losses of {loss} on rank {rank}, of {counts} on the ranks"
        close(value, torch.tensor(loss * count * slope, dtype=dtype), what, tolerance=2e-2, hint=about)
        came = leaves[rank].grad
        assert came is not None, f"{what}: its gradient is None"
        ratio = came.double() / slope
        ones = torch.ones(count, dtype=torch.float64)
        close(ratio, ones, f"{what}: gradient as a share of the right one", tolerance=4e-3, hint=about)


class Tied(nn.Module):
    """Two inputs -> losses [n]; with a tied weight, a frozen layer, and a strided parameter."""

    def __init__(self, rng: torch.Generator) -> None:
        super().__init__()
        self.first, self.second, self.frozen = (nn.Linear(3, 3, dtype=torch.float64) for _ in range(3))
        self.scale = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64).mT)
        for parameter in self.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
        hidden = self.second(self.frozen(self.first(x).tanh()) + shift)
        return (hidden @ self.scale).square().mean(1)


@requirement("10.2")
@pytest.mark.parametrize("shares", [(5,), (1, 4), (3, 0, 2)], ids=["5", "1-4", "3-0-2"])
def test_five_steps_equal_one_process(
    subject: Subject, close: Close, rng: torch.Generator, shares: tuple[int, ...]
) -> None:
    """Gradients, and parameters after 5 steps of AdamW, are those of one process with the rows of all ranks."""
    alone = Tied(rng)
    replicas = [copy.deepcopy(alone) for _ in shares]
    rows = torch.randn(5, 2, sum(shares), 3, generator=rng, dtype=torch.float64)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.01)
    expected = []
    for x, shift in rows:
        optimizer.zero_grad()
        alone(x, shift=shift).mean().backward()
        expected.append([None if p.grad is None else p.grad.clone() for p in alone.parameters()])
        optimizer.step()
    kind, mean = subject.DataParallel, subject.global_mean

    def job(rank: int) -> list[list[Tensor | None]]:
        parallel, model, seen = kind(replicas[rank]), replicas[rank], []
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for both in rows:
            optimizer.zero_grad()
            x, shift = both.split(shares, dim=1)[rank]
            mean(parallel(x, shift=shift)).backward()
            parallel.finish()
            seen.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
            optimizer.step()
        return seen

    results, _ = run(len(shares), job)

    for rank, seen in enumerate(results):
        for step, (came, right) in enumerate(zip(seen, expected, strict=True)):
            for (name, _), one, other in zip(alone.named_parameters(), came, right, strict=True):
                what = f"rows {shares} on the ranks, step {step + 1}, rank {rank}: gradient of {name}"
                if other is None:
                    assert one is None, f"{what}: a tensor came, None was wanted: it is frozen"
                else:
                    close(one, other, what, tolerance=1e-10, hint=_shares(shares))
        for (name, end), now in zip(alone.named_parameters(), replicas[rank].parameters(), strict=True):
            what = f"rows {shares} on the ranks, after 5 steps of AdamW, rank {rank}: {name}"
            close(now.detach().clone(), end.detach(), what, tolerance=1e-10)


def _shares(shares: tuple[int, ...]) -> str:
    if 0 in shares:
        return "a rank without rows still takes part: its loss of no rows has gradients of zero"
    return "rows count alike, however many a rank has: no mean of means" if len(shares) > 1 else ""


@requirement("10.2")
def test_gradients_do_not_overflow(subject: Subject, close: Close) -> None:
    """Gradients of 40000, and of 2e38, on each rank, whose sums their dtypes cannot hold, average to that."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    models = [Bag(*(torch.zeros(2, dtype=dtype) for dtype in dtypes)) for _ in range(3)]

    came = train(subject, models, 100, [[[Back((0, 1, 2), (row,))]] * 3 for row in (40000.0, 2e38)]).gradients

    for row, step, fits in zip(("40000", "2e38"), came, (dtypes[:1], dtypes[1:]), strict=True):
        for rank, gradients in enumerate(step):
            for dtype in fits:
                name = str(dtype).removeprefix("torch.")
                close(
                    gradients[dtypes.index(dtype)],
                    torch.full((2,), float(row), dtype=dtype),
                    f"{name} gradients of {row} on 3 ranks, after finish: .grad on rank {rank}",
                    tolerance=1e-2,
                    hint=f"{name} holds at most {torch.finfo(dtype).max:g}: divide by the number of ranks before the "
                    "sum, not after",
                )


@requirement("10.2")
@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_parameter_gets_its_own_gradient(subject: Subject, close: Close, rng: torch.Generator, size: int) -> None:
    """Tied, frozen, 0-dimensional and strided parameters in two dtypes get the average, each its own."""
    shapes = (3, (2, 3), (), (4, torch.float32), 2, (2, torch.float32))
    models = bags(size, rng, *shapes, frozen=[4], tied=[1])
    for model in models:
        with torch.no_grad():
            model.all[1].data = model.all[1].data.mT.contiguous().mT
    step = [[Back((0, 1, 2, 3, 4, 5, 1), (1.0 + rank, 0.5))] for rank in range(size)]

    came = train(subject, models, 1000, [step, step])

    for number, gradients in enumerate(came.gradients):
        for rank in range(size):
            what = f"{size} ranks, step {number + 1}, rank {rank}"
            same_gradients(close, gradients[rank], wanted(models[rank], step), what)


@requirement("10.2")
def test_forward_passes_everything_on(subject: Subject) -> None:
    """Arguments come as they are, and what the module returns comes back as it is."""
    seen: list[Any] = []

    class Curious(nn.Linear):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.append((args, kwargs))
            return {"out": args, "all": [kwargs, None]}

    kind, given = subject.DataParallel, ([1, "a"], {"b": None})

    def job(rank: int) -> Any:
        module = Curious(2, 2)
        parallel = kind(module)
        return parallel(given, 3, mode="x", other=given), parallel.module is module

    ((result, kept),), _ = run(1, job)

    assert seen, "forward(…): the module was not called"
    args, kwargs = seen[0]
    assert args == (given, 3) and args[0] is given and kwargs == {"mode": "x", "other": given}, (
        f"forward(given, 3, mode='x', other=given): the module got {args} and {kwargs}"
    )
    assert isinstance(result, dict) and result["out"] is args, f"forward: {result} came, not what the module returned"
    assert kept, "DataParallel(module).module is not the module that was given"


@requirement("10.2")
def test_it_is_written_from_scratch(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """None of torch's wrappers is reached, while the values are right."""
    models = bags(2, rng, 3, (2, 2))
    step = [[Back((0, 1), (2.0,))], [Back((1, 0), (4.0, 1.0))]]
    expected = wanted(models[0], step)
    subject.DataParallel  # noqa: B018  # loaded before, so that imports count as none

    with forbid(wrappers(), "DataParallel"):
        came = train(subject, models, 100, [step]).gradients[0]

    for rank in range(2):
        for i, gradient in enumerate(came[rank]):
            right = expected[i]
            assert right is not None, "the check's own set-up holds"
            close(gradient, right, f"from scratch, rank {rank}: p{i}.grad", tolerance=1e-2)
