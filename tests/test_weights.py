import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from raekit import hub
from raekit.errors import UserError
from raekit.hub import find_file, find_folder
from raekit.weights import NoRandomWeights, check_fit, fingerprint, load_network, load_strict, read_weights

STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_both_formats_are_read(name: str, tmp_path: Path):
    path = tmp_path / name
    save_file(STATE, path) if name.endswith("safetensors") else torch.save(STATE, path)
    state = read_weights(path)
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[key], STATE[key]) for key in STATE)


def test_statistics_without_a_mean_are_read(tmp_path: Path):
    torch.save({"mean": None, "var": torch.ones(2)}, tmp_path / "stat.pt")
    assert read_weights(tmp_path / "stat.pt")["mean"] is None


def test_a_tensor_larger_than_its_storage_is_rejected(tmp_path: Path):
    torch.save({"state": {"weight": torch.ones(1).expand(4, 5)}}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"a tensor of shape \(4, 5\) repeats its values"):
        read_weights(tmp_path / "weights.pt")
    shared = torch.ones(4, 5)
    torch.save({"weight": shared, "part": shared[1:], "turned": shared.T}, tmp_path / "weights.pt")
    assert read_weights(tmp_path / "weights.pt")["part"].shape == (3, 5)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
@pytest.mark.parametrize("kept", [0, 20, 0.5, -1], ids=["empty", "header", "half", "all but a byte"])
def test_truncated_file_is_rejected(name: str, kept: float, tmp_path: Path):
    path = tmp_path / name
    save_file(STATE, path) if name.endswith("safetensors") else torch.save(STATE, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if kept == 0.5 else int(kept)])
    with pytest.raises(UserError, match=f"{path}: (damaged|rejected)"):
        read_weights(path)


@pytest.mark.parametrize("content", [torch.ones(2), [torch.ones(2)], {0: torch.ones(2)}])
def test_tensors_without_names_are_rejected(content: object, tmp_path: Path):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"weights\.pt: not a state dict"):
        read_weights(tmp_path / "weights.pt")


def test_absent_file(tmp_path: Path):
    with pytest.raises(UserError, match=f"{tmp_path}/none.pt: no such file"):
        read_weights(tmp_path / "none.pt")


def test_file_of_something_else(tmp_path: Path):
    (tmp_path / "page.pt").write_text("<html>rate limited</html>")
    with pytest.raises(UserError, match=r"page.pt: (damaged|rejected)"):
        read_weights(tmp_path / "page.pt")


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_file_with_code_is_rejected_and_not_run(tmp_path: Path):
    sprung = tmp_path / "sprung"
    torch.save(STATE | {"extra": Trap(sprung)}, tmp_path / "weights.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(UserError, match=r"weights.pt: rejected because it would run"):
        read_weights(tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"plain.pt: (rejected|damaged)"):
        read_weights(tmp_path / "plain.pt")
    assert not sprung.exists()
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert sprung.exists()  # proves that the trap works


def test_messages_say_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(
        UserError, match=r"module.pt: rejected because it would run torch.nn.modules.linear.Linear; save"
    ):
        read_weights(tmp_path / "module.pt")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(UserError, match=r"list.pt: not a state dict"):
        read_weights(tmp_path / "list.pt")

    def forbidden(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(UserError, match=r"list.pt: cannot be read \(Permission denied\)$"):
        read_weights(tmp_path / "list.pt")


def test_fingerprints_differ_where_tensors_or_values_do():
    same = fingerprint(STATE, "a", 1)
    assert fingerprint(dict(reversed(STATE.items())), "a", 1) == same
    others = [
        fingerprint(STATE, "a", 2),
        fingerprint(STATE, "a"),
        fingerprint({**STATE, "bias": torch.zeros(2)}, "a", 1),
        fingerprint({**STATE, "bias": torch.ones(1, 2)}, "a", 1),
        fingerprint({**STATE, "bias": torch.ones(2, dtype=torch.float64)}, "a", 1),
        fingerprint({**STATE, "more": None}, "a", 1),
        fingerprint({"weight": STATE["weight"], "b": STATE["bias"]}, "a", 1),
    ]
    assert len({same, *others}) == 1 + len(others)
    assert fingerprint({"x": torch.ones(2, 3).T, "y": torch.tensor(1), "z": torch.ones(2).bfloat16()})


def test_fit_is_checked_without_memory():
    check_fit(lambda: nn.Linear(3, 2), STATE, "here")
    with pytest.raises(UserError, match="do not fit Linear"):
        check_fit(lambda: nn.Linear(10**8, 10**8), STATE, "here")


def test_a_network_is_loaded_without_random_weights():
    def make() -> nn.Module:
        layer = nn.Linear(3, 2)
        nn.init.trunc_normal_(layer.weight)
        nn.init.normal_(tensor=layer.bias)
        layer.register_buffer("more", torch.randn(4), persistent=False)
        return layer

    before = torch.get_rng_state()
    network = load_network(make, STATE, "here")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(network.state_dict()[key], value) for key, value in STATE.items())
    assert next(network.parameters()).device.type == "cpu"
    with pytest.raises(UserError, match="here: the weights do not fit Linear"):
        load_network(lambda: nn.Linear(10**8, 10**8), STATE, "here")


def test_strict_loading():
    layer = nn.Linear(3, 2)
    load_strict(layer, STATE, "here")
    assert torch.equal(layer.weight, STATE["weight"])


def test_strict_loading_fills_a_meta_module():
    with torch.device("meta"):
        layer = nn.Linear(3, 2)
    load_strict(layer, STATE, "here")
    assert torch.equal(layer.weight, STATE["weight"])


def test_every_fault_is_named():
    state = {"weight": torch.ones(3, 3), "gain": torch.ones(1)}
    with pytest.raises(UserError) as caught:
        load_strict(nn.Linear(3, 2), state, "model.pt")
    message = str(caught.value)
    assert message.startswith("model.pt: the weights do not fit Linear: ")
    assert "missing bias" in message
    assert "unexpected gain" in message
    assert "weight is (3, 3), expected (2, 3)" in message


def test_a_faulty_state_changes_nothing():
    layer = nn.Linear(3, 2)
    before = layer.weight.clone()
    with pytest.raises(UserError):
        load_strict(layer, {"weight": STATE["weight"]}, "here")
    assert torch.equal(layer.weight, before)


def test_long_lists_of_faults_are_cut():
    with pytest.raises(UserError, match="; and 12 more"):
        load_strict(nn.Sequential(*(nn.Linear(1, 1) for _ in range(10))), {}, "here")


def test_folders(tmp_path: Path):
    assert find_folder(str(tmp_path)) == tmp_path
    with pytest.raises(
        UserError, match=r"builtin:nothing: no such built-in model; choose one of builtin:emoji, builtin:vit-tiny"
    ):
        find_folder("builtin:nothing")


@pytest.mark.parametrize("name", ["missing", "./a/b", "/a/b", "a/b/c", "~/models"])
def test_a_name_of_neither_a_folder_nor_a_repository(name: str):
    with pytest.raises(UserError, match=f"{name}: no such folder"):
        find_folder(name)


def test_repository_without_a_network(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"nobody/nothing: no such local folder, .* run `hf download nobody/nothing`"):
        find_folder("nobody/nothing")


def test_a_file_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"run `hf download nobody/nothing part/a\.pth` where"):
        find_file("nobody/nothing", "part/a.pth")
    folder = tmp_path / "models--nobody--nothing"
    path = folder / "snapshots" / ("0" * 40) / "part" / "a.pth"
    path.parent.mkdir(parents=True)
    path.write_text("here")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    assert find_file("nobody/nothing", "part/a.pth").read_text() == "here"


