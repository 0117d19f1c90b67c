"""Saving and loading canonical graphs: what comes back is what went in, and nothing else gets in."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import operator
import shutil
import subprocess
import sys
import textwrap
from collections import OrderedDict, namedtuple
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxmerge
from fxmerge import serialize
from fxmerge.errors import StoreError, UnsupportedError, UserError
from fxmerge.removable import register_removable, unregister_removable
from fxmerge.serialize import (
    graph_to_json,
    load_documents,
    load_graph,
    save_graph,
    state_tensors,
)

aten = torch.ops.aten


class Block(nn.Module):
    """Convolutions, norms and activations under nested names, a skip and a learned scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3)
        self.act = nn.LeakyReLU(0.2)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding="same", dilation=2, groups=2)
        self.drop = nn.Dropout(0.3)
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return operator.add(self.drop(self.conv2(self.act(self.bn1(self.conv1(x))))) * self.scale, x)


class Net(nn.Module):
    """The canonical-like test network; two of its convolutions share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 2))
        self.layer1 = nn.Sequential(Block(8), Block(8))
        self.layer1[1].conv2.weight = self.layer1[0].conv2.weight
        self.head = nn.Linear(8, 5)
        self.register_buffer("shift", torch.randn(5), persistent=False)
        self.register_buffer("gain", torch.rand(5).to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.layer1(self.stem(x)), (1, 0, 2, -1), value=-math.inf)
        x = aten.mean.dim(aten.clamp.default(x, min=-2.0), [2, 3])
        return aten.add.Tensor(self.head(x), self.shift, alpha=2) * self.gain


def net(seed: int = 0) -> fx.GraphModule:
    torch.manual_seed(seed)
    model = Net()
    model.layer1[0].bn1.running_var.uniform_(0.5, 2.0)
    model.stem.weight.requires_grad_(False)
    gm = fx.symbolic_trace(model)
    gm.register_buffer("shift", gm.shift, persistent=False)  # which GraphModule does not keep
    gm.layer1.get_submodule("0").bn1.eval()
    gm.meta["fxmerge"] = {"segments": [{"entry": "stem", "pads": (1, 2), "loss": math.inf}]}
    next(iter(gm.graph.nodes)).meta["fxmerge"] = {"id": "x", "shape": (2, 3, 16, 16)}
    return gm


def images(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def exported(model: nn.Module, *args: object, **kwargs: object) -> fx.GraphModule:
    program = torch.export.export(model.eval(), args, kwargs, strict=False)
    gm = program.module(check_guards=False)
    return fx.GraphModule(gm, gm.graph)


def round_trip(gm: fx.GraphModule, folder: Path) -> fx.GraphModule:
    save_graph(gm, folder)
    return load_graph(folder)


def edit(folder: Path, change: object) -> None:
    file = folder / "graph.json"
    description = json.loads(file.read_text())
    change(description)
    file.write_text(json.dumps(description))


def node(description: dict, name: str) -> dict:
    return next(entry for entry in description["nodes"] if entry["name"] == name)


def state(description: dict, path: str) -> dict:
    return next(entry for entry in description["state"] if entry["path"] == path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def lines(gm: fx.GraphModule) -> list[tuple[str, ...]]:
    """The graph as text, without the type annotations that symbolic tracing leaves in its code."""
    return [(n.op, n.name, str(n.target), repr(n.args), repr(n.kwargs)) for n in gm.graph.nodes]


def assert_same(ours: object, theirs: object) -> None:
    a, b = pytree.tree_leaves(ours), pytree.tree_leaves(theirs)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        if isinstance(x, Tensor):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)
        else:
            assert x == y


# --- what comes back -----------------------------------------------------------------------------


def test_everything_about_the_graph_comes_back(tmp_path: Path) -> None:
    gm = net()
    again = round_trip(gm, tmp_path / "net")
    assert lines(again) == lines(gm)
    assert type(again).__name__ == type(gm).__name__ == "Net"
    assert again.meta["fxmerge"] == gm.meta["fxmerge"]
    assert type(again.meta["fxmerge"]["segments"][0]["pads"]) is tuple
    assert next(iter(again.graph.nodes)).meta == {"fxmerge": {"id": "x", "shape": (2, 3, 16, 16)}}
    assert list(again.state_dict()) == list(gm.state_dict())
    assert "shift" not in again.state_dict()
    assert torch.equal(again.shift, gm.shift)
    for (name, ours), (other, theirs) in zip(gm.named_parameters(), again.named_parameters(), strict=True):
        assert (name, ours.requires_grad, ours.dtype) == (other, theirs.requires_grad, theirs.dtype)
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
    assert {name: m.training for name, m in again.named_modules()} == {
        name: m.training for name, m in gm.named_modules()
    }
    assert not again.get_submodule("layer1.0.bn1").training
    assert again.get_submodule("layer1.1.bn1").training
    assert_same(gm.eval()(images()), again.eval()(images()))


def test_loaded_graph_trains_as_the_saved_one(tmp_path: Path) -> None:
    gm = net()
    again = round_trip(gm, tmp_path / "net")
    copied = copy.deepcopy(again)
    for model in (gm, again, copied):
        torch.manual_seed(3)
        model(images()).square().sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    before = net().state_dict()
    for model in (again, copied):
        for (name, ours), theirs in zip(gm.named_parameters(), model.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None) == (name == "stem.weight")
            assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
        persistent = {name: model.state_dict()[name] for name in gm.state_dict()}
        assert_same(gm.state_dict(), persistent)
    moved = {name for name, value in gm.state_dict().items() if not torch.equal(value, before[name])}
    assert {"layer1.1.bn1.running_mean", "layer1.1.bn1.num_batches_tracked", "head.bias"} <= moved
    assert "layer1.0.bn1.running_mean" not in moved


def test_shared_tensors_stay_shared(tmp_path: Path) -> None:
    gm = net()
    gm.layer1.get_submodule("1").conv1.weight = nn.Parameter(gm.layer1.get_submodule("0").conv1.weight.data)
    gm.gain = gm.shift
    tensors, aliases = state_tensors(gm)
    first, second = ("layer1.0.conv2.weight", "layer1.1.conv2.weight")
    assert aliases == {second: first, "layer1.1.conv1.weight": "layer1.0.conv1.weight", "gain": "shift"}
    again = round_trip(gm, tmp_path / "net")
    assert load_file(tmp_path / "net/weights.safetensors").keys() == tensors.keys()
    assert not tensors.keys() & aliases.keys()
    assert again.get_parameter(first) is again.get_parameter(second)
    assert again.gain is again.shift
    ours, theirs = (again.get_parameter(f"layer1.{i}.conv1.weight") for i in (0, 1))
    assert ours is not theirs
    assert ours.data_ptr() == theirs.data_ptr()
    assert again.get_parameter(first).data_ptr() != gm.get_parameter(first).data_ptr()


def test_views_of_one_memory_become_tensors_of_their_own(tmp_path: Path) -> None:
    gm = net()
    table = torch.arange(12.0)
    views = {"all": table, "part": table[3:5], "grid": table.view(3, 4), "wide": table[:1].expand(5)}
    views["grid_t"] = views["grid"].t()
    for name, view in views.items():
        gm.register_buffer(name, view)
    again = round_trip(gm, tmp_path / "net")
    for name, view in views.items():
        assert torch.equal(again.get_buffer(name), view)
    assert len({again.get_buffer(name).data_ptr() for name in views}) == len(views)
    assert again.grid_t.stride() == (1, 4)


def test_shared_module_stays_one_module(tmp_path: Path) -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.BatchNorm1d(4), nn.Identity(), nn.ReLU()))
    gm.add_module("1", gm.get_submodule("0"))
    again = round_trip(gm, tmp_path / "net")
    assert again.get_submodule("0") is again.get_submodule("1")
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    assert_same(gm(x), again(x))
    assert again.get_submodule("0").num_batches_tracked == 2


def test_constants_and_unused_state(tmp_path: Path) -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    gm.offset = torch.arange(4.0)
    gm.add_module("spare", nn.Module())
    gm.spare.register_parameter("weight", nn.Parameter(torch.ones(3, dtype=torch.float16)))
    (result,) = gm.graph.find_nodes(op="output")
    with gm.graph.inserting_before(result):
        value = gm.graph.create_node("get_attr", "offset")
        result.args = (gm.graph.call_function(aten.add.Tensor, (result.args[0], value)),)
    gm.recompile()
    again = round_trip(gm, tmp_path / "net")
    assert "offset" not in again.state_dict()
    assert again.spare.weight.dtype is torch.float16
    assert_same(gm(torch.ones(1, 4)), again(torch.ones(1, 4)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_memory_formats(tmp_path: Path, dtype: torch.dtype) -> None:
    gm = net().to(dtype).to(memory_format=torch.channels_last)
    gm.head.weight = nn.Parameter(torch.randn(8, 5).to(dtype).t())
    again = round_trip(gm, tmp_path / "net")
    for ours, theirs in zip(gm.parameters(), again.parameters(), strict=True):
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
        assert torch.equal(ours, theirs)
    assert not again.stem.weight.is_contiguous()


def test_no_random_numbers_and_no_files_of_the_source_are_used(tmp_path: Path) -> None:
    save_graph(net(), tmp_path / "net")
    state = torch.get_rng_state()
    again = load_graph(tmp_path / "net")
    assert torch.equal(torch.get_rng_state(), state)
    shutil.rmtree(tmp_path / "net")
    assert torch.isfinite(again(images())).all()


def test_device_takes_the_place_of_the_saved_ones(tmp_path: Path) -> None:
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("b", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.zeros(3, device=x.device) + self.b

    save_graph(exported(Made(), torch.ones(3)), tmp_path / "net")
    moved = load_graph(tmp_path / "net", device="meta")
    assert moved(torch.ones(3, device="meta")).is_meta
    assert not load_graph(tmp_path / "net")(torch.ones(3)).is_meta
    edit(tmp_path / "net", lambda d: d["state"][0].update(device="cuda:77"))
    with pytest.raises(StoreError, match=r"'b' was saved on cuda:77.*load with device='cpu'"):
        load_graph(tmp_path / "net")
    assert torch.equal(load_graph(tmp_path / "net", device="cpu")(torch.ones(3)), torch.full((3,), 2.0))


ARGUMENTS = [
    None, True, 0, -3, 2**63 - 1, 0.5, -0.0, 1e-300, math.inf, -math.inf, "", 'a"b\\\n', [], (), {},
    [1, (2, [3.0, None])], {"node": "x", "tuple": [1]}, {"dict": {"slice": (1,)}},
    slice(None), slice(1, -1, 2), slice(-5, None), torch.float16, torch.bool, torch.device("cpu"),
    torch.device("cuda:1"), torch.strided, torch.sparse_coo, torch.channels_last,
]  # fmt: skip


@pytest.mark.parametrize("value", ARGUMENTS, ids=repr)
def test_every_kind_of_argument(tmp_path: Path, value: object) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(operator.getitem, (x, value), {"b": [x, (value,)]}))
    gm = fx.GraphModule(nn.Module(), graph)
    gm.meta["fxmerge"] = value
    again = round_trip(gm, tmp_path / "net")
    inner = again.graph.find_nodes(op="call_function", target=operator.getitem)[0]
    for found in (inner.args[1], inner.kwargs["b"][1][0], again.meta["fxmerge"]):
        assert found == value
        assert repr(found) == repr(value)
    assert inner.kwargs["b"][0] is inner.args[0]


def test_not_a_number_is_an_argument(tmp_path: Path) -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Threshold(0.0, math.nan)))
    with pytest.raises(UnsupportedError, match="'value' does not follow"):
        save_graph(gm, tmp_path / "net")
    gm.meta["fxmerge"] = math.nan
    gm.graph.find_nodes(op="call_module")[0].replace_all_uses_with(next(iter(gm.graph.nodes)))
    gm.graph.eliminate_dead_code()
    assert math.isnan(round_trip(gm, tmp_path / "net").meta["fxmerge"])


# --- signatures, in a process that knows none of the classes -------------------------------------

Pair = namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass
class Outcome:
    sample: Tensor
    nothing: Tensor | None = None


class HubOutput(OrderedDict):
    """What model hubs return: an ordered dict that is registered by the names of its values."""


torch.export.register_dataclass(Outcome, serialized_type_name="test_serialize.Outcome")
pytree.register_pytree_node(
    HubOutput,
    lambda value: (list(value.values()), list(value.keys())),
    lambda values, names: HubOutput(zip(names, values, strict=True)),
    serialized_type_name="test_serialize.HubOutput",
)


class Returns(nn.Module):
    """Two tensors, a keyword and a dict come in; the container under test goes out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, input: Tensor, *, mask: dict[str, list[Tensor]]) -> object:  # noqa: A002
        a, b = torch.split(x * input + mask["m"][0], 2, 1)
        return {
            "tensor": lambda: a,
            "tuple": lambda: (a, [b, (a,)], None),
            "list": lambda: [a],
            "dict": lambda: {"z": a, "a": (b,), 3: x.shape[0]},
            "OrderedDict": lambda: OrderedDict(z=a, a=b),
            "namedtuple": lambda: Pair(a, {"in": b}),
            "dataclass": lambda: Outcome(a + b),
            "hub": lambda: HubOutput(logits=a, hidden=[b]),
        }[self.kind]()


