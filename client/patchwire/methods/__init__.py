"""Experiments of mechanistic interpretability, as short functions over the public tracing API.

Each works on every architecture that has the sites it names, and returns a small result with labelled axes, numbers as
tensors, a `table()` for the terminal and a `plot()`.
"""

from __future__ import annotations

from patchwire.methods.averages import average, by_role
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
from patchwire.methods.information_flow import information_flow
from patchwire.methods.lens import LogitLens, logit_lens
from patchwire.methods.measured import Measured
from patchwire.methods.mediation import mediation, relative_importance
from patchwire.methods.metrics import KL, LogitDifference, LogProbability, Metric, Probability, Rank
from patchwire.methods.patching import ResidualPatching, residual_patching
from patchwire.methods.places import PLACES
from patchwire.methods.relations import LinearRelation, linear_relation
from patchwire.methods.result import Axis, Origin, Result, load
from patchwire.methods.scores import (
    consistency,
    edit_scores,
    generated_texts,
    harmonic_mean,
    ngram_entropy,
    overall,
)
from patchwire.methods.stopwords import STOPWORDS

__all__ = [
    "KL",
    "PLACES",
    "PROJECTIONS",
    "STOPWORDS",
    "Axis",
    "LinearRelation",
    "LogProbability",
    "LogitDifference",
    "LogitLens",
    "Measured",
    "Mention",
    "Metric",
    "Noise",
    "Origin",
    "Probability",
    "Projection",
    "Rank",
    "RankOneEdit",
    "Replacement",
    "ResidualPatching",
    "Result",
    "SecondMoment",
    "attributes_rate",
    "average",
    "by_role",
    "causal_trace",
    "consistency",
    "edit_scores",
    "embedding_std",
    "extraction_events",
    "generated_texts",
    "harmonic_mean",
    "information_flow",
    "linear_relation",
    "load",
    "logit_lens",
    "mediation",
    "ngram_entropy",
    "overall",
    "rank_one_edit",
    "relative_importance",
    "residual_patching",
    "sampled_prefixes",
    "second_moment",
    "sublayer_knockout",
    "with_update",
]
