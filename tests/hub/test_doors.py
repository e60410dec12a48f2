"""Where open models come from: hub ids, folders, files, tokenizers and scripts."""

import errno
import io
import json
import math
import os
import pathlib
import re
import shutil
import sys
import threading
import time
import unicodedata
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product

import pytest
import torch
from conftest import SMALL_RUN, full_disk
from safetensors.torch import load_file, save_file
from small_tokenizers import byte_fallback, byte_level, qwen, split_like
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from model import GPT, GPTConfig
from nib.checkpoint.start import read_weights
from nib.errors import UserError
from nib.hub import huggingface
from nib.hub import tokenizer as hub_tokenizer
from nib.hub.files import Repository
from nib.text.gpt2 import Gpt2Tokenizer
from nib.text.hf_tokenizer import HfTokenizer
from nib.text.tokenizer import ByteTokenizer, CharTokenizer, tokenizer_from_json
from nib.tokens import borrow
from nib.tokens.write import write_dataset


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A GPT-2 in one file and in shards."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50257, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    path = tmp_path_factory.mktemp('models')
    model = GPT2LMHeadModel(config)
    model.save_pretrained(path / 'whole')
    model.save_pretrained(path / 'shards', max_shard_size='2KB')
    return path


@pytest.fixture
def copy(folder, tmp_path):
    def make(name):
        (tmp_path / name).mkdir()
        for file in (folder / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        return tmp_path / name

    return make


class Hub(BaseHTTPRequestHandler):
    """The addresses that huggingface_hub asks for: /OWNER/NAME/resolve/main/FILE."""

    def do_GET(self, with_content=True):
        parts = self.path.split('/')
        if parts[1] == 'api':  # /api/models/OWNER/NAME
            return self.list_files(parts[4])
        self.server.asked.add(parts[-1])
        path = self.server.folder / parts[2] / parts[-1]
        if 'gated' in self.path or not path.is_file():
            gated = 'gated' in self.path
            self.send_response(403 if gated else 404)
            self.send_header('X-Error-Code', 'GatedRepo' if gated else 'EntryNotFound')
            self.send_header('X-Repo-Commit', '0' * 40)
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header('ETag', f'"{parts[2]}{parts[-1]}{len(content)}"')
        self.send_header('X-Repo-Commit', '0' * 40)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def list_files(self, name):
        files = [{'rfilename': path.name} for path in (self.server.folder / name).iterdir()]
        content = json.dumps({'id': f'owner/{name}', 'siblings': files}).encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET(with_content=False)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.folder, server.asked = folder, set()
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    address = f'http://127.0.0.1:{server.server_port}'
    monkeypatch.setattr(constants, 'ENDPOINT', address)
    template = address + '/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    for name in ('HF_HUB_ETAG_TIMEOUT', 'HF_HUB_DOWNLOAD_TIMEOUT'):
        monkeypatch.setattr(constants, name, 600)
    yield server
    server.shutdown()
    server.server_close()


def test_a_hub_id_is_downloaded_once_and_then_needs_no_network(hub, folder):
    expected = read_weights(str(folder / 'whole'), print).tensors['model']
    for name in ('owner/whole', 'owner/shards'):
        found = read_weights(name, print)
        assert found.model.block_size == 16 and found.tokenizer == {'kind': 'gpt2'}
        assert found.tensors['model'].keys() == expected.keys()
        assert all(torch.equal(t, expected[n]) for n, t in found.tensors['model'].items())


def test_without_a_network_the_line_says_what_to_fetch(hub):
    read_weights('owner/shards', print)
    hub.shutdown()
    hub.server_close()
    read_weights('owner/shards', print)  # is already here
    with pytest.raises(UserError, match='no connection.*hf download owner/absent --local'):
        read_weights('owner/absent', print)


def test_the_tokenizer_of_a_hub_id_is_fetched_and_the_line_without_a_network_names_its_flag(
    hub, folder, monkeypatch
):
    content = byte_level().to_str()
    (folder / 'own').mkdir()
    (folder / 'own/tokenizer.json').write_text(content)
    assert borrow.read_tokenizer('owner/own').content == content
    hub.shutdown()
    hub.server_close()
    pauses = []
    monkeypatch.setattr(time, 'sleep', pauses.append)
    with pytest.raises(UserError, match='no connection.*--tokenizer=FOLDER'):
        borrow.read_tokenizer('owner/absent')
    assert pauses == []  # it does not try again


UNKNOWN = {'vocab.json': '{"a": 0}'}


@pytest.mark.slow
@pytest.mark.parametrize(
    'command, files, words',
    [
        (['sample.py', '--chat'], {}, 'has no chat template'),
        (
            ['sample.py', '--chat'],
            {'tokenizer.json': byte_level().to_str(), 'chat_template.jinja': '{{'},
            'the chat template does not accept',
        ),
        (
            ['sample.py', '--start=' + 'a ' * 17],
            {'tokenizer.json': byte_level().to_str()},
            'the context of the model has 16',
        ),
        (['sample.py'], {'tokenizer.json': '{}'}, 'not a valid tokenizer.json'),
        (['sample.py'], UNKNOWN, 'the tokenizer of owner/lacking is not known'),
        (['convert.py', '--dest=new'], UNKNOWN, 'the tokenizer of owner/lacking is not known'),
        (['train.py', *SMALL_RUN], UNKNOWN, 'the tokenizer of owner/lacking is not known'),
    ],
)
def test_weights_are_not_downloaded_if_what_else_is_needed_is_missing(
    command, files, words, hub, copy, folder, run_main, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    lacking = copy('whole').rename(folder / 'lacking')
    try:
        for file, text in files.items():
            (lacking / file).write_text(text)
        done = run_main(command[0], '--init_from=owner/lacking', *command[1:])
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert not [file for file in hub.asked if file.startswith('model')]
    finally:
        shutil.rmtree(lacking)


def test_a_hub_library_that_is_too_old_is_not_called_missing(monkeypatch):
    monkeypatch.delattr('huggingface_hub.errors.EntryNotFoundError')  # as before 0.25
    with pytest.raises(UserError, match='cannot import name.*install --upgrade huggingface_hub'):
        read_weights('owner/whole', print)
    monkeypatch.setitem(sys.modules, 'huggingface_hub.errors', None)  # as before it had this part
    with pytest.raises(UserError, match='cannot be imported.*install --upgrade huggingface_hub'):
        read_weights('owner/whole', print)


def test_a_gated_model_says_how_to_get_access(hub):
    with pytest.raises(UserError, match='access must be granted.*hf auth login'):
        read_weights('owner/gated', print)


def test_pickles_are_refused_with_the_alternative(copy):
    folder = copy('whole')
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    with pytest.raises(UserError, match=r'pickle.*model\.safetensors.*save_pretrained'):
        read_weights(str(folder), print)


def test_an_adapter_without_its_model_is_refused_with_the_remedy(tmp_path):
    (tmp_path / 'adapter_config.json').write_text('{}')
    with pytest.raises(UserError, match=r'adapter.*merge_and_unload'):
        read_weights(str(tmp_path), print)


@pytest.mark.parametrize(
    'file, words',
    [('adapter_config.json', 'adapter.*merge_and_unload'), ('q4.gguf', r'q4\.gguf is a GGUF file')],
)
def test_weights_in_another_format_are_named_beside_a_config(file, words, copy):
    folder = copy('whole')
    (folder / 'model.safetensors').rename(folder / file)
    for name in {folder, folder / file} if file.endswith('.gguf') else {folder}:
        with pytest.raises(UserError, match=words):
            read_weights(str(name), print)


@pytest.mark.parametrize(
    'file, words',
    [
        ('adapter_config.json', 'owner/odd has only the adapter.*merge_and_unload'),
        ('q4.gguf', r'owner/odd/q4\.gguf is a GGUF file'),
    ],
)
def test_weights_in_another_format_are_named_without_a_config_on_the_hub_and_in_its_cache(
    file, words, hub, tmp_path
):
    from huggingface_hub import hf_hub_download

    hub.folder = tmp_path / 'hub'
    (hub.folder / 'odd').mkdir(parents=True)
    (hub.folder / 'odd' / file).write_text('{}')
    with pytest.raises(UserError, match=words):
        read_weights('owner/odd', print)
    hf_hub_download('owner/odd', file)
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UserError, match=words):
        read_weights('owner/odd', print)


def test_true_is_no_end_of_text_token(tmp_path):
    (tmp_path / 'tokenizer.json').write_text(byte_level().to_str())
    (tmp_path / 'generation_config.json').write_text('{"eos_token_id": true}')
    found = hub_tokenizer.read_file(tmp_path / 'tokenizer.json', Repository(str(tmp_path)))
    expected = HfTokenizer.read(byte_level().to_str(), None).end_of_text
    assert found.end_of_text is expected


def test_damaged_shards_are_named(copy):
    folder = copy('shards')
    shard = sorted(folder.glob('*.safetensors'))[1]
    content = shard.read_bytes()
    for damage, words in (
        (lambda: shard.write_bytes(content[:-5]), f'{shard.name} is damaged'),
        (lambda: save_file({'other': torch.zeros(1)}, shard), 'does not contain'),
        (shard.unlink, f'has no {shard.name}'),
        (
            lambda: (folder / 'model.safetensors.index.json').write_text(
                json.dumps({'weight_map': {'wte.weight': '../secret'}})
            ),
            'no valid weight_map',
        ),
    ):
        damage()
        with pytest.raises(UserError, match=words):
            read_weights(str(folder), print)


@pytest.mark.parametrize('name', ['wte.weight', 'h.1.ln_1.bias'])
@pytest.mark.parametrize(
    'change, words',
    [
        (lambda tensor: tensor.to(torch.int8), 'quantized'),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), 'quantized'),
        (lambda tensor: tensor * math.nan, 'NaN or infinite'),
        (lambda tensor: tensor - math.inf, 'NaN or infinite'),
    ],
)
def test_tensors_without_usable_numbers_are_refused(change, words, name, copy):
    folder = copy('whole')
    tensors = load_file(folder / 'model.safetensors')
    tensors[f'transformer.{name}'] = change(tensors[f'transformer.{name}'])
    save_file(tensors, folder / 'model.safetensors')
    with pytest.raises(UserError, match=f'the tensor transformer.{name} .*{words}'):
        read_weights(str(folder), print)


