"""The native seam: what is computed by our own kernels, each beside the definition it must meet.

One file per op, in the same order: schema, public function, `<op>_ref` (plain torch: the
definition, and the kernel wherever there is no native one), limits, fake kernel (shapes only, for
`torch.compile`), derivative. The schemas are declared here for both back ends; the libraries in
`csrc/` only implement them, so there is one truth and one way to register. `native` decides which
back end answers.

Noise is counter-based (Philox): common random numbers for every coalition, the paper's step 5,
whatever the batch.
"""

from attr_batch.ops.conv import PRUNED_CONV2D, pruned_conv2d, pruned_conv2d_ref
from attr_batch.ops.native import backend, build_info, load
from attr_batch.ops.noise import COUNTER_NORMAL, counter_normal, counter_normal_ref
from attr_batch.ops.norm import NORM_ACT, NORM_ACT_BACKWARD, norm_act, norm_act_ref
from attr_batch.ops.solver import SOLVER_STEP, solver_step, solver_step_ref
from attr_batch.ops.winograd import CONV3X3, conv3x3, conv3x3_ref

OPS = (COUNTER_NORMAL, SOLVER_STEP, NORM_ACT, NORM_ACT_BACKWARD, *CONV3X3, *PRUNED_CONV2D)

__all__ = [
    "OPS",
    "backend",
    "build_info",
    "conv3x3",
    "conv3x3_ref",
    "counter_normal",
    "counter_normal_ref",
    "load",
    "norm_act",
    "norm_act_ref",
    "pruned_conv2d",
    "pruned_conv2d_ref",
    "solver_step",
    "solver_step_ref",
]
