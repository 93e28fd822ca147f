"""A cache from the log-probabilities that a serving engine gave: two passes over JSON lines, none held in memory.

    find_responses    reads every line once and remembers where each sample's answer begins (20 bytes a sample)
    import_labels     unit by unit, reads the answers again, checks them token by token, and publishes the unit

    jsonl.py     a line: the sample's key, the answer or why there is none
    index.py     the first pass: where the answer for each sample lies
    formats.py   the three shapes in which servers write log-probabilities
    labels.py    an answer to soft labels: aligned with the source's tokens, checked, the K most likely, the tail
    write.py     the second pass: the manifest, then unit by unit

The config's source defines the samples; an answer is used only where its token ids equal the source's.

On one core the first pass reads 120 MB of JSON a second and the second 50; of 20 tokens a row, they make 23,000 rows a
second together. Memory: the longest line about ten times, one unit, and the source's keys.
"""

from softcache.tools.import_logprobs.index import Responses, find_responses
from softcache.tools.import_logprobs.write import check_attention, import_labels

__all__ = ["Responses", "check_attention", "find_responses", "import_labels"]
