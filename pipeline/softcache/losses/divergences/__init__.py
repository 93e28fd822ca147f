"""The losses, one file for each: the formula over two distributions, its parameters, and what it allows.

    forward_kl.py, reverse_kl.py, jsd.py, skew_kl.py, adaptive_kl.py, total_variation.py, cross_entropy.py
    dkd.py, nkd.py      which read the ground-truth class
    uld.py              which compares ranks

A formula takes the log-masses of teacher and student in the same buckets, [P, B]: the kept classes, then the
ground-truth class where the loss needs it, then the tail. Everything else (whole vocabularies, tail modes, drawn classes,
temperatures, fused heads) is done around it, for every loss alike. A new loss is one new file here, or in a package of
its own: `loss.name = "package.module:name"`.
"""
