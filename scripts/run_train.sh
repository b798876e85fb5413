#!/usr/bin/env bash
# Data Remixing (Ma, Chen, Deng, ICML 2025): warm-up, then homogeneous batches of the harder modality.
#   bash scripts/run_train.sh                                   # the demo, data and environment included
#   bash scripts/run_train.sh --dataset CREMAD --gpu_ids 0      # any flag of train.py
# The demo reproduces the Remix row of README.md's result table, which gives minutes, hardware and accuracy to expect:
# sized for 2 CPU cores and under 4 GB of memory, faster on a GPU.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
env_paths "$@"
exec "$PYTHON" train.py --train ${ARGS[@]+"${ARGS[@]}"}
