"""Method-independent helpers: errors, files, seeds, metrics, logs, checkpoints, plots."""