@pytest.mark.parametrize('added', [[{'id': 'x'}], [1, 2], [{'content': [], 'id': 1}]])
def test_added_tokens_that_are_none_are_refused(added, copy):
    folder = copy('whole')
    described = json.loads(byte_level().to_str()) | {'added_tokens': added}
    (folder / 'tokenizer.json').write_text(json.dumps(described))
    with pytest.raises(UserError, match='not a valid tokenizer.json'):
        read_weights(str(folder), print)


def test_a_name_that_is_no_hub_id_says_how_one_looks(run_main, tmp_path):
    for name in ('owner/a name', 'owner/name:main', 'owner/näme', 'owner/name/', 'a/\x1b[31m\x85'):
        ended = run_main('convert.py', f'--init_from={name}', f'--dest={tmp_path / "x"}')
        assert ended.returncode == 2 and 'an id is OWNER/NAME' in ended.stderr, name
        assert ended.stderr.count('\n') == 1 and not (tmp_path / 'x').exists()
        assert '\x1b' not in ended.stderr  # which would change the terminal


def test_another_vocabulary_of_the_same_size_is_not_gpt2s(copy, run_main):
    folder = copy('whole')
    vocabulary = {f'token {i}': i for i in range(50257)}
    (folder / 'vocab.json').write_text(json.dumps(vocabulary))
    assert read_weights(str(folder), print).tokenizer is None
    ended = run_main('sample.py', f'--init_from={folder}', '--device=cpu')
    assert ended.returncode == 2 and 'the tokenizer of' in ended.stderr
    flags = ['--dataset=', '--device=cpu', '--batch_size=2', '--overfit_steps=1']
    ended = run_main('debug_training.py', f'--init_from={folder}', *flags)
    assert ended.returncode == 0, ended.stderr  # on random tokens


