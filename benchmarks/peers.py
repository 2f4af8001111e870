"""The contestants, by name: backends of this project, and whatever peers are installed.

A contestant turns an `Ask` into a function of its inputs, or raises `Skipped` with the reason why it cannot.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Final

import torch
from ask import Ask, table
from blocks import blocks
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from longspan.backends import Unsupported

PAGE: Final = 64  # tokens
Function = Callable[..., tuple[Tensor, ...]]


class Skipped(Exception):  # noqa: N818 - no error of anyone
    """A contestant does not enter a cell."""


@dataclass(frozen=True)
class Contestant:
    """One name of the race.

    Attributes:
        name: As tables print it.
        sections: Tables that it enters.
        prepare: From what is asked to a function of the inputs.
        own: Whether it is of this project: held to NaN in dead slots too, and no error of it is a reason to skip.
        rounded: Whether it attends to e4m3 roundings of the inputs, and is held to attention to those.
    """

    name: str
    sections: tuple[str, ...]
    prepare: Callable[[Ask], Function]
    own: bool = False
    rounded: bool = False


def backend(name: str) -> ModuleType:
    """Load a backend of this project, by the name of its module."""
    if find_spec(f"longspan.backends.{name}") is None:
        msg = f"there is no backend {name}"
        raise Skipped(msg)
    module = import_module(f"longspan.backends.{name}")
    reason = module.unavailable()
    if reason is not None:
        raise Skipped(reason)
    return module


def own(name: str, *, in_place: bool = False) -> Callable[[Ask], Function]:
    """Enter a backend of this project with attention and rotation."""

    def prepare(ask: Ask) -> Function:
        module, operation = backend(name), "rotate_qk" if ask.cell.rotary else "attention"
        if in_place and ask.cotangents:
            msg = "what turns in place has no gradient"
            raise Skipped(msg)
        options = ask.options
        serve(module, operation, *ask.inputs, **options)
        if ask.cell.rotary:
            return lambda q, k: getattr(module, operation + "_" * in_place)(q, k, **options)
        return lambda q, k, v: (module.attention(q, k, v, **options).out,)

    return prepare


def paged(name: str) -> Callable[[Ask], Function]:
    """Enter a backend's paged attention: the same keys, scattered over pages; free slots hold NaN."""

    def prepare(ask: Ask) -> Function:
        module = backend(name)
        q, k, v = ask.inputs
        (b, _, n, _), pages = k.shape, -(-k.shape[2] // PAGE)
        draw = torch.Generator().manual_seed(0)
        places = torch.randperm(b * pages, generator=draw).reshape(b, pages).to(q.device)
        options = {name: x for name, x in ask.options.items() if name not in {"mask", "q_offset", "k_offset"}}
        cut = re.fullmatch(r"lengths\(\[(.*)\]\)", ask.mask)
        lengths = [int(x) for x in cut[1].split(",")] if cut else [n] * b
        arguments = (
            torch.ones(b, dtype=torch.int32, device=q.device), pool(k, places), pool(v, places),
            places.to(torch.int32), torch.tensor(lengths, dtype=torch.int32, device=q.device),
        )  # fmt: skip
        serve(module, "attention_paged", q[:, :, 0], *arguments, **options)
        return lambda q, *_: (module.attention_paged(q[:, :, 0], *arguments, **options).out[:, :, None],)

    return prepare


def e4m3(*, inside: bool) -> Callable[[Ask], Function]:
    """Enter attention to heads that were quantised beforehand, or inside the call."""

    def prepare(ask: Ask) -> Function:
        module, options = backend("hopper"), ask.plain
        given = module.quantise(*ask.inputs)
        serve(module, "attention_quantised", *given, **options)
        if inside:
            return lambda q, k, v: (module.attention_quantised(*module.quantise(q, k, v), **options).out,)
        return lambda *_: (module.attention_quantised(*given, **options).out,)

    return prepare


def pool(x: Tensor, places: Tensor) -> Tensor:
    """Lay keys out as pages, [pages, g, page, d], at their places, [b, pages of a sequence]."""
    b, g, n, d = x.shape
    pages = places.shape[1]
    room = x.new_full((b, g, pages * PAGE, d), torch.nan)
    room[:, :, :n] = x
    result = torch.empty(b * pages, g, PAGE, d, dtype=x.dtype, device=x.device)
    result[places.flatten()] = room.unflatten(2, (pages, PAGE)).transpose(1, 2).flatten(0, 1)
    return result


def serve(module: ModuleType, operation: str, *args: Tensor, **options: object) -> None:
    """Skip what a backend declines, in its words."""
    reason = module.declines(operation, *args, **options)
    if reason is not None:
        raise Skipped(reason)


def simple(ask: Ask) -> None:
    """Skip what only this project's conventions can say: peers take squares, and one query against all keys."""
    if ask.cell.rotary:
        msg = "does not rotate"
        raise Skipped(msg)
    if ask.cell.extras or "documents" in ask.mask:
        msg = "is not asked for documents, softcap or sinks here"
        raise Skipped(msg)
    q, k, _ = ask.inputs
    if "lengths" in ask.mask or (ask.mask != "everything()" and q.shape[2] != k.shape[2]):
        msg = "takes no lengths, and aligns causal masks its own way"
        raise Skipped(msg)


def window_of(ask: Ask) -> int | None:
    """Keys of the window of a mask's source."""
    found = re.search(r"window\((\d+)\)", ask.mask)
    return int(found[1]) if found else None


def sdpa(kernel: SDPBackend) -> Callable[[Ask], Function]:
    """Enter one of the kernels behind PyTorch's scaled_dot_product_attention."""

    def prepare(ask: Ask) -> Function:
        simple(ask)
        if window_of(ask):
            msg = "scaled_dot_product_attention has no window"
            raise Skipped(msg)
        causal, grouped = "causal" in ask.mask, ask.inputs[0].shape[1] != ask.inputs[1].shape[1]

        def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
            with sdpa_kernel(kernel):
                return (functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped),)

        return run

    return prepare


