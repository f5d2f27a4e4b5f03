import os
import signal
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


def stop_at(step, script, monkeypatch):
    """SIGTERM while the batch of this step is drawn; in memory, that is when the step begins."""
    original = script.step_indices

    def step_indices(n, args, start, rank, world):
        for number, indices in enumerate(original(n, args, start, rank, world), start + 1):
            if number == step:
                monkeypatch.setattr(script, "step_indices", original)
                signal.raise_signal(signal.SIGTERM)
            yield indices

    monkeypatch.setattr(script, "step_indices", step_indices)
