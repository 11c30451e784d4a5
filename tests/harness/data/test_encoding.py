from __future__ import annotations

import multiprocessing
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tenslora.errors import TensLoRAError
from tenslora.harness.backbones import Backbone, load_tokenizer
from tenslora.harness.backbones.image_input import ImageInput
from tenslora.harness.config import ImageDatasetConfig, TextDatasetConfig, TransformConfig
from tenslora.harness.data.batches import TrainBatches
from tenslora.harness.data.encoding import Collate, Encoded, encode
from tenslora.harness.data.examples import Dataset, Examples, ImageFiles
from tests.harness.backbones.tiny_models import transformers_text

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def backbone_of(channels: int = 3) -> Backbone:
    """A backbone that takes images of 8 x 8 pixels."""
    image_input = ImageInput(8, channels, MEAN[:channels], STD[:channels])
    return Backbone(torch.nn.Identity(), [], "pixels", image_input)


# What the examples of a dataset are has no part in how they are encoded.
DATASET: dict[str, Any] = {
    "name": "tiny",
    "root": None,
    "metrics": ("accuracy",),
    "train_splits": None,
    "test_split": None,
    "train_size": None,
}


def pictures(count: int = 3, size: tuple[int, int] = (40, 20), mode: str = "RGB") -> Examples:
    rng = np.random.default_rng(7)
    shape = (count, size[1], size[0]) if mode == "L" else (count, size[1], size[0], 3)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    return Examples([Image.fromarray(array) for array in pixels], list(range(count)))


def encode_pictures(examples: Examples, backbone: Backbone, **changes: Any) -> tuple[Encoded, Encoded, Collate]:
    transform = replace(TransformConfig(1.0, True, "bilinear", 0.0, False, True), **changes)
    config = ImageDatasetConfig(**DATASET, modality="image", train_fraction=None, transform=transform)
    data = encode(Dataset(examples, examples, ()), config, backbone, None)
    return data.train, data.scored, data.collate


def pixels_of(data: Encoded, collate: Collate, index: int) -> Tensor:
    """What the model is given of one example."""
    inputs, _ = collate([data[index]])
    return inputs["pixels"][0]


def scaled(image: Image.Image, mean: Sequence[float] | None = MEAN, std: Sequence[float] = STD) -> Tensor:
    array = np.asarray(image, dtype=np.float64) / 255
    if array.ndim == 2:
        array = array[..., None]
    if mean is not None:
        channels = array.shape[-1]
        array = (array - np.array(mean[:channels])) / np.array(std[:channels])
    return torch.tensor(array.transpose(2, 0, 1), dtype=torch.float32)


@pytest.mark.parametrize(
    ("interpolation", "resample"), [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)]
)
@pytest.mark.parametrize(
    ("crop_ratio", "squash", "resized", "box"),
    [
        (1.0, True, (8, 8), (0, 0, 8, 8)),
        (1.0, False, (16, 8), (4, 0, 12, 8)),
        (0.5, True, (16, 16), (4, 4, 12, 12)),
        (0.5, False, (32, 16), (12, 4, 20, 12)),
    ],
)
def test_images_are_resized_cropped_and_normalized_as_pil_and_numpy_do(
    interpolation: str,
    resample: Image.Resampling,
    crop_ratio: float,
    squash: bool,
    resized: tuple[int, int],
    box: tuple[int, int, int, int],
) -> None:
    examples = pictures()
    _, test, collate = encode_pictures(
        examples, backbone_of(), crop_ratio=crop_ratio, squash=squash, interpolation=interpolation
    )
    for index, image in enumerate(examples.inputs):
        expected = scaled(image.resize(resized, resample).crop(box))
        torch.testing.assert_close(pixels_of(test, collate, index), expected)
        assert test[index][1] == index


def test_without_normalize_pixels_stay_between_0_and_1() -> None:
    examples = pictures(size=(8, 8))
    _, test, collate = encode_pictures(examples, backbone_of(), normalize=False)
    torch.testing.assert_close(pixels_of(test, collate, 1), scaled(examples.inputs[1], mean=None))