PLAIN = {
    "namedtuple": lambda out: tuple(out),
    "dataclass": lambda out: {"sample": out.sample},
    "hub": dict,
}
KINDS = ["tensor", "tuple", "list", "dict", "OrderedDict", *PLAIN]


def returns_inputs(seed: int = 5) -> tuple[tuple[Tensor, Tensor], dict[str, dict[str, list[Tensor]]]]:
    generator = torch.Generator().manual_seed(seed)
    x, y, m = torch.randn(3, 2, 4, generator=generator)
    return (x, y), {"mask": {"m": [m]}}


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")  # deepcopy
@pytest.mark.parametrize("kind", KINDS)
def test_containers(tmp_path: Path, kind: str) -> None:
    args, kwargs = returns_inputs()
    gm = exported(Returns(kind), *args, **kwargs)
    again = round_trip(gm, tmp_path / "net")
    assert again.code == gm.code
    for model in (again, copy.deepcopy(again)):
        args, kwargs = returns_inputs(6)
        expected, found = PLAIN.get(kind, lambda out: out)(gm(*args, **kwargs)), model(*args, **kwargs)
        assert type(found) is type(expected)
        assert pytree.tree_structure(found) == pytree.tree_structure(expected)
        assert_same(expected, found)
        assert_same(expected, model(args[0], input=args[1], **kwargs))


