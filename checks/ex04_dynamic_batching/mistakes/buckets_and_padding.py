"""Wrong answers about buckets (4.1) and padding (4.2)."""

from harness.model.bank import Mistake

BUCKET = "math.ceil(seq_len / self.length_tolerance) * self.length_tolerance"
KEY = "self.get_length_bucket(request.input_tokens.size(1))"
PROMPTS = "[request.input_tokens for request in batch]  # each [1, its own L]"
IDS = "functional.pad(prompt, (n, 0))"
MASK = "functional.pad(torch.ones_like(prompt), (n, 0))"
CAT_MASK = "            attention_mask=torch.cat(mask),  # [B, L]\n"
MOST = "max(request.max_length for request in batch)"
CUT = "output[row : row + 1, pads[row] : width + request.max_length]"
SET_RESULT = "request.future.set_result(result)"


MISTAKES = [
    # 4.1
    Mistake("mixes_buckets", "4.1", "in one batch", (KEY, "0")),
    Mistake(
        "lower_edge",
        "4.1",
        "get_length_bucket(1)",
        (BUCKET, "seq_len // self.length_tolerance * self.length_tolerance"),
        only=True,
    ),
    Mistake(
        "edge_belongs_to_the_next",
        "4.1",
        "get_length_bucket(32)",
        (BUCKET, "(seq_len // self.length_tolerance + 1) * self.length_tolerance"),
        only=True,
    ),
    Mistake("bucket_index", "4.1", "32 was wanted", (BUCKET, "math.ceil(seq_len / self.length_tolerance)"), only=True),
    Mistake("buckets_of_32_always", "4.1", "length_tolerance 10", (BUCKET, "math.ceil(seq_len / 32) * 32")),
    Mistake(
        "bucket_of_the_total_length",
        "4.1",
        "not in one batch",
        (KEY, "self.get_length_bucket(request.input_tokens.size(1) + request.max_length)"),
    ),
    Mistake("equal_lengths_only", "4.1", "not in one batch", (KEY, "request.input_tokens.size(1)")),
    # 4.2
    Mistake(
        "right_padding",
        "4.2",
        "pad on the left",
        (IDS, "functional.pad(prompt, (0, n))"),
        (MASK, "functional.pad(torch.ones_like(prompt), (0, n))"),
        (CUT, "torch.cat([prompts[row], output[row : row + 1, width : width + request.max_length]], dim=1)"),
        only=True,
    ),
    Mistake("no_attention_mask", "4.2", "no attention_mask", (CAT_MASK, ""), only=True),
    Mistake(
        "mask_of_ones",
        "4.2",
        "attention_mask is",
        (MASK, "functional.pad(torch.ones_like(prompt), (n, 0), value=1)"),
        only=True,
    ),
    Mistake(
        "mask_inverted",
        "4.2",
        "attention_mask is",
        (CAT_MASK, "            attention_mask=1 - torch.cat(mask),\n"),
        only=True,
    ),
    Mistake(
        "mask_reads_one_pad",
        "4.2",
        "attention_mask is",
        (
            MASK,
            "functional.pad(functional.pad(torch.ones_like(prompt), (min(n, 1), 0), value=1), (max(n - 1, 0), 0))",
        ),
        only=True,
    ),
    Mistake(
        "mask_from_the_tokens",
        "4.2",
        "token 0",
        (CAT_MASK, "            attention_mask=(torch.cat(ids) != 0).long(),\n"),
        only=True,
    ),
    Mistake(
        "pads_stripped_by_value",
        "4.2",
        "token 0",
        (
            CUT + "  # [1, its own L + max_length]",
            "output[row, : width + request.max_length][output[row, : width + request.max_length] != 0][None]",
        ),
        only=True,
    ),
    Mistake(
        "pads_kept",
        "4.2",
        "without its padding",
        (CUT, "output[row : row + 1, : prompts[row].size(1) + request.max_length]"),
        only=True,
    ),
    Mistake("not_cut", "4.2", "cut each row", (CUT, "output[row : row + 1, pads[row] :]"), only=True),
    Mistake("max_length_of_the_first", "4.2", "shape", (MOST, "batch[0].max_length")),
    Mistake(
        "max_length_as_total",
        "4.2",
        "shape",
        (CUT, "output[row : row + 1, pads[row] : max(width, pads[row] + request.max_length)]"),
        only=True,
    ),
    Mistake(
        "new_tokens_only",
        "4.2",
        "shape",
        (CUT, "output[row : row + 1, width : width + request.max_length]"),
        only=True,
    ),
    Mistake(
        "one_dimension_returned",
        "4.2",
        "shape",
        (CUT, "output[row, pads[row] : width + request.max_length]"),
        only=True,
    ),
    Mistake(
        "list_returned",
        "4.2",
        "list came",
        (SET_RESULT, "request.future.set_result(result.tolist())"),
        only=True,
    ),
    Mistake(
        "wrong_caller",
        "4.2",
        "row i belongs to request i",
        ("zip(batch, results, strict=True)", "zip(reversed(batch), results, strict=True)"),
        only=True,
    ),
    Mistake(
        "sorted_and_not_put_back",
        "4.2",
        "each caller gets its own row",
        (PROMPTS, "sorted((request.input_tokens for request in batch), key=lambda prompt: prompt.size(1))"),
        only=True,
    ),
    Mistake(
        "results_by_request_id",
        "4.2",
        "request_ids repeat",
        (
            "return [\n",
            """by_id = {request.request_id: row for row, request in enumerate(batch)}
        return [
""",
        ),
        (
            CUT,
            "output[by_id[request.request_id] : by_id[request.request_id] + 1, pads[row] : width + request.max_length]",
        ),
        only=True,
    ),
    Mistake("samples", "4.2", "do_sample", ("do_sample=False,", "do_sample=True,"), only=True),
    Mistake(
        "writes_to_the_prompt",
        "4.2",
        "was written to",
        (
            "output = self.model.generate(",
            """[prompt[:, :-1].zero_() for prompt in prompts]
        output = self.model.generate(""",
        ),
        only=True,
    ),
    Mistake(
        "pads_with_minus_one",
        "4.2",
        "pads hold",
        (IDS, "functional.pad(prompt, (n, 0), value=-1)"),
        only=True,
    ),
    Mistake(
        "pads_with_the_first_token",
        "4.2",
        "pads hold",
        (IDS, "torch.cat([prompt[:, :1].expand(1, n), prompt], 1)"),
        only=True,
    ),
    Mistake(
        "input_ids_left_from_the_last_batch",
        "4.2",
        "left over from an earlier batch",
        ("self._closed = False", "self._closed = False\n        self._ids: dict[tuple[int, int], Tensor] = {}"),
        (
            "output = self.model.generate(",
            """buffer = self._ids.setdefault((len(batch), width), torch.zeros(len(batch), width, dtype=torch.int64))
        for row, prompt in enumerate(prompts):
            buffer[row, pads[row] :] = prompt[0]
        output = self.model.generate(""",
        ),
        ("input_ids=torch.cat(ids)", "input_ids=buffer"),
        only=True,
    ),
    Mistake(
        "mask_in_int8",
        "4.2",
        "torch.int8",
        ("attention_mask=torch.cat(mask)", "attention_mask=torch.cat(mask).to(torch.int8)"),
        only=True,
    ),
    Mistake("no_pad_token_id", "4.2", "pad_token_id None", ("            pad_token_id=0,\n", ""), only=True),
    Mistake(
        "width_of_the_last_batch",
        "4.2",
        "differ",
        (
            "width = max(prompt.size(1) for prompt in prompts)",
            "width = self._width = max(getattr(self, '_width', 0), *(prompt.size(1) for prompt in prompts))",
        ),
        (
            MASK,
            "functional.pad(torch.ones_like(prompt), (n, 0), value=int(max(p.size(1) for p in prompts) < width))",
        ),
    ),
    Mistake(
        "results_kept_by_request_id",
        "4.2",
        "request_ids repeat",
        (
            "self._waiting.append(request)",
            """if request_id in self._done:
                return self._done[request_id]
            self._waiting.append(request)""",
        ),
        (
            SET_RESULT,
            """request.future.set_result(result)
                self._done[request.request_id] = result""",
        ),
        (
            "self._closed = False",
            """self._closed = False
        self._done: dict[str, Tensor] = {}""",
        ),
        only=True,
    ),
]
