"""A server inside a program ends whenever it is forgotten, wherever that happens."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import patchwire
import tiny
from integration.refusals import refused
from patchwire_worker.embedded import EmbeddedServer
from patchwire_worker.models.hosted import HostedModel
from patchwire_worker.models.loading import Loaded

PATIENCE = 60


@pytest.fixture(scope="module")
def hosted() -> HostedModel:
    return HostedModel(Loaded("gpt2", tiny.build("gpt2"), None))


class TestAttention:
    def test_is_computed_step_by_step_if_that_is_asked_for(self, tmp_path):
        model = patchwire.local(str(tiny.save("gpt2", tmp_path)), attention="eager", progress=False)

        assert "nn_functional_softmax_0" in model.layers[0].mixer.source.attention_interface_1.source

    def test_that_is_not_known_is_refused(self, tmp_path):
        with pytest.raises(patchwire.ModelNotFoundError, match="`lazy` is no attention") as caught:
            patchwire.local(str(tiny.save("gpt2", tmp_path)), attention="lazy")
        assert "eager, sdpa" in caught.value.hint

    def test_of_a_loaded_model_stays_as_it_is(self):
        with pytest.raises(patchwire.ModelNotFoundError, match="as it was loaded"):
            patchwire.local(tiny.build("gpt2"), attention="eager")


def test_a_kept_value_is_saved_where_nnsight_has_given_every_object_a_save(tmp_path):
    model = patchwire.local(str(tiny.save("gpt2", tmp_path)), progress=False)
    with model.trace([[3, 1, 4]]):
        hidden = model.layers[0].output.save()
        kept = hidden.keep(seconds=60)
    with model.trace([[3, 1]]):
        again = kept.save()

    assert hasattr(object(), "save")
    assert torch.equal(again.value, hidden.value)


class TestLoading:
    @pytest.mark.parametrize(
        ("spec", "options", "says"),
        [
            ("./nowhere", {}, "There is no directory"),
            ("nowhere.gguf", {}, "There is no file"),
            (".", {}, "There is no model in"),
            (".", {"dtype": "float1"}, "`float1` is not a dtype"),
        ],
    )
    def test_what_is_not_there_is_refused(self, tmp_path, monkeypatch, spec, options, says):
        monkeypatch.chdir(tmp_path)
        with refused(patchwire.ModelNotFoundError, says, line=False):
            patchwire.local(spec, **options)

    def test_what_is_no_checkpoint_is_refused(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with refused(patchwire.ModelNotFoundError, "cannot be loaded", hint="config.json and weights", line=False):
            patchwire.local(str(tmp_path))

    def test_a_model_of_three_positions_is_refused(self):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=7, n_positions=3, n_embd=4, n_layer=1, n_head=1))
        with refused(patchwire.InputError, "has 3 positions, and is learnt from on 12", hint="12 or more", line=False):
            patchwire.local(model)

    def test_a_tokenizer_that_is_damaged_is_refused(self, tmp_path):
        (tiny.save("gpt2", tmp_path) / "tokenizer.json").write_text("{")
        with refused(patchwire.ModelNotFoundError, "The tokenizer in .* cannot be loaded", line=False):
            patchwire.local(str(tmp_path))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_a_device_that_is_not_there_is_refused(self, tmp_path):
        with refused(patchwire.ModelNotFoundError, "no CUDA device", hint="doctor", line=False):
            patchwire.local(str(tiny.save("gpt2", tmp_path)), device="cuda")

    def test_without_the_worker_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "patchwire_worker.embedded", None)
        with pytest.raises(patchwire.ModelNotFoundError, match="needs the worker") as caught:
            patchwire.local("gpt2")
        assert "pip install" in caught.value.hint


def thread_of(loop: asyncio.AbstractEventLoop) -> threading.Thread:
    async def current() -> threading.Thread:
        return threading.current_thread()

    return asyncio.run_coroutine_threadsafe(current(), loop).result(PATIENCE)


def test_stops_when_told_to(hosted):
    server = EmbeddedServer(hosted)
    thread = thread_of(server._loop)
    patchwire.connect(server.address, token=server.token).close()
    server.stop()
    server.stop()

    assert not thread.is_alive()
    assert server._loop.is_closed()


def test_stops_when_it_is_forgotten_on_its_own_thread(hosted):
    server = EmbeddedServer(hosted)
    loop = server._loop
    thread = thread_of(loop)
    kept = [server]
    del server
    loop.call_soon_threadsafe(kept.clear)
    thread.join(PATIENCE)

    assert not thread.is_alive()
    assert loop.is_closed()


def test_leaves_every_name_of_the_package_what_it_is():
    """Importing what a worker needs gives every object a `save` that is not ours."""
    program = "import patchwire_worker.embedded, patchwire; print(patchwire.save.__module__, patchwire.save([1]))"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert told.stdout == "patchwire [1]\n"


def test_leaves_a_program_s_own_gradients_alone(tmp_path):
    """What a worker needs looks for `with loss.backward():` in the text of programs, and takes it over."""
    program = tmp_path / "program.py"
    program.write_text(
        "import contextlib, torch, patchwire_worker.embedded\n"
        "weight = torch.ones(2, requires_grad=True)\n"
        "with contextlib.nullcontext(): (weight * 3).sum().backward()\n"
        "with (contextlib.nullcontext(), contextlib.nullcontext() as _): (weight * 4).sum().backward()\n"
        "with contextlib.nullcontext():\n"
        "    (weight * 5).sum().backward()\n"
        "print(weight.grad)\n"
    )
    told = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)

    assert told.stdout == "tensor([12., 12.])\n"


def test_leaves_nnsight_s_own_gradients_alone(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import nnsight, torch, patchwire_worker.embedded\n"
        "model = nnsight.NNsight(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)))\n"
        "with model.trace(torch.ones(1, 2)):\n"
        "    hidden = getattr(model, '0').output\n"
        "    loss = (hidden * 3).sum()\n"
        "    with loss.backward():\n"
        "        found = hidden.grad.save()\n"
        "print(found)\n"
    )
    told = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)

    assert told.stdout == "tensor([[3., 3.]])\n"
