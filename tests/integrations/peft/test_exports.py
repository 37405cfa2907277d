"""What leaves the house: adapters with base model, card and hashes, that plain PEFT and the Hub's parser read."""

import base64
import copy
import json
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftModel
from stock_peft import logits, loss_fn, net, stock, task, train
from tiny_vlm import llava
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import keeplora
from keeplora import KeepLora, KeepLoraConfig, StateError
from keeplora.lora.base_model import BaseModel
from tests.integrations.peft.test_families import batch, clip, llama, llama_loss, llama_out, same

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG = KeepLoraConfig(r=4, alpha=8, target_modules=["up", "down"], weight_energy=0.3, feature_energy=0.8)


def learn(keeper, data, loss=loss_fn, close=True):
    keeper.before_task(data, loss)
    optimizer = torch.optim.AdamW(keeper.trainable_parameters(), lr=1e-2)
    for each in [*data, *data]:
        optimizer.zero_grad()
        loss(keeper.model, each).backward()
        optimizer.step()
    return keeper.after_task(data) if close else None


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_causal_language_model_comes_back_with_its_base(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "weight_energy": 0.2, "feature_energy": 0.5}
    keeper = KeepLora(model, KeepLoraConfig(**settings))
    for seed in (1, 2):
        learn(keeper, [batch(seed)], llama_loss)
    keeper.export_peft(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        learned = llama_out(keeper.model, batch(9))
        same(llama_out(loaded, batch(9)), learned)
        assert (learned - llama_out(llama(), batch(9))).abs().max() > 1e-3 * learned.abs().max()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert (config["task_type"], config["auto_mapping"], config["revision"]) == ("CAUSAL_LM", None, None)


def test_a_vision_language_model_comes_back_with_its_base(tmp_path):
    model = LlavaForConditionalGeneration.from_pretrained(llava(tmp_path / "base")).eval()
    image = model.config.image_token_id
    inputs = {"input_ids": torch.tensor([[1, *[image] * 4, 30, 31]]), "pixel_values": torch.randn(1, 3, 8, 8)}

    def loss(model, inputs):
        return model(**inputs, labels=inputs["input_ids"]).loss

    keeper = KeepLora(model, KeepLoraConfig(r=2, target_modules=["q_proj", "down_proj"], weight_energy=0.2))
    learn(keeper, [inputs], loss)
    keeper.export_peft(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    assert type(loaded.get_base_model()) is LlavaForConditionalGeneration
    with torch.no_grad():
        learned = keeper.model(**inputs).logits
        same(loaded(**inputs).logits, learned)
    assert "AutoPeftModel.from_pretrained" in (tmp_path / "adapter" / "README.md").read_text()


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


@pytest.mark.parametrize(
    ("make", "kind", "mapped"),
    [
        (llama, "CAUSAL_LM", None),
        (clip, None, "CLIPModel"),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
            ),
            "SEQ_2_SEQ_LM",
            None,
        ),
        (lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL, image_size=8, patch_size=4)), None, "CLIPVisionModel"),
        (net, None, None),
    ],
    ids=["llama", "clip", "t5", "vision", "own"],
)
def test_what_a_model_tells_of_itself(make, kind, mapped):
    base = BaseModel.of(make(), name="someone/model", revision="abc")
    assert (base.name, base.revision, base.task_type) == ("someone/model", "abc", kind)
    assert (base.auto_mapping or {}).get("base_model_class") == mapped
    assert base.on_hub


