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
    epilog="Exit code: 0 all is well; 1 a law failed, or a model is not served within the error budget; 2 bad input.",
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


VERBS: Final = ("backends", "verify", "preflight")


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