@pytest.mark.parametrize('build', [byte_level, byte_fallback])
def test_a_model_with_its_own_tokenizer_is_finetuned_sampled_and_written(
    build, tmp_path, run_main, train_here
):
    built, model = build(), tmp_path / 'model'
    content = built.to_str()
    end = '<|end|>' if build is byte_level else '</s>'
    size = built.get_vocab_size() + 3  # padded
    shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(vocab_size=size, max_position_embeddings=32, **shape)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(model)
    (model / 'tokenizer.json').write_text(content)
    (model / 'tokenizer_config.json').write_text(json.dumps({'eos_token': end}))
    notes = tmp_path / 'notes'
    notes.mkdir()
    for number in range(20):
        (notes / f'{number}.txt').write_text(f'{number}: é, 🙂 the cat\n{end}' * 20)

    debug = ['debug_training.py', f'--init_from={model}', '--dataset=', '--device=cpu']
    ended = run_main(*debug, '--batch_size=2', '--block_size=8', '--overfit_steps=1')
    assert ended.returncode == 0, ended.stderr
    data = tmp_path / 'mine'
    prepare = ['data/text/prepare.py', f'--input={notes}', f'--out_dir={data}']
    ended = run_main(*prepare, f'--tokenizer={model}')
    assert ended.returncode == 0, ended.stderr
    described = json.loads((data / 'meta.json').read_text())['tokenizer']
    assert described['content'] == content
    run, flags = tmp_path / 'run', ['--max_iters=2', '--eval_iters=1', '--eval_interval=2']
    where = [f'--data_dir={tmp_path}', '--dataset=mine', '--block_size=32']
    ended = train_here(run, *flags, *where, f'--init_from={model}')
    assert ended.returncode == 0, ended.stderr
    assert read_weights(str(run), print).tokenizer == described

    greedy = ['--temperature=0', '--num_samples=1', '--max_new_tokens=20', '--start=the cat']
    greedy += ['--device=cpu', '--dtype=float32']
    sampled = run_main('sample.py', f'--out_dir={run}', *greedy)
    assert sampled.returncode == 0, sampled.stderr
    ended = run_main('convert.py', f'--out_dir={run}', f'--dest={tmp_path / "hf"}')
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / 'hf/tokenizer.json').read_text() == content
    written = json.loads((tmp_path / 'hf/tokenizer_config.json').read_text())
    # generate() takes no others; transformers 4 would add token_type_ids.
    assert written['model_input_names'] == ['input_ids', 'attention_mask']
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'hf')
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    assert tokenizer.eos_token == end and theirs.config.eos_token_id == tokenizer.eos_token_id
    assert theirs.config.bos_token_id == tokenizer.bos_token_id == 1
    prompt = tokenizer('the cat', return_tensors='pt')
    ids = theirs.generate(**prompt, do_sample=False, max_new_tokens=20, eos_token_id=size)[0]
    # The first token is <s>; ours writes the end of text as <|endoftext|>.
    text = tokenizer.decode(ids[1:]).replace(end, '<|endoftext|>')
    assert sampled.stdout == text + '\n'


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(copy, run_main):
    folder = copy('whole')
    described = json.loads(byte_level().to_str())
    described['model']['vocab'] |= {f'token {i}': 300 + i for i in range(50257)}
    (folder / 'tokenizer.json').write_text(json.dumps(described))
    ended = run_main('sample.py', f'--init_from={folder}', '--device=cpu')
    assert ended.returncode == 2 and 'belongs to another model' in ended.stderr


