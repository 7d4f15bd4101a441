#!/usr/bin/env bash
# What only a machine with NVIDIA GPUs can show: the benchmarks, trainings through Ray with a profile, the tests marked gpu.
#   scripts/gpu_check.sh [OUT]           figures go to the folder OUT (default: gpu_figures), to be taken into docs/performance.md
#   scripts/gpu_check.sh --quick [OUT]   the same of ResNet-50 alone, on one GPU, in at most 6 minutes ($QUICK_S: in other seconds)
# Ends with 1 if a part failed or had to be stopped; what came after it was run all the same. OUT/summary.txt says it in short.
set -uo pipefail
cd "$(dirname "$0")/.."

refuse() {
    echo "gpu_check: $1" >&2
    exit 2
}

quick=false out=""
for word in "$@"; do
    case $word in
    --quick) quick=true ;;
    -*) refuse "$word: unknown option; give --quick, or none" ;;
    *)
        [ -z "$out" ] || refuse "$word: one folder takes it all; $out is named already"
        out=$word
        ;;
    esac
done
out=$(realpath -m "${out:-gpu_figures}")
num_gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c .) ||
    refuse "no NVIDIA GPU here (nvidia-smi lists none); run it on a machine that has one"
command -v pipeline >/dev/null || source scripts/setup.sh # in an image all is there

SECONDS=0 # bash counts them from here
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv >"$out/cards.csv"
python -m pip freeze | grep -iE '^(torch|torchvision|nvidia-|ray|mlflow|timm)' >"$out/versions.txt"
git rev-parse HEAD >"$out/commit.txt" 2>/dev/null || true

work=$(mktemp -d)
set -m # a part is a process group: all of it can be stopped
part="" failed=0 end=0 quick_s=${QUICK_S:-360}
grace=$((1 + quick_s / 72)) # seconds that a part has for stopping
trap 'rm -rf "$work"' EXIT
trap '[ -z "$part" ] || kill -INT -- "-$part"; exit 130' INT TERM
: >"$work/parts"

cat >"$work/mlflow_run.py" <<'END'
"""What MLflow has of the run in a folder; its profile goes to another one."""
import json
import sys
from pathlib import Path

from mlflow import MlflowClient

summary = json.loads(Path(sys.argv[1], "summary.json").read_text(encoding="utf-8"))
client, run_id = MlflowClient(summary["mlflow_uri"]), summary["mlflow_run_id"]
status = client.get_run(run_id).info.status
files = Path(client.download_artifacts(run_id, "profile", sys.argv[2])).iterdir()
print("run", run_id, "is", status, "and has", *(file.name for file in files))
sys.exit(status != "FINISHED")
END

keep() { # keep NAME SECONDS COMMAND...: its output in OUT/NAME.txt; with --quick it has SECONDS of 360, and what others left
    local name=$1 began=$SECONDS limit=0 code took result=ok
    end=$((end + $2))
    shift 2
    if $quick; then
        limit=$((end * quick_s / 360 - SECONDS - grace))
        [ "$limit" -gt 0 ] || limit=1
    fi
    echo "== $name: $*"
    # To a file, not through a pipe: whatever outlives the part would keep a pipe open.
    timeout --signal=INT --kill-after="$grace" "$limit" "$@" </dev/null >"$out/$name.txt" 2>&1 &
    part=$!
    wait "$part"
    code=$? took=$((SECONDS - began))
    kill -KILL -- "-$part" 2>/dev/null # what is left of it would take the GPU from the next one
    part=""
    if [ "$code" -ne 0 ]; then
        failed=1 result="failed ($code)"
        # 137: killed, as a lack of memory does, too
        if $quick && [ "$took" -ge "$limit" ] && [[ $code =~ ^(124|137)$ ]]; then result=stopped; fi
    fi
    tail -n 20 "$out/$name.txt"
    echo "== $name: $result after $took s"
    printf '%s\t%s\t%s\n' "$name" "$took" "$result" >>"$work/parts"
}

config=configs/imagenet/resnet152.yaml
photos=$work/photos
depths=(50 152) compiles=(default none) decodings=(gpu gpu_without_jpeg_unit cpu) rounds=7
tries=(--try model.compile=none --try model.compile=reduce-overhead --try train.precision=fp16)
if $quick; then # each compilation takes half a minute: none for fp16
    depths=(50) compiles=(default) decodings=(gpu cpu) rounds=5
    tries=(--try model.compile=none --try model.compile=reduce-overhead)
fi
declare -A decoding_by=([gpu]=data.hw_decoder_load=1 [gpu_without_jpeg_unit]=data.hw_decoder_load=0 [cpu]=data.decode_on_gpu=false)

