"""Before the pass: how well the teacher predicts, a teacher that guesses, one that is not its model's own forward."""

import math
import weakref
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from softcache.data.sources.segmentation.base import IGNORED
from softcache.errors import ConfigError, LabelError
from softcache.models.language import build_language_model
from softcache.runs import capture_labels, open_data, open_teacher
from softcache.teacher.base import RowScores
from softcache.teacher.capture.trial import TrialScores, try_teacher
from softcache.teacher.image import ImageTeacher
from softcache.teacher.language import LanguageTeacher
from softcache.teacher.multi_label import MultiLabelTeacher
from softcache.teacher.segmentation import SegmentationTeacher
from tests.support.caches import digits_config
from tests.support.text_caches import text_config


@pytest.mark.parametrize(
    ("rows", "loss", "accuracy", "classes", "guessing"),
    [
        (2048, math.log(1000), 0.001, 1000, True),
        (2048, 9.0, 0.002, 1000, True),  # sure of the wrong ones
        (2048, 0.3, 0.9, 1000, False),
        (2048, 4.0, 0.25, 50_000, False),
        (2048, math.log(50_000), 0.0, 50_000, True),
        (2048, 12.0, 0.6, 1000, False),  # right, and far too sure
    ],
)
def test_a_guess_is_known_by_accuracy_and_loss(rows, loss, accuracy, classes, guessing):
    assert TrialScores(rows, loss, accuracy, classes).is_guessing == guessing


def test_the_score_is_printed_once_when_a_cache_is_created(tmp_path, capfd):
    config = digits_config()
    data = open_data(config)
    teacher = open_teacher(config, data)
    for _ in range(2):
        capture_labels(config, data, teacher, str(tmp_path / "cache"))
    printed = capfd.readouterr().err
    assert printed.count(" rows\n") == 1
    size = config.capture.batch_size
    found = try_teacher(teacher, data.train, num_classes=10, batch_size=size)
    assert 256 <= found.rows < 256 + size
    assert f"teacher {teacher.spec}: {found.accuracy:.2%} right on {found.rows:,} rows" in printed


def test_a_teacher_with_random_weights_is_called_out(tmp_path, capfd):
    config = text_config(tmp_path)
    data = open_data(config)
    torch.manual_seed(0)
    model = build_language_model(
        "llama?width=16&depth=1&heads=2&tied=false", vocab_size=data.num_classes, context=64
    )
    teacher = LanguageTeacher(model, spec="x:y", device=torch.device("cpu"), dtype="float32")
    capture_labels(config, data, teacher, str(tmp_path / "cache"))
    printed = capfd.readouterr().err
    assert "of tokens right on" in printed
    assert f"no better than a guess among {data.num_classes:,} classes" in printed


def test_labels_that_are_not_of_the_models_own_forward_are_refused(tmp_path):
    config = text_config(tmp_path)
    data = open_data(config)
    teacher = open_teacher(config, data)
    try_teacher(teacher, data.train, num_classes=data.num_classes, batch_size=4)
    teacher.parts.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True
    )  # packed documents see each other
    with pytest.raises(LabelError, match=r"not those of its own forward pass: [\d.]+ nats of \d+ rows"):
        try_teacher(teacher, data.train, num_classes=data.num_classes, batch_size=4)


def test_the_check_holds_one_chunk_of_logits_at_a_time(tmp_path, monkeypatch):
    config = text_config(tmp_path)
    data = open_data(config)
    teacher = open_teacher(config, data)
    teacher._chunk_positions, held = 7, []
    real = LanguageTeacher.chunks

    def spy(self, batch):
        for logits in real(self, batch):
            held.append(weakref.ref(logits))
            assert sum(one() is not None for one in held) <= 2
            yield logits
            del logits

    monkeypatch.setattr(LanguageTeacher, "chunks", spy)
    teacher.check_forward(data.train.load(range(4), fingerprints=False))
    assert len(held) > 5


def test_a_model_that_returns_its_logits_bare_is_checked(tmp_path):
    """A factory's model need not be one of transformers."""
    config = text_config(tmp_path)
    data = open_data(config)
    teacher = open_teacher(config, data)
    inner = teacher.model

    class Bare(torch.nn.Module):
        def forward(self, tokens):
            return inner(tokens).logits

    teacher.model = Bare()
    teacher.check_forward(data.train.load(range(4), fingerprints=False))


