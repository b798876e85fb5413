#!/usr/bin/env bash
# Generate the demo dataset in data/demo: short videos of scikit-learn's handwritten digits, with keypad tones as audio.
#   bash scripts/prepare_demo.sh                 # run_train.sh does this automatically if data/demo is missing
#   bash scripts/prepare_demo.sh --speech DIR    # real recordings {digit}_{speaker}_{take}.wav -> data/demo_speech
# Needs no network. Took 40 s on 2 Xeon cores with other jobs (one run), and 92 MB of disk.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
env_paths "$@"
exec "$PYTHON" -m dataset.demo ${ARGS[@]+"${ARGS[@]}"}
