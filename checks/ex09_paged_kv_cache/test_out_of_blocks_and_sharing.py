"""Preemption (9.7) and prefix sharing (9.8)."""

from functools import partial

import torch

from harness.testing import Subject, halfway, requirement

from .reference import SMALL, Model, alone
from .stage import PREEMPTION, Stage, apart_from_preemption, distinct, play, tight

# 9.7 out of blocks


@halfway
@requirement("9.7")
def test_preemption_by_hand(subject: Subject) -> None:
    """4 blocks of 2 slots: the younger of two is preempted in step 2, and comes back once the other is done."""
    model = Model()
    engine = subject.Engine(model, num_blocks=4, block_size=2)
    prompts = [1, 2, 3, 4, 5], [6, 7]
    answers = [alone(model, prompt, 3) for prompt in prompts]
    for prompt in prompts:
        engine.submit(prompt, 3)
    wanted = [{0: 0, 1: 0}, {0: 1}, {0: 2}, {1: 1}, {1: 2}, {}]
    held = [(3, 1), (3, 0), (0, 0), (0, 2), (0, 0), (0, 0)]
    fed = []
    for number, (places, blocks) in enumerate(zip(wanted, held, strict=True), start=1):
        before = len(model.calls)
        expected = {one: answers[one][place] for one, place in places.items()}

        came = engine.step()

        what = f"step {number} of the case by hand"
        assert came.keys() == expected.keys(), (
            f"{what}: tokens of requests {sorted(came)} came, of {sorted(expected)} were wanted\n"
            "request 1 needs a second block in step 2, where none is free, and waits until request 0 is done"
        )
        assert came == expected, f"{what}: {came} came, {expected} was wanted"
        tables = tuple(len(engine.cache.block_table(one)) for one in (0, 1))
        assert tables == blocks, f"{what}: requests 0 and 1 hold {tables} blocks after it, {blocks} were wanted"
        fed.append(sum(map(len, model.calls[before:])))
    assert fed == [7, 1, 1, 3, 1, 0], (
        f"the case by hand: {fed} tokens were fed in its steps, [7, 1, 1, 3, 1, 0] were wanted"
    )


@requirement("9.7")
def test_no_answer_changes_and_the_oldest_go_on(subject: Subject, rng: torch.Generator) -> None:
    """The youngest gives way, comes back with its tokens, and gets each of them once."""
    assert tight(subject, rng), "the check's own set-up holds"


@requirement("9.7")
def test_run_returns_each_token_once(subject: Subject, rng: torch.Generator) -> None:
    """run serves what the pool cannot hold together; later requests find all of its blocks."""
    prompts = distinct(rng, 4, 5, 3)
    # By steps first, as a run that gets no further would never end.
    for name, serve in (("all steps", Stage.drain), ("run", Stage.run)):
        stage = Stage(subject, 5, 3, sizes=SMALL, watch=("tokens",))
        for prompt in prompts[:2]:
            stage.submit(prompt, 4)
        serve(stage)
        stage.submit(prompts[2], 2)
        serve(stage)
        free = stage.cache.allocator.num_free
        assert free == 5, f"cache.allocator.num_free after {name}: {free} came, 5 was wanted"


@requirement("9.7")
def test_the_preempted_wait_before_later_requests(subject: Subject, rng: torch.Generator) -> None:
    """Who was preempted is older than those that came meanwhile, is counted once each time, and holds no blocks."""
    stage = Stage(subject, 4, 3, sizes=SMALL, watch=(*PREEMPTION, "memory"))
    prompts = distinct(rng, 5, 4, 2, 1)
    for prompt in prompts[:2]:
        stage.submit(prompt, 5)
    while not stage.rules.preemptions:
        stage.step()
    for prompt in prompts[2:]:
        stage.submit(prompt, 3)
    stage.drain()


@requirement("9.7")
def test_an_end_token_after_a_preemption(subject: Subject) -> None:
    """eos_token_id ends a request in the very step in which it comes back, too."""
    prompts = [3, 3, 8, 10, 0, 5], [4, 1, 12, 7, 12, 2, 9]
    first, second = (alone(Model(SMALL), prompt, 4) for prompt in prompts)
    # The younger one has three tokens when it is preempted.
    assert second[3] not in first[:3] + second[:3], "the check's own set-up holds"
    stage = Stage(subject, 5, 4, eos=second[3], sizes=SMALL, watch=PREEMPTION)
    play(stage, [(prompt, 7) for prompt in prompts])
    assert stage.rules.preemptions, "the check's own set-up holds"


# 9.8 prefix sharing

