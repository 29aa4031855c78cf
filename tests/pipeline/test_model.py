"""Parts join to a model, from shipped files or pretrained ones, and are trained or frozen."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import hypothesis.strategies as some
import pytest
import torch
import transformers
from configs import two_stages
from hub_server import COMMIT, hub
from huggingface_hub import snapshot_download
from hypothesis import given, settings
from parts import LANGUAGES, SIZES, TOWERS, VISUAL, joined, save_tokenizer, sentencepiece_model
from sentencepiece import SentencePieceProcessor
from tiny import CASES, LAYERS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import import_protobuf
from zoo_tiles import CASES as OTHERS

from sts.architectures import PARTS, decoder_layers_of, projector_of, tower_layers_of, tower_of
from sts.pipeline.config import MINI, ConfigError, ModelConfig, check_inputs, load_scale
from sts.pipeline.data.source import DataError
from sts.pipeline.data.tokens import tokenise
from sts.pipeline.files import SpoiltError, read_json
from sts.pipeline.train import fetch, shallow
from sts.pipeline.train.joined import load_tokenizer, load_tower
from sts.pipeline.train.model import (
    SHIPPED,
    build,
    freeze,
    write_manifest,
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("backbone") / "manifest.json"
    write_manifest(load_scale(MINI).model, out)
    return out


def test_shipped_files_are_small_and_join_to_a_llava_with_a_seeded_projector(manifest):
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 10e6
    a, processor = build(manifest, 1)
    b, _ = build(manifest, 1)
    c, _ = build(manifest, 2)
    states = [model.state_dict() for model in (a, b, c)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    moved = {name for name in states[0] if not torch.equal(states[0][name], states[2][name])}
    assert moved and all("multi_modal_projector" in name for name in moved)
    assert a.generation_config.eos_token_id == processor.tokenizer.eos_token_id


WORDS = ["<unk>", "<s>", "</s>", "is", "red"]


def save_parts(backbone: Path, folder: Path, template: str | None = None) -> ModelConfig:
    """Parts as CLIP and Vicuna are had: a tower with an image processor, and a language model with
    a tokenizer that knows no image; the settings that name them."""
    tower, processor = backbone.parent / "vision", backbone.parent / "processor"
    AutoImageProcessor.from_pretrained(processor).save_pretrained(folder / "vision")
    CLIPVisionModel.from_pretrained(tower).save_pretrained(folder / "vision")
    words = {word: id for id, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "language")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(words), num_hidden_layers=1, **small)
    LlamaForCausalLM(config).save_pretrained(folder / "language")
    parts = {part: str(folder / part) for part in ("vision", "language")}
    return load_scale(MINI).model.model_copy(update={"backbone": "pretrained", **parts})


def test_pretrained_parts_are_joined_and_learn_the_image_token(backbone, tmp_path):
    settings, words = save_parts(backbone, tmp_path), WORDS
    with pytest.raises(
        ValueError, match=r"model.layers: 12, but .*language has 1 decoder layers: set"
    ):
        write_manifest(settings, tmp_path / "manifest.json")
    settings = settings.model_copy(update={"layers": 1})
    write_manifest(settings, tmp_path / "manifest.json")
    (model, processor), (again, _) = (build(tmp_path / "manifest.json", 0) for _ in range(2))
    assert model.config.text_config.vocab_size == 64 > len(words) + 1, "a multiple for GPUs"
    ids = processor(text="<image>", images=torch.zeros(3, 72, 72))["input_ids"][0]
    assert ids == [model.config.image_token_id] * 16 == [len(words)] * 16
    assert all(map(torch.equal, model.parameters(), again.parameters())), "drawn from the seed"

    start = json.loads((tmp_path / "manifest.json").read_text())
    file = tmp_path / "language" / "config.json"
    file.write_text(file.read_text() + " ")
    changed = write_manifest(settings, tmp_path / "manifest.json")
    assert changed["sha256"] != start["sha256"], "the bytes of a folder count, not its name alone"


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_towers_with_and_without_a_class_token_are_joined_to_any_language_model(
    tmp_path, tower, language
):
    start = joined(tmp_path, tower, language)
    model, processor = build(start, 0)
    _, own, _ = TOWERS[tower]
    seen = own.from_pretrained(tmp_path / "vision").eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = seen(pixels, output_hidden_states=True).hidden_states[-2]
    assert features.shape[1] == VISUAL + (tower == "clip")
    expected = model.model.multi_modal_projector(features[:, -VISUAL:])
    found = model.eval().get_image_features(pixels).pooler_output
    assert torch.equal(torch.stack(tuple(found)), expected)
    ids = processor(text="<image>", images=torch.zeros(3, 50, 70))["input_ids"][0]
    assert ids.count(model.config.image_token_id) == VISUAL
    assert type(model.model.language_model).__name__.lower() == f"{language}model"
    assert not [name for name, _ in model.named_parameters() if "vision_tower.head" in name]


CODE = Path(joined.__code__.co_filename).read_text().replace("s>", "z>").replace("<unk", "")
PLAIN = [
    CODE,
    "\n".join(f"a{' ' * count}b\n{' ' * count}c" for count in range(1, 80)),
    "| a |  b   |     c |\n|---|---|---|\n| 1 |  2   |\t\t3 |",
    "-  one\n   -  two\n\n\n  * three",
    "中文  的   数据，红色。 é à ü ß 😀 👩‍👧  x",
    "\t\ttabs\tand  \n ends  \n12345 3.14",
    "",
]


@pytest.fixture(scope="module", params=[False, True], ids=["by id", "by score"])
def words(request, tmp_path_factory) -> tuple[SentencePieceProcessor, Path]:
    """SentencePiece's own, and a folder with the files of Vicuna's tokenizer; the ids of pieces in
    the order of their scores, or not."""
    folder = tmp_path_factory.mktemp("words")
    file = import_protobuf().ModelProto.FromString(sentencepiece_model([CODE, *PLAIN], 900))
    if request.param:
        merged = [piece for piece in file.pieces if len(piece.piece) > 1 and piece.score < 0]
        scores = [piece.score for piece in merged]
        moved = scores[3::4] + scores[2::4] + scores[1::4] + scores[::4]
        for piece, score in zip(merged, moved, strict=True):
            piece.score = score
    save_tokenizer(folder, file.SerializeToString(), legacy=False)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return SentencePieceProcessor(model_proto=file.SerializeToString()), folder


@pytest.fixture(scope="module")
def tokenizers(words, tmp_path_factory) -> list[PreTrainedTokenizerFast]:
    """The tokenizer of the folder, and what a checkpoint gives that it was saved with."""
    saved, tokenizer = tmp_path_factory.mktemp("saved"), load_tokenizer(str(words[1]))
    tokenizer.save_pretrained(saved)
    return [tokenizer, AutoTokenizer.from_pretrained(saved)]


@pytest.mark.parametrize("text", PLAIN)
def test_a_sentencepiece_file_gives_the_ids_of_sentencepiece(words, tokenizers, text):
    for tokenizer in tokenizers:
        assert tokenizer(text)["input_ids"] == [1, *words[0].encode(text)]


@settings(max_examples=200, deadline=None)
@given(some.text(some.characters(codec="utf-8") | some.sampled_from("  \n\tab<>/s|-1中")))
def test_any_text_has_the_ids_of_sentencepiece(words, tokenizers, text):
    """Behind a letter: before a space that begins a text transformers writes no other one."""
    text = "x" + re.sub("</?s>|<unk>|\N{LOWER ONE EIGHTH BLOCK}", "", text)
    for tokenizer in tokenizers:
        assert tokenizer(text)["input_ids"] == [1, *words[0].encode(text)]


@pytest.mark.parametrize("legacy", [True, False])
def test_what_follows_a_special_token_is_the_same_in_a_saved_checkpoint(words, tmp_path, legacy):
    save_tokenizer(tmp_path, (words[1] / "tokenizer.model").read_bytes(), legacy)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = [one("a</s>if x</s> y")["input_ids"] for one in (tokenizer, saved)]
    assert ids[0] == ids[1] and (words[0].encode("if")[0] in ids[0]) == legacy


PARTS_OF_LLAVA = ("vision", "language", "processor")


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_a_tower_is_taken_out_of_a_checkpoint_with_a_text_model_as_the_hub_has_it(tmp_path, kind):
    text = SIZES | {"num_hidden_layers": 1, "vocab_size": 10, "eos_token_id": 2}
    seen = SIZES | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=seen)
    whole = getattr(transformers, f"{kind}Model")(config)
    whole.save_pretrained(tmp_path)
    found = load_tower(str(tmp_path), dtype=torch.float32).state_dict()
    own = {n: w for n, w in whole.vision_model.state_dict().items() if not n.startswith("head.")}
    assert found.keys() == own.keys() and all(torch.equal(found[name], own[name]) for name in own)


def test_a_tower_that_is_not_known_is_refused_before_it_is_loaded(tmp_path):
    joined(tmp_path)
    file = tmp_path / "vision" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "dinov2"}))
    with pytest.raises(SpoiltError, match=rf"{file}: other bytes .* delete .*backbone.json"):
        build(tmp_path / "backbone.json", 0)
    manifest = json.loads((tmp_path / "backbone.json").read_text())
    (tmp_path / "backbone.json").write_text(json.dumps({n: manifest[n] for n in PARTS_OF_LLAVA}))
    with pytest.raises(ValueError, match=r"model\.vision.*dinov2.*clip_vision_model, siglip_vis"):
        build(tmp_path / "backbone.json", 0)
    parts = {name: str(tmp_path / name) for name in ("vision", "language")}
    settings = ModelConfig(backbone="pretrained", **parts, layers=2)
    with pytest.raises(ValueError, match=r"model\.vision.*dinov2"):
        write_manifest(settings, tmp_path / "again.json")


REMOTE = """
from pathlib import Path
from transformers import PreTrainedConfig
Path("ran").touch()
class Config(PreTrainedConfig):
    model_type, num_hidden_layers = "theirs", 2
