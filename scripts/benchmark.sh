#!/usr/bin/env bash
# Every balance method alone and with Remix; the rate of each is chosen on validation (docs/protocol.md).
# docs/benchmark.md was made with
#   bash scripts/benchmark.sh views3 --sources DIR --doc docs/benchmark.md --readme docs/balance.md
#   bash scripts/benchmark.sh --sources DIR                     # GRID digits, multi-view digits and the demo
#   bash scripts/benchmark.sh views3 --sources DIR
# DIR is the parent of grid_s1, mosi, multiview_digits and spoken_digits (docs/protocol.md). Run the same command again
# to resume after an interruption.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
env_paths "$@"
exec "$PYTHON" -m report.study benchmark ${ARGS[@]+"${ARGS[@]}"}
