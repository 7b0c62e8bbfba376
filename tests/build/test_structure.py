"""The contracts of the package's structure: who may import whom, and how long a function may be."""

import ast
import functools
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "aqlm_c"

# From the ground up: a module imports from lower lines, and from its own line where no circle comes of it. A package
# stands for all its modules that have no line of their own.
LAYERS = [
    {"errors", "versions", "environment", "_core", "_torch", "_cuda", "model.kinds"},
    {"units", "patterns", "model.positions"},
    {"files", "format"},
    {"config"},
    {"core"},
    {"distributed"},
    {"methods"},
    {"recipe", "report"},
    {"weights"},
    {"nn"},
    {"io"},
    {"model"},
    {"calibrate"},
    {"train"},
    {"pipeline"},
    {"hf", "allocation", "vllm"},
    {"tasks"},
    {"evaluate", "export", "generate", "inspection"},
    {"statistics"},
    {"quantize", "finetune"},
    {"run"},
    {"sweeps"},
    {"compare"},
    {"doctor", "execute", "serving"},
    {"cli"},
    {"demo", "__main__"},
]
MOST_LINES, MOST_PARAMETERS = 60, 8
TORCH_FREE = {"errors", "versions", "environment", "units", "files", "format", "config", "methods", "recipe", "report"}
TORCH_FREE |= {"patterns"}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
FACADE = ""  # aqlm_c/__init__.py, which names what others define


@functools.cache
def tree(module):
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def is_known(name):
    return name in MODULES or name in ("_core", "_torch", "_cuda")


@functools.cache
def imports(module):
    """(imported module, name or None, line) of every import inside the package, wherever it stands."""
    path, found = MODULES[module], []
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}".lstrip(".")
                found.append((inner, None, node.lineno) if is_known(inner) else (source, alias.name, node.lineno))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            assert not any(name.split(".")[0] == "aqlm_c" for name in names), (
                f"{module}:{node.lineno}: import it relatively"
            )
    return found


def layer(module):
    """The line of a module: by its longest prefix that has one."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        for height, names in enumerate(LAYERS):
            if ".".join(parts[:end]) in names:
                return height, ".".join(parts[:end])
    raise AssertionError(f"{module}: has no line in LAYERS, expected one")


@pytest.mark.parametrize("module", [name for name in MODULES if name != FACADE])
def test_imports_go_down(module):
    height, group = layer(module)
    for imported, name, line in imports(module):
        assert imported != FACADE, f"{module}:{line}: imports {name} from the package's face, expected its own module"
        other, other_group = layer(imported)
        allowed = other < height or group == other_group
        assert allowed, f"{module}:{line}: imports {imported}, of a line that is not below"


def test_no_circles():
    done, path = set(), []

    def visit(module):
        if module in path:
            raise AssertionError(f"circle of imports: {' -> '.join([*path[path.index(module) :], module])}")
        if module in done or module not in MODULES:
            return
        path.append(module)
        for imported, _, _ in imports(module):
            visit(imported)
        done.add(path.pop())

    for module in MODULES:
        if module != FACADE:
            visit(module)


@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_of_another_module(module):
    for imported, name, line in imports(module):
        private = name is not None and name.startswith("_") and not name.startswith("__")
        assert not private, f"{module}:{line}: imports {name} of {imported}"
        last = imported.rpartition(".")[2]
        extension = imported in ("_core", "_torch", "_cuda") and (module == "core" or module.startswith("core."))
        assert extension or not last.startswith("_") or last == "__main__", f"{module}:{line}: imports {imported}"


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module):
    for node in ast.walk(tree(module)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        if module == "cli.commands" and any(text.startswith("app.command") for text in decorators):
            continue  # its parameters are the command's options
        docstring = ast.get_docstring(node, clean=False)
        lines = node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
        assert lines <= MOST_LINES, f"{module}.{node.name}: {lines} lines, expected at most {MOST_LINES}"
        arguments = node.args
        count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
        count -= bool(arguments.args and arguments.args[0].arg in ("self", "cls"))
        assert count <= MOST_PARAMETERS, f"{module}.{node.name}: {count} parameters"


def test_methods_are_named_by_themselves_alone():
    """A method's name stands in its registration; no other file asks which one it has."""
    from aqlm_c.methods import METHODS

    for module, path in MODULES.items():
        if module == "methods":
            continue
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Compare):
                constants = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                assert not set(METHODS) & {value for value in constants if isinstance(value, str)}, (
                    f"{path}:{node.lineno}"
                )


def test_light_modules_import_no_torch():
    for module in MODULES:
        if module.split(".")[0] in TORCH_FREE and not module.startswith("methods."):
            for node in tree(module).body:  # at the top, not inside of a function
                if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
                    names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
                    assert not any(name.split(".")[0] in ("torch", "transformers") for name in names), module


def test_only_the_checkpoint_knows_names_on_disk():
    """ ".codes" and its like are put together in one place."""
    pattern = re.compile(r"\.(codes|codebooks|scales)['\"]")
    for module, path in MODULES.items():
        if module not in ("io.checkpoint",):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                assert not pattern.search(line), f"{path}:{number}: expected a function of io.checkpoint"


def test_every_environment_variable_is_in_the_table():
    """What C, Python and the build read, what `aqlm-c doctor` knows and what README names are the same."""
    from aqlm_c.environment import VARIABLES

    root, pattern = PACKAGE.parent, re.compile(r"AQLM_C_[A-Z]+(?:_[A-Z]+)*")
    sources = [*root.glob("csrc/**/*.[ch]*"), root / "setup.py", *PACKAGE.rglob("*.py")]
    read = set()
    for path in sources:
        for line in path.read_text(encoding="utf-8").splitlines():
            if "getenv" in line or "environ" in line:
                read |= set(pattern.findall(line))
    assert read == set(VARIABLES)
    readme = set(pattern.findall((root / "README.md").read_text(encoding="utf-8")))
    assert readme == set(VARIABLES)


def test_stubs_name_what_the_modules_have():
    import aqlm_c._core as core

    stub = ast.parse((PACKAGE / "_core.pyi").read_text(encoding="utf-8"))
    declared = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    assert declared == {name for name in dir(core) if not name.startswith("_")}
