"""The tuned lens: a logit lens that has learnt how each layer says things.

Belrose, Furman, Smith, Halawi, Ostrovsky, McKinney, Biderman and Steinhardt (2023), "Eliciting Latent Predictions from
Transformers with the Tuned Lens", section 3: before the state of a layer is read, an affine translator `h + A h + b`
turns it into what it would be after the last layer, as far as it can be told. Translators begin at zero, where they are
the logit lens, and are trained to say what the model says in the end. The training is a loop on the server.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from patchwire import optim
from patchwire.errors import InputError, PatchwireError, here
from patchwire.methods.lens import LogitLens, lens_rows, lens_states, read_lens, unembed, waiting
from patchwire.methods.measured import LAYER
from patchwire.methods.result import Axis, Origin, Result
from patchwire.model import Model
from patchwire.results import Stats

_BYTES = 1 << 28
"""How large the translators of one loop are together, with what their optimiser remembers: as many as fit learn in the
same passes."""
_OPTIMISER = 3
"""How often a translator is there while it is trained: itself, and two moments."""
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class TunedLens:
    """Translators of every row of a lens but the last, which is the model's own output."""

    maps: Tensor = field(repr=False)
    """A, `[rows, width, width]` float32; a state `h` becomes `h + A h + b`."""
    biases: Tensor = field(repr=False)
    """b, `[rows, width]` float32."""
    origin: Origin
    losses: Result | None = None
    """`[step, layer]`: D(model ‖ lens) in nats while they were trained, the mean over a batch's tokens. Not saved."""

    def __call__(self, model: Model, prompt: Any, *, answer: str | int | None = None, top: int = 5) -> LogitLens:
        """Read a prompt: as `logit_lens`, with each state translated before it is read.

        Raises:
            InputError: the model is another one than the translators are of, or cannot take this prompt.
        """
        if model.fingerprint != self.origin.fingerprint:
            raise InputError(f"This lens is of {self.origin.model}, and not of {model.name}.", lines=here())

        def translate(index: int, state: Any) -> Any:
            return _translated(state, self.maps[index], self.biases[index])

        return read_lens(model, prompt, "tuned_lens", at="resid", answer=answer, top=top, translate=translate)

    def save(self, path: str | Path) -> Path:
        """Write it to a file: tensors in safetensors, what made them as JSON in its header.

        Raises:
            PatchwireError: the file cannot be written.
        """
        path, about = Path(path), {"format": str(_FORMAT), "origin": json.dumps(asdict(self.origin))}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"maps": self.maps.contiguous(), "biases": self.biases.contiguous()}, path, about)
        except (OSError, safetensors.SafetensorError) as error:
            raise PatchwireError(f"The lens cannot be written to {path}: {error}") from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> TunedLens:
        """Read a lens that `save` wrote.

        Raises:
            PatchwireError: it cannot be read, or is no lens.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about["format"] != str(_FORMAT):
                    raise PatchwireError(f"{path} is from another version of Patchwire (format {about['format']}).")
                return cls(file.get_tensor("maps"), file.get_tensor("biases"), Origin(**json.loads(about["origin"])))
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise PatchwireError(f"{path} is no tuned lens of Patchwire: {error}") from error


def tuned_lens(
    model: Model,
    texts: Sequence[Any],
    *,
    epochs: int = 1,
    batch_size: int = 8,
    lr: float = 1e-3,
    decay: bool = True,
    seed: int | None = 0,
) -> TunedLens:
    """Train a tuned lens on texts (Belrose et al. 2023, section 3).

    The server goes through the texts batch by batch, and Adam changes the translators so that D(model ‖ lens) becomes
    small, the mean over all tokens. Only the translators and the losses come back. Translators of all layers learn in
    the same passes, as far as 256 MiB hold them; a wide model takes several loops over the texts.

    Args:
        model: Any model with `layers`, `norm` and `lm_head`.
        texts: What it is trained on: texts, or lists of token ids.
        epochs: How often each text is seen.
        batch_size: How many texts a step has.
        lr: Adam's learning rate. Belrose et al. use SGD with Nesterov momentum, on 250 steps of 2^18 tokens.
        decay: Whether the learning rate falls linearly, from `lr` at the first step to 0 after the last; theirs does.
        seed: Of the order of the texts, which is another in each epoch; None for the order in which they are given.

    Raises:
        InputError: there are no texts, or the model cannot take one.
        SiteError: the model has no such parts.

    Example:
        >>> lens = methods.tuned_lens(model, texts, epochs=5)
        >>> lens(model, "The Eiffel Tower is in the city of").plot()
        >>> lens.save("lens.safetensors")
    """
    if not texts or isinstance(texts, str):
        raise InputError("A lens is trained on a list of texts.", lines=here())
    if epochs < 1 or batch_size < 1 or not lr > 0:
        raise InputError("There is at least one epoch and one text in a batch, and `lr` is above 0.", lines=here())
    given = model.tokenize(list(texts))
    rows = [given[index] for order in _orders(len(given), epochs, seed) for index in order]
    width, last = model.W_U.shape[0], model.num_layers
    together = max(1, _BYTES // (_OPTIMISER * 4 * width * (width + 1)))
    found: list[tuple[Any, Any, Any]] = []
    costs: list[Stats] = []
    for first in range(0, last, together):
        part = range(first, min(last, first + together))
        with model.session() as session:
            batches: Any = session.over(rows, batch_size=batch_size)
            with batches:
                maps = [batches.carry(torch.zeros(width, width)) for _ in part]
                biases = [batches.carry(torch.zeros(width)) for _ in part]
                left = 1 - batches.index / -(-len(rows) // batch_size) if decay else 1.0
                with model.trace(batches.prompt) as trace:
                    mask: Any = trace.mask()
                    # Beyond the end of a text there is no number, which no gradient may meet.
                    states = [torch.where(mask[..., None], state, 0.0) for state in lens_states(model)]
                    expected = torch.where(mask[..., None], model.logits.float(), 0.0).log_softmax(-1)
                    losses = []
                    for row, matrix, bias in zip(part, maps, biases, strict=True):
                        state = waiting(states[row], expected)
                        said = unembed(model, _translated(state, matrix, bias)).float().log_softmax(-1)
                        far = (expected.exp() * (expected - said)).sum(-1)
                        loss = torch.where(mask, far, 0.0).sum() / mask.sum()
                        # What is saved stays for a while, and would keep all that its gradient needs.
                        losses.append(loss.detach().save())
                        # Layer by layer: one of them has its logits at a time.
                        batches.step(optim.Adam(lr=lr * left), loss, [matrix, bias])
            found += [
                (batches.result(matrix).save(), batches.result(bias).save(), loss)
                for matrix, bias, loss in zip(maps, biases, losses, strict=True)
            ]
        assert session.stats is not None
        costs.append(session.stats)
    told = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "decay": decay, "seed": seed}
    origin = Origin.of("tuned_lens", model, texts=len(texts), **told)
    # A loop that was interrupted has fewer steps than others.
    history = pad_sequence([loss.value for *_, loss in found], padding_value=torch.nan)
    steps = Axis("step", tuple(map(str, range(len(history)))))
    return TunedLens(
        maps=torch.stack([matrix.value for matrix, *_ in found]),
        biases=torch.stack([bias.value for _, bias, _ in found]),
        origin=origin,
        losses=Result(
            history, (steps, Axis(LAYER, lens_rows(model)[:-1])), "KL from the model (nats)", origin,
            stats=Stats.sum(costs),
        ),
    )  # fmt: skip


def _orders(count: int, epochs: int, seed: int | None) -> list[list[int]]:
    """In which order the texts come in each epoch."""
    if seed is None:
        return [list(range(count))] * epochs
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(count, generator=generator).tolist() for _ in range(epochs)]


def _translated(state: Any, matrix: Any, bias: Any) -> Any:
    """`h + A h + b`."""
    return state + (state.float() @ matrix.T + bias).to(state.dtype)
