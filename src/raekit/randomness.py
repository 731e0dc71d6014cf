"""Draw random numbers by address instead of from a global state.

Every random number of the library is a function of (seed, stream, position). The noise of sample 17 is therefore the
same for any batch size, number of processes and number of restarts. The position is the index of a sample in the
training stream or among the generated images. The stream is a name for the use of the numbers, such as "noise".
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def address(seed: int, stream: str, position: int) -> int:
    """Hash an address to 64 bits. For a fixed seed and stream, positions below 2^32 differ in the low 32 bits."""
    low = (position ^ zlib.crc32(f"{seed}/{stream}".encode())) & _MASK
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):  # the final mix of MurmurHash3, a bijection of 32 bits
        low = ((low ^ (low >> 16)) * multiplier) & _MASK
    low ^= low >> 15
    high = zlib.crc32(f"{stream}/{seed}/{position}".encode())
    return (high << 32) | low


def numpy_generator(seed: int, stream: str, position: int) -> np.random.Generator:
    """Return a numpy generator for one address, for augmentations and permutations."""
    return np.random.default_rng(address(seed, stream, position))


def normal(
    seed: int,
    stream: str,
    positions: Sequence[int] | Tensor,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return standard normal numbers, float32 (len(positions), *shape). Each row has its own address."""
    out = torch.empty((len(positions), *shape), dtype=torch.float32, device=device)
    for row, generator in zip(out, _generators(seed, stream, positions, device), strict=True):
        row.normal_(generator=generator)
    return out


def uniform(
    seed: int,
    stream: str,
    positions: Sequence[int] | Tensor,
    shape: Sequence[int] = (),
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return uniform numbers in [0, 1), float32 (len(positions), *shape). Each row has its own address."""
    out = torch.empty((len(positions), *shape, 1), dtype=torch.float32, device=device)
    for row, generator in zip(out, _generators(seed, stream, positions, device), strict=True):
        row.uniform_(generator=generator)
    return out.squeeze(-1)


def _generators(seed: int, stream: str, positions: Sequence[int] | Tensor, device: torch.device | str):
    generator = torch.Generator(device)
    for position in positions.tolist() if isinstance(positions, Tensor) else positions:
        yield generator.manual_seed(address(seed, stream, position))
