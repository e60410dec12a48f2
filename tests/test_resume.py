"""A resumed run equals an uninterrupted one: weights, optimizer, losses and tokens, by SHA-256."""

import hashlib
import json
import os
import shutil
import signal

import pytest
import torch
from conftest import SMALL_RUN, records
from processes import start_on_ranks

import train as training
from model import GPT, GPTConfig
from nib import optim
from nib.checkpoint import store
from nib.machine import compiling

STEPS = 24
# Dropout, accumulation and a schedule. These flags win over those of SMALL_RUN.
RUN = [
    '--dropout=0.1',
    '--n_layer=1',
    f'--max_iters={STEPS}',
    f'--lr_decay_iters={STEPS}',
    '--eval_interval=10',
    '--eval_iters=1',
    '--keep_last=1',
]
# Together, these chains of resumes cut a run after every step.
EVERY_STEP = {'odd': list(range(1, STEPS, 2)), 'even': list(range(2, STEPS, 2))}
CURVE = ('loss/step', 'grad_norm', 'learning_rate', 'loss/train', 'loss/val', 'loss/val_whole')


def digests(out_dir) -> dict[str, str]:
    """Returns SHA-256 digests of the last checkpoint's files and the curves, without times."""
    folder = out_dir / f'step-{STEPS:08d}'
    files = {
        name: (folder / name).read_bytes()
        for name in ('model.safetensors', 'optimizer.safetensors')
    }
    state = json.loads((folder / 'state.json').read_text())
    files['train state'] = json.dumps(state['train']).encode()
    files['curves'] = json.dumps(
        [
            (r['step'], name, r[name])
            for r in records(out_dir)
            for name in (*CURVE, 'noise_scale')
            if name in r
        ]
    ).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def watch(cut_at=(), cut_rank=0):
    """Makes training record the digest of every micro batch, and stops it at each cut.

    A cut is the number of steps done, or [steps done, micro steps done of the next one]. Each run
    gets one signal. Returns the digests by step, and a function that undoes the change.
    """
    original, tokens, cuts = training.train_step, {}, list(cut_at)

    def cut_if_due(t, moment):
        if cuts and moment == cuts[0]:
            cuts.pop(0)
            if t.ranks.rank == cut_rank:
                os.kill(os.getpid(), signal.SIGTERM)

    def train_step(t, micro_batches, step):
        tokens[step] = []

        def watched():
            for x, y in micro_batches:
                tokens[step].append(
                    hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()
                )
                cut_if_due(t, [step, len(tokens[step])])
                yield x, y

        result = original(t, watched(), step)
        cut_if_due(t, step + 1)
        return result

    training.train_step = train_step
    return tokens, lambda: setattr(training, 'train_step', original)


@pytest.fixture
def run_cut(train_here):
    """Trains with a cut after each given step, and resumes; returns the digests of the result."""

    def run_cut(out_dir, cuts, *flags):
        tokens, undo = watch(cuts)
        try:
            for number in range(len(cuts) + 1):
                done = train_here(
                    out_dir, *RUN, *flags, *(['--init_from=resume'] if number else [])
                )
                assert done.returncode == (143 if number < len(cuts) else 0), done.stderr
        finally:
            undo()
        assert list(tokens) == list(range(STEPS))
        return digests(out_dir) | {'tokens': tokens}

    return run_cut


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_run_cut_at_any_step_equals_the_uninterrupted_one(run_cut, tmp_path, dtype):
    whole = run_cut(tmp_path / 'whole', [], f'--dtype={dtype}')
    for name, cuts in EVERY_STEP.items():
        assert run_cut(tmp_path / name, cuts, f'--dtype={dtype}') == whole, name
    assert run_cut(tmp_path / 'other', [], f'--dtype={dtype}', '--seed=1') != whole


@pytest.mark.parametrize(
    'optimizer',
    ['adamw', *(pytest.param(name, marks=pytest.mark.slow) for name in ('muon', 'sgd'))],
)
def test_a_chain_of_five_resumes_equals_the_uninterrupted_run(run_cut, tmp_path, optimizer):
    flag = f'--optimizer={optimizer}'
    assert run_cut(tmp_path / 'cut', [1, 9, 10, 17, 23], flag) == run_cut(
        tmp_path / 'whole', [], flag
    )


