"""What README says: its commands parse, its links lead somewhere, its example trains."""

import re
import shlex
import types
from pathlib import Path

import pytest
import tyro
from scripts import METHODS, labelled_pictures, small_backbone, tiny

import eval_linear

ROOT = Path(eval_linear.__file__).parent
TEXT = (ROOT / "README.md").read_text()
SCRIPTS = {f"{script.__name__}.py": script for script in [*METHODS, eval_linear]}
# "python" or "torchrun ..." and a script, and its arguments; not if a shell variable is in them.
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


def test_links_within_the_readme_lead_somewhere():
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", TEXT, flags=re.S), re.M)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(#([^)]*)\)", TEXT)
    assert len(links) > 5 and set(links) <= anchors


def test_mixing_inside_msf_trains():
    """The lines of README in place of the one that it names."""
    block = re.search(r"# in MSF.forward, for the line `loss = ...`\n(.*?)```", TEXT, re.S)
    lines = "".join(f"        {line}\n" for line in block[1].splitlines())
    source = (ROOT / "msf.py").read_text()
    changed, count = re.subn(r"        loss = mean_shift_loss\(.*\n", lines, source)
    assert count == 1
    script = types.ModuleType("mixed")
    script.__file__ = "mixed.py"
    exec(compile(changed, "mixed.py", "exec"), script.__dict__)
    script.build_backbone = small_backbone
    labelled_pictures()
    assert 0 < script.main(tiny(script))["loss"] < 4
