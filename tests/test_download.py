"""Downloads from a server that misbehaves: the right file or none, in bounded time, and a reason for each address."""
import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nib.download import download
from nib.errors import UserError

CONTENT = b'To be, or not to be: that is the question.\n' * 3000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        try:
            getattr(self, self.path.strip('/'), self.missing)()
        except OSError:  # the client has gone
            pass

    def begin(self, length=None):
        self.send_response(200)
        if length is not None:
            self.send_header('Content-Length', str(length))
        self.end_headers()

    def good(self):
        self.begin(len(CONTENT))
        self.wfile.write(CONTENT)

    def unmeasured(self):
        self.begin()
        self.wfile.write(CONTENT)

    def missing(self):
        self.send_error(404)

    def html(self):
        self.begin(22)
        self.wfile.write(b'<html>sign in</html>\r\n')

    def truncated(self):
        self.begin(len(CONTENT))
        self.wfile.write(CONTENT[:50_000])

    def stalled(self):
        self.begin(len(CONTENT))
        self.wfile.write(CONTENT[:50_000])
        self.server.over.wait(30)

    def silent(self):
        self.server.over.wait(30)

    def drip(self):
        """A byte at a time, each within the timeout for silence."""
        self.begin(len(CONTENT))
        while not self.server.over.wait(0.1):
            self.wfile.write(b'T')
            self.wfile.flush()

    def endless(self):
        self.begin()
        while True:
            self.wfile.write(bytes(1 << 16))

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope='module')
def address():
    """http://127.0.0.1:port of the server, whatever proxy the machine has."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads, server.over = True, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('NO_PROXY', '127.0.0.1')
        patch.setenv('no_proxy', '127.0.0.1')
        yield f'http://127.0.0.1:{server.server_port}'
    server.over.set()
    server.shutdown()
    server.server_close()


def fetch(urls, path, **changes):
    options = dict(sha256=SHA256, max_bytes=len(CONTENT), timeout=(1, 0.5), overall_seconds=1.5)
    download(urls, path, **{**options, **changes})


@pytest.mark.parametrize('page', ['good', 'unmeasured'])
def test_a_good_answer_is_written_alone(address, tmp_path, page, capfd):
    fetch([f'{address}/{page}'], tmp_path / 'input.txt')
    assert (tmp_path / 'input.txt').read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ['input.txt']
    assert capfd.readouterr() == ('', '')  # the progress bar is for a terminal


@pytest.mark.parametrize('page, reason', [
    ('missing', 'HTTP 404'), ('html', 'another file'), ('truncated', 'cut off .* 129,000 bytes'), ('stalled', 'timed out'),
    ('silent', 'timed out'), ('drip', 'too slow'), ('endless', 'another file .*129,000 bytes')])
def test_a_bad_answer_leaves_nothing_and_is_explained(address, tmp_path, page, reason):
    begun = time.monotonic()
    with pytest.raises(UserError, match=rf'127\.0\.0\.1:\d+: {reason}') as error:
        fetch([f'{address}/{page}'], tmp_path / 'input.txt')
    assert time.monotonic() - begun < 6  # the limits are 1.5 s; the rest is for a slow machine
    assert list(tmp_path.iterdir()) == []
    assert '\n' not in str(error.value)


def test_a_bad_answer_leaves_the_file_that_was_there(address, tmp_path):
    (tmp_path / 'input.txt').write_text('older')
    with pytest.raises(UserError):
        fetch([f'{address}/html'], tmp_path / 'input.txt')
    assert (tmp_path / 'input.txt').read_text() == 'older'


def test_the_next_address_is_tried(address, tmp_path):
    fetch([f'{address}/html', f'{address}/missing', f'{address}/good'], tmp_path / 'input.txt')
    assert (tmp_path / 'input.txt').read_bytes() == CONTENT


def test_every_address_is_named_with_its_reason(address, tmp_path):
    with pytest.raises(UserError, match=r'input\.txt: 127.*HTTP 404; 127.*another file.*; 127\.0\.0\.1:1: no connection'):
        fetch([f'{address}/missing', f'{address}/html', 'http://127.0.0.1:1/'], tmp_path / 'input.txt')
