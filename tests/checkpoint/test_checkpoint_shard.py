"""The library `safetensors` is the oracle of both directions."""

import hashlib
import struct
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamf.checkpoint import layout
from megamf.checkpoint.shard import Shard, ShardError, write_shard


def samples():
    rng = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in layout.DTYPES:
        values = torch.randint(0, 100, (3, 5), generator=rng).to(dtype)
        tensors[f"weights/{dtype}"] = values
        tensors[f"weights/{dtype}.transposed"] = values.T
        tensors[f"weights/{dtype}.scalar"] = values[0, 0]
        tensors[f"weights/{dtype}.empty"] = values[:0]
    tensors["weights/large"] = torch.randn(1 << 18, 9, generator=rng)  # more than one chunk
    tensors["weights/grad"] = torch.ones(2, requires_grad=True)
    return tensors


def test_the_library_reads_what_is_written(tmp_path):
    tensors = samples()
    file, entries = write_shard(tmp_path / "a.safetensors", tensors, {"attempt": "x"})
    content = (tmp_path / "a.safetensors").read_bytes()
    assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys() == entries.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype == layout.DTYPE_OF_NAME[entries[name].dtype]
        assert list(found[name].shape) == list(tensor.shape) == entries[name].shape
        assert torch.equal(found[name], tensor.detach())
        raw = bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())
        assert entries[name].crc32 == zlib.crc32(raw)


def test_what_the_library_writes_is_read(tmp_path):
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in samples().items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"attempt": "y"})
    shard = Shard(tmp_path / "a.safetensors")
    assert shard.metadata == {"attempt": "y"}
    for name, tensor in tensors.items():
        out = torch.empty_like(tensor)
        crc = shard.read_into(name, out)
        assert torch.equal(out, tensor)
        assert crc == zlib.crc32(bytes(tensor.reshape(-1).view(torch.uint8).tolist()))
    shard.close()


def test_tensors_are_aligned(tmp_path):
    tensors = {"weights/a": torch.zeros(3, dtype=torch.int8), "weights/b": torch.zeros(3, dtype=torch.float64)}
    write_shard(tmp_path / "a.safetensors", tensors, {})
    assert load_file(tmp_path / "a.safetensors")["weights/b"].data_ptr() % 8 == 0


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_unknown_dtypes_are_refused_before_anything_is_written(tmp_path, dtype):
    with pytest.raises(ValueError, match=str(dtype)):
        write_shard(tmp_path / "a.safetensors", {"weights/a": torch.zeros(2, dtype=dtype)}, {})
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\1",
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"\xff\xff",
        struct.pack("<Q", 2) + b"{",
    ],
)
def test_broken_headers_are_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ShardError):
        Shard(tmp_path / "a.safetensors")


def test_a_file_that_ends_early_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    write_shard(path, {"weights/a": torch.arange(100)}, {})
    path.write_bytes(path.read_bytes()[:-1])
    shard = Shard(path)
    with pytest.raises(ShardError, match="ends within weights/a"):
        shard.read_into("weights/a", torch.empty(100, dtype=torch.int64))
    for name, shape in (("weights/b", 100), ("weights/a", 99)):
        with pytest.raises(ShardError, match="in the manifest"):
            shard.read_into(name, torch.empty(shape, dtype=torch.int64))
    shard.close()
