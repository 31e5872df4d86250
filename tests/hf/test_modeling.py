"""The registered classes on megamf's blocks against the portable file: loading, generation, saving."""

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import megamf.hf
from megamf.hf.portable import modeling_moduleformer as portable

KINDS = [{"gate_type": gate, **kv} for gate in ("mlp", "linear", "gmm") for kv in ({}, {"n_head": 1, "att_hidden": 16})]
QUIET = {"pad_token_id": 0, "eos_token_id": 2}


def ids(batch, time, seed=0):
    return torch.randint(3, 41, (batch, time), generator=torch.Generator().manual_seed(seed))


def both(folder):
    fast = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    assert type(fast) is megamf.hf.ModuleFormerForCausalLM
    return fast, portable.ModuleFormerForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_same_values_and_gradients(public_folder, kind):
    fast, slow = both(public_folder(**kind))
    x = ids(3, 9)
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    mask[1, 6:] = 0
    one, two = (model(x, attention_mask=mask, labels=x) for model in (fast, slow))
    assert torch.allclose(one.logits, two.logits, rtol=1e-11, atol=1e-12)
    assert torch.allclose(one.loss, two.loss, rtol=1e-12) and torch.allclose(one.aux_loss, two.aux_loss, rtol=1e-12)
    one.loss.backward()
    two.loss.backward()
    expected = dict(slow.named_parameters())
    for name, parameter in fast.named_parameters():
        assert torch.allclose(parameter.grad, expected[name].grad, rtol=1e-9, atol=1e-13), name


def test_switch_loss(public_folder):
    folder = public_folder()
    config = AutoConfig.from_pretrained(folder)
    config.aux_loss_type = "switch"
    one = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float64)
    two = portable.ModuleFormerForCausalLM.from_pretrained(folder, config=config, dtype=torch.float64)
    assert torch.allclose(one(ids(2, 5)).aux_loss, two(ids(2, 5)).aux_loss, rtol=1e-12)


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 7}, {"num_beams": 2, "do_sample": True}], ids=str
)
@pytest.mark.parametrize("kind", [{}, {"n_head": 1, "att_hidden": 16}], ids=str)
def test_generation(public_folder, how, kind):
    fast, slow = both(public_folder(**kind))
    x = ids(2, 6)
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    results = []
    for model in (fast, slow):
        for use_cache in (True, False):
            torch.manual_seed(5)
            arguments = {"max_new_tokens": 8, "do_sample": False, **QUIET, **how, "use_cache": use_cache}
            results.append(model.generate(x, attention_mask=mask, **arguments))
    assert results[0].shape[1] > 6
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_left_padding_does_not_change_a_row(public_folder):
    fast, _ = both(public_folder())
    x = ids(2, 6)
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    padded = fast.generate(x, attention_mask=mask, **options)
    alone = fast.generate(x[:1, 3:], **options)
    assert torch.equal(padded[0, 6:], alone[0, 3:])


def test_loading_fills_every_tensor_and_keeps_the_configuration(public_folder):
    folder = public_folder(n_layer=1)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.float32 and model.config.n_ctx == 8 and model.config.aux_loss_weight == 0.01
    assert model.config.hidden_size == 16 and model.config.num_hidden_layers == 1
    assert model.config.att_func == "stickbreaking" and model.config.world_size is None


def test_saved_models_come_back(public_folder, tmp_path):
    fast, _ = both(public_folder())
    fast.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    assert torch.equal(again(ids(1, 5)).logits, fast(ids(1, 5)).logits)
    assert AutoConfig.from_pretrained(tmp_path / "saved").aux_loss_weight == 0.01


def test_classification_and_bare_model(public_folder):
    folder = public_folder()
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.float64)
    fast, _ = both(folder)
    assert torch.equal(model.transformer.h[1].mlpf.experts.weight, fast.transformer.h[1].mlpf.experts.weight)
    x = ids(2, 5)
    logits = model(x, attention_mask=torch.ones_like(x)).logits
    hidden = AutoModel.from_pretrained(folder, dtype=torch.float64)(x).last_hidden_state
    assert torch.allclose(logits, hidden[:, -1] @ model.score.weight.T, rtol=1e-11)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("room", [megamf.hf, portable], ids=["native", "portable"])
def test_classification_is_fine_tuned_and_comes_back(public_folder, tmp_path, room, side):
    """A step reduces the loss; the last real token is what counts, wherever padding stands; saved and loaded again."""
    kind = room.ModuleFormerForSequenceClassification
    uneven = {"n_att_experts_per_layer": [2, 4], "n_mlp_experts_per_layer": [5, 3]}
    model = kind.from_pretrained(public_folder(**uneven), num_labels=3, pad_token_id=0, dtype=torch.float64).train()
    x, mask = ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    padding = slice(3) if side == "left" else slice(4, None)
    x[0, padding], mask[0, padding] = 0, 0
    labels = torch.tensor([2, 0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(x, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.01
    assert all(parameter.grad.abs().max() > 0 for name, parameter in model.named_parameters() if "score" in name)
    model.eval()
    row = x[:1, 3:] if side == "left" else x[:1, :4]
    batch = model(x, attention_mask=mask).logits
    assert torch.allclose(batch[:1], model(row).logits, rtol=1e-10)
    model.save_pretrained(tmp_path / "tuned")
    again = kind.from_pretrained(tmp_path / "tuned", dtype=torch.float64)
    assert torch.equal(again(x, attention_mask=mask).logits, batch) and again.config.num_labels == 3


def test_missing_weights_are_initialised_and_nothing_else(public_folder):
    from safetensors.torch import load_file, save_file

    folder = public_folder()
    weights = load_file(folder / "model.safetensors")
    name = "transformer.h.0.mlpf.experts.weight"
    kept = "transformer.h.0.mlpf.output_experts.weight"
    del weights[name]
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {name}
    state = model.state_dict()
    assert 0 < state[name].abs().max() <= 1 / 16
    assert torch.equal(state[kept], weights[kept])


def test_gradient_checkpointing(public_folder):
    gradients = []
    for on in (False, True):
        model = AutoModelForCausalLM.from_pretrained(public_folder(f"public-{on}"), dtype=torch.float64).train()
        if on:
            model.gradient_checkpointing_enable()
        model(ids(2, 6), labels=ids(2, 6)).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(one, two, rtol=1e-12) for one, two in zip(*gradients))


def test_peft_wraps_expert_tensors_and_shared_projections(public_folder):
    fast, slow = both(public_folder())
    x = ids(2, 6)
    outputs = []
    for model in (fast, slow):
        torch.manual_seed(3)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=2,
            init_lora_weights=False,
            target_modules=["k_proj", "v_proj"],
            target_parameters=["q_proj.experts.weight", "mlpf.output_experts.weight"],
        )
        outputs.append(peft.get_peft_model(model, config)(x).logits)
    assert torch.allclose(*outputs, rtol=1e-10, atol=1e-11)
    with torch.no_grad():
        assert not torch.allclose(outputs[0], both(public_folder("again"))[0](x).logits, rtol=1e-3)


def test_attention_weights_cannot_be_returned(public_folder):
    for model in both(public_folder()):
        with pytest.raises(ValueError, match="output_attentions"):
            model(ids(1, 3), output_attentions=True)
