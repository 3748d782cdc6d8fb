"""RegMean: the map nearest to each model's own on that model's own inputs (Jin et al. 2023,
arXiv:2212.09849).

    C_k = X_k^T X_k / n_k, its entries off the diagonal times alpha
    out minimises sum_k w_k trace((W - W_k) C_k (W - W_k)^T)
    out = M + (sum_k w_k (W_k - M) C_k) (sum_k w_k C_k + e I)^-1
    M = sum_k w_k W_k / sum_k w_k,   e = ridge * mean eigenvalue of sum_k w_k C_k

X_k holds the inputs of the layer in model k, one row for each token or patch. C_k is a file of Gram
matrices by the names of the weights (``statistics`` under each model of a recipe), which ``merge
statistics MODEL --data DATA -o OUT`` writes. Without the ridge this is the paper's W = (sum_k W_k
C_k)(sum_k C_k)^-1; inputs that no model has seen leave the mean. All that has no Gram matrix is
averaged: biases, norms, embeddings.

RegMean++ (arXiv:2508.03121) takes the inputs of each layer from the layers below as they were
already merged: Gram matrices gathered so (``merge.regmean_plus_plus``) make it of this method.

Recipe::

    merge_method: regmean
    models:
      - model: a
        statistics: a-gram
      - model: b
        statistics: b-gram
"""

from __future__ import annotations

from typing import Annotated

from merge.methods.core.grams import check_gram, scratch, solved, square, stacked, unstacked
from merge.methods.core.schema import (
    Coefficients,
    Operands,
    PerModel,
    Range,
    Tensor,
    each,
    method,
)

__all__ = ["regmean"]


@method(space="weight", local="tensor", statistic=check_gram, scratch=scratch)
def regmean(
    models: Operands,
    statistics: Operands,
    *,
    weight: Annotated[PerModel[float], Range(0.0, open_low=True)] = each(1.0),
    alpha: Annotated[float, Range(0.0, 1.0)] = 0.9,
    ridge: Annotated[float, Range(1e-12, 1.0)] = 1e-6,
    normalize: bool = False,
) -> Tensor:
    """The models' mean, by least squares on the inputs of each linear layer.

    weight: one number a model, above 0. alpha: of what is off the diagonal, in [0, 1]; 0 weighs
    each input by its energy alone. ridge: pull towards the mean, of the mean eigenvalue. normalize:
    divide each model's Gram matrix by its trace, so that larger activations do not count for more.
    """
    shape = tuple(statistics[0].shape)
    origin = stacked(models[0], shape)  # sums of differences to it: fine-tunes lie close together
    mean = origin.clone()
    for w, model in zip(weight, models, strict=True):
        mean.add_(stacked(model, shape) - origin, alpha=w / sum(weight))

    def gram(k: int) -> Tensor:
        own = square(statistics[k])
        trace = own.diagonal(dim1=-2, dim2=-1).sum()
        return own / trace if normalize and trace > 0.0 else own

    def difference(k: int) -> Tensor:
        return stacked(models[k], shape) - mean

    out = solved(difference, gram, weight, alpha=alpha, ridge=ridge)
    return unstacked(out.add_(mean), models[0], shape)


@regmean.otherwise
def _mean(*, weight: PerModel[float]) -> Coefficients:
    return [w / sum(weight) for w in weight]
