"""The doctor reports each trouble once, and nothing in healthy runs; a run obeys it."""

import json
import math
import re
import statistics
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, SMALL_RUN, records
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import TRAIN, Started, start_on_ranks

import configurator
import model
from nib.doctor import rules
from nib.doctor.doctor import KEPT, Doctor, Line, LossWindow
from nib.doctor.rules import mean_loss
from nib.doctor.texts import DataSigns
from nib.doctor.troubles import TROUBLES, Finding
from nib.doctor.vitals import EvaluationSigns, StepSigns
from nib.errors import EXIT_FINDING
from nib.guard import Seen
from nib.tokens import batches, find

BLOCK = configurator.read_block(str(ROOT / 'train.py'))
DEFAULTS = BLOCK.defaults
CONFIG = DEFAULTS | {
    'n_layer': 4,
    'n_embd': 128,
    'max_iters': 300,
    'lr_decay_iters': 300,
    'warmup_iters': 20,
    'learning_rate': 1e-3,
    'batch_size': 16,
    'block_size': 32,
    'gradient_accumulation_steps': 1,
    'eval_iters': 20,
}
DATA = DataSigns(
    vocab_size=65,
    used=60,
    sampled=100_000,
    entropy=3.3,
    leaked=0.0,
    distance=0.01,
    usual_distance=0.01,
)


def loss_at(step: int) -> float:
    return 1.5 + (math.log(65) - 1.5) * math.exp(-step / 80)


def step_signs(step: int, n: int = 1, **changes) -> StepSigns:
    """Those of a healthy run."""
    losses = [loss_at(s) + 0.02 * (-1) ** s for s in range(step - n, step)]
    return replace(
        StepSigns(
            step,
            1e-3 * min(1.0, step / 20),
            losses,
            [0.5] * n,
            {'attention': 0.004, 'mlp': 0.003, 'embedding': 0.05},
            {'attention': 0.02, 'mlp': 0.02, 'embedding': 0.02},
            [1e-3] * 4,
            None if step == 1 else 0.06,
            1.0,
            0.04,
            1e5,
        ),
        **changes,
    )


def evaluation_signs(step: int, **changes) -> EvaluationSigns:
    return replace(
        EvaluationSigns(step, loss_at(step), 1.01 * loss_at(step), 0.0, 5.0, 0.7, 1.0, 0.5),
        **changes,
    )


def make_doctor(
    config=None, data=None, n_params=100_000, train_tokens=1_000_000, trained=False
) -> Doctor:
    return Doctor(
        CONFIG | (config or {}), replace(DATA, **data or {}), n_params, train_tokens, trained
    )


def show(
    doctor: Doctor,
    step=lambda s: {},
    evaluation=lambda s: {},
    generation=None,
    log_interval=10,
    first=0,
    last=300,
) -> list[Finding]:
    """Returns the findings of a healthy run whose vital signs step() and evaluation() change."""
    found = doctor.see_data()
    logged = first
    for s in range(first, last + 1):
        if s % log_interval == 0 and s > first or s == 1:
            found += doctor.see_step(step_signs(s, s - logged, **step(s)))
            logged = s
        if s % 30 == 0:
            found += doctor.see_evaluation(evaluation_signs(s, **evaluation(s)))
    return found + doctor.see_generation(last, generation)


def beginner() -> Doctor:
    """Of a long run, with a loss above the entropy of its tokens to the end."""
    return make_doctor({'max_iters': 3000}, {'entropy': 1.0})


def ratio(value):
    return {'update_ratio': {'attention': value / 2, 'mlp': value, 'embedding': 0.01}}


def rising(s):
    return {'losses': [loss_at(s) + 2.0 * (s > 100)] * 10}


