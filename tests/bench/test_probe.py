"""The search for the largest batch, with a step that holds no model."""

import pytest
import torch

from bench.probe import FINENESS, largest


def step_of(limit, tried):
    def step(size):
        tried.append(size)
        if size > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    return step


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 63, 64, 65, 100, 127])
def test_it_finds_the_limit_within_an_eighth_in_few_steps(limit):
    tried = []
    found = largest(step_of(limit, tried), cap=1 << 20)
    assert found <= limit < found + max(1, found // FINENESS) + 1
    assert len(tried) <= 2 * limit.bit_length() + 4
    assert max(tried) <= 2 * limit


def test_it_ends_without_a_limit_and_where_nothing_fits():
    tried = []
    assert largest(step_of(10**9, tried), cap=8) == 8
    assert tried == [1, 2, 4, 8]
    assert largest(step_of(0, []), cap=8) == 0


def test_a_librarys_own_words_count_and_other_errors_do_not():
    def workspace(size):
        if size > 4:
            raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")

    assert largest(workspace, cap=64) == 4

    def wrong(size):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        largest(wrong, cap=8)