SHARING = ("tokens", "schedule", "memory", "sharing", "blocks_used", "tokens_fed")
BASE = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


@requirement("9.8")
def test_sharing_by_hand(subject: Subject) -> None:
    """Of 7 tokens in common, a block of 4 is shared and 2 to 5 of 9 are fed; of 9, two blocks, and one token is fed."""
    base = BASE[:10]
    for newcomer, blocks, least, most in (([*base[:7], 12, 12], 1, 2, 5), (base[:9], 2, 1, 1)):
        stage = Stage(subject, watch=("tokens",))
        stage.submit(base, 3)
        stage.step()
        stage.submit(newcomer, 2)
        before = len(stage.model.calls)
        stage.step()
        fed = sum(map(len, stage.model.calls[before:])) - 1
        what = f"a newcomer {newcomer}, while {base} runs, in blocks of 4"
        tables = [stage.cache.block_table(number) for number in (0, 1)]
        assert tables[0][:blocks] == tables[1][:blocks], (
            f"{what}: block tables {tables} came, the first {blocks} of them the same were wanted"
        )
        assert tables[0][blocks] != tables[1][blocks:][:1], f"{what}: block tables {tables} came, {blocks} are shared"
        assert least <= fed <= most, f"{what}: {fed} of its tokens were fed, {least} to {most} were wanted"
        stage.drain()


# Block size; then after how many steps a request comes, with which prompt (none: all tokens of the first one, of which
# the last is fed in this step), for how many.
SHARED: dict[str, tuple[int, list[tuple[int, list[int], int]]]] = {
    "the same prompt, a full block": (4, [(0, BASE[:8], 3), (1, BASE[:8], 2)]),
    "none, within the first block, up to a block's end": (
        4,
        [(0, BASE, 3), (1, [7, *BASE[1:]], 2), (0, [*BASE[:3], 7], 2), (0, [*BASE[:8], 7, 7], 2)],
    ),
    "a block that follows another beginning": (2, [(0, BASE, 3), (1, [7, 7, *BASE[2:]], 2)]),
    "a prompt that goes on with what was generated": (2, [(0, BASE[:5], 6), (3, [], 3)]),
    "a shorter one, a longer one": (2, [(0, BASE[:7], 5), (1, BASE[:5], 3), (1, BASE, 2)]),
    "the best of several": (
        2,
        [(0, BASE[:4], 4), (0, [*BASE[:6], 7], 4), (0, BASE[:5], 4), (0, [7, *BASE[1:]], 4), (1, BASE, 2)],
    ),
    "those that come together share nothing": (2, [(0, BASE, 3), (0, BASE, 3), (1, BASE, 2)]),
    "the source is finished": (4, [(0, BASE, 2), (1, BASE, 4), (2, BASE, 2)]),
    "blocks of one slot": (1, [(0, BASE, 3), (1, [*BASE[:6], 2], 3), (1, BASE, 2)]),
}


@requirement("9.8")
def test_newcomers_share_what_they_have_in_common(subject: Subject) -> None:
    """Blocks by reference, tokens fed once, and every answer its own."""
    for block_size, asked in SHARED.values():
        stage = Stage(subject, 60, block_size, sizes=SMALL, watch=SHARING)
        for steps, given, most in asked:
            for _ in range(steps):
                stage.step()
            stage.submit(given or [*stage.rules.requests[0].tokens, 7], most)
        stage.drain()


@requirement("9.8")
def test_sharers_are_preempted_and_come_back(subject: Subject) -> None:
    """Shared blocks count once, when it is asked who fits too; who comes back shares again."""
    apart_from_preemption(subject, partial(sharers, subject))


def sharers(subject: Subject) -> None:
    for num_blocks in (6, 7):
        stage = Stage(subject, num_blocks, 3, sizes=SMALL, watch=SHARING)
        for number, (prompt, most) in enumerate(((BASE[:7], 7), (BASE, 5), ([*BASE[:6], 7], 5))):
            stage.submit(prompt, most)
            if number != 1:
                stage.step()
        stage.drain()
    # Equal prompts, of which one comes back with its answer.
    play(Stage(subject, 4, 2, sizes=SMALL, watch=SHARING), [(BASE[:3], 6)] * 2)


@requirement("9.8")
def test_nothing_is_kept_for_later(subject: Subject) -> None:
    """Blocks are shared with those that run; once they are finished all is free, and a prompt is fed anew."""
    stage = Stage(subject, watch=SHARING)
    for _ in range(2):
        play(stage, [(BASE, 2)])
        free = stage.cache.allocator.num_free
        assert free == 40, f"cache.allocator.num_free once nothing is left: {free} came, 40 was wanted"
