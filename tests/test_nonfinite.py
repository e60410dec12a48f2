"""Steps whose loss or gradients are not finite: no rank applies them, and the run ends properly."""

import math
import re

import pytest
import torch
from conftest import SMALL_RUN, records
from hypothesis import given
from hypothesis import strategies as st
from processes import start_on_ranks

import train as training
from model import GPT, GPTConfig
from nib import guard
from nib.checkpoint import store
from nib.doctor.finding import Finding

EVERY_STEP = ['--eval_interval=1', '--eval_iters=1', '--keep_last=100', '--dropout=0.1']


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss or gradients of some steps infinite; returns the list of computed steps."""
    original, computed = training.accumulate_gradients, []

    def poison(steps, what):
        def poisoned(t, micro_batches, step):
            loss = original(t, micro_batches, step)
            computed.append(step)
            if step in steps and what == 'loss':
                return loss * math.nan
            if step in steps:
                t.raw_model.transformer.h[1].mlp.c_proj.weight.grad[0, 0] = {
                    'gradient': math.inf,
                    'NaN gradient': math.nan,
                }[what]
            return loss

        monkeypatch.setattr(training, 'accumulate_gradients', poisoned)
        return computed

    return poison


def tensors_at(out_dir, step):
    return {
        f'{kind}/{name}': value
        for kind, tensors in store.load(out_dir, str(step))[1].items()
        for name, value in tensors.items()
    }


def equal(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


@pytest.mark.parametrize('what', ['loss', 'gradient', 'NaN gradient'])
@pytest.mark.parametrize(
    'dtype', ['float32', 'float16', pytest.param('bfloat16', marks=pytest.mark.slow)]
)
def test_a_bad_step_changes_neither_weights_nor_moments_and_the_run_goes_on(
    train_here, poison, tmp_path, what, dtype
):
    poison({2, 4, 5}, what)
    done = train_here(tmp_path / 'run', *EVERY_STEP, f'--dtype={dtype}', '--max_iters=7')
    assert done.returncode == 0
    for step in range(1, 7):
        before, after = tensors_at(tmp_path / 'run', step), tensors_at(tmp_path / 'run', step + 1)
        assert equal(before, after) == (step in (2, 4, 5)), step
        assert all(value.isfinite().all() for value in after.values())
    counted = dtype != 'float16' or what == 'loss'  # in float16 the scaler's ordinary business
    assert [
        int(step)
        for step in re.findall(
            r'step (\d+): loss or gradients not finite: not applied', done.stderr
        )
    ] == ([3, 5, 6] if counted else [])


@pytest.mark.parametrize('max_batches, saved', [(3, 'Nothing is saved'), (None, 'nan nats')])
def test_a_validation_loss_that_is_not_finite_is_exit_code_3(
    train_here, tmp_path, monkeypatch, max_batches, saved
):
    """Of an evaluation, or of the whole split at the end."""
    original = training.split_loss

    def split_loss(t, data, split, n, stop):
        is_chosen = split == 'val' and n == max_batches
        return math.nan if is_chosen else original(t, data, split, n, stop)

    monkeypatch.setattr(training, 'split_loss', split_loss)
    done = train_here(tmp_path / 'run', '--max_iters=1')
    assert done.returncode == 3 and saved in done.stdout + done.stderr


@pytest.mark.parametrize('log_interval', [1, 7, 1000])
def test_after_three_bad_steps_in_a_row_the_run_stops_with_the_weights_before_them(
    train_here, poison, tmp_path, log_interval
):
    """However late the run looks at the count, later good steps change nothing."""
    poison({2, 3, 12, 13, 14}, 'gradient')
    done = train_here(tmp_path / 'run', f'--log_interval={log_interval}')
    assert done.returncode == 3
    line = next(line for line in done.stderr.splitlines() if ': not_finite, critical: ' in line)
    assert ': not_finite, critical: step 15: loss or gradients not finite, 3 steps in a row' in line
    assert (
        'parameters affected: transformer.h.1.mlp.c_proj.weight.' in line
        and 'the checkpoint of step 10 in' in done.stderr
    )
    found, tensors = store.load(tmp_path / 'run')
    assert found.step == 10 and all(value.isfinite().all() for value in tensors['model'].values())
    assert sorted(path.name for path in (tmp_path / 'run').glob('step-*')) == ['step-00000010']


def test_bad_steps_in_a_row_are_counted_over_a_resume(train_here, poison, tmp_path):
    poison({8, 9, 10}, 'loss')
    assert train_here(tmp_path / 'run', '--max_iters=10').returncode == 0
    done = train_here(tmp_path / 'run', '--init_from=resume')
    assert (
        done.returncode == 3
        and 'step 11: loss or gradients not finite, 3 steps in a row' in done.stderr
    )


def test_max_bad_steps_and_skip_are_what_they_say(train_here, poison, tmp_path):
    poison({4, 5, 6, 7}, 'loss')
    assert train_here(tmp_path / 'four', '--max_bad_steps=5').returncode == 0
    assert train_here(tmp_path / 'skip', '--on_nonfinite=skip', '--max_bad_steps=1').returncode == 0
    assert equal(tensors_at(tmp_path / 'four', 20), tensors_at(tmp_path / 'skip', 20))


def findings(out_dir):
    return [
        (r['step'], str(Finding.of_record('not_finite', r['step'], r['finding/not_finite'])))
        for r in records(out_dir)
        if 'finding/not_finite' in r
    ]


def test_many_steps_that_are_left_out_are_a_warning(train_here, poison, tmp_path):
    poison({3, 4, 8, 9}, 'gradient')
    done = train_here(
        tmp_path / 'skip', '--on_nonfinite=skip', '--max_bad_steps=1', '--log_interval=3'
    )
    ((step, said),) = findings(tmp_path / 'skip')
    assert (
        done.returncode == 0
        and step == 9
        and said.startswith(
            'warning: 3 of 9 steps had a non-finite loss or gradient and were skipped, the first '
            'no later than step 5, the last at step 9'
        )
    )
    assert 'on_nonfinite = stop to see where it begins' in said
    assert done.stderr.count('not_finite, warning: ') == 1 and re.search(
        "doctor's verdict: warning: .*not_finite", done.stdout
    )
    again = train_here(
        tmp_path / 'skip', '--on_nonfinite=skip', '--init_from=resume', '--max_iters=30'
    )
    assert (
        re.search("doctor's verdict: warning: .*not_finite", again.stdout)
        and len(findings(tmp_path / 'skip')) == 1
    )
    poison({3, 4}, 'gradient')
    assert (
        train_here(tmp_path / 'few', '--on_nonfinite=skip').returncode == 0
        and findings(tmp_path / 'few') == []
    )


def test_overflows_of_float16_are_no_finding(train_here, poison, tmp_path):
    poison({0, 1, 2, 5}, 'gradient')
    done = train_here(tmp_path / 'run', '--dtype=float16', '--on_nonfinite=skip')
    assert done.returncode == 0 and findings(tmp_path / 'run') == []
    poison({0, 1, 2, 5}, 'loss')
    train_here(tmp_path / 'loss', '--dtype=float16', '--on_nonfinite=skip')
    assert [step for step, _ in findings(tmp_path / 'loss')] == [3]


def test_a_warning_of_steps_left_out_gives_way_to_the_end(train_here, poison, tmp_path):
    poison({2, 6, 8, 12, 13, 14}, 'loss')
    done = train_here(tmp_path / 'run')
    found = [(step, said.partition(':')[0]) for step, said in findings(tmp_path / 'run')]
    assert done.returncode == 3 and found == [(9, 'warning'), (15, 'critical')]
    assert (
        "doctor's verdict: critical: not_finite" in done.stdout
        and done.stdout.count('not_finite') == 1
    )


def test_rewinding_is_a_warning_where_many_steps_were_not_finite(train_here, poison, tmp_path):
    poison({12, 13, 14}, 'loss')
    train_here(tmp_path / 'run', '--on_nonfinite=rewind')
    ((step, said),) = findings(tmp_path / 'run')
    assert (
        step == 10
        and said.startswith('warning: 3 of 15 steps ')
        and 'the first no later than step 13, the last at step 15; then the run returned to step 10'
        in said
        and 'on_nonfinite = rewind' not in said  # it does so already
    )


def test_a_rewind_repeats_no_warning_about_steps_skipped_before_it(train_here, poison, tmp_path):
    """Three single steps are reported at step 15; three in a row then return to step 10."""
    poison({10, 12, 14, 16, 17, 18}, 'loss')
    done = train_here(tmp_path / 'run', '--on_nonfinite=rewind')
    assert done.returncode == 0 and done.stderr.count('not_finite') == 1
    assert 'step 15: not_finite, warning: 3 of 15 steps ' in done.stderr
    ((step, said),) = findings(tmp_path / 'run')
    assert step == 10 and said.startswith('warning: 3 of 15 steps ')
    assert 'the last at step 15; then the run returned to step 10. Likely' in said
    assert done.stdout.count('not_finite') == 1  # in the verdict


def test_rewind_goes_back_and_passes_over_the_batches_that_led_there(train_here, poison, tmp_path):
    computed = poison({12, 13, 14}, 'loss')
    flags = ['--on_nonfinite=rewind', '--dropout=0.1']
    done = train_here(tmp_path / 'run', *flags)
    assert done.returncode == 0 and 'returning to the last checkpoint' in done.stderr
    assert computed == [*range(15), *range(15, 25)]
    found, tensors = store.load(tmp_path / 'run')
    assert found.step == 20 and found.state['train']['passed_over'] == 5
    assert [r['step'] for r in records(tmp_path / 'run') if 'loss/step' in r] == list(range(1, 21))
    computed.clear()  # and a run that is cut after it goes on with the same batches
    train_here(tmp_path / 'cut', *flags, '--eval_interval=5', '--max_iters=15')
    train_here(tmp_path / 'cut', *flags, '--eval_interval=5', '--init_from=resume')
    assert computed == [*range(25)]
    assert equal(tensors_at(tmp_path / 'cut', 20), tensors_at(tmp_path / 'run', 20))


def test_a_rewind_that_does_not_help_ends(train_here, poison, tmp_path):
    computed = poison(range(12, 1000), 'gradient')
    done = train_here(tmp_path / 'run', '--on_nonfinite=rewind')
    assert (
        done.returncode == 3
        and done.stderr.count('returning to the last checkpoint') == guard.MAX_REWINDS
    )
    assert computed[:15] == [*range(15)] and len(computed) < 15 + 3 * (guard.MAX_REWINDS + 1)
    assert store.load(tmp_path / 'run')[0].step == 10
    poison(range(3, 1000), 'gradient')
    done = train_here(tmp_path / 'new', '--on_nonfinite=rewind')
    assert done.returncode == 3 and 'there is no checkpoint yet' in done.stderr


@pytest.mark.slow
def test_rewinds_are_counted_also_where_a_checkpoint_comes_between_bad_steps(
    train_here, poison, tmp_path
):
    poison(range(6, 1000), 'loss')
    done = train_here(tmp_path / 'run', '--on_nonfinite=rewind', '--eval_interval=1')
    assert (
        done.returncode == 3
        and done.stderr.count('returning to the last checkpoint') == guard.MAX_REWINDS
    )


def test_a_loss_scale_that_only_falls_ends_the_run(train_here, poison, tmp_path):
    """From 65,536 to below 1 in 17 steps: then it is not the scale."""
    poison(range(1000), 'gradient')
    done = train_here(tmp_path / 'run', '--dtype=float16', '--eval_interval=100')
    assert done.returncode == 3 and 'step 17: ' in done.stderr


POISONED_RANK = """
import hashlib, math, os, sys, torch, train
original, kept = train.accumulate_gradients, []
def poisoned(t, micro_batches, step):
    kept.append(t.model)
    loss = original(t, micro_batches, step)
    if (step, t.ranks.rank) not in ((4, 1), (7, 1), (8, 1), (9, 1)):
        return loss
    if WHAT == 'loss':
        return loss * math.nan
    # The ranks have exchanged their gradients already.
    next(t.model.parameters()).grad[0, 0] = math.inf
    return loss
