"""From raw files to batches on the device. Facts about datasets (classes, frames, audio shapes) live here only."""
