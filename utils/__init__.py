"""Helpers that know nothing of the method: errors, files, seeds, metrics, logs, checkpoints, pictures."""
