"""The repository as a whole: who imports whom, what lies at the root, and nothing left unread.

All of it reads the files as syntax trees and runs none of them, but for `--help`.
"""

import ast
import hashlib
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

# each imports only those before it
GROUND = ("files", "command", "photos", "loading")
NOUNS = ("backbones", "dense", "extractor", "lift", "features")
SCRIPTS = (
    "lift_extractor",
    "train_lift",
    "eval_spair",
    "eval_davis",
    "eval_tokencut",
    "eval_segmentation",
    "eval_visualize_feats",
    "export_onnx",
)
# a script's own further files, each importing only those before it
PARTS = {
    "lift_extractor": ("extraction",),
    "train_lift": ("feature_cache", "objectives", "training_run"),
    "eval_davis": ("davis_scores",),
    "eval_tokencut": ("voc_coco",),
    "eval_segmentation": ("segmentation_data",),
}
UPSAMPLERS = {"joint_bilateral"}  # for --upsample: nobody imports it
EVERY_PART = {part for parts in PARTS.values() for part in parts}
AT_ROOT = {*GROUND, *NOUNS, *SCRIPTS, *EVERY_PART, *UPSAMPLERS, "hubconf"}
LONGEST = 750  # lines of a file at the root
FILES = {
    "README.md",
    "LICENSE",
    "Makefile",
    "requirements.txt",
    "requirements-dev.txt",
    "pyproject.toml",
    ".gitignore",
    "demo.ipynb",
}
FOLDERS = {"pretrained", "assets", "tests", "benchmarks", "docs", ".ci"}

CODE = sorted([*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("pretrained/*.py")])
TESTS = sorted(ROOT.glob("tests/*.py"))
TREES = {path: ast.parse(path.read_text()) for path in (*CODE, *TESTS)}
EVERYWHERE = {path.stem for path in TREES}

# what users call, or torch or torch.hub do, and none of our own files need
OFFERED = {
    "forward",
    "ViTLiFTExtractor",
    "extract_descriptors",
    "extract_descriptors_iterative_lift",
    "extract_saliency_maps",
    "patch_vit_resolution",
    "_extract_features",
    "get_num_patches",
    "_log_bin",
    "preprocess_pil",
    "p",
    "my_extractor",
    "lift_module",
    "dependencies",
    "denormalize",
}


def label(path, node=None):
    where = path.relative_to(ROOT).as_posix()
    if node is None:
        return where
    return f"{where}:{node.lineno}"


def named(*paths):
    """One test case a file, for a failure that says which."""
    return [pytest.param(path, id=path.stem) for path in paths]


# ---- who imports whom ---------------------------------------------------------------------------


def imported(tree):
    """First parts of the names of all modules that a tree imports, wherever it does."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.add(alias.name.split(".")[0])
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def may_import(name):
    """Which of our own files a file at the root may import."""
    if name == "hubconf":
        return set()
    below = [*GROUND, *NOUNS]
    if name in below:
        return set(below[: below.index(name)])
    for parts in PARTS.values():
        if name in parts:
            return {*below, *parts[: parts.index(name)]}
    return {*below, *PARTS.get(name, ())}


@pytest.mark.parametrize("path", named(*sorted(ROOT.glob("*.py"))))
def test_files_import_only_what_lies_below_them(path):
    assert imported(TREES[path]) & EVERYWHERE <= may_import(path.stem)


# ---- what lies at the root ----------------------------------------------------------------------


def test_python_files_at_the_root():
    """No utils.py, common.py or models.py to clash with another repository's and to fill up."""
    assert {path.stem for path in ROOT.glob("*.py")} == AT_ROOT


@pytest.mark.parametrize("path", named(*sorted(ROOT.glob("*.py"))))
def test_no_file_at_the_root_is_too_long(path):
    assert len(path.read_text().splitlines()) <= LONGEST


def test_root_holds_what_the_layout_names_and_nothing_else():
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a git checkout, so nobody knows which files belong to it")
    tracked = {Path(line).parts[0] for line in git.stdout.splitlines()}
    assert tracked == FILES | FOLDERS | {f"{name}.py" for name in AT_ROOT}


