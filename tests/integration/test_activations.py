"""Activations of a data set: what hooks see for each prompt, streamed, kept, and gone on with after a crash."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import patchwire
import tiny
from conformance.hooks import assert_same, changed_logits, record
from integration.refusals import refused
from patchwire import GraphError, InputError, ShapeError, SiteError, StoreError

PROMPTS = [tiny.prompt(length, seed=7) for length in (3, 9, 1, 6, 4, 8, 2)]
SITES = ["layers.1.output", "logits"]


@pytest.fixture
def model(served) -> patchwire.Model:
    return served["gpt2"]


@pytest.fixture(scope="module")
def seen(references) -> list[dict]:
    """What hooks see for each prompt, alone."""
    return [record(references["gpt2"], ids) for ids in PROMPTS]


def hidden(places) -> torch.Tensor:
    return places["transformer.h.1", "output", ()][0]


def files(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir())


class TestStreaming:
    @pytest.mark.parametrize("name", tiny.CORE)
    def test_brings_what_hooks_see_for_each_prompt_without_padding(self, served, references, name):
        model = served[name]
        raw = model.layers[1].path
        count = 0
        for indices, values in model.activations(PROMPTS, ["layers.1.output"], batch_size=3):
            for index, value in zip(indices, values["layers.1.output"], strict=True):
                places = record(references[name], PROMPTS[index])
                assert_same(value, next(each for place, each in places.items() if place[:2] == (raw, "output"))[0])
                count += 1

        assert count == len(PROMPTS)

    def test_gives_batches_in_order(self, model):
        batches = list(model.activations(PROMPTS, "logits", batch_size=3))

        assert [each.indices for each in batches] == [range(3), range(3, 6), range(6, 7)]
        assert [[value.shape[0] for value in each.values["logits"]] for each in batches] == [[3, 9, 1], [6, 4, 8], [2]]

    def test_starts_where_it_is_told_to(self, model):
        batches = list(model.activations(iter(PROMPTS), "logits", batch_size=3, start=5))

        assert [each.indices for each in batches] == [range(5, 7)]

    def test_takes_patterns_and_every_form_of_address(self, model):
        sites = ["layers.*.mixer.output", "transformer.h.0.input", 'transformer.h.1.input["args"][0]']
        ((_, values),) = model.activations(PROMPTS[:1], sites)

        assert list(values) == [*(f"layers.{index}.mixer.output" for index in range(3)), *sites[1:]]
        assert all(value.shape == (3, 24) for (value,) in values.values())

    def test_takes_a_function_of_the_model_that_reads_and_edits(self, model, references):
        def sites(model):
            model.layers[0].output[:, -1] = 0
            return {"last": model.logits[0, -1], "norm": model.layers[2].output.norm()}

        ((_, values),) = model.activations(PROMPTS[:2], sites)

        def zero_last(tensor):
            tensor[:, -1] = 0
            return tensor

        for ids, value in zip(PROMPTS, values["last"], strict=False):
            expected = changed_logits(references["gpt2"], ids, {("transformer.h.0", "output", ()): zero_last})
            assert_same(value, expected[0, -1])
        assert values["norm"][0].shape == ()

    def test_takes_texts(self, chatty):
        texts = ["the cat sat", "a dog", "hello"]
        ((_, values),) = chatty.activations(texts, ["layers.0.output"])

        assert [value.shape[0] for value in values["layers.0.output"]] == [
            len(chatty.tokenizer(each)) for each in texts
        ]

    def test_can_be_narrow(self, model, seen):
        ((_, values),) = model.activations(PROMPTS[:1], ["layers.1.output"], dtype=torch.bfloat16)

        assert_same(values["layers.1.output"][0], hidden(seen[0]).bfloat16(), tolerance=1e-2)

    def test_asks_for_one_batch_more_than_was_taken_and_no_more(self, model):
        taken = []

        def prompts():
            for index, ids in enumerate(PROMPTS * 3):
                taken.append(index)
                yield ids

        asked = []
        stream = model.activations(prompts(), lambda model: asked.append(1) or {"x": model.logits}, batch_size=2)
        assert len(asked) == 0
        for number in range(1, 4):
            next(stream)
            assert len(taken) == len(asked) == 2 * (number + 1)
        stream.close()
        assert len(taken) == 8

    def test_serves_others_meanwhile(self, model):
        stream = model.activations(PROMPTS, "logits", batch_size=2)
        next(stream)
        with model.trace(PROMPTS[0]):
            logits = model.logits.save()
        rest = list(stream)

        assert logits.value.isfinite().all()
        assert rest[-1].indices.stop == len(PROMPTS)


class TestAStore:
    def test_holds_what_hooks_see(self, model, seen, tmp_path):
        for _ in model.activations(PROMPTS, SITES, batch_size=3, path=tmp_path / "acts", shard_bytes=1):
            pass

        store = patchwire.activations.open(tmp_path / "acts")
        assert (store.model, store.fingerprint, store.indices) == ("gpt2", model.fingerprint, range(7))
        assert list(store) == SITES
        assert len(store["logits"]) == 7
        assert store["logits"].dtype is torch.float32
        for index, places in enumerate(seen):
            assert_same(store["layers.1.output"][index], hidden(places))
            assert_same(store["logits"][index], places["lm_head", "output", ()][0])
        assert files(tmp_path / "acts") == ["index.json", *(f"shard-{number:05}.safetensors" for number in range(3))]

    def test_is_one_file_if_there_is_little(self, model, tmp_path):
        streamed = [
            each
            for _, values in model.activations(PROMPTS, "logits", batch_size=2, path=tmp_path)
            for each in values["logits"]
        ]

        store = patchwire.activations.open(str(tmp_path))
        assert len(files(tmp_path)) == 2
        assert all(torch.equal(one, other) for one, other in zip(store["logits"], streamed, strict=True))
        assert [len(each) for each in store["logits"][2:5]] == [1, 6, 4]
        assert torch.equal(store["logits"][-1], streamed[-1])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64])
    def test_keeps_every_dtype(self, model, tmp_path, dtype):
        ((_, values),) = model.activations(PROMPTS, "logits", path=tmp_path, dtype=dtype)

        store = patchwire.activations.open(tmp_path)
        assert store["logits"].dtype is dtype
        assert store["logits"][1].dtype is dtype
        assert torch.equal(store["logits"][1].float(), values["logits"][1].float())

    def test_keeps_tensors_of_any_shape(self, model, tmp_path):
        def sites(model):
            logits = model.logits[0]
            return {"number": logits.sum(), "none": logits[:0], "ids": logits.argmax(-1), "square": logits @ logits.T}

        ((_, values),) = model.activations(PROMPTS, sites, path=tmp_path)

        store = patchwire.activations.open(tmp_path)
        for name, expected in values.items():
            for index, value in enumerate(expected):
                assert store[name][index].shape == value.shape
                assert store[name][index].dtype is value.dtype
                assert torch.equal(store[name][index], value)

    def test_begins_where_the_stream_began(self, model, tmp_path):
        for _ in model.activations(PROMPTS, "logits", path=tmp_path, start=4):
            pass

        store = patchwire.activations.open(tmp_path)
        assert store.indices == range(4, 7)
        assert [len(each) for each in store["logits"]] == [4, 8, 2]
        assert len(store["logits"][4]) == 4
        with pytest.raises(IndexError, match="4 to 6"):
            store["logits"][0]

    def test_says_which_sites_it_has(self, model, tmp_path):
        for _ in model.activations(PROMPTS[:1], "logits", path=tmp_path):
            pass

        with pytest.raises(KeyError, match="it has 'logits'"):
            patchwire.activations.open(tmp_path)["logit"]


class TestGoingOn:
    def test_runs_only_what_is_missing(self, model, seen, tmp_path):
        stream = model.activations(PROMPTS, SITES, batch_size=2, path=tmp_path)
        next(stream)
        next(stream)
        stream.close()
        kept = patchwire.activations.open(tmp_path).indices

        rest = list(model.activations(PROMPTS, SITES, batch_size=2, path=tmp_path))

        assert kept == range(4)
        assert [each.indices for each in rest] == [range(4, 6), range(6, 7)]
        store = patchwire.activations.open(tmp_path)
        for index, places in enumerate(seen):
            assert_same(store["layers.1.output"][index], hidden(places))

    def test_of_what_is_complete_runs_nothing_and_of_more_prompts_runs_those(self, model, tmp_path):
        for _ in model.activations(PROMPTS[:4], "logits", path=tmp_path):
            pass

        with pytest.warns(patchwire.PatchwireWarning, match="has all of these prompts already") as caught:
            again = model.activations(PROMPTS[:4], "logits", path=tmp_path)
        assert caught[0].filename == __file__
        assert list(again) == []
        assert [each.indices for each in model.activations(PROMPTS, "logits", path=tmp_path)] == [range(4, 7)]

    def test_after_the_program_was_killed(self, server, model, seen, tmp_path):
        program = f"""
            import os, sys
            import patchwire
            model = patchwire.connect({server.address!r}, progress=False).model("gpt2")
            stream = model.activations({PROMPTS!r}, {SITES!r}, batch_size=2, path={str(tmp_path)!r}, shard_bytes=1)
            for indices, values in stream:
                if indices.stop == 4:
                    os._exit(9)
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=120)
        assert done.returncode == 9
        assert patchwire.activations.open(tmp_path).indices == range(4)
        # What a crash in the middle of writing leaves: half a shard, and a whole one that no index names.
        (tmp_path / "shard-00002.safetensors.partial").write_bytes(b"half")
        (tmp_path / "shard-00002.safetensors").write_bytes(b"not in the index")

        rest = list(model.activations(PROMPTS, SITES, batch_size=2, path=tmp_path))

        assert rest[0].indices == range(4, 6)
        store = patchwire.activations.open(tmp_path)
        for index, places in enumerate(seen):
            assert_same(store["layers.1.output"][index], hidden(places))

    def test_after_an_error_keeps_what_came_before_it(self, model, tmp_path):
        broken = [*PROMPTS[:4], [tiny.VOCABULARY + 5], *PROMPTS[4:]]
        stream = model.activations(broken, "logits", batch_size=2, path=tmp_path)
        with refused(InputError, "Item 4 of the data set", line=False):
            list(stream)

        assert patchwire.activations.open(tmp_path).indices == range(4)


