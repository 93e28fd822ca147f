"""Students whose samples are others than those that were labeled: of another tokenizer, or of another source."""

from softcache.reader.paired.documents import MatchedDocuments
from softcache.reader.paired.images import MatchedImages, OnlinePairedDataset

__all__ = ["MatchedDocuments", "MatchedImages", "OnlinePairedDataset"]
