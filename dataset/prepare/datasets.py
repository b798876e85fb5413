"""Sources of preparation: a user's table, a folder per class, or a published dataset. Each becomes a `Job`.

An entry of `ENTRIES` finds the clips of the raw download, reads or creates the split, and lists the modalities. The
rest of the work (`dataset.prepare.make`) is the same for all.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from dataset.inspect import Problem
from dataset.lists import check_clip_id, read_rows
from dataset.prepare.arrays import Source, array_files, kind_of
from dataset.prepare.engine import Clip, Options
from dataset.prepare.flags import RecipeFlag
from dataset.prepare.grid import MARGIN, MOUTH, ROLE_CLASSES, ROLES, aligned_word, listed_words, speaker_of
from dataset.prepare.lists import actor_split
from dataset.prepare.published import Split, find_list, name_kinetics, published_split, read_lines
from dataset.prepare.raw import cremad_rows, find_clips, index_raw, seconds_of
from dataset.prepare.table import Row, class_folders, find_sources, only_sounds, read_table, split_rows
from dataset.specs import AUDIO, SPECS, VIDEO, DatasetSpec, Modality, audio, flow, video
from utils.errors import UserError

LONGEST = 10.0  # longest spectrogram of a user's clips, in seconds, if no recipe is given
PROBED = 20  # number of files whose duration is read to choose that length
IMAGE_SIDE = 224  # pixels that frames are fed at, unless they are stored smaller


class Job(NamedTuple):
    """Input of `make`: the spec of the folder, its split, and its sources.

    `clips` are decoded by the engine with `options`; `arrays` maps a modality to the source of each clip's array.
    `faults` are clips known to be unusable before any file is opened, `notes` lines for the user.
    """

    name: str
    spec: DatasetSpec
    split: Split
    clips: list[Clip]
    options: Options
    arrays: dict[str, dict[str, Source]]
    notes: list[str]
    faults: Sequence[Problem] = ()


class Defaults(NamedTuple):
    """Defaults of an entry. `fields` are fields of the spec, such as `model`."""

    fps: float | None = 1.0  # None: as OGM-GE's scripts, every floor(frames per second)-th
    frames: int = 2
    recipe: RecipeFlag = RecipeFlag("logmel", {})
    stored_frames: int | None = None
    size: int | None = None
    crop: tuple[int, int, int, int] | None = None
    flow: bool = False
    fields: Mapping = MappingProxyType({})


class Entry(NamedTuple):
    """A published dataset: how its job is made, the flags that only it takes, and a line of help."""

    job: Callable[..., Job]
    flags: tuple[str, ...]
    help: str


# ---------------------------------------------------------------------------------------------------------------------
# What all have in common


def modalities_of(args, defaults: Defaults, seconds: Callable[[], float]) -> tuple[DatasetSpec, Options]:
    """The spec (without array modalities, which are added later) and the engine's options.

    Flags take precedence over `defaults`. `seconds` measures the length of `logmel` if neither gives one. Raises
    `UserError` for contradictory flags.
    """
    wanted = args.audio_recipe or defaults.recipe
    needs = wanted.name == "logmel" and "seconds" not in wanted.fields
    recipe = wanted.recipe(seconds() if needs else 1.0)
    frames = defaults.frames if args.frames is None else args.frames
    size, crop = args.size or defaults.size, args.crop or defaults.crop
    with_flow = (args.flow or defaults.flow) and frames > 0
    if args.flow and not frames:
        raise UserError("--flow: needs frames; omit --frames 0")
    modalities = [audio(recipe)] if recipe is not None else []
    modalities += [video(frames, defaults.stored_frames)] if frames else []
    modalities += [flow(frames, defaults.stored_frames)] if with_flow else []
    side = min([IMAGE_SIDE, *([size] if size else crop[2:] if crop else [])])
    fields = {"image_size": side} | dict(defaults.fields)
    if args.size or args.crop:
        fields["image_size"] = side
    if args.no_mirror:
        fields["mirror"] = False
    spec = replace(SPECS["folder"], modalities=tuple(modalities), **fields)
    fps = defaults.fps if args.fps is None else args.fps
    return spec, Options(fps, defaults.stored_frames, size, crop, recipe, with_flow, args.workers)


def with_arrays(args, spec: DatasetSpec, clips: list[str]) -> tuple[DatasetSpec, dict[str, dict[str, Source]]]:
    """The spec with the modalities of `--arrays`, and their files. Raises `UserError` for a name that is taken."""
    arrays: dict[str, dict[str, Source]] = {}
    for name, folder, kind in args.arrays or ():
        if name in spec.names or name in {modality.folder for modality in spec.modalities}:
            raise UserError(f"--arrays {name}={folder}: the modality {name} already exists; choose another name")
        arrays[name] = array_files(name, folder, clips)
        spec = replace(spec, modalities=(*spec.modalities, Modality(name, kind or kind_of(arrays[name]), name)))
    if len(spec.modalities) < 2:
        found = ", ".join(spec.names) or "none"
        raise UserError(f"modalities: {found}; two or more are needed: sound, --frames, --flow, --arrays NAME=DIR")
    return spec, arrays


def fitting_seconds(clips: Sequence[Clip]) -> float:
    """Duration of the spectrograms in seconds: that of the longest clip, 10 at most.

    The duration is known for clips with an `end`. Of those without, the first 20 files are read. The result is rounded
    up to a tenth of a second.
    """
    known = [clip.end - (clip.start or 0) for clip in clips if clip.end is not None]
    whole = [(clip.audio, clip.start or 0) for clip in clips if clip.end is None and clip.audio is not None]
    found = [(seconds_of(audio), start) for audio, start in whole[:PROBED]]
    known += [length - start for length, start in found if length is not None and length > start]
    longest = max(known, default=LONGEST)
    return min(LONGEST, math.ceil(round(10 * longest, 3)) / 10)


def _own_job(args, name: str, rows: list[Row], raw: Path, defaults: Defaults, record: dict, notes: list[str]) -> Job:
    """A job from rows with files, split by their `part` entries or by a seed."""
    if args.given_fractions and any(row.part for row in rows):
        raise UserError(f"{args.given_fractions[0]}: the clips already have parts; omit the flag")

    def clips_of(sound: bool, frames: bool) -> list[Clip]:
        return find_sources(rows, raw, sound, frames)

    spec, options = modalities_of(args, defaults, lambda: fitting_seconds(clips_of(True, False)))
    spec, arrays = with_arrays(args, spec, [row.clip for row in rows])
    fractions = {"test": args.test_fraction, "val": args.val_fraction}
    split = split_rows(rows, fractions, {"dataset": name, **record})
    frames = VIDEO in spec.names and VIDEO not in arrays
    clips = clips_of(options.audio is not None, frames) if frames or options.audio is not None else []
    return Job(name, spec, split, clips, options, arrays, notes)


def own_job(args, out: Path) -> Job:
    """A table, or a folder per class where there is none."""
    raw = Path(args.raw) if args.raw is not None else Path(args.table).parent
    notes = []
    if args.table is not None:
        rows, source = read_table(args.table), Path(args.table).name
        if not raw.is_dir():
            raise UserError(f"--raw {raw}: no such folder; give the folder that contains the table's files")
    else:
        rows, left_out = class_folders(raw, out)
        source = "a folder per class"
        if left_out:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(left_out.items()))
            notes.append(f"left out, no videos or sounds in a folder of a class: {kinds}")
    defaults = Defaults()
    if only_sounds(rows):
        if args.frames or args.flow:
            raise UserError(f"--{'frames' if args.frames else 'flow'}: all {len(rows):,} files are audio; omit it")
        defaults = defaults._replace(frames=0)
    return _own_job(args, "folder", rows, raw, defaults, {"source": source}, notes)


def _given(parts: dict[str, list[tuple[str, str]]], record: dict, groups: list[tuple[str, str]] | None = None) -> Split:
    """A split whose parts come from lists."""
    record = record | {"clips": {part: len(rows) for part, rows in parts.items()}}
    if groups is not None:
        group_of = dict(groups)
        found = {part: {group_of[clip] for clip, _ in rows} for part, rows in parts.items()}
        record["groups"] = {part: len(names) for part, names in found.items()}
        counts = Counter(name for names in found.values() for name in names)
        record["shared_groups"] = sum(count > 1 for count in counts.values())
    return Split(sorted({label for rows in parts.values() for _, label in rows}), parts, record, groups)


def _counted(name: str, found: dict[str, int], published: dict[str, int]) -> list[str]:
    """A note that compares the sizes of the lists with the published ones."""
    ours = ", ".join(f"{what} {count:,}" for what, count in found.items())
    if found == published:
        return [f"lists: {ours}, as published"]
    return [f"lists: {ours}; published are {', '.join(f'{what} {count:,}' for what, count in published.items())}"]


def _by_name(videos: dict[str, Path], root: Path, name: str) -> Path:
    """The video with this name; a path that does not exist if the video is missing."""
    return videos.get(name, root / f"{name}.mp4")


def _listed_job(
    args, name: str, raw: Path, defaults: Defaults, clips: list[Clip], split: Split, notes: list[str]
) -> Job:
    """A job whose clips and parts come from published lists."""
    if not any(path.exists() for clip in clips for path in (clip.video, clip.audio) if path is not None):
        file = clips[0].video or clips[0].audio
        raise UserError(f"{raw}: none of the {len(clips):,} listed clips is there (such as {file}); wrong --raw?")
    spec, options = modalities_of(args, defaults, lambda: fitting_seconds(clips))
    spec, arrays = with_arrays(args, spec, [clip.name for clip in clips])
    if options.audio is None:
        clips = [clip._replace(audio=None) for clip in clips]
    if VIDEO not in spec.names or VIDEO in arrays:
        clips = [clip._replace(video=None) for clip in clips]
    return Job(name, spec, split, clips, options, arrays, notes)


# ---------------------------------------------------------------------------------------------------------------------
# CREMA-D and Kinetics-Sounds


def _official(args, name: str, raw: Path, out: Path, split: Split, index) -> Job:
    published = SPECS[name]
    sound, frames = published.modality(AUDIO), published.modality(VIDEO)
    recipe = RecipeFlag(sound.recipe.name if sound.recipe else "fbank", {})
    own = {"image_size", "encoder", "learning_rate", "crop_area", "mirror"}
    defaults = Defaults(None, frames.frames, recipe, frames.stored_frames,
                        fields={field: getattr(published, field) for field in own})  # fmt: skip
    clips = find_clips(index, published, [clip for rows in split.parts.values() for clip, _ in rows])
    job = _listed_job(args, name, raw, defaults, clips, split, [])
    same = job.spec.modalities == published.modalities or [
        replace(modality, recipe=None) for modality in job.spec.modalities
    ] == [replace(modality, recipe=None) for modality in published.modalities]
    return job._replace(spec=replace(published, mirror=job.spec.mirror)) if same and not args.no_mirror else job


def cremad(args, raw: Path, out: Path) -> Job:
    """CREMA-D: 7,442 clips of 91 actors, 6 emotions."""
    index = index_raw(raw, leave_out=out)
    if args.split == "actor":
        if args.split_dir is not None:
            raise UserError("--split_dir: not used by --split actor, which takes actors from the clip ids; omit it")
        split = actor_split(cremad_rows(index, SPECS["CREMAD"]), SPECS["CREMAD"])
    else:
        split = published_split("CREMAD", args.split_dir, out / ".prepare" / "lists", args.split_url)
    return _official(args, "CREMAD", raw, out, split, index)


def kinetics_sounds(args, raw: Path, out: Path) -> Job:
    """Kinetics-Sounds: 17,396 clips, 31 classes; names from Kinetics-400's annotations where they are given."""
    if args.split == "actor":
        raise UserError("--split actor: the clip ids of KineticSound contain no actor; use --split official")
    index = index_raw(raw, leave_out=out)
    split = published_split("KineticSound", args.split_dir, out / ".prepare" / "lists", args.split_url)
    if args.annotations:
        split = name_kinetics(split, [Path(path) for path in args.annotations])
    return _official(args, "KineticSound", raw, out, split, index)


