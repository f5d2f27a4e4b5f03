"""What README says: its commands parse, its links lead somewhere, its example of a constraint trains."""

import re
import shlex
import subprocess
import types

import pytest
import torch
import tyro
from conftest import ROOT

import cmsf_semi
import cmsf_ssl
import eval_linear
import mnn
import msf

TEXT = (ROOT / "README.md").read_text()
SCRIPTS = {f"{script.__name__}.py": script for script in (msf, cmsf_ssl, cmsf_semi, mnn, eval_linear)}
COMMAND = re.compile(r"(?:python|torchrun [^`|\n]*?) (\w+\.py)((?: (?!\.\.\.)[^\s`|#$]+)*)(?![^`|\n]*\$)")
COMMANDS = sorted({(script, words) for script, words in COMMAND.findall(TEXT) if script in SCRIPTS})


def test_commands_were_found():
    assert len(COMMANDS) > 12 and {script for script, _ in COMMANDS} == set(SCRIPTS)


@pytest.mark.parametrize("script, words", COMMANDS)
def test_a_command_of_the_readme_is_understood(script, words):
    args = tyro.cli(SCRIPTS[script].Args, args=[word for word in shlex.split(words) if word != "--help"])
    if script != "eval_linear.py" and not args.resume:
        SCRIPTS[script].resolve(args)


def test_links_within_the_readme_lead_somewhere():
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", TEXT, flags=re.S), re.M)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(#([^)]*)\)", TEXT)
    assert len(links) > 5 and set(links) <= anchors


@pytest.mark.parametrize("script", ["cmsf_ssl.py", "cmsf_semi.py", "mnn.py"])
def test_the_length_of_the_differences_is_as_told(script):
    lines = subprocess.run(["diff", "msf.py", script], cwd=ROOT, capture_output=True, text=True).stdout
    gone, new = (len(re.findall(f"^{sign}", lines, re.M)) for sign in "<>")
    assert f"| `diff msf.py {script}` | {gone}, {new} |" in TEXT


def test_the_constraint_in_the_readme_trains():
    """Its two parts are put where its comments say; from then on neighbours are of one video."""
    block = re.search(r"```python\n(# at the end of MSF.__init__.*?)```", TEXT, re.S)[1]
    at_init, in_forward = (part.splitlines()[1:] for part in block.strip().split("\n\n"))
    source = (ROOT / "msf.py").read_text()
    for pattern, lines, keep in (
        (r"( {8}self\.args, self\.bank = .*\n)", at_init, r"\1"),
        (r" {8}neighbors = nearest_neighbors(?:.*\n)+? {8}pure = .*\n", in_forward, ""),
    ):
        text = keep + "".join(f"        {line}\n" for line in lines).replace("\\", r"\\")
        source, count = re.subn(pattern, text, source)
        assert count == 1
    script = types.ModuleType("videos")
    script.__file__ = "videos.py"
    exec(compile(source, "videos.py", "exec"), script.__dict__)
    videos = torch.arange(1437) // 50
    torch.save(videos, "videos.pt")
    script.nearest_neighbors, found = lambda *given: found.append(msf.nearest_neighbors(*given)) or found[-1], []
    script.MSF, models = (lambda args, build=script.MSF: models.append(build(args)) or models[0]), []
    kept = []
    script.label_purity = lambda neighbor_labels, labels: kept.append(neighbor_labels) or msf.label_purity(
        neighbor_labels, labels)
    result = script.main(script.Args(epochs=1, knn_every=0, bank_size=1408, batch_size=64))
    assert 0 < result["loss"] < 4 and len(models[0].videos) == 1437
    last, steps = found[21], 1437 // 64  # of the last step, [64, 5]; the bank holds the whole epoch
    images = models[0].bank.indices
    own = images[64 * (steps - 1) :][:64]
    assert ((last < 0) | (videos[images[last]] == videos[own][:, None])).all()
    assert (found[0] < 0).any() and (last >= 0).float().mean() > 0.99
    assert (kept[0] < 0).any()
