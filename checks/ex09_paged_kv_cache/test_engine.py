"""Memory (9.4), continuous batching (9.5), one call a step and the metrics (9.6), without need of what comes later."""

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from harness.testing import Subject, requirement

from .reference import TINY, Floats, Model, Sizes, alone, causal, contiguous
from .stage import Stage, distinct, play

# 9.4 memory follows use

MEMORY = ("memory",)


@requirement("9.4")
def test_requests_hold_what_they_have_fed(subject: Subject, rng: torch.Generator) -> None:
    """After each step ceil(fed / block_size) blocks; nothing for those that wait or are finished."""
    for block_size in (3, 1):
        stage = Stage(subject, 60, block_size, size=2, watch=MEMORY)
        play(stage, zip(distinct(rng, 4, 3, 1), (4, 1, 5), strict=True))
        free = stage.cache.allocator.num_free
        assert free == 60, f"cache.allocator.num_free at the end: {free} came, 60 was wanted"


@requirement("9.4")
def test_requests_that_end_early_hold_nothing(subject: Subject, rng: torch.Generator) -> None:
    """Blocks are free in the step in which eos_token_id comes, the first token too."""
    prompts = distinct(rng, 5, 3)
    answers = [alone(Model(TINY), prompt, 2) for prompt in prompts]
    for eos in (answers[0][0], answers[1][1]):
        stage = Stage(subject, 30, 2, eos=eos, watch=MEMORY)
        play(stage, [(prompt, 3) for prompt in prompts])


@requirement("9.4")
def test_nothing_beside_the_pool_stays_alive(subject: Subject, rng: torch.Generator) -> None:
    """keys and values are the only floating-point tensors between calls, always the same ones."""
    model, prompts = Model(Sizes(layers=1, heads=2, kv_heads=1, vocabulary=40)), distinct(rng, 9, 11)
    answers = [alone(model, prompt, 3) for prompt in prompts]
    modes: list[Callable[[], Any]] = [torch.enable_grad, torch.inference_mode, torch.no_grad]
    seen = Floats()
    with seen:
        engine = subject.Engine(model, num_blocks=20, block_size=4)
    pools = engine.cache.keys, engine.cache.values
    places, bytes_held = [pool.data_ptr() for pool in pools], sum(pool.nbytes for pool in pools)
    for number in range(4):
        if number < 2:
            engine.submit(prompts[number], 3)
        with seen, modes[number % 3]():
            came = engine.step()
        now = [pool.data_ptr() for pool in (engine.cache.keys, engine.cache.values)]
        assert now == places, "step(): cache.keys or cache.values is another tensor than before: the pool is made once"
        alive = seen.alive if seen.alive <= bytes_held + 1024 else collected(seen)
        assert alive <= bytes_held + 1024, (
            f"step(): {alive} bytes of floating-point tensors are alive; keys and values have {bytes_held}\n"
            "logits, keys of a step, or a graph are kept: does step run under no_grad?"
        )
        wanted = {one: answers[one][number - one] for one in (0, 1) if 0 <= number - one < 3}
        loosely(came, wanted)
    after_an_error(engine, model, seen, bytes_held)


def after_an_error(engine: Any, model: Model, seen: Floats, bytes_held: int) -> None:
    """Nobody holds the error, whose traceback holds the tensors of the call that failed."""
    engine.submit([8] * 60, 1)
    model.error = "at its end", RuntimeError("device lost")
    with seen, suppress(Exception):
        engine.step()
    alive = seen.alive if seen.alive <= bytes_held + 1024 else collected(seen)
    assert alive <= bytes_held + 1024, (
        f"step(), in which the model raises: {alive} bytes of floating-point tensors are alive after it; keys and "
        f"values have {bytes_held}\nwho keeps the error keeps its traceback, and with it the tensors of the call"
    )


def loosely(came: dict[int, int], wanted: dict[int, int]) -> None:
    """At least one token is right: more is 9.5's to ask for."""
    right = came == wanted or any(came.get(one) == token for one, token in wanted.items())
    assert right, f"step(): {came} came, {wanted} was wanted"


def collected(seen: Floats) -> int:
    """Bytes alive once Python's reference cycles are gone."""
    gc.collect()
    return seen.alive