def test_names_revisions_and_task_types_of_the_base(tmp_path, monkeypatch):
    model = llama()
    with pytest.warns(UserWarning, match=r"got a model that was loaded from nowhere.* Pass base_model="):
        assert BaseModel.of(model).name is None
    model.config._name_or_path, model.config._commit_hash = "someone/llama", "0123abc"
    assert BaseModel.of(model) == BaseModel("someone/llama", "0123abc", "CAUSAL_LM")
    assert BaseModel.of(model, name="other/llama").revision is None  # that commit is another repository's
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    local = BaseModel.of(model, name="here")
    assert (local.name, local.revision, local.on_hub) == (str(tmp_path / "here"), None, False)
    assert not BaseModel("open_clip:ViT-B-32:openai").on_hub
    with pytest.raises(ValueError, match=r"task_type must be None or one of .*CAUSAL_LM.*, got 'WORDS'"):
        BaseModel.of(model, task_type="WORDS")


# ------------------------------------------------------------------ the card


def test_every_field_of_the_card_is_read_back_by_the_hubs_parser(tmp_path):
    keeper = KeepLora(net(), CONFIG)
    certificates = [learn(keeper, task(seed)) for seed in (1, 2)]
    mine = ModelCardData(
        license="mit", language="en", datasets=["someone/digits"], tags=["mine"], model_name="Digits",
        eval_results=[EvalResult("image-classification", "someone/digits", "Digits", "accuracy", 0.875)],
    )  # fmt: skip
    before = mine.to_dict()
    training = {"learning_rate": 0.01, "steps": 6}
    keeper.export_peft(tmp_path, base_model="someone/base", revision="0a1b", training=training, card=mine)
    assert mine.to_dict() == before
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "base_model": "someone/base", "base_model_relation": "adapter", "datasets": ["someone/digits"],
        "language": "en", "library_name": "peft", "license": "mit", "metrics": ["accuracy"],
        "tags": ["continual-learning", "keeplora", "lora", "mine"],
        "model-index": [{"name": "Digits", "results": [{
            "task": {"type": "image-classification"}, "dataset": {"type": "someone/digits", "name": "Digits"},
            "metrics": [{"type": "accuracy", "value": 0.875}],
        }]}],
    }  # fmt: skip
    for proof in certificates:
        row = f"| {proof.task + 1} | {proof.leak_after_rounding:.1e} | {proof.leak:.1e} | {proof.orthogonality:.1e} |"
        assert row in card.text
    protected = sum(layer.protected for layer in keeper.capacity())
    for said in (
        "`someone/base` at revision `0a1b`", "It learned 2 tasks", "**original** weights", "| Digits | accuracy |",
        f"Protected: {protected} of ", "Not protected:", '"weight_energy": 0.3', '"learning_rate": 0.01',
        f"keeplora {keeplora.__version__}", "count twice", "in float32", "PeftModel.from_pretrained(base_model",
    ):  # fmt: skip
        assert said in card.text, said


