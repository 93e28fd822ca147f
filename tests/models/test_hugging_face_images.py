"""Image classifiers of transformers as teachers: their logits, their preprocessing, their names; CLIP and SigLIP."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from softcache.data.transforms import Views, ViewSettings
from softcache.errors import ConfigError, SpecError
from softcache.models.hugging_face import HfImageClassifier, is_bgr
from softcache.models.image import Normalize, build_model
from softcache.models.preprocessing import pretrained_views
from softcache.models.spec import architecture_of, parse_spec
from softcache.teacher.base import TeacherSettings
from softcache.teacher.class_map import check_class_order
from softcache.teacher.image import ImageTeacher, load_image_teacher
from softcache.teacher.multi_label import MultiLabelTeacher

NAMES = ("tabby cat", "dog", "red_newt")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_vit(folder, labels=NAMES, size=32):
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SMALL, image_size=size, patch_size=8, id2label=dict(enumerate(labels)))
    config.label2id = {name: number for number, name in enumerate(labels)}
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)


def save_convnext(folder, crop_pct=0.8):
    torch.manual_seed(1)
    config = transformers.ConvNextConfig(
        depths=[1, 1], hidden_sizes=[8, 12], num_stages=2, id2label=dict(enumerate(NAMES))
    )
    transformers.ConvNextForImageClassification(config).save_pretrained(folder)
    transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=crop_pct).save_pretrained(folder)


def save_clip(folder, kind="clip"):
    """A model of images and texts, with a tokenizer of letters."""
    torch.manual_seed(2)
    text = dict(
        SMALL, vocab_size=60, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    vision = dict(SMALL, image_size=32, patch_size=8)
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        model = transformers.CLIPModel(config)
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": 36}, crop_size=32)
    else:
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        model = transformers.SiglipModel(config)
        processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
        torch.nn.init.constant_(model.logit_bias, -3.0)
        torch.nn.init.constant_(model.logit_scale, 2.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer_of_letters().save_pretrained(folder)


def tokenizer_of_letters():
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    letters = {letter: number + 4 for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz .,")}
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **letters}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("saved")
    save_vit(base / "vit")
    save_convnext(base / "convnext")
    save_clip(base / "clip")
    save_clip(base / "siglip", "siglip")
    return base


def pictures():
    random = np.random.default_rng(0)
    sizes = [(50, 41), (37, 64), (32, 32), (33, 90)]
    return [
        np.array(
            Image.fromarray(random.integers(0, 256, (6, 5, 3), np.uint8)).resize(
                size, Image.Resampling.BICUBIC
            )
        )
        for size in sizes
    ]


def views_and_inputs(spec):
    """The plain views of `spec`'s preprocessing, normalised as its teacher sees them."""
    settings = ViewSettings.model_validate(pretrained_views(parse_spec(spec)))
    views = Views(settings)
    images = torch.stack(
        [views.apply(torch.from_numpy(x).permute(2, 0, 1).contiguous(), key="x", view=0) for x in pictures()]
    )
    return settings, Normalize(settings.mean, settings.std)(images)


def teacher(spec, names=NAMES, kind=ImageTeacher, **options):
    return load_image_teacher(
        TeacherSettings(model=spec, **options),
        num_classes=len(names),
        class_names=names,
        input_shape=(3, 32, 32),
        normalize=Normalize((0.5,), (0.5,)),
        device=torch.device("cpu"),
        dtype="float32",
        kind=kind,
    )


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_a_classifier_sees_and_answers_as_in_transformers(folders, name):
    spec = f"hf:{folders / name}"
    _, inputs = views_and_inputs(spec)
    net = transformers.AutoModelForImageClassification.from_pretrained(folders / name).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folders / name)
    seen = processor([Image.fromarray(x) for x in pictures()], return_tensors="pt")["pixel_values"]
    assert (inputs - seen).abs().max() < 0.02  # a grey level is 1/255/0.225
    model = build_model(spec, num_classes=3, input_shape=(3, 32, 32))
    with torch.inference_mode():
        torch.testing.assert_close(model(seen), net(pixel_values=seen).logits, atol=1e-5, rtol=0)
        ours, theirs = model(inputs).log_softmax(-1), net(pixel_values=seen).logits.log_softmax(-1)
    assert (theirs.exp() * (theirs - ours)).sum(-1).max() < 1e-4


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_zero_shot_head_answers_as_the_pipeline_of_transformers(folders, name):
    spec = f"hf-zero-shot:{folders / name}?template=this is {{}}, yes"
    model = build_model(spec, num_classes=3, input_shape=(3, 32, 32), class_names=NAMES)
    net = transformers.AutoModel.from_pretrained(folders / name).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / name)
    processor = transformers.AutoImageProcessor.from_pretrained(folders / name)
    pipe = transformers.pipeline(
        "zero-shot-image-classification", model=net, tokenizer=tokenizer, image_processor=processor
    )
    labels = ["tabby cat", "dog", "red newt"]
    images = [Image.fromarray(x) for x in pictures()]
    answers = pipe(images, candidate_labels=labels, hypothesis_template="this is {}, yes")
    expected = torch.tensor(
        [[{a["label"]: a["score"] for a in found}[label] for label in labels] for found in answers]
    )
    with torch.inference_mode():
        logits = model(processor(images, return_tensors="pt")["pixel_values"])
    found = logits.sigmoid() if name == "siglip" else logits.softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    _, inputs = views_and_inputs(spec)
    with torch.inference_mode():
        assert (model(inputs).softmax(-1) - logits.softmax(-1)).abs().max() < 0.01


