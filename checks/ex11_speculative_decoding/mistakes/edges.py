"""Edges gone wrong (11.9), and code that does nothing."""

from harness.model.bank import Mistake

TEST = "        if not uniform() * float(q[token]) < float(p[token]):\n"
REST = "            rest = (p - q).clamp(min=0)\n"
LAST = "            last = rest / rest.sum() if rest.any() else p\n"
EXCEEDS = "    exceeds = probabilities.cumsum(dim=-1) > u\n"
SHORT = "    return int(probabilities.nonzero()[-1])  # rounding has left the sum at u or below\n"
IF_LAST = "    if exceeds[-1]:\n"
REFUSE = "    _refuse(target, draft, prompt, max_new_tokens, num_draft_tokens, temperature, top_p)\n"
SIZES = "    if target.vocab_size != draft.vocab_size:\n"
SIZES_SAID = '        raise ValueError(f"the target has {target.vocab_size} tokens, the draft {draft.vocab_size}")\n'
PROMPT = "    if not prompt or not all(0 <= token < target.vocab_size for token in prompt):\n"
NUMBERS = "    if max_new_tokens < 1 or num_draft_tokens < 1:\n"
OPTIONS = "    if temperature < 0 or not 0 < top_p <= 1:\n"
CACHES = "    proposer, judge = CachedModel(draft), CachedModel(target)\n"
TOKENS = "    tokens, end = list(prompt), len(prompt) + max_new_tokens\n"
Q = "        draft_probs = torch.stack(draft_rows) if draft_rows else target_probs[:0]  # [k, V]\n"
SETTLE = "        self._held, self.length = grown, self.length + len(tokens)\n        return logits\n"
RETURN = "    return Generation(tokens[len(prompt) :], rounds, proposed, accepted)\n"

