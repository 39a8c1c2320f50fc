"""The command line as it is used: the real command against a real server.

Each command runs in a process of its own in some test: so does what depends on the process, which is how it ends, the
width of its terminal and what is installed. The other tests are about what a command says, and call it in this process.
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import patchwire
from integration.refusals import refused
from patchwire import cli
from patchwire.cli.terminal import ids_of
from patchwire.methods import load
from patchwire_worker.config import Limits

COMMAND = Path(sys.executable).parent / "patchwire"
SECONDS = 120
TOKEN = "secret"


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=os.environ | {"COLUMNS": "100", "PATCHWIRE_TOKEN": TOKEN} | environment,
    )


def call(*arguments: str | Path) -> Result:
    """The command in this process; the error that it ends with, if it does, is in the result."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.out, "width", 100)
        given = [str(each) for each in arguments]
        return CliRunner().invoke(cli.app, given, prog_name="patchwire", env={"PATCHWIRE_TOKEN": TOKEN})


def refusal(*arguments: str | Path) -> str:
    """What a command says that refuses, as `main` shows it."""
    error = call(*arguments).exception
    assert isinstance(error, patchwire.PatchwireError), error
    return f"{error.message}\n{error.hint}"


def run_without(missing: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command on a machine where some modules are not installed."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({missing.split()!r})); "
        f"sys.argv = {['patchwire', *arguments]!r}; from patchwire.cli import main; main()"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS)


def test_is_a_module_too():
    command = [sys.executable, "-m", "patchwire", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)

    assert told.returncode == 0
    assert "Causal experiments" in told.stdout


