"""The scripts of docs/examples/: each runs against a server and draws its figure, and its index page knows it."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import patchwire
from patchwire import methods
from serving import Server

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "experiments.md").read_text()
WITHOUT_FIGURE = {"first_experiment"}
SCRIPTS = sorted(file.stem for file in (DOCS / "examples").glob("*.py") if file.stem not in WITHOUT_FIGURE)
FACTS = ("facts-gpt2", "facts-mamba")
PAIR = ["--model", "facts-gpt2", "--model", "facts-mamba"]
OPTIONS = {
    "activation_patching": ["--model", "facts-mamba"],
    "average_effects": ["--model", "facts-mamba", "--count", "2"],
    "causal_tracing": ["--model", "facts-gpt2"],
    "causal_tracing_mamba": ["--model", "facts-mamba"],
    "lenses": ["--model", "facts-mamba"],
    "linear_relations": ["--model", "facts-mamba", "--layer", "1", "--prompt", "{} speaks to friends in",
                         "--subjects", "Ada Barlow,Hugo Crane,Ivy Foster,Leon Hobbs,Nora Keller,Paul Marsh"],
    "mediation": ["--model", "facts-mamba", "--count", "3"],
    "neurons": ["--model", "facts-mamba", "--layer", "3"],
    "rank_one_editing": [*PAIR, "--layer", "1"],
    "recalling_facts": PAIR,
    "two_architectures": PAIR,
}  # fmt: skip
"""How each is told which models it runs on, and what makes it quick."""


@pytest.fixture(scope="module")
def zoo() -> Iterator[Server]:
    with Server({name: f"zoo:{name}" for name in (*FACTS, "modular-addition")}) as server:
        yield server


@pytest.fixture(scope="module")
def models(zoo: Server) -> Iterator[dict[str, patchwire.Model]]:
    with patchwire.connect(zoo.address, progress=False) as client:
        yield {name: client.model(name) for name in FACTS}


@pytest.fixture
def run(zoo: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a script as from a terminal, and gives what it prints."""

    def run(name: str, *options: str) -> str:
        file = DOCS / "examples" / f"{name}.py"
        monkeypatch.setattr("sys.argv", [str(file), "--server", zoo.address, *options])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(file), run_name="__main__")
        assert not ended.value.code
        return capsys.readouterr().out

    return run


