"""The project as a whole: what its files say about it is true."""

import ast
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_script

import configurator
from nib import errors
from nib.errors import UserError
from nib.run.checks import check_config, settle_schedule

SCRIPTS = {path.stem for path in ROOT.glob('*.py')} - {'model', 'configurator'}


def imported(path: Path) -> set[str]:
    """The top names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or '').split('.')[0])
    return names


def test_third_party_imports_are_declared():
    declared = set(re.findall(r'"([a-z0-9_]+)[>=]', (ROOT / 'pyproject.toml').read_text()))
    pinned = {
        re.match('[a-z]+', line)[0] for line in (ROOT / 'requirements.txt').read_text().split()
    }
    assert pinned <= declared
    own = SCRIPTS | {'model', 'configurator', 'nib', 'benchmarks'}
    for path in [*ROOT.glob('*.py'), *ROOT.glob('nib/**/*.py'), *ROOT.glob('data/*/*.py')]:
        outside = (
            imported(path) - own - set(sys.stdlib_module_names) - {'urllib3'}
        )  # requests brings it
        assert outside <= declared, path


def requirements(lines) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name>=1.2 and name==1.2.3 -> {'name': ('>=', (1, 2))} and {'name': ('==', (1, 2, 3))}."""
    found = {}
    for line in lines:
        name, sign, version = re.fullmatch(r'([\w-]+)(>=|==)([\d.]+)', line).groups()
        found[name] = sign, tuple(map(int, version.split('.')))
    return found


def test_a_script_names_the_first_required_package_that_is_missing():
    lines = (ROOT / 'requirements.txt').read_text().split()
    required = [re.match('[a-z]+', line)[0] for line in lines]
    done = run_script('-S', 'train.py', '--help', python=sys.executable)  # no site-packages
    assert done.returncode == 2 and not done.stdout
    said = f'error: the package {required[0]} is not installed: pip install -r requirements.txt'
    assert done.stderr == f'{said}\n' and required == list(errors.REQUIRED)


def test_requirements_and_pyproject_ask_for_the_same():
    """Same packages and lower bounds; requirements*.txt may pin a version that the bound allows."""
    project = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    for key, file in (('dependencies', 'requirements.txt'), ('dev', 'requirements-dev.txt')):
        asked = requirements(
            ast.literal_eval(re.search(rf'^{key} = (\[.*?\])$', project, re.M | re.S)[1])
        )
        lines = (ROOT / file).read_text(encoding='utf-8').splitlines()
        installed = requirements(line for line in lines if not line.startswith('-r '))
        assert installed.keys() == asked.keys(), file
        for name, (sign, version) in installed.items():
            assert asked[name][0] == '>=', name
            assert version >= asked[name][1] if sign == '==' else version == asked[name][1], name


def resolved(config, device, *flags):
    """A config file's values on a machine with this device."""
    block = configurator.read_block(str(ROOT / 'train.py'))
    argv = [str(ROOT / 'config' / config), f'--device={device}', *flags]
    return configurator.resolve(block, argv)[0]


def test_configs_are_what_the_docs_say():
    def sizes(values):
        return tuple(
            values[key]
            for key in (
                'n_layer',
                'n_head',
                'n_embd',
                'block_size',
                'batch_size',
                'dropout',
                'max_iters',
            )
        )

    for config in ('train_shakespeare_char.py', 'modern_shakespeare_char.py', 'train_text.py'):
        assert sizes(resolved(config, 'cpu')) == (4, 4, 128, 64, 12, 0.0, 2000)
        for device in ('cuda', 'cuda:1', 'mps'):
            assert sizes(resolved(config, device)) == (6, 6, 384, 256, 64, 0.2, 5000)
        assert settle_schedule(resolved(config, 'cpu'))['lr_decay_iters'] == 2000
    assert sizes(resolved('train_gpt2.py', 'cuda')) == (12, 12, 768, 1024, 12, 0.0, 600000)
    assert resolved('train_gpt2.py', 'cuda')['gradient_accumulation_steps'] == 40
    small = resolved('train_gpt2_24gb.py', 'cuda')
    assert small['batch_size'] * small['gradient_accumulation_steps'] == 12 * 40
    modern = resolved('modern_shakespeare_char.py', 'cpu')
    assert {modern[key] for key in ('position', 'norm', 'mlp', 'qk_norm')} == {
        'rotary',
        'rms',
        'swiglu',
        True,
    }
    with pytest.raises(UserError, match='dataset is empty'):
        check_config(resolved('train_text.py', 'cpu'), world_size=1)
    assert resolved('train_text.py', 'cpu', '--dataset=notes')['out_dir'] == 'out-notes'


@pytest.mark.slow
def test_a_vs_nanogpt_that_cannot_be_is_refused_on_one_line(tmp_path):
    for flags in ([], [f'--nanogpt={tmp_path}']):
        done = run_script('benchmarks/vs_nanogpt.py', *flags)
        assert (
            done.returncode == 2
            and 'clone of karpathy/nanoGPT' in done.stderr
            and len(done.stderr.splitlines()) == 1
        )
