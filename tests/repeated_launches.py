"""Launches of interpreted kernels that can be repeated, as those of compiled kernels are by `flash.plan`.

Plans are not made of interpreted kernels. Here they are: what is repeated on other addresses runs in the interpreter,
and is held to what triton specialises of the arguments that it was first launched on, and of those that it is given.
"""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from longspan.backends.flash import decode, decode_choices, forward, launch, paged_launch, plan, reach, rows

ALIGNED = 16  # bytes
REPEATED: list[str] = []  # kernels that were launched from plans


@cache
def compiler() -> Any:
    """What says, beside triton, how arguments are specialised on sm_90."""
    return triton.compiler.make_backend(GPUTarget("cuda", 90, 32))


class Kernel:
    """An interpreted kernel whose launches can be repeated."""

    def __init__(self, kernel: Any) -> None:
        options, names = kernel.kernel.kwargs, kernel.kernel.arg_names
        self.kernel, self.name = kernel, kernel.kernel.__name__
        self.free = [name in (options["do_not_specialize"] or ()) for name in names]
        self.loose = [name in (options["do_not_specialize_on_alignment"] or ()) for name in names]

    def code(self, args: tuple[Any, ...]) -> list[Any]:
        """All that is compiled for, of arguments."""
        return [
            plan.specialise()(compiler(), x, False, not free, not loose)
            for x, free, loose in zip(args, self.free, self.loose, strict=False)
        ]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., "Bound | None"]:
        def launched(*args: Any, **flags: Any) -> Bound | None:
            self.kernel[grid](*args, **flags)
            bound = Bound(self, grid, args, flags)
            aligned = all(plan.address_of(args[i]) % ALIGNED == 0 for i in bound.slots)
            return bound if aligned else None

        return launched


class Bound:
    """A launch in the interpreter, to be repeated on other addresses; see `plan.Bound`."""

    def __init__(self, kernel: Kernel, grid: tuple[int, ...], args: tuple[Any, ...], flags: dict[str, Any]) -> None:
        self.kernel, self.grid, self.flags, self.code = kernel, grid, flags, kernel.code(args)
        self.count = next(i for i, x in enumerate(args) if isinstance(x, int | float))
        self.slots = [i for i in range(self.count) if not kernel.loose[i]]
        self.numbers = args[self.count :]
        bases = [x.base if isinstance(x, TensorDescriptor) else x for x in args[: self.count]]
        self.dtypes = [None if x is None else x.dtype for x in bases]
        self.described = {
            i: (list(x.shape), list(x.strides), list(x.block_shape))
            for i, x in enumerate(args) if isinstance(x, TensorDescriptor)
        }  # fmt: skip

    def resized(self, grid: tuple[int, ...], numbers: tuple[Any, ...], *tensors: Tensor) -> "Bound":
        """Put other numbers, and the layouts of other tensors, in the places of these."""
        other = object.__new__(Bound)
        vars(other).update(vars(self), grid=grid, numbers=numbers)
        other.described = {
            i: (*plan.layout_described(tensors[i]), block) for i, (_, _, block) in self.described.items()
        }
        return other

    def longer(self, numbers: tuple[Any, ...], tokens: int) -> "Bound":
        """Put other numbers in the places of these, and more tokens."""
        other = object.__new__(Bound)
        vars(other).update(vars(self), numbers=numbers)
        other.described = {i: ([*shape[:2], tokens, *shape[3:]], *rest) for i, (shape, *rest) in self.described.items()}
        return other

    def __call__(self, *addresses: int) -> bool:
        """Launch on what lies there."""
        if any(addresses[i] % ALIGNED for i in self.slots):
            return False
        args: list[Any] = [self.at(i, x) for i, x in enumerate(addresses)]
        args += self.numbers
        assert self.kernel.code(tuple(args)) == self.code, f"{self.kernel.name} is compiled for other arguments"
        self.kernel.kernel[self.grid](*args, **self.flags)
        REPEATED.append(self.kernel.name)
        return True

    def at(self, i: int, address: int) -> Any:
        """What a kernel is given for an address."""
        dtype = self.dtypes[i]
        if dtype is None:
            assert address == 0
            return None
        if address == 0:  # of a workspace that nobody needs
            return torch.empty(0, dtype=dtype)
        x = torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)
        return TensorDescriptor(x, *self.described[i]) if i in self.described else x


def repeat(patch: pytest.MonkeyPatch) -> None:
    """Choose as on an H100 of few multiprocessors, repeat in the interpreter, remember nothing from elsewhere."""
    for module, names in (
        (forward, ("forward_kernel",)), (decode, ("few_kernel", "few_merge_kernel")),
        (paged_launch, ("paged_kernel", "paged_merge_kernel")), (reach, ("sequences_kernel",)),
        (rows, ("rows_kernel",)),
    ):  # fmt: skip
        for name in names:
            patch.setattr(module, name, Kernel(getattr(module, name)))
    for module, name, count in ((decode, "few_key", 4), (paged_launch, "paged_key", 1)):
        of = {"architecture": "sm_90", "processors": count}
        made = getattr(decode_choices, name)
        patch.setattr(module, name, lambda *args, made=made, of=of: replace(made(*args), **of))
    for module, name in ((decode, "choose_few"), (paged_launch, "choose_paged")):
        # The interpreter launches nothing before another kernel has ended.
        chosen = getattr(decode_choices, name)
        patch.setattr(module, name, lambda key, chosen=chosen: replace(chosen(key), early=False))
    patch.setattr(launch, "architecture", lambda: "sm_90")
    patch.setattr(decode, "INTERPRETED", False)
    patch.setattr(decode, "processors", lambda _: 4)
    plan.forget()
    REPEATED.clear()
