"""What looking a tuned choice up costs a launch, and what importing the backends costs a program.

    python benchmarks/lookup.py

Each figure is the median of rounds; the choice is looked up in this machine's tables, as a launch would.
"""

import statistics
import subprocess
import sys
import timeit
from typing import Final

from longspan.autotune import override
from longspan.backends.flash import rope_choices
from longspan.backends.flash.choices import Key, choose, heuristic

CALLS: Final = 100_000
ROUNDS: Final = 7
IMPORT: Final = (
    "import time, torch, einops, jaxtyping; begin = time.perf_counter(); import longspan.backends{more};"
    " print(time.perf_counter() - begin)"
)


def key() -> Key:
    """Make the key of a launch, as every launch does."""
    return Key(kernel="forward", architecture="sm_90", width=128, itemsize=2, masked=True, descriptors=True)


def turned() -> object:
    """Look a rotation up, as every launch does but for asking the driver what it runs on."""
    return rope_choices.TUNED(rope_choices.RopeKey("sm_90", 12, 32, 64, 2, inside=True))


def microseconds(call: object) -> float:
    """Time one call among many."""
    return statistics.median(timeit.repeat(call, number=CALLS, repeat=ROUNDS)) / CALLS * 1e6  # pyright: ignore[reportArgumentType]


def importing(more: str) -> float:
    """Seconds that an import takes beyond that of PyTorch, in a new process."""
    command = [sys.executable, "-c", IMPORT.format(more=more)]
    runs = [float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(3)]  # noqa: S603
    return statistics.median(runs)


def main() -> None:
    """Print the figures."""
    known = key()
    choose(known)
    print(f"making a key                {microseconds(key):6.2f} µs")
    print(f"looking it up               {microseconds(lambda: choose(known)):6.2f} µs")
    print(f"both, as a launch does      {microseconds(lambda: choose(key())):6.2f} µs")
    print(f"the heuristic alone         {microseconds(lambda: heuristic(known)):6.2f} µs")
    print(f"of a rotation, key and all  {microseconds(turned):6.2f} µs")
    with override({"flash.forward": vars(heuristic(known))}):
        print(f"under an override           {microseconds(lambda: choose(known)):6.2f} µs")
    print(f"import longspan.backends        {importing('') * 1e3:6.0f} ms beyond torch, einops and jaxtyping")
    print(
        f"and longspan.backends.flash     {importing(', longspan.backends.flash') * 1e3:6.0f} ms (Triton is most of it)"
    )


if __name__ == "__main__":
    main()