"""


def test_python_files_beside_weights_run_only_if_the_configuration_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda _: "y")  # whatever transformers would ask
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config_of_theirs.py").write_text(REMOTE)
    names = {"AutoConfig": "config_of_theirs.Config"}
    (theirs / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": names}))
    settings = ModelConfig(family="whole", checkpoint=str(theirs), layers=2)
    with pytest.raises(ConfigError, match=r"model.trust_remote_code: False .* true, which runs"):
        write_manifest(settings, tmp_path / "no.json")
    assert not Path("ran").exists()
    trusting = settings.model_copy(update={"trust_remote_code": True})
    with pytest.raises(DataError, match=r"theirs: its tokenizer and image processor can't be used"):
        write_manifest(trusting, tmp_path / "yes.json")
    assert Path("ran").exists()


def test_a_projector_is_drawn_as_llava_draws_it(tmp_path):
    """torch's default of a linear layer, in the order of its layers, from the seed."""
    model, _ = build(joined(tmp_path), 3)
    projector = model.model.multi_modal_projector
    for layer in (projector.linear_1, projector.linear_2):
        bound = layer.in_features**-0.5
        for values in (layer.weight, layer.bias):
            assert 0.9 * bound < values.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


# ---- models of the hub --------------------------------------------------------------------------