# name -> changes to a healthy run that show this trouble and no other
FIRING = {
    'diverging': {'step': rising},
    'lr_too_high': {'step': lambda s: ratio(0.2)},
    'lr_too_low': {'step': lambda s: ratio(1e-5)},
    'plateau': {
        'step': lambda s: (
            {'losses': [max(loss_at(s), 3.0) + 0.01 * (-1) ** i for i in range(10)]}
            if s > 1
            else {}
        )
    },
    'exploding_gradients': {
        'config': {'grad_clip': 0.0},
        'step': lambda s: {'grad_norms': [1.0, 1e3]},
    },
    'vanishing_gradients': {'step': lambda s: {'block_grad_rms': [1e-9, 1e-7, 1e-5, 1e-3]}},
    'all_clipped': {'step': lambda s: {'grad_norms': [8.0] * 10}},
    'no_warmup': {'config': {'warmup_iters': 0}, 'step': lambda s: ratio(0.5) if s == 1 else {}},
    'overfitting': {
        'evaluation': lambda s: {'train_loss': 2.0 - s / 300, 'val_loss': 2.0 + abs(s - 90) / 100}
    },
    'underfitting': {
        'n_params': 500,
        'evaluation': lambda s: {'train_loss': 2.0, 'val_loss': 2.02},
    },
    'constant_batches': {'step': lambda s: {'repeated': 1.0 if s > 1 else None}},
    'tiny_vocabulary': {
        'data': {'vocab_size': 4096},
        'step': lambda s: {'losses': [math.log(4096)]} if s == 1 else {},
    },
    'different_texts': {'data': {'distance': 0.2}},
    'targets_not_shifted': {'step': lambda s: {'shifted': 0.04, 'copied': 1.0}},
    'val_leaked': {'data': {'leaked': 0.8}},
    'dead_units': {'evaluation': lambda s: {'dead_units': 0.6}},
    'wrong_initial_loss': {'step': lambda s: {'losses': [9.0]} if s == 1 else {}},
    'throughput_collapse': {'step': lambda s: {'tokens_per_second': 2e4 if s > 100 else 1e5}},
    'float16_underflow': {'step': lambda s: {'loss_scale': 65536.0 / 2 ** (s // 10)}},
    'weight_decay_too_strong': {
        'step': lambda s: {
            'weight_rms': {'attention': 0.02, 'mlp': 0.02 * math.exp(-s / 300), 'embedding': 0.02}
        }
    },
    'batch_too_small': {'evaluation': lambda s: {'noise_scale': 40.0}},
    'generation_differs': {'generation': 'after 252 tokens, the logits differ by 31%'},
}


def diagnose(name: str, **options):
    changes = FIRING[name]
    doctor = make_doctor(
        **{key: changes[key] for key in ('config', 'data', 'n_params') if key in changes}
    )
    return doctor, show(
        doctor,
        **{key: changes[key] for key in ('step', 'evaluation', 'generation') if key in changes},
        **options,
    )


# -- the rules -------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', FIRING)
def test_a_trouble_is_named_once_and_alone(name):
    doctor, found = diagnose(name)
    assert [finding.name for finding in found] == [name] and found == doctor.findings
    assert found[0].step <= (300 if name == 'generation_differs' else 270) and re.search(
        r'\d', found[0].evidence
    )
    severity = TROUBLES[name].severity
    assert doctor.verdict(300) == f'{severity}: {name}'
    assert str(found[0]).startswith(
        f'{severity}: {found[0].evidence}. Likely causes'
    ) and ' Change: ' in str(found[0])
    assert (
        show(
            doctor,
            first=300,
            last=400,
            **{
                key: FIRING[name][key]
                for key in ('step', 'evaluation', 'generation')
                if key in FIRING[name]
            },
        )
        == []
    )


def test_all_troubles_but_the_one_that_the_loop_sees_are_fired_here():
    functions = {
        *rules.DATA_RULES,
        *rules.STEP_RULES,
        *rules.EVALUATION_RULES,
        *rules.GENERATION_RULES,
    }
    names = {function.__name__ for function in functions}
    assert set(FIRING) == set(TROUBLES) - {'not_finite'} == names - {'attention_collapsed'}


@pytest.mark.parametrize('log_interval', [1, 10, 100, 1000])
@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'trained': True},
        {'config': {'optimizer': 'muon'}},
        {'config': {'optimizer': 'sgd'}},
        {'config': {'grad_clip': 0.0}},
    ],
    ids=str,
)
def test_a_healthy_run_is_left_alone(changes, log_interval):
    doctor = make_doctor(**changes)
    assert show(doctor, log_interval=log_interval) == []
    assert (
        doctor.verdict(300) == 'healthy, no findings in 300 steps'
        and doctor.verdict(1) == 'healthy, no findings in 1 step'
    )


@pytest.mark.parametrize(
    'seen, named',
    [
        ([(100, 2)], False),
        ([(100, 3)], True),
        ([(300, 0), (10, 3)], False),
        ([(100, 1), (100, 1), (99, 1)], True),
        ([(100, 1)] * 3, False),
    ],
)
def test_steps_left_out_are_many_from_three_and_more_than_a_hundredth(seen, named):
    doctor, step, found = make_doctor(), 0, []
    for n, bad in seen:
        step += n
        found += doctor.see_bad_steps(step, Seen(bad, n, bad, step - 1, False, ''))
    assert [(finding.name, finding.severity) for finding in found] == [
        ('not_finite', 'warning')
    ] * named
    if named:
        assert doctor.see_bad_steps(step + 10, Seen(9, 10, 9, step + 10, False, '')) == []  # once
        first = seen[0][0] - 1
        assert f'{sum(bad for _, bad in seen)} of {step} steps' in found[0].evidence
        assert f'the first by step {first}, the last was step {step - 1}' in found[0].evidence
        other = make_doctor()
        other.recall([{'step': step, 'finding/not_finite': str(found[0])}])
        assert other.verdict(step) == 'warning: not_finite' and [
            f.name for f in show(other, step=lambda s: ratio(0.5))
        ]  # it looks on
        assert [f.severity for f in other.see_nonfinite(step, 'NaN')] == ['critical']