def test_a_step_that_is_cut_between_its_micro_steps_is_done_again(train_here, tmp_path, run_cut):
    """An early step, one that is logged, one that is not, and the last one."""
    flags = ['--gradient_accumulation_steps=4', '--log_interval=3']
    whole = run_cut(tmp_path / 'whole', [], *flags)
    cuts = [[1, 3], [4, 1], [5, 2], [14, 3], [23, 1]]
    assert run_cut(tmp_path / 'cut', cuts, *flags) == whole
    tokens, undo = watch([[7, 2]])
    assert train_here(tmp_path / 'once', *RUN, *flags).returncode == 143
    undo()
    assert [len(tokens[step]) for step in (6, 7)] == [4, 2]  # nothing after the signal
    assert (tmp_path / 'once/step-00000007').exists()
    assert 'stopped by SIGTERM after step 7' in records(tmp_path / 'once')[-1]['end']


@pytest.mark.slow
def test_a_run_that_is_stopped_in_its_last_evaluation_repeats_it(train_here, tmp_path, monkeypatch):
    train_here(tmp_path / 'whole', *RUN, status=0)
    finish = training.finish

    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return finish(*arguments)

    monkeypatch.setattr(training, 'finish', stopped)
    done = train_here(tmp_path / 'cut', *RUN, status=143)
    assert f'stopped by SIGTERM after step {STEPS}, which is saved; to resume: ' in done.stdout
    monkeypatch.setattr(training, 'finish', finish)
    train_here(tmp_path / 'cut', *RUN, '--init_from=resume', status=0)
    assert digests(tmp_path / 'cut') == digests(tmp_path / 'whole')


@pytest.mark.slow
def test_a_run_that_auto_compiles_equals_the_uninterrupted_one(run_cut, tmp_path, monkeypatch):
    """The whole run is long enough for compilation to pay off; the steps left are not."""
    compiled, compile_model = [], training.compile_model

    def long_enough(config, model):
        return 1.01 * compiling.SHORT_CPU_RUN * config['max_iters'] / STEPS

    def note(model, *args):
        result = compile_model(model, *args)
        compiled.append(result is not model)
        return result

    monkeypatch.setattr(compiling, 'HAS_AMX', True)
    monkeypatch.setattr(compiling, 'run_flops', long_enough)
    monkeypatch.setattr(training, 'compile_model', note)
    whole = run_cut(tmp_path / 'whole', [], '--compile=auto')
    assert run_cut(tmp_path / 'cut', [1, 10, 17], '--compile=auto') == whole
    assert compiled == [True] * 5


ON_RANKS = """
import json, os, sys
import test_resume
import train as training
from nib.checkpoint import store
from conftest import SMALL_RUN
from nib.machine.ranks import Ranks
ranks, close = training.start_ranks('cpu'), Ranks.close
# torch can join processes only once.
training.start_ranks, Ranks.close = lambda device: ranks, lambda ranks: None
cuts, flags = json.loads(sys.argv[1]), sys.argv[2:]
for out_dir, steps in cuts.items():
    tokens, undo = test_resume.watch(steps, cut_rank=1)
    for number in range(len(steps) + 1):
        resume = ['--init_from=resume'] * (number > 0)
        code = training.main([*SMALL_RUN, *flags, f'--out_dir={out_dir}', *resume])
        assert code == (143 if number < len(steps) else 0), (out_dir, code)
    undo()
    with open(f'{out_dir}/tokens-{os.environ["RANK"]}.json', 'w') as file:
        json.dump(tokens, file)
close(ranks)
del ranks  # its groups' threads end here, not while Python itself ends
"""


def run_on_ranks(n, data_dir, folder, cuts, *flags):
    """Runs each of the cuts, {name: steps}, on n processes; only rank 1 gets the signals."""
    cuts = json.dumps({str(folder / name): steps for name, steps in cuts.items()})
    ranks = start_on_ranks(n, folder, ON_RANKS, cuts, f'--data_dir={data_dir}', *RUN, *flags)
    assert [rank.end() for rank in ranks] == [0] * n, ranks[0].stdout[-3000:] + ranks[0].stderr


