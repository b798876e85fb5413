#!/usr/bin/env bash
# Where Remix helps and where it does not, on real data, by docs/protocol.md. docs/results.md was made with
#   bash scripts/evidence.sh grid_digits_m10 grid_digits_clean grid_digits_0 grid_digits_p10 mosi views3 views6 \
#       --doc docs/results.md --readme README.md
#   bash scripts/evidence.sh --sources DIR                     # all datasets of the protocol
#   bash scripts/evidence.sh grid_digits_m10 mosi --sources DIR
# DIR is the parent of grid_s1, mosi, multiview_digits and spoken_digits (docs/protocol.md). Run the same command again
# to resume after an interruption.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
env_paths "$@"
exec "$PYTHON" -m report.study evidence ${ARGS[@]+"${ARGS[@]}"}
