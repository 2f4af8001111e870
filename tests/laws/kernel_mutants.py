"""Planted bugs in the kernels of `flash`: what such kernels get wrong, and the law that must reject each.

A mutant is an edit of the real source, run like the real kernel: on a CPU by interpretation. The programs of an
interpreted launch run one after another, so a race between them is planted as what it leaves behind.
"""

from typing import Any, Final, NamedTuple

from .planting import Edit


class KernelMutant(NamedTuple):
    """A bug in a kernel.

    Attributes:
        name: What is wrong.
        kernel: The kernel that goes wrong by it.
        law: The law that must reject it.
        edits: How it is planted.
        fixed: Fields of a problem without which the bug does not show; the rest is drawn.
    """

    name: str
    kernel: str
    law: str
    edits: tuple[Edit, ...]
    fixed: dict[str, Any]


DEFINITION: Final = "attention_is_its_definition"
GRADIENTS: Final = "gradients_are_exact"
ROTATION: Final = "rotation_is_its_definition"
APPENDING: Final = "appending_is_concatenation"
MERGING: Final = "merging_has_no_order"
# Large enough for full tiles and cut ones.
TILES: Final = {"m": 33, "n": 65}
ALL: Final = {**TILES, "mask": "everything()"}
PARTS: Final = {"m": 7, "n": 65, "mask": "everything()"}  # few queries, of keys in several parts
SQUARE: Final = {"m": 33, "n": 33, "mask": "causal()"}
# One sequence stands for all: nothing that the copy engine could describe, so that tiles are read by pointers.
POINTERS: Final = {"b": 2, "g": 2, "d": 16, "e": 16, "k_storage": "expand", "v_storage": "expand"}


def one(module: str, snippet: str, instead: str) -> tuple[Edit, ...]:
    """Plant by a single edit."""
    return (Edit(module, snippet, instead),)


FORWARD: Final = (
    KernelMutant(
        "a_cut_tile_knows_only_where_keys_end", "forward_kernel", DEFINITION,
        one("forward", "score = tl.where(seen, score, ", "score = tl.where((j < n)[None, :], score, "), SQUARE,
    ),
    KernelMutant(
        "a_cut_tile_is_taken_for_a_full_one", "forward_kernel", DEFINITION,
        one("forward", "tl.min(tl.where(exists, last, n), 0), N", "tl.max(last, 0), N"), SQUARE,
    ),
    KernelMutant(
        "the_first_full_tile_is_skipped", "forward_kernel", DEFINITION,
        one("forward", "for t in tl.range(0, full):", "for t in tl.range(1, full):"), ALL,
    ),
    KernelMutant(
        "the_mean_is_not_rescaled", "forward_kernel", DEFINITION,
        one("forward", "acc = acc * rescale[:, None]", "acc = acc * 1.0"), ALL,
    ),
    KernelMutant(
        "the_sum_of_weights_is_not_rescaled", "forward_kernel", DEFINITION,
        one("forward", "total = total * rescale + ", "total = total + "), ALL,
    ),
    KernelMutant(
        "the_last_tile_of_a_head_reads_the_next_head", "forward_kernel", DEFINITION,
        (
            Edit("tiles", "(row + down < rows)[:, None], other", "((row + down < rows) | (head == 0))[:, None], other"),
            Edit("tiles", "tl.minimum(i + high, stop), 0)", "tl.minimum(i + high, tl.cdiv(stop, 32) * 32), 0)"),
        ), {**POINTERS, "m": 17, "n": 33, "mask": "everything()"},
    ),
    KernelMutant(
        "first_keys_beside_the_window_count_twice", "forward_kernel", DEFINITION,
        one("forward", "base + keep, last), 0), 0), start)", "base + keep, last), 0), 0), n)"),
        {**SQUARE, "mask": "causal() & window(9, keep_first=5)"},
    ),
    KernelMutant(
        "the_sink_is_added_once_a_tile", "forward_kernel", DEFINITION,
        one(
            "forward", "    for t in tl.range(0, heads + left + right):\n",
            "    for t in tl.range(0, heads + left + right):\n"
            "        if SINK:\n"
            "            total += tl.exp2(sink_score * 1.4426950408889634 - peak)\n",
        ), {**SQUARE, "sink": 1.0},
    ),
    KernelMutant(
        "lse_is_in_base_2", "forward_kernel", DEFINITION,
        one("forward", "tl.log2(total)) * 0.6931471805599453", "tl.log2(total))"), SQUARE,
    ),
    KernelMutant(
        "values_are_read_with_the_strides_of_keys", "forward_kernel", DEFINITION,
        one("forward", "v_b, v_h, v_n, N, E, WHOLE_E, CUT", "k_b, k_h, k_n, N, E, WHOLE_E, CUT"),
        {**POINTERS, **SQUARE, "e": 24},
    ),
    KernelMutant(
        "dead_keys_are_multiplied_by_zero", "forward_kernel", "dead_slots_change_nothing",
        one("forward", "tl.where(alive[:, None], value, 0.0)", "value * alive[:, None].to(value.dtype)"),
        {"m": 17, "n": 33, "mask": "causal() & window(3)"},
    ),
    KernelMutant(
        "alibi_rewards_distance", "forward_kernel", DEFINITION,
        one("forward", "score -= slope * tl.abs(", "score += slope * tl.abs("), {**SQUARE, "alibi": 0.5},
    ),
    KernelMutant(
        "a_negative_scale_loses_its_sign", "forward_kernel", DEFINITION,
        one("forward", "score = -score  # and", "score = score  # and"), {**SQUARE, "scale": -0.5},
    ),
    KernelMutant(
        "offsets_wrap_at_32_bits", "forward_kernel", "far_tensors_are_near_tensors",
        one("tiles", "batch.to(tl.int64) * stride_b", "batch.to(tl.int32) * stride_b"), {},
    ),
)  # fmt: skip

