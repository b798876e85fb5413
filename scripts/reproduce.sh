#!/usr/bin/env bash
# Reproduce CREMA-D or Kinetics-Sounds from the raw download, unattended, on one GPU (or a CPU): preparation, check,
# baseline and Remix with both presets over three seeds, report and figures. CREMA-D: official and actor-disjoint split.
#   bash scripts/reproduce.sh cremad RAW                              # 24 runs; RAW: see data/README.md
#   bash scripts/reproduce.sh ks RAW --allow_missing                  # 12 runs; some clips are missing everywhere
#   bash scripts/reproduce.sh cremad RAW --estimate                   # only the estimate
#   bash scripts/reproduce.sh cremad RAW --epochs 2 --image_size 32   # other flags go to every run: train.py --help
# Prints an estimate of hours and disk first, measured on this machine. Run the same command again to resume.
# Hours and accuracy on the full datasets: not yet measured. python -m report --share prints a table for an issue.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
env_paths "$@"
case ${2:---} in -*) ;; *) ARGS[1]=$(env_full "$2") ;; esac
exec "$PYTHON" -m report.reproduce ${ARGS[@]+"${ARGS[@]}"}
