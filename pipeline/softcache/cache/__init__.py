"""The on-disk format: manifest, samples, units and their markers, codecs, arrays, storage."""
