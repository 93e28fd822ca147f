"""Pretrained encoder-decoder checkpoints, `hf:FOLDER`, as teachers and students of pairs.

Nothing is downloaded: tiny models are saved as transformers saves them, with what differs between real ones: T5's padded head
and its scale of tied embeddings, T5 1.1's gated feed-forward and own head, Marian's padding token at the vocabulary's end, its
bias, and its dropout.
"""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from softcache.cache.storage.local import LocalObjects
from softcache.data.sources import source_settings
from softcache.errors import IdentityError, MissingExtraError, SpecError
from softcache.runs import capture_labels, open_data, open_teacher, train_student
from softcache.teacher.generate import generate_source
from softcache.tools.verify.teacher import verify_against_teacher, verify_units
from tests.support.translations import NOUNS, VERBS, translation_config, write_pairs

WORDS = sorted({*NOUNS, *VERBS, *NOUNS.values(), *VERBS.values()})


def save_t5(folder, *, v1_1=False):
    """A T5 whose head has more rows than the tokenizer has tokens, as all real ones have."""
    letters = [(letter, -3.0) for letter in sorted(set("".join(WORDS)))]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words = [(f"▁{word}", -5.0) for word in WORDS[:-3]]  # the last words fall into letters
    extra = [(f"<extra_id_{number}>", 0.0) for number in (1, 0)]
    T5Tokenizer(vocab=[*special, *letters, *words, *extra], extra_ids=2).save_pretrained(folder)
    how = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if v1_1 else {}
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = T5Config(vocab_size=128, decoder_start_token_id=0, **sizes, **how)
        T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def save_marian(folder, tokenizer=None):
    """A Marian as OPUS-MT has them: </s> is token 0, and the decoder starts with the padding token, the last of all."""
    vocab = {word: number for number, word in enumerate(["</s>", "<unk>", *WORDS, "<pad>"])}
    if tokenizer is None:
        words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )
    tokenizer.save_pretrained(folder)
    pad = tokenizer.pad_token_id
    layers = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = MarianMTModel(
            MarianConfig(
                vocab_size=len(tokenizer), d_model=16, max_position_embeddings=65, scale_embedding=True, **layers,
                activation_function="swish", pad_token_id=pad, decoder_start_token_id=pad, eos_token_id=0,
                forced_eos_token_id=0,
            )
        )  # fmt: skip
        model.final_logits_bias.normal_()
    model.generation_config.bad_words_ids, model.generation_config.num_beams = [[pad]], 4
    model.save_pretrained(folder)
    return folder


def save_sentencepiece_marian(folder):
    """The same with the tokenizer that OPUS-MT has: two SentencePiece models and one vocabulary."""
    spm = pytest.importorskip("sentencepiece")
    from transformers import MarianTokenizer

    folder.mkdir()
    pieces = ["</s>", "<unk>"]
    for side, words in (("source", {**NOUNS, **VERBS}), ("target", {**NOUNS, **VERBS}.values())):
        with (folder / f"{side}.model").open("wb") as file:
            spm.SentencePieceTrainer.train(
                sentence_iterator=iter([" ".join(words)] * 4), model_writer=file, vocab_size=40,
                hard_vocab_limit=False, minloglevel=2,
            )  # fmt: skip
        loaded = spm.SentencePieceProcessor(model_file=str(folder / f"{side}.model"))
        pieces += [loaded.id_to_piece(number) for number in range(3, loaded.get_piece_size())]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, "<pad>"]))}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    files = {f"{side}_spm": str(folder / f"{side}.model") for side in ("source", "target")}
    return save_marian(folder, MarianTokenizer(vocab=str(folder / "vocab.json"), **files))


SAVE = {
    "t5": save_t5,
    "t5 1.1": lambda folder: save_t5(folder, v1_1=True),
    "marian": save_marian,
    "marian with sentencepiece": save_sentencepiece_marian,
}


def config_of(folder, checkpoint, **tables):
    """A run whose teacher, student and tokens are those of a checkpoint."""
    if not (folder / "pairs.jsonl").exists():
        write_pairs(folder / "pairs.jsonl", num_pairs=24)
    tables = {"source": {"tokenizer": str(checkpoint)}, "teacher": {"model": f"hf:{checkpoint}"}} | tables
    return translation_config(folder, student={"model": f"hf:{checkpoint}"}, **tables)


@pytest.fixture(scope="module", params=SAVE.values(), ids=SAVE.keys())
def labeled(request, tmp_path_factory):
    """(folder, checkpoint, config, data, teacher, cache)"""
    folder = tmp_path_factory.mktemp("pretrained")
    checkpoint = request.param(folder / "checkpoint")
    config = config_of(folder, checkpoint)
    data = open_data(config)
    teacher = open_teacher(config, data)
    return (
        folder,
        checkpoint,
        config,
        data,
        teacher,
        capture_labels(config, data, teacher, str(folder / "cache"))[0],
    )


def test_labels_are_what_transformers_itself_says_of_a_pair(labeled):
    """Tokens, their ends and the decoder's start as the checkpoint was trained with; no row of a padded head is kept out."""
    _, checkpoint, _, data, teacher, cache = labeled
    assert list(verify_units(cache)) == []
    assert not list(
        verify_against_teacher(cache, data.train, teacher, num_rows=30, threshold_nats=1e-4, seed=0)
    )
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert cache.num_classes == model.config.vocab_size >= data.num_classes == len(tokenizer)
    for sample in (0, 5):
        pair, labels = data.pairs_by_key("train")[data.train.source.key(sample)], cache.read([sample])
        given = tokenizer(pair.source, text_target=pair.target, return_tensors="pt")
        with torch.no_grad():
            best = model(**given).logits[0].log_softmax(-1).topk(labels.ids.shape[1])
        assert np.array_equal(labels.ids, best.indices.numpy())
        np.testing.assert_allclose(labels.log_probs, best.values.numpy(), atol=5e-3, rtol=5e-3)