def test_not_finite_is_what_the_loop_says_and_ends_the_search():
    doctor = make_doctor()
    found = doctor.see_nonfinite(7, 'step 7: loss not finite')
    assert [(finding.name, finding.step, finding.evidence) for finding in found] == [
        ('not_finite', 7, 'step 7: loss not finite')
    ]
    assert doctor.see_nonfinite(9, 'again') == [] and show(doctor, step=lambda s: ratio(0.5)) == []
    assert doctor.verdict(300) == 'critical: not_finite'


def test_a_diverging_run_may_still_become_not_finite_but_nothing_else():
    doctor, found = diagnose('diverging')
    assert show(doctor, first=300, last=400, step=lambda s: ratio(0.5)) == []
    assert [finding.name for finding in doctor.see_nonfinite(301, 'NaN')] == ['not_finite']
    assert doctor.verdict(300) == 'critical: diverging, not_finite'


def test_collapsed_attention_is_a_learning_rate_too_high():
    found = show(
        make_doctor(),
        evaluation=lambda s: {'attention_logit': 500.0, 'attention_entropy': 0.01} if s else {},
    )
    assert (
        [finding.name for finding in found] == ['lr_too_high']
        and 'attention' in found[0].evidence
        and '500' in found[0].evidence
    )


def test_the_verdict_goes_by_severity():
    doctor = make_doctor(data={'leaked': 1.0}, n_params=500)
    show(
        doctor,
        step=lambda s: {'grad_norms': [8.0] * 10},
        evaluation=lambda s: {'train_loss': 2.0, 'val_loss': 2.01, 'dead_units': 0.5},
    )
    assert (
        doctor.verdict(300)
        == 'critical: val_leaked; warning: dead_units, all_clipped; note: underfitting'
    )


ALWAYS = {  # name of the rule -> vital signs just within its bounds, and just outside
    'targets_not_shifted': ('step', {'shifted': 0.995}, {'shifted': 0.985}),
    'lr_too_high': ('step', ratio(0.099), ratio(0.101)),  # twice five times 0.01
    'lr_too_low': ('step', ratio(2.1e-4), ratio(1.9e-4)),  # a fifth of 0.001
    'vanishing_gradients': (
        'step',
        {'block_grad_rms': [1.1e-6, 1e-3, 1e-3]},
        {'block_grad_rms': [0.9e-6, 1e-3, 1e-3]},
    ),
    'all_clipped': ('step', {'grad_norms': [9.0, 4.9]}, {'grad_norms': [9.0, 5.1]}),
    'float16_underflow': ('step', {'loss_scale': 1024.0}, {'loss_scale': 512.0}),
    'dead_units': ('evaluation', {'dead_units': 0.1}, {'dead_units': 0.11}),
    'batch_too_small': ('evaluation', {'noise_scale': 9.9}, {'noise_scale': 10.1}),
    'val_leaked': ('data', {'leaked': 0.25}, {'leaked': 0.26}),
    'tiny_vocabulary': (
        'data',
        {'vocab_size': 10_000, 'used': 500},
        {'vocab_size': 10_000, 'used': 499},
    ),
    'different_texts': ('data', {'distance': 0.0299}, {'distance': 0.0301}),
}


@pytest.mark.parametrize('name', ALWAYS)
def test_where_a_trouble_begins(name):
    kind, *sides = ALWAYS[name]
    names = []
    for vital_signs in sides:
        found = (
            make_doctor(data=vital_signs).see_data()
            if kind == 'data'
            else show(
                beginner(), **{kind: lambda s: vital_signs if s > 1 or kind != 'step' else {}}
            )
        )
        names.append([finding.name for finding in found])
    assert names == [[], [name]]


@pytest.mark.parametrize(
    'rule, there',
    [('lr_too_high', 2), ('lr_too_low', 3), ('all_clipped', 4), ('vanishing_gradients', 2)],
)
def test_what_passes_is_no_trouble(rule, there):
    """A sign must last so many lines in a row."""
    vital_signs = FIRING[rule]['step'](50)
    for lines, names in ((there - 1, []), (there, [rule])):
        found = show(beginner(), step=lambda s: vital_signs if 100 < s <= 100 + 10 * lines else {})
        assert [finding.name for finding in found] == names, lines


@pytest.mark.parametrize('log_interval', [1, 5, 10])
def test_one_window_that_stands_out_is_no_divergence(log_interval):
    for rise, names in ((range(100, 110), []), (range(100, 301), ['diverging'])):

        def step(s):
            return {
                'losses': [
                    loss_at(i) + 2.0 * (i in rise) for i in range(max(0, s - log_interval), s)
                ]
            }

        found = show(
            make_doctor({'log_interval': log_interval}), step=step, log_interval=log_interval
        )
        assert [finding.name for finding in found] == names and all(
            120 <= finding.step <= 130 for finding in found
        )


def test_passages_of_a_text_that_is_mostly_one_token_come_again_by_chance():
    assert make_doctor(data={'leaked': 1.0, 'entropy': 0.03}).see_data() == []
    assert [
        finding.name
        for finding in make_doctor(data={'leaked': 1.0, 'entropy': math.log(2)}).see_data()
    ] == ['val_leaked']


