"""Dataset specifications: the only place for class counts, frame counts and spectrogram shapes.

Sources: the training lists and loaders published with OGM-GE (CVPR 2022) and Data Remixing (ICML 2025).
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from utils.errors import UserError

# Names that mean something else where modalities' names are used: heads, methods, files of a training folder.
AUDIO, VIDEO = "audio", "video"  # the two modalities of the paper's datasets
FLOW = "flow"  # optical flow of the video
RESERVED = ("joint", "multimodal", "loss", "remix", "baseline", "train", "test", "val", "pack")


@dataclass(frozen=True)
class AudioRecipe:
    """Recipe that converts a waveform to a spectrogram of a fixed shape.

    `shape` is (rows, columns) of the stored float32 array: (frequency, time) for `logstft` and `logmel`,
    (time, mel) for `fbank`. `rate` is in Hz; None keeps the file's own rate. `channels` says what becomes of several
    channels: "mean" or "first", as the code that each recipe comes from does. `samples` is the length that a wave is
    repeated or cut to, and `hop` the distance of two columns in samples; both are set for `logmel`, whose rate, length
    and bands are free (`logmel`), and fixed in code for the two published recipes.
    """

    name: str
    shape: tuple[int, int]
    rate: int | None
    channels: str = "mean"
    samples: int | None = None
    hop: int | None = None

    @property
    def fields(self) -> dict:
        """The recipe as stored in dataset.json and prepare.json; `recipe_of` reads it."""
        if self.samples is None or self.rate is None:
            return {"name": self.name}
        return {"name": self.name, "rate": self.rate, "seconds": self.samples / self.rate, "bands": self.shape[0],
                "hop": self.hop}  # fmt: skip


def logmel(rate: int = 8_000, seconds: float = 1.024, bands: int = 32, hop: int | None = None) -> AudioRecipe:
    """The log-mel recipe of any rate (Hz), length and number of bands: shape (bands, ceil(rate * seconds / hop)).

    A column every `hop` samples (default: 32 ms), from a window of two hops. Raises `ValueError` for values outside
    what sound files have.
    """
    hop = round(0.032 * rate) if hop is None else hop
    samples = round(rate * seconds)
    for name, value, low, high in (("rate", rate, 1_000, 400_000), ("seconds", seconds, 0.01, 600),
                                   ("bands", bands, 1, 1024), ("hop", hop, 1, max(1, samples))):  # fmt: skip
        if not low <= value <= high:
            raise ValueError(f"recipe logmel: {name} {value:g}; allowed: {low:g} to {high:g}")
    return AudioRecipe("logmel", (bands, -(-samples // hop)), rate, samples=samples, hop=hop)


AUDIO_RECIPES = {
    recipe.name: recipe
    for recipe in (
        AudioRecipe("logstft", (257, 188), 22_050),
        AudioRecipe("fbank", (1024, 128), None, channels="first"),
        logmel(),
    )
}
LOGMEL_FIELDS = {"rate": int, "seconds": float, "bands": int, "hop": int}


def recipe_of(value: object) -> AudioRecipe:
    """The recipe that dataset.json or prepare.json names: `"fbank"`, or an object of `AudioRecipe.fields`.

    {"name": "logmel", "rate": 16000, "seconds": 1.5, "bands": 64} has the defaults of `logmel` for what it leaves out.
    Raises `ValueError`.
    """
    fields: dict = dict(value) if isinstance(value, dict) else {"name": value}
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in AUDIO_RECIPES:
        raise ValueError(f"recipe {name!r} is unknown; allowed: {', '.join(AUDIO_RECIPES)}")
    allowed = LOGMEL_FIELDS if name == "logmel" else {}
    for key, number in fields.items():
        if key not in allowed:
            raise ValueError(f"recipe {name}: unknown field {key!r}; allowed: {', '.join(['name', *allowed])}")
        if isinstance(number, bool) or not isinstance(number, (int, allowed[key])):
            raise ValueError(f"recipe {name}: {key} {number!r}; a number is needed")
    return logmel(**fields) if fields else AUDIO_RECIPES[name]


@dataclass(frozen=True)
class Modality:
    """A modality of a dataset: the location of its files and how they are fed.

    `kind` is one of:

    "frames"    a folder of JPEG or PNG images per clip, `<folder>/<clip>/*.jpg`, in the order of their numbers, of
                which `frames` are fed as (B, T, channels, S, S). `channels` 3 is RGB; 2 is optical flow: x in the red
                channel, y in the green one, 127.5 for no motion. `like` names another modality of frames with which
                this one shares its picks, crops and flips: both have as many frames in every clip.
    "array"     a file of numbers per clip, `<folder>/<clip>.npy`, of one shape per dataset: (F, W) is fed as a
                one-channel image (B, 1, F, W), (D,) as a vector (B, D).
    "sequence"  a file (L, D) per clip, `<folder>/<clip>.npy`, of any length L and one D per dataset.

    Arrays are fed as float32; other real types are cast. `encoder` is a name of `models.ENCODERS`; None means the
    run's `--encoder` for images, "mlp" for vectors, "gru" for sequences. `pick` says which frame of each of the clip's
    `frames` equal segments is fed: "random", a random one in training and the middle one in evaluation (the code of
    Data Remixing); "first", the first one in both (the code of OGM-GE: frames 1, 4 and 7 of 10). `stored_frames` is how
    many frames of a clip are kept on disk at most (None: one for each second there is). `recipe` makes the spectrograms
    of a modality of sound; None is "as found in the folder" or, for modalities that are not sound, no recipe at all.
    """

    name: str
    kind: str
    folder: str
    encoder: str | None = None
    frames: int = 1
    stored_frames: int | None = None
    recipe: AudioRecipe | None = None
    channels: int = 3
    like: str | None = None
    pick: str = "random"


def audio(recipe: str | AudioRecipe | None) -> Modality:
    """Spectrograms in `audio/`."""
    return Modality(AUDIO, "array", "audio", recipe=AUDIO_RECIPES[recipe] if isinstance(recipe, str) else recipe)


def video(frames: int, stored_frames: int | None = None) -> Modality:
    """RGB frames in `visual/`."""
    return Modality(VIDEO, "frames", "visual", frames=frames, stored_frames=stored_frames)


def flow(frames: int, stored_frames: int | None = None) -> Modality:
    """Optical flow in `flow/`, a frame for each frame of `video`."""
    return Modality(FLOW, "frames", "flow", frames=frames, stored_frames=stored_frames, channels=2, like=VIDEO)


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset: its location, modalities and classes, and how its clips are fed.

    The order of `modalities` is that of every table, column and tie: on a tie the last one is the hardest. `classes` is
    sorted (class index = rank); None means "as stat.csv says". `image_size` is the side in pixels that frames are fed
    at. `counts` are the published (train, test) numbers of clips, `train_class_counts` the published train clips per
    class. `by_actor`: clip ids start with the actor's number. `encoder` and `learning_rate` are training defaults, with
    one rate for every method so that a comparison is fair.
    """

    name: str
    root: Path
    modalities: tuple[Modality, ...]
    classes: tuple[str, ...] | None = None
    image_size: int = 224
    encoder: str = "resnet18"
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
            encoder="resnet18_thin",
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
OWN_FIELDS = ("image_size", "learning_rate", "encoder", "mirror", "crop_area")
KINDS = ("frames", "array", "sequence")
PICKS = ("random", "first")
# Fields of a modality in dataset.json and their types.
MODALITY_FIELDS: dict[str, type | tuple[type, ...]] = {
    "name": str, "kind": str, "folder": str, "encoder": (str, type(None)), "frames": int,
    "stored_frames": (int, type(None)), "recipe": (str, dict, type(None)), "channels": int, "like": (str, type(None)),
    "pick": str,
}  # fmt: skip


