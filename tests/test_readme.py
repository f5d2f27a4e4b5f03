"""What README says: its commands parse, its links lead somewhere, its examples run."""

import re
import shlex
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
from scripts import METHODS, labelled_pictures, picture, tiny

import eval_linear
import msf

ROOT = Path(eval_linear.__file__).parent
TEXT = (ROOT / "README.md").read_text()
SCRIPTS = {f"{script.__name__}.py": script for script in [*METHODS, eval_linear]}
COMMAND = re.compile(
    r"(?:python|torchrun [^`|\n]*?) (\w+\.py)((?: (?!\.\.\.)[^\s`|#$]+)*)(?![^`|\n]*\$)"
)
COMMANDS = sorted({found for found in COMMAND.findall(TEXT) if found[0] in SCRIPTS})


def test_commands_were_found():
    assert len(COMMANDS) > 12 and {script for script, _ in COMMANDS} == set(SCRIPTS)


@pytest.mark.parametrize("name, words", COMMANDS)
def test_a_command_is_understood(name, words, monkeypatch):
    words = [word for word in shlex.split(words) if word != "--help"]
    if name == "eval_linear.py":
        tyro.cli(eval_linear.Args, args=words)
        return
    monkeypatch.setattr("sys.argv", [name, *words])
    script = SCRIPTS[name]
    script.check_args(script.parse_args(), 1)


def test_links_lead_somewhere():
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", TEXT, flags=re.S), re.M)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(#([^)]*)\)", TEXT)
    assert len(links) > 1 and set(links) <= anchors
    for path in re.findall(r"\]\(([\w./]+)\)", TEXT):
        assert (ROOT / path).exists()


def example(start):
    """The block of Python in README that begins so."""
    return re.search(rf"```python\n({re.escape(start)}.*?)```", TEXT, re.S)[1]


def changed(script, pattern, new):
    """A script with one place, found by a pattern, replaced."""
    source = (ROOT / f"{script}.py").read_text()
    source, count = re.subn(pattern, lambda _: new, source, flags=re.M | re.S)
    assert count == 1
    module = types.ModuleType(f"changed_{script}")
    module.__file__ = f"changed_{script}.py"
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    return module


def indented(text, by):
    return "".join(f"{' ' * by}{line}\n" for line in text.splitlines())


def test_an_encoder_of_ones_own_trains_and_is_judged():
    block = example("from torchvision.models import mobilenet")
    pattern = r"^def build_backbone\(.*?\n\n\n"
    labelled_pictures()
    changed("msf", pattern, f"{block}\n\n").main(tiny(msf, image_size=32))
    judge = changed("eval_linear", pattern, f"{block}\n\n")
    results = judge.main(judge.Args(checkpoint="runs/a/last.pt", epochs=1, num_workers=0))
    assert set(results) == {"1-NN", "20-NN", "200-NN", "linear"}


def test_a_constraint_of_ones_own_trains():
    block = example("# in main of cmsf_semi.py")
    script = changed(
        "cmsf_semi", r"^    train.labels = choose_labels\([^\n]*\n", indented(block, 4)
    )
    for video in ("a", "b"):
        for frame in range(8):
            picture(f"photos/{video}/{frame}.jpg")
    result = script.main(tiny(script))
    assert 0 < result["loss"] < 4 and result["knn"] is None
    given = torch.load(result["checkpoint"], weights_only=True)["model"]["given_labels"]
    assert given.tolist() == [0] * 8 + [1] * 8


def test_mixing_inside_msf_trains():
    block = example("# in MSF.forward")
    script = changed("msf", r"^        loss = mean_shift_loss\([^\n]*\n", indented(block, 8))
    labelled_pictures()
    assert 0 < script.main(tiny(script))["loss"] < 4


def test_the_features_of_a_run_are_used(monkeypatch):
    labelled_pictures()
    msf.main(replace(tiny(msf), run_name="NAME"))
    picture("photo.jpg", side=50)
    names = {}
    exec(example("import torch\nimport msf"), names)
    assert names["features"].shape == (1, 512)