@pytest.mark.parametrize(
    'noise, words',
    [(40.0, 'about 40 batches of 512 tokens'), (math.inf, 'more than a thousand batches')],
)
def test_noise_is_told_in_batches(noise, words):
    (found,) = show(make_doctor(), evaluation=lambda s: {'noise_scale': noise})
    assert found.name == 'batch_too_small' and words in found.evidence


def test_a_loss_that_is_learnt_needs_no_gradient():
    for loss, names in (
        (0.001, []),
        (3.2, ['vanishing_gradients']),
    ):  # nats; the text's entropy is 3.3
        found = show(
            make_doctor(),
            step=lambda s: {'losses': [loss] * 10, 'grad_norms': [0.001] * 10} if s > 1 else {},
            last=50,
        )
        assert [finding.name for finding in found] == names


def test_steps_that_were_not_finite_are_no_vanishing_gradient():
    found = show(
        make_doctor(),
        step=lambda s: {
            'losses': [math.nan],
            'grad_norms': [math.inf],
            'block_grad_rms': [0.0] * 4,
        },
        last=50,
    )
    assert found == []


@pytest.mark.parametrize(
    'config, data, names',
    [
        ({}, {}, ['constant_batches']),
        ({'batch_size': 1, 'block_size': 8}, {}, []),  # the same eight characters come again
        ({}, {'entropy': 0.02}, []),  # a text that is nearly all one token
        ({'batch_size': 1, 'block_size': 32}, {'vocab_size': 65}, ['constant_batches']),
    ],
)
def test_batches_that_are_the_same_by_chance_are_no_trouble(config, data, names):
    found = show(
        make_doctor(config, data), step=lambda s: {'repeated': 1.0 if s > 1 else None}, last=50
    )
    assert [finding.name for finding in found] == names
    assert show(make_doctor(), step=lambda s: {'repeated': 0.995 if s > 1 else None}, last=50) == []


def test_a_model_that_learnt_before_may_begin_as_it_likes():
    for name in ('wrong_initial_loss', 'lr_too_low', 'tiny_vocabulary'):
        changes = FIRING[name]
        doctor = make_doctor(trained=True, data=changes.get('data'))
        assert show(doctor, step=changes['step']) == [], name


def test_a_model_that_has_learnt_may_go_on_with_a_low_rate():
    for entropy, names in ((2.5, []), (1.0, ['lr_too_low'])):  # the loss is 2.3 at step 100
        found = show(make_doctor(data={'entropy': entropy}), step=lambda s: ratio(1e-5), first=100)
        assert [finding.name for finding in found] == names


def test_a_short_pause_of_the_machine_is_no_collapse():
    steps = (
        512 / 2e4 * 10
    )  # seconds that ten steps take while it lasts, so four lines make a second
    for lines, names in ((3, []), (5, ['throughput_collapse'])):
        found = show(
            make_doctor(),
            step=lambda s: {'tokens_per_second': 2e4 if 100 < s <= 100 + 10 * lines else 1e5},
        )
        assert [finding.name for finding in found] == names and 0.2 < steps < 0.3


@pytest.mark.parametrize(
    'before, after, named',
    [(0.001, 0.4, True), (0.001, 0.05, False), (0.4, 0.4, False), (None, None, False)],
    ids=['taken', 'slow data', 'always busy', 'unknown'],
)
def test_a_slow_run_names_other_processes_only_if_it_waits_for_cores(before, after, named):
    found = show(
        make_doctor(),
        step=lambda s: {
            'tokens_per_second': 2e4 if s > 100 else 1e5,
            'core_wait': after if s > 100 else before,
        },
    )
    assert [finding.name for finding in found] == ['throughput_collapse']
    assert ('the run waits for a core 40% of the time' in found[0].evidence) == named
    assert ('taken the cores' in str(found[0].causes)) == named
    assert ('the disk' in str(found[0].causes)) != named
    assert ('OMP_NUM_THREADS' in str(found[0].changes)) == named


def test_a_text_of_another_kind_is_not_called_overfitting():
    doctor = make_doctor(data={'distance': 0.2})
    found = show(doctor, evaluation=FIRING['overfitting']['evaluation'])
    assert [finding.name for finding in found] == ['different_texts']


# -- what it remembers -----------------------------------------------------------------------------


def test_windows_are_means_over_the_steps_of_at_least_ten():
    losses = [loss_at(s) + 0.3 * math.sin(7 * s) for s in range(100)]
    doctor, ends, logged = make_doctor(), [1, 4, 6, 13, 14, 33, 34, 35, 50, 57, 100], 0
    for end in ends:
        doctor.see_step(step_signs(end, losses=losses[logged:end]))
        logged = end
    first = 0
    assert [window.step for window in doctor.windows] == [13, 33, 50, 100]
    for window in doctor.windows:
        mine = losses[first : window.step]
        assert window.loss == pytest.approx(statistics.fmean(mine))
        assert window.error == pytest.approx(statistics.pstdev(mine) / math.sqrt(len(mine)))
        first = window.step
    assert doctor.lowest == min(doctor.windows[:-1], key=lambda window: window.loss)