BACKWARD: Final = (
    KernelMutant(
        "delta_forgets_the_gradient_of_lse", "prepare_kernel", "gradients_flow_through_lse",
        one("backward", "flow -= tl.load(d_lse + line", "flow -= 0.0 * tl.load(d_lse + line"), {"m": 17, "n": 17},
    ),
    KernelMutant(
        "the_gradient_of_out_is_read_as_contiguous", "prepare_kernel", GRADIENTS,
        one("backward", "d_out + (head // h) * o_b + (head % h) * o_h + (line % m) * o_m", "d_out + line * e"),
        {"m": 17, "n": 17, "d_out_storage": "bmhd", "g": 2},
    ),
    KernelMutant(
        "a_row_without_keys_has_nan_for_its_weights", "prepare_kernel", GRADIENTS,
        one("backward", 'tl.where(log_sum == -float("inf"), float("inf"), log_sum)', "log_sum"), {"m": 33, "n": 17},
    ),
    KernelMutant(
        "dk_sums_over_one_head_of_its_group", "backward_keys_kernel", GRADIENTS,
        one("backward", "for _ in tl.range(0, cut * group):", "for _ in tl.range(0, cut):"), {"m": 17, "n": 17, "r": 2},
    ),
    KernelMutant(
        "one_full_tile_of_queries_is_skipped", "backward_keys_kernel", GRADIENTS,
        one("backward", "for _ in tl.range(0, full * group):", "for _ in tl.range(1, full * group):"),
        {"m": 33, "n": 33, "mask": "everything()"},
    ),
    KernelMutant(
        "the_last_queries_of_a_window_are_missed", "backward_keys_kernel", GRADIENTS,
        one("backward", "tl.minimum(start + N - edge_low, m), 0)", "tl.minimum(start + N - edge_low - M, m), 0)"),
        {"m": 33, "n": 33, "mask": "window(9)"},
    ),
    KernelMutant(
        "alibi_of_the_gradient_rewards_distance", "backward_keys_kernel", GRADIENTS,
        one("backward", "capped - slope * tl.abs(stands[None, :]", "capped + slope * tl.abs(stands[None, :]"),
        {"m": 17, "n": 17, "alibi": 0.5},
    ),
    KernelMutant(
        "dq_of_a_tile_of_keys_is_stored_over_the_others", "backward_queries_kernel", GRADIENTS,
        one(
            "backward",
            "dq_sum, query, gradient, log_sum, flow, k, v, cut_start(",
            "tl.zeros([M, D], tl.float32), query, gradient, log_sum, flow, k, v, cut_start(",
        ), {"m": 33, "n": 65, "mask": "everything()"},
    ),
    KernelMutant(
        "the_heads_of_a_group_race_for_one_dq", "backward_queries_kernel", GRADIENTS,
        one("backward", "at = dq + ((batch * h + head)", "at = dq + ((batch * h + head // group * group)"),
        {"m": 17, "n": 17, "r": 2},
    ),
    KernelMutant(
        "dq_is_not_scaled", "backward_queries_kernel", GRADIENTS,
        one("backward", "(dq_sum * full_scale)", "dq_sum"), {"m": 17, "n": 17, "scale": 0.25},
    ),
    KernelMutant(
        "the_cap_has_no_slope", "backward_queries_kernel", GRADIENTS,
        one("backward", "- flow[:, None])\n    if SOFTCAP:", "- flow[:, None])\n    if SOFTCAP and False:"),
        {"m": 17, "n": 17, "softcap": 1.0},
    ),
)  # fmt: skip