def spec_of(name: str, root: Path) -> DatasetSpec:
    """The spec called `name`, completed for `folder` by `<root>/dataset.json` where there is one.

    The file names the modalities (the fields of `Modality`; `recipe` as `recipe_of` reads it), and may set
    `image_size`, `learning_rate`, `encoder`, `mirror` and `crop_area`:

        {"modalities": [{"name": "audio", "kind": "array", "folder": "audio",
                         "recipe": {"name": "logmel", "rate": 16000, "seconds": 1.5, "bands": 64}},
                        {"name": "video", "kind": "frames", "folder": "visual"},
                        {"name": "flow", "kind": "frames", "folder": "flow", "channels": 2, "like": "video"},
                        {"name": "text", "kind": "sequence", "folder": "text"}], "image_size": 64}

    Raises `UserError` naming the file and the field that is wrong.
    """
    spec, path = get_spec(name), Path(root) / DESCRIPTION
    if name != "folder" or not path.is_file():
        return spec
    try:
        return replace(spec, **_own(json.loads(path.read_text(encoding="utf-8-sig"))))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}; correct the file") from None


def described(name: str, found: dict) -> DatasetSpec:
    """The spec called `name` with the modalities and sizes that `found` names: what `description` gives, and more.

    Raises `ValueError` for a value that is wrong.
    """
    return replace(get_spec(name), **_own({key: found[key] for key in ("modalities", *OWN_FIELDS) if key in found}))


def description(spec: DatasetSpec) -> dict:
    """The content of dataset.json from which `spec_of("folder", root)` makes the modalities and sizes of `spec`."""
    modalities = []
    for modality in spec.modalities:
        fields: dict = {"name": modality.name, "kind": modality.kind, "folder": modality.folder}
        for field in ("encoder", "frames", "stored_frames", "channels", "like", "pick"):
            if (value := getattr(modality, field)) != getattr(Modality, field):
                fields[field] = value
        if modality.recipe is not None:
            fields["recipe"] = modality.recipe.fields
        modalities.append(fields)
    return {"modalities": modalities, "image_size": spec.image_size, "encoder": spec.encoder,
            "learning_rate": spec.learning_rate, "mirror": spec.mirror, "crop_area": list(spec.crop_area)}  # fmt: skip


