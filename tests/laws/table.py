"""The laws: each a sentence, an operation, the problems it is tried on, and the function that checks it."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from hypothesis import strategies as st

from . import attention, caches, rotation, states
from .strategies import PLAIN, attentions, decodes, rotates


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


# Gradients in float16 must stay below 65504, so their problems have no needles.
MILD: dict[str, Any] = {"needle": False, "mean": 0.0, "out_dtype": None}
BACKWARD = st.one_of(
    attentions(**MILD), attentions(**MILD, **{name: x for name, x in PLAIN.items() if name != "out_dtype"}, sink=None)
)
UNPLACED: dict[str, Any] = {"q_offset": None, "k_offset": 0}
CAUSAL: dict[str, Any] = {**UNPLACED, "mask": "causal()", "sink": None, "dead": 0.0, "out_dtype": None}
# A mask of the same shape for every sequence of a ragged batch, which brings its own documents.
RAGGED = st.sampled_from(
    ["everything()", "causal()", "causal()", "window(5)", "causal() & window(20, keep_first=3)", "prefix(4)",
     "chunks(7) & causal()"]
)  # fmt: skip


@st.composite
def ragged(draw: st.DrawFn, **fixed: Any) -> Any:
    """Draw a problem whose mask says nothing of lengths or documents."""
    return draw(attentions(mask=draw(RAGGED, label="mask"), **{**UNPLACED, "dead": 0.0, "storage": "bhmd", **fixed}))


LAWS: Final = (
    Law("attention", attention.attention_is_its_definition, st.one_of(attentions(), attentions(**PLAIN), decodes())),
    Law("attention", attention.gradients_are_exact, BACKWARD),
    Law("attention", attention.gradients_flow_through_lse, BACKWARD),
    Law("attention", attention.keys_split_anywhere, st.one_of(attentions(), attentions(**PLAIN), decodes())),
    Law("attention", attention.keys_have_no_order, attentions(mask="everything()", alibi=None, dead=0.0)),
    Law("attention", attention.groups_are_repeated_heads, attentions()),
    Law("attention", attention.wide_windows_are_causal, attentions(**CAUSAL)),
    Law("attention", attention.later_queries_stand_alone, ragged()),
    Law("attention", attention.blind_rows_are_zero, attentions(**UNPLACED, mask="everything()")),
    Law("attention", attention.dead_slots_change_nothing, attentions(**{**MILD, "storage": "bhmd"})),
    Law("attention", attention.calls_repeat_bitwise, attentions()),
    Law("attention", attention.arguments_survive, attentions()),
    Law("attention_varlen", caches.ragged_batches_are_separate_sequences, ragged()),
    Law("attention_varlen", caches.ragged_gradients_are_exact, ragged(**MILD)),
    Law("attention_paged", caches.pages_are_gathered_keys, ragged()),
    Law("append_", caches.appending_is_concatenation, ragged(b=1)),
    Law("rotate", rotation.rotation_is_its_definition, rotates()),
    Law("rotate", rotation.rotations_have_inverses, rotates()),
    Law("rotate", rotation.only_distance_matters, rotates(largest=2**20, position="m", rows=False)),
    Law("rotate_qk", rotation.queries_and_keys_turn_alike, rotates()),
    Law("rerotate", rotation.cached_keys_move, rotates()),
    Law("merge", states.merging_has_no_order, attentions()),
    Law("merge", states.merging_has_no_brackets, attentions()),
    Law("add_sink", states.sinks_are_keys_without_value, attentions(sink=100.0)),
)  # fmt: skip
