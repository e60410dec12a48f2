"""What the doctor remembers of a run, and its verdict."""

import json
import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from signs import (
    CONFIG,
    FIRING,
    diagnose,
    evaluation_signs,
    loss_at,
    make_doctor,
    names_of,
    ratio,
    rising,
    show,
    step_signs,
)

from nib.doctor.doctor import KEPT, Doctor, Line, LossWindow
from nib.doctor.problems import PROBLEMS
from nib.doctor.rules import mean_loss
from nib.doctor.texts import DataSigns
from nib.doctor.vitals import EvaluationSigns, StepSigns


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
    )  # a gain of less than 5% from 210 to 240
    doctor = make_doctor(**slow[0])
    doctor.recall(recorded(slow[1], last=210))
    assert show(doctor, evaluation=slow[1], first=211, last=240) == []
    doctor = make_doctor(n_params=500)
    doctor.recall(recorded(FIRING['underfitting']['evaluation'], last=210))
    assert names_of(show(doctor, evaluation=FIRING['underfitting']['evaluation'], first=211)) == [
        'underfitting'
    ]


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


def test_after_a_rewind_a_sign_must_last_as_long_again():
    high = ratio(0.2)  # two lines in a row are a learning rate that is too high
    doctor = make_doctor()
    show(doctor, last=90)
    assert doctor.see_step(step_signs(100, 10, **high)) == []
    doctor.rewind(90)
    assert doctor.see_step(step_signs(100, 10, **high)) == []
    (finding,) = doctor.see_step(step_signs(110, 10, **high))
    assert finding.name == 'lr_too_high'


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
    names = names_of(found)
    assert (
        len(names) == len(set(names)) and set(names) <= set(PROBLEMS) and found == doctor.findings
    )
    assert doctor.verdict(300).startswith(('healthy', 'critical', 'warning', 'note')) and all(
        str(finding) for finding in found
    )
