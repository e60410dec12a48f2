"""Each problem is reported once, where it begins, and none in healthy runs."""

import math
import re

import pytest
from signs import FIRING, GUESS, diagnose, loss_at, make_doctor, names_of, ratio, show

from nib.doctor import rules
from nib.doctor.doctor import Doctor
from nib.doctor.problems import PROBLEMS
from nib.guard import Seen


def beginner() -> Doctor:
    """Of a long run, with a loss above the entropy of its tokens to the end."""
    return make_doctor({'max_iters': 3000}, {'entropy': 1.0})


@pytest.mark.parametrize('name', FIRING)
def test_a_problem_is_named_once_and_alone(name):
    doctor, found = diagnose(name)
    assert names_of(found) == [name] and found == doctor.findings
    assert found[0].step <= (300 if name == 'generation_differs' else 270) and re.search(
        r'\d', found[0].evidence
    )
    severity = PROBLEMS[name].severity
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


def test_all_problems_but_the_one_that_the_loop_sees_are_fired_here():
    functions = {
        *rules.DATA_RULES,
        *rules.STEP_RULES,
        *rules.EVALUATION_RULES,
        *rules.GENERATION_RULES,
    }
    names = {function.__name__ for function in functions}
    assert (
        set(FIRING)
        == set(PROBLEMS) - {'not_finite'}
        == names - {function.__name__ for function in rules.NAMES}
    )


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
        ([(299, 3)], True),
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
        assert (
            f'the first no later than step {first}, the last at step {step - 1}'
            in found[0].evidence
        )
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
    assert names_of(doctor.see_nonfinite(301, 'NaN')) == ['not_finite']
    assert doctor.verdict(300) == 'critical: diverging, not_finite'