# ---------------------------------------------------------------------------------------------------------------------
# AVE, VGGSound, UCF-101

AVE_LISTS = {"train": "trainSet.txt", "val": "valSet.txt", "test": "testSet.txt"}
AVE_COUNTS = {"train": 3339, "val": 402, "test": 402, "classes": 28}
VGGSOUND_CLASSES = 309
VGGSOUND_SECONDS = 10
UCF_COUNTS = {"1": (9537, 3783), "2": (9586, 3734), "3": (9624, 3696)}
UCF_CLASSES = 101


def ave(args, raw: Path, out: Path) -> Job:
    """AVE: 10-second videos with one event each, cut to the event; lists `Category&VideoID&Quality&Start&End`."""
    index = index_raw(raw, leave_out=out)
    events = []  # (part, video, label, start, end)
    for part, name in AVE_LISTS.items():
        path = find_list(args.split_dir or raw, "AVE", name)
        for line, text in enumerate(read_lines(path), start=1):
            fields = text.split("&")
            if fields[0] == "Category" or not text.strip():
                continue
            if len(fields) != 5:
                raise UserError(f"{path}, line {line}: {text[:80]!r} is not Category&VideoID&Quality&StartTime&EndTime")
            label, video_id, _, *times = (field.strip() for field in fields)
            try:
                start, end = map(float, times)
                check_clip_id(video_id)
            except (ValueError, UserError) as error:
                raise UserError(f"{path}, line {line}: {error}") from None
            events.append((part, video_id, label, start, end))
    often = Counter(event[1] for event in events)
    parts, clips, groups, empty = defaultdict(list), {}, [], 0
    for part, video_id, label, start, end in events:
        name = video_id if often[video_id] == 1 else f"{video_id}_{start:g}_{end:g}"
        if name in clips:
            name = f"{name}_{label.replace('/', '-')}"
        if name in clips:
            continue  # the same event twice
        if end <= start:
            empty, start, end = empty + 1, 0.0, math.inf
        file = _by_name(index.videos, index.root, video_id)
        clips[name] = Clip(name, file, file, start or None, end if math.isfinite(end) else None)
        parts[part].append((name, label))
        groups.append((name, video_id))
    split = _given({part: parts[part] for part in AVE_LISTS}, {"name": "official", "dataset": "AVE"}, groups)
    found = {part: len(rows) for part, rows in split.parts.items()} | {"classes": len(split.classes)}
    notes = _counted("AVE", found, AVE_COUNTS)
    if empty:
        notes.append(f"{empty:,} events without a length in the lists: the whole video is taken")
    defaults = Defaults(frames=3, recipe=RecipeFlag("fbank", {}))
    return _listed_job(args, "AVE", raw, defaults, list(clips.values()), split, notes)


