"""The examination of a batch: a table like that of a step by hand; faults made on purpose."""

import math
import re

import pytest
import torch
from conftest import ROOT
from microscope import ARCHITECTURES, CALM, SCRIPT, examined, plain_adamw, table
from torch.nn import functional as F

import configurator
import debug_training
from model import GPT, GPTConfig
from nib.checkpoint import store
from nib.checkpoint.start import new_model
from nib.doctor import health, inspection, remedies
from nib.lessons import examination, walkthrough
from nib.tokens.batches import BatchLoader


def step_by_hand(model, x, y, optimizer, grad_clip) -> tuple[dict, float, dict]:
    """Returns copies of the gradients, their norm, and ||update|| / ||weight|| of a step."""
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
    for p in model.parameters():
        p.grad *= min(1.0, grad_clip / (norm + 1e-6))
    optimizer.step()
    return (
        gradients,
        norm,
        {
            name: float((p.detach() - before[name]).norm() / before[name].norm())
            if before[name].any()
            else None
            for name, p in model.named_parameters()
        },
    )


def assert_rows_agree(text, model, gradients, norm, ratios):
    rows = table(text)
    assert len(rows) == len(gradients)
    for name, gradient in gradients.items():
        row = rows[name.removeprefix('transformer.')]
        assert row[0] == 'x'.join(map(str, gradient.shape))
        wanted = [
            float(gradient.mean()),
            float(gradient.std(correction=0)),
            float(gradient.abs().max()),
        ]
        for printed, figure in zip(map(float, row[2:5]), wanted):
            assert printed == pytest.approx(figure, rel=0.06, abs=1e-8), (name, row)
        assert float(row[5]) == pytest.approx(float(gradient.norm()), abs=6e-5)
        if ratios[name] is None:
            assert row[6] == '-'
        else:
            assert float(row[6]) == pytest.approx(ratios[name], abs=1.5e-5, rel=1e-3), (name, row)
    assert float(re.search(r'^all +[\d,]+ +([\d.]+)$', text, re.MULTILINE)[1]) == pytest.approx(
        norm, abs=1e-4
    )


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_the_table_has_the_figures_of_a_step_made_by_hand(debug, make_training, name):
    keys = ARCHITECTURES[name] | {'n_head': 4}
    flags = [f'--{key}={value}' for key, value in keys.items()]
    done = debug(*flags, '--overfit_steps=1')
    assert done.returncode == 0, done.stderr
    training = make_training(*flags)
    values, data = training.values, training.data
    x, y = BatchLoader(data.train, 16, 4, values['seed'], 1).batch(0, 0)
    model = new_model(values, data, None)
    rms = {name: float((p.detach() ** 2).mean().sqrt()) for name, p in model.named_parameters()}
    assert_rows_agree(
        done.stdout,
        model,
        *step_by_hand(model, x, y, plain_adamw(model, values), values['grad_clip']),
    )
    for name, figure in rms.items():
        assert float(table(done.stdout)[name.removeprefix('transformer.')][1]) == pytest.approx(
            figure, abs=6e-5
        )
    loss = F.cross_entropy(new_model(values, data, None)(x).flatten(0, 1), y.flatten())
    assert f'loss              {float(loss.detach()):.4f}' in done.stdout


