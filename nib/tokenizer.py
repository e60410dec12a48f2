"""Text to token ids and back; every tokenizer is saved as JSON and travels with the checkpoint."""
from dataclasses import dataclass

import numpy as np

from nib.errors import UserError


@dataclass(frozen=True)
class CharTokenizer:
    """One token for each character of the text that it was made from, numbered in the order of their code points."""
    characters: str

    @classmethod
    def train(cls, text: str) -> 'CharTokenizer':
        return cls(''.join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """Token ids (len(text),), uint32. UserError names the characters that the vocabulary lacks."""
        known, wanted = _code_points(self.characters), _code_points(text)
        ids = np.searchsorted(known, wanted).astype(np.uint32)
        missing = ids >= len(known)
        missing[~missing] = known[ids[~missing]] != wanted[~missing]
        if missing.any():
            first = int(missing.argmax())
            distinct = ', '.join(repr(chr(point)) for point in np.unique(wanted[missing])[:5])
            raise UserError(f'the text holds characters that are not among the {self.vocab_size} of the vocabulary: '
                            f'{distinct} (the first at offset {first}); leave them out, or train on a text that has them')
        return ids

    def decode(self, ids) -> str:
        """The text of token ids. UserError for an id that is not in the vocabulary."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise UserError(f'token ids from {ids.min()} to {ids.max()}: the vocabulary has 0 to {self.vocab_size - 1}')
        return _code_points(self.characters)[ids].tobytes().decode('utf-32-le', 'surrogatepass')

    def to_json(self) -> dict:
        # Low surrogates first: right after a high one, JSON's reader would take the two for one character.
        ordered = sorted(self.characters, key=lambda character: (not '\udc00' <= character <= '\udfff', character))
        return {'kind': 'char', 'characters': ''.join(ordered)}


def tokenizer_from_json(data: dict) -> CharTokenizer:
    """The tokenizer that to_json() described. UserError where that is no tokenizer."""
    match data:
        case {'kind': 'char', 'characters': str(characters)}:
            tokenizer = CharTokenizer.train(characters)
            if tokenizer.to_json()['characters'] == characters:
                return tokenizer
        case {'kind': kind} if kind != 'char':
            raise UserError(f"tokenizer of kind {kind!r}: this version knows 'char'")
    raise UserError('the tokenizer is broken: a char tokenizer has its distinct characters in order')


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
