"""Draws, tests and corrections gone wrong (11.2)."""

from harness.model.bank import Mistake

TEST = "        if not uniform() * float(q[token]) < float(p[token]):\n"
REST = "            rest = (p - q).clamp(min=0)\n"
LAST = "            last = rest / rest.sum() if rest.any() else p\n"
CORRECT = "            return [*draft_tokens[:i], draw(last, uniform())]\n"
BONUS = "    return [*draft_tokens, draw(target_probs[len(draft_tokens)], uniform())]\n"
ROWS = "        p, q = target_probs[i], draft_probs[i]  # [V]\n"
LOOP = "    for i, token in enumerate(draft_tokens):\n"
EXCEEDS = "    exceeds = probabilities.cumsum(dim=-1) > u\n"

MISTAKES = [
    Mistake("always_accept", "11.2", "every draft token is accepted", (TEST, "        if uniform() < 0:\n")),
    Mistake(
        "accepts_where_p_is_at_least_q",
        "11.2",
        "not just where p ≥ q",
        (TEST, "        if uniform() < 0 or p[token] < q[token]:\n"),
    ),
    Mistake(
        "ratio_turned_round",
        "11.2",
        "not q/p",
        (TEST, "        if not uniform() * float(p[token]) < float(q[token]):\n"),
    ),
    Mistake("accepts_with_p", "11.2", "not p", (TEST, "        if not uniform() < float(p[token]):\n")),
    Mistake("always_reject", "11.2", "comes with probability", (TEST, "        if uniform() >= 0:\n")),
    Mistake(
        "resample_from_p",
        "11.2",
        "from (p - q)+, not from p",
        (LAST, "            last = p if rest.any() else p\n"),
    ),
    Mistake("resample_from_q", "11.2", "not from q", (REST, "            rest = q\n")),
    Mistake("residual_of_q_minus_p", "11.2", "not from (q - p)+", (REST, "            rest = (q - p).clamp(min=0)\n")),
    Mistake("absolute_difference", "11.2", "not from |p - q|", (REST, "            rest = (p - q).abs()\n")),
    Mistake(
        "residual_not_normalised",
        "11.2",
        "(p - q)+ is divided by its sum",
        (LAST, "            last = rest if rest.any() else p\n"),
        only=True,
    ),
    Mistake(
        "residual_by_softmax",
        "11.2",
        "comes with probability",
        (LAST, "            last = rest.softmax(dim=-1)\n"),
    ),
    Mistake(
        "residual_without_the_rejected_token_only",
        "11.2",
        "comes with probability",
        (REST, "            rest = p.clone()\n            rest[token] = 0\n"),
    ),
    Mistake(
        "one_number_for_test_and_draw",
        "11.2",
        "takes a number of its own",
        (TEST, "        number = uniform()\n        if not number * float(q[token]) < float(p[token]):\n"),
        (CORRECT, CORRECT.replace("uniform()", "number")),
    ),
    Mistake(
        "one_number_for_all_tests",
        "11.2",
        "takes a number of its own",
        (LOOP, "    number = uniform()\n" + LOOP),
        (TEST, TEST.replace("uniform()", "number")),
    ),
    Mistake(
        "the_last_test_s_number_for_the_bonus",
        "11.2",
        "takes a number of its own",
        (LOOP, "    number = 0.5\n" + LOOP),
        (TEST, "        number = uniform()\n        if not number * float(q[token]) < float(p[token]):\n"),
        (
            BONUS,
            """    last = target_probs[len(draft_tokens)]
    return [*draft_tokens, draw(last, number if draft_tokens else uniform())]
""",
        ),
    ),
    Mistake(
        "tokens_behind_a_rejection_kept",
        "11.2",
        "comes with probability",
        (CORRECT, CORRECT.replace("draw(last, uniform())]", "draw(last, uniform()), *draft_tokens[i + 1 :]]")),
    ),
    Mistake(
        "a_rejected_token_is_passed_over",
        "11.2",
        "comes with probability",
        (CORRECT, "            continue\n"),
    ),
    Mistake(
        "stops_at_a_rejection_without_a_token",
        "11.2",
        "comes with probability",
        (CORRECT, "            return list(draft_tokens[:i])\n"),
    ),
    Mistake(
        "no_bonus",
        "11.2",
        "a bonus from the last row",
        (BONUS, "    return list(draft_tokens) or [draw(target_probs[0], uniform())]\n"),
    ),
    Mistake(
        "bonus_of_wrong_row",
        "11.2",
        "the bonus comes from the last row",
        (BONUS, BONUS.replace("target_probs[len(draft_tokens)]", "target_probs[max(len(draft_tokens) - 1, 0)]")),
    ),
    Mistake(
        "bonus_of_the_first_row",
        "11.2",
        "comes with probability",
        (BONUS, BONUS.replace("target_probs[len(draft_tokens)]", "target_probs[0]")),
    ),
    Mistake(
        "all_judged_by_the_first_row",
        "11.2",
        "comes with probability",
        (ROWS, "        p, q = target_probs[i], draft_probs[0]\n"),
    ),
    Mistake(
        "judged_by_the_row_behind",
        "11.2",
        "comes with probability",
        (ROWS, "        p, q = target_probs[i + 1], draft_probs[i]\n"),
    ),
    Mistake(
        "a_bonus_after_a_correction",
        "11.2",
        "comes with probability",
        (
            CORRECT,
            CORRECT.replace("draw(last, uniform())]", "draw(last, uniform()), draw(target_probs[i + 1], uniform())]"),
        ),
    ),
    Mistake(
        "draws_by_torch",
        "11.2",
        "torch's stream was drawn from",
        (CORRECT, CORRECT.replace("draw(last, uniform())", "int(torch.multinomial(last, 1))")),
    ),
    Mistake(
        "tests_by_python_s_random",
        "11.2",
        "Python's random was drawn from",
        (TEST, TEST.replace("uniform()", "random.random()")),
    ),
    Mistake(
        "too_many_numbers",
        "11.2",
        "at most 2·k + 1",
        (LOOP, "    for _ in range(2 * len(draft_tokens) + 2):\n        uniform()\n" + LOOP),
    ),
    Mistake("two_numbers_for_a_test", "11.2", "at most k + 1 = 2", (TEST, "        uniform()\n" + TEST)),
    Mistake(
        "a_test_s_number_rescaled_for_the_draw",
        "11.2",
        "takes a number of its own",
        (
            TEST,
            """        number, ratio = uniform(), float(p[token]) / float(q[token])
        if not number < ratio:
""",
        ),
        (CORRECT, CORRECT.replace("uniform()", "(number - ratio) / (1 - ratio) if i else uniform()")),
        only=True,
    ),
    Mistake(
        "a_small_residual_taken_for_none",
        "11.2",
        "however small its sum",
        (LAST, LAST.replace("rest.any()", "rest.sum() > 1e-6")),
        only=True,
    ),
    Mistake(
        "draws_with_u_in_float32",
        "11.2",
        "the first whose cumulative one exceeds u",
        (EXCEEDS, EXCEEDS.replace("> u", "> torch.tensor(u, device=probabilities.device)")),
    ),
    Mistake(
        "draws_the_most_probable", "11.2", "draw(", (EXCEEDS, "    return int(probabilities.argmax())\n" + EXCEEDS)
    ),
    Mistake("draws_token_0", "11.2", "draw(", (EXCEEDS, "    return 0\n" + EXCEEDS)),
    Mistake(
        "draws_where_the_sum_reaches_u",
        "11.2",
        "the first whose cumulative one exceeds u",
        (EXCEEDS, EXCEEDS.replace("> u", ">= u")),
    ),
    Mistake(
        "draws_one_too_far",
        "11.2",
        "the first whose cumulative one exceeds u",
        (EXCEEDS, EXCEEDS.replace("probabilities.cumsum(dim=-1)", "(probabilities.cumsum(dim=-1) - probabilities)")),
    ),
    Mistake(
        "draw_gives_a_tensor",
        "11.2",
        "a Tensor came",
        (
            "        return int(exceeds.int().argmax())\n",
            "        return exceeds.int().argmax()  # type: ignore[return-value]\n",
        ),
    ),
    Mistake(
        "draws_from_the_last_token_down",
        "11.2",
        "the first whose cumulative one exceeds u",
        (EXCEEDS, "    u = math.nextafter(1 - u, 0)\n" + EXCEEDS),
    ),
    Mistake(
        "verify_gives_a_tuple",
        "11.2",
        "a tuple came",
        (
            BONUS,
            """    last = draw(target_probs[len(draft_tokens)], uniform())
    return (*draft_tokens, last)  # type: ignore[return-value]
""",
        ),
    ),
    Mistake(
        "verify_writes_the_residual_into_target_probs",
        "11.2",
        "written to",
        (REST, "            rest = p.sub_(q).clamp_(min=0)\n"),
    ),
]
