"""The C launcher that `flash` finds inside triton 3.6: called as its own wrappers call it, or not at all."""

from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from longspan.backends.flash import direct, plan  # noqa: E402

LAUNCHES: list[tuple[Any, ...]] = []


class CudaLauncher:
    """A launcher of triton 3.6: a C function, and where there are descriptors, a closure around it."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid = launch_pdl = False

    def __init__(self, described: bool) -> None:
        def launcher(*args: Any) -> None:
            LAUNCHES.append(args)

        def inner(*args: Any) -> None:
            launcher(*args)

        self.launch = inner if described else launcher


def bind(args: tuple[Any, ...], run: Any, layouts: list[dict[str, Any]]) -> plan.Bound:
    """Bind a launch of a kernel that is compiled with these layouts of its descriptors."""
    compiled: Any = SimpleNamespace(
        run=run, function=5, packed_metadata=(4, 1, 0), metadata=SimpleNamespace(tensordesc_meta=layouts)
    )
    return plan.Bound(plan.Plan(compiled, 0, args, [True] * 9, (None, None), []), (2, 3), args)


@pytest.fixture
def of_triton_36(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call launchers as triton 3.6 has them, Python functions in the place of its C functions."""
    monkeypatch.setattr(direct, "VERSION", triton.__version__)
    monkeypatch.setattr(direct, "BuiltinFunctionType", FunctionType)
    utilities = SimpleNamespace(fill_tma_descriptor=lambda *args: ("map", *args))
    driver = SimpleNamespace(utils=utilities, get_current_stream=lambda _: 7)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    LAUNCHES.clear()


@pytest.mark.usefixtures("of_triton_36")
def test_the_launcher_of_triton_36_is_called_as_its_wrappers_call_it() -> None:
    x, y = torch.zeros(32), torch.zeros(32)
    bound = bind((x, None, y, 7, 0.5), CudaLauncher(described=False), [])
    assert bound.plan.direct is not None
    assert bound(16, 0, 32)
    # grid, stream, function, cooperative, dependent, two workspaces, metadata, for hooks, two hooks; then arguments
    head = (2, 3, 1, 7, 5, False, False, None, None, (4, 1, 0), None, None, None)
    assert [(*head, 16, 0, 32, 7, 0.5, None, None)] == LAUNCHES


@pytest.mark.usefixtures("of_triton_36")
def test_descriptors_are_written_out_as_the_wrappers_of_triton_36_do() -> None:
    wide, x = torch.zeros(4, 32, dtype=torch.bfloat16), torch.zeros(32)
    layout = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 32], "fp4_padded": False}
    args = x, TensorDescriptor(wide, [4, 32], [32, 1], [1, 32]), TensorDescriptor(wide, [4, 32], [32, 1], [2, 32]), 7
    bound = bind(args, CudaLauncher(described=True), [layout, {**layout, "block_size": [2, 32]}])
    assert bound.plan.direct is not None
    for first in (32, 32, 64):
        assert bound(16, first, 48)
        maps = [("map", at, 3, 2, 9, size, [4, 32], [32, 1], 0) for at, size in ((first, [1, 32]), (48, [2, 32]))]
        assert LAUNCHES[-1][13:] == (16, maps[0], 4, 32, 32, 1, maps[1], 4, 32, 32, 1, 7, None, None)
    assert len(LAUNCHES) == 3


@pytest.mark.usefixtures("of_triton_36")
def test_a_launch_of_other_sizes_is_written_as_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 1, 1, 8], "fp4_padded": False}
    cache = torch.zeros(1, 2, 9, 8, dtype=torch.bfloat16)

    def launched(tokens: int, of: plan.Bound | None = None) -> tuple[plan.Bound, Any]:
        x = cache[:, :, :tokens]
        described = TensorDescriptor(x, *direct.layout_described(x), [1, 1, 1, 8])
        numbers = (5, 0.5, tokens)
        of = of or bind((cache, described, None, *numbers), CudaLauncher(described=True), [layout])
        assert of.plan.direct is not None
        assert of(16, 32, 0)
        return of, LAUNCHES[-1]

    short, before = launched(4)
    long, after = launched(7)
    assert before != after
    for other in (short.longer(long.numbers, 7), short.resized((2, 3), long.numbers, None, cache[:, :, :7])):
        assert launched(7, other)[1] == after
        assert launched(4, short)[1] == before
    monkeypatch.setattr(direct, "MAPS", 5)
    for address in range(16, 1600, 16):
        assert short(16, address, 0)
        assert len(short.maps) <= 5
        assert LAUNCHES[-1][14] == ("map", address, 3, 2, 9, [1, 1, 1, 8], [1, 2, 4, 8], [16, 72, 8, 1], 0)


@pytest.mark.usefixtures("of_triton_36")
def test_a_launcher_that_is_not_as_expected_is_not_opened() -> None:
    wide = torch.zeros(4, 32, dtype=torch.bfloat16)
    described = (TensorDescriptor(wide, [4, 32], [32, 1], [1, 32]), 7)
    layout = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 32], "fp4_padded": False}
    scratch = CudaLauncher(described=False)
    scratch.global_scratch_size = 64
    for args, run, layouts in (
        ((wide, 7), scratch, []), ((wide, 7), LAUNCHES.append, []),
        (described, CudaLauncher(described=False), [layout]), (described, CudaLauncher(described=True), []),
        (described, CudaLauncher(described=True), [{**layout, "fp4_padded": True}]),
    ):  # fmt: skip
        assert bind(args, run, layouts).plan.direct is None
