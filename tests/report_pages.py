"""Runs as records, and pages as a browser reads them, for tests of the report."""

import json
import math
from html.parser import HTMLParser

from conftest import ROOT

import configurator
from nib.report import history
from nib.report.page import build_page

DEFAULTS = configurator.read_block(str(ROOT / 'train.py')).defaults
VOID = {'meta', 'link', 'br', 'hr', 'img', 'input'}
FINDING = {
    'severity': 'warning',
    'evidence': 'the update ratio of attention is 0.02',
    'causes': ['learning_rate is too high', 'beta2'],
    'changes': ['learning_rate = 0.0003', 'beta2 = 0.99'],
}


class Page(HTMLParser):
    """A page as a browser reads it: properly nested elements, text, and the charts' values."""

    def __init__(self, source):
        super().__init__()
        self.open, self.elements, self.scripts, self.shown, self.charts = [], [], [], '', {}
        self.feed(source)
        self.close()
        assert self.open == []
        ids = [attributes['id'] for _, attributes in self.elements if 'id' in attributes]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == 'figure':
            self.figure = dict(attributes).get('id')

    def handle_startendtag(self, tag, attributes):
        self.elements.append(
            (tag, {**dict(attributes), 'figure': self.figure if 'figure' in self.open else None})
        )

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ['script']:
            self.scripts.append(data)
            if 'form' in self.open:
                self.flags = json.loads(data)['flags']
            if 'figure' in self.open:
                self.charts[self.figure] = json.loads(data)
        elif self.open[-1:] != ['style']:
            self.shown += data

    def values(self, chart) -> dict[str, dict]:
        return {
            f'{series["run"]}: {series["name"]}' if series['run'] else series['name']: dict(
                zip(series['steps'], series['values'])
            )
            for series in self.charts[chart]['series']
        }

    def of_class(self, name) -> list[dict]:
        return [attributes for _, attributes in self.elements if attributes.get('class') == name]


def write_run(folder, lines, config=None):
    """A run's folder with these records, or raw lines of bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'metrics.jsonl').write_bytes(
        b''.join(
            line if isinstance(line, bytes) else json.dumps(line).encode() + b'\n' for line in lines
        )
    )
    if config is not None:
        (folder / 'config.json').write_text(json.dumps({'config': config, 'origins': {}}))
    return folder


def page_of(*folders, watching=False) -> Page:
    return Page(build_page(history.read_runs(folders), DEFAULTS, watching))


def full_records(steps=40):
    """Records of every name that a run may write."""
    lines = []
    for step in range(steps + 1):
        if step:
            lines.append(
                {
                    'step': step,
                    'loss/step': 4 - step / 20,
                    'grad_norm': 1 + math.sin(step),
                    'learning_rate': 1e-3 / step,
                    'mfu': 0.4,
                    'tokens_per_second': 1000.0 + step,
                    'peak_memory': 3_000_000 + step,
                    'clipped': (step % 3) / 2,
                    'noise_scale': 2.0 * step,
                    **{
                        f'update_ratio/{group}': step / 1e4
                        for group in ('embedding', 'attention', 'mlp', 'head')
                    },
                }
            )
        if step % 10 == 0:
            lines.append(
                {
                    'step': step,
                    'loss/train': 4 - step / 21,
                    'loss/val': 4 - step / 20 + (step / 40) ** 3,
                    'bits_per_byte/val': 1.5,
                    'seconds/evaluation': 0.1,
                    'sample': f'text of step {step}',
                    'dead_units': step / 100,
                    'attention_logit': 3.0 + step,
                    'attention_entropy': 0.5,
                    'activation_std': 1.25,
                }
            )
    return lines
