#!/usr/bin/env bash
# A table as that of docs/performance.md, at a GPU's sizes. Not run yet: no figure of it is quoted anywhere.
#
#   benchmarks/gpu.sh OUT        OUT: a folder for the JSON files
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
out=${1:?usage: benchmarks/gpu.sh OUT}
mkdir -p "$out"
python=${PYTHON:-../.venv/bin/python}
"$python" -c "import torch; assert torch.cuda.is_available(), 'no GPU here: use make bench'; print(torch.cuda.get_device_name())"
# The paper's shape, a batch that fills the card, long prompts.
"$python" train_step.py --batch 16 --prompt 20 --completion 176 --repeats 20 --weight-repeats 40 --default --json "$out/gemma.json"
"$python" train_step.py --batch 64 --prompt 20 --completion 176 --repeats 20 --json "$out/gemma-64.json"
"$python" train_step.py --model smollm2-135m-instruct --batch 16 --prompt 384 --completion 64 --repeats 20 --json "$out/long.json"
"$python" reward_step.py --batch 16 --prompt 384 --completion 64 --repeats 20 --json "$out/reward_long.json"
"$python" generation.py --prompts 512 --batches 32 128 512 --json "$out/generation.json"
