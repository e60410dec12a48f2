"""Generates text: draws one token after another. The letters in shapes are those of model.py.

The logits come from a copy of the trained model that shares its parameters (window.py). Its
attention uses a cache (caches.py), and on a CPU its matrices may be packed (layers.py). Everything
else is the code of model.py. check.py compares the copy with the model.
"""

import math

import torch
from torch.nn import functional as F

from model import GPT, IGNORED
from nib.errors import UserError
from nib.generation.window import Window


@torch.inference_mode()
def generate(model: GPT, prompts, max_new_tokens, temperature, top_k, top_p, seed, stop, compile):
    """Implements GPT.generate(); see there."""
    vocab_size = model.config.vocab_size
    prompts = [prompt.tolist() if hasattr(prompt, 'tolist') else prompt for prompt in prompts]
    check_sampling(prompts, max_new_tokens, temperature, top_k, top_p, seed, vocab_size, stop)
    window = Window(model, prompts, max_new_tokens, compile)
    device = window.tokens.device
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    stops = [torch.tensor(list(tokens), device=device) for tokens in stop]
    made = torch.full((len(prompts), max(map(len, stop), default=0)), IGNORED, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        tokens = sample_tokens(window.next_logits(), temperature, top_k, top_p, generator)  # (B,)
        yield torch.where(ended, IGNORED, tokens)
        window.append(tokens)
        if stops:
            made = torch.cat((made, tokens[:, None]), dim=1)[:, 1:]
            for sequence in stops:
                ended = ended | (made[:, -len(sequence) :] == sequence).all(dim=1)
            if ended.all():
                return


def check_sampling(prompts, max_new_tokens, temperature, top_k, top_p, seed, vocab_size, stop=()):
    """Raises UserError, naming the argument, if an argument of generate() is invalid."""
    if not prompts:
        raise UserError('prompts is empty: generation needs at least one prompt')
    if not all(map(len, prompts)):
        raise UserError('a prompt is empty: generation needs at least one token to start from')
    for id in (id for prompt in prompts for id in prompt if not hasattr(id, '__index__')):
        raise UserError(f'the prompt contains {id!r}: token ids are whole numbers')
    for id in (id for prompt in prompts for id in prompt if not 0 <= id < vocab_size):
        raise UserError(
            f'the prompt contains token id {id}, but the vocabulary ends at {vocab_size - 1}'
        )
    for name, value in (('max_new_tokens', max_new_tokens), ('top_k', top_k)):
        if value is not None and not hasattr(value, '__index__'):
            raise UserError(f'{name} is {value}: it must be a whole number')
    if max_new_tokens < 0:
        raise UserError(f'max_new_tokens is {max_new_tokens}: it must be at least 0')
    if not 0.0 <= temperature < math.inf:
        raise UserError(f'temperature is {temperature}: it must be 0 (greedy) or a positive number')
    if top_k is not None and top_k < 1:
        raise UserError(f'top_k is {top_k}: it must be at least 1, or None for all tokens')
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise UserError(
            f'top_p is {top_p}: it must be above 0 and at most 1, or None for all tokens'
        )
    if seed is not None and not 0 <= seed < 1 << 63:
        raise UserError(f'seed is {seed}: it must be at least 0 and less than 2^63')
    if not all(len(sequence) for sequence in stop):
        raise UserError('stop contains an empty sequence: each needs at least one token id')


def sample_tokens(logits, temperature, top_k, top_p, generator):
    """Draws one token (B,) for each row of logits (B, V), without waiting for the device."""
    if temperature < 1e-5:  # too close to 0 to divide by in float32
        return logits.argmax(dim=-1)
    logits, ids = logits.float() / temperature, None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, ids = largest(logits, top_k)  # (B, top_k)
    elif top_p is not None:
        logits, ids = logits.sort(dim=-1, descending=True)
    probs = logits.softmax(dim=-1)
    if top_p is not None:  # drop a token if the more likely ones already add up to top_p
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0.0)
    # p / Exponential(1) is largest at a token with probability p. multinomial would synchronize.
    noise = torch.empty_like(probs).exponential_(generator=generator)
    chosen = (probs / noise).argmax(dim=-1, keepdim=True)
    return (chosen if ids is None else ids.gather(-1, chosen))[:, 0]


def largest(logits, k: int):
    """Returns the k largest of logits (B, V) in descending order, and their ids.

    A CPU sorts a row as long as a vocabulary slowly. The k largest are in the k chunks with the
    largest maxima, so only these chunks are sorted.
    """
    B, V = logits.shape
    size = math.isqrt(V // k)
    if logits.device.type != 'cpu' or size < 4:
        return logits.topk(k)
    chunks = F.pad(logits, (0, -V % size), value=-math.inf).view(B, -1, size)
    chosen = chunks.amax(dim=-1).topk(k, sorted=False).indices[..., None]  # (B, k, 1)
    ids = (chosen * size + torch.arange(size, device='cpu')).flatten(1)  # (B, k * size)
    values, places = chunks.gather(1, chosen.expand(-1, -1, size)).flatten(1).topk(k)
    return values, ids.gather(1, places)
