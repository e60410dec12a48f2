"""Downloads from a misbehaving server: the right file or none, in bounded time, with reasons."""

import time

import pytest
from bad_server import CONTENT, LIMITS, PATIENT, SHA256

from nib.errors import UserError
from nib.text import download


def fetch(urls, path, limits=PATIENT):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in limits.items():
            patch.setattr(download, name, value)
        download.download(urls, path, sha256=SHA256, max_bytes=len(CONTENT))


@pytest.mark.parametrize('page', ['good', 'unmeasured'])
def test_a_good_answer_is_written_alone(address, tmp_path, page, capfd):
    fetch([f'{address}/{page}'], tmp_path / 'input.txt')
    assert (tmp_path / 'input.txt').read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ['input.txt']
    assert capfd.readouterr() == ('', '')  # the progress bar is for a terminal


@pytest.mark.parametrize(
    'page, reason',
    [
        ('missing', 'HTTP 404'),
        ('html', 'not the expected file'),
        ('truncated', 'connection lost .* 129,000 bytes'),
        ('stalled', 'timed out'),
        ('silent', 'timed out'),
        ('drip', 'too slow'),
        ('endless', 'not the expected file .*129,000 bytes'),
    ],
)
def test_a_bad_answer_leaves_nothing_and_is_explained(address, tmp_path, page, reason):
    begun = time.monotonic()
    with pytest.raises(UserError, match=rf'input\.txt could not be downloaded \({reason}') as error:
        fetch([f'{address}/{page}'], tmp_path / 'input.txt', LIMITS.get(page, PATIENT))
    assert time.monotonic() - begun < 60  # the server would go on for hours
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


def test_a_reason_that_all_addresses_share_is_told_once(address, tmp_path):
    with pytest.raises(UserError, match=r'could not be downloaded \(HTTP 404\)$'):
        fetch([f'{address}/missing', f'{address}/missing?2'], tmp_path / 'input.txt')


def test_every_address_is_named_with_its_reason(address, tmp_path):
    with pytest.raises(
        UserError,
        match=r'input\.txt could .* \(127.*HTTP 404; 127.*not the expected file.*; '
        r'127\.0\.0\.1:1: no connection',
    ):
        fetch(
            [f'{address}/missing', f'{address}/html', 'http://127.0.0.1:1/'], tmp_path / 'input.txt'
        )
