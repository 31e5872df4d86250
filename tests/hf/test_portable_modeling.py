"""The self-contained file: formula, slices of queries, cache, padding, heads."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamf.hf.portable import modeling_moduleformer as portable
from megamf.hf.portable.configuration_moduleformer import ModuleFormerConfig


def load(folder, kind=portable.ModuleFormerForCausalLM, **changes):
    return kind.from_pretrained(folder, dtype=torch.float64, **changes).eval()


def ids(batch, time, seed=0):
    return torch.randint(3, 41, (batch, time), generator=torch.Generator().manual_seed(seed))


def test_stick_breaking_examples():
    # Logits [0.3], [1.0, -0.5], [-2.0, 0.7, 1.5]: keys are unit vectors, queries hold the logits, scaled by sqrt(C).
    logits = torch.tensor([[0.3, 0.0, 0.0], [1.0, -0.5, 0.0], [-2.0, 0.7, 1.5]], dtype=torch.float64)
    keys = torch.eye(3, dtype=torch.float64)[None, None]
    query = (logits * math.sqrt(3))[None, None, None]
    found = portable.stick_breaking_attention(query, keys, keys)[0, 0, 0]
    expected = torch.tensor(
        [[0.574443, 0, 0], [0.455054, 0.377541, 0], [0.007215, 0.121895, 0.817574]], dtype=torch.float64
    )
    assert torch.allclose(found, expected, atol=1e-6)


def test_zero_logits_halve_the_stick():
    zero, keys = torch.zeros(1, 1, 1, 6, 4, dtype=torch.float64), torch.zeros(1, 1, 6, 4, dtype=torch.float64)
    value = torch.eye(6, dtype=torch.float64)[None, None]
    found = portable.stick_breaking_attention(zero, keys, value)[0, 0, 0]
    for i in range(6):
        assert found[i].tolist() == pytest.approx([2.0 ** -(i - j + 1) if j <= i else 0.0 for j in range(6)])


@pytest.mark.parametrize("masked", [False, True])
def test_slices_of_queries_change_nothing(monkeypatch, masked):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 2, 7, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    k = torch.randn(2, 2, 9, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    mask = torch.rand(2, 9, generator=generator) < 0.7 if masked else None
    whole = portable.stick_breaking_attention(q, k, k, mask)
    gradients = torch.autograd.grad(whole.square().sum(), [q, k])
    monkeypatch.setattr(portable, "LOGITS_IN_MEMORY", 2 * 3 * 2 * 9 * 2)
    sliced = portable.stick_breaking_attention(q, k, k, mask)
    assert torch.allclose(sliced, whole, rtol=1e-13)
    for one, two in zip(torch.autograd.grad(sliced.square().sum(), [q, k]), gradients):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        assert torch.allclose(portable.stick_breaking_attention(q, k, k, mask), whole, rtol=1e-13)


def test_released_masks_are_passed_over(public_folder):
    folder = public_folder()
    expected = load(folder)(ids(1, 5)).logits
    weights = load_file(folder / "model.safetensors")
    for i in range(2):
        weights[f"transformer.h.{i}.attn.mask"] = torch.ones(13, 13, dtype=torch.int8).tril()
        weights[f"transformer.h.{i}.attn.cum_weight"] = torch.ones(13, 13).tril(-1)
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    model, info = portable.ModuleFormerForCausalLM.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(model(ids(1, 5)).logits, expected)


def test_cache_holds_one_vector_a_token_where_keys_are_values(public_folder):
    model = load(public_folder(n_head=1, att_hidden=16))
    with torch.no_grad():
        cache = model(ids(2, 6), use_cache=True).past_key_values
    assert [layer.keys.shape for layer in cache.layers] == [(2, 1, 6, 16)] * 2
    assert all(layer.values.numel() == 0 for layer in cache.layers)


def test_history_carries_no_gradient(public_folder):
    model = load(public_folder())
    first = torch.randn(1, 4, 16, dtype=torch.float64, requires_grad=True)
    cache = model(inputs_embeds=first, use_cache=True).past_key_values
    second = model(ids(1, 3), past_key_values=cache, use_cache=True).logits
    whole = model(inputs_embeds=torch.cat([first, model.transformer.wte(ids(1, 3))], dim=1)).logits[:, 4:]
    assert torch.allclose(second, whole, rtol=1e-11)
    assert torch.autograd.grad(second.sum(), first, allow_unused=True)[0] is None


def test_hidden_states_logits_to_keep_and_token_types(public_folder):
    model = load(public_folder())
    x = ids(2, 6)
    output = model(x, output_hidden_states=True, logits_to_keep=2)
    assert len(output.hidden_states) == 3 and output.logits.shape == (2, 2, 41)
    assert torch.allclose(output.hidden_states[-1][:, -2:] @ model.lm_head.weight.T, output.logits)
    embedded = model.transformer.wte(x) + model.transformer.wte(x.flip(1))
    assert torch.equal(model(inputs_embeds=embedded).logits, model(x, token_type_ids=x.flip(1)).logits)
    as_tuple = model(x, return_dict=False, use_cache=False)
    assert torch.equal(as_tuple[0], model(x).logits)


def test_loss_is_cross_entropy_and_auxiliary_loss(public_folder):
    model = load(public_folder())
    x = ids(2, 6)
    label = x.clone()
    label[0, 3] = -100
    output = model(x, labels=label)
    log_prob = output.logits.log_softmax(-1)
    picked = [log_prob[b, t, label[b, t + 1]] for b in range(2) for t in range(5) if label[b, t + 1] != -100]
    expected = -sum(picked) / len(picked) + 0.01 * output.aux_loss
    assert torch.allclose(output.loss, expected, rtol=1e-12)


def test_gradient_checkpointing(public_folder):
    gradients = []
    for on in (False, True):
        model = load(public_folder(f"public-{on}")).train()
        if on:
            model.gradient_checkpointing_enable()
        model(ids(2, 6), labels=ids(2, 6)).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients))


@pytest.mark.parametrize("side", ["left", "right"])
def test_classification_reads_the_last_real_token(public_folder, side):
    folder = public_folder()
    model = load(folder, portable.ModuleFormerForSequenceClassification, num_labels=3, pad_token_id=0)
    torch.nn.init.normal_(model.score.weight)
    x = ids(1, 4)
    pad = torch.zeros(1, 3, dtype=torch.long)
    padded = torch.cat([pad, x] if side == "left" else [x, pad], dim=1)
    batch = torch.cat([padded, ids(1, 7, seed=1)])
    mask = (batch != 0).long()
    alone = model(x).logits
    hidden = model.transformer(x).last_hidden_state[:, -1]
    assert torch.allclose(alone, hidden @ model.score.weight.T, rtol=1e-12)
    output = model(batch, attention_mask=mask, labels=torch.tensor([2, 0]))
    assert torch.allclose(output.logits[:1], alone, rtol=1e-11)
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([2, 0]))
    assert torch.allclose(output.loss, expected)
    if side == "right":
        # Without a mask padding is known by its id; on the right nothing before it sees it.
        assert torch.allclose(model(batch).logits[:1], alone, rtol=1e-11)


def test_classification_of_a_batch_needs_padding_to_be_known(public_folder):
    model = load(public_folder(), portable.ModuleFormerForSequenceClassification)
    with pytest.raises(ValueError, match="attention_mask, or pad_token_id"):
        model(ids(2, 4))


def test_wrong_inputs(public_folder):
    model = load(public_folder())
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"attention_mask is \[1, 4\], expected \[1, 5\]"):
        model(ids(1, 5), attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="4 dimensions"):
        model(ids(1, 5), attention_mask=torch.ones(1, 1, 5, 5))


def test_new_models_have_the_released_initial_weights():
    config = ModuleFormerConfig(
        vocab_size=300, n_layer=1, n_embd=64, att_hidden=64, ffd_hidden=96, n_att_experts=4, n_mlp_experts=4,
        gate_type="gmm", gating_size=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    for name, value in portable.ModuleFormerForCausalLM(config).state_dict().items():
        if value.dim() == 3:
            assert 0.98 / value.shape[1] < value.abs().max() <= 1 / value.shape[1], name
        elif name.endswith("temperature"):
            assert value == 0
        elif ".ln_" not in name and value.dim() == 2:
            std = 1.0 if name.endswith("expert_centroids") else 0.02
            assert abs(value.std() / std - 1) < 0.2, name
