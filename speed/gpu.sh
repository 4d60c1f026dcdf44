#!/bin/bash
# Measures what this folder measures on a CUDA machine, in under 20 minutes, with random weights and images made here.
#
#   speed/gpu.sh [--out FOLDER] [--wheels FOLDER] [--parts "methods evaluate"] [--rehearse]
#
# Tables (TSV, with the hardware's name in their column `hardware`) go to FOLDER (default: gpu_tables), a log of each
# part to FOLDER/logs. A part that is done is not done again: after an interruption give the command once more. A part
# that fails or takes longer than its limit is named at the end, and what it has written until then stays.
# Of the parts, "step" is the longest; they come in the order of what is worth most.
#
# The machine needs torch, torchvision, timm, accelerate, safetensors, pandas, nothing from the net. What else is wanted
# comes as wheels in a folder, which is filled elsewhere (with the Python version of that machine) by
#
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 -d wheels \
#       open_clip_torch ftfy regex wcwidth simplejpeg
#
# They are installed into FOLDER/packages, which nothing else sees. --rehearse does everything small on the CPU.
# Not here, because no GPU takes part: index.py, kill_often.py, main_job.py.
set -u
here=$(cd "$(dirname "$0")" && pwd)
out=gpu_tables wheels= rehearse= wanted="methods large step loss evaluate decode metrics"
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$2; shift 2;;
    --wheels) wheels=$2; shift 2;;
    --parts) wanted=$2; shift 2;;
    --rehearse) rehearse=1; shift;;
    *) sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p}' "$0"; exit 2;;
  esac
done
python=${PYTHON:-python3}
mkdir -p "$out/logs" "$out/done" && out=$(cd "$out" && pwd) || exit 2
export PYTHONPATH="$(dirname "$here"):$out/packages" TORCHINDUCTOR_CACHE_DIR="$out/compiled"

if [ -n "$wheels" ] && [ ! -d "$out/packages" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --find-links "$wheels" --target "$out/packages.part" \
    "$wheels"/*.whl && mv "$out/packages.part" "$out/packages" || exit 2
fi
missing=$("$python" -c "import carot.train, open_clip, simplejpeg" 2>&1) || {
  echo "gpu.sh: ${missing##*$'\n'}; bring it as a wheel (--wheels)" >&2; exit 2; }

if [ -n "$rehearse" ]; then
  device=cpu model=glyphs batch=8 rounds=1 few=8 images=32 workers=0 half=fp32 compile= steps=8 limit=60
  measured="--images 200 --classes 10 --samples 5 --rounds 1" decoded="--images 2 --rounds 1"
else
  memory=$("$python" -c "import torch; print(torch.cuda.get_device_properties(0).total_memory // 10**9)") || exit 2
  batch=512; [ "$memory" -lt 120 ] && batch=256
  device=cuda model=ViT-B-16 rounds=8 few=64 images=8192 workers=$(($(nproc) < 16 ? $(nproc) : 16)) half=bf16
  compile=--compile steps=200 limit= measured="--rounds 2 --samples 200" decoded="--rounds 3"
fi

failed=
part() {  # name, limit in seconds, script and its words
  local name=$1 seconds=${limit:-$2}; shift 2
  case " $wanted " in *" $name "*) ;; *) return;; esac
  [ -e "$out/done/$name" ] && { echo "$name: done before"; return; }
  echo "$name: at most $seconds s"
  if timeout -k 10 "$seconds" "$python" "$here/$@" >"$out/logs/$name" 2>&1; then touch "$out/done/$name"
  else failed="$failed $name"; echo "$name: not done ($?); see $out/logs/$name" >&2; fi
}
part methods 240 methods.py --model $model --batch-sizes $batch --device $device --rounds $rounds \
  --workers $workers --out "$out/methods.tsv"
part large 200 large_batches.py --model $model --batch-size $((rehearse ? 32 : 512)) --device $device \
  --rounds $((rounds / 2 + 1)) --seconds 120 --out "$out/large_batches.tsv"
part step 300 train_step.py --model $model --batch-size $batch --device $device --rounds $rounds --seconds 60 \
  --workers $workers $compile --out "$out/train_step.tsv"
part loss 150 train_step.py --model $model --batch-size $few --device $device --workers $workers --check-loss $compile \
  --steps $steps --lr 1e-5 --loss-out "$out/train_step_loss.tsv"
part evaluate 120 evaluate.py --model $model --images $images --jpegs $((images / 4)) --batch-size $((few * 8)) \
  --device $device --precision $half --workers $workers --out "$out/evaluate.tsv"
part decode 60 decode.py $decoded --out "$out/decode.tsv"
part metrics 100 metrics.py $measured --out "$out/metrics.tsv"

"$python" - "$out" <<'P'
"Each table gets the hardware's name as a column, if it has none."
import csv, sys
from pathlib import Path
import torch, torchvision
from carot.engine.devices import hardware
name = f"{hardware()}; torch {torch.__version__}, torchvision {torchvision.__version__}"
for file in sorted(Path(sys.argv[1]).glob("*.tsv")):
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    rows = list(csv.reader(lines, delimiter="\t"))
    if not rows or "hardware" in rows[0]: continue
    rows = [rows[0] + ["hardware"], *(row + [name] for row in rows[1:])]
    with open(file, "w", newline="") as table: csv.writer(table, delimiter="\t", lineterminator="\n").writerows(rows)
P
[ -z "$failed" ] && { echo "all of it in $out"; exit 0; }
echo "gpu.sh: not done:$failed; give the command again for these" >&2
exit 1
