"""The five modules at the top, and which of them imports which, read from their source."""

import ast

import pytest
from conftest import ROOT

MODULES = ("adaptertune", "data", "export", "train", "vit")
MAY_IMPORT = {
    "vit": set(),
    "adaptertune": set(),
    "data": set(),
    "train": {"adaptertune", "data", "vit"},
    "export": {"adaptertune", "data", "vit", "train"},
}
OPTIONAL = {
    "PIL",
    "pillow_heif",
    "matplotlib",
    "sklearn",
    "torchvision",
}  # packages that requirements.txt leaves out


def packages_of(statement):
    """The top-level packages that an import statement imports."""
    if isinstance(statement, ast.ImportFrom):
        assert statement.level == 0  # no relative import
        names = [statement.module]
    else:
        names = [alias.name for alias in statement.names]
    return {name.partition(".")[0] for name in names}


def imports_of(nodes):
    """The top-level packages that the import statements among the nodes import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= packages_of(node)
    return found


def parse(module):
    """The syntax tree of one of the five modules."""
    return ast.parse((ROOT / f"{module}.py").read_text())


def in_functions(tree):
    """Every node inside a function, at any depth."""
    nodes = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            nodes += ast.walk(node)
    return nodes


def test_five_files():
    """The top of the repository has the five modules and no other Python file."""
    assert sorted(path.name for path in ROOT.glob("*.py")) == [f"{name}.py" for name in MODULES]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    """vit, adaptertune and data import none of the five; train imports them, export all four."""
    imported = imports_of(ast.walk(parse(module))) & set(MODULES)
    assert imported == MAY_IMPORT[module]


@pytest.mark.parametrize("module", MODULES)
def test_imports_stand_at_the_top(module):
    """Our modules are imported at module level only, not inside a function or an if statement."""
    tree = parse(module)
    own = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    own = [node for node in own if packages_of(node) & set(MODULES)]
    for node in own:
        assert node in tree.body
        assert isinstance(node, ast.Import)  # as `import vit`, so that each name shows its module


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_only_in_functions(module):
    """Optional packages are imported in functions only; everything else is imported at the top,
    except fcntl, which Windows lacks."""
    tree = parse(module)
    everywhere = imports_of(ast.walk(tree))
    top = imports_of(tree.body)
    inside = imports_of(in_functions(tree))
    assert not top & OPTIONAL
    assert inside <= OPTIONAL
    assert everywhere - {"fcntl"} == top | inside  # none in an if, a try or a class


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_imported_by_name_at_run_time(module):
    """No module uses __import__ or importlib: import statements list everything that it needs."""
    tree = parse(module)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert "__import__" not in names
    assert "importlib" not in imports_of(ast.walk(tree))


def test_this_reader_of_imports():
    """imports_of finds every form of import statement, at any depth."""
    source = """
import a, b.c as d
from e.f import g
if True:
    import h
def function():
    def inner():
        from i import j
"""
    tree = ast.parse(source)
    assert imports_of(ast.walk(tree)) == {"a", "b", "e", "h", "i"}
    assert imports_of(tree.body) == {"a", "b", "e"}
    assert imports_of(in_functions(tree)) == {"i"}
