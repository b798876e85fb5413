#!/usr/bin/env bash
# Kinetics-Sounds from its raw download to a training folder: bash scripts/prepare_ks.sh RAW [OUT] [flags]
#
# RAW   the 10-second clips as <clip>.mp4, in one folder or in subfolders, or what OGM-GE's scripts left
# OUT   the training folder to make (default data/KineticSound); flags: --split_dir DIR, --workers N, ...
# Interrupt it whenever you like and start it again. data/README.md says where to get RAW and how long it takes.
set -euo pipefail
[ $# -ge 1 ] || { echo "error: usage: bash scripts/prepare_ks.sh RAW [OUT] [flags]" >&2; exit 2; }
here=$PWD # _env.sh changes the directory; paths count from where they were typed
full() { case $1 in /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }
raw=$(full "$1") out=data/KineticSound
shift
case ${1:---} in --*) ;; *) out=$(full "$1") && shift ;; esac
flags=()
while [ $# -gt 0 ]; do
    case $1 in
        --split_dir=*) flags+=(--split_dir "$(full "${1#*=}")") ;;
        --split_dir) flags+=(--split_dir "$(full "${2:-}")") && shift ;;
        *) flags+=("$1") ;;
    esac
    [ $# -eq 0 ] || shift
done
source "$(dirname "$0")/_env.sh"
exec "$PYTHON" -m dataset.prepare --dataset KineticSound --raw "$raw" --out "$out" ${flags[@]+"${flags[@]}"}
