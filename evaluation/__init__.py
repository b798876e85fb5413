"""Evaluation of a network: metrics of an epoch or a checkpoint, predictions, classification of raw clips, export."""
