"""Reads and writes safetensors files block by block, and computes their SHA-256 at the same time.

The format: 8 bytes with the length of the header, the header as JSON (name -> dtype, shape,
offsets), then the tensors' bytes. The safetensors package reads and writes the same files, but it
holds Python's global lock meanwhile, which would stop training, and it copies all tensors.
"""

import hashlib
import json
import os
import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

BLOCK = 1 << 24  # bytes that are written and hashed at a time
DTYPES = {
    'F64': torch.float64,
    'F32': torch.float32,
    'F16': torch.float16,
    'BF16': torch.bfloat16,
    'I64': torch.int64,
    'I32': torch.int32,
    'I16': torch.int16,
    'I8': torch.int8,
    'U8': torch.uint8,
    'BOOL': torch.bool,
}
NOTES = '__metadata__'  # the header's field for notes
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Altered(Exception):
    """A file's content is not what was written."""


def write(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Writes CPU tensors to a new file and syncs it to the disk; returns its SHA-256.

    metadata: texts to store in the header's field for notes.
    """
    with _hashing() as (digest, update), open(path, 'wb') as file:
        for block in _blocks(tensors, metadata):
            update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def read(path: Path, expected: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file. Raises Altered if its SHA-256 is not the expected one.

    The digest is that of the bytes in memory from which the tensors are made.
    """
    with _hashing() as (digest, update):
        with open(path, 'rb', buffering=0) as file:
            content = torch.empty(os.fstat(file.fileno()).st_size, dtype=torch.uint8)
            view = content.numpy().data
            start = 0
            while start < len(view) and (length := file.readinto(view[start : start + BLOCK])):
                update(view[start : start + length])
                start += length
        tensors, problem = {}, None
        try:  # while the hash is being computed
            tensors = _parse(content[:start])
        except Exception as error:  # damage can cause any error; or the memory is full
            problem = error
    if digest.hexdigest() != expected:
        raise Altered(f'{path}: its content is not what was saved (SHA-256 differs)')
    if problem:
        raise problem
    return tensors


def _blocks(tensors: Mapping[str, torch.Tensor], metadata) -> Iterator[memoryview]:
    """Yields the bytes of the file, without copying the tensors."""
    # Widest dtype first, so each tensor begins at a multiple of its element size.
    tensors = {
        name: tensors[name].detach().contiguous()
        for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    }
    header: dict[str, Mapping] = {NOTES: metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            'dtype': DTYPE_NAMES[tensor.dtype],
            'shape': list(tensor.shape),
            'data_offsets': [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b' ' * (-len(encoded) % 8)
    yield memoryview(len(encoded).to_bytes(8, 'little') + encoded)
    for tensor in tensors.values():
        content = tensor.reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(content), BLOCK):
            yield content[start : start + BLOCK]


def _parse(content: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns copies of the tensors in a file's bytes, where they would not be aligned."""
    data = 8 + int.from_bytes(content[:8].numpy().tobytes(), 'little')
    header = json.loads(content[8:data].numpy().tobytes())
    tensors = {}
    for name, entry in header.items():
        if name != NOTES:
            start, end = entry['data_offsets']
            own = content[data + start : data + end].clone()
            tensors[name] = own.view(DTYPES[entry['dtype']]).reshape(entry['shape'])
    return tensors


@contextmanager
def _hashing():
    """Yields a SHA-256 object and a function that feeds it bytes in a thread of its own.

    The digest is complete when the with block has ended.
    """
    digest, blocks = hashlib.sha256(), queue.SimpleQueue()
    # Not an executor: at the end of the program, while the last save may still be in progress,
    # executors accept no more work.
    thread = threading.Thread(
        target=lambda: [digest.update(block) for block in iter(blocks.get, None)]
    )
    thread.start()
    try:
        yield digest, blocks.put
    finally:
        blocks.put(None)
        thread.join()
