"""Open models: logits and text equal transformers', for every key of their config.json."""

import inspect
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_tokenizers import qwen
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from model import GPT, GPTConfig
from nib.errors import UserError
from nib.hub import family, gpt2, huggingface, llama, nanogpt
from nib.hub.family import HARMLESS, REQUIRED
from nib.text.hf_tokenizer import HfTokenizer
from nib.text.tokenizer import CharTokenizer
from stress.foreign_models import GPT2, LLAMA, LLAMA3
from stress.foreign_models import VOCAB_SIZE as V

CLASSES = {
    'gpt2': (GPT2Config, GPT2LMHeadModel),
    'llama': (LlamaConfig, LlamaForCausalLM),
    'qwen2': (Qwen2Config, Qwen2ForCausalLM),
    'qwen3': (Qwen3Config, Qwen3ForCausalLM),
}
MODELS = {
    'gpt2': ('gpt2', {}),
    'gpt2 untied': ('gpt2', dict(tie_word_embeddings=False)),
    'gpt2 gelu': ('gpt2', dict(activation_function='gelu')),
    'gpt2 relu': ('gpt2', dict(activation_function='relu')),
    'gpt2 tanh': ('gpt2', dict(activation_function='gelu_pytorch_tanh')),
    'gpt2 wide': ('gpt2', dict(n_inner=41)),
    'gpt2 eps': ('gpt2', dict(layer_norm_epsilon=0.1)),
    'gpt2 unscaled': ('gpt2', dict(scale_attn_weights=False)),
    'gpt2 scaled': ('gpt2', dict(scale_attn_by_inverse_layer_idx=True)),
    'gpt2 upcast': (
        'gpt2',
        dict(reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True),
    ),
    'llama': ('llama', {}),
    'llama tied': ('llama', dict(tie_word_embeddings=True)),
    'llama one head': ('llama', dict(num_key_value_heads=6, rms_norm_eps=0.05)),
    'llama biases': ('llama', dict(attention_bias=True, mlp_bias=True)),
    'llama attention_bias': ('llama', dict(attention_bias=True)),
    'llama mlp_bias': ('llama', dict(mlp_bias=True)),
    'llama head_dim': ('llama', dict(head_dim=10)),
    'llama theta': ('llama', dict(rope_parameters={'rope_type': 'default', 'rope_theta': 77.0})),
    'llama 3': ('llama', dict(rope_parameters=LLAMA3, head_dim=16)),
    'qwen2': ('qwen2', {}),
    'qwen2 tied': ('qwen2', dict(tie_word_embeddings=True)),
    'qwen2 no window': ('qwen2', dict(use_sliding_window=False, sliding_window=5)),
    'qwen3': ('qwen3', dict(head_dim=6)),
    'qwen3 head_dim': ('qwen3', dict(head_dim=16, tie_word_embeddings=True)),
    'qwen3 attention_bias': ('qwen3', dict(head_dim=8, attention_bias=True)),
}


