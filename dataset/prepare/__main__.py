"""Raw downloads to a verified training folder, and the doctor.

    python -m dataset.prepare --dataset CREMAD --raw RAW --out OUT
    python -m dataset.prepare --dataset KineticSound --raw RAW --out OUT
    python -m dataset.prepare --check DIR [--dataset NAME] [--json]

It may be interrupted at any moment; the same command continues and makes no finished clip twice. Exit status: 0 when
the folder is valid, 1 when clips are missing or broken, 2 for a mistake in the command.
"""

from dataset.prepare.check import check
from dataset.prepare.make import make
from dataset.prepare.published import BASE_URL, SUMS
from dataset.specs import SPECS
from utils.cli import Parser, number
from utils.errors import UserError, run_main


def parse_args(argv: list[str] | None = None):
    """The flags. Raises `UserError` for a mistake."""
    parser = Parser(
        prog="python -m dataset.prepare", description="Raw downloads to a verified training folder, and the doctor."
    )
    parser.add_argument("--dataset", metavar="NAME", help=f"{' or '.join(SUMS)}; --check takes {', '.join(SPECS)} too")
    job = parser.add_argument_group("prepare")
    job.add_argument("--raw", metavar="DIR", help="the raw download")
    job.add_argument("--out", metavar="DIR", help="the training folder to make (default: data/<dataset>)")
    job.add_argument("--split", choices=("official", "actor"), default="official", help="default: official")
    job.add_argument("--split_dir", metavar="DIR", help="folder with the published lists (default: download them)")
    job.add_argument("--split_url", metavar="URL", default=BASE_URL, help="where the lists are downloaded from")
    job.add_argument("--audio_recipe", choices=("logstft", "fbank"), help="default: logstft for CREMAD, else fbank")
    job.add_argument("--workers", type=number(int, 1, 1024), help="processes (default: one per core)")
    doctor = parser.add_argument_group("check")
    doctor.add_argument("--check", metavar="DIR", help="report what is wrong with a training or raw folder")
    doctor.add_argument("--json", action="store_true", help="the report as JSON on standard output")
    args = parser.parse_args(argv)
    if args.check is None and (args.dataset is None or args.raw is None):
        raise UserError("nothing to do: give --dataset NAME --raw DIR to prepare, or --check DIR; all flags: --help")
    if args.check is not None and (args.raw is not None or args.out is not None):
        raise UserError("--check goes without --raw and --out: it only looks")
    if args.json and args.check is None:
        raise UserError("--json goes with --check")
    return args


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
