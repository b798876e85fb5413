#!/usr/bin/env bash
# Prepare Kinetics-Sounds from its raw download: bash scripts/prepare_ks.sh RAW [OUT] [flags]
#
# RAW   the 10-second clips as <clip>.mp4, in one folder or in subfolders, or the output of OGM-GE's scripts
# OUT   the training folder to create (default: data/KineticSound); flags: --split_dir DIR, --workers N, ...
# It can be interrupted at any time; run the same command again to resume. data/README.md: download, duration.
DATASET=KineticSound
source "$(dirname "$0")/_prepare_raw.sh"
