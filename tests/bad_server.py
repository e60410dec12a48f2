"""A server that misbehaves in every way that a download must withstand, for tests."""

import hashlib
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

CONTENT = b'To be, or not to be: that is the question.\n' * 3000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
# Limits of a download that are reached only by the pages which are there to reach them.
PATIENT = {'TIMEOUT': (600, 600), 'WHOLE_SECONDS': 600}
LIMITS = {
    'stalled': PATIENT | {'TIMEOUT': (600, 0.1)},
    'silent': PATIENT | {'TIMEOUT': (600, 0.1)},
    'drip': PATIENT | {'WHOLE_SECONDS': 0.2},
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        with suppress(OSError):  # the client has gone
            getattr(self, self.path.strip('/'), self.missing)()

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
        self.server.over.wait()

    def silent(self):
        self.server.over.wait()

    def drip(self):
        """A byte at a time, each within the timeout for silence."""
        self.begin(len(CONTENT))
        while not self.server.over.wait(0.05):
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
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('NO_PROXY', '127.0.0.1')
        patch.setenv('no_proxy', '127.0.0.1')
        yield f'http://127.0.0.1:{server.server_port}'
    server.over.set()
    server.shutdown()
    server.server_close()
