"""Images that have any number of classes: sources, sigmoid teachers, their labels, students, scores."""

import csv

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import average_precision_score, f1_score

from softcache.config.load import load_config
from softcache.data.sources import open_source
from softcache.errors import ConfigError, LabelError, SourceError
from softcache.labels.sparsify import top_k_bernoulli
from softcache.losses import binary_distillation_loss, binary_kl
from softcache.models.average_precision import multi_label_scores
from softcache.models.image import build_model
from softcache.reader.dataset import SoftLabelDataset
from softcache.reader.open import open_cache
from softcache.runs import capture_labels, open_data, open_teacher, train_student
from softcache.tools.shrink import ShrinkSettings, shrink_cache
from softcache.tools.verify.teacher import verify_against_teacher, verify_units
from tests.support.pictures import encoded, write_pictures

NAMES = ("cat", "dog", "newt", "owl")
NUMBER = 24


def classes_of(seed):
    return [name for bit, name in enumerate(NAMES) if (seed + 1) >> bit & 1]


def truth():
    return np.array([[name in classes_of(seed) for name in NAMES] for seed in range(NUMBER)], np.uint8)


def write_table(root, columns=None):
    write_pictures(root / "p", NUMBER)
    with (root / "table.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", *(columns or ["label"])])
        for seed in range(NUMBER):
            found = classes_of(seed)
            cells = [int(name in found) for name in columns] if columns else ["|".join(found)]
            writer.writerow([f"p/{seed}.png", *cells])
    return {"modality": "multi_label", "name": "csv", "path": str(root / "table.csv")}


def opened(root, table, split="train", **settings):
    return open_source({"data_dir": str(root / "data"), "eval_share": 1e-9, **table, **settings}, split=split)


def write_lists(root, named=True):
    inner = datasets.ClassLabel(names=list(NAMES)) if named else datasets.Value("string")
    rows = [[NAMES.index(n) if named else n for n in classes_of(seed)] for seed in range(NUMBER)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Sequence(inner)})
    images = [{"bytes": encoded(seed), "path": None} for seed in range(NUMBER)]
    datasets.Dataset.from_dict({"image": images, "label": rows}, features=features).save_to_disk(
        root / "saved"
    )
    return {"modality": "multi_label", "name": "hf", "path": str(root / "saved")}


@pytest.mark.parametrize(
    "write",
    [
        write_table,
        lambda root: write_table(root, NAMES),
        write_lists,
        lambda root: write_lists(root, named=False),
    ],
    ids=["names", "columns", "ClassLabel", "lists of names"],
)
def test_sources_have_every_class_of_a_picture(tmp_path, write):
    table = write(tmp_path)
    more = {"label_columns": NAMES} if (tmp_path / "table.csv").exists() and write is not write_table else {}
    source = opened(tmp_path, table, **more)
    assert source.class_names == NAMES
    assert np.array_equal(source.multi_hot, truth())
    left = source.without([3])
    assert np.array_equal(left.multi_hot, np.delete(truth(), 3, 0))
    assert len({source.digest, left.digest}) == 2


def test_what_is_no_set_of_classes_is_refused(tmp_path):
    table = write_table(tmp_path)
    with pytest.raises(SourceError, match=r"'cat' of 'p/0\.png' in source\.label_columns; expected 0 or 1"):
        opened(tmp_path, table, label_columns=["label"])
    text = (tmp_path / "table.csv").read_text().replace("1.png,dog", "1.png,dog|dog")
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(SourceError, match=r"'p/1\.png' has the class 'dog' twice"):
        opened(tmp_path, table)
    lists = write_lists(tmp_path)
    with pytest.raises(
        SourceError, match=r"column 'label' has lists; set source\.modality = \"multi_label\""
    ):
        opened(tmp_path, {**lists, "modality": "image"})


def test_folders_are_classes_of_which_one_is_present(tmp_path):
    for name in ("a", "b"):
        write_pictures(tmp_path / "train" / name, 2)
    table = {"modality": "multi_label", "name": "imagefolder", "root": str(tmp_path), "eval_share": 1e-9}
    source = open_source(table, split="train")
    assert source.multi_hot.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    assert source.digest != open_source({**table, "modality": "image"}, split="train").digest


