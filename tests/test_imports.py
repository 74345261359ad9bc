"""Who may import whom, what stays light, and that every config field is read by someone."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fgrpo_jax import config, config_files
from fgrpo_jax.algorithm import objectives

ROOT = Path(config.__file__).parents[1]
LAYERS = (
    ("errors", "config_of_data", "config_of_stages", "config", "config_files", "stages", "files", "types")
    + ("types_of_policies", "metrics", "shards"),
    ("algorithm", "models", "data"),
    ("policies", "evaluation"),
    ("run", "bench"),
    ("train", "eval", "export", "rank", "data.__main__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# These take numbers, never a config.
MATHEMATICS = re.compile(
    r"metrics|shards|algorithm(\..*)?|models(\..*)?|policies\.llm\.(grammar|transcript|masks|sampling|targets)"
    r"|policies\.ranker\.(query|network|generator|scorers|proposals|policy)"
)


def sources():
    """Module name -> file: `types`, `data.builder`, and the scripts `train` and `eval`."""
    package = ROOT / "fgrpo_jax"
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found[""]  # the package itself: the version
    return found | {name: ROOT / f"{name}.py" for name in ("train", "eval")}


SOURCES = sources()
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}


def imported(nodes):
    """The modules of this project that the nodes import, as in `sources`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")[1:] if name.startswith("fgrpo_jax.") else name.split(".")
            for size in range(len(parts), 0, -1):
                if ".".join(parts[:size]) in SOURCES and (name.startswith("fgrpo_jax.") or parts[0] in LAYERS[-1]):
                    yield ".".join(parts[:size])
                    break


def level(module):
    """Of its name, or of the package that it is in."""
    return LEVEL[module if module in LEVEL else module.split(".")[0]]


def test_every_module_has_a_layer():
    assert {name.split(".")[0] for name in SOURCES} == set(LEVEL) - {"data.__main__"}


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_upward_only(module):
    """Also those inside functions: a module knows its own layer and the ones before it."""
    for other in imported(ast.walk(TREES[module])):
        assert level(other) <= level(module), f"{module} imports {other}, which belongs to a later layer"


def test_modules_import_each_other_in_no_circle():
    waiting = {name: set(imported(tree.body)) - {name} for name, tree in TREES.items()}
    while waiting:
        free = {name for name, needs in waiting.items() if not needs & waiting.keys()}
        assert free, f"a circle among {sorted(waiting)}"
        waiting = {name: needs for name, needs in waiting.items() if name not in free}


@pytest.mark.parametrize("module", [name for name in SOURCES if MATHEMATICS.fullmatch(name)])
def test_mathematics_takes_numbers_never_a_config(module):
    assert "config" not in set(imported(ast.walk(TREES[module])))


def test_types_import_nothing_of_the_project():
    for module in ("types", "config_of_data", "config_of_stages"):
        assert not set(imported(ast.walk(TREES[module]))), module
    assert set(imported(ast.walk(TREES["config"]))) == {"errors", "config_of_data", "config_of_stages"}
    assert set(imported(ast.walk(TREES["types_of_policies"]))) == {"types"}


# --------------------------------------------------------------------- what stays light


def modules_after(code):
    program = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_config_does_not_import_jax():
    assert not modules_after("import fgrpo_jax.config") & {"jax", "flax", "numpy", "transformers"}


@pytest.mark.parametrize("run", ["run_path('train.py'", "run_path('eval.py'", "run_module('fgrpo_jax.rank'"])
def test_help_does_not_import_jax(run):
    """Nor anything else that takes long: it answers before the program's own imports."""
    run = f"runpy.{run}, run_name='__main__')"
    code = f"import runpy\nsys.argv[1:] = ['--help']\ntry: {run}\nexcept SystemExit: pass"
    assert not modules_after(code) & {"jax", "flax", "transformers", "tensorflow_datasets"}


def test_what_surrounds_a_policy_knows_no_model():
    """Nor a tokenizer, nor a transcript: what only a policy knows is behind types_of_policies.Policy."""
    for name in SOURCES:
        if name.split(".")[0] in ("algorithm", "evaluation", "run", "train", "eval"):
            known = {
                other for other in imported(ast.walk(TREES[name])) if other.split(".")[0] in ("models", "policies")
            }
            assert known <= {"policies"}, name


# --------------------------------------------------------------------- config fields


def fields(cls, where="config"):
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default):
            yield from fields(type(field.default), f"{where}.{field.name}")
        else:
            yield f"{where}.{field.name}"


@pytest.mark.parametrize("system", config_files.SYSTEMS)
def test_every_config_field_is_read(system):
    """By a module other than config.py and those of validation, which only check them."""
    read = {
        node.attr
        for name, tree in TREES.items()
        if name not in ("config", "run.validation", "run.validation_of_data")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    read |= {option for name in objectives.OBJECTIVES for option in objectives.options(name)}  # read by these names
    unread = [name for name in fields(config_files.system_class(system)) if name.rsplit(".", 1)[1] not in read]
    assert not unread, f"nobody reads {unread}: use them or remove them"


@pytest.mark.parametrize("module", SOURCES)
def test_attributes_are_read_without_a_default(module):
    """A misspelt field must fail, so `getattr(config, name, default)` does not occur."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            assert len(node.args) == 2, f"{SOURCES[module].name}:{node.lineno}"
