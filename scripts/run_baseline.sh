#!/usr/bin/env bash
# The joint baseline Data Remixing is compared with: same network, same losses, both modalities in every batch.
#   bash scripts/run_baseline.sh                                # the demo, data and environment included
#   bash scripts/run_baseline.sh --dataset CREMAD --gpu_ids 0   # any flag of train.py
# The demo reproduces the baseline row of README.md's result table, which gives minutes, hardware and accuracy to
# expect: sized for 2 CPU cores and under 4 GB of memory, faster on a GPU.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
env_paths "$@"
exec "$PYTHON" train.py --train --method baseline ${ARGS[@]+"${ARGS[@]}"}
