"""Numbers of the benchmark that are wrong or not measured (3.8)."""

from harness.model.bank import Mistake

ROW_PER_LENGTH = "    return [_compare(length, d_model, num_heads) for length in seq_lengths]\n"
X = "    x = torch.randn(1, length, d_model)\n"
STANDARD_SECONDS = '        "standard_seconds": _seconds(standard),\n'
FLASH_SECONDS = '        "flash_seconds": _seconds(flash),\n'
STANDARD_PEAK = '        "standard_peak_bytes": peak_bytes(standard),\n'
FLASH_PEAK = '        "flash_peak_bytes": peak_bytes(flash),\n'
ERROR = '        "max_abs_error": (standard() - flash()).abs().max().item(),\n'

MISTAKES = [
    Mistake(
        "other_weights",
        "3.8",
        "same weights",
        ("partial(attention, x)", "partial(FlashAttention(d_model, num_heads), x)"),
        only=True,
    ),
    Mistake(
        "output_projection_left_out_of_standard",
        "3.8",
        "same weights",
        (
            "return attention.o_proj((weights @ v).transpose(1, 2).flatten(start_dim=2))  # [B, N, D]",
            "return (weights @ v).transpose(1, 2).flatten(start_dim=2)",
        ),
        only=True,
    ),
    Mistake(
        "another_input",
        "3.8",
        "same weights",
        ("partial(attention, x)", "partial(attention, torch.randn_like(x))"),
        only=True,
    ),
    Mistake(
        "standard_against_itself",
        "3.8",
        "rounding",
        (ERROR, '        "max_abs_error": (standard() - standard()).abs().max().item(),\n'),
        only=True,
    ),
    Mistake("invented_error", "3.8", "not 1", (ERROR, '        "max_abs_error": 1e-6,\n'), only=True),
    Mistake("mean_error", "3.8", "largest absolute difference", (ERROR, ERROR.replace(".max()", ".mean()")), only=True),
    Mistake(
        "signed_error",
        "3.8",
        "largest absolute difference",
        (ERROR, '        "max_abs_error": max((flash() - standard()).max().item(), 1e-9),\n'),
        only=True,
    ),
    Mistake("error_as_a_tensor", "3.8", "not a Python number", (ERROR, ERROR.replace(".item()", "")), only=True),
    Mistake(
        "error_of_zero_inputs", "3.8", "max_abs_error", (X, "    x = torch.zeros(1, length, d_model)\n"), only=True
    ),
    Mistake(
        "invented_times",
        "3.8",
        "not measured",
        (STANDARD_SECONDS, '        "standard_seconds": 0.001,\n'),
        (FLASH_SECONDS, '        "flash_seconds": 0.001,\n'),
        only=True,
    ),
    Mistake(
        "times_swapped",
        "3.8",
        "flash_seconds is",
        (STANDARD_SECONDS, '        "standard_seconds": _seconds(flash),\n'),
        (FLASH_SECONDS, '        "flash_seconds": _seconds(standard),\n'),
        only=True,
    ),
    Mistake("milliseconds", "3.8", "in seconds", ("return min(times)", "return min(times) * 1000"), only=True),
    Mistake(
        "no_time_measured",
        "3.8",
        "flash_seconds is",
        ("        function()\n        times.append", "        times.append"),
        only=True,
    ),
    Mistake(
        "peaks_swapped",
        "3.8",
        "flash_peak_bytes is",
        (STANDARD_PEAK, '        "standard_peak_bytes": peak_bytes(flash),\n'),
        (FLASH_PEAK, '        "flash_peak_bytes": peak_bytes(standard),\n'),
        only=True,
    ),
    Mistake(
        "peak_of_the_weights",
        "3.8",
        "flash_peak_bytes is",
        (FLASH_PEAK, '        "flash_peak_bytes": sum(p.numel() * 4 for p in attention.parameters()),\n'),
        only=True,
    ),
    Mistake(
        "peak_of_one_head",
        "3.8",
        "standard_peak_bytes is",
        (STANDARD_PEAK, '        "standard_peak_bytes": 4 * length**2,\n'),
        only=True,
    ),
    Mistake(
        "one_block_in_the_benchmark",
        "3.8",
        "flash_peak_bytes is",
        ("attention = FlashAttention(d_model, num_heads)", "attention = FlashAttention(d_model, num_heads, length)"),
        only=True,
    ),
    Mistake(
        "gradients_recorded",
        "3.8",
        "gradients are recorded",
        ("@torch.no_grad()\ndef _compare", "def _compare"),
        only=True,
    ),
    Mistake("batch_of_two", "3.8", "flash_peak_bytes", (X, "    x = torch.randn(2, length, d_model)\n"), only=True),
    Mistake(
        "a_length_twice_is_one_row", "3.8", "rows came", ("seq_lengths]", "dict.fromkeys(seq_lengths)]"), only=True
    ),
    Mistake("rows_sorted", "3.8", "rows for", ("seq_lengths]", "sorted(seq_lengths)]"), only=True),
    Mistake(
        "sizes_ignored",
        "3.8",
        "peak_bytes is",
        (ROW_PER_LENGTH, ROW_PER_LENGTH.replace("d_model, num_heads)", "512, 8)")),
    ),
    Mistake(
        "rows_remembered_by_length",
        "3.8",
        "measured in this call",
        (
            ROW_PER_LENGTH,
            """\
    kept = benchmark_attention.__dict__.setdefault("kept", {})
    for length in seq_lengths:
        if (length, d_model) not in kept:
            kept[length, d_model] = _compare(length, d_model, num_heads)
    return [kept[length, d_model] for length in seq_lengths]
""",
        ),
        only=True,
    ),
    Mistake(
        "other_default_sizes",
        "3.8",
        "[1, N, 512]",
        (ROW_PER_LENGTH, "    d_model = 256 if d_model == 512 else d_model\n" + ROW_PER_LENGTH),
        only=True,
    ),
    Mistake(
        "standard_seconds_of_flash",
        "3.8",
        "standard_seconds rose",
        (STANDARD_SECONDS, '        "standard_seconds": _seconds(flash),\n'),
        only=True,
    ),
    Mistake(
        "seconds_of_all_repeats",
        "3.8",
        "of one call",
        ("repeats: int = 3", "repeats: int = 20"),
        ("return min(times)", "return sum(times)"),
        only=True,
    ),
    Mistake(
        "standard_peak_by_formula",
        "3.8",
        "never said",
        (STANDARD_PEAK, '        "standard_peak_bytes": 3 * 4 * num_heads * length**2,\n'),
        only=True,
    ),
    Mistake(
        "four_heads_by_default",
        "3.8",
        "8 was wanted",
        (ROW_PER_LENGTH, "    num_heads = 4 if num_heads == 8 else num_heads\n" + ROW_PER_LENGTH),
        only=True,
    ),
]
