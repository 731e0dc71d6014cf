import shutil

import pytest
import torch
import torch._dynamo
from torch import nn

from raekit.distributed import CPU
from raekit.training.compilation import CXX_COMPILERS, check_compiler, compile_parts


@pytest.mark.parametrize("there", CXX_COMPILERS)
def test_one_compiler_is_enough(monkeypatch, there):
    monkeypatch.setattr(shutil, "which", lambda name: name if name == there else None)
    check_compiler("train.compile", CPU)


def test_a_gpu_needs_no_cxx_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    check_compiler("train.compile", torch.device("cuda"))


@torch._dynamo.config.patch(recompile_limit=8)  # torch's default
def test_a_block_stays_compiled_for_many_batch_sizes():
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        compiled.append(len(inputs[-1]))
        return graph

    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    blocks = [Block(), Block()]
    compile_parts(blocks, backend=backend, dynamic=False)
    for size in range(2, 12):
        for block in blocks:
            block(torch.ones(size))
    assert compiled == [*range(2, 12)]
