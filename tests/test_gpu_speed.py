"""The measurement of training speed on a GPU, tried on the CPU in its stead."""

import subprocess
import sys

import pytest
import torch
from conftest import PROJECT, environment

from benchmarks import gpu_speed
from benchmarks.training_speed import CPU, bench

SMALL = {"window": 16, "max_dates": 2, "num_rdb": 1, "num_dense_layers": 1, "growth_channels": 4, "channels": 8}


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_networks_and_windows_are_trained(precision: str) -> None:
    assert bench(precision, CPU, seconds=0.1)(0) > 0
    assert gpu_speed.canopy_steps(CPU, precision, windows=2, **SMALL)(0) > 0


def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_speed"]
    variables = environment() | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=PROJECT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "device=cuda was asked for, but 0 CUDA devices are present" in done.stderr


def test_both_operations_are_reported_beside_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for the GPU: which device and precision each table has, and that ratios are to the CPU's float32."""
    gpu = torch.device("cuda:0")
    asked: list[tuple[str, str, int]] = []

    def rate(device: torch.device, precision: str, windows: int) -> float:
        asked.append((str(device), precision, windows))
        return 0.125 if device == CPU else 50.0

    monkeypatch.setattr(gpu_speed, "choose_device", lambda _: gpu)
    monkeypatch.setattr(gpu_speed, "fast_bf16", lambda device: device == gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(gpu_speed, "bench", lambda precision, device: lambda _: rate(device, precision, 0))
    monkeypatch.setattr(gpu_speed, "canopy_steps", lambda *way: lambda _: rate(*way))
    monkeypatch.setattr(sys, "argv", ["gpu_speed.py", "--rounds", "1"])
    gpu_speed.main()
    assert set(asked) == {
        *(("cpu", "32", 0), ("cuda:0", "32", 0), ("cuda:0", "bf16", 0)),
        *(("cpu", "32", 1), ("cuda:0", "32", 4), ("cuda:0", "bf16", 4)),
    }
    said = capsys.readouterr().out
    assert "network-epochs/s" in said and "samples/s" in said
    assert "0.125" in said
    lines = [line.split() for line in said.splitlines() if line.startswith("a GPU, bf16")]
    assert [line[3:] for line in lines] == [["50.0", "50.0", "50.0", "400.0"]] * 2
