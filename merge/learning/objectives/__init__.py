"""Objectives: from what the merged model answers on a batch of one task to a loss.

Each says what it needs: nothing, labels, or what the task's expert answered (`recall` keeps that
of an expert's answer, once for each batch).
"""

from merge.learning.objectives.distances import Distill, Features
from merge.learning.objectives.given import Criterion, Own
from merge.learning.objectives.labelled import (
    Contrastive,
    CrossEntropy,
    LanguageModel,
    Negation,
    labels_of,
)
from merge.learning.objectives.unlabelled import Entropy, PseudoLabels
from merge.learning.objectives.view import Objective, View

__all__ = [
    "Contrastive",
    "Criterion",
    "CrossEntropy",
    "Distill",
    "Entropy",
    "Features",
    "LanguageModel",
    "Negation",
    "Objective",
    "Own",
    "PseudoLabels",
    "View",
    "labels_of",
]
