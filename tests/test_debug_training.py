"""debug_training.py: its values equal those of torch, and it detects faults made on purpose."""

import itertools
import json
import math
import re

import pytest
import safetensors.torch
import torch
from conftest import ROOT, SMALL_RUN
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import configurator
import debug_training
import model as model_file
import train
from model import GPT, GPTConfig
from nib.checkpoint import store
from nib.checkpoint.start import new_model
from nib.doctor import health, inspection
from nib.lessons import examination, walkthrough
from nib.machine.device import autocast, pick_device
from nib.run.checks import settle_schedule
from nib.tokens.batches import BatchLoader

SCRIPT = 'debug_training.py'
CALM = ['--gradient_accumulation_steps=1', '--dtype=float32', '--learning_rate=3e-3']
SMALL = [*SMALL_RUN, *CALM]  # the later flag wins
ARCHITECTURES = {
    'GPT-2': {'bias': True},
    'modern': {
        'position': 'rotary',
        'norm': 'rms',
        'qk_norm': True,
        'mlp': 'swiglu',
        'n_kv_head': 2,
    },
    'one key for all': {
        'position': 'rotary',
        'n_kv_head': 1,
        'mlp': 'relu2',
        'tied_head': False,
        'logit_cap': 10.0,
    },
    'LayerNorm of queries': {'qk_norm': True, 'bias': True, 'n_kv_head': 4, 'tied_head': False},
}


@pytest.fixture
def debug(data_dir, run_main):
    """debug(*flags): the script on the small model."""
    return lambda *flags: run_main(SCRIPT, *SMALL, f'--data_dir={data_dir}', *flags)


@pytest.fixture
def make_training(data_dir, monkeypatch):
    """make_training(*flags): a Microscope on the small model, to examine and to break."""

    def make(*flags):
        argv = [*SMALL, f'--data_dir={data_dir}', *flags]
        values, _ = configurator.configure(
            str(ROOT / SCRIPT), argv, settle={'device': pick_device}, base='train.py'
        )
        for key, value in settle_schedule(values).items():  # which get_lr reads, as in main
            monkeypatch.setitem(vars(train), key, value)
        data = (
            debug_training.open_dataset(values)
            if values['dataset']
            else debug_training.random_tokens(values, None)[0]
        )
        return debug_training.Microscope(values, data, None)

    return make


def examined(training, steps=20) -> tuple[str, str]:
    """All of the report, and its last section, on one line."""
    text = '\n'.join(examination.examine(training, full=True, overfit_steps=steps))
    return text, ' '.join(text.split('5. WHAT IS OUT OF RANGE')[1].split())


def table(text) -> dict[str, list[str]]:
    """The rows of the parameters' table: name -> its other cells."""
    lines = text.split('update/weight\n')[1].split('\nall ')[0].splitlines()
    cells = [re.sub(r'(\d) x (\d)', r'\1x\2', line).split() for line in lines]
    return {row[0]: row[1:] for row in cells}


# -- figures against torch -------------------------------------------------------------------------


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


