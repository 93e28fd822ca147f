"""A model's tokenizer is compared with the source's by what the ids mean that occur."""

import pytest
from transformers import AutoTokenizer

from softcache.data.sources import source_settings
from softcache.data.sources.text.source import open_text
from softcache.data.sources.text.tokenizer import accept_tokenizer
from softcache.errors import IdentityError
from tests.data.test_text_source import WORDS, save_tokenizer, write_texts


@pytest.fixture
def source_of(tmp_path):
    def open_(tokenizer, texts=("w10 w11", "w12 w13")):
        table = {
            "modality": "text",
            "name": "hf",
            "path": str(write_texts(tmp_path / "docs.jsonl", list(texts))),
        }
        table |= {"tokenizer": tokenizer, "eval_share": 1e-9, "data_dir": str(tmp_path / "data")}
        return open_text(source_settings(table), split="train")

    return open_


def changed(folder, path, change):
    tokenizer = AutoTokenizer.from_pretrained(path)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_an_added_pad_token_is_accepted_and_listed(source_of, tmp_path, capfd):
    path = save_tokenizer(tmp_path / "t")
    other = changed(tmp_path / "o", path, lambda t: t.add_special_tokens({"pad_token": "<pad>"}))
    source = source_of(path)
    capfd.readouterr()
    accept_tokenizer(AutoTokenizer.from_pretrained(path), source, of="the same")
    assert capfd.readouterr().err == ""
    accept_tokenizer(other, source, of="student.model hf:x")
    assert f"in tokens that no text here has: <pad> ({len(WORDS)})" in capfd.readouterr().err


def test_other_flags_of_a_token_are_accepted(source_of, tmp_path, capfd):
    path = save_tokenizer(tmp_path / "t")
    other = changed(
        tmp_path / "o", path, lambda t: t.add_special_tokens({"additional_special_tokens": ["w150"]})
    )
    accept_tokenizer(other, source_of(path), of="x")
    assert "in tokens that no text here has: w150 (150)" in capfd.readouterr().err


def test_a_source_may_have_a_token_that_the_model_lacks_unless_a_text_has_it(source_of, tmp_path):
    path = save_tokenizer(tmp_path / "t")
    bare = AutoTokenizer.from_pretrained(path)
    changed(tmp_path / "o", path, lambda t: t.add_tokens(["<x>"]))
    accept_tokenizer(bare, source_of(str(tmp_path / "o")), of="x")
    with pytest.raises(IdentityError, match=rf"it lacks token {len(WORDS)}, '<x>', which texts here have"):
        accept_tokenizer(bare, source_of(str(tmp_path / "o"), texts=["w10 <x> w11"]), of="x")


def test_an_id_of_another_token_is_refused(source_of, tmp_path):
    path = save_tokenizer(tmp_path / "t")
    one = changed(tmp_path / "one", path, lambda t: t.add_tokens(["<x>"]))
    changed(tmp_path / "two", path, lambda t: t.add_tokens(["<y>"]))
    with pytest.raises(IdentityError, match=rf"its token {len(WORDS)} is '<x>', here '<y>'"):
        accept_tokenizer(one, source_of(str(tmp_path / "two")), of="x")


def test_another_vocabulary_is_refused(source_of, tmp_path):
    other = save_tokenizer(tmp_path / "o", words=[*WORDS[:3], *reversed(WORDS[3:])])
    with pytest.raises(
        IdentityError, match="it cuts texts otherwise, so a label of token i would be read as another"
    ):
        accept_tokenizer(
            AutoTokenizer.from_pretrained(other), source_of(save_tokenizer(tmp_path / "t")), of="x"
        )
