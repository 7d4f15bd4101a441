#!/usr/bin/env bash
# What only a machine with NVIDIA GPUs can show: the tests marked gpu, then the benchmarks.
#   scripts/gpu_check.sh [OUT]       figures go to the folder OUT (default: gpu_figures), to be taken into docs/performance.md
# Ends with 1 if a test or a benchmark failed; what came after it was run all the same.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-gpu_figures}")

if ! num_gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c .); then
    echo "gpu_check: no NVIDIA GPU here (nvidia-smi lists none); run it on a machine that has one" >&2
    exit 2
fi
command -v pipeline >/dev/null || source scripts/setup.sh # in an image all is there
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv >"$out/cards.csv"
python -m pip freeze | grep -iE '^(torch|torchvision|nvidia-|ray|mlflow|timm)' >"$out/versions.txt"
git rev-parse HEAD >"$out/commit.txt" 2>/dev/null || true

failed=0
keep() { # keep NAME COMMAND...: its output in NAME.txt, too
    local name=$1
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$out/$name.txt" || failed=1
}

keep tests pytest -m gpu

photos=$(mktemp -d)
trap 'rm -rf "$photos"' EXIT
python scripts/make_photos.py "$photos"
for depth in 50 152; do
    config=configs/imagenet/resnet152.yaml
    data=("model.depth=$depth" "data.train=$photos" "data.val=$photos" cluster.workers=1 train.global_batch=256)
    keep "step_$depth" pipeline bench step "$config" "${data[@]}" --steps 20 --out "$out/step_$depth" \
        --try model.compile=default --try model.compile=reduce-overhead --try train.precision=fp16
    for decoding in data.hw_decoder_load=0.65 data.hw_decoder_load=0 data.hw_decoder_load=0.9 data.decode_on_gpu=false; do
        name="train_${depth}_${decoding//[=.]/_}"
        keep "$name" pipeline bench train "$config" "${data[@]}" "$decoding" --steps 20 --out "$out/$name"
    done
    keep "scale_$depth" pipeline bench scale "$config" "${data[@]}" --workers "$(seq -s, 1 "$num_gpus")" --steps 50 \
        --out "$out/scale_$depth"
done
echo "figures in $out"
exit "$failed"
