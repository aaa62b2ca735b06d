"""B of grouped convolutions, there and back, and what has no way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deployfa.adapter.peft_convolutions import convolution_of, convolutions, grouped, ungrouped
from deployfa.errors import EditError


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_b_of_a_grouped_convolution_is_a_matrix(groups, axes):
    """Held against torch: a grouped 1x1 convolution is the product with the matrix that ``ungrouped`` gives."""
    rng = np.random.default_rng(groups)
    narrow = rng.standard_normal((6, 4))
    whole = ungrouped(narrow, 4 * groups)
    convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[axes - 1]
    x = torch.from_numpy(rng.standard_normal((2, 4 * groups, *[3] * axes)))
    weight = grouped("conv", whole, axes, groups)
    assert weight.shape == (6, 4, *[1] * axes)
    expected = convolve(x, torch.from_numpy(weight), groups=groups)
    found = torch.einsum("or,br...->bo...", torch.from_numpy(whole), x)
    assert torch.allclose(found, expected, rtol=0, atol=64 * 2.0**-53 * float(expected.abs().max()))
    assert np.array_equal(weight.reshape(6, 4), narrow)


def test_b_across_groups_has_no_grouped_form():
    with pytest.raises(EditError, match="reads across the 2 groups"):
        grouped("conv", np.ones((4, 4)), 2, 2)
    with pytest.raises(EditError, match="does not divide into 3 groups"):
        grouped("conv", np.ones((4, 4)), 2, 3)


@pytest.mark.parametrize("shape", [(4, 3), (4, 0), (3, 2)])
def test_what_is_no_grouped_b_stays_as_it_is(shape):
    """Its rank then differs from A's, and the edit is refused where it meets its site."""
    assert ungrouped(np.ones(shape), 4).shape == shape


def test_what_tensors_say():
    tensors = {
        "a.ia3_l": np.ones((1, 4, 1, 1)),
        "b.ia3_l": np.ones((1, 4)),
        "c.lora_A.weight": np.ones((4, 3, 3, 3, 3)),
        "c.lora_B.weight": np.ones((6, 2, 1, 1, 1)),
        "d.lora_A.weight": np.ones((4, 3)),
        "d.lora_B.weight": np.ones((6, 4)),
        "head.weight": np.ones((2, 2, 2)),
    }
    config = convolutions(tensors)
    assert config == {"convolutions": {"a": [2, 1], "c": [3, 2]}}
    assert [convolution_of(site, config) for site in "abc"] == [(2, 1), (0, 1), (3, 2)]
    assert convolutions({"d.lora_B.weight": np.ones((6, 4))}) == {}
