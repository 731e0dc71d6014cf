from collections.abc import Callable, Iterator

import pytest
import torch

from raekit.train.precision import Precision, float32_precision

BACKENDS = (torch.backends.cuda.matmul, torch.backends.cudnn)


@pytest.fixture
def set_flags() -> Iterator[Callable[[bool, bool], None]]:
    """Set the flags of products and convolutions; they return to their values after the test."""
    before = [backend.allow_tf32 for backend in BACKENDS]

    def change(*values: bool) -> None:
        for backend, value in zip(BACKENDS, values, strict=True):
            backend.allow_tf32 = value

    yield change
    change(*before)


def flags() -> list[bool]:
    return [backend.allow_tf32 for backend in BACKENDS]


@pytest.mark.parametrize("before", [(False, True), (True, False), (True, True), (False, False)])
@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True), ("bf16", False), ("auto", False)])
def test_products_and_convolutions_share_one_precision(set_flags, before, precision: Precision, tf32: bool):
    set_flags(*before)
    with float32_precision(precision):
        assert flags() == [tf32, tf32]
    assert flags() == [*before]


def test_flags_return_after_an_error(set_flags):
    set_flags(False, True)
    with pytest.raises(KeyError), float32_precision("tf32"):
        raise KeyError
    assert flags() == [False, True]
