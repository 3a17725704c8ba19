"""The processes of a run, one a device: how they start, share tensors, fail and end."""

import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from utils.errors import InputError
from utils.runs import fast_bf16

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Loaded = TypeVar("Loaded")


def start(device: torch.device, devices: int, num_nodes: int, precision: str, batch_size: int) -> "Fabric":
    """Start the processes of a run: this one alone, or one for each device of each node.

    Args:
        device: of this process, where it is the only one; otherwise its type is that of all devices.
        devices: processes of a node.
        num_nodes: nodes, whose processes torchrun or Slurm has started.
        precision: 32, or bf16 for mixed precision.
        batch_size: of the batches that the processes share.

    Raises:
        InputError: the arguments disagree with the launcher, there are too few devices, or batches cannot be shared evenly.
    """
    # Loaded here: it takes longer than all other imports, and Guild imports the scripts for their flags alone.
    from lightning_fabric import Fabric

    processes = devices * num_nodes
    several = processes > 1
    launched = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 0)
    if launched and launched != processes:
        raise InputError(
            f"devices={devices} x num_nodes={num_nodes} are {processes} processes, but {launched} were launched"
        )
    if num_nodes > 1 and not launched:
        raise InputError(f"num_nodes={num_nodes} needs torchrun or srun to start the processes")
    if device.type == "cuda" and devices > torch.cuda.device_count():
        raise InputError(f"devices={devices} were asked for, but {torch.cuda.device_count()} GPUs are present")
    if batch_size % processes:
        raise InputError(
            f"batch_size={batch_size} cannot be shared evenly by {processes} processes; batch_size={processes} or a "
            f"multiple can"
        )
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # the run reports the precision itself
    with warnings.catch_warnings():
        # Where Slurm is installed, Lightning recommends it to every run that does not use it.
        warnings.filterwarnings("ignore", message="The `srun` command is available")
        fabric = Fabric(
            accelerator=device.type,
            devices=[device.index or 0] if device.type == "cuda" and not several else devices,
            num_nodes=num_nodes,
            strategy="ddp" if several else "auto",
            precision="bf16-mixed" if precision == "bf16" else "32-true",
        )
    if several and not launched:
        # Fabric would start the others as it thinks this one was started: as a module, which under Guild is Guild itself.
        sys.modules["__main__"].__spec__ = None
    fabric.launch()
    return fabric


@contextlib.contextmanager
def ending_together(fabric: "Fabric") -> Iterator[None]:
    """A block that all processes run. An input error in one of them ends all of them, with one sentence.

    Raises:
        InputError: the block raised it, or another process has ended.
    """
    try:
        yield
    except InputError:
        for process in getattr(fabric.strategy.launcher, "procs", []):
            process.terminate()
        raise
    except RuntimeError as error:
        if fabric.world_size > 1 and "Connection closed" in str(error):
            raise InputError(f"process {fabric.global_rank} stopped because another one did") from error
        raise
    if torch.distributed.is_initialized():
        # The group's threads end with the last reference to it, and the network holds one. A thread that released a tensor
        # while Python shuts down would crash this process, and with it all others.
        gc.collect()
        torch.distributed.destroy_process_group()


def resolve_precision(precision: str, device: torch.device) -> tuple[str, list[str]]:
    """The precision of a run, 32 or bf16; `auto` is bf16 on devices with native bf16 arithmetic.

    Returns:
        The precision, and lines that tell the user what auto was resolved to.

    Raises:
        InputError: bf16 was requested on a device without it.
    """
    able = fast_bf16(device)
    if precision == "auto":
        resolved = "bf16" if able else "32"
        return resolved, [f"Precision {resolved}: this {device.type} has {'' if able else 'no '}native bf16 arithmetic"]
    if precision == "bf16" and not able:
        raise InputError(
            f"precision=bf16: this {device.type} has no native bf16 arithmetic; precision=auto falls back to 32"
        )
    return precision, []


def first_process_first(fabric: "Fabric", load: Callable[[], Loaded]) -> Loaded | None:
    """Call `load` in the first process, then in the others, which use what it wrote.

    Returns:
        What `load` returned; None in the other processes if the first one raised an InputError.

    Raises:
        InputError: the first process raised it.
    """
    loaded, problem = None, ""
    if fabric.is_global_zero:
        try:
            loaded = load()
        except InputError as error:
            problem = str(error)
    problem = fabric.broadcast(problem)
    if problem and fabric.is_global_zero:
        raise InputError(problem)
    if problem:
        return None
    return load() if loaded is None else loaded


def reduced(fabric: "Fabric", tensor: Tensor, operation: str) -> Tensor:
    """The `sum` or `mean` of a tensor over the processes."""
    total = fabric.all_reduce(tensor, reduce_op=operation)
    assert isinstance(total, Tensor)
    return total


def gathered(fabric: "Fabric", tensor: Tensor) -> Tensor:
    """The tensors of all processes, which have the same shape, concatenated along the first axis."""
    joined = tensor.new_empty(fabric.world_size * len(tensor), *tensor.shape[1:])
    torch.distributed.all_gather_single(joined, tensor.contiguous())
    return joined


def silent(line: str) -> None:
    """Log nothing, in processes other than the first."""