def vggsound(args, raw: Path, out: Path) -> Job:
    """VGGSound: vggsound.csv `id,start,label,part`; files `<id>_<start:06d>.mp4`, or whole videos `<id>.mp4`."""
    index = index_raw(raw, leave_out=out)
    path = find_list(args.split_dir or raw, "VGGSound", "vggsound.csv")
    parts, clips = {"train": [], "test": []}, {}
    for line, row in read_rows(path):
        if len(row) != 4 or not row[1].isdecimal() or row[3] not in parts:
            raise UserError(f"{path}, line {line}: {','.join(row)[:80]!r} is not id,start seconds,label,train or test")
        video_id, start, label, part = row[0], int(row[1]), row[2], row[3]
        name = f"{video_id}_{start:06d}"
        try:
            check_clip_id(name)
        except UserError as error:
            raise UserError(f"{path}, line {line}: {error}") from None
        if name in clips:
            raise UserError(f"{path}, line {line}: clip {name} is listed twice; delete one line")
        cut = index.videos.get(name) or index.videos.get(f"{name}_{start + VGGSOUND_SECONDS:06d}")
        if cut is None and video_id in index.videos:
            whole = index.videos[video_id]
            clips[name] = Clip(name, whole, whole, float(start), float(start + VGGSOUND_SECONDS))
        else:
            file = cut or index.root / f"{name}.mp4"
            clips[name] = Clip(name, file, file)
        parts[part].append((name, label))
    split = _given(parts, {"name": "official", "dataset": "VGGSound"})
    notes = _counted("VGGSound", {"classes": len(split.classes)}, {"classes": VGGSOUND_CLASSES})
    defaults = Defaults(frames=3, recipe=RecipeFlag("fbank", {}), stored_frames=VGGSOUND_SECONDS)
    return _listed_job(args, "VGGSound", raw, defaults, list(clips.values()), split, notes)