def part(script: str, name: str = "experiment") -> Any:
    return runpy.run_path(str(DOCS / "examples" / f"{script}.py"))[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_against_a_server_and_draws_its_figure(
    run: Callable[..., str], name: str, tmp_path: Path
) -> None:
    figure = tmp_path / "figure.png"

    assert "The figure is in" in run(name, *OPTIONS[name], "--out", str(figure))
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_first_experiment_runs_against_a_server(run: Callable[..., str]) -> None:
    said = run("first_experiment", "--model", "facts-mamba", "--prompt", "Ada Barlow lives in the city of")

    assert "next: 'Lisbon' with probability 1.00" in said
    assert "the lens after layer 3: 'Lisbon'" in said


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_page_has_a_row_for_every_script_with_its_function_and_its_figure(name: str) -> None:
    rows = [line for line in PAGE.splitlines() if f"(examples/{name}.py)" in line and line.startswith("|")]
    figure = f"images/{name.replace('_', '-')}.png"

    assert len(rows) == 1
    *_, functions, _, shown, _ = rows[0].split("|")
    assert all(hasattr(methods, each) for each in re.findall(r"`(\w+)`", functions))
    assert figure in shown
    assert 0 < (DOCS / figure).stat().st_size < 100_000
    assert f"python docs/examples/{name}.py" in (DOCS / "examples" / f"{name}.py").read_text()


@pytest.mark.parametrize(
    "page", [*DOCS.glob("*.md"), *(DOCS.parent / each for each in ("README.md", "CONTRIBUTING.md"))],
    ids=lambda file: file.name,
)  # fmt: skip
def test_what_a_page_links_to_is_there(page: Path) -> None:
    links = re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', page.read_text())
    here = [one or other for one, other in links if not re.match(r"https?:|#", one or other)]

    assert [each for each in here if not (page.parent / each.partition("#")[0]).exists()] == []


def test_causal_tracing_finds_two_sites_and_what_severing_takes_away(models: dict[str, patchwire.Model]) -> None:
    found = part("causal_tracing")(models["facts-gpt2"], "Ada Barlow lives in the city of", "Ada Barlow", " Lisbon")
    whole, without_mlps, without_mixers = (each.effect().values for each in found.values())

    assert min(whole[0, 1], whole[1, 1]) > 0.6
    assert whole[3, 6] > 0.9
    assert without_mlps[0, 1] < whole[0, 1] / 2
    assert without_mlps[0, 1] < without_mixers[0, 1] < whole[0, 1]


def test_both_architectures_keep_a_fact_at_the_subject_and_differ_in_between(
    models: dict[str, patchwire.Model],
) -> None:
    trace = part("two_architectures")
    gpt, mamba = (trace(each, "Ada Barlow lives in the city of", "Ada Barlow", None).values for each in models.values())

    for values in (gpt, mamba):
        assert min(values[0, 1], values[1, 1], values[3, 6]) > 0.6
    assert gpt[2, 2:6].max() < 0.05
    assert mamba[2, 2:6].max() > 0.6


def test_a_mambas_scan_matters_late_and_its_gate_hardly_anywhere(models: dict[str, patchwire.Model]) -> None:
    prompts = ("Victor Crane lives in the city of", "Victor Crane", "Wanda Rowe lives in the city of")
    states, added, scan, gate = (
        each.values for each in part("causal_tracing_mamba")(models["facts-mamba"], *prompts, None, 1).values()
    )

    assert min(states[0, 1], states[1, 1], added[0, 1], added[1, 1]) > 0.7
    assert min(states[3, 6], added[3, 6], scan[3, 6]) > 0.9
    assert scan[:2].max() < 0.1
    assert gate.abs().max() < 0.1


@pytest.mark.parametrize(("name", "at", "parts"), [("facts-gpt2", "attn.z", 4), ("facts-mamba", "ssm.gate_act", 8)])
def test_patching_finds_the_same_both_ways_and_estimates_come_beside_it(
    models: dict[str, patchwire.Model], name: str, at: str, parts: int
) -> None:
    pair = ("Ada Barlow lives in the city of", "Hugo Crane lives in the city of", " Lisbon", " Quito")
    found = part("activation_patching")(models[name], *pair)
    estimated, agreements = part("activation_patching", "components")(models[name], *pair, at)

    for each in found.values():
        assert min(each.values[1, 1], each.values[3, 6]) > 0.6
        assert each.values[:2, 2:].abs().max() < 0.1
    assert [tuple(each.values.shape) for each in estimated.values()] == [(parts, 4)] * 3
    assert all(each.sign_of_large > 0.5 for each in agreements)


def test_a_few_channels_of_a_mamba_carry_a_fact_and_no_few_neurons_of_a_gpt(
    models: dict[str, patchwire.Model],
) -> None:
    lost = {}
    for name, model in models.items():
        answer = model.tokenizer.encode("Lisbon")[0]
        left = part("neurons")(model, "Ada Barlow lives in the city of", answer, 32)
        lost[name] = left.max() - left

    assert min(lost["facts-mamba"][0, 1], lost["facts-mamba"][2, 4], lost["facts-mamba"][3, 6]) > 3
    assert lost["facts-gpt2"].max() < 2


@pytest.mark.parametrize("name", ["facts-gpt2", "facts-mamba", "modular-addition"])
def test_what_is_done_at_the_last_token_is_done_for_the_result(zoo: Server, name: str) -> None:
    script = runpy.run_path(str(DOCS / "examples" / "mediation.py"))
    with patchwire.connect(zoo.address, progress=False) as client:
        questions = script["of_the_zoo"](name)
        other, same = (
            {
                component: each.values.log1p().mean(0)
                for component, each in script["experiment"](
                    client.model(name), script["pairs_of"](questions, same=result, count=6)
                ).items()
            }
            for result in (False, True)
        )

    assert same["embed"].max() > 4, "operands matter as ever"
    assert other["mixer"][-1, -1] > 4
    assert same["mixer"][-1, -1] < other["mixer"][-1, -1] / 10


def test_on_average_mlps_matter_early_at_the_subject_and_attention_late_at_the_end(
    models: dict[str, patchwire.Model],
) -> None:
    script = runpy.run_path(str(DOCS / "examples" / "average_effects.py"))
    facts = script["of_the_zoo"](6)
    mixer, mlp = (script["experiment"](models["facts-gpt2"], facts, place, 2).values for place in ("mixer", "mlp"))
    last_subject, last = methods.ROLES.index("last subject token"), methods.ROLES.index("last token")

    assert mlp[:2, last_subject].max() > mlp[:, last].max() + 0.1
    assert mixer[:, last].max() > mixer[:, last_subject].max() + 0.1
