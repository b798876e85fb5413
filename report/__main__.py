"""Report on finished runs: tables with mean, spread and n, paired differences to the baseline, figures.

    python -m report runs/compare                                     # runs, or folders of runs
    python -m report runs/* --results docs/results.md --readme README.md
    python -m report --model runs/NAME                                # pictures of a trained model
    python -m report --clips data/demo                                # contact sheet of a training folder
    python -m report --share runs/reproduce-cremad                    # Markdown for an issue, without paths
    python -m report --people summaryTable.csv --partition runs/NAME/partition.csv      # CREMA-D against human votes

Runs are read from their JSON files.
"""

from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from report.partition import read_partition
from report.people import SENSE_OF, compare_with_people, people_markdown, read_votes, recognition
from report.runs import find_runs
from report.share import share
from report.tables import table
from report.write import make_report, write_text
from utils.cli import Parser, format_list
from utils.errors import UserError, run_main
from utils.run import write_json


def compare_people(people: Path, partitions: list[Path], out: Path | None) -> None:
    """Print CREMA-D's votes against partitions; with `out`, also write people.md and people.json there."""
    votes = read_votes(people)
    found = {str(path): compare_with_people(read_partition(path, tuple(SENSE_OF)), votes) for path in partitions}
    text = people_markdown(found, votes, table)
    print(text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "people.md", text)
        write_json(out / "people.json", {"recognition": recognition(votes), "partitions": found})


def parse_args(argv: list[str] | None = None) -> Namespace:
    p = Parser(prog="python -m report", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="*", type=Path, help="run folders, or folders of runs")
    p.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the report (default: report, next to the first run)"
    )
    p.add_argument("--results", type=Path, metavar="FILE", help="also write the report to this file (default: none)")
    p.add_argument("--readme", type=Path, metavar="FILE",
                   help="insert the first table between the results markers of this file (default: none)")  # fmt: skip
    p.add_argument(
        "--model", type=Path, metavar="RUN", help="draw pictures of this run's trained model instead (default: none)"
    )
    p.add_argument("--data_root", type=Path, metavar="DIR", help="with --model: training folder (default: the run's)")
    p.add_argument(
        "--people", type=Path, metavar="FILE", help="CREMA-D's summaryTable.csv of human votes (default: none)"
    )
    p.add_argument(
        "--partition",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="partition.csv of CREMA-D runs, for --people (default: none)",
    )
    p.add_argument(
        "--clips", type=Path, metavar="DIR", help="draw a contact sheet of this training folder (default: none)"
    )
    p.add_argument("--share", action="store_true", help="print tables, data, machine, versions and commands as "
                   "Markdown for an issue, without paths or names (default: off; RUNS: runs)")  # fmt: skip
    p.add_argument("--format", type=format_list, default=("png",), metavar="A,B",
                   help="figure formats: png, pdf, svg (default: png)")  # fmt: skip
    args = p.parse_args(argv)
    if bool(args.people) != bool(args.partition):
        raise UserError("--people and --partition: only valid together (the votes, and a run's partition.csv)")
    if args.share:
        if any((args.out, args.results, args.readme, args.model, args.people, args.clips)):
            raise UserError("--share: only prints the result of runs; omit --out, --results, --readme, --model, "
                            "--people and --clips")  # fmt: skip
        args.runs = args.runs or [Path("runs")]
    if sum(map(bool, (args.runs, args.model, args.people, args.clips))) != 1:
        raise UserError("give runs or a folder of runs (python -m report runs), or one of --model RUN, --clips DIR and "
                        "--people FILE")  # fmt: skip
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.people:
        compare_people(args.people, args.partition, args.out)
    elif args.model:
        from report.pictures import picture_model  # lazy import: only --model needs scikit-learn and the network

        picture_model(args.model, args.out or args.model / "pictures", args.data_root, args.format)
    elif args.clips:
        from report.clips import clips_sheet  # lazy import: only --clips needs OpenCV

        print(", ".join(map(str, clips_sheet(args.clips, args.out or Path("report-clips"), args.format))), "written")
    elif args.share:
        print(share(find_runs(args.runs)), end="")
    else:
        runs = find_runs(args.runs)
        out = args.out or runs[0].folder.parent / "report"
        make_report(runs, out, args.results, args.readme, args.format)


if __name__ == "__main__":
    run_main(main)