# ---- help ---------------------------------------------------------------------------------------

HEAVY = ("torch", "torchvision", "timm", "cv2", "scipy", "sklearn", "numpy", "PIL")


@pytest.mark.parametrize("name", [*SCRIPTS, "extractor"])
def test_help_needs_no_heavy_import(name):
    """These take seconds; the time itself is not asserted, but printed where it fails."""
    began = time.perf_counter()
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{name}.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path('{name}.py', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        f"    loaded = [name for name in {HEAVY} if name in sys.modules]\n"
        "    raise SystemExit(f'loaded {loaded}' if loaded else stop.code)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, f"{ran.stderr} after {time.perf_counter() - began:.1f} s"
    assert "--model_type" in ran.stdout


# ---- flags --------------------------------------------------------------------------------------


def declared(tree):
    """{name in the Namespace: its add_argument call} of a tree.

    `add = parser.add_argument` may shorten the name.
    """
    short = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and getattr(node.value, "attr", "") == "add_argument":
            short.add(node.targets[0].id)

    found = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        method = getattr(node.func, "attr", "")
        function = getattr(node.func, "id", "")
        if method != "add_argument" and function not in short:
            continue
        flags = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        if not flags:
            continue
        first = flags[0]
        for flag in reversed(flags):
            if flag.startswith("--"):
                first = flag
        name = first.lstrip("-").replace("-", "_")
        for keyword in node.keywords:
            if keyword.arg == "dest":
                name = keyword.value.value
        found[name] = node
    return found


def flags_read(tree):
    """{name: node} of all that a tree reads off `args` (as a variable or as an attribute)."""
    found = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
            continue
        owner = getattr(node.value, "id", getattr(node.value, "attr", ""))
        if owner == "args":
            found[node.attr] = node
    return found


def flags_set(tree):
    """Names that a tree sets as attributes, `args.tau = ...` among them."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def unread(tree):
    """Flags that a tree declares and does not read; a check of a range is no reading."""
    return sorted(declared(tree).keys() - flags_read(tree).keys())


# declared in command.py, read by the nouns
READ_ELSEWHERE = {
    "command": set(declared(TREES[ROOT / "command.py"])),
}


@pytest.mark.parametrize("path", named(*CODE))
def test_every_flag_is_read_and_every_flag_read_exists(path):
    """Where it is declared; what is read may also come from the ground, or be set on `args`."""
    tree = TREES[path]
    forgotten = set(unread(tree)) - READ_ELSEWHERE.get(path.stem, set())
    assert not [f"{label(path, declared(tree)[name])} --{name}" for name in sorted(forgotten)]

    known = flags_set(tree) | set(declared(tree)) | set(declared(TREES[ROOT / "command.py"]))
    for name, node in flags_read(tree).items():
        assert name in known, f"{label(path, node)} args.{name}"


def test_what_the_ground_declares_is_read_by_the_ground_or_the_nouns():
    read = set()
    for name in (*GROUND, *NOUNS):
        read |= set(flags_read(TREES[ROOT / f"{name}.py"])) | mentioned(TREES[ROOT / f"{name}.py"])
    assert set(declared(TREES[ROOT / "command.py"])) <= read


def test_an_unread_flag_is_found():
    tree = ast.parse(
        "add = p.add_argument\n"
        "add('-x', '--first-one')\n"
        "p.add_argument('--b', dest='c')\n"
        "print(args.first_one, b)"
    )
    assert declared(tree).keys() == {"first_one", "c"}
    assert unread(tree) == ["c"]


# ---- names --------------------------------------------------------------------------------------


def top_level(tree):
    """{name: node} of the functions, classes and variables at the top; imports are ruff's."""
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] = node
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        for target in targets:
            if target is None:
                continue
            for inner in ast.walk(target):
                if isinstance(inner, ast.Name):
                    found[inner.id] = node
    return found


