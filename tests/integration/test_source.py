"""What is inside forwards, as a user sees it: the listing, the names, and what is said when something is not there."""

from __future__ import annotations

import grpc
import pytest

import patchwire
import tiny
from integration import messages
from integration.refusals import refused
from patchwire import GraphError, LimitError, ModelNotFoundError, OrderError, ShapeError, SiteError
from patchwire.status import error_from_call
from patchwire.v1 import service_pb2
from serving import Server

IDS = [1, 2, 3]


def refused_by(call, request) -> patchwire.PatchwireError:
    """The error of a call, as our client would raise it."""
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    return error_from_call(caught.value, "here")


@pytest.fixture
def model(served) -> patchwire.Model:
    return served["gpt2"]


class TestListing:
    def test_shows_the_text_with_the_operations_beside_their_lines(self, model):
        shown = str(model.layers[1].mixer.source).splitlines()

        line = next(each for each in shown if "self.c_attn(hidden_states).split" in each)
        assert line.startswith("self_c_attn_1")
        assert shown[shown.index(line) + 1].startswith("split_1 ")
        assert any(each.startswith("attn_output_1 ") for each in shown)

    def test_says_what_a_forward_pass_does_not_come_by(self, model):
        shown = str(model.layers[1].mixer.source)

        assert "(self_q_attn_0)" in shown
        assert shown.endswith("(name): a forward pass does not come by")

    def test_says_what_may_run_several_times(self, served):
        scan = served["mamba"].layers[0].mixer.source.mamba_selective_scan_0.source

        assert "ssm_state_3[n]" in str(scan)
        assert str(scan.ssm_state_3.runs) == "seq"

    def test_gives_the_names_in_the_order_of_the_text(self, model):
        source = model.layers[0].mlp.source

        assert source.names == (
            "self_c_fc_0",
            "hidden_states_0",
            "self_act_0",
            "hidden_states_1",
            "self_c_proj_0",
            "hidden_states_2",
            "self_dropout_0",
            "hidden_states_3",
        )
        assert [each.name for each in source] == list(source.names)
        assert set(source.names) <= set(dir(source))
        assert "self_act_0" in source
        assert len(source) == 8

    def test_shows_one_operation_with_the_lines_around_it_and_its_tensors(self, model):
        shown = str(model.layers[0].mlp.source.self_act_0)

        assert "self_act_0, in GPT2MLP.forward" in shown
        assert "--> " in shown
        assert "output [batch, seq, 96]" in shown

    def test_goes_into_the_functions_that_are_called(self, model):
        inner = model.layers[0].mixer.source.attention_interface_1.source

        assert "def eager_attention_forward(" in str(inner)
        assert "nn_functional_softmax_0" in inner

    def test_is_there_for_the_whole_model(self, model):
        assert "self_transformer_0" in model.source
        with model.trace(IDS):
            logits = model.source.logits_0.output.save()
            same = model.logits.save()

        assert logits.value.equal(same.value)


class TestWhatIsNotThere:
    def test_a_wrong_name(self, model):
        with refused(SiteError, r"no operation `self_act_1`", hint=r"`model\.layers\[0\]\.mlp\.source\.self_act_0`"):
            _ = model.layers[0].mlp.source.self_act_1  # this line

    def test_a_wrong_name_is_no_attribute(self, model):
        assert hasattr(model.layers[0].mlp.source, "self_act_0")
        assert not hasattr(model.layers[0].mlp.source, "self_act_1")

    def test_a_value_outside_of_a_block(self, model):
        with refused(GraphError, "only while the model runs"):
            _ = model.layers[0].mlp.source.self_act_0.output  # this line

    def test_a_line_that_is_not_come_by(self, model):
        with refused(SiteError, "does not come by"), model.trace(IDS):
            model.layers[0].mixer.source.self_q_attn_0.output.save()  # this line

    def test_what_is_no_tensor(self, model):
        with refused(SiteError, "is not a tensor and has none in it"), model.trace(IDS):
            model.layers[0].mixer.source.shape_q_0.output.save()  # this line

    def test_a_time_at_which_an_operation_does_not_run(self, model):
        with refused(SiteError, "runs once"), model.trace(IDS):
            model.layers[0].mlp.source.self_act_0[1].output.save()  # this line

    def test_a_token_that_the_prompt_does_not_have(self, served):
        scan = served["mamba"].layers[0].mixer.source.mamba_selective_scan_0.source
        with refused(SiteError, "runs 3 times", hint=r"last \[2\]"), served["mamba"].trace(IDS):
            scan.ssm_state_3[3].output.save()  # this line

    @pytest.mark.parametrize("number", [-1, "x", True, None])
    def test_a_number_that_is_none(self, model, number):
        with refused(SiteError, "time"):
            _ = model.layers[0].mlp.source.self_act_0[number]  # this line

    def test_the_source_of_one_time(self, model):
        with refused(SiteError, "number goes to the operation inside"):
            _ = model.layers[0].mixer.source.attention_interface_1[0].source  # this line

    def test_the_source_of_a_module_that_is_called(self, model):
        with refused(SiteError, r"write `model\.transformer\.h\[0\]\.mlp\.c_fc\.source`"):
            _ = model.layers[0].mlp.source.self_c_fc_0.source  # this line

    def test_the_source_of_what_is_not_written_in_python(self, model):
        with refused(SiteError, "no text in Python"):
            _ = model.layers[0].mixer.source.key_states_view_1.source  # this line

    def test_the_source_of_an_assignment(self, model):
        with refused(SiteError, "assignment"):
            _ = model.layers[0].mlp.source.hidden_states_0.source  # this line

    def test_the_source_of_a_list(self, model):
        with refused(SiteError, "not a module", hint=""):
            _ = model.layers.source  # this line


