"""Rounds gone wrong: greedy outputs (11.3), laws (11.4), calls (11.5)."""

from harness.model.bank import Mistake

REFUSE = "    _refuse(target, draft, prompt, max_new_tokens, num_draft_tokens, temperature, top_p)\n"
CACHES = "    proposer, judge = CachedModel(draft), CachedModel(target)\n"
WHILE = "    while len(tokens) < end and (not rounds or tokens[-1] != eos_token_id):\n"
PROPOSE = (
    "        while len(proposals) < min(num_draft_tokens, end - len(tokens) - 1) and eos_token_id not in proposals:\n"
)
FEED_DRAFT = "            logits = proposer.feed([*tokens, *proposals][proposer.length :])  # [T, V]\n"
ROW = "            draft_rows.append(token_probabilities(logits[-1], temperature, top_p))\n"
DRAW = "            proposals.append(draw(draft_rows[-1], uniform()))\n"
FEED_TARGET = "        logits = judge.feed([*tokens, *proposals][judge.length :])  # [T, V]\n"
P = "        target_probs = token_probabilities(logits[-len(proposals) - 1 :], temperature, top_p)  # [k + 1, V]\n"
Q = "        draft_probs = torch.stack(draft_rows) if draft_rows else target_probs[:0]  # [k, V]\n"
VERIFY = "        came = verify(proposals, draft_probs, target_probs, uniform)\n"
REWIND_DRAFT = "        proposer.rewind(min(proposer.length, len(tokens) - 1))\n"
REWIND_TARGET = "        judge.rewind(len(tokens) - 1)\n"
COUNT = "        rounds, proposed, accepted = rounds + 1, proposed + len(proposals), accepted + len(came) - 1\n"
ADD = "        tokens += came[: came.index(eos_token_id) + 1] if eos_token_id in came else came\n"