def methods(tree):
    """{name: node} of the methods of a tree's classes."""
    found = {}
    for owner in ast.walk(tree):
        if not isinstance(owner, ast.ClassDef):
            continue
        for node in owner.body:
            if isinstance(node, ast.FunctionDef):
                found[node.name] = node
    return found


def mentioned(tree):
    """All names a tree reads: variables, attributes, imports, and words such as getattr's."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found.add(node.id)
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        if isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
        word = getattr(node, "value", None)
        if isinstance(node, ast.Constant) and isinstance(word, str):
            found |= {part for part in word.split(":") if part.isidentifier()}  # module:function
    return found


MENTIONED = {path: mentioned(tree) for path, tree in TREES.items()}


def requested(tree):
    """Names of all arguments of a tree's functions: this is how tests ask for fixtures."""
    return {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}


def unused(names, *readers):
    """Those of {name: node} that are in none of the sets `readers`, dunders and tests apart."""
    known = set().union(*readers)
    found = {}
    for name, node in names.items():
        if name not in known and not name.startswith(("__", "test_", "pytest")):
            found[name] = node
    return found


def who_reads(path):
    """The files in which the names of a file may be used."""
    if path.parent != ROOT:
        return list(TREES)
    if path.stem in GROUND or path.stem in NOUNS:
        return CODE
    # many scripts have a `check`, a `table` or an `evaluate`, and none uses another's
    importers = [other for other in CODE if path.stem in imported(TREES[other])]
    return [path, *importers]


@pytest.mark.parametrize("path", named(*CODE, *TESTS))
def test_every_name_is_used(path):
    """By code other than tests, apart from what users are offered and the slow versions."""
    readers = who_reads(path)
    names = top_level(TREES[path])
    if path in CODE:
        names.update(methods(TREES[path]))
    known = [MENTIONED[reader] for reader in readers]
    if path in TESTS:
        known.append(requested(TREES[path]))
    if path.stem in UPSAMPLERS:  # --upsample offers them
        known.append({"upsampler"})
    if path.stem == "hubconf":  # torch.hub offers whatever has no underscore
        known.append({name for name in names if not name.startswith("_")})
    found = unused(names, *known)
    assert not [f"{label(path, found[name])} {name}" for name in found if name not in OFFERED]


def test_a_script_is_read_by_itself_and_by_what_imports_it():
    path = ROOT / "feature_cache.py"
    assert set(who_reads(path)) >= {path, ROOT / "train_lift.py"}
    assert ROOT / "eval_davis.py" not in who_reads(path)


def test_an_unused_name_is_found():
    tree = ast.parse(
        "A, b = 1, 2\n"
        "C: int = b\n"
        "def f(): return f2()\n"
        "class K:\n"
        "    def m(self): return getattr(self, 'C')"
    )
    names = {**top_level(tree), **methods(tree)}
    assert unused(names, mentioned(tree)).keys() == {"A", "f", "K", "m"}


def test_what_is_offered_exists():
    names = set()
    for path in CODE:
        names |= set(top_level(TREES[path])) | set(methods(TREES[path]))
    assert names >= OFFERED


@pytest.mark.parametrize("readme", ["pretrained/README.md"])
def test_the_tables_of_what_ships_name_sizes_and_digests(readme):
    """A row with a file of pretrained/ and a sha256 also has the file's size."""
    rows = []
    for line in (ROOT / readme).read_text().splitlines():
        digest = re.search(r"`([0-9a-f]{64})`", line)
        if not digest:
            continue
        name = re.search(r"`([\w.]+\.(?:pth|safetensors))`", line)[1]
        content = (ROOT / "pretrained" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest[1], name
        assert f"| {len(content):,} |" in line, name
        rows.append(name)
    assert len(rows) >= 2


def test_every_weight_file_that_ships_is_in_the_table():
    text = (ROOT / "pretrained/README.md").read_text()
    for path in (ROOT / "pretrained").iterdir():
        if path.suffix in (".pth", ".safetensors"):
            assert f"`{path.name}`" in text, path.name