def plain_adamw(model, values):
    decayed, plain = (
        [p for p in model.parameters() if (p.dim() >= 2) == wanted] for wanted in (True, False)
    )
    groups = [
        {'params': decayed, 'weight_decay': values['weight_decay']},
        {'params': plain, 'weight_decay': 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=values['learning_rate'], betas=(values['beta1'], values['beta2'])
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
    x, y = BatchLoader(data.train, 16, 4, values['seed'], 'train', 1).batch(0, 0)
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
    x, y = BatchLoader(data.train, 16, 4, values['seed'], 'train', 2).batch(10, 0)
    assert_rows_agree(
        done.stdout, model, *step_by_hand(model, x, y, optimizer, values['grad_clip'])
    )
    assert 'from the first micro batch of step 10' in done.stdout and 't = 11' in explained.stdout
    assert 'The run has done all its 10 steps: train.py would not take this one.' in done.stdout
    scheduled = 3e-4 + 0.5 * (1 + math.cos(math.pi * 6 / 16)) * 2.7e-3
    assert f'uses the scheduled learning rate {scheduled:.4g} for this step' in ' '.join(
        explained.stdout.split()
    )
    assert 'values below 0.0002 or above 0.1 are marked.' in ' '.join(done.stdout.split())
    apart = re.search(r'^difference .*v and w +(.*)$', explained.stdout, re.MULTILINE)[1].split()
    assert len(apart) == 3 and all(float(figure) < 1e-6 for figure in apart)


@pytest.mark.parametrize('name', ARCHITECTURES)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_weights_times_values_are_what_attention_computes(name, dtype):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            vocab_size=31, block_size=12, n_layer=2, n_head=4, n_embd=32, **ARCHITECTURES[name]
        )
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # attention that has something to tell apart
    seen = []
    for block in model.transformer.h:
        block.attn.register_forward_hook(
            lambda module, args, output: seen.append((module, args, output))
        )
    with torch.no_grad(), autocast(dtype, 'cpu'):
        model(torch.randint(31, (3, 10)))
        for attention, args, output in list(seen):
            scores, values = inspection.attention_scores(attention, *args[:2])
            weights_ = scores.softmax(dim=-1)
            again = attention.c_proj(
                (weights_.to(values.dtype) @ values).transpose(1, 2).reshape(output.shape)
            )
            assert weights_.shape == (3, 4, 10, 10) and weights_.dtype == torch.float32
            assert float(weights_.triu(1).abs().max()) == 0.0
            assert (again - output).abs().max() < (
                1e-5 if dtype == 'float32' else 0.05
            ) * output.abs().max()
    assert weights_.max() > 0.5  # it was no even spread that agreed


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_layers_have_the_figures_of_a_forward_pass_made_by_hand(name):
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=31,
        block_size=12,
        n_layer=2,
        n_head=4,
        n_embd=32,
        dropout=0.5,
        **ARCHITECTURES[name],
    )
    model = GPT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, y = torch.randint(31, (2, 3, 10))
    loss, rows = inspection.measure_layers(model, x, y, autocast('float32', 'cpu'), 2)
    assert model.training
    model.eval()
    with torch.no_grad():
        assert loss == pytest.approx(
            float(F.cross_entropy(model(x).flatten(0, 1), y.flatten())), rel=1e-6
        )
        h = model.transformer.wte(x)
        h = h + model.transformer.wpe.weight[:10] if config.position == 'learned' else h
        rotary = model.rotary(torch.arange(10)) if config.position == 'rotary' else None
        assert (rows[0].mean, rows[0].std) == pytest.approx(
            (float(h.mean()), float(h.std(correction=0))), rel=1e-4
        )
        for row, block in zip(rows[1:-1], model.transformer.h):
            attended = block.attn(block.ln_1(h), rotary)
            assert row.entropy == pytest.approx(
                entropy_by_hand(block.attn, block.ln_1(h[:2]), rotary, config), rel=1e-4
            )
            h = h + attended
            added = block.mlp(block.ln_2(h))
            hidden = block.mlp.c_fc(block.ln_2(h)).flatten(0, 1)[:, : config.mlp_units]
            limit = {'gelu': -3.0, 'swiglu': -6.0, 'relu2': 0.0}[config.mlp]
            assert (
                row.dead
                == sum(bool((unit <= limit).all()) for unit in hidden.t()) / config.mlp_units
            )
            h = h + added
            wanted = [
                float(figure)
                for figure in (h.mean(), *(t.std(correction=0) for t in (h, attended, added)))
            ]
            assert [row.mean, row.std, row.attention_std, row.mlp_std] == pytest.approx(
                wanted, rel=1e-4
            )
        assert rows[-1].std == pytest.approx(
            float(model.transformer.ln_f(h).std(correction=0)), rel=1e-4
        )


