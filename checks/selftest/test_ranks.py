"""The ranks of ex10: torch's private names that they stand on, errors in place of hangs, and real processes."""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ex10_data_parallel.meeting import Call, Wait
from ex10_data_parallel.ranks import Ranks, pause, run
from harness.model.paths import TOP

SAME = "every rank makes the same calls in the same order"


def every_call(rank: int) -> list[Any]:
    """Uses all that the group offers."""
    total = torch.tensor([1.0 + rank, 2.0])
    work = dist.all_reduce(total, async_op=True)
    before = total.tolist()
    work.wait()
    mean = torch.tensor([float(rank)])
    dist.all_reduce(mean, dist.ReduceOp.AVG)
    root = torch.tensor([rank])
    dist.broadcast(root, 1)
    gathered = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    dist.all_gather(gathered, torch.tensor([rank]))
    single = torch.zeros(2, dtype=torch.int64)
    dist.all_gather_single(single, torch.tensor([rank]))
    objects: list[Any] = [None, None]
    box: list[Any] = [{"rank": rank}]
    dist.all_gather_object(objects, (rank, torch.ones(1)))
    dist.broadcast_object_list(box, src=1)
    dist.barrier()
    found = [before, total.tolist(), mean.tolist(), root.tolist(), [one.item() for one in gathered], single.tolist()]
    return [*found, [pair[0] for pair in objects], box, dist.get_world_size(), dist.get_rank()]


def test_the_group_uses_torchs_private_names() -> None:
    hook = sys.excepthook

    results, logs = run(2, every_call)

    for rank, result in enumerate(results):
        assert result == [[1.0 + rank, 2.0], [3.0, 4.0], [0.5], [1], [0, 1], [0, 1], [0, 1], [{"rank": 1}], 2, rank]
    started = [str(entry) for entry in logs[0] if isinstance(entry, Call)]
    assert started[:3] == [
        "all_reduce (sum) of 2 float32",
        "all_reduce (average) of 1 float32",
        "broadcast (from rank 1) of 1 int64",
    ]
    assert logs[0][:2] == [Call(0, "all_reduce", 2, torch.float32, 8, "sum"), Wait(0)]
    assert sys.excepthook is hook
    assert not dist.is_initialized()


def test_ranks_that_are_left_end_between_two_runs() -> None:
    def collects(rank: int) -> None:
        if rank == 0:
            gc.collect()
        dist.barrier()

    for _ in range(2):
        cycle: list[Any] = [Ranks(2)]
        cycle.append(cycle)
        cycle[0].run(lambda rank: None)
        threads = cycle[0]._meeting.threads
        del cycle
        run(3, collects)
        run(1, lambda rank: None)
        assert not any(thread.is_alive() for thread in threads)


def test_a_pause_lets_the_others_go_on() -> None:
    seen: list[str] = []

    def job(rank: int) -> None:
        for step in range(2):
            seen.append(f"{step} on {rank}")
            if rank == 0:
                pause()

    run(3, job)

    assert seen == ["0 on 0", "0 on 1", "1 on 1", "0 on 2", "1 on 2", "1 on 0"]


def ends(rank: int) -> None:
    if rank == 0:
        dist.barrier()


def differs(rank: int) -> None:
    dist.all_reduce(torch.zeros(2 + rank))


def raises(rank: int) -> None:
    if rank == 1:
        raise ArithmeticError("a bad batch")
    dist.barrier()


def sleeps(rank: int) -> None:
    if rank == 1:
        time.sleep(60)
    dist.barrier()


def writes(rank: int) -> None:
    tensor = torch.zeros(2)
    work = dist.all_reduce(tensor, async_op=True)
    tensor += 1
    work.wait()


def reduces(rank: int) -> None:
    dist.reduce(torch.zeros(1), 0)


def polls(rank: int) -> None:
    while not dist.all_reduce(torch.zeros(1), async_op=True).is_completed():
        pass


HANGS: dict[str, tuple[Callable[[int], None], type[BaseException], str]] = {
    "ends": (ends, AssertionError, "rank 1 has ended after 0 calls; rank 0 waits in call 1, barrier"),
    "differs": (
        differs,
        AssertionError,
        "rank 0 makes all_reduce (sum) of 2 float32, rank 1 all_reduce (sum) of 3 float32",
    ),
    "raises": (raises, ArithmeticError, "a bad batch"),
    "sleeps": (sleeps, AssertionError, "rank 1 neither ends nor makes a call, before its first call"),
    "writes": (writes, AssertionError, "is written to between its start and its wait()"),
    "reduces": (reduces, RuntimeError, "reduce is not offered here"),
    "polls": (polls, RuntimeError, "Work.is_completed"),
}


@pytest.mark.parametrize("how", HANGS)
def test_nothing_hangs(how: str) -> None:
    function, error, words = HANGS[how]
    start = time.process_time()

    with pytest.raises(error) as raised:
        run(2, function)

    assert words in str(raised.value)
    assert time.process_time() - start < 3


def test_ranks_live_on_between_runs() -> None:
    ranks = Ranks(3)
    for _ in range(2):
        assert ranks.run(lambda rank: (dist.get_rank(), dist.get_world_size())) == [(0, 3), (1, 3), (2, 3)]
    ranks.close()


PROCESS = """
import json, sys
import torch, torch.distributed as dist
sys.path[:0] = [sys.argv[1]]
from ex10_data_parallel import DataParallel, ShardedOptimizer, global_mean
torch.set_num_threads(1)
rank = int(sys.argv[3])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
torch.manual_seed(rank)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
parallel = DataParallel(model, 100 / 2**20)
optimizer = ShardedOptimizer(model.parameters(), lr=0.1)
for step in range(3):
    optimizer.zero_grad()
    x = torch.arange(3.0 * (2 - rank), dtype=torch.float64).view(-1, 3).sin() + step
    global_mean(parallel(x).square().sum(1)).backward()
    parallel.finish()
    optimizer.step()
saved = optimizer.state_dict()
print(json.dumps([[p.tolist() for p in model.parameters()], len(saved["state"])]))
"""


def test_the_answer_runs_on_real_processes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    alone = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.cat([torch.arange(3.0 * n, dtype=torch.float64).view(-1, 3).sin() + step for n in (2, 1)])
        alone(x).square().sum(1).mean().backward()
        optimizer.step()
    command = [sys.executable, "-P", "-W", "ignore", "-c", PROCESS, str(TOP / "answers"), str(tmp_path / "store")]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": surroundings}

    processes = [subprocess.Popen([*command, str(rank)], **pipes) for rank in range(2)]  # type: ignore[call-overload]
    said = [process.communicate(timeout=120) for process in processes]

    for out, err in said:
        assert out, err
        values, states = json.loads(out)
        assert states == 4
        for came, expected in zip(values, alone.parameters(), strict=True):
            torch.testing.assert_close(
                torch.tensor(came, dtype=torch.float64), expected.detach(), atol=1e-10, rtol=1e-10
            )
