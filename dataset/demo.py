"""`python -m dataset.demo`: generate the demo dataset (dataset/prepare/demo.py)."""

from dataset.prepare.demo import ensure_demo, main
from utils.errors import run_main

__all__ = ["ensure_demo", "main"]

if __name__ == "__main__":
    run_main(main)
