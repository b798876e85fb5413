"""The order of the modules, read from their source: imports point downward, train.py stays one short readable file.

Every rule is also broken once in a small tree of its own, so that a rule that stopped seeing anything would fail.
"""

import ast
from pathlib import Path

import pytest
from helpers import REPO

# Each may import what stands before it, and itself. The longest name that fits a module is its place.
ORDER = ("utils", "remix", "models", "dataset", "dataset.prepare", "dataset.build", "balance", "evaluation", "train",
         "report", "benchmarks", "tests")  # fmt: skip
PLACES = {name: place for place, name in enumerate(ORDER)} | {"dataset.demo": ORDER.index("dataset.prepare")}
FORWARDERS = ("utils/report.py", "utils/compare.py")  # commands of earlier versions
MAY_IMPORT_TRAIN = ("report", "benchmarks", "tests")
TRAIN_LINES = 500

# Modalities have names where the paper's two are meant: their specs, the official names in checkpoints, the official
# flags of their losses, heads that are defined for them, files of real sound and pictures, figures for people.
LITERALS = ("audio", "video", "both")
MAY_NAME_THEM = {
    "dataset/specs.py": None,
    "models/checkpoint.py": None,
    "models/fusion.py": ("FiLM", "Gated"),  # in these alone
    "train.py": ("make_parser", "loss_weights"),
    "report/people.py": None,
    "report/study_data.py": ("grid",),  # raw files of a published dataset
    "dataset/prepare": None,
    "benchmarks/media.py": None,  # about the video and audio streams of media files
    "tests": None,
}


def modules(root: Path) -> dict[str, ast.Module]:
    """Every module of the project by its path below `root`, parsed; packages that are not there have none."""
    folders = {name.split(".")[0] for name in ORDER}
    paths = [path for path in root.rglob("*.py") if path.relative_to(root).parts[0].removesuffix(".py") in folders]
    return {path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(paths)}


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def place(module: str) -> int | None:
    """Where a module stands in the order; None for one that is not the project's."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((PLACES[name] for name in names if name in PLACES), None)


def imports(path: str, tree: ast.Module) -> list[tuple[int, str]]:
    """(line, module) of every import, those inside functions too; `from a import b` is a.b, a module or not."""
    package = module_name(path).split(".")
    package = package if path.endswith("__init__.py") else package[:-1]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def faulty_imports(trees: dict[str, ast.Module]) -> list[str]:
    found = []
    for path, tree in trees.items():
        own = module_name(path)
        for line, imported in imports(path, tree):
            if place(imported) is None or path in FORWARDERS:
                continue
            package = own.split(".")[0]
            if place(imported) > place(own):
                found.append(f"{path}:{line}: imports {imported}, which stands above it")
            if imported.split(".")[0] == "train" and package not in (*MAY_IMPORT_TRAIN, "train"):
                found.append(f"{path}:{line}: imports train")
            if package == "remix" and imported.split(".")[0] != "remix":
                found.append(f"{path}:{line}: imports {imported}: remix is installed alone")
    return found


def faulty_train(source: str) -> list[str]:
    """Nested functions, and lambdas but for those in defaults of arguments: they would read a function's locals."""
    found = [] if len(source.splitlines()) <= TRAIN_LINES else [f"train.py: more than {TRAIN_LINES} lines"]
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        for statement in function.body:
            for node in ast.walk(statement):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                    kind = "a lambda" if isinstance(node, ast.Lambda) else f"function {node.name}"
                    found.append(f"train.py:{node.lineno}: {kind} inside {function.name}")
    return found


