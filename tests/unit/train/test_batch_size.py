import math
import subprocess
import sys
import weakref

import pytest

from sdxl_ray.errors import ConfigError
from sdxl_ray.train.batch_size import fits_on_cuda, global_batch, largest_micro_batch


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 100])
def test_the_largest_that_fits_in_few_tries(limit):
    for most in range(limit + 3):
        tried = []

        def fits(size, most=most, tried=tried):
            tried.append(size)
            return size <= most

        found = largest_micro_batch(fits, limit=limit)
        assert found == min(most, limit)
        assert len(tried) == len(set(tried))
        assert all(1 <= size <= limit for size in tried)
        assert len(tried) <= 2 * math.log2(max(found, 1)) + 2
        assert all(size <= max(2 * found, 1) for size in tried)  # nothing far too large is tried


def test_which_sizes_are_tried():
    tried = []
    assert largest_micro_batch(lambda size: tried.append(size) or size <= 5, limit=100) == 5
    assert tried == [1, 2, 4, 8, 6, 5]
    tried.clear()
    assert largest_micro_batch(lambda size: tried.append(size) or True, limit=6) == 6
    assert tried == [1, 2, 4, 6]
    tried.clear()
    assert largest_micro_batch(lambda size: tried.append(size), limit=6) == 0
    assert tried == [1]


def test_a_limit_below_one_is_a_mistake():
    with pytest.raises(ValueError, match="limit is 0"):
        largest_micro_batch(lambda size: True, limit=0)


@pytest.mark.parametrize("wanted", range(1, 61))
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_the_global_batch_is_kept(wanted, num_workers):
    for found in (1, 2, 5, 8, 64):
        if wanted % num_workers:
            continue
        size, accumulation = global_batch(found, num_workers, wanted)
        assert size * accumulation * num_workers == wanted
        assert size <= found
        assert not any(wanted % (larger * num_workers) == 0 for larger in range(size + 1, found + 1))


@pytest.mark.parametrize(
    ("num_workers", "wanted", "cure"), [(4, 3, "4"), (4, 6, "4 or 8"), (3, 64, "63 or 66"), (2, 0, "2")]
)
def test_a_global_batch_that_cannot_be_shared(num_workers, wanted, cure):
    with pytest.raises(ConfigError) as error:
        global_batch(8, num_workers, wanted)
    assert str(error.value) == (
        f"train.global_batch_size = {wanted} cannot be shared evenly by {num_workers} workers, which each need the "
        f"same number of images. Set train.global_batch_size = {cure}, or change train.num_workers."
    )


@pytest.fixture
def gpu(monkeypatch):
    """Stands in for torch.cuda: 100 bytes, of which the test says how many are held."""
    import torch

    calls = []
    state = {"held": 0, "calls": calls}
    for name, function in {
        "empty_cache": lambda: calls.append("empty"),
        "reset_peak_memory_stats": lambda: calls.append("reset"),
        "synchronize": lambda: calls.append("wait"),
        "max_memory_reserved": lambda: state["held"],
        "mem_get_info": lambda: (0, 100),
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return state


def test_a_step_fits_if_it_leaves_headroom(gpu):
    for held, answer in ((0, True), (95, True), (96, False)):
        gpu["held"] = held
        assert fits_on_cuda(lambda: None) is answer
    gpu["held"] = 75
    assert not fits_on_cuda(lambda: None, headroom=0.3)
    assert gpu["calls"][:4] == ["empty", "reset", "wait", "empty"]


def test_out_of_memory_means_no_and_nothing_is_left_of_the_step(gpu):
    import torch

    class Big:
        pass

    left = []

    def step():
        big = Big()
        left.append(weakref.ref(big))
        gpu["calls"].append("step")
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert fits_on_cuda(step) is False
    assert left[0]() is None
    assert gpu["calls"] == ["empty", "reset", "step", "empty"]


def test_other_errors_are_raised(gpu):
    def step():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        fits_on_cuda(step)


def test_the_module_needs_no_torch():
    code = "import sys, sdxl_ray.train.batch_size; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
