"""Small tokenizers of the tokenizers library, built as those of open models are."""

import json

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = ['The cat sat on the mat, and the dog sat too.\nTwo  lines: it\'s "é" or 1234.'] * 5


def byte_level() -> Tokenizer:
    """Like GPT-2, Llama 3 and Qwen: bytes as printable characters, and a chat's special tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r' ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+'), 'isolated'
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=['<|end|>', '<|begin|>'],
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    # Letters that are also names of bytes, and a token of spaces as in CodeGen.
    made.add_tokens([AddedToken('née', normalized=False), AddedToken('    ', normalized=False)])
    made.post_processor = processors.TemplateProcessing(
        single='<|begin|> $A', special_tokens=[('<|begin|>', 1)]
    )
    return made


def byte_fallback() -> Tokenizer:
    """Like Llama 2 and TinyLlama: spaces as ▁, one more at the start, bytes of what is unknown."""
    made = Tokenizer(models.BPE(unk_token='<unk>'))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=100, special_tokens=['<unk>', '<s>', '</s>'], show_progress=False
    )
    # By words: without a pre-tokenizer, sentences would become tokens.
    made.pre_tokenizer = pre_tokenizers.Split('▁', 'merged_with_next')
    made.train_from_iterator(CORPUS, trainer)
    made.pre_tokenizer = None
    described = json.loads(made.to_str())
    model = described['model']
    for byte in range(256):
        model['vocab'][f'<0x{byte:02X}>'] = len(model['vocab'])
    model['byte_fallback'] = model['fuse_unk'] = True
    made = Tokenizer.from_str(json.dumps(described))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace('▁', ' '),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(' ', 1, 0),
        ]
    )
    made.post_processor = processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', 1)]
    )
    return made


def metaspace(scheme: str = 'first') -> Tokenizer:
    """Like newer files of Llama 2 and Mistral, whose pre-tokenizer writes the spaces as ▁.

    scheme: 'first' adds a space to the first piece of a text, 'always' also after special tokens;
    neither adds one in front of another.
    """
    described = json.loads(byte_fallback().to_str()) | {'normalizer': None}
    made = Tokenizer.from_str(json.dumps(described))
    made.pre_tokenizer = pre_tokenizers.Metaspace('▁', prepend_scheme=scheme, split=False)
    return made


def split_like(splits: str) -> Tokenizer:
    """A byte-level tokenizer that splits a text as a family of open models does."""
    made = Tokenizer(models.BPE())
    by_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    contractions = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    digits = {'llama': r'\p{N}{1,3}', 'qwen': r'\p{N}', 'ours': r'\p{N}{1,3}'}
    if splits == 'ours':
        contractions = "(?i:'(?:[dmst]|ll|re|ve))"
    if splits == 'gpt2':
        made.pre_tokenizer = by_gpt2
    elif splits == 'smollm':
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), by_gpt2])
    else:
        pattern = (
            contractions
            + r'|[^\r\n\p{L}\p{N}]?\p{L}+|'
            + digits[splits]
            + r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
        )
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), 'isolated'),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if splits == 'qwen':
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=['<|end|>'],
        show_progress=False,
    )
    # Merges of white space, signs and digits too, so that a wrong split shows.
    corpus = [
        *CORPUS,
        "  \n\n \t\t x\n  !!\n\n...'s 'll  11 222 3333 1a a1 é— —é中文。\n\xa0\xa0 \u3000",
    ]
    made.train_from_iterator(corpus * 3, trainer)
    made.add_tokens([AddedToken('née', normalized=True)])
    return made


def qwen() -> Tokenizer:
    """Like Qwen's: split_like('qwen') with the token that transformers' class for it needs."""
    made = split_like('qwen')
    made.add_special_tokens(['<|endoftext|>'])
    return made
