"""Wrong answers to ex06 that reach torch.utils.checkpoint (6.10)."""

from harness.model.bank import Mistake

IMPORTS = "import torch\nfrom torch import Tensor, nn\n"
CHECKPOINT = """    replay = _Replay(function, args, kwargs)
    with saved_tensors_hooks(replay.pack, replay.unpack):
        return function(*args, **kwargs)
"""

MISTAKES = [
    Mistake(
        "prebuilt",
        "6.10",
        "reached checkpoint",
        (
            CHECKPOINT,
            """    from torch.utils.checkpoint import checkpoint as prebuilt

    return prebuilt(function, *args, use_reentrant=False, **kwargs)
""",
        ),
        only=True,
    ),
    Mistake(
        "prebuilt_bound_early",
        "6.10",
        "reached checkpoint",
        (IMPORTS, IMPORTS + "from torch.utils.checkpoint import checkpoint as prebuilt\n"),
        (CHECKPOINT, "    return prebuilt(function, *args, use_reentrant=False, **kwargs)\n"),
        only=True,
    ),
    Mistake(
        "prebuilt_from_below",
        "6.10",
        "reached",
        (
            CHECKPOINT,
            """\
    from torch.utils.checkpoint import _checkpoint_without_reentrant_generator as generator, noop_context_fn

    steps = generator(function, True, noop_context_fn, "none", False, True, *args, **kwargs)
    next(steps)
    result = function(*args, **kwargs)
    next(steps, None)
    return result
""",
        ),
        only=True,
    ),
    Mistake(
        "prebuilt_if_it_works",
        "6.10",
        "reached checkpoint",
        (
            CHECKPOINT,
            """    import torch.utils.checkpoint

    try:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)
    except RuntimeError:
        pass
"""
            + CHECKPOINT,
        ),
        only=True,
    ),
    Mistake(
        "prebuilt_for_structures",
        "6.10",
        "structures",
        (
            CHECKPOINT,
            """    import torch.utils.checkpoint

    if kwargs:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)
"""
            + CHECKPOINT,
        ),
        only=True,
    ),
    Mistake(
        "prebuilt_for_nested",
        "6.10",
        "nested",
        (
            CHECKPOINT,
            """    import torch.utils.checkpoint

    if isinstance(function, CheckpointWrapper):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)
"""
            + CHECKPOINT,
        ),
        only=True,
    ),
    Mistake(
        "prebuilt_from_the_second_call_on",
        "6.10",
        "reached checkpoint",
        (
            CHECKPOINT,
            """    import torch.utils.checkpoint

    if vars(function).setdefault("warm", False):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)
    vars(function)["warm"] = True
"""
            + CHECKPOINT,
        ),
        only=True,
    ),
    Mistake(
        "prebuilt_in_float32",
        "6.10",
        "reached checkpoint",
        (
            CHECKPOINT,
            """    import torch.utils.checkpoint

    if any(p.dtype == torch.float32 for p in function.parameters()) and not torch.is_autocast_enabled("cpu"):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)
"""
            + CHECKPOINT,
        ),
        only=True,
    ),
    Mistake(
        "prebuilt_function",
        "6.10",
        "reached",
        (
            CHECKPOINT,
            """    from torch.utils.checkpoint import CheckpointFunction

    return CheckpointFunction.apply(lambda *a: function(*a, **kwargs), True, *args)
""",
        ),
    ),
]
