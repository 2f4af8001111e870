"""Races planted in a kernel of `flash`: what only a GPU can show, whose programs run at once.

The keys of a tile of queries are dealt to several programs, which add to one dQ: without atomics, so that updates are
lost, or with them, so that the sum comes in another order each time. Interpreted, one after the other, both are right.
"""

from typing import Final

from .kernel_mutants import GRADIENTS, KernelMutant
from .planting import Edit

DEAL: Final = (
    Edit("backward", "dq, dk, dv = (x.new_empty(x.shape)", "dq, dk, dv = (x.new_zeros(x.shape)"),
    Edit("backward", "for t in tl.range(0, full):", "for t in tl.range(tl.program_id(1), full, 8):"),
    Edit(
        "backward", "for t in tl.range(0, heads + left + right):",
        "for t in tl.range(tl.program_id(1), heads + left + right, 8):",
    ),
    Edit("backward", "kernel[(triton.cdiv(m, tall) * h * b,)]", "kernel[(triton.cdiv(m, tall) * h * b, 8)]"),
)  # fmt: skip
STORE: Final = "tl.store(at, (dq_sum * full_scale).to(dq.dtype.element_ty), mask=exists[:, None] & (wide < d))"
MASK: Final = "mask=exists[:, None] & (wide < d)"
RACES: Final = (
    KernelMutant(
        "dq_is_added_without_atomics", "backward_queries_kernel", GRADIENTS,
        (*DEAL, Edit("backward", STORE, f"tl.store(at, tl.load(at, {MASK}) + dq_sum * full_scale, {MASK})")), {},
    ),
    KernelMutant(
        "dq_is_added_in_any_order", "backward_queries_kernel", "calls_repeat_bitwise",
        (*DEAL, Edit("backward", STORE, f"tl.atomic_add(at, dq_sum * full_scale, {MASK})")), {},
    ),
)  # fmt: skip
