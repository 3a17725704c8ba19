#!/bin/sh
# Start a shell, or a command, in the image: dockerfiles/launch.sh [--cpu] [command...]
#
# Environment, all optional:
#   GUILD_HOME      folder of the host that keeps the runs (.guild of the project)
#   GPUS            which GPUs, as in docker's --gpus (all)
#   SHM_SIZE        shared memory (8g)
#   ADDRESS, PORT   where TensorBoard's port 6006 appears on the host (127.0.0.1, 6006)
#   CONTAINER_USER  UID:GID that the container runs as (that of the caller)
#   DEVICE          device of a run, as in main.py
#   DATA            folder of tiles or tables outside the project; the container reads it under the same path
#   CACHE_DIR       folder of canopy's cache (data/canopy_cache of the project)
set -eu
project=$(dirname "$(dirname "$(readlink -f "$0")")")

die() {
  echo "$1" >&2
  exit 1
}

variant=cuda
if [ "${1:-}" = --cpu ]; then
  variant=cpu
  shift
fi
image=resnets:$variant

# Files that the container writes belong to the caller, and never to root unless requested.
user=${CONTAINER_USER:-${SUDO_UID:-$(id -u)}:${SUDO_GID:-$(id -g)}}
if [ -z "${CONTAINER_USER:-}" ] && [ "${user%%:*}" = 0 ]; then
  die "Root would own the runs: launch as a user of the group docker, or set CONTAINER_USER=UID:GID (0:0 with rootless Docker)."
fi
case $project${GUILD_HOME:-}${DATA:-}${CACHE_DIR:-} in
  *\"*) die "Docker mounts no folder with a double quote in its path: rename it." ;;
esac
command -v docker >/dev/null || die "docker is not installed, see https://docs.docker.com/engine/install/."
docker image inspect "$image" >/dev/null 2>&1 \
  || die "Docker does not answer or has no image $image: try docker info, then dockerfiles/build.sh$([ $variant = cuda ] || echo " --cpu")."

# Docker would create a missing folder as root, and Guild starts only if its home exists.
guild_home=${GUILD_HOME:-$project/.guild}
mkdir -p "$guild_home"
guild_home=$(readlink -f "$guild_home")

[ $# -gt 0 ] || set -- bash
set -- "$image" "$@"
if [ $variant = cuda ]; then set -- --gpus "${GPUS:-all}" "$@"; fi
if [ -n "${DATA:-}" ]; then
  [ -d "$DATA" ] || die "DATA=$DATA is not a folder."
  folder=$(cd "$DATA" && pwd)
  set -- --mount "type=bind,\"source=$folder\",\"target=$folder\",readonly" "$@"
fi
if [ -n "${CACHE_DIR:-}" ]; then
  mkdir -p "$CACHE_DIR"
  folder=$(cd "$CACHE_DIR" && pwd)
  set -- --mount "type=bind,\"source=$folder\",\"target=$folder\"" --env "CACHE_DIR=$folder" "$@"
fi
if [ -t 0 ] && [ -t 1 ]; then set -- --interactive --tty "$@"; fi

# The inner quotes keep a comma in a path from ending it.
exec docker run --rm --init --pull never \
  --user "$user" \
  --shm-size "${SHM_SIZE:-8g}" \
  -p "${ADDRESS:-127.0.0.1}:${PORT:-6006}:6006" \
  --mount "type=bind,\"source=$project\",target=/workspace" \
  --mount "type=bind,\"source=$guild_home\",target=/guild" \
  --env DEVICE \
  "$@"
