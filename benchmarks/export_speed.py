"""Processor time of an exported canopy network in onnxruntime, against PyTorch: the published network at 5 m, one thread.

    python -m benchmarks.export_speed

One window of 128 x 128 pixels and 6 dates, initial weights. The graph computes the whole window, as PyTorch does without a
cut; PyTorch with its margin cut off computes only what is left.
"""

import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import onnxruntime
import torch

from benchmarks.rates import compare_rates, rate_of
from datasets.canopy.tiles import PUBLISHED, standardise
from export import load_canopy, to_onnx
from models.threasure_net import make_network
from utils.runs import write_tensors

SIZES = {"sample": 1, "date": 6, "row": 128, "column": 128}
ROUNDS = 3
FLAGS = {"seed": 1, "resolution": 5, "encoder": "rdn", "upsampling": "shuffle"}
FLAGS |= {"num_rdb": 5, "num_dense_layers": 5, "growth_channels": 24, "channels": 64}


def main() -> None:
    """Export, then run both."""
    torch.set_num_threads(1)
    network = make_network(FLAGS, 16).eval()
    network.initialise(torch.Generator().manual_seed(1))
    record = {"flags": FLAGS, "angles": True, "simulated": True, "statistics": asdict(PUBLISHED), "target_unit": "dm"}
    with tempfile.TemporaryDirectory() as folder:
        write_tensors(Path(folder) / "best.safetensors", network.state_dict(), record)
        run = load_canopy(Path(folder) / "best.safetensors")
    generator = torch.Generator().manual_seed(1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(to_onnx(run, {}, generator), options, providers=["CPUExecutionProvider"])
    inputs = run.draw(SIZES, generator)
    fed = {port.name: tensor.numpy() for port, tensor in zip(run.inputs, inputs, strict=True)}
    images, days, query_day, padding, angles = inputs

    @torch.no_grad()
    def pytorch(cut: int) -> None:
        network(standardise(images, angles, PUBLISHED), days, query_day, padding, cut)

    ways = {
        "PyTorch, whole window": rate_of(1, lambda _: pytorch(0), time.process_time),
        "PyTorch, margin cut off": rate_of(1, lambda _: pytorch(network.margin), time.process_time),
        "onnxruntime, whole window": rate_of(1, lambda _: session.run(None, fed), time.process_time),
    }
    compare_rates(ways, ROUNDS, "windows")


if __name__ == "__main__":
    main()
