"""The benchmark: what it prints adds up, and it measures train.py's own step."""
import re
import sys
import time

import pytest
from conftest import ROOT, SMALL_RUN, run_script

import bench as bench_script
import configurator
from benchmarks import sampling
from nib import corpus, measure

SMALL = [flag for flag in SMALL_RUN if not flag.startswith('--dataset')]
# Stands in for a clone of nanoGPT: its interface on this project's model.
STAND_IN = '''
import importlib.util
import sys
import torch
spec = importlib.util.spec_from_file_location('own_model', {root!r} + '/model.py')
own = importlib.util.module_from_spec(spec)
sys.modules['own_model'] = own
spec.loader.exec_module(own)
GPTConfig = own.GPTConfig

class GPT(own.GPT):
    def configure_optimizers(self, weight_decay, learning_rate, betas, kind):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def forward(self, idx, targets=None):
        return None, super().forward(idx, targets)

    def generate(self, idx, max_new_tokens, temperature, top_k):
        return list(super().generate(idx.tolist(), max_new_tokens, temperature, top_k))
'''


def bench(*flags):
    return run_script('bench.py', *SMALL, '--rounds=2', '--steps=6', '--new_tokens=8', '--prompt_tokens=4', *flags)


def rows(text) -> dict[str, float]:
    """The last figure's median of every row."""
    return {line[:30].strip(): float(line[30:].split()[0].replace(',', '')) for line in text.splitlines()[4:] if line.strip()}


def test_the_figures_of_a_config_add_up(data_dir, tmp_path):
    done = bench('--dataset=tiny', f'--data_dir={data_dir}', f'--result={tmp_path / "table.txt"}', '--rounds=1')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'table.txt').read_text() == done.stdout
    assert '128 tokens a step (2 x 4 x 16), float32, compile off, tiny' in done.stdout
    figures = rows(done.stdout)
    assert figures['tokens/s'] == pytest.approx(128 / figures['ms/step'] * 1000, rel=0.01)
    assert figures['generated tokens/s'] > 0 and figures['peak memory, MB'] > 50 and figures['command to first step, s'] > 0.3


def test_the_parts_of_a_step_are_the_whole_step(data_dir):
    """No time is lost between the parts, and each part has some."""
    values, _ = configurator.configure(str(ROOT / 'bench.py'), [*SMALL, '--dtype=float32', '--no-compile'], base='train.py')
    contestant = bench_script.Contestant(values, corpus.open_dataset(data_dir / 'tiny', 16))
    started = time.perf_counter()
    parts = contestant.time_parts()
    whole = 1000 * (time.perf_counter() - started) / (bench_script.steps // 3)
    assert list(parts) == ['ms data', 'ms forward', 'ms backward', 'ms optimizer'] and min(parts.values()) > 0
    assert 0.9 * whole < sum(parts.values()) <= whole


def test_without_its_dataset_a_config_is_measured_on_random_tokens(tmp_path):
    done = bench('config/train_gpt2.py', f'--data_dir={tmp_path}', '--no-startup', '--new_tokens=0')
    assert done.returncode == 0, done.stderr
    assert 'random tokens' in done.stdout
    assert not {'generated tokens/s', 'command to first step, s'} & rows(done.stdout).keys()


def test_beside_nanogpt_both_are_measured_in_turns(data_dir, tmp_path):
    (tmp_path / 'clone').mkdir()
    (tmp_path / 'clone/model.py').write_text(STAND_IN.format(root=str(ROOT)))
    done = bench('--dataset=tiny', f'--data_dir={data_dir}', '--no-startup', f'--vs_nanogpt={tmp_path / "clone"}')
    assert done.returncode == 0, done.stderr
    assert [line.split(':')[0] for line in done.stderr.splitlines() if line.startswith('round')] == [
        'round 1, nanoGPT', 'round 1, nibGPT', 'round 2, nanoGPT', 'round 2, nibGPT']
    for row in ('tokens/s', 'ms/step', 'peak memory, MB', 'generated tokens/s'):
        line = next(line for line in done.stdout.splitlines() if line.startswith(row))
        assert len(re.findall(r'\(.*?\)', line)) >= 2 or row.startswith('peak')


def test_generation_beside_nanogpt_is_measured_in_turns(tmp_path, run_main, monkeypatch):
    (tmp_path / 'model.py').write_text(STAND_IN.format(root=str(ROOT)))
    shape = dict(vocab_size=11, block_size=16, n_layer=1, n_head=2, n_embd=16, bias=True, dropout=0.0)
    monkeypatch.setattr(sampling, 'JOBS', {'tiny': sampling.Job(shape, 4, 20, 10)})
    done = run_main(sampling, f'--nanogpt={tmp_path}', '--rounds=2', '--device=cpu', f'--result={tmp_path / "table.txt"}')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'table.txt').read_text() == done.stdout
    assert [line.split(':')[0] for line in done.stderr.splitlines()] == ['round 1', 'round 2']
    figures = rows(done.stdout)
    assert list(figures) == ['tiny, float32', 'tiny, bfloat16', '4 tokens: 32 prompts / 1', '20 tokens: 32 prompts / 1',
                             'plain read, GB/s', 'tiny, float32: %', 'tiny, bfloat16: %']
    assert min(figures.values()) > 0
    for clone in ('', tmp_path / 'nothing'):
        done = run_main(sampling, f'--nanogpt={clone}', '--device=cpu')
        assert done.returncode == 2 and done.stderr.startswith(f'error: --nanogpt={clone}: it is the path of a clone')


def test_a_table_has_medians_spreads_and_the_ratios_of_rounds():
    table = measure.make_table({'a': [{'x': 1.0}, {'x': 2.0}, {'x': 4.0}],
                                'b': [{'x': 2.0, 'y': 5.0}, {'x': 2.0}, {'x': 2000.0}]})
    lines = {line.split()[0]: line for line in table.splitlines()[1:]}
    assert lines['x'].split()[1:] == '2 (1 to 4) 2 (2 to 2,000) 2 (1 to 500)'.split()
    assert lines['y'].split() == ['y', '5']
    assert sys.version.split()[0] in measure.describe_machine()
