"""Mixed precision under a byte budget: choose a width per layer so that the summed harm is least (an integer programme)."""

from collections.abc import Mapping

import numpy as np

from personalq.errors import SpecError


def allocate(
    bytes_of: Mapping[str, Mapping[str, int]], harm_of: Mapping[str, Mapping[str, float]], budget_bytes: int
) -> dict[str, str]:
    """layer -> width ('float', 'int8', 'int4', ...) with least total harm within `budget_bytes`.

    bytes_of, harm_of: layer -> width -> bytes on disk / harm. The multiple-choice knapsack of HAWQ-V3 (arXiv 2011.10680)
    and MixDQ (arXiv 2405.17873), solved by scipy's HiGHS. Raises SpecError when even the smallest widths are too large.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    choices = [(layer, width) for layer, widths in bytes_of.items() for width in widths]
    least = sum(min(widths.values()) for widths in bytes_of.values())
    if least > budget_bytes:
        raise SpecError(
            f"budget: must be at least {least} bytes for these layers at their smallest widths, got {budget_bytes}"
        )
    size = np.array([bytes_of[layer][width] for layer, width in choices], float)
    cost = np.array([harm_of[layer][width] for layer, width in choices])
    layers = list(bytes_of)
    one_each = np.zeros((len(layers), len(choices)))
    for column, (layer, _) in enumerate(choices):
        one_each[layers.index(layer), column] = 1
    answer = milp(
        cost / max(cost.max(), 1e-30),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size[None], 0, budget_bytes)],
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4, "time_limit": 20},
    )
    if answer.x is None:
        raise SpecError(f"budget: no widths fit {budget_bytes} bytes ({answer.message}); raise the budget")
    return {layer: width for (layer, width), taken in zip(choices, answer.x, strict=True) if taken > 0.5}
