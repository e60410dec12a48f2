"""Checkpoints: complete or absent, checked when read, and named by `latest` and `best`."""

import errno
import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import run_script

from model import GPT, GPTConfig
from nib.checkpoint import store
from nib.checkpoint.replacing import put_back, set_aside
from nib.checkpoint.start import check_readable, check_shapes
from nib.checkpoint.writer import CheckpointWriter
from nib.errors import UserError
from stress import corruption


def save(out_dir, step, value=None, best=False):
    tensors = {'w': torch.full((4, 3), float(step if value is None else value))}
    folder = store.save(out_dir, step, tensors, {'w/exp_avg': tensors['w'] * 2}, {'note': step})
    if best:
        store.record_evaluation(out_dir, step, {'evaluated': step}, best=True)
    return folder


def value_of(out_dir, which, **options):
    found, tensors = store.load(out_dir, which, **options)
    return (
        found.step,
        tensors['model']['w'][0, 0].item(),
        tensors['optimizer']['w/exp_avg'][0, 0].item(),
    )


def test_what_was_saved_is_loaded_by_name_and_by_step(tmp_path):
    save(tmp_path, 10, best=True)
    save(tmp_path, 20)
    assert value_of(tmp_path, 'latest') == (20, 20.0, 40.0)
    assert value_of(tmp_path, 'best') == (10, 10.0, 20.0)
    assert value_of(tmp_path, '20') == (20, 20.0, 40.0)
    assert (tmp_path / 'latest').read_text() == 'step-00000020\n'
    assert sorted(p.name for p in (tmp_path / 'step-00000010').iterdir()) == [
        'model.safetensors',
        'optimizer.safetensors',
        'state.json',
    ]


def test_a_step_says_that_it_is_the_best_if_there_are_newer_ones(tmp_path):
    save(tmp_path, 10, best=True)
    assert store.load(tmp_path, '10')[0].describe_step() == 'step 10'
    save(tmp_path, 20)
    said = 'step 10 (the best; the newest is step 20)'
    assert store.load(tmp_path, '10')[0].describe_step() == said
    assert store.load(tmp_path, '20')[0].describe_step() == 'step 20'
    shutil.rmtree(tmp_path / 'step-00000020')
    found, _ = store.load(tmp_path, 'best')
    shutil.rmtree(tmp_path / 'step-00000010')
    assert found.describe_step() == 'step 10'


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 10, value=7)
    assert value_of(tmp_path, 'latest') == (10, 7.0, 14.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['latest', 'step-00000010']


@pytest.mark.parametrize('file', ['model.safetensors', 'optimizer.safetensors', 'state.json'])
@pytest.mark.parametrize('damage', ['flip', 'cut', 'remove', 'of another step'])
def test_a_damaged_checkpoint_is_passed_over_for_the_newest_good_one(tmp_path, file, damage):
    save(tmp_path, 10)
    save(tmp_path, 20)
    path = tmp_path / 'step-00000020' / file
    content = bytearray(path.read_bytes())
    if damage == 'flip':
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == 'cut':
        path.write_bytes(content[:-1])
    elif damage == 'remove':
        path.unlink()
    else:
        path.write_bytes((tmp_path / 'step-00000010' / file).read_bytes())
    warnings = []
    assert value_of(tmp_path, 'latest', warn=warnings.append) == (10, 10.0, 20.0)
    assert len(warnings) == 1 and file in warnings[0] and 'step-00000020' in warnings[0]
    with pytest.raises(UserError, match='step-00000020'):
        store.load(tmp_path, '20')


def test_an_error_while_saving_leaves_what_was_there(tmp_path):
    save(tmp_path, 10)
    with pytest.raises(TypeError):
        store.save(tmp_path, 20, {}, {}, {'not JSON': object()})
    assert value_of(tmp_path, 'latest') == (10, 10.0, 20.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['latest', 'step-00000010']


def test_what_an_evaluation_told_is_part_of_the_checkpoint(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20)
    store.record_evaluation(tmp_path, 10, {'best_val_loss': 1.5}, best=True)
    store.record_evaluation(tmp_path, 20, {'best_val_loss': 1.5}, best=False)
    assert value_of(tmp_path, 'best') == (10, 10.0, 20.0) and value_of(tmp_path, 'latest') == (
        20,
        20.0,
        40.0,
    )
    for which in ('best', 'latest'):
        found, _ = store.load(tmp_path, which)
        assert found.state['train'] == {'best_val_loss': 1.5} and found.state['note'] == found.step


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == 'win32', reason='limits of a process are a Unix thing')
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path):
    """In a new process, whose files are limited to 500 bytes from the second save on."""
    done = run_script(
        '-c',
        'import resource, signal, sys, torch\n'
        'from nib.checkpoint import store\n'
        'w = {"w": torch.ones(1000)}\n'
        'store.save(sys.argv[1], 10, w, w, {})\n'
        'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
        'resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n'
        'for folder, step in ((sys.argv[1], 20), (sys.argv[2], 1)):\n'
        '    try: store.save(folder, step, w, w, {})\n'
        '    except ValueError as error: print(error)\n',
        tmp_path / 'run',
        tmp_path / 'new',
    )
    second, first = done.stdout.splitlines()
    assert 'step 20 could not be written' in second and '--init_from=resume' in second, done.stderr
    assert 'step 1 could not be written' in first and 'start again' in first
    assert store.load(tmp_path / 'run')[0].step == 10
    assert sorted(path.name for path in (tmp_path / 'run').iterdir()) == ['latest', 'step-00000010']


