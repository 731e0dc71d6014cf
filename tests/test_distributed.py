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
