from __future__ import annotations

import copy
import operator

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, symbolic_trace
from torch.fx.passes.infra.pass_base import PassBase
from torch.fx.passes.infra.pass_manager import PassManager

from fxmerge.errors import InternalError, UnsupportedError, UserError
from fxmerge.passes import GraphPass, PassResult


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.act = nn.ReLU()
        self.last = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.last(self.act(self.conv(x))) + 1.0


@pytest.fixture
def net() -> GraphModule:
    torch.manual_seed(0)
    return symbolic_trace(Net())


def bypass(graph_module: GraphModule, target: str) -> bool:
    nodes = list(graph_module.graph.find_nodes(op="call_module", target=target))
    for node in nodes:
        node.replace_all_uses_with(node.args[0])
        graph_module.graph.erase_node(node)
    return bool(nodes)


class Bypass(GraphPass):
    def __init__(self, target: str = "act", *, cap: int = 9) -> None:
        self.target = target
        self.cap = cap

    def call(self, graph_module):
        modified = bypass(graph_module, self.target)
        graph_module.delete_all_unused_submodules()
        return PassResult(graph_module, modified)


class Edit(GraphPass):
    """Runs any edit and claims what it is told to claim."""

    def __init__(self, edit, modified):
        self.edit = edit
        self.modified = modified

    def __repr__(self):
        return "Edit()"

    def call(self, graph_module):
        self.edit(graph_module)
        return PassResult(graph_module, self.modified)


def test_a_pass_edits_recompiles_and_says_so_once(net):
    x = torch.randn(1, 2, 5, 5)
    expected = net.last(net.conv(x)) + 1.0
    assert not torch.equal(net(x), expected)
    assert Bypass()(net).modified is True
    assert torch.equal(net(x), expected)  # recompiled: forward follows the graph
    assert Bypass()(net).modified is False


class _Promise:
    """A pass that returns a new module and keeps note of which one ``ensures`` was shown."""

    def __init__(self):
        self.seen = None

    def call(self, graph_module):
        result = copy.deepcopy(graph_module)
        bypass(result, "act")
        return PassResult(result, True)

    def ensures(self, graph_module):
        self.seen = graph_module


class OurPromise(_Promise, GraphPass):
    pass


class TorchPromise(_Promise, PassBase):
    pass


def test_ensures_sees_the_result(net):
    ours = OurPromise()
    result = ours(net)
    assert ours.seen is result.graph_module
    assert ours.seen is not net


def test_torch_shows_ensures_the_input(net):
    """When this fails torch has mended ``PassBase.__call__``, and ours can lean on it."""
    theirs = TorchPromise()
    result = theirs(net)
    assert theirs.seen is net
    assert theirs.seen is not result.graph_module


def test_a_broken_promise_is_raised_and_a_kept_one_is_not(net):
    class Lies(Bypass):
        def ensures(self, graph_module):
            if graph_module.graph.find_nodes(op="call_module", target="last"):
                raise InternalError("last is still there")

    with pytest.raises(InternalError, match=r"^last is still there$"):
        Lies("act")(net)
    assert Lies("last")(net).modified is True


def test_steps_run_in_order(net):
    steps = []

    class Logs(GraphPass):
        def requires(self, _graph_module):
            steps.append("requires")

        def call(self, graph_module):
            steps.append("call")
            return PassResult(graph_module, False)

        def ensures(self, _graph_module):
            steps.append("ensures")

    Logs()(net)
    assert steps == ["requires", "call", "ensures"]


def test_call_is_not_reached_when_requires_refuses(net):
    class Refuses(Bypass):
        def requires(self, _graph_module):
            raise UnsupportedError("no batch axis; capture with one")

    with pytest.raises(UnsupportedError, match=r"^no batch axis; capture with one$") as caught:
        Refuses()(net)
    assert caught.value.__cause__ is None  # an error of our own passes through unwrapped
    assert hasattr(net, "act")


@pytest.mark.parametrize("step", ["requires", "call", "ensures"])
def test_foreign_exceptions_are_wrapped_and_name_pass_and_step(net, step):
    class Breaks(Bypass):
        pass

    def fail(_self, _graph_module):
        raise KeyError("weight")

    setattr(Breaks, step, fail)
    with pytest.raises(InternalError) as caught:
        Breaks("act", cap=5)(net)
    assert str(caught.value) == f"Breaks(target='act', cap=5) failed in {step}: KeyError: 'weight'"
    assert isinstance(caught.value.__cause__, KeyError)


def rename(net):
    next(iter(net.graph.nodes)).name = "y"


def retarget(net):
    net.graph.find_nodes(op="call_function", target=operator.add)[0].target = operator.sub


def new_argument(net):
    node = net.graph.find_nodes(op="call_function", target=operator.add)[0]
    node.args = (node.args[0], 2.0)


def new_module(net):
    net.act = nn.ReLU()


def new_option(net):
    net.conv.padding = (1, 1)


def new_parameter(net):
    net.conv.weight = nn.Parameter(net.conv.weight.detach().clone())


def write_in_place(net):
    with torch.no_grad():
        net.conv.weight.add_(1)


