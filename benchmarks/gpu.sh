#!/bin/sh
# The whole story on a GPU, in a few minutes, on a machine without a network: protect, evaluate
# --strict, steal, remove, verify and guard on MNIST and CIFAR-10, timed, and held to the processor.
#
#   benchmarks/gpu.sh KIT [DEVICE]
#
# KIT is the folder that benchmarks/gpu_kit.py made; DEVICE is cuda unless named. The machine has
# Python and PyTorch. Results go to $OUT (default gpu-results): gpu.md, gpu.json, a log of each step.
# SMALL=1 takes a few images and epochs, to try the script on a processor.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
kit=$(cd "$1" && pwd)
device=${2:-cuda}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" "$kit"/wheels/*.whl
export PYTHONPYCACHEPREFIX="$work/compiled"  # else every step compiles thousands of modules
PYTHONPATH="$here/src:$work/site" "$python" "$here/benchmarks/gpu.py" "$kit" "$device" "$work" "${OUT:-gpu-results}"