MISTAKES = [
    Mistake(
        "u_0_accepts_what_is_impossible",
        "11.9",
        "a token with p = 0 never comes out",
        (TEST, "        if uniform() * float(q[token]) > float(p[token]):\n"),
    ),
    Mistake(
        "u_0_draws_what_is_impossible",
        ("11.2", "11.9"),
        "",
        (EXCEEDS, EXCEEDS.replace("> u", ">= u")),
    ),
    Mistake(
        "short_sum_draws_the_last_token",
        "11.9",
        "the last token that is possible",
        (SHORT, "    return len(probabilities) - 1\n"),
        only=True,
    ),
    Mistake(
        "short_sum_draws_token_0", "11.9", "the last token that is possible", (IF_LAST, "    if True:\n"), only=True
    ),
    Mistake("short_sum_is_an_error", "11.9", "IndexError", (SHORT, "    return int(exceeds.nonzero()[0])\n")),
    Mistake(
        "short_sum_draws_the_most_probable",
        "11.9",
        "the last token that is possible",
        (SHORT, "    return int((probabilities > 0).int().argmax())\n"),
        only=True,
    ),
    Mistake("zero_residual_gives_nan", "11.9", "", (LAST, "            last = rest / rest.sum()\n"), only=True),
    Mistake(
        "zero_residual_gives_q",
        "11.9",
        "",
        (LAST, "            last = rest / rest.sum() if rest.any() else torch.ones_like(q) / len(q)\n"),
        only=True,
    ),
    Mistake(
        "zero_residual_gives_the_draft_token_of_no_p",
        "11.9",
        "",
        (LAST, "            last = rest / rest.sum().clamp(min=1e-30)\n"),
        only=True,
    ),
    Mistake(
        "dtypes_not_mixed",
        "11.9",
        "",
        (
            CACHES,
            """    kinds = [next(model.parameters()).dtype for model in (draft, target)]
    if kinds[0] != kinds[1]:
        raise TypeError(f"{kinds[0]} and {kinds[1]} do not mix")
"""
            + CACHES,
        ),
        only=True,
    ),
    Mistake(
        "layers_not_mixed",
        "11.9",
        "",
        (
            CACHES,
            '    if draft.num_layers != target.num_layers:\n        raise ValueError("the layers differ")\n' + CACHES,
        ),
    ),
    Mistake(
        "caches_kept_for_the_next_call",
        "11.9",
        "came",
        (
            CACHES,
            """    held = vars(target).setdefault("_pair", {})
    proposer, judge = held.setdefault(id(draft), (CachedModel(draft), CachedModel(target)))
""",
        ),
        (
            TOKENS,
            TOKENS + "    for cache in (proposer, judge):\n        cache.rewind(min(cache.length, len(prompt) - 1))\n",
        ),
    ),
    Mistake(
        "caches_kept_after_an_error",
        "11.9",
        "after one that failed",
        (
            CACHES,
            """    held = vars(target).setdefault("_pair", {})
    proposer, judge = held.pop("left", (CachedModel(draft), CachedModel(target)))
    held["left"] = proposer, judge
""",
        ),
        (
            TOKENS,
            TOKENS
            + """    if proposer.length and proposer.model is not draft:
        proposer, judge = CachedModel(draft), CachedModel(target)
    for cache in (proposer, judge):
        cache.rewind(min(cache.length, len(prompt) - 1))
""",
        ),
        (RETURN, '    del held["left"]\n' + RETURN),
        only=True,
    ),
    Mistake(
        "prompt_appended_to",
        "11.9",
        "the prompt is",
        (
            TOKENS,
            """    end, kept = len(prompt) + max_new_tokens, prompt
    tokens, prompt = kept if isinstance(kept, list) else list(kept), tuple(kept)
""",
        ),
    ),
    Mistake(
        "prompt_appended_to_and_restored",
        "11.9",
        "while a model runs",
        (
            TOKENS,
            """    start, end = len(prompt), len(prompt) + max_new_tokens
    tokens = prompt if isinstance(prompt, list) else list(prompt)
""",
        ),
        (
            RETURN,
            """    output = tokens[start:]
    del tokens[start:]
    return Generation(output, rounds, proposed, accepted)
""",
        ),
        only=True,
    ),
    Mistake(
        "models_left_in_eval",
        "11.9",
        "training flags",
        (CACHES, "    target.eval(), draft.eval()\n" + CACHES),
        only=True,
    ),
    Mistake(
        "models_all_back_in_training",
        "11.9",
        "training flags",
        (CACHES, "    target.eval(), draft.eval()\n" + CACHES),
        (RETURN, "    target.train(), draft.train()\n" + RETURN),
        only=True,
    ),
    Mistake(
        "weights_frozen",
        "11.9",
        "no longer asks for gradients",
        (CACHES, "    target.requires_grad_(False)\n" + CACHES),
        only=True,
    ),
    Mistake(
        "vocabularies_may_differ",
        "11.9",
        "a draft of 13 tokens",
        (SIZES, "    if target.vocab_size > draft.vocab_size:\n"),
        only=True,
    ),
    Mistake(
        "vocabularies_not_named",
        "11.9",
        "it lacks 7 and 13",
        (SIZES_SAID, '        raise ValueError("the vocabularies differ")\n'),
        only=True,
    ),
    Mistake(
        "empty_prompt_accepted", "11.9", "an empty prompt", (PROMPT, PROMPT.replace("not prompt or ", "")), only=True
    ),
    Mistake(
        "token_beyond_accepted", "11.9", "token 7 of 7", (PROMPT, PROMPT.replace("< target", "<= target")), only=True
    ),
    Mistake(
        "negative_token_accepted", "11.9", "token -1", (PROMPT, PROMPT.replace("0 <= token <", "token <")), only=True
    ),
    Mistake(
        "only_the_last_token_is_looked_at",
        "11.9",
        "token -1",
        (PROMPT, PROMPT.replace("in prompt)", "in prompt[-1:])")),
        only=True,
    ),
    Mistake("no_new_tokens_accepted", "11.9", "no new tokens", (NUMBERS, "    if num_draft_tokens < 1:\n"), only=True),
    Mistake(
        "negative_new_tokens_accepted",
        "11.9",
        "-2 new tokens",
        (NUMBERS, "    if max_new_tokens == 0 or num_draft_tokens < 1:\n"),
        only=True,
    ),
    Mistake(
        "no_draft_tokens_accepted",
        "11.9",
        "num_draft_tokens 0",
        (NUMBERS, "    if max_new_tokens < 1 or num_draft_tokens < 0:\n"),
        only=True,
    ),
    Mistake(
        "negative_temperature_accepted",
        "11.9",
        "a negative temperature",
        (OPTIONS, "    if not 0 < top_p <= 1:\n"),
        only=True,
    ),
    Mistake("top_p_0_accepted", "11.9", "top_p 0", (OPTIONS, OPTIONS.replace("0 < top_p", "0 <= top_p")), only=True),
    Mistake("top_p_above_1_accepted", "11.9", "top_p 1.01", (OPTIONS, OPTIONS.replace(" <= 1", "")), only=True),
    Mistake(
        "top_p_not_looked_at_when_greedy",
        "11.9",
        "top_p -0.1, greedy",
        (OPTIONS, "    if temperature < 0 or temperature > 0 and not 0 < top_p <= 1:\n"),
        only=True,
    ),
    Mistake(
        "refused_after_a_call",
        "11.9",
        "model calls came before ValueError",
        (NUMBERS, "    if max_new_tokens < 1:\n        CachedModel(target).feed(prompt)\n" + NUMBERS),
        only=True,
    ),
    Mistake(
        "refused_by_an_assertion",
        "11.9",
        "AssertionError",
        (NUMBERS, "    assert max_new_tokens > 0\n" + NUMBERS),
        only=True,
    ),
    # Nothing.
    Mistake(
        "gives_zeros",
        ("11.3", "11.4", "11.5", "11.7", "11.8", "11.9"),
        "",
        (REFUSE, REFUSE + "    return Generation([0] * max_new_tokens, 1, 0, 0)\n"),
    ),
    Mistake(
        "gives_nothing",
        ("11.3", "11.4", "11.5", "11.7", "11.8", "11.9"),
        "",
        (REFUSE, REFUSE + "    return Generation([], 0, 0, 0)\n"),
    ),
    Mistake(
        "gives_the_prompt",
        ("11.3", "11.4", "11.5", "11.7", "11.8"),
        "",
        (REFUSE, REFUSE + "    return Generation(list(prompt), 0, 0, 0)\n"),
    ),
    Mistake(
        "gives_none",
        ("11.3", "11.4", "11.5", "11.7", "11.8", "11.9"),
        "a NoneType came",
        (REFUSE, REFUSE + "    return None  # type: ignore[return-value]\n"),
    ),
    Mistake(
        "feeds_zeros",
        "11.6",
        "0 came",
        (SETTLE, SETTLE.replace("return logits", "return torch.zeros_like(logits)")),
    ),
]
