"""The calibration stream: activations in memory and on disk, copies, and gradients through a block."""

import errno
import os
import resource

import pytest
import torch
from tiny import random_tokens, tiny_llama

from aqlm_c.calibrate.activations import capture
from aqlm_c.calibrate.hessians import HessianSums
from aqlm_c.calibrate.spill import SpilledTensors
from aqlm_c.model.blocks import find_blocks


def bits(tensors):
    return [tensor.contiguous().view(torch.uint8) for tensor in tensors]


def assert_same_bits(got, want):
    assert len(got) == len(want)
    for a, b in zip(bits(got), bits(want), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_on_disk_has_the_bits_of_one_in_memory(tmp_path, dtype):
    model = tiny_llama(dtype)
    _, blocks = find_blocks(model)
    streams = [capture(model, blocks, random_tokens(5, 12), 2, directory) for directory in (None, tmp_path)]
    linears = {"down": blocks[0].mlp.down_proj}
    for index, block in enumerate(blocks):
        assert_same_bits(streams[1].hidden, streams[0].hidden)
        if index == 0:
            sums = []
            for stream in streams:
                sums.append(HessianSums(linears))
                sums[-1].gather(stream, index, block)
            assert (sums[0].hessians()["down"].H == sums[1].hessians()["down"].H).all()
        for stream in streams:
            stream.advance(index, block)
    assert isinstance(streams[1].hidden, SpilledTensors)
    assert_same_bits(streams[1].hidden, streams[0].hidden)


@pytest.mark.parametrize("on_disk", [False, True])
def test_an_empty_stream_takes_outputs_and_shares_the_arguments(tmp_path, on_disk):
    model = tiny_llama()
    _, blocks = find_blocks(model)
    stream = capture(model, blocks, random_tokens(5, 12), 2, tmp_path if on_disk else None)
    before = [tensor.clone() for tensor in stream.hidden]
    with stream.empty() as other:
        linears = {"q": blocks[0].self_attn.q_proj}
        HessianSums(linears).gather(stream, 0, blocks[0], other)
        assert_same_bits(other.hidden, [stream.run(0, blocks[0], batch) for batch in range(3)])
        assert other.batch_sizes() == stream.batch_sizes() == [2, 2, 1]
    assert len(other.hidden) == 0
    assert other.arguments is stream.arguments
    assert type(other.hidden) is type(stream.hidden)
    assert_same_bits(stream.hidden, before)
    stream.close()
    assert len(stream.hidden) == 0


def test_gradients_flow_through_forward_and_not_through_run(tmp_path):
    model = tiny_llama()
    _, blocks = find_blocks(model)
    stream = capture(model, blocks, random_tokens(4, 12), 2, tmp_path)
    assert not stream.run(0, blocks[0], 1).requires_grad
    output = stream.forward(0, blocks[0], 1)
    assert torch.equal(output, stream.run(0, blocks[0], 1))
    output.square().sum().backward()
    assert blocks[0].input_layernorm.weight.grad.abs().sum() > 0


def test_disk_tensors_are_a_list(tmp_path):
    store = SpilledTensors(tmp_path)
    tensors = [torch.randn(3, 4), torch.randn(2, 4).bfloat16(), torch.randn(5, 6)[:, ::2]]
    for tensor in tensors:
        store.append(tensor)
    assert_same_bits(list(store), tensors)
    store[1] = tensors[1] = torch.randn(7, 9)  # larger than what was there
    store[0] = tensors[0] = torch.randn(3, 4)
    assert_same_bits(list(store), tensors)
    read = store[0]
    store[0] = torch.zeros(3, 4)
    assert torch.equal(read, tensors[0])  # what was read is nobody else's
    with pytest.raises(IndexError):
        store[3]


def test_nothing_is_left_on_disk(tmp_path):
    store = SpilledTensors(tmp_path)
    store.append(torch.randn(1000))
    assert os.listdir(tmp_path) == []  # so that even a killed process leaves nothing
    store.clear()
    with pytest.raises(ValueError, match="closed"):
        store.append(torch.randn(1))


def test_a_full_disk_names_the_directory(tmp_path):
    store = SpilledTensors(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        store.append(torch.zeros(512))
        with pytest.raises(OSError, match="cannot keep activations here") as caught:
            store.append(torch.zeros(4096))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path) in str(caught.value) and caught.value.errno == errno.EFBIG


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(OSError, match=r"nowhere: cannot keep activations here: No such file"):
        SpilledTensors(tmp_path / "nowhere")
