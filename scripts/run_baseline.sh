#!/usr/bin/env bash
# Train the joint baseline: the same network and losses as Remix, with all modalities in every batch.
#   bash scripts/run_baseline.sh                                # on the demo; creates data and environment
#   bash scripts/run_baseline.sh --dataset CREMAD --gpu_ids 0   # any flag of train.py
# The demo (60 epochs, seed 42) needs 2 CPU cores and less than 4 GB of memory. README.md, "Quick start", has its
# accuracy and hardware. docs/demo.md has results over five seeds.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
env_paths "$@"
exec "$PYTHON" train.py --train --method baseline ${ARGS[@]+"${ARGS[@]}"}
