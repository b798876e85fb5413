"""Prepare raw files given on the command line (`--clip`), with the settings of a network's training folder.

Files with the same name form one clip, as in a raw folder: `a/clip.flv b/clip.wav`. `clip.mp4@1.2-3.4` cuts a clip out
of a file, in seconds.
"""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from dataset.files import ArrayFiles, FrameFiles
from dataset.folder import Part
from dataset.inspect import list_frames
from dataset.prepare import decode
from dataset.prepare.engine import (
    FRAMES,
    IN_THIS_PROCESS,
    MOTION,
    SOUND,
    Clip,
    Options,
    options_of,
    prepare_clips,
    source_fault,
)
from dataset.specs import AUDIO, FLOW, VIDEO, DatasetSpec
from utils.errors import UserError

FOLDERS = {AUDIO: SOUND.folder, VIDEO: FRAMES.folder, FLOW: MOTION.folder}  # where the engine writes each
CUT = re.compile(r"(.+)@(\d+(?:\.\d*)?)-(\d+(?:\.\d*)?)")


def given_clips(words: list[str]) -> list[Clip]:
    """The clips that `words` name, `FILE` or `FILE@START-END`; a file without pictures is the sound of its namesake.

    Raises `UserError` for a file that cannot be read, and for a clip that is named twice.
    """
    found: dict[str, Clip] = {}
    for word in words:
        path, start, end = _cut(word)
        pictures, sound = _tracks(path)
        name = path.stem if start is None else f"{path.stem}@{start:g}-{end:g}"
        clip = found.get(name, Clip(name, None, None, start, end))
        if pictures and clip.video is None:
            clip = clip._replace(video=path, audio=clip.audio or (path if sound else None))
        elif sound and not pictures and clip.audio in (None, clip.video):
            clip = clip._replace(audio=path)
        else:
            raise UserError(f"--clip {path}: second file of the clip {name}; classify them one after the other")
        found[name] = clip
    return list(found.values())


def _cut(word: str) -> tuple[Path, float | None, float | None]:
    """(file, start, end) in seconds, None for the whole file."""
    match = CUT.fullmatch(word)
    if match is None or Path(word).exists():
        return Path(word), None, None
    start, end = float(match[2]), float(match[3])
    if start >= end:
        raise UserError(f"--clip {word}: ends before it starts; seconds are FILE@START-END")
    return Path(match[1]), start, end


def _tracks(path: Path) -> tuple[bool, bool]:
    """Whether the file has video and audio."""
    reason = "a folder; give its files" if path.is_dir() else source_fault(path)[1]
    if reason:
        raise UserError(f"--clip {path}: {reason}")
    found = []
    with decode.opened(path, "video or sound") as container:
        for kind, lacks in ((VIDEO, decode.NO_PICTURE), (AUDIO, decode.NO_TRACK)):
            try:
                decode.find_stream(container, path, kind)
                found.append(True)
            except UserError as error:
                if not str(error).endswith(lacks):  # there is one that cannot be decoded
                    raise
                found.append(False)
    if not any(found):
        raise UserError(f"--clip {path}: contains neither video nor audio")
    return found[0], found[1]


def prepare_given(
    clips: list[Clip], out: Path, spec: DatasetSpec, shapes: dict[str, tuple[int, ...]], record: dict
) -> list[tuple[tuple[str, ...], Part]]:
    """Prepare `clips` in the folder `out`. Returns one (modalities, part) for each set of modalities that clips have.

    `shapes` are those of the arrays in the training folder. `record` is its prepare.json, or {} for a folder made by
    other tools: then the recipe is that of `spec`, and frames follow the published datasets' rule. Labels are 0. Raises
    `UserError` for a clip that cannot be prepared or has none of the modalities of `spec`.
    """
    options = _options(spec, record)
    made = _made(spec, options)
    if not made:
        raise UserError(f"--clip: the network takes {', '.join(spec.names)} as arrays, which cannot "
                        "be made from video or sound; use --predictions on a training folder")  # fmt: skip
    if AUDIO in made and options.audio is not None and shapes.get(AUDIO, options.audio.shape) != options.audio.shape:
        raise UserError(f"--clip: recipe {options.audio.name} makes {options.audio.shape}, and the network was trained "
                        f"on {shapes[AUDIO]}: its training folder was made with other settings")  # fmt: skip
    own = [_restricted(clip, made) for clip in clips]
    for clip in prepare_clips(own, out, options, quiet=True).skipped:
        raise UserError(f"--clip {clip.path}: {clip.reason}")
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for clip in own:
        sources = {AUDIO: clip.audio, VIDEO: clip.video, FLOW: clip.video}
        groups[tuple(name for name in made if sources[name] is not None)].append(clip.name)
    return [(names, _part(out, spec, names, members)) for names, members in groups.items()]


def _options(spec: DatasetSpec, record: dict) -> Options:
    """Preparation settings of the training folder."""
    try:
        if record:
            return options_of(record)._replace(workers=IN_THIS_PROCESS)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--clip: prepare.json of the training folder is damaged ({error}); prepare it again") from None
    known = {modality.name: modality for modality in spec.modalities}
    recipe = known[AUDIO].recipe if AUDIO in known else None
    stored = known[VIDEO].stored_frames if VIDEO in known else None
    return Options(None, stored, audio=recipe, flow=FLOW in known, workers=IN_THIS_PROCESS)


def _made(spec: DatasetSpec, options: Options) -> tuple[str, ...]:
    """The modalities of `spec` that the engine makes, in order."""
    kinds = {modality.name: modality.kind for modality in spec.modalities}
    can = {AUDIO: options.audio is not None and kinds.get(AUDIO) == "array", VIDEO: kinds.get(VIDEO) == "frames",
           FLOW: options.flow and kinds.get(FLOW) == "frames"}  # fmt: skip
    return tuple(name for name in spec.names if can.get(name))


def _restricted(clip: Clip, made: tuple[str, ...]) -> Clip:
    """The clip with the sources that are used. Raises `UserError` where there are none."""
    video = clip.video if VIDEO in made or FLOW in made else None
    audio = clip.audio if AUDIO in made else None
    if video is None and audio is None:
        raise UserError(f"--clip {clip.video or clip.audio}: no {' or '.join(made)} in it, which the network takes")
    return clip._replace(video=video, audio=audio)


def _part(out: Path, spec: DatasetSpec, names: tuple[str, ...], clips: list[str]) -> Part:
    files = {}
    for name in names:
        folder, modality = f"{out}/{FOLDERS[name]}", spec.modality(name)
        if modality.kind == "frames":
            frames = [tuple(frame for frame, _ in list_frames(f"{folder}/{clip}")) for clip in clips]
            files[name] = FrameFiles(folder, clips, frames, modality.channels)
        else:
            files[name] = ArrayFiles(folder, clips)
    return Part(clips, np.zeros(len(clips), dtype=np.int64), files)
