"""The house: which module may import which, read from the imports themselves."""

import ast
import functools
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_script

SCRIPTS = {path.stem for path in ROOT.glob('*.py')} - {'model', 'configurator'}
TOOLS = {'benchmarks', 'stress'}  # folders of scripts of their own
PROJECT = SCRIPTS | TOOLS | {'model', 'configurator', 'nib', 'data', 'config', 'tests'}


def module_name(path: Path) -> str:
    """nib/text/bpe.py is 'nib.text.bpe'."""
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


MODULES = {
    module_name(path): path
    for path in [ROOT / 'model.py', ROOT / 'configurator.py', *(ROOT / 'nib').rglob('*.py')]
    if path.name != '__init__.py'
}


def imports(tree: ast.AST) -> set[str]:
    """The project's modules that are imported anywhere in a piece of code, by their full names."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'imports say the whole path'
            inner = {
                f'{node.module}.{alias.name}' for alias in node.names
            } & MODULES.keys()  # from nib.text import bpe
            names |= inner or {node.module}
    return {name for name in names if name.split('.')[0] in PROJECT}


@functools.cache
def imports_of(path: Path) -> frozenset[str]:
    return frozenset(imports(ast.parse(path.read_text(encoding='utf-8'))))


def tops(names: set[str]) -> set[str]:
    return {name.split('.')[0] for name in names}


def test_arrows_go_from_scripts_to_nib_to_the_model():
    assert {'train', 'sample'} <= SCRIPTS and len(MODULES) > 30
    for name, path in MODULES.items():
        if name.startswith('nib.'):
            assert tops(imports_of(path)) <= {'nib', 'model'}, name
    assert tops(imports_of(ROOT / 'configurator.py')) <= {'nib'}
    for path in (ROOT / 'data').rglob('prepare.py'):
        assert tops(imports_of(path)) <= {'nib', 'configurator'}, path
    for script in SCRIPTS:
        allowed = {'nib', 'model', 'configurator', 'train'} | (
            {'benchmarks'} if script == 'bench' else set()
        )
        assert tops(imports_of(ROOT / f'{script}.py')) <= allowed, script


def test_benchmarks_and_stress_import_only_what_users_run_and_its_library():
    for tool in TOOLS:
        paths = sorted((ROOT / tool).rglob('*.py'))
        assert len(paths) > 3, tool
        for path in paths:
            allowed = SCRIPTS | TOOLS | {'nib', 'model', 'configurator'}
            assert tops(imports_of(path)) <= allowed, path


def test_report_and_sample_do_not_import_train():
    """A report or a sample needs none of the training loop."""
    for script in ('report', 'sample'):
        assert 'train' not in tops(imports_of(ROOT / f'{script}.py')), script


def test_the_model_imports_its_kernels_and_what_generate_hands_over_to():
    tree = ast.parse((ROOT / 'model.py').read_text(encoding='utf-8'))
    generates = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == 'generate'
    ]
    inside = set().union(*map(imports, generates))
    assert inside == {'nib.generation.sampling'}
    kernels = {name for name in MODULES if name.startswith('nib.kernels.')}
    assert imports(tree) == inside | kernels
    for name in kernels:
        assert imports_of(MODULES[name]) <= kernels


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions count too, except the one in generate()."""
    arrows = {name: imports_of(path) for name, path in MODULES.items()}
    arrows['model'] -= {'nib.generation.sampling'}
    done = set()

    def visit(name, way):
        assert name not in way, ' -> '.join([*way[way.index(name) :], name])
        if name not in done:
            for other in sorted(arrows.get(name, ())):
                visit(other, [*way, name])
            done.add(name)

    for name in arrows:
        visit(name, [])


def test_init_files_are_empty():
    """An __init__.py that imports would load torch for a prepare script."""
    rooms = {path.parent for path in (ROOT / 'nib').rglob('*.py')}
    assert len(rooms) > 5
    for room in rooms:
        assert (room / '__init__.py').read_text() == '', room


def test_every_room_is_in_the_package():
    listed = (ROOT / 'pyproject.toml').read_text()
    for room in {path.parent for path in (ROOT / 'nib').rglob('*.py')}:
        assert f'"{module_name(room / "x.py").removesuffix(".x")}"' in listed, room


@pytest.mark.parametrize(
    'code',
    [
        'import runpy; runpy.run_path("data/shakespeare_char/prepare.py")',
        'import runpy; runpy.run_path("data/text/prepare.py")',
        'import report',
    ],
)
def test_a_prepare_script_and_report_load_no_torch(code):
    """They answer at once, even when torch takes seconds to import."""
    done = run_script(
        '-c', f'import sys; {code}; sys.exit("torch" in sys.modules)', python=sys.executable
    )
    assert done.returncode == 0, done.stderr