def test_fresh_process(tmp_path: Path) -> None:
    """No class of this module, no pickle, and none of the packages that are slow to import."""
    gm = net().eval()
    save_graph(gm, tmp_path / "net")
    expected = {"net": gm(images())}
    args, kwargs = returns_inputs()
    save_file({"x": images(), "a": args[0], "b": args[1], "m": kwargs["mask"]["m"][0]}, tmp_path / "in")
    for kind in KINDS:
        gm = exported(Returns(kind), *args, **kwargs)
        save_graph(gm, tmp_path / kind)
        leaves = pytree.tree_leaves(gm(*args, **kwargs))
        expected |= {f"{kind}{i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    script = """
        import sys, pickle, torch
        from pathlib import Path
        from safetensors.torch import load_file, save_file
        from torch.utils import _pytree as pytree
        from fxmerge.serialize import load_graph

        def refuse(*args, **kwargs):
            raise AssertionError("pickle was used")

        pickle.load = pickle.loads = torch.load = refuse
        place = Path(sys.argv[1])
        data = load_file(place / "in")
        out = {"net": load_graph(place / "net")(data["x"])}
        for kind in sys.argv[2:]:
            result = load_graph(place / kind)(data["a"], data["b"], mask={"m": [data["m"]]})
            leaves = pytree.tree_leaves(result)
            out |= {f"{kind}{i}": v for i, v in enumerate(leaves) if isinstance(v, torch.Tensor)}
        save_file({name: value.contiguous() for name, value in out.items()}, place / "out")
        print([name for name in ("rich", "networkx", "onnx", "onnxruntime") if name in sys.modules])
    """
    done = subprocess.run(  # noqa: S603 - this very interpreter on the script above
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), *KINDS],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    found = load_file(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_model_and_its_result_pickle_whole(tmp_path: Path) -> None:
    """``torch.save(model)``, as many do, and what spawns processes: read in one that knows nothing of the network."""
    x = images()
    result = fxmerge.compress(nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))), x, 0.7, runtime="macs")
    torch.save(result, tmp_path / "result.pt")
    torch.save(result.model, tmp_path / "model.pt")
    torch.save((x, result.model(x), result.merge()(x)), tmp_path / "values.pt")
    program = """
        import sys, torch
        from fxmerge.result import merge_graph
        result, model = (torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=False) for name in ("result", "model"))
        x, trainable, merged = torch.load(f"{sys.argv[1]}/values.pt")
        assert torch.equal(model(x), trainable) and torch.equal(result.model(x), trainable)
        assert torch.equal(result.merge()(x), merged) and torch.equal(merge_graph(model)(x), merged)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], check=True)  # noqa: S603 - the program above


