#!/bin/sh
# What a GPU does, in a few minutes, on a machine without a network.
#
#   benchmarks/gpu.sh KIT [DEVICE]                  the whole story on MNIST and a part of CIFAR-10:
#                                                   protect, evaluate --strict, steal, remove,
#                                                   verify and guard, timed, beside the processor
#   benchmarks/gpu.sh KIT DEVICE colour PART [...]  ResNet-18 on CIFAR-10 (see gpu_colour.py)
#
# KIT is the folder that benchmarks/gpu_kit.py made; DEVICE is cuda unless named. The machine has
# Python and PyTorch. Results go to $OUT (default gpu-results). SMALL=1 takes a few images and
# epochs, to try the script on a processor. WORK is a folder to keep data and models in; without
# it they go into a temporary one.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
kit=$(cd "$1" && pwd)
device=${2:-cuda}
script=gpu.py
[ "${3:-}" = colour ] && script=gpu_colour.py
[ $# -gt 3 ] && shift 3 || set --
python=${PYTHON:-python3}
if [ -n "${WORK:-}" ]; then
    mkdir -p "$WORK"
    work=$WORK
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
[ -d "$work/site" ] || "$python" -m pip install --quiet --no-index --no-deps --no-compile \
    --target "$work/site" "$kit"/wheels/*.whl
export PYTHONPYCACHEPREFIX="$work/compiled"  # else every step compiles thousands of modules
export COUNTERMARK_CACHE="$work/cache"
export PYTHONPATH="$here/src:$work/site"
"$python" "$here/benchmarks/$script" "$kit" "$device" "$work" "${OUT:-gpu-results}" "$@"