def test_collapsed_attention_is_a_learning_rate_too_high():
    found = show(
        make_doctor(),
        evaluation=lambda s: {'attention_logit': 500.0, 'attention_entropy': 0.01} if s else {},
    )
    assert (
        names_of(found) == ['lr_too_high']
        and 'attention' in found[0].evidence
        and '500' in found[0].evidence
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
def test_where_a_problem_begins(name):
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
        names.append(names_of(found))
    assert names == [[], [name]]


def later(signs, after=100, until=300):
    return lambda s: signs if after < s <= until else {}


def rise(by, noise=0.0):
    """The loss falls until step 100, and is then higher by this much."""
    lowest = sum(map(loss_at, range(90, 100))) / 10
    return lambda s: (
        {'losses': [lowest + by * (s > 100) + noise, lowest + by * (s > 100) - noise] * 5}
        if s >= 100
        else {}
    )


def evaluated(train, val):
    return lambda s: {'train_loss': train(s), 'val_loss': val(s)}


def best_at_90(rise, until=300):
    return evaluated(lambda s: 2.0 - s / 3000, lambda s: 2.0 + rise * (90 < s <= until))


def gap(by, **changes):
    return {'evaluation': evaluated(lambda s: 2.0, lambda s: 2.0 + by), **changes}


def slope(by):
    """The losses fall by this much from an evaluation to the next."""
    return evaluated(lambda s: 3.0 - by * s / 30, lambda s: 1.01 * (3.0 - by * s / 30))


NO_CLIP = {'grad_clip': 0.0}
LEARNING = {'data': {'entropy': 1.0}, 'config': {'max_iters': 3000}}  # as beginner()
SMALL = {'n_params': 768}  # 200 tokens for each
EPOCHS = {'train_tokens': 75_000}  # 2.05 in 300 steps
NORM = math.sqrt(4 * 128)  # of the gradients: four layers of width 128
START = 0.1 + 0.0512 + 3 * math.sqrt(0.0512 / 512) + 0.15  # a variance of 0.02^2 * 128, 512 tokens
# Problem; changes to the doctor and the vital signs, just within its limit and just outside.
LIMITS = [
    ('wrong_initial_loss', {'start': GUESS + START - 0.01}, {'start': GUESS + START + 0.01}),
    ('wrong_initial_loss', {'start': GUESS - START + 0.01}, {'start': GUESS - START - 0.01}),
    (
        'no_warmup',
        FIRING['no_warmup'] | {'config': {'warmup_iters': 10}},
        FIRING['no_warmup'] | {'config': {'warmup_iters': 9}},
    ),
    (
        'tiny_vocabulary',
        FIRING['tiny_vocabulary'] | {'data': {'vocab_size': 4096, 'sampled': 4 * 4096}},
        FIRING['tiny_vocabulary'] | {'data': {'vocab_size': 4096, 'sampled': 4 * 4096 + 1}},
    ),
    (
        'lr_too_low',
        LEARNING | {'step': later(ratio(1e-5) | {'learning_rate': 4.9e-4})},
        LEARNING | {'step': later(ratio(1e-5) | {'learning_rate': 5.1e-4})},
    ),
    ('diverging', {'step': rise(0.14), 'last': 120}, {'step': rise(0.16), 'last': 120}),
    ('diverging', {'step': rise(0.86, 0.5), 'last': 120}, {'step': rise(0.93, 0.5), 'last': 120}),
    ('plateau', {'step': later(ratio(1.1e-7), 150)}, {'step': later(ratio(0.9e-7), 150)}),
    ('plateau', {'step': later(ratio(0.0), 220)}, {'step': later(ratio(0.0), 210)}),  # 80% of 300
    (
        'plateau',
        {'step': lambda s: {'losses': [3.0 - 2.9e-4 * s] * 10} if s > 1 else {}},
        {'step': lambda s: {'losses': [3.0 - 2.3e-4 * s] * 10} if s > 1 else {}},
    ),
    (
        'exploding_gradients',
        {'config': NO_CLIP, 'step': later({'grad_norms': [1.0, 0.99 * NORM]})},
        {'config': NO_CLIP, 'step': later({'grad_norms': [1.0, 1.01 * NORM]})},
    ),
    (
        'vanishing_gradients',
        {'step': later({'losses': [2.96] * 10, 'grad_norms': [0.001] * 10}, 20), 'last': 60},
        {'step': later({'losses': [2.98] * 10, 'grad_norms': [0.001] * 10}, 20), 'last': 60},
    ),
    (
        'all_clipped',
        {'step': later({'grad_norms': [8.0] * 10}, 0, 40)},  # from the end of the warm-up, 20, on
        {'step': later({'grad_norms': [8.0] * 10}, 0, 50)},
    ),
    (
        'weight_decay_too_strong',
        {'step': later({'weight_rms': {'attention': 0.02, 'mlp': 0.0151}})},
        {'step': later({'weight_rms': {'attention': 0.02, 'mlp': 0.0149}})},
    ),
    (
        'throughput_collapse',
        {'step': lambda s: {'tokens_per_second': 1e5 if s < 100 else 3e4 if s % 20 else 5e4}},
        {'step': later({'tokens_per_second': 3e4})},
    ),
    (
        'lr_too_high',
        {'evaluation': later({'attention_logit': 500.0, 'attention_entropy': 0.11})},
        {'evaluation': later({'attention_logit': 500.0, 'attention_entropy': 0.09})},
    ),
    (
        'lr_too_high',
        {'evaluation': later({'attention_logit': 199.0, 'attention_entropy': 0.01})},
        {'evaluation': later({'attention_logit': 201.0, 'attention_entropy': 0.01})},
    ),
    ('overfitting', {'evaluation': best_at_90(0.019)}, {'evaluation': best_at_90(0.021)}),
    ('overfitting', {'evaluation': best_at_90(0.5, 120)}, {'evaluation': best_at_90(0.5, 150)}),
    ('overfitting', gap(0.19, **EPOCHS), gap(0.21, **EPOCHS)),
    ('overfitting', gap(0.21, train_tokens=77_000), gap(0.21, **EPOCHS)),
    ('underfitting', gap(0.02, n_params=769), gap(0.02, **SMALL)),
    ('underfitting', gap(0.061, **SMALL), gap(0.059, **SMALL)),
    ('underfitting', SMALL | {'evaluation': slope(0.145)}, SMALL | {'evaluation': slope(0.131)}),
    (
        'batch_too_small',
        {'evaluation': lambda s: {'noise_scale': 40.0 if s == 30 else None}},
        {'evaluation': lambda s: {'noise_scale': 40.0 if s in (30, 60) else None}},
    ),
]


@pytest.mark.parametrize('name, within, outside', LIMITS)
def test_the_limit_of_a_problem(name, within, outside):
    for changes, names in ((within, []), (outside, [name])):
        signs = {
            key: changes[key] for key in ('step', 'evaluation', 'start', 'last') if key in changes
        }
        doctor = make_doctor(**{key: changes[key] for key in changes.keys() - signs.keys()})
        assert names_of(show(doctor, **signs)) == names


@pytest.mark.parametrize(
    'rule, there',
    [('lr_too_high', 2), ('lr_too_low', 3), ('all_clipped', 4), ('vanishing_gradients', 2)],
)
def test_what_passes_is_no_problem(rule, there):
    """A sign must last so many lines in a row."""
    vital_signs = FIRING[rule]['step'](50)
    for lines, names in ((there - 1, []), (there, [rule])):
        found = show(beginner(), step=lambda s: vital_signs if 100 < s <= 100 + 10 * lines else {})
        assert names_of(found) == names, lines


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
        assert names_of(found) == names and all(120 <= finding.step <= 130 for finding in found)


def test_passages_of_a_text_that_is_mostly_one_token_come_again_by_chance():
    assert make_doctor(data={'leaked': 1.0, 'entropy': 0.03}).see_data() == []
    assert names_of(make_doctor(data={'leaked': 1.0, 'entropy': math.log(2)}).see_data()) == [
        'val_leaked'
    ]


@pytest.mark.parametrize(
    'noise, words',
    [(40.0, 'about 40 batches of 512 tokens'), (math.inf, 'more than a thousand batches')],
)
def test_noise_is_told_in_batches(noise, words):
    (found,) = show(make_doctor(), evaluation=lambda s: {'noise_scale': noise})
    assert found.name == 'batch_too_small' and words in found.evidence


def test_a_loss_that_is_learned_needs_no_gradient():
    for loss, names in (
        (0.001, []),
        (3.2, ['vanishing_gradients']),
    ):  # nats; the text's entropy is 3.3
        found = show(
            make_doctor(),
            step=lambda s: {'losses': [loss] * 10, 'grad_norms': [0.001] * 10} if s > 1 else {},
            last=50,
        )
        assert names_of(found) == names


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
        ({'batch_size': 1, 'block_size': 15}, {}, []),  # the same 49 nats come again
        ({}, {'entropy': 0.02}, []),  # a text that is nearly all one token
        ({'batch_size': 1, 'block_size': 16}, {}, ['constant_batches']),
    ],
)
def test_batches_that_are_the_same_by_chance_are_no_problem(config, data, names):
    found = show(
        make_doctor(config, data), step=lambda s: {'repeated': 1.0 if s > 1 else None}, last=50
    )
    assert names_of(found) == names
    assert show(make_doctor(), step=lambda s: {'repeated': 0.995 if s > 1 else None}, last=50) == []


