"""Wrong answers to the comparison with full fine-tuning (5.6)."""

from harness.model.bank import Mistake

RUNS = '    return {"full": _train(SimpleTransformer(), steps), "lora": _train(lora, steps)}\n'
STEP = "        optimizer.step()\n"
STATE = "    state = [value for values in optimizer.state.values() for value in values.values()]\n"
TRAINED = '        "trainable_parameters": count_parameters(model)[1],\n'

MISTAKES = [
    Mistake(
        "step_counters_left_out",
        "5.6",
        "the step counters too",
        ("for value in values.values()]", 'for key, value in values.items() if key != "step"]'),
        only=True,
    ),
    Mistake(
        "state_read_before_the_first_step",
        "5.6",
        "optimizer_bytes",
        ("\n" + STATE, "\n"),
        ("    start = time.perf_counter()\n", "    start = time.perf_counter()\n" + STATE),
        only=True,
    ),
    Mistake("elements_for_bytes", "5.6", "optimizer_bytes", ("value.nbytes", "value.numel()"), only=True),
    Mistake(
        "state_by_formula",
        "5.6",
        "was seen",
        (
            '        "optimizer_bytes": sum(value.nbytes for value in state),\n',
            '        "optimizer_bytes": 8 * count_parameters(model)[1],\n',
        ),
        only=True,
    ),
    Mistake(
        "state_by_float32s_formula",
        "5.6",
        "models in torch.float64",
        (
            '        "optimizer_bytes": sum(value.nbytes for value in state),\n',
            '        "optimizer_bytes": sum(2 * 4 * p.numel() + 4 for p in optimizer.state) + 0 * len(state),\n',
        ),
        only=True,
    ),
    Mistake(
        "gradients_read_after_zero_grad",
        "5.6",
        "before any zero_grad",
        (STEP, STEP + "        optimizer.zero_grad()\n"),
        only=True,
    ),
    Mistake(
        "gradients_of_all_parameters",
        "5.6",
        "['lora']['gradient_bytes']",
        (
            '        "gradient_bytes": sum(gradient.nbytes for gradient in gradients),\n',
            '        "gradient_bytes": sum(p.nbytes for p in model.parameters()) + 0 * len(gradients),\n',
        ),
        only=True,
    ),
    Mistake("gradient_elements", "5.6", "gradient_bytes", ("gradient.nbytes", "gradient.numel()"), only=True),
    Mistake(
        "all_parameters_reported",
        "5.6",
        "['lora']['trainable_parameters']",
        (TRAINED, TRAINED.replace("[1]", "[0]")),
        only=True,
    ),
    Mistake(
        "sgd",
        "5.6",
        "no torch.optim.AdamW",
        (
            "AdamW(p for p in model.parameters() if p.requires_grad)",
            "SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)",
        ),
        only=True,
    ),
    Mistake("plain_adam", "5.6", "no torch.optim.AdamW", ("torch.optim.AdamW", "torch.optim.Adam"), only=True),
    Mistake(
        "both_runs_full",
        "5.6",
        "no run trains an adapted",
        ("_train(lora, steps)", "_train(SimpleTransformer(), steps)"),
        only=True,
    ),
    Mistake(
        "both_runs_adapted",
        "5.6",
        "every run trains an adapted model",
        (
            '"full": _train(SimpleTransformer(), steps)',
            '"full": _train(apply_lora_to_model(SimpleTransformer(), LoRAConfig()), steps)',
        ),
        only=True,
    ),
    Mistake(
        "norms_frozen_in_full",
        "5.6",
        "full fine-tuning trains them all",
        ('"full": _train(SimpleTransformer(), steps)', '"full": _train(SimpleTransformer().without_norms(), steps)'),
        (
            "    def forward(self, tokens: Tensor) -> Tensor:\n",
            '''    def without_norms(self) -> "SimpleTransformer":
        """Trains all but the norms."""
        self.norms.requires_grad_(False)
        return self

    def forward(self, tokens: Tensor) -> Tensor:
''',
        ),
        only=True,
    ),
    Mistake(
        "lora_run_trains_the_head",
        "5.6",
        "no run trains an adapted",
        ("_train(lora, steps)", "_train(SimpleTransformer().head_only(), steps)"),
        (
            "    def forward(self, tokens: Tensor) -> Tensor:\n",
            '''    def head_only(self) -> "SimpleTransformer":
        """Freezes all but the head."""
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        return self

    def forward(self, tokens: Tensor) -> Tensor:
''',
        ),
        only=True,
    ),
    Mistake(
        "runs_swapped",
        "5.6",
        "['full']",
        (RUNS, '    return {"lora": _train(SimpleTransformer(), steps), "full": _train(lora, steps)}\n'),
        only=True,
    ),
    Mistake("always_three_steps", "5.6", "the full run makes 3 steps", ("range(steps)", "range(3)"), only=True),
    Mistake("no_more_data", "5.6", "the full run makes 16 steps", ("range(steps)", "range(min(steps, 16))"), only=True),
    Mistake("one_step_too_few", "5.6", "run makes 2 steps", ("range(steps)", "range(max(1, steps - 1))"), only=True),
    Mistake("no_step_at_all", "5.6", "no optimizer of torch.optim made a step", (STEP, ""), only=True),
    Mistake(
        "invented_numbers",
        "5.6",
        "no optimizer of torch.optim made a step",
        (
            RUNS,
            (
                "    rows = [dict(trainable_parameters=n, optimizer_bytes=8 * n, gradient_bytes=4 * n, "
                "seconds_per_step=0.001) for n in (3197, 512)]\n"
                '    return dict(zip(("full", "lora"), rows, strict=True))\n'
            ),
        ),
        only=True,
    ),
    Mistake(
        "old_gradients_stay",
        "5.6",
        "['lora']['gradient_bytes']",
        (
            RUNS,
            """    model = SimpleTransformer()
    full = _train(model, steps)
    return {"full": full, "lora": _train(apply_lora_to_model(model, LoRAConfig()), steps)}
""",
        ),
        only=True,
    ),
    Mistake(
        "seconds_left_at_zero",
        "5.6",
        "a positive number was wanted",
        ('        "seconds_per_step": seconds / steps,\n', '        "seconds_per_step": 0.0 * seconds,\n'),
        only=True,
    ),
    Mistake(
        "rows_in_a_list",
        "5.6",
        "a dict with the dicts 'full' and 'lora'",
        (RUNS, "    return [_train(SimpleTransformer(), steps), _train(lora, steps)]\n"),
        only=True,
    ),
    Mistake(
        "a_smaller_model_for_lora",
        "5.6",
        "the same sizes are wanted",
        (
            "    lora = apply_lora_to_model(SimpleTransformer(),",
            "    lora = apply_lora_to_model(SimpleTransformer(d_model=8),",
        ),
        only=True,
    ),
    Mistake(
        "lora_run_trains_a_alone",
        "5.6",
        "its adapters hold 512",
        (
            "    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)\n",
            """    trained = [p for p in model.parameters() if p.requires_grad and p.shape != (16, 4)]
    optimizer = torch.optim.AdamW(trained)
""",
        ),
        (TRAINED, '        "trainable_parameters": sum(p.numel() for p in trained),\n'),
        (
            "    gradients = [p.grad for p in model.parameters() if p.grad is not None]\n",
            "    gradients = [p.grad for p in trained if p.grad is not None]\n",
        ),
        only=True,
    ),
    Mistake("milliseconds", "5.6", "seconds, for one step", ("seconds / steps", "1e3 * seconds / steps"), only=True),
    Mistake("seconds_of_all_steps", "5.6", "seconds, for one step", ("seconds / steps", "seconds"), only=True),
    Mistake(
        "measured_once",
        "5.6",
        "no optimizer of torch.optim made a step",
        (
            RUNS,
            """    _rows.update(_rows or {"full": _train(SimpleTransformer(), steps), "lora": _train(lora, steps)})
    return _rows
""",
        ),
        ("def _train", "_rows: dict[str, dict[str, float]] = {}\n\n\ndef _train"),
        only=True,
    ),
]