def test_pruning_keeps_the_newest_the_latest_and_the_best(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, best=step == 2)
    store.prune(tmp_path, 3, keep_last=1)  # newer ones are left alone
    assert sorted(store.steps_after(tmp_path, 0)) == [2, 3, 4, 5, 6]
    store.point(tmp_path, 'latest', tmp_path / 'step-00000003')
    store.prune(tmp_path, 6, keep_last=2)
    assert sorted(store.steps_after(tmp_path, 0)) == [2, 3, 5, 6]


@pytest.mark.parametrize(
    'which, said',
    [('latest', 'train first'), ('7', 'no checkpoint of step 7'), ('newest', "'best'")],
)
def test_a_checkpoint_that_is_not_there_is_a_user_error(tmp_path, which, said):
    with pytest.raises(UserError, match=said):
        store.load(tmp_path, which)
    with pytest.raises(UserError, match='no such folder'):
        store.load(tmp_path / 'nowhere', which)


def test_a_name_cannot_lead_out_of_the_run(tmp_path):
    save(tmp_path / 'other', 30)
    save(tmp_path / 'run', 10)
    (tmp_path / 'run' / 'latest').write_text('../other/step-00000030\n')
    assert value_of(tmp_path / 'run', 'latest')[0] == 10


def test_state_is_plain_json_with_the_digest_of_every_file(tmp_path):
    folder = save(tmp_path, 10)
    state = json.loads((folder / 'state.json').read_text())
    assert state['step'] == 10 and state['note'] == 10
    assert set(state['files']) == {'model.safetensors', 'optimizer.safetensors'}


@pytest.mark.slow
def test_no_damage_is_loaded_without_a_word(capsys):
    """200 damages of all kinds at random places, in one to three checkpoints."""
    assert corruption.main(['--damages=200']) == 0, capsys.readouterr().out
    assert 'loaded without a word: 0 of 200' in capsys.readouterr().out


def test_a_state_that_says_the_same_in_other_bytes_is_damaged(tmp_path):
    path = save(tmp_path, 10) / 'state.json'
    path.write_bytes(path.read_bytes().replace(b': ', b':  ', 1))
    with pytest.raises(UserError, match='state.json'):
        store.load(tmp_path)


def test_what_was_newest_when_the_machine_stopped_is_the_latest(tmp_path):
    """Between the renaming of a folder and that of `latest`."""
    save(tmp_path, 10)
    before = (tmp_path / 'latest').read_bytes()
    save(tmp_path, 20)
    (tmp_path / 'latest').write_bytes(before)
    assert value_of(tmp_path, 'latest', warn=pytest.fail)[0] == 20


def test_a_step_that_was_being_saved_again_counts_under_the_name_it_was_put_aside_with(tmp_path):
    save(tmp_path, 10)
    folder = save(tmp_path, 20, best=True)
    aside = folder.rename(tmp_path / f'.tmp-replaced-{folder.name}')
    for which in ('latest', 'best', '20'):
        assert value_of(tmp_path, which, warn=pytest.fail)[0] == 20
    assert aside.exists() and not folder.exists()  # loading repairs nothing
    store.clear_leftovers(tmp_path)
    assert folder.exists() and not aside.exists()


def test_a_checkpoint_that_the_run_deletes_while_it_is_read_is_not_called_damaged(tmp_path):
    save(tmp_path, 10)

    def run_goes_on(found, tensors):
        if found.step == 10:
            save(tmp_path, 20)
            store.prune(tmp_path, 20, keep_last=1)
            raise store.Damaged('a file is gone')

    assert value_of(tmp_path, 'latest', warn=pytest.fail, check=run_goes_on)[0] == 20


