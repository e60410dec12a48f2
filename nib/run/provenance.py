"""Where a run comes from: date, command, commit, machine, versions, model and dataset."""

import datetime
import os
import platform
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from nib.files import ROOT

GIT_SECONDS = 2.0  # timeout; usually it takes 10 ms


def describe_start(step: int, device: str) -> dict:
    """Describes a start of a run: the first one at step 0, or a resume. device: in words."""
    commit = find_commit()
    return {
        'step': step,
        'date': datetime.datetime.now().astimezone().isoformat(timespec='seconds'),
        'command': shlex.join(sys.argv),
        **({'commit': commit} if commit else {}),
        'machine': f'{socket.gethostname()}, {platform.platform()}, {os.cpu_count()} CPUs',
        'device': device,
        'versions': {
            'python': platform.python_version(),
            'torch': torch.__version__,
            'numpy': np.__version__,
        },
    }


def describe_subject(model, data) -> dict:
    """Describes what a run trains, and on what. model: a GPT. data: a TokenDataset."""
    return {
        'parameters': model.num_params(),
        'dataset': {
            'name': data.name,
            'training tokens': len(data.train),
            'validation tokens': len(data.val),
            'vocabulary': data.vocab_size,
            'fingerprint': data.fingerprint,
        },
    }


def find_commit(root: Path = ROOT) -> str | None:
    """Returns the commit, with '-dirty' if tracked files have changed, or None."""
    if not (root / '.git').exists():
        return None
    command = ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*']
    try:
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=GIT_SECONDS
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None  # git is missing or hangs
    return done.stdout.strip() or None
