"""Fixtures that every part of the tests may use."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.multiprocessing.spawn import spawn

from raekit.distributed import world


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """`run_ranks(function, size, *args)`: call `function(world, *args)` in `size` new CPU processes joined by
    gloo, as `torchrun` would start them, and return what they return, by rank.

    The function stands at the top of its test file; its arguments and result are picklable. An exception
    in one process ends all, and is raised here with its traceback.
    """

    def run(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
        # Port 0 and a store that stays here: no other process can take the port between choice and use.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        folder = tmp_path_factory.mktemp("ranks")
        spawn(_rank, (size, store.port, folder, function, args), nprocs=size)
        return [pickle.loads((folder / f"rank{rank}.pkl").read_bytes()) for rank in range(size)]

    return run


def _rank(rank: int, size: int, port: int, folder: Path, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # join the parent's store, start none
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    with world("cpu") as here:
        (folder / f"rank{rank}.pkl").write_bytes(pickle.dumps(function(here, *args)))


@pytest.fixture
def golden() -> Callable[[str], Path]:
    """`golden(name)`: the path of a reference case; the test is skipped where the cases are not at hand."""
    shared = os.environ.get("RAEKIT_SHARED", Path(__file__).parents[2] / "shared")

    def find(name: str) -> Path:
        path = Path(shared, "golden", name)
        if not path.is_file():
            pytest.skip(f"no reference case {name}; RAEKIT_SHARED names the folder that holds golden/")
        return path

    return find
