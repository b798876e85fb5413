#!/usr/bin/env bash
# Makes the demo data: scikit-learn's handwritten digits as short videos, keypad tones as sound -> data/demo.
#   bash scripts/prepare_demo.sh                 # run_train.sh does this by itself when data/demo is missing
#   bash scripts/prepare_demo.sh --speech DIR    # real recordings {digit}_{speaker}_{take}.wav -> data/demo_speech
# Needs no network, 2 CPU cores, under a minute, about 100 MB of disk.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
env_paths "$@"
exec "$PYTHON" -m dataset.demo ${ARGS[@]+"${ARGS[@]}"}
