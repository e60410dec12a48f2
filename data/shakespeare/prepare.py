"""Tiny Shakespeare in GPT-2's tokens: 40,000 lines of Shakespeare's plays, 301,966 training tokens.

Reads --input=PATH, or else input.txt in this file's folder, in out_dir or in data/shakespeare_char.
Without any of these it downloads the text into out_dir.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import nib.startup  # noqa: F401 - first: so that Ctrl-C during the imports prints no traceback

import configurator
from nib.errors import run_script
from nib.text.gpt2 import Gpt2Tokenizer
from nib.tokens import shakespeare

input: str = ''  # path of the text; empty: input.txt in a folder named above, or a download
out_dir: str = ''  # output folder; empty: this file's folder


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    shakespeare.prepare(__file__, input, out_dir, lambda text: Gpt2Tokenizer())


if __name__ == '__main__':
    run_script(main)
