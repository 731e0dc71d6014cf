"""The variables of `torchrun`, made from the variables of SLURM, so that `srun raekit train ...` starts a world."""

import re
from collections.abc import Mapping

from raekit.errors import UserError


def number(given: Mapping[str, str], name: str, default: int, least: int = 0, most: int = 2**31 - 1) -> int:
    """Return the whole number in a variable that a launcher sets.

    Args:
        given: the environment of the process.
        name: the variable.
        default: the number if the variable is not set, or empty.
        least: the smallest valid number.
        most: the largest valid number.

    Raises:
        UserError: the value is no number in this range.
    """
    value = given.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,18}", value) or not least <= int(value) <= most:
        raise UserError(
            f"{name}: the environment sets {value!r}, which is no number from {least} to {most}; unset it, or start "
            "with torchrun or srun"
        )
    return int(value)


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for a task of `srun`; {} for anything else.

    MASTER_ADDR is the first node of the job, and MASTER_PORT depends on the number of the job. Both may be set instead.

    Args:
        given: The environment of the process.

    Raises:
        UserError: If the first node cannot be found.
    """
    # One process, whatever SLURM_NTASKS says.
    in_batch_script = "SLURM_JOB_ID" in given and "SLURM_STEP_ID" not in given
    if "SLURM_PROCID" not in given or in_batch_script:
        return {}
    size = number(given, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in given else "SLURM_NTASKS", 1, 1)
    if size == 1:
        return {}
    nodes = next(
        (given[name] for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") if name in given), ""
    )
    address = given.get("MASTER_ADDR") or first_node(nodes)
    if not address:
        raise UserError("SLURM: no node list in SLURM_JOB_NODELIST; set MASTER_ADDR to the host name of the first node")
    return {
        "RANK": str(number(given, "SLURM_PROCID", 0, 0, size - 1)),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": _device_number(given),
        "MASTER_ADDR": address,
        "MASTER_PORT": given.get("MASTER_PORT") or str(20_000 + number(given, "SLURM_JOB_ID", 0) % 20_000),
    }


def _device_number(given: Mapping[str, str]) -> str:
    """Return the number of this task's device among the CUDA devices that the task sees.

    By default, each task sees all devices of its node, and task i takes device i. With --gpus-per-task or --gpu-bind, a
    task sees only some devices of the node, numbered from 0. Tasks that see the same ones take turns.
    """
    task, seen = number(given, "SLURM_LOCALID", 0), given.get("CUDA_VISIBLE_DEVICES", "")
    count = len(seen.split(","))
    is_part = "SLURM_GPUS_PER_TASK" in given or count < number(given, "SLURM_GPUS_ON_NODE", 0)
    return str(task % count if seen and is_part else task)


def first_node(nodes: str) -> str:
    """Return the first host name of a node list such as `gpu[003-005,9],login1`; "" if there is none."""
    found = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes.strip())
    return "".join(part or "" for part in found.groups()) if found else ""
