"""nanoGPT's checkpoints: read, continued at their own step and rate, and written."""

import json
import math
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN
from torch import nn

from model import GPT, GPTConfig
from nib.checkpoint import store
from nib.checkpoint.paths import explain
from nib.checkpoint.start import read_weights
from nib.errors import UserError
from nib.hub import nanogpt
from nib.machine.ranks import Ranks
from nib.tokens.batches import BatchLoader
from nib.tokens.dataset import open_dataset

CONFIG = dict(
    dataset='tiny',
    batch_size=4,
    block_size=16,
    gradient_accumulation_steps=2,
    dropout=0.0,
    eval_interval=10,
    max_iters=20,
    learning_rate=1e-2,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.99,
    grad_clip=1.0,
    warmup_iters=4,
    lr_decay_iters=24,
    min_lr=2e-3,
    decay_lr=True,
    device='cuda',
)


class NanoBlock(nn.Module):
    """The layers of nanoGPT under their names, in the order of its constructors."""

    def __init__(self, width, bias):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, bias=bias)
        self.attn = nn.ModuleDict(
            {
                'c_attn': nn.Linear(width, 3 * width, bias=bias),
                'c_proj': nn.Linear(width, width, bias=bias),
            }
        )
        self.ln_2 = nn.LayerNorm(width, bias=bias)
        self.mlp = nn.ModuleDict(
            {
                'c_fc': nn.Linear(width, 4 * width, bias=bias),
                'c_proj': nn.Linear(4 * width, width, bias=bias),
            }
        )

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, 2, C // 2).transpose(1, 2)
            for part in self.attn['c_attn'](self.ln_1(x)).split(C, dim=2)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn['c_proj'](y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp['c_proj'](nn.functional.gelu(self.mlp['c_fc'](self.ln_2(x))))


class NanoGPT(nn.Module):
    """A model with 2 heads, written from the formulas, with nanoGPT's names."""

    def __init__(self, vocab_size, bias=False, width=32, block_size=16):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                'wte': nn.Embedding(vocab_size, width),
                'wpe': nn.Embedding(block_size, width),
                'h': nn.ModuleList(NanoBlock(width, bias) for _ in range(2)),
                'ln_f': nn.LayerNorm(width, bias=bias),
            }
        )
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        self.transformer['wte'].weight = self.lm_head.weight
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, mean=float('ln_' in name), std=0.1)
        self.arguments = dict(
            n_layer=2,
            n_head=2,
            n_embd=width,
            block_size=block_size,
            bias=bias,
            vocab_size=vocab_size,
            dropout=0.0,
        )

    def forward(self, ids):
        x = self.transformer['wte'](ids) + self.transformer['wpe'].weight[: ids.shape[1]]
        for block in self.transformer['h']:
            x = block(x)
        return self.lm_head(self.transformer['ln_f'](x))

    def make_optimizer(self):
        """Parameters with weight decay first, as in nanoGPT."""
        parameters = list(self.parameters())
        groups = [
            {'params': [p for p in parameters if p.dim() >= 2], 'weight_decay': 0.1},
            {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99))


def learning_rate(step):
    if step < 4:
        return 1e-2 * (step + 1) / 5
    return 2e-3 + 0.5 * (1 + math.cos(math.pi * (step - 4) / 20)) * 8e-3


def train(model, optimizer, batches, first, last):
    """nanoGPT's loop, on the given batches; returns the losses of the steps."""
    losses = []
    for step in range(first, last):
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step)
        total = 0.0
        for x, y in batches.micro_batches(step):
            loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()) / 2
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def save(path, model, optimizer, step, prefix='', **changes):
    path.parent.mkdir(exist_ok=True, parents=True)
    checkpoint = {
        'model': {prefix + name: tensor for name, tensor in model.state_dict().items()},
        'optimizer': optimizer.state_dict(),
        'model_args': model.arguments,
        'iter_num': step,
        'best_val_loss': torch.tensor(2.5),
        'config': CONFIG,
    }
    torch.save({**checkpoint, **changes}, path)


def load(path):
    weights = read_weights(str(path), print)
    model = GPT(weights.model).eval()
    model.load_state_dict(weights.tensors['model'])
    return weights, model


@pytest.fixture(scope='module')
def data(data_dir):
    return open_dataset(data_dir / 'tiny', 16)


@pytest.fixture
def nano(data):
    torch.manual_seed(0)
    return NanoGPT(data.vocab_size)


