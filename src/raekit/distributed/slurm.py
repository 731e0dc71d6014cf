"""The variables of `torchrun`, made from the variables of SLURM, so that `srun raekit train ...` starts a world."""

import re
from collections.abc import Mapping

from raekit.errors import UserError


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for a task of `srun`; {} for anything else.

    MASTER_ADDR is the first node of the job, and MASTER_PORT depends on the number of the job. Both may be set instead.

    Args:
        given: The environment of the process.

    Raises:
        UserError: If the first node cannot be found.
    """
    size = given.get("SLURM_STEP_NUM_TASKS", given.get("SLURM_NTASKS", "1"))
    in_batch_script = (
        "SLURM_JOB_ID" in given and "SLURM_STEP_ID" not in given
    )  # one process, whatever SLURM_NTASKS says
    if "SLURM_PROCID" not in given or size == "1" or in_batch_script:
        return {}
    nodes = next(
        (given[name] for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") if name in given), ""
    )
    address = given.get("MASTER_ADDR") or first_node(nodes)
    if not address:
        raise UserError("SLURM: no node list in SLURM_JOB_NODELIST; set MASTER_ADDR to the host name of the first node")
    return {
        "RANK": given["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": _device_number(given),
        "MASTER_ADDR": address,
        "MASTER_PORT": given.get("MASTER_PORT", str(20_000 + int(given.get("SLURM_JOB_ID", 0)) % 20_000)),
    }


def _device_number(given: Mapping[str, str]) -> str:
    """Return the number of this task's device among the CUDA devices that the task sees.

    By default, each task sees all devices of its node, and task i takes device i. With --gpus-per-task or --gpu-bind, a
    task sees only some devices of the node, numbered from 0. Tasks that see the same ones take turns.
    """
    task, seen = given.get("SLURM_LOCALID", "0"), given.get("CUDA_VISIBLE_DEVICES", "")
    number, on_node = len(seen.split(",")), given.get("SLURM_GPUS_ON_NODE") or "0"
    is_part = "SLURM_GPUS_PER_TASK" in given or number < int(on_node)
    return str(int(task) % number) if seen and is_part else task


def first_node(nodes: str) -> str:
    """Return the first host name of a node list such as `gpu[003-005,9],login1`; "" if there is none."""
    found = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes.strip())
    return "".join(part or "" for part in found.groups()) if found else ""