def faulty_literals(trees: dict[str, ast.Module]) -> list[str]:
    found = []
    for path, tree in trees.items():
        key = next((key for key in MAY_NAME_THEM if path == key or path.startswith(f"{key}/")), None)
        allowed = MAY_NAME_THEM.get(key, ())
        if key is not None and allowed is None:
            continue
        inside = [node for node in tree.body if getattr(node, "name", None) in allowed]
        spared = {id(inner) for node in inside for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in LITERALS and id(node) not in spared:
                found.append(f"{path}:{node.lineno}: {node.value!r}")
    return found


# ------------------------------------------------------------------------------------------------------- this project


@pytest.fixture(scope="module")
def project() -> dict[str, ast.Module]:
    found = modules(REPO)
    assert {"train.py", "remix/decouple.py", "balance/agm.py", "dataset/prepare/raw.py"} <= set(found)
    return found


def test_every_module_has_a_place(project):
    assert [path for path in project if place(module_name(path)) is None] == []
    assert [path.name for path in REPO.glob("*.py")] == ["train.py"]


def test_imports_point_downward(project):
    assert faulty_imports(project) == []


def test_train_is_one_short_file_without_closures():
    assert faulty_train((REPO / "train.py").read_text(encoding="utf-8")) == []


def test_modalities_are_named_by_the_dataset_alone(project):
    assert faulty_literals(project) == []


# -------------------------------------------------------------------------------------------------- every rule, broken


@pytest.mark.parametrize(("path", "source", "fault"), [
    ("utils/a.py", "import remix", "imports remix, which stands above it"),
    ("utils/a.py", "def f():\n    from models.build import build_model", "imports models.build.build_model, which"),
    ("models/a.py", "from dataset.specs import SPECS", "imports dataset.specs.SPECS, which stands above it"),
    ("dataset/clips.py", "from dataset.prepare import raw", "imports dataset.prepare.raw, which stands above it"),
    ("dataset/clips.py", "from .prepare.raw import x", "imports dataset.prepare.raw.x, which stands above it"),
    ("dataset/clips.py", "from . import build", "imports dataset.build, which stands above it"),
    ("dataset/prepare/raw.py", "from .. import build", "imports dataset.build, which stands above it"),
    ("dataset/prepare/__init__.py", "from ..build import x", "imports dataset.build.x, which stands above it"),
    ("dataset/build.py", "import balance.method", "imports balance.method, which stands above it"),
    ("balance/a.py", "import train", "imports train"),
    ("balance/a.py", "if TYPE_CHECKING:\n    from train import Names", "imports train"),
    ("report/a.py", "import benchmarks.common", "imports benchmarks.common, which stands above it"),
    ("train.py", "from report.load import x", "imports report.load.x, which stands above it"),
    ("train.py", "from tests.helpers import run", "imports tests.helpers.run, which stands above it"),
    ("remix/a.py", "from utils.errors import UserError", "imports utils.errors.UserError: remix is installed alone"),
])  # fmt: skip
def test_an_upward_import_is_found(path, source, fault):
    found = faulty_imports({path: ast.parse(source)})
    assert any(fault in text for text in found), found


@pytest.mark.parametrize(("path", "source"), [
    ("dataset/build.py", "from dataset.prepare.demo import ensure_demo\nfrom dataset import clips"),
    ("remix/__init__.py", "from remix.decouple import decouple\nfrom . import difficulty\nimport torch"),
    ("report/a.py", "import train\nfrom balance import METHODS"),
    ("utils/compare.py", "from report.compare import main"),
    ("dataset/demo.py", "from dataset.prepare.demo import main"),
])  # fmt: skip
def test_a_downward_import_is_none(path, source):
    assert faulty_imports({path: ast.parse(source)}) == []


@pytest.mark.parametrize(("source", "fault"), [
    ("def f():\n    x = 1\n    def g():\n        return x\n", "train.py:3: function g inside f"),
    ("def f(x):\n    return lambda: x\n", "train.py:2: a lambda inside f"),
    ("class A:\n    def f(self):\n        class B:\n            def g(self): ...\n", "train.py:4: function g inside f"),
    ("x = 1\n" * (TRAIN_LINES + 1), f"train.py: more than {TRAIN_LINES} lines"),
])  # fmt: skip
def test_a_long_or_nested_train_is_found(source, fault):
    assert fault in faulty_train(source)


def test_a_lambda_that_is_a_default_is_no_closure():
    assert faulty_train("def f(after=lambda: None):\n    after()\n" + "x = 1\n" * 498) == []


@pytest.mark.parametrize(("path", "source"), [
    ("balance/a.py", 'x = {"audio": 1}'),
    ("report/tables.py", 'if kept == "both": ...'),
    ("models/fusion.py", 'NAMES = ("audio",)\nclass FiLM:\n    needs = ("audio", "video")'),
    ("train.py", 'def main():\n    return "video"'),
    ("dataset/preparers.py", 'x = "audio"'),
])  # fmt: skip
def test_a_literal_in_another_place_is_found(path, source):
    assert len(faulty_literals({path: ast.parse(source)})) == 1


def test_a_literal_in_its_place_is_none():
    named = ast.parse('def loss_weights():\n    return "audio", "video"\n')
    trees = dict.fromkeys(("dataset/specs.py", "dataset/prepare/raw.py", "train.py", "tests/test_x.py"), named)
    assert faulty_literals(trees) == []
