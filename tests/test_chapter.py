"""docs/training_loop.md and docs/model.md: their numbers are computed here, and the code that they
quote is in its file.

The Chinese chapters have the same code and numbers.
"""

import doctest
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import configurator
import train
from benchmarks import measure
from nib.doctor import health
from nib.doctor.problems import PROBLEMS

ENGLISH, CHINESE = ROOT / 'docs/training_loop.md', ROOT / 'docs/training_loop.zh.md'
MODEL, MODEL_CHINESE = ROOT / 'docs/model.md', ROOT / 'docs/model.zh.md'
RECORDED = ROOT / 'benchmarks/results/training_loop.txt'
MEASURED = ROOT / 'benchmarks/results/chapter.txt'  # by benchmarks/chapter.py
DATASETS = Path(
    os.environ.get('NIBGPT_DATA_DIR', ROOT / 'data')
)  # where tiny Shakespeare's bins may be
NUMBER = re.compile(r'(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?')
MACHINE = re.compile(
    r'tokens/s [\d,]+|ms/step [\d.]+|MFU .*$|; [\d.]+ s$', re.MULTILINE
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


def run_examples(blocks: list[Block], names: dict, path: Path = ENGLISH):
    """The blocks' examples, one after the other in one session."""
    runner, failures = doctest.DocTestRunner(Checker(), verbose=False), []
    for block in blocks:
        examples = doctest.DocTestParser().get_doctest(
            block.body, names, path.name, str(path), block.line
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


def test_every_example_of_the_chapter_on_the_model_gives_what_it_shows():
    with torch.random.fork_rng():
        run_examples(read_blocks(MODEL, 'pycon'), {'__name__': 'chapter'}, MODEL)


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


def missing_quote(block: Block) -> tuple[str, int] | None:
    """Returns the first line of a quote that its file lacks, and its place in the block."""
    source = (ROOT / block.kind.removeprefix('python ')).read_text()
    lines = [line.partition('  # ')[0] for line in source.splitlines()]  # quotes omit comments
    place = 0
    for number, quoted in enumerate(block.body.splitlines()):
        if quoted.strip() != '...':
            if quoted not in lines[place:]:
                return quoted.strip(), number
            place = lines.index(quoted, place) + 1
    return None


def quotes_of(*chapters: Path) -> list[list[tuple[Path, Block]]]:
    """Returns each quote of a chapter: its block in every language."""
    return [
        list(zip(chapters, blocks))
        for blocks in zip(*(read_blocks(path) for path in chapters))
        if blocks[0].kind.startswith('python ')
    ]


@pytest.mark.parametrize(
    'quote',
    [*quotes_of(ENGLISH, CHINESE), *quotes_of(MODEL, MODEL_CHINESE)],
    ids=lambda quote: f'{quote[0][0].name} {quote[0][1].line}',
)
def test_quoted_lines_stand_in_their_file(quote):
    if missing := missing_quote(quote[0][1]):
        pytest.fail(where_to_look(quote, *missing), pytrace=False)


def where_to_look(quote: list[tuple[Path, Block]], quoted: str, number: int) -> str:
    """Returns a line for the editor of a file: which paragraphs quote what is no longer there."""
    places = ' and '.join(f'docs/{path.name}:{block.line + 1 + number}' for path, block in quote)
    source = quote[0][1].kind.removeprefix('python ')
    return f'{source} no longer has {quoted!r}: change the quote and its paragraph, {places}'


def test_a_changed_line_names_its_paragraph_in_both_languages():
    (english, ours), chinese = quotes_of(ENGLISH, CHINESE)[0]
    changed = replace(ours, body=ours.body.replace('get_lr', 'learning_rate_of'))
    quoted, number = missing_quote(changed)
    said = where_to_look([(english, changed), chinese], quoted, number)
    assert quoted == 't.optimizer.lr = learning_rate_of(state.step)' and '\n' not in said
    places = re.findall(r'docs/([\w.]+):(\d+)', said)
    assert [name for name, _ in places] == [ENGLISH.name, CHINESE.name]
    for name, line in places:
        text = (ROOT / 'docs' / name).read_text(encoding='utf-8').splitlines()
        assert text[int(line) - 1].strip() == 't.optimizer.lr = get_lr(state.step)'


def read_sums(path: Path) -> list[tuple[str, str]]:
    """Returns both sides of equations in the prose whose left side can be computed."""
    prose = ' '.join(' '.join(text for _, text in sections(path)).replace(',', '').split())
    sums = re.findall(r'((?:[(]?\d[\d./]*|[*/+-]{1,2}) (?:[\d./*+() -]*))= (-?\d[\d./]*\d)', prose)
    return [(left, right) for left, right in sums if set(left) & set('*/+-')]


def test_sums_in_the_prose_are_right():
    sums = [*read_sums(ENGLISH), *read_sums(MODEL)]
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
    '1.3': 'Shannon',
    '1e-2': 'common practice',
    '1e-3': 'common practice',
    '1e-4': 'common practice',
    '1e-5': "LayerNorm's default",
    '1e14': 'an example',
}


@pytest.mark.parametrize('path', [ENGLISH, MODEL], ids=lambda path: path.name)
def test_numbers_in_the_prose_come_from_somewhere(path):
    """Numbers of three digits or more also occur, perhaps rounded, in a block or an equation."""
    sources = [block.body for block in read_blocks(path)]
    sources += [side for sides in read_sums(path) for side in sides] + [MEASURED.read_text()]
    shown = [number.replace(',', '') for text in sources for number in NUMBER.findall(text)]
    for heading, prose in sections(path):
        own = re.sub(r'\]\([^)]+\)|\b(?:19|20)\d\d\b', '', prose)  # without links and years
        for number in NUMBER.findall(own):
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


def test_the_tables_of_experiments_are_those_that_were_measured():
    tables = read_blocks(ENGLISH, 'text recorded')
    assert len(tables) == 2
    for table in tables:
        assert table.body in MEASURED.read_text(), table.line


@pytest.mark.slow
def test_the_pictures_are_those_that_the_script_draws(run_main, tmp_path, config_of_train):
    done = run_main('benchmarks/chapter.py', f'--pictures={tmp_path}')
    assert done.returncode == 0, done.stderr
    # The path of a weight. Other processors round differently, which adds up over 300 steps.
    tolerance = 0 if MEASURED.read_text().startswith(measure.describe_machine()) else 1e-5
    drawn, recorded = (
        [
            float(number)
            for number in re.findall(r'-?\d\.\d{6}', re.search('the weight: .*', text)[0])
        ]
        for text in (done.stdout, MEASURED.read_text())
    )
    assert len(drawn) == 3 and drawn == pytest.approx(recorded, abs=tolerance)
    text = ''.join(path.read_text(encoding='utf-8') for path in (ENGLISH, MODEL))
    assert {path.name for path in tmp_path.iterdir()} == set(re.findall(r'\((\w+\.svg)\)', text))
    for path in tmp_path.iterdir():
        drawn, shown = path.read_text(), (ROOT / 'docs' / path.name).read_text()
        assert re.findall('<text.*?>(.*?)</text>', drawn) == re.findall(
            '<text.*?>(.*?)</text>', shown
        )


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


# -- the table of problems -------------------------------------------------------------------------


def problem_rows(path: Path) -> list[list[str]]:
    rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in path.read_text(encoding='utf-8').splitlines()
        if line.startswith('| ') and 'config/lab/' in line
    ]
    assert rows
    return rows


