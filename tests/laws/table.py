"""The laws: each a sentence, an operation, the problems it is tried on, and the function that checks it."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from hypothesis import strategies as st

from . import attention, caches, rotation, states
from .strategies import FEW, PLAIN, attentions, decodes, prefills, rotates


class Law(NamedTuple):
    """A law of one operation.

    ``check(backend, problem, device)`` returns the worst error as a fraction of its budget, raises AssertionError
    where the backend breaks the law, and lets `Unsupported` through.
    """

    operation: str
    check: Callable[..., float]
    problems: st.SearchStrategy[Any]

    @property
    def name(self) -> str:
        """Name of the law: that of the function that states it."""
        return self.check.__name__

    @property
    def sentence(self) -> str:
        """The law in plain English."""
        return str(self.check.__doc__).splitlines()[0]


# Gradients in float16 must stay below 65504: no needles.
MILD: dict[str, Any] = {"needle": False, "mean": 0.0}
UNPLACED: dict[str, Any] = {"q_offset": None, "k_offset": 0}
CAUSAL: dict[str, Any] = {**UNPLACED, "mask": "causal()", "sink": None, "dead": 0.0, "out_dtype": None}
# A mask of the same shape for every sequence of a ragged batch, which brings its own documents.
RAGGED = st.sampled_from(
    ["everything()", "causal()", "causal()", "window(5)", "causal() & window(20, keep_first=3)", "prefix(4)",
     "chunks(7) & causal()"]
)  # fmt: skip


# A layout in which every sequence has slots of its own.
OWN = st.sampled_from(["bhmd", "bmhd", "slice"])


def ragged(**fixed: Any) -> st.SearchStrategy[Any]:
    """Draw problems whose mask says nothing of lengths or documents."""
    return attentions(**{"mask": RAGGED, **UNPLACED, "dead": 0.0, **fixed})


def laws(**sizes: Any) -> tuple[Law, ...]:
    """State every law on problems of all sizes, or of those that are given (`SMALL` suits interpreters)."""
    everything, plain = attentions(**sizes), attentions(**PLAIN, **sizes)
    forward = st.one_of(everything, plain)
    backward = st.one_of(attentions(**MILD, **sizes), attentions(**{**PLAIN, **MILD, **sizes}, sink=None))
    if not sizes:
        forward = st.one_of(forward, decodes(), prefills())
        backward = st.one_of(backward, backward, prefills(**MILD))
    paged = (
        ragged(**sizes) if sizes else st.one_of(ragged(), ragged(b=2, g=1, m=FEW, n=st.sampled_from([129, 200, 513])))
    )
    turns = {name: sizes[name] for name in ("b", "m", "d", "r") if name in sizes}
    return (
        Law("attention", attention.attention_is_its_definition, forward),
        Law("attention", attention.gradients_are_exact, backward),
        Law("attention", attention.gradients_flow_through_lse, backward),
        Law("attention", attention.keys_split_anywhere, forward),
        Law("attention", attention.keys_have_no_order, attentions(mask="everything()", alibi=None, dead=0.0, **sizes)),
        Law("attention", attention.groups_are_repeated_heads, everything),
        Law("attention", attention.wide_windows_are_causal, attentions(**CAUSAL, **sizes)),
        Law("attention", attention.later_queries_stand_alone, ragged(**sizes)),
        Law("attention", attention.blind_rows_are_zero, attentions(**UNPLACED, mask="everything()", **sizes)),
        Law(
            "attention",
            attention.dead_slots_change_nothing,
            attentions(**MILD, storage=OWN, k_storage=OWN, v_storage=OWN, **sizes),
        ),
        Law("attention", attention.calls_repeat_bitwise, everything),
        Law("attention", attention.arguments_survive, everything),
        Law("attention_varlen", caches.ragged_batches_are_separate_sequences, ragged(**sizes)),
        Law("attention_varlen", caches.ragged_gradients_are_exact, ragged(**MILD, **sizes)),
        Law("attention_paged", caches.pages_are_gathered_keys, paged),
        Law("append_", caches.appending_is_concatenation, ragged(**{**sizes, "b": 1})),
        Law("rotate", rotation.rotation_is_its_definition, rotates(**turns)),
        Law("rotate", rotation.rotations_have_inverses, rotates(**turns)),
        Law("rotate", rotation.only_distance_matters, rotates(largest=2**20, position="m", rows=False, **turns)),
        Law("rotate_qk", rotation.queries_and_keys_turn_alike, rotates(**turns)),
        Law("rotate_qk", rotation.pairs_turn_back_alike, rotates(**turns)),
        Law("rerotate", rotation.cached_keys_move, rotates(**turns)),
        Law("rerotate", rotation.moves_have_inverses, rotates(**turns)),
        Law("merge", states.merging_has_no_order, everything),
        Law("merge", states.merging_has_no_brackets, everything),
        Law("merge", states.merged_gradients_are_exact, attentions(mean=0.0, **sizes)),
        Law("add_sink", states.sinks_are_keys_without_value, attentions(sink=100.0, **sizes)),
        Law("add_sink", states.sink_gradients_are_exact, attentions(mean=0.0, **sizes)),
    )


LAWS: Final = laws()
