"""What README says: its commands parse, its links lead somewhere."""

import re
import shlex

import pytest
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
def test_a_command_of_the_readme_is_understood(script, words, monkeypatch):
    words = [word for word in shlex.split(words) if word != "--help"]
    if script == "msf.py":
        monkeypatch.setattr("sys.argv", [script, *words])
        msf.check_args(msf.parse_args(), 1)
        return
    args = tyro.cli(SCRIPTS[script].Args, args=words)
    if script != "eval_linear.py" and not args.resume:
        SCRIPTS[script].resolve(args)


def test_links_within_the_readme_lead_somewhere():
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", TEXT, flags=re.S), re.M)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(#([^)]*)\)", TEXT)
    assert len(links) > 5 and set(links) <= anchors
