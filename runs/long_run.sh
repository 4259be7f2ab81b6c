#!/usr/bin/env bash
# Trains the native preset for days beside other work: one process, one thread, the lowest priority.
#
#   runs/long_run.sh OUT HELD_OUT IMAGES      # start, or resume where it was; Ctrl-C or `touch OUT/results/native/stop` saves
#
# OUT        folder of everything that is made, outside the checkout: code/ (a copy, so that the run survives changes
#            to the checkout), results/native/ (checkpoints, metrics.jsonl, sample grids), log.txt
# HELD_OUT   folder of photographs for the sample grids
# IMAGES     folder of training images, from runs/native_images.py
#
# UPDATE=1   takes the checkout's code anew; checkpoints still load, and a changed recipe applies from there on
#
# FLOWMO_WEIGHTS must name the folder of LPIPS' weights, unless they can be downloaded. Cost: about 8 images per second
# on one core with bfloat16 matrix units, 1.4 million images in 50 hours.
set -euo pipefail
out=$1 held_out=$2 images=$3
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
mkdir -p "$out"
exec 9>"$out/lock"
flock -n 9 || { echo "$out: another run is writing there. End it, or use another folder." >&2 && exit 1; }
if [ ! -d "$out/code" ] || [ -n "${UPDATE:-}" ]; then
    rm -rf "$out/code.partial"
    mkdir "$out/code.partial"
    cp -r "$here/src" "$here/configs" "$out/code.partial/"
    rm -rf "$out/code"
    mv "$out/code.partial" "$out/code"
fi
export PYTHONPATH="$out/code/src" OMP_NUM_THREADS=1
nice -n 19 "$python" -m flowmo.train --config "$out/code/configs/native.yaml" --experiment-name native \
    --results-dir "$out/results" data.train="$images" data.val="$held_out" 2>&1 | tee -ia "$out/log.txt"  # Ctrl-C ends the training, not its log
