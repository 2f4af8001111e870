"""Launch plans of `flash`: equal keys are equal code, a repeated launch is the launch, and who watches sees it."""

import gc
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import JITFunction  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from longspan.backends.flash import direct, kin, plan  # noqa: E402

LAUNCHES: list[tuple[Any, ...]] = []
CORE = triton.language.core
# Interpreting a kernel that sums leaves triton's own language changed (3.7): what it was before any kernel was.
PRISTINE = [(owner, dict(vars(owner))) for owner in (CORE, CORE.tensor, CORE.tensor_descriptor_base)]


class CudaLauncher:
    """Stands where triton's launcher of that name does: writes down what would be launched."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid = launch_pdl = False

    def __init__(self, *_: Any) -> None:
        self.launch = LAUNCHES.append  # a C function, but not of the arguments of triton's

    def __call__(self, *args: Any) -> None:
        """Write down."""
        LAUNCHES.append(args)


class Utilities:
    """Loads nothing."""

    def get_device_properties(self, _: int) -> dict[str, int]:
        """Have room."""
        return {"max_shared_mem": 2**18, "multiprocessor_count": 132}

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        """Return a module, a function, registers, spills and threads."""
        return 1, 2, 3, 4, 1024

    def unload_module(self, _: int) -> None:
        """Unload nothing."""


class Driver:
    """A machine that compiles for sm_90 and runs nothing."""

    launcher_cls = CudaLauncher
    utils = Utilities()

    def get_current_target(self) -> GPUTarget:
        """Compile for this."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Be the only one."""
        return 0

    def get_current_stream(self, _: int) -> int:
        """Number of a stream that is not there."""
        return 7


