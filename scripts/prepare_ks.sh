#!/usr/bin/env bash
# Kinetics-Sounds from its raw download to a training folder: bash scripts/prepare_ks.sh RAW [OUT] [flags]
#
# RAW   the 10-second clips as <clip>.mp4, in one folder or in subfolders, or what OGM-GE's scripts left
# OUT   the training folder to make (default data/KineticSound); flags: --split_dir DIR, --workers N, ...
# Interrupt it whenever you like and start it again. data/README.md says where to get RAW and how long it takes.
DATASET=KineticSound
source "$(dirname "$0")/_prepare_raw.sh"
