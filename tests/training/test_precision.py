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


INTEL, AMD = "Intel(R) Xeon(R) Processor", "AMD EPYC 9B14"


@pytest.mark.parametrize(
    ("name", "amx", "narrow", "limit", "fast"),
    [
        (INTEL, True, True, None, True),
        (INTEL, True, True, "DEFAULT", True),
        (INTEL, True, True, "AVX512_CORE_AMX", True),
        (INTEL, True, True, "avx512_core_bf16", False),
        (INTEL, True, True, "AVX2", False),
        (INTEL, False, True, None, False),
        (AMD, False, True, None, True),
        (AMD, False, True, "avx512_core_bf16", True),
        (AMD, False, True, "AVX512_CORE_VNNI", False),
        (AMD, False, True, "AVX2", False),
        (AMD, False, False, None, False),
    ],
)
def test_auto_is_bf16_where_the_processor_multiplies_it_fast(
    monkeypatch, name: str, amx: bool, narrow: bool, limit: str | None, fast: bool
):
    found = {"cpu_name": name, "amx_tile": amx, "avx512_bf16": narrow}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert compute_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if fast else torch.float32)
    assert compute_dtype("bf16", torch.device("cpu")) == torch.bfloat16


def test_a_processor_of_another_architecture_is_no_error(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"})
    assert compute_dtype("auto", torch.device("cpu")) == torch.float32
