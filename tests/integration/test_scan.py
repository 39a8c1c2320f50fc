"""Scans: everything is recorded and checked, shapes are known, and nothing runs."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import patchwire
import tiny
from integration.refusals import refused
from patchwire import BranchError, GraphError, LimitError, OrderError, ShapeError, SiteError
from serving import Server

IDS = [1, 2, 3, 4, 5]


@pytest.fixture
def model(served) -> patchwire.Model:
    return served["gpt2"]


class TestWhatIsKnown:
    def test_of_saved_values_are_shape_and_dtype(self, model):
        with model.scan(IDS):
            hidden = model.layers[1].output.save()
            half = model.logits[:, -1].save(dtype=torch.float16)
            best = model.logits[0, -1].topk(3)
            patchwire.save(best)

        assert (hidden.shape, hidden.dtype, hidden.ndim, len(hidden)) == ((1, 5, 24), torch.float32, 3, 1)
        assert half.shape == (1, tiny.VOCABULARY)
        assert best.indices.dtype is torch.int64

    def test_of_values_that_were_not_saved_or_edited_later_too(self, model):
        with model.scan(IDS):
            hidden = model.layers[1].output
            last = hidden[:, -1]
            hidden[:] = 0

        assert (hidden.shape, last.shape) == ((1, 5, 24), (1, 24))

    def test_of_several_prompts_is_each_prompt_s(self, model):
        with model.scan() as scan:
            shapes = []
            for ids in (IDS, [6, 7]):
                with scan.invoke(ids):
                    shapes.append(model.layers[1].output.save())

        assert [each.shape[1] for each in shapes] == [5, 2]

    def test_is_the_same_as_in_a_trace(self, served):
        for name in tiny.CORE:
            model = served[name]
            for block in (model.scan, model.trace):
                with block(IDS):
                    values = [model.layers[0].mixer.output.save(), model.norm.output.save(), model.logits.save()]
                if block == model.scan:
                    scanned = [(each.shape, each.dtype) for each in values]
            assert scanned == [(each.value.shape, each.value.dtype) for each in values]

    @pytest.mark.parametrize(
        "use",
        [
            lambda value: value.value,
            lambda value: value + 1,
            lambda value: torch.relu(value),
            lambda value: value.mean(),
            lambda value: value[0],
            float,
            bool,
            np.asarray,
        ],
    )
    def test_are_no_numbers(self, model, use):
        with model.scan(IDS):
            norm = model.layers[1].output.norm().save()

        with refused(GraphError, "was a scan", hint="model.trace", line=False) as refusal:
            use(norm)
        assert refusal.error.lines[0].file == __file__
        assert "scanned" in repr(norm)


class TestMistakes:
    def test_are_found_as_in_a_trace(self, model):
        with refused(SiteError, "mixr"), model.scan(IDS):
            model.layers[1].mixr.output.save()  # this line
        with refused(ShapeError, r"\[1, 5, 24\]"), model.scan(IDS):
            model.layers[1].output = torch.zeros(3)  # this line
        with refused(OrderError, "later"), model.scan(IDS):
            late = model.layers[2].output  # and this line
            model.layers[0].output = late  # this line
        with refused(BranchError, "cond|block has ended"), model.scan(IDS):
            bool(model.logits.sum())  # this line
        with refused(GraphError, "no prompt", line=False), model.scan():
            pass


class TestNothing:
    def test_is_asked_of_the_server(self, checkpoints):
        with Server({"gpt2": checkpoints["gpt2"]}) as server:
            model = patchwire.connect(server.address, progress=False).model("gpt2")
        # The server is gone; a catalogue is enough.
        with model.scan(IDS):
            logits = model.logits.save()

        assert logits.shape == (1, 5, tiny.VOCABULARY)

    def test_is_printed_and_no_warning_given(self, model, capsys):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with model.scan(IDS) as scan:
                scan.log(model.logits.sum())

        assert capsys.readouterr().out == ""


class TestTheTree:
    def test_has_symbolic_shapes_and_what_the_block_does(self, model):
        with model.scan(IDS) as scan:
            hidden = model.layers[1].output
            hidden[:, -1] = 0
            model.logits[:, -1].save()  # saved

        text = str(scan)
        assert text.startswith(repr(model))
        assert "[batch, seq, 24]" in scan.tree
        assert "batch = 1, seq = 5" in text
        assert "write  model.layers[1].output  [1, 5, 24] float32  test_scan.py:" in text
        assert "save   [1, 61] float32  test_scan.py:" in text
        assert "model.logits[:, -1].save()" in text

    def test_can_be_printed_without_a_block(self, model):
        assert str(model.scan(IDS)) == repr(model)

    def test_is_shown_in_a_notebook(self, model):
        with model.scan(IDS) as scan:
            model.logits.save()

        assert "batch = 1, seq = 5" in scan._repr_html_()
        assert "GPT2LMHeadModel" in scan._repr_html_()


class TestCheck:
    def test_asks_the_server_whether_it_would_run(self, model):
        with model.scan(IDS) as scan:
            model.layers[1].output[:] = torch.randn(1, 5, 24)
            model.logits.save()

        scan.check()

    def test_says_what_a_run_would_be_refused_with(self, deep, limits):
        with deep.scan([1, 2]) as scan:
            for layer in deep.layers:
                layer.output.save()

        with refused(LimitError, "80 nodes", str(limits["nodes"]), line=False):
            scan.check()

    def test_before_the_end_of_the_block_is_refused(self, model):
        with refused(GraphError, "nothing to check"), model.scan(IDS) as scan:
            scan.check()  # this line
