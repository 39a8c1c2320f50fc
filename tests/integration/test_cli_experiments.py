"""`patchwire trace` and `patchwire compare`, against a server: what they show and write is what the methods give."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import patchwire
from patchwire import cli, methods
from serving import Server

COMMAND = Path(sys.executable).parent / "patchwire"
PROMPT, SUBJECT, OTHER = "Ada Barlow lives in the city of", "Ada Barlow", "Hugo Keller lives in the city of"
PAIR = ("facts-gpt2", "facts-mamba")


@pytest.fixture(scope="module")
def zoo() -> Iterator[Server]:
    with Server({name: f"zoo:{name}" for name in PAIR}) as server:
        yield server


@pytest.fixture(scope="module")
def models(zoo: Server) -> Iterator[dict[str, patchwire.Model]]:
    with patchwire.connect(zoo.address, progress=False) as client:
        yield {name: client.model(name) for name in PAIR}


def call(command: str, zoo: Server, *arguments: str | Path) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.out, "width", 100)
        asked = [command, "--server", zoo.address, *(str(each) for each in arguments)]
        return CliRunner().invoke(cli.app, asked, prog_name="patchwire")


def refusal(command: str, zoo: Server, *arguments: str | Path) -> str:
    error = call(command, zoo, *arguments).exception
    assert isinstance(error, patchwire.PatchwireError), error
    return f"{error.message}\n{error.hint}"


def test_trace_writes_a_figure_and_the_numbers_of_the_method(
    zoo: Server, models: dict[str, patchwire.Model], tmp_path: Path
) -> None:
    arguments = ["trace", "facts-gpt2", "--prompt", PROMPT, "--subject", SUBJECT, "--answer", " Lisbon"]
    told = subprocess.run(
        [COMMAND, *arguments, "--server", zoo.address, "--samples", "4", "--seed", "3", "--noise", "2"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip

    assert told.returncode == 0, told.stderr
    assert "▁Barlow*" in told.stdout
    assert "Saved trace.png, trace.safetensors" in told.stdout
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
    found = methods.load(tmp_path / "trace.safetensors")
    noise = methods.Noise(scale=2.0, samples=4, seed=3)
    expected = methods.causal_trace(models["facts-gpt2"], PROMPT, SUBJECT, noise, answer=" Lisbon")
    torch.testing.assert_close(found.values, expected.values)
    assert found.origin == expected.origin
    assert found.axes == expected.axes


def test_trace_restores_any_place_with_another_subject_for_noise(
    zoo: Server, models: dict[str, patchwire.Model], tmp_path: Path
) -> None:
    to = tmp_path / "scan.safetensors"
    asked = ["--prompt", PROMPT, "--subject", SUBJECT, "--replace", OTHER, "--at", "scan", "--window", "2"]
    told = call("trace", zoo, "facts-mamba", *asked, "--severed", "gate", "--normalised", "--out", to)

    assert told.exit_code == 0, told.exception
    replaced = methods.Replacement(OTHER)
    expected = methods.causal_trace(
        models["facts-mamba"], PROMPT, SUBJECT, replaced, at="scan", window=2, severed="gate"
    )
    torch.testing.assert_close(methods.load(to).values, expected.values)
    shown = [float(each) for each in re.findall(r"-?\d\.\d\d", told.output.splitlines()[-4])]
    assert shown == pytest.approx(expected.normalised().values[-1].tolist(), abs=0.006)
    assert "Saved" in told.output
    assert not list(tmp_path.glob("*.png"))


def test_trace_takes_token_ids(zoo: Server, models: dict[str, patchwire.Model], tmp_path: Path) -> None:
    ids = models["facts-gpt2"].tokenize(PROMPT)[0]
    answer = models["facts-gpt2"].tokenizer.encode("Lisbon")[0]
    to = tmp_path / "ids.safetensors"
    asked = ["--prompt", " ".join(map(str, ids)), "--subject", "0 1", "--answer", str(answer), "--samples", "2"]
    told = call("trace", zoo, "facts-gpt2", *asked, "--ids", "--out", to)

    assert told.exit_code == 0, told.exception
    expected = methods.causal_trace(models["facts-gpt2"], PROMPT, SUBJECT, methods.Noise(samples=2), answer=answer)
    torch.testing.assert_close(methods.load(to).values, expected.values)


def test_compare_runs_one_trace_on_several_models(
    zoo: Server, models: dict[str, patchwire.Model], tmp_path: Path
) -> None:
    to = tmp_path / "both.png"
    told = call("compare", zoo, *PAIR, "facts-gpt2", "--prompt", PROMPT, "--subject", SUBJECT, "--out", to)

    assert told.exit_code == 0, told.exception
    assert to.read_bytes().startswith(b"\x89PNG")
    for name in PAIR:
        expected = methods.causal_trace(models[name], PROMPT, SUBJECT)
        torch.testing.assert_close(methods.load(tmp_path / f"both-{name}.safetensors").values, expected.values)
    assert (tmp_path / "both-facts-gpt2-3.safetensors").exists()


def test_what_makes_no_experiment_is_refused(zoo: Server, tmp_path: Path) -> None:
    asked = ["--prompt", PROMPT, "--subject", SUBJECT, "--out", tmp_path / "never.png"]

    assert "two models or more" in refusal("compare", zoo, "facts-gpt2", *asked)
    assert "not both" in refusal("trace", zoo, "facts-gpt2", *asked, "--noise", "3", "--replace", OTHER)
    assert "There is no place “head”" in refusal("trace", zoo, "facts-gpt2", *asked, "--at", "head")
    assert "is not in the tokens" in refusal("trace", zoo, "facts-gpt2", *asked[:3], "Nobody")
    assert not list(tmp_path.iterdir())


def test_figures_show_tokens_down_and_layers_across_with_the_subject_marked(models: dict[str, patchwire.Model]) -> None:
    found = {name: methods.causal_trace(each, PROMPT, SUBJECT).effect() for name, each in models.items()}
    panels = [axes for axes in methods.side_by_side(found, title="both").axes if axes.images]

    assert [axes.get_title(loc="left") for axes in panels] == list(PAIR)
    assert panels[0].images[0].get_clim() == panels[1].images[0].get_clim()
    for axes, each in zip(panels, found.values(), strict=True):
        assert axes.images[0].get_array().shape == (7, 4)
        torch.testing.assert_close(torch.tensor(axes.images[0].get_array().data), each.values.T)
        assert axes.yaxis_inverted()
    assert [label.get_text() for label in panels[0].get_yticklabels()][:3] == ["Ada*", "▁Barlow*", "▁lives"]
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["0", "1", "2", "3"]
    with pytest.raises(patchwire.InputError, match="one unit"):
        methods.side_by_side({"a": found["facts-gpt2"], "b": found["facts-gpt2"].normalised()})