@requirement("9.4")
def test_a_step_costs_the_same_in_any_pool(subject: Subject, rng: torch.Generator) -> None:
    """What a step makes of floating-point tensors does not grow with num_blocks."""
    prompts, made = distinct(rng, 5, 3), {}
    answers = [alone(Model(TINY), prompt, 2) for prompt in prompts]
    for num_blocks in (8, 160):
        model, seen = Model(TINY), Floats()
        engine = subject.Engine(model, num_blocks=num_blocks, block_size=4)
        for prompt in prompts:
            engine.submit(prompt, 2)
        with seen:
            came = [engine.step() for _ in range(2)]
        made[num_blocks] = seen.made
        for tokens, wanted in zip(came, zip(*answers, strict=True), strict=True):
            loosely(tokens, dict(enumerate(wanted)))
    assert made[160] <= made[8], (
        f"step(), twice: {made[8]} bytes of floating-point tensors are made with 8 blocks, {made[160]} with 160\n"
        "read the blocks that the tables name, and no others"
    )


@requirement("9.4")
def test_attention_costs_the_same_in_any_pool(subject: Subject, rng: torch.Generator) -> None:
    """What paged_attention makes of floating-point tensors does not grow with num_blocks."""
    q = torch.randn(4, 4, 3, generator=rng, dtype=torch.float64)
    tables, lens = torch.tensor([[2, 0], [1, 3]]), (torch.tensor([5, 7]), torch.tensor([1, 3]))
    made = {}
    for num_blocks in (8, 160):
        keys, values = (torch.randn(num_blocks, 4, 2, 3, generator=rng, dtype=torch.float64) for _ in range(2))
        with Floats() as seen:
            came = subject.paged_attention(q.clone(), keys, values, tables, *lens)
        k, v = (torch.cat([pool[[2, 0]].flatten(0, 1)[:5], pool[[1, 3]].flatten(0, 1)[:7]]) for pool in (keys, values))
        wanted = contiguous(q, k, v, causal([5, 7], [1, 3]))
        right = getattr(came, "shape", None) == wanted.shape and bool(torch.isclose(came, wanted, 1e-2, 1e-2).all())
        assert right, f"paged_attention with {num_blocks} blocks: not attention over the sequences' keys and values"
        made[num_blocks] = seen.made
    assert made[160] <= made[8], (
        f"paged_attention: {made[8]} bytes of floating-point tensors are made with 8 blocks, {made[160]} with 160\n"
        "read the blocks that the tables name, and no others"
    )


# 9.5 continuous batching

TOKENS = ("tokens",)


@requirement("9.5")
def test_every_request_gets_what_it_gets_alone(subject: Subject, rng: torch.Generator) -> None:
    """Prompts and answers of different lengths, all at once, by step."""
    stage = Stage(subject, watch=TOKENS)
    play(stage, zip(distinct(rng, 4, 7, 1, 5), (3, 1, 6, 4), strict=True))


@requirement("9.5")
def test_run_returns_all_that_is_finished(subject: Subject, rng: torch.Generator) -> None:
    """run goes on where step has begun, returns what is finished by then too, and can run again."""
    stage = Stage(subject, watch=TOKENS)
    prompts = distinct(rng, 4, 7, 1, 5)
    stage.run()
    for prompt, most in zip(prompts[:3], (1, 4, 3), strict=True):
        stage.submit(prompt, most)
    stage.step()
    stage.run()
    stage.submit(prompts[3], 2)
    stage.run()
    result = stage.engine.run()
    for answer in result.values():
        answer.append(99)
    result.clear()
    stage.run()


@requirement("9.5")
def test_requests_join_between_steps(subject: Subject, rng: torch.Generator) -> None:
    """A request that comes while others run, or once all are done, gets its own answer."""
    stage = Stage(subject, size=3, watch=TOKENS)
    for number, prompt in enumerate(distinct(rng, 4, 7, 1, 5, 2)):
        stage.submit(prompt, (4, 2, 3, 1, 3)[number])
        for _ in range((1, 0, 1, 9, 0)[number]):
            if stage.live:
                stage.step()
    stage.drain()


