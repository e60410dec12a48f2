"""Tokenizers in Hugging Face's format: tokenizer.json, or GPT-2's vocab.json and merges.txt."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from nib.errors import UserError, optional
from nib.hub.files import Repository
from nib.text.gpt2 import Gpt2Tokenizer, load_gpt2, vocabulary_paths
from nib.text.hf_tokenizer import HfTokenizer, byte_names, split_pattern
from nib.text.tokenizer import END_OF_TEXT, ByteTokenizer, CharTokenizer, Tokenizer

# digest() of GPT-2's vocabulary.
GPT2_DIGEST = '71cca498f566a6fce90612118ffe70ec265ffdc746e7e6743a2253d346af4d30'

# How Qwen's tokenizers split a text into words.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def read_tokenizer(repository: Repository, vocab_size: int) -> dict | None:
    """Returns the tokenizer of a model as a checkpoint stores it; None if it is not known.

    GPT-2's is known by its vocabulary, or by its size if the repository has no tokenizer. One that
    write_tokenizer() has written is itself again. Any other is its tokenizer.json. vocab_size: of
    the model; 0: not known.
    Raises UserError if the tokenizer is not usable or does not fit the model.
    """
    path, vocabulary = repository.find('tokenizer.json'), None
    if repository.find('vocab.json'):
        vocabulary = repository.read_json('vocab.json')
    elif path:
        vocabulary = _read_vocabulary(repository.read_json('tokenizer.json'))
    elif vocab_size == Gpt2Tokenizer.vocab_size:
        return {'kind': 'gpt2'}
    found: Gpt2Tokenizer | ByteTokenizer | CharTokenizer | HfTokenizer
    if vocabulary and digest(vocabulary) == GPT2_DIGEST:
        found = Gpt2Tokenizer()
    elif path is None:
        return None
    else:
        found = _recognize(repository.read_json('tokenizer.json')) or read_file(path, repository)
        if 0 < vocab_size < found.vocab_size:
            raise UserError(
                f'{path} belongs to another model: it has {found.vocab_size:,} tokens, but this '
                f'model has embeddings for {vocab_size:,}'
            )
    config = repository.read_json('tokenizer_config.json')
    spells_end_of_text = config.get('split_special_tokens') is True
    return replace(found, spells_end_of_text=spells_end_of_text).to_json()


def read_file(path: Path, repository: Repository) -> HfTokenizer:
    """Returns the tokenizer of a tokenizer.json. Raises UserError, which names the file.

    repository: its other files say which token ends a text.
    """
    end_of_text = _end_of_text(repository)
    try:
        return HfTokenizer.read(path.read_bytes().decode(), end_of_text)
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: not a valid tokenizer.json (it is not text)') from error
    except (OSError, ValueError, UserError) as error:
        raise UserError(f'{path}: {error}') from error


def _recognize(described: dict) -> CharTokenizer | ByteTokenizer | None:
    """Returns the tokenizer of characters or bytes that a tokenizer.json describes, or None."""
    own: CharTokenizer | ByteTokenizer
    match described.get('model'):
        case {'type': 'WordLevel', 'vocab': dict(vocabulary)}:
            characters = ''.join(sorted(token for token in vocabulary if len(token) == 1))
            own = CharTokenizer(characters, has_end_of_text=bool(described.get('added_tokens')))
        case {'type': 'BPE', 'merges': []}:
            own = ByteTokenizer()
        case _:
            return None
    expected = json.loads(describe(own))
    parts = 'model', 'normalizer', 'pre_tokenizer', 'decoder', 'added_tokens'
    after = described.get('post_processor')  # transformers saves one that adds nothing
    is_own = all(described.get(part) == expected[part] for part in parts)
    return own if is_own and (after is None or after.get('special_tokens') == {}) else None


def _end_of_text(repository: Repository) -> str | int | None:
    """Returns the end-of-text token, or its id, by the files that may name it."""
    for file in ('tokenizer_config.json', 'generation_config.json', 'config.json'):
        config = repository.read_json(file)
        match config.get('eos_token', config.get('eos_token_id')):
            case bool():
                continue
            case str() | int() as found:
                return found
            case {'content': str(found)} | [int(found), *_]:
                return found
    return None


def _read_vocabulary(described: dict) -> dict | None:
    """Returns the vocabulary of a tokenizer.json with its added tokens; None if it has none."""
    match described:
        case {'model': {'vocab': dict(vocabulary)}, 'added_tokens': list(added)}:
            for token in added:
                match token:
                    case {'content': str(content), 'id': number}:
                        vocabulary[content] = number
            return vocabulary
    return None


def digest(vocabulary: dict) -> str:
    """Returns the SHA-256 of a vocabulary, token -> id."""
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()


def write_tokenizer(folder: Path, tokenizer: Tokenizer, block_size: int):
    """Writes tokenizer.json and tokenizer_config.json, which AutoTokenizer loads."""
    if isinstance(tokenizer, HfTokenizer):
        content = tokenizer.content
        begin, end = tokenizer.first_ids, tokenizer.end_of_text
        names = {'bos_token': begin[:1], 'eos_token': [] if end is None else [end]}
        tokens = {name: tokenizer.token(ids[0]) for name, ids in names.items() if ids}
    else:
        content = describe(tokenizer)
        has_end = tokenizer.end_of_text is not None
        tokens = dict.fromkeys(('bos_token', 'eos_token'), END_OF_TEXT) if has_end else {}
    (folder / 'tokenizer.json').write_bytes(content.encode())
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'model_max_length': block_size,
        'model_input_names': ['input_ids', 'attention_mask'],  # transformers 4 would give others
        'clean_up_tokenization_spaces': False,  # the text out is the text in
        'split_special_tokens': tokenizer.spells_end_of_text,
    }
    content = json.dumps(config | tokens, indent=2) + '\n'
    (folder / 'tokenizer_config.json').write_text(content)


def is_qwen2(tokenizer: Tokenizer) -> bool:
    """Returns whether transformers' Qwen2Tokenizer encodes a text in the same way.

    AutoTokenizer loads this class for every Qwen2 model, whatever tokenizer_config.json says. It
    takes the tokens and merges from tokenizer.json, but neither the splits nor the normalizer.
    """
    if not isinstance(tokenizer, HfTokenizer):
        return False
    described = json.loads(tokenizer.content)
    model = described['model']
    is_plain = not any(map(model.get, set(model) - {'type', 'vocab', 'merges'}))
    match described:
        case {
            'model': {'type': 'BPE'},
            'normalizer': {'type': 'NFC'},
            'pre_tokenizer': dict(first),
            'decoder': {'type': 'ByteLevel'},
            'added_tokens': list(added),
        }:
            has_end = any(token['content'] == END_OF_TEXT for token in added)  # else it adds one
            return split_pattern(first) == QWEN_WORDS and has_end and is_plain
    return False


def describe(tokenizer: Tokenizer) -> str:
    """Returns a tokenizer.json for one of our own tokenizers."""
    described = _without_end_of_text(tokenizer)
    if tokenizer.end_of_text is not None:
        from tokenizers import AddedToken

        described.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    assert described.get_vocab_size() == tokenizer.vocab_size
    return described.to_str(pretty=True)


def _without_end_of_text(tokenizer: Tokenizer):
    """Returns a tokenizer of the tokenizers library without its end-of-text token."""
    with optional('tokenizers', 'writing a tokenizer'):
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    if isinstance(tokenizer, CharTokenizer):
        try:
            tokenizer.characters.encode()
        except UnicodeEncodeError as error:  # a surrogate
            unknown = error.object[error.start]
            raise UserError(
                f'the tokenizer of this model cannot be written for transformers: it has '
                f'{unknown!r}, which is not a character'
            ) from error
        vocabulary = {character: i for i, character in enumerate(tokenizer.characters)}
        described = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
        described.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        described.decoder = decoders.Fuse()
        return described
    if isinstance(tokenizer, ByteTokenizer):
        described = Tokenizer(models.BPE(byte_names(), []))
    elif isinstance(tokenizer, Gpt2Tokenizer):
        described = Tokenizer(models.BPE(*_read_gpt2()))
    else:
        raise UserError(
            f'the tokenizer of this model cannot be written for transformers: it is of the kind '
            f'{tokenizer.to_json()["kind"]}'
        )
    splits = isinstance(tokenizer, Gpt2Tokenizer)
    described.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits)
    described.decoder = decoders.ByteLevel()
    return described


def _read_gpt2() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns GPT-2's vocabulary, without its end-of-text token, and its merges."""
    load_gpt2()  # downloads the files if they are missing
    paths = vocabulary_paths()
    merges = paths['vocab.bpe'].read_text(encoding='utf-8')
    lines = [line.split(' ') for line in merges.splitlines()[1:] if line]
    tokens = json.loads(paths['encoder.json'].read_bytes())
    del tokens[END_OF_TEXT]
    return tokens, [(first, second) for first, second in lines]
