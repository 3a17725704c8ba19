"""The folder of a run: files that appear whole or not at all, checkpoints, and how to resume a run."""

import contextlib
import ctypes
import errno
import hashlib
import io
import json
import math
import os
import pickle
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from utils.errors import InputError
from utils.flags import assignment

CHECKPOINT = "checkpoint.pt"
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # in PyTorch's messages


def project_folder() -> Path:
    """The project's folder, which Guild passes to a run because it executes a copy of the scripts."""
    return Path(os.environ.get("PROJECT_DIR") or Path(__file__).resolve().parent.parent)


def called_from() -> Path:
    """The folder that relative paths on the command line refer to; a Guild run has another working directory."""
    return Path(os.environ.get("CMD_DIR") or Path.cwd())


def how_to_resume() -> str:
    """The command that resumes an interrupted run."""
    run = os.environ.get("RUN_ID")
    return f"guild run --restart {run[:8]}" if run else "the same command in the same folder"


def say_where_results_are(files: Sequence[str]) -> None:
    """Name the run's folder, the files in it, and what to do next."""
    run = os.environ.get("RUN_ID")
    models = ["models/"] if Path("models").exists() else []
    say(f"Results: {Path.cwd()} ({', '.join(['metrics.json', *models, *files])})")
    if run:
        say(f"Next: `guild compare` for a table of runs, `guild open {run[:8]}` for its files")


def add_to_label(start: str, end: str, differences: Sequence[str]) -> None:
    """Append flags to the label of a Guild run if they are not at their defaults, which Guild's own templates cannot do.

    A label that the user chose is left as it is.

    Args:
        start: how the label of guild.yml begins.
        end: how it ends.
        differences: `name value` of the flags that are not at their defaults.
    """
    path = Path(os.environ.get("RUN_DIR", "")) / ".guild" / "attrs" / "label"
    if "RUN_ID" not in os.environ or not path.is_file() or not differences:
        return
    label = yaml.safe_load(path.read_text(encoding="utf-8"))
    if label.startswith(start) and label.endswith(end):
        write_text(path, yaml.safe_dump(" ".join([label, *differences]), width=math.inf))


def say(line: str) -> None:
    """Print a line of a run without breaking a progress bar."""
    # Line and newline in one write, because Guild would read two writes as two lines.
    tqdm.write(f"[*] {line}\n", file=sys.stdout, end="")
    sys.stdout.flush()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that computed the results."""
    packages = ("torch", "numpy", "pandas", "scikit-learn", "sktime", "rasterio", "lightning-fabric", "torchmetrics")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block succeeds and removed when it fails.

    Raises:
        InputError: the file cannot be written, for example because the disk is full.
    """
    beside = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.replace(path)
    except OSError as error:
        raise InputError(f"{path} could not be written: {error.strerror or error}; nothing was left half-written") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document whole as JSON; nan and infinity, which JSON lacks, become null."""
    write_text(path, json.dumps(_without_nan(document), indent=2, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tensors(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write tensors whole as safetensors, with a JSON record under `record` in the file's metadata."""
    content = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        metadata={"record": json.dumps(record)},
    )
    with whole_file(path) as beside:
        beside.write_bytes(content)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a file of `write_tensors`.

    Raises:
        InputError: the file is not one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["record"])  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a file of weights that this project wrote: {error}") from error


def digest_of_files(paths: Sequence[Path]) -> str:
    """sha256 of the content of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def write_checkpoint(path: Path, document: Mapping[str, Any]) -> None:
    """Write numbers, text, lists and tensors whole, as a checkpoint from which the run itself resumes."""
    buffer = io.BytesIO()  # in memory first: PyTorch's own writer does not raise an OSError when the disk is full
    torch.save(dict(document), buffer)
    with whole_file(path) as beside:
        beside.write_bytes(buffer.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The document of `write_checkpoint`; nothing else is unpickled.

    Raises:
        InputError: the file is not one of this version of the project.
    """
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
        return {name: document[name] for name in ("identity", *document)}
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path.absolute()} is damaged or of an earlier version of this project; delete it to start over"
        ) from error