def test_a_pretrained_student_learns_from_the_cache_and_is_scored(labeled, tmp_path):
    _, checkpoint, config, data, _, cache = labeled
    spec = f"hf:{checkpoint}"
    metrics = train_student(config, data, model=spec, labels="cache", cache=cache, out=tmp_path / "run")
    assert {"chrf_de", "bleu_de"} <= metrics.keys()
    trained = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "hf")
    assert trained.config.vocab_size == cache.num_classes
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")) == data.num_classes
    before = AutoModelForSeq2SeqLM.from_pretrained(checkpoint).state_dict()
    moved = [name for name, value in trained.state_dict().items() if not torch.equal(value, before[name])]
    assert moved


def test_what_a_pretrained_teacher_wrote_is_read_with_its_tokenizer(labeled):
    folder, _, config, data, teacher, _ = labeled
    generate_source(LocalObjects(folder / "generated", create=True), data, teacher, config.generate)
    source = {"modality": "translation", "name": "generated", "path": str(folder / "generated")}
    source |= {"data_dir": str(folder / "data"), "max_tokens": 400}
    theirs = open_data(config.model_copy(update={"source": source_settings(source)}))
    assert theirs.train.source.tokenizer_digest == data.train.source.tokenizer_digest
    assert (theirs.tokens, theirs.num_classes) == (data.tokens, data.num_classes)


def test_a_checkpoint_of_another_vocabulary_is_refused_as_teacher_and_as_student(tmp_path):
    t5, marian = save_t5(tmp_path / "t5"), save_marian(tmp_path / "marian")
    config = config_of(tmp_path, t5)
    data = open_data(config)
    with pytest.raises(
        IdentityError, match=r"student\.model hf:.*marian: its tokenizer .* set source\.tokenizer"
    ):
        train_student(config, data, model=f"hf:{marian}", labels="ground_truth", out=tmp_path / "run")
    other = config_of(tmp_path, t5, teacher={"model": f"hf:{marian}"})
    with pytest.raises(
        IdentityError, match=r"teacher\.model hf:.*marian: its tokenizer .* set source\.tokenizer"
    ):
        open_teacher(other, data)


def test_checkpoints_that_are_no_translators_of_these_tokens_are_refused_by_name(tmp_path):
    t5 = save_t5(tmp_path / "t5")
    data = open_data(config_of(tmp_path, t5))

    def opened(spec):
        return open_teacher(config_of(tmp_path, t5, teacher={"model": spec}), data)

    settings = json.loads((t5 / "config.json").read_text())
    (t5 / "config.json").write_text(json.dumps(settings | {"decoder_start_token_id": 5}))
    with pytest.raises(
        SpecError, match=r"its decoder starts with token 5; expected 0, the tokenizer's padding"
    ):
        opened(f"hf:{t5}")
    GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "gpt2"
    )
    with pytest.raises(SpecError, match=r"model 'hf:.*gpt2': .*GPT2Config"):
        opened(f"hf:{tmp_path / 'gpt2'}")
    with pytest.raises(SpecError, match=r"no such folder: .*nowhere"):
        opened(f"hf:{tmp_path / 'nowhere'}")
    marian = save_marian(tmp_path / "marian")
    longer = config_of(tmp_path, marian, source={"tokenizer": str(marian), "max_tokens": 65})
    with pytest.raises(SpecError, match=r"at most 65 tokens; found rows of 66; .* source\.max_tokens"):
        open_teacher(longer, open_data(longer))


def test_both_sides_begin_as_the_tokenizer_begins_a_text(tmp_path):
    """CodeT5 is a T5 with a tokenizer of RoBERTa's: <s> and </s> around what it was trained on, labels included."""
    vocab = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(tmp_path / "codet5")
    T5ForConditionalGeneration(
        T5Config(vocab_size=len(vocab), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, eos_token_id=2, decoder_start_token_id=0)
    ).save_pretrained(tmp_path / "codet5")  # fmt: skip
    config = config_of(tmp_path, tmp_path / "codet5")
    data = open_data(config)
    model = open_teacher(config, data).model
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "codet5")
    for number, pair in enumerate(data.pairs_by_key("train").values()):
        sample = data.train.source.sample(number)
        assert sample.tokens[sample.segments == 0].tolist() == tokenizer(pair.source)["input_ids"]
        labels = tokenizer(text_target=pair.target)["input_ids"]
        given = model.prepare_decoder_input_ids_from_labels(torch.tensor([labels]))[0].tolist()
        assert sample.tokens[sample.segments == 1].tolist() == [*given, labels[-1]]
        assert data.decode([labels]) == [pair.target]


def test_a_tokenizer_whose_package_is_missing_names_what_to_install(tmp_path, monkeypatch):
    t5 = save_t5(tmp_path / "t5")
    config = config_of(tmp_path, t5)
    data = open_data(config)

    def missing(*args, **kwargs):
        raise ImportError("\nMarianTokenizer requires the SentencePiece library. Check out the instructions")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", missing)
    message = r"MarianTokenizer requires the SentencePiece library; pip install 'softcache\[translation\]'"
    with pytest.raises(MissingExtraError, match=rf"^source\.tokenizer '.*t5': .*{message}$"):
        open_data(config)
    with pytest.raises(MissingExtraError, match=rf"^model 'hf:.*t5': .*{message}$"):
        open_teacher(config, data)
