#!/usr/bin/env bash
# Compare baseline, Remix and unimodal training over five seeds, and write tables and figures.
#   bash scripts/run_compare.sh                                                      # the demo
#   bash scripts/run_compare.sh --dataset CREMAD --methods baseline,remix --seeds 0,1,2 --gpu_ids 0
#   bash scripts/run_compare.sh --grid warmup=5,10,20 --grid score=kl,random --jobs 2  # any flag of train.py
#   bash scripts/run_compare.sh --methods baseline,remix --seeds 0,1,2 --grid balance=none,ogm_ge,pmr+mmpareto \
#     --optimizer sgd --learning_rate 0.03                      # balance methods (docs/balance.md), one row each
#   bash scripts/run_compare.sh --help
# Run the same command again to resume after an interruption. The demo needs 20 runs, under 2 GB of memory each. One run
# per CPU core is active at a time, on GPUs one per visible GPU (with --gpu_ids only one). docs/demo.md has the command
# of README.md's table (40 epochs).
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
env_paths "$@"
exec "$PYTHON" -m report.compare ${ARGS[@]+"${ARGS[@]}"}
