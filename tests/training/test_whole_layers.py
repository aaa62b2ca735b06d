"""What an exporter would merge or compute away, and what an adapter on it would get wrong."""

from __future__ import annotations

import copy

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnxscript import optimizer
from torch import nn

from deployfa.adapter import Adapter
from deployfa.edits import Array, Edit, LowRank
from deployfa.graph import apply_adapter, find_sites, make_plan
from deployfa.graph.evaluate import evaluate
from deployfa.training.base_graph import export_module
from deployfa.training.reference import attach
from deployfa.training.whole_layers import whole_layers


class SelfPadded(nn.Conv2d):
    """Pads by itself, with a module of its own, as TensorFlow's ports do."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded: torch.Tensor = self.static_padding(x)
        return super().forward(padded)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d(1)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.own = SelfPadded()
        self.fc = nn.Linear(4, 5)
        self.norm1d = nn.BatchNorm1d(5)
        self.positions = nn.Parameter(torch.randn(1, 6))
        self.project = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.own(self.norm(self.conv(self.pad(x))))
        y = self.norm1d(self.fc(y.mean((2, 3))))
        out: torch.Tensor = y + self.project(self.positions)
        return out


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for norm in (net.norm, net.norm1d):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.add_(torch.rand(tensor.shape))
    return net


@pytest.fixture(scope="module")
def graph(net: nn.Module) -> ir.Model:
    return export_module(net, {"x": X}, {"x": {0: "batch"}})


def error(graph: ir.Model, net: nn.Module, adapter: Adapter, **options: str) -> float:
    """The error of the placed adapter over the float32 noise of the model."""
    placed = apply_adapter(graph, adapter, make_plan(graph, adapter, **options))
    (found,) = evaluate(placed, [{"x": X.numpy()}])[0].values()
    with torch.inference_mode():
        truth: Array = attach(copy.deepcopy(net).double(), adapter)(X.double()).numpy()
        single: Array = attach(copy.deepcopy(net), adapter)(X).numpy()
    return float(np.linalg.norm(found - truth) / np.linalg.norm(single - truth))


def test_every_layer_is_a_site_with_its_own_weight(net: nn.Module, graph: ir.Model) -> None:
    sites = find_sites(graph)
    assert set(sites) == {"conv", "own", "fc", "project"}
    for path, site in sites.items():
        np.testing.assert_array_equal(site.constant_weight(), net.get_submodule(path).weight.detach().numpy())
    assert [value.name for value in graph.graph.inputs] == ["x"]
    assert {node.domain for node in graph.graph.all_nodes()} == {""} == set(graph.opset_imports)


def test_without_it_the_exporter_merges_and_computes(net: nn.Module) -> None:
    exported = torch.onnx.export(net, kwargs={"x": X}, dynamo=True, verbose=False)
    assert exported is not None
    sites = find_sites(exported.model)
    assert set(sites) == {"norm", "own", "norm1d"}
    assert not np.array_equal(sites["norm"].constant_weight(), net.conv.weight.detach().numpy())


@pytest.mark.parametrize("placement", ["auto", "side-op"])
@pytest.mark.parametrize("site", ["conv", "own", "fc", "project"])
def test_an_edit_before_a_norm_or_behind_a_pad_is_exact(
    net: nn.Module, graph: ir.Model, site: str, placement: str
) -> None:
    random = np.random.default_rng(0)
    weight = net.get_submodule(site).weight
    d, k, kernel = weight.shape[0], weight.shape[1], tuple(weight.shape[2:])
    vector = random.standard_normal(k).astype(np.float32)
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((2, k, *kernel), (d, 2)))
    shift, low = (
        Adapter("vefa", {site: Edit(delta=vector)}),
        Adapter("lora", {site: Edit(output_low_rank=LowRank(a, b, 1.0))}),
    )
    assert error(graph, net, shift, placement=placement) <= 1
    # a convolution that pads by itself hands the reference another input than its weight reads
    if site != "own":
        assert error(graph, net, low, placement=placement) <= 1


def test_the_optimizer_is_put_back() -> None:
    before = optimizer.optimize_ir
    with pytest.raises(ZeroDivisionError), whole_layers():
        assert optimizer.optimize_ir is not before
        raise ZeroDivisionError
    assert optimizer.optimize_ir is before
