"""Weights from the hub, with a local server that implements its protocol: requests and messages."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cliper.model._libraries import open_clip
from cliper.model.backbone import load_backbone
from cliper.model.config import BackboneConfig, CLIPerConfig, FGCConfig
from cliper.model.errors import WeightsError
from cliper.model.loading.choose import choose_diffusion
from cliper.model.loading.weights import HUB_TAGS, pin, resolve_backbone, resolve_diffusion, sha256_of
from tests.conftest import PARITY
from tests.support.hub import MEMBER, STRANGER, Hub, folder_files

SD = folder_files(PARITY / "sd_tiny")
NOWHERE = "http://127.0.0.1:9"  # a port nothing listens on


def refusal(model: str, revision: str | None = None, seconds: float = 3) -> str:
    """The message for a model that cannot be fetched, after checking that it came at once."""
    began = time.perf_counter()
    with pytest.raises(WeightsError) as caught:
        resolve_diffusion(FGCConfig(model=model, revision=revision))
    assert time.perf_counter() - began < seconds
    return str(caught.value)


def test_a_wrong_id_is_one_request(hub: Hub) -> None:
    hub.add("owner/sd", SD)
    assert "has no repository 'owner/sdd' that you may read; check the id" in refusal("owner/sdd")
    assert [path for _, path, _ in hub.requests if "sdd" in path] == ["/api/models/owner/sdd"]


def test_a_wrong_id_with_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    assert "check the id" in refusal("owner/sdd")
    assert "is neither a folder on this machine nor a hub id" in refusal("a/b/c")


def test_an_unknown_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/sd", SD)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "refuses HF_TOKEN (401) for 'owner/sd'; set it to a valid token, or unset it" in refusal("owner/sd")


def test_a_gated_repository(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/gated", SD, gated=True)
    page = f"{hub.endpoint}/owner/gated"
    assert f"is gated: accept its terms at {page}, then set HF_TOKEN" in refusal("owner/gated")  # 401
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    assert f"has not accepted its terms; accept them at {page}" in refusal("owner/gated")  # 403
    monkeypatch.setenv("HF_TOKEN", MEMBER)
    assert resolve_diffusion(FGCConfig(model="owner/gated")).folder.is_dir()


def test_a_missing_revision_lists_those_that_exist(hub: Hub) -> None:
    repository = hub.add("owner/sd", SD)
    repository.commit(SD, branch="fp16")
    repository.tags["v1.0"] = repository.branches["main"]
    assert "has no revision 'v9'; there is: main, fp16, v1.0, or a commit hash" in refusal("owner/sd", "v9")


def test_a_missing_revision_is_not_answered_from_the_cache(hub: Hub) -> None:
    repository = hub.add("owner/sd", SD)
    repository.branches["dev"] = repository.branches["main"]
    resolve_diffusion(FGCConfig(model="owner/sd", revision="dev"))
    del repository.branches["dev"]
    assert "has no revision 'dev'" in refusal("owner/sd", "dev")


@pytest.mark.parametrize("trouble", ["no network", "server error", "offline"])
def test_without_an_answer_the_cache_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    hub.add("owner/sd", SD)
    before = resolve_diffusion(FGCConfig(model="owner/sd"))
    if trouble == "no network":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", NOWHERE)
    elif trouble == "server error":
        hub.down = True
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve_diffusion(FGCConfig(model="owner/sd")) == before
    message = refusal("owner/other")
    assert "'owner/other' is not in the cache" in message
    assert {"no network": "cannot be reached (ConnectError)", "server error": "answers with error 503",
            "offline": "is not contacted, because HF_HUB_OFFLINE is set"}[trouble] in message  # fmt: skip
    assert "or give a local path" in message


def test_a_commit_in_the_cache_needs_no_request(hub: Hub) -> None:
    commit = hub.add("owner/sd", SD).branches["main"]
    first = resolve_diffusion(FGCConfig(model="owner/sd", revision=commit))
    hub.requests.clear()
    assert resolve_diffusion(FGCConfig(model="owner/sd", revision=commit)) == first
    assert hub.requests == []


def test_only_files_that_are_loaded_are_downloaded_and_hashed(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    unused = {"README.md": b"x", "unet/diffusion_pytorch_model.fp16.safetensors": b"x", "vae/diffusion.bin": b"x",
              "safety_checker/model.safetensors": b"x", "tokenizer/notes.txt": b"x"}  # fmt: skip
    hub.add("owner/sd", SD | unused)
    found = resolve_diffusion(FGCConfig(model="owner/sd"))
    assert "Fetching 9 files" in capfd.readouterr().err  # the hub's progress bar, before Ray starts
    assert {path.split("/", 5)[5] for path in hub.downloads()} == {*SD} - {"model_index.json"}
    assert sha256_of(found.files) == sha256_of(resolve_diffusion(FGCConfig(model=str(PARITY / "sd_tiny"))).files)
    resolve_diffusion(FGCConfig(model="owner/sd"))
    assert "Fetching" not in capfd.readouterr().err


def test_unused_files_of_a_folder_are_not_hashed(tmp_path: Path) -> None:
    folder = tmp_path / "sd"
    shutil.copytree(PARITY / "sd_tiny", folder)
    before = sha256_of(resolve_diffusion(FGCConfig(model=str(folder))).files)
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "vae/a.txt"):
        (folder / name).write_bytes(b"x")
    assert sha256_of(resolve_diffusion(FGCConfig(model=str(folder))).files) == before
    (folder / "unet" / "config.json").write_text("{}")
    assert sha256_of(resolve_diffusion(FGCConfig(model=str(folder))).files) != before


def test_a_broken_connection_is_resumed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.add("owner/sd", SD)
    hub.cut_after, hub.cuts = 200_000, 1
    assert resolve_diffusion(FGCConfig(model="owner/sd")).commit == hub.repositories["owner/sd"].branches["main"]
    assert [wanted for _, _, wanted in hub.requests if wanted] == ["bytes=200000-"]


def test_an_interrupted_download_explains_how_to_continue(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # its waits: 5 x 1 s
    hub.add("owner/sd", SD)
    hub.cut_after, hub.cuts = 500_000, 1000
    message = refusal("owner/sd")
    assert "the download of 'owner/sd' was interrupted" in message
    assert "complete files are kept, the interrupted one restarts from its beginning" in message
    hub.cuts = 0
    hub.requests.clear()
    assert resolve_diffusion(FGCConfig(model="owner/sd")).folder.is_dir()
    assert [path.rpartition("/")[2] for path in hub.downloads()].count("diffusion_pytorch_model.safetensors") <= 2
    assert "diffusion_pytorch_model.safetensors" in hub.downloads()[-1]


def test_a_repository_that_lacks_files_is_refused_before_a_download(hub: Hub) -> None:
    lacking = {name: data for name, data in SD.items() if name != "vae/diffusion_pytorch_model.safetensors"}
    hub.add("owner/sd", lacking)
    assert refusal("owner/sd") == "owner/sd: missing: vae/diffusion_pytorch_model.safetensors"
    hub.add("owner/flux", {"transformer/config.json": b"{}", "scheduler/scheduler_config.json": b"{}"})
    assert "it holds a transformer, not the UNet of Stable Diffusion 1.x or 2.x" in refusal("owner/flux")
    hub.add("owner/one", {"v1-5-pruned.safetensors": b"x"})
    assert "one file for everything (v1-5-pruned.safetensors), FGC needs the diffusers layout" in refusal(
        "owner/one"
    )
    assert hub.downloads() == []


def test_shards_must_be_complete() -> None:
    rest = {name for name in SD if not name.startswith("unet/diffusion")}
    shards = {f"unet/diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    assert {index} | shards <= {*choose_diffusion(rest | shards | {index})}
    absent = "unet/diffusion_pytorch_model-00002-of-00003.safetensors"
    with pytest.raises(WeightsError, match=f"missing: {absent}"):
        choose_diffusion(rest | {index} | shards - {absent})


def test_open_clip_repositories(hub: Hub, tiny_clip: Path) -> None:
    files = folder_files(tiny_clip)
    commit = hub.add("owner/clip", files).branches["main"]
    found = resolve_backbone(BackboneConfig(model="hf-hub:owner/clip"))
    assert found.commit == commit
    assert sha256_of(found.files) == sha256_of(
        resolve_backbone(BackboneConfig(model=f"local-dir:{tiny_clip}")).files
    )
    hub.add("owner/bert", {"config.json": b"{}", "model.safetensors": b"x"})
    with pytest.raises(
        WeightsError, match="hf-hub:owner/bert: no open_clip_config.json: not a model for open_clip"
    ):
        resolve_backbone(BackboneConfig(model="hf-hub:owner/bert"))
    hub.add("owner/empty", {"open_clip_config.json": files["open_clip_config.json"]})
    with pytest.raises(WeightsError, match="no weights beside open_clip_config.json"):
        resolve_backbone(BackboneConfig(model="hf-hub:owner/empty"))


def test_a_pickled_open_clip_repository_loads(hub: Hub, tiny_clip: Path, tmp_path: Path) -> None:
    state = load_file(tiny_clip / "open_clip_model.safetensors")
    torch.save(state, tmp_path / "clip.bin")
    config = (tiny_clip / "open_clip_config.json").read_bytes()
    pickled = (tmp_path / "clip.bin").read_bytes()
    hub.add("owner/bin", {"open_clip_config.json": config, "open_clip_pytorch_model.bin": pickled})
    model, _ = load_backbone(BackboneConfig(model="hf-hub:owner/bin"), torch.device("cpu"), torch.float32)
    torch.testing.assert_close(model.state_dict()["visual.proj"], state["visual.proj"])


def test_a_tag_is_fetched_from_its_repository(
    hub: Hub, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ViT-B-16-quickgelu with "openai": the repository has other files too, one of which is loaded."""
    architecture = json.loads((PARITY / "clip_tiny.json").read_text()) | {"quick_gelu": True}
    (tmp_path / "tag-test-quickgelu.json").write_text(json.dumps(architecture))
    open_clip.add_model_config(tmp_path)
    tag = {"hf_hub": "owner/vit.openai/", "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tag-test-quickgelu", {"openai": tag})
    others = {"README.md": b"x", "open_clip_pytorch_model.bin": b"x", "model.safetensors": b"x"}
    hub.add("owner/vit.openai", folder_files(tiny_clip) | others)
    config = BackboneConfig(model="tag-test-quickgelu", weights="openai")
    found = resolve_backbone(config)
    assert [path.name for path in found.files] == ["open_clip_model.safetensors"]
    assert len(hub.downloads()) == 1
    load_backbone(config, torch.device("cpu"), torch.float32)
    del hub.repositories["owner/vit.openai"].commits[found.commit or ""]["open_clip_model.safetensors"]
    del hub.repositories["owner/vit.openai"].commits[found.commit or ""]["open_clip_pytorch_model.bin"]
    with pytest.raises(WeightsError, match=r"\(owner/vit.openai\): missing: open_clip_model.safetensors"):
        resolve_backbone(config)


def test_shipped_tags_are_pinned_in_the_repositories_that_open_clip_names(hub: Hub) -> None:
    for (model, weights), repository in HUB_TAGS.items():
        assert open_clip.get_pretrained_cfg(model, weights)["hf_hub"] == f"{repository}/"
        commit = hub.add(repository, {"open_clip_model.safetensors": b"x"}).branches["main"]
        pinned = pin(CLIPerConfig(backbone=BackboneConfig(model=model, weights=weights), fgc=None))
        assert pinned.backbone.revision == commit


def test_pinning_replaces_branches_by_commits(hub: Hub, tiny_clip: Path) -> None:
    clip, sd = hub.add("owner/clip", folder_files(tiny_clip)), hub.add("owner/sd", SD)
    config = CLIPerConfig(backbone=BackboneConfig(model="hf-hub:owner/clip"), fgc=FGCConfig(model="owner/sd"))
    pinned = pin(config)
    assert pinned.backbone.revision == clip.branches["main"]
    assert pinned.fgc is not None
    assert pinned.fgc.revision == sd.branches["main"]
    assert pin(pinned) == pinned
    assert pin(CLIPerConfig()) == CLIPerConfig()
