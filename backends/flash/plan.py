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

from longspan.autotune import overridden

KNOWN: Final = ("3.6.", "3.7.", "3.9.")  # versions of triton whose launches were read and are tested
DIRECT: Final = "3.6."  # whose C launcher is called without the function around it
ALIGNED: Final = 16  # bytes: triton compiles for addresses that this divides, or for any
MANY: Final = 2048  # problems of an operation that are remembered at once; beyond, all are forgotten
RUN: Final = JITFunction.run  # by which triton launches; who puts another in its place wants to see every launch
MEMORIES: Final[list[dict[Any, Any]]] = []


def memory() -> dict[Any, Any]:
    """Make a dictionary that `forget` empties."""
    MEMORIES.append({})
    return MEMORIES[-1]


def recall(known: dict[Any, Any], key: Hashable) -> Any:
    """Look a value up, or None; no argument is so wrong that this fails before it is checked."""
    try:
        return None if overridden() else known.get(key)
    except TypeError:  # it holds something that has no hash
        return None


def remember(known: dict[Any, Any], key: Hashable, value: object) -> None:
    """Keep a value; a program that never asks the same again (growing caches) must not grow for it."""
    if overridden():
        return  # it was made under a choice that is not the one that serves
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


class Planned:
    """A kernel, launched as triton launches it, ``kernel[grid](*args, **flags)``, from plans.

    Runtime arguments are given by position and come first; constants and options are given by name.
    """

    def __init__(self, kernel: Any) -> None:
        """Read what of each argument is specialised; an interpreted kernel stays as it is."""
        self.kernel = kernel
        self.plans = memory()
        self.count = -1  # runtime arguments; of a kernel that is not planned, -1
        if type(kernel) is JITFunction and triton.__version__.startswith(KNOWN) and triton.knobs.runtime:
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
        return (device, *map(specialise(), repeat(backend_of(device)), args, *self.modes), *flags.items())

    def launch(self, grid: tuple[int, ...], *args: Any, **flags: Any) -> "Bound | None":
        """Launch; by triton, if it was never done or somebody watches."""
        if len(args) != self.count or self.kernel.pre_run_hooks or hooked():
            self.kernel[grid](*args, **flags)
            return None
        device = triton.runtime.driver.active.get_current_device()
        key = self.key(args, flags, device)
        plan = self.plans.get(key)
        if plan is None:
            plan = Plan.of(self.kernel[grid](*args, **flags), device, self.constants)
            if plan is not None:
                remember(self.plans, key, plan)
        else:
            plan(grid, args)
        return None if plan is None else Bound.of(plan, grid, args, self.modes[2])


def planned(kernel: Any) -> Planned:
    """Launch a kernel from plans."""
    return Planned(kernel)


@cache
def specialise() -> Callable[..., tuple[Any, Any]]:
    """Triton's own function from an argument to its type and what the code may assume of it."""
    from triton._C.libtriton import native_specialize_impl  # noqa: PLC0415 - only of versions that are known

    return native_specialize_impl


@cache
def backend_of(device: int) -> Any:
    """What compiles for a device, and has its say in specialisation."""
    del device
    return triton.compiler.make_backend(triton.runtime.driver.active.get_current_target())


