"""The scripts that are not yet rewritten are copies where they say the same."""

import ast
import itertools

import pytest
from conftest import ROOT

NAMES = ("cmsf_ssl.py", "cmsf_semi.py", "mnn.py", "eval_linear.py")
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
