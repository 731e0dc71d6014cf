"""Publishing to the stand-in of the Hub, and loading from it by name."""

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file

from raekit import artifacts
from raekit.config import to_json
from raekit.errors import UserError
from raekit.inference.pipeline import Pipeline
from raekit.inference.publish import Score, model_card, prepared, push


@pytest.fixture(scope="module")
def pipe(tiny_model) -> Pipeline:
    pipe = Pipeline.from_pretrained(tiny_model)
    assert pipe.denoiser
    pipe.denoiser.trained_on = "folder:/home/someone/photos"
    return pipe


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub
@pytest.mark.parametrize("largest", [artifacts.SHARD, 40_000])
def test_a_published_model_is_loaded_by_its_name(hub, pipe, monkeypatch, largest):
    monkeypatch.setattr(artifacts, "SHARD", largest)
    address = pipe.push_to_hub("someone/toy", private=True)
    assert address == f"{hub.address}/someone/toy"
    assert hub.private == {"someone/toy"}
    again = Pipeline.from_pretrained("someone/toy")
    assert again(labels=[2], steps=3)[0].tobytes() == pipe(labels=[2], steps=3)[0].tobytes()
    assert Pipeline.from_pretrained("someone/toy", revision="main").classes == ("blue", "green", "red")


def test_no_local_path_is_published(pipe, tmp_path):
    with prepared(pipe, "someone/toy") as folder:
        texts = [path.read_text() for path in (*folder.rglob("*.json"), folder / "README.md")]
    assert len(texts) == 4
    assert not any("/home" in text or str(tmp_path.parents[1]) in text for text in texts)


def test_a_temporary_folder_without_space_is_told_with_its_setting(pipe, full_disk, monkeypatch):
    (full_disk / "other").write_bytes(bytes(2**22 - 2**13))
    monkeypatch.setattr("tempfile.tempdir", str(full_disk))
    with pytest.raises(UserError, match=r"could not be written \(.*No space.*\); set TMPDIR to another folder"):
        prepared(pipe, "someone/toy").__enter__()


def test_the_type_of_the_stored_weights(pipe):
    with (
        prepared(pipe, "someone/toy", dtype=torch.bfloat16) as folder,
        safe_open(folder / "denoiser" / "model.safetensors", "pt") as file,
    ):
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_a_card_says_what_the_model_is(pipe, images, tmp_path):
    config = {
        "stage": "generation",
        "data": {"source": images, "split": "train", "image_size": 16},
        "train": {"steps": 1500, "batch_size": 8},
        "optim": {"method": "adamw", "lr": 1e-3, "final_lr": 2e-5},
        "ema": [0.999],
    }
    (tmp_path / "config.json").write_text(to_json(config))
    (tmp_path / "inputs.json").write_text(to_json({"data": {"count": 30}}))
    card = model_card(pipe, "someone/toy", run=tmp_path, scores=[Score("fid", 3.25, "photos (held out)")])
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("raekit", "unconditional-image-generation")
    (result,) = data["model-index"][0]["results"]
    assert (result["metrics"][0]["type"], result["metrics"][0]["value"]) == ("fid", 3.25)
    assert result["dataset"]["name"] == "photos (held out)"
    for words in (
        'Pipeline.from_pretrained("someone/toy")',
        'pipe(classes="blue", count=4)',
        "16 x 16 pixels in 3 classes",
        "| data | 30 images at 16 pixels |",
        "| steps | 1,500 of 8 images |",
        "| fid | 3.25 | photos (held out) |",
        "blue, green, red",
        "Its licence is not known",
    ):
        assert words in card.text
    assert images not in str(card)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_the_card_of_an_autoencoder_shows_reconstructing(pipe):
    card = model_card(Pipeline(pipe.autoencoder), "someone/toy")
    assert card.data.to_dict()["pipeline_tag"] == "image-to-image"
    assert "pipe.reconstruct(" in card.text
    assert "samples.png" not in card.text


def test_the_licence_of_the_encoder_is_the_licence_of_the_model():
    card = model_card(Pipeline.from_pretrained("builtin:emoji"), "someone/emoji")
    assert card.data.to_dict()["license"] == "apache-2.0"


def test_a_rejected_upload_is_one_clear_error(hub, pipe, tmp_path):
    hub.closed = True
    with pytest.raises(UserError, match=r"someone/toy: the Hub did not accept the model \(.*403.*\); log in"):
        push(tmp_path, "someone/toy")
    with pytest.raises(UserError, match="toy: not the name of a repository; give OWNER/NAME"):
        pipe.push_to_hub("toy")
    with pytest.raises(UserError, match="someone/toy@main: not the name of a repository; give OWNER/NAME"):
        pipe.push_to_hub("someone/toy@main")
    with pytest.raises(UserError, match=r"^repository: None must be a text$"):
        pipe.push_to_hub(None)


def test_large_weights_are_stored_in_shards(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "SHARD", 40_000)
    pipe.save_pretrained(tmp_path)
    shards = sorted((tmp_path / "denoiser").glob("*.safetensors"))
    assert len(shards) > 1
    assert [path.name for path in shards] == [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]
    assert all(sum(v.nbytes for v in load_file(path).values()) <= 40_000 for path in shards)
    assert (tmp_path / "denoiser" / "model.safetensors.index.json").is_file()
    again = Pipeline.from_pretrained(tmp_path)
    assert again(labels=[2], steps=3)[0].tobytes() == pipe(labels=[2], steps=3)[0].tobytes()
    shards[1].unlink()
    with pytest.raises(UserError, match="missing "):
        Pipeline.from_pretrained(tmp_path)