def entropy_by_hand(attention, x, rotary, config) -> float:
    """Head by head and position by position, in Python's floats."""
    D = config.head_width
    q, k, _ = attention.c_attn(x).split(
        [config.n_head * D, config.kv_heads * D, config.kv_heads * D], dim=2
    )
    total = []
    for b, head in itertools.product(range(len(x)), range(config.n_head)):
        shared = head // (config.n_head // config.kv_heads)
        query, key = (
            attention.q_norm(q[b, :, head * D :][:, :D]),
            attention.k_norm(k[b, :, shared * D :][:, :D]),
        )
        if rotary is not None:  # two dimensions are one complex number, turned by its angle
            cos, sin = (part[0].chunk(2, dim=-1)[1] for part in rotary)  # (T, D / 2)
            turn = torch.complex(cos.contiguous(), sin.contiguous())
            query, key = (torch.complex(*part.chunk(2, dim=1)) * turn for part in (query, key))
            query, key = (torch.cat((part.real, part.imag), dim=1) for part in (query, key))
        for t in range(x.shape[1]):
            scores = [math.exp(float(query[t] @ key[s]) / math.sqrt(D)) for s in range(t + 1)]
            total.append(-sum(p * math.log(p) for p in (score / sum(scores) for score in scores)))
    return sum(total) / len(total)


def test_an_activation_that_the_inspection_does_not_know_is_measured_by_its_output(monkeypatch):
    monkeypatch.setitem(model_file.ACTIVATIONS, 'gelu', torch.nn.ReLU)
    model = GPT(GPTConfig(vocab_size=31, block_size=12, n_layer=1, n_head=4, n_embd=32))
    mlp, x = model.transformer.h[0].mlp, torch.randint(31, (2, 10))
    mlp.kind = 'relu'
    with torch.no_grad():
        mlp.c_fc.bias[:32] = -100.0  # a quarter of the units never opens
    _, rows = inspection.measure_layers(model, x, x, autocast('float32', 'cpu'), 2)
    assert rows[1].dead == pytest.approx(0.25, abs=0.02)


def test_the_batch_is_learnt_by_heart_as_in_a_loop_made_by_hand(debug, make_training):
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


def test_entropies_against_sums_by_hand():
    for n in (1, 2, 7, 64):
        even = torch.tril(torch.ones(n, n)) / torch.arange(1, n + 1)[:, None]
        assert health.largest_entropy(n) == pytest.approx(
            sum(math.log(t) for t in range(1, n + 1)) / n
        )
        assert float(inspection.entropy(even).mean()) == pytest.approx(
            health.largest_entropy(n), abs=1e-6
        )
    assert float(inspection.entropy(torch.tensor([0.0, 1.0, 0.0]))) == 0.0
    assert inspection.unigram_entropy(torch.tensor([[3, 3], [5, 7]])) == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(4)
    )


def test_closed_units_let_hardly_any_gradient_through():
    for kind, function, slope in (
        ('gelu', lambda x: F.gelu(x, approximate='tanh'), 0.012),
        ('swiglu', F.silu, 0.0125),
        ('relu2', lambda x: F.relu(x).square(), 0.0),
    ):
        x = torch.linspace(
            inspection.CLOSED_BELOW[kind] - 20,
            inspection.CLOSED_BELOW[kind],
            1000,
            requires_grad=True,
        )
        function(x).sum().backward()
        assert x.grad.abs().max() <= slope
    hidden = torch.tensor([[[-1.0, -7.0, 0.0, 3.0], [-9.0, -8.0, -2.0, -8.0]]])  # (1, 2, 4)
    assert inspection.dead_share('relu2', hidden) == 0.75
    assert inspection.dead_share('gelu', hidden) == 0.25
    assert inspection.dead_share('swiglu', hidden) == 0.5  # of the two gates