def add_node(net):
    with net.graph.inserting_before(net.graph.output_node()):
        net.graph.call_function(torch.neg, (next(iter(net.graph.nodes)),))


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (rename, "node 'x' changed"),
        (retarget, "node 'add' changed"),
        (new_argument, "node 'add' changed"),
        (add_node, "node 'output' changed"),
        (lambda net: bypass(net, "act"), "node 'act' changed"),
        (new_module, "submodule 'act' changed"),
        (new_option, "submodule 'conv' changed"),
        (new_parameter, "tensor 'conv.weight' changed"),
        (write_in_place, "tensor 'conv.weight' changed"),
    ],
)
def test_a_lie_about_modified_is_caught(net, edit, where):
    message = f"Edit() says modified=False but {where}; compute modified from the edits made"
    with pytest.raises(InternalError) as caught:
        Edit(edit, modified=False)(net)
    assert str(caught.value) == message


def test_annotating_is_not_modifying(net):
    def annotate(net):
        for node in net.graph.nodes:
            node.meta["note"] = 1

    assert Edit(annotate, modified=False)(net).modified is False


def test_another_module_with_modified_false_is_caught(net):
    class Copies(GraphPass):
        def call(self, graph_module):
            return PassResult(copy.deepcopy(graph_module), False)

    with pytest.raises(InternalError, match=r"Copies\(\) says modified=False but returned another module;"):
        Copies()(net)


def test_a_dangling_submodule_is_caught(net):
    with pytest.raises(InternalError) as caught:
        Edit(lambda net: bypass(net, "last"), modified=True)(net)
    assert str(caught.value) == (
        "Edit() left submodules that no node uses: last; end the pass with graph_module.delete_all_unused_submodules()"
    )


def test_a_dangling_submodule_without_tensors_is_no_fault(net):
    assert Edit(lambda net: bypass(net, "act"), modified=True)(net).modified is True


def test_what_dangled_before_is_not_blamed_on_the_pass(net):
    net.add_module("spare", nn.Linear(2, 2))
    assert Edit(lambda net: bypass(net, "act"), modified=True)(net).modified is True


def test_get_attr_and_shared_registration_count_as_use(net):
    net.add_module("again", net.conv)  # one module under two names, called under one

    def read_the_weight(net):
        bypass(net, "last")
        with net.graph.inserting_before(net.graph.output_node()):
            net.graph.get_attr("last.weight")

    assert Edit(read_the_weight, modified=True)(net).modified is True
    assert "last" in dict(net.named_modules())


def use_before_definition(net):
    first, last = (net.graph.find_nodes(op="call_module", target=t)[0] for t in ("conv", "last"))
    last.append(first)


def test_an_invalid_graph_is_blamed_on_the_pass_that_left_it(net):
    with pytest.raises(InternalError, match=r"^Edit\(\) left a graph that is not valid: .*'conv'"):
        Edit(use_before_definition, modified=True)(net)


def test_an_invalid_graph_is_not_blamed_on_the_pass_that_got_it(net):
    use_before_definition(net)
    with pytest.raises(UnsupportedError, match=r"^the graph handed to Bypass\(.*\) is not valid: .*'conv'"):
        Bypass()(net)


def test_something_else_than_a_graph_module_is_refused():
    with pytest.raises(UserError) as caught:
        Bypass()(nn.ReLU())
    assert str(caught.value) == (
        "Bypass(target='act', cap=9) works on a torch.fx.GraphModule, not on a ReLU; "
        "fxmerge.capture(model, example_input) makes one"
    )


@pytest.mark.parametrize("returned", [None, "the module", "modified=None"])
def test_a_wrong_result_is_refused(net, returned):
    class Returns(GraphPass):
        def call(self, graph_module):
            return {
                "the module": graph_module,
                "modified=None": PassResult(graph_module, None),
            }.get(returned)

    with pytest.raises(InternalError, match=r"^Returns\(\) returned .*; call must return PassRes"):
        Returns()(net)


class Counted(PassResult):
    removed: int

    def __new__(cls, graph_module, modified, removed):
        result = super().__new__(cls, graph_module, modified)
        result.removed = removed
        return result


def test_a_result_may_carry_data(net):
    class Counts(Bypass):
        def call(self, graph_module):
            return Counted(*super().call(graph_module), removed=1)

    result = Counts()(net)
    assert (result.modified, result.removed) == (True, 1)


def test_works_in_torchs_pass_manager_until_nothing_changes(net):
    calls = []

    class Watched(Bypass):
        def call(self, graph_module):
            calls.append(self.target)
            return super().call(graph_module)

    inner = PassManager([Watched("act")], steps=5)
    outer = PassManager([inner, Watched("last")], run_checks_after_each_pass=True)
    result = outer(net)
    assert result.modified is True
    assert calls == ["act", "act", "last"]  # the second "act" said False and ended the loop
    assert [node.target for node in net.graph.nodes if node.op == "call_module"] == ["conv"]
    assert outer(net).modified is False


def test_pass_managers_error_is_chained_to_ours(net):
    with pytest.raises(Exception, match="running the 'Edit' pass") as caught:
        PassManager([Edit(new_option, modified=False)])(net)
    assert isinstance(caught.value.__cause__, InternalError)


def test_repr_is_the_constructor_call_on_one_short_line():
    class Plain(GraphPass):
        def call(self, graph_module):
            return PassResult(graph_module, False)

    assert repr(Plain()) == "Plain()"
    assert repr(Bypass("conv", cap=3)) == "Bypass(target='conv', cap=3)"
    shown = repr(Bypass(nn.Sequential(*(nn.ReLU() for _ in range(9)))))
    assert shown == ("Bypass(target=Sequential( (0): ReLU() (1): ReLU() (2): ReLU() (3): ReLU..., cap=9)")


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        GraphPass()
