"""Compare the decoder of the preparation with the `ffmpeg` command on unusual media files.

    python -m benchmarks.media DIR [--workers 2] [--out FILE]

Every file of DIR is prepared twice, as a silent video and as audio. If `ffmpeg` is installed, the first ten frames and
the whole first audio channel are compared with its output. `probe.csv` in DIR, the output of ffprobe for each file,
determines which files are decodable: those with a duration, a codec, a pixel format or channel count, and no error.
Writes benchmarks/results/media.csv. Exit status 1 if a decodable file is refused.
"""

import csv
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from benchmarks.saving import RESULTS
from dataset.prepare import audio, decode, video
from dataset.prepare.engine import Clip, Options, prepare_clips
from dataset.specs import AUDIO_RECIPES
from utils.cli import Parser, number
from utils.errors import UserError, run_main

COMPARED = 10  # frames
FIELDS = ("file", "streams", "decodable", "video", "sound", "frames_compared", "frame_max", "frame_mean",
          "samples_compared", "sound_max", "samples_more", "refused")  # fmt: skip


def main() -> int:
    parser = Parser(description="Compare the decoder with ffmpeg on unusual media files.")
    parser.add_argument("folder", nargs="?", metavar="DIR", help="folder of media files")
    parser.add_argument("--workers", type=number(int, 1), default=2, metavar="N", help="worker processes (default: 2)")
    parser.add_argument("--out", default=str(RESULTS / "media.csv"), metavar="FILE", help="CSV (default: %(default)s)")
    args = parser.parse_args()
    if args.folder is None:
        raise UserError("give the folder of media files: python -m benchmarks.media DIR")
    folder = Path(args.folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    probes = read_probes(folder / "probe.csv")
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".csv")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as out:
        faults = prepare(files, Path(out), args.workers)
        seconds = time.monotonic() - begin
        rows = [row_of(path, i, Path(out), faults, probes.get(path.name)) for i, path in enumerate(files)]
    with open(args.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    report(rows, seconds)
    print(f"written: {args.out}")
    return 1 if any(row["refused"] for row in rows) else 0


def read_probes(path: Path) -> dict[str, dict]:
    """ffprobe's output by file name; empty without a probe.csv."""
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def prepare(files: list[Path], out: Path, workers: int) -> dict[str, str]:
    """Prepare all; returns the reasons of the skipped clips."""
    options = Options(fps=1, stored_frames=10, audio=AUDIO_RECIPES["logmel"], workers=workers)
    clips = [Clip(f"v{i:03d}", path, None) for i, path in enumerate(files)]
    clips += [Clip(f"s{i:03d}", None, path) for i, path in enumerate(files)]
    summary = prepare_clips(clips, out, options)
    return {problem.clip: f"{problem.kind}: {problem.reason}" for problem in summary.skipped}


def row_of(path: Path, i: int, out: Path, faults: dict[str, str], probe: dict | None) -> dict:
    """One line of the table."""
    can = decodable(probe)
    row: dict = {"file": path.name, "decodable": "+".join(kind for kind in can if can[kind])}
    row["streams"] = "" if probe is None else "+".join(filter(None, (probe["vcodec"], probe["acodec"])))
    row["video"], row["sound"] = faults.get(f"v{i:03d}", ""), faults.get(f"s{i:03d}", "")
    if not row["video"]:
        frames = sorted((out / "visual" / f"v{i:03d}").iterdir())
        height, width = np.asarray(cv2.imread(str(frames[0]))).shape[:2]
        row["video"] = f"{len(frames)} frames of {width}x{height}"
        row |= against_ffmpeg_frames(path)
    if not row["sound"]:
        wave, rate = audio.load_wave(path, channels="first")
        row["sound"] = f"{len(wave) / rate:.3f} s at {rate} Hz"
        row |= against_ffmpeg_sound(path, wave)
    made = {"video": f"v{i:03d}" not in faults, "sound": f"s{i:03d}" not in faults}
    row["refused"] = "+".join(kind for kind in can if can[kind] and not made[kind])
    return row


def decodable(probe: dict | None) -> dict[str, bool]:
    """Whether ffprobe could decode the file's video and sound."""
    if probe is None or probe["err"] or not probe["dur"]:  # an initialisation segment lasts nothing
        return {"video": False, "sound": False}
    return {"video": bool(probe["vcodec"] and probe["pix"]), "sound": bool(probe["acodec"] and int(probe["ch"] or 0))}


def ffmpeg(path: Path, *flags: str) -> bytes | None:
    """Output of `ffmpeg -i`; None if the command is missing or writes nothing."""
    if shutil.which("ffmpeg") is None:
        return None
    command = ["ffmpeg", "-v", "quiet", "-nostdin", "-i", str(path), *flags, "-"]
    return subprocess.run(command, stdout=subprocess.PIPE, check=False, timeout=120).stdout or None


def against_ffmpeg_frames(path: Path) -> dict:
    """Largest and mean difference of the first frames in levels of 0 to 255."""
    frames = []
    with decode.opened(path, "video") as container:
        stream, picture = decode.find_stream(container, path, "video"), video.Pictures(path, video.Choice())
        for frame in decode.decoded(container, stream, decode.Tally(path)):
            frames.append(picture(frame))
            if len(frames) == COMPARED:
                break
    height, width = frames[0].shape[:2]
    raw = ffmpeg(
        path, "-map", "0:v:0", "-frames:v", str(COMPARED), "-vsync", "0", "-f", "rawvideo", "-pix_fmt", "bgr24"
    )
    if raw is None:
        return {}
    if len(raw) % (height * width * 3):
        return {"frames_compared": "other size"}
    theirs = np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)
    count = min(len(theirs), len(frames))
    gaps = np.abs(np.stack(frames[:count]).astype(np.int16) - theirs[:count])
    return {"frames_compared": count, "frame_max": int(gaps.max()), "frame_mean": f"{gaps.mean():.4f}"}


