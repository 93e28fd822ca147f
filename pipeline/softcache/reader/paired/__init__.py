"""Students whose samples are others than those that were labelled: of another tokenizer, or of another source."""

from softcache.reader.paired.documents import PairedDataset
from softcache.reader.paired.images import OnlinePairedDataset, PairedSamples

__all__ = ["OnlinePairedDataset", "PairedDataset", "PairedSamples"]
