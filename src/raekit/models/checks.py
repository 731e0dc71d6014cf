"""Checks of the tensors and devices that callers give to the networks."""

from typing import Any

import torch

from raekit.errors import UserError

_LOW, _HIGH = -0.5, 2.0  # bicubic resizing leaves [0, 1] by less; images in [-1, 1] or up to 255 by more

_ROUNDING = 1e-3  # of shifted times


def check_device(device: torch.device | str) -> torch.device:
    """Return the device that a model is moved to.

    Raises:
        UserError: there is no such device, raekit does not run on it, or torch finds no CUDA device.
    """
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        place = None
    if place is None or place.type not in ("cpu", "cuda", "meta"):  # meta: only shapes
        raise UserError(f"device: {device!r} is not the name of a device; give 'cpu' or 'cuda'")
    if place.type == "cuda" and (place.index or 0) >= (count := torch.cuda.device_count()):
        raise UserError(f"device: {device} does not exist; torch finds {count} CUDA devices")
    return place


def check_images(images: Any, ranged: bool = True) -> None:
    """Check images that an encoder is given.

    A pixel may be somewhat out of range, as bicubic resizing leaves it. The range is checked on the CPU only: on
    another device, the host would wait for the answer.

    Args:
        images: the images.
        ranged: check the range, too. A discriminator sees images that were augmented or are not clamped.

    Raises:
        UserError: they are not a float tensor (B, 3, H, W) in [0, 1] with at least one image.
    """
    wanted = "expected a float tensor (B, 3, H, W) in [0, 1]"
    if not isinstance(images, torch.Tensor):
        raise UserError(f"images: {wanted}, got {type(images).__name__}; convert it, as torch.from_numpy does")
    if not images.is_floating_point():
        raise UserError(f"images: {wanted}, got {_name(images.dtype)}; divide by 255: images.float() / 255")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise UserError(f"images: {wanted}, got the shape {tuple(images.shape)}")
    if ranged and images.device.type == "cpu":
        low, high = (bound.item() for bound in images.aminmax())
        if not _LOW <= low <= high <= _HIGH:  # also false for NaN
            raise UserError(f"images: {wanted}, got values from {low:g} to {high:g}; scale them first")


def check_latents(latents: Any, shape: tuple[int, int, int], name: str = "latents") -> None:
    """Check latents, or noise of their shape, that a decoder or a denoiser is given.

    Raises:
        UserError: they are not a float tensor (B, *shape).
    """
    wanted = f"expected a float tensor (B, {', '.join(map(str, shape))})"
    if not isinstance(latents, torch.Tensor):
        raise UserError(f"{name}: {wanted}, got {type(latents).__name__}")
    if not latents.is_floating_point():
        raise UserError(f"{name}: {wanted}, got {_name(latents.dtype)}")
    if latents.shape[1:] != shape:
        raise UserError(f"{name}: {wanted}, got the shape {tuple(latents.shape)}")


def check_times(t: Any, count: int) -> None:
    """Check the times that a denoiser is given. As for images, the range is checked on the CPU only.

    Raises:
        UserError: they are not a float tensor (B,) with a time in [0, 1] for each of the `count` latents.
    """
    if not isinstance(t, torch.Tensor) or not t.is_floating_point() or t.shape != (count,):
        found = f"{_name(t.dtype)} {tuple(t.shape)}" if isinstance(t, torch.Tensor) else type(t).__name__
        raise UserError(f"t: expected a float tensor ({count},), a time for each of the latents, got {found}")
    if t.device.type == "cpu" and count:
        low, high = (bound.item() for bound in t.aminmax())
        if not -_ROUNDING <= low <= high <= 1 + _ROUNDING:  # also false for NaN
            raise UserError(f"t: the times must be from 0 (data) to 1 (noise), got values from {low:g} to {high:g}")


def check_labels(given: Any, count: int, classes: int) -> None:
    """Check the classes that a denoiser is given. As for images, the range is checked on the CPU only.

    Args:
        given: the classes.
        count: the number of latents.
        classes: the number of classes, which is also the id of "no class".

    Raises:
        UserError: they are neither ids (B,) from 0 to `classes` nor float weights (B, classes + 1).
    """
    wanted = f"expected ids ({count},) from 0 to {classes}, or float weights ({count}, {classes + 1})"
    if not isinstance(given, torch.Tensor):
        raise UserError(f"labels: {wanted}, got {type(given).__name__}")
    weights = given.is_floating_point()
    if given.shape != ((count, classes + 1) if weights else (count,)) or not (
        weights or given.dtype in (torch.int32, torch.int64)
    ):
        raise UserError(f"labels: {wanted}, got {_name(given.dtype)} {tuple(given.shape)}")
    if given.device.type == "cpu" and not weights and count:
        low, high = (bound.item() for bound in given.aminmax())
        if not 0 <= low <= high <= classes:
            raise UserError(f"labels: {wanted}, got values from {low} to {high}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
