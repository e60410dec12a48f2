"""What a path names: a run, a checkpoint or a model; and what to type instead of a wrong one."""

import difflib
import os
import shlex
from pathlib import Path

from nib.files import command, read_json, shown

STEP = 'step-[0-9]*'  # the folders of checkpoints
SHOWN = 3  # runs to list


def is_run(folder: Path) -> bool:
    """Returns whether train.py has written to this folder."""
    return (
        (folder / 'metrics.jsonl').exists()
        or 'config' in read_json(folder / 'config.json')
        or any(folder.glob(STEP))
    )


def is_checkpoint(path: Path) -> bool:
    """Returns whether an absolute path is the folder of a single checkpoint."""
    return path.match(STEP) and (path / 'state.json').exists()


def is_own_name(path: Path) -> bool:
    """Returns whether a path is one that the run in its folder uses for checkpoints."""
    return (path.match(STEP) or path.name in ('latest', 'best')) and is_run(path.parent)


def run_of(checkpoint: Path) -> Path:
    """Returns the folder of a checkpoint's run, as a person would type it."""
    return Path(shown(checkpoint.parent))


def is_torch_file(path: Path) -> bool:
    """Returns whether a path is a file as nanoGPT's ckpt.pt, of any name."""
    return path.is_file() and path.suffix in ('.pt', '.pth')


def is_hugging_face(folder: Path) -> bool:
    """Returns whether the folder contains a model of Hugging Face's transformers."""
    return bool({'model_type', 'architectures'} & read_json(folder / 'config.json').keys())


def explain(path, may_train: bool = True) -> str:
    """Returns a sentence about a path that is not the folder of a run with a checkpoint.

    may_train: whether a command that trains a run into this folder would help.
    """
    path, whole = Path(path), Path(os.path.abspath(path))
    if is_checkpoint(whole):
        return f'{path} is a single checkpoint of a run; did you mean {_typed(run_of(whole))}?'
    run = next((folder for folder in path.parents if is_run(folder)), None)
    if not path.is_dir() and run:  # a file or a step of the run
        return f'{path} is not the folder of a run; did you mean {_typed(run)}?'
    if path.suffix == '.gguf':
        return explain_gguf(path)
    if path.is_file() and is_hugging_face(path.parent):
        return f'{path} is part of a model; name its folder, {_typed(path.parent)}'
    if (path / 'adapter_config.json').is_file():
        return explain_adapter(path)
    if 'huggingface.co' in path.parts:
        name = path.parts[path.parts.index('huggingface.co') + 1 :][:2]
        return f'for a model on the hub, name OWNER/NAME only, {_typed(Path(*name))}'
    if path.is_file():
        instead = f'; for a nanoGPT checkpoint, use --init_from={_typed(path)}'
        return f'{path} is a file, not the folder of a run{instead * is_torch_file(path)}'
    train_first = (
        f'; train first: {command("train.py")} CONFIG --out_dir={_typed(path)}' * may_train
    )
    runs = _runs_in(path)
    if not path.is_dir():
        runs = _runs_in(path.parent)
        if path == Path('out') and runs:  # the default
            return f'out: no such folder; name the folder of a run{_list(runs, ": ")}'
        near = difflib.get_close_matches(path.name, [run.name for run in runs], n=1)
        if near:
            return f'{path}: no such folder; did you mean {_typed(path.with_name(near[0]))}?'
        return f'{path}: no such folder{train_first}{_list(runs, "; existing runs: ")}'
    if is_run(path):
        return (
            f'{path} contains no checkpoint yet: a run saves one at each evaluation, '
            f'and when it is stopped'
        )
    if (path / 'ckpt.pt').is_file():
        return (
            f'{path} contains a nanoGPT checkpoint, not a run: use it with '
            f'--init_from={_typed(path / "ckpt.pt")}; train.py continues at its step'
        )
    if is_hugging_face(path):
        return (
            f"{path} contains a model in Hugging Face's format, not a run: use it with "
            f'--init_from={_typed(path)}'
        )
    if (path / 'train.bin').exists():
        return (
            f'{path} is a dataset, not a run: train on it with '
            f'--dataset={_typed(Path(whole.name))} --data_dir={_typed(path.parent)}'
        )
    if runs:
        return f'{path} is not a run, but contains runs: name one of them{_list(runs, ": ")}'
    for file in path.glob('*.gguf'):
        return explain_gguf(file)
    return f'{path} is not a run, because it contains no checkpoint{train_first}'


def explain_adapter(name) -> str:
    """Returns a sentence about a folder or a repository with an adapter and no whole model."""
    return (
        f'{name} has only the adapter of a model: merge both with peft, '
        f'merge_and_unload().save_pretrained(FOLDER), and name that folder'
    )


def explain_gguf(file: Path) -> str:
    return f'{file} is a GGUF file, which nibGPT cannot read; use the original model'


def _runs_in(folder: Path) -> list[Path]:
    """Returns the runs in a folder, the latest first."""
    try:
        folders = [path for path in folder.iterdir() if path.name[0] != '.' and path.is_dir()]
        runs = [path for path in folders if is_run(path)]
        return sorted(runs, key=lambda run: run.stat().st_mtime, reverse=True)
    except OSError:
        return []


def _list(runs: list[Path], begin: str) -> str:
    more = f' and {len(runs) - SHOWN} more' if len(runs) > SHOWN else ''
    return begin + ', '.join(map(_typed, runs[:SHOWN])) + more if runs else ''


def _typed(path: Path) -> str:
    return shlex.quote(str(path))
