#!/bin/sh
# What a GPU does, in a few minutes, on a machine without a network.
#
#   benchmarks/gpu.sh KIT [DEVICE]                  the whole story on MNIST and a part of CIFAR-10:
#                                                   protect, evaluate --strict, steal, remove,
#                                                   verify and guard, timed, beside the processor
#   benchmarks/gpu.sh KIT DEVICE colour PART [...]  ResNet-18 on CIFAR-10 (see gpu_colour.py)
#
# KIT is the folder that benchmarks/gpu_kit.py made; DEVICE is cuda unless named. Results go to $OUT
# (default gpu-results). SMALL=1 takes a few images and epochs, to try the script on a processor.
# See kit.sh for what the machine has to have.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
kit=$(cd "$1" && pwd)
device=${2:-cuda}
script=gpu.py
[ "${3:-}" = colour ] && script=gpu_colour.py
[ $# -gt 3 ] && shift 3 || set --
. "$here/benchmarks/kit.sh"
"$python" "$here/benchmarks/$script" "$kit" "$device" "$work" "${OUT:-gpu-results}" "$@"