@pytest.fixture(autouse=True, scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put that machine in the place of this one, and its compiled kernels out of the way."""
    patch = pytest.MonkeyPatch()
    patch.setattr(direct, "VERSION", "none")  # there is no C launcher here to be called directly
    patch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, triton 3.9 warns that it is
    patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    patch.setattr(triton.runtime.driver, "_active", Driver())
    for owner, attributes in PRISTINE:
        for name in [name for name, value in vars(owner).items() if attributes.get(name) is not value]:
            patch.setattr(owner, name, attributes[name]) if name in attributes else patch.delattr(owner, name)
    plan.backend_of.cache_clear()
    yield
    plan.backend_of.cache_clear()
    plan.forget()
    gc.collect()  # triton 3.9 unloads what is collected, from the driver that is there then
    patch.undo()


def copy(x, y, scale, n, m, free, near, N: tl.constexpr, FLAG: tl.constexpr):  # noqa: ANN001, ANN201, N803, PLR0917
    """Copy some numbers: arguments of every kind that is specialised in a way of its own."""
    at = tl.arange(0, N)
    if y is not None:
        tl.store(x + at, tl.load(y + at, mask=at < n, other=0.0) * scale, mask=at < m)
    if FLAG:
        tl.store(x + free + near, scale)


def made() -> plan.Planned:
    """A kernel of its own cache; not interpreted."""
    return plan.Planned(
        JITFunction(copy, do_not_specialize=["free"], do_not_specialize_on_alignment=["near", "y"], debug=False)
    )


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32)
ROOM = {dtype: torch.zeros(64, dtype=dtype) for dtype in DTYPES}
pointers = st.builds(lambda dtype, start: ROOM[dtype][start:], st.sampled_from(DTYPES), st.sampled_from((0, 1, 4, 8)))
described = st.builds(
    lambda dtype, size: TensorDescriptor(ROOM[dtype], [64], [1], [size]),
    st.sampled_from(DTYPES[:3]), st.sampled_from((16, 32)),
)  # fmt: skip
numbers = st.sampled_from((0, 1, 2, 8, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), 2**40))
arguments = st.tuples(
    pointers | described, st.none() | pointers, st.sampled_from((0.5, 1.0, 2)), numbers, numbers, numbers, numbers
)
options = st.fixed_dictionaries(
    {"N": st.sampled_from((16, 32)), "FLAG": st.booleans()},
    optional={"num_warps": st.sampled_from((1, 4)), "num_stages": st.sampled_from((1, 3)), "maxnreg": st.just(64)},
)


@given(first=st.tuples(arguments, options), swap=st.sets(st.integers(0, 6)), second=st.tuples(arguments, options))
def test_equal_keys_are_equal_code_and_equal_code_has_equal_keys(
    first: tuple[Any, Any], swap: set[int], second: tuple[Any, Any]
) -> None:
    kernel = made()
    args, flags = first
    # Mostly alike: two random calls would never have the same key.
    other = tuple(second[0][i] if i in swap else x for i, x in enumerate(args))
    calls = ((args, flags), (other, flags), second)
    binder = kernel.kernel.device_caches[0][-1]
    found = []
    for given_args, unsorted in calls:
        given_flags = dict(sorted(unsorted.items()))  # a place that launches writes them in one order
        _, specialization, rest = binder(*given_args, **given_flags)
        key = kernel.key(given_args, given_flags, 0)
        assert key == kernel.key(given_args, given_flags, 0)
        found.append((key, (str(specialization), str(sorted(rest.items())))))
        assert key != kernel.key(given_args, given_flags, 1)
    for key, code in found:
        for other_key, other_code in found:
            assert (key == other_key) == (code == other_code)


def test_a_planned_launch_is_the_launch_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x, y = made(), torch.zeros(32), torch.zeros(32)
    args, flags = (x, y, 0.5, 16, 32, 3, 5), {"N": 16, "FLAG": True, "num_warps": 2}
    LAUNCHES.clear()
    bound = kernel[2, 3](*args, **flags)
    assert bound is not None
    monkeypatch.setattr(JITFunction, "create_binder", None)  # from here on, triton binds nothing
    kernel[2, 3](*args, **flags)
    (grid, expected), (planned_grid, repeated) = ((launch[:4], launch[4:]) for launch in LAUNCHES)
    assert grid == planned_grid == (2, 3, 1, 7)
    assert [repeated[i] for i in (0, 1, *range(5, 12))] == [expected[i] for i in (0, 1, *range(5, 12))]
    assert repeated[2:5] == (None, None, None)  # no metadata for hooks, and no hooks
    other = torch.ones(32)
    assert bound(other.data_ptr(), y.data_ptr())
    assert LAUNCHES[-1][9:11] == (other.data_ptr(), y.data_ptr())
    assert LAUNCHES[-1][11:16] == expected[7:12]


def test_a_bound_launch_takes_no_address_that_is_not_aligned_as_the_first_was() -> None:
    kernel, x, y = made(), torch.zeros(40), torch.zeros(40)
    flags = {"N": 16, "FLAG": False}
    bound = kernel[(1,)](x, y, 0.5, 16, 32, 3, 5, **flags)
    assert bound is not None
    LAUNCHES.clear()
    assert not bound(x.data_ptr() + 4, y.data_ptr())
    assert not LAUNCHES
    assert bound(x.data_ptr(), y.data_ptr() + 4)  # of y, nothing assumes that it is
    assert kernel[(1,)](x[1:], y, 0.5, 16, 32, 3, 5, **flags) is None


def test_descriptors_are_moved_to_other_addresses() -> None:
    x, y = torch.zeros(64), torch.zeros(64)
    compiled: Any = SimpleNamespace(run=lambda *args: LAUNCHES.append(args), function=1, packed_metadata=())
    args = TensorDescriptor(x, [64], [1], [16]), y, 0.5
    bound = plan.Bound(plan.Plan(compiled, 0, args, [True] * 3, (), []), (1,), args)
    other = torch.zeros(64)
    assert bound(other.data_ptr(), y.data_ptr())
    moved = LAUNCHES[-1][9]
    assert moved.base.data_ptr() == other.data_ptr()
    assert (moved.shape, moved.strides, moved.padding) == ([64], [1], "zero")


@pytest.mark.parametrize("watch", ["hook", "run", "debug", "before"])
def test_who_watches_launches_sees_them(watch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x = made(), torch.zeros(32)
    args, flags = (x, None, 0.5, 16, 32, 3, 5), {"N": 16, "FLAG": False}
    bound = kernel[(1,)](*args, **flags)
    assert bound is not None
    seen: list[Any] = []
    if watch == "hook":
        hook = seen.append
        triton.knobs.runtime.launch_enter_hook.add(hook)
    elif watch == "run":
        monkeypatch.setattr(JITFunction, "run", lambda self, *_, **__: seen.append(self))
    elif watch == "debug":
        monkeypatch.setattr(triton.knobs.runtime, "debug", True)
        seen.append("another binary")
    else:
        kernel.kernel.add_pre_run_hook(lambda *args, **_: seen.append(args))
    try:
        assert kernel[(1,)](*args, **flags) is None
        assert not bound(x.data_ptr(), 0)
    finally:
        if watch == "hook":
            triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert seen or watch == "hook"  # the stand-in for the launcher calls no hooks


def test_a_triton_that_is_not_known_launches_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    kernel = made()
    LAUNCHES.clear()
    assert kernel[(1,)](torch.zeros(32), None, 0.5, 16, 32, 3, 5, N=16, FLAG=False) is None
    assert len(LAUNCHES) == 1
    assert not kernel.plans


def test_what_is_remembered_is_bounded_and_can_be_forgotten() -> None:
    known = plan.memory()
    for i in range(plan.MANY + 5):
        plan.remember(known, i, i)
    assert len(known) == 5
    assert plan.recall(known, plan.MANY) == plan.MANY
    assert plan.recall(known, ([],)) is None
    seen = kin.Sightings()
    assert not seen.again("a")
    assert seen.again("a")
    assert not any(seen.again(i) for i in range(plan.MANY + 5))
    assert len(seen.marks) <= plan.MANY
    plan.forget()
    assert not known
    assert not seen.marks


def test_this_triton_is_planned_for() -> None:
    assert triton.__version__.startswith(plan.KNOWN)
    assert made().count == 7
    assert os.environ["TRITON_CACHE_DIR"]