def test_a_resumed_run_is_shown_at_its_next_step_with_its_optimizers_memory(
    data_dir, train_here, debug, tmp_path
):
    """As with torch's AdamW, the m and v of the checkpoint, and the next batch of the run."""
    flags = ['--max_iters=10', '--gradient_accumulation_steps=2', '--learning_rate=3e-3']
    train_here(tmp_path / 'run', *flags)
    files = {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(tmp_path.rglob('*'))
        if path.is_file()
    }
    done = debug(*flags, '--init_from=resume', f'--out_dir={tmp_path / "run"}', '--overfit_steps=2')
    flags += ['--max_iters=20', '--explain']
    explained = debug(*flags, '--init_from=resume', f'--out_dir={tmp_path / "run"}')
    assert done.returncode == explained.returncode == 0, done.stderr + explained.stderr
    assert {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(tmp_path.rglob('*'))
        if path.is_file()
    } == files
    found, tensors = store.load(tmp_path / 'run')
    model = GPT(GPTConfig(**found.state['model']))
    model.load_state_dict(tensors['model'])
    values = found.state['config']
    optimizer = plain_adamw(model, values)
    for name, p in model.named_parameters():
        optimizer.state[p] = {
            key: tensors['optimizer'][f'{name}/{key}'] for key in ('step', 'exp_avg', 'exp_avg_sq')
        }
    data = debug_training.open_dataset(values | {'data_dir': str(data_dir)})
    x, y = BatchLoader(data.train, 16, 4, values['seed'], 2).batch(10, 0)
    assert_rows_agree(
        done.stdout, model, *step_by_hand(model, x, y, optimizer, values['grad_clip'])
    )
    assert 'from the first micro batch of step 10' in done.stdout and 't = 11' in explained.stdout
    assert 'The run has done all its 10 steps: train.py would not run this one.' in done.stdout
    scheduled = 3e-4 + 0.5 * (1 + math.cos(math.pi * 6 / 16)) * 2.7e-3
    assert f'uses the scheduled learning rate {scheduled:.4g} for this step' in ' '.join(
        explained.stdout.split()
    )
    assert 'values below 0.0002 or above 0.1 are marked.' in ' '.join(done.stdout.split())
    apart = re.search(r'^difference .*v and w +(.*)$', explained.stdout, re.MULTILINE)[1].split()
    assert len(apart) == 3 and all(float(figure) < 1e-6 for figure in apart)


def test_the_batch_is_learned_by_heart_as_in_a_loop_made_by_hand(debug, make_training):
    """Without dropout, with a warm-up of a tenth of the steps, and from the initial weights."""
    done = debug('--dropout=0.5', '--overfit_steps=20', '--grad_clip=0.7')
    training = make_training('--grad_clip=0.7')
    model = new_model(training.values, training.data, None)
    optimizer, losses = plain_adamw(model, training.values), []
    x, y = training.batch()
    for step in range(21):
        for group in optimizer.param_groups:
            group['lr'] = 3e-3 * min(1.0, (step + 1) / 3)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.7)
        optimizer.step()
        losses.append(float(loss.detach()))
    printed = re.findall(r'^step +(\d+) +loss +([\d.]+)$', done.stdout, re.MULTILINE)
    assert [int(step) for step, _ in printed] == [0, 4, 8, 12, 16, 20]
    assert [float(loss) for _, loss in printed] == pytest.approx(losses[::4], abs=2e-3)
    goal = health.MEMORIZED * inspection.unigram_entropy(y)
    assert float(re.search(r'healthy: +at most ([\d.]+)', done.stdout)[1]) == pytest.approx(
        goal, abs=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    'config',
    ['train_shakespeare_char.py', 'modern_shakespeare_char.py', 'fast_shakespeare_char.py'],
)
def test_nothing_is_marked_in_a_healthy_model(config, data_dir, run_main):
    done = run_main(
        SCRIPT,
        f'config/{config}',
        '--dataset=tiny',
        f'--data_dir={data_dir}',
        '--device=cpu',
        '--dtype=float32',
    )
    assert done.returncode == 0 and done.stderr == '', done.stderr
    assert (
        done.stdout.endswith('Nothing: all values are in their healthy ranges.\n')
        and '<-' not in done.stdout
    )
    losses = [
        float(loss)
        for loss in re.findall(r'^step +\d+ +loss +([\d.]+)$', done.stdout, re.MULTILINE)
    ]
    assert len(losses) == 6 and losses[-1] < 1.0 < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize('method', ['adamw', 'muon'])