# -- ranges ----------------------------------------------------------------------------------------


def test_adamws_first_step_is_as_much_larger_as_it_is_said():
    torch.manual_seed(0)
    for beta1 in (0.0, 0.5, 0.9):
        weight = torch.zeros(20_000, requires_grad=True)
        optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(beta1, 0.999), weight_decay=0.0)
        sizes = []
        for _ in range(60):
            before = weight.detach().clone()
            weight.grad = torch.randn_like(weight)
            optimizer.step()
            sizes.append(float((weight.detach() - before).square().mean().sqrt()))
        assert sizes[0] == pytest.approx(1.0, abs=1e-4)
        assert sizes[0] / sizes[-1] == pytest.approx(health.first_step_factor(beta1), rel=0.05)


def test_the_tolerance_of_the_first_loss_covers_what_fresh_models_have():
    """Their spread, which it is derived from, and themselves."""
    for n_embd, vocab_size, kind in (
        (64, 65, 'GPT-2'),
        (256, 65, 'modern'),
        (256, 1000, 'one key for all'),
    ):
        for seed in range(3):
            torch.manual_seed(seed)
            sizes = {
                'vocab_size': vocab_size,
                'block_size': 32,
                'n_layer': 2,
                'n_head': 4,
                'n_embd': n_embd,
            }
            model = GPT(GPTConfig(**sizes, **ARCHITECTURES[kind]))
            x, y = torch.randint(vocab_size, (2, 4, 32))
            with torch.no_grad():
                logits = model(x)
            others = (
                torch.ones_like(logits).scatter(2, x[..., None], 0).bool()
            )  # a tied head has guessed the input itself
            assert float(logits[others].var()) == pytest.approx(0.02**2 * n_embd, rel=0.15)
            excess = float(F.cross_entropy(logits.flatten(0, 1), y.flatten())) - math.log(
                vocab_size
            )
            assert abs(excess) < health.start_tolerance(n_embd, 128)


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
            'the loop works' in health.judge_memorizing(dict(enumerate(losses)), goal)[0].remedy
        ) == works
    assert health.judge_memorizing({0: 4.0, 10: 2.0}, goal) == []


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
    assert float(rows['h.1.mlp.c_proj.weight'][5]) > 0 and 'If a c_proj is all 0' in text
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