def test_symbolic_sizes(tmp_path: Path) -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            n = x.shape[0]
            return x.reshape(n * 2, -1), x[: max(n // 2 + 1, n - 3)]

    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(Sizes(), (torch.ones(8, 8),), dynamic_shapes=dynamic, strict=False)
    gm = program.module(check_guards=False)
    again = round_trip(fx.GraphModule(gm, gm.graph), tmp_path / "net")
    assert torch.sym_max in {n.target for n in again.graph.nodes}
    for size in (2, 9):
        x = torch.arange(8.0 * size).reshape(size, 8)
        assert_same(Sizes()(x), again(x))


# --- every class of the list ---------------------------------------------------------------------


def instances() -> list[tuple[nn.Module, tuple[int, ...], int]]:
    """Modules with arguments other than the defaults, the shape they take, and how many of it."""
    made: list[tuple[nn.Module, tuple[int, ...], int]] = []

    def add(module: nn.Module, *shape: int, inputs: int = 1) -> None:
        made.append((module, shape, inputs))

    for d in (1, 2, 3):
        size = (2, 4, *(9, 8, 7)[:d])

        def cls(name: str, d: int = d) -> type[nn.Module]:
            return getattr(nn, f"{name}{d}d")

        def per(*values: int, d: int = d) -> tuple[int, ...]:
            return values[:d]

        conv, norm = cls("Conv"), cls("BatchNorm")
        add(conv(4, 6, per(3, 2, 1), per(2, 1, 1), per(1, 2, 0), per(1, 2, 1), 2, False), *size)
        add(conv(4, 6, 3, padding="same", padding_mode="reflect"), *size)
        add(conv(4, 6, 2, padding=1, padding_mode="circular", dtype=torch.float64), *size)
        add(conv(4, 4, 1, padding="valid", groups=4), *size)
        transposed = cls("ConvTranspose")
        add(transposed(4, 6, per(3, 4, 2), 2, 1, per(1, 0, 1), 2, False, per(1, 2, 2)), *size)
        add(norm(4, 1e-2, 0.25), *size)
        add(norm(4, momentum=None, affine=False), *size)
        add(norm(4, track_running_stats=False), *size)
        if "bias" in norm.__init__.__annotations__:
            add(norm(4, bias=False), *size)
        add(cls("InstanceNorm")(4, 1e-2, 0.3, True, True), *size)
        add(cls("InstanceNorm")(4), *size)
        add(cls("Dropout")(0.7, True), *size)
        add(cls("MaxPool")(per(3, 2, 2), per(2, 1, 2), per(1, 1, 0), 1, True, True), *size)
        add(cls("MaxPool")(2, dilation=2), *size)
        add(cls("AvgPool")(3, 2, 1, True, False), *size)
        add(cls("LPPool")(2.0, 2, 3, True), *size)
        add(cls("AdaptiveAvgPool")(per(2, 3, 1)), *size)
        add(cls("AdaptiveMaxPool")(3, True), *size)
        add(cls("MaxUnpool")(3, 2, 1), 1, 1, *(2,) * d, inputs=2)
        add(cls("ZeroPad")((1, 2)), *size)
        add(cls("ConstantPad")((0, 2), -math.inf), *size)
        add(cls("ReflectionPad")((1, 2) * d), *size)
        add(cls("ReplicationPad")((2, 1) * d), *size)
        add(cls("CircularPad")((0, 3) * d), *size)
    add(nn.AvgPool2d((2, 3), divisor_override=5), 2, 4, 8, 8)
    add(nn.AdaptiveAvgPool2d((None, 2)), 2, 4, 8, 8)
    add(nn.GroupNorm(2, 4, 1e-2, False), 2, 4, 8, 8)
    add(nn.GroupNorm(2, 4), 2, 4, 8, 8)
    add(nn.LayerNorm((4, 8), 1e-2, True, False), 2, 4, 8)
    add(nn.LayerNorm(8, elementwise_affine=False), 2, 4, 8)
    add(nn.RMSNorm((4, 8), 1e-2), 2, 4, 8)
    add(nn.RMSNorm(8, None, False), 2, 4, 8)
    add(nn.LocalResponseNorm(3, 1e-2, 0.5, 2.0), 2, 4, 8, 8)
    for module in (
        *(
            nn.Dropout(0.7, True),
            nn.AlphaDropout(0.3, False),
            nn.FeatureAlphaDropout(0.2),
            nn.CELU(0.5),
            nn.ELU(0.5, True),
        ),
        *(nn.GELU("tanh"), nn.GLU(1), nn.Hardshrink(0.3), nn.Hardsigmoid(True), nn.Hardswish(True)),
        *(nn.Hardtanh(-math.inf, 0.5), nn.Hardtanh(-0.1, 6, True), nn.LeakyReLU(0.3), nn.LogSigmoid()),
        *(nn.LogSoftmax(1), nn.Mish(True), nn.PReLU(4, 0.1), nn.ReLU(True), nn.ReLU6(True)),
        *(nn.RReLU(0.1, 0.2), nn.SELU(True), nn.SiLU(True), nn.Sigmoid(), nn.Softmax(-1), nn.Softmin(2)),
        *(nn.Softplus(2.0, 5.0), nn.Softshrink(0.3), nn.Softsign(), nn.Tanh(), nn.Tanhshrink()),
        *(nn.Threshold(0.1, -3.0, True), nn.Identity(3, unused=1), nn.Flatten(2), nn.Flatten(0, -2)),
        *(nn.Softmax2d(), nn.Unflatten(1, (2, 2))),
        *(nn.ChannelShuffle(2), nn.PixelShuffle(2), nn.PixelUnshuffle(4), nn.Linear(8, 3, False)),
        *(nn.Unfold((2, 3), 2, 1, (2, 1)), nn.Upsample((5, 6), mode="bicubic", align_corners=True)),
        *(nn.Upsample(scale_factor=(1.5, 2.5), mode="bilinear", recompute_scale_factor=True),),
        *(nn.Upsample(scale_factor=2), nn.UpsamplingNearest2d(3), nn.UpsamplingBilinear2d(None, 2)),
    ):
        add(module, 2, 4, 8, 8)
    add(nn.Bilinear(8, 8, 3, False), 2, 8, inputs=2)
    add(nn.Linear(8, 3), 2, 8)
    add(nn.Fold((4, 5), (2, 2), 1, 1, 2), 2, 4, 9)
    return made


def one_module(module: nn.Module, inputs: int = 1) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_module("m", tuple(graph.placeholder(f"x{i}") for i in range(inputs))))
    return fx.GraphModule({"m": module}, graph)


INSTANCES = instances()


def test_instances_cover_the_list_and_the_list_covers_torch() -> None:
    assert {type(module) for module, _, _ in INSTANCES} == set(serialize._MODULES.values())
    kinds = "conv batchnorm instancenorm normalization activation dropout pooling padding linear"
    kinds += " flatten fold upsampling pixelshuffle channelshuffle"
    names = {name for kind in kinds.split() for name in getattr(nn.modules, kind).__all__}
    assert {name for name in names - serialize._MODULES.keys() if "Lazy" not in name} == {
        "CrossMapLRN2d",
        "FractionalMaxPool2d",
        "FractionalMaxPool3d",
        "MultiheadAttention",
        "SyncBatchNorm",
    }


@pytest.mark.parametrize(("module", "shape", "inputs"), INSTANCES, ids=lambda v: repr(v)[:70])
def test_constructor_arguments(tmp_path: Path, module: nn.Module, shape: tuple[int, ...], inputs: int) -> None:
    torch.manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    gm = one_module(module, inputs)
    again = round_trip(gm, tmp_path / "net")
    loaded = again.get_submodule("m")
    assert type(loaded) is type(module)
    assert repr(loaded) == repr(module)
    for name in vars(module).keys() - vars(nn.Module()).keys():
        assert getattr(loaded, name) == getattr(module, name)
        assert isinstance(getattr(module, name), type(getattr(loaded, name)))
    assert_same(dict(module.state_dict()), dict(loaded.state_dict()))
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    x = [torch.randn(shape, dtype=dtype) for _ in range(inputs)]
    if "MaxUnpool" in type(module).__name__:
        x[1] = torch.arange(x[0].numel()).reshape(shape)
    for training in (True, False):
        results = []
        for model in (gm, again):
            torch.manual_seed(1)
            results.append(model.train(training)(*(t.clone() for t in x)))
        assert_same(*results)


@pytest.mark.parametrize(
    ("module", "argument", "value"),
    [
        (nn.Conv2d(4, 4, 3, stride=2, padding=1), "stride", {"tuple": [1, 1]}),
        (nn.Conv2d(4, 4, 3, padding=1), "dilation", {"tuple": [2, 2]}),
        (nn.Conv2d(4, 4, 3, padding=1), "padding_mode", "circular"),
        (nn.BatchNorm2d(4), "eps", 1e-2),
        (nn.LeakyReLU(0.1), "negative_slope", 0.2),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), "count_include_pad", True),
        (nn.GELU("tanh"), "approximate", "none"),
    ],
    ids=repr,
)
def test_a_changed_constructor_argument_is_seen(
    tmp_path: Path, module: nn.Module, argument: str, value: object
) -> None:
    """What the equality of the tests above rests on: each of these arguments reaches the outputs."""
    gm = one_module(module).eval()
    save_graph(gm, tmp_path / "net")
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert_same(gm(x), load_graph(tmp_path / "net")(x))
    edit(tmp_path / "net", lambda d: d["modules"]["m"]["arguments"].update({argument: value}))
    changed = load_graph(tmp_path / "net")(x)
    assert changed.shape != gm(x).shape or not torch.equal(changed, gm(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: node(d, "pad")["args"][1]["tuple"].reverse(),
        lambda d: node(d, "add_tensor")["kwargs"].update(alpha=1),
        lambda d: node(d, "clamp_default")["kwargs"].update(min=-0.1),
        lambda d: d["modules"]["layer1.1.bn1"].update(training=False),
        lambda d: d["modules"]["layer1.0.bn1"].update(training=True),
    ],
)
def test_a_changed_graph_is_seen(tmp_path: Path, change: object) -> None:
    gm = net()
    save_graph(gm, tmp_path / "net")
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(load_graph(tmp_path / "net")(images()))
        edit(tmp_path / "net", change)
    torch.manual_seed(0)
    assert_same(gm(images()), results[0])
    assert results[0].shape != results[1].shape or not torch.equal(*results)