TEXT = 'Two  words,\n\n\ta tab, don\'t "é" 🙂 <end>     1234 e\u0301 '
SPLITS = 'gpt2', 'smollm', 'llama', 'ours', 'qwen'
TOKENIZERS = {
    'char': CharTokenizer.train(TEXT),
    'char with end': CharTokenizer.train(TEXT, has_end_of_text=True),
    'byte': ByteTokenizer(),
    'gpt2': Gpt2Tokenizer(),
    'like SentencePiece': HfTokenizer.read(byte_fallback().to_str()),
    'byte-level': HfTokenizer.read(byte_level().to_str()),
    **{f'splits like {name}': HfTokenizer.read(split_like(name).to_str()) for name in SPLITS},
    'qwen': HfTokenizer.read(qwen().to_str()),
}
MODERN = GPTConfig(
    n_layer=1, n_head=2, n_embd=4, bias=False, position='rotary', norm='rms', mlp='swiglu'
)
FAMILIES = {
    'GPT2LMHeadModel': replace(MODERN, position='learned', norm='layer', mlp='gelu'),
    'LlamaForCausalLM': MODERN,
    'Qwen2ForCausalLM': replace(MODERN, qkv_bias=True),
    'Qwen3ForCausalLM': replace(MODERN, qk_norm=True),
}