def test_marks_are_where_the_ranges_end():
    def row(ratio, name='h.0.mlp.c_fc.weight', shape=(4, 4), norm=1.0):
        return health.ParameterStats(name, shape, 0.02, 0.0, 0.1, 0.1, norm, ratio)

    limits = health.update_limits(0.9, first=False, trained=True)
    assert limits == pytest.approx((0.001 / health.SLACK, 0.01 * 2 * health.SLACK))
    for ratio, mark in (
        (0.001, ''),
        (0.01, ''),
        (limits[1] * 1.01, 'update too large'),
        (limits[0] * 0.99, 'update too small'),
    ):
        assert health.mark_parameter(row(ratio), limits) == mark
        assert health.mark_parameter(row(ratio, shape=(4,)), limits) == ''
    large = {'attention': 0.2, 'mlp': 0.05, 'head': 9.0, 'embedding': 9.0}
    for name, wanted in (
        ('h.0.attn.c_proj.weight', limits),
        ('h.0.mlp.c_proj.weight', (limits[0], math.inf)),  # the MLPs together are not too large
        ('lm_head.weight', (limits[0], math.inf)),
        ('wte.weight', (0.0, math.inf)),  # a batch does not have all tokens
    ):
        assert health.limits_of(row(0.3, name), large, limits) == wanted
    embedding = health.limits_of(row(0.3, 'wte.weight'), large, limits)
    assert health.mark_parameter(row(limits[0] * 0.99), embedding) == ''
    assert health.mark_parameter(row(0.0), embedding) == 'update too small'
    assert health.mark_parameter(row(None), limits) == ''
    assert health.mark_parameter(row(0.005, norm=0.0), limits) == 'no gradient'
    assert (
        health.update_limits(0.9, first=True, trained=True)[0] == 0.0
    )  # fine-tuning may take small steps
    first = health.update_limits(0.9, first=True, trained=False)
    assert first == pytest.approx([math.sqrt(19) * end for end in (0.001 / 5, 0.01 * 5)])
    for warmup_iters, high in ((9, first[1]), (10, 1.0)):  # a warm-up avoids such a step
        with_warmup = health.update_limits(0.9, True, False, warmup_iters=warmup_iters)
        assert with_warmup == (first[0], high)
    muon = health.update_limits(0.9, False, True, method='muon')
    assert muon == pytest.approx(
        [limit * end for limit, end in zip((1 / 5, 10), health.MUON_RATIO)]
    )
    first = health.update_limits(0.9, True, False, method='muon')
    assert first == pytest.approx((muon[0], muon[1] / 2))  # it is no larger than the others
    for norm, found in (
        (0.09, 'below'),
        (0.11, ''),
        (9.9, ''),
        (10.1, 'above'),
        (math.inf, 'above'),
        (math.nan, 'nan'),
    ):
        assert found in ''.join(
            finding.what for finding in health.judge_grad_norm(norm, health.GRAD_NORM)
        )
        assert bool(found) == bool(health.judge_grad_norm(norm, health.GRAD_NORM))
    assert health.grad_norm_limits(12, 768, fresh=True) == (0.1, 96.0)
    assert (
        health.grad_norm_limits(12, 768, fresh=False)
        == health.grad_norm_limits(1, 16, fresh=True)
        == (0.1, 10.0)
    )
    assert (
        health.judge_start(3.0, 65, None) == []
        and 'worse' in health.judge_start(4.2, 65, None)[0].remedy
    )


# -- one step with real numbers --------------------------------------------------------------------


@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=6),
    st.floats(-2, 2),
    st.floats(1e-5, 0.1),
    st.floats(0, 0.99),
    st.floats(0, 0.999),
    st.floats(0, 0.5),
)
def test_adamw_by_hand_is_torchs(gradients, start, lr, beta1, beta2, decay):
    weight = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=lr, betas=(beta1, beta2), weight_decay=decay)
    m = v = 0.0
    for t, gradient in enumerate(gradients, start=1):
        step = walkthrough.adamw_by_hand(
            weight.item(), gradient, m, v, t, lr, (beta1, beta2), 1e-8, decay
        )
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        m, v = step.m, step.v
        assert step.after == pytest.approx(weight.item(), abs=1e-9, rel=1e-9)
        theirs = [optimizer.state[weight][key].item() for key in ('exp_avg', 'exp_avg_sq')]
        assert [m, v] == pytest.approx(theirs, abs=1e-9)


