import shutil

import pytest
import torch

from raekit.distributed import CPU
from raekit.training.compilation import CXX_COMPILERS, check_compiler


@pytest.mark.parametrize("there", CXX_COMPILERS)
def test_one_compiler_is_enough(monkeypatch, there):
    monkeypatch.setattr(shutil, "which", lambda name: name if name == there else None)
    check_compiler("train.compile", CPU)


def test_a_gpu_needs_no_cxx_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    check_compiler("train.compile", torch.device("cuda"))