def test_nothing_is_marked_in_a_healthy_run(method, data_dir, train_here, debug, tmp_path):
    """Its next step, and as the beginning of another one."""
    train_here(
        tmp_path / 'run', *CALM, '--max_iters=60', '--lr_decay_iters=200', f'--optimizer={method}'
    )
    for flags in (
        ['--init_from=resume', f'--out_dir={tmp_path / "run"}'],
        [f'--init_from={tmp_path / "run"}', '--dtype=bfloat16'],
    ):
        done = debug(*flags, f'--optimizer={method}')
        assert 'Nothing: all' in done.stdout and '<-' not in done.stdout, done.stdout + done.stderr
        assert ', healthy: below 0' in done.stdout


GPT2_SIZE = ['--n_embd=48', '--n_head=2', '--block_size=64']  # all its layers, but thin ones
SHIPPED = {  # config -> more flags, whether updates are too large
    'zen.py': ([], False),
    'train_shakespeare_char.py': ([], False),
    'modern_shakespeare_char.py': ([], False),
    'fast_shakespeare_char.py': ([], False),
    'train_shakespeare.py': ([], False),
    'train_text.py': ([], False),
    'train_gpt2.py': (GPT2_SIZE, False),
    'train_gpt2_24gb.py': (GPT2_SIZE, False),
    'fast_gpt2.py': (GPT2_SIZE, False),
    'lab/healthy.py': ([], False),
    'lab/lr_too_high.py': ([], True),
    'lab/no_warmup.py': ([], True),
    'lab/diverging.py': ([], True),
}


def test_every_config_that_trains_new_weights_is_listed():
    names = {path.name for path in (ROOT / 'config').glob('*.py')}
    from_gpt2 = {name for name in names if name.startswith('eval_')} | {'finetune_shakespeare.py'}
    assert names - from_gpt2 == {name for name in SHIPPED if not name.startswith('lab/')}


@pytest.mark.slow
@pytest.mark.parametrize('config', SHIPPED)
def test_updates_are_too_large_where_the_doctor_says_so(config, data_dir):
    flags, too_large = SHIPPED[config]
    argv = [f'config/{config}', '--dataset=tiny', f'--data_dir={data_dir}', '--device=cpu', *flags]
    values, _ = configurator.configure(
        str(ROOT / SCRIPT), [*argv, '--dtype=float32'], settle={}, base='train.py'
    )
    training = debug_training.Microscope(values, debug_training.open_dataset(values), None)
    assert (
        'update too large' in '\n'.join(examination.report_parameters(training, full=True))
    ) == too_large


# -- faults ----------------------------------------------------------------------------------------


def test_weights_that_are_too_large_are_seen(make_training):
    training = make_training('--n_kv_head=1')
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.mul_(100)
    text, findings = examined(training)
    assert (
        'loss at the start' in findings
        and 'above ln(vocab_size)' in findings
        and 'attention collapsed' in findings
    )
    assert 'attention collapsed' in text.split('2. ACTIVATIONS')[1].split('mean, std')[0]


def test_a_dead_relu_layer_is_seen(make_training):
    training = make_training('--mlp=relu2', '--bias=True')
    with torch.no_grad():
        training.model.transformer.h[1].mlp.c_fc.bias.fill_(-1e3)
    text, findings = examined(training)
    assert 'dead units in h.1.' in findings
    assert re.search(r'^h\.1 .*100\.0% .*<- dead units$', text, re.MULTILINE)
    assert re.search(r'^h\.0 .* 0\.0% [^<]*$', text, re.MULTILINE)
    rows = table(text)
    assert (
        rows['h.1.mlp.c_fc.weight'][-2:] == ['no', 'gradient']
        and 'gradient' not in rows['h.0.mlp.c_fc.weight']
    )
    assert (
        'no gradient: 5 parameters, the first is h.1.ln_2.weight' in findings
    )  # all of the branch but c_proj's bias


@pytest.mark.parametrize('mlp', inspection.CLOSED_BELOW)
def test_the_lesson_says_when_a_unit_of_each_activation_is_closed(mlp):
    text = ' '.join(' '.join(examination.explain_layers(torch.zeros(1, 8), mlp, 1.0)).split())
    limit = inspection.CLOSED_BELOW[mlp]
    assert (f'below {limit:.0f},' if limit else 'are exactly 0') in text


