"""Stock PEFT on transformers' models and on open_clip's: both ways round, tiny random models."""

import open_clip
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

import keeplora

TOKENS = 30


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=TOKENS, max_position_embeddings=16, **sizes)).eval()


def clip():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {"vocab_size": TOKENS, "max_position_embeddings": 8, "eos_token_id": 2, **sizes}
    vision = {"image_size": 16, "patch_size": 8, **sizes}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()


def vit_clip():
    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 7, "vocab_size": TOKENS, "width": 24, "layers": 2, "heads": 2}
    return open_clip.model.CLIP(16, vision, text).eval()


def batch(seed):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, TOKENS, (5, 7), generator=g)
    ids[:, -1] = 2 if seed % 2 else TOKENS - 1
    return torch.randn(5, 3, 16, 16, generator=g), ids


def llama_loss(model, inputs):
    return model(input_ids=inputs[1], labels=inputs[1]).loss


def llama_out(model, inputs):
    return model(input_ids=inputs[1]).logits


def clip_out(model, inputs):
    return model(pixel_values=inputs[0], input_ids=inputs[1]).logits_per_image


def vit_out(model, inputs):
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    image, text = model.encode_image(inputs[0], normalize=True), model.encode_text(inputs[1], normalize=True)
    return 10 * image @ text.T


def contrastive(out):
    return lambda model, inputs: nn.functional.cross_entropy(out(model, inputs), torch.arange(5))


FAMILIES = {
    "llama": (llama, llama_loss, llama_out, ["q_proj", "v_proj", "down_proj"]),
    "clip": (clip, contrastive(clip_out), clip_out, ["q_proj", "v_proj", "fc1"]),
    "open_clip": (vit_clip, contrastive(vit_out), vit_out, ["c_fc", "c_proj"]),
}
CONFIG = {"weight_energy": 0.2, "feature_energy": 0.5, "depth_scale": 0.5}


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-6 * expected.abs().max().item())


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return FAMILIES[request.param]


def train(parameters, model, loss_fn, inputs):
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn(model, inputs).backward()
        optimizer.step()


def test_a_keepers_tasks_in_stock_peft(family, tmp_path):
    make, loss_fn, out, names = family
    keeper = keeplora.KeepLora(make(), keeplora.KeepLoraConfig(r=2, alpha=8, target_modules=names, **CONFIG))
    for seed in (1, 2):
        keeper.before_task([batch(seed)], loss_fn)
        train(keeper.trainable_parameters(), keeper.model, loss_fn, batch(seed))
        keeper.after_task([batch(seed)])
    keeper.export_peft(tmp_path)
    with torch.no_grad():
        learned, pretrained = out(keeper.model, batch(9)), out(make(), batch(9))
        same(out(PeftModel.from_pretrained(make(), tmp_path).eval(), batch(9)), learned)
    assert (learned - pretrained).abs().max() > 1e-3 * pretrained.abs().max()


def test_a_stock_model_through_two_tasks(family, tmp_path):
    make, loss_fn, out, names = family
    model = get_peft_model(make(), LoraConfig(r=2, lora_alpha=8, target_modules=names)).eval()
    with torch.no_grad():
        before = out(make(), batch(9))
    state = keeplora.initialize(model, [batch(1)], loss_fn, config=keeplora.KeepLoraConfig(**CONFIG))
    with torch.no_grad():
        assert torch.equal(out(model, batch(9)), before)
    for seed in (1, 2):
        if seed == 2:
            keeplora.initialize(model, [batch(seed)], loss_fn, state)
        train([p for p in model.parameters() if p.requires_grad], model, loss_fn, batch(seed))
        assert keeplora.update_subspace(model, [batch(seed)], state).leak <= 1e-6
    with torch.no_grad():
        learned = out(model, batch(9))
        state.export_peft(tmp_path, model)
        same(out(PeftModel.from_pretrained(make(), tmp_path).eval(), batch(9)), learned)
        same(out(model.merge_and_unload(), batch(9)), learned)
