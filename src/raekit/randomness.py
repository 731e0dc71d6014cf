"""Randomness is addressed, not consumed.

Every random number of the library is a function of (seed, stream, position): the noise of sample 17 is
the same for any batch size, number of processes, or number of restarts. `position` is the index of a
sample, in the training stream or among the generated images; `stream` names the use.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def address(seed: int, stream: str, position: int) -> int:
    """Mix an address into 64 bits. For a fixed seed and stream it is one-to-one in the low 32 bits."""
    low = (position ^ zlib.crc32(f"{seed}/{stream}".encode())) & _MASK
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):  # as MurmurHash3 ends, a bijection of 32 bits
        low = ((low ^ (low >> 16)) * multiplier) & _MASK
    low ^= low >> 15
    high = zlib.crc32(f"{stream}/{seed}/{position}".encode())
    return (high << 32) | low


def numpy_generator(seed: int, stream: str, position: int) -> np.random.Generator:
    """A numpy generator for one address (augmentation, permutations)."""
    return np.random.default_rng(address(seed, stream, position))


def normal(
    seed: int,
    stream: str,
    positions: Sequence[int] | Tensor,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normals (len(positions), *shape), float32, one address for each row."""
    out = torch.empty((len(positions), *shape), device=device)
    for row, generator in zip(out, _generators(seed, stream, positions, device), strict=True):
        torch.randn(row.shape, generator=generator, out=row)
    return out


def uniform(
    seed: int,
    stream: str,
    positions: Sequence[int] | Tensor,
    shape: Sequence[int] = (),
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniforms on [0, 1) of shape (len(positions), *shape), float32, one address for each row."""
    out = torch.empty((len(positions), *shape, 1), device=device)
    for row, generator in zip(out, _generators(seed, stream, positions, device), strict=True):
        torch.rand(row.shape, generator=generator, out=row)
    return out.squeeze(-1)


def _generators(seed: int, stream: str, positions: Sequence[int] | Tensor, device: torch.device | str):
    generator = torch.Generator(device)
    for position in positions.tolist() if isinstance(positions, Tensor) else positions:
        yield generator.manual_seed(address(seed, stream, position))