class TestRefusals:
    @pytest.fixture
    def begun(self, model, tmp_path) -> Path:
        for _ in model.activations(PROMPTS[:3], SITES, path=tmp_path / "acts"):
            pass
        return tmp_path / "acts"

    def test_of_another_model(self, served, begun):
        with refused(StoreError, "model is gpt2, not llama", hint="another path"):
            served["llama"].activations(PROMPTS, SITES, path=begun)  # this line

    @pytest.mark.parametrize(
        ("sites", "dtype"),
        [
            (["layers.2.output", "logits"], None),
            (["logits"], None),
            (SITES[::-1], None),
            (SITES, torch.bfloat16),
            (lambda model: {"layers.1.output": model.layers[2].output[0], "logits": model.logits[0]}, None),
        ],
        ids=["others", "fewer", "order", "dtype", "function"],
    )
    def test_of_other_sites(self, model, begun, sites, dtype):
        with refused(StoreError, r"begun with other sites \(layers\.1\.output, logits\)"):
            model.activations(PROMPTS, sites, path=begun, dtype=dtype)  # this line

    @pytest.mark.parametrize("prompts", [PROMPTS[1:], [*PROMPTS[:2], [5]], PROMPTS[:2]], ids=["first", "last", "fewer"])
    def test_of_other_prompts(self, model, begun, prompts):
        with refused(StoreError, "3 prompts are not the first"):
            model.activations(prompts, SITES, path=begun)  # this line

    def test_of_another_start(self, model, begun):
        with refused(StoreError, "`start` is 0, not 1"):
            model.activations(PROMPTS, SITES, path=begun, start=1)  # this line

    def test_of_a_shard_that_is_not_whole(self, model, begun):
        shard = begun / "shard-00000.safetensors"
        shard.write_bytes(shard.read_bytes()[:-10])

        with refused(StoreError, "damaged.*shard-00000"):
            patchwire.activations.open(begun)  # this line
        with refused(StoreError, "damaged.*shard-00000"):
            model.activations(PROMPTS, SITES, path=begun)  # this line

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "patchwire.activations/1"}'])
    def test_of_an_index_that_cannot_be_read(self, begun, text):
        (begun / "index.json").write_text(text)

        with refused(StoreError, "damaged"):
            patchwire.activations.open(begun)  # this line

    def test_of_an_index_of_another_version(self, begun):
        index = json.loads((begun / "index.json").read_text())
        (begun / "index.json").write_text(json.dumps({**index, "format": "patchwire.activations/2"}))

        with refused(StoreError, "another version"):
            patchwire.activations.open(begun)  # this line

    def test_of_a_directory_of_something_else(self, model, tmp_path):
        (tmp_path / "thesis.tex").write_text("x")

        with refused(StoreError, "not empty"):
            model.activations(PROMPTS, SITES, path=tmp_path)  # this line
        with refused(StoreError, "There is no store"):
            patchwire.activations.open(tmp_path)  # this line

    def test_of_no_site(self, model):
        with pytest.raises(patchwire.InputError, match="No site was named"):
            model.activations(PROMPTS, [])

    def test_of_sites_that_are_not_there(self, model):
        with refused(SiteError, "mixr"):
            model.activations(PROMPTS, ["layers.0.mixr.output"])  # this line

    def test_of_a_function_that_returns_no_values(self, model):
        stream = model.activations(PROMPTS, lambda model: model.logits)
        with refused(GraphError, "return values by name", hint="lambda model"):
            next(stream)  # this line

    def test_of_a_function_that_is_wrong_are_at_its_line(self, model):
        def sites(model):
            return {"x": model.logits @ model.logits}  # this line

        stream = model.activations(PROMPTS, sites)
        with pytest.raises(ShapeError) as caught:
            next(stream)
        assert caught.value.lines[0].code.endswith("# this line")

    @pytest.mark.parametrize("dataset", [[], iter([])])
    def test_of_a_data_set_without_prompts(self, model, dataset):
        with refused(InputError, "no prompt 0"):
            model.activations(dataset, SITES)  # this line

    def test_of_a_text_as_data_set(self, model):
        with refused(InputError, "A text is not a data set"):
            model.activations("the cat sat", SITES)  # this line

    def test_of_items_that_are_several_prompts(self, model):
        with refused(InputError, "Item 1 of the data set is 2 prompts", line=False):
            list(model.activations([PROMPTS[0], PROMPTS[:2]], SITES))

    @pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"start": -1}])
    def test_of_batches_that_there_are_not(self, model, wrong):
        with refused(patchwire.InputError, "There are no batches", hint="1 or more"):
            next(model.activations(PROMPTS, "logits", **wrong))  # this line

    def test_of_a_function_that_returns_other_names_for_other_prompts(self, model):
        names = iter("ab")

        with refused(patchwire.GraphError, "other names for other prompts", hint="same names"):
            list(model.activations(PROMPTS[:2], lambda model: {next(names): model.logits}))  # this line

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda logits: logits.half() if logits.shape[1] == 3 else logits, "one real dtype"),
            (lambda logits: logits.to(torch.complex64), "one real dtype"),
            (lambda logits: logits[0] if logits.shape[1] == 3 else logits, "number of dimensions"),
        ],
    )
    def test_of_a_store_of_tensors_that_do_not_fit_together(self, model, tmp_path, change, says):
        def sites(model):
            return {"x": change(model.logits)}

        with refused(patchwire.StoreError, says):
            list(model.activations(PROMPTS[:2], sites, path=tmp_path / "acts"))  # this line


def test_of_values_inside_modules(served):
    model = served["llama"]
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    found = [each for batch in model.activations(prompts, "layers.1.mlp.neurons", batch_size=2) for each in [batch]]
    with model.trace(prompts[1]):
        wanted = model.layers[1].mlp.neurons[0].save()
    assert torch.allclose(found[0].values["layers.1.mlp.neurons"][1], wanted.value, atol=1e-6)
