"""Wrong answers to the buckets (10.3)."""

from harness.model.bank import Mistake

ORDER = "reversed([p for p in module.parameters() if p.requires_grad])"
CUT = "        if bucket and (size + parameter.nbytes > cap or parameter.dtype != bucket[0].dtype):\n"
FLAT = "        flat = torch.cat([*(gradient.flatten() for gradient in gradients), present])\n"
RESET = "        self._reset()\n\n    def _reset"

MISTAKES = [
    Mistake(
        "cap_in_megabytes", "10.3", "the cap is 48 bytes", ("bucket_cap_mb * 2**20", "bucket_cap_mb * 10**6"), only=True
    ),
    Mistake(
        "cap_in_whole_bytes",
        "10.3",
        "the cap is 47.6 bytes",
        ("bucket_cap_mb * 2**20", "round(bucket_cap_mb * 2**20)"),
        only=True,
    ),
    Mistake(
        "registration_order",
        "10.3",
        "the rule gives",
        (ORDER, "[p for p in module.parameters() if p.requires_grad]"),
    ),
    Mistake(
        "smallest_first",
        "10.3",
        "the rule gives",
        (ORDER, "sorted([p for p in module.parameters() if p.requires_grad], key=lambda p: p.numel())"),
    ),
    Mistake("an_exact_fit_is_cut", "10.3", "the cap is 48 bytes", (CUT, CUT.replace("> cap", ">= cap")), only=True),
    Mistake(
        "cut_after_the_cap",
        "10.3",
        "the rule gives",
        (CUT, CUT.replace("size + parameter.nbytes > cap", "size >= cap")),
        only=True,
    ),
    Mistake(
        "counted_in_numbers",
        "10.3",
        "the rule gives",
        ("        size += parameter.nbytes\n", "        size += parameter.numel() * 4\n"),
        (CUT, CUT.replace("parameter.nbytes", "parameter.numel() * 4")),
    ),
    Mistake(
        "by_dtype_first",
        "10.3",
        "the rule gives",
        (
            ORDER,
            "sorted(reversed([p for p in module.parameters() if p.requires_grad]), key=lambda p: p.element_size())",
        ),
    ),
    Mistake(
        "one_dtype_for_all",
        "10.3",
        "a gradient with dtype",
        (CUT, "        if bucket and size + parameter.nbytes > cap:\n"),
    ),
    Mistake("one_for_each_parameter", "10.3", "the rule gives", (CUT, "        if bucket:\n"), wasteful=True),
    Mistake("one_for_all", "10.3", "the rule gives", (CUT, CUT.replace("size + parameter.nbytes > cap or ", ""))),
    Mistake(
        "frozen_counted",
        "10.3",
        "the rule gives",
        (ORDER, "reversed(list(module.parameters()))"),
        (
            "        bucket.append(parameter)\n        size += parameter.nbytes\n",
            (
                "        if parameter.requires_grad:\n"
                "            bucket.append(parameter)\n"
                "        size += parameter.nbytes\n"
            ),
        ),
        (CUT, CUT),
        only=True,
    ),
    Mistake(
        "tied_twice",
        "10.3",
        "bucket 0 is p3 and p2",
        (ORDER, "reversed([p for _, p in module.named_parameters(remove_duplicate=False) if p.requires_grad])"),
    ),
    Mistake(
        "tied_where_registered_last",
        "10.3",
        "the rule gives",
        (
            "    for parameter in " + ORDER + ":\n",
            (
                "    every = reversed(list(module.named_parameters(remove_duplicate=False)))\n"
                "    for parameter in dict.fromkeys(p for _, p in every if p.requires_grad):\n"
            ),
        ),
        only=True,
    ),
    Mistake("the_cap_is_ignored", "10.3", "the rule gives", ("bucket_cap_mb * 2**20", "25 * 2**20")),
    Mistake(
        "the_default_is_1_mib",
        "10.3",
        "25.0 was wanted",
        ("bucket_cap_mb: float = 25.0", "bucket_cap_mb: float = 1.0"),
        only=True,
    ),
    Mistake(
        "the_default_is_none_for_10_mib",
        "10.3",
        "without a cap",
        ("bucket_cap_mb: float = 25.0", "bucket_cap_mb: float | None = None"),
        ("bucket_cap_mb * 2**20", "(bucket_cap_mb or 10.0) * 2**20"),
        only=True,
    ),
    Mistake(
        "a_larger_parameter_takes_others",
        "10.3",
        "the rule gives",
        ("        size += parameter.nbytes\n", "        size += parameter.nbytes if parameter.nbytes <= cap else 0\n"),
        only=True,
    ),
    Mistake(
        "padded_to_eight",
        "10.3",
        "were wanted",
        (FLAT, FLAT + "        flat = torch.cat([flat, flat.new_zeros(-flat.numel() % 8)])\n"),
        (
            "            *averages, counts = flat.split([*(parameter.numel() for parameter in bucket), len(bucket)])\n",
            (
                "            sizes = [*(parameter.numel() for parameter in bucket), len(bucket)]\n"
                "            *averages, counts = flat[: sum(sizes)].split(sizes)\n"
            ),
        ),
        wasteful=True,
    ),
    Mistake(
        "sent_in_float64",
        "10.3",
        "torch.float64 came",
        (FLAT, FLAT + "        flat = flat.double()\n"),
        (
            "parameter.grad = average.view(parameter.shape)",
            "parameter.grad = average.view(parameter.shape).to(parameter.dtype)",
        ),
        only=True,
    ),
    Mistake(
        "a_barrier_in_every_step",
        "10.3",
        "nothing else is sent",
        (RESET, "        dist.barrier()\n" + RESET),
    ),
    Mistake(
        "counts_by_a_gather",
        "10.3",
        "nothing else is sent",
        (RESET, "        dist.all_gather_object([None] * dist.get_world_size(), len(self._running))\n" + RESET),
    ),
    Mistake(
        "a_second_round",
        "10.3",
        "all_reduce",
        ("            work.wait()\n", "            work.wait()\n            dist.all_reduce(flat.clone())\n"),
    ),
]
