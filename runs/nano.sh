#!/usr/bin/env bash
# From photographs to the bundled tokenizer: training pictures, stage 1A, stage 1B, the file, its figures.
#
#   runs/nano.sh OUT HELD_OUT PICTURES [PICTURES ...]
#
# OUT        folder for everything that is made; the same command goes on where it was
# HELD_OUT   folder of photographs that choose the checkpoint of stage 1B, and train nothing
# PICTURES   folders of photographs; 224 pixels or more on the short side are best
#
# PROCESSES  how many train together (2); one core or one GPU each
# DEVICE     cpu or cuda (cpu); with cuda, stage 1A is configs/nano_gpu.yaml: 50 times the images, LPIPS on VGG
# IMAGES, POSTTRAIN_IMAGES  length of the stages (112 000, with cuda 6 million; and 2 000)
# WITHOUT    folders, separated by spaces, whose photographs must not be trained on
# SETTINGS   section.name=value settings of both stages, separated by spaces; for a smaller trial of the whole
#
# It needs `python`, `torchrun` and `flowmo` on the path, such as those of an activated .venv.
# FLOWMO_WEIGHTS must name the folder of LPIPS' and the ResNet-50's weights, unless they can be downloaded.
set -euo pipefail
out=$1 held_out=$2
shift 2
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
here=$(cd "$(dirname "$0")/.." && pwd)

stage() { # NAME CONFIG ...
    local name=$1 config=$2
    shift 2
    # shellcheck disable=SC2086  # several settings
    torchrun --nproc-per-node="${PROCESSES:-2}" -m flowmo.train --config "$here/configs/$config.yaml" \
        --experiment-name "$name" --results-dir "$out/results" --device "${DEVICE:-cpu}" \
        data.train="$out/pictures" data.val="$held_out" "$@" ${SETTINGS:-}
}
ended() { [ -f "$out/results/$1/ended" ] || { echo "$1 was stopped. Run the same command again to resume." >&2; exit 1; }; }
newest() { find "$out/results/$1/checkpoints" -name '*.pth' | sort | tail -n 1; }

if [ ! -f "$out/pictures.txt" ]; then
    mkdir -p "$out"
    rm -rf "$out/pictures" # of an interrupted call
    # shellcheck disable=SC2086  # several folders
    python "$here/runs/nano_pictures.py" "$out/pictures" "$@" --without "$held_out" ${WITHOUT:-} > "$out/pictures.partial"
    mv "$out/pictures.partial" "$out/pictures.txt"
fi
if [ "${DEVICE:-cpu}" = cuda ]; then recipe=nano_gpu images=6000000; else recipe=nano images=112000; fi
if command -v c++ > /dev/null; then compile=true; else compile=false; fi
stage nano "$recipe" trainer.duration="${IMAGES:-$images} images" trainer.compile=$compile
ended nano
stage nano_posttrain nano_posttrain --resume-from-ckpt "$(newest nano)" \
    trainer.duration="$((${IMAGES:-$images} + ${POSTTRAIN_IMAGES:-2000})) images"
ended nano_posttrain
flowmo convert "$out/results/nano_posttrain" "$out/nano.safetensors" --dtype float16 --force
flowmo evaluate "$held_out" --model "$out/nano.safetensors" --limit 500
