"""From raw files to batches on the device. Facts about data sets (classes, frames, audio shapes) live here only."""