def flex(ask: Ask) -> Function:
    """Enter FlexAttention, compiled for the shape; once for every cache of decode. Its blocks are made beforehand."""
    simple(ask)
    widen_compile_cache()
    q, k, _ = ask.inputs
    mask = blocks(q.shape[2], k.shape[2], window_of(ask), q.device) if "causal" in ask.mask else None
    run = torch.compile(flex_attention, dynamic=ask.cell.decodes)
    grouped = q.shape[1] != k.shape[1]
    return lambda q, k, v: (run(q, k, v, block_mask=mask, enable_gqa=grouped),)


def flash_attn_4(ask: Ask) -> Function:
    """Enter flash-attn-4's CuTe kernel."""
    simple(ask)
    run = installed("flash_attn.cute", "flash-attn-4").flash_attn_func
    size = window_of(ask)
    options = {"causal": "causal" in ask.mask, "window_size": (None, None) if size is None else (size - 1, 0)}

    def call(*heads: Tensor) -> tuple[Tensor]:
        result = run(*(x.transpose(1, 2) for x in heads), **options)
        return ((result[0] if isinstance(result, tuple) else result).transpose(1, 2),)

    return call


def liger(ask: Ask) -> Function:
    """Enter Liger's rotary, which turns in place by a table."""
    rotating(ask)
    rotary = installed("liger_kernel.ops.rope", "liger-kernel").LigerRopeFunction
    cos, sin = (x[0] for x in table(ask))
    return lambda q, k: rotary.apply(q, k, cos, sin)


def compiled_rotary(ask: Ask) -> Function:
    """Enter the usual rotary in PyTorch, compiled, by a table."""
    rotating(ask)
    widen_compile_cache()
    cos, sin = table(ask)

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        wide = x.float()
        first, second = wide.chunk(2, -1)
        return (wide * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)

    run = torch.compile(lambda q, k, cos, sin: (turned(q, cos, sin), turned(k, cos, sin)), dynamic=False)
    return lambda q, k: run(q, k, cos, sin)


def rotating(ask: Ask) -> None:
    """Skip what is no rotation."""
    if not ask.cell.rotary:
        msg = "does not attend"
        raise Skipped(msg)


def copy(ask: Ask) -> Function:
    """Copy as many bytes: the ceiling of a rotation."""
    if ask.cotangents:
        msg = "a copy has no gradient to race"
        raise Skipped(msg)
    flat = torch.cat([x.flatten() for x in ask.inputs])
    return lambda *_: (torch.empty_like(flat).copy_(flat),)


def read(_: Ask) -> Function:
    """Read keys and values once: the ceiling of decode."""
    if find_spec("triton") is None:
        msg = "triton is not installed"
        raise Skipped(msg)
    sweep = import_module("sweep").sweep
    return lambda _q, k, v: (sweep(k, v),)


def installed(module: str, package: str) -> ModuleType:
    """Import a peer, or say that it is not there."""
    try:
        return import_module(module)
    except ImportError as error:
        msg = f"{package} is not installed ({error})"
        raise Skipped(msg) from error


def widen_compile_cache() -> None:
    """Let one function be compiled for every shape of a race: past a limit it would run uncompiled, silently."""
    config = import_module("torch._dynamo.config")
    limits = {"recompile_limit": 4096, "accumulated_recompile_limit": 4096, "fail_on_recompile_limit_hit": True}
    for name, value in limits.items():
        setattr(config, name, value)


ATTENTION: Final = ("forward", "backward", "features", "decode", "host", "memory")
CONTESTANTS: Final = (
    Contestant("hopper", (*ATTENTION, "growth", "quantised"), own("hopper"), own=True),
    Contestant("hopper, e4m3", ("quantised",), e4m3(inside=False), own=True, rounded=True),
    Contestant("hopper, e4m3 and quantising", ("quantised",), e4m3(inside=True), own=True, rounded=True),
    Contestant(f"hopper, pages of {PAGE}", ("decode",), paged("hopper"), own=True),
    Contestant("flash", (*ATTENTION, "growth", "rotate"), own("flash"), own=True),
    Contestant("flash, in place", ("rotate",), own("flash", in_place=True), own=True),
    Contestant(f"flash, pages of {PAGE}", ("decode",), paged("flash"), own=True),
    Contestant("sdpa", ("forward", "backward", "decode", "memory"), own("sdpa"), own=True),
    Contestant("SDPA FA2", ATTENTION, sdpa(SDPBackend.FLASH_ATTENTION)),
    Contestant("SDPA cuDNN", (*ATTENTION, "quantised"), sdpa(SDPBackend.CUDNN_ATTENTION)),
    Contestant("FlexAttention", ("forward", "backward", "features", "decode"), flex),
    Contestant("flash-attn-4", ("forward", "backward", "features"), flash_attn_4),
    Contestant("Liger", ("rotate", "host"), liger),
    Contestant("torch.compile", ("rotate", "host"), compiled_rotary),
    Contestant("device copy", ("rotate",), copy),
    Contestant("read sweep", ("decode",), read),
)
CEILINGS: Final = ("device copy", "read sweep")


def entrants(section: str) -> list[Contestant]:
    """Contestants of a table."""
    return [contestant for contestant in CONTESTANTS if section in contestant.sections]


def why(error: Exception) -> str:
    """First line of an error, and what it is."""
    if isinstance(error, Skipped):
        return str(error)
    if isinstance(error, Unsupported):
        return error.reason
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
