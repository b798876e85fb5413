#!/usr/bin/env bash
# Baseline, Remix and each modality alone over five seeds, then tables and figures, in one command.
#   bash scripts/run_compare.sh                                                      # the demo
#   bash scripts/run_compare.sh --dataset CREMAD --methods baseline,remix --seeds 0,1,2 --gpu_ids 0
#   bash scripts/run_compare.sh --grid warmup=5,10,20 --grid score=kl,random --jobs 2  # any flag of train.py
#   bash scripts/run_compare.sh --methods baseline,remix --seeds 0,1,2 --grid balance=none,ogm_ge,pmr+mmpareto \
#     --optimizer sgd --learning_rate 0.03                      # balance methods (docs/balance.md), a row each
#   bash scripts/run_compare.sh --help
# The same command resumes after an interruption. On the demo 20 runs, one for each CPU core at a time, under 2 GB of
# memory each; on GPUs one run per visible GPU (with --gpu_ids one at a time). README.md names the command of its own
# table, which has more methods.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
env_paths "$@"
exec "$PYTHON" -m report.compare ${ARGS[@]+"${ARGS[@]}"}
