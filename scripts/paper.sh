#!/usr/bin/env bash
# The experiments of the paper (Ma, Chen, Deng, ICML 2025), one command each: train the missing runs, then write the
# table in the paper's layout, beside the paper's values.
#   bash scripts/paper.sh table1                                  # fusion heads: 40 runs of the demo
#   bash scripts/paper.sh table5 figure3                          # ablations, and why it works
#   bash scripts/paper.sh all --dataset CREMAD --gpu_ids 0      # every table; other flags: train.py --help
# The same command resumes after an interruption. docs/paper.md is this command's output on the demo and says how long
# it took.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
env_paths "$@"
exec "$PYTHON" -m report.paper ${ARGS[@]+"${ARGS[@]}"}
