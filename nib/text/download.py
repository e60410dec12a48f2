"""Fetching a file whose digest is known, from whichever of several addresses gives it."""

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout  # the builtin only from Python 3.11 on
from threading import Thread
from urllib.parse import urlsplit

from nib.errors import UserError
from nib.files import atomic_write


class _Refused(Exception):
    """Why an address did not give the file."""


def download(
    urls: Sequence[str],
    path,
    sha256: str,
    max_bytes: int,
    timeout: tuple[float, float] = (5, 15),
    overall_seconds: float = 120.0,
):
    """Writes to path, whole or not at all, the first answer that has this SHA-256.

    timeout: seconds to connect, and between two pieces of the answer; overall_seconds: for all of one answer.
    UserError says of every address why it did not give the file.
    """
    reasons = []
    for url in urls:
        try:
            content = _fetch(url, max_bytes, timeout, overall_seconds)
            if hashlib.sha256(content).hexdigest() != sha256:
                raise _Refused('another file than expected (wrong SHA-256)')
        except _Refused as refused:
            reasons.append(f'{urlsplit(url).netloc}: {refused}')
            continue
        with atomic_write(path) as file:
            file.write(content)
        return
    raise UserError(f'could not download {path}: ' + '; '.join(reasons))


def _fetch(url: str, max_bytes: int, timeout: tuple[float, float], overall_seconds: float) -> bytes:
    """The answer, from a thread that is left behind when the time is up: every byte that arrives renews requests' own
    timeout, so that a slow drip could hold up a plain call for days."""
    answer = Future()

    def work():
        try:
            answer.set_result(_read(url, max_bytes, timeout, time.monotonic() + overall_seconds))
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=work, daemon=True).start()
    try:
        return answer.result(overall_seconds)
    except FutureTimeout:
        raise _Refused(f'too slow, given up after {overall_seconds:g} s') from None


def _read(url: str, max_bytes: int, timeout: tuple[float, float], deadline: float) -> bytes:
    import requests  # here and below: only a run that downloads pays for the import
    from tqdm import tqdm
    from urllib3.exceptions import ReadTimeoutError

    content, expected = bytearray(), 0
    try:
        # Not compressed, so that Content-Length counts the bytes that are written.
        with requests.get(
            url, stream=True, timeout=timeout, headers={'Accept-Encoding': 'identity'}
        ) as response:
            if response.status_code != 200:
                raise _Refused(f'HTTP {response.status_code}')
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
                        raise _Refused(
                            f'another file than expected (more than {max_bytes:,} bytes)'
                        )
                    if time.monotonic() > deadline:
                        raise _Refused('too slow')
    except requests.Timeout as error:
        raise _Refused('timed out') from error
    except requests.exceptions.ChunkedEncodingError as error:
        raise _Refused(
            'cut off' + (f' before the end of its {expected:,} bytes' if expected else '')
        ) from error
    except requests.ConnectionError as error:
        # requests reports silence in the middle of an answer as a ConnectionError around urllib3's timeout.
        stalled = any(isinstance(cause, ReadTimeoutError) for cause in error.args)
        raise _Refused('timed out' if stalled else 'no connection') from error
    except (requests.RequestException, OSError, ValueError) as error:
        raise _Refused(type(error).__name__) from error
    return bytes(content)
