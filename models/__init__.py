"""The network: two ResNet-18 trunks, a fusion head and a head per modality."""

from models.classifier import MODELS, AVClassifier, Output
from models.fusion import FUSIONS

__all__ = ["FUSIONS", "MODELS", "AVClassifier", "Output"]
