"""What is known about each data set, in one place: nobody else writes a class count or a spectrogram shape.

Sources: the training lists and loaders published with OGM-GE (CVPR 2022) and Data Remixing (ICML 2025).
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from utils.errors import UserError

# Names that mean something else where modalities' names are used: heads, methods, files of a training folder.
AUDIO, VIDEO = "audio", "video"  # the two modalities of the paper's datasets
RESERVED = ("joint", "multimodal", "loss", "remix", "baseline", "train", "test", "val", "pack")


@dataclass(frozen=True)
class AudioRecipe:
    """How a waveform becomes a spectrogram of one fixed shape.

    `shape` is (rows, columns) of the stored float32 array: (frequency, time) for `logstft` and `logmel`,
    (time, mel) for `fbank`. `rate` is in Hz; None keeps the file's own rate. `channels` says what becomes of several
    channels: "mean" or "first", as the code that each recipe comes from does.
    """

    name: str
    shape: tuple[int, int]
    rate: int | None
    channels: str = "mean"


AUDIO_RECIPES = {
    recipe.name: recipe
    for recipe in (
        AudioRecipe("logstft", (257, 188), 22_050),
        AudioRecipe("fbank", (1024, 128), None, channels="first"),
        AudioRecipe("logmel", (32, 32), 8_000),
    )
}


@dataclass(frozen=True)
class Modality:
    """One modality of a dataset: where its files lie and how they are fed.

    `kind` "frames" is a folder of images per clip, `<folder>/<clip>/*.jpg`, of which `frames` are fed as
    (B, T, 3, S, S). `kind` "array" is a float32 file per clip, `<folder>/<clip>.npy`, of one shape per dataset: (F, W)
    is fed as a one-channel image (B, 1, F, W), (D,) as a vector (B, D). `encoder` is a name of `models.ENCODERS`; None
    means the run's `--model` for images, "mlp" for vectors. `stored_frames` is how many frames of a clip are kept on
    disk at most (None: one for each second there is). `recipe` is a key of `AUDIO_RECIPES`, None "as found in the
    folder" or, for modalities that are not sound, no recipe at all.
    """

    name: str
    kind: str
    folder: str
    encoder: str | None = None
    frames: int = 1
    stored_frames: int | None = None
    recipe: str | None = None


def audio(recipe: str | None) -> Modality:
    """Spectrograms in `audio/`."""
    return Modality(AUDIO, "array", "audio", recipe=recipe)


def video(frames: int, stored_frames: int | None = None) -> Modality:
    """RGB frames in `visual/`."""
    return Modality(VIDEO, "frames", "visual", frames=frames, stored_frames=stored_frames)


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset: where it lies, its modalities and classes, and how its clips are fed.

    The order of `modalities` is that of every table, column and tie: on a tie the last one is the hardest. `classes` is
    sorted (class index = rank); None means "as stat.csv says". `image_size` is the side in pixels that frames are fed
    at. `counts` are the published (train, test) numbers of clips, `train_class_counts` the published train clips per
    class. `by_actor`: clip ids start with the actor's number. `model` and `learning_rate` are training defaults, with
    one rate for every method so that a comparison is fair.
    """

    name: str
    root: Path
    modalities: tuple[Modality, ...]
    classes: tuple[str, ...] | None = None
    image_size: int = 224
    model: str = "resnet18"
    learning_rate: float = 1e-3
    crop_area: tuple[float, float] = (0.08, 1.0)
    mirror: bool = True
    counts: tuple[int, int] | None = None
    train_class_counts: dict[str, int] | None = None
    by_actor: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities' names, in order."""
        return tuple(modality.name for modality in self.modalities)

    def modality(self, name: str) -> Modality:
        return next(modality for modality in self.modalities if modality.name == name)


SPECS = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            "demo",
            Path("data/demo"),
            (audio("logmel"), video(frames=2)),
            classes=tuple("0123456789"),
            image_size=32,
            model="resnet18_thin",
            learning_rate=2e-3,  # few steps, a thin network: 1e-3 learns little, at 4e-3 Adam may destroy an encoder
            crop_area=(0.5, 1.0),  # less of a picture of 32 pixels shows no digit
            mirror=False,  # a mirrored digit is no digit
        ),
        DatasetSpec(
            "CREMAD",
            Path("data/CREMAD"),
            (audio("logstft"), video(frames=2)),
            classes=("ANG", "DIS", "FEA", "HAP", "NEU", "SAD"),
            counts=(6698, 744),
            train_class_counts={"ANG": 1166, "HAP": 1148, "DIS": 1142, "FEA": 1138, "SAD": 1131, "NEU": 973},
            by_actor=True,
        ),
        DatasetSpec(
            "KineticSound",
            Path("data/KineticSound"),
            (audio("fbank"), video(frames=3, stored_frames=10)),
            counts=(14799, 2597),
        ),
        DatasetSpec("folder", Path("data/folder"), (audio(None), video(frames=2))),
    )
}


def get_spec(name: str) -> DatasetSpec:
    """The spec called `name`. Raises `UserError` naming the allowed ones."""
    if name not in SPECS:
        raise UserError(f"--dataset {name}: unknown dataset; allowed: {', '.join(SPECS)}")
    return SPECS[name]


DESCRIPTION = "dataset.json"  # what a training folder may say of itself, for --dataset folder
OWN_FIELDS = {"image_size": int, "learning_rate": float, "model": str, "mirror": bool, "crop_area": tuple}


def spec_of(name: str, root: Path) -> DatasetSpec:
    """The spec called `name`, completed for `folder` by `<root>/dataset.json` where there is one.

    The file names the modalities, and may set `image_size`, `learning_rate`, `model`, `mirror` and `crop_area`:

        {"modalities": [{"name": "audio", "kind": "array", "folder": "audio"},
                        {"name": "video", "kind": "frames", "folder": "visual", "frames": 3},
                        {"name": "text", "kind": "array", "folder": "text", "encoder": "mlp"}], "image_size": 64}

    Raises `UserError` naming the file and the field that is wrong.
    """
    spec, path = get_spec(name), Path(root) / DESCRIPTION
    if name != "folder" or not path.is_file():
        return spec
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        unknown = [key for key in found if key != "modalities" and key not in OWN_FIELDS]
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}; allowed: modalities, {', '.join(OWN_FIELDS)}")
        own: dict = {key: OWN_FIELDS[key](value) for key, value in found.items() if key != "modalities"}
        own["modalities"] = tuple(Modality(**fields) for fields in found["modalities"])
        _check_modalities(own["modalities"])
    except KeyError as error:
        raise UserError(f"{path}: field {error} is missing; see docs/own-data.md") from None
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}; correct the file") from None
    return replace(spec, **own)


def _check_modalities(modalities: tuple[Modality, ...]) -> None:
    names = [modality.name for modality in modalities]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"modalities {', '.join(names)}: at least two are needed, each name once")
    for modality in modalities:
        if not modality.name.isidentifier() or modality.name in RESERVED:
            raise ValueError(f"modality {modality.name!r}: a plain word is needed, not one of {', '.join(RESERVED)}")
        if modality.kind not in ("frames", "array"):
            raise ValueError(f"modality {modality.name}: kind {modality.kind!r}; allowed: frames, array")
        if not isinstance(modality.frames, int) or modality.frames < 1:
            raise ValueError(f"modality {modality.name}: frames {modality.frames!r}; a whole number from 1 is needed")
        if Path(modality.folder).name != modality.folder:
            raise ValueError(f"modality {modality.name}: folder {modality.folder!r} must be a plain folder name")