def ucf101(args, raw: Path, out: Path) -> Job:
    """UCF-101: RGB frames and optical flow; one of the three official splits, whose groups share no source video."""
    number = "1" if args.split == "official" else args.split
    if number not in UCF_COUNTS:
        raise UserError(f"--split {args.split}: UCF-101 has the splits 1, 2 and 3")
    index = index_raw(raw, leave_out=out)
    parts, clips, groups = {"train": [], "test": []}, [], []
    for part, rows in parts.items():
        path = find_list(args.split_dir or raw, "UCF-101", f"{part}list{number.zfill(2)}.txt")
        for line, text in enumerate(read_lines(path), start=1):
            if not text.strip():
                continue
            match = re.fullmatch(r"(\w+)/(v_\w+_g(\d+)_c\d+)\.avi(\s+\d+)?", text.strip())
            if match is None:
                raise UserError(f"{path}, line {line}: {text[:80]!r} is not Class/v_Class_g01_c01.avi")
            label, name, group = match[1], match[2], match[3]
            file = index.videos.get(name, raw / label / f"{name}.avi")
            rows.append((name, label))
            groups.append((name, f"{label}_g{group}"))
            clips.append(Clip(name, file, file))
    record = {"name": "official", "dataset": "UCF-101", "split": int(number)}
    split = _given(parts, record, groups)
    found = {part: len(rows) for part, rows in parts.items()} | {"classes": len(split.classes)}
    train, test = UCF_COUNTS[number]
    notes = _counted("UCF-101", found, {"train": train, "test": test, "classes": UCF_CLASSES})
    # Half of the videos have no sound.
    defaults = Defaults(frames=3, recipe=RecipeFlag("none", {}), size=256, flow=True, fields={"image_size": 224})
    return _listed_job(args, "UCF-101", raw, defaults, clips, split, notes)