def test_a_card_of_somebody_else_stays(tmp_path):
    keeper = KeepLora(net(), CONFIG)
    learn(keeper, task(1))
    keeper.export_peft(tmp_path)
    keeper.export_peft(tmp_path)  # its own is replaced
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.warns(UserWarning, match=r"README\.md was not written by keeplora and stays"):
        keeper.export_peft(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


# ------------------------------------------------------------------ what base it belongs to


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A keeper after two tasks, and its export."""
    keeper = KeepLora(net(), CONFIG)
    for seed in (1, 2):
        learn(keeper, task(seed))
    folder = tmp_path_factory.mktemp("learned")
    keeper.export_peft(folder)
    return keeper, folder


OPEN = KeepLoraConfig(**{**CONFIG.to_dict(), "weight_energy": 0.0, "r": 8})


def test_plain_peft_reads_it_without_a_word(learned):
    keeper, folder = learned
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(net(), folder)
    same(logits(loaded), logits(keeper.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_right_base_is_known_in_every_dtype(learned, dtype):
    KeepLora(net().to(dtype), OPEN).import_peft(learned[1])


@pytest.mark.parametrize("by", ["keeplora", "peft", "peft in bfloat16", "itself"])
def test_a_base_that_holds_the_updates_already_is_noticed(learned, by):
    keeper, folder = learned
    if by == "itself":
        other = copy.deepcopy(keeper)
    elif by == "keeplora":
        other = KeepLora(copy.deepcopy(keeper).merge(), OPEN)
    else:
        base = net().bfloat16() if "bfloat16" in by else net()
        other = KeepLora(PeftModel.from_pretrained(base, folder).merge_and_unload(), OPEN)
    before = [slot.weight.clone() for slot in other.slots]
    with pytest.raises(StateError, match=r"must be .*the original base model.*already, which would count twice.* Load"):
        other.import_peft(folder)
    assert not other.training_task
    assert all(torch.equal(slot.weight, then) for slot, then in zip(other.slots, before, strict=True))


def test_another_base_is_refused_unless_it_is_meant(learned):
    other = KeepLora(net(seed=1), OPEN)
    with pytest.raises(StateError, match=r"other values in 4 of 4 weights \(first: blocks\.0\.up\..* other_base"):
        other.import_peft(learned[1])
    other.import_peft(learned[1], other_base=True)
    assert other.training_task


def test_a_keeper_with_tasks_of_its_own_takes_an_adapter_of_its_first_base(learned):
    keeper = KeepLora(net(), OPEN)
    learn(keeper, task(5))
    keeper.import_peft(learned[1], project=True)
    again = KeepLora(net(seed=1), OPEN)
    learn(again, task(5))
    with pytest.raises(StateError, match="other values in 4 of 4 weights"):
        again.import_peft(learned[1], project=True)


def test_an_open_task_belongs_on_the_merged_base(learned, tmp_path):
    keeper = copy.deepcopy(learned[0])
    merged = copy.deepcopy(keeper).merge()
    learn(keeper, task(3), close=False)
    keeper.export_peft(tmp_path, open_task_only=True)
    assert "**with 2 tasks merged**" in (tmp_path / "README.md").read_text()
    KeepLora(copy.deepcopy(merged), OPEN).import_peft(tmp_path)
    with pytest.raises(StateError, match=r"the base model with 2 tasks merged.*other values in 4 of 4"):
        KeepLora(net(), OPEN).import_peft(tmp_path)
    keeper.after_task(task(3))
    with pytest.raises(StateError, match="count twice"):
        KeepLora(keeper.merge(), OPEN).import_peft(tmp_path)


def test_what_was_noted_of_another_adapter_is_not_believed(learned, tmp_path):
    learned[0].export_peft(tmp_path)
    other = stock(net(seed=1))
    train(other, task(1))
    other.save_pretrained(tmp_path)
    keeper = KeepLora(net(seed=1), OPEN)
    with pytest.warns(UserWarning, match=r"keeplora\.json must be of the adapter beside it"):
        keeper.import_peft(tmp_path)
    same(logits(keeper.model), logits(other))


@pytest.mark.parametrize("note", ["[]", '{"format": "x"}', "nonsense", '{"weights": 3}', '{"inner_product": "much"}'])
def test_a_note_from_anywhere_is_judged(learned, tmp_path, note):
    learned[0].export_peft(tmp_path)
    file = tmp_path / "keeplora.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | json.loads(note)) if "weights" in note or "inner" in note else note)
    with pytest.raises(StateError, match=r"import_peft: .*keeplora\.json"):
        KeepLora(net(), OPEN).import_peft(tmp_path)


def test_the_base_is_remembered_by_states(learned, tmp_path):
    keeper, folder = learned
    keeper.save(tmp_path / "state")
    again = KeepLora.load(tmp_path / "state", net())
    assert again.certificates == keeper.certificates != [None, None]
    again.export_peft(tmp_path / "again")
    for name in ("keeplora.json", "README.md"):
        assert (tmp_path / "again" / name).read_text() == (folder / name).read_text()


def test_a_stock_models_sum_of_tasks_says_the_same(tmp_path):
    model, state = stock(), None
    for seed in (1, 2):
        state = keeplora.initialize(model, task(seed), loss_fn, state)
        train(model, task(seed))
        keeplora.update_subspace(model, task(seed), state)
    state.save(tmp_path / "state")
    state = keeplora.SubspaceState.load(tmp_path / "state")
    state.export_peft(tmp_path / "merged", model, base_model="someone/base")
    state.export_peft(tmp_path / "plain", net(), base_model="someone/base")
    assert ModelCard.load(tmp_path / "plain" / "README.md").data.base_model == "someone/base"
    for folder in (tmp_path / "merged", tmp_path / "plain"):
        KeepLora(net(), OPEN).import_peft(folder)
        with pytest.raises(StateError, match="count twice"):
            KeepLora(copy.deepcopy(model).unload(), OPEN).import_peft(folder)


# ------------------------------------------------------------------ save_pretrained, from_pretrained, push_to_hub


def test_one_folder_serves_peft_and_goes_on(tmp_path):
    keeper = KeepLora(net(), CONFIG)
    with pytest.raises(ValueError, match="there must be an update, got none"):
        keeper.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    learn(keeper, task(1))
    keeper.save_pretrained(tmp_path, base_model="someone/base")
    same(logits(PeftModel.from_pretrained(net(), tmp_path)), logits(keeper.model))
    again = KeepLora.from_pretrained(tmp_path, net())
    for one in (keeper, again):
        learn(one, task(2))
    assert torch.equal(logits(again.model), logits(keeper.model))
    keeper.save_pretrained(tmp_path / "small", state=False)
    with pytest.raises(StateError, match=r"state\.json must exist"):
        KeepLora.from_pretrained(tmp_path / "small", net())


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload asks for; repositories of ``denied`` may not be made."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/commit/main") or self.path.endswith("/commit/next"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(200, {"commitUrl": f"{self.server.url}/me/digits/commit/1", "commitOid": "1"})
        asked = json.loads(body)
        self.server.calls.append((self.path, asked))
        if self.path == "/api/repos/create":
            if asked["name"] == "denied":
                return self.answer(403, {"error": "You don't have the rights to create a model here"})
            return self.answer(200, {"url": f"{self.server.url}/me/{asked['name']}"})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked["files"]]
            return self.answer(200, {"files": files})
        return self.answer(200, {})

    def answer(self, code, value):
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files, server.calls = f"http://127.0.0.1:{server.server_port}", {}, []
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_upload_holds_what_save_pretrained_writes(learned, hub, tmp_path):
    info = learned[0].push_to_hub("me/digits", private=True, token="hf_x", base_model="someone/base")
    assert info.oid == "1"
    assert sorted(hub.files) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "keeplora.json"]
    assert hub.calls[0][0] == "/api/repos/create"
    assert (hub.calls[0][1]["name"], hub.calls[0][1]["visibility"]) == ("digits", "private")
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    same(logits(PeftModel.from_pretrained(net(), tmp_path)), logits(learned[0].model))


def test_an_upload_with_the_state_and_a_branch(learned, hub):
    with pytest.warns(UserWarning, match=r"push_to_hub: base_model should be an id on the Hub, got None"):
        learned[0].push_to_hub("me/digits", token="hf_x", state=True, branch="next")
    assert {"state.json", "README.md"} < set(hub.files)
    assert any(path.endswith("/branch/next") for path, _ in hub.calls)


def test_the_hubs_own_errors_are_shown(learned, hub):
    with pytest.raises(HfHubHTTPError, match="You don't have the rights to create a model here"):
        learned[0].push_to_hub("me/denied", token="hf_x", base_model="someone/base")
    with pytest.raises(huggingface_hub.errors.HFValidationError, match="Repo id must"):
        learned[0].push_to_hub("me/not/valid", token="hf_x", base_model="someone/base")
    assert not hub.files
    with pytest.raises(ValueError, match="there must be an update"):
        KeepLora(net(), CONFIG).push_to_hub("me/digits", token="hf_x")
