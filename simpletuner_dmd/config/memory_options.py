"""Options of what is kept where: recomputing, swapping, offloading, tiling, compiling."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from simpletuner_dmd.config.coerce import Options


def _backend(value: Any) -> Any:
    """SimpleTuner calls the offloaded kind by the library that it is from."""
    return "offloaded" if value == "unsloth" else value


class MemoryOptions(Options):
    """Fitting a run onto the device."""

    gradient_checkpointing: bool = Field(
        True, description="Recomputes each block in the backward pass: far less memory, about a third more time."
    )
    gradient_checkpointing_interval: int = Field(
        1, ge=1,
        description="Recomputes only every n-th block, counted from the first: the others keep their activations, "
        "which costs memory and saves time.",
    )  # fmt: skip
    gradient_checkpointing_backend: Annotated[Literal["torch", "offloaded"], BeforeValidator(_backend)] = Field(
        "torch",
        description="Where a recomputed block's input waits for the backward pass: `torch` on the device, `offloaded` "
        "in host memory.",
    )
    blocks_to_swap: int = Field(
        0, ge=0,
        description="Blocks of the frozen base whose weights live in host memory and visit the device one after the "
        "other, ahead of their turn. Two of them are on the device at a time, so 3 is the least that saves anything. "
        "What trains stays on the device.",
    )  # fmt: skip
    enable_group_offload: bool = Field(
        False,
        description="Keeps models that do not train in host memory, and each of their layers on the device for its "
        "turn only: the text encoder, the VAE and, where no adapter sits on it, the teacher.",
    )
    vae_enable_tiling: bool = Field(
        False,
        description="The VAE works on overlapping tiles of a frame: less memory, latents that differ a little.",
    )
    vae_enable_slicing: bool = Field(
        False, description="The VAE works on one video of a batch at a time: less memory, the same latents."
    )
    offload_during_startup: bool = Field(
        False,
        description="Text encoder and VAE are on the device only while they work: never together, and the VAE not "
        "between two validations.",
    )
    compile: bool = Field(
        False,
        description="Compiles the blocks of the transformer (`torch.compile`, one block at a time). Pays off in long "
        "runs: the first steps, and the first of every new size, take minutes.",
    )
