"""Zeroth-order SGD whose every step is made of (seed, scalar) pairs: `ZOSGD` and `FedKSeedSGD`.

A step measures the loss on both sides of the weights along the noise z(s) of a seed s, and moves the weights
along it (MeZO, Malladi et al., NeurIPS 2023, arXiv 2305.17333):

    g = (L(w + eps z(s)) - L(w - eps z(s))) / (2 eps),      w <- w - lr g z(s)

`FedKSeedSGD` draws s from a finite pool (FedKSeed, Qin et al., ICML 2024, arXiv 2312.06353), `ZOSGD` takes a
new one each time.

Both take eps rounded to fp32 once, and g = fp32((fp64 L+ - fp64 L-) / (2 eps)). The coefficients handed to
the kernels are fp64 products and sums, without fma, of fp32 eps, fp32 g, fp32 alpha = 1 - lr weight_decay and
the Python float lr (contract, section 6.1). lr may change between steps (torch.optim.lr_scheduler).

A direction whose loss on either side, or whose g, is NaN or infinite, or whose losses differ by more than
max_loss_gap, is skipped: it counts as g = 0 and in ``num_skipped``. If the closure raises (Ctrl-C included),
the perturbation is taken back first, and the next step takes the same seeds.

Every evaluation meets the same world: torch's, NumPy's and Python's random number generators and those that
the model's modules own, buffers and the autocast cache are put back before each (`ZerothOrderOptimizer`;
docs/optimizer.md says what is not).

How both sides are visited is the storage mode's (`fedkseed.storage`). By default weights of 32 bits are
perturbed in place, with the memory of inference. Weights of 16 bits would round at every such pass and drift
from w0 + sum_k c_k z(s_k): they are streamed, where the model can be.
"""

from __future__ import annotations

from fedkseed.optim.evaluation import Loss
from fedkseed.optim.fedkseed_sgd import FedKSeedSGD
from fedkseed.optim.groups import decay_groups
from fedkseed.optim.paired import doubled, paired_losses
from fedkseed.optim.parameters import Params
from fedkseed.optim.zosgd import ZOSGD

__all__ = ["ZOSGD", "FedKSeedSGD", "Loss", "Params", "decay_groups", "doubled", "paired_losses"]