def test_parts_of_the_hub_are_fetched_once_and_are_those_of_their_commit(tmp_path, monkeypatch):
    joined(tmp_path / "served/hub/own")
    out = tmp_path / "backbone.json"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")

    def write(revision: str = "main", **more: int) -> dict:
        parts = {"vision": "own/vision", "language": f"own/language@{revision}", "layers": 2}
        write_manifest(ModelConfig(backbone="pretrained", **(parts | more)), out)
        return read_json(out)

    with hub(tmp_path / "served") as served:
        at = {"endpoint": served.url, "cache_dir": tmp_path / "home/hub"}
        monkeypatch.setattr(fetch, "snapshot_download", partial(snapshot_download, **at))
        with pytest.raises(ValueError, match=r"model.layers: 3, but"):
            write(layers=3)
        with pytest.raises(ValueError, match=r"model.vision_feature_layer=9.* own/vision, -4 to 3"):
            write(vision_feature_layer=9)
        assert not served.fetched(".safetensors"), (
            "what is wrong is said before weights are fetched"
        )
        start = write()
        assert start["language"] == f"own/language@{COMMIT}" and start["files"] == {}
        build(out, 0)[0].save_pretrained(tmp_path / "saved")
        assert str(tmp_path) not in (tmp_path / "saved/config.json").read_text()
        first = len(served.requests)
        assert write() == start
        assert {path.split("/")[1] for _, path, _ in served.requests[first:]} == {"api"}
        served.commit = COMMIT[::-1]
        assert write()["sha256"] != start["sha256"], "other weights behind the name"
        newest = write(COMMIT)
        assert newest["language"] == start["language"]
        assert newest["vision"] == f"own/vision@{COMMIT[::-1]}"
    assert write(COMMIT) == newest, "from the cache: the server is gone"
    build(out, 0)
    with pytest.raises(ConfigError, match=r"model.layers: 3 .*2, the decoder layers of own/lang"):
        parts = {"vision": "own/vision", "language": f"own/language@{COMMIT}", "layers": 3}
        check_inputs(two_stages({}, {}, model={"backbone": "pretrained", **parts}), "mine.yaml")
    shutil.rmtree(tmp_path / "home")
    with pytest.raises(DataError, match=r"own/vision@.* is not in the hub's cache here.*data"):
        build(out, 0)
    with pytest.raises(DataError, match=r"(?s)model own/vision can't be had: .*Go online.*HF_HOME"):
        write()


