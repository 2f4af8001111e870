# pyright: basic, reportAttributeAccessIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalCall=false
"""Launching a kernel again for a tenth of what the first launch costs the host.

Triton binds the arguments of ``kernel[grid](…)`` by name, specialises them (is it 1, does 16 divide it?), prints the
options, looks all that up, and asks every tensor for its address from C through Python: of forty arguments and twenty
constants, 70 to 140 µs. Here two things are kept:

- A `Plan` is a compiled kernel by the specialisation of its arguments, which triton's own function tells.
- A `Bound` is a launch that lacks only addresses. Whoever keeps one must ask it only for problems that are equal in
  everything but addresses; that these are aligned as they were, it sees itself.

Where triton is asked for something else (hooks, debugging) or is not one that is known, it launches as it always does.
"""

from collections.abc import Callable, Hashable
from functools import cache, partial
from itertools import repeat
from typing import Any, Final

import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from longspan.autotune import on_forget, overridden

from .direct import ALIGNED, Described, Direct, layout_described

KNOWN: Final = ("3.6.", "3.7.", "3.9.")  # versions of triton whose launches were read and are tested
MANY: Final = 2048  # problems of an operation that are remembered at once; beyond, all are forgotten
RUN: Final = JITFunction.run  # by which triton launches; who puts another in its place wants to see every launch
MEMORIES: Final[list[Any]] = []


def memory() -> dict[Any, Any]:
    """Make a dictionary that `forget` empties, and the tuner's where it has something new to say."""
    known: dict[Any, Any] = {}
    MEMORIES.append(known)
    on_forget(known.clear)
    return known


def recall(known: dict[Any, Any], key: Hashable) -> Any:
    """Look a value up, or None; no argument is so wrong that this fails before it is checked."""
    try:
        value = known.get(key)
        return None if value is None or overridden() else value
    except TypeError:  # it holds something that has no hash
        return None


def remember(known: dict[Any, Any], key: Hashable, value: object) -> None:
    """Keep how a problem is launched, unless a choice was overridden, which is not the one that serves."""
    if not overridden():
        keep(known, key, value)


def keep(known: dict[Any, Any], key: Hashable, value: object) -> None:
    """Keep a value; a program that never asks the same again must not grow for it."""
    if len(known) >= MANY:
        known.clear()
    known[key] = value


def forget() -> None:
    """Forget every launch, so that the next ones choose anew; what is compiled stays compiled."""
    for known in MEMORIES:
        known.clear()


def hooked() -> bool:
    """Whether somebody watches launches, or asks for other code than the kernel's own."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return JITFunction.run is not RUN or bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.debug
        or runtime.jit_cache_hook
        or runtime.add_stages_inspection_hook
    )


def layout(x: Tensor | None) -> Hashable:
    """All of a tensor but its contents and its address: what keys of remembered launches hold."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)


class Planned:
    """A kernel, launched as triton launches it, ``kernel[grid](*args, **flags)``, from plans.

    Runtime arguments are given by position and come first; constants and options are given by name.
    """

    def __init__(self, kernel: Any) -> None:
        """Read what of each argument is specialised; an interpreted kernel stays as it is."""
        self.kernel = kernel
        self.plans = memory()
        self.count = -1  # runtime arguments; of a kernel that is not planned, -1
        if isinstance(kernel, JITFunction) and triton.__version__.startswith(KNOWN) and triton.knobs.runtime:
            given = [not x.is_constexpr for x in kernel.params]
            runtime = [x for x in kernel.params if not x.is_constexpr]
            if given == sorted(given, reverse=True) and not any(x.annotation_type for x in runtime):
                self.count = len(runtime)
                self.modes = (
                    [x.is_const for x in runtime],
                    [not x.do_not_specialize for x in runtime],
                    [not x.do_not_specialize_on_alignment for x in runtime],
                )
                self.constants = (None,) * (len(given) - self.count)

    def __getattr__(self, name: str) -> Any:
        """Be the kernel in everything else."""
        return getattr(self.kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., "Bound | None"]:
        """Take a grid; the result launches, and returns a `Bound` to do it again, or None."""
        return partial(self.launch, grid)

    def key(self, args: tuple[Any, ...], flags: dict[str, Any], device: int) -> tuple[Hashable, ...]:
        """All that the compiled code depends on: equal keys, equal code."""
        return (
            device,
            *map(specialise(), repeat(backend_of(triton.runtime.driver.active, device)), args, *self.modes),
            *flags.items(),
        )

    def launch(self, grid: tuple[int, ...], *args: Any, **flags: Any) -> "Bound | None":
        """Launch; by triton, if it was never done or somebody watches."""
        if len(args) != self.count or self.kernel.pre_run_hooks or hooked():
            self.kernel[grid](*args, **flags)
            return None
        device = triton.runtime.driver.active.get_current_device()
        key = self.key(args, flags, device)
        plan = self.plans.get(key)
        if plan is None:
            compiled = self.kernel[grid](*args, **flags)
            if type(compiled) is not CompiledKernel or compiled.function is None:
                return None  # something that is not known
            plan = Plan(compiled, device, args, self.modes[2], self.constants, self.kernel.pre_run_hooks)
            keep(self.plans, key, plan)
        else:
            plan(grid, args)
        return Bound(plan, grid, args) if plan.common else None


def planned(kernel: Any) -> Planned:
    """Launch a kernel from plans."""
    return Planned(kernel)