def test_finite_differences_against_derivatives_by_hand():
    w = torch.tensor([[2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    slope, plus, minus = walkthrough.finite_difference(
        lambda: w[0, 0] ** 3 * w[0, 1].exp(), w, (0, 0)
    )
    assert slope == pytest.approx(12 * math.exp(-3), rel=1e-8)
    assert (plus, minus) == pytest.approx(
        [(2 + h) ** 3 * math.exp(-3) for h in (1e-5, -1e-5)], rel=1e-12
    )
    assert w.tolist() == [[2.0, -3.0]]


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_every_number_of_the_walk_through_is_torchs(debug, make_training, name):
    flags = [
        f'--{key}={value}'
        for key, value in (
            ARCHITECTURES[name] | {'n_head': 4, 'dropout': 0.3, 'grad_clip': 0.5}
        ).items()
    ]
    done = debug('--explain', *flags, '--dtype=bfloat16')  # it is float32 all the same
    assert done.returncode == 0, done.stderr
    said = done.stdout

    def figures(label) -> list[float]:
        line = next(line for line in said.splitlines() if line.strip().startswith(label))
        return [
            float(word)
            for word in line.split(label)[1].split()
            if re.fullmatch(r'[+-]?[\d.]+(e[+-]\d+)?', word)
        ]

    training = make_training(*flags)
    values, data = training.values, training.data
    model = new_model(values, data, None).eval()
    batches = [
        BatchLoader(data.train, 16, 4, values['seed'], 'train', 1).batch(step, 0)
        for step in range(3)
    ]
    x, y = batches[0]
    losses = F.cross_entropy(model(x).flatten(0, 1).double(), y.flatten(), reduction='none')
    own = float(losses[15].detach())
    assert figures('loss of this token    -log p = -ln') == pytest.approx(
        [math.exp(-own), own], rel=1e-4
    )
    assert figures('loss of the batch') == pytest.approx(
        [float(losses.mean().detach()), 64], rel=1e-5
    )
    assert figures('the target, p - 1') == pytest.approx([math.exp(-own) - 1] * 2, rel=1e-5)

    losses.mean().backward()
    gradient = model.transformer.h[0].mlp.c_fc.weight.grad.clone()
    index = tuple(map(int, re.search(r'c_fc\.weight\[(\d+), (\d+)\] = ', said).groups()))
    assert float(gradient[index].abs()) == float(gradient.abs().max())
    by_difference, by_autograd = (
        figures('(loss(w + h) - loss(w - h)) / 2h')[0],
        figures('loss.backward()')[0],
    )
    assert by_difference == pytest.approx(by_autograd, rel=1e-6)
    assert by_autograd == pytest.approx(float(gradient[index]), rel=1e-3)

    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    whole, divided, undivided = (
        figures(label)
        for label in (
            'the whole batch at once',
            'sum of loss / 4: train.py',
            'sum of loss, not divided',
        )
    )
    assert whole == pytest.approx([float(gradient[index]), norm], rel=1e-3, abs=1e-7)
    assert divided == pytest.approx(whole, rel=1e-4, abs=2e-8)
    assert undivided == pytest.approx([4 * figure for figure in whole], rel=1e-3, abs=1e-7)
    assert len(re.findall('micro batch . alone', said)) == 4

    factor = min(1.0, 0.5 / (norm + 1e-6))
    assert figures('norm before') == pytest.approx([norm], rel=1e-4)
    assert figures('factor, at most 1') == pytest.approx([factor] * 2, rel=1e-4)
    assert figures('gradient of the weight           ')[:2] == pytest.approx(
        [factor * float(gradient[index])] * 2, rel=1e-3
    )
    assert figures('norm after') == pytest.approx([min(norm, 0.5)] * 2, rel=1e-4)

    model.zero_grad()
    optimizer, weight, seen = plain_adamw(model, values), model.transformer.h[0].mlp.c_fc.weight, []
    for x, y in batches:
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        seen.append((float(weight.detach()[index]), float(weight.grad[index])))
        optimizer.step()
        optimizer.zero_grad()
        state = optimizer.state[weight]
        seen[-1] += (
            float(state['exp_avg'][index]),
            float(state['exp_avg_sq'][index]),
            float(weight.detach()[index]),
        )
    before, gradients, m, v, after = zip(*seen)
    for label, wanted in (
        ('w             the weight', before),
        ('w by hand     w + decay + update', after),
        ("w by torch    after train_step, by torch's fused kernel", after),
        ('g             its gradient, clipped', gradients),
    ):
        assert figures(label) == pytest.approx(wanted, abs=1e-6), label
    assert figures('m             0.9 m + 0.1 g')[-3:] == pytest.approx(m, abs=1e-6)
    assert figures('v             0.95 v + 0.05 g^2')[-3:] == pytest.approx(v, abs=1e-6)
    assert all(figure < 1e-6 for figure in figures('difference    the largest of m, v and w'))


def test_the_walk_through_is_adamws_whatever_the_optimizer(train_here, debug, tmp_path):
    def last_section(*flags):
        done = debug('--explain', *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout.split('5. ADAMW\n')[1]

    sentence = (
        "\nIn this run, Muon updates the blocks' matrices and AdamW the rest. "
        'Here, AdamW updates all of them.\n'
    )
    assert last_section('--optimizer=muon') == sentence + last_section(
        '--optimizer=adamw'
    ).removeprefix('\n')
    train_here(tmp_path / 'run', '--max_iters=4', '--optimizer=muon')
    resumed = last_section(
        '--init_from=resume', f'--out_dir={tmp_path / "run"}'
    )  # Muon's memory is no AdamW's
    assert resumed.startswith(sentence) and ' t = 1 ' in resumed


@pytest.mark.parametrize('grad_clip', [0.0, 100.0])
def test_gradients_that_are_short_enough_are_not_clipped(debug, grad_clip):
    said = debug('--explain', f'--grad_clip={grad_clip}').stdout
    rows = {
        line[:28].strip(): line[28:].split() for line in said.split('4. CLIPPING')[1].splitlines()
    }
    assert rows['factor, at most 1'][:2] == ['1.00000000', '1.00000000']
    assert (
        rows['norm before'][0] == rows['norm after'][0]
        and 'nothing is clipped in this step' in said
    )


# -- how much is looked at, and what of it is shown ------------------------------------------------


def test_a_batch_is_cut_to_what_a_cpu_computes_soon(make_training, monkeypatch):
    assert make_training().batch()[0].shape == (4, 16)
    assert make_training('--batch_tokens=40').batch()[0].shape == (2, 16)
    assert make_training('--batch_tokens=10').batch()[0].shape == (1, 10)
    assert make_training('--batch_tokens=1000').batch()[0].shape == (4, 16)
    assert make_training('--batch_tokens=10', '--explain').batch()[0].shape == (2, 5)
    assert make_training('--batch_size=1', '--explain').batch()[0].shape == (2, 16)
    training = make_training('--block_size=100')
    monkeypatch.setattr(
        debug_training, 'QUICK', 210 * 3 * sum(training.model.flops_per_token().values())
    )
    assert make_training('--block_size=100').batch()[0].shape == (2, 100)
    monkeypatch.setattr(
        debug_training, 'QUICK', 80 * 3 * sum(training.model.flops_per_token().values())
    )
    assert make_training('--block_size=100').batch()[0].shape == (1, 80)
    text = ' '.join(
        '\n'.join(examination.describe_batch(make_training('--batch_tokens=10'))).split()
    )
    assert '1 sequence of 10 tokens' in text and '(--batch_tokens=64 takes all)' in text


def test_a_step_that_is_undone_leaves_nothing(make_training):
    training = make_training()
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    examined(training, steps=2)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in training.model.state_dict().items()
    )
    assert training.model.training and all(p.grad is None for p in training.model.parameters())


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
    shown, line = examination.shown_rows(
        [f'h.{i}.{part}' for i in range(9) for part in 'ab'] + ['ln_f'],
        {'h.2.a': 'x', 'h.3.a': 'x', 'h.3.b': 'y', 'h.5.b': 'x'},
        9,
        False,
    )
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


def test_float16s_scale_is_taken_out_of_the_gradients(make_training, debug):
    """As are the steps in which it is still too large."""
    done = debug('--dtype=float16', '--logit_cap=5', '--overfit_steps=2')
    assert done.returncode == 0, done.stderr
    training = make_training('--dtype=float16')
    training.training.scaler = torch.amp.GradScaler('cpu', init_scale=2.0**60)
    training.accumulate([training.batch()])
    halves = {name: p.grad.clone() for name, p in training.model.named_parameters()}
    exact = make_training()
    exact.accumulate([exact.batch()])
    for name, parameter in exact.model.named_parameters():
        assert (halves[name] - parameter.grad).norm() < 0.05 * parameter.grad.norm(), name


# -- every way to start ----------------------------------------------------------------------------


@pytest.mark.parametrize('config', sorted(path.name for path in (ROOT / 'config').glob('*.py')))
def test_every_config_file_runs(config, run_main, tmp_path, monkeypatch):
    """In a small size, on random tokens, and as a new model where it asks for published weights."""
    monkeypatch.chdir(tmp_path)
    small = [
        '--dataset=',
        '--init_from=scratch',
        '--device=cpu',
        '--n_layer=1',
        '--n_head=2',
        '--n_embd=16',
        '--block_size=8',
        '--batch_size=2',
    ]
    for flags in (['--overfit_steps=2'], ['--explain']):
        done = run_main(SCRIPT, ROOT / 'config' / config, *small, *flags)
        assert done.returncode == 0 and done.stderr == '', done.stderr
        assert 'Random tokens contain nothing to learn' in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_published_weights_and_runs_meet_random_tokens(train_here, debug, tmp_path):
    sizes = {'n_layer': 1, 'n_head': 2, 'n_embd': 16}
    model = GPT(GPTConfig(vocab_size=300, block_size=32, bias=True, **sizes))
    (tmp_path / 'gpt2').mkdir()
    (tmp_path / 'gpt2/config.json').write_text(
        json.dumps({'model_type': 'gpt2', 'vocab_size': 300, 'n_positions': 32, **sizes})
    )
    published = {
        name.removeprefix('transformer.'): tensor.t().contiguous()
        if tensor.ndim == 2 and '.h.' in name
        else tensor
        for name, tensor in model.state_dict().items()
    }
    safetensors.torch.save_file(published, tmp_path / 'gpt2/model.safetensors')
    architecture = ['--n_layer=1', '--n_embd=16', '--bias=True', '--block_size=32', '--dataset=']
    done = debug(f'--init_from={tmp_path / "gpt2"}', *architecture, '--overfit_steps=1')
    assert done.returncode == 0, done.stderr
    assert 'ln 300, a uniform guess' in done.stdout and 'healthy: below' not in done.stdout
    train_here(tmp_path / 'run', '--max_iters=2')
    for start in (tmp_path / 'run', 'resume'):
        done = debug(
            f'--init_from={start}',
            f'--out_dir={tmp_path / "run"}',
            '--dataset=',
            '--overfit_steps=1',
        )
        assert done.returncode == 0, done.stderr
        assert 'worse than a guess on random tokens' in done.stdout


def test_mistakes_are_one_line(debug, tmp_path):
    for flags, words in (
        (['--overfit_steps=0'], 'overfit_steps is 0: it must be at least 1'),
        (['--batch_tokens=-1'], 'batch_tokens is -1'),
        (['--vocab_size=1', '--dataset='], 'vocab_size is 1: random tokens need at least 2'),
        (['--vocab_size=100'], 'but vocab_size is 100: leave vocab_size out'),
        (['--dataset=nowhere'], 'or use random tokens: --dataset='),
        (['--n_head=3'], 'n_embd 32 is not divisible by n_head 3'),
        (['--init_from=nowhere'], "expected 'scratch'"),
        (['--init_from=resume', f'--out_dir={tmp_path}'], 'train first'),
        (['--learning_rate=-1'], 'learning_rate is -1'),
        (
            ['--budget=10m'],
            "budget is '10m' (command line): only train.py plans runs; leave it out",
        ),
        (['--explian'], 'did you mean --explain?'),
    ):
        done = debug(*flags)
        assert done.returncode == 2 and done.stdout == '', (flags, done.stdout)
        assert words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_help_tells_its_own_keys_and_train_pys(run_main):
    said = run_main(SCRIPT, '--help').stdout
    assert '--explain' in said and '--batch_tokens' in said and '--learning_rate' in said
