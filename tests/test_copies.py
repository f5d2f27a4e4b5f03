"""The scripts as texts: self-contained, and the same wherever they do the same."""

import ast
import re
from pathlib import Path

import pytest
from scripts import METHODS

ROOT = Path(__file__).parent.parent
NAMES = ["msf.py", "cmsf_ssl.py", "cmsf_semi.py", "mnn.py", "eval_linear.py"]
METHOD_NAMES = [f"{script.__name__}.py" for script in METHODS]


def shared_parts(name):
    """Name -> text of the functions and classes after the method's section, but for main."""
    text = (ROOT / name).read_text()
    first_line = text[: text.index("# ======== networks")].count("\n")
    parts = {}
    for node in ast.parse(text).body:
        is_definition = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        if is_definition and node.lineno > first_line and node.name != "main":
            parts[node.name] = ast.get_source_segment(text, node)
    return parts


@pytest.mark.parametrize("name", METHOD_NAMES[1:])
def test_outside_of_the_method_the_text_is_that_of_msf(name):
    ours = shared_parts(name)
    for function, text in shared_parts("msf.py").items():
        assert ours[function] == text, function


def test_what_eval_linear_shares_is_that_text_too():
    ours = shared_parts("eval_linear.py")
    theirs = shared_parts("cmsf_semi.py")
    assert {"ImageData", "build_backbone", "random_crop", "choose_labels"} <= ours.keys()
    for function in ours.keys() & theirs.keys():
        assert ours[function] == theirs[function], function


@pytest.mark.parametrize("name", NAMES)
def test_no_script_imports_another(name):
    imports = re.findall(r"^\s*(?:import|from) (\w+)", (ROOT / name).read_text(), re.M)
    assert "torch" in imports
    assert not {f"{module}.py" for module in imports} & set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_copied_file_says_what_it_needs(name):
    """`uv run` reads these lines."""
    header = re.search(r"^# dependencies = \[(.*)\]$", (ROOT / name).read_text(), re.M)
    needed = header[1].replace('"', "").split(", ")
    assert sorted(needed) == sorted((ROOT / "requirements.txt").read_text().split())