def _own(found: object) -> dict:
    """The fields of a spec that the content of dataset.json sets. Raises `ValueError`."""
    if not isinstance(found, dict):
        raise ValueError('an object {"modalities": [...]} is needed')
    found = {"encoder" if key == "model" else key: value for key, value in found.items()}  # its earlier name
    unknown = [key for key in found if key != "modalities" and key not in OWN_FIELDS]
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; allowed: modalities, {', '.join(OWN_FIELDS)}")
    if not isinstance(found.get("modalities"), list):
        raise ValueError("field 'modalities' is missing or no list; see docs/own-data.md")
    own = {key: value for key, value in found.items() if key != "modalities"}
    size, rate, encoder, mirror = (own.get(key) for key in OWN_FIELDS[:4])
    if size is not None and not (_whole(size) and 8 <= size <= 4096):
        raise ValueError(f"image_size {size!r}; a whole number of pixels from 8 to 4096 is needed")
    if rate is not None and not (_number(rate) and rate > 0):
        raise ValueError(f"learning_rate {rate!r}; a number above 0 is needed")
    if encoder is not None and not isinstance(encoder, str):
        raise ValueError(f"encoder {encoder!r}; the name of an encoder is needed")
    if mirror is not None and not isinstance(mirror, bool):
        raise ValueError(f"mirror {mirror!r}; true or false is needed")
    if "crop_area" in own:
        area = own["crop_area"]
        if not (isinstance(area, list) and len(area) == 2 and all(map(_number, area)) and 0 < area[0] <= area[1] <= 1):
            raise ValueError(
                f"crop_area {area!r}; two shares [low, high] of the picture above 0, 1 at most, are needed"
            )
        own["crop_area"] = tuple(area)
    own["modalities"] = tuple(map(_modality, found["modalities"]))
    _check_modalities(own["modalities"])
    return own


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _modality(entry: object) -> Modality:
    """One entry of `modalities`. Raises `ValueError` naming the modality and the field."""
    if not isinstance(entry, dict):
        raise ValueError(f"modality {entry!r}: an object of fields is needed")
    fields: dict = dict(entry)
    name = fields.get("name")
    for field in ("name", "kind", "folder"):
        if field not in fields:
            raise ValueError(f"modality {name!r}: field '{field}' is missing; see docs/own-data.md")
    for field, value in fields.items():
        if field not in MODALITY_FIELDS:
            raise ValueError(f"modality {name!r}: unknown field {field!r}; allowed: {', '.join(MODALITY_FIELDS)}")
        if isinstance(value, bool) or not isinstance(value, MODALITY_FIELDS[field]):
            raise ValueError(f"modality {name!r}: {field} {value!r} is of the wrong type")
    if fields.get("recipe") is not None:
        try:
            fields["recipe"] = recipe_of(fields["recipe"])
        except ValueError as error:
            raise ValueError(f"modality {name!r}: {error}") from None
    return Modality(**fields)


def _check_modalities(modalities: tuple[Modality, ...]) -> None:
    by_name = {modality.name: modality for modality in modalities}
    if len(modalities) < 2 or len(by_name) < len(modalities):
        raise ValueError(f"modalities {', '.join(m.name for m in modalities)}: at least two are needed, each name once")
    for modality in modalities:
        name = modality.name
        if not name.isidentifier() or name in RESERVED:
            raise ValueError(f"modality {name!r}: a plain word is needed, not one of {', '.join(RESERVED)}")
        if modality.kind not in KINDS:
            raise ValueError(f"modality {name}: kind {modality.kind!r}; allowed: {', '.join(KINDS)}")
        for field in ("frames", "stored_frames"):
            count = getattr(modality, field)
            if count is not None and count < 1:
                raise ValueError(f"modality {name}: {field} {count!r}; a whole number from 1 is needed")
        if Path(modality.folder).name != modality.folder or modality.folder.startswith(".") or not modality.folder:
            raise ValueError(f"modality {name}: folder {modality.folder!r} must be a plain folder name")
        if modality.channels not in (2, 3):
            raise ValueError(f"modality {name}: channels {modality.channels}; 3 (RGB) or 2 (optical flow) is needed")
        if modality.pick not in PICKS:
            raise ValueError(f"modality {name}: pick {modality.pick!r}; allowed: {', '.join(PICKS)}")
        if modality.recipe is not None and modality.kind != "array":
            raise ValueError(f"modality {name}: a recipe makes arrays; kind {modality.kind!r} takes none")
        if modality.like is not None:
            other = by_name.get(modality.like)
            if other is None or other is modality or {other.kind, modality.kind} != {"frames"} or other.like:
                raise ValueError(f"modality {name}: like {modality.like!r}; the name of another modality of frames, "
                                 "which is like none itself, is needed")  # fmt: skip
            for field in ("frames", "pick"):
                own, its = getattr(modality, field), getattr(other, field)
                if own != its:
                    what = f"{own} frames are fed" if field == "frames" else f"pick {own!r}"
                    raise ValueError(f"modality {name}: {what}; {other.name}, whose picks it shares, has {its}")
