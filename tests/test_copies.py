"""The scripts as texts: self-contained, and the same wherever they do the same."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = ["msf.py", "cmsf_ssl.py", "cmsf_semi.py", "mnn.py", "eval_linear.py"]


def shared_parts(name):
    """Name -> text of the functions that read the command line, and of the functions and classes
    after the method's section, but for main."""
    head, _, tail = (ROOT / name).read_text().partition("# ======== networks")
    pieces = [piece for piece in head.split("\n\n\n") if piece.startswith("def parse_")]
    parts = {}
    for part in pieces + tail.split("\n\n\n"):
        definition = re.search(r"^(?:def|class) (\w+)", part, re.M)
        if definition and definition[1] != "main":
            parts[definition[1]] = part
    return parts


def test_outside_of_the_method_a_part_has_the_same_text_in_all_scripts():
    texts = shared_parts("cmsf_semi.py")  # it has the parts of msf.py, and chooses labels
    for name in NAMES:
        parts = shared_parts(name)
        if name == "eval_linear.py":
            expected = {"ImageData", "build_backbone", "random_crop", "choose_labels"}
        else:
            expected = shared_parts("msf.py").keys()
        assert expected | {"parse_groups"} <= parts.keys()
        for part in parts.keys() & texts.keys():
            assert parts[part] == texts[part], f"{part} of {name}"


@pytest.mark.parametrize("name", NAMES)
def test_a_script_needs_no_other_and_says_what_it_needs(name):
    """`uv run` reads the line of its dependencies."""
    text = (ROOT / name).read_text()
    imports = re.findall(r"^\s*(?:import|from) (\w+)", text, re.M)
    assert "torch" in imports
    assert not {f"{module}.py" for module in imports} & set(NAMES)
    dependencies = re.search(r"^# dependencies = \[(.*)\]$", text, re.M)[1]
    needed = dependencies.replace('"', "").split(", ")
    assert sorted(needed) == sorted((ROOT / "requirements.txt").read_text().split())
