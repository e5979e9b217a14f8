"""Temperature and top_p gone wrong (11.1)."""

from harness.model.bank import Mistake

TO_FLOAT64 = "    logits = logits.double()\n"
GREEDY = "    if temperature == 0:\n        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).double()\n"
SOFTMAX = "    probabilities = (logits / temperature).softmax(dim=-1)  # [..., V]\n"
ALL = "    if top_p == 1:\n        return probabilities\n"
SORT = "    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)\n"
BEFORE = "    before = ordered.cumsum(dim=-1) - ordered\n"
KEPT = "    kept = torch.zeros_like(probabilities).scatter(-1, tokens, ordered * (before < top_p))\n"
RETURN = "    return kept / kept.sum(dim=-1, keepdim=True)\n"

MISTAKES = [
    Mistake("probabilities_uniform", "11.1", "0.25 came", (TO_FLOAT64, TO_FLOAT64 + "    logits = logits * 0\n")),
    Mistake(
        "probabilities_zero", "11.1", "0 came", (SOFTMAX, SOFTMAX + "    return torch.zeros_like(probabilities)\n")
    ),
    Mistake("logits_returned", "11.1", "was wanted", (SOFTMAX, SOFTMAX + "    return logits\n")),
    Mistake(
        "temperature_left_out", "11.1", "the temperature is left out", (SOFTMAX, SOFTMAX.replace(" / temperature", ""))
    ),
    Mistake("temperature_multiplies", "11.1", "not multiplied", (SOFTMAX, SOFTMAX.replace("/", "*", 1))),
    Mistake("top_p_left_out", "11.1", "top_p is left out", (ALL, "    return probabilities\n")),
    Mistake(
        "top_p_before_temperature",
        "11.1",
        "the temperature comes before top_p",
        (SOFTMAX, "    probabilities = logits.softmax(dim=-1)\n"),
        (ALL, "    if top_p == 1:\n        return (logits / temperature).softmax(dim=-1)\n"),
        (RETURN, "    return (logits / temperature).masked_fill(kept == 0, -math.inf).softmax(dim=-1)\n"),
    ),
    Mistake(
        "top_p_drops_the_token_that_crosses",
        "11.1",
        "the token that makes the sum reach top_p is kept",
        (KEPT, KEPT.replace("(before < top_p)", "((before + ordered <= top_p) | (before == 0))")),
    ),
    Mistake("top_p_not_renormalised", "11.1", "the kept ones are divided by their sum", (RETURN, "    return kept\n")),
    Mistake(
        "top_p_renormalised_by_softmax",
        "11.1",
        "token_probabilities(log",
        (RETURN, "    return kept.softmax(dim=-1) * (kept > 0)\n"),
    ),
    Mistake(
        "top_p_keeps_the_last_of_equals",
        "11.1",
        "the smaller index is kept first",
        (
            SORT,
            """    ordered, tokens = probabilities.flip(-1).sort(dim=-1, descending=True, stable=True)
    tokens = probabilities.shape[-1] - 1 - tokens
""",
        ),
        only=True,
    ),
    Mistake(
        "top_p_keeps_all_equals",
        "11.1",
        "0 was wanted",
        (
            KEPT,
            """    least = ordered.masked_fill(before >= top_p, 2).amin(dim=-1, keepdim=True)
    kept = probabilities * (probabilities >= least)
""",
        ),
    ),
    Mistake(
        "top_p_1_drops_the_tail",
        "11.1",
        "top_p = 1 keeps all",
        (ALL, ""),
        only=True,
    ),
    Mistake(
        "top_p_near_1_keeps_all",
        "11.1",
        "what is not needed gets 0",
        (ALL, "    if top_p >= 0.9999:\n        return probabilities\n"),
        only=True,
    ),
    Mistake(
        "top_p_of_many_equals_unstable",
        "11.1",
        "the first 151 of equals",
        (
            SORT,
            SORT + "    if tokens.shape[-1] > 256:\n        ordered, tokens = probabilities.topk(tokens.shape[-1])\n",
        ),
        only=True,
    ),
    Mistake(
        "top_p_sums_over_all_rows",
        "11.1",
        "every row by itself",
        (BEFORE, "    before = ordered.flatten().cumsum(dim=0).view(ordered.shape) - ordered\n"),
    ),
    Mistake(
        "top_p_unsorted",
        "11.1",
        "token_probabilities(",
        (
            SORT,
            "    ordered, tokens = probabilities, torch.arange(probabilities.shape[-1]).expand(probabilities.shape)\n",
        ),
    ),
    Mistake(
        "kept_tokens_left_sorted",
        "11.1",
        "every row by itself",
        (KEPT, "    kept = ordered * (before < top_p)\n"),
    ),
    Mistake(
        "computed_in_the_logits_dtype",
        "11.1",
        "torch.float64 was wanted",
        (TO_FLOAT64, "    logits = logits + 0.0\n"),
    ),
    Mistake(
        "softmax_in_the_logits_dtype",
        "11.1",
        "float64 before anything is computed",
        (TO_FLOAT64, ""),
        (SOFTMAX, "    probabilities = (logits / temperature).softmax(dim=-1).double()\n"),
        only=True,
    ),
    Mistake(
        "temperature_in_the_logits_dtype",
        "11.1",
        "float64 before anything is computed",
        (TO_FLOAT64, ""),
        (SOFTMAX, "    probabilities = (logits / temperature).double().softmax(dim=-1)\n"),
        only=True,
    ),
    Mistake(
        "softmax_overflows",
        "11.1",
        "NaN",
        (
            SOFTMAX,
            """    powers = (logits / temperature).exp()
    probabilities = powers / powers.sum(dim=-1, keepdim=True)
""",
        ),
    ),
    Mistake(
        "greedy_spread_over_equals",
        "11.1",
        "one 1 in each row",
        (
            GREEDY,
            GREEDY.replace(
                "F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).double()",
                "(logits == logits.amax(dim=-1, keepdim=True)).double().div(1)",
            ),
        ),
    ),
    Mistake(
        "greedy_by_a_tiny_temperature",
        "11.1",
        "one 1 in each row",
        (GREEDY, "    temperature = temperature or 1e-6\n"),
    ),
    Mistake(
        "greedy_takes_the_last_of_equals",
        "11.1",
        "one 1 in each row",
        (
            GREEDY,
            """    if temperature == 0:
        last = logits.shape[-1] - 1 - logits.flip(-1).argmax(dim=-1)
        return F.one_hot(last, logits.shape[-1]).double()
""",
        ),
    ),
    Mistake(
        "greedy_compares_in_float32",
        "11.1",
        "the second one is the largest",
        (GREEDY, GREEDY.replace("logits.argmax", "logits.float().argmax")),
        only=True,
    ),
    Mistake("greedy_divides_by_zero", "11.1", "NaN", (GREEDY, "")),
    Mistake(
        "greedy_over_the_first_dimension",
        "11.1",
        "token_probabilities(",
        (GREEDY, GREEDY.replace("logits.argmax(dim=-1)", "logits.argmax(dim=0 if logits.dim() == 2 else -1)")),
    ),
    Mistake(
        "greedy_in_float32",
        "11.1",
        "torch.float64 was wanted",
        (GREEDY, GREEDY.replace(".double()", ".float()")),
    ),
    Mistake(
        "infinite_logits_made_finite",
        "11.1",
        "whose logit is -inf has a probability",
        (TO_FLOAT64, "    logits = logits.double().clamp(min=-20)\n"),
    ),
    Mistake(
        "logits_divided_in_place",
        "11.1",
        "written to",
        (SOFTMAX, "    probabilities = logits.div_(temperature).softmax(dim=-1)\n"),
        only=True,
    ),
    Mistake(
        "logits_shifted_in_place_when_cold",
        "11.1",
        "written to",
        (SOFTMAX, "    if temperature < 0.1:\n        logits -= logits.amax(dim=-1, keepdim=True)\n" + SOFTMAX),
        only=True,
    ),
]