def test_a_learning_rate_that_is_too_high_is_seen(make_training):
    text, findings = examined(make_training('--learning_rate=10'))
    assert re.search(
        r'update too large in 8 parameters: [\d.e+]+ in h\.\d\.\w+\.c_proj.weight\. '
        r'Lower learning_rate',
        findings,
    )
    assert 'is not memorized' in findings
    for name, row in table(text).items():  # biases, gains, embeddings and head are not judged
        in_block = name.startswith('h.') and 'x' in row[0]
        assert ('too large' in ' '.join(row)) == in_block, name
    suggested = float(
        re.search(r'Lower learning_rate from 10 to about ([\d.e+-]+?)\.? ', findings)[1]
    )
    assert (
        'update too large'
        not in examined(make_training(f'--learning_rate={suggested * 0.9}'), steps=1)[1]
    )


def test_muons_matrices_have_limits_of_their_own(make_training):
    """Their updates have a root mean square of about 0.2 * learning_rate * muon_lr_ratio."""
    for ratio in (1.0, 100.0):
        text, findings = examined(
            make_training('--optimizer=muon', f'--muon_lr_ratio={ratio}'), steps=1
        )
        assert f'muon_lr_ratio = {0.2 * 3e-3 * ratio:.2g}, equally far' in ' '.join(text.split())
        for name, row in table(text).items():
            by_muon = name.startswith('h.') and 'x' in row[0]
            assert ('too large' in ' '.join(row)) == (by_muon and ratio == 100.0), (name, row)
            if by_muon:
                assert 0.6 < float(row[6]) * float(row[1]) / (0.2 * 3e-3 * ratio) < 1.25, (
                    name,
                    row,
                )
        assert ('update too large in 8 parameters' in findings) == (ratio == 100.0)


def test_a_learning_rate_of_nothing_is_seen(make_training):
    findings = examined(make_training('--learning_rate=0'))[1]
    assert (
        'update too small in 10 parameters' in findings
        and 'Raise learning_rate, which is 0' in findings
    )
    assert 'is not memorized' in findings and 'learning_rate that is far too low' in findings
    findings = examined(make_training('--learning_rate=1e-7'))[1]
    suggested = float(
        re.search(r'Raise learning_rate from 1e-07 to about ([\d.e+-]+?)\.? ', findings)[1]
    )
    assert 'update too' not in examined(make_training(f'--learning_rate={suggested}'), steps=1)[1]


def test_targets_that_were_not_shifted_are_seen(make_training):
    training = make_training('--n_embd=128')
    x, _ = training.batch()
    training.batch = lambda number=0: (x, x)
    findings = examined(training)[1]
    assert (
        'of the targets are the next token of the input. Targets must be the inputs shifted by one'
        in findings
    )
    assert 'below ln(vocab_size)' in findings  # a tied head guesses its own input


def test_a_loop_that_cannot_learn_is_seen(make_training):
    training = make_training()
    optimizer = training.new_optimizer()
    optimizer.step = lambda usable: None
    training.new_optimizer = lambda: optimizer
    findings = examined(training)[1]
    assert (
        'Check whether the optimizer has this parameter' in findings
        and 'is not memorized' in findings
    )
    training = make_training()
    batches = iter(range(10_000))
    step = (
        training.step
    )  # on targets that are others in every step, as where data are shuffled apart

    def shuffled_step(optimizer, micro_batches):
        generator = torch.Generator().manual_seed(next(batches))
        return step(
            optimizer,
            [
                (x, torch.randint(y.max() + 1, y.shape, generator=generator))
                for x, y in micro_batches
            ],
        )

    training.step = shuffled_step
    assert 'is not memorized' in examined(training)[1]


