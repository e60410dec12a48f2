"""Trains a tokenizer on a text: byte-level byte pair encoding (Sennrich et al. 2016)."""

import signal
from collections.abc import Iterable, Iterator

from nib.text.hf_tokenizer import HfTokenizer, import_library
from nib.text.vocabulary import END_OF_TEXT

# How a text is split into words, which merges do not cross. It splits as GPT-4 and Llama 3 do.
PATTERN = (
    r"(?i:'(?:[dmst]|ll|re|ve))"  # English contractions
    r'|[^\r\n\p{L}\p{N}]?\p{L}+'  # letters, with the space or the sign before them
    r'|\p{N}{1,3}'  # up to three digits
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*'  # signs, with a space before and line ends after them
    r'|\s*[\r\n]+'  # line ends, with the spaces before them
    r'|\s+(?!\S)'  # spaces, but the last one belongs to the word after it
    r'|\s+'
)
SMALLEST, LARGEST = 257, 1 << 20  # tokens: every byte and END_OF_TEXT; what fits into memory
# Time and memory grow with the text; the vocabulary hardly changes any more.
MOST = 1 << 29  # characters
LONGEST = 1024  # characters of a word; the library's time grows with the square of a word's length


def train_bpe(texts: Iterable[str], vocab_size: int) -> HfTokenizer:
    """Trains a tokenizer on texts. The same texts always give the same tokenizer.

    A merge needs a pair of tokens that occurs at least twice. If the texts have too few of them,
    the tokenizer has fewer than vocab_size tokens. END_OF_TEXT is the last one. For training,
    words longer than LONGEST are split.
    """
    library = import_library()

    def split_words(pattern: str):
        return library.pre_tokenizers.Sequence(
            [
                library.pre_tokenizers.Split(library.Regex(pattern), 'isolated'),
                library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    trained = library.Tokenizer(library.models.BPE())
    short = PATTERN.replace('+', f'{{1,{LONGEST}}}').replace('*', f'{{0,{LONGEST}}}')
    trained.pre_tokenizer = split_words(short)
    trained.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Ctrl-C ends the process, as the library does not notice it and nothing has been written yet.
    handler = signal.getsignal(signal.SIGINT)
    if handler != signal.SIG_IGN:  # as in a background job
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        trained.train_from_iterator(texts, trainer)
    finally:
        signal.signal(signal.SIGINT, handler)
    trained.pre_tokenizer = split_words(PATTERN)
    trained.add_special_tokens([library.AddedToken(END_OF_TEXT, normalized=False)])
    return HfTokenizer.read(trained.to_str())


def spread(texts: Iterable[str], n_characters: int) -> Iterator[str]:
    """Yields texts spread evenly over all of them, with MOST of their n_characters at most."""
    share = min(1.0, MOST / max(1, n_characters))
    read = taken = 0
    for text in texts:
        read += len(text)
        if taken + len(text) <= share * read:
            taken += len(text)
            yield text
