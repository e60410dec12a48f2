"""The program that measures on a GPU runs on a CPU too, at toy sizes."""

import json
import sys

import pytest
from conftest import run_script

from benchmarks.gpu_kernels import kind_of


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == 'win32', reason='it ends its processes as Linux and macOS do')
def test_every_stage_is_rehearsed_on_a_cpu(tmp_path):
    done = run_script('benchmarks/gpu.py', f'--out={tmp_path}', '--rehearse')
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / 'results.json').read_text())
    assert {stage: figures['outcome'] for stage, figures in results.items()} == dict.fromkeys(
        results, 'done'
    )
    assert list(results) == [
        'tests',
        'gpt2',
        'char',
        'sampling',
        'determinism',
        'profile',
        'compilers',
        'recipes',
    ]
    for stage, figures in results.items():
        assert not [value for value in figures.values() if 'failed' in str(value)], (stage, figures)
    again = run_script('benchmarks/gpu.py', f'--out={tmp_path}', '--rehearse')
    assert again.stdout.count('done before') == len(results)


def test_kernels_are_told_apart_by_their_names():
    for name, kind in [
        ('nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT', 'matrix products'),
        ('cudnn_generated_fort_native_sdpa_sm90_flash_fprop', 'attention'),
        ('triton_red_fused__log_softmax_nll_loss_forward_3', 'loss'),
        ('triton_per_fused_add_native_layer_norm_1', 'norms'),
        ('triton_poi_fused_gelu_2', 'elementwise and reductions'),
        ('void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>', 'optimizer'),
    ]:
        assert kind_of(name) == kind, name