def test_weights_are_digested_before_the_first_pass_and_not_again():
    """A pass repacks layers of bitsandbytes on a CPU, and the state dict then takes them apart in another way."""
    happened = []
    model = build_language_model("gpt2?width=16&depth=1&heads=2", vocab_size=50, context=16)
    model.register_state_dict_pre_hook(lambda *_: happened.append("weights read"))
    model.transformer.register_forward_pre_hook(lambda *_: happened.append("pass"))
    teacher = LanguageTeacher(
        model, spec="ours:model", chunk_positions=8, device=torch.device("cpu"), dtype="float32"
    )
    teacher.identity()
    assert happened[0] == "weights read"
    assert happened.count("weights read") == 1 < len(happened)


def test_a_teacher_whose_outputs_are_the_classes_in_another_order_is_refused(tmp_path):
    config = digits_config(teacher={"model": "tests.fakes:nearest_mean"})
    data = open_data(config)
    found = try_teacher(open_teacher(config, data), data.train, num_classes=10, batch_size=64)
    assert found is not None
    assert found.accuracy > 0.8
    config = digits_config(teacher={"model": "tests.fakes:nearest_mean_reversed"})
    with pytest.raises(
        ConfigError,
        match=r"in another order: .* 10 classes .* another class: 0 '0' as 9 '9', 1 '1' as 8 '8', 2 '2' as 7 '7', …; give",
    ):
        capture_labels(config, data, open_teacher(config, data), str(tmp_path / "cache"))
    assert not (tmp_path / "cache/manifest.json").exists()


@pytest.mark.parametrize(("sure", "is_refused"), [(3.0, True), (0.2, False)])
def test_a_teacher_that_was_not_trained_is_not_refused_for_classes_that_it_takes_for_each_other(
    sure, is_refused
):
    """The direction in which random weights divide two classes is by chance the wrong one."""

    class Two(list):
        mean_rows = 1.0
        class_names = ("cat", "dog")

        def load(self, samples, view, *, fingerprints):
            targets = torch.tensor([sample % 2 for sample in samples])
            return SimpleNamespace(
                num_rows=len(samples), targets=targets, split=lambda pieces: [None] * pieces
            )

    teacher = object.__new__(ImageTeacher)
    teacher.device = torch.device("cpu")
    teacher.check_forward, teacher.spec = lambda batch: None, "timm:resnet18"
    teacher.chunks = lambda batch: iter([nn.functional.one_hot(1 - batch.targets, 2) * sure])
    if is_refused:
        with pytest.raises(
            ConfigError, match=r"in another order: .* 0 'cat' as 1 'dog', 1 'dog' as 0 'cat'; give"
        ):
            try_teacher(teacher, Two(range(512)), num_classes=2, batch_size=64)
    else:
        found = try_teacher(teacher, Two(range(512)), num_classes=2, batch_size=64)
        assert (found.rows, found.accuracy) == (256, 0.0)


class Known:
    """A split whose batches a function makes of sample numbers."""

    class_names = ("sky", "road", "car")

    def __init__(self, number, load, mean_rows=1.0):
        self._number, self._load, self.mean_rows = number, load, mean_rows

    def __len__(self):
        return self._number

    def load(self, samples, view, *, fingerprints):
        return self._load(torch.tensor(samples))


def teacher_of(kind, **members):
    teacher = object.__new__(kind)
    teacher.device, teacher.spec, teacher.num_classes = torch.device("cpu"), "my:net", 3
    for name, member in members.items():
        setattr(teacher, name, member)
    return teacher


def masks_of(samples):
    """Three classes in bands of 40, 40 and 20 cells, the first row of which has no class."""
    targets = torch.tensor([IGNORED, *[0] * 39, *[1] * 40, *[2] * 20]).repeat(len(samples))
    cells = range(100)
    rows = torch.arange(100 * len(samples))
    split = lambda pieces: [None] * pieces
    return SimpleNamespace(num_rows=len(rows), targets=targets, rows=rows, cells=cells, split=split)


