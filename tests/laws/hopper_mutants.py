"""Planted bugs in the kernels of `hopper`, and the law that must reject each, on a GPU of sm_90.

No interpreter runs these kernels. Problems are larger than those that interpreters are given: a tile of queries and one
of keys that are whole, and one of each that is cut.
"""

from typing import Final

from .kernel_mutants import DEFINITION, GRADIENTS, KernelMutant, one

QUANTISING: Final = "quantising_is_its_definition"
QUANTISED: Final = "quantised_attention_is_its_definition"
HALF: Final = {"dtype": "float16"}
CUT: Final = {**HALF, "m": 300, "n": 300, "d": 128, "e": 128, "mask": "causal()"}
WHOLE: Final = {**HALF, "m": 256, "n": 640, "d": 128, "e": 128, "mask": "everything()"}
RAGGED: Final = {**HALF, "m": 200, "n": 333, "d": 64, "e": 64, "mask": "everything()"}
PACKED: Final = {**CUT, "mask": "documents([100, 200], [100, 200]) & causal()"}
NARROW: Final = {**CUT, "d": 64, "e": 64}
WIDE: Final = {**CUT, "d": 256, "e": 256}

FORWARD: Final = (
    KernelMutant(
        "a_row_sees_one_key_more", "forward_kernel", DEFINITION,
        one("forward_kernel", "hidden = j >= last[:, None] - lane", "hidden = j > last[:, None] - lane"), CUT,
    ),
    KernelMutant(
        "a_cut_tile_is_taken_for_a_whole_one", "forward_kernel", DEFINITION,
        one("tiles", "(max(end + low, 0) + N - 1) // N, last)", "max(end + low, 0) // N, last)"),
        {**CUT, "mask": "causal() & window(200)"},
    ),
    KernelMutant(
        "the_last_key_before_a_window_is_seen", "forward_kernel", DEFINITION,
        one("forward_kernel", "hidden | (j < first[:, None] - lane)", "hidden | (j < first[:, None] - lane - 1)"),
        {**CUT, "mask": "causal() & window(70)"},
    ),
    KernelMutant(
        "the_mean_is_not_rescaled", "forward_kernel", DEFINITION,
        one(
            "forward_kernel",
            "acc = acc * gl.convert_layout(rescale, ",
            "acc = acc * gl.convert_layout(1.0 + 0.0 * rescale, ",
        ),
        {**WHOLE, "amplitude": 3.0},
    ),
    KernelMutant(
        "a_tile_of_keys_is_loaded_twice", "forward_kernel", DEFINITION,
        one("forward_kernel", "    tile = last - 1 - t\n", "    tile = last - 1 - max(t, 1)\n"), WHOLE,
    ),
    KernelMutant(
        "lse_is_in_base_2", "forward_kernel", DEFINITION,
        one("forward_kernel", "(top + gl.log2(total)) * LN_2", "top + gl.log2(total)"), CUT,
    ),
    KernelMutant(
        "the_sink_weighs_nothing", "forward_kernel", DEFINITION,
        one("forward_kernel", "total * shrink + gl.exp2(score * LOG2_E - finite)", "total * shrink"),
        {**CUT, "sink": 1.0},
    ),
    KernelMutant(
        "dead_values_are_multiplied_by_zero", "forward_kernel", "dead_slots_change_nothing",
        one("forward_kernel", "    if gl.max(gl.reshape(found, [SLICE * E]), axis=0) > 0:", "    if False:"),
        {**NARROW, "mask": "causal() & window(30)", "q_offset": 90, "n": 420, "dead": float("nan")},
    ),
    KernelMutant(
        "alibi_rewards_distance", "forward_kernel", DEFINITION,
        one("forward_kernel", "s -= slope * gl.abs(", "s += slope * gl.abs("), {**CUT, "alibi": 0.5},
    ),
    KernelMutant(
        "the_last_query_tile_of_a_head_is_the_first_of_the_next", "forward_kernel", DEFINITION,
        one("forward_kernel", "gl.store(lse + gl.cast(line, gl.int64) * m + i, natural, mask=i < m)",
            "gl.store(lse + gl.cast(line, gl.int64) * m + i, natural, mask=i < m + 8)"),
        {**RAGGED, "g": 3, "b": 2},
    ),
    KernelMutant(
        "a_document_ends_a_tile_early", "spans_kernel", DEFINITION,
        one("spans", "own_last = tl.cdiv(tl.max(tl.where(seen, stop, 0), 0), N)",
            "own_last = tl.max(tl.where(seen, stop, 0), 0) // N"),
        PACKED,
    ),
)  # fmt: skip

