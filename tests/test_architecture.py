"""The shape of the code: which part may import which, and where hooks are."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import ekfac

ROOT = Path(ekfac.__file__).parent

# Bottom up. A part imports from the floors below its own and, on its own floor, from
# the parts that stand before it.
FLOORS = (
    ("errors", "files", "progress", "state_schema", "vectors", "kernels"),
    (
        "spectral",
        "matrices",
        "likelihoods",
        "layers",
        "calls",
        "hooks",
        "capture",
    ),
    ("curvature", "estimate"),
    ("optim", "continual", "diagnostics", "monitor", "report", "testing", "bench"),
    ("__init__", "__main__"),
)
INDEPENDENT = {"optim", "continual", "diagnostics"}
ORDER = [part for floor in FLOORS for part in floor]

# What makes torch call somebody during a forward or backward pass.
HOOKS = {
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_hook",
    "register_module_forward_hook",
    "register_module_forward_pre_hook",
    "register_multi_grad_hook",
    "register_post_accumulate_grad_hook",
    "register_prehook",
}


def module_names() -> list[str]:
    """Return the dotted names of the package's modules."""
    names = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        names.append(".".join(p for p in parts if p != "__init__"))
    return names


MODULES = module_names()


def tree_of(module: str) -> ast.Module:
    """Return the syntax tree of a module."""
    path = ROOT.parent.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(module: str) -> Iterator[str]:
    """Yield the modules of the package that ``module`` imports, hints included."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "ekfac")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports out in full"
            if (node.module or "").split(".")[0] == "ekfac":
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    yield name if name in MODULES else str(node.module)


def part(module: str) -> str:
    """Return the part of the package that a module belongs to."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module: str) -> None:
    assert part(module) in ORDER, f"give {part(module)!r} a place in FLOORS"
    above = ORDER[ORDER.index(part(module)) + 1 :]
    found = {other for other in imports(module) if part(other) in above}
    assert not found


@pytest.mark.parametrize("module", MODULES)
def test_the_three_uses_know_nothing_of_each_other(module: str) -> None:
    if part(module) in INDEPENDENT:
        others = INDEPENDENT - {part(module)}
        assert not {name for name in imports(module) if part(name) in others}


def test_no_import_cycles() -> None:
    graph = {name: set(imports(name)) - {name} for name in MODULES}
    while True:
        leaves = {module for module, needs in graph.items() if not needs}
        if not leaves:
            break
        graph = {m: needs - leaves for m, needs in graph.items() if m not in leaves}
    assert not graph


@pytest.mark.parametrize("module", MODULES)
def test_algebra_knows_no_modules(module: str) -> None:
    """Matrices, spectra and kernels are about tensors alone."""
    if part(module) in {"matrices", "spectral", "kernels"}:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("torch.nn.modules")
                names = {alias.name for alias in node.names}
                assert node.module != "torch" or "nn" not in names


@pytest.mark.parametrize("module", MODULES)
def test_hooks_are_registered_by_capture_alone(module: str) -> None:
    if module != "ekfac.capture":
        found = {
            node.attr
            for node in ast.walk(tree_of(module))
            if isinstance(node, ast.Attribute) and node.attr in HOOKS
        }
        assert not found


def test_the_list_of_hooks_is_complete() -> None:
    import torch

    owners = (torch.nn.Module, torch.Tensor, torch.nn.modules.module)
    every = {
        name
        for owner in (*owners, torch.autograd.graph, torch.autograd.graph.Node)
        for name in dir(owner)
        if name.startswith("register_") and name.endswith("hook")
    }
    harmless = {n for n in every if "state_dict" in n or "registration" in n}
    assert every - harmless <= HOOKS | {
        "register_backward_hook",
        "register_module_backward_hook",
        "register_module_full_backward_hook",
        "register_module_full_backward_pre_hook",
    }


def public_definitions(
    body: list[ast.stmt], path: str
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    """Yield public classes, functions and methods with their dotted names."""
    for node in body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            continue
        overload = any(
            isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list
        )
        if not node.name.startswith("_") and not overload:
            yield f"{path}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{path}.{node.name}")


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_docstrings(module: str) -> None:
    tree = tree_of(module)
    assert ast.get_docstring(tree), module
    missing = [
        name
        for name, node in public_definitions(tree.body, module)
        if not ast.get_docstring(node)
    ]
    assert not missing


def test_exported_names_exist_and_have_docstrings() -> None:
    for info in pkgutil.walk_packages(ekfac.__path__, "ekfac."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            found = getattr(module, name)
            if inspect.isclass(found) or inspect.isfunction(found):
                assert inspect.getdoc(found), f"{info.name}.{name}"
    assert set(ekfac.__all__) <= set(dir(ekfac))


@pytest.mark.parametrize("module", MODULES)
def test_errors_say_something(module: str) -> None:
    """``NotImplementedError`` and its kin come with a sentence."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            call = node.exc
            if isinstance(call, ast.Name) and call.id.endswith("Error"):
                pytest.fail(
                    f"{module}:{node.lineno} raises {call.id} without a message"
                )
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                assert call.args, f"{module}:{node.lineno} has no message"