def test_what_a_kill_left_is_gone_after_the_next_save(tmp_path):
    save(tmp_path, 10)
    for name in ('.tmp-step-00000020', '.tmp-deleted-step-00000005', '.tmp-replaced-step-00000010'):
        (tmp_path / name).mkdir()
    for name in ('.latest.1.tmp', '.metrics.jsonl.1.tmp', 'step-00000010/.state.json.1.tmp'):
        (tmp_path / name).write_text('half')
    (tmp_path / '.notes').write_text("the user's own")
    own = f'.config.json.{os.getpid()}.tmp'
    (tmp_path / own).write_text('being written by another thread')
    save(tmp_path, 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        own,
        '.notes',
        'latest',
        'step-00000010',
        'step-00000020',
    ]
    assert len(list((tmp_path / 'step-00000010').iterdir())) == 3


def save_model(out_dir, step, model_tensors=None, optimizer=None, **config):
    shape = dict(vocab_size=11, block_size=8, n_layer=1, n_head=1, n_embd=4)
    model = GPT(GPTConfig(**shape)).state_dict()
    name = next(iter(model))
    store.save(
        out_dir,
        step,
        {**model, **(model_tensors or {})},
        {
            f'{name}/exp_avg': torch.zeros_like(model[name]),
            f'{name}/step': torch.tensor(1.0),
            **(optimizer or {}),
        },
        {'model': {**shape, **config}},
    )


@pytest.mark.parametrize(
    'wrong, said',
    [
        ({'n_embd': 8}, 'of shape (12,), but model.py has shape (24,); it was trained with'),
        ({'n_layer': 2}, 'lacks transformer.h.1.attn.c_attn.bias, which model.py has'),
        ({'rotary_basis': 1}, 'state.json: its model cannot be built'),
        ({'model_tensors': {'other': torch.ones(2)}}, 'has other, which model.py lacks'),
        ({'optimizer': {'other/step': torch.ones(())}}, 'optimizer.safetensors has other/step'),
    ],
)
def test_tensors_of_another_model_are_passed_over_by_name(tmp_path, wrong, said):
    save_model(tmp_path, 10)
    save_model(tmp_path, 20, **wrong)
    warnings = []
    found, _ = store.load(tmp_path, warn=warnings.append, check=check_shapes)
    assert found.step == 10 and len(warnings) == 1 and said in warnings[0]


def test_optimizer_state_may_have_any_shape(tmp_path):
    """Shampoo keeps a square matrix for each dimension of a parameter, for example."""
    save_model(tmp_path, 10, optimizer={'transformer.wte.weight/left': torch.ones(3, 3)})
    found, _ = store.load(tmp_path, check=check_shapes)
    assert found.step == 10


def test_a_model_whose_checkpoints_could_not_be_read_is_refused():
    model = GPT(GPTConfig(vocab_size=3, block_size=4, n_layer=1, n_head=1, n_embd=4))
    model.teachers = (torch.nn.Linear(2, 2),)
    check_readable(model)
    model.teacher = model.teachers[0]
    with pytest.raises(UserError, match='has teacher.bias, which model.py lacks, so its checkp'):
        check_readable(model)


