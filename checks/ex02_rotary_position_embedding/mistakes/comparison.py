"""Wrong sinusoidal embeddings and wrong comparisons (2.5)."""

from harness.model.bank import Mistake

FREQUENCIES = "    frequencies = 10000 ** (-torch.arange(0, dim, 2) / dim)\n"
SINUS = "    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(start_dim=1)  # [seq_len, dim]\n"
DRAW = "    query, key = torch.randn(2, dim, generator=torch.Generator().manual_seed(0))\n"
TURNED = "    turned_query, turned_key = rope(query.expand(1, 1, rows, dim)), rope(key.expand(1, 1, rows, dim))\n"
CHANGE = "(s[shift:, shift:] - s[:seq_len, :seq_len]).abs().max().item()"
RESULT = f"    return {{name: {CHANGE} for name, s in scores.items()}}\n"
MEASURED = RESULT.replace("return", "measured =")

MISTAKES = [
    Mistake(
        "sines_then_cosines",
        "2.5",
        "even features",
        (SINUS, "    return torch.cat((angles.sin(), angles.cos()), dim=-1)\n"),
        only=True,
    ),
    Mistake(
        "cosines_before_sines",
        "2.5",
        "even features",
        (SINUS, SINUS.replace("(angles.sin(), angles.cos())", "(angles.cos(), angles.sin())")),
        only=True,
    ),
    Mistake(
        "sinusoidal_exponent_halved",
        "2.5",
        "even features",
        (FREQUENCIES, FREQUENCIES.replace("/ dim)", "/ (2 * dim))")),
        only=True,
    ),
    Mistake(
        "sinusoidal_frequency_per_feature",
        "2.5",
        "even features",
        (FREQUENCIES, "    frequencies = 10000 ** (-torch.arange(dim) / dim)\n"),
        (
            SINUS,
            """\
    even = torch.arange(dim) % 2 == 0
    return torch.where(even, angles.sin(), angles.cos())
""",
        ),
        only=True,
    ),
    Mistake(
        "sinusoidal_from_one",
        "2.5",
        "even features",
        ("torch.outer(torch.arange(seq_len), frequencies)", "torch.outer(torch.arange(1, seq_len + 1), frequencies)"),
        only=True,
    ),
    Mistake("mean_change", "2.5", "largest absolute change", (CHANGE, CHANGE.replace("max()", "mean()")), only=True),
    Mistake("signed_change", "2.5", "largest absolute change", (CHANGE, CHANGE.replace(".abs()", "")), only=True),
    Mistake(
        "equal_positions_only",
        "2.5",
        "largest absolute change",
        (CHANGE, CHANGE.replace(".abs()", ".diagonal().abs()")),
        only=True,
    ),
    Mistake(
        "key_shifted_alone",
        "2.5",
        "sinusoidal",
        (CHANGE, CHANGE.replace("s[shift:, shift:]", "s[:seq_len, shift:]")),
        only=True,
    ),
    Mistake(
        "rope_with_the_key_shifted_alone",
        "2.5",
        "rope",
        (CHANGE, CHANGE.replace("s[shift:, shift:]", "s[0 if name == 'rope' else shift :, shift:][:seq_len]")),
        only=True,
    ),
    Mistake(
        "comparison_turns_nothing",
        "2.5",
        "was anything turned",
        (TURNED, "    turned_query, turned_key = query.expand(1, 1, rows, dim), key.expand(1, 1, rows, dim)\n"),
        only=True,
    ),
    Mistake(
        "comparison_of_defaults_only",
        "2.5",
        "sinusoidal",
        (DRAW, "    seq_len, dim, shift = 64, 32, 16\n" + DRAW),
        only=True,
    ),
    Mistake(
        "comparison_of_other_draws",
        "2.5",
        "sinusoidal",
        (DRAW, DRAW.replace("manual_seed(0)", "manual_seed(1)")),
        only=True,
    ),
    Mistake("comparison_as_tensors", "2.5", "Python float", (CHANGE, CHANGE.replace(".item()", "")), only=True),
    Mistake(
        "comparison_as_a_tuple",
        "2.5",
        "a dict",
        (RESULT, f"    return tuple({CHANGE} for name, s in scores.items())\n"),
        only=True,
    ),
    Mistake(
        "sinusoidal_scaled",
        "2.5",
        "sinusoidal",
        ("(query + added) @ (key + added).mT", "(query + added) @ (key + added).mT / dim**0.5"),
        only=True,
    ),
    Mistake(
        "rope_of_a_constant",
        "2.5",
        "round",
        (RESULT, MEASURED + '    return {"rope": 1e-6, "sinusoidal": measured["sinusoidal"]}\n'),
        only=True,
    ),
    Mistake(
        "rope_of_a_crooked_constant",
        "2.5",
        "for every seq_len",
        (RESULT, MEASURED + '    return measured | {"rope": 2.0**-20}\n'),
        only=True,
    ),
    Mistake("rope_rounded", "2.5", "round", (CHANGE, f"round({CHANGE}, 7)"), only=True),
    Mistake(
        "comparison_remembered",
        "2.5",
        "the same arguments",
        (RESULT, MEASURED + "    return REMEMBERED.setdefault((seq_len, dim, shift), measured)\n"),
        (
            "def compare_position_embeddings(",
            "REMEMBERED: dict[tuple[int, int, int], dict[str, float]] = {}\n\n\ndef compare_position_embeddings(",
        ),
        only=True,
    ),
    Mistake(
        "sinusoidal_table_handed_out_again",
        "2.5",
        "even features",
        (
            SINUS,
            SINUS.replace("return ", "table = ") + "    return EMBEDDINGS.setdefault((seq_len, dim), table)\n",
        ),
        (
            "def sinusoidal_position_embedding(",
            "EMBEDDINGS: dict[tuple[int, int], Tensor] = {}\n\n\ndef sinusoidal_position_embedding(",
        ),
        only=True,
    ),
    Mistake(
        "sinusoidal_table_handed_out_where_no_cast_copies_it",
        "2.5",
        "even features",
        (
            SINUS,
            SINUS.replace("return ", "table = ")
            + "    kept = EMBEDDINGS.setdefault((seq_len, dim), table.double())\n"
            + "    return kept.to(torch.get_default_dtype())\n",
        ),
        (
            "def sinusoidal_position_embedding(",
            "EMBEDDINGS: dict[tuple[int, int], Tensor] = {}\n\n\ndef sinusoidal_position_embedding(",
        ),
        only=True,
    ),
    Mistake(
        "pairs_of_different_blocks_left_out",
        "2.5",
        "largest absolute change",
        (
            RESULT,
            """\
    moved = {name: s[shift:, shift:] - s[:seq_len, :seq_len] for name, s in scores.items()}
    blocks = [slice(first, first + 256) for first in range(0, seq_len, 256)]
    return {name: max(s[block, block].abs().max().item() for block in blocks) for name, s in moved.items()}
""",
        ),
        only=True,
    ),
    Mistake(
        "comparison_remembered_by_its_rows",
        "2.5",
        "other sizes were compared before",
        (RESULT, MEASURED + "    return dict(REMEMBERED.setdefault((seq_len + shift, dim), measured))\n"),
        (
            "def compare_position_embeddings(",
            "REMEMBERED: dict[tuple[int, int], dict[str, float]] = {}\n\n\ndef compare_position_embeddings(",
        ),
        only=True,
    ),
    Mistake(
        "comparison_remembered_without_its_shift",
        "2.5",
        "other sizes were compared before",
        (RESULT, MEASURED + "    return dict(REMEMBERED.setdefault((seq_len, dim), measured))\n"),
        (
            "def compare_position_embeddings(",
            "REMEMBERED: dict[tuple[int, int], dict[str, float]] = {}\n\n\ndef compare_position_embeddings(",
        ),
        only=True,
    ),
    Mistake(
        "sinusoidal_table_kept_by_its_dim",
        "2.5",
        "sizes asked for before",
        (SINUS, SINUS.replace("return ", "table = ") + "    return EMBEDDINGS.setdefault(dim, table).clone()\n"),
        (
            "def sinusoidal_position_embedding(",
            "EMBEDDINGS: dict[int, Tensor] = {}\n\n\ndef sinusoidal_position_embedding(",
        ),
    ),
    Mistake(
        "sinusoidal_table_kept_by_its_length",
        "2.5",
        "sizes asked for before",
        (SINUS, SINUS.replace("return ", "table = ") + "    return EMBEDDINGS.setdefault(seq_len, table).clone()\n"),
        (
            "def sinusoidal_position_embedding(",
            "EMBEDDINGS: dict[int, Tensor] = {}\n\n\ndef sinusoidal_position_embedding(",
        ),
        only=True,
    ),
    Mistake(
        "rope_remembered_by_its_dim",
        "2.5",
        "for every seq_len",
        (RESULT, MEASURED + '    return measured | {"rope": ROPES.setdefault(dim, measured["rope"])}\n'),
        (
            "def compare_position_embeddings(",
            "ROPES: dict[int, float] = {}\n\n\ndef compare_position_embeddings(",
        ),
        only=True,
    ),
]
