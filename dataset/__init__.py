"""Datasets: from raw files to batches on the device. All facts about datasets (classes, frames, shapes) are here."""
