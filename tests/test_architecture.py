"""The house rules that matter, as checks: arrows, cycles, budgets, and what a look at the plan may import."""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 90

FIRST_FLOOR = {"config", "plain", "artifacts"}
SECOND_FLOOR = {
    "storage",
    "outside",
    "hardware",
    "telemetry",
    "downloads",
    "workers",
}
VOCABULARY = {f"omni_model.{name}" for name in FIRST_FLOOR | SECOND_FLOOR}
# Inside omni_model, a room knows the rooms on lower floors, and its own.
FLOORS = [
    FIRST_FLOOR,
    SECOND_FLOOR,
    {"text", "audio"},
    {"model"},
    {"training", "serving"},
    {"evaluation"},
    {"launch", "cli"},
]
DOORS = {("execute.py", "omni_model.launch"), ("nanochat.py", "omni_model.cli"), ("cli.py", "omni_model.cli")}
STDLIB_ONLY = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "omni_model").rglob("*.py")
    if path.relative_to(ROOT / "omni_model").parts[0].removesuffix(".py") in FIRST_FLOOR | SECOND_FLOOR
)
# The files that wrap the flows and tasks for Prefect, and the drawing of live progress.
PREFECT_SIDE = {"flows/deployments.py", "tasks/prefect_adapter.py"}
LAZY_ELSEWHERE = {"flows/display.py": {"rich"}, "tasks/prefect_server.py": {"uvicorn"}}


def python_files(*places: str) -> list[Path]:
    return sorted(path for place in places for path in (ROOT / place).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> set[str]:
    """Every module imported anywhere in a file; `from a import b` counts as a.b where that is a file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                path = ROOT.joinpath(*full.split("."))
                is_module = path.with_suffix(".py").exists() or (path / "__init__.py").exists()
                found.add(full if is_module else str(node.module))
    return found


def top_level_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return imports(ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], []))


FILES = python_files("flows", "tasks", "omni_model")


def test_top_level_holds_only_the_rooms_of_the_house() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    allowed = {
        "flows",
        "tasks",
        "omni_model",
        "infra",
        "tests",
        "prefect.yaml",
        "pyproject.toml",
        "README.md",
    }
    tops = {name.split("/")[0] for name in tracked}
    assert {top for top in tops if not top.startswith(".")} <= allowed | {"Makefile", "LICENSE"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_arrows_point_down(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for name in imports(ast.parse(path.read_text())):
        head = name.split(".")[0]
        if room == "omni_model":
            assert head not in ("prefect", "tasks", "flows"), f"{path} imports {name}"
        elif room == "tasks":
            assert head != "flows", f"{path} imports {name}"
        place = ".".join(name.split(".")[:2])
        if room != "omni_model" and head == "omni_model" and place not in VOCABULARY | {"omni_model"}:
            assert (path.name, name) in DOORS, f"{path} imports {name}"


@pytest.mark.parametrize("path", python_files("omni_model"), ids=str)
def test_floors_of_the_model_package(path: Path) -> None:
    def floor(module: str) -> int:
        room = module.split(".")[1]
        return next(i for i, rooms in enumerate(FLOORS) if room in rooms)

    if module_name(path) == "omni_model":
        return
    own = module_name(path)
    for name in imports(ast.parse(path.read_text())):
        if name.startswith("omni_model."):
            same_room = name.split(".")[1] == own.split(".")[1]
            below = floor(name) < floor(own) or (floor(name) == floor(own) <= 1)
            assert same_room or below, f"{own} knows {name}"


@pytest.mark.parametrize("path", python_files("flows", "tasks"), ids=str)
def test_graph_is_standard_library_only(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    if name in PREFECT_SIDE:
        return
    allowed = {"flows", "tasks", "omni_model"} | LAZY_ELSEWHERE.get(name, set())
    heads = {module.split(".")[0] for module in imports(ast.parse(path.read_text()))}
    assert heads <= sys.stdlib_module_names | allowed
    top = {module.split(".")[0] for module in top_level_imports(path)}
    assert not top & LAZY_ELSEWHERE.get(name, set())


@pytest.mark.parametrize("name", STDLIB_ONLY)
def test_vocabulary_is_standard_library_only_at_import(name: str) -> None:
    heads = {module.split(".")[0] for module in top_level_imports(ROOT / name)}
    assert heads <= sys.stdlib_module_names | {"omni_model"}


def test_flow_and_task_are_wrapped_in_one_place_each() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        if any(m.split(".")[0] == "prefect" for m in imports(ast.parse(path.read_text())))
    }
    assert users == PREFECT_SIDE


def test_environment_is_read_in_two_modules() -> None:
    readers = {
        path.relative_to(ROOT).as_posix()
        for path in python_files("omni_model")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert readers <= {"omni_model/hardware.py", "omni_model/storage/__init__.py"}


def test_code_is_reached_by_static_references_only() -> None:
    """The fingerprint follows names; a module loaded by a string would be invisible to it."""
    for path in python_files("omni_model"):
        if path.name != "launch.py":
            names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
            assert not names & {"__import__", "importlib", "eval", "exec"}, path


def test_no_import_cycles() -> None:
    names = {module_name(path): path for path in FILES}
    edges = {
        name: {m for m in imports(ast.parse(path.read_text())) if m in names} for name, path in names.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def functions() -> list[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    return [
        (path, node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    for path in FILES:
        assert len(path.read_text().splitlines()) <= MAX_FILE_LINES, path
    lengths = [length(node) for _, node in functions()]
    for path, node in functions():
        assert length(node) <= MAX_FUNCTION_LINES, f"{path}: {node.name}"
    with capsys.disabled():
        print(
            f" [{len(FILES)} files, {len(lengths)} functions, median {statistics.median(lengths):g} lines] ",
            end="",
        )


def test_everything_is_annotated() -> None:
    for path, node in functions():
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"{path}: {node.name} leaves {bare} unannotated"
        assert node.returns is not None, f"{path}: {node.name} does not say what it returns"


def test_a_look_at_the_plan_imports_neither_torch_nor_prefect() -> None:
    script = "import sys, flows.cli; print(*sorted({'torch', 'prefect', 'numpy', 'rich'} & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == ""


def test_the_core_imports_with_torch_alone() -> None:
    """`model` and `training` must run on a machine that has torch and nothing else of ours."""
    paths = python_files("omni_model/model", "omni_model/training")
    modules = [module_name(path) for path in paths if not path.name.startswith("triton_")]
    script = (
        "import sys\n"
        "for name in ('prefect', 'transformers', 'webdataset', 'wandb', 'peft', 'soundfile', 'tokenizers',\n"
        "             'triton'):\n"
        "    sys.modules[name] = None\n" + "".join(f"import {name}\n" for name in modules)
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
