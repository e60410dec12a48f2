"""Shows a run, finished or still going, as one page: verdict and findings, curves, samples, config.

python report.py --out_dir=out-shakespeare-char             writes report.html and PNGs into the run's folder
python report.py --out_dir=out-shakespeare-char,out-two     several runs drawn over each other
python report.py --out_dir=out-shakespeare-char --watch     serves the page to this machine, and follows the run
"""

import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import configurator
from nib.errors import UserError, run_script
from nib.report.page import build_page, read_runs, write_report

TRAIN = str(Path(__file__).resolve().with_name('train.py'))

out_dir: str = 'out'  # the run's folder; several, separated by commas, are drawn over each other
page: str = ''  # file to write; empty: report.html in the run's folder, comparison.html in the first of several
png: bool = True  # also write each chart as a PNG, into a folder named like the page (pip install matplotlib)
watch: bool = False  # write nothing: serve the page on http://127.0.0.1, where it follows the run, until Ctrl-C
port: int = 8008  # of --watch; 0 takes any that is free


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    folders = split_folders(out_dir)
    defaults = configurator.read_block(TRAIN).defaults
    if watch:
        return serve(folders, defaults)
    target = Path(
        page or Path(folders[0]) / ('comparison.html' if len(folders) > 1 else 'report.html')
    )
    if target.suffix != '.html':
        raise UserError(f'--page={page}: the name of a page ends in .html')
    try:
        drawn = write_report(folders, defaults, target, png)
        print(f'{target} and {drawn} PNGs in {target.with_suffix("")}' if drawn else target)
    except ImportError:
        print(target)
        print(
            'no PNGs, as matplotlib is missing: pip install matplotlib, or leave them out with --no-png',
            file=sys.stderr,
        )


def split_folders(names: str) -> list[str]:
    """The folders that out_dir names; a single one may have a comma in its name."""
    folders = (
        [names]
        if os.path.isdir(names)
        else [name.strip() for name in names.split(',') if name.strip()]
    )
    if not folders:
        raise UserError('--out_dir is empty: name the folder that train.py wrote to')
    return folders


def serve(folders: list[str], defaults: dict):
    """Answers with the page as the run is at that moment, until Ctrl-C."""
    read_runs(folders)  # a wrong folder is told now
    seen, content = None, b''

    def current_page() -> bytes:
        nonlocal seen, content
        files = [
            Path(folder) / name for folder in folders for name in ('metrics.jsonl', 'config.json')
        ]
        stamps = [
            (stat.st_mtime_ns, stat.st_size)
            for stat in (file.stat() for file in files if file.exists())
        ]
        if stamps != seen:
            content = build_page(read_runs(folders), defaults, watching=True).encode(
                errors='replace'
            )
            seen = stamps
        return content

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.partition('?')[0] != '/':
                return self.answer(404, b'there is one page here: /', 'text/plain')
            try:
                self.answer(200, current_page(), 'text/html')
            except (UserError, OSError) as error:  # the folder has gone meanwhile
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
            if not isinstance(sys.exc_info()[1], ConnectionError):
                super().handle_error(request, address)  # a browser that went away is none

    if not 0 <= port <= 65535:
        raise UserError(f'--port={port}: a port is a number from 0 to 65535')
    try:
        server = Server(('127.0.0.1', port), Handler)
    except OSError as error:
        raise UserError(
            f'--port={port}: {error.strerror}; name another, or 0 for any that is free'
        ) from error
    with server:
        print(f'http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)', flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == '__main__':
    run_script(main)
