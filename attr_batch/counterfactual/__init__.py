"""The model a coalition alone would give: how to get it (`derive`), and from where (`Base`).

Two families. Those of `learning` train on the coalition's images: the paper's sparsified
fine-tuning (Eq. 6), fine-tuning the dense model, LoRA, and retraining, the definition itself and
the most expensive. Those of `unlearning` take the others' images out of the trained model: gradient
ascent and influence unlearning. A further method is one more class with `kind`, `start`,
`unlearns`, `check` and `derive`, and one more name in the union `Counterfactual`. `Finetuning`
also derives a cohort's models at once.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from attr_batch.counterfactual.learning import (
    Finetune,
    Finetuning,
    Lora,
    Retrain,
    SparsifiedFinetune,
)
from attr_batch.counterfactual.prepared import (
    Base,
    Start,
    Subject,
    load_base,
    prepare_dense,
    prepare_pruned,
)
from attr_batch.counterfactual.unlearning import GradientAscent, InfluenceUnlearning

__all__ = [
    "Base",
    "Counterfactual",
    "Finetune",
    "Finetuning",
    "GradientAscent",
    "InfluenceUnlearning",
    "Lora",
    "Retrain",
    "SparsifiedFinetune",
    "Start",
    "Subject",
    "load_base",
    "prepare_dense",
    "prepare_pruned",
]

Counterfactual = Annotated[
    SparsifiedFinetune | Finetune | Retrain | Lora | GradientAscent | InfluenceUnlearning,
    Field(discriminator="kind"),
]
