"""Fetching a file whose digest is known, from whichever of several addresses gives it."""
import hashlib
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from nib.errors import UserError
from nib.files import atomic_write


class _Refused(Exception):
    """Why an address did not give the file."""


def download(urls: Sequence[str], path, sha256: str, max_bytes: int, timeout: tuple[float, float] = (5, 15),
             overall_seconds: float = 120.0):
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
    import requests  # here and below: only a run that downloads pays for the import
    from tqdm import tqdm
    started = time.monotonic()
    content = bytearray()
    try:
        with requests.get(url, stream=True, timeout=timeout) as response:
            if response.status_code != 200:
                raise _Refused(f'HTTP {response.status_code}')
            expected = int(response.headers.get('Content-Length', 0))
            with tqdm(total=expected or None, unit='B', unit_scale=True, desc=urlsplit(url).netloc, disable=None) as bar:
                for piece in response.iter_content(1 << 14):
                    content += piece
                    bar.update(len(piece))
                    if len(content) > max_bytes:
                        raise _Refused(f'more than the {max_bytes:,} bytes expected')
                    if time.monotonic() - started > overall_seconds:
                        raise _Refused(f'too slow ({len(content):,} bytes in {overall_seconds:.0f} s)')
    except requests.Timeout as error:
        raise _Refused('timed out') from error
    except requests.exceptions.ChunkedEncodingError as error:
        raise _Refused(f'cut off after {len(content):,} bytes') from error
    except requests.ConnectionError as error:
        raise _Refused('cut off' if content else 'no connection') from error
    except (requests.RequestException, OSError, ValueError) as error:
        raise _Refused(type(error).__name__) from error
    return bytes(content)
