"""Students whose samples are others than those that were labelled: of another tokenizer, or of another source."""

from pipeline.paired.documents import PairedDataset
from pipeline.paired.samples import PairedSamples, TaughtSamples

__all__ = ["PairedDataset", "PairedSamples", "TaughtSamples"]