@requirement("9.5")
def test_the_end_token_ends(subject: Subject, rng: torch.Generator) -> None:
    """eos_token_id stays in the answer and ends it: as first token, later, or token 0; in a prompt it ends nothing."""
    prompts = distinct(rng, 5, 3)
    answers = [alone(Model(), prompt, 2) for prompt in prompts]
    for number, eos in enumerate((answers[0][0], answers[1][1], 0)):
        stage = Stage(subject, eos=eos, watch=TOKENS)
        for prompt in (*prompts, [eos, 7, eos]):
            stage.submit(prompt, 3)
        if number == 1:
            stage.run()
        stage.drain()


@requirement("9.5")
def test_token_0_ends(subject: Subject) -> None:
    """eos_token_id 0 is one, too."""
    model, prompts = Model(), [[first, 3] for first in range(8)]
    chosen = next((prompt for prompt in prompts if alone(model, prompt, 1) == [0]), None)
    with torch.no_grad():
        model.head[:, 0] += 0 if chosen else 1
    stage = Stage(subject, eos=0, watch=TOKENS)
    play(stage, [(chosen or prompts[0], 4)])


@requirement("9.5")
def test_new_weights_count(subject: Subject, rng: torch.Generator) -> None:
    """Once nothing is left the weights may change; the same prompts get the new model's answers."""
    stage = Stage(subject, watch=TOKENS)
    prompts = distinct(rng, 5, 3)
    play(stage, [(prompt, 3) for prompt in prompts])
    stage.new_weights(1)
    for prompt in prompts:
        stage.submit(prompt, 3)
    stage.run()


@requirement("9.5")
def test_near_logits_are_told_apart(subject: Subject, rng: torch.Generator) -> None:
    """The most probable token is found in the model's dtype: in float64 float32 would not tell the two best apart."""
    stage = Stage(subject, watch=TOKENS)
    with torch.no_grad():
        stage.model.head[:, 1::2] = stage.model.head[:, :-1:2] * (1 + 1e-8)
    stage.what += ", of a model whose logits are pairs, 1e-8 apart"
    play(stage, [(distinct(rng, 4)[0], 4)])


SIZES = {
    "one layer, one head": Sizes(layers=1, heads=1, kv_heads=1, head_dim=4),
    "three layers, a key-value head each": Sizes(layers=3, heads=3, kv_heads=3, head_dim=2, vocabulary=29),
    "one key-value head, float32": Sizes(heads=6, kv_heads=1, head_dim=2, dtype=torch.float32),
    "bfloat16": Sizes(dtype=torch.bfloat16),
}


@requirement("9.5")
def test_models_of_other_sizes(subject: Subject, rng: torch.Generator) -> None:
    """Layers, heads, vocabulary and dtype are the model's, in the pool too."""
    for words, sizes in SIZES.items():
        stage = Stage(subject, 20, 3, sizes=sizes, watch=TOKENS)
        wanted = (sizes.layers, 20, 3, sizes.kv_heads, sizes.head_dim), sizes.dtype
        for name in ("keys", "values"):
            pool = getattr(stage.cache, name)
            came = tuple(pool.shape), pool.dtype
            assert came == wanted, f"Engine(…).cache.{name}, {words}: {came} came, {wanted} was wanted"
        play(stage, zip(distinct(rng, 4, 7), (2, 2), strict=True))


@requirement("9.5")
def test_engines_beside_each_other(subject: Subject, rng: torch.Generator) -> None:
    """Two engines on two models, stepped in turn, answer each for its own; prompts are read once, and never changed."""
    stages = [Stage(subject, 20, 4, sizes=Sizes(vocabulary=count), watch=TOKENS) for count in (13, 17)]
    for stage, prompts in zip(stages, (distinct(rng, 5, 3), distinct(rng, 3, 6)), strict=True):
        for prompt in prompts:
            given = list(prompt)
            request = stage.submit(given, 3)
            assert given == prompt, f"submit: the prompt {prompt} was changed to {given}"
            given[0] = (given[0] + 1) % 13
            given.append(1)
            assert request.prompt == prompt, "the check's own set-up holds"
    for _ in range(2):
        for stage in stages:
            stage.step()
    for stage in stages:
        stage.drain()
    for stage in stages:
        stage.run()


