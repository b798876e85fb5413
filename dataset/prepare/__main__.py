"""Raw downloads to a verified training folder, and the doctor.

    python -m dataset.prepare --dataset CREMAD --raw RAW --out OUT
    python -m dataset.prepare --dataset KineticSound --raw RAW --out OUT
    python -m dataset.prepare --check DIR [--dataset NAME] [--json]

Interrupt it at any moment and type the same command again: finished clips are not made twice. Exit status: 0 when
training on the folder would be sound, 1 when clips are missing or broken, 2 for a mistake in the command.
"""

import csv
import json
import shlex
from collections.abc import Iterable
from pathlib import Path

from dataset.inspect import Problem, Report, inspect_folder
from dataset.prepare.engine import Clip, Summary, prepare_clips
from dataset.lists import check_clip_id, read_record
from dataset.prepare.published import BASE_URL, SUMS, Split, published_split
from dataset.prepare.raw import CREMAD_CLIPS, Index, cremad_rows, find_clips, index_raw, inspect_raw
from dataset.specs import AUDIO_RECIPES, SPECS, DatasetSpec, get_spec
from dataset.splits import ACTOR_SEED, actor_of, actor_test, describe
from utils.cli import Parser, number
from utils.errors import UserError, run_main
from utils.files import atomic_path

__all__ = ["Clip", "Summary", "prepare_clips", "write_lists"]

SHOWN = 5  # files printed for each kind of problem; skipped.csv and --json have them all


def write_lists(
    out: Path | str,
    classes: list[str],
    parts: dict[str, list[tuple[str, str]]],
    split: dict,
    groups: list[tuple[str, str]] | None = None,
) -> None:
    """Write stat.csv, a list for each part (train, test and maybe val) and split.json into a training folder.

    `parts` maps a part to its (clip, label) rows, kept in order; `split` says how the parts came about; `groups` are
    the (clip, group) rows of groups.csv, of which one made by hand is left alone where None is given. stat.csv is
    removed first and written last: a kill between two lists leaves a folder that training refuses. Raises `UserError`
    for an unsafe clip id or a label that is no class.
    """
    out = Path(out)
    for part, rows in parts.items():
        for clip, label in rows:
            check_clip_id(clip)
            if label not in classes:
                raise UserError(f"{part}.csv: label {label!r} of clip {clip} is not among the classes")
    (out / "stat.csv").unlink(missing_ok=True)
    for part in ("train", "test", "val"):
        if part in parts:
            _write_csv(out / f"{part}.csv", parts[part])
        else:
            (out / f"{part}.csv").unlink(missing_ok=True)  # of an earlier split
    with atomic_path(out / "split.json") as temporary:
        temporary.write_text(json.dumps(split, indent=2) + "\n", encoding="utf-8")
    if groups is not None:
        _write_csv(out / "groups.csv", groups)
    _write_csv(out / "stat.csv", [(name,) for name in sorted(classes)])