@pytest.mark.slow
def test_a_run_of_nanogpt_goes_on_at_its_own_step_and_rate(nano, data, tmp_path, run_main):
    """The losses of steps 11 to 20 are those of the uninterrupted loop, on the same batches."""
    import train as training

    flags = [flag for flag in SMALL_RUN if flag.startswith(('--device', '--dtype', '--log_int'))]
    config = vars(training) | CONFIG | {'seed': 1337}
    batches = BatchLoader.from_config(config, data, Ranks(), 'cpu')
    optimizer = nano.make_optimizer()
    train(nano, optimizer, batches, 0, 10)
    (tmp_path / 'data').mkdir()
    path = tmp_path / 'out/ckpt.pt'
    save(path, nano, optimizer, 10, prefix='_orig_mod.')
    (path.parent / 'meta.json').write_text((data.folder / 'meta.json').read_text())
    expected = train(nano, optimizer, batches, 10, 20)

    ended = run_main(
        training,
        *flags,
        f'--init_from={path}',
        f'--out_dir={tmp_path / "run"}',
        f'--data_dir={data.folder.parent}',
        '--eval_iters=2',
    )
    assert ended.returncode == 0, ended.stderr
    assert 'resuming from' in ended.stdout
    lines = (tmp_path / 'run/metrics.jsonl').read_text().splitlines()
    steps = {record['step']: record for record in map(json.loads, lines) if 'loss/step' in record}
    assert list(steps) == list(range(11, 21))
    for step, loss in enumerate(expected, start=11):
        assert steps[step]['loss/step'] == pytest.approx(loss, abs=2e-5)
        assert steps[step]['learning_rate'] == pytest.approx(learning_rate(step - 1))
    examined = run_main(
        'debug_training.py',
        '--device=cpu',
        f'--init_from={path}',
        f'--data_dir={data.folder.parent}',
        '--overfit_steps=1',
    )
    said = ' '.join(examined.stdout.split())
    assert 'from the first micro batch of step 10' in said, examined.stderr
    assert f'AdamW step at the full learning rate {CONFIG["learning_rate"]:g} changes' in said
    assert 'AdamW has no state yet' not in said
    assert (
        f'train.py uses the scheduled learning rate {learning_rate(10):.4g} for this step' in said
    )

    # The schedule follows a rate and a number of steps of one's own.
    own = run_main(
        training,
        '--device=cpu',
        f'--init_from={path}',
        f'--out_dir={tmp_path / "own"}',
        f'--data_dir={data.folder.parent}',
        '--learning_rate=3e-4',
        '--max_iters=12',
        '--no-report',
    )
    assert own.returncode == 0, own.stderr
    config = json.loads((tmp_path / 'own/config.json').read_text())['config']
    assert (config['min_lr'], config['lr_decay_iters']) == (pytest.approx(3e-5), 12)

    found, tensors = store.load(tmp_path / 'run')
    assert found.step == 20 and found.state['config']['beta2'] == 0.99
    assert tensors['optimizer']['transformer.ln_f.weight/step'] == 20

    # And back: nanoGPT's optimizer goes on from what convert.py writes.
    ended = run_main(
        'convert.py',
        f'--out_dir={tmp_path / "run"}',
        '--which=latest',
        '--to=nanogpt',
        f'--dest={tmp_path / "back"}',
    )
    assert ended.returncode == 0, ended.stderr
    back = torch.load(tmp_path / 'back/ckpt.pt', weights_only=True)
    assert (back['iter_num'], back['model_args']) == (20, nano.arguments)
    other = NanoGPT(data.vocab_size)
    other.load_state_dict(back['model'])
    other_optimizer = other.make_optimizer()
    other_optimizer.load_state_dict(back['optimizer'])
    losses = train(other, other_optimizer, batches, 20, 22)
    assert losses == pytest.approx(train(nano, optimizer, batches, 20, 22), abs=1e-3)
    meta = pickle.loads((tmp_path / 'back/meta.pkl').read_bytes())
    assert ''.join(meta['itos'].values()) == data.tokenizer.characters


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.module.'])
def test_logits_equal_nanogpts(prefix, bias, tmp_path):
    torch.manual_seed(0)
    nano = NanoGPT(50, bias)
    save(tmp_path / 'ckpt.pt', nano, nano.make_optimizer(), 0, prefix)
    _, model = load(tmp_path / 'ckpt.pt')
    ids = torch.randint(50, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), nano(ids), atol=1e-5, rtol=1e-5)


def test_a_head_that_is_not_the_embedding_is_kept(tmp_path):
    nano = NanoGPT(50)
    nano.lm_head.weight = nn.Parameter(torch.randn(50, 32))
    save(tmp_path / 'ckpt.pt', nano, nano.make_optimizer(), 0)
    _, model = load(tmp_path / 'ckpt.pt')
    ids = torch.randint(50, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), nano(ids), atol=1e-5, rtol=1e-5)


