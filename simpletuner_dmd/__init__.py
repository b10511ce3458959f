"""SimpleTuner-DMD: distils Wan text-to-video models into few-step students."""

__version__ = "0.1.0"
