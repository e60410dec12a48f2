"""Tokenizers in Hugging Face's format: tokenizer.json, or GPT-2's vocab.json and merges.txt."""

import hashlib
import json
import os
from pathlib import Path

from nib.errors import UserError
from nib.hub.files import Repository
from nib.text.tokenizer import (
    END_OF_TEXT,
    GPT2_FILES,
    GPT2_URL,
    ByteTokenizer,
    CharTokenizer,
    Gpt2Tokenizer,
    Tokenizer,
    load_gpt2,
)

# digest() of GPT-2's vocabulary.
GPT2_DIGEST = '71cca498f566a6fce90612118ffe70ec265ffdc746e7e6743a2253d346af4d30'


def read_tokenizer(repository: Repository, vocab_size: int) -> dict | None:
    """Returns the tokenizer of a model as a checkpoint stores it; None if it is not known.

    Known is GPT-2's: by its vocabulary, or by its size if the repository has no tokenizer.
    """
    vocabulary = None
    if repository.find('vocab.json'):
        vocabulary = repository.read_json('vocab.json')
    elif repository.find('tokenizer.json'):
        vocabulary = _read_vocabulary(repository.read_json('tokenizer.json'))
    elif vocab_size == Gpt2Tokenizer.vocab_size:
        return {'kind': 'gpt2'}
    return {'kind': 'gpt2'} if vocabulary and digest(vocabulary) == GPT2_DIGEST else None


def _read_vocabulary(described: dict) -> dict | None:
    """Returns the vocabulary of a tokenizer.json with its added tokens; None if it has none."""
    match described:
        case {'model': {'vocab': dict(vocabulary)}, 'added_tokens': list(added)}:
            return vocabulary | {token['content']: token['id'] for token in added}
    return None


def digest(vocabulary: dict) -> str:
    """Returns the SHA-256 of a vocabulary, token -> id."""
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()


def write_tokenizer(folder: Path, tokenizer: Tokenizer, block_size: int):
    """Writes tokenizer.json and tokenizer_config.json, which AutoTokenizer loads."""
    from tokenizers import AddedToken

    described = _describe(tokenizer)
    if tokenizer.end_of_text is not None:
        described.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    assert described.get_vocab_size() == tokenizer.vocab_size
    described.save(str(folder / 'tokenizer.json'))
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'model_max_length': block_size,
        'clean_up_tokenization_spaces': False,  # the text out is the text in
    }
    if tokenizer.end_of_text is not None:
        config |= {'bos_token': END_OF_TEXT, 'eos_token': END_OF_TEXT}
    (folder / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n')


def _describe(tokenizer: Tokenizer):
    """Returns a tokenizer of the tokenizers library without its end-of-text token."""
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    except ImportError as error:
        raise UserError(
            'writing a tokenizer needs a package that is not installed: pip install tokenizers'
        ) from error
    if isinstance(tokenizer, CharTokenizer):
        vocabulary = {character: i for i, character in enumerate(tokenizer.characters)}
        described = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
        described.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        described.decoder = decoders.Fuse()
        return described
    if isinstance(tokenizer, ByteTokenizer):
        names = _byte_names()
        described = Tokenizer(models.BPE({names[byte]: byte for byte in range(256)}, []))
    elif isinstance(tokenizer, Gpt2Tokenizer):
        described = Tokenizer(models.BPE(*_read_gpt2()))
    else:
        raise UserError(f'the tokenizer {tokenizer.to_json()["kind"]!r} cannot be written yet')
    splits = isinstance(tokenizer, Gpt2Tokenizer)
    described.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits)
    described.decoder = decoders.ByteLevel()
    return described


def _byte_names() -> list[str]:
    """Returns the printable character that stands for each byte in GPT-2's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    names = {byte: byte for byte in printable} | {b: 256 + n for n, b in enumerate(others)}
    return [chr(names[byte]) for byte in range(256)]


def _read_gpt2() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns GPT-2's vocabulary, without its end-of-text token, and its merges."""
    load_gpt2()  # downloads the files if they are missing
    folder = Path(os.environ['TIKTOKEN_CACHE_DIR'])
    merges, vocabulary = (
        (folder / hashlib.sha1((GPT2_URL + file).encode()).hexdigest()).read_text(encoding='utf-8')
        for file in GPT2_FILES
    )
    lines = [line.split(' ') for line in merges.splitlines()[1:] if line]
    tokens = json.loads(vocabulary)
    del tokens[END_OF_TEXT]
    return tokens, [(first, second) for first, second in lines]