def _write_csv(path: Path, rows: Iterable[tuple]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Prepare


def prepare(args) -> int:
    """Raw folder to training folder: find, split, make, list, check. Returns the exit status."""
    spec = get_spec(args.dataset)
    if spec.name not in SUMS:
        hint = "bash scripts/prepare_demo.sh makes it" if spec.name == "demo" else f"allowed: {', '.join(SUMS)}"
        raise UserError(f"--dataset {spec.name}: nothing to prepare from a raw download; {hint}")
    raw, out = Path(args.raw), Path(args.out or spec.root)
    if raw.resolve() == out.resolve():
        raise UserError(f"--out {out}: is the raw folder itself; name another, such as {out}-prepared")
    index = index_raw(raw, leave_out=out)
    split = _split(args, spec, index, out)
    clips = find_clips(index, spec, [clip for rows in split.parts.values() for clip, _ in rows])
    recipe = AUDIO_RECIPES[args.audio_recipe or spec.audio_recipe]
    summary = prepare_clips(clips, out, recipe, args.workers, stored_frames=spec.stored_frames)
    write_lists(out, split.classes, split.parts, split.record)
    _write_skipped(out / "skipped.csv", summary.skipped)
    _print_summary(spec, out, split, summary)
    report = inspect_folder(out, spec, deep=False, quiet=False)
    missing = {problem.clip for problem in summary.skipped}
    _print_problems("found wrong on checking", [p for p in report.problems if p.clip not in missing])
    _print_next(spec, out, report)
    return 0 if not report.problems else 1


def _split(args, spec: DatasetSpec, index: Index, out: Path) -> Split:
    if args.split == "official":
        return published_split(spec.name, args.split_dir, out / ".prepare" / "lists", args.split_url)
    if not spec.by_actor:
        raise UserError(f"--split actor: the clip ids of {spec.name} name no actors; use --split official")
    if args.split_dir is not None:
        raise UserError("--split actor takes no lists: it comes from the clip ids; leave --split_dir out")
    return actor_split(cremad_rows(index, spec), spec)


def actor_split(rows: list[tuple[str, str]], spec: DatasetSpec) -> Split:
    """Cut (clip, label) rows into train and test, about 90/10, no actor in both, class shares as in the whole."""
    rows = sorted(rows)
    if len({actor_of(clip) for clip, _ in rows}) < 2:
        raise UserError("clips of 1 actor cannot be split by actor; use --split official")
    held = actor_test([clip for clip, _ in rows], [label for _, label in rows])
    parts = {
        "train": [row for row, test in zip(rows, held, strict=True) if not test],
        "test": [row for row, test in zip(rows, held, strict=True) if test],
    }
    record = {"name": "actor", "dataset": spec.name, "source": "clip ids", "seed": ACTOR_SEED}
    record |= {"complete": len(rows) == CREMAD_CLIPS, **describe(parts, by_actor=True)}
    return Split(list(spec.classes), parts, record)


def _write_skipped(path: Path, skipped: list[Problem]) -> None:
    path.unlink(missing_ok=True)
    if skipped:
        rows = [(problem.clip, problem.kind, problem.path, problem.reason) for problem in skipped]
        _write_csv(path, [("clip", "kind", "file", "reason"), *rows])


def _print_summary(spec: DatasetSpec, out: Path, split: Split, summary: Summary) -> None:
    ready = summary.made + summary.kept
    print(
        f"{spec.name}: {ready:,} of {ready + len(summary.skipped):,} clips ready in {out} "
        f"({summary.made:,} made now, {summary.kept:,} found finished), {summary.bytes / 1e9:.2f} GB, "
        f"{summary.seconds:.1f} s" + (f", {summary.made / summary.seconds:.1f} clips/s" if summary.made else "")
    )
    _print_problems("skipped (all of them in skipped.csv)", summary.skipped)
    _print_problems("used, with a remark", summary.remarks)
    counts = ", ".join(f"{part} {len(rows):,}" for part, rows in split.parts.items())
    shared = split.record.get("shared_actors")
    actors = "" if shared is None else f"; actors in both parts: {shared}"
    print(f"split: {split.record['name']}, {counts} clips in {len(split.classes)} classes{actors}")
    if split.record.get("complete") is False:
        print(f"       made of the clips found here; the whole data set ({CREMAD_CLIPS:,} clips) is split otherwise")


def _print_next(spec: DatasetSpec, out: Path, report: Report) -> None:
    command = shlex.join(["python", "train.py", "--train", "--dataset", spec.name, "--data_root", str(out)])
    if not report.problems:
        print(f"checked; next: {command}")
    else:
        clips = len({problem.clip for problem in report.problems})
        print(f"{clips:,} clips are missing: get their files and type the same command again, or go on without them:")
        print(f"  {command} --allow_missing")


# ---------------------------------------------------------------------------------------------------------------------
# Check


def check(args) -> int:
    """The doctor: print what is wrong with a training folder or a raw folder. Returns the exit status."""
    root = Path(args.check)
    if not root.is_dir():
        raise UserError(f"--check {root}: no such folder")
    if any((root / name).exists() for name in ("stat.csv", "train.csv", "visual")):
        name = args.dataset or read_record(root, "split.json").get("dataset")
        spec = get_spec(args.dataset) if args.dataset else SPECS.get(name, SPECS["folder"])
        report = inspect_folder(root, spec, deep=True, quiet=False)
    else:
        spec = get_spec(args.dataset or _guess_raw(root))
        names = None
        if args.split_dir is not None:
            parts = published_split(spec.name, args.split_dir, root).parts
            names = [clip for rows in parts.values() for clip, _ in rows]
        report = inspect_raw(root, spec, names, quiet=False)
    if args.json:
        print(json.dumps(_as_json(report, spec), indent=2))
    else:
        _print_report(report, spec)
    return 0 if not report.problems else 1


def _guess_raw(root: Path) -> str:
    try:
        return "CREMAD" if cremad_rows(index_raw(root), SPECS["CREMAD"]) else "KineticSound"
    except UserError:
        return "KineticSound"


def _as_json(report: Report, spec: DatasetSpec) -> dict:
    return {
        "folder": str(report.root),
        "kind": report.kind,
        "dataset": spec.name,
        "sound": not report.problems,
        "numbers": report.numbers,
        "problems": [problem._asdict() for problem in report.problems],
        "warnings": [problem._asdict() for problem in report.warnings],
    }


def _print_report(report: Report, spec: DatasetSpec) -> None:
    verdict = "sound" if not report.problems else f"NOT sound, {len(report.problems):,} problem(s)"
    print(f"{report.root}: {report.kind} folder of {spec.name}: {verdict}")
    for name, value in report.numbers.items():
        print(f"  {name.replace('_', ' ')}: {value}")
    _print_problems("problems", report.problems)
    _print_problems("warnings (training would be sound all the same)", report.warnings)


def _print_problems(title: str, problems: list[Problem]) -> None:
    """A line for each kind with its number, then the first files of it."""
    if not problems:
        return
    print(f"{title}: {len(problems):,}")
    for kind in sorted({problem.kind for problem in problems}):
        some = [problem for problem in problems if problem.kind == kind]
        print(f"  {kind}: {len(some):,}")
        for problem in some[:SHOWN]:
            print(f"    {': '.join(text for text in (problem.path or problem.clip, problem.reason) if text)}")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv: list[str] | None = None):
    """The flags. Raises `UserError` for a mistake."""
    parser = Parser(prog="python -m dataset.prepare", description=__doc__.split("\n")[0])
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
    args = parse_args(argv)
    try:
        return check(args) if args.check is not None else prepare(args)
    except KeyboardInterrupt:
        print("\ninterrupted; type the same command to go on where it stopped")
        return 130


if __name__ == "__main__":
    run_main(main)