def test_a_window_over_lines_weighs_them_by_their_steps():
    window = LossWindow.over([Line(3, 3, 2.0, 0.5, 1.0), Line(4, 1, 6.0, 0.0, 1.0)])
    assert (window.step, window.loss) == (4, 3.0)
    assert window.error == pytest.approx(math.sqrt((3 * (0.5 + 1) + 9) / 4 / 4))


def test_the_error_of_a_mean_is_the_larger_of_two_estimates():
    near = [LossWindow(10, 2.0, 0.3), LossWindow(20, 2.0, 0.4)]
    assert mean_loss(near) == (2.0, pytest.approx(0.25))  # sqrt(0.3^2 + 0.4^2) / 2
    apart = [LossWindow(10, 1.0, 0.3), LossWindow(20, 3.0, 0.4)]
    assert mean_loss(apart) == (2.0, pytest.approx(statistics.pstdev([1.0, 3.0]) / math.sqrt(2)))


def test_a_long_run_is_remembered_in_part():
    doctor = make_doctor({'max_iters': 100_000})
    for s in range(10, 40_000, 10):
        doctor.see_step(step_signs(s, 10))
    assert KEPT / 2 <= len(doctor.lines) <= KEPT and len(doctor.windows) <= KEPT
    assert doctor.lines[0].step == 10 and doctor.lines[-1].step == 39_990
    steps = [line.step for line in doctor.lines]
    assert steps == sorted(steps) and steps[-400:] == list(range(36_000, 40_000, 10))


def test_what_was_found_before_is_not_said_again():
    doctor, _ = diagnose('all_clipped')
    other = make_doctor(data={'leaked': 1.0})
    other.recall(
        [
            {'step': 5, 'loss/step': 3.0},
            {'step': 10, 'finding/all_clipped': 'warning: ...'},
            {'step': 0, 'finding/val_leaked': '...'},
            {'step': 12, 'finding/of_a_later_version': '...'},
        ]
    )
    assert show(other, step=FIRING['all_clipped']['step']) == []
    assert other.verdict(300) == 'critical: val_leaked; warning: all_clipped'


def recorded(evaluation=lambda s: {}, last=300) -> list[dict]:
    """The lines that a run of 300 steps leaves of its evaluations."""
    shown = [evaluation_signs(s, **evaluation(s)) for s in range(0, last + 1, 30)]
    return [
        json.loads(
            json.dumps(
                {
                    'step': vital_signs.step,
                    'loss/train': vital_signs.train_loss,
                    'loss/val': vital_signs.val_loss,
                }
                | vital_signs.metrics()
            )
        )
        for vital_signs in shown
    ]


def test_a_resumed_run_is_compared_with_its_evaluations_before():
    overfitting = FIRING['overfitting']['evaluation']  # best at step 90
    doctor = make_doctor()
    doctor.recall(recorded(overfitting, last=90))
    (finding,) = show(doctor, evaluation=overfitting, first=91)
    assert (finding.name, finding.step) == (
        'overfitting',
        150,
    ) and 'best: 2.000 at step 90' in finding.evidence
    assert doctor.evaluations == [evaluation_signs(s, **overfitting(s)) for s in range(0, 301, 30)]
    slow = (
        {'n_params': 500},
        lambda s: {'train_loss': 3.0 - s / 150, 'val_loss': 3.01 - s / 150},
    )  # a gain of less than 5 % from 210 to 240
    doctor = make_doctor(**slow[0])
    doctor.recall(recorded(slow[1], last=210))
    assert show(doctor, evaluation=slow[1], first=211, last=240) == []
    doctor = make_doctor(n_params=500)
    doctor.recall(recorded(FIRING['underfitting']['evaluation'], last=210))
    assert [
        finding.name
        for finding in show(doctor, evaluation=FIRING['underfitting']['evaluation'], first=211)
    ] == ['underfitting']


def test_what_a_rewound_run_undid_is_forgotten():
    doctor, (finding,) = diagnose('diverging')
    doctor.rewind(90)
    assert (
        doctor.findings == [] and doctor.lines[-1].step == 90 and doctor.evaluations[-1].step == 90
    )
    again = make_doctor()
    show(again, step=rising, last=90)
    assert (doctor.lines, doctor.windows, doctor.lowest) == (
        again.lines,
        again.windows,
        again.lowest,
    )
    found = []
    for s in range(100, 300, 10):
        found += doctor.see_step(step_signs(s, 10, **rising(s)))
    assert [(f.name, f.step) for f in found] == [('diverging', finding.step)]


# -- whatever it is shown --------------------------------------------------------------------------

