"""The rotary kernels of `flash` against the specification in float64: exact angles, every layout, every derivative."""

import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from longspan import spec
from longspan.backends import Unsupported, flash
from longspan.backends.flash.rope_kernel import cosine_sine, turns_of
from longspan.spec import Rotation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(flash.unavailable() is not None, reason=str(flash.unavailable()))

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
PAIRINGS = st.sampled_from(["half", "interleaved"])
SEEDS = st.integers(0, 2**31 - 1)
few = settings(max_examples=15 if DEVICE == "cpu" else 200)  # interpreted, one takes a quarter of a second


def heads(seed: int, b: int, h: int, m: int, d: int, dtype: torch.dtype, layout: str) -> Tensor:
    """Draw heads [b, h, m, d] that lie in memory as named."""
    draw = torch.Generator().manual_seed(seed)
    match layout:
        case "bmhd":
            x = torch.randn(b, m, h, d, generator=draw).transpose(1, 2)
        case "slice":
            x = torch.randn(b, m, h, d + 5, generator=draw)[..., 3 : 3 + d].transpose(1, 2)
        case _:
            x = torch.randn(b, h, m, d, generator=draw)
    like = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=DEVICE)
    return like.copy_(x)


def positions(seed: int, kind: str, b: int, m: int, largest: int) -> Tensor:
    """Draw positions [m], [b, m] or [3, b, m]."""
    shape = {"m": (m,), "bm": (b, m), "abm": (3, b, m)}[kind]
    return torch.randint(0, largest, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def speeds(planes: int, *, factor: float | Tensor = 1.0, axis: Tensor | None = None) -> Rotation:
    """Make a rotation of planes."""
    return Rotation(spec.inv_freq(2 * planes, device=DEVICE), factor, axis=axis)


def partner(x: Tensor, pairing: str) -> Tensor:
    """The other coordinate of each plane."""
    if pairing == "half":
        return x.roll(x.shape[-1] // 2, -1)
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def assert_turned(found: Tensor, x: Tensor, position: Tensor, rotation: Rotation, pairing: str) -> None:
    """Compare a rotation with the truth, by a budget known before; the tail bit for bit."""
    turned = 2 * rotation.inv_freq.shape[-1]
    truth = spec.rotate(x.double(), position, rotation, pairing=pairing)[..., :turned]
    head = x[..., :turned].double()
    factor = torch.as_tensor(rotation.attention_factor).abs().reshape(-1, 1, 1, 1).to(head)
    length = factor * (head**2 + partner(head, pairing) ** 2).sqrt()
    info = torch.finfo(x.dtype)
    budget = 2 * (info.eps * truth.abs() + (3e-7 + 4 * torch.finfo(torch.float32).eps) * length)
    budget = budget + (info.tiny * info.eps if x.dtype == torch.float16 else info.tiny)  # what underflows
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert not (found[..., :turned].double() - truth).abs().gt(budget).any()
    assert not found.isnan().any()
    assert torch.equal(found[..., turned:], x[..., turned:])


@st.composite
def problems(draw: st.DrawFn) -> dict[str, object]:
    """Draw queries, keys, positions and a rotation that fit each other."""
    b, m = draw(st.integers(1, 4), label="b"), draw(st.sampled_from([0, 1, 2, 7, 16, 17, 33]), label="m")
    h, g = draw(st.integers(1, 5), label="h"), draw(st.integers(1, 3), label="g")
    planes, tail = draw(st.sampled_from([1, 4, 12, 32, 36]), label="planes"), draw(st.sampled_from([0, 8, 10]))
    dtype, seed = draw(DTYPES, label="dtype"), draw(SEEDS, label="seed")
    layouts = st.sampled_from(["bhmd", "bmhd", "slice"])
    axis = torch.randint(0, 3, (planes,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    rotation = speeds(planes, factor=draw(st.sampled_from([1.0, 1.3466]), label="factor"), axis=axis)
    if draw(st.booleans(), label="a row for each sequence"):
        slower = torch.linspace(0.1, 1.0, b, dtype=torch.float64, device=DEVICE)
        rotation = Rotation(rotation.inv_freq * slower[:, None], 2 - slower, axis=axis)
    kind = draw(st.sampled_from(["m", "bm", "abm"]), label="positions")
    return {
        "q": heads(seed, b, h, m, 2 * planes + tail, dtype, draw(layouts, label="q lies")),
        "k": heads(seed + 1, b, g, m, 2 * planes + tail, dtype, draw(layouts, label="k lies")),
        "position": positions(seed, kind, b, m, draw(st.sampled_from([64, 2**20, 2**31]), label="largest")),
        "rotation": rotation,
        "pairing": draw(PAIRINGS, label="pairing"),
    }


@few
@given(problems())
def test_queries_and_keys_turn_exactly_at_every_position(problem: dict) -> None:
    q, k, *rest, pairing = problem.values()
    turned_q, turned_k = flash.rotate_qk(q, k, *rest, pairing=pairing)
    assert_turned(turned_q, q, *rest, pairing)
    assert_turned(turned_k, k, *rest, pairing)
    assert torch.equal(flash.rotate(q, *rest, pairing=pairing), turned_q)


@few
@given(problems())
def test_turning_in_place_is_turning_out_of_place(problem: dict) -> None:
    q, k, *rest, pairing = problem.values()
    expected = flash.rotate_qk(q, k, *rest, pairing=pairing)
    assert flash.rotate_qk_(q, k, *rest, pairing=pairing)[0] is q
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])
    again = flash.rotate(k, *rest, pairing=pairing)
    assert torch.equal(flash.rotate_(k, *rest, pairing=pairing), again)


@few
@given(problems())
def test_the_gradient_is_the_inverse_rotation(problem: dict) -> None:
    q, k, position, rotation, pairing = problem.values()
    q, k = q.requires_grad_(), k.requires_grad_()
    out = flash.rotate_qk(q, k, position, rotation, pairing=pairing)
    cotangents = [torch.randn_like(x) for x in out]
    back = Rotation(-rotation.inv_freq, rotation.attention_factor, axis=rotation.axis)
    for found, given_back in zip(torch.autograd.grad(out, (q, k), cotangents), cotangents, strict=True):
        assert_turned(found, given_back, position, back, pairing)


def test_a_gradient_reaches_keys_alone_and_through_an_expanded_sum() -> None:
    q, k = heads(0, 2, 4, 5, 24, torch.float32, "bmhd"), heads(1, 2, 1, 5, 24, torch.float32, "bhmd").requires_grad_()
    position, rotation = positions(0, "m", 2, 5, 999), speeds(8, factor=1.5)
    (found,) = torch.autograd.grad(flash.rotate_qk(q, k, position, rotation)[1].sum(), k)
    back = Rotation(-rotation.inv_freq, 1.5)
    assert_turned(found, torch.ones_like(k), position, back, "half")


def test_the_second_derivative_is_right() -> None:
    x = heads(0, 2, 3, 4, 12, torch.float32, "bhmd").requires_grad_()
    position, rotation = positions(0, "bm", 2, 4, 999), speeds(4, factor=1.25)

    def second(rotate: object, x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad((rotate(x, position, rotation) ** 3).sum(), x, create_graph=True)
        return torch.autograd.grad((first**2).sum(), x)[0]

    truth = second(spec.rotate, x.detach().double().requires_grad_())
    assert (second(flash.rotate, x).double() - truth).abs().max() < 1e-5 * truth.abs().max()


def test_a_tangent_is_refused_and_not_dropped() -> None:
    x, position = heads(0, 1, 1, 2, 8, torch.float32, "bhmd"), positions(0, "m", 1, 2, 9)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: flash.rotate(x, position, speeds(4)), (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        flash.rotate(torch.autograd.forward_ad.make_dual(x, x), position, speeds(4))


@triton.jit
def write_turns(inv_freq, out, N: tl.constexpr):  # noqa: ANN001, ANN201, D103
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, turns_of(tl.load(inv_freq + at)))


@triton.jit
def write_cosine_sine(position, turns, cos, sin, N: tl.constexpr):  # noqa: ANN001, ANN201, D103
    at = tl.program_id(0) * N + tl.arange(0, N)
    c, s = cosine_sine(tl.load(position + at), tl.load(turns + at), False)  # noqa: FBT003
    tl.store(cos + at, c)
    tl.store(sin + at, s)


def test_the_kernel_counts_turns_bit_for_bit_as_the_specification() -> None:
    draw = torch.Generator().manual_seed(0)
    speed = torch.rand(2**14, dtype=torch.float64, generator=draw)
    speed[1::3] = 10 ** (-15 * speed[1::3])
    speed[2::3] = 1e4 * speed[2::3] - 5e3
    speed[:5] = torch.tensor([torch.pi, -torch.pi, 3 * torch.pi, 0.0, -0.0], dtype=torch.float64)
    found = torch.empty(2**14, dtype=torch.int64, device=DEVICE)
    write_turns[(16,)](speed.to(DEVICE), found, 1024)
    # On the CPU: there torch divides by 2π, where on a GPU it multiplies by the reciprocal.
    assert torch.equal(found.cpu(), spec.turns(speed))


def test_cosine_and_sine_are_exact_to_a_rounding_all_around_the_circle() -> None:
    draw = torch.Generator().manual_seed(0)
    turned = torch.randint(-(2**63), 2**63 - 1, (2**15,), generator=draw)
    edges = torch.arange(-4, 4)[:, None] * 2**61 + torch.tensor([-(2**32), -1, 0, 1, 2**32])
    turned[:40] = edges.flatten()  # both sides of every eighth of a turn, where quarters change
    turned, one = turned.to(DEVICE), torch.ones(2**15, dtype=torch.int64, device=DEVICE)
    cos, sin = torch.empty(2, 2**15, device=DEVICE)
    write_cosine_sine[(32,)](one, turned, cos, sin, 1024)
    theta = (turned >> 11).double() * (2 * torch.pi / 2.0**53)
    assert (cos.double() - theta.cos()).abs().max() < 1.2e-7
    assert (sin.double() - theta.sin()).abs().max() < 1.2e-7


def test_keys_move_from_one_rotation_to_another() -> None:
    k, position = heads(0, 2, 2, 9, 40, torch.float32, "bmhd"), positions(0, "bm", 2, 9, 2**20)
    old, new = speeds(16, factor=1.25), Rotation(spec.inv_freq(32, base=5e5, device=DEVICE), 1.5)
    between = Rotation(new.inv_freq - old.inv_freq, 1.5 / 1.25)
    assert_turned(flash.rerotate(k, position, old, new), k, position, between, "half")


def test_a_tensor_turned_in_place_leaves_its_neighbours_alone() -> None:
    wide = torch.randn(2, 5, 3, 50, device=DEVICE)
    before, x = wide.clone(), wide[:, 1:4, :, 7:31].transpose(1, 2)
    flash.rotate_(x, positions(0, "m", 2, 3, 99), speeds(10))
    assert not torch.equal(wide, before)
    wide[:, 1:4, :, 7:27] = before[:, 1:4, :, 7:27]
    assert torch.equal(wide, before)


@pytest.mark.parametrize("inside", [True, False], ids=["heads inside tokens", "tokens inside heads"])
def test_offsets_beyond_32_bits_are_offsets(inside: bool) -> None:
    far = 2**30 + 8
    backing = torch.empty(2 * far + 64, dtype=torch.float16, device=DEVICE)  # on a CPU, pages that are never touched
    x = backing.as_strided((1, 3, 2, 8), (0, far, 8, 1) if inside else (0, 8, far, 1))
    x = x if inside else backing.as_strided((1, 2, 3, 8), (0, 8, far, 1))
    x.copy_(torch.randn(x.shape))
    copy, position = x.clone(memory_format=torch.contiguous_format), positions(0, "m", 1, x.shape[2], 999)
    flash.rotate_(x, position, speeds(4))
    assert_turned(x.clone(memory_format=torch.contiguous_format), copy, position, speeds(4), "half")


MAPS = {
    "heads": ((0, None, None), (3, 2, 4, 5, 14), (2, 5), (6,)),
    "heads, last": ((4, None, None), (3, 2, 4, 5, 14), (2, 5), (6,)),
    "heads and positions": ((0, 0, None), (3, 2, 4, 5, 14), (3, 2, 5), (6,)),
    "shared positions": ((0, 0, None), (3, 2, 4, 5, 14), (3, 5), (6,)),
    "positions": ((None, 0, None), (2, 4, 5, 14), (3, 2, 5), (6,)),
    "axes of positions": ((0, 1, None), (3, 2, 4, 5, 14), (2, 3, 2, 5), (6,)),
    "speeds": ((0, None, 0), (3, 2, 4, 5, 14), (2, 5), (3, 6)),
    "speeds of sequences": ((0, 0, 0), (3, 2, 4, 5, 14), (3, 2, 5), (3, 2, 6)),
    "one row of speeds": ((0, None, None), (3, 2, 4, 5, 14), (5,), (1, 6)),
}


@pytest.mark.parametrize("name", MAPS)
def test_mapping_is_a_loop(name: str) -> None:
    dims, *shapes = MAPS[name]
    x, position = torch.randn(shapes[0], device=DEVICE), torch.randint(0, 99, shapes[1], device=DEVICE)
    x = x if dims[0] is None else x.movedim(0, dims[0])
    inv_freq = torch.rand(shapes[2], dtype=torch.float64, device=DEVICE)
    axis = torch.arange(6, device=DEVICE) % 2

    def turn(rotate: object, *of: Tensor) -> Tensor:
        return rotate(of[0], of[1], Rotation(of[2], 1.5, axis=axis))

    found = torch.vmap(lambda *of: turn(flash.rotate, *of), dims)(x, position, inv_freq)
    for i in range(3):
        of = [t if dim is None else t.select(dim, i) for t, dim in zip((x, position, inv_freq), dims, strict=True)]
        assert (found[i] - turn(spec.rotate, *of)).abs().max() < 1e-5


def test_transforms_compose() -> None:
    x, position = torch.randn(3, 2, 4, 5, 8, device=DEVICE), torch.randint(0, 99, (3, 5), device=DEVICE)

    def cube(rotate: object) -> Tensor:
        loss = lambda x, position: (rotate(x, position, speeds(4)) ** 3).sum()  # noqa: E731
        return torch.vmap(torch.func.grad(loss))(x, position)

    assert (cube(flash.rotate) - cube(spec.rotate)).abs().max() < 1e-4


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_call_is_one_graph_and_the_same_numbers(dynamic: bool) -> None:
    torch._dynamo.reset()  # noqa: SLF001
    q, k = heads(0, 2, 4, 6, 16, torch.bfloat16, "bmhd"), heads(1, 2, 2, 6, 16, torch.bfloat16, "bhmd")
    q, k, position = q.requires_grad_(), k.requires_grad_(), positions(0, "bm", 2, 6, 2**31)
    rotation = speeds(6)  # made outside: dynamo does not see through what checks shapes in tests

    def loss(q: Tensor, k: Tensor) -> Tensor:
        turned_q, turned_k = flash.rotate_qk(q, k, position, rotation)
        return (turned_q**2).sum() + (turned_k.float() ** 3).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    found = torch.autograd.grad(compiled(q, k), (q, k))
    for one, other in zip(found, torch.autograd.grad(loss(q, k), (q, k)), strict=True):
        assert torch.equal(one, other)


def test_a_compiled_call_in_place_is_one_graph() -> None:
    q, k = heads(0, 1, 2, 6, 16, torch.float32, "bmhd"), heads(1, 1, 2, 6, 16, torch.float32, "bhmd")
    position, rotation, counter = positions(0, "m", 1, 6, 99), speeds(8), CompileCounter()
    expected = flash.rotate_qk(q, k, position, rotation)
    torch.compile(lambda q, k: flash.rotate_qk_(q, k, position, rotation), fullgraph=True, backend=counter)(q, k)
    assert counter.frame_count == 1
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])


def test_the_operators_tell_torch_the_truth_about_themselves() -> None:
    q, k = heads(0, 2, 4, 3, 16, torch.float32, "bmhd"), heads(1, 2, 2, 3, 16, torch.float32, "slice")
    of = ([q, k], positions(0, "m", 2, 3, 99), spec.inv_freq(12, device=DEVICE), None, None, 1.25, True)
    torch.library.opcheck(torch.ops.longspan.flash_rotate.default, (*of, False))
    torch.library.opcheck(torch.ops.longspan.flash_rotate_.default, of)


def refused(**changes: object) -> None:
    """Rotate with changes to a call that is served."""
    x = torch.randn(2, 3, 4, 16, device=DEVICE)
    given_x = changes.pop("x", lambda x: x)(x)
    operation = changes.pop("operation", flash.rotate)
    operation(given_x, torch.arange(4, device=DEVICE), Rotation(**{"inv_freq": spec.inv_freq(8, device=DEVICE), **changes}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x": Tensor.double}, "float64"),
        ({"x": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)}, "last stride"),
        ({"x": lambda x: torch.zeros(2, 3, 4, 1032, device=x.device)}, "1024"),
        ({"inv_freq": torch.ones(4, dtype=torch.float64, device=DEVICE, requires_grad=True)}, "inv_freq"),
        (
            {
                "inv_freq": torch.ones(2, 4, dtype=torch.float64, device=DEVICE),
                "attention_factor": torch.ones(2, dtype=torch.float64, device=DEVICE, requires_grad=True),
            },
            "attention_factor",
        ),
        ({"x": Tensor.requires_grad_, "operation": flash.rotate_}, "gradient"),
        ({"x": lambda x: x[:1].expand(2, -1, -1, -1), "operation": flash.rotate_}, "expanded"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_not_served_is_said(changes: dict, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        refused(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inv_freq": torch.ones(9, dtype=torch.float64, device=DEVICE)}, "at most d / 2"),
        ({"inv_freq": torch.ones(3, 4, dtype=torch.float64, device=DEVICE)}, "rows of inv_freq"),
        ({"x": lambda x: x[:, :, :3]}, "position"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_means_nothing_is_an_error(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused(**changes)


# The launches of all rotary kernels, compiled for a machine that is not there. A compiler's abort kills the child alone.
OFFLINE = """
import sys, torch, triton
from importlib import import_module
from triton.backends.compiler import GPUTarget
from longspan import spec
backend, arch = sys.argv[1:]
target = GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)
class Driver:
    get_current_target = lambda self: target
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_active_torch_device = lambda self: torch.device("cpu")
triton.runtime.driver.set_active(Driver())
compiled = []
class Offline:
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid):
        return lambda *args, **kwargs: compiled.append(self.kernel.warmup(*args, grid=grid, **kwargs))
kernels = [import_module("longspan.backends.flash." + name) for name in ("rope_kernel", "append", "merge")]
rope, append, merge = kernels
for module, name in zip(kernels, ("rotate_kernel", "append_kernel", "merge_kernel")):
    setattr(module, name, Offline(getattr(module, name)))
heads = lambda h, d, dtype: torch.empty(2, 64, h, d, dtype=dtype).transpose(1, 2)
speed, axis, factor = spec.inv_freq(96), torch.zeros(48, dtype=torch.int64), torch.ones(2, dtype=torch.float64)
for dtype, interleaved, inv_freq, rows, axes in (
    (torch.bfloat16, False, speed, None, None), (torch.float16, True, speed, None, axis),
    (torch.float32, True, torch.stack([speed, speed]), factor, axis),
):
    x = [heads(4, 128, dtype), heads(1, 96, dtype)]
    position = torch.zeros(3, 2, 64, dtype=torch.int64) if axes is not None else torch.arange(64)
    rope.launch(x, [one.clone() for one in x], position, inv_freq, rows, axes, 1.0, interleaved, interleaved)
    k, v, cache = x[0][0].transpose(0, 1), heads(4, 80, dtype)[0].transpose(0, 1), torch.empty(9, 4, 16, 128, dtype=dtype)
    append.write_(k, v, cache, cache[..., :80], torch.arange(64), torch.arange(64)[:, None], speed, None, None, 1.0, interleaved)
    merge.launch((x[0],) * 3, (torch.empty(2, 4, 64),) * 3, factor.float().expand(2, 4, 2)[..., 0], dtype)
for kernel in compiled:
    assert kernel.asm["cubin" if backend == "cuda" else "hsaco"]
print(len(compiled), "compiled")
"""


@pytest.mark.parametrize("target", ["cuda 80", "cuda 90", "hip gfx942"])
def test_every_rotary_kernel_compiles_without_a_gpu(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(  # noqa: S603 - our own source
        [sys.executable, "-c", OFFLINE, *target.split()],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.stdout.strip() == "9 compiled"
