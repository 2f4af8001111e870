"""Planted bugs: backends that are wrong in one way each, and the law that must reject them.

A law that no mutant breaks tests nothing. Each of these is a bug that some published kernel or library has had, or
one that a kernel is easily written with.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final, NamedTuple, cast

from longspan.backends import OPERATIONS, Backend, eager

from . import mutant_attention as wrong
from . import mutant_caches as caches
from . import mutant_masks as seen
from . import mutant_pages as paged
from . import mutant_rotation as turned
from . import mutant_sizes as sized


class Mutant(NamedTuple):
    """A backend with one bug: ``sentence`` says which, ``law`` names the law that must reject it."""

    name: str
    sentence: str
    backend: Backend
    law: str


def mutant(law: str, operation: str, bug: Callable[..., Any]) -> Mutant:
    """Plant a bug in one operation of the specification."""
    functions = {name: getattr(eager, name) for name in (*OPERATIONS, "unavailable", "declines")}
    backend = SimpleNamespace(**{**functions, operation: bug})
    return Mutant(bug.__name__, str(bug.__doc__).splitlines()[0], cast("Backend", backend), law)


DEFINITION: Final = "attention_is_its_definition"

MUTANTS: Final = (
    mutant(DEFINITION, "attention", seen.window_one_short),
    mutant(DEFINITION, "attention", seen.window_one_long),
    mutant(DEFINITION, "attention", seen.causal_from_the_top_left),
    mutant("later_queries_stand_alone", "attention", seen.causal_from_the_top_left),
    mutant(DEFINITION, "attention", seen.causal_excludes_the_diagonal),
    mutant("wide_windows_are_causal", "attention", seen.windows_ignored),
    mutant(DEFINITION, "attention", wrong.lse_in_base_2),
    mutant(DEFINITION, "attention", wrong.sink_missing_from_lse),
    mutant(DEFINITION, "attention", wrong.sink_missing),
    mutant(DEFINITION, "attention", wrong.sink_in_every_part),
    mutant(DEFINITION, "attention", wrong.softcap_before_scale),
    mutant(DEFINITION, "attention", wrong.tail_tile_dropped),
    mutant("keys_have_no_order", "attention", wrong.tail_tile_dropped),
    mutant(DEFINITION, "attention", wrong.split_not_merged),
    mutant(DEFINITION, "attention", wrong.rescale_forgotten),
    mutant(DEFINITION, "attention", wrong.full_tile_skipped),
    mutant(DEFINITION, "attention", seen.cut_tile_not_masked),
    mutant(DEFINITION, "attention", seen.chunks_of_the_batch),
    mutant(DEFINITION, "attention", seen.first_keys_forgotten),
    mutant(DEFINITION, "attention", seen.first_keys_beyond_the_edge),
    mutant(DEFINITION, "attention", seen.documents_leak),
    mutant(DEFINITION, "attention", seen.lengths_ignored),
    mutant(DEFINITION, "attention", wrong.scale_ignored),
    mutant(DEFINITION, "attention", wrong.scale_of_the_value_dim),
    mutant(DEFINITION, "attention", wrong.alibi_before_softcap),
    mutant(DEFINITION, "attention", wrong.float32_rounded_to_bfloat16),
    mutant("keys_split_anywhere", "attention", seen.k_offset_ignored),
    mutant("keys_split_anywhere", "attention", seen.q_offset_ignored),
    mutant("groups_are_repeated_heads", "attention", wrong.heads_read_the_wrong_group),
    mutant("blind_rows_are_zero", "attention", wrong.blind_rows_are_nan),
    mutant("blind_rows_are_zero", "attention", wrong.blind_rows_see_everything),
    mutant("blind_rows_are_zero", "attention", wrong.blind_rows_have_infinite_lse),
    mutant("dead_slots_change_nothing", "attention", wrong.dead_values_times_zero),
    mutant("calls_repeat_bitwise", "attention", wrong.order_of_sums_varies()),
    mutant("arguments_survive", "attention", wrong.query_scaled_in_place),
    mutant("gradients_are_exact", "attention", wrong.gradient_of_one_head_of_a_group),
    mutant("gradients_are_exact", "attention", wrong.gradient_of_the_sink_lost),
    mutant("gradients_are_exact", "attention", wrong.gradient_without_softcap),
    mutant("gradients_flow_through_lse", "attention", wrong.gradient_of_lse_lost),
    mutant(DEFINITION, "attention", sized.v_read_with_strides_of_k),
    mutant(DEFINITION, "attention", sized.rows_past_192_zero),
    mutant(DEFINITION, "attention", sized.second_key_tile_of_a_prompt_dropped),
    mutant(DEFINITION, "attention", sized.groups_of_more_than_4_heads_wrong),
    mutant(DEFINITION, "attention", sized.more_than_3_sequences_wrong),
    mutant(DEFINITION, "attention", sized.far_offsets_wrap_int16),
    mutant(DEFINITION, "attention", sized.out_dtype_rounded_first),
    mutant("gradients_are_exact", "attention", sized.d_out_read_as_contiguous),
    mutant("gradients_are_exact", "attention", sized.dk_of_keys_past_192_lost),
    mutant("gradients_are_exact", "attention", sized.dq_of_rows_past_192_lost),
    mutant("gradients_are_exact", "attention", sized.gradient_with_out_dtype_wrong),
    mutant("gradients_are_exact", "attention", sized.gradient_of_all_or_nothing),
    mutant("ragged_batches_are_separate_sequences", "attention_varlen", caches.varlen_from_the_top_left),
    mutant("ragged_batches_are_separate_sequences", "attention_varlen", caches.varlen_is_one_sequence),
    mutant("ragged_gradients_are_exact", "attention_varlen", caches.varlen_is_one_sequence),
    mutant("pages_are_gathered_keys", "attention_paged", caches.pages_in_storage_order),
    mutant("pages_are_gathered_keys", "attention_paged", caches.last_page_read_to_its_end),
    mutant("ragged_batches_are_separate_sequences", "attention_varlen", paged.int64_lengths_misread),
    mutant("ragged_batches_are_separate_sequences", "attention_varlen", paged.packed_keys_read_in_a_row),
    mutant("ragged_batches_are_separate_sequences", "attention_varlen", paged.varlen_state_is_float64),
    mutant("ragged_batches_are_separate_sequences", "attention_varlen", paged.tokens_past_the_last_sequence_read_on),
    mutant("pages_are_gathered_keys", "attention_paged", paged.page_boundary_off_by_one),
    mutant("pages_are_gathered_keys", "attention_paged", paged.table_of_the_next_sequence),
    mutant("pages_are_gathered_keys", "attention_paged", paged.int64_tables_misread),
    mutant("pages_are_gathered_keys", "attention_paged", paged.pool_read_in_a_row),
    mutant("pages_are_gathered_keys", "attention_paged", paged.pages_of_more_than_128_wrong),
    mutant("pages_are_gathered_keys", "attention_paged", paged.pages_that_are_no_power_of_two_wrong),
    mutant("pages_are_gathered_keys", "attention_paged", paged.paged_split_never_merged),
    mutant("pages_are_gathered_keys", "attention_paged", paged.paged_state_is_float64),
    mutant("pages_are_gathered_keys", "attention_paged", paged.lengths_zeroed_in_place),
    mutant(DEFINITION, "attention", paged.merge_of_parts_without_keys),
    mutant("appending_is_concatenation", "append_", paged.appended_to_a_copy),
    mutant("appending_is_concatenation", "append_", paged.appended_beside_a_slice),
    mutant("merging_has_no_order", "merge", caches.merge_averages),
    mutant("merging_has_no_order", "merge", caches.merge_in_base_2),
    mutant("merging_has_no_order", "merge", caches.merge_of_nothing_is_nan),
    mutant("merging_has_no_brackets", "merge", caches.merge_keeps_the_first_lse),
    mutant("sinks_are_keys_without_value", "add_sink", caches.sink_overflows),
    mutant("sinks_are_keys_without_value", "add_sink", caches.sink_leaves_lse),
    mutant("appending_is_concatenation", "append_", turned.skipped_tokens_written),
    mutant("appending_is_concatenation", "append_", turned.appended_keys_not_turned),
    mutant("rotation_is_its_definition", "rotate", turned.attention_factor_missing),
    mutant("rotation_is_its_definition", "rotate", turned.angles_in_float32),
    mutant("rotation_is_its_definition", "rotate", turned.other_pairing),
    mutant("rotation_is_its_definition", "rotate", turned.turned_backwards),
    mutant("rotation_is_its_definition", "rotate", turned.tail_scaled),
    mutant("rotation_is_its_definition", "rotate", turned.planes_paired_across_the_head),
    mutant("rotation_is_its_definition", "rotate", turned.one_axis_for_all),
    mutant("rotation_is_its_definition", "rotate", turned.one_speed_for_the_batch),
    mutant("only_distance_matters", "rotate", turned.angles_in_float32),
    mutant("only_distance_matters", "rotate", turned.positions_rounded_to_float16),
    mutant("rotations_have_inverses", "rotate", turned.gradient_turned_forward),
    mutant("queries_and_keys_turn_alike", "rotate_qk", turned.keys_not_turned),
    mutant("cached_keys_move", "rerotate", turned.moved_without_the_old),
    mutant("cached_keys_move", "rerotate", turned.moved_without_the_factor),
    mutant("rotation_is_its_definition", "rotate", turned.one_factor_for_the_batch),
    mutant("rotation_is_its_definition", "rotate", turned.int32_positions_misread),
    mutant("rotation_is_its_definition", "rotate", turned.tokens_past_192_not_turned),
    mutant("rotation_is_its_definition", "rotate", turned.heads_past_10_not_turned),
    mutant("rotation_is_its_definition", "rotate", turned.heads_turned_in_place),
    mutant("rotation_is_its_definition", "rotate", turned.turned_heads_are_float64),
    mutant("queries_and_keys_turn_alike", "rotate_qk", turned.pair_is_float64),
    mutant("pairs_turn_back_alike", "rotate_qk", turned.gradient_of_turned_keys_lost),
    mutant("cached_keys_move", "rerotate", turned.moved_keys_are_float64),
    mutant("moves_have_inverses", "rerotate", turned.gradient_of_moved_keys_lost),
    mutant("merged_gradients_are_exact", "merge", caches.merge_without_gradient_of_lse),
    mutant("merging_has_no_order", "merge", caches.merge_of_more_than_5_drops),
    mutant("merging_has_no_order", "merge", caches.merged_state_is_float64),
    mutant("sink_gradients_are_exact", "add_sink", caches.added_sink_is_a_constant),
    mutant("sinks_are_keys_without_value", "add_sink", caches.sink_added_in_place),
)
