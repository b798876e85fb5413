"""Tests are of the CPU, on a machine with GPUs too, but for those that need one."""

import os

import pytest
from helpers import make_folder


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="let tests see the GPUs: for those that need one, chosen by -k")


def pytest_configure(config):
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before the first test imports PyTorch


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """34 training and 15 test clips of three classes, for the files that want no other folder."""
    return make_folder(tmp_path_factory.mktemp("data"), train=34, test=15)
