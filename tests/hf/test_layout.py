"""The public layout against the published numbers of the released 8B files."""

import pytest
import torch

import megamf.hf
from megamf.config import load_config
from megamf.hf.configuration import to_public
from megamf.hf.layout import BUFFER, Entry, header, mask_buffer, plan_shards, public_entries, public_shapes, shard_names
from megamf.hf.portable import modeling_moduleformer as portable


def released():
    model = load_config(preset="molm-700m-8b").model
    return public_entries(model, dict.fromkeys(public_shapes(model), torch.bfloat16), buffers=True)


def test_entries_and_bytes_of_the_released_index():
    entries = released()
    assert len(entries) == 772
    assert sum(entry.num_bytes for entry in entries) == 16_515_088_384


def test_shards_of_the_released_files():
    shards = plan_shards(released(), 10 * 10**9)
    assert [sum(entry.num_bytes for entry in shard) for shard in shards] == [9_993_108_480, 6_521_979_904]
    assert shards[1][0].name == "transformer.h.29.attn.q_proj.output_experts.weight"


@pytest.mark.parametrize("room", [megamf.hf, portable], ids=["native", "portable"])
def test_the_released_8b_is_that_of_the_classes(room):
    """Built on the meta device: every parameter of the classes is one tensor of the released files, in their shape."""
    model = load_config(preset="molm-700m-8b").model
    with torch.device("meta"):
        built = room.ModuleFormerForCausalLM(portable.ModuleFormerConfig(**to_public(model))).bfloat16()
    state = built.state_dict()
    entries = {entry.name: entry for entry in released()}
    masks = {name for name in entries if BUFFER.fullmatch(name)}
    assert len(masks) == 96 and state.keys() == entries.keys() - masks
    assert all(tuple(value.shape) == entries[name].shape for name, value in state.items())
    held = sum(value.numel() * value.itemsize for value in state.values())
    # Of each layer 1024 x 1024 booleans in a byte each, and as many weights in two.
    assert held + 48 * 1024**2 * 3 == 16_515_088_384 and len(state) + 96 == 772


def test_bytes_of_the_released_4b_file():
    model = load_config(preset="molm-350m-4b").model
    entries = public_entries(model, dict.fromkeys(public_shapes(model), torch.bfloat16), buffers=True)
    assert sum(entry.num_bytes for entry in entries) == 8_360_550_400


def test_a_tensor_larger_than_a_shard_gets_its_own():
    entries = [Entry(name, (size,), torch.int8) for name, size in (("a", 3), ("b", 50), ("c", 4), ("d", 6))]
    assert [[entry.name for entry in shard] for shard in plan_shards(entries, 10)] == [["a"], ["b"], ["c", "d"]]
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2)[1] == "model-00002-of-00002.safetensors"


def test_masks():
    inclusive = mask_buffer(Entry("transformer.h.0.attn.mask", (3, 3), torch.int8))
    strict = mask_buffer(Entry("transformer.h.0.attn.cum_weight", (3, 3), torch.bfloat16))
    assert inclusive.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert strict.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0]] and strict.dtype == torch.bfloat16


def test_every_tensor_of_a_file_is_aligned():
    entries = [Entry("odd", (5, 5), torch.int8), Entry("wide", (3,), torch.float64), Entry("half", (3,), torch.float16)]
    ordered, table = header(entries)
    for entry in ordered:
        assert table[entry.name]["data_offsets"][0] % entry.dtype.itemsize == 0
