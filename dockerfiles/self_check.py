#!/usr/bin/env python3
"""Report what the environment has and lacks: versions, GPU, threads, Guild's home, TensorBoard's port.

Inside the image: dockerfiles/launch.sh dockerfiles/self_check.py --gpu
Ends with exit code 2 and a sentence for each thing that is missing. If nothing is, --gpu also measures the training speed.
"""

import argparse
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parent.parent
LOCK = PROJECT / "requirements.lock"


def versions() -> str | None:
    """Print versions; a complaint if installed packages are not those of the lock file."""
    print(f"python      {platform.python_version()}")
    print(f"torch       {torch.__version__} (CUDA libraries: {torch.version.cuda or 'none'})")
    print(f"guild       {metadata.version('guildai')} ({shutil.which('guild') or 'not on PATH'})")
    installed = {re.sub(r"[-_.]+", "-", d.name).lower(): d.version.partition("+")[0] for d in metadata.distributions()}
    # The lock file is of every Python and system; a package may have a line for each.
    locked = [Requirement(line) for line in re.findall(r"^[a-z0-9-]+==.+", LOCK.read_text(), re.MULTILINE)]
    here = {one.name: one for one in locked if one.marker is None or one.marker.evaluate()}
    other = sorted(name for name in here.keys() & installed.keys() if installed[name] not in here[name].specifier)
    if other:
        return f"{', '.join(other)}: not the versions of requirements.lock, install them (or build the image) again."
    return None if shutil.which("guild") else "The command guild is not on PATH."


def gpu(required: bool) -> str | None:
    """Print the GPUs; a complaint if one computes wrongly, or if none is visible although one is required."""
    if not torch.cuda.is_available():
        print("gpu         none")
        if not required:
            return None
        if torch.version.cuda is None:
            return "This torch has no CUDA: for a GPU, build the image without --cpu."
        return "No GPU is visible: the host needs NVIDIA's driver and container toolkit, the container --gpus all."
    left, right = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        device = f"cuda:{number}"
        difference = (left @ right - (left.to(device) @ right.to(device)).cpu()).abs().max().item()
        print(f"gpu         {device} {properties.name}, {properties.total_memory / 2**30:.1f} GiB")
        print(f"            its matrix product differs from the CPU's by {difference:.1g}")
        if not difference < 1e-3:  # entries are around 16; TF32 would be off by more
            return f"{device} computes matrix products that differ from the CPU's by {difference:.1g}."
    if not os.environ.get("CUBLAS_WORKSPACE_CONFIG"):
        return "CUBLAS_WORKSPACE_CONFIG is not set, so runs on the GPU may differ: set it to :4096:8."
    return None


def guild_home() -> str | None:
    """Print Guild's home; a complaint if it cannot be written to."""
    home = os.environ.get("GUILD_HOME")
    print(f"guild home  {home}")
    if not home:
        return "GUILD_HOME is not set."
    try:
        with tempfile.TemporaryFile(dir=home):
            return None
    except OSError as error:
        return f"Guild's home {home} cannot be written to by user {os.getuid()}: {error.strerror}."


def port(number: int) -> str | None:
    """Print TensorBoard's port; a complaint if another program has it."""
    print(f"port        {number}")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", number))
        except OSError as error:
            return f"Port {number} is not available for TensorBoard: {error.strerror}."
    return None


def main() -> None:
    """Print the report; exit with a sentence for each thing that is missing, or measure the training speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="demand a GPU, and measure training on it (minutes)")
    parser.add_argument("--port", type=int, default=6006, help="TensorBoard's port (6006)")
    arguments = parser.parse_args()

    shared = os.statvfs("/dev/shm")
    print(f"user        {os.getuid()}:{os.getgid()}")
    print(f"threads     {torch.get_num_threads()} of {len(os.sched_getaffinity(0))} usable cores")
    print(f"/dev/shm    {shared.f_frsize * shared.f_blocks / 2**30:.1f} GiB")
    complaints = [versions(), gpu(arguments.gpu), guild_home(), port(arguments.port)]
    missing = [complaint for complaint in complaints if complaint]
    if missing:
        print("\n".join(missing), file=sys.stderr)
        sys.exit(2)
    if arguments.gpu:
        sys.stdout.flush()
        sys.exit(subprocess.run([sys.executable, "-m", "benchmarks.gpu_speed"], cwd=PROJECT, check=False).returncode)


if __name__ == "__main__":
    main()
