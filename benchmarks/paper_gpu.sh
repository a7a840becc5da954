#!/bin/sh
# The paper's study at its own scale on a GPU, on a machine without a network.
#
#   benchmarks/paper_gpu.sh KIT standard [DEVICE]   the paper's network by the fast recipe, MNIST
#                                                   and Fashion-MNIST, three owners: 12 minutes
#   benchmarks/paper_gpu.sh KIT paper [DEVICE]      Table 6 for every model, MNIST, one owner: 15
#
# Both make ADVTR without and with each mark, stolen as black, grey and white box, and strictly
# judged; `standard` asks strangers as well. KIT is what `benchmarks/gpu_kit.py KIT --study` made;
# DEVICE is cuda unless named. MINUTES and WORKERS (processes that share the card) replace the
# defaults. `paper` needs more than 15 minutes: each of its robust models takes some six on an H100.
# The page with its tables, results.json, the log and all units, finished and begun, go to $OUT
# (default gpu-results) as one archive, also where something fails; unpacked into WORK/PROFILE, the
# same command goes on from there.
# SMALL=1 takes digits and a minute, to try the script on a processor. See kit.sh for what the
# machine has to have.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
kit=$(cd "$1" && pwd)
profile=$2
device=${3:-cuda}
. "$here/benchmarks/kit.sh"
out=${OUT:-gpu-results}
mkdir -p "$out"
case $profile in
    standard) seeds=3 minutes=${MINUTES:-12} workers=${WORKERS:-5} data="mnist fashion_mnist" ;;
    paper) seeds=1 minutes=${MINUTES:-15} workers=${WORKERS:-1} data=mnist ;;
    *) echo "$0: the profile is standard or paper, not $profile" >&2; exit 2 ;;
esac
if [ -n "${SMALL:-}" ]; then
    seeds=1 minutes=${MINUTES:-1} data=digits
else
    for name in mnist fashion_mnist; do  # each is the other's source of OOD watermarks
        "$python" -m countermark data fetch "$name" --source "$kit/$name" >/dev/null
    done
fi
set -- '*/ADVTR/*-box/none' '*/ADVTR+*-box/none' '*/ADVTR/*/strict' '*/ADVTR+*/strict'
[ "$profile" = paper ] || set -- "$@" '*/strangers/*'
mkdir -p "$work/$profile"
archive() {
    tar -C "$work/$profile" -czf "$out/$profile.tar.gz" . || :  # what is written meanwhile may miss
    [ -n "${WORK:-}" ] || rm -rf "$work"
}
trap archive EXIT
trap 'exit 143' INT TERM
# shellcheck disable=SC2086  # the data sets are words
"$python" -m countermark reproduce --profile "$profile" --data $data --seeds "$seeds" \
    --device "$device" --workers "$workers" --budget "$minutes" --out "$work/$profile" \
    --only "$@" --page "$work/$profile/page/results.md"
