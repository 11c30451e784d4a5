from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tenslora.errors import TensLoRAError
from tenslora.harness.backbones import load_tokenizer
from tests.harness.backbones.tiny_models import SENTENCES, TEXT, trained_tokenizer, transformers_text


def test_minilms_tokenizer_is_its_own(shared: Path) -> None:
    config = transformers_text(pretrained=True, checkpoint=str(shared / "models" / "minilm_l6"))
    tokenizer = load_tokenizer(config, [])
    ids = tokenizer("A cat.", "No!")
    assert tokenizer.convert_ids_to_tokens(ids["input_ids"]) == ["[CLS]", "a", "cat", ".", "[SEP]", "no", "!", "[SEP]"]
    assert ids["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("content", [None, "config only", "tokenizer cut"])
def test_a_missing_or_broken_tokenizer_is_refused_in_one_line(content: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if content:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(TEXT["bert"]))
    if content == "tokenizer cut":
        trained_tokenizer().save_pretrained(folder)
        (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:500])
    with pytest.raises(TensLoRAError, match=r"model\.checkpoint=\S*model: ") as caught:
        load_tokenizer(transformers_text(pretrained=True, checkpoint=str(folder)), SENTENCES)
    assert "\n" not in str(caught.value)
    assert content or "no such folder" in str(caught.value)


def test_a_tokenizer_without_its_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TEXT["bert"]))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}')
    with pytest.raises(TensLoRAError, match=r"\(its tokenizer, a BertJapaneseTokenizer, cannot be loaded: .*\)$"):
        load_tokenizer(transformers_text(pretrained=True, checkpoint=str(tmp_path)), SENTENCES)


def test_a_tokenizer_without_a_token_to_pad_with_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TEXT["bert"]))
    plain = Tokenizer(WordLevel({"a": 0, "cat": 1}))
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path)
    with pytest.raises(TensLoRAError, match=r"model\.checkpoint=\S*: its tokenizer has no token to pad texts with"):
        load_tokenizer(transformers_text(pretrained=True, checkpoint=str(tmp_path)), SENTENCES)


def test_a_text_has_the_same_tokens_each_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "config.json").write_text(json.dumps(TEXT["bert"]))
    plain, text = trained_tokenizer(), " ".join(SENTENCES[0])
    plain.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "model": {**content["model"], "dropout": 0.5}}))
    tokenizer = load_tokenizer(transformers_text(pretrained=True, checkpoint=str(tmp_path)), SENTENCES)
    assert {tuple(tokenizer.tokenize(text)) for _ in range(20)} == {tuple(plain.tokenize(text))}
    assert "its tokenizer draws tokens at random (dropout 0.5), which is switched off" in caplog.text


@pytest.mark.parametrize("names", [[], "input_ids", ["attention_mask"], ["input_ids", 1]])
def test_inputs_that_no_tokenizer_gives_are_refused(names: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TEXT["bert"]))
    trained_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_input_names": names}))
    line = r"^model\.checkpoint=\S+: its tokenizer's model_input_names=.*: must be a list of texts, input_ids first"
    with pytest.raises(TensLoRAError, match=line):
        load_tokenizer(transformers_text(pretrained=True, checkpoint=str(tmp_path)), SENTENCES)


def test_the_trained_tokenizer_is_deterministic() -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 9))) for _ in range(400)]
    corpus = [(" ".join(rng.choices(words, k=12)), " ".join(rng.choices(words, k=5)) + " é") for _ in range(300)]
    first = load_tokenizer(transformers_text(), corpus)
    load_tokenizer(transformers_text(), SENTENCES)  # takes the place of the first one in the cache
    second = load_tokenizer(transformers_text(), corpus)
    assert first is not second
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) > 400  # it has learned merges


def test_the_trained_tokenizer_encodes_pairs_as_roberta_does() -> None:
    tokenizer = trained_tokenizer()
    for first, second in SENTENCES:
        first_ids, second_ids = (tokenizer(sentence)["input_ids"] for sentence in (first, second))
        assert (first_ids[0], first_ids[-1], second_ids[0], second_ids[-1]) == (0, 2, 0, 2)
        pair = tokenizer(first, second)
        assert pair["input_ids"] == [*first_ids, 2, *second_ids[1:]]
        assert set(pair) == {"input_ids", "attention_mask"}
        assert tokenizer.decode(first_ids[1:-1]).strip() == first
    assert (tokenizer.pad_token_id, tokenizer.pad_token) == (1, "<pad>")


def test_the_trained_tokenizer_knows_every_byte() -> None:
    tokenizer = trained_tokenizer()
    text = "Ωmega ☃ \U0001f600 \x07"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.strip()
