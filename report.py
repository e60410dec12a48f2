"""Shows a finished or running training as one page: verdict, findings, curves, samples, config.

python report.py --out_dir=out-shakespeare-char           writes report.html and PNGs to the folder
python report.py --out_dir=out-shakespeare-char,out-two   compares several runs
python report.py --out_dir=out-shakespeare-char --watch   serves a page that follows the run
"""

import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import configurator
from nib.errors import UserError, run_script
from nib.report.page import build_page, read_runs, write_report

TRAIN = str(Path(__file__).resolve().with_name('train.py'))

out_dir: str = 'out'  # the run's folder; several folders, separated by commas, are compared
page: str = ''  # output file; empty: report.html, or comparison.html for several runs, in out_dir
png: bool = True  # also save each chart as a PNG in a folder named like the page; needs matplotlib
watch: bool = False  # serve the page on http://127.0.0.1 and follow the run until Ctrl-C
port: int = 8008  # port of --watch; 0: any free port


def main(argv):
    values, _ = configurator.configure(__file__, argv)
    globals().update(values)
    folders = split_folders(out_dir)
    defaults = configurator.read_block(TRAIN).defaults
    if watch:
        return serve(folders, defaults)
    name = 'comparison.html' if len(folders) > 1 else 'report.html'
    target = Path(page) if page else Path(folders[0], name)
    if target.suffix != '.html':
        raise UserError(f'--page={page}: the name must end in .html')
    try:
        drawn = write_report(folders, defaults, target, png)
        print(f'{target} and {drawn} PNGs in {target.with_suffix("")}' if drawn else target)
    except ImportError:
        print(target)
        print(
            'no PNGs, because matplotlib is missing: pip install matplotlib, or use --no-png',
            file=sys.stderr,
        )


def split_folders(names: str) -> list[str]:
    """Returns the folders in out_dir; a single folder may have a comma in its name."""
    if os.path.isdir(names):
        return [names]
    folders = [name.strip() for name in names.split(',') if name.strip()]
    if not folders:
        raise UserError('--out_dir is empty: name the folder that train.py wrote to')
    return folders


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