# On a CPU every problem of at most 7 queries goes this way, its keys in three parts.
FEW: Final = (
    KernelMutant(
        "a_cut_tile_of_few_queries_knows_only_where_keys_end", "few_kernel", DEFINITION,
        one("decode_kernel", "score = tl.where(seen, score, ", "score = tl.where((j < 17)[None, :], score, "),
        {"m": 7, "n": 17, "mask": "causal()"},
    ),
    KernelMutant(
        "parts_share_the_tile_between_them", "few_kernel", DEFINITION,
        one("decode_kernel", "* (part + 1) // parts)", "* (part + 1) // parts + 1)"), PARTS,
    ),
    KernelMutant(
        "rows_are_packed_head_by_head", "few_kernel", DEFINITION,
        one("decode_kernel", "head = key_head * group + row % group", "head = key_head * group + row // m"),
        {"m": 7, "r": 2, "n": 17},
    ),
    KernelMutant(
        "the_mean_of_few_queries_is_not_rescaled", "few_kernel", DEFINITION,
        one("decode_kernel", "acc = acc * rescale[:, None]", "acc = acc * 1.0"), PARTS,
    ),
    KernelMutant(
        "dead_keys_of_few_queries_are_multiplied_by_zero", "few_kernel", "dead_slots_change_nothing",
        one("decode_kernel", "tl.where(alive[:, None], value, 0.0)", "value * alive[:, None].to(value.dtype)"),
        {"m": 2, "n": 33, "mask": "causal() & window(3)"},
    ),
    KernelMutant(
        "the_last_part_is_not_counted", "few_merge_kernel", DEFINITION,
        one("decode_kernel", "mask=each < count, other", "mask=each < count - 1, other"), PARTS,
    ),
    KernelMutant(
        "parts_are_added_without_weight", "few_merge_kernel", DEFINITION,
        one("decode_kernel", "mean = tl.sum(weight[:, None] * part, 0)", "mean = tl.sum(part, 0)"), PARTS,
    ),
    KernelMutant(
        "lengths_do_not_move_queries", "sequences_kernel", DEFINITION,
        one("reach", "stands = end - m\n", "stands = none + n - m\n"),
        {"b": 2, "m": 7, "n": 33, "mask": "causal() & lengths([33, 20])"},
    ),
    KernelMutant(
        "a_prefix_is_not_seen_from_everywhere", "rows_kernel", DEFINITION,
        one("rows", "tl.maximum(stands + 1, start + prefix)", "stands + 1"),
        {"m": 7, "n": 33, "q_offset": 0, "mask": "prefix(20)"},
    ),
    KernelMutant(
        "documents_see_those_before_them", "rows_kernel", DEFINITION,
        one("rows", "tl.where(holds, (k_stop - k_length)[None, :], 0)", "tl.where(holds, 0, 0)"),
        {"m": 7, "n": 33, "mask": "documents([3, 4], [20, 13])"},
    ),
    KernelMutant(
        "parts_without_keys_have_no_guard", "few_merge_kernel", "blind_rows_are_zero",
        one("decode_kernel", 'shift = tl.where(top == -float("inf"), 0.0, top)', "shift = top"), {"m": 7, "n": 17},
    ),
)  # fmt: skip

