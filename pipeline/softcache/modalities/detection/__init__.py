"""Images with boxes: detectors, views that move boxes too, mean average precision."""
