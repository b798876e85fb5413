import utils.threads  # noqa: F401  (before the modules here load PyTorch)
