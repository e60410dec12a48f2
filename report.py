"""Shows a finished or active run on one page: verdict, findings, curves, samples, config.

python report.py --out_dir=out-shakespeare-char           writes report.html and PNGs to the folder
python report.py runs/*                                   compares several runs
python report.py --out_dir=out-shakespeare-char --watch   serves a page that follows the run
"""

import nib.startup  # noqa: F401 - first: so that Ctrl-C during the imports prints no traceback

import glob
import os
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import configurator
from nib.checkpoint.paths import is_own_name, is_run
from nib.errors import UserError, run_script, warn
from nib.report.page import build_page, read_runs, write_report

TRAIN = str(Path(__file__).resolve().with_name('train.py'))

out_dir: str = 'out'  # the run's folder
page: str = ''  # output file; empty: report.html in the run, or comparison.html above several
png: bool = True  # also save each chart as a PNG in a folder named like the page; needs matplotlib
watch: bool = False  # serve the page on http://127.0.0.1 and follow the run until Ctrl-C
port: int = 8008  # port of --watch; 0: any free port


def main(argv):
    named, flags = split_arguments(argv)
    values, _ = configurator.configure(__file__, flags, positional='run')
    globals().update(values)
    folders = find_runs(named) if named else [out_dir]
    defaults = configurator.read_block(TRAIN).defaults
    if watch:
        return serve(folders, defaults)
    target = Path(page or Path(folders[0], 'report.html'))
    if len(folders) > 1 and not page:
        parents = [os.path.dirname(os.path.abspath(folder)) for folder in folders]
        target = Path(os.path.commonpath(parents), 'comparison.html')
    if target.suffix != '.html':
        raise UserError(f'--page={page}: the name must end in .html')
    if any(is_own_name(folder) for folder in Path(os.path.abspath(target)).parents):
        raise UserError(
            f'--page={page} is inside a checkpoint, and would be deleted with it: choose another '
            f'path'
        )
    try:
        drawn = write_report(folders, defaults, target, png)
        print(f'{target} and {drawn} PNGs in {target.with_suffix("")}' if drawn else target)
    except ImportError as error:
        print(target)
        warn(f'no PNGs ({error}): pip install --upgrade matplotlib, or use --no-png')


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments that name runs, and the others: flags and their values."""
    named, flags = [], []
    for before, argument in zip(['', *argv], argv):
        is_value = before in ('--out_dir', '--page', '--port') or argument in ('true', 'false')
        (flags if argument.startswith('-') or is_value else named).append(argument)
    return named, flags


def find_runs(names: list[str]) -> list[str]:
    """Returns the folders of runs that folders and patterns name, in natural order.

    A folder that is not a run stands for the runs in it. Of several names, those that are no
    folders are left out. Raises UserError if there is no run.
    """
    found = []
    for name in names:
        paths = [name] if os.path.exists(name) else glob.glob(name) or [name]
        for path in paths:
            inside = (
                [path] if is_run(Path(path)) else glob.glob(os.path.join(glob.escape(path), '*'))
            )
            found += [one for one in inside if is_run(Path(one))]
    if not found:
        raise UserError(f'{" ".join(names)}: no run found; name the folders that train.py wrote to')
    return sorted(
        dict.fromkeys(os.path.normpath(path) for path in found),
        key=lambda path: [
            int(part) if part.isdigit() else part for part in re.split(r'(\d+)', path)
        ],
    )


def serve(folders: list[str], defaults: dict):
    """Serves the page with the current state of the runs until Ctrl-C."""
    read_runs(folders)  # fails now if a folder is wrong
    seen, content = None, b''

    def current_page() -> bytes:
        nonlocal seen, content
        names = ('metrics.jsonl', 'config.json')
        files = [Path(folder, name) for folder in folders for name in names]
        stats = [file.stat() for file in files if file.exists()]
        stamps = [(stat.st_mtime_ns, stat.st_size) for stat in stats]
        if stamps != seen:
            page = build_page(read_runs(folders), defaults, watching=True)
            content, seen = page.encode(errors='replace'), stamps
        return content

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.partition('?')[0] != '/':
                return self.answer(404, b'the only page is /', 'text/plain')
            try:
                self.answer(200, current_page(), 'text/html')
            except (UserError, OSError) as error:  # the folder was removed in the meantime
                self.answer(503, str(error).encode(errors='replace'), 'text/plain')

        def answer(self, status, body, kind):
            self.send_response(status)
            self.send_header('Content-Type', f'{kind}; charset=utf-8')
            self.send_header('Content-Length', str(len(body)))
            self.send_header('Cache-Control', 'no-store')
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, address):
            # A browser that closes its connection is not an error.
            if not isinstance(sys.exc_info()[1], ConnectionError):
                super().handle_error(request, address)

    if not 0 <= port <= 65535:
        raise UserError(f'--port={port}: expected a number from 0 to 65535')
    try:
        server = Server(('127.0.0.1', port), Handler)
    except OSError as error:
        raise UserError(
            f'--port={port}: {error.strerror}; use another port, or 0 for any free port'
        ) from error
    with server:
        print(f'http://127.0.0.1:{server.server_port}/ (Ctrl-C to stop)', flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == '__main__':
    run_script(main)