# ---------------------------------------------------------------------------------------------------------------------
# GRID: words cut by their alignments


def grid(args, raw: Path, out: Path) -> Job:
    """GRID: one word of each sentence, by `.align` files or by a words.csv (clip,role,word,start,end)."""
    if args.role is None:
        raise UserError(f"--dataset GRID needs --role; allowed: {', '.join(ROLES)}")
    if not raw.is_dir():
        raise UserError(f"{raw}: no such folder; give the folder of the raw download")
    films: dict[tuple[str, str], Path] = {}
    words: dict[tuple[str, str], tuple[str, float, float]] = {}
    faults, skip = [], out.resolve()
    listed = sorted(raw.glob("**/words.csv"))
    for path in sorted(raw.glob("**/*")):
        if skip in path.resolve().parents or path.name.startswith("."):
            continue
        key = (speaker_of(path.relative_to(raw)), path.stem)
        if path.suffix.lower() in (".mp4", ".mpg", ".avi", ".mov"):
            films.setdefault(key, path)
        elif path.suffix.lower() == ".align" and not listed:
            try:
                words[key] = aligned_word(path, args.role)
            except UserError as error:
                faults.append(
                    Problem(
                        "bad_alignment",
                        "_".join(filter(None, key)),
                        str(path),
                        str(error).removeprefix(f"{path}: "),
                        "",
                    )
                )
    for path in listed:
        words |= listed_words(path, args.role, speaker_of(path.relative_to(raw)))
    if not words:
        raise UserError(f"{raw}: neither words.csv nor *.align with the times of the words; get GRID's alignments")
    speakers = {speaker for speaker, _ in words}
    rows = []
    for (speaker, name), (word, start, end) in sorted(words.items()):
        file = films.get((speaker, name)) or films.get(("", name)) or raw / f"{name}.mpg"
        clip = f"{speaker}_{name}" if len(speakers) > 1 else name
        group = speaker if len(speakers) > 1 else None
        file_name = file.relative_to(raw).as_posix()
        rows.append(
            Row(clip, word, file_name, None, max(0.0, round(start - MARGIN, 3)), round(end + MARGIN, 3), None, group)
        )
    classes = len({row.label for row in rows})
    notes = _counted(
        "GRID", {f"classes of role {args.role}": classes}, {f"classes of role {args.role}": ROLE_CLASSES[args.role]}
    )
    spoken = len(films) - sum((speaker, name) in films or ("", name) in films for speaker, name in words)
    if spoken > 0:
        notes.append(f"{spoken:,} videos have no times of their words and are left out")
    # As in our measurements on GRID: thin network, gentle crops, 64 x 64 spectrograms of the word.
    recipe = RecipeFlag("logmel", {"rate": 16_000, "seconds": 0.64, "bands": 64, "hop": 160})
    fields = {"image_size": 64, "encoder": "resnet18_thin", "crop_area": (0.6, 1.0)}
    defaults = Defaults(25.0, 4, recipe, None, 64, MOUTH, fields=fields)
    record = {"source": "words.csv" if listed else "alignments", "role": args.role}
    return _own_job(args, "GRID", rows, raw, defaults, record, notes)._replace(faults=faults)


