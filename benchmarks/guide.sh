#!/usr/bin/env bash
# Every command of docs/guide.md on Gemma-3-270M, with pairs that the study's own stage makes from IMDB.
#
#   benchmarks/guide.sh DIR [PROMPTS]
#
# DIR must lie outside the repository. PROMPTS (default 352) reviews give as many pairs: three quarters of them are
# pairs.jsonl, the others heldout.jsonl and prompts.jsonl. DIR/transcript.txt gets every command, its output and its seconds.
# EXPERIMENT=smoke makes the pairs with tiny models, to try the script itself. Run again, it continues: finished commands are not repeated (delete their output folder to repeat one).
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$repository/.venv/bin/python}
[ $# -ge 1 ] || { echo "usage: benchmarks/guide.sh DIR [PROMPTS]" >&2; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
prompts=${2:-352}
case "$folder/" in "$repository"/*) echo "guide.sh: $folder lies inside the repository; choose another" >&2; exit 2 ;; esac
cd "$folder"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} HF_HUB_OFFLINE=1

"$python" -m madpo.commands.cli run "${EXPERIMENT:-quickstart}" --output_dir study --only 'pairs/*' \
    --set "pairs.prompts=$prompts" "pairs.train=$((prompts * 3 / 4))" evaluation.prompts=1
"$python" - <<'PYTHON'
import json
import shutil
from pathlib import Path

import pandas as pd

model = next(path.parent for path in Path("study").rglob("model/config.json"))
if not Path("model").exists():
    shutil.copytree(model, "model")
pairs = pd.read_parquet(next(Path("study").rglob("pairs.parquet")))
for split, name in (("train", "pairs.jsonl"), ("heldout", "heldout.jsonl")):
    rows = pairs[pairs["split"] == split][["prompt", "chosen", "rejected"]].to_dict("records")
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    if split == "heldout":
        text = "".join(json.dumps({"prompt": row["prompt"]}, ensure_ascii=False) + "\n" for row in rows)
        Path("prompts.jsonl").write_text(text, encoding="utf-8")
PYTHON

touch done.txt
sed -n '/^```console$/,/^```$/p' "$repository/docs/guide.md" | sed -n 's/^\$ madpo //p' | grep -v '^example' | sed 's/gemma-3-270m-imdb/model/' | while IFS= read -r command; do
    if grep -qxF "$command" done.txt; then continue; fi
    began=$SECONDS
    { echo "\$ madpo $command"; bash -c "\"$python\" -m madpo.commands.cli $command" 2>&1 </dev/null; } | tee -a transcript.txt
    echo "# $((SECONDS - began)) s" | tee -a transcript.txt
    echo "$command" >> done.txt
done