@pytest.mark.parametrize(
    ("outputs", "sure", "is_refused"),
    [
        ([1, 2, 0], 5.0, True),
        ([0, 1, 2], 5.0, False),
        ([0, 0, 0], 5.0, False),  # all is sky
        ([1, 2, 0], 0.2, False),  # hardly trained
    ],
)
def test_masks_of_classes_in_another_order_are_refused_by_a_vote_for_each_class_of_each_image(
    outputs, sure, is_refused
):
    def chunks(batch):
        guessed = torch.tensor(outputs)[batch.targets.clamp(min=0)]
        guessed[::7] = 0  # what it mistakes
        return iter([nn.functional.one_hot(guessed, 3) * sure])

    teacher = teacher_of(SegmentationTeacher, chunks=chunks)
    data = Known(500, masks_of, mean_rows=100.0)
    if is_refused:
        with pytest.raises(
            ConfigError, match=r"of \d\d rows of 3 classes .* 0 'sky' as 1 'road', 1 'road' as 2 'car'"
        ):
            try_teacher(teacher, data, num_classes=3, batch_size=4)
    else:
        assert try_teacher(teacher, data, num_classes=3, batch_size=4).rows >= 3200


@pytest.mark.parametrize(("outputs", "is_refused"), [([2, 1, 0], True), ([0, 1, 2], False)])
def test_several_classes_in_another_order_are_refused_by_the_images_that_have_one(outputs, is_refused):
    def load(samples):
        targets = nn.functional.one_hot(samples % 3, 3).float()
        targets[samples % 5 == 0, 0] = 1  # the sky above, in which the teacher is surest
        logits = 8 * targets[:, outputs] - 4
        logits[samples % 5 == 0, 1] = 9
        return SimpleNamespace(num_rows=len(samples), targets=targets, images=logits)

    teacher = teacher_of(MultiLabelTeacher, logits=lambda images: images)
    if is_refused:
        with pytest.raises(ConfigError, match=r"0 'sky' as 2 'car', 2 'car' as 0 'sky'; give the order"):
            try_teacher(teacher, Known(400, load), num_classes=3, batch_size=64)
    else:
        assert try_teacher(teacher, Known(400, load), num_classes=3, batch_size=64) is None


def test_a_teacher_that_does_take_classes_for_each_other_labels_where_that_is_said(tmp_path, capfd):
    table = {"model": "tests.fakes:nearest_mean_reversed"}
    with pytest.raises(ConfigError, match=r"where it does .* set teacher\.check_class_order = false"):
        capture(digits_config(teacher=table), tmp_path / "refused")
    cache = capture(digits_config(teacher=table | {"check_class_order": False}), tmp_path / "cache")
    assert cache.manifest.extensions == {"softcache.class_order": "not checked"}
    assert "may be the source's classes in another order: of 1" in capfd.readouterr().err
    assert capture(digits_config(), tmp_path / "usual").manifest.extensions == {}
    with pytest.raises(ValueError, match=r"teacher\.check_class_order: of models of images"):
        text_config(tmp_path, teacher={"model": "hf:gpt2", "check_class_order": False})


def capture(config, url):
    data = open_data(config)
    return capture_labels(config, data, open_teacher(config, data), str(url))[0]


def test_the_rows_of_a_trial_come_from_all_over_the_split():
    seen = []

    class Recording(list):
        mean_rows = 1.0

        def load(self, samples, view, *, fingerprints):
            seen.append(samples)
            targets = torch.zeros(len(samples), dtype=torch.long)
            return SimpleNamespace(
                num_rows=len(samples), targets=targets, split=lambda pieces: [None] * pieces
            )

    teacher = SimpleNamespace(
        has_row_scores=True,
        has_named_outputs=False,
        fewest_samples=0,
        check_forward=lambda batch: None,
        score=lambda batch: RowScores(0.0, 0, batch.targets),
    )
    for length, size in [
        (100_000, 256),
        (100_000, 300),
        (300, 256),
        (257, 256),
        (5, 256),
        (1, 1),
        (70_000, 1),
    ]:
        seen.clear()
        found = try_teacher(teacher, Recording(range(length)), num_classes=2, batch_size=size)
        assert seen[0].start == 0
        assert len(seen) == 1 or seen[-1].stop == length
        assert all(one.stop <= other.start for one, other in pairwise(seen))
        assert min(length, 256) - size < found.rows < 2048 + size
