"""The repository as a whole: who imports whom, what lies at the root, and that nothing declared is left unread.

All of it reads the files as syntax trees and runs none of them.
"""

import ast
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

NOUNS = ("extractor", "lift")
SCRIPTS = ("lift_extractor", "train_lift", "eval_spair", "eval_davis", "eval_tokencut", "eval_visualize_feats", "hubconf")
FILES = {"README.md", "LICENSE", "Makefile", "requirements.txt", "requirements-dev.txt", "pyproject.toml", ".gitignore"}
FOLDERS = {"pretrained", "assets", "tests", "benchmarks", ".ci"}
CODE = sorted(p for p in (*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("pretrained/*.py")))
TESTS = sorted(ROOT.glob("tests/*.py"))
TREES = {path: ast.parse(path.read_text()) for path in (*CODE, *TESTS)}
EVERYWHERE = {path.stem for path in TREES}

# what users call, or torch.hub reads, and none of our own files need
OFFERED = {"ViTLiFTExtractor", "extract_descriptors_iterative_lift", "extract_saliency_maps", "lift_module", "dependencies"}


def label(path, node=None):
    where = path.relative_to(ROOT).as_posix()
    return where if node is None else f"{where}:{node.lineno}"


def named(*paths):
    """One test case a file, for a failure that says which."""
    return [pytest.param(path, id=path.stem) for path in paths]


# ---- who imports whom -----------------------------------------------------------------------------------------------


def imported(tree):
    """First parts of the names of all modules that a tree imports, wherever it does."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "." * node.level).split(".")[0])
    return found


@pytest.mark.parametrize("path", named(*sorted(ROOT.glob("*.py"))))
def test_scripts_import_the_nouns_and_nouns_neither_scripts_nor_each_other(path):
    allowed = set() if path.stem in NOUNS else set(NOUNS)
    assert imported(TREES[path]) & EVERYWHERE <= allowed


def test_hubconf_imports_nothing_by_a_name_that_its_caller_may_have():
    assert not imported(TREES[ROOT / "hubconf.py"]) & EVERYWHERE


# ---- what lies at the root ------------------------------------------------------------------------------------------


def test_python_files_at_the_root():
    """The nouns and the verbs: no utils.py, common.py, models.py to clash with another repository's and to fill up."""
    assert {path.stem for path in ROOT.glob("*.py")} == {*NOUNS, *SCRIPTS}


def test_root_holds_what_the_layout_names_and_nothing_else():
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a git checkout, so nobody knows which files belong to it")
    tracked = {Path(line).parts[0] for line in git.stdout.splitlines()}
    assert tracked == FILES | FOLDERS | {f"{name}.py" for name in (*NOUNS, *SCRIPTS)}


# ---- flags ----------------------------------------------------------------------------------------------------------


def declared(tree):
    """{name in the Namespace: its add_argument call} of a tree; `add = parser.add_argument` may shorten the name."""
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    short = {node.targets[0].id for node in assigned if getattr(node.value, "attr", "") == "add_argument"}
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (
            getattr(node.func, "attr", "") == "add_argument" or getattr(node.func, "id", "") in short
        ):
            flags = [arg.value for arg in node.args]
            first = next((flag for flag in flags if flag.startswith("--")), flags[0])
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            found[given["dest"].value if "dest" in given else first.lstrip("-").replace("-", "_")] = node
    return found


def flags_read(tree):
    """{name: node} of all that a tree reads off `args` (as a variable or as an attribute)."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    return {node.attr: node for node in nodes if getattr(node.value, "id", getattr(node.value, "attr", "")) == "args"}


def unread(tree):
    """Names of the flags that a tree declares and does not read; checking a range by getattr is no reading."""
    return sorted(declared(tree).keys() - flags_read(tree).keys())


@pytest.mark.parametrize("path", named(*CODE))
def test_every_flag_is_read_and_every_flag_read_exists(path):
    """Where it is declared; what is read may also come from a noun, or be set on `args` there."""
    tree = TREES[path]
    assert not [f"{label(path, declared(tree)[name])} --{name}" for name in unread(tree)]
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    known = {node.attr for node in nodes}.union(declared(tree), *(declared(TREES[ROOT / f"{noun}.py"]) for noun in NOUNS))
    assert not [f"{label(path, node)} args.{name}" for name, node in flags_read(tree).items() if name not in known]


def test_an_unread_flag_is_found():
    tree = ast.parse("add = p.add_argument\nadd('-x', '--first-one')\np.add_argument('--b', dest='c')\nprint(args.first_one, b)")
    assert declared(tree).keys() == {"first_one", "c"} and unread(tree) == ["c"]


# ---- names ----------------------------------------------------------------------------------------------------------


def top_level(tree):
    """{name: node} of the functions, classes and variables at the top of a module; imports are ruff's."""
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] = node
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            found |= {n.id: node for n in ast.walk(target) if isinstance(n, ast.Name)} if target else {}
    return found


def methods(tree):
    """{name: node} of the methods of a tree's classes."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {node.name: node for c in classes for node in c.body if isinstance(node, ast.FunctionDef)}


def mentioned(tree):
    """All names a tree reads: variables, attributes, imported names, keywords, and words of strings such as getattr's."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found.add(node.id)
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        if isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)
    return found


MENTIONED = {path: mentioned(tree) for path, tree in TREES.items()}


def unused(names, *readers):
    """Those of {name: node} that are in none of the sets `readers`, dunders and tests apart."""
    known = set().union(*readers)
    return {name: node for name, node in names.items() if name not in known and not name.startswith(("__", "test_", "pytest_"))}


@pytest.mark.parametrize("path", named(*CODE, *TESTS))
def test_every_name_is_used(path):
    """By code other than tests, apart from what is offered to users and the slow versions that tests compare with."""
    readers = CODE if path.parent == ROOT else TREES
    names = top_level(TREES[path]) | (methods(TREES[path]) if path in CODE else {})
    found = unused(names, *(MENTIONED[reader] for reader in readers))
    assert not [f"{label(path, node)} {name}" for name, node in found.items() if name not in OFFERED]


def test_an_unused_name_is_found():
    tree = ast.parse("A, b = 1, 2\nC: int = b\ndef f(): return f2()\nclass K:\n    def m(self): return getattr(self, 'C')")
    assert unused(top_level(tree) | methods(tree), mentioned(tree)).keys() == {"A", "f", "K", "m"}


def test_what_is_offered_exists():
    names = set().union(*(top_level(TREES[path]).keys() | methods(TREES[path]).keys() for path in CODE))
    assert names >= OFFERED
