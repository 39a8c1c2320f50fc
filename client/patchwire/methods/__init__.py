"""Experiments of mechanistic interpretability, as short functions over the public tracing API.

Each works on every architecture that has the sites it names, and returns a small result with labelled axes, numbers as
tensors, a `table()` for the terminal and a `plot()`.
"""

from __future__ import annotations

from patchwire.methods.attribution import Agreement, agreement, attribution_patching, integrated_gradients
from patchwire.methods.averaging import by_role, stacked
from patchwire.methods.causal import Noise, Replacement, causal_trace, embedding_std
from patchwire.methods.editing import (
    PROJECTIONS,
    Mention,
    Projection,
    RankOneEdit,
    SecondMoment,
    rank_one_edit,
    sampled_prefixes,
    second_moment,
    with_update,
)
from patchwire.methods.enrichment import attributes_rate, sublayer_knockout
from patchwire.methods.extraction import extraction_events
from patchwire.methods.grids import Blocks
from patchwire.methods.information_flow import information_flow
from patchwire.methods.lens import LogitLens, logit_lens
from patchwire.methods.measured import ROLES, Measured
from patchwire.methods.mediation import mediation, relative_importance
from patchwire.methods.memories import SHARES, key_value_memories
from patchwire.methods.metrics import KL, LogitDifference, LogProbability, Metric, Probability, Rank
from patchwire.methods.neurons import NEURONS, Neurons, scale_coefficients, set_coefficients
from patchwire.methods.parameters import (
    PARAMETERS,
    Interaction,
    TopPairs,
    Vectors,
    keep_k,
    project_to_vocabulary,
    recall_at_k,
)
from patchwire.methods.patching import activation_patching
from patchwire.methods.patchscope import IDENTITY, Patchscope, patchscope, patchscope_text
from patchwire.methods.places import PLACES
from patchwire.methods.prompts import Prompt, prompt_of, span, token_of
from patchwire.methods.relations import LinearRelation, linear_relation
from patchwire.methods.result import Axis, Origin, Result, layers_axis, load, side_by_side, tokens_axis
from patchwire.methods.scores import consistency, edit_scores, generated_texts, harmonic_mean, ngram_entropy, overall
from patchwire.methods.stopwords import STOPWORDS
from patchwire.methods.triggering import Triggers, triggers
from patchwire.methods.tuned import TunedLens, tuned_lens
from patchwire.methods.values import SubUpdates, ValueProjections, sub_updates, value_projections
from patchwire.methods.vocabulary import TopTokens

__all__ = [
    "IDENTITY",
    "KL",
    "NEURONS",
    "PARAMETERS",
    "PLACES",
    "PROJECTIONS",
    "ROLES",
    "SHARES",
    "STOPWORDS",
    "Agreement",
    "Axis",
    "Blocks",
    "Interaction",
    "LinearRelation",
    "LogProbability",
    "LogitDifference",
    "LogitLens",
    "Measured",
    "Mention",
    "Metric",
    "Neurons",
    "Noise",
    "Origin",
    "Patchscope",
    "Probability",
    "Projection",
    "Prompt",
    "Rank",
    "RankOneEdit",
    "Replacement",
    "Result",
    "SecondMoment",
    "SubUpdates",
    "TopPairs",
    "TopTokens",
    "Triggers",
    "TunedLens",
    "ValueProjections",
    "Vectors",
    "activation_patching",
    "agreement",
    "attributes_rate",
    "attribution_patching",
    "by_role",
    "causal_trace",
    "consistency",
    "edit_scores",
    "embedding_std",
    "extraction_events",
    "generated_texts",
    "harmonic_mean",
    "information_flow",
    "integrated_gradients",
    "keep_k",
    "key_value_memories",
    "layers_axis",
    "linear_relation",
    "load",
    "logit_lens",
    "mediation",
    "ngram_entropy",
    "overall",
    "patchscope",
    "patchscope_text",
    "project_to_vocabulary",
    "prompt_of",
    "rank_one_edit",
    "recall_at_k",
    "relative_importance",
    "sampled_prefixes",
    "scale_coefficients",
    "second_moment",
    "set_coefficients",
    "side_by_side",
    "span",
    "stacked",
    "sub_updates",
    "sublayer_knockout",
    "token_of",
    "tokens_axis",
    "triggers",
    "tuned_lens",
    "value_projections",
    "with_update",
]