def test_a_model_that_learns_slowly_is_told_from_one_that_cannot(make_training):
    findings = examined(make_training('--learning_rate=2e-3'), steps=20)[1]
    assert 'The loss falls, so the loop works' in findings
    goal = health.MEMORIZED * 3.0
    for losses, works in (
        ((4.0, 3.1, 2.7), True),
        ((4.0, 3.1, 2.9), False),
        ((4.0, 2.5, 2.7), False),
        ((2.9, 2.8, 2.7), False),
    ):
        # falling, stuck at the entropy of 3, rising again, hardly moving
        assert (
            'the loop works' in remedies.judge_memorizing(dict(enumerate(losses)), goal)[0].remedy
        ) == works
    assert remedies.judge_memorizing({0: 4.0, 10: 2.0}, goal) == []


def test_numbers_that_are_not_finite_are_seen(make_training):
    training = make_training()
    with torch.no_grad():
        training.model.transformer.h[1].mlp.c_proj.weight[0, 0] = math.nan
    text, findings = examined(training, steps=2)
    assert 'not finite in h.1, ln_f.' in findings and 'gradient norm nan' in findings
    assert (
        'weights not finite: h.1.mlp.c_proj.weight' in findings
        and 'gradient not finite: 14 parameters' in findings
    )
    assert re.search(r'^h\.1 .*nan.*<- not finite$', text, re.MULTILINE)


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_matrices_of_zeros_have_no_ratio_and_what_is_before_them_no_mark(make_training, name):
    """As in blocks that start as the identity."""
    keys = ARCHITECTURES[name] | {'n_head': 4, 'learning_rate': 2e-3}
    training = make_training(*(f'--{key}={value}' for key, value in keys.items()))
    first, second = training.model.transformer.h
    with torch.no_grad():
        for part in (first.attn, second.attn, second.mlp):
            part.c_proj.weight.zero_()
    text, findings = examined(training, steps=50)
    assert 'Nothing: all' in findings and '<-' not in text, findings
    rows = table(text)
    assert rows['h.1.mlp.c_proj.weight'][1] == '0.0000' and rows['h.1.mlp.c_proj.weight'][-1] == '-'
    assert float(rows['h.1.mlp.c_proj.weight'][5]) > 0 and 'If a c_proj is all zeros' in text
    without = {row for row, cells in rows.items() if float(cells[5]) == 0.0}
    assert without == {
        row
        for row in rows
        if re.match(r'h\.(0\.(ln_1|attn)|1\.(ln_1|ln_2|attn|mlp))\.(?!c_proj)', row)
    }
    walked = '\n'.join(walkthrough.walk_through(training))
    assert 'transformer.h.0.mlp.c_fc.weight[' in walked
    with torch.no_grad():
        first.mlp.c_proj.weight.zero_()
    assert 'transformer.h.0.mlp.c_proj.weight[' in '\n'.join(walkthrough.walk_through(training))


def test_tables_of_deep_models_stay_readable(run_main):
    flags = [
        '--dataset=',
        '--device=cpu',
        '--n_layer=48',
        '--n_head=2',
        '--n_embd=16',
        '--block_size=8',
        '--batch_size=2',
        '--bias=True',
        '--overfit_steps=1',
        '--gradient_accumulation_steps=1',
        '--learning_rate=1',
    ]
    short = run_main(SCRIPT, *flags).stdout
    assert len(table(short)) < 50 and {
        row.split('.')[1] for row in table(short) if row.startswith('h.')
    } == {'0', '24', '47'}
    omitted = '540 rows of other layers are omitted, 180 of them marked like those above'
    assert f'{omitted}: --full shows all' in short
    full = run_main(SCRIPT, *flags, '--full').stdout
    assert len(table(full)) == 4 + 48 * 12 and 'omitted' not in full
    marks = dict.fromkeys([f'h.{i}.{part}' for i in range(9) for part in 'ab'] + ['ln_f'], '')
    marks |= {'h.2.a': 'x', 'h.3.a': 'x', 'h.3.b': 'y', 'h.5.b': 'x'}
    shown, line = examination.shown_rows(marks, 9, False)
    assert shown == {
        'ln_f',
        'h.0.a',
        'h.0.b',
        'h.4.a',
        'h.4.b',
        'h.8.a',
        'h.8.b',
        'h.2.a',
        'h.3.b',
        'h.5.b',
    }
    assert line.startswith('9 rows') and '1 of them marked' in line
