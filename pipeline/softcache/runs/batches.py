"""Where a run's training batches come from: a cache's labels, or the ground truth alone; and in which order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from softcache.cache.codecs import VectorCodec
from softcache.config.run import RunConfig
from softcache.errors import ConfigError, IncompleteCacheError
from softcache.modalities import Data
from softcache.reader.cache import DEFAULT_WINDOW_BLOCKS, Cache
from softcache.reader.dataset import HardLabelDataset
from softcache.reader.order import BlockShuffle
from softcache.runtime.distributed import join, on_cpu
from softcache.runtime.logging import log_info
from softcache.student import TrainBatches
from softcache.teacher.capture.plan import default_plan

__all__ = ["cached_batches", "hard_label_batches"]


def cached_batches(
    config: RunConfig, data: Data, cache: Cache, num_views: int, allow_partial: bool
) -> TrainBatches:
    if num_views > cache.num_views:
        raise ConfigError(
            f"reader.num_views: {num_views}, but cache {cache.url} holds {cache.num_views}; ask for at most that, or "
            "make a cache with more (labels.num_views)"
        )
    if not cache.is_complete:
        plan = cache.manifest.plan
        rows = sum(len(cache.samples_in(view)) for view in range(num_views))
        found = cache.describe_missing()
        if not allow_partial or any(not len(cache.samples_in(view)) for view in range(num_views)):
            raise IncompleteCacheError(
                f"cache {cache.url}: {found}; rerun `softcache teacher-logits` to finish it, or train on what is "
                "there with --allow-partial (every view that is used needs at least one finished unit)"
            )
        log_info(
            f"cache {cache.url}: {found}; training on the {rows:,} of {plan.num_samples * num_views:,} rows there"
        )
    if cache.manifest.mixes_images and num_views > 1 and not data.replays_teacher_views(config):
        raise ConfigError(
            f"reader.num_views: {num_views}, but cache {cache.url} has views of two images mixed, and this student sees its "
            "own image alone, whose label that is not; set reader.num_views = 1 (the plain view), or let the student read "
            "the labeled images (student.views)"
        )
    codec = cache.manifest.build_codec()
    if isinstance(codec, VectorCodec) and (fault := config.loss.state_fault()) is not None:
        raise ConfigError(
            f"cache {cache.url}: holds hidden states, for which [loss] is not made: loss.{fault}"
        )
    if codec.max_temperature is not None and config.loss.adapts:
        _check_highest(config, cache.url, codec.max_temperature)
    sampling = codec.sampling
    highest = config.loss.highest_temperature
    if sampling is not None and highest > 1.001 / sampling.exponent:
        log_info(
            f"cache {cache.url}: its classes were drawn for T = {1 / sampling.exponent:g}; at T = {highest:g}, which [loss] "
            "asks for, they are right on average, and far noisier. Set loss.temperature = "
            f"{1 / sampling.exponent:g}, or capture with labels.proposal_temperature = {highest:g}"
        )
    dataset, chosen = data.train_dataset(config, cache)

    def samples_of(view: int) -> np.ndarray:
        there = cache.samples_in(view)
        return there if chosen is None else np.intersect1d(there, chosen)

    order = _order(
        config,
        samples_of,
        lambda epoch: epoch % num_views,
        cache.manifest.plan.chunk_samples,
        data.rows_of if dataset.rows_of is None else dataset.rows_of,
        dataset.labeled_of,
        window_blocks=config.reader.window_blocks
        or (None if cache.fits_in_memmap else DEFAULT_WINDOW_BLOCKS),
    )
    return TrainBatches(dataset, order, config.reader.workers)


def _check_highest(config: RunConfig, url: str, known_to: float) -> None:
    """Raises before a run, not in the middle of it, where its temperature will leave what the labels know."""
    if config.loss.highest_temperature > known_to:
        table = "curriculum" if config.loss.curriculum is not None else "temperature_schedule"
        raise ConfigError(
            f"loss.{table}: reaches T = {config.loss.highest_temperature:g}; expected at most {known_to:g} for cache {url}, "
            "whose labels were imported from log-probabilities and are known no further; capture labels with "
            "`softcache teacher-logits`, or keep T there"
        )


def hard_label_batches(config: RunConfig, data: Data) -> TrainBatches:
    samples = data.unlabeled_dataset(config)
    dataset = HardLabelDataset(samples)
    everything = np.arange(len(dataset))
    # Every epoch sees a fresh view where there are several: the baselines get the full strength of the augmentation.
    fresh = data.fresh_views(config)
    block = default_plan(samples, config.capture).chunk_samples
    order = _order(
        config,
        lambda view: everything,
        lambda epoch: epoch if fresh else 0,
        block,
        data.student_data(config).rows_of,
        window_blocks=config.reader.window_blocks,
    )
    return TrainBatches(dataset, order, config.reader.workers)


def _order(
    config: RunConfig,
    samples_of: Callable[[int], np.ndarray],
    view_of: Callable[[int], int],
    chunk_samples: int,
    rows_of: np.ndarray | None,
    labeled_of: np.ndarray | None = None,
    *,
    window_blocks: int | None,
) -> BlockShuffle:
    state = join(cpu=on_cpu(config.train.device), timeout_seconds=config.train.ddp_timeout_seconds)
    return BlockShuffle(
        samples_of,
        batch_size=config.train.batch_size,
        view_of=view_of,
        block_samples=config.reader.block_samples or chunk_samples,
        window_blocks=window_blocks,
        seed=config.train.seed,
        rank=state.process_index,
        num_ranks=state.num_processes,
        rows_of=rows_of,
        labeled_of=labeled_of,
    )
