"""What README says: its commands parse, its links lead somewhere, its examples run."""

import re
import shlex
import textwrap
import types
from pathlib import Path

from scripts import METHODS, checkpoint, labelled_pictures, picture, tiny

import eval_linear
import msf

ROOT = Path(eval_linear.__file__).parent
TEXT = (ROOT / "README.md").read_text()
SCRIPTS = {f"{script.__name__}.py": script for script in [*METHODS, eval_linear]}
# python or torchrun with its options, a script, and words up to ` or | or a comment
COMMAND = re.compile(r"(?:python|torchrun [^`|\n]*?) (\w+\.py)((?: [^\s`|#]+)*)")


def test_commands_are_understood(monkeypatch):
    commands = sorted(set(COMMAND.findall(TEXT)))
    assert len(commands) > 12 and {script for script, _ in commands} == set(SCRIPTS)
    for name, words in commands:
        words = [word for word in shlex.split(words) if word != "--help"]
        monkeypatch.setattr("sys.argv", [name, *words])
        if name == "eval_linear.py":
            eval_linear.parse_groups(eval_linear.Args())
        else:
            script = SCRIPTS[name]
            script.check_args(script.parse_args(), 1)


def test_links_lead_somewhere():
    titles = re.findall(r"^#+ (.*)$", TEXT, re.M)
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
    exec(source, module.__dict__)
    return module


def test_an_encoder_of_ones_own_trains_and_is_judged():
    block = example("from torchvision.models import mobilenet") + "\n\n"
    pattern = r"^def build_backbone\(.*?\n\n\n"
    labelled_pictures()
    changed("msf", pattern, block).main(tiny(msf, image_size=32))
    judge = changed("eval_linear", pattern, block)
    results = judge.main(judge.Args(checkpoint="runs/a/last.pt", epochs=1, num_workers=0))
    assert set(results) == {"1-NN", "20-NN", "200-NN", "linear"}


def test_a_constraint_of_ones_own_trains():
    block = textwrap.indent(example("# in main of cmsf_semi.py"), 4 * " ")
    script = changed("cmsf_semi", r"^    train.labels = choose_labels\([^\n]*\n", block)
    for i in range(8):
        picture(f"photos/a/{i}.jpg")
        picture(f"photos/b/{i}.jpg")
    result = script.main(tiny(script))
    assert 0 < result["loss"] < 4 and result["knn"] is None
    assert checkpoint()["model"]["given_labels"].tolist() == [0] * 8 + [1] * 8


def test_mixing_inside_msf_trains():
    block = textwrap.indent(example("# in MSF.forward"), 8 * " ")
    script = changed("msf", r"^        loss = mean_shift_loss\([^\n]*\n", block)
    labelled_pictures()
    assert 0 < script.main(tiny(script))["loss"] < 4


def test_the_features_of_a_run_are_used():
    labelled_pictures()
    msf.main(tiny(msf, run_name="NAME"))
    picture("photo.jpg", side=50)
    names = {}
    exec(example("import torch\nimport msf"), names)
    assert names["features"].shape == (1, 512)