# --- what is refused on save ---------------------------------------------------------------------


def refuse_save(gm: fx.GraphModule, place: Path, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        save_graph(gm, place / "net")
    assert not list(place.iterdir())


class Custom(nn.ReLU):
    """A user's own class: a name that torch.nn has not."""


def test_save_refuses_modules_it_could_not_construct(tmp_path: Path) -> None:
    refuse_save(one_module(Custom()), tmp_path, r"module 'm' is a .*Custom, which cannot be saved")
    impostor = type("ReLU", (nn.ReLU,), {})
    refuse_save(one_module(impostor()), tmp_path, r"module 'm' is a .*ReLU, which cannot")
    refuse_save(one_module(nn.LSTM(2, 2)), tmp_path, r"module 'm' is a .*LSTM, which cannot")
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    refuse_save(one_module(normed), tmp_path, r"module 'm' is a .*ParametrizedLinear")


def test_save_refuses_what_a_constructor_does_not_restore(tmp_path: Path) -> None:
    module = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
    module.padding = (0, 0)
    module._reversed_padding_repeated_twice = [1, 1, 1, 1]
    refuse_save(one_module(module), tmp_path, r"module 'm': its attribute '_reversed_padding")
    module = nn.BatchNorm2d(2)
    module.weight = None
    refuse_save(one_module(module), tmp_path, r"tensor 'm.weight' has no values")
    hooked = one_module(nn.ReLU())
    handle = hooked.get_submodule("m").register_forward_hook(lambda *_: None)
    refuse_save(hooked, tmp_path, r"module 'm' has hooks")
    handle.remove()
    hooked.register_forward_pre_hook(lambda *_: None)
    refuse_save(hooked, tmp_path, r"module '' has hooks")


@pytest.mark.parametrize(
    "target",
    [print, torch.relu, getattr, torch.load, aten.add, aten.from_file.default, operator.attrgetter],
    ids=lambda target: getattr(target, "__name__", str(target)),
)
def test_save_refuses_functions(tmp_path: Path, target: object) -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(target, (graph.placeholder("x"), "a"), name="it"))
    gm = fx.GraphModule(nn.Module(), graph)
    refuse_save(gm, tmp_path, r"node '\w+' calls .* which cannot be saved. Overloads of aten")


