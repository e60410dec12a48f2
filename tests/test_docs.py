"""README.md and docs/: every command runs here or is listed with the reason why it does not.

What the pages refer to exists, and the figures that they quote were measured.
"""

import re
import shlex
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT

from nib.doctor.problems import PROBLEMS
from nib.files import command

PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')])
SHELLS = ('sh', 'console', 'console recorded', '')  # blocks of commands; '' is an indented one
PROGRAMS = (
    'python',
    'python3',
    'pip',
    'pytest',
    'torchrun',
    'tensorboard',
    'git',
    'ruff',
    'mypy',
    '.ci/run',
)

# A model and a run that take a moment; for scripts that read train.py's keys.
TINY = [
    '--device=cpu',
    '--dtype=float32',
    '--data_dir=data',
    '--n_layer=1',
    '--n_head=2',
    '--n_embd=16',
    '--block_size=8',
    '--batch_size=2',
    '--max_iters=2',
    '--warmup_iters=0',
    '--eval_interval=2',
    '--eval_iters=1',
]
TINY_RUN = [*TINY, '--overwrite', '--sample_tokens=0']
SHORT_SAMPLE = ['--device=cpu', '--max_new_tokens=3']

# Commands that are run, each with the flags that make it small. They share a folder, which holds a
# dataset in the place of tiny Shakespeare, a folder of notes, and a run in each folder that the
# pages name.
RUN = {
    'python train.py config/train_shakespeare_char.py': TINY_RUN,
    'python train.py --init_from=resume --out_dir=out-shakespeare-char': [
        '--data_dir=data',
        '--max_iters=4',
    ],
    'python train.py config/modern_shakespeare_char.py': [*TINY_RUN, '--n_kv_head=1'],
    'python train.py config/fast_shakespeare_char.py': [*TINY_RUN, '--cooldown_iters=1'],
    'python train.py config/train_text.py --dataset=notes': TINY_RUN,
    'python train.py config/train_text.py --dataset=notes --params=10M': [*TINY_RUN, '--params=5k'],
    'python train.py config/lab/lr_too_high.py --stop_on=warning': [*TINY_RUN, '--stop_on=never'],
    'python convert.py --out_dir=out-shakespeare-char --dest=shakespeare-hf': [],
    'python convert.py --out_dir=out-shakespeare-char --to=nanogpt --dest=shakespeare-nanogpt': [],
    'python convert.py --out_dir=out-shakespeare-char --to=gguf --dest=shakespeare.gguf': [],
    'python train.py --help': [],
    'python train.py config/train_shakespeare_char.py --learning_rate=3e-4 --print_config': [],
    'python sample.py '
    '--out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=1': SHORT_SAMPLE,
    'python sample.py --out_dir=out-notes': SHORT_SAMPLE,
    'python sample.py --out_dir=out-shakespeare-char --dtype=int8': SHORT_SAMPLE,
    'python data/text/prepare.py --input=PATH/TO/NOTES --name=notes': [
        '--name=',
        '--out_dir=data/notes',
    ],
    'python data/text/prepare.py '
    '--input=PATH/TO/NOTES --tokenizer=bpe --vocab_size=4096 --name=notes': [
        '--vocab_size=260',
        '--name=',
        '--out_dir=data/trained',
    ],
    'python data/text/prepare.py '
    '--input=PATH/TO/NOTES --tokenizer=out-shakespeare-char --name=more': [
        '--name=',
        '--out_dir=data/more',
        '--replace_missing= ',
    ],
    'python train.py config/train_text.py --dataset=more --init_from=out-shakespeare-char': [
        *TINY_RUN,
        '--out_dir=out-more',
    ],
    'python report.py --out_dir=out-shakespeare-char': ['--no-png'],
    'python report.py out-shakespeare-char out-two': ['--no-png'],
    'python debug_training.py config/train_shakespeare_char.py': [*TINY, '--overfit_steps=2'],
    'python debug_training.py config/train_shakespeare_char.py --explain': [*TINY],
}
# Commands that another test runs.
ELSEWHERE = {
    'python train.py config/train_text.py --dataset=notes --budget=10m': 'test_budget.py',
    'python -c "import this" > zen.txt': 'test_chapter.py',
    'python data/text/prepare.py --input=zen.txt --name=zen': 'test_chapter.py',
    'python train.py config/zen.py --device=cpu': 'test_chapter.py',
    'python train.py config/zen.py '
    '--device=cpu --out_dir=out-halves --max_iters=150': 'test_chapter.py',
    'python train.py config/zen.py '
    '--device=cpu --out_dir=out-halves --init_from=resume': 'test_chapter.py',
    'python train.py '
    'config/train_shakespeare_char.py --device=cpu --dtype=float32': 'test_chapter.py, 50 steps',
    'torchrun --standalone --nproc_per_node=2 train.py config/train_shakespeare_char.py '
    '--gradient_accumulation_steps=2 --out_dir=out-two': 'test_train.py, with a smaller model',
    'torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=10.0.0.1 '
    '--master_port=29500 train.py config/train_gpt2.py': 'needs two hosts',
    'torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py --optimizer=muon '
    '--shard_optimizer': 'test_shares.py, with a smaller model',
    'python report.py '
    '--out_dir=out-shakespeare-char --watch': 'test_report.py; it serves until Ctrl-C',
    'python sweep.py '
    'config/train_shakespeare_char.py --learning_rate=3e-4,1e-3 --seed=1,2': 'test_sweep.py',
    'python bench.py '
    'config/train_shakespeare_char.py --growth=growth.png': 'test_bench.py, with fewer points',
    'python bench.py config/train_gpt2.py --plan': 'test_bench.py',
    'python -m llama_cpp.server --model=shakespeare.gguf --port=8000': 'test_sharing.py',
    'lm_eval --model hf --model_args pretrained=shakespeare-hf,prefix_token_id=0 --tasks spelling '
    '--include_path tasks --device cpu': 'test_sharing.py',
    'python sample.py --init_from=shakespeare-lora '
    '--start="ROMEO:" --temperature=0 --num_samples=1 --max_new_tokens=40': 'test_sharing.py',
    'python benchmarks/planned_memory.py': 'test_bench.py, one config',
    'pytest -n auto': 'this is it',
    'pytest -n auto -m "not slow"': 'pytest',
    'pytest tests/text': 'pytest',
    'ruff check .': '.ci/run',
    'ruff format --check .': '.ci/run',
    'mypy': '.ci/run',
    'pytest tests/test_resume.py': 'pytest',
    'pytest tests/run/test_folder.py': 'pytest',
}
NEEDS_NETWORK = {
    'pip install -r requirements.txt': 'installs packages',
    'pip install -r requirements-dev.txt': 'installs packages',
    'pip install datasets': 'installs packages',
    'pip install huggingface_hub': 'installs packages',
    'pip install gguf': 'installs packages',
    'pip install tokenizers': 'installs packages',
    'pip install tokenizers huggingface_hub': 'installs packages',
    'pip install "llama-cpp-python[server]" openai': 'installs packages',
    'pip install "lm_eval[hf]"': 'installs packages',
    'pip install vllm': 'installs packages',
    'hf auth login': 'needs an account',
    'hf upload YOUR_NAME/shakespeare shakespeare-hf': 'needs an account',
    'python sample.py --init_from=YOUR_NAME/shakespeare --start="ROMEO:"': 'fetches a model',
    'python sample.py --init_from=Qwen/Qwen3-0.6B --chat': 'fetches a model',
    'python data/text/prepare.py --input=PATH/TO/NOTES '
    '--tokenizer=HuggingFaceTB/SmolLM2-135M --name=smol': 'fetches a tokenizer',
    'python sample.py --init_from=gpt2 --start="The meaning of life is"': "fetches GPT-2's weights",
    'pip install '
    'torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu': 'installs packages',
    'git clone https://github.com/karpathy/nanoGPT': 'fetches nanoGPT',
    'python nanoGPT/data/shakespeare_char/prepare.py': 'is a script of nanoGPT',
    'python data/openwebtext/prepare.py': 'fetches 54 GB',
    'python train.py config/finetune_shakespeare.py': "fetches GPT-2's weights",
    'python train.py config/eval_gpt2.py': "fetches GPT-2's weights",
    'python bench.py '
    'config/train_shakespeare_char.py --steps=100 --vs_nanogpt=nanoGPT': 'needs a clone of nanoGPT',
    'python bench.py config/train_shakespeare_char.py --n_layer=6 --n_head=6 --n_embd=384 '
    '--block_size=256 --batch_size=16 --vs_nanogpt=nanoGPT': 'needs a clone of nanoGPT',
    'python bench.py --dataset=shakespeare --batch_size=4 --gradient_accumulation_steps=1 '
    '--steps=2 --rounds=2 --new_tokens=0 --vs_nanogpt=nanoGPT': 'needs a clone of nanoGPT',
    'python benchmarks/sampling.py --nanogpt=nanoGPT': 'needs a clone of nanoGPT',
    'python benchmarks/generators.py --prompt_tokens=256 --new_tokens=30 '
    '--rounds=5': 'needs CTranslate2',
    'python benchmarks/generators.py --prompt_tokens=900 --new_tokens=20 --rounds=4 '
    '--dtypes=float32,bfloat16': 'needs CTranslate2',
    'python benchmarks/generators.py --prompt_tokens=256 --new_tokens=30 --rounds=5 '
    '--shape=smollm2': 'needs CTranslate2',
    'python benchmarks/encoding.py --nanogpt=nanoGPT --input=FOLDER': 'needs a clone of nanoGPT',
    'python benchmarks/vs_nanogpt.py --nanogpt=nanoGPT --rounds=5': 'needs a clone of nanoGPT',
    'python benchmarks/peers.py --nanogpt=nanoGPT': 'needs a clone of nanoGPT',
}
NEEDS_GPU = {
    'vllm serve shakespeare-hf': "is vLLM's command, and serves until Ctrl-C",
    'python benchmarks/gpu.py --nanogpt=nanoGPT --out=gpu-figures --text=input.txt': (
        'rehearsed on a CPU by test_gpu_benchmark.py'
    ),
    'python train.py config/train_gpt2_24gb.py --batch_size=auto': 'trains GPT-2 for days',
}
LONG = {
    'python benchmarks/tokenizer_losses.py --input=input.txt': 'trains five models',
    'python stress/planted_faults.py --text=data/shakespeare_char/input.txt': 'trains 438 models',
    'python stress/crash.py': 'kills 1,000 processes',
    'python stress/corruption.py': 'damages 10,000 checkpoints',
    'python stress/datasets.py': 'starts 800 processes',
    'python stress/fuzz.py': 'runs 10,000 command lines',
    'python stress/foreign_models.py': 'changes 1,000 models',
    'python stress/encodings.py --cases=2000': 'prepares 2,000 texts',
    'python benchmarks/saving.py --rounds=15': 'saves 124M parameters 30 times',
    'python benchmarks/loading.py': 'writes 20 GB',
    'python benchmarks/busy_machine.py': 'takes a quiet machine for two minutes',
    'python benchmarks/scaling.py': 'trains 53 models',
    'python data/stdlib_char/prepare.py': 'test_train.py, as a fallback',
    'python benchmarks/ablation.py --text=data/shakespeare_char/input.txt': 'trains 54 models',
    'python data/text/prepare.py '
    '--input=FOLDER --name=code --tokenizer=byte': 'is a trial with a large text',
    'python train.py config/fast_gpt2.py --dataset=code --max_iters=200 --warmup_iters=10 '
    '--n_layer=4 --n_head=4 --n_embd=256 --block_size=256 --batch_size=16 '
    '--gradient_accumulation_steps=1 --eval_interval=200': 'trains for several minutes',
    'tensorboard '
    '--logdir=out-shakespeare-char': "is TensorBoard's own command, and serves until Ctrl-C",
    'python3 -m venv .venv': 'makes a virtual environment; .ci/run does so',
    'python -m venv .venv': 'makes a virtual environment; .ci/run does so',
    'source .venv/bin/activate': 'makes a virtual environment; .ci/run does so',
    'python benchmarks/same_losses.py --base=main': 'trains two revisions on many configs',
    'python benchmarks/same_losses.py --base=main --timing': 'trains two revisions on many configs',
    '. .venv/bin/activate': 'makes a virtual environment; .ci/run does so',
}
LISTED = {**RUN, **ELSEWHERE, **NEEDS_NETWORK, **NEEDS_GPU, **LONG}

