from __future__ import annotations

import pytest
import torch

from fxmerge.errors import UserError
from fxmerge.inputs import batch_size, map_tensors, split_example, tensors, with_batch


def test_split_example():
    x = torch.zeros(2, 3)
    assert split_example(x) == ((x,), {})
    assert split_example((x, 5)) == ((x, 5), {})
    assert split_example({"x": x, "flag": True}) == ((), {"x": x, "flag": True})


@pytest.mark.parametrize("example", [[torch.zeros(1)], {1: torch.zeros(1)}, "x", 3, None])
def test_other_examples_are_refused(example):
    with pytest.raises(UserError, match=f"example_input is a {type(example).__name__}; expected a tensor, a tuple"):
        split_example(example)


@pytest.mark.parametrize("example", [(), {}, (1, "a"), {"x": [None]}])
def test_example_without_tensors_is_refused(example):
    with pytest.raises(UserError, match="holds no tensor"):
        split_example(example)


def test_nested_tensors_are_found_and_mapped():
    args, kwargs = (torch.ones(1), [torch.ones(1) * 2, "a"]), {"k": {"deep": torch.ones(1) * 3}}
    assert [float(tensor) for tensor in tensors(args, kwargs)] == [1, 2, 3]
    mapped = map_tensors(lambda tensor: tensor * 10, args, kwargs)
    assert [float(tensor) for tensor in tensors(*mapped)] == [10, 20, 30]
    assert mapped[0][1][1] == "a"
    assert [float(tensor) for tensor in tensors(args, kwargs)] == [1, 2, 3]


def test_batch_size():
    assert batch_size((torch.zeros(4, 3), torch.tensor(1.0)), {"y": torch.zeros(4)}) == 4
    assert batch_size((torch.zeros(4, 3), torch.zeros(1)), {}) is None
    assert batch_size((torch.tensor(1.0),), {}) is None


def test_with_batch_repeats_and_truncates():
    x, scalar = torch.tensor([[1], [2], [3]]), torch.tensor(7.0)
    (longer, kept), kwargs = with_batch((x, scalar), {"n": 5}, 5)
    assert longer.tolist() == [[1], [2], [3], [1], [2]]
    assert kept.item() == 7.0
    assert kwargs == {"n": 5}
    assert with_batch((x,), {}, 2)[0][0].tolist() == [[1], [2]]
    with pytest.raises(UserError, match="empty batch axis"):
        with_batch((torch.zeros(0, 3),), {}, 2)