def test_a_folder_gives_the_weights_for_a_new_run(nano, tmp_path):
    save(tmp_path / 'ckpt.pt', nano, nano.make_optimizer(), 10)
    weights, _ = load(tmp_path)
    assert weights.resumed is None and weights.tensors.keys() == {'model'}


@pytest.mark.parametrize('name', ['ckpt-10.pt', 'best.pth'])
def test_a_file_of_another_name_is_continued_too(name, nano, tmp_path):
    save(tmp_path / name, nano, nano.make_optimizer(), 10)
    weights, _ = load(tmp_path / name)
    assert weights.resumed.state['step'] == 10 and 'optimizer' in weights.tensors
    assert f'use --init_from={tmp_path / name}' in explain(tmp_path / name)
    keys = vars(weights.model) | {'optimizer': 'adamw', 'batch_size': 1, 'block_size': 8}
    keys |= {'max_iters': 20, 'lr_decay_iters': 20, 'learning_rate': 1e-2, 'min_lr': 1e-3}
    with pytest.raises(UserError, match='was trained with block_size 16, .*, or train a new model'):
        weights.adopt(keys, dict.fromkeys(keys, 'command line'))


def test_a_shorter_context_needs_a_new_run_which_the_message_starts(nano, data, tmp_path, run_main):
    path = tmp_path / 'nano/ckpt.pt'
    save(path, nano, nano.make_optimizer(), 10)
    (path.parent / 'meta.json').write_text((data.folder / 'meta.json').read_text())
    flags = [flag for flag in SMALL_RUN if not flag.startswith(('--n_', '--block', '--warm'))]
    flags += [
        '--max_iters=1',
        '--warmup_iters=0',
        '--no-report',
        f'--data_dir={data.folder.parent}',
    ]
    begun = run_main('train.py', *flags, f'--init_from={path.parent}', f'--out_dir={tmp_path}/own')
    assert begun.returncode == 0, begun.stderr
    for resume, out_dir in ((path, 'other'), ('resume', 'own')):
        flags = [*flags, '--block_size=8']
        refused = run_main(
            'train.py', *flags, f'--init_from={resume}', f'--out_dir={tmp_path / out_dir}'
        )
        advised = re.search('start a new run from .* with (--init_from=.*) and', refused.stderr)
        assert advised, refused.stderr
        done = run_main('train.py', *flags, advised[1], '--eval_only')
        assert done.returncode == 0 and ' 64 tokens per step' in done.stdout, done.stderr


def test_nanogpt_finds_the_characters_where_convert_says(nano, data, tmp_path, run_main):
    """nanoGPT reads data/DATASET/meta.pkl. Weights without a run have no dataset."""
    folder = tmp_path / 'nano'
    save(folder / 'ckpt.pt', nano, nano.make_optimizer(), 10)
    (folder / 'meta.json').write_text((data.folder / 'meta.json').read_text())
    for start, dataset in ((folder / 'ckpt.pt', CONFIG['dataset']), (folder, 'new-1')):
        dest = tmp_path / f'new-{len(list(tmp_path.glob("new-*")))}'
        done = run_main('convert.py', f'--init_from={start}', '--to=nanogpt', f'--dest={dest}')
        assert f'looks for meta.pkl in its data/{dataset}/: move it there' in done.stdout
        assert torch.load(dest / 'ckpt.pt', weights_only=True)['config']['dataset'] == dataset


def test_the_tokenizer_is_that_of_its_dataset(nano, data, tmp_path):
    path = tmp_path / 'nano/out/ckpt.pt'
    save(path, nano, nano.make_optimizer(), 0)
    assert nanogpt.read(path).tokenizer is None
    characters = data.tokenizer.characters
    meta = {
        'vocab_size': len(characters),
        'itos': dict(enumerate(characters)),
        'stoi': {c: i for i, c in enumerate(characters)},
    }
    folder = tmp_path / 'nano/data/tiny'
    folder.mkdir(parents=True)
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    assert nanogpt.read(path).tokenizer == data.tokenizer.to_json()


def test_a_padded_gpt2_samples_only_tokens_that_have_text(tmp_path):
    """Although a row of the padding is the most likely token."""
    nano = NanoGPT(50304, width=8)
    with torch.no_grad():
        nano.lm_head.weight[50300] *= 1000
    save(tmp_path / 'ckpt.pt', nano, nano.make_optimizer(), 0)
    weights = read_weights(str(tmp_path), print)
    assert weights.tokenizer == {'kind': 'gpt2'}
    cropped = weights.crop_vocabulary(50257)
    model = GPT(cropped.model).eval()
    model.load_state_dict(cropped.tensors['model'])
    ids = torch.randint(50257, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), nano(ids)[..., :50257], atol=1e-4, rtol=1e-4)