PAGES: Final = "pages_are_gathered_keys"
PAGED: Final = (
    KernelMutant(
        "all_sequences_read_the_table_of_the_first", "paged_kernel", PAGES,
        one("paged_kernel", "table += sequence.to(tl.int64) * table_b", "table += 0 * sequence.to(tl.int64) * table_b"),
        {"b": 2, "m": 7, "n": 33},
    ),
    KernelMutant(
        "queries_stand_one_key_early", "paged_kernel", PAGES,
        one("paged_kernel", "stands = length - queries + i", "stands = length - queries + i - 1"), {"m": 7, "n": 33},
    ),
    KernelMutant(
        "parts_of_a_row_are_sought_side_by_side", "paged_merge_kernel", PAGES,
        one("paged_kernel", "place, heads_of_keys * M, split", "place, M, split"), {"m": 7, "n": 65, "g": 2},
    ),
)  # fmt: skip

OTHERS: Final = (
    KernelMutant(
        "angles_are_float32", "rotate_kernel", ROTATION,
        one(
            "rope_kernel", "cos, sin = cosine_sine(where, turns_of(speed), INVERSE)",
            "angle = where.to(tl.float32) * speed.to(tl.float32)\n    cos, sin = tl.cos(angle), tl.sin(angle)",
        ), {"largest": 2**20, "m": 17},
    ),
    KernelMutant(
        "the_pairings_are_swapped", "rotate_kernel", ROTATION,
        one("rope_kernel", "INTERLEAVED=interleaved", "INTERLEAVED=not interleaved"), {"d": 16, "planes": 8, "m": 17},
    ),
    KernelMutant(
        "all_planes_follow_the_first_axis", "rotate_kernel", ROTATION,
        one("rope_kernel", "driver = tl.load(axis + plane, real, 0)", "driver = 0 * tl.load(axis + plane, real, 0)"),
        {"position": "abm", "m": 17},
    ),
    KernelMutant(
        "all_sequences_turn_at_the_speed_of_the_first", "rotate_kernel", ROTATION,
        one("rope_kernel", "b[:, None] * inv_freq_b", "0 * b[:, None] * inv_freq_b"), {"rows": True, "b": 2, "m": 17},
    ),
    KernelMutant(
        "the_gradient_turns_forward", "rotate_kernel", "rotations_have_inverses",
        one("rope_kernel", "if INVERSE:\n        sin = -sin", "if INVERSE:\n        sin = sin"), {"m": 17},
    ),
    KernelMutant(
        "a_skipped_token_is_written_to_the_first_slot", "append_kernel", APPENDING,
        one(
            "append", "place = tl.load(slot + token * slot_t, there, -1).to(tl.int64)",
            "place = tl.load(slot + token * slot_t, there, -1).to(tl.int64)\n"
            "    place = tl.where(there, tl.maximum(place, 0), -1)",
        ), {"n": 17},
    ),
    KernelMutant(
        "rows_of_a_cache_are_as_long_as_it_has_rows", "append_kernel", APPENDING,
        one("append", "row = place // size\n", "row = place % (slots // size)\n"), {"n": 17, "g": 2},
    ),
    KernelMutant(
        "a_row_without_keys_has_no_guard", "merge_kernel", MERGING,
        one("merge", 'shift = tl.where(top == float("-inf"), 0.0, top)', "shift = top"), {"m": 17},
    ),
    KernelMutant(
        "the_merged_lse_is_in_base_2", "merge_kernel", MERGING,
        one("merge", "shift + tl.log(total)", "shift + tl.log2(total)"), {"m": 17},
    ),
    KernelMutant(
        "an_added_sink_has_no_weight", "merge_kernel", "sinks_are_keys_without_value",
        one("merge", "total += tl.exp(score - shift)", "total += 0.0 * tl.exp(score - shift)"), {"m": 17},
    ),
)  # fmt: skip

KERNEL_MUTANTS: Final = (*FORWARD, *BACKWARD, *FEW, *PAGED, *OTHERS)
