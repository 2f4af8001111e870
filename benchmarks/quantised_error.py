"""What eight bits cost on FlashAttention-3's inputs (arXiv:2407.08608, Table 3): root mean square error of out.

Entries are N(0, 1) + N(0, 100) · Bernoulli(0.001); the truth is attention in float64 to the inputs before any rounding.
By the specification on any device, and where `hopper` runs by its kernel:

    python benchmarks/quantised_error.py --tokens 4096 --seeds 8
"""

import argparse
import statistics

import torch
from torch import Tensor

from longspan import spec
from longspan.backends import hopper
from longspan.spec import hadamard, quantise, random_signs

BLOCK = 128  # tokens


def inputs(seed: int, tokens: int, width: int, device: str) -> list[Tensor]:
    """Draw q, k and v."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(3):
        x, large = (torch.randn(1, 1, tokens, width, generator=generator, dtype=torch.float64) for _ in range(2))
        rare = torch.rand(1, 1, tokens, width, generator=generator) < 0.001
        drawn.append((x + 10 * large * rare).to(device))
    return drawn


def errors(seed: int, tokens: int, width: int, device: str) -> dict[str, float]:
    """Root mean square error of each way."""
    q, k, v = inputs(seed, tokens, width, device)
    truth = spec.attention(q, k, v).out
    signs = random_signs(width, seed, device=device)
    turned = [hadamard(q, signs), hadamard(k, signs), v]
    ways = {"scale a head": [q, k, v], "scale a head, turned": turned}
    made = {name: [quantise(x) for x in heads] for name, heads in ways.items()}
    made |= {
        f"{name.replace('head', 'block')}": [quantise(x, block=BLOCK) for x in heads] for name, heads in ways.items()
    }
    found = {name: spec.attention_quantised(*heads, out_dtype=torch.float64).out for name, heads in made.items()}
    if hopper.unavailable() is None:
        for name in ways:
            found[f"hopper, {name}"] = hopper.attention_quantised(*made[name]).out
    rounded = [x.to(torch.bfloat16) for x in (q, k, v)]
    found["bf16"] = spec.attention(*rounded).out
    return {name: float((out.double() - truth).square().mean().sqrt()) for name, out in found.items()}


def main() -> None:
    """Print the median, the least and the largest of several seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    runs = [errors(seed, asked.tokens, asked.width, asked.device) for seed in range(asked.seeds)]
    for name in runs[0]:
        each = sorted(run[name] for run in runs)
        print(f"{name:32s} {statistics.median(each):.2e}  ({each[0]:.2e} … {each[-1]:.2e})")


if __name__ == "__main__":
    main()