def test_training_may_add_to_the_loss():
    assert show(make_doctor(), step=lambda s: {'losses': [9.0]} if s == 1 else {}) == []


@pytest.mark.parametrize(
    ('start', 'said', 'unsaid'),
    [
        (GUESS + 1, ['weights are too large', 'standard deviation'], ['leak']),
        (GUESS - 1, ['leak'], ['weights are too large', 'standard deviation']),
    ],
)
def test_the_advice_for_a_wrong_initial_loss_fits_its_direction(start, said, unsaid):
    (finding,) = show(make_doctor(), start=start)
    assert all(words in str(finding) for words in said)
    assert not any(words in str(finding) for words in unsaid)


def test_a_model_that_learnt_before_may_begin_as_it_likes():
    for name in ('wrong_initial_loss', 'lr_too_low', 'tiny_vocabulary'):
        changes = FIRING[name]
        doctor = make_doctor(trained=True, data=changes.get('data'))
        options = {key: changes[key] for key in ('step', 'start') if key in changes}
        assert show(doctor, **options) == [], name


def test_a_model_that_has_learned_may_go_on_with_a_low_rate():
    for entropy, names in ((2.5, []), (1.0, ['lr_too_low'])):  # the loss is 2.3 at step 100
        found = show(make_doctor(data={'entropy': entropy}), step=lambda s: ratio(1e-5), first=100)
        assert names_of(found) == names