numbers = st.floats(width=32) | st.sampled_from([0.0, 1e-9, 0.5, 3.0, 1e9, math.inf, math.nan])
groups = st.fixed_dictionaries(dict.fromkeys(('attention', 'mlp', 'embedding'), numbers))
steps = st.builds(
    StepSigns,
    st.integers(1, 300),
    st.floats(0, 10),
    st.lists(numbers, min_size=1, max_size=12),
    st.lists(numbers, min_size=1, max_size=12),
    groups,
    groups,
    st.lists(numbers, min_size=1, max_size=3),
    st.none() | st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(1e-3, 1e12),
    st.none() | st.floats(2**-20, 2**40),
)
evaluations = st.builds(
    EvaluationSigns,
    st.integers(0, 300),
    numbers,
    numbers,
    st.floats(0, 1),
    numbers,
    numbers,
    numbers,
    st.none() | st.floats(0) | st.just(math.inf),
)
data_signs = st.builds(
    DataSigns,
    st.integers(2, 100_000),
    st.integers(1, 100_000),
    st.integers(1, 1 << 18),
    st.floats(0, 12),
    st.floats(0, 1),
    st.floats(0, 0.7),
    st.floats(0, 0.7),
)
configs = st.fixed_dictionaries(
    {
        'n_layer': st.integers(1, 50),
        'batch_size': st.integers(1, 9),
        'block_size': st.integers(1, 9),
        'warmup_iters': st.integers(0, 300),
        'grad_clip': st.sampled_from([0.0, 1.0]),
        'learning_rate': st.sampled_from([0.0, 1e-3]),
        'max_iters': st.integers(1, 400),
        'optimizer': st.sampled_from(['adamw', 'muon', 'sgd']),
        'beta1': st.sampled_from([0.0, 0.9]),
    }
)


@settings(max_examples=150)
@given(configs, data_signs, st.booleans(), st.lists(steps | evaluations, max_size=15))
def test_no_signs_confuse_it(config, data, trained, shown):
    doctor = Doctor(CONFIG | config, data, 1000, 10_000, trained)
    found = doctor.see_data()
    for vital_signs in shown:
        found += (
            doctor.see_step(vital_signs)
            if isinstance(vital_signs, StepSigns)
            else doctor.see_evaluation(vital_signs)
        )
    names = [finding.name for finding in found]
    assert (
        len(names) == len(set(names)) and set(names) <= set(TROUBLES) and found == doctor.findings
    )
    assert doctor.verdict(300).startswith(('healthy', 'critical', 'warning', 'note')) and all(
        str(finding) for finding in found
    )


# -- what it says ----------------------------------------------------------------------------------


@pytest.mark.parametrize('name', TROUBLES)
def test_what_to_change_can_be_changed(name):
    causes, changes = (
        [entry if isinstance(entry, str) else entry[1] for entry in advice]
        for advice in (TROUBLES[name].causes, TROUBLES[name].changes)
    )
    assert causes and changes and not any(text.endswith('.') for text in causes + changes)
    change = '; '.join(changes)
    for word in re.findall(r'\b[a-z]+(?:_[a-z]+)+\b(?!\.py)', change) + re.findall(
        r'--(\w+)', change
    ):
        assert word in DEFAULTS or word == 'tokenizer' or hasattr(model, word), (
            word
        )  # prepare.py's; a function of model.py
    for script in re.findall(r'\w+\.py', change):
        assert (ROOT / script).exists() or script == 'prepare.py'
    for key, value in re.findall(
        r'\b(\w+)(?: =)? (adamw|muon|gelu|relu2|swiglu|float32|bfloat16|rewind|skip)\b', change
    ):
        if key in DEFAULTS:
            configurator.resolve(BLOCK, [f'--{key}={value}'])


@pytest.mark.parametrize(
    ('name', 'config', 'advised'),
    [
        ('diverging', {'grad_clip': 0.0}, 'grad_clip = 1'),
        ('not_finite', {'dtype': 'float16'}, 'dtype bfloat16 or float32'),
        ('lr_too_high', {}, 'or set qk_norm'),
        ('plateau', {'lr_decay_iters': 30}, 'lr_decay_iters = max_iters'),
        ('all_clipped', {'grad_clip': 0.01}, 'grad_clip = 1'),
        ('dead_units', {'mlp': 'relu2'}, 'mlp gelu or swiglu'),
        ('dead_units', {'bias': True}, 'bias = False'),
    ],
)
def test_advice_fits_the_config(name, config, advised):
    opposite = {
        'qk_norm': True,
        'bias': False,
        'mlp': 'gelu',
        'dtype': 'float32',
        'grad_clip': 1.0,
        'min_lr': 1e-4,
    }
    assert advised in str(Finding.of(name, 1, 'a figure', CONFIG | config))
    assert advised not in str(Finding.of(name, 1, 'a figure', CONFIG | opposite))


@pytest.mark.parametrize('zero_init', [False, True])
@pytest.mark.parametrize('tied_head', [False, True])
def test_a_tied_head_is_to_blame_only_behind_blocks_that_begin_as_the_identity(
    zero_init, tied_head
):
    said = str(
        Finding.of(
            'wrong_initial_loss',
            1,
            'a figure',
            CONFIG | {'zero_init': zero_init, 'tied_head': tied_head},
        )
    )
    assert ('a tied head' in said) == ('tied_head = False' in said) == (zero_init and tied_head)


