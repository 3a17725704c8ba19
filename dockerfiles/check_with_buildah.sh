#!/bin/sh
# Build the CPU image without a Docker engine and try it: a run, guild compare, the self-check, completion.
#
# Needs root, buildah and some 10 GB of disk. Arguments are passed to `buildah bud`. For example, if torch's index
# cannot be reached but a folder has the wheel:
#   --build-arg TORCH_INDEX= --volume /my/wheels:/my/wheels:ro --volume /my/pip.conf:/etc/pip.conf:ro
# Environment, all optional:
#   STAND_IN=1   make the base image from Debian's packages with debootstrap, if Docker Hub cannot be reached
#   WORK=folder  keep images, runs and everything else there (a temporary folder, removed at the end)
set -eu
project=$(dirname "$(dirname "$(readlink -f "$0")")")
base=docker.io/library/python:3.13-slim-trixie
image=localhost/resnets:cpu

for tool in buildah ${STAND_IN:+debootstrap}; do
  if ! command -v "$tool" >/dev/null; then
    echo "$tool is not installed: on Debian, apt-get install $tool." >&2
    exit 1
  fi
done

if [ -n "${WORK:-}" ]; then
  mkdir -p "$WORK"
  work=$(readlink -f "$WORK")
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  trap 'exit 1' INT TERM
fi
# A separate store: the stand-in must not be taken for the real base image elsewhere. vfs and chroot work in a container.
export STORAGE_DRIVER="${STORAGE_DRIVER:-vfs}" BUILDAH_ISOLATION="${BUILDAH_ISOLATION:-chroot}"
buildah() {
  command buildah --root "$work/storage" --runroot "$work/run" "$@"
}

if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
  if [ -n "${STAND_IN:-}" ]; then
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates trixie "$work/debian" >"$work/debootstrap.log"
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$work/debian" /
    buildah commit --quiet --rm "$container" "$base"
    rm -rf "$work/debian"
  else
    buildah pull --quiet "$base"
  fi
fi

buildah bud --pull-never --file "$project/dockerfiles/Dockerfile" --build-arg VARIANT=cpu --tag "$image" "$@" "$project"
buildah images

# As in launch.sh: any user, the project and Guild's home mounted; here the project is mounted read-only.
mkdir -p "$work/guild"
chown 4321:4321 "$work/guild"
container=$(buildah from --pull-never "$image")
inside() {
  echo "+ $*"
  buildah run --user 4321:4321 --volume "$project:/workspace:ro" --volume "$work/guild:/guild" "$container" -- "$@"
}
inside dockerfiles/self_check.py
inside guild run main dataset=demo epochs=20 warmup_epochs=5 --yes
inside guild compare -t
inside bash -ic 'complete -p guild'
if inside dockerfiles/self_check.py --gpu; then
  echo "The self-check found a GPU in the CPU image." >&2
  exit 1
fi
buildah rm "$container" >/dev/null
