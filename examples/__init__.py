"""Programs that use fxhess, each to be run as it stands: ``python -m examples.poisson_pinn``."""
