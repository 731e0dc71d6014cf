"""Muon: momentum whose matrices are orthogonalised (Jordan et al., 2024; Liu et al., arXiv 2502.16982)."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from raekit.distributed.sharding import local

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7


def precision(device: torch.device) -> torch.dtype:
    """Return the type that matrices are orthogonalised in: bfloat16, but float32 on a CPU.

    Few CPUs multiply bfloat16 fast, and on the others the iteration would take 95 % of a training's time.
    """
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return the nearest matrix with singular values of about 1, by a Newton-Schulz iteration in the matrix's type."""
    a, b, c = COEFFICIENTS
    x = matrix
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


@torch.no_grad()
def muon_step(
    matrices: Sequence[nn.Parameter],
    momenta: Sequence[Tensor],
    lr: float,
    weight_decay: float,
    momentum: float,
    found_inf: Tensor | None = None,
) -> None:
    """Do one step of Muon, in place, with the step size of AdamW (factor 0.2 sqrt(larger side)).

    Each process orthogonalises its share of the matrices and sends the results to the others.

    Args:
        matrices: Parameters with gradients, distributed or not.
        momenta: The momentum of each parameter, distributed like the parameter.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        momentum: Nesterov momentum.
        found_inf: A tensor on the device. If it is not zero, nothing changes, and the host does not wait to know.
    """
    keep = None if found_inf is None else 1 - found_inf
    updates = []
    for matrix, buffer in zip(matrices, momenta, strict=True):
        assert matrix.grad is not None
        old, gradient = local(buffer), local(matrix.grad)
        if keep is not None:  # the momentum moves towards itself
            gradient = torch.where(keep.bool(), gradient, old)
        old.lerp_(gradient, 1 - momentum)
        updates.append(gradient.lerp(old, momentum).to(precision(gradient.device)))
    for matrix, update in zip(matrices, _orthogonalise_all(matrices, updates), strict=True):
        size = 0.2 * max(matrix.shape) ** 0.5
        weights, kept = local(matrix), 1.0 if keep is None else keep
        weights.mul_(1 - lr * weight_decay * kept)
        weights.add_(update.float() * (-lr * size * kept))  # a bfloat16 tensor times a number is rounded


def _orthogonalise_all(matrices: Sequence[nn.Parameter], updates: list[Tensor]) -> list[Tensor]:
    """Return the orthogonalised updates. Updates and results are this process's parts of matrices."""
    if not matrices or not isinstance(matrices[0], DTensor):
        return [orthogonalised(update) for update in updates]
    rank, size = dist.get_rank(), dist.get_world_size()
    results: list[Tensor] = [torch.empty(0)] * len(matrices)
    # In each round every process has one matrix. They are of about equal size, so that no process waits for long.
    order = sorted(range(len(matrices)), key=lambda i: -matrices[i].numel())
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        full = [_like(matrices[i], updates[i]).full_tensor() for i in chosen]
        length = max(update.numel() for update in full)
        mine = full[rank] if rank < len(chosen) else full[0][:0]
        done = orthogonalised(mine) if mine.numel() else mine
        sent = torch.zeros(length, dtype=mine.dtype, device=mine.device)
        sent[: done.numel()] = done.flatten()
        received = [torch.empty_like(sent) for _ in range(size)]
        dist.all_gather(received, sent)
        for i, update, values in zip(chosen, full, received[: len(chosen)], strict=True):
            results[i] = _part_of(matrices[i], values[: update.numel()].view_as(update))
    return results


def _like(matrix: Tensor, part: Tensor) -> DTensor:
    assert isinstance(matrix, DTensor)
    return DTensor.from_local(
        part, matrix.device_mesh, matrix.placements, run_check=False, shape=matrix.shape, stride=matrix.stride()
    )


def _part_of(matrix: Tensor, full: Tensor) -> Tensor:
    """Return this process's part of `full`, which is distributed like `matrix`."""
    assert isinstance(matrix, DTensor)
    return distribute_tensor(full, matrix.device_mesh, matrix.placements, src_data_rank=None).to_local()