@pytest.mark.parametrize(
    ('height', 'named'), [(math.log(65) + 0.5, [('diverging', 150)]), (math.log(65) - 0.5, [])]
)
def test_a_loss_above_that_of_a_guess_diverges_at_once_and_a_lower_peak_does_not(height, named):
    found = show(make_doctor(), step=lambda s: {'losses': [height] * 10} if s == 150 else {})
    assert [(finding.name, finding.step) for finding in found] == named


def test_a_rate_that_is_usual_and_yet_teaches_nothing_is_too_low():
    found = show(make_doctor(), step=lambda s: {'losses': [4.1 - s / 1000] * 10, **ratio(0.001)})
    assert [(finding.name, finding.step) for finding in found] == [('lr_too_low', 80)]


@pytest.mark.parametrize('name', [*TROUBLES, 'healthy'])
def test_the_lab_has_a_config_that_says_what_it_breaks(name):
    lines = (ROOT / f'config/lab/{name}.py').read_text().splitlines()
    assert lines[0].startswith('# ') and len(lines[0]) > 20
    assert f"out_dir = 'out-lab-{name.replace('_', '-')}'" in lines
    assert name == 'healthy' or "include('healthy.py')" in lines


def test_the_lab_breaks_nothing_without_a_name():
    assert {path.stem for path in (ROOT / 'config/lab').glob('*.py')} == {*TROUBLES, 'healthy'}


# -- in a run --------------------------------------------------------------------------------------


def findings(out_dir) -> list[tuple[int, str]]:
    return [
        (record['step'], key.removeprefix('finding/'))
        for record in records(out_dir)
        for key in record
        if key.startswith('finding/')
    ]


def unshifted(monkeypatch):
    cut_windows = batches.cut_windows
    monkeypatch.setattr(
        batches, 'cut_windows', lambda *arguments: (cut_windows(*arguments)[0],) * 2
    )


def test_a_critical_finding_ends_the_run_which_can_go_on(train_here, tmp_path, monkeypatch):
    unshifted(monkeypatch)
    done = train_here(tmp_path / 'run', '--stop_on=critical')
    assert (
        done.returncode == 4
        and 'stopped by the doctor after step 1, which is saved; to resume: ' in done.stdout
    )
    assert done.stderr.count('step 1: targets_not_shifted, critical: ') == 1
    assert findings(tmp_path / 'run')[0] == (1, 'targets_not_shifted')
    (verdict,) = [record['verdict'] for record in records(tmp_path / 'run') if 'verdict' in record]
    assert f'verdict of the doctor: {verdict}\n' in done.stdout and verdict.startswith(
        'critical: targets_not_shifted'
    )
    done = train_here(tmp_path / 'run', '--stop_on=critical', '--init_from=resume')
    assert done.returncode == 0 and 'resuming' in done.stdout and 'step 20:' in done.stdout
    assert done.stderr.count('targets_not_shifted') == 0 and findings(tmp_path / 'run')[0] == (
        1,
        'targets_not_shifted',
    )


def test_a_finding_is_a_warning_unless_the_config_says_stop(train_here, tmp_path, monkeypatch):
    unshifted(monkeypatch)
    done = train_here(tmp_path / 'run', '--max_iters=3')
    assert done.returncode == 0 and 'step 1: targets_not_shifted, critical: ' in done.stderr


def test_a_finding_before_the_first_step_stops_too(train_here, tmp_path, monkeypatch):
    opened = find.open_dataset
    monkeypatch.setattr(
        find, 'open_dataset', lambda *arguments: replace(data := opened(*arguments), train=data.val)
    )
    done = train_here(tmp_path / 'run', '--stop_on=critical')
    assert done.returncode == 4 and findings(tmp_path / 'run') == [(0, 'val_leaked')]
    assert 'stopped by the doctor after step 0, with nothing new to save\n' in done.stdout


def test_a_finding_of_the_last_evaluation_leaves_it_whole(train_here, tmp_path, monkeypatch):
    reset = model.GPT.reset_parameters

    def reset_closed(self):
        reset(self)
        torch.nn.init.constant_(self.transformer.h[0].mlp.c_fc.bias, -10.0)

    monkeypatch.setattr(model.GPT, 'reset_parameters', reset_closed)
    losses = []
    for stop_on, code in (('critical', 0), ('warning', 4)):
        done = train_here(
            tmp_path / stop_on,
            '--bias',
            '--max_iters=8',
            '--lr_decay_iters=8',
            '--eval_interval=8',
            '--log_interval=1000',
            f'--stop_on={stop_on}',
        )
        assert done.returncode == code and 'signal' not in done.stdout, done.stderr
        assert (8, 'dead_units') in findings(tmp_path / stop_on)
        losses += [
            record['loss/val_whole']
            for record in records(tmp_path / stop_on)
            if 'loss/val_whole' in record
        ]
    assert len(losses) == 2 and losses[0] == losses[1]


