"""Alias of `python -m report`, for old commands."""

import runpy

if __name__ == "__main__":
    runpy.run_module("report", run_name="__main__", alter_sys=True)
