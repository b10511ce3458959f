"""The distillation algorithms. They see denoisers and tensors, never adapters, files or a model's name."""

from collections.abc import Callable
from importlib import import_module

from simpletuner_dmd.distill.method import Ingredients, Method


def builder(method: str | None) -> Callable[[Ingredients], Method]:
    """`build` of the file that has the method's name; None is supervised training."""
    build: Callable[[Ingredients], Method] = import_module(f"{__name__}.{method or 'supervised'}").build
    return build