def test_a_resumed_run_says_nothing_twice(train_here, tmp_path):
    first = train_here(tmp_path / 'run', '--grad_clip=0.001')
    second = train_here(
        tmp_path / 'run',
        '--grad_clip=0.001',
        '--init_from=resume',
        '--max_iters=30',
        '--lr_decay_iters=30',
    )
    assert (first.stderr.count('all_clipped'), second.stderr.count('all_clipped')) == (1, 0)
    assert (
        'all_clipped' in second.stdout
        and [name for _, name in findings(tmp_path / 'run')].count('all_clipped') == 1
    )


@pytest.mark.parametrize('weights, names', [('scratch', ['lr_too_low']), ('{other}', [])])
def test_a_resumed_run_is_judged_by_how_it_began(run_main, data_dir, tmp_path, weights, names):
    """Cut before the doctor could tell, twice."""

    def lab(name, out_dir, *flags):
        done = run_main(
            'train.py',
            f'config/lab/{name}.py',
            *LAB_FLAGS,
            f'--data_dir={data_dir}',
            f'--out_dir={out_dir}',
            '--lr_decay_iters=40',
            *flags,
        )
        assert done.returncode == 0, done.stderr
        return done

    if weights != 'scratch':
        lab('healthy', tmp_path / 'other', '--max_iters=2')
    first = lab(
        'lr_too_low',
        tmp_path / 'run',
        '--max_iters=7',
        f'--init_from={weights.format(other=tmp_path / "other")}',
    )
    second = lab('lr_too_low', tmp_path / 'run', '--max_iters=9', '--init_from=resume')
    assert (
        'verdict of the doctor: healthy' in first.stdout
        and 'verdict of the doctor: healthy' in second.stdout
    )
    third = lab('lr_too_low', tmp_path / 'run', '--max_iters=40', '--init_from=resume')
    assert [name for _, name in findings(tmp_path / 'run')] == names and (
        'lr_too_low, warning: ' in third.stderr
    ) == bool(names)
    began = json.loads((tmp_path / 'run' / 'config.json').read_text())['config']['init_from']
    assert began == weights.format(other=tmp_path / 'other')


@pytest.mark.slow
def test_two_ranks_stop_together(data_dir, tmp_path):
    flags = [
        f'--data_dir={data_dir}',
        f'--out_dir={tmp_path / "run"}',
        '--stop_on=warning',
        '--learning_rate=1',
        '--on_nonfinite=skip',
        '--eval_interval=2',
    ]
    ranks = start_on_ranks(2, tmp_path, TRAIN, *SMALL_RUN, *flags)
    assert [rank.end() for rank in ranks] == [EXIT_FINDING] * 2, ranks[0].stderr
    said = ranks[0].stdout
    assert 'stopped by the doctor after step' in said and 'which is saved' in said
    assert said.count('verdict of the doctor') == 1 and ranks[1].stdout == ''
    assert len(set(findings(tmp_path / 'run'))) == len(findings(tmp_path / 'run')) > 0


LAB_FLAGS = [
    '--dataset=tiny',
    '--no-prepare_dataset',
    '--fallback_dataset=',
    '--device=cpu',
    '--no-report',
]


@pytest.mark.parametrize(
    'name, flags',
    [
        ('healthy', ['--max_iters=120']),
        ('all_clipped', ['--max_iters=40']),
        ('lr_too_low', ['--max_iters=40']),
        ('not_finite', ['--max_iters=40']),
    ],
)
def test_the_doctor_names_what_a_config_of_the_lab_breaks(
    run_main, data_dir, tmp_path, name, flags
):
    done = run_main(
        'train.py',
        f'config/lab/{name}.py',
        *LAB_FLAGS,
        *flags,
        f'--data_dir={data_dir}',
        f'--out_dir={tmp_path / "run"}',
    )
    assert done.returncode == (3 if name == 'not_finite' else 0), done.stderr
    found = [finding for _, finding in findings(tmp_path / 'run')]
    if name != 'healthy':
        assert found == [name]
        verdict = f'{TROUBLES[name].severity}: {name}'
    else:
        assert found == []
        verdict = 'healthy, no findings in 120 steps'
    assert f'verdict of the doctor: {verdict}\n' in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('name', ['wrong_initial_loss', 'val_leaked', 'generation_differs'])
def test_the_doctor_names_what_a_config_of_the_lab_breaks_in_the_code(data_dir, tmp_path, name):
    """In a process of its own, as these change the project's functions."""
    flags = [
        *LAB_FLAGS,
        '--max_iters=2',
        '--warmup_iters=1',
        '--eval_interval=1000',
        f'--data_dir={data_dir}',
        f'--out_dir={tmp_path / "run"}',
    ]
    run = Started(tmp_path, TRAIN, f'config/lab/{name}.py', *flags)
    assert run.end() == 0 and name in run.stderr, run.stderr
    assert name in [found for _, found in findings(tmp_path / 'run')]