def test_checkpoints_that_are_set_aside_are_there_until_the_next_run_has_saved(tmp_path):
    save(tmp_path, 10, best=True)
    save(tmp_path, 20)
    (tmp_path / 'metrics.jsonl').write_text('old')
    before = content_of(tmp_path)
    set_aside(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['.replaced']
    with pytest.raises(
        UserError, match='the run that was to be replaced is in .*replaced: use this'
    ):
        store.load(tmp_path)
    assert value_of(tmp_path / '.replaced', 'latest')[0] == 20
    (tmp_path / 'metrics.jsonl').write_text('new')  # of a run that saves nothing
    put_back(tmp_path)
    assert content_of(tmp_path) == before
    set_aside(tmp_path)
    writer = CheckpointWriter(tmp_path, keep_last=1)
    writer.save(5, {}, {}, {})
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['latest', 'step-00000005']


def content_of(folder):
    """The content of every file, by its path."""
    files = (path for path in folder.rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize('undo', [False, True], ids=['aside', 'back'])
def test_a_crash_at_any_rename_of_a_replaced_run_loses_nothing(tmp_path, monkeypatch, undo):
    save(tmp_path, 10, best=True)
    save(tmp_path, 20)
    (tmp_path / 'metrics.jsonl').write_text('old')
    before, renames = content_of(tmp_path), []
    for allowed in range(7):
        if undo:
            set_aside(tmp_path)
        renames[:] = [None] * allowed
        with monkeypatch.context() as patch:
            for name in ('rename', 'replace'):
                own = getattr(os, name)
                patch.setattr(os, name, lambda *paths, own=own: (renames.pop(), own(*paths)))
            with suppress(IndexError):
                (put_back if undo else set_aside)(tmp_path)
        assert not renames, 'there are fewer renames'
        put_back(tmp_path)
        assert content_of(tmp_path) == before, allowed


def test_a_run_that_cannot_be_set_aside_stays_where_it_is(tmp_path, monkeypatch):
    save(tmp_path, 10, best=True)
    (tmp_path / '.replaced').mkdir()
    (tmp_path / '.replaced/obsolete').write_text('could not be deleted')
    (tmp_path / 'step-by-step.txt').write_text('of the user')
    before, rename = content_of(tmp_path), os.rename

    def refuse(old, new):
        if old.name == 'step-00000010' and new.parent.name == '.replaced-moving':
            raise PermissionError(errno.EPERM, 'Operation not permitted')
        rename(old, new)

    with pytest.raises(UserError, match='cannot be set aside .Directory not empty'):
        set_aside(tmp_path)
    assert content_of(tmp_path) == before
    monkeypatch.setattr(os, 'rename', refuse)
    with pytest.raises(UserError, match='cannot be set aside .Operation not permitted'):
        set_aside(tmp_path)
    assert content_of(tmp_path) == before
    monkeypatch.undo()
    shutil.rmtree(tmp_path / '.replaced')
    set_aside(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {'.replaced', 'step-by-step.txt'}


@pytest.mark.skipif(os.name == 'nt', reason='Windows cannot open a folder')
def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, disk):
    folder = save(tmp_path, 10)
    renamed, named = disk.index(folder.name), disk.index('latest')
    for path in (folder, *folder.iterdir()):
        assert path.stat().st_ino in disk[:renamed], path
    assert tmp_path.stat().st_ino in disk[renamed:named]
    assert (tmp_path / 'latest').stat().st_ino in disk[:named]
    assert tmp_path.stat().st_ino in disk[named:]


class Crash(BaseException):
    """The machine stops."""


@pytest.mark.parametrize('number', [1, 2, 3, 4])
def test_a_crash_while_a_step_is_saved_again_loses_neither(tmp_path, monkeypatch, number):
    """At any renaming; step 10 is the only one."""
    save(tmp_path, 10, best=True)
    left = [number]

    def stop(function):
        original = getattr(os, function)

        def call(*arguments):
            left[0] -= 1
            if left[0] == 0:
                monkeypatch.setattr(shutil, 'rmtree', lambda *_, **options: None)  # nor anything
                raise Crash
            original(*arguments)

        monkeypatch.setattr(os, function, call)

    for function in ('rename', 'replace'):
        stop(function)
    with pytest.raises(Crash):
        save(tmp_path, 10, value=7)
    assert value_of(tmp_path, 'latest', warn=pytest.fail)[1] == (10.0 if number < 4 else 7.0)


def test_a_checkpoint_that_a_crash_has_half_deleted_does_not_look_complete(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)

    def delete_a_file(folder, **options):
        for path in Path(folder).glob('*'):
            path.unlink()
            raise Crash

    monkeypatch.setattr(shutil, 'rmtree', delete_a_file)
    with pytest.raises(Crash):
        store.prune(tmp_path, 2, keep_last=1)
    assert [path.name for path in tmp_path.glob('step-*')] == ['step-00000002']


def test_a_checkpoint_of_another_format_is_named(tmp_path, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr(store, 'FORMAT', 2)
        save(tmp_path, 10)
    with pytest.raises(UserError, match='format 2, this version reads 1'):
        store.load(tmp_path)


def test_a_crash_before_an_evaluation_is_recorded_lets_it_be_repeated(tmp_path, monkeypatch):
    """Otherwise the best checkpoint would never get its name."""
    save(tmp_path, 10, best=True)
    save(tmp_path, 20)

    def stop(*_):
        raise Crash

    for point in ('point', '_write_state'):
        with monkeypatch.context() as crash, pytest.raises(Crash):
            crash.setattr(store, point, stop)
            store.record_evaluation(tmp_path, 20, {'evaluated': 20}, best=True)
        assert store.load(tmp_path)[0].state.get('train') is None


@pytest.mark.skipif(os.name == 'nt', reason='Windows names other files')
@pytest.mark.parametrize('name', ['latest', 'best'])
def test_a_folder_in_the_way_of_a_pointer_is_named(tmp_path, name):
    save(tmp_path, 10)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf'\(Is a directory\).*: fix \S*/{name}, then resume'):
        save(tmp_path, 20, best=True)


def test_a_run_that_was_replaced_does_not_come_back(tmp_path):
    """A crash between the first save of the new run and the deletion of the old one."""
    save(tmp_path, 20)
    set_aside(tmp_path)
    save(tmp_path, 5, value=7.0)
    before = {name: content for name, content in content_of(tmp_path).items() if name[0] != '.'}
    put_back(tmp_path)
    assert content_of(tmp_path) == before and value_of(tmp_path, 'latest')[:2] == (5, 7.0)