class TestWrites:
    def test_of_another_shape(self, model):
        with refused(ShapeError, r"self_act_0\.output` is \[1, 3, 96\]", hint="same shape"), model.trace(IDS):
            act = model.layers[0].mlp.source.self_act_0
            act.output = act.output[:, :2]  # this line

    def test_of_a_later_value(self, model):
        with refused(OrderError, "comes later"), model.trace(IDS):
            late = model.layers[0].mlp.source.self_act_0.output  # and this line
            model.layers[0].mixer.source.attn_output_0.output[:] = late.mean()  # this line

    def test_of_a_value_of_the_module_before(self, model):
        with model.trace(IDS):
            given = model.layers[0].mlp.input
            model.layers[0].mlp.source.self_dropout_0.output = given
            result = model.layers[0].mlp.output.save()
            same = given.save()

        assert result.value.equal(same.value)

    def test_of_an_operation_instead_of_its_output(self, model):
        with refused(SiteError, "only values", hint=r"self_act_0\.output = "):
            model.layers[0].mlp.source.self_act_0 = 0  # this line

    def test_of_something_else_of_an_operation(self, model):
        with refused(SiteError, "cannot be assigned"):
            model.layers[0].mlp.source.self_act_0.inputs = 0  # this line


class TestProtocol:
    def ask(self, stub, model="gpt2", module="layers.0.mixer", path=()):
        request = service_pb2.DescribeSourceRequest(model=model, module=module, path=path)
        return stub.DescribeSource(request).source

    def test_describes_the_forward_of_a_module_by_any_of_its_names(self, stub):
        canonical = self.ask(stub)

        assert canonical.module == "transformer.h.0.attn"
        assert canonical.function == "GPT2Attention.forward"
        assert self.ask(stub, module="transformer.h.0.attn") == canonical

    @pytest.mark.parametrize(
        ("asked", "kind"),
        [
            ({"model": "gpt3"}, ModelNotFoundError),
            ({"module": "layers.9"}, SiteError),
            ({"module": "layers"}, SiteError),
            ({"module": "x" * 10_000}, SiteError),
            ({"path": ["nothing"]}, SiteError),
            ({"path": ["key_states_view_1"]}, SiteError),
            ({"path": ["attention_interface_1", "", "\0"]}, SiteError),
            ({"path": ["attention_interface_1"] * 3}, SiteError),
            ({"path": ["attention_interface_1"] * 100_000}, SiteError),
            ({"path": ["x" * 100_000]}, SiteError),
        ],
    )
    def test_refuses_what_is_not_there(self, stub, asked, kind):
        asked = {"model": "gpt2", "module": "layers.0.mixer", "path": []} | asked

        error = refused_by(stub.DescribeSource, service_pb2.DescribeSourceRequest(**asked))

        assert type(error) is kind
        assert len(str(error)) < 3000

    def test_understands_a_graph_that_nobody_has_asked_about(self, checkpoints):
        name = "layers.1.mixer.source.attention_interface_1.source.{}.output"
        nodes = [messages.read(name.format("attn_output_0")), messages.save(0)]
        with Server({"llama": checkpoints["llama"]}) as fresh:
            channel, stub = messages.stub(fresh.address)
            with channel:
                request = service_pb2.RunRequest(graph=messages.graph("llama", *nodes))
                events = list(messages.events(stub.Run(request)))
                wrong = messages.graph("llama", messages.read(name.format("nothing_0")), messages.save(0))
                error = refused_by(stub.Check, service_pb2.CheckRequest(graph=wrong))

        assert [event.saved.header.shape for event in events if event.HasField("saved")] == [[1, 4, 3, 6]]
        assert type(error) is SiteError

    def test_refuses_a_graph_that_looks_into_too_many_functions(self, stub):
        reads = [messages.read(f"layers.0.mixer.source.f_{index}.source.x_0.output") for index in range(600)]
        graph = messages.graph("gpt2", *reads, messages.save(0))

        error = refused_by(stub.Check, service_pb2.CheckRequest(graph=graph))

        assert type(error) is LimitError


def test_sources_are_learnt_while_passes_run(served):
    """Nobody's numbers change while others look into the same model for the first time."""
    from concurrent.futures import ThreadPoolExecutor

    model, ids = served["gpt_neox"], tiny.prompt(20)
    with model.trace(ids):
        expected = model.logits.save()

    def run(_: int) -> bool:
        with model.trace(ids):
            lens = model.lm_head(model.norm(model.layers[1].output)).save()
            logits = model.logits.save()
        return bool(logits.value.equal(expected.value)) and lens.value.isfinite().all().item()

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(run, index) for index in range(30)]
        names = [layer.mixer.source.attention_interface_1.source.names for layer in model.layers]

    assert len(set(names)) == 1
    assert all(each.result() for each in running)
