"""Throughput of preparation on generated clips of CREMA-D's format: 2.5 s of 480 x 360 FLV1 and a 16 kHz WAV.

    python -m benchmarks.prepare [--clips 60] [--repeats 3] [--against DIR]

Times dataset/prepare/engine.py with 1 worker and with one per core, and a second run over the finished folder. With
`--against`, also times the whole command, alternating with that of another checkout of this repository, and compares
their output files. Prints machine and versions. Writes benchmarks/results/prepare-<cpu>-<date>.json and .csv.
"""

import csv
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from benchmarks.raw_samples import cremad_names, write_video, write_wav
from benchmarks.saving import new_result
from dataset.prepare import engine
from dataset.prepare.engine import Clip, Options, prepare_clips
from dataset.specs import AUDIO, AUDIO_RECIPES, get_spec
from utils.cli import Parser, number
from utils.errors import run_main
from utils.memory import usable_cores

MODELS = 6  # different videos; the other clips are copies of them, for encoding takes ten times as long as preparing
RECIPE = AUDIO_RECIPES["logstft"]
PACKAGES = ("numpy", "opencv-python-headless", "librosa", "soundfile", "av", "torch", "torchaudio")


def make_raw(folder: Path, count: int) -> list[Clip]:
    """`count` raw clips, each with files of its own."""
    clips = []
    for i, name in enumerate(cremad_names(count, actors=20)):
        path = folder / "VideoFlash" / f"{name}.flv"
        if i < MODELS:
            write_video(path, 2.5, size=(480, 360), seed=i)
        else:
            shutil.copyfile(clips[i % MODELS].video, path)
        clips.append(Clip(name, path, write_wav(folder / "AudioWAV" / f"{name}.wav", 2.5, 16_000, seed=i)))
    return clips


def one_run(clips: list[Clip], out: Path, workers: int) -> dict:
    """Rate while all workers are at work, from the first quarter of the clips to the last one, by the engine itself."""
    done: list[float] = []
    begin, busy = time.monotonic(), processor_seconds()
    for _, outcome in engine._outcomes(clips, out, Options(audio=RECIPE, workers=workers)):
        if outcome.fault is not None:
            raise RuntimeError(str(outcome.fault))
        done.append(time.monotonic() - begin)
    warm = len(done) // 4
    rate = (len(done) - warm) / (done[-1] - done[warm - 1])
    return {"rate": rate, "start": max(0.0, done[-1] - len(done) / rate), "busy": processor_seconds() - busy}


def processor_seconds() -> float:
    """Of this process and its ended workers."""
    return sum(os.times()[:4])


