"""Sources of images with boxes."""
