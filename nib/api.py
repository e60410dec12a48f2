"""Models in Python: load one, look at logits and attention, generate text.

docs/notebook.md has examples. sample.py uses the same functions.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from model import GPT
from nib.checkpoint.start import read_weights
from nib.checkpoint.weights import Weights
from nib.doctor.inspection import attention_scores, watch_attention
from nib.errors import UserError
from nib.text.tokenizer import Tokenizer, encode_prompt


def load(name: str, which: str | int = 'best') -> tuple[GPT, Tokenizer]:
    """Returns a model, in float32 on the CPU and without dropout, and its tokenizer.

    name: the folder of a run or of one of its checkpoints, the folder or the hub id of an open
    model, or nanoGPT's ckpt.pt. which: the checkpoint of a run: 'best', 'latest' or a step number.
    Raises UserError if there is no such model.
    """
    weights = read_weights(str(name), which=str(which), check=Weights.known_tokenizer)
    return weights.build().float(), weights.known_tokenizer()


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the token ids of a prompt.

    <|endoftext|> is the end-of-text token, and a beginning-of-text token comes first if the model
    has one. Raises UserError if the vocabulary cannot represent the text.
    """
    return encode_prompt(tokenizer, text, 'prompt')


@torch.no_grad()
def attention_maps(model: GPT, ids: Sequence[int]) -> list[torch.Tensor]:
    """Returns the attention weights of each layer, (n_head, T, T) in float32.

    Row t of a head is where position t looks: it adds up to 1, and is 0 after position t. ids: T
    token ids. Raises ValueError if they are none, or more than block_size.
    """
    if not len(ids):
        raise UserError('ids is empty: attention maps need at least one token id')
    vocab_size = model.config.vocab_size
    if wrong := [id for id in ids if not 0 <= id < vocab_size]:
        raise UserError(f'ids contains {wrong[0]}, but the vocabulary ends at {vocab_size - 1}')
    maps = []

    def keep(q, k, v):
        maps.append(attention_scores(q, k)[0].softmax(dim=-1))

    with watch_attention(model, keep):
        model(torch.tensor([list(ids)], device=model.transformer.wte.weight.device))
    return maps


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 200,
    stop: str = '',
    **sampling,
) -> str:
    """Returns the prompt and the model's continuation of it.

    stop: the text ends after this text. sampling: arguments of GPT.generate(), such as temperature.
    Raises UserError if the vocabulary cannot represent the prompt, or an argument is invalid.
    """
    pieces = stream(model, tokenizer, [encode(tokenizer, prompt)], max_new_tokens, stop, **sampling)
    return prompt + ''.join(piece for (piece,) in pieces)


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: str = '',
    **sampling,
) -> Iterator[list[str]]:
    """Yields the new text of each continuation, as it is generated, until all have ended.

    prompts: token ids. The other arguments are those of generate().
    """
    texts = [Continuation(stop) for _ in prompts]
    for tokens in model.generate(prompts, max_new_tokens, **sampling):
        yield [
            text.add(tokenizer.decode_bytes([token]))
            for text, token in zip(texts, tokens.tolist(), strict=True)
        ]
        if all(text.ended for text in texts):
            return
    yield [text.add(b'', final=True) for text in texts]


@dataclass
class Continuation:
    """What a model has written after a prompt.

    The bytes of a character may be spread over several tokens. It appears with the last of them.
    """

    stop: str = ''  # the text ends after this text
    text: str = ''
    ended: bool = False  # by the stop text; later tokens are ignored
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder('utf-8')('replace')
    )

    def add(self, content: bytes, final: bool = False) -> str:
        """Adds the bytes of a token; returns the new text.

        final: whether they are the last ones.
        """
        if self.ended:
            return ''
        before = len(self.text)
        self.text += self.decoder.decode(content, final)
        stop = self.stop
        at = self.text.find(stop, max(0, before - len(stop))) if stop else -1
        if at >= 0:
            self.text, self.ended = self.text[: at + len(stop)], True
        return self.text[before:]
