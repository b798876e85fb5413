"""Tests are of the CPU, on a machine with GPUs too, but for those that need one."""

import os
import sys

import pytest
from helpers import bare_pictures, make_folder


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="let tests see the GPUs: for those that need one, chosen by -k")


def pytest_configure(config):
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before the first test imports PyTorch


@pytest.fixture(scope="session", autouse=True)
def _bare_pictures():
    """See `bare_pictures`; tests/test_figures.py draws, `drawn` below lets a run draw, and so does a process."""
    if "torch" not in sys.modules:  # no test of this session trains
        yield
        return
    with bare_pictures():
        yield


@pytest.fixture
def drawn(monkeypatch):
    """Runs of this test end in their true pictures."""
    from utils import plots, summary

    for name in ("plot_curves", "plot_confusion"):
        monkeypatch.setattr(summary, name, getattr(plots, name))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """34 training and 15 test clips of three classes, for the files that want no other folder."""
    return make_folder(tmp_path_factory.mktemp("data"), train=34, test=15)
