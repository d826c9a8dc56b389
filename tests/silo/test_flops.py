"""What a token costs, what a GPU can do, and how many sequences fit: arithmetic that needs no GPU."""

import doctest
from contextlib import closing

import pytest
import torch

from dept_ray.rounds.pool import specs_of
from dept_ray.sections import ModelSection
from dept_ray.silo import flops, micro_batch
from dept_ray.silo.flops import flops_per_token, peak_flops
from dept_ray.silo.micro_batch import counts_to_try, find_micro_batch, fitting
from dept_ray.silo.silo import Silo


@pytest.mark.parametrize("module", [flops, micro_batch])
def test_the_examples_in_docstrings_hold(module):
    assert doctest.testmod(module).failed == 0


def test_a_gated_mlp_of_equal_size_costs_as_much():
    gpt2, llama = ModelSection(width=768, mlp_width=3072), ModelSection(arch="llama", width=768, mlp_width=2048)
    assert flops_per_token(gpt2, 1024, 50_257) == flops_per_token(llama, 1024, 50_257)


def test_keys_and_values_that_are_shared_cost_less():
    plain, grouped = (ModelSection(arch="llama", layers=2, width=8, heads=4, kv_heads=n) for n in (4, 1))
    assert flops_per_token(plain, 4, 10) - flops_per_token(grouped, 4, 10) == 6 * 2 * (2 * 6 * 8)


def test_the_head_and_a_longer_context_cost():
    section = ModelSection(layers=2, width=8, heads=2)
    assert flops_per_token(section, 4, 11) - flops_per_token(section, 4, 10) == 6 * 8
    assert flops_per_token(section, 5, 10) - flops_per_token(section, 4, 10) == 12 * 2 * 8


@pytest.mark.parametrize(("name", "tflops"), [
    ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
    ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA A10G", 70), ("NVIDIA RTX 6000 Ada Generation", 364),
    ("Tesla T4", 0), ("", 0),
])  # fmt: skip
def test_a_device_is_known_by_its_name(name, tflops):
    assert peak_flops(name) == tflops * 1e12


def test_a_micro_batch_fits_and_divides_the_share():
    gib = 1 << 30
    peaks = {1: 3 * gib, 2: 4 * gib, 4: 5 * gib}  # 3 GiB, and half a GiB each
    assert fitting(peaks, share=256, free=80 * gib, later=2 * gib) == 128  # 134 fit
    assert fitting(peaks, share=100, free=80 * gib, later=2 * gib) == 100
    assert fitting(peaks, share=254, free=80 * gib, later=2 * gib) == 127
    assert fitting(peaks, share=7, free=6 * gib, later=gib) == 1


def test_no_more_is_guessed_than_was_seen_to_fit():
    assert fitting({1: 100}, share=8, free=10_000, later=0) == 1
    assert fitting({1: 100, 2: 100}, share=8, free=101, later=200) == 1


def test_few_sequences_are_tried_and_never_more_than_there_are():
    assert counts_to_try(256, 512) == [1, 2, 4, 8, 16]
    assert counts_to_try(1, 512) == [1]
    assert counts_to_try(6, 512) == [1, 2, 4]


def test_trying_leaves_no_gradient_and_keeps_room_for_the_moments(tiny, monkeypatch):
    """A GPU's own figures stand in for a GPU: 1000 bytes, and 100 a sequence."""
    job = tiny("spec", inner={"batch_size": 64})
    with closing(Silo(job, specs_of(job)["code"])) as silo:
        tensors, seen = silo._learner.optimizer.tensors, iter([1100, 1200, 1400, 1800, 2600])
        moments = 2 * sum(tensor.nbytes for tensor in tensors)
        for name, answer in {
            "reset_peak_memory_stats": lambda: None, "empty_cache": lambda: None, "memory_reserved": lambda: 0,
            "max_memory_allocated": lambda: next(seen), "mem_get_info": lambda: ((moments + 4300) * 10 // 9, 10**9),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setitem(micro_batch.CHUNK_ROWS, "cuda", 256)
        assert find_micro_batch(silo.model, tensors, job, silo.hardware, part=1.0) == 32  # 33 fit
        assert not any(tensor.grad.any() for tensor in tensors)
