"""Addresses, symbolic shapes and the catalogue: one string form, and an unknown name is never ignored."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchwire.errors import SiteError
from patchwire.sites import Address, Axis, Catalogue, Dim, Leaf, Operation, Source, path_from_proto, path_to_proto

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+){0,4}", fullmatch=True)
PATHS = st.lists(st.one_of(st.integers(0, 2**32 - 1), st.text(max_size=10)), max_size=4).map(tuple)


class TestAddress:
    @settings(deadline=None)
    @given(NAMES, PATHS)
    def test_comes_back_from_its_string_form(self, name, path):
        address = Address(name, path)

        assert Address.parse(str(address)) == address

    @settings(deadline=None)
    @given(NAMES, NAMES, st.sampled_from(["input", "output"]), st.integers(0, 10**9), PATHS)
    def test_of_an_operation_comes_back_from_its_string_form(self, name, operation, side, occurrence, path):
        for often in ("", f"[{occurrence}]"):
            address = Address(f"{name}.source.{operation}{often}.{side}", path)

            assert Address.parse(str(address)) == address

    @settings(deadline=None)
    @given(PATHS)
    def test_has_a_path_that_comes_back_from_messages(self, path):
        assert path_from_proto(path_to_proto(path)) == path

    @pytest.mark.parametrize(
        ("address", "text"),
        [
            (Address("logits"), "logits"),
            (Address("layers.5.mixer.output"), "layers.5.mixer.output"),
            (Address("transformer.h.5.attn.output", (1,)), "transformer.h.5.attn.output[1]"),
            (Address("h.5.input", ("kwargs", "mask")), 'h.5.input["kwargs"]["mask"]'),
            (Address("a.output", ('with "quotes"\\', "line\nbreak")), r'a.output["with \"quotes\"\\"]["line\nbreak"]'),
        ],
    )
    def test_has_one_string_form(self, address, text):
        assert str(address) == text

    @pytest.mark.parametrize(
        ("address", "typed"),
        [
            (Address("layers.5.mixer.output"), "model.layers[5].mixer.output"),
            (Address("transformer.h.5.attn.output", (1,)), "model.transformer.h[5].attn.output[1]"),
            (Address("h.5.input", ("kwargs", "mask")), 'model.h[5].inputs[1]["mask"]'),
            (Address("logits"), "model.logits"),
            (Address("layers.0.attn.source.split_1.output", (2,)), "model.layers[0].attn.source.split_1.output[2]"),
            (Address("h.source.f_0.source.x_1[3].output"), "model.h.source.f_0.source.x_1[3].output"),
            (Address("source.x_0.input", ("args", 1)), "model.source.x_0.inputs[0][1]"),
        ],
    )
    def test_is_spelled_as_it_is_typed(self, address, typed):
        assert address.spelled == typed

    @pytest.mark.parametrize("text", ["", "5", ".a", "a b", "a[", "a[-1]", "a[x]", "a[1]b", "a['x']", "a[1.5]", "a()"])
    def test_is_not_read_from_what_is_none(self, text):
        with pytest.raises(SiteError, match="is not the address of a site"):
            Address.parse(text)


class TestSymbolicShape:
    @pytest.mark.parametrize(
        ("dim", "text", "length"),
        [
            (Dim(Axis.CONSTANT, 768), "768", 768),
            (Dim(Axis.BATCH), "batch", 2),
            (Dim(Axis.SEQ), "seq", 7),
            (Dim(Axis.SEQ, 3), "seq+3", 10),
            (Dim(Axis.SEQ, -1), "seq-1", 6),
            (Dim(Axis.BATCH_SEQ), "batch*seq", 14),
            (Dim(Axis.UNKNOWN), "?", None),
        ],
    )
    def test_of_a_dimension_is_text_and_a_length(self, dim, text, length):
        assert str(dim) == text
        assert dim.length(batch=2, seq=7) == length

    def leaf(self, *dims: Dim) -> Leaf:
        return Leaf("m", "output", (), dims, torch.bfloat16, (3,))

    def test_of_a_leaf_is_readable(self):
        assert self.leaf(Dim(Axis.BATCH), Dim(Axis.SEQ), Dim(Axis.CONSTANT, 768)).symbolic == "[batch, seq, 768]"

    def test_gives_fakes_without_memory(self):
        fake = self.leaf(Dim(Axis.BATCH), Dim(Axis.SEQ), Dim(Axis.CONSTANT, 10**12)).fake(2, 3)

        assert (fake.shape, fake.dtype, fake.is_meta) == ((2, 3, 10**12), torch.bfloat16, True)

    def test_with_an_unknown_length_gives_no_fake(self):
        assert self.leaf(Dim(Axis.BATCH), Dim(Axis.UNKNOWN)).fake(2, 3) is None

    @pytest.mark.parametrize(
        ("dims", "packs"),
        [
            ([Dim(Axis.BATCH), Dim(Axis.SEQ), Dim(Axis.CONSTANT, 8)], True),
            ([Dim(Axis.BATCH_SEQ)], True),
            ([Dim(Axis.CONSTANT, 8)], True),
            ([Dim(Axis.BATCH), Dim(Axis.SEQ, 3)], False),
            ([Dim(Axis.UNKNOWN)], False),
        ],
    )
    def test_says_whether_rows_of_different_lengths_can_be_told_apart(self, dims, packs):
        assert self.leaf(*dims).packs == packs

    @settings(deadline=None)
    @given(
        st.lists(st.builds(Dim, st.sampled_from(Axis), st.integers(-(2**40), 2**40)), max_size=4),
        PATHS,
        st.sampled_from(["input", "output"]),
    )
    def test_comes_back_from_its_message(self, dims, path, side):
        leaf = Leaf("m", side, path, tuple(dims), torch.float8_e5m2, (9,))

        assert Leaf.from_proto("m", leaf.to_proto()) == leaf


class TestLookUp:
    @pytest.mark.parametrize(
        ("name", "raw"),
        [
            ("layers.1", "body.blocks.1"),
            ("layers.1.mixer", "body.blocks.1.attn"),
            ("body.blocks.1.attn", "body.blocks.1.attn"),
            ("lm_head", "head"),
            ("layers.0.attn", "body.blocks.0.attn"),
            ("", ""),
        ],
    )
    def test_finds_a_module_by_its_canonical_name_and_by_its_raw_path(self, catalogue, name, raw):
        assert catalogue.module(name).path == raw

    def test_follows_raw_names_below_a_canonical_name(self, catalogue):
        renamed = {name: each for name, each in catalogue.names.items() if name != "layers.1.mlp"}

        assert Catalogue("tiny", catalogue.modules, renamed).module("layers.1.mlp").path == "body.blocks.1.mlp"

    @pytest.mark.parametrize(
        "name", ["layers.2", "layer.1", "layers.1.mixer.x", "logits", "x", ".", "layers.", "body..embed"]
    )
    def test_refuses_a_module_that_is_not_there(self, catalogue, name):
        with pytest.raises(SiteError, match="is not a module of tiny"):
            catalogue.module(name)

    def test_finds_the_same_tensor_under_all_its_names(self, catalogue):
        names = ["layers.1.mixer.output", "layers.1.attn.output"]
        leaves = {catalogue.leaf(Address(name)) for name in names}
        leaves.add(catalogue.leaf(Address("body.blocks.1.attn.output", (0,))))

        assert len(leaves) == 1

    def test_finds_a_named_value(self, catalogue):
        assert catalogue.leaf(Address("logits")).symbolic == "[batch, seq, 50]"
        assert catalogue.leaf(Address("output", ("logits",))) == catalogue.leaf(Address("logits"))

    @pytest.mark.parametrize(
        ("address", "says", "hint"),
        [
            (Address("layers.7.output"), "layers[7]", "indices 0 to 1"),
            (Address("layers.1.mixr.output"), "layers[1].mixr", "model.layers[1].mixer"),
            (Address("body.blocks.1.atn.output"), "body.blocks[1].atn", "model.body.blocks[1].attn"),
            (Address("logit"), "model.logit", "model.logits"),
            (Address("layers.1.mixer"), "layers[1].mixer", "write `model.layers[1].mixer.output`"),
            (Address("layers.0.ssm.output"), "layers[0].ssm", "write `model.layers[0].mixer`"),
            (Address("body.blocks.1.attn.output"), "is not a tensor", "attn.output[0]` [batch, seq, 8]"),
            (Address("body.blocks.1.attn.output", (2,)), "attn.output[2]", "attn.output[1]` [batch, seq, 8]"),
            (Address("body.spare.output"), "never exists", ""),
            (Address("completely_wrong"), "completely_wrong", "`model."),
        ],
        ids=str,
    )
    def test_refuses_a_site_that_is_not_there_with_the_nearest_that_are(self, catalogue, address, says, hint):
        with pytest.raises(SiteError) as caught:
            catalogue.leaf(address)

        assert says in caught.value.message
        assert hint in caught.value.hint

    @pytest.mark.parametrize(
        "name", ["a." * 5000 + "output", "a" * 1_000_000, "." * 5000, "layers.0." * 3000 + "output"]
    )
    def test_refuses_a_monstrous_name_like_any_other(self, catalogue, name):
        with pytest.raises(SiteError):
            catalogue.leaf(Address(name))

    def test_finds_a_parameter(self, catalogue):
        assert catalogue.parameter("lm_head.weight").shape == (50, 8)
        assert catalogue.parameter("head.weight") == catalogue.parameter("lm_head.weight")

    @pytest.mark.parametrize(
        ("path", "hint"), [("lm_head.wight", "lm_head.weight"), ("layers.0.mlp.weight", "no parameters of its own")]
    )
    def test_refuses_a_parameter_that_is_not_there(self, catalogue, path, hint):
        with pytest.raises(SiteError) as caught:
            catalogue.parameter(path)

        assert hint in caught.value.hint


class TestSource:
    """A function with a loop: `a` runs once, `b` for each token, `c` as often as its input says, `d` never."""

    TIMES: ClassVar = {
        "a_0": Dim(Axis.CONSTANT, 1),
        "b_0": Dim(Axis.SEQ),
        "c_0": Dim(Axis.UNKNOWN),
        "d_0": Dim(Axis.CONSTANT),
    }

    @pytest.fixture
    def source(self):
        def leaf(name, runs):
            last = (3, 0, 9) if name == "b_0" else ()
            return Leaf("body.norm", "output", (), (), torch.float32, (3, 0, 1), False, last, (name,), runs)

        each = [Operation(name, 2, runs, (leaf(name, runs),), "f", "no text") for name, runs in self.TIMES.items()]
        return Source("body.norm", (), "LayerNorm.forward", "def forward():\n ...", {one.name: one for one in each})

    @pytest.fixture
    def learnt(self, catalogue, source):
        return replace(catalogue, learn=lambda inside: source)

    def test_comes_back_from_its_message(self, source):
        assert Source.from_proto(source.to_proto()) == source

    def test_has_its_sites_under_all_names_of_the_module(self, learnt):
        leaf = learnt.leaf(Address("norm.source.a_0.output"))

        assert leaf.operations == ("a_0",)
        assert learnt.leaf(Address("body.norm.source.a_0[0].output")) == leaf

    def test_has_a_site_for_each_time_that_an_operation_runs(self, learnt):
        leaves = [learnt.leaf(Address(f"norm.source.b_0[{time}].output")) for time in range(3)]

        assert [each.location.occurrence for each in leaves] == [0, 1, 2]

    @pytest.mark.parametrize(
        ("name", "says", "hint"),
        [
            ("norm.source.a_1.output", "no operation `a_1`", "model.body.norm.source.a_0"),
            ("norm.source.a_0[1].output", "runs once", "last [0]"),
            ("norm.source.b_0.output", "runs [seq] times", "b_0[0].output"),
            ("norm.source.c_0.output", "as often as its input says", "c_0[0].output"),
            ("norm.source.d_0.output", "does not come by", "print"),
            ("norm.source.a_0.input", "is not a tensor", "print(model.norm.source.a_0)"),
            ("norm.source.a_0.source.x_0.output", "no text", "print(model.body.norm.source)"),
            ("norm.source.output", "is not a site", "Name an operation"),
            ("norm.source", "is not a site", ""),
            ("norm.source.a_0", "is not a site", ""),
            ("norm.source.a_0[x].output", "is not a module", ""),
            ("norm.source[0].a_0.output", "is not a module", ""),
            ("norm.sauce.a_0.output", "is not a module", ""),
            ("body.spare.source.a_0.output", "does not call", "not called"),
            ("norm" + ".source.a_0" * 12 + ".output", "11 functions", "At most 8"),
        ],
    )
    def test_refuses_a_site_that_is_not_there(self, learnt, name, says, hint):
        with pytest.raises(SiteError) as caught:
            learnt.leaf(Address(name))

        assert says in caught.value.message
        assert hint in caught.value.hint

    def test_is_asked_for_before_an_address_is_understood(self, catalogue):
        assert catalogue.needed_sources(Address("norm.output")) == []
        assert catalogue.needed_sources(Address("norm.source.f_0.source.g_0.source.x_0[2].output")) == [
            ("body.norm", ()),
            ("body.norm", ("f_0",)),
            ("body.norm", ("f_0", "g_0")),
        ]

    def test_lets_rows_share_a_pass_only_where_a_time_is_the_same_for_all(self):
        def leaf(runs):
            return Leaf("m", "output", (), (Dim(Axis.BATCH),), torch.float32, (1, 0, 1), runs=runs)

        assert leaf(Dim(Axis.CONSTANT, 2)).packs
        assert leaf(Dim(Axis.CONSTANT, 2)).aligns
        assert leaf(Dim(Axis.SEQ)).packs
        assert not leaf(Dim(Axis.SEQ)).aligns
        assert not leaf(Dim(Axis.SEQ, -1)).packs
        assert not leaf(Dim(Axis.BATCH)).packs
        assert not leaf(Dim(Axis.UNKNOWN)).packs


class TestCatalogue:
    def test_comes_back_from_its_messages(self, catalogue):
        modules, names = catalogue.to_proto()

        assert Catalogue.from_proto("tiny", modules, names) == catalogue

    def test_counts_layers(self, catalogue):
        assert catalogue.num_layers == 2

    def test_knows_the_children_of_every_module(self, catalogue):
        assert catalogue.children["body"] == ["embed", "blocks", "norm", "spare"]
        assert catalogue.children["body.blocks"] == ["0", "1"]

    def test_knows_what_may_follow_a_canonical_name(self, catalogue):
        assert catalogue.prefixes[""] == ["embed", "layers", "norm", "lm_head", "logits"]
        assert catalogue.prefixes["layers"] == ["0", "1"]
        assert catalogue.prefixes["layers.1"] == ["mixer", "attn", "mlp"]

    def test_names_every_site_that_it_has(self, catalogue):
        for module in catalogue.modules.values():
            for leaf in module.leaves:
                address = Address(f"{module.path}.{leaf.side}" if module.path else leaf.side, leaf.path)
                assert catalogue.leaf(address) == leaf