@pytest.mark.parametrize(
    ("variable", "value", "hub"),
    [
        ("HF_HUB_CACHE", "{}/hub", "hub"),
        ("HUGGINGFACE_HUB_CACHE", "{}/old", "old"),
        ("HF_HOME", "{}/home", "home/hub"),
        ("HF_HOME", "$SCRATCH/home", "home/hub"),
    ],
)
def test_the_hubs_cache_is_where_its_client_has_it(tmp_path, monkeypatch, variable, value, hub):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.setenv(variable, value.format(tmp_path))
    folder = tmp_path / hub / "models--own--vision/snapshots" / COMMIT
    folder.mkdir(parents=True)
    assert fetch.cached_folder(f"own/vision@{COMMIT}") == folder


@pytest.mark.parametrize("kind, kept", [("shipped", [0, 2, 4, 7, 9, 11]), ("pretrained", [0])])
def test_a_smaller_decoder_is_the_language_model_without_some_layers(tmp_path, kind, kept):
    """Its logits are those of the whole, in which the layers that are left out are identities."""
    settings = load_scale(MINI).model
    if kind == "pretrained":
        joined(tmp_path, language="qwen2")
        parts = {name: str(tmp_path / name) for name in ("vision", "language")}
        settings = ModelConfig(backbone="pretrained", **parts, layers=2)
    share = settings.model_copy(update={"layers_share": 0.5})
    shallow.write_manifest(settings, tmp_path / "all.json")
    shallow.write_manifest(share, tmp_path / "half.json")
    (whole, _), (half, _) = (build(tmp_path / f"{name}.json", 0) for name in ("all", "half"))
    layers = whole.model.language_model.layers
    assert half.config.text_config.num_hidden_layers == len(kept)
    for index in set(range(settings.layers)) - set(kept):
        layers[index].forward = lambda hidden, *args, **kwargs: hidden
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected, logits = whole(input_ids=ids).logits, half(input_ids=ids).logits
    assert torch.allclose(logits, expected, atol=1e-6)
    half.save_pretrained(tmp_path / "saved")
    again = type(half).from_pretrained(tmp_path / "saved")
    assert len(again.model.language_model.layers) == len(kept)


def test_what_changes_nothing_is_not_in_the_manifest(tmp_path):
    """So a model that was made before there was a choice is the same one."""
    own = read_json(joined(tmp_path / "own"))
    assert own.keys() == {*PARTS_OF_LLAVA, "vision_feature_layer", "sha256", "files"}
    chosen = {"template": "v1", "image_aspect_ratio": "pad"}
    other = read_json(joined(tmp_path / "other", **chosen))
    assert chosen.items() <= other.items()


def test_a_language_model_keeps_the_chat_template_that_it_was_tuned_with(backbone, tmp_path):
    """One that takes texts only, as those of language models do."""
    template = "{% for m in messages %}{{ '<s>' + m['content'] + '</s>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<s>' }}{% endif %}"
    settings = save_parts(backbone, tmp_path, template).model_copy(update={"layers": 1})
    write_manifest(settings, tmp_path / "manifest.json")
    _, processor = build(tmp_path / "manifest.json", 0)
    turns = [{"from": "human", "value": "<image>\nis"}, {"from": "gpt", "value": "red"}]
    [sample] = tokenise(processor, [turns], [[(72, 72)]])
    told = ["<s>", "<image>", "is", "</s>", "<s>", "red", "</s>"]
    assert processor.tokenizer.convert_ids_to_tokens(sample["ids"]) == told
    assert sample["is_answer"].tolist() == [False] * 5 + [True] * 2


