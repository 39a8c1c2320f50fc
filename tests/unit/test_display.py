"""How a model looks, in a terminal and in a notebook."""

from __future__ import annotations

from html.parser import HTMLParser

from patchwire import display
from patchwire.sites import Catalogue, Module


class Balanced(HTMLParser):
    """Reads HTML and counts what is open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


class TestText:
    def test_shows_every_kind_of_module_with_its_class(self, catalogue):
        text = display.text(catalogue)

        for module in catalogue.modules.values():
            assert module.class_name in text

    def test_shows_alike_layers_once_with_their_count(self, catalogue):
        text = display.text(catalogue)

        assert "2 alike" in text
        assert text.count("Attention") == 1

    def test_shows_shapes_parameters_and_canonical_names(self, catalogue):
        head = next(line for line in display.text(catalogue).splitlines() if "head: Linear" in line)

        assert "[batch, seq, 50]" in head
        assert "weight[50, 8]" in head
        assert "lm_head" in head

    def test_shows_what_a_tuple_holds(self, catalogue):
        attention = next(line for line in display.text(catalogue).splitlines() if "Attention" in line)

        assert "(0: [batch, seq, 8], 1: [batch, seq, 8])" in attention

    def test_says_what_a_forward_pass_does_not_call(self, catalogue):
        assert "(not called)" in next(line for line in display.text(catalogue).splitlines() if "spare" in line)

    def test_of_one_module_shows_what_is_below_it(self, catalogue):
        text = display.text(catalogue, "layers.1")

        assert "Attention" in text
        assert "Embedding" not in text

    def test_of_a_list_of_canonical_names_shows_the_layers(self, catalogue):
        text = display.text(catalogue, "layers")

        assert "0…1" in text
        assert "Block" in text

    def test_has_no_trailing_spaces_and_indents_children(self, catalogue):
        lines = display.text(catalogue).splitlines()

        assert lines == [line.rstrip() for line in lines]
        assert lines[1].startswith("  body")


class TestHtml:
    def test_is_balanced_and_shows_the_same_modules(self, catalogue):
        page = Balanced()
        page.feed(display.html(catalogue))

        assert page.open == []
        for module in catalogue.modules.values():
            assert module.class_name in page.text

    def test_escapes_names(self):
        evil = Catalogue("<script>alert(1)</script>", {"": Module("", "<b>Evil</b> & co", calls=1)})

        assert "<script>" not in display.html(evil)
        assert "&lt;b&gt;Evil&lt;/b&gt; &amp; co" in display.html(evil)
