from collections.abc import Callable, Iterator

import pytest
import torch

from raekit.training.precision import Precision, compute_dtype, float32_precision


@pytest.fixture
def set_flags() -> Iterator[Callable[[bool, bool], None]]:
    """Set the flags of products and convolutions; they return to their values after the test."""
    before = flags()

    def change(products: bool, convolutions: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions

    yield change
    change(*before)


def flags() -> tuple[bool, bool]:
    return bool(torch.backends.cuda.matmul.allow_tf32), bool(torch.backends.cudnn.allow_tf32)


@pytest.mark.parametrize("before", [(False, True), (True, False), (True, True), (False, False)])
@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True), ("bf16", False), ("auto", False)])
def test_products_and_convolutions_share_one_precision(set_flags, before, precision: Precision, tf32: bool):
    set_flags(*before)
    with float32_precision(precision):
        assert flags() == (tf32, tf32)
    assert flags() == before


def test_flags_return_after_an_error(set_flags):
    set_flags(False, True)
    with pytest.raises(KeyError), float32_precision("tf32"):
        raise KeyError
    assert flags() == (False, True)


@pytest.mark.parametrize("limit", [None, "AVX2", "avx512_core_bf16", "AVX512_CORE_AMX", "DEFAULT"])
@pytest.mark.parametrize("able", [False, True])
def test_auto_is_bf16_where_the_processor_has_amx_and_may_use_it(monkeypatch, limit: str | None, able: bool):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: able)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    fast = able and limit not in ("AVX2", "avx512_core_bf16")
    assert compute_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if fast else torch.float32)
    assert compute_dtype("bf16", torch.device("cpu")) == torch.bfloat16