def test_imagenets_mean_and_std_are_timms() -> None:
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    examples = pictures(size=(8, 8))
    _, test, collate = encode_pictures(examples, backbone_of(), normalize="imagenet")
    expected = scaled(examples.inputs[1], IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    torch.testing.assert_close(pixels_of(test, collate, 1), expected)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_gets_the_models_channels(mode: str, channels: int) -> None:
    examples = pictures(size=(8, 8), mode=mode)
    _, test, collate = encode_pictures(examples, backbone_of(channels))
    expected = scaled(examples.inputs[0].convert("L" if channels == 1 else "RGB"))
    torch.testing.assert_close(pixels_of(test, collate, 0), expected)


def test_a_batch_of_images_has_the_models_name_for_them() -> None:
    train, _, collate = encode_pictures(pictures(), backbone_of())
    inputs, labels = collate([train[2], train[0]])
    assert inputs.keys() == {"pixels"}
    assert (inputs["pixels"].shape, inputs["pixels"].dtype) == ((2, 3, 8, 8), torch.float32)
    assert (labels.tolist(), labels.dtype) == ([2, 0], torch.int64)


def by_example(data: Encoded, collate: Collate, epoch: int, seed: int = 0, **share: Any) -> dict[int, Tensor]:
    source = TrainBatches(data, collate, batch_size=4, seed=seed, **share)
    return {
        label: pixels
        for batch in source.epoch(epoch)
        for label, pixels in zip(batch.labels.tolist(), batch.inputs["pixels"], strict=True)
    }


def test_flip_mirrors_half_of_the_training_images_and_no_test_image() -> None:
    examples = pictures(10, (8, 8))
    train, test, collate = encode_pictures(examples, backbone_of(), flip=True)
    plain = [scaled(image) for image in examples.inputs]
    mirrored = 0
    for epoch in range(10):
        for index, pixels in by_example(train, collate, epoch).items():
            flipped = torch.allclose(pixels, plain[index].flip(-1), atol=1e-6)
            assert flipped or torch.allclose(pixels, plain[index], atol=1e-6)
            mirrored += flipped
            torch.testing.assert_close(pixels_of(test, collate, index), plain[index])
    assert 30 < mirrored < 70


def test_color_jitter_changes_half_of_the_training_images_and_no_test_image() -> None:
    examples = pictures(10, (8, 8))
    train, test, collate = encode_pictures(examples, backbone_of(), color_jitter=0.4)
    plain = [scaled(image) for image in examples.inputs]
    epochs = [by_example(train, collate, epoch) for epoch in range(10)]
    untouched = sum(torch.allclose(draw[i], plain[i], atol=1e-6) for draw in epochs for i in draw)
    assert 30 < untouched < 70
    assert len({pixels.numpy().tobytes() for draw in epochs for pixels in draw.values()}) > 30
    for index in range(10):
        torch.testing.assert_close(pixels_of(test, collate, index), plain[index])


def test_augmentation_is_a_function_of_seed_epoch_and_example_alone() -> None:
    examples = pictures(10, (8, 8))

    def draws(epoch: int, seed: int = 0, **share: Any) -> dict[int, Tensor]:
        train, _, collate = encode_pictures(examples, backbone_of(), flip=True, color_jitter=0.4)
        return by_example(train, collate, epoch, seed, **share)

    def same(images: dict[int, Tensor], others: dict[int, Tensor]) -> bool:
        return all(torch.equal(images[index], others[index]) for index in others)

    drawn = draws(1)
    torch.manual_seed(5)
    assert same(drawn, draws(1))
    assert same(drawn, draws(1, workers=1))
    for process in (0, 1):
        assert same(drawn, draws(1, process=process, processes=2))
    assert not same(drawn, draws(2))
    assert not same(drawn, draws(1, seed=1))


def test_augmentation_leaves_the_global_random_state_alone() -> None:
    train, _, _ = encode_pictures(pictures(), backbone_of(), flip=True, color_jitter=0.4)
    before = torch.get_rng_state()
    train[0], train[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_examples_are_augmented_differently() -> None:
    image = pictures(1, (8, 8)).inputs[0]
    train, _, collate = encode_pictures(Examples([image] * 30, list(range(30))), backbone_of(), color_jitter=0.4)
    assert len({pixels.numpy().tobytes() for pixels in by_example(train, collate, 1).values()}) > 8


class CountedReads(Sequence[Any]):
    """Images that count how often each of them is read, over all processes."""

    def __init__(self, images: Sequence[Any]) -> None:
        self.images = images
        self.reads = multiprocessing.Array("i", len(images))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        with self.reads:
            self.reads[index] += 1
        return self.images[index]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("transform", [{}, {"flip": True, "color_jitter": 0.4}])
def test_an_image_is_read_once_for_all_epochs_even_by_workers(transform: dict[str, Any], workers: int) -> None:
    plain = pictures(10)
    counted = CountedReads(plain.inputs)
    train, _, collate = encode_pictures(Examples(counted, plain.labels), backbone_of(), **transform)
    reference, _, _ = encode_pictures(plain, backbone_of(), **transform)
    for epoch in (1, 2):
        encoded = by_example(train, collate, epoch, workers=workers)
        expected = by_example(reference, collate, epoch)
        assert all(torch.equal(encoded[index], expected[index]) for index in range(10))
    assert counted.reads[:] == [1] * 10


def test_images_that_would_fill_the_memory_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = pictures(4)
    for limit, reads in ((4 * 8 * 8 * 3, 1), (4 * 8 * 8 * 3 - 1, 2)):
        monkeypatch.setattr("tenslora.harness.data.encoding.CACHE_BYTES", limit)
        counted = CountedReads(plain.inputs)
        train, _, collate = encode_pictures(Examples(counted, plain.labels), backbone_of())
        by_example(train, collate, 1), by_example(train, collate, 2)
        assert counted.reads[:] == [reads] * 4


def test_a_source_that_has_come_to_an_end_does_not_end_the_epoch() -> None:
    class Shards(list[int]):
        def __getitem__(self, index: Any) -> Any:
            return next(iter([]))

    batches = TrainBatches(Encoded(Shards([1, 2]), [0, 1]), list, batch_size=1, seed=0)  # type: ignore[arg-type]
    with pytest.raises(TensLoRAError, match=r"^input \d of the data: its source raises StopIteration"):
        list(batches.epoch(1))


def test_encoded_images_can_be_pickled() -> None:
    train, _, collate = encode_pictures(pictures(), backbone_of(), flip=True)
    train.stream = (0, 1)
    copied = pickle.loads(pickle.dumps(train))
    assert all(torch.equal(pixels_of(copied, collate, i), pixels_of(train, collate, i)) for i in range(3))


PAIRS = [
    ("The cat sat on the mat.", "A cat sat."),
    ("It rained.", "The streets are wet because it rained all night, and all day."),
    ("Yes.", "No."),
]


def tokenizer_of(kind: str, request: pytest.FixtureRequest) -> Any:
    if kind == "bert":
        return AutoTokenizer.from_pretrained(request.getfixturevalue("shared") / "models" / "minilm_l6")
    return load_tokenizer(transformers_text(), PAIRS)


@pytest.fixture(params=["bpe", "bert"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tokenizer_of(request.param, request)


def encode_sentences(
    rows: Sequence[tuple[str, ...]],
    tokenizer: Any,
    max_length: int = 64,
    padding: str = "longest",
    grouped: bool = False,
    embedding_sizes: Mapping[str, int] | None = None,
    is_encoder_decoder: bool = False,
    end: int | None = None,
) -> tuple[Encoded, Encoded, Collate]:
    config = TextDatasetConfig(
        **DATASET, modality="text", max_length=max_length, padding=padding, group_by_length=grouped
    )
    examples = Examples(rows, [i % 2 for i in range(len(rows))])
    scored = Examples(rows, examples.labels)
    model: Any = torch.nn.Identity()
    model.config = SimpleNamespace(is_encoder_decoder=is_encoder_decoder, eos_token_id=end)
    if end is not None:
        model.classification_head = torch.nn.Identity()
    backbone = Backbone(model, [], "ids", embedding_sizes=embedding_sizes or {})
    data = encode(Dataset(examples, scored, ()), config, backbone, tokenizer)
    return data.train, data.scored, data.collate


def test_a_text_that_holds_the_token_of_its_end_is_refused_where_the_model_looks_for_it() -> None:
    tokenizer = load_tokenizer(transformers_text(), PAIRS)
    rows = [*PAIRS, (f"It {tokenizer.eos_token} rained.", "Yes.")]
    encode_sentences(rows, tokenizer)
    encode_sentences(PAIRS, tokenizer, is_encoder_decoder=True)
    with pytest.raises(TensLoRAError, match=rf"^training example 3, .*, holds the text {tokenizer.eos_token}, which"):
        encode_sentences(rows, tokenizer, is_encoder_decoder=True)


def test_a_tokenizer_without_the_end_token_of_its_model_is_refused() -> None:
    tokenizer = load_tokenizer(transformers_text(), PAIRS)
    encode_sentences(PAIRS, tokenizer, is_encoder_decoder=True, end=tokenizer.eos_token_id)
    with pytest.raises(TensLoRAError, match=r"^training example 0, .*: the tokenizer does not end it with token 3, by"):
        encode_sentences(PAIRS, tokenizer, is_encoder_decoder=True, end=tokenizer.unk_token_id)


def test_a_text_without_a_token_is_refused() -> None:
    letters = Tokenizer(BPE({"[PAD]": 0, "a": 1, "b": 2}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="[PAD]")
    encode_sentences([("a",), ("b",)], tokenizer)
    known, unknown = Examples([("a",), ("b",)], [0, 1]), Examples([("a",), ("猫",)], [0, 1])
    config = TextDatasetConfig(**DATASET, modality="text", max_length=8, padding="longest", group_by_length=False)
    backbone = Backbone(torch.nn.Identity(), [], "ids")
    # A loaded run has the examples that it answers in the place of those to train on.
    for train, test, split in ((unknown, known, "training "), (known, unknown, "test "), (unknown, unknown, "")):
        line = rf"^{split}example 1, from 0 on: the model's tokenizer finds no token .*, 猫; take"
        with pytest.raises(TensLoRAError, match=line):
            encode(Dataset(train, test, ()), config, backbone, tokenizer)


def test_pairs_are_encoded_as_the_tokenizer_encodes_a_pair(tokenizer: Any) -> None:
    train, test, collate = encode_sentences(PAIRS, tokenizer)
    for index, (first, second) in enumerate(PAIRS):
        expected = tokenizer(first, second)
        for data in (train, test):
            inputs, labels = collate([data[index]])
            assert {name: tensor[0].tolist() for name, tensor in inputs.items()} == dict(expected)
            assert labels.tolist() == [index % 2]


def test_bert_pairs_carry_segment_ids(request: pytest.FixtureRequest) -> None:
    train, _, collate = encode_sentences(PAIRS, tokenizer_of("bert", request))
    segments = collate([train[0]])[0]["token_type_ids"][0].tolist()
    assert set(segments) == {0, 1}
    assert segments == sorted(segments)


def test_single_sentences_are_encoded_as_the_tokenizer_encodes_one(tokenizer: Any) -> None:
    rows = [(first,) for first, _ in PAIRS]
    train, _, collate = encode_sentences(rows, tokenizer)
    for index, (sentence,) in enumerate(rows):
        assert collate([train[index]])[0]["input_ids"][0].tolist() == tokenizer(sentence)["input_ids"]


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_padding(padding: str, tokenizer: Any) -> None:
    train, _, collate = encode_sentences(PAIRS, tokenizer, 40, padding)
    lengths = [len(tokenizer(*pair)["input_ids"]) for pair in PAIRS]
    assert max(lengths) < 40
    for chosen in ([0, 1, 2], [2, 0]):
        inputs, _ = collate([train[i] for i in chosen])
        width = 40 if padding == "max_length" else max(lengths[i] for i in chosen)
        assert {tuple(tensor.shape) for tensor in inputs.values()} == {(len(chosen), width)}
        assert inputs["attention_mask"].sum(1).tolist() == [lengths[i] for i in chosen]
        assert (inputs["input_ids"][inputs["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_longer_texts_are_cut_and_keep_their_closing_token(tokenizer: Any) -> None:
    sentence = PAIRS[1][1]
    uncut = tokenizer(sentence)["input_ids"]
    train, _, collate = encode_sentences([(sentence,), PAIRS[2][:1]], tokenizer, max_length=8)
    inputs, _ = collate([train[0], train[1]])
    assert inputs["input_ids"][0].tolist() == [*uncut[:7], uncut[-1]]
    pair, _, collate = encode_sentences([PAIRS[1]], tokenizer, max_length=12)
    ids = collate([pair[0]])[0]["input_ids"][0].tolist()
    assert len(ids) == 12
    first = tokenizer(PAIRS[1][0])["input_ids"]
    assert ids[: len(first)] == first  # only the longer of the two is cut


def test_max_length_is_at_most_what_the_tokenizer_takes(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [(PAIRS[1][1],), PAIRS[2][:1]]
    long, short = (len(tokenizer(*row)["input_ids"]) for row in rows)
    assert long > short
    monkeypatch.setattr(tokenizer, "model_max_length", short)
    train, _, collate = encode_sentences(rows, tokenizer, max_length=512, padding="max_length")
    assert collate([train[0]])[0]["input_ids"].shape == (1, short)
    line = rf"=512: the tokenizer's own model_max_length \S+ is {short}, after which 1 of 2 training texts are cut\n"
    assert len(re.findall(line, caplog.text)) == 1
    # Nothing is said where the setting asks for it, and where no text is cut.
    for longest, max_length in ((short, short), (long, 512), (long + 1, 512)):
        monkeypatch.setattr(tokenizer, "model_max_length", longest)
        encode_sentences(rows, tokenizer, max_length=max_length)
    assert caplog.text.count("model_max_length") == 1


@pytest.mark.parametrize("longest", ["abc", 0, True, None])
def test_a_tokenizer_with_an_impossible_length_is_refused(
    tokenizer: Any, longest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "model_max_length", longest)
    with pytest.raises(TensLoRAError, match=rf"^the tokenizer's model_max_length={longest}: must be a number"):
        encode_sentences([(PAIRS[1][1],)], tokenizer)


def test_a_token_that_the_model_does_not_know_is_refused(tokenizer: Any) -> None:
    largest = max(token for pair in PAIRS for token in tokenizer(*pair)["input_ids"])
    encode_sentences(PAIRS, tokenizer, embedding_sizes={"input_ids": largest + 1})
    name = re.escape(repr(tokenizer.convert_ids_to_tokens(largest)))
    with pytest.raises(TensLoRAError, match=rf"gives {name} the number {largest}, .* {largest} tokens from 0 on"):
        encode_sentences(PAIRS, tokenizer, embedding_sizes={"input_ids": largest})


def test_a_pair_for_a_model_of_one_segment_is_refused(request: pytest.FixtureRequest) -> None:
    tokenizer = tokenizer_of("bert", request)
    encode_sentences(PAIRS, tokenizer, embedding_sizes={"token_type_ids": 2})
    with pytest.raises(TensLoRAError, match=r"the two sentences of a pair up to 1, and the model knows 1 segment; "):
        encode_sentences(PAIRS, tokenizer, embedding_sizes={"token_type_ids": 1})


@pytest.mark.parametrize("image", [(Image.new("RGB", (8, 8)), 0), None, np.zeros((8, 8, 3), np.uint8)])
def test_an_input_of_a_source_of_ones_own_that_is_no_image_is_named(image: Any) -> None:
    train, _, _ = encode_pictures(Examples([image], [0]), backbone_of())
    with pytest.raises(TensLoRAError, match=r"^input 0 of the data: is of type \w+; must be a PIL image$"):
        train[0]


def test_an_image_of_a_source_of_ones_own_has_pixels() -> None:
    train, _, _ = encode_pictures(Examples([Image.new("RGB", (0, 0))], [0]), backbone_of())
    with pytest.raises(TensLoRAError, match=r"^input 0 of the data: has a size of 0 x 0; must have pixels$"):
        train[0]


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("La", r"cannot be converted to RGB \(conversion from La to L not supported\)"),
        ("I;16", r"has pixels of more than 8 bits \(I;16\); save it with 8 bits"),
        ("closed", r"has been closed before it was read; call its load\(\) before"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_a_source_of_ones_own_is_refused_as_one_of_predict(
    mode: str, message: str, channels: int, tmp_path: Path
) -> None:
    image = Image.new("RGB" if mode == "closed" else mode, (8, 8))
    if mode == "closed":
        image.save(tmp_path / "image.png")
        with Image.open(tmp_path / "image.png") as image:
            pass
    train, _, _ = encode_pictures(Examples([image], [0]), backbone_of(channels))
    with pytest.raises(TensLoRAError, match=f"^input 0 of the data: {message}$"):
        train[0]


def test_images_that_cannot_be_compared_are_named_all_the_same() -> None:
    for count in (2, 3):  # torch raises an error where two sizes differ
        train, _, _ = encode_pictures(Examples(torch.zeros(count, 3, 8, 8), [0] * count), backbone_of())
        with pytest.raises(TensLoRAError, match=r"^input 0 of the data: is of type Tensor; must be a PIL image$"):
            train[0]


def test_an_image_file_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    examples = Examples(ImageFiles([tmp_path / "later.png"]), [0])
    train, _, collate = encode_pictures(examples, backbone_of())
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "later.png")
    torch.testing.assert_close(pixels_of(train, collate, 0)[0], torch.full((8, 8), (1 - MEAN[0]) / STD[0]))


def test_lengths_count_tokens_and_are_given_only_for_grouping(tokenizer: Any) -> None:
    train, _, _ = encode_sentences(PAIRS, tokenizer, 40, grouped=True)
    assert train.lengths == [len(train[i][0]["input_ids"]) for i in range(len(train))]
    assert encode_sentences(PAIRS, tokenizer, 40)[0].lengths is None
