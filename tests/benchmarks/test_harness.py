"""The reports of the benchmarks, and the machine that they describe."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import freed_memory
import machine
from harness import Runs, Table, denoiser, interleaved, named, publish, ratio, report, training_step
from machine import MatmulRate, describe, summary
from raekit.distributed import CPU
from raekit.training.optim import OptimConfig, adamw
from raekit.training.throughput import stated_peak
from scaling import slope


def test_a_ratio_with_a_wide_range_comes_with_a_warning():
    assert ratio([1.0, 1.1, 1.2]) == "1.10 (1.00-1.20)"
    assert ratio([1.0, 1.1, 1.4]) == "1.10 (1.00-1.40) too noisy to conclude"


def test_the_matmul_rate_is_that_of_the_products(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MatmulRate, "_seconds", lambda self: 0.5)
    rate = MatmulRate(torch.float32, CPU)
    assert rate.a.shape == (256, 256)  # a product takes long enough
    assert rate.history == [2 * 256**3 / 0.5]
    monkeypatch.setattr(MatmulRate, "_seconds", lambda self: 0.25)
    assert rate.measure() == 2 * 256**3 / 0.25
    assert str(rate) == "matmul rate, fp32: 6.71e-05 TFLOP/s before, 0.000134 after (6.71e-05-0.000134)"


def test_the_matrices_grow_until_a_product_takes_long_enough(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MatmulRate, "_seconds", lambda self: 1e-3 * (len(self.a) / 512) ** 3)
    assert len(MatmulRate(torch.bfloat16, CPU).a) == 1024
    monkeypatch.setattr(MatmulRate, "_seconds", lambda self: 1e-6)
    assert len(MatmulRate(torch.float32, CPU).a) == 2048


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("A100-SXM4-40GB", 312e12),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("GT", None),
    ],
)
def test_the_peak_of_a_device(name: str, flops: float | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert stated_peak("bf16", torch.device("cuda")) == flops
    assert stated_peak("bf16", CPU) is None


def test_the_processor_is_read_from_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    text = "processor : 0\nmodel name : A Processor\nflags : fpu avx2 avx512f amx_bf16 avx512_bf16x\n"
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    assert machine._processor() == {"processor": "A Processor", "instructions": "avx2 avx512f amx_bf16"}


def test_turns_are_interleaved_after_a_warm_up_and_a_run_for_memory():
    order: list[str] = []
    variants = {name: (lambda name=name: order.append(name)) for name in "ab"}
    rate = MatmulRate(torch.float32, CPU)
    runs = interleaved(variants, 2, CPU, rate)
    assert order == ["a", "b"] * 4
    assert [len(run.seconds) for run in runs.values()] == [2, 2]
    assert {name: len(rates) for name, rates in rate.around.items()} == {"a": 2, "b": 2}


def test_peak_memory_is_what_a_run_took_beyond_what_was_held():
    held = torch.ones(2**24)  # 64 MiB
    runs = interleaved(
        {"none": lambda: None, "some": lambda: torch.ones(2**25)}, 1, CPU, MatmulRate(torch.float32, CPU)
    )
    assert runs["none"].peak < 2**25 < 2**26 < runs["some"].peak
    del held


def test_a_report_holds_machine_rate_share_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rate = MatmulRate(torch.float32, CPU)
    rate.history, rate.around = [1e12, 2e12], {"slow": [1e12, 1e12], "fast": [1e12, 2e12]}
    runs = {"slow": Runs([2.0, 2.0], 2**20), "fast": Runs([1.0, 0.5])}
    report("steps", runs, 4, CPU, tmp_path, rate=rate, flops=5e11)
    out = capsys.readouterr().out
    assert summary(describe(CPU)) in out
    assert "matmul rate, fp32: 1 TFLOP/s before, 2 after (1-2)" in out
    assert "3.00 (2.00-4.00) too noisy to conclude" in out
    assert "25% (25%-25%)" in out
    (table,) = json.loads((tmp_path / "results.json").read_text())
    assert table["machine"]["torch"] == torch.__version__
    assert table["figures"]["variants"]["fast"]["speed_ups"] == [2.0, 4.0]
    assert table["figures"]["variants"]["fast"]["shares_of_matmul_rate"] == [0.5, 0.5]
    assert (
        "| slow | 2000 | 2000-2000 | 2 | 1 | 1.00 (1.00-1.00) | 25% (25%-25%) |"
        in (tmp_path / "results.md").read_text()
    )


def test_a_known_gpu_gets_its_mfu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("harness.stated_peak", lambda precision, device: 1e12)
    rate = MatmulRate(torch.float32, CPU)
    rate.around = {"ours": [1e12]}
    report("steps", {"ours": Runs([2.0])}, 1, CPU, tmp_path, rate=rate, flops=5e11)
    (table,) = json.loads((tmp_path / "results.json").read_text())
    assert table["columns"][-1] == "MFU"
    assert table["rows"][0][-1] == "25.0%"


def test_a_table_of_the_same_title_is_replaced(tmp_path: Path):
    for title, cell in (("one", "1"), ("two", "2"), ("one", "3")):
        publish(Table(title, ["", "value"], [["row", cell]]), CPU, tmp_path)
    tables = json.loads((tmp_path / "results.json").read_text())
    assert [(table["title"], table["rows"][0][1]) for table in tables] == [("two", "2"), ("one", "3")]
    assert (tmp_path / "results.md").read_text().count("## ") == 2


def test_slopes():
    a, b, exponent = slope([1, 2, 4], [5.0, 7.0, 11.0])
    assert (a, b) == pytest.approx((3, 2))
    assert slope([10, 1000], [2.0, 200.0])[2] == pytest.approx(1)
    assert slope([10, 1000], [2.0, 2.0])[2] == pytest.approx(0)
    assert exponent == pytest.approx(torch.tensor(11 / 5).log2().item() / 2)


def test_names_and_shapes_of_the_denoisers():
    assert named("XL") == "DiT^DH-XL, 768x16x16"
    assert named("S", 32) == "DiT^DH-S, 768x32x32"
    assert named("RAEv2") == "RAEv2, 1024x16x16"


def test_a_step_trains():
    model = denoiser("tiny", CPU, classes=3)
    before = model.final.out.weight.detach().clone()
    training_step(model, adamw(OptimConfig(), model.parameters()), 2, "fp32", CPU)()
    assert not torch.equal(model.final.out.weight, before)


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_kept_and_returned_memory_are_compared_in_turns(tmp_path: Path):
    freed_memory.main(
        ["--work", "sampling", "--size", "tiny", "--batch", "1", "--repeats", "1", "--out", str(tmp_path)]
    )
    (table,) = json.loads((tmp_path / "results.json").read_text())
    assert [row[0] for row in table["rows"]] == [
        "float32 weights, returned",
        "bf16 weights, returned",
        "bf16 weights, kept",
    ]
    assert all(each["peak"] > 2**26 for each in table["figures"]["variants"].values())
