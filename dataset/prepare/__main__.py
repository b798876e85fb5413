"""Prepare a training folder from raw clips, or check one.

    python -m dataset.prepare --table clips.csv --raw RAW --out OUT    # your clips: file,label and optional columns
    python -m dataset.prepare --raw RAW --out OUT                      # a folder per class: RAW/<class>/*.mp4
    python -m dataset.prepare --dataset NAME --raw RAW --out OUT       # a published dataset
    python -m dataset.prepare --check DIR [--dataset NAME] [--json]

It can be interrupted at any time; the same command resumes and does not repeat finished clips. Exit status: 0 if the
folder is valid, 1 if clips are missing or broken, 2 for a mistake in the command.
"""

from dataset.prepare.check import check
from dataset.prepare.datasets import ENTRIES
from dataset.prepare.flags import arrays_flag, box, recipe_flag
from dataset.prepare.grid import ROLES
from dataset.prepare.make import make
from dataset.prepare.published import BASE_URL
from dataset.specs import SPECS
from utils.cli import Parser, number, path_name
from utils.errors import UserError, run_main

# Flags that only some sources accept. A table and a folder per class accept these.
SPECIAL = ("split", "split_dir", "split_url", "role", "annotations", "test_fraction", "val_fraction")
OWN = ("test_fraction", "val_fraction")
TEST_FRACTION = 0.2


def parse_args(argv: list[str] | None = None):
    """The flags. Raises `UserError` for a mistake."""
    parser = Parser(
        prog="python -m dataset.prepare", description="Prepare a training folder from raw clips, or check one."
    )
    known = ", ".join(ENTRIES)
    parser.add_argument(
        "--dataset", metavar="NAME", help=f"published dataset: {known}; with --check: {', '.join(SPECS)}"
    )
    job = parser.add_argument_group("prepare")
    columns = "file,label[,clip,audio,start,end,part,group]"
    job.add_argument(
        "--table", type=path_name, metavar="FILE", help=f"CSV table of clips: {columns} (default: a folder per class)"
    )
    job.add_argument("--raw", type=path_name, metavar="DIR", help="folder of raw clips (default: the table's folder)")
    job.add_argument("--out", type=path_name, metavar="DIR", help="training folder to create (default: data/<dataset>)")
    job.add_argument("--workers", type=number(int, 1, 1024), help="worker processes (default: one per core)")
    made = parser.add_argument_group("modalities (defaults for your own clips; published datasets have their own)")
    made.add_argument("--fps", type=number(float, 0, 240, True), help="frames kept per second (default: 1)")
    made.add_argument("--frames", type=number(int, 0, 1000), help="frames fed per clip, 0 for no video (default: 2)")
    made.add_argument("--size", type=number(int, 8, 4096), help="shorter side of stored frames (default: unchanged)")
    made.add_argument("--crop", type=box, metavar="X,Y,W,H", help="crop of the source picture, pixels (default: all)")
    made.add_argument("--flow", action="store_true", help="add optical flow as a modality (default: off)")
    made.add_argument("--audio_recipe", type=recipe_flag, metavar="RECIPE",
                      help="spectrogram: logstft, fbank, none, or logmel:rate=16000:seconds=1:bands=64 (default: "
                           "logmel, as long as the longest clip, 10 s at most)")  # fmt: skip
    made.add_argument("--arrays", type=arrays_flag, action="append", metavar="NAME=DIR",
                      help="add DIR/<clip>.npy as a modality; can be repeated (default: none)")  # fmt: skip
    made.add_argument("--no_mirror", action="store_true", help="do not mirror frames in training (default: mirror)")
    split = parser.add_argument_group("parts")
    split.add_argument("--test_fraction", type=number(float, 0, 0.9, True), metavar="F",
                       help="fraction of clips in test, if the clips have no parts (default: 0.2)")  # fmt: skip
    split.add_argument("--val_fraction", type=number(float, 0, 0.9), metavar="F",
                       help="fraction of clips in validation, if the clips have no parts (default: 0)")  # fmt: skip
    split.add_argument("--split", choices=("official", "actor", "1", "2", "3"),
                       help="CREMAD: official or actor; UCF101: 1, 2 or 3 (default: official, 1)")  # fmt: skip
    split.add_argument("--split_dir", type=path_name, metavar="DIR", help="folder of the published lists (default: "
                       "download them for CREMAD and KineticSound, else the raw folder)")  # fmt: skip
    split.add_argument("--split_url", metavar="URL", help="download the lists from here (default: OGM-GE's repository)")
    split.add_argument("--role", choices=ROLES, help="GRID: word of the sentence to classify (required for GRID)")
    split.add_argument("--annotations", type=path_name, action="append", metavar="FILE", help="KineticSound: Kinetics "
                       "annotation files, for class names; can be repeated (default: none)")  # fmt: skip
    doctor = parser.add_argument_group("check")
    doctor.add_argument("--check", metavar="DIR", help="report all problems of a training or raw folder (default: off)")
    doctor.add_argument("--json", action="store_true", help="with --check: print the report as JSON (default: off)")
    args = parser.parse_args(argv)
    if args.check is not None and any(value is not None for value in (args.raw, args.out, args.table)):
        raise UserError("--check: only reads a folder; omit --raw, --out and --table")
    if args.json and args.check is None:
        raise UserError("--json: only valid with --check")
    if args.check is None:
        _check_job(args)
        _fill_in(args)
    return args


def _check_job(args) -> None:
    """Refuse flags that do not go together."""
    if args.raw is None and args.table is None:
        raise UserError("nothing to do: give --table FILE or --raw DIR to prepare your clips, --dataset NAME --raw DIR "
                        "for a published dataset, or --check DIR; all flags: --help")  # fmt: skip
    if args.dataset is not None:
        if args.dataset == "demo":
            raise UserError("--dataset demo: nothing to prepare from raw clips; bash scripts/prepare_demo.sh makes it")
        if args.dataset not in ENTRIES:
            raise UserError(
                f"--dataset {args.dataset}: unknown; allowed: {', '.join(ENTRIES)}; omit it for your own clips"
            )
        if args.raw is None or args.table is not None:
            raise UserError(f"--dataset {args.dataset}: needs --raw DIR, without --table (for your own clips only)")
    elif args.out is None:
        raise UserError("--out: missing; give the training folder to create")
    allowed = OWN if args.dataset is None else ENTRIES[args.dataset].flags
    for name in SPECIAL:
        if getattr(args, name) is not None and name not in allowed:
            takers = [entry for entry, found in ENTRIES.items() if name in found.flags]
            takers += ["own clips"] if name in OWN else []
            raise UserError(f"--{name}: only valid with {', '.join(takers)}")


def _fill_in(args) -> None:
    """Fill in the defaults of the source-specific flags, and record which fractions were given."""
    args.given_fractions = [f"--{name}" for name in OWN if getattr(args, name) is not None]
    args.test_fraction = TEST_FRACTION if args.test_fraction is None else args.test_fraction
    args.val_fraction = args.val_fraction or 0.0
    args.split = args.split or "official"
    args.split_url = args.split_url or BASE_URL
    if args.test_fraction + args.val_fraction >= 1:
        raise UserError(f"--test_fraction {args.test_fraction:g} and --val_fraction {args.val_fraction:g} leave no "
                        "clips to train on")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Prepare or check as the flags say. Returns the exit status; raises `UserError` for a mistake."""
    args = parse_args(argv)
    try:
        return check(args) if args.check is not None else make(args)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to continue")
        return 130


if __name__ == "__main__":
    run_main(main)