def assert_one_message(result: subprocess.CompletedProcess[str], words: str) -> None:
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr + result.stdout


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of three layers with a tokenizer of twelve words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    words = ["the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "in", "mat", "tree"]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="the"))
    backend.pre_tokenizer = Whitespace()
    config = GPT2Config(n_layer=3, n_embd=32, n_head=2, n_positions=32, vocab_size=len(words), initializer_range=0.5)
    GPT2LMHeadModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return folder


@dataclass
class Serving:
    process: subprocess.Popen[str]
    address: str
    said: list[str]

    def end(self, signal_number: int) -> int:
        self.process.send_signal(signal_number)
        return self.process.wait(timeout=30)


def start(*arguments: str | Path, **environment: str) -> Serving:
    process = subprocess.Popen(
        [COMMAND, "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "100", "PATCHWIRE_TOKEN": ""} | environment,
    )
    try:
        return wait_for(process)
    except BaseException:
        process.kill()
        raise


def wait_for(process: subprocess.Popen[str]) -> Serving:
    """The server, once it says where it is; all that it said until then."""
    assert process.stdout is not None
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    until = time.monotonic() + SECONDS
    said: list[str] = []
    while time.monotonic() < until and selector.select(timeout=1.0) is not None and process.poll() is None:
        said.append(process.stdout.readline())
        match = re.match(r"Serving on (\S+)", said[-1])
        if match is not None:
            while "Ctrl-C" not in said[-1]:
                said.append(process.stdout.readline())
            return Serving(process, match[1], said)
    process.kill()
    raise AssertionError(f"the server did not start: {said} {process.communicate()}")


@pytest.fixture(scope="module")
def serving(checkpoint: Path) -> Iterator[Serving]:
    """A server with one model, known by two names, that asks for a token."""
    server = start(checkpoint, f"other={checkpoint}", PATCHWIRE_TOKEN=TOKEN)
    yield server
    server.process.kill()
    server.process.communicate()


def test_a_pass_holds_no_more_than_it_is_told(checkpoint: Path) -> None:
    """The same trace of many prompts, in one pass or in several."""
    passes = []
    for option in ((), ("--max-memory", "0.001")):
        server = start(f"tiny={checkpoint}", *option)
        try:
            with patchwire.connect(server.address, progress=False) as client:
                model = client.model("tiny")
                with model.trace() as trace:
                    for length in range(1, 31):
                        with trace.invoke([token % 11 for token in range(length)]):
                            model.logits.sum().save()
                passes.append(trace.stats.passes)
        finally:
            server.end(signal.SIGINT)
    assert passes[0] == 1 < passes[1]


def test_help_says_what_the_limits_are_by_themselves() -> None:
    result = CliRunner().invoke(cli.app, ["serve", "--help"], prog_name="patchwire")
    shown = " ".join(result.output.replace("│", " ").split())
    for option, limit in (("tokens", Limits.tokens), ("seconds", Limits.seconds), ("queued", Limits.queued)):
        assert re.search(rf"--max-{option} [^-]*?\[default: \({limit:g}\)\]", shown), option


def test_help_names_every_command_and_shows_examples() -> None:
    result = run("--help")

    assert result.returncode == 0
    for command in ("serve", "models", "jobs", "trace", "lens", "compare", "sites", "verify", "zoo", "demo", "doctor"):
        assert re.search(rf"│ {command}\b", result.stdout)
    assert "Examples" in result.stdout


@pytest.mark.parametrize(
    "command", ["serve", "models", "jobs", "trace", "lens", "compare", "sites", "verify", "zoo", "demo", "doctor"]
)
def test_every_command_has_help(command: str) -> None:
    result = CliRunner().invoke(cli.app, [command, "--help"], prog_name="patchwire")

    assert result.exit_code == 0
    assert f"Usage: patchwire {command}" in result.output


def test_version_is_the_version_of_the_package() -> None:
    assert run("--version").stdout == f"patchwire {patchwire.__version__}\n"


def test_an_unknown_command_is_refused() -> None:
    result = run("srve")

    assert result.returncode == 2
    assert "srve" in result.stderr


# --- serve ------------------------------------------------------------------------------------------------------------


def test_serve_says_how_to_connect(serving: Serving) -> None:
    said = "".join(serving.said)

    assert re.fullmatch(r"127\.0\.0\.1:\d+", serving.address)
    assert "tiny: GPT2LMHeadModel" in said
    assert f'patchwire.connect("{serving.address}", token="…")' in said
    assert 'client.model("other")' in said


def test_a_program_can_use_the_server(serving: Serving) -> None:
    with patchwire.connect(serving.address, token=TOKEN) as client:
        model = client.model("tiny")
        with model.trace("the cat sat"):
            hidden = model.layers[1].output.save()

    assert hidden.shape == (1, 3, 32)


def test_serve_with_a_token_lets_in_only_who_has_it(serving: Serving) -> None:
    assert_one_message(run("models", serving.address, PATCHWIRE_TOKEN=""), "token")
    assert "tiny" in call("models", serving.address).stdout
    assert [each.name for each in patchwire.connect(serving.address, token=TOKEN).models()] == ["tiny", "other"]
    assert TOKEN not in "".join(serving.said)


@dataclass
class Life:
    """What a server said, and how it ended, which was told to by a signal."""

    code: int
    out: str
    errors: str

    @classmethod
    def of(cls, server: Serving, how: int) -> Life:
        code = server.end(how)
        return cls(code, *server.process.communicate())


@dataclass
class TwoLives:
    """A server that anybody reaches, and one that only this machine does, with the same jobs."""

    first: Life
    second: Life
    job: str
    kept: torch.Tensor
    """What the job saved, as the first server told it."""
    found: torch.Tensor
    """And as the second did."""
    listed: Result
    forgotten: Result


@pytest.fixture(scope="module")
def lives(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TwoLives:
    jobs = tmp_path_factory.mktemp("lives") / "jobs"
    server = start(checkpoint, "--jobs", jobs, "--host", "0.0.0.0")
    with patchwire.connect(f"127.0.0.1:{server.address.rpartition(':')[2]}", progress=False) as client:
        model = client.model()
        with model.trace([1, 2, 3], blocking=False) as trace:
            kept = model.logits.save()
        trace.job.fetch()
    first = Life.of(server, signal.SIGINT)

    server = start(checkpoint, "--jobs", jobs)
    listed = call("jobs", server.address)
    with patchwire.connect(server.address, progress=False) as client:
        found = client.job(trace.job.id).fetch()[0]
    forgotten = call("jobs", server.address, "--forget", trace.job.id)
    return TwoLives(first, Life.of(server, signal.SIGTERM), trace.job.id, kept.value, found, listed, forgotten)


@pytest.mark.parametrize("which", ["first", "second"], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_serve_cleanly(lives: TwoLives, which: str) -> None:
    life = getattr(lives, which)

    assert life.code == 0
    assert "Stopped." in life.out
    assert "Traceback" not in life.errors


def test_serve_warns_when_anyone_may_come_in(lives: TwoLives) -> None:
    assert "Give a token with --token" in lives.first.errors
    assert "not encrypted" in lives.first.errors
    assert "Warning" not in lives.second.errors, "who listens on this machine only need not be warned"


def test_serve_keeps_jobs_past_its_end(lives: TwoLives) -> None:
    assert torch.equal(lives.found, lives.kept)
    assert lives.listed.exit_code == lives.forgotten.exit_code == 0
    assert lives.job in lives.listed.output
    assert "done" in lives.listed.output
    assert lives.forgotten.output == "The server keeps no jobs.\n"


def test_serve_refuses_two_models_of_one_name(checkpoint: Path) -> None:
    assert "Two models are called `tiny`" in refusal("serve", "--port", "0", checkpoint, checkpoint)


def test_serve_refuses_a_port_that_is_taken(serving: Serving, checkpoint: Path) -> None:
    port = serving.address.rpartition(":")[2]

    result = run("serve", checkpoint, "--port", port)

    assert_one_message(result, f"cannot listen on 127.0.0.1:{port}")
    assert "Loading" not in result.stderr


def test_serve_refuses_a_model_that_is_not_there() -> None:
    assert "There is no directory /nowhere/model" in refusal("serve", "--port", "0", "/nowhere/model")


def test_serve_refuses_a_certificate_without_its_key(checkpoint: Path) -> None:
    assert "--tls-key" in refusal("serve", checkpoint, "--tls-cert", checkpoint / "config.json")


def test_serve_refuses_a_file_for_its_jobs(checkpoint: Path) -> None:
    assert "--jobs" in refusal("serve", checkpoint, "--port", "0", "--jobs", checkpoint / "config.json")


def test_jobs_stops_what_is_told(serving: Serving) -> None:
    with patchwire.connect(serving.address, token=TOKEN, progress=False) as client:
        model = client.model("tiny")
        with model.trace([1, 2, 3], blocking=False) as trace:
            value = model.layers[0].output.new_ones(2048, 2048)
            for _ in range(3_000):
                value = value @ value
            value.sum().save()

        result = run("jobs", serving.address, "--cancel", trace.job.id)

        assert result.returncode == 0
        assert "cancelled" in result.stdout
        assert trace.job.status == "cancelled"
        trace.job.forget()
        assert "no job" in refusal("jobs", serving.address, "--cancel", trace.job.id)


def test_serve_without_the_worker_says_what_to_install() -> None:
    assert_one_message(run_without("nnsight transformers", "serve", "gpt2"), 'pip install "patchwire[worker]"')


# --- models -----------------------------------------------------------------------------------------------------------


def test_models_lists_what_the_server_holds(serving: Serving) -> None:
    result = call("models", serving.address)

    assert result.exit_code == 0
    for name in ("tiny", "other"):
        assert re.search(rf"^{name} +GPT2LMHeadModel +[\d.]+ k +3 +float32 +cpu", result.stdout, re.MULTILINE)


def test_models_says_that_nobody_answers() -> None:
    assert "No server answers at 127.0.0.1:1" in refusal("models", "127.0.0.1:1")


# --- lens -------------------------------------------------------------------------------------------------------------


def expected_answer(checkpoint: Path, prompt: str) -> tuple[str, float]:
    """What plain transformers says comes next."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = GPT2LMHeadModel.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        best = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].softmax(-1).max(-1)
    return tokenizer.decode(int(best.indices)), float(best.values)


def test_lens_ends_with_what_the_model_says(serving: Serving, checkpoint: Path, tmp_path: Path) -> None:
    result = call(
        "lens", "tiny", "--prompt", "the cat sat on", "--server", serving.address, "--out", tmp_path / "a.svg"
    )

    word, probability = expected_answer(checkpoint, "the cat sat on")
    assert result.exit_code == 0
    assert re.search(rf"^{word} +{probability:.4f}$", result.stdout, re.MULTILINE)
    assert re.search(rf"^ +2 .*{word} {probability:.0%} *$", result.stdout, re.MULTILINE)
    assert re.search(r"^ *embed ", result.stdout, re.MULTILINE)


def test_lens_with_an_embedded_worker_saves_a_figure(checkpoint: Path, tmp_path: Path) -> None:
    result = call("lens", checkpoint, "--prompt", "the cat sat on", "--top", "2", "--out", tmp_path / "lens.png")

    word, probability = expected_answer(checkpoint, "the cat sat on")
    assert result.exit_code == 0, result.stderr
    assert re.search(rf"^{word} +{probability:.4f}$", result.stdout, re.MULTILINE)
    assert (tmp_path / "lens.png").read_bytes().startswith(b"\x89PNG")
    numbers = load(tmp_path / "lens.safetensors")
    assert [each.name for each in numbers.axes] == ["layer", "token"]
    assert float(numbers.values[-1, -1]) == pytest.approx(probability, abs=1e-5)
    assert "%|" not in result.stderr


def test_lens_takes_token_ids(serving: Serving, checkpoint: Path, tmp_path: Path) -> None:
    to = tmp_path / "lens.safetensors"
    result = call("lens", "tiny", "--prompt", "0 2 5", "--ids", "--server", serving.address, "--out", to)

    word, probability = expected_answer(checkpoint, "the cat sat")
    assert re.search(rf"^{word} +{probability:.4f}$", result.stdout, re.MULTILINE)


def test_lens_fits_the_width_of_the_terminal(serving: Serving, tmp_path: Path) -> None:
    asked = ["lens", "tiny", "--prompt", "the cat sat on a mat in the tree", "--server", serving.address]
    result = run(*asked, "--out", tmp_path / "lens.png", COLUMNS="40")

    assert max(len(line) for line in result.stdout.splitlines() if "Saved" not in line) <= 40
    assert "of 9 columns" in result.stdout


def test_lens_names_the_models_near_an_unknown_one(serving: Serving) -> None:
    assert "`tiny`" in refusal("lens", "tinny", "--prompt", "the cat", "--server", serving.address)


def test_lens_refuses_ids_that_are_words(serving: Serving) -> None:
    assert "numbers" in refusal("lens", "tiny", "--prompt", "the cat", "--ids", "--server", serving.address)


def test_ids_that_are_words_are_refused_before_anything_is_connected() -> None:
    with refused(patchwire.InputError, "With --ids", hint="12 7 3", line=False):
        ids_of("the cat")
    assert ids_of("1, 2 3") == [1, 2, 3]


def test_lens_without_matplotlib_says_what_to_install() -> None:
    result = run_without("matplotlib", "lens", "gpt2", "--prompt", "the cat")

    assert_one_message(result, 'pip install "patchwire[demo]"')


# --- zoo --------------------------------------------------------------------------------------------------------------


def test_zoo_lists_its_models() -> None:
    result = call("zoo")

    assert result.exit_code == 0
    assert re.search(r"^zoo:facts-mamba +Mamba, 4 layers", result.stdout, re.MULTILINE)
    assert re.search(r"^zoo:superposition@dense", result.stdout, re.MULTILINE)


def test_zoo_shows_a_card_and_refuses_a_name_it_does_not_have() -> None:
    assert run("zoo", "induction-2l").stdout.startswith("# zoo:induction-2l\n")
    refused_name = run("zoo", "induction")
    assert refused_name.returncode == 1
    assert "zoo:induction-2l" in refused_name.stderr


def test_zoo_without_the_worker_says_what_to_install() -> None:
    result = run_without("patchwire_worker", "zoo")

    assert result.returncode == 1
    assert "pip install" in result.stderr


def test_serve_takes_a_model_of_the_zoo() -> None:
    serving = start("zoo:modular-addition@500")
    with patchwire.connect(serving.address, progress=False) as client:
        assert [each.name for each in client.models()] == ["modular-addition-500"]
    assert serving.end(signal.SIGTERM) == 0


# --- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_tells_versions_and_parts() -> None:
    result = call("doctor")

    assert result.exit_code == 0
    assert re.search(rf"torch +{re.escape(torch.__version__)}", result.stdout)
    for part in ("patchwire", "python", "grpcio", "protobuf", "tokenizers", "cpu", "cuda", "protocol", "mamba kernels"):
        assert re.search(rf". +{part} ", result.stdout), part


def test_doctor_looks_at_a_server(serving: Serving) -> None:
    result = call("doctor", serving.address)

    assert result.exit_code == 0
    assert "answers in" in result.stdout
    assert re.search(r"✓ +health +serving", result.stdout)
    assert re.search(r"✓ +operations", result.stdout)
    assert re.search(r"✓ +models +tiny, other", result.stdout)


def test_doctor_fails_when_the_server_does_not_answer() -> None:
    result = call("doctor", "127.0.0.1:1")

    assert result.exit_code == 1
    assert "No server answers" in result.stdout
    assert isinstance(result.exception, SystemExit)


def test_doctor_works_without_the_worker() -> None:
    result = run_without("nnsight transformers accelerate grpc_health matplotlib", "doctor")

    assert result.returncode == 0, result.stderr
    assert "can connect to servers" in result.stdout
