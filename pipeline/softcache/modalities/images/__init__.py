"""Images: classifiers as teachers and students, replayed views, accuracy."""
