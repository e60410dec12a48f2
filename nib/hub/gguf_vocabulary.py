"""Tokenizers as GGUF stores them, which llama.cpp runs with its own code."""

import json
import re
from dataclasses import dataclass, field

from nib.errors import UserError
from nib.hub.tokenizer import QWEN_WORDS, describe
from nib.text.gpt2 import Gpt2Tokenizer
from nib.text.hf_tokenizer import HfTokenizer, byte_names
from nib.text.tokenizer import END_OF_TEXT, ByteTokenizer, CharTokenizer, Tokenizer

# How a tokenizer.json cuts text into words -> llama.cpp's name for it.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_WORDS = QWEN_WORDS.replace(r'\p{N}|', r'\p{N}{1,3}|')
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?i:'(?:[dmst]|ll|re|ve))"  # the same ones
WORDS = {
    (GPT2_WORDS,): 'gpt-2',
    (r'\p{N}', GPT2_WORDS): 'smollm',
    (QWEN_WORDS,): 'qwen2',
    (LLAMA_WORDS,): 'dbrx',
    # With ignore_merges: a word that is a token is not split.
    (LLAMA_WORDS, 'ignore_merges'): 'llama-bpe',
}


@dataclass
class Vocabulary:
    """A tokenizer as GGUF stores it.

    Tokens are byte-level, as in GPT-2 (model 'gpt2'), or as SentencePiece has them ('llama').
    """

    tokens: list[str]
    types: list[str]  # names of gguf.TokenType
    end: int | None  # the end-of-text token
    begin: int | None = None  # the token in front of every text
    model: str = 'gpt2'
    words: str = 'qwen2'  # irrelevant if no merge crosses a character
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    adds_space: bool = False

    def add_end(self):
        """Adds an end-of-text token: llama.cpp would take an ordinary token for it."""
        self.end = len(self.tokens)
        self.tokens.append(END_OF_TEXT)
        self.types.append('CONTROL')


