"""docs/training_loop.md: its numbers are computed here, and the code that it quotes is in its file.

The Chinese chapter has the same code and numbers.
"""

import doctest
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import configurator
import train
from nib.doctor.troubles import TROUBLES

ENGLISH, CHINESE = ROOT / 'docs/training_loop.md', ROOT / 'docs/training_loop.zh.md'
RECORDED = ROOT / 'benchmarks/results/training_loop.txt'
DATASETS = Path(
    os.environ.get('NIBGPT_DATA_DIR', ROOT / 'data')
)  # where tiny Shakespeare's bins may be
NUMBER = re.compile(r'(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?')
MACHINE = re.compile(
    r'tokens/s [\d,]+|ms/step [\d.]+|; [\d.]+ s$', re.MULTILINE
)  # what depends on the machine

needs_shakespeare = pytest.mark.skipif(
    not (DATASETS / 'shakespeare_char/train.bin').exists(),
    reason='tiny Shakespeare has not been prepared',
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a chapter."""

    kind: str  # what stands after the fence: 'pycon', 'console', 'python train.py'
    body: str
    line: int  # number of its first line


def read_blocks(path: Path, kind: str = '') -> list[Block]:
    text = path.read_text(encoding='utf-8')
    blocks = [
        Block(found[1], found[2], text[: found.start(2)].count('\n'))
        for found in re.finditer(r'^```(.+)\n((?:.*\n)*?)```$', text, re.MULTILINE)
    ]
    return [block for block in blocks if not kind or block.kind == kind]


def close(want: str, got: str) -> bool:
    """Returns whether two texts are equal up to white space and the last digits of decimals."""
    want, got = ' '.join(want.split()), ' '.join(got.split())
    if NUMBER.sub('#', want) != NUMBER.sub('#', got):
        return False
    for wanted, given in zip(NUMBER.findall(want), NUMBER.findall(got)):
        digits, _, exponent = wanted.replace(',', '').partition('e')
        # Another processor adds in another order.
        units = (
            0 if '.' not in digits else 1 if len(digits.strip('-0.')) < 5 else 3
        )  # of the last digit
        allowed = units * 10.0 ** (int(exponent or 0) - len(digits.partition('.')[2]))
        if abs(float(wanted.replace(',', '')) - float(given.replace(',', ''))) > allowed * (
            1 + 1e-9
        ):
            return False
    return True


class Checker(doctest.OutputChecker):
    def check_output(self, want, got, optionflags):
        return close(want, got)


def run_examples(blocks: list[Block], names: dict):
    """The blocks' examples, one after the other in one session."""
    runner, failures = doctest.DocTestRunner(Checker(), verbose=False), []
    for block in blocks:
        examples = doctest.DocTestParser().get_doctest(
            block.body, names, ENGLISH.name, str(ENGLISH), block.line
        )
        assert examples.examples, block
        examples.globs = names  # the parser takes a copy
        runner.run(examples, out=failures.append, clear_globs=False)
    assert not failures, ''.join(failures)


@pytest.fixture
def config_of_train():
    """What the chapter sets in the module train is put back."""
    before = dict(vars(train))
    yield
    vars(train).clear()
    vars(train).update(before)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the repository's configs and no data yet."""
    (tmp_path / 'config').symlink_to(ROOT / 'config')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_example_gives_what_it_shows(folder, run_main, config_of_train):
    for command, _ in commands(read_blocks(ENGLISH, 'console')[0])[
        :2
    ]:  # the data that the examples read
        run_command(command, run_main)
    with torch.random.fork_rng():
        run_examples(read_blocks(ENGLISH, 'pycon'), {'__name__': 'chapter'})


def test_a_wrong_digit_is_noticed():
    assert close('loss 3.8057, grad  norm 0.77\n', 'loss 3.8055, grad norm 0.77') and close(
        '1e-05 of 27,200', '1e-05 of 27,200'
    )
    for want, got in [
        ('3.8057', '3.8061'),
        ('27,200', '27,201'),
        ('-0.5', '0.5'),
        ('loss 1.0', 'lost 1.0'),
        ('1.0', '1.0 2.0'),
        ('3.23e-04', '3.25e-04'),
        ('True', 'False'),
        ('0.77', '0.79'),
    ]:
        assert not close(want, got)
    for blocks in (read_blocks(ENGLISH, 'pycon'), read_blocks(ENGLISH, 'console')):
        assert len(blocks) > 1
    with pytest.raises(AssertionError, match='0.30000000000000004'):
        run_examples([Block('pycon', '>>> 0.1 + 0.2\n0.5\n', 1)], {})


@pytest.mark.parametrize(
    'block',
    [block for block in read_blocks(ENGLISH) if block.kind.startswith('python ')],
    ids=lambda block: f'line {block.line}',
)
def test_quoted_lines_stand_in_their_file(block):
    source = (ROOT / block.kind.removeprefix('python ')).read_text()
    lines = [line.partition('  # ')[0] for line in source.splitlines()]  # quotes omit comments
    place = 0
    for quoted in block.body.splitlines():
        if quoted.strip() != '...':
            assert quoted in lines[place:], f'{block.kind}: {quoted.strip()!r} is missing, or moved'
            place = lines.index(quoted, place) + 1


def read_sums() -> list[tuple[str, str]]:
    """Returns both sides of equations in the prose whose left side can be computed."""
    prose = ' '.join(' '.join(text for _, text in sections(ENGLISH)).replace(',', '').split())
    sums = re.findall(r'((?:[(]?\d[\d./]*|[*/+-]{1,2}) (?:[\d./*+() -]*))= (-?\d[\d./]*\d)', prose)
    return [(left, right) for left, right in sums if set(left) & set('*/+-')]


def test_sums_in_the_prose_are_right():
    sums = read_sums()
    assert len(sums) >= 20
    for left, right in sums:
        if '/' in right:
            assert math.isclose(eval(left), eval(right)), (left, right)
        else:
            assert round(eval(left), len(right.partition('.')[2])) == float(right), (left, right)


# Numbers of the prose that nothing in the chapter computes, and where they are from.
ELSEWHERE = {
    '1.88': 'common tutorials',
    '124': 'GPT-2, millions of weights',
    '65,536': 'GradScaler',
    '1000': 'an example',
    '1,000': 'an exercise',
    '1951': 'Shannon',
    '1.3': 'Shannon',
}


def test_numbers_in_the_prose_come_from_somewhere():
    """Numbers of three digits or more also occur, perhaps rounded, in a block or an equation."""
    shown = [
        number.replace(',', '')
        for block in read_blocks(ENGLISH)
        for number in re.findall(NUMBER, block.body)
    ]
    shown += [
        number for sides in read_sums() for side in sides for number in re.findall(NUMBER, side)
    ]
    for heading, prose in sections(ENGLISH):
        for number in NUMBER.findall(prose):
            digits = number.replace(',', '')
            decimals = len(digits.partition('.')[2])
            if len(digits.strip('-0.')) > 2 and number not in ELSEWHERE:
                assert any(
                    abs(round(float(other), decimals)) == abs(float(digits)) for other in shown
                ), (heading, number)


# -- commands --------------------------------------------------------------------------------------


def commands(block: Block) -> list[tuple[str, list[str]]]:
    """Each command with the lines of its output that are shown."""
    parts = re.split(r'^\$ (.*)\n', block.body, flags=re.MULTILINE)[1:]
    return [
        (command, [line for line in shown.splitlines() if line != '...'])
        for command, shown in zip(parts[::2], parts[1::2])
    ]


def run_command(command: str, run_main) -> str:
    """Runs it in the current folder, where its data goes to; returns what it printed."""
    program, script, *flags = shlex.split(command)
    assert program == 'python'
    if script == '-c':
        subprocess.run(
            command.replace('python', shlex.quote(sys.executable), 1), shell=True, check=True
        )
        return ''
    done = run_main(
        script, *flags, '--out_dir=data/zen' if script.endswith('prepare.py') else '--data_dir=data'
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_shown(shown: list[str], printed: str):
    """The lines stand in what was printed, in their order."""
    lines = iter(MACHINE.sub('', printed).splitlines())
    for line in shown:
        assert any(close(MACHINE.sub('', line), other) for other in lines), (
            f'{line!r} is not there or not here:\n{printed}'
        )


@pytest.mark.slow
def test_every_command_prints_what_is_shown(folder, run_main):
    for block in read_blocks(ENGLISH, 'console'):
        for command, shown in commands(block):
            assert_shown(shown, run_command(command, run_main))


def test_the_recorded_run_is_the_one_that_is_shown():
    (block,) = read_blocks(ENGLISH, 'console recorded')
    for command, shown in commands(block):
        assert RECORDED.read_text().startswith(f'$ {command}\n') and len(shown) > 5
        assert_shown(shown, RECORDED.read_text())


@needs_shakespeare
@pytest.mark.slow
def test_the_recorded_run_begins_like_this_one(run_main, tmp_path):
    done = run_main(
        'train.py',
        'config/train_shakespeare_char.py',
        '--device=cpu',
        '--dtype=float32',
        f'--data_dir={DATASETS}',
        f'--out_dir={tmp_path}',
        '--max_iters=50',
        '--lr_decay_iters=2000',
        '--warmup_iters=100',
    )
    begun = [
        line for line in RECORDED.read_text().splitlines() if re.match(r'step (0|1|50):', line)
    ]
    assert len(begun) == 3
    assert_shown(begun, done.stdout)


@needs_shakespeare
def test_tables_of_characters_lose_what_is_shown():
    run_examples(
        [
            Block(block.kind, block.body.replace("'data/", f"'{DATASETS}/"), block.line)
            for block in read_blocks(ENGLISH, 'pycon shakespeare')
        ],
        {},
    )


# -- the table of troubles -------------------------------------------------------------------------


def trouble_rows(path: Path) -> list[list[str]]:
    rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in path.read_text(encoding='utf-8').splitlines()
        if line.startswith('| ') and 'config/lab/' in line
    ]
    assert rows
    return rows


def test_every_trouble_has_its_row():
    names = [row[2] for row in trouble_rows(ENGLISH)]
    grave = {'critical': ' (critical)', 'warning': '', 'note': ' (note)'}
    assert names == [
        f'[`{name}`](../config/lab/{name}.py){grave[trouble.severity]}'
        for name, trouble in TROUBLES.items()
    ]


def test_what_to_change_is_what_the_doctor_says():
    for (_, _, _, change), trouble in zip(trouble_rows(ENGLISH), TROUBLES.values(), strict=True):
        said = [advice if isinstance(advice, str) else advice[1] for advice in trouble.changes]
        assert change.replace('`', '') == '; '.join(said)


def test_what_the_doctor_sees_is_recorded_by_that_name(folder, run_main):
    """Code in the second column of the table is a name in metrics.jsonl or a key of the config."""
    sources = ' '.join(
        (ROOT / file).read_text() for file in ('nib/run/logbook.py', 'nib/doctor/vitals.py')
    )
    keys = configurator.read_block(str(ROOT / 'train.py')).defaults
    named = {name for row in trouble_rows(ENGLISH) for name in re.findall('`([^`]+)`', row[1])}
    assert len(named) > 5
    for name in named - set(keys):
        assert re.search(rf"['\"]{re.escape(name.removesuffix('...'))}|{name}: float", sources), (
            name
        )


@pytest.mark.parametrize('path', [ENGLISH, CHINESE], ids=lambda path: path.name)
def test_commands_name_files_that_are_there(path):
    named = re.findall(
        r'(?:(?<=python )|(?<=\.py ))(?:[\w-]+/)*\w+\.py', path.read_text(encoding='utf-8')
    )
    assert len(set(named)) >= 7
    assert [file for file in set(named) if not (ROOT / file).exists()] == []


def test_what_a_trouble_is_to_be_mended_with_is_a_key_of_the_config():
    block = configurator.read_block(str(ROOT / 'train.py'))
    elsewhere = {
        'x = x + layer(norm(x))',
        'y[t] = x[t + 1]',
        'attention_scores()',
        'model.py',
        'OUT_DIR/best',
        'debug_training.py',
        'prepare.py',
        'prepare.py --tokenizer=char',
    }
    keys = set()
    for _, _, name, change in trouble_rows(ENGLISH):
        plain = re.sub('`[^`]+`', '', change)
        assert not [
            key for key in block.defaults if '_' in key and re.search(rf'\b{key}\b', plain)
        ], name
        for word in set(re.findall('`([^`]+)`', change)) - elsewhere:
            key, equals, value = word.partition(' = ')
            used = set(re.findall(r'\b[a-z]\w*', word))
            assert used and used <= set(block.defaults), (name, word)
            if equals:  # the value is one that the key can have
                configurator.resolve(
                    block.defaults,
                    block.types,
                    [f'--{key}={eval(value, {}, dict(block.defaults))}'],
                )
            keys |= used
    assert len(keys) > 15


# -- the chapter in Chinese ------------------------------------------------------------------------


def sections(path: Path) -> list[tuple[str, str]]:
    """The headings' level and number, each with the prose below it."""
    text = re.sub(
        r'^```.+\n(?:.*\n)*?```$', '', path.read_text(encoding='utf-8'), flags=re.MULTILINE
    )
    parts = re.split(
        r'^(#+(?: \d+\.)?)(?: .*)$|^<details><summary>(\d+\.) .*$', text, flags=re.MULTILINE
    )
    return [
        (heading or answer, prose)
        for heading, answer, prose in zip(parts[1::3], parts[2::3], parts[3::3])
    ]


def test_the_chinese_chapter_has_the_same_code_numbers_and_headings():
    for ours, theirs in zip(read_blocks(ENGLISH), read_blocks(CHINESE), strict=True):
        assert (theirs.kind, theirs.body) == (ours.kind, ours.body), theirs.line
    english, chinese = sections(ENGLISH), sections(CHINESE)
    assert [heading for heading, _ in chinese] == [heading for heading, _ in english] and len(
        english
    ) > 20
    for (heading, ours), (_, theirs) in zip(english, chinese):
        for pattern in (
            r'\d+(?:,\d{3})*(?:\.\d+)?',
            r'`[^`]+`',
            r'^\|',
            r'^- ',
            r'^\d+\. ',
            r'^    .*$',
        ):
            assert sorted(re.findall(pattern, theirs, re.MULTILINE)) == sorted(
                re.findall(pattern, ours, re.MULTILINE)
            ), heading


@pytest.mark.parametrize('path', [ENGLISH, CHINESE], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    targets = re.findall(r'\]\(([^)#:]+)\)', path.read_text(encoding='utf-8'))
    assert 'training_loop.png' in targets
    assert all((path.parent / target).exists() for target in targets)
