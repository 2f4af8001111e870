"""The command line: what each verb takes, and how bad input is answered."""

import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Final

import typer

from .page import Refused, complain

app = typer.Typer(
    name="longspan", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Exact long-context attention and RoPE scaling: what runs here, whether it is right, and what a model takes.",
    epilog="Exit code: 0 all is well; 1 a law failed, a model is not served within the error budget, or a choice was "
    "wrong or a key not done while tuning; 2 bad input.",
)  # fmt: skip

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines and nothing else.")]
Name = Annotated[str, typer.Option("--backend", metavar="NAME", help="A backend by name; auto is what a user gets.")]
Device = Annotated[
    str | None, typer.Option("--device", metavar="D", help="cpu, cuda, cuda:1 …; default: a GPU if there is one.")
]


@app.command()
def backends(*, json: Json = False, device: Device = None) -> None:
    """Show which backends can run on this machine, which operations each serves, and why not."""
    from .backends import backends as verb  # noqa: PLC0415 - imports PyTorch

    raise typer.Exit(verb(device, as_json=json))


@app.command()
def verify(
    *,
    backend: Name = "auto",
    seconds: Annotated[float, typer.Option(metavar="S", help="How long to look for a counterexample.")] = 60.0,
    device: Device = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Repeat the run that printed this seed; default: a random one.")
    ] = None,
    law: Annotated[
        list[str] | None, typer.Option("--law", metavar="NAME", help="Only this law; may be given several times.")
    ] = None,
    mutant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Examine a planted bug in place of a backend: must exit 1.")
    ] = None,
    json: Json = False,
) -> None:
    """Try the laws of the contract on random problems, on this machine's real device."""
    from .verify import verify as verb  # noqa: PLC0415 - imports PyTorch

    chosen = tuple(law or ())
    raise typer.Exit(verb(backend, seconds, device, seed=seed, only=chosen, mutant=mutant, as_json=json))


@app.command()
def preflight(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.json", help="A published config.json.")],
    *,
    context: Annotated[int, typer.Option(metavar="N", help="Tokens of the context: prompt and cache.")],
    backend: Name = "auto",
    device: Device = None,
    seconds: Annotated[
        float, typer.Option(metavar="S", help="Roughly how long to measure; lengths beyond that are extrapolated.")
    ] = 60.0,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw wavelengths and times to a PNG.")] = None,
    json: Json = False,
) -> None:
    """Say what a published model takes at a context of N tokens on this machine: rotation, error, time, memory."""
    from .preflight import preflight as verb  # noqa: PLC0415 - imports PyTorch

    raise typer.Exit(verb(config, context, backend, device, seconds=seconds, png=png, as_json=json))


@app.command()
def tune(
    *,
    kernel: Annotated[
        list[str] | None,
        typer.Option("--kernel", metavar="K", help="Only this kernel, or a backend's; may be given several times."),
    ] = None,
    budget: Annotated[str, typer.Option(metavar="T", help="How long to take: 90s, 5m, 1h.")] = "5m",
    model: Annotated[
        Path | None, typer.Option(metavar="CONFIG.json", help="Only what the layers of this model launch.")
    ] = None,
    context: Annotated[int | None, typer.Option(metavar="N", help="Tokens of the model's context.")] = None,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Sweep every choice, and say what the race alone would have lost.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Measure anew what was measured before, or go on where it stopped.")
    ] = False,
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Compile every choice and measure none; needs no GPU.")
    ] = False,
    arch: Annotated[str | None, typer.Option(metavar="A", help="With --compile-only: sm_90, gfx942, …")] = None,
    export: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write the table of this device there, too.")
    ] = None,
    merge: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A B", help="Merge two tables into --export, or else into B.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Compilers at once; default: the cores.")
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the gains to a PNG.")] = None,
    json: Json = False,
) -> None:
    """Measure which launch parameters are fastest on this GPU, once; launches look the results up."""
    from .tune import main as verb  # noqa: PLC0415 - imports what it tunes

    code = verb(
        kernels=tuple(kernel or ()), budget=budget, model=model, context=context, exhaustive=exhaustive, fresh=fresh,
        compile_only=compile_only, arch=arch, export=export, merged=merge, workers=workers, png=png, as_json=json,
    )  # fmt: skip
    raise typer.Exit(code)


VERBS: Final = ("backends", "verify", "preflight", "tune")


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code; bad input is one sentence on stderr."""
    first = arguments[0] if arguments else "--help"
    if not first.startswith("-") and first not in VERBS:
        return complain(f"command must be one of {', '.join(VERBS)}, got {first!r}")
    try:
        return int(app(arguments or ["--help"], standalone_mode=False) or 0)
    except typer.Exit as done:
        return done.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return complain("stopped by the keyboard", code=130)
    except Refused as refusal:
        return complain(str(refusal))
    except Exception as error:
        # Typer carries its own copy of Click in some releases and imports it in others: there is no one class to name.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        return complain(f"{message()}{got(error, arguments)} (longspan {first} --help lists what it takes)")


def got(error: Exception, arguments: list[str]) -> str:
    """Find the value that an error is about: the one after the option that it names."""
    names = getattr(getattr(error, "param", None), "opts", [])
    for name, value in pairwise(arguments):
        if name in names:
            return f", got {value!r}"
    return ""


def main() -> None:
    """Entry point of the `longspan` command."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