train.accumulate_gradients = poisoned
code = train.main(sys.argv[1:])
weights = b''.join(p.detach().numpy().tobytes() for p in kept[-1].parameters())
finite = all(p.isfinite().all() for p in kept[-1].parameters())
print(f'rank {os.environ["RANK"]}: exit {code}, finite {finite}, '
      f'{hashlib.sha256(weights).hexdigest()}', flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_what_is_not_finite_on_one_rank_reaches_the_weights_of_none(data_dir, tmp_path, what):
    flags = [f'--data_dir={data_dir}', f'--out_dir={tmp_path / "run"}', '--eval_interval=5']
    started = start_on_ranks(
        2, tmp_path, POISONED_RANK.replace('WHAT', repr(what)), *SMALL_RUN, *flags
    )
    assert [rank.end() for rank in started] == [0, 0]
    said, errors = (
        ''.join(getattr(rank, name) for rank in started) for name in ('stdout', 'stderr')
    )
    ranks = re.findall(r'rank \d: exit (\d), finite (\w+), ([0-9a-f]{64})', said)
    assert len(ranks) == 2 and ranks[0] == ranks[1] and ranks[0][:2] == ('3', 'True'), said + errors
    assert 'step 5: loss or gradients not finite: not applied' in errors
    assert 'step 10: loss or gradients not finite, 3 steps in a row' in errors
    assert store.load(tmp_path / 'run')[0].step == 5


def test_the_first_module_and_parameter_that_are_not_finite_are_named():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=31, block_size=16, n_layer=3, n_head=2, n_embd=32))
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = math.inf
    ids = torch.randint(31, (2, 16))
    with guard.watch_outputs(model) as outputs:
        model(ids, ids).backward()
    names = guard.nonfinite_parameters(model)
    assert outputs[0] == 'transformer.h.1.mlp.c_fc' and 'transformer.h.0.attn' not in outputs
    assert 'transformer.h.1.mlp.c_fc.weight' in names
    assert (
        f'parameters affected: {", ".join(names[:3])} and {len(names) - 3} more'
        in guard.describe(outputs, names)
    )
    model(ids, ids)
    assert outputs.count('transformer.h.1.mlp.c_fc') == 1  # it watches no longer


