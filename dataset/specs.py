"""What is known about each data set, in one place: nobody else writes a class count or a spectrogram shape.

Sources: the training lists and loaders published with OGM-GE (CVPR 2022) and Data Remixing (ICML 2025).
"""

from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError


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
class DatasetSpec:
    """One data set: where it lies, its classes, and how its clips are fed.

    `classes` is sorted (class index = rank); None means "as stat.csv says". `frames` is how many frames of a clip
    are fed, `stored_frames` how many are kept on disk at most (None: one for each second there is), `image_size` the
    side in pixels they are fed at, `audio_recipe` a key of `AUDIO_RECIPES`; None means "as found
    in the folder". `counts` are the published (train, test) numbers of clips, `train_class_counts` the published
    train clips per class. `by_actor`: clip ids start with the actor's number. `model` and `learning_rate` are the
    defaults for training, the latter one rate for every method so that a comparison is fair.
    """

    name: str
    root: Path
    classes: tuple[str, ...] | None
    frames: int
    image_size: int
    audio_recipe: str | None
    model: str = "resnet18"
    learning_rate: float = 1e-3
    crop_area: tuple[float, float] = (0.08, 1.0)
    mirror: bool = True
    counts: tuple[int, int] | None = None
    train_class_counts: dict[str, int] | None = None
    stored_frames: int | None = None
    by_actor: bool = False


SPECS = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            "demo",
            Path("data/demo"),
            tuple("0123456789"),
            frames=2,
            image_size=32,
            audio_recipe="logmel",
            model="resnet18_thin",
            learning_rate=2e-3,  # few steps, a thin network: 1e-3 learns little, at 4e-3 Adam may destroy an encoder
            crop_area=(0.5, 1.0),  # less of a picture of 32 pixels shows no digit
            mirror=False,  # a mirrored digit is no digit
        ),
        DatasetSpec(
            "CREMAD",
            Path("data/CREMAD"),
            ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD"),
            frames=2,
            image_size=224,
            audio_recipe="logstft",
            counts=(6698, 744),
            train_class_counts={"ANG": 1166, "HAP": 1148, "DIS": 1142, "FEA": 1138, "SAD": 1131, "NEU": 973},
            by_actor=True,
        ),
        DatasetSpec(
            "KineticSound",
            Path("data/KineticSound"),
            None,
            frames=3,
            image_size=224,
            audio_recipe="fbank",
            counts=(14799, 2597),
            stored_frames=10,
        ),
        DatasetSpec("folder", Path("data/folder"), None, frames=2, image_size=224, audio_recipe=None),
    )
}


def get_spec(name: str) -> DatasetSpec:
    """The spec called `name`. Raises `UserError` naming the allowed ones."""
    if name not in SPECS:
        raise UserError(f"--dataset {name}: unknown data set; allowed: {', '.join(SPECS)}")
    return SPECS[name]