@pytest.mark.parametrize('name', TOKENIZERS)
def test_a_written_tokenizer_gives_the_same_ids_and_the_same_text(name, tmp_path, request):
    """With every family: AutoTokenizer picks its class by the family too."""
    families = FAMILIES
    if name == 'gpt2':  # a second for each family
        request.getfixturevalue('real_gpt2')
        families = {'Qwen2ForCausalLM': FAMILIES['Qwen2ForCausalLM']}
    ours = TOKENIZERS[name]
    first = ours.first_ids if isinstance(ours, HfTokenizer) else []
    # Qwen's tokenizer joins letters and accents.
    text = unicodedata.normalize('NFC', TEXT) if 'qwen' in name else TEXT
    for family, shape in families.items():
        folder = tmp_path / family
        config = replace(shape, vocab_size=ours.vocab_size)
        huggingface.write(folder, config, GPT(config).state_dict(), ours, 'A card.')
        written = json.loads((folder / 'config.json').read_text())['architectures'][0]
        is_qwen2 = family == 'Qwen2ForCausalLM'
        assert written == ('LlamaForCausalLM' if is_qwen2 and name != 'qwen' else family)
        theirs = AutoTokenizer.from_pretrained(folder)
        ids = theirs(TEXT).input_ids
        assert ids == first + ours.encode(TEXT).tolist(), family
        assert theirs.decode(ids[len(first) :]) == text, family
        assert len(theirs) == ours.vocab_size and theirs.eos_token_id == ours.end_of_text
        if ours.end_of_text is not None:
            assert theirs(theirs.eos_token).input_ids == [*first, ours.end_of_text]
        found = hub_tokenizer.read_tokenizer(Repository(str(folder)), ours.vocab_size)
        assert tokenizer_from_json(found).encode(TEXT).tolist() == ours.encode(TEXT).tolist()
        assert found == ours.to_json()
    if not isinstance(ours, HfTokenizer):  # ours come back as themselves also from transformers
        theirs.save_pretrained(tmp_path / 'again')
        found = hub_tokenizer.read_tokenizer(Repository(str(tmp_path / 'again')), ours.vocab_size)
        assert found == ours.to_json()


@pytest.mark.parametrize('name', ['char', 'byte', 'gpt2', 'byte-level', 'qwen'])
def test_a_tokenizer_that_spells_the_end_of_text_is_written_as_such(name, tmp_path, request):
    if name == 'gpt2':
        request.getfixturevalue('real_gpt2')
    ours = replace(TOKENIZERS[name], spells_end_of_text=True)
    if name == 'char':
        ours = CharTokenizer.train(TEXT + '<|endoftext|>', has_end_of_text=True)
        ours = replace(ours, spells_end_of_text=True)
    config = replace(FAMILIES['Qwen2ForCausalLM'], vocab_size=ours.vocab_size)
    huggingface.write(tmp_path / 'hf', config, GPT(config).state_dict(), ours, 'A card.')
    theirs = AutoTokenizer.from_pretrained(tmp_path / 'hf')
    found = hub_tokenizer.read_tokenizer(Repository(str(tmp_path / 'hf')), ours.vocab_size)
    assert found == ours.to_json()
    text = f'a{theirs.eos_token}b'
    ids = theirs(text, add_special_tokens=False).input_ids
    assert ids == ours.encode(text).tolist() and len(ids) > 3
    assert theirs.decode(ids) == text


def test_a_character_that_utf8_cannot_express_is_refused(tmp_path):
    ours = CharTokenizer.train('a\udc80')
    with pytest.raises(UserError, match=r"it has '\\udc80'"):
        hub_tokenizer.write_tokenizer(tmp_path, ours, 16)


