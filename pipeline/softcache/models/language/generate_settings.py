"""[generate]: how a model searches for a translation."""

from pydantic import Field

from softcache.settings import Settings

__all__ = ["GenerateSettings"]


class GenerateSettings(Settings):
    """[generate]: how `softcache teacher-generate` searches, and how students are scored.

    `score_beams` is the width of the search at the end of a student's training, 1 for greedy, 0 for no scores. `part_pairs`
    is how many pairs a part of the written source has: what a killed run does again at most.
    """

    beams: int = Field(4, ge=1)
    length_penalty: float = Field(1.0, ge=0)
    batch_size: int = Field(64, ge=1)
    part_pairs: int = Field(512, ge=1)
    score_beams: int = Field(1, ge=0)