def test_functions_of_ones_own_are_checked():
    table = {"modality": "multi_label", "name": "tests.support.multi_label:digits", "max_train_samples": 5}
    source = open_source(table, split="train")
    assert (len(source), source.multi_hot.shape) == (5, (5, 5))
    with pytest.raises(SourceError, match=r"multi_hot of shape \(24, 5\); expected \(24, 5\) .* of 0 and 1"):
        open_source({**table, "name": "tests.support.multi_label:counted"}, split="train")
    with pytest.raises(SourceError, match=r"targets of shape \(24, 5\); expected one class .* multi_hot"):
        open_source({"name": "tests.support.multi_label:matrix"}, split="train")


# -- loss and scores ---------------------------------------------------------------------------------------


def dense_kl(student, teacher, T):
    y, q = (torch.distributions.Bernoulli(logits=x / T) for x in (teacher, student))
    return torch.distributions.kl_divergence(y, q).mean(1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_soft_loss_is_the_binary_kl_of_each_class(temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = top_k_bernoulli(teacher, 5)
    expected = dense_kl(student, teacher, temperature)
    torch.testing.assert_close(binary_kl(student, labels, temperature=temperature), expected)
    targets = (teacher > 0).double()
    hard = torch.nn.functional.binary_cross_entropy_with_logits(student, targets)
    found = binary_distillation_loss(student, labels, targets, temperature=temperature, alpha=0.3)
    torch.testing.assert_close(found, 0.7 * hard + 0.3 * temperature**2 * expected.mean())
    few = top_k_bernoulli(teacher, 2)
    bound = binary_kl(student, few, temperature=temperature)
    assert (bound <= expected + 1e-12).all()
    # Of a dropped class that the student finds less likely than the bound nothing is known.
    low = student.scatter(1, teacher.argsort(1)[:, :3], -50.0)
    kept = torch.zeros(6, 5).scatter(1, few.ids, 1.0).bool()
    y, q = (torch.distributions.Bernoulli(logits=x / temperature) for x in (teacher, low))
    only = torch.distributions.kl_divergence(y, q).where(kept, 0.0).mean(1)
    torch.testing.assert_close(binary_kl(low, few, temperature=temperature), only)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: binary_kl(x, labels, temperature=temperature), (student,))


def test_impossible_classes_cost_nothing_more_than_they_should():
    labels = top_k_bernoulli(torch.tensor([[-torch.inf, 2.0]]), 2)
    student = torch.tensor([[0.5, 2.0]], requires_grad=True)
    loss = binary_kl(student, labels)
    loss.sum().backward()
    assert loss.item() == pytest.approx(-np.log(1 - 1 / (1 + np.exp(-0.5))) / 2, rel=1e-5)
    assert student.grad.isfinite().all()
    with pytest.raises(LabelError, match=r"expected logits of shape \(1, 2\)"):
        binary_kl(torch.zeros(1, 3), labels)
    with pytest.raises(LabelError, match=r"expected targets for alpha 0\.5; found None"):
        binary_distillation_loss(student, labels, None, temperature=1.0, alpha=0.5)


def test_scores_are_scikit_learns():
    random = np.random.default_rng(0)
    logits = np.round(random.normal(size=(50, 6)), 1)  # with ties
    targets = (random.random((50, 6)) < 0.3).astype(np.float32)
    targets[:, 4] = 0  # has no average precision
    found = multi_label_scores(logits, targets)
    having = targets.any(0)
    assert found["map"] == pytest.approx(average_precision_score(targets[:, having], logits[:, having]))
    assert found["f1"] == pytest.approx(f1_score(targets, logits > 0, average="micro"))


# -- from the teacher to the student -----------------------------------------------------------------------


def config_of(root, table, weights, **settings):
    (root / "run.toml").write_text("")
    overrides = {
        **{f"source.{key}": value for key, value in {**table, "data_dir": str(root / "data")}.items()},
        "views.size": 8,
        "teacher.model": "linear",
        "teacher.weights": str(weights),
        "labels.policy": "dense",
        "capture.batch_size": 8,
        "capture.device": "cpu",
        "capture.dtype": "float32",
        "student.model": "linear",
        "train.epochs": 2,
        "train.batch_size": 8,
        "train.device": "cpu",
        "train.precision": "no",
        "train.lr": 0.01,
        **settings,
    }
    return load_config(root / "run.toml", [f"{key}={value}" for key, value in overrides.items()])


@pytest.fixture
def made(tmp_path):
    table = {**write_table(tmp_path), "eval_share": 0.3}
    torch.manual_seed(7)  # not that of the students
    model = build_model("linear", num_classes=4, input_shape=(3, 8, 8))
    save_file(model.state_dict(), tmp_path / "teacher.safetensors")
    return tmp_path, table, tmp_path / "teacher.safetensors"


def test_a_student_learns_from_the_cache_what_it_learns_online(made):
    root, table, weights = made
    config = config_of(root, table, weights, **{"loss.alpha": 1.0})
    data = open_data(config)
    teacher = open_teacher(config, data)
    capture_labels(config, data, teacher, str(root / "cache"))
    cache = open_cache(root / "cache")
    manifest = cache.manifest
    assert (manifest.kind, manifest.codec["name"], manifest.class_names) == ("image", "bernoulli", NAMES)
    assert manifest.identity["teacher"]["output"] == "sigmoid"
    assert 0 < manifest.teacher.eval_map <= 1
    batch = SoftLabelDataset(data.train, cache)[0, 0]
    assert batch.targets.tolist() == data.train.source.multi_hot[:1].tolist()
    logits = teacher.logits(batch.images)
    kept = torch.zeros(1, 4).scatter(1, batch.labels.ids.long(), batch.labels.logits.float())
    torch.testing.assert_close(kept, logits, atol=2e-3, rtol=1e-3)
    assert list(verify_units(cache)) == []
    assert (
        list(verify_against_teacher(cache, data.train, teacher, num_rows=9, threshold_nats=1e-4, seed=0))
        == []
    )
    runs = {}
    for labels in ("cache", "online", "ground_truth"):
        how = config.model_copy(update={"train": config.train.model_copy(update={"labels": labels})})
        kept_cache = {"cache": {"cache": cache}, "online": {"teacher": teacher}}.get(labels, {})
        runs[labels] = train_student(
            how, data, model="linear", labels=labels, out=root / labels, **kept_cache
        )
    losses = {labels: [row["train_loss"] for row in run["history"]] for labels, run in runs.items()}
    assert losses["cache"] == pytest.approx(losses["online"], rel=1e-3)
    assert losses["ground_truth"][0] > losses["ground_truth"][1]
    assert all(0 <= run["map"] <= 1 and 0 <= run["f1"] <= 1 for run in runs.values())
    with pytest.raises(LabelError, match=r"found those of codec 'bernoulli', of independent classes"):
        shrink_cache(cache, str(root / "small"), ShrinkSettings(k=2))


def test_one_class_is_a_yes_or_no(tmp_path):
    table = {**write_table(tmp_path, ["dog"]), "eval_share": 0.3, "label_columns": '["dog"]'}
    model = build_model("linear", num_classes=1, input_shape=(3, 8, 8))
    save_file(model.state_dict(), tmp_path / "teacher.safetensors")
    config = config_of(tmp_path, table, tmp_path / "teacher.safetensors")
    data = open_data(config)
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(tmp_path / "cache"))
    run = train_student(config, data, model="linear", labels="cache", cache=cache, out=tmp_path / "student")
    assert np.isfinite(run["map"])