def test_a_trained_model_leaves_by_convert_py(train_here, tmp_path, run_main, monkeypatch, capfd):
    train_here(tmp_path / 'run', '--max_iters=2', '--eval_iters=1', '--bias')
    convert = ['convert.py', f'--out_dir={tmp_path / "run"}', f'--dest={tmp_path / "hf"}']
    ended = run_main(*convert)
    assert ended.returncode == 0, ended.stderr
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'hf')
    start = read_weights(str(tmp_path / 'run'), print)
    ours = GPT(start.model).eval()
    ours.load_state_dict(start.tensors['model'])
    ids = tokenizer('The cat sees', return_tensors='pt').input_ids
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)
    card = (tmp_path / 'hf/README.md').read_text()
    assert '| dataset | tiny |' in card and 'nats per token' in card
    assert f'from run/{start.name.rpartition("/")[2]}.' in card and str(tmp_path) not in card
    assert f'{tokenizer.vocab_size} characters of the training text' in card
    again = run_main(*convert)
    assert again.returncode == 2 and 'already exists' in again.stderr
    monkeypatch.chdir(tmp_path / 'hf')
    exec(re.search('```python\n(.*?)```', card, re.DOTALL)[1], {})
    assert capfd.readouterr().out.startswith('The')


def test_files_that_cannot_be_read_or_written_are_named(train_here, tmp_path, run_main):
    """The tests may run as root, who may do all that a file system can do."""
    train_here(tmp_path / 'run', '--max_iters=1', '--eval_iters=1')
    convert = ['convert.py', f'--out_dir={tmp_path / "run"}']
    (tmp_path / 'file').touch()
    for to, dest in (('hf', 'file/new'), ('nanogpt', 'file/a/new'), ('gguf', 'file/new.gguf')):
        ended = run_main(*convert, f'--to={to}', f'--dest={tmp_path / dest}')
        assert ended.returncode == 2 and f'{tmp_path / "file"} is not a folder' in ended.stderr

    assert run_main(*convert, f'--dest={tmp_path / "hf"}').returncode == 0
    for file in ('model.safetensors', 'config.json'):
        path = tmp_path / 'hf' / file
        with pytest.MonkeyPatch.context() as patch:
            refuse_to_open(patch, path)
            ended = run_main('sample.py', f'--init_from={tmp_path / "hf"}', '--device=cpu')
        assert ended.returncode == 2
        assert f'{path} cannot be read (Permission denied)' in ended.stderr


def refuse_to_open(patch, path):
    """Opening this path fails as it does for another user."""
    original = io.open

    def refuse(file, *arguments, **options):
        if str(file) == str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(file, *arguments, **options)

    patch.setattr(io, 'open', refuse)
    if sys.version_info < (3, 11):  # where Path.open() has a reference of its own
        patch.setattr(pathlib._normal_accessor, 'open', refuse)


def test_a_run_without_a_checkpoint_is_no_model(train_here, tmp_path, run_main):
    train_here(tmp_path / 'run', '--max_iters=1', '--eval_iters=1')
    for step in (tmp_path / 'run').glob('step-*'):
        shutil.rmtree(step)
    for script in ('sample.py', 'convert.py'):
        flags = [f'--dest={tmp_path / "hf"}'] if script == 'convert.py' else []
        ended = run_main(script, f'--init_from={tmp_path / "run"}', *flags)
        assert ended.returncode == 2 and 'contains no checkpoint yet' in ended.stderr


def test_on_a_full_disk_nothing_is_left_behind(train_here, tmp_path, run_main):
    train_here(tmp_path / 'run', '--max_iters=1', '--eval_iters=1', '--mlp=gelu_erf')
    writers = ('hf', 'new'), ('nanogpt', 'new'), ('gguf', 'new.gguf')
    for (to, dest), size in product(writers, (600, 50_000)):
        path = tmp_path / 'models' / dest
        with full_disk(size):
            ended = run_main(
                'convert.py', f'--out_dir={tmp_path / "run"}', f'--to={to}', f'--dest={path}'
            )
        assert ended.returncode == 2 and ended.stderr.count('\n') == 1, ended.stderr
        assert str(path) in ended.stderr and 'choose another path' in ended.stderr
        assert not list(path.parent.iterdir())