class Repositories:
    """A stand-in for the Hub's client: serves folders, and records the arguments of each call."""

    def __init__(self, root: Path, fails: bool = False) -> None:
        self.root, self.fails, self.asked = root, fails, []

    def __call__(self, name: str, *, local_files_only: bool, **options: Any) -> str:
        self.asked.append({"local": local_files_only, **options})
        if self.fails and not local_files_only:
            raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.\nMore")
        if not (self.root / name).is_dir():
            raise FileNotFoundError(name)
        return str(self.root / name)


@pytest.fixture
def repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repositories:
    found = Repositories(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", found)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", found)
    monkeypatch.setattr("raekit.hub._has_network", lambda: True)
    return found


CONFIGS = ("config.json", "config.yaml", "model_index.json", "scheduler_config.json")


def test_only_the_files_of_a_model_are_downloaded(repositories: Repositories):
    folder = repositories.root / "me" / "model"
    (folder / "denoiser").mkdir(parents=True)
    (folder / "denoiser" / "config.json").write_text('{"kind": "denoiser"}')
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert find_folder("me/model@v2") == folder
    assert {call["revision"] for call in repositories.asked} == {"v2"}
    configs, weights = (call["allow_patterns"] for call in repositories.asked)
    assert all(Path(pattern).name in CONFIGS for pattern in configs)
    assert "denoiser/model.safetensors" in weights
    assert all(pattern.startswith("denoiser/") for pattern in weights)  # the model at the top is of another kind


def test_a_repository_without_a_model_downloads_only_its_config(repositories: Repositories):
    (repositories.root / "me" / "other").mkdir(parents=True)
    (repositories.root / "me" / "other" / "config.json").write_text('{"model_type": "llama"}')
    find_folder("me/other")
    assert len(repositories.asked) == 1


def test_the_cache_is_used_where_the_client_fails(repositories: Repositories):
    repositories.fails = True
    with pytest.raises(UserError, match=r"me/model: .* \(ImportError Using SOCKS proxy, .* not installed\.\); run"):
        find_folder("me/model")
    (repositories.root / "me" / "model").mkdir(parents=True)
    assert find_folder("me/model") == repositories.root / "me" / "model"
    assert find_file("me/model", "a.pth") == repositories.root / "me" / "model"


def test_without_a_network_the_client_is_not_asked(repositories: Repositories, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("raekit.hub._has_network", lambda: False)
    with pytest.raises(UserError, match=r"no such local folder, and the Hub did not deliver it \(no network\); run"):
        find_folder("me/model")
    assert all(call["local"] for call in repositories.asked)


@pytest.mark.parametrize("endpoint", ["https://no.such.host.invalid", "http://", "https://" + "a" * 70 + ".x"])
def test_a_host_without_an_address(endpoint: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    hub._has_network.cache_clear()
    assert not hub._has_network()
    hub._has_network.cache_clear()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("bounds", [(-2.0, 2.0), (3.0, 9.0), (-0.01, 0.01)])
def test_networks_without_random_weights_do_not_wait_for_values_within_bounds(monkeypatch, bounds):
    memory = torch.full((100,), 1e9)  # what is not initialised may hold anything
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.full_like(like, 1e9))
    low, high = bounds
    with NoRandomWeights():
        nn.init.trunc_normal_(memory, (low + high) / 2, 1.0, low, high)
