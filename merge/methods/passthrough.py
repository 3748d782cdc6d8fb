"""One model as it is, for assembling layers or rescaling (Goddard et al. 2024, arXiv:2403.13257).

    out = scale * W

Recipe::

    merge_method: passthrough
    models:
      - model: a
"""

from merge.methods.core.schema import Coefficients, PerModel, each, method


@method(space="weight", inputs=(1, 1))
def passthrough(*, scale: PerModel[float] = each(1.0)) -> Coefficients:
    """The model's tensors, times ``scale``; with scale 1 they are copied byte for byte.

    >>> passthrough.function(scale=(1.0,))
    [1.0]
    """
    return list(scale)
