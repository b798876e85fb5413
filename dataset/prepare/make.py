"""The work of `python -m dataset.prepare`: a raw download to an inspected training folder."""

import shlex
from pathlib import Path

from dataset.inspect import Problem, Report, inspect_folder
from dataset.prepare.check import print_problems
from dataset.prepare.engine import Options, Summary, prepare_clips
from dataset.prepare.lists import actor_split, write_csv, write_lists
from dataset.prepare.published import SUMS, Split, published_split
from dataset.prepare.raw import CREMAD_CLIPS, Index, cremad_rows, find_clips, index_raw
from dataset.specs import AUDIO, AUDIO_RECIPES, VIDEO, DatasetSpec, get_spec
from utils.errors import UserError


def make(args) -> int:
    """Raw folder to training folder: find, split, make, list, inspect. Returns the exit status."""
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
    found = spec.modality(AUDIO).recipe or AUDIO_RECIPES["fbank"]
    recipe = AUDIO_RECIPES[args.audio_recipe] if args.audio_recipe else found
    stored = spec.modality(VIDEO).stored_frames
    summary = prepare_clips(clips, out, Options(stored_frames=stored, audio=recipe, workers=args.workers))
    write_lists(out, split.classes, split.parts, split.record)
    _write_skipped(out / "skipped.csv", summary.skipped)
    _print_summary(spec, out, split, summary)
    report = inspect_folder(out, spec, quiet=False)
    missing = {problem.clip for problem in summary.skipped}
    print_problems("found wrong on checking", [p for p in report.problems if p.clip not in missing])
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


def _write_skipped(path: Path, skipped: list[Problem]) -> None:
    path.unlink(missing_ok=True)
    if skipped:
        rows = [(problem.clip, problem.kind, problem.path, problem.reason) for problem in skipped]
        write_csv(path, [("clip", "kind", "file", "reason"), *rows])


def _print_summary(spec: DatasetSpec, out: Path, split: Split, summary: Summary) -> None:
    ready = summary.made + summary.kept
    print(
        f"{spec.name}: {ready:,} of {ready + len(summary.skipped):,} clips ready in {out} "
        f"({summary.made:,} made now, {summary.kept:,} found finished), {summary.bytes / 1e9:.2f} GB, "
        f"{summary.seconds:.1f} s" + (f", {summary.made / summary.seconds:.1f} clips/s" if summary.made else "")
    )
    print_problems("skipped (all of them in skipped.csv)", summary.skipped)
    print_problems("used, with a remark", summary.remarks)
    counts = ", ".join(f"{part} {len(rows):,}" for part, rows in split.parts.items())
    shared = split.record.get("shared_actors")
    actors = "" if shared is None else f"; actors in both parts: {shared}"
    print(f"split: {split.record['name']}, {counts} clips in {len(split.classes)} classes{actors}")
    if split.record.get("complete") is False:
        print(f"       made of the clips found here; the whole dataset ({CREMAD_CLIPS:,} clips) is split differently")


def _print_next(spec: DatasetSpec, out: Path, report: Report) -> None:
    command = shlex.join(["python", "train.py", "--train", "--dataset", spec.name, "--data_root", str(out)])
    if not report.problems:
        print(f"checked; next: {command}")
    else:
        clips = len({problem.clip for problem in report.problems})
        print(f"{clips:,} clips are missing: get their files and run the same command again, or train without them:")
        print(f"  {command} --allow_missing")