def test_every_problem_has_its_row():
    names = [row[2] for row in problem_rows(ENGLISH)]
    grave = {'critical': ' (critical)', 'warning': '', 'note': ' (note)'}
    assert names == [
        f'[`{name}`](../config/lab/{name}.py){grave[problem.severity]}'
        for name, problem in PROBLEMS.items()
    ]


def test_what_to_change_is_what_the_doctor_says():
    for (_, _, _, change), problem in zip(problem_rows(ENGLISH), PROBLEMS.values(), strict=True):
        said = [advice if isinstance(advice, str) else advice[1] for advice in problem.changes]
        assert change.replace('`', '') == '; '.join(said)


def test_what_the_doctor_sees_is_recorded_by_that_name(folder, run_main):
    """Code in the second column of the table is a name in metrics.jsonl or a key of the config."""
    sources = ' '.join(
        (ROOT / file).read_text() for file in ('nib/run/logbook.py', 'nib/doctor/vitals.py')
    )
    keys = configurator.read_block(str(ROOT / 'train.py')).defaults
    named = {name for row in problem_rows(ENGLISH) for name in re.findall('`([^`]+)`', row[1])}
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


def test_what_fixes_a_problem_is_a_key_of_the_config():
    block = configurator.read_block(str(ROOT / 'train.py'))
    elsewhere = {
        'x = x + layer(norm(x))',
        'y[t] = x[t + 1]',
        'attention_scores()',
        'model.py',
        'OUT_DIR/best',
        'model(x, y)',
        '--init_from=OUT_DIR/step-N',
        'debug_training.py',
        'prepare.py',
        'prepare.py --tokenizer=char',
        'OMP_NUM_THREADS',
    }
    keys = set()
    for _, _, name, change in problem_rows(ENGLISH):
        plain = re.sub('`[^`]+`', '', change)
        assert not [
            key for key in block.defaults if '_' in key and re.search(rf'\b{key}\b', plain)
        ], name
        for word in set(re.findall('`([^`]+)`', change)) - elsewhere:
            key, equals, value = word.partition(' = ')
            used = set(re.findall(r'\b[a-z]\w*', word))
            assert used and used <= set(block.defaults), (name, word)
            if equals:  # the value is one that the key can have
                configurator.resolve(block, [f'--{key}={eval(value, {}, dict(block.defaults))}'])
            keys |= used
    assert len(keys) > 15