def tokens_of(out_dir):
    return [json.loads((out_dir / f'tokens-{rank}.json').read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_a_run_on_two_ranks_cut_by_a_signal_to_one_equals_the_uninterrupted_one(data_dir, tmp_path):
    cuts = {'whole': [], 'inside': [[1, 1], [9, 2], [20, 3]], 'once': [10], **EVERY_STEP}
    run_on_ranks(2, data_dir, tmp_path, cuts, '--gradient_accumulation_steps=8')
    whole, tokens = digests(tmp_path / 'whole'), tokens_of(tmp_path / 'whole')
    assert len(tokens[0]) == STEPS and tokens[0] != tokens[1]
    for name in cuts:
        assert digests(tmp_path / name) == whole, name
        assert tokens_of(tmp_path / name) == tokens, name


@pytest.mark.slow
def test_a_run_on_four_ranks_cut_and_resumed_equals_the_uninterrupted_one(data_dir, tmp_path):
    """Here a different order of summing the gradients would show."""
    run_on_ranks(
        4, data_dir, tmp_path, {'whole': [], 'cut': [10, 17]}, '--gradient_accumulation_steps=4'
    )
    assert digests(tmp_path / 'cut') == digests(tmp_path / 'whole')


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_tokens_and_loss_on_other_ranks(data_dir, tmp_path, train_here):
    """The micro steps of one process are distributed over two, and back."""
    flags = ['--dropout=0', '--learning_rate=1e-3', '--min_lr=1e-4']  # dropout draws by rank
    tokens, undo = watch([12])
    assert train_here(tmp_path / 'one', *RUN, *flags).returncode == 143
    shutil.copytree(tmp_path / 'one', tmp_path / 'two')
    assert train_here(tmp_path / 'one', *RUN, *flags, '--init_from=resume').returncode == 0
    undo()
    run_on_ranks(2, data_dir, tmp_path, {'two': []}, *flags, '--init_from=resume')
    first, second = tokens_of(tmp_path / 'two')
    assert {int(step): both + second[step] for step, both in first.items()} == {
        step: tokens[step] for step in range(12, STEPS)
    }
    for one, two in zip(records(tmp_path / 'one'), records(tmp_path / 'two'), strict=True):
        for name in CURVE:
            assert two.get(name) == (pytest.approx(one[name], abs=1e-4) if name in one else None), (
                name,
                one['step'],
            )


# -- without the config ----------------------------------------------------------------------------


@pytest.fixture
def cut_run(train_here, tmp_path):
    """A run with many flags, cut after step 10; returns its folder."""
    _, undo = watch([10])
    try:
        done = train_here(tmp_path / 'run', *RUN)
    finally:
        undo()
    assert done.returncode == 143, done.stderr
    return tmp_path / 'run'


@pytest.fixture
def resume(run_main):
    """resume(out_dir, *flags) resumes a run by its folder."""
    return lambda out_dir, *flags: run_main(
        training, '--init_from=resume', f'--out_dir={out_dir}', *flags
    )


def config_of(out_dir) -> dict:
    return json.loads((out_dir / 'config.json').read_text())


def test_a_run_resumed_by_its_folder_alone_equals_the_uninterrupted_one(
    data_dir, run_cut, resume, run_main, tmp_path, monkeypatch
):
    whole = run_cut(tmp_path / 'whole', [])
    del whole['tokens']
    monkeypatch.chdir(data_dir.parent)  # in which data_dir is a relative path
    _, undo = watch([10])
    flags = [*SMALL_RUN, *RUN, f'--data_dir={data_dir.name}', f'--out_dir={tmp_path / "cut"}']
    run_main(training, *flags)
    undo()
    before = config_of(tmp_path / 'cut')['config']
    monkeypatch.chdir(tmp_path)
    done = resume('cut')
    assert done.returncode == 0, done.stderr
    assert 'with the config of the run' in done.stdout and 'changed since' not in done.stdout
    assert digests(tmp_path / 'cut') == whole
    after = config_of(tmp_path / 'cut')
    assert after['config'] == before | {'out_dir': 'cut'} and after['changes'] == []
    assert after['origins']['batch_size'] == 'checkpoint of step 10'
    assert after['origins']['init_from'] == 'default'  # how the run began, as in the config


def test_a_resumed_run_that_is_stopped_before_its_first_step_keeps_its_new_flags(cut_run, resume):
    """Only the same command contains them, because there is no new checkpoint."""
    _, undo = watch([[10, 1]])
    try:
        done = resume(cut_run, '--learning_rate=0.1')
    finally:
        undo()
    assert done.returncode == 143
    end = 'stopped by SIGTERM after step 10, with nothing new to save: start again'
    assert end in done.stdout


def test_optimizer_state_that_the_checkpoint_lacks_is_named(cut_run, resume, monkeypatch):
    """As if nib/optim.py had been changed since then, or parameters had been unfrozen."""
    own = optim.AdamW.state
    extra = torch.zeros(())
    monkeypatch.setattr(
        optim.AdamW, 'state', lambda self: [(p, {**s, 'extra': extra}) for p, s in own(self)]
    )
    done = resume(cut_run)
    n = len(list(GPT(GPTConfig(**store.newest(cut_run).state['model'])).parameters()))
    lacking = f'the optimizer state transformer.wte.weight/extra and {n - 1} more'
    assert f'step-00000010 lacks {lacking}: initial values are used' in done.stderr
    assert done.returncode == 0
    assert 'lacks' not in resume(cut_run, '--max_iters=26').stderr  # they have been saved


def test_the_command_wins_over_the_config_of_the_run(cut_run, resume, tmp_path):
    (tmp_path / 'file.py').write_text('eval_iters = 2\nbeta1 = 0.8\n')
    done = resume(cut_run, tmp_path / 'file.py', '--beta1=0.7', '--max_iters=26')
    assert (
        'changed since the checkpoint: eval_iters 1 -> 2, max_iters 24 -> 26, beta1 0.9 -> 0.7'
        in (done.stdout)
    )
    config = config_of(cut_run)['config']
    assert (config['lr_decay_iters'], config['n_layer'], config['batch_size']) == (STEPS, 1, 4)
    done = resume(cut_run, '--max_iters=27')  # what has been changed stays
    assert 'changed since the checkpoint: max_iters 26 -> 27' in done.stdout
    assert config_of(cut_run)['config']['beta1'] == 0.7


def test_what_was_automatic_is_chosen_again(train_here, resume, tmp_path):
    """A longer run decays longer, unless the decay was set."""
    auto = ['--lr_decay_iters=auto', '--min_lr=auto', '--max_iters=2', '--warmup_iters=1']
    auto += ['--dtype=auto']
    train_here(tmp_path / 'run', *auto)
    resume(tmp_path / 'run', '--max_iters=4', '--learning_rate=0.02')
    resumed = config_of(tmp_path / 'run')
    assert resumed['config']['lr_decay_iters'] == 4 and resumed['config']['min_lr'] == 0.002
    for key in ('dtype', 'compile', 'lr_decay_iters'):
        assert resumed['origins'][key].endswith('(auto)')
    assert resumed['origins']['device'] == 'checkpoint of step 2'


def test_a_run_without_its_data_says_so_and_prepares_nothing(
    cut_run, data_dir, resume, tmp_path, monkeypatch
):
    moved = data_dir.rename(data_dir.with_name('moved'))
    try:
        monkeypatch.setattr('runpy.run_path', lambda path: pytest.fail(f'{path} was run'))
        for flags in ([], ['--prepare_dataset', '--fallback_dataset=stdlib_char']):
            done = resume(cut_run, *flags)
            assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
            assert f'{data_dir / "tiny"} has no train.bin' in done.stderr
            assert '--data_dir=FOLDER' in done.stderr and 'fallback' not in done.stderr
        assert resume(cut_run, f'--data_dir={moved}').returncode == 0
    finally:
        moved.rename(data_dir)


def test_a_run_on_the_fallback_is_resumed_by_its_own_command(train_here, resume, tmp_path):
    (tmp_path / 'file.py').write_text("dataset = 'elsewhere'\nfallback_dataset = 'tiny'\n")
    flags = [flag for flag in SMALL_RUN if flag != '--dataset=tiny']
    # What the fallback leaves behind: the name of the dataset that was used.
    train_here(tmp_path / 'run', '--max_iters=2', '--fallback_dataset=tiny')
    done = resume(tmp_path / 'run', tmp_path / 'file.py', *flags, '--max_iters=3')
    assert done.returncode == 0, done.stderr
    assert config_of(tmp_path / 'run')['config']['dataset'] == 'tiny'


def test_a_run_of_an_older_version_goes_on(cut_run, resume):
    """Its checkpoint has options that are gone, and does not say where its values come from."""
    state = store.newest(cut_run).state
    del state['origins']
    state['config'] |= {'on_critical': 'stop', 'stop_on': 'sometimes'}
    del state['config']['muon_iterations']
    store._write_state(store.newest(cut_run).path, state)
    done = resume(cut_run)
    assert done.returncode == 0, done.stderr
    config = config_of(cut_run)['config']
    assert (config['stop_on'], config['n_embd'], config['lr_decay_iters']) == ('never', 32, STEPS)


def test_print_config_shows_what_a_resumed_run_would_use(cut_run, resume):
    lines = [
        ' '.join(line.split()) for line in resume(cut_run, '--print_config').stdout.splitlines()
    ]
    assert 'batch_size = 4 # checkpoint of step 10' in lines
    assert 'weight_decay = 0.1 # default' in lines


def test_debug_training_examines_a_run_by_its_folder_alone(cut_run, run_main):
    done = run_main(
        'debug_training.py', '--init_from=resume', f'--out_dir={cut_run}', '--overfit_steps=1'
    )
    assert done.returncode == 0, done.stderr
    assert f'in detail: tiny, {cut_run}' in done.stdout
