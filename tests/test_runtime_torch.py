"""PyTorch as a runtime, on the CPU."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import fx, nn

import fxmerge
from fxmerge.algebra import Geometry
from fxmerge.errors import UnsupportedError, UserError
from fxmerge.runtimes import LayerSignature, ProfilingRuntime, Runtime, _slope, interleave
from fxmerge.runtimes.torch import TorchRuntime


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_it_is_a_runtime_without_a_profiler():
    runtime = TorchRuntime(device="cpu")
    assert isinstance(runtime, Runtime)
    assert not isinstance(runtime, ProfilingRuntime)
    assert (runtime.name, runtime.unit, runtime.deterministic) == ("torch", "ms", False)
    assert repr(runtime) == "TorchRuntime(compile=False, device='cpu', threads=None, precision='float32')"


def test_larger_layers_take_longer(monkeypatch):
    monkeypatch.setattr(_slope, "_SWEEP_SECONDS", 0.02)
    small = LayerSignature(Geometry(16, 16, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 1), (16, 16), 1, "ReLU")
    large = LayerSignature(Geometry(64, 64, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 1), (32, 32), 1, "ReLU")
    other = LayerSignature(Geometry(16, 32, (3, 3), (2, 2), (1, 1), (1, 1), (1, 1), 1), (16, 16), 1, joined=True)
    assert large.geometry.macs(large.in_size) > 50 * small.geometry.macs(small.in_size)
    found = {}
    TorchRuntime(device="cpu", threads=1).measure([small, large, other], found.__setitem__)
    assert list(found) == [small, large, other]
    assert 0 < found[small] < found[large] < 1e4
    assert 0 < found[other] < found[large]


def test_networks_are_timed_and_left_alone():
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    run = TorchRuntime(device="cpu", threads=1, precision="bfloat16").build(net, (IMAGE,), {})
    (timing,) = interleave([run], 0)
    assert 0 < timing.latency < 1e4
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == before[name].dtype for name in before)
    assert IMAGE.dtype == torch.float32


@pytest.mark.parametrize(("precision", "off"), [("float32", 0.0), ("fp16", 2e-2), ("bf16", 5e-2)])
def test_outputs_are_the_networks(precision, off):
    net = network()
    with torch.no_grad():
        expected = net(IMAGE)
    (actual,) = TorchRuntime(device="cpu", precision=precision).run(net, (IMAGE,), {})
    assert actual.dtype == {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    error = (actual.float() - expected).abs().max() / expected.abs().max()
    assert error <= off
    assert off == 0 or error > 0


def test_outputs_keep_their_order_and_inputs_their_names():
    class Several(nn.Module):
        def forward(self, x, *, steps):
            return {"sum": x + steps, "pair": (x * 2, 3, steps)}

    x, steps = torch.ones(2), torch.tensor([1, 2])
    outputs = TorchRuntime(device="cpu", precision="fp16").run(Several(), (x,), {"steps": steps})
    assert [output.dtype for output in outputs] == [torch.float16, torch.float16, torch.int64]
    assert [output.tolist() for output in outputs] == [[2, 3], [2, 2], [1, 2]]


def test_threads_are_set_for_the_run_alone():
    class Counting(nn.Module):
        def forward(self, x):
            seen.append(torch.get_num_threads())
            return x

    seen = []
    before = torch.get_num_threads()
    for threads in (None, before, before + 2):
        run = TorchRuntime(device="cpu", threads=threads).build(Counting(), (IMAGE,), {})
        seen.clear()
        run()
        # where the number changes, a run that is not timed starts the threads
        assert seen == ([before + 2] * 2 if threads == before + 2 else [before])
        assert torch.get_num_threads() == before


def test_no_gradients_are_kept():
    class Recording(nn.Module):
        def forward(self, x):
            seen.append(torch.is_inference_mode_enabled())
            return x

    seen = []
    TorchRuntime(device="cpu").build(Recording(), (IMAGE,), {})()
    assert set(seen) == {True}


def test_compiled_networks_are_whole_graphs_as_many_as_there_are(monkeypatch):
    """torch compiles eight modules that share their code, and runs the others eagerly: here each has its own."""
    compiled = []

    def compile_(net, **options):
        compiled.append(options)
        return compile_with_eager(net, **options)

    compile_with_eager = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(_slope, "_SWEEP_SECONDS", 0)
    layers = [LayerSignature(Geometry.pointwise(2, width, dims=2), (3, 3), 1, "ReLU") for width in range(1, 8)]
    found = {}
    TorchRuntime(compile=True, device="cpu", threads=1).measure(layers, found.__setitem__)
    assert list(found) == layers
    assert compiled == [{"fullgraph": True, "dynamic": False}] * 14
    (output,) = TorchRuntime(compile=True, device="cpu").run(fx.symbolic_trace(network()), (IMAGE,), {})
    assert (output - network()(IMAGE)).abs().max() < 1e-5
    TorchRuntime(device="cpu").build(network(), (IMAGE,), {})
    assert len(compiled) == 15


def test_environment_tells_what_a_latency_depends_on():
    base = TorchRuntime(device="cpu", threads=1).environment()
    assert set(base) == {"device", "mode", "precision", "runtime", "threads"}
    assert base["runtime"] == f"torch {torch.__version__}"
    assert (base["mode"], base["precision"], base["threads"]) == ("eager", "float32", "1")
    others = {
        "mode": TorchRuntime(device="cpu", threads=1, compile=True),
        "precision": TorchRuntime(device="cpu", threads=1, precision="fp16"),
        "threads": TorchRuntime(device="cpu", threads=3),
    }
    for name, runtime in others.items():
        other = runtime.environment()
        assert {key for key in base if base[key] != other[key]} == {name}
    assert TorchRuntime(device="cpu").environment()["threads"] == str(torch.get_num_threads())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"device": "tpu"}, "the runtime 'torch' has no device 'tpu'; expected 'cpu', 'cuda' or 'cuda:N'."),
        ({"device": "meta"}, "the runtime 'torch' times on 'cpu' and 'cuda', not on 'meta'."),
        ({"threads": 0}, "threads must be at least 1; got 0."),
        (
            {"precision": "int8"},
            "unknown precision 'int8'; expected one of fp32 (float32), fp16 (float16), bf16 (bfloat16).",
        ),
    ],
    ids=["device", "meta", "threads", "precision"],
)
def test_refusals(options, problem):
    with pytest.raises(UserError) as caught:
        TorchRuntime(**options)
    assert str(caught.value) == problem


def test_a_network_that_does_not_run_is_named():
    with pytest.raises(
        UnsupportedError, match=r"Linear does not run on the runtime 'torch' \(eager, bfloat16, cpu\): RuntimeError: .*"
    ):
        TorchRuntime(device="cpu", precision="bf16").build(nn.Linear(3, 4), (IMAGE,), {})


def test_compress_on_torch():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 8, 1),
    ).eval()
    plans = fxmerge.frontier(
        net, torch.randn(2, 3, 24, 24), runtime="torch:threads=1,device=cpu", store=None, measure_seconds=0.1
    )
    result = plans.apply(plans.plan(0))
    assert result.report.unit == "ms"
    assert result.report.original > 0
    assert result.report.measured > 0
    assert result.plan.runtime == "torch"
    assert result.plan.entries
    assert all(entry.latency > 0 for entry in result.plan.entries if entry.candidate.kind == "merge")
    assert result.report.after.convolutions < 4
