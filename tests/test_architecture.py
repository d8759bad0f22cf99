"""Who may import whom, read from the source: nothing imports upward."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import coreinfer

ROOT = Path(coreinfer.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Small modules at the top of the package that know nothing of the method.
BASICS = {"errors", "files", "jsonl", "journal"}
LOWER = BASICS | {"core", "kernels", "calibration", "standins", "selectors", "semantics"}
LOWER |= {"recording", "models", "backends"}

# What each part may import of the others. An import for types alone does not run, so it is free.
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "jsonl": {"errors"},
    "journal": {"errors", "files"},
    "core": BASICS | {"kernels"},
    "kernels": {"errors"},
    "calibration": BASICS | {"core"},
    "standins": BASICS | {"core", "calibration"},
    "selectors": BASICS | {"core", "semantics", "calibration"},
    "semantics": BASICS | {"core"},
    "recording": BASICS | {"core", "calibration", "standins", "selectors"},
    "models": BASICS | {"core"},
    "backends": BASICS | {"core", "kernels", "standins", "selectors", "recording", "models"},
    "runtime": LOWER,
    "building": LOWER | {"runtime"},
    "api": LOWER | {"runtime"},
    "evaluation": LOWER | {"runtime", "api"},
    "tuning": LOWER | {"runtime", "api", "evaluation"},
    "analysis": LOWER | {"runtime", "building", "api", "evaluation", "tuning"},
    "server": LOWER | {"runtime", "api"},
    "benchmarks": LOWER | {"runtime"},
    "cli": LOWER
    | {"runtime", "building", "api", "evaluation", "tuning", "analysis", "server", "benchmarks"},
}

OPTIONAL = {
    "sentence_transformers",
    "sklearn",
    "matplotlib",
    "scipy",
    "llama_cpp",
    "openvino_genai",
    "lm_eval",
    "datasets",
    "sacrebleu",
    "rouge_score",
    "torchmetrics",
    "optuna",
    "ray",
}
# A package of its own for what cannot do without: nothing outside imports it but where it is used.
OPTIONAL_IN = {"evaluation/harness": {"lm_eval", "datasets"}}
HEAVY_FOR_THE_COMMAND_LINE = {"torch", "transformers", "numpy", "safetensors", *OPTIONAL}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_of(path: Path) -> str:
    """Dotted name below the package: 'core.coreset', 'core' for its __init__, '' for the top."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def part_of(module: str) -> str:
    return module.split(".")[0]


def imports(node: ast.AST, *, in_functions: bool) -> Iterator[str]:
    """Absolute names imported below a node, leaving out `if TYPE_CHECKING:` blocks."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                otherwise = ast.Module(body=child.orelse, type_ignores=[])
                yield from imports(otherwise, in_functions=in_functions)
            case ast.Import():
                yield from (alias.name for alias in child.names)
            case ast.ImportFrom():
                assert child.level == 0, "relative import"
                assert child.module is not None
                yield child.module
                if child.module == "coreinfer":  # from coreinfer import core
                    yield from (f"coreinfer.{alias.name}" for alias in child.names)
            case ast.FunctionDef() | ast.AsyncFunctionDef() if not in_functions:
                pass
            case _:
                yield from imports(child, in_functions=in_functions)


def of_the_package(path: Path) -> set[str]:
    """The parts of the package that a file imports, anywhere in it."""
    names = imports(tree_of(path), in_functions=True)
    below = {name.removeprefix("coreinfer.") for name in names if name.startswith("coreinfer.")}
    return {part_of(name) for name in below} - {"__version__"}


def third_party(path: Path) -> set[str]:
    """Top-level packages that a file imports when it is itself imported."""
    names = imports(tree_of(path), in_functions=False)
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"coreinfer"}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_walk_sees_imports() -> None:
    assert "selectors" in of_the_package(ROOT / "recording.py")
    assert {"torch", "safetensors"} <= third_party(ROOT / "core" / "coreset.py")
    source = (
        "def f():\n    import sklearn\nif TYPE_CHECKING:\n    import torch\nelse:\n    import a"
    )
    assert list(imports(ast.parse(source), in_functions=True)) == ["sklearn", "a"]
    assert list(imports(ast.parse(source), in_functions=False)) == ["a"]


def test_every_part_has_its_rule() -> None:
    parts = {part_of(module_of(path)) for path in FILES} - {"", "__main__"}
    assert parts <= ALLOWED.keys(), f"say what {sorted(parts - ALLOWED.keys())} may import"
    assert {"core", "standins", "selectors", "semantics", "models", "backends", "runtime"} <= parts


@pytest.mark.parametrize("path", FILES, ids=named)
def test_nothing_imports_upward(path: Path) -> None:
    module = module_of(path)
    if module in ("", "__main__"):  # the package itself offers everything
        return
    part = part_of(module)
    assert of_the_package(path) <= ALLOWED[part] | {part}


def test_the_rules_have_no_circle() -> None:
    rest = {part: set(allowed) - {part} for part, allowed in ALLOWED.items()}
    while rest:
        free = {part for part, needs in rest.items() if not needs & rest.keys()}
        assert free, f"these parts import each other: {sorted(rest)}"
        rest = {part: needs for part, needs in rest.items() if part not in free}


@pytest.mark.parametrize("path", [p for p in FILES if "core" in p.parts], ids=named)
def test_the_core_knows_tensors_and_its_own_files_alone(path: Path) -> None:
    assert third_party(path) <= {"torch", "numpy", "safetensors"}


@pytest.mark.parametrize("path", FILES, ids=named)
def test_optional_packages_are_imported_only_where_they_are_used(path: Path) -> None:
    folder = path.relative_to(ROOT).parent.as_posix()
    assert not third_party(path) & OPTIONAL - OPTIONAL_IN.get(folder, set())


@pytest.mark.parametrize("path", FILES, ids=named)
def test_what_needs_an_optional_package_is_imported_only_where_it_is_used(path: Path) -> None:
    names = imports(tree_of(path), in_functions=False)
    apart = {f"coreinfer.{folder.replace('/', '.')}" for folder in OPTIONAL_IN}
    inside = path.relative_to(ROOT).parent.as_posix() in OPTIONAL_IN
    stands_alone = module_of(path) == "cli.lm_eval_model"  # which lm-eval imports, and nobody else
    assert inside or stands_alone or not {name.rpartition(".")[0] for name in names} & apart


@pytest.mark.parametrize(
    "path", [p for p in FILES if part_of(module_of(p)) in ("cli", "")], ids=named
)
def test_the_command_line_starts_without_the_heavy_packages(path: Path) -> None:
    assert not third_party(path) & HEAVY_FOR_THE_COMMAND_LINE


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_module_is_a_drawer_for_everything(path: Path) -> None:
    assert path.stem not in {"util", "utils", "helper", "helpers", "misc", "common"}
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_unpickling_and_no_remote_code(path: Path) -> None:
    assert not third_party_or_stdlib(path) & {"pickle", "dill", "joblib", "shelve", "marshal"}
    for node in ast.walk(tree_of(path)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load")):
                pytest.fail(f"torch.load unpickles (line {node.lineno})")
            case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=True)):
                pytest.fail(f"trust_remote_code (line {node.lineno})")


def third_party_or_stdlib(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(tree_of(path), in_functions=True)}


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_function_writes_a_global(path: Path) -> None:
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree_of(path)))
