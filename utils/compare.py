"""The former name of `python -m report.compare`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("report.compare", run_name="__main__", alter_sys=True)