class Plan:
    """A compiled kernel and how it is launched."""

    def __init__(self, compiled: CompiledKernel, device: int, constants: tuple[None, ...]) -> None:
        """Keep what each launch hands to the launcher."""
        self.compiled, self.device, self.constants = compiled, device, constants
        self.run = compiled.run
        self.stream: Callable[[int], int] = triton.runtime.driver.active.get_current_stream
        # No metadata, and no hooks to hand them to.
        self.head = (compiled.function, compiled.packed_metadata, None, None, None)

    @classmethod
    def of(cls, compiled: Any, device: int, constants: tuple[None, ...]) -> "Plan | None":
        """Plan what triton just launched, or nothing where it came back with something unknown."""
        if type(compiled) is CompiledKernel and compiled.function is not None:
            return cls(compiled, device, constants)
        return None

    def __call__(self, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """Launch on tensors, descriptors and numbers, as triton would after its bookkeeping."""
        self.run(*whole(grid), self.stream(self.device), *self.head, *args, *self.constants)


def whole(grid: tuple[int, ...]) -> tuple[int, int, int]:
    """Give a grid its three axes."""
    return (*grid, 1, 1)[:3]  # type: ignore[return-value]


class Address(int):
    """An address that launchers take for a tensor."""

    def data_ptr(self) -> int:
        """Be one's own address."""
        return int(self)


class Described:
    """A `TensorDescriptor` of some address, which launchers read and nobody checks again."""

    round_f32_to_tf32 = False

    def __init__(self, like: TensorDescriptor) -> None:
        """Take the layout of another."""
        self.shape, self.strides, self.padding = tuple(like.shape), tuple(like.strides), like.padding
        self.base = Address(0)

    def at(self, address: int) -> "Described":
        """Describe the same layout elsewhere."""
        moved = object.__new__(Described)
        moved.shape, moved.strides, moved.padding = self.shape, self.strides, self.padding
        moved.base = Address(address)
        return moved


class Bound:
    """A launch of which everything is known but the addresses that come first among its arguments."""

    def __init__(
        self, plan: Plan, grid: tuple[int, ...], given: tuple[Any, ...], rest: tuple[Any, ...], slots: list[int]
    ) -> None:
        """Keep the layouts of what was given, and no tensor; ``slots`` are those whose alignment matters."""
        self.plan, self.rest, self.slots = plan, (*rest, *plan.constants), slots
        self.grid = whole(grid)
        self.described = [(i, Described(x)) for i, x in enumerate(given) if isinstance(x, TensorDescriptor)]
        self.direct = Direct.of(plan, [(i, x.shape, x.strides) for i, x in self.described])

    @classmethod
    def of(cls, plan: Plan, grid: tuple[int, ...], args: tuple[Any, ...], aligns: list[bool]) -> "Bound | None":
        """Bind a launch, unless an address was not aligned: code for any address must not become the common one."""
        count = next((i for i, x in enumerate(args) if isinstance(x, int | float)), len(args))
        given = args[:count]
        slots = [i for i in range(count) if aligns[i]]
        if any(isinstance(x, tuple) for x in given) or any(address_of(given[i]) % ALIGNED for i in slots):
            return None
        return cls(plan, grid, given, args[count:], slots)

    def __call__(self, *addresses: int) -> bool:
        """Launch on other addresses, 0 for what was None; or say False, and do nothing, if one is not aligned."""
        bits = 0
        for i in self.slots:
            bits |= addresses[i]
        if bits % ALIGNED or hooked():
            return False
        plan = self.plan
        stream = plan.stream(plan.device)
        if self.direct is not None:
            self.direct(self.grid, stream, addresses, self.rest)
            return True
        args: list[Any] = list(addresses)
        for i, layout in self.described:
            args[i] = layout.at(addresses[i])
        plan.run(*self.grid, stream, *plan.head, *args, *self.rest)
        return True


def address_of(x: Tensor | TensorDescriptor | None) -> int:
    """Address of what a kernel is given, 0 for None."""
    return 0 if x is None else x.data_ptr() if isinstance(x, Tensor) else x.base.data_ptr()


class Direct:
    """The C launcher that triton 3.6 builds for each kernel, without its Python wrappers.

    A descriptor of the copy engine is 128 bytes by value: encoding it takes a microsecond, so that of the address that
    was last seen is kept, slot by slot.
    """

    def __init__(self, launch: Callable[..., None], plan: Plan, maps: list[tuple[int, tuple[Any, ...]]]) -> None:
        """Keep the launcher and its constants."""
        run, (function, packed, *_) = plan.run, plan.head
        self.launch = launch
        self.head = (function, run.launch_cooperative_grid, run.launch_pdl, None, None, packed, None, None, None)
        self.encode: Callable[..., Any] = getattr(triton.runtime.driver.active.utils, "fill_tma_descriptor", None)  # type: ignore[assignment]
        self.maps = maps[::-1]
        self.last: dict[int, tuple[int, Any]] = {}

    @classmethod
    def of(cls, plan: Plan, described: list[tuple[int, tuple[int, ...], tuple[int, ...]]]) -> "Direct | None":
        """Find the C function under the wrappers of a kernel, or None where it is not as expected."""
        run, maps = plan.run, []
        if not triton.__version__.startswith(DIRECT) or type(run).__name__ != "CudaLauncher":
            return None
        if run.global_scratch_size or run.profile_scratch_size:
            return None
        launch = run.launch
        if described:
            names = getattr(getattr(launch, "__code__", None), "co_freevars", ())
            inside: dict[str, Any] = dict(zip(names, getattr(launch, "__closure__", None) or (), strict=False))
            layouts = getattr(plan.compiled.metadata, "tensordesc_meta", None) or ()
            if not {"launcher"} <= inside.keys() or len(layouts) != len(described) or not all(layouts):
                return None
            launch = inside["launcher"].cell_contents
            for (i, shape, strides), x in zip(described, layouts, strict=True):
                if x["fp4_padded"]:
                    return None
                element = TENSOR_MAP_TYPES.get(x["elem_type"], x["elem_type"])
                fixed = (x["swizzle"], x["elem_size"], element, x["block_size"], list(shape), list(strides), 0)
                maps.append((i, fixed))
        return cls(launch, plan, maps) if type(launch).__name__ == "builtin_function_or_method" else None

    def __call__(
        self, grid: tuple[int, int, int], stream: int, addresses: tuple[int, ...], rest: tuple[Any, ...]
    ) -> None:
        """Launch."""
        if self.maps:
            args: list[Any] = list(addresses)
            for i, fixed in self.maps:  # from the last on, so that what it grows by moves none that is to come
                address = addresses[i]
                seen = self.last.get(i)
                if seen is None or seen[0] != address:
                    self.last[i] = seen = (address, self.encode(address, *fixed))
                args[i : i + 1] = (seen[1], *fixed[4], *fixed[5])
            self.launch(*grid, stream, *self.head, *args, *rest)
        else:
            self.launch(*grid, stream, *self.head, *addresses, *rest)


# How triton 3.6 numbers element types of descriptors on the device, and how the driver does.
TENSOR_MAP_TYPES: Final = {8: 10, 9: 8, 10: 9}