def against_ffmpeg_sound(path: Path, wave: np.ndarray) -> dict:
    """Largest difference of the first channel (full scale is 1), and how many samples more we have than ffmpeg."""
    with decode.opened(path, "sound file") as container:
        stream = decode.find_stream(container, path, "audio")
        channels, index = stream.codec_context.layout.nb_channels, stream.index
    raw = ffmpeg(path, "-map", f"0:{index}", "-f", "f32le", "-acodec", "pcm_f32le")
    if raw is None:
        return {}
    theirs = np.frombuffer(raw, "<f4").reshape(-1, channels)[:, 0]
    count = min(len(theirs), len(wave))
    gap = float(np.abs(theirs[:count] - wave[:count]).max()) if count else 0.0
    return {"samples_compared": count, "sound_max": f"{gap:.2g}", "samples_more": len(wave) - len(theirs)}


def report(rows: list[dict], seconds: float) -> None:
    """The numbers of the table on one screen."""
    for row in rows:
        print(f"{row['file'][:46]:46}  {row['streams'][:16]:16}  {row['video'][:60]:60}  {row['sound'][:60]}")
    for kind, low in (("video", "frame_max"), ("sound", "sound_max")):
        made = [row for row in rows if "_" not in row[kind].split(":")[0]]
        wanted = [row for row in rows if kind in row["decodable"]]
        refused = [row["file"] for row in rows if kind in row["refused"]]
        compared = [float(row[low]) for row in rows if row.get(low) not in (None, "")]
        print(
            f"{kind}: made of {len(made)} files, {len(wanted)} decodable by ffprobe, refused of these: {refused or 0}"
        )
        if compared:
            print(f"  against ffmpeg: {len(compared)} files, median of the largest differences {np.median(compared):g}")
    print(f"{len(rows)} files in {seconds:.1f} s")


if __name__ == "__main__":
    run_main(main)