MISTAKES = [
    # Greedy.
    Mistake(
        "greedy_draws_by_temperature_1",
        "11.3",
        "the target alone gives",
        (REFUSE, REFUSE + "    temperature = temperature or 1.0\n"),
    ),
    Mistake(
        "greedy_is_the_drafts",
        "11.3",
        "the target alone gives",
        (CACHES, CACHES.replace("CachedModel(target)", "CachedModel(draft)")),
    ),
    Mistake(
        "greedy_forgotten_with_top_p",
        "11.3",
        "the target alone gives",
        (REFUSE, REFUSE + "    temperature = 1.0 if not temperature and top_p < 1 else temperature\n"),
        only=True,
    ),
    Mistake(
        "default_temperature_1",
        "11.3",
        "the target alone gives",
        (
            "    temperature: float = 0.0,\n    top_p: float = 1.0,\n    eos",
            "    temperature: float = 1.0,\n    top_p: float = 1.0,\n    eos",
        ),
    ),
    Mistake(
        "rows_one_too_early",
        "11.3",
        "the target alone gives",
        (FEED_TARGET, FEED_TARGET + "        logits = torch.cat([logits[:1], logits[:-1]])\n"),
    ),
    Mistake(
        "cache_not_rewound",
        "11.3",
        "the target alone gives",
        (REWIND_TARGET, ""),
        (FEED_TARGET, "        logits = judge.feed([*tokens[len(tokens) - 1 if rounds else 0 :], *proposals])\n"),
    ),
    Mistake(
        "target_rewound_to_the_round_s_start",
        "11.5",
        "target call",
        (FEED_TARGET, FEED_TARGET + "        before = len(tokens)\n"),
        (REWIND_TARGET, "        judge.rewind(before)\n"),
    ),
    Mistake(
        "target_rewound_one_short",
        ("11.3", "11.5"),
        "",
        (REWIND_TARGET, "        judge.rewind(max(len(tokens) - 2, 0))\n"),
        (FEED_TARGET, "        logits = judge.feed([*tokens[len(tokens) - 1 if rounds else 0 :], *proposals])\n"),
    ),
    Mistake(
        "a_full_round_feeds_no_bonus",
        "11.5",
        "call",
        (VERIFY, VERIFY + "        came = came[: len(proposals)] if len(proposals) > 1 else came\n"),
    ),
    Mistake(
        "greedy_accepts_any_of_equals",
        "11.3",
        "equally probable",
        (
            P,
            P
            + """        for row, token in enumerate(proposals) if temperature == 0 else ():
            if logits[row - len(proposals) - 1, token] == logits[row - len(proposals) - 1].max():
                target_probs[row] = F.one_hot(torch.tensor(token), target.vocab_size)
""",
        ),
        only=True,
    ),
    # Laws.
    Mistake(
        "draft_drawn_otherwise",
        "11.4",
        "what the output begins with",
        (
            DRAW,
            "            proposals.append(draw(token_probabilities(logits[-1], float(temperature > 0)), uniform()))\n",
        ),
    ),
    Mistake(
        "draft_drawn_without_top_p",
        "11.4",
        "what the output begins with",
        (DRAW, "            proposals.append(draw(token_probabilities(logits[-1], temperature), uniform()))\n"),
    ),
    Mistake(
        "draft_drawn_greedily",
        "11.4",
        "what the output begins with",
        (DRAW, "            proposals.append(int(draft_rows[-1].argmax()))\n"),
    ),
    Mistake(
        "draft_judged_without_temperature",
        "11.4",
        "what the output begins with",
        (DRAW, DRAW + "            draft_rows[-1] = token_probabilities(logits[-1], float(temperature > 0))\n"),
    ),
    Mistake(
        "top_p_for_the_draft_alone",
        "11.4",
        "what the output begins with",
        (P, P.replace(", top_p)", ", 1.0)")),
    ),
    Mistake(
        "temperature_for_the_draft_alone",
        "11.4",
        "what the output begins with",
        (P, P.replace("temperature,", "temperature and 1.0,")),
    ),
    Mistake(
        "one_number_for_draw_and_test",
        "11.4",
        "what the output begins with",
        (
            DRAW,
            "            numbers.append(uniform())\n            proposals.append(draw(draft_rows[-1], numbers[-1]))\n",
        ),
        (PROPOSE, "        numbers: list[float] = []\n" + PROPOSE),
        (
            VERIFY,
            """        again = [*numbers[::-1]]
        came = verify(proposals, draft_probs, target_probs, lambda: again.pop() if again else uniform())  # noqa: B023
""",
        ),
    ),
    Mistake(
        "bonus_is_the_most_probable",
        "11.4",
        "what the output begins with",
        (
            VERIFY,
            VERIFY + "        if len(came) > len(proposals):\n            came[-1] = int(target_probs[-1].argmax())\n",
        ),
        only=True,
    ),
    Mistake(
        "rows_of_the_draft_mixed_up",
        "11.4",
        "what the output begins with",
        (Q, Q.replace("torch.stack(draft_rows)", "torch.stack(draft_rows[::-1])")),
    ),
    Mistake(
        "more_numbers_than_decisions",
        "11.4",
        "at most 2·k + 1",
        (VERIFY, "        for _ in range(2):\n            uniform()\n" + VERIFY),
        only=True,
    ),
    Mistake(
        "numbers_by_python_s_random",
        "11.4",
        "Python's random was drawn from",
        (DRAW, DRAW.replace("uniform()", "random.random()")),
    ),
    Mistake(
        "draft_judged_in_its_own_dtype",
        "11.4",
        "judged by the float64 rows",
        (DRAW, DRAW + "            draft_rows[-1] = draft_rows[-1].to(logits.dtype).double()\n"),
        only=True,
    ),
    Mistake(
        "draws_by_torch_by_default",
        "11.4",
        "by default uniform = random.random: torch's stream was drawn from",
        (
            DRAW,
            """            by_default = uniform is random.random
            proposals.append(int(draft_rows[-1].multinomial(1)) if by_default else draw(draft_rows[-1], uniform()))
""",
        ),
        only=True,
    ),
    # Calls.
    Mistake(
        "draft_cache_not_rewound",
        "11.5",
        "",
        (REWIND_DRAFT, ""),
        (
            FEED_DRAFT,
            """            fed = [*tokens[len(tokens) - 1 if rounds else 0 :]]
            logits = proposer.feed(proposals[-1:] or fed)
""",
        ),
    ),
    Mistake(
        "draft_cache_started_again",
        "11.5",
        "it is fed again what it has been fed before",
        (REWIND_DRAFT, "        proposer.rewind(0)\n"),
        wasteful=True,
    ),
    Mistake(
        "target_cache_started_again",
        "11.5",
        "it is fed again what it has been fed before",
        (REWIND_TARGET, "        judge.rewind(0)\n"),
    ),
    Mistake(
        "draft_one_token_short",
        "11.5",
        "a token in between is never fed",
        (
            FEED_DRAFT,
            """            fed = tokens[-1:] if rounds else tokens
            logits = proposer.feed(proposals[-1:] or fed)
""",
        ),
    ),
    Mistake(
        "draft_fed_its_last_token_at_once",
        "11.5",
        "draft call",
        (
            FEED_TARGET,
            "        if len(proposals) == num_draft_tokens:\n            proposer.feed(proposals[-1:])\n" + FEED_TARGET,
        ),
    ),
    Mistake(
        "draft_catches_up_in_two_calls",
        "11.5",
        "draft call",
        (
            FEED_DRAFT,
            """            if rounds and proposer.length < len(tokens) - 1:
                proposer.feed(tokens[proposer.length : -1])
"""
            + FEED_DRAFT,
        ),
    ),
    Mistake(
        "a_target_call_per_token",
        "11.5",
        "the target gets all proposed tokens in one call",
        (
            FEED_TARGET,
            """        fed = [*tokens, *proposals][judge.length :]
        logits = torch.cat([judge.feed([token]) for token in fed])
""",
        ),
    ),
    Mistake(
        "draft_asked_for_the_last_token",
        "11.5",
        "draft call",
        (
            FEED_TARGET,
            "        if not proposals:\n            proposer.feed(tokens[proposer.length :])\n" + FEED_TARGET,
        ),
    ),
    Mistake(
        "draft_proposes_one_less",
        "11.5",
        "",
        (PROPOSE, PROPOSE.replace("min(num_draft_tokens,", "min(max(num_draft_tokens - 1, 1),")),
    ),
    Mistake(
        "draft_gives_up_after_a_rejection",
        "11.5",
        "draft call",
        (PROPOSE, PROPOSE.replace("min(num_draft_tokens,", "min(num_draft_tokens if not rounds or accepted else 1,")),
    ),
    Mistake(
        "the_target_alone",
        "11.5",
        "draft call 1",
        (PROPOSE, "        while False:\n"),
    ),
    Mistake(
        "rounds_fall_short_when_sampling",
        "11.5",
        "call",
        (VERIFY, VERIFY + "        if temperature > 0 and len(came) > 2:\n            came = came[:-1]\n"),
        wasteful=True,
    ),
]
