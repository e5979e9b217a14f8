"""Wrong answers to ex06 that measure something else than the peak of living storages (6.5)."""

from harness.model.bank import Mistake

METER = """    with _StorageMeter() as meter:
        result = func(*args, **kwargs)
    return result, meter.peak / 2**20
"""
KNOWN = "        self.known.update(_storages((args, kwargs)))  # these existed before\n"
FREED = "        self.alive -= size\n"
NEW = """            if storage not in self.known:
                self.known.add(storage)
                self.alive += storage.nbytes()
"""
STORAGES = "        for storage in _storages(result):\n"
FINALIZE = "                finalize(storage, self.freed, storage.nbytes())\n"
CALL = "        result = func(*args, **kwargs)\n"
PEAK = "meter.peak"

MISTAKES = [
    Mistake("peak_is_a_sum", "6.5", "a peak of", (FREED, "        pass\n"), only=True),
    Mistake(
        "everything_held_while_measuring",
        "6.5",
        "a peak of",
        (NEW, NEW + '                self.held = [*getattr(self, "held", []), result]\n'),
        only=True,
    ),
    Mistake("what_is_left_not_the_peak", "6.5", "a peak of", (PEAK, "meter.alive"), only=True),
    Mistake(
        "largest_tensor",
        "6.5",
        "a peak of",
        (
            "                self.peak = max(self.peak, self.alive)\n",
            "                self.peak = max(self.peak, storage.nbytes())\n",
        ),
        only=True,
    ),
    Mistake(
        "first_output_counted",
        "6.5",
        "a peak of",
        (STORAGES, "        for storage in itertools.islice(_storages(result), 1):\n"),
        only=True,
    ),
    Mistake(
        "lists_of_results_not_counted",
        "6.5",
        "come as a list",
        (STORAGES, "        for storage in _storages(() if isinstance(result, list) else result):\n"),
        only=True,
    ),
    Mistake(
        "addresses_never_forgotten",
        "6.5",
        "takes the place",
        ("        self.known: WeakSet[torch.UntypedStorage] = WeakSet()\n", "        self.known: set[int] = set()\n"),
        (KNOWN, "        self.known.update(storage.data_ptr() for storage in _storages((args, kwargs)))\n"),
        ("if storage not in", "if storage.data_ptr() not in"),
        ("known.add(storage)", "known.add(storage.data_ptr())"),
        only=True,
    ),
    Mistake(
        "views_counted",
        "6.5",
        "a peak of",
        ("            if storage not in self.known:\n", "            if True:\n"),
        only=True,
    ),
    Mistake("existing_tensors_counted", "6.5", "a peak of", (KNOWN, ""), only=True),
    Mistake(
        "existing_tensors_known_by_arguments_of_func",
        "6.5",
        "a peak of",
        (KNOWN, ""),
        (CALL, "        meter.known.update(_storages((args, kwargs)))\n" + CALL),
        only=True,
    ),
    Mistake(
        "existing_out_counted",
        "6.5",
        "a peak of",
        (KNOWN, "        self.known.update(_storages(args))\n"),
        only=True,
    ),
    Mistake(
        "elements_of_four_bytes",
        "6.5",
        "a peak of",
        (
            STORAGES,
            """        sizes = [t.numel() * 4 for t in tree_leaves(result) if isinstance(t, Tensor)]
        for storage, size in zip(_storages(result), sizes, strict=True):
""",
        ),
        ("                self.alive += storage.nbytes()\n", "                self.alive += size\n"),
        (FINALIZE, "                finalize(storage, self.freed, size)\n"),
        only=True,
    ),
    Mistake(
        "freed_with_the_tensor",
        "6.5",
        "a peak of",
        (
            STORAGES,
            """        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for storage, tensor in zip(_storages(result), tensors, strict=True):
""",
        ),
        (FINALIZE, "                finalize(tensor, self.freed, storage.nbytes())\n"),
        only=True,
    ),
    Mistake("bytes", "6.5", "a peak of", (" / 2**20", ""), only=True),
    Mistake("a_fifth_too_much", "6.5", "a peak of", (PEAK, "1.12 * meter.peak"), only=True),
    Mistake(
        "tracemalloc",
        "6.5",
        "a peak of",
        (
            METER,
            """    import tracemalloc

    tracemalloc.start()
    result = func(*args, **kwargs)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return result, peak / 2**20
""",
        ),
        only=True,
    ),
    Mistake(
        "process_memory",
        "6.5",
        "a peak of",
        (
            METER,
            """    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = func(*args, **kwargs)
    return result, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
""",
        ),
        only=True,
    ),
    Mistake("peak_alone", "6.5", "float came", ("return result, meter.peak", "return meter.peak"), only=True),
    Mistake(
        "peak_first",
        "6.5",
        "not a Python number",
        ("return result, meter.peak / 2**20", "return meter.peak / 2**20, result"),
        only=True,
    ),
    Mistake(
        "peak_is_a_tensor", "6.5", "is a Tensor", ("meter.peak / 2**20", "torch.tensor(meter.peak / 2**20)"), only=True
    ),
    Mistake(
        "result_lost",
        "6.5",
        "not what func returned",
        ("return result, meter", "return None, meter"),
        only=True,
    ),
    Mistake(
        "func_called_twice",
        "6.5",
        "a peak of",
        (CALL, CALL + "        func(*args, **kwargs)\n"),
        only=True,
    ),
    Mistake(
        "arguments_not_passed",
        "6.5",
        "arguments",
        (CALL, "        result = func(*args)\n"),
        only=True,
    ),
    Mistake(
        "error_swallowed",
        "6.5",
        "error of func",
        (
            CALL,
            """        try:
            result = func(*args, **kwargs)
        except Exception:
            result = None
""",
        ),
        only=True,
    ),
    Mistake(
        "error_wrapped",
        "6.5",
        "RuntimeError",
        (
            CALL,
            """        try:
            result = func(*args, **kwargs)
        except Exception as error:
            raise RuntimeError(str(error)) from error
""",
        ),
        only=True,
    ),
    Mistake(
        "runtime_error_made_anew",
        "6.5",
        "error of func",
        (
            CALL,
            """        try:
            result = func(*args, **kwargs)
        except RuntimeError as error:
            raise RuntimeError(*error.args) from error
""",
        ),
        only=True,
    ),
    Mistake(
        "stays_on_after_an_error",
        "6.5",
        "still on after func raises",
        (
            METER,
            """    meter = _StorageMeter()
    meter.__enter__()
    result = func(*args, **kwargs)
    meter.__exit__(None, None, None)
    return result, meter.peak / 2**20
""",
        ),
        only=True,
    ),
    Mistake(
        "one_meter_for_all_calls",
        "6.5",
        "a peak of",
        ("with _StorageMeter() as meter", "with _METER as meter"),
        ("def _storages(", "_METER = _StorageMeter()\n\n\ndef _storages("),
        only=True,
    ),
    Mistake(
        "measured_without_gradients",
        "6.5",
        "grad",
        ("    with _StorageMeter() as meter:\n", "    with torch.no_grad(), _StorageMeter() as meter:\n"),
        only=True,
    ),
    Mistake(
        "elements_not_storage",
        "6.5",
        "storage, not elements",
        (
            STORAGES,
            """        sizes = [t.numel() * t.element_size() for t in tree_leaves(result) if isinstance(t, Tensor)]
        for storage, size in zip(_storages(result), sizes, strict=True):
""",
        ),
        ("                self.alive += storage.nbytes()\n", "                self.alive += size\n"),
        (FINALIZE, FINALIZE.replace("storage.nbytes()", "size")),
        only=True,
    ),
    Mistake(
        "meter_stays_on_when_interrupted",
        "6.5",
        "still on after func is interrupted",
        (
            METER,
            """    meter = _StorageMeter()
    meter.__enter__()
    try:
        result = func(*args, **kwargs)
    except Exception:
        meter.__exit__(None, None, None)
        raise
    meter.__exit__(None, None, None)
    return result, meter.peak / 2**20
""",
        ),
        only=True,
    ),
]
