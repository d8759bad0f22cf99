"""Statistics, selection, core sets and measures: tensors only, no model."""

from coreinfer.core.coreset import CoreSet
from coreinfer.core.measures import ReadCost, jaccard, overlap, stability_curve
from coreinfer.core.selection import neuron_budget, top_neurons
from coreinfer.core.statistics import LayerStatistics, PromptStatistics, token_core_mask

__all__ = [
    "CoreSet",
    "LayerStatistics",
    "PromptStatistics",
    "ReadCost",
    "jaccard",
    "neuron_budget",
    "overlap",
    "stability_curve",
    "token_core_mask",
    "top_neurons",
]
