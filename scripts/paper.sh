#!/usr/bin/env bash
# Experiments of the paper (Ma, Chen, Deng, ICML 2025), one command per table or figure. Trains missing runs, then
# writes the table in the paper's layout, next to the published values.
#   bash scripts/paper.sh table1                                  # fusion heads: 40 runs of the demo (8 rows, 5 seeds)
#   bash scripts/paper.sh table5 figure3                          # ablations and analysis
#   bash scripts/paper.sh all --dataset CREMAD --gpu_ids 0        # all tables; other flags: train.py --help
# Run the same command again to resume after an interruption. docs/paper.md is the output of
#   bash scripts/paper.sh all --doc docs/paper.md             # 139 runs, 3.3 hours of training in all, two at a time
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
env_paths "$@"
exec "$PYTHON" -m report.paper ${ARGS[@]+"${ARGS[@]}"}