def test_save_refuses_methods_and_odd_arguments(tmp_path: Path) -> None:
    class Method(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu()

    refuse_save(fx.symbolic_trace(Method()), tmp_path, "node 'relu' calls the method 'relu'")
    for value in (1j, Pair(1, 2), {1: 2}, torch.ones(1), range(3), b"a"):
        graph = fx.Graph()
        call = graph.create_node("call_function", operator.add, (graph.placeholder("x"), 1))
        call.meta["fxmerge"] = [value]
        graph.output(call)
        gm = fx.GraphModule(nn.Module(), graph)
        refuse_save(gm, tmp_path, r"the meta of node 'add' holds .*, which cannot be saved")
        call.meta["fxmerge"] = {}
        call.args = (call.args[0], value)
        refuse_save(gm, tmp_path, r"node 'add' holds .*, which cannot be saved")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, dtype=torch.complex64),
        torch.eye(2).to_sparse(),
        torch.ones(2, device="meta"),
    ],
    ids=["complex", "sparse", "meta"],
)
def test_save_refuses_special_tensors(tmp_path: Path, tensor: Tensor) -> None:
    gm = net()
    gm.layer1.register_buffer("odd", tensor)
    refuse_save(gm, tmp_path, r"tensor 'layer1.odd' is ")


def test_save_refuses_names_that_do_not_come_back(tmp_path: Path) -> None:
    gm = net()
    gm.graph.find_nodes(op="call_module")[0].name = "max"
    refuse_save(gm, tmp_path, r"node 'max': its name is taken or reserved")
    gm = net()
    gm.add_module('a"b', nn.ReLU())
    refuse_save(gm, tmp_path, "is not a path of modules")


# --- what is refused on load ---------------------------------------------------------------------


