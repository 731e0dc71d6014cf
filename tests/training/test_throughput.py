import time

import torch
import torch.nn.functional as F
from torch import nn

from raekit.distributed import CPU, World
from raekit.training.recompute import checkpoint_blocks, without_recomputation
from raekit.training.throughput import Peak, Speed, flop_counter, peak_memory, peak_of


def test_a_record_has_speed_flops_and_the_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    speed = Speed(10, 4, World(), Peak(1e12, stated=True))

    def steps(count: int, waiting: float) -> None:
        for _ in range(count):
            with speed.waiting():
                now[0] += waiting
            now[0] += 2 - waiting
            speed.add(5e11)

    steps(5, 0.5)
    record = speed.record(15, 40)
    assert record.pop("peak_memory_gib") == peak_memory(CPU) > 0.01
    assert record == {
        "images_per_second": 2.0,
        "step_seconds": 2.0,
        "data_wait": 0.25,
        "tflops": 0.25,
        "mfu": 0.25,
        "seconds_left": 50.0,
    }
    with speed.paused():  # an evaluation
        now[0] += 10
    steps(5, 0.0)
    record = speed.record(20, 40)
    names = ("step_seconds", "data_wait", "tflops", "seconds_left")
    assert [record[name] for name in names] == [2.0, 0.0, 0.25, 60.0]


def test_a_record_covers_all_processes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(World, "gather", lambda world, own: [own, (3.0, 1e6)])  # the other waits, and needs more
    speed = Speed(0, 8, World(size=2), Peak(1e12, stated=True))
    speed.add(2e12)
    now[0] = 4.0
    record = speed.record(1, 2)
    assert (record["images_per_second"], record["tflops"], record["mfu"]) == (2.0, 0.25, 0.25)
    assert (record["data_wait"], record["peak_memory_gib"]) == (0.75, 1e6)


def test_a_share_of_a_measured_rate_is_not_called_mfu():
    speed = Speed(0, 1, World(), Peak(1e12, stated=False))
    speed.add(1.0)
    assert {"matmul_share", "mfu"} & speed.record(1, 2).keys() == {"matmul_share"}


def test_an_unknown_device_is_measured_once():
    peak = peak_of(CPU, "fp32")
    assert not peak.stated
    assert 1e8 < peak.flops < 1e15
    assert peak_of(CPU, "fp32") is peak


def test_the_fastest_product_is_the_measured_rate(monkeypatch):
    now = iter([0.0, 1.0, 1.0, 1.25, 2.0, 5.0, 5.0, 6.0, 6.0, 7.0])  # the start and the end of each product
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    assert peak_of.__wrapped__(CPU, "fp32").flops == 2 * 768**3 / 0.25


def test_attention_on_a_cpu_is_counted():
    q = torch.ones(2, 3, 5, 8, requires_grad=True)
    with flop_counter() as counter:
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    product = 2 * 2 * 3 * 5 * 5 * 8
    assert counter.get_total_flops() == (2 + 5) * product  # the backward pass computes the logits again


def test_activations_are_not_recomputed_while_flops_are_counted():
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)]
    model, x = nn.Sequential(*blocks), torch.ones(3, 4, requires_grad=True)

    def flops() -> int:
        with flop_counter() as counter:
            model(x).sum().backward()
        return counter.get_total_flops()

    plain = flops()
    checkpoint_blocks(blocks)
    assert flops() > plain
    with without_recomputation(blocks):
        assert flops() == plain
    assert flops() > plain