BACKWARD: Final = (
    KernelMutant(
        "delta_forgets_the_gradient_of_lse", "prepare_kernel", "gradients_flow_through_lse",
        one("backward_passes", "flow -= tl.load(d_lse + dense", "flow -= 0.0 * tl.load(d_lse + dense"), CUT,
    ),
    KernelMutant(
        "a_row_without_keys_has_nan_for_its_weights", "prepare_kernel", GRADIENTS,
        one("backward_passes", 'tl.where(log_sum == -float("inf"), float("inf"), log_sum)', "log_sum"),
        {**CUT, "m": 300, "n": 200},
    ),
    KernelMutant(
        "parts_of_dq_change_places", "finish_kernel", GRADIENTS,
        one("backward_passes", "tl.permute(x, [2, 5, 3, 0, 1, 4, 6])", "tl.permute(x, [2, 5, 3, 0, 4, 1, 6])"), CUT,
    ),
    KernelMutant(
        "scores_have_no_delta", "backward_kernel", GRADIENTS,
        one("backward_kernel", "(weight * (d_weight - flow))", "(weight * d_weight)"), CUT,
    ),
    KernelMutant(
        "dk_is_not_scaled", "backward_kernel", GRADIENTS,
        one("backward_kernel", "(dk_sum * full_scale)", "dk_sum"), {**NARROW, "scale": 0.25},
    ),
    KernelMutant(
        "dk_sums_over_one_head_of_its_group", "backward_kernel", GRADIENTS,
        one("backward_tiles", "// M * group\n", "// M\n"), {**CUT, "r": 2},
    ),
    KernelMutant(
        "a_tile_that_the_mask_cuts_is_taken_for_a_whole_one", "backward_kernel", GRADIENTS,
        one("backward_tiles", "full_lowest = max(start + N - high, 0)", "full_lowest = max(start - high, 0)"), CUT,
    ),
    KernelMutant(
        "the_window_of_the_gradient_is_wider", "backward_kernel", GRADIENTS,
        one("backward_scores", "(ahead >= low)", "(ahead >= low - 1)"), {**CUT, "mask": "causal() & window(70)"},
    ),
    KernelMutant(
        "both_warpgroups_hold_the_same_dq", "backward_kernel", GRADIENTS,
        one("backward_kernel", "key = key.slice(w * COLUMNS, COLUMNS, dim=1)", "key = key.slice(0, COLUMNS, dim=1)"),
        CUT,
    ),
    KernelMutant(
        "wide_heads_have_no_delta", "backward_wide_kernel", GRADIENTS,
        one("backward_wide_kernel", "d_weight = d_weight - delta_tiles.index(stage).load(SCORE)",
            "d_weight = d_weight + 0.0"),
        WIDE,
    ),
    KernelMutant(
        "a_half_of_wide_dk_is_the_other", "backward_wide_kernel", GRADIENTS,
        one("backward_wide_kernel", "k_tiles.index(1).reshape([N, C]).store((right_sum * full_scale)",
            "k_tiles.index(1).reshape([N, C]).store((left_sum * full_scale)"),
        WIDE,
    ),
)  # fmt: skip

# What is quantised here, and attention to it: by laws of their own, `quantising_is_its_definition` and
# `quantised_attention_is_its_definition`, on a causal problem of 300 tokens.
EIGHT_BITS: Final = (
    KernelMutant(
        "magnitudes_have_a_sign", "largest_kernel", QUANTISING,
        one("quantise_kernel", "size = tl.abs(heads_of(", "size = (heads_of("), {},
    ),
    KernelMutant(
        "keys_of_values_stand_in_their_own_order", "quantise_kernel", QUANTISING,
        one("quantise_kernel", "token = (place & ~15) + 8 * ((place >> 1) & 1) + 2 * ", "token = place + 0 * "), {},
    ),
    KernelMutant(
        "a_row_of_eight_bits_sees_one_key_more", "fp8_kernel", QUANTISED,
        one("fp8_kernel", "hidden = j >= last[:, None] - lane", "hidden = j > last[:, None] - lane"), {},
    ),
)  # fmt: skip

HOPPER_MUTANTS: Final = FORWARD + BACKWARD + EIGHT_BITS