HOSTILE = {
    "function": (lambda d: node(d, "pad").update(target="os.system"), r"node 'pad': target 'os.system'"),
    "builtin": (lambda d: node(d, "pad").update(target="builtins.eval"), r"'builtins.eval' is not"),
    "file": (lambda d: node(d, "pad").update(target="aten.from_file.default"), "aten.from_file"),
    "dunder": (lambda d: node(d, "pad").update(target="aten.__class__.mro"), "aten.__class__.mro"),
    "attribute": (lambda d: node(d, "pad").update(target="operator.attrgetter"), "attrgetter"),
    "class": (
        lambda d: d["modules"]["stem"].update({"class": "builtins.eval"}),
        r"module 'stem': class 'builtins.eval' is not one that fxmerge loads",
    ),
    "other class": (lambda d: d["modules"]["stem"].update({"class": "LSTM"}), r"class 'LSTM' is not"),
    "argument": (lambda d: d["modules"]["stem"]["arguments"].update(x=1), r"module 'stem': .*TypeError"),
    "method": (lambda d: node(d, "pad").update(op="call_method"), r"node 'pad': 'call_method' is not"),
    "name": (lambda d: d["nodes"][1].update(name="a=1;b"), r"'a=1;b' is not a Python name"),
    "keyword": (lambda d: node(d, "pad")["kwargs"].update({"a=1,b": 1}), r"'a=1,b' is not a Python"),
    "input": (lambda d: d["nodes"][0].update(target="x=print(1)"), r"'x=print\(1\)' is not"),
    "path": (lambda d: d["modules"].update({'a"]b': {"training": True}}), "is not a path of modules"),
    "over a method": (lambda d: d["modules"].update(forward={"training": True}), "module 'forward'"),
    "unknown read": (lambda d: node(d, "pad")["args"].__setitem__(0, {"node": "head"}), "reads node"),
    "no target": (lambda d: node(d, "stem").update(target="stern"), "nothing at its target 'stern'"),
    "container": (lambda d: node(d, "stem").update(target="layer1"), "nothing at its target 'layer1'"),
    "value": (lambda d: node(d, "pad")["args"].__setitem__(1, {"torch": "load"}), "unknown value"),
    "kind": (lambda d: state(d, "stem.bias").update(kind="constant"), "cannot be attached as 'constant'"),
    "strides": (
        lambda d: state(d, "stem.bias").update(stride=[10**9]),
        r"tensor 'stem.bias' cannot have the strides \[1000000000\]",
    ),
    "graph name": (lambda d: d.update(name="a: pass"), "is not a Python name"),
    "nodes": (lambda d: d.update(nodes=None), "damaged"),
    "no modules": (lambda d: d.pop("modules"), "damaged"),
    "format": (lambda d: d.update(format="fxmerge.graph/2"), "its format is 'fxmerge.graph/2'"),
    "foreign": (lambda d: d.pop("format"), "its format is None"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_graph_is_refused(tmp_path: Path, case: str) -> None:
    change, message = HOSTILE[case]
    save_graph(net(), tmp_path / "net")
    edit(tmp_path / "net", change)
    before = contents(tmp_path)
    with pytest.raises(StoreError, match=message) as caught:
        load_graph(tmp_path / "net")
    assert str(tmp_path / "net/graph.json") in str(caught.value)
    assert contents(tmp_path) == before


def test_hostile_signature_is_refused(tmp_path: Path) -> None:
    args, kwargs = returns_inputs()
    gm = exported(Returns("dict"), *args, **kwargs)
    for change, message in (
        (lambda s: s["arguments"].__setitem__(0, "x=print(1)"), "is not a Python name"),
        (lambda s: s["inputs"]["tuple"][1]["dict"][0].__setitem__(0, "a': 1}#"), "not a Python name"),
        (lambda s: s.update(inputs={"tuple": [{"tuple": ["*"]}, {"dict": []}]}), "has 1 inputs"),
        (lambda s: s.update(outputs={"os.system": []}), "unknown container 'os.system'"),
    ):
        save_graph(gm, tmp_path / "net")
        edit(tmp_path / "net", lambda d, change=change: change(d["signature"]))
        with pytest.raises(StoreError, match=message):
            load_graph(tmp_path / "net")


def test_damaged_folders(tmp_path: Path) -> None:
    good, folder = tmp_path / "good", tmp_path / "net"
    save_graph(net(), good)
    with pytest.raises(StoreError, match=r"net/graph.json: no such file"):
        load_graph(folder)
    graph, weights = (good / "graph.json").read_bytes(), (good / "weights.safetensors").read_bytes()
    for name, data, message in (
        ("graph.json", graph[:-40], r"graph.json: damaged or not written by fxmerge \(JSONDecodeError"),
        ("graph.json", b"\xff\xfe", r"graph.json: damaged"),
        ("graph.json", b"[" * 100_000, r"graph.json: damaged"),
        ("graph.json", b"[]", r"graph.json: its format is None"),
        ("weights.safetensors", weights[:-40], r"weights.safetensors: damaged"),
        ("weights.safetensors", b"", r"weights.safetensors: damaged"),
        ("weights.safetensors", None, r"weights.safetensors: no such file"),
    ):
        shutil.copytree(good, folder)
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)
        before = contents(folder)
        with pytest.raises(StoreError, match=message):
            load_graph(folder)
        assert contents(folder) == before
        shutil.rmtree(folder)


def test_weights_of_another_graph(tmp_path: Path) -> None:
    save_graph(net(), tmp_path / "net")
    file = tmp_path / "net/weights.safetensors"
    values = load_file(file)
    save_file({name: v for name, v in values.items() if name != "head.bias"}, file)
    with pytest.raises(StoreError, match=r"tensor 'head.bias' is only in one of this file and"):
        load_graph(tmp_path / "net")
    save_file(values | {"head.bias": torch.ones(4)}, file)
    with pytest.raises(StoreError, match=r"should be torch.float32 \[5\], but in .* \[4\]"):
        load_graph(tmp_path / "net")

    def forget(description: dict) -> None:
        description["state"] = [e for e in description["state"] if e["path"] != "head.bias"]

    save_file({name: v for name, v in values.items() if name != "head.bias"}, file)
    edit(tmp_path / "net", forget)
    with pytest.raises(StoreError, match=r"tensor 'head.bias' has no values"):
        load_graph(tmp_path / "net")


# --- files ---------------------------------------------------------------------------------------


def test_documents(tmp_path: Path) -> None:
    extra = {"plan": {"steps": [1, 2.5, None]}, "report": ["ü", True]}
    save_graph(net(), tmp_path / "a/b/net", extra=extra)
    assert load_documents(tmp_path / "a/b/net") == extra
    names = {"graph.json", "weights.safetensors", "plan.json", "report.json"}
    assert set(contents(tmp_path / "a/b/net")) == names
    (tmp_path / "a/b/net/plan.json").unlink()
    with pytest.raises(StoreError, match=r"plan.json: no such file"):
        load_documents(tmp_path / "a/b/net")
    edit(tmp_path / "a/b/net", lambda d: d.update(documents=["../../secret"]))
    with pytest.raises(StoreError, match=r"graph.json: .*cannot name a document"):
        load_documents(tmp_path / "a/b/net")
    for bad in ({"graph": 1}, {"Plan": 1}, {"../x": 1}, {"plan": math.nan}, {"plan": {1, 2}}):
        with pytest.raises(UserError, match=r"cannot name a document|is not JSON"):
            save_graph(net(), tmp_path / "bad", extra=bad)
    assert not (tmp_path / "bad").exists()


def test_saving_again_replaces_the_old_result_and_keeps_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    save_graph(net(0), folder, extra={"plan": 1})
    (folder / "net.onnx").write_bytes(b"onnx")
    (folder / "notes").mkdir()
    (folder / "notes/a.txt").write_text("mine")
    save_graph(net(7), folder, extra={"report": 2})
    assert load_documents(folder) == {"report": 2}
    assert not (folder / "plan.json").exists()
    assert (folder / "net.onnx").read_bytes() == b"onnx"
    assert (folder / "notes/a.txt").read_text() == "mine"
    assert_same(load_graph(folder).state_dict(), net(7).state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    (folder / "plan.json").write_text("my own plan")
    with pytest.raises(StoreError, match=r"plan.json was not written by fxmerge and would be"):
        save_graph(net(), folder, extra={"plan": 1})
    assert (folder / "plan.json").read_text() == "my own plan"


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    folder.mkdir()
    save_graph(net(), folder)
    for name, text in (("notes.txt", "mine"), ("graph.json", "{}"), ("graph.json", '{"format": 3}')):
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(StoreError, match="is not empty and was not written by fxmerge"):
            save_graph(net(), folder)
        assert contents(tmp_path) == {f"net/{name}": text.encode()}
    shutil.rmtree(folder)
    folder.write_text("a file")
    with pytest.raises(StoreError, match="is a file"):
        save_graph(net(), folder)
    with pytest.raises(StoreError, match="cannot be written"):
        save_graph(net(), folder / "inside")
    assert folder.read_text() == "a file"


def test_an_interrupted_save_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "net"
    save_graph(net(0), folder)
    before = contents(tmp_path)

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(serialize, "save_file", full_disk)
    for place in (folder, tmp_path / "other"):
        with pytest.raises(StoreError, match="cannot be written: no space left"):
            save_graph(net(7), place)
        assert contents(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == ["net"]
    monkeypatch.undo()
    rename = Path.rename

    def fail_last(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise OSError("busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_last)
    with pytest.raises(StoreError, match="busy"):
        save_graph(net(7), folder)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_description_is_json_and_stable() -> None:
    gm = net()
    description = graph_to_json(gm)
    assert json.loads(json.dumps(description, allow_nan=False)) == description
    again = graph_to_json(copy.deepcopy(gm))
    state(again, "shift")["kind"] = "non-persistent buffer"  # torch's deepcopy forgets this and
    again["name"] = "Net"  # the name
    assert again == description
    assert node(description, "pad")["args"] == [{"node": "add_1"}, {"tuple": [1, 0, 2, -1]}]
    assert node(description, "pad")["kwargs"]["value"] == {"float": "-inf"}
    assert description["modules"]["layer1.0.bn1"] == {
        "training": False,
        "class": "BatchNorm2d",
        "arguments": {
            "num_features": 8,
            "eps": 1e-3,
            "momentum": 0.3,
            "affine": True,
            "track_running_stats": True,
        },
    }


def test_what_capture_recognised_comes_back(tmp_path: Path) -> None:
    """A formula's module, a channel shuffle, a border written by slices and the tag of a user's own activation."""

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.sin(x) ** 2

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.own = Own()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = F.pad(y * torch.sigmoid(y), (1, 0))
            z[..., :1] = self.conv.bias.view(4, 1, 1)
            n, c, h, w = z.shape
            return self.own(F.instance_norm(z.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)))

    register_removable(Own)
    try:
        gm = fxmerge.capture(Written().eval(), images())
    finally:
        unregister_removable(Own)
    again = round_trip(gm, tmp_path / "net")
    assert lines(again) == lines(gm)
    kinds = {type(module).__name__ for module in again.children()}
    assert {"SiLU", "ChannelShuffle", "InstanceNorm2d"} <= kinds
    tags = [[n.meta["fxmerge"].get("removable") for n in graph.graph.nodes] for graph in (gm, again)]
    assert tags[0] == tags[1]
    assert tags[0].count("own") == 3
    assert_same(gm(images()), again(images()))
