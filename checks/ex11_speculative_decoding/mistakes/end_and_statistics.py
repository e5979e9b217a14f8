"""Ends (11.7) and statistics (11.8) gone wrong."""

from harness.model.bank import Mistake

PROPOSE = (
    "        while len(proposals) < min(num_draft_tokens, end - len(tokens) - 1) and eos_token_id not in proposals:\n"
)
WHILE = "    while len(tokens) < end and (not rounds or tokens[-1] != eos_token_id):\n"
ADD = "        tokens += came[: came.index(eos_token_id) + 1] if eos_token_id in came else came\n"
RETURN = "    return Generation(tokens[len(prompt) :], rounds, proposed, accepted)\n"
COUNT = "        rounds, proposed, accepted = rounds + 1, proposed + len(proposals), accepted + len(came) - 1\n"
TOKENS = "    tokens = sum(acceptance_rate**i for i in range(num_draft_tokens + 1))\n"
SPEEDUP = "    return tokens / (num_draft_tokens * draft_cost + 1)\n"

MISTAKES = [
    Mistake("prompt_returned_too", "11.7", "came", (RETURN, RETURN.replace("tokens[len(prompt) :]", "tokens"))),
    Mistake(
        "one_token_too_many",
        "11.7",
        "more than max_new_tokens",
        (PROPOSE, PROPOSE.replace("end - len(tokens) - 1", "end - len(tokens)")),
    ),
    Mistake(
        "as_many_as_the_draft_likes",
        "11.7",
        "more than max_new_tokens",
        (PROPOSE, PROPOSE.replace("min(num_draft_tokens, end - len(tokens) - 1)", "num_draft_tokens")),
    ),
    Mistake(
        "one_token_too_few",
        "11.7",
        "the output ends too early",
        (RETURN, RETURN.replace("tokens[len(prompt) :]", "tokens[len(prompt) : max(end - 1, len(prompt) + 1)]")),
    ),
    Mistake(
        "token_after_eos",
        "11.7",
        "behind EOS",
        (ADD, "        tokens += came\n"),
        (WHILE, "    while len(tokens) < end and eos_token_id not in tokens[len(prompt) :]:\n"),
        only=True,
    ),
    Mistake(
        "eos_passed_over_inside_the_draft",
        "11.7",
        "behind EOS",
        (ADD, "        tokens += came\n"),
        (PROPOSE, PROPOSE.replace(" and eos_token_id not in proposals", "")),
    ),
    Mistake(
        "eos_dropped",
        "11.7",
        "EOS stays in the output",
        (
            RETURN,
            """    if tokens[-1] == eos_token_id:
        tokens.pop()
"""
            + RETURN,
        ),
    ),
    Mistake("eos_never_looked_at", "11.7", "behind EOS", (PROPOSE, "        eos_token_id = None\n" + PROPOSE)),
    Mistake(
        "eos_0_taken_for_none",
        "11.7",
        "EOS is 0",
        (WHILE, "    eos_token_id = eos_token_id or None\n" + WHILE),
    ),
    Mistake(
        "eos_as_a_correction_goes_on",
        "11.7",
        "behind EOS",
        (WHILE, "    ended = False\n    while len(tokens) < end and not ended:\n"),
        (ADD, ADD + "        ended = eos_token_id in proposals and len(came) > len(proposals)\n"),
    ),
    Mistake(
        "eos_as_a_bonus_goes_on",
        "11.7",
        "behind EOS",
        (WHILE, "    ended = False\n    while len(tokens) < end and not ended:\n"),
        (ADD, ADD + "        ended = eos_token_id in came[: len(proposals)]\n"),
    ),
    Mistake(
        "eos_in_the_first_round_goes_on",
        "11.7",
        "behind EOS",
        (WHILE, WHILE.replace("not rounds", "rounds < 2")),
    ),
    Mistake(
        "eos_of_the_prompt_ends",
        "11.7",
        "came",
        (WHILE, "    while len(tokens) < end and tokens[-1] != eos_token_id:\n"),
    ),
    Mistake(
        "eos_in_the_prompt_ends_proposing",
        "11.5",
        "",
        (PROPOSE, PROPOSE.replace("eos_token_id not in proposals", "(eos_token_id or 0) not in [*proposals, *prompt]")),
    ),
    Mistake(
        "proposes_behind_eos",
        "11.8",
        ".proposed",
        (PROPOSE, PROPOSE.replace(" and eos_token_id not in proposals", "")),
    ),
    Mistake(
        "a_rejected_eos_ends",
        "11.7",
        "the output ends too early",
        (
            WHILE,
            """    ended = False
    while len(tokens) < end and not ended and (not rounds or tokens[-1] != eos_token_id):
""",
        ),
        (ADD, ADD + "        ended = eos_token_id in proposals\n"),
    ),
    Mistake(
        "one_new_token_proposes",
        "11.7",
        "more than max_new_tokens",
        (PROPOSE, PROPOSE.replace("end - len(tokens) - 1)", "max(end - len(tokens) - 1, max_new_tokens == 1))")),
    ),
    # Statistics.
    Mistake(
        "statistics_of_tested_tokens_only",
        "11.8",
        ".proposed",
        (COUNT, COUNT.replace("proposed + len(proposals)", "proposed + min(len(came), len(proposals))")),
        only=True,
    ),
    Mistake(
        "accepted_counts_corrections",
        "11.8",
        ".accepted",
        (COUNT, COUNT.replace("accepted + len(came) - 1", "accepted + len(came)")),
        only=True,
    ),
    Mistake(
        "accepted_counts_whole_rounds_only",
        "11.8",
        ".accepted",
        (COUNT, COUNT.replace("accepted + len(came) - 1", "accepted + len(proposals) * (len(came) > len(proposals))")),
        only=True,
    ),
    Mistake(
        "accepted_loses_an_eos",
        "11.8",
        ".accepted",
        (COUNT, COUNT.replace("len(came) - 1", "len([token for token in came[:-1] if token != eos_token_id])")),
        only=True,
    ),
    Mistake(
        "accepted_counts_agreeing_corrections",
        "11.8",
        ".accepted",
        (COUNT, COUNT.replace("len(came) - 1", "len(set(came) & set(proposals))")),
        only=True,
    ),
    Mistake("rounds_from_1", "11.8", ".rounds", (RETURN, RETURN.replace("rounds,", "rounds + 1,")), only=True),
    Mistake(
        "rounds_that_proposed",
        "11.8",
        ".rounds",
        (RETURN, RETURN.replace("rounds,", "rounds - (max_new_tokens == 1),")),
        only=True,
    ),
    Mistake(
        "proposed_as_asked_for",
        "11.8",
        ".proposed",
        (COUNT, COUNT.replace("proposed + len(proposals)", "proposed + num_draft_tokens")),
        only=True,
    ),
    Mistake(
        "counts_of_a_failed_call_kept",
        "11.8",
        "after a call that failed",
        (
            WHILE,
            """    held = vars(speculative_generate).setdefault("held", [0, 0, 0])
    rounds, proposed, accepted = held
"""
            + WHILE.replace("not rounds", "len(tokens) == len(prompt)"),
        ),
        (COUNT, COUNT + "        held[:] = rounds, proposed, accepted\n"),
        (RETURN, "    held[:] = 0, 0, 0\n" + RETURN),
        only=True,
    ),
    Mistake(
        "rate_of_nothing_divides_by_zero",
        "11.8",
        "ZeroDivisionError",
        (
            "        return self.accepted / self.proposed if self.proposed else 0.0\n",
            "        return self.accepted / self.proposed\n",
        ),
    ),
    Mistake(
        "rate_per_round",
        "11.8",
        ".acceptance_rate",
        (
            "        return self.accepted / self.proposed if self.proposed else 0.0\n",
            "        return self.accepted / self.rounds\n",
        ),
    ),
    Mistake(
        "statistics_zero",
        "11.8",
        ".rounds",
        (RETURN, "    return Generation(tokens[len(prompt) :], 0, 0, 0)\n"),
        only=True,
    ),
    Mistake(
        "speedup_without_the_bonus",
        "11.8",
        "expected_speedup",
        (TOKENS, TOKENS.replace("range(num_draft_tokens + 1)", "range(1, num_draft_tokens + 1)")),
        only=True,
    ),
    Mistake(
        "speedup_one_term_short",
        "11.8",
        "expected_speedup",
        (TOKENS, TOKENS.replace("num_draft_tokens + 1)", "num_draft_tokens)")),
        only=True,
    ),
    Mistake(
        "speedup_without_the_target_call",
        "11.8",
        "expected_speedup",
        (SPEEDUP, "    return tokens / (num_draft_tokens * draft_cost or 1)\n"),
        only=True,
    ),
    Mistake(
        "speedup_of_one_draft_call",
        "11.8",
        "expected_speedup",
        (SPEEDUP, "    return tokens / (draft_cost + 1)\n"),
        only=True,
    ),
    Mistake(
        "speedup_closed_form_at_1",
        "11.8",
        "ZeroDivisionError",
        (TOKENS, "    tokens = (1 - acceptance_rate ** (num_draft_tokens + 1)) / (1 - acceptance_rate)\n"),
        only=True,
    ),
    Mistake(
        "speedup_of_a_mean",
        "11.8",
        "expected_speedup",
        (TOKENS, "    tokens = 1 + acceptance_rate * num_draft_tokens\n"),
        only=True,
    ),
    Mistake("speedup_1", "11.8", "expected_speedup", (TOKENS, ""), (SPEEDUP, "    return 1.0\n"), only=True),
    Mistake(
        "speedup_at_0_is_0",
        "11.8",
        "expected_speedup(0.0",
        (SPEEDUP, "    return tokens / (num_draft_tokens * draft_cost + 1) if acceptance_rate else 0.0\n"),
        only=True,
    ),
]