@cache
def specialise() -> Callable[..., tuple[Any, Any]]:
    """Triton's own function from an argument to its type and what the code may assume of it."""
    from triton._C.libtriton import native_specialize_impl  # noqa: PLC0415 - only of versions that are known

    return native_specialize_impl


@cache
def backend_of(driver: Any, device: int) -> Any:
    """What compiles for the current device, and has its say in specialisation."""
    del device
    return triton.compiler.make_backend(driver.get_current_target())


class Plan:
    """A compiled kernel and how it is launched.

    Attributes:
        count: Arguments that are addresses: they come first.
        slots: Which of them are compiled for by their alignment.
        described: Which are descriptors.
        common: Whether all slots are aligned, so that launches can be bound: code for any address must not become the
            common one.
        watchers: The kernel's own hooks, the list that they may be added to.
        direct: Launches without triton's wrappers; None where that is not known how.
    """

    def __init__(
        self, compiled: CompiledKernel, device: int, args: tuple[Any, ...], aligns: list[bool],
        constants: tuple[None, ...], watchers: list[Any],
    ) -> None:  # fmt: skip
        """Keep what each launch hands to the launcher; of the arguments, only what all of this plan share."""
        self.compiled, self.device, self.constants, self.watchers = compiled, device, constants, watchers
        self.run = compiled.run
        self.stream: Callable[[int], int] = triton.runtime.driver.active.get_current_stream
        # No metadata, and no hooks to hand them to.
        self.head = (compiled.function, compiled.packed_metadata, None, None, None)
        self.count = next((i for i, x in enumerate(args) if isinstance(x, int | float)), len(args))
        given = args[: self.count]
        self.slots = [i for i in range(self.count) if aligns[i]]
        self.described = [i for i, x in enumerate(given) if hasattr(x, "block_shape")]  # triton's, or Gluon's
        self.common = not any(isinstance(x, tuple) for x in given) and not any(
            address_of(given[i]) % ALIGNED for i in self.slots
        )
        self.direct = Direct.of(self)

    def __call__(self, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """Launch on tensors, descriptors and numbers, as triton would after its bookkeeping."""
        self.run(*whole(grid), self.stream(self.device), *self.head, *args, *self.constants)


def whole(grid: tuple[int, ...]) -> tuple[int, int, int]:
    """Give a grid its three axes."""
    return (*grid, 1, 1)[:3]  # type: ignore[return-value]


class Bound:
    """A launch of which everything is known but the addresses that come first among its arguments.

    Attributes:
        plan: The compiled kernel.
        grid: Programs.
        numbers: Arguments after the addresses.
        described: Slots of descriptors, and the layouts there; of a launch that has a line, that of its plan.
        line: All that the C launcher takes but addresses, if it is called directly.
        maps: Descriptors, by their number and the address that they describe.
    """

    def __init__(self, plan: Plan, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """Keep the layouts of what was given, and no tensor."""
        self.plan, self.grid, self.numbers = plan, whole(grid), args[plan.count :]
        self.described = [(i, Described(args[i])) for i in plan.described]
        self.line = plan.direct and plan.direct.line(self)
        self.maps: dict[tuple[int, int], Any] = {}

    def resized(self, grid: tuple[int, ...], numbers: tuple[Any, ...], *tensors: Any) -> "Bound":
        """Bind the same code to another grid, other numbers and tensors of other sizes.

        Whoever asks must know that the code is the same: that all is the same that triton specialises.
        """
        other = self.alike(grid, numbers)
        if self.line:
            other.line = self.plan.direct.resized(self.line, other, tensors)
        else:
            other.described = [(i, like.of(*layout_described(tensors[i]))) for i, like in self.described]
        return other

    def longer(self, numbers: tuple[Any, ...], tokens: int) -> "Bound":
        """Bind the same code to other numbers, and to tensors of so many tokens, more than one, in the same places."""
        other = self.alike(self.grid, numbers)
        if self.line:
            other.line = self.plan.direct.longer(self.line, numbers, tokens)
        else:
            other.described = [(i, like.longer(tokens)) for i, like in self.described]
        return other

    def alike(self, grid: tuple[int, ...], numbers: tuple[Any, ...]) -> "Bound":
        """Bind the same code and the same layouts to another grid and other numbers."""
        other = object.__new__(Bound)
        other.plan, other.grid, other.numbers, other.maps = self.plan, whole(grid), numbers, {}
        other.described, other.line = self.described, self.line
        return other

    def __call__(self, *addresses: int) -> bool:
        """Launch on other addresses, 0 for what was None; or say False, and do nothing, if one is not aligned."""
        plan, bits = self.plan, 0
        for i in plan.slots:
            bits |= addresses[i]
        if bits % ALIGNED or plan.watchers or hooked():
            return False
        stream = plan.stream(plan.device)
        if plan.direct is not None:
            plan.direct(self, stream, addresses)
            return True
        args: list[Any] = list(addresses)
        for i, layout in self.described:
            args[i] = layout.at(addresses[i])
        plan.run(*self.grid, stream, *plan.head, *args, *self.numbers, *plan.constants)
        return True


def address_of(x: Tensor | TensorDescriptor | None) -> int:
    """Address of what a kernel is given, 0 for None."""
    return 0 if x is None else x.data_ptr() if isinstance(x, Tensor) else x.base.data_ptr()