def test_several_templates_are_averaged_as_in_clips_paper(folders, tmp_path):
    (tmp_path / "templates.txt").write_text("a {}.\nthe {} in a photo.\n")
    spec = f"hf-zero-shot:{folders / 'clip'}?templates={tmp_path / 'templates.txt'}"
    model = build_model(spec, num_classes=3, input_shape=(3, 32, 32), class_names=NAMES)
    net = transformers.CLIPModel.from_pretrained(folders / "clip").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / "clip")
    for number, name in enumerate(("tabby cat", "dog", "red newt")):
        inputs = tokenizer([f"a {name}.", f"the {name} in a photo."], return_tensors="pt", padding=True)
        with torch.inference_mode():
            features = net.get_text_features(**inputs).pooler_output
        mean = (features / features.norm(dim=-1, keepdim=True)).mean(0)
        torch.testing.assert_close(model.texts_VD[number], mean / mean.norm(), atol=1e-5, rtol=0)


def test_names_and_templates_are_in_the_identity(folders, tmp_path):
    folder = f"hf-zero-shot:{folders / 'clip'}"
    plain = teacher(folder)
    assert plain.identity() == teacher(folder).identity()
    (tmp_path / "names.json").write_text(json.dumps({"dog": "puppy", "tabby cat": "cat", "red_newt": "newt"}))
    others = [
        teacher(f"{folder}?template=a {{}}"),
        teacher(folder, ("tabby cat", "red_newt", "dog")),
        teacher(f"{folder}?names={tmp_path / 'names.json'}"),
    ]
    found = [other.identity()["teacher"] for other in (plain, *others)]
    assert len({facts["architecture"] for facts in found}) == 4
    assert len({facts["weights_digest"] for facts in found}) == 1


@pytest.mark.parametrize("names", [("0", "1", "2"), ("n01440764", "dog", "cat"), ()])
def test_a_zero_shot_head_without_names_is_refused(folders, names):
    with pytest.raises(SpecError, match=r"class names are no words.*names=FILE, or source\.class_names"):
        build_model(
            f"hf-zero-shot:{folders / 'clip'}", num_classes=3, input_shape=(3, 32, 32), class_names=names
        )


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("template=a photo", "template 'a photo' has no place {} for a name"),
        ("templates=missing.txt", r"templates missing\.txt: .*No such file"),
        ("prompt=x", "no argument 'prompt'; expected cache_dir, names, revision, template, templates"),
        ("template=" + 70 * "a" + "{}", "has more than the 64 tokens that the model reads"),
    ],
)
def test_texts_that_cannot_be_are_refused(folders, query, message):
    with pytest.raises(SpecError, match=message):
        build_model(
            f"hf-zero-shot:{folders / 'clip'}?{query}",
            num_classes=3,
            input_shape=(3, 32, 32),
            class_names=NAMES,
        )


