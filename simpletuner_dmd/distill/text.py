"""Caption dropout: which samples of a batch learn the negative prompt instead of their own."""

from __future__ import annotations

import torch

from simpletuner_dmd.flow import Batch, TextEmbedding
from simpletuner_dmd.randomness import RandomStream


def with_dropped_captions(batch: Batch, stream: RandomStream, probability: float) -> TextEmbedding:
    """The batch's text with each prompt replaced by the negative one with `probability`, drawn per sample and step."""
    if probability <= 0:
        return batch.text
    dropped_B = (stream.uniform("caption dropout") < probability).to(batch.text.rows_BLD.device)
    negative = batch.negative_text.expand(len(batch.positions)).rows_BLD
    return TextEmbedding(torch.where(dropped_B[:, None, None], negative, batch.text.rows_BLD))
