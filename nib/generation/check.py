"""Compares what generate() samples from with the model itself."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from model import GPT
from nib.generation.window import Window

# Differences that check_generation() attributes to rounding, in standard deviations of the logits:
# in float32, in float32 on a GPU, which may round factors to 11 bits, and in 16-bit types. A model
# hardly uses attention at first: after 40 steps, a wrong one may change its logits by only 0.2%.
TOLERANCE, GPU_TOLERANCE, HALF_TOLERANCE = 0.001, 0.02, 0.2


@torch.inference_mode()
def check_generation(
    model: GPT, prompt: Sequence[int], n_tokens: int = 8, precision=None
) -> str | None:
    """Compares the logits that generate() samples from with those of full forward passes.

    Two rows are continued greedily: one from the end of the prompt, long enough that the context
    fills up halfway through, and one from the first half of that. precision: the context manager in
    which training runs its forward passes. The full passes run both with it and without it.

    Returns None if the logits agree up to rounding, or a sentence if they differ.
    """
    prompt = list(prompt)[-max(1, model.config.block_size - n_tokens // 2) :]
    texts = [prompt, prompt[: max(1, len(prompt) // 2)]]
    steps, contexts = [], []  # for each token: logits (2, V), and the context of each row
    try:
        window = Window(model, texts, n_tokens, compile=False)
        for _ in range(n_tokens):
            steps.append(window.next_logits().float())
            contexts.append(
                [
                    (len(text) - length, len(text))
                    for text, length in zip(texts, window.lengths, strict=True)
                ]
            )
            tokens = steps[-1].argmax(dim=-1)
            texts = [[*text, token] for text, token in zip(texts, tokens.tolist(), strict=True)]
            window.append(tokens)
    except torch.OutOfMemoryError:
        return None  # the caches may need more memory than training has left
    except Exception as error:  # in modified code; it must not end a training run
        return f'generate() fails with {type(error).__name__}: {error}'
    was_training = model.training
    model.eval()
    try:
        for manager in (nullcontext(), precision or nullcontext()):
            with manager:
                whole = [
                    logits_of_whole_passes(model, text, [context[row] for context in contexts])
                    for row, text in enumerate(texts)
                ]
            if said := describe_difference(torch.stack(steps), torch.stack(whole, dim=1), contexts):
                return said
    except torch.OutOfMemoryError:
        return None
    finally:
        model.train(was_training)
    return None


def logits_of_whole_passes(model: GPT, text: list[int], contexts: list[tuple[int, int]]):
    """Logits (n, V) after each of n contexts, which are (start, end) in the text."""
    device, logits = model.transformer.wte.weight.device, []
    for start in sorted({start for start, _ in contexts}):  # one pass for all that start there
        ends = [end for other, end in contexts if other == start]
        idx = torch.tensor([text[start : ends[-1]]], device=device)
        logits.append(model(idx)[0, [end - start - 1 for end in ends]])
    return torch.cat(logits)


def describe_difference(actual, expected, contexts) -> str | None:
    """A sentence about the largest difference of logits (n, rows, V); None if it is rounding."""
    tolerance = TOLERANCE if expected.device.type == 'cpu' else GPU_TOLERANCE
    if expected.dtype in (torch.bfloat16, torch.float16):
        tolerance = HALF_TOLERANCE
    expected = expected.float()
    spread = expected.std(dim=-1, correction=0).clamp(min=1e-30)
    share = (actual - expected).std(dim=-1, correction=0) / spread  # (n, rows)
    if (share <= tolerance).all():  # false if one is NaN
        return None
    step, row = divmod(int(share.argmax()), share.shape[1])
    start, end = contexts[step][row]
    return (
        f'after {end - start} tokens, the logits of generate() differ from those of a whole '
        f'forward pass by {float(share[step, row]):.1%} of their standard deviation'
    )
