"""Settings of a loss that another one, or the absence of another setting, leaves without effect.

unused({"loss": "info_nce", "beta": 2.0, ...})["beta"]      # is for {loss} hard_negative_info_nce
"""

from collections.abc import Mapping
from typing import Any


def unused(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that a run or a source with these values would not use -> what they need, as a template.

    `values`: of all settings, by their names.
    """
    loss = "kl_distill" if values["loss"] == "kl" else values["loss"]
    uses = {
        "beta": (loss == "hard_negative_info_nce", "is for {loss} hard_negative_info_nce"),
        "xtr_k": (loss == "xtr", "is for {loss} xtr"),
        "teacher_temperature": (loss == "kl_distill", "is for {loss} kl_distill"),
        "margin": (values["margin_weight"] > 0, "needs a {margin_weight} above 0"),
        "positive_aware_margin": (values["positive_aware"] != "off", "needs {positive_aware} perc or abs"),
        "hardness_of": (values["hardness"] > 0, "needs a {hardness} above 0"),
        "denominator": (len(values["directions"]) > 1, "needs several {directions}"),
        "distill_metric": (
            loss == "distill_vectors" or values["distill_weight"] > 0,
            "is for {loss} distill_vectors, and for {distill_weight}",
        ),
    }
    return {name: need for name, (is_used, need) in uses.items() if not is_used}
