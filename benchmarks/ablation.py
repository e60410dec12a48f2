"""Removes the ideas of config/fast_shakespeare_char.py one at a time; prints loss and time.

    python benchmarks/ablation.py --text=data/shakespeare_char/input.txt

It trains on the first 81% of the text and validates on the next 9%. The last tenth, on which
results are reported, remains unseen, so choices based on this table are not tuned on it.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator
from benchmarks import measure
from nib.errors import UserError, run_script
from nib.report.history import read_run
from nib.schema import check_range

text: str = ''  # path of a text of a million characters
seeds: int = 3  # runs of each variant
steps: int = 104  # training steps per run
result: str = ''  # also write the table to this file

IDEAS = {  # what is removed (what replaces it) -> flags
    'nothing': '',
    'Muon (AdamW, rate 0.003)': '--optimizer=adamw --learning_rate=0.003',
    'a short momentum': '--muon_momentum=0.95',
    '2 of 5 Newton-Schulz iterations': '--muon_iterations=3',
    'rotary positions': '--position=learned',
    'a small rotary base': '--rotary_base=10000',
    'query-key norm': '--no-qk_norm',
    'SwiGLU (GELU)': '--mlp=gelu',
    'SwiGLU (squared ReLU)': '--mlp=relu2',
    'a separate output head': '--tied_head',
    'unbounded logits (a soft cap of 15)': '--logit_cap=15',
    'zero initialization': '--no-zero_init',
    'LayerNorm (RMSNorm)': '--norm=rms',
    'warmup-stable-decay (cosine)': '--lr_schedule=cosine',
    'a batch of 24 (12, twice the steps)': '--batch_size=12 --max_iters={twice}',
    'a batch of 24 (48, half the steps)': '--batch_size=48 --max_iters={half}',
    '2 layers (3)': '--n_layer=3',
    'the previous characters': '--smear=0',
    'bfloat16': '--dtype=float32',
}


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    check_range(values, 'seeds', least=1)
    check_range(values, 'steps', least=20)
    try:
        seen = Path(text).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f'--text={text}: cannot be read as UTF-8 ({error}); expected the path of a text'
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / 'seen.txt').write_text(seen[: len(seen) * 9 // 10], encoding='utf-8')
        measure.run(
            'data/shakespeare_char/prepare.py',
            f'--input={scratch / "seen.txt"}',
            f'--out_dir={scratch / "shakespeare_char"}',
        )
        measured = {idea: [] for idea in IDEAS}
        for seed in range(seeds):
            for idea, flags in IDEAS.items():
                filled = flags.format(twice=2 * steps, half=steps // 2).split()
                loss, seconds = train(scratch, seed, filled)
                measured[idea].append((loss, seconds))
                print(f'seed {seed}, without {idea}: loss {loss:.4f}, {seconds:.1f} s', flush=True)
    lines = [
        f'{seeds} seeds; {measure.describe_machine()}; {steps} steps',
        '',
        (
            f'{"config/fast_shakespeare_char.py without":42}{"loss (lowest to highest)":>28}'
            f'{"process, s":>12}'
        ),
    ]
    for idea, runs in measured.items():
        losses, times = zip(*runs)
        spread = f'{statistics.median(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})'
        lines.append(f'{idea:42}{spread:>28}{statistics.median(times):12.1f}')
    measure.publish('\n'.join([*lines, '']), result)


def train(scratch: Path, seed: int, flags) -> tuple[float, float]:
    """Returns the loss on the whole validation split, and the seconds of the process."""
    out_dir = scratch / 'run'
    started = time.perf_counter()
    measure.run(
        'train.py',
        'config/fast_shakespeare_char.py',
        '--device=cpu',
        f'--max_iters={steps}',
        f'--seed={seed}',
        f'--data_dir={scratch}',
        f'--out_dir={out_dir}',
        '--fallback_dataset=',
        '--overwrite',
        *flags,
    )
    seconds = time.perf_counter() - started
    return read_run(out_dir).values('loss/val_whole')[-1], seconds


if __name__ == '__main__':
    run_script(main)
