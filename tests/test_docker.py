"""The Dockerfile and its scripts, without Docker: `dockerfiles/check_with_buildah.sh` builds the image and runs in it."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import PROJECT, environment

DOCKERFILES = PROJECT / "dockerfiles"
RECIPE = (DOCKERFILES / "Dockerfile").read_text()
SCRIPTS = sorted(DOCKERFILES.glob("*.sh"))
OWN = ("GUILD_HOME", "GPUS", "SHM_SIZE", "ADDRESS", "PORT", "CONTAINER_USER", "SUDO_UID", "SUDO_GID")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The scripts at a path with a space and a comma, beside a folder of stubs for docker and id."""
    place = tmp_path / "my clone, moved"
    shutil.copytree(DOCKERFILES, place / "dockerfiles")
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, script in {
        "docker": f'[ "$2" = inspect ] || printf "%s\\n" "$@" >"{tmp_path}/arguments"',
        "id": 'if [ "$1" = -u ]; then echo 4321; else echo 8765; fi',
    }.items():
        (stubs / name).write_text(f"#!/bin/sh\n{script}\n")
        (stubs / name).chmod(0o755)
    return place


def call(clone: Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the clone from elsewhere, with the stubs first on PATH."""
    inherited = {name: value for name, value in environment().items() if name not in OWN}
    path = f"{clone.parent / 'stubs'}:{os.environ['PATH']}"
    return subprocess.run(
        [str(clone / "dockerfiles" / script), *arguments],
        cwd=clone.parent,
        env=inherited | {"PATH": path} | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def docker_arguments(clone: Path) -> list[str]:
    return (clone.parent / "arguments").read_text().splitlines()


def self_check(*arguments: str, guild_home: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {"PATH": path, "GUILD_HOME": str(guild_home), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [str(DOCKERFILES / "self_check.py"), "--port", "0", *arguments],
        env=environment() | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_recipe_is_lint_free() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([hadolint, DOCKERFILES / "Dockerfile"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_image_installs_from_the_makefiles_lock_file() -> None:
    (in_makefile,) = re.findall(r"pip install .* -r requirements\.txt -c (\S+)", (PROJECT / "Makefile").read_text())
    (in_image,) = re.findall(r"-r /opt/requirements\.txt -c /opt/(\S+)", RECIPE)
    assert in_image == in_makefile


def test_check_builds_on_the_recipes_base() -> None:
    (base,) = re.findall(r"^FROM (\S+)$", RECIPE, re.MULTILINE)
    script = (DOCKERFILES / "check_with_buildah.sh").read_text()
    assert re.findall(r"^base=docker\.io/library/(\S+)$", script, re.MULTILINE) == [base]
    (stand_in,) = re.findall(r"debootstrap .* (\w+) \"\$work/debian\"", script)
    assert base.endswith(f"-slim-{stand_in}")


def test_copied_files_exist_and_are_in_the_build_context() -> None:
    context = (PROJECT / ".dockerignore").read_text().splitlines()
    assert "*" in context
    sources = [name for words in re.findall(r"^(?:COPY|ADD) (.+)", RECIPE, re.MULTILINE) for name in words.split()[:-1]]
    assert sources
    for name in sources:
        assert (PROJECT / name).is_file(), name
        assert f"!{name}" in context


def test_cpu_variant_asks_for_the_locked_torch_without_cuda() -> None:
    (command,) = re.findall(r"cpu\) (sed -i '.+') /opt/requirements\.lock", RECIPE)
    lock = (PROJECT / "requirements.lock").read_text()
    (version,) = re.findall(r"^torch==(.+)$", lock, re.MULTILINE)
    edited = subprocess.run(
        ["sh", "-c", command.replace(" -i", "")], input=lock, capture_output=True, text=True, check=True
    ).stdout
    assert f"\ntorch=={version}+cpu\n" in edited
    assert edited.count("+cpu") == 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_are_executable(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    subprocess.run(["sh", "-n", script], check=True)
    assert os.access(script, os.X_OK)


def test_launch_from_any_path(clone: Path) -> None:
    result = call(clone, "launch.sh", "guild", "run", "main", "study_var=a b")
    assert result.returncode == 0, result.stderr
    arguments = docker_arguments(clone)
    options, command = arguments[: arguments.index("resnets:cuda")], arguments[arguments.index("resnets:cuda") + 1 :]
    assert command == ["guild", "run", "main", "study_var=a b"]
    given = list(pairwise(options))
    assert ("--gpus", "all") in given
    assert ("--shm-size", "8g") in given
    assert ("-p", "127.0.0.1:6006:6006") in given
    assert ("--user", "4321:8765") in given
    assert ("--mount", f'type=bind,"source={clone}",target=/workspace') in given
    assert ("--mount", f'type=bind,"source={clone}/.guild",target=/guild') in given
    assert (clone / ".guild").is_dir()
    assert "--tty" not in options


def test_launch_follows_its_environment(clone: Path) -> None:
    variables = {"GUILD_HOME": "my runs", "GPUS": "1", "SHM_SIZE": "1g", "ADDRESS": "0.0.0.0", "PORT": "7007"}
    result = call(clone, "launch.sh", CONTAINER_USER="5:6", **variables)
    assert result.returncode == 0, result.stderr
    arguments = docker_arguments(clone)
    assert arguments[-2:] == ["resnets:cuda", "bash"]
    for value in ("1", "1g", "0.0.0.0:7007:6006", "5:6", f'type=bind,"source={clone.parent}/my runs",target=/guild'):
        assert value in arguments


def test_launch_shows_the_container_folders_outside_the_project(clone: Path) -> None:
    tiles = clone.parent / "my tiles"
    tiles.mkdir()
    result = call(clone, "launch.sh", DATA=str(tiles), CACHE_DIR="a cache")
    assert result.returncode == 0, result.stderr
    given, cache = list(pairwise(docker_arguments(clone))), clone.parent / "a cache"
    assert ("--mount", f'type=bind,"source={tiles}","target={tiles}",readonly') in given
    assert ("--mount", f'type=bind,"source={cache}","target={cache}"') in given and ("--env", f"CACHE_DIR={cache}") in given
    assert "is not a folder" in call(clone, "launch.sh", DATA="absent").stderr


def test_launch_as_root_where_asked_for(clone: Path) -> None:
    result = call(clone, "launch.sh", CONTAINER_USER="0:0")
    assert result.returncode == 0, result.stderr
    assert ("--user", "0:0") in list(pairwise(docker_arguments(clone)))


def test_launch_without_gpu(clone: Path) -> None:
    result = call(clone, "launch.sh", "--cpu")
    assert result.returncode == 0, result.stderr
    assert docker_arguments(clone)[-2:] == ["resnets:cpu", "bash"]
    assert "--gpus" not in docker_arguments(clone)


@pytest.mark.parametrize(("options", "variant"), [([], "cuda"), (["--cpu"], "cpu")])
def test_build_from_any_path(clone: Path, options: list[str], variant: str) -> None:
    result = call(clone, "build.sh", *options, "--no-cache")
    assert result.returncode == 0, result.stderr
    assert docker_arguments(clone) == [
        *("build", "--file", f"{clone}/dockerfiles/Dockerfile", "--build-arg", f"VARIANT={variant}"),
        *("--tag", f"resnets:{variant}", "--no-cache", str(clone)),
    ]


@pytest.mark.parametrize(
    ("stub", "variables", "sentence"),
    [
        ("exit 0", {"CONTAINER_USER": "", "SUDO_UID": "0", "SUDO_GID": "0"}, "Root would own the runs"),
        ("exit 1", {}, "has no image resnets:cuda: try docker info, then dockerfiles/build.sh."),
        (None, {}, "docker is not installed"),
    ],
    ids=["root", "image missing", "docker missing"],
)
def test_launch_says_in_a_sentence_what_is_missing(
    clone: Path, stub: str | None, variables: dict[str, str], sentence: str
) -> None:
    docker = clone.parent / "stubs" / "docker"
    if stub is None:  # a PATH that has the commands of launch.sh, and no docker
        docker.unlink()
        for name in ("dirname", "readlink", "mkdir"):
            (docker.parent / name).symlink_to(shutil.which(name) or name)
        variables = {"PATH": str(docker.parent)}
        (docker.parent / "id").write_text("#!/bin/sh\necho 4321\n")
    else:
        docker.write_text(f"#!/bin/sh\n{stub}\n")
    result = call(clone, "launch.sh", **variables)
    assert result.returncode == 1
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (clone / ".guild").exists()


def test_self_check_finds_what_is_there(tmp_path: Path) -> None:
    result = self_check(guild_home=tmp_path)
    assert result.returncode == 0, result.stderr
    for word in ("python", "torch", "guild", "threads", "gpu", "port"):
        assert re.search(rf"^{word} ", result.stdout, re.MULTILINE), word


def test_self_check_says_what_is_missing(tmp_path: Path) -> None:
    result = self_check("--gpu", guild_home=tmp_path / "absent")
    assert result.returncode == 2
    no_gpu, no_home = result.stderr.splitlines()
    assert "GPU" in no_gpu
    assert f"Guild's home {tmp_path}/absent cannot be written to" in no_home


def test_self_check_without_a_gpu_says_so_in_one_sentence(tmp_path: Path) -> None:
    result = self_check("--gpu", guild_home=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "GPU" in result.stderr
    assert "network-epochs" not in result.stdout


@pytest.fixture
def script() -> ModuleType:
    """The self-check as a module."""
    specification = importlib.util.spec_from_file_location("self_check", DOCKERFILES / "self_check.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_self_check_compares_versions_with_the_lines_of_this_python(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = metadata.version("numpy")
    monkeypatch.setattr(script, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(script.shutil, "which", lambda _: "/usr/bin/guild")
    of_this = f"numpy=={version} ; python_full_version >= '3.11'\n    # via pandas\n"
    (tmp_path / "lock").write_text(f"{of_this}numpy==1.0 ; python_full_version < '3.11'\n    # via pandas\n")
    assert script.versions() is None
    (tmp_path / "lock").write_text("numpy==1.0\npandas==1.0 ; sys_platform == 'win32'\n")
    assert script.versions().startswith("numpy: not the versions of requirements.lock")


@pytest.mark.parametrize("code", [0, 2])
def test_self_check_measures_training_on_a_gpu_that_computes_rightly(
    code: int, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the GPU; what is measured has tests of its own."""
    started: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        started.append(command[1:])
        assert (options["cwd"] / command[2].replace(".", "/")).with_suffix(".py").is_file()
        return subprocess.CompletedProcess(command, code)

    for name in ("versions", "gpu", "guild_home", "port"):
        monkeypatch.setattr(script, name, lambda *_: None)
    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["self_check.py", "--gpu"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == code and started == [["-m", "benchmarks.gpu_speed"]]
