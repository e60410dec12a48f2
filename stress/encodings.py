"""Prepares random texts in random encodings, and checks that no model would learn another text.

    python stress/encodings.py
    python stress/encodings.py --case=1234        one case again, with its messages

A case writes a text in some encoding, with some line ending, sometimes damaged, and reads it twice:
with data/text/prepare.py and as a prompt. It passes if both give exactly the text that was written,
or if both reject it in one line. If that line holds a command, the command is run, and what it
writes is read again.
"""

import contextlib
import io
import random
import re
import runpy
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import configurator
import sample
from benchmarks import measure
from nib import errors
from nib.errors import UserError, run_script, warn
from nib.tokens.dataset import open_dataset

cases: int = 10000  # number of cases to run
seed: int = 1  # determines the cases
case: int = -1  # the number of a case to run alone; -1 for all
result: str = ''  # also write the table to this file

WORDS = {
    'English': 'The cat sees a dog and then it sleeps “well” … 12 o clock'.split(),
    'German': 'Größe Übung schöne Äpfel müde Straße und über Nächte'.split(),
    'Russian': 'Жизнь это просто слова которые мы читаем каждый день'.split(),
    'Chinese': '生活 很好 我们 在 一起 学习 语言'.split(),
    'Japanese': 'これは 日本語 の 文章 です カタカナ も あります'.split(),
}
UNICODE = ('utf-8', 'utf-16-le', 'utf-16-be', 'utf-32-le', 'utf-32-be')
OLD = {
    'English': ('cp1252',),
    'German': ('latin-1', 'cp1252'),
    'Russian': ('cp1251', 'koi8-r'),
    'Chinese': ('gb18030', 'big5'),
    'Japanese': ('shift_jis', 'euc-jp'),
}
DAMAGES = ('cut', 'bytes', 'NUL', 'noise', 'compressed', 'PDF')


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    prepare, began = runpy.run_path(str(ROOT / 'data/text/prepare.py'))['main'], time.monotonic()
    ended: dict[str, Counter[str]] = {}
    for number in range(cases) if case < 0 else [case]:
        with tempfile.TemporaryDirectory() as folder:
            kind, outcome, messages = run_case(number, Path(folder), prepare)
        ended.setdefault(kind, Counter())[outcome] += 1
        if outcome in BAD or case >= 0:
            warn(f'case {number}, {kind}: {outcome}: {messages}')
    table = format_table(ended, time.monotonic() - began)
    measure.publish(table, result)
    return 1 if any(counts[bad] for counts in ended.values() for bad in BAD) else 0


BAD = ('another text', 'advice fails', 'no clear line')
OUTCOMES = ('read', 'rejected', 'converted', *BAD)


def run_case(number: int, folder: Path, prepare) -> tuple[str, str, str]:
    """Returns the kind of the case, how it ended, and what was printed."""
    draw = random.Random(f'{seed} {number}')
    language = draw.choice(list(WORDS))
    text = make_text(draw, WORDS[language])
    encoding = draw.choice(UNICODE if draw.random() < 0.7 else OLD[language])
    marked = encoding in UNICODE and draw.random() < 0.5
    line_end = draw.choice(['\n', '\r\n', '\r'])
    content = (
        (('\ufeff' if marked else '') + text).replace('\n', line_end).encode(encoding, 'ignore')
    )
    text = content.decode(encoding).removeprefix('\ufeff').replace(line_end, '\n')
    kind = f'{encoding}{" with a mark" * marked}'
    damage = draw.choice(DAMAGES) if draw.random() < 0.2 else ''
    if damage:
        content, kind = damaged(draw, text, damage), f'damaged: {damage}'
    path = folder / f'my text {number}.txt'
    path.write_bytes(content)
    outcome, messages = read_twice(path, text, prepare)
    advice = re.search(r": ((?:iconv|tr) .*?-utf8\.txt')", messages)
    if outcome != 'rejected' or not advice or damage or encoding not in (*UNICODE, *OLD['German']):
        return kind, outcome, messages
    subprocess.run(advice[1], shell=True, capture_output=True)
    again, said = read_twice(path.with_name(f'my text {number}-utf8.txt'), text, prepare)
    return kind, 'converted' if again == 'read' else 'advice fails', messages + said


def make_text(draw: random.Random, words: list[str]) -> str:
    lines = [' '.join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(60)]
    return draw.choice([',', '.\n', '。\n']).join(lines) + draw.choice(['', '\n'])


def damaged(draw: random.Random, text: str, damage: str) -> bytes:
    """Returns a file that is not text, made of UTF-8."""
    content = text.encode()
    at = draw.randrange(len(content))
    return {
        'cut': content + '€'.encode()[: draw.randint(1, 2)],
        'bytes': content[:at] + draw.choice([b'\xff', b'\xc0', b'\xf8\x88']) + content[at:],
        'NUL': content[:at] + bytes(draw.randint(1, 3)) + content[at:],
        'noise': draw.randbytes(draw.randint(500, 100_000)),
        'compressed': zlib.compress(content),
        'PDF': b'%PDF-1.4\n' + content,
    }[damage]


def read_twice(path: Path, text: str, prepare) -> tuple[str, str]:
    """Returns how reading as a training text and as a prompt ended, and what was printed."""
    printed = io.StringIO()
    out_dir = path.with_suffix('.dataset')
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = errors.call(prepare, [f'--input={path}', f'--out_dir={out_dir}'])
        try:
            prompt = sample.read_prompt(f'FILE:{path}')
        except UserError:
            prompt = None
    said = printed.getvalue()
    if code == 2:
        lines = [line for line in said.splitlines() if line.startswith('error: ')]
        return ('rejected' if prompt is None and len(lines) == 1 else 'no clear line'), said
    data = open_dataset(out_dir, 8)
    learned = data.tokenizer.decode(data.train) + data.tokenizer.decode(data.val)
    return ('read' if learned == prompt == text else 'another text'), said


def format_table(ended: dict[str, Counter[str]], seconds: float) -> str:
    count = sum(counts.total() for counts in ended.values())
    machine = measure.describe_machine()
    lines = [
        f'{count:,} cases, seed {seed}, in {seconds / 60:.1f} minutes; {machine}',
        '',
        f'{"":26}' + ''.join(f'{outcome:>15}' for outcome in OUTCOMES),
    ]
    total = sum(ended.values(), Counter[str]())
    for kind, counts in [*sorted(ended.items()), ('all', total)]:
        lines.append(f'{kind:26}' + ''.join(f'{counts[outcome]:>15,}' for outcome in OUTCOMES))
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    run_script(main)