def test_mixed_views_have_mixed_classes(made):
    root, table, weights = made
    data = open_data(config_of(root, table, weights, **{"views.mixup_alpha": 1.0, "labels.num_views": 2}))
    targets = data.train.load(range(12), 1).targets
    assert targets.shape == (12, 4)
    assert ((targets > 0) & (targets < 1)).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss.name": "jsd"}, r"loss\.name: of one distribution over all classes"),
        ({"capture.codec": "packed"}, r"capture\.codec: 'packed' is of a softmax"),
        (
            {"labels.policy": "top_p", "labels.p": 0.9, "labels.k": 2},
            r"labels\.policy: 'top_p' is of one distribution",
        ),
        (
            {"labels.temperatures": "[1.0, 2.0]"},
            r"labels\.temperatures: .* drop the setting: any temperature",
        ),
    ],
)
def test_settings_of_a_softmax_are_refused(made, settings, message):
    root, table, weights = made

    def run():
        config = config_of(root, table, weights, **settings)
        data = open_data(config)
        capture_labels(config, data, open_teacher(config, data), str(root / "cache"))

    with pytest.raises(ConfigError, match=message):
        run()


def test_the_codec_is_of_no_softmax(made):
    root, table, weights = made
    settings = {"source.modality": "image", "capture.codec": "bernoulli"}
    (root / "table.csv").write_text(
        "path,label\n" + "".join(f"p/{n}.png,{NAMES[n % 4]}\n" for n in range(NUMBER))
    )
    config = config_of(root, table, weights, **settings)
    data = open_data(config)
    with pytest.raises(
        ConfigError, match="'bernoulli' is of independent classes' labels; choose open or packed"
    ):
        capture_labels(config, data, open_teacher(config, data), str(root / "cache"))