def changed(*keys):
    """A damage: the value at these keys is another one."""

    def change(path):
        checkpoint = torch.load(path, weights_only=True)
        *parents, last, value = keys
        place = checkpoint
        for key in parents:
            place = place[key]
        place[last] = value
        torch.save(checkpoint, path)

    return change


WEIGHT = 'transformer.h.0.mlp.c_fc.weight'
BAD = {
    'code': (
        lambda path: path.write_bytes(pickle.dumps(print)),
        'Python objects, which can run code',
    ),
    'a number of NumPy': (
        changed('best_val_loss', np.float64(2.5)),
        r'Python objects such as numpy\S+scalar, which can run code .* save yours again without',
    ),
    'cut': (lambda path: path.write_bytes(path.read_bytes()[:5000]), 'cannot be read'),
    'empty': (lambda path: path.write_bytes(b''), 'cannot be read'),
    'a list': (lambda path: torch.save([1], path), 'not a nanoGPT checkpoint'),
    'no sizes': (lambda path: torch.save({'model': {}, 'model_args': {}}, path), 'model_args'),
    'steps': (changed('iter_num', 'five'), "iter_num is 'five'"),
    'negative steps': (changed('iter_num', -5), 'iter_num is -5'),
    'a loss': (changed('best_val_loss', 'low'), 'not a valid nanoGPT checkpoint.*low'),
    'a config': (changed('config', [1]), 'not a valid nanoGPT checkpoint'),
    'a rate': (changed('config', 'learning_rate', 'high'), "learning_rate is 'high'"),
    'a count': (changed('config', 'max_iters', 20.5), 'max_iters is 20.5, expected int'),
    'a dataset': (changed('config', 'dataset', 7), 'dataset is 7, expected str'),
    'an optimizer': (changed('optimizer', [1]), 'not a valid nanoGPT checkpoint'),
    'no moments': (changed('optimizer', 'state', {n: {} for n in range(15)}), 'exp_avg'),
    'no tensor': (changed('model', WEIGHT, [1.0]), 'not a valid nanoGPT checkpoint'),
    'no name': (changed('model', 3, torch.zeros(1)), 'not a valid nanoGPT checkpoint'),
    'NaN': (changed('model', WEIGHT, torch.full((128, 32), math.nan)), 'NaN or infinite'),
    'int8': (changed('model', WEIGHT, torch.zeros(128, 32, dtype=torch.int8)), 'quantized'),
    'a key of a fork': (changed('model_args', 'rope', True), 'model_args has rope True'),
    'a tensor for a number': (changed('model_args', 'rope', torch.ones(2)), 'RuntimeError'),
    'a tensor of a fork': (changed('model', 'rope', torch.zeros(1)), 'rope .* no such tensor'),
}


@pytest.mark.parametrize('damage, word', BAD.values(), ids=BAD)
def test_what_is_no_checkpoint_of_nanogpt_is_refused(damage, word, nano, tmp_path):
    path = tmp_path / 'ckpt.pt'
    save(path, nano, nano.make_optimizer(), 0)
    damage(path)
    with pytest.raises(UserError, match=word), warnings.catch_warnings():
        warnings.simplefilter('error')  # they would be further lines on standard error
        nanogpt.read(path)


@pytest.mark.parametrize(
    'arguments, word',
    [
        (dict(n_layer=3), r'transformer.h.2.* is missing'),
        (dict(n_layer=1), 'transformer.h.1.*no such tensor'),
        (dict(block_size=8), 'wpe'),
        (dict(n_embd='32'), 'not all integers'),
        (dict(n_head=5), 'n_head'),
        (dict(bias=True), 'bias is missing'),
    ],
)
def test_model_args_that_lie_are_refused(arguments, word, nano, tmp_path):
    save(
        tmp_path / 'ckpt.pt', nano, nano.make_optimizer(), 0, model_args=nano.arguments | arguments
    )
    with pytest.raises(UserError, match=word):
        nanogpt.read(tmp_path / 'ckpt.pt')


@pytest.mark.parametrize(
    'changes',
    [
        dict(tied_head=False),
        dict(norm='rms'),
        dict(n_kv_head=1),
        dict(mlp_width=8),
        dict(logit_cap=5.0),
        dict(qk_norm=True),
        dict(position='rotary'),
        dict(mlp='relu2'),
        dict(norm_eps=1e-3),
        dict(head_dim=8),
    ],
)
def test_what_nanogpt_cannot_express_is_refused_by_its_key(changes):
    shape = dict(vocab_size=50, block_size=16, n_layer=1, n_head=2, n_embd=8)
    reason = nanogpt.why_not(GPTConfig(**shape, **changes))
    assert reason.startswith(f'{next(iter(changes))} is ')
    assert nanogpt.why_not(GPTConfig(**shape)) is None
