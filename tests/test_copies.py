"""The scripts as texts: self-contained, and the same wherever they do the same."""

import ast
import itertools
import re
import subprocess
from pathlib import Path

import pytest
from scripts import METHODS

ROOT = Path(__file__).parent.parent
NAMES = ["msf.py", "cmsf_ssl.py", "cmsf_semi.py", "mnn.py", "eval_linear.py"]


def shared_parts(text):
    """Name -> text of the functions and classes outside of the method's section, but for main."""
    parts = {}
    section = "before the first"
    lines = text.splitlines()
    sections = {
        i: match[1] for i, line in enumerate(lines) if (match := re.match(r"# =+ (.*?) =+$", line))
    }
    for node in ast.parse(text).body:
        before = [name for i, name in sections.items() if i < node.lineno]
        section = before[-1] if before else "before the first"
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name == "main":
            continue
        if section != "before the first" and not section.startswith("method"):
            parts[node.name] = ast.get_source_segment(text, node)
    return parts


@pytest.mark.parametrize("a, b", list(itertools.combinations([s.__name__ for s in METHODS], 2)))
def test_what_has_the_same_name_is_the_same_text(a, b):
    a = shared_parts((ROOT / f"{a}.py").read_text())
    b = shared_parts((ROOT / f"{b}.py").read_text())
    shared = a.keys() & b.keys()
    assert {"ImageData", "strong_view", "knn_accuracy"} <= shared
    for name in shared:
        assert a[name] == b[name], name


@pytest.mark.parametrize("script", METHODS)
def test_the_sections_come_in_their_order(script):
    text = Path(script.__file__).read_text()
    sections = re.findall(r"^# =+ (\w+).* =+$", text, re.M)
    assert sections == ["method", "networks", "data", "views", "training"]


@pytest.mark.parametrize("name", NAMES)
def test_no_script_imports_another(name):
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            modules = [node.module]
        assert not {f"{module}.py" for module in modules} & set(NAMES)


def test_nothing_else_lies_at_the_top():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {path.split("/")[0] for path in files.splitlines()}
    visible = {name for name in top if not name.startswith(".")}
    assert visible <= {*NAMES, "README.md", "requirements.txt", "LICENSE", "tests"}