def test_healthy_ranges_are_those_of_the_doctor():
    text = ENGLISH.read_text(encoding='utf-8')
    rows = dict(re.findall(r'^\| ([^|]+) \| ([^|]+) \| [^|]+ \|$', text, re.MULTILINE))
    ranges = {
        '`grad norm`, after the first steps': health.GRAD_NORM,
        'update ratio of AdamW': health.UPDATE_RATIO,
        'update ratio of Muon': health.MUON_RATIO,
    }
    for name, (low, high) in ranges.items():
        assert re.match(rf'{low:g} to {high:g}\b', rows[name]), name
    assert rows['dead units of an MLP'] == f'below {health.DEAD:.0%}'
    assert rows['entropy of attention'].startswith(f'above {health.ENTROPY:.0%}')


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


REMARK = re.compile(r' *(?<=  )# .*$|""".*"""', re.MULTILINE)  # comments and docstrings


@pytest.mark.parametrize(
    'chapter, translation', [(ENGLISH, CHINESE), (MODEL, MODEL_CHINESE)], ids=lambda path: path.name
)
def test_the_chinese_chapter_has_the_same_code_numbers_and_headings(chapter, translation):
    for ours, theirs in zip(read_blocks(chapter), read_blocks(translation), strict=True):
        assert theirs.kind == ours.kind, theirs.line
        assert REMARK.sub('', theirs.body) == REMARK.sub('', ours.body), theirs.line
    english, chinese = sections(chapter), sections(translation)
    assert [heading for heading, _ in chinese] == [heading for heading, _ in english] and len(
        english
    ) > 15
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


@pytest.mark.parametrize('path', [CHINESE, MODEL_CHINESE], ids=lambda path: path.name)
def test_the_chinese_code_has_chinese_comments(path):
    remarks = [
        found for block in read_blocks(path, 'pycon') for found in REMARK.findall(block.body)
    ]
    assert len(remarks) > 10
    for remark in remarks:
        words = re.findall('[a-z]{3,}', remark)
        assert re.search(r'[\u4e00-\u9fff]', remark) or '=' in remark or not words, remark


@pytest.mark.parametrize('path', [ENGLISH, CHINESE], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    targets = re.findall(r'\]\(([^)#:]+)\)', path.read_text(encoding='utf-8'))
    assert 'training_loop.png' in targets
    assert all((path.parent / target).exists() for target in targets)