# ---------------------------------------------------------------------------------------------------------------------
# Features: CMU-MOSI and the multiple-view digits

MOSI_COUNTS = {"train": 1447, "test": 752}
MOSI_CLASSES = ("negative", "positive")
MOSI_MODALITIES = ("text", AUDIO, VIDEO)
# The views of UCI's multiple features by their number of columns: the .mat numbers them, UCI names them.
VIEWS = {76: "fourier", 216: "profile", 64: "karhunen", 240: "pixels", 47: "zernike", 6: "shape"}
DIGITS_COUNTS = {"train": 1600, "test": 400}


def _features_job(args, name: str, arrays: dict[str, dict[str, Source]], split: Split, notes: list[str]) -> Job:
    spec = replace(SPECS["folder"], modalities=tuple(Modality(key, "array", key) for key in arrays))
    clips = [clip for rows in split.parts.values() for clip, _ in rows]
    spec, more = with_arrays(args, spec, clips)
    options = Options(None, None, None, None, None, False, args.workers)
    return Job(name, spec, split, [], options, arrays | more, notes)


def mosi(args, raw: Path, out: Path) -> Job:
    """CMU-MOSI: utterance features of text, audio and video, `<modality>_<part>.csv`, the label in the last column."""
    arrays: dict[str, dict[str, Source]] = {name: {} for name in MOSI_MODALITIES}
    parts, groups = {}, []
    for part in MOSI_COUNTS:
        tables = {name: _numbers(find_list(raw, "MOSI", f"{name}_{part}.csv")) for name in MOSI_MODALITIES}
        labels = {name: table[:, -1] for name, table in tables.items()}
        first = labels[MOSI_MODALITIES[0]]
        for name, column in labels.items():
            if not (column.shape == first.shape and (column == first).all()):
                raise UserError(f"{raw}/{name}_{part}.csv: labels differ from {MOSI_MODALITIES[0]}_{part}.csv; rows of "
                                "the three files belong together")  # fmt: skip
        if not np.isin(first, (0, 1)).all():
            raise UserError(f"{raw}/{MOSI_MODALITIES[0]}_{part}.csv: labels in the last column are 0 and 1")
        names, speakers = _utterances(raw, part, first)
        parts[part] = [(clip, MOSI_CLASSES[int(label)]) for clip, label in zip(names, first, strict=True)]
        groups += zip(names, speakers, strict=True)
        for name, table in tables.items():
            arrays[name] |= dict(zip(names, table[:, :-1].astype(np.float32), strict=True))
    split = _given(parts, {"name": "official", "dataset": "MOSI"}, groups if all(g for _, g in groups) else None)
    notes = _counted("MOSI", {part: len(rows) for part, rows in parts.items()}, MOSI_COUNTS)
    return _features_job(args, "MOSI", arrays, split, notes)


