"""The network: an encoder and a head per modality, and a fusion head."""

from models.build import MODELS, build_model, check_model
from models.classifier import UNIMODAL, MultimodalClassifier, Output
from models.encoders import ENCODERS, IMAGE_ENCODERS, encoder_list
from models.fusion import FUSIONS, SHARED_HEADS, SLICED

__all__ = ["ENCODERS", "FUSIONS", "IMAGE_ENCODERS", "MODELS", "SHARED_HEADS", "SLICED", "UNIMODAL",
           "MultimodalClassifier", "Output", "build_model", "check_model", "encoder_list"]  # fmt: skip
