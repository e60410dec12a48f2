"""Safetensors files: the same as those of the safetensors package, and hashed meanwhile."""

import hashlib
import json

import pytest
import safetensors.torch
import torch

from nib.checkpoint import tensorfile

TENSORS = {
    'float': torch.arange(15.0).view(3, 5) / 7,
    'scalar': torch.tensor(3.0),
    'half': torch.ones(3, 2, dtype=torch.bfloat16),
    'none': torch.zeros(0, 3),
    'flags': torch.tensor([True, False, True]),
    'é, transposed': torch.arange(6).view(2, 3).t(),
    'wide': torch.tensor([1.5], dtype=torch.float64),
}


def assert_equal(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize('block', [1, 7, 1 << 24])
def test_what_is_written_is_read_here_and_by_the_safetensors_package(tmp_path, monkeypatch, block):
    monkeypatch.setattr(tensorfile, 'BLOCK', block)
    path = tmp_path / 'file'
    digest = tensorfile.write(path, TENSORS)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert_equal(tensorfile.read(path, digest), TENSORS)
    assert_equal(safetensors.torch.load_file(path), TENSORS)
    content = path.read_bytes()
    data = 8 + int.from_bytes(content[:8], 'little')
    for name, entry in json.loads(content[8:data]).items():  # for readers that map the file
        assert (data + entry['data_offsets'][0]) % TENSORS[name].itemsize == 0, name


def test_metadata_is_written_as_the_safetensors_package_reads_it(tmp_path):
    digest = tensorfile.write(tmp_path / 'file', TENSORS, {'format': 'pt'})
    with safetensors.safe_open(tmp_path / 'file', 'pt') as file:
        assert file.metadata() == {'format': 'pt'}
    assert_equal(tensorfile.read(tmp_path / 'file', digest), TENSORS)


def test_files_of_the_safetensors_package_are_read(tmp_path):
    expected = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    safetensors.torch.save_file(expected, tmp_path / 'file', {'format': 'pt'})
    digest = hashlib.sha256((tmp_path / 'file').read_bytes()).hexdigest()
    assert_equal(tensorfile.read(tmp_path / 'file', digest), expected)


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'\xff' * 8,
        b'\x02' + bytes(7) + b'[]',
        b'\x02' + bytes(7) + b'{]',
        b'\x07' + bytes(7) + b'{"a":1}',
        bytes(100),
    ],
)
def test_whatever_has_become_of_a_file_is_one_kind_of_error(tmp_path, content):
    digest = tensorfile.write(tmp_path / 'file', TENSORS)
    (tmp_path / 'file').write_bytes(content)
    with pytest.raises(tensorfile.Altered, match='file'):
        tensorfile.read(tmp_path / 'file', digest)


def test_too_little_memory_is_not_called_damage(tmp_path, monkeypatch):
    digest = tensorfile.write(tmp_path / 'file', TENSORS)

    def parse(content):
        raise MemoryError

    monkeypatch.setattr(tensorfile, '_parse', parse)
    with pytest.raises(MemoryError):
        tensorfile.read(tmp_path / 'file', digest)