def measure(clips: list[Clip], folder: Path, workers: tuple[int, ...], repeats: int) -> list[dict]:
    """A row for each number of workers; the repeats alternate, for other programs on the machine come and go.

    Processor time per clip is the difference between many clips and few, so that starting processes and libraries is
    not in it. Other programs hardly change it: from it comes the rate that an idle machine would reach.
    """
    runs, lone, few = {n: [] for n in workers}, {n: [] for n in workers}, clips[: len(clips) // 4]
    one_run(few, folder / "warm", 1)  # imports and disk cache
    for repeat in range(repeats):
        for count in workers:
            lone[count].append(one_run(few, folder / f"{count}-{repeat}-few", count)["busy"])
            runs[count].append(one_run(clips, folder / f"{count}-{repeat}", count))
    summary = prepare_clips(clips, folder / "whole", Options(audio=RECIPE), quiet=True)
    again = prepare_clips(clips, folder / "whole", Options(audio=RECIPE), quiet=True)
    rows = []
    for count in workers:
        busy = statistics.median(run["busy"] for run in runs[count]) - statistics.median(lone[count])
        rows.append(
            {
                "workers": count,
                "clips": len(clips),
                "repeats": repeats,
                "clips_per_second": round(statistics.median(run["rate"] for run in runs[count]), 2),
                "lowest": round(min(run["rate"] for run in runs[count]), 2),
                "highest": round(max(run["rate"] for run in runs[count]), 2),
                "cpu_ms_per_clip": round(1000 * busy / (len(clips) - len(few)), 1),
                "idle_clips_per_second": round(count * (len(clips) - len(few)) / busy, 1),
                "start_seconds": round(statistics.median(run["start"] for run in runs[count]), 2),
                "bytes_per_clip": round(summary.bytes / len(clips)),
                "second_run_clips_per_second": round(again.kept / again.seconds),
            }
        )
    return rows


def compare(raw: Path, other: Path, folder: Path, count: int, repeats: int) -> dict:
    """Clips per second of the command line, start of the processes included, here and in the checkout `other`."""
    here, workers = Path(__file__).parents[1], usable_cores()
    rates: dict[str, list[float]] = {"here": [], "other": []}
    busy: dict[str, list[float]] = {"here": [], "other": []}
    for repeat in range(repeats):
        for name, root in (("here", here), ("other", other)):
            command = [sys.executable, "-m", "dataset.prepare", "--dataset", "CREMAD", "--split", "actor", "--raw", raw]
            command += ["--out", folder / f"{name}{repeat}", "--workers", str(workers)]
            begin, before = time.monotonic(), _children_seconds()
            subprocess.run(command, cwd=root, check=True, capture_output=True)
            rates[name].append(count / (time.monotonic() - begin))
            busy[name].append(1000 * (_children_seconds() - before) / count)
    same = {kind: _same_files(folder / "here0" / kind, folder / "other0" / kind) for kind in ("visual", AUDIO)}
    found = {"against": _commit(other), "workers": workers, "clips": count, "identical_files": same}
    for name in rates:
        found[f"{name}_clips_per_second"] = [round(rate, 2) for rate in sorted(rates[name])]
        found[f"{name}_median"] = round(statistics.median(rates[name]), 2)
        found[f"{name}_cpu_ms_per_clip"] = round(statistics.median(busy[name]), 1)
    return found


def _commit(root: Path) -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or root.name


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _same_files(one: Path, two: Path) -> str:
    """Number of files with equal bytes in both folders, and number of files."""
    names = {path.relative_to(root) for root in (one, two) for path in root.rglob("*") if path.is_file()}
    same = [n for n in names if (one / n).is_file() and (two / n).is_file()
            and (one / n).read_bytes() == (two / n).read_bytes()]  # fmt: skip
    return f"{len(same)} of {len(names)}"


def machine() -> dict:
    """Description of the machine and versions."""
    import torch  # late: every worker imports this module, and PyTorch takes seconds

    from utils.run import environment

    found, versions = environment(torch.device("cpu"), 1), {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"cpu": found["hardware"]["cpu"], "cores": found["hardware"]["cores"], "load_before": load,
            "commit": found["git_commit"], "python": found["versions"]["python"], **versions}  # fmt: skip


def main() -> None:
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clips", type=number(int, 32, 1440), default=60, metavar="N", help="clip count (default: 60)")
    parser.add_argument("--repeats", type=number(int, 1), default=3, metavar="N",
                        help="repeats; the median is reported (default: 3)")  # fmt: skip
    parser.add_argument("--against", metavar="DIR", help="compare with this checkout of the repository (default: none)")
    args = parser.parse_args()
    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    total = sum(get_spec("CREMAD").counts or ())
    with tempfile.TemporaryDirectory() as folder:
        clips = make_raw(Path(folder) / "raw", args.clips)
        rows = measure(clips, Path(folder), tuple(sorted({1, usable_cores()})), args.repeats)
        if args.against is not None:
            other = Path(args.against).resolve()
            about["comparison"] = compare(Path(folder) / "raw", other, Path(folder), len(clips), args.repeats)
            print(about["comparison"])
    for row in rows:
        row["whole_cremad_minutes"] = round((total / row["clips_per_second"] + row["start_seconds"]) / 60, 2)
        row["whole_cremad_minutes_idle"] = round(total / row["idle_clips_per_second"] / 60, 2)
        row["whole_cremad_gigabytes"] = round(total * row["bytes_per_clip"] / 1e9, 2)
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    write(about, rows)


def write(about: dict, rows: list[dict]) -> None:
    """JSON with everything, CSV with a row for each number of workers."""
    stem = new_result("prepare", about["cpu"])
    stem.with_suffix(".json").write_text(json.dumps({"machine": about, "results": rows}, indent=2) + "\n")
    with open(stem.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {stem.with_suffix('.json')} and .csv")


if __name__ == "__main__":
    run_main(main)