def test_a_short_pause_of_the_machine_is_no_collapse():
    steps = (
        512 / 2e4 * 10
    )  # seconds that ten steps take while it lasts, so four lines make a second
    for lines, names in ((3, []), (5, ['throughput_collapse'])):
        found = show(
            make_doctor(),
            step=lambda s: {'tokens_per_second': 2e4 if 100 < s <= 100 + 10 * lines else 1e5},
        )
        assert names_of(found) == names and 0.2 < steps < 0.3


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
    assert names_of(found) == ['throughput_collapse']
    assert ('the run waits for a core 40% of the time' in found[0].evidence) == named
    assert ('use the cores' in str(found[0].causes)) == named
    assert ('the disk' in str(found[0].causes)) != named
    assert ('OMP_NUM_THREADS' in str(found[0].changes)) == named


def test_a_text_of_another_kind_is_not_called_overfitting():
    doctor = make_doctor(data={'distance': 0.2})
    found = show(doctor, evaluation=FIRING['overfitting']['evaluation'])
    assert names_of(found) == ['different_texts']


@pytest.mark.parametrize(
    ('height', 'named'), [(math.log(65) + 0.21, [('diverging', 150)]), (math.log(65) + 0.19, [])]
)
def test_a_loss_above_that_of_a_guess_diverges_at_once_and_a_lower_peak_does_not(height, named):
    found = show(make_doctor(), step=lambda s: {'losses': [height] * 10} if s == 150 else {})
    assert [(finding.name, finding.step) for finding in found] == named


def test_a_rate_that_is_usual_and_yet_teaches_nothing_is_too_low():
    found = show(make_doctor(), step=lambda s: {'losses': [4.1 - s / 1000] * 10, **ratio(0.001)})
    assert [(finding.name, finding.step) for finding in found] == [('lr_too_low', 80)]


def test_steps_that_contradict_the_evaluation_have_other_targets():
    found = show(
        make_doctor(),
        step=lambda s: {'losses': [math.exp(-s / 30)] * 10} if s > 1 else {},
        evaluation=lambda s: {'train_loss': 8.0, 'val_loss': 8.0} if s else {},
    )
    assert [(finding.name, finding.step) for finding in found] == [('targets_not_shifted', 60)]
    assert 'a loss of 0.135' in found[0].evidence and '8.000' in found[0].evidence


def test_a_batch_that_is_learned_by_heart_is_no_contradiction():
    found = show(
        make_doctor(),
        step=lambda s: {'losses': [math.exp(-s / 30)] * 10, 'repeated': 1.0} if s > 1 else {},
        evaluation=lambda s: {'train_loss': 8.0, 'val_loss': 8.0} if s else {},
    )
    assert names_of(found) == ['constant_batches']


def test_an_evaluation_long_after_the_last_line_contradicts_nothing():
    found = show(
        make_doctor(),
        log_interval=100,  # evaluations after each 30 steps
        step=lambda s: {'losses': [1.0] * 10} if s > 1 else {},
        evaluation=lambda s: {'train_loss': 8.0, 'val_loss': 8.0} if s else {},
    )
    assert 'targets_not_shifted' not in names_of(found)


def test_gradients_that_are_cleared_before_the_step_are_no_low_rate():
    found = show(
        make_doctor(),
        step=lambda s: {
            'losses': [GUESS] * 10,
            'block_grad_rms': [0.0] * 4,
            'update_ratio': dict.fromkeys(('attention', 'mlp', 'embedding'), 0.0),
        },
    )
    assert names_of(found)[0] == 'vanishing_gradients' and 'lr_too_low' not in names_of(found)
    assert 'gets gradients of 0, although their norm is 0.5' in found[0].evidence
    assert str(found[0]).endswith('Change: clear gradients after the step of the optimizer')


def test_a_loss_that_explodes_is_no_low_rate():
    found = show(
        make_doctor(), step=lambda s: {'losses': [4.2 + 5.0 * (s > 1)] * 10, **ratio(1e-5)}
    )
    assert 'lr_too_low' not in names_of(found) and 'diverging' in names_of(found)
