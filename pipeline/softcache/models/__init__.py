"""Specs of models into modules: images, texts, boxes, bytes."""
