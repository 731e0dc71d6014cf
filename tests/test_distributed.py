import pytest
import torch

from raekit.distributed import world
from raekit.errors import UserError


def test_cudnn_attention_is_off_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        with world("cuda") as here:
            assert here.device.type == "cuda"
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            assert torch.backends.cuda.flash_sdp_enabled()
        monkeypatch.setenv("LOCAL_RANK", "1")
        with pytest.raises(UserError, match=r"torchrun: more processes than CUDA devices \(1\); start at most 1"):
            world("cuda").__enter__()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "4"}, "sets 4 processes, but not RANK, MASTER_ADDR, MASTER_PORT; start"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "but not MASTER_ADDR, MASTER_PORT; start"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: the environment sets 'two'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK: the environment sets '-1'"),
    ],
)
def test_variables_that_another_job_left_are_named(variables, message, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message), world("cpu"):
        pass
