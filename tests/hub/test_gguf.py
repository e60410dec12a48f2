"""GGUF files: read by the formulas of llama.cpp, and by llama.cpp itself if it is installed."""

import json
import re
import sys
from dataclasses import replace

import gguf
import pytest
import torch
from small_models import make_model
from small_tokenizers import byte_fallback
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F

from model import GPTConfig
from nib.errors import UserError
from nib.hub import gguf as hub_gguf
from nib.hub import gguf_vocabulary
from nib.hub.gguf_vocabulary import WORDS
from nib.hub.tokenizer import describe
from nib.text.gpt2 import Gpt2Tokenizer
from nib.text.hf_tokenizer import HfTokenizer
from nib.text.tokenizer import ByteTokenizer, CharTokenizer, IdTokenizer, encode_prompt

SMALL = GPTConfig(vocab_size=67, block_size=19, n_layer=3, n_head=4, n_embd=32, bias=False)
MODERN = replace(SMALL, position='rotary', norm='rms', mlp='swiglu', n_kv_head=2)
LLAMA3 = dict(rotary_base=50.0, rotary_scaling=(4.0, 1.0, 3.0, 12.0))
MODELS = {
    'gpt2': (SMALL, 'gpt2'),
    'gpt2 biases, untied, wide': (
        replace(SMALL, bias=True, tied_head=False, mlp_width=40, norm_eps=1e-3),
        'gpt2',
    ),
    'llama': (MODERN, 'llama'),
    'llama untied, head_dim': (
        replace(MODERN, tied_head=False, head_dim=12, n_kv_head=0, mlp_width=64, norm_eps=1e-3),
        'llama',
    ),
    'llama biases': (replace(MODERN, bias=True), 'llama'),
    'llama 3': (replace(MODERN, **LLAMA3), 'llama'),
    'qwen2': (replace(MODERN, qkv_bias=True), 'qwen2'),
    'qwen2 head_dim': (replace(MODERN, qkv_bias=True, head_dim=12), 'llama'),
    'qwen2 scaled': (replace(MODERN, qkv_bias=True, **LLAMA3), 'llama'),
    'qwen3': (replace(MODERN, qk_norm=True), 'qwen3'),
    'qwen3 untied, biases, head_dim': (
        replace(MODERN, qk_norm=True, qkv_bias=True, head_dim=12, tied_head=False),
        'qwen3',
    ),
}
CHARACTERS = CharTokenizer(''.join(map(chr, range(40, 40 + 67))))


def save(path, model, tokenizer=CHARACTERS, dtype='f32'):
    hub_gguf.write(str(path), model.config, model.state_dict(), tokenizer, dtype)
    return path


