"""How evenly modules are used: figures of a routing decision from the sums that the losses need anyway.

Shapes: M routers (attention before MLP, layer by layer), E experts.
"""

import math
from typing import Any

from megamf.model.losses import Packed

KINDS = ("attention", "mlp")


def module_load(sums: Packed) -> list[dict[str, Any]]:
    """One record a router: `layer`, `kind`, `entropy` of the load over its maximum (1 is even), `max_over_mean`,
    `dead_fraction` (modules without a token), and the `load` of every module as a share of all choices."""
    records = []
    counts, sizes = sums.count_ME.tolist(), sums.num_experts_M.tolist()
    for router, (row, size) in enumerate(zip(counts, sizes)):
        total = sum(row) or 1.0
        load = [count / total for count in row[:size]]
        entropy = -sum(share * math.log(share) for share in load if share > 0)
        records.append(
            {
                "layer": router // 2,
                "kind": KINDS[router % 2],
                "entropy": entropy / math.log(size) if size > 1 else 1.0,
                "max_over_mean": max(load) * size,
                "dead_fraction": sum(share == 0 for share in load) / size,
                "load": load,
            }
        )
    return records


def load_summary(records: list[dict[str, Any]]) -> dict[str, float]:
    """Per kind: mean entropy, worst max/mean, mean dead fraction over the layers."""
    summary = {}
    for kind in KINDS:
        rows = [record for record in records if record["kind"] == kind]
        if rows:
            summary[f"{kind}_entropy"] = sum(row["entropy"] for row in rows) / len(rows)
            summary[f"{kind}_max_over_mean"] = max(row["max_over_mean"] for row in rows)
            summary[f"{kind}_dead_fraction"] = sum(row["dead_fraction"] for row in rows) / len(rows)
    return summary
