import pytest

from raekit.distributed.slurm import environment, first_node
from raekit.errors import UserError

TASK = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "gpu[03-04,7]"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[003-005,9],login1", "gpu003"),
        ("a-b[1,3]-ib,c", "a-b1-ib"),
        ("n[07]", "n07"),
        ("", ""),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first


def test_a_task_of_srun_is_a_rank():
    found = environment(TASK)
    assert found == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "20000",
    }
    one, other = (environment(TASK | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0"})["MASTER_PORT"] for job in ("7", "8"))
    assert one != other
    chosen = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert environment(TASK | chosen).items() >= chosen.items()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLURM_PROCID", "8"),
        ("SLURM_NTASKS", "many"),
        ("SLURM_LOCALID", "-1"),
        ("SLURM_GPUS_ON_NODE", "a100:4"),
        ("SLURM_JOB_ID", "9" * 5000),
    ],
)
def test_a_variable_that_is_no_number_is_named(name, value):
    with pytest.raises(UserError, match=f"{name}: the environment sets '{value}', which is no number from"):
        environment(TASK | {"SLURM_STEP_ID": "0", name: value})


@pytest.mark.parametrize(
    ("given", "devices"),
    [
        ({}, "0123"),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}, "0123"),
        # --gpus-per-task 1: the numbers are of the node, or 0 in each task where cgroups hide the other devices.
        ({"CUDA_VISIBLE_DEVICES": "2", "SLURM_GPUS_PER_TASK": "1"}, "0000"),
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "4"}, "0000"),
        # --gpu-bind single:1 or closest
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "4"}, "0000"),
        ({"CUDA_VISIBLE_DEVICES": "2,3", "SLURM_GPUS_ON_NODE": "4"}, "0101"),
        # --gpus-per-task with --gpu-bind none
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "4"}, "0123"),
        # More tasks than devices: not silently two tasks on one device.
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "2"}, "0123"),
    ],
)
def test_the_device_of_a_task_is_among_those_that_it_sees(given, devices):
    found = [environment(TASK | given | {"SLURM_LOCALID": str(task)})["LOCAL_RANK"] for task in range(4)]
    assert "".join(found) == devices


def test_other_processes_are_no_ranks():
    assert environment({}) == {}
    assert environment(TASK | {"SLURM_NTASKS": "1"}) == {}
    assert environment(TASK | {"SLURM_JOB_ID": "7"}) == {}, "a batch script, outside of srun"
    assert environment(TASK | {"SLURM_STEP_NUM_TASKS": "1"}) == {}


def test_a_task_without_nodes_says_what_to_set():
    with pytest.raises(UserError, match=r"SLURM: no node list.*set MASTER_ADDR"):
        environment(TASK | {"SLURM_JOB_NODELIST": ""})
