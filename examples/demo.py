"""What longspan is for, in two minutes on a laptop: backends by name, laws that bite, and a real model's needs."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from longspan import backends
from longspan.laws import attention_bounds, worst
from longspan.spec import masks, scaling

HERE = Path(__file__).parent


def longspan(*arguments: str) -> int:
    """Run the command as a user would, and return its exit code."""
    print(f"\n$ longspan {' '.join(arguments)}", flush=True)
    return subprocess.run([sys.executable, "-m", "longspan.cli.main", *arguments], check=False).returncode  # noqa: S603


def two_backends() -> None:
    """Make one call on two backends, and hold both to the specification in float64."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 1000, 128) for heads in (8, 2, 2))

    # A rotation is a value: here YaRN, for 16 times the context that the model was trained on.
    rotation = scaling.yarn(128, base=5e5, factor=16, original=8192)
    position = torch.arange(1000) + 100_000  # far out, where angles in float32 are already wrong
    mask = masks.causal() & masks.window(256)  # a mask is data: terms joined by &

    for name in ("eager", "sdpa"):
        backend = backends.load(name)
        turned_q, turned_k = backend.rotate_qk(q, k, position, rotation)
        state = backend.attention(turned_q, turned_k, v, mask=mask)  # out and its log-sum-exp

        bound = attention_bounds(turned_q, turned_k, v, mask=mask)["out"]  # the truth, and how far rounding may go
        error = float((state.out.double() - bound.truth).abs().max())
        print(
            f"  {name:6} largest error {error:.1e}, at worst {100 * worst(name, state.out, bound):.0f} % of its budget"
        )


def main() -> int:
    """Run the three parts; the exit code says whether each ended as it should."""
    print("1. The same call on two backends, against the specification in float64")
    two_backends()

    print("\n2. The laws, tried on random problems: they hold for what you would get from backends.load('auto') …")
    holds = longspan("verify", "--seconds", "20") == 0
    print("\n   … and they reject a bug that we planted: causal attention aligned to the wrong corner.")
    rejects = longspan("verify", "--seconds", "20", "--mutant", "causal_from_the_top_left") == 1

    print("\n3. A published model, before you run it: what does a context of 2048 tokens take on this machine?")
    config = HERE / "configs" / "gpt-oss-20b.json"
    picture = Path(tempfile.gettempdir()) / "longspan-preflight.png"
    served = longspan("preflight", str(config), "--context", "2048", "--png", str(picture)) == 0

    print(f"\nlaws hold: {holds} · planted bug rejected: {rejects} · model served within the budget: {served}")
    return 0 if holds and rejects and served else 1


if __name__ == "__main__":
    sys.exit(main())