def make(kind, **changes):
    """A random model of transformers whose parameters all matter."""
    config_class, model_class = CLASSES[kind]
    shape = GPT2 if kind == 'gpt2' else LLAMA
    torch.manual_seed(0)
    model = model_class(config_class(**{**shape, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def read(folder):
    config, tensors, _ = huggingface.read(str(folder))
    model = GPT(config).eval()
    model.load_state_dict(tensors)
    return model


@pytest.fixture
def saved(tmp_path, request):
    kind, changes = request.param
    theirs = make(kind, **changes)
    theirs.save_pretrained(tmp_path / 'model')
    return tmp_path / 'model', theirs


def assert_same_logits(ours, theirs, ids):
    with torch.no_grad():
        expected = theirs(ids).logits
        difference = (ours(ids) - expected).abs().max() / expected.abs().max()
    assert expected.std() > 0.05 and difference < 1e-5, difference


def reference_text(theirs, prompt, n_tokens, size):
    """Greedy text from whole passes of transformers' model, in nibGPT's window."""
    text, context = [], list(prompt)
    with torch.no_grad():
        for _ in range(n_tokens):
            token = int(theirs(torch.tensor([context])).logits[0, -1].argmax())
            text.append(token)
            context = (context[-(size // 2) :] if len(context) == size else context) + [token]
    return text


@pytest.mark.parametrize('saved', MODELS.values(), ids=MODELS, indirect=True)
def test_logits_and_greedy_text_equal_transformers(saved):
    """The text goes on past a full context, with the caches."""
    folder, theirs = saved
    ours = read(folder)
    assert_same_logits(ours, theirs, torch.randint(V, (2, 19)))
    prompt = [3, 1, 4, 1, 5]
    text = [int(tokens) for tokens in ours.generate([prompt], 20, temperature=0)]
    assert text == reference_text(theirs, prompt, 20, 19)
    own = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=14, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    assert text[:14] == own[0, 5:].tolist()


@pytest.mark.parametrize(
    'config, parameters',
    [
        (  # HuggingFaceTB/SmolLM2-135M
            dict(vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, mlp_width=1536),
            134_515_008,
        ),
        (  # Qwen/Qwen3-0.6B
            dict(
                vocab_size=151936,
                n_layer=28,
                n_head=16,
                n_kv_head=8,
                head_dim=128,
                n_embd=1024,
                mlp_width=3072,
                qk_norm=True,
            ),
            596_049_920,
        ),
        (  # meta-llama/Llama-3.2-1B
            dict(
                vocab_size=128256, n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, mlp_width=8192
            ),
            1_235_814_400,
        ),
        (  # Qwen/Qwen2.5-0.5B
            dict(
                vocab_size=151936,
                n_layer=24,
                n_head=14,
                n_kv_head=2,
                n_embd=896,
                mlp_width=4864,
                qkv_bias=True,
            ),
            494_032_768,
        ),
    ],
)
def test_open_models_have_the_published_numbers_of_parameters(config, parameters):
    modern = dict(position='rotary', norm='rms', mlp='swiglu', bias=False, block_size=64)
    with torch.device('meta'):
        model = GPT(GPTConfig(**config, **modern))
    assert model.num_params() == parameters
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2)
    width = model.config.n_head * model.config.head_width
    # PaLM, appendix B: 2N + 4LHQT for a forward pass
    flops = 2 * matrices + 4 * model.config.n_layer * width * 64
    assert sum(model.flops_per_token().values()) == flops


@pytest.mark.parametrize('kind', CLASSES)
def test_every_key_of_transformers_is_honored_rejected_or_harmless(kind):
    """A new key of transformers must be put into one of the tables."""
    family = gpt2.GPT2 if kind == 'gpt2' else llama.FAMILIES[kind]
    special = [*(gpt2.SPECIAL if kind == 'gpt2' else llama.ROTARY)]
    special += [*llama.WINDOW] * (kind in ('qwen2', 'qwen3'))
    special += ['attention_bias', 'mlp_bias'] * (kind in ('llama', 'qwen3'))
    config = CLASSES[kind][0]().to_dict()
    unknown = [
        key
        for key in config
        if key not in (*family.keys, *family.fixed, *special) and not HARMLESS.fullmatch(key)
    ]
    assert unknown == []
    for key, (_, default) in family.keys.items():  # if config.json lacks the key
        if default is not REQUIRED:
            theirs = inspect.signature(CLASSES[kind][0]).parameters
            value = theirs[key].default if key in theirs else config.get(key)
            assert default == (value or 0), key


def change(folder, **changes):
    config = json.loads((folder / 'config.json').read_text()) | changes
    (folder / 'config.json').write_text(json.dumps(config))


REFUSED = {
    'gpt2': [
        dict(activation_function='silu'),
        dict(add_cross_attention=True),
        dict(is_encoder_decoder=True),
        dict(quantization_config={'bits': 4}),
        dict(scale_attn_weights=[False]),
        dict(activation_function=['gelu_new']),
        dict(layer_norm_epsilon=0.0),
        dict(n_inner=0),
        dict(pruned_heads={'0': [1]}),
        dict(alibi=True),
        dict(n_layer='3'),
        dict(n_head=5),
        dict(n_layer=4),
        dict(n_embd=32),
        dict(vocab_size=70),
        dict(hidden_size=32),
        dict(model_type='gpt_neo'),
        dict(architectures=['GPT2ForSequenceClassification']),
        dict(auto_map={'AutoModel': 'mine.Model'}),
    ],
    'llama': [
        dict(hidden_act='gelu'),
        dict(rope_parameters={'rope_type': 'yarn', 'factor': 4.0, 'rope_theta': 1e4}),
        dict(rope_parameters={'rope_type': 'dynamic', 'factor': 4.0, 'rope_theta': 1e4}),
        dict(rope_parameters={'rope_type': 'default', 'surprise': 4.0}),
        dict(rope_parameters={'rope_type': ['llama3']}),
        dict(rope_parameters=LLAMA3 | {'high_freq_factor': 0.5}),
        dict(rope_parameters=LLAMA3 | {'factor': None}),
        dict(rope_parameters={'rope_theta': False}),
        dict(rope_theta='1e4', rope_parameters=None),
        dict(rope_theta=math.inf, rope_parameters=None),
        dict(rope_theta=10**400, rope_parameters=None),
        dict(architectures='LlamaForCausalLM'),
        dict(partial_rotary_factor=0.5),
        dict(rope_scaling={'type': 'linear', 'factor': 2.0}),
        dict(sliding_window=8),
        dict(num_key_value_heads=4),
        dict(num_key_value_heads=3),
        dict(hidden_size=None),
        dict(intermediate_size=56),
        dict(head_dim=7),
        dict(tie_word_embeddings=True),
        dict(rms_norm_eps='small'),
        dict(logit_scale=2.0),
    ],
    'qwen2': [
        dict(layer_types=['full_attention', 'sliding_attention', 'full_attention']),
        dict(use_sliding_window=True, sliding_window=8, max_window_layers=1, layer_types=None),
        dict(max_window_layers='28'),
        dict(num_hidden_layers='3'),
        dict(layer_types=7),
        dict(layer_types=[['full_attention']]),
    ],
    'qwen3': [dict(attention_bias=True), dict(mlp_bias=True)],
}


@pytest.mark.parametrize('kind', REFUSED)
def test_a_config_that_changes_the_model_is_refused_by_name(kind, tmp_path):
    make(kind, **{'head_dim': 6} if kind != 'gpt2' else {}).save_pretrained(tmp_path / 'model')
    original = (tmp_path / 'model/config.json').read_text()
    for changes in REFUSED[kind]:
        (tmp_path / 'model/config.json').write_text(original)
        change(tmp_path / 'model', **changes)
        with pytest.raises(UserError) as caught:
            read(tmp_path / 'model')
        key, said = next(iter(changes)), str(caught.value)
        named = key in said or 'the tensor' in said
        assert named or key == 'head_dim' and 'head_dim' in said, (changes, said)


@pytest.mark.parametrize('kind', REFUSED)
def test_a_quantized_model_is_refused_with_the_remedy(kind, tmp_path):
    make(kind).save_pretrained(tmp_path / 'model')
    change(tmp_path / 'model', quantization_config={'bits': 4})
    with pytest.raises(UserError, match='quantization_config.* use a version .* in bfloat16'):
        read(tmp_path / 'model')


def test_keys_of_before_transformers_5_mean_the_same(tmp_path):
    theirs = make('llama', rope_parameters=LLAMA3)
    theirs.save_pretrained(tmp_path)
    old = {key: value for key, value in LLAMA3.items() if key != 'rope_theta'}
    change(tmp_path, rope_parameters=None, rope_scaling=old, rope_theta=50.0, torch_dtype='float32')
    assert_same_logits(read(tmp_path), theirs, torch.randint(V, (2, 19)))


def test_a_window_of_no_layer_is_no_window(tmp_path):
    theirs = make('qwen2')
    theirs.save_pretrained(tmp_path)
    n_layer, window = theirs.config.num_hidden_layers, {'sliding_window': 2, 'layer_types': None}
    change(tmp_path, use_sliding_window=True, max_window_layers=n_layer, **window)
    assert_same_logits(read(tmp_path), theirs, torch.randint(V, (2, 19)))


def test_null_in_rope_parameters_is_ignored(tmp_path):
    theirs = make('llama', rope_parameters=LLAMA3)
    theirs.save_pretrained(tmp_path)
    change(tmp_path, rope_parameters=LLAMA3 | {'attention_factor': None, 'rope_type': 'llama3'})
    assert_same_logits(read(tmp_path), theirs, torch.randint(V, (2, 19)))


def test_a_context_whose_rotary_angles_exceed_the_memory_is_refused(tmp_path, monkeypatch):
    make('llama', head_dim=8).save_pretrained(tmp_path)
    monkeypatch.setattr(family, 'total_memory', lambda: 16 * 8 * 19)
    assert read(tmp_path).config.block_size == 19
    change(tmp_path, max_position_embeddings=20)
    with pytest.raises(UserError, match='max_position_embeddings is 20, whose rotary angles'):
        read(tmp_path)


def test_bfloat16_in_shards_and_a_model_without_its_head(tmp_path):
    theirs = make('qwen3', head_dim=6, tie_word_embeddings=True).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / 'shards', max_shard_size='20KB')
    assert len(list((tmp_path / 'shards').glob('*.safetensors'))) > 2
    theirs.model.save_pretrained(tmp_path / 'base')
    exact = Qwen3ForCausalLM.from_pretrained(tmp_path / 'shards', dtype=torch.float32).eval()
    for folder in ('shards', 'base'):
        assert_same_logits(read(tmp_path / folder), exact, torch.randint(V, (2, 19)))


@pytest.mark.parametrize('kind', ['llama', 'qwen3'])
def test_biases_of_the_output_projections_are_left_out_only_if_all_are_zero(kind, tmp_path):
    theirs = make(kind, head_dim=8, attention_bias=True)
    biases = [layer.self_attn.o_proj.bias for layer in theirs.model.layers]
    with torch.no_grad():
        for bias in biases:
            bias.zero_()
    theirs.save_pretrained(tmp_path / 'zero')
    ours = read(tmp_path / 'zero')
    assert ours.config.qkv_bias and not ours.config.bias
    assert_same_logits(ours, theirs, torch.randint(V, (2, 19)))

    with torch.no_grad():
        biases[1][0] = 3
    theirs.save_pretrained(tmp_path / 'one')
    ours = read(tmp_path / 'one')
    assert ours.config.bias
    assert_same_logits(ours, theirs, torch.randint(V, (2, 19)))

    tensors = load_file(tmp_path / 'zero/model.safetensors')
    del tensors['model.layers.1.self_attn.o_proj.bias']
    save_file(tensors, tmp_path / 'zero/model.safetensors')
    with pytest.raises(UserError, match='layers.1.self_attn.o_proj.bias is missing'):
        read(tmp_path / 'zero')


def test_gpt2_files_with_masks_and_without_the_prefix(tmp_path):
    """As OpenAI's GPT-2 is published."""
    theirs = make('gpt2')
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / 'model.safetensors')
    tensors = {name.removeprefix('transformer.'): tensor for name, tensor in tensors.items()}
    tensors |= {f'h.{i}.attn.bias': torch.ones(1, 1, 19, 19).tril() for i in range(3)}
    save_file(tensors, tmp_path / 'model.safetensors')
    assert_same_logits(read(tmp_path), theirs, torch.randint(V, (2, 19)))


# -- out -------------------------------------------------------------------------------------------

SMALL = GPTConfig(vocab_size=V, block_size=19, n_layer=3, n_head=4, n_embd=32, bias=False)
MODERN = replace(SMALL, position='rotary', norm='rms', mlp='swiglu', n_kv_head=2)
WRITTEN = {
    'GPT2LMHeadModel': [
        SMALL,
        replace(SMALL, bias=True, mlp='gelu_erf', tied_head=False),
        replace(SMALL, qkv_bias=True, mlp='relu', mlp_width=40, norm_eps=1e-3),
    ],
    'LlamaForCausalLM': [
        MODERN,
        replace(MODERN, bias=True, tied_head=False, head_dim=12, n_kv_head=0),
        replace(MODERN, rotary_base=50.0, rotary_scaling=(4.0, 1.0, 3.0, 12.0), mlp_width=30),
        replace(MODERN, qkv_bias=True),
    ],
    'Qwen2ForCausalLM': [
        replace(MODERN, qkv_bias=True),
        replace(MODERN, qkv_bias=True, head_dim=12, tied_head=False),
    ],
    'Qwen3ForCausalLM': [
        replace(MODERN, qk_norm=True),
        replace(MODERN, qk_norm=True, qkv_bias=True, head_dim=12, tied_head=False),
    ],
}


@pytest.mark.parametrize(
    'architecture, config', [(name, config) for name in WRITTEN for config in WRITTEN[name]]
)
def test_what_is_written_is_loaded_by_transformers_and_read_again(architecture, config, tmp_path):
    tokenizer = CharTokenizer(''.join(map(chr, range(40, 40 + V))))
    if architecture == 'Qwen2ForCausalLM':
        tokenizer = HfTokenizer.read(qwen().to_str())
        config = replace(config, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(1)
    ours = GPT(config).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    huggingface.write(tmp_path / 'out', config, ours.state_dict(), tokenizer, 'A card.')
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
    assert type(theirs).__name__ == architecture
    if config.position == 'rotary':  # what transformers read before version 5
        written = json.loads((tmp_path / 'out/config.json').read_text())
        assert written['rope_theta'] == config.rotary_base
    ids = torch.randint(V, (2, 19))
    assert_same_logits(ours, theirs, ids)
    text = [int(tokens) for tokens in ours.generate([[1, 2, 3]], 16, temperature=0)]
    prompt = torch.tensor([[1, 2, 3]])
    made = theirs.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=-1)
    assert text == made[0, 3:].tolist()
    again = read(tmp_path / 'out')
    assert_same_logits(again, theirs, ids)
    if architecture != 'GPT2LMHeadModel':  # which has all biases
        assert (again.config.bias, again.config.qkv_bias) == (config.bias, config.qkv_bias)


@pytest.mark.parametrize(
    'changes',
    [
        dict(logit_cap=5.0),
        dict(mlp='relu2', position='rotary', norm='rms'),
        dict(norm='rms'),
        dict(n_kv_head=2),
        dict(head_dim=12),
        dict(qk_norm=True),
        dict(norm='layer', position='rotary'),
        dict(bias=True, qk_norm=True, position='rotary', norm='rms', mlp='swiglu'),
    ],
)
def test_what_no_architecture_expresses_is_refused_by_its_key(changes):
    reason = huggingface.why_not(replace(SMALL, **changes))
    assert reason and next(iter(changes)) in reason


def test_other_users_may_read_what_is_written(tmp_path):
    tokenizer = CharTokenizer(''.join(map(chr, range(40, 40 + V))))
    huggingface.write(tmp_path / 'out', SMALL, GPT(SMALL).state_dict(), tokenizer, 'A card.')
    (tmp_path / 'plain').write_text('')
    usual = (tmp_path / 'plain').stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / 'out').iterdir()} == {usual}


def test_a_refusal_names_all_keys_to_change():
    planned = replace(SMALL, position='rotary', mlp='swiglu', qk_norm=True, smear=1)
    assert planned.norm == 'layer'
    reason = huggingface.why_not(planned)
    assert 'norm is layer' in reason and 'smear is 1' in reason
    assert huggingface.why_not(replace(planned, norm='rms', smear=0)) is None
    shared = replace(SMALL, n_kv_head=2, head_dim=12, logit_cap=5.0)
    reason = huggingface.why_not(shared)
    assert all(f'{key} is ' in reason for key in ('n_kv_head', 'head_dim', 'logit_cap'))
    reason = nanogpt.why_not(planned)
    assert all(f'{key} is ' in reason for key in ('position', 'mlp', 'qk_norm', 'smear'))
