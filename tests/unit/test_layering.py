"""Who may import whom, what stays light, and that every module says what it offers."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("data_service", "trainer", "serve", "cluster", "k8s")
BELOW = {
    "data_service": set(),
    "trainer": {"data_service"},
    "serve": {"data_service", "trainer"},
    "cluster": {"data_service", "trainer", "serve"},
    "k8s": set(),
}
FOR_K8S = ("cluster.config", "data_service.errors", "data_service.settings")
ROOT = ("cluster.cli", "cluster.__main__", "cluster.commands")
"""The composition root: may import any folder."""

HOMES = {
    "ray": (
        "serve.app",
        "serve.deployment",
        "cluster.attempt",
        "cluster.data_actors",
        "cluster.local_nodes",
        "cluster.node_agent",
        "cluster.node_pool",
        "cluster.node_request",
        "cluster.ray_auth",
        "cluster.ray_map",
        "cluster.ray_session",
    ),
    "deepspeed": (
        "trainer.deepspeed_config",
        "trainer.deepspeed_engine",
        "trainer.fragment_readers",
        "trainer.loss_module",
        "trainer.pipeline",
        "trainer.process_group",
    ),
    "pyarrow.flight": ("data_service.connections", "data_service.server"),
    "grpc": (
        "data_service.connections",
        "data_service.control",
        "data_service.control_pb2_grpc",
        "data_service.health",
        "data_service.heartbeat",
    ),
    "grpc_health": ("data_service.control", "data_service.health"),
    "grpc_reflection": ("data_service.control",),
}
"""The modules that may import a library with a life of its own; the rest of the product runs without it."""

LIGHT = {
    "import cluster.config": ("torch", "ray", "deepspeed", "pyarrow", "transformers"),
    "import k8s.render": ("torch", "ray", "deepspeed"),
    "import trainer.protocol, trainer.manifest, trainer.config": ("torch", "ray", "deepspeed"),
    "import cluster.planning, trainer.deepspeed_config": ("torch", "ray", "deepspeed"),
    "import trainer.model": ("deepspeed", "ray", "transformers"),
    "import serve.spec, serve.config": ("torch", "ray"),
    "import serve.ingress": ("torch", "ray", "deepspeed"),
    "import serve.deployment": ("torch", "deepspeed"),
}


@cache
def modules() -> dict[str, Path]:
    """Dotted name → file, generated code left out."""
    found = {}
    for package in PACKAGES:
        for file in sorted((REPOSITORY / package).rglob("*.py")):
            if not file.stem.endswith(("_pb2", "_pb2_grpc")):
                parts = file.relative_to(REPOSITORY).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def imports(name: str) -> Iterator[tuple[str, int]]:
    """Everything a module imports, at any depth of the code, with its line; `from a import b` gives `a.b`."""
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def is_in(name: str, homes: tuple[str, ...]) -> bool:
    return any(name == home or name.startswith(home + ".") for home in homes)


def may_import(importer: str, imported: str) -> bool:
    package, other = importer.partition(".")[0], imported.partition(".")[0]
    if other not in PACKAGES or other == package or is_in(importer, ROOT):
        return True
    if package == "k8s":
        return is_in(imported, FOR_K8S)
    return other in BELOW[package]


def test_imports_go_one_way() -> None:
    wrong = [
        f"{modules()[name]}:{line}: {name} imports {imported}"
        for name in modules()
        for imported, line in imports(name)
        if not may_import(name, imported)
    ]
    assert wrong == []


def test_the_command_line_loads_a_command_only_when_it_is_given() -> None:
    allowed = ("cluster.cli", "data_service.errors")
    wrong = []
    for name in ("cluster.cli", "cluster.__main__"):
        for node in tree_of(name).body:
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in PACKAGES:
                if not is_in(str(node.module), allowed):
                    wrong.append(f"{name}:{node.lineno}: {node.module} at module level")
    assert wrong == []


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_in_few_named_modules(library: str) -> None:
    strangers = [
        f"{modules()[name]}:{line}: {name} imports {imported}"
        for name in modules()
        for imported, line in imports(name)
        if is_in(imported, (library,)) and name not in HOMES[library]
    ]
    assert strangers == []


def test_no_import_of_a_package_that_could_drag_its_modules_in() -> None:
    """Across folders only named submodules are imported, so that an empty `__init__` stays enough."""
    wrong = [
        f"{name}:{line}: {imported}" for name in modules() for imported, line in imports(name) if imported in PACKAGES
    ]
    assert wrong == []


def test_inits_are_empty_of_imports() -> None:
    heavy = [name for name, file in modules().items() if file.stem == "__init__" and list(imports(name))]
    assert heavy == []


@pytest.mark.parametrize("statement", LIGHT)
def test_light_imports_stay_light(statement: str) -> None:
    assert loaded(statement, LIGHT[statement]) == []


def test_no_module_of_the_data_service_needs_torch_or_ray() -> None:
    names = [name for name in modules() if name.startswith("data_service.")]
    assert loaded(f"import {', '.join(names)}", ("torch", "ray", "deepspeed", "transformers")) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["config", str(REPOSITORY / "examples" / "reviews.yaml"), "--resolved"],
        ["k8s", "render", str(REPOSITORY / "examples" / "reviews.yaml")],
    ],
    ids=["help", "run help", "config", "k8s render"],
)
def test_the_command_line_answers_without_torch_and_ray(arguments: list[str]) -> None:
    statement = (
        f"import runpy, sys; sys.argv = ['stormjib', *{arguments!r}]\n"
        "try:\n    runpy.run_module('cluster', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code in (0, None, 2), end.code\n"
    )
    assert loaded(statement, ("torch", "ray", "deepspeed", "transformers", "pyarrow")) == []


def loaded(statement: str, libraries: tuple[str, ...]) -> list[str]:
    """Which of the libraries a fresh process has loaded after the statement."""
    code = f"{statement}\nimport sys\nprint('loaded:', *[name for name in {libraries!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize("name", modules())
def test_a_module_lists_what_it_offers(name: str) -> None:
    """`__all__` is there where anything public is defined, names every function and class, and nothing else."""
    body = tree_of(name).body
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = {node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")}
    defined = set(public)
    listed: list[str] | None = None
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            defined |= names
            if "__all__" in names and node.value is not None:
                listed = ast.literal_eval(node.value)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {alias.asname or alias.name for alias in node.names}
    assert not public or listed is not None, f"{name} has no __all__"
    assert public <= set(listed or ()), f"{name}: not listed: {sorted(public - set(listed or ()))}"
    assert set(listed or ()) <= defined, f"{name}: listed but not defined: {sorted(set(listed or ()) - defined)}"
    assert len(set(listed or ())) == len(listed or ())