# What model.compile=auto becomes in a long training is asked for by name: auto goes without where compiling fails.
keep photos 15 python scripts/make_photos.py "$photos"
for depth in "${depths[@]}"; do
    data=("model.depth=$depth" "data.train=$photos" "data.val=$photos" cluster.workers=1 train.global_batch=256)
    keep "step_$depth" 115 pipeline bench step "$config" "${data[@]}" model.compile=default "${tries[@]}" \
        --rounds "$rounds" --steps 10 --out "$out/step_$depth"
    for compile in "${compiles[@]}"; do
        for decoding in "${decodings[@]}"; do
            name=train_${depth}_${compile}_$decoding
            keep "$name" 55 pipeline bench train "$config" "${data[@]}" "model.compile=$compile" "${decoding_by[$decoding]}" \
                --rounds "$rounds" --steps 20 --out "$out/$name"
        done
    done
    name=ray_$depth trace=$out/ray_$depth/profile/steps_20_24.json.gz
    keep "$name" 60 pipeline train "$config" "${data[@]}" model.compile=default train.steps=40 'train.profile=[20,24]' \
        train.log_every=10 train.eval_every=1000 "run.name=$name" "run.storage=$work" "mlflow.uri=sqlite:///$work/mlflow.db"
    rm -rf "${out:?}/$name" # or else another check's trace would be taken for this one's
    mkdir -p "$out/$name"
    cp "$work/$name/summary.json" "$out/$name/"
    keep "mlflow_$depth" 8 python "$work/mlflow_run.py" "$work/$name" "$out/$name"
    keep "gaps_$depth" 4 python scripts/trace_gaps.py "$trace"
    python scripts/trace_gaps.py --json "$trace" >"$out/gaps_$depth.json" 2>/dev/null
    $quick || keep "scale_$depth" 0 pipeline bench scale "$config" "${data[@]}" --workers "$(seq -s, 1 "$num_gpus")" --steps 50 \
        --out "$out/scale_$depth"
done

tests=(pytest -m gpu tests/gpu) # last, for they take all the time that is left
if $quick && git rev-parse HEAD >/dev/null 2>&1; then # --within goes by the commit
    tests+=("--within=$(((quick_s - SECONDS) * 2 / 3))")
fi
keep tests 45 "${tests[@]}"

echo
python - "$out" "$work/parts" <<'END' | tee "$out/summary.txt"
import json
import sys
from pathlib import Path

from pipeline.text import columns


def figures(out: Path, part: str) -> str:
    """Of a part that has ended well."""
    kind, *_ = part.split("_")
    if kind == "step":
        rows = json.loads((out / part / "step.json").read_text())["rows"]
        rows = {"compiled": rows.pop("as configured"), **rows}
        return "images/s: " + ", ".join(f"{name} {row['images_per_s']:,.0f}" for name, row in rows.items())
    if kind == "train":
        result = json.loads((out / part / "train.json").read_text())
        row = result["rows"]["pipeline"]
        return f"{row['images_per_s']:,.0f} images/s, {row['ratio']:.3f} of the bare step; bound: {result['bound']}"
    if kind == "ray":
        summary = json.loads((out / part / "summary.json").read_text())
        return f"{summary['step']} steps in {summary['precision']}, top-1 {summary['top1']:.4f}"
    if kind == "gaps":
        gaps = json.loads((out / f"{part}.json").read_text())
        gpu, host = gaps["gpu"], gaps["host"]
        return (
            f"GPU busy {gpu['busy_share']:.1%}, gaps {gpu['gap_ms_per_step']:.2f} of {gpu['ms_per_step']:.2f} ms a step; "
            f"host launches nothing for {host['gap_ms_per_step']:.2f} ms"
        )
    return last_line(out, part)


def last_line(out: Path, part: str) -> str:
    lines = [line for line in (out / f"{part}.txt").read_text(errors="replace").split("\n") if line.strip()]
    if part == "tests":  # a process that ends may say something after pytest
        lines = [line for line in lines if line.startswith("==")] or lines
    return lines[-1].strip(" =")[:160] if lines else ""


out, parts = map(Path, sys.argv[1:])
rows = [("part", "seconds", "", "")]
for name, seconds, result in (line.split("\t") for line in parts.read_text().splitlines()):
    rows.append((name, seconds, result, figures(out, name) if result == "ok" else last_line(out, name)))
print("\n".join(columns(rows, "<>")))
END
echo "figures in $out, after $SECONDS s"
exit "$failed"
