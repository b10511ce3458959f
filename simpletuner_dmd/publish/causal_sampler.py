"""sampler.py of a causal student: block by block with a key/value cache, on stock diffusers alone.

`WanPipeline` denoises whole clips, so a student that works block by block brings its own loop. The file is written out
in full: it imports nothing of this package, and it is what the export's own check runs.
"""

from __future__ import annotations

import json

from simpletuner_dmd.publish.info import ExportInfo, ladder_text
from simpletuner_dmd.publish.snippets import MOVED, load_lines, loading_imports
from simpletuner_dmd.validation.sampling import BlockSampling

_SAMPLER = '''\
"""The {steps}-step block-by-block sampler of {name} on stock diffusers; yields blocks as they are finished.

Run: python sampler.py "a prompt" video.mp4 [base]
"""
import sys
from pathlib import Path
import torch
from diffusers import WanPipeline{imports}
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.utils import export_to_video

SIGMAS = [{sigmas}]  # timesteps {ladder}; already shifted
FRESH_NOISE = {stochastic}  # at each further step of a block
BLOCK, FIRST_ALONE, CONTEXT = {block}, {first}, {context}  # latent frames, one-frame first block, sigma of the past
SINK, LOCAL = {sink}, {local}  # first frames that stay visible; frames seen in all (0: every frame)


class Causal(WanAttnProcessor):
    """Self-attention of one layer that also sees the finished blocks. State is safe here: nothing is recomputed."""

    def __init__(self):
        super().__init__()
        self.keys, self.values, self.seen, self.keep = None, None, None, False

    def __call__(self, attn, x, text=None, mask=None, rope=None):
        def turn(z):
            a, b = z.unflatten(-1, (-1, 2)).unbind(-1)
            cos, sin = rope[0][..., 0::2], rope[1][..., 1::2]
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(z)

        heads = (attn.heads, -1)
        q = turn(attn.norm_q(attn.to_q(x)).unflatten(2, heads))
        k = turn(attn.norm_k(attn.to_k(x)).unflatten(2, heads))
        v = attn.to_v(x).unflatten(2, heads)
        all_k = k if self.keys is None else torch.cat([self.keys[:, self.seen], k], 1)
        all_v = v if self.values is None else torch.cat([self.values[:, self.seen], v], 1)
        if self.keep:
            self.keys = k if self.keys is None else torch.cat([self.keys, k], 1)
            self.values = v if self.values is None else torch.cat([self.values, v], 1)
        out = dispatch_attention_fn(q, all_k, all_v, backend=self._attention_backend)
        return attn.to_out[0](out.flatten(2, 3).type_as(q))


@torch.no_grad()
def blocks_of(transformer, noise, text):
    """noise [B, C, F, H, W] fp32, text [B, L, D] -> clean latents (normalised), one block after the other.

    Further noise comes from torch's global generator.
    """
    frames, place = noise.shape[2], [0]
    starts = [0, *range(1, frames, BLOCK)] if FIRST_ALONE else list(range(0, frames, BLOCK))
    _, high, wide = transformer.config.patch_size
    per_frame = (noise.shape[3] // high) * (noise.shape[4] // wide)
    layers = [Causal() for _ in transformer.blocks]
    for layer, block in zip(layers, transformer.blocks):
        layer._attention_backend = block.attn1.processor._attention_backend
        block.attn1.set_processor(layer)

    def shift(rope, args, out):  # angles of the frames where the block stands
        n, parts = args[0].shape[2], []
        line = rope.forward(torch.empty((1, 1, place[0] + n, *rope.patch_size[1:]), device="meta"))
        for here, angles in zip(out, line):
            own, time = here.view(n, -1, here.shape[-1]), angles[0, -n:, :, : rope.t_dim].to(here)
            parts.append(torch.cat([time.expand(-1, own.shape[1], -1), own[..., rope.t_dim :]], -1).view(here.shape))
        return tuple(parts)

    def velocity(x, sigma):
        t = torch.full((len(x),), 1000 * sigma, device=x.device)
        dtype = transformer.patch_embedding.weight.dtype
        return transformer(x.to(dtype), t, text.to(dtype), return_dict=False)[0].float()

    hook = transformer.rope.register_forward_hook(shift)
    try:
        for start, stop in zip(starts, [*starts[1:], frames]):
            place[0], first = start, (stop - (LOCAL - SINK) if LOCAL else 0)
            seen = [f for f in range(start) if f < SINK or f >= first]
            index = torch.tensor(seen, dtype=torch.long)[:, None] * per_frame + torch.arange(per_frame)
            for layer in layers:
                layer.seen, layer.keep = index.flatten().to(noise.device), False
            x = noise[:, :, start:stop]
            for sigma, to in zip(SIGMAS, [*SIGMAS[1:], 0.0]):
                v = velocity(x, sigma)
                clean = x - sigma * v
                x = (1 - to) * clean + to * torch.randn_like(clean) if FRESH_NOISE and to else x + (to - sigma) * v
            yield clean
            if stop < frames:
                past = (1 - CONTEXT) * clean + CONTEXT * torch.randn_like(clean) if CONTEXT else clean
                for layer in layers:
                    layer.keep = True
                velocity(past, CONTEXT)
    finally:
        hook.remove()
        for block in transformer.blocks:
            block.attn1.set_processor(WanAttnProcessor())


def make_video(pipe, prompt, width={width}, height={height}, frames={frames}):
    """Frames [F, H, W, 3] of 0 to 1; the noise is that of torch's global generator."""
    text, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length={length})
    vae, device = pipe.vae, pipe._execution_device
    shape = (1, {channels}, (frames - 1) // {temporal} + 1, height // {spatial}, width // {spatial})
    latents = torch.cat(list(blocks_of(pipe.transformer, torch.randn(shape, device=device), text)), 2)
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
                 for values in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        decoded = vae.decode((latents * std + mean).to(vae.dtype)).sample
    return pipe.video_processor.postprocess_video(decoded)[0]


if __name__ == "__main__":
    export, base = Path(__file__).parent / "diffusers", (*sys.argv[3:], {base})[0]
{load}
    pipe.to("cuda" if torch.cuda.is_available() else "cpu"){moved}
    torch.manual_seed(42)
    export_to_video(make_video(pipe, sys.argv[1]), sys.argv[2], fps={fps:g})
'''


def causal_sampler_file(info: ExportInfo, blocks: BlockSampling, latent_channels: int = 16) -> str:
    """sampler.py of a causal student, complete in itself."""
    width, height, frames = info.size
    spatial, temporal = info.vae_scale
    return _SAMPLER.format(
        name=info.file_name, steps=info.steps, sigmas=", ".join(repr(sigma) for sigma in info.schedule.ladder),
        ladder=ladder_text(info), stochastic=info.renoise == "sde", base=json.dumps(info.base_name),
        load=load_lines(info), imports=loading_imports(info),
        moved=f"\n    {MOVED}" if info.lycoris else "",
        block=blocks.num_frame_per_block, first=blocks.independent_first_frame, context=blocks.context_noise / 1000,
        sink=blocks.sink_frames, local=blocks.local_attn_frames, length=info.tokenizer_max_length,
        channels=latent_channels, temporal=temporal, frames=frames, width=width, height=height,
        spatial=spatial, fps=info.framerate,
    )  # fmt: skip