def test_heads_of_another_size_and_order_are_refused(folders):
    spec = f"hf:{folders / 'vit'}"
    assert teacher(spec).architecture.startswith("HfImageClassifier:")
    with pytest.raises(
        ConfigError, match=r"head of hf:.*vit has 3 classes, the source has 2: transformers would make"
    ):
        teacher(spec, NAMES[:2])
    with pytest.raises(
        ConfigError, match="class 0 of the source is 'dog', output 0 is 'tabby cat'; set teacher"
    ):
        teacher(spec, ("dog", "tabby cat", "red newt"))
    mapped = teacher(spec, ("dog", "tabby cat"), class_map="auto")
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    torch.testing.assert_close(mapped.logits(images), teacher(spec).logits(images)[:, [1, 0]])
    teacher(spec, ("n1", "n2", "n3"))  # called otherwise: in the same order, and logged
    for key, value in (("class_map", "auto"), ("weights", "x.safetensors")):
        with pytest.raises(ConfigError, match=f"teacher.{key}: hf-zero-shot:.* drop it"):
            teacher(f"hf-zero-shot:{folders / 'clip'}", **{key: value})


def test_a_head_of_sigmoids_is_for_images_with_several_classes(folders, tmp_path):
    net = transformers.ViTForImageClassification.from_pretrained(folders / "vit")
    for problem, kind, wanted in (
        ("multi_label_classification", ImageTeacher, "multi_label"),
        ("single_label_classification", MultiLabelTeacher, "image"),
    ):
        net.config.problem_type = problem
        net.save_pretrained(tmp_path)
        with pytest.raises(
            ConfigError, match=f'problem_type in its config.*set source.modality = "{wanted}"'
        ):
            teacher(f"hf:{tmp_path}", kind=kind)
        other = MultiLabelTeacher if kind is ImageTeacher else ImageTeacher
        assert teacher(f"hf:{tmp_path}", kind=other).num_classes == 3


