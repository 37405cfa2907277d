"""What is predicted of a model, beside what a small real one of the same kind takes, byte by byte."""

import json
import threading
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import transformers as tf
from bitsandbytes.nn import Linear4bit, Linear8bitLt

import bench.memory
import keeplora.plan
from keeplora import KeepLora, KeepLoraConfig, find_targets
from keeplora.cli import main
from keeplora.lora.quantised import is_quantised
from keeplora.methods.settings import ConfigError
from keeplora.plan import MODELS, Setting, memory, plan, shapes_of
from keeplora.plan.activations import kept_by_block
from keeplora.plan.shapes import shapes_of_model
from keeplora.statistics import feature_statistics, mean_gradients

RANK = 4
TEXT = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64,
}  # fmt: skip


def close(found, expected):
    assert abs(found - expected) <= 0.1 * expected, (found, expected)


def size(tensors):
    return sum({t.untyped_storage()._cdata: t.numel() * t.element_size() for t in tensors if t is not None}.values())


@pytest.mark.parametrize("name", MODELS)
def test_shipped_configs_have_as_many_parameters_as_was_published(name):
    file = Path(keeplora.plan.__file__).parent / "models" / f"{name}.json"
    told = json.loads(file.read_text())
    assert told["_source"].startswith("https://huggingface.co/")
    assert shapes_of(name).parameters == told["_parameters"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_of_a_small_model_at_every_moment(dtype, tmp_path):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)).to(dtype)
    ids = torch.randint(100, (4, 16), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": ids, "labels": ids}]

    def loss_fn(model, batch):
        return model(**batch).loss

    shapes = shapes_of_model("small", model, find_targets(model), model.config)
    keeper = KeepLora(model, KeepLoraConfig(r=RANK, target_modules="all-linear", weight_energy=0.6, feature_energy=0.9))
    bytes_of = {torch.bfloat16: 2, torch.float32: 4}[dtype]
    assert size(model.parameters()) == bytes_of * shapes.parameters
    keeper.before_task(data, loss_fn)
    optimizer = keeper.optimizer(lr=1e-3)
    for _ in range(2):
        loss_fn(model, data[0]).backward()
        optimizer.step()
    trained = keeper.trainable_parameters()
    opened = bases(keeper)
    told = {m.name: m for m in memory(shapes, setting(bytes_of, keeper))}
    moments = {name: moment.device for name, moment in told.items()}
    close(size(part for p in keeper._protected for part in p.parts), told["training"].host["bases"])
    close(size(t for slot in keeper.slots for t in slot.adapter.state_dict().values()), moments["training"]["adapters"])
    states = [value for p in trained for key, value in optimizer.state[p].items() if key != "step"]
    close(size([*states, *(p.grad for p in trained)]), moments["training"]["optimizer"])
    matrices = mean_gradients(model, keeper.slots, data, loss_fn)
    close(size(matrices), moments["before_task"]["gradients"])
    features = feature_statistics(model, keeper.slots, data, loss_fn)
    close(size(feature.moment for feature in features), moments["after_task"]["moments"])
    keeper.after_task(data)
    assert bases(keeper) != opened
    for parameter in trained:
        assert parameter.grad is None
    moments = {m.name: m for m in memory(shapes, setting(bytes_of, keeper))}
    assert moments["between tasks"].device == {"model": bytes_of * shapes.parameters}
    kept = moments["between tasks"].host
    close(size(part for p in keeper._protected for part in p.parts), kept["bases"])
    close(size(slot.exact.start for slot in keeper.slots) or 1, kept["pretrained weights"] or 1)
    close(size(t for slot in keeper.slots for update in slot.learned for t in (update.a, update.b)), kept["updates"])
    keeper.save(tmp_path)
    written = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    close(written, sum(moments["save"].disk.values()))


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_of_a_quantised_model(bits):
    """bitsandbytes' own tensors; what the method keeps beside them is in tests/methods/keeplora/test_footprint.py."""
    model = bench.memory.model(128, 192)
    shapes = shapes_of_model("small", model, find_targets(model), model.config)
    for block in model.model.layers:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                kinds = {4: partial(Linear4bit, compress_statistics=False, quant_type="nf4"), 8: Linear8bitLt}
                options = {8: {"has_fp16_weights": False}, 4: {}}[bits]
                quantised = kinds[bits](layer.in_features, layer.out_features, bias=False, **options)
                quantised.load_state_dict(layer.state_dict())
                block.set_submodule(name, quantised.to("cpu"))
    held = [*model.parameters(), *model.buffers()]
    scales = [getattr(p, "SCB", None) if bits == 8 else p.quant_state.absmax for p in held if is_quantised(p)]
    assert len(scales) == len(shapes.adapted)
    assert all(scale is not None for scale in scales)
    close(size([*model.parameters(), *scales]), memory(shapes, Setting(rank=RANK, bits=bits))[0].device["model"])


@pytest.mark.parametrize("setting", [Setting(bits=4), Setting(bits=8), Setting(merge=False)], ids=["4", "8", "kept"])
def test_updates_kept_beside_weights_are_in_the_plan(setting):
    shapes = shapes_of("llava-1.5-7b")
    merged = {m.name: m for m in memory(shapes, Setting(tasks=7))}
    kept = {m.name: m for m in memory(shapes, replace(setting, tasks=7))}
    update = 2 * 16 * sum(m.rows + m.width for m in shapes.adapted)
    for name, tasks in (("wrapped", 7), ("training", 7), ("after_task", 7), ("between tasks", 8)):
        assert kept[name].device["updates beside weights"] == tasks * update
        assert "updates beside weights" not in merged[name].device
    assert "pretrained weights" not in kept["between tasks"].host
    assert kept["between tasks"].host["updates"] == merged["between tasks"].host["updates"]
    largest = 2 * 4096 * 11008 if setting.bits else None
    assert kept["training"].device.get("dequantised weight") == largest
    bytes_of = {4: 0.5625, 8: 1.0, None: 2.0}[setting.bits]
    adapted = sum(m.numel for m in shapes.adapted)
    close(kept["training"].device["model"], bytes_of * adapted + 2 * (shapes.parameters - adapted))


def test_a_plan_of_four_bits_has_room_for_more():
    found, whole = (plan("llava-1.5-7b", Setting(bits=bits), cards=[24]) for bits in (4, None))
    assert found.fits[1][24] is None
    assert found.batches[1][24][0] > max(found.batches[1][24][1], whole.batches[1][24][0])
    assert "NF4 with float32 scales" in str(found)
    assert "PEFT QLoRA" in str(found)
    with pytest.raises(ConfigError, match="bits must be none for experts"):
        plan("qwen3-vl-30b-a3b", Setting(bits=4))
    with pytest.raises(ConfigError, match="bits must be for one GPU"):
        Setting(bits=4, gpus=2)
    with pytest.raises(ConfigError, match="bits must be 4 or 8"):
        Setting(bits=5)


def bases(keeper):
    pairs = zip(keeper.slots, keeper._protected, strict=True)
    return {slot.name: (p.count - sum(p.added), sum(p.added)) for slot, p in pairs}


def setting(weight_bytes, keeper):
    return Setting(rank=RANK, weight_bytes=weight_bytes, ranks=bases(keeper))


@pytest.mark.parametrize("kind", ["keeplora", "peft"])
def test_activations_counted_on_the_meta_device_are_those_on_the_cpu(kind):
    config = tf.LlamaConfig(**TEXT)
    counted = [kept_by_block(config, torch.float32, RANK, kind, 64, device=device) for device in ("meta", "cpu")]
    close(*counted)


def test_a_frozen_a_keeps_less_than_stock_layers():
    for name in MODELS:
        config, tokens = shapes_of(name).config, 8192
        own, peft = (kept_by_block(config, torch.bfloat16, 16, kind, tokens) for kind in ("keeplora", "peft"))
        assert own <= 0.75 * peft, name


def test_the_plan_says_what_a_7b_model_takes():
    found = plan("llava-1.5-7b", Setting(gpus=8))
    low, high = found.moments[1][1]
    totals = {moment.name: moment.total for moment in high}
    assert totals["between tasks"] == 2 * found.shapes.parameters  # nothing beside the model
    assert totals["training"] < found.peft[1]
    assert found.fits[1][24] is None
    assert all(a.total <= b.total for a, b in zip(low, high, strict=True))
    text = str(found)
    assert "Predicted, not measured" in text
    assert "24 GB: fits" in text
    assert "main memory" in text
    sharded = {moment.name: moment.total for moment in found.moments[8][1][1]}
    assert sharded["training"] < 0.5 * totals["training"]


def test_a_tiny_model_has_figures_that_are_not_all_zeros(tmp_path):
    tf.LlamaConfig(**TEXT).save_pretrained(tmp_path)
    found = plan(str(tmp_path), Setting(gpus=1, rank=RANK), cards=[24])
    text = str(found)
    numbers = [word for line in text.split("GB on one GPU")[1].splitlines() for word in line.split()]
    assert not {"0.0", "0.00"} & set(numbers)
    assert f"{found.moments[1][0][1][0].total / 1e9:.2g}" in numbers
    assert "64 or more, PEFT 64 or more" in text
    assert " M parameters" in text


def test_a_method_without_bases_and_checkpointing_take_less():
    base = plan("llava-1.5-7b", Setting(gpus=1), cards=[24])
    lora = plan("llava-1.5-7b", Setting(gpus=1, method="lora"), cards=[24])
    spared = plan("llava-1.5-7b", Setting(gpus=1, batch=8), cards=[80], checkpointing=True)
    whole = plan("llava-1.5-7b", Setting(gpus=1, batch=8), cards=[80])
    assert "before_task" not in {moment.name for moment in lora.moments[1][0][0]}
    assert training(lora) == training(base)  # what is protected lies in main memory
    assert "bases" not in lora.moments[1][0][0][-1].host
    assert training(spared) < training(whole)


def training(found):
    return next(m.total for m in found.moments[1][0][1] if m.name == "training")


def test_the_command_line(capsys, tmp_path):
    tf.LlamaConfig(**TEXT).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--gpus", "2", "--json", "--rank", "4", "--length", "32"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["predicted"] is True
    assert {row["gpus"] for row in told["moments"]} == {1, 2}
    assert main(["plan", "lava-1.5-7b"]) == 2
    assert "Did you mean 'llava-1.5-7b'?" in capsys.readouterr().err
    assert main(["plan", str(tmp_path), "--method", "gpm"]) == 2
    assert "method must be one of" in capsys.readouterr().err
    assert main(["plan", str(tmp_path), "--gpu", "H10"]) == 2
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    assert main(["plan", str(tmp_path)]) == 2
    with pytest.raises(ConfigError, match="weight_share must lie in"):
        Setting(weight_share=2)


def test_a_rank_that_no_layer_can_hold_is_refused(capsys):
    assert main(["plan", "llava-1.5-7b", "--rank", "4097"]) == 2
    assert (
        "rank must be at most the width of the narrowest adapted layer, got 4097 for 4096 [" in capsys.readouterr().err
    )


def test_a_name_that_leads_nowhere_is_asked_for_once(monkeypatch, capsys):
    """The Hub's library would try a server that does not answer six times, for half a minute."""
    asked = []

    class Busy(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(503)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
        assert main(["plan", "nonsense"]) == 2
        server.shutdown()
    assert asked == ["/nonsense/resolve/main/config.json"]
    said = capsys.readouterr().err
    assert "got 'nonsense': it is not on this disk, and the Hub gave none (" in said
    assert "Known: llava-1.5-7b" in said
