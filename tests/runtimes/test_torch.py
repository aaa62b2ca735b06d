"""TorchRunner: numpy in, numpy out, and the module stays as it was."""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from deployfa.errors import MissingExtraError, RuntimeTargetError
from deployfa.runtimes.torch import TorchRunner


class Classifier(nn.Module):
    """Tokens → logits, with dropout so that training mode would show."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None].to(self.head.weight.dtype)
        hidden = (self.embed(input_ids) * mask).sum(1)
        return {"logits": self.head(self.drop(hidden)), "hidden": hidden, "count": 3}


IDS = np.random.default_rng(0).integers(0, 20, (2, 5))
FEEDS = {"attention_mask": np.ones((2, 5), np.int64), "input_ids": IDS}
NAMES = ["input_ids", "attention_mask"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_runs_in_the_modules_dtype_without_dropout(dtype):
    module = Classifier().to(dtype).train()
    logits = TorchRunner(module, NAMES).run(FEEDS)["logits"]
    module.eval()
    with torch.no_grad():
        expected = module(torch.from_numpy(IDS), torch.ones(2, 5, dtype=torch.int64))["logits"].numpy()
    assert logits.dtype == expected.dtype
    np.testing.assert_array_equal(logits, expected)


def test_training_flags_are_put_back_even_after_a_failure():
    module = Classifier().train()
    module.embed.eval()
    runner = TorchRunner(module, NAMES)
    before = [part.training for part in module.modules()]
    runner.run(FEEDS)
    assert [part.training for part in module.modules()] == before
    with pytest.raises(RuntimeTargetError, match="PyTorch failed while running"):
        runner.run({**FEEDS, "input_ids": np.full((2, 5), 99)})
    assert [part.training for part in module.modules()] == before


def test_floating_feeds_take_the_modules_dtype_and_are_not_changed():
    module = nn.Linear(3, 2).double()
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    x.flags.writeable = False
    y = TorchRunner(module, ["x"], ["y"]).run({"x": x})["y"]
    weight, bias = module.weight.detach().numpy(), module.bias.detach().numpy()
    np.testing.assert_allclose(y, x.astype(np.float64) @ weight.T + bias, rtol=1e-12)


def test_bfloat16_modules_answer_in_float32():
    module = nn.Linear(3, 2).to(torch.bfloat16)
    x = np.ones((1, 3), ml_dtypes.bfloat16)
    y = TorchRunner(module, ["x"], ["y"]).run({"x": x})["y"]
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, module(torch.ones(1, 3, dtype=torch.bfloat16)).detach().float().numpy())


def test_an_empty_list_of_outputs_takes_every_tensor():
    assert set(TorchRunner(Classifier(), NAMES, ()).run(FEEDS)) == {"logits", "hidden"}
    assert set(TorchRunner(nn.Linear(3, 2), ["x"], ()).run({"x": np.ones((1, 3), np.float32)})) == {"output_0"}


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"input_ids": IDS}, "input 'attention_mask' is missing; feed exactly: input_ids, attention_mask"),
        ({**FEEDS, "other": IDS}, "input 'other' is not an input of this module; feed exactly"),
    ],
)
def test_wrong_feeds(feeds, message):
    with pytest.raises(RuntimeTargetError, match=message):
        TorchRunner(Classifier(), NAMES).run(feeds)


def test_a_missing_output_lists_what_there_is():
    with pytest.raises(RuntimeTargetError, match="returned no 'scores'; it returned: logits, hidden"):
        TorchRunner(Classifier(), NAMES, ("scores",)).run(FEEDS)
    with pytest.raises(RuntimeTargetError, match="returned 1 outputs; it was asked for a, b"):
        TorchRunner(nn.Linear(3, 2), ["x"], ("a", "b")).run({"x": np.ones((1, 3), np.float32)})


def test_specs_follow_the_convention():
    inputs = TorchRunner(Classifier().double(), [*NAMES, "pixel_values"]).inputs
    assert [(spec.dtype, spec.shape) for spec in inputs] == [
        ("int64", ("batch", "sequence")),
        ("int64", ("batch", "sequence")),
        ("float64", ("...",)),
    ]


def test_a_missing_torch_names_the_extra(monkeypatch):
    module = Classifier()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"deployfa\[train\]"):
        TorchRunner(module, NAMES)