def a_new_run() -> str:
    """What a user can start instead of a complete run; Guild gives every run its own folder."""
    return "a new run" if "RUN_ID" in os.environ else "a new run in another folder"


def refuse_other_flags(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue a run with other flags or other data than it started with.

    Raises:
        InputError: something differs.
    """
    for name, value in json.loads(json.dumps(now)).items():
        if before.get(name) != value:
            former = assignment(name, before.get(name))
            # Guild keeps a refused flag, so the run resumes only if it is given the former value again.
            is_flag_of_guild = "RUN_ID" in os.environ and not name.endswith("sha256")
            resume = f"`{how_to_resume()} {former}`" if is_flag_of_guild else "the former value"
            raise InputError(
                f"{path} is of a run with {former}, but {assignment(name, value)} was given; resume with {resume}, "
                f"or start {a_new_run()}"
            )


def finished_before(flags: Mapping[str, Any]) -> bool:
    """Whether the run in this folder is already complete, which is then reported.

    Raises:
        InputError: it is complete, but with other flags.
    """
    path = Path("metrics.json")
    if not path.exists() or Path(CHECKPOINT).exists():
        return False
    refuse_other_flags(path.absolute(), json.loads(path.read_text(encoding="utf-8"))["flags"], flags)
    say(f"This run is complete and its results are kept; start {a_new_run()} to compute them again")
    return True


def run_or_explain(main: Callable[[], None]) -> None:
    """Run a script's main function; invalid input ends in one sentence and exit code 2."""
    threading.excepthook = _silent_about_files
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        main()
    except InputError as error:
        # A data-loading process passes its error on with a traceback, of which the user sees the last line.
        sentence = str(error).strip().splitlines()[-1] if "Original Traceback" in str(error) else str(error)
        _leave(sentence.removeprefix("utils.errors.InputError: "))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _leave(f"the disk is full; free some space, then resume with: {how_to_resume()}")
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        _leave(f"{error.filename or Path.cwd()} cannot be used: {error.strerror}")
    except KeyboardInterrupt:
        _leave_at_once()


def _interrupt(*_: object) -> None:
    # An exception raised during a callback of the garbage collector is lost; then the alarm ends the run.
    signal.signal(signal.SIGALRM, _leave_at_once)
    signal.alarm(1)
    raise KeyboardInterrupt


def _leave_at_once(*_: object) -> NoReturn:
    print(f"\n[*] Interrupted; to resume from the last checkpoint: {how_to_resume()}", file=sys.stderr)
    sys.stderr.flush()
    # Exit without clean-up, for which the user would have to wait: nothing of this process is needed any more.
    os._exit(130)


def _leave(sentence: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    sys.exit(2)


def _silent_about_files(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread; an error there is raised again at the run's next write."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


@contextlib.contextmanager
def explaining_out_of_memory(advice: str) -> Iterator[None]:
    """A block in which running out of memory ends in one sentence with the given advice.

    Raises:
        InputError: the block ran out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        raise InputError(f"out of memory {advice}") from error


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks instead of returning them to the system.

    A training step frees and allocates the same few megabytes again and again; each return to the system costs page faults
    that take longer than the arithmetic on the block.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        mallopt(trim_threshold, 2**30)
        mallopt(mmap_threshold, 2**25)  # the largest value that mmap_threshold accepts


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A block that PyTorch computes on one thread.

    Of several threads on small matrices one waits for the other: for minutes, where other programs share the cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def choose_device(name: str) -> torch.device:
    """The device called auto, cpu, cuda or cuda:N.

    Raises:
        InputError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device={name} is not one of auto, cpu, cuda or cuda:N") from None
    if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()):
        return device
    if device.type != "cuda":
        raise InputError(f"device={name} is not one of auto, cpu, cuda or cuda:N")
    present = torch.cuda.device_count()
    raise InputError(
        f"device={name} was asked for, but {present} CUDA devices are present; DEVICE=cpu or --device cpu runs on the CPU"
    )


def fast_bf16(device: torch.device) -> bool:
    """Whether the device has native bfloat16 arithmetic."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
