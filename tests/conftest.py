import os
import sys
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a CPU, results repeat bit for bit
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scripts import METHODS, small_backbone  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; run by -m long only")


def pytest_collection_modifyitems(config, items):
    if "long" not in config.option.markexpr:
        skip = pytest.mark.skip(reason="long: run by -m long")
        for item in items:
            if "long" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, where runs/ and data/ start out missing."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def small_networks(monkeypatch):
    """The scripts build a backbone of one convolution: a run takes a fraction of a second."""
    for script in METHODS:
        monkeypatch.setattr(script, "build_backbone", small_backbone)
