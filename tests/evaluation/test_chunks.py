"""Stored features of a stream that is not complete yet."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from raekit.distributed import World
from raekit.evaluation import streams
from raekit.evaluation.chunks import collect, collected, images_digest
from raekit.evaluation.features import Images
from raekit.files import remove
from raekit.pictures import quantize

ALONE = World()


class Rows:
    name, width = "rows", 12

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class Noise:
    """A stream of noise images."""

    count, image_size, source, classes = 23, 2, None, ()

    def __init__(self, size: int):
        self.size = size
        self.images = torch.rand(self.count, 3, 2, 2, generator=torch.Generator().manual_seed(0))

    def batches(self, chunks: Sequence[range], world: World) -> Iterator[Images]:
        for chunk in chunks:
            for numbers in torch.tensor(chunk).split(self.size):
                yield Images(self.images[numbers], numbers % 3, numbers)

    def settings(self) -> dict[str, Any]:
        return {}


def test_features_come_back_in_order_for_all_batch_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams, "CHUNK", 10)
    network, digests, shown = Rows(), [], []

    def report(what: str, done: int, total: int, text: str = "", unit: int = 1) -> None:
        shown.append((done, total))

    for size in (3, 10):
        out = tmp_path / str(size)
        collect(Noise(size), {"rows": network}, out / "features", out / "samples.png", ALONE, report)
        assert shown[-1] == (23, 23)
        found = list(collected({"rows": network}, 23, out / "features", "cpu"))
        assert [len(batch) for batch in found] == [10, 10, 3]
        assert torch.cat([batch.features(network) for batch in found]).equal(quantize(Noise(3).images).flatten(1))
        indices = [batch.indices for batch in found if batch.indices is not None]
        assert torch.cat(indices).tolist() == list(range(23))
        assert torch.cat([batch.labels for batch in found]).tolist() == [i % 3 for i in range(23)]
        digests.append(images_digest(23, out / "features"))
        with Image.open(out / "samples.png") as picture:
            assert picture.width > picture.height // 2
        remove(out / "features")
        assert [path.name for path in out.iterdir()] == ["samples.png"]
    assert digests[0] == digests[1]