@pytest.mark.parametrize('dest', ['step-00000001/hf', 'step-00000002', 'a/../best', 'latest/hf'])
def test_nothing_is_written_where_a_run_keeps_its_checkpoints(train_here, tmp_path, run_main, dest):
    """The run would delete it together with an old checkpoint, or could not save the next one."""
    train_here(tmp_path / 'run', '--max_iters=1', '--eval_iters=1')
    for name in ('best', 'latest'):  # before the first checkpoint
        (tmp_path / 'run' / name).unlink()
    before = sorted((tmp_path / 'run').rglob('*'))
    convert = ['convert.py', f'--out_dir={tmp_path / "run"}', '--which=1']
    ended = run_main(*convert, f'--dest={tmp_path / "run" / dest}')
    assert ended.returncode == 2 and 'where a run keeps its checkpoints' in ended.stderr
    assert sorted((tmp_path / 'run').rglob('*')) == before
    ended = run_main(*convert, f'--dest={tmp_path / "run/hf"}')
    assert ended.returncode == 0, ended.stderr


def test_a_file_that_is_not_text_is_not_a_tokenizer(folder):
    with pytest.raises(UserError, match='not a valid tokenizer.json'):
        borrow.read_tokenizer(str(folder / 'whole/model.safetensors'))


def test_a_run_says_at_its_start_that_it_cannot_be_written(train_here, tmp_path, run_main):
    flags = ['--max_iters=1', '--eval_iters=1']
    ended = train_here(tmp_path / 'run', *flags, '--logit_cap=5')
    assert 'cannot write this model for transformers: logit_cap is 5.0' in ended.stdout
    ended = run_main('convert.py', f'--out_dir={tmp_path / "run"}', f'--dest={tmp_path / "hf"}')
    assert ended.returncode == 2 and 'logit_cap' in ended.stderr
    assert not (tmp_path / 'hf').exists()


def test_eval_only_prints_the_perplexity_of_every_kind_of_weights(train_here, tmp_path, run_main):
    run = tmp_path / 'run'
    ended = train_here(run, '--max_iters=2', '--eval_iters=1', '--bias', '--mlp=gelu_erf')
    assert 'cannot write' not in ended.stdout and 'perplexity' not in ended.stdout
    for kind in ('hf', 'nanogpt'):
        to = [f'--to={kind}', f'--dest={tmp_path / kind}']
        assert run_main('convert.py', f'--out_dir={run}', *to).returncode == 0
    pattern = r'val loss ([\d.]+) nats per token \(([\d.]+) bits per byte\), perplexity ([\d.]+) on'
    losses = []
    for out_dir, start in (
        (run, 'resume'),
        ('new', run),
        ('new', tmp_path / 'hf'),
        ('new', tmp_path / 'nanogpt'),
        ('new', tmp_path / 'nanogpt/ckpt.pt'),
    ):
        ended = train_here(out_dir, '--eval_only', f'--init_from={start}')
        assert ended.returncode == 0, ended.stderr
        assert 'eval_only False' not in ended.stdout  # no change of the run
        loss, bits, perplexity = map(float, re.search(pattern, ended.stdout).groups())
        losses.append(loss)
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
        assert bits == pytest.approx(loss / math.log(2), rel=1e-3)  # a character is a byte
    assert losses == pytest.approx(losses[:1] * len(losses), abs=2e-4)


def test_eval_only_takes_another_dataset_and_says_so_if_there_is_none(
    train_here, data_dir, tmp_path
):
    run, text = tmp_path / 'run', 'The dog. A bird sees the cat and it sleeps.\n' * 50
    train_here(run, '--max_iters=2', '--eval_iters=1')
    characters = read_weights(str(run), print).known_tokenizer()
    write_dataset(
        tmp_path / 'other',
        lambda start: [('train', text, False), ('val', text, False)],
        characters,
        {},
    )
    flags = ['--eval_only', f'--init_from={run}']
    ended = train_here('new', *flags, f'--data_dir={tmp_path}', '--dataset=other')
    assert 'dataset other' in ended.stdout and 'perplexity' in ended.stdout, ended.stderr
    ended = train_here('new', *flags, '--dataset=openwebtext')
    assert ended.returncode == 2
    assert ended.stderr.endswith('or name another dataset, --dataset=NAME (prepared: tiny)\n')


def test_a_step_that_a_run_does_not_have_is_no_hub_id(train_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_here('run', '--max_iters=2', '--eval_iters=1')
    with pytest.raises(UserError, match='did you mean run?'):
        read_weights('run/step-00000001')
