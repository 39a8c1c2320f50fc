"""nnsight's habits: a script written for nnsight runs against a Patchwire server.

Change how the model is made, and nothing else:

from patchwire.nnsight import LanguageModel

model = LanguageModel("gpt2", server="gpu-box:50051")    # on a server
model = LanguageModel("openai-community/gpt2")           # or on this machine

with model.generate("The Eiffel Tower is in", max_new_tokens=3) as tracer:
    logits = list().save()
    for step in tracer.iter[:]:
        logits.append(model.lm_head.output[0, -1])
    tokens = tracer.result.save()
logits[2].argmax(), model.tokenizer.decode(tokens[0])

As in nnsight, `.save()` is on every value, and on Python's lists, dicts, tuples, sets and numbers (importing this
puts it there); `nnsight.save(x)` becomes `save(x)` of this module: `import patchwire.nnsight as nnsight`. What was
saved is a `torch.Tensor` after the block. A tuple or model output that a module returns is a Python tuple, or a dict
that also has attributes: `model.output.logits`.

What differs, on purpose:

- **The block is ordinary Python, runs once, and records**; the model runs when it ends. So values have shapes and
  dtypes in the block, and no numbers: `if value > 0:`, `float(value)` and `print` of numbers are refused there or
  show no numbers. A `with` block cannot be repeated: write `for step in tracer.iter[:]:` instead of `with
  tracer.iter[:]:`. Names bound in the block stay bound, saved or not; what was not saved stayed on the server, and
  says so when it is used.
- **Order of modules, not of lines.** A read or write happens at its module, in whatever order the lines are written,
  and what nnsight refuses as out of order works. A read written below a write of the same place sees it. Values flow
  between invokes by themselves: `tracer.barrier(n)` is accepted and does nothing. What cannot be is refused at its
  line: a write that needs a value from later in the forward pass.
- **A cache is of the whole pass**, wherever in the block `tracer.cache()` is written, and shows every write of the
  block.
- **An invoke without a prompt** has the rows of the invokes above it, so it comes after those with one.
- **Shapes are those of the model**: a write of another shape is refused (`scan` too), even where broadcasting would
  let it through.
- **Gradients** come from one backward pass each. After a gradient was edited in `with loss.backward():`, the
  gradients of other values, which it would flow on to, are not served: write `patchwire.grad(h, other,
  weights=edited)`.
- **Several prompts of different lengths** end together and are padded with NaN, not with what a padding token
  computes.
- **Generation** takes these arguments of Hugging Face's: `max_new_tokens` (20 if it is left out), `min_new_tokens`,
  `do_sample`, `temperature`, `top_k`, `top_p`, `repetition_penalty`; others are refused by name. A seed belongs to
  the request (`seed=`), not to `torch.manual_seed`.
- **Arguments of a module that are no tensors** are None in `inputs`, or left out.
- **A module that the model does not have** can be set (`layer.sae = module`) and applied in a block: it runs as
  operations of the graph, and its weights are sent. It cannot be part of an `edit`.
- `remote`, `backend`, `device_map` and `dispatch` are accepted and mean nothing: where the model runs was said when
  it was made.
"""

from patchwire.nnsight.model import Envoy, LanguageModel
from patchwire.nnsight.saving import save

__all__ = ["Envoy", "LanguageModel", "save"]
