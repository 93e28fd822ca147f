"""Serving engines that run a teacher's backbone, by name (`teacher.engine`); softcache applies the head.

    base.py     what an engine is, its settings, the registry
    vllm.py     vLLM, with the model as a pooling model that returns the hidden state of every token

An engine gives the final hidden states of whole documents, so the labels are those of the model run by transformers but
for rounding: every class, any temperature, the tail mass. Its log-probabilities are not used: their number is capped, and
they are of temperature 1.
"""

from softcache.teacher.engines.base import ENGINES, AnyEngineSettings, Engine, EngineSettings

__all__ = ["ENGINES", "AnyEngineSettings", "Engine", "EngineSettings"]
