"""Names by which a configuration may choose what torch and Pyro ship.

They are listed here because looking them up means importing torch, which takes seconds, and a misspelt name should be
answered at once. A test compares the lists with the installed libraries. What a newer torch adds can be named as a
reference until it is listed here: `torch.optim:Name`.
"""

from typing import Literal

LoggerName = Literal["mlflow", "trackio", "wandb"]
"""Loggers of `distopt.train.trackers`, each the name of its extra and of its package too."""

OptimizerName = Literal[
    "AdagradRMSProp",
    "ClippedAdam",
    "DCTAdam",
    # Those of torch.optim; LBFGS is missing because it needs a closure, which Pyro's SVI does not pass.
    "ASGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
    "SparseAdam",
]
"""Optimizers of `distopt.optim`."""

SchedulerName = Literal[
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "SequentialLR",
    "StepLR",
]
"""Learning-rate schedules of `distopt.optim`."""

ElboName = Literal[
    "Trace_ELBO",
    "TraceGraph_ELBO",
    "TraceMeanField_ELBO",
    "TraceEnum_ELBO",
    "TraceTMC_ELBO",
    "JitTrace_ELBO",
    "JitTraceGraph_ELBO",
    "JitTraceMeanField_ELBO",
    "JitTraceEnum_ELBO",
    "TraceTailAdaptive_ELBO",
    "RenyiELBO",
]
"""Objectives of `pyro.infer`."""
