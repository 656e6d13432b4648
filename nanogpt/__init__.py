"""GPT-2 pre-training as a functional program: parameters are a pytree, a step is a pure function."""

__version__ = "0.1.0"