def test_a_checkpoint_without_its_head_is_no_teacher(folders, tmp_path):
    transformers.ViTModel.from_pretrained(folders / "vit").save_pretrained(tmp_path)
    with pytest.raises(
        SpecError, match=r"of its weights are not in the checkpoint and would be random, such as clas"
    ):
        teacher(f"hf:{tmp_path}")
    with pytest.raises(ConfigError, match=r"teacher\.weights: missing, and hf-config:.* would be random"):
        teacher(f"hf-config:{tmp_path}")
    student = build_model(f"hf:{tmp_path}", num_classes=7, input_shape=(1, 32, 32))
    assert student(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    fresh = build_model(f"hf-config:{tmp_path}", num_classes=5, input_shape=(3, 32, 32))
    assert fresh(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


def test_a_folder_with_an_adapter_is_refused(folders, tmp_path):
    shutil.copytree(folders / "vit", tmp_path / "vit")
    (tmp_path / "vit" / "adapter_config.json").write_text("{}")
    with pytest.raises(SpecError, match=r"vit has an adapter of peft .*merge_and_unload"):
        teacher(f"hf:{tmp_path}/vit")


def test_what_is_no_model_and_a_size_that_it_does_not_take_are_named(folders):
    with pytest.raises(SpecError, match=r"model 'hf:/nowhere': .*expected a name on the hub, or a folder"):
        teacher("hf:/nowhere")
    with pytest.raises(
        SpecError, match=r"cannot be built for 3 classes and images of \(3, 16, 16\): ValueError"
    ):
        build_model(f"hf:{folders / 'vit'}", num_classes=3, input_shape=(3, 16, 16))


def test_preprocessing_is_that_of_the_image_processor(folders, tmp_path):
    found = {name: pretrained_views(parse_spec(f"hf:{folders / name}")) for name in ("vit", "convnext")}
    assert found["vit"] == {
        "geometry": "floor",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "size": 32,
        "fit": "stretch",
        "interpolation": "bilinear",
    }
    assert (found["convnext"]["size"], found["convnext"]["eval_share"]) == (32, 0.8)
    clip = pretrained_views(parse_spec(f"hf-zero-shot:{folders / 'clip'}"))
    assert (clip["size"], clip["eval_share"], clip["interpolation"]) == (32, 32 / 36, "bicubic")
    assert architecture_of(build_model("linear", num_classes=2, input_shape=(3, 4, 4)), "linear") == "linear"


PROCESSORS = {
    "DeiTImageProcessor": {},  # stretched, then cropped
    "LevitImageProcessor": {},  # scales by 256/224 beforehand
    "PoolFormerImageProcessor": {},  # by its crop_pct
    "EfficientNetImageProcessor": {"image_std": [0.478, 0.473, 0.474]},  # divides by it twice
    "EfficientNetImageProcessorPil": {
        "rescale_offset": True,
        "rescale_factor": 1 / 127.5,
        "include_top": False,
    },
    "PPLCNetImageProcessor": {},  # turns RGB into BGR
    "ViTImageProcessor": {"do_normalize": False, "do_rescale": False},
    "MobileViTImageProcessor": {"size": {"shortest_edge": 288}},
    "TextNetImageProcessor": {"size": {"shortest_edge": 64}},  # of square pictures
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_views_are_what_a_processor_of_its_own_kind_makes(tmp_path, name):
    processor = getattr(transformers, name)(**PROCESSORS[name])
    processor.save_pretrained(tmp_path)
    found = pretrained_views(parse_spec(f"hf:{tmp_path}"))
    settings = ViewSettings.model_validate(found)
    picture = np.array(Image.fromarray(pictures()[3]).resize((300, 300 if "TextNet" in name else 200)))
    expected = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0].float()
    image = torch.from_numpy(picture).permute(2, 0, 1).contiguous()
    made = Normalize(settings.mean, settings.std)(Views(settings).apply(image, key="", view=0)[None])
    seen = []
    net = torch.nn.Module()
    net.config = transformers.ViTConfig()
    net.forward = lambda pixel_values: (
        seen.append(pixel_values[0]) or transformers.utils.ModelOutput(logits=None)
    )
    HfImageClassifier(net, is_bgr=is_bgr(processor))(made)
    assert (seen[0] - expected).abs().max() < 2.1 / 255 / min(settings.std)  # two grey levels, of rounding


def test_whether_a_processor_reverses_channels_is_what_it_does_whatever_its_name():
    class Renamed(transformers.PPLCNetImageProcessor):
        pass

    class Forward(transformers.PPLCNetImageProcessor):
        def _preprocess(self, images, **options):
            made = super()._preprocess(images, **options)
            made["pixel_values"] = made["pixel_values"].flip(1)
            return made

    Forward.__name__ = "PPLCNetImageProcessor"
    assert is_bgr(Renamed())
    assert not is_bgr(Forward())
    assert is_bgr(transformers.MobileViTImageProcessor())
    assert not is_bgr(transformers.MobileViTImageProcessor(do_flip_channel_order=False))
    assert not is_bgr(transformers.ViTImageProcessor())
    assert not is_bgr(None)


def test_a_processor_that_does_what_views_cannot_is_refused_unless_the_config_says_what_is_seen(tmp_path):
    transformers.DonutImageProcessor(size={"height": 64, "width": 48}).save_pretrained(tmp_path)
    spec = parse_spec(f"hf:{tmp_path}")
    with pytest.raises(
        SpecError, match=r"Donut.* makes of a picture: values that differ .*set views\.size, mean and std"
    ):
        pretrained_views(spec, {"size"})
    assert pretrained_views(spec, {"size", "mean", "std"})["mean"] == (0.5, 0.5, 0.5)
    transformers.Siglip2ImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=r"set views\.size, fit and eval_share"):
        pretrained_views(spec)
    assert "size" not in pretrained_views(spec, {"size", "mean", "std"})


def test_a_model_of_timm_is_named_as_such(tmp_path):
    import timm

    net = timm.create_model("test_vit", num_classes=3)
    config = transformers.TimmWrapperConfig.from_dict(
        {"architecture": "test_vit", "num_classes": 3, "pretrained_cfg": dict(net.pretrained_cfg)}
    )
    transformers.TimmWrapperForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=r"a model of timm; name it timm:hf-hub:.*, or timm:local-dir:FOLDER"):
        pretrained_views(parse_spec(f"hf:{tmp_path}"))


def test_an_order_of_classes_that_was_guessed_has_to_be_given():
    names = ("b10", "b9")
    with pytest.raises(
        ConfigError, match=r'set source\.class_order to "natural" \(timm\) or "lexicographic"'
    ):
        check_class_order(names, (), spec="timm:x", order_is_guessed=True)
    with pytest.raises(
        ConfigError, match=r"is that of other names \(nine, ten, …\), and the source's classes are sorted as"
    ):
        check_class_order(names, ("nine", "ten"), spec="hf:x", order_is_guessed=True)
    check_class_order(names, ("nine", "ten"), spec="hf:x")
    check_class_order(names, names, spec="timm:x", order_is_guessed=True)
    check_class_order(names, (), spec="timm:x")
    with pytest.raises(ConfigError, match="class 0 of the source is 'b10', output 0 is 'b9'"):
        check_class_order(names, names[::-1], spec="timm:x")