def read(path):
    """The metadata, the tensors in float32, and their types."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        for tensor in reader.tensors
    }
    return fields, tensors, {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


def rotate(x, base, divisors, is_llama):
    """Rotates x (H, T, D): neighbors in llama, halves in Qwen."""
    D = x.shape[-1]
    angles = torch.arange(x.shape[1])[:, None] * base ** (-torch.arange(0, D, 2) / D) / divisors
    first, second = (x[..., ::2], x[..., 1::2]) if is_llama else x.chunk(2, -1)
    turned = (
        first * angles.cos() - second * angles.sin(),
        second * angles.cos() + first * angles.sin(),
    )
    return torch.stack(turned, -1).flatten(-2) if is_llama else torch.cat(turned, -1)


def logits_by_formula(fields, tensors, ids):
    """The logits (T, V) of ids (T), from nothing but the file, as llama.cpp defines its models."""
    kind = fields['general.architecture']
    sizes = {n.removeprefix(f'{kind}.'): v for n, v in fields.items() if n.startswith(kind)}
    H, K = sizes['attention.head_count'], sizes['attention.head_count_kv']
    T = len(ids)

    def apply(x, name):
        bias = tensors.get(f'{name}.bias')
        if name.endswith('norm'):
            if kind == 'gpt2':
                eps = sizes['attention.layer_norm_epsilon']
                return F.layer_norm(x, x.shape[-1:], tensors[f'{name}.weight'], bias, eps)
            eps = sizes['attention.layer_norm_rms_epsilon']
            return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * tensors[f'{name}.weight']
        return F.linear(x, tensors[f'{name}.weight'], bias)

    x = tensors['token_embd.weight'][ids]
    if kind == 'gpt2':
        x = x + tensors['position_embd.weight'][:T]
    for i in range(sizes['block_count']):
        block = f'blk.{i}.'
        h = apply(x, block + 'attn_norm')
        if kind == 'gpt2':
            parts = apply(h, block + 'attn_qkv').chunk(3, -1)
        else:
            parts = [apply(h, block + name) for name in ('attn_q', 'attn_k', 'attn_v')]
        q, k, v = (part.view(T, heads, -1).transpose(0, 1) for part, heads in zip(parts, (H, K, K)))
        if kind == 'qwen3':
            q, k = apply(q, block + 'attn_q_norm'), apply(k, block + 'attn_k_norm')
        if kind != 'gpt2':
            D = sizes['attention.key_length']
            assert q.shape[-1] == sizes['rope.dimension_count'] == D
            divisors = tensors.get('rope_freqs.weight', torch.ones(D // 2))
            q, k = (
                rotate(part, sizes['rope.freq_base'], divisors, kind == 'llama') for part in (q, k)
            )
        k, v = (part.repeat_interleave(H // K, 0) for part in (k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5 + torch.full((T, T), -torch.inf).triu(1)
        x = x + apply((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), block + 'attn_output')
        h = apply(x, block + 'ffn_norm')
        up = apply(h, block + 'ffn_up')
        gated = (
            F.gelu(up, approximate='tanh')
            if kind == 'gpt2'
            else F.silu(apply(h, block + 'ffn_gate')) * up
        )
        x = x + apply(gated, block + 'ffn_down')
    head = 'output' if 'output.weight' in tensors else 'token_embd'
    return apply(apply(x, 'output_norm'), head)


@pytest.mark.parametrize('config, architecture', MODELS.values(), ids=MODELS)
def test_the_file_holds_the_model(config, architecture, tmp_path):
    model = make_model(config)
    fields, tensors, _ = read(save(tmp_path / 'model.gguf', model))
    assert fields['general.architecture'] == architecture
    assert fields[f'{architecture}.context_length'] == 19
    assert fields[f'{architecture}.vocab_size'] == len(fields['tokenizer.ggml.tokens']) == 68
    ids = torch.randint(67, (19,))
    with torch.no_grad():
        ours = model(ids[None])[0]
        theirs = logits_by_formula(fields, tensors, ids)
    assert (theirs[:, :67] - ours).abs().max() < 1e-5 * ours.abs().max()
    # The end-of-text token that llama.cpp needs is never the most likely.
    torch.testing.assert_close(theirs[:, 67], ours.mean(-1), atol=1e-4, rtol=1e-4)


# Weights have an error of at most this part of their size; of the largest of their block in q8_0,
# whose steps and scales are both rounded.
ROUNDING = {'f16': 2**-11, 'bf16': 2**-8, 'q8_0': 0.5 / 127 + 2**-11}


@pytest.mark.parametrize('dtype', ROUNDING)
def test_quantized_weights_are_as_close_as_their_type_allows(dtype, tmp_path):
    model = make_model(replace(SMALL, mlp_width=40, bias=True))
    _, exact, _ = read(save(tmp_path / 'exact.gguf', model))
    fields, tensors, types = read(save(tmp_path / 'model.gguf', model, dtype=dtype))
    types = {name: kind.lower() for name, kind in types.items()}
    assert fields['general.file_type'] == {'f16': 1, 'bf16': 32, 'q8_0': 7}[dtype]
    assert types['blk.0.attn_qkv.weight'] == types['token_embd.weight'] == dtype
    # Rows of 40 weights are no multiple of the blocks of 32.
    assert types['blk.0.ffn_down.weight'] == ('f16' if dtype == 'q8_0' else dtype)
    for name, tensor in tensors.items():
        if types[name] == 'f32':
            assert torch.equal(tensor, exact[name])
            continue
        scale = exact[name].abs()
        if types[name] == 'q8_0':
            scale = scale.unflatten(-1, (-1, 32)).amax(-1).repeat_interleave(32, -1)
        assert ((tensor - exact[name]).abs() <= ROUNDING[types[name]] * scale + 1e-7).all()
    vectors = [name for name in types if exact[name].dim() == 1] + ['position_embd.weight']
    assert {types[name] for name in vectors} == {'f32'}


@pytest.mark.parametrize(
    'changes, word',
    [
        (dict(logit_cap=5.0), 'logit_cap'),
        (dict(mlp='relu'), 'mlp is relu'),
        (dict(MODERN.__dict__, mlp='relu2'), 'mlp is relu2'),
        (dict(MODERN.__dict__, qk_norm=True, **LLAMA3), 'rotary_scaling'),
    ],
)
def test_a_model_that_llama_cpp_cannot_express_is_refused_by_its_key(changes, word, tmp_path):
    model = make_model(replace(SMALL, **changes))
    with pytest.raises(UserError, match=word):
        save(tmp_path / 'model.gguf', model)
    assert not list(tmp_path.iterdir())


# -- tokenizers ------------------------------------------------------------------------------------

TEXTS = [
    "It's 12345 o'clock!\n\nYOU'LL  see \t tabs, don't",
    ' spaces  around   ',
    'a\r\nb\r\n\r\n    four\n\n\n\n',
    'é née naïve 日本語 🙂🙂 ½ ² ٣٤٥ Ⅷ \u00a0\u2003x',
    '!!!??...;;; --- "q" <s>no</s> <|end|>',
    'the cat sat on the mat ' * 5,
]


def word_bpe(pre_tokenizer, ignore_merges=False):
    """A byte-level BPE with a special token, an added one, and this rule for words."""
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=['<|end|>'],
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    made.add_tokens([AddedToken('née', normalized=False)])
    return HfTokenizer.read(made.to_str(), '<|end|>')


def by_pattern(*patterns):
    splits = [pre_tokenizers.Split(Regex(pattern), 'isolated') for pattern in patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, last])


def smollm():
    own = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return word_bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), own]))


WORDS_OF = {name: words[0] for words, name in WORDS.items()}
TOKENIZERS = {
    'char': lambda: CharTokenizer.train(''.join(TEXTS)),
    'char with end': lambda: CharTokenizer.train(''.join(TEXTS), has_end_of_text=True),
    'byte': ByteTokenizer,
    'gpt2': Gpt2Tokenizer,
    'sentencepiece': lambda: HfTokenizer.read(byte_fallback().to_str(), '</s>'),
    'smollm by digits': smollm,
    'other spelling': lambda: word_bpe(
        by_pattern(
            WORDS_OF['dbrx'].replace(
                gguf_vocabulary.CONTRACTIONS[0], gguf_vocabulary.CONTRACTIONS[1]
            )
        )
    ),
    **{
        name: lambda words=words: word_bpe(
            by_pattern(*[word for word in words if word != 'ignore_merges']),
            'ignore_merges' in words,
        )
        for words, name in WORDS.items()
    },
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    if request.param == 'gpt2':
        request.getfixturevalue('real_gpt2')
    return TOKENIZERS[request.param]()


# GGUFReader takes seconds for the vocabulary of GPT-2.
@pytest.mark.parametrize(
    'tokenizer', [name for name in TOKENIZERS if name != 'gpt2'], indirect=True
)
def test_the_file_holds_the_tokenizer(tokenizer, tmp_path):
    model = make_model(replace(SMALL, vocab_size=tokenizer.vocab_size, n_layer=1))
    fields, _, _ = read(save(tmp_path / 'model.gguf', model, tokenizer))
    end = fields['tokenizer.ggml.eos_token_id']
    assert end == (tokenizer.vocab_size if tokenizer.end_of_text is None else tokenizer.end_of_text)
    assert fields['tokenizer.ggml.token_type'][end] == gguf.TokenType.CONTROL
    first = getattr(tokenizer, 'first_ids', [])
    assert fields['tokenizer.ggml.add_bos_token'] == bool(first)
    assert not fields['tokenizer.ggml.add_eos_token']  # a prompt is to be continued
    assert fields['tokenizer.ggml.bos_token_id'] == (first[0] if first else end)
    tokens = fields['tokenizer.ggml.tokens']
    assert len(tokens) == len(set(tokens)) == len(fields['tokenizer.ggml.token_type'])


REFUSED = {
    'Unigram': lambda d: d['model'].update(type='Unigram'),
    'end_of_word_suffix': lambda d: d['model'].update(end_of_word_suffix='</w>'),
    'lstrip': lambda d: d['added_tokens'][0].update(lstrip=True),
    'NFKC': lambda d: d.update(normalizer={'type': 'NFKC'}),
    'cuts text into words by no rule': lambda d: d['pre_tokenizer']['pretokenizers'].pop(0),
    'cuts text into words by .s+': lambda d: d['pre_tokenizer']['pretokenizers'][0].update(
        pattern={'Regex': r'\s+'}
    ),
    'Punctuation': lambda d: d['pre_tokenizer']['pretokenizers'].append(
        {'type': 'Punctuation', 'behavior': 'Isolated'}
    ),
}


@pytest.mark.parametrize('word, change', REFUSED.items())
def test_a_tokenizer_that_llama_cpp_cannot_express_is_refused_by_name(word, change):
    described = json.loads(word_bpe(by_pattern(gguf_vocabulary.GPT2_WORDS)).content)
    change(described)
    with pytest.raises(UserError, match=word):
        gguf_vocabulary.read_vocabulary(HfTokenizer(json.dumps(described), 321, 0))


@pytest.mark.parametrize('change', [{'normalizer': {'type': 'Lowercase'}}, {'decoder': None}])
def test_a_tokenizer_without_merges_is_checked_too(change):
    described = json.loads(describe(ByteTokenizer()))
    size = ByteTokenizer.vocab_size
    gguf_vocabulary.read_vocabulary(HfTokenizer(json.dumps(described), size, None))
    with pytest.raises(UserError, match=next(iter(change))):
        gguf_vocabulary.read_vocabulary(HfTokenizer(json.dumps(described | change), size, None))


def test_sentencepiece_without_an_unknown_token_is_refused():
    described = json.loads(byte_fallback().to_str())
    described['model']['unk_token'] = None
    size = len(described['model']['vocab'])
    with pytest.raises(UserError, match='its unk_token is None'):
        gguf_vocabulary.read_vocabulary(HfTokenizer(json.dumps(described), size, 2))


@pytest.mark.parametrize(
    'tokenizer, word', [(IdTokenizer(67), 'kind ids'), (CharTokenizer('a\ud800'), "'.ud800'")]
)
def test_tokenizers_without_text_are_refused(tokenizer, word):
    with pytest.raises(UserError, match=word):
        gguf_vocabulary.read_vocabulary(tokenizer)


def test_merges_that_sentencepiece_would_not_have_are_refused():
    """llama.cpp joins what together is a token, which here would give other tokens."""
    described = json.loads(byte_fallback().to_str())
    size = len(described['model']['vocab'])
    described['model']['vocab']['the'] = size
    with pytest.raises(UserError, match="no merge of '▁' and 'the'"):
        gguf_vocabulary.read_vocabulary(HfTokenizer(json.dumps(described), size + 1, 2))


# -- convert.py ------------------------------------------------------------------------------------


@pytest.fixture
def run(train_here, tmp_path):
    ended = train_here(tmp_path / 'run', '--max_iters=3', '--eval_iters=1', '--eval_interval=3')
    assert ended.returncode == 0, ended.stderr
    return tmp_path / 'run'


def test_a_run_leaves_by_convert_py(run, tmp_path, run_main, monkeypatch):
    convert = ['convert.py', f'--out_dir={run}', '--to=gguf']
    path = tmp_path / 'new/model.gguf'
    ended = run_main(*convert, f'--dest={path}', '--dtype=q8_0')
    assert ended.returncode == 0 and str(path) in ended.stdout, ended.stderr
    assert read(path)[0]['general.name'] == 'model'
    assert list(path.parent.iterdir()) == [path]
    for flags, word in (
        ([f'--dest={path}'], 'already exists'),
        ([f'--dest={tmp_path / "folder"}'], r'end in \.gguf'),
        (['--to=hf', f'--dest={tmp_path / "other.gguf"}'], r'end in \.gguf'),
        (['--to=hf', f'--dest={tmp_path / "folder"}', '--dtype=f16'], 'leave dtype out'),
        ([f'--dest={run / "config.json" / "x.gguf"}'], 'config.json'),
    ):
        ended = run_main(*convert, *flags)
        assert ended.returncode == 2 and re.search(word, ended.stderr), ended
        assert ended.stderr.count('\n') == 1
    monkeypatch.setitem(sys.modules, 'gguf', None)
    ended = run_main(*convert, f'--dest={tmp_path / "other.gguf"}')
    assert ended.returncode == 2 and 'pip install gguf' in ended.stderr


# -- llama.cpp itself ------------------------------------------------------------------------------


@pytest.fixture
def load(monkeypatch):
    """load(path, **options) opens a file with llama.cpp, which caches keys in float32 here."""
    llama_cpp = pytest.importorskip('llama_cpp', reason='pip install llama-cpp-python compiles')
    library = llama_cpp.llama_cpp
    make = library.llama_model_default_params

    def defaults():
        made = make()
        made.use_extra_bufts = False  # kernels for AMX, which fail on some virtual machines
        return made

    monkeypatch.setattr(library, 'llama_model_default_params', defaults)
    small = dict(n_ctx=64, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0)
    return lambda path, **options: llama_cpp.Llama(str(path), **small, **options)


@pytest.mark.parametrize('config', [config for config, _ in MODELS.values()], ids=MODELS)
def test_llama_cpp_has_the_same_logits_and_greedy_tokens(config, load, tmp_path):
    model = make_model(config)
    save(tmp_path / 'model.gguf', model)
    llama = load(tmp_path / 'model.gguf')
    ids = torch.randint(67, (19,)).tolist()
    llama.eval(ids)
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0]
    theirs = torch.tensor(llama.scores[:19, :67])
    # llama.cpp has a table of GELU in float16.
    tolerance = 2e-3 if config.position == 'learned' else 1e-5
    assert (theirs - ours).abs().max() < tolerance * ours.abs().max()
    text = [int(tokens) for tokens in model.generate([ids[:5]], 14, temperature=0)]
    llama.reset()
    made = llama.generate(ids[:5], temp=0.0, top_k=1, repeat_penalty=1.0)
    assert text == [next(made) for _ in range(14)]


def test_llama_cpp_cuts_text_into_the_same_tokens(tokenizer, load, tmp_path):
    model = make_model(replace(SMALL, vocab_size=tokenizer.vocab_size, n_layer=1))
    save(tmp_path / 'model.gguf', model, tokenizer)
    llama = load(tmp_path / 'model.gguf', vocab_only=True)
    is_file = isinstance(tokenizer, HfTokenizer)  # it also has special tokens in a text
    for text in TEXTS:
        ids = tokenizer.encode(text).tolist()
        assert llama.tokenize(text.encode(), add_bos=False, special=is_file) == ids
        decoded = b''.join(llama.detokenize([i], special=True) for i in ids)
        expected = tokenizer.decode_bytes(ids)
        if is_file:
            end = tokenizer.token(tokenizer.end_of_text)
            expected = expected.replace(b'<|endoftext|>', end.encode())
        assert decoded == expected
    prompt = encode_prompt(tokenizer, 'the cat', '')
    assert llama.tokenize(b'the cat', add_bos=True, special=True) == prompt


def test_llama_cpp_continues_a_text_as_sample_py_does(run, load, tmp_path, run_main):
    path = tmp_path / 'model.gguf'
    ended = run_main('convert.py', f'--out_dir={run}', '--to=gguf', f'--dest={path}')
    assert ended.returncode == 0, ended.stderr
    flags = ['--temperature=0', '--num_samples=1', '--max_new_tokens=8', '--start=The cat']
    sampled = run_main('sample.py', f'--out_dir={run}', *flags, '--device=cpu', '--dtype=float32')
    made = load(path)('The cat', max_tokens=8, temperature=0.0)
    assert 'The cat' + made['choices'][0]['text'] == sampled.stdout.rstrip('\n')