def test_a_whole_checkpoint_is_gone_on_with_as_it_is(manifest, tmp_path):
    model, processor = build(manifest, 1)
    for one in (model, processor):
        one.save_pretrained(tmp_path / "whole")
    own = {"family": "whole", "checkpoint": str(tmp_path / "whole")}
    settings = load_scale(MINI).model.model_copy(update=own)
    start = write_manifest(settings, tmp_path / "whole.json")
    again, same_processor = build(tmp_path / "whole.json", 2)
    assert same_states(model, again) == (set(model.state_dict()), set())
    assert same_processor.chat_template == processor.chat_template

    fresh = settings.model_copy(update={"fresh": ["projector"]})
    assert write_manifest(fresh, tmp_path / "fresh.json")["sha256"] != start["sha256"]
    drawn, equal, other = (build(tmp_path / "fresh.json", seed)[0] for seed in (2, 2, 3))
    assert not same_states(drawn, equal)[1]
    for one in (model, other):
        moved = same_states(drawn, one)[1]
        assert moved and all("multi_modal_projector" in name for name in moved)

    file = tmp_path / "whole" / "generation_config.json"
    file.write_text(file.read_text() + " ")
    assert write_manifest(settings, tmp_path / "whole.json")["sha256"] != start["sha256"]


def same_states(a, b) -> tuple[set[str], set[str]]:
    """Names of the weights that are equal in two models, and of those that are not."""
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    equal = {name for name in a if torch.equal(a[name], b[name])}
    return equal, a.keys() - equal


def test_missing_files_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone: .*git checkout -- .*gone"):
        write_manifest(load_scale(MINI).model, tmp_path / "manifest.json", tmp_path / "gone")


# what joins the parts, what sees, and the rest: the language model with its head
PLACES = {
    "llava": ("model.multi_modal_projector.", "model.vision_tower."),
    "llava_next": (("model.multi_modal_projector.", "model.image_newline"), "model.vision_tower."),
    "qwen2_vl": ("model.visual.merger.", "model.visual."),
    "idefics3": ("model.connector.", "model.vision_model."),
    "llama4": ("multi_modal_projector.", "vision_model."),  # the head is its language model's
}


@pytest.mark.parametrize("name", PLACES)
def test_tower_projector_and_decoder_are_the_modules_of_their_class(name):
    model = (CASES | OTHERS)[name].build()
    joint, path = PLACES[name]
    [(name, tower)], layers = tower_of(model).items(), decoder_layers_of(model)
    assert f"{name}." == path
    assert [f"{name}." for name in projector_of(model)] == [
        joint if isinstance(joint, str) else joint[0]
    ]
    assert len(layers) == LAYERS and all("Decoder" in type(layer).__name__ for layer in layers)
    seeing = tower_layers_of(model)
    assert seeing and set(seeing) <= set(tower.modules())


@pytest.mark.parametrize("name", PLACES)
def test_the_parts_that_are_named_are_trained_and_no_others(name):
    model = (CASES | OTHERS)[name].build()
    joint, tower = PLACES[name]
    names = {name for name, _ in model.named_parameters()}
    parts = {"projector": {name for name in names if name.startswith(joint)}}
    parts["vision_tower"] = {n for n in names if n.startswith(tower)} - parts["projector"]
    parts["language_model"] = names - parts["projector"] - parts["vision_tower"]
    for trains in (*([part] for part in PARTS), ["projector", "language_model"], PARTS):
        freeze(model.eval(), trains)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == set().union(*(parts[part] for part in trains))
        off = {f"{name}." for name, module in model.named_modules() if not module.training}
        assert bool(off) == ("vision_tower" not in trains)
        assert all(name.startswith(tower) and not name.startswith(joint) for name in off)


def test_a_part_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"'projektor'.*projector, language_model, vision_tower"):
        freeze(CASES["llava"].build(), ["projektor"])
    with pytest.raises(ValueError, match=r"'vision_tower'.*Fuyu.*language_model"):
        freeze(OTHERS["fuyu"].build(), ["vision_tower"])
