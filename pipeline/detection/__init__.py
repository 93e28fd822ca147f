"""Detection: batches of scenes with their boxes.

batches.py     images, the boxes in them, and the teacher's record at the cells that were kept
"""

from pipeline.detection.batches import DetectionBatch

__all__ = ["DetectionBatch"]
