"""`python -m dataset.prepare --check`: read all files of a folder and report every problem."""

import json
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np

from dataset.inspect import Problem, Report, frame_fault, inspect_folder, part_of_clip, short
from dataset.lists import read_record
from dataset.pack import in_order, read_array
from dataset.prepare.published import published_split
from dataset.prepare.raw import cremad_rows, index_raw, inspect_raw
from dataset.specs import DESCRIPTION, SPECS, DatasetSpec, get_spec, spec_of, video
from utils.errors import UserError
from utils.progress import over

SHOWN = 5  # files printed for each kind of problem; skipped.csv and --json have them all


def inspect_deep(root: Path | str, spec: DatasetSpec, quiet: bool = True) -> Report:
    """Run `inspect_folder`, then decode every frame and read every array.

    Clips with problems are removed from `Report.files`. Raises `UserError` if the folder or a list does not exist.
    """
    report = inspect_folder(root, spec, quiet)
    part_of = part_of_clip(report.parts)

    def look(clip: str) -> tuple[list[Problem], list[Problem]]:
        return _inspect_content(report, spec, clip, part_of[clip])

    with ThreadPoolExecutor() as pool:  # decoders and reads let other threads run
        contents = in_order(pool, look, list(report.files), ahead=64)
        for bad, constant in over(contents, "reading", len(report.files), quiet, keep=True):
            report.problems.extend(bad)
            report.warnings.extend(constant)
    for clip in {problem.clip for problem in report.problems}:
        report.files.pop(clip, None)
    return report


def _inspect_content(report: Report, spec: DatasetSpec, clip: str, part: str) -> tuple[list[Problem], list[Problem]]:
    """(problems, warnings) of one clip's content."""
    files, bad, constant = report.files[clip], [], []
    for modality in spec.modalities:
        path = f"{report.root}/{modality.folder}/{clip}"
        for name in files.frames.get(modality.name, ()):
            if reason := _decoding_fault(f"{path}/{name}"):
                bad.append(Problem("bad_frame", clip, f"{path}/{name}", reason, part))
        if modality.name in files.shapes:
            try:
                values = read_array(Path(f"{path}.npy"), files.shapes[modality.name])
            except UserError as error:
                reason = str(error).removeprefix(f"{path}.npy: ").split("; python -m")[0]
                bad.append(Problem("bad_array", clip, f"{path}.npy", reason, part))
            else:
                if values.size > 1 and np.ptp(values) < 1e-6:
                    reason = "one value everywhere, such as silence"
                    constant.append(Problem("constant", clip, f"{path}.npy", reason, part))
    return bad, constant


def _decoding_fault(path: str) -> str:
    """Reason why the frame is not a valid JPEG or PNG file, '' if Pillow decodes it.

    OpenCV is not used here, because it fills the missing part of a truncated picture with grey.
    """
    from PIL import Image

    try:
        data = Path(path).read_bytes()
        if reason := frame_fault(data):
            return reason
        with Image.open(BytesIO(data)) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"cannot be decoded ({short(error)})"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# The command


def check(args) -> int:
    """Print all problems of a training folder or a raw folder. Returns the exit status."""
    root = Path(args.check)
    if not root.is_dir():
        raise UserError(f"--check {root}: no such folder")
    if any((root / name).exists() for name in ("stat.csv", "train.csv", DESCRIPTION, video(1).folder)):
        recorded = read_record(root, "split.json").get("dataset")
        spec = spec_of(args.dataset or (recorded if recorded in SPECS else "folder"), root)
        report = inspect_deep(root, spec, quiet=False)
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
        "valid": not report.problems,
        "numbers": report.numbers,
        "problems": [problem._asdict() for problem in report.problems],
        "warnings": [problem._asdict() for problem in report.warnings],
    }


def _print_report(report: Report, spec: DatasetSpec) -> None:
    verdict = "valid" if not report.problems else f"NOT valid, {len(report.problems):,} problem(s)"
    print(f"{report.root}: {report.kind} folder of {spec.name}: {verdict}")
    for name, value in report.numbers.items():
        print(f"  {name.replace('_', ' ')}: {value}")
    print_problems("problems", report.problems)
    print_problems("warnings (they do not stop training)", report.warnings)


def print_problems(title: str, problems: list[Problem]) -> None:
    """A line for each kind with its number, then the first files of it."""
    if not problems:
        return
    print(f"{title}: {len(problems):,}")
    for kind in sorted({problem.kind for problem in problems}):
        some = [problem for problem in problems if problem.kind == kind]
        print(f"  {kind}: {len(some):,}")
        for problem in some[:SHOWN]:
            print(f"    {': '.join(text for text in (problem.path or problem.clip, problem.reason) if text)}")
