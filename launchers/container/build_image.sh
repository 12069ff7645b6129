#!/bin/bash
# Makes an enroot image with Megatron-Post's packages from an image with a CUDA build of PyTorch and its headers:
#   launchers/container/build_image.sh IMAGE OUTPUT.sqsh
# Run it in the clone of the repository, on a node with a GPU. Both paths must be on a file system that all nodes
# see. The image finds the code in the clone, so a change of the code needs no new image.
set -euo pipefail
if [[ $# != 2 || $2 != *.sqsh ]]; then
    sed -n '2,3s/^# //p' "$0" >&2
    exit 2
fi
image=$1 output=$(realpath "$2") clone=$PWD name=megatron-post-build-$$
if [[ ! -f $clone/setup.py ]]; then
    echo "$clone has no setup.py: run this in the clone of the repository" >&2
    exit 2
fi
base=$(mktemp --suffix=.sqsh --dry-run --tmpdir="$(dirname "$output")")
trap 'rm -f "$base"; enroot remove --force "$name" 2>/dev/null || true' EXIT

enroot import --output "$base" "docker://$image"
enroot create --name "$name" "$base"
# What the image has of torch, Transformer Engine and the like stays. Transformer Engine is built for the torch of the
# image if it is missing: pip would take another torch in an isolated build
enroot start --rw --mount "$clone:$clone" "$name" bash -c "cd '$clone' && export PIP_CONSTRAINT= && \
python3 launchers/container/pins.py constraints.txt >/tmp/pins.txt && \
pip install -e . --constraint /tmp/pins.txt && \
pip install --no-build-isolation -e '.[cuda]' --constraint /tmp/pins.txt && \
python3 launchers/container/check_versions.py torch megatron-core transformer-engine NCCL"
enroot export --output "$output" "$name"
echo "image written to $output: name it under container.image in the cluster's file (configs/clusters/h100.yaml)"
