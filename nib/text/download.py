"""Downloads a file with a known digest from the first of several addresses that serves it."""

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout  # the builtin since Python 3.11
from threading import Thread
from urllib.parse import urlsplit

from nib.errors import UserError
from nib.files import atomic_write

TIMEOUT = 5, 15  # seconds to connect, and to wait for the next bytes of a response
WHOLE_SECONDS = 120.0  # at most, for one whole response


class DownloadError(UserError):
    """No address serves the file: nothing else than a network is missing."""


class _Failed(Exception):
    """Why an address did not serve the file."""


def download(urls: Sequence[str], path, sha256: str, max_bytes: int):
    """Downloads a file, trying the addresses in order. It is written completely or not at all.

    sha256: the digest that the file must have; any other content is rejected.
    Raises DownloadError, with the reason for each address, if none of them serves the file.
    """
    reasons = []  # of each address
    for url in urls:
        try:
            content = _fetch(url, max_bytes)
            if hashlib.sha256(content).hexdigest() != sha256:
                raise _Failed('not the expected file (wrong SHA-256)')
        except _Failed as failed:
            reasons.append(str(failed))
            continue
        with atomic_write(path) as file:
            file.write(content)
        return
    why = reasons[0]
    if len(set(reasons)) > 1:
        pairs = zip(urls, reasons, strict=True)
        why = '; '.join(f'{urlsplit(url).netloc}: {reason}' for url, reason in pairs)
    raise DownloadError(f'{path} could not be downloaded ({why})')


def _fetch(url: str, max_bytes: int) -> bytes:
    """Reads the response in a thread, which is abandoned after WHOLE_SECONDS.

    Every byte that arrives restarts requests' own timeout, so a plain call could take days.
    """
    answer = Future()

    def work():
        try:
            answer.set_result(_read(url, max_bytes))
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=work, daemon=True).start()
    try:
        return answer.result(WHOLE_SECONDS)
    except FutureTimeout:
        raise _Failed(f'too slow, gave up after {WHOLE_SECONDS:g} s') from None


def _read(url: str, max_bytes: int) -> bytes:
    import requests  # slow to import, and most runs download nothing
    from tqdm import tqdm
    from urllib3.exceptions import ReadTimeoutError

    content, expected, deadline = bytearray(), 0, time.monotonic() + WHOLE_SECONDS
    try:
        # Uncompressed, so that Content-Length is the size of the file.
        headers = {'Accept-Encoding': 'identity'}
        with requests.get(url, stream=True, timeout=TIMEOUT, headers=headers) as response:
            if response.status_code != 200:
                raise _Failed(f'HTTP {response.status_code}')
            expected = int(response.headers.get('Content-Length', 0))
            with tqdm(
                total=expected or None,
                unit='B',
                unit_scale=True,
                desc=urlsplit(url).netloc,
                disable=None,
            ) as bar:
                for piece in response.iter_content(1 << 14):
                    content += piece
                    bar.update(len(piece))
                    if len(content) > max_bytes:
                        raise _Failed(f'not the expected file (more than {max_bytes:,} bytes)')
                    if time.monotonic() > deadline:
                        raise _Failed('too slow')
    except requests.Timeout as error:
        raise _Failed('timed out') from error
    except requests.exceptions.ChunkedEncodingError as error:
        size = f' before all {expected:,} bytes arrived' if expected else ''
        raise _Failed(f'connection lost{size}') from error
    except requests.ConnectionError as error:
        # requests wraps urllib3's timeout in a ConnectionError if a response stalls midway.
        stalled = any(isinstance(cause, ReadTimeoutError) for cause in error.args)
        raise _Failed('timed out' if stalled else 'no connection') from error
    except (requests.RequestException, OSError, ValueError) as error:
        raise _Failed(type(error).__name__) from error
    return bytes(content)
