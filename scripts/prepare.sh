#!/usr/bin/env bash
# Prepare a training folder from raw clips: your own (a table, or a folder per class) or a published dataset.
#
#   bash scripts/prepare.sh --table clips.csv --raw RAW --out OUT       # columns file,label; clip,start,end,part,group
#   bash scripts/prepare.sh --raw RAW --out OUT                         # a folder per class: RAW/<class>/*.mp4
#   bash scripts/prepare.sh --dataset GRID --raw RAW --role digit --out OUT
#   python train.py --train --dataset folder --data_root OUT            # then train
# All flags: --help. It can be interrupted at any time; run the same command again to resume. See docs/own-data.md and
# data/README.md.
set -euo pipefail
here=$PWD # _env.sh changes the directory; relative paths refer to the caller's
full() { case $1 in /* | "") echo "$1" ;; *) echo "$here/$1" ;; esac; }
words=()
while [ $# -gt 0 ]; do
    case $1 in
        --table | --raw | --out | --split_dir | --annotations | --check)
            words+=("$1")
            [ $# -lt 2 ] || { words+=("$(full "$2")") && shift; }
            ;;
        --table=* | --raw=* | --out=* | --split_dir=* | --annotations=* | --check=*)
            words+=("${1%%=*}=$(full "${1#*=}")")
            ;;
        --arrays)
            words+=("$1")
            [ $# -lt 2 ] || { words+=("${2%%=*}=$(full "${2#*=}")") && shift; }
            ;;
        *) words+=("$1") ;;
    esac
    shift
done
source "$(dirname "$0")/_env.sh"
exec "$PYTHON" -m dataset.prepare ${words[@]+"${words[@]}"}
