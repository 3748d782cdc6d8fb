"""The plain mean of models: the uniform soup (Wortsman et al. 2022, arXiv:2203.05482).

    out = (1 / N) sum_i W_i

Meant for fine-tunes of one pre-trained model on one task, with different seeds or settings. The
greedy soup of the same paper adds models one by one as they raise a held-out score; `linear` with
the chosen models is its last step.

Recipe::

    merge_method: uniform_soup
    models:
      - model: a
      - model: b
      - model: c
"""

from merge.methods.core.schema import Coefficients, method


@method(space="weight")
def uniform_soup(*, count: int) -> Coefficients:
    """The mean of the models, each with the same weight.

    >>> uniform_soup.function(count=4)
    [0.25, 0.25, 0.25, 0.25]
    """
    return [1.0 / count] * count
