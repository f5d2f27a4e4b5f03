"""The scripts as texts: short, self-contained, and copies where they say the same."""

import ast
import itertools
import subprocess

import pytest
from conftest import ROOT

NAMES = ("msf.py", "cmsf_ssl.py", "cmsf_semi.py", "mnn.py", "eval_linear.py")
SCRIPTS = {name: (ROOT / name).read_text() for name in NAMES if (ROOT / name).exists()}
MAY_DIFFER = {"Args", "RECIPES", "main"}


def parts(text):
    """Name -> text of every top-level function, class and constant."""
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        first = min(n.lineno for n in [node, *getattr(node, "decorator_list", [])])
        for target in targets:
            name = getattr(target, "name", None) or getattr(target, "id", None)
            if name:
                found[name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


@pytest.mark.parametrize("a, b", list(itertools.combinations(SCRIPTS, 2)))
def test_parts_of_the_same_name_are_the_same_text(a, b):
    a, b = parts(SCRIPTS[a]), parts(SCRIPTS[b])
    shared = (a.keys() & b.keys()) - MAY_DIFFER
    assert {"augment", "ImageData", "nearest_neighbors"} <= shared
    assert [name for name in sorted(shared) if a[name] != b[name]] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short_and_stands_alone(name):
    lines = SCRIPTS[name].splitlines()
    assert len(lines) < 500 and max(map(len, lines)) <= 100
    for node in ast.walk(ast.parse(SCRIPTS[name])):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [getattr(node, "module", None), *(alias.name for alias in node.names)]
            assert not {f"{module}.py" for module in modules} & set(NAMES)


def test_nothing_else_lies_at_the_top():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {path.split("/")[0] for path in files.split("\n") if path}
    allowed = {*NAMES, "README.md", "requirements.txt", "LICENSE", "tests"}
    assert [name for name in top - allowed if not name.startswith(".")] == []
