#!/usr/bin/env bash
# Train with Data Remixing (Ma, Chen, Deng, ICML 2025): warm-up, then homogeneous batches of the hardest modality.
#   bash scripts/run_train.sh                                   # on the demo; creates data and environment
#   bash scripts/run_train.sh --dataset CREMAD --gpu_ids 0      # any flag of train.py
# The demo (60 epochs, seed 42) needs 2 CPU cores and less than 4 GB of memory. README.md, "Quick start", has its
# output, time and hardware. docs/demo.md has results over five seeds.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
env_paths "$@"
exec "$PYTHON" train.py --train ${ARGS[@]+"${ARGS[@]}"}
