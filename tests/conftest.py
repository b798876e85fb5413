"""Tests are of the CPU, on a machine with GPUs too, but for those that need one."""

import os


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="let tests see the GPUs: for those that need one, chosen by -k")


def pytest_configure(config):
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before the first test imports PyTorch
