#!/usr/bin/env bash
# Prepare CREMA-D from its raw download: bash scripts/prepare_cremad.sh RAW [OUT] [flags]
#
# RAW   a clone of CREMA-D with git-lfs files pulled (VideoFlash/*.flv, AudioWAV/*.wav), or OGM-GE's prepared data
# OUT   the training folder to create (default: data/CREMAD); flags: --split actor, --split_dir DIR, --workers N, ...
# It can be interrupted at any time; run the same command again to resume. data/README.md: download, duration.
DATASET=CREMAD
source "$(dirname "$0")/_prepare_raw.sh"
