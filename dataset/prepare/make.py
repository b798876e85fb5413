"""Run a `Job` of `python -m dataset.prepare`: create the training folder and inspect it."""

import json
import shlex
import time
from pathlib import Path

from dataset.inspect import Problem, Report, inspect_folder
from dataset.prepare.arrays import write_arrays
from dataset.prepare.check import print_problems
from dataset.prepare.datasets import ENTRIES, Job, own_job
from dataset.prepare.engine import Summary, prepare_clips
from dataset.prepare.lists import write_csv, write_lists
from dataset.prepare.raw import CREMAD_CLIPS
from dataset.specs import DESCRIPTION, SPECS, description
from utils.errors import UserError
from utils.files import atomic_path


def make(args) -> int:
    """Raw clips to a training folder: find, split, make, list, inspect. Returns the exit status."""
    out = Path(args.out or f"data/{args.dataset}")
    raw = Path(args.raw) if args.raw is not None else Path(args.table).parent
    if raw.resolve() == out.resolve():
        raise UserError(f"--out {out}: is the raw folder itself; name another, such as {out}-prepared")
    job = ENTRIES[args.dataset].job(args, raw, out) if args.dataset else own_job(args, out)
    for note in job.notes:
        print(f"{job.name}: {note}")
    summary = _make_files(job, out)
    write_lists(out, job.split.classes, job.split.parts, job.split.record, job.split.groups)
    if job.split.groups is None and args.dataset is None:
        (out / "groups.csv").unlink(missing_ok=True)  # of an earlier table
    _write_description(job, out)
    _write_skipped(out / "skipped.csv", summary.skipped)
    _print_summary(job, out, summary)
    report = inspect_folder(out, job.spec, quiet=False)
    missing = {problem.clip for problem in summary.skipped}
    print_problems("found wrong on checking", [p for p in report.problems if p.clip not in missing])
    _print_next(job, out, report)
    return 0 if not report.problems else 1


def _make_files(job: Job, out: Path) -> Summary:
    """Write arrays and what the engine makes; a clip without one of its arrays is not decoded."""
    out.mkdir(parents=True, exist_ok=True)
    begin, faults, written = time.monotonic(), list(job.faults), set()
    for modality in job.spec.modalities:
        if modality.name in job.arrays:
            made, missing = write_arrays(out, modality, job.arrays[modality.name])
            written, faults = written | made, faults + missing
    faulty = {problem.clip for problem in faults}
    if job.clips:
        summary = prepare_clips([clip for clip in job.clips if clip.name not in faulty], out, job.options)
    else:
        clips, made = sum(len(rows) for rows in job.split.parts.values()), len(written - faulty)
        kept = clips - len(faulty) - made
        summary = Summary(made, kept, [], [], _bytes(job, out), time.monotonic() - begin)
    first = {problem.clip: problem for problem in reversed(faults)}
    return summary._replace(skipped=sorted([*summary.skipped, *first.values()], key=lambda problem: problem.clip))


def _bytes(job: Job, out: Path) -> int:
    return sum(path.stat().st_size for name in job.arrays for path in (out / name).glob("*.npy"))


def _write_description(job: Job, out: Path) -> None:
    """Write dataset.json, from which `--dataset folder` knows how to feed the folder."""
    text = json.dumps(description(job.spec), indent=2) + "\n"
    path = out / DESCRIPTION
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
        print(f"{job.name}: {DESCRIPTION} was different and is written again")
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _write_skipped(path: Path, skipped: list[Problem]) -> None:
    path.unlink(missing_ok=True)
    if skipped:
        rows = [(problem.clip, problem.kind, problem.path, problem.reason) for problem in skipped]
        write_csv(path, [("clip", "kind", "file", "reason"), *rows])


def _print_summary(job: Job, out: Path, summary: Summary) -> None:
    ready = summary.made + summary.kept
    print(
        f"{job.name}: {ready:,} of {ready + len(summary.skipped):,} clips ready in {out} "
        f"({summary.made:,} made now, {summary.kept:,} found finished), {summary.bytes / 1e9:.2f} GB, "
        f"{summary.seconds:.1f} s" + (f", {summary.made / summary.seconds:.1f} clips/s" if summary.made else "")
    )
    print_problems("skipped (all of them in skipped.csv)", summary.skipped)
    if any(problem.kind == "no_audio_track" for problem in summary.skipped):
        print("  clips without sound: --audio_recipe none prepares them without it, if two modalities are left")
    print_problems("used, with a remark", summary.remarks)
    print(f"modalities: {', '.join(map(_described, job.spec.modalities))}")
    split = job.split
    counts = ", ".join(f"{part} {len(rows):,}" for part, rows in split.parts.items())
    actors = split.record.get("shared_actors")
    groups = split.record.get("shared_groups")
    shared = "" if actors is None else f"; actors in both parts: {actors}"
    shared += "" if groups is None else f"; groups in two parts: {groups}"
    print(f"split: {split.record['name']}, {counts} clips in {len(split.classes)} classes{shared}")
    for part, rows in split.parts.items():
        absent = sorted(set(split.classes) - {label for _, label in rows})
        if absent:
            some = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
            print(f"       no clip in {part}: {len(absent)} of the classes ({some})")
    if split.record.get("complete") is False:
        print(f"       made from the clips found here; the full dataset ({CREMAD_CLIPS:,} clips) is split differently")


def _described(modality) -> str:
    """A modality in a few words, for the summary."""
    if modality.kind == "frames":
        return f"{modality.name} ({modality.frames} frames fed)"
    if modality.recipe is None:
        return f"{modality.name} ({modality.kind})"
    fields = dict(modality.recipe.fields)
    shape = " x ".join(map(str, modality.recipe.shape))
    return f"{modality.name} ({':'.join([fields.pop('name'), *(f'{k}={v:g}' for k, v in fields.items())])}, {shape})"


def _print_next(job: Job, out: Path, report: Report) -> None:
    known = job.name in SPECS and job.spec == SPECS[job.name]
    name = job.name if known else "folder"
    command = shlex.join(["python", "train.py", "--train", "--dataset", name, "--data_root", str(out)])
    if not report.problems:
        print(f"checked; next: {command}")
    else:
        clips = len({problem.clip for problem in report.problems})
        print(f"{clips:,} clips are missing: get their files and run the same command again, or train without them:")
        print(f"  {command} --allow_missing")
