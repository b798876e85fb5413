#!/usr/bin/env bash
# CREMA-D from its raw download to a training folder: bash scripts/prepare_cremad.sh RAW [OUT] [flags]
#
# RAW   a clone of CREMA-D with git-lfs files pulled (VideoFlash/*.flv, AudioWAV/*.wav), or what OGM-GE's scripts left
# OUT   the training folder to make (default data/CREMAD); flags: --split actor, --split_dir DIR, --workers N, ...
# Interrupt it whenever you like and start it again. data/README.md says where to get RAW and how long it takes.
DATASET=CREMAD
source "$(dirname "$0")/_prepare_raw.sh"