def test_the_norm_of_finite_gradients_is_said_to_overflow():
    assert 'the norm of finite gradients can overflow' in guard.describe([], [])
    assert 'overflow' not in guard.describe(['ln_f'], []) + guard.describe([], ['ln_f.weight'])


@given(
    st.lists(
        st.sampled_from([(1.0, 1.0), (math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)]),
        max_size=30,
    ),
    st.sampled_from([None, 1, 2, 3]),
    st.booleans(),
    st.integers(0, 2),
)
def test_bad_steps_are_counted_as_a_plain_loop_counts_them(steps, limit, float16, before):
    bad_steps = guard.BadSteps(limit, 'cpu', float16)
    bad_steps.reset(before)
    in_a_row, total, since = before, 0, 0
    for loss, norm in steps:
        latched = limit is not None and in_a_row >= limit
        usable = bad_steps.usable(torch.tensor(loss), torch.tensor(norm))
        assert bool(usable) == (math.isfinite(loss) and math.isfinite(norm) and not latched)
        bad = not math.isfinite(loss) or not (float16 or math.isfinite(norm))
        if bad and not latched:
            in_a_row, total, since = in_a_row + 1, total + 1, 0
        else:
            in_a_row, since = in_a_row if latched else 0, since + 1
    for n, new in ((len(steps), total), (0, 0)):
        seen = bad_steps.look(100, torch.amp.GradScaler('cpu', enabled=False))
        assert (seen.in_a_row, seen.steps, seen.new, seen.last) == (in_a_row, n, new, 100 - since)
        assert seen.ending == (limit is not None and in_a_row >= limit)
