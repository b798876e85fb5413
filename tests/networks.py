"""Networks as train.py builds them, without a folder."""

from dataset.specs import Modality, get_spec
from models import MultimodalClassifier, build_model

AUDIO, VIDEO = get_spec("folder").modalities
TEXT = Modality("text", "array", "text")
SHAPES = {"audio": (33, 20), "text": (7,)}


def network(
    classes: int = 3, encoder: str = "resnet18_thin", fusion: str = "concat", three: bool = False, **options
) -> MultimodalClassifier:
    """Audio (33 x 20) and video, with `three` also vectors of 7 numbers."""
    modalities = (AUDIO, VIDEO, *([TEXT] if three else []))
    return build_model(modalities, SHAPES, classes, encoder, fusion, **options)