def read_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Returns a tokenizer as GGUF stores it.

    Raises UserError, which names the part, if llama.cpp would cut text differently.
    """
    if isinstance(tokenizer, CharTokenizer):
        return _from_characters(tokenizer)
    if isinstance(tokenizer, HfTokenizer):
        return _from_json(tokenizer, json.loads(tokenizer.content))
    if isinstance(tokenizer, (ByteTokenizer, Gpt2Tokenizer)):
        return _from_json(tokenizer, json.loads(describe(tokenizer)))
    raise _rejected(f'it is of the kind {tokenizer.to_json()["kind"]}')


def _rejected(reason: str) -> UserError:
    return UserError(f'the tokenizer of this model cannot be written for llama.cpp: {reason}')


def _from_characters(tokenizer: CharTokenizer) -> Vocabulary:
    """Returns a byte-level BPE whose merges join the bytes of each character."""
    names = {byte: name for name, byte in byte_names().items()}
    try:
        tokens = [''.join(names[b] for b in c.encode()) for c in tokenizer.characters]
    except UnicodeEncodeError as error:  # a surrogate
        raise _rejected(f'it has {error.object!r}, which is not a character') from error
    cuts = [(token[:i], token[i]) for token in tokens for i in range(1, len(token))]
    vocabulary = Vocabulary(tokens, ['NORMAL'] * len(tokens), tokenizer.end_of_text)
    vocabulary.merges = list(dict.fromkeys(' '.join(cut) for cut in cuts))
    if tokenizer.has_end_of_text:
        vocabulary.add_end()
    return vocabulary


def _from_json(tokenizer: Tokenizer, described: dict) -> Vocabulary:
    """Returns the vocabulary of a tokenizer.json."""
    model = described['model']
    kind = model.get('type', 'BPE')
    if kind != 'BPE':
        raise _rejected(f'its model is {kind}, not BPE')
    for key in ('continuing_subword_prefix', 'end_of_word_suffix', 'dropout'):
        if model.get(key):
            raise _rejected(f'its {key} is {model[key]!r}')
    size = tokenizer.vocab_size
    tokens, types = [f'[unused {n}]' for n in range(size)], ['UNUSED'] * size
    for token, number in model['vocab'].items():
        tokens[number], types[number] = token, 'NORMAL'
    for added in described.get('added_tokens', []):
        number = added['id']
        tokens[number] = added['content']
        types[number] = 'CONTROL' if added['special'] else 'USER_DEFINED'
        for flag in ('single_word', 'lstrip', 'rstrip'):
            if added.get(flag):
                raise _rejected(f'its token {added["content"]!r} has {flag}')
    vocabulary = Vocabulary(tokens, types, tokenizer.end_of_text)
    if vocabulary.end is None and END_OF_TEXT in tokens:
        vocabulary.end = tokens.index(END_OF_TEXT)
    if isinstance(tokenizer, HfTokenizer) and tokenizer.first_ids:
        if len(tokenizer.first_ids) > 1:
            raise _rejected('it begins every text with several tokens')
        vocabulary.begin = tokenizer.first_ids[0]
    merges = [tuple(m.split(' ') if isinstance(m, str) else m) for m in model['merges']]
    vocabulary.merges = [' '.join(merge) for merge in merges]
    if model.get('byte_fallback'):
        _check_spaces(described)
        vocabulary.model = 'llama'
        vocabulary.adds_space = isinstance(tokenizer, HfTokenizer) and tokenizer.adds_space
        if model.get('unk_token') not in tokens:
            raise _rejected(f'its unk_token is {model.get("unk_token")!r}')
        types[tokens.index(model['unk_token'])] = 'UNKNOWN'
        for number, token in enumerate(tokens):
            if re.fullmatch('<0x[0-9A-F]{2}>', token):
                types[number] = 'BYTE'
        vocabulary.scores = _scores(tokens, types, merges)
    else:
        vocabulary.words = _words(described, bool(merges), bool(model.get('ignore_merges')))
    return vocabulary


def _words(described: dict, has_merges: bool, ignores_merges: bool) -> str:
    """Returns llama.cpp's name for the way in which a byte-level tokenizer cuts text into words.

    Without merges, any way gives the same tokens: those of the bytes.
    """
    normalizer = described.get('normalizer')
    if normalizer not in (None, {'type': 'NFC'}):  # Qwen's, which changes few texts
        raise _rejected(f'its normalizer is {_short(normalizer)}')
    if (described.get('decoder') or {}).get('type') != 'ByteLevel':
        raise _rejected(f'its decoder is {_short(described.get("decoder"))}')
    patterns = tuple(_patterns(described.get('pre_tokenizer')))
    key = (*patterns, 'ignore_merges') if ignores_merges else patterns
    if not has_merges and not ignores_merges:
        return Vocabulary.words
    if key not in WORDS:
        raise _rejected(f'it cuts text into words by {" and ".join(key) or "no rule"}')
    return WORDS[key]


def _patterns(step) -> list[str]:
    """Returns the regular expressions of a pre-tokenizer, one after the other."""
    match step:
        case {'type': 'Sequence', 'pretokenizers': list(parts)}:
            return [pattern for part in parts for pattern in _patterns(part)]
        case {'type': 'ByteLevel', 'add_prefix_space': False}:
            return [GPT2_WORDS] if step.get('use_regex', True) else []
        case {'type': 'Digits', 'individual_digits': True}:
            return [r'\p{N}']
        case {'type': 'Split', 'pattern': {'Regex': str(pattern)}, 'behavior': 'Isolated'}:
            if not step.get('invert'):
                return [pattern.replace(CONTRACTIONS[1], CONTRACTIONS[0])]
    raise _rejected(f'its pre_tokenizer is {_short(step)}')


def _check_spaces(described: dict):
    """Raises UserError unless the tokenizer only replaces spaces before it merges."""
    normalizer = described.get('normalizer') or {}
    parts = normalizer.get('normalizers', [normalizer]) if normalizer else []
    replace_spaces = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}
    match described.get('pre_tokenizer'):
        case None:
            is_known = replace_spaces in parts
        case {'type': 'Metaspace', 'replacement': '▁', 'split': False}:
            is_known = True
        case _:
            is_known = False
    others = [p for p in parts if p not in (replace_spaces, {'type': 'Prepend', 'prepend': '▁'})]
    if others or not is_known:
        steps = [described.get('pre_tokenizer'), normalizer or None]
        raise _rejected(f'its pre_tokenizer and normalizer are {_short(steps)}')


def _scores(tokens: list[str], types: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """Returns scores whose order is that of the merges.

    llama.cpp joins any two tokens whose text together is a token, highest score first. Raises
    UserError unless the merges are all of these, those of a token one after the other.
    """
    order = list(dict.fromkeys(left + right for left, right in merges))
    ranks = {token: rank for rank, token in enumerate(order)}
    results = [ranks[left + right] for left, right in merges]
    if results != sorted(results):
        raise _rejected('its merges are not in the order of their tokens, as in SentencePiece')
    normal = {token for token, kind in zip(tokens, types) if kind == 'NORMAL'}
    known = set(merges)
    for token in filter(normal.__contains__, tokens):
        for cut in range(1, len(token)):
            parts = token[:cut], token[cut:]
            if normal.issuperset(parts) and parts not in known:
                raise _rejected(f'it has no merge of {parts[0]!r} and {parts[1]!r}')
    return [float(-ranks.get(token, 0)) for token in tokens]


def _short(part) -> str:
    return json.dumps(part, ensure_ascii=False)[:150]
