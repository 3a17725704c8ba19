#!/bin/sh
# Build the image: dockerfiles/build.sh [--cpu] [options of docker build]
set -eu
project=$(dirname "$(dirname "$(readlink -f "$0")")")

variant=cuda
if [ "${1:-}" = --cpu ]; then
  variant=cpu
  shift
fi
if ! command -v docker >/dev/null; then
  echo "docker is not installed, see https://docs.docker.com/engine/install/." >&2
  exit 1
fi

exec docker build --file "$project/dockerfiles/Dockerfile" --build-arg "VARIANT=$variant" \
  --tag "resnets:$variant" "$@" "$project"
