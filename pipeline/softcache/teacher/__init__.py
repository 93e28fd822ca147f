"""The writing half: a frozen teacher, and the capture of its labels."""
