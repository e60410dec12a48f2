"""Safetensors files, written and read block by block, with their SHA-256 computed meanwhile.

The format: 8 bytes with the length of a header, the header as JSON (name -> dtype, shape, offsets), then the tensors' bytes.
The safetensors package reads and writes the same files, but holds Python's lock for as long, so that training would stand
still, and makes a copy of all tensors.
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

BLOCK = 1 << 24  # bytes given to the disk and to SHA-256 at a time
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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Altered(Exception):
    """A file whose content is not what was written."""


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Writes tensors, which are on the CPU, to a new file and to the disk; returns the file's SHA-256."""
    with _hashing() as (digest, update), open(path, 'wb') as file:
        for block in _blocks(tensors):
            update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def read(path: Path, expected: str) -> dict[str, torch.Tensor]:
    """The tensors of a file. Altered where the SHA-256 of the very bytes that they were made of is not the expected one."""
    with _hashing() as (digest, update):
        with open(path, 'rb', buffering=0) as file:
            content = torch.empty(os.fstat(file.fileno()).st_size, dtype=torch.uint8)
            view = memoryview(content.numpy())
            start = 0
            while start < len(view) and (length := file.readinto(view[start : start + BLOCK])):
                update(view[start : start + length])
                start += length
        tensors, trouble = {}, None
        try:  # while the hash is catching up
            tensors = _parse(content[:start])
        except Exception as error:  # whatever damage makes of it, or too little memory
            trouble = error
    if digest.hexdigest() != expected:
        raise Altered(f'{path}: its content is not what was saved (SHA-256 differs)')
    if trouble:
        raise trouble
    return tensors


def _blocks(tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    """The bytes of the file; those of the tensors without a copy."""
    # the widest first, so that each begins at a multiple of its width
    tensors = {
        name: tensors[name].detach().contiguous()
        for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    }
    header, end = {}, 0
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
        content = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        for start in range(0, len(content), BLOCK):
            yield content[start : start + BLOCK]


def _parse(content: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors in a file's bytes; copies, as a tensor in the midst of the file would lie askew in memory."""
    data = 8 + int.from_bytes(content[:8].numpy().tobytes(), 'little')
    header = json.loads(content[8:data].numpy().tobytes())
    tensors = {}
    for name, entry in header.items():
        if name != '__metadata__':  # the format's place for notes
            start, end = entry['data_offsets']
            tensors[name] = (
                content[data + start : data + end]
                .clone()
                .view(DTYPES[entry['dtype']])
                .reshape(entry['shape'])
            )
    return tensors


@contextmanager
def _hashing():
    """A SHA-256 and the function that gives it bytes. A thread of its own computes it, which is done when the block ends."""
    digest, blocks = hashlib.sha256(), queue.SimpleQueue()
    # not an executor: those take no more work when the program is ending, and a last save may still be under way then
    thread = threading.Thread(
        target=lambda: [digest.update(block) for block in iter(blocks.get, None)]
    )
    thread.start()
    try:
        yield digest, blocks.put
    finally:
        blocks.put(None)
        thread.join()