@requirement("9.5")
def test_the_model_stays_as_it_is(subject: Subject, rng: torch.Generator) -> None:
    """Neither parameters, gradients and training flag nor torch's grad mode change."""
    stage = Stage(subject, watch=TOKENS)
    model = stage.model
    before = [parameter._version for parameter in model.parameters()]
    for prompt in distinct(rng, 5, 3):
        stage.submit(tuple(prompt), 2)
    stage.drain()
    assert torch.is_grad_enabled(), "step(): gradients are off after it"
    assert model.training, "step(): the model is in eval mode after it"
    assert [p._version for p in model.parameters()] == before, "step(): the model's parameters were written to"
    assert all(p.requires_grad and p.grad is None for p in model.parameters()), "step(): it has changed requires_grad"


# 9.6 one call a step

SCHEDULE = ("calls", "schedule")
METRICS = ("metrics",)


@requirement("9.6")
def test_one_call_feeds_all_that_run(subject: Subject, rng: torch.Generator) -> None:
    """Prompts whole in the step that admits them, then the last token of each; no call without anything to do."""
    stage = Stage(subject, watch=SCHEDULE)
    stage.step()
    play(stage, zip(distinct(rng, 4, 7, 1), (3, 1, 5), strict=True))
    stage.step()


@requirement("9.6")
def test_many_tokens_are_one_call(subject: Subject, rng: torch.Generator) -> None:
    """Long prompts that are admitted together are fed together."""
    stage = Stage(subject, 24, 12, watch=SCHEDULE)
    play(stage, [(prompt, 1) for prompt in distinct(rng, *[95] * 3)])


@requirement("9.6")
def test_newcomers_take_places_at_once(subject: Subject, rng: torch.Generator) -> None:
    """At most max_batch_size run; whoever waits longest takes the place of one that is finished, in the next step."""
    for size in (1, 3):
        stage = Stage(subject, size=size, watch=SCHEDULE)
        play(stage, zip(distinct(rng, 4, 2, 1, 5, 3)[: size + 2], (3, 1, 3, 2, 2), strict=False))


@requirement("9.6")
def test_requests_are_fed_as_they_come(subject: Subject, rng: torch.Generator) -> None:
    """A request that comes between steps is fed in the next one, beside those that run."""
    stage = Stage(subject, size=3, watch=SCHEDULE)
    for number, prompt in enumerate(distinct(rng, 4, 7, 1, 5, 2)):
        stage.submit(prompt, (4, 2, 3, 1, 2)[number])
        for _ in range((1, 0, 1, 8, 0)[number]):
            stage.step()
    stage.drain()


@requirement("9.6")
def test_the_first_that_does_not_fit_ends_admission(subject: Subject, rng: torch.Generator) -> None:
    """A newcomer needs blocks for all its tokens; smaller ones behind it wait with it. Nobody runs out of blocks."""
    stage = Stage(subject, 6, 4, watch=SCHEDULE)
    play(stage, zip(distinct(rng, 12, 14, 2, 3), (1, 2, 2, 1), strict=True))
    stage = Stage(subject, 2, 4, watch=SCHEDULE)
    play(stage, zip(distinct(rng, 4, 3), (1, 6), strict=True))
    stage = Stage(subject, 5, 4, watch=SCHEDULE)
    for prompt, most in zip(distinct(rng, 9, 8, 4), (3, 1, 1), strict=True):
        stage.submit(prompt, most)
        stage.step()
    stage.drain()


@requirement("9.6")
def test_metrics_tell_what_happened(subject: Subject, rng: torch.Generator) -> None:
    """After each step, and before the first, they are what a probe saw."""
    eos = alone(Model(), distinct(torch.Generator().manual_seed(4), 5)[0], 2)[1]
    stage = Stage(subject, 30, 3, size=2, eos=eos, watch=METRICS)
    stage.judge_metrics()
    stage.step()
    prompts = [distinct(torch.Generator().manual_seed(4), 5)[0], [11, 3], [12] * 7, [10, 1, 2]]
    for prompt, most in zip(prompts, (6, 1, 3, 4), strict=True):
        stage.submit(prompt, most)
    stage.judge_metrics()
    stage.drain()
    stage.submit([1, 2, 3], 2)
    stage.run()
    stage.engine.metrics().clear()
    stage.judge_metrics()