def _numbers(path: Path) -> np.ndarray:
    """(rows, columns) float64 of a CSV of numbers. Raises `UserError` by line."""
    table: list[list[float]] = []
    for line, row in read_rows(path):
        try:
            table.append([float(field) for field in row])
        except ValueError:
            raise UserError(f"{path}, line {line}: not only numbers") from None
        if len(table[-1]) != len(table[0]) or not np.isfinite(table[-1]).all():
            raise UserError(f"{path}, line {line}: {len(table[-1])} finite numbers are needed, as in line 1")
    if not table or len(table[0]) < 2:
        raise UserError(f"{path}: no features; each line has numbers and the label")
    return np.array(table)


def _utterances(raw: Path, part: str, labels: np.ndarray) -> tuple[list[str], list[str]]:
    """The ids of a part's utterances and the video of each; by transcripts.csv where it is there, else by number."""
    rows_path, text_path = raw / f"rows_{part}.csv", raw / "transcripts.csv"
    if not (rows_path.exists() and text_path.exists()):
        return [f"{part}_{i:04d}" for i in range(len(labels))], [""] * len(labels)
    texts = [row for _, row in read_rows(text_path)]
    numbers = [row[0] for _, row in read_rows(rows_path)][1:]
    chosen: list[list[str]] = []
    try:
        chosen = [texts[int(number)] for number in numbers]
        same = [float(row[3]) for row in chosen] == labels.tolist()
    except (ValueError, IndexError):
        same = False
    if not same:
        raise UserError(f"{rows_path}: rows do not fit {text_path.name} and the labels; get the folder again")
    return [row[0] for row in chosen], [row[0].rpartition("_")[0] for row in chosen]


def digits(args, raw: Path, out: Path) -> Job:
    """UCI multiple features: handwritten digits in six views, from handwritten_6views.mat (x1_train, gt_train, ...)."""
    from scipy.io import loadmat

    path = raw if raw.suffix == ".mat" else find_list(raw, "multi-view digits", "handwritten_6views.mat")
    try:
        content = loadmat(path)
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"{path}: no MATLAB file that SciPy reads ({' '.join(str(error).split())[:80]})") from None
    arrays, parts = {}, {}
    for part in DIGITS_COUNTS:
        keys = sorted(key for key in content if re.fullmatch(rf"x\d+_{part}", key))
        if f"gt_{part}" not in content or not keys:
            raise UserError(f"{path}: no x1_{part}, ..., gt_{part} in it")
        labels = np.asarray(content[f"gt_{part}"]).ravel().astype(int)
        names = [f"{part}_{i:04d}" for i in range(len(labels))]
        lowest = int(labels.min())  # numbered from 1 in the published file, whose class 1 is the digit 0
        parts[part] = [(name, str(label - lowest)) for name, label in zip(names, labels.tolist(), strict=True)]
        for key in keys:
            view = np.asarray(content[key], dtype=np.float32)
            if view.ndim != 2 or len(view) != len(labels):
                raise UserError(f"{path}: {key} of shape {view.shape} does not fit {len(labels):,} labels")
            name = VIEWS.get(view.shape[1], key.split("_")[0])
            arrays.setdefault(name, {}).update(zip(names, view, strict=True))
    split = _given(parts, {"name": "official", "dataset": "multi-view digits"})
    notes = _counted("digits", {part: len(rows) for part, rows in parts.items()}, DIGITS_COUNTS)
    return _features_job(args, "MVDigits", arrays, split, notes)


ENTRIES = {
    "CREMAD": Entry(cremad, ("split", "split_dir", "split_url"), "emotions of 91 actors"),
    "KineticSound": Entry(kinetics_sounds, ("split", "split_dir", "split_url", "annotations"), "31 classes"),
    "AVE": Entry(ave, ("split_dir",), "28 classes of events, cut by their times"),
    "VGGSound": Entry(vggsound, ("split_dir",), "309 classes"),
    "UCF101": Entry(ucf101, ("split", "split_dir"), "101 actions, frames and optical flow"),
    "GRID": Entry(grid, ("role", "test_fraction", "val_fraction"), "words of six roles, frames of the mouth"),
    "MOSI": Entry(mosi, (), "sentiment, three modalities of features"),
    "MVDigits": Entry(digits, (), "handwritten digits in six views"),
}