FENCED = re.compile(r'^ *```([^\n`]*)\n(.*?)^ *```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code of a page, fenced or indented."""

    page: Path
    kind: str  # what stands after the fence; '' for an indented one
    body: str


def read_blocks(page: Path) -> list[Block]:
    """The code of a page: fenced blocks and indented ones."""
    text = page.read_text(encoding='utf-8')
    blocks = [Block(page, kind.strip(), body) for kind, body in FENCED.findall(text)]
    blocks += [
        Block(page, '', body)
        for body in re.findall(r'(?:^ {4}.*\n)+', FENCED.sub('', text), re.MULTILINE)
    ]
    return blocks


def is_command(line: str) -> bool:
    words = line.split()
    return len(words) > 1 and words[0] in PROGRAMS or line.strip() in PROGRAMS


def commands_of(block: Block) -> list[str]:
    """A block's command lines, cut at && and joined where they end in a backslash."""
    lines = block.body.replace('\\\n', ' ').splitlines()
    if not block.kind:
        lines = [line for line in lines if is_command(line)]
    elif block.kind.startswith('console'):
        lines = [line.removeprefix('$ ') for line in lines if line.startswith('$ ')]
    lines = [line.partition('  #')[0].strip() for line in lines]
    return [
        part.strip()
        for line in lines
        if line and not line.startswith('#')
        for part in line.split(' && ')
    ]


def all_commands() -> dict[str, Path]:
    """Each command of the pages, with the first page that shows it."""
    found = {}
    for page in PAGES:
        if (
            page.name == 'change_it.md'
        ):  # test_change_it.py runs its commands, after the changes that they need
            continue
        for block in read_blocks(page):
            if block.kind in SHELLS:
                for command in commands_of(block):
                    found.setdefault(command, page)
    return found


def test_every_command_is_run_or_listed_with_a_reason():
    found = all_commands()
    assert len(found) > 30
    unlisted = {command: page.name for command, page in found.items() if command not in LISTED}
    assert not unlisted, (
        'add them to RUN, or to NEEDS_NETWORK, NEEDS_GPU, LONG or ELSEWHERE with the reason'
    )
    assert not set(LISTED) - set(found), 'no page shows these commands any more'


def test_commands_stand_in_blocks_of_their_own():
    """So that none is overlooked: in other blocks, no line begins like a command."""
    for page in PAGES:
        for block in read_blocks(page):
            if block.kind not in SHELLS:
                for line in block.body.splitlines():
                    assert not is_command(line), f'{page.name}: put {line!r} into a ```sh block'


def split_command(command: str) -> tuple[str, list[str]] | None:
    """The script of this project that a command runs, and its arguments, or None."""
    words = shlex.split(command.partition(' > ')[0])
    scripts = [
        i
        for i, word in enumerate(words)
        if word.endswith('.py') and not word.startswith(('config/', '-', 'tests/'))
    ]
    if (
        words[0] not in ('python', 'torchrun')
        or not scripts
        or words[scripts[0]].startswith('nanoGPT/')
    ):
        return None
    return words[scripts[0]], words[scripts[0] + 1 :]


@pytest.mark.parametrize(
    'command', [command for command in all_commands() if split_command(command)]
)
def test_every_command_has_a_script_and_keys_that_exist(command, folder, run_main):
    """--print_config resolves the config files and flags of a command, and runs nothing."""
    script, argv = split_command(command)
    assert (ROOT / script).exists()
    done = run_main(script, *argv, *([] if '--help' in argv else ['--print_config']))
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    """The folder that the commands run in; prepared by the first of them."""
    folder = tmp_path_factory.mktemp('pages')
    (folder / 'config').symlink_to(ROOT / 'config')
    (folder / 'PATH/TO/NOTES').mkdir(parents=True)
    words = 'ROMEO: the cat and a dog.\nHere, a small bird sings: what else, but see?\n'
    (folder / 'PATH/TO/NOTES/first.txt').write_text(words * 30)
    (folder / 'PATH/TO/NOTES/second.md').write_text(words * 30)
    (folder / 'play.txt').write_text(words * 60)
    return folder


@pytest.fixture
def folder(shared, monkeypatch, run_main):
    """The current folder, where all that the commands read is."""
    monkeypatch.chdir(shared)
    if not (shared / 'data').exists():
        for dataset, text in (
            ('shakespeare_char', 'play.txt'),
            ('lab', 'play.txt'),
            ('notes', 'PATH/TO/NOTES'),
        ):
            succeed(
                run_main('data/text/prepare.py', f'--input={text}', f'--out_dir=data/{dataset}')
            )
        for out_dir in ('out-shakespeare-char', 'out-two'):
            succeed(
                run_main(
                    'train.py',
                    'config/train_shakespeare_char.py',
                    *TINY_RUN,
                    f'--out_dir={out_dir}',
                )
            )
        succeed(run_main('train.py', 'config/train_text.py', '--dataset=notes', *TINY_RUN))
        own = ['--input=PATH/TO/NOTES', '--tokenizer=out-shakespeare-char', '--out_dir=data/more']
        succeed(run_main('data/text/prepare.py', *own))
    return shared


def succeed(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize('command', RUN)
def test_command_runs(command, folder, run_main):
    script, argv = split_command(command)
    assert succeed(run_main(script, *argv, *RUN[command])).stdout


def test_the_code_of_the_page_about_notebooks_runs(folder, capfd):
    pytest.importorskip('matplotlib').use('agg')
    blocks = [block for block in read_blocks(ROOT / 'docs/notebook.md') if block.kind == 'python']
    assert len(blocks) > 5
    names: dict = {}
    for block in blocks:
        exec(block.body, names)
    assert (folder / 'attention.png').stat().st_size > 1000
    printed = capfd.readouterr().out
    assert printed.startswith('ROMEO:') and 'perplexity' in printed
    assert 'did you mean out-shakespeare-char?' in printed


# -- what the pages print --------------------------------------------------------------------------


def shown_after(page: str, begins: str) -> list[str]:
    """The lines of a page's block of output that has a line which begins so, without '...'."""
    (body,) = [
        block.body
        for block in read_blocks(ROOT / page)
        if block.kind == 'text' and f'\n{begins}' in '\n' + block.body
    ]
    return [line for line in body.splitlines() if line != '...']


def shape(line: str) -> str:
    """A line with its numbers left out, and what only some evaluations say."""
    return re.sub(r'[\d,.]*\d(?:e[+-]\d+)?', '#', line.replace(', best so far', ''))


@pytest.mark.parametrize('page', ['README.md', 'docs/watching.md'])
def test_a_run_prints_such_lines_as_are_shown(page, folder, run_main):
    done = run_main('train.py', 'config/train_shakespeare_char.py', *TINY_RUN, '--log_interval=1')
    printed = succeed(done).stdout.replace(command('sample.py'), 'python sample.py').splitlines()
    for line in shown_after(page, 'device cpu'):
        if line.startswith('step '):
            assert shape(line) in map(shape, printed), line
        elif not line.startswith(('preparing ', 'data/')):  # the dataset has been prepared
            words = re.match(r'[^\d(]+', line)[0].split(' healthy')[0]
            assert any(other.startswith(words) for other in printed), line


def test_debug_training_prints_such_rows_as_are_shown(folder, run_main):
    command = ['debug_training.py', 'config/train_shakespeare_char.py', *TINY]
    for begins, flags in (
        ('parameter ', ['--overfit_steps=50']),
        ('<- update too large', ['--learning_rate=10', '--overfit_steps=1']),
    ):
        printed = ' '.join(succeed(run_main(*command, *flags)).stdout.split())
        for line in shown_after('docs/watching.md', begins):
            label = re.match(r'(?:(?! {2}| \d).)*', line.strip())[0]
            assert shape(label) in shape(printed), label
    printed = ' '.join(succeed(run_main(*command, '--explain')).stdout.split())
    for line in shown_after('docs/watching.md', 'g  '):
        assert ' '.join(re.sub(r'(?<!\S)-?\d\S*(?:\s+-?\d\S*)+$', '', line).split()) in printed, (
            line
        )


def test_the_finding_that_is_shown_is_the_doctors():
    said = ' '.join(shown_after('docs/watching.md', 'step 10: lr_too_high'))
    problem = PROBLEMS['lr_too_high']
    assert f'lr_too_high, {problem.severity}: ' in said
    for sentences in (problem.causes, problem.changes):
        known = [one if isinstance(one, str) else one[1] for one in sentences]
        assert sum(sentence in said for sentence in known) >= 2, known


# -- what the pages refer to -----------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    text = FENCED.sub('', page.read_text(encoding='utf-8'))
    headings = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_no_paragraph_breaks_off(page):
    """It ends in a sign, not in a letter, unless a formula or code completes its sentence."""
    text = FENCED.sub('    code', page.read_text(encoding='utf-8')).rstrip()
    for paragraph, following in pairwise([*text.split('\n\n'), '']):
        if not paragraph.startswith(('#', '    ')) and not following.startswith('    '):
            assert not paragraph[-1].isalnum(), paragraph


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text(encoding='utf-8')):
        if not target.startswith(('http:', 'https:')):
            path, _, anchor = target.partition('#')
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    folders = 'config|data|nib|tests|benchmarks|stress|docs'
    for name in re.findall(
        rf'(?<![\w/.-])(?:{folders})/[\w/-]+\.(?:py|md|png|txt)\b', page.read_text(encoding='utf-8')
    ):
        made_by_readers = 'NAME' in name or name.endswith('/input.txt')
        assert made_by_readers or (ROOT / name).exists(), name


def keys_of_scripts() -> set[str]:
    keys = set()
    for path in [
        *ROOT.glob('*.py'),
        *ROOT.glob('benchmarks/*.py'),
        *ROOT.glob('stress/*.py'),
        *ROOT.glob('data/*/*.py'),
    ]:
        keys |= set(re.findall(r'^(\w+): .* = ', path.read_text(encoding='utf-8'), re.MULTILINE))
    return keys


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_flags_in_the_prose_are_keys(page):
    """Of inline code. A flag of another program stands beside that program's name."""
    others = {'help', 'print_config', 'jobs', 'sweep_dir'}
    others |= {'max', 'shutdown', 'signals'}  # of torchrun: max-restarts and so on
    for code in re.findall(r'(?<!`)`([^`\n]+)`(?!`)', page.read_text(encoding='utf-8')):
        if not code.startswith(('pip ', 'ruff ', 'git ', 'pytest ')):
            for flag in re.findall(r'(?<!\S)--(?:no-)?(\w+)', code):
                assert flag in keys_of_scripts() | others, code


def test_every_page_is_listed_by_the_readme():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert [
        page.name for page in PAGES if page.parent != ROOT and f'(docs/{page.name})' not in text
    ] == []


def test_every_module_is_listed_by_the_page_about_the_code():
    text = (ROOT / 'docs/code.md').read_text(encoding='utf-8')
    paths = [
        path
        for folder in ('nib', 'benchmarks', 'stress')
        for path in ROOT.glob(f'{folder}/**/*.py')
    ]
    names = {path.relative_to(ROOT).as_posix() for path in [*paths, *ROOT.glob('*.py')]}
    assert [
        name for name in sorted(names) if f'`{name}`' not in text and '__init__' not in name
    ] == []


def test_every_config_is_listed_by_the_page_about_configs():
    text = (ROOT / 'docs/config.md').read_text(encoding='utf-8')
    for path in ROOT.glob('config/*.py'):
        name = re.sub(r'eval_gpt2_.*', 'eval_gpt2', path.stem)
        assert f'`config/{name}.py`' in text, name


def test_the_packages_that_a_page_installs_are_declared():
    declared = set(re.findall(r'"([\w-]+)[>=]', (ROOT / 'pyproject.toml').read_text()))
    for page in PAGES:
        if page.name == 'sharing.md':  # installs other programs
            continue
        for packages in re.findall(r'pip install ([^`\n&|)]+)', page.read_text(encoding='utf-8')):
            if not packages.startswith(('-r', '-e', '.')):
                assert {
                    re.match(r'[\w-]+', name)[0] for name in packages.split('--')[0].split()
                } <= declared, packages


# -- figures ---------------------------------------------------------------------------------------

TRIPLE = re.compile(r'(\d[\d,.]*) \((\d[\d,.]*) to (\d[\d,.]*)\)')


def rounds_to(shown: str, measured: str) -> bool:
    digits = len(shown.partition('.')[2])
    return (
        abs(float(shown.replace(',', '')) - float(measured.replace(',', '')))
        <= 0.5001 * 10**-digits
    )


def test_figures_of_the_pages_about_speed_are_measured_ones():
    """Every median with its range is in benchmarks/results/, perhaps with more digits."""
    measured = [
        triple
        for path in (ROOT / 'benchmarks/results').glob('*.txt')
        for triple in TRIPLE.findall(path.read_text())
    ]
    pages = [ROOT / 'docs/speed.md', ROOT / 'docs/experiments.md']
    shown = [triple for page in pages for triple in TRIPLE.findall(page.read_text())]
    assert len(shown) > 50
    for triple in shown:
        assert any(all(map(rounds_to, triple, other)) for other in measured), triple


def test_every_result_is_named_where_it_is_used():
    paths = [*ROOT.glob('docs/*.md'), *ROOT.glob('nib/**/*.py'), *ROOT.glob('tests/*.py')]
    users = ''.join(path.read_text(encoding='utf-8') for path in paths)
    results = sorted((ROOT / 'benchmarks/results').iterdir())
    assert len(results) > 30
    assert [path.name for path in results if path.name not in users] == []


def test_figures_of_the_readme_are_measured_ones():
    text = (ROOT / 'README.md').read_text()
    rows = dict(
        re.findall(
            r'^\| (nanoGPT|nibGPT|fast)[^|]*\| ([\d.]+ \| [\d.]+ \| [\d.]+) \|$',
            text.replace('nibGPT, `config/fast_shakespeare_char.py`', 'fast'),
            re.MULTILINE,
        )
    )
    assert set(rows) == {'nanoGPT', 'nibGPT', 'fast'}
    intel, amd = (
        (ROOT / f'benchmarks/results/small_cpu_run{name}.txt').read_text().split('\n\n')[1:3]
        for name in ('', '_amd')
    )
    columns = {'nanoGPT': (0, 0), 'nibGPT': (0, 1), 'fast': (1, 1)}
    for name, (table, column) in columns.items():
        shown = rows[name].split(' | ')
        for tables, seconds_shown in ((intel, shown[0]), (amd, shown[1])):
            lines = [re.sub(r' \([^)]*\)', '', line) for line in tables[table].splitlines()[1:]]
            seconds, _, loss = ([*re.findall(r'(?<=\s)[\d.,]+', line)][column] for line in lines)
            assert all(map(rounds_to, (seconds_shown, shown[2]), (seconds, loss))), name
