import os
import sys
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are for the CPU, where results repeat bit for bit
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, where runs/ and data/ start out missing."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
