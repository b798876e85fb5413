"""Alias of `python -m report.compare`, for old commands."""

import runpy

if __name__ == "__main__":
    runpy.run_module("report.compare", run_name="__main__", alter_sys=True)
