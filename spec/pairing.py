"""Which two coordinates of a head form a plane: the two layouts in use.

``half``: coordinate c turns with c + p (GPT-NeoX, and every checkpoint in Hugging Face's Llama layout).
``interleaved``: coordinate 2c turns with 2c + 1 (RoFormer, arXiv:2104.09864, eq. 34; Meta's Llama, GPT-J, Cohere).
The two differ by a fixed permutation of coordinates, so a checkpoint trained with one is wrong with the other.
Shapes: p planes, c = 2p coordinates.
"""

from typing import Final, Literal

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

Pairing = Literal["half", "interleaved"]

PATTERN: Final = {"half": "(two p)", "interleaved": "(p two)"}


def split(x: Float[Tensor, "*rows c"], pairing: Pairing) -> tuple[Float[Tensor, "*rows p"], Float[Tensor, "*rows p"]]:
    """Read each plane as a complex number: (real parts, imaginary parts)."""
    real, imag = rearrange(x, f"... {PATTERN[pairing]} -> two ... p", two=2)
    return real, imag


def join(real: Float[Tensor, "*rows p"], imag: Float[Tensor, "*rows p"], pairing: Pairing) -> Float[Tensor, "*rows c"]:
    """Write complex planes back as coordinates; the inverse of `split`."""
    return rearrange([real, imag], f"two ... p -> ... {PATTERN[pairing]}")
