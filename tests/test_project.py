"""The project as a whole: which module may import which, and that what is written about it is so."""
import ast
import re
import sys
from pathlib import Path

from conftest import ROOT, run_script

SCRIPTS = {path.stem for path in ROOT.glob('*.py')} - {'model', 'configurator'}
README = (ROOT / 'README.md').read_text()


def imported(path: Path) -> set[str]:
    """The top names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or '').split('.')[0])
    return names


def test_arrows_go_one_way():
    project = SCRIPTS | {'model', 'configurator', 'nib', 'data', 'config'}
    assert {'train', 'sample'} <= SCRIPTS
    assert not imported(ROOT / 'model.py') & project
    assert imported(ROOT / 'configurator.py') & project <= {'nib'}
    for path in (ROOT / 'nib').rglob('*.py'):
        assert imported(path) & project <= {'nib', 'model'}, path
    for path in (ROOT / 'data').rglob('prepare.py'):
        assert imported(path) & project <= {'nib', 'configurator'}, path


def test_a_prepare_script_and_help_need_no_torch():
    """They answer at once, also where torch takes seconds to import."""
    done = run_script('-c', 'import sys, runpy; runpy.run_path("data/shakespeare_char/prepare.py"); '
                            'sys.exit("torch" in sys.modules)')
    assert done.returncode == 0, done.stderr


def test_third_party_imports_are_declared():
    declared = set(re.findall(r'"([a-z]+)[>=]', (ROOT / 'pyproject.toml').read_text()))
    pinned = {re.match('[a-z]+', line)[0] for line in (ROOT / 'requirements.txt').read_text().split()}
    assert pinned <= declared
    own = SCRIPTS | {'model', 'configurator', 'nib'}
    for path in [*ROOT.glob('*.py'), *ROOT.glob('nib/*.py'), *ROOT.glob('data/*/*.py')]:
        outside = imported(path) - own - set(sys.stdlib_module_names) - {'urllib3'}  # requests brings it
        assert outside <= declared, path


def test_files_that_the_readme_names_are_there():
    named = set(re.findall(r'(?:config|data|nib|tests|benchmarks|docs)/[\w/]+\.(?:py|png)', README))
    assert named
    for name in named:
        assert 'NAME' in name or (ROOT / name).exists(), name


def test_every_key_that_the_readme_sets_is_a_key():
    """Of the commands that run one of the project's scripts."""
    commands = [line for line in re.findall(r'^ {4}(.*)$', README, re.MULTILINE) if 'python ' in line or 'torchrun ' in line]
    assert len(commands) > 5
    for command in commands:
        for script, flags in re.findall(r'((?:[\w-]+/)*[\w-]+\.py)((?: +(?!&&)[^ |#&]+)*)', command):
            if (ROOT / script).exists() and not script.startswith('config/'):
                source = (ROOT / script).read_text()
                for key in re.findall(r'--(\w+)', flags):
                    assert key in ('help', 'print_config') or re.search(rf'^{key}: ', source, re.MULTILINE), (command, key)
